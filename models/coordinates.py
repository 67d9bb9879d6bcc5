"""Unconstrained coordinates: every latent value as a vector of real numbers.

NumPyro's ``biject_to`` gives the map from real numbers to a support. Rounding can put a value on
the edge of its support, where the inverse is infinite. So a value is first moved inside, by the
least step of its float type. Then every density is finite at every draw.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints, transforms
from numpyro.distributions.util import matrix_to_tril_vec

from inference.sites import without_events


def moved_inside(support: Any, value: Array) -> Array:
    """The value, or the one next to it that lies inside the support.

    Args:
        support: a constraint of ``numpyro.distributions.constraints``.
        value: (..., *event), in the support or on its edge.
    """
    support = without_events(support)
    tiny, largest = jnp.finfo(value.dtype).tiny, jnp.finfo(value.dtype).max
    value = jnp.clip(value, -largest, largest)
    lower = getattr(support, "lower_bound", None)
    upper = getattr(support, "upper_bound", None)
    if lower is not None:
        value = jnp.maximum(value, _step(jnp.asarray(lower, value.dtype), jnp.inf))
    if upper is not None:
        value = jnp.minimum(value, _step(jnp.asarray(upper, value.dtype), -jnp.inf))
    if support is constraints.simplex:
        return jnp.maximum(value, tiny)
    if isinstance(support, type(constraints.softplus_positive)):
        return jnp.maximum(value, tiny)
    if support in (constraints.lower_cholesky, constraints.softplus_lower_cholesky):
        return _with_positive_diagonal(value)
    if support in (constraints.corr_cholesky, constraints.scaled_unit_lower_cholesky):
        return _with_positive_diagonal(value)
    if support in (constraints.corr_matrix, constraints.positive_definite):
        return _positive_definite(value)
    if support is constraints.ordered_vector:
        return _ordered(value)
    if support is constraints.positive_ordered_vector:
        return _ordered(jnp.maximum(value, tiny))
    return value


def _step(bound: Array, towards: float) -> Array:
    """The next number after a bound. Processors take denormal numbers for zero, so it is none."""
    tiny = jnp.finfo(bound.dtype).tiny
    following = jnp.nextafter(bound, jnp.asarray(towards, bound.dtype))
    return jnp.where(jnp.abs(following) < tiny, jnp.sign(towards) * tiny, following)


def _with_positive_diagonal(matrix: Array) -> Array:
    tiny = jnp.finfo(matrix.dtype).tiny
    is_diagonal = jnp.eye(matrix.shape[-1], dtype=bool)
    return jnp.where(is_diagonal, jnp.maximum(matrix, tiny), matrix)


def _positive_definite(matrix: Array) -> Array:
    """A matrix that has a Cholesky factor: where it has none, the diagonal grows a little."""
    step = 16 * matrix.shape[-1] * jnp.finfo(matrix.dtype).eps
    is_diagonal = jnp.eye(matrix.shape[-1], dtype=bool)
    raised = jnp.where(is_diagonal, matrix * (1 + step), matrix)
    has_factor = jnp.isfinite(jnp.linalg.cholesky(matrix)).all((-1, -2), keepdims=True)
    return jnp.where(has_factor, matrix, raised)


def _ordered(vector: Array) -> Array:
    """A vector whose entries rise: an entry that does not is the next number after the last."""

    def raised(last: Array, entry: Array) -> tuple[Array, Array]:
        entry = jnp.maximum(entry, _step(last, jnp.inf))
        return entry, entry

    first = jnp.full(vector.shape[:-1], jnp.finfo(vector.dtype).min, vector.dtype)
    return jnp.moveaxis(jax.lax.scan(raised, first, jnp.moveaxis(vector, -1, 0))[1], 0, -1)


class _CorrelationFactor(transforms.CorrCholeskyTransform):
    """NumPyro's map to Cholesky factors of correlations, with an inverse that loses no digits.

    A row has the length 1. What an entry and those after it share of that is summed from the end of
    the row. Taken as 1 less the entries before, it would be a difference of near numbers.
    """

    def _inverse(self, y: Array) -> Array:
        left = jnp.sqrt(_sums_after(y * y))
        below = matrix_to_tril_vec(y, -1) / matrix_to_tril_vec(left, -1)
        limit = 1 - jnp.finfo(y.dtype).eps
        return jnp.arctanh(jnp.clip(below, -limit, limit))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """As NumPyro's: of x and the entries of y below the diagonal."""
        left = jnp.log(matrix_to_tril_vec(jnp.roll(_sums_after(y * y), -1, -1), -2))
        from_tanh = x + jax.nn.softplus(-2 * x) - jnp.log(2.0)
        return left.sum(-1) / 2 - 2 * from_tanh.sum(-1)


def _sums_after(squares: Array) -> Array:
    """The sum of each entry of a row and those after it."""
    return jnp.flip(jnp.cumsum(jnp.flip(squares, -1), -1), -1)


def _bijection(support: Any) -> Any:
    if support is constraints.corr_cholesky:
        return _CorrelationFactor()
    if support is constraints.corr_matrix:
        inverse = transforms.CorrMatrixCholeskyTransform().inv
        return transforms.ComposeTransform([_CorrelationFactor(), inverse])
    return biject_to(support)


class Unconstrained(transforms.Transform):
    """The bijection from real numbers to a support, finite at the support's edge.

    Args:
        support: a constraint of ``numpyro.distributions.constraints``.
    """

    def __init__(self, support: Any):
        self.support, self.bijection = support, _bijection(support)

    @property
    def domain(self) -> Any:
        """Real numbers, or vectors of them."""
        return self.bijection.domain

    @property
    def codomain(self) -> Any:
        """The support."""
        return self.support

    def __call__(self, x: Array) -> Array:
        """The value of real numbers."""
        return moved_inside(self.support, self.bijection(x))

    def _inverse(self, y: Array) -> Array:
        return self.bijection._inverse(moved_inside(self.support, y))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """As the bijection's, at the value inside."""
        inside = moved_inside(self.support, y)
        return self.bijection.log_abs_det_jacobian(x, inside, intermediates)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a value, from that of its real numbers."""
        return shape if self.is_elementwise else self.bijection.forward_shape(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the real numbers of a value."""
        return shape if self.is_elementwise else self.bijection.inverse_shape(shape)

    @property
    def is_elementwise(self) -> bool:
        """Whether each entry of a value has one real number. Bounds may be arrays of their own."""
        return without_events(self.support).event_dim == 0

    def tree_flatten(self) -> Any:
        """The arrays, and the rest."""
        return (self.support,), (("support",), {})

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> "Unconstrained":
        """The transform of a support."""
        return cls(*params)
