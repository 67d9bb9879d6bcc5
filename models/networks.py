"""Networks: Flax NNX modules that take and return arrays, and the one way into a program.

``network(name, build)`` puts a network into a NumPyro program. The tree of its parameters is one
``numpyro.param`` site. The start values come from the program's own key, so restarts differ under
``vmap``.

    decoder = network("decoder", lambda rngs: Decoder(20, (500,), (28, 28), rngs=rngs))

The modules take explicit sizes and know nothing of models. They hold parameters and no other state.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Num

from models.conditions import Condition

Activation = Callable[[Array], Array]

SCALE_FLOOR = 1e-4  # the least standard deviation of a guide or a prior


@jax.custom_jvp
def softplus(x: Array) -> Array:
    """log(1 + exp x). Its gradient, the sigmoid, reuses exp(-|x|).

    It is finite and exact to rounding for every x, and cheaper in training than
    ``jax.nn.softplus``.
    """
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    decay = jnp.exp(-jnp.abs(x))
    return jnp.maximum(x, 0) + jnp.log1p(decay), jnp.where(x < 0, decay, 1) / (1 + decay) * dx


def positive(raw: Array) -> Array:
    """Standard deviations from a network's outputs: their softplus plus ``SCALE_FLOOR``."""
    return softplus(raw) + SCALE_FLOOR


def network[Module: nnx.Module](name: str, build: Callable[[nnx.Rngs], Module]) -> Module:
    """The network that ``build`` makes. Its parameters are the site ``name`` of the program.

    Args:
        name: the name of the ``numpyro.param`` site.
        build: a function from Flax's random numbers to a module.

    Raises:
        TypeError: ``build`` returns no module, or the module keeps a state beside its parameters.
            Batch normalisation and dropout keep one.
        ValueError: the program's parameters belong to another network, or it has no parameters and
            no key to make them from.
    """

    def initialise(key: Array | None) -> dict[str, Any]:
        if key is None:
            raise ValueError(
                f"network {name!r}: expected parameters or a random key, got neither; run the "
                f"program in numpyro.handlers.substitute or numpyro.handlers.seed"
            )
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    if not isinstance(abstract, nnx.Module):
        raise TypeError(
            f"network {name!r}: expected a Flax NNX module, got {type(abstract).__name__}; return "
            f"a subclass of flax.nnx.Module"
        )
    graph, params, rest = nnx.split(abstract, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise TypeError(
            f"network {name!r}: expected a module whose only arrays are parameters, got "
            f"{type(abstract).__name__} with {', '.join(map(str, rest))} beside them; leave out "
            f"batch normalisation and dropout (layer normalisation needs no state)"
        )
    weights = numpyro.param(name, initialise)
    expected, got = _shapes(nnx.to_pure_dict(params)), _shapes(weights)
    if expected != got:
        differ = [path for path in expected | got if expected.get(path) != got.get(path)]
        path = differ[0]
        raise ValueError(
            f"network {name!r}: expected {path} of shape {expected.get(path)}, got "
            f"{got.get(path)}, one of {len(differ)} differences; these parameters belong to "
            f"another network, or to several seeds: take one seed, fit.params_of(0)"
        )
    nnx.replace_by_pure_dict(params, weights)
    return nnx.merge(graph, params)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def gates(activation: Activation) -> int:
    """How many numbers an activation takes for each that it gives.

    1 for a function of each number. 2 for a gate, such as ``jax.nn.glu``: it gives the first half
    of its input times the sigmoid of the second (Dauphin et al. 2017, equation 1). A layer in front
    of a gate is twice as wide.

    Raises:
        ValueError: it gives no fraction 1 / k of its numbers.
    """
    inputs = jax.ShapeDtypeStruct((60,), jnp.float32)
    num_outputs = jax.eval_shape(activation, inputs).shape[-1]
    if num_outputs == 0 or 60 % num_outputs:
        raise ValueError(
            f"activation: expected as many numbers as it takes, or a half, a third ... of them, "
            f"got {num_outputs} from 60; give a function of each number, or a gate"
        )
    return 60 // num_outputs


class MLP(nnx.Module):
    """A multilayer perceptron: affine maps with an activation after each but the last.

    Args:
        sizes: the lengths of the input, of each hidden layer and of the output.
        activation: the function of arrays after every hidden layer. After a gate (``gates``) a
            layer has the length of ``sizes``.
        dtype: the type that the layers compute in. Parameters and output are float32.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, dtype: str, *, rngs: nnx.Rngs):
        if any(size < 1 for size in sizes):
            raise ValueError(f"MLP: expected positive sizes, got {tuple(sizes)}")
        width = gates(activation)
        ends = (*(width * size for size in sizes[1:-1]), sizes[-1])
        self.layers = nnx.List(
            nnx.Linear(n, m, dtype=jnp.dtype(dtype), rngs=rngs)
            for n, m in zip(sizes[:-1], ends, strict=True)
        )
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
        """Maps the last axis."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).astype(jnp.float32)


def still(num_inputs: int, num_hidden: int, num_outputs: int, *, rngs: nnx.Rngs) -> MLP:
    """A network of one hidden layer whose output starts at zero.

    Args:
        num_inputs, num_hidden, num_outputs: its sizes.
        rngs: Flax's random numbers.
    """
    mlp = MLP((num_inputs, num_hidden, num_outputs), jnp.tanh, "float32", rngs=rngs)
    last = mlp.layers[-1]
    last.kernel[...] = jnp.zeros_like(last.kernel[...])
    return mlp


class GaussianMLP(nnx.Module):
    """An MLP that returns the location and the scale of a Gaussian.

    Args:
        sizes: the lengths of the input, of each hidden layer and of the location.
        activation, dtype: as in ``MLP``.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, dtype: str, *, rngs: nnx.Rngs):
        self.mlp = MLP((*sizes[:-1], 2 * sizes[-1]), activation, dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*batch n"]
    ) -> tuple[Float[Array, "*batch m"], Float[Array, "*batch m"]]:
        """The location and the standard deviation."""
        loc, raw = jnp.split(self.mlp(x), 2, axis=-1)
        return loc, positive(raw)


class PriorNetwork(nnx.Module):
    """The prior p(z | c): from the condition to ``z_loc`` and ``z_scale``.

    Args:
        condition: the kind of condition.
        hidden: units of the hidden layers, from c to z.
        num_latents: the dimensions of z.
        num_more: how many numbers per datum the network sees beside c.
        activation, dtype: as in ``MLP``.
    """

    def __init__(
        self,
        condition: Condition,
        hidden: Sequence[int],
        num_latents: int,
        *,
        num_more: int = 0,
        activation: Activation = jax.nn.relu,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.features = condition.features(rngs=rngs)
        sizes = (condition.num_features + num_more, *hidden, num_latents)
        self.mlp = GaussianMLP(sizes, activation, dtype, rngs=rngs)

    def __call__(
        self, c: Num[Array, "N ..."], more: Float[Array, "N ..."] | None = None
    ) -> tuple[Float[Array, "N z"], Float[Array, "N z"]]:
        """Location and standard deviation, each (N, num_latents)."""
        features = self.features(c)
        if more is not None:
            features = jnp.concatenate([features, more.reshape(len(more), -1)], axis=-1)
        return self.mlp(features)


# --- the networks of images -----------------------------------------------------------------------


class Decoder(nnx.Module):
    """From z to the likelihood's arrays. The condition enters beside z, if there is one.

    Args:
        num_latents: the dimensions of z.
        hidden: units of the hidden layers, from z to x.
        x_shape: the shape of one x. With convolutions (height, width) or (height, width, channels),
            without them any shape.
        num_outputs: how many arrays of that shape the likelihood takes.
        channels: channels of the convolutions, from x to z. Each doubles the image on its way out.
        condition: the kind of condition, or None.
        activation, dtype: as in ``MLP``.
    """

    def __init__(
        self,
        num_latents: int,
        hidden: Sequence[int],
        x_shape: Sequence[int],
        *,
        num_outputs: int = 1,
        channels: Sequence[int] = (),
        condition: Condition | None = None,
        activation: Activation = jax.nn.relu,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.outputs = (num_outputs, *x_shape)
        self.features = None if condition is None else condition.features(rngs=rngs)
        if channels:
            self.grow = Grow(x_shape, channels, num_outputs, activation, dtype, rngs=rngs)
        else:
            self.grow = None
        num_inputs = num_latents + (0 if condition is None else condition.num_features)
        num_last = math.prod(self.outputs if self.grow is None else self.grow.shape)
        self.mlp = MLP((num_inputs, *hidden, num_last), activation, dtype, rngs=rngs)

    def __call__(
        self, z: Float[Array, "N z"], c: Num[Array, "N ..."] | None = None
    ) -> Float[Array, "N k ..."]:
        """(N, num_outputs, *x_shape)."""
        h = self.mlp(_join(z, c, self.features))
        if self.grow is not None:
            h = self.grow(h)
        return h.reshape(-1, *self.outputs)


class Encoder(nnx.Module):
    """From x to the numbers of a guide. The condition enters beside x, if there is one.

    Args:
        x_shape: the shape of one x. With convolutions (height, width) or (height, width, channels),
            without them any shape.
        hidden: units of the hidden layers, from x to z.
        num_outputs: how many numbers it gives for one datum.
        view: x as the network sees it, a function of arrays. Default: as it is.
        channels: channels of the convolutions, from x to z. Each halves the image.
        condition: the kind of condition, or None.
        activation, dtype: as in ``MLP``.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        hidden: Sequence[int],
        num_outputs: int,
        *,
        view: Callable[[Array], Array] | None = None,
        channels: Sequence[int] = (),
        condition: Condition | None = None,
        activation: Activation = jax.nn.relu,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.x_shape, self.view = tuple(x_shape), view
        self.features = None if condition is None else condition.features(rngs=rngs)
        self.shrink = Shrink(x_shape, channels, activation, dtype, rngs=rngs) if channels else None
        num_inputs = math.prod(_smallest(x_shape, channels) if channels else x_shape)
        num_inputs += 0 if condition is None else condition.num_features
        self.mlp = MLP((num_inputs, *hidden, num_outputs), activation, dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array | np.ndarray, "N ..."], c: Num[Any, "N ..."] | None = None
    ) -> Float[Array, "N k"]:
        """(N, num_outputs)."""
        check_images(x, self.x_shape)
        x = jnp.asarray(x) if self.view is None else self.view(jnp.asarray(x))
        if self.shrink is not None:
            x = self.shrink(x)
        return self.mlp(_join(x.reshape(len(x), -1), c, self.features))


# Convolutions normalise their output over groups of channels (Wu & He 2018). Batch normalisation
# would make a datum's ELBO depend on its batch. Its running averages would also be a state, on
# which the particles of one step disagree.


class Shrink(nnx.Module):
    """Convolutions of stride 2, from an image to its features. Each halves the image.

    Args:
        x_shape: the shape of one image, (height, width) or (height, width, channels).
        channels: channels of the convolutions.
        activation, dtype: as in ``MLP``.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        channels: Sequence[int],
        activation: Activation,
        dtype: str,
        *,
        rngs: nnx.Rngs,
    ):
        self.shape = (*x_shape[:2], math.prod(x_shape[2:]))
        sizes, width = (self.shape[-1], *channels), gates(activation)
        self.layers = nnx.List(
            _conv(n, width * m, 2, dtype, rngs) for n, m in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(_norm(width * m, dtype, rngs) for m in channels)
        self.activation = activation

    def __call__(self, x: Float[Array, "N ..."]) -> Float[Array, "N h w m"]:
        """(N, *x_shape) to (N, height / 2^k, width / 2^k, channels[-1]) for k convolutions."""
        x = x.reshape(-1, *self.shape)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return x.astype(jnp.float32)


class Grow(nnx.Module):
    """The way back: convolutions that turn channels into pixels (Shi et al. 2016, section 3.2).

    Args:
        x_shape: the shape of one image, (height, width) or (height, width, channels).
        channels: channels of the convolutions, from x to z.
        num_outputs: how many images it gives for one datum.
        activation, dtype: as in ``MLP``.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        channels: Sequence[int],
        num_outputs: int,
        activation: Activation,
        dtype: str,
        *,
        rngs: nnx.Rngs,
    ):
        width = gates(activation)
        *sides, num_channels = _smallest(x_shape, channels)
        self.shape = (*sides, width * num_channels)
        self.num_outputs = num_outputs
        num_last = num_outputs * math.prod(x_shape[2:])
        ends = (*(width * size for size in channels[-2::-1]), num_last)
        self.norms = nnx.List(_norm(width * m, dtype, rngs) for m in channels[::-1])
        self.layers = nnx.List(
            _conv(n, 4 * m, 1, dtype, rngs) for n, m in zip(channels[::-1], ends, strict=True)
        )
        self.activation = activation

    def __call__(self, h: Float[Array, "N n"]) -> Float[Array, "N k height width m"]:
        """From features (N, prod(shape)), before an activation, to images.

        They are (N, num_outputs, height, width, channels).
        """
        h = h.reshape(-1, *self.shape)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = layer(self.activation(norm(h)))
            size, height, width, num_channels = h.shape
            h = h.reshape(size, height, width, 2, 2, num_channels // 4)
            h = h.transpose(0, 1, 3, 2, 4, 5).reshape(size, 2 * height, 2 * width, -1)
        h = h.reshape(*h.shape[:-1], self.num_outputs, -1).astype(jnp.float32)
        return jnp.moveaxis(h, 3, 1)


def _conv(num_in: int, num_out: int, stride: int, dtype: str, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        num_in,
        num_out,
        (3, 3),
        strides=stride,
        dtype=jnp.dtype(dtype),
        conv_general_dilated=convolve,
        rngs=rngs,
    )


def convolve(
    x: Array, kernel: Array, window_strides: Sequence[int], padding: Any, **others: Any
) -> Array:
    """Computes ``lax.conv_general_dilated``, on a CPU as one product of matrices.

    The steps of a training are a compiled loop. On a CPU, XLA's own convolutions are about forty
    times slower inside such a loop than outside.

    Args:
        x: (N, height, width, channels in).
        kernel: (3, 3, channels in, channels out).
        window_strides: the strides of both axes.
        padding: "SAME".
        others: as in ``lax.conv_general_dilated``.

    Returns:
        (N, ceil(height / stride), ceil(width / stride), channels out).
    """
    if jax.default_backend() != "cpu":
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **others)
    sides = x.shape[1:3]
    pads = lax.padtype_to_pads(sides, kernel.shape[:2], window_strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    outs = [-(-side // stride) for side, stride in zip(sides, window_strides, strict=True)]
    rows, columns = (
        [slice(i, i + (out - 1) * stride + 1, stride) for i in range(size)]
        for out, stride, size in zip(outs, window_strides, kernel.shape[:2], strict=True)
    )
    patches = jnp.concatenate([x[:, r, c] for r in rows for c in columns], axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


def _norm(num_channels: int, dtype: str, rngs: nnx.Rngs) -> nnx.GroupNorm:
    num_groups = math.gcd(num_channels, 8)
    return nnx.GroupNorm(num_channels, num_groups, dtype=jnp.dtype(dtype), rngs=rngs)


def _smallest(x_shape: Sequence[int], channels: Sequence[int]) -> tuple[int, int, int]:
    """Height, width and channels of the features between convolutions and dense layers."""
    factor = 2 ** len(channels)
    height, width = x_shape[:2]
    return height // factor, width // factor, channels[-1]


def _join(inputs: Array, c: Any, features: Callable[[Array], Array] | None) -> Array:
    if features is None:
        return inputs
    if c is None:
        raise ValueError("c: expected conditions, got none; this model has them")
    return jnp.concatenate([inputs, features(jnp.asarray(c))], axis=-1)


# --- checks ---------------------------------------------------------------------------------------


def check_sizes(
    x_shape: Sequence[int],
    channels: Sequence[int],
    dtype: str,
    **sizes: int | Sequence[int] | None,
) -> None:
    """Refuses sizes that make no network of images or vectors.

    Args:
        x_shape: the shape of one image, or (D,).
        channels: channels of the convolutions.
        dtype: the type that the networks compute in.
        sizes: more sizes by name, for example ``num_latents`` and ``hidden``. None is left alone.

    Raises:
        ValueError: a size is not positive, an x has not one, two or three axes, the convolutions
            cannot halve it, or the type is not "float32" or "bfloat16".
    """
    for name, size in {"x_shape": x_shape, **sizes, "channels": channels}.items():
        several = (size,) if isinstance(size, int) else size or ()
        if any(n < 1 for n in several):
            raise ValueError(f"{name}: expected positive sizes, got {size}")
    if len(x_shape) not in (1, 2, 3):
        raise ValueError(
            f"x_shape: expected (height, width) or (height, width, channels) for images, or (D,) "
            f"for vectors, got {x_shape}"
        )
    if len(x_shape) == 1 and channels:
        raise ValueError(
            f"channels: expected none for vectors of {x_shape[0]} numbers, got {tuple(channels)}; "
            f"convolutions are for images"
        )
    factor = 2 ** len(channels)
    if any(side % factor for side in x_shape[:2]):
        raise ValueError(
            f"x_shape: expected sides that {factor} divides, for {len(channels)} convolutions that "
            f"halve them, got {x_shape}; give fewer channels, or crop or pad the images"
        )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype: expected "float32" or "bfloat16", got {dtype!r}')


def check_at_least(least: int, config: Any, *names: str) -> None:
    """Raises ValueError if one of the fields ``names``, or a number in it, is below ``least``."""
    for name in names:
        value = getattr(config, name)
        several = value if isinstance(value, tuple) else (value,)
        if any(n < least for n in several):
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_shape(x: Any, x_shape: Sequence[int], field: str = "x_shape") -> None:
    """Refuses data of another shape.

    Args:
        x: an array of shape (N, *x_shape).
        x_shape: the shape of one datum.
        field: the name of that shape in a model's configuration.

    Raises:
        ValueError: another shape.
    """
    if x.ndim == 0 or x.shape[1:] != tuple(x_shape):
        expected = ", ".join(map(str, ("N", *x_shape)))
        raise ValueError(
            f"x: expected shape ({expected}), got {x.shape}; reshape x, or set "
            f"{field}={tuple(x.shape[1:])}"
        )


def check_images(x: Any, x_shape: Sequence[int]) -> None:
    """Refuses arrays that a program cannot take as observations. It looks at no value.

    Args:
        x: an array of shape (N, *x_shape), or None.
        x_shape: the shape of one datum.

    Raises:
        ValueError: another shape, or a type that is not floating.
    """
    if x is None:
        return
    check_shape(x, x_shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x: expected floats, got {x.dtype}; make them by the model's prepare(key, batch), as "
            f"fit(..., preprocess=model.prepare) does"
        )
