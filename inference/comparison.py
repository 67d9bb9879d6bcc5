"""Fits side by side: pure functions of the trees of ``to_datatree``, by the runs' names.

What they read of a tree: ``sample_stats`` and ``validation_stats`` (traces), ``evaluation`` and
``log_likelihood`` (numbers by datum), and of the root's attributes what ``fit`` wrote and

=============  ===================================================================================
``data``       JSON: of each array that was judged its type, shape and hash
``dataset``    the data set's name
``settings``   JSON: the settings of the run by name
``num_samples`` draws of z per datum behind ``log_likelihood``
=============  ===================================================================================

What a tree lacks is NaN, or an empty string, in the result.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.evaluation import pareto_k_threshold

if TYPE_CHECKING:
    from arviz_plots.plot_collection import PlotCollection
    from arviz_stats.utils import ELPDData
    from pandas import DataFrame
    from xarray import DataArray, Dataset, DataTree
else:  # a second or two to import
    DataArray = DataFrame = Dataset = DataTree = ELPDData = PlotCollection = Any

Trees = Mapping[str, DataTree]

NUM_WINDOWS = 100  # of a training trace, at most, of each of which a picture shows the mean


def check_same_data(trees: Trees) -> None:
    """Raises where two runs were not judged on the same data.

    The arrays that both runs know must have the same names, types, shapes and values. A run may
    know arrays besides: log p(x | c) and log p(x) are densities of the same x.

    Raises:
        ValueError: it names the two runs and what differs.
    """
    (first, a), *others = trees.items()
    for name, b in others:
        for attribute in ("dataset", "data"):
            for run, tree in ((first, a), (name, b)):
                if attribute not in tree.attrs:
                    raise ValueError(
                        f"runs: expected the attribute {attribute!r} in every run's trace.nc, and "
                        f"{run} has none; compare runs of one model each, written by this version"
                    )
        pairs = {"data set": (a.attrs["dataset"], b.attrs["dataset"])}
        ours, theirs = json.loads(a.attrs["data"]), json.loads(b.attrs["data"])
        pairs |= {f"array {n}": (ours[n], theirs[n]) for n in sorted(ours.keys() & theirs.keys())}
        differ = [f"{what} is {p}, and {q}" for what, (p, q) in pairs.items() if p != q]
        if not ours.keys() & theirs.keys():
            differ.append(f"arrays are {sorted(ours)}, and {sorted(theirs)}")
        if differ:
            raise ValueError(
                f"runs: expected the same test data, got others in {first} and {name}: "
                f"{'; '.join(differ)}; compare runs on one and the same data"
            )


def differing_settings(trees: Trees) -> dict[str, dict[str, Any]]:
    """The settings that are not the same in all runs: by setting, the value in every run that
    has it.
    """
    settings = {run: _settings(tree) for run, tree in trees.items()}
    names = dict.fromkeys(name for values in settings.values() for name in values)
    by_name = {n: {run: v[n] for run, v in settings.items() if n in v} for n in names}
    return {
        name: values
        for name, values in by_name.items()
        if len(values) < len(trees) or len({json.dumps(v) for v in values.values()}) > 1
    }


def elpd(tree: DataTree) -> ELPDData | None:
    """The held-out log-likelihood as ``arviz.compare`` takes it, or None without one.

    Held-out data need no leaving-one-out: log p(x_i | c_i) of a datum that was not trained on is
    its log predictive density. ``arviz.compare`` on the trees themselves would take the seeds for
    posterior draws and the test data for training data.

    Seeds are averaged datum by datum; k-hat is the worst seed's.
    """
    if "log_likelihood" not in tree.children:
        return None
    (values,) = tree["log_likelihood"].dataset.data_vars.values()
    num_samples = int(tree.attrs.get("num_samples", 0))
    pareto_k = _evaluation(tree, "pareto_k")
    if pareto_k is not None:
        pareto_k = pareto_k.max("chain", skipna=False)
    return _elpd(
        values.astype(np.float64).mean(("chain", "draw"), skipna=False), num_samples, pareto_k
    )


def compare(trees: Trees) -> DataFrame:
    """One row for each run, from the best to the worst.

    The best has the greatest log-likelihood, or the greatest ELBO if not every run has a
    log-likelihood. The arithmetic is ``arviz.compare``'s, divided by the number of data.

    Returns:
        A frame whose index are the runs' names. Its columns, in nats per datum but for the last
        two:

        - model, guide, objective: their settings, or else their classes
        - elbo, elbo_se: on the data that were judged, the mean over seeds, and its standard error
          over data
        - log_likelihood, log_likelihood_se: likewise
        - difference, difference_se: to the best run, with the standard error of the mean of
          *paired* differences over data
        - pareto_k_share: the share of data (and seeds) whose k-hat is too high
        - seconds: training, compilation apart

    Raises:
        ValueError: fewer than two runs, or runs on other data.
    """
    import pandas as pd

    if len(trees) < 2:
        raise ValueError(f"runs: expected at least two, got {len(trees)}")
    check_same_data(trees)
    bounds = {run: _evaluation(tree, "elbo") for run, tree in trees.items()}
    columns = {
        "elbo": {
            run: None
            if elbo is None
            else _elpd(elbo.astype(np.float64).mean("chain", skipna=False), 1, None)
            for run, elbo in bounds.items()
        },
        "log_likelihood": {run: elpd(tree) for run, tree in trees.items()},
    }
    table = pd.DataFrame(
        [
            {name: _name(tree, name) for name in ("model", "guide", "objective")}
            for tree in trees.values()
        ],
        index=pd.Index(trees, name="run"),
    )
    table["difference"] = table["difference_se"] = np.nan
    for column, judged in columns.items():  # the log-likelihood's differences come last, and stay
        judged = {run: data for run, data in judged.items() if data is not None}
        compared = _compare(judged) if judged else pd.DataFrame(columns=["mlpd", "se"])
        table[column], table[f"{column}_se"] = compared["mlpd"], compared["se"]
        if len(judged) == len(trees):
            table["difference"], table["difference_se"] = compared["mlpd_diff"], compared["dse"]
            table = table.loc[compared.index]
    table["pareto_k_share"] = [_pareto_k_share(trees[run]) for run in table.index]
    table["seconds"] = [_seconds(trees[run]) for run in table.index]
    return table[
        [
            *("model", "guide", "objective", "elbo", "elbo_se"),
            *("log_likelihood", "log_likelihood_se", "difference", "difference_se"),
            *("pareto_k_share", "seconds"),
        ]
    ]


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
    what = "ELBO" if table["log_likelihood"].isna().any() else "log-likelihood"
    axes = plot.viz["plot"].item()
    axes.set_xlabel(f"{what}: difference to the best run (nats per datum)")
    axes.set_title("one paired standard error over the data to either side", fontsize="medium")
    return plot


def plot_elbo(trees: Trees) -> PlotCollection:
    """ELBO traces against steps and against seconds, with ArviZ's ``PlotCollection``.

    Lines are means over seeds and bands go from the least to the greatest seed. The recorded
    steps of a training trace are averaged in at most 100 windows. Seconds are the training's,
    spread evenly over its steps: every step is the same compiled program.
    """
    import xarray as xr
    from arviz_plots.plot_collection import PlotCollection
    from arviz_plots.visuals import fill_between_y, line_xy

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
    for name, label in (("step", "step"), ("seconds", "training time, s, compilation apart")):
        axes.sel(axis=name).item().set_xlabel(label)
    first = axes.sel(axis="step").item()
    first.set_ylabel("ELBO (nats per datum)")
    first.set_ylim(_limits(dataset))
    return plot


# --- one tree -------------------------------------------------------------------------------------


def _settings(tree: DataTree) -> dict[str, Any]:
    return json.loads(tree.attrs.get("settings", "{}"))


def _name(tree: DataTree, what: str) -> str:
    """A model, guide or objective as the settings call it, or else its class or function."""
    settings = _settings(tree)
    described = str(tree.attrs.get(f"config.{what}", ""))
    own = described.split("(")[0].split(".<locals>")[0].split(".")[-1]
    if what == "model":
        own = str(tree.attrs.get("experiment", own))
        preset = settings.get("preset")
        return f"{own} {preset}" if preset else own
    return str(settings.get(what) or own)


def _seconds(tree: DataTree) -> float:
    seconds = tree.attrs.get("info.seconds")
    return float(json.loads(seconds)["run"]) if seconds else np.nan


def _evaluation(tree: DataTree, name: str) -> DataArray | None:
    """(chain, datum)."""
    if "evaluation" not in tree.children or name not in tree["evaluation"].data_vars:
        return None
    return tree["evaluation"].dataset[name]


def _pareto_k_share(tree: DataTree) -> float:
    pareto_k = _evaluation(tree, "pareto_k")
    if pareto_k is None:
        return np.nan
    good = pareto_k.values < pareto_k_threshold(int(tree.attrs["num_samples"]))
    return float((~good).mean())


def _elpd(pointwise: DataArray, num_samples: int, pareto_k: Any) -> ELPDData:
    from arviz_stats.utils import ELPDData

    values, size = pointwise.values, pointwise.size
    with np.errstate(invalid="ignore"):  # of a number that is not finite there is no error
        deviation = float(values.std())
    return ELPDData(
        elpd=float(values.sum()),
        se=float(np.sqrt(size)) * deviation,
        p=np.nan,  # effective parameters: what LOO takes off, and nothing is taken off here
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
    # ArviZ leaves data out whose difference is not finite.
    finite = [np.isfinite(judged[run].elpd) for run in table.index]
    table.loc[~np.array(finite) | ~finite[0], ["mlpd_diff", "dse"]] = np.nan
    return table


def _traces(tree: DataTree) -> dict[str, DataArray]:
    """(chain, draw) by what they are, the training's averaged in windows."""
    trace = tree["sample_stats"].dataset["elbo"]
    window = -(-trace.sizes["draw"] // NUM_WINDOWS)
    means = trace.coarsen(draw=window, boundary="trim", side="right").mean()
    traces = {f"training (mean of each of up to {NUM_WINDOWS} windows)": means}
    if "validation_stats" in tree.children:
        traces["held out"] = tree["validation_stats"].dataset["elbo"]
    return traces


def _limits(dataset: Dataset) -> tuple[float, float]:
    """Of the ELBO axis: all but the first twentieth of each run, where it may rise from far."""
    steps = dataset["x"].sel(axis="step")
    later = dataset.where(steps > 0.05 * steps.max(("point", "trace")))
    low, high = float(later["low"].min()), float(dataset["high"].max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
