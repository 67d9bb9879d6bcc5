"""A script's settings: on the command line, in JSON, and the checks that they pass."""

import contextlib
import dataclasses
import gc
import io
import json
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

# They do not change what a run is.
MACHINES = ("devices", "coordinator", "num_processes", "process_id", "distributed")
UNSAVED = ("out", "progress", *MACHINES)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Settings of every script that trains: on what it runs.

    Attributes:
        devices: Number of devices to use, or all. With several processes, devices of each process.
            Seeds are spread over them first, and batches over the rest.
        coordinator: Address of process 0, HOST:PORT, if several processes train one run. Each of
            them gets the same command with a process id of its own.
        num_processes: Number of processes that train one run.
        process_id: Number of this process, from 0. Process 0 prints and writes.
        distributed: Whether to find the other processes by SLURM, Kubernetes or MPI.
    """

    devices: int | Literal["all"] = 1
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    distributed: bool = False

    def __post_init__(self):
        if self.devices != "all":
            check_least(1, self, "devices")
        names = ("coordinator", "num_processes", "process_id")
        missing = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is None]
        if self.distributed and len(missing) < len(names):
            raise ValueError(
                "distributed: expected either --distributed, which finds the processes, or "
                "--coordinator, --num-processes and --process-id, got both; leave one out"
            )
        if 0 < len(missing) < len(names):
            raise ValueError(
                f"coordinator: expected all of --coordinator HOST:PORT, --num-processes and "
                f"--process-id, or none, got no {' and no '.join(missing)}; give them all"
            )
        if missing:
            return
        if not re.fullmatch(r".+:\d+", self.coordinator or ""):
            raise ValueError(
                f"coordinator: expected HOST:PORT of process 0, got {self.coordinator!r}; write "
                f"for example 10.0.0.1:1234"
            )
        check_least(1, self, "num_processes")
        if not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise ValueError(
                f"process_id: expected 0 to {(self.num_processes or 0) - 1}, as there are "
                f"{self.num_processes} processes, got {self.process_id}; number them from 0"
            )


def command_line(main: Callable[[Any], Any], config_type: type) -> Any:
    """Runs ``main`` with a configuration from the command line. Returns what ``main`` returns.

    A setting, file or data set that cannot be used is one line on standard error and exit
    status 2. Data that cannot be read any more, and processes that have stopped, are one line and
    exit status 1.
    """
    complaint = io.StringIO()
    gc.freeze()  # what is imported stays; looking through it again, at exit too, takes a second
    gc.set_threshold(50_000, 20, 20)  # tracing makes many objects that live on
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_type)
        result = main(config)
        gc.freeze()
        return result
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        _leave(str(error))
    except RuntimeError as error:
        from experiments.devices import (  # slow to import
            LostProcessError,
            ProcessError,
            leave_now,
        )
        from inference import StreamError

        if isinstance(error, LostProcessError):
            _complain(str(error))
            leave_now(1)
        if not isinstance(error, ProcessError | StreamError):
            raise
        _leave(str(error), status=1)
    except KeyboardInterrupt:
        print("interrupted; the same command with --out goes on", file=sys.stderr)
        sys.exit(130)
    except SystemExit as error:
        if error.code:
            _leave(re.sub(r"^╭─.*|For full helptext.*|[│╰╯─]", "", complaint.getvalue()))
        raise


def _complain(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _leave(message: str, status: int = 2) -> None:
    _complain(message)
    sys.exit(status)


# --- checks ---------------------------------------------------------------------------------------


def check_least(least: int, config: Any, *names: str) -> None:
    """Raises ValueError if one of the settings ``names`` is given, and below ``least``."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError if one of the settings ``names`` is given, and not above zero."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_known(config: Any, **known: Iterable[str]) -> None:
    """Raises ValueError if a setting is given, and not one of those known by its name."""
    for name, choices in known.items():
        value = getattr(config, name)
        if value is not None and value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_fraction(config: Any, *names: str) -> None:
    """Raises ValueError if one of the settings ``names`` is no fraction from 0 and below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: expected a fraction below 1, got {getattr(config, name)}")


# --- JSON -----------------------------------------------------------------------------------------


def to_json(config: Any) -> dict[str, Any]:
    """The settings as JSON has them, without those that do not change what a run is."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in UNSAVED}
    return json.loads(json.dumps(settings, default=str))


def from_json(config_type: type, settings: Mapping[str, Any], **unsaved: Any) -> Any:
    """The configuration that ``to_json`` wrote. Missing settings take their defaults.

    Raises:
        ValueError: an unknown setting, or an impossible one.
    """
    types = typing.get_type_hints(config_type)
    unknown = sorted(settings.keys() - (types.keys() - {*UNSAVED}))
    if unknown:
        raise ValueError(
            f"settings: expected those of this version of guidebook, got {unknown[0]!r}; open it "
            f"with the version that wrote it"
        )

    def restored(value: Any, hint: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        is_path = Path in (hint, *typing.get_args(hint))
        return Path(value) if is_path and isinstance(value, str) else value

    return config_type(**{n: restored(v, types[n]) for n, v in settings.items()}, **unsaved)
