"""q(y | x) and p(y | x) of labels that the data tell in part."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from scipy import special, stats

from inference import Fit, LabelProbabilities, plot_reliability, predict
from models.labels import partly_observed, told, told_of

LOC, PROBS = np.array([-2.0, 0.0, 2.5]), np.array([0.2, 0.5, 0.3])
X = np.linspace(-3, 4, 6).astype(np.float32)
Y = np.array([0, 1, -1, 2, 1, 2], np.int32)


def model(x, y):
    with numpyro.plate("data", len(x)):
        label = partly_observed("y", dist.Categorical(jnp.asarray(PROBS)), y)
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(jnp.asarray(LOC)[label] + 0.7 * z, 0.5), obs=x)


def guide(x, y):
    slope = numpyro.param("slope", 0.8)
    with numpyro.plate("data", len(x)):
        fn = dist.Categorical(logits=slope * x[:, None] * jnp.arange(3))
        infer = {"enumerate": "parallel"} | told_of(fn, y)
        label = numpyro.sample("y", told(fn, y), infer=infer)
        loc = 0.7 * (x - jnp.asarray(LOC)[label]) / 0.74
        numpyro.sample("z", dist.Normal(loc, 0.7))  # wider than the posterior, whose scale is 0.58


@pytest.fixture(scope="module")
def result():
    data = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
    return Fit.from_params(model, guide, {"slope": 0.8}, example=data)


def test_both_are_what_they_say(result):
    """The model's against Bayes' rule, within the errors of independent repetitions."""
    repeated = [
        predict(result, {"x": X, "y": Y}, key=random.key(i), num_samples=200) for i in range(12)
    ]
    q = special.softmax(0.8 * X[:, None] * np.arange(3), axis=1)
    np.testing.assert_allclose(repeated[0].by_guide.probs[0], q, rtol=1e-4)
    exact = PROBS * stats.norm.pdf(X[:, None], LOC, np.sqrt(0.49 + 0.25))
    exact /= exact.sum(1, keepdims=True)
    probs = np.stack([found.by_model.probs[0] for found in repeated])
    error = probs.std(0, ddof=1) / np.sqrt(len(probs))
    # the ratio of two estimates is biased by about its variance
    assert (abs(probs.mean(0) - exact) < 4 * error + 2 * probs.var(0) + 1e-5).all()
    assert probs.std(0).max() > 0
    assert repeated[0].by_model.name == "p(y | x)"
    assert repeated[0].by_guide.name == "q(y | x)"


def test_known_labels_are_hidden(result):
    """The probabilities do not change with the labels."""
    found = [predict(result, {"x": X, "y": y}) for y in (Y, np.full_like(Y, 2))]
    np.testing.assert_array_equal(found[0].by_guide.probs, found[1].by_guide.probs)
    np.testing.assert_array_equal(found[0].by_model.probs, found[1].by_model.probs)
    right = found[0].by_model.most_probable[0] == Y
    np.testing.assert_allclose(found[0].by_model.accuracy.estimate, right[Y >= 0].mean())


def probabilities(probs, labels, name="q(y | x)"):
    return LabelProbabilities(name, np.array([probs]), np.array(labels), 1, {})


def test_scores_are_those_of_their_definitions():
    probs = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]]
    found = probabilities(probs, [0, 1, 1, -1])
    np.testing.assert_allclose(found.accuracy.estimate, 2 / 3)
    brier = [2 * 0.1**2, 2 * 0.6**2, 2 * 0.3**2]
    np.testing.assert_allclose(found.brier.pointwise[0], brier)
    bins = found.reliability(4)
    np.testing.assert_allclose(bins["share"], [[0, 0, 2 / 3, 1 / 3]])
    np.testing.assert_allclose(bins["accuracy"], [[np.nan, np.nan, 0.5, 1.0]])
    np.testing.assert_allclose(bins["confidence"], [[np.nan, np.nan, 0.65, 0.9]])
    np.testing.assert_allclose(bins["standard_error"][0, 2:], [0.5 / 2**0.5, 0])
    assert found.most_probable.tolist() == [[0, 0, 1, 0]]


def test_probabilities_that_are_as_often_right_as_they_say_lie_on_the_line():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    right = rng.random(len(p)) < p
    found = probabilities(np.stack([p, 1 - p], axis=1), np.where(right, 0, 1))
    bins = {name: values[0, 5:] for name, values in found.reliability(10).items()}
    assert (abs(bins["accuracy"] - bins["confidence"]) < 4 * bins["standard_error"]).all()
    expected = 2 * p * (1 - p)
    error = found.brier.pointwise.std() / np.sqrt(len(p))
    assert abs(found.brier.estimate[0] - expected.mean()) < 4 * error


def test_the_better_one_has_the_lower_score(result):
    rng = np.random.default_rng(0)  # the data are the model's own
    y = rng.choice(3, 400, p=PROBS).astype(np.int32)
    x = LOC[y] + rng.normal(size=400) * np.sqrt(0.49 + 0.25)
    found = predict(result, {"x": x.astype(np.float32), "y": y})
    gap = found.by_guide.brier.estimate[0] - found.by_model.brier.estimate[0]
    assert gap > 0
    assert found.better == "p(y | x)"
    axes = plot_reliability(found).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("q(y | x): accuracy" in label for label in labels)
    assert "share" in axes.get_ylabel()
    assert "probability" in axes.get_xlabel()


def test_what_cannot_be_predicted_is_one_line(result):
    def plain(x, y):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x + 0 * y)

    def drawn(x, y):
        with numpyro.plate("data", len(x)):
            fn = dist.Categorical(logits=x[:, None] * jnp.arange(3))
            numpyro.sample("y", told(fn, y))
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    data = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
    nothing = Fit.from_params(plain, lambda x, y: None, {}, example=data)
    unmarked = Fit.from_params(model, drawn, {}, example=data)
    for fit, given, message in (
        (nothing, data, "expected one latent site whose values the data tell in part, got none"),
        (unmarked, data, "expected a guide that draws 'y' and marks it"),
        (result, {"x": X}, "expected a mapping of arrays with the labels 'y'"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            predict(fit, given)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="expected known labels to judge"):
        _ = predict(result, {"x": X, "y": np.full_like(Y, -1)}).by_guide.accuracy
