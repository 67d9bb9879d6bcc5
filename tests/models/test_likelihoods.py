"""Likelihoods of images, against SciPy, float64 sums and the frequencies of their own draws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.distributions import biject_to
from scipy import special, stats

from models.likelihoods import (
    LIKELIHOODS,
    PIXEL_LIKELIHOODS,
    PIXEL_SCALE_FLOOR,
    Bernoulli,
    BinaryPixels,
    DiscretizedLogistic,
    Gaussian,
    GaussianIdentity,
    GaussianOneScale,
    Levels,
    NegativeBinomial,
    Normal,
    check_grey,
)

KEY = jax.random.key(0)
ALL_LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
EVERY = pytest.mark.parametrize("likelihood", PIXEL_LIKELIHOODS.values(), ids=PIXEL_LIKELIHOODS)
# Each way to make x from grey levels: the Gaussians share one.
EACH = pytest.mark.parametrize(
    "likelihood", [Bernoulli(), Gaussian(), DiscretizedLogistic()], ids=lambda v: type(v).__name__
)
X_SCALE = 0.3


def distribution(likelihood, outputs, x_scale=X_SCALE):
    """p(x | z), where the likelihood's own parameter, if it has one, is given."""
    with handlers.substitute(data={"x_scale": jnp.float32(x_scale)}):
        return likelihood(jnp.asarray(outputs, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def prepare(likelihood, key, images):
    return likelihood.prepare(key, images)


@functools.partial(jax.jit, static_argnums=0)
def log_prob(likelihood, outputs, x, x_scale=X_SCALE):
    return distribution(likelihood, outputs, x_scale).log_prob(x)


# --- x from real numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "likelihood",
    [
        *LIKELIHOODS.values(),
        Gaussian(low=-1.0),
        Normal((3.0, -2.0), (2.0, 0.5)),
        NegativeBinomial((4.0, 0.5)),
    ],
    ids=str,
)
def test_any_real_numbers_become_an_x(likelihood):
    """It lies where x can, rises with the numbers, and is a common x at 0."""
    numbers = jnp.broadcast_to(jnp.linspace(-8, 8, 65)[:, None], (65, 2))
    x = np.asarray(likelihood.from_real(numbers), np.float64)
    assert x.shape == (65, 2)
    assert np.isfinite(x).all()
    assert (np.diff(x, axis=0) > 0).all()
    common, (at_one,) = x[32], x[36:37] - x[32]
    assert float(numbers[32, 0]) == 0.0
    if isinstance(likelihood, Normal):
        np.testing.assert_allclose(common, np.broadcast_to(likelihood.x_mean, 2), rtol=1e-6)
        np.testing.assert_allclose(at_one, np.broadcast_to(likelihood.x_std, 2), rtol=1e-6)
    elif isinstance(likelihood, NegativeBinomial):
        assert (x > 0).all()
        np.testing.assert_allclose(common, np.broadcast_to(likelihood.x_mean, 2), rtol=1e-5)
    else:
        assert ((x > likelihood.low) & (x < likelihood.high)).all()
        share = (common - likelihood.low) / (likelihood.high - likelihood.low)
        np.testing.assert_allclose(share, special.expit(-2), rtol=1e-5)


# --- x from grey levels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "as_images",
    [lambda grey: grey, lambda grey: (grey / 255).astype(np.float32)],
    ids=["uint8", "float32"],
)
def test_a_pixel_is_white_with_the_probability_of_its_grey_level(as_images):
    copies = 10_000
    images = as_images(np.broadcast_to(ALL_LEVELS, (copies, 16, 16)))
    x = np.asarray(prepare(Bernoulli(), KEY, images))
    assert x.dtype == np.float32
    assert ((x == 0) | (x == 1)).all()
    white, p = x.mean(0).ravel(), np.arange(256) / 255
    assert white[0] == 0
    assert white[255] == 1
    error = np.sqrt(p * (1 - p) / copies)
    assert (abs(white - p) <= 5 * error + 2.0**-16).all()


def test_neighbouring_pixels_are_drawn_independently():
    x = np.asarray(prepare(Bernoulli(), KEY, np.full((200, 32, 32), 127, np.uint8))).ravel()
    for lag in (1, 2, 32):  # a random word serves two neighbours
        correlation = np.corrcoef(x[:-lag], x[lag:])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(x.size)


@pytest.fixture(scope="module")
def noise():
    """The noise of black images, uniform on [0, 1], of 4 seeds, 250 steps and 783 pixels."""

    @jax.jit
    def draw(seed, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return 256 * Gaussian().prepare(key, jnp.zeros((1, 27, 29), jnp.uint8)).ravel()

    seeds, steps = np.divmod(np.arange(1_000), 250)
    return np.asarray(jax.jit(jax.vmap(draw))(seeds, steps), np.float64).reshape(4, 250, 783)


def test_the_noise_of_pixels_is_uniform(noise):
    def z_scores(u):
        """Of the mean and of the variance over the last axis, in their standard errors."""
        spread, size = 1 / 12, u.shape[-1]
        error_of_variance = spread * np.sqrt((9 / 5 - 1) / size)  # the kurtosis is 9/5
        return (
            (u.mean(-1) - 0.5) / np.sqrt(spread / size),
            (((u - 0.5) ** 2).mean(-1) - spread) / error_of_variance,
        )

    for z in z_scores(noise.ravel()):
        assert abs(z) < 4
    by_pixel, by_step = noise.reshape(-1, 783).T, noise.reshape(1_000, 783)
    for z in (*z_scores(by_pixel), *z_scores(by_step)):
        assert abs(z).max() < 5
        assert abs((z**2).sum() - z.size) < 5 * np.sqrt(2 * z.size)  # a chi-square
    counts, _ = np.histogram(noise, bins=256, range=(0, 1))
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("axis", ["pixels", "steps and seeds"])
def test_the_noise_of_pixels_is_independent(noise, axis):
    rows = noise.reshape(1_000, 783)
    rows = rows.T if axis == "pixels" else rows
    size = rows.shape[1]
    correlation = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert abs(correlation).max() < 6 / np.sqrt(size)
    squares = (size - 1) * correlation**2  # of mean 1 and variance 2
    assert abs(squares.mean() - 1) < 5 * np.sqrt(2 / squares.size)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_grey_level_becomes_uniform_on_its_interval(low):
    images = np.broadcast_to(ALL_LEVELS, (1_000, 16, 16))
    x = np.asarray(prepare(Gaussian(low=low), KEY, images))
    assert x.dtype == np.float32
    assert low <= x.min() <= x.max() <= 1
    within = (x.astype(np.float64) - low) / (1 - low) * 256 - images
    rounding = 256 * 2.0**-24  # of x near 1, in levels
    assert within.min() >= -rounding
    assert within.max() <= 1 + rounding
    for level in (0, 1, 128, 255):
        counts, _ = np.histogram(within.reshape(-1, 256)[:, level], bins=8, range=(0, 1))
        assert stats.chisquare(counts).pvalue > 1e-4
    counts, _ = np.histogram(within, bins=64, range=(0, 1))
    assert stats.chisquare(counts, counts.sum() / 64).pvalue > 1e-4


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_floats_have_no_levels_and_are_only_mapped(low, rng):
    images = rng.random((3, 4, 5))
    x = Gaussian(low=low).prepare(KEY, images)
    np.testing.assert_allclose(x, low + (1 - low) * images, atol=1e-6)
    np.testing.assert_array_equal(x, Gaussian(low=low).prepare(jax.random.key(1), images))


def test_levels_stay_levels():
    likelihood = DiscretizedLogistic()
    for prepare in (likelihood.prepare, jax.jit(likelihood.prepare)):
        for images in (ALL_LEVELS[None], ALL_LEVELS[None] / 255):
            np.testing.assert_array_equal(prepare(KEY, images)[0], ALL_LEVELS)
    between = np.array([[[0.4, 0.6, 17.4, 254.6]]]) / 255
    np.testing.assert_array_equal(likelihood.prepare(KEY, between)[0, 0], [0, 1, 17, 255])


def test_the_gaussians_make_their_x_alike():
    for family in (GaussianOneScale, GaussianIdentity):
        assert family.prepare is Gaussian.prepare
        assert family.check is Gaussian.check


@EACH
def test_prepare_is_a_function_of_its_key(likelihood, rng):
    shape = (3, 5, 7, 3)  # of an odd size, and with channels
    images = rng.integers(1, 255, shape, dtype=np.uint8)
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(likelihood.prepare, in_axes=(0, None)))(keys, images)
    alone = np.stack([prepare(likelihood, key, images) for key in keys])
    assert alone.shape == (3, *shape)
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(prepare(likelihood, keys[0], images), alone[0])
    is_random = not isinstance(likelihood, DiscretizedLogistic)
    assert (alone[0] != alone[1]).any() == is_random


@EVERY
def test_prepare_lands_in_the_support(likelihood):
    @jax.jit
    def run(images):
        x = likelihood.prepare(KEY, images)
        d = distribution(likelihood, jnp.zeros((20, likelihood.num_outputs, 16, 16)))
        return x, d.support(x)

    x, supported = jax.device_get(run(np.broadcast_to(ALL_LEVELS, (20, 16, 16))))
    assert likelihood.low <= x.min() <= x.max() <= likelihood.high
    assert supported.all()


@EACH
def test_prepare_draws_the_same_with_64_bits(likelihood, rng):
    images = rng.integers(0, 256, (3, 5, 7), dtype=np.uint8)
    x = prepare(likelihood, KEY, images)
    with jax.enable_x64(True):
        wide = prepare(likelihood, KEY, images)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, x)


# --- what is no grey image ------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_grey_images_and_prepared_ones_pass(likelihood, as_array):
    binary = ALL_LEVELS[None] > 127
    for images in (ALL_LEVELS[None], ALL_LEVELS[None] / 255, binary, binary.astype(np.float32)):
        likelihood.check(as_array(images))
        likelihood.check(as_array(prepare(likelihood, KEY, images)))
    likelihood.check(np.zeros((3, 2, 2), np.uint8))


def test_binary_images_stay_as_they_are():
    binary = ALL_LEVELS[None] > 127
    np.testing.assert_array_equal(Bernoulli().prepare(KEY, binary), binary)


UNIT, WIDE, LEVELS_TOO = r"\[0, 1\]", r"\[-1, 1\]", r"\[0, 255\]"
DIVIDE, SCALE = "divide by 255 or by the largest level", r"scale x to \[0, 1\]: \(x - min\) /"


@pytest.mark.parametrize(
    ("likelihood", "images", "message"),
    [
        (Bernoulli(), ALL_LEVELS / 1.0, f"{UNIT}, got float64 from 0.0 to 255.0; {DIVIDE}"),
        (Gaussian(), ALL_LEVELS / 16.0, f"{UNIT}, got float64 from 0.0 to 15.93.*; {DIVIDE}"),
        (Gaussian(), ALL_LEVELS - 9.5, f"{UNIT}, got float64 from -9.5 to 245.5; {SCALE}"),
        (
            GaussianOneScale(),
            ALL_LEVELS * 9.0,
            f"{UNIT}, .* to 2295.0; {SCALE}.*Normal for unbounded",
        ),
        (GaussianIdentity(low=-1.0), ALL_LEVELS / 85 - 1.5, f"{WIDE}, got .* to 1.5; {SCALE}"),
        (DiscretizedLogistic(), ALL_LEVELS + 0.5, f"{LEVELS_TOO}, got .* to 255.5; {DIVIDE}"),
        (Bernoulli(), ALL_LEVELS.astype(int), "got int64 from 0 to 255; give uint8, or divide by"),
        (Bernoulli(), ALL_LEVELS // 128, "got uint8 from 0 to 1; give binary images as bool or"),
    ],
)
def test_other_arrays_are_refused_with_what_to_do(likelihood, images, message):
    with pytest.raises(ValueError, match=rf"^x: expected uint8, bool or floats in .*{message}"):
        likelihood.check(images[None])


def test_a_message_names_the_array():
    with pytest.raises(ValueError, match=r"^c: expected .*; scale c to \[0, 1\]"):
        check_grey(np.array([-2.0]), name="c")


@EVERY
def test_values_of_traced_arrays_are_not_looked_at(likelihood):
    jax.eval_shape(likelihood.check, jnp.full((1, 2, 2), 1e6))
    with pytest.raises(ValueError, match="got int32; give uint8, or divide"):
        jax.eval_shape(likelihood.check, jnp.zeros((1, 2, 2), jnp.int32))


@EACH
def test_prepare_makes_floats_outside_the_unit_interval_nan(likelihood):
    x = prepare(likelihood, KEY, np.float32([[-0.1, 0.0, 1.0, 255.0]]))
    np.testing.assert_array_equal(np.isnan(x), [[True, False, False, True]])


@EVERY
@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_other_integers_are_not_grey_levels(likelihood, dtype):
    with pytest.raises(ValueError, match=rf"expected uint8, bool or floats.*got {np.dtype(dtype)}"):
        likelihood.prepare(KEY, np.zeros((1, 2, 2), dtype))


# --- densities ------------------------------------------------------------------------------------


def test_bernoulli_is_its_formula(rng):
    outputs = rng.normal(0, 3, (4, 1, 3, 2))
    x = rng.integers(0, 2, (4, 3, 2)).astype(np.float32)
    expected = stats.bernoulli.logpmf(x, special.expit(outputs[:, 0]))
    actual = log_prob(Bernoulli(), outputs, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("family", [Gaussian, GaussianOneScale, GaussianIdentity])
def test_gaussians_are_scipys(family, low, rng):
    likelihood = family(low=low, floor=0.02)
    outputs = rng.normal(0, 2, (4, likelihood.num_outputs, 3, 2))
    x = rng.uniform(low, 1, (4, 3, 2)).astype(np.float32)
    loc = low + (1 - low) * special.expit(outputs[:, 0])
    if family is Gaussian:
        scale = (1 - low) * (np.logaddexp(0, outputs[:, 1] - 1) + 0.02)
    else:
        scale = X_SCALE if family is GaussianOneScale else 1.0
    actual = log_prob(likelihood, outputs, x)
    np.testing.assert_allclose(actual, stats.norm.logpdf(x, loc, scale), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_no_pixel_is_denser_than_the_floor_allows(low):
    """The floor is one grey level wide, whatever the interval of x."""
    ceiling = stats.norm.logpdf(0, 0, (1 - low) * PIXEL_SCALE_FLOOR)
    outputs = np.full((1, 2, 1, 1), -1e4)  # black, and certain of it
    black = np.full((1, 1, 1), low, np.float32)
    actual = log_prob(Gaussian(low=low), outputs, black)
    np.testing.assert_allclose(actual, ceiling, rtol=1e-5)

    program = handlers.trace(GaussianOneScale(low=low))
    site = program.get_trace(jnp.zeros((1, 1, 1, 1)))["x_scale"]
    assert site["type"] == "param"
    floor = (1 - low) * PIXEL_SCALE_FLOOR
    assert site["value"] > floor
    constrain = jax.jit(lambda u: biject_to(site["kwargs"]["constraint"])(u))
    scales = np.asarray(constrain(np.float32([-1e4, -20.0, -5.0, 0.0, 3.0])))
    np.testing.assert_allclose(scales[0], floor, rtol=1e-6)
    assert (np.diff(scales) >= 0).all()
    assert scales[-1] > 10 * (1 - low)  # and nothing bounds it from above


def test_identity_covariance_has_a_bound(rng):
    outputs = rng.normal(0, 100, (50, 1, 8, 8))
    likelihood, bound = GaussianIdentity(low=-1.0), -math.log(2 * math.pi) / 2
    x = rng.uniform(-1, 1, (50, 8, 8))
    assert log_prob(likelihood, outputs, x).max() <= bound
    mean = 2 * special.expit(outputs[:, 0]) - 1
    np.testing.assert_allclose(log_prob(likelihood, outputs, mean), bound, rtol=1e-6)


# --- bits per dimension ---------------------------------------------------------------------------


def test_bits_per_dim_of_what_everyone_knows():
    dims = 32 * 32 * 3
    # every level alike
    for likelihood in (DiscretizedLogistic(), Gaussian(), Gaussian(low=-1.0), GaussianOneScale()):
        levels = 256 if isinstance(likelihood, DiscretizedLogistic) else 1 - likelihood.low
        nats = -dims * math.log(levels)
        assert likelihood.bits_per_dim(nats, dims) == pytest.approx(8, abs=1e-12)
    assert Bernoulli().bits_per_dim(-dims * math.log(2), dims) == pytest.approx(1, abs=1e-12)
    # identity covariance at its bound: log2(256 / 2) + log2(2 pi) / 2
    bits = GaussianIdentity(low=-1.0).bits_per_dim(-2823.0, dims)
    assert bits == pytest.approx(7 + math.log2(2 * math.pi) / 2, abs=1e-4)
    assert bits == pytest.approx(8.32, abs=0.01)


@pytest.mark.parametrize("family", [Gaussian, GaussianOneScale])
def test_bits_per_dim_do_not_depend_on_the_interval(family, rng):
    """On [-1, 1] every density is half of what it is on [0, 1]; the bits are the same."""
    images, dims = rng.integers(0, 256, (5, 4, 6), dtype=np.uint8), 24
    outputs = rng.normal(0, 1, (5, family.num_outputs, 4, 6))
    nats, bits = [], []
    for low in (0.0, -1.0):
        likelihood = family(low=low)
        x = prepare(likelihood, KEY, images)
        density = log_prob(likelihood, outputs, x, X_SCALE * (1 - low))
        nats.append(np.asarray(density, np.float64).sum((1, 2)))
        bits.append(likelihood.bits_per_dim(nats[-1], dims))
    np.testing.assert_allclose(nats[1], nats[0] - dims * math.log(2), rtol=1e-4)
    np.testing.assert_allclose(bits[1], bits[0], rtol=1e-4)


def test_the_density_bounds_the_probability_of_the_levels(rng):
    """Theis et al. 2016: in expectation the dequantised density costs more than the levels.

    The levels under the Gaussian that the density is of: integrals over bins one level wide.
    """
    images = rng.integers(100, 130, (400, 4, 4), dtype=np.uint8)
    likelihood = Gaussian()
    outputs = np.broadcast_to([[[[-0.2]], [[-1.5]]]], (400, 2, 4, 4))
    density = log_prob(likelihood, outputs, prepare(likelihood, KEY, images))
    density = np.asarray(density, np.float64).sum((1, 2))
    loc, scale = special.expit(-0.2), np.logaddexp(0, -2.5) + PIXEL_SCALE_FLOOR
    edges = stats.norm.cdf(np.arange(257) / 256, loc, scale)
    exact = -np.log2(np.diff(edges))[images].mean((1, 2))
    gap = likelihood.bits_per_dim(density, 16) - exact
    error = gap.std() / math.sqrt(len(gap))
    assert gap.mean() > -4 * error
    assert gap.mean() < 0.01  # the Gaussian is wide: nearly constant within a bin


# --- levels ---------------------------------------------------------------------------------------

LEVELS = np.arange(256.0)
LOCS = [-300.0, -20.3, 0.0, 0.5, 77.7, 127.5, 255.0, 280.0, 1_000.0]
SCALES = [0.01, 0.3, 1.0, 7.0, 100.0, 1e4]
LOC, SCALE = (np.array(v, np.float32) for v in zip(*itertools.product(LOCS, SCALES), strict=True))


def exact_levels(loc, scale, level):
    """log p(level) in float64: the difference of the logistic function taken in its lighter tail.

    Minus infinity where the difference is less than float64 holds.
    """
    above = (np.where(level == 255, np.inf, level + 0.5) - loc) / scale
    below = (np.where(level == 0, -np.inf, level - 0.5) - loc) / scale
    upper = below > 0
    p = np.where(
        upper,
        special.expit(-below) - special.expit(-above),
        special.expit(above) - special.expit(below),
    )
    with np.errstate(divide="ignore"):
        return np.log(p)


@pytest.fixture(scope="module")
def log_p():
    """log p(level) by loc, scale pair and level."""
    run = jax.jit(lambda loc, scale, level: Levels(loc, scale).log_prob(level))
    return np.asarray(run(LOC[:, None], SCALE[:, None], np.float32(LEVELS)))


def test_probabilities_of_the_levels_sum_to_one(log_p):
    assert np.isfinite(log_p).all()
    np.testing.assert_allclose(np.exp(log_p.astype(np.float64)).sum(1), 1, atol=1e-5)


def test_log_prob_is_a_difference_of_logistic_functions(log_p):
    exact = exact_levels(LOC.astype(float)[:, None], SCALE.astype(float)[:, None], LEVELS)
    held = exact > -600  # float64 ends at exp(-745)
    assert held.mean() > 0.7
    np.testing.assert_allclose(log_p[held], exact[held], rtol=3e-6, atol=3e-6)
    assert (log_p[~held] < -590).all()


def test_gradients_are_finite_and_those_of_the_exact_function():
    levels = np.float32([0.0, 1.0, 78.0, 254.0, 255.0])

    def log_prob(loc, scale, level):
        return Levels(loc, scale).log_prob(level)

    by_level = jax.vmap(jax.grad(log_prob, argnums=(0, 1)), in_axes=(None, None, 0))
    gradients = jax.jit(jax.vmap(by_level, in_axes=(0, 0, None)))(LOC, SCALE, levels)
    gradients = jax.device_get(gradients)
    assert all(np.isfinite(g).all() for g in gradients)

    moderate = (abs(LOC - 127) < 160) & (SCALE > 0.9) & (SCALE < 200)
    loc, scale = (v[moderate].astype(float)[:, None] for v in (LOC, SCALE))
    step = 1e-4 * scale
    by_loc = exact_levels(loc + step, scale, levels) - exact_levels(loc - step, scale, levels)
    by_scale = exact_levels(loc, scale + step, levels) - exact_levels(loc, scale - step, levels)
    for actual, difference in zip(gradients, (by_loc, by_scale), strict=True):
        np.testing.assert_allclose(actual[moderate], difference / (2 * step), rtol=1e-3, atol=1e-5)


def test_mean_is_the_sum_over_levels():
    p = np.exp(exact_levels(LOC.astype(float)[:, None], SCALE.astype(float)[:, None], LEVELS))
    mean = jax.jit(lambda loc, scale: Levels(loc, scale).mean)(LOC, SCALE)
    np.testing.assert_allclose(mean, p @ LEVELS, rtol=2e-5, atol=2e-4)


draw_levels = jax.jit(lambda key, loc, scale: Levels(loc, scale).sample(key, (50_000,)))


@pytest.mark.parametrize(("loc", "scale"), [(3.2, 2.0), (127.4, 0.2), (250.0, 30.0), (-40.0, 15.0)])
def test_levels_are_drawn_as_often_as_they_are_probable(loc, scale):
    draws = draw_levels(KEY, loc, scale)
    assert draws.shape == (50_000,)
    counts = np.bincount(np.asarray(draws).astype(int), minlength=256)
    expected = len(draws) * np.exp(exact_levels(loc, scale, LEVELS))
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 10:  # too rare even together: to the commonest
        observed, expected = observed[:-1], expected[:-1]
    assert stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-4
    assert observed.sum() >= len(draws) - 40


# --- every likelihood -----------------------------------------------------------------------------


@EVERY
def test_outputs_of_any_size_have_finite_densities_and_gradients(likelihood):
    extremes = [-1e4, -30.0, 0.0, 30.0, 1e4]
    outputs = np.array(list(itertools.product(extremes, repeat=likelihood.num_outputs)))
    outputs = np.broadcast_to(outputs[:, :, None, None], (*outputs.shape, 1, 3))
    middle = 1.0 if isinstance(likelihood, Bernoulli) else np.floor(likelihood.high / 2)
    x = np.float32([[likelihood.low, middle, likelihood.high]])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def differentiate(outputs, x_scale):
        log_prob = distribution(likelihood, outputs, x_scale).log_prob(x)
        return log_prob.sum(), log_prob

    for x_scale in (PIXEL_SCALE_FLOOR, 0.2, 1e4):
        gradients, log_prob = differentiate(outputs.astype(np.float32), x_scale)
        assert np.isfinite(log_prob).all()
        assert all(np.isfinite(g).all() for g in gradients)
        if not isinstance(likelihood, GaussianOneScale):  # the only one that x_scale is for
            break


@EVERY
def test_draws_lie_in_the_support_and_average_to_the_mean(likelihood, rng):
    x_shape = (2, 2, 3)
    outputs = rng.normal(0, 2, (4, likelihood.num_outputs, *x_shape))

    @jax.jit
    def draw(key):
        d = distribution(likelihood, outputs)
        assert d.batch_shape == (4, *x_shape)
        assert d.event_shape == ()
        draws = d.sample(key, (4_000,))
        return d.mean, draws, d.support(draws)

    mean, draws, supported = map(np.asarray, draw(KEY))
    assert mean.shape == (4, *x_shape)
    assert likelihood.low <= mean.min() <= mean.max() <= likelihood.high
    assert draws.shape == (4_000, 4, *x_shape)
    assert supported.all()
    draws = draws.astype(np.float64)
    error = draws.std(0) / math.sqrt(len(draws))
    unseen = 1e-3  # what fewer than one draw in a thousand has may be in none
    assert (abs(draws.mean(0) - mean) < 5 * error + unseen).all()


def test_likelihoods_are_values():
    assert len(set(LIKELIHOODS.values())) == len(LIKELIHOODS)
    for likelihood in LIKELIHOODS.values():
        assert likelihood == type(likelihood)()
        assert hash(likelihood) == hash(type(likelihood)())
    assert Gaussian(low=-1.0) != Gaussian()
    assert Gaussian(floor=0.1) != Gaussian()
    assert Gaussian(low=-1.0) == Gaussian(low=-1.0)


@pytest.mark.parametrize("family", [Gaussian, GaussianOneScale, GaussianIdentity])
def test_bad_values_are_named(family):
    with pytest.raises(ValueError, match=r"low: expected a number below 1, got 1\.0"):
        family(low=1.0)
    with pytest.raises(ValueError, match=r"floor: expected a positive.*got 0\.0"):
        family(floor=0.0)
    with pytest.raises(ValueError, match=r"low: expected a number below 1, got nan"):
        family(low=math.nan)


# --- binary pixels --------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_binary_pixels_and_their_gradient_are_exact_at_every_size(pixel):
    logits = np.concatenate([np.linspace(-1000, 1000, 4001), np.linspace(-20, 20, 801)])

    def log_prob(logit):
        return BinaryPixels(logits=logit).log_prob(pixel)

    run = jax.jit(jax.vmap(jax.value_and_grad(log_prob)))
    value, slope = run(logits.astype(np.float32))
    exact = -np.logaddexp(0, (1 - 2 * pixel) * logits)
    np.testing.assert_allclose(value, exact, rtol=3e-7, atol=1e-6)  # a difference of two numbers
    np.testing.assert_allclose(slope, pixel - special.expit(logits), atol=2e-7)


@pytest.mark.parametrize(
    ("x_shape", "logits_shape"),
    [
        ((2, 3, 4), (2, 3, 4)),
        ((2, 3, 4), (5, 2, 3, 4)),
        ((5, 1, 3, 4), (2, 3, 4)),
        ((2, 1, 4), (2, 3, 4)),
        ((4,), (2, 3, 4)),
        ((), (2, 3, 4)),
        ((2, 4), (5, 2, 4)),
        ((2, 4), (2, 4)),
    ],
)
def test_binary_pixels_of_any_shape_have_the_density_of_each(rng, x_shape, logits_shape):
    x, logits = rng.integers(0, 2, x_shape) * 1.0, rng.normal(size=logits_shape)
    found = BinaryPixels(logits=jnp.asarray(logits)).log_prob(jnp.asarray(x))
    expected = x * logits - np.logaddexp(0, logits)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
