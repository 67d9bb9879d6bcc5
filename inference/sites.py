"""What the sites of a NumPyro trace tell: the plate of the data, log densities and divergences."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions.kl import kl_divergence
from numpyro.handlers import seed, substitute, trace

DATA_PLATE = "data"

Site = dict[str, Any]  # what NumPyro calls a message: one `sample`, `plate`, `param`, ...


def trace_of(
    program: Callable[..., Any], key: Array, values: Mapping[str, Any], /, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The sites of ``program(*args, **kwargs)``, those named in ``values`` with their value."""
    return dict(trace(substitute(seed(program, key), data=values)).get_trace(*args, **kwargs))


def length(arrays: Mapping[str, Any]) -> int:
    """The number of data in arrays by name."""
    return len(next(iter(arrays.values())))


def is_latent(site: Site) -> bool:
    """True of a sample site that is not observed."""
    return site["type"] == "sample" and not site["is_observed"]


def is_observed(site: Site) -> bool:
    """True of a sample site with a value of its own."""
    return site["type"] == "sample" and site["is_observed"]


def in_data_plate(site: Site) -> bool:
    """True of a site that every datum has its own of."""
    return any(frame.name == DATA_PLATE for frame in site["cond_indep_stack"])


def data_axis(site: Site) -> int:
    """The axis, counted from the end, of a site's log density along which the data lie.

    Raises:
        ValueError: the site lies outside the plate "data".
    """
    axes = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    if DATA_PLATE not in axes:
        raise ValueError(
            f'site {site["name"]!r}: expected it in the plate "data", got {sorted(axes)}; a global '
            f"latent variable has no share of a datum's ELBO"
        )
    return axes[DATA_PLATE]


def sum_by_datum(terms: Mapping[str, Array], sites: Mapping[str, Any], size: int) -> Array:
    """The sum of log densities of sites, by datum.

    Raises:
        ValueError: a site lies outside the plate "data".
    """
    total = jnp.zeros(size)
    for name in sorted(terms):
        term = jnp.moveaxis(terms[name], data_axis(sites[name]), 0)
        total += term.reshape(len(term), -1).sum(1)
    return total


def elementwise_kl(q: dist.Distribution, p: dist.Distribution) -> Array | None:
    """KL(q || p) in every dimension, or None where they do not factorise or have no formula."""
    shape = q.batch_shape + q.event_shape
    q, p = base(q), base(p)
    if q.event_shape or p.event_shape:
        return None
    try:
        return jnp.broadcast_to(kl_divergence(q, p), shape)
    except NotImplementedError:
        return None


def base(fn: Any) -> Any:
    """A distribution without the batch and event axes that were declared on top of it."""
    while isinstance(fn, (dist.Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn
