"""A user's data as arrays by name, checked once before anything runs.

Data are a mapping of arrays or lists, a pandas DataFrame (one array a column) or an xarray
Dataset. The leading axis of every array is the datum. A memory-mapped array and a source, which
returns one datum at a time, become a stream (``inference._streams``).
"""

import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from inference._streams import (
    PreparedStream,
    Stream,
    chunks,
    is_source,
    memory_mapped,
    source_stream,
)

_SLAB = 2**20  # entries that are looked at together: this bounds the memory of the checks

Arrays = Mapping[str, Any]  # NumPy or JAX arrays, or a stream


class Prepared(dict):
    """Arrays by name as the programs take them: ``preprocess`` has been applied.

    ``Fit.prepare`` makes one. ``Prepared(data)`` marks data that you prepared yourself.

    Attributes:
        source: the type, shape and hash of each array that they were made from, or None.
    """

    source: dict[str, str] | None = None

    def __init__(self, data: Any, source: dict[str, str] | None = None):
        super().__init__(_arrays_by_name(data, "Prepared"))
        self.source = source


def is_prepared(data: Any) -> bool:
    """Whether data are marked as those that the programs take."""
    return isinstance(data, Prepared | PreparedStream)


def as_arrays(data: Any, name: str = "data") -> Arrays:
    """The arrays of a data set, by name. A stream if one is memory-mapped, or from a source.

    Args:
        data: a mapping of arrays or lists, a DataFrame, a Dataset, or a source: with a length, and
            with one datum, a mapping of arrays, at each number.
        name: what to call the data in a message.

    Raises:
        TypeError: it is none of these, or a value is not an array of numbers.
        ValueError: a list whose rows differ in length.
        StreamError: a source that raises.
    """
    if isinstance(data, Stream):
        return data
    pandas = sys.modules.get("pandas")
    is_table = isinstance(data, getattr(pandas, "DataFrame", ()))
    if is_source(data) and not is_table:
        return source_stream(data, name)
    arrays = _arrays_by_name(data, name)
    is_mapped = any(isinstance(array, np.memmap) for array in arrays.values())
    return memory_mapped(arrays) if is_mapped else arrays


def _arrays_by_name(data: Any, name: str) -> dict[str, Any]:
    """The arrays of a data set that is no source, by name."""
    pandas = sys.modules.get("pandas")  # which may be half imported, by another thread
    if isinstance(data, getattr(pandas, "DataFrame", ())):
        data = {str(column): data[column].to_numpy() for column in data.columns}
    if not isinstance(data, Mapping):
        raise TypeError(
            f"{name}: expected a mapping from keyword to array, a DataFrame or a Dataset, got "
            f'{type(data).__name__}; write {{"x": array}}'
        )
    return {str(key): _as_array(value, f"{name}[{key!r}]") for key, value in data.items()}


def _as_array(value: Any, name: str) -> Any:
    if not isinstance(value, np.ndarray | np.generic | Array):
        if not (isinstance(value, list | tuple) or hasattr(value, "__array__")):
            remedy = "convert it with numpy.asarray"
            if isinstance(value, Mapping):
                remedy = "make each of its arrays an argument of the model"
            raise TypeError(
                f"{name}: expected a NumPy or JAX array or a list, with one entry per datum, got "
                f"{type(value).__name__}; {remedy}"
            )
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise ValueError(
                f"{name}: expected rows of one length, got a list that is no array ({error}); pad "
                f"the rows to one length"
            ) from error
    if not (jnp.issubdtype(value.dtype, np.number) or jnp.issubdtype(value.dtype, np.bool_)):
        raise TypeError(
            f"{name}: expected an array of numbers, got dtype {value.dtype}; encode its entries "
            f"as numbers"
        )
    return value


def check_arrays(
    arrays: Arrays,
    name: str = "data",
    may_miss: Collection[str] = (),
    look: Callable[..., Any] | None = None,
) -> int:
    """Checks the arrays of a data set. A stream is read once, piece by piece.

    Args:
        arrays: as ``as_arrays`` gives them.
        name: what to call the data in a message, for example "validation".
        may_miss: the arrays that may hold NaN, for missing entries.
        look: is called with each piece, its arrays by keyword, after the checks.

    Returns:
        N, the common leading length.

    Raises:
        ValueError: there are no arrays or no data, an array has no leading axis, leading lengths
            differ, an entry is NaN or infinite, or too large for the device's type.
    """
    for key, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(
                f"{name}[{key!r}]: expected a leading axis, one entry per datum, got a scalar of "
                f"shape (); give a constant to the program itself, for example by "
                f"functools.partial"
            )
    size = leading_length(arrays, name)
    if size == 0:
        raise ValueError(f"{name}: expected at least one datum, got arrays of leading length 0")
    for start, piece in chunks(arrays):
        for key, array in piece.items():
            _check_finite(array, name, key, key in may_miss, start)
            _check_range(array, f"{name}[{key!r}]")
        if look is not None:
            look(**piece)
    return size


def leading_length(arrays: Mapping[str, Any], name: str) -> int:
    """The common leading length of the arrays.

    Raises:
        ValueError: there are no arrays, or their lengths differ.
    """
    if not arrays:
        raise ValueError(
            f"{name}: expected at least one array, got an empty mapping; give the arrays that the "
            f"model observes"
        )
    lengths = {key: array.shape[0] for key, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key!r}: {length}" for key, length in lengths.items())
        raise ValueError(
            f"{name}: expected arrays of one leading length, the number of data, got {listed}; "
            f"give every array one entry per datum"
        )
    return next(iter(lengths.values()))


def converted(arrays: Arrays) -> dict[str, str]:
    """The arrays that change their type on the device, such as float64 to float32, in words."""
    pairs = {n: (a.dtype, jax.dtypes.canonicalize_dtype(a.dtype)) for n, a in arrays.items()}
    return {name: f"{old} to {new}" for name, (old, new) in pairs.items() if old != new}


def _check_range(array: Any, name: str) -> None:
    """Integers that the device's type cannot hold would wrap around, floats would be infinite."""
    held = jax.dtypes.canonicalize_dtype(array.dtype)
    if held == array.dtype or jnp.issubdtype(array.dtype, np.complexfloating):
        return
    is_integer = jnp.issubdtype(array.dtype, np.integer)
    bounds = np.iinfo(held) if is_integer else np.finfo(held)
    low, high = np.fmin.reduce(array, axis=None), np.fmax.reduce(array, axis=None)  # without NaN
    if low < bounds.min or high > bounds.max:
        remedy = "number the entries anew, give floats" if is_integer else "rescale them"
        raise ValueError(
            f"{name}: expected numbers from {bounds.min} to {bounds.max}, which the device's "
            f"{held} holds, got {low} to {high}; {remedy}, or set JAX_ENABLE_X64=1"
        )


def _check_finite(array: Any, name: str, key: str, may_miss: bool, first_row: int) -> None:
    if not jnp.issubdtype(array.dtype, np.inexact):
        return
    if isinstance(array, Array) and bool(_all_finite(array, may_miss)):  # on the device
        return
    array = np.asarray(array)
    count, first, some_nan = 0, (), False
    rows = max(1, _SLAB // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        slab = array[start : start + rows]
        faulty = np.isinf(slab) if may_miss else ~np.isfinite(slab)
        if faulty.any():
            if count == 0:
                row, *rest = (int(i) for i in np.unravel_index(faulty.argmax(), faulty.shape))
                first = (first_row + start + row, *rest)
            count += int(np.count_nonzero(faulty))
            some_nan = some_nan or bool(np.isnan(slab[faulty]).any())
    if count:
        remedy = "drop or impute them"
        if some_nan:
            remedy += (
                f', or pass missing="mask" with a model that takes {key}_mask=True and uses '
                f".mask({key}_mask)"
            )
        raise ValueError(
            f"{name}[{key!r}]: expected finite numbers, got {count} "
            f"{'infinite' if may_miss else 'NaN or infinite'} of {array.size} entries, the first "
            f"at index {first}; {remedy}"
        )


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(array: Array, may_miss: bool) -> Array:
    """As `isfinite(array).all()`, which XLA gives a temporary as long as the array.

    With ``may_miss`` NaN counts as finite.
    """
    size = jnp.abs(array)
    size = jnp.where(jnp.isnan(size), 0, size) if may_miss else size
    return jnp.isfinite(jnp.max(size, initial=0))
