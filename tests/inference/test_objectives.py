"""The weight of the divergence: the value stays the ELBO, the gradient is that of the weighted one.
The hybrid of the ELBO and of what the prior's own draws say of the data.

So do free bits; and what ``fit`` makes of every objective. The bounds themselves are held against
exact values in test_bounds.py, the scale of an objective in test_engine.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

from inference import (
    OBJECTIVES,
    CheckpointError,
    DoublyReparameterized,
    FreeBits,
    Hybrid,
    KLWarmUp,
    KLWeighted,
    StickingTheLanding,
    fit,
)

X = np.linspace(-2, 2, 12).astype(np.float32)
PARAMS = {"prior_loc": 0.3, "slope": 1.2, "loc": 0.4, "scale": 0.7}
KEY = jax.random.key(0)


def model(x):
    prior_loc, slope = numpyro.param("prior_loc", 0.3), numpyro.param("slope", 1.2)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(prior_loc, 1.0))
        numpyro.sample("x", dist.Normal(slope * z, 1.0), obs=x)


def guide(x):
    loc = numpyro.param("loc", 0.4)
    scale = numpyro.param("scale", 0.7, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc * x, scale))


def value_and_grad(objective):
    def loss(params):
        return objective.loss(KEY, params, model, guide, x=X)

    return jax.tree.map(float, jax.value_and_grad(loss)(PARAMS))


def reconstruction_gradient():
    """Of -E_q log p(x | z), whose expectation is a formula."""

    def loss(p):
        error = (X - p["slope"] * p["loc"] * X) ** 2 + (p["slope"] * p["scale"]) ** 2
        return 0.5 * jnp.sum(error)

    return jax.grad(loss)(PARAMS)


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO, StickingTheLanding])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 4.0])
def test_the_value_is_the_elbo_and_the_gradient_is_weighted(objective, weight):
    objective = objective(num_particles=2)
    plain, plain_gradient = value_and_grad(objective)
    value, gradient = value_and_grad(KLWeighted(objective, weight))
    _, without = value_and_grad(KLWeighted(objective, 0.0))
    assert value == pytest.approx(plain, rel=1e-6)
    assert abs(without["prior_loc"]) < 1e-6 < abs(plain_gradient["prior_loc"])
    for name in PARAMS:
        expected = (1 - weight) * without[name] + weight * plain_gradient[name]
        assert gradient[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


def test_without_the_divergence_the_gradient_is_the_reconstructions():
    objective = KLWeighted(Trace_ELBO(), 0.0)

    def gradient(key):
        return jax.grad(lambda p: objective.loss(key, p, model, guide, x=X))(PARAMS)

    draws = jax.jit(jax.vmap(gradient))(jax.random.split(KEY, 20_000))
    expected = reconstruction_gradient()
    for name in ("slope", "loc", "scale"):
        error = draws[name].std() / 20_000**0.5
        assert abs(draws[name].mean() - expected[name]) < 4.5 * error, name


def test_plain_svi_takes_it():
    svi = SVI(model, guide, optax.adam(1e-2), KLWeighted(Trace_ELBO(), 0.5))
    state = svi.init(KEY, x=X)
    for _ in range(2):
        state, loss = svi.update(state, x=X)
    assert np.isfinite(loss)


def run(objective, **settings):
    return fit(
        model,
        guide,
        {"x": X},
        objective=objective,
        **{"progress": False, "num_steps": 8} | settings,
    )


def test_the_weight_rises_over_the_warm_up_and_then_stays():
    warm_up = KLWarmUp(Trace_ELBO(), 4, start=0.2)
    weights = [float(warm_up.weight(step)) for step in range(7)]
    np.testing.assert_allclose(weights, [0.2, 0.4, 0.6, 0.8, 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_fit_starts_with_the_first_weight_and_ends_with_the_elbo(num_seeds):
    sgd = optax.sgd(1e-3)
    cold = run(KLWarmUp(Trace_ELBO(), 1), num_steps=1, optimizer=sgd, num_seeds=num_seeds)
    np.testing.assert_allclose(cold.params["prior_loc"], 0.3, atol=1e-7)  # only the prior has it
    assert (abs(cold.params["slope"] - 1.2) > 1e-6).all()
    settings = {"optimizer": sgd, "num_seeds": num_seeds}
    second = run(KLWarmUp(Trace_ELBO(), 1), num_steps=2, **settings)
    assert (abs(second.params["prior_loc"] - 0.3) > 1e-6).all()

    full = run(KLWarmUp(Trace_ELBO(), 8, start=1.0), **settings)
    plain = run(Trace_ELBO(), **settings)
    for name in PARAMS:
        np.testing.assert_allclose(full.params[name], plain.params[name], rtol=1e-5)
    np.testing.assert_allclose(full.elbo, plain.elbo, rtol=1e-5)


def test_the_trace_and_the_held_out_elbo_are_elbos_during_the_warm_up():
    still = optax.sgd(0.0)
    held_out = {"validation": {"x": X + 1}, "validate_every": 2, "optimizer": still}
    warm, plain = run(KLWarmUp(Trace_ELBO(), 8), **held_out), run(Trace_ELBO(), **held_out)
    np.testing.assert_allclose(warm.elbo, plain.elbo, rtol=1e-6)
    np.testing.assert_allclose(warm.validation_elbo, plain.validation_elbo, rtol=1e-6)


def test_a_warm_up_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"warm-up within the training's 8 steps, got one of 9"):
        run(KLWarmUp(Trace_ELBO(), 9))
    run(KLWarmUp(Trace_ELBO(), 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Trace_ELBO(), 0), ValueError, "num_steps: expected at least 1, got 0"),
        ((Trace_ELBO(), 5, 1.5), ValueError, "start: expected a weight from 0 to 1, got 1.5"),
        ((RenyiELBO(), 5), TypeError, "expected Trace_ELBO, .* got RenyiELBO"),
        ((FreeBits(Trace_ELBO(), 0.1), 5), TypeError, "got FreeBits; .* free bits"),
    ],
)
def test_what_makes_no_warm_up_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        KLWarmUp(*arguments)


def test_a_warm_up_ends_at_the_weight_of_a_beta_vae():
    weighted = KLWeighted(Trace_ELBO(), 3.0)
    for warm_up in (KLWarmUp(weighted, 8, start=1.0), KLWeighted(weighted, 1.0)):
        settings = {"optimizer": optax.sgd(1e-3)}
        warm, plain = run(warm_up, **settings), run(weighted, **settings)
        for name in PARAMS:
            np.testing.assert_allclose(warm.params[name], plain.params[name], rtol=1e-5)
    value, twice = (value_and_grad(o)[1] for o in (weighted, KLWeighted(weighted, 0.5)))
    only_prior = value["prior_loc"] / 2
    assert twice["prior_loc"] == pytest.approx(only_prior, rel=1e-5)


def test_a_beta_vae_tells_less():
    """The rate, KL(q || p), of a guide that was trained with a heavier divergence is smaller."""

    def rate(objective):
        p = run(objective, num_steps=300, optimizer=optax.adam(3e-2)).params
        loc, scale = p["loc"][0] * X - p["prior_loc"][0], p["scale"][0]
        return float(np.mean(loc**2 + scale**2 - 1 - 2 * np.log(scale)) / 2)

    assert rate(KLWeighted(TraceMeanField_ELBO(), 4.0)) < 0.5 * rate(TraceMeanField_ELBO())


@pytest.mark.parametrize("weight", [-0.5, float("inf")])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(ValueError, match="weight: expected a finite number from 0"):
        KLWeighted(Trace_ELBO(), weight)


# --- free bits ------------------------------------------------------------------------------------

GAUSSIAN = {"loc": np.array([0.9, 0.05], np.float32), "scale": np.array([0.5, 0.97], np.float32)}


def two_dimensions(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(1), 1.0), obs=x)


def guide_of_two(x):
    loc, scale = (numpyro.param(name, GAUSSIAN[name]) for name in ("loc", "scale"))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc * x[:, None], scale).to_event(1))


def kl_per_dim(p):
    variance = p["scale"] ** 2
    squares = (p["loc"] * X[:, None]) ** 2
    return jnp.mean(0.5 * (squares + variance - 1 - jnp.log(variance)), 0)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO, StickingTheLanding])
def test_dimensions_below_the_threshold_are_free(objective, num_particles):
    nats = 0.2
    first, second = kl_per_dim(GAUSSIAN)
    assert second < nats < first
    objective = objective(num_particles)

    def value_and_grad(objective):
        return jax.value_and_grad(
            lambda p: objective.loss(KEY, p, two_dimensions, guide_of_two, x=X)
        )(GAUSSIAN)

    value, gradient = value_and_grad(FreeBits(objective, nats))
    plain, plain_gradient = value_and_grad(objective)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    # What differs is the divergence of the second dimension, summed over the data.
    without = jax.grad(lambda p: len(X) * kl_per_dim(p)[1])(GAUSSIAN)
    for name in GAUSSIAN:
        expected = plain_gradient[name] - without[name]
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-4, atol=1e-4)
    _, nothing_free = value_and_grad(FreeBits(objective, 0.0))
    jax.tree.map(np.testing.assert_array_equal, nothing_free, plain_gradient)


def test_free_bits_are_per_datum_in_fit():
    """A dimension that nothing but its divergence moves stays where it is free."""

    def unheard(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def step(objective, batch_size):
        settings = {"optimizer": optax.sgd(0.1), "num_steps": 1, "batch_size": batch_size}
        data = {"x": np.concatenate([X, X])}
        fitted = fit(unheard, guide_of_two, data, objective=objective, progress=False, **settings)
        return {name: np.array(GAUSSIAN[name] - fitted.params[name][0]) for name in GAUSSIAN}

    gradient = jax.grad(lambda p: kl_per_dim(p)[0])(GAUSSIAN)
    got = step(FreeBits(TraceMeanField_ELBO(), 0.2), None)
    for name in GAUSSIAN:
        np.testing.assert_allclose(got[name], 0.1 * gradient[name], rtol=1e-4, atol=1e-6)
    batch = step(FreeBits(TraceMeanField_ELBO(), 0.2), 8)
    assert batch["scale"][0] == pytest.approx(got["scale"][0], rel=1e-4)  # whatever the batch
    assert abs(step(TraceMeanField_ELBO(), 8)["scale"][1]) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fn: dist.StudentT(9.0, 0.0, fn.base_dist.scale).to_event(1), "'z': .* StudentT"),
        (
            lambda fn: dist.MultivariateNormal(fn.mean, scale_tril=0.5 * jnp.eye(2)),
            "'z': .* MultivariateNormal and Normal; train it without free bits",
        ),
    ],
)
def test_free_bits_need_a_formula_in_every_dimension(change, message):
    def other(x):
        with numpyro.plate("data", len(x)):
            fn = dist.Normal(GAUSSIAN["loc"] * x[:, None], GAUSSIAN["scale"]).to_event(1)
            numpyro.sample("z", change(fn))

    with pytest.raises(ValueError, match=message):
        FreeBits(Trace_ELBO(), 0.1).loss(KEY, {}, two_dimensions, other, x=X)


def test_free_bits_refuse_globals_and_impossible_nats():
    def with_global(program):
        def run(x):
            numpyro.sample("w", dist.Normal(0, 1))
            program(x)

        return run

    with pytest.raises(ValueError, match="site 'w': expected it in the plate"):
        fit(
            with_global(two_dimensions),
            with_global(guide_of_two),
            {"x": X},
            objective=FreeBits(Trace_ELBO(), 0.1),
            num_steps=1,
        )
    with pytest.raises(ValueError, match="nats: expected a finite number from 0, got -1"):
        FreeBits(Trace_ELBO(), -1.0)
    with pytest.raises(TypeError, match="got DoublyReparameterized"):
        FreeBits(DoublyReparameterized(), 0.1)


# --- every objective, in fit ----------------------------------------------------------------------

ALL = {name: build(3) for name, build in OBJECTIVES.items() if name != "RenyiELBO"} | {
    "beta": KLWeighted(Trace_ELBO(2), 4.0),
    "free bits": FreeBits(TraceMeanField_ELBO(2), 0.1),
}


@pytest.mark.parametrize("name", list(ALL))
def test_fit_trains_seeds_in_batches_and_validates(name):
    settings = {"num_seeds": 2, "batch_size": 4, "optimizer": optax.adam(3e-2), "num_steps": 60}
    fitted = run(ALL[name], **settings, validation={"x": X[::2] + 0.1}, validate_every=20)
    assert (fitted.validation_elbo[:, -1] > fitted.validation_elbo[:, 0] - 0.05).all()
    assert (fitted.elbo[:, -20:].mean(1) > fitted.elbo[:, :20].mean(1)).all()
    assert all(np.abs(fitted.params[n] - PARAMS[n]).min() > 1e-3 for n in PARAMS)


def test_a_checkpoint_knows_its_objective(tmp_path):
    first = run(FreeBits(Trace_ELBO(), 0.2), checkpoint=tmp_path)
    same = run(FreeBits(Trace_ELBO(), 0.2), checkpoint=tmp_path)
    np.testing.assert_array_equal(same.elbo, first.elbo)
    with pytest.raises(CheckpointError, match="objective"):
        run(FreeBits(Trace_ELBO(), 0.1), checkpoint=tmp_path)


def test_names_stand_for_objectives_of_so_many_particles():
    for name, build in OBJECTIVES.items():
        assert build(7).num_particles == 7, name
    assert OBJECTIVES["importance-weighted"](7).alpha == 0


# --- Hybrid ---------------------------------------------------------------------------------------


def prior_guide(x):
    """The model's prior, written out."""
    prior_loc = numpyro.param("prior_loc", 0.3)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(prior_loc, 1.0))


def value_and_grad_under(objective, other):
    def loss(params):
        return objective.loss(KEY, params, model, other, x=X)

    return jax.tree.map(float, jax.value_and_grad(loss)(PARAMS))


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize(("alpha", "other"), [(1.0, guide), (0.0, prior_guide)])
def test_at_its_ends_the_hybrid_is_one_elbo_exactly(objective, alpha, other):
    value, gradient = value_and_grad(Hybrid(alpha, objective()))
    expected, expected_gradient = value_and_grad_under(objective(), other)
    assert value == expected
    for name in PARAMS:
        assert gradient[name] == pytest.approx(expected_gradient[name], rel=1e-5, abs=1e-6), name
    if alpha == 0:
        assert gradient["loc"] == gradient["scale"] == 0


def test_between_its_ends_the_hybrid_is_the_mixture():
    (by_guide, guide_gradient), (by_prior, prior_gradient) = (
        value_and_grad(Hybrid(alpha)) for alpha in (1.0, 0.0)
    )
    value, gradient = value_and_grad(Hybrid(0.3))
    assert value == pytest.approx(0.3 * by_guide + 0.7 * by_prior, rel=1e-6)
    for name in PARAMS:
        expected = 0.3 * guide_gradient[name] + 0.7 * prior_gradient[name]
        assert gradient[name] == pytest.approx(expected, rel=1e-5, abs=1e-5), name


def test_the_priors_draws_are_worth_what_the_formula_says():
    """-E_{p(z)} log N(x; slope z, 1), with z ~ N(prior_loc, 1), and its gradient."""

    def exact(p):
        error = (X - p["slope"] * p["prior_loc"]) ** 2 + p["slope"] ** 2
        return 0.5 * jnp.sum(error + jnp.log(2 * jnp.pi))

    def draw(key):
        return jax.value_and_grad(lambda p: Hybrid(0.0).loss(key, p, model, guide, x=X))(PARAMS)

    values, gradients = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20_000))
    expected, expected_gradient = jax.value_and_grad(exact)(PARAMS)
    assert abs(values.mean() - expected) < 4.5 * values.std() / 20_000**0.5
    for name in ("prior_loc", "slope"):
        error = gradients[name].std() / 20_000**0.5
        assert abs(gradients[name].mean() - expected_gradient[name]) < 4.5 * error, name


def test_plain_svi_takes_a_hybrid():
    svi = SVI(model, guide, optax.adam(1e-2), Hybrid(0.5))
    state = svi.init(KEY, x=X)
    for _ in range(2):
        state, loss = svi.update(state, x=X)
    assert np.isfinite(loss)


def test_fit_takes_a_hybrid_and_scales_it_per_datum():
    still = optax.sgd(0.0)
    mixed = [run(Hybrid(alpha), optimizer=still).elbo for alpha in (0.0, 0.4, 1.0)]
    np.testing.assert_allclose(mixed[1], 0.6 * mixed[0] + 0.4 * mixed[2], rtol=1e-5)
    np.testing.assert_array_equal(run(Hybrid(1.0)).elbo, run(Trace_ELBO()).elbo)


@pytest.mark.parametrize("objective", [Trace_ELBO, TraceMeanField_ELBO])
def test_in_a_hybrid_the_guides_divergence_alone_is_weighed(objective):
    value, gradient = value_and_grad(KLWeighted(Hybrid(0.4, objective()), 0.3))
    plain, _ = value_and_grad(Hybrid(0.4, objective()))
    _, by_guide = value_and_grad(KLWeighted(objective(), 0.3))
    _, by_prior = value_and_grad(Hybrid(0.0, objective()))
    assert value == pytest.approx(plain, rel=1e-6)
    for name in PARAMS:
        expected = 0.4 * by_guide[name] + 0.6 * by_prior[name]
        assert gradient[name] == pytest.approx(expected, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.1,), ValueError, "alpha: expected a share from 0 to 1, got 1.1"),
        ((0.5, RenyiELBO()), TypeError, "expected Trace_ELBO .* got RenyiELBO"),
    ],
)
def test_what_makes_no_hybrid_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Hybrid(*arguments)
