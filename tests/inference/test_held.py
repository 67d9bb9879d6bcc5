"""Parameters that are held: neither trained nor returned, and the program is otherwise the same."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers

from inference import Fit, Held, fit, pointwise_elbo
from inference._describe import describe_value


def model(x=None):
    loc = numpyro.param("loc", lambda key: jax.random.normal(key))
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("rows", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        numpyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x):
    slope = numpyro.param("slope", 0.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(slope * x, 0.7))


DATA = {"x": np.linspace(-1, 3, 64, dtype=np.float32)}


def train(program, **settings):
    settings = {"optimizer": optax.adam(0.05), "num_steps": 200, "progress": False} | settings
    return fit(program, guide, DATA, **settings)


def test_only_the_rest_is_trained_and_returned_from_where_each_seed_starts():
    params = train(Held(model, {"scale": 0.5}), num_seeds=2).params
    assert params.keys() == {"loc", "slope"}
    assert params["loc"].shape == (2,)
    assert params["loc"][0] != params["loc"][1]


def test_what_is_held_matters():
    result = train(Held(model, {"scale": 2.0, "loc": 0.0}))
    assert result.params.keys() == {"slope"}
    # at scale s the best slope through these data is 1 / (1 + s^2), at the model's own a half
    np.testing.assert_allclose(result.params["slope"][0], 1 / 5, atol=0.05)


def test_the_density_is_that_of_the_program_with_those_values():
    held, rest = {"loc": jnp.float32(0.3), "scale": jnp.float32(0.5)}, {"slope": jnp.float32(0.4)}
    fits = [
        Fit.from_params(Held(model, held), guide, rest, example=DATA),
        Fit.from_params(model, guide, rest | held, example=DATA),
    ]
    ours, theirs = (pointwise_elbo(one, DATA).pointwise for one in fits)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_it_generates():
    program = handlers.seed(Held(model, {"loc": 5.0, "scale": 0.1}), 0)
    sites = handlers.trace(program).get_trace()
    assert sites["x"]["value"].shape == (1,)
    assert sites.keys() == {"rows", "z", "x"}


class Offers:
    """A model with all that one may offer."""

    def prepare(self, key, batch):
        return batch

    def check_data(self, x):
        raise ValueError("x: expected something else")

    def encoder(self, num_outputs, *, rngs):
        return num_outputs

    def __call__(self, x):
        return model(x)


def test_what_the_program_offers_is_offered():
    held = Held(Offers(), {"scale": 0.5})
    assert held.prepare(None, 3) == 3
    assert held.encoder(7, rngs=None) == 7
    with pytest.raises(ValueError, match="expected something else"):
        train(held)
    assert not hasattr(Held(model, {"scale": 0.5}), "check_data")


def test_a_run_with_another_value_is_another_run():
    held, same, other = (described({"scale": s}) for s in (0.5, 0.5, 0.6))
    assert held == same != other
    assert described({"loc": 0.5}) != held


def described(params):
    """What a run writes down of its model."""
    return describe_value(Held(model, params))
