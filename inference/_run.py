"""One run on its way: placed, compiled, started, looped over, read.

The loop runs on the device (``inference._steps``); here is the host's side. It looks in every two
seconds. When it looks changes no bit of the result: a step depends on its number and the state
before it alone.
"""

import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.sharding import NamedSharding, PartitionSpec

from inference._checkpoints import Checkpoints
from inference._describe import describe_device, describe_program, versions
from inference._history import History, mean_of_finite
from inference._inputs import Inputs
from inference._progress import Progress
from inference._settings import Settings
from inference._steps import (
    MAX_CHUNK,
    State,
    advance,
    by_seed,
    find_fault,
    finish,
    validate,
)
from inference._steps import (
    init as init_state,
)
from inference.fit import Fit, Interrupted, NonFiniteError

SECONDS_PER_CHUNK = 2.0


@dataclass
class Run:
    """One run on its way. ``state`` is replaced last, so a run can be read whenever it stops."""

    inputs: Inputs
    keys: Any
    data: Any
    validation: Any
    template: State  # abstract
    init: Callable[..., State]
    advance: Callable[..., Any]
    validate: Callable[..., Any] | None
    identity: dict[str, Any]
    began: float
    compiling: float
    state: State = None  # type: ignore[assignment]
    history: History = None  # type: ignore[assignment]
    checkpoints: Checkpoints | None = None

    @property
    def settings(self) -> Settings:
        """The run's numbers."""
        return self.inputs.plan.settings


def place(inputs: Inputs) -> tuple[Any, Any, Any]:
    """Keys, data and held-out data on the devices."""
    settings = inputs.plan.settings
    keys = jnp.stack([random.key(settings.seed + i) for i in range(settings.num_seeds)])
    return jax.device_put((keys, inputs.data, inputs.validation), _replicated(inputs))


def _replicated(inputs: Inputs) -> NamedSharding | None:
    mesh = inputs.plan.mesh
    return mesh and NamedSharding(mesh, PartitionSpec())


def compile_steps(inputs: Inputs, placed: tuple[Any, Any, Any], began: float) -> Run:
    """Compiles the loop and the held-out ELBO; XLA works on both at once."""
    compiling, plan = time.perf_counter(), inputs.plan
    keys, data, validation = placed
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_replicated(inputs)),
        jax.eval_shape(lambda *args: init_state(plan, *args), keys, data, inputs.params),
    )

    def steps(state: State, keys: Any, data: Any, stop: Any) -> Any:
        return advance(plan, state, keys, data, stop)

    def held_out(state: State, keys: Any, data: Any) -> Any:
        return validate(plan, state, keys, data)

    lowered = jax.jit(steps).lower(template, keys, data, np.int32(0))
    with ThreadPoolExecutor() as pool:
        compiled = pool.submit(lowered.compile)
        judged = None
        if validation is not None:
            judged = jax.jit(held_out).lower(template, keys, validation).compile()
        identity = {
            "versions": versions(),
            "device": describe_device(),
            "mesh": None if plan.mesh is None else list(plan.mesh.shape.items()),
            "program": describe_program(lowered.as_text()),
            "shapes": [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(template)],
        }
        return Run(
            inputs=inputs,
            keys=keys,
            data=data,
            validation=validation,
            template=template,
            init=jax.jit(lambda *args: init_state(plan, *args)),
            advance=compiled.result(),
            validate=judged,
            identity=identity,
            began=began,
            compiling=time.perf_counter() - compiling,
        )


def start(run: Run, init: Any, checkpoint: str | os.PathLike | None) -> None:
    """The first state, from a checkpoint, from the fit to go on with, or a new one."""
    settings, found = run.settings, None
    if checkpoint is not None:
        run.checkpoints = Checkpoints(checkpoint, run.inputs.config | run.identity)
        found = run.checkpoints.find()
    if found is not None:
        assert run.checkpoints is not None
        before = History.empty(found["num_seeds"], found["num_steps"], found["validate_every"])
        state, saved = run.checkpoints.restore((run.template, before._asdict()))
        history = History(**jax.tree.map(np.array, saved)).longer(settings)
    elif isinstance(init, Fit) and init.state is not None:
        state = _state_of(init, run)
        history = History.of(init).longer(settings)
    else:
        state = run.init(run.keys, run.data, run.inputs.params)
        history = History.empty(settings.num_seeds, 0, 0).longer(settings)
    run.history, run.state = history, jax.device_put(state, _replicated(run.inputs))


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
    own = run.init(run.keys, run.data, run.inputs.params)
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
    state = state._replace(active=jnp.asarray(state.num_stale) < patience)
    if (init.config["num_data"], init.config["batch_size"]) != (
        settings.num_data,
        settings.batch_size,
    ):  # places in an epoch of other data mean nothing here
        state = state._replace(epoch=state.epoch + 1, offset=jnp.zeros_like(state.offset))
    return state


def loop(run: Run, shown: Progress, checkpoint_every: float) -> None:
    """Advances, validates, saves and reports until the steps are done or all seeds have stopped."""
    settings, chunk, saved_at = run.settings, 8, time.perf_counter()
    step, active = int(run.state.step), np.array(run.state.active)
    try:
        while step < settings.num_steps and active.any():
            looked, start = time.perf_counter(), step
            step = min(start + chunk, settings.num_steps)
            if run.validate is not None:
                every = settings.validate_every
                step = min(step, every * (start // every + 1))
            active, elbo = _chunk(run, start, step, active)
            run.history.seconds[...] += time.perf_counter() - looked
            rate = (step - start) / (time.perf_counter() - looked)
            chunk = int(np.clip(rate * SECONDS_PER_CHUNK, 1, min(4 * chunk, MAX_CHUNK)))
            shown.update(step, _fields(run, step, elbo))
            ended = step == settings.num_steps or not active.any()
            if run.checkpoints and (ended or time.perf_counter() - saved_at > checkpoint_every):
                run.checkpoints.save(step, (run.state, run.history._asdict()))
                saved_at = time.perf_counter()
    except KeyboardInterrupt as error:
        if run.checkpoints:
            run.checkpoints.save(int(run.state.step), (run.state, run.history._asdict()))
        raise Interrupted(_fit_of(run)) from error


def _chunk(run: Run, start: int, stop: int, active: Any) -> tuple[np.ndarray, np.ndarray]:
    """Takes steps ``start`` to ``stop - 1``; returns which seeds go on, and the ELBO."""
    settings, history = run.settings, run.history
    state, elbo, finite = run.advance(run.state, run.keys, run.data, np.int32(stop))
    elbo = np.where(active[:, None], elbo, np.nan)[:, : stop - start]
    history.elbo[:, start:stop] = elbo
    history.num_steps[active] = stop
    taken = np.isfinite(elbo).cumprod(1).sum(1)  # steps before the first that failed
    failed = active & ((taken < stop - start) | ~np.array(finite))
    if failed.any() and settings.on_nan == "stop":
        _stop_before(run, start, taken, np.where(failed, taken, np.inf), active)
    if run.validate is not None and stop % settings.validate_every == 0:
        state, held_out = run.validate(state, run.keys, run.validation)
        column = stop // settings.validate_every - 1
        history.validation_elbo[:, column] = np.where(active, held_out, np.nan)
        active = np.array(state.active)
    run.state = state
    return active, elbo


def _stop_before(run: Run, start: int, taken: Any, failed_at: Any, active: Any) -> None:
    """Raises with the state before the step that failed.

    The loop is deterministic: the chunk runs again, to just before that step. If the parameters
    are bad by then, it was the gradient of the step before.
    """
    i = int(failed_at.argmin())
    at, before = start + int(taken[i]), run.state
    for at in (start + int(taken[i]), start + int(taken[i]) - 1):
        run.state, _, finite = run.advance(before, run.keys, run.data, np.int32(at))
        if finite[i]:
            break
    run.history.elbo[:, at:] = np.nan
    run.history.num_steps[active] = at
    last_elbo = float(run.history.elbo[i, at - 1]) if at else np.nan
    raise NonFiniteError(run.settings.seed + i, at + 1, last_elbo, _fault(run, i), _fit_of(run))


def _fault(run: Run, i: int) -> str:
    """The first parameter, site or gradient of a seed's next step that is not finite."""
    plan, names = run.inputs.plan, []

    def look(state: State, key: Any, data: Any) -> Any:
        found = find_fault(plan, state, key, data)
        names.extend(name for name, _ in found)
        return [finite for _, finite in found]

    one = by_seed(lambda x: x[i], run.state)
    flags = jax.jit(look)(one, run.keys[i], run.data)
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
    plan, history, step = run.inputs.plan, run.history, int(run.state.step)
    every = plan.settings.validate_every
    num_validations = step // every if every else 0
    history.elbo[:, step:] = np.nan
    params, mutable = finish(plan, run.state)
    num_steps = np.minimum(history.num_steps, step)
    return Fit(
        model=plan.model,
        guide=plan.guide,
        preprocess=plan.preprocess,
        params=params,
        mutable=mutable,
        elbo=history.elbo,
        validation_elbo=history.validation_elbo[:, :num_validations] if every else None,
        state=run.state,
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
    )


def result(run: Run) -> Fit:
    """The finished run. Steps that were skipped are told, and a run of nothing else is refused."""
    fitted, settings = _fit_of(run), run.settings
    never = ~np.isfinite(fitted.elbo).any(1)
    if never.any():
        i = int(never.argmax())
        raise NonFiniteError(settings.seed + i, 1, np.nan, _fault(run, i), fitted)
    if any(fitted.info["num_skipped"]):
        skipped = dict(zip(fitted.seeds, fitted.info["num_skipped"], strict=True))
        warnings.warn(
            f"skipped steps whose loss or gradient was not finite: by seed, {skipped} of "
            f"{settings.num_steps}",
            RuntimeWarning,
            stacklevel=3,
        )
    return fitted
