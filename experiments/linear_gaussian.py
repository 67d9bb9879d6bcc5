"""Fit the linear-Gaussian model to images by stochastic gradients, and compare with exact answers.

    python experiments/linear_gaussian.py --num-latents 20 --num-steps 6000

The model and its formulas are in ``models/linear_gaussian.py``: the greatest likelihood of exactly
these images, and the least loss of each guide. Each guide is trained twice.

1. With the model. Every family that contains the Gaussians with independent dimensions must reach
   the maximum of the likelihood, because the model can rotate its latent axes.
2. With the model held. It is the model that the first guide has learnt, rotated at random. The
   rotation keeps the likelihood. Full covariance loses nothing there, and mean field its known gap.

The training uses nothing of the solution. ``result.json`` has every number beside its target.
Stochastic gradients get there for three reasons:

- The images are shifted by the mean of the *test* images. So the encoders' inputs are nearly
  centred. The shift changes no density but its place, and b has still to be found.
- Adam forgets the gradients of the first steps (``b2`` = 0.99), and its steps grow over the first
  tenth of the run. With sigma held, the first gradients are a thousand times the later ones.
- The learning rate then falls to zero along a cosine, and the last part of the path is averaged.

The ELBO of a batch varies by several nats, more than the effects. So the traces show the ELBO of
all images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import random
from jaxtyping import Float
from tabulate import tabulate

from experiments.datasets import Record, in_memory, load, pieces
from experiments.datasets import first as first_rows
from experiments.experiment import Data, DataTree, Experiment, Figure, Fits
from experiments.runner import number, run
from experiments.settings import Machines, check_fraction, check_least, check_positive, command_line
from inference import Estimate, Fit, Held, pointwise_elbo, to_datatree
from models import guides, linear_gaussian
from models.conditions import Labels

# The least gap of each family for a model's parameters, or None if it has no formula.
GAPS: dict[str, Callable[[Mapping[str, Any]], float] | None] = {
    "full-covariance": lambda params: 0.0,
    "mean-field": lambda params: float(linear_gaussian.mean_field_gap(params)),
    "low-rank": None,
    "flow": None,
}
NUM_EVALUATIONS = 20  # How often the ELBO of all images is evaluated during a training.
BATCH = 1_000  # Images that are judged together.


@dataclass(frozen=True)
class Config(Machines):
    """Settings of the linear-Gaussian model of images.

    Attributes:
        dataset: Data set: mnist, svhn, digits, the path of your own .npz or .npy file, or auto.
            auto is MNIST if it can be loaded, and else digits.
        data_dir: Directory with the data set's files, compressed or not, to read offline.
        num_train: Number of training images, the first ones. Default: all.
        given_label: Whether the images are given their label.
        num_latents: Dimensions of z.
        guides: Families of guides, among full-covariance, mean-field, low-rank and flow. The
            model of the first is held.
        num_steps: Steps of the optimiser in each fit.
        batch_size: Images per step. Default: 500, or all images if there are fewer.
        learning_rate: Greatest learning rate of Adam, after a tenth of the run. It falls to zero
            along a cosine.
        average: Fraction of the run, at its end, over which parameters are averaged.
        num_samples: Draws of z per image, to judge the ELBO.
        num_seeds: Number of restarts. They are trained together.
        seed: Random seed of the first restart.
        out: Directory of the run. Default: a new one in runs/.
        progress: Whether to show progress bars.
    """

    dataset: str = "auto"
    data_dir: Path | None = None
    num_train: int | None = None
    given_label: bool = False
    num_latents: int = 10
    guides: tuple[str, ...] = ("full-covariance", "mean-field")
    num_steps: int = 4_000
    batch_size: int | None = None
    learning_rate: float = 5e-3
    average: float = 0.1
    num_samples: int = 5
    num_seeds: int = 1
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.guides or len(set(self.guides)) < len(self.guides):
            raise ValueError(f"guides: expected different ones, at least one, got {self.guides}")
        for name in self.guides:
            if name not in GAPS:
                raise ValueError(f"guides: expected some of {', '.join(GAPS)}, got {name!r}")
        check_least(1, self, "num_train", "num_latents", "num_steps", "batch_size")
        check_least(1, self, "num_samples", "num_seeds")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate")
        check_fraction(self, "average")

    def model(self, record: Record) -> linear_gaussian.Model:
        """The model of these images."""
        condition = Labels(record.num_classes or 0) if self.given_label else None
        return linear_gaussian.Model(record.x_shape, self.num_latents, condition)


# --- data, programs, training ---------------------------------------------------------------------


def images(config: Config) -> Data:
    """The grey levels less the mean of the test images, and perhaps labels."""
    dataset = load(
        config.dataset, data_dir=config.data_dir, num_validation=0, progress=config.progress
    )
    dataset = replace(
        dataset,
        train=in_memory(
            first_rows(dataset.train, list(dataset.train), config.num_train), "num_train"
        ),
    )
    x, test = dataset.train["x"], dataset.test["x"]
    white = np.float32(255 if x.dtype == np.uint8 else 1)
    total = sum(piece.sum(0, dtype=np.float64) for _, piece in pieces(test))
    shift = (total / len(test) / white).astype(np.float32)
    data = {"x": x.astype(np.float32) / white - shift}
    if config.given_label:
        if dataset.num_classes is None:
            raise ValueError(
                f"dataset: expected labels, and {dataset.name} has none; add them to the file as "
                f"c, or leave out --given-label"
            )
        data["c"] = dataset.train["c"]
    maximum, _ = linear_gaussian.maximum_likelihood(config.model(dataset.record), data)
    return Data(dataset.record, data, maximum)


def programs(config: Config, record: Record, name: str, fits: Fits) -> tuple[Any, Any]:
    """The model and its guide. ``held/...`` has the model held that the first fit has learnt."""
    (kind, guide), model = name.split("/"), config.model(record)
    program = (
        model if kind == "trained" else hold(model, fits[first(config)].params_of(0), config.seed)
    )
    return program, guides.make(guide, model)


def first(config: Config) -> str:
    """The name of the first fit."""
    return f"trained/{config.guides[0]}"


def hold(model: linear_gaussian.Model, params: Mapping[str, Any], seed: int) -> Held:
    """The model with its parameters held and z rotated at random.

    z -> R z changes neither p(z) nor, with W -> W R, p(x | c).
    """
    names = ("W", "b", "sigma") + ("B",) * (model.condition is not None)
    held = {name: np.asarray(params[name]) for name in names}
    noise = np.random.default_rng(seed).normal(size=(model.num_latents, model.num_latents))
    held["W"] = (held["W"] @ np.linalg.qr(noise)[0]).astype(np.float32)
    return Held(model, held)


def training(config: Config, data: Data, name: str, fits: Fits) -> dict[str, Any]:
    """The settings of ``fit``, the same for every fit."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.num_steps // 10, config.num_steps
    )
    return {
        "optimizer": optax.adam(schedule, b2=0.99),
        "num_steps": config.num_steps,
        "batch_size": config.batch_size or min(500, len(data.train["x"])),
        "num_seeds": config.num_seeds,
        "seed": config.seed,
        "average": config.average,
        "validation": data.train,  # the same: the trace of the ELBO of all images
        "validate_every": max(1, config.num_steps // NUM_EVALUATIONS),
    }


# --- judging --------------------------------------------------------------------------------------


def log_likelihood(
    model: linear_gaussian.Model, params: Mapping[str, Any], data: Mapping[str, np.ndarray]
) -> Float[np.ndarray, " N"]:
    """The exact log p(x | c) of every image, a part of them at a time."""
    compiled = jax.jit(lambda batch: linear_gaussian.log_likelihood(model, params, batch))
    starts = range(0, len(data["x"]), BATCH)
    parts = [compiled({n: a[start : start + BATCH] for n, a in data.items()}) for start in starts]
    return np.concatenate(parts).astype(np.float64)


def params_of(fitted: Fit, seed: int) -> dict[str, Any]:
    """The parameters of one seed, with those that are held."""
    held = fitted.model.params if isinstance(fitted.model, Held) else {}
    return fitted.params_of(seed) | held


def judge(config: Config, data: Data, fits: Fits) -> dict[str, tuple[Estimate, Estimate]]:
    """By fit, the ELBO and the exact log-likelihood of every seed and image."""
    model, key, judged = config.model(data.record), random.key(config.seed), {}
    for name, fitted in fits.items():
        elbo = pointwise_elbo(
            fitted, data.train, key=key, num_samples=config.num_samples, batch_size=BATCH
        )
        params = [params_of(fitted, i) for i in range(fitted.num_seeds)]
        exact = np.stack([log_likelihood(model, own, data.train) for own in params])
        judged[name] = elbo, Estimate("log_likelihood", exact, 0, elbo.data)
    return judged


def summarize(config: Config, data: Data, fits: Fits, judged: Any) -> dict[str, Any]:
    """The numbers of ``result.json``, each beside its target."""
    best = log_likelihood(config.model(data.record), data.maximum, data.train)
    rows = {}
    for name, (elbo, exact) in judged.items():
        gap = GAPS[name.split("/")[1]]
        params = [params_of(fits[name], i) for i in range(config.num_seeds)]
        rows[name] = {
            "elbo": number(elbo),
            "log_likelihood": number(exact),
            "below_maximum": number(replace(elbo, pointwise=best - elbo.pointwise)),
            "gap": number(replace(elbo, pointwise=exact.pointwise - elbo.pointwise)),
            "best_gap": None if gap is None else float(np.mean([gap(own) for own in params])),
            "sigma": float(np.mean([own["sigma"] for own in params])),
        }
    maximum = number(Estimate("log_likelihood", best[None], 0, {}))
    return {
        "elbo": rows[first(config)]["elbo"],
        "log_likelihood": rows[first(config)]["log_likelihood"],
        "maximum": {"log_likelihood": maximum, "sigma": float(data.maximum["sigma"])},
        "fits": rows,
    }


def tree(config: Config, data: Data, fits: Fits, judged: Any) -> DataTree:
    """The first fit. The others are in groups of their names, ``tree["held/mean-field"]``."""
    whole = to_datatree(fits[first(config)], *judged[first(config)])
    for name in [name for name in fits if name != first(config)]:
        whole[name] = to_datatree(fits[name], *judged[name])
    return whole


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it: each number beside its target."""
    rows, maximum = [], result["maximum"]["log_likelihood"]
    for name, row in result["fits"].items():
        kind, guide = name.split("/")
        gap, below = row["gap"], row["below_maximum"]
        rows.append(
            (
                guide,
                kind,
                f"{row['elbo']['estimate']:.3f}",
                f"{below['estimate']:.3f} +- {below['standard_error']:.3f}",
                f"{row['log_likelihood']['estimate']:.3f}",
                f"{maximum['estimate']:.3f}",
                f"{gap['estimate']:.3f} +- {gap['standard_error']:.3f}",
                "no formula" if row["best_gap"] is None else f"{row['best_gap']:.3f}",
            )
        )
    headers = ("guide", "model", "ELBO", "below maximum", "log-likelihood", "maximum")
    headers += ("gap", "best gap")
    body = tabulate(rows, headers, disable_numparse=True, colalign=("left",) * 2 + ("right",) * 6)
    config = result["config"]
    seeds = f"{config['num_seeds']} seed" + "s" * (config["num_seeds"] > 1)
    return (
        f"{body}\n\n"
        f"Nats per datum. Log-likelihood: exact, of the fitted model. Maximum: its closed form, of "
        f"these images.\nAs an estimate for others of their kind it has a standard error of "
        f"{maximum['standard_error']:.3f}. Gap: log-likelihood - ELBO.\n"
        f"Best gap: the least that any guide of the family has for this model, in closed form.\n"
        f"{result['num_data']['train']} images of {result['dataset']}, {config['num_latents']} "
        f"latents, {seeds}, {config['num_steps']} steps"
    )


# --- figures --------------------------------------------------------------------------------------


def figures(
    config: Config, data: Data, fits: Fits, judged: Any, result: dict[str, Any]
) -> dict[str, Figure]:
    """The figures of a run."""
    return {"elbo": elbo_figure(fits, result)}


def elbo_figure(fits: Fits, result: Mapping[str, Any]) -> Figure:
    """The ELBO of all images during the training, with the maximum and the predicted levels."""
    from matplotlib.figure import Figure

    titles = {"trained": "Model trained with the guide", "held": "Model held, latent axes rotated"}
    maximum = result["maximum"]["log_likelihood"]["estimate"]
    lowest = min(row["elbo"]["estimate"] for row in result["fits"].values())
    room = max(0.5, 3 * (maximum - lowest))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.axhline(maximum, color="black", ls="--", lw=1.2, label="maximum of the likelihood")
        for i, guide in enumerate(result["config"]["guides"]):
            row, fitted, color = result["fits"][f"{kind}/{guide}"], fits[f"{kind}/{guide}"], f"C{i}"
            traces, steps = np.array(fitted.validation_elbo), fitted.info["validation_steps"]
            for j, trace in enumerate(traces):
                axes.plot(steps, trace, "o-", color=color, ms=3, lw=1, label=None if j else guide)
            if kind == "held" and row["best_gap"] is not None:
                level = row["log_likelihood"]["estimate"] - row["best_gap"]
                axes.axhline(level, color=color, ls=":", lw=1.6, label=f"{guide}: log p - best gap")
        axes.set(
            title=title,
            xlabel="training (steps)",
            ylabel="ELBO of all images (nats per datum)",
            ylim=(maximum - room, maximum + 0.15 * room),
        )
        axes.legend(loc="lower right", fontsize="small")
    return figure


EXPERIMENT = Experiment(
    name="linear_gaussian",
    config=Config,
    data=images,
    programs=programs,
    training=training,
    judge=judge,
    summarize=summarize,
    tree=tree,
    figures=figures,
    table=table,
    names=lambda config: [f"{kind}/{g}" for kind in ("trained", "held") for g in config.guides],
    main=first,
)


def main(config: Config) -> dict[str, Any]:
    """Fit the linear-Gaussian model to images, and compare it with its formulas."""
    return run(EXPERIMENT, config)


if __name__ == "__main__":
    command_line(main, Config)
