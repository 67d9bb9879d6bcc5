"""Every family of guides with every model, and each family's density against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.distributions import biject_to, constraints, kl_divergence
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density
from scipy import stats

from inference import OBJECTIVES, fit, pointwise_elbo
from inference.sites import is_fixed
from models import gaussian_mean, guides, linear_gaussian, quadrants, vae
from models.conditions import Labels, Values
from models.encoders import PerDatum
from models.likelihoods import DiscretizedLogistic, Gaussian
from models.networks import MLP
from models.priors import LearnedNormal

KEY = jax.random.key(0)
N = 5

MODELS = {
    "toy": gaussian_mean.Model(),
    "linear-gaussian": linear_gaussian.Model(x_shape=(4,), num_latents=2, condition=Values((2,))),
    "vae": vae.Model(x_shape=(4, 3), num_latents=3, hidden=(6,), activation=jnp.tanh),
    "vae-convolutional": vae.Model(
        x_shape=(4, 4, 2), num_latents=3, hidden=(), channels=(4,), likelihood=Gaussian()
    ),
    "vae-labels": vae.Model(
        Labels(3),
        x_shape=(4, 3),
        num_latents=2,
        hidden=(6,),
        likelihood=Gaussian(),
        dtype="bfloat16",
    ),
    "vae-values": vae.Model(
        Values((2,)),
        LearnedNormal((4,)),
        x_shape=(4, 3),
        num_latents=1,
        hidden=(),
        likelihood=DiscretizedLogistic(),
    ),
    "quadrants": quadrants.Model(
        quadrants.Baseline(quadrants.Quadrants(1, (4, 4)), hidden=(6,)), 3, (5,), (4,)
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
FAMILIES = [*guides.GUIDES, "per-datum"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family, model, num_data, **settings):
    """A guide by its family, or the mean field with a table of numbers."""
    if family == "per-datum":
        return guides.mean_field(model).per_datum(num_data)
    return guides.make(family, model, **settings)


def make_data(name, rng):
    if name == "toy":
        data = gaussian_mean.Truth().simulate(N, seed=0)
    elif name == "quadrants":
        images = {"x": rng.integers(0, 256, (N, 4, 4), dtype=np.uint8)}
        data = jax.jit(MODELS[name].prepare)(KEY, images)
    else:
        data = {"x": rng.uniform(size=(N, *MODELS[name].x_shape)) > 0.5}
        condition = MODELS[name].condition
        if isinstance(condition, Labels):
            data["c"] = np.arange(N) % condition.num_classes
        elif condition is not None:
            data["c"] = rng.normal(size=(N, *condition.shape))
    return {
        name: jnp.asarray(np.asarray(array, np.int32 if array.dtype == int else np.float32))
        for name, array in data.items()
    }


def sites_of(program, data, params=None):
    program = handlers.substitute(handlers.seed(program, KEY), params or {})
    return handlers.trace(program).get_trace(**data)


def params_in(sites):
    return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}


def draw_params(rng, sites):
    """A value for every parameter among the sites. What is measured once is positive."""
    params = {}
    for name, site in sites.items():
        if is_fixed(site):
            measured = lambda p: jnp.asarray(rng.uniform(0.5, 2, jnp.shape(p)), p.dtype)  # noqa: E731
            params[name] = jax.tree.map(measured, site["value"])
        elif site["type"] == "param":
            draws = jax.tree.map(
                lambda p: jnp.asarray(rng.normal(size=jnp.shape(p)) / 2, jnp.float32), site["value"]
            )
            constraint = site["kwargs"].get("constraint", constraints.real)
            params[name] = jax.tree.map(biject_to(constraint), draws)
    return params


def abstract_sites(program, data):
    """The sites of a program, as shapes: nothing is computed."""
    sites = {}
    jax.eval_shape(lambda: sites.update(sites_of(program, data)))
    return sites


def agree(guide, model):
    """Abstract sites of a guide and of its model: z, and in the same shape and plate."""
    assert {n for n, site in guide.items() if site["type"] == "sample"} == {"z"}
    ours, theirs = guide["z"], model["z"]
    assert ours["fn"].event_shape == theirs["fn"].event_shape
    assert ours["fn"].batch_shape == theirs["fn"].batch_shape == (N,)
    assert ours["value"].shape == theirs["value"].shape
    assert ours["cond_indep_stack"] == theirs["cond_indep_stack"]


@every_model
def test_a_guide_draws_what_the_model_does_not_observe(name, rng):
    """Every family, with every model."""
    model, data = MODELS[name], make_data(name, rng)
    sites = abstract_sites(model, data)
    for family in FAMILIES:
        agree(abstract_sites(made(family, model, N), data), sites)


# To compile a pair takes seconds: every family with one model, and the two families that need most
# with numbers z.
NEWEST = ("inverse-autoregressive", "neural-spline")  # flow stands for them in quick tests
PAIRS = [
    *((family, "vae-labels") for family in FAMILIES if family not in NEWEST),
    *(pytest.param(family, "vae-labels", marks=pytest.mark.slow) for family in NEWEST),
    ("semi-amortised", "toy"),
    ("flow", "toy"),
]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_family_has_gradients_and_a_density_everywhere(family, name, rng):
    """Gradients are finite and reach every parameter; with extreme data they stay finite. And the
    density is known at draws that are not the guide's own."""
    model, data = MODELS[name], make_data(name, rng)
    guide = made(family, model, N, num_layers=2)
    of_model, of_guide = abstract_sites(model, data), abstract_sites(guide, data)
    agree(of_guide, of_model)
    z = jnp.asarray(rng.normal(size=of_model["z"]["value"].shape), jnp.float32)

    @jax.jit
    def run(params, data, z):
        loss = lambda p: Trace_ELBO(num_particles=2).loss(KEY, p, model, guide, **data)  # noqa: E731
        log_q, sites = log_density(handlers.seed(guide, KEY), (), data, params | {"z": z})
        formula = sites["z"]["fn"].log_prob(z).sum()
        return *jax.value_and_grad(loss)(params), log_q, formula

    params = draw_params(rng, of_model | of_guide)
    loss, gradient, log_q, formula = run(params, data, z)
    assert np.isfinite(loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        # with one dimension of z, a coupling in two keeps all of it
        idle = family == "flow" and name == "toy" and path[0].key == "z_flow"
        if path[0].key == "statistics":  # no optimiser moves it
            assert np.abs(leaf).max() == 0
        else:
            assert idle or np.abs(leaf).max() > 0, path
    np.testing.assert_allclose(log_q, formula, rtol=1e-5)
    assert np.isfinite(log_q)
    if name == "vae-labels":
        loss, gradient, *_ = run(params, data | {"x": 1e4 * (data["x"] - 0.5)}, z)
        assert np.isfinite(loss)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@every_family
def test_a_family_runs_with_64_bits(family, rng):
    """Types that do not fit are found by a trace. Networks stay in 32 bits."""
    model = MODELS["linear-gaussian"]
    with jax.enable_x64(True):
        data = make_data("linear-gaussian", rng)
        data = {name: jnp.asarray(array, float) for name, array in data.items()}
        guide = made(family, model, N)
        svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())

        def steps(key):
            start = svi.init(key, **data)
            end, losses = jax.lax.scan(lambda s, _: svi.update(s, **data), start, length=2)
            return svi.get_params(end), losses

        params, losses = jax.eval_shape(steps, KEY)
    assert losses.shape == (2,)
    for name in params.keys() & {"encoder", "z_flow"}:
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params[name]))


# --- densities ------------------------------------------------------------------------------------


def on_posterior(family, rng, measure):
    """``measure`` of q(z | x), in one compiled program. The guide's weights are random."""
    guide, data = guides.make(family, MODELS["vae"], num_layers=2), make_data("vae", rng)
    params = draw_params(rng, abstract_sites(guide, data))
    return jax.jit(lambda p: measure(sites_of(guide, data, p)["z"]["fn"]))(params)


@pytest.mark.parametrize("family", ["mean-field", "low-rank", "full-covariance"])
def test_a_gaussian_family_is_a_gaussian(family, rng):
    def measure(fn):
        z = fn.sample(KEY, (4000,))
        is_diagonal = family == "mean-field"
        covariance = jnp.eye(3) * fn.variance[..., None] if is_diagonal else fn.covariance_matrix
        return z, fn.log_prob(z[:5]), fn.mean, covariance

    z, log_prob, mean, expected = on_posterior(family, rng, measure)
    covariance = np.stack([np.cov(z[:, i].T) for i in range(N)])
    scale = np.sqrt(np.einsum("nii,njj->nij", expected, expected))
    # a covariance of S Gaussian draws has a standard error of at most sqrt(2 / S) of the scales
    assert (abs(covariance - expected) / scale < 5 * np.sqrt(2 / 4000)).all()
    off_diagonal = abs(expected[:, ~np.eye(3, dtype=bool)]).max()
    assert (off_diagonal > 1e-3) == (family != "mean-field")
    for i in range(N):
        exact = stats.multivariate_normal(mean[i], expected[i]).logpdf(z[:5, i])
        np.testing.assert_allclose(log_prob[:, i], exact, rtol=1e-3, atol=1e-2)


FLOWS = ["flow", "inverse-autoregressive", "neural-spline"]


@pytest.mark.parametrize("family", FLOWS)
def test_a_flow_is_its_base_carried_along(family, rng):
    """log q(T(u)) = log N(u) - log |det dT/du|, the determinant by differentiating T."""

    def measure(fn):
        def carry(u):
            for transform in fn.transforms:  # the maps, and the Cholesky factor's
                u = transform(u)
            return u

        u = fn.base_dist.sample(KEY)
        jacobian = jax.jacobian(carry)(u)[jnp.arange(N), :, jnp.arange(N)]
        log_det = jnp.linalg.slogdet(jacobian)[1]
        draw, intermediates = fn.sample_with_intermediates(KEY)
        both = fn.log_prob(draw, intermediates), fn.log_prob(draw)
        return log_det, fn.log_prob(carry(u)), fn.base_dist.log_prob(u) - log_det, *both

    with jax.enable_x64(True):  # the weights are random, and so are the condition numbers
        measured = on_posterior(family, rng, measure)
        log_det, log_prob, expected, remembered, solved = jax.device_get(measured)
    assert abs(log_det).max() > 0.1
    np.testing.assert_allclose(log_prob, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(remembered, solved, rtol=1e-6, atol=1e-6)


# --- the encoder ----------------------------------------------------------------------------------


def test_an_encoder_may_be_given(rng):
    model, data = MODELS["vae"], make_data("vae", rng)
    wide = functools.partial(model.encoder, hidden=(9,))
    for encoder, units in ((None, 6), (wide, 9)):
        params = params_in(abstract_sites(guides.mean_field(model, encoder), data))
        assert params.keys() == {"encoder", "statistics"}
        assert params["encoder"]["mlp"]["layers"][0]["kernel"].shape == (12, units)


def plain(x, c=None):
    """A program with no methods, for data with a matrix of latent numbers each."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(2))
        numpyro.sample("x", dist.Normal(z[:, 0], 1.0).to_event(1), obs=x)


class Affine(nnx.Module):
    def __init__(self, num_outputs, *, rngs):
        self.mlp = MLP((2, num_outputs), jnp.tanh, "float32", rngs=rngs)

    def __call__(self, x):
        return self.mlp(x)


def test_every_guide_may_have_a_table():
    """A row for each datum, in the shapes that the family asks its encoder for."""
    model, data = MODELS["toy"], make_data("toy", np.random.default_rng(0))
    for family in guides.GUIDES:
        guide = guides.make(family, model)
        table = guide.per_datum(N)
        assert type(table) is type(guide)
        params = params_in(abstract_sites(table, data))
        if family != "prior":
            (layer,) = params_in(abstract_sites(guide, data))["encoder"]["mlp"]["layers"].values()
            assert params["encoder"]["rows"].shape == (N, *layer["bias"].shape)


def test_an_encoders_output_is_checked():
    guide = guides.mean_field(plain, lambda num_outputs, rngs: Affine(num_outputs + 1, rngs=rngs))
    message = r"encoder: expected outputs of shape \(5, 8\), got \(5, 9\); return num_outputs"
    with pytest.raises(ValueError, match=message):
        abstract_sites(guide, {"x": jnp.zeros((N, 2))})


def two(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal())
        numpyro.sample("z2", dist.Normal())


def common(x):
    numpyro.sample("z", dist.Normal())


def positive(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (two, "z (Real(), local), z2 (Real(), local)"),
        (common, "z (Real(), global)"),
        (positive, "z (IndependentConstraint(Positive(lower_bound=0.0), 1), local)"),
        (lambda x: None, "none"),
    ],
)
def test_a_refined_guide_names_other_latent_sites(model, got):
    guide = guides.semi_amortised(model, Affine)
    with pytest.raises(ValueError, match="model: expected one latent site of real numbers") as e:
        guide(x=jnp.zeros((N, 2)))
    assert f"got {got}; take another family" in str(e.value)


def test_a_look_at_the_model_leaves_no_trace(rng):
    """Outer handlers see the guide's own sites and draw their own random numbers."""
    data = make_data("vae", rng)
    sites = abstract_sites(guides.mean_field(MODELS["vae"]), data)
    assert list(sites) == ["statistics", "data", "encoder", "z"]


# --- the guides without an encoder, and the refined one -------------------------------------------


def test_the_prior_has_no_divergence(rng):
    model, data = MODELS["vae-values"], make_data("vae-values", rng)
    params = draw_params(rng, abstract_sites(model, data))

    @jax.jit
    def run(params, z):
        q, p = (sites_of(f, data, params)["z"]["fn"] for f in (guides.prior(model), model))
        return q.log_prob(z), p.log_prob(z), kl_divergence(q, p)

    z = rng.normal(size=(N, 1)).astype(np.float32)
    log_q, log_p, kl = run(params, z)
    np.testing.assert_array_equal(log_q, log_p)
    np.testing.assert_array_equal(kl, 0.0)
    assert np.ptp(log_p - stats.norm.logpdf(z[:, 0])) > 0.1  # the condition's own prior


WEIGHTS = np.array([[1.0, 0.9], [0.3, 0.4], [0.8, 0.2]], np.float32)
PRECISION = np.eye(2) + WEIGHTS.T @ WEIGHTS / 0.25


class GaussianModel:
    """A linear-Gaussian model outside the collection, its weights known."""

    def __call__(self, x=None):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ WEIGHTS.T, 0.5).to_event(1), obs=x)

    def encoder(self, num_outputs, *, rngs):
        module = Affine(num_outputs, rngs=rngs)
        module.mlp = MLP((3, num_outputs), jnp.tanh, "float32", rngs=rngs)
        return module


gaussian_model = GaussianModel()


def log_marginal(x):
    covariance = WEIGHTS @ WEIGHTS.T + 0.25 * np.eye(3)
    return stats.multivariate_normal(np.zeros(3), covariance).logpdf(x)


def moments_of(fn):
    """The mean and the covariance of a Gaussian, for each datum."""
    if hasattr(fn, "covariance_matrix"):
        return fn.mean, fn.covariance_matrix
    return fn.mean, fn.variance[..., None] * jnp.eye(2)


def moments(guide, data, params=None):
    run = jax.jit(lambda params: moments_of(sites_of(guide, data, params)["z"]["fn"]))
    return run(params)


def exact_mean(x):
    return np.linalg.solve(PRECISION, WEIGHTS.T @ np.asarray(x, np.float64).T / 0.25).T


def divergence(loc, cov, x):
    """KL(Normal(loc, cov) || p(z | x)) of each datum: what the ELBO lacks of log p(x)."""
    loc, cov = (np.asarray(array, np.float64) for array in (loc, cov))
    off = loc - exact_mean(x)
    log_det = np.linalg.slogdet(PRECISION)[1] + np.linalg.slogdet(cov)[1]
    trace = np.einsum("ij,nji->n", PRECISION, cov)
    return 0.5 * (trace + np.einsum("ni,ij,nj->n", off, PRECISION, off) - 2 - log_det)


# What the mean field must lose: 1/2 (sum_i log Lambda_ii - log det Lambda).
LEAST = 0.5 * (np.log(np.diag(PRECISION)).sum() - np.linalg.slogdet(PRECISION)[1])
ROUNDING = 1e-4


def test_refined_numbers_are_each_datums_own_optimum(rng):
    """After many steps: the exact mean, and the deviations 1 / sqrt(precision_ii)."""
    guide = guides.semi_amortised(gaussian_model, num_steps=100)
    x = jnp.asarray(rng.normal(size=(N, 3)), jnp.float32)
    mean, cov = moments(guide, {"x": x})
    np.testing.assert_allclose(mean, exact_mean(x), rtol=1e-4, atol=1e-4)
    deviation = 1 / np.sqrt(np.diag(PRECISION))
    deviations = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    np.testing.assert_allclose(deviations, np.tile(deviation, (N, 1)), rtol=1e-4)


def test_refining_raises_the_elbo_of_any_encoder(rng):
    """By what the divergence from the posterior falls, which has a formula."""
    data = {"x": jnp.asarray(rng.normal(size=(200, 3)), jnp.float32)}
    families = guides.mean_field(gaussian_model), guides.semi_amortised(gaussian_model)
    params = draw_params(rng, abstract_sites(families[0], data))
    plain, refined = (divergence(*moments(guide, data, params), data["x"]) for guide in families)
    gain = plain - refined
    assert gain.mean() > 5 * gain.std() / np.sqrt(len(gain))
    assert refined.min() > LEAST - ROUNDING


# --- what training arrives at ---------------------------------------------------------------------


def rate(num_steps):
    return optax.adam(optax.cosine_decay_schedule(3e-2, num_steps), b2=0.99)


def train(model, guide, data, objective="Trace_ELBO"):
    return fit(
        model,
        guide,
        data,
        objective=OBJECTIVES[objective](1),
        optimizer=rate(1500),
        num_steps=1500,
        progress=False,
    )


def trained_moments(model, guide, data, objective):
    """The Gaussian q(z | x) after a training by NumPyro alone, in one compiled program."""
    num_steps = 3000 if isinstance(guide.encoder, PerDatum) else 1500
    svi = SVI(model, guide, rate(num_steps), OBJECTIVES[objective](1))

    @jax.jit
    def run(key, data):
        update = lambda state, _: svi.update(state, **data)  # noqa: E731
        state, _ = jax.lax.scan(update, svi.init(key, **data), length=num_steps)
        return moments_of(sites_of(guide, data, svi.get_params(state))["z"]["fn"])

    return run(KEY, data)


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("mean-field", "Trace_ELBO"),
        ("per-datum", "Trace_ELBO"),
        ("semi-amortised", "Trace_ELBO"),
        ("low-rank", "Trace_ELBO"),
        ("full-covariance", "sticking-the-landing"),
        ("flow", "sticking-the-landing"),
        pytest.param("inverse-autoregressive", "sticking-the-landing", marks=pytest.mark.slow),
        pytest.param("neural-spline", "sticking-the-landing", marks=pytest.mark.slow),
    ],
)
def test_a_family_loses_what_it_must(family, objective, rng):
    """Nothing, or what the mean field must.

    The covariance is the same for all data, so an autoregressive map can hold it.
    """
    num_data = 128
    x = rng.normal(size=(num_data, 2)) @ WEIGHTS.T + 0.5 * rng.normal(size=(num_data, 3))
    data = {"x": jnp.asarray(x, jnp.float32)}
    guide = made(family, gaussian_model, num_data, num_layers=1, num_hidden=8)
    assert LEAST > 0.1
    least = 0.0 if family in ("low-rank", "full-covariance", *FLOWS) else LEAST
    if family in FLOWS:  # no formula
        result = train(gaussian_model, guide, data, objective)
        elbo = pointwise_elbo(result, data, num_samples=100).pointwise[0]
        gaps = log_marginal(x) - elbo
        error = 4 * gaps.std() / np.sqrt(len(gaps))
    else:
        gaps = divergence(*trained_moments(gaussian_model, guide, data, objective), x)
        error = ROUNDING
    assert least - error < gaps.mean() < least + 0.01 + error


def toy_elbo(params, guide, data):
    """The ELBO of the toy for each datum, by the formula for expected quadratics."""

    @jax.jit
    def run(params):
        fn = sites_of(guide, data, params)["z"]["fn"]
        return fn.mean, fn.variance

    loc, variance = (np.asarray(array, np.float64) for array in run(params))
    theta = [float(params[f"theta_{i}"]) for i in (1, 2, 3)]
    prior = theta[0] + theta[1] * data["c"]  # of deviation 1
    square = ((data["x"] - loc) ** 2 + variance) / np.exp(theta[2])
    log_x = -0.5 * (np.log(2 * np.pi) + theta[2] + square)
    return log_x - 0.5 * ((loc - prior) ** 2 + variance - 1 - np.log(variance))


@pytest.mark.parametrize("family", ["mean-field", "prior"])
def test_the_toy_is_recovered_by_every_family_that_can(family):
    """Model and guide together: the best ELBO of the data, which z's prior as guide must miss.

    Under the prior the model can only call the spread of z noise: s^2 + sigma_0^2 in place of s^2.
    """
    model, data = gaussian_mean.Model(), gaussian_mean.Truth().simulate(1024, seed=0)
    best, best_elbo = gaussian_mean.maximum_likelihood(data, 1.0)
    guide = guides.make(family, model)
    result = train(model, guide, data)
    params = result.params_of(0)
    elbo = toy_elbo(params, guide, data)
    variance = 1 + np.exp(best["theta_3"])
    predicted = np.log(1 + 1 / variance) / 2 if family == "prior" else 0.0
    exact = stats.norm.logpdf(
        data["x"], best["theta_1"] + best["theta_2"] * data["c"], np.sqrt(variance)
    )
    error = np.std(exact) / np.sqrt(1024)  # of the mean log-likelihood
    assert abs(best_elbo - elbo.mean() - predicted) < 0.1 * error
    for name in ("theta_1", "theta_2"):
        assert abs(params[name] - best[name]) < 0.25 * np.sqrt(variance / 1024)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: guides.make("flo", m), "guide: expected one of mean-field.*got 'flo'"),
        (
            lambda m: guides.make("prior", m, hidden=(3,)),
            "guide: expected settings among encoder, globals, .*, got 'hidden'",
        ),
        (lambda m: guides.low_rank(m, rank=0), "rank: expected at least 1, got 0"),
        (lambda m: guides.flow(m, num_layers=0), "num_layers: expected at least 1"),
        (lambda m: guides.inverse_autoregressive(m, num_hidden=0), "num_hidden: expected at least"),
        (lambda m: guides.neural_spline(m, num_bins=1), "num_bins: expected at least 2, got 1"),
        (lambda m: guides.semi_amortised(m, num_steps=0), "num_steps: expected at least 1"),
        (lambda m: guides.semi_amortised(m, step_size=2.0), "step_size: expected above 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(MODELS["vae"])


def test_a_family_ignores_the_settings_of_others():
    settings = {"num_layers": 2, "rank": 3, "encoder": None}
    assert guides.make("low-rank", MODELS["vae"], **settings).rank == 3
    assert guides.make("flow", MODELS["vae"], **settings).num_layers == 2
    assert guides.make("mean-field", MODELS["vae"]) == guides.mean_field(MODELS["vae"])


def test_numbers_per_datum_are_for_all_data_at_once(rng):
    data = {name: array[:4] for name, array in make_data("vae", rng).items()}
    with pytest.raises(ValueError, match=r"expected all 5 data .* got 4.*batch_size=5"):
        abstract_sites(guides.mean_field(MODELS["vae"]).per_datum(N), data)


def test_a_guide_refuses_what_the_encoder_refuses(rng):
    guide, data = guides.mean_field(MODELS["vae-labels"]), make_data("vae-labels", rng)
    with pytest.raises(ValueError, match="c: expected conditions, got none"):
        abstract_sites(guide, {"x": data["x"]})
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 4, 3\), got \(5, 4\)"):
        abstract_sites(guide, data | {"x": data["x"][:, :, 0]})
