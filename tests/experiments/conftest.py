"""One run of every script, made once and looked at by many tests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from filelock import FileLock

from experiments import (
    exact,
    gaussian_mean,
    linear_gaussian,
    mnist_cvae,
    mnist_quadrants,
    mnist_vae,
    svhn_vae,
)

DIGITS = {"dataset": "digits", "hidden": (16,), "num_epochs": 3, "num_test": 60}
SCRIPTS = {
    "gaussian_mean": (
        gaussian_mean,
        {"num_data": 4_000, "num_steps": 600, "batch_size": 400, "num_seeds": 2, "seed": 5},
    ),
    "linear_gaussian": (
        linear_gaussian,
        {"dataset": "lines.npz", "given_label": True, "guides": ("mean-field",), "num_seeds": 2}
        | {"num_train": 500, "num_latents": 3, "num_steps": 200, "batch_size": 100},
    ),
    "exact": (
        exact,
        {"quick": True, "objectives": ("Trace_ELBO",), "num_steps": 300, "num_latents": 2}
        | {"num_particles": 1},
    ),
    "mnist_vae": (
        mnist_vae,
        DIGITS | {"num_latents": 3, "num_samples": 20, "schedule": "burda", "average": 0.2},
    ),
    "mnist_cvae": (
        mnist_cvae,
        DIGITS
        | {"num_latents": 2, "prior": "learned", "num_embedded": 4, "num_label_samples": 5}
        | {"num_samples": 30, "num_seeds": 2, "kl_warm_up": 1.0, "clip_norm": 100.0},
    ),
    "svhn_vae": (
        svhn_vae,
        {"dataset": "colours.npz", "guide": "low-rank", "channels": (4,), "hidden": (8,)}
        | {"num_latents": 3, "num_epochs": 1, "batch_size": 20, "num_samples": 4},
    ),
    "mnist_quadrants": (
        mnist_quadrants,
        {"dataset": "digits", "num_test": 40, "num_validation": 60, "num_train": 500}
        | {"baseline_epochs": 6, "num_epochs": 3, "num_particles": 3, "num_samples": 20},
    ),
}

LONG = ("mnist_vae", "svhn_vae", "exact", "mnist_quadrants", "linear_gaussian")  # slow tests
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SCRIPTS]


class Finished(NamedTuple):
    """A finished run.

    ``script`` made it with the settings ``config`` in the directory ``path``. ``labels`` has the
    labels of all axes, by figure. Figures take too long to draw twice.
    """

    script: Any
    result: dict[str, Any]
    path: Path
    config: Any
    labels: dict[str, list[list[str]]]


def lines() -> dict[str, np.ndarray]:
    """Images of 6 x 5 pixels from a linear-Gaussian process, with labels that matter."""
    rng = np.random.default_rng(0)
    c = rng.integers(0, 2, 1_200)
    z = rng.normal(size=(1_200, 3)) * [2.0, 1.0, 0.5]
    x = z @ rng.normal(size=(3, 30)) + 0.5 * rng.normal(size=(1_200, 30))
    x += c[:, None] * rng.normal(size=30)
    x = (x - x.min()) / (x.max() - x.min())
    return {"x": x.reshape(-1, 6, 5).astype(np.float32), "c": c}


def colours() -> dict[str, np.ndarray]:
    """Images of 8 x 12 pixels, each of one of three colours, and the colour's number."""
    rng = np.random.default_rng(0)
    c = rng.integers(3, size=72)
    x = rng.integers(0, 60, (72, 8, 12, 3))
    x[np.arange(72), :, :, c] += 150
    return {"x": x.astype(np.uint8), "c": c}


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """A directory of this session, the same for all its workers."""
    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "scripts"
    path.mkdir(exist_ok=True)
    with FileLock(path / "data.lock"):
        for name, make in {"lines": lines, "colours": colours}.items():
            if not (path / f"{name}.npz").exists():
                np.savez(path / f"{name}.npz", **make())
    return path


def noting_labels(figures: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """The function ``figures``. It writes down the labels of the axes that it draws."""

    def noting(*args: Any) -> Any:
        drawn = figures(*args)
        labels = {
            name: [[axes.get_xlabel(), axes.get_ylabel()] for axes in figure.axes]
            for name, figure in drawn.items()
        }
        file.write_text(json.dumps(labels))
        return drawn

    return noting


@pytest.fixture(scope="session")
def run_of(shared):
    """The finished run of a script, by the script's name."""

    def finished(name: str) -> Finished:
        script, settings = SCRIPTS[name]
        if str(settings.get("dataset")).endswith(".npz"):
            settings = settings | {"dataset": str(shared / settings["dataset"])}
        path = shared / "runs" / name
        config = script.Config(**settings, out=path, progress=False)
        with FileLock(shared / f"{name}.lock"):
            if not (path / "result.json").exists():
                with pytest.MonkeyPatch.context() as patch:
                    figures = noting_labels(script.EXPERIMENT.figures, shared / f"{name}.json")
                    patch.setattr(script, "EXPERIMENT", replace(script.EXPERIMENT, figures=figures))
                    script.main(config)
        result, labels = (
            json.loads(file.read_text()) for file in (path / "result.json", shared / f"{name}.json")
        )
        return Finished(script, result, path, config, labels)

    return finished


@pytest.fixture(params=PARAMS)
def script(request) -> tuple[Any, dict[str, Any]]:
    """Every script, with its settings here."""
    return SCRIPTS[request.param]


@pytest.fixture(scope="session", params=PARAMS)
def finished(request, run_of) -> Finished:
    """The finished run of every script."""
    return run_of(request.param)
