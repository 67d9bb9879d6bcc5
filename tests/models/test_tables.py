"""Vectors: the likelihoods of tables against SciPy, and a VAE of rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random
from numpyro import handlers
from scipy import stats

from inference import fit
from models import guides, vae
from models.likelihoods import (
    LIKELIHOODS,
    PIXEL_LIKELIHOODS,
    Likelihood,
    NegativeBinomial,
    Normal,
    PixelLikelihood,
)

KEY = random.key(0)
MEAN, STD = np.array([3.0, -2e3, 1e-3]), np.array([0.5, 4e2, 1e-5])


def distribution(likelihood, outputs, **params):
    with handlers.substitute(data=params):
        return likelihood(jnp.asarray(outputs, jnp.float32))


def counts(num, rng, means=(0.3, 5.0, 400.0)):
    """Counts of which the mean varies from row to row, more than a Poisson's."""
    return rng.poisson(rng.gamma(2.0, np.array(means) / 2, (num, len(means))))


# --- Normal ---------------------------------------------------------------------------------------


def test_normal_is_scipys_on_the_users_scale(rng):
    likelihood, x_scale = Normal(MEAN, STD), np.array([0.3, 1.0, 2.0], np.float32)
    outputs = rng.normal(size=(5, 1, 3)).astype(np.float32)
    x = rng.normal(MEAN, STD, (5, 3)).astype(np.float32)
    run = jax.jit(lambda o, x: distribution(likelihood, o, x_scale=x_scale).log_prob(x))
    got = run(outputs, x)
    expected = stats.norm.logpdf(x, MEAN + STD * outputs[:, 0], STD * x_scale)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_an_encoder_sees_standardised_columns(rng):
    x = rng.normal(MEAN, STD, (4_000, 3))
    seen = np.asarray(Normal(x.mean(0), x.std(0)).view(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(seen.std(0), 1, atol=1e-2)


@pytest.mark.slow
def test_another_unit_of_a_column_costs_its_logarithm_and_nothing_else(rng):
    """The whole training is the same, in other units. Only rounding differs."""
    x = (rng.normal(size=(64, 1)) @ rng.normal(size=(1, 3)) + rng.normal(size=(64, 3))) * 0.1 + 5
    factor = np.array([1.0, 1000.0, 1.0])

    def trained(x):
        model = vae.Model(
            x_shape=(3,), num_latents=1, hidden=(4,), likelihood=Normal(x.mean(0), x.std(0))
        )
        settings = {"optimizer": optax.adam(1e-2), "num_steps": 30, "progress": False}
        data = {"x": x.astype(np.float32)}
        result = fit(model, guides.mean_field(model), data, preprocess=model.prepare, **settings)
        return np.asarray(result.elbo)

    np.testing.assert_allclose(trained(x * factor), trained(x) - math.log(1000), atol=1e-3)


def test_no_column_is_denser_than_the_floor_allows():
    likelihood = Normal(0.0, 10.0, floor=0.05)
    site = handlers.trace(likelihood).get_trace(jnp.zeros((2, 1, 3)))["x_scale"]
    assert site["value"].shape == (3,)
    assert site["kwargs"]["constraint"].lower_bound == 0.05


@pytest.mark.parametrize("x", [np.full((9, 3), 0.1), np.float32([[1, 2, 0.1]] * 9)])
def test_a_constant_column_is_refused_by_its_number(x):
    x[:, :2] += np.arange(9)[:, None]
    for std in (x.std(0), x.std(0) * [1, 1, 0]):  # a sum rounds: the first is not quite zero
        with pytest.raises(ValueError, match=r"^x_std: .*constant column 2 \(from 0\).*leave such"):
            Normal(x.mean(0), std)
    with pytest.raises(ValueError, match=r"constant columns 0, 1, .*, 9, \.\.\. \(from 0\)"):
        Normal(0.0, np.zeros(50))


# --- NegativeBinomial -----------------------------------------------------------------------------


def test_the_negative_binomial_is_scipys(rng):
    means, theta = np.array([0.5, 20.0, 900.0]), np.float32([0.2, 1.5, 30.0])
    outputs = rng.normal(0, 0.7, (50, 1, 3)).astype(np.float32)
    x = counts(50, rng)

    @jax.jit
    def run(outputs, x):
        d = distribution(NegativeBinomial(means), outputs, inverse_dispersion=theta)
        return d.log_prob(x), d.mean, d.variance

    log_prob, got_mean, variance = run(outputs, x.astype(np.float32))
    mean = means * np.exp(outputs[:, 0])
    expected = stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    np.testing.assert_allclose(log_prob, expected, rtol=2e-4)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-4)
    np.testing.assert_allclose(variance, mean + mean**2 / theta, rtol=1e-4)


def test_no_count_is_impossible_and_every_gradient_is_finite():
    x = np.float32([0.0, 1.0, 1e4])

    @jax.jit
    @jax.value_and_grad
    def run(outputs):
        likelihood = NegativeBinomial([0.0, 1.0, 1e3])  # a column of zeros may have a one
        return distribution(likelihood, outputs, inverse_dispersion=jnp.ones(3)).log_prob(x).sum()

    for size in (-100.0, -5.0, 0.0, 5.0, 50.0):
        value, gradient = run(np.full((1, 1, 3), size, np.float32))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_an_encoder_sees_the_logarithm_of_counts():
    x = jnp.array([[0.0, 1.0, 1e4]])
    np.testing.assert_allclose(NegativeBinomial().view(x), np.log1p(x), rtol=1e-6)


# --- both -----------------------------------------------------------------------------------------


def test_every_likelihood_keeps_its_protocol():
    for name, likelihood in LIKELIHOODS.items():
        assert isinstance(likelihood, Likelihood)
        assert isinstance(likelihood, PixelLikelihood) == (name in PIXEL_LIKELIHOODS)
        assert hash(likelihood) == hash(type(likelihood)())


def test_statistics_are_values_whatever_they_came_as():
    arrays = Normal(np.float32([1, 2]), jnp.array([3.0, 4.0]))
    assert arrays == Normal((1.0, 2.0), (3.0, 4.0)) == Normal([1, 2], [3, 4])
    assert hash(arrays) == hash(Normal((1.0, 2.0), (3.0, 4.0)))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8, bool])
@pytest.mark.parametrize("likelihood", [Normal(), NegativeBinomial()])
def test_numbers_of_any_type_stay_as_they_are(likelihood, dtype):
    x = np.array([[0, 1, 1], [1, 1, 0]], dtype)
    likelihood.check(x)
    prepared = likelihood.prepare(KEY, x)
    assert prepared.dtype == jnp.float32
    np.testing.assert_array_equal(prepared, x)


HUGE = 2.0**24


@pytest.mark.parametrize(
    ("likelihood", "x", "message"),
    [
        (Normal(), [[1.0, np.nan]], "finite numbers, got float64 from nan to nan; replace"),
        (Normal(), [[1.0, np.inf]], "finite numbers, got float64 from 1.0 to inf; replace"),
        (Normal(), [["a"]], "numbers, got <U1; give floats"),
        (NegativeBinomial(), [[-1]], "counts, .*got int64 from -1 to -1; use the likelihood N"),
        (NegativeBinomial(), [[0.5, 1]], "counts, .*from 0.5 to 1.0, some of them fractions; use"),
        (NegativeBinomial(), [[HUGE]], r"counts, .*below 2\^24, got float64 from 16777216"),
        (NegativeBinomial(), [[np.nan]], "finite numbers, got float64 from nan to nan"),
    ],
)
def test_other_data_are_refused_with_what_to_do(likelihood, x, message):
    with pytest.raises(ValueError, match=f"^x: expected {message}"):
        likelihood.check(np.array(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normal(np.nan), "x_mean, x_std: expected finite numbers"),
        (lambda: Normal(np.zeros((2, 2))), r"x_mean: expected one number or \(D,\), got .*\(2, 2"),
        (lambda: Normal(floor=0.0), "floor: expected a positive"),
        (lambda: NegativeBinomial([1.0, -1.0]), "x_mean: expected means of counts.* column 1 "),
        (lambda: distribution(Normal([1, 2, 3]), np.zeros((2, 1, 4))), r"x_mean: .*\(4,\), got 3;"),
        (
            lambda: distribution(NegativeBinomial([1, 2]), np.zeros((2, 1, 2, 2))),
            r"\(2, 2\), got 2",
        ),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_a_vae_of_counts_trains(rng):
    x = counts(60, rng)
    likelihood = NegativeBinomial(x.mean(0))
    model = vae.Model(x_shape=(3,), num_latents=1, hidden=(4,), likelihood=likelihood)
    settings = {"optimizer": optax.adam(1e-2), "num_steps": 100, "progress": False}
    result = fit(model, guides.mean_field(model), {"x": x}, preprocess=model.prepare, **settings)
    elbo = np.asarray(result.elbo)[0]
    assert elbo[-20:].mean() > elbo[:20].mean()
    assert result.params_of(0)["inverse_dispersion"].shape == (3,)


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_a_vae_of_rows_generates(likelihood):
    model = vae.Model(x_shape=(3,), num_latents=1, hidden=(), likelihood=likelihood)
    sites = {}
    jax.eval_shape(lambda: sites.update(handlers.trace(handlers.seed(model, 0)).get_trace()))
    assert sites["x"]["value"].shape == (1, 3)
    assert sites["x"]["fn"].event_shape == (3,)
