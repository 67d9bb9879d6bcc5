"""The judges, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats

from inference import (
    Estimate,
    elbo_terms,
    evaluation,
    label_check,
    log_likelihood,
    pareto_k_threshold,
    pointwise_elbo,
)
from models import gaussian_mean

X = jnp.linspace(-2, 2, 9)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(x):
    weight = numpyro.param("weight", 0.0)
    with numpyro.plate("data", len(x)):
        loc = jnp.stack([weight * x, weight * x], axis=-1)
        numpyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def exact(weight):
    """-KL(q || prior) + E_q log N(x; z1 + z2, 1): quadratics of a Gaussian."""
    x, variance = np.asarray(X), 0.25
    kl = 2 * 0.5 * (variance + (weight * x) ** 2 - 1 - np.log(variance))
    error = (x - 2 * weight * x) ** 2 + 2 * variance
    return -kl - 0.5 * (error + np.log(2 * np.pi))


def test_agrees_with_the_closed_form_datum_by_datum():
    draws = jax.jit(
        jax.vmap(lambda key: pointwise_elbo(model, guide, {"weight": 0.2}, {"x": X}, key=key))
    )(jax.random.split(jax.random.key(0), 4_000))
    error = draws.std(0) / len(draws) ** 0.5
    assert draws.shape == (4_000, 9)
    assert (abs(draws.mean(0) - exact(0.2)) < 4.5 * error).all()


def test_num_samples_is_a_mean_over_draws():
    keys = jax.random.split(jax.random.key(1), 200)

    def evaluate(num_samples):
        return jax.jit(
            jax.vmap(
                lambda key: pointwise_elbo(
                    model, guide, {"weight": 0.2}, {"x": X}, key=key, num_samples=num_samples
                )
            )
        )(keys)

    one, many = evaluate(1), evaluate(100)
    ratio = many.std(0) / one.std(0)
    # two standard deviations from 200 draws each: relative error sqrt(2 / 400)
    assert (abs(ratio / 0.1 - 1) < 4.5 * (2 / 400) ** 0.5).all()


def test_other_plates_are_summed_within_the_datum():
    def nested_model(x):
        with numpyro.plate("data", len(x), dim=-2), numpyro.plate("inner", 3, dim=-1):
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = jnp.arange(12.0).reshape(4, 3)
    elbo = pointwise_elbo(nested_model, lambda x: None, {}, {"x": x}, key=jax.random.key(0))
    np.testing.assert_allclose(elbo, dist.Normal(0.0, 1.0).log_prob(x).sum(1), rtol=1e-6)


def test_a_global_site_belongs_to_no_datum():
    def global_model(x):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def global_guide(x):
        numpyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'm': expected it in the plate \"data\""):
        pointwise_elbo(global_model, global_guide, {}, {"x": X}, key=jax.random.key(0))


# --- the toy, whose likelihood and posterior are formulas -----------------------------------------

TRUTH = gaussian_mean.Truth(mu_0=0.5, sigma_0=1.2, sigma=0.8)
OPTIMUM = gaussian_mean.optimum(TRUTH)
TOY = gaussian_mean.Model(TRUTH.sigma_0), gaussian_mean.Guide(TRUTH.sigma_0)
DATA = TRUTH.simulate(23, seed=0)
EXACT = np.asarray(gaussian_mean.log_likelihood(OPTIMUM, TRUTH.sigma_0, DATA["c"], DATA["x"]))
AWAY = OPTIMUM | {"phi_3": OPTIMUM["phi_3"] + 0.6, "phi_4": OPTIMUM["phi_4"] + 0.5}
KEY = jax.random.key(0)


@pytest.mark.parametrize("num_samples", [1, 7, 20, 21, 50])
@pytest.mark.parametrize("batch_size", [5, 100])
def test_at_the_optimum_any_number_of_samples_gives_the_exact_log_likelihood(
    num_samples, batch_size
):
    result = log_likelihood(
        *TOY, OPTIMUM, DATA, key=KEY, num_samples=num_samples, batch_size=batch_size
    )
    assert result.num_samples == num_samples
    np.testing.assert_allclose(result.pointwise, EXACT, atol=1e-5)
    np.testing.assert_allclose(result.monte_carlo_variance, 0, atol=1e-6)
    assert result.estimate == pytest.approx(EXACT.mean(), abs=1e-5)
    assert result.standard_error == pytest.approx(EXACT.std() / 23**0.5, rel=1e-4)


def test_far_in_the_tail_nothing_underflows():
    far = {"c": DATA["c"], "x": DATA["x"] + 1e4}
    exact = gaussian_mean.log_likelihood(OPTIMUM, TRUTH.sigma_0, far["c"], far["x"])
    result = log_likelihood(*TOY, OPTIMUM, far, key=KEY, num_samples=30)
    assert exact.max() < -1e7
    np.testing.assert_allclose(result.pointwise, exact, rtol=1e-5)


def test_away_from_the_optimum_the_estimate_rises_to_the_exact_one():
    repeated = {name: np.tile(array, 200) for name, array in DATA.items()}
    gaps = []
    for num_samples in (1, 10, 100):
        result = log_likelihood(
            *TOY, AWAY, repeated, key=KEY, num_samples=num_samples, batch_size=1000
        )
        gap = result.pointwise - np.tile(EXACT, 200)
        error = gap.std() / len(gap) ** 0.5
        assert gap.mean() < 4.5 * error
        ratio = np.exp(gap)  # of the estimate to p(x | c): unbiased
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / len(ratio) ** 0.5
        gaps.append(gap.mean())
    assert gaps[0] < 5 * gaps[1] < 25 * gaps[2] < 0
    elbo = elbo_terms(*TOY, AWAY, repeated, key=KEY).elbo
    spread = np.hypot(elbo.pointwise.std(), gap.std()) / len(gap) ** 0.5
    assert abs(elbo.estimate - EXACT.mean() - gaps[0]) < 4.5 * spread  # one sample: the ELBO


def test_the_monte_carlo_error_is_the_deviation_between_repetitions():
    repeated = {name: np.repeat(array, 500) for name, array in DATA.items()}
    result = log_likelihood(*TOY, AWAY, repeated, key=KEY, num_samples=200, batch_size=2000)
    deviation = result.pointwise.reshape(23, 500).std(1)
    claimed = np.sqrt(result.monte_carlo_variance.reshape(23, 500).mean(1))
    # a deviation from 500 draws is good to sqrt(1 / 1000); the claim is to first order in 1 / 200
    np.testing.assert_allclose(deviation, claimed, rtol=5 * 1000**-0.5)
    error = result.monte_carlo_error
    assert error == pytest.approx(np.sqrt((claimed**2).mean() / len(result.pointwise)), rel=1e-4)


def test_memory_does_not_grow_with_the_samples():
    arrays = {name: jnp.asarray(array) for name, array in DATA.items()}
    draw = evaluation._log_weight(*TOY, AWAY, arrays)

    def needed(num_samples, num_largest=0):
        sampler = jax.jit(
            lambda key: evaluation._importance_sample(draw, key, num_samples, num_largest)
        )
        return sampler.lower(KEY).compile().memory_analysis().temp_size_in_bytes

    assert needed(100_000) == needed(100) < 100 * needed(1)
    # the tail and a new one, its indices and what sorting takes: not the 100,000 of each datum
    assert needed(100_000, 950) - needed(100) < 20 * 950 * 4 * len(DATA["x"])


# --- k-hat ----------------------------------------------------------------------------------------


def narrow(share):
    """The toy's optimum, its guide's variance only this share of the posterior's."""
    return OPTIMUM | {"phi_4": OPTIMUM["phi_4"] + np.float32(np.log(share))}


@pytest.mark.parametrize(
    ("num_samples", "share"), [(30, 0.5), (225, 0.5), (1000, 0.05), (1013, 1.5)]
)
def test_pareto_k_is_arvizs_own_on_all_the_weights(num_samples, share):
    draw = jax.jit(jax.vmap(evaluation._log_weight(*TOY, narrow(share), DATA)))
    key, at_once = jax.random.fold_in(KEY, 0), evaluation.DRAWS_AT_ONCE
    keys = [jax.random.fold_in(key, i) for i in range(-(-num_samples // at_once))]
    log_w = np.concatenate([draw(jax.random.split(key, at_once)) for key in keys])[:num_samples]
    expected = array_stats.psislw(-log_w.T.astype(np.float64))[1]  # it takes the logs of 1 / w
    result = log_likelihood(*TOY, narrow(share), DATA, key=KEY, num_samples=num_samples)
    # one program rounds log weights otherwise than another
    np.testing.assert_allclose(result.pareto_k, expected, rtol=5e-3, atol=1e-3)


def test_constant_weights_have_no_tail():
    for scale in (1.0, 1e3):  # rounding grows with the log weights
        data = {"c": DATA["c"], "x": DATA["x"] * np.float32(scale)}
        result = log_likelihood(*TOY, OPTIMUM, data, key=KEY, num_samples=1000)
        assert (result.pareto_k == -np.inf).all()
        assert result.high_pareto_k.estimate == 0


def test_a_tail_of_one_weight_is_none_though_others_are_smaller():
    """About a fifth of the draws, which is the tail, weigh e times as much as the rest."""

    def step(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Uniform(0.0, 1.0))
            numpyro.factor("weight", jnp.where(z < 0.2, 1.0, 0.0) + x)

    def prior(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Uniform(0.0, 1.0))

    data = {"x": np.zeros(200, np.float32)}
    result = log_likelihood(step, prior, {}, data, key=KEY, num_samples=100)
    num_greater = np.round((np.exp(result.pointwise) - 1) / (np.e - 1) * 100).astype(int)
    assert {19, 20, 21} <= set(num_greater)
    np.testing.assert_array_equal(result.pareto_k == -np.inf, num_greater >= 20)


def test_a_guide_too_narrow_has_high_pareto_k():
    repeated = {name: np.tile(array, 20) for name, array in DATA.items()}

    def judged(share):
        return log_likelihood(
            *TOY, narrow(share), repeated, key=KEY, num_samples=1000, batch_size=460
        )

    # The weights of a Gaussian with a share of the variance have Pareto's k = 1 - share.
    bad, better, good = (judged(share) for share in (0.05, 0.5, 1.5))
    assert bad.high_pareto_k.estimate > 0.5
    assert good.high_pareto_k.estimate == 0
    assert bad.pareto_k.mean() > better.pareto_k.mean() > good.pareto_k.mean()


def test_the_threshold_and_the_share_above_it():
    assert pareto_k_threshold(100) == pytest.approx(0.5)
    assert pareto_k_threshold(1000) == pytest.approx(2 / 3)
    assert pareto_k_threshold(10_000) == pytest.approx(0.7)
    k = np.array([0.4, 0.5, 0.6, np.nan, -np.inf])
    share = Estimate(np.zeros(5), 100, pareto_k=k).high_pareto_k
    np.testing.assert_array_equal(share.pointwise, [0, 1, 1, 1, 0])
    assert share.estimate == pytest.approx(0.6)


@pytest.mark.parametrize("num_samples", [1, 2, 29])
def test_too_few_samples_have_no_pareto_k(num_samples):
    result = log_likelihood(*TOY, AWAY, DATA, key=KEY, num_samples=num_samples)
    assert result.pareto_k is None
    assert result.high_pareto_k is None
    assert Estimate(result.pointwise, num_samples).high_pareto_k is None


def test_weights_that_are_all_zero_have_no_pareto_k():
    def impossible(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.factor("x", jnp.where(abs(x - z) < 1, jnp.log(0.5), -jnp.inf))

    def standard(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    data = {"x": np.array([0.0, 50.0], np.float32)}
    result = log_likelihood(impossible, standard, {}, data, key=KEY, num_samples=100)
    assert result.pointwise[1] == -np.inf
    assert np.isnan(result.pareto_k[1])
    assert result.pareto_k[0] == -np.inf  # zero or the same: bounded
    assert result.high_pareto_k.pointwise.tolist() == [0, 1]


@pytest.mark.parametrize("judge", [elbo_terms, log_likelihood])
def test_one_program_is_traced_for_all_batches(judge):
    def count(batch_size):
        calls = 0

        def counted(c, x=None):
            nonlocal calls
            calls += 1
            TOY[0](c, x)

        judge(counted, TOY[1], AWAY, DATA, key=KEY, num_samples=3, batch_size=batch_size)
        return calls

    assert count(4) == count(23)


@pytest.mark.parametrize("name", ["num_samples", "batch_size"])
@pytest.mark.parametrize("judge", [elbo_terms, log_likelihood])
def test_none_of_something_is_refused(judge, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        judge(*TOY, AWAY, DATA, key=KEY, **{name: 0})


# --- the terms of the ELBO ------------------------------------------------------------------------


def test_divergence_is_exact_and_the_elbo_is_the_difference():
    terms = elbo_terms(model, guide, {"weight": 0.2}, {"x": X}, key=KEY, batch_size=4)
    per_dim = 0.5 * (0.25 + (0.2 * np.asarray(X)) ** 2 - 1 - np.log(0.25))
    np.testing.assert_allclose(terms.kl_per_dim["z"], np.stack([per_dim] * 2, 1), rtol=1e-5)
    np.testing.assert_allclose(terms.kl.pointwise, 2 * per_dim, rtol=1e-5)
    np.testing.assert_allclose(terms.z_loc["z"], 0.2 * np.stack([X, X], 1), rtol=1e-6)
    np.testing.assert_allclose(
        terms.elbo.pointwise, terms.reconstruction.pointwise - terms.kl.pointwise, rtol=1e-6
    )


def test_terms_add_up_to_the_closed_form():
    repeated = jnp.tile(X, 500)
    terms = elbo_terms(model, guide, {"weight": 0.2}, {"x": repeated}, key=KEY, num_samples=4)
    values = terms.elbo.pointwise.reshape(500, 9)
    error = values.std(0) / 500**0.5
    assert (abs(values.mean(0) - exact(0.2)) < 4.5 * error).all()


def test_where_there_is_no_formula_the_divergence_is_sampled():
    def flat_guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.StudentT(8.0, jnp.zeros((len(x), 2)), 0.9).to_event(1))

    zeros = {"x": jnp.zeros(20_000)}
    terms = elbo_terms(model, flat_guide, {}, zeros, key=KEY, batch_size=5_000)
    grid = np.linspace(-40, 40, 200_001)
    log_q = np.asarray(dist.StudentT(8.0, 0.0, 0.9).log_prob(grid), np.float64)
    log_p = -0.5 * grid**2 - 0.5 * np.log(2 * np.pi)
    kl = 2 * np.trapezoid(np.exp(log_q) * (log_q - log_p), grid)
    assert terms.kl_per_dim == {}
    assert abs(terms.kl.estimate - kl) < 4.5 * terms.kl.standard_error


def test_two_latent_sites_are_sampled_since_one_may_depend_on_the_other():
    def chain(x):
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def backwards(x):
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Normal(0.0, 2**0.5))
            numpyro.sample("a", dist.Normal(b / 2, 0.5**0.5))

    terms = elbo_terms(chain, backwards, {}, {"x": X}, key=KEY)
    np.testing.assert_allclose(terms.kl.pointwise, 0, atol=1e-5)  # q is the prior, read backwards


def test_active_units_are_those_whose_mean_follows_the_data():
    def half_guide(x):
        with numpyro.plate("data", len(x)):
            loc = jnp.stack([x, 0.05 * x], axis=-1)
            numpyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    terms = elbo_terms(model, half_guide, {}, {"x": X}, key=KEY)
    assert terms.active["z"].tolist() == [True, False]
    variance, error = terms.activity["z"]
    np.testing.assert_allclose(variance, np.var(X) * np.array([1, 0.05**2]), rtol=1e-5)
    squares = (np.asarray(X) - np.mean(X)) ** 2
    np.testing.assert_allclose(error[0], squares.std() / 3, rtol=1e-5)


# --- labels ---------------------------------------------------------------------------------------


def test_label_check_against_bayes_rule():
    rng = np.random.default_rng(3)
    c = rng.integers(3, size=400)
    x = rng.normal(OPTIMUM["theta_1"] + OPTIMUM["theta_2"] * c, TRUTH.marginal_variance**0.5)
    data = {"c": c.astype(np.float32), "x": x.astype(np.float32)}
    check = label_check(*TOY, OPTIMUM, data, 3, key=KEY, num_samples=2, batch_size=150)
    exact = np.stack(
        [
            gaussian_mean.log_likelihood(
                OPTIMUM, TRUTH.sigma_0, np.full(400, k, np.float32), data["x"]
            )
            for k in range(3)
        ],
        axis=1,
    )
    np.testing.assert_allclose(check.log_likelihood, exact, atol=2e-5)
    assert check.accuracy.estimate == pytest.approx((exact.argmax(1) == c).mean())
    mixture = np.log(np.exp(exact).mean(1))
    expected = exact[np.arange(400), c] - mixture
    np.testing.assert_allclose(check.information.pointwise, expected, atol=2e-5)
    assert check.information.pointwise.max() <= np.log(3) + 1e-9
    assert check.information.estimate > 5 * check.information.standard_error


def test_label_check_needs_labels():
    with pytest.raises(ValueError, match='expected labels as "c"'):
        label_check(model, guide, {"weight": 0.2}, {"x": X}, 3, key=KEY)
