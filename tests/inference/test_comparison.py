"""Runs set side by side, against arithmetic done by hand."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
import xarray

from inference import comparison
from inference._data import Prepared
from inference.datatree import to_datatree
from inference.evaluation import ElboTerms, Estimate
from inference.fit import Fit

DATA = {"x": "float32[400, 3] sha256:0123"}
NUM_DATA = 400


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z[:, None], 1).expand(x.shape).to_event(1), obs=x)


def guide(x):
    w = numpyro.param("w", jnp.zeros(()))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(w * x.sum(1), 0.5))


def make_fit(*, seed=0, num_seeds=3, num_steps=50, seconds=10.0):
    rng = np.random.default_rng(seed)
    return Fit(
        model=model,
        guide=guide,
        preprocess=None,
        params={"w": np.zeros(num_seeds)},
        mutable={},
        elbo=rng.normal(-80, 1, (num_seeds, num_steps)).astype(np.float32),
        validation_elbo=rng.normal(-80, 1, (num_seeds, 2)).astype(np.float32),
        state=None,
        config={
            "seed": 0,
            "num_seeds": num_seeds,
            "num_epochs": None,
            "model": "models.own.Model(z=2)",
            "guide": "MeanField(model=Model(z=2))",
            "objective": "models.own.<locals>.bound",
        },
        info={
            "versions": {"numpyro": "0.0.1"},
            "seconds": {"compile": 99.0, "run": seconds, "total": 120.0},
            "num_steps": [num_steps] * num_seeds,
            "validation_steps": [num_steps // 2, num_steps],
        },
        batch={"x": jax.ShapeDtypeStruct((NUM_DATA, 3), np.dtype("float32"))},
    )


def make_numbers(*, seed=0, num_seeds=3, worse=0.0, data=DATA, pareto_k=None):
    """Pointwise numbers are a common part, noise of each seed's own, and ``-worse``."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).normal(-80, 10, NUM_DATA)
    values = common - worse + rng.normal(0, 0.5, (num_seeds, NUM_DATA))
    if pareto_k is not None:
        pareto_k = np.broadcast_to(np.asarray(pareto_k, float), values.shape).copy()
    elbo = Estimate("elbo", values - 1.0, 1, data)
    others = [dataclasses.replace(elbo, name=name) for name in ("reconstruction", "kl")]
    terms = ElboTerms(
        elbo, *others, kl_by_site={}, kl_of_globals={}, kl_per_dim={}, z_loc={}, z_loc_noise={}
    )
    return terms, Estimate("log_likelihood", values, 1000, data, pareto_k=pareto_k)


def make_tree(
    *, seed=0, num_seeds=3, settings=None, lacks=(), num_steps=50, seconds=10.0, **numbers
):
    """A run's tree. With ``settings`` a script has added its attributes."""
    fit = make_fit(seed=seed, num_seeds=num_seeds, num_steps=num_steps, seconds=seconds)
    terms, likelihood = make_numbers(seed=seed, num_seeds=num_seeds, **numbers)
    judged = {"elbo": terms, "log_likelihood": likelihood}
    tree = to_datatree(fit, *(j for name, j in judged.items() if name not in lacks))
    if settings is not None:
        tree.attrs |= {"experiment": "own", "settings": json.dumps(settings)}
    return tree


def pointwise(tree):
    return tree["evaluation"].log_likelihood.values.mean(0)


# --- numbers --------------------------------------------------------------------------------------


def test_the_error_of_a_difference_is_that_of_paired_data():
    trees = {"a": make_tree(seed=1, worse=0.4), "b": make_tree(seed=2), "c": make_tree(worse=0.2)}
    table = comparison.compare(trees)
    assert list(table.index) == ["b", "c", "a"]
    for run in ("a", "c"):
        differences = pointwise(trees[run]) - pointwise(trees["b"])
        assert table.difference[run] == pytest.approx(differences.mean())
        assert table.difference_se[run] == pytest.approx(differences.std() / NUM_DATA**0.5)
        assert table.difference_se[run] < 0.1 * table.log_likelihood_se[run]
    for run, tree in trees.items():
        values = pointwise(tree)
        assert table.log_likelihood[run] == pytest.approx(values.mean())
        assert table.log_likelihood_se[run] == pytest.approx(values.std() / NUM_DATA**0.5)
        assert table.elbo[run] == pytest.approx(values.mean() - 1)
        assert table.elbo_se[run] == pytest.approx(values.std() / NUM_DATA**0.5)
    assert (table.difference["b"], table.difference_se["b"]) == (0, 0)


def test_a_run_differs_from_itself_by_nothing():
    table = comparison.compare({"a": make_tree(), "again": make_tree()})
    assert table.difference.tolist() == table.difference_se.tolist() == [0, 0]


def test_without_a_log_likelihood_the_elbos_are_compared():
    trees = {
        "a": make_tree(seed=1, worse=0.4, lacks=["log_likelihood"]),
        "b": make_tree(seed=2),
    }
    table = comparison.compare(trees)
    differences = trees["a"]["evaluation"].elbo.values.mean(0) - pointwise(trees["b"]) + 1
    assert table.difference["a"] == pytest.approx(differences.mean())
    assert np.isnan(table.log_likelihood["a"])
    assert table.log_likelihood["b"] == pytest.approx(pointwise(trees["b"]).mean())


def test_a_log_predictive_density_is_compared_with_a_log_likelihood():
    """Both are log densities of a datum that was not trained on."""
    terms, likelihood = make_numbers(seed=1, worse=0.4)
    density = dataclasses.replace(likelihood, name="log_predictive_density")
    trees = {"a": to_datatree(make_fit(), terms, density), "b": make_tree(seed=2)}
    table = comparison.compare(trees)
    differences = density.pointwise.mean(0) - pointwise(trees["b"])
    assert table.difference["a"] == pytest.approx(differences.mean())
    assert table.difference_se["a"] == pytest.approx(differences.std() / NUM_DATA**0.5)
    assert table.log_predictive_density["a"] == pytest.approx(density.pointwise.mean())
    assert np.isnan(table.log_likelihood["a"])
    assert np.isnan(table.log_predictive_density["b"])
    assert comparison.what_differs(table) == "log predictive density"
    others = comparison.compare({"b": trees["b"], "c": make_tree()})
    assert comparison.what_differs(others) == "log-likelihood"
    assert (
        comparison.what_differs(
            table.drop(columns="difference").assign(log_predictive_density=np.nan)
        )
        == "ELBO"
    )


def test_without_an_elbo_the_log_likelihoods_are_compared():
    trees = {"a": make_tree(seed=1, worse=0.4, lacks=["elbo"]), "b": make_tree(seed=2)}
    table = comparison.compare(trees)
    assert np.isnan(table.elbo["a"])
    differences = pointwise(trees["a"]) - pointwise(trees["b"])
    assert table.difference["a"] == pytest.approx(differences.mean())


def test_a_run_without_numbers_is_refused():
    trees = {"a": make_tree(), "b": make_tree(lacks=["elbo", "log_likelihood"])}
    message = (
        r"^runs: expected an ELBO or a log-likelihood .* got neither in b; pass what elbo_terms "
        r"or log_likelihood returns: to_datatree\(fit, elbo_terms\(fit, data\)\)$"
    )
    with pytest.raises(ValueError, match=message):
        comparison.compare(trees)


def test_a_log_likelihood_that_is_not_finite_has_no_difference():
    broken = make_tree(seed=1)
    broken["evaluation"].log_likelihood.values[0, 5] = -np.inf
    table = comparison.compare({"a": broken, "b": make_tree(seed=2)})
    assert table.log_likelihood["a"] == -np.inf
    assert np.isnan(table.difference["a"])


def test_the_share_of_high_pareto_k():
    k = np.zeros(NUM_DATA)
    k[:7], k[7:9], k[9] = 0.8, np.nan, -np.inf  # 1 - 1 / log10(1000) = 0.67
    trees = {"a": make_tree(pareto_k=k), "b": make_tree(seed=2)}
    table = comparison.compare(trees)
    assert table.pareto_k_share["a"] == 9 / NUM_DATA
    assert np.isnan(table.pareto_k_share["b"])


def test_arviz_compares_the_trees_too():
    import arviz as az

    trees = {"a": make_tree(seed=1, worse=0.4, pareto_k=0.9), "b": make_tree(seed=2, pareto_k=0.1)}
    table = az.compare(
        {run: comparison.elpd(tree) for run, tree in trees.items()}, method="BB-pseudo-BMA"
    )
    assert table.index.tolist() == ["b", "a"]
    assert table.diag_elpd["a"] == "400 k̂ > 0.67"
    assert table.diag_elpd["b"] == ""


# --- which runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": "float32[400, 3] sha256:abcd"}, r"others in a and b: array x is .*0123, and .*abcd"),
        ({"x": "float32[10, 3] sha256:0123"}, r"array x is .*\[400, 3\].*, and .*\[10, 3\]"),
        ({"y": "float32[400, 3] sha256:0123"}, r"arrays are \['x'\], and \['y'\]"),
    ],
)
def test_runs_on_other_data_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        comparison.compare({"a": make_tree(), "b": make_tree(data=other)})


def test_a_condition_more_is_no_other_data():
    comparison.check_same_data(
        {"a": make_tree(), "b": make_tree(data=DATA | {"c": "int32[400] sha256:77"})}
    )


def test_every_pair_of_runs_knows_the_same_arrays():
    trees = {
        "without c": make_tree(),
        "c": make_tree(data=DATA | {"c": "int32[400] sha256:77"}),
        "other c": make_tree(data=DATA | {"c": "int32[400] sha256:88"}),
    }
    with pytest.raises(ValueError, match=r"others in c and other c: array c is .*77, and .*88;"):
        comparison.compare(trees)


def test_a_run_that_does_not_say_what_its_data_were_is_refused():
    old = make_tree()
    del old["evaluation"].attrs["data"]
    with pytest.raises(ValueError, match=r"hashes of the judged data .* got none in b; make its"):
        comparison.compare({"a": make_tree(), "b": old})


def test_one_run_is_no_comparison():
    with pytest.raises(ValueError, match="runs: expected at least two, got 1"):
        comparison.compare({"a": make_tree()})


# --- fits, trees and what has a tree --------------------------------------------------------------


@pytest.fixture
def judges(monkeypatch):
    """Judges that know two fits, and write down the data that they were given."""
    fits = {"a": make_fit(seed=1), "b": make_fit(seed=2)}
    numbers = [(fits["a"], make_numbers(seed=1, worse=0.4)), (fits["b"], make_numbers(seed=2))]
    seen = []

    def judge(part):
        def judged(fit, data):
            seen.append(data)
            return next(n[part] for known, n in numbers if known is fit)

        return judged

    monkeypatch.setattr(comparison, "elbo_terms", judge(0))
    monkeypatch.setattr(comparison, "log_likelihood", judge(1))
    return SimpleNamespace(fits=fits, seen=seen)


def test_fits_are_judged_on_the_data(judges):
    data = {"x": np.zeros((NUM_DATA, 3))}
    table = comparison.compare(judges.fits, data)
    assert len(judges.seen) == 4
    assert all(seen["x"] is data["x"] for seen in judges.seen)
    trees = {"a": make_tree(seed=1, worse=0.4), "b": make_tree(seed=2)}
    assert table.equals(comparison.compare(trees))
    assert table.loc["a", ["model", "guide", "objective"]].tolist() == ["Model", "MeanField", "own"]


def test_fits_trees_and_loaded_runs_mix(judges):
    runs = {
        "fit": judges.fits["a"],
        "tree": make_tree(seed=2),
        "run": SimpleNamespace(tree=make_tree(seed=3), fit=judges.fits["b"]),
    }
    table = comparison.compare(runs, {"x": np.zeros((NUM_DATA, 3))})
    assert sorted(table.index) == ["fit", "run", "tree"]
    assert len(judges.seen) == 2
    likelihood = make_numbers(seed=1, worse=0.4)[1].pointwise
    assert table.log_likelihood["fit"] == pytest.approx(likelihood.mean())


@pytest.mark.parametrize("prepared", [False, True])
def test_a_fit_takes_the_arrays_that_it_knows(judges, prepared):
    data = {"x": np.zeros((NUM_DATA, 3)), "c": np.zeros(NUM_DATA)}
    comparison.compare(judges.fits, Prepared(data, {"a": "b"}) if prepared else data)
    for seen in judges.seen:
        assert seen.keys() == {"x"}
        assert isinstance(seen, Prepared) == prepared
        assert not prepared or seen.source == {"a": "b"}


def test_known_parameters_are_judged_as_the_formula_says():
    x = np.random.default_rng(3).normal(0, 1.5, (50, 3)).astype(np.float32)
    params = {"exact": {"w": np.float32(0.25)}, "off": {"w": np.float32(0.5)}}
    fits = {n: Fit.from_params(model, guide, p, example={"x": x}) for n, p in params.items()}
    table = comparison.compare(fits, {"x": x})
    log_p = scipy.stats.multivariate_normal(np.zeros(3), np.eye(3) + 1).logpdf(x)
    assert table.log_likelihood["exact"] == pytest.approx(log_p.mean(), abs=1e-5)
    assert table.pareto_k_share["exact"] == 0
    for name in fits:
        loc = params[name]["w"] * x.sum(1)
        gap = (loc - x.sum(1) / 4) ** 2 / (2 * 0.25)  # KL to the posterior N(sum x / 4, 1 / 4)
        # The reconstruction is quadratic in one draw z = loc + e / 2 per datum.
        variance = (x.sum(1) - 3 * loc) ** 2 / 4 + 2 * (3 / 8) ** 2
        error = float(np.sqrt(variance.sum()) / len(x))
        assert table.elbo[name] == pytest.approx((log_p - gap).mean(), abs=4 * error)


def test_fits_with_global_sites_are_judged_by_their_predictive_density():
    """Of a Normal with a known q of its mean the density is a formula."""

    def model(x):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(mean, 1), obs=x)

    def guide(x):
        numpyro.sample("mean", dist.Normal(numpyro.param("loc", 0.0), 0.1))

    x = np.random.default_rng(0).normal(1, 1, 50).astype(np.float32)
    fits = {
        name: Fit.from_params(model, guide, {"loc": np.float32(loc)}, example={"x": x})
        for name, loc in {"near": 1.0, "far": 2.0}.items()
    }
    table = comparison.compare(fits, {"x": x})
    assert list(table.index) == ["near", "far"]
    assert table.log_likelihood.isna().all()
    for name, loc in {"near": 1.0, "far": 2.0}.items():
        exact = scipy.stats.norm(loc, np.sqrt(1.01)).logpdf(x).mean()
        # The mean of x under a draw m differs by 0.1 |x - m| a draw, of 1,000 draws.
        error = 0.1 * (np.abs(x - loc).mean() + 0.1) / np.sqrt(1000)
        assert table.log_predictive_density[name] == pytest.approx(exact, abs=4 * error)


def test_a_site_that_is_summed_over():
    """A mixture of two: the ELBO and the log-likelihood are exact."""

    def model(x):
        with numpyro.plate("data", len(x)):
            k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(2.0 * k, 1), obs=x)

    def guide(x):
        pass

    x = np.random.default_rng(3).normal(1, 1.4, 20).astype(np.float32)
    fits = {n: Fit.from_params(model, guide, {}, example={"x": x}) for n in "ab"}
    table = comparison.compare(fits, {"x": x})
    densities = scipy.stats.norm.pdf(x[:, None], [0, 2], 1).mean(1)
    assert table.elbo["a"] == pytest.approx(np.log(densities).mean(), abs=1e-5)
    assert table.log_likelihood["a"] == pytest.approx(np.log(densities).mean(), abs=1e-5)


def test_fits_are_refused_without_data(judges):
    message = "^data: expected arrays to judge the fits a, b on, got None; give the held-out data$"
    with pytest.raises(ValueError, match=message):
        comparison.compare(judges.fits)


def test_data_are_refused_without_fits():
    trees = {"a": make_tree(), "b": make_tree()}
    with pytest.raises(ValueError, match=r"^data: expected None for runs that are judged already"):
        comparison.compare(trees, {"x": np.zeros(2)})


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([make_fit(), make_fit()], "runs: expected a mapping from name to run, got list; give"),
        ({"a": make_tree(), "b": 1.0}, "a Fit, a DataTree or .* as 'b', got float; give what fit"),
    ],
)
def test_what_is_no_run_is_refused(runs, message):
    with pytest.raises(TypeError, match=message):
        comparison.compare(runs)


def test_a_fit_that_was_not_trained_has_no_seconds(monkeypatch):
    fit = make_fit(num_seeds=1, num_steps=0)
    fit.config["objective"] = None
    del fit.info["seconds"]
    truth = dataclasses.replace(fit, validation_elbo=None)
    numbers = make_numbers(num_seeds=1)
    monkeypatch.setattr(comparison, "elbo_terms", lambda fit, data: numbers[0])
    monkeypatch.setattr(comparison, "log_likelihood", lambda fit, data: numbers[1])
    runs = {"truth": truth, "tree": make_tree()}
    table = comparison.compare(runs, {"x": np.zeros((NUM_DATA, 3))})
    assert np.isnan(table.seconds["truth"])
    assert table.objective["truth"] == ""
    with pytest.raises(ValueError, match=r"expected a training trace .* got none in truth; leave"):
        comparison.plot_elbo(runs)


# --- settings -------------------------------------------------------------------------------------


def test_settings_that_differ():
    a = {"hidden": [5, 5], "rate": 0.1, "preset": None, "seed": 0}
    b = {"hidden": [5, 6], "rate": 0.1, "preset": None, "seed": 0, "guide": "flow"}
    trees = {"a": make_tree(settings=a), "b": make_tree(settings=b), "c": make_tree(settings=a)}
    assert comparison.differing_settings(trees) == {
        "hidden": {"a": [5, 5], "b": [5, 6], "c": [5, 5]},
        "guide": {"b": "flow"},
    }
    assert comparison.differing_settings({"a": trees["a"], "c": trees["c"]}) == {}


def test_settings_without_a_script_are_those_of_fit(tmp_path):
    a, b = make_fit(), make_fit(num_seeds=1)
    b.config.update(num_epochs=[3], average=0.5)
    tree = to_datatree(b)
    tree.to_netcdf(tmp_path / "trace.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "trace.nc", engine="h5netcdf") as opened:
        tree = opened.load()
    assert comparison.differing_settings({"a": a, "b": tree}) == {
        "num_seeds": {"a": 3, "b": 1},
        "num_epochs": {"a": None, "b": [3]},
        "average": {"b": 0.5},
    }


def test_names_are_the_settings_or_else_the_classes():
    named = {"preset": "burda", "guide": "full-covariance", "objective": "Trace_ELBO"}
    table = comparison.compare({"a": make_tree(settings=named), "b": make_tree(seed=1)})
    columns = ["model", "guide", "objective"]
    assert table.loc["a", columns].tolist() == ["own burda", "full-covariance", "Trace_ELBO"]
    assert table.loc["b", columns].tolist() == ["Model", "MeanField", "own"]


# --- pictures -------------------------------------------------------------------------------------


def axes_of(plot):
    return [plot.viz["plot"].sel(axis=axis).item() for axis in ("step", "seconds")]


def test_the_traces_have_labels_units_and_a_legend():
    plot = comparison.plot_elbo({"first": make_tree(), "second": make_tree(seed=1, num_seeds=1)})
    steps, seconds = axes_of(plot)
    assert steps.get_xlabel() == "training (steps)"
    assert seconds.get_xlabel() == "training without compilation (seconds)"
    assert steps.get_ylabel() == "ELBO (nats per datum)"
    runs, kinds = plot.viz["figure"].item().legends
    assert [text.get_text() for text in runs.get_texts()] == ["first", "second"]
    assert runs.get_title().get_text() == "run (band: least to greatest seed)"
    assert [text.get_text() for text in kinds.get_texts()] == [
        "training (mean of each of up to 100 windows)",
        "held out",
    ]


def test_fits_have_traces_too():
    steps, _ = axes_of(comparison.plot_elbo({"fit": make_fit(), "tree": make_tree(seed=1)}))
    np.testing.assert_allclose(steps.lines[0].get_ydata()[:50], make_fit().elbo.mean(0), rtol=1e-6)


def test_a_line_is_the_mean_over_seeds_and_its_band_goes_from_the_least_to_the_greatest():
    tree = make_tree(num_steps=50)
    axes = axes_of(comparison.plot_elbo({"a": tree, "b": make_tree(seed=1)}))
    elbo = tree.sample_stats.elbo.values
    for ax, unit in zip(axes, (1.0, 10.0 / 50), strict=True):
        line, held_out = ax.lines[:2]
        x, y = line.get_data()
        shown = np.isfinite(y)
        np.testing.assert_allclose(x[shown], np.arange(1, 51) * unit)
        np.testing.assert_allclose(y[shown], elbo.mean(0), rtol=1e-6)
        np.testing.assert_allclose(held_out.get_xdata()[:2], np.array([25, 50]) * unit)
        band = ax.collections[0].get_paths()[0].vertices
        for i in (3, 17):
            edges = band[np.isclose(band[:, 0], (i + 1) * unit), 1]
            np.testing.assert_allclose([edges.min(), edges.max()], np.sort(elbo[:, i])[[0, -1]])
        colours = {matplotlib.colors.to_hex(own.get_color()) for own in (line, held_out)}
        assert len(colours) == 1


def test_long_traces_are_averaged_in_windows():
    tree = make_tree(num_steps=250, num_seeds=1)
    (ax, _) = axes_of(comparison.plot_elbo({"a": tree, "b": make_tree(seed=1, num_seeds=1)}))
    x, y = ax.lines[0].get_data()
    windows = tree.sample_stats.elbo.values[0, 1:].reshape(83, 3)  # the last 249 steps
    np.testing.assert_allclose(y[:83], windows.mean(1), rtol=1e-6)
    np.testing.assert_allclose(x[:83], np.arange(83) * 3 + 3)


def test_a_seed_that_stopped_and_a_step_that_was_skipped_leave_gaps():
    tree = make_tree(num_steps=20)
    tree.sample_stats.elbo.values[0, 10:] = np.nan
    tree.sample_stats.elbo.values[:, 5] = np.nan
    (ax, _) = axes_of(comparison.plot_elbo({"a": tree, "b": make_tree(seed=1)}))
    y = ax.lines[0].get_ydata()
    assert np.isnan(y[5])
    assert y[15] == pytest.approx(tree.sample_stats.elbo.values[1:, 15].mean())


def test_arviz_draws_the_differences():
    trees = {"a": make_tree(seed=1, worse=0.4), "b": make_tree(seed=2)}
    table = comparison.compare(trees)
    ax = comparison.plot_differences(table).viz["plot"].item()
    assert ax.get_xlabel() == "log-likelihood: difference to the best run (nats per datum)"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    low, high = ax.lines[1].get_xdata()
    assert (low + high) / 2 == pytest.approx(table.difference["a"])
    assert high - low == pytest.approx(2 * table.difference_se["a"])
