"""Exact divergences, site by site, are right for some pairs of programs: ``fit`` tells which."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

from inference import FreeBits, Hybrid, KLWarmUp, KLWeighted, fit
from inference._checks import ProgramError, check_mean_field

X = np.linspace(-1, 1, 6).astype(np.float32)


def normal(name, loc=0.0):
    return numpyro.sample(name, dist.Normal(loc, 1.0))


def chain(x):
    with numpyro.plate("rows", len(x)):
        b = normal("b", 0.5 * normal("a"))
        numpyro.sample("x", dist.Normal(b, 1.0), obs=x)


def collider(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(normal("a") + normal("b"), 1.0), obs=x)


def guide_of(draw):
    def guide(x):
        numpyro.param("unused", 0.0)
        with numpyro.plate("rows", len(x)):
            draw(x)

    return guide


@guide_of
def independent(x):
    normal("a", x)
    normal("b", x)


@guide_of
def independent_in_another_order(x):
    normal("b", x)
    normal("a", x)


@guide_of
def forwards(x):
    normal("b", x - normal("a", x))


@guide_of
def backwards(x):
    normal("a", x - normal("b", x))


@guide_of
def backwards_through_another(x):
    b = normal("b", x)
    middle = numpyro.sample("middle", dist.Normal(b, 1.0), infer={"is_auxiliary": True})
    normal("a", 2 * jnp.tanh(middle))


@guide_of
def backwards_without_a_formula(x):
    b = normal("b", x)
    numpyro.sample("a", dist.StudentT(5.0, b))


@guide_of
def all_without_a_formula(x):
    b = numpyro.sample("b", dist.StudentT(5.0, x))
    numpyro.sample("a", dist.StudentT(5.0, b))


class UsersMeanField(TraceMeanField_ELBO):
    """A user's, as it is."""


def train(model, guide, objective, **settings):
    settings = {"num_steps": 1, "progress": False} | settings
    return fit(model, guide, {"x": X}, objective=objective, **settings)


def check(model, guide):
    check_mean_field(model, guide, {"x": X}, key=random.key(0))


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (chain, independent),
        (chain, independent_in_another_order),
        (chain, forwards),
        (chain, all_without_a_formula),
        (collider, backwards),
        (collider, forwards),
        (collider, backwards_through_another),
    ],
)
def test_programs_whose_divergences_stand_by_themselves_pass(model, guide):
    check(model, guide)


@pytest.mark.parametrize(
    "guide", [backwards, backwards_through_another, backwards_without_a_formula]
)
def test_a_guide_that_turns_the_model_around_is_refused(guide):
    with pytest.raises(
        ProgramError, match=r"site 'b': .* draws 'a' from 'b' where the model draws 'b' from 'a'"
    ):
        check(chain, guide)


def test_what_is_refused_would_be_wrong():
    """Against the ELBO that takes log densities: far off, where passing programs agree."""
    keys = random.split(random.key(0), 4_000)

    def mean_and_error(objective, guide):
        run = jax.jit(jax.vmap(lambda key: objective.loss(key, {}, chain, guide, x=X)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPyro's own guess, from the order of the sites
            values = run(keys)
        return float(values.mean()), float(values.std()) / len(keys) ** 0.5

    for guide, right in ((forwards, True), (backwards, False)):
        plain, error = mean_and_error(Trace_ELBO(), guide)
        exact, other = mean_and_error(TraceMeanField_ELBO(), guide)
        assert (abs(exact - plain) < 4.5 * np.hypot(error, other)) == right, guide


@pytest.mark.parametrize(
    "objective",
    [
        UsersMeanField(),
        FreeBits(Trace_ELBO(), 0.1),
        KLWarmUp(KLWeighted(TraceMeanField_ELBO(), 2.0), 1),
        Hybrid(0.5, TraceMeanField_ELBO()),
    ],
)
def test_fit_refuses_before_the_first_step(objective):
    with pytest.raises(ProgramError, match=r"site 'b': .* use Trace_ELBO"):
        train(chain, backwards, objective)


def test_fit_lets_others_pass_without_a_warning():
    train(chain, independent_in_another_order, TraceMeanField_ELBO())
    train(chain, backwards, Trace_ELBO())


def test_automatic_guides_of_globals():
    def regression(x):
        level = numpyro.sample("level", dist.Normal(0, 1))
        slope = numpyro.sample("slope", dist.Normal(level, 1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(slope, 1.0), obs=x)

    settings = {"optimizer": optax.adam(1e-1), "num_steps": 30, "batch_size": 3}
    fitted = train(regression, AutoNormal(regression), TraceMeanField_ELBO(), **settings)
    assert fitted.elbo[:, -5:].mean() > fitted.elbo[:, :5].mean()


def test_what_cannot_be_found_out_is_said():
    @guide_of
    def opaque(x):
        normal("b", x)
        numpyro.sample("a", Opaque(x, 1.0))

    with pytest.warns(UserWarning, match="Could not check the order of latent sites .NotImpl"):
        check(chain, opaque)


class Opaque(dist.Normal):
    """A distribution whose density is not to be had."""

    def log_prob(self, value, intermediates=None):
        raise NotImplementedError
