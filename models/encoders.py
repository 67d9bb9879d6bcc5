"""Encoders: what gives a guide the numbers of every datum's posterior.

An encoder is a callable ``(num_outputs, *, rngs)``. It returns a Flax NNX module. The guide calls
the module with the program's arrays by keyword and gets (N, num_outputs) numbers.

    guide = mean_field(model)                               # the model's own, or Inputs and an MLP
    guide = mean_field(model, encoder=per_datum(num_data))  # a table with a row for each datum

Without an encoder of its own a model gets an MLP on all arrays. ``Inputs`` says what it sees:

| array                                              | the MLP sees                              |
|----------------------------------------------------|-------------------------------------------|
| real numbers                                       | (x - mean) / deviation                    |
| Boolean, or the value of a Bernoulli site          | 0 or 1                                    |
| counts: the value of a Poisson site, for example   | log(1 + x), standardised                  |
| labels: the value of a Categorical site            | one-hot                                   |
| values of a latent site, known in part             | nothing: the guide's draws have them      |
| other integers                                     | nothing: such an array needs an encoder   |
| ``<name>_mask``                                    | 0 or 1, and 0 for the entries masked out  |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from inference.sites import Kind, length
from models.networks import MLP

MakeEncoder = Callable[..., nnx.Module]  # (num_outputs, *, rngs) -> a module from the data
Data = Mapping[str, Any]  # the model's arguments by name: arrays of shape (N, ...)
Statistics = dict[str, dict[str, Array]]  # by array: the mean and the deviation of each entry

FAR = 10.0  # deviations from the mean, beyond which an input grows as a logarithm
HIDDEN = (100, 100)  # units of the layers between


# --- an MLP on all arrays -------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The arrays of a program as one vector for each datum.

    Attributes:
        kinds: what each array holds.
    """

    kinds: Mapping[str, Kind]

    def check(self) -> None:
        """Raises ValueError for integers of no known meaning."""
        for name, kind in sorted(self.kinds.items()):
            if kind.name == "integers":
                raise ValueError(
                    f"data[{name!r}]: expected real numbers, Booleans or the value of an observed "
                    f"site, which the automatic encoder can read, got integers that are neither; "
                    f"give them as float32 if their size matters, or pass encoder= to the guide"
                )

    def statistics(self, data: Data) -> Statistics:
        """The mean and the deviation of each entry of the arrays that are standardised.

        Args:
            data: arrays of shape (N, ...). Entries that a mask leaves out do not count.
        """
        found = {}
        for name, kind in sorted(self.kinds.items()):
            if kind.name in ("real", "counts"):
                numbers = _numbers(data[name], kind)
                found[name] = _moments(numbers, _mask_of(name, data, numbers))
        return found

    def __call__(self, data: Data, statistics: Statistics) -> Float[Array, "N inputs"]:
        """The vectors, arrays in the order of their names."""
        parts = [jnp.zeros((length(data), 0), jnp.float32)]
        for name, kind in sorted(self.kinds.items()):
            if kind.name == "given":
                continue
            numbers = _numbers(data[name], kind)
            if name in statistics:
                numbers = _standardised(numbers, **statistics[name])
                numbers = jnp.where(_mask_of(name, data, numbers), numbers, 0)
            parts.append(numbers.astype(jnp.float32))
        return jnp.concatenate(parts, axis=1)


def _numbers(array: Any, kind: Kind) -> Float[Array, "N entries"]:
    """An array's entries as real numbers, (N, entries)."""
    rows = jnp.asarray(array).reshape(len(array), -1)
    if kind.name == "labels":
        return jax.nn.one_hot(rows.astype(int), kind.num_classes).reshape(len(rows), -1)
    if rows.dtype not in (jnp.float32, jnp.float64):
        rows = rows.astype(jnp.float32)
    return jnp.sign(rows) * jnp.log1p(jnp.abs(rows)) if kind.name == "counts" else rows


def _mask_of(name: str, data: Data, numbers: Array) -> Array:
    """Which entries are there, (N, entries): all, unless the data have a mask for them."""
    if f"{name}_mask" not in data:
        return jnp.ones(numbers.shape, bool)
    mask = jnp.asarray(data[f"{name}_mask"], bool)
    axes = (*mask.shape, *[1] * (jnp.ndim(data[name]) - mask.ndim))
    return jnp.broadcast_to(mask.reshape(axes), jnp.shape(data[name])).reshape(numbers.shape)


def _moments(numbers: Array, mask: Array) -> dict[str, Array]:
    """Mean and deviation over the data, without overflow. A constant has the deviation 1."""
    unit = jnp.max(jnp.abs(numbers), 0, where=mask, initial=0)
    unit = jnp.where(unit > 0, unit, 1)
    scaled, count = jnp.where(mask, numbers / unit, 0), jnp.maximum(mask.sum(0), 1)
    mean = scaled.sum(0) / count
    deviation = jnp.sqrt((jnp.where(mask, scaled - mean, 0) ** 2).sum(0) / count)
    # a deviation of a few roundings is none
    is_constant = deviation <= 4 * jnp.finfo(numbers.dtype).eps * jnp.abs(mean)
    return {"mean": mean * unit, "deviation": jnp.where(is_constant, 1, deviation * unit)}


def _standardised(numbers: Array, mean: Array, deviation: Array) -> Array:
    """(x - mean) / deviation. What lies far out is drawn in, so every array stays finite."""
    limits = jnp.finfo(numbers.dtype)
    halves = (numbers / 2 - mean / 2) / (jnp.maximum(deviation, limits.tiny) / 2)
    numbers = jnp.clip(halves, -limits.max, limits.max)
    beyond = jnp.maximum(jnp.abs(numbers) - FAR, 0)
    return jnp.clip(numbers, -FAR, FAR) + jnp.sign(numbers) * jnp.log1p(beyond)


def default_network(num_inputs: int, num_outputs: int, *, rngs: nnx.Rngs) -> MLP:
    """The MLP on ``Inputs``. Its last layer starts small, so that the guide starts near the prior.

    Args:
        num_inputs, num_outputs: numbers for each datum.
        rngs: Flax's random numbers.
    """
    mlp = MLP((num_inputs, *HIDDEN, num_outputs), nnx.silu, "float32", rngs=rngs)
    last = mlp.layers[-1]
    last.kernel[...] = 0.1 * last.kernel[...]
    return mlp


# --- numbers of each datum's own ------------------------------------------------------------------


class Table(nnx.Module):
    """A row of numbers for each datum.

    Args:
        num_data: the rows.
        num_outputs: the columns.
    """

    def __init__(self, num_data: int, num_outputs: int, *, rngs: nnx.Rngs):
        start = 0.1 * jax.random.normal(rngs.params(), (num_data, num_outputs), jnp.float32)
        self.rows = nnx.Param(start)

    def __call__(self, **data: Any) -> Float[Array, "N outputs"]:
        """The rows.

        Raises:
            ValueError: other than all data.
        """
        num_data, got = len(self.rows), len(next(iter(data.values())))
        if got != num_data:
            raise ValueError(
                f"data: expected all {num_data} data that the guide has numbers for, got {got}; "
                f"train with batch_size={num_data}, and for other data fit another such guide to "
                f"the held model"
            )
        return self.rows[...]


@dataclass(frozen=True)
class PerDatum:
    """The encoder that is a table with a row for each datum.

    Attributes:
        num_data: how many data there are. Every batch holds all of them, in the same order.
    """

    num_data: int

    def __post_init__(self):
        if self.num_data < 1:
            raise ValueError(f"num_data: expected at least 1, got {self.num_data}")

    def __call__(self, num_outputs: int, *, rngs: nnx.Rngs) -> Table:
        """The table."""
        return Table(self.num_data, num_outputs, rngs=rngs)


def per_datum(num_data: int) -> PerDatum:
    """Numbers for each datum, for small data: no encoder is learnt.

    Beside the same family with a network it shows the loss by amortisation (Cremer, Li & Duvenaud
    2018, equation 5).

    Args:
        num_data: how many data there are. Every batch holds all of them, in the same order.

    Raises:
        ValueError: fewer than 1.
    """
    return PerDatum(num_data)
