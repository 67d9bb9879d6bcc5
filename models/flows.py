"""The maps of flows: real vectors to real vectors, each of them a function of a context.

| map                | y of a vector x, given the context h                                     |
|--------------------|--------------------------------------------------------------------------|
| ``AffineCoupling`` | x_i exp(s_i) + t_i with s and t of the kept half and h                   |
| ``SplineCoupling`` | a monotone spline of x_i, its bins and slopes of the kept half and h     |
| ``Autoregressive`` | x_i exp(s_i) + t_i with s_i and t_i of the dimensions before i and h     |

The context has shape (*batch, num_context) and broadcasts with x both ways. So a map of batch (K,)
takes x of shape (N, 1, D) to (N, K, D). The arrays of a map are the leaves of its pytree: its
network's parameters and its context.

``Stack`` holds the networks of several maps. Their last layers start at zero, and then every map
is the identity.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float
from numpyro.distributions import constraints, flows, transforms

from models.networks import MLP, softplus, still

BOUND = 4.0  # a spline moves the numbers between -BOUND and BOUND
LEAST_BIN = 0.01  # the least width and height of a bin, in parts of an equal bin
LEAST_SLOPE = 1e-3
UNIT_SLOPE = math.log(math.expm1(1 - LEAST_SLOPE))  # softplus(UNIT_SLOPE) + LEAST_SLOPE = 1


class Stack(nnx.Module):
    """The networks of the maps of one flow.

    Args:
        layers: a network for each map, the first map first.
    """

    def __init__(self, layers: Iterable[nnx.Module]):
        self.layers = nnx.List(layers)


class Conditional(transforms.Transform):
    """A map of real vectors that depends on a context.

    Attributes:
        context: numbers for each datum, (*batch, num_context).
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    context: Array

    def with_context(self, x: Float[Array, "*batch n"]) -> Float[Array, "*all m"]:
        """x and the context in one vector."""
        batch = jnp.broadcast_shapes(x.shape[:-1], self.context.shape[:-1])
        parts = [jnp.broadcast_to(a, (*batch, a.shape[-1])) for a in (x, self.context)]
        return jnp.concatenate(parts, axis=-1)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of y, from that of x."""
        return (*jnp.broadcast_shapes(shape[:-1], self.context.shape[:-1]), shape[-1])

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of x, from that of y."""
        return self.forward_shape(shape)


def _bounded(s: Array) -> Array:
    """The logarithm of a scale: between -2 and 2, and near s for small s."""
    return 2 * jnp.tanh(s / 2)


def _outputs(mlp: Any, inputs: Array, masks: Iterable[Any] = (1, 1)) -> Array:
    """The outputs of a network of one hidden layer, of those connections that the masks keep.

    They have the type of the inputs or of the parameters, whichever is wider. So with 64 bits an
    inverse is exact to the rounding of 64 bits, though the parameters have 32.
    """
    first, last = (
        (layer.kernel * mask, layer.bias) for layer, mask in zip(mlp.layers, masks, strict=True)
    )
    hidden = mlp.activation(inputs @ first[0] + first[1])
    return hidden @ last[0] + last[1]


# --- couplings ------------------------------------------------------------------------------------


class Coupling(Conditional):
    """A map that keeps some dimensions of x. The others move, each by a map of one number.

    These maps are functions of the kept dimensions and of the context.

    Args:
        mlp: a network from x and the context to the numbers of the maps. It sees zeros in place of
            the moved dimensions. It gives as many numbers for each dimension, the kept ones too.
        context: numbers for each datum, (*batch, num_context).
        kept: for each dimension, whether it stays.
    """

    def __init__(self, mlp: MLP, context: Array, kept: tuple[bool, ...]):
        self.mlp, self.context, self.kept = mlp, context, kept

    def move(self, x: Array, numbers: Array) -> tuple[Array, Array]:
        """y and log dy/dx of each dimension, from x and the network's output."""
        raise NotImplementedError

    def move_back(self, y: Array, numbers: Array) -> Array:
        """x from y, dimension by dimension."""
        raise NotImplementedError

    def numbers(self, x: Array) -> Array:
        """The network's output."""
        return _outputs(self.mlp, self.with_context(jnp.where(np.array(self.kept), x, 0.0)))

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """y and the log-determinant."""
        y, log_slope = self.move(x, self.numbers(x))
        kept = np.array(self.kept)
        return jnp.where(kept, x, y), jnp.where(kept, 0.0, log_slope).sum(-1)

    def __call__(self, x: Array) -> Array:
        """y from x, (..., dimensions)."""
        return self.call_with_intermediates(x)[0]

    def _inverse(self, y: Array) -> Array:
        return jnp.where(np.array(self.kept), y, self.move_back(y, self.numbers(y)))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """The sum of log dy/dx over the moved dimensions."""
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def tree_flatten(self) -> Any:
        """The arrays, and the rest."""
        return (self.mlp, self.context), (("mlp", "context"), {"kept": self.kept})


def every_other(layer: int, size: int) -> tuple[bool, ...]:
    """What a coupling keeps: the even dimensions of ``size`` if ``layer`` is even, or the odd."""
    return tuple(dim % 2 == layer % 2 for dim in range(size))


class AffineCoupling(Coupling):
    """The coupling y = x exp(s) + t. The scale exp(s) stays between e^-2 and e^2.

    Dinh, Sohl-Dickstein & Bengio 2017, equation 4. The network gives s of all dimensions, then t.
    """

    def move(self, x: Array, numbers: Array) -> tuple[Array, Array]:
        """y and s."""
        s, t = self.maps(numbers)
        return x * jnp.exp(s) + t, s

    def move_back(self, y: Array, numbers: Array) -> Array:
        """(y - t) exp(-s)."""
        s, t = self.maps(numbers)
        return (y - t) * jnp.exp(-s)

    def maps(self, numbers: Array) -> tuple[Array, Array]:
        """s and t."""
        s, t = jnp.split(numbers, 2, axis=-1)
        return _bounded(s), t


class SplineCoupling(Coupling):
    """The coupling whose maps are ``Splines``. The network gives 3 K - 1 numbers a dimension."""

    def move(self, x: Array, numbers: Array) -> tuple[Array, Array]:
        """y and the logarithm of the spline's slope."""
        return self.splines(numbers)(x)

    def move_back(self, y: Array, numbers: Array) -> Array:
        """The inverse of the splines."""
        return self.splines(numbers).inverse(y)

    def splines(self, numbers: Array) -> "Splines":
        """A spline for each dimension."""
        return Splines(numbers.reshape(*numbers.shape[:-1], len(self.kept), -1))


class Splines:
    """Monotone splines of K bins, each bin a quotient of two quadratics. The identity at zero.

    Gregory & Delbourgo 1982; Durkan et al. 2019, section 3.1. A spline goes from -``BOUND`` to
    ``BOUND``. Outside it is the identity. Its slope is continuous, and 1 at both ends.

    Args:
        numbers: for the widths, for the heights and for the K - 1 inner slopes,
            (..., dimensions, 3 K - 1).
    """

    def __init__(self, numbers: Float[Array, "*batch dims n"]):
        self.num_bins = (numbers.shape[-1] + 1) // 3
        ends = (self.num_bins, 2 * self.num_bins)
        widths, heights, slopes = jnp.split(numbers, ends, axis=-1)
        self.x, self.y = _knots(widths), _knots(heights)
        slopes = softplus(slopes + UNIT_SLOPE) + LEAST_SLOPE
        pad = [(0, 0)] * (slopes.ndim - 1) + [(1, 1)]
        self.slopes = jnp.pad(slopes, pad, constant_values=1.0)

    def __call__(self, x: Float[Array, "*batch dims"]) -> tuple[Array, Array]:
        """y, and the logarithm of dy/dx.

        Durkan et al. 2019, equations 4 and 5. For an x outside, the spline is computed at 0. So no
        gradient is NaN.
        """
        is_inside, inside = _inside(x)
        x_low, width, y_low, height, low, high = self._bin(inside, self.x)
        slope, part = height / width, (inside - x_low) / width
        both = part * (1 - part)
        below = slope + (low + high - 2 * slope) * both
        y = y_low + height * (slope * part**2 + low * both) / below
        above = high * part**2 + 2 * slope * both + low * (1 - part) ** 2
        log_slope = 2 * jnp.log(slope) + jnp.log(above) - 2 * jnp.log(below)
        return jnp.where(is_inside, y, x), jnp.where(is_inside, log_slope, 0.0)

    def inverse(self, y: Float[Array, "*batch dims"]) -> Array:
        """x from y: in a bin, the root of a x^2 + b x = c between 0 and 1.

        Durkan et al. 2019, appendix A. Here b^2 + 4 a c is a sum of positive terms, so rounding
        cannot make it negative. The root has two forms, and we take the one without cancellation.
        """
        is_inside, inside = _inside(y)
        x_low, width, y_low, height, low, high = self._bin(inside, self.y)
        slope, part = height / width, (inside - y_low) / height
        b = low - part * (low + high - 2 * slope)
        a, c = slope - b, slope * part
        square = jnp.where(a < 0, (slope + a) ** 2 - 4 * a * slope * (1 - part), b**2 + 4 * a * c)
        root = jnp.sqrt(square)
        falls = b < 0  # then a is at least the slope
        small = 2 * c / (jnp.where(falls, 1.0, b) + root)
        large = (root - b) / (2 * jnp.where(falls, a, 1.0))
        x = x_low + width * jnp.where(falls, large, small)
        return jnp.where(is_inside, x, y)

    def _bin(self, value: Array, knots: Array) -> tuple[Array, ...]:
        """Of the bin that a value is in: start and width, start and height, both slopes."""
        index = (value[..., None] >= knots[..., 1:-1]).sum(-1)
        chosen = jax.nn.one_hot(index, self.num_bins, dtype=value.dtype)

        def ends(edges: Array) -> tuple[Array, Array]:
            return (edges[..., :-1] * chosen).sum(-1), (edges[..., 1:] * chosen).sum(-1)

        (x_low, x_high), (y_low, y_high), slopes = map(ends, (self.x, self.y, self.slopes))
        return x_low, x_high - x_low, y_low, y_high - y_low, *slopes


def _knots(logits: Float[Array, "*batch K"]) -> Float[Array, "*batch K+1"]:
    """From -BOUND to BOUND, in steps by a softmax."""
    num_bins = logits.shape[-1]
    parts = (1 - LEAST_BIN) * jax.nn.softmax(logits, axis=-1) + LEAST_BIN / num_bins
    inner = 2 * BOUND * jnp.cumsum(parts[..., :-1], axis=-1) - BOUND
    pad = [(0, 0)] * (logits.ndim - 1)
    inner = jnp.pad(inner, [*pad, (1, 0)], constant_values=-BOUND)
    return jnp.pad(inner, [*pad, (0, 1)], constant_values=BOUND)


def _inside(value: Array) -> tuple[Bool[Array, "*batch dims"], Array]:
    """Where a spline moves a value, and the value there. It is 0 elsewhere."""
    is_inside = jnp.abs(value) < BOUND
    return is_inside, jnp.where(is_inside, value, 0.0)


# --- autoregressive maps --------------------------------------------------------------------------


class Made(nnx.Module):
    """An autoregressive network: the outputs for a dimension depend on those before it.

    Germain et al. 2015, section 4, with direct connections from inputs to outputs. By these a
    dimension sees all dimensions before it, even if there are few hidden units. The context
    enters without a mask. So the first dimension depends on the context alone. The masks are no
    parameters: they follow from the sizes.

    Args:
        size: the dimensions of x.
        num_context: numbers of context for one datum.
        num_hidden: units of the one hidden layer.
        is_reversed: whether the last dimension comes first.
    """

    def __init__(
        self,
        size: int,
        num_context: int,
        num_hidden: int,
        is_reversed: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.size, self.num_hidden, self.is_reversed = size, num_hidden, is_reversed
        self.mlp = still(size + num_context, num_hidden, 2 * size, rngs=rngs)
        self.direct = nnx.Param(jnp.zeros((size, 2 * size), jnp.float32))

    def masks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which connections there are: inputs to hidden units, these to outputs, and direct ones.

        Dimension i of D, by its place in the order, is seen by hidden units of a degree of at least
        i = 1, ..., D. It sees those of a degree below i. Degrees go from 0, the context alone, to
        D - 1.
        """
        places = np.arange(1, self.size + 1)
        places = places[::-1] if self.is_reversed else places
        degrees = np.arange(self.num_hidden) * self.size // self.num_hidden
        outputs = np.tile(places, 2)
        return (
            places[:, None] <= degrees,
            degrees[:, None] < outputs,
            places[:, None] < outputs,
        )

    def __call__(self, inputs: Float[Array, "*batch n"]) -> tuple[Array, Array]:
        """Location and logarithm of the scale for each dimension, from x with its context."""
        to_hidden, to_outputs, direct = self.masks()
        num_context = inputs.shape[-1] - self.size
        to_hidden = np.pad(to_hidden, [(0, num_context), (0, 0)], constant_values=True)
        outputs = _outputs(self.mlp, inputs, (to_hidden, to_outputs))
        outputs += inputs[..., : self.size] @ (self.direct * direct)
        loc, s = jnp.split(outputs, 2, axis=-1)
        return loc, _bounded(s)


class Autoregressive(Conditional, flows.InverseAutoregressiveTransform):
    """The map y_i = loc_i + scale_i x_i. Both are functions of the x before i, and of the context.

    Kingma et al. 2016, equation 10, by NumPyro's transform. The scale stays between e^-2 and e^2.
    One pass of the network maps x. The inverse takes as many passes as x has dimensions.

    Args:
        made: the network.
        context: numbers for each datum, (*batch, num_context).
    """

    # NumPyro clips the logarithm of the scale. Ours is bounded already.
    log_scale_min_clip = -2.0
    log_scale_max_clip = 2.0

    def __init__(self, made: Made, context: Array):
        self.made, self.context = made, context

    def arn(self, x: Array) -> tuple[Array, Array]:
        """Location and logarithm of the scale. NumPyro's transform calls it by this name."""
        return self.made(self.with_context(x))

    def _inverse(self, y: Array) -> Array:
        return super()._inverse(jnp.broadcast_to(y, self.inverse_shape(y.shape)))

    def eq(self, other: object, static: bool = False) -> Any:
        """Whether it is the same object."""
        return self is other

    def tree_flatten(self) -> Any:
        """The arrays. NumPyro takes the network for a constant, but ours holds traced arrays."""
        return (self.made, self.context), (("made", "context"), {})
