"""Every model of NumPyro's ``examples`` folder, fitted with ``guides.mean_field(model)``.

    python experiments/benchmarks/numpyro_examples.py path/to/numpyro/examples

The script imports the models from a checkout of NumPyro and makes small data for each. The table
``NUMPYRO_EXAMPLES.md`` says what became of each: its ELBO, or the one line that says why not.

``functools.partial`` fixes arguments that are no data: lengths, flags, settings. Where a model sums
over discrete sites, the objective is ``TraceEnum_ELBO``. Nothing else is adapted, unless the
table says so.
"""

import functools
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import jax
import numpy as np
import numpyro
import tyro
from numpyro.infer import TraceEnum_ELBO

from inference import fit
from models import guides

N, TIMES = 20, 8  # data, and steps of a sequence
TABLE = Path(__file__).with_name("NUMPYRO_EXAMPLES.md")
INTRODUCTION = """\
# NumPyro's examples

We gave every model of NumPyro's `examples/` folder to
`fit(model, guides.mean_field(model), data, num_steps={num_steps})`. The table says what became of
it. The data are synthetic, {N} in most cases, in the shapes that the model takes.

- `functools.partial` fixes the arguments in brackets.
- "Summed" means `objective=TraceEnum_ELBO()`.
- The ELBO is in nats per datum: the median of the first and of the last {window} steps. So short a
  training shows that the model trains. It fits nothing yet.

[`numpyro_examples.py`](numpyro_examples.py) makes this page
from a checkout of NumPyro{version}.
"""


@dataclass(frozen=True)
class Config:
    """Try the models of NumPyro's examples.

    Attributes:
        examples: The `examples` folder of a NumPyro checkout.
        only: Examples to try, by file name. The table is then printed and not written.
        num_steps: Steps of each training.
        out: The file of the table.
    """

    examples: tyro.conf.Positional[Path]
    only: tuple[str, ...] = ()
    num_steps: int = 50
    out: Path = TABLE


class Case(NamedTuple):
    """One model of an example.

    Attributes:
        function: its name.
        data: by argument, arrays of shape (N, ...).
        fixed: arguments that are no data.
        summed: whether it sums over discrete sites.
        remark: what else the table says of it.
    """

    function: str
    data: Mapping[str, Any]
    fixed: Mapping[str, Any] = types.MappingProxyType({})
    summed: bool = False
    remark: str = ""


@dataclass
class Draw:
    """Random arrays of N rows."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def normal(self, *shape: int, rows: int = N) -> np.ndarray:
        """Standard normal numbers, (rows, *shape)."""
        return self.rng.normal(size=(rows, *shape)).astype(np.float32)

    def below(self, count: int, *shape: int, rows: int = N) -> np.ndarray:
        """Integers from 0 to count - 1, (rows, *shape)."""
        return self.rng.integers(count, size=(rows, *shape)).astype(np.int32)

    def coins(self, *shape: int) -> np.ndarray:
        """0.0 or 1.0, (N, *shape)."""
        return self.below(2, *shape).astype(np.float32)


# --- the examples ---------------------------------------------------------------------------------


def annotation(draw: Draw) -> Iterator[Case]:
    """Items annotated by several people."""
    annotations, positions = draw.below(4, 5), np.arange(5, dtype=np.int32)
    for function in ("multinomial", "item_difficulty"):
        yield Case(function, {"annotations": annotations}, summed=True)
    for function in (
        "dawid_skene",
        "mace",
        "hierarchical_dawid_skene",
        "logistic_random_effects",
    ):
        yield Case(function, {"annotations": annotations}, {"positions": positions}, summed=True)


def ar2(draw: Draw) -> Iterator[Case]:
    """A series."""
    for function in ("ar2_scan", "ar2_for_loop"):
        yield Case(function, {"y": draw.normal()})


def baseball(draw: Draw) -> Iterator[Case]:
    """Hits of at bats."""
    data = {"at_bats": np.full(N, 45, np.int32), "hits": draw.below(20)}
    yield Case("fully_pooled", data)
    yield Case("not_pooled", data)
    data["at_bats"] = data["at_bats"].astype(np.float32)
    for function in ("not_pooled", "partially_pooled", "partially_pooled_with_logit"):
        yield Case(function, data, remark="`at_bats` as float32")


def bnn(draw: Draw) -> Iterator[Case]:
    """A regression."""
    yield Case("model", {"X": draw.normal(3), "Y": draw.normal(1)}, {"D_H": 4})


def capture_recapture(draw: Draw) -> Iterator[Case]:
    """Which animals were seen when."""
    data = {"capture_history": draw.below(2, TIMES), "sex": draw.below(2)}
    for i in range(1, 6):
        yield Case(f"model_{i}", data, summed=True)


def covtype(draw: Draw) -> Iterator[Case]:
    """A logistic regression."""
    yield Case("model", {"data": draw.normal(3), "labels": draw.below(2)})


def dais_demo(draw: Draw) -> Iterator[Case]:
    """A binary Gaussian process."""
    yield Case("model", {"X": np.linspace(-1, 1, N, dtype=np.float32), "Y": draw.below(2)})


def funnel(draw: Draw) -> Iterator[Case]:
    """No data."""
    yield Case("model", {}, {"dim": 10})


def gaussian_shells(draw: Draw) -> Iterator[Case]:
    """No data."""
    centers = {f"center{i}": np.array([x, 0], np.float32) for i, x in ((1, -3), (2, 3))}
    yield Case("model", {}, centers | {"radius": 2.0, "width": 0.1, "enum": True}, summed=True)


def gp(draw: Draw) -> Iterator[Case]:
    """A Gaussian process."""
    yield Case("model", {"X": np.linspace(-1, 1, N, dtype=np.float32), "Y": draw.normal()})


def hmcecs(draw: Draw) -> Iterator[Case]:
    """A logistic regression."""
    data = {"data": draw.normal(3), "obs": draw.below(2)}
    yield Case("model", data, {"subsample_size": None})


def hmm(draw: Draw) -> Iterator[Case]:
    """A sequence of words."""
    fixed = {
        "transition_prior": np.ones(3, np.float32),
        "emission_prior": np.full(10, 0.1, np.float32),
        "supervised_categories": draw.below(3),
        "supervised_words": draw.below(10),
    }
    yield Case("semi_supervised_hmm", {"unsupervised_words": draw.below(10)}, fixed)


def hmm_enum(draw: Draw) -> Iterator[Case]:
    """Sequences of chords."""
    lengths = np.full(N, TIMES, np.int32)
    data = {"sequences": draw.below(2, TIMES, 6), "lengths": lengths}
    fixed = {"args": SimpleNamespace(hidden_dim=4)}
    for i in (1, 2, 3, 4, 6):
        yield Case(f"model_{i}", data, fixed, summed=True)


def holt_winters(draw: Draw) -> Iterator[Case]:
    """A series."""
    yield Case("holt_winters", {"y": draw.normal()}, {"n_seasons": 4})


def horseshoe_regression(draw: Draw) -> Iterator[Case]:
    """Regressions."""
    yield Case("model_normal_likelihood", {"X": draw.normal(3), "Y": draw.normal()})
    yield Case("model_bernoulli_likelihood", {"X": draw.normal(3), "Y": draw.below(2)})


def hsgp(draw: Draw) -> Iterator[Case]:
    """Births by day."""
    holidays = ("memorial_days", "labour_days", "thanksgiving_days")
    data = {f"{name}_indicator": draw.below(2) for name in holidays}
    data |= {"x": np.linspace(-1, 1, N, dtype=np.float32), "y": draw.normal()}
    data |= {"day_of_week": draw.below(7), "day_of_year": draw.below(366)}
    yield Case("birthdays_model", data, {"w0": 1.0, "L": 1.5, "M1": 4, "M2": 4, "M3": 3})


def minipyro(draw: Draw) -> Iterator[Case]:
    """Numbers."""
    yield Case("model", {"data": draw.normal()})


def mortality(draw: Draw) -> Iterator[Case]:
    """Deaths by age, place and year."""
    age, space, time = (a.ravel() for a in np.meshgrid(range(3), range(4), range(2)))
    fixed = {"age": age, "space": space, "time": time, "lookup": np.array([0, 0, 1, 1])}
    count = len(age)
    population, deaths = np.full(count, 50, np.int32), draw.below(50, rows=count)
    yield Case("model", {"population": population, "deaths": deaths}, fixed)


def neutra(draw: Draw) -> Iterator[Case]:
    """No data."""
    yield Case("dual_moon_model", {})


def ode(draw: Draw) -> Iterator[Case]:
    """Populations of two species."""
    yield Case("model", {"y": np.exp(draw.normal(2) / 2 + 2)}, {"N": N})


def prodlda(draw: Draw) -> Iterator[Case]:
    """Counts of words."""
    settings = {"vocab_size": 12, "num_topics": 3, "dropout_rate": 0.2, "batch_size": None}
    yield Case("model", {"docs": 1 + draw.below(4, 12)}, {"hyperparams": settings})


def proportion_test(draw: Draw) -> Iterator[Case]:
    """A logistic regression."""
    yield Case("model", {"design_matrix": draw.normal(3), "outcome": draw.below(2)})


def sparse_regression(draw: Draw) -> Iterator[Case]:
    """A regression."""
    hypers = dict.fromkeys(("alpha1", "beta1", "alpha2", "beta2", "alpha3", "c"), 1.0)
    fixed = {"hypers": hypers | {"expected_sparsity": 2.0}}
    yield Case("model", {"X": draw.normal(4), "Y": draw.normal()}, fixed)


def ssbvm_mixture(draw: Draw) -> Iterator[Case]:
    """Pairs of angles."""
    yield Case("ss_model", {"data": draw.normal(2)}, {"num_data": N}, summed=True)


def stein_bnn(draw: Draw) -> Iterator[Case]:
    """A regression."""
    fixed = {"hidden_dim": 4, "sub_size": None}
    yield Case("model", {"x": draw.normal(3), "y": draw.normal()}, fixed)


def stein_dmm(draw: Draw) -> Iterator[Case]:
    """Sequences of chords."""
    seqs = draw.below(2, TIMES, 88)
    fixed = {"seqs_rev": seqs[:, ::-1], "lengths": np.full(N, TIMES), "subsample_size": N}
    yield Case("model", {"seqs": seqs}, fixed)


def stochastic_volatility(draw: Draw) -> Iterator[Case]:
    """A series."""
    yield Case("model", {"returns": draw.normal()})


def thompson_sampling(draw: Draw) -> Iterator[Case]:
    """A Gaussian process."""
    x = np.linspace(-1, 1, N, dtype=np.float32)
    yield Case("model", {"X": x, "Y": np.sin(3 * x)})  # smooth, since its noise is tiny


def toy_mixture_model_discrete_enumeration(draw: Draw) -> Iterator[Case]:
    """A chain of three coins."""
    obs = {"A": draw.below(2), "C": draw.below(2)}
    yield Case("model", {"obs": obs}, {"prior": None, "num_obs": N}, summed=True)


def ucbadmit(draw: Draw) -> Iterator[Case]:
    """Admissions by department."""
    data = {"applications": np.full(N, 30, np.int32), "admit": draw.below(30)}
    fixed = {"dept": np.repeat(np.arange(N // 2), 2), "male": np.tile([0, 1], N // 2)}
    yield Case("glmm", data, fixed)


def vae(draw: Draw) -> Iterator[Case]:
    """Binary images."""
    yield Case("model", {"batch": draw.coins(8, 8)}, {"hidden_dim": 16, "z_dim": 3})


def var2(draw: Draw) -> Iterator[Case]:
    """A series of vectors."""
    yield Case("var2_scan", {"y": draw.normal(2)})


def zero_inflated_poisson(draw: Draw) -> Iterator[Case]:
    """Counts."""
    yield Case("model", {"X": draw.normal(3), "Y": draw.below(4)})


def cvae_flax(draw: Draw) -> Iterator[Case]:
    """Images, from their quadrants."""
    yield Case("cvae_model", {"x": draw.coins(14, 14), "y": draw.coins(28, 28)})


CASES: dict[str, Callable[[Draw], Iterator[Case]] | str] = {
    "cvae-flax/models.py": cvae_flax,
    "cvae.py": "No program: a page of text about `cvae-flax/`.",
    "cvae-flax/__init__.py": "No model: empty.",
    "cvae-flax/data.py": "No model: it loads images.",
    "cvae-flax/main.py": "No own model: it trains the one in `cvae-flax/models.py`.",
    "cvae-flax/train_baseline.py": "No NumPyro model: it trains a Flax network.",
    "cvae-flax/train_cvae.py": "No own model: it trains the one in `cvae-flax/models.py`.",
    "__init__.py": "No model: empty.",
} | {
    f"{cases.__name__}.py": cases
    for cases in (
        annotation, ar2, baseball, bnn, capture_recapture, covtype, dais_demo, funnel,
        gaussian_shells, gp, hmcecs, hmm, hmm_enum, holt_winters, horseshoe_regression, hsgp,
        minipyro, mortality, neutra, ode, prodlda, proportion_test, sparse_regression,
        ssbvm_mixture, stein_bnn, stein_dmm, stochastic_volatility, thompson_sampling,
        toy_mixture_model_discrete_enumeration, ucbadmit, vae, var2, zero_inflated_poisson,
    )
}  # fmt: skip


# --- what becomes of them -------------------------------------------------------------------------


def load(path: Path) -> tuple[Any, list[str]]:
    """An example's module, and the packages that it needs and that are not installed.

    Mocks stand in for these packages: most are for figures and other samplers, and no model uses
    them. One example switches JAX to 64 bits. This is taken back.
    """
    spec = importlib.util.spec_from_file_location(f"numpyro_example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    stood_in: list[str] = []
    has_64_bits = jax.config.read("jax_enable_x64")
    try:
        while True:
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                name = getattr(error.__cause__, "name", None) or error.name
                if name is None or name in sys.modules:
                    raise
                stood_in.append(name)
                sys.modules[name] = MagicMock()
            else:
                return module, stood_in
    finally:
        jax.config.update("jax_enable_x64", has_64_bits)
        for name in stood_in:
            del sys.modules[name]


def what_became(
    model: Callable[..., Any], case: Case, num_steps: int, missing: list[str] | None = None
) -> str:
    """The ELBO at the start and at the end of a training, or why there is none.

    Args:
        model: it is trained.
        case: its data and fixed arguments.
        num_steps: the length of the training.
        missing: packages that mocks stand in for.
    """
    if case.fixed:
        model = functools.partial(model, **case.fixed)
    objective = TraceEnum_ELBO() if case.summed else None
    guide = guides.mean_field(model)
    try:
        result = fit(
            model, guide, case.data, objective=objective, num_steps=num_steps, progress=False
        )
    except Exception as error:  # whatever it is, it belongs into the table
        if missing and MagicMock.__name__ in str(error):
            packages = sorted({name.partition(".")[0] for name in missing})
            return f"Not tried: it needs {', '.join(packages)}, which is not installed."
        return f"{type(error).__name__}: {error}"
    window = _window(num_steps)
    first, last = np.median(result.elbo[0, :window]), np.median(result.elbo[0, -window:])
    return f"ELBO {first:.4g} → {last:.4g}"


def _window(num_steps: int) -> int:
    return max(1, num_steps // 5)


def rows(examples: Path, name: str, num_steps: int) -> Iterator[tuple[str, str, str]]:
    """The rows of one example: its file, its model, what became of it."""
    cases = CASES.get(name, "Not tried: it is newer than the script.")
    if isinstance(cases, str):
        yield name, "", cases
        return
    if not (examples / name).is_file():
        yield name, "", "Not tried: this checkout has no such example."
        return
    module, missing = load(examples / name)
    for case in cases(Draw()):
        fixed = f" ({', '.join(case.fixed)})" if case.fixed else ""
        remarks = [f"`{case.function}`{fixed}", "summed" * case.summed, case.remark]
        model = getattr(module, case.function)
        yield name, ", ".join(filter(None, remarks)), what_became(model, case, num_steps, missing)


def main(config: Config) -> None:
    """Tries the examples and writes the table."""
    found = {str(path.relative_to(config.examples)) for path in config.examples.rglob("*.py")}
    if not found:
        raise ValueError(
            f"examples: expected the examples folder of a NumPyro checkout, got "
            f"{config.examples}, which holds no Python file"
        )
    table = []
    for name in config.only or sorted(found | CASES.keys()):
        for row in rows(config.examples, name, config.num_steps):
            print(*row, sep=" | ", flush=True)
            table.append([cell.replace("|", "\\|").replace("\n", " ⏎ ") for cell in row])
    if config.only:
        return
    page = INTRODUCTION.format(
        num_steps=config.num_steps,
        N=N,
        window=_window(config.num_steps),
        version=_version(config.examples),
    )
    lines = [["example", "model", "what became of it"], ["---"] * 3, *table]
    page += "".join(f"\n| {' | '.join(line)} |" for line in lines)
    config.out.write_text(f"{page}\n")


def _version(examples: Path) -> str:
    """The version of the checkout, if it says one."""
    path = examples.parent / "numpyro" / "version.py"
    found = re.search(r'__version__ = "([^"]+)"', path.read_text()) if path.is_file() else None
    return f" {found[1]}, with NumPyro {numpyro.__version__} installed" if found else ""


if __name__ == "__main__":
    main(tyro.cli(Config))
