"""The toy's script, run for real: what it recovers, what it writes, what it refuses."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import arviz as az
import numpy as np
import pytest

from experiments import gaussian_mean as script
from models import gaussian_mean

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "experiments" / "gaussian_mean.py")]
SMALL = {"num_data": 400, "num_steps": 60, "num_seeds": 2, "progress": False}


def run_command(*arguments, **settings):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **settings)


def worst_errors(result):
    """The seeds' largest distance to maximum likelihood, in standard errors, by parameter."""
    return {
        name: max(abs(e - p["maximum_likelihood"]) for e in p["per_seed"]) / p["standard_error"]
        for name, p in result["parameters"].items()
    }


def test_defaults_recover_the_truth(tmp_path):
    result = script.main(script.Config(out=tmp_path / "run", progress=False))
    assert result["parameters"].keys() == set(gaussian_mean.PARAMETERS)
    for name, p in result["parameters"].items():
        assert len(p["per_seed"]) == 4
        for estimate in p["per_seed"]:
            assert abs(estimate - p["optimum"]) < 3 * p["standard_error"], name
    assert max(worst_errors(result).values()) < 0.25, worst_errors(result)
    elbo = result["elbo"]
    assert abs(elbo["estimate"] - elbo["maximum_likelihood"]) < 0.005
    assert abs(elbo["estimate"] - elbo["optimum"]) < 4 * elbo["standard_error"]


@pytest.mark.parametrize(
    ("mu_0", "sigma_0", "sigma", "seed"),
    [(-40.0, 0.05, 0.05, 11), (40.0, 20.0, 4.0, 12), (0.0, 0.05, 0.25, 13), (7.0, 4.0, 20.0, 14)],
)
def test_the_same_settings_serve_other_truths(mu_0, sigma_0, sigma, seed):
    config = script.Config(mu_0=mu_0, sigma_0=sigma_0, sigma=sigma, seed=seed, progress=False)
    data = config.truth().simulate(config.num_data, seed)
    maximum, best = gaussian_mean.maximum_likelihood(data, sigma_0)
    fitted = script.train(config, data)
    elbos = script.judge(config, data, fitted)
    result = script.summarize(config, data, fitted, elbos, maximum, best)
    assert max(worst_errors(result).values()) < 0.5, worst_errors(result)
    assert max(abs(e - best) for e in result["elbo"]["per_seed"]) < 0.005


def test_what_a_run_writes(tmp_path, capsys):
    config = script.Config(**SMALL, out=tmp_path / "run", seed=5)
    result = script.main(config)
    printed = capsys.readouterr().out
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {"config.json", "result.json", "trace.nc", "elbo.png", "recovery.png"}
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved == result
    for name in gaussian_mean.PARAMETERS:
        assert saved["parameters"][name].keys() == {
            "estimate",
            "per_seed",
            "optimum",
            "maximum_likelihood",
            "standard_error",
        }
        assert name in printed
    assert {"estimate", "standard_error", "optimum"} <= saved["elbo"].keys()
    assert saved["seconds"].keys() == {"compile", "run", "total"}
    assert saved["device"] in printed
    assert saved["versions"].keys() >= {"numpyro", "jax"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 5
    for name in ("elbo.png", "recovery.png"):
        assert (tmp_path / "run" / name).read_bytes()[:4] == b"\x89PNG"
    with az.from_netcdf(tmp_path / "run" / "trace.nc", engine="h5netcdf") as tree:
        assert tree.sample_stats.elbo.shape == (2, 60)
        assert list(tree.sample_stats.chain.values) == [5, 6]
        np.testing.assert_allclose(
            tree.posterior.theta_1.values[:, 0], saved["parameters"]["theta_1"]["per_seed"]
        )
        assert tree.attrs["info.device"] == saved["device"]


def test_fresh_directories_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        script.main(script.Config(**SMALL))
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    assert all((run / "result.json").exists() for run in runs)


def test_a_finished_run_is_shown_again_and_not_touched(tmp_path):
    config = script.Config(**SMALL, out=tmp_path / "run")
    first = script.main(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.*")}
    assert script.main(config) == first
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.*")}
    assert before == after


def test_killed_and_run_again_gives_the_same_bits(tmp_path):
    arguments = ("--num-data", "5000", "--num-steps", "6000", "--num-seeds", "1", "--no-progress")
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    process = subprocess.Popen([*COMMAND, *arguments, "--out", killed], stdout=subprocess.PIPE)
    while not (tmp_path / "killed" / "checkpoints").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "result.json").exists()
    for out in (killed, whole):
        run_command(*arguments, "--out", out, check=True)
    results = [json.loads((Path(out) / "result.json").read_text()) for out in (killed, whole)]
    assert results[0]["parameters"] == results[1]["parameters"]
    assert results[0]["elbo"] == results[1]["elbo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-data", "0"), "num_data: expected at least 1, got 0"),
        (("--sigma", "0"), "sigma: expected a positive, finite standard deviation, got 0.0"),
        (("--sigma-0", "-2"), "sigma_0: expected a positive, finite standard deviation, got -2.0"),
        (("--num-data", "10", "--batch-size", "11"), "batch_size: expected 1 to num_data = 10"),
        (("--objective", "ELBO"), "objective: expected one of Trace_ELBO, .*, got 'ELBO'"),
        (("--num-seeds", "many"), "--num-seeds: invalid literal"),
        (("--no-such-option",), "--no-such-option"),
        (("--num-data", "2"), "the likelihood has no maximum"),
        (("--num-data", "1"), "expected conditions that vary"),
        (("--out", "{file}/below"), "out: expected a directory that can be written"),
        (("--out", "{foreign}"), "holds other files; give another directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    names = {name: str(tmp_path / name) for name in ("file", "foreign")}
    arguments = [argument.format(**names) for argument in arguments]
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["gaussian_mean.py", "--no-progress", *arguments])
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as caught:
        script.command_line(script.main, script.Config)
    assert caught.value.code == 2
    (line,) = stderr.getvalue().splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert {p.name for p in tmp_path.iterdir()} == {"file", "foreign"}
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_bad_input_as_the_user_types_it(tmp_path):
    done = run_command("--sigma", "-1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sigma": 3.0}, "holds another run .*sigma was 1.0, is 3.0"),
        ("broken", "expected JSON, got something else"),
    ],
)
def test_another_runs_directory_is_not_touched(tmp_path, content, message):
    config = script.Config(**SMALL, out=tmp_path / "run")
    script.main(config)
    if content == "broken":
        (tmp_path / "run" / "config.json").write_text("{")
        other = config
    else:
        other = script.Config(**SMALL, **content, out=tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.*")}
    with pytest.raises(ValueError, match=message):
        script.main(other)
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("*.*")} == before


@pytest.mark.parametrize("objective", sorted(script.OBJECTIVES))
def test_every_objective_trains(objective):
    config = script.Config(objective=objective, num_seeds=1, num_steps=1500, progress=False)
    data = config.truth().simulate(config.num_data, config.seed)
    maximum, best = gaussian_mean.maximum_likelihood(data, config.sigma_0)
    fitted = script.train(config, data)
    elbos = script.judge(config, data, fitted)
    result = script.summarize(config, data, fitted, elbos, maximum, best)
    assert max(worst_errors(result).values()) < 3, worst_errors(result)
    assert abs(result["elbo"]["estimate"] - best) < 0.005


def test_coordinates_make_the_inputs_uncorrelated():
    rng = np.random.default_rng(0)
    c = rng.normal(3.0, 0.2, 1_000)
    x = 40 + c + 0.01 * rng.normal(size=1_000)
    matrix = script.coordinates(x, c, 1.0, scale=2.0).astype(float)
    outputs = np.stack([x, c, np.ones(1_000)], axis=1) @ matrix
    np.testing.assert_allclose(outputs.T @ outputs / 1_000, 4 * np.eye(3), atol=0.05)


def test_config_is_a_command_line():
    done = run_command("--help")
    assert done.returncode == 0
    for name in script.Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in done.stdout or f"-{name}" in done.stdout
