"""Sample, encode, decode and the rest, on linear models whose means and variances are formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from inference import (
    Fit,
    decode,
    encode,
    generation,
    interpolate,
    reconstruct,
    sample_posterior,
    sample_posterior_predictive,
    sample_prior_predictive,
    traverse,
)

KEY = jax.random.key(0)
WEIGHT = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], np.float32)
PARAMS = {"weight": WEIGHT, "prior_loc": np.array([5.0, -3.0], np.float32)}
Z = np.array([[0.5, 1.0], [2.0, -1.0], [0.0, 3.0], [1.0, 1.0]], np.float32)
C = np.array([0.0, 1.0, 2.0, 1.0], np.float32)


def model(c, x=None):
    weight = numpyro.param("weight", jnp.zeros((2, 3)))
    prior_loc = numpyro.param("prior_loc", jnp.zeros(2))
    with numpyro.plate("rows", len(c)):
        z = numpyro.sample("z", dist.Normal(c[:, None] * prior_loc, 0.1).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weight + c[:, None], 0.5).to_event(1), obs=x)


def guide(c, x):
    with numpyro.plate("rows", len(c)):
        numpyro.sample("z", dist.Normal(x[:, :2] - c[:, None], 0.3).to_event(1))


def unconditional(x=None):
    model(jnp.zeros(1 if x is None else len(x)), x)


def unconditional_guide(x):
    guide(jnp.zeros(len(x)), x)


DATA = {"c": C, "x": Z @ WEIGHT + C[:, None]}
GIVEN_C = Fit.from_params(model, guide, PARAMS, example=DATA)
WITHOUT_C = Fit.from_params(unconditional, unconditional_guide, PARAMS, example={"x": Z @ WEIGHT})


def of_one(latents):
    """Latents of one seed."""
    return {"z": np.asarray(latents)[None]}


# --- encode and decode ----------------------------------------------------------------------------


def test_decode_is_the_mean_of_x():
    decoded = decode(GIVEN_C, of_one(Z), c=C)
    assert decoded.keys() == {"x"}
    np.testing.assert_allclose(decoded["x"], [Z @ WEIGHT + C[:, None]], rtol=1e-6)
    np.testing.assert_allclose(decode(WITHOUT_C, of_one(Z))["x"], [Z @ WEIGHT], rtol=1e-6)


def test_encode_is_the_mean_of_z_or_a_draw():
    np.testing.assert_allclose(encode(GIVEN_C, DATA)["z"], [Z], atol=1e-6)
    repeated = {name: np.repeat(array, 300, axis=0) for name, array in DATA.items()}
    draws = encode(GIVEN_C, repeated, key=KEY)["z"].reshape(4, 300, 2)
    assert (abs(draws.mean(1) - Z) < 4.5 * 0.3 / 300**0.5).all()
    # the deviation of 300 draws is good to sqrt(1 / 600); every datum has noise of its own
    np.testing.assert_allclose(draws.std(1), 0.3, rtol=4.5 * 600**-0.5)
    assert abs(np.corrcoef(draws[0, :, 0], draws[1, :, 0])[0, 1]) < 4.5 / 300**0.5


def test_reconstruct_is_encode_and_decode():
    np.testing.assert_allclose(reconstruct(GIVEN_C, DATA)["x"], [DATA["x"]], atol=1e-5)
    x = Z @ WEIGHT
    np.testing.assert_allclose(reconstruct(WITHOUT_C, {"x": x})["x"], [x], atol=1e-5)
    drawn = encode(GIVEN_C, DATA, key=KEY)
    expected = decode(GIVEN_C, drawn, c=C)["x"]
    np.testing.assert_array_equal(reconstruct(GIVEN_C, DATA, key=KEY)["x"], expected)


def test_reconstruct_leaves_out_what_is_observed_and_nothing_else():
    def either(x=None, c=None):  # both may be left out, and x is observed on another scale
        model(c, None if x is None else jnp.log(x))

    def guide_of_both(x, c):
        guide(c, jnp.log(x))

    data = {"c": C, "x": np.exp(DATA["x"])}
    fitted = Fit.from_params(either, guide_of_both, PARAMS, example=data)
    np.testing.assert_allclose(reconstruct(fitted, data)["x"], [DATA["x"]], atol=1e-4)


def test_a_mean_without_a_formula_is_that_of_many_draws():
    def skewed(x=None):
        with numpyro.plate("rows", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def skewed_guide(x):
        with numpyro.plate("rows", len(x)):
            squash = dist.transforms.SigmoidTransform()
            numpyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 1.0), squash))

    x = np.linspace(-1, 1, 5, dtype=np.float32)
    found = encode(Fit.from_params(skewed, skewed_guide, {}, example={"x": x}), {"x": x})["z"][0]
    grid = np.linspace(-8, 8, 2001)
    density = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi)
    squashed = 1 / (1 + np.exp(-(x[:, None] + grid)))
    mean = np.trapezoid(squashed * density, grid)
    deviation = np.sqrt(np.trapezoid(squashed**2 * density, grid) - mean**2)
    assert (abs(found - mean) < 4.5 * deviation / 1000**0.5).all()


def test_interpolation_is_the_straight_line_with_its_ends():
    line = interpolate({"z": Z[None, 0]}, {"z": Z[None, 1]}, 5)
    np.testing.assert_allclose(line["z"], [np.linspace(Z[0], Z[1], 5)], rtol=1e-6)
    decoded = decode(GIVEN_C, line, c=np.full(5, C[1]))["x"]
    np.testing.assert_allclose(decoded, line["z"] @ WEIGHT + C[1], rtol=1e-5)


def test_traversal_moves_one_dimension():
    moved = traverse({"z": Z[None, 0], "y": Z[None, 1]}, "z", 1, [-2.0, 0.0, 4.0])
    np.testing.assert_allclose(moved["z"], [[[0.5, value] for value in (-2.0, 0.0, 4.0)]])
    np.testing.assert_allclose(moved["y"], [[Z[1]] * 3])


# --- draws ----------------------------------------------------------------------------------------


def test_draws_of_a_condition_come_from_its_prior():
    drawn = sample_prior_predictive(GIVEN_C, 400, c=C[:3])
    assert drawn["z"].shape == (1, 400, 3, 2)
    assert drawn["x"].shape == (1, 400, 3, 3)
    error = 0.1 / 400**0.5
    assert (abs(drawn["z"][0].mean(0) - C[:3, None] * PARAMS["prior_loc"]) < 4.5 * error).all()
    noise = drawn["x"] - drawn["z"] @ WEIGHT - C[:3, None]
    assert abs(noise.std() / 0.5 - 1) < 4.5 * (2 * noise.size) ** -0.5


def test_without_conditions_a_draw_is_one_datum():
    drawn = sample_prior_predictive(WITHOUT_C, 500)
    assert drawn["x"].shape == (1, 500, 1, 3)
    assert len(np.unique(drawn["z"][0, :, 0], axis=0)) == 500
    assert (abs(drawn["z"].mean((0, 1, 2))) < 4.5 * 0.1 / 500**0.5).all()


def test_draws_from_the_posterior_predictive_have_its_moments():
    latents = sample_posterior(GIVEN_C, DATA, 600)["z"]
    drawn = sample_posterior_predictive(GIVEN_C, DATA, 600)
    assert latents.shape == (1, 600, 4, 2)
    assert drawn.keys() == {"x"}
    assert drawn["x"].shape == (1, 600, 4, 3)
    # z ~ Normal(Z, 0.3^2 I), and x ~ Normal(z W + c, 0.5^2 I)
    for values, mean, cov in (
        (latents[0], Z, 0.3**2 * np.eye(2)),
        (drawn["x"][0], DATA["x"], 0.3**2 * WEIGHT.T @ WEIGHT + 0.5**2 * np.eye(3)),
    ):
        assert (abs(values.mean(0) - mean) < 4.5 * np.sqrt(np.diag(cov) / 600)).all()
        centred = (values - mean).reshape(-1, len(cov))
        products = centred[:, :, None] * centred[:, None, :]
        error = products.std(0) / len(centred) ** 0.5
        assert (abs(products.mean(0) - cov) < 4.5 * error).all()


def test_seeds_come_first():
    two = {name: np.stack([value, 2 * value]) for name, value in PARAMS.items()}
    seeds = [
        Fit.from_params(model, guide, jax.tree.map(lambda p, i=i: p[i], two), example=DATA)
        for i in range(2)
    ]
    means = [decode(fit, of_one(Z), c=C)["x"][0] for fit in seeds]
    np.testing.assert_allclose(means[1] - C[:, None], 2 * (means[0] - C[:, None]), rtol=1e-5)


# --- global sites, other plates, many data --------------------------------------------------------


def grouped(x=None):
    """A global number, one for each group, one for each datum and group; the data along -2."""
    m = numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", 3, dim=-1):
        u = numpyro.sample("u", dist.Normal(m, 1.0))
        with numpyro.plate("rows", 1 if x is None else len(x), dim=-2):
            z = numpyro.sample("z", dist.Normal(u, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def grouped_guide(x):
    numpyro.sample("m", dist.Normal(numpyro.param("m_loc", 0.0), 0.2))
    with numpyro.plate("groups", 3, dim=-1):
        numpyro.sample("u", dist.Normal(0.0, 0.2))
        with numpyro.plate("rows", len(x), dim=-2):
            numpyro.sample("z", dist.Normal(x, 0.01))


ROWS = {"x": np.arange(33, dtype=np.float32).reshape(11, 3)}


@pytest.fixture
def by_four(monkeypatch):
    """A fit whose generators take four data at a time."""
    monkeypatch.setattr(generation, "DATA_AT_ONCE", 4)
    return Fit.from_params(grouped, grouped_guide, {"m_loc": 0.5}, example=ROWS)


def test_global_draws_are_the_same_in_every_batch_and_local_ones_are_not(by_four):
    drawn = sample_posterior(by_four, ROWS, 50)
    assert {name: value.shape for name, value in drawn.items()} == {
        "m": (1, 50),
        "u": (1, 50, 3),
        "z": (1, 50, 11, 3),
    }
    few = sample_posterior(by_four, {"x": ROWS["x"][:4]}, 50)
    for name in ("m", "u"):
        np.testing.assert_array_equal(drawn[name], few[name])
    assert (abs(drawn["z"] - ROWS["x"]) < 0.06).all()  # each datum's own, in its place
    noise = (drawn["z"] - ROWS["x"]).reshape(50, -1)
    correlation = np.corrcoef(noise.T) - np.eye(33)
    assert abs(correlation).max() < 5.5 / 50**0.5


def test_the_predictive_of_many_data_shares_its_global_draws(by_four):
    drawn = sample_posterior_predictive(by_four, ROWS, 50)["x"]
    assert drawn.shape == (1, 50, 11, 3)
    assert (abs(drawn.mean((0, 1)) - ROWS["x"]) < 4.5 / 50**0.5).all()


def test_the_data_come_first_wherever_their_plate_is(by_four):
    prior = sample_prior_predictive(by_four, 6)
    assert {name: value.shape for name, value in prior.items()} == {
        "m": (1, 6),
        "u": (1, 6, 3),
        "z": (1, 6, 1, 3),
        "x": (1, 6, 1, 3),
    }
    means = encode(by_four, ROWS)
    np.testing.assert_allclose(means["z"], [ROWS["x"]], atol=1e-6)
    np.testing.assert_allclose(means["m"], [0.5])
    assert means["u"].shape == (1, 3)
    np.testing.assert_allclose(decode(by_four, means)["x"], [ROWS["x"]], atol=1e-5)
    np.testing.assert_allclose(reconstruct(by_four, ROWS)["x"], [ROWS["x"]], atol=1e-5)


# --- what is impossible ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: traverse(of_one(Z[0]), "z", 2, Z[0]), "dim: expected .* below 2, got 2"),
        (lambda: traverse(of_one(Z[0]), "y", 0, Z[0]), "site: expected one of z, got 'y'"),
        (lambda: interpolate(of_one(Z[0]), of_one(Z[1]), 1), "num_points: expected at least 2"),
        (
            lambda: sample_prior_predictive(WITHOUT_C, 0),
            "num_samples: expected a whole number from 1, got 0",
        ),
        (lambda: sample_prior_predictive(GIVEN_C, 2), "model: expected data for its argument 'c'"),
        (
            lambda: sample_prior_predictive(WITHOUT_C, 2, c=C),
            r"data\['c'\]: expected arrays that the model takes",
        ),
        (lambda: decode(GIVEN_C, of_one(Z), c=C[:2]), "as many data of each, got {'z': 4, 'c': 2}"),
        (lambda: decode(GIVEN_C, {"y": Z[None]}, c=C), "latents: expected the sites z, got y"),
        (lambda: decode(GIVEN_C, {"z": Z}, c=C), r"latents\['z'\]: expected shape \(seed=1, datum"),
    ],
)
def test_what_is_impossible_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conditions_that_the_model_refuses_are_refused():
    class Picky:
        def check_data(self, c, x=None):
            if (c > 1).any():
                raise ValueError("c: expected at most 1")

        def __call__(self, c, x=None):
            model(c, x)

    few = {name: array[:2] for name, array in DATA.items()}
    picky = Fit.from_params(Picky(), guide, PARAMS, example=few)
    decode(picky, of_one(Z[:2]), c=C[:2])
    for call in (
        lambda: decode(picky, of_one(Z), c=C),
        lambda: sample_prior_predictive(picky, c=C),
        lambda: sample_posterior(picky, DATA),
    ):
        with pytest.raises(ValueError, match="c: expected at most 1"):
            call()


# --- chosen sites, and memory ---------------------------------------------------------------------


def shared_model(x=None):
    mu = numpyro.sample("mu", dist.Normal(0, 2.0))
    with numpyro.plate("rows", 1 if x is None else len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def shared_guide(x):
    mu = numpyro.sample("mu", dist.Normal(1.0, 2.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(mu, 1.0))


def test_only_the_chosen_sites_are_returned():
    data = {"x": np.zeros(6, np.float32)}
    result = Fit.from_params(shared_model, shared_guide, {}, example=data)
    whole = sample_posterior(result, data, 5)
    for sites in (["mu"], ["z"]):
        some = sample_posterior(result, data, 5, return_sites=sites)
        assert list(some) == sites
        np.testing.assert_array_equal(some[sites[0]], whole[sites[0]])
    with pytest.raises(ValueError, match="return_sites: expected some of mu, z, got 'x'"):
        sample_posterior(result, data, return_sites=["x"])
    assert sample_posterior_predictive(result, data, return_sites=["x"])["x"].shape == (1, 1, 6)


def test_a_shared_draw_correlates_the_data(monkeypatch):
    """x_n = mu + noise of its own: Cov(x_n, x_m) = 4, Var(x_n) = 5.25, in other batches too."""
    data = {"x": np.zeros(6, np.float32)}
    result = Fit.from_params(shared_model, shared_guide, {}, example=data)
    monkeypatch.setattr(generation, "DATA_AT_ONCE", 4)
    draws = sample_posterior_predictive(result, data, 4000)["x"][0]
    correlation = np.corrcoef(draws.T)[np.triu_indices(6, 1)]
    expected = 4 / 5.25
    assert abs(correlation - expected).max() < 4.5 * (1 - expected**2) / np.sqrt(4000)


def test_draws_that_do_not_fit_into_memory_are_refused(monkeypatch):
    """Half of the free memory, 125 bytes: a draw of mu takes 4, one of six z 24."""
    data = {"x": np.zeros(6, np.float32)}
    result = Fit.from_params(shared_model, shared_guide, {}, example=data)

    class Memory:
        available = 250

    monkeypatch.setattr(generation.psutil, "virtual_memory", Memory)
    message = r"got 5, which fill 1.4e-07 GB; ask for at most 4, for fewer data"
    with pytest.raises(MemoryError, match=message):
        sample_posterior(result, data, 5)
    assert sample_posterior(result, data, 5, return_sites=["z"])["z"].shape == (1, 5, 6)
    assert sample_posterior(result, data, 5, return_sites=["mu"])["mu"].shape == (1, 5)
    with pytest.raises(MemoryError, match=r"got 6, .* at most 5, for fewer data"):
        sample_posterior(result, data, 6, return_sites=["z"])
