"""A fit as a DataTree: what ArviZ reads from it, and what netCDF gives back."""

import dataclasses
import json

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
import xarray

from inference import datatree
from inference.datatree import to_datatree
from inference.evaluation import ElboTerms, Estimate, LabelCheck, pointwise_log_likelihood
from inference.fit import Fit
from inference.generation import sample_posterior, sample_posterior_predictive

FIRST_SEED = 7
NUM_DATA, NUM_DRAWS = 5, 20
DATA = {"x": f"float32[{NUM_DATA}, 3, 4] sha256:0123"}
CONFIG = {
    "seed": FIRST_SEED,
    "num_epochs": None,
    "average": 0.25,
    "objective": "Trace_ELBO(num_particles=1)",
    "resume": True,
    "optimizer": {"scale_by_adam.b1": 0.9},
}
INFO = {
    "device": "cpu",
    "versions": {"numpyro": "0.0.1", "jax": "0.0.2"},
    "seconds": {"compile": 1.5, "run": 2.0, "total": 3.5},
    "num_skipped": [0, 0, 1],
}


def model(x):
    """A global number, one for each group, a local vector, observed pictures."""
    theta = numpyro.sample("theta", dist.Normal(0, 1))
    with numpyro.plate("groups", 3):
        u = numpyro.sample("u", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([4]).to_event(1))
        loc = (theta + u.sum() + z)[:, None]
        numpyro.sample("x", dist.Normal(loc, 1).expand([len(x), 3, 4]).to_event(2), obs=x)


def guide(x):
    w, b = numpyro.param("w", jnp.zeros(())), numpyro.param("b", jnp.zeros(2))
    numpyro.sample("theta", dist.Normal(w, 1))
    with numpyro.plate("groups", 3):
        numpyro.sample("u", dist.Normal(b.sum(), 1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0, 1).expand([4]).to_event(1))


def make_fit(num_seeds=3, num_steps=10, num_evaluations=2, params=None):
    rng = np.random.default_rng(0)
    validation_elbo = rng.normal(size=(num_seeds, num_evaluations)).astype(np.float32)
    default = {"w": rng.normal(size=num_seeds), "b": rng.normal(size=(num_seeds, 2))}
    return Fit(
        model=model,
        guide=guide,
        preprocess=None,
        params=default if params is None else params,
        mutable={},
        elbo=rng.normal(size=(num_seeds, num_steps)).astype(np.float32),
        validation_elbo=validation_elbo if num_evaluations else None,
        state=None,
        config=CONFIG | {"num_seeds": num_seeds, "num_steps": num_steps},
        info=INFO
        | {
            "num_steps": [num_steps] * num_seeds,
            "validation_steps": [5 * (i + 1) for i in range(num_evaluations)],
        },
        batch={"x": jax.ShapeDtypeStruct((NUM_DATA, 3, 4), np.dtype("float32"))},
    )


def make_estimate(name="log_likelihood", num_seeds=3, num_samples=1000, data=DATA, k=True, seed=0):
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(2, num_seeds, NUM_DATA)).astype(np.float32)
    return Estimate(name, numbers[0], num_samples, data, pareto_k=numbers[1] if k else None)


def make_terms(num_seeds=3, data=DATA):
    names = ("elbo", "reconstruction", "kl")
    parts = [make_estimate(n, num_seeds, 1, data, k=False, seed=i) for i, n in enumerate(names)]
    return ElboTerms(
        *parts, kl_by_site={}, kl_of_globals={}, kl_per_dim={}, z_loc={}, z_loc_noise={}
    )


def make_draws(num_seeds=3):
    """Of every latent site."""
    rng = np.random.default_rng(1)
    shapes = {"theta": (), "u": (3,), "z": (NUM_DATA, 4)}
    return {n: rng.normal(size=(num_seeds, NUM_DRAWS, *shape)) for n, shape in shapes.items()}


def make_tree(num_seeds=3, **settings):
    """A tree with every group."""
    rng = np.random.default_rng(2)
    predicted = rng.normal(size=(num_seeds, 6, NUM_DATA, 3, 4))
    return to_datatree(
        make_fit(num_seeds, **settings),
        make_terms(num_seeds),
        make_estimate(num_seeds=num_seeds),
        posterior=make_draws(num_seeds),
        posterior_predictive={"x": predicted},
        prior_predictive={"x": predicted[:, :3], "theta": predicted[:, :3, 0, 0, 0]},
        log_likelihood={"x": rng.normal(size=(num_seeds, NUM_DRAWS, NUM_DATA))},
        observed_data={"x": np.arange(60, dtype=np.uint8).reshape(NUM_DATA, 3, 4)},
        constant_data={"c": np.arange(NUM_DATA), "temperature": np.float32(1.5)},
        coords={"z_dim_0": list("abcd")},
    )


def save_and_open(tree, path):
    tree.to_netcdf(path, engine="h5netcdf")
    with az.from_netcdf(path, engine="h5netcdf") as opened:
        return opened.load()


def dims_of(tree):
    return {f"{group}/{n}": v.dims for group in tree.children for n, v in tree[group].items()}


@pytest.fixture
def agg():
    backend = matplotlib.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(backend)


# --- netCDF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("make", [make_tree, lambda n: to_datatree(make_fit(n))])
def test_netcdf_returns_the_same_tree(make, num_seeds, tmp_path):
    tree = make(num_seeds)
    opened = save_and_open(tree, tmp_path / "trace.nc")
    xarray.testing.assert_identical(opened, tree)  # values, coordinates, attributes, names
    for group in tree.groups:
        for name, variable in tree[group].variables.items():
            assert opened[group][name].dtype == variable.dtype, name


def test_netcdf_without_evaluations(tmp_path):
    result = make_fit(num_evaluations=0)
    for validation_elbo in (None, np.zeros((3, 0), np.float32)):
        tree = to_datatree(dataclasses.replace(result, validation_elbo=validation_elbo))
        assert ("validation_stats" in tree.children) == (validation_elbo is not None)
        xarray.testing.assert_identical(save_and_open(tree, tmp_path / "trace.nc"), tree)


# --- groups ---------------------------------------------------------------------------------------


def test_groups_and_dimensions():
    tree = make_tree()
    assert dims_of(tree) == {
        "parameters/w": ("chain", "draw"),
        "parameters/b": ("chain", "draw", "b_dim_0"),
        "sample_stats/elbo": ("chain", "draw"),
        "validation_stats/elbo": ("chain", "draw"),
        "evaluation/elbo": ("chain", "data"),
        "evaluation/reconstruction": ("chain", "data"),
        "evaluation/kl": ("chain", "data"),
        "evaluation/log_likelihood": ("chain", "data"),
        "evaluation/pareto_k": ("chain", "data"),
        "posterior/theta": ("chain", "draw"),
        "posterior/u": ("chain", "draw", "groups"),
        "posterior/z": ("chain", "draw", "data", "z_dim_0"),
        "posterior_predictive/x": ("chain", "draw", "data", "x_dim_0", "x_dim_1"),
        "prior_predictive/x": ("chain", "draw", "data", "x_dim_0", "x_dim_1"),
        "prior_predictive/theta": ("chain", "draw"),
        "log_likelihood/x": ("chain", "draw", "data"),
        "observed_data/x": ("data", "x_dim_0", "x_dim_1"),
        "constant_data/c": ("data",),
        "constant_data/temperature": (),
    }
    assert list(tree.posterior.z_dim_0.values) == list("abcd")
    assert tree.observed_data.x.dtype == np.uint8
    for group in ("evaluation", "posterior", "log_likelihood", "observed_data", "constant_data"):
        np.testing.assert_array_equal(tree[group]["data"].values, np.arange(NUM_DATA))


def test_values_are_as_given():
    tree, draws = make_tree(), make_draws()
    for name in draws:
        np.testing.assert_array_equal(tree.posterior[name].values, draws[name])
    terms, likelihood = make_terms(), make_estimate()
    for name, values in {
        "elbo": terms.elbo.pointwise,
        "reconstruction": terms.reconstruction.pointwise,
        "kl": terms.kl.pointwise,
        "log_likelihood": likelihood.pointwise,
        "pareto_k": likelihood.pareto_k,
    }.items():
        np.testing.assert_array_equal(tree["evaluation"][name].values, values)


def test_parameters_are_no_posterior():
    result = make_fit()
    tree = to_datatree(result)
    assert set(tree.children) == {"parameters", "sample_stats", "validation_stats"}
    np.testing.assert_array_equal(tree["parameters"].w.values, result.params["w"][:, None])
    np.testing.assert_array_equal(tree["parameters"].b.values, result.params["b"][:, None])
    with pytest.raises(ValueError, match="conver"):
        az.summary(tree)
    assert set(make_tree().posterior.data_vars) == {"theta", "u", "z"}


def test_the_marginal_likelihood_is_not_arviz_log_likelihood():
    tree = to_datatree(make_fit(), make_estimate())
    assert "log_likelihood" not in tree.children
    assert "log_likelihood" in tree["evaluation"].data_vars


def test_a_label_check_gives_its_information():
    values = np.random.default_rng(0).normal(size=(3, NUM_DATA, 2))
    check = LabelCheck(values, np.array([0, 1, 1, 0, 1]), 100, DATA)
    evaluation = to_datatree(make_fit(), check, make_estimate())["evaluation"]
    information = evaluation.label_information
    assert information.dims == ("chain", "data")
    np.testing.assert_array_equal(information.values, check.information.pointwise)
    assert evaluation.attrs["num_samples.label_information"] == 100


def test_the_evaluation_knows_its_data_and_its_draws():
    attrs = make_tree()["evaluation"].attrs
    assert json.loads(attrs["data"]) == DATA
    draws = {n.removeprefix("num_samples."): v for n, v in attrs.items() if "num_samples" in n}
    once = dict.fromkeys(("elbo", "reconstruction", "kl"), 1)
    assert draws == once | {"log_likelihood": 1000, "pareto_k": 1000}


def test_the_chain_coordinate_is_the_seed():
    tree = make_tree(num_seeds=2)
    for group in ("posterior", "parameters", "log_likelihood", "evaluation", "sample_stats"):
        np.testing.assert_array_equal(tree[group].chain.values, [7, 8])
    one = to_datatree(make_fit().isel(seed=2), make_estimate(num_seeds=1))
    for group in ("parameters", "evaluation", "sample_stats"):
        np.testing.assert_array_equal(one[group].chain.values, [9])


def test_known_parameters_have_no_trace(tmp_path):
    params = {"w": np.float32(1.5), "b": np.zeros(2, np.float32)}
    example = {"x": np.zeros((NUM_DATA, 3, 4), np.float32)}
    tree = to_datatree(Fit.from_params(model, guide, params, example=example))
    assert set(tree.children) == {"parameters"}
    assert tree["parameters"].w.values == [[1.5]]
    xarray.testing.assert_identical(save_and_open(tree, tmp_path / "trace.nc"), tree)


# --- names and labels of axes ---------------------------------------------------------------------


def test_dims_and_coords_of_the_user():
    rng = np.random.default_rng(0)
    people = [f"person {i}" for i in range(NUM_DATA)]
    tree = to_datatree(
        make_fit(),
        make_estimate(),
        posterior=make_draws(),
        posterior_predictive={"x": rng.normal(size=(3, 2, NUM_DATA, 3, 4))},
        log_likelihood={"x": rng.normal(size=(3, NUM_DRAWS, NUM_DATA))},
        constant_data={"prices": np.arange(7)},
        coords={"data": people, "groups": ["red", "green", "blue"]},
        dims={"x": ["data", "row", "column"], "prices": ["shop"], "z": ["data"]},
    )
    dims = dims_of(tree)
    assert dims["posterior_predictive/x"] == ("chain", "draw", "data", "row", "column")
    assert dims["log_likelihood/x"] == ("chain", "draw", "data")
    assert dims["constant_data/prices"] == ("shop",)
    assert dims["posterior/z"] == ("chain", "draw", "data", "z_dim_0")
    for group in ("posterior", "posterior_predictive", "log_likelihood", "evaluation"):
        assert list(tree[group]["data"].values) == people
    assert tree.posterior.u.sel(groups="blue").shape == (3, NUM_DRAWS)


def test_a_plate_named_like_a_variable_or_an_axis_of_arviz(monkeypatch):
    names = {"u": ["u", "u_dim_0"], "z": ["chain", "z_dim_0"], "theta": ["u"]}
    monkeypatch.setattr(datatree, "site_dims", lambda result: names)
    draws = {"u": np.zeros((3, 2, 4, 5)), "z": np.zeros((3, 2, 6, 7)), "theta": np.zeros((3, 2, 4))}
    tree = to_datatree(make_fit(), posterior=draws)
    assert dims_of(tree)["posterior/u"] == ("chain", "draw", "u_dim_1", "u_dim_0")
    assert dims_of(tree)["posterior/z"] == ("chain", "draw", "z_dim_1", "z_dim_0")
    assert dims_of(tree)["posterior/theta"] == ("chain", "draw", "theta_dim_0")


def test_a_site_in_a_scope(monkeypatch, tmp_path):
    monkeypatch.setattr(datatree, "site_dims", lambda result: {"a/x": ["a/rows", "a/x_dim_0"]})
    tree = to_datatree(make_fit(), posterior_predictive={"a/x": np.zeros((3, 2, 4, 5))})
    assert dims_of(tree)["posterior_predictive/a.x"] == ("chain", "draw", "a.rows", "a.x_dim_0")
    xarray.testing.assert_identical(save_and_open(tree, tmp_path / "trace.nc"), tree)


def test_a_network_becomes_one_variable_per_array(tmp_path):
    kernel = np.random.default_rng(3).normal(size=(3, 4, 2))
    network = {"layers": {0: {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((3, 2))}}}
    half = {"decoder/scale": jnp.ones(3, jnp.bfloat16) / 3}
    tree = to_datatree(make_fit(params={"encoder$params": network} | half))
    variables = tree["parameters"].data_vars
    kernel_name = "encoder$params.layers.0.kernel"
    assert set(variables) == {kernel_name, "encoder$params.layers.0.bias", "decoder.scale"}
    assert variables[kernel_name].dims[2:] == (f"{kernel_name}_dim_0", f"{kernel_name}_dim_1")
    np.testing.assert_array_equal(variables[kernel_name].values[:, 0], kernel.astype(np.float32))
    assert variables["decoder.scale"].dtype == np.float32  # netCDF has no bfloat16
    xarray.testing.assert_identical(save_and_open(tree, tmp_path / "trace.nc"), tree)


# --- traces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "max_draws", "expected"),
    [
        (10, 2000, range(1, 11)),
        (10, 10, range(1, 11)),
        (10, None, range(1, 11)),
        (10, 5, [2, 4, 6, 8, 10]),
        (10, 4, [1, 4, 7, 10]),
        (10, 3, [2, 6, 10]),
        (10, 1, [10]),
        (11, 10, [1, 3, 5, 7, 9, 11]),
    ],
)
def test_thinning_keeps_the_last_step_and_the_true_numbers(num_steps, max_draws, expected):
    result = make_fit(num_steps=num_steps)
    elbo = to_datatree(result, max_draws=max_draws).sample_stats.elbo
    np.testing.assert_array_equal(elbo.draw.values, list(expected))
    np.testing.assert_array_equal(elbo.values, result.elbo[:, np.array(expected) - 1])


def test_thinning_is_stated():
    elbo = to_datatree(make_fit(), max_draws=4).sample_stats.elbo
    assert elbo.attrs["thinning"] == "one step in 3, counted back from the last of 10"
    assert to_datatree(make_fit()).sample_stats.elbo.attrs["thinning"] == "none: all 10 steps"


def test_the_held_out_elbo_has_its_steps():
    result = make_fit(num_evaluations=2)
    elbo = to_datatree(result, max_draws=1).validation_stats.elbo
    np.testing.assert_array_equal(elbo.draw.values, [5, 10])
    np.testing.assert_array_equal(elbo.values, result.validation_elbo)


def test_steps_after_every_seed_has_stopped_are_left_out():
    result = make_fit(num_steps=100)
    result.info["num_steps"] = [4, 10, 7]
    result.elbo[:, 10:] = np.nan
    elbo = to_datatree(result, max_draws=10).sample_stats.elbo
    np.testing.assert_array_equal(elbo.draw.values, np.arange(1, 11))


def test_what_a_stopped_seed_has_not_done_stays_nan(tmp_path):
    result = make_fit()
    result.elbo[1, 4:] = np.nan
    result.validation_elbo[1, 1] = np.nan
    tree = save_and_open(to_datatree(result), tmp_path / "trace.nc")
    np.testing.assert_array_equal(tree.sample_stats.elbo.values, result.elbo)
    np.testing.assert_array_equal(tree.validation_stats.elbo.values, result.validation_elbo)
    assert np.isnan(tree.sample_stats.elbo.sel(chain=8).values).sum() == 6


# --- attributes -----------------------------------------------------------------------------------


def test_attributes_hold_the_settings(tmp_path):
    result = make_fit()
    attrs = save_and_open(to_datatree(result), tmp_path / "trace.nc").attrs
    for prefix, settings in (("config", result.config), ("info", result.info)):
        for key, value in settings.items():
            stored = attrs[f"{prefix}.{key}"]
            plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
            assert (stored if plain else json.loads(stored)) == value, key
    assert attrs["config.num_steps"] == 10
    assert attrs["config.resume"] == "true"
    assert attrs["config.num_epochs"] == "null"
    assert attrs["info.seconds"] == '{"compile": 1.5, "run": 2.0, "total": 3.5}'


def test_attributes_say_where_a_group_comes_from():
    tree = make_tree()
    for node in (tree, *tree.children.values()):
        assert node.attrs["inference_library"] == "numpyro"
        assert node.attrs["inference_library_version"] == "0.0.1"  # the run's, not today's
        assert node.attrs["creation_library"] == "ArviZ"
        assert "created_at" in node.attrs
    for group in ("sample_stats", "validation_stats"):
        assert tree[group].elbo.attrs["units"] == "nats per datum"


# --- ArviZ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from netCDF"])
def test_arviz_reads_it(num_seeds, saved, tmp_path, agg):
    result = make_fit(num_seeds, num_steps=50)
    result.elbo[-1, 40:] = np.nan
    draws = make_draws(num_seeds)
    tree = to_datatree(result, posterior={"theta": draws["theta"], "u": draws["u"]})
    if saved:
        tree = save_and_open(tree, tmp_path / "draws.nc")

    summary = az.summary(tree, group="parameters", kind="stats", round_to="none")
    assert list(summary.index) == ["w", "b[0]", "b[1]"]
    assert summary.loc["w", "mean"] == pytest.approx(result.params["w"].mean())
    assert list(az.summary(tree).index) == ["theta", "u[0]", "u[1]", "u[2]"]
    for group, variables in (("parameters", {"w", "b"}), ("posterior", {"theta", "u"})):
        assert set(az.plot_trace(tree, group=group).viz["trace"].data_vars) == variables
        forest = az.plot_forest(tree, group=group)
        assert set(forest.viz["point_estimate"].data_vars) == variables
    traces = az.plot_trace(tree, group="sample_stats")
    lines = traces.viz["trace"]["elbo"].values.ravel()
    assert len(lines) == num_seeds
    np.testing.assert_array_equal(lines[0].get_xdata(), tree.sample_stats.draw.values)
    np.testing.assert_array_equal(lines[0].get_ydata(), tree.sample_stats.elbo.values[0])
    az.plot_trace(tree, group="validation_stats")


def normal_mean(x, prior):
    """A mean with the prior N(prior, 1) and data N(mean, 1): the tree of the exact posterior."""
    n, data = len(x), {"x": x}

    def model(x):
        theta = numpyro.sample("theta", dist.Normal(prior, 1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(theta, 1), obs=x)

    def guide(x):
        loc = numpyro.param("loc", jnp.zeros(()))
        numpyro.sample("theta", dist.Normal(loc, (n + 1) ** -0.5))

    params = {"loc": (prior + x.sum()) / (n + 1)}
    result = Fit.from_params(model, guide, params, example=data)
    draws = sample_posterior(result, data, 2000)
    return to_datatree(
        result,
        posterior=draws,
        posterior_predictive=sample_posterior_predictive(result, data, 3),
        log_likelihood=pointwise_log_likelihood(result, draws, data),
        observed_data=data,
    )


def test_arviz_leaves_one_out_and_compares(tmp_path):
    x = np.random.default_rng(5).normal(0, 1, 30).astype(np.float32)
    near, far = normal_mean(x, prior=0.0), normal_mean(x, prior=30.0)
    assert near.posterior_predictive.x.dims == ("chain", "draw", "data")
    near = save_and_open(near, tmp_path / "near.nc")
    loo = az.loo(near, pointwise=True)
    assert loo.n_data_points == 30
    assert loo.elpd_i.dims == ("data",)
    assert (loo.pareto_k < loo.good_k).all()
    exact = scipy.stats.norm.logpdf(x, (x.sum() - x) / 30, (1 + 1 / 30) ** 0.5)
    error = near.log_likelihood.x.std(("chain", "draw")).values / 2000**0.5
    np.testing.assert_array_less(np.abs(loo.elpd_i.values - exact), 4 * error)
    assert az.compare({"far": far, "near": near}).index.tolist() == ["near", "far"]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, np.zeros((3, 20)), [1.0], make_estimate()])
@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("posterior", "give the draws of sample_posterior$"),
        ("posterior_predictive", "give the draws of sample_posterior_predictive$"),
        ("prior_predictive", "give the draws of sample_prior_predictive$"),
        ("log_likelihood", "give the result of pointwise_log_likelihood; Estimates need no"),
        ("observed_data", "give arrays by name"),
        ("constant_data", "give arrays by name"),
        ("coords", "give labels by axis"),
        ("dims", "give names of axes by variable"),
    ],
)
def test_what_is_no_mapping_is_refused(argument, remedy, value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"^{argument}: expected a mapping, got {kind}; {remedy}"):
        to_datatree(make_fit(), **{argument: value})


@pytest.mark.parametrize("name", ["w", "x", "nothing"], ids=["parameter", "observed", "unknown"])
def test_a_posterior_of_other_than_latent_sites_is_refused(name):
    draws = make_draws() | {name: np.zeros((3, NUM_DRAWS))}
    with pytest.raises(
        ValueError,
        match=rf"posterior: expected .* latent sites \['theta', 'u', 'z'\], got \['{name}'\]; give",
    ):
        to_datatree(make_fit(), posterior=draws)


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        (
            [make_terms(), make_estimate(data={"x": "float32[5, 3, 4] sha256:abcd"})],
            "same data, got others in 'elbo' and 'log_likelihood': array x is .*0123, and .*abcd; ",
        ),
        (
            [make_estimate("a"), make_estimate("b", data=DATA | {"c": "int32[5]"}, k=False)],
            r"others in 'a' and 'b': array c is absent, and int32\[5\]; judge the same arrays",
        ),
        ([make_estimate(num_seeds=2)], "'log_likelihood' for 3 seeds, .* got 2; judge the fit"),
        ([make_terms(), make_terms()], "names that differ, got 'elbo' twice, .* change one by"),
        (
            [make_estimate("a"), make_estimate("b")],
            "names that differ, got 'pareto_k' twice, the second time of 'b'; .*pareto_k=None",
        ),
    ],
)
def test_judged_things_that_do_not_fit_together_are_refused(judged, message):
    with pytest.raises(ValueError, match=f"^judged: expected .*{message}") as error:
        to_datatree(make_fit(), *judged)
    assert "\n" not in str(error.value)


def test_what_no_judge_returned_is_refused():
    with pytest.raises(TypeError, match=r"^judged: expected an Estimate.* got dict; .*posterior="):
        to_datatree(make_fit(), make_draws())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"posterior": {"theta": np.zeros((2, 20))}},
            r"posterior: expected 'theta' of shape \(seed=3, draw, ...\), got \(2, 20\); move",
        ),
        ({"posterior": {"theta": np.zeros(3)}}, r"posterior: expected 'theta' .* got \(3,\)"),
        (
            {"posterior": {"theta": np.zeros((3, 20)), "u": np.zeros((3, 21, 3))}},
            r"posterior: expected 'u' of shape \(seed=3, draw=20, ...\), got \(3, 21, 3\)",
        ),
        (
            {"posterior": {"z": np.zeros((3, NUM_DATA, 4))}},
            r"posterior: expected 'z' of shape \(seed=3, draw, data, z_dim_0\), got \(3, 5, 4\)",
        ),
        ({"log_likelihood": {"x": np.zeros((5, 3))}}, r"log_likelihood: .*seed=3.* got \(5, 3\)"),
        (
            {"log_likelihood": {"x": np.zeros((3, 5))}},
            r"log_likelihood: expected 'x' of shape \(seed=3, draw, data\), got \(3, 5\); give",
        ),
        (
            {"posterior": make_draws(), "log_likelihood": {"x": np.zeros((3, 2, 5))}},
            "log_likelihood: expected 20 draws, as posterior has, got 2; give",
        ),
        ({"coords": {"chain": [0, 1, 2]}}, r"coords: .* got \['chain'\]; leave them out"),
        (
            {"posterior": make_draws(), "coords": {"groups": ["a", "b"]}},
            "posterior: expected 2 entries along 'groups', .* got 3 in 'u'; give as many",
        ),
        (
            {"constant_data": {"c": np.zeros(5), "prices": np.zeros(7)}},
            r"constant_data: expected 5 .* 'data', .* got 7 in 'prices'; .*dims=\{'prices'",
        ),
        (
            {"posterior": make_draws(), "dims": {"u": ["a", "b"]}},
            r"dims: expected at most 1 names for 'u' in posterior, got \['a', 'b'\]; name",
        ),
        ({"max_draws": 0}, "max_draws: expected a whole number from 1, or None .* got 0"),
        ({"constant_data": {"draw": np.zeros(2)}}, "constant_data: .* got 'draw'.* rename"),
        ({"observed_data": {"data": np.zeros(2)}}, "observed_data: .*'data', the axis.* rename"),
        (
            {"constant_data": {"a": {"b": np.zeros(2)}, "a.b": np.zeros(2)}},
            "constant_data: expected names that differ .* got 'a.b'",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        to_datatree(make_fit(), **arguments)


def test_errors_in_the_fit():
    with pytest.raises(
        ValueError, match=r"parameters: expected 'w' of shape \(seed=3, ...\), got \(4,"
    ):
        to_datatree(make_fit(params={"w": np.zeros(4)}))
    result = make_fit(num_evaluations=2)
    result.info["validation_steps"] = [5]
    with pytest.raises(ValueError, match=r"seed=3, evaluation=1\), .* got \(3, 2\); pass"):
        to_datatree(result)
