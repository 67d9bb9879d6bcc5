"""Guides for the models of images: made from a model in one call, and swapped in one line.

    guide = mean_field(model)

Each docstring states the factorisation. A guide is a NumPyro program with the model's arguments,
``guide(x)`` or ``guide(c, x)``.
"""

from dataclasses import dataclass
from typing import Any

import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from models.networks import Encoder, check_images, network


@dataclass(frozen=True)
class MeanField:
    """q(z | x, c) = prod_i Normal(z_i; z_loc_i(x, c), z_scale_i(x, c)^2).

    Attributes:
        model: a ``models.vae.Model`` or a ``models.cvae.Model``.
        hidden: units of the encoder's hidden layers, from x to z.
    """

    model: Any
    hidden: tuple[int, ...]

    def __post_init__(self):
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden: expected positive sizes, got {self.hidden}")

    def check_data(self, c: Any = None, x: Any = None) -> None:
        """Raises ValueError where conditions are not what the model declares."""
        if c is not None:
            self.model.condition.check(c)

    def __call__(self, x: Float[Array, "N ..."], c: Array | None = None) -> None:
        """Samples z given x, and c where the model has a condition."""
        check_images(x, self.model.x_shape)
        encoder = network("encoder", lambda rngs: Encoder(self.model, self.hidden, rngs=rngs))
        z_loc, z_scale = encoder(x, c)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))


def mean_field(model: Any, hidden: tuple[int, ...] | None = None) -> MeanField:
    """The guide that is independent in every dimension of z, by one encoder for all data.

    Args:
        model: a ``models.vae.Model`` or a ``models.cvae.Model``.
        hidden: units of the encoder's hidden layers, from x to z; the decoder's in reverse
            unless given.
    """
    return MeanField(model, model.hidden[::-1] if hidden is None else hidden)


@dataclass(frozen=True)
class PriorAsGuide:
    """q(z | x, c) = p(z | c): the model itself, whose observations are hidden.

    Attributes:
        model: any NumPyro program.
    """

    model: Any

    def __call__(self, **data: Any) -> None:
        """Samples the model's latent sites from its prior, and shares its parameters."""
        with numpyro.handlers.block(hide_fn=_is_observed_sample):
            self.model(**data)


def _is_observed_sample(msg: Any) -> bool:
    return msg["type"] == "sample" and msg["is_observed"]


def prior_as_guide(model: Any) -> PriorAsGuide:
    """The guide that has not seen x: log p - log q is then log p(x | z, c), with z from p(z | c).

    Its ELBO is the objective of Sohn, Lee & Yan's stochastic network (2015, section 4), and
    importance sampling from it their Monte Carlo estimate of log p(x | c).

    Args:
        model: any NumPyro program; without latent variables the guide is empty.
    """
    return PriorAsGuide(model)
