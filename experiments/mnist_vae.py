"""Train a variational autoencoder on MNIST, and say what it is worth.

    python experiments/mnist_vae.py --preset burda --num-epochs 100

The model is in ``models/vae.py``. What is reported as log-likelihood is one: importance sampling
with the guide as the proposal, on test images that neither training nor any choice has seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from experiments import images, pictures
from experiments.runs import command_line
from models import vae

# Log-likelihoods of the same sizes: test set, dynamic binarisation, nats per image.
PUBLISHED = {"burda": (-86.76, "Burda et al. 2016, table 1 (k = 1, 5000 samples)")}


@dataclass(frozen=True)
class Config(images.Config):
    """Settings of the variational autoencoder of images."""

    presets: ClassVar[Mapping[str, Any]] = vae.PRESETS


def main(config: Config) -> dict[str, Any]:
    """Train a variational autoencoder on images."""
    dataset = config.data(labels=False)
    return images.run(
        "mnist_vae",
        config,
        dataset,
        config.model(dataset),
        draw=draw,
        published=PUBLISHED.get(config.preset) if dataset.name == "mnist" else None,
    )


def draw(
    result: dict[str, Any],
    model: Any,
    guide: Any,
    fitted: Any,
    test: dict[str, Any],
    directory: Path,
) -> None:
    """The figures of a run."""
    params, name = images.of_seed(fitted.params, 0), result["dataset"]
    per_dim = result["kl_per_dim"]["estimate"]
    pictures.draw_elbo(fitted, result, directory / "elbo.png")
    pictures.draw_reconstructions(
        model, guide, params, test, name, directory / "reconstructions.png"
    )
    pictures.draw_samples(model, params, name, directory / "samples.png")
    pictures.draw_latents(model, params, per_dim, name, directory / "latents.png")
    pictures.draw_interpolations(model, guide, params, test, name, directory / "interpolations.png")


if __name__ == "__main__":
    command_line(main, Config)
