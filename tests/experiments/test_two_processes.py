"""Two real processes on the loopback: they agree with one, and end together when one is killed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # whole processes

ROOT = Path(__file__).parents[2]
TOY = "--num-data 4000 --num-steps 300 --batch-size 400 --num-seeds 3"
LONG = "--num-data 4000 --num-steps 6000 --batch-size 400 --num-seeds 1"
DIGITS = "--dataset digits --hidden 16 --num-latents 2 --num-epochs 2 --num-test 60"
DIGITS += " --num-samples 20 --batch-size 100"
OTHERWISE = {"seconds", "device", "devices", "config", "versions"}


def started(parent, script, settings, count):
    """Processes that train together, each in a directory of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    running = []
    for i in range(count):
        words = [str(ROOT / "experiments" / f"{script}.py"), *settings.split(), "--no-progress"]
        words += ["--out", "run"]
        if count > 1:
            words += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
            words += ["--process-id", str(i)]
        (parent / str(i)).mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=parent / str(i),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
    return running


def told(running):
    """What each process prints, its errors and its status."""
    found = [process.communicate(timeout=240) for process in running]
    return [(*both, process.returncode) for both, process in zip(found, running, strict=True)]


def result_of(parent):
    result = json.loads((parent / "0" / "run" / "result.json").read_text())
    return {name: value for name, value in result.items() if name not in OTHERWISE}


def assert_close(ours, theirs, rel):
    """Two results agree, number by number."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_close(ours[name], theirs[name], rel)
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other, rel)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rel, abs=rel)
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("script", "settings"), [("gaussian_mean", TOY), ("mnist_vae", DIGITS)], ids=["toy", "digits"]
)
def test_two_processes_agree_with_one(tmp_path, script, settings):
    ((alone, _, status),) = told(started(tmp_path / "one", script, settings, 1))
    assert status == 0
    assert alone.splitlines()[-1] == "devices: 1 of 1 (cpu), none idle"
    (out, err, status), second = told(started(tmp_path / "two", script, settings, 2))
    assert status == 0, err
    assert out.splitlines()[-1] == "devices: 2 of 2 (cpu) in 2 processes, none idle"
    assert second[1:] == ("", 0)
    assert "written to" not in second[0]
    assert not list((tmp_path / "two" / "1").iterdir())  # it writes nothing
    files = [{p.name for p in (tmp_path / n / "0" / "run").iterdir()} for n in ("one", "two")]
    assert files[0] == files[1]
    assert_close(result_of(tmp_path / "two"), result_of(tmp_path / "one"), 1e-5)


@pytest.mark.parametrize(("victim", "then"), [(1, 2), (0, 1)])
def test_the_others_end_when_one_is_killed_and_the_same_command_goes_on(tmp_path, victim, then):
    running = started(tmp_path, "gaussian_mean", LONG, 2)
    saved = tmp_path / "0" / "run" / "checkpoints" / "fit"
    while not any(path.name.isdecimal() for path in saved.glob("*")):
        assert all(process.poll() is None for process in running)
        time.sleep(0.1)
    running[victim].kill()
    killed = time.monotonic()
    _, err, status = told(running)[1 - victim]
    assert time.monotonic() - killed < 60
    assert status != 0
    if victim == 1:
        assert err.splitlines()[-1].startswith("error: processes: expected an answer of all 2, but")
    assert not (tmp_path / "0" / "run" / "result.json").exists()
    (out, err, status), *_ = told(started(tmp_path, "gaussian_mean", LONG, then))
    assert status == 0, err
    assert "written to run" in out
    said = [line for line in err.splitlines() if "the run goes on, but" in line]
    assert len(said) == (then == 1), said
    assert all("processes was 2 there and is 1 here" in line for line in said)
    (whole, *_) = told(started(tmp_path / "whole", "gaussian_mean", LONG, 1))
    assert whole[2] == 0
    assert_close(result_of(tmp_path), result_of(tmp_path / "whole"), 1e-4)


def test_what_is_wrong_in_one_process_stops_both(tmp_path):
    """Process 1 does not have the file of the data."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "mine.csv").write_text("a,b\n" + "1,2\n3,5\n" * 50)
    first, second = told(started(tmp_path, "mnist_vae", "--dataset mine.csv", 2))
    assert first[2] == 1
    assert first[1].splitlines()[-1].startswith("error: process 1: expected it to go on, but it ha")
    assert second[2] == 2
    assert second[1].splitlines()[-1].startswith("error: mine.csv: expected a .csv file, got no fi")
    assert not (tmp_path / "0" / "run").exists()
