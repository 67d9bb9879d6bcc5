"""What a script tells the runner: its data, its programs, its settings, its numbers and figures.

    EXPERIMENT = Experiment("my_script", Config, data=..., programs=..., ...)

``runner.run(EXPERIMENT, config)`` does the rest. ``runs.load`` finds it again under its name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.datasets import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import DataTree

    from inference import Fit
else:  # slow to import
    DataTree = Figure = Fit = Any

Fits = Mapping[str, Fit]


@dataclass(frozen=True)
class Data:
    """Data that are judged as they are trained on, with their maximum-likelihood solution.

    Attributes:
        record: what the model needs to know of the data.
        train: arrays by name.
        maximum: the maximum-likelihood parameters by name.
    """

    record: Any
    train: dict[str, Any]
    maximum: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A script, as the runner and ``runs.load`` see it.

    ``config`` below is an instance of the script's ``Config``. ``fits`` holds the fits so far, by
    name.

    Attributes:
        name: the module in ``experiments/`` that keeps this object as ``EXPERIMENT``.
        config: the class of the settings, a frozen dataclass with ``out`` and ``progress``.
        data: ``data(config)`` loads the data: an object with ``record`` and, each a mapping from
            name to array, ``train`` and perhaps ``validation`` and ``test``. It refuses data that
            the experiment is not made for.
        programs: ``programs(config, record, name, fits)`` returns the model and the guide of the
            fit ``name``.
        training: ``training(config, data, name, fits)`` returns the settings of ``inference.fit``
            for the fit ``name``.
        judge: ``judge(config, data, fits)`` returns what the judges say, in any form.
        summarize: ``summarize(config, data, fits, judged)`` returns the script's numbers for
            ``result.json``. ``elbo`` and ``log_likelihood``, if they are among them, come as
            ``runner.number`` writes them, and ``runs.table`` shows them.
        tree: ``tree(config, data, fits, judged)`` returns what ``trace.nc`` holds.
        figures: ``figures(config, data, fits, judged, result)`` returns figures by file name.
        table: ``table(result)`` returns the result as a person reads it.
        names: ``names(config)`` returns the names of the fits, in the order of their training.
        main: ``main(config)`` returns the name of the fit that a run is known for.
        arrays: ``arrays(data, name)`` returns the arrays that the fit ``name`` is trained on, by
            name. All of ``data.train`` by default.
        record: the class of ``data.record``, a dataclass that JSON can hold. It is all that the
            programs need to know of the data.
        files: ``files(config)`` returns what files the directory of a run keeps a copy of, their
            contents by name.
        own: ``own(config, record, model)`` returns the model and the guide, if the model is the
            user's own and lies in no script. ``runs.load`` then asks for it, by the name in
            ``config.program``. None for a script that knows its model.
    """

    name: str
    config: type
    data: Callable[[Any], Any]
    programs: Callable[[Any, Any, str, Fits], tuple[Any, Any]]
    training: Callable[[Any, Any, str, Fits], dict[str, Any]]
    judge: Callable[[Any, Any, Fits], Any]
    summarize: Callable[[Any, Any, Fits, Any], dict[str, Any]]
    tree: Callable[[Any, Any, Fits, Any], DataTree]
    figures: Callable[[Any, Any, Fits, Any, dict[str, Any]], dict[str, Figure]]
    table: Callable[[dict[str, Any]], str]
    names: Callable[[Any], Sequence[str]] = lambda config: ("fit",)
    main: Callable[[Any], str] = lambda config: "fit"
    arrays: Callable[[Any, str], Mapping[str, Any]] = lambda data, name: data.train
    record: type = Record
    files: Callable[[Any], Mapping[str, bytes]] = lambda config: {}
    own: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None
