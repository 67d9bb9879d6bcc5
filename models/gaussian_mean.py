"""The Gaussian unknown-mean model: a conditional variational autoencoder with a known answer.

A condition c shifts an unknown mean z. We see z through noise. The prior's standard deviation
sigma_0 is known. The generative process has the parameters theta = (theta_1, theta_2, theta_3):

    z | c     ~  Normal(theta_1 + theta_2 * c,  sigma_0^2)          the prior     p(z | c)
    x | z, c  ~  Normal(z,  exp(theta_3))                           the likelihood p(x | z, c)

The guide looks at the observation and says where z must have been. Its parameters are phi:

    z | x, c  ~  Normal(phi_1 * x + phi_2 * c + phi_3,  exp(phi_4))                q(z | x, c)

Second arguments are variances. Training maximises the evidence lower bound (ELBO) of each datum,

    log p(x | c)  >=  E_q [ log p(x, z | c) - log q(z | x, c) ]
                   =  log p(x | c) - KL(q(z | x, c) || p(z | x, c)),

over theta and phi together: theta makes the data likely, phi makes the bound tight. This is a
conditional VAE with two affine maps as networks (Sohn, Lee & Yan 2015; they write x -> y for our
c -> x). Everything is Gaussian, so the best theta and phi are formulas. They stand at the end of
this file, and training can be compared with them.

The source is Tuan Anh Le's note "Conditional Variational Autoencoders" (27 June 2018). We
deviate from it in one point: where the search starts.

| on paper      | in code                     | what it is                                       |
|---------------|-----------------------------|--------------------------------------------------|
| c, x, z       | ``c``, ``x``, ``z``         | condition, observation, latent mean; each (N,)   |
| theta_1..3    | params ``theta_1..theta_3`` | prior's intercept and slope, log noise variance  |
| phi_1..4      | params ``phi_1..phi_4``     | guide's slopes, intercept, log variance          |
| sigma_0       | ``sigma_0``                 | known standard deviation of the prior            |
| mu_0, sigma   | ``mu_0``, ``sigma``         | the truth: z's mean at c = 0, noise's deviation  |
| s^2           | ``marginal_variance``       | sigma_0^2 + sigma^2, the variance of x given c   |
| k             | ``gain``                    | sigma_0^2 / s^2, how far z follows x             |
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import random
from jaxtyping import Array, ArrayLike, Float

from models.conditions import Values, check_given
from models.networks import Encoder

# --- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """The process that makes the data: theta = (mu_0, 1, log sigma^2) and c ~ Normal(0, 1).

    Attributes:
        mu_0: the mean of z where c is zero.
        sigma_0: standard deviation of z given c, positive.
        sigma: standard deviation of x given z, positive.

    Raises:
        ValueError: a deviation is not positive, or a number is not finite.
    """

    mu_0: float = 1.0
    sigma_0: float = 1.0
    sigma: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.mu_0):
            raise ValueError(f"mu_0: expected a finite number, got {self.mu_0}")
        for name in ("sigma_0", "sigma"):
            require_deviation(name, getattr(self, name))

    @property
    def marginal_variance(self) -> float:
        """s^2 = sigma_0^2 + sigma^2: x given c is a sum of two independent Gaussians."""
        return self.sigma_0**2 + self.sigma**2

    @property
    def gain(self) -> float:
        """k = sigma_0^2 / s^2, the regression coefficient of z on x given c."""
        return self.sigma_0**2 / self.marginal_variance

    def simulate(self, num_data: int, seed: int) -> dict[str, Float[np.ndarray, " N"]]:
        """Draws pairs of a condition ``c`` and an observation ``x``, arrays of ``num_data`` floats.

        Raises:
            ValueError: ``num_data`` is not positive, or float32 cannot hold x.
        """
        if num_data < 1:
            raise ValueError(f"num_data: expected at least 1, got {num_data}")
        rng = np.random.default_rng(seed)
        c = rng.normal(size=num_data)
        z = rng.normal(self.mu_0 + c, self.sigma_0)
        x = rng.normal(z, self.sigma)
        if max(abs(x.min()), abs(x.max())) > np.finfo(np.float32).max:
            raise ValueError(f"x: expected numbers that float32 holds, got some near {x[0]:.3g}")
        return {"c": c.astype(np.float32), "x": x.astype(np.float32)}


def require_deviation(name: str, value: float) -> None:
    """Refuses a standard deviation that is not positive and finite, with ValueError."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive, finite standard deviation, got {value}")


# --- model and guide ------------------------------------------------------------------------------
#
# Where the search starts: the guide believes the observation (z = x, give or take sigma_0). The
# prior sits near ``x_loc``, a rough location of the data, and does not depend on c. The key in
# ``numpyro.param`` is the program's own, so every seed starts elsewhere.


@dataclass(frozen=True)
class Model:
    """The program p(x, z | c). Without ``x`` it generates.

    Attributes:
        sigma_0: the known standard deviation of the prior, positive.
        x_loc: where the search for the prior's mean starts.

    Raises:
        ValueError: the deviation is not positive.
    """

    sigma_0: float = 1.0
    x_loc: float = 0.0

    def __post_init__(self):
        require_deviation("sigma_0", self.sigma_0)

    def check_data(self, c: Any = None, x: Any = None) -> None:
        """Refuses arrays that are not one number per datum.

        Raises:
            ValueError: ``c`` is missing, or an array is not (N,).
        """
        check_given(Values(()), c)
        for name, array in {"c": c, "x": x}.items():
            if array is not None and array.ndim != 1:
                raise ValueError(
                    f"{name}: expected one number per datum, shape (N,), got {array.shape}; give "
                    f"one column, for example {name}[:, 0]"
                )

    def encoder(
        self, num_outputs: int, *, hidden: Sequence[int] | None = None, rngs: nnx.Rngs
    ) -> Encoder:
        """A network from (x, c) to a guide's numbers: an affine map, unless ``hidden`` is given.

        Args:
            num_outputs: how many numbers it gives for one datum.
            hidden: units of the hidden layers. Default: none.
            rngs: Flax's random numbers.
        """
        return Encoder((), hidden or (), num_outputs, condition=Values(()), rngs=rngs)

    def __call__(
        self, c: Float[Array | np.ndarray, " N"], x: Float[Array | np.ndarray, " N"] | None = None
    ) -> None:
        """Samples z and x given c, and observes x if it is given."""
        start = 2 * math.log(self.sigma_0)
        theta_1 = numpyro.param(
            "theta_1", lambda key: self.x_loc + self.sigma_0 * random.normal(key)
        )
        theta_2 = numpyro.param("theta_2", 0.0)
        theta_3 = numpyro.param("theta_3", start)
        with numpyro.plate("data", len(c)):
            z = numpyro.sample("z", dist.Normal(theta_1 + theta_2 * c, self.sigma_0))
            numpyro.sample("x", dist.Normal(z, jnp.exp(theta_3 / 2)), obs=x)


@dataclass(frozen=True)
class Guide:
    """The program q(z | x, c). One affine map serves every datum.

    Attributes:
        sigma_0: the scale of z, positive. The search starts there.

    Raises:
        ValueError: the scale is not positive.
    """

    sigma_0: float = 1.0

    def __post_init__(self):
        require_deviation("sigma_0", self.sigma_0)

    def __call__(
        self, c: Float[Array | np.ndarray, " N"], x: Float[Array | np.ndarray, " N"]
    ) -> None:
        """Samples z given x and c."""
        start = 2 * math.log(self.sigma_0)
        phi_1 = numpyro.param("phi_1", 1.0)
        phi_2 = numpyro.param("phi_2", 0.0)
        phi_3 = numpyro.param("phi_3", lambda key: self.sigma_0 * random.normal(key))
        phi_4 = numpyro.param("phi_4", start)
        with numpyro.plate("data", len(c)):
            numpyro.sample("z", dist.Normal(phi_1 * x + phi_2 * c + phi_3, jnp.exp(phi_4 / 2)))


# --- what is known in closed form -----------------------------------------------------------------

PARAMETERS = ("theta_1", "theta_2", "theta_3", "phi_1", "phi_2", "phi_3", "phi_4")


def posterior(
    params: Mapping[str, ArrayLike],
    sigma_0: float,
    c: Float[Array | np.ndarray, " N"],
    x: Float[Array | np.ndarray, " N"],
) -> tuple[Float[Array, " N"], Float[Array, ""]]:
    """The exact p(z | x, c) of a model: its means, (N,), and their one standard deviation.

    Precisions add: 1 / v = 1 / sigma_0^2 + 1 / exp(theta_3). The mean is the average of the
    observation and the prior's mean, weighted by precision.

    Args:
        params: ``theta_1``, ``theta_2`` and ``theta_3`` of one seed.
        sigma_0: the standard deviation of the prior.
        c, x: the data.
    """
    variance = jnp.exp(params["theta_3"])
    prior_mean = params["theta_1"] + params["theta_2"] * c
    gain = sigma_0**2 / (sigma_0**2 + variance)
    return gain * x + (1 - gain) * prior_mean, jnp.sqrt(gain * variance)


def log_likelihood(
    params: Mapping[str, ArrayLike],
    sigma_0: float,
    c: Float[Array | np.ndarray, " N"],
    x: Float[Array | np.ndarray, " N"],
) -> Float[Array, " N"]:
    """The exact log p(x | c) of a model, in nats, for each datum.

    x is theta_1 + theta_2 c, plus z's deviation, plus noise: a Gaussian, and the variances add.

    Args:
        params, sigma_0, c, x: as in ``posterior``.
    """
    scale = jnp.sqrt(sigma_0**2 + jnp.exp(params["theta_3"]))
    return dist.Normal(params["theta_1"] + params["theta_2"] * c, scale).log_prob(x)


def _with_phi(theta_1: float, theta_2: float, theta_3: float, sigma_0: float) -> dict[str, float]:
    """Adds the phi of the exact posterior to theta.

    phi holds the coefficients of x, c and 1 in ``posterior``'s mean, and the log of its variance.
    """
    gain = sigma_0**2 / (sigma_0**2 + math.exp(theta_3))
    return {
        "theta_1": theta_1,
        "theta_2": theta_2,
        "theta_3": theta_3,
        "phi_1": gain,
        "phi_2": (1 - gain) * theta_2,
        "phi_3": (1 - gain) * theta_1,
        "phi_4": math.log(sigma_0**2 * (1 - gain)),
    }


def optimum(truth: Truth) -> dict[str, float]:
    """The ELBO's unique maximum over infinitely many data: theta* and phi*.

    theta* is the truth (Gibbs' inequality). phi* is the exact posterior, so the bound is tight.
    """
    return _with_phi(truth.mu_0, 1.0, 2 * math.log(truth.sigma), truth.sigma_0)


def optimal_elbo(truth: Truth) -> float:
    """The ELBO at the optimum in nats per datum: minus the entropy of x given c, for any p(c)."""
    return -0.5 * math.log(2 * math.pi * math.e * truth.marginal_variance)


class NoMaximumError(ValueError):
    """The data at hand have no maximum-likelihood solution, or more than one."""


def maximum_likelihood(
    data: Mapping[str, Float[np.ndarray, " N"]], sigma_0: float
) -> tuple[dict[str, float], float]:
    """The parameters that maximise the ELBO of these data, and that ELBO in nats per datum.

    log p(x | c) is a linear regression with variance sigma_0^2 + exp(theta_3). So theta_1 and
    theta_2 are ordinary least squares. exp(theta_3) is the mean squared residual less sigma_0^2.

    Raises:
        NoMaximumError: c does not vary, or the residual variance does not exceed sigma_0^2. In the
            first case only one sum of theta_1 and theta_2 is known. In the second the likelihood
            grows as theta_3 falls to minus infinity.
    """
    c, x = np.asarray(data["c"], np.float64), np.asarray(data["x"], np.float64)
    if np.ptp(c) == 0:
        raise NoMaximumError(
            f"c: expected conditions that vary, got {len(c)} times {c[0]:g}; only "
            f"theta_1 + {c[0]:g} * theta_2 is identified; give more data, with different c"
        )
    theta_2 = np.mean((c - c.mean()) * (x - x.mean())) / np.var(c)
    theta_1 = x.mean() - theta_2 * c.mean()
    residual_variance = np.mean((x - theta_1 - theta_2 * c) ** 2)
    if residual_variance <= sigma_0**2:
        raise NoMaximumError(
            f"x: expected a residual variance above sigma_0^2 = {sigma_0**2:.6g}, got "
            f"{residual_variance:.6g} from {len(x)} data; the likelihood has no maximum (theta_3 "
            f"runs to minus infinity); give more data or a smaller sigma_0"
        )
    theta_3 = math.log(residual_variance - sigma_0**2)
    elbo = -0.5 * math.log(2 * math.pi * math.e * residual_variance)
    return _with_phi(float(theta_1), float(theta_2), theta_3, sigma_0), elbo


def standard_errors(
    truth: Truth, num_data: int, c_mean: float = 0.0, c_variance: float = 1.0
) -> dict[str, float]:
    """The standard error of each parameter of the maximum-likelihood solution, by name.

    theta_1 and theta_2 have the textbook errors of least squares. The residual variance has the
    relative error sqrt(2 / N), independent of them. The delta method gives the rest.

    Args:
        truth: the process that made the data.
        num_data: N.
        c_mean, c_variance: mean and variance of c.
    """
    k, s2 = truth.gain, truth.marginal_variance
    relative = math.sqrt(2 / num_data)
    theta_1 = math.sqrt(s2 * (1 + c_mean**2 / c_variance) / num_data)
    theta_2 = math.sqrt(s2 / (num_data * c_variance))
    return {
        "theta_1": theta_1,
        "theta_2": theta_2,
        "theta_3": s2 * relative / truth.sigma**2,
        "phi_1": k * relative,
        "phi_2": math.hypot(k * relative, (1 - k) * theta_2),
        "phi_3": math.hypot(k * relative * truth.mu_0, (1 - k) * theta_1),
        "phi_4": k * relative / (1 - k),
    }
