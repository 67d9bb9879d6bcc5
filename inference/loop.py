"""The compiled parts of a run: pure functions of its state, the same for every model."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpyro import handlers
from numpyro.infer import SVI, RenyiELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO
from numpyro.infer.svi import SVIState

from inference.checks import check_mean_field, check_programs
from inference.objectives import FreeBits, KLWarmUp, KLWeighted, PerDatum, nested
from inference.optimizers import GuardState, guard
from inference.settings import Settings
from inference.shuffle import epoch_word, permute
from inference.sites import length

Program = Callable[..., Any]
Batch = Mapping[str, Array]
Preprocess = Callable[[Array, Batch], Batch]

MAX_CHUNK = 1024  # steps whose ELBO stays on the device between two looks of the host
INIT, ORDER, NOISE, VALIDATION = range(4)  # what the keys folded from a seed's key are for


class State(NamedTuple):
    """All that the next step needs; a leading seed axis but for the first three fields.

    ``average`` and ``best`` are unconstrained parameters, or None where the run asks for none.
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


class Loop:
    """The device's side of one run. Its methods are pure; ``fit`` compiles each once.

    Args:
        key, data: a key and the data, to check the programs against the first batch.
        mesh: with automatic axes, or None.

    Raises:
        ProgramError, ValueError: the programs fit neither each other, the batch nor the objective.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: ELBO,
        validation_objective: ELBO | None,
        optimizer: optax.GradientTransformation,
        preprocess: Preprocess | None,
        init_params: Mapping[str, Any] | None,
        settings: Settings,
        mesh: Mesh | None,
        key: Array,
        data: Batch,
    ):
        self.model, self.guide, self.objective = model, guide, objective
        self.preprocess, self.init_params, self.settings = preprocess, init_params, settings
        self.num_data, self.batch_size = settings.num_data, settings.batch_size
        self.sharding = mesh and NamedSharding(mesh, PartitionSpec("data"))
        self.batch = jax.eval_shape(self.first_batch, key, data)
        self.has_globals = check_programs(
            model,
            guide,
            self.batch,
            key=key,
            can_infer_discrete=objective.can_infer_discrete,
        )
        whole = self.batch_size == self.num_data
        if self.has_globals and isinstance(objective, RenyiELBO) and not whole:
            raise ValueError(
                f"objective: RenyiELBO weighs whole data sets where there are global latent "
                f"variables: expected batch_size {self.num_data}, got {self.batch_size}"
            )
        if isinstance(guide, AutoGuide) and getattr(guide, "prototype_trace", None) is None:
            # An autoguide keeps its first run: let that be a concrete one, not a traced one.
            handlers.seed(guide, key)(**self.first_batch(key, data))
        if any(isinstance(part, TraceMeanField_ELBO | FreeBits) for part in nested(objective)):
            check_mean_field(model, guide, self.batch, key=key)
        plain = objective.objective if isinstance(objective, KLWarmUp) else objective
        scaled = PerDatum(plain, self.num_data, self.has_globals)
        self.validation_objective = validation_objective or plain
        optimizer = guard(optimizer) if settings.on_nan == "skip" else optimizer
        self.svi = SVI(model, guide, optimizer, scaled)

    def first_batch(self, key: Array, data: Batch) -> Batch:
        """The first data as they lie, prepared: to check programs and to start parameters."""
        batch = {name: array[: self.batch_size] for name, array in data.items()}
        return batch if self.preprocess is None else self.preprocess(key, batch)

    def init(self, keys: Array, data: Batch) -> State:
        """The state before the first step, every seed from its own key."""

        def init_seed(key: Array) -> SVIState:
            init_key, batch_key = random.split(random.fold_in(key, INIT))
            batch = self.first_batch(batch_key, data)
            return self.svi.init(init_key, init_params=self.init_params, **batch)

        svi_state = jax.vmap(init_seed)(keys)
        params = svi_state.optim_state[1][0]
        num_seeds = self.settings.num_seeds
        state = State(
            step=jnp.zeros((), jnp.int32),
            epoch=jnp.zeros((), jnp.int32),
            offset=jnp.zeros((), jnp.int32),
            optimizer=svi_state.optim_state,
            mutable=svi_state.mutable_state,
            average=jax.tree.map(jnp.zeros_like, params) if self.settings.average else None,
            best=params if self.settings.patience else None,
            best_elbo=jnp.full(num_seeds, -jnp.inf),
            num_stale=jnp.zeros(num_seeds, jnp.int32),
            active=jnp.ones(num_seeds, bool),
        )
        return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), state)  # no weak types

    def advance(
        self, state: State, keys: Array, data: Batch, stop: Array
    ) -> tuple[State, Float[Array, "seed chunk"], Bool[Array, " seed"]]:
        """Steps ``state.step`` to ``stop - 1``, at most MAX_CHUNK of them; their ELBO; and
        whether the parameters are finite after them."""
        count = jnp.minimum(stop - state.step, MAX_CHUNK)

        def run(state: State, key: Array) -> tuple[State, Float[Array, " chunk"]]:
            word = random.bits(random.fold_in(key, ORDER))
            noise = random.fold_in(key, NOISE)

            def body(i: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
                state, elbo = carry
                index = self.batch_index(state.epoch, state.offset, word)
                batch = data if index is None else {k: v[index] for k, v in data.items()}
                if self.sharding is not None:
                    batch = lax.with_sharding_constraint(batch, self.sharding)
                key = random.fold_in(noise, state.step)
                if self.preprocess is not None:
                    key, batch_key = random.split(key)
                    # The barrier keeps XLA from preparing the batch anew for each of its uses.
                    batch = lax.optimization_barrier(self.preprocess(batch_key, batch))
                old = SVIState(state.optimizer, state.mutable, key)
                new, loss = self.svi_at(state.step).update(old, **batch)
                params, optimizer_state = new.optim_state[1]
                mutable, average = new.mutable_state, state.average
                if isinstance(optimizer_state, GuardState):
                    mutable = _where(optimizer_state.finite, mutable, state.mutable)
                    loss = jnp.where(optimizer_state.finite, loss, jnp.nan)
                if average is not None:
                    count = jnp.maximum(state.step - self.settings.first_averaged + 1, 1)
                    average = jax.tree.map(lambda a, p: a + (p - a) / count, average, params)
                seen = state.offset + self.batch_size
                wraps = seen >= self.num_data
                state = state._replace(
                    step=state.step + 1,
                    epoch=state.epoch + wraps,
                    offset=jnp.where(wraps, seen - self.num_data, seen),
                    optimizer=new.optim_state,
                    mutable=mutable,
                    average=average,
                )
                return state, elbo.at[i].set(-loss)

            return lax.fori_loop(0, count, body, (state, jnp.full(MAX_CHUNK, jnp.nan)))

        state, trace = self.over_seeds(run)(state, keys)
        finite = jax.vmap(
            lambda params: jnp.array([jnp.isfinite(p).all() for p in jax.tree.leaves(params)])
        )(state.params)
        return state, trace, finite.all(1)

    def over_seeds(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``vmap`` over the seed axis of a state and the keys. One seed needs none, and only
        without it does XLA update the parameters in place."""
        if self.settings.num_seeds > 1:
            return jax.vmap(run, in_axes=(SEED_AXES, 0), out_axes=(SEED_AXES, 0))

        def alone(state: State, keys: Array) -> tuple[State, Array]:
            state, trace = run(_by_seed(lambda x: x[0], state), keys[0])
            return _by_seed(lambda x: x[None], state), trace[None]

        return alone

    def svi_at(self, step: Array) -> SVI:
        """What updates the parameters at this step."""
        if not isinstance(self.objective, KLWarmUp):
            return self.svi
        svi = copy.copy(self.svi)
        svi.loss = KLWeighted(self.svi.loss, self.objective.weight(step))
        return svi

    def batch_index(self, epoch: Array, offset: Array, word: Array) -> Array | None:
        """Which data the next batch holds: the ``batch_size`` that follow in this epoch's order
        and, where the epoch ends within the batch, the first of the next epoch's."""
        if self.batch_size == self.num_data:
            return None
        position = offset + jnp.arange(self.batch_size)
        this = epoch_word(word, epoch)
        if self.num_data % self.batch_size == 0:
            return permute(position, self.num_data, this)

        def across() -> Array:
            following = permute(
                jnp.maximum(position - self.num_data, 0),
                self.num_data,
                epoch_word(word, epoch + 1),
            )
            return jnp.where(position < self.num_data, within(), following)

        def within() -> Array:
            return permute(jnp.minimum(position, self.num_data - 1), self.num_data, this)

        return lax.cond(offset + self.batch_size > self.num_data, across, within)

    def validate(
        self, state: State, keys: Array, data: Batch
    ) -> tuple[State, Float[Array, " seed"]]:
        """The held-out ELBO of the parameters that would be returned now, and with ``patience``
        the best ones kept and the seeds stopped that have run out of it."""
        objective = PerDatum(self.validation_objective, length(data), self.has_globals)
        size = min(self.batch_size, length(data))
        num_full = length(data) // size * size
        weighs = isinstance(self.validation_objective, RenyiELBO)
        if weighs and self.has_globals and size < length(data):
            raise ValueError(
                f"validation_objective: RenyiELBO weighs whole data sets where there are global "
                f"latent variables: expected at most {size} validation data, a batch, got "
                f"{length(data)}"
            )

        def elbo(params: PyTree, mutable: PyTree, key: Array) -> Array:
            params = self.svi.constrain_fn(params) | (mutable or {})
            key = random.fold_in(key, VALIDATION)

            def loss(key: Array, batch: Batch) -> Array:
                return jnp.asarray(objective.loss(key, params, self.model, self.guide, **batch))

            split = {k: v[:num_full].reshape(-1, size, *v.shape[1:]) for k, v in data.items()}
            keys = random.split(key, num_full // size + 1)
            total = size * lax.map(lambda x: loss(*x), (keys[:-1], split)).sum()
            if num_full < length(data):
                rest = {k: v[num_full:] for k, v in data.items()}
                total += length(rest) * loss(keys[-1], rest)
            return -total / length(data)

        params = self.current(state)
        elbos = jax.vmap(elbo)(params, state.mutable, keys)
        if self.settings.patience is None:
            return state, elbos
        better = (elbos > state.best_elbo) & state.active
        num_stale = jnp.where(better, 0, state.num_stale + 1)
        return state._replace(
            active=state.active & (num_stale < self.settings.patience),
            best=jax.vmap(_where)(better, params, state.best),
            best_elbo=jnp.where(better, elbos, state.best_elbo),
            num_stale=num_stale,
        ), elbos

    def current(self, state: State) -> PyTree:
        """Unconstrained: the average where averaging has begun, else the last iterate."""
        if state.average is None:
            return state.params
        return _where(state.step > self.settings.first_averaged, state.average, state.params)

    def finish(self, state: State) -> dict[str, Any]:
        """The parameters to return, constrained."""
        if state.best is not None:
            started = jnp.isfinite(state.best_elbo)
            params = jax.vmap(_where)(started, state.best, self.current(state))
        else:
            params = self.current(state)
        return jax.vmap(self.svi.constrain_fn)(params)


def _by_seed(change: Callable[[Array], Array], state: State) -> State:
    """``change`` on the arrays that have a seed axis."""
    fields = zip(state, SEED_AXES, strict=True)
    return State(*(x if axis is None else jax.tree.map(change, x) for x, axis in fields))


def _where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
