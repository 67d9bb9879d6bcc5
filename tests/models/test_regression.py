"""Bayesian linear regression: each closed form against the dense joint Gaussian."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import optimize, stats

from models import regression as lr

MODEL = lr.Model(num_features=2, w_scale=0.8, b_scale=3.0, sigma=0.5)
RNG = np.random.default_rng(0)
C = RNG.normal(0.5, 1.0, (7, 2)).astype(np.float32)
DATA = {"c": C, "x": RNG.normal(size=7).astype(np.float32)}
NEW = {"c": RNG.normal(size=(3, 2)), "x": RNG.normal(size=3)}


def dense(model, c):
    """F and the covariances of beta = (w, b) and of x."""
    F = np.concatenate([c, np.ones((len(c), 1))], axis=1).astype(np.float64)
    prior = np.diag([model.w_scale**2] * c.shape[1] + [model.b_scale**2])
    return F, prior, F @ prior @ F.T + model.sigma**2 * np.eye(len(c))


def conditioned(model, data):
    """Mean and covariance of beta given x, by the rule for any joint Gaussian."""
    F, prior, S = dense(model, data["c"])
    gain = np.linalg.solve(S, F @ prior).T
    return gain @ data["x"], prior - gain @ F @ prior


def test_the_posterior_conditions_the_joint_gaussian():
    for ours, expected in zip(lr.posterior(MODEL, DATA), conditioned(MODEL, DATA), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


def test_the_evidence_is_that_of_the_joint_gaussian():
    S = dense(MODEL, C)[2]
    expected = stats.multivariate_normal(cov=S).logpdf(DATA["x"]) / len(C)
    assert lr.log_evidence(MODEL, DATA) == pytest.approx(expected, rel=1e-12)


def test_predictive_densities_condition_the_joint_gaussian():
    (mean, cov), F = conditioned(MODEL, DATA), dense(MODEL, NEW["c"])[0]
    S = F @ cov @ F.T + MODEL.sigma**2 * np.eye(3)
    pointwise = stats.norm(F @ mean, np.sqrt(np.diag(S))).logpdf(NEW["x"])
    np.testing.assert_allclose(lr.log_predictive_density(MODEL, DATA, NEW), pointwise, rtol=1e-10)
    joint = stats.multivariate_normal(F @ mean, S).logpdf(NEW["x"])
    ours = 3 * lr.joint_log_predictive_density(MODEL, DATA, NEW)
    assert ours == pytest.approx(joint, rel=1e-10)


def test_every_value_of_the_weights_gives_the_evidence():
    mean, cov = lr.posterior(MODEL, DATA)
    evidence = len(C) * lr.log_evidence(MODEL, DATA)
    arrays = {name: jnp.asarray(array) for name, array in DATA.items()}
    for beta in np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32):
        latents = {"w": jnp.asarray(beta[:2]), "b": jnp.asarray(beta[2])}
        joint, _ = log_density(MODEL, (), arrays, latents)
        posterior = stats.multivariate_normal(mean, cov).logpdf(beta)
        assert float(joint) - posterior == pytest.approx(evidence, rel=1e-5)


def test_the_mean_field_gap_is_the_least_divergence_of_a_diagonal_gaussian():
    _, cov = lr.posterior(MODEL, DATA)

    def divergence(log_variances):
        S = np.diag(np.exp(log_variances))
        product = np.linalg.solve(cov, S)
        return 0.5 * (np.trace(product) - 3 - np.linalg.slogdet(product)[1])

    least = optimize.minimize(divergence, np.zeros(3), tol=1e-12).fun
    assert len(C) * lr.mean_field_gap(MODEL, DATA) == pytest.approx(least, rel=1e-6)


def test_the_gap_of_orthogonal_covariates_is_zero():
    c = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert lr.mean_field_gap(MODEL, {"c": c}) == pytest.approx(0, abs=1e-15)


def test_many_data_need_no_large_matrix():
    rng = np.random.default_rng(3)
    c = rng.normal(size=(100_000, 2))
    data = {"c": c, "x": c @ [1.0, -2.0] + 3 + MODEL.sigma * rng.normal(size=len(c))}
    mean, cov = lr.posterior(MODEL, data)
    z_scores = (mean - [1.0, -2.0, 3.0]) / np.sqrt(np.diag(cov))
    assert np.abs(z_scores).max() < 4
    entropy = 0.5 * math.log(2 * math.pi * math.e * MODEL.sigma**2)
    error = 1 / math.sqrt(2 * len(c))  # of the mean log density of a Gaussian
    assert lr.log_evidence(MODEL, data) == pytest.approx(-entropy, abs=4 * error + 1e-3)


def test_without_responses_the_model_generates():
    sites = handlers.trace(handlers.seed(MODEL, 0)).get_trace(c=jnp.asarray(C))
    assert [sites[name]["value"].shape for name in ("w", "b", "x")] == [(2,), (), (7,)]
    assert [f.name for f in sites["x"]["cond_indep_stack"]] == ["data"]
    assert not sites["w"]["cond_indep_stack"]


@pytest.mark.parametrize("change", [{"num_features": 0}, {"w_scale": 0.0}, {"sigma": math.inf}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected "):
        lr.Model(**change)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"c: expected shape \(N, 2\), got \(7, 3\)"):
        MODEL.check_data(c=np.zeros((7, 3)))
    with pytest.raises(ValueError, match=r"x: expected one response per datum.*x\[:, 0\]"):
        MODEL.check_data(c=C, x=np.zeros((7, 1)))
    with pytest.raises(ValueError, match="c: expected conditions, got none"):
        MODEL.check_data(x=DATA["x"])
