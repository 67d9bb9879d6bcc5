"""The hierarchical Gaussian model: each closed form against the dense joint Gaussian, and a fit."""

import math

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import stats

from inference import fit
from models import hierarchical_gaussian as hg

MODEL = hg.Model(mu_0=1.5, tau_0=0.7, tau=0.4, sigma=0.9)
X = np.random.default_rng(0).normal(2.0, 1.2, 6).astype(np.float32)
DATA = {"x": X}


def dense(model, n):
    """Mean and covariance of (mu, z_1 .. z_n, x_1 .. x_n)."""
    A = np.eye(2 * n + 1)  # each variable is a sum of independent deviations
    A[1:, 0] = 1
    A[n + 1 :, 1 : n + 1] = np.eye(n)
    variances = [model.tau_0**2] + [model.tau**2] * n + [model.sigma**2] * n
    return np.full(2 * n + 1, model.mu_0), A @ np.diag(variances) @ A.T


def conditioned(model, x):
    """Mean and covariance of (mu, z) given x, by the rule for any joint Gaussian."""
    n = len(x)
    mean, cov = dense(model, n)
    gain = np.linalg.solve(cov[n + 1 :, n + 1 :], cov[n + 1 :, : n + 1]).T
    return mean[: n + 1] + gain @ (x - mean[n + 1 :]), (
        cov[: n + 1, : n + 1] - gain @ cov[n + 1 :, : n + 1]
    )


def test_the_posterior_conditions_the_joint_gaussian():
    posterior, (mean, cov) = hg.posterior(MODEL, DATA), conditioned(MODEL, X)
    np.testing.assert_allclose([posterior.mu_loc, *posterior.z_loc], mean, rtol=1e-12)
    scales = [posterior.mu_scale] + [posterior.z_scale] * len(X)
    np.testing.assert_allclose(scales, np.sqrt(np.diag(cov)), rtol=1e-12)
    for point in np.random.default_rng(1).normal(size=(3, len(X) + 1)):
        expected = stats.multivariate_normal(mean, cov).logpdf(point)
        assert posterior.log_prob(point[0], point[1:]) == pytest.approx(expected, rel=1e-10)


def test_the_evidence_is_that_of_the_joint_gaussian():
    n = len(X)
    mean, cov = dense(MODEL, n)
    expected = stats.multivariate_normal(mean[n + 1 :], cov[n + 1 :, n + 1 :]).logpdf(X) / n
    assert hg.log_evidence(MODEL, DATA) == pytest.approx(expected, rel=1e-12)


def test_predictive_densities_are_ratios_of_evidences():
    new = np.array([0.3, 2.0, -4.0])

    def total(*x):
        return sum(map(len, x)) * hg.log_evidence(MODEL, {"x": np.concatenate(x)})

    pointwise = hg.log_predictive_density(MODEL, DATA, {"x": new})
    expected = [total(X, [x]) - total(X) for x in new]
    np.testing.assert_allclose(pointwise, expected, rtol=1e-10)
    joint = hg.log_evidence(hg.updated(MODEL, DATA), {"x": new})
    assert 3 * joint == pytest.approx(total(X, new) - total(X), rel=1e-10)


def test_every_latent_value_gives_the_evidence():
    posterior, evidence = hg.posterior(MODEL, DATA), len(X) * hg.log_evidence(MODEL, DATA)
    for point in np.random.default_rng(2).normal(1.5, 1, (5, len(X) + 1)):
        latents = {"mu": jnp.float32(point[0]), "z": jnp.asarray(point[1:], jnp.float32)}
        joint, _ = log_density(MODEL, (), {"x": jnp.asarray(X)}, latents)
        assert float(joint) - posterior.log_prob(**latents) == pytest.approx(evidence, rel=1e-5)


def test_the_mean_field_gap_is_hadamards_and_that_of_two_blocks():
    _, cov = conditioned(MODEL, X)
    matrix = np.linalg.inv(cov)
    log_det = np.linalg.slogdet(matrix)[1]
    factorised = 0.5 * (np.log(np.diag(matrix)).sum() - log_det)
    blocks = 0.5 * (math.log(matrix[0, 0]) + np.linalg.slogdet(matrix[1:, 1:])[1] - log_det)
    gap = len(X) * hg.mean_field_gap(MODEL, len(X))
    assert gap == pytest.approx(factorised, rel=1e-10)
    assert gap == pytest.approx(blocks, rel=1e-10)


def test_many_data_need_no_large_matrix():
    model, x = hg.Model(mu_0=-1.0), np.random.default_rng(3).normal(size=100_000)
    assert hg.posterior(model, {"x": x}).mu_loc == pytest.approx(x.mean(), abs=1e-4)
    # The chain rule: one datum after the other gives the same evidence.
    start, total = model, 0.0
    for part in np.split(x, 10):
        total += len(part) * hg.log_evidence(start, {"x": part})
        start = hg.updated(start, {"x": part})
    assert len(x) * hg.log_evidence(model, {"x": x}) == pytest.approx(total, rel=1e-12)


def test_without_observations_the_model_generates():
    sites = handlers.trace(handlers.seed(MODEL, 0)).get_trace()
    assert [sites[name]["value"].shape for name in ("mu", "z", "x")] == [(), (1,), (1,)]
    assert not sites["x"]["is_observed"]


def exact_guide(x):
    """The posterior's family: z follows mu. Its parameters start elsewhere."""

    def positive(name):
        return numpyro.param(name, 1.0, constraint=dist.constraints.positive)

    mu = numpyro.sample("mu", dist.Normal(numpyro.param("loc", 0.0), positive("mu_scale")))
    z_loc = numpyro.param("k", 0.5) * x + numpyro.param("slope", 0.5) * mu
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(z_loc, positive("scale")))


def test_a_fit_of_the_exact_family_reaches_the_evidence():
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 2000))
    result = fit(MODEL, exact_guide, DATA, optimizer=optimizer, num_steps=2000, progress=False)
    posterior = hg.posterior(MODEL, DATA)
    params = result.params_of(0)
    assert float(params["loc"]) == pytest.approx(posterior.mu_loc, abs=0.01)
    assert float(params["mu_scale"]) == pytest.approx(posterior.mu_scale, abs=0.01)
    # At the optimum the ELBO has no variance. Mean field would stay far below.
    assert hg.mean_field_gap(MODEL, len(X)) > 0.05
    last = np.asarray(result.elbo)[0, -20:].mean()
    assert last == pytest.approx(hg.log_evidence(MODEL, DATA), abs=1e-3)


@pytest.mark.parametrize("change", [{"tau": 0.0}, {"sigma": -1.0}, {"mu_0": math.inf}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected a "):
        hg.Model(**change)


def test_a_column_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"x: expected one number per datum.*x\[:, 0\]"):
        MODEL.check_data(x=np.zeros((3, 1)))
