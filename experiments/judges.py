"""Every judge beside its exact answers: one function for each, from a trial to a number.

``JUDGES`` lists them. A new judge is one function and one entry.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from experiments import known, known_mixtures
from experiments.known import Trial
from inference import (
    ElboTerms,
    bracket,
    decode,
    elbo_terms,
    encode,
    label_check,
    log_likelihood,
    log_predictive_density,
    pointwise_elbo,
    pointwise_log_likelihood,
    predict,
    sample_posterior,
    sample_posterior_predictive,
    sample_prior_predictive,
    sbc,
)

PROBLEMS = known.PROBLEMS | known_mixtures.PROBLEMS
PROGRAMS = {**known.PROGRAMS, **known_mixtures.PROGRAMS}
MOST_ERRORS = 4  # standard errors that a number may be away from its formula
MOST_NOISE = 0.1  # A row with a greater standard error proves nothing. It fails.
ROUNDING = 32 * float(np.finfo(np.float32).eps)  # of a number without noise, relative
NUM_SAMPLES = 20  # draws of each datum for one number
BATCH = 500  # data at a time
WALK: dict[str, Any] = {"num_steps": 40, "num_chains": 4, "num_leaps": 5}  # of a bracket
NUM_RANKED = 19  # draws of sbc: the central 90 % are the ranks 1 to 18
NUM_NODES = 80  # of a quadrature over one Normal


class Sizes(NamedTuple):
    """How much a row takes.

    Attributes:
        many, few: data of a trial.
        num_keys: calls of a judge whose data share draws.
        num_draws: draws of a row of draws.
    """

    many: int
    few: int
    num_keys: int
    num_draws: int


def trial_of(problem: str, guide: str, num_data: int, seed: Any) -> Trial:
    """The trial of a problem and a guide, by their names."""
    kind = Trial if is_linear(problem, guide) else known_mixtures.MixtureTrial
    return kind(problem, guide, num_data, seed)


def is_linear(problem: str, guide: str) -> bool:
    """Whether the model is linear and Gaussian, and no mixture."""
    return problem in known.PROBLEMS


# --- one row --------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """A number beside its formula.

    Attributes:
        number, formula: what they are.
        difference: of the two. Without noise, the greatest of any part of the number.
        error: the standard error of the difference. None without noise.
        bound: what rounding may do. None with noise.
    """

    number: float
    formula: float
    difference: float
    error: float | None = None
    bound: float | None = None

    @property
    def away(self) -> float | None:
        """The difference in standard errors."""
        return None if self.error is None else self.difference / self.error

    @property
    def is_right(self) -> bool:
        """Whether the difference is small, and could have been seen. NaN is not."""
        if self.error is None:
            return abs(self.difference) <= (self.bound or 0.0)
        return abs(self.difference) <= MOST_ERRORS * self.error <= MOST_ERRORS * MOST_NOISE


def compared(values: Any, formula: Any) -> Compared:
    """The mean of independent numbers beside the mean of their expectations.

    Args:
        values: (n,), numbers.
        formula: (n,), the expectation of each, or one for all.
    """
    values, formula = np.ravel(np.asarray(values, np.float64)), np.ravel(formula)
    difference = values - formula
    number, expected = float(values.mean()), float(formula.mean())
    bound, noise = ROUNDING * (1 + float(np.abs(formula).max())), float(difference.std(ddof=1))
    if noise <= bound:
        worst = float(difference[np.abs(difference).argmax()])
        return Compared(number, expected, worst, bound=bound)
    return Compared(number, expected, float(difference.mean()), noise / math.sqrt(len(values)))


def by_datum(
    trial: Trial, sizes: Sizes, judge: Callable[[Array], Any], formula: Float[np.ndarray, " N"]
) -> Compared:
    """A judge with a number for each datum. It is called as ``judge(key)``.

    The data are independent of each other unless they share draws of global sites. Then the means
    of many calls are.
    """
    if not trial.problem.num_shared:
        return compared(judge(trial.key), formula)
    means = [np.mean(judge(key), dtype=np.float64) for key in trial.keys(sizes.num_keys)]
    return compared(means, formula.mean())


def densities(trial: Trial, sizes: Sizes, judge: Callable[[Array], Any]) -> Compared:
    """A judge of log p: the mean of exp(estimate - log p) is 1."""
    log_p = trial.log_p()
    return by_datum(trial, sizes, lambda key: np.exp(judge(key) - log_p), np.ones(trial.num_data))


def along(
    trial: Trial, draws: np.ndarray, mean: np.ndarray, covariance: np.ndarray, moment: int
) -> Compared:
    """A moment of draws along a random direction beside its formula.

    Args:
        trial: the trial.
        draws: (S, N, K). The S draws are independent.
        mean, covariance: (N, K), and (N, K, K) or (K, K).
        moment: 1 for the mean, 2 for the variance about the formula's mean.
    """
    direction = trial.rng.normal(size=mean.shape[1])
    direction /= np.linalg.norm(direction)
    if moment == 1:
        return compared((draws @ direction).mean(1), np.mean(mean @ direction))
    squares = ((draws - mean) @ direction) ** 2
    return compared(squares.mean(1), np.mean(direction @ covariance @ direction))


# --- the judges -----------------------------------------------------------------------------------


def elbo_row(trial: Trial, sizes: Sizes) -> Compared:
    """The ELBO."""

    def judge(key: Array) -> Any:
        found = pointwise_elbo(trial.fit, trial.data, key=key, num_samples=NUM_SAMPLES)
        return found.pointwise[0]

    return by_datum(trial, sizes, judge, trial.elbo())


def terms_of(trial: Trial, key: Array) -> ElboTerms:
    """The terms of the ELBO."""
    return elbo_terms(trial.fit, trial.data, key=key, num_samples=NUM_SAMPLES)


def term_row(trial: Trial, sizes: Sizes, term: str) -> Compared:
    """A term of the ELBO that each datum has."""

    def judge(key: Array) -> Any:
        return getattr(terms_of(trial, key), term).pointwise[0]

    return by_datum(trial, sizes, judge, getattr(trial, term)())


def dimension_row(trial: Trial, sizes: Sizes) -> Compared:
    """The divergence of a random dimension of the local site."""
    size = trial.prior[0].shape[1] - trial.problem.num_shared
    dim = int(trial.rng.integers(size))

    def judge(key: Array) -> Any:
        return terms_of(trial, key).kl_per_dim["z"][0, :, dim]

    return by_datum(trial, sizes, judge, trial.kl_of_dim(dim))


def globals_row(trial: Trial, sizes: Sizes) -> Compared:
    """The divergence of the global sites, in nats per datum of the training data."""
    values = [
        sum(kl[0] for kl in terms_of(trial, key).kl_of_globals.values())
        for key in trial.keys(sizes.num_keys)
    ]
    return compared(values, trial.kl_of_globals() / trial.num_data)


def activity_row(trial: Trial, sizes: Sizes) -> Compared:
    """The activity of a random dimension of the local site, with the judge's own error."""
    variance, error = terms_of(trial, trial.key).activity["z"]
    dim = int(trial.rng.integers(variance.shape[1]))
    number, formula = float(variance[0, dim]), float(trial.activity()[trial.shared.stop + dim])
    return Compared(number, formula, number - formula, float(error[0, dim]))


def log_likelihood_row(trial: Trial, sizes: Sizes) -> Compared:
    """The likelihood."""

    def judge(key: Array) -> Any:
        found = log_likelihood(
            trial.fit, trial.data, key=key, num_samples=NUM_SAMPLES, batch_size=BATCH
        )
        return found.pointwise[0]

    return densities(trial, sizes, judge)


def predictive_row(trial: Trial, sizes: Sizes) -> Compared:
    """The density of a datum given draws of the globals."""

    def judge(key: Array) -> Any:
        found = log_predictive_density(
            trial.fit,
            trial.data,
            key=key,
            num_samples=NUM_SAMPLES,
            num_local_samples=2,
            batch_size=BATCH,
        )
        return found.pointwise[0]

    return densities(trial, sizes, judge)


def label_row(trial: Trial, sizes: Sizes) -> Compared:
    """The likelihood under a random label for each datum."""
    labels = trial.rng.integers(trial.problem.num_labels, size=trial.num_data)
    found = label_check(
        trial.fit,
        trial.data,
        trial.problem.num_labels,
        key=trial.key,
        num_samples=NUM_SAMPLES,
        batch_size=BATCH,
    )
    of_label = found.log_likelihood[0, np.arange(trial.num_data), labels]
    return compared(np.exp(of_label - trial.given(c=labels).log_p()), 1.0)


def predict_row(trial: Trial, sizes: Sizes, by: str) -> Compared:
    """The probabilities of the labels of a mixture, by the guide or by the model. No noise.

    The number is the mean probability of the first label.
    """
    assert isinstance(trial, known_mixtures.MixtureTrial)
    found = predict(trial.fit, trial.data, key=trial.key, num_samples=NUM_SAMPLES, batch_size=BATCH)
    formula = trial.untold if by == "by_guide" else trial.posterior()
    probs = np.asarray(getattr(found, by).probs[0], np.float64)
    difference = (probs - formula).ravel()
    worst = float(difference[np.abs(difference).argmax()])
    return Compared(
        float(probs[:, 0].mean()), float(formula[:, 0].mean()), worst, bound=2 * ROUNDING
    )


def given_draws_row(trial: Trial, sizes: Sizes) -> Compared:
    """log p(x | z, c) at NumPy's draws."""
    u, sites = trial.drawn(10)
    found = pointwise_log_likelihood(trial.fit, sites, trial.data)["x"][0]
    return compared(found, trial.log_p_given(u))


def posterior_row(trial: Trial, sizes: Sizes, moment: int) -> Compared:
    """Draws from the guide, all sites joined."""
    draws = sample_posterior(trial.fit, trial.data, sizes.num_draws, key=trial.key)
    return along(trial, trial.stacked(draws, trial.num_data), *trial.q, moment)


def replicated_row(trial: Trial, sizes: Sizes, moment: int) -> Compared:
    """Observations given latents from the guide."""
    num_draws = sizes.num_draws
    found = sample_posterior_predictive(trial.fit, trial.data, num_draws, key=trial.key)["x"][0]
    draws = np.reshape(found, (num_draws, trial.num_data, -1))
    return along(trial, draws, *trial.replicated(), moment)


def prior_row(trial: Trial, sizes: Sizes, moment: int) -> Compared:
    """Latents and observations from the model, joined. Without c there is one datum."""
    found = sample_prior_predictive(trial.fit, sizes.num_draws, key=trial.key, **trial.conditions)
    num_data = trial.num_data if trial.conditions else 1
    x = np.reshape(found["x"][0], (sizes.num_draws, num_data, -1))
    draws = np.concatenate([trial.stacked(found, num_data), x], axis=2)
    mean, covariance = trial.joint()
    return along(trial, draws, mean[:num_data], covariance[:num_data], moment)


def encode_row(trial: Trial, sizes: Sizes) -> Compared:
    """The mean of each site of the guide that follows no other site."""
    means = {name: values[:, None] for name, values in encode(trial.fit, trial.data).items()}
    found = trial.stacked(means, trial.num_data)[0]
    free, mean = trial.encoding()
    return compared(found[:, free], mean[:, free])


def decode_row(trial: Trial, sizes: Sizes) -> Compared:
    """The mean of x at NumPy's draws of the latents."""
    u, sites = trial.drawn(1)
    latents = {name: values[:, 0] for name, values in sites.items()}
    found = decode(trial.fit, latents, **trial.conditions)["x"][0]
    return compared(found, trial.mean_given(u)[0])


def below_row(trial: Trial, sizes: Sizes, start: str) -> Compared:
    """The bracket's bound from below, on the trial's data."""

    def judge(key: Array) -> Any:
        found = bracket(
            trial.fit, trial.data, **WALK, start=start, num_samples=0, key=key, batch_size=BATCH
        )
        return found.lower.pointwise[0]

    return densities(trial, sizes, judge)


def above_row(trial: Trial, sizes: Sizes, start: str) -> Compared:
    """The bracket's bound from above, on data that the judge simulates."""
    found = bracket(
        trial.fit,
        num_simulations=trial.num_data,
        **WALK,
        start=start,
        num_samples=0,
        key=trial.key,
        batch_size=BATCH,
        **trial.conditions,
    )
    assert found.upper is not None
    assert found.simulated is not None
    log_p = trial.given(**found.simulated[0]).log_p()
    return compared(np.exp(log_p - found.upper.pointwise[0]), 1.0)


def calibration(trial: Trial, sizes: Sizes) -> Any:
    """What ``sbc`` returns."""
    return sbc(
        trial.fit,
        sizes.many,
        num_samples=NUM_RANKED,
        key=trial.key,
        batch_size=BATCH,
        **trial.conditions,
    )


def places(tree: Any, name: str) -> np.ndarray:
    """The places on [0, 1] of a quantity, (simulation, K)."""
    place = tree["prior_sbc"][name].values[0]
    return place.reshape(len(place), -1)


def place_row(trial: Trial, sizes: Sizes, moment: int) -> Compared:
    """A moment about 1/2 of the places of a random dimension of the local site.

    The place is u = (rank + U) / (L + 1). Given p, the probability that a draw lies below z, the
    rank is Binomial(L, p).
    """
    dim, L = int(trial.rng.integers(trial.prior[0].shape[1])), NUM_RANKED
    u = places(calibration(trial, sizes), "z")[:, dim]
    p, weights = trial.below(dim, NUM_NODES)
    mean = (L * p + 0.5) / (L + 1)
    if moment == 1:
        return compared(u, weights @ mean)
    variance = (L * p * (1 - p) + 1 / 12) / (L + 1) ** 2
    return compared((u - 0.5) ** 2, weights @ (variance + (mean - 0.5) ** 2))


def coverage_row(trial: Trial, sizes: Sizes) -> Compared:
    """The coverage of the central 90 % of a random dimension: no rank of 0 or L."""
    dim = int(trial.rng.integers(trial.prior[0].shape[1]))
    found = calibration(trial, sizes)["coverage"]["z"].sel(prob=0.9).values[0]
    p, weights = trial.below(dim, NUM_NODES)
    number = float(np.ravel(found)[dim])
    formula = float(weights @ (1 - p**NUM_RANKED - (1 - p) ** NUM_RANKED))
    error = math.sqrt(formula * (1 - formula) / sizes.many)
    return Compared(number, formula, number - formula, error)


def density_place_row(trial: Trial, sizes: Sizes) -> Compared:
    """The places of log p(x | z, c). Under the posterior they are uniform."""
    return compared(places(calibration(trial, sizes), "log_likelihood"), 0.5)


class Judge(NamedTuple):
    """A judge and its exact answers.

    Attributes:
        claim: what its rows certify.
        measure: from a trial to one row.
        data: how many. "few" for a row of draws, "many" for a row over the population. "each" is
            many unless data share draws.
        is_defined: whether it has an answer for a problem and a guide.
        is_quick: whether the quick certificate has rows of it. Others take long to compile.
    """

    claim: str
    measure: Callable[[Trial, Sizes], Compared]
    data: Literal["each", "many", "few"] = "each"
    is_defined: Callable[[str, str], bool] = lambda problem, guide: True
    is_quick: bool = True


def without_globals(problem: str, guide: str) -> bool:
    """Whether all latents are local."""
    return not PROBLEMS[problem].num_shared


def continuous(problem: str, guide: str) -> bool:
    """Whether all latents are local real numbers."""
    return is_linear(problem, guide) and without_globals(problem, guide)


def exact_continuous(problem: str, guide: str) -> bool:
    """Whether the guide is the posterior of such latents."""
    return guide == "exact" and continuous(problem, guide)


def wide_continuous(problem: str, guide: str) -> bool:
    """Whether the guide of such latents is not the posterior. A walk from it has noise."""
    return guide == "wide" and continuous(problem, guide)


def with_globals(problem: str, guide: str) -> bool:
    """Whether some latents are global."""
    return not without_globals(problem, guide)


def with_locals(problem: str, guide: str) -> bool:
    """Whether some latents are local."""
    return "z" in PROBLEMS[problem].latents


def normal_locals(problem: str, guide: str) -> bool:
    """Whether the latents are Normal, and some are local."""
    return is_linear(problem, guide) and with_locals(problem, guide)


def factorises(problem: str, guide: str) -> bool:
    """Whether the local site factorises over its dimensions in guide and prior."""
    if not normal_locals(problem, guide):
        return False
    return PROBLEMS[problem].latents["z"] == () or PROGRAMS[problem, guide].factorises


def with_labels(problem: str, guide: str) -> bool:
    """Whether the condition is a label."""
    return PROBLEMS[problem].num_labels > 0


def labels_in_part(problem: str, guide: str) -> bool:
    """Whether some labels of a mixture are known."""
    return getattr(PROBLEMS[problem], "has_labels", False)


def exact_labels_in_part(problem: str, guide: str) -> bool:
    """Whether the guide is its posterior: then importance sampling has no noise."""
    return guide == "exact" and labels_in_part(problem, guide)


JUDGES: dict[str, Judge] = {
    "pointwise_elbo": Judge("its mean over draws is the ELBO of each datum", elbo_row),
    "elbo_terms: elbo": Judge("likewise", partial(term_row, term="elbo")),
    "elbo_terms: reconstruction": Judge(
        "its mean over draws is E_q log p(x | z, c)", partial(term_row, term="reconstruction")
    ),
    "elbo_terms: kl": Judge(
        "its mean over draws is the divergence of the local sites given the global ones",
        partial(term_row, term="kl"),
        is_defined=with_locals,
    ),
    "elbo_terms: kl_per_dim": Judge(
        "it is the part of each dimension (one at random in each row)",
        dimension_row,
        is_defined=factorises,
    ),
    "elbo_terms: kl_of_globals": Judge(
        "its mean over draws is KL(q || p) / N of the global sites",
        globals_row,
        "few",
        with_globals,
    ),
    "elbo_terms: activity": Judge(
        "it is the variance of the guide's mean over the population, and its standard error is "
        "right (one dimension at random in each row)",
        activity_row,
        "many",
        normal_locals,
    ),
    "log_likelihood": Judge(
        "exp of it is unbiased for p(x | c)", log_likelihood_row, is_defined=without_globals
    ),
    "log_predictive_density": Judge(
        "exp of it is unbiased for the density of a datum given globals from the guide",
        predictive_row,
    ),
    "label_check": Judge(
        "exp of it is unbiased for p(x | c) under every label", label_row, is_defined=with_labels
    ),
    "predict: q(y | x)": Judge(
        "it is the guide's probability of each label, all labels hidden",
        partial(predict_row, by="by_guide"),
        "few",
        labels_in_part,
    ),
    "predict: p(y | x)": Judge(
        "it is the model's, under the posterior",
        partial(predict_row, by="by_model"),
        "few",
        exact_labels_in_part,
        is_quick=False,
    ),
    "pointwise_log_likelihood": Judge("it is log p(x | z, c)", given_draws_row, "few"),
    "sample_posterior: mean": Judge(
        "its draws have the mean of q (along a random direction)",
        partial(posterior_row, moment=1),
        "few",
    ),
    "sample_posterior: variance": Judge(
        "its draws have the covariance of q (along a random direction)",
        partial(posterior_row, moment=2),
        "few",
    ),
    "sample_posterior_predictive: mean": Judge(
        "its draws have the mean of x under q", partial(replicated_row, moment=1), "few"
    ),
    "sample_posterior_predictive: variance": Judge(
        "its draws have the covariance of x under q", partial(replicated_row, moment=2), "few"
    ),
    "sample_prior_predictive: mean": Judge(
        "latents and x have the mean of p(x, z | c)", partial(prior_row, moment=1), "few"
    ),
    "sample_prior_predictive: variance": Judge(
        "latents and x have the covariance of p(x, z | c)", partial(prior_row, moment=2), "few"
    ),
    "encode": Judge("it is the mean of q, for each site that follows no other", encode_row, "few"),
    "decode": Judge("it is the mean of p(x | z, c)", decode_row, "few"),
    "bracket: below, from the prior": Judge(
        "exp of the bound from below is unbiased for p(x | c)",
        partial(below_row, start="prior"),
        is_defined=continuous,
        is_quick=False,
    ),
    "bracket: below, from the guide": Judge(
        "likewise", partial(below_row, start="guide"), is_defined=wide_continuous
    ),
    "bracket: above, from the prior": Judge(
        "exp of minus the bound from above is unbiased for 1 / p(x | c), on its simulated data",
        partial(above_row, start="prior"),
        is_defined=continuous,
        is_quick=False,
    ),
    "bracket: above, from the guide": Judge(
        "likewise", partial(above_row, start="guide"), is_defined=wide_continuous
    ),
    "sbc: mean": Judge(
        "the place of z among draws of the guide has its mean (one dimension at random)",
        partial(place_row, moment=1),
        "few",
        continuous,
    ),
    "sbc: variance": Judge(
        "it has its second moment about 1/2",
        partial(place_row, moment=2),
        "few",
        continuous,
    ),
    "sbc: coverage": Judge(
        "the guide's central 90 % hold z as often as they must",
        coverage_row,
        "few",
        continuous,
    ),
    "sbc: log_likelihood": Judge(
        "under the posterior, the place of log p(x | z, c) has the mean 1/2",
        density_place_row,
        "few",
        exact_continuous,
    ),
}
