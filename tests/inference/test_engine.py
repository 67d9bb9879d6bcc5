"""The engine's promises, one test each.

Checkpoints, interruptions and runs that go on are in test_checkpoints.py, messages in
test_inputs.py, single steps in test_steps.py.
"""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.elbo import ELBO

from inference import NonFiniteError, Prepared, fit
from inference._progress import Progress
from inference._steps import MAX_CHUNK

RNG = np.random.default_rng(0)
C = RNG.normal(size=120).astype(np.float32)
DATA = {"c": C, "x": (1 + C + RNG.normal(size=120) * 2**0.5).astype(np.float32)}


def model(c, x=None):
    slope = numpyro.param("slope", lambda key: jax.random.normal(key))
    with numpyro.plate("rows", len(c)):
        z = numpyro.sample("z", dist.Normal(slope * c, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(c, x):
    weights = numpyro.param("weights", lambda key: 0.1 * jax.random.normal(key, (3,)))
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(c)):
        loc = weights[0] * x + weights[1] * c + weights[2]
        numpyro.sample("z", dist.Normal(loc, scale))


def run(data=DATA, **settings):
    settings = {"num_steps": 40, "batch_size": 24, "progress": False} | settings
    return fit(model, guide, data, **settings)


@pytest.fixture(scope="module")
def plain():
    return run()


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    np.testing.assert_array_equal(a.elbo, b.elbo)


def no_latents(**data):
    pass


# --- batches --------------------------------------------------------------------------------------


def visits(**settings):
    """How often each of 13 data is visited, by seed: plain gradient descent counts it."""

    def counting_model(i):
        visits = numpyro.param("visits", jnp.zeros(13))
        with numpyro.plate("rows", len(i)):
            numpyro.factor("count", visits[i])

    settings = {"num_seeds": 5, "batch_size": 4, "optimizer": optax.sgd(4.0)} | settings
    result = fit(counting_model, no_latents, {"i": np.arange(13)}, progress=False, **settings)
    return np.asarray(result.params["visits"]).round().astype(int), result


def test_data_are_drawn_without_replacement_in_another_order_for_every_seed():
    counted, _ = visits(num_steps=1)
    assert counted.max() == 1
    np.testing.assert_array_equal(counted.sum(1), 4)
    assert len(np.unique(counted, axis=0)) == 5


def test_num_epochs_covers_the_data():
    counted, result = visits(num_epochs=2)
    assert result.elbo.shape == (5, 7)
    assert result.config["num_steps"] == 7
    assert (counted.min(), counted.max()) == (2, 3)
    np.testing.assert_array_equal(counted.sum(1), 28)


def test_data_keep_their_type_and_are_prepared_on_the_device_at_every_step():
    images = RNG.integers(0, 256, (30, 4), dtype=np.uint8)
    seen = []

    def prepare(key, batch):
        seen.append((batch["x"].dtype, isinstance(batch["x"], jax.core.Tracer)))
        noise = jax.random.uniform(key, batch["x"].shape)
        return {"x": batch["x"] / 255 + noise}

    def constant_model(x):
        loc = numpyro.param("loc", jnp.zeros(4))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    settings = {"num_steps": 30, "optimizer": optax.sgd(0.0), "preprocess": prepare}
    result = fit(constant_model, no_latents, {"x": images}, progress=False, **settings)
    assert seen
    assert all(dtype == jnp.uint8 and traced for dtype, traced in seen)
    assert len(np.unique(result.elbo)) == 30  # new noise at every step, the same data


def test_a_dataframe_of_wide_floats_is_what_the_device_makes_of_it(plain):
    result = run(pd.DataFrame({"c": DATA["c"], "x": DATA["x"].astype(np.float64)}))
    assert_same_bits(result, plain)
    assert result.info["converted"] == {"x": "float64 to float32"}
    assert plain.info["converted"] == {}


# --- what the host does ---------------------------------------------------------------------------


def test_programs_are_traced_and_compiled_equally_often_however_long_the_run(caplog):
    calls = []

    def counted_model(c, x=None):
        calls.append(1)
        model(c, x)

    def count(num_steps):
        calls.clear()
        caplog.clear()
        fit(counted_model, guide, DATA, num_steps=num_steps, progress=False)
        messages = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
        return len(calls), len(messages)

    count(3)
    caplog.set_level(logging.WARNING)
    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        short, long = count(3), count(MAX_CHUNK + 100)
    finally:
        jax.config.update("jax_log_compiles", False)
    assert short == long
    assert short[0] < 12


def test_the_host_looks_once_per_chunk(monkeypatch):
    looks = []
    monkeypatch.setattr(Progress, "update", lambda self, done, fields: looks.append(done))
    run(num_steps=6000)
    assert looks[-1] == 6000
    assert 6000 / MAX_CHUNK < len(looks) < 100


def test_result_names_the_device_and_is_json(plain):
    assert plain.info["device"] == jax.devices()[0].device_kind
    assert plain.info["seconds"].keys() == {"compile", "run", "total"}
    assert json.loads(json.dumps(plain.config)) == plain.config
    assert json.loads(json.dumps(plain.info)) == plain.info


# --- optimisers and objectives --------------------------------------------------------------------


def test_any_optimizer():
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.rmsprop(optax.cosine_decay_schedule(0.02, 200), momentum=0.9),
    )
    result = run(optimizer=optimizer, num_steps=200)
    assert result.elbo[0, -50:].mean() > result.elbo[0, :10].mean()


def test_parameters_are_frozen_by_configuration_and_seeds_start_differently():
    optimizer = optax.partition(
        {"free": optax.adam(0.01), "frozen": optax.set_to_zero()},
        {"slope": "frozen", "weights": "free", "scale": "frozen"},
    )
    settings = {"optimizer": optimizer, "num_seeds": 3, "batch_size": None}
    params = run(**settings, init={"scale": 2.0, "weights": np.zeros(3)}).params
    np.testing.assert_allclose(params["scale"], [2.0] * 3, rtol=1e-6)
    assert (abs(np.asarray(params["weights"])) > 1e-3).all()
    assert len(np.unique(params["slope"])) == 3  # frozen where each seed started
    assert len(np.unique(params["weights"])) == 9


@pytest.mark.parametrize(
    "objective",
    [
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.5, num_particles=3),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_any_objective(objective):
    batch_size = 20 if isinstance(objective, RenyiELBO) else None
    settings = {"num_steps": 300, "optimizer": optax.adam(0.02), "batch_size": batch_size}
    result = run(objective=objective, **settings)
    assert result.elbo[0, -50:].mean() > result.elbo[0, :10].mean()


# --- seeds ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits(plain):
    assert_same_bits(run(), plain)


def test_each_seed_equals_the_run_with_that_seed_alone():
    together = run(seed=3, num_seeds=2)
    assert together.seeds == [3, 4]
    alone = run(seed=4)
    np.testing.assert_allclose(together.elbo[1], alone.elbo[0], rtol=2e-6)
    for name, value in together.params.items():
        np.testing.assert_allclose(value[1], alone.params[name][0], rtol=2e-5, atol=1e-6)
    assert not np.array_equal(*together.elbo)


# --- held-out data --------------------------------------------------------------------------------
#
# A model of one number, loc, that climbs from where a seed starts towards the mean of the
# training data, and on the way passes the mean of the held-out data.


def climbing_model(x):
    loc = numpyro.param("loc", lambda key: 0.1 * jax.random.normal(key))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def climb(**settings):
    settings = {
        "num_steps": 200,
        "optimizer": optax.sgd(0.02),
        "validation": {"x": np.full(7, 0.5, np.float32)},
        "validate_every": 1,
        "progress": False,
    } | settings
    return fit(climbing_model, no_latents, {"x": np.ones(20, np.float32)}, **settings)


def test_early_stopping_keeps_the_best_parameters_of_each_seed():
    result = climb(patience=5, num_seeds=3)
    for i in range(3):
        loc, steps = float(result.params["loc"][i]), result.info["num_steps"][i]
        evaluations = result.validation_elbo[i]
        best = int(np.nanargmax(evaluations))
        assert steps == best + 1 + 5 < 200
        assert abs(loc - 0.5) < 0.02  # one step of the climb is 0.02 * 0.5
        held_out = -0.5 * (0.5 - loc) ** 2 - 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(held_out, evaluations[best], rtol=1e-5)
        assert np.isnan(result.elbo[i, steps:]).all()
        assert np.isfinite(result.elbo[i, :steps]).all()
    assert len(set(result.info["num_steps"])) > 1


def test_without_patience_validation_watches_and_counts_each_datum_once_whatever_the_batch():
    held_out = {"x": RNG.normal(size=11).astype(np.float32)}
    result = climb(batch_size=4, validation=held_out, validate_every=40)
    loc = float(result.params["loc"][0])  # the last one
    assert abs(loc - 1) < 0.05
    assert result.info["validation_steps"] == [40, 80, 120, 160, 200]
    assert result.validation_elbo.shape == (1, 5)
    exact = np.mean(-0.5 * (held_out["x"] - loc) ** 2) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(result.validation_elbo[0, -1], exact, rtol=1e-5)


def test_a_fraction_of_the_data_is_held_out():
    data = {"x": np.arange(40, dtype=np.float32)}
    settings = {"num_steps": 1, "optimizer": optax.sgd(0.0), "progress": False}
    result = fit(climbing_model, no_latents, data, validation=0.25, num_seeds=2, **settings)
    held_out = result.info["validation_indices"]
    assert len(held_out) == len(set(held_out)) == 10
    assert result.config["num_data"] == 30
    kept = np.setdiff1d(np.arange(40), held_out)
    loc = np.asarray(result.params["loc"])[:, None]

    def exact(rows):
        return np.mean(-0.5 * (data["x"][rows] - loc) ** 2, axis=1) - 0.5 * np.log(2 * np.pi)

    np.testing.assert_allclose(result.validation_elbo[:, 0], exact(held_out), rtol=1e-5)
    np.testing.assert_allclose(result.elbo[:, 0], exact(kept), rtol=1e-5)


def test_early_stopping_follows_the_objective_it_is_given():
    """The climb's own held-out ELBO is best at 0.5; minus it, at one of the ends."""

    class Opposite(ELBO):
        def loss(self, *args, **kwargs):
            return -Trace_ELBO().loss(*args, **kwargs)

    result = climb(patience=3, validation_objective=Opposite())
    assert result.info["num_steps"] == [4]
    loc = float(result.params["loc"][0])  # after the first step
    assert abs(loc) < 0.4
    expected = 0.5 * (0.5 - loc) ** 2 + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(result.validation_elbo[0, 0], expected, rtol=1e-5)
    assert (np.diff(result.validation_elbo[0, :4]) < 0).all()


def test_held_out_data_are_prepared_once_or_given_as_the_programs_take_them():
    pairs = {"pair": np.stack([DATA["c"], DATA["x"]], axis=1)}

    def split(key, batch):
        return {"c": batch["pair"][:, 0], "x": batch["pair"][:, 1]}

    settings = {"preprocess": split, "num_steps": 3, "progress": False}
    elbos = [
        fit(model, guide, pairs, validation=validation, **settings).validation_elbo
        for validation in (pairs, Prepared(DATA))
    ]
    assert np.isfinite(elbos[0]).all()
    np.testing.assert_array_equal(*elbos)
    with pytest.raises(ValueError, match=r"expected arrays \['c', 'x'\], got \['pair'\]"):
        fit(model, guide, pairs, validation=Prepared(pairs), **settings)


# --- losses that are not finite -------------------------------------------------------------------


def exploding_model(x):
    """A model whose log density is infinite for the data equal to 7."""
    loc = numpyro.param("loc", lambda key: jax.random.normal(key))
    with numpyro.plate("rows", len(x)):
        numpyro.factor("f", -0.5 * (x - loc) ** 2 / (x != 7))


def explode(bad, **settings):
    data = np.ones(64, np.float32)
    data[:bad] = 7
    settings = {"num_steps": 32, "batch_size": 4, "optimizer": optax.sgd(0.1)} | settings
    return fit(exploding_model, no_latents, {"x": data}, progress=False, **settings)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_seed_step_and_elbo():
    with pytest.raises(NonFiniteError, match=r"seed \d+, step \d+: expected a finite") as caught:
        explode(bad=1, seed=5, num_seeds=3)
    error = caught.value
    row = error.fit.elbo[error.seed - 5]
    assert np.isfinite(row[: error.step - 1]).all()
    assert np.isnan(row[error.step - 1 :]).all()
    assert error.last_elbo == row[error.step - 2]
    assert error.fault == "model site 'f': log density"
    before = explode(bad=1, num_steps=error.step - 1, seed=5, num_seeds=3)
    np.testing.assert_array_equal(error.fit.params["loc"], before.params["loc"])


def test_a_gradient_that_is_not_finite_stops_the_run_at_its_step():
    """The loss is finite everywhere, its gradient is not: sqrt at zero."""

    def cornered_model(x):
        loc = numpyro.param("loc", lambda key: jax.random.normal(key))
        with numpyro.plate("rows", len(x)):
            root = jnp.sqrt(jnp.where(x == 7, 0 * loc, 1.0))
            numpyro.factor("f", -0.5 * (x - loc) ** 2 - root)

    data = {"x": np.concatenate([np.full(1, 7, np.float32), np.ones(63, np.float32)])}
    settings = {"batch_size": 4, "optimizer": optax.sgd(0.1), "progress": False}
    settings |= {"num_seeds": 2, "seed": 2}
    with pytest.raises(NonFiniteError) as caught:
        fit(cornered_model, no_latents, data, num_steps=32, **settings)
    error = caught.value
    step = error.step
    assert error.fault == "gradient of parameter 'loc'"
    assert np.isfinite(error.fit.params["loc"]).all()
    assert np.isfinite(error.fit.elbo[:, : step - 1]).all()
    assert np.isnan(error.fit.elbo[:, step - 1 :]).all()
    assert step > 1
    before = fit(cornered_model, no_latents, data, num_steps=step - 1, **settings)
    np.testing.assert_array_equal(error.fit.params["loc"], before.params["loc"])


def test_a_bad_gradient_at_the_last_step_names_the_seed_it_happened_to():
    def fragile_model(x):
        loc = numpyro.param("loc", lambda key: jax.random.normal(key))
        with numpyro.plate("rows", len(x)):
            # finite for every loc; the gradient is not, where loc is above 0.5
            root = jnp.sqrt(jnp.where(loc > 0.5, 0 * loc, 1.0))
            numpyro.factor("f", -0.5 * (x - loc) ** 2 - root)

    data = {"x": np.zeros(4, np.float32)}
    settings = {"num_steps": 1, "num_seeds": 8, "optimizer": optax.sgd(0.1), "progress": False}
    with pytest.raises(NonFiniteError) as caught:
        fit(fragile_model, no_latents, data, **settings)
    assert caught.value.step == 1
    first_bad = int(np.argmax(np.asarray(caught.value.fit.params["loc"]) > 0.5))
    assert first_bad > 0
    assert caught.value.seed == first_bad


def test_the_first_site_that_is_not_finite_is_named():
    def breaking_model(c, x=None):
        slope = numpyro.param("slope", 0.5)
        with numpyro.plate("rows", len(c)):
            z = numpyro.sample("z", dist.Normal(slope * c, 1.0))
            numpyro.sample("x", dist.Normal(jnp.log(z - 100), 1.0), obs=x)

    with pytest.raises(NonFiniteError, match="first: model site 'x': log density") as caught:
        fit(breaking_model, guide, DATA, num_steps=5, progress=False)
    assert caught.value.fault == "model site 'x': log density"


def test_the_first_parameter_that_is_not_finite_is_named():
    def lost_model(x):
        loc = numpyro.param("loc", np.nan)
        with numpyro.plate("rows", len(x)):
            numpyro.factor("f", x - loc)

    with pytest.raises(NonFiniteError, match="first: parameter 'loc'"):
        fit(lost_model, no_latents, {"x": np.ones(4, np.float32)}, num_steps=5, progress=False)


def test_skipping_counts_and_reports():
    with pytest.warns(RuntimeWarning, match=r"skipped steps.*\{0: \d+, 1: \d+\} of 32"):
        result = explode(bad=2, on_nan="skip", num_seeds=2)
    assert np.isfinite(result.params["loc"]).all()
    for i in range(2):
        # Two bad data in two epochs of 16 batches: at least one, at most four steps are lost.
        assert 2 <= result.info["num_skipped"][i] <= 4
        assert np.isnan(result.elbo[i]).sum() == result.info["num_skipped"][i]


def test_a_run_in_which_every_step_is_skipped_is_an_error():
    with pytest.raises(NonFiniteError):
        explode(bad=64, on_nan="skip")


# --- scale ----------------------------------------------------------------------------------------


def hierarchical_model(x):
    """A global latent mean m, and a latent of its own for every datum."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(m, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchical_guide(x):
    loc = numpyro.param("m_loc", 0.3)
    numpyro.sample("m", dist.Normal(loc, 0.2))
    weight = numpyro.param("weight", 0.4)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(weight * x, 0.8))


def exact_hierarchical_elbo(x):
    """E_q log p - log q per datum, term by term: every expectation is of a quadratic.

    Returns:
        The local terms, and the divergence of the global site.
    """
    m_loc, m_var, z_loc, z_var = 0.3, 0.2**2, 0.4 * x, 0.8**2
    log_2pi = np.log(2 * np.pi)
    kl_m = 0.5 * (m_loc**2 + m_var - 1 - np.log(m_var))
    log_z = -0.5 * ((z_loc - m_loc) ** 2 + z_var + m_var + log_2pi)
    log_x = -0.5 * ((x - z_loc) ** 2 + z_var + log_2pi)
    entropy = 0.5 * (1 + log_2pi + np.log(z_var))
    return np.mean(log_z + log_x + entropy), kl_m


def test_the_expected_elbo_with_global_latents_is_that_of_all_data_though_batches_are_small():
    x = np.linspace(-1, 2, 20).astype(np.float32)
    result = fit(
        hierarchical_model,
        hierarchical_guide,
        {"x": x},
        batch_size=2,
        num_steps=4000,
        optimizer=optax.sgd(0.0),
        progress=False,
    )
    elbo = result.elbo[0]
    error = elbo.std() / np.sqrt(len(elbo))
    local, divergence = exact_hierarchical_elbo(x)
    assert abs(elbo.mean() - (local - divergence / 20)) < 4 * error
    # The global latent's share alone is 1.2 nats / 20 data: many errors, were it counted wrongly.
    assert 4 * error < 0.03


def test_an_objective_that_weighs_whole_data_sets_refuses_batches_with_globals():
    programs, x = (hierarchical_model, hierarchical_guide), np.ones(20, np.float32)
    settings = {"num_steps": 1, "progress": False}
    with pytest.raises(ValueError, match="expected batch_size 20, got 5"):
        fit(*programs, {"x": x}, objective=RenyiELBO(), batch_size=5, **settings)
    with pytest.raises(ValueError, match="expected at most 20 validation data, a batch, got 21"):
        fit(
            *programs,
            {"x": x},
            validation={"x": np.ones(21, np.float32)},
            validation_objective=RenyiELBO(),
            **settings,
        )


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_one_device_and_eight_agree_to_rounding():
    shardings = []

    def spying_model(c, x=None):
        jax.debug.inspect_array_sharding(c, callback=shardings.append)
        model(c, x)

    settings = {"num_steps": 100, "num_seeds": 2, "batch_size": 24, "progress": False}
    one = run(**settings)
    eight = fit(spying_model, guide, DATA, mesh=jax.make_mesh((8,), ("data",)), **settings)
    np.testing.assert_allclose(eight.elbo, one.elbo, rtol=1e-5)
    for name, value in one.params.items():
        np.testing.assert_allclose(eight.params[name], value, rtol=1e-4, atol=1e-6)
    # every batch is split
    assert any(len(s.device_set) == 8 and not s.is_fully_replicated for s in shardings)
