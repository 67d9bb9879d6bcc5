"""Latent sites as a guide draws them: blocks of numbers.

A ``Block`` is one latent site of a model: real numbers and their map to the site's support, or a
choice and its logits. It knows the further plates, and where the data lie. A ``Start`` says where a
block's coordinates begin, by draws from the prior.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints, transforms

from inference.sites import (
    LatentSite,
    Outline,
    computed_sites,
    given_values,
    is_real,
    num_values,
    without_events,
)
from models.coordinates import Unconstrained
from models.encoders import Data
from models.labels import told, told_of
from models.networks import positive

Numbers = dict[str, Array]  # what makes the distribution of a site, (N, ...) each
QUARTILES = 1.349  # the distance of a standard Normal's quartiles
NEUTRAL = math.log(2)  # softplus(0): the scale that a network's zero stands for


@dataclass(frozen=True)
class Block(ABC):
    """A latent site as a guide draws it: some numbers in an entry of each further plate.

    An objective may sum over a site drawn before. Its values then lie along further axes, in
    front: where shapes below begin with N, (*sums, N, ...) is meant.

    Attributes:
        name: the site's.
        site: what the abstract run found.
        plates: the shape of its batch axes but the data's.
        mask: what the model masks the site by, or None. The mask ``False`` counts as None: by it a
            model says that the prior is flat.
        nesting: the batch axes of the local site that has the most.
    """

    name: str
    site: LatentSite
    plates: tuple[int, ...]
    mask: Any
    nesting: int

    # --- what a kind of block says

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers describe one entry's value."""

    @property
    @abstractmethod
    def independent_sizes(self) -> dict[str, int]:
        """How many numbers make independent distributions, by the name of each group."""

    @abstractmethod
    def independent(self, start: "Start", numbers: Numbers) -> dist.Distribution:
        """Independent distributions of the numbers that describe a value."""

    @abstractmethod
    def distribution(self, fn: dist.Distribution) -> dist.Distribution:
        """The site's distribution, from that of the numbers that describe its value."""

    @abstractmethod
    def start(self, draws: Array) -> dict[str, Array]:
        """Where the coordinates begin, from prior draws (draw, N, *batch, *event)."""

    @abstractmethod
    def seen(self, value: Array, start: "Start") -> Float[Array, "*axes size"]:
        """A value as the sites after it see it: numbers of about unit size by entry."""

    def infer(self, fn: dist.Distribution, is_last: bool) -> dict[str, Any]:
        """What the guide tells of the site.

        Args:
            fn: the distribution of the numbers that describe its value.
            is_last: whether no site of the guide comes after it.
        """
        return {}

    # --- where the numbers lie

    @property
    def total(self) -> int:
        """How many numbers a datum has, all entries together."""
        return math.prod(self.plates) * self.size

    def entries(self, numbers: Array) -> Array:
        """Numbers of a datum, (N, total), by entry: (N, *plates, size)."""
        return numbers.reshape(*numbers.shape[:-1], *self.plates, -1)

    def placed(self, numbers: Array, num_event: int = 1) -> Array:
        """(N, *plates, *event) with the data at their axis of the batch.

        Args:
            numbers: of a local site. A global one has N = 1, an axis that is left out.
            num_event: axes of an event.
        """
        num_sums = numbers.ndim - num_event - len(self.plates) - 1
        if self.site.data_axis is None:
            return numbers[0]
        axis = num_sums + self.site.data_axis
        numbers = jnp.moveaxis(numbers, num_sums, axis)
        between = self.nesting - len(self.site.batch) if num_sums else 0
        sums, rest = numbers.shape[:num_sums], numbers.shape[num_sums:]
        return numbers.reshape(*sums, *[1] * between, *rest)

    def data_first(self, value: Array, num_event: int) -> Array:
        """The inverse of ``placed``."""
        if self.site.data_axis is None:
            return value[None]
        num_batch = value.ndim - num_event
        num_sums = max(num_batch - self.nesting, 0)
        own = num_batch - min(num_batch, len(self.site.batch))
        rest = value.shape[own:]
        value = value.reshape(*value.shape[:num_sums], *rest)
        return jnp.moveaxis(value, num_sums + self.site.data_axis, num_sums)


def loc_scale(block: Block, start: "Start", numbers: Numbers) -> tuple[Array, Array]:
    """Location and scale of every entry, (N, *plates, size), from where the coordinates begin."""
    loc, raw = (block.entries(numbers[group]) for group in ("loc", "raw"))
    return start.median + start.spread * loc, start.spread * positive(raw)


@dataclass(frozen=True)
class RealBlock(Block):
    """A site with a bijection from real numbers to its support.

    Attributes:
        transform: from real numbers to the site's support.
    """

    transform: Unconstrained

    @property
    def real_shape(self) -> tuple[int, ...]:
        """The shape of one entry's real numbers."""
        return self.transform.inverse_shape(self.site.shape)

    @property
    def size(self) -> int:
        """How many real numbers one entry has."""
        return math.prod(self.real_shape)

    @property
    def independent_sizes(self) -> dict[str, int]:
        """A location and a scale for each number."""
        return {"loc": self.total, "raw": self.total}

    def independent(self, start: "Start", numbers: Numbers) -> dist.Distribution:
        """Independent Normals."""
        loc, scale = map(self.placed, loc_scale(self, start, numbers))
        return dist.Normal(loc, scale).to_event(1)

    def real(self, value: Array) -> Array:
        """A value's real numbers by entry, (N, *plates, size)."""
        u = self.data_first(self.transform.inv(value), len(self.real_shape))
        return u.reshape(*u.shape[: u.ndim - len(self.real_shape)], self.size)

    def distribution(self, fn: dist.Distribution) -> dist.Distribution:
        """The site's distribution, from that of its real numbers, which has event shape (size,)."""
        if fn.event_shape != self.real_shape:
            fn = _reshaped(fn, self.real_shape)
        if not is_real(self.transform.support):
            # NumPyro's own check of the value would make an edge impossible.
            fn = dist.TransformedDistribution(fn, self.transform, validate_args=False)
        return fn if self.mask is None else fn.mask(self.mask)

    def start(self, draws: Array) -> dict[str, Array]:
        """The median of prior draws, and their spread.

        The spread is the distance of the quartiles, in units of a standard Normal's. Draws that
        all agree have the spread 1.
        """
        real = jax.vmap(self.real)(draws)
        low, median, high = jnp.quantile(
            real.reshape(-1, *real.shape[2:]), jnp.array([0.25, 0.5, 0.75]), axis=0
        )
        spread = (high - low) / QUARTILES / NEUTRAL
        is_known = jnp.isfinite(spread) & (spread > 0)
        return {
            "median": jnp.where(jnp.isfinite(median), median, 0),
            "spread": jnp.where(is_known, spread, 1),
        }

    def seen(self, value: Array, start: "Start") -> Float[Array, "*axes size"]:
        """The real numbers, centred and scaled."""
        return (self.real(value) - start.median) / start.spread


@dataclass(frozen=True)
class DiscreteBlock(Block):
    """A site whose values are 0, 1, ...: Categorical or Bernoulli.

    Attributes:
        num_values: how many values there are.
        given: the values that the data tell, of the site's shape, -1 for unknown. None for none.
    """

    num_values: int
    given: Any

    @property
    def num_logits(self) -> int:
        """Numbers of one value's distribution: one for each value, but one for a Bernoulli."""
        return 1 if self.is_boolean else self.num_values

    @property
    def is_boolean(self) -> bool:
        """Whether the site is a Bernoulli."""
        return without_events(self.site.support) is constraints.boolean

    @property
    def size(self) -> int:
        """How many numbers describe one entry's value."""
        return math.prod(self.site.shape) * self.num_logits

    @property
    def independent_sizes(self) -> dict[str, int]:
        """The logits."""
        return {"logits": self.total}

    def independent(self, start: "Start", numbers: Numbers) -> dist.Distribution:
        """Independent choices. Their logits are measured from the prior's."""
        logits = self.placed(start.median + self.entries(numbers["logits"]))
        logits = logits.reshape(*logits.shape[:-1], *self.site.shape, self.num_logits)
        fn = (
            dist.Bernoulli(logits=logits[..., 0])
            if self.is_boolean
            else dist.Categorical(logits=logits)
        )
        return fn.to_event(len(self.site.shape))

    def distribution(self, fn: dist.Distribution) -> dist.Distribution:
        """The choices: sure where the data tell the value."""
        if self.given is not None:
            fn = told(fn, self.given)
        return fn if self.mask is None else fn.mask(self.mask)

    def start(self, draws: Array) -> dict[str, Array]:
        """The logits of the prior, from how often each value is drawn; a spread of 1."""
        one_hot = jax.vmap(self._one_hot)(draws)
        one_hot = one_hot.reshape(-1, *one_hot.shape[2:])
        shape = (*self.plates, *self.site.shape, self.num_values)
        count = one_hot.sum(0).reshape(shape)
        log_p = jnp.log((count + 1) / (len(one_hot) + self.num_values))
        logits = log_p[..., 1:] - log_p[..., :1] if self.is_boolean else log_p
        logits = logits.reshape(*self.plates, self.size)
        return {"median": logits, "spread": jnp.ones_like(logits)}

    def seen(self, value: Array, start: "Start") -> Float[Array, "*axes size"]:
        """One-hot, or 0 and 1."""
        one_hot = self._one_hot(value)
        if self.is_boolean:
            one_hot = one_hot.reshape(*one_hot.shape[:-1], -1, 2)[..., 1]
        return one_hot

    def _one_hot(self, value: Array) -> Array:
        one_hot = jax.nn.one_hot(value.astype(int), self.num_values)
        first = self.data_first(one_hot, len(self.site.shape) + 1)
        return first.reshape(*first.shape[: first.ndim - len(self.site.shape) - 1], -1)

    def infer(self, fn: dist.Distribution, is_last: bool) -> dict[str, Any]:
        """An objective may sum over the site, and learns what the data tell of it.

        It may not where a site of the guide that comes after sees all entries of a further plate
        at once, or where an event has several entries.
        """
        is_single = not self.site.shape and (is_last or math.prod(self.plates) == 1)
        sums = {"enumerate": "parallel"} if is_single else {}
        return sums | ({} if self.given is None else told_of(fn, self.given))


def _reshaped(fn: dist.Distribution, shape: tuple[int, ...]) -> dist.Distribution:
    """The same density over arrays of another event shape."""
    if isinstance(fn, dist.Independent) and isinstance(fn.base_dist, dist.Normal):
        loc, scale = (a.reshape(*fn.batch_shape, *shape) for a in (fn.mean, fn.base_dist.scale))
        return dist.Normal(loc, scale).to_event(len(shape))
    reshape = transforms.ReshapeTransform(shape, fn.event_shape)
    return dist.TransformedDistribution(fn, reshape)


def blocks_of(model: Callable[..., Any], found: Outline, data: Data) -> dict[str, Block]:
    """A block for each latent site, global and local, in the model's order."""
    sites = found.latents
    is_computed = any(site.is_computed for site in sites.values())
    computed = computed_sites(model, data) if is_computed else {}
    nesting = max((len(site.batch) for site in sites.values() if site.is_local), default=0)
    blocks: dict[str, Block] = {}
    for name, site in sites.items():
        plates = tuple(n for i, n in enumerate(site.batch) if i != site.data_axis)
        mask = computed[name]["fn"]._mask if site.is_masked else None
        mask = None if mask is False else mask
        common = name, site, plates, mask, nesting
        count = num_values(site.support)
        if count is not None:
            given = given_values(computed[name]) if site.is_given else None
            blocks[name] = DiscreteBlock(*common, count, given)
            continue
        support = computed[name]["fn"].support if site.support is None else site.support
        blocks[name] = RealBlock(*common, Unconstrained(support))
    return blocks


class Drawn(NamedTuple):
    """A site that is drawn already: what made it, and the numbers that the sites after it see."""

    block: Block
    numbers: Numbers
    seen: Float[Array, "*axes size"]


class Start(NamedTuple):
    """Where a site's coordinates begin, and their unit, from prior draws.

    In this unit a network's zero makes a scale as wide as the prior. The coordinates of a discrete
    site are logits.
    """

    median: Float[Array, "*plates size"]
    spread: Float[Array, "*plates size"]


class Plates:
    """The plates of a model, each made once for all sites of a guide."""

    def __init__(self, found: Outline):
        frames = {frame for site in found.latents.values() for frame in site.plates}
        self.made = {
            frame: numpyro.plate(name, size, dim=dim)
            for frame in sorted(frames)
            for name, dim, size in [frame]
        }

    @contextlib.contextmanager
    def around(self, site: LatentSite) -> Any:
        """The plates around a site, the outermost first."""
        with contextlib.ExitStack() as stack:
            for frame in site.plates:
                stack.enter_context(self.made[frame])
            yield
