"""Train a variational autoencoder on MNIST, and say what it is worth.

    python experiments/mnist_vae.py --preset burda --num-epochs 100

The model is in ``models/vae.py``. What is reported as log-likelihood is one: importance sampling
with the guide as the proposal, on test images that neither training nor any choice has seen.
"""

from dataclasses import dataclass
from typing import Any

from experiments import images
from experiments.runs import command_line

# Log-likelihoods of the same sizes: test set, dynamic binarisation, nats per image.
PUBLISHED = {"burda": (-86.76, "Burda et al. 2016, table 1 (k = 1, 5000 samples)")}


@dataclass(frozen=True)
class Config(images.Config):
    """Settings of the variational autoencoder of images."""


def main(config: Config) -> dict[str, Any]:
    """Train a variational autoencoder on images."""
    return images.run("mnist_vae", config, PUBLISHED)


if __name__ == "__main__":
    command_line(main, Config)
