"""The toy's script: what it recovers, and what it refuses."""

import numpy as np
import pytest

from experiments import gaussian_mean as script
from experiments import runner, runs
from models import gaussian_mean


def worst_errors(result):
    """The seeds' largest distance to maximum likelihood, in standard errors, by parameter."""
    return {
        name: max(abs(e - p["maximum_likelihood"]) for e in p["per_seed"]) / p["standard_error"]
        for name, p in result["parameters"].items()
    }


def results_of(config):
    """The numbers of ``result.json``, without a directory."""
    data = script.simulate(config)
    fits = runner.train(script.EXPERIMENT, config, data)
    return script.summarize(config, data, fits, script.judge(config, data, fits))


def test_a_short_run_recovers_the_maximum(run_of):
    result = run_of("gaussian_mean").result
    assert result["parameters"].keys() == set(gaussian_mean.PARAMETERS)
    assert max(worst_errors(result).values()) < 0.25, worst_errors(result)
    for p in result["parameters"].values():
        assert len(p["per_seed"]) == 2
        assert abs(p["estimate"] - p["optimum"]) < 4 * p["standard_error"]
    elbo = result["elbo"]
    assert abs(elbo["estimate"] - elbo["maximum_likelihood"]) < 0.005
    assert abs(elbo["estimate"] - elbo["optimum"]) < 4 * elbo["standard_error"]
    assert elbo["standard_error"] == pytest.approx(
        0.5**0.5 / 4_000**0.5, rel=0.1
    )  # of log p(x | c)


def test_arviz_reads_the_parameters_and_the_data(run_of):
    finished = run_of("gaussian_mean")
    tree = runs.read_tree(finished.path)
    assert tree["sample_stats"].elbo.shape == (2, 600)
    assert list(tree["sample_stats"].chain.values) == [5, 6]
    for name, p in finished.result["parameters"].items():
        np.testing.assert_allclose(tree["parameters"][name].values[:, 0], p["per_seed"])
    data = finished.config.truth().simulate(4_000, 5)
    np.testing.assert_array_equal(tree["observed_data"].x, data["x"])
    np.testing.assert_array_equal(tree["constant_data"].c, data["c"])


@pytest.mark.slow
def test_defaults_recover_the_truth():
    result = results_of(script.Config(progress=False))
    for name, p in result["parameters"].items():
        assert len(p["per_seed"]) == 4
        for estimate in p["per_seed"]:
            assert abs(estimate - p["optimum"]) < 3 * p["standard_error"], name
    assert max(worst_errors(result).values()) < 0.25, worst_errors(result)
    elbo = result["elbo"]
    assert abs(elbo["estimate"] - elbo["maximum_likelihood"]) < 0.005
    assert abs(elbo["estimate"] - elbo["optimum"]) < 4 * elbo["standard_error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mu_0", "sigma_0", "sigma", "seed"),
    [(-40.0, 0.05, 0.05, 11), (40.0, 20.0, 4.0, 12), (0.0, 0.05, 0.25, 13), (7.0, 4.0, 20.0, 14)],
)
def test_the_same_settings_serve_other_truths(mu_0, sigma_0, sigma, seed):
    config = script.Config(mu_0=mu_0, sigma_0=sigma_0, sigma=sigma, seed=seed, progress=False)
    result = results_of(config)
    assert max(worst_errors(result).values()) < 0.5, worst_errors(result)
    best = result["elbo"]["maximum_likelihood"]
    assert max(abs(e - best) for e in result["elbo"]["per_seed"]) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("objective", sorted(script.OBJECTIVES))
def test_every_objective_trains(objective):
    config = script.Config(objective=objective, num_seeds=1, num_steps=1500, progress=False)
    result = results_of(config)
    assert max(worst_errors(result).values()) < 3, worst_errors(result)
    assert abs(result["elbo"]["estimate"] - result["elbo"]["maximum_likelihood"]) < 0.005


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_data": 0}, "num_data: expected at least 1, got 0"),
        ({"sigma": 0.0}, "sigma: expected a positive, finite standard deviation, got 0.0"),
        ({"sigma_0": -2.0}, "sigma_0: expected a positive, finite standard deviation, got -2.0"),
        ({"num_data": 10, "batch_size": 11}, "batch_size: expected 1 to num_data = 10"),
        ({"objective": "ELBO"}, "objective: expected one of Trace_ELBO, .*, got 'ELBO'"),
        ({"average": 1.0}, "average: expected a fraction below 1, got 1.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        script.Config(**settings)


@pytest.mark.parametrize(
    ("num_data", "message"),
    [(2, "the likelihood has no maximum"), (1, "expected conditions that vary")],
)
def test_data_without_a_maximum_are_refused_before_anything_is_written(num_data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(num_data=num_data, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_coordinates_make_the_inputs_uncorrelated():
    rng = np.random.default_rng(0)
    c = rng.normal(3.0, 0.2, 1_000)
    x = 40 + c + 0.01 * rng.normal(size=1_000)
    matrix = script.coordinates(x, c, 1.0, scale=2.0).astype(float)
    outputs = np.stack([x, c, np.ones(1_000)], axis=1) @ matrix
    np.testing.assert_allclose(outputs.T @ outputs / 1_000, 4 * np.eye(3), atol=0.05)
