"""Bayesian linear regression: all latents are global, and everything has a formula.

A response x is an affine function of D covariates c, plus noise. The weights w and the intercept b
are unknown. All data share them. The three deviations are known:

    w            ~  Normal(0, w_scale^2 I)                 the weights, w in R^D
    b            ~  Normal(0, b_scale^2)                   the intercept
    x_n | c_n    ~  Normal(c_n . w + b, sigma^2)           the response of datum n, n = 1 .. N

Second arguments are variances. Let beta = (w, b), let F have the rows (c_n, 1), and let Lambda_0 be
the diagonal precision of the prior. Then

    p(beta | x, c)  =  Normal(m, Lambda^-1),    m = Lambda^-1 F^T x / sigma^2    (Bishop 2006, 3.53)
    Lambda          =  Lambda_0 + F^T F / sigma^2                                (Bishop 2006, 3.54)

The guide of a family has the factors of that family: a mean-field guide has one for each number of
beta, a full-covariance guide is the posterior. ``mean_field_gap`` is the least that mean field
loses.

We deviate from Bishop in one point: the intercept has a deviation of its own.

| on paper (Bishop)   | in code                     | what it is                                   |
|---------------------|-----------------------------|----------------------------------------------|
| t                   | ``x``, (N,)                 | responses                                    |
| x                   | ``c``, (N, D)               | covariates                                   |
| w                   | ``w``, (D,), and ``b``, ()  | weights and intercept                        |
| alpha^(-1/2)        | ``w_scale``, ``b_scale``    | standard deviations of the prior             |
| beta^(-1/2)         | ``sigma``                   | standard deviation of the noise              |
| S_N^-1              | ``precision(model, data)``  | Lambda, (D + 1, D + 1), of w_1 .. w_D, b     |

    from models import regression

    model = regression.Model(num_features=3)
    mean, covariance = regression.posterior(model, {"c": c, "x": x})
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Float

from models.conditions import Values, check_given
from models.gaussian_mean import require_deviation
from models.networks import check_shape

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The program p(x, w, b | c). Without ``x`` it generates one response for each condition.

    Attributes:
        num_features: D, the number of covariates.
        w_scale: the standard deviation of each weight's prior, positive.
        b_scale: the standard deviation of the intercept's prior, positive.
        sigma: the standard deviation of the noise, positive.

    Raises:
        ValueError: a number is not positive, or a deviation is not finite.
    """

    num_features: int = 1
    w_scale: float = 1.0
    b_scale: float = 1.0
    sigma: float = 1.0

    def __post_init__(self):
        if self.num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {self.num_features}")
        for name in ("w_scale", "b_scale", "sigma"):
            require_deviation(name, getattr(self, name))

    def check_data(self, c: Any = None, x: Any = None) -> None:
        """Refuses covariates and responses that the model is not made for.

        Args:
            c: an array (N, D).
            x: an array (N,). None for none.

        Raises:
            ValueError: ``c`` is missing, or an array has another shape.
        """
        condition = Values((self.num_features,))
        check_given(condition, c)
        condition.check(c)
        if x is not None and x.ndim != 1:
            raise ValueError(
                f"x: expected one response per datum, shape (N,), got {x.shape}; give one column, "
                f"for example x[:, 0]"
            )

    def __call__(self, c: Float[Any, "N D"], x: Float[Any, " N"] | None = None) -> None:
        """Samples w, b and x given c, and observes x if it is given.

        Args:
            c: covariates (N, D).
            x: responses (N,). None to generate.

        Raises:
            ValueError: an array of another shape.
        """
        Values((self.num_features,)).check(c)
        if x is not None:
            check_shape(x, ())
        w_prior = dist.Normal(0, self.w_scale).expand([self.num_features]).to_event(1)
        w = numpyro.sample("w", w_prior)
        b = numpyro.sample("b", dist.Normal(0, self.b_scale))
        with numpyro.plate("data", len(c)):
            numpyro.sample("x", dist.Normal(c @ w + b, self.sigma), obs=x)


# --- what is known in closed form -----------------------------------------------------------------
#
# All in float64. The largest arrays are as large as the data, or K x K with K = D + 1.


def _features(data: Mapping[str, Any]) -> Float[np.ndarray, "N K"]:
    c = np.asarray(data["c"], np.float64)
    return np.concatenate([c, np.ones((len(c), 1))], axis=1)


def _responses(data: Mapping[str, Any]) -> Float[np.ndarray, " N"]:
    return np.asarray(data["x"], np.float64)


def _prior_precisions(model: Model) -> Float[np.ndarray, " K"]:
    return np.array([model.w_scale**-2] * model.num_features + [model.b_scale**-2])


def precision(model: Model, data: Mapping[str, Any]) -> Float[np.ndarray, "K K"]:
    """The precision of p(w, b | x, c), Lambda = Lambda_0 + F^T F / sigma^2. Order: w_1 .. w_D, b.

    Args:
        model: the model.
        data: ``c``, (N, D). The responses do not count.
    """
    F = _features(data) / model.sigma
    return np.diag(_prior_precisions(model)) + F.T @ F


def posterior(
    model: Model, data: Mapping[str, Any]
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "K K"]]:
    """The exact p(w, b | x, c): mean and covariance. Order: w_1 .. w_D, b.

    Args:
        model: the model.
        data: ``c``, (N, D), and ``x``, (N,).
    """
    matrix, F = precision(model, data), _features(data)
    mean = np.linalg.solve(matrix, F.T @ _responses(data) / model.sigma**2)
    return mean, np.linalg.inv(matrix)


def log_evidence(model: Model, data: Mapping[str, Any]) -> float:
    """The exact log p(x | c) of all data together, divided by N: nats per datum, as the ELBO has.

    The covariance of x is S = sigma^2 I + F Lambda_0^-1 F^T. Let m be the posterior's mean. The
    lemmas on determinants and inverses of sums give

        log det S   =  N log sigma^2 + log det Lambda - log det Lambda_0
        x^T S^-1 x  =  |x - F m|^2 / sigma^2 + m^T Lambda_0 m.

    The ELBO of a guide is at most this number. The best mean-field guide reaches it less
    ``mean_field_gap``.

    Args:
        model: the model.
        data: ``c``, (N, D), and ``x``, (N,).
    """
    x, F, prior = _responses(data), _features(data), _prior_precisions(model)
    mean, _ = posterior(model, data)
    log_det = 2 * len(x) * math.log(model.sigma)
    log_det += np.linalg.slogdet(precision(model, data))[1] - np.log(prior).sum()
    square = np.sum(((x - F @ mean) / model.sigma) ** 2) + np.sum(prior * mean**2)
    return float(-0.5 * (len(x) * math.log(2 * math.pi) + log_det + square) / len(x))


def log_predictive_density(
    model: Model, data: Mapping[str, Any], new: Mapping[str, Any]
) -> Float[np.ndarray, " M"]:
    """The exact log p(x_new | c_new, x, c), in nats, for each new datum by itself.

    It is Normal(f . m, sigma^2 + f . Lambda^-1 f), f = (c_new, 1) (Bishop 2006, equation 3.58).

    Args:
        model: the model.
        data: ``c``, (N, D), and ``x``, (N,), the data that are known.
        new: ``c``, (M, D), and ``x``, (M,).
    """
    (mean, covariance), F = posterior(model, data), _features(new)
    variance = model.sigma**2 + np.sum(F @ covariance * F, axis=1)
    square = (_responses(new) - F @ mean) ** 2 / variance
    return -0.5 * (np.log(2 * math.pi * variance) + square)


def joint_log_predictive_density(
    model: Model, data: Mapping[str, Any], new: Mapping[str, Any]
) -> float:
    """The exact log p(x_new | c_new, x, c) of all new data together, in nats per new datum.

    It is the difference of two evidences, log p(x, x_new | ...) - log p(x | c).

    Args:
        model, data, new: as in ``log_predictive_density``.
    """
    both = {name: np.concatenate([data[name], new[name]]) for name in ("c", "x")}
    num_data, num_new = len(data["x"]), len(new["x"])
    total = (num_data + num_new) * log_evidence(model, both)
    return (total - num_data * log_evidence(model, data)) / num_new


def mean_field_gap(model: Model, data: Mapping[str, Any]) -> float:
    """The loss of the best mean-field Gaussian guide, KL(q || p(w, b | x, c)) / N: nats per datum.

    The best q has the posterior's means and the variances 1 / Lambda_ii. It loses

        1/2 (sum_i log Lambda_ii - log det Lambda)  >=  0        (Hadamard's inequality)

    for all data together, as in ``models/linear_gaussian.py``. It is zero if and only if the
    columns of F are orthogonal.

    Args:
        model: the model.
        data: ``c``, (N, D). The responses do not count.
    """
    matrix = precision(model, data)
    loss = 0.5 * (np.sum(np.log(np.diag(matrix))) - np.linalg.slogdet(matrix)[1])
    return float(loss / len(data["c"]))
