"""What a guide loses: the gap between log p(x | c) and the ELBO, in two parts.

Let q* be the best guide of the same family that has numbers of each datum's own in place of an
encoder. Then (Cremer, Li & Duvenaud 2018, equations 3 to 5; they call the sum the inference gap)

    log p(x | c) - L[q]  =  (log p(x | c) - L[q*])  +  (L[q*] - L[q])
        total                   approximation            amortisation

- A large *approximation* gap asks for a richer family.
- A large *amortisation* gap asks for a larger encoder, or for more training of it.

q* is fitted to the judged data with the model held.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from jaxtyping import Array, Float
from numpyro.infer import TraceEnum_ELBO
from numpyro.infer.elbo import ELBO

from inference._data import Prepared
from inference._feeds import put_rows
from inference._judges import Judged, default_key, judged_data, require_local, values_of
from inference._settings import require_whole
from inference.engine import fit
from inference.evaluation import BY_DATUM, Estimate, difference, joined, pointwise_elbo
from inference.evaluation import log_likelihood as importance_sampled
from inference.fit import Fit, programs_of
from inference.held import Held
from inference.objectives import StickingTheLanding
from inference.sites import HasPerDatum, abstract, abstract_sites, length, stored_names

NAME = "inference_gap"
NUM_ROUNDS = 10  # The draws of an ELBO come in so many rounds. Their deviation is the error.
NUM_PARTICLES = 10  # draws of each datum in every step of q*'s fit
FEWEST_STEPS = 20  # A tenth of them has a deviation.
AVERAGE = 0.2  # the last part of q*'s fit, over which its parameters are averaged
TOLERANCE = 0.01  # nats per datum that are never worth a warning


@dataclass(frozen=True, repr=False)
class InferenceGap:
    """The gap of each datum and its two parts: total = approximation + amortisation.

    ``print`` shows a table of the means. Every gap is an ``Estimate`` of paired differences, and so
    is its ``standard_error``.

    Attributes:
        log_likelihood: log p(x | c).
        elbo: the ELBO of the guide, L[q].
        best_elbo: the ELBO of the best guide of its family, L[q*].
        amortisation: L[q*] - L[q], what the encoder loses. Both have the same draws. Its
            ``monte_carlo_variance`` comes from the paired differences.
        rise: (seed,), how much the ELBO of q* rose in the last tenth of its fit over the tenth
            before, nats per datum. 0 if there was nothing to fit.
        rise_error: (seed,), the standard error of ``rise``.
    """

    log_likelihood: Estimate
    elbo: Estimate
    best_elbo: Estimate
    amortisation: Estimate
    rise: Float[np.ndarray, " seed"]
    rise_error: Float[np.ndarray, " seed"]

    @property
    def total(self) -> Estimate:
        """log p(x | c) - L[q]: what the guide loses."""
        return difference("total_gap", self.log_likelihood, self.elbo)

    @property
    def approximation(self) -> Estimate:
        """log p(x | c) - L[q*]: what the family loses."""
        return difference("approximation_gap", self.log_likelihood, self.best_elbo)

    def __repr__(self) -> str:
        """A table, one row a seed: means over the data and their standard errors."""
        columns = {
            "log p": self.log_likelihood,
            "ELBO": self.elbo,
            "best ELBO": self.best_elbo,
            "total": self.total,
            "approximation": self.approximation,
            "amortisation": self.amortisation,
        }
        rows = [["seed", *columns]]
        for i in range(len(self.elbo.pointwise)):
            pairs = ((e.estimate[i], e.standard_error[i]) for e in columns.values())
            rows.append([str(i), *(f"{mean:.3f} +- {error:.3f}" for mean, error in pairs)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        num_data = self.elbo.pointwise.shape[1]
        lines.append(
            f"Nats per datum +- standard error over {num_data} data. "
            f"Total = approximation + amortisation."
        )
        high = self.log_likelihood.high_pareto_k
        if high is not None and high.pointwise.any():
            shares = ", ".join(f"{share:.1%}" for share in high.estimate)
            lines.append(
                f"k-hat is too high for {shares} of the data: log p and total may be too low."
            )
        return "\n".join(lines)


def inference_gap(
    result: Fit,
    data: Any,
    *,
    log_likelihood: Estimate | None = None,
    num_steps: int = 2000,
    learning_rate: float = 0.02,
    num_samples: int = 1000,
    key: Array | None = None,
    batch_size: int = 500,
    progress: bool = False,
) -> InferenceGap:
    """log p(x | c) - ELBO = approximation + amortisation (Cremer, Li & Duvenaud 2018, equation 5).

    The best guide q* of the family is ``result.guide.per_datum(num_data)``, fitted to the judged
    data. Each seed has a fit with its own model held. It starts where its family starts. Adam takes
    ``num_steps`` steps, each on all data of a batch, along ``StickingTheLanding``. With discrete
    sites that can be summed over it takes ``TraceEnum_ELBO``. The parameters of the last fifth are
    averaged. A guide without parameters, such as the prior, is its own q*.

    Both ELBOs have the same draws, so the noise of their difference is small.

    log p(x | c) is importance sampled, once from q* and once from q. Both are below log p(x | c) in
    expectation. So for each seed the one with the greater mean is taken: nearly always the one
    from q*. It is too low where the family is far from the posterior. Its k-hat is then high, and
    the total and the approximation are too small. Give a better ``log_likelihood`` then. The
    amortisation does not depend on it.

    Args:
        result: what ``fit`` returned. Its guide has the method ``per_datum(num_data)``.
        data: as the programs take them, or ``result.prepare(data)``.
        log_likelihood: an estimate of log p(x | c) of the same fit and data, in place of importance
            sampling.
        num_steps: steps of q*'s fit, from 20.
        learning_rate: of Adam, in q*'s fit.
        num_samples: draws of the latents per datum, for each ELBO and for log p(x | c).
        key: a random key. A fixed one by default.
        batch_size: data at a time. Each batch has a fit of its own.
        progress: whether to show progress.

    Returns:
        Nats per datum, (seed, N).

    Raises:
        ValueError: a guide without ``per_datum``, or with draws that have no gradient; data that
            the programs refuse; global sites; sites that the objective sums over;
            ``log_likelihood`` of other data or seeds; a setting out of range.
        NonFiniteError: the fit of q* met a loss that is not finite.

    Warns:
        RuntimeWarning: the ELBO of q* still rises at the end of its fit, or it is below the guide's
            own. Either must be more than 0.01 nats per datum and four standard errors.
    """
    judged = _enter(result, data, log_likelihood)
    for name, value, least in (
        ("num_steps", num_steps, FEWEST_STEPS),
        ("num_samples", num_samples, 2),
        ("batch_size", batch_size, 1),
    ):
        require_whole(name, value, least)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
    keys = random.split(default_key(key, NAME), 3)
    training = _Training(num_steps, learning_rate, progress)
    elbos, best_elbos, densities, best_densities, traces = [], [], [], [], []
    for i, block in enumerate(_blocks(result, data, judged, batch_size)):
        fit_key, elbo_key, density_key = (random.fold_in(key, i) for key in keys)
        best = [_best(result, seed, block, fit_key, training) for seed in range(result.num_seeds)]
        elbos.append(_elbo_rounds([result], block, elbo_key, num_samples))
        best_elbos.append(_elbo_rounds(best, block, elbo_key, num_samples))
        traces.append((length(block), np.concatenate([one.elbo for one in best])))
        if log_likelihood is None:
            settings: Any = {"num_samples": num_samples, "batch_size": length(block)}
            settings |= {"key": density_key, "progress": progress}
            densities.append(importance_sampled(result, block, **settings))
            found = [importance_sampled(one, block, **settings) for one in best]
            best_densities.append(joined(found, axis=0))
    if log_likelihood is None:
        greater = _greater(joined(best_densities, axis=1), joined(densities, axis=1))
        log_likelihood = replace(greater, data=judged.described)
    rounds = np.concatenate(elbos, axis=2), np.concatenate(best_elbos, axis=2)
    gap = _gap(log_likelihood, *rounds, math.prod(_rounds(num_samples)), traces)
    _warn(gap)
    return gap


# --- checks ---------------------------------------------------------------------------------------


def _enter(result: Fit, data: Any, log_likelihood: Any) -> Judged:
    """The judged data, after the checks."""
    judged = judged_data(result, data)
    require_local(judged, NAME)
    if judged.programs.summed:
        raise ValueError(
            f"{NAME}: expected latent sites that the guide draws, got "
            f"{judged.programs.summed[0]!r}, which is summed over; use pointwise_elbo and "
            f"log_likelihood, whose difference is the total gap"
        )
    if not isinstance(result.guide, HasPerDatum):
        raise ValueError(
            f"{NAME}: expected a guide with the method per_datum(num_data), which gives its family "
            f"without an encoder, got {type(result.guide).__name__}; take a family of "
            f"models.guides, or write the method"
        )
    if log_likelihood is None:
        return judged
    if not isinstance(log_likelihood, Estimate):
        raise TypeError(
            f"log_likelihood: expected an Estimate, got {type(log_likelihood).__name__}; give what "
            f"inference.log_likelihood(result, data) returns"
        )
    if log_likelihood.data != judged.described:
        raise ValueError(
            f"log_likelihood: expected an estimate for the judged data, {judged.described}, got "
            f"one for {log_likelihood.data}; judge the same data"
        )
    num_seeds = len(log_likelihood.pointwise)
    if num_seeds != result.num_seeds:
        raise ValueError(
            f"log_likelihood: expected an estimate for each of {result.num_seeds} seeds, got "
            f"{num_seeds}; judge the same fit"
        )
    return judged


def _warn(gap: InferenceGap) -> None:
    """Warns where q* is not the best guide."""
    for i, (rise, error) in enumerate(zip(gap.rise, gap.rise_error, strict=True)):
        if rise > max(4 * error, TOLERANCE):
            warnings.warn(
                f"{NAME}: the ELBO of q* still rises at the end of its fit, by {rise:.3g} nats per "
                f"datum in the last tenth (seed {i}). The approximation is too large and the "
                f"amortisation too small: give num_steps= a larger number.",
                RuntimeWarning,
                stacklevel=3,
            )
    lost, errors = -gap.amortisation.estimate, gap.amortisation.monte_carlo_error
    for i, (loss, error) in enumerate(zip(lost, errors, strict=True)):
        if loss > max(4 * error, TOLERANCE):
            warnings.warn(
                f"{NAME}: q* is worse than the guide that it should beat, by {loss:.3g} nats per "
                f"datum (seed {i}). Its fit has not found the best guide: give num_steps= a larger "
                f"number, or learning_rate= another one.",
                RuntimeWarning,
                stacklevel=3,
            )


# --- the best guide of the family -----------------------------------------------------------------


class _Training(NamedTuple):
    """How q* is fitted. ``inference_gap`` explains each."""

    num_steps: int
    learning_rate: float
    progress: bool

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam. Its rate rises for a twentieth of the steps and then stays.

        It does not fall, so that the last steps tell whether the ELBO still rises.
        """
        rise = optax.linear_schedule(0.0, self.learning_rate, max(1, self.num_steps // 20))
        return optax.adam(rise, b2=0.99)


def _blocks(result: Fit, data: Any, judged: Judged, batch_size: int) -> Iterator[Prepared]:
    """The data in parts of nearly equal size. One part if the programs take all data alone."""
    num_data, prepared = length(judged.arrays), result.prepare(data)
    size = batch_size if judged.programs.takes_batches else num_data
    parts = np.array_split(np.arange(num_data), -(-num_data // size))
    for part in parts:
        source = prepared.source if len(parts) == 1 else None
        yield Prepared(put_rows(judged.arrays, part, None), source)


def _objective(result: Fit, block: Prepared) -> ELBO:
    """The one with the least noise: discrete sites are summed over."""
    if programs_of(result, block).enumerated:
        return TraceEnum_ELBO(NUM_PARTICLES)
    return StickingTheLanding(NUM_PARTICLES)


def _best(result: Fit, seed: int, block: Prepared, key: Array, training: _Training) -> Fit:
    """q* of one seed: the best guide of the family for each datum, with its trace."""
    assert isinstance(result.guide, HasPerDatum)
    guide = result.guide.per_datum(length(block))
    known = values_of(result, seed)
    held = {n: known[n] for n in stored_names(result.model, block) & known.keys()}
    # A model that runs the fitted guide keeps that one's numbers, under the new guide's names.
    apart = {n: held.pop(n) for n in _of_other_shape(guide, block, held)}
    model = Held(result.model, apart) if apart else result.model
    mutable = {n: value for n, value in held.items() if n in result.mutable}
    params = {n: value for n, value in held.items() if n not in mutable}
    trace = np.zeros((1, 0), np.float32)  # if there is nothing to fit
    if stored_names(guide, block) - held.keys():
        fitted = fit(
            Held(model, held),
            Held(guide, held),  # it may run the model
            block,
            objective=_objective(result, block),
            optimizer=training.optimizer,
            num_steps=training.num_steps,
            average=AVERAGE,
            seed=int(random.randint(key, (), 0, 2**31 - 1)),
            progress=training.progress,
        )
        params, mutable = params | fitted.params_of(0), mutable | fitted.mutable_of(0)
        trace = fitted.elbo
    found = Fit.from_params(model, guide, params, example=block, mutable=mutable)
    return replace(found, elbo=trace)


def _of_other_shape(guide: Any, block: Prepared, held: Mapping[str, Any]) -> list[str]:
    """The names of values that a guide has for parameters of another shape."""
    sites = abstract_sites(guide, 0, abstract(block))
    return [
        name
        for name, value in held.items()
        if name in sites
        and jax.tree.map(jnp.shape, sites[name]["value"]) != jax.tree.map(jnp.shape, value)
    ]


# --- numbers --------------------------------------------------------------------------------------


def _elbo_rounds(
    fits: Sequence[Fit], block: Prepared, key: Array, num_samples: int
) -> Float[np.ndarray, "round seed n"]:
    """The ELBO of each datum in rounds of independent draws, the seeds of all fits in turn.

    Near the posterior the mean log weight has less noise than reconstruction and exact divergence:
    at the posterior it has none.
    """
    num_rounds, num_draws = _rounds(num_samples)
    settings: Any = {"num_samples": num_draws, "batch_size": length(block)}
    rounds = [
        np.concatenate([pointwise_elbo(one, block, key=k, **settings).pointwise for one in fits])
        for k in random.split(key, num_rounds)
    ]
    return np.stack(rounds).astype(np.float64)


def _rounds(num_samples: int) -> tuple[int, int]:
    """The number of rounds, and of draws in each."""
    num_rounds = min(NUM_ROUNDS, num_samples)
    return num_rounds, -(-num_samples // num_rounds)


def _greater(a: Estimate, b: Estimate) -> Estimate:
    """For each seed, the estimate with the greater mean."""
    first = (a.estimate >= b.estimate)[:, None]

    def chosen(name: str) -> Any:
        pair = getattr(a, name), getattr(b, name)
        return None if pair[0] is None else np.where(first, *pair)

    return replace(a, **{name: chosen(name) for name in BY_DATUM})


def _gap(
    log_likelihood: Estimate,
    elbos: Float[np.ndarray, "round seed N"],
    best_elbos: Float[np.ndarray, "round seed N"],
    num_draws: int,
    traces: Sequence[tuple[int, Float[np.ndarray, "seed step"]]],
) -> InferenceGap:
    """The gap, from the rounds of both ELBOs and the traces of each block's fits."""

    def estimate(name: str, rounds: Float[np.ndarray, "round seed N"]) -> Estimate:
        variance = rounds.var(0, ddof=1) / len(rounds)
        return Estimate(name, rounds.mean(0), num_draws, log_likelihood.data, variance)

    return InferenceGap(
        log_likelihood,
        estimate("elbo", elbos),
        estimate("best_elbo", best_elbos),
        estimate("amortisation_gap", best_elbos - elbos),
        *_rise(traces),
    )


def _rise(
    traces: Sequence[tuple[int, Float[np.ndarray, "seed step"]]],
) -> tuple[Float[np.ndarray, " seed"], Float[np.ndarray, " seed"]]:
    """How much the mean ELBO rose in the last tenth over the tenth before, and its error."""
    sizes, elbos = zip(*traces, strict=True)
    trace = np.average(np.stack(elbos).astype(np.float64), axis=0, weights=sizes)
    tenth = trace.shape[1] // 10
    if not tenth:
        return np.zeros(len(trace)), np.zeros(len(trace))
    last, before = trace[:, -tenth:], trace[:, -2 * tenth : -tenth]
    error = np.sqrt((last.var(1, ddof=1) + before.var(1, ddof=1)) / tenth)
    return last.mean(1) - before.mean(1), error
