"""A user's own program: trained from its file, judged on held-out data, opened again."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock
from scipy import stats

from experiments import compare, datasets, runs, train
from experiments.settings import command_line

ROOT = Path(__file__).parents[2]
PROGRAM = '''
from dataclasses import dataclass
from pathlib import Path

import numpyro
import numpyro.distributions as dist
from my_sizes import WIDTH

with Path(__file__).with_name("executions.txt").open("a") as file:
    file.write("once more\\n")


def line(age, height=None, width=WIDTH):
    """Linear regression: what it does not know, all data share."""
    slope = numpyro.sample("slope", dist.Normal(0, width))
    with numpyro.plate("people", len(age)):
        numpyro.sample("height", dist.Normal(slope * age, 0.5), obs=height)


@dataclass(frozen=True)
class Pair:
    """Two views of one number."""

    scale: float = 1.0
    what: str = "pair"

    def __call__(self, x, y):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, self.scale))
            numpyro.sample("x", dist.Normal(z, 1), obs=x)
            numpyro.sample("y", dist.Normal(z, 1), obs=y)


def mixed(x):
    """A number for all data, and one for each datum."""
    mu = numpyro.sample("mu", dist.Normal(0, 3))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1))
        numpyro.sample("x", dist.Normal(z, 1), obs=x)


def flat(x):
    mu = numpyro.sample("mu", dist.Normal(0, 3))
    numpyro.sample("x", dist.Normal(mu, 1).expand([len(x)]).to_event(1), obs=x)


def wrong(age, height=None):
    with numpyro.plate("data", len(age)):
        numpyro.sample("height", dist.Normal(age[:, :2], 1), obs=height)


three = 3
pair_of_two = Pair(2.0)
'''
LINE = {"num_steps": 400, "learning_rate": 0.03, "num_samples": 400, "num_seeds": 2}
PAIR = {"set": ("scale=2",), "test": 0.25, "guide": "low-rank", "num_steps": 300}
PAIR |= {"learning_rate": 0.01, "num_samples": 50, "encoder": "per-datum"}


def write(path):
    """A user's directory: two files of Python and their data."""
    path.mkdir(exist_ok=True)
    (path / "my_model.py").write_text(PROGRAM)
    (path / "my_sizes.py").write_text("WIDTH = 1.0\n")
    rng = np.random.default_rng(0)
    age = rng.normal(size=300)
    height = 0.7 * age + 0.5 * rng.normal(size=300)
    lines = (f"{a},{h}" for a, h in zip(age, height, strict=True))
    (path / "people.csv").write_text("\n".join(("age,height", *lines)))
    z = 2 * rng.normal(size=80)
    np.savez(path / "pairs.npz", x=z + rng.normal(size=80), y=z + rng.normal(size=80))


def config(path, program, dataset, **settings):
    return train.Config(
        f"{path / 'my_model.py'}:{program}", path / dataset, progress=False, **settings
    )


@pytest.fixture(scope="module")
def made(shared):
    """The user's directory with two finished runs, "line" and "pair"."""
    path = shared / "own"
    with FileLock(shared / "own.lock"):
        if not path.exists():
            write(path)
            train.main(config(path, "line", "people.csv", out=path / "line", **LINE))
            train.main(config(path, "Pair", "pairs.npz", out=path / "pair", **PAIR))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's directory, to work in."""
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def imported(path):
    """The user's module, as the user imports it."""
    sys.path.append(str(path))
    try:
        spec = importlib.util.spec_from_file_location("my_model", path / "my_model.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["my_model"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path))
    return module


def result_of(path):
    return json.loads((path / "result.json").read_text())


# --- trained --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_is_trained_from_the_command_line(here):
    """In a directory of the user's own."""
    script = str(ROOT / "experiments" / "train.py")
    words = "my_model.py:pair_of_two --dataset pairs.npz --guide mean-field --num-epochs 3"
    words += " --batch-size 20 --num-samples 5 --set what=mine --no-progress"
    done = subprocess.run(
        [sys.executable, script, *words.split()], capture_output=True, text=True, cwd=here
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "my_model.py:pair_of_two on pairs.npz: 65 train, 7 validation, 8 test data" in (
        done.stdout
    )
    assert re.search(r"log likelihood +-\d", done.stdout)
    (path,) = (here / "runs").iterdir()
    assert result_of(path)["num_steps"] == {"fit": [-(-3 * 65 // 20)]}


def test_a_run_directory_keeps_the_program(made):
    for name in ("line", "pair"):
        names = {p.name for p in (made / name).iterdir()}
        files = {"config.json", "result.json", "trace.nc", "elbo.png", "fits", "program.py"}
        assert names - {".lock"} == files
        kept = (made / name / "program.py").read_bytes()
        assert kept == (made / "my_model.py").read_bytes()
        written = json.loads((made / name / "config.json").read_text())
        assert written["files"] == {"program.py": hashlib.sha256(kept).hexdigest()}


def test_global_sites_are_judged_on_held_out_data(made):
    """The ELBO of a datum is E_q [log p(x | slope)], for a Normal q a formula."""
    data = train.load_data(config(made, "line", "people.csv"))
    tree = runs.read_tree(made / "line")
    draws = tree["posterior"].slope.values.astype(float)
    assert draws.shape == (2, LINE["num_samples"])
    age, height = data.test["age"], data.test["height"]
    residuals = (height - draws.mean(1)[:, None] * age) ** 2 + draws.var(1)[:, None] * age**2
    expected = -0.5 * np.log(2 * np.pi * 0.25) - residuals / 0.5
    elbo = tree["evaluation"].elbo.values
    assert elbo.shape == (2, 30)
    # both take the moments of q from draws: errors of the mean and of the second moment
    slope_error = draws.std(1)[:, None] * np.sqrt(2 / LINE["num_samples"])
    gradient = np.abs(2 * (height - 0.7 * age) * age) + age**2
    assert (np.abs(elbo - expected) < 4 * slope_error * gradient / 0.5 + 1e-3).all()
    scale = np.sqrt(draws.var(1)[:, None] * age**2 + 0.25)
    exact = stats.norm(draws.mean(1)[:, None] * age, scale).logpdf(height)
    predictive = tree["evaluation"].log_predictive_density.values
    assert (np.abs(predictive - exact) < 4 * slope_error * gradient / 0.5 + 1e-3).all()
    result = result_of(made / "line")
    for name in ("elbo", "log_predictive_density"):
        values = tree["evaluation"][name].values.mean(1)
        assert result[name]["per_seed"] == pytest.approx(values.tolist(), rel=1e-5)
    assert "log_likelihood" not in result


def test_a_table_of_numbers_is_fitted_to_the_test_data(made):
    """The guide contains the posterior. So the ELBO of test data is near their log-likelihood."""
    data = train.load_data(config(made, "Pair", "pairs.npz", **PAIR))
    result, tree = result_of(made / "pair"), runs.read_tree(made / "pair")
    assert result["num_data"] == {"train": 60, "test": 20}
    covariance = 4 * np.ones((2, 2)) + np.eye(2)
    views = np.stack([data.test["x"], data.test["y"]], axis=1)
    exact = stats.multivariate_normal(np.zeros(2), covariance).logpdf(views)
    judged = tree["evaluation"].log_likelihood.values[0]
    error = result["log_likelihood"]["monte_carlo_error"] * np.sqrt(20)
    np.testing.assert_allclose(judged, exact, atol=max(4 * error, 0.02))
    gap = result["log_likelihood"]["estimate"] - result["elbo"]["estimate"]
    assert -0.02 < gap < 0.05
    assert tree["posterior"].z.shape == (1, 1, 20)


def test_a_model_without_a_plate_is_trained_on_all_data(here, capsys):
    np.savez(here / "few.npz", x=np.ones(8))
    settings = {"validation": 0.0, "test": 0.0, "num_steps": 5, "num_samples": 10}
    result = train.main(config(here, "flat", "few.npz", out=here / "run", **settings))
    assert result["num_data"] == {"train": 8}
    assert "elbo" not in result
    assert "no test data" in capsys.readouterr().out
    assert runs.read_tree(here / "run")["posterior"].mu.shape == (1, 10)
    assert np.isnan(runs.table(here).loc["run", "elbo"])


# --- opened again ---------------------------------------------------------------------------------


def test_opening_executes_no_code(made, tmp_path, monkeypatch):
    path = Path(shutil.copytree(made, tmp_path / "copy"))
    written = (path / "line" / "config.json").read_text().replace(str(made), str(path))
    (path / "line" / "config.json").write_text(written)
    (path / "executions.txt").unlink()
    monkeypatch.chdir(path / "line")
    run = runs.load(path / "line")
    assert run.config.program == f"{path / 'my_model.py'}:line"
    assert run.result == result_of(made / "line")
    assert "slope" in run.tree["posterior"]
    assert run.data().record.num_data == run.result["num_data"]["train"]
    assert run.fits == {}
    missing = r"expected the model, .*my_model\.py:line in the training, .* model=\.\.\."
    assert re.search(missing, repr(run))
    with pytest.raises(runs.RunError, match=missing):
        _ = run.fit
    assert not list(path.rglob("executions.txt"))


def test_the_model_opens_the_fit(made):
    module = imported(made)
    for name, model in (("line", module.line), ("pair", module.Pair)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = runs.load(made / name, model=model)
        assert run.fit.num_seeds == run.config.num_seeds
        assert run.missing is None
        data, quiet = run.data(), dataclasses.replace(run.config, progress=False)
        judged = run.experiment.judge(quiet, data, run.fits)
        summary = run.experiment.summarize(quiet, data, run.fits, judged)
        assert summary["elbo"]["per_seed"] == pytest.approx(
            run.result["elbo"]["per_seed"], rel=1e-4
        )
    assert run.fit.model == module.Pair(2.0)
    assert runs.load(made / "pair", model=module.pair_of_two).fit.model == module.Pair(2.0)


def test_another_file_is_told(made, tmp_path):
    write(tmp_path)
    (tmp_path / "my_model.py").write_text(PROGRAM + "# newer\n")
    module = imported(tmp_path)
    with pytest.warns(UserWarning, match=r"expected the file of the run, .*program\.py, got .*my_"):
        assert runs.load(made / "line", model=module.line).fit.num_seeds == 2


@pytest.mark.parametrize(
    ("run", "name", "message"),
    [
        ("line", "Pair", "data.'age'.: expected arrays that the model takes"),
        ("line", "three", "expected a model, .* got int 3"),
        ("pair", "mixed", "set: expected fields or arguments of the model, which are x, got 'sc"),
    ],
)
def test_another_model_is_refused(made, run, name, message):
    with pytest.raises(ValueError, match=message):
        runs.load(made / run, model=getattr(imported(made), name))


def test_a_script_knows_its_model(run_of):
    with pytest.raises(runs.RunError, match="model: expected none for a run of gaussian_mean"):
        runs.load(run_of("gaussian_mean").path, model=len)


def test_runs_are_listed_and_compared(made, tmp_path, capsys):
    frame = runs.table(made)
    assert set(frame.index) == {"line", "pair"}
    for name in frame.index:
        assert frame.loc[name, "elbo"] == result_of(made / name)["elbo"]["estimate"]
    assert np.isnan(frame.loc["line", "log_likelihood"])
    assert frame.loc["pair", "log_likelihood"] < 0
    shutil.copytree(made / "pair", tmp_path / "copy")
    compared = compare.main(compare.Config((made / "pair", tmp_path / "copy")))
    assert compared["runs"]["pair"]["model"] == f"train {made / 'my_model.py'}:Pair"
    assert compared["runs"]["copy"]["guide"] == "low-rank"
    assert "pairs.npz: 20 data that were judged" in capsys.readouterr().out
    shutil.copytree(made / "line", tmp_path / "line")
    compare.main(compare.Config((made / "line", tmp_path / "line")))
    density = result_of(made / "line")["log_predictive_density"]["estimate"]
    printed = capsys.readouterr().out
    assert "log predictive density" in printed
    assert f"{density:.3f} +-" in printed
    frame = runs.table(made)
    assert frame.loc["line", "log_predictive_density"] == density
    assert np.isnan(frame.loc["pair", "log_predictive_density"])


# --- faults ---------------------------------------------------------------------------------------


def refusal(monkeypatch, words):
    """What a command says on standard error before it ends with status 2."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["train.py", "--no-progress", *words.split()])
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(stderr):
        command_line(train.main, train.Config)
    assert caught.value.code == 2
    (line,) = stderr.getvalue().splitlines()
    return line


PEOPLE = "--dataset people.csv"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"my_model.py {PEOPLE}", r"expected FILE:NAME, .* got 'my_model\.py'; write for"),
        (f"none.py:line {PEOPLE}", r"got none\.py, which cannot be read \(No such file"),
        (f"raises.py:line {PEOPLE}", r"raises\.py raises an error; line 2: KeyError: 'colour'"),
        (f"leaves.py:line {PEOPLE}", r"leaves\.py raises an error; line 1: SystemExit: 3"),
        (f"syntax.py:line {PEOPLE}", r"syntax\.py raises an error; line 1: SyntaxError"),
        (
            f"my_model.py:lines {PEOPLE}",
            r"named 'lines' in my_model\.py, .* are line, Pair, mixed, flat, wrong, pair_of_two",
        ),
        (f"my_model.py:three {PEOPLE}", "expected a model, .* got int 3"),
        (f"my_model.py:line {PEOPLE} --set widht=2", "are age, height, width, got 'widht'"),
        (f"my_model.py:line {PEOPLE} --set width", "set: expected NAME=VALUE, got 'width'"),
        (f"my_model.py:Pair {PEOPLE} --set hue=2", "which are scale, what, got 'hue'"),
        ("my_model.py:line", "dataset"),
        ("my_model.py:line --dataset none.npz", "none.npz: .* no file there"),
        ("my_model.py:line --dataset people.txt", "expected the path of an .npz, .npy or .csv fil"),
        ("my_model.py:line --dataset pickled.npz", "expected an array of numbers, got pickled ob"),
        ("my_model.py:line --dataset uneven.npz", r"one leading length, .* got age \(5,\), hei"),
        ("my_model.py:line --dataset pairs.npz", "data.'x'.: expected arrays that the model takes"),
        ("my_model.py:mixed --dataset pairs.npz", "data.'y'.: expected arrays that the model tak"),
        ("my_model.py:Pair --dataset people.csv", "data.'age'.: expected arrays that the model"),
        (f"my_model.py:wrong {PEOPLE}", r"my_model\.py, line 49: IndexError: "),
        ("my_model.py:flat --dataset alone.npz", "expected one with a plate for its data, .* none"),
        (
            f"my_model.py:line {PEOPLE} --guide prior --num-steps 3",
            "expected a numpyro.param to tr",
        ),
        (f"my_model.py:line {PEOPLE} --guide cloud", "guide: expected one of mean-field"),
        (f"my_model.py:line {PEOPLE} --objective ELBO", "objective: expected one of Trace_ELBO"),
        (f"my_model.py:line {PEOPLE} --num-steps 3 --num-epochs 3", "expected one of the two"),
        (f"my_model.py:line {PEOPLE} --test 1.5", "test: expected a fraction below 1, got 1.5"),
        (f"my_model.py:line {PEOPLE} --test 0.001", "test: expected a fraction that leaves data"),
        (f"my_model.py:line {PEOPLE} --encoder per-datum --batch-size 5", "batch_size: expected n"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(words, message, here, monkeypatch):
    (here / "raises.py").write_text("names = {}\nnames['colour']\n")
    (here / "leaves.py").write_text("raise SystemExit(3)\n")
    (here / "syntax.py").write_text("def line(:\n")
    np.savez(here / "uneven.npz", age=np.ones(5), height=np.ones(4))
    np.savez(here / "pickled.npz", age=np.array([{}], object))
    np.savez(here / "alone.npz", x=np.ones(20))
    line = refusal(monkeypatch, words)
    assert re.search(message, line), line
    assert list(here.glob("runs/*")) == []


def test_a_fault_leaves_the_users_directory(here, monkeypatch):
    (here / "out").mkdir()
    (here / "out" / ".mine").write_text("mine")
    refusal(monkeypatch, f"my_model.py:wrong {PEOPLE} --out out")
    assert [p.name for p in (here / "out").iterdir()] == [".mine"]


def test_the_same_file_is_the_same_run(made, tmp_path, capsys):
    """A changed file is another run."""
    path = Path(shutil.copytree(made, tmp_path / "copy"))
    same = dataclasses.replace(runs.load(made / "line").config, progress=False)
    assert train.main(same) == result_of(made / "line")
    assert "written to" in capsys.readouterr().out
    (path / "my_model.py").write_text(PROGRAM + "# newer\n")
    settings = LINE | {"out": path / "line"}
    with pytest.raises(ValueError, match=r"holds another run \(.*program\.py was '[0-9a-f]{64}', "):
        train.main(config(path, "line", "people.csv", **settings))


# --- data -----------------------------------------------------------------------------------------


def test_the_test_set_does_not_depend_on_the_validation_set(here):
    given = [train.load_data(config(here, "line", "people.csv", validation=v)) for v in (0.0, 0.2)]
    np.testing.assert_array_equal(given[0].test["age"], given[1].test["age"])
    every = np.concatenate([getattr(given[1], s)["age"] for s in ("train", "validation", "test")])
    np.testing.assert_array_equal(np.sort(every), np.sort(datasets.read("people.csv")["age"]))
    for split in ("train", "validation", "test"):  # rows stay together
        part = getattr(given[1], split)
        assert np.std(part["height"] - 0.7 * part["age"]) < 0.7
    assert not given[0].validation


def test_a_file_may_hold_its_test_set(here):
    arrays = {"x": np.arange(50.0), "x_test": np.arange(5.0), "x_validation": np.ones(4)}
    np.savez(here / "own.npz", **arrays)
    data = train.load_data(config(here, "mixed", "own.npz"))
    for split in ("train", "validation", "test"):
        name = "x" if split == "train" else f"x_{split}"
        np.testing.assert_array_equal(getattr(data, split)["x"], arrays[name])
    with pytest.raises(
        ValueError, match=r"test: expected none, as .*own\.npz has x_test, got 0\.1"
    ):
        train.load_data(config(here, "mixed", "own.npz", test=0.1))


def test_arrays_are_read_as_they_are(here, rng):
    arrays = {"deep": rng.normal(size=(3, 2, 2)), "flag": np.array([True, False, True])}
    arrays["group"] = np.arange(3, dtype=np.int16)
    np.savez(here / "any.npz", **arrays)
    read = datasets.read("any.npz")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    np.save(here / "one.npy", arrays["deep"])
    np.testing.assert_array_equal(datasets.read("one.npy")["x"], arrays["deep"])
    (here / "some.csv").write_text("count,size,label\n3,1.0,0\n-4,2,1\n1e30,3,2\n")
    table = datasets.read("some.csv")
    kinds = {name: str(array.dtype) for name, array in table.items()}
    assert kinds == {"count": "float64", "size": "float64", "label": "int64"}
    np.testing.assert_array_equal(table["label"], [0, 1, 2])
    jax.tree.map(lambda array: array.fill(0), table)  # the user's own
