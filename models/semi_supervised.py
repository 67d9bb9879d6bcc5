"""A variational autoencoder that learns to classify, with labels for some of the images.

Kingma, Rezende, Mohamed & Welling 2014, model M2. A label y says what an image shows, and a latent
vector z says how it looks:

    y            ~  Categorical(1 / K, ..., 1 / K)                    the prior       p(y)
    z | c        ~  Normal(0, I)  or  Normal(z_loc(c), z_scale(c)^2)  the prior       p(z | c)
    x | y, z, c  ~  likelihood(decoder(z, y, c))                      the likelihood  p(x | y, z, c)

The guide looks at the image, and says which label it has and where z must have been:

    q(y, z | x, c)  =  q(y | x, c) q(z | x, y, c)      a classifier, and an encoder given the label

The label is latent for every image. An array y tells it where it is known, and holds -1 elsewhere.
A factor rules out all other labels there, and the guide is sure of it. So one program has, in the
same batch, the ELBO of

    log p(x, y | c)   for a labelled image       (equation 6)
    log p(x | c)      for another                (equation 7; the sum over y is exact)

The classifier learns from labels by a term of its own, ``inference.LabelTerm`` (equation 9).
Without a condition c is left out. The networks, the likelihood, the condition and the prior of z
are those of ``models/vae.py``.

We deviate in one point: the paper's encoder of z does not see the label in its variance
(equation 4). Here it does, as in Pyro's example.

| on paper        | in code                       | what it is                                    |
|-----------------|-------------------------------|-----------------------------------------------|
| x               | ``x``, (N, *x_shape)          | images, as ``prepare`` makes them             |
| y               | site ``y``, (N,)              | labels, 0 .. num_classes - 1                  |
| --              | ``y``, (N,)                   | the known labels, and -1                      |
| z               | ``z``, (N, num_latents)       | latent vectors                                |
| theta           | params ``decoder``, ``prior`` | the weights of the decoder and prior network  |
| phi             | ``classifier``, ``encoder``   | the weights of the guide                      |

    from inference import LabelTerm, fit, predict
    from models import semi_supervised

    model = semi_supervised.Model(num_latents=50, hidden=(500,))
    guide = semi_supervised.Guide(model)
    result = fit(model, guide, {"x": images, "y": labels}, preprocess=model.prepare,
                 objective=LabelTerm(TraceEnum_ELBO(), weight=50))
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Float, Int

from models import vae
from models.conditions import check_given
from models.densities import Folded
from models.labels import UNKNOWN, check_integers, partly_observed, told, told_of
from models.networks import MLP, Activation, Encoder, check_images, gates, network, positive

# --- networks -------------------------------------------------------------------------------------


class LabelledEncoder(nnx.Module):
    """From x and a label to the mean and the deviation of z.

    It is the network on x and the one-hot label side by side. The image's part of the first layer
    is computed once, whatever the number of labels that it is asked about.

    Args:
        trunk: from x to the numbers of the first hidden layer, before its activation.
        num_classes: the number of labels.
        sizes: the units of the hidden layers, and the dimensions of z.
        activation, dtype: as in ``models.networks.MLP``.
    """

    def __init__(
        self,
        trunk: Encoder,
        num_classes: int,
        sizes: tuple[int, ...],
        activation: Activation,
        dtype: str,
        *,
        rngs: nnx.Rngs,
    ):
        self.trunk, self.activation = trunk, activation
        self.num_classes = num_classes
        num_first = gates(activation) * sizes[0]
        self.label = nnx.Linear(num_classes, num_first, use_bias=False, rngs=rngs)
        self.mlp = MLP((*sizes[:-1], 2 * sizes[-1]), activation, dtype, rngs=rngs)

    def __call__(
        self, x: Array, y: Int[Array, "*labels"], c: Any = None
    ) -> tuple[Float[Array, "*batch z"], Float[Array, "*batch z"]]:
        """Mean and deviation, for y of a shape that broadcasts with (N,)."""
        one_hot = jax.nn.one_hot(y, self.num_classes)
        h = self.activation(self.trunk(x, c) + self.label(one_hot))
        loc, raw = jnp.split(self.mlp(h), 2, axis=-1)
        return loc, positive(raw)


# --- model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model(vae.Model):
    """The program p(x, y, z | c). Without ``x`` it generates an image for each label.

    Its fields are those of ``models.vae.Model``, and

    Attributes:
        num_classes: K, the number of labels.

    Raises:
        ValueError: as ``models.vae.Model``; fewer than 2 labels.
    """

    num_classes: int = 10

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {self.num_classes}")

    def check_data(self, x: Any = None, c: Any = None, y: Any = None) -> None:
        """Refuses images, conditions and labels that the model is not made for.

        Args:
            x: grey images before ``prepare``, or the likelihood's x. None for none.
            c: conditions, if the model has them.
            y: integers (N,), 0 .. num_classes - 1, or -1 where the label is unknown.

        Raises:
            ValueError: another shape, type or range.
        """
        super().check_data(x=x, c=c)
        if y is None:
            return
        check_integers("y", y)
        known = np.asarray(y)[np.asarray(y) != UNKNOWN]
        outside = np.unique(known[(known < 0) | (known >= self.num_classes)])
        if outside.size or np.ndim(y) != 1:
            raise ValueError(
                f"y: expected labels of shape (N,) from 0 to {self.num_classes - 1}, and -1 where "
                f"a label is unknown, got shape {np.shape(y)} with "
                f"{', '.join(map(str, outside[:10])) or 'labels in this range'}; mend the labels, "
                f"or set num_classes"
            )

    def encoder(self, num_outputs: int, *, hidden: Any = None, rngs: nnx.Rngs) -> Any:
        """The network from x, and c if there is a condition, to the numbers of a guide.

        It does not see y: a guide that draws y must not know it.

        Args:
            num_outputs: how many numbers it gives for one datum.
            hidden: units of the hidden layers, from x to z. Default: the decoder's, reversed.
            rngs: Flax's random numbers.
        """
        return Blind(super().encoder(num_outputs, hidden=hidden, rngs=rngs))

    @property
    def _num_codes(self) -> int:
        """z, and the one-hot label."""
        return self.num_latents + self.num_classes

    def _x_given(self, y: Array, z: Array, c: Any) -> dist.Distribution:
        """p(x | y, z, c). An objective that sums over y asks for all labels at once."""
        one_hot = jax.nn.one_hot(y, self.num_classes)
        shape = jnp.broadcast_shapes(one_hot.shape[:-1], z.shape[:-1])
        parts = [jnp.broadcast_to(a, (*shape, a.shape[-1])) for a in (z, one_hot)]
        inputs = jnp.concatenate(parts, axis=-1).reshape(math.prod(shape), -1)
        if c is not None:
            c = jnp.broadcast_to(jnp.asarray(c), (*shape, *jnp.shape(c)[1:]))
            c = c.reshape(math.prod(shape), *c.shape[len(shape) :])
        fn = self.likelihood(network("decoder", self._decoder)(inputs, c))
        fn = fn if len(shape) == 1 else Folded(fn, shape)
        return fn.to_event(len(self.x_shape))

    def __call__(self, x: Float[Any, "N ..."] | None = None, c: Any = None, y: Any = None) -> None:
        """Samples y, z and x, given c if there is a condition, and observes x if it is given.

        Args:
            x: images (N, *x_shape) as ``prepare`` makes them. None to generate.
            c: conditions (N, ...). None if the model has none.
            y: labels (N,), and -1 where a label is unknown. None for unknown everywhere.

        Raises:
            ValueError: arrays of another shape or type.
        """
        check_given(self.condition, c)
        check_images(x, self.x_shape)
        prior = self._prior(c)
        size = next((len(array) for array in (c, x, y) if array is not None), 1)
        with numpyro.plate("data", size):
            label = partly_observed("y", dist.Categorical(logits=jnp.zeros(self.num_classes)), y)
            z = numpyro.sample("z", prior)
            numpyro.sample("x", self._x_given(label, z, c), obs=x)


class Blind(nnx.Module):
    """An encoder that is given y and does not look at it."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, x: Any, c: Any = None, y: Any = None) -> Float[Array, "N k"]:
        """(N, num_outputs)."""
        return self.encoder(x, c)


# --- guide ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """The program q(y | x, c) q(z | x, y, c), with a network for each.

    ``guides.structured(model)`` has one network for both.

    Attributes:
        model: a ``Model``.
        hidden: units of the hidden layers of both networks, from x on. Default: the decoder's,
            reversed.
    """

    model: Model
    hidden: tuple[int, ...] | None = None

    def _classifier(self, rngs: nnx.Rngs) -> Any:
        return self.model.encoder(self.model.num_classes, hidden=self.hidden, rngs=rngs)

    def _encoder(self, rngs: nnx.Rngs) -> LabelledEncoder:
        model = self.model
        hidden = model.hidden[::-1] if self.hidden is None else self.hidden
        num_first = gates(model.activation) * hidden[0]
        trunk = vae.Model.encoder(model, num_first, hidden=(), rngs=rngs)
        sizes = (*hidden, model.num_latents)
        rest = model.activation, model.dtype
        return LabelledEncoder(trunk, model.num_classes, sizes, *rest, rngs=rngs)

    def __call__(self, x: Float[Any, "N ..."], c: Any = None, y: Any = None) -> None:
        """Draws y and z.

        Args:
            x: images (N, *x_shape) as ``prepare`` makes them.
            c: conditions (N, ...). None if the model has none.
            y: labels (N,), and -1 where a label is unknown. None for unknown everywhere.
        """
        classifier = network("classifier", self._classifier)
        encoder = network("encoder", self._encoder)
        with numpyro.plate("data", len(x)):
            fn, infer = dist.Categorical(logits=classifier(x, c)), {"enumerate": "parallel"}
            if y is not None:
                y = check_integers("y", y)
                infer |= told_of(fn, y)
                fn = told(fn, y)
            label = numpyro.sample("y", fn, infer=infer)
            z_loc, z_scale = encoder(jnp.asarray(x), label, c)
            numpyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))


# --- baseline -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """The program p(y | x, c): a network alone, for labelled images.

    Attributes:
        model: its sizes are those of this model's guide.
        hidden: as in ``Guide``.
    """

    model: Model
    hidden: tuple[int, ...] | None = None

    def prepare(self, key: Array, batch: Any) -> dict[str, Any]:
        """Makes x from grey images, as the model does."""
        return self.model.prepare(key, batch)

    def __call__(self, x: Any, c: Any = None, y: Any = None) -> None:
        """Observes the labels.

        Args:
            x, c: as in ``Guide``.
            y: labels (N,), all known. None to draw them.
        """
        classifier = network("classifier", Guide(self.model, self.hidden)._classifier)
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Categorical(logits=classifier(x, c)), obs=y)
