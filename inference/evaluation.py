"""Judges: what a fit is worth, in nats per datum."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax, random
from jaxtyping import Array, ArrayLike, Float
from numpyro.handlers import replay, seed
from numpyro.infer.util import compute_log_probs


def pointwise_elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    data: Mapping[str, ArrayLike],
    *,
    key: Array,
    num_samples: int = 1,
) -> Float[Array, " N"]:
    """The ELBO of each datum: the mean over draws of log p(x, z | c) - log q(z | x, c).

    Args:
        model, guide: NumPyro programs that take the arrays of ``data`` by name.
        params: the value of every parameter, for one seed.
        data: arrays of shape (N, ...).
        key: a random key.
        num_samples: draws of z per datum, one after the other in memory.

    Returns:
        Nats per datum. Its mean is the ELBO, its deviation over sqrt(N) the standard error.

    Raises:
        ValueError: a site lies outside the plate "data", so that it belongs to no datum.
    """
    data = {name: jnp.asarray(array) for name, array in data.items()}
    size = len(next(iter(data.values())))

    def log_probs(program: Callable[..., Any]) -> tuple[Array, Any]:
        terms, sites = compute_log_probs(program, (), data, dict(params), sum_log_prob=False)
        total = jnp.zeros(size)
        for name, term in terms.items():
            axes = {f.name: f.dim for f in sites[name]["cond_indep_stack"]}
            if "data" not in axes:
                raise ValueError(
                    f'site {name!r}: expected it in the plate "data", got {sorted(axes)}; a global '
                    f"latent variable has no share of a datum's ELBO"
                )
            term = jnp.moveaxis(term, axes["data"], 0)
            total += term.reshape(len(term), -1).sum(1)
        return total, sites

    def draw(key: Array) -> Array:
        guide_key, model_key = random.split(key)
        log_q, sites = log_probs(seed(guide, guide_key))
        log_p, _ = log_probs(replay(seed(model, model_key), sites))
        return log_p - log_q

    return jnp.mean(lax.map(draw, random.split(key, num_samples)), axis=0)
