"""The catalogue of guides: families made from any model in one call, and swapped in one line.

    guide = mean_field(model)
    guide = flow(model)

| family                     | q of a datum's local sites, in unconstrained coordinates u        |
|----------------------------|-------------------------------------------------------------------|
| ``mean_field``             | prod_i Normal(u_i; loc_i(x, c), scale_i(x, c)^2)                  |
| ``structured``             | q(u1 | x, c) q(u2 | u1, x, c) ..., each site a mean field         |
| ``low_rank``               | Normal(u; loc(x, c), F(x, c) F(x, c)^T + diag(scale(x, c)^2))     |
| ``full_covariance``        | Normal(u; loc(x, c), L(x, c) L(x, c)^T), L lower triangular       |
| ``flow``                   | the full covariance, carried through affine couplings             |
| ``inverse_autoregressive`` | the mean field, carried through autoregressive maps               |
| ``neural_spline``          | the full covariance, its noise carried through splines            |
| ``prior``                  | p(z | c): the data change nothing                                 |
| ``semi_amortised``         | the mean field, after a few gradient steps on each datum's ELBO   |

Mean field, low rank, full covariance and flow are ordered: each contains the one before it. So the
best ELBO cannot fall from one to the next. ``neural_spline`` contains the full covariance, and
``inverse_autoregressive`` contains the mean field. No flow contains another one. The maps of a flow
depend on (x, c).

A guide is a NumPyro program with the model's arguments, called by keyword: ``guide(x=x)`` or
``guide(c=c, x=x)``. A family finds the latent sites by an abstract run of the model. A site in the
plate of the data is *local*, another one *global*.

- **Coordinates.** ``biject_to`` of a site's support gives real numbers u. They are measured from
  the median of prior draws, in units of their spread. So a guide starts near the prior.
- **Local sites** get their numbers from one encoder (``models.encoders``), the site ``encoder`` of
  the program. A joint family is a chain: each site is drawn given the data and the sites before.
- **Global sites** are drawn first. Their numbers are the site ``globals``: a mean field, or with
  ``globals="full_covariance"`` one Normal over all of them.
- **A further plate.** The entries of one site along it are independent in q, given the data and
  the sites before. To make them joint, write ``.to_event`` in the model.

What is measured once and not trained, the medians for example, is the site ``statistics``.

A family is a function of the model in ``GUIDES``. ``make`` takes one by its name.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import lax, random
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions import transforms
from numpyro.infer.util import log_density
from scipy.linalg import hadamard

from inference.sites import (
    HasEncoder,
    Outline,
    array_kinds,
    few,
    fixed_param,
    is_observed,
    is_real,
    outline,
    prior_draws,
)
from models.blocks import Block, Drawn, Numbers, Plates, Start, blocks_of, loc_scale
from models.densities import CholeskyNormal
from models.encoders import Data, Inputs, MakeEncoder, PerDatum, default_network
from models.flows import (
    AffineCoupling,
    Autoregressive,
    Conditional,
    Made,
    SplineCoupling,
    Stack,
    every_other,
)
from models.networks import MLP, check_at_least, network, positive, still

GLOBALS = ("mean_field", "full_covariance")
NARROW = math.log(2**0.1 - 1)  # softplus(NARROW) = softplus(0) / 10

# --- what the families share ----------------------------------------------------------------------


@dataclass(frozen=True)
class Guide:
    """A program that draws the latent sites of a model, given the data.

    Attributes:
        model: any program.
    """

    model: Callable[..., Any]

    def __call__(self, **data: Any) -> None:
        """Draws every latent site.

        Args:
            data: the model's arguments by name.
        """
        raise NotImplementedError

    def per_datum(self, num_data: int) -> "Guide":
        """The same family with numbers of each datum's own in place of an encoder.

        Args:
            num_data: how many data there are. Every batch holds all of them, in the same order.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Chain(Guide):
    """A guide that draws one site after another, each from numbers and the sites before.

    Attributes:
        encoder: a callable ``(num_outputs, *, rngs)``. It returns a Flax module from the data, by
            keyword, to (N, num_outputs). None for the model's own, or else an MLP on all arrays.
        globals: "mean_field" or "full_covariance", the family of the global sites.

    Raises:
        ValueError: no such family of the global sites.
    """

    encoder: MakeEncoder | None = None
    globals: str = "mean_field"
    draws_discrete: ClassVar[bool] = False

    def __post_init__(self):
        if self.globals not in GLOBALS:
            raise ValueError(f"globals: expected one of {', '.join(GLOBALS)}, got {self.globals!r}")

    # --- what a family says

    def sizes(self, block: Block, before: int) -> dict[str, int]:
        """How many numbers make the distribution of a site, by the name of each group.

        Args:
            block: the site.
            before: real numbers of the sites drawn before it.
        """
        raise NotImplementedError

    def conditional(
        self, block: Block, start: Start, numbers: Numbers, past: Sequence[Drawn]
    ) -> dist.Distribution:
        """The distribution of a site's real numbers given those before, of event shape (size,).

        Args:
            block: the site.
            start: where its coordinates begin, and their unit.
            numbers: by group of ``sizes``, (N, numbers).
            past: the sites drawn before it.
        """
        raise NotImplementedError

    def order(self, names: list[str]) -> list[str]:
        """The order in which local sites are drawn, from the model's order."""
        return names

    # --- the program

    def __call__(self, **data: Any) -> None:
        """Draws every latent site, the global ones first.

        Args:
            data: the model's arguments by name.

        Raises:
            ValueError: a latent site that no family can draw; an encoder's output of another shape.
        """
        found = outline(self.model, data)
        blocks = blocks_of(self.model, found, data)
        shared = [block for block in blocks.values() if not block.site.is_local]
        names = [name for name, block in blocks.items() if block.site.is_local]
        self._check_discrete(found)
        local = [blocks[name] for name in self.order(names)]
        inputs = self._inputs(data) if local else None
        statistics = self._statistics(found, inputs, data)
        plates = Plates(found)
        if shared:
            family = FullCovariance if self.globals == "full_covariance" else MeanField
            of_globals = family(self.model)
            sizes = _all_sizes(of_globals, shared)
            of_globals.draw(shared, _global_numbers(sizes), statistics, plates, data)
        if local:
            sizes = _all_sizes(self, local)
            numbers = self._encode(inputs, statistics, data, sizes)
            self.draw(local, numbers, statistics, plates, data)
        _check_names(found, self)

    def draw(
        self,
        blocks: Sequence[Block],
        numbers: Mapping[str, Numbers],
        statistics: Mapping[str, Any],
        plates: Plates,
        data: Data,
    ) -> None:
        """Draws sites one after another.

        Args:
            blocks: the sites, in this order.
            numbers: by site.
            statistics: where the coordinates of each begin.
            plates: the plates around them.
            data: the model's arguments by name.
        """
        past: list[Drawn] = []
        for block in blocks:
            start = Start(**statistics["latents"][block.name])
            fn = self.conditional(block, start, numbers[block.name], past)
            with plates.around(block.site):
                is_last = len(past) + 1 == len(blocks)
                infer = block.infer(fn, is_last)
                value = numpyro.sample(block.name, block.distribution(fn), infer=infer)
            if not is_last:
                past.append(Drawn(block, numbers[block.name], block.seen(value, start)))

    def per_datum(self, num_data: int) -> "Chain":
        """The same family with a table of numbers for each datum in place of the encoder."""
        return replace(self, encoder=PerDatum(num_data))

    def _check_discrete(self, found: Outline) -> None:
        """Raises ValueError for a discrete site in a family of real numbers."""
        for name, site in found.latents.items():
            if site.is_discrete and not self.draws_discrete:
                raise ValueError(
                    f"model site {name!r}: expected real numbers in the family "
                    f"{type(self).__name__}, got the support {site.support}; take mean_field or "
                    f"structured, which draw discrete sites"
                )

    # --- where the numbers come from

    def _inputs(self, data: Data) -> Inputs | None:
        """What the automatic encoder sees. None where there is another encoder."""
        if self.encoder is not None or isinstance(self.model, HasEncoder):
            return None
        inputs = Inputs(array_kinds(self.model, data))
        inputs.check()
        return inputs

    def _encode(
        self,
        inputs: Inputs | None,
        statistics: Mapping[str, Any],
        data: Data,
        sizes: Mapping[str, dict[str, int]],
    ) -> dict[str, Numbers]:
        """The encoder's outputs by site and group.

        Raises:
            ValueError: the encoder's output has another shape.
        """
        counts = [size for groups in sizes.values() for size in groups.values()]
        if inputs is not None:
            vectors = inputs(data, statistics["data"])
            count = vectors.shape[1], sum(counts)
            outputs = network("encoder", lambda rngs: default_network(*count, rngs=rngs))(vectors)
        else:
            model: Any = self.model
            make = model.encoder if self.encoder is None else self.encoder
            outputs = network("encoder", lambda rngs: make(sum(counts), rngs=rngs))(**data)
        expected = (len(next(iter(data.values()))), sum(counts))
        if outputs.shape != expected:
            raise ValueError(
                f"encoder: expected outputs of shape {expected}, got {outputs.shape}; return "
                f"num_outputs numbers for each datum"
            )
        parts = iter(jnp.split(outputs, np.cumsum(counts[:-1]), axis=-1))
        return {name: {group: next(parts) for group in groups} for name, groups in sizes.items()}

    def _statistics(self, found: Outline, inputs: Inputs | None, data: Data) -> Mapping[str, Any]:
        """What is measured once: of the inputs, and of prior draws of the latent sites."""

        def measure(key: Array) -> dict[str, Any]:
            some = few(found, data)
            blocks = blocks_of(self.model, found, some)
            draws = prior_draws(self.model, blocks, some, key)
            latents = {name: block.start(draws[name]) for name, block in blocks.items()}
            of_data = {} if inputs is None else {"data": inputs.statistics(data)}
            return {"latents": latents} | of_data

        return fixed_param("statistics", measure)


def _all_sizes(family: Chain, blocks: Sequence[Block]) -> dict[str, dict[str, int]]:
    """How many numbers each site takes, by group."""
    sizes, before = {}, 0
    for block in blocks:
        sizes[block.name] = family.sizes(block, before)
        before += block.total
    return sizes


def _global_numbers(sizes: Mapping[str, dict[str, int]]) -> dict[str, Numbers]:
    """Parameters for the global sites, one number for all data: (1, numbers) each.

    The scales start at a tenth of the prior's: all data share a draw, so wide draws would drown the
    gradient in noise.
    """

    def start(key: Array) -> dict[str, Numbers]:
        keys = random.split(key, len(sizes))
        return {
            name: {
                group: (NARROW if group == "raw" else 0)
                + 0.1 * random.normal(random.fold_in(key, i), (size,), jnp.float32)
                for i, (group, size) in enumerate(groups.items())
            }
            for key, (name, groups) in zip(keys, sizes.items(), strict=True)
        }

    return jax.tree.map(lambda x: x[None], numpyro.param("globals", start))


def _check_names(found: Outline, guide: Guide) -> None:
    """The model has no site of a name that the guide has for its own."""
    for name in ("encoder", "globals", "statistics"):
        if name in found.names:
            raise ValueError(
                f"model site {name!r}: expected another name, since {type(guide).__name__} keeps "
                f"its own numbers in a site {name!r}; rename it in the model, or take the "
                f"guide that the model's prior runs, if it runs one"
            )


# --- Gaussian families ----------------------------------------------------------------------------


def _residuals(past: Sequence[Drawn]) -> Array:
    """Of the sites before: (u - loc) / scale, (N, numbers)."""
    parts = []
    for block, numbers, seen in past:
        loc, raw = (block.entries(numbers[group]) for group in ("loc", "raw"))
        parts.append(((seen - loc) / positive(raw)).reshape(len(seen), -1))
    return jnp.concatenate(parts, axis=1)


def _with_past(context: Array, past: Sequence[Drawn]) -> Array:
    """A context and the numbers of the sites before, (N, numbers)."""
    parts = [context]
    for block, _, seen in past:
        by_datum = seen.shape[: seen.ndim - len(block.plates) - 1]
        parts.append(seen.reshape(*by_datum, -1).astype(context.dtype))
    shape = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(p, (*shape, p.shape[-1])) for p in parts], axis=-1)


@dataclass(frozen=True)
class MeanField(Chain):
    """The family q(u | x, c) = prod_i Normal(u_i; loc_i(x, c), scale_i(x, c)^2).

    A discrete site has logits in place of the location and the scale.
    """

    draws_discrete: ClassVar[bool] = True

    def sizes(self, block: Block, before: int) -> dict[str, int]:
        """A location and a scale for each number, or logits."""
        return block.independent_sizes

    def conditional(
        self, block: Block, start: Start, numbers: Numbers, past: Sequence[Drawn]
    ) -> dist.Distribution:
        """Independent Normals, or independent choices."""
        return block.independent(start, numbers)


def mean_field(
    model: Callable[..., Any], encoder: MakeEncoder | None = None, globals: str = "mean_field"
) -> MeanField:
    """Independent Normals: q(u | x, c) = prod_i Normal(u_i; loc_i(x, c), scale_i(x, c)^2).

    Kingma & Welling 2014, equation 9.

    Args:
        model: any program.
        encoder: a callable ``(num_outputs, *, rngs)``. It returns a Flax module from the data, by
            keyword, to (N, num_outputs). Default: the model's own, or else an MLP on all arrays.
        globals: "mean_field" or "full_covariance", the family of the global sites.

    Raises:
        ValueError: no such family of the global sites.
    """
    return MeanField(model, encoder, globals)


@dataclass(frozen=True)
class Structured(MeanField):
    """The family q(u1 | x, c) q(u2 | u1, x, c) ..., each conditional a mean field.

    Attributes:
        direction: "model" draws sites in the model's order, "reversed" from the last one back.
        num_hidden: units of each conditional's network, and numbers of context from the encoder.

    Raises:
        ValueError: no such order; a number that is not positive.
    """

    direction: str = "model"
    num_hidden: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.direction not in ("model", "reversed"):
            raise ValueError(f"order: expected model or reversed, got {self.direction!r}")
        check_at_least(1, self, "num_hidden")

    def order(self, names: list[str]) -> list[str]:
        """The order in which local sites are drawn."""
        return names if self.direction == "model" else names[::-1]

    def sizes(self, block: Block, before: int) -> dict[str, int]:
        """The mean field's numbers, and a context where there are sites before."""
        return super().sizes(block, before) | {"context": self.num_hidden if before else 0}

    def conditional(
        self, block: Block, start: Start, numbers: Numbers, past: Sequence[Drawn]
    ) -> dist.Distribution:
        """Independent distributions. A network adds what the sites before change."""
        if past:
            inputs, sizes = _with_past(numbers["context"], past), super().sizes(block, 0)
            ends = np.cumsum(list(sizes.values()))

            def build(rngs: nnx.Rngs) -> MLP:
                return still(inputs.shape[-1], self.num_hidden, int(ends[-1]), rngs=rngs)

            added = jnp.split(network(f"{block.name}_given", build)(inputs), ends[:-1], axis=-1)
            numbers = {n: numbers[n] + more for n, more in zip(sizes, added, strict=True)}
        return super().conditional(block, start, numbers, ())


def structured(
    model: Callable[..., Any],
    encoder: MakeEncoder | None = None,
    globals: str = "mean_field",
    order: str = "model",
    num_hidden: int = 32,
) -> Structured:
    """One local site after another: q(u1 | x, c) q(u2 | u1, x, c) ..., each a mean field.

    With ``order="reversed"`` the last site of the model is drawn first (Sonderby et al. 2016, the
    bottom-up guide of equation 4).

    Args:
        model, encoder, globals: as in ``mean_field``.
        order: "model" or "reversed".
        num_hidden: units of each conditional's network, and numbers of context from the encoder.

    Raises:
        ValueError: no such order or family of the global sites; a number that is not positive.
    """
    return Structured(model, encoder, globals, order, num_hidden)


@dataclass(frozen=True)
class FullCovariance(Chain):
    """The family q(u | x, c) = Normal(u; loc, L L^T). loc and L are functions of (x, c).

    It is drawn site by site: u_i = loc_i + scale_i (C_i r + (I + B_i) e_i). r are the residuals
    (u - loc) / scale of the sites before, and e_i is new noise.
    """

    def sizes(self, block: Block, before: int) -> dict[str, int]:
        """For loc, for L's diagonal, for the rest of L within the site, and for C."""
        within = math.prod(block.plates) * block.size * (block.size - 1) // 2
        return {
            "loc": block.total,
            "raw": block.total,
            "below": within,
            "across": block.total * before,
        }

    def conditional(
        self, block: Block, start: Start, numbers: Numbers, past: Sequence[Drawn]
    ) -> dist.Distribution:
        """A multivariate Normal by its Cholesky factor."""
        loc, scale = loc_scale(block, start, numbers)
        if past:
            loc += scale * self.shift(block, numbers, past)
        below = block.entries(numbers["below"])
        return _cholesky_normal(*map(block.placed, (loc, scale, below)))

    def shift(self, block: Block, numbers: Numbers, past: Sequence[Drawn]) -> Array:
        """What the sites before add to the location, in scales: (N, *plates, size)."""
        residuals = _residuals(past)
        across = numbers["across"].reshape(len(residuals), block.total, -1)
        total = jnp.einsum("nij,nj->ni", across, residuals) / across.shape[-1] ** 0.5
        return block.entries(total)


def _cholesky_normal(loc: Array, scale: Array, below: Array) -> CholeskyNormal:
    """Normal(loc, L L^T) with L = diag(scale) (I + B), B strictly lower triangular.

    Args:
        loc, scale: (..., size).
        below: the entries of B, row by row.
    """
    size = loc.shape[-1]
    rows, columns = jnp.tril_indices(size, -1)
    unit = jnp.broadcast_to(jnp.eye(size, dtype=scale.dtype), (*scale.shape, size))
    unit = unit.at[..., rows, columns].set((below / size**0.5).astype(scale.dtype))
    return CholeskyNormal(loc, scale[..., None] * unit)


def full_covariance(
    model: Callable[..., Any], encoder: MakeEncoder | None = None, globals: str = "mean_field"
) -> FullCovariance:
    """One Normal of any covariance: q(u | x, c) = Normal(u; loc(x, c), L(x, c) L(x, c)^T).

    Kingma & Welling 2019, section 2.5.1.

    Args:
        model, encoder, globals: as in ``mean_field``.

    Raises:
        ValueError: no such family of the global sites.
    """
    return FullCovariance(model, encoder, globals)


@dataclass(frozen=True)
class LowRank(Chain):
    """The family q(u | x, c) = Normal(u; loc, F F^T + diag(scale^2)).

    It is drawn site by site. Those before tell of the factors f ~ Normal(0, I), in
    u = loc + F f + scale e, by the usual formulas of a Gaussian.

    Attributes:
        rank: the columns of F.
    """

    rank: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, self, "rank")

    def sizes(self, block: Block, before: int) -> dict[str, int]:
        """For loc, for scale and for the rows of F."""
        return {"loc": block.total, "raw": block.total, "factor": block.total * self.rank}

    def conditional(
        self, block: Block, start: Start, numbers: Numbers, past: Sequence[Drawn]
    ) -> dist.Distribution:
        """A multivariate Normal by its factor and its diagonal."""
        loc, scale = loc_scale(block, start, numbers)
        factor = self.factor(block, numbers)
        if past:
            mean, root = self.posterior(past)
            loc += scale * block.entries(jnp.einsum("nir,nr->ni", factor, mean))
            factor = factor @ root
        factor = scale[..., None] * factor.reshape(*scale.shape, -1)
        loc, scale = map(block.placed, (loc, scale))
        factor = block.placed(factor, num_event=2)
        return dist.LowRankMultivariateNormal(loc, factor, scale**2)

    def factor(self, block: Block, numbers: Numbers) -> Array:
        """The rows of F in units of the scales, (N, total, rank)."""
        rows = numbers["factor"].reshape(-1, block.total, self.rank)
        return rows / block.total**0.5

    def posterior(self, past: Sequence[Drawn]) -> tuple[Array, Array]:
        """Mean (N, rank) and a root of the covariance (N, rank, rank) of the factors."""
        factor = jnp.concatenate([self.factor(d.block, d.numbers) for d in past], axis=1)
        precision = jnp.eye(factor.shape[-1]) + jnp.swapaxes(factor, 1, 2) @ factor
        lower = jnp.linalg.cholesky(precision)
        seen = jnp.einsum("nir,ni->nr", factor, _residuals(past))[..., None]
        mean = jax.scipy.linalg.cho_solve((lower, True), seen)[..., 0]
        root = jax.scipy.linalg.solve_triangular(
            jnp.swapaxes(lower, 1, 2), jnp.broadcast_to(jnp.eye(factor.shape[-1]), lower.shape)
        )
        return mean, root


def low_rank(
    model: Callable[..., Any],
    encoder: MakeEncoder | None = None,
    globals: str = "mean_field",
    rank: int = 2,
) -> LowRank:
    """A few common factors: q(u | x, c) = Normal(u; loc, F F^T + diag(scale^2)), all of (x, c).

    Rezende, Mohamed & Wierstra 2014, section 4.3, use this form for the precision. Here it is the
    covariance.

    Args:
        model, encoder, globals: as in ``mean_field``.
        rank: the columns of F.

    Raises:
        ValueError: ``rank`` is not positive; no such family of the global sites.
    """
    return LowRank(model, encoder, globals, rank)


# --- flows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transformed(Chain):
    """A family u = T(v; x, c): v of a simpler family, T a stack of maps.

    The maps depend on a context from the encoder. In a chain the maps of a site depend on the sites
    before it too. All maps start as the identity.

    Attributes:
        num_layers: maps in T.
        num_hidden: units of each map's one hidden layer, and numbers of context from the encoder.
    """

    num_layers: int = 2
    num_hidden: int = 32
    base: ClassVar[type[Chain]] = FullCovariance

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, self, "num_layers", "num_hidden")

    # --- what a family says

    def network(self, layer: int, size: int, num_context: int, rngs: nnx.Rngs) -> MLP | Made:
        """The network of a map. Its last layer starts at zero.

        Args:
            layer: which map it is, from 1.
            size: the dimensions of u.
            num_context: numbers of context for one datum.
            rngs: Flax's random numbers.
        """
        raise NotImplementedError

    def map(self, layer: int, size: int, net: Any, context: Array) -> Conditional:
        """A map.

        Args:
            layer: which map it is, from 1.
            size: the dimensions of u.
            net: its network.
            context: numbers for each datum, (N, num_context).
        """
        raise NotImplementedError

    def carried(self, base: Any, maps: list[Any]) -> dist.TransformedDistribution:
        """The base, carried through the maps."""
        return dist.TransformedDistribution(base, maps)

    # --- the distribution

    def sizes(self, block: Block, before: int) -> dict[str, int]:
        """The base's numbers, and a context."""
        return self.base(self.model).sizes(block, before) | {"context": self.num_hidden}

    def conditional(
        self, block: Block, start: Start, numbers: Numbers, past: Sequence[Drawn]
    ) -> dist.Distribution:
        """The base, transformed."""
        unit = Start(jnp.zeros_like(start.median), jnp.ones_like(start.spread))
        base = self.base(self.model).conditional(block, unit, numbers, past)
        context = _with_past(numbers["context"], past)
        num_context = context.shape[-1]
        spread = context.reshape(len(context), *[1] * len(block.plates), -1)
        spread = jnp.broadcast_to(spread, (len(context), *block.plates, num_context))
        placed = block.placed(spread)
        layers = range(1, self.num_layers + 1)

        def build(rngs: nnx.Rngs) -> Stack:
            return Stack(self.network(layer, block.size, num_context, rngs) for layer in layers)

        nets = network(f"{block.name}_flow", build).layers
        maps = [
            self.map(layer, block.size, net, placed)
            for layer, net in zip(layers, nets, strict=True)
        ]
        median, scale = block.placed(start.median[None]), block.placed(start.spread[None])
        units = transforms.IndependentTransform(transforms.AffineTransform(median, scale), 1)
        return dist.TransformedDistribution(self.carried(base, maps), [units])


@dataclass(frozen=True)
class Flow(Transformed):
    """The family u = T(v; x, c) with v of the full covariance and T a stack of affine couplings."""

    num_layers: int = 4

    def network(self, layer: int, size: int, num_context: int, rngs: nnx.Rngs) -> MLP:
        """From the kept dimensions and the context to a scale and a shift for each dimension."""
        return still(size + num_context, self.num_hidden, 2 * size, rngs=rngs)

    def map(self, layer: int, size: int, net: Any, context: Array) -> AffineCoupling:
        """An affine coupling."""
        return AffineCoupling(net, context, every_other(layer, size))


def flow(
    model: Callable[..., Any],
    encoder: MakeEncoder | None = None,
    globals: str = "mean_field",
    num_layers: int = 4,
    num_hidden: int = 32,
) -> Flow:
    """A normalising flow: a Gaussian of full covariance, carried through couplings.

    Rezende & Mohamed 2015, equation 13, with the maps of Dinh, Sohl-Dickstein & Bengio 2017. One
    pass samples, and one pass gives the density of any z. The maps depend on (x, c).

    Args:
        model, encoder, globals: as in ``mean_field``.
        num_layers: how many couplings there are.
        num_hidden: units of each coupling's hidden layer, and numbers of context from the encoder.

    Raises:
        ValueError: a number is not positive; no such family of the global sites.
    """
    return Flow(model, encoder, globals, num_layers, num_hidden)


@dataclass(frozen=True)
class InverseAutoregressive(Transformed):
    """The family u = T(v; x, c) with v of the mean field and T a stack of autoregressive maps.

    The order of the dimensions is reversed from each map to the next. The dimensions keep their
    places: a reversed map counts from the last one.
    """

    base: ClassVar[type[Chain]] = MeanField

    def network(self, layer: int, size: int, num_context: int, rngs: nnx.Rngs) -> Made:
        """From the dimensions before, and the context, to a location and a scale."""
        return Made(size, num_context, self.num_hidden, layer % 2 == 0, rngs=rngs)

    def map(self, layer: int, size: int, net: Any, context: Array) -> Autoregressive:
        """An autoregressive map."""
        return Autoregressive(net, context)


def inverse_autoregressive(
    model: Callable[..., Any],
    encoder: MakeEncoder | None = None,
    globals: str = "mean_field",
    num_layers: int = 2,
    num_hidden: int = 32,
) -> InverseAutoregressive:
    """An inverse autoregressive flow: the mean field, carried through autoregressive maps.

    Kingma et al. 2016, algorithm 1 and equations 9 and 10, with the networks of Germain et al.
    2015. Each map moves a dimension by a location and a scale. They depend on (x, c) and on the
    dimensions before it. One pass samples. The density of a z that the guide did not draw takes as
    many passes as the site has dimensions. The paper's maps mix z and the location by a gate. Ours
    have a scale between e^-2 and e^2, and start as the identity.

    Args:
        model, encoder, globals: as in ``mean_field``.
        num_layers: how many maps there are.
        num_hidden: units of each map's hidden layer, and numbers of context from the encoder.

    Raises:
        ValueError: a number is not positive; no such family of the global sites.
    """
    return InverseAutoregressive(model, encoder, globals, num_layers, num_hidden)


@dataclass(frozen=True)
class NeuralSpline(Transformed):
    """The family u = loc + L S(e; x, c) with e ~ Normal(0, I) and S a stack of spline couplings.

    The full covariance gives loc and L. The splines act on its noise and not on its draws.
    There q is about as wide as their bins, however narrow the posterior is.

    Attributes:
        num_bins: the bins of each spline.

    Raises:
        ValueError: fewer than two bins; a number that is not positive.
    """

    num_bins: int = 8

    def __post_init__(self):
        super().__post_init__()
        check_at_least(2, self, "num_bins")

    def network(self, layer: int, size: int, num_context: int, rngs: nnx.Rngs) -> MLP:
        """From the kept dimensions and the context to a spline for each dimension."""
        num_outputs = size * (3 * self.num_bins - 1)
        return still(size + num_context, self.num_hidden, num_outputs, rngs=rngs)

    def map(self, layer: int, size: int, net: Any, context: Array) -> SplineCoupling:
        """A spline coupling."""
        return SplineCoupling(net, context, every_other(layer, size))

    def carried(self, base: Any, maps: list[Any]) -> dist.TransformedDistribution:
        """The base's noise through the maps, and then through the base's own."""
        return dist.TransformedDistribution(base.base_dist, maps + base.transforms)


def neural_spline(
    model: Callable[..., Any],
    encoder: MakeEncoder | None = None,
    globals: str = "mean_field",
    num_layers: int = 2,
    num_bins: int = 8,
    num_hidden: int = 32,
) -> NeuralSpline:
    """A neural spline flow: the full covariance, its noise carried through monotone splines.

    Durkan et al. 2019, with the splines of Gregory & Delbourgo 1982. A spline can give a single
    dimension several modes. An affine map cannot. One pass samples, and one pass gives the
    density of any z. The splines depend on (x, c).

    Args:
        model, encoder, globals: as in ``mean_field``.
        num_layers: how many couplings there are.
        num_bins: the bins of each spline.
        num_hidden: units of each coupling's hidden layer, and numbers of context from the encoder.

    Raises:
        ValueError: fewer than two bins; a number is not positive; no such family of the global
            sites.
    """
    return NeuralSpline(model, encoder, globals, num_layers, num_hidden, num_bins)


# --- the prior ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prior(Guide):
    """The guide q(z | x, c) = p(z | c)."""

    def __call__(self, **data: Any) -> None:
        """Runs the model without its observations. The parameters of p(z | c) are the model's."""
        handlers.block(self.model, hide_fn=is_observed)(**data)

    def per_datum(self, num_data: int) -> "Prior":
        """The prior itself: it has no encoder."""
        return self


def prior(model: Callable[..., Any]) -> Prior:
    """The prior as a guide: q(z | x, c) = p(z | c). The data change nothing.

    The ELBO is then E_p(z | c) [ log p(x | z, c) ], the objective of the Gaussian stochastic
    network (Sohn, Lee & Yan 2015, equation 7). Importance sampling is then plain Monte Carlo.

    Args:
        model: any program with latent sites of any kind, or with none.
    """
    return Prior(model)


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
        check_at_least(1, self, "num_steps", "num_pairs")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"step_size: expected above 0 and at most 1, got {self.step_size}")

    def __call__(self, **data: Any) -> None:
        """Draws the one latent site.

        Raises:
            ValueError: the model has other latent sites than one real site for each datum.
        """
        found = outline(self.model, data)
        [*sites] = found.latents.items()
        _, site = sites[0] if len(sites) == 1 else ("", None)
        if site is None or not site.is_local or len(site.batch) > 1 or not is_real(site.support):
            got = ", ".join(
                f"{name} ({site.support}, {'local' if site.is_local else 'global'})"
                for name, site in sites
            )
            raise ValueError(
                f"model: expected one latent site of real numbers for each datum, got "
                f"{got or 'none'}; take another family, such as mean_field"
            )
        super().__call__(**data)

    def draw(
        self,
        blocks: Sequence[Block],
        numbers: Mapping[str, Numbers],
        statistics: Mapping[str, Any],
        plates: Plates,
        data: Data,
    ) -> None:
        """Draws the site from independent Normals, refined. Its gradient goes to the encoder."""
        [block] = blocks
        start = Start(**statistics["latents"][block.name])
        loc, scale = loc_scale(block, start, numbers[block.name])
        begin = loc, jnp.log(scale)
        end = self.refine(lax.stop_gradient(begin), self.log_joint(block, data))
        loc, log_scale = (s + lax.stop_gradient(e - s) for s, e in zip(begin, end, strict=True))
        with plates.around(block.site):
            fn = dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
            numpyro.sample(block.name, block.distribution(fn))

    def log_joint(self, block: Block, data: Data) -> Callable[[Array], Array]:
        """The function from z, (N, size), to log p(x, z | c) in nats, summed over the data.

        The model keeps its current parameters. No gradient reaches them.
        """
        only_params = handlers.block(self.model, hide_fn=lambda site: site["type"] != "param")
        sites = handlers.trace(only_params).get_trace(**data)
        params = {name: lax.stop_gradient(site["value"]) for name, site in sites.items()}
        data = lax.stop_gradient(dict(data))

        def log_joint(z: Array) -> Array:
            latents = {block.name: z.reshape(len(z), *block.site.shape)}
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
        model: a program with one latent site of real numbers for each datum. The guide runs it.
        encoder: as in ``mean_field``.
        num_steps, step_size, num_pairs: as in ``SemiAmortised``.

    Raises:
        ValueError: a number is not positive, or the step size is above 1.
    """
    return SemiAmortised(model, encoder, "mean_field", num_steps, step_size, num_pairs)


# --- by name --------------------------------------------------------------------------------------

GUIDES: dict[str, Callable[..., Guide]] = {
    "mean-field": mean_field,
    "structured": structured,
    "low-rank": low_rank,
    "full-covariance": full_covariance,
    "flow": flow,
    "inverse-autoregressive": inverse_autoregressive,
    "neural-spline": neural_spline,
    "prior": prior,
    "semi-amortised": semi_amortised,
}


def make(name: str, model: Callable[..., Any], **settings: Any) -> Guide:
    """The guide of a family by its name. The family ignores settings of other families.

    Args:
        name: one of ``GUIDES``.
        model: any program.
        settings: settings of any family, for example ``encoder`` and ``rank``.

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
