"""What a run learnt: the programs, the parameters of every seed, the traces, the state.

All that comes after training is a function of a ``Fit``: judging, generating, comparing, plots.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.sharding import Mesh
from jaxtyping import Float

from inference._checks import ProgramError, Programs, look
from inference._data import Arrays, Prepared, as_arrays, check_arrays, is_prepared
from inference._describe import describe_arrays, describe_device, describe_value, versions
from inference._missing import Preprocess, masked_arrays, masking
from inference._saving import SAVED, compare_shapes, read, shapes_of, write
from inference._steps import State, by_seed
from inference._streams import PreparedStream, prepare_blocks
from inference.sites import ChecksData, Program, abstract

PREPARE_SEED = 20_150_901  # data are prepared once with it: the same for every fit


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """What a run learnt. Everything afterwards is a function of it.

    Attributes:
        model, guide: the programs.
        preprocess: (key, batch) -> batch, which the run applied at every step, or None.
        params: the fitted value of every ``numpyro.param`` site. Each array (each leaf of a
            network's tree) has a leading seed axis.
        mutable: the value of every mutable site, such as running averages, with a leading seed
            axis. Empty without such sites.
        elbo: (seed, step), the training ELBO of each step's batch, nats per datum. NaN where a
            step was skipped and after a seed has stopped.
        validation_elbo: (seed, evaluation), the held-out number, nats per datum, or None.
            ``info["validation_steps"]`` has the steps.
        state: the engine's last state, or None.
        config: the settings and descriptions of programs and data, JSON-able.
        info: what happened, JSON-able: device, versions, seconds (compile and total of this call;
            run of the whole training), validation_steps, converted types, traces_elbo (whether
            ``elbo`` is the ELBO itself, not another bound), and per seed num_steps and num_skipped.
        batch: the abstract values of a prepared batch.
        mesh: the devices of the training, over which judges split their batches, or None. It is
            not saved.
    """

    model: Program
    guide: Program
    preprocess: Preprocess | None
    params: dict[str, Any]
    mutable: dict[str, Any]
    elbo: Float[np.ndarray, "seed step"]
    validation_elbo: Float[np.ndarray, "seed evaluation"] | None
    state: State | None
    config: dict[str, Any]
    info: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct] = field(default_factory=dict)
    mesh: Mesh | None = None

    # --- seeds

    @property
    def num_seeds(self) -> int:
        """The number of restarts."""
        return self.config["num_seeds"]

    @property
    def seeds(self) -> list[int]:
        """The random seed of every restart."""
        return [self.config["seed"] + i for i in range(self.num_seeds)]

    def params_of(self, seed: int) -> dict[str, Any]:
        """One seed's parameters without the seed axis, for closed forms.

        Args:
            seed: the position of the seed, from 0.
        """
        return jax.tree.map(lambda p: p[self._position(seed)], self.params)

    def mutable_of(self, seed: int) -> dict[str, Any]:
        """One seed's mutable state without the seed axis."""
        return jax.tree.map(lambda p: p[self._position(seed)], self.mutable)

    def isel(self, *, seed: int) -> "Fit":
        """A fit of one seed, by position.

        Raises:
            IndexError: there is no such seed.
        """
        i = self._position(seed)
        one = slice(i, i + 1)
        params, mutable = jax.tree.map(lambda p: p[one], (self.params, self.mutable))
        per_seed = ("num_steps", "num_skipped")
        return replace(
            self,
            params=params,
            mutable=mutable,
            elbo=self.elbo[one],
            validation_elbo=None if self.validation_elbo is None else self.validation_elbo[one],
            state=None if self.state is None else by_seed(lambda x: x[one], self.state),
            config=self.config | {"seed": self.seeds[i], "num_seeds": 1},
            info=self.info | {n: self.info[n][one] for n in per_seed if n in self.info},
        )

    def sel(self, *, seed: int) -> "Fit":
        """A fit of one seed, by random seed.

        Raises:
            KeyError: no restart has this seed.
        """
        if seed not in self.seeds:
            raise KeyError(
                f"seed: expected one of {self.seeds}, got {seed!r}; isel takes positions"
            )
        return self.isel(seed=self.seeds.index(seed))

    def best(self) -> "Fit":
        """A fit of the seed with the greatest held-out ELBO.

        With ``patience`` the greatest of each seed counts, else the last one.

        Raises:
            ValueError: the run had no held-out data.
        """
        if self.validation_elbo is None or not np.isfinite(self.validation_elbo).any():
            raise ValueError(
                "best: expected a fit with a held-out ELBO, got one without; give fit the "
                "setting validation=, for example validation=0.1"
            )
        return self.isel(seed=int(np.nanargmax(self._held_out())))

    def _held_out(self) -> Float[np.ndarray, " seed"]:
        """The held-out ELBO of every seed's parameters."""
        assert self.validation_elbo is not None
        finite = np.where(np.isfinite(self.validation_elbo), self.validation_elbo, -np.inf)
        if self.config.get("patience"):
            return finite.max(1)
        last = [row[np.isfinite(row)][-1:] for row in self.validation_elbo]
        return np.array([value[0] if len(value) else -np.inf for value in last])

    def _position(self, seed: int) -> int:
        if not -self.num_seeds <= seed < self.num_seeds:
            raise IndexError(
                f"seed: expected a position below {self.num_seeds}, the number of seeds, got {seed}"
            )
        return seed % self.num_seeds

    # --- data

    def prepare(self, data: Any) -> Prepared | PreparedStream:
        """The data as the programs take them: the fit's ``preprocess``, once, with a fixed key.

        A fit with ``missing="mask"`` makes the masks too. A stream is prepared as it is read.

        Args:
            data: as ``fit`` takes them. Prepared data are returned as they are.

        Raises:
            ValueError: data that the model refuses; a fit that was loaded without its preprocess.
        """
        if is_prepared(data):
            return data
        known = self.config.get("preprocess")
        if self.preprocess is None and known is not None:
            raise ValueError(
                f"prepare: expected the fit's preprocess, {known}, got a fit that was loaded "
                f"without it; load it with Fit.load(path, model, guide, preprocess=model.prepare)"
            )
        missing = self.config.get("missing")
        return prepare(self.model, self.preprocess, data, missing=missing)

    # --- files

    def save(self, path: str | os.PathLike) -> None:
        """Writes the fit into a directory: arrays and JSON, no pickle.

        Raises:
            FitError: the directory holds something else, or cannot be written.
        """
        fields = {name: getattr(self, name) for name in SAVED}
        write(Path(path), fields)

    @staticmethod
    def load(
        path: str | os.PathLike,
        model: Program,
        guide: Program,
        *,
        preprocess: Preprocess | None = None,
    ) -> "Fit":
        """Reads a fit. The data and the device of the training are not needed.

        Args:
            path: the directory that ``save`` wrote.
            model, guide: the programs of the fit.
            preprocess: what the fit applied at every step, where it did.

        Raises:
            FitError: the directory is damaged or foreign, or the programs have other parameters.
        """
        return Fit(model, guide, preprocess, **read(Path(path), model, guide))

    @staticmethod
    def from_params(
        model: Program,
        guide: Program,
        params: Mapping[str, Any],
        *,
        example: Any,
        preprocess: Preprocess | None = None,
        missing: str | None = None,
        mutable: Mapping[str, Any] | None = None,
    ) -> "Fit":
        """A fit of known parameters: judges and generators take it like any other.

        Args:
            model, guide: the programs.
            params: the value of every parameter, of one seed, without a seed axis.
            example: data as the user gives them, or prepared. Their shapes are kept.
            preprocess, missing: as in ``fit``.
            mutable: the value of every mutable site.

        Raises:
            ProgramError: the programs do not fit each other, the example or the parameters.
        """
        prepared = (
            example
            if is_prepared(example)
            else prepare(model, preprocess, example, "example", missing=missing)
        )
        num_data = check_arrays(prepared, "example")
        config = {
            "num_data": num_data,
            "batch_size": num_data,
            "num_seeds": 1,
            "seed": 0,
            "model": describe_value(model),
            "guide": describe_value(guide),
            "objective": None,
            "preprocess": describe_value(preprocess),
            "missing": missing,
            "data": prepared.source or describe_arrays(prepared, contents=True),
        }
        info = {"device": describe_device(), "versions": versions(), "num_steps": [0]}
        info |= {"validation_steps": [], "num_skipped": [0]}
        given = {"params": dict(params), "mutable": dict(mutable or {})}
        given = jax.tree.map(lambda p: jnp.asarray(p)[None], given)
        empty = np.zeros((1, 0), np.float32)
        batch = abstract(prepared)
        result = Fit(
            model,
            guide,
            preprocess,
            **given,
            elbo=empty,
            validation_elbo=None,
            state=None,
            config=config,
            info=info,
            batch=batch,
        )
        found = programs_of(result, prepared)
        kinds = {"params": found.params, "mutable": found.mutable}
        typed = jax.tree.map(lambda e, p: jnp.asarray(p, e.dtype), kinds, given)
        return replace(result, **typed)

    # --- a person

    def __repr__(self) -> str:
        """At most ten lines."""
        config = self.config
        sizes = {name: _size(tree) // self.num_seeds for name, tree in self.params.items()}
        named = sorted(sizes, key=lambda name: -sizes[name])
        names = ", ".join(named[:6]) + ", ..." * (len(named) > 6)
        arrays = ", ".join(f"{n} {str(d).split(' sha')[0]}" for n, d in config["data"].items())
        seeds = ", ".join(map(str, self.seeds[:6])) + ", ..." * (self.num_seeds > 6)
        lines = [
            f"Fit of {config['model']}",
            f"  guide       {config['guide']}",
            f"  objective   {config['objective']}",
            f"  data        {arrays}",
            f"  parameters  {sum(sizes.values())}: {names}",
            f"  seeds       {seeds}",
        ]
        if self.elbo.size:
            last = self.elbo[:, -max(1, self.elbo.shape[1] // 100) :]
            lines.append(
                f"  steps       {max(self.info['num_steps'])} of {config['batch_size']} data"
            )
            lines.append(f"  ELBO        {_numbers(_mean(last))} nats per datum (the last steps)")
        if self.validation_elbo is not None and self.validation_elbo.size:
            lines.append(f"  held out    {_numbers(self._held_out())} nats per datum")
        lines.append(f"  device      {self.info['device']}")
        return "\n".join(line if len(line) <= 100 else f"{line[:97]}..." for line in lines)


def _size(tree: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def _mean(values: Float[np.ndarray, "seed step"]) -> Float[np.ndarray, " seed"]:
    finite = np.isfinite(values)
    total = np.where(finite, values, 0).sum(1)
    return np.where(finite.any(1), total / np.maximum(finite.sum(1), 1), np.nan)


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.4f}" for value in values[:6]) + ", ..." * (len(values) > 6)


def prepare(
    model: Program,
    preprocess: Preprocess | None,
    data: Any,
    name: str = "data",
    *,
    missing: str | None = None,
) -> Prepared | PreparedStream:
    """The data, checked, as the programs take them."""
    arrays = as_arrays(data, name)
    check_arrays(arrays, name, may_miss=masked_arrays(model, missing), look=look_of(model))
    source = describe_arrays(arrays, contents=True)
    prepared = masking(model, preprocess, missing)
    found = prepare_blocks(prepared, random.key(PREPARE_SEED), arrays, source)
    return found if isinstance(found, PreparedStream) else Prepared(found, source)


def look_of(model: Program) -> Callable[..., None] | None:
    """How a model looks at data as the user gives them, if it does so."""
    return model.check_data if isinstance(model, ChecksData) else None


# --- what is known of a fit's programs ------------------------------------------------------------

_KNOWN: WeakKeyDictionary[Fit, dict[Any, Programs]] = WeakKeyDictionary()


def programs_of(result: Fit, batch: Arrays) -> Programs:
    """What abstract runs tell of the fit's programs, once per fit and shape of data.

    Raises:
        ProgramError: the programs do not fit each other, the batch or the fit's parameters.
    """
    shapes = abstract(batch)
    key = tuple(sorted((name, a.shape, str(a.dtype)) for name, a in shapes.items()))
    known = _KNOWN.setdefault(result, {})
    if key not in known:
        found = look(
            result.model,
            result.guide,
            shapes,
            key=random.key(0),
            whole=True,
            can_infer_discrete=True,
        )
        _check_params(result, found)
        known[key] = found
    return known[key]


def site_dims(result: Fit) -> dict[str, list[str]]:
    """The names of each site's axes after (chain, draw), by latent and observed site.

    The data's axis is called "data", an axis in another plate by the plate, and others
    "<site>_dim_<i>".
    """
    found = programs_of(result, result.batch)
    return {name: list(axes.dims) for name, axes in (found.latents | found.observed).items()}


def _check_params(result: Fit, found: Programs) -> None:
    """The programs have the fit's parameters."""
    for kind, expected, got in (
        ("parameter", found.params, result.params),
        ("mutable site", found.mutable, result.mutable),
    ):
        expected, got = shapes_of(expected), shapes_of(got, seed_axis=True)
        if found.tied_to and expected != got and expected.keys() == got.keys():
            raise ProgramError(tied_message(found))
        compare_shapes(kind, expected, got, ProgramError)


def tied_message(found: Programs) -> str:
    """What to tell of data that a guide was not fitted to."""
    return (
        f"data: expected those that the guide was fitted to, since {found.tied_to}, got others; "
        f"fit a guide to these data, with the model held (inference.Held)"
    )


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was not finite, and the run stopped.

    Attributes:
        seed: the random seed that it happened to.
        step: the step, counted from 1.
        last_elbo: that seed's last finite ELBO, nats per datum (NaN if there was none).
        fault: the first parameter, site or gradient that is not finite, in words.
        fit: the run until then. The seed's parameters are those before the step.
    """

    def __init__(self, seed: int, step: int, last_elbo: float, fault: str, fit: Fit):
        self.seed, self.step, self.last_elbo, self.fault = seed, step, last_elbo, fault
        self.fit = fit
        super().__init__(
            f"seed {seed}, step {step}: expected a finite loss and gradient, got one that is not "
            f"(first: {fault}; last finite ELBO: {last_elbo:.6g} nats per datum); lower the "
            f'learning rate, clip the gradient or pass on_nan="skip"; the parameters before that '
            f"step are in .fit"
        )


class Interrupted(KeyboardInterrupt):
    """The run was interrupted (Ctrl-C).

    Attributes:
        fit: the run until then. ``fit(..., init=error.fit)`` goes on with it.
    """

    def __init__(self, fit: Fit):
        self.fit = fit
        super().__init__(f"interrupted after step {max(fit.info['num_steps'])}; .fit has the run")
