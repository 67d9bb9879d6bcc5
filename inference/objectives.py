"""How an objective is scaled: nats per datum, whatever the batch.

On a batch of B out of N data,

    loss = - (N / B * (terms inside the plate "data") + (terms outside it)) / N,

whose expectation over batches and draws is the same for every B. The terms outside the plate
are those of global latent variables; where there are none this is the batch's loss over B.

``OBJECTIVES`` has them by name. What NumPyro lacks is here, as ELBO objects that its own ``SVI``
takes too:

| object                    | the gradient is that of                                              |
|---------------------------|----------------------------------------------------------------------|
| ``StickingTheLanding``    | the ELBO, without noise where the guide is the posterior             |
| ``DoublyReparameterized`` | the importance-weighted bound, in which the guide learns for every K |
| ``KLWeighted``            | an ELBO with beta times the divergence (a beta-VAE)                  |
| ``KLWarmUp``              | the same, beta rising to 1 while training warms up                   |
| ``FreeBits``              | an ELBO whose divergence costs nothing below so many nats            |
| ``Hybrid``                | the ELBO, in part with draws from the prior in place of the guide's  |

The value of each is the bound itself, so that traces of runs compare.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax, random
from jaxtyping import Array, Float
from numpyro.handlers import block, replay, seed
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger
from numpyro.util import check_model_guide_match

from inference.sites import (
    DATA_PLATE,
    Site,
    base,
    data_axis,
    elementwise_kl,
    in_data_plate,
    is_latent,
    is_observed,
    length,
    sum_by_datum,
    trace_of,
)


class _Rescale(Messenger):
    """Multiplies the log densities of the sites that ``chosen`` picks by ``factor``."""

    def __init__(self, fn: Callable[..., Any], factor: Any, chosen: Callable[[Any], bool]):
        super().__init__(fn)
        self.factor, self.chosen = factor, chosen

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and self.chosen(msg):
            msg["scale"] = self.factor * (1.0 if msg["scale"] is None else msg["scale"])


class PerDatum(ELBO):
    """A NumPyro objective divided by the number of data, on batches of any size.

    Args:
        objective: a NumPyro ELBO object, in nats per batch.
        num_data: N.
        has_globals: whether the programs hold sample sites outside the plate "data".
    """

    def __init__(self, objective: ELBO, num_data: int, has_globals: bool):
        self.num_data, self.has_globals = num_data, has_globals
        self.objective = _by_site(objective)
        self.can_infer_discrete = objective.can_infer_discrete
        self.multi_sample_guide = getattr(objective, "multi_sample_guide", False)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss per datum on a batch of keyword arrays."""
        return self._scaled(self.objective.loss, rng_key, param_map, model, guide, kwargs)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss per datum, and the programs' mutable state."""
        method = self.objective.loss_with_mutable_state
        return self._scaled(method, rng_key, param_map, model, guide, kwargs)

    def _scaled(self, method, rng_key, param_map, model, guide, batch):
        size = length(batch)
        if self.has_globals:
            factor, size = self.num_data / size, self.num_data
            model, guide = (_Rescale(fn, factor, in_data_plate) for fn in (model, guide))
        with warnings.catch_warnings():  # ``fit`` checks what NumPyro guesses from the sites' order
            warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
            result = method(rng_key, param_map, model, guide, **batch)
        if isinstance(result, dict) and "mutable_state" in result:
            return result | {"loss": _sum_by_name(result["loss"]) / size}
        return _sum_by_name(result) / size


def _by_site(objective: ELBO) -> ELBO:
    """The objective with its terms by site, where NumPyro would sum them in the order of a set.

    Strings hash differently in every process, and so would that sum round: summed by name, the
    same seed gives the same bits everywhere.
    """
    objective = copy.copy(objective)
    if getattr(objective, "sum_sites", False):
        objective.sum_sites = False
    return objective


def _sum_by_name(terms: Any) -> Any:
    return sum(terms[name] for name in sorted(terms)) if isinstance(terms, dict) else terms


def nested(objective: ELBO) -> Iterator[ELBO]:
    """The objective, and those it is made from."""
    while objective is not None:
        yield objective
        objective = getattr(objective, "objective", None)


# --- the weight of the divergence -----------------------------------------------------------------


class KLWarmUp(ELBO):
    """An ELBO whose gradient neglects the divergence at first (Bowman et al. 2016, section 3.1).

    At step t of the warm-up the gradient is that of

        E_q [ log p(x | z, c) ] - w(t) KL( q(z | x, c) || p(z | c) ),    w(t) = start + (1 - start)
                                                                                * t / num_steps,

    and of the ELBO itself from step ``num_steps`` on. Its value is always the ELBO, so that traces
    of runs with and without compare. ``fit`` knows the step; to plain ``SVI``, which does not tell
    it to its objective, give ``KLWeighted(objective, w)``.

    Args:
        objective: one that ``KLWeighted`` takes; a ``KLWeighted`` warms up to its own weight.
        num_steps: steps until the weight is 1. ``fit`` refuses more than it trains.
        start: the first step's weight.

    Raises:
        ValueError: a number out of range.
        TypeError: an objective in which the divergence is no term of its own.
    """

    def __init__(self, objective: ELBO, num_steps: int, start: float = 0.0):
        if num_steps < 1:
            raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
        if not 0 <= start <= 1:
            raise ValueError(f"start: expected a weight from 0 to 1, got {start}")
        KLWeighted(objective, start)
        super().__init__(objective.num_particles)
        self.objective, self.num_steps, self.start = objective, num_steps, start
        self.can_infer_discrete = objective.can_infer_discrete

    def weight(self, step: Any) -> Any:
        """w(t)."""
        return self.start + (1 - self.start) * jnp.minimum(step / self.num_steps, 1.0)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss at full weight."""
        return self.objective.loss(rng_key, param_map, model, guide, *args, **kwargs)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss at full weight, and the programs' mutable state."""
        return self.objective.loss_with_mutable_state(
            rng_key, param_map, model, guide, *args, **kwargs
        )


class KLWeighted(ELBO):
    """An ELBO with its own value, and the gradient of one whose divergence is weighed.

    With a fixed weight beta it trains a beta-VAE (Higgins et al. 2017, equation 4),

        E_q [ log p(x | z, c) ] - beta KL( q(z | x, c) || p(z | c) ),

    and the value, in traces and on held-out data, is the ELBO: what the data are worth.

    Args:
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``StickingTheLanding``, a ``Hybrid``, in
            which the guide's divergence alone is weighed, another ``KLWeighted`` (the weights
            multiply), or one of these per datum.
        weight: of the divergence, a number from 0 or a traced scalar.

    Raises:
        TypeError: an objective in which the divergence is no term of its own.
        ValueError: a weight out of range.
    """

    def __init__(self, objective: ELBO, weight: Any):
        inner = next(o for o in nested(objective) if not isinstance(o, PerDatum | KLWeighted))
        _require_divergence(inner)
        if isinstance(weight, int | float) and not 0 <= weight < math.inf:
            raise ValueError(f"weight: expected a finite number from 0, got {weight}")
        super().__init__(inner.num_particles)
        self.objective, self.kl_weight = _by_site(objective), weight
        self.can_infer_discrete = objective.can_infer_discrete

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss."""
        return self._combine(self.objective.loss, rng_key, param_map, model, guide, args, kwargs)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss, and the programs' mutable state."""
        method = self.objective.loss_with_mutable_state
        return self._combine(method, rng_key, param_map, model, guide, args, kwargs)

    def _combine(self, method, rng_key, param_map, model, guide, args, kwargs):
        # Both have the same draws, so that the compiler evaluates them once.
        plain = method(rng_key, param_map, model, guide, *args, **kwargs)
        model, guide = (_Rescale(fn, self.kl_weight, is_latent) for fn in (model, guide))
        weighed = method(rng_key, param_map, model, guide, *args, **kwargs)
        if isinstance(plain, dict) and "mutable_state" in plain:
            return plain | {"loss": _with_gradient_of(plain["loss"], weighed["loss"])}
        return _with_gradient_of(plain, weighed)


def _require_divergence(objective: ELBO) -> None:
    if type(objective) not in (Trace_ELBO, TraceMeanField_ELBO, StickingTheLanding, Hybrid):
        raise TypeError(
            f"objective: expected Trace_ELBO, TraceMeanField_ELBO, StickingTheLanding or Hybrid, "
            f"in which the divergence is a term of its own, got {type(objective).__name__}; train "
            f"it without warm-up, beta and free bits"
        )


def _with_gradient_of(value: Any, other: Any) -> Any:
    value, other = _sum_by_name(value), _sum_by_name(other)
    return other + lax.stop_gradient(value - other)


class FreeBits(ELBO):
    """An ELBO with its own value, and the gradient of one in which some nats are free.

    Kingma et al. 2016, appendix C.8: with KL_i the divergence of dimension i of z, averaged over
    the batch, the gradient is that of

        E_q [ log p(x | z, c) ] - sum_i max( nats, KL_i ),

    so that a dimension loses nothing by telling up to ``nats`` nats per datum, and is not given up
    before the decoder has learnt to listen. Divergences are exact; with ``TraceMeanField_ELBO``
    inside, a free dimension's cancels from the gradient exactly, with another ELBO on average.

    Args:
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO`` or ``StickingTheLanding``.
        nats: per datum, free in each dimension of each latent site; from 0.

    Raises:
        TypeError: an objective in which the divergence is no term of its own.
        ValueError: ``nats`` out of range; in use, a latent site outside the plate "data", or whose
            guide and prior do not factorise over dimensions or have no formula for the divergence.
    """

    def __init__(self, objective: ELBO, nats: float):
        _require_divergence(objective)
        if not 0 <= nats < math.inf:
            raise ValueError(f"nats: expected a finite number from 0, got {nats}")
        super().__init__(objective.num_particles)
        self.objective, self.nats = _by_site(objective), nats
        self.can_infer_discrete = objective.can_infer_discrete

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss."""
        loss = self.objective.loss(rng_key, param_map, model, guide, *args, **kwargs)
        return self._free(loss, rng_key, param_map, model, guide, args, kwargs)

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss, and the programs' mutable state."""
        method = self.objective.loss_with_mutable_state
        result = method(rng_key, param_map, model, guide, *args, **kwargs)
        loss = self._free(result["loss"], rng_key, param_map, model, guide, args, kwargs)
        return result | {"loss": loss}

    def _free(self, loss, rng_key, param_map, model, guide, args, kwargs):
        def divergences(key: Array) -> dict[str, tuple[Array, Array]]:
            """By latent site: data, or what a batch stands for; nats of every dimension."""
            model_key, guide_key = random.split(key)  # as NumPyro splits it: the same draws
            drawn = trace_of(guide, guide_key, param_map, *args, **kwargs)
            sites = trace_of(replay(model, drawn), model_key, param_map, *args, **kwargs)
            check_model_guide_match(sites, drawn)
            return {n: _mean_kl(drawn[n], s) for n, s in sorted(sites.items()) if is_latent(s)}

        loss = _sum_by_name(loss)
        for count, kl in jax.vmap(divergences)(_keys(rng_key, self.num_particles)).values():
            unused = count[0] * jnp.maximum(self.nats - kl.mean(0), 0.0).sum()
            loss += unused - lax.stop_gradient(unused)
        return loss


def _mean_kl(drawn: Site, site: Site) -> tuple[Array, Float[Array, " z"]]:
    axis = data_axis(drawn)
    kl = elementwise_kl(drawn["fn"], site["fn"])
    if kl is None:
        raise ValueError(
            f"site {site['name']!r}: expected a guide and a prior that factorise over dimensions, "
            f"with a formula for the divergence of each, got {type(base(drawn['fn'])).__name__} "
            f"and {type(base(site['fn'])).__name__}; train it without free bits"
        )
    kl = jnp.moveaxis(kl, axis - drawn["fn"].event_dim, 0)
    scale = 1.0 if drawn["scale"] is None else drawn["scale"]
    return jnp.asarray(scale * len(kl)), kl.reshape(len(kl), -1).mean(0)


# --- gradients along the path of the draws --------------------------------------------------------


class StickingTheLanding(ELBO):
    """The ELBO, with the gradient of Roeder, Wu & Duvenaud 2017 (equation 7).

    log q(z | x, c) depends on the guide's parameters directly and through the draw z. The direct
    part has expectation zero and is left out: where the guide is the exact posterior the gradient
    of its parameters is then zero for every draw, and not only on average. A parameter that the
    model uses too keeps its gradient in log p(x, z | c).

    Args:
        num_particles: draws of z per datum.

    Raises:
        ValueError: ``num_particles`` below 1; in use, a latent site whose draws have no gradient,
            or a factor in the guide.
    """

    def __init__(self, num_particles: int = 1):
        _require_particles(num_particles)
        super().__init__(num_particles)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss: its value is minus the ELBO."""

        def particle(key: Array) -> Array:
            densities = _along_the_path(key, param_map, model, guide, args, kwargs)
            log_q, _, log_p, _ = densities
            total = lambda terms: sum(terms[name].sum() for name in sorted(terms))  # noqa: E731
            return jnp.asarray(total(log_p) - total(log_q))

        return -jax.vmap(particle)(_keys(rng_key, self.num_particles)).mean()


class DoublyReparameterized(ELBO):
    """The importance-weighted bound, with the gradient of Tucker et al. 2019 (equation 8).

    With w_k = p(x, z_k | c) / q(z_k | x, c), z_k from the guide, the value is that of Burda et al.
    2016 (equation 8), each datum with its own weights,

        L_K = E [ log (1 / K) sum_k w_k ],

    and, v_k = w_k / sum_j w_j being the share of draw k, the gradient of the

        model's parameters is  sum_k v_k    (d / d theta) log w_k,
        guide's parameters is  sum_k v_k^2  (d log w_k / d z_k) (d z_k / d phi),

    which is unbiased as the plain one is, but whose signal does not drown as K grows (Rainforth et
    al. 2018). A parameter that both programs use gets the sum of the two: the first for its part
    in log p(x, z | c), the second for its part in drawing z. One particle is
    ``StickingTheLanding``.

    Args:
        num_particles: K, draws of z per datum.

    Raises:
        ValueError: as ``StickingTheLanding``; in use, a site outside the plate "data", or a plate
            that draws its own batches.
    """

    def __init__(self, num_particles: int = 2):
        _require_particles(num_particles)
        super().__init__(num_particles)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss: its value is minus the importance-weighted bound."""

        def log_weights(share: Float[Array, "particle batch"] | None) -> Any:
            def particle(key: Array, share: Any) -> Array:
                densities = _along_the_path(key, param_map, model, guide, args, kwargs, share)
                log_q, q_sites, log_p, p_sites = densities
                size = _batch_size(p_sites)
                return sum_by_datum(log_p, p_sites, size) - sum_by_datum(log_q, q_sites, size)

            keys = _keys(rng_key, self.num_particles)
            return jax.vmap(particle, in_axes=(0, None if share is None else 0))(keys, share)

        # Both have the same draws, so that the compiler evaluates them once.
        log_w = lax.stop_gradient(log_weights(None))
        share = jax.nn.softmax(log_w, axis=0)
        bound = jax.nn.logsumexp(log_w, axis=0) - math.log(self.num_particles)
        return _with_gradient_of(-bound.sum(), -(share * log_weights(share)).sum())


def _along_the_path(
    key: Array,
    params: dict[str, Any],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    share: Float[Array, " batch"] | None = None,
) -> tuple[dict[str, Array], dict[str, Any], dict[str, Array], dict[str, Any]]:
    """log q and its sites, log p and its sites, of one draw from the guide.

    The parameters of log q are held fixed: the guide's reach it, as log p, through the draw alone.
    The gradient of every datum's draws is multiplied by ``share``.
    """
    model_key, guide_key = random.split(key)
    drawn = trace_of(guide, guide_key, params, *args, **kwargs)
    drawn = {name: _drawn_along(site, share) for name, site in drawn.items()}
    # A Delta follows from the other draws. So that it still agrees with them it is not drawn again.
    draws = {
        name: site["value"]
        for name, site in drawn.items()
        if is_latent(site) and not isinstance(base(site["fn"]), dist.Delta)
    }
    fixed = jax.tree.map(lax.stop_gradient, params)
    log_q, q_sites = compute_log_probs(
        seed(guide, guide_key), args, kwargs, fixed | draws, sum_log_prob=False
    )
    log_p, p_sites = compute_log_probs(
        replay(seed(model, model_key), drawn), args, kwargs, params, sum_log_prob=False
    )
    check_model_guide_match(p_sites, q_sites)
    return log_q, q_sites, log_p, p_sites


def _drawn_along(site: Site, share: Array | None) -> Site:
    if site["type"] != "sample":
        return site
    if site["is_observed"]:
        raise ValueError(
            f"guide site {site['name']!r}: expected latent sites alone, got a factor, whose "
            f"gradient would be lost; use Trace_ELBO"
        )
    if not site["fn"].has_rsample:
        raise ValueError(
            f"guide site {site['name']!r}: expected a distribution whose draws have a gradient, "
            f"got {type(base(site['fn'])).__name__}; relax it, or use TraceGraph_ELBO"
        )
    if share is None:
        return site
    axis = data_axis(site) - site["fn"].event_dim
    factor = share.reshape(-1, *(1 for _ in range(-axis - 1)))
    return site | {"value": _scale_gradient(site["value"], factor)}


@jax.custom_jvp
def _scale_gradient(x: Array, factor: Array) -> Array:
    """x, whose gradient is multiplied by ``factor``."""
    return x


@_scale_gradient.defjvp
def _scale_tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    return primals[0], primals[1] * tangents[0]


def _batch_size(sites: dict[str, Site]) -> int:
    """The length of the plate "data" around the sites of a program."""
    sampled = next(site for site in sites.values() if site["type"] == "sample")
    data_axis(sampled)  # that of every other site is asked for when densities are summed
    size = next(frame.size for frame in sampled["cond_indep_stack"] if frame.name == DATA_PLATE)
    whole = sites[DATA_PLATE]["args"][0]
    if size != whole:
        raise ValueError(
            f'plate "data": expected all of its data, got a subsample of {size} out of {whole}; '
            f"take the size from the arguments and let ``fit`` draw the batches"
        )
    return size


def _keys(rng_key: Array, num_particles: int) -> Array:
    """One for each particle, as NumPyro splits them."""
    return random.split(rng_key, num_particles) if num_particles > 1 else rng_key[None]


def _require_particles(num_particles: int) -> None:
    if num_particles < 1:
        raise ValueError(f"num_particles: expected at least 1, got {num_particles}")


# --- draws from the prior ------------------------------------------------------------------------


class Hybrid(ELBO):
    """A mixture of the ELBO and of what the model expects of its own prior's draws.

        alpha * E_q [ log p(x, z | c) - log q(z | x, c) ]  +  (1 - alpha) * E_p [ log p(x | z, c) ],

    with z ~ p(z | c) in the second (Sohn, Lee & Yan 2015, section 4, who write x -> y for our
    c -> x). The second is the ELBO whose guide is the prior: what the paper's Gaussian stochastic
    network is trained on, and the way in which the model is used where x is unknown. Both are
    lower bounds of log p(x | c), and so is the mixture.

    Args:
        alpha: the share of the ELBO, 0 to 1.
        objective: ``Trace_ELBO`` (unless given) or ``TraceMeanField_ELBO``.

    Raises:
        ValueError: a share out of range.
        TypeError: an objective that is no expectation over draws of the guide.
    """

    def __init__(self, alpha: float, objective: ELBO | None = None):
        inner: ELBO = Trace_ELBO() if objective is None else copy.copy(objective)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a share from 0 to 1, got {alpha}")
        if type(inner) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise TypeError(
                f"objective: expected Trace_ELBO or TraceMeanField_ELBO, got "
                f"{type(inner).__name__}; a mixture of others is not the paper's"
            )
        super().__init__(inner.num_particles)
        inner.sum_sites = False  # summed by name, as in PerDatum
        self.alpha, self.objective = alpha, inner
        self.can_infer_discrete = inner.can_infer_discrete

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss, and the programs' mutable state (that of the guide's draws, if there are any).

        Both parts have the same key: at alpha 1 and 0 the loss is that of one part to the bit.
        """

        def part(guide: Any) -> Any:
            method = self.objective.loss_with_mutable_state
            result = method(rng_key, param_map, model, guide, *args, **kwargs)
            return result | {"loss": _sum_by_name(result["loss"])}

        prior = block(model, hide_fn=is_observed)
        if self.alpha in (0, 1):
            return part(guide if self.alpha else prior)
        by_prior, by_guide = part(prior), part(guide)
        loss = self.alpha * by_guide["loss"] + (1 - self.alpha) * by_prior["loss"]
        return by_guide | {"loss": loss}


# --- by name --------------------------------------------------------------------------------------

# From the number of particles to an objective. RenyiELBO's order is 0, which makes it the
# importance-weighted bound of Burda et al. 2016; the weights are each datum's own where every site
# is in the plate "data".
OBJECTIVES: dict[str, Callable[[int], ELBO]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "RenyiELBO": lambda num_particles: RenyiELBO(num_particles=num_particles),
    "importance-weighted": lambda num_particles: RenyiELBO(num_particles=num_particles),
    "doubly-reparameterized": DoublyReparameterized,
    "sticking-the-landing": StickingTheLanding,
}
