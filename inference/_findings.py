"""What the numbers of a fit mean: findings in words, each with its number and what to try.

A finding needs a size that matters and four standard errors. So a good fit gets none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from inference.annealing import Bracket
from inference.calibration import TEST, rank_scale
from inference.evaluation import ElboTerms, Estimate, difference
from inference.fit import Fit
from inference.gaps import InferenceGap

if TYPE_CHECKING:
    from xarray import DataTree
else:  # a second to import
    DataTree = Any

MATTERS = 0.05  # nats per datum
ERRORS = 4  # standard errors
LEVEL = 1e-3  # of the joint test of calibration
UNUSED = 0.01  # nats or share of the variance, below which a dimension is unused
HIGH_SHARE = 0.1  # of data with a high k-hat
SPREAD = 0.2  # relative variance of weights, from which a high k-hat counts
FEWEST_STEPS = 40  # of a trace that can show a trend


@dataclass(frozen=True)
class Finding:
    """What is wrong with a fit.

    Attributes:
        name: which finding it is.
        number: its size.
        text: what was found, with the number and its unit.
        remedy: what to try.
    """

    name: str
    number: float
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}"


@dataclass(frozen=True)
class Evidence:
    """What the judges found, of one seed. None where a judge cannot answer.

    Attributes:
        fit: the fit.
        elbo: the ELBO and its terms, on all judged data.
        density: log p(x | c), or the predictive density with global sites, on all of them.
        loss: log p(x | c) - ELBO of all judged data, by importance sampling.
        training_elbo, training_loss: likewise of training data.
        exchange: by how much log p(x | z, c) falls if data exchange their latents.
        explained: by local site, for each dimension, the variance of the guide's mean between data
            over the variance of z.
        bracket: annealing on a sample of the data.
        simulated: annealing on simulated data.
        gap: the gap to log p on that sample.
        calibration: the tree of ``sbc``.
    """

    fit: Fit
    elbo: ElboTerms | None = None
    density: Estimate | None = None
    loss: Estimate | None = None
    training_elbo: Estimate | None = None
    training_loss: Estimate | None = None
    exchange: Estimate | None = None
    explained: dict[str, Float[np.ndarray, " z"]] | None = None
    bracket: Bracket | None = None
    simulated: Bracket | None = None
    gap: InferenceGap | None = None
    calibration: DataTree | None = None

    @property
    def unused(self) -> dict[str, Bool[np.ndarray, " z"]]:
        """By site: which dimensions the guide does not use.

        Its mean does not follow the data, or it is the prior (KL below 0.01 nats). The first
        compares the variance of the mean between data with the variance of z. That is Burda et al.
        (2016, section 5) for a z of any scale.
        """
        found = {}
        for name, share in (self.explained or {}).items():
            kl = None if self.elbo is None else self.elbo.kl_per_dim.get(name)
            found[name] = share < UNUSED
            if kl is not None:
                found[name] |= kl[0].mean(0) < UNUSED
        return found


def findings_of(evidence: Evidence) -> tuple[Finding, ...]:
    """All findings, the most urgent first."""
    found = (rule(evidence) for rule in RULES)
    return tuple(finding for finding in found if finding is not None)


def _surely(estimate: Estimate | None) -> bool:
    """Whether a mean is above zero, by a size that matters and by four standard errors."""
    if estimate is None:
        return False
    return bool(estimate.estimate[0] > max(MATTERS, ERRORS * estimate.standard_error[0]))


def _words(estimate: Estimate) -> str:
    return f"{estimate.estimate[0]:.2f} +- {estimate.standard_error[0]:.2f} nats"


# --- training -------------------------------------------------------------------------------------


def _trace(fit: Fit) -> Float[np.ndarray, " step"]:
    trace = fit.elbo[0].astype(np.float64)
    return trace[np.isfinite(trace)]


def _mean_and_error(trace: Float[np.ndarray, " step"]) -> tuple[float, float]:
    """The mean, and its error from ten blocks (neighbouring steps are alike), less their trend."""
    blocks = np.array([block.mean() for block in np.array_split(trace, 10)])
    at = np.arange(len(blocks))
    noise = blocks - np.polyval(np.polyfit(at, blocks, 1), at)
    return float(trace.mean()), float(np.sqrt(np.sum(noise**2) / (len(blocks) - 2) / len(blocks)))


def unfinished(evidence: Evidence) -> Finding | None:
    """The ELBO was still rising, and on other data too as far as is known."""
    trace = _trace(evidence.fit)
    if len(trace) < FEWEST_STEPS or overfitted(evidence) is not None:
        return None
    quarter = len(trace) // 4
    (before, a), (after, b) = (
        _mean_and_error(part) for part in (trace[-2 * quarter : -quarter], trace[-quarter:])
    )
    rise, error = after - before, float(np.hypot(a, b))
    if rise <= max(MATTERS, ERRORS * error):
        return None
    return Finding(
        "unfinished",
        rise,
        f"The training was not finished: the ELBO rose by {rise:.2f} +- {error:.2f} nats per datum "
        f"from the third quarter of the steps to the last.",
        "Train longer: fit(..., init=result, num_epochs=...) goes on.",
    )


def overfitted(evidence: Evidence) -> Finding | None:
    """The training data are fitted better than others."""
    for compare in (_held_out_fell, _training_is_better, _trace_is_better):
        found = compare(evidence)
        if found is not None and found[0] > max(MATTERS, ERRORS * found[1]):
            break
    else:
        return None
    fall, error, what = found
    gap, encoder = evidence.gap, ""
    if gap is not None and _surely(gap.amortisation):
        encoder = f" Here the encoder alone loses {_words(gap.amortisation)}."
    return Finding(
        "overfitted",
        fall,
        f"The fit is overfitted: {what} by {fall:.2f} +- {error:.2f} nats per datum.{encoder}",
        "Stop earlier (validation=0.1, patience=10), take smaller networks, or give more data.",
    )


def _held_out_fell(evidence: Evidence) -> tuple[float, float, str] | None:
    """How far the held-out ELBO ended below its best, in means of three."""
    known = evidence.fit.validation_elbo
    values = np.zeros(0) if known is None else known[0][np.isfinite(known[0])]
    if len(values) < 6 or evidence.fit.config.get("patience"):
        return None
    means = np.convolve(values, np.ones(3) / 3, mode="valid")
    late = values[len(values) // 2 :]
    error = float(np.std(np.diff(late, 2)) / np.sqrt(6 * 3))  # noise alone: no trend
    return float(means.max() - means[-1]), error, "the held-out ELBO fell from its best"


def _training_is_better(evidence: Evidence) -> tuple[float, float, str] | None:
    """How much more the guide loses here than on training data, or the ELBO is below theirs."""
    loss, there = evidence.loss, evidence.training_loss
    if loss is None or there is None or evidence.elbo is None or evidence.training_elbo is None:
        return None
    pairs = ((loss, there), (evidence.training_elbo, evidence.elbo.elbo))
    found = [
        (
            float(a.estimate[0] - b.estimate[0]),
            float(np.hypot(a.standard_error[0], b.standard_error[0])),
        )
        for a, b in pairs
    ]
    fall, error = max(found, key=lambda pair: pair[0] / max(pair[1], 1e-12))
    what = "the guide's loss is higher" if (fall, error) == found[0] else "the ELBO is lower"
    return fall, error, f"{what} here than on the training data,"


def _trace_is_better(evidence: Evidence) -> tuple[float, float, str] | None:
    """How far the ELBO is below that of the last quarter of the training."""
    trace = _trace(evidence.fit)
    if evidence.elbo is None or evidence.training_elbo is not None or len(trace) < FEWEST_STEPS:
        return None
    if not evidence.fit.info.get("traces_elbo"):
        return None
    here = evidence.elbo.elbo
    there, noise = _mean_and_error(trace[-(len(trace) // 4) :])
    spread = float(here.pointwise[0].std()) / np.sqrt(evidence.fit.config["num_data"])
    error = float(np.linalg.norm([noise, spread, here.standard_error[0]]))
    fall = there - float(here.estimate[0])
    return fall, error, "the ELBO is lower here than at the end of the training,"


# --- latents --------------------------------------------------------------------------------------


def ignored(evidence: Evidence) -> Finding | None:
    """The model does not use the latents at all."""
    exchange = evidence.exchange
    if exchange is None or not exchange.estimate[0] < UNUSED:
        return None
    number = float(exchange.estimate[0])
    return Finding(
        "ignored-latents",
        number,
        f"The model ignores its latents: log p(x | z) falls by {number:.3f} nats per datum if data "
        f"exchange theirs.",
        "Warm the divergence up (KLWarmUp), give free bits (FreeBits), or weaken what explains x "
        "without z.",
    )


def collapsed(evidence: Evidence) -> Finding | None:
    """Some dimensions do nothing."""
    unused = evidence.unused
    count = sum(int(dims.sum()) for dims in unused.values())
    if count == 0 or ignored(evidence) is not None:
        return None
    total = sum(dims.size for dims in unused.values())
    where = ", ".join(f"{n} ({int(d.sum())} of {d.size})" for n, d in unused.items() if d.any())
    return Finding(
        "unused-latents",
        float(count),
        f"{count} of {total} latent dimensions are unused: {where}. They do not follow the data.",
        "If they should tell something, warm the divergence up (KLWarmUp) or give free bits "
        "(FreeBits); if not, fewer latents do the same.",
    )


# --- the guide ------------------------------------------------------------------------------------


def miscalibrated(evidence: Evidence) -> Finding | None:
    """The ranks are not uniform."""
    tree = evidence.calibration
    if tree is None or tree["joint"].p_value.values[0] >= LEVEL:
        return None
    pit, p_values = tree["prior_sbc"].to_dataset(), tree["uniformity"].to_dataset()
    sites = [name for name in pit.data_vars if name != TEST]
    places = [pit[n].values[0].reshape(pit.sizes["draw"], -1).T for n in sites]
    p = np.concatenate([p_values[n].values[0].reshape(-1) for n in sites])
    bad = np.concatenate(places)[p < 0.05 / (len(p) + 1)]
    if not len(bad):
        return Finding(
            "miscalibrated",
            float(p_values[TEST].values[0]),
            f"The guide is not the posterior: log p(x | z) ranks wrongly, and no single dimension "
            f"does (p = {p_values[TEST].values[0]:.1g}).",
            "Take a family that joins dimensions: guides.full_covariance or guides.flow.",
        )
    scale = float(np.median(rank_scale(bad)))
    inside = float((np.abs(bad - 0.5) <= 0.25).mean())
    where = f"in {len(bad)} of {len(p)} dimensions"
    interval = f"Its 50 % intervals hold z in {inside:.0%} of the simulations"
    if 0.95 < scale < 1.05:
        text = (
            f"The guide is off {where}: its means or its shape are not the posterior's. {interval}."
        )
        name, remedy = "biased-guide", "Train longer, or take a larger encoder or guides.flow."
    else:
        name, what = ("narrow-guide", "narrow") if scale < 1 else ("wide-guide", "wide")
        text = (
            f"The guide is too {what} {where}: its deviations are {scale:.2f} of the posterior's. "
            f"{interval}."
        )
        remedy = "Take guides.full_covariance or guides.flow, or train longer."
    return Finding(name, scale, text, remedy)


def unreliable(evidence: Evidence) -> Finding | None:
    """Importance sampling cannot be believed."""
    share = _unreliable_share(evidence.density)
    below = _above_importance(evidence.bracket)
    if share <= HIGH_SHARE and not _surely(below):
        return None
    says = ""
    if below is not None and _surely(below):
        says = f": the bracket says by {_words(below)}"
    elif below is not None:
        says = f"; on average the bracket sees little of it ({_words(below)})"
    return Finding(
        "importance-sampling",
        share,
        f"k-hat is too high for {share:.0%} of the data, so importance sampling is too low "
        f"there{says}.",
        "Try guides.flow, and give the lower bound of bracket beside log_likelihood.",
    )


def _unreliable_share(density: Estimate | None) -> float:
    """The share of data with a high k-hat and with weights that differ.

    Both count, because the tail of nearly equal weights may have any shape. The weights' relative
    variance is about twice the divergence KL(q || p(z | x)).
    """
    high = None if density is None else density.high_pareto_k
    if density is None or high is None or density.monte_carlo_variance is None:
        return 0.0
    variance = density.monte_carlo_variance[0] * density.num_samples
    return float(np.mean((high.pointwise[0] > 0) & ~(variance < SPREAD)))


def _above_importance(bracket: Bracket | None) -> Estimate | None:
    """By how much annealing is above importance sampling, on the same data."""
    if bracket is None or bracket.importance is None:
        return None
    return difference("above_importance", bracket.lower, bracket.importance)


def poor_family(evidence: Evidence) -> Finding | None:
    """The family is too small."""
    gap = evidence.gap
    if gap is None or not _surely(gap.approximation):
        return None
    return Finding(
        "approximation",
        float(gap.approximation.estimate[0]),
        f"The best guide of this family loses {_words(gap.approximation)} per datum.",
        "Try a richer one: guides.full_covariance or guides.flow.",
    )


def poor_encoder(evidence: Evidence) -> Finding | None:
    """The encoder is not good enough."""
    gap = evidence.gap
    if gap is None or not _surely(gap.amortisation):
        return None
    return Finding(
        "amortisation",
        float(gap.amortisation.estimate[0]),
        f"The encoder loses {_words(gap.amortisation)} per datum: its family has better guides for "
        f"these data. It is too small, not trained to the end, or overfitted to its training data.",
        "Give train= to see which; try a larger encoder, more training or data, or "
        "guides.semi_amortised.",
    )


RULES: tuple[Callable[[Evidence], Finding | None], ...] = (
    unfinished,
    overfitted,
    ignored,
    collapsed,
    miscalibrated,
    unreliable,
    poor_family,
    poor_encoder,
)
