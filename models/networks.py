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
from jaxtyping import Array, Float, Num

Activation = Callable[[Array], Array]

SCALE_FLOOR = 1e-4  # of a guide's or a prior's standard deviation


def network[Module: nnx.Module](name: str, build: Callable[[nnx.Rngs], Module]) -> Module:
    """The network that ``build`` makes, its parameters the site ``name`` of the program.

    Args:
        name: of the ``numpyro.param`` site.
        build: from Flax's random numbers to a module.

    Raises:
        TypeError: the module keeps a state beside its parameters, as batch normalisation and
            dropout do.
    """

    def initialise(key: Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, params, rest = nnx.split(abstract, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise TypeError(
            f"network {name!r}: expected a module whose only arrays are parameters, got "
            f"{type(abstract).__name__} with {', '.join(map(str, rest))} beside them; leave out "
            f"batch normalisation and dropout (layer normalisation needs no state)"
        )
    nnx.replace_by_pure_dict(params, numpyro.param(name, initialise))
    return nnx.merge(graph, params)


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
        """The location, and the standard deviation: a softplus plus ``SCALE_FLOOR``."""
        loc, raw = jnp.split(self.mlp(x), 2, axis=-1)
        return loc, jax.nn.softplus(raw) + SCALE_FLOOR


# --- the networks of images -----------------------------------------------------------------------
#
# Each is made from the configuration of a model: ``models.vae.Model``, ``models.cvae.Model``.


class Decoder(nnx.Module):
    """From z, and the condition if there is one, to the likelihood's arrays."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.outputs = (config.likelihood.num_outputs, *config.x_shape)
        self.features = _features(config, rngs)
        sizes = (
            config.num_latents + _num_features(config),
            *config.hidden,
            math.prod(self.outputs),
        )
        self.mlp = MLP(sizes, config.activation, config.dtype, rngs=rngs)

    def __call__(
        self, z: Float[Array, "N z"], c: Num[Array, "N ..."] | None = None
    ) -> Float[Array, "N k ..."]:
        """(N, num_outputs, *x_shape)."""
        return self.mlp(_join(z, c, self.features)).reshape(-1, *self.outputs)


class Encoder(nnx.Module):
    """From x, and the condition if there is one, to ``z_loc`` and ``z_scale``."""

    def __init__(self, config: Any, hidden: Sequence[int], *, rngs: nnx.Rngs):
        low, high = config.likelihood.low, config.likelihood.high
        self.shift, self.stretch = low, 1 / (high - low)
        self.features = _features(config, rngs)
        num_inputs = math.prod(config.x_shape) + _num_features(config)
        sizes = (num_inputs, *hidden, config.num_latents)
        self.mlp = GaussianMLP(sizes, config.activation, config.dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "N ..."], c: Num[Array, "N ..."] | None = None
    ) -> tuple[Float[Array, "N z"], Float[Array, "N z"]]:
        """Each (N, num_latents)."""
        x = (x.reshape(len(x), -1) - self.shift) * self.stretch
        return self.mlp(_join(x, c, self.features))


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
    return jnp.concatenate([inputs, features(c)], axis=-1)


def check_sizes(config: Any) -> None:
    """Raises ValueError for a model's configuration with sizes that make no network."""
    hidden = config.hidden + (getattr(config, "prior_hidden", None) or ())
    for name, sizes in (
        ("x_shape", config.x_shape),
        ("num_latents", (config.num_latents,)),
        ("hidden", hidden),
    ):
        if any(size < 1 for size in sizes):
            raise ValueError(f"{name}: expected positive sizes, got {getattr(config, name)}")
    if len(config.x_shape) not in (2, 3):
        raise ValueError(
            f"x_shape: expected (height, width) or (height, width, channels), got {config.x_shape}"
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
