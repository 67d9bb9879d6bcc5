"""p(x | z) for images and tables: frozen dataclasses, any of which a model takes.

An image data set holds grey levels: uint8, or floats in [0, 1]. Each likelihood makes its own x
from them by ``prepare(key, images)``, anew at every step of a training. ``check(x)`` refuses arrays
that are no grey images. ``low`` and ``high`` are the ends of the interval of x. ``bits_per_dim``
turns a log-likelihood into bits per dimension.

A table holds a vector of numbers for each datum, (N, D). ``prepare`` leaves the numbers as they
are. So every log-likelihood is on the user's scale.

| object                  | x                     | per pixel or column, from the decoder        |
|-------------------------|-----------------------|----------------------------------------------|
| ``Bernoulli``           | 0 or 1, binarised     | a logit                                      |
| ``Gaussian``            | [low, 1], dequantised | mean and standard deviation                  |
| ``GaussianOneScale``    | [low, 1], dequantised | mean; all pixels share a learned deviation   |
| ``GaussianIdentity``    | [low, 1], dequantised | mean; the deviation is 1                     |
| ``DiscretizedLogistic`` | 0, 1, ..., 255        | mean and scale                               |
| ``Normal``              | any real number       | mean; each column has a learned deviation    |
| ``NegativeBinomial``    | 0, 1, 2, ...          | mean; each column has a learned dispersion   |

Sources: Kingma & Welling 2014, appendix C (Bernoulli; Gaussian, with means through a sigmoid as in
section 5); Theis, van den Oord & Bethge 2016, section 3.1 (with uniform noise, the density bounds
the probability of the grey levels); Salimans et al. 2017, equation 2 (the discretised logistic);
Lopez et al. 2018 (the negative binomial, as in scvi-tools).
Burda et al. 2016 draw the binarised pixels anew at every step.

A density has no upper bound where a pixel hardly varies, for example at the border of a digit. Two
things keep it finite: the noise of dequantisation, 1/256 wide, and the floor of the deviation.
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
from jax.core import Tracer
from jax.scipy.special import betaln
from jaxtyping import Array, Float, Shaped
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from models.networks import softplus

# Grey images: uint8, floats in [0, 1], or bool if they are binary.
Images = Shaped[Array, "N ..."] | Shaped[np.ndarray, "N ..."]

NUM_LEVELS = 256
PIXEL_SCALE_FLOOR = 1 / NUM_LEVELS  # the least deviation of a pixel: one grey level on [0, 1]


@runtime_checkable
class Likelihood(Protocol):
    """What a model asks of a likelihood."""

    @property
    def num_outputs(self) -> int:
        """How many arrays of the shape of one x the decoder gives."""
        ...

    def check(self, x: Any) -> None:
        """Raises ValueError for data that the likelihood cannot describe, prepared or not."""
        ...

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """The x that this likelihood describes, from the data as the user gives them."""
        ...

    def view(self, x: Any) -> Any:
        """x as an encoder sees it: numbers of about the size of one."""
        ...

    def from_real(self, numbers: Array) -> Array:
        """Makes an x from any real numbers, for a guide to look at. 0 gives a common x."""
        ...

    def __call__(self, outputs: Float[Array, "N k ..."]) -> dist.Distribution:
        """p(x | z) from the decoder's ``num_outputs`` arrays. Its batch shape is (N, *x_shape)."""
        ...


@runtime_checkable
class PixelLikelihood(Likelihood, Protocol):
    """What the figures and tables of images ask beside."""

    @property
    def low(self) -> float:
        """The least value of x: black."""
        ...

    @property
    def high(self) -> float:
        """The greatest value of x: white."""
        ...

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """Nats per image as bits per dimension, on the scale of the grey levels."""
        ...


# --- images ---------------------------------------------------------------------------------------


def grey(images: Images) -> Float[Array, "N ..."]:
    """Grey images on [0, 1]. Floats outside become NaN: the loss shows it.

    Raises:
        ValueError: another type than uint8, bool and floats.
    """
    if images.dtype == jnp.uint8:
        return jnp.asarray(images, jnp.float32) / (NUM_LEVELS - 1)
    if not (images.dtype == jnp.bool_ or jnp.issubdtype(images.dtype, jnp.floating)):
        raise ValueError(_not_grey("x", "[0, 1]", images.dtype, _AS_UINT8))
    x = jnp.asarray(images, jnp.float32)
    return jnp.where((x >= 0) & (x <= 1), x, jnp.nan)


_AS_UINT8 = "give uint8, or divide by the largest level"


def _not_grey(name: str, interval: str, got: Any, advice: str) -> str:
    return f"{name}: expected uint8, bool or floats in {interval}, got {got}; {advice}"


def check_grey(images: Any, low: float = 0.0, high: float = 1.0, name: str = "x") -> None:
    """Refuses arrays that are not grey images, before a training makes something else of them.

    Args:
        images: a NumPy or JAX array (N, ...). Values of traced arrays are not looked at.
        low, high: the ends of the interval of x. Floats may lie there or in [0, 1].
        name: the array's name in a message.

    Raises:
        ValueError: another type than uint8, bool and floats; floats outside the interval; uint8
            with 0 and 1 alone, which are nearly black.
    """
    least, most = min(low, 0.0), max(high, 1.0)
    interval, dtype = f"[{least:g}, {most:g}]", images.dtype
    is_float = jnp.issubdtype(dtype, jnp.floating)
    if not (is_float or dtype in (jnp.uint8, jnp.bool_)):
        raise ValueError(_not_grey(name, interval, _range_of(images), _AS_UINT8))
    if isinstance(images, Tracer) or images.size == 0 or dtype == jnp.bool_:
        return
    if is_float:
        first, last = float(images.min()), float(images.max())
        if not (least <= first and last <= most):
            advice = (
                "divide by 255 or by the largest level"
                if first >= 0 and last < NUM_LEVELS
                else f"scale {name} to [0, 1]: (x - min) / (max - min), or use "
                f"the likelihood Normal for unbounded numbers"
            )
            raise ValueError(_not_grey(name, interval, _range_of(images), advice))
    elif int(images.max()) == 1:
        advice = "give binary images as bool or as floats (level 1 of 255 is nearly black)"
        raise ValueError(_not_grey(name, interval, _range_of(images), advice))


def _range_of(array: Any) -> str:
    """The type of an array, and its least and greatest value where they are known."""
    if isinstance(array, Tracer) or array.size == 0 or not jnp.issubdtype(array.dtype, np.number):
        return str(array.dtype)
    return f"{array.dtype} from {array.min()} to {array.max()}"


def _random_words(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform integers below 2^16, two from each 32-bit word.

    JAX's generator makes two words from the key. A word of the noise is a hash of its place and of
    these two, with the constants of hash-prospector (github.com/skeeto/hash-prospector). It takes a
    fifth of the operations of JAX's generator. The tests look at its mean, variance and
    independence.
    """
    size = math.prod(shape)
    start, between = random.bits(key, (2,), jnp.uint32)
    x = lax.iota(jnp.uint32, (size + 1) // 2) * jnp.uint32(0x9E3779B9) + start
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15) ^ between) * jnp.uint32(0x735A2D97)
    x = x ^ (x >> 15)
    return lax.bitcast_convert_type(x, jnp.uint16).reshape(-1)[:size].reshape(shape)


class _Pixels:
    """What the likelihoods of pixels share: an encoder sees [low, high] as [0, 1]."""

    low: float
    high: float

    def view(self, x: Any) -> Any:
        """x on [0, 1]."""
        return (x - self.low) * (1 / (self.high - self.low))

    def from_real(self, numbers: Array) -> Array:
        """A pixel between ``low`` and ``high``, dark at 0."""
        return self.low + (self.high - self.low) * jax.nn.sigmoid(numbers - 2)


class BinaryPixels(dist.BernoulliLogits):
    """``dist.BernoulliLogits`` with a log density that is cheaper in training.

    log p(x) = x * logits - log(1 + exp logits), with the derivative x - sigmoid(logits).
    """

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        """log p(value), value 0 or 1.

        The rows of an image are computed in one, and so is their sum: XLA takes a sum of a
        reshaped array for a sum of the array. On a CPU, sums over short rows are slow.
        """
        value, logits = jnp.asarray(value), self.logits
        rows = logits.shape[-2:]
        if logits.ndim < 3 or value.shape[-2:] != rows:
            return value * logits - softplus(logits)
        value, logits = (a.reshape(*a.shape[:-2], -1) for a in (value, logits))
        log_p = value * logits - softplus(logits)
        return log_p.reshape(*log_p.shape[:-1], *rows)


@dataclass(frozen=True)
class Bernoulli(_Pixels):
    """Binary pixels, by logits. ``bits_per_dim`` is per binary pixel."""

    num_outputs = 1
    low = 0.0
    high = 1.0

    def check(self, x: Any) -> None:
        """As ``check_grey``: floats lie in [0, 1]."""
        check_grey(x, self.low, self.high)

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """Draws each pixel: white with its grey level as the probability (to 2^-16)."""
        words, levels = _random_words(key, images.shape).astype(jnp.float32), grey(images)
        white = (words + 0.5 < levels * 2**16).astype(jnp.float32)
        is_float = jnp.issubdtype(images.dtype, jnp.floating)
        return jnp.where(jnp.isnan(levels), jnp.nan, white) if is_float else white

    def __call__(self, outputs: Float[Array, "N 1 ..."]) -> dist.Distribution:
        """Bernoulli(logits)."""
        return BinaryPixels(logits=outputs[:, 0])

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """-log2 p(x) / D."""
        return -log_likelihood / (num_dims * math.log(2))


@dataclass(frozen=True)
class Gaussian(_Pixels):
    """A Gaussian per pixel, with mean and standard deviation from the network.

    Attributes:
        low: the least x. x lies in [low, 1]: 0, or -1 for images on [-1, 1].
        floor: the least standard deviation, for an x on [0, 1].

    Raises:
        ValueError: ``low`` is not below 1, or ``floor`` is not positive.
    """

    low: float = 0.0
    floor: float = PIXEL_SCALE_FLOOR
    num_outputs = 2
    high = 1.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(f"low: expected a number below 1, got {self.low}")
        if not self.floor > 0:
            raise ValueError(f"floor: expected a positive standard deviation, got {self.floor}")

    def check(self, x: Any) -> None:
        """As ``check_grey``: floats lie in [0, 1], or in [low, 1] if they are prepared."""
        check_grey(x, self.low, self.high)

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """Makes grey level g of 256 uniform on [g, g + 1] / 256, and maps [0, 1] to [low, 1].

        Floats have no levels, so they get no noise.
        """
        x = grey(images)
        if images.dtype == jnp.uint8:
            u = (_random_words(key, images.shape).astype(jnp.float32) + 0.5) / 2**16
            x = (jnp.asarray(images, jnp.float32) + u) / NUM_LEVELS
        return self.low + (self.high - self.low) * x

    def __call__(self, outputs: Float[Array, "N k ..."]) -> dist.Distribution:
        """Normal(x_loc, x_scale). x_loc goes through a sigmoid."""
        width = self.high - self.low
        x_loc = self.low + width * jax.nn.sigmoid(outputs[:, 0])
        return dist.Normal(x_loc, self.scale(outputs))

    def scale(self, outputs: Float[Array, "N k ..."]) -> Any:
        """The standard deviation of every pixel."""
        return (self.high - self.low) * (softplus(outputs[:, 1] - 1) + self.floor)

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """-log2 p(x) / D + log2(grey levels in one unit of x)."""
        levels = NUM_LEVELS / (self.high - self.low)
        return -log_likelihood / (num_dims * math.log(2)) + math.log2(levels)


@dataclass(frozen=True)
class GaussianOneScale(Gaussian):
    """A Gaussian with its mean from the network. All pixels share the site ``x_scale``."""

    num_outputs = 1

    def scale(self, outputs: Float[Array, "N 1 ..."]) -> Any:
        """The learned standard deviation."""
        floor = (self.high - self.low) * self.floor
        start = floor + 0.2 * (self.high - self.low)
        return numpyro.param("x_scale", start, constraint=constraints.greater_than(floor))


@dataclass(frozen=True)
class GaussianIdentity(Gaussian):
    """A Gaussian with its mean from the network and the standard deviation 1.

    Its log density is at most -log(2 pi) / 2 per pixel.
    """

    num_outputs = 1

    def scale(self, outputs: Float[Array, "N 1 ..."]) -> Any:
        """One."""
        return 1.0


@dataclass(frozen=True)
class DiscretizedLogistic(_Pixels):
    """The 256 grey levels themselves, as a logistic distribution cut into bins."""

    num_outputs = 2
    low = 0.0
    high = NUM_LEVELS - 1.0

    def check(self, x: Any) -> None:
        """As ``check_grey``: floats lie in [0, 1], or in [0, 255] if they are prepared."""
        check_grey(x, self.low, self.high)

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """The level, 0 to 255. Floats in [0, 1] are rounded to the nearest level."""
        return jnp.round(grey(images) * self.high)

    def __call__(self, outputs: Float[Array, "N 2 ..."]) -> dist.Distribution:
        """Puts the mean through a sigmoid. The scale is a softplus plus a hundredth of a level."""
        loc = self.high * jax.nn.sigmoid(outputs[:, 0])
        scale = 0.01 + self.high * softplus(outputs[:, 1] - 3)
        return Levels(loc, scale)

    def bits_per_dim(self, log_likelihood: Any, num_dims: int) -> Any:
        """-log2 p(x) / D."""
        return -log_likelihood / (num_dims * math.log(2))


class Levels(dist.Distribution):
    """A logistic distribution rounded to the levels 0 .. 255. The outer bins take the tails.

    Let s be the logistic function, a = (x - 1/2 - loc) / scale and b = (x + 1/2 - loc) / scale.
    Then p(x) = s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)). The last form loses no digits in a tail.

    Args:
        loc, scale: location and scale of the logistic distribution, in levels.
    """

    arg_constraints: ClassVar[dict] = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.integer_interval(0, NUM_LEVELS - 1)
    reparametrized_params: ClassVar[list[str]] = []

    def __init__(self, loc: Any, scale: Any, *, validate_args: bool | None = None):
        self.loc, self.scale = jnp.broadcast_arrays(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        """log p(value) for a level."""
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


# --- tables ---------------------------------------------------------------------------------------


def _check_numbers(x: Any) -> bool:
    """Refuses arrays that are not finite numbers. True if the values can be looked at.

    Raises:
        ValueError: another type, or a value that is not finite.
    """
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if not (is_float or x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer)):
        raise ValueError(f"x: expected numbers, got {x.dtype}; give floats, integers or bool")
    if isinstance(x, Tracer) or x.size == 0:
        return False
    if is_float and not (np.isfinite(x.min()) and np.isfinite(x.max())):
        raise ValueError(
            f"x: expected finite numbers, got {_range_of(x)}; replace what is missing, or leave "
            f"its rows out"
        )
    return True


def _as_numbers(name: str, value: Any) -> Any:
    """A number, or a tuple of one number for each column: what a frozen dataclass can hold."""
    array = np.asarray(value, np.float64)
    if array.ndim > 1:
        raise ValueError(f"{name}: expected one number or (D,), got shape {array.shape}")
    return array.item() if array.ndim == 0 else tuple(array.tolist())


def _check_columns(outputs: Array, **numbers: Any) -> None:
    """Refuses numbers of columns for an x of another shape."""
    for name, value in numbers.items():
        if isinstance(value, tuple) and outputs.shape[2:] != (len(value),):
            raise ValueError(
                f"{name}: expected one number, or one for each column of x, {outputs.shape[2:]}, "
                f"got {len(value)}; take it from the training data, for example x.mean(0)"
            )


def _columns(wrong: Any) -> str:
    """The columns that are wrong, in words for a message."""
    found = np.flatnonzero(wrong)
    more = ", ..." if len(found) > 10 else ""
    return f"column{'s' * (len(found) > 1)} {', '.join(map(str, found[:10]))}{more} (from 0)"


@dataclass(frozen=True)
class Normal:
    """Any real numbers: a Normal. Its mean comes from the network, each column has one deviation.

    The networks work with (x - x_mean) / x_std. The density is that of x itself:

        x_i | z  ~  Normal(x_mean_i + x_std_i m_i(z), (x_std_i s_i)^2).

    Here m(z) is the decoder's output. s is learned: the site ``x_scale``, of the shape of one x, in
    units of ``x_std``. If a column is multiplied by 1000, log p(x) falls by log 1000.

        Normal(x_mean=train.mean(0), x_std=train.std(0))

    Attributes:
        x_mean: the mean of x, a number or one for each column. An array becomes a tuple.
        x_std: the standard deviation of x, likewise. Both come from the training data.
        floor: the least s. Where a column follows from the others, a density has no upper bound.

    Raises:
        ValueError: a number is not finite, or ``floor`` or a deviation is not positive. A constant
            column has no deviation. Neither has one that varies by less than a millionth of its
            mean: float32 cannot tell its values apart.
    """

    x_mean: Any = 0.0
    x_std: Any = 1.0
    floor: float = 0.01
    num_outputs = 1

    def __post_init__(self):
        for name in ("x_mean", "x_std"):
            object.__setattr__(self, name, _as_numbers(name, getattr(self, name)))
        mean, std = np.atleast_1d(self.x_mean, self.x_std)
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise ValueError("x_mean, x_std: expected finite numbers, got NaN or infinity")
        constant = ~(std > 1e-6 * np.abs(mean))
        if constant.any():
            raise ValueError(
                f"x_std: expected data that vary, got a constant {_columns(constant)}; a density "
                f"has no upper bound there: leave such columns out of x"
            )
        if not self.floor > 0:
            raise ValueError(f"floor: expected a positive standard deviation, got {self.floor}")

    def check(self, x: Any) -> None:
        """Refuses what is no finite number."""
        _check_numbers(x)

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """The numbers themselves, as float32."""
        return jnp.asarray(images, jnp.float32)

    def view(self, x: Any) -> Any:
        """(x - x_mean) / x_std."""
        return (x - jnp.float32(self.x_mean)) / jnp.float32(self.x_std)

    def from_real(self, numbers: Array) -> Array:
        """x_mean + x_std * numbers."""
        return jnp.float32(self.x_mean) + jnp.float32(self.x_std) * numbers

    def __call__(self, outputs: Float[Array, "N 1 ..."]) -> dist.Distribution:
        """Normal(x_mean + x_std * outputs, x_std * x_scale)."""
        _check_columns(outputs, x_mean=self.x_mean, x_std=self.x_std)
        start = jnp.ones(outputs.shape[2:], jnp.float32)
        above = constraints.greater_than(self.floor)
        x_scale = numpyro.param("x_scale", start, constraint=above)
        x_std = jnp.float32(self.x_std)
        return dist.Normal(jnp.float32(self.x_mean) + x_std * outputs[:, 0], x_std * x_scale)


@dataclass(frozen=True)
class NegativeBinomial:
    """Counts: a negative binomial. Its mean comes from the network.

    Each column has a learned inverse dispersion theta, the site ``inverse_dispersion``:

        x_i | z  ~  NegativeBinomial(mean mu_i(z), variance mu_i(z) + mu_i(z)^2 / theta_i)
        mu_i(z)  =  x_mean_i exp(m_i(z)).

    Here m(z) is the decoder's output. The encoder sees log(1 + x). As theta grows, the distribution
    becomes a Poisson.

        NegativeBinomial(x_mean=train.mean(0))

    Attributes:
        x_mean: the mean where the decoder gives zero, a number or one for each column. Training
            starts there, so take the mean of the training data. An array becomes a tuple. A column
            of zeros starts at a mean of 0.001.

    Raises:
        ValueError: a mean is negative or not finite.
    """

    x_mean: Any = 1.0
    num_outputs = 1

    def __post_init__(self):
        object.__setattr__(self, "x_mean", _as_numbers("x_mean", self.x_mean))
        wrong = ~(np.isfinite(self.x_mean) & (np.atleast_1d(self.x_mean) >= 0))
        if wrong.any():
            raise ValueError(
                f"x_mean: expected means of counts, from 0, got others in {_columns(wrong)}; use "
                f"the likelihood Normal for numbers that are no counts"
            )

    def check(self, x: Any) -> None:
        """Refuses what is no count: negative numbers, fractions, and 2^24 or more."""
        if not _check_numbers(x) or x.dtype == jnp.bool_:
            return
        least, most = x.min(), x.max()
        if least < 0 or most >= 2**24 or (x != np.round(x)).any():
            fractions = ", some of them fractions" if (x != np.round(x)).any() else ""
            raise ValueError(
                f"x: expected counts, whole numbers from 0 and below 2^24, got {_range_of(x)}"
                f"{fractions}; use the likelihood Normal for other numbers"
            )

    def prepare(self, key: Array, images: Images) -> Float[Array, "N ..."]:
        """The counts themselves, as float32."""
        return jnp.asarray(images, jnp.float32)

    def view(self, x: Any) -> Any:
        """log(1 + x)."""
        return jnp.log1p(x)

    def from_real(self, numbers: Array) -> Array:
        """A count, or a fraction between two: x_mean * exp(numbers)."""
        return jnp.exp(self._log_mean + numbers)

    @property
    def _log_mean(self) -> Array:
        return jnp.log(jnp.maximum(jnp.float32(self.x_mean), 1e-3))

    def __call__(self, outputs: Float[Array, "N 1 ..."]) -> dist.Distribution:
        """The mean is x_mean * exp(outputs)."""
        _check_columns(outputs, x_mean=self.x_mean)
        start = jnp.ones(outputs.shape[2:], jnp.float32)
        theta = numpyro.param("inverse_dispersion", start, constraint=constraints.positive)
        log_mean = self._log_mean + outputs[:, 0]
        return Counts(theta, log_mean - jnp.log(theta))


class Counts(dist.NegativeBinomialLogits):
    """``dist.NegativeBinomialLogits`` with a log density that keeps its digits for large counts.

    Let r be ``total_count``. The log density is

        - r softplus(logits) - x softplus(-logits) - log B(x + 1, r) - log(x + r).

    NumPyro has three log-gamma functions in place of the last two terms, and float32 loses a nat in
    their sum at a million. ``dist.NegativeBinomial2`` has the beta function, but no finite gradient
    for large means.
    """

    @validate_sample
    def log_prob(self, value: Any) -> Array:
        """log p(value) for a count."""
        r, logits = self.total_count, self.logits
        tails = r * softplus(logits) + value * softplus(-logits)
        return -(tails + betaln(value + 1, r) + jnp.log(value + r))


# --- by name --------------------------------------------------------------------------------------

PIXEL_LIKELIHOODS: dict[str, PixelLikelihood] = {
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "gaussian-one-scale": GaussianOneScale(),
    "gaussian-identity": GaussianIdentity(),
    "discretized-logistic": DiscretizedLogistic(),
}
LIKELIHOODS: dict[str, Likelihood] = {
    **PIXEL_LIKELIHOODS,
    "normal": Normal(),
    "negative-binomial": NegativeBinomial(),
}
