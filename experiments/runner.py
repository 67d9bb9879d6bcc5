"""The runner of all scripts: claim the directory, train, judge, write, draw, print."""

import importlib
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import runs
from experiments.compiled import keep_compiled
from experiments.experiment import Experiment, Fits
from experiments.precision import full_precision
from experiments.settings import to_json
from inference import Estimate, Fit, Held, Prepared, fit
from inference.fit import programs_of
from inference.sites import preparation

PER_DATUM_STEPS = 1000  # A table of numbers is fitted to the test data in so many steps.


def run(experiment: Experiment, config: Any) -> dict[str, Any]:
    """Runs an experiment, or reads what the same command wrote before.

    A run that was killed goes on from its last checkpoint.

    Args:
        experiment: the script.
        config: its settings.

    Returns:
        What ``result.json`` holds.

    Raises:
        ValueError: settings, data or a directory that cannot be used.
        OSError: a directory that cannot be written.
        NonFiniteError: the training failed.
    """
    began = time.perf_counter()
    keep_compiled()
    full_precision()
    data = experiment.data(config)
    experiment.programs(config, data.record, experiment.names(config)[0], {})  # may refuse
    with runs.claim(experiment, config, data) as path:
        result = runs.read_json(path / "result.json")
        if result is None:
            import_ahead("orbax.checkpoint", "xarray", "matplotlib.backends.backend_agg")
            fits = train(experiment, config, data, path)
            result = _finish(experiment, config, data, fits, path, began)
    seconds = result["seconds"]
    print(
        f"\n{experiment.table(result)}\n\n{result['device']}: compiling {seconds['compile']:.1f} "
        f"s, training {seconds['run']:.1f} s, judging {seconds['evaluate']:.1f} s, in all "
        f"{seconds['total']:.1f} s\nwritten to {path}"
    )
    return result


def train(
    experiment: Experiment, config: Any, data: Any, path: Path | None = None
) -> dict[str, Fit]:
    """Trains the fits of an experiment, one after the other.

    Args:
        experiment: the script.
        config: its settings.
        data: its data.
        path: a directory for checkpoints and finished fits. Nothing is written without one.
    """
    fits: dict[str, Fit] = {}
    for name in experiment.names(config):
        model, guide = experiment.programs(config, data.record, name, fits)
        fits[name] = fit(
            model,
            guide,
            experiment.arrays(data, name),
            preprocess=preparation(model),
            checkpoint=path and path / "checkpoints" / name,
            progress=config.progress,
            **experiment.training(config, data, name, fits),
        )
        if path:
            fits[name].save(path / "fits" / name)
    return fits


def _finish(
    experiment: Experiment, config: Any, data: Any, fits: Fits, path: Path, began: float
) -> dict[str, Any]:
    """Judges, draws and writes. ``result.json`` comes last: with it a run is finished."""
    judging = time.perf_counter()
    judged = experiment.judge(config, data, fits)
    settings, main = to_json(config), fits[experiment.main(config)]
    seconds = {
        part: sum(known.info["seconds"][part] for known in fits.values())
        for part in ("compile", "run")
    }
    result = {
        "experiment": experiment.name,
        "config": settings,
        "dataset": data.record.name,
        "num_data": {
            split: len(next(iter(arrays.values()))) for split, arrays in runs.splits(data).items()
        },
        "num_parameters": _num_parameters(main),
        "num_steps": {name: known.info["num_steps"] for name, known in fits.items()},
        **experiment.summarize(config, data, fits, judged),
        "seconds": seconds | {"evaluate": time.perf_counter() - judging},
        "device": main.info["device"],
        "versions": main.info["versions"],
    }
    for name, figure in experiment.figures(config, data, fits, judged, result).items():
        figure.savefig(path / f"{name}.png", dpi=120)
    tree = experiment.tree(config, data, fits, judged)
    tree.attrs |= {
        "experiment": experiment.name,
        "settings": json.dumps(settings),
        "dataset": data.record.name,
    }
    tree.to_netcdf(path / "trace.nc", engine="h5netcdf")
    result["seconds"]["total"] = time.perf_counter() - began
    runs.write_json(path / "result.json", result)
    shutil.rmtree(path / "checkpoints")  # the fits have it all
    return result


def _num_parameters(fitted: Fit) -> int:
    """How many numbers a seed has trained."""
    fixed = programs_of(fitted, fitted.batch).fixed
    trained = {name: value for name, value in fitted.params.items() if name not in fixed}
    return sum(p.size for p in jax.tree.leaves(trained)) // fitted.num_seeds


def fit_anew(fitted: Fit, guide: Any, test: Prepared, seed: int, progress: bool) -> Fit:
    """A fit of the test data, if the guide has a table of numbers for the training data.

    All parameters stay as they are, but each seed gets a new table.

    Args:
        fitted: the fit of the training data.
        guide: the same guide, with a table for the test data.
        test: the test data.
        seed: the random seed.
        progress: whether to show progress.
    """
    if "encoder" not in fitted.params:
        return fitted
    anew = []
    for i in range(fitted.num_seeds):
        params = {n: value for n, value in fitted.params_of(i).items() if n != "encoder"}
        one = fit(
            Held(fitted.model, params),
            Held(guide, params),
            test,
            optimizer=optax.adam(optax.cosine_decay_schedule(0.05, PER_DATUM_STEPS)),
            num_steps=PER_DATUM_STEPS,
            seed=seed,
            progress=progress,
        )
        anew.append(one)
    tables = jax.tree.map(lambda *params: jnp.concatenate(params), *(one.params for one in anew))
    return replace(
        fitted,
        guide=guide,
        params=fitted.params | tables,
        config=fitted.config | {"data": anew[0].config["data"]},
        batch=anew[0].batch,
    )


def number(judged: Estimate) -> dict[str, Any]:
    """A judge's number as ``result.json`` has it: the mean over seeds and data, and its errors."""
    values = judged.pointwise.mean(0, dtype=np.float64)
    written = {
        "estimate": float(values.mean()),
        "standard_error": float(values.std() / np.sqrt(len(values))),
        "per_seed": judged.estimate.tolist(),
        "num_samples": judged.num_samples,
    }
    errors = judged.monte_carlo_error
    if np.isfinite(errors).all():
        written["monte_carlo_error"] = float(np.sqrt(np.sum(np.square(errors))) / len(errors))
    return written


def import_ahead(*modules: str) -> None:
    """Imports modules in the background, one after the other, while the device is at work.

    They take as long to import as a small model to train.
    """

    def imports() -> None:
        for module in modules:
            importlib.import_module(module)

    threading.Thread(target=imports, daemon=True).start()
