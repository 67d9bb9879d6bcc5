"""The variational autoencoder of Kingma & Welling 2014 and Rezende, Mohamed & Wierstra 2014.

An image x comes from a latent vector z, of a few dimensions, through a network, the decoder:

    z      ~  Normal(0, I)                              the prior       p(z)
    x | z  ~  likelihood(decoder(z))                    the likelihood  p(x | z)

and a second network, the encoder, says where z must have been. ``guides.mean_field``, the guide
of both papers, factorises over the dimensions of z:

    z_i | x  ~  Normal(z_loc_i(x), z_scale_i(x)^2)      the guide       q(z | x) = prod_i q(z_i | x)

Both are trained to maximise the ELBO (Kingma & Welling, equation 3),

    log p(x)  >=  E_q [ log p(x | z) ] - KL( q(z | x) || p(z) ),

reconstruction minus divergence. Networks are multilayer perceptrons, with convolutions between them
and the image where ``channels`` are given, and the likelihood is any of ``models/likelihoods.py``.

| on paper        | in code                      | what it is                                      |
|-----------------|------------------------------|-------------------------------------------------|
| x               | ``x``, (N, *x_shape)         | images, as the likelihood's ``prepare`` has them|
| z               | ``z``, (N, num_latents)      | latent vectors                                  |
| theta           | param ``decoder``            | the weights of the decoder                      |
| phi             | param ``encoder``            | the weights of the encoder                      |
| mu, sigma       | ``z_loc``, ``z_scale``       | the guide's mean and standard deviation         |

    from models import guides, vae

    model = vae.Model(num_latents=20, hidden=(500,))
    guide = guides.mean_field(model)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from models.likelihoods import Bernoulli, Gaussian, GaussianIdentity, Likelihood
from models.networks import Activation, Decoder, check_images, check_sizes, network

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """p(x, z). Call it with ``x=None`` to generate one image.

    Attributes:
        x_shape: of an image: (height, width) or (height, width, channels).
        num_latents: the dimensions of z.
        hidden: units of the decoder's hidden layers, from z to x.
        channels: of the convolutions that stand between the image and the dense layers, from x to
            z, each of which halves the image; () for none.
        activation: after each hidden layer, a function of arrays.
        likelihood: p(x | z), an object of ``models.likelihoods``.
        dtype: in which the networks compute, "float32" or "bfloat16"; parameters and the
            likelihood are float32.

    Raises:
        ValueError: a size that is not positive, or another dtype.
    """

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

    def __call__(self, x: Float[Array, "N ..."] | None = None) -> None:
        """Samples z and x, and observes x if it is given."""
        check_images(x, self.x_shape)
        decoder = network("decoder", lambda rngs: Decoder(self, rngs=rngs))
        with numpyro.plate("data", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([self.num_latents]).to_event(1))
            x_given_z = self.likelihood(decoder(z)).to_event(len(self.x_shape))
            numpyro.sample("x", x_given_z, obs=x)


# --- the models of the papers and of other people's examples --------------------------------------

PRESETS = {
    # Flax's example: github.com/google/flax, examples/vae
    "flax": Model(num_latents=20, hidden=(500,), activation=jax.nn.relu),
    # NumPyro's example, vae.py
    "numpyro": Model(num_latents=50, hidden=(400,), activation=jax.nn.softplus),
    # Burda, Grosse & Salakhutdinov 2016, section 5: one stochastic layer
    "burda": Model(num_latents=50, hidden=(200, 200), activation=jnp.tanh),
    # hericks' JAX example: six latents, sigmoids
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
