"""The linear-Gaussian script on small settings: what it finds and what it refuses."""

import numpy as np
import pytest

from experiments import compare, runner, runs
from experiments import linear_gaussian as script
from inference import Held
from models import linear_gaussian

pytestmark = pytest.mark.slow  # whole runs


@pytest.mark.slow
def test_every_guide_arrives_where_the_formulas_say(shared):
    config = script.Config(
        dataset=str(shared / "lines.npz"),
        num_latents=3,
        num_steps=6_000,
        batch_size=250,
        learning_rate=0.02,
        average=0.2,
        progress=False,
    )
    data = script.images(config)
    fits = runner.train(script.EXPERIMENT, config, data)
    result = script.summarize(config, data, fits, script.judge(config, data, fits))
    maximum, rows = result["maximum"]["log_likelihood"], result["fits"]
    tolerance = maximum["standard_error"] / 4  # what is left to the optimiser
    for name in ("trained/full-covariance", "trained/mean-field"):
        row = rows[name]
        assert row["log_likelihood"]["estimate"] < maximum["estimate"] + 1e-3
        assert abs(row["below_maximum"]["estimate"]) < tolerance, name
    for guide in ("full-covariance", "mean-field"):
        gap, best = rows[f"held/{guide}"]["gap"], rows[f"held/{guide}"]["best_gap"]
        assert -4 * gap["standard_error"] < gap["estimate"] - best < tolerance, guide
    assert rows["held/full-covariance"]["best_gap"] == 0
    assert rows["held/mean-field"]["best_gap"] > 3 * tolerance


def test_every_number_stands_beside_its_target(run_of, capsys):
    result, path = run_of("linear_gaussian").result, run_of("linear_gaussian").path
    assert list(result["fits"]) == ["trained/mean-field", "held/mean-field"]
    printed = script.table(result)
    for name, row in result["fits"].items():
        assert len(row["elbo"]["per_seed"]) == 2
        assert all(word in printed for word in name.split("/"))
        likelihood, elbo = row["log_likelihood"]["estimate"], row["elbo"]["estimate"]
        np.testing.assert_allclose(row["gap"]["estimate"], likelihood - elbo, atol=1e-6)
        best = result["maximum"]["log_likelihood"]["estimate"]
        np.testing.assert_allclose(row["below_maximum"]["estimate"], best - elbo, atol=1e-5)
        assert likelihood < best
    assert result["elbo"] == result["fits"]["trained/mean-field"]["elbo"]
    tree = runs.read_tree(path)
    assert "W" in tree["parameters"]
    assert "W" not in tree["held/mean-field/parameters"]
    for node in (tree, tree["held/mean-field"]):
        assert node["sample_stats"].elbo.shape == (2, 200)


def test_a_held_model_is_opened_as_it_was_trained(run_of):
    run = runs.load(run_of("linear_gaussian").path)
    first, model = run.fits["trained/mean-field"], run.fits["held/mean-field"].model
    assert isinstance(model, Held)
    params, held = first.params_of(0), model.params
    assert held.keys() == {"W", "b", "B", "sigma"}
    np.testing.assert_array_equal(held["b"], params["b"])
    W, rotated = np.asarray(params["W"]), held["W"]
    assert not np.allclose(rotated, W, rtol=0.1)
    np.testing.assert_allclose(rotated @ rotated.T, W @ W.T, atol=1e-6)
    assert repr(model) in run.fits["held/mean-field"].config["model"]


def test_a_run_is_compared_by_its_first_fit(run_of, tmp_path):
    finished = run_of("linear_gaussian")
    (tmp_path / "link").symlink_to(finished.path)
    trees = compare.read((finished.path, tmp_path / "link"))
    assert len(trees) == 2
    for row in compare.comparison.compare(trees).to_dict("index").values():
        assert row["log_likelihood"] == pytest.approx(finished.result["log_likelihood"]["estimate"])
        assert row["elbo"] == pytest.approx(finished.result["elbo"]["estimate"])
        assert row["difference"] == 0


def test_turning_the_latent_axes_leaves_the_likelihood(shared):
    config = script.Config(dataset=str(shared / "lines.npz"), num_latents=3, progress=False)
    data = script.images(config)
    model = config.model(data.record)
    held = script.hold(model, data.maximum | {"encoder": 0}, seed=0).params
    assert held.keys() == {"W", "b", "sigma"}
    exact = script.log_likelihood(model, held, data.train)
    best = script.log_likelihood(model, data.maximum, data.train)
    np.testing.assert_allclose(exact, best, rtol=1e-4)
    assert float(linear_gaussian.mean_field_gap(held)) > 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guides": ("prior",)}, "guides: expected some of full-covariance, .*got 'prior'"),
        ({"guides": ("mean-field",) * 2}, "guides: expected different ones"),
        ({"num_latents": 0}, "num_latents: expected at least 1, got 0"),
        ({"num_latents": 64}, "num_latents: expected fewer than the 64 numbers of one x"),
        ({"num_train": 9}, "num_latents = 10 directions, got 8 from 9 data"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"average": 1.0}, "average: expected a fraction below 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(dataset="digits", out=tmp_path / "run", **settings))
    assert not list(tmp_path.iterdir())
