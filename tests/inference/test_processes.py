"""Two processes on the loopback: they agree with one, and stop and go on together."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from inference import _processes as processes

pytestmark = pytest.mark.slow  # whole processes

SCRIPT = """
import json, sys
import jax

number, count, port, settings = *map(int, sys.argv[1:4]), json.loads(sys.argv[4])
if count > 1:
    jax.distributed.initialize(
        f"127.0.0.1:{port}", count, number, heartbeat_timeout_seconds=20,
        shutdown_timeout_seconds=20,
    )

import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from inference import fit, log_likelihood


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


class Source:
    reads = 0

    def __len__(self):
        return len(C)

    def __getitem__(self, i):
        Source.reads += 1
        if number == 1 and Source.reads > fails_after:
            raise OSError("disk")
        return {"c": C[i], "x": X[i]}


fails_after = settings.pop("fails_after", 10**9)
rng = np.random.default_rng(settings.pop("data_seed", 0) * number)
C = rng.normal(size=203).astype(np.float32)
X = (1 + C + rng.normal(size=203) * 2**0.5).astype(np.float32)
data = Source() if settings.pop("stream", False) else {"c": C, "x": X}
held_out = {"c": C[:50], "x": X[:50]}
axis = settings.pop("axis", "data")
mesh = jax.make_mesh((jax.device_count(),), (axis,)) if count > 1 else None
settings = {"num_steps": 50, "batch_size": 24, "num_seeds": 2, "progress": False} | settings
result = fit(
    model, guide, data, mesh=mesh, validation=held_out, optimizer=optax.adam(1e-2), **settings
)
judged = log_likelihood(result, held_out, num_samples=20)
print(json.dumps({
    "elbo": result.elbo.tolist(),
    "held_out": result.validation_elbo.tolist(),
    "judged": judged.estimate.tolist(),
    "error": judged.standard_error.tolist(),
    "slope": np.asarray(result.params["slope"]).tolist(),
    "reads": Source.reads,
}))
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(settings):
    """Processes that train together, one for each mapping of settings."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(i), str(len(settings)), port, json.dumps(own)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, own in enumerate(settings)
    ]


def told(running):
    """What each process prints, its errors and its status."""
    found = [process.communicate(timeout=240) for process in running]
    return [
        (out, err, process.returncode) for (out, err), process in zip(found, running, strict=True)
    ]


def numbers(running):
    found = told(running)
    assert all(status == 0 for *_, status in found), found[0][1]
    return [json.loads(out.splitlines()[-1]) for out, *_ in found]


@pytest.fixture(scope="module")
def alone():
    return numbers(started([{}]))[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("axis", ["data", "seed"])
def test_two_processes_agree_with_one(stream, axis, alone):
    first, second = numbers(started([{"stream": stream, "axis": axis}] * 2))
    np.testing.assert_allclose(first["elbo"], alone["elbo"], rtol=1e-5)
    difference = np.abs(np.subtract(first["held_out"], alone["held_out"]))[:, -1]
    assert (difference < alone["error"]).all()
    np.testing.assert_allclose(first["judged"], alone["judged"], rtol=1e-5)
    if stream:  # each has read its half of the batches; the checks read all data twice
        assert first["reads"] == second["reads"]
        assert first["reads"] - 2 * 203 < 0.6 * 2 * 50 * 24
    del first["reads"], second["reads"]
    assert first == second


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone):
    path = {"checkpoint": str(tmp_path / "run")}
    numbers(started([path | {"num_steps": 20, "axis": "seed"}] * 2))
    ((out, err, status),) = told(started([path]))
    assert status == 0, err
    np.testing.assert_allclose(json.loads(out)["elbo"], alone["elbo"], rtol=1e-5)
    assert "the run goes on, but" in err
    assert "processes was 2 there and is 1 here" in err


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"data_seed": 1}, "data.x was"),
        ({"num_steps": 51}, "num_steps was 50 there and is 51 here"),
    ],
)
def test_other_data_or_settings_are_refused_in_every_process(second, words):
    found = told(started([{}, second]))
    for _, err, status in found:
        assert status == 1
        assert "processes: expected the settings, data and programs of process 0 in all" in err
    assert words in found[1][1]


def test_a_row_that_one_process_cannot_read_stops_both(tmp_path, alone):
    own = {"stream": True, "checkpoint": str(tmp_path / "run")}
    first, second = told(started([own | {"fails_after": 1500}] * 2))
    assert first[2] == second[2] == 1
    assert "process 1: expected its part of the data" in first[1]
    assert "the source raised OSError: disk" in second[1]
    (found,) = numbers(started([own]))
    np.testing.assert_allclose(found["elbo"], alone["elbo"], rtol=1e-5)


def test_one_process_decides_for_itself():
    assert processes.is_first()
    assert processes.of_first(3) == 3
    assert processes.text_of_first({"a": 1}) == {"a": 1}
    assert processes.of_all(2).tolist() == [2]
