"""VAEs with several stochastic layers, with and without a condition.

Rezende, Mohamed & Wierstra 2014 and Burda, Grosse & Salakhutdinov 2016 (section 5) stack L layers
of latents. Each is drawn given the one above, and the image given the lowest:

    z_L | c           ~  prior(c)                                           p(z_L | c)
    z_l | z_{l+1}, c  ~  Normal(loc_l(z_{l+1}, c), scale_l(z_{l+1}, c)^2)   p(z_l | z_{l+1}, c)
    x | z_1, c        ~  likelihood(decoder(z_1, c))                        p(x | z_1, c)

With ``skip`` the decoder sees all layers, z_1 to z_L (Tomczak & Welling 2018, section 4, with two
layers). Their decoder has a network for each layer, and joins what they give. Ours is one network.
It takes all layers side by side.

Every family of ``models.guides`` makes a guide in one call. Two guides are for this model alone:

- ``BottomUp``, q(z_1 | x, c) prod_l q(z_{l+1} | z_l, c): Burda et al. 2016, equation 9.
- ``TopDown``, q(z_L | x, c) prod_l q(z_l | z_{l+1}, x, c): Sonderby et al. 2016. It shares the
  networks of p(z_l | z_{l+1}, c) with the model: both programs have a site of the same name, and
  NumPyro gives it one value. It adds what x tells of z_l to what z_{l+1} tells, as two Normals are
  multiplied: their precisions add up.

The guide of Tomczak & Welling draws z_2 from x, and z_1 from both: ``guides.structured(model)``.

We deviate from Sonderby et al. in one point: no batch normalisation, which would make a datum's
ELBO depend on its batch.

| on paper | in code                             | what it is                                  |
|----------|-------------------------------------|---------------------------------------------|
| z_1, z_L | ``z1``, ``z2``, ..., (N, latents)   | latent vectors, the lowest first            |
| theta    | params ``decoder``, ``prior``       | the weights of the decoder and of the prior |
|          | ``z1_from_above``, ...              | the weights of p(z_l | z_{l+1}, c)          |
| phi      | ``encoder``, ``z2_from_below``, ... | the weights of the guide                    |

    from models import guides, hierarchical
    from models.hierarchical import Layer

    model = hierarchical.Model(num_latents=100, above=(Layer(50, (100, 100)),))
    guide = guides.structured(model)        # or hierarchical.TopDown(model), BottomUp(model)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Array, Float
from numpyro import handlers

from models import vae
from models.networks import MLP, Decoder, check_sizes, gates, network, positive
from models.priors import STANDARD

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A stochastic layer above the lowest one.

    Attributes:
        num_latents: the dimensions of its z.
        hidden: units of the hidden layers between its z and the z below, from above.

    Raises:
        ValueError: a size is not positive.
    """

    num_latents: int
    hidden: tuple[int, ...] = ()

    def __post_init__(self):
        check_sizes((1,), (), "float32", num_latents=self.num_latents, hidden=self.hidden)


@dataclass(frozen=True)
class Model(vae.Model):
    """The program p(x, z_1, ..., z_L | c). Without ``x`` it generates.

    It has all fields of ``models.vae.Model``, and two more. Here ``num_latents`` counts z_1.
    ``hidden`` lies between z_1 and x. ``prior`` is the prior of z_L.

    Attributes:
        above: the layers above z_1, the lowest first. () for one stochastic layer.
        skip: whether the decoder sees all latents, or z_1 alone.

    Raises:
        ValueError, TypeError: as ``models.vae.Model``.
    """

    above: tuple[Layer, ...] = (Layer(20, (100,)),)
    skip: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """The dimensions of z_1, ..., z_L."""
        return (self.num_latents, *(layer.num_latents for layer in self.above))

    @property
    def names(self) -> tuple[str, ...]:
        """The sites z1, ..., zL."""
        return tuple(f"z{i}" for i in range(1, len(self.above) + 2))

    @property
    def _num_codes(self) -> int:
        return sum(self.sizes) if self.skip else self.num_latents

    def _prior(self, c: Any) -> dist.Distribution:
        """p(z_L | c), of batch shape () or (N,)."""
        return self.prior(self._setting(self.names[-1], self.sizes[-1]), c)

    def given_above(self, i: int, z: Float[Array, "N n"], c: Any) -> tuple[Array, Array]:
        """Location and scale of p(z_i | z_{i+1}, c), each (N, dimensions).

        The network is the site ``zi_from_above``. A guide that calls this shares it with the model.

        Args:
            i: the layer, from 1.
            z: the value of z_{i+1}.
            c: conditions, or None.
        """
        layer, size = self.above[i - 1], self.sizes[i - 1]
        return self._normal(f"z{i}_from_above", layer.num_latents, layer.hidden, size, z, c)

    def _normal(
        self, site: str, num_inputs: int, hidden: tuple[int, ...], size: int, z: Any, c: Any
    ) -> tuple[Array, Array]:
        """Location and scale, (N, size) each, by a network from z and c: the site of that name."""

        def build(rngs: nnx.Rngs) -> Decoder:
            return Decoder(
                num_inputs,
                hidden,
                (size,),
                num_outputs=2,
                condition=self.condition,
                activation=self.activation,
                dtype=self.dtype,
                rngs=rngs,
            )

        outputs = network(site, build)(z, c)
        return outputs[:, 0], positive(outputs[:, 1])

    def _draw(self, prior: dist.Distribution, c: Any) -> Array:
        """Draws z_L, ..., z_1, and returns what the decoder sees of them."""
        z = [numpyro.sample(self.names[-1], prior)]
        for i in range(len(self.above), 0, -1):
            fn = dist.Normal(*self.given_above(i, z[0], c)).to_event(1)
            z.insert(0, numpyro.sample(f"z{i}", fn))
        return jnp.concatenate(z, axis=-1) if self.skip else z[0]


def stacked(model: vae.Model, sizes: tuple[int, ...], skip: bool = True) -> Model:
    """A VAE with more stochastic layers above its own.

    The networks between two layers have the hidden layers of the decoder.

    Args:
        model: the VAE. Its z is the lowest layer.
        sizes: the dimensions of the layers above, the lowest first.
        skip: whether the decoder sees all latents, or the lowest alone.
    """
    fields = {name: getattr(model, name) for name in vae.Model.__dataclass_fields__}
    return Model(**fields, above=tuple(Layer(n, model.hidden) for n in sizes), skip=skip)


# --- guides ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """What the two guides share.

    Attributes:
        model: a ``Model``.

    Raises:
        TypeError: another model.
    """

    model: Model

    def __post_init__(self):
        if not isinstance(self.model, Model):
            raise TypeError(
                f"model: expected a models.hierarchical.Model, whose layers this guide knows, got "
                f"{type(self.model).__name__}; take a family of models.guides"
            )

    def mlp(self, site: str, num_inputs: int, hidden: tuple[int, ...], num_outputs: int) -> MLP:
        """A network with the model's activation, as the site of that name."""
        sizes, model = (num_inputs, *hidden, num_outputs), self.model
        return network(site, lambda rngs: MLP(sizes, model.activation, model.dtype, rngs=rngs))


@dataclass(frozen=True)
class BottomUp(Guide):
    """The program q(z_1 | x, c) prod_l q(z_{l+1} | z_l, c) (Burda et al. 2016, equation 9)."""

    def __call__(self, x: Float[Any, "N ..."], c: Any = None) -> None:
        """Draws z_1, then z_2 and so on.

        Args:
            x: images (N, *x_shape) as ``prepare`` makes them.
            c: conditions (N, ...). None if the model has none.
        """
        model = self.model
        encoder = network("encoder", lambda rngs: model.encoder(2 * model.sizes[0], rngs=rngs))
        loc, raw = jnp.split(encoder(x, c), 2, axis=-1)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z1", dist.Normal(loc, positive(raw)).to_event(1))
            for i, layer in enumerate(model.above, start=2):
                loc, scale = self.given_below(i, layer, z, c)
                z = numpyro.sample(f"z{i}", dist.Normal(loc, scale).to_event(1))

    def given_below(self, i: int, layer: Layer, z: Array, c: Any) -> tuple[Array, Array]:
        """Location and scale of q(z_i | z_{i-1}, c), each (N, dimensions)."""
        size, hidden = self.model.sizes[i - 2], layer.hidden[::-1]
        return self.model._normal(f"z{i}_from_below", size, hidden, layer.num_latents, z, c)


@dataclass(frozen=True)
class TopDown(Guide):
    """The program q(z_L | x, c) prod_l q(z_l | z_{l+1}, x, c) (Sonderby et al. 2016).

    A deterministic pass goes from x up. It gives each layer what x tells of it, a Normal with
    location m_l and scale s_l (equations 14 to 16). Then z_L is drawn from its Normal, and z_l from
    the product of its Normal and p(z_l | z_{l+1}, c), made a density (equations 17 to 19):

        1 / scale^2  =  1 / s_l^2 + 1 / scale_l(z_{l+1}, c)^2
        loc          =  scale^2 (m_l / s_l^2 + loc_l(z_{l+1}, c) / scale_l(z_{l+1}, c)^2)
    """

    def __call__(self, x: Float[Any, "N ..."], c: Any = None) -> None:
        """Draws z_L, then the layers below.

        Args:
            x: images (N, *x_shape) as ``prepare`` makes them.
            c: conditions (N, ...). None if the model has none.
        """
        model, told = self.model, self.told(x, c)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample(model.names[-1], dist.Normal(*told[-1]).to_event(1))
            for i in range(len(model.above), 0, -1):
                fn = product(told[i - 1], model.given_above(i, z, c))
                z = numpyro.sample(f"z{i}", fn.to_event(1))

    def told(self, x: Any, c: Any) -> list[tuple[Array, Array]]:
        """Of each layer, the location and the scale that x tells, (N, dimensions) each."""
        model, width = self.model, gates(self.model.activation)
        hidden, told = model.hidden[::-1], []
        num_first = width * hidden[-1] if hidden else 2 * model.num_latents
        trunk = network(
            "encoder", lambda rngs: model.encoder(num_first, hidden=hidden[:-1], rngs=rngs)
        )
        h = trunk(x, c)
        h = model.activation(h) if hidden else h
        for i, size in enumerate(model.sizes, start=1):
            rises = model.above[i - 2].hidden[::-1] if i > 1 else ()
            if rises:
                up = self.mlp(f"rise{i}", h.shape[-1], rises[:-1], width * rises[-1])
                h = model.activation(up(h))
            loc, raw = jnp.split(self.mlp(f"z{i}_told", h.shape[-1], (), 2 * size)(h), 2, axis=-1)
            told.append((loc, positive(raw)))
        return told


def product(a: tuple[Array, Array], b: tuple[Array, Array]) -> dist.Normal:
    """The product of two Normals, made a density: the precisions add up.

    Args:
        a, b: location and scale of each.
    """
    (loc_a, scale_a), (loc_b, scale_b) = a, b
    share = scale_b**2 / (scale_a**2 + scale_b**2)  # of a in the location
    return dist.Normal(share * loc_a + (1 - share) * loc_b, scale_a * jnp.sqrt(share))


GUIDES: dict[str, Callable[[Model], Guide]] = {"bottom-up": BottomUp, "top-down": TopDown}


# --- closed forms ---------------------------------------------------------------------------------
#
# Without hidden layers, and with scales that depend on nothing, all is Gaussian.


@dataclass(frozen=True)
class Joint:
    """The Normal of all latents and x, z_1 first and x last.

    Attributes:
        loc: the mean, (total,).
        covariance: (total, total).
        sizes: the dimensions of z_1, ..., z_L.
    """

    loc: np.ndarray
    covariance: np.ndarray
    sizes: tuple[int, ...]

    def log_likelihood(self, x: Any) -> np.ndarray:
        """log p(x) in nats, (N,)."""
        start = sum(self.sizes)
        covariance = self.covariance[start:, start:]
        residuals = np.asarray(x, np.float64).reshape(len(x), -1) - self.loc[start:]
        _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
        squares = np.einsum("ni,ij,nj->n", residuals, np.linalg.inv(covariance), residuals)
        return -0.5 * (log_det + squares)

    @property
    def posterior_covariance(self) -> np.ndarray:
        """Of all latents given x. It is the same for every x."""
        start = sum(self.sizes)
        zz, zx = self.covariance[:start, :start], self.covariance[:start, start:]
        return zz - zx @ np.linalg.solve(self.covariance[start:, start:], zx.T)

    def gap(self, order: tuple[int, ...] | None = None) -> float:
        """The least loss of a guide that is a chain of mean fields, in nats per datum.

        It is the sum over the layers of 1/2 (sum_i log Lambda_ii - log det Lambda), Lambda the
        precision of a layer given x and the layers before it. A full covariance loses nothing.

        Args:
            order: which layer the guide draws first, which next, from 1. It is (2, 1) for
                ``guides.structured``. It is (1, 2) for ``BottomUp``, if the decoder sees z_1 alone.
                None for one mean field over all.
        """
        ends = np.cumsum(self.sizes)
        parts = [np.arange(end - n, end) for end, n in zip(ends, self.sizes, strict=True)]
        steps = [np.concatenate(parts)] if order is None else [parts[i - 1] for i in order]
        total, covariance, before = 0.0, self.posterior_covariance, np.array([], int)
        for layer in steps:
            own, across = covariance[np.ix_(layer, layer)], covariance[np.ix_(layer, before)]
            root = covariance[np.ix_(before, before)]
            precision = np.linalg.inv(own - across @ np.linalg.solve(root, across.T))
            total += np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1]
            before = np.concatenate([before, layer])
        return 0.5 * total


def joint(model: Model, params: Mapping[str, Any]) -> Joint:
    """The exact Normal of a model without hidden layers.

    Args:
        model: without a condition, with the prior ``StandardNormal`` and the likelihood ``Normal``.
        params: its parameters, of one seed.

    Raises:
        ValueError: a network is not affine, or a scale depends on a latent; a condition; another
            prior.
    """
    if model.condition is not None or model.prior != STANDARD:
        raise ValueError(
            f"model: expected no condition and the prior {STANDARD}, got the condition "
            f"{model.condition} and the prior {model.prior}; a closed form is for these alone"
        )
    program = handlers.block(handlers.substitute(_affine_maps, data=dict(params)))
    maps = program(model)
    loc, covariance = np.zeros(model.sizes[-1]), np.eye(model.sizes[-1])
    for offset, matrix, scale in maps:  # from z_L down to x
        cut = slice(0, matrix.shape[1])
        across = matrix @ covariance[cut]
        own = across[:, cut] @ matrix.T + np.diag(scale**2)
        loc = np.concatenate([offset + matrix @ loc[cut], loc])
        covariance = np.block([[own, across], [across.T, covariance]])
    num_x = len(maps[-1][0])
    order = np.concatenate([np.arange(num_x, len(loc)), np.arange(num_x)])
    return Joint(loc[order], covariance[np.ix_(order, order)], model.sizes)


def _affine_maps(model: Model) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Offset, matrix and scale of each conditional, from z_{L-1} given z_L down to x given z."""

    def x_given(z: Array) -> tuple[Array, Array]:
        fn = model.likelihood(network("decoder", model._decoder)(z, None))
        return fn.mean.reshape(len(z), -1), jnp.sqrt(fn.variance).reshape(len(z), -1)

    def maps_of(i: int) -> Callable[[Array], tuple[Array, Array]]:
        return lambda z: model.given_above(i, z, None)

    each = [(maps_of(i), model.sizes[i]) for i in range(len(model.above), 0, -1)]
    found = []
    for fn, size in [*each, (x_given, model._num_codes)]:
        at = lambda z, fn=fn: tuple(a[0] for a in fn(z[None]))  # noqa: E731
        slopes = jax.jacfwd(at)
        look = jax.jit(lambda z, at=at, slopes=slopes: (at(z), slopes(z), slopes(z + 1.0)[0]))
        (offset, scale), (matrix, slope), elsewhere = jax.device_get(look(jnp.zeros(size)))
        if np.abs(slope).max() > 0 or np.abs(elsewhere - matrix).max() > 1e-6:
            raise ValueError(
                "params: expected affine networks and scales that depend on no latent, got others; "
                "leave the hidden layers out, and set the weights of the scales to zero"
            )
        found.append(tuple(np.asarray(a, np.float64) for a in (offset, matrix, scale)))
    return found


# --- the models of the papers ---------------------------------------------------------------------

PRESETS = {
    # Burda, Grosse & Salakhutdinov 2016, section 5: two stochastic layers
    "burda-two-layers": Model(
        num_latents=100, hidden=(200, 200), activation=jnp.tanh, above=(Layer(50, (100, 100)),)
    ),
    # Tomczak & Welling 2018, section 6: gated layers, and a decoder that sees both latents
    "tomczak-two-layers": stacked(vae.PRESETS["tomczak"], (40,)),
}
