"""A user's data as arrays: what is taken, what is refused, and in which words."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from inference import Prepared
from inference._data import as_arrays, check_arrays, converted


def checked(data: Any, name: str = "data") -> int:
    return check_arrays(as_arrays(data, name), name)


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "expected" in text
    assert "got" in text
    return text


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_arrays_of_any_type_and_shape(make: Callable[..., Any]) -> None:
    labels = make(np.arange(10, dtype=np.int32))
    weights = make(np.ones(10, np.float32))
    data = {
        "c": labels,
        "x": make(np.zeros((10, 4, 4), np.uint8)),
        "w": weights,
        "b": labels > 3,
        "h": weights.astype("bfloat16"),
        "e": make(np.zeros((10, 0), np.float32)),
    }
    assert checked(data) == 10
    for name, array in as_arrays(data).items():
        assert array is data[name]


@pytest.mark.parametrize(
    "data",
    [
        {"c": [0, 1, 2], "x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]},
        {"c": (0, 1, 2), "x": xr.DataArray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])},
        xr.Dataset({"c": ("row", [0, 1, 2]), "x": (("row", "k"), np.arange(1.0, 7).reshape(3, 2))}),
    ],
    ids=["lists", "tuples", "Dataset"],
)
def test_lists_and_datasets_are_arrays(data: Any) -> None:
    arrays = as_arrays(data)
    np.testing.assert_array_equal(arrays["c"], [0, 1, 2])
    np.testing.assert_array_equal(arrays["x"], np.arange(1.0, 7).reshape(3, 2))
    assert all(isinstance(array, np.ndarray) for array in arrays.values())


def test_columns_of_a_dataframe_are_arrays() -> None:
    arrays = as_arrays(pd.DataFrame({"c": [0, 1, 2], "x": [0.5, 1.5, 2.5]}, index=[7, 8, 9]))
    np.testing.assert_array_equal(arrays["c"], [0, 1, 2])
    np.testing.assert_array_equal(arrays["x"], [0.5, 1.5, 2.5])
    with pytest.raises(TypeError, match=r"data\['name'\]: expected an array of numbers"):
        as_arrays(pd.DataFrame({"name": ["a", "b"]}))


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (None, TypeError, "data['x']: expected a NumPy or JAX array or a list"),
        (1.0, TypeError, "data['x']: expected a NumPy or JAX array or a list"),
        ("text", TypeError, "data['x']: expected a NumPy or JAX array or a list"),
        ([[1.0], [2.0, 3.0]], ValueError, "data['x']: expected rows of one length"),
        (["a", "b"], TypeError, "data['x']: expected an array of numbers, got dtype <U1"),
        (np.array([None, 1]), TypeError, "data['x']: expected an array of numbers"),
        (np.array(["2020"], "datetime64[Y]"), TypeError, "data['x']: expected an array of numbers"),
        (np.array(1.0), ValueError, "data['x']: expected a leading axis"),
        (np.float32(1.0), ValueError, "data['x']: expected a leading axis"),
        (jnp.array(1.0), ValueError, "data['x']: expected a leading axis"),
        (np.zeros((0, 3)), ValueError, "data: expected at least one datum"),
    ],
)
def test_value_that_is_no_array_of_data(value: Any, error: type[Exception], expected: str) -> None:
    with pytest.raises(error) as raised:
        checked({"x": value})
    assert message(raised).startswith(expected)


@pytest.mark.parametrize("data", [np.zeros(3), jnp.zeros(3), [1.0, 2.0], None], ids=type)
def test_data_without_names(data: Any) -> None:
    with pytest.raises(TypeError, match=r'data: expected a mapping.*write \{"x": array\}') as error:
        checked(data)
    assert message(error)


def test_empty_mapping() -> None:
    with pytest.raises(ValueError, match="validation: expected at least one array") as error:
        checked({}, "validation")
    assert message(error)


def test_arrays_that_differ_in_length() -> None:
    data = {"c": np.zeros(10), "x": np.zeros((12, 3)), "y": jnp.zeros(10)}
    with pytest.raises(ValueError, match=r"data: .*'c': 10, 'x': 12, 'y': 10") as error:
        checked(data)
    assert message(error)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_entries_that_are_not_finite(make: Callable[..., Any], dtype: str) -> None:
    array = np.zeros((10, 3), jnp.dtype(dtype))
    array[4, 2], array[7, 0], array[9, 1] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match=r"data\['x'\].* got 3 .* of 30 .*\(4, 2\)") as error:
        checked({"c": np.zeros(10), "x": make(array)})
    assert message(error)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("entry", [np.nan, np.inf, -np.inf])
def test_a_single_entry_that_is_not_finite(make: Callable[..., Any], entry: float) -> None:
    with pytest.raises(ValueError, match=r"got 1 NaN or infinite of 3 entries, .*\(2,\)"):
        checked({"x": make(np.array([1.0, -2.0, entry], np.float32))})


def test_first_non_finite_entry_is_found_across_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference._data._SLAB", 4)
    array = np.zeros((11, 2))
    array[5, 1] = array[10, 0] = np.nan
    with pytest.raises(ValueError, match=r"got 2 .* of 22 entries, the first at index \(5, 1\)"):
        checked({"x": array})
    with pytest.raises(ValueError, match=r"got 1 .* of 11 entries, the first at index \(5,\)"):
        checked({"x": array[:, 1]})


# --- the device's types ---------------------------------------------------------------------------


def test_integers_that_the_device_cannot_hold_are_refused() -> None:
    for value in (3_000_000_000, -3_000_000_000):
        with pytest.raises(
            ValueError, match=rf"data\['x'\]: .*int32 holds, got .*{value}"
        ) as error:
            checked({"x": np.array([0, value])})
        assert "JAX_ENABLE_X64=1" in message(error)
    assert checked({"x": np.array([2_000_000_000, -2_000_000_000])}) == 2
    assert checked({"x": np.array([3_000_000_000], np.uint32)}) == 1


def test_floats_that_the_device_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\['x'\]: .*float32 holds.*1e\+300") as error:
        checked({"x": np.array([1e300, 1.0])})
    assert "rescale" in message(error)


def test_types_that_change_on_the_device_are_told() -> None:
    arrays = {
        "x": np.zeros(2),
        "n": np.zeros(2, int),
        "y": np.zeros(2, np.float32),
        "b": np.ones(2) > 0,
    }
    assert converted(arrays) == {"x": "float64 to float32", "n": "int64 to int32"}


# --- prepared data --------------------------------------------------------------------------------


def test_prepared_data_are_a_mapping_with_a_mark() -> None:
    prepared = Prepared({"x": [1.0, 2.0]})
    assert prepared.source is None
    assert dict(prepared).keys() == {"x"}
    np.testing.assert_array_equal(prepared["x"], [1.0, 2.0])
    with pytest.raises(TypeError, match="Prepared: expected a mapping"):
        Prepared(np.zeros(2))
