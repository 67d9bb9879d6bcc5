"""Mixtures with known parameters, guides with known numbers, and all their exact answers.

Given its component y every datum is linear and Gaussian, as in ``experiments/known.py``:

    y_n           ~  Categorical(pi)
    z_n           ~  Normal(0, I)
    x_n | y_n, z_n ~  Normal(mu_y + W_y z_n, sigma_y^2 I)
    y_n | x_n     ~  Categorical(q),  log q = T (log pi_y + log Normal(x_n; mu_y, S_y)) + constant
    z_n | y_n, x_n ~  Normal(M_y x_n + a_y, V_y)

The last two lines are the guide. An exact one has T = 1 and the posterior of z. A wide one has
T = 1/2, and a wider and shifted z. So each answer is a sum over y of formulas. Where the label is
known, the sum has one term.

| problem           | latents                   | labels                    |
|-------------------|---------------------------|---------------------------|
| mixture           | y and z of each datum     | none                      |
| mixture, labels   | y and z of each datum     | of about half of the data |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Float
from scipy.special import log_softmax, logsumexp, softmax, xlogy

from experiments.exact import divergence
from experiments.known import GUIDES, Numbers, Problem, Trial, log_normal
from models import mixture
from models.labels import UNKNOWN, told, told_of

NUM_COMPONENTS, NUM_LATENTS, NUM_DIMS = 3, 2, 4
TEMPER = {"exact": 1.0, "wide": 0.5}  # T, by guide
SHARE = 0.5  # of the labels that are known


class Mixture(Problem):
    """The mixture with latents.

    Attributes:
        has_labels: whether some labels are known.
    """

    latents = {"y": (), "z": (NUM_LATENTS,)}  # noqa: RUF012
    model = mixture.Model(NUM_COMPONENTS, (NUM_DIMS,), NUM_LATENTS)

    def __init__(self, has_labels: bool):
        self.has_labels = has_labels
        rng = np.random.default_rng(int(has_labels))
        params = {
            "logits": rng.normal(size=NUM_COMPONENTS),
            "loc": rng.normal(size=(NUM_COMPONENTS, NUM_DIMS)),
            "factor": 0.7 * rng.normal(size=(NUM_COMPONENTS, NUM_DIMS, NUM_LATENTS)),
            "sigma": np.array([0.6, 0.8, 1.0]),
        }
        self.params = {name: np.asarray(value, np.float32) for name, value in params.items()}


@dataclass(frozen=True)
class MixtureGuide:
    """The program q(y_n | x_n) q(z_n | y_n, x_n). It is sure of a known label."""

    def __call__(self, x: Any, y: Any = None) -> None:
        """Samples y and z given the data."""
        K, L, D = NUM_COMPONENTS, NUM_LATENTS, NUM_DIMS
        kernel = numpyro.param("kernel", jnp.zeros((D + D * (D + 1) // 2, K)))
        logits = features(jnp, x) @ kernel + numpyro.param("bias", jnp.zeros(K))
        M = numpyro.param("slopes", jnp.zeros((K, L, D)))
        a = numpyro.param("intercepts", jnp.zeros((K, L)))
        root = numpyro.param("root", jnp.tile(jnp.eye(L), (K, 1, 1)))
        fn, known = dist.Categorical(logits=logits), {}
        if y is not None:
            given = jnp.asarray(y)
            fn, known = told(fn, given), told_of(fn, given)
        with numpyro.plate("data", len(x)):
            k = numpyro.sample("y", fn, infer={"enumerate": "parallel"} | known)
            loc = jnp.einsum("...ld,...d->...l", M[k], x) + a[k]
            numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root[k]))


def features(numpy: Any, x: Any) -> Any:
    """The inputs of the model's encoder: x and the products of its entries.

    Args:
        numpy: ``numpy`` or ``jax.numpy``.
        x: (N, D).
    """
    rows, columns = np.triu_indices(x.shape[1])
    return numpy.concatenate([x, x[:, rows] * x[:, columns]], axis=1)


PROBLEMS: dict[str, Problem] = {"mixture": Mixture(False), "mixture, labels": Mixture(True)}
PROGRAMS = {(problem, guide): MixtureGuide() for problem in PROBLEMS for guide in GUIDES}


class MixtureTrial(Trial):
    """A ``Trial`` of a mixture. A datum's u is its y, one-hot, and its z: (N, K + L).

    Args:
        problem, guide, num_data, seed: as in ``Trial``.
    """

    problem: Mixture
    problems, programs = PROBLEMS, PROGRAMS

    # --- data and guide

    @property
    def values(self) -> dict[str, np.ndarray]:
        """The model's parameters in float64."""
        return {n: np.asarray(value, np.float64) for n, value in self.problem.params.items()}

    def simulated(self) -> dict[str, Any]:
        """Draws y, z and x, and hides labels."""
        p = self.values
        y = self.rng.choice(NUM_COMPONENTS, size=self.num_data, p=softmax(p["logits"]))
        z = self.rng.normal(size=(self.num_data, NUM_LATENTS))
        x = p["loc"][y] + np.einsum("ndl,nl->nd", p["factor"][y], z)
        x += p["sigma"][y][:, None] * self.rng.normal(size=x.shape)
        data = {"x": x.astype(np.float32)}
        if self.problem.has_labels:
            is_known = self.rng.uniform(size=self.num_data) < SHARE
            data["y"] = np.where(is_known, y, UNKNOWN).astype(np.int32)
        return data

    def guide_params(self, guide: str) -> dict[str, Any]:
        """The numbers of the guide, from the posterior's."""
        p = self.values
        best = []
        for W, loc, sigma in zip(p["factor"], p["loc"], p["sigma"], strict=True):
            covariance = np.linalg.inv(np.eye(NUM_LATENTS) + W.T @ W / sigma**2)
            slopes = covariance @ W.T / sigma**2
            best.append(GUIDES[guide](Numbers(slopes, -slopes @ loc, covariance)))
        self.slopes, self.intercepts, self.spreads = (
            np.stack(part) for part in zip(*best, strict=True)
        )
        self.kernel, self.bias = (TEMPER[guide] * part for part in mixture.discriminant(p))
        return {
            "kernel": self.kernel,
            "bias": self.bias,
            "slopes": self.slopes,
            "intercepts": self.intercepts,
            "root": np.linalg.cholesky(self.spreads),
        }

    # --- one component after the other

    @property
    def is_known(self) -> np.ndarray:
        """Which labels are known, (N,)."""
        return self.labels != UNKNOWN

    @property
    def labels(self) -> np.ndarray:
        """The labels, -1 for unknown, (N,)."""
        return np.asarray(self.data.get("y", np.full(self.num_data, UNKNOWN)))

    def _sure(self, weights: np.ndarray) -> Float[np.ndarray, "N K"]:
        """Weights of the components, one-hot where the label is known."""
        one_hot = (self.labels[:, None] == np.arange(NUM_COMPONENTS)).astype(float)
        return np.where(self.is_known[:, None], one_hot, weights)

    @property
    def weights(self) -> Float[np.ndarray, "N K"]:
        """q(y | x)."""
        return self._sure(self.untold)

    @property
    def untold(self) -> Float[np.ndarray, "N K"]:
        """q(y | x), the labels not known."""
        return softmax(features(np, self.x) @ self.kernel + self.bias, axis=1)

    @property
    def means(self) -> Float[np.ndarray, "K N L"]:
        """The means of q(z | y, x)."""
        return np.einsum("kld,nd->knl", self.slopes, self.x) + self.intercepts[:, None]

    def _observed(self, means: np.ndarray) -> Float[np.ndarray, "K ... D"]:
        """The means of x in each component, given z, (K, ..., L)."""
        p = self.values
        shape = (NUM_COMPONENTS, *[1] * (means.ndim - 2), NUM_DIMS)
        return np.einsum("kdl,k...l->k...d", p["factor"], means) + p["loc"].reshape(shape)

    def _moments(
        self, weights: np.ndarray, means: np.ndarray, spreads: np.ndarray
    ) -> tuple[Float[np.ndarray, "N V"], Float[np.ndarray, "N V V"]]:
        """Means and covariances of (one-hot y, z, x). Each component has its own of z."""
        p, size = self.values, NUM_COMPONENTS + NUM_LATENTS + NUM_DIMS
        x, mean, second = self._observed(means), 0.0, 0.0
        for k in range(NUM_COMPONENTS):
            one_hot = np.tile(np.eye(NUM_COMPONENTS)[k], (self.num_data, 1))
            own = np.concatenate([one_hot, means[k], x[k]], axis=1)
            of_z = np.zeros((size, NUM_LATENTS))
            of_z[NUM_COMPONENTS:] = np.concatenate([np.eye(NUM_LATENTS), p["factor"][k]])
            covariance = of_z @ spreads[k] @ of_z.T
            covariance[-NUM_DIMS:, -NUM_DIMS:] += p["sigma"][k] ** 2 * np.eye(NUM_DIMS)
            mean = mean + weights[:, k, None] * own
            squares = covariance + own[:, :, None] * own[:, None, :]
            second = second + weights[:, k, None, None] * squares
        mean, second = np.asarray(mean), np.asarray(second)
        return mean, second - mean[:, :, None] * mean[:, None, :]

    # --- what the judges' rows ask

    @property
    def q(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and covariances of u under the guide."""
        mean, covariance = self._moments(self.weights, self.means, self.spreads)
        return mean[:, :-NUM_DIMS], covariance[:, :-NUM_DIMS, :-NUM_DIMS]

    def replicated(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and covariances of x where u comes from the guide."""
        mean, covariance = self._moments(self.weights, self.means, self.spreads)
        return mean[:, -NUM_DIMS:], covariance[:, -NUM_DIMS:, -NUM_DIMS:]

    def joint(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and covariances of (u, x) under the model. A known label is not drawn."""
        weights = self._sure(softmax(self.values["logits"]))
        identity = np.tile(np.eye(NUM_LATENTS), (NUM_COMPONENTS, 1, 1))
        return self._moments(weights, np.zeros_like(self.means), identity)

    def encoding(self) -> tuple[list[int], np.ndarray]:
        """The most probable y, and the mean of z given it."""
        y = self.weights.argmax(1)
        z = self.means[y, np.arange(self.num_data)]
        u = np.concatenate([np.eye(NUM_COMPONENTS)[y], z], axis=1)
        return list(range(u.shape[1])), u

    def stacked(self, values: Mapping[str, Any], num_data: int) -> np.ndarray:
        """y and z, (seed=1, draw, N, ...), as (draw, N, K + L)."""
        one_hot = np.eye(NUM_COMPONENTS)[np.asarray(values["y"][0], int)]
        return np.concatenate([one_hot, np.asarray(values["z"][0], np.float64)], axis=2)

    def drawn(self, num_draws: int) -> tuple[np.ndarray, dict[str, Any]]:
        """NumPy's draws from q: (draw, N, K + L), and by site as ``sample_posterior`` has them."""
        chance = self.rng.uniform(size=(num_draws, self.num_data, 1))
        y = (chance > np.cumsum(self.weights, axis=1)[:, :-1]).sum(2)
        noise = self.rng.normal(size=(num_draws, self.num_data, NUM_LATENTS, 1))
        away = np.linalg.cholesky(self.spreads)[y] @ noise
        z = self.means[y, np.arange(self.num_data)] + away[..., 0]
        sites = {"y": y[None].astype(np.int32), "z": z[None].astype(np.float32)}
        return self.stacked(sites, self.num_data), sites

    def mean_given(self, u: np.ndarray) -> np.ndarray:
        """The mean of x, (S, N, D), given (S, N, K + L)."""
        every = np.stack([u[..., NUM_COMPONENTS:]] * NUM_COMPONENTS)
        return np.einsum("snk,ksnd->snd", u[..., :NUM_COMPONENTS], self._observed(every))

    def log_p_given(self, u: np.ndarray) -> np.ndarray:
        """log p(x_n | u_n), (S, N), given (S, N, K + L)."""
        squares = np.sum((self.x - self.mean_given(u)) ** 2, axis=2)
        variance = (u[..., :NUM_COMPONENTS] @ self.values["sigma"]) ** 2
        return -0.5 * (NUM_DIMS * np.log(2 * np.pi * variance) + squares / variance)

    # --- exact answers, in nats

    def log_joint(self) -> Float[np.ndarray, "N K"]:
        """log p(x_n, y_n = k)."""
        p, parts = self.values, []
        for W, loc, sigma in zip(p["factor"], p["loc"], p["sigma"], strict=True):
            covariance = np.tile(W @ W.T + sigma**2 * np.eye(NUM_DIMS), (self.num_data, 1, 1))
            parts.append(log_normal(self.x, loc, covariance))
        return np.stack(parts, axis=1) + log_softmax(p["logits"])

    def log_p(self) -> np.ndarray:
        """log p(x_n), or log p(x_n, y_n) where the label is known, (N,)."""
        joint, y = self.log_joint(), np.maximum(self.labels, 0)
        known = joint[np.arange(self.num_data), y]
        return np.where(self.is_known, known, logsumexp(joint, axis=1))

    def posterior(self) -> Float[np.ndarray, "N K"]:
        """p(y_n | x_n), the labels not known."""
        return softmax(self.log_joint(), axis=1)

    def reconstruction(self) -> np.ndarray:
        """E_q log p(x_n | u_n), (N,)."""
        p, parts = self.values, []
        for k, mean in enumerate(self._observed(self.means)):
            variance, W = p["sigma"][k] ** 2, p["factor"][k]
            squares = np.sum((self.x - mean) ** 2, axis=1) + np.trace(W @ self.spreads[k] @ W.T)
            parts.append(-0.5 * (NUM_DIMS * np.log(2 * np.pi * variance) + squares / variance))
        return np.sum(self.weights * np.stack(parts, axis=1), axis=1)

    def kl(self) -> np.ndarray:
        """KL(q(y, z | x) || p(y, z)), (N,)."""
        prior, parts = (np.zeros(NUM_LATENTS), np.eye(NUM_LATENTS)), []
        for mean, spread in zip(self.means, self.spreads, strict=True):
            precision = np.tile(np.linalg.inv(spread), (self.num_data, 1, 1))
            parts.append(divergence((mean, precision), prior))
        of_z, w = np.stack(parts, axis=1), self.weights
        of_y = xlogy(w, w) - w * log_softmax(self.values["logits"])
        return np.sum(of_y + w * of_z, axis=1)
