"""Set runs on the same data side by side: what each reached, by how much, in what time.

    python experiments/compare.py runs/a runs/b --out runs/a-and-b

Prints a table, from the best run to the worst, and the settings in which the runs differ. With
``--out`` the table goes there too, with pictures of the ELBO traces and of the differences. The
functions behind it are in ``inference/comparison.py`` and take any trees of ``to_datatree``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate
from tyro.conf import Positional

from experiments.runs import command_line
from inference import comparison
from inference.evaluation import FEWEST_FOR_TAIL

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataTree
else:  # slow to import
    DataFrame = DataTree = Any


@dataclass(frozen=True)
class Config:
    """Set runs on the same data side by side.

    Attributes:
        runs: the directories of two or more finished runs.
        out: a new directory for the table and the pictures; nothing is written unless given.
    """

    runs: Positional[tuple[Path, ...]]
    out: Path | None = None

    def __post_init__(self):
        if len({path.resolve() for path in self.runs}) < max(2, len(self.runs)):
            raise ValueError(
                f"runs: expected at least two directories, all of them different, got "
                f"{', '.join(map(str, self.runs)) or 'none'}"
            )


def main(config: Config) -> dict[str, Any]:
    """Set runs on the same data side by side."""
    if config.out and config.out.exists() and not _is_empty(config.out):
        raise ValueError(
            f"out: expected a new or empty directory, and {config.out} is none; give another"
        )
    trees = read(config.runs)
    compared = comparison.compare(trees)
    differing = comparison.differing_settings({run: trees[run] for run in compared.index})
    text = table(compared, differing, trees)
    print(text)
    result = {
        "data": next(iter(trees.values())).attrs["dataset"],
        "runs": {run: _plain(row) for run, row in compared.to_dict("index").items()},
        "settings": differing,
    }
    if config.out:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "comparison.txt").write_text(text)
        (config.out / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
        draw(trees, compared, config.out)
        print(f"written to {config.out}")
    return result


def read(runs: tuple[Path, ...]) -> dict[str, DataTree]:
    """The runs' trees by the directories' names, or by their paths where names are the same.

    Raises:
        ValueError: a directory without a finished run.
    """
    import arviz as az

    names = [path.resolve().name for path in runs]
    names = names if len(set(names)) == len(names) else [str(path) for path in runs]
    trees = {}
    for name, path in zip(names, runs, strict=True):
        if not (path / "trace.nc").exists():
            raise ValueError(
                f"runs: expected directories of finished runs, and {path} has no trace.nc; finish "
                f"the run by the command that began it"
            )
        with az.from_netcdf(path / "trace.nc", engine="h5netcdf") as tree:
            trees[name] = tree.load()
    return trees


def table(compared: DataFrame, differing: dict[str, dict[str, Any]], trees: Any) -> str:
    """The comparison as a person reads it; a dash where a run has no such number."""

    def number(value: float, error: float | None = None, sign: str = "", digits: int = 3) -> str:
        if np.isnan(value):
            return "-"
        if error:  # two of its digits
            digits = max(digits, int(1 - np.floor(np.log10(error))))
        written = f"{value:{sign}.{digits}f}"
        return written if error is None else f"{written} +- {error:.{digits}f}"

    rows = [
        (
            *(run, row["model"], row["guide"], row["objective"]),
            number(row["elbo"], row["elbo_se"]),
            number(row["log_likelihood"], row["log_likelihood_se"]),
            number(row["difference"], row["difference_se"], "+") if i else "best",
            number(row["pareto_k_share"], digits=4),
            number(row["seconds"], digits=1),
        )
        for i, (run, row) in enumerate(compared.to_dict("index").items())
    ]
    headers = (
        *("run", "model", "guide", "objective", "ELBO", "log likelihood"),
        *("difference", "k-hat too high", "seconds"),
    )
    body = tabulate(rows, headers, disable_numparse=True, colalign=("left",) * 4 + ("right",) * 5)
    settings = tabulate(
        [
            (name, *(_written(values[run]) if run in values else "-" for run in compared.index))
            for name, values in differing.items()
        ],
        ("setting", *compared.index),
        disable_numparse=True,
    )
    first = next(iter(trees.values()))
    size = first["evaluation"].sizes["datum"] if "evaluation" in first.children else 0
    what = "ELBO" if compared["log_likelihood"].isna().any() else "log likelihood"
    no_k = (
        f"; - with fewer than {FEWEST_FOR_TAIL} samples or none"
        if compared["pareto_k_share"].isna().any()
        else ""
    )
    return (
        f"\n{first.attrs['dataset']}: {size} data that were judged\n\n{body}\n\n"
        f"+-: standard error over the data; nats per datum, seeds averaged\n"
        f"difference: of the {what} to the best run's, with the error of paired differences\n"
        f"k-hat too high: the share of data whose log likelihood the guide's draws estimate "
        f"badly{no_k}\n"
        f"seconds: training of all seeds, compilation apart\n"
        + (f"\n{settings}\n" if differing else "\nthe settings are the same\n")
    )


def draw(trees: dict[str, DataTree], compared: DataFrame, directory: Path) -> None:
    """The pictures: ELBO traces, and differences with their errors."""
    import matplotlib.pyplot as plt

    for name, plot in (
        ("elbo", comparison.plot_elbo({run: trees[run] for run in compared.index})),
        ("differences", comparison.plot_differences(compared)),
    ):
        figure = plot.viz["figure"].item()
        figure.savefig(directory / f"{name}.png", dpi=120)
        plt.close(figure)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


if __name__ == "__main__":
    command_line(main, Config)
