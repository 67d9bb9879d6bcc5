"""The conditional variational autoencoder of Sohn, Lee & Yan 2015, who write x -> y for our c -> x.

Everything of ``models/vae.py`` is given a condition c: a label, or any array.

    z | c     ~  Normal(0, I)  or  Normal(z_loc(c), z_scale(c)^2)       the prior       p(z | c)
    x | z, c  ~  likelihood(decoder(z, c))                              the likelihood  p(x | z, c)
    z | x, c  ~  Normal(z_loc(x, c), z_scale(x, c)^2)                   the guide       q(z | x, c)

The guide, ``guides.mean_field``, factorises over the dimensions of z. Training maximises the bound
(Sohn, Lee & Yan, equation 4)

    log p(x | c)  >=  E_q [ log p(x | z, c) ] - KL( q(z | x, c) || p(z | c) ).

We deviate from the paper, whose prior network and decoder see a baseline's guess as well.

| on paper        | in code                      | what it is                                      |
|-----------------|------------------------------|-------------------------------------------------|
| c (their x)     | ``c``, (N, ...)              | conditions, as ``models/conditions.py`` has them|
| x (their y)     | ``x``, (N, *x_shape)         | images, as the likelihood's ``prepare`` has them|
| z               | ``z``, (N, num_latents)      | latent vectors                                  |
| theta           | params ``decoder``, ``prior``| the weights of the decoder and prior network    |
| phi             | param ``encoder``            | the weights of the encoder                      |

    from models import cvae, guides
    from models.conditions import Labels

    model = cvae.Model(Labels(10), num_latents=20, hidden=(500,))
    guide = guides.mean_field(model)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from models import vae
from models.conditions import Condition, Labels
from models.likelihoods import Bernoulli, Likelihood
from models.networks import (
    Activation,
    Decoder,
    PriorNetwork,
    check_images,
    check_sizes,
    network,
)

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """p(x, z | c). Call it with ``x=None`` to generate one image for each condition.

    Attributes:
        condition: what c is, an object of ``models.conditions``.
        prior_hidden: units of the hidden layers of the prior network, () for an affine map of
            the condition's features; None for a standard normal prior.
        x_shape, num_latents, hidden, channels, activation, likelihood, dtype: as in ``models.vae``.

    Raises:
        ValueError: a size that is not positive, or another dtype.
    """

    condition: Condition = Labels(10)
    prior_hidden: tuple[int, ...] | None = None
    x_shape: tuple[int, ...] = (28, 28)
    num_latents: int = 20
    hidden: tuple[int, ...] = (500,)
    channels: tuple[int, ...] = ()
    activation: Activation = jax.nn.relu
    likelihood: Likelihood = Bernoulli()
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(self)

    def prepare(self, key: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Grey images as the likelihood has them: what ``fit`` takes as ``preprocess``."""
        return dict(batch, x=self.likelihood.prepare(key, batch["x"]))

    def check_data(self, c: Any, x: Any = None) -> None:
        """Raises ValueError where conditions are not what ``condition`` declares."""
        self.condition.check(c)

    def __call__(self, c: Array, x: Float[Array, "N ..."] | None = None) -> None:
        """Samples z and x given c, and observes x if it is given."""
        self.check_data(c)
        check_images(x, self.x_shape)
        decoder = network("decoder", lambda rngs: Decoder(self, rngs=rngs))
        if self.prior_hidden is None:
            z_loc, z_scale = 0.0, 1.0
        else:
            z_loc, z_scale = network("prior", lambda rngs: PriorNetwork(self, rngs=rngs))(c)
        with numpyro.plate("data", len(c)):
            prior = dist.Normal(z_loc, z_scale).expand([len(c), self.num_latents]).to_event(1)
            z = numpyro.sample("z", prior)
            x_given_z = self.likelihood(decoder(z, c)).to_event(len(self.x_shape))
            numpyro.sample("x", x_given_z, obs=x)


# The models of models/vae.py, given a label out of ten. hericks' example has both.
PRESETS = {name: Model(**vars(model)) for name, model in vae.PRESETS.items()}
