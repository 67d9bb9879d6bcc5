"""Monte Carlo particles: with less noise, or with less memory.

Both are ways to evaluate the particles of an objective. Each is given to it as
``vectorize_particles``.

``InPieces(10)`` is for many particles. It evaluates ten of them at once, and keeps no activations
for the gradient. Every objective takes it.

``antithetic`` has less noise. It is for NumPyro's own objectives and their subclasses.
``Trace_ELBO(num_particles=2, vectorize_particles=antithetic)`` is an ordinary ELBO with the
ordinary expectation. Its two particles are mirror images, and their noise is spread evenly over
the data:

- antithetic (Hammersley & Morton 1956): the first particle is z = loc + scale * e, the second has
  -e in place of e. So every term that is odd in e cancels.
- stratified (McKay, Beckman & Conover 1979; for variational inference Buchholz, Wenzel & Mandt
  2018): a batch has B data, and the values of |e| are cut into B strata of equal probability. Each
  datum gets one stratum, in random order and independently for each dimension of z. So the terms
  that are even in e nearly average out over the batch.

Each datum's e is still exactly standard normal, so the estimator stays unbiased. The strata lie
along the one plate around all observed sites. Sites outside it have mirrored noise only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax, random
from jaxtyping import Array, Float, PyTree
from numpyro.primitives import Messenger

from inference._shuffle import permute
from inference.sites import base


@dataclass(frozen=True)
class InPieces:
    """Evaluates many particles piece by piece, in bounded memory.

    Pass it as ``vectorize_particles`` to an objective. Keys and results are as with
    ``jax.vmap``. A step needs memory for ``size`` particles, and for what each particle returns.
    For the bounds of importance weighting that is one number per particle and datum.

    The price is time. The gradient computes each piece again: one more forward pass. What all
    particles share, such as the encoder's outputs, is computed once for each piece.

    With at most ``size`` particles it is ``jax.vmap`` itself. Others are spread evenly over the
    pieces. Where that leaves places free, the first particles are evaluated again and not used.

    Attributes:
        size: the most particles that are evaluated at once.

    Raises:
        ValueError: the size is below 1.
    """

    size: int = 10

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size: expected at least 1 particle at once, got {self.size}")

    def __call__(self, particle: Callable[[Any], PyTree], keys: Any) -> PyTree:
        """What the particles return, along a leading axis.

        Args:
            particle: a function of one particle's key.
            keys: arrays with a leading axis of particles.
        """
        num_particles = len(jax.tree.leaves(keys)[0])
        num_pieces = -(-num_particles // self.size)
        if num_pieces <= 1:
            return jax.vmap(particle)(keys)
        places = num_pieces * -(-num_particles // num_pieces)
        index = np.arange(places).reshape(num_pieces, -1) % num_particles
        # A loop's body is compiled by itself, so no barrier must keep its two passes apart.
        piece = jax.checkpoint(jax.vmap(particle), prevent_cse=False)
        found = lax.map(piece, jax.tree.map(lambda x: x[index], keys))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_particles], found)


def antithetic(particle: Callable[[Array], PyTree], keys: Array | tuple[Any, ...]) -> PyTree:
    """Two mirrored particles. Pass it as ``vectorize_particles`` to a NumPyro objective.

    Args:
        particle: NumPyro's function from a key to the objective's particle.
        keys: two keys. The first one serves both particles.

    Raises:
        ValueError: there are not two particles.
        TypeError: a latent site is not Gaussian with independent dimensions, or the objective
            gives its particles more than keys.
    """
    if isinstance(keys, tuple):
        raise TypeError(
            "vectorize_particles: expected another way for this objective, got antithetic; leave "
            "vectorize_particles out"
        )
    if len(keys) != 2:
        raise ValueError(
            f"num_particles: expected 2 for antithetic particles, got {len(keys)}; write "
            f"num_particles=2, or leave vectorize_particles out"
        )

    observed = _Observed()
    with observed:
        jax.eval_shape(particle, keys[0])
    plates = frozenset.intersection(*observed.plates) if observed.plates else frozenset()

    def evaluate(sign: Array) -> PyTree:
        with _Mirrored(sign, min(plates) if len(plates) == 1 else None):
            return particle(keys[0])

    return jax.vmap(evaluate)(jnp.array([1.0, -1.0]))  # the noise itself is drawn once


def stratified_normal(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard normal noise, stratified over the leading axis.

    Every entry is standard normal, and entries of one row are independent. The absolute values of
    a column fall one into each of B equal strata.

    Args:
        key: a random key.
        shape: (B, ...).
    """
    size = shape[0] if shape else 1
    # One draw serves everything. The type is fixed: with 64-bit JAX the default has 64 bits.
    bits = random.bits(key, (size + 1, *shape[1:]), jnp.uint32)
    order, bits = bits[:1], bits[1:].reshape(shape)
    rows = jnp.arange(size).reshape(-1, *(1 for _ in shape[1:]))
    strata = permute(rows, size, order).reshape(shape)
    jitter = (bits >> 8) * jnp.float32(2**-24)  # the upper 24 bits; the lowest is the sign
    quantile = jnp.minimum((strata + jitter) / size, 1 - 2**-24)
    return jnp.where(bits & 1, -1.0, 1.0) * jnp.sqrt(2.0) * lax.erf_inv(quantile)


class _Observed(Messenger):
    """Notes the plates around each observed site."""

    def __init__(self):
        super().__init__()
        self.plates: list[frozenset[str]] = []

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            self.plates.append(frozenset(frame.name for frame in msg["cond_indep_stack"]))


class _Mirrored(Messenger):
    """Draws every latent site as loc + scale * sign * e. Along a plate the noise e is stratified.

    Values of one datum must stay independent of each other. So no other axis is stratified.
    """

    def __init__(self, sign: Float[Array, ""], plate: str | None):
        super().__init__()
        self.sign, self.plate = sign, plate

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["value"] is not None or msg["is_observed"]:
            return
        fn = base(msg["fn"])
        if not isinstance(fn, dist.Normal):
            raise TypeError(
                f"site {msg['name']!r}: expected a Normal with independent dimensions for "
                f"antithetic particles, got {type(fn).__name__}; leave vectorize_particles out"
            )
        msg["value"] = fn.loc + fn.scale * self.sign * self._noise(msg)

    def _noise(self, msg: Any) -> Float[Array, "..."]:
        key, shape = msg["kwargs"]["rng_key"], tuple(msg["fn"].shape())
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                axis = len(msg["fn"].batch_shape) + frame.dim
                rows = (shape[axis], *shape[:axis], *shape[axis + 1 :])
                return jnp.moveaxis(stratified_normal(key, rows), 0, axis)
        return random.normal(key, shape)
