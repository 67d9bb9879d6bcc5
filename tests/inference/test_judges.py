"""What every judge and generator promises: its checks, its seeds, its random numbers."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from inference import (
    Fit,
    ProgramError,
    decode,
    elbo_terms,
    encode,
    fit,
    label_check,
    log_likelihood,
    pointwise_elbo,
    pointwise_log_likelihood,
    reconstruct,
    sample_posterior,
    sample_posterior_predictive,
    sample_prior_predictive,
)
from inference._checks import look
from inference._judges import default_key, judged_data

RNG = np.random.default_rng(0)
C = RNG.integers(0, 3, 20).astype(np.float32)
DATA = {"c": C, "x": RNG.gamma(2.0, 1.0, 20).astype(np.float32)}


def model(c, x=None):
    slope = numpyro.param("slope", lambda key: jax.random.normal(key))
    bias = numpyro.param("bias", lambda key: jax.random.normal(key))
    with numpyro.plate("rows", len(c)):
        a = numpyro.sample("a", dist.Normal(slope * c, 1.0))
        b = numpyro.sample("b", dist.Normal(a, 1.0))
        numpyro.sample("x", dist.LogNormal(b + bias, 1.0), obs=x)


def guide(c, x):
    weights = numpyro.param("weights", lambda key: 0.3 * jax.random.normal(key, (2,)))
    with numpyro.plate("rows", len(c)):
        a = numpyro.sample("a", dist.Normal(weights[0] * x, 0.8))
        numpyro.sample("b", dist.Normal(weights[1] * a, 0.9))


@pytest.fixture(scope="module")
def result():
    return fit(model, guide, DATA, num_steps=3, num_seeds=3, seed=5, progress=False)


def latents(result, data):
    """Draws of the latents that no fit is needed for."""
    rng = np.random.default_rng(1)
    shape = (result.num_seeds, 4, len(data["c"]))
    draws = rng.normal(size=(1, *shape[1:])).astype(np.float32)
    return {"a": np.broadcast_to(draws, shape), "b": np.broadcast_to(2 * draws, shape)}


def _given_draws(result, data):
    return pointwise_log_likelihood(result, latents(result, data), data)


def _decode(result, data):
    of_one = {name: draws[:, 0] for name, draws in latents(result, data).items()}
    return decode(result, of_one, c=data["c"])


def _label_check(result, data, **settings):
    return label_check(result, data, 3, **settings)


def _prior(result, data, **settings):
    return sample_prior_predictive(result, 4, c=data["c"], **settings)


def _draw(function):
    return functools.partial(function, num_samples=4)


RANDOM = {
    "pointwise_elbo": _draw(pointwise_elbo),
    "elbo_terms": _draw(elbo_terms),
    "log_likelihood": functools.partial(log_likelihood, num_samples=40),
    "label_check": functools.partial(_label_check, num_samples=4),
    "sample_posterior": _draw(sample_posterior),
    "sample_posterior_predictive": _draw(sample_posterior_predictive),
    "sample_prior_predictive": _prior,
}
KNOWN = {
    "pointwise_log_likelihood": _given_draws,
    "encode": encode,
    "decode": _decode,
    "reconstruct": reconstruct,
}
EVERY = RANDOM | KNOWN
OF_DATA = {name: EVERY[name] for name in EVERY if name not in ("decode", "sample_prior_predictive")}


def every(functions):
    return pytest.mark.parametrize("judge", functions.values(), ids=functions.keys())


def arrays(answer):
    """The numbers of an answer, each with a leading seed axis."""
    if dataclasses.is_dataclass(answer):
        fields = (getattr(answer, field.name) for field in dataclasses.fields(answer))
        return [array for field in fields for array in arrays(field)]
    if isinstance(answer, dict):
        return [array for value in answer.values() for array in arrays(value)]
    return [answer] if isinstance(answer, np.ndarray) and answer.ndim > 1 else []


def assert_same_bits(one, other):
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- seeds and keys -------------------------------------------------------------------------------


@every(EVERY)
def test_each_seed_is_judged_as_if_it_were_alone(judge, result):
    together = arrays(judge(result, DATA))
    for i in range(3):
        assert_same_bits([a[i : i + 1] for a in together], arrays(judge(result.isel(seed=i), DATA)))
    assert any(not np.array_equal(a[0], a[1]) for a in together)


@every(RANDOM)
def test_the_same_key_gives_the_same_numbers(judge, result):
    first = arrays(judge(result, DATA))
    assert_same_bits(arrays(judge(result, DATA)), first)  # the default key is fixed
    keys = jax.random.key(1), jax.random.key(1), jax.random.key(2)
    given = [arrays(judge(result, DATA, key=key)) for key in keys]
    assert_same_bits(given[0], given[1])
    for other in (first, given[2]):
        assert any(not np.array_equal(*pair) for pair in zip(given[0], other, strict=True))


def test_no_two_functions_share_their_noise(result):
    keys = {tuple(jax.random.key_data(default_key(None, name)).tolist()) for name in EVERY}
    assert len(keys) == len(EVERY)
    key = jax.random.key(9)
    judges = RANDOM["pointwise_elbo"], RANDOM["elbo_terms"]
    shared = judges[0](result, DATA, key=key), judges[1](result, DATA, key=key).elbo
    np.testing.assert_allclose(shared[0].pointwise, shared[1].pointwise, rtol=1e-4, atol=1e-4)
    own = judges[0](result, DATA), judges[1](result, DATA).elbo
    assert abs(own[0].pointwise - own[1].pointwise).min() > 0


# --- programs that are refused --------------------------------------------------------------------


@every(EVERY)
def test_a_guide_that_misses_a_latent_site_is_refused(judge, result):
    def larger_model(c, x=None):
        model(c, x)
        with numpyro.plate("rows", len(c)):
            numpyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=r"model site 'y': expected a guide site of that name"):
        judge(dataclasses.replace(result, model=larger_model), DATA)


@every(EVERY)
def test_programs_with_other_parameters_are_refused(judge, result):
    def other_guide(c, x):
        weights = numpyro.param("weights", lambda key: jax.random.normal(key, (3,)))
        with numpyro.plate("rows", len(c)):
            a = numpyro.sample("a", dist.Normal(weights[0] * x, 0.8))
            numpyro.sample("b", dist.Normal(weights[1] * a, 0.9))

    with pytest.raises(
        ProgramError, match=r"\['weights'\]: expected shape \(3,\).*got shape \(2,\)"
    ):
        judge(dataclasses.replace(result, guide=other_guide), DATA)


def test_known_parameters_of_a_guide_that_misses_a_site_are_no_fit(result):
    def smaller_guide(c, x):
        with numpyro.plate("rows", len(c)):
            numpyro.sample("a", dist.Normal(numpyro.param("w", 0.0) * x, 0.8))

    params = {"slope": 0.5, "bias": 0.0, "w": 0.1}
    with pytest.raises(ProgramError, match="model site 'b': expected a guide site"):
        Fit.from_params(model, smaller_guide, params, example=DATA)


# --- data that are refused ------------------------------------------------------------------------


@every(EVERY)
def test_something_that_is_no_fit_is_refused(judge, result, without_type_checks):
    class Lookalike:
        num_seeds = 1

    with pytest.raises(TypeError, match=r"result: expected what fit returns.*Fit\.from_params"):
        judge(Lookalike(), DATA)


@every(OF_DATA)
def test_plain_data_are_refused_where_the_fit_has_a_preprocess(judge, result):
    prepared = dataclasses.replace(result, preprocess=lambda key, batch: batch)
    with pytest.raises(ValueError, match=r"data: .*got plain ones; write .* = result\.prepare\("):
        judge(prepared, DATA)


@every(OF_DATA)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": C}, r"data: expected arrays \['c', 'x'\], as in training, got \['c', 'extra'"),
        ({"x": np.ones((20, 2), np.float32)}, r"data\['x'\]: expected shape \(N\), as in training"),
        ({"x": np.where(C == 0, np.nan, 1)}, r"data\['x'\]: expected finite numbers"),
        ({"x": -DATA["x"]}, "site 'x': expected values in the support .* got 20 outside"),
    ],
    ids=["names", "shape", "finite", "support"],
)
def test_data_that_the_fit_does_not_take_are_refused(judge, result, change, message):
    with pytest.raises(ValueError, match=message):
        judge(result, DATA | change)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (lambda d: {"a": d["a"]}, "draws: expected the latent sites a, b, got a"),
        (
            lambda d: d | {"a": d["a"][:, :, :5]},
            r"draws\['a'\]: expected shape \(seed, draw, datum",
        ),
        (lambda d: d | {"a": d["a"][:1]}, r"draws\['a'\]: .*3 seeds and 20 data, got \(1, 4, 20\)"),
    ],
    ids=["names", "data", "seeds"],
)
def test_draws_of_other_sites_or_shapes_are_refused(result, draws, message):
    with pytest.raises(ValueError, match=message):
        pointwise_log_likelihood(result, draws(latents(result, DATA)), DATA)


@pytest.mark.parametrize("name", ["num_samples", "batch_size"])
@pytest.mark.parametrize("judge", [pointwise_elbo, elbo_terms, log_likelihood])
def test_numbers_below_one_are_refused(judge, name, result):
    with pytest.raises(ValueError, match=f"{name}: expected a whole number from 1, got 0"):
        judge(result, DATA, **{name: 0})


# --- global sites ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    def global_model(c, x=None):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(c)):
            numpyro.sample("x", dist.LogNormal(m, 1.0), obs=x)

    def global_guide(c, x):
        numpyro.sample("m", dist.Normal(numpyro.param("m_loc", 0.3), 0.2))

    return Fit.from_params(global_model, global_guide, {"m_loc": 0.3}, example=DATA)


@pytest.mark.parametrize("name", ["log_likelihood", "label_check"])
def test_a_number_for_each_datum_is_refused_where_a_site_is_global(name, shared):
    with pytest.raises(ValueError, match=f"{name}: expected .* got the global site 'm'") as caught:
        EVERY[name](shared, DATA)
    assert "use log_predictive_density" in str(caught.value)


def test_a_global_site_has_draws_and_no_datum(shared):
    draws = sample_posterior(shared, DATA, 50)
    assert draws["m"].shape == (1, 50)
    found = pointwise_log_likelihood(shared, draws, DATA)["x"]
    exact = stats.lognorm.logpdf(DATA["x"], 1.0, scale=np.exp(draws["m"][..., None]))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    assert encode(shared, DATA)["m"].shape == (1,)


def test_programs_are_looked_at_once_for_each_shape_of_data(monkeypatch):
    """No judge goes by what was found on data of another shape or type."""
    fresh = Fit.from_params(
        model,
        guide,
        {"slope": 1.0, "bias": 0.0, "weights": np.zeros(2, np.float32)},
        example=DATA,
    )
    seen = []

    def noting(model, guide, shapes, **settings):
        seen.append({name: (array.shape, array.dtype) for name, array in shapes.items()})
        return look(model, guide, shapes, **settings)

    monkeypatch.setattr(sys.modules["inference.fit"], "look", noting)  # fit is a function too
    few = {name: array[:7] for name, array in DATA.items()}
    whole = few | {"c": few["c"].astype(np.int32)}
    for data in (few, few, whole, few, whole):
        judged_data(fresh, data)
    assert [found["c"] for found in seen] == [((7,), np.float32), ((7,), np.int32)]
