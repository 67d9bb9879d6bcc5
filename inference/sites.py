"""What a NumPyro program looks like from outside: its sites, plates, shapes and supports.

A program is looked at by *abstract runs* (``jax.eval_shape``): it runs on shapes alone, and no
number is computed. Two runs, on batches of different lengths, tell which plates hold the data:
those whose size follows the length of the batch. The plate needs no name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions.kl import kl_divergence
from numpyro.handlers import block, seed, substitute, trace
from numpyro.ops.provenance import eval_provenance

Program = Callable[..., Any]
Batch = Mapping[str, Any]
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


# --- runs -----------------------------------------------------------------------------------------


def trace_of(
    program: Program, key: Any, values: Mapping[str, Any], /, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The sites of ``program(*args, **kwargs)``. Sites named in ``values`` have that value."""
    return dict(trace(substitute(seed(program, key), data=values)).get_trace(*args, **kwargs))


def length(arrays: Mapping[str, Any]) -> int:
    """The number of data in arrays by name."""
    return len(next(iter(arrays.values())))


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


def batch_shape(site: Site) -> tuple[int, ...]:
    """The batch shape of a sample site's distribution, with its sample shape in front."""
    return (*site["kwargs"].get("sample_shape", ()), *site["fn"].batch_shape)


def base(fn: Any) -> Any:
    """A distribution without the batch and event axes that were declared on top of it."""
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


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
    return _data_plates(program, len(args), named, _abstract_sites(program, len(args), named))


def _abstract_sites(program: Program, num_args: int, arrays: Batch) -> dict[str, Site]:
    """The sites of a program on abstract values, hidden from outer handlers."""
    found: dict[str, Site] = {}

    def run(arrays: dict[str, Any]) -> None:
        args = [arrays.pop(str(i)) for i in range(num_args)]
        with block():
            found.update(trace_of(program, jax.random.key(0), {}, *args, **arrays))

    jax.eval_shape(run, dict(arrays))
    return found


def _data_plates(
    program: Program, num_args: int, arrays: Batch, sites: Mapping[str, Site]
) -> DataPlates:
    size = next(iter(arrays.values())).shape[0]
    here = plate_sizes(sites)
    try:
        longer = _abstract_sites(program, num_args, abstract(arrays, size + 1))
    except Exception:  # a program of one length, such as one with numbers for each datum
        return of_size(here, size)
    return following(here, plate_sizes(longer), size)


def observed_arrays(model: Program, batch: Batch) -> set[str]:
    """The arrays that the values of a model's observed sites are made from, found by provenance.

    Args:
        model: a program.
        batch: arrays of shape (N, ...), as the model takes them.
    """

    def values(**arrays: Any) -> list[Any]:
        with block():
            sites = trace_of(model, jax.random.key(0), {}, **arrays).values()
        return [s["value"] for s in sites if is_observed(s) and not is_auxiliary(s)]

    found: set[str] = set()

    def run(arrays: dict[str, Any]) -> None:
        found.update(*eval_provenance(values, **arrays))

    jax.eval_shape(run, abstract(batch))
    return found


# --- latent sites ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentSite:
    """A latent site of a program.

    Attributes:
        shape: the event shape, for example (20,) for a vector of 20 numbers.
        support: a constraint of ``numpyro.distributions.constraints``.
        is_local: whether every datum has its own.
    """

    shape: tuple[int, ...]
    support: Any
    is_local: bool


def latent_sites(model: Program, data: Batch) -> dict[str, LatentSite]:
    """The latent sites of a model, by name, in the order in which it draws them.

    The model runs abstractly and hidden from outer handlers, so a guide may look at its model.

    Args:
        model: a program.
        data: arrays of shape (N, ...) or their abstract values, as the model takes them.
    """
    shapes = abstract(data)
    sites = _abstract_sites(model, 0, shapes)
    plates = _data_plates(model, 0, shapes, sites)
    return {
        name: LatentSite(tuple(site["fn"].event_shape), site["fn"].support, plates.hold(site))
        for name, site in sites.items()
        if is_latent(site)
    }
