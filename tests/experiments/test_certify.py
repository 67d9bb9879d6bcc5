"""The certificate: it passes, it fails where a judge is broken, and it has the models' formulas."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import certify, exact, judges
from experiments.known import PROBLEMS, Trial, log_normal
from experiments.known_mixtures import PROBLEMS as MIXTURES
from experiments.known_mixtures import MixtureTrial
from inference import fit, inference_gap
from models import gaussian_mean, hierarchical_gaussian, linear_gaussian, mixture, regression

CONFIG = certify.Config(quick=True, progress=False)
QUICK = {name: known for name, known in judges.JUDGES.items() if known.is_quick}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The result of a quick run, and the file that it wrote."""
    path = tmp_path_factory.mktemp("certificate") / "certificate.md"
    return certify.main(replace(CONFIG, out=path)), path.read_text()


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_passes_and_writes_the_certificate(quick):
    result, written = quick
    assert result["passed"], written
    assert result["p_value"] > certify.LEVEL
    assert {known["judge"] for known in result["rows"]} == set(QUICK)
    for judge, known in QUICK.items():
        assert f"- `{judge}`: {known.claim}." in written
    for words in ("passed", result["command"], f"jax {result['versions']['jax']}"):
        assert words in written


@pytest.mark.slow
def test_every_row_has_data_and_a_key_of_its_own(quick):
    rows = quick[0]["rows"]
    hashes = [known["data"]["x"].split("sha256:")[1] for known in rows]
    assert len(set(hashes)) == len(rows)
    keys = [certify.trial_of(CONFIG, *name).key for name in CONFIG.names]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(rows)


def test_every_judge_has_a_row_on_every_problem_with_an_answer():
    names = certify.Config().names
    assert len(names) == len(set(names)) > 150
    for problem, guide in judges.PROGRAMS:
        own = {name[0] for name in names if name[1:3] == (problem, guide)}
        refused = {"label_check"} if not judges.PROBLEMS[problem].num_labels else set()
        refused |= {"log_likelihood"} if judges.PROBLEMS[problem].num_shared else set()
        assert own >= {name for name in judges.JUDGES if ":" not in name} - refused
        assert not own & refused


# --- broken judges --------------------------------------------------------------------------------


def by_site(values):
    """Draws that are twice as large."""
    return {name: 2 * array for name, array in values.items()}


def estimate(known):
    """A number that is 0.05 nats too great."""
    return replace(known, pointwise=known.pointwise + 0.05)


def terms(known):
    """Terms that are all wrong."""
    wrong = {n: estimate(getattr(known, n)) for n in ("elbo", "reconstruction", "kl")}
    wrong |= {n: by_site(getattr(known, n)) for n in ("kl_of_globals", "kl_per_dim", "z_loc")}
    return replace(known, **wrong)


def labels(known):
    """Labels in another order."""
    return replace(known, log_likelihood=np.roll(known.log_likelihood, 1, axis=2))


def prediction(known):
    """Probabilities of the labels in another order."""
    wrong = {n: getattr(known, n) for n in ("by_guide", "by_model")}
    wrong = {n: replace(side, probs=np.roll(side.probs, 1, axis=2)) for n, side in wrong.items()}
    return replace(known, **wrong)


def bounds(known):
    """Bounds that are both 0.3 nats too great."""
    wrong = {n: getattr(known, n) for n in ("lower", "upper") if getattr(known, n) is not None}
    return replace(known, **{n: replace(e, pointwise=e.pointwise + 0.3) for n, e in wrong.items()})


def places(tree):
    """Draws of the guide that lie too often above z."""
    tree["prior_sbc"] = tree["prior_sbc"].to_dataset() ** 2
    tree["coverage"] = tree["coverage"].to_dataset() * 0.9
    return tree


BROKEN = {
    "pointwise_elbo": estimate,
    "elbo_terms": terms,
    "log_likelihood": estimate,
    "log_predictive_density": estimate,
    "label_check": labels,
    "predict": prediction,
    "pointwise_log_likelihood": by_site,
    "sample_posterior": by_site,
    "sample_posterior_predictive": by_site,
    "sample_prior_predictive": by_site,
    "encode": by_site,
    "decode": by_site,
    "bracket": bounds,
    "sbc": places,
}


def function_of(judge):
    return judge.split(":")[0]


def test_every_judge_is_broken_below():
    assert {function_of(judge) for judge in judges.JUDGES} == set(BROKEN)
    assert {function_of(judge) for judge in QUICK} == set(BROKEN)


@pytest.mark.parametrize("judge", {function_of(judge): judge for judge in QUICK}.values())
def test_the_rows_of_a_broken_judge_fail(judge, monkeypatch):
    function = function_of(judge)
    right, breaks = getattr(judges, function), BROKEN[function]
    monkeypatch.setattr(judges, function, lambda *args, **kwargs: breaks(right(*args, **kwargs)))
    names = [name for name in CONFIG.names if name[0] == judge]
    assert not all(certify.row(CONFIG, *name)["passed"] for name in names)  # one is enough


def test_the_script_ends_with_status_1_where_a_judge_is_broken(monkeypatch, capsys):
    right, trained = judges.log_likelihood, certify.toy(CONFIG)
    assert all(known["passed"] for known in trained)
    monkeypatch.setattr(certify, "JUDGES", {"log_likelihood": judges.JUDGES["log_likelihood"]})
    monkeypatch.setattr(certify, "toy", lambda config: trained)
    monkeypatch.setattr("sys.argv", ["certify.py", "--quick", "--no-progress"])
    found = {}  # what the judge says, by a row's own key

    def broken(change):
        def judge(*args, key, **kwargs):
            name = tuple(jax.random.key_data(key).tolist())
            if name not in found:
                found[name] = right(*args, key=key, **kwargs)
            return replace(found[name], pointwise=change(found[name].pointwise))

        return judge

    for change in (lambda p: p + 0.05, lambda p: -p, lambda p: p * np.nan):
        monkeypatch.setattr(judges, "log_likelihood", broken(change))
        with pytest.raises(SystemExit) as ended:
            certify.script()
        assert ended.value.code == 1
        assert "FAILED" in capsys.readouterr().out


SHORT = 300  # steps of a fit whose gap is not the least


@pytest.mark.slow
def test_the_parts_of_a_gap_are_right_and_fail_where_the_judge_is_broken(monkeypatch):
    """Of a mean field after a few steps."""
    settings = exact.Config(num_steps=SHORT, progress=False)
    name, data = certify.TRAINED[0], exact.diabetes(settings)
    rung, own = exact.rung_of(settings, data.record, name), exact.arrays(data, name)
    guide = exact.programs(settings, data.record, name, {})[1]
    training = exact.training(settings, data, name, {})
    fitted = fit(rung.program, guide, own, progress=False, **training)
    right = inference_gap(fitted, own, num_steps=1_000)
    for wrong in (0.0, -1.0, 1.0):
        best = replace(right.best_elbo, pointwise=right.best_elbo.pointwise + wrong)
        lost = replace(right.amortisation, pointwise=right.amortisation.pointwise + wrong)
        found = replace(right, best_elbo=best, amortisation=lost)
        monkeypatch.setattr(certify, "inference_gap", lambda *_, found=found, **__: found)
        parts = certify.parts_of_gap(name, rung, fitted, own)
        assert [known["what"] for known in parts] == ["approximation", "amortisation"]
        assert {known["passed"] for known in parts} == {not wrong}


# --- verdicts -------------------------------------------------------------------------------------


def test_one_test_takes_all_differences():
    """A small bias that no single row shows."""
    away = np.random.default_rng(0).normal(size=100)
    rows = [{"away": None}, *({"away": float(z)} for z in away)]
    biased = [{"away": float(z) + 0.6} for z in away]
    assert np.abs(away + 0.6).max() < judges.MOST_ERRORS
    assert certify.normality(rows) > certify.LEVEL > certify.normality(biased)
    assert certify.normality([*rows, {"away": float("nan")}]) == 0


def test_a_row_is_judged_by_its_noise_or_by_rounding():
    noise = np.random.default_rng(0).normal(size=10_000)
    assert judges.compared(noise, 0.0).is_right
    assert not judges.compared(noise + 0.1, 0.0).is_right
    assert not judges.compared(20 * noise, 0.0).is_right  # too noisy to say
    assert judges.compared(np.full(9, 1 + 1e-6), 1.0).is_right
    assert not judges.compared(np.full(9, 1.001), 1.0).is_right
    assert not judges.compared(np.full(9, np.nan), 1.0).is_right


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_exact_guide_loses_nothing(problem):
    """The ELBO is log p, and without global sites that holds for each datum."""
    trial = Trial(problem, "exact", 12, 3)
    if trial.problem.num_shared:
        module = {"hierarchical": hierarchical_gaussian, "regression": regression}[problem]
        elbo = trial.elbo().mean() - trial.kl_of_globals() / trial.num_data
        evidence = module.log_evidence(trial.problem.model, trial.data)
        assert elbo == pytest.approx(evidence, abs=1e-6)
        new = module.log_predictive_density(trial.problem.model, trial.data, trial.data)
        np.testing.assert_allclose(trial.log_p(), new, atol=1e-6)
    else:
        np.testing.assert_allclose(trial.elbo(), trial.log_p(), atol=1e-5)


def test_log_p_is_the_formula_of_the_model():
    toy = Trial("toy", "wide", 12, 3)
    sigma_0, data = toy.problem.model.sigma_0, toy.data
    known = gaussian_mean.log_likelihood(toy.problem.params, sigma_0, data["c"], data["x"])
    np.testing.assert_allclose(toy.log_p(), known, rtol=1e-5)
    for name in ("linear-gaussian", "linear-gaussian, labels"):
        trial = Trial(name, "wide", 12, 3)
        problem = trial.problem
        known = linear_gaussian.log_likelihood(problem.model, problem.params, trial.data)
        np.testing.assert_allclose(trial.log_p(), known, rtol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_wide_guide_loses_something(problem):
    trial = Trial(problem, "wide", 12, 3)
    elbo = trial.elbo().mean() - trial.kl_of_globals() / 12
    best = Trial(problem, "exact", 12, 3)
    assert elbo < best.elbo().mean() - best.kl_of_globals() / 12 - 0.01


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_joint_density_is_prior_times_likelihood(problem):
    trial = Trial(problem, "exact", 6, 3)
    u = trial.rng.normal(size=trial.prior[0].shape)
    mean, covariance = trial.joint()
    p, P = trial.prior
    parts = log_normal(u, p, np.broadcast_to(P, (6, *P.shape))) + trial.log_p_given(u[None])[0]
    joint = log_normal(np.concatenate([u, trial.x], axis=1), mean, covariance)
    np.testing.assert_allclose(joint, parts, rtol=1e-9)


def five_errors(draws):
    """Of a mean over draws. A component may be so rare that no draw has it."""
    return 5 * (draws.std(0) / np.sqrt(len(draws)) + 1 / len(draws))


@pytest.mark.parametrize("guide", ["exact", "wide"])
@pytest.mark.parametrize("problem", MIXTURES)
def test_the_formulas_of_a_mixture_agree(problem, guide):
    """With the model's, with each other, and with the means over NumPy's draws."""
    trial = MixtureTrial(problem, guide, 12, 3)
    params, data = trial.problem.params, trial.data
    known = mixture.log_likelihood(params, **data)
    np.testing.assert_allclose(trial.log_p(), known, rtol=1e-9)
    np.testing.assert_allclose(trial.posterior(), mixture.posterior(params, data["x"]), atol=1e-9)
    if guide == "exact":
        np.testing.assert_allclose(trial.elbo(), trial.log_p(), atol=1e-9)
        np.testing.assert_allclose(trial.weights, mixture.posterior(params, **data), atol=1e-9)
    else:
        assert trial.elbo().mean() < trial.log_p().mean() - 0.01
    u, _ = trial.drawn(4_000)
    for draws, (mean, covariance) in (
        (u, trial.q),
        (trial.log_p_given(u)[..., None], (trial.reconstruction()[:, None], None)),
        (trial.mean_given(u), (trial.replicated()[0], None)),
    ):
        assert (np.abs(draws.mean(0) - mean) < five_errors(draws)).all()
        if covariance is not None:
            away = draws - mean
            products = np.einsum("snk,snl->snkl", away, away)
            assert (np.abs(products.mean(0) - covariance) < five_errors(products)).all()


@pytest.mark.slow
def test_trained_fits_are_in_their_bounds(monkeypatch):
    monkeypatch.setattr(certify, "TRAINED", certify.TRAINED[2:3])
    found = certify.held(CONFIG)
    assert len(found) == 2
    assert [known for known in found if not known["passed"]] == []
