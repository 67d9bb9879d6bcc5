"""Climb the ladder of log-likelihoods: importance weights, stochastic layers, priors, flows.

    python experiments/ladder.py --rung vae hvae vamp --num-epochs 5

A rung is one word. It stands for settings of ``experiments/mnist_vae.py``: ``RUNGS`` has them. Each
rung is a run of that script, in its own directory below ``--out``. All rungs have the same data,
epochs and draws of the judge. So their differences are paired, image by image. A command that was
killed goes on where it was: finished rungs are read.

    runs.load("runs/ladder-20261124-101500/vamp").fit

By default the trainings are short, for two cores. With ``--full`` they are as long as in the
papers, for a GPU. Some rungs need ``--full``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments import devices, mnist_vae, pictures, runs
from experiments.experiment import Figure
from experiments.images import active_units
from experiments.runner import run_many
from experiments.settings import Machines, check_least, command_line

FILES = ("ladder.json", "ladder.png", "samples.png")  # beside the directories of the rungs
NUM_SAMPLES_SHOWN = 12
WARM_UP = 0.2  # share of the epochs over which the weight of the divergence rises

EXEMPLAR = "Norouzi, Fleet & Norouzi 2020 (Exemplar VAE), table of 3 runs, 5,000 samples"
BURDA = "Burda et al. 2016, table 1, 5,000 samples"
SYLVESTER = "van den Berg et al. 2018 (Sylvester flows), convolutional, recalled"
TOMCZAK = "Tomczak & Welling 2018, static MNIST, recalled"

# Protocols of the papers.
OF_TOMCZAK: Mapping[str, Any] = {
    "num_epochs": 2000,
    "kl_warm_up": 100.0,
    "patience": 50,
    "batch_size": 100,
    "learning_rate": 5e-4,
    "schedule": "constant",
}
OF_BURDA: Mapping[str, Any] = {
    "num_epochs": 3280,
    "kl_warm_up": 0.0,
    "patience": None,
    "batch_size": 20,
    "learning_rate": 1e-3,
    "schedule": "burda",
}


@dataclass(frozen=True)
class Rung:
    """One model, guide and objective.

    Attributes:
        words: what it is.
        settings: of ``experiments.mnist_vae.Config``.
        published: by data set, a test log-likelihood in nats per image and its source.
        protocol: the paper's, for ``--full``.
        only_full: whether it trains for too long on two cores.
    """

    words: str
    settings: Mapping[str, Any]
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=lambda: OF_TOMCZAK)
    only_full: bool = False


def _weighted(preset: str, num_particles: int) -> dict[str, Any]:
    settings = {"preset": preset, "objective": "importance-weighted"}
    return settings | {"num_particles": num_particles, "kl_warm_up": 0.0}  # no divergence to weigh


_GATED = {"preset": "tomczak"}
_TWO = {"preset": "tomczak-two-layers", "guide": "structured", "guide_hidden": 300}
_CONV = {"channels": (32, 64)}
_BOTTOM_UP = {"preset": "burda-two-layers", "guide": "bottom-up"}
_OTHER = "; other sizes: its VAE has -86.76"

RUNGS: dict[str, Rung] = {
    "vae": Rung(
        "one layer, prior N(0, I), mean field",
        _GATED,
        {"mnist": (-84.45, EXEMPLAR), "static-mnist": (-88.56, TOMCZAK)},
    ),
    "iwae-5": Rung(
        "vae, importance-weighted, K = 5",
        _weighted("tomczak", 5),
        {"mnist": (-85.54, BURDA + _OTHER)},
    ),
    "iwae-50": Rung(
        "vae, importance-weighted, K = 50",
        _weighted("tomczak", 50),
        {"mnist": (-84.78, BURDA + _OTHER)},
        only_full=True,
    ),
    "hvae": Rung(
        "two layers, chain of mean fields",
        _TWO,
        {"mnist": (-82.39, EXEMPLAR), "static-mnist": (-86.05, TOMCZAK)},
    ),
    "vamp": Rung(
        "vae with a VampPrior",
        {**_GATED, "prior": "vamp"},
        {"mnist": (-82.43, EXEMPLAR), "static-mnist": (-85.57, TOMCZAK)},
    ),
    "hvamp": Rung(
        "hvae with a VampPrior",
        {**_TWO, "prior": "vamp"},
        {"mnist": (-81.56, EXEMPLAR), "static-mnist": (-83.19, TOMCZAK)},
    ),
    "iaf": Rung(
        "vae, guide an inverse autoregressive flow",
        {**_GATED, "guide": "inverse-autoregressive", "guide_hidden": 300},
        {"static-mnist": (-80.79, SYLVESTER + "; its VAE has -82.14")},
    ),
    "spline": Rung(
        "vae, guide a neural spline flow", {**_GATED, "guide": "neural-spline", "guide_hidden": 100}
    ),
    "mixture": Rung("vae, prior a mixture of 10 Normals", {**_GATED, "prior": "mixture"}),
    "flow-prior": Rung("vae, prior a flow", {**_GATED, "prior": "flow"}),
    "top-down": Rung("hvae, top-down guide", {"preset": "tomczak-two-layers", "guide": "top-down"}),
    "burda": Rung(
        "784-200-200-50, K = 1", {"preset": "burda"}, {"mnist": (-86.76, BURDA)}, OF_BURDA
    ),
    "burda-5": Rung(
        "784-200-200-50, K = 5", _weighted("burda", 5), {"mnist": (-85.54, BURDA)}, OF_BURDA
    ),
    "burda-50": Rung(
        "784-200-200-50, K = 50",
        _weighted("burda", 50),
        {"mnist": (-84.78, BURDA)},
        OF_BURDA,
        only_full=True,
    ),
    "burda-two": Rung(
        "two layers, bottom-up, K = 1", _BOTTOM_UP, {"mnist": (-85.33, BURDA)}, OF_BURDA
    ),
    "burda-two-5": Rung(
        "two layers, bottom-up, K = 5",
        _BOTTOM_UP | _weighted("burda-two-layers", 5),
        {"mnist": (-83.89, BURDA)},
        OF_BURDA,
    ),
    "burda-two-50": Rung(
        "two layers, bottom-up, K = 50",
        _BOTTOM_UP | _weighted("burda-two-layers", 50),
        {"mnist": (-82.90, BURDA)},
        OF_BURDA,
        only_full=True,
    ),
    "conv": Rung("vae with gated convolutions", {**_GATED, **_CONV}, only_full=True),
    "conv-hvae": Rung(
        "hvae with gated convolutions",
        {**_TWO, **_CONV},
        {"mnist": (-80.52, EXEMPLAR)},
        only_full=True,
    ),
    "conv-hvamp": Rung(
        "hvamp with gated convolutions",
        {**_TWO, **_CONV, "prior": "vamp"},
        {"mnist": (-79.67, EXEMPLAR)},
        only_full=True,
    ),
}


@dataclass(frozen=True)
class Config(Machines):
    """Settings of the ladder.

    Attributes:
        rung: Rungs to climb, one after the other: vae, iwae-5, iwae-50, hvae, vamp, hvamp, iaf,
            spline, mixture, flow-prior, top-down, burda, burda-5, burda-50, burda-two, burda-two-5,
            burda-two-50, conv, conv-hvae or conv-hvamp.
        dataset: Data set, as in mnist_vae.py: mnist, static-mnist, fashion-mnist, svhn, digits, the
            path of your own .npz, .npy or .csv file, or auto.
        data_dir: Directory with the data set's files, compressed or not, to read offline.
        num_validation: Images held out of the training. Default: the data set's usual number.
        num_train: Number of training images, the first ones. Default: all.
        num_test: Number of test images, the first ones. Default: all.
        likelihood: Likelihood of the pixels, as in mnist_vae.py. Default: the preset's.
        num_components: Pseudo-inputs of a VampPrior. Default: 500.
        num_epochs: Passes over the training images, at most. Default: 20, with --full the paper's.
        batch_size: Images per step. Default: 100, with --full the paper's.
        learning_rate: Learning rate of Adam at the first step. Default: 1e-3, falling to zero along
            a cosine; with --full the paper's.
        kl_warm_up: Epochs over which the weight of the KL divergence rises. Default: a fifth of
            them all, with --full the paper's. Importance weighting has none.
        full: Whether to train as the papers do. It takes days on two cores.
        num_samples: Importance samples per test image.
        num_seeds: Number of restarts of each rung.
        seed: Random seed of every rung.
        out: Directory of the rungs. Default: a new one in runs/.
        progress: Whether to show progress bars.
    """

    rung: tuple[str, ...] = ("vae", "iwae-5", "hvae", "vamp", "hvamp", "iaf")
    dataset: str = "auto"
    data_dir: Path | None = None
    num_validation: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    likelihood: str | None = None
    num_components: int | None = None
    num_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    kl_warm_up: float | None = None
    full: bool = False
    num_samples: int = 5000
    num_seeds: int = 1
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.rung or len({*self.rung}) < len(self.rung):
            raise ValueError(f"rung: expected one or more rungs, each once, got {self.rung}")
        for name in self.rung:
            if name not in RUNGS:
                raise ValueError(f"rung: expected some of {', '.join(RUNGS)}, got {name!r}")
            if RUNGS[name].only_full and not self.full:
                raise ValueError(
                    f"rung: expected one that two cores can train, got {name!r}; add --full, and "
                    f"take a GPU"
                )
        check_least(1, self, "num_components")
        for settings in self.settings().values():
            mnist_vae.Config(**settings)

    def common(self) -> dict[str, Any]:
        """The settings of ``mnist_vae.py`` that all rungs have."""
        shared = ("dataset", "data_dir", "num_validation", "num_train", "num_test", "likelihood")
        shared += ("num_samples", "num_seeds", "seed", "progress")
        return {name: getattr(self, name) for name in (*shared, *Machines.__dataclass_fields__)}

    def settings(self) -> dict[str, dict[str, Any]]:
        """The settings of ``mnist_vae.py`` by rung."""
        given = ("num_epochs", "batch_size", "learning_rate", "kl_warm_up")
        own = {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        found = {}
        for name in self.rung:
            rung = RUNGS[name]
            protocol = dict(rung.protocol) if self.full else _short(own.get("num_epochs", 20))
            vamp = rung.settings.get("prior") == "vamp"
            pseudo = {"num_components": self.num_components} if vamp else {}
            protocol |= own
            if "kl_warm_up" not in own:  # a short training warms up over all of its epochs at most
                protocol["kl_warm_up"] = float(min(protocol["kl_warm_up"], protocol["num_epochs"]))
            found[name] = self.common() | protocol | dict(rung.settings) | pseudo
        return found


def _short(num_epochs: int) -> dict[str, Any]:
    """The protocol for two cores."""
    return {
        "num_epochs": num_epochs,
        "kl_warm_up": WARM_UP * num_epochs,
        "batch_size": 100,
        "learning_rate": 1e-3,
    }


# --- the table ------------------------------------------------------------------------------------


def summarize(results: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The numbers of ``ladder.json``: a row for each rung.

    ``difference`` is what the log-likelihood gains over the rung before, paired by image.

    Args:
        results: what each ``result.json`` holds, by rung.
        out: the directory of the rungs.
    """
    rows, before = {}, None
    for name, result in results.items():
        evaluation: Any = runs.read_tree(out / name)["evaluation"]
        values = evaluation["log_likelihood"].to_numpy()
        values = values.reshape(values.shape[0], -1).mean(0, dtype=np.float64)
        row = {n: result[n] for n in ("log_likelihood", "elbo", "pareto_k", "layers", "seconds")}
        row |= {"num_parameters": result["num_parameters"], "num_steps": result["num_steps"]}
        row["published"] = RUNGS[name].published.get(result["dataset"])
        row["difference"] = None
        if before is not None:
            paired = values - before
            error = paired.std() / np.sqrt(len(paired))
            row["difference"] = {"estimate": float(paired.mean()), "standard_error": float(error)}
        rows[name], before = row, values
    first = next(iter(results.values()))
    known = ("dataset", "num_data", "device")
    return {name: first[name] for name in known} | {"rungs": rows}


def table(summary: Mapping[str, Any]) -> str:
    """The ladder as a person reads it."""
    body, sources = [], []
    for name, row in summary["rungs"].items():
        beside = ""
        if row["published"]:
            value, source = row["published"]
            sources += [] if source in sources else [source]
            beside = f"{value:.2f} [{sources.index(source) + 1}]"
        high = row["pareto_k"]
        body.append(
            (
                name,
                _number(row["log_likelihood"]),
                _number(row["difference"]),
                f"{-row['elbo']['estimate']:.2f}",
                active_units(row),
                f"{high['estimate']:.3f}" if high else "",
                f"{row['num_parameters']:,}",
                f"{row['seconds']['run']:,.0f}",
                beside,
            )
        )
    headers = ["rung", "log p(x)", "to the one before", "-ELBO", "active units", "k-hat too high"]
    headers += ["parameters", "training, s", "published"]
    text = tabulate(body, headers, disable_numparse=True, colalign=("left", *["right"] * 8))
    counts, samples = summary["num_data"], _samples(summary)
    words = (
        f"{summary['dataset']}: {counts['train']} training and {counts['test']} test data; nats "
        f"per datum, {samples} importance samples, ± one standard error over the test data"
    )
    notes = [f"[{i}] {source}" for i, source in enumerate(sources, start=1)]
    what = [f"{name}: {RUNGS[name].words}" for name in summary["rungs"]]
    return "\n".join([words, "", text, "", *notes, *what])


def _samples(summary: Mapping[str, Any]) -> int:
    return next(iter(summary["rungs"].values()))["log_likelihood"]["num_samples"]


def _number(value: Mapping[str, float] | None) -> str:
    return "" if value is None else f"{value['estimate']:.2f} ± {value['standard_error']:.2f}"


# --- figures --------------------------------------------------------------------------------------


def ladder(summary: Mapping[str, Any]) -> Figure:
    """The log-likelihood of every rung, with its ELBO and the published value."""
    from matplotlib.figure import Figure

    rungs = summary["rungs"]
    places = np.arange(len(rungs))
    figure = Figure(figsize=(8, 1.4 + 0.45 * len(rungs)), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("log_likelihood", f"log p(x), {_samples(summary)} importance samples", "o"),
        ("elbo", "ELBO", "|"),
    ):
        values = [row[name]["estimate"] for row in rungs.values()]
        errors = [row[name]["standard_error"] for row in rungs.values()]
        axes.errorbar(values, places, xerr=errors, fmt=style, capsize=3, label=label)
    published = [
        (row["published"][0], i) for i, row in enumerate(rungs.values()) if row["published"]
    ]
    if published:
        axes.plot(
            *zip(*published, strict=True),
            "x",
            color="black",
            label="published (sources: the table)",
        )
    words = [f"{name}\n{RUNGS[name].words}" for name in rungs]
    axes.set_yticks(places, words, fontsize="small")
    axes.invert_yaxis()
    axes.set(
        xlabel="nats per test datum (bars: one standard error over the data)",
        ylabel="rung",
        title=f"The ladder on {summary['dataset']}",
    )
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def samples(rungs: Sequence[str], out: Path) -> Figure:
    """Images from the prior of every rung, one row each: means of p(x | z)."""
    rows = []
    for name in rungs:
        fitted = runs.load(out / name).fit.isel(seed=0)
        means = pictures.from_prior(fitted, NUM_SAMPLES_SHOWN)
        rows.append(pictures.to_grey(fitted.model, means))
    return pictures.grid(
        np.stack(rows),
        "Means of p(x | z), z from the prior of each rung",
        x_label="draws of z",
        y_label="rung",
        row_labels=rungs,
    )


# --- the script -----------------------------------------------------------------------------------


def main(config: Config) -> dict[str, Any]:
    """Train and judge rungs of the ladder, and compare them image by image."""
    with devices.one_of_many(config):
        out = config.out or runs.new_directory(Path("runs"), "ladder")
        common = mnist_vae.Config(**config.common(), out=out)
        others = (*RUNGS, *FILES)
        results = run_many(mnist_vae.EXPERIMENT, common, config.settings(), others)
        if not devices.is_first():
            return results
        summary = summarize(results, out)
        runs.write_json(out / "ladder.json", summary)
        ladder(summary).savefig(out / "ladder.png", dpi=120)
        if results[config.rung[0]]["bits_per_dim"]:  # a table has no pictures
            samples(config.rung, out).savefig(out / "samples.png", dpi=120)
        print(f"\n{table(summary)}\nwritten to {out}")
        return summary


if __name__ == "__main__":
    command_line(main, Config)
