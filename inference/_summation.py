"""Log weights of programs with latent sites that are summed over, datum by datum."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float
from numpyro.handlers import seed, substitute
from numpyro.infer.util import compute_log_probs

from inference.sites import DataPlates, Program, batch_shape, is_latent, length, trace_of


def summed_log_weight(
    model: Program,
    guide: Program,
    plates: DataPlates,
    params: Mapping[str, Any],
    data: Mapping[str, Array],
    key: Array,
) -> Float[Array, " N"]:
    """log sum_k p(x, z, k | c) - log q(z | x, c) of every datum, at one draw of z from the guide.

    k stands for the model's enumerated sites. NumPyro sums over them by tensor variable
    elimination. It returns one number for all its data, so it gets one datum at a time.

    Args:
        model, guide: programs whose sites are all local.
        plates: those that hold the data.
        params: the value of every parameter, for one seed.
        data: arrays of shape (N, ...).
        key: a random key.
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

    def log_p(key: Array, datum: Mapping[str, Array], draws: Mapping[str, Array]) -> Array:
        alone = {name: array[None] for name, array in datum.items()}
        values = {name: jnp.expand_dims(draws[name], axes[name]) for name in draws}
        sites = trace_of(model, key, dict(params) | values, **alone).values()
        nesting = max(len(batch_shape(site)) for site in sites if site["type"] == "sample")
        known = substitute(seed(model, key), data=dict(params) | values)
        return log_density(enum(known, -1 - nesting), (), alone, {})[0]

    keys = random.split(model_key, length(data))
    size = length(data)
    return jax.vmap(log_p)(keys, dict(data), draws) - plates.sum_by_datum(log_q, drawn, size)
