"""The one engine: ``fit`` trains any NumPyro model and guide by stochastic variational inference.

One compiled loop runs many steps: shuffle, gather, preprocess, update, all on the device
(``inference._steps``). A step depends on its number and the state before it alone. Every key is
folded from (seed, step), and an epoch's order is a function of (seed, epoch).
"""

import os
import time
from collections.abc import Mapping
from typing import Any

import optax
from jax.sharding import Mesh
from numpyro.infer.elbo import ELBO

from inference._inputs import check
from inference._missing import Preprocess
from inference._processes import is_first, to_host
from inference._progress import progress as progress_bar
from inference._run import compile_steps, loop, place, result, start
from inference._settings import check_keywords
from inference.fit import Fit
from inference.sites import Program


def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    objective: ELBO | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_epochs: int | None = None,
    num_steps: int | None = None,
    batch_size: int | None = None,
    preprocess: Preprocess | None = None,
    missing: str | None = None,
    num_seeds: int | None = None,
    seed: int | None = None,
    init: Fit | Mapping[str, Any] | None = None,
    average: float = 0.0,
    validation: Any = None,
    validation_objective: ELBO | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    on_nan: str = "stop",
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: float = 10.0,
    mesh: Mesh | None = None,
    progress: bool = True,
    **unknown: Any,
) -> Fit:
    """Fits a guide, and the parameters of a model, to data.

    Args:
        model: a NumPyro program that takes the arrays of ``data`` by name. What each datum has of
            its own lies in a plate whose size follows the length of the batch.
        guide: likewise, with the model's latent sites.
        data: arrays whose leading axis is the datum: a mapping of arrays or lists, a DataFrame or
            a Dataset. They stay on the device in their own type. Where one array is a
            ``numpy.memmap`` the data are streamed: the device gets a window of batches at a time,
            and memory does not grow with the data. So is a source: ``len(source)`` data, of which
            ``source[i]`` is a mapping of arrays without the leading axis. The bits are the same.
        objective: a NumPyro ELBO object. ``Trace_ELBO()`` by default. The run minimises its loss
            per datum (``inference.objectives``).
        optimizer: an Optax transformation. ``optax.adam(1e-3)`` by default.
        num_epochs: how long to train, in passes over the data. If the batch does not divide the
            data, the last batch of an epoch is filled up from the next one. So every batch is
            full and every datum is visited equally often. The run takes as many steps as cover
            the epochs.
        num_steps: how long to train, in steps.
        batch_size: data per step. All of them by default.
        preprocess: (key, batch) -> batch, on the device at every step.
        missing: "mask" takes NaN in ``data`` as missing entries. If the model takes ``x_mask``, the
            array ``x`` gets a Boolean mask of its shape, True for the entries that are there. The
            others are filled with 0, after ``preprocess``. The model leaves them out:
            ``dist.Normal(loc, scale).mask(x_mask).to_event(1)``. None refuses NaN.
        num_seeds: independent restarts, trained together. The i-th is the run with the seed
            ``seed + i``.
        seed: the random seed of the first restart.
        init: where to start. From a Fit the run goes on: steps, random numbers, seeds and the
            optimiser's state, as in one longer run. A mapping gives values of parameters in place
            of the programs' own, for every seed.
        average: the fraction of the run, at its end, over which the unconstrained parameters are
            averaged (Polyak & Juditsky 1992). 0 returns the last ones.
        validation: held-out data, which ``preprocess`` is applied to once; ``Prepared`` data as
            the programs take them; or the fraction of ``data`` to hold out.
        validation_objective: what is evaluated on them. ``objective`` by default. For example
            ``RenyiELBO(alpha=0, num_particles=10)``, the importance-weighted bound of ten draws.
        validate_every: steps from one held-out ELBO to the next. An epoch by default.
        patience: a seed stops after so many held-out ELBOs without a new best, and its best
            parameters are returned. None trains to the end and returns the last.
        on_nan: "stop" raises ``NonFiniteError``; "skip" leaves the step out and counts it.
        checkpoint: a directory. The run is saved there at intervals and at its end. The same call
            finds it there and goes on, to the same bits.
        checkpoint_every: seconds from one checkpoint to the next.
        mesh: devices. The axis "data" splits every batch, and the axis "seed" the restarts. It has
            one of the two or both, and devices of every process.
        progress: whether to show progress: a bar on a screen, a line a minute in a log file.

    Raises:
        ValueError, TypeError: settings, data or programs that do not fit, by name.
        NonFiniteError: a loss or gradient was not finite, and ``on_nan`` is "stop".
        Interrupted: Ctrl-C. It holds the run until then.
        StreamError: a datum of a stream cannot be read. It holds the run until then.
        CheckpointError: the directory holds something else, or another run.
    """
    began = time.perf_counter()
    check_keywords(unknown)
    inputs = check(
        model,
        guide,
        data,
        objective=objective,
        validation_objective=validation_objective,
        optimizer=optimizer,
        preprocess=preprocess,
        missing=missing,
        validation=validation,
        init=init,
        mesh=mesh,
        num_seeds=num_seeds,
        seed=seed,
        num_epochs=num_epochs,
        num_steps=num_steps,
        batch_size=batch_size,
        average=average,
        validate_every=validate_every,
        patience=patience,
        on_nan=on_nan,
    )
    placed = place(inputs)
    run = compile_steps(inputs, placed, began)
    start(run, init, checkpoint)
    step, show = int(to_host(run.state.step)), progress and is_first()
    with progress_bar(run.settings.num_steps, "step", step, show) as shown:
        loop(run, shown, checkpoint_every)
    return result(run)
