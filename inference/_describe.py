"""What a run was, in words a JSON file can hold."""

import dataclasses
import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from inference._streams import Stream
from inference.sites import spread_rows

FIXED_RECORDS = 1000  # of a stream, which stand for all
PACKAGES = ("guidebook", "numpyro", "jax", "jaxlib", "flax", "optax", "arviz", "numpy")


def describe_device() -> str:
    """The device JAX computes on, for example "cpu" or "NVIDIA H200"."""
    return jax.devices()[0].device_kind


def versions() -> dict[str, str]:
    """The installed versions of guidebook and of the packages that a run computes with."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_value(value: Any) -> str | None:
    """A name for a program, an objective or a function that is the same in every process.

    Functions are named by where they were defined, dataclasses and other objects by their class
    and fields; memory addresses are left out.
    """
    if value is None:
        return None
    if not dataclasses.is_dataclass(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{f.name}={_short(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if type(value).__repr__ is object.__repr__:
        fields = (f"{k}={_short(v)}" for k, v in vars(value).items() if not k.startswith("_"))
        return f"{type(value).__name__}({', '.join(fields)})"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _short(value: Any) -> str:
    return value.__qualname__ if hasattr(value, "__qualname__") else str(describe_value(value))


def describe_arrays(arrays: Mapping[str, Any], contents: bool) -> dict[str, str]:
    """Type and shape of each array and, with ``contents``, the SHA-256 of its values.

    Of a stream the hash is that of ``FIXED_RECORDS`` records, spread evenly over all.
    """
    if isinstance(arrays, Stream):
        records = arrays.rows(spread_rows(arrays.num_data, FIXED_RECORDS)) if contents else {}
        ending, shapes = f" of {FIXED_RECORDS} records", arrays.shapes
    else:
        records = shapes = {name: np.asarray(array) for name, array in arrays.items()}
        ending = ""
    described = {}
    for name, shape in shapes.items():
        described[name] = f"{shape.dtype}{list(shape.shape)}"
        if contents:
            digest = hashlib.sha256(np.ascontiguousarray(records[name]).data).hexdigest()
            described[name] += f" sha256:{digest[:16]}{ending}"
    return described


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """The constants of an Optax transformation, for example its decay rates.

    Optax keeps them nowhere but in closures; this walks those of ``update``. The keys are
    "<factory>.<variable>"; a second factory of the same name is numbered.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(value: Any, owner: str, name: str) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                walk(item, owner, name)
        elif hasattr(value, "__closure__"):
            if id(value) not in seen:
                seen.add(id(value))
                owner = value.__qualname__.split(".<locals>")[0]
                for variable, cell in zip(
                    value.__code__.co_freevars, value.__closure__ or (), strict=True
                ):
                    walk(cell.cell_contents, owner, variable)
        elif isinstance(value, (bool, int, float, str, np.ndarray, jax.Array)):
            value = value.tolist() if isinstance(value, (np.ndarray, jax.Array)) else value
            key, n = f"{owner}.{name}", 2
            while key in found:
                key, n = f"{owner}.{name} {n}", n + 1
            found[key] = value

    walk(optimizer.update, "", "")
    return found


def describe_program(text: str) -> str:
    """A digest of a lowered program that is the same in every process.

    Names of values and the order of lines are left out, since both follow the order of sets of
    strings in the libraries that traced it; operations, shapes and constants stay.
    """
    lines = sorted(re.sub(r"[%@][\w.#:]+", "", text).splitlines())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
