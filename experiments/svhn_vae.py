"""Train a convolutional Gaussian variational autoencoder on house numbers (SVHN).

    python experiments/svhn_vae.py --num-train 5000 --num-epochs 20

The model is in ``models/vae.py``, its convolutions in ``models/networks.py``. The preset's
likelihood has identity covariance on [-1, 1]. Its log-density cannot exceed -2823 nats. On the
scale of the grey levels that is 8.32 bits per dimension. The stored image has only 8. Likelihoods
that learn a scale or a distribution over the levels do far better (``--likelihood
gaussian-one-scale``, ``gaussian``, ``discretized-logistic``). Bits per dimension compare them all.
"""

from dataclasses import dataclass
from typing import Any

from experiments import images
from experiments.datasets import Dataset, Record
from experiments.runner import run
from experiments.settings import command_line
from models import vae


@dataclass(frozen=True)
class Config(images.LabelConfig):
    """Settings of the convolutional variational autoencoder of colour images.

    Attributes:
        given_label: Whether the images are given their label.
    """

    dataset: str = "svhn"
    preset: str = "svhn"
    num_epochs: int = 20
    num_samples: int = 100
    num_label_samples: int = 10
    given_label: bool = False

    def data(self) -> Dataset:
        """Colour images, with their labels if these are given."""
        return super().data() if self.given_label else images.Config.data(self)

    def model(self, record: Record) -> vae.Model:
        """The preset, with the settings that were given."""
        return super().model(record) if self.given_label else images.Config.model(self, record)


EXPERIMENT = images.experiment("svhn_vae", Config)


def main(config: Config) -> dict[str, Any]:
    """Train a convolutional variational autoencoder on colour images."""
    return run(EXPERIMENT, config)


if __name__ == "__main__":
    command_line(main, Config)
