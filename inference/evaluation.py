"""Judges: what a fit is worth, in nats per datum.

A judge takes a model, a guide, the parameters of one seed and data as the programs take them. It
goes through the data in batches, by one compiled program, so that its memory depends on neither
the number of data nor the number of draws.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax, random
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Real
from numpyro.handlers import replay, seed
from numpyro.infer.util import compute_log_probs
from tqdm import tqdm

from inference.checks import check_data, check_values
from inference.sites import elementwise_kl, length, sum_by_datum

Program = Callable[..., Any]

DRAWS_AT_ONCE = 20  # of every datum of a batch, in memory together
FEWEST_FOR_TAIL = 30  # draws, of which six make the smallest tail that ArviZ can fit


@dataclass(frozen=True)
class Estimate:
    """One number for each datum, and their mean.

    Attributes:
        pointwise: (N,), nats per datum.
        num_samples: draws of z for each datum.
        monte_carlo_variance: (N,), the part of each number's variance that its draws are to blame
            for (to first order in 1 / num_samples), where it is known.
        pareto_k: (N,), the shape k-hat of the tail of each datum's importance weights (Vehtari et
            al. 2024, section 3), where there are weights and enough of them. -inf where those of
            the tail are constant, which no tail is lighter than; NaN where none could be fitted.
    """

    pointwise: Float[np.ndarray, " N"]
    num_samples: int
    monte_carlo_variance: Float[np.ndarray, " N"] | None = None
    pareto_k: Float[np.ndarray, " N"] | None = None

    @property
    def estimate(self) -> float:
        """The mean over the data."""
        return float(np.mean(self.pointwise, dtype=np.float64))

    @property
    def standard_error(self) -> float:
        """Of the mean, over data and draws: the deviation between data over sqrt(N)."""
        return float(np.std(self.pointwise, dtype=np.float64) / np.sqrt(len(self.pointwise)))

    @property
    def monte_carlo_error(self) -> float:
        """Of the mean, over draws alone: how much it would move on these data."""
        if self.monte_carlo_variance is None:
            return float("nan")
        return float(np.sqrt(np.sum(self.monte_carlo_variance)) / len(self.pointwise))

    @property
    def high_pareto_k(self) -> "Estimate | None":
        """The share of data with a k-hat that is not below ``pareto_k_threshold``: too high.

        The error of their number is larger than ``monte_carlo_error`` says, and falls slowly
        with more draws: the guide is too narrow there, or in the wrong place.
        """
        if self.pareto_k is None:
            return None
        good = self.pareto_k < pareto_k_threshold(self.num_samples)  # NaN is not
        return Estimate((~good).astype(float), self.num_samples)


@dataclass(frozen=True)
class ElboTerms:
    """The ELBO of each datum, and what it is made of.

    Attributes:
        elbo, reconstruction, kl: with elbo = reconstruction - kl. The divergence is exact where
            the program has one latent site and NumPyro knows the formula, and else the mean over
            draws of log q(z | x, c) - log p(z | c).
        kl_per_dim: by latent site, (N, dimensions), where guide and prior factorise over
            dimensions and NumPyro knows the formula.
        z_loc: by latent site, (N, dimensions), the mean of q(z | x, c).
    """

    elbo: Estimate
    reconstruction: Estimate
    kl: Estimate
    kl_per_dim: dict[str, Float[np.ndarray, "N z"]]
    z_loc: dict[str, Float[np.ndarray, "N z"]]

    @property
    def activity(self) -> dict[str, tuple[Float[np.ndarray, " z"], Float[np.ndarray, " z"]]]:
        """By latent site: the variance over data of z_loc, and its standard error."""
        moments = {}
        for name, z_loc in self.z_loc.items():
            squares = (z_loc - z_loc.mean(0)) ** 2
            moments[name] = squares.mean(0), squares.std(0) / np.sqrt(len(squares))
        return moments

    @property
    def active(self) -> dict[str, Bool[np.ndarray, " z"]]:
        """By latent site: is that variance above 0.01 (Burda et al. 2016, section 5)?

        A guide that ignores a dimension gives every datum the prior's mean. With a learned prior
        that mean itself depends on the condition: look at ``kl_per_dim`` then.
        """
        return {name: variance > 0.01 for name, (variance, _) in self.activity.items()}


def pareto_k_threshold(num_samples: int) -> float:
    """k-hat is good below it: min(1 - 1 / log10 S, 0.7) (Vehtari et al. 2024, section 3.2.4)."""
    return float(min(1 - 1 / np.log10(num_samples), 0.7)) if num_samples > 1 else -np.inf


def pointwise_elbo(
    model: Program,
    guide: Program,
    params: Mapping[str, Any],
    data: Mapping[str, ArrayLike],
    *,
    key: Array,
    num_samples: int = 1,
) -> Float[Array, " N"]:
    """The ELBO of each datum: the mean over draws of log p(x, z | c) - log q(z | x, c).

    A pure function, all data at once: for use under ``jit`` and ``vmap``.

    Args:
        model, guide: NumPyro programs that take the arrays of ``data`` by name.
        params: the value of every parameter, for one seed.
        data: arrays of shape (N, ...).
        key: a random key.
        num_samples: draws of z per datum, one after the other in memory.

    Returns:
        Nats per datum. Its mean is the ELBO, its deviation over sqrt(N) the standard error.

    Raises:
        ValueError: a site lies outside the plate "data", so that it belongs to no datum.
    """
    draw = _log_weight(model, guide, params, data)
    return jnp.mean(lax.map(draw, random.split(key, num_samples)), axis=0)


def elbo_terms(
    model: Program,
    guide: Program,
    params: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    key: Array,
    num_samples: int = 1,
    batch_size: int = 500,
    progress: bool = False,
) -> ElboTerms:
    """The ELBO split into reconstruction and divergence (Kingma & Welling 2014, equation 3).

    Args:
        model, guide: NumPyro programs that take the arrays of ``data`` by name.
        params: the value of every parameter, for one seed.
        data: arrays of shape (N, ...).
        key: a random key.
        num_samples: draws of z per datum.
        batch_size: data at a time.
        progress: a progress bar, where there is a terminal.

    Raises:
        ValueError: a site lies outside the plate "data"; data that the programs refuse.
    """

    def judge(params: PyTree, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        draw = lambda key: _terms(model, guide, params, batch, key)  # noqa: E731
        return jax.tree.map(lambda x: x.mean(0), lax.map(draw, random.split(key, num_samples)))

    result = _over_data(
        judge, (model, guide), params, data, key, num_samples, batch_size, progress, "elbo"
    )
    terms = {name: Estimate(result[name], num_samples) for name in ("elbo", "reconstruction", "kl")}
    return ElboTerms(**terms, kl_per_dim=result["kl_per_dim"], z_loc=result["z_loc"])


def log_likelihood(
    model: Program,
    guide: Program,
    params: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    key: Array,
    num_samples: int = 1000,
    batch_size: int = 100,
    progress: bool = False,
) -> Estimate:
    """log p(x | c) by importance sampling from the guide (Burda et al. 2016, equation 8).

    log (1 / S) sum_s p(x, z_s | c) / q(z_s | x, c) with z_s from the guide: below log p(x | c) in
    expectation, by about half the ``monte_carlo_variance``, and it rises to it with S. The sum is
    kept as a running maximum and a scaled total, so that memory does not grow with S but for the
    3 sqrt(S) largest weights of each datum, from whose Pareto fit ``pareto_k`` comes. That needs
    30 draws; with fewer it is None.

    Args:
        model, guide, params, data, key, progress: as in ``elbo_terms``.
        num_samples: S, draws of z per datum.
        batch_size: data at a time.

    Raises:
        ValueError: as in ``elbo_terms``.
    """
    num_largest = _tail_length(num_samples) + 1 if num_samples >= FEWEST_FOR_TAIL else 0

    def judge(params: PyTree, key: Array, batch: Mapping[str, Array]) -> Any:
        draw = _log_weight(model, guide, params, batch)
        return _importance_sample(draw, key, num_samples, num_largest)

    values, variance, largest = _over_data(
        judge, (model, guide), params, data, key, num_samples, batch_size, progress, "log p"
    )
    pareto_k = _pareto_k(largest, num_samples) if num_largest else None
    return Estimate(values, num_samples, variance, pareto_k)


@dataclass(frozen=True)
class LabelCheck:
    """What a model knows of the label.

    Attributes:
        log_likelihood: (N, K), log p(x | c) of every datum under every label.
        c: (N,), the true labels.
        num_samples: draws of z for each datum and label.
    """

    log_likelihood: Float[np.ndarray, "N K"]
    c: Real[np.ndarray, " N"]
    num_samples: int

    @property
    def information(self) -> Estimate:
        """log p(x | c) - log mean_c' p(x | c'): nats that the label tells, at most log K."""
        values = self.log_likelihood.astype(np.float64)
        own = np.take_along_axis(values, self.c[:, None].astype(int), 1)[:, 0]
        mean = np.logaddexp.reduce(values, axis=1) - np.log(values.shape[1])
        return Estimate(own - mean, self.num_samples)

    @property
    def accuracy(self) -> Estimate:
        """The share of data whose true label has the greatest likelihood."""
        right = self.log_likelihood.argmax(1) == self.c
        return Estimate(right.astype(float), self.num_samples)


def label_check(
    model: Program,
    guide: Program,
    params: Mapping[str, Any],
    data: Mapping[str, Any],
    num_classes: int,
    *,
    key: Array,
    num_samples: int = 100,
    batch_size: int = 100,
    progress: bool = False,
) -> LabelCheck:
    """log p(x | c) under the true label and every other.

    For one and the same model and labels of equal probability the true label can tell no more
    than log K nats, so that a conditional likelihood beyond that over the mixture is a mistake.
    And argmax_c p(x | c) classifies.

    Args:
        model, guide, params, key, progress: as in ``elbo_terms``.
        data: arrays of shape (N, ...), the label among them as ``c``, 0 .. num_classes - 1.
        num_classes: K.
        num_samples: draws of z per datum and label.
        batch_size: data at a time.

    Raises:
        ValueError: as in ``elbo_terms``; no ``c`` among the data.
    """
    if "c" not in data:
        raise ValueError(f'data: expected labels as "c", got {sorted(data)}')

    def judge(params: PyTree, key: Array, batch: Mapping[str, Array]) -> Array:
        def under(label: Array) -> Array:
            given = dict(batch, c=jnp.full_like(batch["c"], label))
            draw = _log_weight(model, guide, params, given)
            return _importance_sample(draw, key, num_samples)[0]

        return lax.map(under, jnp.arange(num_classes)).T

    values = _over_data(
        judge, (model, guide), params, data, key, num_samples, batch_size, progress, "log p"
    )
    return LabelCheck(values, np.asarray(data["c"]), num_samples)


# --- one batch ------------------------------------------------------------------------------------


def _run(
    model: Program, guide: Program, params: Mapping[str, Any], data: Mapping[str, Any], key: Array
) -> tuple[dict[str, Array], dict[str, Any], dict[str, Array], dict[str, Any]]:
    """log q and its sites, log p and its sites, at one draw from the guide."""
    guide_key, model_key = random.split(key)
    log_q, q_sites = compute_log_probs(
        seed(guide, guide_key), (), dict(data), dict(params), sum_log_prob=False
    )
    log_p, p_sites = compute_log_probs(
        replay(seed(model, model_key), q_sites), (), dict(data), dict(params), sum_log_prob=False
    )
    return log_q, q_sites, log_p, p_sites


def _log_weight(
    model: Program, guide: Program, params: Mapping[str, Any], data: Mapping[str, ArrayLike]
) -> Callable[[Array], Float[Array, " N"]]:
    """From a key to log p(x, z | c) - log q(z | x, c) of every datum."""
    arrays = {name: jnp.asarray(array) for name, array in data.items()}

    def draw(key: Array) -> Array:
        log_q, q_sites, log_p, p_sites = _run(model, guide, params, arrays, key)
        size = length(arrays)
        return sum_by_datum(log_p, p_sites, size) - sum_by_datum(log_q, q_sites, size)

    return draw


def _terms(
    model: Program, guide: Program, params: PyTree, data: Mapping[str, Array], key: Array
) -> dict[str, Any]:
    """The terms of the ELBO at one draw."""
    log_q, q_sites, log_p, p_sites = _run(model, guide, params, data, key)
    size = length(data)
    observed = {name: log_p[name] for name in log_p if p_sites[name]["is_observed"]}
    prior = {name: log_p[name] for name in log_p if name not in observed}
    latents = [name for name in prior if name in log_q]
    per_dim = {}
    for name in latents:
        divergence = elementwise_kl(q_sites[name]["fn"], p_sites[name]["fn"])
        if divergence is not None:
            per_dim[name] = divergence.reshape(size, -1)
    kl = sum_by_datum(log_q, q_sites, size) - sum_by_datum(prior, p_sites, size)
    if len(latents) == len(log_q) == len(prior) == len(per_dim) == 1:
        kl = per_dim[latents[0]].sum(1)
    reconstruction = sum_by_datum(observed, p_sites, size)
    return {
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "kl_per_dim": per_dim,
        "z_loc": {name: mean(q_sites[name]["fn"], key).reshape(size, -1) for name in latents},
    }


def mean(fn: dist.Distribution, key: Array) -> Array:
    """The mean of a distribution, or of a thousand draws where it has no formula."""
    try:
        return fn.mean
    except NotImplementedError:
        draws = lax.map(lambda key: fn.sample(key, (10,)).mean(0), random.split(key, 100))
        return draws.mean(0)


def _importance_sample(
    draw: Callable[[Array], Array], key: Array, num_samples: int, num_largest: int = 0
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, "N largest"]]:
    """The log of the mean weight of every datum, the variance of that log over draws, and the
    largest log weights, from the greatest on.
    """
    at_once = min(num_samples, DRAWS_AT_ONCE)

    def add(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        greatest, total, squares, largest = carry
        log_w = jax.vmap(draw)(random.split(random.fold_in(key, i), at_once))
        counted = i * at_once + jnp.arange(at_once) < num_samples
        log_w = jnp.where(counted[:, None], log_w, -jnp.inf)
        new = jnp.maximum(greatest, log_w.max(0))
        old, w = jnp.exp(greatest - new), jnp.exp(log_w - new)
        largest = lax.top_k(jnp.concatenate([largest, log_w.T], axis=1), num_largest)[0]
        return new, old * total + w.sum(0), old**2 * squares + (w**2).sum(0), largest

    # The first draws may have no finite weight: a finite floor keeps the differences defined.
    shape = jax.eval_shape(draw, key).shape
    zeros, floor = jnp.zeros(shape), jnp.full(shape, jnp.finfo(jnp.float32).min)
    start = floor, zeros, zeros, jnp.full((*shape, num_largest), -jnp.inf)
    greatest, total, squares, largest = lax.fori_loop(0, -(-num_samples // at_once), add, start)
    return (
        greatest + jnp.log(total / num_samples),
        jnp.maximum(squares / total**2 - 1 / num_samples, 0.0),
        largest,
    )


def _tail_length(num_samples: int) -> int:
    """How many of the largest weights make the tail: floor(min(S / 5, 3 sqrt(S))), as in ArviZ.

    Vehtari et al. (2024, section 3.2.1) round up.
    """
    return int(min(num_samples // 5, 3 * num_samples**0.5))


def _pareto_k(largest: Float[np.ndarray, "N largest"], num_samples: int) -> Float[np.ndarray, " N"]:
    """ArviZ's k-hat of every datum, from the tail of its log weights and the one below it.

    ArviZ takes all the weights and looks at these alone, so that zeros stand for the others.
    """
    from arviz_stats.base.array import array_stats  # two seconds: SciPy, pandas, xarray

    log_w = largest.astype(np.float64)
    greatest, least = log_w[:, 0], log_w[:, -2]  # of the tail
    pareto_k = np.full(len(log_w), np.nan)
    finite = np.isfinite(greatest)
    # Differences of a few units in the last place are rounding, which is no tail.
    rounding = 64 * np.finfo(np.float32).eps * np.maximum(1, np.abs(greatest))
    constant = finite & (greatest - np.where(finite, least, 0) <= rounding)
    pareto_k[constant] = -np.inf
    for i in np.flatnonzero(finite & ~constant):
        weights = np.zeros(num_samples)
        weights[: log_w.shape[1]] = np.exp(log_w[i] - greatest[i])
        pareto_k[i] = array_stats.pareto_khat(weights[None], r_eff=1.0, tail="right")
    return pareto_k


# --- all the data ---------------------------------------------------------------------------------


def _over_data(
    judge: Callable[[PyTree, Array, Mapping[str, Array]], PyTree],
    programs: tuple[Program, Program],
    params: Mapping[str, Any],
    data: Mapping[str, Any],
    key: Array,
    num_samples: int,
    batch_size: int,
    progress: bool,
    description: str,
) -> PyTree:
    """``judge(params, key, batch)`` on every batch, its arrays (batch, ...) joined."""
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    num_data = check_data(data, None)
    check_values(programs, data)
    size = min(batch_size, num_data)
    compiled = jax.jit(judge)
    results, mean = [], 0.0
    with tqdm(total=num_data, unit="datum", disable=None if progress else True) as bar:
        for i, start in enumerate(range(0, num_data, size)):
            index = np.minimum(np.arange(start, start + size), num_data - 1)  # the last one is full
            batch = {name: array[index] for name, array in data.items()}
            result = jax.device_get(compiled(params, random.fold_in(key, i), batch))
            count = min(size, num_data - start)
            results.append(jax.tree.map(lambda x, n=count: x[:n], result))
            if not bar.disable:
                first = jax.tree.leaves(results[-1])[0]
                mean += (float(first.mean()) - mean) * count / (start + count)
                bar.set_postfix({description: f"{mean:.4f}"}, refresh=False)
                bar.update(count)
    return jax.tree.map(lambda *x: np.concatenate(x), *results)
