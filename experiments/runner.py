"""The runner of all scripts: claim the directory, train, judge, write, draw, print."""

import contextlib
import importlib
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import devices, runs
from experiments.compiled import keep_compiled
from experiments.experiment import Experiment, Fits
from experiments.precision import full_precision
from experiments.settings import to_json
from inference import Estimate, Fit, Held, fit
from inference.fit import programs_of
from inference.sites import length, preparation

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
        StreamError: data could not be read. The run goes on from there by the same command.
        ProcessError: another process has stopped.
    """
    began = time.perf_counter()
    with devices.one_of_many(config):
        keep_compiled()
        full_precision()
        with devices.together():
            devices.chosen(config)
            data = experiment.data(config)
            experiment.programs(config, data.record, experiment.names(config)[0], {})  # may refuse
        with _claimed(experiment, config, data) as (path, result):
            if result is None:
                import_ahead("orbax.checkpoint", "xarray", "matplotlib.backends.backend_agg")
                fits = train(experiment, config, data, path)
                result = _finish(experiment, config, data, fits, path, began)
        seconds = result["seconds"]
        print(
            f"\n{experiment.table(result)}\n\n{result['device']}: compiling "
            f"{seconds['compile']:.1f} s, training {seconds['run']:.1f} s, judging "
            f"{seconds['evaluate']:.1f} s, in all {seconds['total']:.1f} s\nwritten to {path}"
        )
        if "devices" in result:  # older runs do not say
            print(devices.words(result["devices"]))
    return result


def run_many(
    experiment: Experiment,
    config: Any,
    settings: Mapping[str, Mapping[str, Any]],
    others: Iterable[str] = (),
) -> dict[str, Any]:
    """Runs an experiment several times, in one directory.

    Args:
        experiment: the script.
        config: the settings that all runs have.
        settings: by the name of a run, its own settings.
        others: what else the directory may hold.

    Returns:
        What each ``result.json`` holds, by the name of the run.

    Raises:
        ValueError: the directory holds other files.
    """
    with devices.one_of_many(config):
        with devices.together():
            parent = None
            if devices.is_first():
                parent = config.out or runs.new_directory(Path("runs"), experiment.name)
                strangers = {p.name for p in parent.glob("[!.]*")} - {*settings, *others}
                if strangers:
                    raise ValueError(
                        f"out: expected a new or empty directory, or these runs' own; {parent} "
                        f"holds {min(strangers)}; give another directory"
                    )
        parent = Path(devices.text_of_first(parent and str(parent)))
    return {
        name: run(experiment, replace(config, **own, out=parent / name))
        for name, own in settings.items()
    }


@contextlib.contextmanager
def _claimed(
    experiment: Experiment, config: Any, data: Any
) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The directory of a run, and its result if it is finished.

    Process 0 claims and reads it. The others know its name and nothing more.
    """
    path = result = None
    with contextlib.ExitStack() as stack:
        with devices.together():
            if devices.is_first():
                path = stack.enter_context(runs.claim(experiment, config, data))
                result = runs.read_json(path / "result.json")
        path, result = devices.text_of_first([path and str(path), result])
        yield Path(path), result


def train(
    experiment: Experiment, config: Any, data: Any, path: Path | None = None
) -> dict[str, Fit]:
    """Trains the fits of an experiment, one after the other.

    Args:
        experiment: the script.
        config: its settings.
        data: its data.
        path: a directory for checkpoints and finished fits. Nothing is written without one, and
            process 0 alone writes.
    """
    fits: dict[str, Fit] = {}
    for name in experiment.names(config):
        model, guide = experiment.programs(config, data.record, name, fits)
        arrays = experiment.arrays(data, name)
        settings = experiment.training(config, data, name, fits)
        batch_size = settings.get("batch_size") or length(arrays)
        fits[name] = fit(
            model,
            guide,
            arrays,
            preprocess=preparation(model),
            checkpoint=path and path / "checkpoints" / name,
            mesh=devices.mesh_of(config, settings.get("num_seeds") or 1, batch_size),
            progress=config.progress,
            **settings,
        )
        with devices.together():
            if path and devices.is_first():
                fits[name].save(path / "fits" / name)
    return fits


class _Written(NamedTuple):
    """What a finished run writes."""

    result: dict[str, Any]
    figures: dict[str, Any]
    tree: Any


def _finish(
    experiment: Experiment, config: Any, data: Any, fits: Fits, path: Path, began: float
) -> dict[str, Any]:
    """All processes judge and draw, as the fits' devices may belong to all. Process 0 writes."""
    finished = _judged(experiment, config, data, fits)
    with devices.together():
        if devices.is_first():
            _write(path, finished, began)
    return devices.text_of_first(finished.result)


def _judged(experiment: Experiment, config: Any, data: Any, fits: Fits) -> _Written:
    """What ``result.json`` says of the fits. Nothing is written."""
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
        "num_data": {split: length(arrays) for split, arrays in runs.splits(data).items()},
        "num_parameters": _num_parameters(main),
        "num_steps": {name: known.info["num_steps"] for name, known in fits.items()},
        **experiment.summarize(config, data, fits, judged),
        "seconds": seconds | {"evaluate": time.perf_counter() - judging},
        "device": main.info["device"],
        "devices": devices.describe(config),
        "versions": main.info["versions"],
    }
    figures = experiment.figures(config, data, fits, judged, result)
    tree = experiment.tree(config, data, fits, judged)
    tree.attrs |= {
        "experiment": experiment.name,
        "settings": json.dumps(settings),
        "dataset": data.record.name,
    }
    return _Written(result, figures, tree)


def _write(path: Path, finished: _Written, began: float) -> None:
    """Writes a finished run. ``result.json`` comes last: with it a run is finished."""
    for name, figure in finished.figures.items():
        figure.savefig(path / f"{name}.png", dpi=120)
    finished.tree.to_netcdf(path / "trace.nc", engine="h5netcdf")
    finished.result["seconds"]["total"] = time.perf_counter() - began
    runs.write_json(path / "result.json", finished.result)
    shutil.rmtree(path / "checkpoints")  # the fits have it all


def _num_parameters(fitted: Fit) -> int:
    """How many numbers a seed has trained."""
    fixed = programs_of(fitted, fitted.batch).fixed
    trained = {name: value for name, value in fitted.params.items() if name not in fixed}
    return sum(p.size for p in jax.tree.leaves(trained)) // fitted.num_seeds


def fit_anew(fitted: Fit, guide: Any, test: Mapping[str, Any], config: Any) -> Fit:
    """A fit of the test data, if the guide has a table of numbers for the training data.

    All parameters stay as they are, but each seed gets a new table.

    Args:
        fitted: the fit of the training data.
        guide: the same guide, with a table for the test data.
        test: the test data, prepared.
        config: the settings: ``seed``, ``progress`` and the devices.
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
            seed=config.seed,
            mesh=devices.mesh_of(config, 1, length(test), fewer=True),
            progress=config.progress,
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
