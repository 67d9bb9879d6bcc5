"""The script that learns to classify from a few labels, on scikit-learn's digits."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from experiments import mnist_semi as script
from experiments import runs
from inference import LabelTerm

SMALL = script.Config(
    dataset="digits",
    num_train=200,
    num_test=40,
    num_labels=(20,),
    num_draws=2,
    num_epochs=1,
    hidden=(8,),
    num_latents=2,
    num_samples=5,
    num_label_samples=2,
    progress=False,
)


@pytest.fixture(scope="module")
def digits():
    return script.data(SMALL)


def test_labels_are_balanced_and_each_draw_has_others(digits):
    for count in (20, 27):
        known = [script.labelled(digits, count, draw) for draw in range(3)]
        for rows in known:
            assert len(set(rows)) == count
            per_label = np.bincount(digits.train["c"][rows])
            assert per_label.min() >= count // 10
            assert per_label.max() <= -(-count // 10)
        assert len({tuple(rows) for rows in known}) == 3
    np.testing.assert_array_equal(known[0], script.labelled(digits, 27, 0))


def test_a_fit_sees_the_labels_that_it_may(digits):
    """M2 sees every image, and of the labelled ones the label, several times in an epoch."""
    known = script.labelled(digits, 20, 1)
    times = script.times_shown(digits, 20)
    assert times == round(0.1 * 180 / (0.9 * 20)) == 1
    seen = script.arrays(replace(digits, label_share=0.5), "term-20-1")
    assert script.times_shown(replace(digits, label_share=0.5), 20) == 9
    assert np.mean(seen["y"] >= 0) == 0.5
    counts = {}
    for x, y in zip(seen["x"], seen["y"], strict=True):
        counts.setdefault(x.tobytes(), set()).add(int(y))
    images = [x.tobytes() for x in digits.train["x"]]
    assert counts.keys() == set(images)
    labels = {images[row]: {int(digits.train["c"][row])} for row in known}
    assert {name: found for name, found in counts.items() if found != {-1}} == labels
    alone = script.arrays(digits, "classifier-20-1")
    np.testing.assert_array_equal(alone["y"], digits.train["c"][known])
    assert script.arrays(digits, "m1").keys() == {"x"}


def test_the_term_weighs_the_labelled_images_together(digits):
    """Whatever their number and how often they are shown."""
    for share in (0.0, 0.5):
        config = replace(SMALL, label_share=share, label_weight=3.0)
        data = replace(digits, label_share=share)
        objective = script.training(config, data, "term-20-0", {})["objective"]
        assert isinstance(objective, LabelTerm)
        labels = script.arrays(data, "term-20-0")["y"]
        np.testing.assert_allclose(objective.label_weight * np.mean(labels >= 0), 3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": (5,)}, "num_labels: expected from 10, one of each label, .* got 5"),
        ({"num_labels": (400,)}, "num_labels: expected .* got 400, which asks for 40 of label"),
        ({"num_labels": (20, 20)}, "num_labels: expected some, each once"),
        ({"rows": ("m3",)}, "rows: expected some of classifier, .* got 'm3'"),
        ({"guide": "flow"}, "guide: expected one of m2, structured, got 'flow'"),
        ({"label_share": 1.0}, "label_share: expected a fraction below 1, got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        script.data(replace(SMALL, **settings))


def test_full_length_is_what_it_says():
    full = replace(SMALL, full=True)
    assert (full.num_epochs, full.draws("plain"), full.draws("term")) == (200, 5, 5)
    assert script.epochs(script.Config(), 50_000) == 5
    assert script.epochs(script.Config(), 1000) == 200


@pytest.mark.slow
def test_a_run_has_a_row_for_each_way_and_opens_again(tmp_path, capsys):
    out = tmp_path / "semi"
    config = replace(SMALL, out=out, num_labels=(20, 40))
    result = script.main(config)
    printed = capsys.readouterr().out
    assert result["table"].keys() == {f"{row}-{n}" for row in script.ROWS for n in (20, 40)}
    for name, of_row in result["table"].items():
        row = name.split("-")[0]
        assert len(of_row["error"]["per_draw"]) == config.draws(row)
        assert 0 <= of_row["error"]["estimate"] <= 1
        assert ("log_p_x" in of_row) == (row in script.OF_M2)
        if row in script.OF_M2:
            told = of_row["log_p_x_given_y"]["estimate"] - of_row["log_p_x"]["estimate"]
            np.testing.assert_allclose(told, of_row["information"]["estimate"], atol=1e-4)
    assert json.loads((out / "result.json").read_text())["table"].keys() == result["table"].keys()
    for words in script.WORDS.values():
        assert len(re.findall(re.escape(words), printed)) == 2
    pictures = {path.stem for path in out.glob("*.png")}
    assert pictures == {"analogies", "elbo", "error", "reliability", "samples"}
    run = runs.load(out)
    assert run.fit.guide == script.semi_supervised.Guide(run.fit.model)
    assert "y" in run.tree.posterior
    assert script.main(config)["table"] == result["table"]  # read, and not trained again


@pytest.mark.slow
def test_labels_help(tmp_path):
    """On digits, with 100 labels: beyond the noise of the test images."""
    config = script.Config(
        dataset="digits", num_labels=(100,), num_draws=1, rows=("term",), hidden=(100,),
        num_latents=10, num_samples=10, progress=False, out=tmp_path / "semi",
    )  # fmt: skip
    table = script.main(config)["table"]
    noise = 4 * (0.25 / 300) ** 0.5
    assert table["term-100"]["error"]["estimate"] < 0.9 - noise  # guessing
    assert table["term-100"]["information"]["estimate"] > 0.5
