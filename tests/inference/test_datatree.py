"""A fit as a DataTree: what ArviZ reads from it, and what netCDF gives back."""

import json
import subprocess
import sys
from types import SimpleNamespace

import arviz as az
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray

from inference.datatree import to_datatree

FIRST_SEED = 7
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


def make_fit(num_seeds=3, num_steps=10, num_evaluations=2, params=None):
    rng = np.random.default_rng(0)
    validation_elbo = rng.normal(size=(num_seeds, num_evaluations)).astype(np.float32)
    default = {"w": rng.normal(size=num_seeds), "b": rng.normal(size=(num_seeds, 2))}
    return SimpleNamespace(
        params=default if params is None else params,
        elbo=rng.normal(size=(num_seeds, num_steps)).astype(np.float32),
        validation_elbo=validation_elbo if num_evaluations else None,
        config=CONFIG | {"num_seeds": num_seeds, "num_steps": num_steps},
        info=INFO
        | {
            "num_steps": [num_steps] * num_seeds,
            "validation_steps": [5 * (i + 1) for i in range(num_evaluations)],
        },
    )


def make_tree(num_seeds=3, **settings):
    """A tree with every group."""
    rng = np.random.default_rng(1)
    return to_datatree(
        make_fit(num_seeds, **settings),
        posterior={"z": rng.normal(size=(num_seeds, 20, 4))},
        log_likelihood={"x": rng.normal(size=(num_seeds, 20, 5))},
        evaluation={"pareto_k": rng.normal(size=(num_seeds, 5))},
        observed_data={"x": np.arange(60, dtype=np.uint8).reshape(5, 3, 4)},
        constant_data={"c": np.arange(5)},
        coords={"latent": list("abcd")},
        dims={"z": ["latent"], "x": ["datum"]},
    )


def save_and_open(tree, path):
    tree.to_netcdf(path, engine="h5netcdf")
    with az.from_netcdf(path, engine="h5netcdf") as opened:
        return opened.load()


@pytest.fixture
def agg():
    backend = matplotlib.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(backend)


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
    for validation_elbo in (None, np.zeros((3, 0), np.float32)):
        result = make_fit(num_evaluations=0)
        result.validation_elbo = validation_elbo
        tree = to_datatree(result)
        assert ("validation_stats" in tree.children) == (validation_elbo is not None)
        xarray.testing.assert_identical(save_and_open(tree, tmp_path / "trace.nc"), tree)


def test_groups_and_dimensions():
    tree = make_tree()
    dims = {f"{group}/{name}": v.dims for group in tree.children for name, v in tree[group].items()}
    assert dims == {
        "posterior/z": ("chain", "draw", "latent"),
        "log_likelihood/x": ("chain", "draw", "datum"),
        "evaluation/pareto_k": ("chain", "datum"),
        "fit/w": ("chain", "draw"),
        "fit/b": ("chain", "draw", "b_dim_0"),
        "observed_data/x": ("datum", "x_dim_0", "x_dim_1"),
        "constant_data/c": ("c_dim_0",),
        "sample_stats/elbo": ("chain", "draw"),
        "validation_stats/elbo": ("chain", "draw"),
    }
    assert list(tree.posterior.latent.values) == list("abcd")
    assert tree.observed_data.x.dtype == np.uint8


def test_the_posterior_is_the_parameters_unless_draws_are_given():
    result = make_fit()
    tree = to_datatree(result)
    assert set(tree.children) == {"posterior", "sample_stats", "validation_stats"}
    assert tree.posterior.b.dims == ("chain", "draw", "b_dim_0")
    np.testing.assert_array_equal(tree.posterior.w.values, result.params["w"][:, None])
    np.testing.assert_array_equal(tree.posterior.b.values, result.params["b"][:, None])

    z = np.random.default_rng(2).normal(size=(3, 6))
    tree = to_datatree(result, posterior={"z": z})
    assert set(tree.posterior.data_vars) == {"z"}
    np.testing.assert_array_equal(tree.posterior.z.values, z)
    np.testing.assert_array_equal(tree.fit.w.values, result.params["w"][:, None])


def test_the_chain_coordinate_is_the_seed():
    tree = make_tree(num_seeds=2)
    for group in ("posterior", "fit", "log_likelihood", "evaluation", "sample_stats"):
        np.testing.assert_array_equal(tree[group].chain.values, [7, 8])


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


def test_a_network_becomes_one_variable_per_array(tmp_path):
    kernel = np.random.default_rng(3).normal(size=(3, 4, 2))
    network = {"layers": {0: {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((3, 2))}}}
    half = {"decoder/scale": jnp.ones(3, jnp.bfloat16) / 3}
    tree = to_datatree(make_fit(params={"encoder$params": network} | half))
    variables = tree.posterior.data_vars
    kernel_name = "encoder$params.layers.0.kernel"
    assert set(variables) == {kernel_name, "encoder$params.layers.0.bias", "decoder.scale"}
    assert variables[kernel_name].dims[2:] == (f"{kernel_name}_dim_0", f"{kernel_name}_dim_1")
    np.testing.assert_array_equal(variables[kernel_name].values[:, 0], kernel.astype(np.float32))
    assert variables["decoder.scale"].dtype == np.float32  # netCDF has no bfloat16
    xarray.testing.assert_identical(save_and_open(tree, tmp_path / "trace.nc"), tree)


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


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from netCDF"])
def test_arviz_reads_it(num_seeds, saved, tmp_path, agg):
    result = make_fit(num_seeds, num_steps=50)
    result.elbo[-1, 40:] = np.nan
    parameters = to_datatree(result)
    draws = make_tree(num_seeds, num_steps=50)
    if saved:
        parameters = save_and_open(parameters, tmp_path / "parameters.nc")
        draws = save_and_open(draws, tmp_path / "draws.nc")

    summary = az.summary(parameters, kind="stats", round_to="none")
    assert list(summary.index) == ["w", "b[0]", "b[1]"]
    assert summary.loc["w", "mean"] == pytest.approx(result.params["w"].mean())
    assert list(az.summary(draws).index) == ["z[a]", "z[b]", "z[c]", "z[d]"]
    assert list(az.summary(draws, group="fit", kind="stats").index) == ["w", "b[0]", "b[1]"]
    for tree, variables in ((parameters, {"w", "b"}), (draws, {"z"})):
        az.summary(tree)
        assert set(az.plot_trace(tree).viz["trace"].data_vars) == variables
        assert set(az.plot_forest(tree).viz["point_estimate"].data_vars) == variables
        traces = az.plot_trace(tree, group="sample_stats")
        lines = traces.viz["trace"]["elbo"].values.ravel()
        assert len(lines) == num_seeds
        np.testing.assert_array_equal(lines[0].get_xdata(), tree.sample_stats.draw.values)
        np.testing.assert_array_equal(lines[0].get_ydata(), tree.sample_stats.elbo.values[0])
        az.plot_trace(tree, group="validation_stats")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"posterior": {"z": np.zeros((2, 20))}},
            r"posterior: expected 'z' of shape \(seed=3, draw, ...\), got \(2, 20\); move",
        ),
        ({"posterior": {"z": np.zeros(3)}}, r"posterior: expected 'z' .* got \(3,\)"),
        (
            {"posterior": {"y": np.zeros((3, 20)), "z": np.zeros((3, 21))}},
            r"posterior: expected 'z' of shape \(seed=3, draw=20, ...\), got \(3, 21\)",
        ),
        ({"log_likelihood": {"x": np.zeros((5, 3))}}, r"log_likelihood: .*seed=3.* got \(5, 3\)"),
        ({"evaluation": {"k": np.zeros((5, 3))}}, r"evaluation: .*seed=3.* got \(5, 3\)"),
        ({"coords": {"chain": [0, 1, 2]}}, r"coords: .* got \['chain'\]; leave them out"),
        ({"max_draws": 0}, "max_draws: expected a whole number from 1, or None .* got 0"),
        ({"constant_data": {"draw": np.zeros(2)}}, "constant_data: .* got 'draw'.* rename"),
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
        ValueError, match=r"params: expected 'w' of shape \(seed=3, ...\), got \(4,"
    ):
        to_datatree(make_fit(params={"w": np.zeros(4)}))
    result = make_fit(num_evaluations=2)
    result.info["validation_steps"] = [5]
    with pytest.raises(ValueError, match=r"seed=3, evaluation=1\), .* got \(3, 2\); pass"):
        to_datatree(result)


def test_importing_inference_does_not_import_arviz():
    code = (
        "import sys, inference.datatree; print({'arviz_base', 'xarray', 'pandas'} & {*sys.modules})"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "set()"
