"""The script of the quadrants: its rows, its figures, its settings, and what it refuses."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from experiments import mnist_quadrants, pictures, runner, runs
from experiments.mnist_quadrants import EXPERIMENT, PUBLISHED, ROWS, Config, main, table
from inference import Fit, Hybrid, KLWarmUp, Prepared
from models import guides
from models.quadrants import Baseline, Model, Quadrants

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture(scope="module")
def finished(run_of):
    return run_of("mnist_quadrants")


@pytest.fixture(scope="module")
def opened(finished):
    return runs.load(finished.path)


def test_every_row_has_both_splits(finished):
    result = finished.result
    assert result["num_data"] == {"train": 500, "validation": 60, "test": 40}
    assert result["rows"].keys() == ROWS.keys()
    num_samples = dict.fromkeys(ROWS, 20) | {"nn": 1, "cvae_negative_elbo": 10}
    for name, row in result["rows"].items():
        for split in ("validation", "test"):
            assert 0 < row[split]["standard_error"] < row[split]["estimate"] < 48 * np.log(2) + 5
            assert row[split]["num_samples"] == num_samples[name]
    likelihood = result["rows"]["cvae_importance_sampling"]["test"]
    assert result["log_likelihood"]["estimate"] == -likelihood["estimate"]
    assert result["elbo"]["estimate"] == -result["rows"]["cvae_negative_elbo"]["test"]["estimate"]
    printed = table(result)
    for name, words in ROWS.items():
        assert words in printed
        assert f"{result['rows'][name]['test']['estimate']:.2f}" in printed
    assert "Sohn" not in printed  # these are not MNIST's numbers


def test_the_trace_holds_rows_and_fits_and_the_baseline_is_frozen(finished, opened):
    tree = opened.tree
    names = {"cvae_importance_sampling": "log_likelihood", "cvae_negative_elbo": "elbo"}
    for name in ROWS:
        pointwise = tree["evaluation"][names.get(name, name)].values
        assert pointwise.shape == (1, 40)
        estimate = finished.result["rows"][name]["test"]["estimate"]
        assert -pointwise.mean() == pytest.approx(estimate, rel=1e-5)
    baseline = [n for n in tree["nn/parameters"] if n.startswith("baseline.")]
    assert len(baseline) == 6
    for node in (tree, tree["gsnn"]):
        for name in baseline:
            own, first = node["parameters"][name].values, tree["nn/parameters"][name].values
            np.testing.assert_array_equal(own, first)
    assert any(name.startswith("encoder.") for name in tree["parameters"])
    assert not any(name.startswith("encoder.") for name in tree["gsnn/parameters"])
    assert tree["gsnn/validation_stats"].elbo.shape[1] <= 4  # every three of twelve steps
    assert opened.fit is opened.fits["cvae"]


def test_the_judged_data_are_the_test_images(opened):
    """Runs of other quadrants are not compared: they judge other pixels."""
    test = opened.fit.prepare(opened.data().test)
    assert test.keys() == {"c", "x"}
    judged = json.loads(opened.tree["evaluation"].attrs["data"])
    assert judged == runs.describe_arrays(test)


@pytest.mark.parametrize("quadrants", [1, 2, 3])
def test_published_numbers_stand_beside_mnist_alone(quadrants, finished):
    result = finished.result | {"quadrants": quadrants}
    for numbers in PUBLISHED[quadrants].values():
        beside = " / ".join(f"{n:.2f}" for n in numbers)
        assert beside in table(result | {"dataset": "mnist"})
        assert beside not in table(result)


def test_a_hybrid_is_called_one(finished):
    config = finished.result["config"] | {"alpha": 0.5}
    assert "hybrid 0.5 (Monte Carlo)" in table(finished.result | {"config": config})


def test_what_each_fit_trains(opened):
    data, fits = opened.data(), opened.fits

    def settings(name, **changes):
        return EXPERIMENT.training(replace(opened.config, **changes), data, name, fits)

    assert "init" not in settings("nn")
    assert settings("nn")["num_epochs"] == 6
    for name in ("gsnn", "cvae"):
        np.testing.assert_array_equal(
            settings(name)["init"]["baseline"]["mlp"]["layers"][0]["bias"],
            fits["nn"].params_of(0)["baseline"]["mlp"]["layers"][0]["bias"],
        )
        assert settings(name)["validation_objective"].num_particles == 3
    assert isinstance(settings("cvae")["objective"], KLWarmUp)
    hybrid = settings("cvae", alpha=0.5, kl_warm_up=0.0)["objective"]
    assert isinstance(hybrid, Hybrid)
    assert hybrid.alpha == 0.5
    values = {"baseline": jnp.ones(3), "decoder": jnp.ones(3)}
    for joint in (False, True):
        optimizer = settings("cvae", joint=joint)["optimizer"]
        updates, _ = optimizer.update(values, optimizer.init(values), values)
        assert (updates["decoder"] != 0).all()
        assert (updates["baseline"] != 0).all() == joint


def test_all_is_each_of_them_in_a_directory_of_its_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        runner, "run", lambda _, config: asked.append(config) or {"of": config.quadrants}
    )
    result = main(Config(quadrants="all", num_epochs=7, out=tmp_path / "run"))
    assert [config.quadrants for config in asked] == ["1", "2", "3"]
    assert len({config.out for config in asked}) == 3
    assert all(config.out.parent == tmp_path / "run" for config in asked)
    assert {config.num_epochs for config in asked} == {7}
    assert result["quadrants"]["2"] == {"of": "2"}
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"out: .* holds run; give another|holds thesis"):
        main(Config(quadrants="all", out=tmp_path))


def test_the_figures_draws_are_the_priors(monkeypatch, rng):
    """The recognition network holds no number. So nothing that is drawn depends on it."""
    quadrants = Quadrants(2, (4, 4))
    model = Model(Baseline(quadrants, (3,)), 2, (3,), (3,))
    images = rng.integers(0, 2, (12, 4, 4)).astype(np.float32)
    test = Prepared(dict(zip("cx", map(np.asarray, quadrants.split(images)), strict=True)))
    programs = {
        "nn": (model.baseline, guides.prior(model.baseline)),
        "cvae": (model, guides.mean_field(model)),
    }
    fits = {}
    for name, pair in programs.items():
        params = {}
        for program in pair:
            sites = handlers.trace(handlers.seed(program, 0)).get_trace(**test)
            params |= {n: s["value"] for n, s in sites.items() if s["type"] == "param"}
        fits[name] = Fit.from_params(*pair, params, example=test)
    encoder = jax.tree.map(lambda p: p * np.nan, fits["cvae"].params["encoder"])
    fits["cvae"] = replace(fits["cvae"], params=fits["cvae"].params | {"encoder": encoder})
    shown = []
    monkeypatch.setattr(pictures, "grid", lambda rows, *args, **kwargs: shown.append(rows))
    mnist_quadrants.completions(fits, test, "own")
    (rows,) = shown
    assert rows.shape == (10, 3 + mnist_quadrants.NUM_DRAWS, 4, 4)
    assert np.isfinite(rows).all()
    np.testing.assert_array_equal(rows[:, 1], images[:10])
    hidden = rows[:, 0] == 0.5
    assert hidden.sum() == 10 * 4 * 2
    for column in range(rows.shape[1]):  # every column has the observed quadrants as they are
        np.testing.assert_array_equal(rows[:, column][~hidden], images[:10][~hidden])
    draws = rows[:, 3:]
    assert (draws.std(1)[hidden] > 0).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quadrants": "4"}, "quadrants: expected one of 1, 2, 3, all, got '4'"),
        ({"preset": "large"}, "preset: expected one of paper, small, got 'large'"),
        ({"alpha": -0.1}, "alpha: expected a share from 0 to 1, got -0.1"),
        ({"num_epochs": 0}, "num_epochs: expected at least 1, got 0"),
        ({"num_epochs": 4, "kl_warm_up": 5.0}, "kl_warm_up: expected 0 to num_epochs = 4, got 5"),
        ({"num_validation": 0}, "num_validation: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


@pytest.mark.parametrize("shape", [(8, 7), (8, 8, 3)])
def test_images_that_cannot_be_cut_are_refused_before_anything_is_written(shape, tmp_path, rng):
    np.save(tmp_path / "mine.npy", rng.integers(0, 256, (30, *shape), dtype=np.uint8))
    config = Config(dataset=str(tmp_path / "mine.npy"), out=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"image_shape: expected .* both even"):
        main(config)
    assert not (tmp_path / "run").exists()


def test_the_settings_reach_the_model():
    config = Config(dataset="digits", quadrants="2", binary_c=True, decoder_sees_c=True)
    model = config.model(config.data().record)
    assert model.baseline.quadrants == Quadrants(2, (8, 8))
    assert model.baseline.binary_c
    assert model.decoder_sees_c
    paper = replace(config, preset="paper").model(config.data().record)
    assert (paper.num_latents, paper.hidden, paper.prior_hidden) == (200, (1000,) * 2, (1000,) * 2)
    assert paper.baseline.hidden == (1000, 1000)
