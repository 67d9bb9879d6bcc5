"""Runs set side by side, against arithmetic done by hand."""

import json
from types import SimpleNamespace

import matplotlib.colors
import numpy as np
import pytest

from inference import comparison, to_datatree

DATA = {"x": "float32[400, 3] sha256:0123"}
NUM_DATA = 400


def make_tree(
    *,
    seed=0,
    num_seeds=3,
    num_steps=50,
    seconds=10.0,
    worse=0.0,
    data=DATA,
    settings=None,
    pareto_k=None,
    lacks=(),
):
    """A run's tree; its pointwise numbers are a common part, noise of its own and ``-worse``."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).normal(-80, 10, NUM_DATA)
    likelihood = common - worse + rng.normal(0, 0.5, (num_seeds, NUM_DATA))
    fit = SimpleNamespace(
        params={"w": np.zeros(num_seeds)},
        elbo=rng.normal(-80, 1, (num_seeds, num_steps)).astype(np.float32),
        validation_elbo=rng.normal(-80, 1, (num_seeds, 2)).astype(np.float32),
        config={
            "seed": 0,
            "guide": "MeanField(model=Model(z=2))",
            "objective": "models.own.<locals>.bound",
        },
        info={
            "versions": {"numpyro": "0.0.1"},
            "seconds": {"compile": 99.0, "run": seconds, "total": 120.0},
            "num_steps": [num_steps] * num_seeds,
            "validation_steps": [num_steps // 2, num_steps],
        },
    )
    evaluation = {"elbo": likelihood - 1.0}
    if pareto_k is not None:
        evaluation["pareto_k"] = np.broadcast_to(pareto_k, (num_seeds, NUM_DATA))
    tree = to_datatree(
        fit,
        log_likelihood=None if "log_likelihood" in lacks else {"x": likelihood[:, None]},
        evaluation=None if "evaluation" in lacks else evaluation,
        dims={"x": ["datum"]},
    )
    tree.attrs |= {
        "experiment": "own",
        "dataset": "digits",
        "data": json.dumps(data),
        "settings": json.dumps(settings or {}),
        "num_samples": 1000,
    }
    return tree


def pointwise(tree):
    return tree.log_likelihood.x.values.mean((0, 1))


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
    differences = trees["a"].evaluation.elbo.values.mean(0) - pointwise(trees["b"]) + 1
    assert table.difference["a"] == pytest.approx(differences.mean())
    assert np.isnan(table.log_likelihood["a"])
    assert table.log_likelihood["b"] == pytest.approx(pointwise(trees["b"]).mean())


def test_what_a_run_lacks_is_missing_and_nothing_else():
    trees = {"a": make_tree(lacks=["log_likelihood", "evaluation"]), "b": make_tree(seed=2)}
    table = comparison.compare(trees)
    assert table.loc["a", ["elbo", "log_likelihood", "difference"]].isna().all()
    assert table.loc["b", ["elbo", "log_likelihood"]].notna().all()
    assert table.seconds.tolist() == [10.0, 10.0]


def test_a_log_likelihood_that_is_not_finite_has_no_difference():
    broken = make_tree(seed=1)
    broken.log_likelihood.x.values[0, 0, 5] = -np.inf
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


def test_runs_on_another_data_set_are_refused():
    other = make_tree()
    other.attrs["dataset"] = "mnist"
    with pytest.raises(ValueError, match="a and b: data set is digits, and mnist; compare runs on"):
        comparison.compare({"a": make_tree(), "b": other})


def test_a_condition_more_is_no_other_data():
    comparison.check_same_data(
        {"a": make_tree(), "b": make_tree(data=DATA | {"c": "int32[400] sha256:77"})}
    )


@pytest.mark.parametrize("attribute", ["data", "dataset"])
def test_a_run_that_does_not_say_what_its_data_were_is_refused(attribute):
    old = make_tree()
    del old.attrs[attribute]
    with pytest.raises(ValueError, match=f"'{attribute}' in every run's trace.nc, and b has none"):
        comparison.compare({"a": make_tree(), "b": old})


def test_one_run_is_no_comparison():
    with pytest.raises(ValueError, match="runs: expected at least two, got 1"):
        comparison.compare({"a": make_tree()})


def test_settings_that_differ():
    a = {"hidden": [5, 5], "rate": 0.1, "preset": None, "seed": 0}
    b = {"hidden": [5, 6], "rate": 0.1, "preset": None, "seed": 0, "guide": "flow"}
    trees = {"a": make_tree(settings=a), "b": make_tree(settings=b), "c": make_tree(settings=a)}
    assert comparison.differing_settings(trees) == {
        "hidden": {"a": [5, 5], "b": [5, 6], "c": [5, 5]},
        "guide": {"b": "flow"},
    }
    assert comparison.differing_settings({"a": trees["a"], "c": trees["c"]}) == {}


def test_names_are_the_settings_or_else_the_classes():
    named = {"preset": "burda", "guide": "full-covariance", "objective": "Trace_ELBO"}
    table = comparison.compare({"a": make_tree(settings=named), "b": make_tree(seed=1)})
    columns = ["model", "guide", "objective"]
    assert table.loc["a", columns].tolist() == ["own burda", "full-covariance", "Trace_ELBO"]
    assert table.loc["b", columns].tolist() == ["own", "MeanField", "own"]


# --- pictures -------------------------------------------------------------------------------------


def axes_of(plot):
    return [plot.viz["plot"].sel(axis=axis).item() for axis in ("step", "seconds")]


def test_the_traces_have_labels_units_and_a_legend():
    plot = comparison.plot_elbo({"first": make_tree(), "second": make_tree(seed=1, num_seeds=1)})
    steps, seconds = axes_of(plot)
    assert steps.get_xlabel() == "step"
    assert seconds.get_xlabel() == "training time, s, compilation apart"
    assert steps.get_ylabel() == "ELBO (nats per datum)"
    runs, kinds = plot.viz["figure"].item().legends
    assert [text.get_text() for text in runs.get_texts()] == ["first", "second"]
    assert runs.get_title().get_text() == "run (band: least to greatest seed)"
    assert [text.get_text() for text in kinds.get_texts()] == [
        "training (mean of each of up to 100 windows)",
        "held out",
    ]


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
