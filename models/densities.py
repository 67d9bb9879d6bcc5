"""Densities that NumPyro lacks: a Normal by its Cholesky factor, and the maps of a flow."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array
from numpyro.distributions import constraints, transforms

from models.networks import MLP, still


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


class Couplings(nnx.Module):
    """The networks of a coupling flow. Each maps half of z, and the context, to the other half.

    The last layers start at zero, so the flow starts as the identity.

    Args:
        num_latents: the dimensions of z.
        num_context: numbers of context for one datum.
        hidden: units of each network's one hidden layer.
        num_layers: how many networks there are.
    """

    def __init__(self, num_latents: int, num_context: int, hidden: int, num_layers: int, *, rngs):
        sizes = (num_latents + num_context, hidden, 2 * num_latents)
        self.layers = nnx.List(still(*sizes, rngs=rngs) for _ in range(num_layers))


class Coupling(transforms.Transform):
    """A map that keeps some dimensions of x and moves the others: y = x exp(s) + t.

    s and t are functions of the kept dimensions and the context. The scale exp(s) stays between
    e^-2 and e^2. Dinh, Sohl-Dickstein & Bengio 2017, equation 4.

    Args:
        mlp: the network for s and t.
        context: numbers for each datum, (N, num_context).
        kept: for each dimension, whether it stays.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, mlp: MLP, context: Array, kept: tuple[bool, ...]):
        self.mlp, self.context, self.kept = mlp, context, kept

    def _maps(self, x: Array) -> tuple[Array, Array]:
        """s and t. They are zero in the kept dimensions."""
        kept = jnp.array(self.kept)
        context = jnp.broadcast_to(self.context, (*x.shape[:-1], self.context.shape[-1]))
        outputs = self.mlp(jnp.concatenate([jnp.where(kept, x, 0.0), context], axis=-1))
        s, t = jnp.split(outputs, 2, axis=-1)
        return jnp.where(kept, 0.0, 2 * jnp.tanh(s / 2)), jnp.where(kept, 0.0, t)

    def __call__(self, x: Array) -> Array:
        """y from x, (..., dimensions)."""
        s, t = self._maps(x)
        return x * jnp.exp(s) + t

    def _inverse(self, y: Array) -> Array:
        s, t = self._maps(y)
        return (y - t) * jnp.exp(-s)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """The sum of s over dimensions."""
        return self._maps(x)[0].sum(-1)

    def tree_flatten(self) -> Any:
        """The arrays, and the rest."""
        return (self.mlp, self.context), (("mlp", "context"), {"kept": self.kept})


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
