"""One page about a fit: can it be believed?

``diagnose`` runs the judges and turns their numbers into findings: a sentence each, with its number
and what to try. A good fit gets none.
"""

import base64
import html
import io
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import random
from jaxtyping import Array
from tabulate import tabulate

from inference._data import Prepared
from inference._findings import Evidence, Finding, findings_of
from inference._judges import default_key, judged_data
from inference._progress import progress as progress_bar
from inference._settings import require_whole
from inference._simulate import conditions_among
from inference._streams import rows
from inference.annealing import bracket
from inference.calibration import plot_calibration, sbc
from inference.evaluation import (
    Estimate,
    difference,
    elbo_terms,
    log_likelihood,
    log_predictive_density,
    pointwise_log_likelihood,
)
from inference.fit import Fit, programs_of
from inference.gaps import inference_gap
from inference.generation import sample_posterior, sample_posterior_predictive
from inference.sites import length, observed_sources, spread_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # a second to import
    Figure = Any

REFUSALS = (ValueError, TypeError, NotImplementedError, FloatingPointError, MemoryError)
NUM_PICTURES = 8  # data in the posterior-predictive picture
FEWEST_TRAINING = 500  # training data that are judged, if there are so many
NUM_DRAWS = 20  # of the latents, where a few do
WORDS = {
    "elbo": "ELBO",
    "reconstruction": "reconstruction",
    "kl": "divergence",
    "density": "log p",
    "high_pareto_k": "share with a high k-hat",
    "training_elbo": "ELBO of training data",
    "exchange": "log p(x | z) lost by exchanging latents",
    "bracket": "log p by annealing, from below",
    "importance": "log p by importance sampling, same data",
    "width": "width of the bracket, simulated data",
    "total": "gap to log p",
    "approximation": "of it approximation (the family)",
    "amortisation": "of it amortisation (the encoder)",
}


@dataclass(frozen=True, repr=False)
class Page:
    """What ``diagnose`` found. A notebook shows it; ``print`` writes it; ``save`` keeps it.

    Attributes:
        title: the model and the guide.
        findings: what is wrong, the first thing to look at first. Empty for a good fit.
        numbers: by name, the estimate and its standard error. Nats per datum, or a share.
        notes: lines about the other numbers, such as unused dimensions.
        missing: by judge, why it has no answer.
        figures: by name.
    """

    title: str
    findings: tuple[Finding, ...]
    numbers: dict[str, tuple[float, float]]
    notes: tuple[str, ...]
    missing: dict[str, str]
    figures: dict[str, Figure]

    def __repr__(self) -> str:
        """The page as Markdown, without figures."""
        return "\n\n".join(self._parts())

    def _table(self, style: str) -> str:
        """The numbers, in a style of tabulate."""
        lines = [[WORDS[n], f"{a:.4f}", f"{e:.4f}"] for n, (a, e) in self.numbers.items()]
        headers = ("nats per datum, or a share", "estimate", "standard error")
        align = ("left", "right", "right")
        return tabulate(lines, headers, style, disable_numparse=True, colalign=align)

    def _parts(self) -> list[str]:
        found = [f"- **{f.name}.** {f}" for f in self.findings]
        parts = [f"# {self.title}", "## Findings", "\n".join(found) or "None."]
        parts += ["## Numbers", self._table("github"), *self.notes]
        if self.missing:
            reasons = [f"- {judge}: {why}" for judge, why in self.missing.items()]
            parts += ["## Not computed", "\n".join(reasons)]
        return parts

    def _repr_html_(self) -> str:
        """The page with its figures, for a notebook."""
        found = "".join(f"<li><b>{f.name}.</b> {html.escape(str(f))}</li>" for f in self.findings)
        pictures = (
            f'<p><img alt="{name}" src="data:image/png;base64,{_png(figure)}"/></p>'
            for name, figure in self.figures.items()
        )
        reasons = (f"<li>{n}: {html.escape(why)}</li>" for n, why in self.missing.items())
        return "".join(
            [
                f"<h3>{html.escape(self.title)}</h3><h4>Findings</h4>",
                f"<ul>{found}</ul>" if found else "<p>None.</p>",
                "<h4>Numbers</h4>",
                self._table("html"),
                *(f"<p>{html.escape(note)}</p>" for note in self.notes),
                *(["<h4>Not computed</h4><ul>", *reasons, "</ul>"] if self.missing else []),
                *pictures,
            ]
        )

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes ``diagnosis.md``, ``diagnosis.json`` and the figures.

        Returns:
            The path of ``diagnosis.md``.
        """
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        pictures = []
        for name, figure in self.figures.items():
            figure.savefig(path / f"diagnosis_{name}.png", dpi=120)
            pictures.append(f"![{name}](diagnosis_{name}.png)")
        (path / "diagnosis.md").write_text("\n\n".join([*self._parts(), *pictures]) + "\n")
        known = {
            "findings": [vars(finding) for finding in self.findings],
            "numbers": {
                name: {"estimate": a, "standard_error": e} for name, (a, e) in self.numbers.items()
            },
            "missing": self.missing,
        }
        (path / "diagnosis.json").write_text(json.dumps(known, indent=2) + "\n")
        return path / "diagnosis.md"


def diagnose(
    result: Fit,
    data: Any,
    *,
    train: Any = None,
    num_data: int = 100,
    num_simulations: int = 1000,
    num_samples: int = 1000,
    num_steps: int = 500,
    key: Array | None = None,
    progress: bool = True,
) -> Page:
    """One page of numbers, figures and findings about a fit, for any program.

    Of several seeds the best one is looked at, by its held-out ELBO. Without one it is the first.
    The page says what a judge cannot compute, and why.

    =====================  ======================================================================
    finding                a fit gets it if
    =====================  ======================================================================
    unfinished             the ELBO rose from the third quarter of the training to the last
    overfitted             the ELBO of the training data is higher
    ignored-latents        data may exchange their latents, and log p(x | z) stays
    unused-latents         the guide's mean of a dimension does not follow the data
    narrow-guide           ranks lie at both ends: the guide's deviations are too small
    wide-guide             ranks lie in the middle: they are too large
    biased-guide           the ranks are not uniform, though the deviations are right
    miscalibrated          only log p(x | z) ranks wrongly
    importance-sampling    k-hat is too high for over 10 % of the data, or annealing is higher
    approximation          the best guide of the family is below log p
    amortisation           the guide is below the best of its family
    =====================  ======================================================================

    A difference of ELBOs counts from 0.05 nats per datum and four standard errors on. Calibration
    counts at a joint p-value below 0.001.

    Args:
        result: what ``fit`` returned.
        data: held-out data as the programs take them, or ``result.prepare(data)``.
        train: training data likewise, to see whether the fit is overfitted. Without them the
            trace of the training tells, if it is one of the ELBO.
        num_data: how many data, spread evenly over all, for the judges that take long: bracket,
            gap and training ELBO.
        num_simulations: simulations of the calibration. A bracket is made of ``num_data`` / 2.
        num_samples: draws of the importance sampling on all data. Beside the bracket it has 5,000.
        num_steps: temperatures of the bracket.
        key: a random key. A fixed one by default.
        progress: whether to show progress.

    Raises:
        ValueError: data that the programs refuse.
    """
    for name, value in (("num_data", num_data), ("num_simulations", num_simulations)):
        require_whole(name, value, 2)
    one = _one_seed(result)
    judged = judged_data(one, data)
    some = rows(judged.arrays, spread_rows(length(judged.arrays), num_data))
    sample = Prepared(some) if judged.programs.takes_batches else data
    key = default_key(key, "diagnose")
    asked = _Asked(one, data, train, sample, num_data, num_simulations, num_samples, num_steps, key)
    evidence, missing, said = Evidence(one), {}, []
    with progress_bar(len(JUDGES), "judge", show=progress) as shown:
        for i, (name, judge) in enumerate(JUDGES.items()):
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", RuntimeWarning)
                    own = replace(asked, key=random.fold_in(key, i))
                    evidence = replace(evidence, **judge(own, evidence))
                said += [str(warning.message) for warning in caught]
            except REFUSALS as error:
                missing[name] = str(error).splitlines()[0].removeprefix(f"{name}: ")
            mean = evidence.elbo and f"{evidence.elbo.elbo.estimate[0]:.4f}"
            shown.update(i + 1, {"ELBO": mean} if mean else {})
    return Page(
        title=f"{_short(one.config['model'])}, guide {_short(one.config['guide'])}",
        findings=findings_of(evidence),
        numbers=_numbers(evidence),
        notes=(*_notes(evidence, result), *said),
        missing=missing,
        figures=_figures(asked, evidence, missing),
    )


def _short(words: str) -> str:
    return words if len(words) <= 60 else f"{words[:57]}..."


def _one_seed(result: Fit) -> Fit:
    known = result.validation_elbo
    return result.best() if known is not None and np.isfinite(known).any() else result.isel(seed=0)


# --- judges ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """What to diagnose, and how much of it.

    Attributes:
        one: a fit of one seed.
        data, train, num_data, num_simulations, num_samples, num_steps, key: as in ``diagnose``.
        sample: some of the data, prepared.
    """

    one: Fit
    data: Any
    train: Any
    sample: Any
    num_data: int
    num_simulations: int
    num_samples: int
    num_steps: int
    key: Array

    def conditions(self) -> dict[str, Any]:
        """Conditions to simulate for, from the data."""
        return conditions_among(self.one, judged_data(self.one, self.data).arrays)


def _elbo(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    return {"elbo": elbo_terms(asked.one, asked.data, num_samples=NUM_DRAWS, key=asked.key)}


def _density(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    programs = programs_of(asked.one, asked.one.batch)
    judge = log_predictive_density if programs.has_globals else log_likelihood
    density = judge(asked.one, asked.data, num_samples=asked.num_samples, key=asked.key)
    elbo = evidence.elbo and evidence.elbo.elbo
    return {"density": density, "loss": elbo and difference("loss", density, elbo)}


def _training(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    if asked.train is None:
        return {}
    judged = judged_data(asked.one, asked.train)
    index = spread_rows(length(judged.arrays), max(asked.num_data, FEWEST_TRAINING))
    some = Prepared(rows(judged.arrays, index)) if judged.programs.takes_batches else asked.train
    on_training = replace(asked, data=some)
    found = _elbo(on_training, evidence)
    found = _density(on_training, replace(evidence, **found)) | found
    return {"training_elbo": found["elbo"].elbo, "training_loss": found["loss"]}


def _latents(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    """What exchanging the latents costs, and what of them follows the data."""
    latents = programs_of(asked.one, asked.one.batch).latents
    draws = sample_posterior(asked.one, asked.sample, NUM_DRAWS, key=asked.key)
    local = [name for name, site in latents.items() if site.data_axis is not None]
    if not local:
        raise ValueError("expected latent sites of each datum, got none: all are global")
    exchanged = draws | {name: np.roll(draws[name], 1, axis=2) for name in local}
    own, other = (
        sum(pointwise_log_likelihood(asked.one, values, asked.sample).values())
        for values in (draws, exchanged)
    )
    lost = (np.asarray(own, np.float64) - np.asarray(other)).mean(1)
    explained, z_loc = {}, {} if evidence.elbo is None else evidence.elbo.z_loc
    for name in z_loc.keys() & set(local):
        between = z_loc[name][0].var(0)
        spread = draws[name][0].astype(np.float64)
        spread = spread.reshape(spread.shape[0] * spread.shape[1], -1).var(0)
        explained[name] = between / np.maximum(spread, np.finfo(np.float32).tiny)
    estimate = Estimate("exchange", lost, NUM_DRAWS, judged_data(asked.one, asked.sample).described)
    return {"exchange": estimate, "explained": explained}


def _calibration(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    conditions = asked.conditions()
    return {"calibration": sbc(asked.one, asked.num_simulations, key=asked.key, **conditions)}


def _bracket(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    found = bracket(asked.one, asked.sample, num_steps=asked.num_steps, key=asked.key)
    return {"bracket": found}


def _simulated(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    conditions = asked.conditions()
    found = bracket(
        asked.one,
        num_simulations=max(1, asked.num_data // 2),
        num_steps=asked.num_steps,
        num_samples=0,
        key=asked.key,
        **conditions,
    )
    return {"simulated": found}


def _gap(asked: _Asked, evidence: Evidence) -> dict[str, Any]:
    below = None if evidence.bracket is None else evidence.bracket.lower
    return {"gap": inference_gap(asked.one, asked.sample, log_likelihood=below, key=asked.key)}


JUDGES: dict[str, Callable[[_Asked, Evidence], dict[str, Any]]] = {
    "elbo_terms": _elbo,
    "log_likelihood": _density,
    "training ELBO": _training,
    "latents": _latents,
    "sbc": _calibration,
    "bracket": _bracket,
    "bracket of simulated data": _simulated,
    "inference_gap": _gap,
}


# --- the page -------------------------------------------------------------------------------------


def _numbers(evidence: Evidence) -> dict[str, tuple[float, float]]:
    terms, found, gap = evidence.elbo, evidence.bracket, evidence.gap
    density, simulated = evidence.density, evidence.simulated
    known = {
        "elbo": terms and terms.elbo,
        "reconstruction": terms and terms.reconstruction,
        "kl": terms and terms.kl,
        "density": density,
        "high_pareto_k": density and density.high_pareto_k,
        "training_elbo": evidence.training_elbo,
        "exchange": evidence.exchange,
        "bracket": found and found.lower,
        "importance": found and found.importance,
        "width": simulated and simulated.gap,
        "total": gap and gap.total,
        "approximation": gap and gap.approximation,
        "amortisation": gap and gap.amortisation,
    }
    return {
        name: (float(value.estimate[0]), float(value.standard_error[0]))
        for name, value in known.items()
        if value is not None
    }


def _notes(evidence: Evidence, result: Fit) -> tuple[str, ...]:
    """What has no standard error."""
    notes = [f"Seed {evidence.fit.seeds[0]} of {result.num_seeds}."]
    for name, unused in evidence.unused.items():
        notes.append(f"Active dimensions of {name}: {int((~unused).sum())} of {unused.size}.")
    if evidence.calibration is not None:
        tree = evidence.calibration
        notes.append(
            f"Calibration: joint p-value {tree['joint'].p_value.values[0]:.2g} "
            f"({tree.attrs['correction']}); power {tree.attrs['power']}."
        )
    if evidence.density is not None:
        notes.append(f"log p: {evidence.density.num_samples} draws a datum.")
    if evidence.bracket is not None:
        accepted = evidence.bracket.acceptance
        notes.append(
            f"Annealing: {evidence.bracket.num_steps} temperatures, "
            f"{evidence.bracket.num_chains} chains; accepted moves {accepted.mean():.0%}, of the "
            f"worst datum {accepted.min():.0%}."
        )
    return tuple(notes)


def _figures(asked: _Asked, evidence: Evidence, missing: dict[str, str]) -> dict[str, Figure]:
    figures = {}
    if evidence.calibration is not None:
        figures["calibration"] = plot_calibration(evidence.calibration)
    try:
        figures["predictive"] = _predictive(asked)
    except REFUSALS as error:
        missing["posterior-predictive picture"] = str(error).splitlines()[0]
    return figures


def _predictive(asked: _Asked) -> Figure:
    """Data and draws of p(x | z, c) with z from the guide, for the first observed array."""
    [(site, names), *_] = observed_sources(asked.one.model, asked.one.batch).items()
    draws = sample_posterior_predictive(asked.one, asked.sample, 3, return_sites=[site])[site][0]
    name = next(n for n in sorted(names) if n in asked.sample)
    x = np.asarray(asked.sample[name])
    is_image = x.ndim in (3, 4) and min(x.shape[1:3]) > 3
    return _pictures(x, draws, name) if is_image else _histograms(x, draws, name)


def _pictures(x: np.ndarray, draws: np.ndarray, name: str) -> Figure:
    """Images in rows: the data, and below each three draws."""
    from matplotlib.figure import Figure

    count = min(NUM_PICTURES, len(x))
    images = np.concatenate([x[None, :count], draws[:, :count].reshape(-1, count, *x.shape[1:])])
    low, high = float(images.min()), float(images.max())
    figure = Figure(figsize=(0.8 * count + 1, 0.8 * len(images) + 0.6), layout="constrained")
    panels = figure.subplots(len(images), count, squeeze=False)
    for i, row in enumerate(panels):
        for axes, image in zip(row, images[i], strict=True):
            scaled = (np.asarray(image, np.float64) - low) / max(high - low, 1e-12)
            scaled = scaled if scaled.shape[-1] == 3 or scaled.ndim == 2 else scaled[..., 0]
            axes.imshow(scaled, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel("data" if i == 0 else f"draw {i}")
    figure.suptitle(f"{name}, and draws of it given z from the guide", fontsize="medium")
    return figure


def _histograms(x: np.ndarray, draws: np.ndarray, name: str) -> Figure:
    """The first dimensions of the data and of the draws."""
    from matplotlib.figure import Figure

    data, made = x.reshape(len(x), -1), draws.reshape(draws.shape[0] * len(x), -1)
    count = min(4, data.shape[1])
    figure = Figure(figsize=(1 + 2.6 * count, 2.8), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for i, axes in enumerate(panels):
        bins = np.histogram_bin_edges(np.concatenate([data[:, i], made[:, i]]).astype(float), 30)
        axes.hist(made[:, i], bins, density=True, color="C0", alpha=0.5, label="draws")
        axes.hist(data[:, i], bins, density=True, histtype="step", color="black", label="data")
        axes.set(xlabel=name if data.shape[1] == 1 else f"{name}[{i}]", yticks=[])
    panels[0].set_ylabel("density")
    panels[0].legend(fontsize="small")
    figure.suptitle("data, and draws given z from the guide", fontsize="medium")
    return figure


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return base64.b64encode(buffer.getvalue()).decode()
