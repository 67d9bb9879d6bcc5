"""Findings: fits that are broken on purpose get the right one, and good fits get none."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

from inference import Fit, Held, Page, diagnose, fit
from inference._findings import Evidence, overfitted
from models import gaussian_mean, guides

SMALL = {"num_data": 30, "num_simulations": 400, "num_samples": 200, "num_steps": 60}
SMALL |= {"progress": False}


def names(page):
    return [finding.name for finding in page.findings]


# --- guides of known quality ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_guide_of_half_the_scale_is_too_narrow(rung, tmp_path):
    page = diagnose(rung.fit(scale=0.5), rung.data(100, seed=7), **SMALL)
    assert names(page)[0] == "narrow-guide"
    # the median of N |e| has the standard error 1.17 / sqrt(N), relatively; here of 3 N
    assert page.findings[0].number == pytest.approx(0.5, rel=4 * 1.17 / 1200**0.5 + 0.02)
    assert "importance-sampling" in names(page)
    assert list(page.missing) == ["inference_gap"]  # this guide has no per_datum
    check_page(page, tmp_path)


@pytest.mark.slow
def test_the_posterior_gets_no_finding(rung):
    test = rung.data(200, seed=7)
    page = diagnose(rung.fit(), test, **SMALL)
    assert names(page) == []
    assert "None." in repr(page)
    assert page.numbers["density"][0] == pytest.approx(rung.log_likelihood(test).mean(), abs=1e-4)


def check_page(page, path):
    """A page prints, shows itself and is written."""
    assert isinstance(page, Page)
    text = repr(page)
    assert all(str(finding) in text for finding in page.findings)
    assert text.count("\n| ") >= len(page.numbers)
    shown = page._repr_html_()
    assert shown.count("<img") == len(page.figures) == 2
    assert "<h4>Findings</h4><ul><li>" in shown
    written = page.save(path / "run")
    assert written.read_text().startswith(text)
    known = json.loads((path / "run" / "diagnosis.json").read_text())
    assert known["findings"][0]["number"] == page.findings[0].number
    assert {p.name for p in written.parent.glob("*.png")} == {
        "diagnosis_calibration.png",
        "diagnosis_predictive.png",
    }


@pytest.mark.slow
def test_the_bracket_says_by_how_much_importance_sampling_is_too_low(rung):
    page = diagnose(rung.fit(scale=0.4), rung.data(300, seed=7), **SMALL | {"num_data": 150})
    [finding] = [f for f in page.findings if f.name == "importance-sampling"]
    assert "the bracket says by" in finding.text
    assert f"{finding.number:.0%}" in finding.text
    difference = page.numbers["bracket"][0] - page.numbers["importance"][0]
    assert f"{difference:.2f} +-" in finding.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "name"), [({"scale": 1.5}, "wide-guide"), ({"shift": 0.2}, "biased-guide")]
)
def test_other_faults_of_a_guide(rung, guide, name):
    page = diagnose(rung.fit(**guide), rung.data(200, seed=7), **SMALL | {"num_simulations": 2000})
    assert name in names(page)


# --- trained fits ---------------------------------------------------------------------------------


def trained(rung, guide, data, num_steps=2000, params=None, rate=0.02, **settings):
    """A fit of a guide to the rung, its model held."""
    held = Held(rung.model, rung.params if params is None else params)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    settings |= {"num_steps": num_steps, "optimizer": optimizer, "progress": False}
    return fit(held, guide, data, **settings)


def columns_zeroed(params, columns):
    """The rung with some latents that x does not depend on."""
    weights = params["W"].copy()
    weights[:, columns] = 0
    return params | {"W": weights}


@pytest.mark.slow
def test_trained_fits_get_their_findings(rung):
    train, test = rung.data(1000, seed=1), rung.data(400, seed=2)
    full = guides.full_covariance(rung.model)
    good = trained(rung, full, train, batch_size=200)
    assert names(diagnose(good, test, train=train, **SMALL)) == []

    factorised = trained(rung, guides.mean_field(rung.model), train, batch_size=200)
    found = names(diagnose(factorised, test, **SMALL))
    assert {"narrow-guide", "approximation"} <= set(found)
    assert not {"unfinished", "overfitted", "unused-latents", "amortisation"} & set(found)

    tenth = trained(rung, full, train, num_steps=200, batch_size=200)
    found = names(diagnose(tenth, test, **SMALL))
    assert found[0] == "unfinished"
    assert "amortisation" in found


@pytest.mark.slow
def test_latents_that_do_nothing(rung):
    train, test = rung.data(1000, seed=1), rung.data(400, seed=2)
    full = guides.full_covariance(rung.model)
    one = trained(rung, full, train, params=columns_zeroed(rung.params, [1]), batch_size=200)
    page = diagnose(one, test, **SMALL)
    assert names(page) == ["unused-latents"]
    assert page.findings[0].number == 1
    assert "z (1 of 3)" in page.findings[0].text

    every = trained(rung, full, train, params=columns_zeroed(rung.params, [0, 1, 2]))
    assert names(diagnose(every, test, **SMALL)) == ["ignored-latents"]


@pytest.mark.slow
def test_an_encoder_that_overfits(rung):
    def large(num_outputs, *, rngs):
        return rung.model.encoder(num_outputs, hidden=(200, 200), rngs=rngs)

    few, test = rung.data(30, seed=5), rung.data(400, seed=2)
    guide = guides.full_covariance(rung.model, encoder=large)
    result = trained(rung, guide, few, num_steps=3000, rate=1e-3)
    page = diagnose(result, test, train=few, **SMALL)
    assert names(page)[0] == "overfitted"
    assert "unfinished" not in names(page)
    assert "amortisation" in names(diagnose(result, test, **SMALL))


def test_a_held_out_elbo_that_fell_tells_that_a_fit_is_overfitted(rung):
    result = rung.fit()
    rising = 5 - 4 * np.exp(-np.arange(40) / 8) + 1e-3 * np.sin(np.arange(40.0))
    for values, fell in ((rising, False), (rising - np.maximum(0, np.arange(40) - 20) / 30, True)):
        found = overfitted(Evidence(replace(result, validation_elbo=values[None])))
        assert (found is not None) == fell
    assert found.number == pytest.approx(values.max() - values[-1], abs=0.05)


# --- any program ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_of_ones_own_with_global_sites():
    def model(c, x=None):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("rows", len(c)):
            z = numpyro.sample("z", dist.Gamma(2.0, 1.0))
            numpyro.sample("obs", dist.Normal(mu + z * c, 1.0), obs=x)

    rng = np.random.default_rng(0)
    data = {
        "c": rng.normal(size=80).astype(np.float32),
        "x": rng.normal(size=80).astype(np.float32),
    }
    result = fit(model, guides.mean_field(model), data, num_steps=200, progress=False)
    page = diagnose(result, data, **SMALL)
    assert {"sbc", "bracket", "bracket of simulated data", "inference_gap"} == set(page.missing)
    assert all("global site 'mu'" in why for why in page.missing.values())
    assert {"elbo", "density", "exchange"} <= page.numbers.keys()


def test_a_program_without_latents_of_its_data_says_so():
    def model(x=None):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", 1 if x is None else len(x)):
            numpyro.sample("x", dist.Normal(mu, 1), obs=x)

    def guide(x):
        numpyro.sample("mu", dist.Normal(numpyro.param("loc", jnp.zeros(())), 0.1))

    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    result = Fit.from_params(model, guide, {"loc": np.float32(0)}, example={"x": x})
    page = diagnose(result, {"x": x}, **SMALL)
    assert "all are global" in page.missing["latents"]
    assert page.findings == ()


def test_sizes_and_data_are_checked(rung):
    with pytest.raises(ValueError, match="num_data"):
        diagnose(rung.fit(), rung.data(5, seed=0), num_data=0)
    with pytest.raises(ValueError, match="c: expected none, got some"):
        diagnose(rung.fit(), gaussian_mean.Truth().simulate(5, seed=0))
