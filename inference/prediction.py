"""What a fit says of the labels that its data tell in part: q(y | x) and p(y | x).

Both say how probable each label is. The guide's q(y | x, c) is one pass of a network. The model's
p(y | x, c) follows from p(x, y | c) by Bayes' rule, with the other latents importance-sampled:

    p(y | x, c)  =  p(x, y | c) / sum_y' p(x, y' | c)

Known labels are hidden from both, and used to judge them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int, PyTree

from inference._data import Prepared, is_prepared
from inference._judges import (
    Judged,
    compiled,
    default_key,
    judged_data,
    over_data,
    require_fit,
    require_local,
)
from inference._settings import require_whole
from inference._streams import Stream
from inference._summation import Sums, joint_values, log_weights
from inference.evaluation import Estimate, importance_sample, programs_and_sums
from inference.fit import Fit
from inference.sites import (
    UNKNOWN,
    DataPlates,
    Program,
    given_sources,
    length,
    num_values,
    trace_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # a second to import
    Figure = Any

NUM_BINS = 10  # of a reliability diagram


@dataclass(frozen=True)
class LabelProbabilities:
    """How probable each label of each datum is, and how that agrees with the known labels.

    Attributes:
        name: whose probabilities they are, "q(y | x)" of the guide or "p(y | x)" of the model.
        probs: (seed, N, K), sums of 1 over the K labels.
        labels: (N,), the true labels, -1 where they are unknown.
        num_samples: draws of the other latents for each datum.
        data: the type, shape and hash of each array that was judged.
    """

    name: str
    probs: Float[np.ndarray, "seed N K"]
    labels: Int[np.ndarray, " N"]
    num_samples: int
    data: dict[str, str]

    @property
    def most_probable(self) -> Int[np.ndarray, "seed N"]:
        """The most probable label of each datum."""
        return self.probs.argmax(2)

    @property
    def accuracy(self) -> Estimate:
        """The share of data whose most probable label is the true one."""
        known = self._known()
        right = self.most_probable[:, known] == self.labels[known]
        return self._estimate("accuracy", right)

    @property
    def brier(self) -> Estimate:
        """The Brier score: the sum over labels of (probability - truth)^2, from 0 (best) to 2."""
        known = self._known()
        truth = np.eye(self.probs.shape[2])[self.labels[known]]
        return self._estimate("brier", ((self.probs[:, known] - truth) ** 2).sum(2))

    def reliability(self, num_bins: int = NUM_BINS) -> dict[str, Float[np.ndarray, "seed bins"]]:
        """How often the most probable label is right, by how probable it is.

        Args:
            num_bins: bins of equal width over the probability of the most probable label.

        Returns:
            (seed, bins) each: ``confidence``, the mean probability; ``accuracy``; its
            ``standard_error``; ``share``, the share of the data. NaN where a bin is empty.

        Raises:
            ValueError: no bins; no label is known.
        """
        require_whole("num_bins", num_bins, 1)
        known = self._known()
        confidence = self.probs[:, known].max(2).astype(np.float64)
        right = (self.most_probable[:, known] == self.labels[known]).astype(np.float64)
        bins = np.clip((confidence * num_bins).astype(int), 0, num_bins - 1)
        inside = (bins[..., None] == np.arange(num_bins)).astype(np.float64)  # (seed, N, bins)
        count = inside.sum(1)
        at_least_one = np.maximum(count, 1)
        empty = np.where(count > 0, 0.0, np.nan)
        accuracy = np.einsum("sn,snb->sb", right, inside) / at_least_one
        return {
            "confidence": np.einsum("sn,snb->sb", confidence, inside) / at_least_one + empty,
            "accuracy": accuracy + empty,
            "standard_error": np.sqrt(accuracy * (1 - accuracy) / at_least_one) + empty,
            "share": count / right.shape[1],
        }

    def _known(self) -> np.ndarray:
        known = np.flatnonzero(self.labels != UNKNOWN)
        if not known.size:
            raise ValueError(
                "data: expected known labels to judge the probabilities by, got -1 everywhere; "
                "give data with labels"
            )
        return known

    def _estimate(self, name: str, values: Any) -> Estimate:
        return Estimate(name, np.asarray(values, np.float64), self.num_samples, self.data)


@dataclass(frozen=True)
class Prediction:
    """What the guide and the model of a fit say of the labels.

    Attributes:
        site: the latent site.
        by_guide: q(y | x, c).
        by_model: p(y | x, c), by importance sampling over the other latents.
    """

    site: str
    by_guide: LabelProbabilities
    by_model: LabelProbabilities

    @property
    def better(self) -> str:
        """Which of the two has the lower Brier score over all seeds, or "neither".

        "neither" if the mean difference is within two of its standard errors over the data.
        """
        gap = (self.by_guide.brier.pointwise - self.by_model.brier.pointwise).mean(0)
        if abs(gap.mean()) <= 2 * gap.std() / np.sqrt(len(gap)):
            return "neither"
        return self.by_model.name if gap.mean() > 0 else self.by_guide.name


def predict(
    result: Fit,
    data: Any,
    *,
    key: Array | None = None,
    num_samples: int = 100,
    batch_size: int = 100,
    progress: bool = False,
) -> Prediction:
    """q(y | x, c) and p(y | x, c) of every datum. All known labels are hidden first.

    Args:
        result: a fit of a model with labels that the data tell in part
            (``models.labels.partly_observed``).
        data: as the programs take them, or ``result.prepare(data)``. The labels among them, where
            they are known, are what the probabilities are judged by.
        key: a random key. A fixed one by default.
        num_samples: draws of the other latents for each datum and label.
        batch_size: data at a time.
        progress: whether to show progress.

    Raises:
        TypeError: no fit.
        ValueError: data that the programs refuse; a model without such a label, or with several;
            a guide that does not draw it, or a site with several labels for a datum.
    """
    require_fit(result)
    site, source = _label(result)
    hidden, labels = _hide(data, source)
    judged = judged_data(result, hidden)
    require_local(judged, "predict")
    require_whole("num_samples", num_samples, 1)
    _check_summed(judged, site)
    judge = compiled(_label_weights, *programs_and_sums(result, judged), site, num_samples)
    key = default_key(key, "predict")
    log_q, log_p = over_data(judge, result, judged, key, batch_size, progress)

    def probabilities(name: str, log_probs: np.ndarray) -> LabelProbabilities:
        log_probs = log_probs.astype(np.float64)
        log_probs -= np.logaddexp.reduce(log_probs, axis=2)[..., None]
        return LabelProbabilities(name, np.exp(log_probs), labels, num_samples, judged.described)

    return Prediction(
        site, probabilities(f"q({site} | x)", log_q), probabilities(f"p({site} | x)", log_p)
    )


def plot_reliability(prediction: Prediction, num_bins: int = NUM_BINS) -> Figure:
    """A reliability diagram: how often the most probable label is right, by how probable it is.

    Seeds are taken together. Bars are two standard errors.

    Args:
        prediction: what ``predict`` returned.
        num_bins: as in ``LabelProbabilities.reliability``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="as often right as it says")
    for found, marker in ((prediction.by_guide, "o"), (prediction.by_model, "s")):
        one = _seeds_together(found).reliability(num_bins)
        label = f"{found.name}: accuracy {found.accuracy.estimate.mean():.3f}, "
        label += f"Brier score {found.brier.estimate.mean():.3f}"
        axes.errorbar(
            one["confidence"][0],
            one["accuracy"][0],
            2 * one["standard_error"][0],
            marker=marker,
            capsize=2,
            label=label,
        )
    axes.set(
        xlabel="probability of the most probable label",
        ylabel="share of data for which it is right",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    axes.legend(loc="lower right", fontsize="small")
    return figure


def _seeds_together(found: LabelProbabilities) -> LabelProbabilities:
    """All seeds as one seed with more data."""
    num_seeds, _, num_labels = found.probs.shape
    probs = found.probs.reshape(1, -1, num_labels)
    labels = np.tile(found.labels, num_seeds)
    return LabelProbabilities(found.name, probs, labels, found.num_samples, found.data)


# --- checks ---------------------------------------------------------------------------------------


def _label(result: Fit) -> tuple[str, str]:
    """The latent site that the data tell in part, and the array that tells it."""
    sources = given_sources(result.model, result.batch)
    if len(sources) != 1:
        raise ValueError(
            f"predict: expected one latent site whose values the data tell in part, got "
            f"{', '.join(sources) or 'none'}; draw the label in the model by "
            f"models.labels.partly_observed"
        )
    [(site, arrays)] = sources.items()
    if len(arrays) != 1:
        raise ValueError(
            f"predict: expected one array that tells the values of {site!r}, got "
            f"{', '.join(sorted(arrays))}; give the labels as one array"
        )
    return site, next(iter(arrays))


def _hide(data: Any, source: str) -> tuple[Any, Int[np.ndarray, " N"]]:
    """The data with every label unknown, and the labels."""
    if not isinstance(data, Mapping) or isinstance(data, Stream) or source not in data:
        raise ValueError(
            f"data: expected a mapping of arrays with the labels {source!r}, got "
            f"{sorted(data) if isinstance(data, Mapping) else type(data).__name__}; give labels, "
            f"or -1 where they are unknown"
        )
    labels = np.asarray(data[source])
    arrays = {**data, source: np.full_like(labels, UNKNOWN)}
    return Prepared(arrays) if is_prepared(data) else arrays, labels.astype(int)


def _check_summed(judged: Judged, site: str) -> None:
    programs = judged.programs
    if site not in programs.enumerated:
        raise ValueError(
            f"predict: expected a guide that draws {site!r} and marks it "
            f"infer={{'enumerate': 'parallel'}}, so that its values can be summed over, got "
            f"{', '.join(programs.enumerated) or 'none'} marked; take guides.mean_field or "
            f"guides.structured"
        )
    if len(programs.latents[site].dims) != 1:
        raise ValueError(
            f"predict: expected one label for each datum, got the site {site!r} with axes "
            f"{', '.join(programs.latents[site].dims)}"
        )


# --- one batch ------------------------------------------------------------------------------------


def _label_weights(
    model: Program,
    guide: Program,
    plates: DataPlates,
    sums: Sums,
    site: str,
    num_samples: int,
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
) -> tuple[Float[Array, "N K"], Float[Array, "N K"]]:
    """log q(y | x, c) and log p(x, y | c) of every datum and label."""
    weights = log_weights(model, guide, plates, sums, params, batch)
    values = joint_values(guide, plates, sums.in_guide, params, batch, key)[site]
    support = trace_of(guide, key, params, **batch)[site]["fn"].support
    num_labels, size = num_values(support) or 0, length(batch)
    chosen = values[None, :, 0] == jnp.arange(num_labels)[:, None]

    def by_label(terms: Float[Array, "J N"]) -> Float[Array, "K N"]:
        some = jnp.where(chosen[..., None], terms[None], -jnp.inf)
        return jax.nn.logsumexp(some, axis=1)

    def of_model(key: Array) -> Array:
        return by_label(weights(key)[0]).reshape(-1)

    def of_guide(key: Array) -> Array:
        return by_label(weights(key)[1])

    log_q = lax.map(of_guide, random.split(key, num_samples))
    log_q = jax.nn.logsumexp(log_q, axis=0) - jnp.log(num_samples)
    log_p = importance_sample(of_model, key, num_samples)[0].reshape(num_labels, size)
    return log_q.T, log_p.T
