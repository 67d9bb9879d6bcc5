"""Train a conditional variational autoencoder on MNIST digits given their label.

    python experiments/mnist_cvae.py --preset burda --num-epochs 100

The model is in ``models/cvae.py``. Beside what ``experiments/mnist_vae.py`` reports, every test
image's log-likelihood is estimated under every label. The true one can tell at most log 10 nats,
and the label of the greatest likelihood classifies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jax import random

from experiments import images, pictures
from experiments.runs import command_line
from inference import label_check
from models import cvae
from models.conditions import Labels


@dataclass(frozen=True)
class Config(images.Config):
    """Settings of the conditional variational autoencoder of images given their label.

    Attributes:
        prior: standard, or learned for a prior network that sees the label.
        num_embedded: length of a learned vector that stands for a label; one-hot unless given.
        num_label_samples: importance samples per test image and label, for the check of labels.
    """

    prior: str = "standard"
    num_embedded: int | None = None
    num_label_samples: int = 100

    presets: ClassVar[Mapping[str, Any]] = cvae.PRESETS

    def __post_init__(self):
        super().__post_init__()
        if self.prior not in ("standard", "learned"):
            raise ValueError(f"prior: expected standard or learned, got {self.prior!r}")
        for name in ("num_embedded", "num_label_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


def main(config: Config) -> dict[str, Any]:
    """Train a conditional variational autoencoder on images given their label."""
    dataset = config.data(labels=True)
    num_classes = dataset.num_classes or 0
    model = config.model(
        dataset,
        condition=Labels(num_classes, config.num_embedded),
        prior_hidden=() if config.prior == "learned" else None,
    )

    def check_labels(model: Any, guide: Any, params: Any, test: Any) -> dict[str, Any]:
        check = label_check(
            model,
            guide,
            params,
            test,
            num_classes,
            key=random.key(config.seed),
            num_samples=config.num_label_samples,
            progress=config.progress,
        )
        return {
            "labels": {
                "information": images.estimate([check.information]),
                "greatest_information": float(np.log(num_classes)),
                "accuracy": images.estimate([check.accuracy]),
            }
        }

    return images.run("mnist_cvae", config, dataset, model, draw=draw, more=check_labels)


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
    labels = np.arange(model.condition.num_classes, dtype=test["c"].dtype)
    per_dim = result["kl_per_dim"]["estimate"]
    pictures.draw_elbo(fitted, result, directory / "elbo.png")
    pictures.draw_reconstructions(
        model, guide, params, test, name, directory / "reconstructions.png"
    )
    pictures.draw_samples(model, params, name, directory / "samples.png", labels)
    pictures.draw_latents(model, params, per_dim, name, directory / "latents.png", labels[-1])
    pictures.draw_interpolations(model, guide, params, test, name, directory / "interpolations.png")


if __name__ == "__main__":
    command_line(main, Config)
