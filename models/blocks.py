"""Latent sites as a guide draws them: blocks of real numbers.

A ``Block`` is one latent site of a model. It knows the map from real numbers to the site's
support, the further plates, and where the data lie. A ``Start`` says where a block's coordinates
begin, by draws from the prior.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import transforms

from inference.sites import LatentSite, Outline, computed_sites, is_real
from models.coordinates import Unconstrained
from models.encoders import Data

Numbers = dict[str, Array]  # what makes the distribution of a site, (N, ...) each
QUARTILES = 1.349  # the distance of a standard Normal's quartiles
NEUTRAL = math.log(2)  # softplus(0): the scale that a network's zero stands for


@dataclass(frozen=True)
class Block:
    """A latent site as a guide draws it: real numbers in an entry of each further plate.

    Attributes:
        name: the site's.
        site: what the abstract run found.
        transform: from real numbers to the site's support.
        plates: the shape of its batch axes but the data's.
        mask: what the model masks the site by, or None. The mask ``False`` counts as None: by it a
            model says that the prior is flat.
    """

    name: str
    site: LatentSite
    transform: Unconstrained
    plates: tuple[int, ...]
    mask: Any

    @property
    def real_shape(self) -> tuple[int, ...]:
        """The shape of one entry's real numbers."""
        return self.transform.inverse_shape(self.site.shape)

    @property
    def size(self) -> int:
        """How many real numbers one entry has."""
        return math.prod(self.real_shape)

    @property
    def total(self) -> int:
        """How many real numbers a datum has, all entries together."""
        return math.prod(self.plates) * self.size

    def entries(self, numbers: Array) -> Array:
        """Numbers of a datum, (N, total), by entry: (N, *plates, size)."""
        return numbers.reshape(len(numbers), *self.plates, -1)

    def placed(self, numbers: Array) -> Array:
        """(N, *plates, ...) with the data at their axis of the batch, or none for a global site."""
        axis = self.site.data_axis
        return numbers[0] if axis is None else jnp.moveaxis(numbers, 0, axis)

    def data_first(self, value: Array) -> Array:
        """The inverse of ``placed``."""
        axis = self.site.data_axis
        return value[None] if axis is None else jnp.moveaxis(value, axis, 0)

    def real(self, value: Array) -> Array:
        """A value's real numbers by entry, (N, *plates, size)."""
        u = self.data_first(self.transform.inv(value))
        return u.reshape(len(u), *self.plates, self.size)

    def distribution(self, fn: dist.Distribution) -> dist.Distribution:
        """The site's distribution, from that of its real numbers, which has event shape (size,)."""
        if fn.event_shape != self.real_shape:
            fn = _reshaped(fn, self.real_shape)
        if not is_real(self.transform.support):
            # NumPyro's own check of the value would make an edge impossible.
            fn = dist.TransformedDistribution(fn, self.transform, validate_args=False)
        return fn if self.mask is None else fn.mask(self.mask)


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
    is_computed = any(site.support is None or site.is_masked for site in sites.values())
    computed = computed_sites(model, data) if is_computed else {}
    blocks = {}
    for name, site in sites.items():
        support = computed[name]["fn"].support if site.support is None else site.support
        plates = tuple(n for i, n in enumerate(site.batch) if i != site.data_axis)
        mask = computed[name]["fn"]._mask if site.is_masked else None
        mask = None if mask is False else mask
        blocks[name] = Block(name, site, Unconstrained(support), plates, mask)
    return blocks


class Drawn(NamedTuple):
    """A site that is drawn already: its real numbers, centred and scaled, and what made them."""

    block: Block
    numbers: Numbers
    real: Float[Array, "N *plates size"]


class Start(NamedTuple):
    """Where a site's coordinates begin, and their unit, from prior draws.

    In this unit a network's zero makes a scale as wide as the prior.
    """

    median: Float[Array, "*plates size"]
    spread: Float[Array, "*plates size"]


def start_of(block: Block, draws: Array) -> dict[str, Array]:
    """The median of prior draws, (draw, N, *batch, *event), and their spread.

    The spread is the distance of the quartiles, in units of a standard Normal's. Draws that all
    agree have the spread 1.
    """
    real = jax.vmap(block.real)(draws)
    low, median, high = jnp.quantile(
        real.reshape(-1, *real.shape[2:]), jnp.array([0.25, 0.5, 0.75]), axis=0
    )
    spread = (high - low) / QUARTILES / NEUTRAL
    is_known = jnp.isfinite(spread) & (spread > 0)
    return {
        "median": jnp.where(jnp.isfinite(median), median, 0),
        "spread": jnp.where(is_known, spread, 1),
    }


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
