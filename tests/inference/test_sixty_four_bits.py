"""Runs in 64 bits. JAX fixes the width when it starts, so they have a process of their own."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # whole runs

SCRIPT = """
import json, sys, traceback
import jax, numpy as np, optax
from inference import fit, log_likelihood, sample_posterior_predictive
from models import gaussian_mean, guides, linear_gaussian

truth = gaussian_mean.Truth()
data = {name: array.astype(np.float64) for name, array in truth.simulate(400, seed=0).items()}
programs = gaussian_mean.Model(), gaussian_mean.Guide()


def toy(batch_size, num_steps):
    schedule = optax.cosine_decay_schedule(0.05, num_steps)
    settings = {"batch_size": batch_size, "num_steps": num_steps, "optimizer": optax.adam(schedule)}
    return fit(*programs, data, average=0.3, num_seeds=2, progress=False, **settings)


def exact(result):
    params = [result.params_of(i) for i in range(2)]
    return [gaussian_mean.log_likelihood(p, truth.sigma_0, data["c"], data["x"]) for p in params]


def trained():
    greatest = gaussian_mean.maximum_likelihood(data, truth.sigma_0)[1]
    return {
        "gaps": [greatest - float(log_p.mean()) for r in results for log_p in exact(r)],
        "types": sorted({str(p.dtype) for r in results for p in r.params.values()}),
        "converted": results[0].info["converted"],
    }


def judged():
    judged = log_likelihood(results[1], data, num_samples=100)
    drawn = sample_posterior_predictive(results[1], data, 2)["x"]
    error = judged.estimate[0] - np.mean(exact(results[1]))
    return {"errors": abs(error) / (judged.monte_carlo_error[0] + 1e-6), "type": str(drawn.dtype)}


def resumed():
    settings = {"batch_size": 100, "progress": False}
    whole = fit(*programs, data, num_steps=60, num_seeds=2, **settings)
    for num_steps in (25, 60):
        longer = fit(
            *programs, data, num_steps=num_steps, num_seeds=2, checkpoint=sys.argv[1], **settings
        )
    first = fit(*programs, data, num_steps=20, num_seeds=2, **settings)
    second = fit(*programs, data, num_steps=40, init=first, **settings)
    return [
        all(np.array_equal(whole.params[name], other.params[name]) for name in whole.params)
        and np.array_equal(whole.elbo, other.elbo)
        for other in (longer, second)
    ]


def network():
    model = linear_gaussian.Model(x_shape=(4,), num_latents=2)
    x = np.random.default_rng(0).normal(size=(60, 4))
    held_out = {"x": x[:20]}
    settings = {"batch_size": 20, "num_steps": 300, "optimizer": optax.adam(0.02)}
    result = fit(
        model, guides.mean_field(model), {"x": x}, validation=held_out, progress=False, **settings
    )
    return result.validation_elbo[0, [0, -1]].tolist()


def large_integers():
    large = {"c": data["c"], "x": np.full(400, 3_000_000_000)}
    return fit(*programs, large, num_steps=1, progress=False).config["data"]["x"].split()[0]


results = toy(100, 2000), toy(None, 1000)
found = {}
for part in (trained, judged, resumed, network, large_integers):
    try:
        found[part.__name__] = part()
    except Exception:
        found[part.__name__] = traceback.format_exc()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the parts of the script came to."""
    directory = tmp_path_factory.mktemp("wide") / "checkpoints"
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(directory)]
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def test_the_toy_arrives_at_maximum_likelihood_on_batches_and_on_all_data(found):
    assert not isinstance(found["trained"], str), found["trained"]
    assert len(found["trained"]["gaps"]) == 4
    # the noise of averaged batches of a quarter of the data; on all data half as much
    for gap, most in zip(found["trained"]["gaps"], (4e-3, 4e-3, 2e-3, 2e-3), strict=True):
        assert 0 <= gap < most
    assert found["trained"]["types"] == ["float64"]
    assert found["trained"]["converted"] == {}


def test_judges_and_generators_answer(found):
    assert not isinstance(found["judged"], str), found["judged"]
    assert found["judged"]["errors"] < 4.5
    assert found["judged"]["type"] == "float64"


def test_a_run_goes_on_to_the_same_bits(found):
    assert found["resumed"] == [True, True]


def test_a_guide_with_a_network_trains(found):
    assert not isinstance(found["network"], str), found["network"]
    first, last = found["network"]
    assert last > first


def test_integers_are_taken_that_32_bits_do_not_hold(found):
    assert found["large_integers"] == "int64[400]"
