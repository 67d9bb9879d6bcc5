"""Runs on disk: open one again, list those that are there.

    python experiments/runs.py

prints a table of the runs in ``runs/``. In Python:

    run = runs.load("runs/mnist_vae-20261124-101500")
    run.config, run.fit, run.tree, run.result, run.data()
    runs.table("runs")

A run directory holds

- ``config.json``: the settings, what the model needs to know of the data, the data's hashes
- ``result.json``: the numbers, the device, versions and seconds. A run that has it is finished
- ``trace.nc``: the ELBO traces and the judged numbers by datum, for ArviZ
- ``fits/``: the fits, as ``Fit.save`` writes them
- ``program.py``: a copy of the file with the model, if it is your own (``experiments/train.py``)
- figures

The same command finds its own directory again and goes on where it was killed. The directory of
another run is never touched.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout
from tabulate import tabulate
from tyro.conf import Positional

from experiments.datasets import is_streamed, pieces
from experiments.experiment import DataTree, Experiment, Fit
from experiments.settings import command_line, from_json, to_json

if TYPE_CHECKING:
    from pandas import DataFrame
else:  # slow to import
    DataFrame = Any

FORMAT = 1  # The layout of a run directory. It rises when an older version cannot read it.
PROGRAM = "program.py"  # the copy of a user's own program
NUMBERS = {  # of ``result.json``, as a table heads them
    "elbo": "ELBO",
    "log_likelihood": "log-likelihood",
    "log_predictive_density": "log predictive density",
}
IDENTITY = ("experiment", "settings", "record", "data")  # what makes two runs the same


class RunError(ValueError):
    """A directory that cannot be read as a run, or data that are not the run's."""


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run, as ``load`` reads it.

    Attributes:
        path: the run's directory.
        experiment: the script that made it.
        config: its settings, with ``out`` as the directory.
        record: what its model knows of the data.
        result: its numbers, from ``result.json``.
        fits: its fits by name. Empty without the program of a user's own model.
        missing: what ``load`` was not given to open the fits, and what to do. None if all is there.

    Raises:
        RunError: ``fit`` is asked for, and the program is missing.
    """

    path: Path
    experiment: Experiment
    config: Any
    record: Any
    result: dict[str, Any]
    fits: dict[str, Fit]
    missing: str | None = None

    @property
    def fit(self) -> Fit:
        """The fit that the run is known for."""
        if self.missing is not None:
            raise RunError(self.missing)
        return self.fits[self.experiment.main(self.config)]

    @property
    def tree(self) -> DataTree:
        """The traces and the judged numbers, as ArviZ reads them."""
        return read_tree(self.path)

    def data(self, **changes: Any) -> Any:
        """The data of the run, loaded again.

        Args:
            changes: settings that have changed since, for example ``data_dir``.

        Raises:
            RunError: the data are others than the run's.
        """
        data = self.experiment.data(dataclasses.replace(self.config, **changes))
        ours, theirs = _config(self.path)["data"], describe(data)
        for name in ours | theirs:
            if ours.get(name) != theirs.get(name):
                raise RunError(
                    f"{self.path}: expected the run's data, {name} as {ours.get(name)}, got "
                    f"{theirs.get(name)}; load the data that the run was made with"
                )
        return data

    def __repr__(self) -> str:
        numbers = (
            f"{words} {plus_minus(number['estimate'], number['standard_error'])}"
            for name, words in NUMBERS.items()
            if (number := self.result.get(name))
        )
        words = ", ".join((f"{self.experiment.name} on {self.record.name}", *numbers))
        fits = ", ".join(self.fits) or f"none. {self.missing}"
        return f"Run in {self.path}: {words} (nats per datum); fits: {fits}"


def load(path: str | os.PathLike, model: Any = None) -> Run:
    """Opens a finished run. The data and the device of the training are not needed.

    No code of the run's directory is executed. A run of your own model (``experiments/train.py``)
    needs that model to open its fit. Without it there are the settings, the numbers and the tree.

    Args:
        path: the run's directory.
        model: your own model, as the file of the run has it under its name. None for a script's.

    Raises:
        RunError: the directory is no finished run, or it is damaged; a model that does not fit.
        FitError: a saved fit is damaged, or the programs have changed since.

    Warns:
        UserWarning: the model's file is another one than the run's.
    """
    from inference import Fit, FitError  # slow to import
    from inference.sites import preparation

    path = Path(path)
    described = _config(path)
    result = read_json(path / "result.json")
    if result is None:
        raise RunError(
            f"{path}: expected a finished run, got one without result.json; finish it by the "
            f"command that began it"
        )
    experiment = _experiment(path, described["experiment"])
    if model is not None and experiment.own is None:
        raise RunError(
            f"model: expected none for a run of {experiment.name}, which knows its own, got "
            f"{model!r:.50}; leave it out"
        )
    fits: dict[str, Fit] = {}

    def opened(name: str, program: Any, guide: Any) -> Fit:
        return Fit.load(path / "fits" / name, program, guide, preprocess=preparation(program))

    try:
        config = from_json(experiment.config, described["settings"], out=path)
        record = experiment.record(**described["record"])
        if experiment.own is None:
            for name in experiment.names(config):
                fits[name] = opened(name, *experiment.programs(config, record, name, fits))
            return Run(path, experiment, config, record, result, fits)
    except FitError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{path / 'config.json'}: expected a run's settings, got some that cannot be used "
            f"({' '.join(str(error).split())}); give the directory of a run"
        ) from error
    if model is None:
        missing = (
            f"{path}: expected the model, {config.program} in the training, to open the fit, got "
            f"none; import it and write runs.load(path, model=...). {path / PROGRAM} is a copy of "
            f"its file"
        )
        return Run(path, experiment, config, record, result, fits, missing)
    _check_source(path, model, described)
    name = experiment.main(config)
    fits[name] = opened(name, *experiment.own(config, record, model))
    return Run(path, experiment, config, record, result, fits)


def _check_source(path: Path, model: Any, described: Mapping[str, Any]) -> None:
    """Warns if the file that a model comes from has changed since the run.

    A model may come from a file that the run's only imports. That one has another name.
    """
    while hasattr(model, "func"):  # functools.partial
        model = model.func
    try:
        named = model if hasattr(model, "__qualname__") else type(model)
        source = Path(inspect.getsourcefile(named) or "")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
    except (TypeError, OSError):  # it comes from no file
        return
    same_name = source.name == Path(described["settings"]["program"].rpartition(":")[0]).name
    if same_name and digest != described.get("files", {}).get(PROGRAM):
        warnings.warn(
            f"model: expected the file of the run, a copy of which is {path / PROGRAM}, got "
            f"{source}, which is another; the parameters may mean something else there",
            stacklevel=3,
        )


def read_tree(path: Path) -> DataTree:
    """The tree of a finished run, from its directory.

    Raises:
        RunError: there is none, or it is damaged.
    """
    import arviz as az

    if not (path / "trace.nc").exists():
        raise RunError(
            f"{path}: expected the directory of a finished run, got one without trace.nc; finish "
            f"the run by the command that began it"
        )
    try:
        with az.from_netcdf(path / "trace.nc", engine="h5netcdf") as tree:
            return tree.load()
    except (OSError, KeyError, ValueError) as error:
        raise RunError(
            f"{path / 'trace.nc'}: expected a run's traces, got a damaged file "
            f"({' '.join(str(error).split())}); run the experiment anew"
        ) from error


def _config(path: Path) -> dict[str, Any]:
    """What ``config.json`` says.

    Raises:
        RunError: the directory is no run, or a newer version of guidebook wrote it.
    """
    described = read_json(path / "config.json")
    if described is None:
        raise RunError(
            f"{path}: expected the directory of a run, got one without config.json; give a "
            f"directory that a script of experiments/ wrote"
        )
    missing = [name for name in ("format", "guidebook", *IDENTITY) if name not in described]
    if missing:
        raise RunError(
            f"{path / 'config.json'}: expected a run's settings, got some without {missing[0]!r}; "
            f"run the experiment anew"
        )
    if described["format"] != FORMAT:
        raise RunError(
            f"{path}: expected format {FORMAT}, got {described['format']}, written by guidebook "
            f"{described['guidebook']}; use that version"
        )
    return described


def _experiment(path: Path, name: Any) -> Experiment:
    """The script of a run, by its name."""
    try:
        return importlib.import_module(f"experiments.{name}").EXPERIMENT
    except (ImportError, AttributeError) as error:
        raise RunError(
            f"{path}: expected a run of a script in experiments/, got one of {name!r}; use the "
            f"version of guidebook that has it"
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file. None if there is no such file.

    Raises:
        RunError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: expected JSON, got something else ({error}); give another directory"
        ) from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, got {value!r:.50}; give another directory")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


# --- a new run ------------------------------------------------------------------------------------


@contextlib.contextmanager
def claim(experiment: Experiment, config: Any, data: Any) -> Iterator[Path]:
    """The directory of a run, locked against other processes until the run ends.

    A run that fails before it has saved anything leaves no directory behind.

    Args:
        experiment: the script.
        config: its settings. ``out`` is the directory, or None for a new one in ``runs/``.
        data: its data.

    Raises:
        ValueError: the directory is in use, or holds another run or something else.
        OSError: it cannot be made or written.
    """
    is_new = config.out is None or not Path(config.out).exists()
    path = new_directory(Path("runs"), experiment.name) if config.out is None else Path(config.out)
    files = dict(experiment.files(config))
    described = {
        "format": FORMAT,
        "guidebook": importlib.metadata.version("guidebook"),
        "began": datetime.datetime.now().isoformat(" ", "seconds"),
        "experiment": experiment.name,
        "settings": to_json(config),
        "record": json.loads(json.dumps(dataclasses.asdict(data.record))),
        "data": describe(data),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            _check_own(path, experiment, described)
            if not (path / "result.json").exists():  # a finished run is only read
                stack.enter_context(FileLock(path / ".lock", timeout=0))
            begins = not (path / "config.json").exists()
            if begins:
                write_json(path / "config.json", described)
            if not (path / "result.json").exists():
                for name, content in files.items():
                    (path / name).write_bytes(content)
        except Timeout as error:
            raise ValueError(
                f"out: expected a directory that no other process writes, got {path}, where a run "
                f"is under way; wait for its end, or give another directory"
            ) from error
        except OSError as error:
            raise OSError(
                f"out: expected a directory that can be written; {path}: "
                f"{error.strerror or error}; give another with --out"
            ) from error
        try:
            yield path
        except Exception:
            written = {"config.json", *files}
            if begins and {p.name for p in path.iterdir() if p.name[0] != "."} <= written:
                for name in (*written, ".lock"):
                    (path / name).unlink(missing_ok=True)
                if is_new:
                    path.rmdir()
            raise


def _check_own(path: Path, experiment: Experiment, described: dict[str, Any]) -> None:
    """Refuses a directory with other files, or with another run."""
    if not (path / "config.json").exists():
        if any(p.name[0] != "." for p in path.iterdir()):
            raise ValueError(
                f"out: expected a new or empty directory, or this run's own; {path} holds other "
                f"files; give another directory"
            )
        return
    found = _config(path)
    if found["experiment"] == experiment.name:  # settings that are new since have their defaults
        found["settings"] = to_json(from_json(experiment.config, found["settings"]))
    was, now = (
        {"experiment": known["experiment"]}
        | known["settings"]
        | known["data"]
        | known.get("files", {})
        | {f"the data's {name}": value for name, value in known["record"].items()}
        for known in (found, described)
    )
    differ = [name for name in was | now if was.get(name) != now.get(name)]
    if differ:
        words = (f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in differ)
        raise ValueError(
            f"out: expected a new directory or this run's own; {path} holds another run "
            f"({'; '.join(words)}); give another directory"
        )


def new_directory(parent: Path, name: str) -> Path:
    """Makes a new directory, named by the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, n = parent / f"{name}-{stamp}", 2
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            path, n = parent / f"{name}-{stamp}-{n}", n + 1


def describe(data: Any) -> dict[str, str]:
    """The type, shape and hash of each array of a data set, ``train.x`` for example."""
    return {
        f"{split}.{name}": described
        for split, arrays in splits(data).items()
        for name, described in describe_arrays(arrays).items()
    }


def splits(data: Any) -> dict[str, Mapping[str, Any]]:
    """The arrays of a data set by name, for training, validation and test as far as it has them."""
    named = {split: getattr(data, split, None) for split in ("train", "validation", "test")}
    return {split: arrays for split, arrays in named.items() if arrays}


def describe_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The type, shape and hash of each array. A stream has those of the array that it reads."""
    described = {}
    for name, array in arrays.items():
        array = array if is_streamed(arrays) else np.atleast_1d(array)
        digest = hashlib.sha256()
        for _, piece in pieces(array):
            digest.update(np.ascontiguousarray(piece).data)
        described[name] = f"{array.dtype}{list(array.shape)} sha256:{digest.hexdigest()[:16]}"
    return described


# --- many runs ------------------------------------------------------------------------------------


def table(parent: str | os.PathLike = "runs") -> DataFrame:
    """The runs in a directory and below it, from the oldest to the newest.

    Returns:
        A frame with the runs' names as its index. Numbers are in nats per datum:

        - when, experiment, dataset: when the run began, its script and its data set
        - elbo, log_likelihood, log_predictive_density: each with its standard error over the data,
          elbo_se and so on
        - seconds: the time of the training, without compilation
        - the settings that differ between runs, one column each

        What a run lacks is NaN. A run without any number is not finished, or cannot be read.

    Raises:
        ValueError: there is no such directory.
    """
    import pandas as pd

    parent = Path(parent)
    if not parent.is_dir():
        raise ValueError(
            f"runs: expected a directory with runs, and there is no {parent} here; run an "
            f"experiment first, or give another directory"
        )
    paths = sorted(found.parent for found in parent.rglob("config.json"))
    settings, rows = {}, {}
    for path in paths:
        name = str(path.relative_to(parent))
        try:
            described, result = _config(path), read_json(path / "result.json")
        except RunError:
            described, result = {}, None
        settings[name], rows[name] = described.get("settings", {}), _row(described, result or {})
    columns = ["when", "experiment", "dataset"]
    columns += [column for name in NUMBERS for column in (name, f"{name}_se")]
    columns += ["seconds"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    for setting in dict.fromkeys(name for known in settings.values() for name in known):
        values = {run: known[setting] for run, known in settings.items() if setting in known}
        if setting not in frame and len({json.dumps(v) for v in values.values()}) > 1:
            frame[setting] = pd.Series(values, dtype=object)
    return frame.rename_axis("run").sort_values("when", kind="stable")


def _row(described: Mapping[str, Any], result: Mapping[str, Any]) -> list[Any]:
    numbers = [result.get(name) or {} for name in NUMBERS]
    return [
        described.get("began"),
        described.get("experiment"),
        described.get("record", {}).get("name"),
        *(number.get(key, np.nan) for number in numbers for key in ("estimate", "standard_error")),
        result.get("seconds", {}).get("run", np.nan),
    ]


def plus_minus(value: float, error: float | None = None, sign: str = "", digits: int = 3) -> str:
    """A number with two digits of its standard error. A dash for NaN."""
    if np.isnan(value):
        return "-"
    if error:
        digits = max(digits, int(1 - np.floor(np.log10(error))))
    written = f"{value:{sign}.{digits}f}"
    return written if error is None else f"{written} +- {error:.{digits}f}"


def written(value: Any) -> str:
    """A setting as a person reads it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value) if _given(value) else "-"


def _given(value: Any) -> bool:
    return value is not None and value == value  # not NaN


@dataclass(frozen=True)
class Config:
    """Settings of the list of runs.

    Attributes:
        runs: Directory with the runs.
    """

    runs: Positional[Path] = Path("runs")


def main(config: Config) -> DataFrame:
    """List the runs in a directory."""
    frame = table(config.runs)
    fixed = list(frame).index("seconds") + 1  # the columns after these are settings
    shown = {n: words for n, words in NUMBERS.items() if n == "elbo" or frame[n].notna().any()}
    rows = [
        (
            run,
            *(written(row[name]) for name in ("when", "dataset")),
            *(plus_minus(row[name], row[f"{name}_se"]) for name in shown),
            plus_minus(row["seconds"], digits=1),
            ", ".join(f"{n} {written(v)}" for n, v in list(row.items())[fixed:] if _given(v)),
        )
        for run, row in frame.to_dict("index").items()
    ]
    headers = ("run", "when", "data set", *shown.values(), "seconds", "settings that differ")
    print(
        tabulate(
            rows,
            headers,
            disable_numparse=True,
            colalign=["left"] * 3 + ["right"] * (len(shown) + 1) + ["left"],
        )
    )
    print(
        "\nnats per datum, +- standard error over the data; seconds of the training; a dash where "
        "a run has no such number or is not finished"
    )
    return frame


if __name__ == "__main__":
    command_line(main, Config)
