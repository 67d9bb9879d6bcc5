"""The judges, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from scipy import stats

from inference import (
    Estimate,
    Fit,
    elbo_terms,
    evaluation,
    label_check,
    log_likelihood,
    pareto_k_threshold,
    pointwise_elbo,
    pointwise_log_likelihood,
)
from inference.sites import DataPlates
from models import gaussian_mean

X = np.linspace(-2, 2, 9, dtype=np.float32)
KEY = jax.random.key(0)


def model(x):
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(x):
    weight = numpyro.param("weight", 0.0)
    with numpyro.plate("rows", len(x)):
        loc = jnp.stack([weight * x, weight * x], axis=-1)
        numpyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def exact(weight):
    """-KL(q || prior) + E_q log N(x; z1 + z2, 1): quadratics of a Gaussian."""
    x, variance = np.asarray(X), 0.25
    kl = 2 * 0.5 * (variance + (weight * x) ** 2 - 1 - np.log(variance))
    error = (x - 2 * weight * x) ** 2 + 2 * variance
    return -kl - 0.5 * (error + np.log(2 * np.pi))


def known(model, guide, params, data):
    """A fit of known parameters."""
    return Fit.from_params(model, guide, params, example=data)


def tiled(times, data=None):
    """Every datum so often: each has draws of its own."""
    return {n: np.tile(array, times) for n, array in ({"x": X} if data is None else data).items()}


PAIR = known(model, guide, {"weight": 0.2}, {"x": X})
MANY = tiled(1000)


def test_agrees_with_the_closed_form_datum_by_datum():
    judged = pointwise_elbo(PAIR, MANY, key=KEY)
    draws = judged.pointwise.reshape(1000, 9)
    error = draws.std(0) / 1000**0.5
    assert (abs(draws.mean(0) - exact(0.2)) < 4.5 * error).all()
    assert judged.name == "elbo"
    assert judged.num_samples == 1
    assert judged.estimate.shape == judged.standard_error.shape == (1,)


def test_an_estimate_knows_which_data_it_judged():
    x = MANY["x"]
    first, same, other = (pointwise_elbo(PAIR, {"x": x}).data["x"] for x in (x, x.copy(), x + 1))
    assert first.startswith("float32[9000] sha256:")
    assert first == same != other


def test_num_samples_is_a_mean_over_draws():
    one, many = (
        pointwise_elbo(PAIR, MANY, key=KEY, num_samples=n).pointwise.reshape(1000, 9).std(0)
        for n in (1, 25)
    )
    # two standard deviations from 1,000 draws each: relative error sqrt(2 / 2,000)
    assert (abs(many / one / 0.2 - 1) < 4.5 * (2 / 2000) ** 0.5).all()


def test_other_plates_are_summed_within_the_datum():
    def nested_model(x):
        with numpyro.plate("rows", len(x), dim=-2), numpyro.plate("inner", 3, dim=-1):
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    data = {"x": np.arange(12, dtype=np.float32).reshape(4, 3)}
    elbo = pointwise_elbo(known(nested_model, lambda x: None, {}, data), data)
    expected = stats.norm.logpdf(data["x"]).sum(1)
    np.testing.assert_allclose(elbo.pointwise, expected[None], rtol=1e-6)


# --- the toy, whose likelihood and posterior are formulas -----------------------------------------

TRUTH = gaussian_mean.Truth(mu_0=0.5, sigma_0=1.2, sigma=0.8)
OPTIMUM = gaussian_mean.optimum(TRUTH)
TOY = gaussian_mean.Model(TRUTH.sigma_0), gaussian_mean.Guide(TRUTH.sigma_0)
DATA = TRUTH.simulate(23, seed=0)
EXACT = np.asarray(gaussian_mean.log_likelihood(OPTIMUM, TRUTH.sigma_0, DATA["c"], DATA["x"]))
AWAY = OPTIMUM | {"phi_3": OPTIMUM["phi_3"] + 0.6, "phi_4": OPTIMUM["phi_4"] + 0.5}
AT_OPTIMUM, AWAY_FROM_IT = (known(*TOY, params, DATA) for params in (OPTIMUM, AWAY))


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 5), (29, 100)])
def test_at_the_optimum_any_number_of_samples_gives_the_exact_log_likelihood(
    num_samples, batch_size
):
    settings = {"num_samples": num_samples, "batch_size": batch_size}
    result = log_likelihood(AT_OPTIMUM, DATA, **settings)
    assert result.name == "log_likelihood"
    assert result.num_samples == num_samples
    np.testing.assert_allclose(result.pointwise[0], EXACT, atol=1e-5)
    np.testing.assert_allclose(result.monte_carlo_variance, 0, atol=1e-6)
    assert result.estimate[0] == pytest.approx(EXACT.mean(), abs=1e-5)
    assert result.standard_error[0] == pytest.approx(EXACT.std() / 23**0.5, rel=1e-4)


def test_far_in_the_tail_nothing_underflows():
    far = {"c": DATA["c"], "x": DATA["x"] + 1e4}
    exact = gaussian_mean.log_likelihood(OPTIMUM, TRUTH.sigma_0, far["c"], far["x"])
    result = log_likelihood(AT_OPTIMUM, far, num_samples=29)
    assert exact.max() < -1e7
    np.testing.assert_allclose(result.pointwise[0], exact, rtol=1e-5)


def test_away_from_the_optimum_the_estimate_rises_to_the_exact_one():
    repeated = tiled(100, DATA)
    gaps = []
    for num_samples in (1, 100):
        settings = {"key": KEY, "num_samples": num_samples, "batch_size": 1000}
        result = log_likelihood(AWAY_FROM_IT, repeated, **settings)
        gap = result.pointwise[0] - np.tile(EXACT, 100)
        error = gap.std() / len(gap) ** 0.5
        assert gap.mean() < 4.5 * error
        ratio = np.exp(gap)  # of the estimate to p(x | c): unbiased
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / len(ratio) ** 0.5
        gaps.append(gap.mean())
    assert gaps[0] < 25 * gaps[1] < 0
    elbo = elbo_terms(AWAY_FROM_IT, repeated).elbo
    spread = np.hypot(elbo.pointwise.std(), gap.std()) / len(gap) ** 0.5
    assert abs(elbo.estimate[0] - EXACT.mean() - gaps[0]) < 4.5 * spread  # one sample: the ELBO


def test_the_monte_carlo_error_is_the_deviation_between_repetitions():
    repeated = {name: np.repeat(array, 300) for name, array in DATA.items()}
    result = log_likelihood(AWAY_FROM_IT, repeated, num_samples=100, batch_size=1000)
    deviation = result.pointwise.reshape(23, 300).std(1)
    claimed = np.sqrt(result.monte_carlo_variance.reshape(23, 300).mean(1))
    # a deviation from 300 draws is good to sqrt(1 / 600); the claim is to first order in 1 / 100
    np.testing.assert_allclose(deviation, claimed, rtol=5 * 600**-0.5)
    error = result.monte_carlo_error[0]
    assert error == pytest.approx(np.sqrt((claimed**2).mean() / len(repeated["x"])), rel=1e-4)


def drawing(params):
    """From a key to the toy's log weights."""
    plates = DataPlates(frozenset({"data"}))
    data = {name: jnp.asarray(array) for name, array in DATA.items()}
    return evaluation._importance_weights(*TOY, plates, evaluation.Sums(), params, data)


def test_memory_does_not_grow_with_the_samples():
    draw = drawing(AWAY)

    @functools.cache
    def needed(num_samples, num_largest=0):
        sampler = jax.jit(
            lambda key: evaluation.importance_sample(draw, key, num_samples, num_largest)
        )
        return sampler.lower(KEY).compile().memory_analysis().temp_size_in_bytes

    assert needed(100_000) == needed(100)
    # the tail and a new one, its indices and what sorting takes: not the 100,000 of each datum
    assert needed(100_000, 950) - needed(100) < 20 * 950 * 4 * len(DATA["x"])


# --- k-hat ----------------------------------------------------------------------------------------


def narrow(share):
    """The toy's optimum, its guide's variance only this share of the posterior's."""
    return OPTIMUM | {"phi_4": OPTIMUM["phi_4"] + np.float32(np.log(share))}


@pytest.mark.parametrize(("num_samples", "share"), [(30, 0.5), (1000, 0.05)])
def test_pareto_k_is_arvizs_own_on_all_the_weights(num_samples, share):
    draw = jax.jit(jax.vmap(drawing(narrow(share))))
    key, at_once = jax.random.fold_in(KEY, 0), evaluation.DRAWS_AT_ONCE
    keys = [jax.random.fold_in(key, i) for i in range(-(-num_samples // at_once))]
    log_w = np.concatenate([draw(jax.random.split(key, at_once)) for key in keys])[:num_samples]
    expected = array_stats.psislw(-log_w.T.astype(np.float64))[1]  # it takes the logs of 1 / w
    fitted = known(*TOY, narrow(share), DATA)
    result = log_likelihood(fitted, DATA, key=KEY, num_samples=num_samples)
    # one program rounds log weights otherwise than another
    np.testing.assert_allclose(result.pareto_k[0], expected, rtol=5e-3, atol=1e-3)


def test_constant_weights_have_no_tail():
    for scale in (1.0, 1e3):  # rounding grows with the log weights
        data = {"c": DATA["c"], "x": DATA["x"] * np.float32(scale)}
        result = log_likelihood(AT_OPTIMUM, data, num_samples=1000)
        assert (result.pareto_k == -np.inf).all()
        assert result.high_pareto_k.estimate[0] == 0


def prior_only(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Uniform(0.0, 1.0))


def test_a_tail_of_one_weight_is_none_though_others_are_smaller():
    """About a fifth of the draws, which is the tail, weigh e times as much as the rest."""

    def step(x):
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Uniform(0.0, 1.0))
            numpyro.factor("weight", jnp.where(z < 0.2, 1.0, 0.0) + x)

    data = {"x": np.zeros(200, np.float32)}
    result = log_likelihood(known(step, prior_only, {}, data), data, num_samples=100)
    num_greater = np.round((np.exp(result.pointwise) - 1) / (np.e - 1) * 100).astype(int)
    assert {19, 20, 21} <= set(num_greater[0])
    np.testing.assert_array_equal(result.pareto_k == -np.inf, num_greater >= 20)


def test_weights_that_are_all_zero_have_no_pareto_k():
    def impossible(x):
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Uniform(0.0, 1.0))
            numpyro.factor("x", jnp.where(abs(x - z) < 1, jnp.log(0.5), -jnp.inf))

    data = {"x": np.array([0.0, 50.0], np.float32)}
    result = log_likelihood(known(impossible, prior_only, {}, data), data, num_samples=100)
    assert result.pointwise[0, 1] == -np.inf
    assert np.isnan(result.pareto_k[0, 1])
    assert result.pareto_k[0, 0] == -np.inf  # zero or the same: bounded
    assert result.high_pareto_k.pointwise.tolist() == [[0, 1]]


def test_a_guide_too_narrow_has_high_pareto_k():
    def judged(share):
        fitted = known(*TOY, narrow(share), DATA)
        return log_likelihood(fitted, tiled(5, DATA), num_samples=1000, batch_size=23)

    # The weights of a Gaussian with a share of the variance have Pareto's k = 1 - share.
    bad, better, good = (judged(share) for share in (0.05, 0.5, 1.5))
    assert bad.high_pareto_k.estimate[0] > 0.5
    assert good.high_pareto_k.estimate[0] == 0
    assert bad.pareto_k.mean() > better.pareto_k.mean() > good.pareto_k.mean()


def test_the_threshold_and_the_share_above_it():
    assert pareto_k_threshold(100) == pytest.approx(0.5)
    assert pareto_k_threshold(1000) == pytest.approx(2 / 3)
    assert pareto_k_threshold(10_000) == pytest.approx(0.7)
    k = np.array([[0.4, 0.5, 0.6, np.nan, -np.inf], [0.0] * 5])
    share = Estimate("log_likelihood", np.zeros((2, 5)), 100, {}, pareto_k=k).high_pareto_k
    np.testing.assert_array_equal(share.pointwise, [[0, 1, 1, 1, 0], [0] * 5])
    np.testing.assert_allclose(share.estimate, [0.6, 0])


def test_too_few_samples_have_no_pareto_k():
    result = log_likelihood(AWAY_FROM_IT, DATA, num_samples=29)
    assert result.pareto_k is None
    assert result.high_pareto_k is None


def test_one_program_is_traced_for_all_batches():
    def count(batch_size):
        calls = 0

        def counted(c, x=None):
            nonlocal calls
            calls += 1
            TOY[0](c, x)

        fitted = known(counted, TOY[1], AWAY, DATA)
        pointwise_elbo(fitted, DATA, batch_size=batch_size)
        return calls

    assert count(4) == count(23)


# --- the terms of the ELBO ------------------------------------------------------------------------


def test_divergence_is_exact_and_the_elbo_is_the_difference():
    terms = elbo_terms(PAIR, {"x": X}, batch_size=4)
    per_dim = 0.5 * (0.25 + (0.2 * X) ** 2 - 1 - np.log(0.25))
    np.testing.assert_allclose(terms.kl_per_dim["z"][0], np.stack([per_dim] * 2, 1), rtol=1e-5)
    np.testing.assert_allclose(terms.kl.pointwise[0], 2 * per_dim, rtol=1e-5)
    np.testing.assert_allclose(terms.z_loc["z"][0], 0.2 * np.stack([X, X], 1), rtol=1e-6)
    np.testing.assert_allclose(
        terms.elbo.pointwise, terms.reconstruction.pointwise - terms.kl.pointwise, rtol=1e-6
    )


def test_terms_add_up_to_the_closed_form():
    terms = elbo_terms(PAIR, tiled(500), num_samples=4)
    values = terms.elbo.pointwise.reshape(500, 9)
    error = values.std(0) / 500**0.5
    assert (abs(values.mean(0) - exact(0.2)) < 4.5 * error).all()


def test_where_there_is_no_formula_the_divergence_is_sampled():
    def flat_guide(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.StudentT(8.0, jnp.zeros((len(x), 2)), 0.9).to_event(1))

    zeros = {"x": np.zeros(5_000, np.float32)}
    terms = elbo_terms(known(model, flat_guide, {}, zeros), zeros, batch_size=5_000)
    grid = np.linspace(-40, 40, 20_001)
    log_q = stats.t(8.0, 0.0, 0.9).logpdf(grid)
    log_p = -0.5 * grid**2 - 0.5 * np.log(2 * np.pi)
    kl = 2 * np.trapezoid(np.exp(log_q) * (log_q - log_p), grid)
    assert terms.kl_per_dim == {}
    assert abs(terms.kl.estimate[0] - kl) < 4.5 * terms.kl.standard_error[0]


def test_two_latent_sites_are_sampled_since_one_may_depend_on_the_other():
    def chain(x):
        with numpyro.plate("rows", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def backwards(x):
        with numpyro.plate("rows", len(x)):
            b = numpyro.sample("b", dist.Normal(0.0, 2**0.5).expand([len(x)]))
            numpyro.sample("a", dist.Normal(b / 2, 0.5**0.5))

    terms = elbo_terms(known(chain, backwards, {}, {"x": X}), {"x": X})
    np.testing.assert_allclose(terms.kl.pointwise, 0, atol=1e-5)  # q is the prior, read backwards


def test_active_units_are_those_whose_mean_follows_the_data():
    def half_guide(x):
        with numpyro.plate("rows", len(x)):
            loc = jnp.stack([x, 0.05 * x], axis=-1)
            numpyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    terms = elbo_terms(known(model, half_guide, {}, {"x": X}), {"x": X})
    assert terms.active["z"].tolist() == [[True, False]]
    variance, error = terms.activity["z"]
    np.testing.assert_allclose(variance[0], np.var(X) * np.array([1, 0.05**2]), rtol=1e-5)
    squares = (X - np.mean(X)) ** 2
    np.testing.assert_allclose(error[0, 0], squares.std() / 3, rtol=1e-5)


@pytest.mark.parametrize("num_samples", [2, 9])
def test_what_a_site_varies_by_the_draws_before_it_is_no_activity(num_samples):
    def chain(x):
        with numpyro.plate("rows", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([len(x)]))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def blind(x):
        with numpyro.plate("rows", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0).expand([len(x)]))
            numpyro.sample("b", dist.Normal(a + 0.3 * x, 0.5))

    x = np.random.default_rng(0).normal(size=2_000).astype(np.float32)
    terms = elbo_terms(known(chain, blind, {}, {"x": x}), {"x": x}, num_samples=num_samples)
    (variance, error), share = terms.activity["b"], 1 / num_samples
    assert terms.z_loc["b"].var() > 0.09 + 0.8 * share  # the draws of a are in it
    assert abs(variance[0, 0] - 0.3**2 * x.var()) < 4 * error[0, 0]
    assert error[0, 0] < 0.5 * share
    assert terms.activity["a"][0][0, 0] == 0


# --- labels ---------------------------------------------------------------------------------------


def test_label_check_against_bayes_rule():
    rng = np.random.default_rng(3)
    c = rng.integers(3, size=400)
    x = rng.normal(OPTIMUM["theta_1"] + OPTIMUM["theta_2"] * c, TRUTH.marginal_variance**0.5)
    data = {"c": c.astype(np.float32), "x": x.astype(np.float32)}
    check = label_check(AT_OPTIMUM, data, 3, num_samples=2, batch_size=150)
    labels = [np.full(400, k, np.float32) for k in range(3)]
    exact = np.stack(
        [gaussian_mean.log_likelihood(OPTIMUM, TRUTH.sigma_0, k, data["x"]) for k in labels], axis=1
    )
    np.testing.assert_allclose(check.log_likelihood[0], exact, atol=2e-5)
    assert check.accuracy.estimate[0] == pytest.approx((exact.argmax(1) == c).mean())
    mixture = np.log(np.exp(exact).mean(1))
    expected = exact[np.arange(400), c] - mixture
    np.testing.assert_allclose(check.information.pointwise[0], expected, atol=2e-5)
    assert check.information.pointwise.max() <= np.log(3) + 1e-9
    assert check.information.estimate[0] > 5 * check.information.standard_error[0]


def test_label_check_needs_labels():
    with pytest.raises(ValueError, match='expected labels as "c"'):
        label_check(PAIR, {"x": X}, 3)


# --- densities given draws ------------------------------------------------------------------------


def test_log_likelihood_given_draws_is_the_formula():
    draws = {"z": np.random.default_rng(0).normal(size=(1, 7, 9, 2)).astype(np.float32)}
    found = pointwise_log_likelihood(PAIR, draws, {"x": X}, batch_size=4)
    expected = stats.norm.logpdf(X, draws["z"].sum(-1))
    assert found.keys() == {"x"}
    np.testing.assert_allclose(found["x"], expected, rtol=1e-5, atol=1e-6)
