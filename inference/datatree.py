"""A fit as ArviZ keeps one: an ``xarray.DataTree`` that goes to netCDF and back.

Two of ArviZ's axes get a meaning here. ``chain`` is the seed, so ArviZ's pictures compare
restarts. ``draw`` is the training step in the traces and the Monte Carlo draw elsewhere.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from inference.evaluation import ElboTerms, Estimate, LabelCheck
from inference.fit import programs_of, site_dims

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

    from inference.fit import Fit

    Judged = Estimate | ElboTerms | LabelCheck
    Arrays = Mapping[str, Any]
else:  # xarray is slow to import, a fit is anything with its fields, and _check_mapping asks more
    Arrays = Dataset = DataTree = Fit = Judged = Any

ELBO_UNITS = "nats per datum"
DATUM = "data"  # the axis of the data in every group
SAMPLES = ("chain", "draw")

WHAT_TO_GIVE = {
    "posterior": "give the draws of sample_posterior",
    "posterior_predictive": "give the draws of sample_posterior_predictive",
    "prior_predictive": "give the draws of sample_prior_predictive",
    "log_likelihood": "give the result of pointwise_log_likelihood; Estimates need no keyword",
    "observed_data": 'give arrays by name, for example {"x": x}',
    "constant_data": 'give arrays by name, for example {"c": c}',
    "coords": 'give labels by axis, for example {"data": names}',
    "dims": 'give names of axes by variable, for example {"x": ["data", "row", "column"]}',
}


def to_datatree(
    result: Fit,
    *judged: Judged,
    posterior: Arrays | None = None,
    posterior_predictive: Arrays | None = None,
    prior_predictive: Arrays | None = None,
    log_likelihood: Arrays | None = None,
    observed_data: Arrays | None = None,
    constant_data: Arrays | None = None,
    coords: Arrays | None = None,
    dims: Arrays | None = None,
    max_draws: int | None = 2000,
) -> DataTree:
    """Arranges a fit, and numbers computed from it, the way ArviZ reads them.

    ====================  ======================================================================
    group                 variables
    ====================  ======================================================================
    parameters            fitted parameters, (chain, draw=1, ...)
    sample_stats          ``elbo`` of the training, (chain, draw), nats per datum. NaN if a seed
                          had stopped or a step was skipped. Absent if nothing was trained
    validation_stats      ``elbo`` of held-out data during the training, (chain, draw), if any
    evaluation            judged numbers, (chain, data): ``elbo``, ``log_likelihood``,
                          ``pareto_k``, ...
    posterior             draws of latent sites, (chain, draw, ...)
    log_likelihood        log p(x | z) by draw, (chain, draw, data), nats: ``az.loo`` reads it
    posterior_predictive  as given, (chain, draw, ...)
    prior_predictive      as given, (chain, draw, ...)
    observed_data         as given, (data, ...)
    constant_data         as given, (data, ...)
    ====================  ======================================================================

    A group that is not given is absent. So ArviZ finds no ``posterior`` until there are draws:
    ``az.summary(tree, group="parameters", kind="stats")`` shows the parameters, with their spread
    over seeds. ``az.plot_trace(tree, group="sample_stats")`` draws the training. With
    ``posterior`` and ``log_likelihood``, ``az.loo(tree)`` and ``az.compare`` run.

    The marginal likelihood log p(x) that ``log_likelihood(fit, data)`` estimates is no function
    of a draw. It stands in ``evaluation``, as the variable ``log_likelihood``.

    ``chain`` is labelled by the seeds, and ``draw`` of a trace by the steps that were kept,
    counted from 1. The axis of the data is ``data`` in every group. Other plates give their axis
    their name. The remaining axes of a site are ``<site>_dim_0``, ``<site>_dim_1``, ...

    The root's attributes hold ``result.config`` and ``result.info``, one ``config.<key>`` or
    ``info.<key>`` each: numbers and strings as they are, anything else as JSON. The attributes of
    ``evaluation`` hold the type, shape and hash of the judged arrays (``data``, JSON) and the
    number of draws behind each variable (``num_samples.<variable>``).

    Args:
        result: a fit.
        judged: results of ``elbo_terms``, ``pointwise_elbo``, ``log_likelihood`` or
            ``label_check`` for this fit, all on the same data.
        posterior: draws by latent site, each (seed, draw, ...).
        posterior_predictive, prior_predictive: draws by site, each (seed, draw, ...).
        log_likelihood: log p(x | z) by observed site, each (seed, draw, datum), at the draws of
            ``posterior``.
        observed_data, constant_data: arrays by name, each (datum, ...).
        coords: labels by dimension, other than ``chain`` and ``draw``. The default is 0, 1, ...
        dims: names of a variable's axes after (chain, draw), by variable. They replace the
            default names, except in ``evaluation`` and ``log_likelihood``.
        max_draws: the most steps of the training to keep. Every k-th is kept, counted back from
            the last, with the smallest k that does. None keeps all.

    Nested mappings, such as a network's parameters, become one variable per array. Its name joins
    the keys on the way to it: ``site.path.to.leaf``. netCDF keeps "/" for groups and lacks
    bfloat16, so "/" in a name becomes "." and bfloat16 becomes float32.

    Returns:
        The tree. ``tree.to_netcdf(path, engine="h5netcdf")`` and ``arviz.from_netcdf(path)``
        return the same one.

    Raises:
        TypeError: a group is not a mapping, or a judged thing is not a judge's result.
        ValueError: an array lacks its seed or draw axis, a site is not latent, names clash,
            lengths or the judged data differ, or ``max_draws`` is impossible.

    Example:
        >>> result = fit(model, guide, {"x": x}, num_steps=1000, num_seeds=4)
        >>> tree = to_datatree(result, elbo_terms(result, test), log_likelihood(result, test))
        >>> tree["evaluation"].elbo.mean("data").values  # held-out ELBO of each seed
    """
    from arviz_base import make_attrs  # over a second: pandas, xarray
    from xarray import DataTree

    given = {
        "posterior": posterior,
        "posterior_predictive": posterior_predictive,
        "prior_predictive": prior_predictive,
        "log_likelihood": log_likelihood,
        "observed_data": observed_data,
        "constant_data": constant_data,
    }
    for name, value in (given | {"coords": coords, "dims": dims}).items():
        _check_mapping(name, value)
    version = result.info.get("versions", {}).get("numpyro")
    library = {"inference_library": "numpyro"}
    library |= {"inference_library_version": version} if version else {}
    labels = _Labels(_coords(result, coords or {}), make_attrs(library))

    given = {group: _arrays(group, values) for group, values in given.items() if values is not None}
    sites = _named(site_dims(result)) if given else {}
    dims = _named(dims or {})
    groups = {}
    for group, values in given.items():
        names = _names_of_axes(result, group, values, sites, dims)
        samples = () if group.endswith("_data") else SAMPLES
        groups[group] = labels.dataset(group, values, names, samples)
    if posterior and log_likelihood:
        _check_same_draws(groups["posterior"], groups["log_likelihood"])
    groups["parameters"] = labels.dataset("parameters", _parameters(result), dims, SAMPLES)
    if judged:
        numbers, attrs = _judged(judged, result.num_seeds)
        names = {name: [DATUM] for name in numbers}
        groups["evaluation"] = labels.dataset("evaluation", numbers, names, SAMPLES[:1])
        groups["evaluation"].attrs |= attrs
    for group, (elbo, steps, attrs) in _traces(result, max_draws).items():
        groups[group] = labels.dataset(group, {"elbo": elbo}, {}, SAMPLES).assign_coords(draw=steps)
        groups[group]["elbo"].attrs |= attrs

    tree = DataTree.from_dict(groups)
    settings = _settings("config", result.config) | _settings("info", result.info)
    tree.attrs = make_attrs(library | settings)
    return tree


# --- groups ---------------------------------------------------------------------------------------


def _parameters(result: Fit) -> dict[str, np.ndarray]:
    """The fitted parameters, (seed, draw=1, ...)."""
    named = {
        name: {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        if isinstance(tree, Mapping | tuple | list)
        else tree
        for name, tree in result.params.items()
    }
    arrays = _arrays("parameters", named)
    _check_axes("parameters", arrays, seed=result.num_seeds)
    return {name: array[:, None] for name, array in arrays.items()}


def _judged(
    judged: Sequence[Judged], num_seeds: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The numbers that judges gave, (seed, datum) by name, and the attributes of their group."""
    arrays: dict[str, np.ndarray] = {}
    attrs: dict[str, Any] = {}
    first: tuple[str, Estimate] | None = None
    for name, estimate in _estimates(judged):
        first = first or (name, estimate)
        _check_same_data(first, (name, estimate))
        parts = {name: estimate.pointwise, "pareto_k": estimate.pareto_k}
        for part, array in parts.items():
            if array is None:
                continue
            if part in arrays:
                raise ValueError(
                    f"judged: expected names that differ, got {part!r} twice, the second time of "
                    f"{name!r}; give one of them, or change one by dataclasses.replace(estimate, "
                    f"name=...) or dataclasses.replace(estimate, pareto_k=None)"
                )
            if len(array) != num_seeds:
                raise ValueError(
                    f"judged: expected {name!r} for {num_seeds} seeds, as many as the fit has, got "
                    f"{len(array)}; judge the fit that you give"
                )
            arrays[part] = np.asarray(array)
            attrs[f"num_samples.{part}"] = estimate.num_samples
    return arrays, attrs | {"data": json.dumps(first[1].data if first else {})}


def _estimates(judged: Sequence[Judged]) -> Iterator[tuple[str, Estimate]]:
    for item in judged:
        if isinstance(item, Estimate):
            yield clean(item.name), item
        elif isinstance(item, ElboTerms):
            yield from (("elbo", item.elbo), ("reconstruction", item.reconstruction))
            yield "kl", item.kl
        elif isinstance(item, LabelCheck):
            yield "label_information", item.information
        else:
            raise TypeError(
                f"judged: expected an Estimate, ElboTerms or a LabelCheck, got "
                f"{type(item).__name__}; give what elbo_terms or log_likelihood returns, and draws "
                f"by keyword, for example posterior=draws"
            )


def _check_same_data(first: tuple[str, Estimate], other: tuple[str, Estimate]) -> None:
    (a, ours), (b, theirs) = (first[0], first[1].data), (other[0], other[1].data)
    differ = [
        f"array {name} is {ours.get(name, 'absent')}, and {theirs.get(name, 'absent')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differ:
        raise ValueError(
            f"judged: expected estimates on the same data, got others in {a!r} and {b!r}: "
            f"{'; '.join(differ)}; judge the same arrays, or make two trees"
        )


def _traces(
    result: Fit, max_draws: int | None
) -> dict[str, tuple[np.ndarray, np.ndarray, dict[str, str]]]:
    """The ELBO during training, its steps and its attributes, by group."""
    if max_draws is not None and max_draws < 1:
        raise ValueError(
            f"max_draws: expected a whole number from 1, or None to keep every step, got "
            f"{max_draws}"
        )
    traces = {}
    units = {"units": ELBO_UNITS}
    if result.elbo.shape[1]:
        stopped = max(1, *result.info["num_steps"])  # every seed, after this step
        num_steps = min(stopped, result.elbo.shape[1])
        keep, thinning = _thin(num_steps, max_draws)
        attrs = units | {"thinning": thinning}
        traces["sample_stats"] = result.elbo[:, keep], keep + 1, attrs
    elbo = result.validation_elbo
    if elbo is not None:
        steps = np.asarray(result.info["validation_steps"], int)
        if elbo.shape != (result.num_seeds, len(steps)):
            raise ValueError(
                f"validation_elbo: expected shape (seed={result.num_seeds}, evaluation="
                f'{len(steps)}), as info["validation_steps"] has it, got {elbo.shape}; pass the '
                f"fit as the engine returned it"
            )
        traces["validation_stats"] = elbo, steps, units
    return traces


def _thin(num_steps: int, max_draws: int | None) -> tuple[np.ndarray, str]:
    """The indices of the steps to keep, the last among them, and a description of the choice."""
    every = 1 if max_draws is None else max(1, -(-num_steps // max_draws))
    keep = np.arange(num_steps - 1, -1, -every)[::-1]
    if every == 1:
        return keep, f"none: all {num_steps} steps"
    return keep, f"one step in {every}, counted back from the last of {num_steps}"


def _settings(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One attribute per key. netCDF lacks booleans, None, lists and dictionaries: JSON has them."""
    plain = {
        key: value
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
        else json.dumps(value)
        for key, value in settings.items()
    }
    return {f"{prefix}.{key}": value for key, value in plain.items()}


# --- axes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    """Labels of axes and attributes that all groups of a tree share.

    Attributes:
        coords: labels by axis. Other axes are numbered from 0.
        attrs: the attributes of every group.
    """

    coords: dict[str, np.ndarray]
    attrs: dict[str, Any]

    def dataset(
        self,
        group: str,
        arrays: Mapping[str, np.ndarray],
        names: Mapping[str, Sequence[str]],
        samples: tuple[str, ...],
    ) -> Dataset:
        """The arrays, with a name and labels for every axis.

        Args:
            group: the group's name, for messages.
            arrays: arrays by variable.
            names: names of the axes after ``samples``, by variable, as far as they have names.
            samples: names of the first axes.
        """
        from xarray import Dataset

        variables, coords = {}, {}
        for name, array in arrays.items():
            num_axes = array.ndim - len(samples)
            axes = (*samples, *_complete(group, name, num_axes, names.get(name, ()), arrays))
            variables[name] = (axes, array)
            for axis, size in zip(axes, array.shape, strict=True):
                labels = coords.setdefault(axis, self.coords.get(axis, np.arange(size)))
                if len(labels) != size:
                    raise ValueError(
                        f"{group}: expected {len(labels)} entries along {axis!r}, as coords or "
                        f"another array of the group has them, got {size} in {name!r}; give as "
                        f"many, or name the axis otherwise, for example dims={{{name!r}: ['k']}}"
                    )
        # netCDF has no lists of one.
        sample_dims = samples[0] if len(samples) == 1 else list(samples)
        return Dataset(variables, coords, self.attrs | {"sample_dims": sample_dims})


def _coords(result: Fit, coords: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Labels by axis, with the seeds for ``chain``."""
    taken = sorted(coords.keys() & {*SAMPLES})
    if taken:
        raise ValueError(
            f"coords: expected axes other than chain and draw, got {taken}; leave them out, "
            f"they are numbered by seed, step and draw"
        )
    labels = {clean(axis): np.asarray(values) for axis, values in coords.items()}
    return labels | {"chain": np.asarray(result.seeds)}


def _named(names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Names of axes by variable, as netCDF takes them."""
    return {clean(variable): [clean(axis) for axis in axes] for variable, axes in names.items()}


def clean(name: str) -> str:
    """A name without "/", which netCDF keeps for groups."""
    return name.replace("/", ".")


def _complete(
    group: str, name: str, num_axes: int, names: Sequence[str], variables: Mapping[str, Any]
) -> list[str]:
    """Names for all axes of a variable: the given ones, and ``<variable>_dim_<i>``.

    In xarray two things of a group cannot share a name. So a plate that is called like a
    variable, or chain or draw, gives its axis no name.
    """
    if len(names) > num_axes:
        raise ValueError(
            f"dims: expected at most {num_axes} names for {name!r} in {group}, got {list(names)}; "
            f"name the axes after chain and draw"
        )
    if DATUM in names and DATUM in variables:
        raise ValueError(
            f"{group}: expected other names than {DATUM!r}, the axis of the data, got an array of "
            f"that name; rename it"
        )
    taken = {*variables, *SAMPLES}
    defaults = (d for d in (f"{name}_dim_{i}" for i in range(2 * num_axes)) if d not in names)
    padded = [*names, *[None] * (num_axes - len(names))]
    return [next(defaults) if axis is None or axis in taken else axis for axis in padded]


def _names_of_axes(
    result: Fit,
    group: str,
    arrays: Mapping[str, np.ndarray],
    sites: Mapping[str, Sequence[str]],
    dims: Mapping[str, Sequence[str]],
) -> Mapping[str, Sequence[str]]:
    """Names of the axes after (chain, draw), by variable, in a group that the caller gives.

    Raises:
        ValueError: an array lacks an axis, or stands in ``posterior`` and is not latent.
    """
    if group.endswith("_data"):
        names = {name: [DATUM][: array.ndim] for name, array in arrays.items()}
        fitting = {
            n: axes for n, axes in sites.items() if n in names and len(axes) == arrays[n].ndim
        }
        return {**names, **fitting, **dims}
    if group == "posterior" and sites:
        found = programs_of(result, result.batch)
        latent = {clean(name) for name in (*found.latents, *found.summed)}
        others = sorted(arrays.keys() - latent)
        if others:
            raise ValueError(
                f"posterior: expected draws of the latent sites {sorted(latent)}, got {others}; "
                f"{WHAT_TO_GIVE[group]}"
            )
    _check_axes(group, arrays, seed=result.num_seeds, draw=None)
    if group == "log_likelihood":
        names = known = {name: [DATUM] for name in arrays}
    else:
        names = {**sites, **dims}
        known = {name: axes for name, axes in sites.items() if name not in dims}
    for name, array in arrays.items():
        if name in known and array.ndim != 2 + len(known[name]):
            axes = ", ".join([f"seed={result.num_seeds}", "draw", *known[name]])
            raise ValueError(
                f"{group}: expected {name!r} of shape ({axes}), got {array.shape}; "
                f"{WHAT_TO_GIVE[group]}"
            )
    return names


# --- arrays ---------------------------------------------------------------------------------------


def _check_mapping(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(
            f"{name}: expected a mapping, got {type(value).__name__}; {WHAT_TO_GIVE[name]}"
        )


def _check_same_draws(posterior: Dataset, log_likelihood: Dataset) -> None:
    expected, got = posterior.sizes["draw"], log_likelihood.sizes["draw"]
    if got != expected:
        raise ValueError(
            f"log_likelihood: expected {expected} draws, as posterior has, got {got}; give "
            f"pointwise_log_likelihood the draws of posterior"
        )


def _arrays(group: str, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a nested mapping, on the host, under names that netCDF takes."""
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(tree):
        name = clean(".".join(path))
        if name in arrays or name in SAMPLES:
            raise ValueError(
                f"{group}: expected names that differ from one another and from chain and draw, "
                f"got {name!r}, made of the keys {path}; rename one"
            )
        array = np.asarray(leaf)
        arrays[name] = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    return arrays


def _leaves(tree: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        inner = _leaves(value) if isinstance(value, Mapping) else [((), value)]
        for path, leaf in inner:
            yield (str(key), *path), leaf


def _check_axes(group: str, arrays: Mapping[str, np.ndarray], **sizes: int | None) -> None:
    """Raises for an array that does not begin with these axes.

    A size of None is the first array's.
    """
    for name, array in arrays.items():
        got = array.shape[: len(sizes)]
        if len(got) < len(sizes) or any(
            size not in (None, n) for size, n in zip(sizes.values(), got, strict=True)
        ):
            expected = (axis if n is None else f"{axis}={n}" for axis, n in sizes.items())
            raise ValueError(
                f"{group}: expected {name!r} of shape ({', '.join(expected)}, ...), got "
                f"{array.shape}; move these axes to the front (array[None] adds a seed axis of "
                f"length 1, array[:, None] a draw axis)"
            )
        sizes = dict(zip(sizes, got, strict=True))
