"""Parameters that are held: neither trained nor returned, and the program is otherwise the same."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers

from inference import Held, fit, pointwise_elbo


def model(x=None):
    loc = numpyro.param("loc", lambda key: jax.random.normal(key))
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x):
    slope = numpyro.param("slope", 0.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, 0.7))


DATA = {"x": np.linspace(-1, 3, 64, dtype=np.float32)}


def train(program, **settings):
    return fit(program, guide, DATA, optimizer=optax.adam(0.05), num_steps=200, **settings).params


def test_only_the_rest_is_trained_and_returned():
    assert train(Held(model, {"scale": 0.5})).keys() == {"loc", "slope"}
    assert train(Held(model, {"scale": 0.5, "loc": 1.0})).keys() == {"slope"}


def test_what_is_held_matters():
    # at scale s the best slope through these data grows as s falls
    slopes = [float(train(Held(model, {"scale": s, "loc": 0.0}))["slope"][0]) for s in (0.5, 2.0)]
    np.testing.assert_allclose(slopes, [1 / 1.25, 1 / 5], atol=0.05)


def test_the_density_is_that_of_the_program_with_those_values():
    held, rest = {"loc": jnp.float32(0.3), "scale": jnp.float32(0.5)}, {"slope": jnp.float32(0.4)}
    key = jax.random.key(0)
    np.testing.assert_array_equal(
        pointwise_elbo(Held(model, held), guide, rest, DATA, key=key),
        pointwise_elbo(model, guide, rest | held, DATA, key=key),
    )


def test_seeds_share_what_is_held_and_start_elsewhere():
    trained = train(Held(model, {"scale": 0.5}), num_seeds=2)
    assert trained["loc"].shape == (2,)
    assert trained["loc"][0] != trained["loc"][1]


def test_it_generates():
    program = handlers.seed(Held(model, {"loc": 5.0, "scale": 0.1}), 0)
    sites = handlers.trace(program).get_trace()
    assert sites["x"]["value"].shape == (1,)
    assert sites.keys() == {"data", "z", "x"}


class Picky:
    def check_data(self, x):
        raise ValueError("x: expected something else")

    def __call__(self, x):
        return model(x)


def test_the_programs_own_check_is_made():
    with pytest.raises(ValueError, match="expected something else"):
        train(Held(Picky(), {"scale": 0.5}))


def test_a_resumed_run_knows_another_value(tmp_path):
    train(Held(model, {"scale": 0.5}), checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="model"):
        train(Held(model, {"scale": 0.6}), checkpoint=tmp_path / "run")
