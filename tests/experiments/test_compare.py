"""The script that sets runs side by side, on runs of the scripts themselves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pytest

from experiments import compare, gaussian_mean, images, mnist_vae

ROOT = Path(__file__).parents[2]
SMALL = {
    "dataset": "digits",
    "hidden": (8,),
    "num_latents": 2,
    "num_epochs": 1,
    "num_test": 40,
    "progress": False,
}
TOY = {"num_data": 400, "num_seeds": 2, "progress": False}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Without the pictures, which take longest."""
    path = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images.pictures, "draw", lambda *_: None)
        for name, settings in {
            "wide": {"num_samples": 40, "num_seeds": 2, "num_epochs": 3},
            "few": {"num_samples": 5},
        }.items():
            mnist_vae.main(mnist_vae.Config(**SMALL | settings, out=path / name))
    for name, num_steps in {"toy": 60, "short": 40}.items():
        gaussian_mean.main(gaussian_mean.Config(**TOY, num_steps=num_steps, out=path / name))
    shutil.copytree(path / "wide", path / "copy")
    return path


def command(*arguments, **settings):
    script = str(ROOT / "experiments" / "compare.py")
    words = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, **settings)


def files(path):
    return {p.relative_to(path): p.stat().st_mtime_ns for p in path.rglob("*")}


def test_the_command_line_end_to_end(runs, tmp_path):
    before = files(runs)
    done = command("few", "wide", "--out", tmp_path / "out", cwd=runs)
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits: 40 data that were judged" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "comparison.txt",
        "comparison.json",
        "elbo.png",
        "differences.png",
    }
    assert (tmp_path / "out" / "comparison.txt").read_text() in done.stdout
    assert (tmp_path / "out" / "elbo.png").read_bytes()[:4] == b"\x89PNG"
    assert files(runs) == before

    again = command("few", "wide", "--out", tmp_path / "out", cwd=runs)
    assert again.returncode == 2
    assert "out: expected a new or empty directory" in again.stderr
    assert again.stderr.count("\n") == 1


def test_the_numbers_are_those_of_the_runs(runs, capsys):
    before = files(runs)
    compared = compare.main(compare.Config((runs / "few", runs / "wide")))
    printed = capsys.readouterr().out
    assert files(runs) == before  # nothing is written without --out
    for name in ("few", "wide"):
        result = json.loads((runs / name / "result.json").read_text())
        row = compared["runs"][name]
        for part, error in (("elbo", "elbo_se"), ("log_likelihood", "log_likelihood_se")):
            assert row[part] == pytest.approx(result["test"][part]["estimate"], rel=1e-6)
            assert row[error] == pytest.approx(result["test"][part]["standard_error"], rel=1e-5)
            assert f"{row[part]:.3f} +- " in printed
        assert row["seconds"] == pytest.approx(result["seconds"]["run"])
        assert (row["guide"], row["objective"]) == ("mean-field", "Trace_ELBO")
        assert row["model"] == "mnist_vae numpyro"
    pointwise = {
        name: az.from_netcdf(runs / name / "trace.nc").log_likelihood.x.values.mean((0, 1))
        for name in ("few", "wide")
    }
    best, other = compared["runs"]
    differences = (pointwise[other] - pointwise[best]).astype(np.float64)
    assert compared["runs"][other]["difference"] == pytest.approx(differences.mean(), rel=1e-5)
    error = differences.std() / 40**0.5
    assert compared["runs"][other]["difference_se"] == pytest.approx(error, rel=1e-4)
    result = json.loads((runs / "wide" / "result.json").read_text())
    assert compared["runs"]["wide"]["pareto_k_share"] == result["test"]["pareto_k"]["estimate"]
    assert compared["runs"]["few"]["pareto_k_share"] is None
    assert "- with fewer than 30 samples or none" in printed
    assert compared["settings"] == {
        "num_epochs": {best: 3, other: 1} if best == "wide" else {best: 1, other: 3},
        "num_samples": {"wide": 40, "few": 5},
        "num_seeds": {"wide": 2, "few": 1},
    }


def test_a_copy_is_the_same(runs, capsys):
    compared = compare.main(compare.Config((runs / "wide", runs / "copy")))
    assert [row["difference"] for row in compared["runs"].values()] == [0, 0]
    assert compared["settings"] == {}
    assert "the settings are the same" in capsys.readouterr().out


def test_runs_of_the_toy_compare_their_elbos(runs, tmp_path, capsys):
    compared = compare.main(compare.Config((runs / "toy", runs / "short"), tmp_path / "out"))
    for name, row in compared["runs"].items():
        result = json.loads((runs / name / "result.json").read_text())
        assert row["elbo"] == pytest.approx(result["elbo"]["estimate"], rel=1e-6)
        assert row["log_likelihood"] is None
    assert compared["settings"] == {"num_steps": {"toy": 60, "short": 40}}
    assert "difference: of the ELBO" in capsys.readouterr().out
    assert (tmp_path / "out" / "elbo.png").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wide", "none"], "none has no trace.nc; finish the run"),
        (["wide"], "runs: expected at least two directories, all of them different, got wide"),
        (["wide", "wide/../wide"], "all of them different"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, names, message, monkeypatch):
    monkeypatch.chdir(runs)
    with pytest.raises(ValueError, match=message):
        compare.main(compare.Config(tuple(map(Path, names))))


def test_runs_on_other_data_are_refused_in_one_line(runs):
    done = command("wide", "toy", cwd=runs)
    assert (done.returncode, done.stdout) == (2, "")
    assert "others in wide and toy: data set is digits, and gaussian_mean" in done.stderr
    assert "array x is float32[40, 8, 8] sha256:" in done.stderr
    assert done.stderr.count("\n") == 1


def test_runs_of_one_name_are_told_apart_by_their_paths(runs, tmp_path):
    shutil.copytree(runs / "wide", tmp_path / "wide")
    trees = compare.read((runs / "wide", tmp_path / "wide"))
    assert list(trees) == [str(runs / "wide"), str(tmp_path / "wide")]
