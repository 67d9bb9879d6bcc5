"""One run on its way: placed, compiled, started, looped over, read.

The loop runs on the device (``inference._steps``); here is the host's side. It looks in every two
seconds. When it looks changes no bit of the result: a step depends on its number and the state
before it alone.
"""

import functools
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.sharding import Mesh, NamedSharding

from inference._checkpoints import CheckpointError, Checkpoints, differences
from inference._describe import describe_device, describe_program, versions
from inference._feeds import (
    MAX_CHUNK,
    HeldOut,
    InMemory,
    Streamed,
    Whole,
    Window,
    feed,
    put,
    put_rows,
    sharding,
)
from inference._history import History, mean_of_finite
from inference._inputs import Inputs
from inference._processes import ctrl_c_for_all, is_first, of_all, of_first, text_of_first, to_host
from inference._progress import Progress
from inference._settings import Settings
from inference._steps import (
    State,
    advance,
    by_seed,
    find_fault,
    finish,
    first_rows,
    keep_best,
    on_axes,
    order_word,
    validate,
)
from inference._steps import (
    init as init_state,
)
from inference._streams import StreamError
from inference.fit import Fit, Interrupted, NonFiniteError

SECONDS_PER_CHUNK = 2.0


@dataclass
class Run:
    """One run on its way. ``state`` is replaced last, so a run can be read whenever it stops."""

    inputs: Inputs
    placed: "Placed"
    template: State  # abstract
    init: Callable[..., State]
    advance: Callable[..., Any]
    validate: dict[int, Callable[..., Any]]  # by the data in a batch
    keep_best: Callable[..., State] | None  # with patience
    identity: dict[str, Any]
    began: float
    compiling: float
    state: State = None  # type: ignore[assignment]
    history: History = None  # type: ignore[assignment]
    checkpoints: Checkpoints | None = None  # of process 0
    keeps_checkpoints: bool = False

    @property
    def settings(self) -> Settings:
        """The run's numbers."""
        return self.inputs.plan.settings


@dataclass(frozen=True)
class Placed:
    """What a run has on the devices.

    Attributes:
        keys: one a seed.
        first: the data that parameters are made on.
        data: what brings the training data.
        held_out: the held-out data, or None.
    """

    keys: Any
    first: Any
    data: InMemory | Streamed
    held_out: HeldOut | None


def place(inputs: Inputs) -> Placed:
    """Keys, data and held-out data on the devices."""
    plan, settings, mesh = inputs.plan, inputs.plan.settings, inputs.plan.mesh
    keys = jnp.stack([random.key(settings.seed + i) for i in range(settings.num_seeds)])
    words = np.asarray(jax.vmap(order_word)(keys))
    held_out = inputs.validation
    return Placed(
        keys=put(keys, sharding(mesh, "seed")),
        first=put_rows(inputs.data, first_rows(plan), sharding(mesh)),
        data=feed(inputs.data, settings, words, mesh),
        held_out=None if held_out is None else HeldOut(held_out, settings.batch_size, mesh),
    )


def _places(mesh: Mesh | None, state: State) -> Any:
    """How a state lies on the devices: its seeds along the mesh's axis "seed". None for one."""
    if mesh is None:
        return None
    everywhere = jax.tree.map(lambda _: sharding(mesh), state)
    return by_seed(lambda _: sharding(mesh, "seed"), everywhere)


def compile_steps(inputs: Inputs, placed: Placed, began: float) -> Run:
    """Compiles the loop and the held-out ELBO; XLA works on all at once."""
    compiling, plan, held_out = time.perf_counter(), inputs.plan, placed.held_out
    start = _given(init_state, plan)
    shapes = jax.eval_shape(start, placed.keys, placed.first, inputs.params)
    places = _places(plan.mesh, shapes)
    template = shapes if places is None else jax.tree.map(_at, shapes, places)
    given, steps = (
        (template, placed.keys),
        jax.jit(_given(advance, plan), out_shardings=(places, None, None)),
    )
    lowered: dict[Any, Any] = {"advance": steps.lower(*given, placed.data.abstract(), np.int32(0))}
    if held_out is not None:
        judge = jax.jit(_given(validate, plan, held_out.num_data, held_out.num_full + 1))
        for size, window in held_out.abstract().items():
            lowered[size] = judge.lower(*given, window, np.int32(0))
    if plan.settings.patience is not None:
        best = jax.jit(_given(keep_best, plan), out_shardings=places)
        elbos = np.zeros(plan.settings.num_seeds, np.float32)
        lowered["keep_best"] = best.lower(template, elbos)
    identity = {
        "versions": versions(),
        "device": describe_device(),
        "mesh": None if plan.mesh is None else [list(axis) for axis in plan.mesh.shape.items()],
        "processes": jax.process_count(),
        "program": describe_program(lowered["advance"].as_text()),
        "shapes": [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(template)],
    }
    check_same(inputs.config | {name: identity[name] for name in ("shapes", "program")})
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda program: program.compile(), lowered.values())
        programs = dict(zip(lowered, compiled, strict=True))
    return Run(
        inputs=inputs,
        placed=placed,
        template=template,
        init=jax.jit(start, out_shardings=places),
        advance=programs.pop("advance"),
        keep_best=programs.pop("keep_best", None),
        validate=programs,
        identity=identity,
        began=began,
        compiling=time.perf_counter() - compiling,
    )


def _given(function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """The function with its first arguments, under its own name."""
    given = functools.partial(function, *first)
    given.__name__ = function.__name__  # type: ignore[attr-defined]
    return given


def _at(shape: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def check_same(config: dict[str, Any]) -> None:
    """Raises ValueError in every process if one has other settings, data or programs."""
    differ = list(differences(text_of_first(config), config))
    others = np.flatnonzero(of_all(bool(differ)))
    if len(others):
        what = "; ".join(differ) or "their messages say what differs"
        raise ValueError(
            f"processes: expected the settings, data and programs of process 0 in all, got others "
            f"in process {', '.join(map(str, others))} (process 0 is 'there' and this one 'here': "
            f"{what}); give all the same command and the same files"
        )


def start(run: Run, init: Any, checkpoint: str | os.PathLike | None) -> None:
    """The first state, from a checkpoint, from the fit to go on with, or a new one."""
    settings, mesh = run.settings, run.inputs.plan.mesh
    found = None if checkpoint is None else _restore(run, checkpoint)
    if found is not None:
        state, history = found
    elif isinstance(init, Fit) and init.state is not None:
        state, history = _state_of(init, run), History.of(init).longer(settings)
    else:
        state = None
        history = History.empty(settings.num_seeds, 0, 0).longer(settings)
    if state is None:
        state = run.init(run.placed.keys, run.placed.first, run.inputs.params)
    else:
        places = _places(mesh, state)
        state = put(state, None) if places is None else jax.tree.map(put, state, places)
    run.history, run.state = history, state
    run.placed.data.begin(*(int(x) for x in to_host((state.step, state.epoch, state.offset))))


def _restore(run: Run, directory: str | os.PathLike) -> tuple[State, History] | None:
    """The state and the traces of the newest checkpoint, or None. Process 0 reads it for all."""
    found, problem, run.keeps_checkpoints = None, None, True
    if is_first():
        try:
            run.checkpoints = Checkpoints(directory, run.inputs.config | run.identity)
            found = run.checkpoints.find()
        except CheckpointError as error:
            problem = error
    if problem is not None and jax.process_count() == 1:
        raise problem
    words = text_of_first(None if problem is None else str(problem))
    if words is not None:
        raise CheckpointError(words)
    found = text_of_first(found)
    if found is None:
        return None
    before = History.empty(found["num_seeds"], found["num_steps"], found["validate_every"])
    blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.template)
    saved = (blank, before._asdict())
    if run.checkpoints is not None:
        saved = run.checkpoints.restore(saved)
    state, traces = of_first(saved)
    return state, History(**jax.tree.map(np.array, traces)).longer(run.settings)


def _state_of(init: Fit, run: Run) -> State:
    """The state of a fit to go on with, as this run has it."""
    keep = ("average", "best", "best_elbo", "num_stale")
    assert init.state is not None
    ours, theirs = (
        [jax.tree.leaves(getattr(state, name)) for name in State._fields if name not in keep]
        for state in (run.template, init.state)
    )
    shapes = [
        [[(x.shape, x.dtype) for x in leaves] for leaves in state] for state in (ours, theirs)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "init: expected a fit with the parameters and the optimiser's state of this run, got "
            "one of other shapes; give the same optimiser and programs, or start anew with "
            "init=result.params_of(0)"
        )
    own = to_host(run.init(run.placed.keys, run.placed.first, run.inputs.params))
    parts = {}
    for name in State._fields:
        leaves = jax.tree.leaves(getattr(init.state, name))
        structure = jax.tree.structure(getattr(own, name))
        same = len(leaves) == structure.num_leaves
        wanted = name not in keep or (same and name != "average")
        parts[name] = jax.tree.unflatten(structure, leaves) if wanted else getattr(own, name)
    state, settings = State(**parts), run.settings
    # A seed that has stopped goes on, unless this run's patience stops it too.
    patience = settings.patience or np.inf
    state = state._replace(active=np.asarray(state.num_stale) < patience)
    if (init.config["num_data"], init.config["batch_size"]) != (
        settings.num_data,
        settings.batch_size,
    ):  # places in an epoch of other data mean nothing here
        state = state._replace(epoch=state.epoch + 1, offset=jnp.zeros_like(state.offset))
    return state


def loop(run: Run, shown: Progress, checkpoint_every: float) -> None:
    """Advances, validates, saves and reports until the steps are done or all seeds have stopped."""
    settings, chunk, saved_at = run.settings, 8, time.perf_counter()
    step, active = int(run.state.step), to_host(run.state.active)
    try:
        with ctrl_c_for_all() as pressed:
            while step < settings.num_steps and active.any():
                looked, start = time.perf_counter(), step
                data, end = _data_at(run, start, pressed)
                step = min(start + chunk, end, settings.num_steps)
                if settings.validate_every:
                    step = min(
                        step, settings.validate_every * (start // settings.validate_every + 1)
                    )
                step = int(of_first(step))
                active, elbo = _chunk(run, data, start, step, active)
                run.history.seconds[...] += time.perf_counter() - looked
                rate = (step - start) / (time.perf_counter() - looked)
                chunk = int(np.clip(rate * SECONDS_PER_CHUNK, 1, min(4 * chunk, MAX_CHUNK)))
                shown.update(step, _fields(run, step, elbo))
                ended = step == settings.num_steps or not active.any()
                if of_first(ended or time.perf_counter() - saved_at > checkpoint_every):
                    _save(run)
                    saved_at = time.perf_counter()
    except KeyboardInterrupt as error:
        _save(run)
        raise Interrupted(_fit_of(run)) from error
    except StreamError as error:
        _save(run)
        error.fit = _fit_of(run)
        raise


def _save(run: Run) -> None:
    """Writes a checkpoint, if the run keeps some. Process 0 alone writes."""
    if not run.keeps_checkpoints:
        return
    state = to_host(run.state)
    if run.checkpoints is not None:
        run.checkpoints.save(int(state.step), (state, run.history._asdict()))


def _data_at(run: Run, step: int, pressed: list[Any]) -> tuple[Whole | Window, int]:
    """The data of a step. What stops one process here stops all.

    Raises:
        StreamError: a process could not read its data.
        KeyboardInterrupt: Ctrl-C was pressed in a process.
    """
    problem, found = None, None
    try:
        found = run.placed.data.at(step)
    except StreamError as error:
        problem = error
    stops = of_all(2 if problem is not None else bool(pressed))
    if problem is not None:
        raise problem
    if stops.max() == 2:
        raise StreamError(
            f"process {int(stops.argmax())}: expected its part of the data, but it could not read "
            f"them; its message says why; all processes stop with it"
        )
    if stops.any():
        raise KeyboardInterrupt
    assert found is not None
    return found


def _chunk(
    run: Run, data: Whole | Window, start: int, stop: int, active: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Takes steps ``start`` to ``stop - 1``; returns which seeds go on, and the ELBO."""
    settings, history = run.settings, run.history
    state, *found = run.advance(run.state, run.placed.keys, data, np.int32(stop))
    elbo, finite = to_host(found)
    elbo = np.where(active[:, None], elbo, np.nan)[:, : stop - start]
    history.elbo[:, start:stop] = elbo
    history.num_steps[active] = stop
    taken = np.isfinite(elbo).cumprod(1).sum(1)  # steps before the first that failed
    failed = active & ((taken < stop - start) | ~finite)
    if failed.any() and settings.on_nan == "stop":
        _stop_before(run, data, start, taken, np.where(failed, taken, np.inf), active)
    if settings.validate_every and stop % settings.validate_every == 0:
        held_out = _held_out(run, state)
        column = stop // settings.validate_every - 1
        history.validation_elbo[:, column] = np.where(active, held_out, np.nan)
        if run.keep_best is not None:
            state = run.keep_best(state, held_out)
            active = to_host(state.active)
    run.state = state
    return active, elbo


def _held_out(run: Run, state: State) -> np.ndarray:
    """The held-out ELBO of every seed, nats per datum."""
    data = run.placed.held_out
    assert data is not None
    total = np.zeros(run.settings.num_seeds)
    for batches, count, size in data.windows():
        losses = run.validate[size](state, run.placed.keys, batches, np.int32(count))
        total += size * to_host(losses).sum(1, dtype=np.float64)
    return (-total / data.num_data).astype(np.float32)


def _stop_before(
    run: Run, data: Whole | Window, start: int, taken: Any, failed_at: Any, active: Any
) -> None:
    """Raises with the state before the step that failed.

    The loop is deterministic: the chunk runs again, to just before that step. If the parameters
    are bad by then, it was the gradient of the step before.
    """
    i = int(failed_at.argmin())
    at, before = start + int(taken[i]), run.state
    for at in (start + int(taken[i]), start + int(taken[i]) - 1):
        run.state, _, finite = run.advance(before, run.placed.keys, data, np.int32(at))
        if to_host(finite)[i]:
            break
    run.history.elbo[:, at:] = np.nan
    run.history.num_steps[active] = at
    last_elbo = float(run.history.elbo[i, at - 1]) if at else np.nan
    fault = _fault(run, data, i)
    raise NonFiniteError(run.settings.seed + i, at + 1, last_elbo, fault, _fit_of(run))


def _fault(run: Run, data: Whole | Window, i: int) -> str:
    """The first parameter, site or gradient of a seed's next step that is not finite."""
    plan, names = replace(run.inputs.plan, mesh=None), []

    def look(state: State, key: Any, data: Any) -> Any:
        found = find_fault(plan, state, key, data)
        names.extend(name for name, _ in found)
        return [finite for _, finite in found]

    state, data = to_host((run.state, data))
    one = by_seed(lambda x: x[i], state)
    mine = on_axes(lambda x: x[i], data.seed_axes, data)
    flags = jax.jit(look)(one, random.key(run.settings.seed + i), mine)
    bad = [name for name, finite in zip(names, flags, strict=True) if not finite]
    return bad[0] if bad else "the loss itself, of other draws than a single particle's"


def _fields(run: Run, step: int, elbo: np.ndarray) -> dict[str, str]:
    """What the progress shows: the epoch, the chunk's mean ELBO, the latest held-out one."""
    settings, fields = run.settings, {}
    if settings.num_epochs:
        epoch = min(step * settings.batch_size // settings.num_data, settings.num_epochs)
        fields["epoch"] = f"{epoch}/{settings.num_epochs}"
    done = step // settings.validate_every if settings.validate_every else 0
    held_out = run.history.validation_elbo[:, :done][:, -1:]
    for name, values in (("ELBO", elbo), ("held-out ELBO", held_out)):
        mean = mean_of_finite(values)
        if np.isfinite(mean):
            fields[name] = f"{mean:.4f}"
    return fields


def _fit_of(run: Run) -> Fit:
    """The run as it stands."""
    plan, history, state = run.inputs.plan, run.history, to_host(run.state)
    step = int(state.step)
    every = plan.settings.validate_every
    num_validations = step // every if every else 0
    history.elbo[:, step:] = np.nan
    state = jax.tree.map(jnp.asarray, state)
    params, mutable = finish(plan, state)
    num_steps = np.minimum(history.num_steps, step)
    return Fit(
        model=plan.model,
        guide=plan.guide,
        preprocess=plan.preprocess,
        params=params,
        mutable=mutable,
        elbo=history.elbo,
        validation_elbo=history.validation_elbo[:, :num_validations] if every else None,
        state=state,
        config=run.inputs.config,
        info=run.inputs.info
        | {
            "device": describe_device(),
            "versions": versions(),
            "seconds": {
                "compile": run.compiling,
                "run": float(history.seconds),
                "total": time.perf_counter() - run.began,
            },
            "validation_steps": [every * (i + 1) for i in range(num_validations)],
            "num_steps": num_steps.tolist(),
            "num_skipped": (num_steps - np.isfinite(history.elbo).sum(1)).tolist(),
        },
        batch=run.inputs.batch,
        mesh=plan.mesh,
    )


def result(run: Run) -> Fit:
    """The finished run. Steps that were skipped are told, and a run of nothing else is refused."""
    fitted, settings = _fit_of(run), run.settings
    never = ~np.isfinite(fitted.elbo).any(1)
    if never.any():
        i = int(never.argmax())
        fault = _fault(run, run.placed.data.at(settings.num_steps - 1)[0], i)
        raise NonFiniteError(settings.seed + i, 1, np.nan, fault, fitted)
    if any(fitted.info["num_skipped"]):
        skipped = dict(zip(fitted.seeds, fitted.info["num_skipped"], strict=True))
        warnings.warn(
            f"skipped steps whose loss or gradient was not finite: by seed, {skipped} of "
            f"{settings.num_steps}",
            RuntimeWarning,
            stacklevel=3,
        )
    return fitted
