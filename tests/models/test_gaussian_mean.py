"""The closed forms of the Gaussian unknown mean, each against an independent calculation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy import optimize, stats

from models import gaussian_mean as gm

TRUTHS = [gm.Truth(), gm.Truth(-3.0, 0.5, 2.0), gm.Truth(40.0, 2.0, 0.4)]


def constrained(params):
    return {name: jnp.float32(value) for name, value in params.items()}


def log_weight(params, truth, data, z):
    """log p(x, z | c) - log q(z | x, c), summed over the data, by NumPyro."""
    params = constrained(params)
    log_p, _ = log_density(gm.Model(truth.sigma_0), (), data, params | {"z": z})
    log_q, _ = log_density(gm.Guide(truth.sigma_0), (), data, params | {"z": z})
    return log_p - log_q


@pytest.mark.parametrize("truth", TRUTHS)
def test_at_the_optimum_every_z_gives_the_exact_likelihood(truth):
    data = truth.simulate(50, seed=1)
    for datum in range(3):
        one = {name: array[datum : datum + 1] for name, array in data.items()}
        exact = stats.norm.logpdf(
            one["x"][0], truth.mu_0 + one["c"][0], truth.marginal_variance**0.5
        )
        loc, scale = gm.posterior(gm.optimum(truth), truth.sigma_0, one["c"], one["x"])
        for deviations in (-2.0, 0.0, 0.7, 3.0):
            weight = log_weight(gm.optimum(truth), truth, one, loc + deviations * scale)
            # float32 rounds |z| near 40 to 4e-6, which sigma turns into nats
            np.testing.assert_allclose(weight, exact, rtol=2e-5, atol=2e-4)
        np.testing.assert_allclose(
            gm.log_likelihood(constrained(gm.optimum(truth)), truth.sigma_0, one["c"], one["x"]),
            exact,
            rtol=2e-5,
            atol=2e-4,
        )


def test_away_from_the_optimum_the_weight_depends_on_z():
    truth = gm.Truth()
    data = truth.simulate(1, seed=1)
    params = gm.optimum(truth) | {"phi_1": 0.3}
    weights = [log_weight(params, truth, data, jnp.array([z])) for z in (0.0, 1.0)]
    assert abs(weights[0] - weights[1]) > 0.1


@pytest.mark.parametrize("truth", TRUTHS)
def test_posterior_is_bayes_rule_on_a_grid(truth):
    c, x = 0.7, truth.mu_0 + 1.5
    params = gm.optimum(truth)
    loc, scale = gm.posterior(params, truth.sigma_0, jnp.array([c]), jnp.array([x]))
    z = np.linspace(float(loc[0]) - 8 * float(scale), float(loc[0]) + 8 * float(scale), 20_001)
    joint = stats.norm.pdf(z, truth.mu_0 + c, truth.sigma_0) * stats.norm.pdf(x, z, truth.sigma)
    joint /= joint.sum()
    mean = (joint * z).sum()
    np.testing.assert_allclose(loc[0], mean, rtol=1e-5)
    np.testing.assert_allclose(scale, np.sqrt((joint * (z - mean) ** 2).sum()), rtol=1e-4)
    guide = params["phi_1"] * x + params["phi_2"] * c + params["phi_3"]
    np.testing.assert_allclose(guide, mean, rtol=1e-5)
    np.testing.assert_allclose(np.exp(params["phi_4"] / 2), scale, rtol=1e-5)


@pytest.mark.parametrize("truth", TRUTHS)
def test_optimal_elbo_is_the_mean_log_likelihood(truth):
    data = truth.simulate(200_000, seed=2)
    log_p = stats.norm.logpdf(data["x"], truth.mu_0 + data["c"], truth.marginal_variance**0.5)
    assert abs(log_p.mean() - gm.optimal_elbo(truth)) < 4 * log_p.std() / len(log_p) ** 0.5


def exact_elbo(params, sigma_0, c, x):
    """E_q log p(x, z | c) - E_q log q by the formula for expected quadratics; nats per datum."""
    t1, t2, t3, p1, p2, p3, p4 = params
    loc, variance = p1 * x + p2 * c + p3, np.exp(p4)
    log_z = -0.5 * (
        np.log(2 * np.pi * sigma_0**2) + ((loc - t1 - t2 * c) ** 2 + variance) / sigma_0**2
    )
    log_x = -0.5 * (np.log(2 * np.pi) + t3 + ((x - loc) ** 2 + variance) / np.exp(t3))
    return np.mean(log_z + log_x) + 0.5 * (np.log(2 * np.pi * np.e) + p4)


@pytest.mark.parametrize("truth", [gm.Truth(), gm.Truth(-3.0, 0.5, 1.0), gm.Truth(2.0, 1.0, 0.5)])
def test_maximum_likelihood_maximises_the_exact_elbo(truth):
    data = truth.simulate(3_000, seed=3)
    c, x = data["c"].astype(float), data["x"].astype(float)
    solution, best = gm.maximum_likelihood(data, truth.sigma_0)
    point = np.array([solution[name] for name in gm.PARAMETERS])
    np.testing.assert_allclose(exact_elbo(point, truth.sigma_0, c, x), best, atol=1e-9)
    found = optimize.minimize(
        lambda p: -exact_elbo(p, truth.sigma_0, c, x), point + 0.05, method="BFGS", tol=1e-9
    )
    np.testing.assert_allclose(found.x, point, atol=2e-4)
    assert -found.fun <= best + 1e-9


@pytest.mark.parametrize("truth", [gm.Truth(), gm.Truth(3.0, 0.5, 1.0), gm.Truth(-2.0, 2.0, 1.0)])
def test_standard_errors_are_the_spread_of_the_solution(truth):
    num_data, replicates = 4_000, 300
    solutions = [
        gm.maximum_likelihood(truth.simulate(num_data, seed), truth.sigma_0)[0]
        for seed in range(replicates)
    ]
    for name, expected in gm.standard_errors(truth, num_data).items():
        values = np.array([s[name] for s in solutions])
        # a standard deviation from R replicates has the relative error 1 / sqrt(2 R)
        assert abs(values.std() / expected - 1) < 4 / (2 * replicates) ** 0.5, name
        assert abs(values.mean() - gm.optimum(truth)[name]) < 5 * expected / replicates**0.5 + (
            0.1 * expected
        ), name


def test_standard_errors_follow_the_conditions_moments():
    rng = np.random.default_rng(0)
    truth, num_data = gm.Truth(), 4_000
    c = rng.normal(3.0, 0.5, num_data)
    slopes, intercepts = [], []
    for _ in range(300):
        x = truth.mu_0 + c + rng.normal(size=num_data) * truth.marginal_variance**0.5
        solution, _ = gm.maximum_likelihood({"c": c, "x": x}, truth.sigma_0)
        slopes.append(solution["theta_2"])
        intercepts.append(solution["theta_1"])
    errors = gm.standard_errors(truth, num_data, c.mean(), c.var())
    assert abs(np.std(slopes) / errors["theta_2"] - 1) < 4 / 600**0.5
    assert abs(np.std(intercepts) / errors["theta_1"] - 1) < 4 / 600**0.5


def test_model_generates_what_the_simulator_does():
    truth = gm.Truth(2.0, 1.5, 0.5)
    c = jnp.linspace(-1, 1, 40_000)
    params = constrained(gm.optimum(truth))
    program = handlers.seed(handlers.substitute(gm.Model(truth.sigma_0), params), 0)
    x = np.asarray(handlers.trace(program).get_trace(c=c)["x"]["value"])
    residual = x - truth.mu_0 - np.asarray(c)
    error = (truth.marginal_variance / len(x)) ** 0.5
    assert abs(residual.mean()) < 4 * error
    assert abs(residual.var() / truth.marginal_variance - 1) < 4 * (2 / len(x)) ** 0.5
    simulated = truth.simulate(40_000, seed=0)
    residual = simulated["x"] - truth.mu_0 - simulated["c"]
    assert abs(residual.var() / truth.marginal_variance - 1) < 4 * (2 / len(x)) ** 0.5


def test_every_seed_starts_elsewhere():
    def start(key):
        data = gm.Truth().simulate(5, seed=0)
        sites = handlers.trace(handlers.seed(gm.Model(), key)).get_trace(**data)
        return sites["theta_1"]["value"]

    assert start(jax.random.key(0)) != start(jax.random.key(1))


def test_the_encoder_is_an_affine_map_unless_told(rng):
    data = {name: jnp.asarray(array) for name, array in gm.Truth().simulate(5, seed=0).items()}
    encoder = gm.Model().encoder(3, rngs=nnx.Rngs(0))
    (layer,) = encoder.mlp.layers
    inputs = np.stack([data["x"], data["c"]], axis=1)
    expected = inputs @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(encoder(**data), expected, rtol=1e-5, atol=1e-6)
    deeper = gm.Model().encoder(3, hidden=(4,), rngs=nnx.Rngs(0))
    assert len(deeper.mlp.layers) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": np.zeros(3)}, "c: expected conditions, got none"),
        ({"c": np.zeros((3, 1))}, r"c: .* shape \(N,\), got \(3, 1\); give one column.* c\[:, 0\]"),
        ({"c": np.zeros(3), "x": jnp.zeros((3, 2))}, r"x: expected one number .*got \(3, 2\)"),
    ],
)
def test_data_that_are_not_one_number_each_are_refused(data, message):
    gm.Model().check_data(c=np.zeros(3), x=np.zeros(3))
    gm.Model().check_data(c=np.zeros(3))
    with pytest.raises(ValueError, match=message):
        gm.Model().check_data(**data)


def test_no_maximum_is_said():
    with pytest.raises(gm.NoMaximumError, match=r"residual variance above sigma_0\^2 = 4, got"):
        gm.maximum_likelihood(gm.Truth().simulate(100, seed=0), sigma_0=2.0)
    x = np.arange(5.0)
    with pytest.raises(gm.NoMaximumError, match=r"only theta_1 \+ 3 \* theta_2 is identified"):
        gm.maximum_likelihood({"c": np.full(5, 3.0), "x": x}, sigma_0=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gm.Truth(sigma=0.0), "sigma: expected a positive, finite.*got 0.0"),
        (lambda: gm.Truth(sigma_0=-1.0), "sigma_0: expected a positive, finite.*got -1.0"),
        (lambda: gm.Truth(mu_0=float("nan")), "mu_0: expected a finite number, got nan"),
        (lambda: gm.Model(sigma_0=float("inf")), "sigma_0: expected a positive, finite"),
        (lambda: gm.Guide(sigma_0=0.0), "sigma_0: expected a positive, finite"),
        (lambda: gm.Truth().simulate(0, seed=0), "num_data: expected at least 1, got 0"),
        (lambda: gm.Truth(mu_0=1e39).simulate(9, seed=0), r"float32 holds, got some near 1e\+39"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
