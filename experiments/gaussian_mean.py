"""Recover theta*, phi* of the Gaussian unknown-mean conditional VAE, and show that they are right.

    python experiments/gaussian_mean.py --mu-0 2 --sigma 0.5 --num-seeds 8

The model, its guide and its optimum are in ``models/gaussian_mean.py``. Stochastic gradients
arrive at seven numbers to a fraction of their standard errors, for three reasons:

- The optimiser works in other coordinates (``coordinates``). The inputs of the affine maps are
  uncorrelated there and have unit size, and lengths are measured in sigma_0. So mu_0 and the
  scale of the data do not matter.
- The two particles of each step are mirror images, stratified over the batch
  (``inference.particles``).
- The learning rate falls to zero along a cosine, and the last part of the path is averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jax import random
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from tabulate import tabulate

import inference
from experiments.experiment import Data, DataTree, Experiment, Figure, Fits
from experiments.runner import number, run
from experiments.settings import (
    Machines,
    check_fraction,
    check_known,
    check_least,
    check_positive,
    command_line,
)
from inference import Estimate, antithetic, pointwise_elbo, precondition, to_datatree
from models import gaussian_mean

# Two particles each. They are mirror images, if the objective allows it.
OBJECTIVES = {name: partial(build, 2) for name, build in inference.OBJECTIVES.items()} | {
    "Trace_ELBO": lambda: Trace_ELBO(2, vectorize_particles=antithetic),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(2, vectorize_particles=antithetic),
}


@dataclass(frozen=True)
class Record:
    """What the model needs to know of the data.

    Attributes:
        name: the data set's name.
        num_data: how many data there are.
        x_median: the median of x. The search starts there.
    """

    name: str
    num_data: int
    x_median: float


@dataclass(frozen=True)
class Config(Machines):
    """Settings of the Gaussian unknown-mean conditional VAE.

    Attributes:
        mu_0: Mean of z where c is zero.
        sigma_0: Standard deviation of z given c. The model knows it.
        sigma: Standard deviation of x given z.
        num_data: Number of pairs (c, x), simulated from the truth.
        num_steps: Steps of the optimiser.
        batch_size: Data per step. Default: 2000, or all data if there are fewer.
        learning_rate: Learning rate of the first step. It falls to zero along a cosine.
        average: Fraction of the run, at its end, over which parameters are averaged.
        objective: Objective of the training: Trace_ELBO, TraceMeanField_ELBO, RenyiELBO (or
            importance-weighted, the same), doubly-reparameterized or sticking-the-landing.
        num_seeds: Number of restarts. They are trained together.
        seed: Random seed of the data and of the first restart.
        out: Directory of the run. Default: a new one in runs/.
        progress: Whether to show a progress bar.
    """

    mu_0: float = 1.0
    sigma_0: float = 1.0
    sigma: float = 1.0
    num_data: int = 50_000
    num_steps: int = 3_000
    batch_size: int | None = None
    learning_rate: float = 0.1
    average: float = 0.3
    objective: str = "Trace_ELBO"
    num_seeds: int = 4
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.truth()
        check_least(1, self, "num_data", "num_steps", "num_seeds")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate")
        check_known(self, objective=OBJECTIVES)
        check_fraction(self, "average")
        if self.batch_size is not None and not 1 <= self.batch_size <= self.num_data:
            raise ValueError(
                f"batch_size: expected 1 to num_data = {self.num_data}, got {self.batch_size}"
            )

    def truth(self) -> gaussian_mean.Truth:
        """The process that makes the data."""
        return gaussian_mean.Truth(self.mu_0, self.sigma_0, self.sigma)

    def model(self, record: Record) -> gaussian_mean.Model:
        """The model of these data."""
        return gaussian_mean.Model(self.sigma_0, x_loc=record.x_median)


# --- data, programs, training ---------------------------------------------------------------------


def simulate(config: Config) -> Data:
    """The data of a run."""
    data = config.truth().simulate(config.num_data, config.seed)
    maximum, _ = gaussian_mean.maximum_likelihood(data, config.sigma_0)
    record = Record("gaussian_mean", config.num_data, float(np.median(data["x"])))
    return Data(record, data, maximum)


def programs(config: Config, record: Record, name: str, fits: Fits) -> tuple[Any, Any]:
    """The model and its guide."""
    return config.model(record), gaussian_mean.Guide(config.sigma_0)


def coordinates(*columns: np.ndarray | float, scale: float) -> np.ndarray:
    """A whitening matrix: a unit step in u changes the output by ``scale`` (root mean square).

    Args:
        columns: the inputs of an affine map, each (N,) or a constant.
        scale: the unit of the map's output.

    Returns:
        P, (k, k). With features F, the mean of (F P)^T (F P) is scale^2 times the identity.
    """
    features = np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float64)
    moments = features.T @ features / len(features)
    return (scale * np.linalg.cholesky(np.linalg.inv(moments))).astype(np.float32)


def training(config: Config, data: Data, name: str, fits: Fits) -> dict[str, Any]:
    """The settings of ``fit``."""
    c, x = data.train["c"], data.train["x"]
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    optimizer = precondition(
        optax.adam(schedule, b2=0.99),
        {
            ("theta_1", "theta_2"): coordinates(1.0, c, scale=config.sigma_0),
            ("phi_1", "phi_2", "phi_3"): coordinates(x, c, 1.0, scale=config.sigma_0),
        },
    )
    return {
        "objective": OBJECTIVES[config.objective](),
        "optimizer": optimizer,
        "num_steps": config.num_steps,
        "batch_size": config.batch_size or min(2_000, config.num_data),
        "num_seeds": config.num_seeds,
        "seed": config.seed,
        "average": config.average,
    }


# --- judging --------------------------------------------------------------------------------------


def judge(config: Config, data: Data, fits: Fits) -> Estimate:
    """The ELBO of every seed and datum."""
    key, size = random.key(config.seed), config.num_data
    return pointwise_elbo(fits["fit"], data.train, key=key, batch_size=size)


def summarize(config: Config, data: Data, fits: Fits, judged: Estimate) -> dict[str, Any]:
    """The numbers of ``result.json``, each beside its target."""
    truth, c, fitted = config.truth(), data.train["c"], fits["fit"].params
    optimum = gaussian_mean.optimum(truth)
    errors = gaussian_mean.standard_errors(truth, len(c), float(c.mean()), float(c.var()))
    parameters = {
        name: {
            "estimate": float(np.mean(fitted[name])),
            "per_seed": np.asarray(fitted[name], np.float64).tolist(),
            "optimum": optimum[name],
            "maximum_likelihood": data.maximum[name],
            "standard_error": errors[name],
        }
        for name in gaussian_mean.PARAMETERS
    }
    targets = {
        "optimum": gaussian_mean.optimal_elbo(truth),
        "maximum_likelihood": gaussian_mean.maximum_likelihood(data.train, config.sigma_0)[1],
    }
    return {"parameters": parameters, "elbo": number(judged) | targets}


def tree(config: Config, data: Data, fits: Fits, judged: Estimate) -> DataTree:
    """The fit, its ELBO of each datum, and the data."""
    c, x = ({name: data.train[name]} for name in "cx")
    return to_datatree(fits["fit"], judged, constant_data=c, observed_data=x)


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it: each number beside its target."""
    rows = []
    for name, p in result["parameters"].items():
        error = p["standard_error"]
        rows.append(
            (
                name,
                f"{p['estimate']:.5f}",
                f"{np.std(p['per_seed']):.1e}",
                f"{p['optimum']:.5f}",
                f"{(p['estimate'] - p['optimum']) / error:+.2f}",
                f"{p['maximum_likelihood']:.5f}",
                f"{max(abs(e - p['maximum_likelihood']) for e in p['per_seed']) / error:.3f}",
            )
        )
    headers = ("parameter", "estimate", "spread", "optimum", "error / s.e.")
    headers += ("max. likelihood", "worst seed / s.e.")
    body = tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 6)
    elbo, config = result["elbo"], result["config"]
    seeds = f"{config['num_seeds']} seed" + "s" * (config["num_seeds"] > 1)
    return (
        f"{body}\n\n"
        f"ELBO, nats per datum: {elbo['estimate']:.5f} +- {elbo['standard_error']:.5f}, optimum "
        f"{elbo['optimum']:.5f}, best on these data {elbo['maximum_likelihood']:.5f}\n"
        f"{config['num_data']} data, {seeds}, {config['num_steps']} steps of "
        f"{config['objective']}\n"
        f"(s.e.: standard error of the maximum-likelihood value around the optimum; worst seed: "
        f"distance to the maximum-likelihood value)"
    )


# --- figures --------------------------------------------------------------------------------------


def figures(
    config: Config, data: Data, fits: Fits, judged: Estimate, result: dict[str, Any]
) -> dict[str, Figure]:
    """The figures of a run."""
    return {"elbo": elbo_figure(fits["fit"], result), "recovery": recovery_figure(result)}


def elbo_figure(fitted: inference.Fit, result: Mapping[str, Any]) -> Figure:
    """The ELBO trace of every seed, and the optimum as a line."""
    from matplotlib.figure import Figure

    best = result["elbo"]["maximum_likelihood"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, fitted.elbo.shape[1] + 1)
    for seed, trace in zip(fitted.seeds, fitted.elbo, strict=True):
        axes.plot(steps, trace, lw=0.6, alpha=0.7, label=f"seed {seed}")
    axes.axhline(result["elbo"]["optimum"], color="black", ls="--", lw=1.2, label="optimal ELBO")
    noise = np.nanstd(fitted.elbo[:, -max(1, len(steps) // 10) :])
    axes.set(
        xscale="log",
        ylim=(best - max(1.0, 8 * noise), best + max(0.15, 5 * noise)),
        xlabel="training (steps)",
        ylabel="ELBO of the batch (nats per datum)",
        title="Gaussian unknown mean: training ELBO",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="lower right", fontsize="small", ncols=2)
    return figure


def written_in_greek(name: str) -> str:
    """A parameter's symbol, θ₁ for example. Matplotlib's own formulas take half a second."""
    letter, index = name.split("_")
    return {"theta": "θ", "phi": "φ"}[letter] + "₀₁₂₃₄"[int(index)]


def recovery_figure(result: Mapping[str, Any]) -> Figure:
    """The distance of each parameter from its optimum, in standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-2, 2, color="0.93", label="optimum ± 2 standard errors")
    axes.axvline(0, color="black", ls="--", lw=1.2, label="optimum")
    for row, p in enumerate(result["parameters"].values()):
        known = np.array([p["maximum_likelihood"], *p["per_seed"]])
        best, *seeds = (known - p["optimum"]) / p["standard_error"]
        offsets = np.linspace(-0.2, 0.2, len(seeds)) if len(seeds) > 1 else np.zeros(1)
        label = None if row else "maximum likelihood of the data"
        axes.plot([best, best], [row - 0.35, row + 0.35], color="C1", lw=2.5, label=label)
        label = None if row else "estimate, one dot per seed"
        axes.plot(seeds, row + offsets, "o", color="C0", ms=4, label=label)
    limit = max(3.0, 1.1 * max(np.abs(np.asarray(line.get_xdata())).max() for line in axes.lines))
    names = [written_in_greek(name) for name in result["parameters"]]
    axes.set(
        xlim=(-limit, limit),
        yticks=range(len(names)),
        yticklabels=names,
        xlabel="distance from the optimum (standard errors)",
        ylabel="parameter",
        title="Gaussian unknown mean: recovery",
    )
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize="small")
    return figure


EXPERIMENT = Experiment(
    name="gaussian_mean",
    config=Config,
    record=Record,
    data=simulate,
    programs=programs,
    training=training,
    judge=judge,
    summarize=summarize,
    tree=tree,
    figures=figures,
    table=table,
)


def main(config: Config) -> dict[str, Any]:
    """Recover theta*, phi* of the Gaussian unknown-mean conditional VAE."""
    return run(EXPERIMENT, config)


if __name__ == "__main__":
    command_line(main, Config)
