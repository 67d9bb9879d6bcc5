"""Encode, decode, sample and the rest, on a linear model whose means are formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from inference import decode, encode, interpolate, reconstruct, sample, traverse

KEY = jax.random.key(0)
WEIGHT = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])
PARAMS = {"weight": WEIGHT, "prior_loc": jnp.array([5.0, -3.0])}
Z = jnp.array([[0.5, 1.0], [2.0, -1.0], [0.0, 3.0], [1.0, 1.0]])
C = jnp.array([0.0, 1.0, 2.0, 1.0])


def model(c, x=None):
    weight = numpyro.param("weight", jnp.zeros((2, 3)))
    prior_loc = numpyro.param("prior_loc", jnp.zeros(2))
    with numpyro.plate("data", len(c)):
        z = numpyro.sample("z", dist.Normal(c[:, None] * prior_loc, 0.1).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weight + c[:, None], 0.5).to_event(1), obs=x)


def guide(c, x):
    with numpyro.plate("data", len(c)):
        numpyro.sample("z", dist.Normal(x[:, :2] - c[:, None], 0.3).to_event(1))


def unconditional(x=None):
    model(jnp.zeros(1 if x is None else len(x)), x)


def unconditional_guide(x):
    guide(jnp.zeros(len(x)), x)


def test_decode_is_the_mean_of_x():
    np.testing.assert_allclose(decode(model, PARAMS, Z, C), Z @ WEIGHT + C[:, None], rtol=1e-6)
    np.testing.assert_allclose(decode(unconditional, PARAMS, Z), Z @ WEIGHT, rtol=1e-6)


def test_encode_is_the_mean_of_z_or_a_draw():
    x = Z @ WEIGHT + C[:, None]
    np.testing.assert_allclose(encode(guide, PARAMS, x, C), Z, atol=1e-6)
    draws = jnp.stack([encode(guide, PARAMS, x, C, key=k) for k in jax.random.split(KEY, 300)])
    assert (abs(draws.mean(0) - Z) < 4.5 * 0.3 / 300**0.5).all()
    # the deviation of 300 draws is good to sqrt(1 / 600); every datum has noise of its own
    np.testing.assert_allclose(draws.std(0), 0.3, rtol=4.5 * 600**-0.5)
    assert abs(np.corrcoef(draws[:, 0, 0], draws[:, 1, 0])[0, 1]) < 4.5 / 300**0.5


def test_reconstruct_is_encode_and_decode():
    x = Z @ WEIGHT + C[:, None]
    np.testing.assert_allclose(reconstruct(model, guide, PARAMS, x, C), x, atol=1e-5)
    x = Z @ WEIGHT
    np.testing.assert_allclose(
        reconstruct(unconditional, unconditional_guide, PARAMS, x), x, atol=1e-5
    )


def test_samples_of_a_condition_come_from_its_prior():
    drawn = sample(model, PARAMS, 400, C[:3], key=KEY)
    assert drawn.z.shape == (1200, 2)
    assert drawn.x.shape == drawn.x_mean.shape == (1200, 3)
    z = drawn.z.reshape(3, 400, 2)
    error = 0.1 / 400**0.5
    assert (abs(z.mean(1) - C[:3, None] * PARAMS["prior_loc"]) < 4.5 * error).all()
    repeated = jnp.repeat(C[:3], 400)[:, None]
    np.testing.assert_allclose(drawn.x_mean, drawn.z @ WEIGHT + repeated, atol=1e-5)
    noise = drawn.x - drawn.x_mean
    assert abs(noise.std() / 0.5 - 1) < 4.5 * (2 * noise.size) ** -0.5


def test_samples_without_a_condition():
    drawn = sample(unconditional, PARAMS, 500, key=KEY)
    assert drawn.x.shape == (500, 3)
    assert len(np.unique(drawn.z, axis=0)) == 500
    assert (abs(drawn.z.mean(0)) < 4.5 * 0.1 / 500**0.5).all()


def test_interpolation_is_the_straight_line_with_its_ends():
    got = interpolate(model, PARAMS, Z[0], Z[1], 5, C[1])
    z = np.linspace(Z[0], Z[1], 5)
    np.testing.assert_allclose(got, z @ WEIGHT + C[1], rtol=1e-5)


def test_traversal_moves_one_dimension():
    values = jnp.array([-2.0, 0.0, 4.0])
    got = traverse(model, PARAMS, Z[0], 1, values, C[1])
    z = np.stack([[0.5, value] for value in values])
    np.testing.assert_allclose(got, z @ WEIGHT + C[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: traverse(model, PARAMS, Z[0], 2, Z[0], C[0]), "dim: expected .* below 2, got 2"),
        (
            lambda: interpolate(model, PARAMS, Z[0], Z[1], 1, C[0]),
            "num_points: expected at least 2",
        ),
        (lambda: sample(unconditional, PARAMS, 0, key=KEY), "num_samples: expected at least 1"),
        (lambda: decode(model, PARAMS, Z, C[:2]), "as many of each, got {'z': 4, 'c': 2}"),
    ],
)
def test_what_is_impossible_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conditions_that_the_model_refuses_are_refused():
    class Picky:
        def check_data(self, c, x=None):
            if (c > 1).any():
                raise ValueError("c: expected at most 1")

        def __call__(self, c, x=None):
            model(c, x)

    decode(Picky(), PARAMS, Z[:2], C[:2])
    with pytest.raises(ValueError, match="c: expected at most 1"):
        decode(Picky(), PARAMS, Z, C)
