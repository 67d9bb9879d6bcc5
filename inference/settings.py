"""The numbers of one run, checked when they are given."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Settings:
    """How long, how much at a time, how often, and what to do when it goes wrong.

    ``fit`` explains each. Here every default has been filled in.

    Raises:
        ValueError: a number is out of range; says which, what was expected and what came.
    """

    num_data: int
    batch_size: int
    num_epochs: int | None
    num_steps: int
    num_seeds: int
    seed: int
    average: float
    validate_every: int  # 0: never
    patience: int | None
    on_nan: str

    @classmethod
    def resolve(
        cls,
        num_data: int,
        batch_size: int | None,
        num_epochs: int | None,
        num_steps: int | None,
        validate_every: int | None,
        has_validation: bool,
        **others: Any,
    ) -> "Settings":
        """Fills in what ``fit`` was not told."""
        if (num_epochs is None) == (num_steps is None):
            raise ValueError(
                f"num_epochs, num_steps: expected exactly one of the two, got "
                f"{num_epochs} and {num_steps}"
            )
        for name in ("num_epochs", "num_steps"):
            _require_whole(name, locals()[name], 1)
        batch_size = num_data if batch_size is None else batch_size
        if num_steps is None:
            assert num_epochs is not None
            num_steps = -(-num_epochs * num_data // batch_size)
        if has_validation:
            _require_whole("validate_every", validate_every, 1)
            _require_whole("patience", others["patience"], 1)
            if validate_every is None:
                validate_every = min(num_steps, -(-num_data // batch_size))
        for name, value in (("validate_every", validate_every), ("patience", others["patience"])):
            if value is not None and not has_validation:
                raise ValueError(f"{name}: expected validation data with it, got {value!r} alone")
        return cls(
            num_data=num_data,
            batch_size=batch_size,
            num_epochs=num_epochs,
            num_steps=num_steps,
            validate_every=validate_every or 0,
            **others,
        )

    def __post_init__(self) -> None:
        _require_whole("num_seeds", self.num_seeds, 1)
        _require_whole("seed", self.seed, 0)
        if not 0 <= self.average < 1:
            raise ValueError(
                f"average: expected a fraction of the run, from 0 to below 1, got {self.average!r}"
            )
        if self.on_nan not in ("stop", "skip"):
            raise ValueError(f'on_nan: expected "stop" or "skip", got {self.on_nan!r}')

    @property
    def first_averaged(self) -> int:
        """The first step, counted from 0, whose parameters enter the average."""
        return round((1 - self.average) * self.num_steps)

    @property
    def num_validations(self) -> int:
        """How often the held-out ELBO is taken in a run to the end."""
        return self.num_steps // self.validate_every if self.validate_every else 0


def _require_whole(name: str, value: Any, least: int) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and not (whole and value >= least):
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")
