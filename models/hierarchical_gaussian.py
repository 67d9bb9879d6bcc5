"""The hierarchical Gaussian model: a global mean, local means, noise. Everything has a formula.

All data share an unknown mean mu. Each datum n has a local mean z_n near mu. We see it through
noise. The four numbers mu_0, tau_0, tau and sigma are known:

    mu         ~  Normal(mu_0, tau_0^2)                 the global mean
    z_n | mu   ~  Normal(mu, tau^2)                     the local mean of datum n, n = 1 .. N
    x_n | z_n  ~  Normal(z_n, sigma^2)                  the observation

Second arguments are variances. So x_n given mu is Normal(mu, s^2) with s^2 = tau^2 + sigma^2. The
exact posterior factorises over the data, given mu:

    p(mu, z | x)      =  p(mu | x) prod_n p(z_n | mu, x_n)
    p(mu | x)         =  Normal(m, v),    1 / v = 1 / tau_0^2 + N / s^2,
                                          m = v (mu_0 / tau_0^2 + sum_n x_n / s^2)
    p(z_n | mu, x_n)  =  Normal(k x_n + (1 - k) mu, k sigma^2),    k = tau^2 / s^2

A guide that is mean field between the global and the local means has the factors q(mu) q(z). It
cannot let z follow mu. ``mean_field_gap`` is the least that it loses.

The formulas are the textbook's (Gelman et al. 2013, section 5.4, with one observation for each z_n
and known variances). We deviate in one point: mu has a proper prior, so that p(x) exists.

| on paper      | in code                     | what it is                                        |
|---------------|-----------------------------|--------------------------------------------------|
| x             | ``x``, (N,)                 | observations                                     |
| z             | ``z``, (N,)                 | local means                                      |
| mu            | ``mu``, ()                  | the global mean                                  |
| mu_0, tau_0   | ``mu_0``, ``tau_0``         | mean and standard deviation of mu's prior        |
| tau           | ``tau``                     | standard deviation of z given mu                 |
| sigma         | ``sigma``                   | standard deviation of the noise                  |
| m, v          | ``mu_loc``, ``mu_scale``    | mean and standard deviation (sqrt v) of mu given x |
| k             | ``gain``                    | how far z_n follows x_n                          |

    from models import hierarchical_gaussian

    model = hierarchical_gaussian.Model(tau=0.5)
    hierarchical_gaussian.posterior(model, {"x": x}).mu_loc
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jaxtyping import Float

from models.gaussian_mean import require_deviation
from models.networks import Encoder, check_shape

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The program p(x, mu, z). Without ``x`` it generates one datum.

    Attributes:
        mu_0: the mean of the global mean's prior.
        tau_0: the standard deviation of that prior, positive.
        tau: the standard deviation of a local mean about the global one, positive.
        sigma: the standard deviation of the noise, positive.

    Raises:
        ValueError: a deviation is not positive, or a number is not finite.
    """

    mu_0: float = 0.0
    tau_0: float = 1.0
    tau: float = 1.0
    sigma: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.mu_0):
            raise ValueError(f"mu_0: expected a finite number, got {self.mu_0}")
        for name in ("tau_0", "tau", "sigma"):
            require_deviation(name, getattr(self, name))

    @property
    def marginal_variance(self) -> float:
        """s^2 = tau^2 + sigma^2, the variance of x_n given mu."""
        return self.tau**2 + self.sigma**2

    @property
    def gain(self) -> float:
        """k = tau^2 / s^2, how far z_n follows x_n. The rest, 1 - k, follows mu."""
        return self.tau**2 / self.marginal_variance

    def check_data(self, x: Any = None) -> None:
        """Refuses arrays that are not one number per datum.

        Args:
            x: an array (N,). None for none.

        Raises:
            ValueError: another shape.
        """
        if x is not None and x.ndim != 1:
            raise ValueError(
                f"x: expected one number per datum, shape (N,), got {x.shape}; give one column, "
                f"for example x[:, 0]"
            )

    def encoder(
        self, num_outputs: int, *, hidden: Sequence[int] | None = None, rngs: nnx.Rngs
    ) -> Encoder:
        """A network from x to a guide's numbers: an affine map, unless ``hidden`` is given.

        Args:
            num_outputs: how many numbers it gives for one datum.
            hidden: units of the hidden layers. Default: none.
            rngs: Flax's random numbers.
        """
        return Encoder((), hidden or (), num_outputs, rngs=rngs)

    def __call__(self, x: Float[Any, " N"] | None = None) -> None:
        """Samples mu, z and x, and observes x if it is given.

        Args:
            x: floats (N,). None to generate.

        Raises:
            ValueError: an array of another shape.
        """
        if x is not None:
            check_shape(x, ())
        mu = numpyro.sample("mu", dist.Normal(self.mu_0, self.tau_0))
        with numpyro.plate("data", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(mu, self.tau))
            numpyro.sample("x", dist.Normal(z, self.sigma), obs=x)


# --- what is known in closed form -----------------------------------------------------------------
#
# All in float64, and no array is larger than the data.


@dataclass(frozen=True)
class Posterior:
    """p(mu, z | x): a Normal for mu, and for each z_n a Normal about an affine function of mu.

    Attributes:
        mu_loc: the mean of mu, m.
        mu_scale: the standard deviation of mu, the root of v.
        intercept: k x_n, the mean of z_n at mu = 0. (N,).
        slope: 1 - k, how far the mean of z_n follows mu.
        scale: the standard deviation of z_n given mu.
    """

    mu_loc: float
    mu_scale: float
    intercept: Float[np.ndarray, " N"]
    slope: float
    scale: float

    @property
    def z_loc(self) -> Float[np.ndarray, " N"]:
        """The mean of each z_n, mu unknown."""
        return self.intercept + self.slope * self.mu_loc

    @property
    def z_scale(self) -> float:
        """The standard deviation of each z_n, mu unknown."""
        return math.hypot(self.scale, self.slope * self.mu_scale)

    def log_prob(self, mu: Any, z: Any) -> float:
        """log p(mu, z | x) of all latents together, in nats.

        Args:
            mu: one number.
            z: (N,).
        """
        mu, z = float(mu), np.asarray(z, np.float64)
        global_term = _log_normal(mu, self.mu_loc, self.mu_scale**2)
        local_terms = _log_normal(z, self.intercept + self.slope * mu, self.scale**2)
        return float(global_term + local_terms.sum())


def _log_normal(value: Any, loc: Any, variance: float) -> Any:
    return -0.5 * (math.log(2 * math.pi * variance) + (value - loc) ** 2 / variance)


def _observations(data: Mapping[str, Any]) -> Float[np.ndarray, " N"]:
    return np.asarray(data["x"], np.float64)


def posterior(model: Model, data: Mapping[str, Any]) -> Posterior:
    """The exact p(mu, z | x).

    Precisions add. All x_n together measure mu with the variance s^2 / N. The mean m is the
    average of mu_0 and the mean of x, weighted by precision.

    Args:
        model: the model.
        data: ``x``, (N,).
    """
    x, k = _observations(data), model.gain
    precision = 1 / model.tau_0**2 + len(x) / model.marginal_variance
    mu_loc = (model.mu_0 / model.tau_0**2 + x.sum() / model.marginal_variance) / precision
    return Posterior(
        mu_loc=float(mu_loc),
        mu_scale=1 / math.sqrt(precision),
        intercept=k * x,
        slope=1 - k,
        scale=math.sqrt(k) * model.sigma,
    )


def log_evidence(model: Model, data: Mapping[str, Any]) -> float:
    """The exact log p(x) of all data together, divided by N: nats per datum, as the ELBO has.

    The covariance of x is s^2 I + tau_0^2 1 1^T. Its eigenvectors are the direction of the mean
    and all that are orthogonal to it. Let a be the mean of x. Then

        log det  =  (N - 1) log s^2 + log(s^2 + N tau_0^2)
        square   =  sum_n (x_n - a)^2 / s^2 + N (a - mu_0)^2 / (s^2 + N tau_0^2).

    The ELBO of a guide is at most this number. The best mean-field guide reaches it less
    ``mean_field_gap``.

    Args:
        model: the model.
        data: ``x``, (N,).
    """
    x, s2 = _observations(data), model.marginal_variance
    N, mean = len(x), x.mean()
    along = s2 + N * model.tau_0**2
    log_det = (N - 1) * math.log(s2) + math.log(along)
    square = np.sum((x - mean) ** 2) / s2 + N * (mean - model.mu_0) ** 2 / along
    return float(-0.5 * (N * math.log(2 * math.pi) + log_det + square) / N)


def updated(model: Model, data: Mapping[str, Any]) -> Model:
    """The model after some data: its prior of mu is p(mu | x). Local means are new.

    So ``log_evidence(updated(model, data), new)`` is the exact log p(x_new | x) of all new data
    together, in nats per new datum.

    Args:
        model: the model.
        data: ``x``, (N,).
    """
    after = posterior(model, data)
    return replace(model, mu_0=after.mu_loc, tau_0=after.mu_scale)


def log_predictive_density(
    model: Model, data: Mapping[str, Any], new: Mapping[str, Any]
) -> Float[np.ndarray, " M"]:
    """The exact log p(x_new | x), in nats, for each new datum by itself.

    x_new is mu, plus z's deviation, plus noise. The variances add: Normal(m, v + s^2).

    Args:
        model: the model.
        data: ``x``, (N,), the data that are known.
        new: ``x``, (M,).
    """
    after = updated(model, data)
    variance = after.tau_0**2 + after.marginal_variance
    return _log_normal(_observations(new), after.mu_0, variance)


def mean_field_gap(model: Model, num_data: int) -> float:
    """The loss of the best guide q(mu) q(z), in nats per datum: KL(q || p(mu, z | x)) / N.

    Let Lambda be the precision of the joint posterior. For mu it has 1 / tau_0^2 + N / tau^2, for
    each z_n 1 / tau^2 + 1 / sigma^2, and -1 / tau^2 between mu and each z_n. The best q has the
    posterior's means, and the blocks of Lambda as precisions. It loses

        1/2 (log Lambda_mu + log det Lambda_z - log det Lambda)
          =  1/2 log( (1 / tau_0^2 + N / tau^2) / (1 / tau_0^2 + N / s^2) )

    because log det Lambda = log det Lambda_z - log v. The block Lambda_z is diagonal, so the best
    q(z) factorises: a fully factorised guide loses no more. The best mean of each q(z_n) is affine
    in x_n, so amortisation loses nothing.

    Args:
        model: the model.
        num_data: N. The gap does not depend on the values of x.

    Raises:
        ValueError: ``num_data`` is not positive.
    """
    if num_data < 1:
        raise ValueError(f"num_data: expected at least 1, got {num_data}")
    prior = 1 / model.tau_0**2
    given_z, given_x = num_data / model.tau**2, num_data / model.marginal_variance
    return 0.5 * math.log((prior + given_z) / (prior + given_x)) / num_data
