"""The scale of an objective: nats per datum, whatever the batch.

On a batch of B out of N data the loss is

    loss = -(local terms + B / N * global terms) / B.

A term is local if its site lies in a plate of the data, and global otherwise. The expectation of
the loss over batches and draws is the same for every B. The global terms are the ones that get a
scale, because NumPyro's ``TraceGraph_ELBO`` counts a scale twice in a discrete site's gradient.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun
from numpyro.infer import Trace_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger

from inference.sites import DataPlates, Program, Site, is_latent, length

Evaluate = Callable[[Program, Program], tuple[Any, Any]]  # (model, guide) -> loss, mutable state


class Rescale(Messenger):
    """A program with the log densities of some sites multiplied by a factor.

    Args:
        fn: a program.
        factor: a number or a traced scalar. ``TraceEnum_ELBO`` takes Python numbers only.
        chosen: tells which sample sites are meant.
    """

    def __init__(self, fn: Program, factor: Any, chosen: Callable[[Site], bool]):
        super().__init__(fn)
        self.factor, self.chosen = factor, chosen

    def process_message(self, msg: Any) -> None:
        """Scales the site. NumPyro calls it."""
        if msg["type"] == "sample" and self.chosen(msg):
            msg["scale"] = self.factor * (1.0 if msg["scale"] is None else msg["scale"])


# --- sums in the order of the sites' names --------------------------------------------------------


class _SumsByName(Trace_ELBO):
    """``Trace_ELBO`` with its terms summed in the order of the sites' names.

    NumPyro sums them in the order of a set of strings. That order differs between processes, and
    so would the rounding and the compiled program.
    """

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss, and the programs' mutable state."""
        by_site = copy.copy(self)
        by_site.sum_sites = False
        evaluate = super(_SumsByName, by_site).loss_with_mutable_state
        result = in_one_order(lambda: evaluate(rng_key, param_map, model, guide, *args, **kwargs))
        return result | {"loss": sum_by_name(result["loss"])} if self.sum_sites else result


def by_name(objective: ELBO) -> ELBO:
    """A copy of an objective that gives the same bits in every process.

    A user's subclass of ``Trace_ELBO`` keeps its own methods: ``_SumsByName`` comes between the
    two. ``TraceGraph_ELBO`` and ``TraceEnum_ELBO`` go through sets of names in other places. With
    several discrete sites their last bits depend on ``PYTHONHASHSEED``.
    """
    objective = copy.copy(objective)
    if isinstance(objective, Trace_ELBO):
        kind = type(objective)
        bases = (_SumsByName,) if kind is Trace_ELBO else (kind, _SumsByName)
        objective.__class__ = type(kind.__name__, bases, {})
    return objective


def sum_by_name(terms: Any) -> Any:
    """The sum of terms by site, in the order of their names. A number stays as it is."""
    return sum(terms[name] for name in sorted(terms)) if isinstance(terms, dict) else terms


def in_one_order(fn: Callable[[], Any]) -> Any:
    """``fn()``, with its operations in an order that the result alone decides.

    Each operation comes when the result first needs it. The compiled program is then the same in
    every process, and is found in a cache of compiled programs. Programs with side effects keep
    their own order.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)()
    if not closed.effects:
        closed = closed.replace(jaxpr=_as_needed(closed.jaxpr))
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(closed)())


def _as_needed(jaxpr: Jaxpr) -> Jaxpr:
    """The program with each equation just before the first that needs it."""
    maker = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    order: dict[int, None] = {}  # its keys are a set in order
    waiting = [var for var in reversed(jaxpr.outvars) if not isinstance(var, Literal)]
    while waiting:
        i = maker.get(waiting[-1])
        needed = [] if i is None or i in order else jaxpr.eqns[i].invars
        needed = [v for v in needed if not isinstance(v, Literal) and v in maker]
        missing = [v for v in reversed(needed) if maker[v] not in order]
        if missing:
            waiting += missing
            continue
        if i is not None:
            order.setdefault(i)
        waiting.pop()
    return jaxpr.replace(eqns=[jaxpr.eqns[i] for i in order])


# --- objectives made from others ------------------------------------------------------------------


class Derived(ELBO):
    """An objective made from another one. A subclass says how, in ``derive``.

    Args:
        objective: the other one.
    """

    def __init__(self, objective: ELBO):
        super().__init__(objective.num_particles, objective.vectorize_particles)
        self.objective = objective
        self.can_infer_discrete = objective.can_infer_discrete
        self.multi_sample_guide = getattr(objective, "multi_sample_guide", False)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss."""

        def evaluate(model: Program, guide: Program) -> tuple[Any, Any]:
            loss = by_name(self.objective).loss(rng_key, param_map, model, guide, *args, **kwargs)
            return sum_by_name(loss), None

        return self.derive(evaluate, rng_key, param_map, model, guide, args, kwargs)[0]

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss, and the programs' mutable state.

        Raises:
            TypeError: the other objective carries no mutable state.
            ValueError: it has carried none, because it has several particles.
        """
        kind = type(self.objective)
        if kind.loss_with_mutable_state is ELBO.loss_with_mutable_state:
            raise TypeError(
                f"objective: expected one that carries the programs' mutable state (batch "
                f"statistics), got {kind.__name__}; use Trace_ELBO() or TraceMeanField_ELBO(), or "
                f"a network without such state"
            )

        def evaluate(model: Program, guide: Program) -> tuple[Any, Any]:
            result = by_name(self.objective).loss_with_mutable_state(
                rng_key, param_map, model, guide, *args, **kwargs
            )
            return sum_by_name(result["loss"]), result["mutable_state"]

        with warnings.catch_warnings():  # the error below says it
            warnings.filterwarnings("ignore", "mutable state is currently ignored")
            loss, state = self.derive(evaluate, rng_key, param_map, model, guide, args, kwargs)
        if state is None and self.num_particles > 1:
            raise ValueError(
                f"objective: expected one particle for programs with mutable state (batch "
                f"statistics), got num_particles {self.num_particles}; NumPyro carries the state "
                f"of a single particle only"
            )
        return {"loss": loss, "mutable_state": state}

    def derive(
        self,
        evaluate: Evaluate,
        rng_key: Any,
        param_map: dict[str, Any],
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any]:
        """The loss and the mutable state, from those of the other objective.

        Args:
            evaluate: from a model and a guide to the other objective's loss and mutable state.
            rng_key, param_map, model, guide, args, kwargs: as in ``loss``.
        """
        raise NotImplementedError


class PerDatum(Derived):
    """A NumPyro objective in nats per datum, on batches of any size.

    The batch is given by keyword. If no plate holds the data, every batch must be the whole.

    Args:
        objective: a NumPyro ELBO object, in nats per batch.
        num_data: N.
        plates: the plates that hold the data.
        has_globals: whether either program has a sample site outside these plates.
        drop_globals: leaves the global terms out, as held-out numbers do. What remains is
            E_q[log p(x | theta)] with the local terms. Without plates the latent sites are the
            global ones.
    """

    def __init__(
        self,
        objective: ELBO,
        num_data: int,
        plates: DataPlates,
        has_globals: bool,
        drop_globals: bool = False,
    ):
        super().__init__(objective)
        self.num_data, self.plates = num_data, plates
        self.has_globals, self.drop_globals = has_globals, drop_globals

    def derive(self, evaluate, rng_key, param_map, model, guide, args, kwargs):
        """The loss per datum, and the programs' mutable state."""
        size = length(kwargs) if self.plates else self.num_data
        factor = 0.0 if self.drop_globals else size / self.num_data  # no array: see Rescale
        if self.has_globals and factor != 1.0:
            model, guide = (Rescale(fn, factor, self._is_global) for fn in (model, guide))
        with warnings.catch_warnings():  # ``fit`` checks what NumPyro guesses from the sites' order
            warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
            loss, state = evaluate(model, guide)
        return loss / size, state

    def _is_global(self, site: Site) -> bool:
        return not self.plates.hold(site) if self.plates else is_latent(site)
