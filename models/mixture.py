"""The mixture of Gaussians, with labels seen in part: a sum over K components gives every answer.

A datum belongs to one of K components. It is a Gaussian of its component's mean and covariance:

    y        ~  Categorical(softmax(a))                 the component,  y in 0 .. K-1
    x | y    ~  Normal(mu_y, T_y T_y^T)                 the datum,      x in R^D

With ``num_latents`` = L > 0 the covariance comes from L latent numbers and noise of one size:

    z        ~  Normal(0, I)                            the place in the component,  z in R^L
    x | y, z ~  Normal(mu_y + W_y z, sigma_y^2 I)

That is the mixture of probabilistic principal component analysers (Tipping & Bishop 1999b), or the
mixture of factor analysers with equal noise in every direction (Ghahramani & Hinton 1996). In both
kinds let S_k be the covariance of x in component k: T_k T_k^T or W_k W_k^T + sigma_k^2 I. With the
equation numbers of Bishop 2006,

    p(x)        =  sum_k pi_k Normal(x; mu_k, S_k),  pi = softmax(a)                  (9.7, 12.35)
    p(y | x)    =  pi_y Normal(x; mu_y, S_y) / p(x)                                         (9.13)
    p(z | y, x) =  Normal(Lambda_y^-1 W_y^T (x - mu_y) / sigma_y^2, Lambda_y^-1)           (12.42)
    Lambda_y    =  I + W_y^T W_y / sigma_y^2

A label y may be known: ``model(x=x, y=y)`` with -1 where it is not. The site ``y`` is latent for
all data. A factor of the model is 1 if the label is unknown or equals the site's value, and nearly
0 otherwise. So the likelihood of a datum is p(x, y) if its label is known, and p(x) if not, as for
the labels of Kingma et al. 2014, equations 6 and 7.

The guide factorises as q(y | x) q(z | y, x) (``guides.structured``) or q(y | x) q(z | x)
(``guides.mean_field``). log p(y | x) is quadratic in x up to a term that all y share. So the
model's ``encoder`` is an affine map of x and of the products of its entries, and amortisation of
q(y | x) loses nothing.

A permutation of the components changes no density. The likelihood has local maxima. It has no
maximum at all: a component on one datum, its covariance run to zero, makes it infinite. EM and
gradients arrive at a local maximum that depends on the start.

We deviate from Bishop in two points: the weights pi are given by logits a, and S_k by the Cholesky
factor T_k or by W_k and sigma_k.

| on paper (Bishop) | in code                         | meaning                                    |
|-------------------|---------------------------------|--------------------------------------------|
| x                 | ``x``, (N, D)                   | observations                               |
| z (9.10), k       | ``y``, (N,)                     | components; -1 for an unknown label        |
| z (12.33)         | ``z``, (N, L)                   | places in the component                    |
| ln pi_k           | param ``logits``, (K,)          | a; a constant added to all changes nothing |
| mu_k              | param ``loc``, (K, D)           | means of the components                    |
| --                | param ``scale_tril``, (K, D, D) | T_k, lower triangular, if L = 0            |
| W                 | param ``factor``, (K, D, L)     | how x moves with z, if L > 0               |
| sigma             | param ``sigma``, (K,)           | standard deviations of the noise, if L > 0 |
| M / sigma^2       | Lambda of ``latent_posterior``  | precisions of z, (K, L, L)                 |

    from models import guides, mixture

    model = mixture.Model(num_components=3, x_shape=(4,))
    guide = guides.structured(model)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import random
from jax.core import Tracer
from jaxtyping import Array, Float, Integer
from numpyro.distributions import constraints
from scipy.linalg import solve_triangular
from scipy.special import log_softmax, logsumexp

from models.labels import UNKNOWN, partly_observed
from models.networks import check_shape

# --- network --------------------------------------------------------------------------------------


class Quadratic(nnx.Module):
    """An affine map of x and of all products x_i x_j, i <= j. It starts near zero.

    Args:
        num_dims: D, the numbers of one x.
        num_outputs: how many numbers it gives for one datum.
    """

    def __init__(self, num_dims: int, num_outputs: int, *, rngs: nnx.Rngs):
        num_inputs = num_dims + num_dims * (num_dims + 1) // 2
        self.affine = nnx.Linear(num_inputs, num_outputs, rngs=rngs)
        self.affine.kernel[...] = 0.1 * self.affine.kernel[...]

    def __call__(self, x: Float[Any, "N D"], y: Any = None) -> Float[Array, "N outputs"]:
        """(N, num_outputs). Labels ``y`` are not looked at."""
        x = jnp.asarray(x)
        rows, columns = np.triu_indices(x.shape[1])
        return self.affine(jnp.concatenate([x, x[:, rows] * x[:, columns]], axis=1))


# --- configuration, model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The program p(x, y), or p(x, y, z) with latents. Without ``x`` it generates.

    Parameters start for standardised data. Each component has a random mean, and half the data's
    deviation in every direction (beside W W^T, with random W, if there are latents). So no two
    components start equal.

    Attributes:
        num_components: K.
        x_shape: the shape of one datum, (D,).
        num_latents: L, the dimensions of z. 0 for components of any covariance, without z.

    Raises:
        ValueError: a number is too small, or a datum is no vector.
    """

    num_components: int
    x_shape: tuple[int, ...]
    num_latents: int = 0

    def __post_init__(self):
        if self.num_components < 1:
            raise ValueError(f"num_components: expected at least 1, got {self.num_components}")
        if len(self.x_shape) != 1 or self.x_shape[0] < 1:
            raise ValueError(
                f"x_shape: expected one positive size, (D,), got {self.x_shape}; flatten x, for "
                f"example x.reshape(len(x), -1)"
            )
        if self.num_latents < 0:
            raise ValueError(
                f"num_latents: expected at least 0, got {self.num_latents}; 0 is for components "
                f"of any covariance"
            )

    def check_data(self, x: Any = None, y: Any = None) -> None:
        """Refuses observations and labels that the model is not made for.

        Args:
            x: floats (N, D). None for none.
            y: integers (N,): 0 .. K-1, or -1 where the label is unknown. None for no labels.

        Raises:
            ValueError: another shape or type, or labels outside the components.
        """
        self._check_types(x, y)
        if y is None or isinstance(y, Tracer):
            return
        labels, K = np.asarray(y), self.num_components
        outside = np.unique(labels[(labels < UNKNOWN) | (labels >= K)])
        if outside.size:
            raise ValueError(
                f"y: expected labels 0 to {K - 1}, or {UNKNOWN} where the label is unknown, got "
                f"{', '.join(map(str, outside[:10]))}; mend the labels, or give the model more "
                f"components"
            )

    def _check_types(self, x: Any, y: Any) -> None:
        if x is not None:
            check_shape(x, self.x_shape)
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(
                    f"x: expected floats, got {x.dtype}; give the data as floats, for example "
                    f"x.astype(numpy.float32)"
                )
        if y is not None and not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(
                f"y: expected integers, got {y.dtype}; give labels as integers, and {UNKNOWN} "
                f"where the label is unknown"
            )
        if y is not None and y.ndim != 1:
            raise ValueError(
                f"y: expected one label per datum, shape (N,), got {y.shape}; give one column, "
                f"for example y[:, 0]"
            )

    def encoder(self, num_outputs: int, *, rngs: nnx.Rngs) -> Quadratic:
        """A network from x to a guide's numbers: an affine map of x and of its products.

        Args:
            num_outputs: how many numbers it gives for one datum.
            rngs: Flax's random numbers.
        """
        return Quadratic(self.x_shape[0], num_outputs, rngs=rngs)

    def __call__(
        self, x: Float[Any, "N D"] | None = None, y: Integer[Any, " N"] | None = None
    ) -> None:
        """Samples y, z if there are latents, and x. Observes x if it is given.

        The site ``y`` may be summed over: its value is then (K, 1), and log densities are (K, N).

        Args:
            x: floats (N, D). None to generate.
            y: integers (N,), the labels that are known, and -1 for others. None for no labels.

        Raises:
            ValueError: arrays of another shape or type.
        """
        self._check_types(x, y)
        (D,), K, L = self.x_shape, self.num_components, self.num_latents
        logits = numpyro.param("logits", jnp.zeros(K))
        loc = jnp.asarray(numpyro.param("loc", lambda key: random.normal(key, (K, D))))
        size = next((len(array) for array in (x, y) if array is not None), 1)
        given = None if y is None else jnp.asarray(y).astype(jnp.int32)
        with numpyro.plate("data", size):
            k = partly_observed("y", dist.Categorical(logits=logits), given)
            if L:
                W = numpyro.param(
                    "factor", lambda key: random.normal(key, (K, D, L)) / math.sqrt(D)
                )
                sigma = numpyro.param("sigma", jnp.full(K, 0.5), constraint=constraints.positive)
                z = numpyro.sample("z", dist.Normal(0, 1).expand([L]).to_event(1))
                mean = loc[k] + jnp.einsum("...dl,...l->...d", jnp.asarray(W)[k], z)
                x_given = dist.Normal(mean, jnp.asarray(sigma)[k][..., None]).to_event(1)
            else:
                start = jnp.broadcast_to(0.5 * jnp.eye(D), (K, D, D))
                root = numpyro.param("scale_tril", start, constraint=constraints.lower_cholesky)
                x_given = dist.MultivariateNormal(loc[k], scale_tril=jnp.asarray(root)[k])
            numpyro.sample("x", x_given, obs=x)


# --- what is known in closed form -----------------------------------------------------------------
#
# All in float64. The largest arrays are (N, K) and as large as the data.


def covariances(params: Mapping[str, Any]) -> Float[np.ndarray, "K D D"]:
    """The covariance S_k of x in each component: T_k T_k^T, or W_k W_k^T + sigma_k^2 I.

    Args:
        params: ``scale_tril``, (K, D, D), or ``factor``, (K, D, L), and ``sigma``, (K,), of one
            seed.
    """
    if "scale_tril" in params:
        root = np.asarray(params["scale_tril"], np.float64)
        return root @ root.swapaxes(1, 2)
    W, sigma = (np.asarray(params[name], np.float64) for name in ("factor", "sigma"))
    return W @ W.swapaxes(1, 2) + sigma[:, None, None] ** 2 * np.eye(W.shape[1])


def _log_joint(params: Mapping[str, Any], x: Any) -> Float[np.ndarray, "N K"]:
    """log p(x, y = k) of each component."""
    x, loc = np.asarray(x, np.float64), np.asarray(params["loc"], np.float64)
    terms = []
    for mean, root in zip(loc, np.linalg.cholesky(covariances(params)), strict=True):
        away = solve_triangular(root, (x - mean).T, lower=True)
        log_det = 2 * np.log(np.diag(root)).sum()
        terms.append(-0.5 * (len(mean) * math.log(2 * math.pi) + log_det + np.sum(away**2, axis=0)))
    return log_softmax(np.asarray(params["logits"], np.float64)) + np.stack(terms, axis=1)


def _known(num_data: int, y: Any) -> Integer[np.ndarray, " N"]:
    """The labels, or -1 for all."""
    return np.full(num_data, UNKNOWN) if y is None else np.asarray(y).astype(int)


def log_likelihood(params: Mapping[str, Any], x: Any, y: Any = None) -> Float[np.ndarray, " N"]:
    """The exact log p(x) of each datum, in nats, and log p(x, y) where the label is known.

    Args:
        params: ``logits``, ``loc``, and ``scale_tril`` or ``factor`` and ``sigma``, of one seed.
        x: floats (N, D).
        y: labels (N,), -1 where unknown. None for no labels.
    """
    joint = _log_joint(params, x)
    labels = _known(len(joint), y)
    own = np.take_along_axis(joint, np.maximum(labels, 0)[:, None], axis=1)[:, 0]
    return np.where(labels == UNKNOWN, logsumexp(joint, axis=1), own)


def posterior(params: Mapping[str, Any], x: Any, y: Any = None) -> Float[np.ndarray, "N K"]:
    """The exact p(y | x) of each datum: the responsibilities (Bishop 2006, equation 9.13).

    Args:
        params, x, y: as in ``log_likelihood``. A known label has the probability 1.
    """
    joint = _log_joint(params, x)
    labels = _known(len(joint), y)[:, None]
    one_hot = (labels == np.arange(joint.shape[1])).astype(np.float64)
    return np.where(labels == UNKNOWN, np.exp(log_softmax(joint, axis=1)), one_hot)


def latent_posterior(
    params: Mapping[str, Any], x: Any
) -> tuple[Float[np.ndarray, "N K L"], Float[np.ndarray, "K L L"]]:
    """The exact p(z | y = k, x) of each component: means, and the precisions Lambda_k.

    The precision is the same for every datum of a component (Bishop 2006, equation 12.42).

    Args:
        params: ``loc``, ``factor`` and ``sigma`` of one seed.
        x: floats (N, D).
    """
    loc, W, sigma = (np.asarray(params[n], np.float64) for n in ("loc", "factor", "sigma"))
    scaled = W / sigma[:, None, None] ** 2
    precision = np.eye(W.shape[2]) + scaled.swapaxes(1, 2) @ W
    away = np.asarray(x, np.float64)[:, None] - loc
    terms = np.einsum("kdl,nkd->nkl", scaled, away)
    return np.linalg.solve(precision, terms[..., None])[..., 0], precision


def discriminant(
    params: Mapping[str, Any],
) -> tuple[Float[np.ndarray, "inputs K"], Float[np.ndarray, " K"]]:
    """The weights with which ``Quadratic`` gives log p(x, y): so it holds the exact p(y | x).

    With P_k = S_k^-1, log p(x, y = k) is -1/2 x^T P_k x + mu_k^T P_k x and a constant.

    Args:
        params: as in ``log_likelihood``.

    Returns:
        Kernel and bias: for x_1 .. x_D and the products x_i x_j, i <= j, in rows of the upper
        triangle.
    """
    loc = np.asarray(params["loc"], np.float64)
    precision = np.linalg.inv(covariances(params))
    bias = _log_joint(params, np.zeros((1, loc.shape[1])))[0]
    slope = np.einsum("kij,kj->ik", precision, loc)
    rows, columns = np.triu_indices(loc.shape[1])
    products = np.where(rows == columns, -0.5, -1.0)[:, None] * precision[:, rows, columns].T
    return np.concatenate([slope, products]), bias
