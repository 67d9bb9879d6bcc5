"""Brackets of log p(x | c): they hold the exact value, and close in on it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from inference import Fit, annealing, bracket, fit, log_likelihood
from models import gaussian_mean, guides

NUM = 150
STARTS = ("prior", "guide")


def error(values):
    """The standard error of a mean."""
    return np.std(values) / np.sqrt(len(values))


# --- the linear-Gaussian rung ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_the_bracket_holds_the_exact_value_and_closes_in(rung, start):
    """exp(lower - log p) and exp(log p - upper) have the mean 1: the bounds hold in expectation."""
    widths = []
    for num_steps in (10, 100):
        found = bracket(
            rung.fit(factorises=True),
            num_simulations=NUM,
            num_steps=num_steps,
            start=start,
            num_chains=4,
            num_leaps=5,
            num_samples=0,
        )
        exact = rung.log_likelihood(found.simulated[0])
        below, above = found.lower.pointwise[0] - exact, found.upper.pointwise[0] - exact
        assert below.mean() < 4 * error(below)
        assert above.mean() > -4 * error(above)
        widths.append(found.gap.estimate[0])
        np.testing.assert_allclose(widths[-1], above.mean() - below.mean(), rtol=1e-4, atol=1e-5)
    assert widths[0] > 2 * widths[1]
    for weights in (np.exp(below), np.exp(-above)):
        assert abs(weights.mean() - 1) < 4 * error(weights)
    assert widths[-1] < 0.15


@pytest.mark.slow
def test_a_broken_guide_does_not_spoil_the_bound_from_the_prior(rung):
    broken, data = rung.fit(scale=0.3, shift=0.5), rung.data(NUM, seed=4)
    exact = rung.log_likelihood(data)
    found = bracket(broken, data, num_steps=200, num_chains=4, num_leaps=5, num_samples=100)
    loss = exact - found.lower.pointwise[0]
    assert loss.mean() < 0.05 + 4 * error(loss)
    beside = exact - found.importance.pointwise[0]
    assert beside.mean() > loss.mean() + 4 * error(beside - loss)
    assert found.upper is None
    assert found.gap is None
    assert "k-hat is too high for" in repr(found)
    np.testing.assert_array_equal(
        found.importance.pointwise, log_likelihood(broken, data, num_samples=100).pointwise
    )


@pytest.mark.slow
def test_errors_are_those_of_repetitions(rung):
    data, result = rung.data(40, seed=5), rung.fit(factorises=True)
    found = [
        bracket(result, data, num_steps=30, num_leaps=3, num_samples=0, key=jax.random.key(i))
        for i in range(8)
    ]
    spread = np.var([one.lower.estimate[0] for one in found], ddof=1)
    stated = np.mean([one.lower.monte_carlo_error[0] ** 2 for one in found])
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 7) / 7
    assert low < spread / stated < high


@pytest.mark.slow
def test_step_sizes_follow_the_temperature(rung):
    """A posterior of narrow dimensions needs small steps, and the start does not."""
    result = rung.fit()
    judged = annealing.judged_data(result, rung.data(30, seed=0))
    walk = annealing.Walk(num_steps=100, num_chains=2, num_leaps=5, start="prior")
    steps = annealing._step_sizes(walk, result, judged, jax.random.key(0))
    assert steps.shape == (100,)
    assert steps[-10:].mean() < steps[:10].mean()
    found = bracket(result, rung.data(30, seed=0), num_steps=100, num_leaps=5, num_samples=0)
    assert abs(found.acceptance.mean() - annealing.ACCEPTANCE) < 0.1


def test_temperatures_rise_from_0_to_1():
    t = annealing.Walk(7, 1, 1, "prior").temperatures
    assert t[0] == 0
    assert t[-1] == 1
    assert (np.diff(t) > 0).all()
    np.testing.assert_allclose(t, 1 - t[::-1], atol=1e-12)


# --- other programs -------------------------------------------------------------------------------


def prior_of_z(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0, 1))


def positive(c, x=None):
    """x is Poisson, its rate Gamma(2, 1) times c: log p(x | c) is a formula."""
    with numpyro.plate("rows", len(c)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("count", dist.Poisson(rate * c), obs=x)


@pytest.mark.slow
def test_positive_latents_and_conditions():
    rng = np.random.default_rng(0)
    c = rng.uniform(1, 3, size=NUM).astype(np.float32)
    data = {"c": c, "x": rng.poisson(rng.gamma(2.0, size=NUM) * c).astype(np.int32)}
    guide = guides.mean_field(positive)
    result = fit(positive, guide, data, num_steps=300, progress=False)
    found = bracket(result, num_simulations=NUM, c=c, num_steps=60, num_leaps=4, num_samples=0)
    made = found.simulated[0]
    exact = stats.nbinom.logpmf(made["x"], 2, 1 / (1 + made["c"]))
    below, above = found.lower.pointwise[0] - exact, found.upper.pointwise[0] - exact
    for weights in (np.exp(below), np.exp(-above)):
        assert abs(weights.mean() - 1) < 4 * error(weights) + 1e-4
    assert -0.1 < below.mean() <= 4 * error(below)


@pytest.mark.slow
def test_a_model_that_computes_its_observations_has_a_bound_from_below():
    def model(x=None):
        with numpyro.plate("data", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=None if x is None else jnp.log(x))

    x = np.exp(np.random.default_rng(0).normal(scale=1.4, size=NUM)).astype(np.float32)
    result = Fit.from_params(model, prior_of_z, {}, example={"x": x})
    found = bracket(result, {"x": x}, num_steps=100, num_leaps=4, num_samples=0)
    off = found.lower.pointwise[0] - stats.norm.logpdf(np.log(x), scale=2**0.5)
    assert -0.1 < off.mean() < 4 * error(off)
    with pytest.raises(ValueError, match="got 'y', which the model computes from x"):
        bracket(result, num_simulations=5)


@pytest.mark.slow
def test_every_seed_gets_its_own_bracket():
    data = gaussian_mean.Truth().simulate(60, seed=0)
    programs = gaussian_mean.Model(), gaussian_mean.Guide()
    result = fit(*programs, data, num_steps=2, num_seeds=2, progress=False)
    settings = {"num_steps": 20, "num_leaps": 3, "num_samples": 30}
    found = bracket(result, data, batch_size=25, **settings)
    assert found.lower.pointwise.shape == found.importance.pointwise.shape == (2, 60)
    exact = [
        gaussian_mean.log_likelihood(result.params_of(i), 1.0, **data).mean() for i in range(2)
    ]
    off = found.lower.estimate - exact
    assert (abs(off) < 0.05 + 4 * found.lower.monte_carlo_error).all()
    lines = str(found).splitlines()
    assert sum("annealing, from below" in line for line in lines) == 2
    assert "importance sampling" in str(found)
    assert "nats per datum" in lines[0]


# --- what has no bracket --------------------------------------------------------------------------


def test_arguments_that_make_no_sense(rung):
    result, data = rung.fit(), rung.data(5, seed=0)
    cases = [
        ({}, "expected either data or num_simulations, got neither"),
        ({"data": data, "num_simulations": 5}, "got both"),
        ({"data": data, "c": data["x"]}, "expected conditions among the data, got 'c'"),
        ({"data": data, "start": "middle"}, "start: expected one of prior, guide, got 'middle'"),
        ({"data": data, "num_steps": 0}, "num_steps"),
        ({"data": data, "num_chains": 0}, "num_chains"),
        ({"num_simulations": 5, "x": data["x"]}, "got 'x', which the model simulates"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words) as caught:
            bracket(result, **arguments)
        assert "\n" not in str(caught.value)


def test_sites_that_cannot_move():
    def discrete(x=None):
        with numpyro.plate("data", 1 if x is None else len(x)):
            k = numpyro.sample("k", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def of_discrete(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("k", dist.Bernoulli(0.3))

    def shared(x=None):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", 1 if x is None else len(x)):
            numpyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def of_shared(x):
        numpyro.sample("mu", dist.Normal(0, 1))

    x = {"x": np.zeros(4, np.float32)}
    cases = [
        (discrete, of_discrete, "got 'k', which is discrete"),
        (shared, of_shared, "got the global site 'mu'.*log_predictive_density"),
    ]
    for model, guide, words in cases:
        with pytest.raises(ValueError, match=words):
            bracket(Fit.from_params(model, guide, {}, example=x), x)
