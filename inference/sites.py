"""What a NumPyro program looks like from outside: its sites, plates, shapes and supports.

A program is looked at by *abstract runs* (``jax.eval_shape``): it runs on shapes alone, and no
number is computed. Two runs, on batches of different lengths, tell which plates hold the data:
those whose size follows the length of the batch. The plate needs no name.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.core import Tracer
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.handlers import block, seed, substitute, trace
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import apply_stack

Program = Callable[..., Any]
Batch = Mapping[str, Any]
PRIOR_DRAWS = 200  # of each latent site, to see where it lies
PRIOR_DATA = 20  # data that they are drawn for
UNKNOWN = -1  # a value of a latent site that the data do not tell
Site = dict[str, Any]  # what NumPyro calls a message: one `sample`, `plate`, `param`, ...


# --- what a model may offer -----------------------------------------------------------------------


@runtime_checkable
class Prepares(Protocol):
    """A model that says how a batch of a user's data becomes the program's arguments."""

    def prepare(self, key: Any, batch: Any) -> Any:
        """The batch as the program takes it. ``fit`` calls it as ``preprocess``."""
        ...


def preparation(model: Any) -> Callable[..., Any] | None:
    """What ``fit`` takes as ``preprocess`` for this model: its ``prepare``, if it has one."""
    return model.prepare if isinstance(model, Prepares) else None


@runtime_checkable
class ChecksData(Protocol):
    """A model that refuses data that it is not made for."""

    def check_data(self, **data: Any) -> None:
        """Raises ValueError for data, as the user gives them, that the model cannot describe."""
        ...


@runtime_checkable
class HasEncoder(Protocol):
    """A model that offers the guides an encoder."""

    def encoder(self, num_outputs: int, *, rngs: Any) -> Any:
        """A Flax NNX module from the data, by keyword, to (N, num_outputs) numbers."""
        ...


# --- what a guide may offer -----------------------------------------------------------------------


@runtime_checkable
class HasPerDatum(Protocol):
    """A guide that knows its family with numbers of each datum's own."""

    def per_datum(self, num_data: int) -> Any:
        """The guide of the same family for ``num_data`` data, without an encoder."""
        ...


# --- runs -----------------------------------------------------------------------------------------


def trace_of(
    program: Program, key: Any, values: Mapping[str, Any], /, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The sites of ``program(*args, **kwargs)``. Sites named in ``values`` have that value."""
    return dict(trace(substitute(seed(program, key), data=values)).get_trace(*args, **kwargs))


def stored_names(program: Program, batch: Batch) -> set[str]:
    """The names of a program's parameters and mutable state, by an abstract run.

    Args:
        program: a model or a guide.
        batch: arrays of shape (N, ...) or their abstract values, as the program takes them.
    """
    sites = abstract_sites(program, 0, abstract(batch))
    return {name for name, site in sites.items() if site["type"] in ("param", "mutable")}


def length(arrays: Mapping[str, Any]) -> int:
    """The number of data in arrays by name."""
    return len(next(iter(arrays.values())))


def spread_rows(num_data: int, most: int) -> np.ndarray:
    """The numbers of at most ``most`` data, spread evenly over all."""
    return np.linspace(0, num_data - 1, min(num_data, most)).round().astype(int)


def abstract(batch: Batch, size: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of a batch, or of one with ``size`` data."""

    def shape(array: Any) -> jax.ShapeDtypeStruct:
        shape = array.shape if size is None else (size, *array.shape[1:])
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype))

    return {name: shape(array) for name, array in batch.items()}


# --- one site -------------------------------------------------------------------------------------


def is_latent(site: Site) -> bool:
    """True for a sample site that is not observed."""
    return site["type"] == "sample" and not site["is_observed"]


def is_observed(site: Site) -> bool:
    """True for a sample site with a given value."""
    return site["type"] == "sample" and site["is_observed"]


def is_auxiliary(site: Site) -> bool:
    """True for a guide's private draws and for a ``numpyro.factor``."""
    return bool(site["infer"].get("is_auxiliary"))


def is_summed(site: Site) -> bool:
    """True for a latent site that an objective sums over (``infer={"enumerate": "parallel"}``)."""
    return is_latent(site) and site["infer"].get("enumerate") == "parallel"


def given_values(site: Site) -> Any:
    """The values of a latent site that the data tell, -1 for unknown; None if they tell none.

    A model says so by ``infer={"given": values}`` (``models.labels.partly_observed``).
    """
    return site["infer"].get("given") if is_latent(site) else None


def is_scanned(site: Site) -> bool:
    """True for a site inside a ``scan``."""
    return bool(site.get("_control_flow_done"))


def batch_shape(site: Site) -> tuple[int, ...]:
    """The batch shape of a sample site's distribution, with its sample shape in front."""
    return (*site["kwargs"].get("sample_shape", ()), *site["fn"].batch_shape)


def base(fn: Any) -> Any:
    """A distribution without the batch and event axes that were declared on top of it."""
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def without_events(support: Any) -> Any:
    """A support without the event axes that were declared on top of it."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_real(support: Any) -> bool:
    """Whether every array of real numbers is in the support."""
    real = constraints.real, constraints.real_vector, constraints.real_matrix
    return without_events(support) in real


def num_values(support: Any) -> int | None:
    """How many values 0, 1, ... a discrete support has. None for any other support."""
    support = without_events(support)
    if support is constraints.boolean:
        return 2
    if not isinstance(support, type(constraints.integer_interval(0, 1))):
        return None
    low, high = support.lower_bound, support.upper_bound
    return high + 1 if low == 0 and isinstance(high, int) else None


def is_known(support: Any) -> bool:
    """False for a support that a program computes: an abstract run has no numbers for it."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(support))


def mask_of(fn: Any) -> Array | None:
    """Which entries of a site's value count: an array that broadcasts with it. None for all.

    Args:
        fn: the site's distribution, with masks (``.mask(x_mask)``) on any level.
    """
    found = None
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution) and fn._mask is not True:
            mask = jnp.asarray(fn._mask)
            mask = mask.reshape(mask.shape + (1,) * fn.event_dim)
            found = mask if found is None else found & mask
        fn = fn.base_dist
    return found


def elementwise_kl(q: dist.Distribution, p: dist.Distribution) -> Array | None:
    """KL(q || p) in every dimension. None if they do not factorise or have no formula."""
    shape = q.batch_shape + q.event_shape
    q, p = base(q), base(p)
    if q.event_shape or p.event_shape:
        return None
    try:
        return jnp.broadcast_to(kl_divergence(q, p), shape)
    except NotImplementedError:
        return None


# --- the data plate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataPlates:
    """The plates that hold the data, by name. A site inside is *local*, one outside *global*."""

    names: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.names)

    def hold(self, site: Site) -> bool:
        """True for a site with a value for each datum."""
        return any(frame.name in self.names for frame in site["cond_indep_stack"])

    def axis(self, site: Site) -> int:
        """The axis of a site's log density along which the data lie, counted from the end.

        Raises:
            ValueError: the site is global.
        """
        for frame in site["cond_indep_stack"]:
            if frame.name in self.names:
                return frame.dim
        raise ValueError(
            f"site {site['name']!r}: expected one value for each datum, got a global site, which "
            f"lies in no plate of the data; a global site has no share of a datum's number"
        )

    def sum_by_datum(
        self, terms: Mapping[str, Array], sites: Mapping[str, Any], size: int
    ) -> Array:
        """The sum of the sites' log densities for each datum, (size,).

        Raises:
            ValueError: a site is global.
        """
        total = jnp.zeros(size)
        for name in sorted(terms):
            term = jnp.moveaxis(terms[name], self.axis(sites[name]), 0)
            total += term.reshape(len(term), -1).sum(1)
        return total


def plate_sizes(sites: Mapping[str, Site]) -> dict[str, int]:
    """The size of every plate around a program's sample sites, by name, before subsampling."""
    frames = {
        frame.name: frame.size
        for site in sites.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    }
    plates = {n: s["args"][0] for n, s in sites.items() if s["type"] == "plate" and n in frames}
    return frames | plates


def following(sizes: Mapping[str, int], longer: Mapping[str, int], size: int) -> DataPlates:
    """The plates of ``size`` in one run that are longer by one in the other."""
    names = (n for n, s in sizes.items() if s == size and longer.get(n) == size + 1)
    return DataPlates(frozenset(names))


def of_size(sizes: Mapping[str, int], size: int) -> DataPlates:
    """The plates of a program that runs at one length alone: the one named "data", or all of
    that size."""
    names = {name for name, s in sizes.items() if s == size}
    return DataPlates(frozenset({"data"} if "data" in names else names))


def data_plates(program: Program, *args: Any, **batch: Any) -> DataPlates:
    """The plates of a program that hold the data, found by abstract runs at two lengths.

    Args:
        program: a model.
        args, batch: arrays of shape (N, ...), as the program takes them.
    """
    named = abstract({str(i): array for i, array in enumerate(args)} | batch)
    sites = abstract_sites(program, len(args), named)
    return _plates_and_longer(program, len(args), named, sites)[0]


def abstract_sites(program: Program, num_args: int, arrays: Batch) -> dict[str, Site]:
    """The sites of a program on abstract values, hidden from outer handlers."""
    found: dict[str, Site] = {}

    def run(batch: dict[str, Any]) -> None:
        args = [batch.pop(str(i)) for i in range(num_args)]
        with block():
            found.update(trace_of(program, jax.random.key(0), {}, *args, **batch))

    jax.eval_shape(run, dict(arrays))
    return found


def _plates_and_longer(
    program: Program, num_args: int, arrays: Batch, sites: Mapping[str, Site]
) -> tuple[DataPlates, dict[str, Site] | None]:
    """The data's plates, and the sites on one datum more. None if the program has one length."""
    size = length(arrays)
    here = plate_sizes(sites)
    try:
        longer = abstract_sites(program, num_args, abstract(arrays, size + 1))
        return following(here, plate_sizes(longer), size), longer
    except Exception:  # a program of one length, such as one with numbers for each datum
        return of_size(here, size), None


# --- what a guide must know of its model ----------------------------------------------------------


@dataclass(frozen=True)
class LatentSite:
    """A latent site of a program.

    Attributes:
        batch: the batch shape of its distribution, for example (100,) in a plate of 100 data.
        shape: the event shape, for example (20,) for a vector of 20 numbers.
        data_axis: the axis of ``batch`` along which the data lie, from the left. None for a global
            site, which all data share.
        plates: those around the site, the outermost first: name, axis and size of each.
        support: a constraint of ``numpyro.distributions.constraints``. None where the program
            computes it: then ``computed_sites`` finds it.
        is_masked: whether the program masks the site's density.
        is_given: whether the data tell some of its values.
    """

    batch: tuple[int, ...]
    shape: tuple[int, ...]
    data_axis: int | None
    plates: tuple[Any, ...]
    support: Any
    is_masked: bool
    is_given: bool

    @property
    def is_discrete(self) -> bool:
        """Whether its values are 0, 1, ... up to a known number."""
        return num_values(self.support) is not None

    @property
    def is_computed(self) -> bool:
        """Whether the program computes something of the site from the data."""
        return self.support is None or self.is_masked or self.is_given

    @property
    def is_local(self) -> bool:
        """Whether every datum has its own."""
        return self.data_axis is not None


@dataclass(frozen=True)
class Outline:
    """What abstract runs tell of a model.

    Attributes:
        latents: the latent sites that a guide must draw, by name, in the model's order.
        names: the names of all its sites.
        any_length: whether the model runs with any number of data.
    """

    latents: dict[str, LatentSite]
    names: frozenset[str]
    any_length: bool


def outline(model: Program, data: Batch) -> Outline:
    """The latent sites of a model.

    The model runs abstractly and hidden from outer handlers, so a guide may look at its model. A
    site that an objective sums over is left out.

    Args:
        model: a program.
        data: arrays of shape (N, ...) or their abstract values, as the model takes them.

    Raises:
        ValueError: a latent site that no family can draw, in one line.
    """
    return _once(_outline, model, data)


def _once(function: Callable[..., Any], model: Program, data: Batch) -> Any:
    """``function(model, shapes of data)``, once for each model and shapes."""
    shapes = abstract(data)
    known = tuple((name, array.shape, array.dtype) for name, array in shapes.items())
    try:
        return _cached(function, model, known)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return function(model, shapes)  # a model without a hash


@functools.lru_cache(maxsize=256)
def _cached(function: Callable[..., Any], model: Program, shapes: tuple[Any, ...]) -> Any:
    return function(model, {n: jax.ShapeDtypeStruct(shape, dtype) for n, shape, dtype in shapes})


def _outline(model: Program, shapes: Batch) -> Outline:
    try:
        sites = abstract_sites(model, 0, shapes)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise ValueError(values_needed("model", error, shapes)) from error
    except NotImplementedError as error:
        site = site_in_flight(error)
        if site is None:
            raise
        raise ValueError(no_draws("model", site)) from error
    plates, longer = _plates_and_longer(model, 0, shapes, sites)
    drawn = {n: s for n, s in sites.items() if is_latent(s) and not is_summed(s)}
    drawn = {n: s for n, s in drawn.items() if not is_auxiliary(s)}
    for name, site in drawn.items():
        _check_drawable(name, site, plates)
    if longer is not None:
        _check_same_sites(drawn, longer, plates)
    latents = {name: _latent_site(site, plates) for name, site in drawn.items()}
    computed = [name for name, site in latents.items() if site.is_computed]
    if computed:
        _check_supports_known(model, shapes, sites, computed)
    return Outline(latents, frozenset(sites), longer is not None)


def values_needed(role: str, error: Exception, batch: Batch) -> str:
    """What to tell of a program that asks for numbers where there are only shapes."""
    named = [name for name in re.findall(r"batch\['([^']+)'\]", str(error)) if name in batch]
    arrays = " and ".join(repr(name) for name in dict.fromkeys(named)) or "its arguments"
    return (
        f"{role}: expected a program that runs on the shapes of its arguments, got one that needs "
        f"the values of {arrays}; compute the number that it needs outside, and pass it by "
        f"functools.partial"
    )


def no_draws(role: str, site: Site) -> str:
    """What to tell of a site whose distribution cannot be drawn from."""
    return (
        f"{role} site {site['name']!r}: expected a distribution with draws, got "
        f"{type(base(site['fn'])).__name__}, which has none; take a proper prior, such as a wide "
        f"Normal, or write the distribution's sample"
    )


def site_in_flight(error: Exception) -> Site | None:
    """The sample site that NumPyro was at when it raised: it complains without a name."""
    site, traceback = None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is apply_stack.__code__:
            site = traceback.tb_frame.f_locals["msg"]
        traceback = traceback.tb_next
    return site if site is not None and site["type"] == "sample" else None


def _latent_site(site: Site, plates: DataPlates) -> LatentSite:
    batch, support = batch_shape(site), site["fn"].support
    frames = tuple((f.name, f.dim, f.size) for f in reversed(site["cond_indep_stack"]))
    return LatentSite(
        batch=batch,
        shape=tuple(site["fn"].event_shape),
        data_axis=len(batch) + plates.axis(site) if plates.hold(site) else None,
        plates=frames,
        support=support if is_known(support) else None,
        is_masked=isinstance(site["fn"], dist.MaskedDistribution),
        is_given=given_values(site) is not None,
    )


def _check_drawable(name: str, site: Site, plates: DataPlates) -> None:
    support = site["fn"].support
    if is_scanned(site):
        raise ValueError(
            f"model site {name!r}: expected a latent site outside scan, got one inside: a family "
            f"cannot tell its steps apart; draw its noise as one site before the scan, with "
            f".to_event, and compute the states from it"
        )
    if support.is_discrete:
        if num_values(support) is not None and plates.hold(site):
            return
        got = f"one with support {support}"
        got += "" if plates.hold(site) else ", which lies outside the plate of the data"
        raise ValueError(
            f"model site {name!r}: expected a continuous latent site, or a Categorical or "
            f"Bernoulli for each datum, got {got}; observe it, sum over it "
            f"(infer={{'enumerate': 'parallel'}} and TraceEnum_ELBO), or relax it"
        )
    try:  # of a support that the program computes, the kind alone
        biject_to(jax.tree.map(lambda x: 0.0 if isinstance(x, Tracer) else x, support))
    except NotImplementedError as error:
        raise ValueError(
            f"model site {name!r}: expected a support with a bijection to real numbers, got "
            f"{support}; draw the site from a real vector by a numpyro.deterministic"
        ) from error


def _check_same_sites(
    drawn: Mapping[str, Site], longer: Mapping[str, Site], plates: DataPlates
) -> None:
    """Only the data plates follow the number of data."""
    latents = {n for n, s in longer.items() if is_latent(s) and not is_summed(s)}
    others = sorted(latents ^ drawn.keys())
    others = [name for name in others if not is_auxiliary({**drawn, **longer}[name])]
    if others:
        raise ValueError(
            f"model site {others[0]!r}: expected the same latent sites for every number of data, "
            f"got one that comes or goes with it; draw what each datum has in "
            f'numpyro.plate("data", len(x))'
        )
    for name, site in drawn.items():
        shapes = [tuple(s["fn"].event_shape) for s in (site, longer[name])]
        if not plates.hold(site):
            batches = [batch_shape(s) for s in (site, longer[name])]
            shapes = [(*b, *e) for b, e in zip(batches, shapes, strict=True)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model site {name!r}: expected a latent site of one shape for every number of "
                f"data, got shape {shapes[0]}, which follows it; put what each datum has in "
                f'numpyro.plate("data", len(x))'
            )


def _check_supports_known(
    model: Program, shapes: Batch, sites: Mapping[str, Site], computed: list[str]
) -> None:
    """Supports and masks may be computed from the data, not from draws or parameters."""
    drawn = {name: s["value"] for name, s in sites.items() if is_latent(s) or s["type"] == "param"}
    inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), drawn)
    order = list(inputs)
    sources: dict[str, set[str]] = {}

    def needs(batch: Batch, **given: Any) -> dict[str, Any]:
        values = {name: given[f"site {i}"] for i, name in enumerate(order)}
        with block():
            found = trace_of(model, jax.random.key(0), values, **batch)
        return {n: jax.tree.leaves(_from_data(found[n])) for n in computed}

    def run(inputs: Any, batch: Any) -> None:
        given = {f"site {i}": inputs[name] for i, name in enumerate(order)}
        for name, leaves in eval_provenance(needs, batch=batch, **given).items():
            named = set().union(*leaves) - {"batch"}
            sources[name] = {order[int(source.split()[1])] for source in named}

    jax.eval_shape(run, inputs, dict(shapes))
    for name, found in sources.items():
        for source in sorted(found - {name}):
            raise ValueError(
                f"model site {name!r}: expected a support that the data alone decide, got one that "
                f"depends on {source!r}; draw a site of fixed support, such as Uniform(0, 1), and "
                f"compute the value from it and {source!r}"
            )


def _mask(site: Site) -> Any:
    return site["fn"]._mask if isinstance(site["fn"], dist.MaskedDistribution) else ()


def _from_data(site: Site) -> Any:
    """What a program may compute of a site from the data: its support, mask and given values."""
    return site["fn"].support, _mask(site), given_values(site)


def computed_sites(model: Program, data: Batch) -> dict[str, Site]:
    """The sites of a model at data, hidden from outer handlers: for supports that it computes."""
    with block():
        return trace_of(model, jax.random.key(0), {}, **data)


def few(found: Outline, data: Batch) -> dict[str, Array]:
    """A few data, evenly spread. All of them if the model runs with one number of data alone."""
    size = length(data)
    rows = spread_rows(size, PRIOR_DATA if found.any_length else size)
    return {name: jnp.asarray(array)[rows] for name, array in data.items()}


def prior_draws(model: Program, names: Iterable[str], data: Batch, key: Array) -> dict[str, Array]:
    """Draws of latent sites from the prior of a model. Its parameters are those it starts from.

    Args:
        model: a program.
        names: the sites'.
        data: arrays of shape (N, ...), as the model takes them.
        key: a random key.

    Returns:
        By site, (draw, *batch, *event).
    """

    def run(key: Array, data: Batch) -> dict[str, Array]:
        with block():
            sites = trace_of(model, key, {}, **data)
            params = {n: s["value"] for n, s in sites.items() if s["type"] in ("param", "mutable")}

            def draw(key: Array) -> dict[str, Array]:
                sites = trace_of(model, key, params, **data)
                return {name: sites[name]["value"] for name in names}

            return lax.map(draw, random.split(key, PRIOR_DRAWS), batch_size=20)

    return jax.jit(run)(key, dict(data))


# --- parameters that stay -------------------------------------------------------------------------


def fixed_param(name: str, measure: Callable[[Array], Any]) -> Any:
    """A parameter that no optimiser moves: what a program measures when its parameters are made.

    ``fit`` keeps it among the parameters of a fit. Its gradient is zero.

    Args:
        name: the name of the ``numpyro.param`` site.
        measure: from a random key to a tree of arrays.
    """
    return lax.stop_gradient(numpyro.param(name, measure, is_fixed=True))


def is_fixed(site: Site) -> bool:
    """True for a parameter that no optimiser moves."""
    return site["type"] == "param" and bool(site["kwargs"].get("is_fixed"))


# --- what the arrays are --------------------------------------------------------------------------


def mask_name(name: str) -> str:
    """The argument of a program that says which entries of the array ``name`` are there."""
    return f"{name}_mask"


def observed_arrays(model: Program, batch: Batch) -> set[str]:
    """The arrays of a model's observations: those without which it generates.

    The values of its observed sites are made from them, which provenance finds. The masks of these
    arrays belong to them: ``x_mask`` to ``x``.

    Args:
        model: a program.
        batch: arrays of shape (N, ...), as the model takes them.
    """
    found = {name for sources in observed_sources(model, batch).values() for name in sources}
    return found | {mask_name(name) for name in found} & batch.keys()


def observed_sources(model: Program, batch: Batch) -> dict[str, frozenset[str]]:
    """By observed site, the arrays that its value is made from.

    Args:
        model, batch: as in ``observed_arrays``.
    """
    return {s["name"]: arrays for s, arrays in _made_from(model, abstract(batch), _observation)}


def given_sources(model: Program, batch: Batch) -> dict[str, frozenset[str]]:
    """By latent site whose values the data tell in part, the arrays that tell them.

    Args:
        model, batch: as in ``observed_arrays``.
    """
    return {s["name"]: arrays for s, arrays in _made_from(model, abstract(batch), given_values)}


def _observation(site: Site) -> Any:
    return site["value"] if is_observed(site) and not is_auxiliary(site) else None


def _made_from(
    model: Program, shapes: Batch, numbers_of: Callable[[Site], Any]
) -> list[tuple[Site, frozenset[str]]]:
    """The sample sites for which ``numbers_of`` has numbers, and the arrays they are made from."""
    sites: dict[str, Site] = {}

    def values(**arrays: Any) -> dict[str, Any]:
        with block():
            found = trace_of(model, jax.random.key(0), {}, **arrays)
        numbers = {n: numbers_of(s) for n, s in found.items() if s["type"] == "sample"}
        numbers = {name: array for name, array in numbers.items() if array is not None}
        sites.update((name, found[name]) for name in numbers)
        return numbers

    sources: dict[str, frozenset[str]] = {}

    def run(arrays: dict[str, Any]) -> None:
        sources.update(eval_provenance(values, **arrays))

    jax.eval_shape(run, dict(shapes))
    return [(site, sources[name]) for name, site in sites.items()]


@dataclass(frozen=True)
class Kind:
    """What the numbers of an array mean.

    Attributes:
        name: "real", "boolean", "counts", "labels", "given" (values of a latent site, known in
            part), or "integers" of no known meaning.
        num_classes: how many labels there are.
    """

    name: str
    num_classes: int = 0


def array_kinds(model: Program, data: Batch) -> dict[str, Kind]:
    """What each array holds, by its type and by the support of the site whose value it is.

    Args:
        model: a program.
        data: arrays of shape (N, ...) or their abstract values, as the model takes them.
    """
    return _once(_array_kinds, model, data)


def _array_kinds(model: Program, shapes: Batch) -> dict[str, Kind]:
    kinds = {}
    for name, array in shapes.items():
        if array.dtype == bool:
            kinds[name] = Kind("boolean")
        else:
            real = jnp.issubdtype(array.dtype, jnp.floating)
            kinds[name] = Kind("real" if real else "integers")
    for sources in given_sources(model, shapes).values():
        kinds |= {name: Kind("given") for name in sources}
    for site, sources in _made_from(model, shapes, _observation):
        for name in sources:
            is_value = len(sources) == 1 and jnp.size(site["value"]) == shapes[name].size
            if is_value and kinds[name] not in (Kind("boolean"), Kind("given")):
                kinds[name] = _kind_of(base(site["fn"]))
    return kinds


def _kind_of(fn: Any) -> Kind:
    """What the values of a distribution are."""
    while isinstance(fn, dist.MaskedDistribution):
        fn = base(fn.base_dist)
    if isinstance(fn, dist.CategoricalLogits | dist.CategoricalProbs):
        weights = fn.logits if isinstance(fn, dist.CategoricalLogits) else fn.probs
        return Kind("labels", weights.shape[-1])
    if fn.support is constraints.boolean:
        return Kind("boolean")
    return Kind("counts" if fn.support.is_discrete else "real")
