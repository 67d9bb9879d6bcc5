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
from pathlib import Path
from typing import Any

import tyro

UNSAVED = ("out", "progress")  # They change no number.


def command_line(main: Callable[[Any], Any], config_type: type) -> None:
    """Runs ``main`` with a configuration from the command line.

    A setting, file or data set that cannot be used is one line on standard error and exit
    status 2.
    """
    complaint = io.StringIO()
    gc.freeze()  # what is imported stays; looking through it again, at exit too, takes a second
    gc.set_threshold(50_000, 20, 20)  # tracing makes many objects that live on
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_type)
        main(config)
        gc.freeze()
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        _leave(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command with --out goes on", file=sys.stderr)
        sys.exit(130)
    except SystemExit as error:
        if error.code:
            _leave(re.sub(r"^╭─.*|For full helptext.*|[│╰╯─]", "", complaint.getvalue()))
        raise


def _leave(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


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
    """The settings as JSON has them, without ``out`` and ``progress``."""
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
