"""Log weights of programs with latent sites that are summed over, datum by datum."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import random
from jaxtyping import Array, Float
from numpyro.infer import TraceEnum_ELBO

from inference.sites import Program, length


def summed_log_weight(
    model: Program, guide: Program, params: Mapping[str, Any], data: Mapping[str, Array], key: Array
) -> Float[Array, " N"]:
    """log sum_k p(x, z, k | c) - log q(z | x, c) of every datum, at one draw of z from the guide.

    k stands for the model's enumerated sites. NumPyro sums over them by tensor variable
    elimination. It returns one number for all its data, so it gets one datum at a time.

    Args:
        model, guide: programs.
        params: the value of every parameter, for one seed.
        data: arrays of shape (N, ...).
        key: a random key.
    """

    def one(key: Array, datum: Mapping[str, Array]) -> Array:
        alone = {name: array[None] for name, array in datum.items()}
        return -TraceEnum_ELBO().loss(key, dict(params), model, guide, **alone)

    return jax.vmap(one)(random.split(key, length(data)), dict(data))
