"""What every judge and generator does first, and how it goes through the data.

A judge takes a fit and data and answers for every seed at once. It makes the checks that ``fit``
makes, once per fit and shape of data. It goes through the data in batches, by one compiled
program. So its memory does not grow with the number of data or of draws.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from inference._checks import (
    SUPPORT_ROWS,
    ProgramError,
    Programs,
    check_supports,
    prime,
    support_check,
)
from inference._data import Arrays, as_arrays, check_arrays, is_prepared
from inference._describe import describe_arrays
from inference._feeds import ahead, put, put_rows
from inference._processes import is_first, to_host
from inference._progress import progress as progress_bar
from inference._settings import require_whole
from inference._streams import Stream, full_batches
from inference.fit import Fit, prepare, programs_of, tied_message
from inference.sites import Program, is_auxiliary, is_latent, length, trace_of

_PASSED: WeakKeyDictionary[Fit, set[Any]] = WeakKeyDictionary()  # data whose values were checked


class Judged(NamedTuple):
    """Data that a fit can judge.

    Attributes:
        arrays: as the programs take them.
        programs: the facts about the programs on data of these shapes.
        described: of each array its type, shape and hash.
    """

    arrays: Arrays
    programs: Programs
    described: dict[str, str]


def default_key(key: Array | None, name: str) -> Array:
    """The key, or a fixed one folded with the function's name: no two functions share noise."""
    if key is not None:
        return key
    return random.fold_in(random.key(0), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def judged_data(result: Fit, data: Any) -> Judged:
    """The data of a judge, checked.

    Raises:
        TypeError: no fit, or no data by name.
        ValueError: plain data where the fit has a preprocess; data that the programs do not take,
            or that the guide was not fitted to where it has numbers for each datum.
    """
    require_fit(result)
    is_plain = not is_prepared(data)
    if is_plain:
        if result.config.get("preprocess") is not None or result.preprocess is not None:
            raise ValueError(
                "data: expected data that the fit's preprocess has prepared, got plain ones; "
                "write test = result.prepare(data), or Prepared(data) if they are prepared"
            )
        data = prepare(result.model, None, data, missing=result.config.get("missing"))
    arrays = as_arrays(data)
    num_data = check_arrays(arrays)
    _check_like_training(result, arrays)
    programs = programs_of(result, arrays)
    prime(result.guide, random.key(0), lambda: arrays)
    described = (is_plain and data.source) or describe_arrays(arrays, contents=True)  # hashed once
    if programs.tied_to and (data.source or described) != result.config["data"]:
        raise ProgramError(tied_message(programs))
    _check_values(result, arrays, programs, described, num_data)
    return Judged(arrays, programs, described)


def require_fit(result: Any) -> None:
    """Raises TypeError for anything but a fit."""
    if not isinstance(result, Fit):
        raise TypeError(
            f"result: expected what fit returns, got {type(result).__name__}; known parameters "
            f"become a fit by Fit.from_params(model, guide, params, example=data)"
        )


def _check_like_training(result: Fit, arrays: Arrays) -> None:
    if not result.batch:
        return
    if arrays.keys() != result.batch.keys():
        raise ValueError(
            f"data: expected arrays {sorted(result.batch)}, as in training, got {sorted(arrays)}; "
            f"give the same arrays"
        )
    for name, array in arrays.items():
        expected = result.batch[name].shape[1:]
        if array.shape[1:] != expected:
            words = ", ".join(map(str, ("N", *expected)))
            raise ValueError(
                f"data[{name!r}]: expected shape ({words}), as in training, got {array.shape}; "
                f"reshape the data"
            )


def _check_values(
    result: Fit, arrays: Arrays, programs: Programs, described: dict[str, str], num_data: int
) -> None:
    """Compares observed values with the supports of their sites, once per fit and data."""
    passed, digest = _PASSED.setdefault(result, set()), tuple(sorted(described.items()))
    if digest in passed or not programs.bounded:
        return
    check = support_check(result.model, result.guide, programs.params | programs.mutable)
    size = min(SUPPORT_ROWS, num_data) if programs.takes_batches else num_data
    batches = ((random.key(0), batch) for batch in full_batches(arrays, size))
    check_supports(check, batches, result.model)
    passed.add(digest)


def require_local(judged: Judged, name: str, *, allows_globals: bool = False) -> None:
    """Raises ValueError for programs that give no number to a single datum.

    Args:
        judged: the data and the facts about the programs.
        name: the judge's.
        allows_globals: whether the judge has a number for a datum given the global sites.
    """
    programs = judged.programs
    if not programs.plates:
        raise ValueError(
            f"{name}: expected a model with a plate for its data, whose terms belong to data, got "
            f'one without; put the data in numpyro.plate("data", len(x))'
        )
    if programs.has_globals and not allows_globals:
        raise ValueError(
            f"{name}: expected latent sites with one value for each datum, got the global site "
            f"{programs.globals[0]!r}, which all data share and no datum's number can hold; use "
            f"log_predictive_density"
        )


def shared_draws(
    guide: Program, names: tuple[str, ...], params: Any, key: Array, batch: Any
) -> dict[str, Array]:
    """A guide's draws of global sites, and of what it draws for itself, for all batches.

    Args:
        guide: a program.
        names: the global sites.
        params: its parameters and mutable state.
        key: the same for every batch.
        batch: any.
    """
    sites = trace_of(guide, key, params, **batch)
    found = {name: site for name, site in sites.items() if is_latent(site)}
    return {n: s["value"] for n, s in found.items() if n in names or is_auxiliary(s)}


# --- compiled functions ---------------------------------------------------------------------------


def compiled(function: Callable[..., Any], *statics: Any) -> Callable[..., Any]:
    """``function`` with its first arguments fixed, compiled once for all calls with equal ones."""
    try:
        return _compiled(function, *statics)
    except TypeError:  # a program that has no hash
        return _compiled.__wrapped__(function, *statics)


@functools.lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], *statics: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(function, *statics))


def values_of(result: Fit, seed: int) -> dict[str, Any]:
    """One seed's parameters and mutable state."""
    return result.params_of(seed) | result.mutable_of(seed)


def over_data(
    judge: Callable[..., PyTree],
    result: Fit,
    judged: Judged,
    key: Array,
    batch_size: int,
    show: bool = False,
    field: str = "",
    extra: Callable[[int, np.ndarray], Any] | None = None,
) -> PyTree:
    """``judge(params, key, batch)`` on every seed and batch: its arrays (batch, ...) joined.

    All seeds use the same keys, and each runs by itself: row i equals the judge of seed i alone.
    The devices of the fit's mesh, all axes together, split each batch.

    Args:
        judge: a compiled function.
        result: the fit.
        judged: the data.
        key: folded with the number of the batch.
        batch_size: data at a time. All of them if the programs do not take batches.
        show: whether to show progress.
        field: what the progress shows of the first array.
        extra: from (seed, rows) to more arguments of ``judge``, of a batch's length.

    Returns:
        Arrays (seed, N, ...).
    """
    num_data, num_seeds = length(judged.arrays), result.num_seeds
    require_whole("batch_size", batch_size, 1)
    size = min(batch_size, num_data) if judged.programs.takes_batches else num_data
    everywhere, split = _places(result.mesh, size)
    values = [put(values_of(result, seed), everywhere) for seed in range(num_seeds)]
    parts: list[list[Any]] = [[] for _ in range(num_seeds)]
    mean = 0.0

    def batches() -> Iterator[tuple[np.ndarray, Any]]:
        for start in range(0, num_data, size):
            index = np.minimum(np.arange(start, start + size), num_data - 1)  # the last one is full
            yield index, put_rows(judged.arrays, index, split)

    is_stream = isinstance(judged.arrays, Stream)
    with progress_bar(num_data, "datum", show=show and is_first()) as shown:
        for i, (index, batch) in enumerate(ahead(batches()) if is_stream else batches()):
            count, own = min(size, num_data - i * size), put(random.fold_in(key, i), everywhere)
            for seed in range(num_seeds):
                more = () if extra is None else (put(extra(seed, index), everywhere),)
                found = to_host(judge(values[seed], own, batch, *more))
                parts[seed].append(jax.tree.map(lambda x, n=count: x[:n], found))
            done = i * size + count
            first = jax.tree.leaves(parts[0][-1])[0]
            mean += (float(np.mean(first)) - mean) * count / done
            shown.update(done, {field: f"{mean:.4f}"} if field else {})
    joined = [jax.tree.map(lambda *x: np.concatenate(x), *seed) for seed in parts]
    return jax.tree.map(lambda *x: np.stack(x), *joined)


def _places(mesh: Mesh | None, size: int) -> tuple[NamedSharding | None, NamedSharding | None]:
    """How parameters and a batch of ``size`` data lie on the devices.

    The batch is split over as many devices as divide it: over all axes of the mesh, over one, or
    over none.
    """
    if mesh is None:
        return None, None
    names = mesh.axis_names
    axes = [(names, mesh.size), *((name, mesh.shape[name]) for name in names), (None, 1)]
    best = max((pair for pair in axes if size % pair[1] == 0), key=lambda pair: pair[1])[0]
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(best))
