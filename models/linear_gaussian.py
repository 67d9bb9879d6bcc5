"""The linear-Gaussian model: a decoder that is an affine map, so that everything has a formula.

A few latent numbers z, and the condition's features c if there are any, move x along straight
lines, and noise of one size comes on top:

    z        ~  Normal(0, I)                                the prior       p(z),        z in R^K
    x | z, c ~  Normal(W z + B c + b, sigma^2 I)            the likelihood  p(x | z, c), x in R^D

Without c this is probabilistic principal component analysis (Tipping & Bishop 1999, equation 2;
"TB" below). Whatever the guide, the ELBO falls short of the likelihood by its divergence from the
posterior, and here all three are known:

    log p(x | c)  =  log Normal(x; B c + b, W W^T + sigma^2 I)                            (TB, 3)
    p(z | x, c)   =  Normal(Lambda^-1 W^T (x - B c - b) / sigma^2, Lambda^-1)             (TB, 6)
    Lambda        =  I + W^T W / sigma^2                               the posterior's precision

The posterior's mean is affine in (x, c) and its covariance the same for every datum: an affine
encoder is enough for any of the Gaussian guides, and none loses anything to amortisation. What the
best one of each family loses, for given parameters of the model, is

    full covariance    0
    mean field         1/2 (sum_i log Lambda_ii - log det Lambda)                ``mean_field_gap``
    the prior          1/2 (tr Lambda - K - log det Lambda + m^T Lambda m)       ``prior_gap``

with m the posterior's mean. (Low rank plus diagonal lies between the first two, without a formula.)

The likelihood does not change when z is rotated, W -> W R, and the mean-field gap does. It is zero
where the columns of W are orthogonal, and one of the solutions of maximum likelihood is like that.
So a mean-field guide loses its gap where the model's parameters are *held*, and loses nothing where
they are trained with it: then the ELBO's maximum is the likelihood's, and among the rotations that
are all alike to the likelihood it picks the principal axes (Lucas et al. 2019, section 4; Rolinek
et al. 2019).

| on paper (TB)   | in code                          | what it is                                  |
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import random
from jaxtyping import Array, Float

from models.conditions import Condition, Labels

# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """p(x, z | c). Call it with ``x=None`` to generate one x, or one for each condition.

    Attributes:
        x_shape: of one datum, (28, 28) or (D,).
        num_latents: K.
        condition: what c is, ``Values`` or ``Labels`` of ``models.conditions``; None for none.

    Raises:
        ValueError: a size that is not positive, or labels with a learned embedding, which B is.
    """

    x_shape: tuple[int, ...] = (28, 28)
    num_latents: int = 10
    condition: Condition | None = None

    # What makes ``models.guides`` give it an encoder that is one affine map.
    hidden: ClassVar[tuple[int, ...]] = ()
    channels: ClassVar[tuple[int, ...]] = ()
    activation: ClassVar[Callable[[Array], Array]] = staticmethod(jax.nn.relu)
    dtype: ClassVar[str] = "float32"

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
        """Raises ValueError where conditions or observations are not what the model declares."""
        if (c is None) != (self.condition is None):
            raise ValueError(
                f"c: expected {'none' if self.condition is None else 'conditions'}, got "
                f"{'none' if c is None else 'some'}; the model's condition is {self.condition}"
            )
        if self.condition is not None:
            self.condition.check(c)
        if x is not None and (
            x.shape[1:] != self.x_shape or not jnp.issubdtype(x.dtype, jnp.floating)
        ):
            shape = ", ".join(map(str, ("N", *self.x_shape)))
            raise ValueError(
                f"x: expected floats of shape ({shape}), got {x.dtype} of shape {x.shape}; give "
                f"the model their x_shape, and the data as floats"
            )

    def features(self, c: Any) -> Float[Array, "N C"] | None:
        """The condition as numbers: labels one-hot, values flattened; None without condition."""
        if self.condition is None:
            return None
        return self.condition.features(rngs=nnx.Rngs(0))(jnp.asarray(c))  # there are no weights

    def __call__(self, x: Float[Any, "N ..."] | None = None, c: Any = None) -> None:
        """Samples z and x, given c if there is a condition, and observes x if it is given."""
        self.check_data(c, x)
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
# Nothing is as large as D x D, but for the covariance of the data in ``maximum_likelihood``.


def _mean(model: Model, params: Mapping[str, Any], c: Any) -> Array:
    """E[x | c] = B c + b, (N, D), or (D,) without condition."""
    features = model.features(c)
    b = jnp.asarray(params["b"])
    return b if features is None else features @ jnp.asarray(params["B"]).T + b


def _residual(
    model: Model, params: Mapping[str, Any], data: Mapping[str, Any]
) -> Float[Array, "N D"]:
    """x - B c - b."""
    x = jnp.asarray(data["x"])
    return x.reshape(len(x), -1) - _mean(model, params, data.get("c"))


def precision(params: Mapping[str, Any]) -> Float[Array, "K K"]:
    """Lambda = I + W^T W / sigma^2, the precision of p(z | x, c): Gaussian precisions add.

    Args:
        params: ``W``, (D, K), and ``sigma`` of one seed.
    """
    W = jnp.asarray(params["W"]) / jnp.asarray(params["sigma"])
    return jnp.eye(W.shape[1]) + W.T @ W


def posterior(
    model: Model, params: Mapping[str, Any], data: Mapping[str, Any]
) -> tuple[Float[Array, "N K"], Float[Array, "K K"]]:
    """The exact p(z | x, c): the mean for each datum, and the covariance, which they share.

    The terms in z of log p(x, z | c) are z^T W^T (x - B c - b) / sigma^2 - 1/2 z^T Lambda z: the
    mean is Lambda^-1 W^T (x - B c - b) / sigma^2, the covariance Lambda^-1 (TB, equation 6).

    Args:
        model: whose condition and shapes these are.
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

    x - B c - b = W z + noise has the covariance S = W W^T + sigma^2 I (TB, equation 3). With r
    that difference and m the posterior's mean, the lemmas on determinants and inverses of sums give

        log det S  =  D log sigma^2 + log det Lambda
        r^T S^-1 r =  |r - W m|^2 / sigma^2 + |m|^2,

    the second because m minimises |r - W z|^2 / sigma^2 + |z|^2 over z.

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
    """What the best mean-field Gaussian guide loses, the same for every datum: nats per datum.

    With q's mean at the posterior's and its covariance S, KL(q || p) is

        1/2 (tr Lambda S - K - log det Lambda S).

    For diagonal S the derivative by S_ii is zero at S_ii = 1 / Lambda_ii, and there it is

        1/2 (sum_i log Lambda_ii - log det Lambda)  >=  0        (Hadamard's inequality),

    zero if and only if Lambda is diagonal: if the columns of W are orthogonal.

    Args:
        params: ``W`` and ``sigma`` of one seed.
    """
    matrix = precision(params)
    return 0.5 * (jnp.sum(jnp.log(jnp.diag(matrix))) - jnp.linalg.slogdet(matrix)[1])


def prior_gap(
    model: Model, params: Mapping[str, Any], data: Mapping[str, Any]
) -> Float[Array, " N"]:
    """What the prior loses as a guide, KL(p(z) || p(z | x, c)), in nats, for each datum.

    The divergence of Normal(0, I) from Normal(m, Lambda^-1):

        1/2 (tr Lambda - K - log det Lambda + m^T Lambda m).

    Args:
        model, params, data: as in ``posterior``.
    """
    matrix, (m, _) = precision(params), posterior(model, params, data)
    constant = jnp.trace(matrix) - len(matrix) - jnp.linalg.slogdet(matrix)[1]
    return 0.5 * (constant + jnp.sum(m @ matrix * m, axis=1))


class NoMaximumError(ValueError):
    """The data at hand have no maximum-likelihood solution, or no unique sigma."""


def maximum_likelihood(
    model: Model, data: Mapping[str, Any]
) -> tuple[dict[str, Float[np.ndarray, "..."]], float]:
    """The parameters that maximise the likelihood of these data, and its value in nats per datum.

    B and b: whatever the covariance S of x given c, which all data share, the best ones are
    ordinary least squares, as all coordinates of x have the same regressors (Zellner 1962). Of
    the residuals' covariance let l_1 >= ... >= l_D be the eigenvalues, U those of the first K as
    columns of eigenvectors. Then (TB, equations 7 and 8)

        sigma^2 = (l_{K+1} + ... + l_D) / (D - K),    W = U (diag(l_1 .. l_K) - sigma^2 I)^(1/2) R

    for any rotation R. Returned is R = I, whose columns are orthogonal, so that the same number is
    the maximum of the ELBO with a mean-field guide. At it, the likelihood is

        -1/2 (D log 2 pi + log l_1 + ... + log l_K + (D - K) log sigma^2 + D).

    Where the features are dependent, as one-hot labels and the constant are, only B c + b is
    determined, and of all such B and b the B of least norm on the centred features is returned.

    Args:
        model: whose condition and number of latents these are.
        data: ``x``, (N, *x_shape), and with a condition ``c``.

    Raises:
        NoMaximumError: x lies in a plane of K dimensions, as with K data or fewer, so that the
            likelihood grows as sigma falls to zero; or x has only K numbers, or fewer.
        ValueError: the data are not what the model declares.
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
