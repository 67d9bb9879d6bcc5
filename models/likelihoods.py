"""p(x | z) for images: frozen dataclasses, any of which a model takes.

An image dataset holds grey levels, uint8 or floats in [0, 1]. What x is depends on how it is
modelled, so a likelihood also says how x is made from grey levels (``prepare``, at every step of
a training), in which interval it then lies (``low``, ``high``), and what a log-likelihood amounts
to in bits per dimension.

| object                  | x                     | per pixel, from the decoder                  |
|-------------------------|-----------------------|----------------------------------------------|
| ``Bernoulli``           | 0 or 1, binarised     | a logit                                      |
| ``Gaussian``            | [low, 1], dequantised | mean and standard deviation                  |
| ``GaussianOneScale``    | [low, 1], dequantised | mean; all pixels share a learned deviation   |
| ``GaussianIdentity``    | [low, 1], dequantised | mean; the deviation is 1                     |
| ``DiscretizedLogistic`` | 0, 1, ..., 255        | mean and scale                               |

Sources: Kingma & Welling 2014, appendix C (Bernoulli; Gaussian, with means through a sigmoid as in
section 5); Theis, van den Oord & Bethge 2016, section 3.1 (uniform noise makes of a density a
bound on the probability of the grey levels); Salimans et al. 2017, equation 2 (the discretised
logistic). Burda et al. 2016 draw the binarised pixels anew at every step.

A density has no upper bound where a pixel hardly varies, as at the border of a digit: the noise
of dequantisation, 1/256 wide, and the floor of the standard deviation keep it finite.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jaxtyping import Array, Float, Num
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

Images = Num[Array, "N ..."] | Num[np.ndarray, "N ..."]  # grey: uint8, or floats in [0, 1]

NUM_LEVELS = 256
SCALE_FLOOR = 1 / NUM_LEVELS  # of a pixel's standard deviation: one grey level on [0, 1]


@runtime_checkable
class Likelihood(Protocol):
    """What a model asks of a likelihood."""

    @property
    def num_outputs(self) -> int:
        """The decoder's arrays of the image's shape."""
        ...

    @property
    def low(self) -> float:
        """The least value of x: black."""
        ...

    @property
    def high(self) -> float:
        """The greatest value of x: white."""
        ...

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """Grey images as the x that this likelihood describes."""
        ...

    def __call__(self, outputs: Float[Array, "N k ..."]) -> dist.Distribution:
        """p(x | z), of batch shape (N, *x), from the decoder's ``num_outputs`` arrays."""
        ...

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """Nats per image as bits per dimension, on the scale of the grey levels."""
        ...


def grey(images: Images) -> Float[Array, "N ..."]:
    """Grey images on [0, 1]."""
    if images.dtype == jnp.uint8:
        return jnp.asarray(images, jnp.float32) / (NUM_LEVELS - 1)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"x: expected uint8 or floats in [0, 1], got {images.dtype}")
    return jnp.asarray(images, jnp.float32)


def _random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform integers below 2^16: half the work of the generator's own 32-bit words."""
    size = math.prod(shape)
    words = random.bits(key, ((size + 1) // 2,), jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size].reshape(shape)


@dataclass(frozen=True)
class Bernoulli:
    """Binary pixels, by logits. ``bits_per_dim`` is per binary pixel."""

    num_outputs = 1
    low = 0.0
    high = 1.0

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """Each pixel white with a probability that is its grey level (to 2^-16)."""
        words = _random_words(key, images.shape).astype(jnp.float32)
        return (words + 0.5 < grey(images) * 2**16).astype(jnp.float32)

    def __call__(self, outputs: Float[Array, "N 1 ..."]) -> dist.Distribution:
        """Bernoulli(logits)."""
        return dist.Bernoulli(logits=outputs[:, 0])

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """-log2 p(x) / D."""
        return -log_likelihood / (num_dims * math.log(2))


@dataclass(frozen=True)
class Gaussian:
    """Mean and diagonal variance from the network.

    Attributes:
        low: x lies in [low, 1]; 0, or -1 for images on [-1, 1].
        floor: the least standard deviation, for an x on [0, 1].
    """

    low: float = 0.0
    floor: float = SCALE_FLOOR
    num_outputs = 2
    high = 1.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"low: expected a number below 1, got {self.low}")
        if not self.floor > 0:
            raise ValueError(f"floor: expected a positive standard deviation, got {self.floor}")

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """Grey level g of 256 becomes uniform on [g, g + 1] / 256, then x on [low, 1].

        Images of floats have no levels and are taken as they are.
        """
        x = grey(images)
        if images.dtype == jnp.uint8:
            u = (_random_words(key, images.shape).astype(jnp.float32) + 0.5) / 2**16
            x = (jnp.asarray(images, jnp.float32) + u) / NUM_LEVELS
        return self.low + (self.high - self.low) * x

    def __call__(self, outputs: Float[Array, "N k ..."]) -> dist.Distribution:
        """Normal(x_loc, x_scale), with x_loc through a sigmoid."""
        width = self.high - self.low
        x_loc = self.low + width * jax.nn.sigmoid(outputs[:, 0])
        return dist.Normal(x_loc, self.scale(outputs))

    def scale(self, outputs: Float[Array, "N k ..."]) -> Any:
        """The standard deviation of every pixel."""
        return (self.high - self.low) * (jax.nn.softplus(outputs[:, 1] - 1) + self.floor)

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """-log2 p(x) / D, plus the log2 of the grey levels in one unit of x."""
        levels = NUM_LEVELS / (self.high - self.low)
        return -log_likelihood / (num_dims * math.log(2)) + math.log2(levels)


@dataclass(frozen=True)
class GaussianOneScale(Gaussian):
    """Mean from the network, one standard deviation for all pixels: the site ``x_scale``."""

    num_outputs = 1

    def scale(self, outputs: Float[Array, "N 1 ..."]) -> Any:
        """The learned standard deviation."""
        floor = (self.high - self.low) * self.floor
        start = floor + 0.2 * (self.high - self.low)
        return numpyro.param("x_scale", start, constraint=constraints.greater_than(floor))


@dataclass(frozen=True)
class GaussianIdentity(Gaussian):
    """Mean from the network, standard deviation 1.

    The density cannot exceed -log(2 pi) / 2 per pixel.
    """

    num_outputs = 1

    def scale(self, outputs: Float[Array, "N 1 ..."]) -> Any:
        """One."""
        return 1.0


@dataclass(frozen=True)
class DiscretizedLogistic:
    """The 256 grey levels themselves, as a logistic distribution cut into bins."""

    num_outputs = 2
    low = 0.0
    high = NUM_LEVELS - 1.0

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """The level, 0 to 255; floats in [0, 1] are rounded to the nearest."""
        return jnp.round(grey(images) * self.high)

    def __call__(self, outputs: Float[Array, "N 2 ..."]) -> dist.Distribution:
        """Mean through a sigmoid; the scale is a softplus plus a hundredth of a level."""
        loc = self.high * jax.nn.sigmoid(outputs[:, 0])
        scale = 0.01 + self.high * jax.nn.softplus(outputs[:, 1] - 3)
        return Levels(loc, scale)

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """-log2 p(x) / D."""
        return -log_likelihood / (num_dims * math.log(2))


class Levels(dist.Distribution):
    """A logistic distribution rounded to the levels 0 .. 255; the outer bins take the tails.

    With s the logistic function, a = (x - 1/2 - loc) / scale and b = (x + 1/2 - loc) / scale,
    p(x) = s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)), which loses no digits in either tail.

    Args:
        loc, scale: of the logistic, in levels.
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.integer_interval(0, NUM_LEVELS - 1)
    reparametrized_params: ClassVar[list[str]] = []

    def __init__(self, loc: Any, scale: Any, *, validate_args: bool | None = None):
        self.loc, self.scale = jnp.broadcast_arrays(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        """log p(value), value a level."""
        below = jax.nn.log_sigmoid((value + 0.5 - self.loc) / self.scale)
        above = jax.nn.log_sigmoid((self.loc - value + 0.5) / self.scale)
        inside = jnp.log(-jnp.expm1(-1 / self.scale))
        first, last = value <= 0, value >= NUM_LEVELS - 1
        return jnp.where(first, below, jnp.where(last, above, below + above + inside))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Array:
        """Levels, as floats."""
        x = self.loc + self.scale * random.logistic(key, sample_shape + self.batch_shape)
        return jnp.clip(jnp.round(x), 0, NUM_LEVELS - 1)

    @property
    def mean(self) -> Array:
        """The exact mean: the sum of P(x >= k) over k = 1 .. 255."""

        def add(k: Array, total: Array) -> Array:
            return total + jax.nn.sigmoid((self.loc - k + 0.5) / self.scale)

        return lax.fori_loop(1, NUM_LEVELS, add, jnp.zeros(self.batch_shape))


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "gaussian-one-scale": GaussianOneScale(),
    "gaussian-identity": GaussianIdentity(),
    "discretized-logistic": DiscretizedLogistic(),
}
