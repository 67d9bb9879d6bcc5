"""Antithetic, stratified particles: the same expectation, less noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO
from scipy import stats

from inference import DoublyReparameterized
from inference.particles import InPieces, antithetic, stratified_normal
from inference.sites import trace_of


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, num_draws, shape):
    keys = jax.random.split(key, num_draws)
    return jax.vmap(lambda key: stratified_normal(key, shape))(keys)


@pytest.mark.parametrize("shape", [(), (5, 3)])
def test_every_entry_is_standard_normal(shape):
    noise = draw(jax.random.key(0), 5_000, shape)
    assert noise.shape == (5_000, *shape)
    for column in np.asarray(noise).reshape(5_000, -1).T:
        assert stats.kstest(column, "norm").pvalue > 1e-5


def test_absolute_values_fall_one_in_each_stratum_of_each_column():
    noise = np.abs(np.asarray(draw(jax.random.key(3), 1, (50, 4))[0]))
    strata = np.floor(50 * (2 * stats.norm.cdf(noise) - 1)).astype(int)
    for column in strata.T:
        np.testing.assert_array_equal(np.sort(column), np.arange(50))
    assert not np.array_equal(strata[:, 0], strata[:, 1])


def test_entries_of_a_row_are_independent():
    noise = np.asarray(draw(jax.random.key(1), 4_000, (4, 2)))[:, 1]
    for transform in (lambda e: e, np.abs, lambda e: e**2):
        r = np.corrcoef(transform(noise[:, 0]), transform(noise[:, 1]))[0, 1]
        assert abs(r) < 4 / len(noise) ** 0.5


def test_64_bits_change_no_number():
    key = jax.random.key(2)
    noise = draw(key, 1, (5, 3))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(key, 1, (5, 3)), noise)


def test_the_data_are_stratified_and_nothing_else():
    """Values that one datum's terms share must be independent, or the ELBO would be biased."""
    x = jnp.zeros(50)

    def program(x):
        numpyro.sample("global", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("features", 3):
            numpyro.sample("weights", dist.Normal(0, 1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(0, 1), obs=x)
            with numpyro.plate("columns", 2):
                numpyro.sample("local", dist.Normal(1.0, 2.0))

    def draw(key):
        sites = trace_of(program, key, {}, x)
        return {name: sites[name]["value"] for name in ("global", "weights", "local")}

    keys = jax.random.split(jax.random.key(0), 4_000)
    draws = jax.jit(jax.vmap(lambda key: antithetic(draw, jnp.stack([key, key]))))(keys)
    noise = {n: np.asarray(v) for n, v in draws.items()}
    noise["local"] = (noise["local"] - 1) / 2
    for name, e in noise.items():
        np.testing.assert_allclose(e[:, 0], -e[:, 1], atol=1e-6, err_msg=name)
    strata = np.floor(50 * (2 * stats.norm.cdf(np.abs(noise["local"][0, 0])) - 1)).astype(int)
    np.testing.assert_array_equal(np.sort(strata, 1), [np.arange(50)] * 2)
    for name in ("global", "weights"):
        correlation = np.corrcoef(np.abs(noise[name][:, 0]).T)
        assert np.abs(correlation - np.eye(3)).max() < 4.5 / len(keys) ** 0.5, name


class UsersTrace(Trace_ELBO):
    """A user's, in other units."""

    def loss(self, *args, **kwargs):
        return 3.0 * super().loss(*args, **kwargs)


def model(x):
    loc = numpyro.param("loc", 0.5)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    weight, scale = numpyro.param("weight", 0.2), numpyro.param("scale", 0.8)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(weight * x, scale))


def test_unbiased_with_less_noise():
    x = np.linspace(-2, 2, 64, dtype=np.float32)
    params = {"loc": 0.5, "weight": 0.2, "scale": 0.8}

    def draws(**settings):
        estimator = UsersTrace(num_particles=2, **settings)
        gradient = jax.value_and_grad(lambda p, k: estimator.loss(k, p, model, guide, x) / len(x))
        keys = jax.random.split(jax.random.key(0), 1_000)
        return jax.device_get(jax.jit(jax.vmap(gradient, (None, 0)))(params, keys))

    (plain_loss, plain), (quiet_loss, quiet) = draws(), draws(vectorize_particles=antithetic)
    for name in params:
        error = np.sqrt((plain[name].var() + quiet[name].var()) / 1_000)
        assert abs(plain[name].mean() - quiet[name].mean()) <= 4.5 * error + 1e-6
    error = np.sqrt((plain_loss.var() + quiet_loss.var()) / 1_000)
    assert abs(plain_loss.mean() - quiet_loss.mean()) <= 4.5 * error + 1e-6
    # Terms odd in the noise cancel in pairs: the gradient of weight is one. Terms even in it
    # average out over the batch.
    assert quiet["weight"].std() < 0.01 * plain["weight"].std()
    assert quiet_loss.std() < 0.2 * plain_loss.std()


def test_other_numbers_and_families_are_refused():
    def gamma(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Gamma(2.0, 1.0))

    key, x = jax.random.key(0), jnp.ones(4)
    three = Trace_ELBO(num_particles=3, vectorize_particles=antithetic)
    with pytest.raises(ValueError, match=r"num_particles: expected 2 .*, got 3"):
        jax.eval_shape(lambda x: three.loss(key, {}, model, guide, x), x)
    two = Trace_ELBO(num_particles=2, vectorize_particles=antithetic)
    with pytest.raises(TypeError, match=r"site 'z': expected a Normal .*, got Gamma"):
        jax.eval_shape(lambda x: two.loss(key, {}, gamma, gamma, x), x)


# --- in pieces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 4, 7, 8])
def test_pieces_are_all_particles_in_their_order(num_particles):
    """Of at most four: 7 are two pieces, and one place is free."""
    seen = []

    def particle(numbers):
        seen.append(numbers[0])
        return {"sum": numbers[0] + numbers[1].sum(), "one": 1.0}

    keys = jnp.arange(float(num_particles)), 10 * jnp.ones((num_particles, 2))
    found = InPieces(4)(particle, keys)
    np.testing.assert_array_equal(found["sum"], 20 + np.arange(num_particles))
    np.testing.assert_array_equal(found["one"], np.ones(num_particles))
    assert len(seen) == 1  # traced once


def test_a_piece_has_at_least_one_particle():
    with pytest.raises(ValueError, match="size: expected at least 1 particle at once, got 0"):
        InPieces(0)


def test_particles_that_are_given_more_than_keys_are_not_mirrored():
    def program(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0, 1))

    objective = DoublyReparameterized(2, antithetic)
    with pytest.raises(TypeError, match="vectorize_particles: expected another way"):
        objective.loss(jax.random.key(0), {}, program, program, jnp.zeros(3))
