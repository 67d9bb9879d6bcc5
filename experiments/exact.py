"""Fit every guide family and every objective to models with exact answers, on real data.

    python experiments/exact.py

The models are called rungs. They describe scikit-learn's diabetes data: ten covariates and a
response of 442 patients, each standardised.

| rung              | describes                     | latent sites                        |
|-------------------|-------------------------------|-------------------------------------|
| linear-gaussian   | the covariates                | z of each patient                   |
| hierarchical      | the response                  | z of each patient, mu of all        |
| regression        | the response, given covariates| weights w and intercept b of all    |
| mixture           | nine covariates               | the sex y of each patient           |

Models are held and guides are trained. The linear-Gaussian model has the maximum-likelihood
parameters of the data, with z rotated at random. The mixture has a component for each sex, with its
share, mean and covariance. The guide is told the sex of every second patient. The other two have no
parameters. So the gap is the guide's alone:

    gap  =  log p(x | c) - ELBO  =  KL(q || posterior),    in nats per datum.

- **Gap.** For a Normal guide, and for one of y, it is a formula of the fitted parameters. For a
  flow it is sampled.
- **Least gap.** The formulas of ``models/`` give the least that a family loses. Low rank on the
  linear-Gaussian rung has bounds instead: it contains the mean field.
- **Within.** No fit may have a gap below the family's least. A fit of an objective that the rung
  claims also has a gap of at most the least plus the rung's ``room``. For others nothing is
  claimed: their optimum is not the ELBO's. The mixture's family holds the posterior, where every
  objective has its optimum.

A formula is off by at most ``ROUNDING``, and a sampled number by four standard errors. The sampled
ELBO must agree with the gap by formula, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.special import rel_entr
from tabulate import tabulate

from experiments.experiment import Data, DataTree, Experiment, Figure, Fits
from experiments.linear_gaussian import hold, log_likelihood
from experiments.runner import number, run
from experiments.settings import Machines, check_fraction, check_least, check_positive, command_line
from inference import OBJECTIVES, Estimate, Fit, Held, elbo_terms, to_datatree, traits
from models import guides, hierarchical_gaussian, linear_gaussian, mixture, regression
from models.labels import UNKNOWN

FAMILIES = ("mean-field", "structured", "low-rank", "full-covariance", "flow")
FAMILY = "mean-field"  # It stays while the objective changes.
TRAINABLE = tuple(n for n, make in OBJECTIVES.items() if not traits(make(2)).latents_from_data)
CLAIMED = (
    "Trace_ELBO",
    "TraceMeanField_ELBO",
    "TraceEnum_ELBO",
    "TraceGraph_ELBO",
    "sticking-the-landing",
)
LOCAL = ("doubly-reparameterized", "reweighted-wake-sleep")  # They refuse global sites.
DISCRETE = ("TraceEnum_ELBO", "TraceGraph_ELBO", "reweighted-wake-sleep")  # They take y.
SEX = 1  # its column among the covariates
NUM_BLOCKS = 20  # Draws are judged in so many blocks. The blocks' means give the error.
COLORS = {"yes": "C0", "no": "C3", "no claim": "C1"}  # of the gaps in the figure
ROUNDING = 2e-5  # Of a gap by formula: the parameters are float32.


@dataclass(frozen=True)
class Config(Machines):
    """Settings of the exact comparisons.

    Attributes:
        quick: Whether to make a few fits, too short for the claims, to see that everything works.
        families: Families of guides. Default: all, or with quick the mean field.
        objectives: Objectives by name. Default: all, or with quick one bound beside the ELBO.
        num_latents: Dimensions of z on the linear-Gaussian rung.
        num_steps: Steps of the optimiser in each fit. Default: 5,000, or with quick 300.
        learning_rate: Greatest learning rate of Adam. It falls to zero along a cosine.
        average: Fraction of the run, at its end, over which parameters are averaged.
        num_particles: Draws of the latents in each step.
        num_samples: Draws of the latents, to judge the ELBO.
        seed: Random seed.
        out: Directory of the run. Default: a new one in runs/.
        progress: Whether to show progress bars.
    """

    quick: bool = False
    families: tuple[str, ...] | None = None
    objectives: tuple[str, ...] | None = None
    num_latents: int = 5
    num_steps: int | None = None
    learning_rate: float = 0.02
    average: float = 0.1
    num_particles: int = 4
    num_samples: int = 400
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("families", FAMILIES), ("objectives", TRAINABLE)):
            given = getattr(self, name)
            for value in () if given is None else given:
                if value not in known:
                    raise ValueError(f"{name}: expected some of {', '.join(known)}, got {value!r}")
        check_least(1, self, "num_latents", "num_steps", "num_particles")
        check_least(NUM_BLOCKS, self, "num_samples")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate")
        check_fraction(self, "average")

    @property
    def steps(self) -> int:
        """Steps of the optimiser in each fit."""
        return self.num_steps or (300 if self.quick else 5_000)

    def names(self) -> list[str]:
        """The names of the fits: every family with one objective, every objective with one."""
        quick = ((FAMILY,), ("Trace_ELBO", "importance-weighted"))
        default = quick if self.quick else (FAMILIES, TRAINABLE)
        families, objectives = self.families or default[0], self.objectives or default[1]
        names = []
        for rung, kind in RUNGS.items():
            shared = guides.GLOBALS if kind.has_globals and not self.quick else ("mean_field",)
            names += [
                Name(rung, family, of_globals, kind.objectives[0])
                for family in families
                if family in kind.families
                for of_globals in shared
            ]
            names += [
                Name(rung, FAMILY, "mean_field", objective)
                for objective in objectives
                if objective in kind.objectives
            ]
        return list(dict.fromkeys("/".join(name) for name in names))


class Name(NamedTuple):
    """What a fit is, and with slashes between them its name."""

    rung: str
    family: str
    globals: str
    objective: str

    @staticmethod
    def of(name: str) -> "Name":
        """The parts of a name."""
        return Name(*name.split("/"))


@dataclass(frozen=True)
class Record:
    """What the models need to know of the data.

    Attributes:
        name: the data set's name.
        num_features: the number of covariates.
        maximum: the maximum-likelihood ``W``, ``b`` and ``sigma`` of the linear-Gaussian rung.
        classes: the ``logits``, ``loc`` and ``scale_tril`` of the mixture.
    """

    name: str
    num_features: int
    maximum: dict[str, Any]
    classes: dict[str, Any]


# --- the rungs ------------------------------------------------------------------------------------


def divergence(
    q: tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K K"]],
    p: tuple[Float[np.ndarray, "*N K"], Float[np.ndarray, "K K"]],
) -> Float[np.ndarray, " N"]:
    """KL(q || p) of Normals, in nats.

    Args:
        q: means and precisions.
        p: means and one covariance.
    """
    (q_mean, q_precision), (p_mean, p_covariance) = q, p
    precision, covariance = np.linalg.inv(p_covariance), np.linalg.inv(q_precision)
    product = precision @ covariance
    away = q_mean - p_mean
    square = np.sum(away @ precision * away, axis=-1)
    trace = np.trace(product, axis1=-2, axis2=-1)
    return 0.5 * (trace - len(precision) - np.linalg.slogdet(product)[1] + square)


class Rung:
    """A model with an exact answer.

    Attributes:
        has_globals: whether all data share some latent site.
        latents: the latent sites, the global ones first.
        room: nats per datum that a fit may lose beyond its family's least gap.
        families: the families of guides that draw such sites.
        objectives: the objectives that take them. The families are compared with the first.
        claimed: the objectives with the ELBO's optimum.
    """

    has_globals: bool
    latents: tuple[str, ...]
    room: float
    families: tuple[str, ...] = FAMILIES
    objectives: tuple[str, ...] = TRAINABLE
    claimed: tuple[str, ...] = CLAIMED

    def __init__(self, config: Config, record: Record):
        self.config, self.record = config, record

    @staticmethod
    def arrays(train: Mapping[str, Any]) -> dict[str, Any]:
        """The data of this rung, from all."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """The model, which the guides are made from."""
        raise NotImplementedError

    @property
    def program(self) -> Any:
        """What is trained: the model, its parameters held."""
        return self.model

    def exact(self, data: Mapping[str, Any]) -> float:
        """log p(x | c), in nats per datum."""
        raise NotImplementedError

    def least_gap(self, name: Name, data: Mapping[str, Any]) -> tuple[float, float]:
        """The least gap of a family, in nats per datum.

        Returns:
            A lower and an upper bound. They are equal where there is a formula.
        """
        raise NotImplementedError

    def q(self, fitted: Fit, family: str, data: Mapping[str, Any]) -> Any:
        """The numbers of a fitted guide that ``gap`` takes. None if it has no formula.

        Args:
            fitted: a fit. Its first seed counts.
            family: the guide's family.
            data: the data of this rung.
        """
        return normals(fitted, self.latents, data)

    def gap(self, q: Any, data: Mapping[str, Any]) -> float:
        """The gap of a guide, in nats per datum.

        Args:
            q: means and precisions of ``latents``, for each datum.
            data: the data of this rung.
        """
        raise NotImplementedError


class LinearGaussian(Rung):
    """The linear-Gaussian model of the covariates, its parameters held."""

    has_globals, latents, room = False, ("z",), 0.03

    @staticmethod
    def arrays(train: Mapping[str, Any]) -> dict[str, Any]:
        """The covariates are x."""
        return {"x": train["c"]}

    @property
    def model(self) -> linear_gaussian.Model:
        """The model."""
        return linear_gaussian.Model((self.record.num_features,), self.config.num_latents)

    @property
    def program(self) -> Any:
        """The model at the maximum of the likelihood, its latent axes rotated at random."""
        maximum = {n: np.asarray(p, np.float32) for n, p in self.record.maximum.items()}
        return hold(self.model, maximum, self.config.seed)

    def exact(self, data: Mapping[str, Any]) -> float:
        """log p(x)."""
        return float(log_likelihood(self.model, self.program.params, data).mean())

    def least_gap(self, name: Name, data: Mapping[str, Any]) -> tuple[float, float]:
        """With one site, the structured family is the mean field."""
        mean_field = float(linear_gaussian.mean_field_gap(self.program.params))
        if name.family in ("mean-field", "structured"):
            return mean_field, mean_field
        return 0.0, mean_field if name.family == "low-rank" else 0.0

    def q(self, fitted: Fit, family: str, data: Mapping[str, Any]) -> Any:
        """A flow bends its Normal."""
        return None if family == "flow" else super().q(fitted, family, data)

    def gap(self, q: tuple[Any, Any], data: Mapping[str, Any]) -> float:
        """The mean of KL(q(z | x) || p(z | x))."""
        exact = linear_gaussian.posterior(self.model, self.program.params, data)
        mean, covariance = (np.asarray(part, np.float64) for part in exact)
        return float(divergence(q, (mean, covariance)).mean())


class Hierarchical(Rung):
    """The hierarchical Gaussian model of the response."""

    has_globals, latents, room = True, ("mu", "z"), 0.0005
    objectives = tuple(name for name in TRAINABLE if name not in LOCAL)

    @staticmethod
    def arrays(train: Mapping[str, Any]) -> dict[str, Any]:
        """The response is x."""
        return {"x": train["x"]}

    @property
    def model(self) -> hierarchical_gaussian.Model:
        """The model. Given mu, x has about the variance 1 of the data."""
        return hierarchical_gaussian.Model(tau=0.3, sigma=0.95)

    def exact(self, data: Mapping[str, Any]) -> float:
        """log p(x) of all data, divided by N."""
        return hierarchical_gaussian.log_evidence(self.model, data)

    def least_gap(self, name: Name, data: Mapping[str, Any]) -> tuple[float, float]:
        """No family lets z follow mu."""
        least = hierarchical_gaussian.mean_field_gap(self.model, len(data["x"]))
        return least, least

    def gap(self, q: tuple[Any, Any], data: Mapping[str, Any]) -> float:
        """KL(q(mu) || p(mu | x)) and the mean of KL(q(z_n) || p(z_n | mu, x_n)) over q(mu).

        The mean of z_n follows mu, and mu varies. So the square of the difference grows by the
        variance of what follows.
        """
        exact = hierarchical_gaussian.posterior(self.model, data)
        mean, variance = q[0], 1 / np.diagonal(q[1], axis1=1, axis2=2)
        (mu, z), (mu_variance, z_variance) = mean.T, variance.T
        of_mu = (mu[0] - exact.mu_loc) ** 2 + mu_variance[0]
        of_z = (z - exact.intercept - exact.slope * mu[0]) ** 2 + z_variance
        of_z += exact.slope**2 * mu_variance[0]

        def half(squares: Any, variance: Any, scale: float) -> Any:
            return 0.5 * (squares / scale**2 - 1 - np.log(variance / scale**2))

        shared = half(of_mu, mu_variance[0], exact.mu_scale) / len(z)
        return float(shared + half(of_z, z_variance, exact.scale).mean())


class Regression(Rung):
    """The linear regression of the response on the covariates. The noise is known."""

    has_globals, latents, room = True, ("w", "b"), 0.0005
    objectives = Hierarchical.objectives

    @staticmethod
    def arrays(train: Mapping[str, Any]) -> dict[str, Any]:
        """The covariates are c and the response is x."""
        return {"c": train["c"], "x": train["x"]}

    @property
    def model(self) -> regression.Model:
        """The model."""
        return regression.Model(self.record.num_features, sigma=0.7)

    def exact(self, data: Mapping[str, Any]) -> float:
        """log p(x | c) of all data, divided by N."""
        return regression.log_evidence(self.model, data)

    def least_gap(self, name: Name, data: Mapping[str, Any]) -> tuple[float, float]:
        """Without local sites, only the family of the globals counts."""
        joint = name.globals == "full_covariance"
        least = 0.0 if joint else regression.mean_field_gap(self.model, data)
        return least, least

    def gap(self, q: tuple[Any, Any], data: Mapping[str, Any]) -> float:
        """KL(q(w, b) || p(w, b | x, c)) / N."""
        exact = regression.posterior(self.model, data)
        return float(divergence((q[0][:1], q[1][:1]), exact)[0] / len(data["x"]))


class Mixture(Rung):
    """The mixture of nine covariates over the two sexes, its parameters held."""

    has_globals, latents, room = False, ("y",), 0.005
    families, objectives, claimed = ("mean-field", "structured"), DISCRETE, DISCRETE

    @staticmethod
    def arrays(train: Mapping[str, Any]) -> dict[str, Any]:
        """The other covariates are x. The sex is y: of every second patient, -1 for the rest."""
        c = train["c"]
        sex = (c[:, SEX] > 0).astype(np.int32)
        is_known = np.arange(len(c)) % 2 == 0
        return {"x": np.delete(c, SEX, axis=1), "y": np.where(is_known, sex, UNKNOWN)}

    @property
    def model(self) -> mixture.Model:
        """The model."""
        return mixture.Model(2, (self.record.num_features - 1,))

    @property
    def program(self) -> Any:
        """The model with the share, the mean and the covariance of each sex."""
        classes = self.record.classes
        return Held(self.model, {name: np.asarray(p, np.float32) for name, p in classes.items()})

    def exact(self, data: Mapping[str, Any]) -> float:
        """log p(x, y) where y is known, and log p(x) elsewhere."""
        return float(mixture.log_likelihood(self.program.params, **data).mean())

    def least_gap(self, name: Name, data: Mapping[str, Any]) -> tuple[float, float]:
        """The encoder holds p(y | x)."""
        return 0.0, 0.0

    def q(self, fitted: Fit, family: str, data: Mapping[str, Any]) -> Float[np.ndarray, "N K"]:
        """The probability of each y given x in the guide: 1 where the data tell it."""
        values = fitted.params_of(0) | fitted.mutable_of(0)

        @jax.jit
        def log_q(data: Mapping[str, Array]) -> Array:
            run = handlers.seed(handlers.substitute(fitted.guide, data=values), random.key(0))
            fn = handlers.trace(run).get_trace(**data)["y"]["fn"]
            return jnp.stack([fn.log_prob(y) for y in range(self.model.num_components)], axis=-1)

        q = np.exp(np.asarray(log_q(dict(data)), np.float64))
        return q / q.sum(1, keepdims=True)

    def gap(self, q: Any, data: Mapping[str, Any]) -> float:
        """The mean of KL(q(y | x) || p(y | x)). It is 0 where y is known.

        Args:
            q: probabilities (N, K).
            data: the data of this rung.
        """
        return float(rel_entr(q, mixture.posterior(self.program.params, **data)).sum(1).mean())


RUNGS: dict[str, type[Rung]] = {
    "linear-gaussian": LinearGaussian,
    "hierarchical": Hierarchical,
    "regression": Regression,
    "mixture": Mixture,
}


# --- data, programs, training ---------------------------------------------------------------------


def diabetes(config: Config) -> Data:
    """The covariates ``c``, (442, 10), and the response ``x``, (442,), standardised."""
    from sklearn.datasets import load_diabetes  # takes a second

    c, x = load_diabetes(return_X_y=True, scaled=False)
    c, x = (((a - a.mean(0)) / a.std(0)).astype(np.float32) for a in (c, x))
    model = linear_gaussian.Model((c.shape[1],), config.num_latents)
    maximum, _ = linear_gaussian.maximum_likelihood(model, {"x": c})
    record = Record("diabetes", c.shape[1], listed(maximum), listed(classes(c)))
    return Data(record, {"c": c, "x": x}, maximum)


def classes(c: Float[np.ndarray, "N D"]) -> dict[str, np.ndarray]:
    """The share, the mean and the covariance of the other covariates of each sex.

    They maximise the likelihood of the mixture if every y is known.
    """
    sex, x = c[:, SEX] > 0, np.delete(c, SEX, axis=1).astype(np.float64)
    parts = [x[~sex], x[sex]]
    return {
        "logits": np.log([len(part) / len(x) for part in parts]),
        "loc": np.stack([part.mean(0) for part in parts]),
        "scale_tril": np.linalg.cholesky(np.stack([np.cov(part.T, bias=True) for part in parts])),
    }


def listed(params: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as a file of settings holds them."""
    return {name: np.asarray(p, np.float32).tolist() for name, p in params.items()}


def arrays(data: Data, name: str) -> dict[str, Any]:
    """The data of the fit ``name``."""
    return RUNGS[Name.of(name).rung].arrays(data.train)


def rung_of(config: Config, record: Record, name: str) -> Rung:
    """The rung of the fit ``name``."""
    return RUNGS[Name.of(name).rung](config, record)


def programs(config: Config, record: Record, name: str, fits: Fits) -> tuple[Any, Any]:
    """The model, held, and the guide of the fit ``name``."""
    what, rung = Name.of(name), rung_of(config, record, name)
    return rung.program, guides.make(what.family, rung.model, globals=what.globals)


def training(config: Config, data: Data, name: str, fits: Fits) -> dict[str, Any]:
    """The settings of ``fit``: all data in every step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    return {
        "objective": OBJECTIVES[Name.of(name).objective](config.num_particles),
        "optimizer": optax.adam(schedule, b2=0.99),
        "num_steps": config.steps,
        "seed": config.seed,
        "average": config.average,
    }


# --- judging --------------------------------------------------------------------------------------


def normals(
    fitted: Fit, latents: tuple[str, ...], data: Mapping[str, Any]
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K K"]]:
    """Means and precisions of a Normal guide's latents, for each datum, globals among them.

    log q is a quadratic function of the latents. So the precision is minus its Hessian, and the
    mean is the precision's inverse times the gradient at zero.

    Args:
        fitted: a fit. Its first seed counts.
        latents: the latent sites, in this order.
        data: by name, (N, ...).
    """
    values = fitted.params_of(0) | fitted.mutable_of(0)

    def draw(batch: dict[str, Array]) -> list[Array]:
        run = handlers.seed(handlers.substitute(fitted.guide, data=values), random.key(0))
        sites = handlers.trace(run).get_trace(**batch)
        return [sites[name]["value"] for name in latents]

    shapes = jax.eval_shape(draw, {name: array[:1] for name, array in data.items()})
    zero, unravel = ravel_pytree([jnp.zeros(known.shape) for known in shapes])

    def log_q(u: Array, row: Mapping[str, Array]) -> Array:
        drawn = dict(zip(latents, unravel(u), strict=True))
        batch = {name: array[None] for name, array in row.items()}
        return log_density(fitted.guide, (), batch, values | drawn)[0]

    def derivatives(row: Mapping[str, Array]) -> tuple[Array, Array]:
        return jax.grad(log_q)(zero, row), -jax.hessian(log_q)(zero, row)

    found = jax.jit(jax.vmap(derivatives))(dict(data))
    gradient, precision = (np.asarray(part, np.float64) for part in found)
    return np.linalg.solve(precision, gradient[..., None])[..., 0], precision


class Judged(NamedTuple):
    """What the judges say of a fit, in nats per datum.

    Attributes:
        terms: the ELBO of each datum, without the divergence of global sites.
        elbo: the ELBO of all data, sampled.
        error: the standard error of ``elbo``, from the draws alone.
        exact: log p(x | c).
        least: bounds of the family's least gap.
        gap: the gap by formula. None if the guide has none.
    """

    terms: Estimate
    elbo: float
    error: float
    exact: float
    least: tuple[float, float]
    gap: float | None


def judge(config: Config, data: Data, fits: Fits) -> dict[str, Judged]:
    """What the judges say of every fit."""
    return {name: judged_fit(config, data, name, fitted) for name, fitted in fits.items()}


def judged_fit(config: Config, data: Data, name: str, fitted: Fit) -> Judged:
    """What the judges say of one fit."""
    rung, own, what = rung_of(config, data.record, name), arrays(data, name), Name.of(name)
    keys = random.split(random.key(config.seed), NUM_BLOCKS)
    size, num_samples = len(data.train["x"]), config.num_samples // NUM_BLOCKS
    blocks = [
        elbo_terms(fitted, own, key=key, num_samples=num_samples, batch_size=size) for key in keys
    ]
    totals = [
        block.elbo.estimate[0] - sum(kl[0] for kl in block.kl_of_globals.values())
        for block in blocks
    ]
    pointwise = np.mean([block.elbo.pointwise for block in blocks], axis=0, dtype=np.float64)
    q = rung.q(fitted, what.family, own)
    return Judged(
        Estimate("elbo", pointwise, num_samples * NUM_BLOCKS, blocks[0].elbo.data),
        float(np.mean(totals)),
        float(np.std(totals, ddof=1) / NUM_BLOCKS**0.5),
        rung.exact(own),
        rung.least_gap(what, own),
        None if q is None else rung.gap(q, own),
    )


def row(name: str, judged: Judged) -> dict[str, Any]:
    """The numbers of one fit, each beside what it must be."""
    (low, high), sampled, error = judged.least, judged.exact - judged.elbo, 4 * judged.error
    what, kind = Name.of(name), RUNGS[Name.of(name).rung]
    gap, slack = (sampled, error) if judged.gap is None else (judged.gap, ROUNDING)
    claimed, room = what.objective in kind.claimed, kind.room
    is_right = gap >= low - slack and abs(sampled - gap) <= error + ROUNDING
    is_right &= not claimed or gap <= high + room + slack
    return {
        "elbo": judged.elbo,
        "exact": judged.exact,
        "sampled_gap": sampled,
        "monte_carlo_error": judged.error,
        "gap": gap,
        "by_formula": judged.gap is not None,
        "least_gap": [low, high],
        "room": room if claimed else None,
        "within": ("yes" if claimed else "no claim") if is_right else "no",
    }


def summarize(
    config: Config, data: Data, fits: Fits, judged: Mapping[str, Judged]
) -> dict[str, Any]:
    """The numbers of ``result.json``: a row for each fit."""
    rows = {name: row(name, known) for name, known in judged.items()}
    return {"elbo": number(judged[first(config)].terms), "fits": rows}


def first(config: Config) -> str:
    """The name of the first fit. It has no global sites."""
    return config.names()[0]


def tree(config: Config, data: Data, fits: Fits, judged: Mapping[str, Judged]) -> DataTree:
    """The first fit. The others are in groups of their names."""
    whole = to_datatree(fits[first(config)], judged[first(config)].terms)
    for name in [name for name in fits if name != first(config)]:
        whole[name] = to_datatree(fits[name], judged[name].terms)
    return whole


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it."""
    rows = []
    for name, known in result["fits"].items():
        what, (low, high) = Name.of(name), known["least_gap"]
        error = "" if known["by_formula"] else f" +- {known['monte_carlo_error']:.5f}"
        rows.append(
            (
                what.rung,
                what.family,
                what.globals.replace("_", " ") if RUNGS[what.rung].has_globals else "-",
                what.objective,
                f"{known['elbo']:.4f} +- {known['monte_carlo_error']:.4f}",
                f"{known['exact']:.4f}",
                f"{known['gap']:.5f}{error}",
                f"{low:.5f}" if low == high else f"{low:.5f} to {high:.5f}",
                known["within"],
            )
        )
    headers = ("rung", "family", "globals", "objective", "ELBO", "log p", "gap", "least gap")
    body = tabulate(
        rows,
        (*headers, "within"),
        disable_numparse=True,
        colalign=("left",) * 4 + ("right",) * 4 + ("left",),
    )
    rooms = ", ".join(f"{name} {kind.room:g}" for name, kind in RUNGS.items())
    return (
        f"{body}\n\n"
        f"Nats per datum, +- standard error of the draws. Log p: exact. Gap: log p - ELBO, by "
        f"formula where it has no error.\n"
        f"Least gap: the least that any guide of the family loses, or bounds of it. Within: at "
        f"least that, and at most so much more:\n{rooms}. No claim: the objective's optimum is "
        f"not the ELBO's, and only the lower bound is checked.\n"
        f"{result['num_data']['train']} rows of {result['dataset']}"
    )


# --- figures --------------------------------------------------------------------------------------


def figures(
    config: Config, data: Data, fits: Fits, judged: Any, result: dict[str, Any]
) -> dict[str, Figure]:
    """The figures of a run."""
    return {"gaps": gaps_figure(result)}


def gaps_figure(result: Mapping[str, Any]) -> Figure:
    """The gap of every fit beside its family's least gap, a panel for each rung."""
    from matplotlib.figure import Figure

    by_rung = {rung: [] for rung in RUNGS}
    for name, known in result["fits"].items():
        by_rung[Name.of(name).rung].append((Name.of(name), known))
    heights = [len(rows) + 2 for rows in by_rung.values()]
    figure = Figure(figsize=(8, 1.5 + 0.24 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(by_rung), height_ratios=heights, squeeze=False)[:, 0]
    for axes, (rung, rows) in zip(panels, by_rung.items(), strict=True):
        for y, (_, known) in enumerate(rows):
            low, high = known["least_gap"]
            axes.plot([low, high], [y, y], "|-", color="black", ms=12, lw=1.2)
            error = 0 if known["by_formula"] else 4 * known["monte_carlo_error"]
            axes.errorbar(known["gap"], y, xerr=error, fmt="o", color=COLORS[known["within"]], ms=4)
        greatest = max(known["gap"] for _, known in rows)
        axes.set(
            xlim=(-0.03 * greatest, 1.05 * greatest),
            yticks=range(len(rows)),
            yticklabels=[label_of(what) for what, _ in rows],
            xlabel="gap (nats per datum)",
            ylabel="guide, globals, objective" if RUNGS[rung].has_globals else "guide, objective",
            title=rung,
        )
        axes.tick_params(axis="y", labelsize="x-small")
        axes.invert_yaxis()
    words = {"yes": "gap", "no": "gap that breaks its claim", "no claim": "gap, no claim"}
    handles = [panels[0].plot([], [], "|-", color="black", label="least gap, or its bounds")[0]]
    handles += [
        panels[0].plot([], [], "o", color=color, ms=4, label=words[within])[0]
        for within, color in COLORS.items()
        if any(known["within"] == within for known in result["fits"].values())
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize="small")
    return figure


def label_of(what: Name) -> str:
    """A fit as the figure names it."""
    shared = f", {what.globals.replace('_', ' ')}" if RUNGS[what.rung].has_globals else ""
    return f"{what.family}{shared}, {what.objective}"


EXPERIMENT = Experiment(
    name="exact",
    config=Config,
    record=Record,
    data=diabetes,
    programs=programs,
    training=training,
    judge=judge,
    summarize=summarize,
    tree=tree,
    figures=figures,
    table=table,
    names=Config.names,
    main=first,
    arrays=arrays,
)


def main(config: Config) -> dict[str, Any]:
    """Fit every guide family and every objective to models with exact answers."""
    return run(EXPERIMENT, config)


if __name__ == "__main__":
    command_line(main, Config)
