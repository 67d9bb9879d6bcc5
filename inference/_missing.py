"""Missing entries: NaN becomes 0, and a Boolean mask says which entries are there.

``fit(missing="mask")`` asks for it. A model that takes ``x_mask`` gets one for the array ``x``.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from inference.sites import Batch, Program, mask_name

Preprocess = Callable[[Any, Batch], Batch]


def masked_arrays(model: Program, missing: str | None) -> tuple[str, ...]:
    """The names of the arrays that get a mask: those whose mask the model takes.

    Args:
        model: a program. With the arguments ``x`` and ``x_mask`` it takes the mask of ``x``.
        missing: "mask", or None for no masks.

    Raises:
        ValueError: ``missing`` is something else.
    """
    if missing is None:
        return ()
    if missing != "mask":
        raise ValueError(
            f'missing: expected "mask" or None, got {missing!r}; with "mask" a model that takes '
            f"x_mask gets a mask of what is there in x"
        )
    try:
        takes = inspect.signature(model).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return ()
    return tuple(name for name in takes if mask_name(name) in takes)


@dataclass(frozen=True)
class Masking:
    """``preprocess``, and then the masks.

    An entry is missing if it is NaN after ``preprocess``. If the array keeps its shape, an entry
    that was NaN before is missing too. A mask among the data may leave out more.

    Attributes:
        preprocess: (key, batch) -> batch, or None.
        names: the arrays that get a mask.
    """

    preprocess: Preprocess | None
    names: tuple[str, ...]

    def __call__(self, key: Any, batch: Batch) -> dict[str, Any]:
        """The batch as the programs take it. Missing entries are 0.

        Raises:
            ValueError: a mask that does not fit its array; a ``preprocess`` that loses what is
                missing.
        """
        made = dict(batch if self.preprocess is None else self.preprocess(key, batch))
        masks = {name: _mask(name, batch, made) for name in self.names if name in made}
        for name, mask in masks.items():
            array = jnp.asarray(made[name])
            made[name] = jnp.where(mask, array, jnp.zeros((), array.dtype))
            made[mask_name(name)] = mask
        return made


def masking(model: Program, preprocess: Preprocess | None, missing: str | None) -> Any:
    """What makes a batch as the programs take it: (key, batch) -> batch, or None for nothing.

    Args:
        model, preprocess, missing: as in ``fit``.

    Raises:
        ValueError: ``missing`` is neither "mask" nor None.
    """
    names = masked_arrays(model, missing)
    return Masking(preprocess, names) if names else preprocess


def _mask(name: str, given: Batch, made: Batch) -> Bool[Array, "N ..."]:
    """Which entries of a prepared array are there."""
    mask = _there(name, made)
    if name not in given:
        return mask
    if given[name].shape == made[name].shape:
        return mask & _there(name, given)
    own = mask_name(name)
    loses_nan = _may_be_nan(given[name]) and not _may_be_nan(made[name])
    if own not in made and (own in given or loses_nan):
        raise ValueError(
            f"preprocess: expected {own!r} beside {name!r}, whose shape it changes from "
            f"{given[name].shape} to {made[name].shape}, got {', '.join(made)}; return {own!r} "
            f"too, True for the entries that are there"
        )
    return mask


def _there(name: str, batch: Batch) -> Bool[Array, "N ..."]:
    """Which entries of an array are numbers. A mask in the batch may leave out more."""
    array, own = jnp.asarray(batch[name]), mask_name(name)
    there = ~jnp.isnan(array) if _may_be_nan(array) else jnp.ones(array.shape, bool)
    if own not in batch:
        return there
    mask = jnp.asarray(batch[own]).astype(bool)
    if mask.shape != array.shape[: mask.ndim]:
        raise ValueError(
            f"data[{own!r}]: expected the shape of {name!r}, {array.shape}, or its first axes, "
            f"got {mask.shape}; give one entry for each entry of {name!r}, or for each datum"
        )
    return there & mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))


def _may_be_nan(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.inexact))
