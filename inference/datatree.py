"""A fit as ArviZ keeps one: an ``xarray.DataTree`` that goes to netCDF and back.

The axes of ArviZ get these meanings: ``chain`` is the seed, so that ArviZ's pictures compare
restarts, and ``draw`` is the step in ``sample_stats`` and the Monte Carlo draw elsewhere.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from xarray import DataTree

    from inference.engine import Fit
else:  # a Fit is anything with its fields, and xarray is slow to import
    DataTree = Fit = Any

ELBO_UNITS = "nats per datum"


def to_datatree(
    result: Fit,
    *,
    posterior: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    observed_data: Mapping[str, Any] | None = None,
    constant_data: Mapping[str, Any] | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Any] | None = None,
    max_draws: int | None = 2000,
) -> DataTree:
    """Arranges a fit, and what was computed from it, the way ArviZ reads.

    ================  ==========================================================================
    group             variables
    ================  ==========================================================================
    posterior         the given draws of the latents (chain, draw, ...); without them the fitted
                      parameters (chain, draw=1, ...)
    fit               the fitted parameters, where ``posterior`` is given; ArviZ's schema has no
                      group for them, and pymc-extras keeps a fitted guide's under this name
    log_likelihood    (chain, draw, datum), nats
    evaluation        (chain, datum): what the judges say of each datum, such as its ``elbo`` and
                      ``pareto_k``
    sample_stats      ``elbo`` (chain, draw) of the training, nats per datum; NaN where a seed had
                      stopped or a step was skipped
    validation_stats  ``elbo`` (chain, draw) of held-out data, if there were any
    observed_data     as given
    constant_data     as given
    ================  ==========================================================================

    Coordinates are the seeds (``chain``) and, in the two groups of traces, the steps kept,
    counted from 1 (``draw``). A parameter has one value per seed: its spread in ``az.summary`` is
    the spread over seeds (NaN for one seed), and ESS, R-hat and MCSE, which need several draws,
    are NaN; ``az.summary(tree, kind="stats")`` leaves them out. The traces are drawn by
    ``az.plot_trace(tree, group="sample_stats")``.

    The root's attributes hold ``result.config`` and ``result.info``, one ``config.<key>`` or
    ``info.<key>`` each: numbers and strings as they are, anything else as JSON.

    Args:
        result: what ``fit`` returned.
        posterior: latent draws by site, each (seed, draw, ...).
        log_likelihood: pointwise log-likelihood by observed site, each (seed, draw, datum).
        evaluation: other pointwise numbers by name, each (seed, datum).
        observed_data, constant_data: arrays by name.
        coords: coordinate values by dimension, other than ``chain`` and ``draw``.
        dims: names of a variable's axes after (chain, draw), by variable; ``<variable>_dim_<i>``
            unless given.
        max_draws: the most steps of ``elbo`` to keep: every k-th, counted back from the last, with
            the smallest k that does. None keeps all.

    Nested mappings, such as a network's parameters, become one variable per array, named by the
    keys on the way to it: ``site.path.to.leaf``. A "/" in a name, which netCDF keeps for groups,
    becomes "." too, and bfloat16, which it lacks, float32.

    Returns:
        The tree. ``tree.to_netcdf(path, engine="h5netcdf")`` and ``arviz.from_netcdf(path)``
        return the same one.

    Raises:
        ValueError: an array without its seed or draw axis, names that clash, an impossible
            ``max_draws``.

    Example:
        >>> tree = to_datatree(fit(model, guide, {"x": x}, num_steps=1000, num_seeds=4))
        >>> tree.sample_stats.elbo.isel(draw=-1).values  # the last step's ELBO of each seed
    """
    from arviz_base import dict_to_dataset, from_dict, make_attrs  # over a second: pandas, xarray
    from xarray import DataTree

    num_seeds = len(result.elbo)
    taken = sorted({"chain", "draw"} & (coords or {}).keys())
    if taken:
        raise ValueError(
            f"coords: expected dimensions other than chain and draw, got {taken}; leave them out, "
            f"they are numbered by seed, step and draw"
        )
    coords = dict(coords or {}, chain=result.config["seed"] + np.arange(num_seeds))
    library = {
        "inference_library": "numpyro",
        "inference_library_version": result.info["versions"]["numpyro"],
    }

    params = _arrays("params", result.params)
    _check_axes("params", params, seed=num_seeds)
    params = {name: array[:, None] for name, array in params.items()}
    groups = {"posterior": posterior, "log_likelihood": log_likelihood}
    groups = {group: _arrays(group, tree) for group, tree in groups.items() if tree is not None}
    for group, arrays in groups.items():
        _check_axes(group, arrays, seed=num_seeds, draw=None)
    judged = _arrays("evaluation", evaluation or {})
    _check_axes("evaluation", judged, seed=num_seeds, datum=None)
    groups["posterior" if posterior is None else "fit"] = params
    for group, tree in (("observed_data", observed_data), ("constant_data", constant_data)):
        if tree is not None:
            groups[group] = _arrays(group, tree)

    settings = _settings("config", result.config) | _settings("info", result.info)
    tree = from_dict(
        groups,
        coords=coords,
        dims=dims,
        attrs=dict.fromkeys(groups, library) | {"/": make_attrs(library | settings)},
        # ArviZ would take more chains than draws for transposed axes: here one draw of each of
        # several seeds is what there is, and the axes have been checked.
        check_conventions=False,
    )

    def stats(elbo: np.ndarray, steps: np.ndarray, **attrs: str) -> DataTree:
        dataset = dict_to_dataset(
            {"elbo": elbo}, coords={**coords, "draw": steps}, check_conventions=False, attrs=library
        )
        dataset["elbo"].attrs.update(attrs, units=ELBO_UNITS)
        return DataTree(dataset)

    if judged:
        dataset = dict_to_dataset(
            judged,
            coords=coords,
            dims={name: ["datum"] for name in judged},
            sample_dims=["chain"],
            attrs=library,
            check_conventions=False,
        )
        dataset.attrs["sample_dims"] = "chain"  # netCDF has no lists of one
        tree["evaluation"] = DataTree(dataset)

    num_steps = max(1, *result.info["num_steps"])  # not the steps after every seed has stopped
    keep, thinning = _thin(num_steps, max_draws)
    tree["sample_stats"] = stats(result.elbo[:, keep], keep + 1, thinning=thinning)
    if result.validation_elbo is not None:
        steps = np.asarray(result.info["validation_steps"], int)
        if result.validation_elbo.shape != (num_seeds, len(steps)):
            raise ValueError(
                f"validation_elbo: expected shape (seed={num_seeds}, evaluation={len(steps)}), "
                f'as info["validation_steps"] has it, got {result.validation_elbo.shape}; pass the '
                f"fit as the engine returned it"
            )
        tree["validation_stats"] = stats(result.validation_elbo, steps)
    return tree


def _thin(num_steps: int, max_draws: int | None) -> tuple[np.ndarray, str]:
    """The indices of the steps to keep, the last among them, and which they are in words."""
    if max_draws is not None and max_draws < 1:
        raise ValueError(
            f"max_draws: expected a whole number from 1, or None to keep every step, got "
            f"{max_draws}"
        )
    every = 1 if max_draws is None else max(1, -(-num_steps // max_draws))
    keep = np.arange(num_steps - 1, -1, -every)[::-1]
    if every == 1:
        return keep, f"none: all {num_steps} steps"
    return keep, f"one step in {every}, counted back from the last of {num_steps}"


def _arrays(group: str, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a nested mapping, on the host, under names that netCDF takes."""
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(tree):
        name = ".".join(path).replace("/", ".")
        if name in arrays or name in ("chain", "draw"):
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
    """Raises where an array does not begin with these axes; a size of None is the first's."""
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


def _settings(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One attribute per key. netCDF has neither booleans, None, lists nor dictionaries: JSON."""
    plain = {
        key: value
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
        else json.dumps(value)
        for key, value in settings.items()
    }
    return {f"{prefix}.{key}": value for key, value in plain.items()}
