"""Fits side by side, by the names that you give them.

A *run* is a fit, the tree that ``to_datatree`` made of one, or anything that keeps such a tree as
``.tree``. These parts of a tree are read:

- ``evaluation``: ``elbo``, ``log_likelihood``, ``log_predictive_density`` and ``pareto_k`` by
  datum, and the type, shape and hash of the judged arrays.
- ``sample_stats`` and ``validation_stats``: the ELBO traces.
- The attributes ``config.*`` and ``info.*``: names of the programs, seconds of the training.
- The attributes ``settings`` (JSON) and ``experiment``, if a script has added them.
"""

import json
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from inference._data import Prepared, as_arrays
from inference._streams import only
from inference.datatree import to_datatree
from inference.evaluation import (
    ElboTerms,
    Estimate,
    elbo_terms,
    log_likelihood,
    log_predictive_density,
    pareto_k_threshold,
    pointwise_elbo,
)
from inference.fit import Fit, programs_of

if TYPE_CHECKING:
    from arviz_plots.plot_collection import PlotCollection
    from arviz_stats.utils import ELPDData
    from pandas import DataFrame
    from xarray import DataArray, Dataset, DataTree

    Runs = Mapping[str, Any]
else:  # a second or two to import, and trees_of raises for other runs
    DataArray = DataFrame = Dataset = DataTree = ELPDData = PlotCollection = Runs = Any

Trees = Mapping[str, DataTree]

# What a model says of a held-out datum. The second is for models with global sites.
DENSITIES = {
    "log_likelihood": "log-likelihood",
    "log_predictive_density": "log predictive density",
}
NUM_WINDOWS = 100  # A plot averages a training trace into at most this many windows.


# --- runs -----------------------------------------------------------------------------------------


def trees_of(runs: Runs, data: Any = None) -> dict[str, DataTree]:
    """The trees of runs, by name.

    Args:
        runs: fits, trees of ``to_datatree``, or objects with a ``.tree``, by name.
        data: arrays by name, which the fits are judged on. Without data the trees of fits have no
            judged numbers.

    Raises:
        TypeError: ``runs`` is no mapping, or a run is none of these.
    """
    from xarray import DataTree

    if not isinstance(runs, Mapping):
        raise TypeError(
            f"runs: expected a mapping from name to run, got {type(runs).__name__}; give "
            f'{{"a name": fit, "another": other}}'
        )
    trees = {}
    for name, run in runs.items():
        if isinstance(run, DataTree):
            trees[name] = run
        elif isinstance(run, Fit):
            judged = () if data is None else _judge(run, data)
            trees[name] = to_datatree(run, *judged)
        elif isinstance(getattr(run, "tree", None), DataTree):
            trees[name] = run.tree
        else:
            raise TypeError(
                f"runs: expected a Fit, a DataTree or an object with a tree as {name!r}, got "
                f"{type(run).__name__}; give what fit, to_datatree or runs.load returns"
            )
    return trees


def _judge(fit: Fit, data: Any) -> tuple[ElboTerms | Estimate, Estimate]:
    """The ELBO and the log density of the arrays that the fit takes."""
    arrays = as_arrays(data)
    if fit.batch.keys() <= arrays.keys():
        arrays = only(arrays, list(fit.batch))
    if isinstance(data, Prepared):
        arrays = Prepared(arrays, data.source)
    # elbo_terms has less noise. It is not defined if the objective sums over a latent site.
    programs = programs_of(fit, fit.batch)
    bound = pointwise_elbo if programs.summed else elbo_terms
    density = log_predictive_density if programs.has_globals else log_likelihood
    return bound(fit, arrays), density(fit, arrays)


def check_same_data(trees: Trees) -> None:
    """Raises if two runs were not judged on the same data.

    The arrays that both runs know must agree in name, type, shape and hash. A run may know more
    arrays: log p(x | c) and log p(x) are densities of the same x.

    Raises:
        ValueError: it names the two runs and the difference.
    """
    known = {name: _judged_data(name, tree) for name, tree in trees.items()}
    for first, second in combinations(known, 2):
        ours, theirs = known[first], known[second]
        common = sorted(ours.keys() & theirs.keys())
        pairs = {f"array {array} is": (ours[array], theirs[array]) for array in common}
        if not common:
            pairs = {"arrays are": (sorted(ours), sorted(theirs))}
        differ = [f"{what} {a}, and {b}" for what, (a, b) in pairs.items() if a != b]
        if differ:
            raise ValueError(
                f"runs: expected the same judged data, got others in {first} and {second}: "
                f"{'; '.join(differ)}; judge all runs on the same data"
            )


def differing_settings(runs: Runs) -> dict[str, dict[str, Any]]:
    """The settings that are not the same in all runs.

    They are the scripts' settings. If a run was made by no script, they are the fits' ``config``.

    Returns:
        By setting, its value in every run that has it.
    """
    trees = trees_of(runs)
    scripts = all("settings" in tree.attrs for tree in trees.values())
    settings = {run: _settings(tree) if scripts else _config(tree) for run, tree in trees.items()}
    names = dict.fromkeys(name for values in settings.values() for name in values)
    by_name = {n: {run: v[n] for run, v in settings.items() if n in v} for n in names}
    return {
        name: values
        for name, values in by_name.items()
        if len(values) < len(trees) or len({json.dumps(v) for v in values.values()}) > 1
    }


# --- numbers --------------------------------------------------------------------------------------


def elpd(tree: DataTree) -> ELPDData | None:
    """The held-out log density as ``arviz.compare`` takes it, or None without one.

    It is the ``log_predictive_density``, or else the ``log_likelihood``. Held-out data need no
    leaving-one-out: log p(x_i | c_i) of a datum that was not trained on is its log predictive
    density. Seeds are averaged datum by datum, and k-hat is the worst seed's.

    ``arviz.compare`` of the trees themselves is another comparison: it leaves out each datum of
    the training in turn, and reads the group ``log_likelihood``.
    """
    found = [judged for name in DENSITIES if (judged := _judged(tree, name)) is not None]
    return found[-1] if found else None


def compare(runs: Runs, data: Any = None) -> DataFrame:
    """One row for each run, from the best to the worst.

    The best has the greatest log density of held-out data: the log-likelihood, or with global sites
    the log predictive density. If a run has neither, the best has the greatest ELBO. The arithmetic
    is ``arviz.compare``'s, divided by the number of data.

    Args:
        runs: fits, trees of ``to_datatree``, or objects with a ``.tree``, by name.
        data: held-out arrays by name. Each fit is judged on the arrays that it takes, by
            ``elbo_terms`` (``pointwise_elbo`` if it sums over a latent site) and
            ``log_likelihood`` (``log_predictive_density`` if it has global sites) with their
            defaults. Trees were judged before.

    Returns:
        A frame with the runs' names as its index. Its columns are in nats per datum, except the
        names and the last two:

        - model, guide, objective: their settings, or else their classes
        - elbo, elbo_se: the ELBO of the judged data, averaged over seeds, and its standard error
          over data
        - log_likelihood, log_likelihood_se: the same for the log-likelihood
        - log_predictive_density, log_predictive_density_se: the same for that density
        - difference, difference_se: the difference to the best run, and the standard error of the
          mean of *paired* differences over data
        - pareto_k_share: the share of data (and seeds) with too high a k-hat
        - seconds: training, without compilation

        A number that a run lacks is NaN.

    Raises:
        TypeError: a run is none of these.
        ValueError: fewer than two runs, runs on other data, a run without numbers, or fits
            without data.

    Example:
        >>> compare({"flow": fit_flow, "mean field": fit_mean_field}, {"x": test})
    """
    import pandas as pd

    _check_runs(runs, data)
    trees = trees_of(runs, data)
    for name, tree in trees.items():
        _check_judged(name, tree)
    check_same_data(trees)
    table = pd.DataFrame(
        [
            {name: _name(tree, name) for name in ("model", "guide", "objective")}
            for tree in trees.values()
        ],
        index=pd.Index(trees, name="run"),
    )
    judged = {name: _numbers(trees, name) for name in ("elbo", *DENSITIES)}
    for name, numbers in judged.items():
        compared = _compare(numbers) if numbers else pd.DataFrame(columns=["mlpd", "se"])
        table[name], table[f"{name}_se"] = compared["mlpd"], compared["se"]
    table["difference"] = table["difference_se"] = np.nan
    densities: dict[str, ELPDData] = {}
    for name in DENSITIES:  # as in elpd: the later one counts
        densities |= judged[name]
    known = densities if len(densities) == len(trees) else judged["elbo"]
    if len(known) == len(trees):
        compared = _compare(known)
        table["difference"], table["difference_se"] = compared["mlpd_diff"], compared["dse"]
        table = table.loc[compared.index]
    table["pareto_k_share"] = [_pareto_k_share(trees[run]) for run in table.index]
    table["seconds"] = [_seconds(trees[run]) for run in table.index]
    return table[
        [
            *("model", "guide", "objective", "elbo", "elbo_se"),
            *(column for name in DENSITIES for column in (name, f"{name}_se")),
            *("difference", "difference_se", "pareto_k_share", "seconds"),
        ]
    ]


def what_differs(table: DataFrame) -> str:
    """The number that a table's differences are of, in words.

    Args:
        table: what ``compare`` returned.
    """
    names = list(DENSITIES)
    if table[names].isna().all(axis=1).any():
        return "ELBO"
    return DENSITIES[[name for name in names if table[name].notna().any()][-1]]


# --- pictures -------------------------------------------------------------------------------------


def plot_differences(table: DataFrame) -> PlotCollection:
    """``arviz.plot_compare`` of the differences to the best run, nats per datum."""
    from arviz_plots import plot_compare

    frame = table.rename(columns={"difference": "mlpd_diff", "difference_se": "dse"})
    plot = plot_compare(
        frame[["mlpd_diff", "dse"]],
        backend="matplotlib",
        visuals={"labels": False, "title": False},
        figure_kwargs={"figsize": (7, 1.6 + 0.4 * len(frame)), "layout": "constrained"},
    )
    axes = plot.viz["plot"].item()
    axes.set_xlabel(f"{what_differs(table)}: difference to the best run (nats per datum)")
    axes.set_title("one paired standard error over the data to either side", fontsize="medium")
    return plot


def plot_elbo(runs: Runs) -> PlotCollection:
    """ELBO traces against steps and against seconds, with ArviZ's ``PlotCollection``.

    A line is the mean over seeds. Its band goes from the least to the greatest seed. A training
    trace is averaged in at most 100 windows. Seconds are the training's, spread evenly over its
    steps: every step is the same compiled program.

    Args:
        runs: fits, trees of ``to_datatree``, or objects with a ``.tree``, by name.

    Raises:
        ValueError: a run without a training trace.
    """
    import xarray as xr
    from arviz_plots.plot_collection import PlotCollection
    from arviz_plots.visuals import fill_between_y, line_xy

    trees = trees_of(runs)
    untrained = [name for name, tree in trees.items() if "sample_stats" not in tree.children]
    if untrained:
        raise ValueError(
            f"runs: expected a training trace in every run, got none in {', '.join(untrained)}; "
            f"leave out fits that were not trained"
        )
    lines, kinds = [], {}
    for tree in trees.values():
        last = int(tree["sample_stats"].dataset["draw"][-1])
        rate = _seconds(tree) / last
        parts = []
        for kind, trace in _traces(tree).items():
            kinds[kind] = None
            steps = trace["draw"].values
            seeds = trace.values
            seen = np.isfinite(seeds).any(0)
            low, mean, high = (
                np.where(seen, f(np.where(seen, seeds, 0), axis=0), np.nan)
                for f in (np.nanmin, np.nanmean, np.nanmax)
            )
            x = np.stack([steps, steps * rate])
            parts.append(
                xr.Dataset(
                    {
                        name: (("axis", "point"), np.broadcast_to(values, x.shape))
                        for name, values in zip(
                            ("x", "low", "elbo", "high"), (x, low, mean, high), strict=True
                        )
                    }
                ).assign_coords(point=np.arange(len(steps)), trace=kind)
            )
        lines.append(xr.concat(parts, "trace", join="outer"))
    dataset = xr.concat(lines, xr.Variable("run", list(trees)), join="outer")
    dataset = dataset.sel(trace=list(kinds)).assign_coords(axis=["step", "seconds"])

    elbo = dataset[["elbo"]]
    plot = PlotCollection.wrap(
        elbo,
        cols=["axis"],
        backend="matplotlib",
        aes={"color": ["run"], "linestyle": ["trace"]},
        linestyle=["-", "--"],
        figure_kwargs={"figsize": (11, 4.5), "sharey": True, "layout": "constrained"},
    )
    plot.map(
        fill_between_y,
        "band",
        x=dataset["x"],
        y_bottom=dataset["low"],
        y_top=dataset["high"],
        alpha=0.25,
    )
    plot.map(line_xy, "elbo", x=dataset["x"], width=1.2)
    several = any(tree["sample_stats"].sizes["chain"] > 1 for tree in trees.values())
    title = "run (band: least to greatest seed)" if several else "run"
    plot.add_legend("run", title=title, loc="outside lower left", ncols=min(4, len(trees)))
    plot.add_legend(
        "trace", title="ELBO", loc="outside lower right", visual_kwargs={"color": "black"}
    )
    axes = plot.viz["plot"]
    for name, label in (
        ("step", "training (steps)"),
        ("seconds", "training without compilation (seconds)"),
    ):
        axes.sel(axis=name).item().set_xlabel(label)
    first = axes.sel(axis="step").item()
    first.set_ylabel("ELBO (nats per datum)")
    first.set_ylim(_limits(dataset))
    return plot


# --- checks ---------------------------------------------------------------------------------------


def _check_runs(runs: Runs, data: Any) -> None:
    if not isinstance(runs, Mapping):
        return  # trees_of refuses it
    if len(runs) < 2:
        raise ValueError(f"runs: expected at least two, got {len(runs)}; give each a name")
    fits = [name for name, run in runs.items() if isinstance(run, Fit)]
    if fits and data is None:
        raise ValueError(
            f"data: expected arrays to judge the fits {', '.join(fits)} on, got None; give the "
            f"held-out data"
        )
    if data is not None and not fits:
        raise ValueError(
            f"data: expected None for runs that are judged already, got {type(data).__name__}; "
            f"leave data out, or give the fits"
        )


def _check_judged(name: str, tree: DataTree) -> None:
    if all(_evaluation(tree, known) is None for known in ("elbo", *DENSITIES)):
        raise ValueError(
            f"runs: expected an ELBO or a log-likelihood by datum in the group evaluation of every "
            f"run, got neither in {name}; pass what elbo_terms or log_likelihood returns: "
            f"to_datatree(fit, elbo_terms(fit, data))"
        )


def _judged_data(name: str, tree: DataTree) -> dict[str, str]:
    """The type, shape and hash of each array that was judged."""
    attrs = tree["evaluation"].attrs if "evaluation" in tree.children else {}
    if "data" not in attrs:
        raise ValueError(
            f"runs: expected the hashes of the judged data in the group evaluation of every run, "
            f"got none in {name}; make its tree anew: to_datatree(fit, elbo_terms(fit, data))"
        )
    return json.loads(attrs["data"])


# --- one tree -------------------------------------------------------------------------------------


def _settings(tree: DataTree) -> dict[str, Any]:
    return json.loads(tree.attrs.get("settings", "{}"))


def _config(tree: DataTree) -> dict[str, Any]:
    """The settings of ``fit``, as the attributes keep them."""
    config = {}
    for attribute, value in tree.attrs.items():
        prefix, _, name = str(attribute).partition(".")
        if prefix == "config":
            is_json = str(value).startswith(("{", "[")) or value in ("null", "true", "false")
            config[name] = json.loads(value) if is_json else np.asarray(value).item()
    return config


def _name(tree: DataTree, what: str) -> str:
    """A model, guide or objective as the settings call it, or else its class or function."""
    settings = _settings(tree)
    described = str(tree.attrs.get(f"config.{what}", "")).removeprefix("null")
    own = described.split("(")[0].split(".<locals>")[0].split(".")[-1]
    if what == "model":
        own = str(tree.attrs.get("experiment", own))
        which = settings.get("preset") or settings.get("program")
        return f"{own} {which}" if which else own
    return str(settings.get(what) or own)


def _seconds(tree: DataTree) -> float:
    seconds = json.loads(tree.attrs.get("info.seconds", "{}"))
    return float(seconds.get("run", np.nan))


def _evaluation(tree: DataTree, name: str) -> DataArray | None:
    """A judged number, (chain, data)."""
    if "evaluation" not in tree.children or name not in tree["evaluation"].data_vars:
        return None
    return tree["evaluation"].dataset[name]


def _judged(tree: DataTree, name: str) -> ELPDData | None:
    """A judged number as ``arviz.compare`` takes it, or None without one."""
    values = _evaluation(tree, name)
    if values is None:
        return None
    pareto_k = _evaluation(tree, "pareto_k") if name == "log_likelihood" else None
    if pareto_k is not None:
        pareto_k = pareto_k.max("chain", skipna=False)
    return _elpd(_seed_mean(values), _num_samples(tree, name), pareto_k)


def _numbers(trees: Trees, name: str) -> dict[str, ELPDData]:
    """A judged number of the runs that have it."""
    found = {run: _judged(tree, name) for run, tree in trees.items()}
    return {run: numbers for run, numbers in found.items() if numbers is not None}


def _num_samples(tree: DataTree, name: str) -> int:
    """How many draws are behind a judged number."""
    return int(tree["evaluation"].attrs[f"num_samples.{name}"])


def _seed_mean(values: DataArray) -> DataArray:
    return values.astype(np.float64).mean("chain", skipna=False)


def _pareto_k_share(tree: DataTree) -> float:
    pareto_k = _evaluation(tree, "pareto_k")
    if pareto_k is None:
        return np.nan
    good = pareto_k.values < pareto_k_threshold(_num_samples(tree, "pareto_k"))
    return float((~good).mean())


def _elpd(pointwise: DataArray, num_samples: int, pareto_k: Any) -> ELPDData:
    from arviz_stats.utils import ELPDData

    values, size = pointwise.values, pointwise.size
    with np.errstate(invalid="ignore"):  # a number that is not finite has no standard error
        deviation = float(values.std())
    return ELPDData(
        elpd=float(values.sum()),
        se=float(np.sqrt(size)) * deviation,
        p=np.nan,  # effective parameters: LOO subtracts them, and nothing is subtracted here
        n_samples=num_samples,
        n_data_points=size,
        scale="log",
        warning=False,
        good_k=pareto_k_threshold(num_samples),
        elpd_i=pointwise,
        pareto_k=pareto_k,
    )


def _compare(judged: Mapping[str, ELPDData]) -> DataFrame:
    """``arviz.compare`` per datum: mlpd, se, mlpd_diff and dse, from the best run to the worst."""
    from arviz_stats.loo import compare

    # Stacking, the default, exponentiates the pointwise values: those of images underflow.
    table = compare(dict(judged), method="pseudo-BMA", round_to="none")
    size = next(iter(judged.values())).n_data_points
    table["mlpd"] = table["elpd"] / size
    table["mlpd_diff"] = table["elpd_diff"] / size
    for column in ("se", "dse"):
        table[column] /= size
    # ArviZ leaves out data with a difference that is not finite.
    finite = [np.isfinite(judged[run].elpd) for run in table.index]
    table.loc[~np.array(finite) | ~finite[0], ["mlpd_diff", "dse"]] = np.nan
    return table


def _traces(tree: DataTree) -> dict[str, DataArray]:
    """The traces, (chain, draw), by their names in the legend. The training's is averaged."""
    trace = tree["sample_stats"].dataset["elbo"]
    window = -(-trace.sizes["draw"] // NUM_WINDOWS)
    means = trace.coarsen(draw=window, boundary="trim", side="right").mean()
    traces = {f"training (mean of each of up to {NUM_WINDOWS} windows)": means}
    if "validation_stats" in tree.children:
        traces["held out"] = tree["validation_stats"].dataset["elbo"]
    return traces


def _limits(dataset: Dataset) -> tuple[float, float]:
    """The limits of the ELBO axis. They leave out each run's first steps, which may be far off.

    These are the first twentieth of a run.
    """
    steps = dataset["x"].sel(axis="step")
    later = dataset.where(steps > 0.05 * steps.max(("point", "trace")))
    low, high = float(later["low"].min()), float(dataset["high"].max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
