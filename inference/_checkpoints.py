"""Saving a run and finding it again, with Orbax.

Orbax writes each checkpoint under a temporary name, and renames it when it is whole. So a process
that is killed while it writes leaves the checkpoint before. A half-written one is never read.
"""

import contextlib
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Parts of a run's identity: where it was made, how long it is, what was compiled.
MADE_BY = ("versions", "device", "mesh", "processes")
LENGTHS = ("num_steps", "num_epochs")
COMPILED = ("shapes", "program")


class CheckpointError(ValueError):
    """A checkpoint directory that does not belong to this run."""


class Checkpoints:
    """The checkpoints of one run in one directory.

    Args:
        directory: made if it does not exist.
        identity: the settings, the description of programs and data, the shapes of the state, and
            where the run is made, JSON-able.

    Raises:
        CheckpointError: the directory is a file, cannot be written, or holds other things.
    """

    def __init__(self, directory: str | os.PathLike, identity: dict[str, Any]):
        self._identity, self._directory = identity, Path(directory).resolve()
        self._saved: int | None = None  # the step of the last checkpoint
        foreign = self._foreign()
        if foreign is not None:
            raise CheckpointError(
                f"checkpoint {directory}: expected a new directory or one that holds this run's "
                f"checkpoints; {foreign}; give another directory"
            )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._directory).close()
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {directory}: expected a directory that can be written; "
                f"{error.strerror or error}; give another directory"
            ) from error

    @cached_property
    def _orbax(self) -> Any:
        import orbax.checkpoint  # half a second, paid only when there is something to read or save

        return orbax.checkpoint

    @cached_property
    def _manager(self) -> Any:
        alone = self._orbax.options.MultiprocessingOptions(  # process 0 reads and writes for all
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="guidebook"
        )
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone,
        )
        return self._orbax.CheckpointManager(
            self._directory, options=options, item_names=("state", "identity")
        )

    def _foreign(self) -> str | None:
        if not self._directory.exists():
            return None
        if not self._directory.is_dir():
            return "it is a file"
        strangers = [
            p.name
            for p in self._directory.iterdir()
            if not (p.name.isdecimal() or ".orbax-checkpoint-tmp" in p.name)
        ]
        return f"found {sorted(strangers)[0]!r} in it" if strangers else None

    def find(self) -> dict[str, Any] | None:
        """The settings of the run that the newest whole checkpoint belongs to, or None.

        Raises:
            CheckpointError: it is another run. The message names what differs.

        Warns:
            UserWarning: it was made elsewhere (device, versions, mesh). The run goes on.
        """
        if not any(path.name.isdecimal() for path in self._directory.iterdir()):
            return None
        step, args = self._manager.latest_step(), self._orbax.args
        composite = args.Composite(identity=args.JsonRestore())
        found = self._manager.restore(step, args=composite)["identity"]
        given = self._identity
        elsewhere = list(differences(_part(found, MADE_BY), _part(given, MADE_BY)))
        others = (*MADE_BY, *LENGTHS, *COMPILED)
        differ = [
            *differences(_part(found, others, False), _part(given, others, False)),
            *_differences_of_length(found, given),
        ]
        if not differ:  # else the compiled program differs too, and says no more
            compared = COMPILED[:1] if elsewhere else COMPILED
            differ = list(differences(_part(found, compared), _part(given, compared)))
        if differ:
            raise CheckpointError(
                f"checkpoint {self._directory}: expected a run of this configuration, but "
                f"{'; '.join(differ)}; give another directory, or the same settings"
            )
        if elsewhere:
            warnings.warn(
                f"checkpoint {self._directory}: the run goes on, but {'; '.join(elsewhere)}; "
                f"its numbers may differ in the last digits",
                stacklevel=5,
            )
        return found

    def restore(self, template: Any) -> Any:
        """The newest whole checkpoint, shaped like ``template``."""
        args = self._orbax.args
        composite = args.Composite(state=args.StandardRestore(_filled(template)))
        found = self._manager.restore(self._manager.latest_step(), args=composite)["state"]
        return jax.tree.map(
            lambda t, x: np.zeros(t.shape, t.dtype) if _is_empty(t) else x, template, found
        )

    def save(self, step: int, state: Any) -> None:
        """Writes ``state`` under the name of ``step`` and drops all but the last two.

        Ctrl-C waits until the checkpoint is whole.
        """
        if step == self._saved:
            return
        args = self._orbax.args
        parts = args.Composite(
            state=args.StandardSave(_filled(jax.device_get(state))),
            identity=args.JsonSave(self._identity),
        )
        with _ctrl_c_waits():
            self._manager.save(step, args=parts)
            self._saved = step


def _filled(tree: Any) -> Any:
    """The tree with one zero in place of each empty array. Orbax saves no empty arrays."""
    return jax.tree.map(lambda x: np.zeros(1, x.dtype) if _is_empty(x) else x, tree)


def _is_empty(leaf: Any) -> bool:
    return getattr(leaf, "size", 1) == 0


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Raises KeyboardInterrupt after the block for a Ctrl-C within it."""
    if threading.current_thread() is not threading.main_thread():  # it gets no signals
        yield
        return
    pressed: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _part(identity: Mapping[str, Any], names: tuple[str, ...], inside: bool = True) -> dict:
    return {name: value for name, value in identity.items() if (name in names) == inside}


def _differences_of_length(found: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """A run may become longer, where no setting depends on its length."""
    before, now = found["num_steps"], given["num_steps"]
    if now < before:
        yield f"num_steps was {before} there and is {now} here: a run becomes longer, not shorter"
    elif now > before and given["average"]:
        yield (
            f"num_steps was {before} there and is {now} here, and average={given['average']} "
            f"depends on the length"
        )


def differences(found: Any, given: Any, name: str = "") -> Iterator[str]:
    """Sentences on where two JSON-able values differ, deepest names first."""
    if isinstance(found, dict) and isinstance(given, dict):
        for key in sorted(found.keys() | given.keys()):
            path = f"{name}.{key}" if name else str(key)
            yield from differences(found.get(key), given.get(key), path)
    elif found != given and name == "program":
        yield (
            "the compiled program differs (the model, the guide, the objective, the optimiser "
            "with its learning rate, or preprocess)"
        )
    elif found != given:
        yield f"{name} was {found!r} there and is {given!r} here"
