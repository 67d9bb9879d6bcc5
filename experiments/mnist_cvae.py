"""Train a conditional variational autoencoder on MNIST digits given their label.

    python experiments/mnist_cvae.py --preset burda --num-epochs 100

The model is in ``models/cvae.py``. Beside what ``experiments/mnist_vae.py`` reports, every test
image's log-likelihood is estimated under every label. The true one can tell at most log 10 nats,
and the label of the greatest likelihood classifies.
"""

from dataclasses import dataclass
from typing import Any

from experiments import images
from experiments.runs import command_line


@dataclass(frozen=True)
class Config(images.LabelConfig):
    """Settings of the conditional variational autoencoder of images given their label."""


def main(config: Config) -> dict[str, Any]:
    """Train a conditional variational autoencoder on images given their label."""
    return images.run("mnist_cvae", config)


if __name__ == "__main__":
    command_line(main, Config)
