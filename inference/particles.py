"""Monte Carlo particles with less noise, for NumPyro's own objectives.

``Trace_ELBO(num_particles=2, vectorize_particles=antithetic)`` is the ordinary ELBO and has the
ordinary expectation, but its two particles are mirror images of each other and the noise is
spread evenly over the data:

- antithetic (Hammersley & Morton 1956): with z = loc + scale * e the second particle takes -e,
  so that every term odd in e cancels;
- stratified (McKay, Beckman & Conover 1979; for variational inference Buchholz, Wenzel & Mandt
  2018): among the B data of a batch, |e| takes one value from each of B strata of equal
  probability, in random order and independently for each dimension of z, so that the terms even
  in e nearly average out over the batch.

Each datum's e is still exactly standard normal, so that the estimator stays unbiased.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax, random
from jaxtyping import Array, Float, PyTree
from numpyro.primitives import Messenger

from inference.shuffle import permute
from inference.sites import base


def antithetic(particle: Callable[[Array], PyTree], keys: Array) -> PyTree:
    """Evaluates two mirrored particles; pass as ``vectorize_particles`` of a NumPyro objective.

    Args:
        particle: from a key to the objective's particle (NumPyro's own).
        keys: two keys; the first is used for both.

    Raises:
        ValueError: for another number of particles.
        TypeError: for a latent site that is not Gaussian with independent dimensions.
    """
    if len(keys) != 2:
        raise ValueError(f"num_particles: expected 2 for antithetic particles, got {len(keys)}")

    def evaluate(sign: Array) -> PyTree:
        with _Stratified(sign):
            return particle(keys[0])

    return jax.vmap(evaluate)(jnp.array([1.0, -1.0]))  # the noise itself is drawn once


def stratified_normal(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard normal noise, stratified over the leading axis; its mirror image is the negative.

    Args:
        key: a random key.
        shape: (B, ...). Every entry is standard normal; entries of one row are independent;
            within a column the absolute values fall one into each of B equal strata.
    """
    size = shape[0] if shape else 1
    bits = random.bits(key, (size + 1, *shape[1:]))  # one draw of bits serves everything
    order, bits = bits[:1], bits[1:].reshape(shape)
    rows = jnp.arange(size).reshape(-1, *(1 for _ in shape[1:]))
    strata = permute(rows, size, order).reshape(shape)
    jitter = (bits >> 8) * jnp.float32(2**-24)  # the upper 24 bits; the lowest is the sign
    quantile = jnp.minimum((strata + jitter) / size, 1 - 2**-24)
    return jnp.where(bits & 1, -1.0, 1.0) * jnp.sqrt(2.0) * lax.erf_inv(quantile)


class _Stratified(Messenger):
    """Draws every latent site as loc + scale * sign * e with stratified e."""

    def __init__(self, sign: Float[Array, ""]):
        super().__init__()
        self.sign = sign

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["value"] is not None or msg["is_observed"]:
            return
        fn = base(msg["fn"])
        if not isinstance(fn, dist.Normal):
            raise TypeError(
                f"site {msg['name']!r}: expected a Normal with independent dimensions for "
                f"antithetic particles, got {type(fn).__name__}; leave vectorize_particles out"
            )
        noise = stratified_normal(msg["kwargs"]["rng_key"], msg["fn"].shape())
        msg["value"] = fn.loc + fn.scale * self.sign * noise
