"""Complete digits from one, two or three of their quadrants (Sohn, Lee & Yan 2015, table 1).

    python experiments/mnist_quadrants.py --quadrants 1
    python experiments/mnist_quadrants.py --quadrants all --preset paper

Three fits, all by ``inference.fit`` and all stopped on validation images. First the baseline
network. Then, around it, the Gaussian stochastic network and the conditional VAE. The baseline's
weights stay, unless ``--joint``. The models are in ``models/quadrants.py``. Every row of the table
is a negative conditional log-likelihood of the missing pixels, in nats per image. The test images
are used for nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jax import random
from numpyro.infer import RenyiELBO, TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO
from tabulate import tabulate

from experiments import pictures, runs
from experiments.datasets import Dataset, Record, first, in_memory, load
from experiments.experiment import DataTree, Experiment, Figure, Fits
from experiments.images import judging_key
from experiments.runner import number, run, run_many
from experiments.settings import Machines, check_known, check_least, check_positive, command_line
from inference import (
    Estimate,
    Hybrid,
    KLWarmUp,
    Prepared,
    decode,
    elbo_terms,
    log_likelihood,
    sample_prior_predictive,
    to_datatree,
)
from models import guides
from models.quadrants import PRESETS, Model, Quadrants

ROWS = {
    "nn": "NN, the baseline",
    "gsnn_monte_carlo": "GSNN (Monte Carlo)",
    "cvae_monte_carlo": "CVAE (Monte Carlo)",
    "cvae_importance_sampling": "CVAE (importance sampling)",
    "cvae_negative_elbo": "CVAE, -ELBO",
}

# Sohn, Lee & Yan 2015, table 1 (recalled): validation and test, by the number of quadrants.
PUBLISHED = {
    1: {
        "nn": (100.03, 99.75),
        "gsnn_monte_carlo": (100.03, 99.82),
        "cvae_monte_carlo": (68.62, 68.39),
        "cvae_importance_sampling": (64.05, 63.91),
    },
    2: {
        "nn": (62.14, 62.18),
        "gsnn_monte_carlo": (62.48, 62.41),
        "cvae_monte_carlo": (45.57, 45.34),
        "cvae_importance_sampling": (44.96, 44.73),
    },
    3: {
        "nn": (26.01, 25.99),
        "gsnn_monte_carlo": (26.20, 26.29),
        "cvae_monte_carlo": (20.97, 20.96),
        "cvae_importance_sampling": (20.97, 20.95),
    },
}
# Pyro's tutorial "Conditional Variational Auto-encoder". It calls the -ELBO of the recognition
# network Monte Carlo, and its validation images are the test images.
PYRO = {
    1: {"nn": 100.4, "cvae_negative_elbo": 71.8},
    2: {"nn": 61.9, "cvae_negative_elbo": 51.0},
    3: {"nn": 25.4, "cvae_negative_elbo": 24.2},
}


@dataclass(frozen=True)
class Config(Machines):
    """Settings of the completion of images.

    Attributes:
        quadrants: Observed quadrants. 1 is the bottom left, 2 the left half, 3 all but the bottom
            right, all one after the other.
        dataset: Data set: mnist, static-mnist, fashion-mnist, digits, the path of your own .npz or
            .npy file, or auto. auto is MNIST if it can be loaded, and else digits.
        data_dir: Directory with the data set's files, compressed or not, to read offline.
        num_validation: Images held out of the training. Default: the data set's usual number.
        num_train: Number of training images, the first ones. Default: all.
        num_test: Number of test images, the first ones. Default: all.
        preset: Sizes of the networks: small, which trains in minutes, or paper, as in the paper.
        binary_c: Whether the observed quadrants are binarised with the others, or grey.
        decoder_sees_c: Whether the decoder sees the observed quadrants beside z.
        alpha: Share of the CVAE's objective in the hybrid one. The rest is the GSNN's.
        joint: Whether the baseline's weights are trained on, with the others.
        kl_warm_up: Epochs over which the weight of the CVAE's KL divergence rises from 0 to 1.
            Default: a sixth of them all. With 0, z stays unused beside a fitted baseline.
        num_epochs: Passes over the training images, at most, for the GSNN and the CVAE.
        baseline_epochs: Passes over the training images, at most, for the baseline.
        batch_size: Images per step. Default: 128, or all images if there are fewer.
        learning_rate: Learning rate of Adam at the first step. It falls to zero along a cosine.
        patience: Epochs without a better validation likelihood after which a training stops.
        num_particles: Draws for each validation image while a training is under way.
        num_samples: Draws for each image in the table.
        seed: Random seed of the three fits.
        out: Directory of the run. Default: a new one in runs/.
        progress: Whether to show progress bars.
    """

    quadrants: str = "1"
    dataset: str = "auto"
    data_dir: Path | None = None
    num_validation: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    preset: str = "small"
    binary_c: bool = False
    decoder_sees_c: bool = False
    alpha: float = 1.0
    joint: bool = False
    kl_warm_up: float | None = None
    num_epochs: int = 30
    baseline_epochs: int = 15
    batch_size: int | None = None
    learning_rate: float = 1e-3
    patience: int = 5
    num_particles: int = 10
    num_samples: int = 100
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_known(self, quadrants=("1", "2", "3", "all"), preset=PRESETS)
        check_least(1, self, "num_train", "num_test", "num_validation", "batch_size", "patience")
        check_least(1, self, "num_epochs", "baseline_epochs", "num_particles", "num_samples")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate")
        if self.kl_warm_up is not None and not 0 <= self.kl_warm_up <= self.num_epochs:
            raise ValueError(
                f"kl_warm_up: expected 0 to num_epochs = {self.num_epochs}, got {self.kl_warm_up}"
            )
        Hybrid(self.alpha)

    def data(self) -> Dataset:
        """Whole grey images, split into training, validation and test."""
        dataset = load(
            self.dataset,
            data_dir=self.data_dir,
            num_validation=self.num_validation,
            progress=self.progress,
        )
        if dataset.validation is None:
            raise ValueError(f"dataset: expected validation images, and {dataset.name} has none")
        return replace(
            dataset,
            train=first(dataset.train, ["x"], self.num_train),
            validation=in_memory(first(dataset.validation, ["x"]), "num_validation"),
            test=in_memory(first(dataset.test, ["x"], self.num_test), "num_test"),
        )

    def model(self, record: Record) -> Model:
        """The preset, for these images and quadrants."""
        preset = PRESETS[self.preset]
        cut = Quadrants(int(self.quadrants), record.x_shape)
        baseline = replace(preset.baseline, quadrants=cut, binary_c=self.binary_c)
        return replace(preset, baseline=baseline, decoder_sees_c=self.decoder_sees_c)

    def hybrid(self, steps_per_epoch: float) -> ELBO:
        """The objective of the CVAE."""
        objective = Hybrid(self.alpha, TraceMeanField_ELBO())
        warm_up = self.num_epochs / 6 if self.kl_warm_up is None else self.kl_warm_up
        return KLWarmUp(objective, max(1, int(warm_up * steps_per_epoch))) if warm_up else objective


# --- programs, training ---------------------------------------------------------------------------


def programs(config: Config, record: Record, name: str, fits: Fits) -> tuple[Any, Any]:
    """The model and the guide of the baseline, the GSNN or the CVAE."""
    model = config.model(record)
    if name == "nn":
        return model.baseline, guides.prior(model.baseline)
    return model, guides.prior(model) if name == "gsnn" else guides.mean_field(model)


def training(config: Config, data: Dataset, name: str, fits: Fits) -> dict[str, Any]:
    """The settings of ``fit``.

    An importance-weighted likelihood of the validation images stops the GSNN and the CVAE. The
    GSNN draws from its prior, the CVAE from its recognition network.
    """
    num_train = len(data.train["x"])
    batch_size = config.batch_size or min(128, num_train)
    num_epochs = config.baseline_epochs if name == "nn" else config.num_epochs
    num_steps = -(-num_epochs * num_train // batch_size)
    adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))
    settings: dict[str, Any] = {
        "optimizer": adam,
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "validation": data.validation,
        "validate_every": max(1, num_train // batch_size),
        "patience": config.patience,
        "seed": config.seed,
    }
    if name == "nn":
        return settings
    frozen = optax.partition({"free": adam, "frozen": optax.set_to_zero()}, _labels)
    is_cvae = name == "cvae"
    return settings | {
        "init": fits["nn"].params_of(0),
        "optimizer": adam if config.joint else frozen,
        "objective": config.hybrid(num_train / batch_size) if is_cvae else TraceMeanField_ELBO(),
        "validation_objective": RenyiELBO(alpha=0, num_particles=config.num_particles),
    }


def _labels(params: Mapping[str, Any]) -> dict[str, str]:
    """For Optax: which parameters are trained around a baseline, and which are not."""
    return {name: "frozen" if name == "baseline" else "free" for name in params}


# --- judging --------------------------------------------------------------------------------------


def judge(config: Config, data: Dataset, fits: Fits) -> dict[str, dict[str, Estimate]]:
    """The rows of the table, by split and name: log p(x | c) or the ELBO, in nats per image."""
    nn, gsnn, cvae = (fits[name] for name in ("nn", "gsnn", "cvae"))
    prior = replace(gsnn, params={name: cvae.params[name] for name in gsnn.params})
    parts = {"validation": cvae.prepare(data.validation), "test": cvae.prepare(data.test)}
    both = Prepared({n: np.concatenate([part[n] for part in parts.values()]) for n in ("c", "x")})
    common: dict[str, Any] = {"key": judging_key(config), "progress": config.progress}
    many: dict[str, Any] = common | {"num_samples": config.num_samples}
    rows = {
        "nn": log_likelihood(nn, both, num_samples=1, **common),
        "gsnn_monte_carlo": log_likelihood(gsnn, both, **many),
        "cvae_monte_carlo": log_likelihood(prior, both, **many),
        "cvae_importance_sampling": log_likelihood(cvae, both, **many),
        "cvae_negative_elbo": elbo_terms(cvae, both, num_samples=10, **common).elbo,
    }
    first = len(parts["validation"]["x"])
    images = {"validation": slice(first), "test": slice(first, None)}
    return {
        split: {name: _part(row, images[split], part) for name, row in rows.items()}
        for split, part in parts.items()
    }


def _part(row: Estimate, images: slice, data: Mapping[str, Any]) -> Estimate:
    """An estimate for some of the images."""
    arrays = {name: a[:, images] for name, a in vars(row).items() if isinstance(a, np.ndarray)}
    return replace(row, data=runs.describe_arrays(data), **arrays)


def summarize(config: Config, data: Dataset, fits: Fits, judged: Any) -> dict[str, Any]:
    """The numbers of ``result.json``."""
    return {
        "quadrants": int(config.quadrants),
        "elbo": number(judged["test"]["cvae_negative_elbo"]),
        "log_likelihood": number(judged["test"]["cvae_importance_sampling"]),
        "rows": {
            name: {split: entry(rows[name]) for split, rows in judged.items()} for name in ROWS
        },
    }


def entry(row: Estimate) -> dict[str, Any]:
    """One number of the table. Its sign is the other one.

    ``high_pareto_k`` is the share of images with too few samples.
    """
    high = row.high_pareto_k
    return number(replace(row, pointwise=-row.pointwise)) | {
        "high_pareto_k": None if high is None else float(high.estimate.mean())
    }


def tree(config: Config, data: Dataset, fits: Fits, judged: Any) -> DataTree:
    """The CVAE's fit, and of every test image all rows of the table.

    The other two fits are in groups of their names.
    """
    rows = [
        replace(row, name=name, pareto_k=None)
        for name, row in judged["test"].items()
        if name not in ("cvae_negative_elbo", "cvae_importance_sampling")
    ]
    bound = judged["test"]["cvae_negative_elbo"]
    likelihood = judged["test"]["cvae_importance_sampling"]
    whole = to_datatree(fits["cvae"], bound, likelihood, *rows)
    for name in ("nn", "gsnn"):
        whole[name] = to_datatree(fits[name])
    return whole


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it. For MNIST published numbers stand beside it."""
    config, num_data = result["config"], result["num_data"]
    observed, is_mnist = result["quadrants"], result["dataset"] == "mnist"
    rows = []
    for name, words in ROWS.items():
        row = result["rows"][name]
        if config["alpha"] < 1:
            words = words.replace("CVAE", f"hybrid {config['alpha']:g}")
        numbers = [f"{row[s]['estimate']:.2f}" for s in ("validation", "test")]
        error, num_samples = f"{row['test']['standard_error']:.2f}", row["test"]["num_samples"]
        high = row["test"]["high_pareto_k"]
        share = "" if high is None else f"{high:.4f}"
        pyro = PYRO[observed].get(name)
        beside = [" / ".join(f"{n:.2f}" for n in PUBLISHED[observed].get(name, ()))]
        beside += [f"{pyro:.1f}" if pyro else ""]
        rows.append(
            (words, *numbers, error, str(num_samples), share, *(beside if is_mnist else ()))
        )
    headers = ["nats per image", "validation", "test", "s.e.", "samples", "k-hat too high"]
    headers += ["Sohn et al., val. / test", "Pyro"] if is_mnist else []
    body = tabulate(
        rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))
    )
    words = f"{observed} quadrant" + "s" * (observed > 1)
    steps = ", ".join(f"{name} {n[0]}" for name, n in result["num_steps"].items())
    return (
        f"{result['dataset']}, {words} observed: negative conditional log-likelihood of the "
        f"missing pixels\n{num_data['train']} training, {num_data['validation']} validation and "
        f"{num_data['test']} test images; preset {config['preset']}, "
        f"{result['num_parameters']} parameters; steps: {steps}\n\n{body}"
    )


# --- figures --------------------------------------------------------------------------------------

NUM_PICTURES, NUM_DRAWS = 10, 6


def figures(
    config: Config, data: Dataset, fits: Fits, judged: Any, result: dict[str, Any]
) -> dict[str, Figure]:
    """The figures of a run."""
    observed = f"{config.quadrants} quadrant{'s' * (config.quadrants != '1')} observed"
    words = f"{data.name}, {observed}"
    test = fits["cvae"].prepare(data.test)
    return {
        "completions": completions(fits, test, words),
        "training": validation_traces(fits, words, config.num_particles),
    }


def completions(fits: Fits, test: Mapping[str, Any], words: str) -> Figure:
    """Input, truth, the baseline's guess, and what the CVAE makes of draws from p(z | c).

    The recognition network takes no part, because it has seen the answer.

    Args:
        fits: of the baseline, ``nn``, and of the model, ``cvae``.
        test: ``c`` and ``x``.
        words: the data, for the title.
    """
    c, x = (np.asarray(test[name][:NUM_PICTURES]) for name in ("c", "x"))
    guess = decode(fits["nn"], {}, c=c)["x"][0]
    drawn = sample_prior_predictive(fits["cvae"], NUM_DRAWS, key=random.key(0), c=c)["z"]
    columns = [np.full_like(x, 0.5), x, guess]
    columns += [decode(fits["cvae"], {"z": drawn[:, i]}, c=c)["x"][0] for i in range(NUM_DRAWS)]
    model: Any = fits["cvae"].model
    merge = model.baseline.quadrants.merge
    return pictures.grid(
        np.stack([np.asarray(merge(c, column)) for column in columns], axis=1),
        f"{words}: means of p(x | z, c), z from the prior network p(z | c)",
        column_labels=("input", "truth", "NN", *(f"z {i + 1}" for i in range(NUM_DRAWS))),
        x_label="what is shown, and draws of z",
        y_label="test images",
    )


def validation_traces(fits: Fits, words: str, num_particles: int) -> Figure:
    """The validation likelihood by which each training was stopped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = {
        "nn": "NN: exact",
        "gsnn": f"GSNN: {num_particles} draws from the prior",
        "cvae": f"CVAE: {num_particles} importance samples",
    }
    for name, label in labels.items():
        values = -np.asarray(fits[name].validation_elbo)[0]
        steps = fits[name].info["validation_steps"]
        (line,) = axes.plot(steps, values, ".-", lw=1.2, label=label)
        best = int(np.nanargmin(values))
        axes.plot(steps[best], values[best], "o", color=line.get_color(), mfc="none", ms=9)
    axes.set(
        xlabel="training (steps)",
        ylabel="- log p(x | c) (nats per image)",
        title=f"{words}: validation images",
    )
    axes.legend(fontsize="small", title="ring: the parameters kept")
    return figure


EXPERIMENT = Experiment(
    name="mnist_quadrants",
    config=Config,
    data=Config.data,
    programs=programs,
    training=training,
    judge=judge,
    summarize=summarize,
    tree=tree,
    figures=figures,
    table=table,
    names=lambda config: ("nn", "gsnn", "cvae"),
    main=lambda config: "cvae",
)


def main(config: Config) -> dict[str, Any]:
    """Complete images from some of their quadrants."""
    if config.quadrants != "all":
        return run(EXPERIMENT, config)
    each = {f"quadrants_{n}": {"quadrants": n} for n in "123"}
    results = run_many(EXPERIMENT, config, each)
    return {"quadrants": {own["quadrants"]: results[name] for name, own in each.items()}}


if __name__ == "__main__":
    command_line(main, Config)
