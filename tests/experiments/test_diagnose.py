"""The page of a run: any run, its own data, written into its directory."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import diagnose, gaussian_mean, mnist_vae, train
from experiments.diagnose import Config, main

SMALL = {"num_data": 8, "num_simulations": 60, "num_samples": 30, "num_steps": 10}
SMALL |= {"progress": False}


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="num_data: expected at least 2"):
        Config(Path("run"), num_data=1)
    with pytest.raises(ValueError, match="num_steps: expected at least 1"):
        Config(Path("run"), num_steps=0)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected"):
        main(Config(tmp_path, progress=False))


@pytest.mark.slow
def test_a_run_of_images_is_judged_on_its_test_data(tmp_path, capsys):
    config = {"dataset": "digits", "num_epochs": 1, "num_test": 30, "num_samples": 5}
    mnist_vae.main(mnist_vae.Config(out=tmp_path / "vae", progress=False, **config))
    page = main(Config(tmp_path / "vae", **SMALL))
    printed = capsys.readouterr().out
    assert repr(page) in printed
    assert f"written to {tmp_path / 'vae' / 'diagnosis.md'}" in printed
    assert {"elbo", "density", "training_elbo", "bracket", "total"} <= page.numbers.keys()
    assert page.missing == {}
    known = json.loads((tmp_path / "vae" / "diagnosis.json").read_text())
    result = json.loads((tmp_path / "vae" / "result.json").read_text())
    # the same judge on the same test images, with other draws
    error = 4 * result["elbo"]["standard_error"]
    assert abs(known["numbers"]["elbo"]["estimate"] - result["elbo"]["estimate"]) < error
    assert (tmp_path / "vae" / "diagnosis_calibration.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_without_test_data_is_judged_on_its_own(tmp_path):
    config = {"num_data": 300, "num_steps": 30, "batch_size": 100, "num_seeds": 2}
    gaussian_mean.main(gaussian_mean.Config(out=tmp_path / "toy", progress=False, **config))
    page = main(Config(tmp_path / "toy", **SMALL))
    assert "training_elbo" not in page.numbers
    assert "Seed 0 of 2." in page.notes
    with pytest.raises(ValueError, match="fit: expected one of fit, got 'other'"):
        main(Config(tmp_path / "toy", fit="other", **SMALL))


PROGRAM = """
import numpyro
import numpyro.distributions as dist


def model(x=None):
    with numpyro.plate("data", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z, numpyro.param("scale", 1.0)), obs=x)
"""


@pytest.mark.slow
def test_a_run_of_ones_own_program_needs_its_file(tmp_path):
    (tmp_path / "own.py").write_text(PROGRAM)
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(0).normal(size=200).astype(np.float32))
    program = f"{tmp_path / 'own.py'}:model"
    settings = {"num_steps": 20, "num_samples": 5, "progress": False}
    train.main(train.Config(program, tmp_path / "own.npz", out=tmp_path / "own", **settings))
    with pytest.raises(ValueError, match="expected the model"):
        main(Config(tmp_path / "own", **SMALL))
    page = main(Config(tmp_path / "own", program=program, **SMALL))
    assert "training_elbo" in page.numbers
    assert diagnose.__doc__
