"""The linear-Gaussian model: each closed form against an independent calculation, and training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import random
from numpyro import handlers
from scipy import optimize, stats

from inference import Held, fit, pointwise_elbo
from models import linear_gaussian as lg
from models.conditions import Labels, Values

# Compiled once a shape.
log_likelihood = jax.jit(lg.log_likelihood, static_argnums=0)
posterior = jax.jit(lg.posterior, static_argnums=0)
prior_gap = jax.jit(lg.prior_gap, static_argnums=0)
mean_field_gap = jax.jit(lg.mean_field_gap)

CONDITIONS = {"none": None, "values": Values((2,)), "labels": Labels(3)}


def make(name, x_shape=(5,), num_latents=2, num_data=400, seed=0):
    """A model, the parameters that made its data, and the data."""
    rng = np.random.default_rng(seed)
    condition = CONDITIONS[name]
    model = lg.Model(x_shape, num_latents, condition)
    D = math.prod(x_shape)
    params = {
        "W": rng.normal(size=(D, num_latents)),
        "b": rng.normal(size=D),
        "sigma": np.array(0.6),
    }
    x = rng.normal(size=(num_data, num_latents)) @ params["W"].T + params["b"]
    x += params["sigma"] * rng.normal(size=x.shape)
    data = {}
    if condition is not None:
        params["B"] = rng.normal(size=(D, condition.num_features))
        if name == "labels":
            data["c"] = rng.integers(0, 3, num_data).astype(np.int32)
            features = np.eye(3)[data["c"]]
        else:
            data["c"] = rng.normal(size=(num_data, 2)).astype(np.float32)
            features = data["c"]
        x += features @ params["B"].T
    data["x"] = x.reshape(num_data, *x_shape).astype(np.float32)
    return model, {k: np.asarray(v, np.float32) for k, v in params.items()}, data


def residual(params, data, name):
    """x - B c - b, by NumPy, (N, D) in float64."""
    x = data["x"].reshape(len(data["x"]), -1).astype(np.float64)
    r = x - np.asarray(params["b"], np.float64)
    if name == "none":
        return r
    features = np.eye(3)[data["c"]] if name == "labels" else data["c"].astype(np.float64)
    return r - features @ np.asarray(params["B"], np.float64).T


def covariance(params):
    W = np.asarray(params["W"], np.float64)
    return W @ W.T + float(params["sigma"]) ** 2 * np.eye(len(W))


# --- two guides: one affine encoder, written out --------------------------------------------------


def encode(model, x, c, num_outputs):
    inputs = x.reshape(len(x), -1)
    if c is not None:
        inputs = jnp.concatenate([inputs, model.features(c)], axis=1)
    n = inputs.shape[1]
    A = numpyro.param("A", lambda key: random.normal(key, (n, num_outputs)) / jnp.sqrt(n))
    return inputs @ A + numpyro.param("a", jnp.zeros(num_outputs))


def mean_field(model):
    def guide(x, c=None):
        z_loc = encode(model, x, c, model.num_latents)
        ones = jnp.ones(model.num_latents)
        z_scale = numpyro.param("z_scale", ones, constraint=dist.constraints.positive)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))

    return guide


def full_covariance(model):
    def guide(x, c=None):
        z_loc = encode(model, x, c, model.num_latents)
        scale_tril = numpyro.param(
            "scale_tril", jnp.eye(model.num_latents), constraint=dist.constraints.lower_cholesky
        )
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.MultivariateNormal(z_loc, scale_tril=scale_tril))

    return guide


def exact_guide(model, params, name):
    """The parameters of ``full_covariance`` that make it the posterior, by hand in NumPy."""
    W, sigma = np.asarray(params["W"], np.float64), float(params["sigma"])
    S = np.linalg.inv(np.eye(W.shape[1]) + W.T @ W / sigma**2)
    gain = S @ W.T / sigma**2
    A = gain.T if name == "none" else np.concatenate([gain.T, -(gain @ np.asarray(params["B"])).T])
    return {
        "A": A.astype(np.float32),
        "a": (-gain @ np.asarray(params["b"])).astype(np.float32),
        "scale_tril": np.linalg.cholesky(S).astype(np.float32),
    }


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONS)
def test_log_likelihood_is_that_of_the_joint_gaussian(name):
    model, params, data = make(name, x_shape=(2, 3))
    expected = stats.multivariate_normal(cov=covariance(params)).logpdf(
        residual(params, data, name)
    )
    np.testing.assert_allclose(log_likelihood(model, params, data), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CONDITIONS)
def test_posterior_conditions_the_joint_gaussian(name):
    model, params, data = make(name)
    W, S = np.asarray(params["W"], np.float64), covariance(params)
    gain = np.linalg.solve(S, W).T  # Cov(z, x) Cov(x)^-1
    mean, cov = posterior(model, params, data)
    np.testing.assert_allclose(mean, residual(params, data, name) @ gain.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cov, np.eye(2) - gain @ W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONDITIONS)
def test_under_the_exact_posterior_every_z_gives_the_exact_likelihood(name):
    model, params, data = make(name, num_data=50)
    expected = log_likelihood(model, params, data)
    params = params | exact_guide(model, params, name)
    guide = full_covariance(model)

    @jax.jit
    def weights(params, key):
        """log p(x, z | c) - log q(z | x, c) at a draw of z."""

        def trace(program, params):
            program = handlers.seed(handlers.substitute(program, params), key)
            return handlers.trace(program).get_trace(**data)

        q = trace(guide, params)["z"]
        p = trace(model, params | {"z": q["value"]})
        log_p = sum(p[site]["fn"].log_prob(p[site]["value"]) for site in ("z", "x"))
        return log_p - q["fn"].log_prob(q["value"])

    for key in map(random.key, range(3)):
        np.testing.assert_allclose(weights(params, key), expected, rtol=1e-5, atol=1e-4)
    wrong = params | {"a": params["a"] + np.float32(0.3)}
    assert np.abs(weights(wrong, key) - expected).max() > 0.1


def divergence(loc, cov, mean, precision):
    """KL(Normal(loc, cov) || Normal(mean, precision^-1))."""
    off = loc - mean
    log_det = np.linalg.slogdet(precision)[1] + np.linalg.slogdet(cov)[1]
    return 0.5 * (np.trace(precision @ cov) + off @ precision @ off - len(loc) - log_det)


def test_mean_field_gap_is_the_least_divergence_of_any_diagonal_gaussian():
    model, params, data = make("none", num_latents=3)
    mean, cov = (np.asarray(a, np.float64) for a in posterior(model, params, data))
    precision = np.linalg.inv(cov)

    def objective(u):
        return divergence(u[:3], np.diag(np.exp(u[3:])), mean[0], precision)

    found = optimize.minimize(objective, np.zeros(6), method="BFGS", tol=1e-10)
    gap = float(mean_field_gap(params))
    assert gap > 0.1
    np.testing.assert_allclose(found.fun, gap, rtol=1e-4)
    W = np.linalg.svd(np.asarray(params["W"]), full_matrices=False)[0] * [3.0, 2.0, 1.0]
    assert abs(float(mean_field_gap({"W": W, "sigma": 0.5}))) < 1e-5


def test_prior_gap_is_the_divergence_of_the_prior():
    model, params, data = make("values", num_latents=3)
    mean, cov = (np.asarray(a, np.float64) for a in posterior(model, params, data))
    precision = np.linalg.inv(cov)
    expected = [divergence(np.zeros(3), np.eye(3), m, precision) for m in mean]
    np.testing.assert_allclose(prior_gap(model, params, data), expected, rtol=1e-4)


@pytest.mark.parametrize("name", CONDITIONS)
def test_maximum_likelihood_is_where_no_optimiser_finds_more(name):
    model, truth, data = make(name, x_shape=(2, 2), num_latents=2, num_data=100)
    solution, maximum = lg.maximum_likelihood(model, data)

    def mean_log_likelihood(params):
        S = covariance(params)
        return stats.multivariate_normal(cov=S).logpdf(residual(params, data, name)).mean()

    np.testing.assert_allclose(mean_log_likelihood(solution), maximum, atol=1e-8)
    assert mean_log_likelihood({k: np.asarray(v) for k, v in truth.items()}) < maximum
    rng = np.random.default_rng(1)
    for key in solution:  # each alone, and all together
        for _ in range(10):
            off = {k: v + 0.02 * rng.normal(size=v.shape) for k, v in solution.items()}
            assert mean_log_likelihood(solution | {key: off[key]}) < maximum
            assert mean_log_likelihood(off) < maximum

    shapes = {k: v.shape for k, v in solution.items()}

    def unpack(vector):
        sizes = [math.prod(s) for s in shapes.values()]
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        params = {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}
        return params | {"sigma": np.exp(params["sigma"])}

    start = rng.normal(size=sum(map(math.prod, shapes.values())))
    found = optimize.minimize(lambda v: -mean_log_likelihood(unpack(v)), start, method="L-BFGS-B")
    assert maximum - 1e-3 < -found.fun <= maximum + 1e-8
    np.testing.assert_allclose(
        covariance(unpack(found.x)), covariance(solution), atol=0.05 * covariance(solution).max()
    )


def test_the_maximum_has_orthogonal_columns_and_no_mean_field_gap():
    model, _, data = make("none", num_latents=3)
    solution, _ = lg.maximum_likelihood(model, data)
    assert abs(float(mean_field_gap(solution))) < 1e-5


def test_pixels_that_never_vary_are_nothing_special():
    _, _, data = make("none")
    x = np.concatenate([data["x"], np.full((400, 3), 0.25, np.float32)], axis=1)
    wide = lg.Model((8,), 2)
    solution, maximum = lg.maximum_likelihood(wide, {"x": x})
    exact = log_likelihood(wide, solution, {"x": x})
    assert abs(float(exact.mean()) - maximum) < 1e-4
    np.testing.assert_allclose(solution["W"][5:], 0, atol=1e-8)


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_model_generates_what_the_formulas_say(name):
    model, params, data = make(name, num_data=20_000)
    given = {k: v for k, v in data.items() if k == "c"}

    def generate(key, **given):
        program = handlers.seed(handlers.substitute(model, params), key)
        return handlers.trace(program).get_trace(**given)["x"]["value"]

    if given:
        x = jax.jit(generate)(random.key(0), **given)
    else:
        x = jax.jit(jax.vmap(generate))(random.split(random.key(0), 20_000))[:, 0]
    r = residual(params, {"x": np.asarray(x)} | given, name)
    S = covariance(params)
    assert (np.abs(r.mean(0)) < 4.5 * np.sqrt(np.diag(S) / len(r))).all()
    moments = (r[:, :, None] * r[:, None, :]).reshape(len(r), -1)
    error = moments.std(0) / np.sqrt(len(r))
    assert (np.abs(moments.mean(0) - S.ravel()) < 4.5 * error).all()


# --- training -------------------------------------------------------------------------------------


def train(model, guide, data, num_steps=1_500):
    schedule = optax.cosine_decay_schedule(0.03, num_steps)
    return fit(
        model,
        guide,
        data,
        optimizer=optax.adam(schedule, b2=0.99),
        num_steps=num_steps,
        batch_size=100,
        average=0.2,
        progress=False,
    )


def gap(result, exact, data):
    """log p(x | c) - ELBO: the mean over data and draws, and its standard error."""
    elbo = pointwise_elbo(result, data, key=random.key(7), num_samples=50).pointwise[0]
    gaps = np.asarray(exact - elbo, np.float64)
    return gaps.mean(), gaps.std() / np.sqrt(len(gaps))


@pytest.mark.slow
def test_training_arrives_at_the_maximum_with_full_covariance_and_with_mean_field():
    model, _, data = make("values", num_data=1_000)
    best, maximum = lg.maximum_likelihood(model, data)
    # of the maximum as an estimate for other data of the same kind
    error = np.std(log_likelihood(model, best, data)) / np.sqrt(1_000)
    for family in (full_covariance, mean_field):
        result = train(model, family(model), data)
        exact = log_likelihood(model, result.params_of(0), data)
        reached = float(np.mean(np.asarray(exact, np.float64)))
        loss, loss_error = gap(result, exact, data)
        assert reached < maximum + 1e-4
        assert maximum - reached < error / 10
        assert -4 * loss_error < loss < error / 10 + 4 * loss_error


@pytest.mark.slow
def test_a_held_model_costs_mean_field_its_gap_and_full_covariance_nothing():
    model, _, data = make("labels", num_data=1_000)
    held = {
        k: jnp.asarray(v, jnp.float32) for k, v in lg.maximum_likelihood(model, data)[0].items()
    }
    angle = 0.7
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    held["W"] = held["W"] @ jnp.asarray(rotation, jnp.float32)
    exact = log_likelihood(model, held, data)
    error = np.std(exact) / np.sqrt(1_000)
    predicted = {mean_field: float(mean_field_gap(held)), full_covariance: 0.0}
    assert predicted[mean_field] > error
    for family, expected in predicted.items():
        result = train(Held(model, held), family(model), data)
        assert not result.params.keys() & held.keys()
        loss, loss_error = gap(result, exact, data)
        # no guide of the family does better; this one may be a little short of the best
        assert expected - 4 * loss_error < loss < expected + error / 10 + 4 * loss_error


# --- the encoder ----------------------------------------------------------------------------------


def test_the_encoder_is_an_affine_map_unless_told():
    model, _, data = make("labels", x_shape=(2, 2), num_data=5)

    @jax.jit
    def run(data):
        encoder = model.encoder(3, rngs=nnx.Rngs(0))
        assert len(model.encoder(3, hidden=(4,), rngs=nnx.Rngs(0)).mlp.layers) == 2
        (layer,) = encoder.mlp.layers
        return encoder(**data), layer.kernel[...], layer.bias[...]

    output, kernel, bias = jax.device_get(run(data))
    inputs = np.concatenate([data["x"].reshape(5, 4), np.eye(3)[data["c"]]], axis=1)
    np.testing.assert_allclose(output, inputs @ kernel + bias, rtol=1e-5, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------


def plane(num_data):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(num_data, 2)) @ rng.normal(size=(2, 5))).astype(np.float32)


@pytest.mark.parametrize(
    ("num_latents", "x", "message"),
    [
        (2, plane(50), "more than num_latents = 2 directions, got 2 from 50 data; the likelihood"),
        (3, np.eye(5, dtype=np.float32)[:3], "num_latents = 3 directions, got 2 from 3 data"),
        (1, np.ones((50, 5), np.float32), "num_latents = 1 directions, got 0 from 50 data"),
        (5, plane(50), "num_latents: expected fewer than the 5 numbers of one x, got 5"),
    ],
)
def test_data_without_a_maximum_are_refused(num_latents, x, message):
    with pytest.raises(lg.NoMaximumError, match=message):
        lg.maximum_likelihood(lg.Model((5,), num_latents), {"x": x})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lg.Model(()), r"x_shape: expected positive sizes, got \(\)"),
        (lambda: lg.Model((5, 0)), r"x_shape: expected positive sizes, got \(5, 0\)"),
        (lambda: lg.Model((5,), 0), "num_latents: expected at least 1, got 0"),
        (
            lambda: lg.Model((5,), 2, Labels(3, num_embedded=2)),
            "condition: expected labels without an embedding, got .*leave num_embedded out",
        ),
        (
            lambda: lg.Model((5,), 2).check_data(c=np.zeros(3, int)),
            "c: expected none, got some; leave c out of the data",
        ),
        (
            lambda: lg.Model((5,), 2, Labels(3)).check_data(x=np.zeros((3, 5), np.float32)),
            "c: expected conditions, got none",
        ),
        (
            lambda: lg.Model((5,), 2, Labels(3)).check_data(c=np.array([0, 3])),
            "c: expected labels 0 to 2, got 3",
        ),
        (
            lambda: lg.Model((5,), 2).check_data(x=np.zeros((3, 5), np.uint8)),
            r"x: expected floats, got uint8; give the data as floats",
        ),
        (
            lambda: lg.Model((5,), 2).check_data(x=np.zeros((3, 6), np.float32)),
            r"x: expected shape \(N, 5\), got \(3, 6\); reshape x, or set x_shape=\(6,\)",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
