"""What a conditional model is given: labels or any array, as features for its networks.

A condition is a frozen dataclass. ``features(rngs)`` makes the Flax module that turns conditions c
into (N, ``num_features``) numbers. ``check(c)`` refuses conditions of another kind.

    condition = Labels(10)              # c is one label per datum, 0 to 9
    condition = Values((28, 14))        # c is half an image per datum
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float


@runtime_checkable
class Condition(Protocol):
    """What a model asks of a condition."""

    @property
    def num_features(self) -> int:
        """The number of features of one datum's condition."""
        ...

    def features(self, *, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """A module from conditions (N, ...) to (N, num_features). It looks at no value of c."""
        ...

    def check(self, c: Any) -> None:
        """Raises ValueError for conditions of another type, shape or range."""
        ...


def check_given(condition: Condition | None, c: Any) -> None:
    """Refuses a missing or a superfluous condition.

    Args:
        condition: the kind of condition that a model has, or None.
        c: conditions, or None. Their values are not looked at.

    Raises:
        ValueError: the model has a condition and ``c`` is None, or the other way round.
    """
    if condition is not None and c is None:
        raise ValueError(f"c: expected conditions, got none; the model's condition is {condition}")
    if condition is None and c is not None:
        raise ValueError(
            "c: expected none, got some; leave c out of the data, or give the model a condition"
        )


@dataclass(frozen=True)
class Labels:
    """A label out of ``num_classes``: one-hot or embedded. c is (N,), integers.

    Attributes:
        num_classes: the number of classes. Labels are 0 .. num_classes - 1.
        num_embedded: the length of the learned vector for a label. None for one-hot labels.

    Raises:
        ValueError: a number is not positive.
    """

    num_classes: int
    num_embedded: int | None = None

    def __post_init__(self):
        for name in ("num_classes", "num_embedded"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    @property
    def num_features(self) -> int:
        """The number of classes, or the length of the embedding."""
        return self.num_embedded or self.num_classes

    def features(self, *, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """A module from labels (N,) to (N, num_features)."""
        return _LabelFeatures(self, rngs=rngs)

    def check(self, c: Any) -> None:
        """Refuses labels that are not integers or lie outside the classes.

        Args:
            c: labels, a NumPy or JAX array. Values of traced arrays are not looked at.

        Raises:
            ValueError: another type or shape, or a label outside 0 .. num_classes - 1.
        """
        _check_labels(c)
        if isinstance(c, Tracer):
            return
        c = np.asarray(c)
        outside = np.unique(c[(c < 0) | (c >= self.num_classes)])
        if outside.size:
            needed = int(outside.max()) + 1
            more = f"declare more classes, Labels({needed}), or " if needed > 0 else ""
            raise ValueError(
                f"c: expected labels 0 to {self.num_classes - 1}, got "
                f"{', '.join(map(str, outside[:10]))}; {more}mend the labels"
            )


def _check_labels(c: Any) -> None:
    if not jnp.issubdtype(c.dtype, jnp.integer) or c.ndim != 1:
        raise ValueError(
            f"c: expected one integer label per datum, got {c.dtype} of shape {c.shape}"
        )


class _LabelFeatures(nnx.Module):
    def __init__(self, labels: Labels, *, rngs: nnx.Rngs):
        self.num_classes = labels.num_classes
        num_in, num_out = labels.num_classes, labels.num_features
        embed = nnx.Linear(num_in, num_out, use_bias=False, rngs=rngs)
        self.embed = embed if labels.num_embedded else None

    def __call__(self, c: Array) -> Float[Array, "N n"]:
        """One-hot or embedded labels. A label outside the classes gives NaN: the loss shows it."""
        _check_labels(c)
        c = c.astype(jnp.int32)  # a type that holds the number of classes
        one_hot = jax.nn.one_hot(c, self.num_classes, dtype=jnp.float32)
        one_hot = jnp.where(((c >= 0) & (c < self.num_classes))[:, None], one_hot, jnp.nan)
        return one_hot if self.embed is None else self.embed(one_hot)


@dataclass(frozen=True)
class Values:
    """Any array of numbers per datum, flattened: ``Values((28, 14))`` for half an image.

    Attributes:
        shape: the shape of one datum's condition. c is (N, *shape).

    Raises:
        ValueError: a length is not positive.
    """

    shape: tuple[int, ...]

    def __post_init__(self):
        if any(n < 1 for n in self.shape):
            raise ValueError(f"shape: expected positive lengths, got {self.shape}")

    @property
    def num_features(self) -> int:
        """How many numbers one datum's condition has."""
        return math.prod(self.shape)

    def features(self, *, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """A module from conditions (N, *shape) to (N, num_features)."""
        return _ValueFeatures(self)

    def check(self, c: Any) -> None:
        """Raises ValueError for conditions of another shape."""
        if c.shape[1:] != self.shape:
            expected = ", ".join(map(str, ("N", *self.shape)))
            raise ValueError(f"c: expected shape ({expected}), got {c.shape}")


class _ValueFeatures(nnx.Module):
    def __init__(self, values: Values):
        self.values = values

    def __call__(self, c: Array) -> Float[Array, "N n"]:
        """The numbers of each datum, in one row."""
        self.values.check(c)
        return c.reshape(len(c), -1).astype(jnp.float32)
