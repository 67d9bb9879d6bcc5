"""Data that stay where they are and are read row by row: memory-mapped arrays, and sources.

A ``Stream`` is a mapping from name to column, as in-memory data are one from name to array. So
whoever asks for shapes, types or some rows need not know which of the two it holds.
"""

import functools
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from inference.sites import abstract, length

Index = Integer[np.ndarray, "..."]
Rows = dict[str, np.ndarray]

CHUNK_BYTES = 2**25  # what the checks read at a time
BLOCK_ENTRIES = 2**24  # the most numbers that are prepared with one key


class StreamError(RuntimeError):
    """A row of a stream that could not be read.

    Attributes:
        fit: the run until then, or None before the first step. ``fit(..., init=error.fit)`` goes on
            with it.
    """

    fit: Any = None


class Stream(Mapping[str, Any]):
    """Data that are read row by row.

    Args:
        read: from the numbers of rows (n,) to the rows of every array, (n, ...).
        shapes: the shape (N, ...) and the type of every array.
    """

    def __init__(
        self, read: Callable[[Index], Rows], shapes: Mapping[str, jax.ShapeDtypeStruct]
    ) -> None:
        self.read, self.shapes = read, dict(shapes)

    @property
    def num_data(self) -> int:
        """N."""
        return next(iter(self.shapes.values())).shape[0]

    @property
    def row_bytes(self) -> int:
        """The size of one datum on the device."""
        types = {n: jax.dtypes.canonicalize_dtype(s.dtype) for n, s in self.shapes.items()}
        return sum(int(np.prod(s.shape[1:])) * types[n].itemsize for n, s in self.shapes.items())

    def rows(self, index: Index) -> Rows:
        """Some rows of every array.

        Args:
            index: their numbers, of any shape.

        Returns:
            Arrays of shape (*index.shape, ...).

        Raises:
            StreamError: a row cannot be read.
        """
        found = self.read(index.reshape(-1))
        return {name: a.reshape(*index.shape, *a.shape[1:]) for name, a in found.items()}

    def take(self, index: Index) -> "Stream":
        """A stream of some of the rows."""
        shapes = {
            name: jax.ShapeDtypeStruct((len(index), *s.shape[1:]), s.dtype)
            for name, s in self.shapes.items()
        }
        return Stream(lambda rows: self.read(index[rows]), shapes)

    def only(self, names: Sequence[str]) -> "Stream":
        """A stream of some of the arrays."""

        def read(index: Index) -> Rows:
            found = self.read(index)
            return {name: found[name] for name in names}

        return Stream(read, {name: self.shapes[name] for name in names})

    def __getitem__(self, name: str) -> "Column":
        return Column(self, name, self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Column:
    """One array of a stream. It has a shape and a type, and its rows are read when asked for."""

    stream: Stream
    name: str
    abstract: jax.ShapeDtypeStruct

    shape = property(lambda self: self.abstract.shape)
    dtype = property(lambda self: self.abstract.dtype)
    ndim = property(lambda self: len(self.abstract.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.stream.rows(np.arange(len(self)))[self.name]
        return array if dtype is None else array.astype(dtype)


# --- either kind of data --------------------------------------------------------------------------


def rows(arrays: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """Some rows of every array, whether they are in memory or streamed."""
    if isinstance(arrays, Stream):
        return arrays.rows(index)
    return {name: array[index] for name, array in arrays.items()}


def take(arrays: Mapping[str, Any], index: Index) -> Mapping[str, Any]:
    """Data that consist of some of the rows."""
    return arrays.take(index) if isinstance(arrays, Stream) else rows(arrays, index)


def only(arrays: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Data that consist of some of the arrays."""
    if isinstance(arrays, Stream):
        return arrays.only(names)
    return {name: arrays[name] for name in names}


def chunks(arrays: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The data piece by piece, each with the number of its first row. In memory: one piece."""
    if not isinstance(arrays, Stream):
        yield 0, arrays
        return
    size = max(1, CHUNK_BYTES // max(1, arrays.row_bytes))
    for start in range(0, arrays.num_data, size):
        yield start, piece_of(arrays, start, min(start + size, arrays.num_data))


def full_batches(arrays: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """All data in batches of one size. The last begins earlier, so that it is full too."""
    num_data = length(arrays)
    for start in range(0, num_data, size):
        first = min(start, num_data - size)
        yield piece_of(arrays, first, first + size)


def piece_of(arrays: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The rows from ``start`` to ``stop - 1``."""
    if isinstance(arrays, Stream):
        return arrays.rows(np.arange(start, stop))
    return {name: array[start:stop] for name, array in arrays.items()}


# --- data that are prepared once ------------------------------------------------------------------


class PreparedStream(Stream):
    """A stream that prepares its rows when it reads them.

    Args:
        source: the description of the data before, as ``Prepared`` has it.
    """

    def __init__(
        self,
        read: Callable[[Index], Rows],
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        source: dict[str, str],
    ) -> None:
        super().__init__(read, shapes)
        self.source = source

    def only(self, names: Sequence[str]) -> "PreparedStream":
        """A stream of some of the arrays."""
        part = super().only(names)
        return PreparedStream(part.read, part.shapes, self.source)


def prepare_blocks(
    prepare: Callable[[Any, Any], Any] | None,
    key: jax.Array,
    arrays: Mapping[str, Any],
    source: dict[str, str],
) -> Mapping[str, Any]:
    """The data, prepared block by block: in memory at once, of a stream when they are read.

    Each block has its own key: ``key`` folded with the block's number. The first has ``key``
    itself. So a row has the same values in memory and in a stream.

    Args:
        prepare: (key, batch) -> batch. None leaves the data as they are.
        key: a random key.
        arrays: the data.
        source: their description.
    """
    if prepare is None:
        is_stream = isinstance(arrays, Stream)
        return PreparedStream(arrays.read, arrays.shapes, source) if is_stream else arrays
    apply, num_data = jax.jit(prepare), length(arrays)
    entries = sum(int(np.prod(array.shape[1:])) for array in arrays.values())
    size = 2 ** max(0, (BLOCK_ENTRIES // max(1, entries)).bit_length() - 1)

    def block(number: int) -> dict[str, Any]:
        own = jax.random.fold_in(key, number) if number else key
        first, end = number * size, min((number + 1) * size, num_data)
        return dict(apply(own, piece_of(arrays, first, end)))

    if not isinstance(arrays, Stream):
        blocks = [block(number) for number in range(-(-num_data // size))]
        return {n: _joined([part[n] for part in blocks]) for n in blocks[0]}
    latest = functools.lru_cache(maxsize=1)(lambda number: jax.device_get(block(number)))
    shapes = jax.eval_shape(prepare, key, abstract(arrays))

    def read(index: Index) -> Rows:
        found = {n: np.empty((len(index), *s.shape[1:]), s.dtype) for n, s in shapes.items()}
        for number in np.unique(index // size):
            here = index // size == number
            for name, array in latest(int(number)).items():
                found[name][here] = array[index[here] - number * size]
        return found

    return PreparedStream(read, shapes, source)


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


# --- memory-mapped arrays -------------------------------------------------------------------------


def memory_mapped(arrays: Mapping[str, Any]) -> Stream:
    """A stream of arrays. At least one is memory-mapped."""
    shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
    plain = {name: np.asarray(array) for name, array in arrays.items()}  # without memmap's own code
    files = {name: _File.of(a) for name, a in arrays.items() if isinstance(a, np.memmap)}

    def read(index: Index) -> Rows:
        for name, file in files.items():
            file.check(name, index)
        return {name: array[index] for name, array in plain.items()}

    return Stream(read, shapes)


@dataclass(frozen=True)
class _File:
    """Where the rows of a memory-mapped array lie. Who reads beyond the end of a file is killed."""

    path: str
    mapping: mmap.mmap
    start: int  # of row 0, in bytes
    row: int  # bytes from one row to the next
    last: int  # bytes from the begin of a row to its end

    @classmethod
    def of(cls, array: np.memmap) -> "_File":
        mapping = array._mmap  # type: ignore[attr-defined]
        mapped = np.frombuffer(mapping, np.uint8)
        begins = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
        place = array.__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
        steps = zip(array.shape[1:], array.strides[1:], strict=True)
        last = sum((size - 1) * step for size, step in steps) + array.itemsize
        return cls(str(array.filename), mapping, begins + place, array.strides[0], last)

    def check(self, name: str, index: Index) -> None:
        """Raises StreamError where the file ends before the rows do."""
        size = self.mapping.size()
        most = int(index.max(initial=0))
        if size < self.start + most * self.row + self.last:
            first = max(0, (size - self.start - self.last) // self.row + 1)
            raise StreamError(
                f"data[{name!r}][{first}]: expected row {first} in {self.path}, got a file that "
                f"ends before it, after {size} bytes; put the whole file back and go on"
            )


# --- sources --------------------------------------------------------------------------------------


def is_source(data: Any) -> bool:
    """Whether data are a source: a length, and one datum at each number, by name."""
    if isinstance(data, Mapping | str | bytes | np.ndarray | jax.Array):
        return False
    if isinstance(data, list | tuple):
        return bool(data) and isinstance(data[0], Mapping)
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def source_stream(source: Any, name: str) -> Stream:
    """A stream of a source. Its first datum tells names, shapes and types.

    Raises:
        TypeError: a datum is no mapping from name to array of numbers.
        ValueError: the source is empty.
        StreamError: the first datum cannot be read.
    """
    if len(source) == 0:
        raise ValueError(f"{name}: expected at least one datum, got a source of length 0")
    first = _record(source, 0, name)
    if not isinstance(first, Mapping) or not first:
        raise TypeError(
            f"{name}[0]: expected a mapping from name to array, the arrays of one datum, got "
            f'{type(first).__name__}; let the source return {{"x": array}}, or give a mapping from '
            f"keyword to array, a DataFrame or a Dataset"
        )
    expected = {}
    for key, value in first.items():
        array = np.asarray(value)
        if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise TypeError(
                f"{name}[0][{key!r}]: expected an array of numbers, got dtype {array.dtype}; "
                f"encode its entries as numbers"
            )
        expected[str(key)] = array
    shapes = {
        key: jax.ShapeDtypeStruct((len(source), *array.shape), array.dtype)
        for key, array in expected.items()
    }

    def read(index: Index) -> Rows:
        found = {k: np.empty((len(index), *a.shape), a.dtype) for k, a in expected.items()}
        for place, number in enumerate(index.tolist()):
            record = _record(source, number, name)
            _check_record(record, expected, f"{name}[{number}]")
            for key in found:
                found[key][place] = record[key]
        return found

    return Stream(read, shapes)


def _record(source: Any, number: int, name: str) -> Any:
    try:
        return source[number]
    except Exception as error:
        raise StreamError(
            f"{name}[{number}]: expected a datum, but the source raised {type(error).__name__}: "
            f"{error}; mend the source and go on"
        ) from error


def _check_record(record: Any, expected: Mapping[str, np.ndarray], where: str) -> None:
    """Raises StreamError for a record that is not like the first."""
    if not isinstance(record, Mapping) or record.keys() != expected.keys():
        got = sorted(record) if isinstance(record, Mapping) else type(record).__name__
        raise StreamError(
            f"{where}: expected the arrays {sorted(expected)}, as in record 0, got {got}; mend the "
            f"source and go on"
        )
    for key, like in expected.items():
        array = np.asarray(record[key])
        if array.shape != like.shape or not np.can_cast(array.dtype, like.dtype, "same_kind"):
            raise StreamError(
                f"{where}[{key!r}]: expected {like.dtype} of shape {like.shape}, as in record 0, "
                f"got {array.dtype} of shape {array.shape}; mend the source and go on"
            )
