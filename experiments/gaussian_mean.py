"""Recover theta*, phi* of the Gaussian unknown-mean conditional VAE, and show that they are right.

    python experiments/gaussian_mean.py --mu-0 2 --sigma 0.5 --num-seeds 8

The model, its guide and its optimum are in ``models/gaussian_mean.py``. Stochastic gradients
arrive at seven numbers to a fraction of their standard errors because

- the optimiser works in coordinates in which the affine maps' inputs are uncorrelated and have
  unit size, and lengths are measured in sigma_0 (``coordinates``), so that neither mu_0 nor the
  scale of the data is felt;
- the two particles of each step are mirror images, stratified over the batch
  (``inference.particles``);
- the learning rate falls to zero along a cosine, and the last part of the path is averaged.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import random
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from tabulate import tabulate

import inference
from experiments.runs import (
    Run,
    check_known,
    check_least,
    check_positive,
    command_line,
    import_ahead,
    trace_attributes,
)
from inference import Fit, antithetic, fit, pointwise_elbo, precondition, to_datatree
from models import gaussian_mean

# Of two particles each; where particles may be mirror images, they are.
OBJECTIVES = {name: partial(build, 2) for name, build in inference.OBJECTIVES.items()} | {
    "Trace_ELBO": lambda: Trace_ELBO(2, vectorize_particles=antithetic),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(2, vectorize_particles=antithetic),
}


@dataclass(frozen=True)
class Config:
    """Recover theta*, phi* of the Gaussian unknown-mean conditional VAE.

    Attributes:
        mu_0: mean of z where c is zero.
        sigma_0: standard deviation of z given c, known to the model.
        sigma: standard deviation of x given z.
        num_data: pairs (c, x) simulated from the truth.
        num_steps: steps of the optimiser.
        batch_size: data per step; 2000, or all there are if fewer, unless given.
        learning_rate: the first step's; it falls to zero along a cosine.
        average: fraction of the run, at its end, over which parameters are averaged.
        objective: Trace_ELBO, TraceMeanField_ELBO, RenyiELBO (or importance-weighted, the same),
            doubly-reparameterized or sticking-the-landing.
        num_seeds: restarts trained together.
        seed: of the data and of the first restart.
        out: directory of the run; a fresh one under runs/ unless given.
        progress: whether to show a progress bar.
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
        self.truth()
        check_least(1, self, "num_data", "num_steps", "num_seeds")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate")
        check_known(self, objective=OBJECTIVES)
        if self.batch_size is not None and not 1 <= self.batch_size <= self.num_data:
            raise ValueError(
                f"batch_size: expected 1 to num_data = {self.num_data}, got {self.batch_size}"
            )
        if not 0 <= self.average < 1:
            raise ValueError(f"average: expected a fraction below 1, got {self.average}")

    def truth(self) -> gaussian_mean.Truth:
        """The process that makes the data."""
        return gaussian_mean.Truth(self.mu_0, self.sigma_0, self.sigma)


def coordinates(*columns: np.ndarray | float, scale: float) -> np.ndarray:
    """P such that the features' combination by P @ u varies by ``scale`` times u's length.

    Args:
        columns: the inputs of an affine map, each (N,) or a constant.
        scale: the unit in which the map's output is measured.

    Returns:
        (k, k): with features F, mean of (F P)^T (F P) is scale^2 times the identity.
    """
    features = np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float64)
    moments = features.T @ features / len(features)
    return (scale * np.linalg.cholesky(np.linalg.inv(moments))).astype(np.float32)


def train(config: Config, data: dict[str, np.ndarray], checkpoint: Path | None = None) -> Fit:
    """Fits model and guide to ``data`` with the settings of ``config``."""
    c, x = data["c"], data["x"]
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    optimizer = precondition(
        optax.adam(schedule, b2=0.99),
        {
            ("theta_1", "theta_2"): coordinates(1.0, c, scale=config.sigma_0),
            ("phi_1", "phi_2", "phi_3"): coordinates(x, c, 1.0, scale=config.sigma_0),
        },
    )
    return fit(
        gaussian_mean.Model(config.sigma_0, x_loc=float(np.median(x))),
        gaussian_mean.Guide(config.sigma_0),
        data,
        objective=OBJECTIVES[config.objective](),
        optimizer=optimizer,
        num_steps=config.num_steps,
        batch_size=config.batch_size or min(2_000, config.num_data),
        num_seeds=config.num_seeds,
        seed=config.seed,
        average=config.average,
        checkpoint=checkpoint,
        progress=config.progress,
    )


def main(config: Config) -> dict[str, Any]:
    """Recover theta*, phi* of the Gaussian unknown-mean conditional VAE."""
    began = time.perf_counter()
    data = config.truth().simulate(config.num_data, config.seed)
    maximum, best_elbo = gaussian_mean.maximum_likelihood(data, config.sigma_0)
    run = Run("gaussian_mean", config)
    result = run.read("result.json")
    if result is None:
        import_ahead("orbax.checkpoint", "matplotlib.backends.backend_agg", "arviz_base")
        fitted = train(config, data, run.path / "checkpoints")
        elbos = judge(config, data, fitted)
        result = summarize(config, data, fitted, elbos, maximum, best_elbo)
        draw_elbo(fitted, result, run.path / "elbo.png")
        draw_recovery(result, run.path / "recovery.png")
        tree = to_datatree(
            fitted,
            constant_data={"c": data["c"]},
            observed_data={"x": data["x"]},
            evaluation={"elbo": elbos.astype(np.float32)},
        )
        tree.attrs |= trace_attributes("gaussian_mean", asdict(config), "gaussian_mean", data)
        tree.to_netcdf(run.path / "trace.nc", engine="h5netcdf")
        result["seconds"]["total"] = time.perf_counter() - began
        run.write("result.json", result)
    print(table(result))
    print(f"written to {run.path}")
    return result


def judge(config: Config, data: dict[str, np.ndarray], fitted: Fit) -> np.ndarray:
    """The ELBO of every seed and datum, (seed, N)."""
    model, guide = gaussian_mean.Model(config.sigma_0), gaussian_mean.Guide(config.sigma_0)
    key = random.key(config.seed)

    @jax.jit
    @jax.vmap
    def evaluate(params: dict[str, Any]) -> Any:
        return pointwise_elbo(model, guide, params, data, key=key)

    return np.asarray(evaluate(fitted.params), np.float64)


def summarize(
    config: Config,
    data: dict[str, np.ndarray],
    fitted: Fit,
    elbos: np.ndarray,
    maximum: dict[str, float],
    best_elbo: float,
) -> dict[str, Any]:
    """The numbers of ``result.json``."""
    truth = config.truth()
    optimum = gaussian_mean.optimum(truth)
    errors = gaussian_mean.standard_errors(
        truth, config.num_data, float(data["c"].mean()), float(data["c"].var())
    )
    parameters = {
        name: {
            "estimate": float(np.mean(fitted.params[name])),
            "per_seed": np.asarray(fitted.params[name], np.float64).tolist(),
            "optimum": optimum[name],
            "maximum_likelihood": maximum[name],
            "standard_error": errors[name],
        }
        for name in gaussian_mean.PARAMETERS
    }
    return {
        "experiment": "gaussian_mean",
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "parameters": parameters,
        "elbo": {
            "estimate": float(elbos.mean()),
            "per_seed": elbos.mean(1).tolist(),
            "standard_error": float(elbos.mean(0).std() / np.sqrt(config.num_data)),
            "optimum": gaussian_mean.optimal_elbo(truth),
            "maximum_likelihood": best_elbo,
        },
        "seconds": fitted.info["seconds"],
        "device": fitted.info["device"],
        "versions": fitted.info["versions"],
    }


def table(result: dict[str, Any]) -> str:
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
    headers = (
        "parameter",
        "estimate",
        "spread",
        "optimum",
        "error / s.e.",
        "max. likelihood",
        "worst seed / s.e.",
    )
    body = tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 6)
    elbo, config, seconds = result["elbo"], result["config"], result["seconds"]
    seeds = f"{config['num_seeds']} seed" + "s" * (config["num_seeds"] > 1)
    return (
        f"\n{body}\n\n"
        f"ELBO, nats per datum: {elbo['estimate']:.5f} +- {elbo['standard_error']:.5f}, optimum "
        f"{elbo['optimum']:.5f}, best on these data {elbo['maximum_likelihood']:.5f}\n"
        f"{config['num_data']} data, {seeds}, {config['num_steps']} steps of "
        f"{config['objective']} on {result['device']}; compiling {seconds['compile']:.1f} s, "
        f"training {seconds['run']:.1f} s, in all {seconds['total']:.1f} s\n"
        f"(s.e.: standard error of the maximum-likelihood value around the optimum; worst seed: "
        f"distance to the maximum-likelihood value)"
    )


def draw_elbo(fitted: Fit, result: dict[str, Any], path: Path) -> None:
    """Every seed's ELBO trace, and the optimum as a line."""
    from matplotlib.figure import Figure

    best = result["elbo"]["maximum_likelihood"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, fitted.elbo.shape[1] + 1)
    for i, trace in enumerate(fitted.elbo):
        axes.plot(steps, trace, lw=0.6, alpha=0.7, label=f"seed {fitted.config['seed'] + i}")
    axes.axhline(result["elbo"]["optimum"], color="black", ls="--", lw=1.2, label="optimal ELBO")
    noise = np.nanstd(fitted.elbo[:, -max(1, len(steps) // 10) :])
    axes.set(
        xscale="log",
        ylim=(best - max(1.0, 8 * noise), best + max(0.15, 5 * noise)),
        xlabel="step",
        ylabel="ELBO of the batch (nats per datum)",
        title="Gaussian unknown mean: training ELBO",
    )
    axes.legend(loc="lower right", fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def draw_recovery(result: dict[str, Any], path: Path) -> None:
    """Each parameter's distance from its optimum, in standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = list(result["parameters"])
    labels = [rf"$\{n.split('_')[0]}_{n.split('_')[1]}$" for n in names]
    axes.axvspan(-2, 2, color="0.93", label="optimum ± 2 standard errors")
    axes.axvline(0, color="black", ls="--", lw=1.2, label="optimum")
    for row, name in enumerate(names):
        p = result["parameters"][name]
        to_errors = lambda value, p=p: (value - p["optimum"]) / p["standard_error"]  # noqa: E731
        seeds = [to_errors(value) for value in p["per_seed"]]
        offsets = np.linspace(-0.2, 0.2, len(seeds)) if len(seeds) > 1 else [0.0]
        axes.plot(
            [to_errors(p["maximum_likelihood"])] * 2,
            [row - 0.35, row + 0.35],
            color="C1",
            lw=2.5,
            label="maximum likelihood of the data" if row == 0 else None,
        )
        axes.plot(
            seeds,
            row + np.array(offsets),
            "o",
            color="C0",
            ms=4,
            label="estimate, one dot per seed" if row == 0 else None,
        )
    limit = max(3.0, 1.1 * max(np.abs(np.asarray(line.get_xdata())).max() for line in axes.lines))
    axes.set(
        xlim=(-limit, limit),
        yticks=range(len(names)),
        yticklabels=labels,
        xlabel="distance from the optimum (standard errors)",
        title="Gaussian unknown mean: recovery",
    )
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command_line(main, Config)
