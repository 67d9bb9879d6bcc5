"""Train a conditional variational autoencoder on MNIST digits given their label.

    python experiments/mnist_cvae.py --preset burda --num-epochs 100

The model is the one of ``models/vae.py``, given a label. Beside the numbers of
``experiments/mnist_vae.py``, the log-likelihood of every test image is estimated under every
label. The true label can tell at most log 10 nats. The label of the greatest likelihood classifies.
"""

from dataclasses import dataclass
from typing import Any

from experiments import images
from experiments.runner import run
from experiments.settings import command_line


@dataclass(frozen=True)
class Config(images.LabelConfig):
    """Settings of the conditional variational autoencoder of images given their label."""


EXPERIMENT = images.experiment("mnist_cvae", Config)


def main(config: Config) -> dict[str, Any]:
    """Train a conditional variational autoencoder on images given their label."""
    return run(EXPERIMENT, config)


if __name__ == "__main__":
    command_line(main, Config)
