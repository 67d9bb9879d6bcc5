"""Runs that stop and go on: killed, interrupted, made longer, continued from a fit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO

from inference import CheckpointError, Fit, Interrupted, fit
from inference._checkpoints import Checkpoints
from inference._progress import Progress

RNG = np.random.default_rng(0)
C = RNG.normal(size=120).astype(np.float32)
DATA = {"c": C, "x": (1 + C + RNG.normal(size=120) * 2**0.5).astype(np.float32)}
HELD_OUT = {name: array[:30] for name, array in DATA.items()}
SOURCE = [dict(zip(DATA, row, strict=True)) for row in zip(*DATA.values(), strict=True)]


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
    settings = {"num_steps": 40, "batch_size": 20, "progress": False} | settings
    return fit(model, guide, data, **settings)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    np.testing.assert_array_equal(a.elbo, b.elbo)
    if a.validation_elbo is not None or b.validation_elbo is not None:
        np.testing.assert_array_equal(a.validation_elbo, b.validation_elbo)


# --- stopped from outside -------------------------------------------------------------------------

LONG = {
    "num_steps": 4000,
    "num_seeds": 2,
    "average": 0.5,
    "validation": HELD_OUT,
    "validate_every": 250,
    "patience": 1000,
}


@pytest.fixture(scope="module")
def long_run():
    return run(**LONG)


SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(*sys.argv[1:3])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
data = getattr(tests, sys.argv[4])
tests.run(data, checkpoint=sys.argv[3], checkpoint_every=0.0, **tests.LONG)
"""


@pytest.mark.parametrize("data", ["DATA", pytest.param("SOURCE", marks=pytest.mark.slow)])
def test_killed_and_resumed_in_another_process_equals_uninterrupted(data, long_run, tmp_path):
    directory = tmp_path / "checkpoints"
    command = [sys.executable, "-c", SCRIPT, __name__, __file__, str(directory), data]
    # Strings hash differently in every process, and some sums follow the order of sets.
    process = subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": "1"})
    while not list(directory.glob("[0-9]*[0-9]")):  # none is whole yet
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = max(int(p) for p in os.listdir(directory) if p.isdecimal())
    assert 0 < saved < LONG["num_steps"]
    assert_same_bits(run(globals()[data], checkpoint=directory, **LONG), long_run)


@pytest.fixture
def on_update(monkeypatch):
    """Calls a function whenever a run shows its progress. Ctrl-C raises, as it does for a user."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(function):
        monkeypatch.setattr(Progress, "update", lambda self, done, fields: function(done))

    yield call
    signal.signal(signal.SIGINT, before)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted(**settings):
    """The fit of a run on which Ctrl-C comes."""
    try:
        run(**settings)
    except Interrupted as error:
        return error.fit
    except KeyboardInterrupt as error:  # it would end the tests
        pytest.fail(f"expected Interrupted, got {error!r}")
    return pytest.fail("expected Interrupted, got a run to the end")


def assert_interrupted_and_resumed(directory, whole, **settings):
    """A run on which Ctrl-C comes is saved as it stands, and goes on."""
    (steps,) = set(interrupted(checkpoint=directory, **LONG, **settings).info["num_steps"])
    assert max(int(p.name) for p in directory.iterdir()) == steps < LONG["num_steps"]
    assert_same_bits(run(checkpoint=directory, **LONG), whole)


def test_a_run_interrupted_while_the_device_computes_is_saved(on_update, long_run, tmp_path):
    timer = threading.Timer(0.002, press_ctrl_c)
    on_update(lambda done: timer.ident or timer.start())
    assert_interrupted_and_resumed(tmp_path / "c", long_run)
    timer.join()


def test_a_run_interrupted_while_a_checkpoint_is_written_is_saved(on_update, long_run, tmp_path):
    def press_when_half_written():
        while not list((tmp_path / "c").glob("*tmp*/state*/*")):
            time.sleep(0.0005)
        press_ctrl_c()

    thread = threading.Thread(target=press_when_half_written, daemon=True)
    on_update(lambda done: thread.ident or thread.start())
    assert_interrupted_and_resumed(tmp_path / "c", long_run, checkpoint_every=0.0)
    thread.join()


def test_an_interrupted_run_is_a_fit_to_go_on_with(on_update, whole):
    on_update(lambda done: press_ctrl_c() if done >= 15 else None)
    halfway = interrupted(num_steps=40, **WATCHED)
    assert issubclass(Interrupted, KeyboardInterrupt)
    (steps,) = set(halfway.info["num_steps"])
    assert 15 <= steps < 40
    assert halfway.info["validation_steps"] == list(range(10, steps + 1, 10))
    np.testing.assert_array_equal(halfway.elbo[:, :steps], whole.elbo[:, :steps])
    on_update(lambda done: None)
    assert_same_bits(go_on(halfway, num_steps=40 - steps), whole)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    return run()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory that holds the checkpoint of ``plain``'s run. Tests leave it as it is."""
    directory = tmp_path_factory.mktemp("saved") / "c"
    return directory, run(checkpoint=directory)


def files(directory):
    return sorted(str(p) for p in directory.rglob("*"))


def test_a_finished_run_is_read_back_without_training(saved, plain):
    directory, first = saved
    second = run(checkpoint=directory)
    assert_same_bits(first, plain)
    assert_same_bits(second, plain)
    assert second.info["seconds"]["run"] == first.info["seconds"]["run"] > 0


@pytest.fixture(scope="module")
def saved_halfway(tmp_path_factory):
    directory = tmp_path_factory.mktemp("halfway") / "c"
    run(checkpoint=directory, num_steps=25)
    return directory


def test_a_half_written_checkpoint_is_not_read(saved, plain, tmp_path):
    directory = shutil.copytree(saved[0], tmp_path / "c")
    (directory / "100.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (directory / "100.orbax-checkpoint-tmp" / "state" / "manifest.ocdbt").write_bytes(b"half")
    assert_same_bits(run(checkpoint=directory), plain)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            {
                "batch_size": 8,
                "seed": 1,
                "data": {"c": C, "x": DATA["x"] + 1},
                "optimizer": optax.adam(0.002),
                "objective": Trace_ELBO(num_particles=2),
                "validation": HELD_OUT,
                "validation_objective": RenyiELBO(0, num_particles=3),
            },
            [
                "batch_size was 20 there and is 8 here",
                "seed was 0 there and is 1",
                "data.x was",
                ".step_size was -0.001 there and is -0.002 here",
                "num_particles=1",
                "num_particles=2",
                "validation was None there",
                "validation_objective was None there and is 'RenyiELBO",
            ],
        ),
        ({"num_steps": 30}, ["num_steps was 40 there and is 30 here: a run becomes longer"]),
    ],
    ids=["settings", "length"],
)
def test_a_checkpoint_of_another_configuration_is_refused(saved, change, messages):
    directory, _ = saved
    before = files(directory)
    with pytest.raises(CheckpointError) as caught:
        run(checkpoint=directory, **change)
    for message in messages:
        assert message in str(caught.value)
    assert files(directory) == before


def test_a_checkpoint_of_another_program_is_refused(saved):
    def other_model(c, x=None):
        slope = numpyro.param("slope", lambda key: jax.random.normal(key))
        with numpyro.plate("rows", len(c)):
            z = numpyro.sample("z", dist.Normal(slope * c, 2.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    settings = {"num_steps": 40, "batch_size": 20, "progress": False}
    other_model.__module__, other_model.__qualname__ = model.__module__, model.__qualname__
    with pytest.raises(CheckpointError, match="compiled program differs"):
        fit(other_model, guide, DATA, checkpoint=saved[0], **settings)


def test_a_directory_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"found 'notes\.txt' in it"):
        run(checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="it is a file"):
        Checkpoints(tmp_path / "notes.txt", {})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_becomes_longer(saved_halfway, plain, tmp_path):
    directory = shutil.copytree(saved_halfway, tmp_path / "c")
    assert_same_bits(run(checkpoint=directory), plain)


def test_a_parameter_without_entries_is_saved_too(plain, tmp_path):
    def with_empty(c, x):
        numpyro.param("none", np.zeros((2, 0), np.float32))
        guide(c, x)

    settings = {"batch_size": 20, "progress": False, "checkpoint": tmp_path / "c"}
    fit(model, with_empty, DATA, num_steps=10, **settings)
    longer = fit(model, with_empty, DATA, num_steps=20, **settings)
    assert longer.params["none"].shape == (1, 2, 0)
    np.testing.assert_allclose(longer.elbo, plain.elbo[:, :20], rtol=2e-6)


def test_a_run_whose_settings_depend_on_its_length_does_not(tmp_path):
    def train(num_steps, decay_steps):
        schedule = optax.cosine_decay_schedule(0.01, decay_steps)
        settings = {"average": 0.5, "optimizer": optax.adam(schedule), "batch_size": None}
        run(checkpoint=tmp_path / "c", num_steps=num_steps, **settings)

    train(25, 25)
    with pytest.raises(CheckpointError) as caught:
        train(40, 40)
    for message in (
        "num_steps was 25 there and is 40 here, and average=0.5 depends on",
        "decay_steps was 25 there and is 40 here",
    ):
        assert message in str(caught.value)


def test_a_checkpoint_made_elsewhere_goes_on_with_a_warning(saved_halfway, plain, tmp_path):
    directory = shutil.copytree(saved_halfway, tmp_path / "c")
    identity = directory / "25" / "identity" / "metadata"
    found = json.loads(identity.read_text())
    found |= {"device": "another device", "program": "another digest"}
    found["versions"]["jax"] = "0.0.1"
    identity.write_text(json.dumps(found))
    with pytest.warns(
        UserWarning, match=r"goes on, but device was 'another device'.*versions\.jax"
    ):
        resumed = run(checkpoint=directory)
    assert_same_bits(resumed, plain)


# --- from a fit -----------------------------------------------------------------------------------


WATCHED = {"num_seeds": 2, "validation": HELD_OUT, "validate_every": 10}


@pytest.fixture(scope="module")
def first_half():
    return run(num_steps=20, **WATCHED)


@pytest.fixture(scope="module")
def whole():
    return run(num_steps=40, **WATCHED)


def go_on(init, **settings):
    own = {"num_steps": 20, "validation": HELD_OUT, "validate_every": 10, "init": init}
    return run(**own | settings)


def test_from_a_fit_a_run_goes_on_as_one_longer_run(first_half, whole):
    second = go_on(first_half)
    assert_same_bits(second, whole)
    assert second.info["num_steps"] == [40, 40]
    assert second.info["validation_steps"] == [10, 20, 30, 40]
    assert second.seeds == [0, 1]


def test_so_it_does_from_a_saved_fit(first_half, whole, tmp_path):
    first_half.save(tmp_path / "fit")
    assert_same_bits(go_on(Fit.load(tmp_path / "fit", model, guide)), whole)


def test_one_seed_of_a_fit_goes_on_alone(first_half, whole):
    alone = go_on(first_half.isel(seed=1))
    assert alone.seeds == [1]
    np.testing.assert_allclose(alone.elbo[0], whole.elbo[1], rtol=2e-6)


def test_epochs_go_on_where_they_ended(plain):
    first = run(num_steps=None, num_epochs=2)
    second = run(num_steps=None, num_epochs=3, init=first)
    assert second.config["num_epochs"] == 5
    np.testing.assert_array_equal(second.elbo, plain.elbo[:, :30])


def test_a_run_goes_on_with_other_data(first_half):
    other = {name: array[:50] for name, array in DATA.items()}
    second = go_on(first_half, data=other, validation=None, validate_every=None)
    np.testing.assert_array_equal(second.elbo[:, :20], first_half.elbo)
    assert np.isfinite(second.elbo).all()
    assert second.info["num_steps"] == [40, 40]


AT_REST = {"num_steps": 1, "optimizer": optax.sgd(0.0), "num_seeds": 2, "batch_size": None}


def test_a_mapping_is_where_a_run_starts():
    start = {"slope": 0.25, "scale": 3.0}
    result = run(init=start, **AT_REST)
    np.testing.assert_allclose(result.params["slope"], [0.25] * 2)
    np.testing.assert_allclose(result.params["scale"], [3.0] * 2, rtol=1e-6)
    assert result.params["weights"][0, 0] != result.params["weights"][1, 0]  # the programs' own


def test_whole_numbers_are_parameters_too():
    result = run(init={"slope": 1, "weights": np.arange(3)}, **AT_REST)
    assert np.isfinite(result.elbo).all()
    np.testing.assert_array_equal(result.params["slope"], [1] * 2)
    np.testing.assert_array_equal(result.params["weights"], [[0, 1, 2]] * 2)


def test_a_seed_that_patience_has_stopped_goes_on_without_it():
    settings = {"validation": HELD_OUT, "validate_every": 1, "batch_size": None}
    stopped = run(patience=1, optimizer=optax.sgd(1.5), **settings)
    (steps,) = stopped.info["num_steps"]
    assert steps < 40
    settings = {"optimizer": optax.sgd(1e-9), "batch_size": None}
    second = run(init=stopped, num_steps=10, **settings)
    assert second.info["num_steps"] == [steps + 10]
    assert np.isfinite(second.elbo).all()


def test_the_parameters_of_a_fit_are_where_a_run_starts_anew(first_half):
    result = run(init=first_half.params_of(1), **AT_REST)
    for name, value in first_half.params.items():
        np.testing.assert_allclose(result.params[name], [value[1]] * 2, rtol=1e-6)
    assert result.info["num_steps"] == [1, 1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"init": {"slop": 1.0}}, ValueError, r"init\['slop'\]: expected parameters.*slope"),
        ({"init": {"slope": np.zeros(2)}}, ValueError, r"init\['slope'\]: .*\(\), got \(2,\)"),
        ({"init": 3}, TypeError, "init: expected a Fit .*got int"),
        ({"num_seeds": 3}, ValueError, "num_seeds: expected 2, as in the fit .*got 3"),
        ({"seed": 7}, ValueError, "seed: expected 0, as in the fit .*got 7"),
        (
            {"optimizer": optax.sgd(0.0), "batch_size": None}
            | {"validation": None, "validate_every": None},
            ValueError,
            "init: .*optimiser's state of this run",
        ),
    ],
)
def test_what_a_run_cannot_start_from_is_refused(
    first_half, change, error, message, without_type_checks
):
    with pytest.raises(error, match=message):
        go_on(**{"init": first_half} | change)
