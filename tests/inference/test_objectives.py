"""What objectives answer, what they are worth per datum, and how they are made from one another.

A wrapper keeps the value, which is the ELBO, and changes the gradient. Every wrapper is tried on
NumPyro's classes and on a user's subclasses of them. The bounds themselves are held against exact
values in test_bounds.py, runs of many batches in test_engine.py.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.handlers import block, replay
from numpyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import mutable
from scipy import stats

from inference import (
    OBJECTIVES,
    DoublyReparameterized,
    FreeBits,
    Hybrid,
    KLWarmUp,
    KLWeighted,
    LabelTerm,
    Prepared,
    ReweightedWakeSleep,
    StickingTheLanding,
    antithetic,
    fit,
)
from inference._describe import describe_value
from inference._feeds import Whole, Window
from inference._inputs import check
from inference._scaling import PerDatum
from inference._steps import by_seed, first_rows, init, take_step, validate
from inference.objectives import Traits, check_objective, traits
from inference.sites import DataPlates, trace_of

X = np.linspace(-2, 2, 12).astype(np.float32)
PARAMS = {"prior_loc": 0.3, "slope": 1.2, "loc": 0.4, "scale": 0.7}
KEY = random.key(0)
N = DataPlates(frozenset({"N"}))


def model(x):
    prior_loc, slope = numpyro.param("prior_loc", 0.3), numpyro.param("slope", 1.2)
    with numpyro.plate("N", len(x)):
        z = numpyro.sample("z", dist.Normal(prior_loc, 1.0))
        numpyro.sample("x", dist.Normal(slope * z, 1.0), obs=x)


def guide(x):
    loc = numpyro.param("loc", 0.4)
    scale = numpyro.param("scale", 0.7, constraint=dist.constraints.positive)
    with numpyro.plate("N", len(x)):
        numpyro.sample("z", dist.Normal(loc * x, scale))


class UsersTrace(Trace_ELBO):
    """A user's: works on the loss, as a number, and has an ``__init__`` of its own."""

    def __init__(self, num_particles=1, vectorize_particles=True):
        super().__init__(num_particles, vectorize_particles)

    def loss(self, *args, **kwargs):
        return 3.0 * super().loss(*args, **kwargs)


class UsersMeanField(TraceMeanField_ELBO):
    """A user's: works on the loss that comes with the mutable state."""

    def loss_with_mutable_state(self, *args, **kwargs):
        result = super().loss_with_mutable_state(*args, **kwargs)
        return result | {"loss": 3.0 * result["loss"]}


class UsersBound(RenyiELBO):
    """A user's, as it is."""


SUBCLASSES = [UsersTrace, UsersMeanField]
ELBOS = [StickingTheLanding, *SUBCLASSES]


def value(objective, programs=(model, guide), params=PARAMS):
    """The loss."""
    return jax.device_get(jax.jit(lambda p: objective.loss(KEY, p, *programs, x=X))(params))


def value_and_grad(objective, params=PARAMS, programs=(model, guide)):
    """The loss and its gradient."""

    def loss(params):
        return objective.loss(KEY, params, *programs, x=X)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(jax.tree.map(np.float32, params)))


def assert_close(tree, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), tree, expected)


# --- traits ---------------------------------------------------------------------------------------


class UsersOwn(ELBO):
    """A user's objective that answers for itself."""

    traits = Traits(weighs_jointly=True, latents_from_data=True)


def test_an_objective_answers_and_a_subclass_answers_like_its_parent():
    weighable = Traits(weighable_divergence=True)
    exact = Traits(weighable_divergence=True, exact_divergences=True)
    expected = {
        Trace_ELBO(): weighable,
        UsersTrace(): weighable,
        TraceMeanField_ELBO(): exact,
        UsersMeanField(): exact,
        RenyiELBO(): Traits(weighs_jointly=True),
        UsersBound(): Traits(weighs_jointly=True),
        TraceGraph_ELBO(): Traits(),
        TraceEnum_ELBO(): Traits(weighable_divergence=True, sums_sites=True),
        ReweightedWakeSleep(): Traits(),
        LabelTerm(Trace_ELBO(), 1.0): Traits(),
        ELBO(): Traits(),
        UsersOwn(): UsersOwn.traits,
        StickingTheLanding(): weighable,
        DoublyReparameterized(): Traits(),
    }
    for objective, answer in expected.items():
        assert traits(objective) == answer, objective
        assert traits(PerDatum(objective, 3, N, False)) == answer, objective
    assert TraceEnum_ELBO.can_infer_discrete
    assert PerDatum(TraceEnum_ELBO(), 3, N, False).can_infer_discrete


@pytest.mark.parametrize("inner", [Trace_ELBO, *SUBCLASSES])
def test_a_wrapper_changes_only_the_answers_that_it_must(inner):
    exact = traits(inner()).exact_divergences
    assert traits(KLWeighted(inner(), 2.0)) == Traits(
        weighable_divergence=True, weighed_divergence=True, exact_divergences=exact
    )
    assert traits(KLWarmUp(KLWeighted(inner(), 2.0), 7)) == Traits(
        changes_with_step=True, num_steps=7, weighed_divergence=True, exact_divergences=exact
    )
    assert traits(FreeBits(inner(), 0.1)) == Traits(exact_divergences=True)
    assert traits(Hybrid(0.5, inner())) == traits(KLWeighted(inner(), 2.0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Trace_ELBO, r"got the class Trace_ELBO; write Trace_ELBO\(\)$"),
        (KLWeighted, r"got the class KLWeighted; write KLWeighted\(...\)$"),
        ("RenyiELBO", r"got the name 'RenyiELBO'; .*OBJECTIVES\['RenyiELBO'\]\(num_particles\)$"),
        ("ELBO", r"got the name .*; write numpyro.infer.ELBO\(\)$"),
        ("elbow", r"got the name 'elbow'; the names in .* are RenyiELBO, TraceEnum_ELBO, "),
        (
            lambda num_particles: Trace_ELBO(num_particles),
            r"got the function '<lambda>'; call it first",
        ),
        (None, r"got None \(NoneType\); write Trace_ELBO\(\), or "),
    ],
)
def test_what_is_no_objective_is_refused_with_what_to_write(value, message):
    with pytest.raises(TypeError, match=f"^mine: expected a NumPyro ELBO object, {message}"):
        check_objective(value, "mine")
    check_objective(Trace_ELBO())


def test_names_stand_for_objectives_of_so_many_particles():
    for name, build in OBJECTIVES.items():
        assert build(7).num_particles == 7, name
    assert OBJECTIVES["importance-weighted"](7).alpha == 0


# --- nats per datum -------------------------------------------------------------------------------


def shared(x):
    """One global latent site; x is given it."""
    loc = numpyro.param("prior_loc", 0.3)
    w = numpyro.sample("w", dist.Normal(loc, 1.0))
    with numpyro.plate("N", len(x)):
        numpyro.sample("x", dist.Normal(w, 1.0), obs=x)


def shared_guide(x):
    numpyro.sample("w", dist.Normal(numpyro.param("loc", 0.4), numpyro.param("scale", 0.7)))


@pytest.mark.parametrize("inner", [UsersMeanField, lambda: KLWeighted(UsersTrace(), 3.0)])
def test_with_globals_the_mean_over_batches_is_the_whole(inner):
    """Every batch sees the same draw of w, so the two sides are equal to rounding."""
    objective = PerDatum(inner(), len(X), N, True)

    def loss(params, x):
        return objective.loss(KEY, params, shared, shared_guide, x=x)

    def run(params, x):
        return jax.device_get(jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(params, x))

    params = {name: PARAMS[name] for name in ("prior_loc", "loc", "scale")}
    whole, batches = (
        jax.tree.map(partial(np.mean, axis=0), run(params, X.reshape(-1, size)))
        for size in (len(X), 3)
    )
    assert_close(batches, whole)
    plain = value(inner(), (shared, shared_guide)) / len(X)
    np.testing.assert_allclose(whole[0], plain, rtol=1e-6)


def test_the_gradient_of_a_discrete_local_site_does_not_depend_on_the_batch_size():
    """TraceGraph_ELBO would count a scale on local sites twice."""

    def mixture(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("N", len(x)):
            k = numpyro.sample("k", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(w + k, 1.0), obs=x)

    def guide(x):
        numpyro.sample("w", dist.Normal(numpyro.param("loc", 0.4), 0.1))
        with numpyro.plate("N", len(x)):
            numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("logit", 0.2)))

    objective = PerDatum(TraceGraph_ELBO(), 8, N, True)

    def gradients(size):
        def gradient(key):
            x = jnp.full(size, 2.0)
            loss = lambda p: objective.loss(key, p, mixture, guide, x=x)  # noqa: E731
            return jax.grad(loss)({"loc": 0.4, "logit": 0.2})

        return jax.device_get(jax.jit(jax.vmap(gradient))(random.split(KEY, 4_000)))

    whole, batch = gradients(8), gradients(2)
    for name in whole:
        error = np.hypot(whole[name].std(), batch[name].std()) / 4_000**0.5
        difference = abs(whole[name].mean() - batch[name].mean())
        assert difference < 4.5 * error, name
        assert abs(whole[name].mean()) > 9 * error, name  # another scale would be seen


def both(x):
    """A global, an observed global and a local latent site."""
    w = numpyro.sample("w", dist.Normal(0.3, 1.0))
    numpyro.sample("seen", dist.Normal(w, 1.0), obs=0.7)
    with numpyro.plate("N", len(x)):
        z = numpyro.sample("z", dist.Normal(w, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_both(x):
    numpyro.sample("w", dist.Normal(0.4, 0.1))
    with numpyro.plate("N", len(x)):
        numpyro.sample("z", dist.Normal(0.5 * x, 0.7))


@pytest.mark.parametrize("inner", [Trace_ELBO(), TraceMeanField_ELBO(), StickingTheLanding()])
def test_held_out_numbers_hold_the_local_terms_alone(inner):
    held_out = PerDatum(inner, 100, N, True, drop_globals=True)

    @jax.jit
    def local_terms():
        drawn = trace_of(guide_of_both, random.split(KEY)[1], {}, X)
        log_p, _ = compute_log_probs(replay(both, drawn), (X,), {}, {})
        log_q, _ = compute_log_probs(replay(guide_of_both, drawn), (X,), {}, {})
        divergence = log_q["z"] - log_p["z"]
        if traits(inner).exact_divergences:
            q, p = drawn["z"]["fn"], dist.Normal(drawn["w"]["value"], 1.0)
            divergence = dist.kl_divergence(q, p).sum()
        return (divergence - log_p["x"]) / len(X)

    loss = value(held_out, (both, guide_of_both))
    np.testing.assert_allclose(loss, local_terms(), rtol=1e-5)


def test_without_a_plate_whole_batches_count():
    """Without a plate every latent site is global, and what is observed remains."""

    def model(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(w, 1.0).expand([len(x)]).to_event(1), obs=x)

    def guide(x):
        numpyro.sample("w", dist.Normal(0.4, 0.1))

    none = DataPlates(frozenset())
    programs, elbo = (model, guide), Trace_ELBO()
    loss = value(PerDatum(elbo, 12, none, True), programs)
    np.testing.assert_allclose(loss, value(elbo, programs) / 12, rtol=1e-6)
    held_out = PerDatum(Trace_ELBO(), 12, none, True, drop_globals=True)
    w = trace_of(guide, random.split(KEY)[1], {}, X)["w"]["value"]
    expected = -stats.norm.logpdf(X, float(w)).mean()
    np.testing.assert_allclose(value(held_out, programs), expected, rtol=1e-6)


@pytest.mark.parametrize("drop_globals", [False, True])
def test_scales_are_python_numbers(drop_globals):
    """As TraceEnum_ELBO asks."""
    seen = []

    class Spy(ELBO):
        def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
            for program in (model, guide):
                sites = trace_of(program, rng_key, param_map, *args, **kwargs).values()
                seen.extend(site["scale"] for site in sites if site["type"] == "sample")
            return jnp.zeros(())

    objective = PerDatum(Spy(), 48, N, True, drop_globals)
    jax.eval_shape(lambda x: objective.loss(KEY, {}, both, guide_of_both, x=x), X)
    scale = 0.0 if drop_globals else 0.25
    assert seen == [scale, scale, None, None, scale, None]
    assert {type(s) for s in seen} == {float, type(None)}


def test_sums_over_enumerated_sites_are_scaled():
    def mixture(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("N", len(x)):
            k = numpyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(w + k, 1.0), obs=x)

    inner = TraceEnum_ELBO()
    w = float(trace_of(shared_guide, random.split(KEY)[1], {}, X)["w"]["value"])
    log_p = np.log(0.6 * stats.norm.pdf(X, w) + 0.4 * stats.norm.pdf(X, w + 1))
    divergence = stats.norm.logpdf(w, 0.4, 0.7) - stats.norm.logpdf(w)
    loss = value(PerDatum(inner, 120, N, True), (mixture, shared_guide), {})
    np.testing.assert_allclose(loss, divergence / 120 - log_p.mean(), rtol=1e-5)
    held_out = PerDatum(inner, 120, N, True, drop_globals=True)
    loss = value(held_out, (mixture, shared_guide), {})
    np.testing.assert_allclose(loss, -log_p.mean(), rtol=1e-5)
    assert inner.max_plate_nesting == float("inf")  # what it learns of a program stays with us


WRAPPERS = {
    "per datum": lambda inner: PerDatum(inner, 12, N, False),
    "weighted": lambda inner: KLWeighted(inner, 0.5),
    "warm-up": lambda inner: KLWarmUp(inner, 4),
    "warming up": lambda inner: KLWarmUp(inner, 4).at_step(1),
    "free bits": lambda inner: FreeBits(inner, 0.1),
    "hybrid": lambda inner: Hybrid(0.5, inner),
}


class Tripled(Trace_ELBO):
    """A user's: works on the loss, whether it is a number or a term for each site."""

    def loss_with_mutable_state(self, *args, **kwargs):
        result = super().loss_with_mutable_state(*args, **kwargs)
        return result | {"loss": 3.0 * result["loss"]}


@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [("per datum", Trace_ELBO), *((wrapper, Tripled) for wrapper in WRAPPERS)],
)
def test_the_names_of_sites_do_not_change_a_bit(wrapper, inner):
    """NumPyro sums in the order of a set of names. That order differs between processes as it
    does between names. A cache of compiled programs must find the same program in all."""

    def traced(tag):
        def run(x, guide):
            slope = numpyro.param("slope", 1.2)
            with numpyro.plate("N", len(x)):
                for i in range(5):
                    loc = 0.0 if guide else slope * 1.7**i / 7
                    z = numpyro.sample(f"{tag}_{i}", dist.Normal(loc, 1.0 + 0.3 * i))
                if not guide:
                    numpyro.sample(f"{tag}_x", dist.Normal(z, 1.0), obs=x)

        def loss(params):
            programs = partial(run, guide=False), partial(run, guide=True)
            return WRAPPERS[wrapper](inner()).loss(KEY, params, *programs, x=X)

        return str(jax.make_jaxpr(jax.value_and_grad(loss))({"slope": 1.2}))

    assert traced("a") == traced("b")


# --- mutable state --------------------------------------------------------------------------------


def counting(program, name):
    """A program that counts its own runs, in place, as a network with batch statistics does."""

    def run(x):
        state = mutable(name, {"count": jnp.zeros(())})
        state["count"] = state["count"] + 1
        return program(x)

    return run


COUNTING = counting(model, "m"), counting(guide, "g")


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_plain_svi_takes_it_and_mutable_state_of_both_programs_advances_once_a_step(wrapper):
    svi = SVI(*COUNTING, optax.adam(1e-2), WRAPPERS[wrapper](UsersMeanField()))

    @jax.jit
    def step():
        start = svi.init(KEY, x=X)
        end, loss = svi.update(start, x=X)
        return start.mutable_state, end.mutable_state, svi.get_params(end), loss

    before, after, params, loss = jax.device_get(step())
    advanced = jax.tree.map(lambda old, new: float(new) - float(old), before, after)
    assert advanced == {"m": {"count": 1.0}, "g": {"count": 1.0}}
    assert np.isfinite(loss)
    assert max(abs(params[name] - start) for name, start in PARAMS.items()) > 1e-3


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (RenyiELBO(), TypeError, "expected one that carries .* got RenyiELBO; use Trace_ELBO"),
        (KLWeighted(StickingTheLanding(), 2.0), TypeError, "got StickingTheLanding; use"),
        (Trace_ELBO(2), ValueError, "expected one particle .* got num_particles 2"),
    ],
)
def test_mutable_state_that_would_be_lost_is_refused(objective, error, message):
    params = {"m": {"count": 0.0}, "g": {"count": 0.0}}
    objective = PerDatum(objective, 12, N, False)
    with pytest.raises(error, match=message):
        jax.eval_shape(
            lambda p, x: objective.loss_with_mutable_state(KEY, p, *COUNTING, x=x), params, X
        )


# --- the weight of the divergence -----------------------------------------------------------------


@pytest.mark.parametrize("objective", ELBOS)
def test_the_value_is_the_elbo_and_the_gradient_is_weighted(objective):
    inner, weights = objective(2), np.array([0.0, 0.3, 1.0, 4.0], np.float32)

    def run(weight):
        return jax.value_and_grad(
            lambda p: KLWeighted(inner, weight).loss(KEY, p, model, guide, x=X)
        )(PARAMS)

    values, gradients = jax.device_get(jax.jit(jax.vmap(run))(weights))
    plain, plain_gradient = value_and_grad(inner)
    np.testing.assert_allclose(values, plain, rtol=1e-6)
    assert abs(gradients["prior_loc"][0]) < 1e-6 < abs(plain_gradient["prior_loc"])
    for name in PARAMS:
        expected = (1 - weights) * gradients[name][0] + weights * plain_gradient[name]
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-4, atol=1e-4)


def test_without_the_divergence_the_gradient_is_the_reconstructions():
    """-E_q log p(x | z) is a formula here."""

    def exact(p):
        error = (X - p["slope"] * p["loc"] * X) ** 2 + (p["slope"] * p["scale"]) ** 2
        return 0.5 * jnp.sum(error)

    def gradient(key):
        objective = KLWeighted(Trace_ELBO(), 0.0)
        return jax.grad(lambda p: objective.loss(key, p, model, guide, x=X))(PARAMS)

    draws = jax.device_get(jax.jit(jax.vmap(gradient))(random.split(KEY, 20_000)))
    expected = jax.jit(jax.grad(exact))(PARAMS)
    for name in ("slope", "loc", "scale"):
        error = draws[name].std() / 20_000**0.5
        assert abs(draws[name].mean() - expected[name]) < 4.5 * error, name


def test_a_warm_up_has_an_objective_for_each_step_and_weights_multiply():
    inner = KLWeighted(UsersMeanField(), 3.0)
    warm_up = KLWarmUp(inner, 4, start=0.2)

    def at(step):
        objective = warm_up.at_step(step)
        return jax.value_and_grad(lambda p: objective.loss(KEY, p, model, guide, x=X))(PARAMS)

    steps = np.arange(7)
    weights = np.array([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    np.testing.assert_allclose(warm_up.weight(steps), weights, rtol=1e-6)
    values, gradients = jax.device_get(jax.jit(jax.vmap(at))(steps))
    full, gradient = value_and_grad(warm_up)
    assert_close((full, gradient), value_and_grad(inner), rtol=1e-6)  # what is held out: all of it
    np.testing.assert_allclose(values, full, rtol=1e-6)
    expected = weights * gradient["prior_loc"]  # the prior has nothing but the divergence
    np.testing.assert_allclose(gradients["prior_loc"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: KLWarmUp(Trace_ELBO(), 0), ValueError, "num_steps: .* from 1, got 0"),
        (lambda: KLWarmUp(Trace_ELBO(), 5, 1.5), ValueError, "start: .* from 0 to 1, got 1.5"),
        (lambda: KLWarmUp(UsersBound(), 5), TypeError, "got UsersBound, .* no term by itself"),
        (lambda: KLWarmUp(KLWarmUp(Trace_ELBO(), 5), 5), TypeError, "got KLWarmUp"),
        (lambda: KLWarmUp(FreeBits(Trace_ELBO(), 0.1), 5), TypeError, "got FreeBits"),
        (lambda: KLWeighted(Trace_ELBO(), -0.5), ValueError, "weight: .* from 0, got -0.5"),
        (lambda: KLWeighted(Trace_ELBO(), float("inf")), ValueError, "weight: expected a finite"),
        (lambda: KLWeighted(TraceGraph_ELBO(), 2.0), TypeError, "got TraceGraph_ELBO"),
        (lambda: FreeBits(Trace_ELBO(), -1.0), ValueError, "nats: .* number from 0, got -1"),
        (lambda: FreeBits(DoublyReparameterized(), 0.1), TypeError, "got DoublyReparameterized"),
        (lambda: FreeBits(KLWeighted(Trace_ELBO(), 2.0), 0.1), TypeError, "has a weight already"),
        (lambda: FreeBits(Hybrid(0.5), 0.1), TypeError, "got Hybrid, .* has a weight already"),
        (lambda: Hybrid(1.1), ValueError, "alpha: expected a share from 0 to 1, got 1.1"),
        (lambda: Hybrid(0.5, RenyiELBO()), TypeError, "expected Trace_ELBO, .* got RenyiELBO"),
        (lambda: Hybrid(0.5, Hybrid(0.5)), TypeError, "got Hybrid, .* has a weight already"),
    ],
)
def test_what_cannot_be_made_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


# --- free bits ------------------------------------------------------------------------------------

GAUSSIAN = {"loc": np.array([0.9, 0.05], np.float32), "scale": np.array([0.5, 0.97], np.float32)}


def two_dimensions(x):
    with numpyro.plate("N", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x)


def guide_of_two(x):
    loc, scale = (numpyro.param(name, GAUSSIAN[name]) for name in ("loc", "scale"))
    with numpyro.plate("N", len(x)):
        numpyro.sample("z", dist.Normal(loc * x[:, None], scale).to_event(1))


@jax.jit
def kl_per_dim(p, x=X):
    variance = p["scale"] ** 2
    squares = (p["loc"] * x[:, None]) ** 2
    return jnp.mean(0.5 * (squares + variance - 1 - jnp.log(variance)), 0)


def test_dimensions_below_the_threshold_are_free():
    inner = Trace_ELBO(3)
    first, second = kl_per_dim(GAUSSIAN)
    assert second < 0.2 < first

    def run(objective):
        return value_and_grad(objective, GAUSSIAN, (two_dimensions, guide_of_two))

    (loss, gradient), (plain, plain_gradient) = run(FreeBits(inner, 0.2)), run(inner)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    # What differs is the divergence of the second dimension, summed over the data.
    without = jax.jit(jax.grad(lambda p: len(X) * kl_per_dim(p)[1]))(GAUSSIAN)
    expected = jax.tree.map(lambda g, w: g - w, plain_gradient, without)
    assert_close(gradient, expected, atol=1e-4)


def test_free_bits_see_the_draws_of_the_objective():
    """z2's divergence depends on the draw of z1. All of it is free, so none may be left."""

    def chain(x):
        with numpyro.plate("N", len(x)):
            z1 = numpyro.sample("z1", dist.Normal(numpyro.param("prior_loc", 0.3), 1.0))
            z2 = numpyro.sample("z2", dist.Normal(jnp.sin(z1), 1.0))
            numpyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x):
        loc, scale = numpyro.param("loc", 0.4), numpyro.param("scale", 0.7)
        with numpyro.plate("N", len(x)):
            z1 = numpyro.sample("z1", dist.Normal(loc * x, scale))
            numpyro.sample("z2", dist.Normal(z1, scale))

    params = {name: PARAMS[name] for name in ("prior_loc", "loc", "scale")}
    inner = TraceMeanField_ELBO(2, vectorize_particles=antithetic)
    _, free = value_and_grad(FreeBits(inner, 1e3), params, (chain, guide))
    _, without = value_and_grad(KLWeighted(inner, 0.0), params, (chain, guide))
    assert_close(free, without, atol=1e-4)


def test_free_bits_and_plain_svi_take_arguments_that_are_no_data():
    def model(x, noise, use):
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(z if use else 0.0, noise), obs=x)

    def guide(x, noise, use):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.1) * x, 0.9))

    svi = SVI(model, guide, optax.sgd(0.1), FreeBits(Trace_ELBO(), 0.5), use=True)
    assert np.isfinite(jax.jit(lambda x: svi.evaluate(svi.init(KEY, x, 1.0), x, 1.0))(X))


def with_global(program):
    def run(x):
        numpyro.sample("w", dist.Normal(0, 1))
        program(x)

    return run


def student(x):
    with numpyro.plate("N", len(x)):
        loc = GAUSSIAN["loc"] * x[:, None]
        numpyro.sample("z", dist.StudentT(9.0, loc, GAUSSIAN["scale"]).to_event(1))


def full_covariance(x):
    with numpyro.plate("N", len(x)):
        loc = GAUSSIAN["loc"] * x[:, None]
        numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=0.5 * jnp.eye(2)))


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        ((two_dimensions, student), "'z': .* StudentT"),
        ((two_dimensions, full_covariance), "'z': .* MultivariateNormal and Normal; train it wi"),
        ((with_global(two_dimensions), with_global(guide_of_two)), "site 'w': .* a global site"),
    ],
)
def test_free_bits_need_local_sites_with_a_formula_in_every_dimension(programs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: FreeBits(Trace_ELBO(), 0.1).loss(KEY, {}, *programs, x=x), X)


def test_free_bits_need_data_among_the_arguments():
    programs = partial(two_dimensions, X), partial(guide_of_two, X)
    with pytest.raises(ValueError, match="model: expected arrays of data among its arguments"):
        jax.eval_shape(lambda: FreeBits(Trace_ELBO(), 0.1).loss(KEY, {}, *programs))


# --- Hybrid ---------------------------------------------------------------------------------------


def test_the_hybrid_is_the_mixture():
    """At its ends it is one ELBO, to the bit; between them it is linear."""
    inner = StickingTheLanding()
    prior = block(model, hide=["x"])
    by_guide, by_prior = value_and_grad(inner), value_and_grad(inner, programs=(model, prior))
    ends = [value_and_grad(Hybrid(alpha, inner)) for alpha in (1.0, 0.0)]
    for end, expected in zip(ends, (by_guide, by_prior), strict=True):
        assert end[0] == expected[0]
        assert_close(end[1], expected[1])
    assert by_prior[1]["loc"] == by_prior[1]["scale"] == 0
    mixed = value_and_grad(Hybrid(0.3, inner))
    expected = jax.tree.map(lambda g, p: 0.3 * g + 0.7 * p, by_guide, by_prior)
    assert_close(mixed, expected)


def test_the_priors_draws_are_worth_what_the_formula_says():
    """-E_{p(z)} log N(x; slope z, 1), with z ~ N(prior_loc, 1), and its gradient."""

    def exact(p):
        error = (X - p["slope"] * p["prior_loc"]) ** 2 + p["slope"] ** 2
        return 0.5 * jnp.sum(error + jnp.log(2 * jnp.pi))

    def draw(key):
        return jax.value_and_grad(lambda p: Hybrid(0.0).loss(key, p, model, guide, x=X))(PARAMS)

    values, gradients = jax.device_get(jax.jit(jax.vmap(draw))(random.split(KEY, 20_000)))
    expected, expected_gradient = jax.jit(jax.value_and_grad(exact))(PARAMS)
    assert abs(values.mean() - expected) < 4.5 * values.std() / 20_000**0.5
    for name in ("prior_loc", "slope"):
        error = gradients[name].std() / 20_000**0.5
        assert abs(gradients[name].mean() - expected_gradient[name]) < 4.5 * error, name


def test_in_a_hybrid_the_guides_divergence_alone_is_weighed():
    found = value_and_grad(KLWeighted(Hybrid(0.4, UsersTrace()), 0.3))
    by_guide = value_and_grad(KLWeighted(UsersTrace(), 0.3))
    by_prior = value_and_grad(Hybrid(0.0, UsersTrace()))
    expected = jax.tree.map(lambda g, p: 0.4 * g + 0.6 * p, by_guide, by_prior)
    assert_close(found, expected)


# --- in use ---------------------------------------------------------------------------------------


class Narrow(dist.Normal):
    """A Normal that draws 32 bits, whatever JAX is set to."""

    def sample(self, key, sample_shape=()):
        return super().sample(key, sample_shape).astype(jnp.float32)


def narrow_guide(x):
    with numpyro.plate("N", len(x)):
        numpyro.sample("z", Narrow(numpyro.param("loc", 0.4) * x, numpyro.param("scale", 0.7)))


def test_with_64_bits_a_program_of_32_bits_keeps_its_type():
    with jax.enable_x64(True):
        x = jnp.asarray(X)
        params = {name: jnp.float32(value) for name, value in PARAMS.items()}
        for objective, other in (
            (DoublyReparameterized(2), narrow_guide),
            (KLWarmUp(UsersTrace(2, antithetic), 4).at_step(jnp.int32(1)), guide),
            (FreeBits(Trace_ELBO(2, vectorize_particles=antithetic), 0.1), guide),
        ):
            scaled = PerDatum(objective, 24, N, False)
            loss = lambda p: scaled.loss(KEY, p, model, other, x=x)  # noqa: E731, B023
            gradient = jax.eval_shape(jax.grad(loss), params)
            assert {g.dtype for g in gradient.values()} == {jnp.dtype("float32")}


def run(objective, **settings):
    return fit(
        model,
        guide,
        {"x": X},
        objective=objective,
        **{"progress": False, "num_steps": 8} | settings,
    )


def plan_of(objective, num_steps, validation):
    """What a run of ``fit`` does at every step."""
    none = ("validation_objective", "preprocess", "init", "mesh", "num_seeds", "seed")
    none += ("num_epochs", "batch_size", "validate_every", "patience")
    settings = {"num_steps": num_steps, "average": 0.0, "on_nan": "stop", "validation": validation}
    settings |= dict.fromkeys(none) | {"optimizer": optax.sgd(1e-3), "objective": objective}
    return check(model, guide, {"x": X}, **settings).plan


# Others are trained in test_engine.py, test_mean_field.py and, where sites are summed over,
# test_programs_of_others.py. Steps of a warm-up and a beta-VAE are below.
TRAINED = {
    "doubly reparameterised, in pieces": DoublyReparameterized(12),
    "free bits": FreeBits(TraceMeanField_ELBO(2), 0.1),
    "hybrid": Hybrid(0.5, UsersTrace()),
}


@pytest.mark.parametrize("name", list(TRAINED))
def test_fit_trains_seeds_in_batches_and_validates(name):
    settings = {"num_seeds": 2, "batch_size": 4, "optimizer": optax.adam(3e-2), "num_steps": 60}
    fitted = run(TRAINED[name], **settings, validation={"x": X[::2] + 0.1}, validate_every=20)
    assert (fitted.validation_elbo[:, -1] > fitted.validation_elbo[:, 0] - 0.05).all()
    assert (fitted.elbo[:, -20:].mean(1) > fitted.elbo[:, :20].mean(1)).all()
    moved = {n: np.abs(np.asarray(fitted.params[n]) - PARAMS[n]).min() for n in PARAMS}
    assert min(moved.values()) > 1e-3, moved


def test_fit_warms_up_and_its_numbers_are_elbos():
    """The first step has weight 0, the second is the ELBO's; the prior has the divergence only."""
    data, held_out, elbo = {"x": jnp.asarray(X)}, {"x": jnp.asarray(X + 1)}, Trace_ELBO()
    warm = plan_of(KLWarmUp(elbo, 1), num_steps=2, validation=Prepared(held_out))
    plain = replace(warm, objective=elbo, validation_objective=elbo)

    @jax.jit
    def steps():
        start = init(warm, KEY[None], {"x": data["x"][first_rows(warm)]}, {})
        batches, size = Window(0, {"x": held_out["x"][None]}), len(X)
        numbers = [
            validate(plan, size, 2, start, KEY[None], batches, jnp.array(1))
            for plan in (warm, plain)
        ]
        start = by_seed(lambda x: x[0], start)
        (first, loss), (_, plain_loss) = (
            take_step(plan, start, KEY, Whole(data)) for plan in (warm, plain)
        )
        seconds = (take_step(plan, first, KEY, Whole(data))[0] for plan in (warm, plain))
        return first.params, [state.params for state in seconds], (loss, plain_loss), numbers

    first, (second, expected), losses, held_out_elbos = jax.device_get(steps())
    np.testing.assert_allclose(first["prior_loc"], 0.3, atol=1e-7)
    assert abs(first["slope"] - 1.2) > 1e-6
    assert abs(second["prior_loc"] - 0.3) > 1e-6
    assert_close(second, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(*losses, rtol=1e-6)
    np.testing.assert_allclose(*held_out_elbos, rtol=1e-6)


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"warm-up within the training's 8 steps, got one of 9"):
        run(KLWarmUp(Trace_ELBO(), 9))


def test_a_beta_vae_tells_less():
    """The rate, KL(q || p), of a guide that was trained with a heavier divergence is smaller.

    At the greatest ELBO z has unit variance and x has the variance of the data; the rate is then
    half the logarithm of that variance.
    """
    objective = KLWeighted(TraceMeanField_ELBO(), 4.0)
    p = run(objective, num_steps=300, optimizer=optax.adam(3e-2)).params
    loc, scale = p["loc"][0] * X - p["prior_loc"][0], p["scale"][0]
    rate = float(np.mean(loc**2 + scale**2 - 1 - 2 * np.log(scale)) / 2)
    assert rate < 0.5 * (0.5 * np.log(X.var()))


def test_free_bits_are_per_datum_in_fit():
    """A dimension that nothing but its divergence moves stays where it is free."""

    def unheard(x):
        with numpyro.plate("N", len(x)):
            numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    signs = np.tile(np.float32([1, -1]), 12)  # with one divergence for all, whatever the batch
    settings = {"optimizer": optax.sgd(0.1), "num_steps": 1, "batch_size": 8, "progress": False}
    objective = FreeBits(TraceMeanField_ELBO(), 0.2)
    fitted = fit(unheard, guide_of_two, {"x": signs}, objective=objective, **settings)
    gradient = jax.jit(jax.grad(lambda p: kl_per_dim(p, signs)[0]))(GAUSSIAN)
    for name, start in GAUSSIAN.items():
        step = start - np.asarray(fitted.params[name][0])
        np.testing.assert_allclose(step, 0.1 * gradient[name], rtol=1e-4, atol=1e-6)


def test_the_words_for_an_objective_hold_its_settings_and_those_of_the_one_inside():
    """By them a checkpoint knows the objective of its run."""

    def words(scale, inner):
        made = KLWeighted(inner, scale), FreeBits(inner, scale), Hybrid(scale, inner)
        return [describe_value(one) for one in (*made, KLWarmUp(inner, 4, scale))]

    first = words(0.2, Trace_ELBO())
    assert words(0.2, Trace_ELBO()) == first
    others = words(0.1, Trace_ELBO()) + words(0.2, Trace_ELBO(2)) + words(0.2, UsersTrace())
    assert len({*first, *others}) == 16
