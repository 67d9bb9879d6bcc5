"""Train your own program: a file with a model, and a file with its data.

    python experiments/train.py my_model.py:model --dataset my.npz --guide flow --num-epochs 50

The model is a NumPyro program that takes arrays by name (``my_model.py`` below), and the arrays of
the data set go to the arguments of the same names. The guide is a family of ``models/guides.py``.
A part of the data is held out, and judged after the training.

    def model(c, x=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        with numpyro.plate("data", len(c)):
            numpyro.sample("x", dist.Normal(slope * c, 1), obs=x)

The run keeps a copy of the file, ``program.py``. Nothing ever executes it: to open the run again,
import your own file.

    runs.load("runs/...", model=my_model.model)
"""

import ast
import dataclasses
import inspect
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import random
from tabulate import tabulate
from tyro.conf import Positional

from experiments import datasets, pictures
from experiments.experiment import DataTree, Experiment, Figure, Fits
from experiments.runner import fit_anew, number, run
from experiments.runs import PROGRAM
from experiments.settings import (
    Machines,
    check_fraction,
    check_known,
    check_least,
    check_positive,
    command_line,
)
from inference import (
    OBJECTIVES,
    ElboTerms,
    Estimate,
    Fit,
    ProgramError,
    elbo_terms,
    log_likelihood,
    log_predictive_density,
    pareto_k_threshold,
    pointwise_elbo,
    sample_posterior,
    to_datatree,
)
from inference.evaluation import FEWEST_FOR_TAIL
from inference.fit import programs_of
from inference.sites import abstract, data_plates, length, outline, preparation
from models import guides

ENCODERS = ("network", "per-datum")
HELD_OUT = 0.1  # the fraction of the data for validation, and for testing
NUM_STEPS = 5_000  # the length of a training that has no other
JUDGING_SEED = 20_150_901  # It is folded with the run's seed, and gives the draws of the judges.


class OwnProgramError(ValueError):
    """A user's own program that cannot be had, or that raises an error."""


@dataclass(frozen=True)
class Config(Machines):
    """Settings of the training of your own program.

    Attributes:
        program: Your file and the name of the model in it: my_model.py:model. It is a function, a
            dataclass or an instance.
        dataset: File with the data, .npz, .npy or .csv. Each array, or each column of a .csv file,
            goes to the argument of its name. The array of an .npy file is x. The first axis is the
            datum. An .npy file larger than half of the memory is read piece by piece.
        set: Fields of the dataclass or arguments of the function, such as num_latents=3.
        guide: Family of the guide: mean-field, structured, low-rank, full-covariance, flow,
            inverse-autoregressive, neural-spline, prior or semi-amortised.
        globals: Family of the global sites: mean_field or full_covariance.
        encoder: What gives the guide its numbers for each datum: network, or per-datum. per-datum
            is a table with a row for each datum. It trains on all data at once and is fitted anew
            to the test data.
        validation: Fraction of the training data to hold out for validation. Default: a tenth, or
            the arrays <name>_validation of an .npz file. The encoder per-datum holds out none.
        test: Fraction of the data to hold out for the judges. Default: a tenth, or the arrays
            <name>_test of an .npz file.
        objective: Objective of the training: Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO,
            RenyiELBO (or importance-weighted, the same), doubly-reparameterized or
            sticking-the-landing.
        num_particles: Draws of the latents per datum and step.
        num_epochs: Passes over the training data.
        num_steps: Steps of the optimiser, instead of num_epochs. Default: 5000.
        batch_size: Data per step. Default: 128, or all if there are fewer or if the model takes all
            data only.
        learning_rate: Learning rate of Adam.
        average: Fraction of the run, at its end, over which parameters are averaged.
        patience: Held-out ELBOs without a new best after which a seed stops and keeps its best.
        validate_every: Steps from one held-out ELBO to the next. Default: an epoch.
        on_nan: What to do if a loss is not finite: stop, or skip the step.
        num_samples: Draws of the latents that judge each test datum.
        num_seeds: Number of restarts. They are trained together.
        seed: Random seed of the first restart.
        out: Directory of the run. Default: a new one in runs/.
        progress: Whether to show progress bars.
    """

    program: Positional[str]
    dataset: Path
    set: tuple[str, ...] = ()
    guide: str = "mean-field"
    globals: str = "mean_field"
    encoder: str = "network"
    validation: float | None = None
    test: float | None = None
    objective: str = "Trace_ELBO"
    num_particles: int = 1
    num_epochs: int | None = None
    num_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float = 1e-3
    average: float = 0.0
    patience: int | None = None
    validate_every: int | None = None
    on_nan: str = "stop"
    num_samples: int = 1000
    num_seeds: int = 1
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_known(self, guide=guides.GUIDES, globals=guides.GLOBALS, encoder=ENCODERS)
        check_known(self, objective=OBJECTIVES, on_nan=("stop", "skip"))
        check_least(1, self, "num_particles", "num_epochs", "num_steps", "batch_size", "patience")
        check_least(1, self, "validate_every", "num_samples", "num_seeds")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate")
        check_fraction(self, "average")
        check_fraction(self, *(n for n in ("validation", "test") if getattr(self, n) is not None))
        if self.num_epochs is not None and self.num_steps is not None:
            raise ValueError(
                f"num_epochs, num_steps: expected one of the two, got {self.num_epochs} and "
                f"{self.num_steps}; leave one out"
            )
        for name in ("validation", "batch_size"):
            if self.encoder == "per-datum" and getattr(self, name):
                raise ValueError(
                    f"{name}: expected none with the encoder per-datum, whose every step takes all "
                    f"training data, got {getattr(self, name)}; leave it out"
                )
        _values(self.set)

    @cached_property
    def source(self) -> "Source":
        """The file of the program, read once."""
        return Source.read(self.program)

    @cached_property
    def model(self) -> Any:
        """The model. The file is executed once."""
        return _made(self.source.found(), self.set)


# --- the program ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A user's file and the name of the model in it.

    Attributes:
        path: the file.
        name: the model's name.
        content: what the file holds.
    """

    path: Path
    name: str
    content: bytes

    @classmethod
    def read(cls, program: str) -> "Source":
        """Reads the file of ``FILE:NAME``.

        Raises:
            OwnProgramError: it says something else, or the file cannot be read.
        """
        file, _, name = program.rpartition(":")
        if not file or not name.isidentifier():
            raise OwnProgramError(
                f"program: expected FILE:NAME, a file and the name of the model in it, got "
                f"{program!r}; write for example my_model.py:model"
            )
        path = Path(file).expanduser()
        try:
            return cls(path, name, path.read_bytes())
        except OSError as error:
            raise OwnProgramError(
                f"program: expected a Python file, got {path}, which cannot be read "
                f"({error.strerror}); give its path"
            ) from error

    def found(self) -> Any:
        """What the file has under the name. It executes the file.

        Raises:
            OwnProgramError: the file raises an error, or it has no model of this name.
        """
        module = self._executed()
        if not hasattr(module, self.name):
            candidates = [
                name
                for name, value in vars(module).items()
                if name[0] != "_"
                and callable(value)
                and module.__name__ in (getattr(value, "__module__", ""), type(value).__module__)
            ]
            raise OwnProgramError(
                f"program: expected a model named {self.name!r} in {self.path}, and there is none; "
                f"its functions and classes are {', '.join(candidates) or 'none'}"
            )
        return getattr(module, self.name)

    def _executed(self) -> ModuleType:
        """The module. Modules that lie beside the file can be imported."""
        module = ModuleType(f"program_{self.path.stem}")
        module.__file__ = str(self.path.resolve())
        beside = str(self.path.resolve().parent)
        if beside not in sys.path:
            sys.path.append(beside)
        sys.modules[module.__name__] = module  # dataclasses look there
        try:
            exec(compile(self.content, module.__file__, "exec", dont_inherit=True), vars(module))
        except (Exception, SystemExit) as error:
            line = error.lineno if isinstance(error, SyntaxError) else self.line_of(error)
            where = f"line {line}: " if line else ""
            said = error.msg if isinstance(error, SyntaxError) else error
            raise OwnProgramError(
                f"program: expected a file that can be imported, and {self.path} raises an error; "
                f"{where}{type(error).__name__}: {said}"
            ) from error
        return module

    def line_of(self, error: BaseException) -> int | None:
        """The last line of the file that an error went through. None if it went through none."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(self.path.resolve())]
        return lines[-1] if lines else None


def _values(set: tuple[str, ...]) -> dict[str, Any]:
    """The values of ``name=value``. What is no Python literal is text."""
    values = {}
    for given in set:
        name, sign, text = given.partition("=")
        if not (sign and name.isidentifier()):
            raise ValueError(f"set: expected NAME=VALUE, got {given!r}; write num_latents=3")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def _made(found: Any, set: tuple[str, ...]) -> Any:
    """The model from what stands under its name: a class is instantiated.

    Args:
        found: a function, a class or an instance.
        set: fields of the class or the instance, or arguments of the function.

    Raises:
        OwnProgramError: it cannot be called, or it has no such field or argument.
    """
    if not callable(found):
        raise OwnProgramError(
            f"program: expected a model, a function or an object that can be called, got "
            f"{type(found).__name__} {found!r:.50}; give the name of the model"
        )
    return _with_values(found, _values(set))


def _with_values(found: Any, values: dict[str, Any]) -> Any:
    is_instance = dataclasses.is_dataclass(type(found))
    if values:
        known = dataclasses.fields(found) if is_instance else inspect.signature(found).parameters
        names = [str(getattr(each, "name", each)) for each in known]
        for name in values:
            if name not in names:
                raise OwnProgramError(
                    f"set: expected fields or arguments of the model, which are "
                    f"{', '.join(names) or 'none'}, got {name!r}; leave it out"
                )
    try:
        if isinstance(found, type):
            return found(**values)
        if is_instance:
            return dataclasses.replace(found, **values)
        return partial(found, **values) if values else found
    except (TypeError, ValueError) as error:
        raise OwnProgramError(
            f"program: expected a model that its settings can make, got an error; {error}; give "
            f"its fields with --set NAME=VALUE"
        ) from error


def with_guide(config: Config, record: "Record", model: Any) -> tuple[Any, Any]:
    """The model and the guide."""
    guide = guides.make(config.guide, model, globals=config.globals)
    return model, guide.per_datum(record.num_data) if config.encoder == "per-datum" else guide


def own(config: Config, record: "Record", model: Any) -> tuple[Any, Any]:
    """The model that a user gives, as it stands in the file, and the guide."""
    return with_guide(config, record, _made(model, config.set))


def programs(config: Config, record: "Record", name: str, fits: Fits) -> tuple[Any, Any]:
    """The model from the file, and the guide."""
    return with_guide(config, record, config.model)


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What the guide needs to know of the data.

    Attributes:
        name: the file's name.
        num_data: how many training data there are.
    """

    name: str
    num_data: int


@dataclass(frozen=True)
class Data:
    """Arrays by name, for training, validation and test. Nothing is held out where it is empty."""

    record: Record
    train: Mapping[str, Any]
    validation: Mapping[str, Any]
    test: Mapping[str, Any]


def load_data(config: Config) -> Data:
    """The arrays of the file, split the same way every time.

    The test set does not depend on the size of the validation set.

    Raises:
        ValueError: a file that cannot be used, or too few data to split.
    """
    path = Path(config.dataset).expanduser()
    arrays = datasets.read(path)
    given = {
        split: {name: arrays[f"{name}_{split}"] for name in arrays if f"{name}_{split}" in arrays}
        for split in ("validation", "test")
    }
    ends = {f"{name}_{split}" for split, some in given.items() for name in some}
    train = arrays
    if ends:
        train = {name: array for name, array in arrays.items() if name not in ends}
    _check_lengths(f"{path}", train)
    for split, some in given.items():
        if some:
            _check_lengths(f"{path}, {split}", some)
        if some and getattr(config, split) is not None:
            raise ValueError(
                f"{split}: expected none, as {path} has {next(iter(some))}_{split}, got "
                f"{getattr(config, split)}; leave one out"
            )
    rows = np.random.default_rng(0).permutation(length(train))
    parts: dict[str, Mapping[str, Any]] = dict(given)
    for split in ("test", "validation"):
        fraction = getattr(config, split)
        if fraction is None:
            none = split == "validation" and config.encoder == "per-datum"
            fraction = 0.0 if given[split] or none else HELD_OUT
        count = round(fraction * len(rows))
        if fraction and not 0 < count < len(rows):
            raise ValueError(
                f"{split}: expected a fraction that leaves data on both sides, got {fraction} of "
                f"{len(rows)}; give another with --{split}, 0 holds out none"
            )
        if count:
            parts[split] = datasets.take(train, np.sort(rows[:count]))
        rows = rows[count:]
    if config.encoder == "per-datum" and parts["validation"]:
        raise ValueError(
            f"encoder: expected network with held-out data, since {path} has some for validation, "
            f"got per-datum; leave one out"
        )
    train = datasets.take(train, np.sort(rows))
    return Data(Record(path.name, len(rows)), train, **parts)


def _check_lengths(what: str, arrays: Mapping[str, Any]) -> None:
    if any(array.ndim == 0 for array in arrays.values()) or len({*map(len, arrays.values())}) > 1:
        got = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(
            f"dataset: {what}: expected arrays of one leading length, the number of data, got "
            f"{got}; give every array one entry per datum, and constants with --set"
        )


# --- training -------------------------------------------------------------------------------------


def training(config: Config, data: Data, name: str, fits: Fits) -> dict[str, Any]:
    """The settings of ``fit``.

    Raises:
        ValueError: held-out data, and a model that cannot judge them.
    """
    has_plate, any_length = _takes(config.model, data.train)
    if not has_plate and (data.validation or data.test):
        raise ValueError(
            f"model: expected one with a plate for its data, so that held-out data can be judged, "
            f'got {config.program} without; put the data in numpyro.plate("data", len(x)), or hold '
            f"out none with --validation 0 --test 0"
        )
    batch_size = config.batch_size
    if batch_size is None and config.encoder == "network" and has_plate and any_length:
        batch_size = min(128, data.record.num_data)
    is_open = config.num_epochs is None and config.num_steps is None
    return {
        "objective": OBJECTIVES[config.objective](config.num_particles),
        "optimizer": optax.adam(config.learning_rate),
        "num_epochs": config.num_epochs,
        "num_steps": NUM_STEPS if is_open else config.num_steps,
        "batch_size": batch_size,
        "num_seeds": config.num_seeds,
        "seed": config.seed,
        "average": config.average,
        "validation": data.validation or None,
        "validate_every": config.validate_every,
        "patience": config.patience,
        "on_nan": config.on_nan,
    }


def _takes(model: Any, data: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the model has a plate for its data, and whether it runs with any number of them."""
    prepare = preparation(model)
    try:
        shapes = abstract(data) if datasets.is_streamed(data) else dict(data)
        batch = shapes if prepare is None else jax.eval_shape(prepare, random.key(0), shapes)
        return bool(data_plates(model, **batch)), outline(model, batch).any_length
    except Exception:  # fit runs it too, and says what is wrong
        return True, False


# --- judging --------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What the judges say of the test data.

    Attributes:
        numbers: results of judges, for ``to_datatree``. Empty without test data, or where no judge
            has a number for each datum.
        posterior: draws of the global sites, or else one draw for each test datum.
    """

    numbers: tuple[ElboTerms | Estimate, ...]
    posterior: dict[str, Any] | None

    @property
    def estimates(self) -> dict[str, Estimate]:
        """The numbers by name."""
        found = {}
        for each in self.numbers:
            is_one = isinstance(each, Estimate)
            parts = (each,) if is_one else (each.elbo, each.reconstruction, each.kl)
            found |= {part.name: part for part in parts}
        return found


def judge(config: Config, data: Data, fits: Fits) -> Judged:
    """The test data under every seed's model."""
    fitted, numbers = fits["fit"], []
    key = random.fold_in(random.key(JUDGING_SEED), config.seed)
    known = programs_of(fitted, fitted.batch)
    judged = fitted.prepare(data.test or data.train)
    if data.test and config.encoder == "per-datum":
        record = dataclasses.replace(data.record, num_data=length(judged))
        guide = with_guide(config, record, fitted.model)[1]
        fitted = fit_anew(fitted, guide, judged, config)
    draws = {"num_samples": config.num_samples, "progress": config.progress}
    if data.test and not known.has_globals:
        elbo = pointwise_elbo if known.summed else elbo_terms
        numbers.append(elbo(fitted, judged, key=key, num_samples=10))
        numbers.append(log_likelihood(fitted, judged, key=key, **draws))
    elif data.test and not known.summed:  # all data share the draws: they need more
        numbers.append(elbo_terms(fitted, judged, key=key, **draws))
        numbers.append(log_predictive_density(fitted, judged, key=key, **draws))
    return Judged(tuple(numbers), _posterior(config, fitted, judged, key))


def _posterior(
    config: Config, fitted: Fit, judged: Mapping[str, Any], key: Any
) -> dict[str, Any] | None:
    """Draws of the global sites, or else one draw for each datum."""
    known = programs_of(fitted, fitted.batch)
    shared = [name for name in known.latents if name in known.globals]
    if not shared:
        return sample_posterior(fitted, judged, key=key) if known.latents else None
    return sample_posterior(fitted, judged, config.num_samples, key=key, return_sites=shared)


def summarize(config: Config, data: Data, fits: Fits, judged: Judged) -> dict[str, Any]:
    """The numbers of ``result.json``."""
    fitted, estimates = fits["fit"], judged.estimates
    last = max(1, fitted.elbo.shape[1] // 100)
    summary: dict[str, Any] = {"training_elbo": [_last(row, last) for row in fitted.elbo]}
    if fitted.validation_elbo is not None:
        pick = max if config.patience else lambda row: row[-1]
        rows = [row[np.isfinite(row)] for row in fitted.validation_elbo]
        summary["validation_elbo"] = [float(pick(row)) if len(row) else None for row in rows]
    summary |= {name: number(estimate) for name, estimate in estimates.items()}
    likelihood = estimates.get("log_likelihood")
    if likelihood is not None and likelihood.high_pareto_k is not None:
        threshold = {"threshold": pareto_k_threshold(config.num_samples)}
        summary["pareto_k"] = number(likelihood.high_pareto_k) | threshold
    return summary


def _last(row: np.ndarray, count: int) -> float:
    """The mean of the last finite numbers of a trace."""
    return float(row[np.isfinite(row)][-count:].mean())


def tree(config: Config, data: Data, fits: Fits, judged: Judged) -> DataTree:
    """The fit, the judged numbers by datum, and draws of latent sites."""
    return to_datatree(fits["fit"], *judged.numbers, posterior=judged.posterior)


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it."""
    names = ("elbo", "reconstruction", "kl", "log_likelihood", "log_predictive_density")
    rows = [(name.replace("_", " "), result[name], 3) for name in names if name in result]
    pareto_k = result.get("pareto_k")
    if pareto_k:
        rows.append((f"share with k-hat >= {pareto_k['threshold']:.2f}", pareto_k, 4))
    body = tabulate(
        [
            (name, f"{v['estimate']:.{digits}f}", f"{v['standard_error']:.{digits}f}")
            for name, v, digits in rows
        ],
        ("test set, nats per datum", "estimate", "standard error"),
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )
    num_data, config, notes = result["num_data"], result["config"], []
    counts = ", ".join(f"{count} {split}" for split, count in num_data.items())
    for name, words in (("training_elbo", "training"), ("validation_elbo", "validation")):
        if name in result:
            values = ", ".join("-" if v is None else f"{v:.3f}" for v in result[name])
            notes.append(f"ELBO at the end, {words}: {values}")
    if "test" not in num_data:
        body = "no test data, so no number of the test set"
    elif not rows:
        body = (
            "no number of the test set: there are global sites, and sites that the objective sums "
            "over"
        )
    likelihood = result.get("log_likelihood")
    if likelihood:
        notes.append(
            f"log likelihood: {likelihood['num_samples']} importance samples per datum, Monte "
            f"Carlo error {likelihood['monte_carlo_error']:.3f}"
            + ("" if pareto_k else f"; k-hat: not available, needs {FEWEST_FOR_TAIL} samples")
        )
    elif rows:
        notes.append("ELBO: given the global sites, without their divergence")
    return (
        f"{config['program']} on {result['dataset']}: {counts} data; "
        f"{result['num_parameters']} parameters\n\n{body}\n\n" + "\n".join(notes)
    )


def figures(
    config: Config, data: Data, fits: Fits, judged: Judged, result: dict[str, Any]
) -> dict[str, Figure]:
    """The figure of the ELBO traces."""
    words = f"{config.source.path.name}:{config.source.name} on {data.record.name}"
    test = result.get("elbo", {}).get("estimate")
    return {"elbo": pictures.elbo_traces(fits["fit"], words, test, datum="datum")}


EXPERIMENT = Experiment(
    name="train",
    config=Config,
    data=load_data,
    programs=programs,
    training=training,
    judge=judge,
    summarize=summarize,
    tree=tree,
    figures=figures,
    table=table,
    record=Record,
    files=lambda config: {PROGRAM: config.source.content},
    own=own,
)


def main(config: Config) -> dict[str, Any]:
    """Train your own program."""
    try:
        return run(EXPERIMENT, config)
    except OwnProgramError:
        raise
    except Exception as error:
        source = config.source
        line = source.line_of(error)
        if line is None:
            raise
        kind = "" if isinstance(error, ProgramError) else f"{type(error).__name__}: "
        raise OwnProgramError(f"{source.path}, line {line}: {kind}{error}") from error


if __name__ == "__main__":
    command_line(main, Config)
