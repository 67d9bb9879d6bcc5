"""Hold every judge against every exact answer, and write a certificate.

    python experiments/certify.py
    python experiments/certify.py --quick
    python experiments/certify.py --out experiments/certificate.md

**Known parameters.** The problems and the guides of ``experiments/known.py`` and of
``experiments/known_mixtures.py`` have a formula for all that a judge measures. Each row of the
table is one judge on one problem with one guide. No two rows share data or random keys. So their
differences, in standard errors, are independent. They are standard normal if the judges are right.
One Kolmogorov-Smirnov test takes them all. Each of them must be at most four, too. A row without
noise must equal its formula to rounding.

**Trained fits.** A few fits of ``experiments/exact.py`` and the toy are trained. A gap by formula
must be at least the family's least gap and at most a stated bound above it. Sampled numbers must
lie within four standard errors. ``inference_gap`` must find the two parts of the gap. The toy's
parameters must maximise the likelihood.

**Claims.** What the README says of calibration, brackets and findings, as numbers.

The script ends with status 1 if anything fails.
"""

import shlex
import sys
import time
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from scipy import stats
from tabulate import tabulate

from experiments import exact, judges, runner
from experiments.compiled import keep_compiled
from experiments.judges import JUDGES, MOST_ERRORS, PROBLEMS, PROGRAMS, Sizes
from experiments.known import Trial
from experiments.precision import full_precision
from experiments.settings import check_least, command_line
from inference import Fit, bracket, diagnose, fit, inference_gap, sbc_power
from inference._describe import describe_arrays, describe_device, versions
from inference._progress import progress
from models import gaussian_mean

LEVEL = 1e-3  # of the Kolmogorov-Smirnov test
TRAINED = (
    "linear-gaussian/mean-field/mean_field/Trace_ELBO",
    "linear-gaussian/full-covariance/mean_field/Trace_ELBO",
    "hierarchical/mean-field/mean_field/Trace_ELBO",
    "regression/mean-field/mean_field/Trace_ELBO",
    "regression/mean-field/full_covariance/Trace_ELBO",
)
TOY_ROOM = 0.01  # of each parameter of the trained toy, for the optimiser's noise
GAP_ROOM = 0.03  # nats per datum
# Quick: each quick judge on the first where it is defined, so often.
QUICK = (
    ("hierarchical", "wide"),
    ("linear-gaussian, labels", "wide"),
    ("linear-gaussian, labels", "exact"),
    ("mixture, labels", "wide"),
)
REPEATS = 2
SPOILT = 1.2  # times the encoder's numbers


@dataclass(frozen=True)
class Config:
    """Settings of the certificate.

    Attributes:
        quick: Whether to judge fewer problems with fewer draws.
        judges: Judges by name, as JUDGES has them. Default: all.
        seed: Random seed.
        out: Markdown file to write. Default: none, the certificate is printed only.
        progress: Whether to show a progress bar.
    """

    quick: bool = False
    judges: tuple[str, ...] | None = None
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        check_least(0, self, "seed")
        for name in self.judges or ():
            if name not in JUDGES:
                raise ValueError(f"judges: expected some of {', '.join(JUDGES)}, got {name!r}")

    @property
    def sizes(self) -> Sizes:
        """How much a row takes."""
        return Sizes(1_000, 20, 40, 1_000) if self.quick else Sizes(4_000, 30, 200, 4_000)

    @property
    def names(self) -> list[tuple[str, str, str, int]]:
        """Of every row the judge, the problem, the guide, and which one of the judge's it is."""
        found = []
        for judge, known in JUDGES.items():
            if judge not in (self.judges or JUDGES) or (self.quick and not known.is_quick):
                continue
            programs = QUICK if self.quick else PROGRAMS
            defined = [program for program in programs if known.is_defined(*program)]
            chosen = defined[:1] * REPEATS if self.quick else defined
            found += [(judge, *program, i) for i, program in enumerate(chosen)]
        return found


# --- known parameters -----------------------------------------------------------------------------


def trial_of(config: Config, judge: str, problem: str, guide: str, position: int) -> Trial:
    """The trial of a row. Its seed comes from the row's name: no two rows share draws."""
    name, sizes = f"{judge}/{problem}/{guide}/{position}", config.sizes
    each = sizes.few if PROBLEMS[problem].num_shared else sizes.many
    num_data = {"each": each, "many": sizes.many, "few": sizes.few}[JUDGES[judge].data]
    return judges.trial_of(problem, guide, num_data, [config.seed, zlib.crc32(name.encode())])


def row(config: Config, judge: str, problem: str, guide: str, position: int) -> dict[str, Any]:
    """One judge on one problem."""
    began = time.perf_counter()
    trial = trial_of(config, judge, problem, guide, position)
    found = JUDGES[judge].measure(trial, config.sizes)
    return {
        "judge": judge,
        "problem": problem,
        "guide": guide,
        "data": describe_arrays(trial.data, contents=True),
        **found._asdict(),
        "away": found.away,
        "passed": found.is_right,
        "seconds": time.perf_counter() - began,
    }


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """All rows of known parameters, with a bar."""
    with progress(len(config.names), "row", show=config.progress) as shown:
        for i, name in enumerate(config.names):
            yield row(config, *name)
            shown.update(i + 1, {"judge": name[0]})


def differences(found: list[dict[str, Any]]) -> list[float]:
    """The differences of the rows with noise, in standard errors."""
    return [known["away"] for known in found if known["away"] is not None]


def normality(found: list[dict[str, Any]]) -> float:
    """The p-value of the Kolmogorov-Smirnov test of all differences against Normal(0, 1).

    It is 0 if a difference is no number.
    """
    away = differences(found)
    return float(stats.kstest(away, "norm").pvalue) if np.isfinite(away).all() else 0.0


# --- trained fits ---------------------------------------------------------------------------------


def between(fitted: str, what: str, number: float, low: float, high: float) -> dict[str, Any]:
    """A number of a trained fit, and the bounds that it must keep."""
    passed = bool(low <= number <= high)
    return {
        "fit": fitted,
        "what": what,
        "number": number,
        "low": low,
        "high": high,
        "passed": passed,
    }


def schedule(num_steps: int, rate: float) -> Any:
    """Adam. The learning rate falls to zero along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps), b2=0.99)


def toy(config: Config) -> list[dict[str, Any]]:
    """The toy's parameters beside the maximum-likelihood ones, and its gap by formula."""
    truth = gaussian_mean.Truth()
    data = truth.simulate(1_000, config.seed)
    best, _ = gaussian_mean.maximum_likelihood(data, truth.sigma_0)
    num_steps = 2_000 if config.quick else 5_000
    fitted = fit(
        gaussian_mean.Model(truth.sigma_0),
        gaussian_mean.Guide(truth.sigma_0),
        data,
        optimizer=schedule(num_steps, 0.05),
        num_steps=num_steps,
        average=0.1,
        seed=config.seed,
        progress=False,
    )
    params = {name: np.float64(value) for name, value in fitted.params_of(0).items()}
    mean, scale = gaussian_mean.posterior(params, truth.sigma_0, data["c"], data["x"])
    away = params["phi_1"] * data["x"] + params["phi_2"] * data["c"] + params["phi_3"] - mean
    log_ratio = params["phi_4"] / 2 - np.log(scale)
    squares = np.mean(away**2) / scale**2 + np.exp(2 * log_ratio)
    gap = float(0.5 * (squares - 1) - log_ratio)
    found = [
        between("toy", name, float(params[name]), value - TOY_ROOM, value + TOY_ROOM)
        for name, value in best.items()
    ]
    return [*found, between("toy", "gap", gap, -exact.ROUNDING, GAP_ROOM + exact.ROUNDING)]


def held(config: Config) -> list[dict[str, Any]]:
    """Gaps of the guides of ``TRAINED``, by formula and sampled. The models are held."""
    settings = exact.Config(seed=config.seed, progress=config.progress)
    data = exact.diabetes(settings)
    experiment = replace(exact.EXPERIMENT, names=lambda _: TRAINED)
    fits = runner.train(experiment, settings, data)
    found = []
    for name, judged in exact.judge(settings, data, fits).items():
        known, (low, high) = exact.row(name, judged), judged.least
        room = exact.RUNGS[exact.Name.of(name).rung].room + exact.ROUNDING
        noise = MOST_ERRORS * judged.error + exact.ROUNDING
        gap, sampled = known["gap"], known["sampled_gap"]
        found += [
            between(name, "gap", gap, low - exact.ROUNDING, high + room),
            between(name, "sampled gap", sampled, gap - noise, gap + noise),
        ]
    for name in TRAINED:
        rung = exact.rung_of(settings, data.record, name)
        if not rung.has_globals:
            own = exact.arrays(data, name)
            for label, fitted in ((name, fits[name]), (f"{name}, spoilt", spoilt(fits[name], own))):
                found += parts_of_gap(label, rung, fitted, own)
    return found


def spoilt(fitted: Fit, data: dict[str, Any]) -> Fit:
    """The fit with another encoder, so that amortisation loses something."""
    params = {
        name: jax.tree.map(lambda p: SPOILT * p, value) if "encoder" in name else value
        for name, value in fitted.params_of(0).items()
    }
    return Fit.from_params(
        fitted.model, fitted.guide, params, example=data, mutable=fitted.mutable_of(0)
    )


def parts_of_gap(
    label: str, rung: exact.Rung, fitted: Fit, data: dict[str, Any], num_steps: int = 2000
) -> list[dict[str, Any]]:
    """What ``inference_gap`` says of a Normal guide, beside the formulas.

    The best guide of the family loses the least gap, and its fit may lose ``GAP_ROOM`` beyond it.
    So the approximation is at least the least gap. The amortisation is at most the guide's own gap
    less the least one.
    """
    name = exact.Name.of(label.split(",")[0])
    low, high = rung.least_gap(name, data)
    gap = rung.gap(rung.q(fitted, name.family, data), data)
    found = inference_gap(fitted, data, num_steps=num_steps)
    noise = [
        MOST_ERRORS * float(part.monte_carlo_error[0]) + exact.ROUNDING
        for part in (found.approximation, found.amortisation)
    ]
    approximation, amortisation = (
        float(part.estimate[0]) for part in (found.approximation, found.amortisation)
    )
    return [
        between(label, "approximation", approximation, low - noise[0], high + GAP_ROOM + noise[0]),
        between(
            label,
            "amortisation",
            amortisation,
            gap - high - GAP_ROOM - noise[1],
            gap - low + noise[1],
        ),
    ]


# --- what the pages say ---------------------------------------------------------------------------


def claims(config: Config) -> list[dict[str, Any]]:
    """What the README says of calibration, brackets and findings, as numbers."""
    right, wide = (
        Trial("linear-gaussian", guide, 300, [config.seed, i])
        for i, guide in enumerate(("exact", "wide"))
    )
    widths = [
        bracket(wide.fit, num_simulations=200, num_steps=num_steps, num_samples=0).gap
        for num_steps in (10, 100)
    ]
    coarse, fine = (float(width.estimate[0]) for width in widths if width is not None)
    pages = [diagnose(trial.fit, trial.data, progress=False) for trial in (right, wide)]
    none, some = (len(page.findings) for page in pages)
    return [
        between("sbc", "power, 1,000 simulations, 10 % too narrow", sbc_power(1000), 0.9, 1),
        between("sbc", "power, 1,000 simulations, 10 % too wide", sbc_power(1000, 1.1), 0.75, 1),
        between("sbc", "power, 2,000, 51 quantities", sbc_power(2000, 0.9, 51), 0.9, 1),
        between("bracket", "width, 10 temperatures", coarse, 0, np.inf),
        between("bracket", "width, 100 temperatures", fine, -coarse / 4, coarse / 4),
        between("diagnose", "findings of the posterior", none, 0, 0),
        between("diagnose", "findings of a wide guide", some, 1, np.inf),
    ]


# --- the certificate ------------------------------------------------------------------------------


def overview(found: list[dict[str, Any]], style: str) -> str:
    """Problems x judges: differences in standard errors."""
    programs = dict.fromkeys((known["problem"], known["guide"]) for known in found)
    cells: dict[str, dict[Any, list[str]]] = {}
    for known in found:
        cell = "=" if known["away"] is None else f"{known['away']:+.1f}"
        cell += "" if known["passed"] else " no"
        own = cells.setdefault(known["judge"], {})
        own.setdefault((known["problem"], known["guide"]), []).append(cell)
    body = [
        (judge, *(" ".join(own.get(p, ["."])) for p in programs)) for judge, own in cells.items()
    ]
    headers = ("judge", *(f"{problem}: {guide}" for problem, guide in programs))
    return tabulate(body, headers, tablefmt=style, disable_numparse=True)


def details(found: list[dict[str, Any]], style: str) -> str:
    """A line for each row."""
    body = [
        (
            known["problem"],
            known["guide"],
            known["judge"],
            f"{known['number']:.5f}",
            f"{known['formula']:.5f}",
            f"{known['difference']:+.1e}",
            f"rounding {known['bound']:.0e}" if known["away"] is None else f"{known['error']:.1e}",
            "" if known["away"] is None else f"{known['away']:+.2f}",
            f"{known['seconds']:.1f}",
            "yes" if known["passed"] else "no",
        )
        for known in found
    ]
    headers = ("problem", "guide", "judge", "number", "formula", "difference", "error")
    headers += ("errors away", "seconds", "passed")
    align = ("left",) * 3 + ("right",) * 6 + ("left",)
    return tabulate(body, headers, tablefmt=style, disable_numparse=True, colalign=align)


def trained_table(found: list[dict[str, Any]], style: str) -> str:
    """A line for each number of a trained fit."""
    body = [
        (
            known["fit"],
            known["what"],
            f"{known['number']:.5f}",
            f"{known['low']:.5f} to {known['high']:.5f}",
            "yes" if known["passed"] else "no",
        )
        for known in found
    ]
    return tabulate(
        body, ("fit", "what", "number", "must be", "passed"), tablefmt=style, disable_numparse=True
    )


def command(config: Config) -> str:
    """The command that makes the same certificate."""
    words = ["python experiments/certify.py", "--quick" * config.quick]
    words += [f"--judges {' '.join(map(shlex.quote, config.judges))}"] if config.judges else []
    words += [f"--seed {config.seed}"] if config.seed else []
    words += [f"--out {config.out}"] if config.out else []
    return " ".join(word for word in words if word)


def installed() -> dict[str, str]:
    """The versions of the packages. A checkout of guidebook names its own."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if not project.is_file():
        return versions()
    return versions() | {"guidebook": tomllib.loads(project.read_text())["project"]["version"]}


def certificate(result: dict[str, Any], style: str = "github") -> str:
    """The certificate as a person reads it: Markdown, with tables in a style of tabulate."""
    found = result["rows"]
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    noisy = differences(found)
    failed = [known for known in [*found, *result["trained"]] if not known["passed"]]
    judges = dict.fromkeys(known["judge"] for known in found)
    claims = "\n".join(f"- `{judge}`: {JUDGES[judge].claim}." for judge in judges)
    return f"""# Certificate: every judge against every exact answer

- **Result**: {"passed" if result["passed"] else "FAILED"}
- Date: {result["date"]}
- Command: `{result["command"]}`
- Versions: {packages}
- Device: {result["device"]}, {result["seconds"]:.0f} s

{len(found)} rows have known parameters. {len(noisy)} of them have noise. No two rows share data or
random keys. The noisy differences, in standard errors, must look like draws of Normal(0, 1):

- Kolmogorov-Smirnov: p = {result["p_value"]:.3g}. It must be at least {LEVEL:g}.
- Greatest: {max(map(abs, noisy), default=0):.2f}. It must be at most {MOST_ERRORS}.
- Rows and numbers that failed: {len(failed)}

## Differences in standard errors

`=`: exact to rounding. `.`: not defined, or not asked.

{overview(found, style)}

## What the rows certify

{claims}

## Trained fits and claims

A gap is log p - ELBO in nats per datum. It is a formula of the fitted parameters. It must be at
least the least of the family and at most a stated bound above it. `inference_gap` splits it into
approximation and amortisation: the best guide of the family may lose {GAP_ROOM:g} beyond the least
gap. A spoilt fit has {SPOILT:g} times the encoder's numbers, so that amortisation loses something.
The last lines are what the README says of calibration, brackets and findings.

{trained_table(result["trained"], style)}

## All rows

`exact`: the posterior. `wide`: a mean field, wider than the best one and shifted. `error`: the
standard error of the difference, or what rounding may do.

{details(found, style)}
"""


def main(config: Config) -> dict[str, Any]:
    """Judge all that has a formula, print the certificate, and write it if ``out`` is given.

    Returns:
        ``passed``, ``p_value``, ``rows`` and ``trained``, and what the certificate says beside.

    Raises:
        OSError: the file cannot be written.
    """
    began = time.perf_counter()
    keep_compiled()
    full_precision()
    found = list(rows(config))
    trained = toy(config) + ([] if config.quick else [*held(config), *claims(config)])
    p_value = normality(found)
    result = {
        "passed": p_value >= LEVEL and all(known["passed"] for known in [*found, *trained]),
        "p_value": p_value,
        "rows": found,
        "trained": trained,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(config),
        "versions": installed(),
        "device": describe_device(),
        "seconds": time.perf_counter() - began,
    }
    print(certificate(result, "simple"))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(certificate(result))
        print(f"written to {config.out}")
    return result


def script() -> None:
    """The certificate from the command line. Status 1 says that it failed."""
    if not command_line(main, Config)["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    script()
