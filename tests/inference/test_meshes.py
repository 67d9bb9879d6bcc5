"""Several devices: seeds and batches are split over them, and the numbers stay."""

import re

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

from inference import _feeds as feeds
from inference import engine, fit, log_likelihood, sample_posterior

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

N, BATCH, SEEDS = 203, 24, 8  # the batch does not divide N, and N is no power of two
RNG = np.random.default_rng(0)
C = RNG.normal(size=N).astype(np.float32)
DATA = {"c": C, "x": (1 + C + RNG.normal(size=N) * 2**0.5).astype(np.float32)}
HELD_OUT = {name: array[:50] for name, array in DATA.items()}
SHAPES = {
    "data": ((8,), ("data",)),
    "seed": ((8,), ("seed",)),
    "both": ((2, 4), ("seed", "data")),
}
COLLECTIVE = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("


def model(c, x=None):
    slope = numpyro.param("slope", lambda key: jax.random.normal(key))
    with numpyro.plate("rows", len(c)):
        z = numpyro.sample("z", dist.Normal(slope * c, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(c, x):
    weights = numpyro.param("weights", lambda key: 0.1 * jax.random.normal(key, (3,)))
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(c)):
        loc = weights[0] * x + weights[1] * c + weights[2]
        numpyro.sample("z", dist.Normal(loc, scale))


def run(data=DATA, mesh=None, **settings):
    settings = {
        "num_steps": 50,
        "batch_size": BATCH,
        "num_seeds": SEEDS,
        "validation": HELD_OUT,
        "optimizer": optax.adam(1e-2),
        "progress": False,
    } | settings
    return fit(model, guide, data, mesh=mesh and jax.make_mesh(*SHAPES[mesh]), **settings)


@pytest.fixture(scope="module")
def alone():
    return run()


def loop_of(run_it):
    """A fit, and the text of its compiled loop."""
    texts, compiled = [], engine.compile_steps

    def spy(*args):
        found = compiled(*args)
        texts.append(found.advance.as_text())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "compile_steps", spy)
        return run_it(), texts[0]


@pytest.fixture(scope="module")
def both():
    return loop_of(lambda: run(mesh="both"))


def groups(text):
    """The devices that talk to each other, for each collective of a compiled program."""
    lines = [line for line in text.splitlines() if re.search(COLLECTIVE, line)]
    return [re.search(r"replica_groups=(\S+?),? ", line + " ")[1] for line in lines]


def assert_agrees(result, alone):
    """To rounding in the first 50 steps; the last held-out ELBO within its standard error."""
    np.testing.assert_allclose(result.elbo[:, :50], alone.elbo[:, :50], rtol=1e-5)
    error = log_likelihood(alone, HELD_OUT, num_samples=2).standard_error
    difference = np.abs(result.validation_elbo - alone.validation_elbo)
    np.testing.assert_array_equal(np.isnan(difference), np.isnan(alone.validation_elbo))
    assert (np.nan_to_num(difference) < error[:, None]).all()


@pytest.mark.parametrize("mesh", [pytest.param("data", marks=pytest.mark.slow), "seed", "both"])
def test_devices_agree_with_one(mesh, alone, both):
    result, loop = both if mesh == "both" else loop_of(lambda: run(mesh=mesh))
    assert_agrees(result, alone)
    talks = groups(loop)
    if mesh == "seed":
        assert talks == []
        assert "all-reduce" not in loop
    else:  # the devices of one seed talk to each other, and to no others
        rows = {"data": r"mesh\['data'=8\]|\[1,8\]<=\[8\]", "both": r"\[2,4\]<=\[8\]"}[mesh]
        assert talks
        assert all(re.fullmatch(rf"\{{?({rows})\}}?", found) for found in talks), talks


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SHAPES)
@pytest.mark.parametrize("settings", [{"patience": 1, "validate_every": 5}, {"average": 0.5}])
def test_a_stream_on_devices_agrees_with_one(mesh, settings, monkeypatch):
    monkeypatch.setattr(feeds, "WINDOW_BYTES", SEEDS * BATCH * 8 * 7)
    source = [dict(zip(DATA, row, strict=True)) for row in zip(*DATA.values(), strict=True)]
    settings = {"num_steps": 120, "optimizer": optax.adam(0.1)} | settings
    result, loop = loop_of(lambda: run(source, mesh, **settings))
    expected = run(**settings)
    assert_agrees(result, expected)
    assert result.info["num_steps"] == expected.info["num_steps"]
    if mesh == "seed":
        assert groups(loop) == []


def test_judges_split_their_batches(alone, both, monkeypatch):
    seen = []
    split = feeds.put_rows

    def spy(arrays, index, where):
        seen.append(where)
        return split(arrays, index, where)

    monkeypatch.setattr("inference._judges.put_rows", spy)
    many = both[0]
    for judge in (log_likelihood, sample_posterior):
        found, expected = (judge(one, HELD_OUT, num_samples=7) for one in (many, alone))
        if judge is log_likelihood:
            found, expected = {"z": found.pointwise}, {"z": expected.pointwise}
        np.testing.assert_allclose(found["z"], expected["z"], rtol=1e-4, atol=1e-5)
    # 50 data go onto the two devices of "seed", and 48 onto all eight
    log_likelihood(many, {name: array[:48] for name, array in DATA.items()}, num_samples=2)
    sizes = [
        len(set(where.devices_indices_map((n,)).values()))
        for where, n in zip([seen[0], seen[-1]], (50, 48), strict=True)
    ]
    assert sizes == [2, 8]


def test_a_run_resumes_with_other_devices(tmp_path, alone):
    run(num_steps=20, checkpoint=tmp_path / "run", validation=None, batch_size=BATCH)
    with pytest.warns(UserWarning, match="the run goes on, but mesh was None there and is"):
        result = run(mesh="seed", checkpoint=tmp_path / "run", validation=None)
    np.testing.assert_allclose(result.elbo, alone.elbo, rtol=1e-5)
    run(mesh="seed", checkpoint=tmp_path / "run", validation=None)  # there again: no warning


@pytest.mark.parametrize(
    ("mesh", "settings", "message"),
    [
        ("seed", {"num_seeds": 6}, "num_seeds: expected a multiple of 8, .* got 6; .* 2 devices"),
        ("data", {"batch_size": 20}, "batch_size: expected a multiple of 8, .* got 20; .* 4 devic"),
    ],
)
def test_what_devices_do_not_divide_is_refused(mesh, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        run(mesh=mesh, **settings)
