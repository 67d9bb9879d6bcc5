"""The ELBO of each datum, against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from inference import pointwise_elbo

X = jnp.linspace(-2, 2, 9)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide(x):
    weight = numpyro.param("weight", 0.0)
    with numpyro.plate("data", len(x)):
        loc = jnp.stack([weight * x, weight * x], axis=-1)
        numpyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def exact(weight):
    """-KL(q || prior) + E_q log N(x; z1 + z2, 1): quadratics of a Gaussian."""
    x, variance = np.asarray(X), 0.25
    kl = 2 * 0.5 * (variance + (weight * x) ** 2 - 1 - np.log(variance))
    error = (x - 2 * weight * x) ** 2 + 2 * variance
    return -kl - 0.5 * (error + np.log(2 * np.pi))


def test_agrees_with_the_closed_form_datum_by_datum():
    draws = jax.jit(
        jax.vmap(lambda key: pointwise_elbo(model, guide, {"weight": 0.2}, {"x": X}, key=key))
    )(jax.random.split(jax.random.key(0), 4_000))
    error = draws.std(0) / len(draws) ** 0.5
    assert draws.shape == (4_000, 9)
    assert (abs(draws.mean(0) - exact(0.2)) < 4.5 * error).all()


def test_num_samples_is_a_mean_over_draws():
    keys = jax.random.split(jax.random.key(1), 200)

    def evaluate(num_samples):
        return jax.jit(
            jax.vmap(
                lambda key: pointwise_elbo(
                    model, guide, {"weight": 0.2}, {"x": X}, key=key, num_samples=num_samples
                )
            )
        )(keys)

    one, many = evaluate(1), evaluate(100)
    ratio = many.std(0) / one.std(0)
    # two standard deviations from 200 draws each: relative error sqrt(2 / 400)
    assert (abs(ratio / 0.1 - 1) < 4.5 * (2 / 400) ** 0.5).all()


def test_other_plates_are_summed_within_the_datum():
    def nested_model(x):
        with numpyro.plate("data", len(x), dim=-2), numpyro.plate("inner", 3, dim=-1):
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = jnp.arange(12.0).reshape(4, 3)
    elbo = pointwise_elbo(nested_model, lambda x: None, {}, {"x": x}, key=jax.random.key(0))
    np.testing.assert_allclose(elbo, dist.Normal(0.0, 1.0).log_prob(x).sum(1), rtol=1e-6)


def test_a_global_site_belongs_to_no_datum():
    def global_model(x):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def global_guide(x):
        numpyro.sample("m", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'm': expected it in the plate \"data\""):
        pointwise_elbo(global_model, global_guide, {}, {"x": X}, key=jax.random.key(0))
