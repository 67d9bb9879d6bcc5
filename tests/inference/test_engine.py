"""The engine's promises, one test each."""

import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.elbo import ELBO

from inference import CheckpointError, NonFiniteError, engine, fit
from inference.loop import MAX_CHUNK
from inference.objectives import PerDatum
from inference.settings import _require_whole

RNG = np.random.default_rng(0)
C = RNG.normal(size=120).astype(np.float32)
DATA = {"c": C, "x": (1 + C + RNG.normal(size=120) * 2**0.5).astype(np.float32)}


def model(c, x=None):
    slope = numpyro.param("slope", lambda key: jax.random.normal(key))
    with numpyro.plate("data", len(c)):
        z = numpyro.sample("z", dist.Normal(slope * c, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(c, x):
    weights = numpyro.param("weights", lambda key: 0.1 * jax.random.normal(key, (3,)))
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", len(c)):
        loc = weights[0] * x + weights[1] * c + weights[2]
        numpyro.sample("z", dist.Normal(loc, scale))


def run(data=DATA, **settings):
    settings = {"num_steps": 40, "batch_size": 16, "progress": False} | settings
    return fit(model, guide, data, **settings)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    np.testing.assert_array_equal(a.elbo, b.elbo)
    if a.validation_elbo is not None or b.validation_elbo is not None:
        np.testing.assert_array_equal(a.validation_elbo, b.validation_elbo)


# A model whose parameters count: with plain gradient descent at rate B, every visit of datum i
# adds one to ``visits[i]``.


def counting_model(num_data):
    def program(i):
        visits = numpyro.param("visits", jnp.zeros(num_data))
        with numpyro.plate("data", len(i)):
            numpyro.factor("count", visits[i])

    return program


def no_latents(**data):
    pass


def visits(num_data, batch_size, **settings):
    result = fit(
        counting_model(num_data),
        no_latents,
        {"i": np.arange(num_data)},
        batch_size=batch_size,
        optimizer=optax.sgd(float(batch_size)),
        progress=False,
        **settings,
    )
    return np.asarray(result.params["visits"]).round().astype(int), result


@pytest.mark.parametrize(("num_data", "batch_size"), [(12, 4), (13, 4), (5, 5), (7, 6), (1, 1)])
def test_epochs_visit_every_datum_equally_often(num_data, batch_size):
    for num_steps in (num_data, 3 * num_data):  # num_data steps are batch_size whole epochs
        counted, _ = visits(num_data, batch_size, num_steps=num_steps)
        np.testing.assert_array_equal(counted[0], num_steps * batch_size // num_data)


def test_data_are_drawn_without_replacement_within_an_epoch():
    for num_steps in (1, 2, 3):
        counted, _ = visits(13, 4, num_steps=num_steps, num_seeds=5)
        assert counted.max() == 1
        np.testing.assert_array_equal(counted.sum(1), 4 * num_steps)


def test_order_differs_between_seeds_and_between_epochs():
    counted, _ = visits(40, 10, num_steps=1, num_seeds=4)
    assert len({tuple(c) for c in counted}) == 4
    fifth, _ = visits(40, 10, num_steps=5, num_seeds=4)
    assert not np.array_equal(fifth - 1, counted)


def test_num_epochs_covers_the_data():
    _, result = visits(13, 4, num_epochs=2)
    assert result.elbo.shape == (1, 7)
    assert result.config["num_steps"] == 7


def test_programs_are_traced_equally_often_however_long_the_run():
    calls = []

    def counted_model(c, x=None):
        calls.append(1)
        model(c, x)

    traces = []
    for num_steps in (3, 3000):
        calls.clear()
        fit(counted_model, guide, DATA, num_steps=num_steps, batch_size=16, progress=False)
        traces.append(len(calls))
    assert traces[0] == traces[1] < 10


def test_the_loop_is_compiled_once(caplog):
    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        run(num_steps=5000)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert sum("jit(advance)" in message for message in compiled) == 1


def test_the_host_looks_once_per_chunk(monkeypatch):
    looks = []
    monkeypatch.setattr(engine, "_report", lambda bar, step, *rest: looks.append(step))
    run(num_steps=6000)
    assert looks[-1] == 6000
    assert 6000 / MAX_CHUNK < len(looks) < 100


def test_data_keep_their_type_and_are_prepared_on_the_device_at_every_step():
    images = RNG.integers(0, 256, (30, 4), dtype=np.uint8)
    seen = []

    def prepare(key, batch):
        seen.append((batch["x"].dtype, isinstance(batch["x"], jax.core.Tracer)))
        noise = jax.random.uniform(key, batch["x"].shape)
        return {"x": batch["x"] / 255 + noise}

    def constant_model(x):
        loc = numpyro.param("loc", jnp.zeros(4))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    result = fit(
        constant_model,
        no_latents,
        {"x": images},
        num_steps=30,
        optimizer=optax.sgd(0.0),
        preprocess=prepare,
        progress=False,
    )
    assert seen
    assert all(dtype == jnp.uint8 and traced for dtype, traced in seen)
    assert len(np.unique(result.elbo)) == 30  # new noise at every step, the same data


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.01),
        optax.adamw(optax.cosine_decay_schedule(0.01, 40)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.01, momentum=0.9)),
        optax.partition(
            {"free": optax.adam(0.01), "frozen": optax.set_to_zero()},
            {"slope": "free", "weights": "free", "scale": "frozen"},
        ),
    ],
    ids=["sgd", "adamw", "chain", "partition"],
)
def test_any_optimizer(optimizer):
    result = run(optimizer=optimizer, num_steps=200)
    assert result.elbo[0, -50:].mean() > result.elbo[0, :10].mean()


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=2, vectorize_particles=False),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.5, num_particles=3),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_any_objective(objective):
    result = run(objective=objective, num_steps=300, optimizer=optax.adam(0.02))
    assert result.elbo[0, -50:].mean() > result.elbo[0, :10].mean()


def test_parameters_are_frozen_by_configuration():
    optimizer = optax.partition(
        {"free": optax.adam(0.01), "frozen": optax.set_to_zero()},
        {"slope": "frozen", "weights": "free", "scale": "free"},
    )
    start, end = run(num_steps=1, optimizer=optax.sgd(0.0)), run(optimizer=optimizer)
    np.testing.assert_array_equal(start.params["slope"], end.params["slope"])
    assert not np.array_equal(start.params["weights"], end.params["weights"])


def test_the_same_seed_gives_the_same_bits():
    assert_same_bits(run(num_seeds=2), run(num_seeds=2))
    assert not np.array_equal(run().elbo, run(seed=1).elbo)


def test_each_seed_equals_the_run_with_that_seed_alone():
    together = run(seed=3, num_seeds=3, num_steps=60)
    for i in range(3):
        alone = run(seed=3 + i, num_steps=60)
        np.testing.assert_allclose(together.elbo[i], alone.elbo[0], rtol=2e-6)
        for name, value in together.params.items():
            np.testing.assert_allclose(value[i], alone.params[name][0], rtol=2e-5, atol=1e-6)


def test_seeds_start_differently():
    start = run(num_seeds=3, num_steps=1, optimizer=optax.sgd(0.0))
    assert len(np.unique(start.params["slope"])) == 3
    assert len(np.unique(start.params["weights"])) == 9


def test_init_params_are_where_the_run_starts():
    start = {"slope": 0.25, "scale": 3.0}
    result = run(num_steps=1, optimizer=optax.sgd(0.0), init_params=start)
    np.testing.assert_allclose(result.params["slope"], 0.25)
    np.testing.assert_allclose(result.params["scale"], 3.0, rtol=1e-6)


def test_average_is_the_mean_over_the_tail():
    averaged = run(num_steps=10, average=0.3)
    iterates = [run(num_steps=n).params for n in (8, 9, 10)]
    for name in ("slope", "weights"):
        mean = np.mean([np.asarray(p[name]) for p in iterates], axis=0)
        np.testing.assert_allclose(averaged.params[name], mean, rtol=1e-6, atol=1e-7)
    log_scales = [np.log(np.asarray(p["scale"])) for p in iterates]  # in unconstrained space
    np.testing.assert_allclose(np.log(averaged.params["scale"]), np.mean(log_scales, 0), atol=1e-6)


# A model of one number, loc, that climbs from where a seed starts towards the mean of the
# training data, and on the way passes the mean of the held-out data.


def climbing_model(x):
    loc = numpyro.param("loc", lambda key: 0.1 * jax.random.normal(key))
    with numpyro.plate("data", len(x)):
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


def test_early_stopped_seed_equals_the_run_alone():
    together = climb(patience=5, num_seeds=3)
    for i in range(3):
        alone = climb(patience=5, seed=i)
        np.testing.assert_allclose(together.params["loc"][i], alone.params["loc"][0], rtol=1e-6)
        assert together.info["num_steps"][i] == alone.info["num_steps"][0]


def test_validation_without_patience_watches_and_returns_the_last_parameters():
    result = climb(validate_every=30)
    assert abs(float(result.params["loc"][0]) - 1) < 0.05
    assert result.info["validation_steps"] == [30, 60, 90, 120, 150, 180]
    assert result.validation_elbo.shape == (1, 6)


def test_held_out_elbo_counts_each_datum_once_whatever_the_batch():
    held_out = {"x": RNG.normal(size=11).astype(np.float32)}
    elbos = [
        climb(num_steps=1, batch_size=batch_size, validation=held_out, optimizer=optax.sgd(0.0))
        for batch_size in (1, 4, 20)
    ]
    loc = float(elbos[0].params["loc"][0])
    exact = np.mean(-0.5 * (held_out["x"] - loc) ** 2) - 0.5 * np.log(2 * np.pi)
    for result in elbos:
        np.testing.assert_allclose(result.validation_elbo, exact, rtol=1e-5)


def test_another_objective_may_judge_the_held_out_data():
    """The importance-weighted bound of many draws is the likelihood, which here is a formula."""
    held_out = {name: array[:50] for name, array in DATA.items()}
    settings = {"validation": held_out, "num_steps": 1, "optimizer": optax.sgd(0.0)}
    judge = RenyiELBO(alpha=0, num_particles=4000)
    judged, plain = run(**settings, validation_objective=judge), run(**settings)
    np.testing.assert_array_equal(judged.elbo, plain.elbo)
    error = held_out["x"] - judged.params["slope"][0] * held_out["c"]
    exact = np.mean(-0.5 * error**2 / 2 - 0.5 * np.log(4 * np.pi))
    gap = exact - judged.validation_elbo[0, 0]
    # The weights' relative variance is that of a Gaussian proposal for a Gaussian target.
    weights = relative_variance_of_weights(judged, held_out)
    assert abs(gap) < (weights / 2 / 4000).mean() + 4.5 * np.sqrt(weights.sum() / 4000) / 50
    assert exact - plain.validation_elbo[0, 0] > 10 * abs(gap)
    assert "RenyiELBO(alpha=0, num_particles=4000" in judged.config["validation_objective"]


def relative_variance_of_weights(result, data):
    """E_q[w^2] / E_q[w]^2 - 1 by a sum over a grid of z."""
    w, slope = result.params["weights"][0], result.params["slope"][0]
    z = np.linspace(-15, 15, 20_001)[:, None]
    normal = lambda z, loc, scale: np.exp(-0.5 * ((z - loc) / scale) ** 2) / scale  # noqa: E731
    q = normal(z, w[0] * data["x"] + w[1] * data["c"] + w[2], result.params["scale"][0])
    p = normal(z, slope * data["c"], 1.0) * normal(data["x"], z, 1.0)
    ratio = np.divide(p**2, q, out=np.zeros_like(p), where=q > 0)
    return (ratio.sum(0) * q.sum(0)) / p.sum(0) ** 2 - 1


def test_early_stopping_follows_the_objective_it_is_given():
    """The climb's own held-out ELBO is best at 0.5; minus it, at one of the ends."""

    class Opposite(ELBO):
        def loss(self, *args, **kwargs):
            return -Trace_ELBO().loss(*args, **kwargs)

    result = climb(patience=3, validation_objective=Opposite())
    assert result.info["num_steps"] == [4]
    assert abs(float(result.params["loc"][0])) < 0.4
    np.testing.assert_allclose(
        result.validation_elbo[:, :4], -climb(patience=3).validation_elbo[:, :4], rtol=1e-6
    )


def test_held_out_data_have_the_arrays_that_preprocess_makes():
    pairs = {"pair": np.stack([DATA["c"], DATA["x"]], axis=1)}

    def split(key, batch):
        return {"c": batch["pair"][:, 0], "x": batch["pair"][:, 1]}

    result = fit(
        model, guide, pairs, preprocess=split, validation=DATA, num_steps=3, progress=False
    )
    assert np.isfinite(result.validation_elbo).all()
    with pytest.raises(ValueError, match=r"expected arrays \['c', 'x'\], got \['pair'\]"):
        fit(model, guide, pairs, preprocess=split, validation=pairs, num_steps=3, progress=False)


# --- checkpoints ----------------------------------------------------------------------------------

SETTINGS = {
    "num_steps": 3000,
    "num_seeds": 2,
    "average": 0.5,
    "validation": {name: array[:30] for name, array in DATA.items()},
    "validate_every": 100,
    "patience": 1000,
    "checkpoint_every": 0.0,
}

SCRIPT = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("test_engine", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
result = tests.run(checkpoint=sys.argv[2], **tests.SETTINGS)
np.savez(sys.argv[3], elbo=result.elbo, validation=result.validation_elbo, **result.params)
"""


def test_killed_and_resumed_equals_uninterrupted_in_any_process(tmp_path):
    directory, output = str(tmp_path / "checkpoints"), str(tmp_path / "result.npz")
    command = [sys.executable, "-c", SCRIPT, __file__, directory, output]
    # Strings hash differently in every process, and some sums follow the order of sets.
    process = subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": "1"})
    while not list((tmp_path / "checkpoints").glob("[0-9]*[0-9]")):  # none is whole yet
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(output)
    saved = max(int(p) for p in os.listdir(directory) if p.isdecimal())
    assert 0 < saved < SETTINGS["num_steps"]

    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "4"})
    resumed = np.load(output)
    whole = run(**SETTINGS)
    np.testing.assert_array_equal(resumed["elbo"], whole.elbo)
    np.testing.assert_array_equal(resumed["validation"], whole.validation_elbo)
    for name, value in whole.params.items():
        np.testing.assert_array_equal(resumed[name], value)


def test_a_finished_run_is_read_back_without_training(tmp_path):
    first = run(checkpoint=tmp_path / "c")
    second = run(checkpoint=tmp_path / "c")
    assert_same_bits(first, second)
    assert second.info["seconds"]["run"] == first.info["seconds"]["run"] > 0


def test_a_half_written_checkpoint_is_not_read(tmp_path):
    whole = run(checkpoint=tmp_path / "c")
    half = tmp_path / "c" / "100.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    (half / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert_same_bits(run(checkpoint=tmp_path / "c"), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size was 16 there and is 8 here"),
        ({"optimizer": optax.adam(0.002)}, r"optimizer\.\S+ was -0.001 there and is -0.002 here"),
        ({"objective": Trace_ELBO(num_particles=2)}, "num_particles=1.*num_particles=2"),
        (
            {"validation": DATA, "validation_objective": RenyiELBO(0, num_particles=3)},
            "validation_objective was None there and is 'RenyiELBO",
        ),
        ({"data": {"c": C, "x": DATA["x"] + 1}}, r"data\.x was"),
        ({"seed": 1}, "seed was 0 there and is 1 here"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, change, message):
    run(checkpoint=tmp_path / "c")
    before = sorted(p.name for p in (tmp_path / "c").rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        run(checkpoint=tmp_path / "c", **change)
    assert sorted(p.name for p in (tmp_path / "c").rglob("*")) == before


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    def other_model(c, x=None):
        slope = numpyro.param("slope", lambda key: jax.random.normal(key))
        with numpyro.plate("data", len(c)):
            z = numpyro.sample("z", dist.Normal(slope * c, 2.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    settings = {"num_steps": 5, "batch_size": 16, "progress": False}
    other_model.__module__, other_model.__qualname__ = model.__module__, model.__qualname__
    fit(model, guide, DATA, checkpoint=tmp_path / "c", **settings)
    with pytest.raises(CheckpointError, match="compiled program differs"):
        fit(other_model, guide, DATA, checkpoint=tmp_path / "c", **settings)


def test_a_directory_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"found 'notes\.txt' in it"):
        run(checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="it is a file"):
        run(checkpoint=tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# --- losses that are not finite -------------------------------------------------------------------


def exploding_model(x):
    """A model whose log density is infinite for the data equal to 7."""
    loc = numpyro.param("loc", lambda key: jax.random.normal(key))
    with numpyro.plate("data", len(x)):
        numpyro.factor("f", -0.5 * (x - loc) ** 2 / (x != 7))


def explode(bad, **settings):
    data = np.ones(64, np.float32)
    data[:bad] = 7
    return fit(
        exploding_model,
        no_latents,
        {"x": data},
        batch_size=4,
        num_steps=32,
        optimizer=optax.sgd(0.1),
        progress=False,
        **settings,
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_names_seed_step_and_elbo():
    with pytest.raises(NonFiniteError, match=r"seed \d+, step \d+: expected a finite") as caught:
        explode(bad=1, seed=5, num_seeds=3)
    error = caught.value
    row = error.fit.elbo[error.seed - 5]
    assert np.isfinite(row[: error.step - 1]).all()
    assert np.isnan(row[error.step - 1 :]).all()
    assert error.last_elbo == row[error.step - 2]
    before = fit(
        exploding_model,
        no_latents,
        {"x": np.concatenate([np.full(1, 7, np.float32), np.ones(63, np.float32)])},
        batch_size=4,
        num_steps=error.step - 1,
        optimizer=optax.sgd(0.1),
        seed=error.seed,
        progress=False,
    )
    np.testing.assert_array_equal(error.fit.params["loc"][error.seed - 5], before.params["loc"][0])


def test_a_gradient_that_is_not_finite_stops_the_run_at_its_step():
    """The loss is finite everywhere, its gradient is not: sqrt at zero."""

    def cornered_model(x):
        loc = numpyro.param("loc", lambda key: jax.random.normal(key))
        with numpyro.plate("data", len(x)):
            numpyro.factor("f", -0.5 * (x - loc) ** 2 - jnp.where(x == 7, jnp.sqrt(0 * loc), 0.0))

    data = {"x": np.concatenate([np.full(1, 7, np.float32), np.ones(63, np.float32)])}
    settings = {"batch_size": 4, "optimizer": optax.sgd(0.1), "progress": False}
    with pytest.raises(NonFiniteError) as caught:
        fit(cornered_model, no_latents, data, num_steps=32, num_seeds=2, **settings)
    error = caught.value
    seed, step = error.seed, error.step
    assert np.isfinite(error.fit.params["loc"]).all()
    assert np.isfinite(error.fit.elbo[:, : step - 1]).all()
    assert np.isnan(error.fit.elbo[:, step - 1 :]).all()
    if step > 1:
        before = fit(cornered_model, no_latents, data, num_steps=step - 1, seed=seed, **settings)
        np.testing.assert_array_equal(error.fit.params["loc"][seed], before.params["loc"][0])
    with pytest.raises(NonFiniteError) as caught:
        fit(cornered_model, no_latents, data, num_steps=step, seed=seed, **settings)
    assert caught.value.step == step


def test_a_bad_gradient_at_the_last_step_names_the_seed_it_happened_to():
    def fragile_model(x):
        loc = numpyro.param("loc", lambda key: jax.random.normal(key))
        with numpyro.plate("data", len(x)):
            # finite for every loc; the gradient is not, where loc is above 0.5
            root = jnp.sqrt(jnp.where(loc > 0.5, 0 * loc, 1.0))
            numpyro.factor("f", -0.5 * (x - loc) ** 2 - root)

    data, starts = {"x": np.zeros(4, np.float32)}, {"num_steps": 1, "progress": False}
    located = fit(
        climbing_model, no_latents, data, num_seeds=8, optimizer=optax.sgd(0.0), **starts
    ).params["loc"]
    with pytest.raises(NonFiniteError) as caught:
        fit(fragile_model, no_latents, data, num_seeds=8, optimizer=optax.sgd(0.1), **starts)
    assert caught.value.step == 1
    first_bad = int(np.argmax(np.asarray(located) * 10 > 0.5))  # it starts at a tenth of these
    assert first_bad > 0
    assert caught.value.seed == first_bad


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


# --- scale, devices, progress ---------------------------------------------------------------------


def hierarchical_model(x):
    """A global latent mean m, and a latent of its own for every datum."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(m, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hierarchical_guide(x):
    loc = numpyro.param("m_loc", 0.3)
    numpyro.sample("m", dist.Normal(loc, 0.2))
    weight = numpyro.param("weight", 0.4)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(weight * x, 0.8))


def exact_hierarchical_elbo(x):
    """E_q log p - log q per datum, term by term: every expectation is of a quadratic."""
    m_loc, m_var, z_loc, z_var = 0.3, 0.2**2, 0.4 * x, 0.8**2
    log_2pi = np.log(2 * np.pi)
    kl_m = 0.5 * (m_loc**2 + m_var - 1 - np.log(m_var))
    log_z = -0.5 * ((z_loc - m_loc) ** 2 + z_var + m_var + log_2pi)
    log_x = -0.5 * ((x - z_loc) ** 2 + z_var + log_2pi)
    entropy = 0.5 * (1 + log_2pi + np.log(z_var))
    return np.mean(log_z + log_x + entropy) - kl_m / len(x)


@pytest.mark.parametrize("batch_size", [2, 5, 20])
def test_expected_elbo_with_global_latents_does_not_depend_on_the_batch_size(batch_size):
    x = np.linspace(-1, 2, 20).astype(np.float32)
    result = fit(
        hierarchical_model,
        hierarchical_guide,
        {"x": x},
        batch_size=batch_size,
        num_steps=4000,
        optimizer=optax.sgd(0.0),
        progress=False,
    )
    elbo = result.elbo[0]
    error = elbo.std() / np.sqrt(len(elbo))
    assert abs(elbo.mean() - exact_hierarchical_elbo(x)) < 4 * error
    # The global latent's share alone is 1.2 nats / 20 data: many errors, were it counted wrongly.
    assert 4 * error < 0.03


def test_expected_elbo_does_not_depend_on_the_batch_size():
    results = [
        run(batch_size=b, num_steps=2400, optimizer=optax.sgd(0.0)).elbo[0] for b in (4, 120)
    ]
    error = np.hypot(*(e.std() / np.sqrt(len(e)) for e in results))
    assert abs(results[0].mean() - results[1].mean()) < 4 * error


def test_an_objective_that_weighs_whole_data_sets_refuses_batches_with_globals():
    x = np.ones(20, np.float32)
    with pytest.raises(ValueError, match="expected batch_size 20, got 5"):
        fit(
            hierarchical_model,
            hierarchical_guide,
            {"x": x},
            objective=RenyiELBO(),
            batch_size=5,
            num_steps=1,
            progress=False,
        )
    with pytest.raises(ValueError, match="expected at most 20 validation data, a batch, got 21"):
        fit(
            hierarchical_model,
            hierarchical_guide,
            {"x": x},
            validation={"x": np.ones(21, np.float32)},
            validation_objective=RenyiELBO(),
            num_steps=1,
            progress=False,
        )


def test_importance_weights_are_per_datum():
    """The objective of a batch is the mean of its data's objectives, not a joint one."""
    objective = PerDatum(RenyiELBO(num_particles=64), 8, has_globals=False)
    data = {name: jnp.asarray(array[:8]) for name, array in DATA.items()}
    params = {"slope": 0.0, "weights": jnp.array([0.1, 0.0, 0.0]), "scale": 1.5}
    keys = jax.random.split(jax.random.key(0), 300)
    whole = jax.vmap(lambda k: objective.loss(k, params, model, guide, **data))(keys)
    single = [
        jax.vmap(lambda k, d=d: objective.loss(k, params, model, guide, **d))(keys)
        for d in ({name: array[i : i + 1] for name, array in data.items()} for i in range(8))
    ]
    single = jnp.mean(jnp.stack(single), axis=0)
    error = jnp.sqrt((whole.var() + single.var()) / len(keys))
    assert abs(whole.mean() - single.mean()) < 4 * error


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("num_seeds", [1, 2])
def test_one_device_and_eight_agree_to_rounding(num_seeds):
    mesh = jax.make_mesh((8,), ("data",))
    one = run(num_steps=100, num_seeds=num_seeds)
    eight = run(num_steps=100, num_seeds=num_seeds, mesh=mesh)
    np.testing.assert_allclose(eight.elbo, one.elbo, rtol=1e-5)
    for name, value in one.params.items():
        np.testing.assert_allclose(eight.params[name], value, rtol=1e-4, atol=1e-6)
        assert len(eight.params[name].sharding.device_set) == 8
        assert eight.params[name].sharding.is_fully_replicated


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_batches_are_split_over_the_mesh():
    mesh = jax.make_mesh((8,), ("data",))
    shardings = []

    def spying_model(c, x=None):
        jax.debug.inspect_array_sharding(c, callback=shardings.append)
        model(c, x)

    fit(spying_model, guide, DATA, num_steps=2, batch_size=16, mesh=mesh, progress=False)
    assert any(len(s.device_set) == 8 and not s.is_fully_replicated for s in shardings)


def test_mesh_errors():
    if jax.device_count() >= 8:
        with pytest.raises(ValueError, match=r"multiple of the 8 devices.*got 20"):
            run(batch_size=20, mesh=jax.make_mesh((8,), ("data",)))
    with pytest.raises(ValueError, match=r'axis named "data", got \(\'batch\',\)'):
        run(mesh=jax.make_mesh((1,), ("batch",)))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_shows_epoch_elbo_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(num_steps=None, num_epochs=20, progress=True)
    text = terminal.getvalue()
    assert "elbo=-" in text
    assert "epoch=20/20" in text
    assert "150/150" in text


def test_progress_is_silent_without_a_terminal_or_when_off(monkeypatch, capfd):
    run(progress=True)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(progress=False)
    assert terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_result_names_the_device_and_is_json():
    result = run()
    assert result.info["device"] == jax.devices()[0].device_kind
    assert result.info["seconds"].keys() == {"compile", "run", "total"}
    assert json.loads(json.dumps(result.config)) == result.config
    assert json.loads(json.dumps(result.info)) == result.info


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_steps": None},
            "num_epochs, num_steps: expected exactly one of the two, got None and None",
        ),
        ({"num_epochs": 3}, "num_epochs, num_steps: expected exactly one"),
        ({"num_steps": 0}, "num_steps: expected a whole number from 1, got 0"),
        ({"num_seeds": 0}, "num_seeds: expected a whole number from 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number from 0, got -1"),
        ({"average": 1.0}, "average: expected a fraction.*got 1.0"),
        ({"on_nan": "ignore"}, 'on_nan: expected "stop" or "skip", got \'ignore\''),
        ({"objective": "elbo"}, "objective: expected a NumPyro ELBO object, got 'elbo'"),
        ({"optimizer": 0.1}, "optimizer: expected an Optax gradient transformation, got 0.1"),
        ({"batch_size": 121}, "batch_size: expected 1 to 120.*got 121"),
        ({"patience": 3}, "patience: expected validation data with it, got 3 alone"),
        (
            {"validation_objective": Trace_ELBO()},
            "validation_objective: expected validation data with it, got Trace_ELBO alone",
        ),
        (
            {"validation": DATA, "validation_objective": "elbo"},
            "validation_objective: expected a NumPyro ELBO object or None, got 'elbo'",
        ),
        ({"validation": {"x": C}}, r"validation: expected arrays \['c', 'x'\], got \['x'\]"),
        ({"validation": DATA, "patience": 0}, "patience: expected a whole number from 1, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        # without the tests' own check of types, which the user has not
        inspect.unwrap(fit)(
            model, guide, DATA, **{"num_steps": 5, "batch_size": 16, "progress": False} | settings
        )


@pytest.mark.parametrize("value", [2.5, True, "3", 0])
def test_whole_numbers(value):
    with pytest.raises(ValueError, match=f"n: expected a whole number from 1, got {value!r}"):
        inspect.unwrap(_require_whole)("n", value, 1)


def test_autoguides_work_where_the_latents_are_global():
    def regression(c, x=None):
        slope = numpyro.sample("slope", dist.Normal(0.0, 10.0))
        with numpyro.plate("data", len(c)):
            numpyro.sample("x", dist.Normal(slope * c, 1.0), obs=x)

    result = fit(
        regression,
        AutoNormal(regression),
        DATA,
        num_steps=1500,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 1500)),
        average=0.3,
        num_seeds=2,
        progress=False,
    )
    precision = np.sum(C**2) + 1 / 100
    # The exact posterior is N(mean, 1 / precision); averaged over 450 draws the noise is a
    # twentieth of its standard deviation.
    for loc, scale in zip(
        result.params["slope_auto_loc"], result.params["slope_auto_scale"], strict=True
    ):
        assert abs(loc - np.sum(C * DATA["x"]) / precision) < 0.3 * precision**-0.5
        assert abs(scale * precision**0.5 - 1) < 0.3
