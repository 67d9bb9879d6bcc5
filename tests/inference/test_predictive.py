"""The density of new data where latent sites are shared: the formula, and its Monte Carlo error."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from inference import Fit, elbo_terms, log_likelihood, log_predictive_density, pointwise_elbo
from models import hierarchical_gaussian, regression

NUM_DATA = 40


def regression_guide(c, x=None):
    """Independent Normals for the weights and the intercept."""
    numpyro.sample("w", dist.Normal(jnp.array([0.5, -1.0]), jnp.array([0.6, 0.3])).to_event(1))
    numpyro.sample("b", dist.Normal(0.2, 0.4))


def hierarchical_guide(x=None):
    """A Normal for mu, and for each z a Normal that is too wide."""
    numpyro.sample("mu", dist.Normal(numpyro.param("mu_loc", 0.5), 0.4))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0.5 * x, 1.0))


def linear(rng):
    """Bayesian regression under q, new data, and log p of each under q."""
    model = regression.Model(2, w_scale=1.0, b_scale=1.0, sigma=0.5)
    c = rng.normal(size=(NUM_DATA, 2))
    variance = 0.5**2 + 0.4**2 + (c**2 @ np.array([0.6, 0.3]) ** 2)
    density = stats.norm(0.2 + c @ [0.5, -1.0], np.sqrt(variance))
    x = density.rvs(random_state=rng)
    exact = density.logpdf(x)
    data = {"c": c.astype(np.float32), "x": x.astype(np.float32)}
    return Fit.from_params(model, regression_guide, {}, example=data), data, exact


def hierarchical(rng):
    """A hierarchy under q, new data, and log p of each under q."""
    model = hierarchical_gaussian.Model(mu_0=0.0, tau_0=1.0, tau=0.7, sigma=0.5)
    density = stats.norm(0.5, np.sqrt(0.4**2 + 0.7**2 + 0.5**2))
    x = density.rvs(NUM_DATA, random_state=rng)
    exact = density.logpdf(x)
    data, params = {"x": x.astype(np.float32)}, {"mu_loc": 0.5}
    return Fit.from_params(model, hierarchical_guide, params, example=data), data, exact


@pytest.mark.parametrize(("make", "num_local_samples"), [(linear, 1), (hierarchical, 50)])
def test_the_density_is_the_formula_under_q(make, num_local_samples, rng):
    """Each datum and the mean within four Monte Carlo errors. The mean's error is that of draws
    which all data share: over keys it is as stated, and more than of independent errors."""
    result, data, exact = make(rng)
    sizes = {"num_samples": 200, "num_local_samples": num_local_samples, "batch_size": 16}
    found = [
        log_predictive_density(result, data, key=jax.random.key(i), **sizes) for i in range(12)
    ]
    assert found[0].pointwise.shape == (1, NUM_DATA)
    error = np.sqrt(found[0].monte_carlo_variance[0])
    assert (abs(found[0].pointwise[0] - exact) < 5 * error + 1e-5).all()
    means = np.array([each.estimate[0] for each in found])
    errors = np.array([each.monte_carlo_error[0] for each in found])
    stated = np.sqrt(np.mean(errors**2))
    # the mean of log (1/S) sum_s lies below log p by about half its variance
    bias = np.mean([each.monte_carlo_variance.mean() for each in found]) / 2
    assert abs(means.mean() - exact.mean()) < 4 * stated / np.sqrt(12) + bias
    # a deviation of 12 draws has a relative error of about 1 / sqrt(22)
    assert abs(np.log(means.std(ddof=1) / stated)) < 4 / np.sqrt(22)
    independent = np.sqrt(found[0].monte_carlo_variance.sum()) / NUM_DATA
    if make is linear:
        assert errors[0] != pytest.approx(independent, rel=0.05)


def test_batches_change_nothing_but_noise(rng):
    """The draws of the globals are those of every batch: without local sites to the last digit."""
    result, data, _ = linear(rng)
    whole = log_predictive_density(result, data, num_samples=30)
    parts = log_predictive_density(result, data, num_samples=30, batch_size=7)
    np.testing.assert_allclose(parts.pointwise, whole.pointwise, rtol=1e-5)
    np.testing.assert_allclose(parts.shared_error, whole.shared_error, rtol=1e-5)


def test_other_judges_send_here(rng):
    result, data, _ = hierarchical(rng)
    with pytest.raises(ValueError, match=r"got the global site 'mu'.*use log_predictive_density"):
        log_likelihood(result, data)


def test_without_global_sites_it_is_the_likelihood(rng):
    def model(x=None):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x=None):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.4 * x, 0.8))

    data = {"x": rng.normal(size=30).astype(np.float32)}
    result = Fit.from_params(model, guide, {}, example=data)
    found = log_predictive_density(result, data, num_samples=20, num_local_samples=100)
    exact = stats.norm(0, np.sqrt(2)).logpdf(data["x"]).mean()
    assert abs(found.estimate[0] - exact) < 4 * found.monte_carlo_error[0]


def test_terms_with_global_sites(rng):
    """The bound given the globals, the divergence of the globals by the side, and its parts."""
    result, data, _ = hierarchical(rng)
    terms = elbo_terms(result, data, num_samples=4000)
    x = data["x"].astype(float)
    # E log N(x; z, 0.5^2) with z ~ Normal(x / 2, 1)
    reconstruction = stats.norm(0.5 * x, 0.5).logpdf(x) - 1 / (2 * 0.25)
    kl = 0.5 * ((1 + (0.5 * x - 0.5) ** 2 + 0.4**2) / 0.49 - 1 + np.log(0.49))
    of_mu = 0.5 * (0.4**2 + 0.5**2 - 1 - np.log(0.4**2)) / NUM_DATA
    for got, exact in ((terms.reconstruction, reconstruction), (terms.kl, kl)):
        error = 6 / np.sqrt(4000)  # a term's deviation over draws is below 6 nats
        assert abs(got.pointwise[0] - exact).max() < 4 * error
    np.testing.assert_array_equal(terms.kl_by_site["z"].pointwise, terms.kl.pointwise)
    assert terms.kl_by_site.keys() == {"z"}
    assert abs(terms.kl_of_globals["mu"][0] - of_mu) < 4 * 2 / np.sqrt(4000) / NUM_DATA
    elbo = pointwise_elbo(result, data, num_samples=4000).pointwise[0]
    assert abs(elbo - (reconstruction - kl)).max() < 4 * 8 / np.sqrt(4000)
