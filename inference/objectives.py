"""How an objective is scaled: nats per datum, whatever the batch.

On a batch of B out of N data,

    loss = - (N / B * (terms inside the plate "data") + (terms outside it)) / N,

whose expectation over batches and draws is the same for every B. The terms outside the plate
are those of global latent variables; where there are none this is the batch's loss over B.
"""

import copy
from collections.abc import Callable
from typing import Any

from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger


class _RescaleData(Messenger):
    """Multiplies the log densities inside the plate "data" by ``factor``."""

    def __init__(self, fn: Callable[..., Any], factor: float):
        super().__init__(fn)
        self.factor = factor

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and any(f.name == "data" for f in msg["cond_indep_stack"]):
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
            model, guide = _RescaleData(model, factor), _RescaleData(guide, factor)
        result = method(rng_key, param_map, model, guide, **batch)
        # Strings hash differently in every process, and so would a sum in the order of a set
        # of names round: summed by name, the same seed gives the same bits everywhere.
        if isinstance(result, dict) and "mutable_state" in result:
            return result | {"loss": _sum_by_name(result["loss"]) / size}
        return _sum_by_name(result) / size


def _sum_by_name(terms: Any) -> Any:
    return sum(terms[name] for name in sorted(terms)) if isinstance(terms, dict) else terms
