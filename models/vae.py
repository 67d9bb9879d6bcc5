"""The variational autoencoder, with and without a condition.

Kingma & Welling 2014 and Rezende, Mohamed & Wierstra 2014 have it without a condition. Sohn, Lee &
Yan 2015 give every network a condition c: a label, or any array. They write x -> y for our c -> x.
An image x comes from a latent vector z of a few dimensions through a network, the decoder:

    z | c     ~  prior(c), Normal(0, I) by default     the prior       p(z | c)
    x | z, c  ~  likelihood(decoder(z, c))             the likelihood  p(x | z, c)

A second network, the encoder, looks at the image and says where z must have been. The guide of all
three papers is ``guides.mean_field``. It factorises over the dimensions of z:

    z_i | x, c  ~  Normal(z_loc_i(x, c), z_scale_i(x, c)^2)     q(z | x, c) = prod_i q(z_i | x, c)

Without a condition c is left out everywhere. Both networks are
trained together. They maximise the ELBO (Kingma & Welling, equation 3; Sohn et al., equation 4),

    log p(x | c)  >=  E_q [ log p(x | z, c) ] - KL( q(z | x, c) || p(z | c) ).

The first term is the reconstruction, the second the divergence. Networks are multilayer
perceptrons. With ``channels``, convolutions stand between them and the image. The prior is any of
``models/priors.py``, the likelihood any of ``models/likelihoods.py``, the condition any of
``models/conditions.py``. An x may also be a vector, ``x_shape=(D,)``: a row of a table.

We deviate from Sohn, Lee & Yan in one point: their prior network and decoder also see a baseline's
guess of x. ``models/quadrants.py`` has that guess.

| on paper        | in code                       | what it is                                     |
|-----------------|-------------------------------|------------------------------------------------|
| x (Sohn: y)     | ``x``, (N, *x_shape)          | images, as ``prepare`` makes them              |
| c (Sohn: x)     | ``c``, (N, ...)               | conditions                                     |
| z               | ``z``, (N, num_latents)       | latent vectors                                 |
| theta           | params ``decoder``, ``prior`` | the weights of the decoder and of the prior    |
| phi             | param ``encoder``             | the weights of the encoder                     |
| mu, sigma       | ``z_loc``, ``z_scale``        | mean and standard deviation of a Gaussian      |

    from models import guides, vae
    from models.conditions import Labels

    model = vae.Model(num_latents=20, hidden=(500,))
    model = vae.Model(Labels(10), num_latents=20, hidden=(500,))    # given a label
    model = vae.Model(prior=MixtureOfNormals(10))                   # of models.priors
    guide = guides.mean_field(model)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Float

from models.conditions import Condition, check_given
from models.likelihoods import Bernoulli, Gaussian, GaussianIdentity, Likelihood
from models.networks import (
    Activation,
    Decoder,
    Encoder,
    check_images,
    check_shape,
    check_sizes,
    network,
    softplus,
)
from models.priors import STANDARD, Prior, Setting, check_prior

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The program p(x, z | c). Without ``x`` it generates one image, or one for each condition.

    Attributes:
        condition: the kind of c, an object of ``models.conditions``. None for no condition.
        prior: p(z | c), an object of ``models.priors``.
        x_shape: the shape of one x: (height, width) or (height, width, channels) for images, (D,)
            for vectors.
        num_latents: the dimensions of z.
        hidden: units of the decoder's hidden layers, from z to x.
        channels: channels of the convolutions between the image and the dense layers, from x to z.
            Each halves the image. () for none, as vectors need it.
        activation: the function of arrays after each hidden layer, or a gate: ``jax.nn.glu``.
        likelihood: p(x | z, c), an object of ``models.likelihoods``.
        dtype: the type that the networks compute in, "float32" or "bfloat16". Parameters and the
            likelihood are float32.

    Raises:
        ValueError: a size is not positive, the convolutions cannot halve the image, or another
            dtype.
        TypeError: the prior is no object of ``models.priors``.
    """

    condition: Condition | None = None
    prior: Prior = STANDARD
    x_shape: tuple[int, ...] = (28, 28)
    num_latents: int = 20
    hidden: tuple[int, ...] = (500,)
    channels: tuple[int, ...] = ()
    activation: Activation = jax.nn.relu
    likelihood: Likelihood = Bernoulli()
    dtype: str = "float32"

    def __post_init__(self):
        check_sizes(
            self.x_shape,
            self.channels,
            self.dtype,
            num_latents=self.num_latents,
            hidden=self.hidden,
        )
        check_prior(self.prior)

    def prepare(self, key: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Makes x from grey images. ``fit`` takes this function as ``preprocess``.

        Args:
            key: a random key.
            batch: ``x``, (N, *x_shape), grey images. Other arrays stay as they are.
        """
        return dict(batch, x=self.likelihood.prepare(key, batch["x"]))

    def check_data(self, x: Any = None, c: Any = None) -> None:
        """Refuses images and conditions that the model is not made for.

        Args:
            x: grey images before ``prepare``, or the likelihood's x. None for none.
            c: conditions, if the model has them.

        Raises:
            ValueError: another shape, type or range.
        """
        check_given(self.condition, c)
        if self.condition is not None:
            self.condition.check(c)
        if x is not None:
            check_shape(x, self.x_shape)
            self.likelihood.check(x)

    def encoder(
        self, num_outputs: int, *, hidden: Sequence[int] | None = None, rngs: nnx.Rngs
    ) -> Encoder:
        """The network from x, and c if there is a condition, to the numbers of a guide.

        Args:
            num_outputs: how many numbers it gives for one datum.
            hidden: units of the hidden layers, from x to z. Default: the decoder's, reversed.
            rngs: Flax's random numbers.
        """
        return Encoder(
            self.x_shape,
            self.hidden[::-1] if hidden is None else hidden,
            num_outputs,
            view=self.likelihood.view,
            channels=self.channels,
            condition=self.condition,
            activation=self.activation,
            dtype=self.dtype,
            rngs=rngs,
        )

    @property
    def _num_codes(self) -> int:
        """How many numbers the decoder takes beside the condition."""
        return self.num_latents

    def _decoder(self, rngs: nnx.Rngs) -> Decoder:
        return Decoder(
            self._num_codes,
            self.hidden,
            self.x_shape,
            num_outputs=self.likelihood.num_outputs,
            channels=self.channels,
            condition=self.condition,
            activation=self.activation,
            dtype=self.dtype,
            rngs=rngs,
        )

    def _prior(self, c: Any) -> dist.Distribution:
        """p(z | c), of batch shape () or (N,)."""
        return self.prior(self._setting("z", self.num_latents), c)

    def _setting(self, site: str, num_latents: int) -> Setting:
        """What the prior of a latent site is told."""
        return Setting(
            site,
            num_latents,
            self.x_shape,
            self.condition,
            self.likelihood,
            self.activation,
            self.dtype,
        )

    def _draw(self, prior: dist.Distribution, c: Any) -> Array:
        """Draws z, and returns what the decoder sees of it, (N, numbers)."""
        return numpyro.sample("z", prior)

    def __call__(self, x: Float[Any, "N ..."] | None = None, c: Any = None) -> None:
        """Samples z and x, given c if there is a condition, and observes x if it is given.

        Args:
            x: images (N, *x_shape) as ``prepare`` makes them. None to generate.
            c: conditions (N, ...). None if the model has none.

        Raises:
            ValueError: arrays of another shape or type.
        """
        check_given(self.condition, c)
        check_images(x, self.x_shape)
        decoder = network("decoder", self._decoder)
        prior = self._prior(c)
        size = next((len(array) for array in (c, x) if array is not None), 1)
        with numpyro.plate("data", size):
            z = self._draw(prior, c)
            x_given_z = self.likelihood(decoder(z, c)).to_event(len(self.x_shape))
            numpyro.sample("x", x_given_z, obs=x)


# --- the models of the papers and of other people's examples --------------------------------------
#
# For one with a condition: dataclasses.replace(PRESETS["hericks"], condition=Labels(10)).

PRESETS = {
    # Flax's example: github.com/google/flax, examples/vae
    "flax": Model(num_latents=20, hidden=(500,), activation=jax.nn.relu),
    # NumPyro's example, vae.py
    "numpyro": Model(num_latents=50, hidden=(400,), activation=softplus),
    # Burda, Grosse & Salakhutdinov 2016, section 5: one stochastic layer
    "burda": Model(num_latents=50, hidden=(200, 200), activation=jnp.tanh),
    # Tomczak & Welling 2018, section 6: gated layers
    "tomczak": Model(num_latents=40, hidden=(300, 300), activation=jax.nn.glu),
    # hericks' JAX example, with and without labels: six latents, sigmoids
    "hericks": Model(num_latents=6, hidden=(128,), activation=jax.nn.sigmoid),
    # Kingma & Welling 2014, section 5: 500 units for MNIST, 200 for the Gaussian of Frey Face
    "kingma": Model(num_latents=20, hidden=(500,), activation=jnp.tanh),
    "kingma-gaussian": Model(
        num_latents=20, hidden=(200,), activation=jnp.tanh, likelihood=Gaussian()
    ),
    # A convolutional one for colour images on [-1, 1]: 32 latents, identity covariance
    "svhn": Model(
        x_shape=(32, 32, 3),
        num_latents=32,
        hidden=(256,),
        channels=(32, 64, 128),
        likelihood=GaussianIdentity(low=-1.0),
    ),
}
