"""Simulation-based calibration: uniform where the guide is the posterior, and known elsewhere."""

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from inference import Fit, fit, plot_calibration, sbc, sbc_power
from inference.calibration import rank_scale
from models import gaussian_mean, guides, linear_gaussian

NUM = 1000
TRUTH = gaussian_mean.Truth(mu_0=0.5, sigma=0.7)
DATA = TRUTH.simulate(400, seed=0)


def toy(**changes):
    """The toy at its optimum, or with other parameters."""
    params = gaussian_mean.optimum(TRUTH) | changes
    return Fit.from_params(gaussian_mean.Model(), gaussian_mean.Guide(), params, example=DATA)


def last_axis(tree, name="z"):
    """The places of the ranks of the first seed, (..., simulation)."""
    return np.moveaxis(tree["prior_sbc"][name].values[0], 0, -1)


# --- what is known exactly ------------------------------------------------------------------------


def test_ranks_are_uniform_where_the_guide_is_the_posterior(rung):
    for result, conditions in ((toy(), {"c": DATA["c"]}), (rung.fit(), {})):
        tree = sbc(result, NUM, num_samples=99, **conditions)
        for name in ("z", "log_likelihood"):
            for pit in np.atleast_2d(last_axis(tree, name)):
                assert stats.kstest(pit, "uniform").pvalue > 1e-4
        assert tree["joint"].p_value.item() > 1e-3
        levels = tree["coverage"].prob.values
        error = np.sqrt(levels * (1 - levels) / NUM)
        share = tree["coverage"].z.values[0].reshape(len(levels), -1).T
        assert (abs(share - levels) < 4.5 * error).all()


def test_ranks_of_a_mean_field_follow_their_formula(rung):
    tree = sbc(rung.fit(factorises=True), NUM, num_samples=49)
    expected = linear_gaussian.mean_field_ranks(rung.params, 49)
    for k in range(3):
        counts = np.bincount(tree["ranks"].z.values[0, :, k], minlength=50)
        assert stats.chisquare(counts, NUM * expected[:, k]).pvalue > 1e-4
        assert stats.chisquare(counts).pvalue < 1e-6  # it is not uniform
    assert tree["joint"].p_value.item() < 1e-6


def test_ranks_of_a_mean_field_are_uniform_if_it_is_exact():
    params = {"W": np.diag([2.0, 0.5])[:, :2], "sigma": 0.7}
    np.testing.assert_allclose(linear_gaussian.mean_field_ranks(params, 9), 0.1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 0.9, 1.2])
def test_ranks_tell_the_scale(rung, scale):
    tree = sbc(rung.fit(scale=scale), 2 * NUM)
    found = rank_scale(last_axis(tree))
    # The median of |e| of N normal deviates has the standard error 1.167 / sqrt(N), relatively.
    np.testing.assert_allclose(found, scale, rtol=4.5 * 1.17 / np.sqrt(2 * NUM))
    assert tree["joint"].p_value.item() < 1e-3


def test_only_the_test_quantity_sees_a_guide_that_ignores_the_data(rung):
    """The prior is uniform in every dimension of z, and wrong (Modrak et al. 2023)."""
    result = Fit.from_params(
        rung.model, guides.prior(rung.model), rung.params, example=rung.data(9, 0)
    )
    tree = sbc(result, NUM, num_samples=99)
    assert all(stats.kstest(pit, "uniform").pvalue > 1e-4 for pit in last_axis(tree))
    assert tree["uniformity"]["log_likelihood"].item() < 1e-6
    assert tree["joint"].p_value.item() < 1e-6


@pytest.mark.slow
def test_power_is_the_share_of_faults_that_are_found(rung):
    power = sbc_power(300, scale=0.8)
    found = [
        sbc(rung.fit(scale=0.8), 300, num_samples=99, key=jax.random.key(i))["uniformity"].z.values
        for i in range(20)
    ]
    share = np.mean(np.array(found) < 0.05)
    assert abs(share - power) < 4 * np.sqrt(power * (1 - power) / 20 + 0.025**2)


def test_power_grows_with_simulations_and_falls_with_quantities():
    assert sbc_power(1000, 0.9) > 0.9  # what the README says
    assert sbc_power(2000, 0.9, num_quantities=51) > 0.9
    assert sbc_power(1000, 1.0) < 0.1
    assert sbc_power(1000, 0.9, num_quantities=51) < sbc_power(1000, 0.9) - 0.1


# --- conditions, seeds, trees ---------------------------------------------------------------------


@pytest.mark.slow
def test_conditions_are_drawn_with_replacement():
    """With one condition alone, x has the mean and the variance that it gives."""
    result = toy()
    tree = sbc(result, 50, c=np.array([3.0], np.float32))
    assert tree["ranks"].sizes == {"chain": 1, "draw": 50}
    few = sbc(result, 200, c=DATA["c"][:2])
    assert few["ranks"].sizes["draw"] == 200


@pytest.mark.slow
def test_seeds_answer_each_for_itself():
    truth = TRUTH.simulate(200, seed=3)
    programs = gaussian_mean.Model(), gaussian_mean.Guide()
    result = fit(*programs, truth, num_steps=3, num_seeds=2, progress=False)
    tree = sbc(result, 100, num_samples=20, c=truth["c"])
    assert tree["prior_sbc"].z.shape == (2, 100)
    assert list(tree["prior_sbc"].chain.values) == result.seeds
    one = sbc(result.isel(seed=0), 100, num_samples=20, c=truth["c"])
    np.testing.assert_array_equal(tree["ranks"].z.values[:1], one["ranks"].z.values)


def test_batches_and_ties_change_nothing_that_matters():
    """A discrete site ties with most of the guide's draws, and its ranks are uniform still."""

    def model(x=None):
        with numpyro.plate("rows", 1 if x is None else len(x)):
            k = numpyro.sample("k", dist.Bernoulli(0.3))
            numpyro.sample("obs", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(x):
        log_odds = jnp.log(0.3 / 0.7) + 2 * x - 2
        with numpyro.plate("rows", len(x)):
            numpyro.sample("k", dist.Bernoulli(logits=log_odds))

    result = Fit.from_params(model, guide, {}, example={"x": np.zeros(5, np.float32)})
    tree = sbc(result, NUM, num_samples=60, batch_size=300)
    assert stats.kstest(last_axis(tree, "k"), "uniform").pvalue > 1e-4
    assert set(np.unique(tree["ranks"].k.values)) <= set(range(61))


def test_arviz_draws_the_tree_and_netcdf_keeps_it(rung, tmp_path):
    tree = sbc(rung.fit(), 100, num_samples=20)
    arviz.plot_ecdf_pit(tree)
    arviz.plot_ecdf_pit(tree, coverage=True)
    tree.to_netcdf(tmp_path / "sbc.nc", engine="h5netcdf")
    again = arviz.from_netcdf(tmp_path / "sbc.nc")
    assert again.attrs["correction"] == "Bonferroni over 4 quantities"
    np.testing.assert_array_equal(again["ranks"].z.values, tree["ranks"].z.values)
    figure = plot_calibration(tree)
    assert [axes.get_title() for axes in figure.axes] == ["z", "log_likelihood"]
    assert len(figure.axes[0].lines) == 3


@pytest.mark.slow
def test_missing_entries_are_missing_from_the_simulations():
    def model(x=None, x_mask=None):
        size = 1 if x is None else len(x)
        with numpyro.plate("data", size):
            z = numpyro.sample("z", dist.Normal(0, 1))
            fn = dist.Normal(z[:, None] * jnp.ones(2), 1.0)
            fn = fn if x_mask is None else fn.mask(x_mask)
            numpyro.sample("x", fn.to_event(1), obs=x)

    def guide(x, x_mask):
        precision = 1 + x_mask.sum(1)
        with numpyro.plate("data", len(x)):
            loc = (x * x_mask).sum(1) / precision
            numpyro.sample("z", dist.Normal(loc, precision**-0.5))

    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    x[::3, 0] = np.nan
    result = Fit.from_params(model, guide, {}, example={"x": x}, missing="mask")
    prepared = result.prepare({"x": x})
    for conditions in ({}, {"x_mask": np.asarray(prepared["x_mask"])}):
        assert sbc(result, NUM, num_samples=50, **conditions)["joint"].p_value.item() > 1e-3


# --- what cannot be ranked ------------------------------------------------------------------------


def test_conditions_are_needed_and_observations_are_not():
    with pytest.raises(
        ValueError, match=r"by keyword, got none for 'c'; write sbc\(result"
    ) as error:
        sbc(toy(), 10)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got 'x', which the model simulates"):
        sbc(toy(), 10, **DATA)


def test_global_sites_need_new_fits():
    def model(x=None):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1))
            numpyro.sample("x", dist.Normal(z, 1), obs=x)

    def guide(x):
        numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0, 1))

    result = Fit.from_params(model, guide, {}, example={"x": np.zeros(4, np.float32)})
    with pytest.raises(
        ValueError, match=r"global site .mu..*a new fit for every simulation"
    ) as error:
        sbc(result, 10)
    assert "\n" not in str(error.value)


def test_observations_must_be_arrays():
    def model(x=None):
        with numpyro.plate("data", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=None if x is None else jnp.log(x))

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0, 1))

    result = Fit.from_params(model, guide, {}, example={"x": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match="got 'y', which the model computes from x"):
        sbc(result, 10)


def test_a_table_of_numbers_cannot_be_calibrated(rung):
    data = rung.data(20, seed=0)

    def guide(x):
        loc = numpyro.param("loc", jnp.zeros((20, 3)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, 1).to_event(1))

    params = rung.params | {"loc": np.zeros((20, 3), np.float32)}
    result = Fit.from_params(rung.model, guide, params, example=data)
    with pytest.raises(ValueError, match="expected those that the guide was fitted to"):
        sbc(result, 20)


def test_counts_are_whole(rung):
    with pytest.raises(ValueError, match="num_simulations"):
        sbc(rung.fit(), 0)
    with pytest.raises(ValueError, match="num_samples"):
        sbc(rung.fit(), 10, num_samples=0)
