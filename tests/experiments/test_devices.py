"""Devices and processes of a script: parsing, the mesh, the last line, two real processes."""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import devices, exact, gaussian_mean, mnist_vae, runs
from experiments.devices import ProcessError, describe, mesh_of, words
from experiments.runner import run
from experiments.settings import Machines, command_line, from_json, to_json
from inference import StreamError

ROOT = Path(__file__).parents[2]
TOY = {"num_data": 400, "num_steps": 30, "num_seeds": 2, "batch_size": 40, "progress": False}
COORDINATOR = ("--coordinator", "localhost:1234")
eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def said(monkeypatch, main, config_type, *arguments):
    """What a command says on standard error, and its exit status."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(stderr):
        command_line(main, config_type)
    (line,) = stderr.getvalue().splitlines()
    return line, caught.value.code


# --- parsing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 4, "all"])
def test_the_number_of_devices_is_parsed(monkeypatch, value):
    found = []
    monkeypatch.setattr(sys, "argv", ["script.py", "--devices", str(value)])
    command_line(found.append, gaussian_mean.Config)
    assert found[0].devices == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "many"), "--devices"),
        (("--devices", "0"), "devices: expected at least 1, got 0"),
        (COORDINATOR, "got no --num-processes and no --process-id; give them all"),
        ((*COORDINATOR, "--num-processes", "2"), "got no --process-id; give them all"),
        (("--process-id", "1"), "got no --coordinator and no --num-processes; give them all"),
        (
            ("--coordinator", "localhost", "--num-processes", "2", "--process-id", "0"),
            "coordinator: expected HOST:PORT of process 0, got 'localhost'",
        ),
        (
            (*COORDINATOR, "--num-processes", "2", "--process-id", "2"),
            "process_id: expected 0 to 1, as there are 2 processes, got 2",
        ),
        (("--distributed", *COORDINATOR), "distributed: expected either --distributed"),
    ],
)
def test_flags_that_will_not_do_are_one_line(monkeypatch, arguments, message):
    line, status = said(monkeypatch, pytest.fail, gaussian_mean.Config, *arguments)
    assert message in line
    assert status == 2


def test_devices_and_processes_do_not_change_what_a_run_is():
    config = gaussian_mean.Config(**TOY)
    many = replace(config, devices=8, coordinator="a:1", num_processes=2, process_id=1)
    assert to_json(many) == to_json(config)
    assert from_json(gaussian_mean.Config, to_json(many), progress=False) == config


# --- the mesh -------------------------------------------------------------------------------------


@eight
@pytest.mark.parametrize(
    ("number", "num_seeds", "batch_size", "shape"),
    [
        (1, 4, 100, None),
        (8, 1, 64, {"data": 8}),
        (8, 2, 64, {"seed": 2, "data": 4}),
        (8, 8, 7, {"seed": 8}),
        (8, 16, 7, {"seed": 8}),
        (6, 4, 9, {"seed": 2, "data": 3}),
        ("all", 4, 2, {"seed": 4, "data": 2}),
    ],
)
def test_devices_go_to_the_seeds_first(number, num_seeds, batch_size, shape):
    mesh = mesh_of(Machines(devices=number), num_seeds, batch_size)
    assert (mesh and dict(mesh.shape)) == shape
    if mesh is not None:
        assert set(mesh.devices.flat) == set(jax.devices()[: mesh.size])


@eight
@pytest.mark.parametrize(
    ("config", "num_seeds", "batch_size", "message"),
    [
        (
            gaussian_mean.Config(devices=8),
            2,
            50,
            r"a batch that 4 devices can share, got one of 50 data \(8 devices and 2 seeds: 4 for "
            r"each batch\); give --batch-size 48, or --devices 5",
        ),
        (exact.Config(devices=8), 1, 442, r"\(8 devices and 1 seed: .*\); --devices 2"),
        (mnist_vae.Config(devices=3), 1, 1, r"give --batch-size 3, or --devices 1"),
        (exact.Config(devices=9), 1, 9, r"at most 8, which is how many there are, got 9; give few"),
    ],
)
def test_devices_that_do_not_divide_are_one_line(config, num_seeds, batch_size, message):
    with pytest.raises(ValueError, match=rf"devices: expected .*{message}") as caught:
        mesh_of(config, num_seeds, batch_size)
    assert "\n" not in str(caught.value)


@eight
def test_a_last_fit_may_take_fewer_devices():
    mesh = mesh_of(Machines(devices=8), 1, 60, fewer=True)
    assert mesh is not None
    assert dict(mesh.shape) == {"data": 4}
    assert mesh_of(Machines(devices=8), 1, 61, fewer=True) is None


@pytest.mark.parametrize(
    ("used", "idle", "processes", "line"),
    [
        (8, 0, 1, "devices: 8 of 8 (NVIDIA H100), none idle"),
        (1, 7, 1, "devices: 1 of 8 (NVIDIA H100), 7 idle"),
        (2, 2, 2, "devices: 2 of 4 (NVIDIA H100) in 2 processes, 2 idle"),
    ],
)
def test_the_devices_in_words(used, idle, processes, line):
    known = {"used": used, "idle": idle, "processes": processes, "kind": "NVIDIA H100"}
    assert words(known) == line


def test_one_device_is_used_unless_more_are_asked_for():
    known = describe(Machines())
    assert (known["used"], known["idle"]) == (1, jax.device_count() - 1)


# --- a run ----------------------------------------------------------------------------------------


@eight
def test_a_run_goes_on_with_other_devices(tmp_path, capsys):
    """It is stopped before it is judged, and the same command takes another number of devices."""
    config = gaussian_mean.Config(**TOY, out=tmp_path / "run", devices="all")
    with pytest.raises(RuntimeError, match="killed"):
        run(replace(gaussian_mean.EXPERIMENT, judge=_killed), config)
    with pytest.warns(UserWarning, match=r"the run goes on, but mesh was .*seed.* and is None"):
        result = gaussian_mean.main(replace(config, devices=1))
    assert result["devices"]["used"] == 1
    idle = f"devices: 1 of {jax.device_count()} (cpu), {jax.device_count() - 1} idle"
    assert capsys.readouterr().out.splitlines()[-1] == idle
    again = gaussian_mean.main(replace(config, devices=4))  # finished: it is shown again
    assert again == result
    assert capsys.readouterr().out.splitlines()[-1] == idle
    assert runs.load(tmp_path / "run").config == replace(config, devices=1, progress=True)


def _killed(*_):
    raise RuntimeError("killed")


@eight
def test_eight_devices_agree_with_one(tmp_path, capsys):
    results = []
    for number in (1, "all"):
        config = gaussian_mean.Config(**TOY, out=tmp_path / f"{number}", devices=number)
        results.append(gaussian_mean.main(config))
    assert capsys.readouterr().out.splitlines()[-1] == "devices: 8 of 8 (cpu), none idle"
    for one, other in zip(*(r["parameters"].values() for r in results), strict=True):
        assert other["per_seed"] == pytest.approx(one["per_seed"], rel=1e-4)


@eight
def test_a_batch_that_does_not_divide_leaves_no_directory(tmp_path, monkeypatch):
    arguments = ("--devices", 8, "--num-seeds", 1, "--batch-size", 50, "--num-data", 400)
    arguments += ("--out", tmp_path / "run", "--no-progress")
    line, status = said(monkeypatch, gaussian_mean.main, gaussian_mean.Config, *arguments)
    assert line.startswith("error: devices: expected a batch that 8 devices can share, got one of")
    assert status == 2
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_read_any_more_end_with_status_1(monkeypatch):
    def main(config):
        raise StreamError("data['x'][7]: expected row 7")

    assert said(monkeypatch, main, gaussian_mean.Config) == (
        "error: data['x'][7]: expected row 7",
        1,
    )


def test_without_a_cluster_distributed_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    line, status = said(monkeypatch, gaussian_mean.main, gaussian_mean.Config, "--distributed")
    assert line.startswith("error: distributed: expected a process of SLURM, Kubernetes or MPI, ")
    assert status == 2


def test_what_stops_one_process_stops_all(monkeypatch):
    monkeypatch.setattr(devices, "of_all", lambda mine: np.array([0, 1, int(mine)]))
    with (
        pytest.raises(ProcessError, match=r"process 1: .*its message says why"),
        devices.together(),
    ):
        pass
    with pytest.raises(KeyError), devices.together():
        raise KeyError("mine")
