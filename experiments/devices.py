"""Devices and processes: which of them a run uses, who writes, and what all of them do together.

    with one_of_many(config):  # the processes find each other
        with together():  # what stops one process stops all
            data = load()
        fit(..., mesh=mesh_of(config, num_seeds=4, batch_size=128))

With one process nothing here waits for another.
"""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.settings import Machines
from inference._processes import is_first, of_all, text_of_first

SECONDS = 20  # without a word from a process, after which the others end

__all__ = ["describe", "is_first", "mesh_of", "one_of_many", "text_of_first", "together", "words"]


class ProcessError(RuntimeError):
    """Another process has stopped, and so this one stops."""


class LostProcessError(ProcessError):
    """Another process has ended and said nothing. JAX would wait for it in vain."""


# --- processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_of_many(config: Machines) -> Iterator[None]:
    """Finds the other processes of the run, if there are any. Only process 0 prints.

    This comes before anything that uses a device.

    Raises:
        ValueError: they cannot be found.
        LostProcessError: one of them has ended without a word.
    """
    if config.coordinator is not None or config.distributed:
        _join(config)
    if jax.process_count() == 1:
        yield
        return
    with contextlib.nullcontext() if is_first() else _silence():
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):  # this one's own
                raise
            raise LostProcessError(
                f"processes: expected an answer of all {jax.process_count()}, but one has ended "
                f"or cannot be reached; start all again by the same command: the run goes on from "
                f"its last checkpoint"
            ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing is printed but what raises an error. Libraries write to standard output too."""
    sys.stdout.flush()
    kept = os.dup(1)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(action="ignore"),
    ):
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _join(config: Machines) -> None:
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=SECONDS,
            shutdown_timeout_seconds=SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        expected, remedy = "a process of SLURM, Kubernetes or MPI", "start it by srun or mpirun, or"
        if config.coordinator is not None:
            expected, remedy = f"{config.num_processes} processes that find each other", "see that"
        raise ValueError(
            f"distributed: expected {expected}, got an error ({error}); {remedy} each process has "
            f"--coordinator HOST:PORT, --num-processes and a --process-id of its own"
        ) from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes do the block, or all stop.

    Raises:
        ProcessError: another process has raised an error.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    stopped = np.flatnonzero(of_all(problem is not None))
    if problem is not None:
        raise problem
    if len(stopped):
        raise ProcessError(
            f"process {stopped[0]}: expected it to go on, but it has stopped; its message says "
            f"why; all processes stop with it"
        )


# --- devices --------------------------------------------------------------------------------------


def chosen(config: Machines) -> list[Any]:
    """The devices of the run, process by process.

    Raises:
        ValueError: there are fewer than were asked for.
    """
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    if config.devices == "all":
        return [*chain(*by_process.values())]
    least = min(map(len, by_process.values()))
    if config.devices > least:
        each = " in each process" if len(by_process) > 1 else ""
        raise ValueError(
            f"devices: expected at most {least}, which is how many there are{each}, got "
            f"{config.devices}; give fewer, or --devices all"
        )
    return [*chain(*(mine[: config.devices] for mine in by_process.values()))]


def mesh_of(config: Machines, num_seeds: int, batch_size: int, fewer: bool = False) -> Mesh | None:
    """The devices of a training, over which it splits seeds and batches. None for one device.

    Seeds come first: they need no communication. What devices are left split every batch.

    Args:
        config: the settings.
        num_seeds: the number of restarts.
        batch_size: data per step.
        fewer: whether to take fewer devices, if as many do not divide the batch.

    Raises:
        ValueError: there are too few devices, or they do not divide the batch.
    """
    devices = chosen(config)
    if fewer and jax.process_count() == 1:
        devices = devices[: math.gcd(len(devices), num_seeds * batch_size)]
    if len(devices) == 1:
        return None
    seeds = math.gcd(num_seeds, len(devices))
    rest = len(devices) // seeds
    if batch_size % rest:
        remedy = ""
        if hasattr(config, "batch_size"):
            remedy = f"give --batch-size {rest * max(1, round(batch_size / rest))}, or "
        raise ValueError(
            f"devices: expected a batch that {rest} devices can share, got one of {batch_size} "
            f"data ({len(devices)} devices and {num_seeds} seed{'s' * (num_seeds > 1)}: {rest} for "
            f"each batch); {remedy}{_fewer(num_seeds, batch_size, len(devices))}"
        )
    sizes = {name: size for name, size in (("seed", seeds), ("data", rest)) if size > 1}
    return Mesh(np.array(devices).reshape(*sizes.values()), tuple(sizes))


def _fewer(num_seeds: int, batch_size: int, num_devices: int) -> str:
    """What other number of devices divides the batch."""
    count = jax.process_count()
    fits = [n for n in range(count, num_devices, count) if _divides(num_seeds, batch_size, n)]
    return f"--devices {fits[-1] // count}" if fits else "use fewer processes"


def _divides(num_seeds: int, batch_size: int, num_devices: int) -> bool:
    return batch_size % (num_devices // math.gcd(num_seeds, num_devices)) == 0


def describe(config: Machines) -> dict[str, Any]:
    """The devices of a run, as ``result.json`` has them."""
    used = len(chosen(config))
    return {
        "used": used,
        "idle": jax.device_count() - used,
        "processes": jax.process_count(),
        "kind": jax.devices()[0].device_kind,
    }


def words(described: dict[str, Any]) -> str:
    """The devices of a run, as a person reads them."""
    used, idle, processes = (described[name] for name in ("used", "idle", "processes"))
    return (
        f"devices: {used} of {used + idle} ({described['kind']})"
        + (f" in {processes} processes" if processes > 1 else "")
        + f", {idle or 'none'} idle"
    )


def leave_now(status: int) -> None:
    """Ends this process. It does not wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
