"""The script that sets runs side by side, on runs of the scripts themselves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import compare, runs
from inference import comparison

pytestmark = pytest.mark.slow  # whole runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(run_of, tmp_path_factory):
    """Copies of runs. With and without labels, the same test images are judged."""
    path = tmp_path_factory.mktemp("runs")
    for name in ("mnist_vae", "mnist_cvae", "gaussian_mean"):
        shutil.copytree(run_of(name).path, path / name)
    shutil.copytree(path / "gaussian_mean", path / "copy")
    return path


def files(path):
    return {p.relative_to(path): p.stat().st_mtime_ns for p in path.rglob("*")}


def test_the_command_line_end_to_end(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    before = files(made)
    script = str(ROOT / "experiments" / "compare.py")
    words = [sys.executable, script, "mnist_vae", "mnist_cvae", "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits: 60 data that were judged" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "comparison.txt",
        "comparison.json",
        "elbo.png",
        "differences.png",
    }
    assert (tmp_path / "out" / "comparison.txt").read_text() in done.stdout
    assert (tmp_path / "out" / "elbo.png").read_bytes()[:4] == b"\x89PNG"
    assert files(made) == before
    with pytest.raises(ValueError, match="out: expected a new or empty directory"):
        compare.main(compare.Config((made / "mnist_vae", made / "mnist_cvae"), tmp_path / "out"))


def test_the_numbers_are_those_of_the_runs(made, capsys):
    before = files(made)
    compared = compare.main(compare.Config((made / "mnist_vae", made / "mnist_cvae")))
    printed = capsys.readouterr().out
    assert files(made) == before  # nothing is written without --out
    for name in ("mnist_vae", "mnist_cvae"):
        result = json.loads((made / name / "result.json").read_text())
        row = compared["runs"][name]
        for part in ("elbo", "log_likelihood"):
            assert row[part] == pytest.approx(result[part]["estimate"], rel=1e-6)
            assert row[f"{part}_se"] == pytest.approx(result[part]["standard_error"], rel=1e-5)
            assert f"{row[part]:.3f} +- " in printed
        assert row["seconds"] == pytest.approx(result["seconds"]["run"])
        assert (row["guide"], row["objective"]) == ("mean-field", "Trace_ELBO")
        assert row["model"] == f"{name} numpyro"
        assert compared["settings"]["num_latents"][name] == result["config"]["num_latents"]
    best, other = compared["runs"]
    pointwise = {
        name: runs.read_tree(made / name)["evaluation"].log_likelihood.values.mean(0)
        for name in (best, other)
    }
    differences = (pointwise[other] - pointwise[best]).astype(np.float64)
    assert compared["runs"][other]["difference"] == pytest.approx(differences.mean(), rel=1e-5)
    error = differences.std() / 60**0.5
    assert compared["runs"][other]["difference_se"] == pytest.approx(error, rel=1e-4)
    result = json.loads((made / "mnist_cvae" / "result.json").read_text())
    assert compared["runs"]["mnist_cvae"]["pareto_k_share"] == result["pareto_k"]["estimate"]
    assert compared["runs"]["mnist_vae"]["pareto_k_share"] is None
    assert "- with fewer than 30 samples or none" in printed


def test_runs_compare_as_they_are_opened(made):
    opened = {name: runs.load(made / name) for name in ("gaussian_mean", "copy")}
    assert (comparison.compare(opened)["difference"] == 0).all()


def test_a_copy_is_the_same(made, tmp_path, capsys):
    """And runs of the toy compare their ELBOs."""
    config = compare.Config((made / "gaussian_mean", made / "copy"), tmp_path / "out")
    compared = compare.main(config)
    result = json.loads((made / "copy" / "result.json").read_text())
    for row in compared["runs"].values():
        assert row["elbo"] == pytest.approx(result["elbo"]["estimate"], rel=1e-6)
        assert (row["difference"], row["log_likelihood"]) == (0, None)
    assert compared["settings"] == {}
    printed = capsys.readouterr().out
    assert "the settings are the same" in printed
    assert "difference: ELBO less the best run's" in printed
    assert (tmp_path / "out" / "elbo.png").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mnist_vae", "none"], "none: expected the directory .* without trace.nc; finish the run"),
        (["mnist_vae"], "runs: expected at least two directories, all of them different, got mni"),
        (["mnist_vae", "mnist_vae/../mnist_vae"], "all of them different"),
        (["mnist_vae", "gaussian_mean"], r"others in mnist_vae and gaussian_mean: array x is flo"),
    ],
)
def test_what_cannot_be_compared_is_refused(made, names, message, monkeypatch):
    monkeypatch.chdir(made)
    with pytest.raises(ValueError, match=message):
        compare.main(compare.Config(tuple(map(Path, names))))


def test_runs_of_one_name_are_told_apart_by_their_paths(made, tmp_path):
    shutil.copytree(made / "mnist_vae", tmp_path / "mnist_vae")
    paths = made / "mnist_vae", tmp_path / "mnist_vae"
    assert list(compare.read(paths)) == [str(path) for path in paths]
