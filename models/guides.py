"""The catalogue of guides: families made from a model in one call, and swapped in one line.

    guide = mean_field(model)
    guide = flow(model)

| family             | q(z | x, c)                                                               |
|--------------------|---------------------------------------------------------------------------|
| ``mean_field``     | prod_i Normal(z_i; loc_i(x, c), scale_i(x, c)^2)                          |
| ``low_rank``       | Normal(z; loc(x, c), F(x, c) F(x, c)^T + diag(scale(x, c)^2))             |
| ``full_covariance``| Normal(z; loc(x, c), L(x, c) L(x, c)^T), L lower triangular               |
| ``flow``           | the full covariance, carried through maps that depend on (x, c)           |
| ``prior``          | p(z | c): the data change nothing                                         |
| ``per_datum``      | prod_i Normal(z_i; loc_ni, scale_ni^2), numbers for each datum n          |
| ``semi_amortised`` | the mean field, after a few gradient steps on each datum's own ELBO       |

The first four families are ordered: each contains the one above it. So the best ELBO cannot fall
from one line to the next.

A guide is a NumPyro program with the model's arguments, called by keyword: ``guide(x=x)`` or
``guide(c=c, x=x)``. A family finds the shape of z by an abstract run of the model.

One encoder gives the numbers of every datum's posterior. Its parameters are the site ``encoder``.
By default it is the model's own: a model offers it as ``encoder(num_outputs, rngs=rngs)``. Any
other callable of this form may take its place. It returns a Flax module from the data, by keyword,
to (N, num_outputs):

    guide = mean_field(model, encoder=functools.partial(model.encoder, hidden=(100,)))

The families serve models with one real latent site ``z`` for each datum, of any event shape.

A family is a function of the model in ``GUIDES``. ``make`` takes one by its name.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
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

from inference.sites import HasEncoder, LatentSite, latent_sites
from models.networks import MLP, SCALE_FLOOR, network, positive

MakeEncoder = Callable[..., nnx.Module]  # (num_outputs, *, rngs) -> a module from the data
Data = Mapping[str, Any]  # the model's arguments by name: arrays of shape (N, ...)

# --- what the families share ----------------------------------------------------------------------


def _is_real(site: LatentSite) -> bool:
    support = site.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real


def _shape_of_z(model: Callable[..., Any], data: Data) -> tuple[int, ...]:
    """The event shape of the model's one latent site, found by an abstract run.

    Raises:
        ValueError: the model has other latent sites than one real ``z`` for each datum.
    """
    shapes = tuple((n, tuple(a.shape), jnp.dtype(a.dtype)) for n, a in sorted(data.items()))
    try:
        return _known_shape_of_z(model, shapes)
    except TypeError:  # a model without a hash
        return _known_shape_of_z.__wrapped__(model, shapes)


@functools.lru_cache(maxsize=128)
def _known_shape_of_z(model: Callable[..., Any], shapes: tuple[Any, ...]) -> tuple[int, ...]:
    """``_shape_of_z``, once for each model and shapes of data."""
    data = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
    sites = latent_sites(model, data)
    z = sites.get("z")
    if len(sites) != 1 or z is None or not z.is_local or not _is_real(z):
        got = ", ".join(
            f"{name} ({site.support}, {'one per datum' if site.is_local else 'global'})"
            for name, site in sites.items()
        )
        raise ValueError(
            f"model: expected one latent site, a real z for each datum, got {got or 'none'}; write "
            f"a guide for this model, since the families of models.guides do not serve it"
        )
    return z.shape


@dataclass(frozen=True)
class Guide:
    """A program that samples z given the data from ``posterior``.

    Attributes:
        model: a program with one real latent site ``z`` for each datum.
    """

    model: Callable[..., Any]

    def posterior(self, data: Data, num_latents: int) -> dist.Distribution:
        """The distribution q(z | x, c), of batch shape (N,) and event shape (num_latents,).

        Args:
            data: the model's arguments by name.
            num_latents: how many numbers z has for one datum.
        """
        raise NotImplementedError

    def __call__(self, **data: Any) -> None:
        """Samples z given the data.

        Args:
            data: the model's arguments by name.

        Raises:
            ValueError: the model has other latent sites than one real ``z`` for each datum.
        """
        shape = _shape_of_z(self.model, data)
        q = self.posterior(data, math.prod(shape))
        if q.event_shape != shape:
            q = _reshaped(q, shape)
        with numpyro.plate("data", _length(data)):
            numpyro.sample("z", q)


def _length(data: Data) -> int:
    return len(next(iter(data.values())))


def _reshaped(fn: dist.Distribution, shape: tuple[int, ...]) -> dist.Distribution:
    """The same density over arrays of another event shape."""
    if isinstance(fn, dist.Independent) and isinstance(fn.base_dist, dist.Normal):
        loc, scale = (a.reshape(*fn.batch_shape, *shape) for a in (fn.mean, fn.base_dist.scale))
        return dist.Normal(loc, scale).to_event(len(shape))
    reshape = transforms.ReshapeTransform(shape, fn.event_shape)
    return dist.TransformedDistribution(fn, reshape)


@dataclass(frozen=True)
class Amortised(Guide):
    """A guide with one encoder, the site ``encoder``, for the numbers of every datum's posterior.

    Attributes:
        encoder: a callable ``(num_outputs, *, rngs)``. It returns a Flax module from the data, by
            keyword, to (N, num_outputs). None for the model's own.

    Raises:
        TypeError: no encoder is given, and the model has none.
    """

    encoder: MakeEncoder | None = None

    def __post_init__(self):
        if self.encoder is None and not isinstance(self.model, HasEncoder):
            name = getattr(self.model, "__qualname__", type(self.model).__name__)
            raise TypeError(
                f"model: expected one with a method encoder(num_outputs, rngs=...), got {name} "
                f"without it; add the method, or pass encoder=..., a callable of that form, to the "
                f"guide"
            )

    def encode(self, data: Data, *sizes: int) -> list[Array]:
        """The encoder's outputs, one array (N, size) for each of ``sizes``.

        Raises:
            ValueError: the encoder's output has another shape.
        """
        model: Any = self.model
        make = model.encoder if self.encoder is None else self.encoder
        outputs = network("encoder", lambda rngs: make(sum(sizes), rngs=rngs))(**data)
        expected = (_length(data), sum(sizes))
        if outputs.shape != expected:
            raise ValueError(
                f"encoder: expected outputs of shape {expected}, got {outputs.shape}; return "
                f"num_outputs numbers for each datum"
            )
        return jnp.split(outputs, np.cumsum(sizes[:-1]), axis=-1)


# --- Gaussian families ----------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanField(Amortised):
    """The family q(z | x, c) = prod_i Normal(z_i; loc_i(x, c), scale_i(x, c)^2)."""

    def posterior(self, data: Data, num_latents: int) -> dist.Distribution:
        """Independent Normals."""
        z_loc, raw = self.encode(data, num_latents, num_latents)
        return dist.Normal(z_loc, positive(raw)).to_event(1)


def mean_field(model: Callable[..., Any], encoder: MakeEncoder | None = None) -> MeanField:
    """Independent Normals: q(z | x, c) = prod_i Normal(z_i; loc_i(x, c), scale_i(x, c)^2).

    Kingma & Welling 2014, equation 9.

    Args:
        model: a program with one real latent site ``z`` for each datum.
        encoder: a callable ``(num_outputs, *, rngs)``. It returns a Flax module from the data, by
            keyword, to (N, num_outputs). Default: the model's own.

    Raises:
        TypeError: no encoder is given, and the model has none.
    """
    return MeanField(model, encoder)


class CholeskyNormal(dist.TransformedDistribution):
    """The distribution Normal(loc, L L^T) as loc + L e with e ~ Normal(0, I).

    It remembers the e of a draw, and NumPyro's ``MultivariateNormal`` does not. L comes from a
    network in float32. To solve for e can lose every digit, and then the ELBO is any number.

    Args:
        loc: (..., K).
        scale_tril: L, (..., K, K), lower triangular.
    """

    def __init__(self, loc: Array, scale_tril: Array):
        noise = dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1)
        super().__init__(noise, transforms.LowerCholeskyAffine(loc, scale_tril))

    @property
    def mean(self) -> Array:
        """The location, (..., K)."""
        return self.transforms[0].loc

    @property
    def covariance_matrix(self) -> Array:
        """L L^T, (..., K, K)."""
        scale_tril = self.transforms[0].scale_tril
        return scale_tril @ jnp.swapaxes(scale_tril, -1, -2)


@dataclass(frozen=True)
class FullCovariance(Amortised):
    """The family q(z | x, c) = Normal(z; loc, L L^T). loc and L are functions of (x, c)."""

    def posterior(self, data: Data, num_latents: int) -> dist.Distribution:
        """A multivariate Normal by its Cholesky factor."""
        return self.gaussian(*self.encode(data, *self.sizes(num_latents)))

    def sizes(self, num_latents: int) -> tuple[int, int, int]:
        """How many numbers ``gaussian`` takes: for loc, for L's diagonal and for the rest of L."""
        return num_latents, num_latents, num_latents * (num_latents - 1) // 2

    def gaussian(self, z_loc: Array, raw: Array, below: Array) -> dist.Distribution:
        """Normal(z_loc, L L^T) with L = diag(scale) (I + B), B strictly lower triangular.

        Args:
            z_loc: (N, num_latents).
            raw: the scales before ``positive``, (N, num_latents).
            below: the entries of B, row by row.
        """
        size = z_loc.shape[-1]
        rows, columns = jnp.tril_indices(size, -1)
        unit = jnp.broadcast_to(jnp.eye(size, dtype=z_loc.dtype), (*z_loc.shape, size))
        unit = unit.at[..., rows, columns].set(below / size**0.5)
        return CholeskyNormal(z_loc, positive(raw)[..., None] * unit)


def full_covariance(
    model: Callable[..., Any], encoder: MakeEncoder | None = None
) -> FullCovariance:
    """One Normal of any covariance: q(z | x, c) = Normal(z; loc(x, c), L(x, c) L(x, c)^T).

    Kingma & Welling 2019, section 2.5.1.

    Args:
        model, encoder: as in ``mean_field``.

    Raises:
        TypeError: no encoder is given, and the model has none.
    """
    return FullCovariance(model, encoder)


def _check_positive(guide: Any, *names: str) -> None:
    for name in names:
        if getattr(guide, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(guide, name)}")


@dataclass(frozen=True)
class LowRank(Amortised):
    """The family q(z | x, c) = Normal(z; loc, F F^T + diag(scale^2)).

    Attributes:
        rank: the columns of F. With fewer dimensions of z, F has one column for each.
    """

    rank: int = 2

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "rank")

    def posterior(self, data: Data, num_latents: int) -> dist.Distribution:
        """A multivariate Normal by its factor and its diagonal."""
        rank = min(self.rank, num_latents)
        z_loc, raw, factor = self.encode(data, num_latents, num_latents, num_latents * rank)
        scale = positive(raw)
        factor = scale[..., None] * factor.reshape(-1, num_latents, rank) / num_latents**0.5
        return dist.LowRankMultivariateNormal(z_loc, factor, scale**2)


def low_rank(
    model: Callable[..., Any], encoder: MakeEncoder | None = None, rank: int = 2
) -> LowRank:
    """A few common factors: q(z | x, c) = Normal(z; loc, F F^T + diag(scale^2)), all of (x, c).

    Rezende, Mohamed & Wierstra 2014, section 4.3, use this form for the precision. Here it is the
    covariance.

    Args:
        model, encoder: as in ``mean_field``.
        rank: the columns of F. With fewer dimensions of z, F has one column for each.

    Raises:
        TypeError: no encoder is given, and the model has none.
        ValueError: ``rank`` is not positive.
    """
    return LowRank(model, encoder, rank)


# --- flow -----------------------------------------------------------------------------------------


class Couplings(nnx.Module):
    """The networks of a coupling flow. Each maps half of z, and the context, to the other half.

    The last layers start at zero, so the flow starts as the identity.

    Args:
        num_latents: the dimensions of z.
        num_context: numbers of context for one datum.
        hidden: units of each network's one hidden layer.
        num_layers: how many networks there are.
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
    """A map that keeps some dimensions of x and moves the others: y = x exp(s) + t.

    s and t are functions of the kept dimensions and the context. The scale exp(s) stays between
    e^-2 and e^2. Dinh, Sohl-Dickstein & Bengio 2017, equation 4.

    Args:
        mlp: the network for s and t.
        context: numbers for each datum, (N, num_context).
        kept: for each dimension, whether it stays.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, mlp: MLP, context: Array, kept: tuple[bool, ...]):
        self.mlp, self.context, self.kept = mlp, context, kept

    def _maps(self, x: Array) -> tuple[Array, Array]:
        """s and t. They are zero in the kept dimensions."""
        kept = jnp.array(self.kept)
        context = jnp.broadcast_to(self.context, (*x.shape[:-1], self.context.shape[-1]))
        outputs = self.mlp(jnp.concatenate([jnp.where(kept, x, 0.0), context], axis=-1))
        s, t = jnp.split(outputs, 2, axis=-1)
        return jnp.where(kept, 0.0, 2 * jnp.tanh(s / 2)), jnp.where(kept, 0.0, t)

    def __call__(self, x: Array) -> Array:
        """y from x, (..., dimensions)."""
        s, t = self._maps(x)
        return x * jnp.exp(s) + t

    def _inverse(self, y: Array) -> Array:
        s, t = self._maps(y)
        return (y - t) * jnp.exp(-s)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """The sum of s over dimensions."""
        return self._maps(x)[0].sum(-1)

    def tree_flatten(self) -> Any:
        """The arrays, and the rest."""
        return (self.mlp, self.context), (("mlp", "context"), {"kept": self.kept})


@dataclass(frozen=True)
class Flow(FullCovariance):
    """The family z = T(u; x, c) with u | x, c ~ Normal(loc, L L^T) and T a stack of ``Coupling``.

    Attributes:
        num_layers: maps in T. They keep the even and the odd dimensions in turn.
        num_hidden: units of each map's one hidden layer, and numbers of context from the encoder.
    """

    num_layers: int = 4
    num_hidden: int = 32

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "num_layers", "num_hidden")

    def posterior(self, data: Data, num_latents: int) -> dist.Distribution:
        """The full covariance, transformed."""
        *gaussian, context = self.encode(data, *self.sizes(num_latents), self.num_hidden)

        def build(rngs: nnx.Rngs) -> Couplings:
            sizes = num_latents, self.num_hidden, self.num_hidden, self.num_layers
            return Couplings(*sizes, rngs=rngs)

        layers = network("flow", build).layers
        maps = [
            Coupling(mlp, context, tuple(dim % 2 == i % 2 for dim in range(num_latents)))
            for i, mlp in enumerate(layers, start=1)
        ]
        return dist.TransformedDistribution(self.gaussian(*gaussian), maps)


def flow(
    model: Callable[..., Any],
    encoder: MakeEncoder | None = None,
    num_layers: int = 4,
    num_hidden: int = 32,
) -> Flow:
    """A normalising flow: a Gaussian of full covariance, carried through couplings.

    Rezende & Mohamed 2015, equation 13, with the maps of Dinh, Sohl-Dickstein & Bengio 2017. One
    pass samples, and one pass gives the density of any z. The maps depend on (x, c).

    Args:
        model, encoder: as in ``mean_field``.
        num_layers: how many couplings there are.
        num_hidden: units of each coupling's hidden layer, and numbers of context from the encoder.

    Raises:
        TypeError: no encoder is given, and the model has none.
        ValueError: a number is not positive.
    """
    return Flow(model, encoder, num_layers, num_hidden)


# --- guides without an encoder --------------------------------------------------------------------


def _is_observed(site: Any) -> bool:
    return site["type"] == "sample" and site["is_observed"]


@dataclass(frozen=True)
class Prior(Guide):
    """The guide q(z | x, c) = p(z | c)."""

    def __call__(self, **data: Any) -> None:
        """Runs the model without its observations. The parameters of p(z | c) are the model's."""
        handlers.block(self.model, hide_fn=_is_observed)(**data)


def prior(model: Callable[..., Any]) -> Prior:
    """The prior as a guide: q(z | x, c) = p(z | c). The data change nothing.

    The ELBO is then E_p(z | c) [ log p(x | z, c) ], the objective of the Gaussian stochastic
    network (Sohn, Lee & Yan 2015, equation 7). Importance sampling is then plain Monte Carlo.

    Args:
        model: any program with latent sites of any kind, or with none.
    """
    return Prior(model)


@dataclass(frozen=True)
class PerDatum(Guide):
    """The family q(z | x, c) = prod_i Normal(z_i; loc_ni, scale_ni^2) for datum n.

    The numbers are the sites ``z_loc`` and ``z_scale``, each (num_data, num_latents).

    Attributes:
        num_data: N. Every batch holds all data, in the same order.
    """

    num_data: int

    def posterior(self, data: Data, num_latents: int) -> dist.Distribution:
        """Independent Normals, with parameters for each datum."""
        if _length(data) != self.num_data:
            raise ValueError(
                f"data: expected all {self.num_data} data that the guide has numbers for, got "
                f"{_length(data)}; train with batch_size={self.num_data}, and for other data fit "
                f"another per-datum guide to the held model"
            )
        shape = (self.num_data, num_latents)
        z_loc = numpyro.param("z_loc", lambda key: 0.1 * random.normal(key, shape, jnp.float32))
        z_scale = numpyro.param(
            "z_scale",
            jnp.full(shape, 0.5, jnp.float32),
            constraint=constraints.softplus_positive,
        )
        return dist.Normal(z_loc, z_scale + SCALE_FLOOR).to_event(1)


def per_datum(model: Callable[..., Any], num_data: int) -> PerDatum:
    """Numbers for each datum, for small data: q(z | x, c) = prod_i Normal(z_i; loc_ni, scale_ni^2).

    There is no encoder. Beside ``mean_field`` it shows the loss by amortisation (Cremer, Li &
    Duvenaud 2018, equation 5).

    Args:
        model: a program with one real latent site ``z`` for each datum.
        num_data: N. Every batch holds all of them.
    """
    return PerDatum(model, num_data)


# --- semi-amortised -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemiAmortised(MeanField):
    """The family ``MeanField``, after ``num_steps`` gradient steps on each datum's own ELBO.

    Attributes:
        num_steps: how many steps there are.
        step_size: the size of a step along the natural gradient of the mean and the log-deviation.
            No step moves a mean by more than one deviation.
        num_pairs: mirrored pairs of points for each expectation.

    Raises:
        ValueError: a number is not positive, or the step size is above 1.
    """

    num_steps: int = 5
    step_size: float = 0.5
    num_pairs: int = 2

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "num_steps", "num_pairs")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"step_size: expected above 0 and at most 1, got {self.step_size}")

    def posterior(self, data: Data, num_latents: int) -> dist.Distribution:
        """Independent Normals, refined. The gradient passes straight to the encoder."""
        z_loc, raw = self.encode(data, num_latents, num_latents)
        start = z_loc, jnp.log(positive(raw))
        end = self.refine(lax.stop_gradient(start), self.log_joint(data))
        z_loc, log_scale = (s + lax.stop_gradient(e - s) for s, e in zip(start, end, strict=True))
        return dist.Normal(z_loc, jnp.exp(log_scale)).to_event(1)

    def log_joint(self, data: Data) -> Callable[[Array], Array]:
        """The function from z, (N, num_latents), to log p(x, z | c) in nats, summed over the data.

        The model keeps its current parameters. No gradient reaches them.
        """
        shape = _shape_of_z(self.model, data)
        only_params = handlers.block(self.model, hide_fn=lambda site: site["type"] != "param")
        sites = handlers.trace(only_params).get_trace(**data)
        params = {name: lax.stop_gradient(site["value"]) for name, site in sites.items()}
        data = lax.stop_gradient(dict(data))

        def log_joint(z: Array) -> Array:
            latents = {"z": z.reshape(len(z), *shape)}
            with handlers.block():
                return log_density(self.model, (), data, params | latents)[0]

        return log_joint

    def points(self, key: Array, num_data: int, size: int) -> Float[Array, "points N z"]:
        """Points for an expectation under Normal(0, I): mirrored rows of a Hadamard matrix.

        All rows together have the mean 0 and the covariance I. So they give the expectation of a
        quadratic exactly. A few rows, in random order and with random signs, give it on average.
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
        """Location and log-deviation after the steps, each (N, num_latents)."""
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
    model: Callable[..., Any],
    encoder: MakeEncoder | None = None,
    num_steps: int = 5,
    step_size: float = 0.5,
    num_pairs: int = 2,
) -> SemiAmortised:
    """The mean field of an encoder, refined by gradient steps on each datum's own ELBO.

    Kim et al. 2018, section 3, differentiate through the steps. We do as Krishnan, Liang & Hoffman
    2018: the steps count as given, and the encoder gets the gradient at their end.

    Args:
        model, encoder: as in ``mean_field``. The guide runs the model inside.
        num_steps, step_size, num_pairs: as in ``SemiAmortised``.

    Raises:
        TypeError: no encoder is given, and the model has none.
        ValueError: a number is not positive, or the step size is above 1.
    """
    return SemiAmortised(model, encoder, num_steps, step_size, num_pairs)


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


def make(name: str, model: Callable[..., Any], **settings: Any) -> Guide:
    """The guide of a family by its name. The family ignores settings of other families.

    Args:
        name: one of ``GUIDES``.
        model: a program with one real latent site ``z`` for each datum.
        settings: settings of any family, for example ``encoder`` and ``num_data``.

    Raises:
        ValueError: no such family, or no family has such a setting.
    """
    if name not in GUIDES:
        raise ValueError(f"guide: expected one of {', '.join(GUIDES)}, got {name!r}")
    known = {n: list(inspect.signature(family).parameters)[1:] for n, family in GUIDES.items()}
    every = sorted({setting for some in known.values() for setting in some})
    for setting in settings:
        if setting not in every:
            raise ValueError(f"guide: expected settings among {', '.join(every)}, got {setting!r}")
    return GUIDES[name](model, **{key: settings[key] for key in settings if key in known[name]})
