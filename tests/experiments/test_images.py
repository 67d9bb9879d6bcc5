"""The scripts on images, run for real on small settings: what they write, print and refuse."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import arviz as az
import jax
import numpy as np
import pytest

from experiments import images, mnist_cvae, mnist_vae, pictures
from inference import FreeBits, KLWarmUp, StickingTheLanding
from models import vae
from models.likelihoods import LIKELIHOODS

ROOT = Path(__file__).parents[2]
SMALL = {
    "dataset": "digits",
    "hidden": (16,),
    "num_latents": 3,
    "num_epochs": 3,
    "num_test": 60,
    "num_samples": 30,
    "progress": False,
}
FIGURES = {"elbo", "reconstructions", "samples", "latents", "interpolations"}


def run(script, out, **settings):
    return script.main(script.Config(**SMALL | settings, out=out))


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("vae") / "run"
    return run(mnist_vae, out, num_seeds=2, kl_warm_up=1.0, clip_norm=100.0), out


@pytest.fixture(scope="module")
def cvae_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cvae") / "run"
    settings = {"prior": "learned", "num_embedded": 4, "num_label_samples": 5, "num_latents": 2}
    return run(mnist_cvae, out, **settings, schedule="burda", average=0.2), out


@pytest.fixture(params=["vae_run", "cvae_run"])
def finished(request):
    return request.getfixturevalue(request.param)


def test_a_run_directory_holds_everything(finished):
    result, out = finished
    assert {f"{name}.png" for name in FIGURES} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "result.json").read_text()) == result
    assert json.loads((out / "config.json").read_text())["dataset"] == "digits"
    assert result["dataset"] == "digits"
    assert result["seconds"].keys() == {"compile", "run", "evaluate", "total"}
    assert {"device", "versions", "num_parameters", "active_units"} <= result.keys()
    assert result["num_data"] == {"train": 1197, "validation": 300, "test": 60}


def test_the_numbers_agree_with_one_another(finished):
    test = finished[0]["test"]
    for part in ("elbo", "reconstruction", "kl", "log_likelihood"):
        assert test[part]["standard_error"] > 0
    elbo = test["reconstruction"]["estimate"] - test["kl"]["estimate"]
    assert test["elbo"]["estimate"] == pytest.approx(elbo, rel=1e-6)
    gap = test["log_likelihood"]["estimate"] - test["elbo"]["estimate"]
    assert gap > 0  # an ELBO of 10 draws against the bound of 30
    assert test["log_likelihood"]["num_samples"] == 30
    bits = -test["log_likelihood"]["estimate"] / (64 * np.log(2))
    assert test["bits_per_dim"]["estimate"] == pytest.approx(bits)
    assert 0 <= finished[0]["active_units"] <= 3
    if len(finished[0]["num_steps"]) == 1:
        variance = np.array(finished[0]["activity"]["estimate"])
        assert finished[0]["active_units"] == (variance > 0.01).sum()
    assert sum(finished[0]["kl_per_dim"]["estimate"]) == pytest.approx(
        test["kl"]["estimate"], rel=1e-4
    )


def test_arviz_opens_the_trace(finished):
    result, out = finished
    tree = az.from_netcdf(out / "trace.nc")
    assert tree.attrs["dataset"] == "digits"
    pointwise = tree.log_likelihood.x.values
    assert pointwise.shape == (result["config"]["num_seeds"], 1, 60)
    assert pointwise.mean() == pytest.approx(result["test"]["log_likelihood"]["estimate"], rel=1e-5)
    assert np.isfinite(tree.sample_stats.elbo.values).all()
    held_out = tree.validation_stats.elbo.values
    assert held_out.shape[1] == 3
    assert (held_out[:, -1] > held_out[:, 0]).all()
    assert tree.posterior.z.shape[2:] == (60, result["num_latents"])


def test_the_share_of_high_pareto_k(finished):
    result, out = finished
    reported = result["test"]["pareto_k"]
    assert reported["num_samples"] == 30
    assert reported["threshold"] == pytest.approx(1 - 1 / np.log10(30))
    pareto_k = az.from_netcdf(out / "trace.nc").evaluation.pareto_k.values
    assert pareto_k.shape == (result["config"]["num_seeds"], 60)
    assert reported["estimate"] == pytest.approx((~(pareto_k < reported["threshold"])).mean())
    assert f"share with k-hat >= {reported['threshold']:.2f}" in images.table(result, None)
    result = result | {"test": result["test"] | {"pareto_k": None}}
    assert "k-hat: not available, needs 30 samples" in images.table(result, None)


def test_seeds_are_reported_together_and_apart(vae_run):
    likelihood = vae_run[0]["test"]["log_likelihood"]
    assert len(likelihood["per_seed"]) == 2
    assert np.ptp(likelihood["per_seed"]) > 0
    assert likelihood["estimate"] == pytest.approx(np.mean(likelihood["per_seed"]))


def test_the_number_of_parameters(vae_run, cvae_run):
    # 64 -> 16 -> 3 -> 16 -> 64
    assert vae_run[0]["num_parameters"] == 65 * 16 + 17 * 6 + 4 * 16 + 17 * 64
    # with 4 features of 10 labels for each of the encoder, the prior and the decoder
    layers = 69 * 16 + 17 * 4 + 5 * 4 + 7 * 16 + 17 * 64
    assert cvae_run[0]["num_parameters"] == layers + 3 * 10 * 4


def test_labels_are_checked(cvae_run):
    labels = cvae_run[0]["labels"]
    assert labels["greatest_information"] == pytest.approx(np.log(10))
    assert labels["information"]["estimate"] <= np.log(10)
    assert 0 <= labels["accuracy"]["estimate"] <= 1


@pytest.mark.parametrize("script", [mnist_vae, mnist_cvae])
def test_the_same_command_prints_the_result_again(script, request, capsys):
    result, out = request.getfixturevalue("vae_run" if script is mnist_vae else "cvae_run")
    config = result["config"] | {"out": out, "hidden": (16,), "progress": False}
    assert script.main(script.Config(**config)) == result
    printed = capsys.readouterr().out
    assert "digits: 1197 training and 60 test images" in printed
    for value in (result["test"]["log_likelihood"]["estimate"], result["test"]["kl"]["estimate"]):
        assert f"{value:.3f}" in printed
    with pytest.raises(ValueError, match=r"out: .* holds another run .*learning_rate was"):
        script.main(script.Config(**config | {"learning_rate": 0.5}))


def test_colour_images_of_ones_own(tmp_path, capsys, rng):
    x = rng.integers(0, 256, (40, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=x)
    own = {"dataset": str(tmp_path / "mine.npz"), "num_epochs": 1}
    result = run(mnist_vae, tmp_path / "run", **own, likelihood="gaussian-one-scale")
    assert result["dataset"] == "mine.npz"
    assert "mine.npz" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"expected labels, and mine.npz has none; add"):
        run(mnist_cvae, tmp_path / "other", **own)


@pytest.mark.parametrize("guide", ["flow", "per-datum"])  # tests/models has every family
def test_a_guide_by_its_name(guide, tmp_path):
    result = run(mnist_cvae, tmp_path / "run", guide=guide, num_train=100, num_label_samples=2)
    assert np.isfinite(result["test"]["log_likelihood"]["estimate"])
    assert (result["kl_per_dim"] is None) == (guide == "flow")
    assert ("labels" in result) == (guide != "per-datum")
    assert {f"{name}.png" for name in FIGURES} <= {p.name for p in (tmp_path / "run").iterdir()}


def test_an_objective_is_taken_by_name(tmp_path):
    settings = {"objective": "doubly-reparameterized", "num_particles": 5}
    out = tmp_path / "run"
    result = run(mnist_vae, out, num_train=300, num_epochs=2, **settings)
    assert {name: result["config"][name] for name in settings} == settings
    held_out = az.from_netcdf(out / "trace.nc").validation_stats.elbo.values[0]
    assert held_out[-1] > held_out[0]


def test_settings_change_an_objective():
    beta = mnist_vae.Config(objective="sticking-the-landing", beta=2.0, kl_warm_up=0.5).elbo(7)
    assert isinstance(beta, KLWarmUp)
    assert (beta.num_steps, beta.objective.kl_weight) == (7, 2.0)
    assert isinstance(beta.objective.objective, StickingTheLanding)
    free = mnist_vae.Config(objective="TraceMeanField_ELBO", num_particles=3, free_bits=0.2).elbo(7)
    assert isinstance(free, FreeBits)
    assert (free.nats, free.objective.num_particles) == (0.2, 3)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(vae.PRESETS))
def test_a_preset_is_changed_by_the_settings_that_are_given(preset):
    dataset = mnist_vae.Config(dataset="digits").data()
    plain = mnist_vae.Config(preset=preset).model(dataset)
    assert plain == replace(vae.PRESETS[preset], x_shape=(8, 8))
    settings = {"hidden": (7,), "num_latents": 2, "activation": "silu", "likelihood": "gaussian"}
    changed = mnist_vae.Config(preset=preset, **settings, encoder_hidden=(3, 4)).model(dataset)
    assert (changed.hidden, changed.num_latents) == ((7,), 2)
    assert changed.activation is jax.nn.silu
    assert changed.likelihood == LIKELIHOODS["gaussian"]
    assert mnist_vae.Config(encoder_hidden=(3, 4)).make_guide(changed, 10).hidden == (3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "none"}, "preset: expected one of flax, numpyro, .* got 'none'"),
        ({"likelihood": "poisson"}, "likelihood: expected one of bernoulli, .* got 'poisson'"),
        ({"activation": "cos"}, "activation: expected one of relu"),
        ({"objective": "Trace"}, "objective: expected one of Trace_ELBO"),
        ({"guide": "mean"}, "guide: expected one of mean-field, .* got 'mean'"),
        ({"guide": "per-datum", "batch_size": 5}, "batch_size: expected none with the guide per-d"),
        ({"schedule": "step"}, "schedule: expected one of constant, cosine, burda"),
        ({"num_epochs": 0}, "num_epochs: expected at least 1, got 0"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"clip_norm": -1.0}, "clip_norm: expected a positive number"),
        ({"kl_warm_up": 60.0}, "kl_warm_up: expected 0 to num_epochs = 50, got 60"),
        ({"num_particles": 0}, "num_particles: expected at least 1, got 0"),
        ({"beta": -1.0}, "beta: expected a finite number from 0, got -1"),
        ({"free_bits": float("inf")}, "free_bits: expected a finite number from 0, got inf"),
        ({"free_bits": 0.1, "beta": 2.0}, "got KLWeighted.* --free-bits 0.1"),
        ({"objective": "RenyiELBO", "kl_warm_up": 1.0}, "got RenyiELBO.* --kl-warm-up 1.0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mnist_vae.Config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": "flat"}, "prior: expected one of standard, learned, got 'flat'"),
        ({"num_embedded": 0}, "num_embedded: expected at least 1, got 0"),
        ({"preset": "none"}, "preset: expected one of"),
    ],
)
def test_impossible_settings_of_the_cvae_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mnist_cvae.Config(**settings)


def test_burdas_schedule():
    schedule = images.burda_schedule(1e-3, 3280)
    for i in range(8):
        first, last = (3**i - 1) // 2, (3 ** (i + 1) - 1) // 2 - 1
        for step in (first, last):
            assert float(schedule(step)) == pytest.approx(1e-3 * 10 ** (-i / 7))


def test_held_out_images_are_the_same_for_every_run():
    dataset = mnist_vae.Config(dataset="digits").data()
    model = mnist_vae.Config(dataset="digits").model(dataset)
    x = images.held_out(model, dataset.test)["x"]
    np.testing.assert_array_equal(x, images.held_out(model, dataset.test)["x"])
    assert set(np.unique(x)) == {0.0, 1.0}


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_pictures_are_on_the_scale_of_grey(name):
    model = vae.Model(likelihood=LIKELIHOODS[name])
    low, high = model.likelihood.low, model.likelihood.high
    np.testing.assert_allclose(
        pictures.to_grey(model, np.array([low, (low + high) / 2, high])), [0, 0.5, 1]
    )


@pytest.mark.parametrize("script", ["mnist_vae", "mnist_cvae"])
def test_the_command_line(script, tmp_path):
    def command(*arguments):
        path = ROOT / "experiments" / f"{script}.py"
        return subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True)

    shown = command("--help")
    assert shown.returncode == 0
    for name in ("--preset", "--kl-warm-up", "--num-samples", "--dtype", "--dataset"):
        assert name in shown.stdout
    refused = command("--num-epochs", "0", "--out", str(tmp_path / "run"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    assert "num_epochs: expected at least 1" in refused.stderr
