"""What a fitted model is for: sample, encode, decode, reconstruct, interpolate, traverse.

Functions of a fit. Conditions are given by keyword, as the model takes them. They return values by
site name, (seed, draw, datum, ...), or (seed, datum, ...) if there are no draws. A global site has
no datum axis.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax import lax, random
from jaxtyping import Array, Float
from numpyro.handlers import condition, seed, substitute, trace
from numpyro.primitives import Messenger

from inference._checks import ProgramError, check_arguments
from inference._data import as_arrays, check_arrays
from inference._judges import (
    Judged,
    compiled,
    default_key,
    judged_data,
    over_data,
    require_fit,
    shared_draws,
    values_of,
)
from inference._missing import Masking, masked_arrays
from inference._settings import require_whole
from inference.evaluation import mean
from inference.fit import Fit, programs_of
from inference.sites import (
    UNKNOWN,
    ChecksData,
    DataPlates,
    Program,
    Site,
    abstract,
    base,
    given_values,
    is_auxiliary,
    is_latent,
    length,
    num_values,
    observed_arrays,
    trace_of,
)

Values = dict[str, Any]  # arrays by site name

DRAWS_AT_ONCE = 20  # in memory together
DATA_AT_ONCE = 500


def sample_prior_predictive(
    result: Fit, num_samples: int = 1, *, key: Array | None = None, **conditions: Any
) -> Values:
    """Draws latents from the prior and observations from the likelihood: p(x, z | c).

    Args:
        result: what ``fit`` returned.
        num_samples: draws for each datum.
        key: a random key. A fixed one by default.
        conditions: arrays of shape (M, ...) by name. Without conditions there is one datum. Labels
            that are seen in part are conditions too: a known one is not drawn.

    Returns:
        Every latent and observed site by name, (seed, draw, M, ...).

    Raises:
        ValueError: conditions that the model refuses, or that are missing.
    """
    require_fit(result)
    require_whole("num_samples", num_samples, 1)
    arrays = given_conditions(result, conditions)
    plates = programs_of(result, result.batch).plates
    draw = compiled(_prior_draws, result.model, plates, num_samples)
    key = default_key(key, "sample_prior_predictive")
    return _each_seed(result, lambda values: draw(values, key, arrays))


def sample_posterior(
    result: Fit,
    data: Any,
    num_samples: int = 1,
    *,
    key: Array | None = None,
    return_sites: Iterable[str] | None = None,
) -> Values:
    """Draws of the latent sites from the guide, q(z | x, c).

    Args:
        result: what ``fit`` returned.
        data: as the programs take them, or ``result.prepare(data)``.
        num_samples: draws for each datum.
        key: a random key. A fixed one by default.
        return_sites: the sites to return. All by default.

    Returns:
        By latent site, (seed, draw, datum, ...); a global site (seed, draw, ...).

    Raises:
        ValueError: data that the programs refuse; unknown sites.
        MemoryError: the draws would fill more than half of the free memory.
    """
    judged = judged_data(result, data)
    key = default_key(key, "sample_posterior")
    sites = _chosen(return_sites, judged.programs.latents)
    return _posterior(result, judged, _posterior_draws, num_samples, key, sites)


def sample_posterior_predictive(
    result: Fit,
    data: Any,
    num_samples: int = 1,
    *,
    key: Array | None = None,
    return_sites: Iterable[str] | None = None,
) -> Values:
    """Draws of the observed sites, given latents from the guide.

    Args:
        result, data, num_samples, key, return_sites: as in ``sample_posterior``.

    Returns:
        By observed site, (seed, draw, datum, ...).

    Raises:
        ValueError: as ``sample_posterior``.
    """
    judged = judged_data(result, data)
    key = default_key(key, "sample_posterior_predictive")
    sites = _chosen(return_sites, judged.programs.observed)
    return _posterior(result, judged, _predictive_draws, num_samples, key, sites)


def encode(result: Fit, data: Any, *, key: Array | None = None) -> Values:
    """The mean of q(z | x, c) at every latent site, or with a key one draw.

    A Categorical or a Bernoulli has its most probable value in place of a mean. A mean without a
    formula is taken over a thousand draws. In a chain of latent sites it is the mean given a draw
    of the sites before it, or given their most probable value.

    Args:
        result, data: as in ``sample_posterior``.
        key: a random key, to draw.

    Returns:
        By latent site, (seed, datum, ...); a global site (seed, ...).
    """
    judged = judged_data(result, data)
    if key is not None:
        return {n: v[:, 0] for n, v in sample_posterior(result, data, 1, key=key).items()}
    key = default_key(None, "encode")
    sites = tuple(judged.programs.latents)
    return _posterior(result, judged, _posterior_means, 1, key, sites, squeeze=True)


def decode(result: Fit, latents: Mapping[str, Any], **conditions: Any) -> Values:
    """The mean of every observed site given the latents, p(x | z, c).

    Args:
        result: what ``fit`` returned.
        latents: by site, (seed, datum, ...), as ``encode`` returns them.
        conditions: arrays of shape (datum, ...) by name, where the model has conditions. A fit
            with ``missing="mask"`` takes NaN in them.

    Returns:
        By observed site, (seed, datum, ...).

    Raises:
        ValueError: latents of other sites or shapes; conditions that the model refuses.
    """
    require_fit(result)
    arrays = given_conditions(result, conditions)
    programs = programs_of(result, result.batch)
    if latents.keys() != programs.latents.keys():
        raise ValueError(
            f"latents: expected the sites {', '.join(programs.latents)}, got "
            f"{', '.join(latents) or 'none'}; give what encode returns"
        )
    local = {n: np.asarray(v) for n, v in latents.items() if _is_local(programs, n)}
    shared = {n: np.asarray(v) for n, v in latents.items() if n not in local}
    for name, values in (local | shared).items():
        if values.shape[:1] != (result.num_seeds,):
            raise ValueError(
                f"latents[{name!r}]: expected shape (seed={result.num_seeds}, datum, ...), got "
                f"{values.shape}; the seed comes first"
            )
    counts = {n: v.shape[1] for n, v in local.items()} | {n: len(a) for n, a in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"latents: expected as many data of each, got {counts}")
    axes = tuple((name, programs.latents[name].data_axis) for name in local)
    size = next(iter(counts.values()), 1)
    means = compiled(_decode, result.model, programs.plates, axes, size)
    parts = [
        means(
            values_of(result, i),
            {n: v[i] for n, v in local.items()},
            {n: v[i] for n, v in shared.items()},
            arrays,
        )
        for i in range(result.num_seeds)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *jax.device_get(parts))


def reconstruct(result: Fit, data: Any, *, key: Array | None = None) -> Values:
    """The mean of p(x | z, c) at the mean of q(z | x, c), or with a key at a draw from it.

    Args:
        result, data, key: as in ``encode``.

    Returns:
        By observed site, (seed, datum, ...).
    """
    judged = judged_data(result, data)
    latents = encode(result, data, key=key)
    given = judged.arrays.keys() - _observations(result, judged)
    return decode(result, latents, **{name: judged.arrays[name] for name in given})


def interpolate(
    start: Mapping[str, Any], end: Mapping[str, Any], num_points: int = 10
) -> dict[str, Float[np.ndarray, "seed datum ..."]]:
    """Latents along the straight line between two, ends included, for ``decode``.

    Args:
        start, end: by site, (seed, ...), one latent each.
        num_points: points on the line.

    Raises:
        ValueError: fewer than two points.
    """
    if num_points < 2:
        raise ValueError(f"num_points: expected at least 2, got {num_points}")
    pairs = {name: (np.asarray(start[name]), np.asarray(end[name])) for name in start}
    return {name: np.linspace(a, b, num_points, axis=1) for name, (a, b) in pairs.items()}


def traverse(
    latents: Mapping[str, Any], site: str, dim: int, values: Any
) -> dict[str, Float[np.ndarray, "seed datum ..."]]:
    """Latents along one dimension of a site, with the others fixed.

    Args:
        latents: by site, (seed, ...), one latent each.
        site: the site's name.
        dim: which dimension of it.
        values: (N,), what the dimension takes.

    Returns:
        By site, (seed, N, ...), for ``decode``.

    Raises:
        ValueError: there is no such site or dimension.
    """
    values = np.asarray(values)
    if site not in latents:
        raise ValueError(f"site: expected one of {', '.join(latents)}, got {site!r}")
    size = np.shape(latents[site])[-1]
    if not -size <= dim < size:
        raise ValueError(f"dim: expected a dimension of {site}, below {size}, got {dim}")
    along = {n: np.repeat(np.asarray(v)[:, None], len(values), axis=1) for n, v in latents.items()}
    along[site][..., dim] = values
    return along


# --- checks ---------------------------------------------------------------------------------------


def given_conditions(result: Fit, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions as arrays that the model takes, with masks if the fit makes them."""
    arrays, model = as_arrays(conditions, "conditions"), result.model
    masked = masked_arrays(result.model, result.config.get("missing"))
    if arrays:
        check_arrays(arrays, "conditions", masked)
    check_arguments("model", model, arrays)
    if arrays and isinstance(model, ChecksData) and _takes(model.check_data, arrays):
        model.check_data(**arrays)
    return Masking(None, masked)(None, arrays)


def _takes(function: Callable[..., Any], arrays: Mapping[str, Any]) -> bool:
    try:
        check_arguments("check_data", function, arrays)
    except ProgramError:
        return False
    return True


def _is_local(programs: Any, name: str) -> bool:
    return programs.latents[name].data_axis is not None


def _observations(result: Fit, judged: Judged) -> set[str]:
    """The arrays without which the model generates: those that it observes."""
    parameters = inspect.signature(result.model).parameters
    optional = {name for name, p in parameters.items() if p.default is not p.empty}
    return observed_arrays(result.model, judged.arrays) & optional


# --- every seed -----------------------------------------------------------------------------------


def _each_seed(result: Fit, run: Callable[[Any], Values]) -> Values:
    """``run`` on the parameters of every seed by itself, joined along a leading axis."""
    parts = [jax.device_get(run(values_of(result, i))) for i in range(result.num_seeds)]
    return jax.tree.map(lambda *x: np.stack(x), *parts)


def _posterior(
    result: Fit,
    judged: Judged,
    function: Callable[..., Any],
    num_samples: int,
    key: Array,
    sites: tuple[str, ...],
    squeeze: bool = False,
) -> Values:
    """Draws of some sites that a function makes batch by batch, (seed, draw, datum, ...)."""
    require_whole("num_samples", num_samples, 1)
    programs = judged.programs
    axes = programs.latents | programs.observed
    shared = tuple(name for name in axes if axes[name].data_axis is None)
    statics = result.model, result.guide, programs.plates, shared
    draw = compiled(_chosen_draws, function, sites, *statics, num_samples)
    _check_memory(result, judged, draw, num_samples)
    whole: dict[str, list[Any]] = {}

    def one_batch(values: Any, batch_key: Array, batch: Any) -> Any:
        found = draw(values, key, batch_key, batch)
        for name in found.keys() & set(shared):  # the same in every batch
            whole.setdefault(name, []).append(np.asarray(found.pop(name)))
        # a function of shared sites alone still has to say how many data there are
        return found or {"": np.zeros(length(batch))}

    found = over_data(one_batch, result, judged, key, DATA_AT_ONCE)
    found.pop("", None)
    found = {name: np.moveaxis(values, 2, 1) for name, values in found.items()}
    found |= {name: np.stack(parts[: result.num_seeds]) for name, parts in whole.items()}
    return {name: values[:, 0] for name, values in found.items()} if squeeze else found


def _chosen(names: Iterable[str] | None, sites: Mapping[str, Any]) -> tuple[str, ...]:
    """The sites to return.

    Raises:
        ValueError: a site is none of ``sites``.
    """
    chosen = tuple(sites if names is None else names)
    for name in chosen:
        if name not in sites:
            raise ValueError(
                f"return_sites: expected some of {', '.join(sites) or 'none'}, got {name!r}"
            )
    return chosen


def _check_memory(
    result: Fit, judged: Judged, draw: Callable[..., Values], num_samples: int
) -> None:
    """Raises MemoryError for draws that would fill more than half of the free memory.

    Args:
        result: the fit.
        judged: the data.
        draw: what makes the draws of a batch.
        num_samples: how many for each datum.
    """
    num_data, size = length(judged.arrays), DATA_AT_ONCE
    size = min(size, num_data) if judged.programs.takes_batches else num_data
    batch = abstract(judged.arrays, size)
    shapes = jax.eval_shape(draw, values_of(result, 0), random.key(0), random.key(0), batch)
    axes = judged.programs.latents | judged.programs.observed
    data = {n: num_data / size if axes[n].data_axis is not None else 1 for n in shapes}
    whole = sum(data[n] * a.size * a.dtype.itemsize for n, a in shapes.items()) * result.num_seeds
    free = psutil.virtual_memory().available / 2
    if whole > free:
        raise MemoryError(
            f"num_samples: expected draws that fill at most half of the free memory, "
            f"{free / 1e9:.3g} GB, got {num_samples}, which fill {whole / 1e9:.3g} GB; ask for at "
            f"most {int(free / whole * num_samples)}, for fewer data, or for fewer sites "
            f"(return_sites)"
        )


# --- one batch ------------------------------------------------------------------------------------


def _chosen_draws(function: Callable[..., Values], sites: tuple[str, ...], *args: Any) -> Values:
    """The draws of some sites. XLA leaves out what only the others need."""
    return {name: values for name, values in function(*args).items() if name in sites}


class _Unobserved(Messenger):
    """Draws the sites that a program observes."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and not is_auxiliary(msg):
            msg["value"], msg["is_observed"] = None, False


class _Told(Messenger):
    """Gives latent sites the values that the data tell, in place of a draw.

    It goes around the handler that records the sites.
    """

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and given_values(msg) is not None:
            given = given_values(msg)
            msg["value"] = jnp.where(given == UNKNOWN, msg["value"], given).astype(
                msg["value"].dtype
            )


class _Modes(Messenger):
    """Gives discrete latent sites their most probable value, in place of a draw."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or not is_latent(msg) or msg["value"] is not None:
            return
        count = num_values(msg["fn"].support)
        if count is not None:
            fn = base(msg["fn"])
            shape = msg["fn"].batch_shape + msg["fn"].event_shape
            values = jnp.arange(count).reshape(-1, *[1] * len(shape))
            values = jnp.broadcast_to(values, (count, *shape))
            msg["value"] = jnp.argmax(fn.log_prob(values), axis=0).astype(jnp.int32)


def data_first(site: Site, plates: DataPlates, value: Array) -> Array:
    """The value with the data along its first axis, if it has a data axis."""
    if not plates.hold(site):
        return value
    axis = plates.axis(site) - len(site["fn"].event_shape)
    return jnp.moveaxis(jnp.asarray(value), axis, 0)


def latents_of(sites: Values, plates: DataPlates) -> Values:
    """The latents that a guide drew, the data first, without what it draws for itself."""
    return {
        name: data_first(site, plates, site["value"])
        for name, site in sites.items()
        if is_latent(site) and not is_auxiliary(site)
    }


def _prior_draws(
    model: Program, plates: DataPlates, num_samples: int, params: Any, key: Array, arrays: Values
) -> Values:
    def draw(key: Array) -> Values:
        with _Told():
            sites = trace_of(model, key, params, **arrays)
        return {
            name: data_first(site, plates, site["value"])
            for name, site in sites.items()
            if is_latent(site)
        }

    return lax.map(draw, random.split(key, num_samples), batch_size=DRAWS_AT_ONCE)


def _latent_draws(
    guide: Program, shared: tuple[str, ...], params: Any, keys: tuple[Array, Array], batch: Values
) -> dict[str, Site]:
    """The guide's sites, global ones by the first key alone: the same for every batch."""
    same = shared_draws(guide, shared, params, keys[0], batch)
    return trace_of(guide, keys[1], params | same, **batch)


def _both_keys(key: Array, batch_key: Array, num_samples: int) -> tuple[Array, Array]:
    return random.split(key, num_samples), random.split(batch_key, num_samples)


def _batch_first(values: Values, shared: tuple[str, ...]) -> Values:
    """(draw, datum, ...) to (datum, draw, ...), as batches are joined; global sites stay."""
    return {n: v if n in shared else jnp.moveaxis(v, 1, 0) for n, v in values.items()}


def _posterior_draws(
    model: Program,
    guide: Program,
    plates: DataPlates,
    shared: tuple[str, ...],
    num_samples: int,
    params: Any,
    key: Array,
    batch_key: Array,
    batch: Values,
) -> Values:
    def draw(keys: tuple[Array, Array]) -> Values:
        return latents_of(_latent_draws(guide, shared, params, keys, batch), plates)

    keys = _both_keys(key, batch_key, num_samples)
    return _batch_first(lax.map(draw, keys, batch_size=DRAWS_AT_ONCE), shared)


def _posterior_means(
    model: Program,
    guide: Program,
    plates: DataPlates,
    shared: tuple[str, ...],
    num_samples: int,
    params: Any,
    key: Array,
    batch_key: Array,
    batch: Values,
) -> Values:
    sites = _latent_draws(_Modes(guide), shared, params, (key, batch_key), batch)
    means = {}
    for name, site in sites.items():
        if is_latent(site) and not is_auxiliary(site):
            is_discrete = num_values(site["fn"].support) is not None
            value = site["value"] if is_discrete else mean(site["fn"], key)
            means[name] = data_first(site, plates, value)[None]
    return _batch_first(means, shared)


def _predictive_draws(
    model: Program,
    guide: Program,
    plates: DataPlates,
    shared: tuple[str, ...],
    num_samples: int,
    params: Any,
    key: Array,
    batch_key: Array,
    batch: Values,
) -> Values:
    def draw(keys: tuple[Array, Array]) -> Values:
        guide_key, model_key = random.split(keys[1])
        drawn = _latent_draws(guide, shared, params, (keys[0], guide_key), batch)
        latents = {name: site["value"] for name, site in drawn.items() if is_latent(site)}
        free = seed(_Unobserved(substitute(model, data=params | latents)), model_key)
        sites = trace(free).get_trace(**batch)
        return {
            name: data_first(site, plates, site["value"])
            for name, site in sites.items()
            if is_latent(site) and name not in latents
        }

    keys = _both_keys(key, batch_key, num_samples)
    return _batch_first(lax.map(draw, keys, batch_size=DRAWS_AT_ONCE), shared)


def _decode(
    model: Program,
    plates: DataPlates,
    axes: tuple[tuple[str, int], ...],
    size: int,
    params: Any,
    local: Values,
    shared: Values,
    arrays: Values,
) -> Values:
    """Datum by datum: a model without conditions knows no other length."""

    def one(latents: Values, datum: Values) -> Values:
        values = {name: jnp.expand_dims(latents[name], axis) for name, axis in axes}
        given = condition(model, data=values | shared)
        sites = trace_of(given, random.key(0), params, **{n: a[None] for n, a in datum.items()})
        return {
            name: data_first(site, plates, mean(site["fn"], random.key(0)))[0]
            for name, site in sites.items()
            if site["type"] == "sample" and name not in values and name not in shared
        }

    if not local and not arrays:
        return jax.tree.map(lambda x: x[None], one({}, {}))
    return jax.vmap(one)(local, arrays)
