"""Structured output: the missing quadrants of an image given the others (Sohn, Lee & Yan 2015).

The paper writes x -> y for our c -> x: what it calls the input x is our condition c, and its output
y is our x. An image is cut into quarters; c holds one, two or three of them, x the rest. The pixels
of x are binary, drawn anew at every step of a training with the grey level as their probability;
those of c are grey or, with ``binary_c``, cut from the same binarised image as x. The baseline
network guesses x from c alone, one probability for each pixel,

    x | c     ~  Bernoulli(logits = baseline(c))                              the baseline

and the conditional VAE lets a latent vector z choose among the ways to go on from c:

    g         =  sigmoid(baseline(c))                                         the baseline's guess
    z | c     ~  Normal(z_loc(c, g), z_scale(c, g)^2)                         the prior p(z | c)
    x | z, c  ~  Bernoulli(logits = baseline(c) + decoder(z))                 p(x | z, c)
    z | x, c  ~  Normal(z_loc(x, c), z_scale(x, c)^2)                         the guide q(z | x, c)

The guide is ``guides.mean_field``, which factorises over the dimensions of z. In section 4 of the
paper a stochastic network without recognition, the GSNN, is trained on draws from the prior: that
is the ELBO whose guide is the prior itself, ``guides.prior``,

    E_{p(z | c)} [ log p(x | z, c) ],

and ``inference.Hybrid(alpha)`` is the paper's mixture of both objectives. Likewise for the judges:
``inference.log_likelihood`` with the prior as guide is the paper's Monte Carlo estimate of
log p(x | c), and with the recognition network as guide it is importance sampling.

The decoder sees c through the baseline's logits alone, unless ``decoder_sees_c``. The paper does
not say how pixels were binarised. Its table suggests a grey c: given one binary quadrant our
baseline is more than four nats worse than the paper's, given a grey one about as good.

| on paper (theirs)          | in code                          | what it is                       |
|----------------------------|----------------------------------|----------------------------------|
| x                          | ``c``, (N, h, w, k)              | the k observed quadrants         |
| y                          | ``x``, (N, h, w, 4 - k)          | the missing quadrants            |
| z                          | ``z``, (N, num_latents)          | latent vectors                   |
| baseline NN                | param ``baseline``               | the weights of the baseline      |
| prior network p(z | x)     | param ``prior``                  | from c and the guess to z        |
| generation p(y | x, z)     | param ``decoder``                | from z to logits                 |
| recognition q(z | x, y)    | param ``encoder``, of the guide  | from x and c to z                |

    from models import guides, structured

    model = structured.PRESETS["small"]
    guide = guides.mean_field(model)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Float, Num

from models import vae
from models.conditions import Values
from models.likelihoods import Bernoulli, grey
from models.networks import (
    MLP,
    Activation,
    Decoder,
    GaussianMLP,
    check_images,
    check_sizes,
    network,
)

# --- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadrants:
    """How an image is cut. Quarters are the last axis, in the order in which they are observed:
    bottom left, top left, top right, bottom right.

    Attributes:
        num_observed: 1 for the bottom left, 2 for the left half, 3 for all but the bottom right.
        image_shape: (height, width), both even.

    Raises:
        ValueError: another number of quadrants, or sides that two does not divide.
    """

    num_observed: int = 1
    image_shape: tuple[int, ...] = (28, 28)

    def __post_init__(self):
        if self.num_observed not in (1, 2, 3):
            raise ValueError(f"num_observed: expected 1, 2 or 3, got {self.num_observed}")
        if len(self.image_shape) != 2 or any(side < 2 or side % 2 for side in self.image_shape):
            raise ValueError(
                f"image_shape: expected (height, width), both even, to cut into quarters, got "
                f"{self.image_shape}; crop or pad the images, and take one channel of colour ones"
            )

    @property
    def c_shape(self) -> tuple[int, int, int]:
        """Of the observed quadrants: (height / 2, width / 2, num_observed)."""
        height, width = self.image_shape
        return height // 2, width // 2, self.num_observed

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Of the missing quadrants: (height / 2, width / 2, 4 - num_observed)."""
        return (*self.c_shape[:2], 4 - self.num_observed)

    def split(
        self, images: Num[Any, "N height width"]
    ) -> tuple[Num[Array, "N h w k"], Num[Array, "N h w m"]]:
        """The observed and the missing quadrants of images.

        Raises:
            ValueError: images of another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images: expected shape (N, {', '.join(map(str, self.image_shape))}), got "
                f"{images.shape}; give Quadrants their image_shape"
            )
        h, w = self.c_shape[:2]
        top, bottom = images[:, :h], images[:, h:]
        parts = (bottom[..., :w], top[..., :w], top[..., w:], bottom[..., w:])
        quarters = jnp.stack(parts, axis=-1)
        return quarters[..., : self.num_observed], quarters[..., self.num_observed :]

    def merge(self, c: Num[Any, "N h w k"], x: Num[Any, "N h w m"]) -> Num[Array, "N height width"]:
        """The images whose observed and missing quadrants are ``c`` and ``x``."""
        quarters = jnp.concatenate([c, x], axis=-1)
        bottom_left, top_left, top_right, bottom_right = jnp.moveaxis(quarters, -1, 0)
        top = jnp.concatenate([top_left, top_right], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([bottom_left, bottom_right], -1)], axis=-2)


# --- networks -------------------------------------------------------------------------------------


class BaselineNetwork(nnx.Module):
    """From the observed quadrants to logits of the missing ones."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.x_shape = config.x_shape
        sizes = (config.condition.num_features, *config.hidden, math.prod(self.x_shape))
        self.mlp = MLP(sizes, config.activation, config.dtype, rngs=rngs)

    def __call__(self, c: Float[Array, "N h w k"]) -> Float[Array, "N h w m"]:
        """``x_logits``."""
        return self.mlp(c.reshape(len(c), -1)).reshape(-1, *self.x_shape)


class PriorNetwork(nnx.Module):
    """From the observed quadrants and the baseline's guess to ``z_loc`` and ``z_scale``."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        num_inputs = config.condition.num_features + math.prod(config.x_shape)
        sizes = (num_inputs, *config.prior_hidden, config.num_latents)
        self.mlp = GaussianMLP(sizes, config.activation, config.dtype, rngs=rngs)

    def __call__(
        self, c: Float[Array, "N h w k"], guess: Float[Array, "N h w m"]
    ) -> tuple[Float[Array, "N z"], Float[Array, "N z"]]:
        """Each (N, num_latents)."""
        return self.mlp(jnp.concatenate([a.reshape(len(a), -1) for a in (c, guess)], axis=-1))


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """p(x | c) without latent variables: every missing pixel independent of the others.

    Attributes:
        quadrants: which are observed, and of what images.
        hidden: units of the hidden layers, from c to x.
        activation: after each hidden layer, a function of arrays.
        dtype: in which the networks compute, "float32" or "bfloat16".
        binary_c: whether c is binarised, with x, or grey.

    Raises:
        ValueError: a size that is not positive, or another dtype.
    """

    quadrants: Quadrants = Quadrants()
    hidden: tuple[int, ...] = (1000, 1000)
    activation: Activation = jax.nn.relu
    dtype: str = "float32"
    binary_c: bool = False

    likelihood = Bernoulli()
    channels = ()

    def __post_init__(self):
        check_sizes(self)

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Of the missing quadrants."""
        return self.quadrants.x_shape

    @property
    def condition(self) -> Values:
        """The observed quadrants."""
        return Values(self.quadrants.c_shape)

    def prepare(self, key: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Whole grey images ``x``, cut into ``c`` and a binarised ``x``: a ``preprocess``.

        The whole image is binarised, a grey level the probability of white, and cut; with
        ``binary_c`` both parts are taken from it.
        """
        c, x = self.quadrants.split(self.likelihood.prepare(key, batch["x"]))
        if not self.binary_c:
            c, _ = self.quadrants.split(grey(batch["x"]))
        return {"c": c, "x": x}

    def check_data(self, c: Any = None, x: Any = None) -> None:
        """Raises ValueError where conditions are of another shape; whole images have none yet."""
        if c is not None:
            self.condition.check(c)

    def logits(self, c: Float[Array, "N h w k"]) -> Float[Array, "N h w m"]:
        """Within a program: the baseline's logits of x."""
        return network("baseline", lambda rngs: BaselineNetwork(self, rngs=rngs))(c)

    def __call__(self, c: Float[Any, "N h w k"], x: Float[Any, "N h w m"] | None = None) -> None:
        """Samples x given c, or observes it if it is given."""
        self.check_data(c)
        check_images(x, self.x_shape)
        x_logits = self.logits(jnp.asarray(c))
        with numpyro.plate("data", len(c)):
            numpyro.sample("x", dist.Bernoulli(logits=x_logits).to_event(3), obs=x)


@dataclass(frozen=True)
class Model:
    """p(x, z | c) of the conditional VAE and of the GSNN, around a baseline.

    The baseline's parameters are the site ``baseline``: fit the baseline first, give the engine its
    weights as ``init_params``, and an optimiser that leaves them alone.

    Attributes:
        baseline: the network whose guess the prior sees and whose logits the decoder corrects.
        num_latents: the dimensions of z.
        hidden: units of the decoder's hidden layers, from z to x.
        prior_hidden: units of the prior network's hidden layers.
        decoder_sees_c: whether the decoder sees the observed quadrants beside z.

    Raises:
        ValueError: a size that is not positive.
    """

    baseline: Baseline = Baseline()
    num_latents: int = 200
    hidden: tuple[int, ...] = (1000, 1000)
    prior_hidden: tuple[int, ...] = (1000, 1000)
    decoder_sees_c: bool = False

    likelihood = Bernoulli()
    channels = ()

    def __post_init__(self):
        check_sizes(self)

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Of the missing quadrants."""
        return self.baseline.x_shape

    @property
    def condition(self) -> Values:
        """The observed quadrants."""
        return self.baseline.condition

    @property
    def activation(self) -> Activation:
        """The baseline's, for all networks."""
        return self.baseline.activation

    @property
    def dtype(self) -> str:
        """The baseline's, for all networks."""
        return self.baseline.dtype

    def prepare(self, key: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Baseline.prepare``."""
        return self.baseline.prepare(key, batch)

    def check_data(self, c: Any = None, x: Any = None) -> None:
        """As ``Baseline.check_data``."""
        self.baseline.check_data(c, x)

    def _decoder(self, rngs: nnx.Rngs) -> Decoder:
        names = ("x_shape", "num_latents", "hidden", "activation", "dtype")
        without_c = vae.Model(**{name: getattr(self, name) for name in names})
        return Decoder(self if self.decoder_sees_c else without_c, rngs=rngs)

    def __call__(self, c: Float[Any, "N h w k"], x: Float[Any, "N h w m"] | None = None) -> None:
        """Samples z and x given c, and observes x if it is given."""
        self.check_data(c)
        check_images(x, self.x_shape)
        c = jnp.asarray(c)
        guess_logits = self.baseline.logits(c)
        prior = network("prior", lambda rngs: PriorNetwork(self, rngs=rngs))
        decoder = network("decoder", self._decoder)
        z_loc, z_scale = prior(c, jax.nn.sigmoid(guess_logits))
        with numpyro.plate("data", len(c)):
            z = numpyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))
            x_logits = guess_logits + decoder(z, c if self.decoder_sees_c else None)[:, 0]
            numpyro.sample("x", dist.Bernoulli(logits=x_logits).to_event(3), obs=x)


PRESETS = {
    # The paper's for MNIST: two layers of 1000 rectified units in every network, 200 latents
    "paper": Model(),
    # What two cores train in minutes
    "small": Model(Baseline(hidden=(500, 500)), 50, hidden=(300, 300), prior_hidden=(300, 300)),
}
