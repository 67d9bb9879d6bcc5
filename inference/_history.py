"""The traces of a run, on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from inference._settings import Settings
from inference.fit import Fit


class History(NamedTuple):
    """The traces of a run, with NaN where nothing has been recorded."""

    num_steps: Int[np.ndarray, " seed"]
    elbo: Float[np.ndarray, "seed step"]
    validation_elbo: Float[np.ndarray, "seed evaluation"]
    seconds: Float[np.ndarray, ""]  # of training, before a resume too
    every: Int[np.ndarray, ""]  # steps between evaluations

    @classmethod
    def empty(cls, num_seeds: int, num_steps: int, every: int) -> "History":
        """Nothing yet, for a run of so many steps."""
        num_validations = num_steps // every if every else 0
        return cls(
            np.zeros(num_seeds, np.int32),
            np.full((num_seeds, num_steps), np.nan, np.float32),
            np.full((num_seeds, max(1, num_validations)), np.nan, np.float32),
            np.zeros((), np.float32),
            np.array(every, np.int32),
        )

    @classmethod
    def of(cls, fitted: Fit) -> "History":
        """The traces of a fit."""
        assert fitted.state is not None
        steps = int(fitted.state.step)
        empty = cls.empty(fitted.num_seeds, steps, fitted.config["validate_every"])
        held_out = empty.validation_elbo
        if fitted.validation_elbo is not None:
            held_out = np.array(fitted.validation_elbo, np.float32)
        return empty._replace(
            num_steps=np.array(fitted.info["num_steps"], np.int32),
            elbo=np.array(fitted.elbo[:, :steps], np.float32),
            validation_elbo=held_out,
            seconds=np.array(fitted.info["seconds"]["run"], np.float32),
        )

    def longer(self, settings: Settings) -> "History":
        """The same, with room for the run's steps and evaluations."""
        room = self.empty(settings.num_seeds, settings.num_steps, settings.validate_every)
        steps = min(self.elbo.shape[1], room.elbo.shape[1])
        room.elbo[:, :steps] = self.elbo[:, :steps]
        if int(self.every) == settings.validate_every:
            count = min(self.validation_elbo.shape[1], room.validation_elbo.shape[1])
            room.validation_elbo[:, :count] = self.validation_elbo[:, :count]
        return room._replace(num_steps=self.num_steps, seconds=self.seconds)


def mean_of_finite(values: Float[np.ndarray, "..."]) -> float:
    """The mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
