"""Networks in bfloat16 reach the ELBO of float32, on scikit-learn's digits.

A number in bfloat16 has 8 bits, so each rounding is off by at most a share ``UNIT`` = 2^-8 of it.
Errors of single data are of that size. In the mean over data and seeds they cancel.
"""

from dataclasses import replace

import numpy as np
import optax
import pytest

from experiments import datasets
from inference import Fit, decode, encode, fit, pointwise_elbo
from models import guides, vae

UNIT = 2.0**-8
SEEDS = 6


@pytest.fixture(scope="module")
def digits():
    """Training and test images."""
    data = datasets.load("digits", progress=False)
    return {"x": data.train["x"]}, {"x": data.test["x"]}


def train(digits, dtype: str) -> Fit:
    """A VAE, several seeds. The order of data and the draws depend on the seed alone."""
    model = vae.Model(x_shape=(8, 8), num_latents=8, hidden=(64,), dtype=dtype)
    return fit(
        model,
        guides.mean_field(model),
        digits[0],
        num_steps=300,
        batch_size=100,
        num_seeds=SEEDS,
        optimizer=optax.adam(3e-3),
        preprocess=model.prepare,
        progress=False,
    )


@pytest.fixture(scope="module")
def fine(digits):
    return train(digits, "float32")


def elbo(result: Fit, digits) -> np.ndarray:
    """The ELBO of each test image, (seed, datum), by the same draws for every fit."""
    return pointwise_elbo(result, result.prepare(digits[1]), num_samples=5).pointwise


@pytest.mark.slow
def test_given_parameters_have_the_elbo_of_float32(fine, digits):
    """Each logit l is off by about a share UNIT of it, and log p(x | l) by (x - sigmoid(l)) times
    that. Errors of pixels are independent, so the square of a datum's error is the sum of theirs.

    In the mean they cancel, up to the standard error over seeds and a second-order term: the
    curvature sigmoid(l) (1 - sigmoid(l)) is the mean of (x - sigmoid(l))^2. So rounding costs half
    the mean square.
    """
    model = replace(fine.model, dtype="bfloat16")
    coarse = replace(fine, model=model, guide=guides.mean_field(model))
    error = elbo(coarse, digits) - elbo(fine, digits)

    test = fine.prepare(digits[1])
    x, x_mean = np.asarray(test["x"]), decode(fine, encode(fine, test))["x"]
    logits = np.log(x_mean / (1 - x_mean))
    predicted = UNIT * np.sqrt(np.sum(((x - x_mean) * logits) ** 2, axis=(-2, -1)).mean())
    mean_square = np.mean(error**2)
    assert predicted / 5 < np.sqrt(mean_square) < 5 * predicted  # a handful of roundings each

    by_seed = error.mean(1)
    standard_error = by_seed.std(ddof=1) / SEEDS**0.5
    assert abs(by_seed.mean() + mean_square / 2) < 4 * standard_error
    assert 4 * standard_error < predicted  # the mean is known better than a datum


@pytest.mark.slow
def test_a_training_reaches_the_elbo_of_float32(fine, digits):
    """Rounding makes another path of each seed, so seeds differ by more than rounding. Both runs of
    a seed have the same data and draws, so their differences count."""
    reached = [elbo(result, digits).mean(1) for result in (fine, train(digits, "bfloat16"))]
    difference = reached[1] - reached[0]
    standard_error = difference.std(ddof=1) / SEEDS**0.5
    assert 0 < abs(difference.mean()) < 4 * standard_error
    assert 4 * standard_error < reached[0].std(ddof=1)  # below what one seed differs from another
