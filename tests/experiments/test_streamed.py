"""An own .npy file larger than half of the memory: its rows are read when they are needed."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from experiments import datasets, linear_gaussian, mnist_quadrants, mnist_vae, runs, train
from experiments.datasets import DatasetError, load
from experiments.settings import command_line
from inference import _feeds

SMALL = 4_000  # bytes. The files here are larger.
SETTINGS = {"hidden": (8,), "num_latents": 2, "num_samples": 30, "batch_size": 20}
SETTINGS |= {"num_epochs": 2, "num_test": 30, "progress": False}
SCRIPT = {"hidden": 8, "num_latents": 2, "num_samples": 30, "batch_size": 5, "num_epochs": 40}
PROGRAM = """
import numpyro
import numpyro.distributions as dist


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z[:, None], 1).expand([len(x), 2]).to_event(1), obs=x)
"""


@pytest.fixture(autouse=True)
def _small_memory(monkeypatch):
    monkeypatch.setattr(datasets, "half_of_memory", lambda: SMALL)


@pytest.fixture
def much_memory(monkeypatch):
    """From now on, files are loaded."""
    return lambda: monkeypatch.setattr(datasets, "half_of_memory", lambda: 10**9)


def images(rng, dtype):
    """150 images of 6 x 5 pixels."""
    x = rng.random((150, 6, 5))
    return (x > 0.5) if dtype is bool else (255 * x).astype(np.uint8) if dtype == "u1" else x


ARRAYS = {
    "uint8": lambda rng: images(rng, "u1"),
    "bool": lambda rng: images(rng, bool),
    "float64": lambda rng: images(rng, float),
    "colours": lambda rng: rng.random((90, 4, 4, 3)).astype(np.float32),
    "table": lambda rng: rng.normal(3, 2, (400, 5)),
    "constant column": lambda rng: np.hstack([rng.normal(3, 2, (400, 4)), np.ones((400, 1))]),
}


def is_streamed(dataset):
    return [
        datasets.is_streamed(part) for part in (dataset.train, dataset.validation, dataset.test)
    ]


@pytest.mark.parametrize("piece", [100, 2**25])
@pytest.mark.parametrize("kind", ARRAYS)
def test_a_stream_has_the_rows_of_the_loaded_file(
    tmp_path, rng, kind, piece, monkeypatch, much_memory
):
    monkeypatch.setattr(datasets, "PIECE_BYTES", piece)
    path = tmp_path / "mine.npy"
    np.save(path, ARRAYS[kind](rng))
    stream = load(str(path))
    much_memory()
    loaded = load(str(path))
    assert is_streamed(stream) == [True] * 3
    assert is_streamed(loaded) == [False] * 3
    assert stream.record == loaded.record
    assert runs.describe(stream) == runs.describe(loaded)
    for ours, theirs in zip(
        runs.splits(stream).values(), runs.splits(loaded).values(), strict=True
    ):
        assert ours["x"].dtype == theirs["x"].dtype
        np.testing.assert_array_equal(np.asarray(ours["x"]), theirs["x"])
        some = datasets.first(datasets.take(ours, np.array([3, 1, 2])), ["x"], 2)
        np.testing.assert_array_equal(np.asarray(some["x"]), theirs["x"][[3, 1]])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((140, 2, 3), np.nan, r"x: expected floats in \[0, 1\], got nan to nan; replace"),
        ((140, 2, 3), 1.5, r"x: expected floats in \[0, 1\], got 0\.\d+ to 1\.5; .*divide by"),
        ((70, 0, 0), -0.5, r"x: expected floats in \[0, 1\], got -0\.5 to 0\.\d+; .*divide by"),
    ],
)
def test_pixels_are_checked_piece_by_piece(tmp_path, rng, monkeypatch, place, value, message):
    monkeypatch.setattr(datasets, "PIECE_BYTES", 1000)
    x = images(rng, float)
    x[place] = value
    np.save(tmp_path / "mine.npy", x)
    with pytest.raises(DatasetError, match=rf"mine\.npy: {message}"):
        load(str(tmp_path / "mine.npy"))


def test_numbers_of_a_table_are_checked_piece_by_piece(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(datasets, "PIECE_BYTES", 1000)
    x = ARRAYS["table"](rng)
    x[312, 4] = np.inf
    np.save(tmp_path / "mine.npy", x)
    with pytest.raises(DatasetError, match=r"got inf in row 312, column 4 \(from 0\)"):
        load(str(tmp_path / "mine.npy"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"expected 4,628 bytes, as its header promises, got 4,627"),
        (lambda content: content[1:], r"expected an array in NumPy's format, got one that cannot"),
        (
            lambda content: content.replace(b"|u1", b"|S1"),
            r"expected an array of numbers, got \|S1",
        ),
        (lambda content: content.replace(b"|u1", b"|O8"), r"got pickled objects; save it as numb"),
    ],
)
def test_a_bad_file_is_not_mapped(tmp_path, rng, damage, message):
    path = tmp_path / "mine.npy"
    np.save(path, images(rng, "u1"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=rf"mine\.npy: x: .*{message}"):
        load(str(path))


def numbers(result):
    """What a run has found, without its settings, its seconds and the names of the data."""
    others = ("config", "seconds", "devices", "dataset")
    return {name: value for name, value in result.items() if name not in others}


@pytest.mark.slow
def test_a_run_has_the_same_bits(tmp_path, rng, much_memory):
    """Training, held-out data, judges and figures."""
    np.save(tmp_path / "mine.npy", images(rng, "u1"))
    settings = SETTINGS | {"dataset": str(tmp_path / "mine.npy")}
    streamed = mnist_vae.main(mnist_vae.Config(**settings, out=tmp_path / "streamed"))
    data = runs.load(tmp_path / "streamed").data()
    assert is_streamed(data) == [True] * 3
    much_memory()
    loaded = mnist_vae.main(mnist_vae.Config(**settings, out=tmp_path / "loaded"))
    assert numbers(streamed) == numbers(loaded)
    configs = [
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("streamed", "loaded")
    ]
    assert configs[0]["data"] == configs[1]["data"]
    assert configs[0]["record"] == configs[1]["record"]
    for name in ("reconstructions", "interpolations"):
        one, other = ((tmp_path / n / f"{name}.png").read_bytes() for n in ("streamed", "loaded"))
        assert one == other


@pytest.mark.slow
def test_an_own_program_has_the_same_bits(tmp_path, rng, much_memory):
    np.save(tmp_path / "mine.npy", rng.normal(size=(300, 2)))
    (tmp_path / "mine.py").write_text(PROGRAM)
    results = []
    for name in ("streamed", "loaded"):
        config = train.Config(
            f"{tmp_path / 'mine.py'}:model",
            tmp_path / "mine.npy",
            num_steps=20,
            num_samples=10,
            out=tmp_path / name,
            progress=False,
        )
        assert datasets.is_streamed(train.load_data(config).train) == (name == "streamed")
        results.append(numbers(train.main(config)))
        much_memory()
    assert results[0] == results[1]


def test_what_is_looked_at_as_a_whole_must_fit(tmp_path, rng, much_memory):
    """The closed form of the linear-Gaussian model takes all images at once."""
    np.save(tmp_path / "mine.npy", np.tile(images(rng, "u1"), (2, 1, 1)))
    settings = {"dataset": str(tmp_path / "mine.npy")}
    message = r"dataset: expected at most 4,000 bytes .*, got 7,500; give fewer with --num-train"
    with pytest.raises(DatasetError, match=message):
        linear_gaussian.images(linear_gaussian.Config(**settings))
    config = linear_gaussian.Config(**settings, num_train=100)
    found = linear_gaussian.images(config)
    much_memory()
    np.testing.assert_array_equal(found.train["x"], linear_gaussian.images(config).train["x"])


def test_quadrants_keep_only_the_training_images_on_the_disk(tmp_path, rng):
    np.save(tmp_path / "mine.npy", images(rng, "u1"))
    data = mnist_quadrants.Config(dataset=str(tmp_path / "mine.npy")).data()
    assert is_streamed(data) == [True, False, False]


@pytest.mark.slow
def test_a_row_that_cannot_be_read_ends_the_run_which_then_goes_on(
    tmp_path, rng, monkeypatch, capsys
):
    """The file is cut off while it is read, and put back. The bits are those of a whole run."""
    path = tmp_path / "mine.npy"
    np.save(path, images(rng, "u1"))
    content, settings = (
        path.read_bytes(),
        [f"--{n.replace('_', '-')}={v}" for n, v in SCRIPT.items()],
    )
    reads, training = [], mnist_vae.EXPERIMENT.training

    def cut_off(*arguments):
        found = training(*arguments)
        arguments[1].train.read = lambda index, read=arguments[1].train.read: (
            reads.append(1),
            path.write_bytes(content[:1000]) if len(reads) == 12 else None,
            read(index),
        )[2]
        return found

    monkeypatch.setattr(_feeds, "WINDOW_BYTES", 6_000)  # 40 steps are read at a time
    words = ["script.py", f"--dataset={path}", "--no-progress", *settings]
    with monkeypatch.context() as patch:
        patch.setattr(mnist_vae, "EXPERIMENT", replace(mnist_vae.EXPERIMENT, training=cut_off))
        patch.setattr(sys, "argv", [*words, f"--out={tmp_path / 'run'}"])
        with pytest.raises(SystemExit) as caught:
            command_line(mnist_vae.main, mnist_vae.Config)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: data\['x'\]\[\d+\]: expected row .* in {path}, got a file that", line)
    assert list((tmp_path / "run" / "checkpoints" / "fit").glob("[0-9]*"))
    path.write_bytes(content)
    results = []
    for name in ("run", "whole"):
        monkeypatch.setattr(sys, "argv", [*words, f"--out={tmp_path / name}"])
        command_line(mnist_vae.main, mnist_vae.Config)
        results.append(numbers(json.loads((tmp_path / name / "result.json").read_text())))
    assert results[0] == results[1]
