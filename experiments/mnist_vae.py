"""Train a variational autoencoder on MNIST, and judge it.

    python experiments/mnist_vae.py --preset burda --num-epochs 100

The model is in ``models/vae.py``. The log-likelihood is estimated by importance sampling from the
guide. The test images are used for nothing else.
"""

from dataclasses import dataclass
from typing import Any

from experiments import images
from experiments.runner import run
from experiments.settings import command_line

# Log-likelihoods of the same sizes: test set, dynamic binarisation, nats per image.
PUBLISHED = {"burda": (-86.76, "Burda et al. 2016, table 1 (k = 1, 5000 samples)")}


@dataclass(frozen=True)
class Config(images.Config):
    """Settings of the variational autoencoder of images."""


EXPERIMENT = images.experiment("mnist_vae", Config, PUBLISHED)


def main(config: Config) -> dict[str, Any]:
    """Train a variational autoencoder on images."""
    return run(EXPERIMENT, config)


if __name__ == "__main__":
    command_line(main, Config)
