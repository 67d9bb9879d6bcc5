"""Products of matrices are as exact as the exact answers need it, on a GPU too.

No GPU is needed. The program that a GPU would get names the precision of each product. And what
TensorFloat-32 would do is emulated: inputs of products are rounded to 10 bits, sums are in float32.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax import lax
from jax.extend.core import Literal
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density
from scipy import stats

from experiments import exact, runner
from experiments.precision import SETTING, full_precision
from models import guides, linear_gaussian, vae

KEY = jax.random.key(0)
TF32_BITS = 10


@pytest.fixture
def default():
    """JAX's own default for the precision of products."""
    before = getattr(jax.config, SETTING)
    jax.config.update(SETTING, None)
    yield
    jax.config.update(SETTING, before)


# --- what the scripts ask of a device -------------------------------------------------------------


def precisions(function: Callable[..., Any], *args: Any) -> list[str]:
    """The precision of each product and convolution of float32 arrays, as a GPU gets them."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    lines = re.findall(r"^.*stablehlo\.(?:dot_general|convolution).*xf32>.*$", text, re.MULTILINE)
    return [re.findall(r"\b(?:DEFAULT|HIGHEST|HIGH)\b", line)[0] for line in lines]


PROGRAMS = {
    "linear-gaussian": linear_gaussian.Model((6,), 2),
    "convolutions": vae.Model(x_shape=(4, 4), num_latents=2, hidden=(3,), channels=(2,)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripts_ask_a_gpu_for_float32(name, default, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # which has convolutions of its own
    model = PROGRAMS[name]
    svi = SVI(model, guides.mean_field(model), optax.sgd(0.1), Trace_ELBO())
    x = np.ones((3, *model.x_shape), np.float32)
    state = jax.eval_shape(svi.init, KEY, x=x)

    def step(state: Any, x: Any) -> Any:
        return svi.update(state, x=x)

    found = precisions(step, state, x)
    assert len(found) > 3
    assert set(found) == {"DEFAULT"}  # TensorFloat-32, on a GPU that has it
    full_precision()
    assert set(precisions(lambda *args: step(*args), state, x)) == {"HIGHEST"}


def test_the_runner_asks_for_float32(default):
    class Begun(Exception):
        pass

    def data(config: Any) -> Any:
        raise Begun

    with pytest.raises(Begun):
        runner.run(replace(exact.EXPERIMENT, data=data), exact.Config())
    assert getattr(jax.config, SETTING) == "highest"


def test_the_users_own_precision_stays(default):
    jax.config.update(SETTING, "tensorfloat32")
    full_precision()
    assert getattr(jax.config, SETTING) == "tensorfloat32"


# --- what TensorFloat-32 would do to exact answers ------------------------------------------------


def rounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with the inputs of each product of float32 matrices rounded as
    TensorFloat-32 has them. Loops are left alone."""

    def evaluate(jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for equation in jaxpr.eqns:
            given = [x.val if isinstance(x, Literal) else values[x] for x in equation.invars]
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if equation.primitive is lax.dot_general_p:
                given = [lax.reduce_precision(x, 8, TF32_BITS) for x in given]
            if inner is not None and hasattr(inner, "consts"):
                results = evaluate(inner.jaxpr, inner.consts, *given)
            else:
                params = equation.primitive.get_bind_params(equation.params)
                results = equation.primitive.bind(*given, **params)
            if not equation.primitive.multiple_results and not isinstance(results, list):
                results = [results]
            values.update(zip(equation.outvars, results, strict=True))
        return [x.val if isinstance(x, Literal) else values[x] for x in jaxpr.outvars]

    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        leaves = evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return run


def test_a_product_is_rounded_as_a_gpu_rounds_it(rng):
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 7), (7, 3)))

    def by_hand(array: np.ndarray) -> np.ndarray:
        fraction, exponent = np.frexp(array)
        return np.ldexp(np.round(fraction * 2 ** (TF32_BITS + 1)), exponent - TF32_BITS - 1)

    got = jax.jit(rounded(lambda x, y: jax.nn.relu(x @ y)))(x, y)
    expected = np.maximum(by_hand(x).astype(float) @ by_hand(y), 0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert abs(expected - np.maximum(x.astype(float) @ y, 0)).max() > 1e-4


def test_the_exact_rung_needs_float32(rng):
    """The guide is the exact posterior, so the ELBO of any draw is log p(x). No error is that of
    draws. ``exact.ROUNDING`` is what a claim of ``experiments/exact.py`` may be off by."""
    config = exact.Config()
    data = exact.diabetes(config)
    rung = exact.LinearGaussian(config, data.record)
    x, params = rung.arrays(data.train)["x"], dict(rung.program.params)
    noise = rng.normal(size=(len(x), config.num_latents)).astype(np.float32)

    def log_p(params: Any, x: Any) -> Any:
        return linear_gaussian.log_likelihood(rung.model, params, {"x": x}).mean()

    def elbo(params: Any, x: Any, noise: Any) -> Any:
        z_loc, covariance = linear_gaussian.posterior(rung.model, params, {"x": x})
        q = dist.MultivariateNormal(z_loc, covariance)
        z = z_loc + noise @ jnp.linalg.cholesky(covariance).T
        model = handlers.substitute(rung.model, params)
        return log_density(model, (), {"x": x}, {"z": z})[0] / len(x) - q.log_prob(z).mean()

    W, b, sigma = (np.asarray(params[name], np.float64) for name in ("W", "b", "sigma"))
    marginal = stats.multivariate_normal(b, W @ W.T + sigma**2 * np.eye(len(b)))
    exactly = marginal.logpdf(x.astype(np.float64))
    standard_error = exactly.std() / len(x) ** 0.5
    for function, *args in ((log_p, params, x), (elbo, params, x, noise)):
        fine, coarse = (
            abs(float(jax.jit(each)(*args)) - exactly.mean())
            for each in (function, rounded(function))
        )
        assert fine < exact.ROUNDING / 5 < exact.ROUNDING < coarse, function.__name__
        assert coarse < standard_error / 100  # what the choice of the data hides
