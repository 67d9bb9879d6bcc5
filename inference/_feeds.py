"""How data come to the devices: all at once, or a window of batches at a time.

A window travels while the devices compute on the one before. Both kinds of data answer
``batch(settings, place, word)`` inside the compiled loop, and both give the same batches.
"""

import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from inference._settings import Settings
from inference._shuffle import epoch_word, permute
from inference._streams import Stream, rows
from inference.sites import length

MAX_CHUNK = 1024  # the most steps that the device takes between two looks of the host
WINDOW_BYTES = 2**26  # of a window of batches


# --- on the devices -------------------------------------------------------------------------------


class Whole(NamedTuple):
    """All data."""

    arrays: Any  # (N, ...), by name

    def batch(self, settings: Settings, place: Any, word: Array) -> dict[str, Array]:
        """The rows of a step's batch.

        Args:
            settings: the run's.
            place: with ``step``, ``epoch`` and ``offset``.
            word: the seed's own, for the order of the data.
        """
        index = batch_index(settings, place.epoch, place.offset, word)
        arrays = dict(self.arrays)
        return arrays if index is None else {name: a[index] for name, a in arrays.items()}

    @property
    def seed_axes(self) -> "Whole":
        """Which axes follow the seeds."""
        return Whole(None)


class Window(NamedTuple):
    """The batches of some steps."""

    first: Any  # the step of the first batch
    arrays: Any  # (seed, step, batch, ...), by name; for one seed without the first axis

    def batch(self, settings: Settings, place: Any, word: Array) -> dict[str, Array]:
        """As ``Whole.batch``."""
        return {name: array[place.step - self.first] for name, array in self.arrays.items()}

    @property
    def seed_axes(self) -> "Window":
        """As ``Whole.seed_axes``."""
        return Window(None, 0)


def batch_index(settings: Settings, epoch: Array, offset: Array, word: Array) -> Array | None:
    """Which data the next batch holds: the ``batch_size`` that follow in this epoch's order. Where
    the epoch ends within the batch, the first of the next epoch's fill it up."""
    size, num_data = settings.batch_size, settings.num_data
    if settings.is_whole:
        return None
    position = offset + jnp.arange(size, dtype=jnp.int32)
    this = epoch_word(word, epoch)
    if num_data % size == 0:
        return permute(position, num_data, this)

    def across() -> Array:
        rest = jnp.maximum(position - num_data, 0)
        following = permute(rest, num_data, epoch_word(word, epoch + 1))
        return jnp.where(position < num_data, within(), following)

    def within() -> Array:
        return permute(jnp.minimum(position, num_data - 1), num_data, this)

    return jax.lax.cond(offset + size > num_data, across, within)


# --- training data --------------------------------------------------------------------------------


class InMemory:
    """Data that stay on the devices."""

    def __init__(self, arrays: Mapping[str, Any], mesh: Mesh | None) -> None:
        self.whole = Whole(put(dict(arrays), sharding(mesh)))

    def abstract(self) -> Whole:
        """The shapes of what ``at`` gives."""
        return abstract_of(self.whole)

    def begin(self, step: int, epoch: int, offset: int) -> None:
        """The run starts at this step, at this place of this epoch."""

    def at(self, step: int) -> tuple[Whole, int]:
        """The data of a step, and up to which step they reach."""
        return self.whole, step + MAX_CHUNK


class Streamed:
    """Streamed data. One window is on the devices, and the next is on its way.

    Args:
        stream: the data.
        settings: the run's.
        words: one for each seed, which names the order of its data.
        mesh: devices, or None.
    """

    def __init__(
        self, stream: Stream, settings: Settings, words: np.ndarray, mesh: Mesh | None
    ) -> None:
        self.stream, self.settings, self.words, self.mesh = stream, settings, words, mesh
        bytes_a_step = settings.num_seeds * settings.batch_size * stream.row_bytes
        most = min(MAX_CHUNK, settings.num_steps - settings.first_step)
        self.steps = int(np.clip(WINDOW_BYTES // max(1, bytes_a_step), 1, most))
        self.sharding = sharding(mesh, "seed", None, "data")
        self.first, self.window = -self.steps, None

    def abstract(self) -> Window:
        """As ``InMemory.abstract``."""
        leading = (self.settings.num_seeds, self.steps, self.settings.batch_size)
        first = jax.ShapeDtypeStruct((), np.int32, sharding=sharding(self.mesh))
        return Window(first, _abstract(self.stream, leading, self.sharding))

    def begin(self, step: int, epoch: int, offset: int) -> None:
        """As ``InMemory.begin``."""
        self.windows = ahead(self._read(step, epoch, offset))

    def at(self, step: int) -> tuple[Window, int]:
        """As ``InMemory.at``.

        Raises:
            StreamError: a row cannot be read.
        """
        while self.window is None or step >= self.first + self.steps:
            self.window = None  # its memory is free before the next is read
            self.first, self.window = next(self.windows)
        return self.window, self.first + self.steps

    def _read(self, step: int, epoch: int, offset: int) -> Iterator[tuple[int, Window]]:
        settings = self.settings
        for first in range(step, settings.num_steps, self.steps):
            index = self._index(epoch, offset + (first - step) * settings.batch_size)
            arrays = put_rows(self.stream, index, self.sharding)
            window = Window(put(np.int32(first), sharding(self.mesh)), arrays)
            yield first, jax.block_until_ready(window)

    def _index(self, epoch: int, seen: int) -> np.ndarray:
        """Which data each seed's next batches hold, (seed, step, batch)."""
        settings = self.settings
        if settings.is_whole:
            shape = (settings.num_seeds, self.steps, settings.num_data)
            return np.broadcast_to(np.arange(settings.num_data), shape)
        visited = seen + np.arange(self.steps) * settings.batch_size
        epochs, offsets = epoch + visited // settings.num_data, visited % settings.num_data
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            found = _indices(
                settings, epochs.astype(np.int32), offsets.astype(np.int32), self.words
            )
        return np.asarray(found)


@functools.partial(jax.jit, static_argnums=0)
def _indices(settings: Settings, epochs: Array, offsets: Array, words: Array) -> Any:
    def of_seed(word: Array) -> Any:
        return jax.vmap(lambda e, o: batch_index(settings, e, o, word))(epochs, offsets)

    return jax.vmap(of_seed)(words)


def feed(
    arrays: Mapping[str, Any], settings: Settings, words: np.ndarray, mesh: Mesh | None
) -> InMemory | Streamed:
    """What brings training data to the devices."""
    if isinstance(arrays, Stream):
        return Streamed(arrays, settings, words, mesh)
    return InMemory(arrays, mesh)


# --- held-out data --------------------------------------------------------------------------------


class HeldOut:
    """Held-out data in batches, the same for every seed. The last batch may be shorter.

    Args:
        arrays: as the programs take them.
        batch_size: the most data of a batch.
        mesh: devices, or None.
    """

    def __init__(self, arrays: Mapping[str, Any], batch_size: int, mesh: Mesh | None) -> None:
        self.arrays, self.mesh, self.num_data = arrays, mesh, length(arrays)
        self.size = min(batch_size, self.num_data)
        self.num_full, self.rest = divmod(self.num_data, self.size)
        self.steps, self.placed = self.num_full, None
        if isinstance(arrays, Stream):
            fits = WINDOW_BYTES // max(1, self.size * arrays.row_bytes)
            self.steps = int(np.clip(fits, 1, min(self.num_full, MAX_CHUNK)))
        else:
            self.placed = list(self._read())

    def windows(self) -> Iterator[tuple[Window, int, int]]:
        """Batches (batch, datum, ...), how many of them count, and the data in each.

        Raises:
            StreamError: a row cannot be read.
        """
        return ahead(self._read()) if self.placed is None else iter(self.placed)

    def abstract(self) -> dict[int, Window]:
        """The shapes of the windows, by the data in each batch."""
        full, everywhere = {self.size: self.steps}, sharding(self.mesh)
        return {
            size: Window(
                jax.ShapeDtypeStruct((), np.int32, sharding=everywhere),
                _abstract(self.arrays, (steps, size), everywhere),
            )
            for size, steps in (full | ({self.rest: 1} if self.rest else {})).items()
        }

    def _read(self) -> Iterator[tuple[Window, int, int]]:
        size, last = self.size, self.num_full * self.size
        for first in range(0, self.num_full, self.steps):
            index = np.arange(first * size, (first + self.steps) * size)
            count = min(self.steps, self.num_full - first)
            yield self._window(first, np.minimum(index, last - 1), size), count, size
        if self.rest:
            index = np.arange(last, self.num_data)
            yield self._window(self.num_full, index, self.rest), 1, self.rest

    def _window(self, first: int, index: np.ndarray, size: int) -> Window:
        everywhere = sharding(self.mesh)
        arrays = put_rows(self.arrays, index.reshape(-1, size), everywhere)
        return jax.block_until_ready(Window(put(np.int32(first), everywhere), arrays))


# --- places ---------------------------------------------------------------------------------------


def sharding(mesh: Mesh | None, *axes: str | None) -> NamedSharding | None:
    """How an array lies on a mesh. Axes that the mesh does not have are left out."""
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(*(a if a in mesh.axis_names else None for a in axes)))


def put(tree: PyTree, where: NamedSharding | None) -> PyTree:
    """The tree on the devices. Every process has the same tree, and puts its own part."""
    if where is None or where.is_fully_addressable:
        return jax.device_put(tree, where)

    def part(x: Any) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return random.wrap_key_data(part(random.key_data(x)))
        whole = np.asarray(x)
        whole = whole.astype(jax.dtypes.canonicalize_dtype(whole.dtype), copy=False)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(part, tree)


def put_rows(
    arrays: Mapping[str, Any], index: np.ndarray, where: NamedSharding | None
) -> dict[str, Array]:
    """Some rows on the devices. Each process reads its own part of them.

    Args:
        arrays: in memory or streamed.
        index: the numbers of the rows, of any shape.
        where: how ``index``, and so the rows, lie on the devices.
    """
    if where is None or where.is_fully_addressable:
        return jax.device_put(rows(arrays, index), where)
    parts: dict[str, list[Array]] = {name: [] for name in arrays}
    read: dict[str, Mapping[str, Any]] = {}
    for device, part in where.addressable_devices_indices_map(index.shape).items():
        if str(part) not in read:
            read[str(part)] = rows(arrays, index[part])
        for name, array in read[str(part)].items():
            parts[name].append(jax.device_put(array, device))
    return {
        name: jax.make_array_from_single_device_arrays(
            (*index.shape, *arrays[name].shape[1:]), where, found
        )
        for name, found in parts.items()
    }


def _abstract(
    arrays: Mapping[str, Any], leading: tuple[int, ...], where: NamedSharding | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The rows of data on the devices, with other leading axes."""
    return {
        name: jax.ShapeDtypeStruct(
            (*leading, *array.shape[1:]),
            jax.dtypes.canonicalize_dtype(array.dtype),
            sharding=where,
        )
        for name, array in arrays.items()
    }


def abstract_of(tree: PyTree) -> PyTree:
    """The shapes, types and places of arrays on the devices."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def ahead[T](items: Iterator[T]) -> Iterator[T]:
    """The items. While one is used, a thread makes the next."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
    try:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
    finally:  # without waiting: the thread itself may collect this generator
        pool.shutdown(wait=False, cancel_futures=True)
