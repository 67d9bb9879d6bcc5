"""What the exact sum over labels costs: M2 beside the same sizes with the label given.

    python experiments/benchmarks/semi.py

``fit`` trains both programs on random images of MNIST's shape: 784-500-50, 10 labels, batches of
200. The supervised one is a conditional VAE, ``vae.Model(Labels(10))``. The other one is M2,
``semi_supervised.Model`` with ``TraceEnum_ELBO``, and no image has a label. It visits every label
of every image, and does so too where a label is known.

A step is all that ``fit`` does: take a batch, binarise it, compute the gradient, apply Adam. The
column of GFLOP is the gradient of one batch alone. XLA counts the operations of that program before
it compiles it. The quotient divides the ratio of times by the ratio of operations. It is 1 if the
sum costs only its arithmetic.

With ``--pyro-python`` two more rows have M2 in Pyro, by ``semi_pyro.py``. That Python needs PyTorch
and pyro-ppl. The column "to fit" is the ratio to the enumerated step of ``fit``.

Contestants run in turn, round after round. Numbers are medians without compilation. Absolute times
hold for this machine alone.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import random
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO
from tabulate import tabulate

from experiments.benchmarks.speed import Timing, by_fit, in_turn
from experiments.settings import check_least
from inference.sites import trace_of
from models import guides, semi_supervised, vae
from models.conditions import Labels
from models.labels import UNKNOWN
from models.networks import softplus

NUM_CLASSES = 10
SUPERVISED, ENUMERATED = "supervised step", "enumerated step"
PYRO = {  # by row, what ``semi_pyro.py`` is told
    "enumerated step, Pyro, like its example": (),
    "enumerated step, Pyro, the same arithmetic": ("--same-arithmetic",),
}


@dataclass(frozen=True)
class Config:
    """Time M2 with its sum over labels, beside a VAE that is given the label.

    Attributes:
        hidden: Units of the hidden layer of every network.
        num_latents: Dimensions of z.
        num_images: Number of random images.
        batch_size: Images per step.
        supervised_steps: Steps of the VAE that is given the label.
        enumerated_steps: Steps of M2.
        rounds: How often each contestant runs.
        pyro_python: Path of a Python with PyTorch and pyro-ppl, for the rows of Pyro. Default: no
            such rows.
    """

    hidden: int = 500
    num_latents: int = 50
    num_images: int = 60_000
    batch_size: int = 200
    supervised_steps: int = 200
    enumerated_steps: int = 30
    rounds: int = 9
    pyro_python: Path | None = None

    def __post_init__(self):
        check_least(1, self, "hidden", "num_latents", "batch_size", "rounds")
        check_least(1, self, "supervised_steps", "enumerated_steps")
        check_least(self.batch_size, self, "num_images")


@dataclass(frozen=True)
class Training:
    """What ``fit`` takes.

    Attributes:
        model, guide: the programs.
        objective: what is minimised.
        data: arrays by name, grey images among them.
        num_steps: steps of one round.
    """

    model: Any
    guide: Any
    objective: Any
    data: dict[str, np.ndarray]
    num_steps: int

    def contestant(self, batch_size: int) -> Callable[[], Timing]:
        """``fit``, timed."""
        return by_fit(
            self.model,
            self.guide,
            self.data,
            objective=self.objective,
            preprocess=self.model.prepare,
            num_steps=self.num_steps,
            batch_size=batch_size,
        )

    def operations(self, batch_size: int) -> float:
        """The operations of one gradient, as XLA counts them. Nothing is compiled.

        A matrix product of (n, k) and (k, m) is 2 n k m of them.
        """

        def batch() -> dict[str, Any]:
            grey = {name: jnp.asarray(array[:batch_size]) for name, array in self.data.items()}
            return self.model.prepare(random.key(0), grey)

        def params(batch: dict[str, Any]) -> dict[str, Any]:
            found = {}
            for program in (self.guide, self.model):
                sites = trace_of(program, random.key(0), {}, **batch).items()
                found |= {name: site["value"] for name, site in sites if site["type"] == "param"}
            return found

        def loss(params: Any, batch: dict[str, Any]) -> Any:
            return self.objective.loss(random.key(0), params, self.model, self.guide, **batch)

        shapes = jax.eval_shape(batch)
        gradient = jax.jit(jax.value_and_grad(loss))
        counted: Any = gradient.lower(jax.eval_shape(params, shapes), shapes).cost_analysis()
        return counted["flops"]


def trainings(config: Config) -> dict[str, Training]:
    """Both programs, on the same images."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (config.num_images, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, NUM_CLASSES, len(x), dtype=np.int32)
    unknown = np.full(len(x), UNKNOWN, np.int32)
    sizes: Any = {
        "num_latents": config.num_latents,
        "hidden": (config.hidden,),
        "activation": softplus,
    }
    given = vae.Model(Labels(NUM_CLASSES), **sizes)
    m2 = semi_supervised.Model(num_classes=NUM_CLASSES, **sizes)
    return {
        SUPERVISED: Training(
            given,
            guides.mean_field(given),
            Trace_ELBO(),
            {"x": x, "c": labels},
            config.supervised_steps,
        ),
        ENUMERATED: Training(
            m2,
            semi_supervised.Guide(m2),
            TraceEnum_ELBO(max_plate_nesting=1),
            {"x": x, "y": unknown},
            config.enumerated_steps,
        ),
    }


def by_pyro(config: Config, options: Sequence[str]) -> Callable[[], Timing]:
    """A contestant: ``semi_pyro.py`` in another process. It has as many threads as JAX."""
    settings = {
        "hidden": config.hidden,
        "num-latents": config.num_latents,
        "num-images": config.num_images,
        "batch-size": config.batch_size,
        "num-steps": config.enumerated_steps,
        "threads": len(os.sched_getaffinity(0)),
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    command: list[str] = [str(config.pyro_python), str(Path(__file__).with_name("semi_pyro.py"))]

    def run() -> Timing:
        done = subprocess.run(
            [*command, *words, *options], stdout=subprocess.PIPE, text=True, check=True
        )
        return 0.0, float(done.stdout) * config.enumerated_steps

    return run


def measure(config: Config) -> str:
    """Runs all contestants in turn, and returns the table of medians."""
    known = trainings(config)
    contestants = {
        name: (training.contestant(config.batch_size), training.num_steps)
        for name, training in known.items()
    }
    if config.pyro_python is not None:
        for name, options in PYRO.items():
            contestants[name] = by_pyro(config, options), config.enumerated_steps
    operations = {name: training.operations(config.batch_size) for name, training in known.items()}
    timings = in_turn(contestants, config.rounds)
    rows = []
    for name in contestants:
        ratio, to_fit = (timings.ratio(name, base) for base in (SUPERVISED, ENUMERATED))
        row = [name, f"{timings.step(name) / 1e3:.1f}", f"{ratio:.2f}", f"{to_fit:.2f}"]
        if name in operations:
            more = operations[name] / operations[SUPERVISED]
            row += [f"{operations[name] / 1e9:.2f}", f"{more:.2f}", f"{ratio / more:.2f}"]
        rows.append(row)
    headers = ("", "ms per step", "ratio", "to fit", "GFLOP", "ratio of GFLOP", "quotient")
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def main(config: Config) -> None:
    """Prints the table."""
    print(f"{jax.devices()[0].device_kind}, {config.rounds} rounds, medians\n")
    sizes = f"784-{config.hidden}-{config.num_latents}"
    print(f"M2 {sizes}, {NUM_CLASSES} labels, batch {config.batch_size} of {config.num_images:,}")
    print(measure(config))


if __name__ == "__main__":
    main(tyro.cli(Config))
