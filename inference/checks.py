"""Checks made once, before the first step, so that a fault is named and not trained on.

| check              | of                                | cost                                    |
|--------------------|-----------------------------------|-----------------------------------------|
| `check_data`       | the arrays                        | one pass over the floating-point ones   |
| `check_programs`   | the model, the guide              | one abstract run of each                |
| `check_mean_field` | both, where divergences are exact | abstract runs; nothing is computed      |

They raise on the first fault, in one line: where it is, what was expected, what came, what to do.
"""

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from numpyro.infer.autoguide import AutoGuide
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import Messenger, apply_stack

from inference.sites import DATA_PLATE, Site, base, in_data_plate, is_latent, trace_of

_SLAB = 2**20  # entries of an array looked at together: bounds the memory of the search for NaN

Check = Callable[[Site], None]


class ProgramError(ValueError):
    """A model or a guide that breaks the contract with the engine."""


# --- data -----------------------------------------------------------------------------------------


def check_data(data: Mapping[str, Any], batch_size: Any, name: str = "data") -> int:
    """Checks the arrays of a data set and returns the number of data.

    Args:
        data: NumPy or JAX arrays of numbers by keyword, each of shape (N, ...).
        batch_size: how many data make a batch, an integer in 1..N; None for all of them.
        name: what to call the data in a message, for example "validation".

    Returns:
        N, the common leading length.

    Raises:
        TypeError: `data` is not a mapping, a value is not an array of numbers, or `batch_size` is
            not an integer.
        ValueError: there are no arrays or no data, an array has no leading axis, leading lengths
            differ, an entry is NaN or infinite, or `batch_size` is outside 1..N.
    """
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{name}: expected a mapping from keyword to array, got {type(data).__name__}; "
            f'write {{"x": array}}'
        )
    for key, array in data.items():
        _check_array(array, f"{name}[{key!r}]")
    size = _leading_length(data, name)
    if size == 0:
        raise ValueError(f"{name}: expected at least one datum, got arrays of leading length 0")
    if batch_size is not None:
        _check_batch_size(batch_size, size)
    for key, array in data.items():
        _check_finite(array, f"{name}[{key!r}]")
    return size


def check_values(programs: Iterable[Callable[..., Any]], data: Mapping[str, Any]) -> None:
    """Lets programs look at all the data before they run on traced ones.

    A program may have a method ``check_data(**data)`` that raises ValueError for values it is not
    made for, such as a label outside its classes.
    """
    for program in programs:
        look = getattr(program, "check_data", None)
        if look is not None:
            look(**data)


def _check_array(array: Any, name: str) -> None:
    if not isinstance(array, np.ndarray | np.generic | Array):
        raise TypeError(
            f"{name}: expected a NumPy or JAX array whose leading axis is the datum, "
            f"got {type(array).__name__}; convert it with numpy.asarray"
        )
    if not (jnp.issubdtype(array.dtype, np.number) or jnp.issubdtype(array.dtype, np.bool_)):
        raise TypeError(
            f"{name}: expected an array of numbers, got dtype {array.dtype}; "
            f"encode its entries as numbers"
        )
    if array.ndim == 0:
        raise ValueError(
            f"{name}: expected a leading axis, one entry per datum, got a scalar of shape (); "
            f"give a constant to the program itself, for example by functools.partial"
        )


def _check_batch_size(batch_size: Any, size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise TypeError(
            f"batch_size: expected an integer or None, got {batch_size!r} "
            f"({type(batch_size).__name__})"
        )
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size: expected 1 to {size}, the number of data, got {batch_size}; "
            f"None takes all data at every step"
        )


def _check_finite(array: Any, name: str) -> None:
    if not jnp.issubdtype(array.dtype, np.inexact):
        return
    if isinstance(array, Array) and bool(_all_finite(array)):  # on the device
        return
    array = np.asarray(array)
    count, first = 0, ()
    rows = max(1, _SLAB // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        faulty = ~np.isfinite(array[start : start + rows])
        if faulty.any():
            if count == 0:
                row, *rest = (int(i) for i in np.unravel_index(faulty.argmax(), faulty.shape))
                first = (start + row, *rest)
            count += int(np.count_nonzero(faulty))
    if count:
        raise ValueError(
            f"{name}: expected finite numbers, got {count} NaN or infinite of {array.size} "
            f"entries, the first at index {first}; drop, impute, or fill and mask them"
        )


@jax.jit
def _all_finite(array: Array) -> Array:
    """As `isfinite(array).all()`, which XLA gives a temporary as long as the array."""
    return jnp.isfinite(jnp.max(jnp.abs(array), initial=0))


def _leading_length(arrays: Mapping[str, Any], name: str) -> int:
    """The common leading length of the arrays; a ValueError if there is none."""
    if not arrays:
        raise ValueError(f"{name}: expected at least one array, got an empty mapping")
    lengths = {key: array.shape[0] for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key!r}: {length}" for key, length in lengths.items())
        raise ValueError(
            f"{name}: expected arrays of one leading length, the number of data, got {listed}; "
            f"give every array one entry per datum"
        )
    return next(iter(lengths.values()))


# --- programs -------------------------------------------------------------------------------------


def check_programs(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Mapping[str, Any],
    *,
    key: Array,
    can_infer_discrete: bool = False,
) -> bool:
    """Runs guide and model once on abstract values and checks every site as it is reached.

    The guide runs first, then the model on the guide's draws and parameters, as in the ELBO.
    What is checked of both: the plate `data` is as long as the batch, every batch axis is in a
    plate, latent sites are continuous. Of the guide: it observes nothing. Of the model: an observed
    value has the shape of its distribution, a latent site has a partner in the guide with the same
    event shape and plates, some site is in the plate `data`. Factors are sites of both kinds of
    program; sites marked `infer={"is_auxiliary": True}` may be in the guide alone.

    Args:
        model: the model, called as `model(**batch)`.
        guide: the guide, called as `guide(**batch)`.
        batch: arrays or `jax.ShapeDtypeStruct`s of shape (B, ...), as the engine will pass them.
        key: a random key; no number is drawn from it.
        can_infer_discrete: whether the objective copes with discrete latent sites
            (`objective.can_infer_discrete`).

    Returns:
        Whether a sample site of either program lies outside the plate `data`: a global one.

    Raises:
        ProgramError: (a ValueError) one of the above does not hold.
        Exception: whatever a program raises by itself, with a note that says which program it was
            and what it was called with.
    """
    size = _leading_length(batch, "batch")
    has_globals = False

    def run(key: Array, batch: dict[str, Array]) -> None:
        nonlocal has_globals
        guide_key, model_key = jax.random.split(key)

        def check_guide(site: Site) -> None:
            _check_site("guide", site, size, can_infer_discrete)
            _check_unobserved(site)

        guide_trace = _trace("guide", guide, guide_key, batch, check_guide, {}, {})
        draws = {name: site for name, site in guide_trace.items() if is_latent(site)}
        params = {n: site["value"] for n, site in guide_trace.items() if site["type"] == "param"}

        def check_model(site: Site) -> None:
            _check_site("model", site, size, can_infer_discrete)
            _check_observation(site)
            _check_partner(site, draws)

        model_trace = _trace("model", model, model_key, batch, check_model, draws, params)
        _check_no_stranger(draws, model_trace)
        _check_data_plate_used(model_trace, size)
        has_globals = any(
            site["type"] == "sample" and not in_data_plate(site)
            for site in (*guide_trace.values(), *model_trace.values())
        )

    # An autoguide remembers its first run: let a copy remember this one, whose values are abstract.
    guide = copy.deepcopy(guide) if isinstance(guide, AutoGuide) else guide
    jax.eval_shape(run, key, dict(batch))
    return has_globals


def check_mean_field(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Mapping[str, Any],
    *,
    key: Array,
) -> None:
    """Checks that an ELBO may take the divergence of each latent site by itself.

    The divergence of q(z_i | its parents in the guide) from p(z_i | its parents in the model) is
    z_i's term of the ELBO only if no parent of z_i in the model is drawn from z_i in the guide:
    else q's z_i, given that parent, is another. The dependencies are those of the programs'
    log densities on the draws, whatever the order of the sites. A site is left alone where NumPyro
    knows no formula for its divergence, and the ELBO takes the difference of log densities.

    Args:
        model, guide, batch, key: as in `check_programs`, which they have passed.

    Raises:
        ProgramError: a latent site's parent in the model is drawn from it in the guide.

    Warns:
        UserWarning: the dependencies between several latent sites could not be found.
    """

    def parents(program: Callable[..., Any], draws: dict[str, Any], params: Any, batch: Any) -> Any:
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

    guide = copy.deepcopy(guide) if isinstance(guide, AutoGuide) else guide
    try:
        jax.eval_shape(find, dict(batch))
    except ProgramError:
        raise
    except Exception as error:
        warnings.warn(
            f"expected to find out which latent sites depend on which, got {error!r}; see to it "
            f"that no site's parent in the model is drawn from it in the guide, or use Trace_ELBO",
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


class _OnArrival(Messenger):
    """Handler that calls `check` on each site before the site gets its value."""

    def __init__(self, check: Check) -> None:
        super().__init__()
        self.check = check

    def process_message(self, msg: Any) -> None:
        self.check(msg)


def _trace(
    role: str,
    program: Callable[..., Any],
    key: Array,
    batch: dict[str, Array],
    check: Check,
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
    except Exception as error:
        site = _site_in_flight(error)
        if site is not None:
            _check_plate_sizes(role, site, error)
        called = ", ".join(f"{k}: {a.dtype}{list(a.shape)}" for k, a in batch.items())
        where = "" if site is None else f", at site {site['name']!r}"
        error.add_note(f"raised by the {role}{where}, called with keyword arguments {called}")
        raise
    return dict(sites)


def _site_in_flight(error: Exception) -> Site | None:
    """The sample site NumPyro was at when it raised: plates complain without a name."""
    site, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is apply_stack.__code__:
            site = traceback.tb_frame.f_locals["msg"]
        traceback = traceback.tb_next
    return site if site is not None and site["type"] == "sample" else None


def _is_auxiliary(site: Site) -> bool:
    """True of a guide's private draws, and of `numpyro.factor`, which observes an empty value."""
    return bool(site["infer"].get("is_auxiliary"))


def _batch_shape(site: Site) -> tuple[int, ...]:
    return (*site["kwargs"].get("sample_shape", ()), *site["fn"].batch_shape)


def _plates(*sites: Site) -> str:
    """The plates around the sites as text, for example `data (dim -1, size 8)`."""
    frames = {frame for site in sites for frame in site["cond_indep_stack"]}
    texts = (f"{frame.name} (dim {frame.dim}, size {frame.size})" for frame in sorted(frames))
    return ", ".join(texts) or "no plate"


# Each check below raises a ProgramError or returns nothing.


def _check_site(role: str, site: Site, batch_size: int, can_infer_discrete: bool) -> None:
    """What the engine asks of a site of either program."""
    if site["type"] == "plate" and site["name"] == DATA_PLATE:
        size, subsample_size = site["args"]
        _check_data_plate_size(role, size, subsample_size, batch_size)
    if site["type"] != "sample":
        return
    for frame in site["cond_indep_stack"]:  # once more: a plate inside a scan does not report
        if frame.name == DATA_PLATE:
            _check_data_plate_size(role, frame.size, None, batch_size)
    _check_plate_sizes(role, site)
    _check_axes_in_plates(role, site)
    if is_latent(site) and not can_infer_discrete and site["fn"].support.is_discrete:
        raise ProgramError(
            f"{role} site {site['name']!r}: expected a continuous latent site, got one with "
            f"support {site['fn'].support}; observe it, sum it out in the model, relax it, or use "
            f"an objective that infers discrete sites"
        )


def _check_data_plate_size(
    role: str, size: int, subsample_size: int | None, batch_size: int
) -> None:
    if size != batch_size:
        drawn = "" if subsample_size is None else f" with subsample_size {subsample_size}"
        raise ProgramError(
            f"{role} plate {DATA_PLATE!r}: expected size {batch_size}, the leading length of the "
            f"batch, got size {size}{drawn}; take the size from the arguments "
            f"and leave the drawing of batches to the engine"
        )


def _check_plate_sizes(role: str, site: Site, cause: Exception | None = None) -> None:
    """Each batch axis in a plate has the plate's size, or 1."""
    shape = _batch_shape(site)
    for frame in site["cond_indep_stack"]:
        if -frame.dim <= len(shape) and shape[frame.dim] not in (1, frame.size):
            raise ProgramError(
                f"{role} site {site['name']!r}: expected axis {frame.dim} of its batch shape to "
                f"have size {frame.size}, as plate {frame.name!r} there, got size "
                f"{shape[frame.dim]} in batch shape {shape}; fold the axes of one event with "
                f".to_event(k), give each other axis its own numpyro.plate(...)"
            ) from cause


def _check_axes_in_plates(role: str, site: Site) -> None:
    """Each batch axis longer than 1 is in a plate, or the time of NumPyro's `scan`."""
    shape = _batch_shape(site)
    in_plates = {frame.dim for frame in site["cond_indep_stack"]}
    for axis in range(-len(shape), 0):
        is_time = axis == -len(shape) and site.get("_control_flow_done", False)
        if shape[axis] > 1 and axis not in in_plates and not is_time:
            raise ProgramError(
                f"{role} site {site['name']!r}: expected every batch axis inside a plate, got axis "
                f"{axis} of size {shape[axis]} in batch shape {shape} with "
                f"{_plates(site)}; put it in numpyro.plate(...) or, if it belongs to one event, "
                f"fold it with .to_event(k) (sum it, in a factor)"
            )


def _check_unobserved(site: Site) -> None:
    if site["type"] == "sample" and site["is_observed"] and not _is_auxiliary(site):
        raise ProgramError(
            f"guide site {site['name']!r}: expected a guide to observe nothing, got an observed "
            f"site; remove its obs=..., or observe it in the model"
        )


def _check_observation(site: Site) -> None:
    """An observed value has its distribution's shape: else it is counted more than once."""
    if site["type"] != "sample" or not site["is_observed"] or _is_auxiliary(site):
        return
    expected = (*_batch_shape(site), *site["fn"].event_shape)
    given = jnp.shape(site["value"])
    if given != expected:
        raise ProgramError(
            f"model site {site['name']!r}: expected an observed value of shape {expected}, its "
            f"distribution's batch shape {_batch_shape(site)} and event shape "
            f"{tuple(site['fn'].event_shape)}, got shape {given}; reshape one to fit the other"
        )


def _check_partner(site: Site, draws: Mapping[str, Site]) -> None:
    """The guide draws this site if and only if it is latent, in the same shape and plates."""
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
        if site["infer"].get("enumerate") == "parallel":  # summed over by the objective
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
    if set(partner["cond_indep_stack"]) != set(site["cond_indep_stack"]):
        raise ProgramError(
            f"guide site {name!r}: expected it in {_plates(site)}, as in the model, got "
            f"{_plates(partner)}; use the same plates on both sides"
        )


def _check_no_stranger(draws: Mapping[str, Site], model_trace: Mapping[str, Site]) -> None:
    """Each draw of the guide is a site of the model, or private to the guide and marked so."""
    for name, site in draws.items():
        is_sampled = model_trace.get(name, {}).get("type") == "sample"
        if not is_sampled and not _is_auxiliary(site):
            latents = sorted(name for name, site in model_trace.items() if is_latent(site))
            raise ProgramError(
                f"guide site {name!r}: expected a model site of that name, got none among "
                f"{latents}; add it to the model, or mark it infer={{'is_auxiliary': True}}"
            )


def _check_data_plate_used(model_trace: Mapping[str, Site], batch_size: int) -> None:
    sites = {name: site for name, site in model_trace.items() if site["type"] == "sample"}
    if not any(in_data_plate(site) for site in sites.values()):
        raise ProgramError(
            f"model: expected a site in a plate named {DATA_PLATE!r} of size {batch_size}, the "
            f"leading length of the batch, got sites {sorted(sites)} in "
            f"{_plates(*sites.values())}; put there what each datum has of its own, since a site "
            f"outside is shared by all data and counted once"
        )
