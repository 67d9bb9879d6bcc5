"""Saving a run and finding it again, with Orbax.

Orbax writes each checkpoint under a temporary name and renames it when it is whole, so that a
process killed while writing leaves the one before it, and a half-written one is never read.
"""

import os
from pathlib import Path
from typing import Any

import jax


class CheckpointError(ValueError):
    """A checkpoint directory that does not belong to this run."""


class Checkpoints:
    """The checkpoints of one run in one directory.

    Args:
        directory: made if it does not exist.
        identity: whatever must be equal for two runs to be the same to the bit, JSON-able.

    Raises:
        CheckpointError: the directory is a file, cannot be written, or holds other things.
    """

    def __init__(self, directory: str | os.PathLike, identity: dict[str, Any]):
        import orbax.checkpoint as ocp  # half a second, paid only by those who save

        self._args, self._identity = ocp.args, identity
        self._directory = Path(directory).resolve()
        foreign = self._foreign()
        if foreign is not None:
            raise CheckpointError(
                f"checkpoint {directory}: expected a new directory or one that holds this run's "
                f"checkpoints; {foreign}; give another directory"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_names=("state", "identity")
            )
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {directory}: expected a directory that can be written; "
                f"{error.strerror or error}; give another directory"
            ) from error

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

    def restore(self, template: Any) -> Any | None:
        """The newest whole checkpoint, shaped like ``template``; None if there is none.

        Raises:
            CheckpointError: it was written under another configuration; names the differences.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        found = self._manager.restore(
            step, args=self._args.Composite(identity=self._args.JsonRestore())
        )["identity"]
        differences = list(_differences(found, self._identity))
        if differences:
            raise CheckpointError(
                f"checkpoint {self._directory}: expected a run of this configuration, but "
                f"{'; '.join(differences)}; give another directory, or the same settings"
            )
        return self._manager.restore(
            step,
            args=self._args.Composite(state=self._args.StandardRestore(template)),
        )["state"]

    def save(self, step: int, state: Any) -> None:
        """Writes ``state`` under the name of ``step`` and drops all but the last two."""
        if step not in self._manager.all_steps():
            self._manager.save(
                step,
                args=self._args.Composite(
                    state=self._args.StandardSave(jax.device_get(state)),
                    identity=self._args.JsonSave(self._identity),
                ),
            )

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.close()


def _differences(found: Any, given: Any, name: str = ""):
    """Sentences on where two JSON-able values differ, deepest names first."""
    if isinstance(found, dict) and isinstance(given, dict):
        for key in sorted(found.keys() | given.keys()):
            path = f"{name}.{key}" if name else str(key)
            yield from _differences(found.get(key), given.get(key), path)
    elif found != given and name == "program":
        yield (
            "the compiled program differs (the model, the guide, the objective, the optimiser "
            "with its learning rate, or preprocess)"
        )
    elif found != given:
        yield f"{name} was {found!r} there and is {given!r} here"
