"""Judges: what a fit is worth, in nats per datum.

A judge takes a fit and data, and answers for every seed at once. Where the fit has a
``preprocess``, the data are prepared: ``test = result.prepare(data)``.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax, random
from jaxtyping import Array, Bool, Float, PyTree, Real
from numpyro.handlers import seed
from numpyro.infer.util import compute_log_probs

from inference._judges import (
    Judged,
    compiled,
    default_key,
    judged_data,
    over_data,
    require_local,
    shared_draws,
)
from inference._settings import require_whole
from inference._summation import Sums, joint_values, local, log_weights, run
from inference.fit import Fit
from inference.sites import DataPlates, Program, base, elementwise_kl, is_auxiliary, length

DRAWS_AT_ONCE = 20  # of every datum of a batch, in memory together
BY_DATUM = ("pointwise", "monte_carlo_variance", "pareto_k")  # the arrays (seed, N) of an Estimate
FEWEST_FOR_TAIL = 30  # draws: six of them make the smallest tail that ArviZ can fit


@dataclass(frozen=True)
class Estimate:
    """One number for each seed and datum, and their means over the data.

    Attributes:
        name: what is estimated, for example "log_likelihood".
        pointwise: (seed, N), nats per datum.
        num_samples: draws of the latents for each datum.
        data: the type, shape and hash of each array that was judged.
        monte_carlo_variance: (seed, N), the variance that comes from the Monte Carlo draws (to
            first order in 1 / num_samples), where it is known.
        shared_error: (seed,), the Monte Carlo error of the mean where all data share draws of
            global sites. Then the errors of single data do not average out.
        pareto_k: (seed, N), the shape k-hat of the tail of each datum's importance weights
            (Vehtari et al. 2024, section 3), from 30 draws on. -inf if
            all weights in the tail are equal (the lightest possible tail). NaN if none could be
            fitted.
    """

    name: str
    pointwise: Float[np.ndarray, "seed N"]
    num_samples: int
    data: dict[str, str]
    monte_carlo_variance: Float[np.ndarray, "seed N"] | None = None
    pareto_k: Float[np.ndarray, "seed N"] | None = None
    shared_error: Float[np.ndarray, " seed"] | None = None

    @property
    def estimate(self) -> Float[np.ndarray, " seed"]:
        """The mean over the data, one a seed."""
        return np.mean(self.pointwise, axis=1, dtype=np.float64)

    @property
    def standard_error(self) -> Float[np.ndarray, " seed"]:
        """The error of the mean, over data and draws: the deviation between data over sqrt(N)."""
        deviation = np.std(self.pointwise, axis=1, dtype=np.float64)
        return deviation / np.sqrt(self.pointwise.shape[1])

    @property
    def monte_carlo_error(self) -> Float[np.ndarray, " seed"]:
        """The error of the mean that comes from the draws: how much it would move on these data."""
        if self.shared_error is not None:
            return self.shared_error
        if self.monte_carlo_variance is None:
            return np.full(len(self.pointwise), np.nan)
        return np.sqrt(np.sum(self.monte_carlo_variance, axis=1)) / self.pointwise.shape[1]

    @property
    def high_pareto_k(self) -> "Estimate | None":
        """The share of data with a k-hat that is not below ``pareto_k_threshold``: too high.

        The error of their number is larger than ``monte_carlo_error`` says, and falls slowly
        with more draws: the guide is too narrow there, or in the wrong place.
        """
        if self.pareto_k is None:
            return None
        good = self.pareto_k < pareto_k_threshold(self.num_samples)  # NaN is not
        return Estimate("high_pareto_k", (~good).astype(float), self.num_samples, self.data)


def difference(name: str, a: Estimate, b: Estimate) -> Estimate:
    """a - b, datum by datum, of estimates on the same data. Their draws are independent."""
    variances = a.monte_carlo_variance, b.monte_carlo_variance
    return Estimate(
        name,
        a.pointwise.astype(np.float64) - b.pointwise.astype(np.float64),
        min(a.num_samples, b.num_samples),
        b.data,
        None if variances[0] is None or variances[1] is None else variances[0] + variances[1],
    )


def joined(parts: Sequence[Estimate], axis: int) -> Estimate:
    """Estimates of several seeds (axis 0) or several data (axis 1) as one."""

    def along(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if any(a is None for a in arrays) else np.concatenate(arrays, axis)

    return replace(parts[0], **{name: along(name) for name in BY_DATUM})


@dataclass(frozen=True)
class ElboTerms:
    """The ELBO of each datum, and its terms.

    With global sites every term is an expectation over their q, and ``elbo`` is a bound on
    E_q [log p(x | c, globals)]: the divergence of the globals, ``kl_of_globals``, is no part of it.

    Attributes:
        elbo, reconstruction, kl: with elbo = reconstruction - kl. The divergence is exact where
            the program has one latent site and NumPyro knows the formula, and else the mean over
            draws of log q(z | x, c) - log p(z | c).
        kl_by_site: by local site, its part of ``kl``: the mean over draws of log q - log p of this
            site, given the sites before.
        kl_of_globals: by global site, (seed,), likewise, in nats per datum of the training data.
        kl_per_dim: by latent site, (seed, N, dimensions), where guide and prior factorise over
            dimensions and NumPyro knows the formula.
        z_loc: by latent site, (seed, N, dimensions), the mean of q(z | x, c). Of a site that
            follows others it is the mean over their draws.
        z_loc_noise: likewise, half the difference of that mean between two halves of the draws.
            Zero for a site that follows no other.
    """

    elbo: Estimate
    reconstruction: Estimate
    kl: Estimate
    kl_by_site: dict[str, Estimate]
    kl_of_globals: dict[str, Float[np.ndarray, " seed"]]
    kl_per_dim: dict[str, Float[np.ndarray, "seed N _"]]
    z_loc: dict[str, Float[np.ndarray, "seed N _"]]
    z_loc_noise: dict[str, Float[np.ndarray, "seed N _"]]

    @property
    def activity(
        self,
    ) -> dict[str, tuple[Float[np.ndarray, "seed _"], Float[np.ndarray, "seed _"]]]:
        """By latent site: the variance over data of z_loc, and its standard error.

        It is the covariance of two halves of the draws. So what z_loc varies by the draws of the
        sites before does not count, on average.
        """
        moments = {}
        for name, z_loc in self.z_loc.items():
            centred, noise = (a - a.mean(1, keepdims=True) for a in (z_loc, self.z_loc_noise[name]))
            squares = centred**2 - noise**2
            moments[name] = squares.mean(1), squares.std(1) / np.sqrt(squares.shape[1])
        return moments

    @property
    def active(self) -> dict[str, Bool[np.ndarray, "seed _"]]:
        """By latent site: is that variance above 0.01 (Burda et al. 2016, section 5)?

        A guide that ignores a dimension gives every datum the prior's mean. With a learned prior
        that mean itself depends on the condition: look at ``kl_per_dim`` then.
        """
        return {name: variance > 0.01 for name, (variance, _) in self.activity.items()}


@dataclass(frozen=True)
class LabelCheck:
    """What a model knows of the label.

    Attributes:
        log_likelihood: (seed, N, K), log p(x | c) of every datum under every label.
        c: (N,), the true labels.
        num_samples: draws of the latents for each datum and label.
        data: the type, shape and hash of each array that was judged.
    """

    log_likelihood: Float[np.ndarray, "seed N K"]
    c: Real[np.ndarray, " N"]
    num_samples: int
    data: dict[str, str]

    @property
    def information(self) -> Estimate:
        """log p(x | c) - log mean_c' p(x | c'): nats that the label tells, at most log K."""
        values = self.log_likelihood.astype(np.float64)
        own = np.take_along_axis(values, self.c[None, :, None].astype(int), 2)[..., 0]
        mean = np.logaddexp.reduce(values, axis=2) - np.log(values.shape[2])
        return Estimate("label_information", own - mean, self.num_samples, self.data)

    @property
    def accuracy(self) -> Estimate:
        """The share of data for which the true label has the greatest likelihood."""
        right = self.log_likelihood.argmax(2) == self.c
        return Estimate("label_accuracy", right.astype(float), self.num_samples, self.data)


def pareto_k_threshold(num_samples: int) -> float:
    """k-hat is good below it: min(1 - 1 / log10 S, 0.7) (Vehtari et al. 2024, section 3.2.4)."""
    return float(min(1 - 1 / np.log10(num_samples), 0.7)) if num_samples > 1 else -np.inf


# --- judges ---------------------------------------------------------------------------------------


def pointwise_elbo(
    result: Fit,
    data: Any,
    *,
    key: Array | None = None,
    num_samples: int = 1,
    batch_size: int = 500,
    progress: bool = False,
) -> Estimate:
    """The ELBO of each datum: the mean over draws of log p(x, z | c) - log q(z | x, c).

    Sites that the objective sums over are summed exactly. With global sites it is the mean over
    their draws, and their divergence is no part of it.

    Args:
        result: what ``fit`` returned.
        data: as the programs take them, or ``result.prepare(data)``.
        key: a random key. A fixed one by default.
        num_samples: draws of the latents per datum.
        batch_size: data at a time.
        progress: whether to show progress.

    Returns:
        Nats per datum, (seed, N).

    Raises:
        ValueError: data that the programs refuse; a model without a plate for its data.
    """
    judged, key = _enter("pointwise_elbo", result, data, key, num_samples, allows_globals=True)
    judge = compiled(_mean_log_weight, *programs_and_sums(result, judged), num_samples)
    values = over_data(judge, result, judged, key, batch_size, progress, "ELBO")
    return Estimate("elbo", values, num_samples, judged.described)


def elbo_terms(
    result: Fit,
    data: Any,
    *,
    key: Array | None = None,
    num_samples: int = 1,
    batch_size: int = 500,
    progress: bool = False,
) -> ElboTerms:
    """The ELBO split into reconstruction and divergence (Kingma & Welling 2014, equation 3).

    Args:
        result, data, key, num_samples, batch_size, progress: as in ``pointwise_elbo``.

    Raises:
        ValueError: as in ``pointwise_elbo``; sites that the objective sums over.
    """
    judged, key = _enter("elbo_terms", result, data, key, num_samples, allows_globals=True)
    if judged.programs.summed:
        raise ValueError(
            f"elbo_terms: expected latent sites that the guide draws, got "
            f"{judged.programs.summed[0]!r}, which is summed over and has no divergence of its "
            f"own; use pointwise_elbo or log_likelihood"
        )
    judge = compiled(_mean_terms, *programs_and_sums(result, judged), num_samples)
    found = over_data(judge, result, judged, key, batch_size, progress, "ELBO")

    def estimate(name: str, values: Any) -> Estimate:
        return Estimate(name, values, num_samples, judged.described)

    return ElboTerms(
        **{name: estimate(name, found[name]) for name in ("elbo", "reconstruction", "kl")},
        kl_by_site={n: estimate(f"kl of {n}", v) for n, v in found["kl_by_site"].items()},
        kl_of_globals={
            name: values.mean(1) / result.config["num_data"]
            for name, values in found["kl_of_globals"].items()
        },
        kl_per_dim=found["kl_per_dim"],
        z_loc=found["z_loc"],
        z_loc_noise=found["z_loc_noise"],
    )


def log_likelihood(
    result: Fit,
    data: Any,
    *,
    key: Array | None = None,
    num_samples: int = 1000,
    batch_size: int = 100,
    progress: bool = False,
) -> Estimate:
    """log p(x | c) by importance sampling from the guide (Burda et al. 2016, equation 8).

    log (1 / S) sum_s p(x, z_s | c) / q(z_s | x, c) with z_s from the guide. Its expectation is
    below log p(x | c), by about half the ``monte_carlo_variance``, and rises to it with S. Sites
    that the objective sums over are summed exactly. The sum is kept as a running maximum and a
    scaled total. So memory does not grow with S, except for the 3 sqrt(S) largest weights of each
    datum, which ``pareto_k`` is fitted to. That needs 30 draws; with fewer it is None.

    Args:
        result, data, key, progress: as in ``pointwise_elbo``.
        num_samples: S, draws of the latents per datum.
        batch_size: data at a time.

    Raises:
        ValueError: as in ``pointwise_elbo``; global sites: see ``log_predictive_density``.
    """
    judged, key = _enter("log_likelihood", result, data, key, num_samples)
    num_largest = _tail_length(num_samples) + 1 if num_samples >= FEWEST_FOR_TAIL else 0
    judge = compiled(_importance, *programs_and_sums(result, judged), num_samples, num_largest)
    found = over_data(judge, result, judged, key, batch_size, progress, "log p")
    values, variance, largest = found
    pareto_k = None
    if num_largest:
        pareto_k = np.stack([_pareto_k(of_seed, num_samples) for of_seed in largest])
    return Estimate("log_likelihood", values, num_samples, judged.described, variance, pareto_k)


def log_predictive_density(
    result: Fit,
    data: Any,
    *,
    key: Array | None = None,
    num_samples: int = 1000,
    num_local_samples: int = 100,
    batch_size: int = 100,
    progress: bool = False,
) -> Estimate:
    """log p(x_n | c_n, training data) of every datum, with the globals' posterior replaced by q.

    log (1 / S) sum_s p(x_n | c_n, theta_s). The theta_s are draws of the global sites from the
    guide. They are not weighted, and all data share them. p(x_n | c_n, theta_s) is a formula where
    the model has no local sites. Else it is the mean importance weight of ``num_local_samples``
    draws.
    Without global sites it is ``log_likelihood`` with as many local draws. (Gelman et al. 2014,
    section 2.4, call it the log pointwise predictive density.)

    The mean over the data has the Monte Carlo error ``shared_error``: by the delta method, from the
    deviation between draws of sum_n p(x_n | theta_s) / mean_s p(x_n | theta_s).

    Args:
        result, data, key, progress: as in ``pointwise_elbo``.
        num_samples: S, joint draws of the global sites.
        num_local_samples: draws of the local sites for each datum and each of those.
        batch_size: data at a time.

    Raises:
        ValueError: as in ``pointwise_elbo``; sites that the objective sums over.
    """
    name = "log_predictive_density"
    judged, key = _enter(name, result, data, key, num_samples, allows_globals=True)
    require_whole("num_local_samples", num_local_samples, 1)
    programs = judged.programs
    if programs.summed:
        raise ValueError(
            f"{name}: expected latent sites that the guide draws, got {programs.summed[0]!r}, "
            f"which is summed over; observe it, or use pointwise_elbo"
        )
    if not programs.has_globals:
        num_samples, num_local_samples = 1, num_samples * num_local_samples
    shared = tuple(n for n, axes in programs.latents.items() if axes.data_axis is None)
    sizes = num_samples, num_local_samples if len(shared) < len(programs.latents) else 1
    judge = compiled(_predictive, *programs_and_sums(result, judged), shared, *sizes)
    ratios = np.zeros((result.num_seeds, num_samples))
    seeds = itertools.cycle(range(result.num_seeds))  # in the order in which they are judged

    def one_batch(values: Any, batch_key: Array, batch: Any, is_new: Any) -> Any:
        *found, of_batch = judge(values, key, batch_key, batch, is_new)
        ratios[next(seeds)] += np.asarray(of_batch, np.float64)
        return tuple(found)

    def is_new(_: int, rows: np.ndarray) -> np.ndarray:
        return np.append(True, np.diff(rows) > 0)  # the last batch is filled up with its last datum

    values, variance = over_data(
        one_batch, result, judged, key, batch_size, progress, "log p", is_new
    )
    error = np.full(result.num_seeds, np.nan)
    if num_samples > 1:
        error = ratios.std(1, ddof=1) / np.sqrt(num_samples) / values.shape[1]
    elif not programs.has_globals:
        error = np.sqrt(variance.sum(1)) / values.shape[1]
    return Estimate(
        name,
        values,
        num_samples,
        judged.described,
        monte_carlo_variance=variance,
        shared_error=error,
    )


def label_check(
    result: Fit,
    data: Any,
    num_classes: int,
    *,
    key: Array | None = None,
    num_samples: int = 100,
    batch_size: int = 100,
    progress: bool = False,
) -> LabelCheck:
    """log p(x | c) under the true label and every other.

    With labels of equal probability the true label can tell no more than log K nats. A conditional
    likelihood that is further above the mixture is a mistake. And argmax_c p(x | c) classifies.

    Args:
        result, key, progress: as in ``pointwise_elbo``.
        data: arrays of shape (N, ...), the label among them as ``c``, 0 .. num_classes - 1.
        num_classes: K.
        num_samples: draws of the latents per datum and label.
        batch_size: data at a time.

    Raises:
        ValueError: as in ``pointwise_elbo``; no ``c`` among the data.
    """
    judged, key = _enter("label_check", result, data, key, num_samples)
    if "c" not in judged.arrays:
        raise ValueError(f'data: expected labels as "c", got {sorted(judged.arrays)}')
    require_whole("num_classes", num_classes, 1)
    judge = compiled(_under_labels, *programs_and_sums(result, judged), num_classes, num_samples)
    values = over_data(judge, result, judged, key, batch_size, progress, "log p")
    return LabelCheck(values, np.asarray(judged.arrays["c"]), num_samples, judged.described)


def pointwise_log_likelihood(
    result: Fit,
    draws: Mapping[str, Any],
    data: Any,
    *,
    batch_size: int = 500,
    progress: bool = False,
) -> dict[str, Float[np.ndarray, "seed draw N"]]:
    """log p(x | z, c) of every datum at draws of the latents: what ArviZ calls log likelihood.

    Args:
        result, data, progress: as in ``pointwise_elbo``. Global sites are welcome.
        draws: by latent site, as ``sample_posterior`` returns them.
        batch_size: data at a time.

    Returns:
        By observed site, (seed, draw, datum), nats.

    Raises:
        ValueError: draws of other sites or shapes; sites that the objective sums over; a model
            without a plate for its data.
    """
    judged = judged_data(result, data)
    programs, num_data = judged.programs, length(judged.arrays)
    if not programs.plates or programs.summed:
        what = (
            f"the site {programs.summed[0]!r}, which is summed over"
            if programs.summed
            else ("a model without a plate for its data")
        )
        raise ValueError(
            f"pointwise_log_likelihood: expected one density for each datum given the draws, got "
            f"{what}; use log_likelihood, or put the data in a plate"
        )
    draws = check_draws(result, judged, draws, num_data)
    local = {name for name in draws if programs.latents[name].data_axis is not None}

    def rows(seed: int, index: Any) -> dict[str, Any]:
        return {
            name: values[seed][:, index] if name in local else values[seed]
            for name, values in draws.items()
        }

    axes = tuple((name, programs.latents[name].data_axis) for name in draws)
    judge = compiled(_given_draws, result.model, programs.plates, axes)
    key = random.key(0)  # observed densities need no draws
    found = over_data(judge, result, judged, key, batch_size, progress, "log p", rows)
    return {name: values.swapaxes(1, 2) for name, values in found.items()}


def check_draws(
    result: Fit, judged: Judged, draws: Any, num_data: int
) -> dict[str, Real[np.ndarray, "seed draw ..."]]:
    """Draws of every latent site of a fit, as arrays.

    Raises:
        TypeError: no mapping.
        ValueError: other sites, or other shapes.
    """
    if not isinstance(draws, Mapping):
        raise TypeError(
            f"draws: expected a mapping from latent site to draws, got {type(draws).__name__}; "
            f"write draws = sample_posterior(result, data)"
        )
    latents = judged.programs.latents
    if draws.keys() != latents.keys():
        raise ValueError(
            f"draws: expected the latent sites {', '.join(latents)}, got {', '.join(draws)}; "
            f"write draws = sample_posterior(result, data)"
        )
    arrays = {name: np.asarray(values) for name, values in draws.items()}
    for name, values in arrays.items():
        local = latents[name].data_axis is not None
        expected = (result.num_seeds, None, *((num_data,) if local else ()))
        got = values.shape[: len(expected)]
        if len(got) < len(expected) or any(
            n not in (None, m) for n, m in zip(expected, got, strict=True)
        ):
            words = ("seed", "draw", "datum")[: len(expected)]
            raise ValueError(
                f"draws[{name!r}]: expected shape ({', '.join(words)}, ...) with "
                f"{result.num_seeds} seeds and {num_data} data, got {values.shape}"
            )
    return arrays


def _enter(
    name: str,
    result: Fit,
    data: Any,
    key: Array | None,
    num_samples: int,
    allows_globals: bool = False,
) -> tuple[Judged, Array]:
    """The checks of a judge that has a number for each datum."""
    require_whole("num_samples", num_samples, 1)
    judged = judged_data(result, data)
    require_local(judged, name, allows_globals=allows_globals and not judged.programs.summed)
    return judged, default_key(key, name)


def programs_and_sums(result: Fit, judged: Judged) -> tuple[Program, Program, DataPlates, Sums]:
    """Model, guide, plates of the data and sites to sum over: what a compiled judge begins with."""
    programs = judged.programs
    sums = Sums(bool(programs.summed), programs.enumerated)
    return result.model, result.guide, programs.plates, sums


# --- one batch ------------------------------------------------------------------------------------


def _importance_weights(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    params: Mapping[str, Any],
    data: Mapping[str, Array],
) -> Callable[[Array], Float[Array, " N"]]:
    """From a key to log sum_k p(x, z_k, k | c) / q(z_k | x, c, k) of every datum.

    k stands for the summed sites. Without any it is log p(x, z | c) - log q(z | x, c).
    """
    draw = log_weights(model, guide, plates, sums, params, data)
    return lambda key: jax.nn.logsumexp(draw(key)[0], axis=0)


def _mean_log_weight(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    num_samples: int,
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
) -> Float[Array, " N"]:
    weights = log_weights(model, guide, plates, sums, params, batch)

    def draw(key: Array) -> Array:
        log_w, log_q = weights(key)
        return _expected(log_w - log_q, log_q)

    return jnp.mean(lax.map(draw, random.split(key, num_samples)), axis=0)


def _expected(values: Float[Array, "J N *rest"], log_q: Float[Array, "J N"]) -> Array:
    """The mean over the guide's summed sites."""
    q = jnp.exp(log_q).reshape(*log_q.shape, *[1] * (values.ndim - 2))
    return jnp.where(q > 0, q * values, 0.0).sum(0)


def _importance(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    num_samples: int,
    num_largest: int,
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
) -> Any:
    draw = _importance_weights(model, guide, plates, sums, params, batch)
    return importance_sample(draw, key, num_samples, num_largest)


def _predictive(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    shared: tuple[str, ...],
    num_samples: int,
    num_local_samples: int,
    params: PyTree,
    key: Array,
    batch_key: Array,
    batch: Mapping[str, Array],
    is_new: Bool[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " draw"]]:
    """log p(x), the variance of that log over draws of the globals, and for each such draw the sum
    over the data of p(x | globals) / p(x).
    """
    at_once = min(num_local_samples, DRAWS_AT_ONCE)

    def given_globals(keys: tuple[Array, Array]) -> tuple[Array, Array]:
        same = shared_draws(guide, shared, params, keys[0], batch)
        draw = _importance_weights(model, guide, plates, sums, params | same, batch)
        if num_local_samples == 1:
            log_w = draw(keys[1])
            return log_w, jnp.zeros_like(log_w)
        return importance_sample(draw, keys[1], num_local_samples)[:2]

    keys = random.split(key, num_samples), random.split(batch_key, num_samples)
    log_p, within = lax.map(given_globals, keys, batch_size=max(1, DRAWS_AT_ONCE // at_once))
    greatest = log_p.max(0)
    safe = jnp.where(jnp.isfinite(greatest), greatest, 0)
    weights = jnp.exp(log_p - safe)
    mean = weights.mean(0)
    ratios = weights / jnp.where(mean > 0, mean, 1)
    spread = ratios.var(0, ddof=1) / num_samples if num_samples > 1 else within[0]
    return safe + jnp.log(mean), spread, jnp.where(is_new, ratios, 0).sum(1)


def _under_labels(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    num_classes: int,
    num_samples: int,
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
) -> Float[Array, "N K"]:
    def under(label: Array) -> Array:
        given = dict(batch, c=jnp.full_like(batch["c"], label))
        draw = _importance_weights(model, guide, plates, sums, params, given)
        return importance_sample(draw, key, num_samples)[0]

    return lax.map(under, jnp.arange(num_classes)).T


def _given_draws(
    model: Program,
    plates: DataPlates,
    axes: tuple[tuple[str, int | None], ...],
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
    draws: Mapping[str, Array],
) -> dict[str, Float[Array, "N draw"]]:
    """log p(x | z, c) by observed site."""
    one = functools.partial(given_latents, model, plates, axes, params, key, batch)
    return jax.tree.map(lambda x: x.T, lax.map(one, dict(draws)))


def given_latents(
    model: Program,
    plates: DataPlates,
    axes: tuple[tuple[str, int | None], ...],
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
    latents: Mapping[str, Array],
) -> dict[str, Float[Array, " N"]]:
    """log p(x | z, c) of every datum at one value of the latents, by observed site.

    Args:
        model: a program.
        plates: those that hold the data.
        axes: each latent site, and the axis of its value along which the data lie.
        params: its parameters and mutable state.
        key: for private draws of the model.
        batch: arrays of shape (N, ...).
        latents: by site, the data first.
    """
    values = dict(latents)
    for name, axis in axes:
        if axis is not None:
            values[name] = jnp.moveaxis(values[name], 0, axis)
    log_p, sites = compute_log_probs(
        seed(model, key), (), dict(batch), dict(params) | values, sum_log_prob=False
    )
    return {
        name: plates.sum_by_datum({name: log_p[name]}, sites, length(batch))
        for name, site in sites.items()
        if name in log_p and site["is_observed"] and not is_auxiliary(site)
    }


def _mean_terms(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    num_samples: int,
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
) -> dict[str, Any]:
    def draw(key: Array) -> dict[str, Any]:
        def at(values: Mapping[str, Array]) -> tuple[dict[str, Any], Array]:
            return _terms(model, guide, plates, sums.in_guide, params | values, batch, key)

        if not sums.in_guide:
            return at({})[0]
        joint = joint_values(guide, plates, sums.in_guide, params, batch, key)
        terms, log_q = jax.vmap(at)(joint)
        return jax.tree.map(lambda term: _expected(term, log_q), terms)

    terms = lax.map(draw, random.split(key, num_samples))
    terms["z_loc_noise"] = {name: _half_difference(z) for name, z in terms["z_loc"].items()}
    return jax.tree.map(lambda x: x.mean(0), terms)


def _half_difference(draws: Float[Array, "draw N z"]) -> Float[Array, "1 N z"]:
    """Half the difference of the means of two halves of the draws. Zero for a single draw.

    It varies by the draws as much as the mean over all draws does.
    """
    half = len(draws) // 2
    if not half:
        return jnp.zeros_like(draws)
    first, second = draws[:half].mean(0), draws[half : 2 * half].mean(0)
    return ((2 * half / len(draws)) ** 0.5 * (first - second) / 2)[None]


def _terms(
    model: Program,
    guide: Program,
    plates: DataPlates,
    summed: tuple[str, ...],
    params: PyTree,
    data: Mapping[str, Array],
    key: Array,
) -> tuple[dict[str, Any], Float[Array, " N"]]:
    """The terms of the ELBO at one draw, and log q of the guide's summed sites."""
    log_q, q_sites, log_p, p_sites = run(model, guide, params, data, key)
    size = length(data)
    of_globals = {
        name: jnp.broadcast_to((log_q[name] - log_p[name]).sum(), (size,))
        for name in log_q
        if name in log_p and not plates.hold(q_sites[name])
    }
    log_q, log_p = local(log_q, q_sites, plates), local(log_p, p_sites, plates)

    def by_datum(site: Any, values: Array, num_event: int) -> Float[Array, "N z"]:
        return jnp.moveaxis(values, plates.axis(site) - num_event, 0).reshape(size, -1)

    observed = {name: log_p[name] for name in log_p if p_sites[name]["is_observed"]}
    prior = {name: log_p[name] for name in log_p if name not in observed}
    latents = [name for name in prior if name in log_q]
    per_dim = {}
    for name in latents:
        divergence = elementwise_kl(q_sites[name]["fn"], p_sites[name]["fn"])
        if divergence is not None:
            per_dim[name] = by_datum(q_sites[name], divergence, q_sites[name]["fn"].event_dim)
    by_site = {
        name: plates.sum_by_datum({name: log_q[name]}, q_sites, size)
        - plates.sum_by_datum({name: prior[name]}, p_sites, size)
        for name in latents
    }
    kl = plates.sum_by_datum(log_q, q_sites, size) - plates.sum_by_datum(prior, p_sites, size)
    if len(latents) == len(log_q) == len(prior) == len(per_dim) == 1:
        kl = by_site[latents[0]] = per_dim[latents[0]].sum(1)
    reconstruction = plates.sum_by_datum(observed, p_sites, size)
    terms = {
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "kl_by_site": by_site,
        "kl_of_globals": of_globals,
        "kl_per_dim": per_dim,
        "z_loc": {n: by_datum(q_sites[n], *_centre(q_sites[n]["fn"], key)) for n in latents},
    }
    return terms, plates.sum_by_datum({name: log_q[name] for name in summed}, q_sites, size)


def _centre(fn: dist.Distribution, key: Array) -> tuple[Array, int]:
    """The mean of a distribution, of a Categorical its probabilities; the axes of one event."""
    plain = base(fn)
    if isinstance(plain, dist.CategoricalLogits | dist.CategoricalProbs):
        shape = (*fn.batch_shape, *fn.event_shape, plain.probs.shape[-1])
        return jnp.broadcast_to(plain.probs, shape), fn.event_dim + 1
    return mean(fn, key), fn.event_dim


def mean(fn: dist.Distribution, key: Array) -> Array:
    """The mean of a distribution, or of a thousand draws where it has no formula."""
    try:
        return fn.mean
    except NotImplementedError:
        draws = lax.map(lambda key: fn.sample(key, (10,)).mean(0), random.split(key, 100))
        return draws.mean(0)


def importance_sample(
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
    one = jax.eval_shape(draw, key)
    zeros, floor = jnp.zeros_like(one), jnp.full_like(one, jnp.finfo(one.dtype).min)
    start = floor, zeros, zeros, jnp.full((*one.shape, num_largest), -jnp.inf, one.dtype)
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
