"""The bounds and their gradients against exact values.

The expectation over draws is exact in two places. The ELBO of a linear-Gaussian model is a formula.
The importance-weighted bound of two draws of a scalar z is an integral over the plane, which
Gauss-Hermite quadrature takes; its gradient follows by differentiating the quadrature.
"""

from contextlib import ExitStack
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.distributions.transforms import LowerCholeskyAffine
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO
from numpyro.nn import AutoregressiveNN
from scipy import stats

from inference import (
    DoublyReparameterized,
    ImportanceWeighted,
    InPieces,
    ReweightedWakeSleep,
    StickingTheLanding,
)
from inference.sites import trace_of
from models import gaussian_mean, hierarchical

KEY = random.key(0)
ERRORS = 4.5  # standard errors that a mean may lie from its expectation

# --- the toy, and one whose prior is the guide ----------------------------------------------------

TRUTH = gaussian_mean.Truth()
TOY = gaussian_mean.Model(), gaussian_mean.Guide(), TRUTH.simulate(4, seed=0)
OPTIMUM = {name: jnp.float32(value) for name, value in gaussian_mean.optimum(TRUTH).items()}
OFF = {"phi_1": 0.1, "phi_3": -0.2, "phi_4": 0.3, "theta_1": 0.3}
NEAR = {name: value + OFF.get(name, 0.0) for name, value in OPTIMUM.items()}


def toy_densities(p, c, x):
    """The guide's location and scale, and log p(x, z | c) as a function of z."""

    def log_joint(z):
        prior = dist.Normal(p["theta_1"] + p["theta_2"] * c, TRUTH.sigma_0).log_prob(z)
        return prior + dist.Normal(z, jnp.exp(p["theta_3"] / 2)).log_prob(x)

    return p["phi_1"] * x + p["phi_2"] * c + p["phi_3"], jnp.exp(p["phi_4"] / 2), log_joint


def prior(c):
    slope, log_scale = numpyro.param("slope", 0.7), numpyro.param("log_scale", 0.2)
    return dist.Normal(slope * c, jnp.exp(log_scale))


def shared_model(c, x):
    noise = numpyro.param("noise", 1.3)
    with numpyro.plate("data", len(c)):
        z = numpyro.sample("z", prior(c))
        numpyro.sample("x", dist.Normal(z, noise), obs=x)


def shared_guide(c, x):
    with numpyro.plate("data", len(c)):
        numpyro.sample("z", prior(c))


def shared_densities(p, c, x):
    scale = jnp.exp(p["log_scale"])

    def log_joint(z):
        return dist.Normal(p["slope"] * c, scale).log_prob(z) + dist.Normal(z, p["noise"]).log_prob(
            x
        )

    return p["slope"] * c, scale, log_joint


SHARED = shared_model, shared_guide, TOY[2]
SHARED_PARAMS = {"slope": 0.7, "log_scale": 0.2, "noise": 1.3}
CASES = {"toy": (TOY, NEAR, toy_densities), "shared": (SHARED, SHARED_PARAMS, shared_densities)}


# --- two stochastic layers ------------------------------------------------------------------------


def two_layers(x_size=4, hidden=3, num_data=3):
    """A ladder of two layers, its guide, data, and parameters away from their start."""
    above = (hierarchical.Layer(2, (hidden,)),)
    settings = {"x_shape": (x_size,), "num_latents": 2, "hidden": (hidden,)}
    model = hierarchical.Model(**settings, above=above, activation=jnp.tanh)
    guide = hierarchical.BottomUp(model)
    x = np.random.default_rng(0).integers(0, 2, (num_data, x_size)).astype(np.float32)

    @jax.jit
    def start():
        sites = trace_of(guide, KEY, {}, x=x) | trace_of(model, KEY, {}, x=x)
        return {name: s["value"] for name, s in sites.items() if s["type"] == "param"}

    return (model, guide, {"x": x}), start()


TWO = {"toy": lambda: (TOY, NEAR), "two layers": two_layers}


@partial(jax.jit, static_argnums=0)
def exact_bound(densities, params, data):
    """The importance-weighted bound of two draws, summed over the data."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = jnp.asarray(weights / weights.sum())
    loc, scale, log_joint = densities(params, data["c"][:, None], data["x"][:, None])
    z = loc + scale * jnp.asarray(nodes)
    log_w = log_joint(z) - dist.Normal(loc, scale).log_prob(z)
    pairs = jnp.logaddexp(log_w[:, :, None], log_w[:, None, :]) - jnp.log(2.0)
    return jnp.einsum("nij,i,j->", pairs, weights, weights)


def draws(objective, programs, params, num_draws, gradient=True):
    """Of many keys, the bound (minus the loss) and its gradient."""
    model, guide, data = programs

    def bound(params, key):
        return -objective.loss(key, params, model, guide, **data)

    run = jax.value_and_grad(bound) if gradient else bound
    run = jax.jit(jax.vmap(run, in_axes=(None, 0)))
    return jax.device_get(run(jax.tree.map(jnp.float32, params), random.split(KEY, num_draws)))


def assert_mean(values, expected, name=""):
    values = np.asarray(values, np.float64)
    error = values.std(0) / np.sqrt(len(values))
    rounding = 2e-5 * (1 + np.abs(expected))
    assert (np.abs(values.mean(0) - expected) < ERRORS * error + rounding).all(), name


@pytest.mark.parametrize(
    ("case", "objective"),
    [
        ("toy", RenyiELBO(num_particles=2)),
        ("toy", DoublyReparameterized(2)),
        ("shared", DoublyReparameterized(2)),
    ],
)
def test_the_importance_weighted_bound_and_its_gradient_are_unbiased(case, objective):
    programs, params, densities = CASES[case]
    exact = jax.jit(jax.value_and_grad(partial(exact_bound, densities)))
    value, gradient = jax.device_get(exact(params, programs[2]))
    bounds, gradients = draws(objective, programs, params, 20_000)
    assert_mean(bounds, value)
    for name in params:
        assert abs(gradient[name]) > 1e-2, name  # so that zero would not pass
        assert_mean(gradients[name], gradient[name], name)


def test_weights_over_a_whole_batch_would_be_another_bound():
    """What the data plate is for: without it weights are those of all data together."""

    def joint_model(c, x):
        z = numpyro.sample("z", dist.Normal(NEAR["theta_1"] + c, 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z, jnp.exp(NEAR["theta_3"] / 2)).to_event(1), obs=x)

    def joint_guide(c, x):
        loc, scale, _ = toy_densities(NEAR, c, x)
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    objective = RenyiELBO(num_particles=2)
    bounds = draws(objective, (joint_model, joint_guide, TOY[2]), {}, 20_000, gradient=False)
    exact = exact_bound(toy_densities, NEAR | {"theta_2": 1.0}, TOY[2])
    assert bounds.mean() + ERRORS * bounds.std() / 20_000**0.5 < exact


@pytest.mark.parametrize(
    "programs", [pytest.param(name, marks=[pytest.mark.slow] * (name != "toy")) for name in TWO]
)
def test_one_particle_is_the_elbo(programs):
    (model, guide, data), params = TWO[programs]()

    def value_and_grad(objective, key):
        return jax.value_and_grad(lambda p: objective.loss(key, p, model, guide, **data))(params)

    @jax.jit
    def values_and_grads():
        keys = jnp.stack([KEY, random.split(random.split(KEY)[1], 1)[0]])
        objectives = ImportanceWeighted(1), StickingTheLanding(), DoublyReparameterized(1)
        elbos = lax.map(lambda key: value_and_grad(Trace_ELBO(), key), keys)
        return elbos, [value_and_grad(objective, KEY) for objective in objectives]

    elbos, (weighted, landing, doubly) = jax.device_get(values_and_grads())
    elbo = jax.tree.map(lambda value: value[1], elbos)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), weighted, elbo)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), doubly, landing)
    np.testing.assert_allclose(landing[0], elbos[0][0], rtol=1e-6)


@pytest.mark.slow
def test_with_two_layers_both_bounds_have_one_gradient():
    """Draw by draw they differ. The means over many draws agree, parameter by parameter."""
    programs, params = two_layers()
    plain, doubly = (
        draws(objective, programs, params, 2_000)
        for objective in (ImportanceWeighted(3), DoublyReparameterized(3))
    )
    assert (
        abs(plain[0].mean() - doubly[0].mean())
        < ERRORS * np.hypot(plain[0].std(), doubly[0].std()) / 2_000**0.5
    )
    for name in params:
        pairs = zip(*map(jax.tree.leaves, (plain[1][name], doubly[1][name])), strict=True)
        for one, other in pairs:
            error = np.hypot(one.std(0), other.std(0)) / 2_000**0.5
            assert (np.abs(one.mean(0) - other.mean(0)) <= ERRORS * error + 1e-5).all(), name
            assert (np.abs(other.mean(0)) > ERRORS * error).any(), (
                name
            )  # so that zero would not pass


# --- many particles -------------------------------------------------------------------------------

WIDE = np.random.default_rng(2).normal(size=(2, 1, 300)).astype(np.float32)
LEVELS = np.linspace(-1, 1, 16).astype(np.float32)


def wide_model(x):
    """Its decoder has 300 activations for each particle and datum."""
    up, down = (numpyro.param(name, w) for name, w in zip(("up", "down"), WIDE, strict=True))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(jnp.tanh(z[:, None] @ up) @ down[0] / 300, 0.5), obs=x)


def wide_guide(x):
    slope, scale = numpyro.param("slope", 0.3), numpyro.param("scale", 0.6)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, scale))


def wide():
    params = {"up": WIDE[0], "down": WIDE[1], "slope": jnp.float32(0.3), "scale": jnp.float32(0.6)}
    return (wide_model, wide_guide, {"x": LEVELS}), params


def step(objective, programs):
    """A value and its gradient, compiled."""
    model, guide, data = programs
    return jax.jit(jax.value_and_grad(lambda p, key: objective.loss(key, p, model, guide, **data)))


@pytest.mark.parametrize(
    ("programs", "pieces", "at_once"),
    [
        (wide, ImportanceWeighted(23), RenyiELBO(num_particles=23)),
        (wide, DoublyReparameterized(50), DoublyReparameterized(50, True)),
        (wide, ReweightedWakeSleep(7, InPieces(3)), ReweightedWakeSleep(7, True)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (wide, ImportanceWeighted(50), RenyiELBO(num_particles=50)),
                (wide, DoublyReparameterized(23), DoublyReparameterized(23, True)),
                (wide, StickingTheLanding(7, InPieces(3)), StickingTheLanding(7, True)),
                (two_layers, ImportanceWeighted(50), RenyiELBO(num_particles=50)),
                (two_layers, DoublyReparameterized(23), DoublyReparameterized(23, True)),
            )
        ),
    ],
)
def test_pieces_change_neither_the_value_nor_the_gradient(programs, pieces, at_once):
    programs, params = programs()
    found, expected = (step(one, programs)(params, KEY) for one in (pieces, at_once))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="sizes are those of a CPU's compiler")
@pytest.mark.parametrize(
    "build",
    [
        ImportanceWeighted,
        pytest.param(DoublyReparameterized, marks=pytest.mark.slow),
        pytest.param(ReweightedWakeSleep, marks=pytest.mark.slow),
        pytest.param(StickingTheLanding, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_step_does_not_grow_with_the_particles(build):
    """But for three numbers per particle and datum: log w, its share, and the rest."""
    programs, params = wide()

    def bytes_of(objective):
        compiled = step(objective, programs).lower(params, KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = bytes_of(build(20)), bytes_of(build(200))
    assert many - few < 3 * (200 - 20) * len(LEVELS) * 4
    if build is ImportanceWeighted:
        few, many = (bytes_of(RenyiELBO(num_particles=n)) for n in (20, 200))
        assert many > 8 * few


def test_more_particles_spoil_the_plain_gradient_of_the_guide_and_not_the_doubly_reparameterised():
    """Rainforth et al. 2018, theorem 1: as 1 / sqrt(K); Tucker et al. 2019: as sqrt(K)."""

    names = ("phi_1", "phi_2", "phi_3", "phi_4", "theta_1")

    def signal_to_noise(num_particles):
        plain = draws(RenyiELBO(num_particles=num_particles), TOY, NEAR, 1_000)[1]
        doubly = draws(DoublyReparameterized(num_particles), TOY, NEAR, 1_000)[1]
        # Both have one expectation, which the second knows to within a few hundredths.
        signal = {name: abs(doubly[name].mean()) for name in names}
        for name in names:
            assert doubly[name].std() / 1_000**0.5 < 0.05 * signal[name], name
        return np.array([[signal[n] / g[n].std() for n in names] for g in (plain, doubly)])

    plain, doubly = signal_to_noise(64) / signal_to_noise(4)
    assert (plain[:4] < 0.5).all()  # by theory 1 / 4
    assert (doubly > 2).all()  # by theory 4
    assert plain[4] > 2  # the model's parameters gain from particles in both


# --- a linear-Gaussian model with two latent dimensions -------------------------------------------

RNG = np.random.default_rng(1)
NOISE = 0.8
LINEAR = {
    "weights": RNG.normal(size=(3, 2)),
    "offset": RNG.normal(size=3),
    "slope": 0.4 * RNG.normal(size=(2, 3)),
    "log_scale": np.array([-0.3, -0.6]),
}
LINEAR = {name: value.astype(np.float32) for name, value in LINEAR.items()}
X = RNG.normal(size=(5, 3)).astype(np.float32)


def linear_model(x):
    weights, offset = (numpyro.param(n, LINEAR[n]) for n in ("weights", "offset"))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weights.T + offset, NOISE).to_event(1), obs=x)


def linear_guide(x):
    slope, log_scale = (numpyro.param(n, LINEAR[n]) for n in ("slope", "log_scale"))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(x @ slope.T, jnp.exp(log_scale)).to_event(1))


@jax.jit
def exact_elbo(p):
    loc, variance = X @ p["slope"].T, jnp.exp(2 * p["log_scale"])
    error = (X - loc @ p["weights"].T - p["offset"]) ** 2 + variance @ (p["weights"] ** 2).T
    reconstruction = -0.5 * jnp.sum(error / NOISE**2 + jnp.log(2 * jnp.pi * NOISE**2))
    return reconstruction - 0.5 * jnp.sum(loc**2 + variance - 1 - jnp.log(variance))


def log_likelihood():
    covariance = LINEAR["weights"] @ LINEAR["weights"].T + NOISE**2 * np.eye(3)
    return stats.multivariate_normal(LINEAR["offset"], covariance).logpdf(X).sum()


def test_the_gradient_along_the_path_is_the_elbos():
    value, gradient = jax.device_get(jax.jit(jax.value_and_grad(exact_elbo))(LINEAR))
    programs = linear_model, linear_guide, {"x": X}
    bounds, gradients = draws(StickingTheLanding(3), programs, LINEAR, 20_000)
    assert_mean(bounds, value)
    for name in LINEAR:
        assert_mean(gradients[name], gradient[name], name)


def test_the_bound_rises_with_particles_from_the_elbo_to_the_log_likelihood():
    programs = linear_model, linear_guide, {"x": X}
    bounds = [
        draws(DoublyReparameterized(k), programs, LINEAR, 2_000, gradient=False) for k in (1, 30)
    ]
    means = np.array([b.mean() for b in bounds])
    errors = np.array([b.std() / 2_000**0.5 for b in bounds])
    assert abs(means[0] - exact_elbo(LINEAR)) < ERRORS * errors[0]
    assert means[1] - means[0] > ERRORS * np.hypot(*errors)
    assert means[-1] < log_likelihood() - ERRORS * errors[-1]


# --- where the guide is the posterior -------------------------------------------------------------


def posterior():
    """Of the linear-Gaussian model: z | x ~ N(gain (x - offset), scale_tril scale_tril^T)."""
    precision = np.eye(2) + LINEAR["weights"].T @ LINEAR["weights"] / NOISE**2
    covariance = np.linalg.inv(precision)
    gain = covariance @ LINEAR["weights"].T / NOISE**2
    return {"gain": gain, "scale_tril": np.linalg.cholesky(covariance)}


def gaussian_posterior(x):
    gain, scale_tril = (numpyro.param(n, value) for n, value in posterior().items())
    with numpyro.plate("rows", len(x)):
        loc = (x - LINEAR["offset"]) @ gain.T
        numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def flow_posterior(x):
    gain, scale_tril = (numpyro.param(n, value) for n, value in posterior().items())
    with numpyro.plate("rows", len(x)):
        loc = (x - LINEAR["offset"]) @ gain.T
        flow = LowerCholeskyAffine(loc, scale_tril)
        noise = dist.Normal(0, 1).expand([len(x), 2]).to_event(1)
        numpyro.sample("z", dist.TransformedDistribution(noise, flow))


def in_two_steps(x):
    """The same posterior, second dimension given the first."""
    gain, scale_tril = (numpyro.param(n, value) for n, value in posterior().items())
    loc = (x - LINEAR["offset"]) @ gain.T
    with numpyro.plate("rows", len(x)):
        first = numpyro.sample("z_0", dist.Normal(loc[:, 0], scale_tril[0, 0]))
        second = loc[:, 1] + scale_tril[1, 0] * (first - loc[:, 0]) / scale_tril[0, 0]
        numpyro.sample("z_1", dist.Normal(second, scale_tril[1, 1]))


def model_in_two_steps(x):
    weights = numpyro.param("weights", LINEAR["weights"])
    with numpyro.plate("rows", len(x)):
        z = [numpyro.sample(f"z_{i}", dist.Normal(0, 1)) for i in range(2)]
        x_loc = jnp.stack(z, 1) @ weights.T + LINEAR["offset"]
        numpyro.sample("x", dist.Normal(x_loc, NOISE).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("guide", "objective"),
    [
        (gaussian_posterior, StickingTheLanding(2)),
        (flow_posterior, DoublyReparameterized(3)),
        (in_two_steps, DoublyReparameterized(3)),
    ],
)
def test_at_the_posterior_every_draw_has_the_log_likelihood_and_no_gradient(guide, objective):
    model = model_in_two_steps if guide is in_two_steps else linear_model
    params = {n: LINEAR[n] for n in ("weights", "offset")} | posterior()
    bounds, gradients = draws(objective, (model, guide, {"x": X}), params, 50)
    np.testing.assert_allclose(bounds, log_likelihood(), rtol=1e-5)
    for name in posterior():
        assert np.abs(gradients[name]).max() < 2e-4, name
    assert np.abs(gradients["weights"]).max() > 0.1


# --- guides of other kinds ------------------------------------------------------------------------


def autoregressive_guide(x):
    """A flow whose inverse is not its formula, with parameters in a closure."""
    init, apply = AutoregressiveNN(2, [4])
    weights = numpyro.param("flow", lambda key: init(key, (2,))[1])
    slope = numpyro.param("slope", LINEAR["slope"])
    with numpyro.plate("rows", len(x)):
        noise = dist.Normal(x @ slope.T, 0.7).to_event(1)
        flow = InverseAutoregressiveTransform(partial(apply, weights))
        numpyro.sample("z", dist.TransformedDistribution(noise, flow))


def noisy_guide(x):
    """Draws noise that is no site: log q must see the same again."""
    slope = numpyro.param("slope", LINEAR["slope"])
    noise = random.normal(numpyro.prng_key(), (len(x), 2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(x @ slope.T + noise, 0.7).to_event(1))


@pytest.mark.parametrize("guide", [autoregressive_guide, noisy_guide])
def test_the_path_gradient_of_other_guides_has_the_elbos_value_and_expectation(guide):

    @jax.jit
    def start():
        sites = numpyro.handlers.trace(numpyro.handlers.seed(guide, KEY)).get_trace(X)
        return {n: site["value"] for n, site in sites.items() if site["type"] == "param"}

    params = start() | {n: LINEAR[n] for n in ("weights", "offset")}
    programs = linear_model, guide, {"x": X}
    plain, path = (
        draws(objective, programs, params, 5_000)
        for objective in (Trace_ELBO(), StickingTheLanding())
    )
    np.testing.assert_allclose(plain[0], path[0], rtol=1e-4)
    differences = jax.tree.map(lambda a, b: a - b, plain[1], path[1])
    for leaf in jax.tree.leaves(
        {n: d for n, d in differences.items() if n not in ("weights", "offset")}
    ):
        assert leaf.std() > 1e-2
        assert_mean(leaf, 0.0)
    np.testing.assert_allclose(plain[1]["weights"], path[1]["weights"], rtol=1e-3, atol=1e-3)


def test_a_map_estimate_of_a_global_keeps_its_gradient():
    """A Delta has no draws of its own: its value is the guide's parameter."""

    def model(x):
        offset = numpyro.sample("offset", dist.Normal(0, 1))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(offset, 1))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        numpyro.sample("offset", dist.Delta(numpyro.param("at", 0.5)))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(x / 2, numpyro.param("scale", 0.7)))

    programs, params = (model, guide, {"x": X[:, 0]}), {"at": 0.5, "scale": 0.7}
    plain, path = (
        draws(objective, programs, params, 50) for objective in (Trace_ELBO(), StickingTheLanding())
    )
    np.testing.assert_allclose(plain[0], path[0], rtol=1e-5)
    np.testing.assert_allclose(plain[1]["at"], path[1]["at"], rtol=1e-4)


# --- in use ---------------------------------------------------------------------------------------


def test_plain_svi_takes_a_gradient_along_the_path():
    svi = SVI(linear_model, linear_guide, optax.adam(1e-2), DoublyReparameterized(3))

    @jax.jit
    def step():
        state = svi.init(KEY, x=X)
        reverse, _ = svi.update(state, x=X)
        forward, _ = svi.update(state, x=X, forward_mode_differentiation=True)
        return svi.get_params(reverse), svi.get_params(forward)

    params, forward = step()
    for name, value in forward.items():
        assert np.abs(params[name] - LINEAR[name]).max() > 1e-3, name
        np.testing.assert_allclose(value, params[name], atol=1e-5)


def bernoulli_guide(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Bernoulli(0.5).expand([2]).to_event(1))


def factor_guide(x):
    linear_guide(x)
    with numpyro.plate("rows", len(x)):
        numpyro.factor("penalty", jnp.zeros(len(x)))


def global_model(x):
    numpyro.sample("shift", dist.Normal(0, 1))
    linear_model(x)


def global_guide(x):
    numpyro.sample("shift", dist.Normal(0, 1))
    linear_guide(x)


@pytest.mark.parametrize(
    ("objective", "model", "guide", "message"),
    [
        (StickingTheLanding(), linear_model, bernoulli_guide, "guide site 'z': .* got Bernoulli"),
        (DoublyReparameterized(), linear_model, bernoulli_guide, "guide site 'z': .* got Bern"),
        (StickingTheLanding(), linear_model, factor_guide, "guide site 'penalty': .* got a factor"),
        (DoublyReparameterized(), global_model, global_guide, "site 'shift': .* a global site"),
    ],
)
def test_programs_without_such_a_gradient_are_refused(objective, model, guide, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: objective.loss(KEY, LINEAR, model, guide, x=x), X)


@pytest.mark.parametrize("subsample_size", [5, None])
def test_a_plate_that_draws_batches_is_refused(subsample_size):
    def draw(x):
        with numpyro.plate("rows", 10, subsample_size=subsample_size or len(x)):
            return numpyro.sample("z", dist.Normal(0, 1))

    def model(x):
        z = draw(x)
        with numpyro.plate("rows", 10, subsample_size=subsample_size or len(x)):
            numpyro.sample("x", dist.Normal(z, 1), obs=x[:, 0])

    with pytest.raises(ValueError, match=r"'rows': .* got a subsample of 5 out of 10"):
        jax.eval_shape(lambda x: DoublyReparameterized().loss(KEY, {}, model, draw, x=x), X)


def test_every_datum_has_its_own_weights_whatever_the_plates():
    """The data plate is the outer one of two of the same size. The other one is like an event."""
    x = jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)

    def plates(x, flat):
        rows = numpyro.plate("rows", len(x), dim=-1 if flat else -2)
        return [rows] if flat else [rows, numpyro.plate("columns", 4)]

    def program(x, flat, guide):
        fold = (lambda d: d.to_event(1)) if flat else (lambda d: d)
        with ExitStack() as stack:
            for plate in plates(x, flat):
                stack.enter_context(plate)
            loc = 0.5 * x if guide else jnp.zeros((len(x), 4))
            z = numpyro.sample("z", fold(dist.Normal(loc, 0.8)))
            if not guide:
                numpyro.sample("x", fold(dist.Normal(z, 1.0)), obs=x)

    def value_and_grad(flat):
        objective = DoublyReparameterized(3)
        programs = (partial(program, flat=flat, guide=guide) for guide in (False, True))
        loss = lambda x: objective.loss(KEY, {}, *programs, x)  # noqa: E731
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(x))

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5), value_and_grad(False), value_and_grad(True)
    )


@pytest.mark.parametrize("objective", [StickingTheLanding, DoublyReparameterized])
def test_at_least_one_particle(objective):
    with pytest.raises(ValueError, match="num_particles: expected a whole number from 1, got 0"):
        objective(0)
