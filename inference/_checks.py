"""Programs, checked once before the first step, so that a fault is named and not trained on.

``look`` runs the guide and the model abstractly at the batch's length and at one more. What it
finds is a ``Programs``: the plates of the data, the sites, and the shapes of all parameters. A
fault raises ``ProgramError`` in one line: where, expected, got, what to do.
"""

import copy
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from numpyro.infer.autoguide import AutoGuide
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import Messenger

from inference._data import leading_length
from inference.sites import (
    UNKNOWN,
    Batch,
    DataPlates,
    Program,
    Site,
    abstract,
    base,
    batch_shape,
    data_plates,
    following,
    given_values,
    is_auxiliary,
    is_fixed,
    is_known,
    is_latent,
    is_real,
    is_scanned,
    is_summed,
    mask_of,
    no_draws,
    num_values,
    plate_sizes,
    site_in_flight,
    trace_of,
    values_needed,
)

MOST_VALUES = 1024  # joint values of discrete sites that judges sum over, for each datum
SUPPORT_ROWS = 4096  # data that are compared with their supports at a time


class ProgramError(ValueError):
    """A model or a guide that breaks the contract with the engine."""


@dataclass(frozen=True)
class SiteAxes:
    """The axes of a sample site's value.

    Attributes:
        dims: a name for every axis, the data first if there are any. An axis in a plate has the
            plate's name, the data's is "data", and others are "<site>_dim_<i>".
        data_axis: the axis of the value along which the data lie, counted from the end, or None.
    """

    dims: tuple[str, ...]
    data_axis: int | None


@dataclass(frozen=True)
class Programs:
    """What abstract runs tell of a model and its guide.

    Attributes:
        plates: those that hold the data.
        globals: the sample sites of either program that lie outside them.
        latents: the guide's draws, by name.
        observed: the model's observed sites, by name.
        bounded: the model's sites whose values the data tell, all or in part, and which do not
            take every real number.
        params: the abstract value of every parameter, by name.
        fixed: those parameters that no optimiser moves.
        mutable: likewise for the mutable state.
        summed: the model's latent sites that the guide does not draw, to be summed over.
        scanned: those of them that lie inside a scan.
        enumerated: the guide's local sites that judges sum over, exactly: those marked
            ``infer={"enumerate": "parallel"}``, as long as they have at most ``MOST_VALUES`` joint
            values for a datum.
        tied_to: what binds the guide to the data it was fitted to, in words, or None.
    """

    plates: DataPlates
    globals: tuple[str, ...]
    latents: dict[str, SiteAxes]
    observed: dict[str, SiteAxes]
    bounded: tuple[str, ...]
    params: dict[str, Any]
    fixed: frozenset[str]
    mutable: dict[str, Any]
    summed: tuple[str, ...]
    scanned: tuple[str, ...]
    enumerated: tuple[str, ...]
    tied_to: str | None

    @property
    def has_globals(self) -> bool:
        """Whether a sample site is shared by all data."""
        return bool(self.globals)

    @property
    def takes_batches(self) -> bool:
        """Whether the programs may run on a part of the data."""
        return bool(self.plates) and self.tied_to is None


# --- the look -------------------------------------------------------------------------------------


def look(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    key: Array,
    whole: bool,
    num_data: int | None = None,
    can_infer_discrete: bool = False,
) -> Programs:
    """Runs guide and model on abstract values and checks every site.

    The guide runs first, then the model on the guide's draws and parameters, as in the ELBO.

    Args:
        model, guide: programs that take the arrays of ``batch`` by name.
        batch: arrays of shape (B, ...) or their abstract values.
        key: a random key. No number is drawn from it.
        whole: whether every batch is the whole data set. Then programs that know one length are
            taken too, and programs without a plate of the data.
        num_data: the number of all data, of which a batch is a part.
        can_infer_discrete: whether the objective copes with discrete latent sites.

    Raises:
        ProgramError: the programs fit neither each other nor the batch.
        Exception: whatever a program raises, with a note that names the program and the shapes.
    """
    size = leading_length(batch, "batch")
    for role, program in (("model", model), ("guide", guide)):
        check_arguments(role, program, batch)

    def run(length: int) -> _Found:
        shapes = abstract(batch, length)
        return _run(model, guide, key, shapes, length == size, can_infer_discrete)

    here = run(size) if whole else _run_batch(run, size, num_data)
    longer = _run_longer(run, size, whole)
    if longer is None:
        plates = data_plates(model, **batch)
        tied_to = f"it runs with {size} data alone"
    else:
        plates = following(here.plate_sizes, longer.plate_sizes, size)
        tied_to = _parameter_that_follows(here.params, longer.params)
        _check_followers(here, longer, plates, whole)
    if not whole:
        _check_takes_batches(here, plates, tied_to, size)
    _check_plates_match(here, plates)
    sampled = {n: s for n, s in (here.guide | here.model).items() if s["type"] == "sample"}
    observed = {
        name: site
        for name, site in here.model.items()
        if site["type"] == "sample" and site["is_observed"] and not is_auxiliary(site)
    }
    summed = tuple(n for n, s in here.model.items() if is_summed(s) and n not in here.draws)
    return Programs(
        plates=plates,
        globals=tuple(name for name, site in sampled.items() if not plates.hold(site)),
        latents={name: _axes(site, plates) for name, site in here.draws.items()},
        observed={name: _axes(site, plates) for name, site in observed.items()},
        bounded=tuple(n for n, s in here.model.items() if _has_bounds(s)),
        params=here.params,
        fixed=frozenset(n for n, s in (here.guide | here.model).items() if is_fixed(s)),
        mutable=here.mutable,
        summed=summed,
        scanned=tuple(name for name in summed if is_scanned(here.model[name])),
        enumerated=_enumerated(here.draws, plates),
        tied_to=tied_to,
    )


def _has_bounds(site: Site) -> bool:
    """Whether the data tell values of the site, and not every real number will do."""
    if site["type"] != "sample" or is_auxiliary(site) or is_real(site["fn"].support):
        return False
    return site["is_observed"] or given_values(site) is not None


def _enumerated(draws: Mapping[str, Site], plates: DataPlates) -> tuple[str, ...]:
    """The sites of a guide that judges sum over."""
    names: list[str] = []
    count = 1
    for name, site in draws.items():
        values = num_values(site["fn"].support)
        if values is not None and is_summed(site) and plates.hold(site):
            shape = list(batch_shape(site))
            del shape[plates.axis(site)]
            count *= values ** int(np.prod(shape))
            if count > MOST_VALUES:
                break
            names.append(name)
    return tuple(names)


def _run_batch(run: Callable[[int], "_Found"], size: int, num_data: int | None) -> "_Found":
    """A run on a batch. A program that runs on all data alone is told so."""
    try:
        return run(size)
    except ProgramError:
        raise
    except Exception as error:
        try:
            run(num_data or size)
        except Exception:
            raise error from None
        raise ProgramError(
            f"batch_size: expected programs that take a part of the data, got some that run with "
            f"all {num_data} and fail with {size}: {error}; leave batch_size out to train on all "
            f"data, or take lengths from the arguments"
        ) from error


def _run_longer(run: Callable[[int], "_Found"], size: int, whole: bool) -> "_Found | None":
    """A run at one more, or None for programs on the whole data that know one length."""
    try:
        return run(size + 1)
    except Exception as error:
        if whole:
            return None
        raise ProgramError(
            f"programs: expected programs that take batches of any length, got some that run "
            f"with {size} data and fail with {size + 1}: {error}; take lengths from the "
            f"arguments, or leave batch_size out to train on all data"
        ) from error


@dataclass(frozen=True)
class _Found:
    """What one abstract run has found: sites whose values are abstract."""

    guide: dict[str, Site]
    model: dict[str, Site]
    params: dict[str, Any]
    mutable: dict[str, Any]

    @property
    def plate_sizes(self) -> dict[str, int]:
        return plate_sizes(self.guide) | plate_sizes(self.model)

    @property
    def draws(self) -> dict[str, Site]:
        """The guide's latent sites but its private ones."""
        return {n: s for n, s in self.guide.items() if is_latent(s) and not is_auxiliary(s)}


def _run(
    model: Program,
    guide: Program,
    key: Array,
    batch: Batch,
    is_batch: bool,
    can_infer_discrete: bool,
) -> _Found:
    """Both programs on abstract values, each site checked as it is reached."""
    size = leading_length(batch, "batch") if is_batch else None
    found: dict[str, dict[str, Site]] = {}
    guide = fresh(guide)

    def run(key: Array, batch: dict[str, Array]) -> Any:
        guide_key, model_key = random.split(key)

        def check_guide(site: Site) -> None:
            _check_site("guide", site, size, can_infer_discrete)
            _check_unobserved(site)

        drawn = _trace("guide", guide, guide_key, batch, check_guide, {}, {})
        draws = {name: site for name, site in drawn.items() if is_latent(site)}
        params = {n: s["value"] for n, s in drawn.items() if s["type"] in ("param", "mutable")}

        def check_model(site: Site) -> None:
            _check_site("model", site, size, can_infer_discrete)
            _check_observation(site)
            _check_partner(site, draws)

        sites = _trace("model", model, model_key, batch, check_model, draws, params)
        _check_no_stranger(draws, sites)
        found["guide"], found["model"] = drawn, sites
        return tuple(
            {n: s["value"] for n, s in (sites | drawn).items() if s["type"] == kind}
            for kind in ("param", "mutable")
        )

    params, mutable = jax.eval_shape(run, key, dict(batch))
    return _Found(found["guide"], found["model"], params, mutable)


def fresh(guide: Program) -> Program:
    """A guide that has seen no data: an autoguide keeps its first run, so it is copied."""
    if not isinstance(guide, AutoGuide):
        return guide
    new: Any = copy.copy(guide)
    new.prototype_trace, new._prototype_frames, new._prototype_frame_full_sizes = None, {}, {}
    if hasattr(new, "_guides"):
        new._guides = [fresh(part) for part in new._guides]
    return new


def prime(guide: Program, key: Array, batch: Callable[[], Batch]) -> None:
    """Gives an autoguide its first run, which it keeps: a concrete one, not a traced one.

    Args:
        guide: any guide.
        key: a random key.
        batch: returns arrays as the guide takes them. It is called for a fresh autoguide alone.
    """
    if isinstance(guide, AutoGuide) and getattr(guide, "prototype_trace", None) is None:
        first = {name: jnp.asarray(array) for name, array in batch().items()}
        handlers.seed(guide, key)(**first)


def _axes(site: Site, plates: DataPlates) -> SiteAxes:
    """The names of a site's axes."""
    shape, num_event = batch_shape(site), len(site["fn"].event_shape)
    frames = {f.dim: "data" if f.name in plates.names else f.name for f in site["cond_indep_stack"]}
    dims = [frames.get(i - len(shape)) for i in range(len(shape))] + [None] * num_event
    data_axis = None
    if "data" in dims:
        data_axis = dims.index("data") - len(dims)
        dims.insert(0, dims.pop(data_axis))
    unnamed = iter(range(len(dims)))
    named = (name or f"{site['name']}_dim_{next(unnamed)}" for name in dims)
    return SiteAxes(tuple(named), data_axis)


# --- values ---------------------------------------------------------------------------------------


def support_check(
    model: Program, guide: Program, params: Mapping[str, Any]
) -> Callable[[Array, Batch], dict[str, tuple[Array, ...]]]:
    """A function that compares a batch's observed values with the supports of their sites.

    It returns, by site, how many values lie outside, the least and the greatest, and whether the
    site is observed: a latent one may have values that the data tell in part. A site
    is left out if its support depends on parameters, latents or data, or is all real numbers.
    Entries that the site masks out do not count.

    Args:
        model, guide: programs that ``look`` has passed.
        params: the abstract values of their parameters and mutable state.
    """

    def run(params: Any, key: Array, batch: Batch) -> dict[str, tuple[Array, ...]]:
        guide_key, model_key = random.split(key)
        drawn = trace_of(fresh(guide), guide_key, params, **batch)
        draws = {n: s["value"] for n, s in drawn.items() if is_latent(s)}
        outside = {}
        for name, site in trace_of(model, model_key, params | draws, **batch).items():
            if not _has_bounds(site) or not is_known(site["fn"].support):
                continue
            value, counted = site["value"], mask_of(site["fn"])
            if not site["is_observed"]:
                value = given_values(site)
                counted = value != UNKNOWN
            found = _outside(site["fn"].support, value, counted)
            outside[name] = (*found, jnp.asarray(site["is_observed"]))
        return outside

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), dict(params))
    compiled = jax.jit(run)
    return lambda key, batch: compiled(zeros, key, batch)


def _outside(support: Any, value: Any, counted: Array | None) -> tuple[Array, Array, Array]:
    """How many values lie outside a support, the least and the greatest, of those that count."""
    if counted is None:
        return jnp.sum(~support(value)), jnp.min(value), jnp.max(value)
    numbers = jnp.where(counted, value, jnp.nan)
    inside = jnp.where(counted, value, support.feasible_like(value))
    return jnp.sum(~support(inside)), jnp.nanmin(numbers), jnp.nanmax(numbers)


def check_supports(
    check: Callable[[Array, Batch], dict[str, tuple[Array, ...]]],
    batches: Any,
    model: Program,
) -> None:
    """Raises where an observed value lies outside the support of its site.

    Args:
        check: what ``support_check`` returns.
        batches: pairs of a key and a prepared batch.
        model: to name its distribution.

    Raises:
        ValueError: it names the site, the range of the values and what to do.
    """
    for key, batch in batches:
        found = jax.device_get(check(key, batch))
        if not found:
            return
        for name, (count, low, high, is_observed) in found.items():
            remedy = "mend the labels: -1 is unknown, and no other value lies outside"
            if is_observed:
                remedy = "rescale or binarise the data (preprocess), or choose another likelihood"
            if count:
                raise ValueError(
                    f"site {name!r}: expected values in the support of its distribution, got "
                    f"{int(count)} outside in a batch of {len(next(iter(batch.values())))} data, "
                    f"which range from {low:g} to {high:g}; {remedy}"
                )


# --- arguments ------------------------------------------------------------------------------------


def check_arguments(role: str, program: Program, batch: Batch) -> None:
    """Raises ProgramError unless the program takes the arrays by name, and needs no others."""
    try:
        signature = inspect.signature(program)
    except (TypeError, ValueError):  # a callable without one
        return
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    takes = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    strangers = sorted(batch.keys() - set(takes))
    if strangers:
        raise ProgramError(
            f"data[{strangers[0]!r}]: expected arrays that the {role} takes by name, which are "
            f"{', '.join(takes) or 'none'}, got {strangers[0]!r}; leave it out, or add the argument"
        )
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in batch]
    if missing:
        raise ProgramError(
            f"{role}: expected data for its argument {missing[0]!r}, got {', '.join(batch)}; add "
            f"the array, or fix the argument with functools.partial"
        )


class _OnArrival(Messenger):
    """Handler that calls `check` on each site before the site gets its value."""

    def __init__(self, check: Callable[[Site], None]) -> None:
        super().__init__()
        self.check = check

    def process_message(self, msg: Any) -> None:
        self.check(msg)


def _trace(
    role: str,
    program: Program,
    key: Array,
    batch: Mapping[str, Array],
    check: Callable[[Site], None],
    draws: dict[str, Site],
    params: dict[str, Any],
) -> dict[str, Any]:
    """The sites of `program(**batch)`, given a guide's draws and parameters.

    The draws come without the guide's plates: NumPyro would give the program their sizes.
    """
    try:
        with (
            handlers.trace() as sites,
            _OnArrival(check),
            handlers.substitute(data=params),
            handlers.replay(trace=OrderedDict(draws)),
            handlers.seed(rng_seed=key),
        ):
            program(**batch)
    except ProgramError:
        raise
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ProgramError(values_needed(role, error, batch)) from error
    except Exception as error:
        site = site_in_flight(error)
        if site is not None:
            _check_plate_sizes(role, site, error)
        if site is not None and isinstance(error, NotImplementedError):
            raise ProgramError(no_draws(role, site)) from error
        called = ", ".join(f"{k}: {a.dtype}{list(a.shape)}" for k, a in batch.items())
        where = "" if site is None else f", at site {site['name']!r}"
        error.add_note(f"raised by the {role}{where}, called with keyword arguments {called}")
        raise
    return dict(sites)


# --- each site ------------------------------------------------------------------------------------
#
# Each check below raises a ProgramError or returns nothing.


def _plates(*sites: Site) -> str:
    """The plates around the sites as text, for example `data (dim -1, size 8)`."""
    frames = {frame for site in sites for frame in site["cond_indep_stack"]}
    texts = (f"{frame.name} (dim {frame.dim}, size {frame.size})" for frame in sorted(frames))
    return ", ".join(texts) or "no plate"


def _check_site(role: str, site: Site, size: int | None, can_infer_discrete: bool) -> None:
    """What the engine asks of a site of either program, on a batch of ``size`` data."""
    if site["type"] == "plate" and size is not None:
        _check_no_subsample(role, site, size)
    if site["type"] != "sample":
        return
    _check_plate_sizes(role, site)
    if is_latent(site) and not can_infer_discrete and site["fn"].support.is_discrete:
        raise ProgramError(
            f"{role} site {site['name']!r}: expected a continuous latent site, got one with "
            f"support {site['fn'].support}; train with TraceEnum_ELBO, which sums over it, with "
            f"TraceGraph_ELBO or with ReweightedWakeSleep, observe it, or relax it"
        )


def _check_no_subsample(role: str, site: Site, size: int) -> None:
    """The engine draws the batches: a plate has the batch's length and no subsample."""
    full, subsample = site["args"]
    if subsample is not None and subsample != full and size in (full, subsample):
        raise ProgramError(
            f"{role} plate {site['name']!r}: expected size {size}, the leading length of the "
            f"batch, got size {full} with subsample_size {subsample}; take the size from the "
            f"arguments and leave the drawing of batches to the engine"
        )


def _check_plate_sizes(role: str, site: Site, cause: Exception | None = None) -> None:
    """Each batch axis in a plate has the plate's size, or 1."""
    shape = batch_shape(site)
    for frame in site["cond_indep_stack"]:
        if -frame.dim <= len(shape) and shape[frame.dim] not in (1, frame.size):
            raise ProgramError(
                f"{role} site {site['name']!r}: expected axis {frame.dim} of its batch shape to "
                f"have size {frame.size}, as plate {frame.name!r} there, got size "
                f"{shape[frame.dim]} in batch shape {shape}; fold the axes of one event with "
                f".to_event(k), give each other axis its own numpyro.plate(...)"
            ) from cause


def _check_unobserved(site: Site) -> None:
    if site["type"] == "sample" and site["is_observed"] and not is_auxiliary(site):
        raise ProgramError(
            f"guide site {site['name']!r}: expected a guide to observe nothing, got an observed "
            f"site; remove its obs=..., or observe it in the model"
        )


def _check_observation(site: Site) -> None:
    """An observed value has its distribution's shape: else it is counted more than once."""
    if site["type"] != "sample" or not site["is_observed"] or is_auxiliary(site):
        return
    expected = (*batch_shape(site), *site["fn"].event_shape)
    given = jnp.shape(site["value"])
    if given != expected:
        raise ProgramError(
            f"model site {site['name']!r}: expected an observed value of shape {expected}, its "
            f"distribution's batch shape {batch_shape(site)} and event shape "
            f"{tuple(site['fn'].event_shape)}, got shape {given}; reshape one to fit the other"
        )


def _check_partner(site: Site, draws: Mapping[str, Site]) -> None:
    """The guide draws this site if and only if it is latent, in the same event shape."""
    if site["type"] != "sample":
        return
    name = site["name"]
    partner = draws.get(name)
    if site["is_observed"]:
        if partner is not None:
            raise ProgramError(
                f"guide site {name!r}: expected a latent site of the model, got one that the model "
                f"observes; remove it from the guide, or its obs=... from the model"
            )
        return
    if partner is None:
        if is_summed(site):
            return
        raise ProgramError(
            f"model site {name!r}: expected a guide site of that name, got none among "
            f"{sorted(draws)}; draw it in the guide, or observe it in the model"
        )
    event_shape, partner_shape = tuple(site["fn"].event_shape), tuple(partner["fn"].event_shape)
    if partner_shape != event_shape:
        raise ProgramError(
            f"guide site {name!r}: expected event shape {event_shape}, as in the model, got "
            f"{partner_shape}; check .to_event(k) and the sizes on both sides"
        )
    ours, theirs = batch_shape(site), batch_shape(partner)
    if np.prod(theirs, dtype=int) != np.prod(ours, dtype=int):
        raise ProgramError(
            f"guide site {name!r}: expected batch shape {ours}, as in the model, got {theirs}; "
            f"use the same plates and sizes on both sides"
        )


def _check_no_stranger(draws: Mapping[str, Site], sites: Mapping[str, Site]) -> None:
    """Each draw of the guide is a site of the model, or private to the guide and marked so."""
    for name, site in draws.items():
        is_sampled = sites.get(name, {}).get("type") == "sample"
        if not is_sampled and not is_auxiliary(site):
            latents = sorted(name for name, site in sites.items() if is_latent(site))
            raise ProgramError(
                f"guide site {name!r}: expected a model site of that name, got none among "
                f"{latents}; add it to the model, or mark it infer={{'is_auxiliary': True}}"
            )


# --- what follows the length of the batch ---------------------------------------------------------


def _parameter_that_follows(here: dict[str, Any], longer: dict[str, Any]) -> str | None:
    """The first parameter that changes its shape with the length of the batch, in words."""
    for name, value in here.items():
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (value, longer.get(name))]
        if shapes[0] != shapes[1]:
            return f"its parameter {name!r} has one entry for each of its data"
    return None


def _check_followers(here: _Found, longer: _Found, plates: DataPlates, whole: bool) -> None:
    """An axis that follows the length of the batch lies in a plate."""
    if not plates:  # a program for whole data sets
        return
    for role, sites, others in (
        ("guide", here.guide, longer.guide),
        ("model", here.model, longer.model),
    ):
        for name, site in sites.items():
            other = others.get(name)
            if site["type"] != "sample" or other is None:
                continue
            in_plates = {f.dim for f in site["cond_indep_stack"] if f.name in plates.names}
            shapes = batch_shape(site), batch_shape(other)
            for axis in range(-len(shapes[0]), 0):
                if shapes[0][axis] != shapes[1][axis] and axis not in in_plates:
                    raise ProgramError(
                        f"{role} site {name!r}: expected an axis that follows the "
                        f"length of the batch inside a plate, got axis {axis} of batch shape "
                        f"{shapes[0]} in {_plates(site)}; put the site in "
                        f'numpyro.plate("data", len(x))'
                    )
            if site["fn"].event_shape != other["fn"].event_shape and not whole:
                raise ProgramError(
                    f"{role} site {name!r}: expected an event of one shape for every "
                    f"batch, got event shape {tuple(site['fn'].event_shape)}, which follows the "
                    f"length of the batch; put the data in a plate, or leave batch_size out"
                )


def _check_takes_batches(here: _Found, plates: DataPlates, tied_to: str | None, size: int) -> None:
    """Programs on parts of the data have a plate of the data, and no numbers for each datum."""
    if not plates:
        sites = [site for site in here.model.values() if site["type"] == "sample"]
        raise ProgramError(
            f"batch_size: expected a model with a plate for its data, to train on batches of "
            f"{size}, got {_plates(*sites)} whose size follows the length of the batch; leave "
            f"batch_size out to train on all data, or put what each datum has of its own in "
            f'numpyro.plate("data", len(x))'
        )
    if tied_to is not None:
        raise ProgramError(
            f"guide: expected parameters of one shape for batches of every length, but {tied_to}; "
            f"on batches they would belong to a place in the batch; leave batch_size out, or use "
            f"a guide with an encoder"
        )


def _check_plates_match(here: _Found, plates: DataPlates) -> None:
    """A latent site is local in both programs, or global in both."""
    for name, site in here.draws.items():
        partner = here.model[name]
        frames = [
            {f for f in s["cond_indep_stack"] if f.name in plates.names} for s in (site, partner)
        ]
        if frames[0] != frames[1]:
            raise ProgramError(
                f"guide site {name!r}: expected it in {_plates(partner)}, as in the model, got "
                f"{_plates(site)}; use the same plates on both sides"
            )


# --- exact divergences ----------------------------------------------------------------------------


def check_mean_field(model: Program, guide: Program, batch: Batch, *, key: Array) -> None:
    """Checks that an ELBO may take the divergence of each latent site by itself.

    The term of a site z_i is the divergence of q(z_i | its parents in the guide) from
    p(z_i | its parents in the model). This holds if the guide draws those parents before z_i.
    The dependencies come from the programs' log densities; the order of the sites does not count.
    A site is left alone if NumPyro knows no formula for its divergence.

    Args:
        model, guide, batch, key: as in ``look``, which they have passed.

    Raises:
        ProgramError: a latent site's parent in the model is drawn from it in the guide.

    Warns:
        UserWarning: the dependencies between several latent sites could not be found.
    """

    def parents(program: Program, draws: dict[str, Any], params: Any, batch: Any) -> Any:
        """By site, the draws on which its log density depends."""

        def log_probs(**draws: Any) -> Any:
            sites = trace_of(program, key, params | draws, **batch)
            return {
                name: sites[name]["fn"].log_prob(draws[name]) for name in draws if name in sites
            }

        found = eval_provenance(log_probs, **draws)
        return {name: set(sources) - {name} for name, sources in found.items()}

    def find(batch: dict[str, Array]) -> None:
        drawn = trace_of(guide, key, {}, **batch)
        draws = {name: site["value"] for name, site in drawn.items() if is_latent(site)}
        params = {n: site["value"] for n, site in drawn.items() if site["type"] == "param"}
        sites = trace_of(model, key, params | draws, **batch)
        shared = [name for name in draws if name in sites]
        exact = [name for name in shared if _has_formula(drawn[name]["fn"], sites[name]["fn"])]
        if len(shared) < 2 or not exact:
            return
        in_guide, in_model = (parents(fn, draws, params, batch) for fn in (guide, model))
        for name in exact:
            for parent in sorted(in_model[name]):
                if name in _ancestors(parent, in_guide):
                    raise ProgramError(
                        f"site {name!r}: expected an exact divergence to be the site's term of "
                        f"the ELBO, got a guide that draws {parent!r} from {name!r} where the "
                        f"model draws {name!r} from {parent!r}; use Trace_ELBO, or draw them in "
                        f"the model's order"
                    )

    guide = fresh(guide)
    try:
        jax.eval_shape(find, abstract(batch))
    except ProgramError:
        raise
    except Exception as error:
        warnings.warn(
            f"Could not check the order of latent sites ({error!r}). Exact divergences are valid "
            f"only if the guide draws sites in the model's order. If unsure, use Trace_ELBO.",
            stacklevel=2,
        )


def _has_formula(q: Any, p: Any) -> bool:
    """Whether NumPyro takes the divergence by a formula that averages over q."""
    if isinstance(base(q), dist.Delta):  # the log density at its one value
        return False
    try:
        kl_divergence(q, p)
    except NotImplementedError:
        return False
    return True


def _ancestors(name: str, parents: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set(), [name]
    while waiting:
        new = parents[waiting.pop()] - found
        found |= new
        waiting += new
    return found
