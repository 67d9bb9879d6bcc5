"""Several processes that train one run: who decides, and how all come to know it.

Every function here does nothing with one process. With several, all of them must call it.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jaxtyping import PyTree


def is_first() -> bool:
    """Whether this is process 0, which decides, writes files and shows progress."""
    return jax.process_index() == 0


def of_first(value: Any) -> Any:
    """What process 0 gives: a number, an array or a tree of them, in one shape everywhere."""
    return value if jax.process_count() == 1 else jax.device_get(broadcast_one_to_all(value))


def text_of_first(value: Any) -> Any:
    """What process 0 gives: any JSON-able value."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(of_first(np.int32(len(text))))
    return json.loads(bytes(of_first(np.resize(text, size))).decode())


def of_all(value: int) -> np.ndarray:
    """The number that each process gives."""
    if jax.process_count() == 1:
        return np.array([value])
    return np.asarray(process_allgather(np.int32(value))).reshape(-1)


def to_host(tree: PyTree) -> PyTree:
    """The tree with NumPy arrays, whole in every process."""

    def gather(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if x.is_fully_replicated:
            return x.addressable_data(0)
        return process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))


@contextlib.contextmanager
def ctrl_c_for_all() -> Iterator[list[Any]]:
    """With several processes, notes Ctrl-C in the list in place of raising KeyboardInterrupt."""
    pressed: list[Any] = []
    if jax.process_count() == 1 or threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
