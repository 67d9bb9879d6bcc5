"""Networks: Flax NNX modules that take and return arrays, and the one way into a program.

A network inside a NumPyro program is one ``numpyro.param`` site whose value is the tree of its
parameters. It is made from the program's own key, so that restarts differ under ``vmap``.

    decoder = network("decoder", lambda rngs: Decoder(..., rngs=rngs))
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Num

Activation = Callable[[Array], Array]

SCALE_FLOOR = 1e-4  # of a guide's or a prior's standard deviation


def positive(raw: Array) -> Array:
    """A network's outputs as standard deviations: their softplus plus ``SCALE_FLOOR``."""
    return jax.nn.softplus(raw) + SCALE_FLOOR


def network[Module: nnx.Module](name: str, build: Callable[[nnx.Rngs], Module]) -> Module:
    """The network that ``build`` makes, its parameters the site ``name`` of the program.

    Args:
        name: of the ``numpyro.param`` site.
        build: from Flax's random numbers to a module.

    Raises:
        TypeError: the module keeps a state beside its parameters, as batch normalisation and
            dropout do.
        ValueError: the parameters given to the program are not this network's, or none are given
            and there is no key to make them from.
    """

    def initialise(key: Array | None) -> dict[str, Any]:
        if key is None:
            raise ValueError(
                f"network {name!r}: expected parameters or a random key, got neither; run the "
                f"program in numpyro.handlers.substitute or numpyro.handlers.seed"
            )
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
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
            f"{got.get(path)}, one of {len(differ)} differences; these parameters are those of "
            f"another network, or of several seeds: take one, jax.tree.map(lambda p: p[0], params)"
        )
    nnx.replace_by_pure_dict(params, weights)
    return nnx.merge(graph, params)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


class MLP(nnx.Module):
    """Affine maps with an activation after each but the last.

    Args:
        sizes: of the input, of each hidden layer and of the output.
        activation: after every hidden layer.
        dtype: in which the layers compute. Parameters and output are float32.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, dtype: str, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(n, m, dtype=jnp.dtype(dtype), rngs=rngs)
            for n, m in itertools.pairwise(sizes)
        )
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
        """Maps the last axis."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).astype(jnp.float32)


class GaussianMLP(nnx.Module):
    """An MLP whose output is the location and the scale of a Gaussian.

    Args:
        sizes: of the input, of each hidden layer and of the location.
        activation, dtype: as in ``MLP``.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, dtype: str, *, rngs: nnx.Rngs):
        self.mlp = MLP((*sizes[:-1], 2 * sizes[-1]), activation, dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*batch n"]
    ) -> tuple[Float[Array, "*batch m"], Float[Array, "*batch m"]]:
        """The location, and the standard deviation."""
        loc, raw = jnp.split(self.mlp(x), 2, axis=-1)
        return loc, positive(raw)


# --- the networks of images -----------------------------------------------------------------------
#
# Each is made from the configuration of a model: ``models.vae.Model``, ``models.cvae.Model``.


class Decoder(nnx.Module):
    """From z, and the condition if there is one, to the likelihood's arrays."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.outputs = (config.likelihood.num_outputs, *config.x_shape)
        self.features = _features(config, rngs)
        self.grow = Grow(config, rngs=rngs) if config.channels else None
        num_outputs = math.prod(_smallest(config)) if config.channels else math.prod(self.outputs)
        sizes = (config.num_latents + _num_features(config), *config.hidden, num_outputs)
        self.mlp = MLP(sizes, config.activation, config.dtype, rngs=rngs)

    def __call__(
        self, z: Float[Array, "N z"], c: Num[Array, "N ..."] | None = None
    ) -> Float[Array, "N k ..."]:
        """(N, num_outputs, *x_shape)."""
        h = self.mlp(_join(z, c, self.features))
        if self.grow is not None:
            h = self.grow(h)
        return h.reshape(-1, *self.outputs)


class Encoder(nnx.Module):
    """From x, and the condition if there is one, to the numbers of a guide.

    Args:
        config: of any model with an ``x_shape``; what else it has of ``condition``, ``channels``,
            ``activation``, ``dtype`` and ``likelihood``, which scales x, is used.
        hidden: units of the hidden layers, from x to z.
        num_outputs: numbers of one datum.
    """

    def __init__(self, config: Any, hidden: Sequence[int], num_outputs: int, *, rngs: nnx.Rngs):
        likelihood = getattr(config, "likelihood", None)
        low, high = (likelihood.low, likelihood.high) if likelihood else (0.0, 1.0)
        self.shift, self.stretch = low, 1 / (high - low)
        self.features = _features(config, rngs)
        convolutional = getattr(config, "channels", ())
        self.shrink = Shrink(config, rngs=rngs) if convolutional else None
        num_inputs = math.prod(_smallest(config) if convolutional else config.x_shape)
        sizes = (num_inputs + _num_features(config), *hidden, num_outputs)
        activation = getattr(config, "activation", jax.nn.relu)
        self.mlp = MLP(sizes, activation, getattr(config, "dtype", "float32"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "N ..."], c: Num[Array, "N ..."] | None = None
    ) -> Float[Array, "N k"]:
        """(N, num_outputs)."""
        x = (x - self.shift) * self.stretch
        if self.shrink is not None:
            x = self.shrink(x)
        return self.mlp(_join(x.reshape(len(x), -1), c, self.features))


# Convolutions normalise their output over groups of channels (Wu & He 2018). Batch normalisation
# would make a datum's ELBO depend on its batch, and its running averages would be a state that the
# particles of one step disagree on: it has no place in a program.


class Shrink(nnx.Module):
    """Convolutions of stride 2, each halving the image, from an image to its features."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.shape = (*config.x_shape[:2], _num_channels(config))
        sizes = (self.shape[-1], *config.channels)
        self.layers = nnx.List(
            _conv(n, m, 2, config.dtype, rngs) for n, m in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(_norm(m, config.dtype, rngs) for m in config.channels)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "N ..."]) -> Float[Array, "N h w m"]:
        """(N, *x_shape) to (N, height / 2^k, width / 2^k, channels[-1])."""
        x = x.reshape(-1, *self.shape)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return x.astype(jnp.float32)


class Grow(nnx.Module):
    """The way back: convolutions whose channels become pixels (Shi et al. 2016, section 3.2)."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.shape = _smallest(config)
        self.num_outputs = config.likelihood.num_outputs
        sizes = (*config.channels[::-1], self.num_outputs * _num_channels(config))
        self.norms = nnx.List(_norm(m, config.dtype, rngs) for m in sizes[:-1])
        self.layers = nnx.List(
            _conv(n, 4 * m, 1, config.dtype, rngs) for n, m in itertools.pairwise(sizes)
        )
        self.activation = config.activation

    def __call__(self, h: Float[Array, "N n"]) -> Float[Array, "N k height width m"]:
        """Features (N, h * w * channels[-1]) to (N, num_outputs, height, width, channels)."""
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
    """``lax.conv_general_dilated``, on a CPU as one product of matrices.

    In a compiled loop, where ``fit`` has its steps, XLA's own convolutions on a CPU are some
    forty times slower than outside of it.

    Args:
        x: (N, height, width, channels in).
        kernel: (3, 3, channels in, channels out).
        window_strides: of both axes.
        padding: "SAME".
        others: as in ``lax.conv_general_dilated``.
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


def _num_channels(config: Any) -> int:
    return math.prod(config.x_shape[2:])


def _smallest(config: Any) -> tuple[int, int, int]:
    """Height, width and channels of the features between convolutions and dense layers."""
    factor = 2 ** len(config.channels)
    height, width = config.x_shape[:2]
    return height // factor, width // factor, config.channels[-1]


class PriorNetwork(nnx.Module):
    """From the condition to ``z_loc`` and ``z_scale``."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.features = config.condition.features(rngs=rngs)
        sizes = (config.condition.num_features, *config.prior_hidden, config.num_latents)
        self.mlp = GaussianMLP(sizes, config.activation, config.dtype, rngs=rngs)

    def __call__(self, c: Num[Array, "N ..."]) -> tuple[Float[Array, "N z"], Float[Array, "N z"]]:
        """Each (N, num_latents)."""
        return self.mlp(self.features(c))


def _features(config: Any, rngs: nnx.Rngs) -> Callable[[Array], Array] | None:
    condition = getattr(config, "condition", None)
    return condition and condition.features(rngs=rngs)


def _num_features(config: Any) -> int:
    condition = getattr(config, "condition", None)
    return condition.num_features if condition else 0


def _join(inputs: Array, c: Any, features: Callable[[Array], Array] | None) -> Array:
    if features is None:
        return inputs
    if c is None:
        raise ValueError("c: expected conditions, got none; this model has them")
    return jnp.concatenate([inputs, features(c)], axis=-1)


def check_sizes(config: Any) -> None:
    """Raises ValueError for a model's configuration with sizes that make no network."""
    for name, sizes in (
        ("x_shape", config.x_shape),
        ("num_latents", (getattr(config, "num_latents", 1),)),
        ("hidden", config.hidden),
        ("prior_hidden", getattr(config, "prior_hidden", None) or ()),
        ("channels", config.channels),
    ):
        if any(size < 1 for size in sizes):
            raise ValueError(f"{name}: expected positive sizes, got {getattr(config, name)}")
    if len(config.x_shape) not in (2, 3):
        raise ValueError(
            f"x_shape: expected (height, width) or (height, width, channels), got {config.x_shape}"
        )
    factor = 2 ** len(config.channels)
    if any(side % factor for side in config.x_shape[:2]):
        raise ValueError(
            f"x_shape: expected sides that {factor} divides, for {len(config.channels)} "
            f"convolutions that halve them, got {config.x_shape}; give fewer channels, or crop or "
            f"pad the images"
        )
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype: expected "float32" or "bfloat16", got {config.dtype!r}')


def check_images(x: Any, x_shape: tuple[int, ...]) -> None:
    """Raises ValueError for images that a model cannot take as observations."""
    if x is not None and (x.shape[1:] != x_shape or not jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(
            f"x: expected floats of shape (N, {', '.join(map(str, x_shape))}), got {x.dtype} of "
            f"shape {x.shape}; pass grey images through the likelihood's prepare(key, images), and "
            f"give the model their x_shape"
        )
