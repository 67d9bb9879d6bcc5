"""Everything that ``fit`` is given, checked once, in one room.

``check`` returns what a run needs: arrays, a plan, and a description of both.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from jax.sharding import AxisType, Mesh
from numpyro.infer import Trace_ELBO
from numpyro.infer.elbo import ELBO

from inference._checks import (
    SUPPORT_ROWS,
    ProgramError,
    Programs,
    check_mean_field,
    check_supports,
    look,
    prime,
    support_check,
)
from inference._data import Arrays, as_arrays, check_arrays, converted, is_prepared
from inference._describe import describe_arrays, describe_optimizer, describe_value
from inference._missing import masked_arrays, masking
from inference._settings import (
    Settings,
    check_length,
    check_mesh,
    check_optimizer,
    require_whole,
)
from inference._steps import Plan, constrain_of
from inference._streams import chunks, full_batches, piece_of, take
from inference.fit import Fit, look_of, prepare
from inference.objectives import check_objective, traits
from inference.sites import Program, abstract, length

SPLIT_SEED = 0  # which data ``validation=0.1`` holds out: the same for every seed


@dataclass(frozen=True)
class Inputs:
    """What a run needs.

    Attributes:
        plan: what it does at every step.
        data: the training data.
        validation: held-out data as the programs take them, or None.
        params: values to start from, by name, with a seed axis.
        config: the settings and descriptions, JSON-able.
        info: notes on the data, such as converted types, JSON-able.
        batch: the abstract values of a prepared batch.
    """

    plan: Plan
    data: Arrays
    validation: Arrays | None
    params: dict[str, Any]
    config: dict[str, Any]
    info: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]


def check(
    model: Program,
    guide: Program,
    data: Any,
    *,
    objective: ELBO | None,
    validation_objective: ELBO | None,
    optimizer: optax.GradientTransformation | None,
    preprocess: Any,
    validation: Any,
    init: Fit | Mapping[str, Any] | None,
    mesh: Mesh | None,
    num_seeds: int | None,
    seed: int | None,
    missing: str | None = None,
    **lengths: Any,
) -> Inputs:
    """Checks what ``fit`` is given and fills in the defaults.

    Raises:
        ValueError, TypeError: settings, data or programs that do not fit, in one line.
    """
    trained, optimizer = _objects(objective, validation_objective, optimizer, validation)
    prepared = masking(model, preprocess, missing)
    arrays, validation, info = _arrays(model, preprocess, missing, data, validation)
    settings = Settings.resolve(
        num_data=length(arrays),
        has_validation=validation is not None,
        missing=missing,
        **_start(init, num_seeds, seed, length(arrays), lengths["batch_size"]),
        **lengths,
    )
    check_length(traits(trained), settings)
    info["traces_elbo"] = traits(trained).weighable_divergence
    check_mesh(mesh, settings)
    key = random.key(settings.seed)
    batch = _first_batch(prepared, settings, key, arrays)
    programs = look(
        model,
        guide,
        batch,
        key=key,
        whole=settings.is_whole,
        num_data=settings.num_data,
        can_infer_discrete=trained.can_infer_discrete,
    )
    if not programs.params:
        raise ProgramError(
            "programs: expected a numpyro.param to train, got none; Fit.from_params(model, guide, "
            "{}, example=data) takes programs without parameters to the judges"
        )
    _check_objectives(model, guide, batch, key, trained, validation_objective, programs, settings)
    first = piece_of(arrays, 0, settings.batch_size)
    prime(guide, key, lambda: first if prepared is None else prepared(key, first))
    plan = Plan(
        model=model,
        guide=guide,
        programs=programs,
        objective=trained,
        validation_objective=validation_objective or trained,
        optimizer=optimizer,
        preprocess=preprocess,
        settings=settings,
        mesh=mesh and _automatic(mesh),
        constrain=constrain_of(model, guide, trained, key, batch),
    )
    _check_values(plan, key, arrays, validation)
    if validation is not None:
        _check_validation(plan, arrays, validation, batch)
    params = _initial(init, programs, settings)
    source = data.source if is_prepared(data) and "validation_indices" not in info else None
    config = _describe(plan, validation_objective, arrays, validation, source)
    config["init"] = _digest(init)
    return Inputs(plan, arrays, validation, params, config, info, batch)


def _objects(
    objective: Any, validation_objective: Any, optimizer: Any, validation: Any
) -> tuple[ELBO, optax.GradientTransformation]:
    """The objective and the optimiser, checked, or the defaults."""
    objective = Trace_ELBO() if objective is None else objective
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    check_objective(objective)
    check_optimizer(optimizer)
    if validation_objective is not None:
        check_objective(validation_objective, "validation_objective")
        if validation is None:
            raise ValueError(
                f"validation_objective: expected held-out data with it, got "
                f"{type(validation_objective).__name__} alone; give validation="
            )
    return objective, optimizer


def _automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes. Explicit ones would ask the programs to name shardings."""
    auto = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=auto)


def _describe(
    plan: Plan,
    validation_objective: Any,
    arrays: Arrays,
    validation: Arrays | None,
    source: dict[str, str] | None,
) -> dict[str, Any]:
    """The settings, programs and data in words that a JSON file holds."""
    return asdict(plan.settings) | {
        "model": describe_value(plan.model),
        "guide": describe_value(plan.guide),
        "objective": describe_value(plan.objective),
        "validation_objective": describe_value(validation_objective),
        "optimizer": describe_optimizer(plan.optimizer),
        "preprocess": describe_value(plan.preprocess),
        "data": source or describe_arrays(arrays, contents=True),
        "validation": None if validation is None else describe_arrays(validation, contents=True),
    }


# --- data -----------------------------------------------------------------------------------------


def _arrays(
    model: Program, preprocess: Any, missing: str | None, data: Any, validation: Any
) -> tuple[Arrays, Arrays | None, dict[str, Any]]:
    """The training data, the held-out data as the programs take them, and notes on both."""
    arrays = as_arrays(data)
    look = None if is_prepared(data) else look_of(model)
    num_data = check_arrays(arrays, may_miss=masked_arrays(model, missing), look=look)
    if is_prepared(data) and preprocess is not None:
        raise ValueError(
            "data: expected data as preprocess takes them, got Prepared ones; leave preprocess "
            "out, or give the data as they were"
        )
    info: dict[str, Any] = {"converted": converted(arrays)}
    if isinstance(validation, float):
        held_out, kept = _split(validation, num_data)
        validation, arrays = take(arrays, held_out), take(arrays, kept)
        info["validation_indices"] = held_out.tolist()
    if validation is None:
        return arrays, None, info
    if not is_prepared(validation):
        validation = prepare(model, preprocess, validation, "validation", missing=missing)
    validation = as_arrays(validation, "validation")
    check_arrays(validation, "validation")
    return arrays, validation, info


def _split(fraction: float, num_data: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the data to hold out and of those to train on, each in order."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"validation: expected held-out data or a fraction above 0 and below 1, got {fraction}"
        )
    count = round(fraction * num_data)
    if not 0 < count < num_data:
        raise ValueError(
            f"validation: expected a fraction that leaves data on both sides, got {fraction} of "
            f"{num_data}; give a larger one, or held-out data"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(num_data)
    return np.sort(order[:count]), np.sort(order[count:])


def _first_batch(prepared: Any, settings: Settings, key: Any, arrays: Arrays) -> dict[str, Any]:
    """The abstract values of a prepared batch."""
    batch = abstract(arrays, settings.batch_size)
    return batch if prepared is None else dict(jax.eval_shape(prepared, key, batch))


def _check_values(plan: Plan, key: Any, arrays: Arrays, validation: Arrays | None) -> None:
    """Compares every observed value with the support of its site, once."""
    settings, programs = plan.settings, plan.programs
    if not programs.bounded:
        return
    check = support_check(plan.model, plan.guide, programs.params | programs.mutable)
    size = settings.num_data if settings.is_whole else min(SUPPORT_ROWS, settings.num_data)

    prepared = jax.jit(plan.prepare) if plan.prepare else lambda key, batch: batch
    training = ((key, prepared(key, batch)) for batch in full_batches(arrays, size))
    check_supports(check, training, plan.model)
    if validation is not None and not programs.tied_to:
        check_supports(check, ((key, piece) for _, piece in chunks(validation)), plan.model)


# --- programs, objectives -------------------------------------------------------------------------


def _check_objectives(
    model: Program,
    guide: Program,
    batch: Mapping[str, Any],
    key: Any,
    objective: ELBO,
    validation_objective: ELBO | None,
    programs: Programs,
    settings: Settings,
) -> None:
    """The objectives can be taken of these programs and batches."""
    name = type(objective).__name__
    if traits(objective).weighs_jointly and programs.has_globals and not settings.is_whole:
        raise ValueError(
            f"objective: {name} weighs whole data sets where there are global latent variables: "
            f"expected batch_size {settings.num_data}, got {settings.batch_size}"
        )
    if programs.scanned:
        raise ValueError(
            f"model site {programs.scanned[0]!r}: expected a summed site outside scan, got one "
            f"inside, where NumPyro's TraceEnum_ELBO gives a wrong sum; sum over the states in the "
            f"model (the forward algorithm), and add the log of the sum by numpyro.factor"
        )
    known = traits(objective)
    if programs.summed and not known.sums_sites:
        raise ValueError(
            f"objective: expected one that sums over the sites {', '.join(programs.summed)}, got "
            f"{name}; use TraceEnum_ELBO, or let the guide draw them: leave out "
            f"infer={{'enumerate': 'parallel'}} in the model and take guides.mean_field(model)"
        )
    if programs.summed and (known.weighed_divergence or known.changes_with_step):
        raise ValueError(
            f"objective: expected a divergence that a weight can multiply, got {name} and the site "
            f"{programs.summed[0]!r}, which is summed over in the model and has none of its own; "
            f"let the guide draw it: leave out infer={{'enumerate': 'parallel'}} in the model and "
            f"take guides.mean_field(model)"
        )
    for each in (objective, validation_objective):
        if each is not None and traits(each).exact_divergences:
            check_mean_field(model, guide, batch, key=key)


def _check_validation(
    plan: Plan, arrays: Arrays, validation: Arrays, batch: Mapping[str, Any]
) -> None:
    """The held-out data are what the programs take."""
    if validation.keys() != batch.keys():
        raise ValueError(
            f"validation: expected arrays {sorted(batch)}, got {sorted(validation)}; give the "
            f"arrays that the training data have"
        )
    for name, array in validation.items():
        if array.shape[1:] != batch[name].shape[1:]:
            expected = ", ".join(map(str, ("N", *batch[name].shape[1:])))
            raise ValueError(
                f"validation[{name!r}]: expected shape ({expected}), as in training, got "
                f"{array.shape}"
            )
    programs, objective = plan.programs, plan.validation_objective
    if not programs.plates:
        raise ValueError(
            "validation: expected a model with a plate for its data, "
            'got one without; put the data in numpyro.plate("data", len(x)), or leave validation '
            "out"
        )
    if programs.tied_to and describe_arrays(validation, True) != describe_arrays(arrays, True):
        raise ValueError(
            f"validation: expected a guide for data that it has not seen, but {programs.tied_to}; "
            f"leave validation out, or use a guide with an encoder"
        )
    most = min(plan.settings.batch_size, length(validation))
    if traits(objective).weighs_jointly and programs.has_globals and most < length(validation):
        raise ValueError(
            f"validation_objective: {type(objective).__name__} weighs whole data sets where there "
            f"are global latent variables: expected at most {most} validation data, a batch, got "
            f"{length(validation)}"
        )


# --- where a run starts ---------------------------------------------------------------------------


def _start(
    init: Any, num_seeds: int | None, seed: int | None, num_data: int, batch_size: int | None
) -> dict[str, Any]:
    """Seeds and first step, from the fit that the run goes on with, or the defaults."""
    require_whole("num_seeds", num_seeds, 1)
    require_whole("seed", seed, 0)
    if init is not None and not isinstance(init, Fit | Mapping):
        raise TypeError(
            f"init: expected a Fit to go on with or a mapping of parameters, got "
            f"{type(init).__name__}; write init=result or init=result.params_of(0)"
        )
    if not isinstance(init, Fit) or init.state is None:
        known = {"num_seeds": num_seeds or 1, "seed": seed or 0}
        if isinstance(init, Fit):
            known["num_seeds"] = init.num_seeds if num_seeds is None else num_seeds
        return known | {"first_step": 0, "first_epoch": None}
    for name, value, own in (
        ("num_seeds", num_seeds, init.num_seeds),
        ("seed", seed, init.config["seed"]),
    ):
        if value is not None and value != own:
            raise ValueError(
                f"{name}: expected {own}, as in the fit that the run goes on with, got {value}; "
                f"leave it out, or start anew with init=result.params_of(0)"
            )
    step, epochs = int(init.state.step), init.config.get("num_epochs")
    size = num_data if batch_size is None else batch_size
    same = (init.config["num_data"], init.config["batch_size"]) == (num_data, size)
    ended = same and epochs is not None and step == -(-epochs * num_data // size)
    return {
        "num_seeds": init.num_seeds,
        "seed": init.config["seed"],
        "first_step": step,
        "first_epoch": epochs if ended else None,
    }


def _initial(init: Any, programs: Programs, settings: Settings) -> dict[str, Any]:
    """Values to start from, by name, with a seed axis."""
    if init is None:
        return {}
    if isinstance(init, Fit):
        if init.num_seeds != settings.num_seeds:
            raise ValueError(
                f"init: expected a fit of {settings.num_seeds} seeds, got one of "
                f"{init.num_seeds}; leave num_seeds out"
            )
        given = init.params | init.mutable
    else:
        given = jax.tree.map(
            lambda p: jnp.broadcast_to(p, (settings.num_seeds, *jnp.shape(p))), dict(init)
        )
    params = {}
    for name, value in given.items():
        expected = (programs.params | programs.mutable).get(name)
        got = jax.tree.map(lambda p: p[0], value)
        if expected is None:
            raise ValueError(
                f"init[{name!r}]: expected parameters of the programs, which are "
                f"{', '.join(sorted(programs.params))}, got {name!r}; leave it out"
            )
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (expected, got)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"init[{name!r}]: expected shape {shapes[0]}, got {shapes[1]}; give one seed's "
                f"parameters, result.params_of(0)"
            )
        params[name] = jax.tree.map(lambda e, p: jnp.asarray(p, e.dtype), expected, value)
    return params


def _digest(init: Any) -> str | None:
    """What a run starts from, as a hash."""
    if init is None:
        return None
    tree = init.params if isinstance(init, Fit) else dict(init)
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
