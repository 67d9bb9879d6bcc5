"""The script of exact answers: its gaps by formula, its verdicts, and one short run."""

import jax
import numpy as np
import pytest
from numpyro import handlers

from experiments import exact as script
from experiments import runner
from inference import Estimate, Fit, sample_posterior
from models import guides, hierarchical_gaussian, linear_gaussian, mixture, regression

CONFIG = script.Config(num_latents=3, progress=False)
DATA = script.diabetes(CONFIG)
NUM_DATA = len(DATA.train["x"])


def rung_and_data(name):
    kind = script.RUNGS[name]
    return kind(CONFIG, DATA.record), kind.arrays(DATA.train)


def least_gap(rung, data, family, shared="mean_field"):
    low, high = rung.least_gap(script.Name("", family, shared, "Trace_ELBO"), data)
    assert low == high
    return low


def best_guides(name):
    """By family, the rung's best Normal guide: means and precisions for each datum."""
    rung, data = rung_and_data(name)
    if name == "hierarchical":
        known = hierarchical_gaussian.posterior(rung.model, data)
        mean = np.stack([np.full(NUM_DATA, known.mu_loc), known.z_loc], axis=1)
        model = rung.model
        own = [model.tau_0**-2 + NUM_DATA * model.tau**-2, model.tau**-2 + model.sigma**-2]
        return {"full-covariance": (mean, np.tile(np.diag(own), (NUM_DATA, 1, 1)))}
    if name == "regression":
        mean = np.tile(regression.posterior(rung.model, data)[0], (NUM_DATA, 1))
        precision = regression.precision(rung.model, data)
    else:
        params = rung.program.params
        mean = np.asarray(linear_gaussian.posterior(rung.model, params, data)[0], np.float64)
        precision = np.asarray(linear_gaussian.precision(params), np.float64)
    every = {"full-covariance": precision, "mean-field": np.diag(np.diag(precision))}
    return {family: (mean, np.tile(p, (NUM_DATA, 1, 1))) for family, p in every.items()}


# --- formulas -------------------------------------------------------------------------------------


NORMAL = [name for name in script.RUNGS if name != "mixture"]


@pytest.mark.parametrize("name", NORMAL)
def test_the_best_guide_of_a_family_has_its_least_gap(name):
    rung, data = rung_and_data(name)
    for family, (mean, precision) in best_guides(name).items():
        shared = "full_covariance" if family == "full-covariance" else "mean_field"
        least = least_gap(rung, data, family, shared)
        assert rung.gap((mean, precision), data) == pytest.approx(least, abs=1e-6)
        for worse in ((mean + 0.01, precision), (mean, 1.1 * precision)):
            assert rung.gap(worse, data) > least + 1e-6


def test_the_gap_of_a_mixture_is_the_divergence_of_its_labels():
    """The exact encoder has none. A told label adds nothing, whatever the encoder says."""
    rung, data = rung_and_data("mixture")
    kernel, bias = mixture.discriminant(rung.program.params)
    start = {"median": np.zeros(2, np.float32), "spread": np.ones(2, np.float32)}
    gaps, unknown = [], data["y"] == -1
    for factor in (1.0, 0.5):
        affine = {"kernel": np.float32(factor * kernel), "bias": np.float32(factor * bias)}
        params = {"encoder": {"affine": affine}, "statistics": {"latents": {"y": start}}}
        guide = guides.mean_field(rung.model)
        fitted = Fit.from_params(rung.program, guide, params, example=data)
        q = rung.q(fitted, "mean-field", data)
        gaps.append(rung.gap(q, data))
        p = mixture.posterior(rung.program.params, data["x"])[unknown]
        expected = (q[unknown] * np.log(q[unknown] / p)).sum() / NUM_DATA
        assert gaps[-1] == pytest.approx(expected, abs=1e-7)
        np.testing.assert_array_equal(q[~unknown], np.eye(2)[data["y"][~unknown]])
    assert 0.3 < unknown.mean() < 0.7
    assert abs(gaps[0]) < 1e-6 < 0.01 < gaps[1]


def test_bounds_stand_where_a_family_has_no_formula():
    rung, data = rung_and_data("linear-gaussian")
    name = script.Name("linear-gaussian", "low-rank", "mean_field", "Trace_ELBO")
    assert rung.least_gap(name, data) == (0.0, least_gap(rung, data, "mean-field"))
    assert least_gap(rung, data, "structured") == least_gap(rung, data, "mean-field") > 0.03
    assert least_gap(rung, data, "flow") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family", "shared"),
    [
        ("linear-gaussian", "low-rank", "mean_field"),
        ("hierarchical", "flow", "mean_field"),
        ("regression", "mean-field", "full_covariance"),
    ],
)
def test_a_normal_guide_is_read_from_its_density(name, family, shared):
    """Its draws have the mean and the covariance, for each datum."""
    rung, data = rung_and_data(name)
    data = {name: array[:3] for name, array in data.items()}
    guide = guides.make(family, rung.model, globals=shared)
    sites = handlers.trace(handlers.seed(guide, jax.random.key(1))).get_trace(**data)
    params = {n: site["value"] for n, site in sites.items() if site["type"] == "param"}
    fitted = Fit.from_params(rung.program, guide, params, example=data)
    mean, precision = script.normals(fitted, rung.latents, data)
    num_draws = 20_000
    draws = sample_posterior(fitted, data, num_samples=num_draws)
    for n in range(3):
        parts = [draws[site][0] for site in rung.latents]
        is_local = [site == "z" for site in rung.latents]
        parts = [part[:, n] if own else part for part, own in zip(parts, is_local, strict=True)]
        joined = np.concatenate([np.reshape(part, (num_draws, -1)) for part in parts], axis=1)
        whitened = (joined - mean[n]) @ np.linalg.cholesky(precision[n])
        errors = 5 / num_draws**0.5
        np.testing.assert_allclose(whitened.mean(0), 0, atol=errors)
        identity = np.eye(mean.shape[1])
        np.testing.assert_allclose(np.cov(whitened.T), identity, atol=errors * 2**0.5)


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "gap", "sampled", "within"),
    [
        ("Trace_ELBO", 0.11, 0.11, "yes"),
        ("Trace_ELBO", 0.09, 0.09, "no"),  # below the least of the family
        ("Trace_ELBO", 0.14, 0.14, "no"),  # above the room
        ("Trace_ELBO", 0.11, 0.12, "no"),  # the draws disagree with the formula
        ("Trace_ELBO", None, 0.097, "yes"),  # four standard errors
        ("Trace_ELBO", None, 0.095, "no"),
        ("importance-weighted", 0.14, 0.14, "no claim"),
        ("importance-weighted", 0.09, 0.09, "no"),
        ("reweighted-wake-sleep", 0.14, 0.14, "no claim"),
    ],
)
def test_a_row_says_whether_its_claim_holds(objective, gap, sampled, within):
    name = f"linear-gaussian/mean-field/mean_field/{objective}"
    terms = Estimate("elbo", np.zeros((1, 1)), 1, {})
    judged = script.Judged(terms, -1 - sampled, 0.001, -1.0, (0.1, 0.1), gap)
    row = script.row(name, judged)
    assert row["within"] == within
    assert row["gap"] == pytest.approx(sampled if gap is None else gap)


def test_every_family_and_every_objective_has_a_fit():
    names = [script.Name.of(name) for name in script.Config().names()]
    assert len(names) == len(set(names)) > 40
    for rung, kind in script.RUNGS.items():
        own = [name for name in names if name.rung == rung]
        assert {name.family for name in own} == set(kind.families)
        assert {name.objective for name in own} == set(kind.objectives)
        shared = guides.GLOBALS if kind.has_globals else ("mean_field",)
        assert {name.globals for name in own} == set(shared)


def test_a_rung_takes_the_objectives_that_it_can():
    kinds = script.RUNGS
    assert set(kinds["linear-gaussian"].objectives) == set(script.TRAINABLE)
    for name in ("hierarchical", "regression"):
        assert set(kinds[name].objectives) == set(script.TRAINABLE) - set(script.LOCAL)
    assert kinds["mixture"].families == ("mean-field", "structured")
    for name in script.TRAINABLE:
        takes_discrete = script.OBJECTIVES[name](2).can_infer_discrete
        assert (name in kinds["mixture"].objectives) == takes_discrete


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_run_has_a_row_for_every_fit(run_of):
    finished = run_of("exact")
    rows, printed = finished.result["fits"], script.table(finished.result)
    assert list(rows) == finished.config.names()
    assert {script.Name.of(name).rung for name in rows} == set(script.RUNGS)
    for name, row in rows.items():
        rung = script.rung_of(finished.config, DATA.record, name)
        own = script.arrays(DATA, name)
        what = script.Name.of(name)
        assert row["sampled_gap"] == pytest.approx(row["exact"] - row["elbo"])
        if what.rung != "linear-gaussian":  # which has another number of latents here
            assert row["exact"] == pytest.approx(rung.exact(own))
            assert row["least_gap"][0] == pytest.approx(least_gap(rung, own, what.family))
        assert row["gap"] > row["least_gap"][0] - script.ROUNDING
        assert abs(row["sampled_gap"] - row["gap"]) < 4 * row["monte_carlo_error"] + script.ROUNDING
        assert all(word in printed for word in (what.rung, what.family, f"{row['gap']:.5f}"))


@pytest.mark.slow
def test_claims_hold_where_a_family_is_trained_to_its_end():
    config = script.Config(
        quick=True,
        families=("low-rank", "full-covariance"),
        objectives=("sticking-the-landing",),
        num_steps=3_000,
        progress=False,
    )
    data = script.diabetes(config)
    fits = runner.train(script.EXPERIMENT, config, data)
    rows = script.summarize(config, data, fits, script.judge(config, data, fits))["fits"]
    assert {name: row for name, row in rows.items() if row["within"] == "no"} == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ("prior",)}, "families: expected some of mean-field, .*, got 'prior'"),
        ({"objectives": ("ELBO",)}, "objectives: expected some of Trace_ELBO, .*, got 'ELBO'"),
        ({"num_latents": 10}, "num_latents: expected fewer than the 10 numbers of one x"),
        ({"num_samples": 19}, "num_samples: expected at least 20, got 19"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(out=tmp_path / "run", **settings))
    assert not list(tmp_path.iterdir())
