"""A fit: one seed of it, known parameters, prepared data, files."""

import dataclasses
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.scipy.special import logit

from inference import (
    Fit,
    FitError,
    Prepared,
    ProgramError,
    fit,
    log_likelihood,
    pointwise_elbo,
    sample_posterior,
)

RNG = np.random.default_rng(0)
IMAGES = {"x": RNG.integers(0, 256, (40, 3), dtype=np.uint8)}


def dequantise(key, batch):
    return {"x": logit((batch["x"] + random.uniform(key, batch["x"].shape)) / 256)}


def model(x=None):
    weight = numpyro.param("weight", lambda key: random.normal(key, (2, 3)))
    with numpyro.plate("rows", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)


def guide(x):
    network = {"layers/0": jnp.full((3, 2), 0.1), "bias's": jnp.zeros(2, jnp.bfloat16)}
    network = numpyro.param("net$params", network)
    scale = numpyro.param("scale", 0.5, constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(x)):
        loc = x @ network["layers/0"] + network["bias's"].astype(jnp.float32)
        numpyro.sample("z", dist.Normal(loc, scale).to_event(1))


@pytest.fixture(scope="module")
def result():
    return fit(
        model,
        guide,
        IMAGES,
        preprocess=dequantise,
        num_steps=8,
        num_seeds=3,
        seed=7,
        validation=0.25,
        validate_every=2,
        patience=10,
        average=0.5,
        progress=False,
    )


@pytest.fixture(scope="module")
def test_data(result):
    return result.prepare({"x": IMAGES["x"][:6]})


def assert_same_bits(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


# --- what a person sees ---------------------------------------------------------------------------


def test_it_says_what_it_is_in_ten_lines(result):
    lines = repr(result).splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 100
    for words in ("model", "guide", "Trace_ELBO", "uint8[30, 3]", "net$params", "7, 8, 9", "ELBO"):
        assert words in repr(result)
    for i in range(3):
        assert f"{result.validation_elbo[i].max():.4f}" in repr(result)


# --- one seed -------------------------------------------------------------------------------------


def test_one_seed_by_position_and_by_random_seed(result):
    second = result.isel(seed=1)
    assert second.seeds == [8]
    assert second.num_seeds == 1
    for one in (result.sel(seed=8), result.isel(seed=-2)):
        assert one.seeds == [8]
        assert_same_bits(one.params, second.params)
    assert_same_bits(second.params, jax.tree.map(lambda p: p[1:2], result.params))
    assert_same_bits(second.params_of(0), result.params_of(1))
    assert result.params_of(0)["weight"].shape == (2, 3)
    np.testing.assert_array_equal(second.elbo, result.elbo[1:2])
    np.testing.assert_array_equal(second.validation_elbo, result.validation_elbo[1:2])
    assert second.info["num_steps"] == [8]
    assert second.info["num_skipped"] == [0]
    assert second.state.best_elbo.shape == (1,)
    with pytest.raises(IndexError, match=r"seed: expected a position below 3.*got 3"):
        result.isel(seed=3)
    with pytest.raises(KeyError, match=r"seed: expected one of \[7, 8, 9\], got 1; isel takes"):
        result.sel(seed=1)


@pytest.mark.parametrize(("patience", "best"), [(None, 9), (3, 7)])
def test_the_best_seed_has_the_greatest_held_out_elbo(result, patience, best):
    """The last one counts, or with patience the greatest."""
    elbo = np.array([[-1.0, -5.0, np.nan], [-4.0, -3.0, -3.5], [-9.0, np.nan, -2.0]])
    config = result.config | {"patience": patience}
    changed = dataclasses.replace(result, validation_elbo=elbo, config=config)
    if patience is None:
        assert changed.best().seeds == [best]
        changed = dataclasses.replace(changed, validation_elbo=elbo[:, :1])
        assert changed.best().seeds == [7]
    else:
        assert changed.best().seeds == [best]


def test_without_held_out_data_there_is_no_best_seed(result):
    with pytest.raises(ValueError, match=r"best: .*give fit the setting validation="):
        dataclasses.replace(result, validation_elbo=None).best()


# --- known parameters -----------------------------------------------------------------------------


def test_known_parameters_are_a_fit_of_one_seed(result, test_data):
    known = Fit.from_params(model, guide, result.params_of(1), example=test_data)
    assert known.num_seeds == 1
    judged = log_likelihood(known, test_data, num_samples=5)
    expected = log_likelihood(result, test_data, num_samples=5)
    np.testing.assert_array_equal(judged.pointwise, expected.pointwise[1:2])
    assert "weight" in repr(known)


def test_known_parameters_may_come_with_a_preprocess(result):
    known = Fit.from_params(
        model, guide, result.params_of(1), example=IMAGES, preprocess=dequantise
    )
    assert_same_bits(dict(known.prepare(IMAGES)), dict(result.prepare(IMAGES)))


def test_parameters_of_other_programs_are_no_fit(result, test_data):
    params = result.params_of(0)
    for wrong, name in (
        ({n: p for n, p in params.items() if n != "scale"}, "scale"),
        (params | {"weight": jnp.zeros((3, 3))}, "weight"),
        (params | {"stray": jnp.zeros(())}, "stray"),
    ):
        with pytest.raises(ProgramError, match=rf"parameter \['{name}'\]: expected"):
            Fit.from_params(model, guide, wrong, example=test_data)


# --- data -----------------------------------------------------------------------------------------


def test_data_are_prepared_once_with_a_fixed_key(result):
    once, twice = result.prepare(IMAGES), result.prepare(IMAGES)
    assert isinstance(once, Prepared)
    np.testing.assert_array_equal(once["x"], twice["x"])
    grey = np.floor(256 / (1 + np.exp(-np.asarray(once["x"], np.float64))))
    np.testing.assert_array_equal(grey, IMAGES["x"])
    assert result.prepare(once) is once


def test_judges_refuse_data_that_are_not_prepared(result, test_data):
    for judge in (log_likelihood, pointwise_elbo, sample_posterior):
        with pytest.raises(ValueError, match=r"data: .*got plain ones; write .*result\.prepare\("):
            judge(result, IMAGES)
    assert log_likelihood(result, test_data, num_samples=2).pointwise.shape == (3, 6)
    marked = Prepared({"x": np.asarray(test_data["x"])})
    np.testing.assert_array_equal(
        pointwise_elbo(result, marked).pointwise, pointwise_elbo(result, test_data).pointwise
    )


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("fits") / "a" / "fit"
    result.save(path)
    return path


def test_a_fit_that_is_read_back_has_every_bit(result, saved, test_data):
    loaded = Fit.load(saved, model, guide, preprocess=dequantise)
    assert loaded.config == result.config
    assert loaded.info == result.info
    assert loaded.batch == result.batch
    assert loaded.seeds == [7, 8, 9]
    for part in ("params", "mutable"):
        ours, theirs = getattr(loaded, part), getattr(result, part)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert_same_bits(ours, theirs)
        assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)
    assert_same_bits(jax.tree.leaves(loaded.state), jax.tree.leaves(result.state))
    np.testing.assert_array_equal(loaded.elbo, result.elbo)
    np.testing.assert_array_equal(loaded.validation_elbo, result.validation_elbo)
    prepared = loaded.prepare({"x": IMAGES["x"][:6]})
    np.testing.assert_array_equal(prepared["x"], test_data["x"])
    for judge in (log_likelihood, pointwise_elbo):
        ours, theirs = (judge(r, test_data, num_samples=2) for r in (loaded, result))
        np.testing.assert_array_equal(ours.pointwise, theirs.pointwise)


def test_files_hold_arrays_and_json_and_no_pickle(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["arrays.npz", "fit.json"]
    json.loads((saved / "fit.json").read_text())
    with zipfile.ZipFile(saved / "arrays.npz") as archive:
        assert all(name.endswith(".npy") for name in archive.namelist())
    with np.load(saved / "arrays.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_a_fit_is_saved_again_in_its_place(result, tmp_path):
    result.save(tmp_path / "fit")
    result.isel(seed=0).save(tmp_path / "fit")
    assert Fit.load(tmp_path / "fit", model, guide, preprocess=dequantise).seeds == [7]


def test_a_fit_without_a_state_is_saved_too(result, test_data, tmp_path):
    known = Fit.from_params(model, guide, result.params_of(1), example=test_data)
    known.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", model, guide)
    assert loaded.state is None
    assert loaded.validation_elbo is None
    assert_same_bits(loaded.params, known.params)


def test_without_its_preprocess_a_loaded_fit_prepares_nothing(saved, test_data):
    loaded = Fit.load(saved, model, guide)
    with pytest.raises(ValueError, match=r"prepare: expected the fit's preprocess, .*dequantise"):
        loaded.prepare(IMAGES)
    with pytest.raises(ValueError, match="expected data that the fit's preprocess has prepared"):
        pointwise_elbo(loaded, IMAGES)
    assert np.isfinite(pointwise_elbo(loaded, test_data).pointwise).all()


def break_nothing_but(name, change):
    def damage(path):
        (path / name).write_bytes(change((path / name).read_bytes()))

    return damage


def edit(change):
    """A change of the JSON file."""

    def damage(path):
        described = json.loads((path / "fit.json").read_text())
        change(described)
        (path / "fit.json").write_text(json.dumps(described))

    return damage


def without_one_array(path):
    with np.load(path / "arrays.npz") as archive:
        arrays = {name: archive[name] for name in archive.files[1:]}
    np.savez(path / "arrays.npz", **arrays)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "fit.json").unlink(), "got no fit.json in it"),
        (lambda path: (path / "arrays.npz").unlink(), "got no arrays.npz in it"),
        (break_nothing_but("arrays.npz", lambda b: b[: len(b) // 2]), "that cannot be read"),
        (break_nothing_but("arrays.npz", lambda b: b""), "that cannot be read"),
        (
            break_nothing_but("arrays.npz", lambda b: b.replace(b"NUMPY", b"SNAKE")),
            "cannot be read",
        ),
        (break_nothing_but("fit.json", lambda b: b[: len(b) // 2]), "that cannot be read"),
        (break_nothing_but("fit.json", lambda b: b'{"a": 1}'), "that cannot be read"),
        (break_nothing_but("fit.json", lambda b: b"[1, 2]"), "that cannot be read"),
        (break_nothing_but("fit.json", lambda b: b"\xff\xfe"), "that cannot be read"),
        (edit(lambda d: d.pop("config")), "that cannot be read"),
        (edit(lambda d: d.pop("batch")), "that cannot be read"),
        (without_one_array, "that cannot be read"),
        (edit(lambda d: d.update(format=99)), "expected format 1 or older, got 99, written by"),
    ],
)
def test_a_damaged_or_foreign_directory_is_one_error(result, tmp_path, damage, message):
    path = tmp_path / "fit"
    result.save(path)
    damage(path)
    with pytest.raises(FitError) as caught:
        Fit.load(path, model, guide)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_none_is_the_same_error(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FitError, match=r"expected a saved fit, got no fit\.json in it"):
            Fit.load(path, model, guide)


def test_other_programs_are_refused(saved):
    def other_model(x=None):
        weight = numpyro.param("weight", jnp.zeros((2, 4)))
        with numpyro.plate("rows", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal((z @ weight)[:, :3], 1.0).to_event(1), obs=x)

    def renamed_guide(x):
        scale = numpyro.param("width", 0.5)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(jnp.zeros(2), scale).to_event(1))

    with pytest.raises(
        FitError, match=r"\['weight'\]: expected shape \(2, 4\).*got shape \(2, 3\)"
    ):
        Fit.load(saved, other_model, guide)
    with pytest.raises(FitError, match=r"\['width'\]: expected shape \(\).* got none"):
        Fit.load(saved, model, renamed_guide)


def test_what_cannot_be_written_is_an_error(result, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FitError, match=r"expected a (new )?directory.*give another directory"):
            result.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
