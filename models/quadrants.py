"""Quadrants: the missing quarters of an image given the others (Sohn, Lee & Yan 2015).

The paper writes x -> y for our c -> x: its input x is our condition c, and its output y is our x.
An image is cut into quarters. c holds one, two or three of them, x the rest. The pixels of x are
binary. Every step of a training draws them anew, with the grey level as the probability of white.
The pixels of c are grey. With ``binary_c`` they come from the same binarised image as x. The
baseline network guesses x from c alone, one probability for each pixel:

    x | c     ~  Bernoulli(logits = baseline(c))                              the baseline

The conditional VAE adds a latent vector z. It chooses among the ways to go on from c:

    g         =  sigmoid(baseline(c))                                         the baseline's guess
    z | c     ~  Normal(z_loc(c, g), z_scale(c, g)^2)                         the prior p(z | c)
    x | z, c  ~  Bernoulli(logits = baseline(c) + decoder(z))                 p(x | z, c)
    z | x, c  ~  Normal(z_loc(x, c), z_scale(x, c)^2)                         the guide q(z | x, c)

The guide is ``guides.mean_field``. It factorises over the dimensions of z. The ELBO is the paper's
equation 4. The paper also trains a stochastic network without recognition on draws from the prior,
the GSNN (equation 7). That is the ELBO with the prior itself as the guide, ``guides.prior``:

    E_{p(z | c)} [ log p(x | z, c) ]

``inference.Hybrid(alpha)`` is the paper's mixture of both objectives (section 4). The same two
guides serve the judges. With the prior as the guide, ``inference.log_likelihood`` is the paper's
Monte Carlo estimate of log p(x | c). With the recognition network it is importance sampling.

We deviate in two points. The decoder sees c through the baseline's logits alone, unless
``decoder_sees_c``. And c is grey, because the paper does not say how pixels were binarised. Its
table suggests a grey c: given one binary quadrant, our baseline is more than four nats worse than
the paper's. Given a grey one it is about as good.

| on paper                   | in code                          | meaning                          |
|----------------------------|----------------------------------|----------------------------------|
| x                          | ``c``, (N, h, w, k)              | the k observed quadrants         |
| y                          | ``x``, (N, h, w, 4 - k)          | the missing quadrants            |
| z                          | ``z``, (N, num_latents)          | latent vectors                   |
| baseline NN                | param ``baseline``               | the weights of the baseline      |
| prior network p(z | x)     | param ``prior``                  | from c and the guess to z        |
| generation p(y | x, z)     | param ``decoder``                | from z to logits                 |
| recognition q(z | x, y)    | param ``encoder``, of the guide  | from x and c to z                |

    from models import guides, quadrants

    model = quadrants.PRESETS["small"]
    guide = guides.mean_field(model)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Float, Num

from models.conditions import Values
from models.likelihoods import Bernoulli, BinaryPixels, check_grey, grey
from models.networks import (
    MLP,
    Activation,
    Decoder,
    Encoder,
    PriorNetwork,
    check_images,
    check_shape,
    check_sizes,
    network,
)

# --- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadrants:
    """How an image is cut into quarters. They are the last axis of an array.

    Quarters are observed in this order: bottom left, top left, top right, bottom right.

    Attributes:
        num_observed: 1 for the bottom left, 2 for the left half, 3 for all but the bottom right.
        image_shape: (height, width), both even.

    Raises:
        ValueError: another number of quadrants, or odd sides.
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
        """The shape of the observed quadrants: (height / 2, width / 2, num_observed)."""
        height, width = self.image_shape
        return height // 2, width // 2, self.num_observed

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """The shape of the missing quadrants: (height / 2, width / 2, 4 - num_observed)."""
        return (*self.c_shape[:2], 4 - self.num_observed)

    def split(
        self, images: Num[Any, "N height width"]
    ) -> tuple[Num[Array, "N h w k"], Num[Array, "N h w m"]]:
        """Cuts images (N, height, width) into observed and missing quadrants.

        Raises:
            ValueError: images of another shape.
        """
        check_shape(images, self.image_shape, "image_shape")
        h, w = self.c_shape[:2]
        top, bottom = images[:, :h], images[:, h:]
        parts = (bottom[..., :w], top[..., :w], top[..., w:], bottom[..., w:])
        quarters = jnp.stack(parts, axis=-1)
        return quarters[..., : self.num_observed], quarters[..., self.num_observed :]

    def merge(self, c: Num[Any, "N h w k"], x: Num[Any, "N h w m"]) -> Num[Array, "N height width"]:
        """Puts observed and missing quadrants together to images (N, height, width)."""
        quarters = jnp.concatenate([c, x], axis=-1)
        bottom_left, top_left, top_right, bottom_right = jnp.moveaxis(quarters, -1, 0)
        top = jnp.concatenate([top_left, top_right], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([bottom_left, bottom_right], -1)], axis=-2)


# --- networks -------------------------------------------------------------------------------------


class BaselineNetwork(nnx.Module):
    """The baseline: from the observed quadrants to logits of the missing ones.

    Args:
        c_shape: the shape of one datum's observed quadrants.
        hidden: units of the hidden layers, from c to x.
        x_shape: the shape of one datum's missing quadrants.
        activation: the function of arrays after each hidden layer.
        dtype: the type that the layers compute in.
    """

    def __init__(
        self,
        c_shape: Sequence[int],
        hidden: Sequence[int],
        x_shape: Sequence[int],
        activation: Activation,
        dtype: str,
        *,
        rngs: nnx.Rngs,
    ):
        self.x_shape = tuple(x_shape)
        sizes = (math.prod(c_shape), *hidden, math.prod(x_shape))
        self.mlp = MLP(sizes, activation, dtype, rngs=rngs)

    def __call__(self, c: Float[Array, "N h w k"]) -> Float[Array, "N h w m"]:
        """Logits (N, *x_shape)."""
        return self.mlp(c.reshape(len(c), -1)).reshape(-1, *self.x_shape)


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """The program p(x | c) without latent variables. Given c, missing pixels are independent.

    Attributes:
        quadrants: how images are cut.
        hidden: units of the hidden layers, from c to x.
        activation: the function of arrays after each hidden layer.
        dtype: the type that the networks compute in, "float32" or "bfloat16".
        binary_c: whether c is binarised, with x, or grey.

    Raises:
        ValueError: a size is not positive, or another dtype.
    """

    quadrants: Quadrants = Quadrants()
    hidden: tuple[int, ...] = (1000, 1000)
    activation: Activation = jax.nn.relu
    dtype: str = "float32"
    binary_c: bool = False

    likelihood = Bernoulli()

    def __post_init__(self):
        check_sizes(self.x_shape, (), self.dtype, hidden=self.hidden)

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """The shape of one datum's missing quadrants."""
        return self.quadrants.x_shape

    @property
    def condition(self) -> Values:
        """The kind of c: the observed quadrants."""
        return Values(self.quadrants.c_shape)

    def prepare(self, key: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Cuts whole grey images into c and a binarised x. ``fit`` takes it as ``preprocess``.

        The whole image is binarised and then cut. The grey level is the probability of white.

        Args:
            key: a random key.
            batch: ``x``, (N, height, width), whole grey images.

        Returns:
            ``c``, (N, *c_shape), grey or, with ``binary_c``, binary; ``x``, (N, *x_shape), binary.
        """
        c, x = self.quadrants.split(self.likelihood.prepare(key, batch["x"]))
        if not self.binary_c:
            c, _ = self.quadrants.split(grey(batch["x"]))
        return {"c": c, "x": x}

    def check_data(self, x: Any = None, c: Any = None) -> None:
        """Refuses images and quadrants that the model is not made for.

        Args:
            x: whole grey images (N, height, width) before ``prepare``. With ``c``, the missing
                quadrants (N, *x_shape). None for none.
            c: the observed quadrants (N, *c_shape), numbers in [0, 1]. None before ``prepare``.

        Raises:
            ValueError: another shape, type or range.
        """
        if c is not None:
            self.condition.check(c)
            check_grey(c, name="c")
        if x is not None:
            if c is None:
                check_shape(x, self.quadrants.image_shape, "image_shape")
            else:
                check_shape(x, self.x_shape)
            self.likelihood.check(x)

    def logits(self, c: Float[Array, "N h w k"]) -> Float[Array, "N h w m"]:
        """The baseline's logits of x, within a program. The weights are the site ``baseline``."""
        sizes = self.quadrants.c_shape, self.hidden, self.x_shape, self.activation, self.dtype
        return network("baseline", lambda rngs: BaselineNetwork(*sizes, rngs=rngs))(c)

    def __call__(self, c: Float[Any, "N ..."], x: Float[Any, "N ..."] | None = None) -> None:
        """Samples x given c, or observes it if it is given.

        Args:
            c: the observed quadrants, (N, *c_shape).
            x: the missing quadrants, (N, *x_shape), 0 or 1. None to generate.

        Raises:
            ValueError: arrays of another shape or type.
        """
        self.condition.check(c)
        check_images(x, self.x_shape)
        x_logits = self.logits(jnp.asarray(c))
        with numpyro.plate("data", len(c)):
            numpyro.sample("x", BinaryPixels(logits=x_logits).to_event(3), obs=x)


@dataclass(frozen=True)
class Model:
    """The program p(x, z | c) of the conditional VAE and of the GSNN, around a baseline.

    The baseline's parameters are the site ``baseline``. Fit the baseline first. Then give the
    engine its weights as ``init``, and an optimiser that leaves them alone.

    Attributes:
        baseline: the network that guesses x. The prior sees its guess. The decoder corrects its
            logits. All networks share its activation and dtype.
        num_latents: the dimensions of z.
        hidden: units of the decoder's hidden layers, from z to x.
        prior_hidden: units of the prior network's hidden layers, from c to z.
        decoder_sees_c: whether the decoder sees the observed quadrants beside z.

    Raises:
        ValueError: a size is not positive.
    """

    baseline: Baseline = Baseline()
    num_latents: int = 200
    hidden: tuple[int, ...] = (1000, 1000)
    prior_hidden: tuple[int, ...] = (1000, 1000)
    decoder_sees_c: bool = False

    likelihood = Bernoulli()

    def __post_init__(self):
        check_sizes(
            self.x_shape,
            (),
            self.baseline.dtype,
            num_latents=self.num_latents,
            hidden=self.hidden,
            prior_hidden=self.prior_hidden,
        )

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """The shape of one datum's missing quadrants."""
        return self.baseline.x_shape

    @property
    def condition(self) -> Values:
        """The kind of c: the observed quadrants."""
        return self.baseline.condition

    @property
    def _common(self) -> dict[str, Any]:
        return {"activation": self.baseline.activation, "dtype": self.baseline.dtype}

    def prepare(self, key: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As ``Baseline.prepare``."""
        return self.baseline.prepare(key, batch)

    def check_data(self, x: Any = None, c: Any = None) -> None:
        """As ``Baseline.check_data``."""
        self.baseline.check_data(x, c)

    def encoder(
        self, num_outputs: int, *, hidden: Sequence[int] | None = None, rngs: nnx.Rngs
    ) -> Encoder:
        """The recognition network, from x and c to the numbers of a guide.

        Args:
            num_outputs: how many numbers it gives for one datum.
            hidden: units of the hidden layers, from x to z. Default: the decoder's, reversed.
            rngs: Flax's random numbers.
        """
        hidden = self.hidden[::-1] if hidden is None else hidden
        settings = {"condition": self.condition, **self._common}
        return Encoder(self.x_shape, hidden, num_outputs, **settings, rngs=rngs)

    def _decoder(self, rngs: nnx.Rngs) -> Decoder:
        condition = self.condition if self.decoder_sees_c else None
        settings = {"condition": condition, **self._common}
        return Decoder(self.num_latents, self.hidden, self.x_shape, **settings, rngs=rngs)

    def _prior(self, rngs: nnx.Rngs) -> PriorNetwork:
        settings = {"num_more": math.prod(self.x_shape), **self._common}
        return PriorNetwork(
            self.condition, self.prior_hidden, self.num_latents, **settings, rngs=rngs
        )

    def __call__(self, c: Float[Any, "N ..."], x: Float[Any, "N ..."] | None = None) -> None:
        """Samples z and x given c, and observes x if it is given.

        Args:
            c: the observed quadrants, (N, *c_shape).
            x: the missing quadrants, (N, *x_shape), 0 or 1. None to generate.

        Raises:
            ValueError: arrays of another shape or type.
        """
        self.condition.check(c)
        check_images(x, self.x_shape)
        c = jnp.asarray(c)
        guess_logits = self.baseline.logits(c)
        prior, decoder = network("prior", self._prior), network("decoder", self._decoder)
        z_loc, z_scale = prior(c, jax.nn.sigmoid(guess_logits))
        with numpyro.plate("data", len(c)):
            z = numpyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))
            x_logits = guess_logits + decoder(z, c if self.decoder_sees_c else None)[:, 0]
            numpyro.sample("x", BinaryPixels(logits=x_logits).to_event(3), obs=x)


PRESETS = {
    # The paper's for MNIST: two layers of 1000 rectified units in every network, 200 latents
    "paper": Model(),
    # What two cores train in minutes
    "small": Model(Baseline(hidden=(500, 500)), 50, hidden=(300, 300), prior_hidden=(300, 300)),
}
