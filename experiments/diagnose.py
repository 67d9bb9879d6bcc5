"""One page about a finished run: can it be believed?

    python experiments/diagnose.py runs/mnist_vae-20261124-101500

Prints the findings and the numbers, and writes them into the run's directory with figures:
``diagnosis.md``, ``diagnosis.json`` and ``diagnosis_*.png``. A run of your own model also needs its
file:

    python experiments/diagnose.py runs/train-... --program my_model.py:model

The function behind it is ``inference.diagnose``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from experiments import runs
from experiments.settings import check_least, command_line
from experiments.train import Source
from inference import Fit, Page, diagnose
from inference._streams import only
from inference.fit import programs_of


@dataclass(frozen=True)
class Config:
    """Settings of a diagnosis.

    Attributes:
        run: Directory of a finished run.
        program: FILE:NAME of your own model, for a run of train.py.
        fit: Name of the fit, for a run with several. Default: the one that the run is known for.
        data_dir: Directory with the data set's files, to read offline.
        num_data: Data for the judges that take long: bracket, gap, ELBO of training data.
        num_simulations: Simulations of the calibration.
        num_samples: Importance samples for each datum.
        num_steps: Temperatures of the annealing.
        progress: Whether to show progress.
    """

    run: Positional[Path]
    program: str | None = None
    fit: str | None = None
    data_dir: Path | None = None
    num_data: int = 100
    num_simulations: int = 1000
    num_samples: int = 1000
    num_steps: int = 500
    progress: bool = True

    def __post_init__(self):
        check_least(2, self, "num_data", "num_simulations")
        check_least(1, self, "num_samples", "num_steps")


def main(config: Config) -> Page:
    """One page about a finished run."""
    model = None if config.program is None else Source.read(config.program).found()
    run = runs.load(config.run, model)
    fitted, name = fit_of(run, config.fit)
    train, data = arrays(config, run, fitted, name)
    page = diagnose(
        fitted,
        fitted.prepare(data),
        train=None if train is data else fitted.prepare(train),
        num_data=config.num_data,
        num_simulations=config.num_simulations,
        num_samples=config.num_samples,
        num_steps=config.num_steps,
        progress=config.progress,
    )
    print(page)
    print(f"\nwritten to {page.save(config.run)}")
    return page


def fit_of(run: runs.Run, name: str | None) -> tuple[Fit, str]:
    """A fit of a run, and its name.

    Raises:
        ValueError: the run has no such fit.
    """
    main = run.experiment.main(run.config)
    if name is None:
        return run.fit, main
    if name not in run.fits:
        raise ValueError(f"fit: expected one of {', '.join(run.fits)}, got {name!r}")
    return run.fits[name], name


def arrays(
    config: Config, run: runs.Run, fitted: Fit, name: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The arrays that a fit was trained on, and those to judge it on: the test data.

    They are the same where the run has no test data, or the guide knows its training data alone.
    """
    changes = {} if config.data_dir is None else {"data_dir": config.data_dir}
    known = run.data(**changes)
    train = run.experiment.arrays(known, name)
    test = getattr(known, "test", None)
    if test is None or programs_of(fitted, fitted.batch).tied_to is not None:
        return train, train
    return train, only(test, list(train))


if __name__ == "__main__":
    command_line(main, Config)
