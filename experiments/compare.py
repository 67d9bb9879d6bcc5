"""Set runs on the same data side by side: what each reached, by how much, in what time.

    python experiments/compare.py runs/a runs/b --out runs/a-and-b

Prints a table, from the best run to the worst, and the settings that differ. With ``--out`` the
table goes there too, with figures of the ELBO traces and of the differences. The functions behind
it are in ``inference/comparison.py``. They take fits, runs and trees.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate
from tyro.conf import Positional

from experiments import runs
from experiments.experiment import DataTree, Figure
from experiments.settings import command_line
from inference import comparison
from inference.evaluation import FEWEST_FOR_TAIL

if TYPE_CHECKING:
    from pandas import DataFrame
else:  # slow to import
    DataFrame = Any


@dataclass(frozen=True)
class Config:
    """Set runs on the same data side by side.

    Attributes:
        runs: Directories of two or more finished runs.
        out: New directory for the table and the figures. Default: nothing is written.
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
        for name, figure in figures(trees, compared).items():
            figure.savefig(config.out / f"{name}.png", dpi=120)
        print(f"written to {config.out}")
    return result


def read(paths: tuple[Path, ...]) -> dict[str, DataTree]:
    """The runs' trees by the directories' names, or by their paths where names are the same.

    Raises:
        ValueError: a directory without a finished run.
    """
    names = [path.resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    return {name: runs.read_tree(path) for name, path in zip(names, paths, strict=True)}


def table(compared: DataFrame, differing: dict[str, dict[str, Any]], trees: Any) -> str:
    """The comparison as a person reads it; a dash where a run has no such number."""
    densities = [n for n in comparison.DENSITIES if compared[n].notna().any()]
    rows = [
        (
            *(run, row["model"], row["guide"], row["objective"]),
            runs.plus_minus(row["elbo"], row["elbo_se"]),
            *(runs.plus_minus(row[name], row[f"{name}_se"]) for name in densities),
            runs.plus_minus(row["difference"], row["difference_se"], "+") if i else "best",
            runs.plus_minus(row["pareto_k_share"], digits=4),
            runs.plus_minus(row["seconds"], digits=1),
        )
        for i, (run, row) in enumerate(compared.to_dict("index").items())
    ]
    headers = (
        *("run", "model", "guide", "objective", "ELBO"),
        *(comparison.DENSITIES[name] for name in densities),
        *("difference", "k-hat too high", "seconds"),
    )
    align = ["left"] * 4 + ["right"] * (len(headers) - 4)
    body = tabulate(rows, headers, disable_numparse=True, colalign=align)
    settings = tabulate(
        [
            (name, *(runs.written(values[run]) if run in values else "-" for run in compared.index))
            for name, values in differing.items()
        ],
        ("setting", *compared.index),
        disable_numparse=True,
    )
    first = next(iter(trees.values()))
    size = first["evaluation"].sizes["data"] if "evaluation" in first.children else 0
    no_k = (
        f"; - with fewer than {FEWEST_FOR_TAIL} samples or none"
        if compared["pareto_k_share"].isna().any()
        else ""
    )
    return (
        f"\n{first.attrs['dataset']}: {size} data that were judged\n\n{body}\n\n"
        f"+-: standard error over the data; nats per datum, seeds averaged\n"
        f"difference: {comparison.what_differs(compared)} less the best run's, with the error of "
        f"paired differences\n"
        f"k-hat too high: the share of data whose log-likelihood the guide's draws estimate "
        f"badly{no_k}\n"
        f"seconds: training of all seeds, without compilation\n"
        + (f"\n{settings}\n" if differing else "\nthe settings are the same\n")
    )


def figures(trees: dict[str, DataTree], compared: DataFrame) -> dict[str, Figure]:
    """The ELBO traces, and the differences with their errors."""
    elbo = comparison.plot_elbo({run: trees[run] for run in compared.index})
    differences = comparison.plot_differences(compared)
    plots = {"elbo": elbo, "differences": differences}
    return {name: plot.viz["figure"].item() for name, plot in plots.items()}


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}


if __name__ == "__main__":
    command_line(main, Config)
