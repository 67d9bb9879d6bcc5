"""The numbers of one run, checked when they are given."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from numpyro.optim import _NumPyroOptim

from inference.objectives import Traits

# What people write who know another library, and what to write here.
_ELSEWHERE = {
    "learning_rate": "give it to the optimiser, optimizer=optax.adam(1e-2)",
    "lr": "give it to the optimiser, optimizer=optax.adam(1e-2)",
    "init_params": "write init=, which takes parameters or a fit",
    "epochs": "write num_epochs=",
    "steps": "write num_steps=",
    "loss": "write objective=",
    "num_particles": "give it to the objective, objective=Trace_ELBO(num_particles=10)",
    "rng_key": "write seed=",
    "progress_bar": "write progress=",
}


@dataclass(frozen=True)
class Settings:
    """How long, how much at a time, how often, and what to do when it goes wrong.

    ``fit`` explains each. Here every default has been filled in.

    Attributes:
        first_step: steps that were taken before this call, by the fit that it goes on with.
        num_steps, num_epochs: of the whole training, those steps included.
        validate_every: 0 for never.
        missing: "mask" or None, checked by ``inference._missing``.

    Raises:
        ValueError: a number is out of range.
    """

    num_data: int
    batch_size: int
    num_epochs: int | None
    num_steps: int
    first_step: int
    num_seeds: int
    seed: int
    average: float
    validate_every: int
    patience: int | None
    on_nan: str
    missing: str | None = None

    @classmethod
    def resolve(
        cls,
        num_data: int,
        batch_size: int | None,
        num_epochs: int | None,
        num_steps: int | None,
        validate_every: int | None,
        has_validation: bool,
        first_step: int,
        first_epoch: int | None,
        **others: Any,
    ) -> "Settings":
        """Fills in what ``fit`` was not told.

        Args:
            first_epoch: whole epochs that were taken before this call, or None if it begins within
                one.
        """
        if (num_epochs is None) == (num_steps is None):
            raise ValueError(
                f"num_epochs, num_steps: expected exactly one of the two, got {num_epochs} and "
                f"{num_steps}; say how long to train, for example num_epochs=20"
            )
        require_whole("num_epochs", num_epochs, 1)
        require_whole("num_steps", num_steps, 1)
        require_whole("validate_every", validate_every, 1)
        require_whole("patience", others["patience"], 1)
        for name, value in (("validate_every", validate_every), ("patience", others["patience"])):
            if value is not None and not has_validation:
                raise ValueError(
                    f"{name}: expected held-out data with it, got {value!r} alone; give "
                    f"validation=, for example validation=0.1"
                )
        batch_size = num_data if batch_size is None else _check_batch_size(batch_size, num_data)
        if num_epochs is not None:
            goes_on = first_epoch is not None
            total = -(-(num_epochs + (first_epoch or 0)) * num_data // batch_size)
            num_steps = total - first_step if goes_on else total
            num_epochs = num_epochs + first_epoch if goes_on else num_epochs
        assert num_steps is not None
        if has_validation and validate_every is None:
            validate_every = min(num_steps, -(-num_data // batch_size))
        return cls(
            num_data=num_data,
            batch_size=batch_size,
            num_epochs=num_epochs,
            num_steps=first_step + num_steps,
            first_step=first_step,
            validate_every=validate_every or 0,
            **others,
        )

    def __post_init__(self) -> None:
        require_whole("num_seeds", self.num_seeds, 1)
        require_whole("seed", self.seed, 0)
        if isinstance(self.average, bool) or not 0 <= self.average < 1:
            raise ValueError(
                f"average: expected a fraction of the run, from 0 to below 1, got {self.average!r}"
            )
        if self.on_nan not in ("stop", "skip"):
            raise ValueError(f'on_nan: expected "stop" or "skip", got {self.on_nan!r}')

    @property
    def first_averaged(self) -> int:
        """The first step, counted from 0, that enters the average."""
        return self.first_step + round((1 - self.average) * (self.num_steps - self.first_step))

    @property
    def num_validations(self) -> int:
        """How often the held-out ELBO is taken in a run to the end."""
        return self.num_steps // self.validate_every if self.validate_every else 0

    @property
    def is_whole(self) -> bool:
        """Whether every batch is the whole data set."""
        return self.batch_size == self.num_data


def require_whole(name: str, value: Any, least: int) -> None:
    """Raises ValueError where a setting is given that is not a whole number from ``least``."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and not (whole and value >= least):
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")


def _check_batch_size(batch_size: Any, num_data: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise TypeError(
            f"batch_size: expected an integer or None, got {batch_size!r} "
            f"({type(batch_size).__name__})"
        )
    if not 1 <= batch_size <= num_data:
        raise ValueError(
            f"batch_size: expected 1 to {num_data}, the number of data, got {batch_size}; "
            f"None takes all data at every step"
        )
    return int(batch_size)


def check_keywords(unknown: dict[str, Any]) -> None:
    """Raises TypeError for keywords that ``fit`` does not have, and says what to write."""
    for name, value in unknown.items():
        remedy = _ELSEWHERE.get(name, "see help(inference.fit)")
        raise TypeError(f"{name}: expected a setting of fit, got {name}={value!r}; {remedy}")


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError for anything but an Optax transformation."""
    if isinstance(optimizer, optax.GradientTransformation):
        return
    kind = type(optimizer)
    name = f"{kind.__module__}.{kind.__name__}" if not callable(optimizer) else repr(optimizer)
    written = kind.__name__.lower() if isinstance(optimizer, _NumPyroOptim) else "adam"
    raise TypeError(
        f"optimizer: expected an Optax gradient transformation, got {name}; write "
        f"optax.{written}(1e-2)"
    )


def check_length(traits: Traits, settings: Settings) -> None:
    """Raises ValueError for a warm-up that outlasts the training."""
    if traits.num_steps is not None and traits.num_steps > settings.num_steps:
        raise ValueError(
            f"objective: expected a warm-up within the training's {settings.num_steps} steps, got "
            f"one of {traits.num_steps}; the ELBO itself would never be trained"
        )


def check_mesh(mesh: Mesh | None, settings: Settings) -> None:
    """Raises ValueError for devices over which seeds or batches cannot be split."""
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"mesh: expected the devices of all {jax.process_count()} processes, got None; "
                f'write mesh=jax.make_mesh((jax.device_count(),), ("data",))'
            )
        return
    if not mesh.axis_names or not set(mesh.axis_names) <= {"data", "seed"}:
        raise ValueError(
            f'mesh: expected the axes "data", "seed" or both, got {mesh.axis_names}; name them in '
            f'jax.make_mesh((2, 4), ("seed", "data"))'
        )
    for axis, name, number in (
        ("data", "batch_size", settings.batch_size),
        ("seed", "num_seeds", settings.num_seeds),
    ):
        size = mesh.shape.get(axis, 1)
        if number % size:
            raise ValueError(
                f"{name}: expected a multiple of {size}, the devices of the mesh's axis "
                f'"{axis}", got {number}; give a multiple, or a mesh with '
                f"{math.gcd(number, size)} devices on that axis"
            )
    with_devices = {device.process_index for device in mesh.devices.flat}
    if len(with_devices) < jax.process_count():
        raise ValueError(
            f"mesh: expected devices of all {jax.process_count()} processes, got those of "
            f"{sorted(with_devices)}; make it of jax.devices()"
        )
