"""The linear-Gaussian rung at known parameters, with guides of known quality."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from inference import Fit
from models import linear_gaussian

PARAMS = {
    "W": np.array(
        [[1.8, 1.4, 1.2], [0.6, 1.3, 1.2], [-1.0, -0.3, 0.7], [0.9, 0.9, -0.3]], np.float32
    ),
    "b": np.array([1.0, -0.5, 0.0, 2.0], np.float32),
    "sigma": np.float32(0.8),
}
MODEL = linear_gaussian.Model((4,), 3)


@dataclass(frozen=True)
class Posterior:
    """q(z | x) with the exact posterior's mean.

    Attributes:
        factorises: whether q is the best mean field in place of the posterior.
        scale: a factor of its deviations. 1 is right.
        shift: what is added to its means.
    """

    factorises: bool = False
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, x: Any) -> None:
        loc, covariance = linear_gaussian.posterior(MODEL, PARAMS, {"x": x})
        loc += self.shift
        deviations = jnp.diag(linear_gaussian.precision(PARAMS)) ** -0.5
        with numpyro.plate("data", len(x)):
            if self.factorises:
                fn = dist.Normal(loc, self.scale * deviations).to_event(1)
            else:
                fn = dist.MultivariateNormal(loc, self.scale**2 * covariance)
            numpyro.sample("z", fn)


class Rung:
    """p(z) p(x | z), its exact numbers, and fits of it."""

    model, params = MODEL, PARAMS

    def data(self, num_data: int, seed: int) -> dict[str, np.ndarray]:
        """Data from the model."""
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(num_data, 3))
        x = z @ PARAMS["W"].T + PARAMS["b"] + PARAMS["sigma"] * rng.normal(size=(num_data, 4))
        return {"x": x.astype(np.float32)}

    def log_likelihood(self, data: Any) -> np.ndarray:
        """The exact log p(x) of every datum."""
        return np.asarray(linear_gaussian.log_likelihood(MODEL, PARAMS, data), np.float64)

    def fit(self, **guide: Any) -> Fit:
        """A fit whose guide is a ``Posterior`` of these settings."""
        return Fit.from_params(MODEL, Posterior(**guide), PARAMS, example=self.data(50, seed=0))


@pytest.fixture(scope="session")
def rung() -> Rung:
    """The rung."""
    return Rung()
