"""Every family of guides with every model, and each family's density against its definition."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density
from scipy import stats

from inference import OBJECTIVES, elbo_terms, encode, fit, log_likelihood, pointwise_elbo
from models import cvae, gaussian_mean, guides, linear_gaussian, vae
from models.conditions import Labels, Values
from models.likelihoods import Gaussian

KEY = jax.random.key(0)
N = 5

MODELS = {
    "toy": gaussian_mean.Model(),
    "linear-gaussian": linear_gaussian.Model(x_shape=(4,), num_latents=2, condition=Values((2,))),
    "vae": vae.Model(x_shape=(4, 3), num_latents=3, hidden=(6,), activation=jnp.tanh),
    "vae-convolutional": vae.Model(
        x_shape=(4, 4, 2), num_latents=3, hidden=(), channels=(4,), likelihood=Gaussian()
    ),
    "cvae-labels": cvae.Model(Labels(3), x_shape=(4, 3), num_latents=2, hidden=(6,)),
    "cvae-values": cvae.Model(
        Values((2,)), prior_hidden=(4,), x_shape=(4, 3), num_latents=1, hidden=(), dtype="bfloat16"
    ),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
every_family = pytest.mark.parametrize("family", guides.GUIDES)


def make_data(model, rng, scale=1.0):
    x = scale * rng.uniform(size=(N, *model.x_shape))
    if isinstance(model, (vae.Model, cvae.Model)) and not isinstance(model.likelihood, Gaussian):
        x = x > 0.5
    data = {"x": jnp.asarray(x, jnp.float32)}
    if isinstance(condition := getattr(model, "condition", None), Labels):
        data["c"] = jnp.arange(N) % condition.num_classes
    elif condition:
        data["c"] = jnp.asarray(scale * rng.normal(size=(N, *condition.shape)), jnp.float32)
    return data


def sites_of(program, data, params=None):
    program = handlers.substitute(handlers.seed(program, KEY), params or {})
    return handlers.trace(program).get_trace(**data)


def abstract_sites(program, data):
    """The sites of a program, as shapes: nothing is computed."""
    sites = {}
    jax.eval_shape(lambda: sites.update(sites_of(program, data)))
    return sites


@every_model
@every_family
def test_a_family_draws_what_a_model_does_not_observe(family, model, rng):
    data = make_data(model, rng)
    sites, drawn = (
        abstract_sites(program, data) for program in (model, guides.make(family, model, num_data=N))
    )
    z, drawn_z = sites["z"], drawn["z"]
    assert {n for n, s in drawn.items() if s["type"] == "sample"} == {"z"}
    assert z["fn"].event_shape == drawn_z["fn"].event_shape
    assert z["value"].shape == drawn_z["value"].shape
    assert z["fn"].batch_shape == drawn_z["fn"].batch_shape == (N,)
    assert z["cond_indep_stack"] == drawn_z["cond_indep_stack"]


# To compile a pair takes seconds: every family with one model, and every model with two families.
PAIRS = sorted(
    {(family, "cvae-labels") for family in guides.GUIDES}
    | {(family, model) for family in ("flow", "semi-amortised") for model in MODELS}
)


@pytest.mark.parametrize(("family", "model"), PAIRS)
def test_a_family_has_gradients_with_a_model(family, model, rng):
    """Finite, and reaching every parameter; compiled and not, with two particles."""
    model = MODELS[model]
    data = make_data(model, rng)
    guide = guides.make(family, model, num_data=N)
    svi = SVI(model, guide, optax.sgd(1e-3), Trace_ELBO(num_particles=2))
    params = jax.jit(lambda key: svi.get_params(svi.init(key, **data)))(KEY)
    value = lambda p: Trace_ELBO(num_particles=2).loss(KEY, p, model, guide, **data)  # noqa: E731
    loss, gradient = jax.jit(jax.value_and_grad(value))(params)
    assert np.isfinite(loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        starts_at_zero = family == "flow" and "flow" in str(path[0])  # behind a last layer of zeros
        assert starts_at_zero or np.abs(leaf).max() > 0, path
    if model is MODELS["toy"]:
        np.testing.assert_allclose(value(params), loss, rtol=1e-4, atol=1e-4)


@every_family
def test_a_family_is_trained_and_judged(family, rng):
    """By ``fit``, two seeds and two particles; every judge takes it."""
    model = MODELS["cvae-labels"]
    data = make_data(model, rng)
    guide = guides.make(family, model, num_data=N)
    result = fit(
        model, guide, data, num_steps=20, batch_size=N, num_seeds=2, objective=Trace_ELBO(2)
    )
    assert np.isfinite(result.elbo).all()
    assert (result.elbo[0] != result.elbo[1]).any()
    params = jax.tree.map(lambda p: p[0], result.params)
    common = (model, guide, params, data)
    terms = elbo_terms(*common, key=KEY, num_samples=50)
    judged = log_likelihood(*common, key=KEY, num_samples=200)
    tolerance = 4 * (terms.elbo.pointwise.std() + judged.pointwise.std())
    assert judged.estimate > terms.elbo.estimate - tolerance
    assert encode(guide, params, data["x"], data["c"]).shape == (N, 2)


@every_family
def test_extreme_inputs_stay_finite(family, rng):
    model = replace(MODELS["vae"], likelihood=Gaussian())
    guide = guides.make(family, model, num_data=N)
    data = make_data(model, rng, scale=1e4)
    svi = SVI(model, guide, optax.sgd(0.0), Trace_ELBO())
    params = jax.jit(lambda key: svi.get_params(svi.init(key, **data)))(KEY)
    value = lambda p: Trace_ELBO().loss(KEY, p, model, guide, **data)  # noqa: E731
    loss, gradient = jax.jit(jax.value_and_grad(value))(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# --- densities ------------------------------------------------------------------------------------


def posterior(family, rng, **settings):
    """q(z | x) of a small model, its weights drawn at random."""
    model = vae.Model(x_shape=(2, 2), num_latents=3, hidden=(4,), activation=jnp.tanh)
    guide = guides.make(family, model, **settings)
    data = make_data(model, rng)
    shapes = sites_of(guide, data)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    params = {
        name: jax.tree.map(draw, site["value"])
        for name, site in shapes.items()
        if site["type"] == "param"
    }
    return sites_of(guide, data, params)["z"]["fn"]


@pytest.mark.parametrize("family", ["mean-field", "low-rank", "full-covariance"])
def test_a_gaussian_family_is_a_gaussian(family, rng):
    fn = posterior(family, rng)
    z = fn.sample(KEY, (4000,))
    covariance = np.stack([np.cov(z[:, i].T) for i in range(N)])
    expected = (
        fn.covariance_matrix if family != "mean-field" else jnp.eye(3) * fn.variance[..., None]
    )
    scale = np.sqrt(np.einsum("nii,njj->nij", expected, expected))
    # a covariance of S Gaussian draws has a standard error of at most sqrt(2 / S) of the scales
    assert (abs(covariance - expected) / scale < 5 * np.sqrt(2 / 4000)).all()
    off_diagonal = abs(expected[:, ~np.eye(3, dtype=bool)]).max()
    assert (off_diagonal > 1e-3) == (family != "mean-field")
    for i in range(N):
        exact = stats.multivariate_normal(fn.mean[i], expected[i]).logpdf(z[:5, i])
        np.testing.assert_allclose(fn.log_prob(z[:5])[:, i], exact, rtol=1e-3, atol=1e-2)


def test_a_flow_is_its_base_carried_along(rng):
    """log q(T(u)) = log N(u) - log |det dT/du|, the determinant by differentiating T."""
    fn = posterior("flow", rng)
    u = fn.base_dist.sample(KEY)

    def carry(u):
        for transform in fn.transforms:  # the Cholesky factor's, and the couplings
            u = transform(u)
        return u

    z = carry(u)
    jacobian = jax.jacobian(carry)(u)[jnp.arange(N), :, jnp.arange(N)]
    log_det = jnp.linalg.slogdet(jacobian)[1]
    assert abs(log_det).max() > 0.1
    expected = fn.base_dist.log_prob(u) - log_det
    np.testing.assert_allclose(fn.log_prob(z), expected, rtol=1e-3, atol=1e-2)
    draw, intermediates = fn.sample_with_intermediates(KEY)
    np.testing.assert_allclose(
        fn.log_prob(draw, intermediates), fn.log_prob(draw), rtol=1e-3, atol=1e-2
    )


def test_a_flow_starts_as_the_full_covariance(rng):
    model = MODELS["vae"]
    data = make_data(model, rng)
    fn = sites_of(guides.flow(model), data)["z"]["fn"]
    gaussian, *couplings = fn.transforms
    assert len(couplings) == 4
    z = fn.sample(KEY)
    noise = gaussian.inv(z)
    expected = fn.base_dist.log_prob(noise) - gaussian.log_abs_det_jacobian(noise, z)
    np.testing.assert_allclose(fn.log_prob(z), expected, rtol=1e-4, atol=1e-4)


# --- the guides without an encoder, and the refined one -------------------------------------------


def test_the_prior_has_no_divergence(rng):
    model = MODELS["cvae-values"]
    data = make_data(model, rng)
    guide = guides.prior(model)
    params = {n: s["value"] for n, s in sites_of(model, data).items() if s["type"] == "param"}
    terms = elbo_terms(model, guide, params, data, key=KEY)
    np.testing.assert_array_equal(terms.kl.pointwise, 0.0)


WEIGHTS = np.array([[1.0, 0.9], [0.3, 0.4], [0.8, 0.2]], np.float32)
PRECISION = np.eye(2) + WEIGHTS.T @ WEIGHTS / 0.25


def gaussian_model(c=None, x=None):
    """A linear-Gaussian model outside the collection, its weights known."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ WEIGHTS.T, 0.5).to_event(1), obs=x)


gaussian_model.x_shape, gaussian_model.num_latents = (3,), 2


def log_marginal(x):
    covariance = WEIGHTS @ WEIGHTS.T + 0.25 * np.eye(3)
    return stats.multivariate_normal(np.zeros(3), covariance).logpdf(x)


def test_refined_numbers_are_each_datums_own_optimum(rng):
    """After many steps: the exact mean, and the deviations 1 / sqrt(precision_ii)."""
    guide = guides.semi_amortised(gaussian_model, num_steps=100)
    x = jnp.asarray(rng.normal(size=(N, 3)), jnp.float32)
    fn = sites_of(guide, {"x": x})["z"]["fn"]
    mean = np.linalg.solve(PRECISION, WEIGHTS.T @ np.asarray(x).T / 0.25).T
    deviation = 1 / np.sqrt(np.diag(PRECISION))
    np.testing.assert_allclose(fn.mean, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fn.base_dist.scale, np.tile(deviation, (N, 1)), rtol=1e-4)


def test_refining_raises_the_elbo_of_any_encoder(rng):
    plain = guides.mean_field(gaussian_model)
    refined = guides.semi_amortised(gaussian_model)
    x = jnp.asarray(rng.normal(size=(200, 3)), jnp.float32)
    params = {"encoder": sites_of(plain, {"x": x})["encoder"]["value"]}
    elbos = [
        np.asarray(pointwise_elbo(gaussian_model, g, params, {"x": x}, key=KEY, num_samples=200))
        for g in (plain, refined)
    ]
    gain = elbos[1] - elbos[0]
    assert gain.mean() > 5 * gain.std() / np.sqrt(len(gain))
    exact = log_marginal(x)
    assert elbos[1].mean() < exact.mean()


SHARP = ["Trace_ELBO", "TraceMeanField_ELBO", "sticking-the-landing"]  # the value is the ELBO
BOUNDS = ["importance-weighted", "doubly-reparameterized"]  # tighter, unless q is the posterior


def train(model, guide, data, objective):
    """The ELBO of each datum after a fit on all of them."""
    size = len(data["x"])
    num_steps = 3000 if isinstance(guide, guides.PerDatum) else 1500
    result = fit(
        model,
        guide,
        data,
        objective=OBJECTIVES[objective](4 if objective in BOUNDS else 1),
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-2, num_steps), b2=0.99),
        num_steps=num_steps,
        batch_size=size,
    )
    params = jax.tree.map(lambda p: p[0], result.params)
    elbo = pointwise_elbo(model, guide, params, data, key=KEY, num_samples=500)
    return np.asarray(elbo), params


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        *itertools.product(["mean-field"], SHARP),
        *itertools.product(["per-datum", "semi-amortised", "low-rank"], SHARP[:1]),
        *itertools.product(["full-covariance"], [*SHARP[1:], BOUNDS[1]]),
        ("flow", "sticking-the-landing"),
    ],
)
def test_a_family_loses_what_it_must(family, objective, rng):
    """On the exact rung: nothing, or 1/2 (sum_i log Lambda_ii - log det Lambda) (mean field)."""
    x = rng.normal(size=(1024, 2)) @ WEIGHTS.T + 0.5 * rng.normal(size=(1024, 3))
    x = jnp.asarray(x, jnp.float32)
    guide = guides.make(family, gaussian_model, num_data=1024)
    elbo, _ = train(gaussian_model, guide, {"x": x}, objective)
    gap = log_marginal(x).mean() - elbo.mean()
    predicted = 0.5 * (np.log(np.diag(PRECISION)).sum() - np.linalg.slogdet(PRECISION)[1])
    error = log_marginal(x).std() / np.sqrt(len(x))  # of the mean log-likelihood
    assert predicted > 4 * error
    reaches = family in ("low-rank", "full-covariance", "flow")
    assert abs(gap - (0.0 if reaches else predicted)) < 0.1 * error


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        *itertools.product(["mean-field"], [*SHARP, *BOUNDS]),
        *itertools.product([name for name in guides.GUIDES if name != "mean-field"], SHARP[:1]),
    ],
)
def test_the_toy_is_recovered_by_every_family_that_can(family, objective):
    """Model and guide together: the best ELBO of the data, which z's prior as guide must miss.

    Under the prior the model can only call the spread of z noise: s^2 + sigma_0^2 in place of s^2.
    """
    model, data = gaussian_mean.Model(), gaussian_mean.Truth().simulate(1024, seed=0)
    best, best_elbo = gaussian_mean.maximum_likelihood(data, 1.0)
    elbo, params = train(model, guides.make(family, model, num_data=1024), data, objective)
    variance = 1 + np.exp(best["theta_3"])
    predicted = np.log(1 + 1 / variance) / 2 if family == "prior" else 0.0
    exact = gaussian_mean.log_likelihood(best, 1.0, data["c"], data["x"])
    error = np.std(exact) / np.sqrt(1024)  # of the mean log-likelihood
    assert abs(best_elbo - elbo.mean() - predicted) < 0.1 * error
    for name in ("theta_1", "theta_2"):
        assert abs(params[name] - best[name]) < 0.25 * np.sqrt(variance / 1024)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: guides.make("flo", m), "guide: expected one of mean-field.*got 'flo'"),
        (lambda m: guides.mean_field(m, (0,)), "hidden: expected positive sizes"),
        (lambda m: guides.LowRank(m, (), 4), "rank: expected 1 to num_latents = 3, got 4"),
        (lambda m: guides.flow(m, num_layers=0), "num_layers: expected at least 1"),
        (lambda m: guides.semi_amortised(m, num_steps=0), "num_steps: expected at least 1"),
        (lambda m: guides.semi_amortised(m, step_size=2.0), "step_size: expected above 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(MODELS["vae"])


def test_numbers_per_datum_are_for_all_data_at_once(rng):
    model = MODELS["vae"]
    with pytest.raises(ValueError, match=r"expected all 5 data .* got 4.*batch_size=5"):
        fit(model, guides.per_datum(model, N), make_data(model, rng), num_steps=1, batch_size=4)


def test_a_family_refuses_conditions_that_its_model_refuses(rng):
    model = MODELS["cvae-labels"]
    data = make_data(model, rng) | {"c": jnp.full(N, 3)}
    for family in guides.GUIDES:
        with pytest.raises(ValueError, match="c: expected labels 0 to 2, got 3"):
            fit(model, guides.make(family, model, num_data=N), data, num_steps=1, batch_size=N)


def test_log_density_needs_no_key(rng):
    model = MODELS["vae"]
    data = make_data(model, rng)
    guide = guides.full_covariance(model)
    params = {"encoder": sites_of(guide, data)["encoder"]["value"]}
    z = jnp.zeros((N, 3))
    value, _ = log_density(guide, (), data, params | {"z": z})
    np.testing.assert_allclose(value, sites_of(guide, data)["z"]["fn"].log_prob(z).sum(), rtol=1e-5)
