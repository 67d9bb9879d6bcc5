"""The linear-Gaussian script, run for real on small settings: what it finds, writes and refuses."""

import io
import json
import re
import sys

import arviz as az
import numpy as np
import pytest

from experiments import linear_gaussian as script
from models import linear_gaussian

SMALL = {"num_latents": 3, "num_steps": 40, "batch_size": 100, "progress": False}


@pytest.fixture
def images(tmp_path):
    """A file of 6 x 5 images from a linear-Gaussian process, with labels that matter."""
    rng = np.random.default_rng(0)
    c = rng.integers(0, 2, 1_200)
    z = rng.normal(size=(1_200, 3)) * [2.0, 1.0, 0.5]
    x = z @ rng.normal(size=(3, 30)) + 0.5 * rng.normal(size=(1_200, 30))
    x += c[:, None] * rng.normal(size=30)
    x = (x - x.min()) / (x.max() - x.min())
    path = tmp_path / "images.npz"
    np.savez(path, x=x.reshape(-1, 6, 5).astype(np.float32), c=c)
    return str(path)


def test_every_guide_arrives_where_the_formulas_say(images, tmp_path):
    settings = SMALL | {"num_steps": 6_000, "batch_size": 250, "learning_rate": 0.02}
    config = script.Config(**settings, average=0.2, dataset=images, out=tmp_path / "run")
    result = script.main(config)
    maximum, fits = result["maximum"], result["fits"]
    tolerance = maximum["standard_error"] / 4  # what is left to the optimiser
    for label in ("trained/full-covariance", "trained/mean-field"):
        row = fits[label]
        assert row["log_likelihood"]["estimate"] < maximum["log_likelihood"] + 1e-3
        assert abs(row["below_maximum"]["estimate"]) < tolerance, label
    for guide in ("full-covariance", "mean-field"):
        gap, best = fits[f"held/{guide}"]["gap"], fits[f"held/{guide}"]["best_gap"]
        assert -4 * gap["standard_error"] < gap["estimate"] - best < tolerance, guide
    assert fits["held/full-covariance"]["best_gap"] == 0
    assert fits["held/mean-field"]["best_gap"] > 3 * tolerance


def test_what_a_run_writes(images, tmp_path, capsys):
    config = script.Config(
        **SMALL, dataset=images, given_label=True, num_seeds=2, num_train=500, out=tmp_path / "run"
    )
    result = script.main(config)
    printed = capsys.readouterr().out
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {"config.json", "result.json", "trace.nc", "elbo.png"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert (tmp_path / "run" / "elbo.png").read_bytes()[:4] == b"\x89PNG"
    for label, row in result["fits"].items():
        assert len(row["elbo"]["per_seed"]) == 2
        assert all(word in printed for word in label.split("/"))
        likelihood, elbo = row["log_likelihood"]["estimate"], row["elbo"]["estimate"]
        np.testing.assert_allclose(row["gap"]["estimate"], likelihood - elbo, atol=1e-6)
    with az.from_netcdf(tmp_path / "run" / "trace.nc", engine="h5netcdf") as tree:
        for label in result["fits"]:
            assert tree[label].sample_stats.elbo.shape == (2, 40)
        assert "W" in tree["trained/mean-field"].posterior
        assert "W" not in tree["held/mean-field"].posterior
    assert script.main(config) == result  # shown again


def test_turning_the_latent_axes_leaves_the_likelihood(images):
    config = script.Config(**SMALL, dataset=images)
    data, model, _ = config.data()
    params, maximum = linear_gaussian.maximum_likelihood(model, data)
    turned = script.hold(model, params | {"encoder": 0}, seed=0)
    assert turned.keys() == {"W", "b", "sigma"}
    exact = linear_gaussian.log_likelihood(model, turned, data)
    np.testing.assert_allclose(exact.mean(), maximum, rtol=1e-5)
    assert float(linear_gaussian.mean_field_gap(turned)) > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--guides", "prior"), "guides: expected some of full-covariance, .*got 'prior'"),
        (("--guides", "mean-field", "mean-field"), "guides: expected different ones"),
        (("--num-latents", "0"), "num_latents: expected at least 1, got 0"),
        (("--num-latents", "64"), "num_latents: expected fewer than the 64 numbers of one x"),
        (("--num-train", "9"), "num_latents = 10 directions, got 8 from 9 data"),
        (("--learning-rate", "0"), "learning_rate: expected a positive number"),
        (("--average", "1"), "average: expected a fraction below 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stderr = io.StringIO()
    command = ["linear_gaussian.py", "--dataset", "digits", "--no-progress", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as caught:
        script.command_line(script.main, script.Config)
    assert caught.value.code == 2
    (line,) = stderr.getvalue().splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())
