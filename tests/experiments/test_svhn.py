"""The script on colour images, run for real on small ones."""

import numpy as np
import pytest

from experiments import svhn_vae
from models.likelihoods import LIKELIHOODS

SMALL = {
    "channels": (4, 6),
    "hidden": (8,),
    "num_latents": 3,
    "num_epochs": 1,
    "batch_size": 20,
    "num_samples": 4,
    "num_label_samples": 2,
    "progress": False,
}


@pytest.fixture
def colours(tmp_path, rng):
    """Images of 8 x 12 pixels, of one of three colours each, and the colour's number."""
    c = rng.integers(3, size=72)
    x = rng.integers(0, 60, (72, 8, 12, 3))
    x[np.arange(72), :, :, c] += 150
    np.savez(tmp_path / "colours.npz", x=x.astype(np.uint8), c=c)
    return str(tmp_path / "colours.npz")


def run(out, **settings):
    return svhn_vae.main(svhn_vae.Config(**SMALL | settings, out=out))


def test_identity_covariance_has_its_bound(colours, tmp_path):
    result = run(tmp_path / "run", dataset=colours)
    assert result["dataset"] == "colours.npz"
    likelihood, bits = (result["test"][name] for name in ("log_likelihood", "bits_per_dim"))
    num_dims = 8 * 12 * 3
    assert likelihood["num_samples"] == 4
    assert likelihood["estimate"] < -num_dims * np.log(2 * np.pi) / 2
    # x lies on [-1, 1], 256 levels over two units
    expected = -likelihood["estimate"] / num_dims / np.log(2) + np.log2(128)
    assert bits["estimate"] == pytest.approx(expected)
    assert bits["estimate"] > np.log2(2 * np.pi) / 2 + 7
    for name in ("elbo", "reconstructions", "samples", "latents", "interpolations"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 1000


def test_given_the_label(colours, tmp_path, capsys):
    result = run(tmp_path / "run", dataset=colours, given_label=True, likelihood="gaussian")
    assert result["labels"]["greatest_information"] == pytest.approx(np.log(3))
    assert "argmax p(x | c)" in capsys.readouterr().out


@pytest.mark.parametrize("given_label", [False, True])
def test_the_preset(given_label, colours):
    config = svhn_vae.Config(dataset=colours, given_label=given_label, channels=(16, 32))
    model = config.model(config.data())
    assert (model.x_shape, model.num_latents, model.channels) == ((8, 12, 3), 32, (16, 32))
    assert model.likelihood.low == -1
    assert hasattr(model, "condition") == given_label
    other = svhn_vae.Config(dataset=colours, channels=(4,), likelihood="discretized-logistic")
    assert other.model(other.data()).likelihood == LIKELIHOODS["discretized-logistic"]


def test_a_side_that_the_convolutions_do_not_halve(colours, tmp_path):
    with pytest.raises(ValueError, match=r"sides that 8 divides, .* got \(8, 12, 3\)"):
        run(tmp_path / "run", dataset=colours, channels=(4, 4, 4))
    assert not (tmp_path / "run").exists()
