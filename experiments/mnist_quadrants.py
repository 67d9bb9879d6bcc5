"""Complete digits of which one, two or three quadrants are seen (Sohn, Lee & Yan 2015, table 1).

    python experiments/mnist_quadrants.py --quadrants 1
    python experiments/mnist_quadrants.py --quadrants all --preset paper

Three fits, all by ``inference.fit`` and all stopped on validation images: the baseline network,
then with its weights (which stay as they are, unless ``--joint``) the Gaussian stochastic network
and the conditional VAE. The models are in ``models/structured.py``. Every row of the table is a
negative conditional log-likelihood of the missing pixels, in nats per image. Test images take part
in no choice.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import random
from numpyro.infer import RenyiELBO, TraceMeanField_ELBO
from tabulate import tabulate

from experiments import pictures
from experiments.datasets import Dataset, load
from experiments.images import TEST_SEED, estimate, held_out
from experiments.runs import (
    Run,
    check_known,
    check_least,
    check_positive,
    command_line,
    import_ahead,
    trace_attributes,
)
from inference import (
    Estimate,
    Fit,
    Hybrid,
    KLWarmUp,
    decode,
    elbo_terms,
    fit,
    log_likelihood,
    sample,
    to_datatree,
)
from models import guides, structured

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
# Pyro's tutorial "Conditional Variational Auto-encoder". What it calls Monte Carlo is the -ELBO of
# the recognition network, and its validation images are the test images.
PYRO = {
    1: {"nn": 100.4, "cvae_negative_elbo": 71.8},
    2: {"nn": 61.9, "cvae_negative_elbo": 51.0},
    3: {"nn": 25.4, "cvae_negative_elbo": 24.2},
}


@dataclass(frozen=True)
class Config:
    """Settings of the completion of images.

    Attributes:
        quadrants: which are observed: 1, the bottom left; 2, the left half; 3, all but the bottom
            right; or all, for one after the other.
        dataset: mnist, digits, the path of a user's own .npz or .npy, or auto for MNIST where it
            can be had and digits elsewhere.
        data_dir: directory with the data set's files, compressed or not, to read offline.
        num_validation: images held out of the training; the data set's usual number unless given.
        num_train: the first so many of the training images; all unless given.
        num_test: the first so many of the test images; all unless given.
        preset: small, which trains in minutes, or paper, the sizes of the paper.
        binary_c: whether the observed quadrants are binarised with the others, or grey.
        decoder_sees_c: whether the decoder sees the observed quadrants beside z.
        alpha: the share of the CVAE's objective in the hybrid one; the rest is the GSNN's.
        joint: whether the baseline's weights are trained on, with the others.
        kl_warm_up: epochs over which the weight of the CVAE's KL divergence rises from 0 to 1; a
            sixth of them all unless given. With 0, z stays unused beside a fitted baseline.
        num_epochs: passes over the training images, at most, for the GSNN and the CVAE.
        baseline_epochs: the same, for the baseline.
        batch_size: images per step; 128, or all there are if fewer, unless given.
        learning_rate: Adam's, at the first step; it falls to zero along a cosine.
        patience: stop after so many epochs without a better validation likelihood.
        num_particles: draws for each validation image when a training is stopped by them.
        num_samples: draws for each image in the table.
        seed: of the three fits.
        out: directory of the run; a fresh one under runs/ unless given.
        progress: whether to show progress bars.
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
        check_known(self, quadrants=("1", "2", "3", "all"), preset=structured.PRESETS)
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
            train={"x": dataset.train["x"][: self.num_train]},
            validation={"x": dataset.validation["x"]},
            test={"x": dataset.test["x"][: self.num_test]},
        )

    def model(self, dataset: Dataset) -> structured.Model:
        """The preset, for these images and quadrants."""
        preset = structured.PRESETS[self.preset]
        quadrants = structured.Quadrants(int(self.quadrants), dataset.x_shape)
        baseline = replace(preset.baseline, quadrants=quadrants, binary_c=self.binary_c)
        return replace(preset, baseline=baseline, decoder_sees_c=self.decoder_sees_c)


# --- training -------------------------------------------------------------------------------------


def train(config: Config, model: structured.Model, dataset: Dataset, path: Path) -> dict[str, Fit]:
    """The three fits, by name: ``nn``, ``gsnn`` and ``cvae``.

    The validation likelihood that stops the last two is importance-weighted, with the GSNN's draws
    from its prior and the CVAE's from its recognition network.
    """
    num_train = len(dataset.train["x"])
    batch_size = config.batch_size or min(128, num_train)

    def adam(num_epochs: int) -> optax.GradientTransformation:
        num_steps = -(-num_epochs * num_train // batch_size)
        return optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))

    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "preprocess": model.prepare,
        "validation": held_out(model, dataset.validation or {}),
        "validate_every": max(1, num_train // batch_size),
        "patience": config.patience,
        "seed": config.seed,
        "progress": config.progress,
    }
    baseline = model.baseline
    fits = {
        "nn": fit(
            baseline,
            guides.prior(baseline),
            dataset.train,
            optimizer=adam(config.baseline_epochs),
            num_epochs=config.baseline_epochs,
            checkpoint=path / "nn",
            **settings,
        )
    }
    free = adam(config.num_epochs)
    frozen = optax.partition({"free": free, "frozen": optax.set_to_zero()}, _labels)
    around = {
        "init_params": pictures.of_seed(fits["nn"].params, 0),
        "optimizer": free if config.joint else frozen,
        "num_epochs": config.num_epochs,
        "validation_objective": RenyiELBO(alpha=0, num_particles=config.num_particles),
    }
    hybrid = Hybrid(config.alpha, TraceMeanField_ELBO())
    warm_up = config.num_epochs / 6 if config.kl_warm_up is None else config.kl_warm_up
    if warm_up:
        hybrid = KLWarmUp(hybrid, max(1, int(warm_up * num_train / batch_size)))
    for name, guide, objective in (
        ("gsnn", guides.prior(model), TraceMeanField_ELBO()),
        ("cvae", guides.mean_field(model), hybrid),
    ):
        fits[name] = fit(
            model,
            guide,
            dataset.train,
            objective=objective,
            checkpoint=path / name,
            **settings | around,
        )
    return fits


def _labels(params: Mapping[str, Any]) -> dict[str, str]:
    """For Optax: which parameters are trained around a baseline, and which are not."""
    return {name: "frozen" if name == "baseline" else "free" for name in params}


# --- judging --------------------------------------------------------------------------------------


def judge(
    config: Config, model: structured.Model, fits: Mapping[str, Fit], data: Mapping[str, Any]
) -> dict[str, Estimate]:
    """The rows of the table, pointwise: log p(x | c), or the ELBO, in nats per image."""
    params = {name: pictures.of_seed(fitted.params, 0) for name, fitted in fits.items()}
    prior, recognition = guides.prior(model), guides.mean_field(model)
    empty = guides.prior(model.baseline)
    key = random.fold_in(random.key(TEST_SEED), config.seed)
    common: dict[str, Any] = {"key": key, "progress": config.progress}
    many: dict[str, Any] = common | {"num_samples": config.num_samples}
    elbo = elbo_terms(model, recognition, params["cvae"], data, num_samples=10, **common).elbo
    return {
        "nn": log_likelihood(model.baseline, empty, params["nn"], data, num_samples=1, **common),
        "gsnn_monte_carlo": log_likelihood(model, prior, params["gsnn"], data, **many),
        "cvae_monte_carlo": log_likelihood(model, prior, params["cvae"], data, **many),
        "cvae_importance_sampling": log_likelihood(
            model, recognition, params["cvae"], data, **many
        ),
        "cvae_negative_elbo": elbo,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it; published numbers beside it for MNIST."""
    config, num_data, seconds = result["config"], result["num_data"], result["seconds"]
    quadrants, is_mnist = result["quadrants"], result["dataset"] == "mnist"
    rows = []
    for name, words in ROWS.items():
        row = result["rows"][name]
        if config["alpha"] < 1:
            words = words.replace("CVAE", f"hybrid {config['alpha']:g}")
        numbers = [f"{row[s]['estimate']:.2f}" for s in ("validation", "test")]
        error, num_samples = f"{row['test']['standard_error']:.2f}", row["test"]["num_samples"]
        high = row["test"].get("high_pareto_k")
        share = "" if high is None else f"{high:.4f}"
        published = PUBLISHED[quadrants].get(name, ())
        pyro = PYRO[quadrants].get(name)
        beside = [" / ".join(f"{n:.2f}" for n in published), f"{pyro:.1f}" if pyro else ""]
        rows.append(
            (words, *numbers, error, str(num_samples), share, *(beside if is_mnist else ()))
        )
    headers = ["nats per image", "validation", "test", "s.e.", "samples", "k-hat too high"]
    headers += ["Sohn et al., val. / test", "Pyro"] if is_mnist else []
    body = tabulate(
        rows, headers, disable_numparse=True, colalign=("left", *["right"] * (len(headers) - 1))
    )
    words = f"{quadrants} quadrant" + "s" * (quadrants > 1)
    epochs = ", ".join(f"{name} {n}" for name, n in result["num_steps"].items())
    return (
        f"\n{result['dataset']}, {words} observed: negative conditional log-likelihood of the "
        f"missing pixels\n{num_data['train']} training, {num_data['validation']} validation and "
        f"{num_data['test']} test images; preset {config['preset']}, "
        f"{result['num_parameters']} parameters; steps: {epochs}\n\n{body}\n\n"
        f"{result['device']}: compiling {seconds['compile']:.1f} s, training {seconds['run']:.1f} "
        f"s, judging {seconds['evaluate']:.1f} s, in all {seconds['total']:.1f} s\n"
    )


# --- the run directory ----------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Complete images of which some quadrants are seen."""
    if config.quadrants == "all":
        run = Run("mnist_quadrants", config)
        each = {
            n: main(replace(config, quadrants=n, out=run.path / f"quadrants_{n}")) for n in "123"
        }
        result = {"experiment": "mnist_quadrants", "quadrants": each}
        run.write("result.json", result)
        return result
    began = time.perf_counter()
    dataset = config.data()
    model = config.model(dataset)
    run = Run("mnist_quadrants", config)
    result = run.read("result.json")
    if result is None:
        import_ahead("orbax.checkpoint", "matplotlib.backends.backend_agg", "arviz_base")
        fits = train(config, model, dataset, run.path / "checkpoints")
        judging = time.perf_counter()
        validation = held_out(model, dataset.validation or {})
        test = held_out(model, dataset.test)
        both = {name: np.concatenate([validation[name], test[name]]) for name in test}
        rows = judge(config, model, fits, both)
        num_validation = len(validation["x"])
        splits = {"validation": slice(num_validation), "test": slice(num_validation, None)}
        judged = {
            split: {name: _part(row, part) for name, row in rows.items()}
            for split, part in splits.items()
        }
        result = summarize(config, dataset, fits, judged)
        result["seconds"]["evaluate"] = time.perf_counter() - judging
        params = {name: pictures.of_seed(fitted.params, 0) for name, fitted in fits.items()}
        draw_completions(model, params, test, result, run.path / "completions.png")
        draw_training(fits, result, run.path / "training.png")
        write_trace(run.path / "trace.nc", fits, judged["test"], test, result)
        result["seconds"]["total"] = time.perf_counter() - began
        run.write("result.json", result)
    print(table(result))
    print(f"written to {run.path}")
    return result


def _part(e: Estimate, part: slice) -> Estimate:
    arrays = {name: a[part] for name, a in vars(e).items() if isinstance(a, np.ndarray)}
    return replace(e, **arrays)


def summarize(
    config: Config,
    dataset: Dataset,
    fits: Mapping[str, Fit],
    judged: Mapping[str, Mapping[str, Estimate]],
) -> dict[str, Any]:
    """The numbers of ``result.json``."""
    info = [fitted.info for fitted in fits.values()]
    return {
        "experiment": "mnist_quadrants",
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "dataset": dataset.name,
        "quadrants": int(config.quadrants),
        "num_data": {
            split: len(arrays["x"])
            for split in ("train", "validation", "test")
            if (arrays := getattr(dataset, split)) is not None
        },
        "num_parameters": sum(p.size for p in jax.tree.leaves(fits["cvae"].params)),
        "rows": {
            name: {split: entry(rows[name]) for split, rows in judged.items()} for name in ROWS
        },
        "num_steps": {name: fitted.info["num_steps"][0] for name, fitted in fits.items()},
        "seconds": {part: sum(i["seconds"][part] for i in info) for part in ("compile", "run")},
        "device": info[0]["device"],
        "versions": info[0]["versions"],
    }


def entry(e: Estimate) -> dict[str, Any]:
    """One number of the table, whose sign is the other one, and for how large a share of images
    its samples are too few."""
    high = e.high_pareto_k
    return estimate([replace(e, pointwise=-e.pointwise)]) | {
        "high_pareto_k": None if high is None else high.estimate
    }


def write_trace(
    path: Path,
    fits: Mapping[str, Fit],
    judged: Mapping[str, Estimate],
    test: Mapping[str, Any],
    result: Mapping[str, Any],
) -> None:
    """The CVAE's fit and its log-likelihood of each test image, for ArviZ; every row of the table
    by image; the other two fits in groups of their own."""
    likelihood = judged["cvae_importance_sampling"]
    evaluation = {name: e.pointwise[None] for name, e in judged.items()}
    evaluation["elbo"] = evaluation["cvae_negative_elbo"]
    if likelihood.pareto_k is not None:
        evaluation["pareto_k"] = likelihood.pareto_k[None]
    tree = to_datatree(
        fits["cvae"],
        log_likelihood={"x": likelihood.pointwise[None, None]},
        evaluation=evaluation,
        dims={"x": ["datum"]},
    )
    for name in ("nn", "gsnn"):
        tree[name] = to_datatree(fits[name])
    tree.attrs |= trace_attributes(
        result["experiment"], result["config"], result["dataset"], test
    ) | {"num_samples": likelihood.num_samples}
    tree.to_netcdf(path, engine="h5netcdf")


# --- figures --------------------------------------------------------------------------------------

NUM_PICTURES, NUM_DRAWS = 10, 6


def draw_completions(
    model: structured.Model,
    params: Mapping[str, Any],
    test: Mapping[str, Any],
    result: Mapping[str, Any],
    path: Path,
) -> None:
    """Input, truth, the baseline's guess, and what the CVAE makes of draws from p(z | c).

    The recognition network, which has seen the answer, takes no part.

    Args:
        model: around the baseline.
        params: of the baseline, ``nn``, and of the model, ``cvae``.
        test: ``c`` and ``x``.
        result: as in ``result.json``.
        path: of the PNG.
    """
    c, x = (np.asarray(test[name][:NUM_PICTURES]) for name in ("c", "x"))
    merge = model.baseline.quadrants.merge
    guess = decode(model.baseline, params["nn"], np.zeros((len(c), 0)), c)  # no dimensions of z
    drawn = sample(model, params["cvae"], NUM_DRAWS, c, key=random.key(0)).x_mean
    drawn = np.asarray(drawn).reshape(len(c), NUM_DRAWS, *model.x_shape)
    columns = [np.full_like(x, 0.5), x, guess, *drawn.swapaxes(0, 1)]
    rows = np.stack([np.asarray(merge(c, column)) for column in columns], axis=1)
    quadrants = result["quadrants"]
    pictures.grid(
        rows,
        path,
        f"{result['dataset']}, {quadrants} quadrant{'s' * (quadrants > 1)} observed: "
        f"means of p(x | z, c), z from the prior network p(z | c)",
        column_labels=("input", "truth", "NN", *(f"z {i + 1}" for i in range(NUM_DRAWS))),
        y_label="test images",
    )


def draw_training(fits: Mapping[str, Fit], result: Mapping[str, Any], path: Path) -> None:
    """The validation likelihood by which each training was stopped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = {
        "nn": "NN: exact",
        "gsnn": f"GSNN: {result['config']['num_particles']} draws from the prior",
        "cvae": f"CVAE: {result['config']['num_particles']} importance samples",
    }
    for name, fitted in fits.items():
        values = -np.asarray(fitted.validation_elbo)[0]
        steps = fitted.info["validation_steps"]
        (line,) = axes.plot(steps, values, ".-", lw=1.2, label=labels[name])
        best = int(np.nanargmin(values))
        axes.plot(steps[best], values[best], "o", color=line.get_color(), mfc="none", ms=9)
    axes.set(
        xlabel="step",
        ylabel="- log p(x | c) (nats per image)",
        title=f"{result['dataset']}, {result['quadrants']} observed: validation images",
    )
    axes.legend(fontsize="small", title="ring: the parameters kept")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command_line(main, Config)
