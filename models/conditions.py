"""What a conditional model is given: labels or any array, as features for its networks.

A condition is a frozen dataclass. ``features(rngs)`` makes the Flax module that turns conditions
c into (N, ``num_features``) numbers, and ``check(c)`` refuses conditions that it is not made for.
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
from jaxtyping import Array, Float, Integer, Num


@runtime_checkable
class Condition(Protocol):
    """What ``models.cvae`` asks of a condition."""

    @property
    def num_features(self) -> int:
        """The features of one datum's condition."""
        ...

    def features(self, *, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """A module from conditions to (N, num_features)."""
        ...

    def check(self, c: Any) -> None:
        """Raises ValueError where ``c`` holds what the condition was not declared for."""
        ...


@dataclass(frozen=True)
class Labels:
    """A label out of ``num_classes``: one-hot, or embedded.

    Attributes:
        num_classes: labels are 0 .. num_classes - 1.
        num_embedded: the length of the learned vector that stands for a label; None for one-hot.
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
        """From labels (N,) to (N, num_features)."""
        return _LabelFeatures(self, rngs=rngs)

    def check(self, c: Any) -> None:
        """Raises ValueError for labels that are no integers or outside the classes."""
        if not jnp.issubdtype(c.dtype, jnp.integer) or c.ndim != 1:
            raise ValueError(
                f"c: expected one integer label per datum, got {c.dtype} of shape {c.shape}"
            )
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


class _LabelFeatures(nnx.Module):
    def __init__(self, labels: Labels, *, rngs: nnx.Rngs):
        self.num_classes = labels.num_classes
        num_in, num_out = labels.num_classes, labels.num_features
        embed = nnx.Linear(num_in, num_out, use_bias=False, rngs=rngs)
        self.embed = embed if labels.num_embedded else None

    def __call__(self, c: Integer[Array, " N"]) -> Float[Array, "N n"]:
        """NaN where a label is outside the classes, which no loss survives unnoticed."""
        c = c.astype(jnp.int32)  # a type that holds the number of classes
        one_hot = jax.nn.one_hot(c, self.num_classes)
        one_hot = jnp.where(((c >= 0) & (c < self.num_classes))[:, None], one_hot, jnp.nan)
        return one_hot if self.embed is None else self.embed(one_hot)


@dataclass(frozen=True)
class Values:
    """Any array of numbers per datum, flattened: ``Values((28, 14))`` for half an image.

    Attributes:
        shape: of one datum's condition.
    """

    shape: tuple[int, ...]

    def __post_init__(self):
        if any(n < 1 for n in self.shape):
            raise ValueError(f"shape: expected positive lengths, got {self.shape}")

    @property
    def num_features(self) -> int:
        """The numbers in one datum's condition."""
        return math.prod(self.shape)

    def features(self, *, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """From conditions (N, *shape) to (N, num_features)."""
        return _ValueFeatures()

    def check(self, c: Any) -> None:
        """Raises ValueError for conditions of another shape."""
        if c.shape[1:] != self.shape:
            expected = ", ".join(map(str, ("N", *self.shape)))
            raise ValueError(f"c: expected shape ({expected}), got {c.shape}")


class _ValueFeatures(nnx.Module):
    def __call__(self, c: Num[Array, "N ..."]) -> Float[Array, "N n"]:
        return c.reshape(len(c), -1).astype(jnp.float32)
