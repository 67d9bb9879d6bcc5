"""The linear-Gaussian model: the decoder is an affine map, so everything has a formula.

A few latent numbers z move x along straight lines. So do the features of a condition c, if there is
one. Noise of one size comes on top:

    z        ~  Normal(0, I)                                the prior       p(z),        z in R^K
    x | z, c ~  Normal(W z + B c + b, sigma^2 I)            the likelihood  p(x | z, c), x in R^D

Without c this is probabilistic principal component analysis (Tipping & Bishop 1999, equation 2;
"TB" below). For any guide, the ELBO is the likelihood less the guide's divergence from the
posterior. Likelihood and posterior are known:

    log p(x | c)  =  log Normal(x; B c + b, W W^T + sigma^2 I)                            (TB, 3)
    p(z | x, c)   =  Normal(Lambda^-1 W^T (x - B c - b) / sigma^2, Lambda^-1)             (TB, 6)
    Lambda        =  I + W^T W / sigma^2                               the posterior's precision

The posterior's mean is affine in (x, c), and its covariance is the same for every datum. So an
affine encoder is enough for each Gaussian family, and amortisation loses nothing. For given
parameters of the model, the best guide of a family loses

    full covariance    0
    mean field         1/2 (sum_i log Lambda_ii - log det Lambda)                ``mean_field_gap``
    the prior          1/2 (tr Lambda - K - log det Lambda + m^T Lambda m)       ``prior_gap``

nats per datum, with m the posterior's mean. Low rank plus diagonal lies between the first two. It
has no formula.

A rotation of z, W -> W R, changes the mean-field gap and not the likelihood. The gap is zero if the
columns of W are orthogonal, and one maximum of the likelihood has such columns. So a mean-field
guide loses its gap if the model's parameters are *held*. It loses nothing if they are trained with
it: the ELBO's maximum is then the likelihood's. Among the rotations it picks the principal axes
(Lucas et al. 2019, section 4; Rolinek et al. 2019).

| on paper (TB)   | in code                          | meaning                                     |
|-----------------|----------------------------------|---------------------------------------------|
| t               | ``x``, (N, *x_shape)             | observations; D numbers each                |
| x               | ``z``, (N, num_latents)          | latent vectors; K numbers each              |
| --              | ``c``, (N, ...)                  | conditions, as ``models/conditions.py`` has |
| W               | param ``W``, (D, K)              | how x moves with z                          |
| mu              | param ``b``, (D,)                | x where z and c are zero                    |
| --              | param ``B``, (D, C)              | how x moves with the condition's C features |
| sigma           | param ``sigma``, ()              | standard deviation of the noise             |
| M / sigma^2     | ``precision(params)``, (K, K)    | Lambda                                      |

    from models import guides, linear_gaussian

    model = linear_gaussian.Model(num_latents=10)
    guide = guides.mean_field(model)
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
from jaxtyping import Array, Float

from models.conditions import Condition, Labels, check_given
from models.gaussian_mean import NoMaximumError
from models.networks import Encoder, check_shape

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The program p(x, z | c). Without ``x`` it generates one x, or one for each condition.

    Attributes:
        x_shape: the shape of one datum, for example (28, 28) or (D,).
        num_latents: K, the dimensions of z.
        condition: the kind of c, ``Values`` or ``Labels`` of ``models.conditions``, or None.

    Raises:
        ValueError: a size is not positive, or labels have a learned embedding. B is one already.
    """

    x_shape: tuple[int, ...] = (28, 28)
    num_latents: int = 10
    condition: Condition | None = None

    def __post_init__(self):
        if not self.x_shape or any(size < 1 for size in self.x_shape):
            raise ValueError(f"x_shape: expected positive sizes, got {self.x_shape}")
        if self.num_latents < 1:
            raise ValueError(f"num_latents: expected at least 1, got {self.num_latents}")
        if isinstance(self.condition, Labels) and self.condition.num_embedded is not None:
            raise ValueError(
                f"condition: expected labels without an embedding, got {self.condition}; leave "
                f"num_embedded out: B already has a learned column for every label"
            )

    def check_data(self, c: Any = None, x: Any = None) -> None:
        """Refuses observations and conditions that the model is not made for.

        Args:
            c: conditions, if the model has them.
            x: floats (N, *x_shape) of any size. None for none.

        Raises:
            ValueError: another shape or type, or labels outside the classes.
        """
        check_given(self.condition, c)
        if self.condition is not None:
            self.condition.check(c)
        self._check_observations(x)

    def _check_observations(self, x: Any) -> None:
        if x is None:
            return
        check_shape(x, self.x_shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"x: expected floats, got {x.dtype}; give the data as floats, for example "
                f"x.astype(numpy.float32)"
            )

    def encoder(
        self, num_outputs: int, *, hidden: Sequence[int] | None = None, rngs: nnx.Rngs
    ) -> Encoder:
        """A network from x and c to a guide's numbers: an affine map, unless ``hidden`` is given.

        Args:
            num_outputs: how many numbers it gives for one datum.
            hidden: units of the hidden layers. Default: none.
            rngs: Flax's random numbers.
        """
        return Encoder(self.x_shape, hidden or (), num_outputs, condition=self.condition, rngs=rngs)

    def features(self, c: Any) -> Float[Array, "N C"] | None:
        """The condition as numbers: one-hot labels or flattened values. None without condition."""
        if self.condition is None:
            return None
        return self.condition.features(rngs=nnx.Rngs(0))(jnp.asarray(c))  # there are no weights

    def __call__(self, x: Float[Any, "N ..."] | None = None, c: Any = None) -> None:
        """Samples z and x, given c if there is a condition, and observes x if it is given.

        Args:
            x: floats (N, *x_shape). None to generate.
            c: conditions (N, ...). None if the model has none.

        Raises:
            ValueError: arrays of another shape or type.
        """
        check_given(self.condition, c)
        self._check_observations(x)
        D, K = math.prod(self.x_shape), self.num_latents
        params = {
            # columns of about unit length, in another direction for every seed
            "W": numpyro.param("W", lambda key: random.normal(key, (D, K)) / math.sqrt(D)),
            "b": numpyro.param("b", jnp.zeros(D)),
            "sigma": numpyro.param("sigma", 1.0, constraint=dist.constraints.positive),
        }
        if self.condition is not None:
            C = self.condition.num_features
            params["B"] = numpyro.param(
                "B", lambda key: random.normal(key, (D, C)) / math.sqrt(D * C)
            )
        size = next((len(array) for array in (x, c) if array is not None), 1)
        with numpyro.plate("data", size):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([K]).to_event(1))
            x_loc = z @ params["W"].T + _mean(self, params, c)
            x_given_z = dist.Normal(x_loc.reshape(-1, *self.x_shape), params["sigma"])
            numpyro.sample("x", x_given_z.to_event(len(self.x_shape)), obs=x)


# --- what is known in closed form -----------------------------------------------------------------
#
# Only ``maximum_likelihood`` makes an array as large as D x D: the covariance of the data.


def _mean(model: Model, params: Mapping[str, Any], c: Any) -> Array:
    """The mean of x given c, B c + b: (N, D), or (D,) without condition."""
    features = model.features(c)
    b = jnp.asarray(params["b"])
    return b if features is None else features @ jnp.asarray(params["B"]).T + b


def _residual(
    model: Model, params: Mapping[str, Any], data: Mapping[str, Any]
) -> Float[Array, "N D"]:
    """The difference of x from its mean, x - B c - b."""
    x = jnp.asarray(data["x"])
    return x.reshape(len(x), -1) - _mean(model, params, data.get("c"))


def precision(params: Mapping[str, Any]) -> Float[Array, "K K"]:
    """The precision of p(z | x, c), Lambda = I + W^T W / sigma^2: Gaussian precisions add.

    Args:
        params: ``W``, (D, K), and ``sigma`` of one seed.
    """
    W = jnp.asarray(params["W"]) / jnp.asarray(params["sigma"])
    return jnp.eye(W.shape[1]) + W.T @ W


def posterior(
    model: Model, params: Mapping[str, Any], data: Mapping[str, Any]
) -> tuple[Float[Array, "N K"], Float[Array, "K K"]]:
    """The exact p(z | x, c): the mean for each datum, and the one covariance.

    The terms in z of log p(x, z | c) are z^T W^T (x - B c - b) / sigma^2 - 1/2 z^T Lambda z. So the
    mean is Lambda^-1 W^T (x - B c - b) / sigma^2, and the covariance is Lambda^-1 (TB, equation 6).

    Args:
        model: the model. It says how c becomes numbers.
        params: ``W``, ``b``, ``sigma`` and, with a condition, ``B``, of one seed.
        data: ``x``, (N, *x_shape), and with a condition ``c``.
    """
    covariance = jnp.linalg.inv(precision(params))
    W, sigma = jnp.asarray(params["W"]), jnp.asarray(params["sigma"])
    return _residual(model, params, data) @ W @ covariance / sigma**2, covariance


def log_likelihood(
    model: Model, params: Mapping[str, Any], data: Mapping[str, Any]
) -> Float[Array, " N"]:
    """The exact log p(x | c), in nats, for each datum.

    Let r = x - B c - b = W z + noise. Its covariance is S = W W^T + sigma^2 I (TB, equation 3). Let
    m be the posterior's mean. The lemmas on determinants and inverses of sums give

        log det S  =  D log sigma^2 + log det Lambda
        r^T S^-1 r =  |r - W m|^2 / sigma^2 + |m|^2.

    The second holds because m minimises |r - W z|^2 / sigma^2 + |z|^2 over z.

    Args:
        model, params, data: as in ``posterior``.
    """
    W, sigma = jnp.asarray(params["W"]), jnp.asarray(params["sigma"])
    residual, (m, _) = _residual(model, params, data), posterior(model, params, data)
    num_dims = residual.shape[1]
    squares = jnp.sum(((residual - m @ W.T) / sigma) ** 2, axis=1) + jnp.sum(m**2, axis=1)
    log_det = 2 * num_dims * jnp.log(sigma) + jnp.linalg.slogdet(precision(params))[1]
    return -0.5 * (num_dims * math.log(2 * math.pi) + log_det + squares)


def mean_field_gap(params: Mapping[str, Any]) -> Float[Array, ""]:
    """The loss of the best mean-field Gaussian guide, in nats per datum. All data have the same.

    Let q have the posterior's mean and the covariance S. Then KL(q || p) is

        1/2 (tr Lambda S - K - log det Lambda S).

    For diagonal S the derivative by S_ii is zero at S_ii = 1 / Lambda_ii. There the divergence is

        1/2 (sum_i log Lambda_ii - log det Lambda)  >=  0        (Hadamard's inequality).

    It is zero if and only if Lambda is diagonal: if the columns of W are orthogonal.

    Args:
        params: ``W`` and ``sigma`` of one seed.
    """
    matrix = precision(params)
    return 0.5 * (jnp.sum(jnp.log(jnp.diag(matrix))) - jnp.linalg.slogdet(matrix)[1])


def mean_field_ranks(params: Mapping[str, Any], num_samples: int) -> Float[np.ndarray, "rank K"]:
    """The probabilities of the ranks 0 .. L in simulation-based calibration of the best mean field.

    z_i lies around the posterior's mean m_i with the deviation s_i = (Lambda^-1)_ii^(1/2). The L
    draws of the mean field lie around it with t_i = Lambda_ii^(-1/2), which is smaller unless
    Lambda is diagonal. So with z_i = m_i + s_i e each draw is below z_i with the probability
    Phi(e s_i / t_i), and the rank is binomial given e ~ Normal(0, 1). The integral over e is a sum
    over a fine grid. For s_i = t_i every rank has the probability 1 / (L + 1).

    Args:
        params: ``W`` and ``sigma`` of one seed.
        num_samples: L.
    """
    from scipy import stats  # takes a second

    matrix = np.asarray(precision(params), np.float64)
    ratio = np.sqrt(np.diag(np.linalg.inv(matrix)) * np.diag(matrix))
    e = np.linspace(-8, 8, 4001)
    weights = stats.norm.pdf(e) * (e[1] - e[0])
    below = stats.norm.cdf(e[:, None] * ratio)
    ranks = np.arange(num_samples + 1)
    parts = [weights @ stats.binom.pmf(ranks, num_samples, p[:, None]) for p in below.T]
    return np.stack(parts, axis=1)


def prior_gap(
    model: Model, params: Mapping[str, Any], data: Mapping[str, Any]
) -> Float[Array, " N"]:
    """The loss of the prior as a guide, KL(p(z) || p(z | x, c)), in nats, for each datum.

    The divergence of Normal(0, I) from Normal(m, Lambda^-1):

        1/2 (tr Lambda - K - log det Lambda + m^T Lambda m).

    Args:
        model, params, data: as in ``posterior``.
    """
    matrix, (m, _) = precision(params), posterior(model, params, data)
    constant = jnp.trace(matrix) - len(matrix) - jnp.linalg.slogdet(matrix)[1]
    return 0.5 * (constant + jnp.sum(m @ matrix * m, axis=1))


def maximum_likelihood(
    model: Model, data: Mapping[str, Any]
) -> tuple[dict[str, Float[np.ndarray, "..."]], float]:
    """The parameters that maximise the likelihood of these data, and its value in nats per datum.

    B and b are ordinary least squares for any covariance S of x given c, because all coordinates of
    x have the same regressors (Zellner 1962). Let l_1 >= ... >= l_D be the eigenvalues of the
    residuals' covariance. Let the columns of U be its first K eigenvectors. Then (TB, equations 7
    and 8)

        sigma^2 = (l_{K+1} + ... + l_D) / (D - K),    W = U (diag(l_1 .. l_K) - sigma^2 I)^(1/2) R

    for any rotation R. The function returns R = I. The columns of W are then orthogonal. So a
    mean-field guide's ELBO has the same maximum. The likelihood there is

        -1/2 (D log 2 pi + log l_1 + ... + log l_K + (D - K) log sigma^2 + D).

    If the features are dependent, only B c + b is determined. One-hot labels are an example. The
    function then returns the B of least norm on the centred features.

    Args:
        model: the model. Its condition and its number of latents count.
        data: ``x``, (N, *x_shape), and with a condition ``c``.

    Raises:
        NoMaximumError: x lies in a plane of K dimensions, or x has only K numbers or fewer. In the
            first case the likelihood grows as sigma falls to zero. K data always lie in one.
        ValueError: the model does not take these data.
    """
    model.check_data(**data)
    x = np.asarray(data["x"]).reshape(len(data["x"]), -1)
    (N, D), K = x.shape, model.num_latents
    if K >= D:
        raise NoMaximumError(
            f"num_latents: expected fewer than the {D} numbers of one x, got {K}; W W^T alone can "
            f"have any covariance, and sigma is not determined; give fewer latents"
        )
    features = model.features(data.get("c"))
    features = np.zeros((N, 0)) if features is None else np.asarray(features)
    x_mean, f_mean = x.mean(0, dtype=np.float64), features.mean(0, dtype=np.float64)
    C = features.shape[1]
    moments = np.zeros((C + D, C + D))
    for start in range(0, N, 5000):  # float64 for a part of the data at a time
        rows = slice(start, start + 5000)
        joined = np.concatenate([features[rows] - f_mean, x[rows] - x_mean], axis=1)
        moments += joined.T @ joined / N
    B = (np.linalg.pinv(moments[:C, :C], rcond=1e-10, hermitian=True) @ moments[:C, C:]).T
    values, vectors = np.linalg.eigh(moments[C:, C:] - B @ moments[:C, C:])
    values, vectors = values[::-1], vectors[:, ::-1]
    variance = values[K:].mean()
    if not variance > 1e-12 * np.trace(moments[C:, C:]):  # float32 holds no less
        rank = int(np.sum(values > 1e-12 * np.trace(moments[C:, C:])))
        raise NoMaximumError(
            f"x: expected data that vary in more than num_latents = {K} directions"
            f"{' for a given c' if C else ''}, got {rank} from {N} data; the likelihood has no "
            f"maximum (sigma runs to zero); give more data or fewer latents"
        )
    params = {
        "W": vectors[:, :K] * np.sqrt(np.maximum(values[:K] - variance, 0.0)),
        "b": x_mean - B @ f_mean,
        "sigma": np.sqrt(variance),
    }
    if C:
        params["B"] = B
    log_det = np.log(values[:K]).sum() + (D - K) * math.log(variance)
    maximum = -0.5 * (D * math.log(2 * math.pi) + log_det + D)
    return {name: np.asarray(value) for name, value in params.items()}, float(maximum)
