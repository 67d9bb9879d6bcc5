"""The one engine: ``fit`` trains any NumPyro model and guide by stochastic variational inference.

One compiled loop runs many steps: shuffle, gather, preprocess, update, all on the device
(``inference.loop``). The host looks in every two seconds, to move the progress bar, to
see whether a loss was not finite, and to write a checkpoint. When it looks changes no bit of the
result, because a step depends on its number and the state before it alone: every key is folded
from (seed, step), and an epoch's order is a function of (seed, epoch).
"""

import os
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from numpyro.infer import Trace_ELBO
from numpyro.infer.elbo import ELBO
from tqdm import tqdm

from inference.checkpoints import Checkpoints
from inference.checks import check_data, check_values
from inference.describe import (
    describe_arrays,
    describe_device,
    describe_optimizer,
    describe_program,
    describe_value,
    versions,
)
from inference.loop import MAX_CHUNK, Loop, Preprocess, Program, State
from inference.objectives import KLWarmUp
from inference.settings import Settings

SECONDS_PER_CHUNK = 2.0


@dataclass(frozen=True)
class Fit:
    """What a run learnt. Everything afterwards is a function of it.

    Attributes:
        params: the fitted value of every ``numpyro.param`` site, each array (each leaf of a
            network's tree) with a leading seed axis.
        elbo: (seed, step), the training ELBO of each step's batch, nats per datum. NaN where a
            step was skipped and after a seed has stopped.
        validation_elbo: (seed, evaluation), nats per datum, or None without validation data: the
            ELBO, or what ``validation_objective`` makes of it; ``info["validation_steps"]`` says
            after which steps.
        state: the engine's last state.
        config: the settings, JSON-able.
        info: what happened, JSON-able: device, versions, seconds (compile and total, of this call;
            run, of the training as a whole), validation_steps, and per seed num_steps and
            num_skipped.
    """

    params: dict[str, Any]
    elbo: Float[np.ndarray, "seed step"]
    validation_elbo: Float[np.ndarray, "seed evaluation"] | None
    state: State
    config: dict[str, Any]
    info: dict[str, Any]


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was not finite, and the run stopped.

    Attributes:
        seed: the seed it happened to.
        step: the step, counted from 1.
        last_elbo: that seed's last finite ELBO, nats per datum (NaN if there was none).
        fit: the run until then; the seed's parameters are those before the step.
    """

    def __init__(self, seed: int, step: int, last_elbo: float, fit: Fit):
        self.seed, self.step, self.last_elbo, self.fit = seed, step, last_elbo, fit
        super().__init__(
            f"seed {seed}, step {step}: expected a finite loss and gradient, got one that is not "
            f"(last finite ELBO: {last_elbo:.6g} nats per datum); lower the learning rate, clip "
            f'the gradient or pass on_nan="skip"; the parameters before that step are in .fit'
        )


class _History(NamedTuple):
    """What is recorded, on the host; NaN where nothing has been."""

    num_steps: Int[np.ndarray, " seed"]
    elbo: Float[np.ndarray, "seed step"]
    validation_elbo: Float[np.ndarray, "seed evaluation"]
    seconds: Float[np.ndarray, ""]  # of training, before a resume too


def fit(
    model: Program,
    guide: Program,
    data: Mapping[str, Any],
    *,
    objective: ELBO | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_epochs: int | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    preprocess: Preprocess | None = None,
    num_seeds: int = 1,
    seed: int = 0,
    init_params: Mapping[str, Any] | None = None,
    average: float = 0.0,
    validation: Mapping[str, Any] | None = None,
    validation_objective: ELBO | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    on_nan: str = "stop",
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: float = 10.0,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Fit:
    """Fits a guide, and the parameters of a model, to data.

    Args:
        model: a NumPyro program that takes the arrays of ``data`` by name and keeps the batch
            axis in ``numpyro.plate("data", ...)``.
        guide: likewise, with the model's latent sites.
        data: arrays whose leading axis is the datum. They stay on the device in their own type.
        objective: a NumPyro ELBO object, ``Trace_ELBO()`` unless given. What is minimised is its
            loss per datum (``inference.objectives``).
        optimizer: an Optax transformation, ``optax.adam(1e-3)`` unless given.
        num_epochs: how long; or else ``num_steps``. Epochs follow one another without a seam:
            where the batch does not divide the data, the batch in which an epoch ends is filled
            up from the next one, so that every batch is full and every datum is visited equally
            often. As many steps are taken as cover the epochs.
        num_steps: how long, in steps.
        batch_size: data per step; all of them unless given.
        preprocess: (key, batch) -> batch, on the device at every step.
        num_seeds: independent restarts, trained together; the i-th is the run whose ``seed`` is
            ``seed + i``.
        seed: the first restart's seed.
        init_params: values of (constrained) parameters to start from in place of the programs'.
        average: the fraction of the run, at its end, over which the unconstrained parameters are
            averaged (Polyak & Juditsky 1992); 0 returns the last ones.
        validation: held-out data as the programs take them (``preprocess`` is not applied).
        validation_objective: what is evaluated on them, ``objective`` unless given; for example
            ``RenyiELBO(alpha=0, num_particles=10)``, the importance-weighted bound of ten draws.
        validate_every: steps from one held-out ELBO to the next; an epoch unless given.
        patience: a seed stops after so many held-out ELBOs without a new best, and the
            parameters of the best are returned. None trains to the end and returns the last.
        on_nan: "stop" raises ``NonFiniteError``; "skip" leaves the step out and counts it.
        checkpoint: a directory. The run is saved there at intervals and at its end; the same
            call finds it there and goes on, to the same bits.
        checkpoint_every: seconds from one checkpoint to the next.
        mesh: devices over whose axis "data" every batch is split; parameters are replicated.
        progress: a progress bar, where there is a terminal.

    Raises:
        ValueError, TypeError: settings, data or programs that do not fit, by name.
        NonFiniteError: a loss or gradient was not finite, and ``on_nan`` is "stop".
        CheckpointError: the directory holds something else, or another run.
    """
    began = time.perf_counter()
    if objective is None:
        objective = Trace_ELBO()
    if optimizer is None:
        optimizer = optax.adam(1e-3)
    settings = Settings.resolve(
        num_data=check_data(data, batch_size),
        batch_size=batch_size,
        num_epochs=num_epochs,
        num_steps=num_steps,
        num_seeds=num_seeds,
        seed=seed,
        average=average,
        validate_every=validate_every,
        has_validation=validation is not None,
        patience=patience,
        on_nan=on_nan,
    )
    _check_objects(objective, validation_objective, optimizer, mesh, settings)
    check_values((model, guide), data)
    if validation is not None:
        check_data(validation, None, name="validation")
    config = asdict(settings) | {
        "model": describe_value(model),
        "guide": describe_value(guide),
        "objective": describe_value(objective),
        "validation_objective": describe_value(validation_objective),
        "optimizer": describe_optimizer(optimizer),
        "preprocess": describe_value(preprocess),
        "data": describe_arrays(data, contents=checkpoint is not None),
        "validation": describe_arrays(validation, contents=checkpoint is not None),
    }

    if mesh is not None:  # explicit axes would ask the programs to name shardings
        auto = (AxisType.Auto,) * len(mesh.axis_names)
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
    replicated = mesh and NamedSharding(mesh, PartitionSpec())
    keys = jnp.stack([random.key(seed + i) for i in range(num_seeds)])
    keys, data, validation = jax.device_put((keys, dict(data), validation), replicated)
    loop = Loop(
        model,
        guide,
        objective,
        validation_objective,
        optimizer,
        preprocess,
        init_params,
        settings,
        mesh,
        keys[0],
        data,
    )
    if validation is not None:
        if validation.keys() != loop.batch.keys():
            raise ValueError(
                f"validation: expected arrays {sorted(loop.batch)}, got {sorted(validation)}; give "
                f"what the programs take, since preprocess is not applied"
            )
        check_values((model, guide), validation)

    compiling = time.perf_counter()
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(loop.init, keys, data),
    )
    lowered = jax.jit(loop.advance).lower(state, keys, data, np.int32(0))
    with ThreadPoolExecutor() as pool:  # XLA compiles the loop while the state is prepared
        advance = pool.submit(lowered.compile)
        validate = None
        if validation is not None:
            validate = jax.jit(loop.validate).lower(state, keys, validation).compile()
        history = _History(
            np.zeros(num_seeds, np.int32),
            np.full((num_seeds, settings.num_steps), np.nan, np.float32),
            np.full((num_seeds, max(1, settings.num_validations)), np.nan, np.float32),
            np.zeros((), np.float32),
        )
        checkpoints, saved = None, None
        if checkpoint is not None:
            identity = {"versions": versions(), "device": describe_device()}
            identity |= {"program": describe_program(lowered.as_text())}
            checkpoints = Checkpoints(checkpoint, config | identity)
            saved = checkpoints.restore((state, history._asdict()))
        if saved is None:
            state = jax.jit(loop.init)(keys, data)
        else:
            state, history = saved[0], _History(**jax.tree.map(np.array, saved[1]))
    state = jax.device_put(state, replicated)
    advance = advance.result()
    compiled = time.perf_counter()

    def result() -> Fit:
        every = settings.validate_every
        num_validations = int(state.step) // every if every else 0
        return Fit(
            params=loop.finish(state),
            elbo=history.elbo,
            validation_elbo=history.validation_elbo[:, :num_validations] if every else None,
            state=state,
            config=config,
            info={
                "device": describe_device(),
                "versions": versions(),
                "seconds": {
                    "compile": compiled - compiling,
                    "run": float(history.seconds),
                    "total": time.perf_counter() - began,
                },
                "validation_steps": [every * (i + 1) for i in range(num_validations)],
                "num_steps": history.num_steps.tolist(),
                "num_skipped": (history.num_steps - np.isfinite(history.elbo).sum(1)).tolist(),
            },
        )

    step, chunk, saved_at = int(state.step), 8, time.perf_counter()
    active = np.array(state.active)
    bar = tqdm(
        total=settings.num_steps,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        disable=None if progress else True,  # None: where there is no terminal
    )
    with bar:
        while step < settings.num_steps and active.any():
            looked, start = time.perf_counter(), step
            step = min(start + chunk, settings.num_steps)
            if validate is not None:
                step = min(step, settings.validate_every * (start // settings.validate_every + 1))
            before = state
            state, elbo, finite = advance(before, keys, data, np.int32(step))
            elbo = np.where(active[:, None], elbo, np.nan)[:, : step - start]
            history.elbo[:, start:step] = elbo
            history.num_steps[active] = step
            rate = (step - start) / (time.perf_counter() - looked)
            chunk = int(np.clip(rate * SECONDS_PER_CHUNK, 1, min(4 * chunk, MAX_CHUNK)))

            taken = np.isfinite(elbo).cumprod(1).sum(1)  # steps before the first that failed
            failed = active & ((taken < step - start) | ~np.array(finite))
            if failed.any() and on_nan == "stop":
                # The loop is deterministic: run the chunk again, to just before that step. Where
                # the parameters are bad by then, it was the gradient of the step before.
                i = int(np.where(failed, taken, np.inf).argmin())
                for at in (start + taken[i], start + taken[i] - 1):
                    state, _, finite = advance(before, keys, data, np.int32(at))
                    if finite[i]:
                        break
                history.elbo[:, at:] = np.nan
                history.num_steps[active] = at
                last_elbo = float(history.elbo[i, at - 1]) if at else np.nan
                raise NonFiniteError(seed + i, int(at) + 1, last_elbo, result())
            if validate is not None and step % settings.validate_every == 0:
                state, held_out = validate(state, keys, validation)
                column = step // settings.validate_every - 1
                history.validation_elbo[:, column] = np.where(active, held_out, np.nan)
                active = np.array(state.active)
            history.seconds[...] += time.perf_counter() - looked
            _report(bar, step, elbo, history, settings)
            due = time.perf_counter() - saved_at > checkpoint_every
            if checkpoints and (due or step == settings.num_steps or not active.any()):
                checkpoints.save(step, (state, history._asdict()))
                saved_at = time.perf_counter()

    fitted = result()
    never = ~np.isfinite(history.elbo).any(1)
    if never.any():
        raise NonFiniteError(seed + int(never.argmax()), 1, np.nan, fitted)
    if any(fitted.info["num_skipped"]):
        skipped = {seed + i: n for i, n in enumerate(fitted.info["num_skipped"])}
        warnings.warn(
            f"skipped steps whose loss or gradient was not finite: by seed, {skipped} of "
            f"{settings.num_steps}",
            RuntimeWarning,
            stacklevel=2,
        )
    return fitted


def _report(bar: tqdm, step: int, elbo: np.ndarray, history: _History, settings: Settings) -> None:
    """Moves the progress bar: the epoch, the chunk's mean ELBO, the latest held-out one."""
    if bar.disable:
        return
    fields = {}
    if settings.num_epochs:
        epoch = min(step * settings.batch_size // settings.num_data, settings.num_epochs)
        fields["epoch"] = f"{epoch}/{settings.num_epochs}"
    held_out = history.validation_elbo[:, : step // (settings.validate_every or step + 1)][:, -1:]
    for name, values in (("elbo", elbo), ("held_out", held_out)):
        finite = values[np.isfinite(values)]
        if finite.size:
            fields[name] = f"{finite.mean():.4f}"
    bar.set_postfix(fields, refresh=False)
    bar.update(step - bar.n)


def _check_objects(
    objective: Any,
    validation_objective: Any,
    optimizer: Any,
    mesh: Mesh | None,
    settings: Settings,
) -> None:
    batch_size = settings.batch_size
    if not isinstance(objective, ELBO):
        raise ValueError(f"objective: expected a NumPyro ELBO object, got {objective!r}")
    if validation_objective is not None:
        if not isinstance(validation_objective, ELBO):
            raise ValueError(
                f"validation_objective: expected a NumPyro ELBO object or None, got "
                f"{validation_objective!r}"
            )
        if not settings.validate_every:
            raise ValueError(
                f"validation_objective: expected validation data with it, got "
                f"{type(validation_objective).__name__} alone"
            )
    if isinstance(objective, KLWarmUp) and objective.num_steps > settings.num_steps:
        raise ValueError(
            f"objective: expected a KL warm-up within the training's {settings.num_steps} steps, "
            f"got one of {objective.num_steps}; the ELBO itself would never be trained"
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"optimizer: expected an Optax gradient transformation, got {optimizer!r}")
    if mesh is None:
        return
    if "data" not in mesh.axis_names:
        raise ValueError(f'mesh: expected an axis named "data", got {mesh.axis_names}')
    if batch_size % mesh.shape["data"]:
        raise ValueError(
            f"batch_size: expected a multiple of the {mesh.shape['data']} devices of the mesh's "
            f'axis "data", got {batch_size}'
        )
