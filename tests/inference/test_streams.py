"""Data that are streamed: the same bits as in memory, and one line where a row cannot be read."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

import inference
from inference import Fit, Prepared, StreamError, fit
from inference import _feeds as feeds
from inference import _streams as streams
from inference._data import as_arrays
from inference._describe import describe_arrays

N, BATCH = 103, 12  # the batch does not divide N, and N is no power of two
RNG = np.random.default_rng(0)
C = RNG.integers(0, 3, N)
X = (RNG.normal(size=(N, 2)) + C[:, None]).astype(np.float32)
DATA = {"c": C, "x": X}


def model(c, x=None):
    slope = numpyro.param("slope", lambda key: jax.random.normal(key))
    with numpyro.plate("rows", len(c)):
        z = numpyro.sample("z", dist.Normal(slope * c, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 1.0).expand([len(c), 2]).to_event(1), obs=x)


def guide(c, x):
    weights = numpyro.param("weights", lambda key: 0.1 * jax.random.normal(key, (3,)))
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(c)):
        loc = weights[0] * x.sum(1) + weights[1] * c + weights[2]
        numpyro.sample("z", dist.Normal(loc, scale))


def masked_model(c, x=None, x_mask=True):
    with numpyro.plate("rows", len(c)):
        z = numpyro.sample("z", dist.Normal(c, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 1.0).mask(x_mask).to_event(1), obs=x)


def noisy(key, batch):
    """A ``preprocess`` that draws."""
    return batch | {"x": batch["x"] + jax.random.normal(key, batch["x"].shape)}


class Source:
    """One datum at a time. It raises, or gives what ``wrong`` says, for one of them."""

    def __init__(self, data, wrong=None, at=None):
        self.data, self.wrong, self.at, self.reads = data, wrong, at, 0
        self.threads = set()

    def __len__(self):
        return len(next(iter(self.data.values())))

    def __getitem__(self, number):
        self.reads += 1
        self.threads.add(threading.current_thread().name)
        if self.at is not None and self.at(self, number):
            if isinstance(self.wrong, Exception):
                raise self.wrong
            return self.wrong
        return {name: array[number] for name, array in self.data.items()}


def memory_mapped(directory, data=DATA):
    """The data in files."""
    for name, array in data.items():
        np.save(directory / f"{name}.npy", array)
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in data}


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of three steps of one seed."""
    monkeypatch.setattr(feeds, "WINDOW_BYTES", 3 * BATCH * 16)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 10 * 16)


def run(data, model=model, guide=guide, **settings):
    settings = {"num_steps": 40, "batch_size": BATCH, "progress": False} | settings
    return fit(model, guide, data, **settings)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    np.testing.assert_array_equal(a.elbo, b.elbo)
    if a.validation_elbo is not None:
        np.testing.assert_array_equal(a.validation_elbo, b.validation_elbo)


# --- training -------------------------------------------------------------------------------------

HOLES = DATA | {"x": np.where(RNG.random((N, 2)) < 0.2, np.nan, X)}
CASES = {
    "plain": {},
    "whole": {"batch_size": N, "num_steps": 5, "num_seeds": 2},
    "everything": {
        "num_seeds": 3,
        "preprocess": noisy,
        "validation": 0.3,
        "validate_every": 5,
        "average": 0.5,
        "num_epochs": 6,
        "num_steps": None,
    },
    "patience": {"validation": 0.3, "validate_every": 3, "patience": 2, "num_seeds": 3},
    "missing": {"model": masked_model, "missing": "mask", "data": HOLES},
}


@pytest.mark.parametrize(
    "case",
    [
        name if name in ("everything", "missing") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_streamed_bits_are_those_of_data_in_memory(case, small_windows, tmp_path):
    settings = {"optimizer": optax.adam(0.3)} | CASES[case]
    data = settings.pop("data", DATA)
    if case == "missing":
        settings["guide"] = masked_guide
    in_memory = run(data, **settings)
    assert_same_bits(run(memory_mapped(tmp_path, data), **settings), in_memory)
    source = Source(data)
    assert_same_bits(run(source, **settings), in_memory)
    if case == "patience":
        assert len(set(in_memory.info["num_steps"])) > 1  # some seed stops before the others
    if case == "everything":  # the next window is read while the device computes
        assert any(name.startswith("stream") for name in source.threads)


def masked_guide(c, x, x_mask):
    loc = numpyro.param("loc", jnp.zeros(2))
    with numpyro.plate("rows", len(c)):
        numpyro.sample("z", dist.Normal(loc[0] * (x * x_mask).sum(1) + loc[1], 1.0))


@pytest.mark.slow
def test_a_stream_may_be_a_part_of_a_file_or_hold_out_data(small_windows, tmp_path):
    mapped = memory_mapped(tmp_path)
    part = {"c": C, "x": mapped["x"][:]}  # one array in memory, one in a file
    held_out = {name: array[60:] for name, array in mapped.items()}
    settings = {"preprocess": noisy, "validate_every": 10}
    streamed = run(part, validation=held_out, **settings)
    in_memory = run(DATA, validation={n: a[60:] for n, a in DATA.items()}, **settings)
    assert_same_bits(streamed, in_memory)


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_bits(small_windows, tmp_path):
    once = run(DATA, num_steps=60)
    half = run(memory_mapped(tmp_path), num_steps=25)
    assert_same_bits(run(memory_mapped(tmp_path), num_steps=35, init=half), once)


@pytest.mark.parametrize(
    "wrong",
    [
        OSError("disk"),
        *(
            pytest.param(record, marks=pytest.mark.slow)
            for record in ({"c": 1, "x": np.zeros(3)}, {"c": 1}, 3)
        ),
    ],
)
def test_a_row_that_fails_on_the_way_keeps_what_was_learnt(wrong, small_windows, tmp_path):
    def late(source, number):
        return source.reads > 450 and number == 77

    with pytest.raises(StreamError, match=r"^data\[77\].*mend the source and go on$") as error:
        run(Source(DATA, wrong, late), checkpoint=tmp_path / "run")
    stopped = error.value.fit
    (steps,) = stopped.info["num_steps"]
    assert 0 < steps < 40
    whole = run(DATA)
    assert_same_bits(run(Source(DATA), checkpoint=tmp_path / "run"), whole)
    assert_same_bits(run(Source(DATA), init=stopped, num_steps=40 - steps), whole)


def test_a_file_that_becomes_shorter_is_an_error_and_no_crash(small_windows, tmp_path):
    mapped = memory_mapped(tmp_path)
    os.truncate(tmp_path / "x.npy", (tmp_path / "x.npy").stat().st_size - 8 * 20 - 3)
    with pytest.raises(
        StreamError, match=rf"^data\['x'\]\[{N - 21 - 3}\].*put the whole file back"
    ):
        run({name: array[3:] for name, array in mapped.items()})


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_that_a_file_has_lost_are_known_in_either_order(order, tmp_path):
    np.save(tmp_path / "x.npy", np.asarray(X, order=order))
    stream = as_arrays({"x": np.load(tmp_path / "x.npy", mmap_mode="r")})
    os.truncate(tmp_path / "x.npy", (tmp_path / "x.npy").stat().st_size - 4 * 10)
    whole = N - (5 if order == "C" else 10)  # ten numbers: of the last five rows, or one column's
    np.testing.assert_array_equal(stream.rows(np.arange(whole))["x"], X[:whole])
    with pytest.raises(StreamError, match=rf"^data\['x'\]\[{whole}\]"):
        stream.rows(np.array([whole]))


# --- judging --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    return run(DATA, num_seeds=2, num_steps=5, preprocess=noisy)


def values_of(result):
    """The arrays of what a judge or a generator returns."""
    if isinstance(result, inference.ElboTerms):
        return [values_of(part) for part in (result.elbo, result.kl, result.reconstruction)]
    if isinstance(result, inference.Estimate):
        return [result.pointwise, result.pareto_k]
    return result


JUDGES = {
    "elbo_terms": {"num_samples": 3},
    "pointwise_elbo": {"num_samples": 3},
    "log_likelihood": {"num_samples": 30},
    "log_predictive_density": {"num_samples": 30},
    "sample_posterior": {"num_samples": 2},
    "sample_posterior_predictive": {"num_samples": 2},
    "encode": {},
    "reconstruct": {},
}


@pytest.mark.parametrize("judge", JUDGES)
def test_judges_and_generators_answer_the_same(judge, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_ENTRIES", 16 * 3)  # sixteen rows are prepared at a time
    ask = getattr(inference, judge)
    in_memory = ask(fitted, fitted.prepare(DATA), **JUDGES[judge])
    streamed = ask(fitted, fitted.prepare(memory_mapped(tmp_path)), **JUDGES[judge])
    jax.tree.map(np.testing.assert_array_equal, values_of(streamed), values_of(in_memory))


def test_draws_are_judged_on_a_stream(fitted):
    prepared = fitted.prepare(Source(DATA))
    draws = inference.sample_posterior(fitted, prepared, num_samples=2)
    ask = inference.pointwise_log_likelihood
    streamed, in_memory = (ask(fitted, draws, data) for data in (prepared, fitted.prepare(DATA)))
    np.testing.assert_array_equal(streamed["x"], in_memory["x"])


@pytest.mark.slow
def test_plain_data_are_judged_as_they_are(tmp_path):
    plain, mapped = run(DATA, num_steps=2), memory_mapped(tmp_path)
    for data in (mapped, Source(DATA), Prepared(mapped)):
        judged = inference.elbo_terms(plain, data)
        expected = inference.elbo_terms(plain, DATA)
        np.testing.assert_array_equal(judged.elbo.pointwise, expected.elbo.pointwise)
    table = inference.compare({"a": plain, "b": plain}, Source(DATA))
    assert list(table.index) in (["a", "b"], ["b", "a"])


def test_prepared_rows_do_not_depend_on_the_order_in_which_they_are_read(fitted, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_ENTRIES", 16 * 3)
    prepared, stream = fitted.prepare(DATA), fitted.prepare(Source(DATA))
    index = np.array([[100, 3], [40, 17]])
    np.testing.assert_array_equal(stream.rows(index)["x"], np.asarray(prepared["x"])[index])


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Source({"c": np.zeros(0)}), "data: expected at least one datum, got a source of length 0"),
        (Source(DATA, 3.0, lambda *_: True), r"data\[0\]: expected a mapping from name to array"),
        (Source(DATA, {"c": "a"}, lambda *_: True), r"data\[0\]\['c'\]: expected an array of num"),
        (Source(DATA, {"c": 0.5, "x": X[0]}, lambda _, i: i == 70), r"data\[70\]\['c'\]: .* int64"),
        (
            Source(DATA, IndexError("none"), lambda _, i: i == 99),
            r"data\[99\]: .* IndexError: none",
        ),
    ],
)
def test_a_wrong_source_is_named_before_the_first_step(data, message, small_windows):
    with pytest.raises((ValueError, TypeError, StreamError), match=f"^{message}"):
        run(data)


def test_entries_are_checked_piece_by_piece_and_named_by_their_row(small_windows, tmp_path):
    bad = DATA | {"x": X.copy()}
    bad["x"][91, 1] = np.inf
    with pytest.raises(ValueError, match=r"got 1 NaN or infinite .* index \(91, 1\)"):
        run(memory_mapped(tmp_path, bad))

    def counting(c, x=None):
        with numpyro.plate("rows", len(c)):
            numpyro.sample("x", dist.Bernoulli(0.5 * jnp.ones((len(c), 2))).to_event(1), obs=x)

    def nothing(c, x):
        numpyro.param("unused", 0.0)

    counts = DATA | {"x": np.zeros_like(X)}
    counts["x"][-1] = 2
    with pytest.raises(ValueError, match="site 'x': expected values in the support"):
        run(Source(counts), counting, nothing)


def test_a_model_looks_at_every_piece(small_windows, tmp_path):
    seen = []

    def looked(**data):
        seen.append(len(data["c"]))
        assert isinstance(data["x"], np.ndarray)

    class Looking:
        check_data = staticmethod(looked)

        def __call__(self, c, x=None):
            return model(c, x)

    run(memory_mapped(tmp_path), Looking(), num_steps=1)
    assert sum(seen) == N
    assert max(seen) < N


def test_identity_is_length_shapes_types_and_fixed_records(tmp_path, monkeypatch):
    def identity(data):
        return describe_arrays(as_arrays(data), contents=True)

    known = identity(Source(DATA))
    assert known == identity(memory_mapped(tmp_path))
    assert known["x"].startswith(f"float32[{N}, 2] sha256:")
    assert "records" in known["x"]
    changed = DATA | {"x": X + (np.arange(N) == 50)[:, None].astype(np.float32)}
    assert identity(Source(changed)) != known
    assert identity(Source({n: a[:-1] for n, a in DATA.items()})) != known
    read = Source(DATA)
    monkeypatch.setattr("inference._describe.FIXED_RECORDS", 10)
    identity(read)
    assert read.reads == 1 + 10  # the first tells the shapes


def test_a_saved_run_of_a_stream_is_another_run_with_other_data(small_windows, tmp_path):
    run(memory_mapped(tmp_path), checkpoint=tmp_path / "run", num_steps=5)
    other = Source(DATA | {"x": X + 1})
    with pytest.raises(inference.CheckpointError, match=r"data\.x was"):
        run(other, checkpoint=tmp_path / "run", num_steps=5)


@pytest.mark.slow
def test_grain_sources_are_sources():
    grain = pytest.importorskip("grain")
    rows = [{"c": C[i], "x": X[i]} for i in range(N)]
    dataset = grain.MapDataset.source(rows)
    assert_same_bits(run(dataset, num_steps=4), run(DATA, num_steps=4))
    assert_same_bits(run(rows, num_steps=4), run(DATA, num_steps=4))


def test_a_fit_of_a_stream_is_saved_and_loaded(tmp_path):
    mapped = memory_mapped(tmp_path)
    fitted = run(mapped, num_steps=3)
    fitted.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", model, guide)
    assert loaded.config["data"] == fitted.config["data"]
    expected = inference.elbo_terms(fitted, mapped).elbo.pointwise
    np.testing.assert_array_equal(inference.elbo_terms(loaded, mapped).elbo.pointwise, expected)


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import sys, threading, time
import numpy as np
from inference import elbo_terms, fit
from models import guides, vae

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.02)

peak = [0]
threading.Thread(target=watch, daemon=True).start()
x = np.load(sys.argv[1], mmap_mode="r")
model = vae.Model(num_latents=2, hidden=(16,))
settings = {"preprocess": model.prepare, "batch_size": 128, "num_steps": 300, "progress": False}
held_out = {"x": x[-20_000:]}
result = fit(model, guides.mean_field(model), {"x": x}, validation=held_out, **settings)
elbo_terms(result, result.prepare(held_out))
print(peak[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_does_not_grow_with_the_data(tmp_path):
    peaks = []
    for gigabytes in (0.05, 3):
        path, rows = tmp_path / "x.npy", int(gigabytes * 1e9 / 784)
        np.lib.format.open_memmap(path, "w+", np.uint8, (rows, 28, 28))  # a file of holes
        told = subprocess.run(
            [sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True
        )
        peaks.append(int(told.stdout))
    assert peaks[1] - peaks[0] < 1e9  # a third of the file
