"""Fit the linear-Gaussian model to images by stochastic gradients, beside what is exactly true.

    python experiments/linear_gaussian.py --num-latents 20 --num-steps 6000

The model and what is known of it are in ``models/linear_gaussian.py``: the greatest likelihood of
exactly these images, and what each guide must lose. Each guide is trained twice.

1. Together with the model. Every family that holds a Gaussian with independent dimensions must
   arrive at the maximum of the likelihood, for the model is free to turn its latent axes to where
   that guide is exact.
2. To a model that is held: what the first guide has learnt, its latent axes turned at random, so
   that the likelihood is the same. There the guide with full covariance must lose nothing, and the
   mean-field guide just its gap.

Nothing of the solution is used in the training, and ``result.json`` has every number with what it
should be. Stochastic gradients arrive because

- the images are shifted by the mean of the *test* images, so that the encoders' inputs are nearly
  centred. It changes no density but where it lies, and b has still to be found;
- Adam forgets the gradients of the first steps, which are a thousand times the later ones where
  sigma is held (``b2`` = 0.99), and its steps grow over the first tenth of the run;
- the learning rate then falls to zero along a cosine, and the last part of the path is averaged.

A batch's ELBO varies by several nats, more than what is to be seen: the traces are those of the
ELBO of all the images.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import random
from jaxtyping import Float
from tabulate import tabulate

from experiments.datasets import load
from experiments.pictures import of_seed
from experiments.runs import Run, check_least, check_positive, command_line, import_ahead
from inference import Fit, Held, fit, pointwise_elbo, to_datatree
from models import guides, linear_gaussian
from models.conditions import Labels

# The best gap of each family for a model's parameters, or None where it has no formula.
GAPS: dict[str, Callable[[Mapping[str, Any]], float] | None] = {
    "full-covariance": lambda params: 0.0,
    "mean-field": lambda params: float(linear_gaussian.mean_field_gap(params)),
    "low-rank": None,
    "flow": None,
}
NUM_EVALUATIONS = 20  # of the ELBO of all images, along the training


@dataclass(frozen=True)
class Config:
    """Settings of the linear-Gaussian model of images.

    Attributes:
        dataset: mnist, svhn, digits, the path of a user's own .npz or .npy, or auto for MNIST
            where it can be had and digits elsewhere.
        data_dir: directory with the data set's files, compressed or not, to read offline.
        num_train: the first so many of the training images; all unless given.
        given_label: whether the images are given their label.
        num_latents: dimensions of z.
        guides: full-covariance, mean-field, low-rank, flow; the first one's model is held.
        num_steps: steps of the optimiser, of each of the fits.
        batch_size: images per step; 500, or all there are if fewer, unless given.
        learning_rate: Adam's greatest, after a tenth of the run; it falls to zero along a cosine.
        average: fraction of the run, at its end, over which parameters are averaged.
        num_samples: draws of z per image, to judge the ELBO.
        num_seeds: restarts trained together.
        seed: of the first restart.
        out: directory of the run; a fresh one under runs/ unless given.
        progress: whether to show progress bars.
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
        if not self.guides or len(set(self.guides)) < len(self.guides):
            raise ValueError(f"guides: expected different ones, at least one, got {self.guides}")
        for name in self.guides:
            if name not in GAPS:
                raise ValueError(f"guides: expected some of {', '.join(GAPS)}, got {name!r}")
        check_least(1, self, "num_train", "num_latents", "num_steps", "batch_size")
        check_least(1, self, "num_samples", "num_seeds")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate")
        if not 0 <= self.average < 1:
            raise ValueError(f"average: expected a fraction below 1, got {self.average}")

    def data(self) -> tuple[dict[str, np.ndarray], linear_gaussian.Model, str]:
        """Grey levels less the test images' mean, their model, and what they are called."""
        dataset = load(
            self.dataset, data_dir=self.data_dir, num_validation=0, progress=self.progress
        )
        x, test = dataset.train["x"][: self.num_train], dataset.test["x"]
        white = np.float32(255 if x.dtype == np.uint8 else 1)
        shift = (test.mean(0, dtype=np.float64) / white).astype(np.float32)
        data = {"x": x.astype(np.float32) / white - shift}
        condition = None
        if self.given_label:
            if dataset.num_classes is None:
                raise ValueError(
                    f"dataset: expected labels, and {dataset.name} has none; add them to the file "
                    f"as c, or leave out --given-label"
                )
            data["c"] = dataset.train["c"][: self.num_train]
            condition = Labels(dataset.num_classes)
        model = linear_gaussian.Model(dataset.x_shape, self.num_latents, condition)
        return data, model, dataset.name


def train(
    config: Config,
    model: Callable[..., None],
    guide: Callable[..., None],
    data: dict[str, np.ndarray],
    checkpoint: Path | None = None,
) -> Fit:
    """Fits model and guide, or the guide alone where the model is held."""
    num_data = len(data["x"])
    batch_size = config.batch_size or min(500, num_data)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.num_steps // 10, config.num_steps
    )
    return fit(
        model,
        guide,
        data,
        optimizer=optax.adam(schedule, b2=0.99),
        num_steps=config.num_steps,
        batch_size=batch_size,
        num_seeds=config.num_seeds,
        seed=config.seed,
        average=config.average,
        validation=data,  # the same: the trace of the ELBO of all the images
        validate_every=max(1, config.num_steps // NUM_EVALUATIONS),
        checkpoint=checkpoint,
        progress=config.progress,
    )


def hold(model: linear_gaussian.Model, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The model's own among the parameters, with z turned at random.

    z -> R z changes neither p(z) nor, with W -> W R, p(x | c).
    """
    names = ("W", "b", "sigma") + ("B",) * (model.condition is not None)
    held = {name: np.asarray(params[name]) for name in names}
    noise = np.random.default_rng(seed).normal(size=(model.num_latents, model.num_latents))
    held["W"] = (held["W"] @ np.linalg.qr(noise)[0]).astype(np.float32)
    return held


def by_datum(
    function: Callable[..., Any], data: Mapping[str, np.ndarray], size: int = 1_000
) -> Float[np.ndarray, " N"]:
    """``function(batch, number of the batch)`` on all the data, ``size`` at a time."""
    compiled = jax.jit(function)
    starts = range(0, len(data["x"]), size)
    parts = [
        compiled({name: array[start : start + size] for name, array in data.items()}, i)
        for i, start in enumerate(starts)
    ]
    return np.concatenate(parts).astype(np.float64)


def judge(
    config: Config,
    name: str,
    model: linear_gaussian.Model,
    params: list[dict[str, Any]],
    data: dict[str, np.ndarray],
    best: Float[np.ndarray, " N"],
) -> dict[str, Any]:
    """One fit's numbers, in nats per datum, each with its standard error over the images.

    Args:
        config: for the number of draws.
        name: of the guide.
        model: with neither parameter held.
        params: of model and guide together, by seed.
        data: all the images.
        best: log p(x | c) of every image at the maximum of the likelihood.
    """
    guide, key = guides.GUIDES[name](model), random.key(config.seed)
    elbos, likelihoods, gaps = [], [], []
    for own in params:

        def bound(batch: Any, i: Any, own: dict[str, Any] = own) -> Any:
            draws = {"key": random.fold_in(key, i), "num_samples": config.num_samples}
            return pointwise_elbo(model, guide, own, batch, **draws)

        def exact(batch: Any, i: Any, own: dict[str, Any] = own) -> Any:
            return linear_gaussian.log_likelihood(model, own, batch)

        elbos.append(by_datum(bound, data))
        likelihoods.append(by_datum(exact, data))
        gap = GAPS[name]
        gaps.append(None if gap is None else gap(own))
    elbo, likelihood = np.array(elbos), np.array(likelihoods)
    return {
        "elbo": estimate(elbo),
        "log_likelihood": estimate(likelihood),
        "below_maximum": estimate(best - elbo),
        "gap": estimate(likelihood - elbo),
        "best_gap": None if None in gaps else float(np.mean(gaps)),
        "sigma": float(np.mean([own["sigma"] for own in params])),
    }


def estimate(values: Float[np.ndarray, "seed N"]) -> dict[str, Any]:
    """The mean over seeds and data, and its standard error over the data."""
    pointwise = values.mean(0)
    return {
        "estimate": float(pointwise.mean()),
        "standard_error": float(pointwise.std() / np.sqrt(len(pointwise))),
        "per_seed": values.mean(1).tolist(),
    }


def main(config: Config) -> dict[str, Any]:
    """Fit the linear-Gaussian model to images, and hold it against its formulas."""
    began = time.perf_counter()
    data, model, name = config.data()
    maximum, best_likelihood = linear_gaussian.maximum_likelihood(model, data)
    run = Run("linear_gaussian", config)
    result = run.read("result.json")
    if result is None:
        import_ahead("orbax.checkpoint", "matplotlib.backends.backend_agg", "arviz_base")
        best = by_datum(
            lambda batch, i: linear_gaussian.log_likelihood(model, maximum, batch), data
        )
        fits: dict[str, Fit] = {}
        rows: dict[str, Any] = {}
        held: dict[str, Any] = {}
        for kind in ("trained", "held"):
            for guide in config.guides:
                program = Held(model, held) if kind == "held" else model
                label = f"{kind}/{guide}"
                fitted = fits[label] = train(
                    config,
                    program,
                    guides.GUIDES[guide](model),
                    data,
                    run.path / "checkpoints" / kind / guide,
                )
                params = [of_seed(fitted.params, i) | held for i in range(config.num_seeds)]
                rows[label] = judge(config, guide, model, params, data, best)
            first = fits[f"trained/{config.guides[0]}"]
            held = held or hold(model, of_seed(first.params, 0), config.seed)
        result = {
            "experiment": "linear_gaussian",
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "dataset": {"name": name, "num_train": len(data["x"])},
            "maximum": {
                "log_likelihood": best_likelihood,
                "standard_error": float(best.std() / np.sqrt(len(best))),
                "sigma": float(maximum["sigma"]),
            },
            "fits": rows,
            "seconds": {
                part: sum(f.info["seconds"][part] for f in fits.values())
                for part in first.info["seconds"]
            },
            "device": first.info["device"],
            "versions": first.info["versions"],
        }
        draw_elbo(config, fits, result, run.path / "elbo.png")
        save_traces(fits, run.path / "trace.nc")
        result["seconds"]["total"] = time.perf_counter() - began
        run.write("result.json", result)
    print(table(result))
    print(f"written to {run.path}")
    return result


def save_traces(fits: Mapping[str, Fit], path: Path) -> None:
    """One ArviZ tree for each fit, ``tree["held/mean-field"]``, in one file."""
    from xarray import DataTree

    trees = {label: to_datatree(fitted) for label, fitted in fits.items()}
    tree = DataTree.from_dict(
        {
            f"{label}/{node.path.strip('/')}".rstrip("/"): node.to_dataset()
            for label, whole in trees.items()
            for node in whole.subtree
        }
    )
    tree.attrs["experiment"] = "linear_gaussian"
    tree.to_netcdf(path, engine="h5netcdf")


def table(result: dict[str, Any]) -> str:
    """The result as a person reads it: each number beside its target."""
    rows, maximum = [], result["maximum"]
    for label, row in result["fits"].items():
        kind, guide = label.split("/")
        gap, below = row["gap"], row["below_maximum"]
        rows.append(
            (
                guide,
                kind,
                f"{row['elbo']['estimate']:.3f}",
                f"{below['estimate']:.3f} +- {below['standard_error']:.3f}",
                f"{row['log_likelihood']['estimate']:.3f}",
                f"{maximum['log_likelihood']:.3f}",
                f"{gap['estimate']:.3f} +- {gap['standard_error']:.3f}",
                "no formula" if row["best_gap"] is None else f"{row['best_gap']:.3f}",
            )
        )
    headers = (
        "guide",
        "model",
        "ELBO",
        "below maximum",
        "log-likelihood",
        "maximum",
        "gap",
        "best gap",
    )
    body = tabulate(rows, headers, disable_numparse=True, colalign=("left",) * 2 + ("right",) * 6)
    config, seconds, dataset = result["config"], result["seconds"], result["dataset"]
    seeds = f"{config['num_seeds']} seed" + "s" * (config["num_seeds"] > 1)
    return (
        f"\n{body}\n\n"
        f"Nats per datum. Log-likelihood: exact, of the fitted model; maximum: its closed form, of "
        f"these images,\nwhich as an estimate for others of their kind has a standard error of "
        f"{maximum['standard_error']:.3f}. Gap: log-likelihood - ELBO;\nbest gap: the least that "
        f"any guide of the family has for this model, in closed form.\n"
        f"{dataset['num_train']} images of {dataset['name']}, {config['num_latents']} latents, "
        f"{seeds}, {config['num_steps']} steps on {result['device']}; compiling "
        f"{seconds['compile']:.1f} s, training {seconds['run']:.1f} s, in all "
        f"{seconds['total']:.1f} s"
    )


def draw_elbo(config: Config, fits: Mapping[str, Fit], result: dict[str, Any], path: Path) -> None:
    """The ELBO of all the images along the training, with the maximum and the predicted levels."""
    from matplotlib.figure import Figure

    titles = {"trained": "Model trained with the guide", "held": "Model held, latent axes turned"}
    maximum = result["maximum"]["log_likelihood"]
    lowest = min(row["elbo"]["estimate"] for row in result["fits"].values())
    room = max(0.5, 3 * (maximum - lowest))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.axhline(maximum, color="black", ls="--", lw=1.2, label="maximum of the likelihood")
        for i, guide in enumerate(config.guides):
            label, color = f"{kind}/{guide}", f"C{i}"
            row, fitted = result["fits"][label], fits[f"{kind}/{guide}"]
            traces, steps = np.array(fitted.validation_elbo), fitted.info["validation_steps"]
            for j, trace in enumerate(traces):
                axes.plot(steps, trace, "o-", color=color, ms=3, lw=1, label=None if j else guide)
            if kind == "held" and row["best_gap"] is not None:
                level = row["log_likelihood"]["estimate"] - row["best_gap"]
                axes.axhline(level, color=color, ls=":", lw=1.6, label=f"{guide}: log p - best gap")
        axes.set(title=title, xlabel="step", ylim=(maximum - room, maximum + 0.15 * room))
        axes.legend(loc="lower right", fontsize="small")
    figure.axes[0].set_ylabel("ELBO of all images (nats per datum)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command_line(main, Config)
