"""Models with known parameters, Normal guides with known numbers, and all their exact answers.

Every model here is linear and Gaussian. Let u_n be the latents of datum n, the global ones first:

    u_n        ~  Normal(p_n, P)                        the prior
    x_n | u_n  ~  Normal(F_n u_n + h_n, sigma^2 I)      the likelihood
    u_n        ~  Normal(M f_n + a, S)                  the guide, f_n = (x_n, features of c_n)

Second arguments are variances. All that a judge measures is then a formula of p, P, F, h, sigma and
of the guide's m = M f + a and S. The formulas of this file are in float64. They share no code with
the judges. A ``Trial`` is one problem, one guide, and data that NumPy drew from the model.

| problem                   | latents               | condition c              |
|---------------------------|-----------------------|--------------------------|
| toy                       | z of each datum       | a number                 |
| linear-gaussian           | z of each datum, in R^3 | none                   |
| linear-gaussian, labels   | z of each datum, in R^3 | one of three labels    |
| hierarchical              | mu of all, z of each  | none                     |
| regression                | w in R^3 and b of all | covariates in R^3        |
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float
from scipy.special import ndtr

from experiments.exact import divergence
from inference import Fit
from models import gaussian_mean, hierarchical_gaussian, linear_gaussian, regression
from models.conditions import Labels

NUM_DIMS, NUM_LATENTS, NUM_LABELS, NUM_FEATURES = 5, 3, 3, 3
WIDER = 1.5  # A wide guide has the variances of the best mean field times this,
AWAY = 0.2  # and its mean is so many standard deviations away.

# --- problems -------------------------------------------------------------------------------------


class Problem:
    """A model with known parameters, as a Normal for each datum.

    Attributes:
        model: the program.
        params: its parameters.
        latents: the shape of each latent site, the global sites first.
        num_shared: dimensions of the global sites.
        sigma: standard deviation of the noise.
        num_labels: the number of labels, if c is a label, or 0.
        feature_covariance: (C, C), of the features of c.
        slope: (D, C), how the mean of x follows them.
    """

    model: Any
    params: Mapping[str, Any] = {}
    latents: Mapping[str, tuple[int, ...]]
    num_shared = 0
    sigma = 0.8
    num_labels = 0
    feature_covariance = np.zeros((0, 0))
    slope = np.zeros((NUM_DIMS, 0))

    @property
    def blocks(self) -> dict[str, slice]:
        """The dimensions of u that belong to each site."""
        sizes = [math.prod(shape) for shape in self.latents.values()]
        ends = itertools.accumulate(sizes)
        return {n: slice(e - s, e) for n, s, e in zip(self.latents, sizes, ends, strict=True)}

    def is_shared(self, site: str) -> bool:
        """Whether all data share the site."""
        return self.blocks[site].stop <= self.num_shared

    def conditions(self, rng: np.random.Generator, num_data: int) -> dict[str, Any]:
        """Draws c."""
        return {}

    def features(self, data: Mapping[str, Any]) -> Any:
        """The features of c, (N, C). None for none."""
        return None

    def prior(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """p, (N, K), and P, (K, K)."""
        raise NotImplementedError

    def likelihood(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """F, (N, D, K), and h, (N, D)."""
        raise NotImplementedError

    def posterior(self, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Means (N, K) and the covariance (K, K) of p(u_n | x, c), all data known."""
        raise NotImplementedError

    def shaped(self, x: np.ndarray) -> np.ndarray:
        """Observations (N, D) as the model has them."""
        return x[..., 0]


class Toy(Problem):
    """The Gaussian unknown mean."""

    latents = {"z": ()}  # noqa: RUF012
    truth = gaussian_mean.Truth(mu_0=0.5, sigma_0=1.2, sigma=0.8)
    model = gaussian_mean.Model(truth.sigma_0)
    params = {"theta_1": 0.5, "theta_2": 0.7, "theta_3": 2 * math.log(0.8)}  # noqa: RUF012
    feature_covariance, slope = np.eye(1), np.array([[0.7]])

    def conditions(self, rng: np.random.Generator, num_data: int) -> dict[str, Any]:
        """Numbers."""
        return {"c": rng.normal(size=num_data).astype(np.float32)}

    def features(self, data: Mapping[str, Any]) -> Any:
        """The number itself."""
        return data["c"][:, None]

    def prior(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """theta_1 + theta_2 c and sigma_0^2."""
        mean = 0.5 + 0.7 * np.asarray(data["c"], np.float64)[:, None]
        return mean, np.array([[self.truth.sigma_0**2]])

    def likelihood(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """The latent itself."""
        return np.ones((num_data, 1, 1)), np.zeros((num_data, 1))

    def posterior(self, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """By the model's own formula."""
        mean, scale = gaussian_mean.posterior(self.params, self.truth.sigma_0, data["c"], data["x"])
        return np.asarray(mean, np.float64)[:, None], np.array([[float(scale) ** 2]])


class LinearGaussian(Problem):
    """The linear-Gaussian model. The columns of its W are not orthogonal."""

    latents = {"z": (NUM_LATENTS,)}  # noqa: RUF012

    def __init__(self, num_labels: int = 0):
        self.num_labels = num_labels
        condition = Labels(num_labels) if num_labels else None
        self.model = linear_gaussian.Model((NUM_DIMS,), NUM_LATENTS, condition)
        rng = np.random.default_rng(num_labels)
        self.slope = rng.normal(size=(NUM_DIMS, num_labels))
        params = {"W": 0.4 * rng.normal(size=(NUM_DIMS, NUM_LATENTS)) + 0.1}
        params |= {"b": rng.normal(size=NUM_DIMS), "sigma": self.sigma}
        params |= {"B": self.slope} if num_labels else {}
        self.params = {name: np.asarray(value, np.float32) for name, value in params.items()}
        share = 1 / max(1, num_labels)
        self.feature_covariance = share * (np.eye(num_labels) - share)

    def conditions(self, rng: np.random.Generator, num_data: int) -> dict[str, Any]:
        """Labels, if there are any."""
        return {"c": rng.integers(self.num_labels, size=num_data)} if self.num_labels else {}

    def features(self, data: Mapping[str, Any]) -> Any:
        """One-hot labels."""
        return jnp.eye(self.num_labels)[data["c"]] if self.num_labels else None

    def prior(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """Normal(0, I)."""
        return np.zeros((num_data, NUM_LATENTS)), np.eye(NUM_LATENTS)

    def likelihood(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """W and B c + b."""
        params = {name: np.asarray(value, np.float64) for name, value in self.params.items()}
        mean = np.tile(params["b"], (num_data, 1))
        if self.num_labels:
            mean = mean + params["B"].T[data["c"]]
        return np.tile(params["W"], (num_data, 1, 1)), mean

    def posterior(self, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """By the model's own formula."""
        mean, covariance = linear_gaussian.posterior(self.model, self.params, data)
        return np.asarray(mean, np.float64), np.asarray(covariance, np.float64)

    def shaped(self, x: np.ndarray) -> np.ndarray:
        """As they are."""
        return x


class Hierarchical(Problem):
    """The hierarchical Gaussian model."""

    latents = {"mu": (), "z": ()}  # noqa: RUF012
    num_shared = 1
    model = hierarchical_gaussian.Model(mu_0=1.5, tau_0=0.9, tau=0.7, sigma=0.8)
    slope = np.zeros((1, 0))

    def prior(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """z varies as mu does, and about it."""
        shared, own = self.model.tau_0**2, self.model.tau**2
        return np.full((num_data, 2), self.model.mu_0), shared + np.diag([0, own])

    def likelihood(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """The local mean."""
        return np.tile([[0.0, 1.0]], (num_data, 1, 1)), np.zeros((num_data, 1))

    def posterior(self, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """By the model's own formula. The mean of z follows mu."""
        known = hierarchical_gaussian.posterior(self.model, data)
        follows = np.array([1, known.slope])
        covariance = known.mu_scale**2 * np.outer(follows, follows)
        mean = np.stack([np.full(len(known.z_loc), known.mu_loc), known.z_loc], axis=1)
        return mean, covariance + np.diag([0, known.scale**2])


class Regression(Problem):
    """The linear regression. It has no local latents."""

    latents = {"w": (NUM_FEATURES,), "b": ()}  # noqa: RUF012
    num_shared = NUM_FEATURES + 1
    model = regression.Model(NUM_FEATURES, w_scale=0.9, b_scale=0.7, sigma=0.8)

    def conditions(self, rng: np.random.Generator, num_data: int) -> dict[str, Any]:
        """Covariates."""
        return {"c": rng.normal(size=(num_data, NUM_FEATURES)).astype(np.float32)}

    def features(self, data: Mapping[str, Any]) -> Any:
        """The covariates."""
        return data["c"]

    def prior(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights and intercept are independent."""
        scales = [self.model.w_scale] * NUM_FEATURES + [self.model.b_scale]
        return np.zeros((num_data, self.num_shared)), np.diag(scales) ** 2

    def likelihood(self, data: Mapping[str, Any], num_data: int) -> tuple[np.ndarray, np.ndarray]:
        """The covariates and 1."""
        c = np.asarray(data["c"], np.float64)
        return np.concatenate([c, np.ones((num_data, 1))], axis=1)[:, None], np.zeros((num_data, 1))

    def posterior(self, data: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """By the model's own formula."""
        mean, covariance = regression.posterior(self.model, data)
        return np.tile(mean, (len(data["x"]), 1)), covariance


PROBLEMS: dict[str, Problem] = {
    "toy": Toy(),
    "linear-gaussian": LinearGaussian(),
    "linear-gaussian, labels": LinearGaussian(NUM_LABELS),
    "hierarchical": Hierarchical(),
    "regression": Regression(),
}


# --- the guide ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AffineGuide:
    """The program q(u_n | x_n, c_n) = Normal(M f_n + a, S), S = L L^T, one site after the other.

    A local site is drawn given the global sites before it. There is at most one.

    Attributes:
        problem: whose latents it draws.
        factorises: whether L is diagonal. Then each site factorises over its dimensions.
    """

    problem: Problem
    factorises: bool

    def __call__(self, **data: Any) -> None:
        """Samples the latents given the data."""
        problem, blocks = self.problem, self.problem.blocks
        parts = [jnp.reshape(data["x"], (len(data["x"]), -1)), problem.features(data)]
        f = jnp.concatenate([part for part in parts if part is not None], axis=1)
        K = max(block.stop for block in blocks.values())
        M = numpyro.param("slopes", jnp.zeros((K, f.shape[1])))
        a = numpyro.param("intercepts", jnp.zeros(K))
        L = numpyro.param("root", jnp.eye(K))
        noise = jnp.zeros(0)  # of the sites before
        for name, block in blocks.items():
            before, own = L[block, : block.start], L[block, block]
            loc = a[block] + before @ noise
            if problem.is_shared(name):
                z = numpyro.sample(name, self._normal(name, loc, own))
                past = solve_triangular(own, jnp.reshape(z, -1) - loc, lower=True)
                noise = jnp.concatenate([noise, past])
            else:
                with numpyro.plate("data", len(f)):
                    numpyro.sample(name, self._normal(name, loc + f @ M[block].T, own))

    def _normal(self, name: str, loc: Array, root: Array) -> dist.Distribution:
        if self.problem.latents[name] == ():
            return dist.Normal(loc[..., 0], root[0, 0])
        if self.factorises:
            return dist.Normal(loc, jnp.diag(root)).to_event(1)
        return dist.MultivariateNormal(loc, scale_tril=root)


class Numbers(NamedTuple):
    """The numbers of an ``AffineGuide``: M, (K, F), a, (K,), and S, (K, K)."""

    slopes: Float[np.ndarray, "K F"]
    intercepts: Float[np.ndarray, " K"]
    covariance: Float[np.ndarray, "K K"]


def wide(best: Numbers) -> Numbers:
    """A mean field that is wider than the best one, and beside it. Its weights have moments."""
    variances = WIDER / np.diag(np.linalg.inv(best.covariance))
    return Numbers(best.slopes, best.intercepts + AWAY * np.sqrt(variances), np.diag(variances))


# Each takes the posterior's numbers and returns the guide's.
GUIDES: dict[str, Callable[[Numbers], Numbers]] = {"exact": lambda best: best, "wide": wide}
PROGRAMS = {(p, g): AffineGuide(PROBLEMS[p], g != "exact") for p in PROBLEMS for g in GUIDES}


# --- a trial --------------------------------------------------------------------------------------


def log_normal(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """log Normal(x; mean, covariance), (N,), for x and means (N, D) and covariances (N, D, D)."""
    away = x - mean
    square = np.sum(away * np.linalg.solve(covariance, away[..., None])[..., 0], axis=1)
    return -0.5 * (x.shape[1] * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + square)


class Trial:
    """Data from a problem's model, a guide, the fit of both, and the exact answers for these data.

    Args:
        problem, guide: names of ``PROBLEMS`` and ``GUIDES``.
        num_data: N.
        seed: of the data and of all draws of the trial.
    """

    problems: Mapping[str, Problem] = PROBLEMS
    programs: Mapping[tuple[str, str], Any] = PROGRAMS

    def __init__(self, problem: str, guide: str, num_data: int, seed: Any):
        self.problem, self.program = self.problems[problem], self.programs[problem, guide]
        self.rng = np.random.default_rng(seed)
        self.key = random.key(int(self.rng.integers(2**31)))
        self.num_data = num_data
        self.data = self.simulated()
        params = {**self.problem.params, **self.guide_params(guide)}
        self.fit = Fit.from_params(self.problem.model, self.program, params, example=self.data)

    def simulated(self) -> dict[str, Any]:
        """Draws the data."""
        conditions = self.problem.conditions(self.rng, self.num_data)
        return conditions | {"x": self._observations(conditions)}

    def guide_params(self, guide: str) -> dict[str, Any]:
        """The numbers of the guide, from the posterior's."""
        self.numbers = GUIDES[guide](self._best())
        root = np.linalg.cholesky(self.numbers.covariance)
        return {"slopes": self.numbers.slopes, "intercepts": self.numbers.intercepts, "root": root}

    def keys(self, num_keys: int) -> Any:
        """Random keys."""
        return random.split(self.key, num_keys)

    def given(self, **data: Any) -> "Trial":
        """The same trial with some other data, as many. The guide's numbers stay."""
        other = copy.copy(self)
        other.data = self.data | data
        return other

    @property
    def conditions(self) -> dict[str, Any]:
        """The data without x."""
        return {name: array for name, array in self.data.items() if name != "x"}

    def _observations(self, conditions: Mapping[str, Any]) -> np.ndarray:
        """Draws latents and observations. All data share the noise of the global sites."""
        p, P = self.problem.prior(conditions, self.num_data)
        noise = self.rng.normal(size=p.shape)
        noise[:, : self.problem.num_shared] = noise[0, : self.problem.num_shared]
        F, h = self.problem.likelihood(conditions, self.num_data)
        mean = np.einsum("ndk,nk->nd", F, p + noise @ np.linalg.cholesky(P).T) + h
        x = mean + self.problem.sigma * self.rng.normal(size=mean.shape)
        return self.problem.shaped(x.astype(np.float32))

    def _best(self) -> Numbers:
        """The posterior's numbers, from its means, which are affine in (x, features of c)."""
        mean, covariance = self.problem.posterior(self.data)
        center = mean.mean(0)
        f = self.f - self.f.mean(0)
        slopes = np.linalg.lstsq(f, mean - center)[0].T
        slopes[: self.problem.num_shared] = 0  # all data have the same mean
        return Numbers(slopes, center - slopes @ self.f.mean(0), covariance)

    # --- draws

    def stacked(self, values: Mapping[str, Any], num_data: int) -> np.ndarray:
        """Latents by site, (seed=1, draw, N, ...), global ones without N, as (draw, N, K)."""
        parts = []
        for site in self.problem.latents:
            draws = np.asarray(values[site][0], np.float64)
            draws = draws[:, None] if self.problem.is_shared(site) else draws
            draws = draws.reshape(*draws.shape[:2], -1)
            parts.append(np.broadcast_to(draws, (len(draws), num_data, draws.shape[2])))
        return np.concatenate(parts, axis=2)

    def drawn(self, num_draws: int) -> tuple[np.ndarray, dict[str, Any]]:
        """NumPy's draws from q: (draw, N, K), and by site as ``sample_posterior`` has them."""
        mean, covariance = self.q
        noise = self.rng.normal(size=(num_draws, *mean.shape))
        noise[..., self.shared] = noise[:, :1, self.shared]
        u = (mean + noise @ np.linalg.cholesky(covariance).T).astype(np.float32)
        sites = {}
        for name, block in self.problem.blocks.items():
            own = u[:, 0, block] if self.problem.is_shared(name) else u[..., block]
            sites[name] = own.reshape(1, *own.shape[:-1], *self.problem.latents[name])
        return u.astype(np.float64), sites

    # --- the Normals

    @property
    def x(self) -> np.ndarray:
        """Observations, (N, D)."""
        return np.asarray(self.data["x"], np.float64).reshape(self.num_data, -1)

    @property
    def f(self) -> np.ndarray:
        """What the guide's mean is affine in, (N, F)."""
        features = self.problem.features(self.data)
        parts = [self.x] if features is None else [self.x, np.asarray(features, np.float64)]
        return np.concatenate(parts, axis=1)

    @property
    def shared(self) -> slice:
        """The dimensions of the global sites."""
        return slice(0, self.problem.num_shared)

    @property
    def prior(self) -> tuple[np.ndarray, np.ndarray]:
        """p, (N, K), and P, (K, K)."""
        return self.problem.prior(self.data, self.num_data)

    @property
    def q(self) -> tuple[np.ndarray, np.ndarray]:
        """m, (N, K), and S, (K, K)."""
        M, a, S = self.numbers
        return self.f @ M.T + a, S

    @property
    def likelihood(self) -> tuple[np.ndarray, np.ndarray]:
        """F, (N, D, K), and h, (N, D)."""
        return self.problem.likelihood(self.data, self.num_data)

    def observed(self, latents: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Means (N, D) and covariances (N, D, D) of x where u is Normal."""
        (mean, covariance), (F, h) = latents, self.likelihood
        noise = self.problem.sigma**2 * np.eye(F.shape[1])
        return np.einsum("ndk,nk->nd", F, mean) + h, F @ covariance @ F.swapaxes(1, 2) + noise

    def replicated(self) -> tuple[np.ndarray, np.ndarray]:
        """Means (N, D) and covariances (N, D, D) of x where u comes from the guide."""
        return self.observed(self.q)

    def encoding(self) -> tuple[list[int], np.ndarray]:
        """The dimensions of u that follow no other site of the guide, and the means of all."""
        (mean, covariance), first = self.q, next(iter(self.problem.blocks.values()))
        free = [
            k for k in range(len(covariance)) if k < first.stop or not covariance[k, first].any()
        ]
        return free, mean

    def new(self) -> tuple[np.ndarray, np.ndarray]:
        """The latents of a new datum: globals from the guide, locals from the prior given them.

        Without global sites this is the prior.
        """
        (p, P), (m, S), g = self.prior, self.q, self.shared
        follows = P[:, g] @ np.linalg.inv(P[g, g])
        mean = p + (m[:, g] - p[:, g]) @ follows.T
        return mean, P + follows @ (S[g, g] - P[g, g]) @ follows.T

    def joint(self) -> tuple[np.ndarray, np.ndarray]:
        """Means (N, K + D) and covariances (N, K + D, K + D) of p(u_n, x_n | c_n)."""
        (p, P), (F, _) = self.prior, self.likelihood
        mean, covariance = self.observed(self.prior)
        blocks = [[np.broadcast_to(P, (len(F), *P.shape)), P @ F.swapaxes(1, 2)]]
        blocks += [[F @ P, covariance]]
        return np.concatenate([p, mean], axis=1), np.block(blocks)

    def mean_given(self, u: np.ndarray) -> np.ndarray:
        """The mean of x, (S, N, D), given latents (S, N, K)."""
        F, h = self.likelihood
        return np.einsum("ndk,snk->snd", F, u) + h

    # --- exact answers, in nats

    def log_p(self) -> np.ndarray:
        """log p(x_n | c_n), (N,), with ``new`` latents."""
        return log_normal(self.x, *self.observed(self.new()))

    def log_p_given(self, u: np.ndarray) -> np.ndarray:
        """log p(x_n | u_n, c_n), (S, N), given latents (S, N, K)."""
        squares = np.sum((self.x - self.mean_given(u)) ** 2, axis=2)
        variance = self.problem.sigma**2
        return -0.5 * (self.x.shape[1] * np.log(2 * np.pi * variance) + squares / variance)

    def reconstruction(self) -> np.ndarray:
        """E_q log p(x_n | u_n, c_n), (N,)."""
        mean, covariance = self.observed(self.q)
        variance, D = self.problem.sigma**2, self.x.shape[1]
        squares = np.sum((self.x - mean) ** 2, axis=1)
        squares += np.trace(covariance, axis1=1, axis2=2) - D * variance
        return -0.5 * (D * np.log(2 * np.pi * variance) + squares / variance)

    def _divergence(self, dims: slice) -> np.ndarray:
        """KL(q || p) of some dimensions of u, (N,)."""
        (p, P), (m, S) = self.prior, self.q
        precision = np.linalg.inv(S[dims, dims])
        q = m[:, dims], np.tile(precision, (self.num_data, 1, 1))
        return divergence(q, (p[:, dims], P[dims, dims]))

    def kl_of_globals(self) -> float:
        """KL(q || p) of the global sites, in nats, not divided by N."""
        return float(self._divergence(self.shared)[0]) if self.problem.num_shared else 0.0

    def kl(self) -> np.ndarray:
        """E_q KL(q || p) of the local sites given the global ones, (N,): the chain rule."""
        return self._divergence(slice(None)) - self.kl_of_globals()

    def kl_of_dim(self, dim: int) -> np.ndarray:
        """The part of ``kl`` of a dimension of the local sites, if q and p factorise."""
        if self.prior[0].shape[1] == self.problem.num_shared + 1:
            return self.kl()
        return self._divergence(slice(dim, dim + 1))

    def elbo(self) -> np.ndarray:
        """The ELBO of each datum without the divergence of the globals, (N,)."""
        return self.reconstruction() - self.kl()

    def below(self, dim: int, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """The probability that a draw of q lies below z in one dimension, for data of the model.

        Without global sites. Both Normals have the same difference for all data. So the
        probability is a function of one noise e ~ Normal(0, 1), for which this is a quadrature.

        Returns:
            The probability at each node of e, and the nodes' weights.
        """
        mean, covariance = self.problem.posterior(self.data)
        away, scale = (self.q[0] - mean)[:, dim].mean(), np.sqrt(self.q[1][dim, dim])
        e, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
        below = ndtr((np.sqrt(covariance[dim, dim]) * e - away) / scale)
        return below, weights / weights.sum()

    def activity(self) -> np.ndarray:
        """The variance over all possible data of the mean of q, given the globals, (K,)."""
        (_, P), (F, _), g, problem = self.prior, self.likelihood, self.shared, self.problem
        own = P - P[:, g] @ np.linalg.solve(P[g, g], P[g])
        of_x = F[0] @ own @ F[0].T + problem.sigma**2 * np.eye(F.shape[1])
        of_c = problem.feature_covariance
        slope = problem.slope[: len(of_x)]
        joint = np.block([[of_x + slope @ of_c @ slope.T, slope @ of_c], [of_c @ slope.T, of_c]])
        return np.einsum("kf,fg,kg->k", self.numbers.slopes, joint, self.numbers.slopes)
