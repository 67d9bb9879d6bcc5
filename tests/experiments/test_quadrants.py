"""The script of the quadrants, run for real on small settings: what it writes, prints, refuses."""

import json
import shutil
from dataclasses import replace

import arviz as az
import jax
import numpy as np
import pytest
from numpyro import handlers

from experiments import compare, mnist_quadrants, pictures
from experiments.mnist_quadrants import PUBLISHED, ROWS, Config, main, table, train
from models import guides, structured

SMALL = {
    "dataset": "digits",
    "num_test": 40,
    "num_validation": 60,
    "num_train": 500,
    "baseline_epochs": 6,
    "num_epochs": 3,
    "num_particles": 3,
    "num_samples": 20,
    "progress": False,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quadrants") / "run"
    return main(Config(**SMALL, out=out)), out


def test_a_run_directory_holds_everything(finished):
    result, out = finished
    files = {"config.json", "result.json", "trace.nc", "completions.png", "training.png"}
    assert files <= {path.name for path in out.iterdir()}
    assert json.loads((out / "result.json").read_text()) == result
    assert result["num_data"] == {"train": 500, "validation": 60, "test": 40}
    assert result["rows"].keys() == ROWS.keys()
    num_samples = dict.fromkeys(ROWS, 20) | {"nn": 1, "cvae_negative_elbo": 10}
    for name, row in result["rows"].items():
        for split in ("validation", "test"):
            assert 0 < row[split]["standard_error"] < row[split]["estimate"] < 48 * np.log(2) + 5
            assert row[split]["num_samples"] == num_samples[name]
    assert result["seconds"].keys() == {"compile", "run", "evaluate", "total"}


def test_the_trace_holds_rows_and_fits_and_the_baseline_is_frozen(finished):
    result, out = finished
    tree = az.from_netcdf(out / "trace.nc")
    for name in ROWS:
        pointwise = tree.evaluation[name].values
        assert pointwise.shape == (1, 40)
        estimate = result["rows"][name]["test"]["estimate"]
        assert -pointwise.mean() == pytest.approx(estimate, rel=1e-5)
    np.testing.assert_array_equal(
        tree.log_likelihood.x.values[:, 0], tree.evaluation.cvae_importance_sampling.values
    )
    baseline = [name for name in tree["nn"].posterior if name.startswith("baseline.")]
    assert len(baseline) == 6
    for fitted in (tree, tree["gsnn"]):
        for name in baseline:
            own, first = fitted.posterior[name].values, tree["nn"].posterior[name].values
            np.testing.assert_array_equal(own, first)
    assert any(name.startswith("encoder.") for name in tree.posterior)
    assert not any(name.startswith("encoder.") for name in tree["gsnn"].posterior)
    assert tree["gsnn"].validation_stats.elbo.shape[1] <= 4  # every three of twelve steps


def test_runs_of_the_quadrants_compare_their_importance_sampled_rows(finished, tmp_path, capsys):
    result, out = finished
    shutil.copytree(out, tmp_path / "copy")
    compared = compare.main(compare.Config((out, tmp_path / "copy")))
    row = result["rows"]["cvae_importance_sampling"]["test"]
    for values in compared["runs"].values():
        assert values["log_likelihood"] == pytest.approx(-row["estimate"], rel=1e-6)
        assert values["log_likelihood_se"] == pytest.approx(row["standard_error"], rel=1e-5)
        assert values["difference"] == 0
    assert "the settings are the same" in capsys.readouterr().out


def test_the_same_command_prints_the_result_again(finished, capsys):
    result, out = finished
    assert main(Config(**SMALL, out=out)) == result
    printed = capsys.readouterr().out
    for name, words in ROWS.items():
        assert words in printed
        assert f"{result['rows'][name]['test']['estimate']:.2f}" in printed
    assert "Sohn" not in printed  # these are not MNIST's numbers


@pytest.mark.parametrize("quadrants", [1, 2, 3])
def test_published_numbers_stand_beside_mnist_alone(quadrants, finished):
    result = finished[0] | {"quadrants": quadrants}
    for numbers in PUBLISHED[quadrants].values():
        beside = " / ".join(f"{n:.2f}" for n in numbers)
        assert beside in table(result | {"dataset": "mnist"})
        assert beside not in table(result)


def test_a_hybrid_is_called_one(finished):
    config = finished[0]["config"] | {"alpha": 0.5}
    assert "hybrid 0.5 (Monte Carlo)" in table(finished[0] | {"config": config})


def test_the_baseline_is_trained_on_where_all_are_trained_together(tmp_path):
    config = Config(**SMALL, quadrants="3", joint=True, alpha=0.5, kl_warm_up=0.0)
    dataset = config.data()
    fits = train(config, config.model(dataset), dataset, tmp_path)
    for name in ("gsnn", "cvae"):
        pairs = zip(
            *(jax.tree.leaves(fits[n].params["baseline"]) for n in ("nn", name)), strict=True
        )
        assert all((first != own).any() for first, own in pairs)
    assert fits["cvae"].config["objective"].startswith("Hybrid(")
    assert "alpha=0.5" in fits["cvae"].config["objective"]
    assert "RenyiELBO" in fits["cvae"].config["validation_objective"]
    assert fits["nn"].config["validation_objective"] is None


def test_all_is_each_of_them_in_a_directory_of_its_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        mnist_quadrants, "main", lambda config: asked.append(config) or {"of": config.quadrants}
    )
    result = main(Config(quadrants="all", num_epochs=7, out=tmp_path / "run"))
    assert [config.quadrants for config in asked] == ["1", "2", "3"]
    assert len({config.out for config in asked}) == 3
    assert all(config.out.parent == tmp_path / "run" for config in asked)
    assert {config.num_epochs for config in asked} == {7}
    assert result["quadrants"]["2"] == {"of": "2"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


@pytest.mark.parametrize("num_observed", [1, 2, 3])
def test_the_figures_draws_are_the_priors(num_observed, tmp_path, monkeypatch, rng):
    """The recognition network holds no number: what depends on it, is none either."""
    quadrants = structured.Quadrants(num_observed, (4, 4))
    model = structured.Model(structured.Baseline(quadrants, (3,)), 2, (3,), (3,))
    images = rng.integers(0, 2, (12, 4, 4)).astype(np.float32)
    test = dict(zip("cx", quadrants.split(images), strict=True))
    params = {}
    for program in (model, guides.mean_field(model)):
        sites = handlers.trace(handlers.seed(program, 0)).get_trace(**test)
        params |= {name: s["value"] for name, s in sites.items() if s["type"] == "param"}
    params["encoder"] = jax.tree.map(lambda p: p * np.nan, params["encoder"])
    both = {"nn": params, "cvae": params}
    shown = []
    monkeypatch.setattr(pictures, "grid", lambda rows, *args, **kwargs: shown.append(rows))
    result = {"dataset": "own", "quadrants": num_observed}
    mnist_quadrants.draw_completions(model, both, test, result, tmp_path / "x.png")
    (rows,) = shown
    assert rows.shape == (10, 3 + mnist_quadrants.NUM_DRAWS, 4, 4)
    assert np.isfinite(rows).all()
    np.testing.assert_array_equal(rows[:, 1], images[:10])
    hidden = rows[:, 0] == 0.5
    assert hidden.sum() == 10 * 4 * (4 - num_observed)
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
    model = config.model(config.data())
    assert model.baseline.quadrants == structured.Quadrants(2, (8, 8))
    assert model.baseline.binary_c
    assert model.decoder_sees_c
    paper = replace(config, preset="paper").model(config.data())
    assert (paper.num_latents, paper.hidden, paper.prior_hidden) == (200, (1000,) * 2, (1000,) * 2)
    assert paper.baseline.hidden == (1000, 1000)
