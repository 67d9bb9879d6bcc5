"""How an objective is scaled: nats per datum, whatever the batch.

On a batch of B out of N data,

    loss = - (N / B * (terms inside the plate "data") + (terms outside it)) / N,

whose expectation over batches and draws is the same for every B. The terms outside the plate
are those of global latent variables; where there are none this is the batch's loss over B.

And how the divergence is weighed while training warms up: ``KLWarmUp``. And how a model is trained
on draws from its own prior, alone or beside the guide's: ``Hybrid``.
"""

import copy
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from numpyro.handlers import block
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger


class _Rescale(Messenger):
    """Multiplies the log densities of the sites that ``chosen`` picks by ``factor``."""

    def __init__(self, fn: Callable[..., Any], factor: Any, chosen: Callable[[Any], bool]):
        super().__init__(fn)
        self.factor, self.chosen = factor, chosen

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and self.chosen(msg):
            msg["scale"] = self.factor * (1.0 if msg["scale"] is None else msg["scale"])


def _in_data(msg: Any) -> bool:
    return any(frame.name == "data" for frame in msg["cond_indep_stack"])


def _is_latent(msg: Any) -> bool:
    return not msg["is_observed"]


class PerDatum(ELBO):
    """A NumPyro objective divided by the number of data, on batches of any size.

    Args:
        objective: a NumPyro ELBO object, in nats per batch.
        num_data: N.
        has_globals: whether the programs hold sample sites outside the plate "data".
    """

    def __init__(self, objective: ELBO, num_data: int, has_globals: bool):
        self.num_data, self.has_globals = num_data, has_globals
        self.objective = copy.copy(objective)
        if getattr(objective, "sum_sites", False):
            self.objective.sum_sites = False  # NumPyro's sum is in the order of a set: see _scaled
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
        size = len(next(iter(batch.values())))
        if self.has_globals:
            factor, size = self.num_data / size, self.num_data
            model, guide = (_Rescale(fn, factor, _in_data) for fn in (model, guide))
        result = method(rng_key, param_map, model, guide, **batch)
        # Strings hash differently in every process, and so would a sum in the order of a set
        # of names round: summed by name, the same seed gives the same bits everywhere.
        if isinstance(result, dict) and "mutable_state" in result:
            return result | {"loss": _sum_by_name(result["loss"]) / size}
        return _sum_by_name(result) / size


def _sum_by_name(terms: Any) -> Any:
    return sum(terms[name] for name in sorted(terms)) if isinstance(terms, dict) else terms


class KLWarmUp(ELBO):
    """An ELBO whose gradient neglects the divergence at first (Bowman et al. 2016, section 3.1).

    At step t of the warm-up the gradient is that of

        E_q [ log p(x | z, c) ] - w(t) KL( q(z | x, c) || p(z | c) ),    w(t) = start + (1 - start)
                                                                                * t / num_steps,

    and of the ELBO itself from step ``num_steps`` on. Its value is always the ELBO, so that traces
    of runs with and without compare. ``fit`` knows the step; to plain ``SVI``, which does not tell
    it to its objective, give ``KLWeighted(objective, w)``.

    Args:
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO`` or a ``Hybrid``.
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
    """An objective with its own value, and the gradient of one whose divergence is weighed.

    Args:
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO`` or a ``Hybrid``, in which the guide's
            divergence alone is weighed; or one of these per datum.
        weight: of the divergence, a number or a traced scalar.

    Raises:
        TypeError: an objective in which the divergence is no term of its own.
    """

    def __init__(self, objective: ELBO, weight: Any):
        inner = objective.objective if isinstance(objective, PerDatum) else objective
        if type(inner) not in (Trace_ELBO, TraceMeanField_ELBO, Hybrid):
            raise TypeError(
                f"objective: expected Trace_ELBO or TraceMeanField_ELBO, in which the divergence "
                f"is a term of its own, got {type(inner).__name__}; train it without warm-up"
            )
        super().__init__(inner.num_particles)
        self.objective, self.kl_weight = objective, weight
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
        model, guide = (_Rescale(fn, self.kl_weight, _is_latent) for fn in (model, guide))
        weighed = method(rng_key, param_map, model, guide, *args, **kwargs)
        if isinstance(plain, dict):
            loss = _with_gradient_of(plain["loss"], weighed["loss"])
            return plain | {"loss": loss}
        return _with_gradient_of(plain, weighed)


def _with_gradient_of(value: Any, other: Any) -> Any:
    return other + lax.stop_gradient(value - other)


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

        prior = block(model, hide_fn=_is_observed_sample)
        if self.alpha in (0, 1):
            return part(guide if self.alpha else prior)
        by_prior, by_guide = part(prior), part(guide)
        loss = self.alpha * by_guide["loss"] + (1 - self.alpha) * by_prior["loss"]
        return by_guide | {"loss": loss}


def _is_observed_sample(msg: Any) -> bool:
    return msg["type"] == "sample" and msg["is_observed"]
