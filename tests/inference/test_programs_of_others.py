"""Programs as other people write them: autoguides, global sites, sums, no plates, batch norm."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoNormal
from scipy import stats

from inference import (
    Fit,
    ProgramError,
    elbo_terms,
    fit,
    log_likelihood,
    pointwise_elbo,
    pointwise_log_likelihood,
    sample_posterior,
)

RNG = np.random.default_rng(0)


def normal(x, loc, scale):
    """The density of a Gaussian."""
    return np.exp(-0.5 * ((x - loc) / scale) ** 2) / (scale * np.sqrt(2 * np.pi))


def train(model, guide, data, **settings):
    settings = {"num_steps": 30, "progress": False} | settings
    return fit(model, guide, data, **settings)


def no_latents(**data):
    pass


# --- autoguides -----------------------------------------------------------------------------------


def local(x=None):
    m = numpyro.param("m", 0.0)
    with numpyro.plate("people", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(m, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture(scope="module")
def of_each_datum():
    """A fit with numbers for each datum, and its data."""
    data = {"x": RNG.normal(1, 2**0.5, 30).astype(np.float32)}
    settings = {"num_steps": 600, "optimizer": optax.adam(0.05)}
    return train(local, AutoNormal(local), data, **settings), data


def test_an_autoguide_of_local_sites_judges_the_data_that_it_was_fitted_to(of_each_datum):
    result, data = of_each_datum
    judged = log_likelihood(result, data, num_samples=200)
    exact = stats.norm.logpdf(data["x"], result.params["m"][0], 2**0.5)
    error = np.sqrt(judged.monte_carlo_variance[0])
    assert error.max() < 0.1  # every datum has its own numbers
    assert (abs(judged.pointwise[0] - exact) < 4.5 * error).all()
    assert sample_posterior(result, data, 5)["z"].shape == (1, 5, 30)


@pytest.mark.parametrize("change", [lambda x: x[:7], lambda x: x + 1], ids=["length", "values"])
@pytest.mark.parametrize("judge", [log_likelihood, elbo_terms, sample_posterior])
def test_and_refuses_others(of_each_datum, judge, change):
    result, data = of_each_datum
    with pytest.raises(ProgramError, match=r"data: expected those that the guide was fitted to"):
        judge(result, {"x": change(data["x"])})


def regression(x, y=None):
    """One number for each column, with no plate of its own."""
    w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 10.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


X = RNG.normal(size=(200, 2)).astype(np.float32)
ROWS = {"x": X, "y": (X @ [1.0, -2.0] + RNG.normal(size=200)).astype(np.float32)}


@pytest.fixture(scope="module")
def of_all_data():
    return train(
        regression,
        AutoNormal(regression),
        ROWS,
        batch_size=50,
        num_steps=1500,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 1500)),
        average=0.3,
    )


def test_an_autoguide_of_global_sites_finds_the_posterior_on_batches(of_all_data):
    result = of_all_data
    precision = X.T.astype(float) @ X + np.eye(2) / 100
    mean = np.linalg.solve(precision, X.T @ ROWS["y"])
    # the best factorised Gaussian has the mean, and one over the diagonal for its variances;
    # averaged over 450 draws the noise is a twentieth of its standard deviation, and of batches
    # that are a quarter of the data about three times that
    scale = np.diag(precision) ** -0.5
    assert (abs(result.params["w_auto_loc"][0] - mean) < 0.5 * scale).all()
    assert (abs(result.params["w_auto_scale"][0] / scale - 1) < 0.3).all()
    draws = sample_posterior(result, ROWS, 40)
    assert draws["w"].shape == (1, 40, 2)
    found = pointwise_log_likelihood(result, draws, ROWS)["y"]
    exact = stats.norm.logpdf(ROWS["y"], draws["w"] @ X.T)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_a_fresh_autoguide_judges_for_a_loaded_fit(of_all_data, tmp_path):
    of_all_data.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", regression, AutoNormal(regression))
    known = Fit.from_params(
        regression, AutoNormal(regression), of_all_data.params_of(0), example=ROWS
    )
    few = {name: array[:7] for name, array in ROWS.items()}
    expected = sample_posterior(of_all_data, few, 3)["w"]
    for fresh in (loaded, known):
        np.testing.assert_array_equal(sample_posterior(fresh, few, 3)["w"], expected)


# --- held-out data and global sites ---------------------------------------------------------------


def gaussian_mean(x=None):
    m = numpyro.sample("m", dist.Normal(0.0, 10.0))
    with numpyro.plate("rows", 1 if x is None else len(x)):
        numpyro.sample("x", dist.Normal(m, 2**0.5), obs=x)


def gaussian_mean_guide(x):
    loc = numpyro.param("loc", 0.3)
    scale = numpyro.param("scale", 0.9, constraint=dist.constraints.positive)
    numpyro.sample("m", dist.Normal(loc, scale))


def test_the_held_out_number_is_the_expected_log_density():
    """E_q [log p(x | m)], whatever the number of held-out data and of data in a batch."""
    x = RNG.normal(1, 2**0.5, 40).astype(np.float32)
    held_out = x[:23]  # two batches, and one that is not full
    result = train(
        gaussian_mean,
        gaussian_mean_guide,
        {"x": x},
        batch_size=10,
        num_steps=1,
        optimizer=optax.sgd(0.0),
        validation={"x": held_out},
        validation_objective=Trace_ELBO(num_particles=4000),
    )
    exact = np.mean(-0.5 * ((held_out - 0.3) ** 2 + 0.9**2) / 2) - 0.5 * np.log(4 * np.pi)
    m = np.random.default_rng(1).normal(0.3, 0.9, (4000, 1))
    draws = np.log(normal(held_out, m, 2**0.5))
    batches = [draws[:, i : i + 10] for i in range(0, 23, 10)]  # each has its own draws
    variance = sum(np.var(b.sum(1)) for b in batches) / 4000 / 23**2
    assert abs(result.validation_elbo[0, 0] - exact) < 4.5 * variance**0.5


def test_patience_does_not_stop_at_a_wide_posterior():
    x = RNG.normal(1, 2**0.5, 2000).astype(np.float32)
    result = train(
        gaussian_mean,
        gaussian_mean_guide,
        {"x": x[20:]},
        batch_size=100,
        num_steps=3000,
        optimizer=optax.adam(0.02),
        validation={"x": x[:20]},
        validation_objective=Trace_ELBO(num_particles=100),
        validate_every=50,
        patience=20,
    )
    # with the divergence of m shared by 20 held-out data the best scale would be 0.3, not 0.03
    assert float(result.params["scale"][0]) < 0.1


# --- sites that are summed over -------------------------------------------------------------------


def mixture(x=None):
    w = numpyro.param("w", jnp.array([0.5, 0.5]), constraint=dist.constraints.simplex)
    mu = numpyro.param("mu", jnp.array([-1.0, 1.0]))
    with numpyro.plate("rows", 1 if x is None else len(x)):
        k = numpyro.sample("k", dist.Categorical(w), infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(mu[k], 1.0), obs=x)


MIXED = {"x": RNG.normal(np.where(RNG.random(300) < 0.3, -2, 2), 1).astype(np.float32)}


def log_mixture(x, w, mu, scale=1.0):
    """The sum over the components, by brute force."""
    return np.log(np.sum(w * normal(np.asarray(x, np.float64)[:, None], mu, scale), axis=1))


def expectation_maximisation(x, num_steps=200):
    """The greatest likelihood of a mixture, without a gradient."""
    w, mu = np.array([0.5, 0.5]), np.array([-1.0, 1.0])
    for _ in range(num_steps):
        shares = w * normal(x[:, None], mu, 1.0)
        shares /= shares.sum(1, keepdims=True)
        w, mu = shares.mean(0), (shares * x[:, None]).sum(0) / shares.sum(0)
    return log_mixture(x, w, mu).mean()


@pytest.fixture(scope="module")
def mixed():
    settings = {"objective": TraceEnum_ELBO(), "optimizer": optax.adam(0.05)}
    return train(mixture, no_latents, MIXED, num_steps=300, num_seeds=2, **settings)


def test_a_mixture_trains_to_its_greatest_likelihood(mixed):
    greatest = expectation_maximisation(MIXED["x"].astype(np.float64))
    for elbo in mixed.elbo:
        assert greatest - 1e-3 < elbo[-1] < greatest + 1e-5


@pytest.mark.parametrize("judge", [log_likelihood, pointwise_elbo])
def test_a_mixture_is_judged_by_the_exact_sum(mixed, judge):
    few = {"x": MIXED["x"][:33]}
    judged = judge(mixed, few, num_samples=2, batch_size=20)
    for seed in range(2):
        params = {n: np.asarray(p, np.float64) for n, p in mixed.params_of(seed).items()}
        np.testing.assert_allclose(
            judged.pointwise[seed], log_mixture(few["x"], **params), atol=1e-5
        )


def test_a_mixture_has_no_terms(mixed):
    with pytest.raises(ValueError, match=r"elbo_terms: .*'k', which is summed over") as caught:
        elbo_terms(mixed, MIXED)
    assert "use pointwise_elbo or log_likelihood" in str(caught.value)
    with pytest.raises(ValueError, match=r"pointwise_log_likelihood: .*'k', which is summed over"):
        pointwise_log_likelihood(mixed, {}, MIXED)


def test_a_continuous_site_beside_a_summed_one():
    w, mu = np.array([0.3, 0.7]), np.array([-1.0, 1.5])

    def both(x=None):
        with numpyro.plate("rows", 1 if x is None else len(x)):
            k = numpyro.sample(
                "k", dist.Categorical(jnp.asarray(w)), infer={"enumerate": "parallel"}
            )
            z = numpyro.sample("z", dist.Normal(jnp.asarray(mu)[k], 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide_of_z(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(numpyro.param("weight", 0.8) * x, 0.7))

    few = {"x": MIXED["x"][:12]}
    result = Fit.from_params(both, guide_of_z, {"weight": 0.8}, example=few)
    judged = log_likelihood(result, few, num_samples=2000)
    z = np.linspace(-9, 9, 2001)
    prior = np.sum(w * normal(z[:, None], mu, 1.0), axis=1)
    exact = np.log(np.trapezoid(prior * normal(few["x"][:, None], z, 0.5), z))
    error = np.sqrt(judged.monte_carlo_variance[0])
    assert error.max() < 0.1
    assert (abs(judged.pointwise[0] - exact) < 4.5 * error + 1e-5).all()


# --- programs for whole data sets -----------------------------------------------------------------


def line(x, y=None):
    """All data are one event."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


def line_guide(x, y):
    numpyro.sample("slope", dist.Normal(numpyro.param("loc", 0.0), 0.1))


def random_walk(x=None):
    """A latent path as long as the data."""
    scale = numpyro.sample("scale", dist.Exponential(50.0))
    path = numpyro.sample("path", dist.GaussianRandomWalk(scale, num_steps=len(x)))
    numpyro.sample("x", dist.Normal(path, 1.0), obs=x)


def random_walk_guide(x):
    numpyro.sample("scale", dist.LogNormal(numpyro.param("loc", 0.0), 0.1))
    path = numpyro.param("path_loc", jnp.zeros(len(x)))
    numpyro.sample("path", dist.Normal(path, 0.5).to_event(1))


def autoregression(x=None):
    """A scan over the data."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))

    def step(before, now):
        numpyro.sample("x", dist.Normal(a * before, 1.0), obs=now)
        return now, None

    scan(step, jnp.zeros(()), x)


def autoregression_guide(x):
    numpyro.sample("a", dist.Normal(numpyro.param("loc", 0.0), 0.1))


SERIES = {"x": np.cumsum(RNG.normal(size=12)).astype(np.float32)}
PAIRS = {"x": np.linspace(0, 3, 12, dtype=np.float32), "y": SERIES["x"]}


@pytest.mark.parametrize(
    ("model", "guide", "data"),
    [
        (line, line_guide, PAIRS),
        (random_walk, random_walk_guide, SERIES),
        (autoregression, autoregression_guide, SERIES),
    ],
    ids=["event", "latent event", "scan"],
)
def test_programs_without_a_plate_of_the_data_train_on_all_of_them(model, guide, data):
    with pytest.raises(ProgramError, match="leave batch_size out"):
        train(model, guide, data, batch_size=6)
    result = train(model, guide, data, num_steps=200, optimizer=optax.adam(0.02))
    assert result.elbo[0, -20:].mean() > result.elbo[0, :20].mean()
    with pytest.raises(ValueError, match="pointwise_elbo: expected a model with a plate for its"):
        pointwise_elbo(result, data)


def test_a_program_without_a_plate_finds_its_posterior():
    def plateless(x):
        m = numpyro.sample("m", dist.Normal(0.0, 10.0))
        numpyro.sample("x", dist.Normal(m * jnp.ones(x.shape), 1.0), obs=x)

    def plateless_guide(x):
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 0.1, constraint=dist.constraints.positive)
        numpyro.sample("m", dist.Normal(loc, scale))

    settings = {"num_steps": 800, "optimizer": optax.adam(0.05), "average": 0.4}
    result = train(plateless, plateless_guide, SERIES, **settings)
    precision = 12 + 1 / 100
    scale = precision**-0.5
    assert abs(result.params["loc"][0] - SERIES["x"].sum() / precision) < 0.5 * scale
    assert abs(result.params["scale"][0] / scale - 1) < 0.2
    assert sample_posterior(result, SERIES, 3)["m"].shape == (1, 3)


# --- mutable state --------------------------------------------------------------------------------


class Network(nn.Module):
    """A linear map after batch norm, which keeps running averages."""

    train: bool

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not self.train, momentum=0.5)(x))


def normalised(x, train=True):
    network = flax_module("net", Network(train), mutable=["batch_stats"], input_shape=(1, 1))
    with numpyro.plate("people", len(x)):
        numpyro.sample("z", dist.Normal(network(x[:, None])[:, 0], 0.8))


@pytest.fixture(scope="module")
def with_state():
    data = {"x": RNG.normal(3, 2, 64).astype(np.float32)}
    settings = {"batch_size": 16, "num_seeds": 2, "num_steps": 40, "optimizer": optax.adam(0.01)}
    result = train(local, normalised, data, **settings)
    return dataclasses.replace(result, guide=partial(normalised, train=False)), data


def test_a_fit_holds_the_mutable_state_of_every_seed(with_state):
    result, _ = with_state
    averages = result.mutable["net$state"]["batch_stats"]["BatchNorm_0"]
    assert averages["mean"].shape == (2, 1)
    # averages of about two batches of 16 data with mean 3 and deviation 2
    assert (abs(averages["mean"] - 3) < 4.5 * 2 / 16**0.5).all()
    assert result.isel(seed=1).mutable["net$state"]["batch_stats"]["BatchNorm_0"]["mean"].shape == (
        1,
        1,
    )


def test_judges_use_it(with_state):
    result, data = with_state
    numbers = pointwise_elbo(result, data, num_samples=5).pointwise
    moved = jax.tree.map(lambda average: average + 1, result.mutable)
    others = pointwise_elbo(
        dataclasses.replace(result, mutable=moved), data, num_samples=5
    ).pointwise
    assert abs(others - numbers).min() > 0
    for i in range(2):
        alone = pointwise_elbo(result.isel(seed=i), data, num_samples=5).pointwise
        np.testing.assert_array_equal(alone, numbers[i : i + 1])


def test_it_is_saved(with_state, tmp_path):
    result, data = with_state
    result.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", local, result.guide)
    jax.tree.map(np.testing.assert_array_equal, loaded.mutable, result.mutable)
    known = Fit.from_params(
        local, result.guide, result.params_of(0), example=data, mutable=result.mutable_of(0)
    )
    np.testing.assert_array_equal(
        pointwise_elbo(known, data).pointwise, pointwise_elbo(loaded, data).pointwise[:1]
    )


def test_a_run_goes_on_with_it(with_state):
    result, data = with_state
    settings = {"batch_size": 16, "optimizer": optax.adam(0.01)}
    whole = train(local, normalised, data, num_seeds=2, num_steps=50, **settings)
    second = train(local, normalised, data, init=result, num_steps=10, **settings)
    np.testing.assert_array_equal(second.elbo, whole.elbo)
    jax.tree.map(np.testing.assert_array_equal, second.mutable, whole.mutable)


def test_a_run_starts_from_parameters_beside_it(with_state):
    result, data = with_state
    settings = {"num_steps": 1, "optimizer": optax.sgd(0.0), "init": result.params_of(0)}
    second = train(local, normalised, data, **settings)
    for name, value in result.params_of(0).items():
        jax.tree.map(
            np.testing.assert_allclose, jax.tree.map(lambda p: p[0], second.params[name]), value
        )


def test_mutable_state_needs_an_objective_that_carries_it():
    data = {"x": RNG.normal(size=16).astype(np.float32)}
    with pytest.raises(ValueError, match="expected one particle for programs with mutable state"):
        train(local, normalised, data, objective=Trace_ELBO(num_particles=2))
