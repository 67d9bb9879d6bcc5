"""Runs of every script: what a directory holds, how it is opened again, and to whom it belongs."""

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import gaussian_mean, runs
from experiments.runner import number
from experiments.settings import command_line
from inference import Estimate, FitError

ROOT = Path(__file__).parents[2]
TOY = {"num_data": 400, "num_steps": 30, "num_seeds": 2, "progress": False}


def change(path, name, **values):
    """Changes entries of a JSON file of a run."""
    content = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(content | values))


def files(path):
    return {p.relative_to(path): p.stat().st_mtime_ns for p in path.rglob("*")}


@pytest.fixture
def copy(run_of, tmp_path):
    """A copy of the toy's run, to be damaged."""
    return Path(shutil.copytree(run_of("gaussian_mean").path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def opened(finished):
    """The run of a script, as anybody opens it again."""
    return runs.load(finished.path)


# --- every script ---------------------------------------------------------------------------------


def test_a_run_directory_holds_everything(finished):
    result, path = finished.result, finished.path
    names = {p.name for p in path.iterdir()}
    assert names >= {"config.json", "result.json", "trace.nc", "fits"}
    assert "checkpoints" not in names  # the fits have it all
    pictures = list(path.glob("*.png"))
    assert pictures
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    config = json.loads((path / "config.json").read_text())
    assert config["format"] == runs.FORMAT
    assert config["guidebook"] == result["versions"]["guidebook"]
    assert config["settings"] == result["config"]
    assert result["seconds"].keys() == {"compile", "run", "evaluate", "total"}
    assert result["seconds"]["total"] > result["seconds"]["run"] > 0
    assert {"device", "versions", "num_parameters", "num_data"} <= result.keys()
    assert result["dataset"] == config["record"]["name"]
    assert result["elbo"]["standard_error"] > 0


def test_the_same_command_shows_the_result_and_touches_nothing(finished, capsys):
    before = files(finished.path)
    assert finished.script.main(finished.config) == finished.result
    assert files(finished.path) == before
    printed = capsys.readouterr().out
    assert finished.script.EXPERIMENT.table(finished.result) in printed
    assert f"training {finished.result['seconds']['run']:.1f} s" in printed
    assert f"written to {finished.path}" in printed


def test_a_run_is_opened_again(opened, finished):
    assert opened.config == dataclasses.replace(finished.config, progress=True)
    assert opened.result == finished.result
    assert opened.fit is opened.fits[opened.experiment.main(opened.config)]
    assert opened.fit.num_seeds == len(finished.result["elbo"]["per_seed"])
    assert len(repr(opened).splitlines()) == 1
    tree = opened.tree
    assert tree.attrs["experiment"] == finished.result["experiment"]
    np.testing.assert_array_equal(tree["sample_stats"].chain.values, opened.fit.seeds)
    judged = tree["evaluation"].elbo.values.mean(1)
    np.testing.assert_allclose(judged, finished.result["elbo"]["per_seed"], rtol=1e-5)
    path = finished.path / "fits" / opened.experiment.main(opened.config) / "arrays.npz"
    with np.load(path) as saved:
        arrays = [a for a in saved.values() if a.dtype.kind == "f"]
    for leaf in jax.tree.leaves(opened.fit.params):
        assert any(a.shape == leaf.shape and (a == leaf).all() for a in arrays)


def test_every_axis_has_a_label(finished):
    assert finished.labels.keys() == {p.stem for p in finished.path.glob("*.png")}
    for name, labels in finished.labels.items():
        assert labels, name
        assert all(all(both) for both in labels), name


def test_an_opened_run_is_judged_as_it_was(opened, finished):
    """With the data loaded again, the judges give the same numbers."""
    data, experiment = opened.data(), opened.experiment
    config = dataclasses.replace(opened.config, progress=False)
    judged = experiment.judge(config, data, opened.fits)
    summary = experiment.summarize(config, data, opened.fits, judged)
    assert summary.keys() <= finished.result.keys()
    written = json.loads(json.dumps(summary))
    for name in summary:
        ours, theirs = (jax.tree.leaves(r[name]) for r in (written, finished.result))
        for a, b in zip(ours, theirs, strict=True):
            close = b if isinstance(b, str) else pytest.approx(b, rel=1e-5, abs=1e-6)
            assert a == close, name


# --- opening --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_opening_needs_no_data(run_of, tmp_path):
    """And data that have changed since are refused."""
    path = Path(shutil.copytree(run_of("svhn_vae").path, tmp_path / "run"))
    own = tmp_path / "own.npz"
    settings = json.loads((path / "config.json").read_text())["settings"]
    change(path, "config.json", settings=settings | {"dataset": str(own)})
    run = runs.load(path)
    with pytest.raises(ValueError, match=r"own\.npz"):
        run.data()
    shutil.copy(settings["dataset"], own)
    assert run.data().name == "own.npz"
    arrays = dict(np.load(own))
    np.savez(own, x=arrays["x"] + 1)
    with pytest.raises(
        runs.RunError, match=r"expected the run's data, train\.x as uint8.*, got ui"
    ):
        run.data()
    assert run.data(dataset=settings["dataset"]).name == "colours.npz"


def test_missing_settings_take_their_defaults(copy):
    settings = json.loads((copy / "config.json").read_text())["settings"]
    del settings["average"]
    change(copy, "config.json", settings=settings)
    assert runs.load(copy).config.average == gaussian_mean.Config.average


def test_unknown_settings_are_an_error(copy):
    settings = json.loads((copy / "config.json").read_text())["settings"]
    change(copy, "config.json", settings=settings | {"colour": "blue"})
    with pytest.raises(runs.RunError, match=r"config\.json: .*got 'colour'; open it with"):
        runs.load(copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "expected the directory of a run, got one without config.json"),
        ("config.json", "{", "config.json: expected JSON, got something else"),
        ("config.json", "[1]", r"expected a JSON object, got \[1\]"),
        ("config.json", "{}", "config.json: expected a run's settings, got some without 'format'"),
        ("config.json", {"format": 99}, "expected format 1, got 99, written by guidebook"),
        ("config.json", {"experiment": "no_such"}, "expected a run of a script .* 'no_such'"),
        ("config.json", {"experiment": "datasets"}, "expected a run of a script .* 'datasets'"),
        ("config.json", {"settings": {"num_steps": "x"}}, "settings, got some that cannot be used"),
        ("config.json", {"record": {"colour": 1}}, "settings, got some that cannot be used"),
        ("result.json", None, "expected a finished run, got one without result.json; finish it"),
        ("result.json", "no", "result.json: expected JSON"),
        ("fits/fit/fit.json", None, "expected a saved fit, got no fit.json"),
        ("fits/fit/arrays.npz", "no", "expected a saved fit, got one that cannot be read"),
    ],
)
def test_a_damaged_directory_is_one_clear_error(copy, name, content, message):
    if content is None:
        (copy / name).unlink()
    elif isinstance(content, str):
        (copy / name).write_text(content)
    else:
        change(copy, name, **content)
    with pytest.raises((runs.RunError, FitError), match=message) as caught:
        runs.load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"no netCDF"])
def test_a_damaged_trace_is_one_clear_error(copy, content):
    run = runs.load(copy)
    (copy / "trace.nc").unlink()
    if content:
        (copy / "trace.nc").write_bytes(content)
    with pytest.raises(runs.RunError, match=r"without trace\.nc|trace\.nc: expected a run's trac"):
        _ = run.tree


# --- claiming -------------------------------------------------------------------------------------


def claimed(config):
    return runs.claim(gaussian_mean.EXPERIMENT, config, gaussian_mean.simulate(config))


def test_a_new_directory_is_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = gaussian_mean.Config(**TOY)
    with claimed(config) as first, claimed(config) as second:
        assert first != second
        assert first.parent == second.parent == Path("runs")
    assert gaussian_mean.EXPERIMENT.name in first.name


def test_a_directory_in_use_is_refused(tmp_path):
    config = gaussian_mean.Config(**TOY, out=tmp_path / "run")
    with (
        claimed(config),
        pytest.raises(ValueError, match=r"no other process writes, got .* is und"),
    ):
        claimed(config).__enter__()
    with claimed(config):  # free again
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 3.0}, r"holds another run \(sigma was 1.0, is 3.0; .*train.x was"),
        ({"num_steps": 31}, r"holds another run \(num_steps was 30, is 31\); give"),
    ],
)
def test_another_runs_directory_is_not_touched(tmp_path, settings, message):
    with claimed(gaussian_mean.Config(**TOY, out=tmp_path / "run")):
        pass
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        gaussian_mean.main(gaussian_mean.Config(**TOY | settings, out=tmp_path / "run"))
    assert files(tmp_path) == before


def test_settings_that_are_new_since_do_not_make_another_run(tmp_path):
    config = gaussian_mean.Config(**TOY, out=tmp_path / "run")
    with claimed(config) as path:
        settings = json.loads((path / "config.json").read_text())["settings"]
        del settings["average"]
        change(path, "config.json", settings=settings)
    with claimed(config):
        pass


def refusal(monkeypatch, *arguments):
    """What a command of the toy says on standard error before it ends with status 2."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["gaussian_mean.py", "--no-progress", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(stderr):
        command_line(gaussian_mean.main, gaussian_mean.Config)
    assert caught.value.code == 2
    (line,) = stderr.getvalue().splitlines()
    return line


CLAIM = """
import sys, time
from experiments import gaussian_mean, runs
config = gaussian_mean.Config(num_data=400, out=sys.argv[1])
with runs.claim(gaussian_mean.EXPERIMENT, config, gaussian_mean.simulate(config)):
    print("claimed", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path, monkeypatch):
    words = [sys.executable, "-c", CLAIM, str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    assert process.stdout.readline() == "claimed\n"
    before = files(tmp_path)
    line = refusal(monkeypatch, "--num-data", 400, "--out", tmp_path / "run")
    assert line.startswith("error: out: expected a directory that no other process writes, got ")
    assert files(tmp_path) == before
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with claimed(gaussian_mean.Config(num_data=400, out=tmp_path / "run")):
        pass  # the lock has died with its process


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bits(tmp_path):
    settings = {"num_data": 5_000, "num_steps": 6_000, "num_seeds": 1}
    killed, whole = (
        gaussian_mean.Config(**settings, out=tmp_path / name, progress=False)
        for name in ("killed", "whole")
    )
    words = [word for n, v in settings.items() for word in (f"--{n.replace('_', '-')}", str(v))]
    words += ["--no-progress", "--out", str(killed.out)]
    script = str(ROOT / "experiments" / "gaussian_mean.py")
    process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE)
    while not (tmp_path / "killed" / "checkpoints").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "result.json").exists()
    results = [gaussian_mean.main(config) for config in (killed, whole)]
    assert results[0]["parameters"] == results[1]["parameters"]
    assert results[0]["elbo"] == results[1]["elbo"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-data", "2"), "the likelihood has no maximum"),
        (("--num-seeds", "many"), "--num-seeds: invalid literal"),
        (("--no-such-option",), "--no-such-option"),
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
    line = refusal(monkeypatch, *(argument.format(**names) for argument in arguments))
    assert line.startswith("error: ")
    assert message in line
    assert {p.name for p in tmp_path.iterdir()} == {"file", "foreign"}
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


# --- listing --------------------------------------------------------------------------------------


def test_the_table_lists_the_runs(run_of, tmp_path, capsys):
    result = run_of("mnist_cvae").result
    for name in ("first", "second"):
        shutil.copytree(run_of("mnist_cvae").path, tmp_path / "digits" / name)
    settings = json.loads((tmp_path / "digits/second/config.json").read_text())["settings"]
    other = settings | {"dataset": "auto", "num_latents": 7}
    change(tmp_path / "digits/second", "config.json", settings=other)
    change(tmp_path / "digits/second", "result.json", elbo={"estimate": 1.5, "standard_error": 0.5})
    with claimed(gaussian_mean.Config(**TOY, out=tmp_path / "begun")):
        pass
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    frame = runs.table(tmp_path)
    assert set(frame.index) == {"digits/first", "digits/second", "begun", "broken"}
    elbo = result["elbo"]["estimate"], result["elbo"]["standard_error"]
    for name, numbers, num_latents in (("first", elbo, 2), ("second", (1.5, 0.5), 7)):
        row = frame.loc[f"digits/{name}"]
        assert (row["experiment"], row["dataset"]) == ("mnist_cvae", "digits")
        assert (row["elbo"], row["elbo_se"]) == numbers
        assert row["log_likelihood"] == result["log_likelihood"]["estimate"]
        assert row["log_likelihood_se"] == result["log_likelihood"]["standard_error"]
        assert row["seconds"] == result["seconds"]["run"]
        assert row["num_latents"] == num_latents
    assert "preset" not in frame  # the same in both
    assert frame.loc["begun", "dataset"] == "gaussian_mean"
    assert np.isnan(frame.loc["begun", "elbo"])
    assert frame.loc["broken", ["when", "dataset"]].isna().all()
    times = frame["when"].dropna()
    assert list(times) == sorted(times)

    runs.main(runs.Config(tmp_path))
    printed = capsys.readouterr().out
    for name, (estimate, error), num_latents in (("first", elbo, 2), ("second", (1.5, 0.5), 7)):
        row = next(line for line in printed.splitlines() if f"digits/{name}" in line)
        assert f"{estimate:.3f} +- {error:.3f}" in row
        assert f"num_latents {num_latents}" in row


def test_a_table_of_nothing(tmp_path):
    assert runs.table(tmp_path).empty
    with pytest.raises(ValueError, match=r"runs: expected .* and there is no .*none"):
        runs.table(tmp_path / "none")


def test_the_table_on_the_command_line(run_of):
    script = str(ROOT / "experiments" / "runs.py")
    path = run_of("gaussian_mean").path
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gaussian_mean" in done.stdout


# --- numbers --------------------------------------------------------------------------------------


def test_a_number_is_the_mean_over_seeds_and_data(rng):
    pointwise = rng.normal(size=(3, 50))
    written = number(Estimate("elbo", pointwise, 7, {}, monte_carlo_variance=pointwise**2))
    assert written["estimate"] == pytest.approx(pointwise.mean())
    by_datum = pointwise.mean(0)
    assert written["standard_error"] == pytest.approx(by_datum.std() / 50**0.5)
    assert written["per_seed"] == pytest.approx(pointwise.mean(1).tolist())
    assert written["num_samples"] == 7
    assert written["monte_carlo_error"] == pytest.approx((pointwise**2).sum() ** 0.5 / 150)
    assert "monte_carlo_error" not in number(Estimate("elbo", pointwise, 7, {}))


def test_the_runner_names_no_script(script):
    for name in ("runner.py", "runs.py", "experiment.py"):
        text = (ROOT / "experiments" / name).read_text().split('"""', 2)[2]  # no docstring
        assert script[0].EXPERIMENT.name not in text
