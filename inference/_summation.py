"""Log weights of every datum, with discrete sites summed over.

A model may hold sites that its guide does not draw: NumPyro sums over them by tensor variable
elimination. A guide may draw sites that can be summed over (``Programs.enumerated``): the programs
run at each of their joint values.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float
from numpyro.handlers import replay, seed, substitute
from numpyro.infer.util import compute_log_probs

from inference.sites import (
    DataPlates,
    Program,
    batch_shape,
    is_latent,
    length,
    num_values,
    trace_of,
)


class Sums(NamedTuple):
    """The discrete sites that a judge sums over.

    Attributes:
        in_model: whether the model has sites that the guide does not draw.
        in_guide: the guide's sites that are summed over.
    """

    in_model: bool = False
    in_guide: tuple[str, ...] = ()


def log_weights(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    params: Mapping[str, Any],
    data: Mapping[str, Any],
) -> Callable[[Array], tuple[Float[Array, "J N"], Float[Array, "J N"]]]:
    """From a key to the log weights of every datum, at one draw of the sites that are not summed.

    k stands for the guide's summed sites and j for their joint values, one if there are none. The
    function returns log p(x, z_j, k_j | c) - log q(z_j | x, c, k_j), and log q(k_j | x, c). Global
    sites have no part in them.

    Args:
        model, guide: programs.
        plates: those that hold the data.
        sums: the sites to sum over.
        params: the value of every parameter, for one seed.
        data: arrays of shape (N, ...).
    """
    data, size = {name: jnp.asarray(array) for name, array in data.items()}, length(data)
    densities = _summed_in_model if sums.in_model else _densities

    def draw(key: Array) -> tuple[Array, Array]:
        def at(values: Mapping[str, Array]) -> tuple[Array, Array]:
            log_p, log_q, drawn = densities(
                model, guide, plates, dict(params) | dict(values), data, key
            )
            of_summed = {name: log_q[name] for name in sums.in_guide}
            others = {name: term for name, term in log_q.items() if name not in of_summed}
            log_w = log_p - plates.sum_by_datum(others, drawn, size)
            return log_w, plates.sum_by_datum(of_summed, drawn, size)

        if not sums.in_guide:
            return jax.tree.map(lambda x: x[None], at({}))
        return jax.vmap(at)(joint_values(guide, plates, sums.in_guide, params, data, key))

    return draw


def joint_values(
    guide: Program,
    plates: DataPlates,
    names: tuple[str, ...],
    params: Mapping[str, Any],
    data: Mapping[str, Any],
    key: Array,
) -> dict[str, Array]:
    """The joint values of a guide's summed sites: by site (J, *batch), the same for all data."""
    sites = trace_of(guide, key, params, **data)
    entries, counts = {}, []
    for name in names:
        shape = list(batch_shape(sites[name]))
        shape[plates.axis(sites[name])] = 1
        entries[name] = shape
        counts += [num_values(sites[name]["fn"].support)] * math.prod(shape)
    joint = jnp.array(list(itertools.product(*(range(count or 0) for count in counts))))
    values, start = {}, 0
    for name, shape in entries.items():
        own = joint[:, start : start + math.prod(shape)].reshape(-1, *shape)
        start += math.prod(shape)
        whole = (len(joint), *batch_shape(sites[name]))
        values[name] = jnp.broadcast_to(own, whole).astype(jnp.result_type(sites[name]["value"]))
    return values


def run(
    model: Program, guide: Program, params: Mapping[str, Any], data: Mapping[str, Any], key: Array
) -> tuple[dict[str, Array], dict[str, Any], dict[str, Array], dict[str, Any]]:
    """log q and its sites, log p and its sites, at one draw from the guide."""
    guide_key, model_key = random.split(key)
    log_q, q_sites = compute_log_probs(
        seed(guide, guide_key), (), dict(data), dict(params), sum_log_prob=False
    )
    log_p, p_sites = compute_log_probs(
        replay(seed(model, model_key), q_sites), (), dict(data), dict(params), sum_log_prob=False
    )
    return log_q, q_sites, log_p, p_sites


def local(terms: Mapping[str, Array], sites: Mapping[str, Any], plates: DataPlates) -> Any:
    """The terms of the sites with a value for each datum."""
    return {name: term for name, term in terms.items() if plates.hold(sites[name])}


def _densities(
    model: Program,
    guide: Program,
    plates: DataPlates,
    params: Mapping[str, Any],
    data: Mapping[str, Array],
    key: Array,
) -> tuple[Float[Array, " N"], dict[str, Array], dict[str, Any]]:
    """log p of every datum, the terms of log q by local site, and the guide's sites."""
    log_q, q_sites, log_p, p_sites = run(model, guide, params, data, key)
    total = plates.sum_by_datum(local(log_p, p_sites, plates), p_sites, length(data))
    return total, local(log_q, q_sites, plates), q_sites


def _summed_in_model(
    model: Program,
    guide: Program,
    plates: DataPlates,
    params: Mapping[str, Any],
    data: Mapping[str, Array],
    key: Array,
) -> tuple[Float[Array, " N"], dict[str, Array], dict[str, Any]]:
    """As ``_densities``, with the sites that the guide does not draw summed over.

    NumPyro returns one number for all its data, so it gets one datum at a time. All sites are
    local.
    """
    from numpyro.contrib.funsor import enum, log_density  # a second to import

    guide_key, model_key = random.split(key)
    log_q, drawn = compute_log_probs(
        seed(guide, guide_key), (), dict(data), dict(params), sum_log_prob=False
    )
    axes, draws = {}, {}
    for name, site in drawn.items():
        if is_latent(site):
            axes[name] = plates.axis(site) - len(site["fn"].event_shape)
            draws[name] = jnp.moveaxis(site["value"], axes[name], 0)
    known_params = {name: value for name, value in params.items() if name not in draws}

    def log_p(key: Array, datum: Mapping[str, Array], draws: Mapping[str, Array]) -> Array:
        alone = {name: array[None] for name, array in datum.items()}
        values = {name: jnp.expand_dims(draws[name], axes[name]) for name in draws}
        sites = trace_of(model, key, known_params | values, **alone).values()
        nesting = max(len(batch_shape(site)) for site in sites if site["type"] == "sample")
        known = substitute(seed(model, key), data=known_params | values)
        return log_density(enum(known, -1 - nesting), (), alone, {})[0]

    keys = random.split(model_key, length(data))
    return jax.vmap(log_p)(keys, dict(data), draws), log_q, drawn
