"""The catalogue of guides: families made from a model in one call, and swapped in one line.

    guide = mean_field(model)
    guide = flow(model)

| family             | q(z | x, c)                                                             |
|--------------------|-------------------------------------------------------------------------|
| ``mean_field``     | prod_i Normal(z_i; loc_i(x, c), scale_i(x, c)^2)                        |
| ``low_rank``       | Normal(z; loc(x, c), F(x, c) F(x, c)^T + diag(scale(x, c)^2))           |
| ``full_covariance``| Normal(z; loc(x, c), L(x, c) L(x, c)^T), L lower triangular             |
| ``flow``           | the full covariance, carried through maps conditioned on (x, c)         |
| ``prior``          | p(z | c): nothing is learnt from x                                      |
| ``per_datum``      | prod_i Normal(z_i; loc_ni, scale_ni^2), numbers of datum n, no encoder  |
| ``semi_amortised`` | the mean field, after a few gradient steps of each datum's own ELBO     |

Each of the first four holds the one before, so that at their optima the ELBO rises from line to
line. A guide is a NumPyro program with the model's arguments, ``guide(x=x)`` or
``guide(c=c, x=x)``, and knows of the model what its attributes say:

| attribute                    | what it is                                                    |
|------------------------------|---------------------------------------------------------------|
| ``x_shape``, ``num_latents`` | of one datum's x, and the dimensions of z                     |
| ``z_shape``                  | of z, where it is not ``(num_latents,)``                      |
| ``condition``                | an object of ``models.conditions``, where there is one        |
| ``hidden``, ``channels``, ``activation``, ``dtype``, ``likelihood``                          |
|                              | where given, for the encoder: as in ``models.vae``            |

A family is a function of the model in ``GUIDES``; ``make`` takes one by its name.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import lax, random
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import constraints, transforms
from numpyro.infer.util import log_density
from scipy.linalg import hadamard

from models.networks import MLP, SCALE_FLOOR, Encoder, check_images, network, positive

# --- what the families share ----------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """Samples z given x, and c where the model has a condition, from ``posterior(x, c)``.

    Attributes:
        model: anything with the attributes listed above.
    """

    model: Any

    def check_data(self, c: Any = None, x: Any = None) -> None:
        """Raises ValueError where conditions are not what the model declares."""
        condition = getattr(self.model, "condition", None)
        if condition is not None and c is not None:
            condition.check(c)

    def posterior(self, x: Array, c: Array | None) -> dist.Distribution:
        """q(z | x, c), of batch shape (N,) and event shape (num_latents,)."""
        raise NotImplementedError

    def __call__(self, x: Any, c: Any = None) -> None:
        """Samples z given x, and c where the model has a condition."""
        check_images(x, self.model.x_shape)
        z_given_x = self.posterior(x, c)
        shape = getattr(self.model, "z_shape", z_given_x.event_shape)
        if shape != z_given_x.event_shape:
            z_given_x = _reshaped(z_given_x, shape)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", z_given_x)


@dataclass(frozen=True)
class Amortised(Guide):
    """One encoder, the site ``encoder``, gives the numbers of every datum's posterior.

    Attributes:
        hidden: units of the encoder's hidden layers, from x to z.
    """

    hidden: tuple[int, ...]

    def __post_init__(self):
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden: expected positive sizes, got {self.hidden}")

    def encode(self, x: Array, c: Array | None, *sizes: int) -> list[Array]:
        """The encoder's outputs, (N, size) each."""

        def build(rngs: nnx.Rngs) -> Encoder:
            return Encoder(self.model, self.hidden, sum(sizes), rngs=rngs)

        outputs = network("encoder", build)(x, c)
        return jnp.split(outputs, np.cumsum(sizes[:-1]), axis=-1)


def _hidden(model: Any, hidden: tuple[int, ...] | None) -> tuple[int, ...]:
    """The encoder's sizes: the decoder's in reverse unless given."""
    return tuple(getattr(model, "hidden", ())[::-1]) if hidden is None else hidden


def _reshaped(fn: dist.Distribution, shape: tuple[int, ...]) -> dist.Distribution:
    """The same density over arrays of another shape."""
    if isinstance(fn, dist.Independent) and isinstance(fn.base_dist, dist.Normal):
        loc, scale = (a.reshape(*fn.batch_shape, *shape) for a in (fn.mean, fn.base_dist.scale))
        return dist.Normal(loc, scale).to_event(len(shape))
    reshape = transforms.ReshapeTransform(shape, fn.event_shape)
    return dist.TransformedDistribution(fn, reshape)


# --- Gaussian families ----------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanField(Amortised):
    """q(z | x, c) = prod_i Normal(z_i; loc_i(x, c), scale_i(x, c)^2)."""

    def posterior(self, x: Array, c: Array | None) -> dist.Distribution:
        """Independent Normals."""
        z_loc, raw = self.encode(x, c, *[self.model.num_latents] * 2)
        return dist.Normal(z_loc, positive(raw)).to_event(1)


def mean_field(model: Any, hidden: tuple[int, ...] | None = None) -> MeanField:
    """q(z | x, c) = prod_i Normal(z_i; loc_i(x, c), scale_i(x, c)^2).

    Kingma & Welling 2014, equation 9.

    Args:
        model: anything with the attributes listed above.
        hidden: units of the encoder's hidden layers, from x to z; the decoder's in reverse
            unless given.
    """
    return MeanField(model, _hidden(model, hidden))


class CholeskyNormal(dist.TransformedDistribution):
    """Normal(loc, L L^T) as loc + L e.

    Unlike NumPyro's ``MultivariateNormal`` it remembers the e that it drew. To solve for e, where
    L comes from a network in float32, can lose every digit, and report any ELBO.
    """

    def __init__(self, loc: Array, scale_tril: Array):
        noise = dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1)
        super().__init__(noise, transforms.LowerCholeskyAffine(loc, scale_tril))

    @property
    def mean(self) -> Array:
        """The location."""
        return self.transforms[0].loc

    @property
    def covariance_matrix(self) -> Array:
        """L L^T."""
        scale_tril = self.transforms[0].scale_tril
        return scale_tril @ jnp.swapaxes(scale_tril, -1, -2)


@dataclass(frozen=True)
class FullCovariance(Amortised):
    """q(z | x, c) = Normal(z; loc, L L^T) with loc and L functions of (x, c)."""

    def posterior(self, x: Array, c: Array | None) -> dist.Distribution:
        """A multivariate Normal by its Cholesky factor."""
        return self.gaussian(*self.encode(x, c, *self.sizes))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of ``loc``, of L's diagonal and of what is below it."""
        size = self.model.num_latents
        return size, size, size * (size - 1) // 2

    def gaussian(self, z_loc: Array, raw: Array, below: Array) -> dist.Distribution:
        """L is diag(scale) (I + B), B strictly lower triangular."""
        size = self.model.num_latents
        rows, columns = jnp.tril_indices(size, -1)
        unit = jnp.broadcast_to(jnp.eye(size), (*z_loc.shape, size))
        unit = unit.at[..., rows, columns].set(below / size**0.5)
        return CholeskyNormal(z_loc, positive(raw)[..., None] * unit)


def full_covariance(model: Any, hidden: tuple[int, ...] | None = None) -> FullCovariance:
    """q(z | x, c) = Normal(z; loc(x, c), L(x, c) L(x, c)^T) (Kingma & Welling 2019, section 2.5.1).

    Args:
        model, hidden: as in ``mean_field``.
    """
    return FullCovariance(model, _hidden(model, hidden))


@dataclass(frozen=True)
class LowRank(Amortised):
    """q(z | x, c) = Normal(z; loc, F F^T + diag(scale^2)) with F of ``rank`` columns.

    Attributes:
        rank: the columns of F.
    """

    rank: int

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.rank <= self.model.num_latents:
            raise ValueError(
                f"rank: expected 1 to num_latents = {self.model.num_latents}, got {self.rank}"
            )

    def posterior(self, x: Array, c: Array | None) -> dist.Distribution:
        """A multivariate Normal by its factor and its diagonal."""
        size = self.model.num_latents
        z_loc, raw, factor = self.encode(x, c, size, size, size * self.rank)
        scale = positive(raw)
        factor = scale[..., None] * factor.reshape(-1, size, self.rank) / size**0.5
        return dist.LowRankMultivariateNormal(z_loc, factor, scale**2)


def low_rank(model: Any, hidden: tuple[int, ...] | None = None, rank: int = 2) -> LowRank:
    """q(z | x, c) = Normal(z; loc(x, c), F(x, c) F(x, c)^T + diag(scale(x, c)^2)).

    Rezende, Mohamed & Wierstra 2014, section 4.3, have it with precision and covariance exchanged.

    Args:
        model, hidden: as in ``mean_field``.
        rank: the columns of F; at most the dimensions of z count.
    """
    return LowRank(model, _hidden(model, hidden), min(rank, model.num_latents))


# --- flow -----------------------------------------------------------------------------------------


class Couplings(nnx.Module):
    """The networks of a coupling flow: each maps half of z, and the context, to the other half.

    The last layers start at zero, so that the flow starts as the identity.
    """

    def __init__(self, num_latents: int, num_context: int, hidden: int, num_layers: int, *, rngs):
        sizes = (num_latents + num_context, hidden, 2 * num_latents)
        self.layers = nnx.List(
            MLP(sizes, jnp.tanh, "float32", rngs=rngs) for _ in range(num_layers)
        )
        for mlp in self.layers:
            last = mlp.layers[-1]
            last.kernel[...] = jnp.zeros_like(last.kernel[...])


class Coupling(transforms.Transform):
    """y = x where ``kept``, and x exp(s) + t elsewhere, s and t of what is kept and the context.

    Dinh, Sohl-Dickstein & Bengio 2017, equation 4. The scale exp(s) stays within e^-2 and e^2.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, mlp: MLP, context: Array, kept: tuple[bool, ...]):
        self.mlp, self.context, self.kept = mlp, context, kept

    def _maps(self, x: Array) -> tuple[Array, Array]:
        """s and t, zero where x is kept."""
        kept = jnp.array(self.kept)
        context = jnp.broadcast_to(self.context, (*x.shape[:-1], self.context.shape[-1]))
        outputs = self.mlp(jnp.concatenate([jnp.where(kept, x, 0.0), context], axis=-1))
        s, t = jnp.split(outputs, 2, axis=-1)
        return jnp.where(kept, 0.0, 2 * jnp.tanh(s / 2)), jnp.where(kept, 0.0, t)

    def __call__(self, x: Array) -> Array:
        """From x to y, (..., dimensions)."""
        s, t = self._maps(x)
        return x * jnp.exp(s) + t

    def _inverse(self, y: Array) -> Array:
        s, t = self._maps(y)
        return (y - t) * jnp.exp(-s)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """The sum of s."""
        return self._maps(x)[0].sum(-1)

    def tree_flatten(self) -> Any:
        """The arrays, and what is no array."""
        return (self.mlp, self.context), (("mlp", "context"), {"kept": self.kept})


@dataclass(frozen=True)
class Flow(FullCovariance):
    """z = T(u; x, c) with u | x, c ~ Normal(loc, L L^T) and T a stack of ``Coupling``.

    Attributes:
        num_layers: maps in T; they keep the even and the odd dimensions in turn.
        num_hidden: units of each map's one hidden layer, and numbers of context from the encoder.
    """

    num_layers: int
    num_hidden: int

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_layers", "num_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def posterior(self, x: Array, c: Array | None) -> dist.Distribution:
        """The full covariance, transformed."""
        *gaussian, context = self.encode(x, c, *self.sizes, self.num_hidden)
        size = self.model.num_latents

        def build(rngs: nnx.Rngs) -> Couplings:
            return Couplings(size, self.num_hidden, self.num_hidden, self.num_layers, rngs=rngs)

        layers = network("flow", build).layers
        maps = [
            Coupling(mlp, context, tuple(dim % 2 == i % 2 for dim in range(size)))
            for i, mlp in enumerate(layers, start=1)
        ]
        return dist.TransformedDistribution(self.gaussian(*gaussian), maps)


def flow(
    model: Any,
    hidden: tuple[int, ...] | None = None,
    num_layers: int = 4,
    num_hidden: int = 32,
) -> Flow:
    """q(z | x, c): a Gaussian of full covariance carried through couplings conditioned on (x, c).

    Rezende & Mohamed 2015, equation 13, with the maps of Dinh, Sohl-Dickstein & Bengio 2017, which
    both sample and evaluate any z in one pass.

    Args:
        model, hidden: as in ``mean_field``.
        num_layers: couplings.
        num_hidden: units of each coupling's hidden layer.
    """
    return Flow(model, _hidden(model, hidden), num_layers, num_hidden)


# --- guides without an encoder --------------------------------------------------------------------


def _arguments(x: Array, c: Array | None) -> dict[str, Array]:
    return {"x": x} if c is None else {"c": c, "x": x}


def _is_observed(site: Any) -> bool:
    return site["type"] == "sample" and site["is_observed"]


@dataclass(frozen=True)
class Prior(Guide):
    """q(z | x, c) = p(z | c)."""

    def __call__(self, x: Any, c: Any = None) -> None:
        """Runs the model without what it observes; the parameters of p(z | c) are the model's."""
        handlers.block(self.model, hide_fn=_is_observed)(**_arguments(x, c))


def prior(model: Any) -> Prior:
    """q(z | x, c) = p(z | c): nothing is learnt from x.

    The ELBO is then E_p(z | c) [ log p(x | z, c) ], the objective of the Gaussian stochastic
    network of Sohn, Lee & Yan 2015, equation 7, and importance sampling plain Monte Carlo.

    Args:
        model: any program whose observed sites ``numpyro.handlers.block`` can hide.
    """
    return Prior(model)


@dataclass(frozen=True)
class PerDatum(Guide):
    """q(z | x, c) = prod_i Normal(z_i; loc_ni, scale_ni^2), the sites ``z_loc`` and ``z_scale``.

    Attributes:
        num_data: N, all of which are in every batch, in the same order.
    """

    num_data: int

    def posterior(self, x: Array, c: Array | None) -> dist.Distribution:
        """Independent Normals, those of each datum its own."""
        if len(x) != self.num_data:
            raise ValueError(
                f"x: expected all {self.num_data} data that the guide has numbers for, got "
                f"{len(x)}; train with batch_size={self.num_data}, and for other data fit another "
                f"per-datum guide to the model as it is"
            )
        shape = (self.num_data, self.model.num_latents)
        z_loc = numpyro.param("z_loc", lambda key: 0.1 * random.normal(key, shape))
        z_scale = numpyro.param(
            "z_scale", jnp.full(shape, 0.5), constraint=constraints.softplus_positive
        )
        return dist.Normal(z_loc, z_scale + SCALE_FLOOR).to_event(1)


def per_datum(model: Any, num_data: int) -> PerDatum:
    """q(z | x, c) = prod_i Normal(z_i; loc_ni, scale_ni^2): no encoder, for small data.

    What is lost to ``mean_field`` is amortisation (Cremer, Li & Duvenaud 2018, equation 5).

    Args:
        model: anything with the attributes listed above.
        num_data: N; every batch holds all of them.
    """
    return PerDatum(model, num_data)


# --- semi-amortised -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemiAmortised(MeanField):
    """``MeanField``, after ``num_steps`` gradient steps of each datum's own ELBO.

    Attributes:
        num_steps: steps.
        step_size: of the natural gradient of the Gaussian's mean and log-deviation; none moves a
            mean by more than one deviation.
        num_pairs: mirrored points at which each expectation is taken.
    """

    num_steps: int
    step_size: float
    num_pairs: int

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_steps", "num_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"step_size: expected above 0 and at most 1, got {self.step_size}")

    def posterior(self, x: Array, c: Array | None) -> dist.Distribution:
        """Independent Normals, refined; the gradient passes straight to the encoder."""
        z_loc, raw = self.encode(x, c, *[self.model.num_latents] * 2)
        start = z_loc, jnp.log(positive(raw))
        end = self.refine(lax.stop_gradient(start), self.density(x, c))
        z_loc, log_scale = (s + lax.stop_gradient(e - s) for s, e in zip(start, end, strict=True))
        return dist.Normal(z_loc, jnp.exp(log_scale)).to_event(1)

    def density(self, x: Array, c: Array | None) -> Callable[[Array], Array]:
        """From z to log p(x, z | c) summed over the data, at the model's parameters as they are."""
        data = _arguments(x, c)
        only_params = handlers.block(self.model, hide_fn=lambda site: site["type"] != "param")
        sites = handlers.trace(only_params).get_trace(**data)
        params = {name: lax.stop_gradient(site["value"]) for name, site in sites.items()}
        shape = getattr(self.model, "z_shape", (self.model.num_latents,))
        data = lax.stop_gradient(data)

        def log_joint(z: Array) -> Array:
            latents = {"z": z.reshape(len(z), *shape)}
            with handlers.block():
                return log_density(self.model, (), data, params | latents)[0]

        return log_joint

    def points(self, key: Array, num_data: int, size: int) -> Float[Array, "points N z"]:
        """Where z stands in deviations from its mean: mirrored rows of a Hadamard matrix.

        All rows together have the mean 0 and the covariance I, which makes the expectation of a
        quadratic exact; fewer, in random order and with random signs, do so on average.
        """
        order_key, sign_key = random.split(key)
        rows = hadamard(1 << (size - 1).bit_length())[:, :size].astype(np.float32)
        chosen = random.permutation(order_key, rows)[: self.num_pairs]
        signs = random.rademacher(sign_key, (num_data, size), jnp.float32)
        points = chosen[:, None] * signs
        return jnp.concatenate([points, -points])

    def refine(
        self, start: tuple[Array, Array], log_joint: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """Location and log-deviation after the steps."""
        noise = self.points(numpyro.prng_key(), *start[0].shape)

        def elbo(loc: Array, log_scale: Array) -> Array:
            z = loc + jnp.exp(log_scale) * noise
            return jax.vmap(log_joint)(z).mean() + log_scale.sum()

        def step(_: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            loc, log_scale = carry
            d_loc, d_log_scale = jax.grad(elbo, (0, 1))(loc, log_scale)
            scale = jnp.exp(log_scale)
            loc = loc + self.step_size * scale * jnp.clip(scale * d_loc, -1, 1)
            return loc, log_scale + self.step_size * jnp.clip(d_log_scale / 2, -1, 1)

        return lax.fori_loop(0, self.num_steps, step, start)


def semi_amortised(
    model: Any,
    hidden: tuple[int, ...] | None = None,
    num_steps: int = 5,
    step_size: float = 0.5,
    num_pairs: int = 2,
) -> SemiAmortised:
    """q(z | x, c): the mean field of an encoder, refined by gradient steps of each datum's ELBO.

    Kim et al. 2018, section 3, who differentiate through the steps; here, as in Krishnan, Liang &
    Hoffman 2018, they are taken as given, and the encoder gets the gradient at their end.

    Args:
        model, hidden: as in ``mean_field``; the model is evaluated inside the guide.
        num_steps, step_size, num_pairs: as in ``SemiAmortised``.
    """
    return SemiAmortised(model, _hidden(model, hidden), num_steps, step_size, num_pairs)


# --- by name --------------------------------------------------------------------------------------

GUIDES: dict[str, Callable[..., Guide]] = {
    "mean-field": mean_field,
    "full-covariance": full_covariance,
    "low-rank": low_rank,
    "flow": flow,
    "prior": prior,
    "per-datum": per_datum,
    "semi-amortised": semi_amortised,
}


def make(name: str, model: Any, **settings: Any) -> Guide:
    """The guide of a family by its name; settings that the family has not are left out.

    Args:
        name: one of ``GUIDES``.
        model: anything with the attributes listed above.
        settings: such as ``hidden`` and ``num_data``.

    Raises:
        ValueError: no such family.
    """
    if name not in GUIDES:
        raise ValueError(f"guide: expected one of {', '.join(GUIDES)}, got {name!r}")
    known = inspect.signature(GUIDES[name]).parameters
    return GUIDES[name](model, **{key: settings[key] for key in settings if key in known})
