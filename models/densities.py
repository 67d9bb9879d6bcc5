"""Densities that NumPyro lacks: a Normal by its Cholesky factor, and ``Folded``."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import transforms


class CholeskyNormal(dist.TransformedDistribution):
    """The distribution Normal(loc, L L^T) as loc + L e with e ~ Normal(0, I).

    It remembers the e of a draw, and NumPyro's ``MultivariateNormal`` does not. L comes from a
    network in float32. To solve for e can lose every digit, and then the ELBO is any number.

    Args:
        loc: (..., K).
        scale_tril: L, (..., K, K), lower triangular.
    """

    def __init__(self, loc: Array, scale_tril: Array):
        noise = dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1)
        super().__init__(noise, transforms.LowerCholeskyAffine(loc, scale_tril))

    @property
    def mean(self) -> Array:
        """The location, (..., K)."""
        return self.transforms[0].loc

    @property
    def covariance_matrix(self) -> Array:
        """L L^T, (..., K, K)."""
        scale_tril = self.transforms[0].scale_tril
        return scale_tril @ jnp.swapaxes(scale_tril, -1, -2)


class Folded(dist.Distribution):
    """A distribution over (M * N, ...) arrays, as one of batch shape (M, N, ...).

    Networks and likelihoods take data along one axis. Where an objective sums over a site drawn
    before, the values of that site are an axis more.

    Args:
        fn: a distribution of batch shape (prod(shape), *rest).
        shape: what its first axis is unfolded to.
    """

    pytree_data_fields = ("fn",)
    pytree_aux_fields = ("shape",)

    def __init__(self, fn: dist.Distribution, shape: tuple[int, ...]):
        self.fn, self.shape = fn, shape
        super().__init__((*shape, *fn.batch_shape[1:]), fn.event_shape)

    @property
    def support(self) -> Any:
        """That of the folded distribution."""
        return self.fn.support

    @property
    def has_rsample(self) -> bool:
        """Whether draws have a gradient."""
        return self.fn.has_rsample

    def _unfolded(self, x: Array) -> Array:
        return x.reshape(*self.shape, *x.shape[1:])

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of shape (*sample_shape, *batch_shape, *event_shape)."""
        draws = self.fn.sample(key, sample_shape)
        return draws.reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value: Array) -> Array:
        """Log densities of the batch shape. Values broadcast with it."""
        value = jnp.broadcast_to(value, self.batch_shape + self.event_shape)
        folded = value.reshape(-1, *value.shape[len(self.shape) :])
        return self._unfolded(self.fn.log_prob(folded))

    @property
    def mean(self) -> Array:
        """The means, of the batch shape."""
        return self._unfolded(self.fn.mean)
