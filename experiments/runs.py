"""What every experiment shares: its command line and its run directory.

A run directory holds ``config.json`` from the start and ``result.json`` at the end. The same
command finds its own directory again and goes on where it was killed; another run's directory
is never touched.
"""

import contextlib
import dataclasses
import datetime
import gc
import importlib
import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import tyro

from inference.describe import describe_arrays

UNSAVED = ("out", "progress")  # settings that change where a run is and how it looks, not what


def command_line(main: Callable[[Any], Any], config_type: type) -> None:
    """Runs ``main`` with a configuration from the command line.

    A setting, file or data set that cannot be used is one line on standard error and exit
    status 2.
    """
    complaint = io.StringIO()
    gc.freeze()  # what is imported stays; looking through it again, at exit too, takes a second
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_type)
        main(config)
        gc.freeze()
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        _leave(str(error))
    except SystemExit as error:
        if error.code:
            _leave(re.sub(r"^╭─.*|For full helptext.*|[│╰╯─]", "", complaint.getvalue()))
        raise


def check_least(least: int, config: Any, *names: str) -> None:
    """Raises ValueError where one of the settings ``names`` is given, and below ``least``."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError where one of the settings ``names`` is given, and not above zero."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_known(config: Any, **known: Iterable[str]) -> None:
    """Raises ValueError where a setting is given, and not one of those known by its name."""
    for name, choices in known.items():
        value = getattr(config, name)
        if value is not None and value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def import_ahead(*modules: str) -> None:
    """Imports modules in the background, while the compiler leaves Python idle.

    ArviZ and Matplotlib take as long to import as a small model to train.
    """
    for module in modules:
        threading.Thread(target=importlib.import_module, args=(module,), daemon=True).start()


def _leave(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class Run:
    """One run's directory.

    Args:
        name: the experiment's, for a fresh directory under ``runs/``.
        config: a dataclass with a field ``out``, the directory or None for a fresh one.

    Raises:
        ValueError: the directory holds another run or something else.
        OSError: it cannot be made or written.
    """

    def __init__(self, name: str, config: Any):
        self.path = Path(config.out) if config.out else fresh_directory(Path("runs"), name)
        settings = saved_settings(name, dataclasses.asdict(config))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            found = self.read("config.json")
            if found is None and any(p.name[0] != "." for p in self.path.iterdir()):
                raise ValueError(
                    f"out: expected a new or empty directory, or this run's own; {self.path} "
                    f"holds other files; give another directory"
                )
            if found is not None and found != settings:
                differ = [k for k in found | settings if found.get(k) != settings.get(k)]
                words = (f"{k} was {found.get(k)!r}, is {settings.get(k)!r}" for k in differ)
                raise ValueError(
                    f"out: expected a new directory or this run's own; {self.path} holds another "
                    f"run ({'; '.join(words)}); give another directory"
                )
            if found is None:
                self.write("config.json", settings)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                f"out: expected a directory that can be written; {self.path}: {reason}; give "
                f"another with --out"
            ) from error

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON file ``name``, or None where there is none."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path}: expected JSON, got something else ({error}); give another directory"
            ) from error

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file whole or not at all."""
        path = self.path / name
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)


def saved_settings(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's settings as ``config.json`` has them."""
    settings = {k: v for k, v in config.items() if k not in UNSAVED}
    return {"experiment": name} | json.loads(json.dumps(settings, default=str))


def trace_attributes(
    name: str, config: Mapping[str, Any], dataset: str, data: Mapping[str, Any]
) -> dict[str, str]:
    """What ``trace.nc`` says of a run, so that ``inference.comparison`` can set it by another.

    Args:
        name: the experiment's.
        config: its settings.
        dataset: the data set's name.
        data: the arrays that were judged; their types, shapes and hashes are kept.
    """
    return {
        "experiment": name,
        "settings": json.dumps(saved_settings(name, config)),
        "dataset": dataset,
        "data": json.dumps(describe_arrays(data, contents=True)),
    }


def fresh_directory(parent: Path, name: str) -> Path:
    """A directory under ``parent`` that no other run has, named by the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, n = parent / f"{name}-{stamp}", 2
    while path.exists():
        path, n = parent / f"{name}-{stamp}-{n}", n + 1
    return path
