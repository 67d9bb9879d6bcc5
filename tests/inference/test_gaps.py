"""The gap of a guide and its two parts, against the formulas of the linear-Gaussian model."""

import dataclasses
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.module import flax_module
from numpyro.infer import TraceEnum_ELBO

from experiments import datasets
from inference import Estimate, Fit, Held, InferenceGap, elbo_terms, fit, gaps, inference_gap
from inference import log_likelihood as importance_sampled
from models import guides, linear_gaussian, vae
from models.likelihoods import PIXEL_LIKELIHOODS
from models.networks import SCALE_FLOOR

K, N = 2, 24
ROOM = 0.03  # nats per datum: how far the fit of q* may end from the best guide
MODEL = linear_gaussian.Model((4,), K)
PARAMS = {
    "W": np.float32([[1.2, 1.1], [0.5, 0.3], [-0.8, -1.0], [0.4, 0.6]]),  # far from orthogonal
    "b": np.float32([0.5, -1.0, 0.0, 2.0]),
    "sigma": np.float32(0.8),
}
LAMBDA = np.asarray(linear_gaussian.precision(PARAMS))
SHIFT = np.float32([0.5, 0.3])
QUICK = {"num_steps": 400, "learning_rate": 0.05, "num_samples": 400}


def simulated(size):
    rng = np.random.default_rng(0)
    z, noise = rng.normal(size=(size, K)), rng.normal(size=(size, 4))
    return {"x": (z @ PARAMS["W"].T + PARAMS["b"] + PARAMS["sigma"] * noise).astype(np.float32)}


DATA = simulated(N)
EXACT = np.asarray(linear_gaussian.log_likelihood(MODEL, PARAMS, DATA))


def gaussian(family, data, shift=0.0, narrower=1.0):
    """The best guide of a Gaussian family by formula, or one away from it.

    Args:
        family: ``mean_field`` or ``full_covariance``.
        data: any.
        shift: is added to the mean.
        narrower: divides the deviations.
    """
    guide = family(MODEL)
    sites = handlers.trace(handlers.seed(guide, 0)).get_trace(**data)
    covariance = np.linalg.inv(LAMBDA)
    slope = PARAMS["W"] @ covariance / PARAMS["sigma"] ** 2
    if family is guides.mean_field:
        scale, below = np.diag(LAMBDA) ** -0.5, np.zeros(0)
    else:
        lower = np.linalg.cholesky(covariance)
        scale = np.diag(lower)
        below = (lower / scale[:, None])[np.tril_indices(K, -1)] * K**0.5
    raw = np.log(np.expm1(scale / narrower - SCALE_FLOOR))
    rest = np.concatenate([raw, below])
    kernel = np.concatenate([slope, np.zeros((4, len(rest)))], axis=1)
    bias = np.concatenate([shift - PARAMS["b"] @ slope, rest])
    start = {"median": np.zeros(K), "spread": np.ones(K)}
    made = {"bias": bias, "kernel": kernel}
    values = {
        "encoder": {"mlp": {"layers": {0: made}}},
        "statistics": {"latents": {"z": start}},
    }
    like = {name: sites[name]["value"] for name in values}
    values = jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype).reshape(a.shape), like, values)
    return Fit.from_params(MODEL, guide, PARAMS | values, example=data)


def restarts(*fits):
    """Fits of one seed as one fit of several."""
    params = jax.tree.map(lambda *p: jnp.concatenate(p), *(one.params for one in fits))
    config = fits[0].config | {"num_seeds": len(fits)}
    info = fits[0].info | {name: [0] * len(fits) for name in ("num_steps", "num_skipped")}
    return dataclasses.replace(fits[0], params=params, config=config, info=info)


def exact(result, data=DATA):
    """The exact log p(x), as a judge gives it."""
    values = np.asarray(linear_gaussian.log_likelihood(MODEL, PARAMS, data))
    described = importance_sampled(result, data, num_samples=1).data
    values = np.stack([values] * result.num_seeds)
    return Estimate("log_likelihood", values, 1, described, np.zeros_like(values))


def assert_within(estimate, expected):
    """At most four standard errors of the draws away, and the room for the fit of q*."""
    off = abs(estimate.estimate - expected)
    assert (off < 4 * estimate.monte_carlo_error + ROOM).all(), (estimate.estimate, expected)


# --- against the formulas -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoilt():
    """The best mean field, one with shifted means, and one with half the deviations."""
    family = guides.mean_field
    settings = ({}, {"shift": SHIFT}, {"narrower": 2})
    result = restarts(*(gaussian(family, DATA, **one) for one in settings))
    return result, inference_gap(result, DATA, log_likelihood=exact(result), **QUICK)


@pytest.mark.slow
def test_the_approximation_gap_is_the_familys_least(spoilt):
    _, gap = spoilt
    least = float(linear_gaussian.mean_field_gap(PARAMS))
    assert least > 10 * ROOM
    assert_within(gap.approximation, [least] * 3)
    error = gap.approximation.monte_carlo_error
    assert (gap.approximation.estimate > least - 4 * error).all()  # no guide loses less


@pytest.mark.slow
def test_the_amortisation_gap_is_what_was_spoilt(spoilt):
    _, gap = spoilt
    by_shift = 0.5 * SHIFT @ LAMBDA @ SHIFT
    by_half = K * 0.5 * (np.log(4) - 3 / 4)  # 1/2 (v - 1 - log v) at v = 1/4, in each dimension
    assert min(by_shift, by_half) > 10 * ROOM
    assert_within(gap.amortisation, [0, by_shift, by_half])


@pytest.mark.slow
def test_the_parts_add_up_datum_by_datum(spoilt):
    _, gap = spoilt
    parts = gap.approximation.pointwise + gap.amortisation.pointwise
    np.testing.assert_allclose(gap.total.pointwise, parts, rtol=0, atol=1e-12)
    np.testing.assert_allclose(gap.total.pointwise, EXACT - gap.elbo.pointwise, rtol=1e-6)
    assert gap.total.pointwise.shape == (3, N)
    both = gap.log_likelihood, gap.elbo
    variances = sum(part.monte_carlo_variance for part in both)
    np.testing.assert_allclose(gap.total.monte_carlo_variance, variances)


@pytest.mark.slow
def test_equal_draws_take_noise_from_the_difference(spoilt):
    _, gap = spoilt
    variances = [part.monte_carlo_variance[0] for part in (gap.elbo, gap.best_elbo)]
    # Both guides are nearly the same, and each variance comes from ten rounds.
    assert gap.amortisation.monte_carlo_variance[0].mean() < 0.1 * np.mean(sum(variances))


@pytest.mark.slow
def test_the_elbo_is_that_of_the_judges(spoilt):
    result, gap = spoilt
    terms = elbo_terms(result, DATA, num_samples=400).elbo
    # its own error is larger: an exact divergence leaves the noise of the reconstruction
    difference = terms.pointwise - gap.elbo.pointwise
    assert (abs(difference.mean(1)) < 4.5 * difference.std(1) / N**0.5).all()


@pytest.mark.slow
def test_it_prints_a_row_for_each_seed(spoilt):
    _, gap = spoilt
    head, *rows, last = str(gap).splitlines()
    assert re.split(r"\s{2,}", head.strip())[-3:] == ["total", "approximation", "amortisation"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert f"{gap.amortisation.estimate[1]:.3f} +- " in rows[1]
    assert last == (
        f"Nats per datum +- standard error over {N} data. Total = approximation + amortisation."
    )


def test_the_prior_is_its_own_best_guide():
    result = Fit.from_params(MODEL, guides.prior(MODEL), PARAMS, example=DATA)
    gap = inference_gap(result, DATA, num_samples=1000)
    assert (gap.amortisation.pointwise == 0).all()
    assert gap.rise.tolist() == gap.rise_error.tolist() == [0]
    expected = linear_gaussian.prior_gap(MODEL, PARAMS, DATA)
    off = gap.approximation.pointwise[0] - expected
    error = gap.approximation.monte_carlo_variance[0] ** 0.5
    # from ten rounds, an error is itself off by a quarter
    assert (abs(off) < 8 * error).all()
    assert abs(off.mean()) < 5 * gap.approximation.monte_carlo_error[0]


@pytest.mark.slow
@pytest.mark.parametrize("shift", [np.zeros(K), SHIFT])
def test_full_covariance_loses_nothing_but_what_was_spoilt(shift):
    result = gaussian(guides.full_covariance, DATA, shift=shift)
    gap = inference_gap(result, DATA)
    np.testing.assert_allclose(gap.log_likelihood.pointwise[0], EXACT, atol=0.01)
    assert gap.log_likelihood.num_samples == gap.elbo.num_samples == 1000
    assert_within(gap.approximation, 0)
    assert_within(gap.amortisation, 0.5 * shift @ LAMBDA @ shift)
    assert_within(gap.total, 0.5 * shift @ LAMBDA @ shift)


@pytest.mark.slow
def test_blocks_give_the_same_gap():
    data = simulated(50)
    result = gaussian(guides.mean_field, data, shift=SHIFT)
    gap = inference_gap(result, data, batch_size=20, log_likelihood=exact(result, data))
    assert gap.total.pointwise.shape == (1, 50)
    assert_within(gap.approximation, linear_gaussian.mean_field_gap(PARAMS))
    assert_within(gap.amortisation, 0.5 * SHIFT @ LAMBDA @ SHIFT)


@pytest.mark.slow
def test_a_row_is_the_gap_of_that_seed_alone(spoilt):
    result, gap = spoilt
    one = result.isel(seed=1)
    alone = inference_gap(one, DATA, log_likelihood=exact(one), **QUICK)
    np.testing.assert_allclose(alone.amortisation.pointwise[0], gap.amortisation.pointwise[1])
    np.testing.assert_allclose(alone.rise[0], gap.rise[1])


# --- the log-likelihood ---------------------------------------------------------------------------


def test_the_greater_of_both_estimates_counts_for_each_seed():
    low, high = np.full((2, 3), -2.0), np.full((2, 3), -1.0)
    low[1], high[1] = high[1], low[1].copy()
    a, b = (
        Estimate("log_likelihood", values, 30, {}, values + 3, values + 5) for values in (low, high)
    )
    greater = gaps._greater(a, b)
    assert (greater.pointwise == -1).all()
    assert (greater.monte_carlo_variance == 2).all()
    assert (greater.pareto_k == 4).all()


# --- what is refused, and what is told ------------------------------------------------------------


def refused(result, data=DATA, **settings):
    """The message of the ValueError."""
    with pytest.raises(ValueError, match=r"expected .*got ") as raised:
        inference_gap(result, data, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def other_guide(x):
    slope = numpyro.param("slope", 0.1)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x[:, :K], 0.5).to_event(1))


def test_a_guide_without_per_datum_is_refused():
    result = Fit.from_params(MODEL, other_guide, PARAMS | {"slope": 0.1}, example=DATA)
    message = refused(result)
    assert message.startswith("inference_gap: expected a guide with the method per_datum(num_data)")
    assert "got function; take a family of models.guides" in message


def shared_model(x):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mean, 1.0).expand([len(x), 4]).to_event(1), obs=x)


def test_global_sites_are_refused():
    result = Fit.from_params(shared_model, guides.prior(shared_model), {}, example=DATA)
    assert "got the global site 'mean'" in refused(result)


def mixture(x):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Categorical(jnp.ones(2) / 2), infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(jnp.float32(k)[..., None], 1.0).to_event(1), obs=x)


def no_latents(x):
    numpyro.param("unused", 0.0)


def test_sites_that_are_summed_over_are_refused():
    data = {"x": DATA["x"][:, :1]}
    settings = {"objective": TraceEnum_ELBO(), "num_steps": 1, "progress": False}
    result = fit(mixture, no_latents, data, **settings)
    assert "got 'k', which is summed over" in refused(result, data)


def test_a_log_likelihood_of_other_data_or_seeds_is_refused():
    result = Fit.from_params(MODEL, guides.prior(MODEL), PARAMS, example=DATA)
    other = importance_sampled(result, {"x": DATA["x"] + 1}, num_samples=1)
    assert "estimate for the judged data" in refused(result, log_likelihood=other)
    twice = exact(restarts(result, result))
    message = refused(result, log_likelihood=twice)
    assert message.endswith("estimate for each of 1 seeds, got 2; judge the same fit")


def test_another_log_likelihood_is_refused(without_type_checks):
    result = Fit.from_params(MODEL, guides.prior(MODEL), PARAMS, example=DATA)
    with pytest.raises(TypeError, match=r"^log_likelihood: expected an Estimate, got float; give"):
        inference_gap(result, DATA, log_likelihood=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", 19), ("num_samples", 1), ("batch_size", 0), ("learning_rate", 0.0)],
)
def test_settings_out_of_range_are_refused(name, value):
    result = Fit.from_params(MODEL, guides.prior(MODEL), PARAMS, example=DATA)
    assert refused(result, **{name: value}).startswith(f"{name}: expected")


def made(best_elbo, rise):
    """A gap of two seeds. Each number has an error of 0.01, and log p is 0."""

    def estimate(name, mean):
        values = np.full((2, 4), mean)
        return Estimate(name, values, 10, {}, np.full((2, 4), 4 * 0.01**2))

    elbo, best = estimate("elbo", -1.0), estimate("best_elbo", best_elbo)
    amortisation = estimate("amortisation_gap", best_elbo + 1.0)
    error = np.full(2, 0.01)
    density = estimate("log_likelihood", 0.0)
    return InferenceGap(density, elbo, best, amortisation, np.array([0.0, rise]), error)


def test_a_fit_that_still_rises_is_told():
    gaps._warn(made(-0.5, 0.039))
    with pytest.warns(RuntimeWarning, match=r"still rises .* 0.05 .*\(seed 1\).* give num_steps="):
        gaps._warn(made(-0.5, 0.05))


def test_a_best_guide_that_is_worse_is_told():
    gaps._warn(made(-1.03, 0.0))
    with pytest.warns(RuntimeWarning, match=r"q\* is worse .* by 0.05 nats") as told:
        gaps._warn(made(-1.05, 0.0))
    assert len(told) == 2
    assert not any("\n" in str(one.message) for one in told)


def test_the_rise_is_that_of_the_last_tenth():
    trace = np.zeros((1, 100), np.float32)
    trace[:, 80:90], trace[:, 90:] = [1, 3] * 5, [4, 6] * 5
    (rise,), (error,) = gaps._rise([(3, trace), (1, 5 * trace)])
    assert rise == pytest.approx(3 * (3 + 5) / 4)
    assert error == pytest.approx(2 * (2 * (10 / 9) / 10) ** 0.5)


@pytest.mark.slow
def test_too_few_steps_are_told():
    result = gaussian(guides.mean_field, DATA)
    settings = {"num_steps": 300, "learning_rate": 0.003, "num_samples": 100}
    with pytest.warns(RuntimeWarning) as told:
        inference_gap(result, DATA, log_likelihood=exact(result), **settings)
    words = [str(one.message) for one in told]
    assert "still rises" in words[0]
    assert "q* is worse" in words[1]


# --- other programs -------------------------------------------------------------------------------


def chain(x=None, x_mask=True):
    """Two latent sites, one of them positive."""
    size = 1 if x is None else len(x)
    scale = numpyro.param("scale", 0.5, constraint=dist.constraints.positive)
    with numpyro.plate("data", size):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0).expand([size]))
        z = numpyro.sample("z", dist.Normal(0, rate))
        x_loc = jnp.stack([z, -z], axis=-1)
        numpyro.sample("x", dist.Normal(x_loc, scale).mask(x_mask).to_event(1), obs=x)


def briefly(model, guide, data, **settings):
    settings = {"optimizer": optax.adam(0.01), "num_steps": 200, "progress": False} | settings
    return fit(model, guide, data, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mean-field", "full-covariance"])
def test_a_chain_with_a_positive_site_and_missing_entries(family, rng):
    data = {"x": rng.normal(size=(20, 2)).astype(np.float32)}
    data["x"][0, 1] = data["x"][1] = np.nan
    result = briefly(chain, guides.make(family, chain), data, missing="mask")
    gap = inference_gap(result, data)
    assert gap.amortisation.estimate[0] > -4 * gap.amortisation.monte_carlo_error[0]
    assert gap.approximation.estimate[0] > -4 * gap.approximation.monte_carlo_error[0]
    # Nothing is seen of the second datum: log p = 0, and the posterior is the prior.
    assert -0.4 < gap.best_elbo.pointwise[0, 1] < gap.log_likelihood.pointwise[0, 1] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["bernoulli"])
def test_prepared_images(likelihood):
    x = datasets.load("digits").train["x"]
    kind = PIXEL_LIKELIHOODS[likelihood]
    model = vae.Model(x_shape=(8, 8), num_latents=3, hidden=(20,), likelihood=kind)
    settings = {"preprocess": model.prepare, "num_steps": 500, "batch_size": 50}
    result = briefly(model, guides.mean_field(model), {"x": x[:500]}, **settings)
    test = result.prepare({"x": x[500:540]})
    gap = inference_gap(result, test, num_samples=200)
    assert gap.amortisation.estimate[0] > 0.01
    assert gap.approximation.estimate[0] > 0
    assert gap.total.data == importance_sampled(result, test, num_samples=1).data


@pytest.mark.slow
def test_a_guide_with_numbers_for_each_datum_has_no_amortisation_gap():
    held = Held(MODEL, PARAMS)
    guide = guides.mean_field(MODEL).per_datum(N)
    schedule = optax.cosine_decay_schedule(0.05, 1000)
    settings = {"optimizer": optax.adam(schedule), "num_steps": 1000}
    result = briefly(held, guide, DATA, **settings)
    gap = inference_gap(result, DATA, batch_size=10)
    assert_within(gap.amortisation, 0)


class Centred(flax.linen.Module):
    """Batch norm by its running averages."""

    @flax.linen.compact
    def __call__(self, z):
        return flax.linen.BatchNorm(use_running_average=True, use_scale=False)(z)


def with_state(x):
    network = flax_module("net", Centred(), mutable=["batch_stats"], input_shape=(1, K))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([len(x), K]).to_event(1))
        numpyro.sample("x", dist.Normal(network(z), 0.5).to_event(1), obs=x)


@pytest.mark.slow
def test_a_model_with_mutable_state_keeps_it():
    data = {"x": DATA["x"][:, :K]}
    result = briefly(with_state, guides.full_covariance(with_state), data)
    mean = {"mean": jnp.full((1, K), 3.0)}
    state = jax.tree.map(lambda x: x, result.mutable)
    state["net$state"]["batch_stats"]["BatchNorm_0"] |= mean
    result = dataclasses.replace(result, mutable=state)
    gap = inference_gap(result, data)
    assert_within(
        gap.approximation, 0
    )  # the posterior is a Normal, with the averages that are held
    assert gap.amortisation.estimate[0] > 1
