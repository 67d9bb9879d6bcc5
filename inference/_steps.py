"""The compiled parts of a run: ``init``, ``advance``, ``validate``, pure functions of a state.

They are the same for every model. What does not change during a run is a ``Plan``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState

from inference._checks import Programs
from inference._feeds import MAX_CHUNK, Whole, Window
from inference._missing import Preprocess, masking
from inference._scaling import PerDatum
from inference._settings import Settings
from inference.objectives import traits
from inference.sites import Program, is_latent, length, spread_rows, trace_of

Batch = Mapping[str, Array]

MAX_FIRST = 1000  # the most data that parameters are made on
INIT, ORDER, NOISE, VALIDATION = range(4)  # what the keys folded from a seed's key are for


class State(NamedTuple):
    """All that the next step needs. All fields but the first three have a leading seed axis.

    ``average`` holds unconstrained parameters, ``best`` those and the mutable state. Each is None
    where the run asks for none.
    """

    step: Int[Array, ""]
    epoch: Int[Array, ""]
    offset: Int[Array, ""]  # data of this epoch already visited
    optimizer: PyTree  # NumPyro's (count, (unconstrained parameters, Optax state))
    mutable: PyTree
    average: PyTree
    best: PyTree
    best_elbo: Float[Array, " seed"]
    num_stale: Int[Array, " seed"]  # evaluations since the best one
    active: Bool[Array, " seed"]  # false from where patience ran out

    @property
    def params(self) -> PyTree:
        """The unconstrained parameters."""
        return self.optimizer[1][0]


SEED_AXES = State._make([None] * 3 + [0] * (len(State._fields) - 3))


@dataclass(frozen=True)
class Plan:
    """What a run does at every step.

    Attributes:
        model, guide: programs that fit each other.
        programs: what is known of them.
        objective: in nats per batch.
        validation_objective: likewise, for held-out data.
        optimizer: an Optax transformation.
        preprocess: the user's (key, batch) -> batch, or None.
        settings: the run's numbers.
        mesh: with automatic axes, or None.
        constrain: from one seed's unconstrained parameters to their values by name.
    """

    model: Program
    guide: Program
    programs: Programs
    objective: ELBO
    validation_objective: ELBO
    optimizer: optax.GradientTransformation
    preprocess: Preprocess | None
    settings: Settings
    mesh: Mesh | None
    constrain: Callable[[PyTree], dict[str, Any]]

    def svi(self, step: Any = None) -> SVI:
        """What updates the parameters, at a step or, without one, where it does not matter."""
        objective = self.objective
        if step is not None and traits(objective).changes_with_step:
            objective = objective.at_step(step)
        known = self.programs
        scaled = PerDatum(objective, self.settings.num_data, known.plates, known.has_globals)
        return SVI(self.model, self.guide, self.moving, scaled)

    @property
    def prepare(self) -> Preprocess | None:
        """What makes a batch as the programs take it: ``preprocess``, then masks. None: nothing."""
        return masking(self.model, self.preprocess, self.settings.missing)

    @property
    def moving(self) -> optax.GradientTransformation:
        """The optimiser, kept from the parameters that stay."""
        fixed = self.programs.fixed
        if not fixed:
            return self.optimizer

        def labels(params: Mapping[str, Any]) -> PyTree:
            return {n: jax.tree.map(lambda _, n=n: n in fixed, tree) for n, tree in params.items()}

        return optax.partition({True: optax.set_to_zero(), False: self.optimizer}, labels)


# --- the state before the first step --------------------------------------------------------------


def first_rows(plan: Plan) -> np.ndarray:
    """The data to make parameters on, spread evenly over all. Programs of one length get all."""
    num_data = plan.settings.num_data
    return spread_rows(num_data, MAX_FIRST if plan.programs.takes_batches else num_data)


def constrain_of(
    model: Program, guide: Program, objective: ELBO, key: Array, batch: Mapping[str, Any]
) -> Callable[[PyTree], dict[str, Any]]:
    """The function from one seed's unconstrained parameters to their values."""
    svi = SVI(model, guide, optax.identity(), objective)
    jax.eval_shape(lambda key, batch: svi.init(key, **batch), key, dict(batch))
    assert svi.constrain_fn is not None
    return svi.constrain_fn


def init(plan: Plan, keys: Array, first: Batch, params: Mapping[str, Any]) -> State:
    """The state before the first step, every seed from its own key.

    Args:
        plan: the run's.
        keys: one a seed.
        first: the data of ``first_rows``.
        params: values of parameters and mutable sites by name, with a seed axis, in place of the
            programs' own.
    """

    def init_seed(key: Array, params: Mapping[str, Any]) -> SVIState:
        init_key, batch_key = random.split(random.fold_in(key, INIT))
        batch = first if plan.prepare is None else plan.prepare(batch_key, first)
        svi, given = plan.svi(), dict(params)
        if given and plan.programs.mutable:  # NumPyro takes a network's both or makes both
            given = (svi.init(init_key, **batch).mutable_state or {}) | given
        return svi.init(init_key, init_params=given or None, **batch)

    svi_state, settings = jax.vmap(init_seed)(keys, dict(params)), plan.settings
    params, mutable = svi_state.optim_state[1][0], svi_state.mutable_state
    zero = jnp.zeros((), jnp.int32)
    state = State(
        step=zero,
        epoch=zero,
        offset=zero,
        optimizer=svi_state.optim_state,
        mutable=mutable,
        average=jax.tree.map(jnp.zeros_like, params) if settings.average else None,
        best=(params, mutable) if settings.patience else None,
        best_elbo=jnp.full(settings.num_seeds, -jnp.inf),
        num_stale=jnp.zeros(settings.num_seeds, jnp.int32),
        active=jnp.ones(settings.num_seeds, bool),
    )
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), state)  # no weak types


# --- steps ----------------------------------------------------------------------------------------


def advance(
    plan: Plan, state: State, keys: Array, data: Whole | Window, stop: Array
) -> tuple[State, Float[Array, "seed chunk"], Bool[Array, " seed"]]:
    """Takes steps ``state.step`` to ``stop - 1``, at most MAX_CHUNK of them.

    Returns:
        The state after them, the ELBO of each step's batch (nats per datum), and whether the
        parameters are finite.
    """

    def run(
        state: State, key: Array, data: Whole | Window, stop: Array
    ) -> tuple[State, Float[Array, " chunk"], Bool[Array, ""]]:
        def body(i: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            state, elbo = carry
            state, loss = take_step(plan, state, key, data)
            return state, elbo.at[i].set(-loss)

        count = jnp.minimum(stop - state.step, MAX_CHUNK)
        empty = jnp.full(MAX_CHUNK, jnp.nan)
        state, elbo = lax.fori_loop(0, count, body, (state, empty))
        finite = [jnp.isfinite(p).all() for p in jax.tree.leaves(state.params)]
        return state, elbo, jnp.array(finite).all()

    inputs = (SEED_AXES, 0, data.seed_axes, None)
    return over_seeds(plan.mesh, run, inputs, (SEED_AXES, 0, 0))(state, keys, data, stop)


def order_word(key: Array) -> Array:
    """32 bits that name the order in which the seed of a key visits the data."""
    return random.bits(random.fold_in(key, ORDER), dtype=jnp.uint32)


def take_step(plan: Plan, state: State, key: Array, data: Whole | Window) -> tuple[State, Array]:
    """One step of one seed: shuffle, gather, preprocess, update. Its loss is per datum."""
    settings = plan.settings
    key, batch = step_batch(plan, state, key, data)
    old, svi = SVIState(state.optimizer, state.mutable, key), plan.svi(state.step)
    svi.constrain_fn = plan.constrain
    skips = settings.on_nan == "skip"
    new, loss = (svi.stable_update if skips else svi.update)(old, **batch)
    mutable, average = new.mutable_state, state.average
    if skips:
        mutable = where(jnp.isfinite(loss), mutable, state.mutable)
    if average is not None:
        count = jnp.maximum(state.step - settings.first_averaged + 1, 1)
        params = new.optim_state[1][0]
        average = jax.tree.map(lambda a, p: a + (p - a) / count, average, params)
    seen = state.offset + settings.batch_size
    wraps = seen >= settings.num_data
    state = state._replace(
        step=state.step + 1,
        epoch=state.epoch + wraps,
        offset=jnp.where(wraps, seen - settings.num_data, seen),
        optimizer=new.optim_state,
        mutable=mutable,
        average=average,
    )
    return state, loss


def step_batch(plan: Plan, state: State, key: Array, data: Whole | Window) -> tuple[Array, Batch]:
    """The batch of a step, prepared, and the key of its update."""
    batch = data.batch(plan.settings, state, order_word(key))
    batch = split_batch(plan.mesh, batch)
    key = random.fold_in(random.fold_in(key, NOISE), state.step)
    batch_key = key
    if plan.preprocess is not None:
        key, batch_key = random.split(key)
    if plan.prepare is not None:
        # The barrier keeps XLA from preparing the batch anew for each of its uses.
        batch = lax.optimization_barrier(plan.prepare(batch_key, batch))
    return key, batch


def over_seeds(mesh: Mesh | None, run: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """``run`` on every seed. The devices of a mesh's axis "seed" share the seeds between them.

    One seed of a device needs no ``vmap``, and only without it does XLA update the parameters in
    place.

    Args:
        mesh: devices, or None.
        run: a function of one seed.
        inputs, outputs: of each argument and result, 0 if it has a seed axis and None if not.
    """

    def here(*args: Any) -> Any:
        pairs = zip(args, inputs, strict=True)
        if len(next(jax.tree.leaves(x)[0] for x, axis in pairs if axis == 0)) > 1:
            return jax.vmap(run, inputs, outputs)(*args)
        return on_axes(lambda x: x[None], outputs, run(*on_axes(lambda x: x[0], inputs, args)))

    if mesh is None or "seed" not in mesh.axis_names:
        return here
    specs = (
        jax.tree.map(
            lambda axis: PartitionSpec() if axis is None else PartitionSpec("seed"),
            axes,
            is_leaf=lambda axis: axis is None,
        )
        for axes in (inputs, outputs)
    )
    named = dict(zip(("in_specs", "out_specs"), specs, strict=True))
    return jax.shard_map(here, mesh=mesh, axis_names={"seed"}, check_vma=False, **named)


def split_batch(mesh: Mesh | None, batch: Batch) -> Batch:
    """The batch, of which each device of the mesh's axis "data" has a part, where that goes up."""
    if mesh is None or "data" not in mesh.axis_names or length(batch) % mesh.shape["data"]:
        return batch
    spec = PartitionSpec("data")
    inside = "seed" in mesh.axis_names  # of ``shard_map``, which knows the mesh
    return lax.with_sharding_constraint(batch, spec if inside else NamedSharding(mesh, spec))


# --- held-out data, the end -----------------------------------------------------------------------


def validate(
    plan: Plan,
    num_data: int,
    num_keys: int,
    state: State,
    keys: Array,
    batches: Window,
    count: Array,
) -> Float[Array, "seed batch"]:
    """The held-out loss of some batches, nats per datum, for the parameters to return now.

    With global sites it is -E_q [log p(x | theta)] with the local terms: the divergence of the
    globals enters no held-out number.

    Args:
        plan: the run's.
        num_data: held-out data in all.
        num_keys: batches in all, with one to spare.
        state: the run's.
        keys: one a seed.
        batches: arrays of shape (batch, datum, ...), and the number of the first batch.
        count: how many of them to take. The others get 0.
    """
    known = plan.programs
    objective = PerDatum(
        plan.validation_objective,
        num_data,
        known.plates,
        known.has_globals,
        drop_globals=known.has_globals,
    )

    def run(params: PyTree, mutable: PyTree, key: Array, batches: Window, count: Array) -> Any:
        params = plan.constrain(params) | (mutable or {})
        keys = random.split(random.fold_in(key, VALIDATION), num_keys)

        def body(i: Array, losses: Array) -> Array:
            batch = split_batch(plan.mesh, {name: a[i] for name, a in batches.arrays.items()})
            key = keys[batches.first + i]
            loss = objective.loss(key, params, plan.model, plan.guide, **batch)
            return losses.at[i].set(jnp.asarray(loss))

        return lax.fori_loop(0, count, body, jnp.zeros(len(next(iter(batches.arrays.values())))))

    judge = over_seeds(plan.mesh, run, (0, 0, 0, None, None), 0)
    return judge(current(plan.settings, state), state.mutable, keys, batches, count)


def keep_best(plan: Plan, state: State, elbos: Float[Array, " seed"]) -> State:
    """Keeps the best parameters. The seeds that have run out of ``patience`` stop."""
    assert plan.settings.patience is not None
    params = current(plan.settings, state)
    better = (elbos > state.best_elbo) & state.active
    num_stale = jnp.where(better, 0, state.num_stale + 1)
    return state._replace(
        active=state.active & (num_stale < plan.settings.patience),
        best=jax.vmap(where)(better, (params, state.mutable), state.best),
        best_elbo=jnp.where(better, elbos, state.best_elbo),
        num_stale=num_stale,
    )


def current(settings: Settings, state: State) -> PyTree:
    """Unconstrained: the average where averaging has begun, else the last iterate."""
    if state.average is None:
        return state.params
    return where(state.step > settings.first_averaged, state.average, state.params)


def finish(plan: Plan, state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and the mutable state to return, by name, with a seed axis."""
    params, mutable = current(plan.settings, state), state.mutable
    if state.best is not None:
        started = jnp.isfinite(state.best_elbo)
        params, mutable = jax.vmap(where)(started, state.best, (params, mutable))
    return jax.vmap(plan.constrain)(params), dict(mutable or {})


# --- a step that failed ---------------------------------------------------------------------------


def find_fault(
    plan: Plan, state: State, key: Array, data: Whole | Window
) -> list[tuple[str, Array]]:
    """What may not be finite in the next step of one seed, in the order of its computation.

    Returns:
        Pairs of a name and whether it is finite: parameters, then values and log densities by
        site, then the gradients of the parameters.
    """
    key, batch = step_batch(plan, state, key, data)
    params = plan.constrain(state.params) | (state.mutable or {})
    finite: list[tuple[str, Array]] = []

    def add(name: str, tree: PyTree) -> None:
        leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
        finite.append((name, jnp.array(leaves).all()))

    for name in sorted(params):
        add(f"parameter {name!r}", params[name])
    step_key = random.split(key)[1]  # as NumPyro's update and its objectives split it
    model_key, guide_key = random.split(step_key)
    drawn = trace_of(plan.guide, guide_key, params, **batch)
    draws = {name: site["value"] for name, site in drawn.items() if is_latent(site)}
    sites = trace_of(plan.model, model_key, params | draws, **batch)
    for role, program in (("guide", drawn), ("model", sites)):
        for name, site in program.items():
            if site["type"] == "sample":
                add(f"{role} site {name!r}: value", site["value"])
                add(f"{role} site {name!r}: log density", site["fn"].log_prob(site["value"]))
    svi = plan.svi(state.step)

    def loss(unconstrained: PyTree) -> Array:
        params = plan.constrain(unconstrained) | (state.mutable or {})
        return svi.loss.loss(step_key, params, plan.model, plan.guide, **batch)

    for name, gradient in jax.grad(loss)(state.params).items():
        add(f"gradient of parameter {name!r}", gradient)
    return finite


# --- trees ----------------------------------------------------------------------------------------


def on_axes(change: Callable[[Any], Any], axes: Any, tree: Any) -> Any:
    """``change`` on the arrays that have a seed axis."""
    return jax.tree.map(
        lambda axis, part: part if axis is None else jax.tree.map(change, part),
        axes,
        tree,
        is_leaf=lambda axis: axis is None,
    )


def by_seed(change: Callable[[Any], Any], state: State) -> State:
    """``change`` on the arrays of a state that have a seed axis."""
    return on_axes(change, SEED_AXES, state)


def where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """``jnp.where`` on every leaf."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
