"""Missing entries: masks are made, and no number depends on what is missing."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from scipy import stats

from inference import (
    CheckpointError,
    Fit,
    Held,
    Prepared,
    decode,
    elbo_terms,
    encode,
    fit,
    log_likelihood,
    pointwise_elbo,
    pointwise_log_likelihood,
    reconstruct,
    sample_posterior,
    sample_posterior_predictive,
    sample_prior_predictive,
)
from models.guides import mean_field

N, D, K = 60, 4, 2
RNG = np.random.default_rng(0)
WHOLE = (RNG.normal(size=(N, K)) @ RNG.normal(size=(K, D)) + RNG.normal(size=(N, D))).astype("f4")
THERE = RNG.random((N, D)) > 0.2
THERE[0] = False  # a datum of which nothing is known
X = np.where(THERE, WHOLE, np.nan)
WEIGHTS = RNG.normal(size=(K, D))
QUICK = {"num_steps": 5, "batch_size": 20, "progress": False}


def model(x=None, x_mask=True):
    """The linear-Gaussian model."""
    assert x is not None or x_mask is True  # who generates has no mask
    W = numpyro.param("W", lambda key: random.normal(key, (K, D)))
    sigma = numpyro.param("sigma", 1.0, constraint=dist.constraints.positive)
    with numpyro.plate("data", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([K]).to_event(1))
        numpyro.sample("x", dist.Normal(z @ W, sigma).mask(x_mask).to_event(1), obs=x)


def guide(x, x_mask=None):
    """A guide that ignores the mask, and takes data without one."""
    A = numpyro.param("A", jnp.full((D, K), 0.1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(x @ A, 0.9).to_event(1))


def fitted(x=X, q=guide, p=model, **settings):
    data = x if isinstance(x, dict) else {"x": x}
    return fit(p, q, data, **{"missing": "mask"} | QUICK | settings)


def exact_marginal(params, x, there):
    """log p of the entries that are there, for each datum: Normal(0, W W^T + sigma^2 I)."""
    W, sigma = np.asarray(params["W"], float), float(params["sigma"])
    covariance = W.T @ W + sigma**2 * np.eye(D)
    return np.array(
        [
            stats.multivariate_normal.logpdf(row[seen], cov=covariance[np.ix_(seen, seen)])
            if seen.any()
            else 0.0
            for row, seen in zip(np.asarray(x, float), there, strict=True)
        ]
    )


@pytest.fixture(scope="module")
def trained():
    """A fit with the automatic encoder, held-out data and all defaults."""
    return fitted(q=mean_field(model), num_steps=200, validation=0.25, validate_every=100)


@pytest.fixture(scope="module")
def quick():
    """A short fit that holds data out."""
    return fitted(validation={"x": X[:9]}, validate_every=5)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A short fit to data of which all is there, and its checkpoint."""
    directory = tmp_path_factory.mktemp("missing") / "run"
    return fitted(WHOLE, missing=None, checkpoint=directory), directory


def from_params(preprocess=None, x=X, p=model, names=("W", "sigma", "A")):
    """A fit of known parameters."""
    params = {"W": WEIGHTS, "sigma": 0.7, "A": np.full((D, K), 0.1)}
    settings = {"preprocess": preprocess, "missing": "mask"}
    return Fit.from_params(p, guide, {n: params[n] for n in names}, example={"x": x}, **settings)


# --- exact ----------------------------------------------------------------------------------------


def test_the_likelihood_is_the_exact_marginal_of_what_is_there(trained):
    data, exact = trained.prepare({"x": X}), exact_marginal(trained.params_of(0), X, THERE)
    found = log_likelihood(trained, data, num_samples=2000)
    error = found.monte_carlo_error[0]
    assert error < 0.01
    # the log of a mean lies below by half its variance
    assert abs(found.estimate[0] - exact.mean()) < 4 * error + N * error**2 / 2
    terms = elbo_terms(trained, data, num_samples=500)
    error = terms.elbo.pointwise[0].std() / np.sqrt(500 * N)
    assert exact.mean() - 1 < terms.elbo.estimate[0] < exact.mean() + 4 * error
    np.testing.assert_array_equal(terms.reconstruction.pointwise[:, 0], 0)
    draws = sample_posterior(trained, data, 3)
    given = pointwise_log_likelihood(trained, draws, data)["x"]
    W, sigma = (np.asarray(trained.params_of(0)[name]) for name in ("W", "sigma"))
    by_entry = stats.norm.logpdf(np.where(THERE, X, 0), draws["z"] @ W, sigma)
    np.testing.assert_allclose(given, (by_entry * THERE).sum(-1), rtol=1e-4, atol=1e-4)


# --- the masks ------------------------------------------------------------------------------------


def test_what_fills_a_gap_changes_no_number(trained):
    """So none of its gradient either: the numbers are those of any parameters."""
    filled = Prepared({"x": np.where(THERE, X, 7), "x_mask": THERE})
    found, expected = (pointwise_elbo(trained, data).pointwise for data in (filled, {"x": X}))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_mask_of_ones_own_leaves_out_what_nan_leaves_out(quick, rng):
    some_nan = np.where(THERE | (rng.random((N, D)) < 0.5), X, 9)
    own = {"x": some_nan, "x_mask": np.where(some_nan == 9, 0.0, 1.0)}
    np.testing.assert_array_equal(fitted(own).elbo, quick.elbo)


def test_without_missing_entries_a_mask_changes_nothing(complete):
    plain, masked = complete[0], fitted(WHOLE)
    assert list(masked.batch) == ["x", "x_mask"]
    np.testing.assert_allclose(masked.elbo, plain.elbo, rtol=1e-6)
    np.testing.assert_allclose(masked.params["W"], plain.params["W"], rtol=1e-5)


def test_masks_of_every_type_of_array():
    def many(b, i, u, x, c, b_mask, i_mask=True, u_mask=True, x_mask=True):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(z, 1), obs=x)

    def q(scale=1.0, **data):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(data["x"])):
            numpyro.sample("z", dist.Normal(loc, scale))

    x = np.array([1, np.nan, 3])
    data = {"b": x > 2, "i": np.arange(3), "u": np.zeros((3, 2, 2), "u1"), "x": x, "c": [1, 2, 3]}
    data["u_mask"] = [True, False, True]  # by datum
    example = Fit.from_params(many, q, {"loc": 0.0}, example=data, missing="mask")
    prepared = example.prepare(data)
    assert sorted(prepared.keys() - data.keys()) == ["b_mask", "i_mask", "x_mask"]
    for name in "biux":
        mask = prepared[f"{name}_mask"]
        assert mask.dtype == bool
        assert mask.shape == prepared[name].shape
    assert prepared["b_mask"].all()
    assert prepared["i_mask"].all()
    np.testing.assert_array_equal(prepared["u_mask"].all((1, 2)), data["u_mask"])
    np.testing.assert_array_equal(prepared["x"], [1, 0, 3])
    assert [prepared[name].dtype for name in "biu"] == ["bool", "int32", "uint8"]


@pytest.mark.parametrize("keeps_nan", [True, False])
def test_preprocess_sees_nan_and_may_lose_it(keeps_nan):
    """If the array keeps its shape."""

    def binarise(key, batch):
        bits = random.uniform(key, batch["x"].shape) < batch["x"]
        return {"x": jnp.where(jnp.isnan(batch["x"]) & keeps_nan, jnp.nan, bits)}

    result = fitted(X, preprocess=binarise) if keeps_nan else from_params(binarise)
    prepared = result.prepare({"x": X})
    np.testing.assert_array_equal(prepared["x_mask"], THERE)
    assert set(np.unique(prepared["x"][~THERE])) == {0}
    if keeps_nan:
        assert np.isfinite(result.elbo).all()


def test_what_preprocess_cannot_compute_is_missing():
    result = from_params(lambda _, batch: {"x": jnp.log(batch["x"])}, WHOLE)
    np.testing.assert_array_equal(result.prepare({"x": WHOLE})["x_mask"], WHOLE > 0)


def test_a_held_model_gets_its_masks():
    held = Held(partial(model), {"W": np.ones((K, D)), "sigma": 1.0})
    known = from_params(p=held, names=["A"])
    assert list(known.params) == ["A"]
    assert reconstruct(known, {"x": X})["x"].shape == (1, N, D)


# --- supports -------------------------------------------------------------------------------------


def by_entry(rate, x_mask):
    return dist.Exponential(rate).mask(x_mask).to_event(1)


def by_datum(rate, x_mask):
    return dist.Exponential(rate).to_event(1).mask(x_mask.all(1))


FORMS = {"entries": by_entry, "data": by_datum}


@pytest.mark.parametrize("form", [*FORMS, "handler"])
def test_supports_hold_for_what_is_there(form):
    def positive(x=None, x_mask=True):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([K]).to_event(1))
            rate = jnp.exp(z.sum(-1, keepdims=True) + jnp.zeros(D))
            if form == "handler":
                with handlers.mask(mask=x_mask.all(1)):
                    numpyro.sample("x", dist.LogNormal(rate).to_event(1), obs=x)
            else:
                numpyro.sample("x", FORMS[form](rate, x_mask), obs=x)

    x = np.exp(X) + 0.5  # 0 is far from all
    settings = {"p": positive, "num_steps": 2, "num_seeds": 1}
    result = fitted(x, **settings) if form == "entries" else from_params(None, x, positive, ["A"])
    if form == "entries":
        assert np.isfinite(result.elbo).all()
        assert all(np.isfinite(value).all() for value in result.params.values())
    assert np.isfinite(pointwise_elbo(result, {"x": x}).pointwise).all()
    whole = int(THERE.all(1).argmax())
    x[whole, 1] = -2
    with pytest.raises(ValueError, match=r"site 'x': .* got 1 outside .* range from -2 to [1-9]"):
        fitted(x, **settings)
    with pytest.raises(ValueError, match=r"site 'x': .* got 1 outside .* range from -2 to [1-9]"):
        pointwise_elbo(result, {"x": x})


# --- everywhere -----------------------------------------------------------------------------------


def test_a_fit_prepares_judges_and_loads_with_masks(trained, tmp_path):
    prepared = trained.prepare({"x": X})
    np.testing.assert_array_equal(prepared["x"], np.where(THERE, X, 0))
    np.testing.assert_array_equal(prepared["x_mask"], THERE)
    assert prepared["x_mask"].dtype == bool
    trained.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", model, mean_field(model))
    elbo = pointwise_elbo(trained, prepared)
    assert np.isfinite(elbo.pointwise).all()
    for result, data in ((trained, {"x": X}), (loaded, loaded.prepare({"x": X}))):
        np.testing.assert_array_equal(pointwise_elbo(result, data).pointwise, elbo.pointwise)


def test_held_out_data_are_masked(trained, quick):
    assert np.isfinite(trained.validation_elbo).all()
    held_out = Prepared({"x": np.where(THERE, X, 0)[:9], "x_mask": THERE[:9]})
    other = fitted(validation=held_out, validate_every=5)
    np.testing.assert_array_equal(other.validation_elbo, quick.validation_elbo)


def test_a_checkpoint_knows_the_setting(complete):
    with pytest.raises(CheckpointError, match="missing was None there and is 'mask' here"):
        fitted(WHOLE, checkpoint=complete[1])


def test_a_mask_belongs_to_the_observation():
    known = from_params()
    latents = encode(known, {"x": X})
    means = reconstruct(known, {"x": X})["x"]  # the model refuses a mask without x
    np.testing.assert_array_equal(means, decode(known, latents)["x"])
    np.testing.assert_allclose(means, latents["z"] @ known.params["W"], rtol=1e-5, atol=1e-6)
    filled = sample_posterior_predictive(known, {"x": X}, 500)["x"]
    assert filled.shape == (1, 500, N, D)
    assert (filled[0, :, ~THERE].std(1) > 0).all()  # what is missing is drawn like the rest
    assert sample_prior_predictive(known, 3)["x"].shape == (1, 3, 1, D)


def test_a_condition_has_a_mask_too():
    def p(c, x=None, c_mask=True, x_mask=True):
        slope = numpyro.param("slope", 1.0)
        with numpyro.plate("data", len(c)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            c = jnp.where(c_mask, c, -5)
            numpyro.sample("x", dist.Normal(z + slope * c, 1).mask(x_mask), obs=x)

    def q(c, x, c_mask, x_mask):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, 1))

    data = {"c": X[:, 0], "x": X[:, 1]}
    params = {"slope": 0.8, "loc": 0.1}
    result = Fit.from_params(p, q, params, example=data, missing="mask")
    means = reconstruct(result, data)["x"]
    latents, slope = encode(result, data), result.params["slope"][:, None]
    c = np.where(THERE[:, 0], X[:, 0], -5)
    np.testing.assert_allclose(means, latents["z"] + slope * c, rtol=1e-5)
    np.testing.assert_array_equal(decode(result, latents, c=data["c"])["x"], means)


# --- errors ---------------------------------------------------------------------------------------


def without_mask(x=None):
    model(x)


def lose(key, batch):
    return {"x": (batch["x"] > 0).reshape(len(batch["x"]), 2, 2)}


INFINITE = np.where(THERE, X, np.inf)
SHORT = {"x": X, "x_mask": THERE[:, :3]}
ERRORS = {
    "NaN": ({"missing": None}, r"data\['x'\]: .* got \d+ NaN .*missing=\"mask\" .*x_mask=True"),
    "no mask": ({"p": without_mask}, r"data\['x'\]: .* got \d+ NaN .*missing=\"mask\" .*x_mask"),
    "infinite": ({"x": INFINITE}, r"data\['x'\]: .* got \d+ infinite of 240 entries"),
    "word": ({"missing": "drop"}, "missing: expected \"mask\" or None, got 'drop'"),
    "shape": ({"x": SHORT}, r"data\['x_mask'\]: expected the shape of 'x', .* got \(20, 3\)"),
    "lost": ({"preprocess": lose}, "preprocess: expected 'x_mask' beside 'x', .* got x; return"),
    "held out": ({"missing": None, "x": WHOLE, "validation": {"x": X}}, r"validation\['x'\]: .*ma"),
}


@pytest.mark.parametrize(("settings", "words"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as error:
        fitted(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_infinite_numbers_beside_nan_are_refused(make):
    x = np.where(WHOLE > 1, np.inf, X)
    with pytest.raises(ValueError, match=r"data\['x'\]: .* infinite of 240"):
        fitted(make(x))
    if make is jnp.asarray:  # the other fits of this file are to arrays of NumPy
        assert np.isfinite(fitted(make(X)).elbo).all()


def test_numbers_too_large_are_found_beside_nan():
    x = X.astype(float)
    x[5, 1] = 1e300
    with pytest.raises(ValueError, match=r"data\['x'\]: expected numbers from .* 1e\+300"):
        fitted(x)


def test_prepared_data_hold_no_nan(trained):
    with pytest.raises(ValueError, match=r"data\['x'\]: expected finite numbers"):
        pointwise_elbo(trained, Prepared({"x": X, "x_mask": THERE}))
