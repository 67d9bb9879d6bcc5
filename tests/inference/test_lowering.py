"""Every program that a fit, a judge or a generator compiles can be compiled for a GPU and a TPU.

No such device is needed. JAX lowers a program for a device that is not there: each operation must
have a rule for it. Nothing is compiled for it or run on it.

``jax.jit`` is replaced by one that lowers every program for both, when it is first called. So the
tests know nothing of how the engine makes its faults.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.elbo import ELBO

import models
from inference import (
    OBJECTIVES,
    Fit,
    elbo_terms,
    fit,
    label_check,
    log_likelihood,
    log_predictive_density,
    pointwise_elbo,
    pointwise_log_likelihood,
    reconstruct,
    sample_posterior,
    sample_posterior_predictive,
    sample_prior_predictive,
)
from inference.sites import preparation
from models import (
    gaussian_mean,
    guides,
    hierarchical,
    hierarchical_gaussian,
    linear_gaussian,
    mixture,
    quadrants,
    regression,
    semi_supervised,
    vae,
)
from models.conditions import Labels
from models.likelihoods import Gaussian, Normal
from models.priors import LearnedNormal

ELSEWHERE = ("cuda", "tpu")
N = 12
DATA = {"x": np.linspace(-1, 1, N, dtype=np.float32)}


# --- every program that is compiled, lowered for other devices ------------------------------------


class Jit:
    """What ``jax.jit`` returns: it lowers a program for other devices, and never runs it.

    Args:
        function: what to lower.
        faults: gets by the program's name why it cannot be lowered, or None.
        options: as in ``jax.jit``.
    """

    def __init__(self, function: Callable[..., Any], faults: dict[str, str | None], **options: Any):
        self.jitted, self.faults = REAL_JIT(function, **options), faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jitted, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            return self.jitted(*args, **kwargs)  # a part of another program
        return pretended(self.lower(*args, **kwargs).out_info, 0)

    def lower(self, *args: Any, **kwargs: Any) -> "Lowered":
        name, traced = self.jitted.__name__, self.jitted.trace(*args, **kwargs)
        self.faults.setdefault(name, None)
        try:
            return Lowered(traced.lower(lowering_platforms=ELSEWHERE), traced.out_info)
        except (NotImplementedError, ValueError) as error:
            self.faults[name] = str(error)
            return Lowered(traced.lower(), traced.out_info)


class Lowered(NamedTuple):
    """A program that was lowered. The engine compiles its loop from it, and takes one step."""

    lowered: Any
    out_info: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lowered, name)

    def compile(self) -> Callable[..., Any]:
        return lambda *_: pretended(self.out_info, 1)


def pretended(out_info: Any, count: int) -> Any:
    """What a program might return: ones, which are finite, positive and true, and a count where it
    returns whole numbers."""

    def fill(x: Any) -> jax.Array:
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        return jnp.full(x.shape, count if whole else 1, x.dtype)

    return jax.tree.map(fill, out_info)


REAL_JIT = jax.jit


@pytest.fixture
def faults(monkeypatch) -> dict[str, str | None]:
    """By the name of each program of the test, why other devices cannot have it, or None.

    Where a program asks for its device, it is a GPU.
    """
    found: dict[str, str | None] = {}
    monkeypatch.setattr(jax, "jit", lambda function, **options: Jit(function, found, **options))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return found


def fresh(model: Any) -> Any:
    """The same model, equal to no other. So no program of it has been compiled before."""
    kind = type(type(model).__name__, (type(model),), {})
    return kind(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})


# --- models ---------------------------------------------------------------------------------------

SEEN = quadrants.Quadrants(1, (4, 4))
MODELS = {
    "gaussian_mean": gaussian_mean.Model(),
    "hierarchical": hierarchical.Model(
        x_shape=(4,), num_latents=2, hidden=(), likelihood=Normal(), above=(hierarchical.Layer(1),)
    ),
    "hierarchical_gaussian": hierarchical_gaussian.Model(),
    "linear_gaussian": linear_gaussian.Model((4,), 2, Labels(3)),
    "mixture": mixture.Model(3, (2,), 1),
    "quadrants": quadrants.Model(quadrants.Baseline(SEEN, hidden=(3,)), 2, (3,), (3,)),
    "regression": regression.Model(2),
    "semi_supervised": semi_supervised.Model(
        num_classes=3, x_shape=(4, 4), num_latents=2, hidden=(3,)
    ),
    "vae": vae.Model(
        Labels(3),
        LearnedNormal(),
        x_shape=(4, 4, 2),
        num_latents=2,
        hidden=(3,),
        channels=(4,),
        likelihood=Gaussian(),
    ),
}


def objective_of(name: str) -> ELBO:
    """Discrete sites are summed over."""
    return TraceEnum_ELBO() if name in ("mixture", "semi_supervised") else Trace_ELBO()


def sites(x: Any) -> None:
    """A global site, and two local ones, of which the second follows the first."""
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        z1 = numpyro.sample("z1", dist.Normal(loc, 1).expand([len(x), 2]).to_event(1))
        z2 = numpyro.sample("z2", dist.Normal(z1[:, 0], 1))
        numpyro.sample("x", dist.Normal(z1[:, 1] + z2, 1), obs=x)


def make_data(name: str) -> dict[str, np.ndarray]:
    """N data of a model, as ``fit`` takes them."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=(N, *shape)).astype(np.float32)  # noqa: E731
    labels = (np.arange(N) % 3).astype(np.int32)
    return {
        "gaussian_mean": lambda: {"c": normal(), "x": normal()},
        "hierarchical": lambda: {"x": normal(4)},
        "hierarchical_gaussian": lambda: {"x": normal()},
        "linear_gaussian": lambda: {"c": labels, "x": normal(4)},
        "mixture": lambda: {"x": normal(2), "y": labels - 1},
        "semi_supervised": lambda: {
            "x": rng.integers(0, 256, (N, 4, 4), dtype=np.uint8),
            "y": labels - 1,
        },
        "quadrants": lambda: {"x": rng.integers(0, 256, (N, 4, 4), dtype=np.uint8)},
        "regression": lambda: {"c": normal(2), "x": normal()},
        "vae": lambda: {"c": labels, "x": rng.integers(0, 256, (N, 4, 4, 2), dtype=np.uint8)},
    }[name]()


# --- every model and every family of guides -------------------------------------------------------


def lower_a_step(model: Any, guide: Any, data: Any, objective: ELBO | None = None) -> None:
    """The first state and one step of NumPyro's own SVI: draws, densities, gradients."""
    prepare, key = preparation(model), jax.random.key(0)
    batch = data if prepare is None else jax.jit(prepare)(key, data)
    svi = SVI(model, guide, optax.adam(1e-3), objective or Trace_ELBO())
    jax.jit(svi.update)(jax.jit(svi.init)(key, **batch), **batch)


def pair(family: str) -> tuple[Any, Any, Any]:
    """A model, a guide of the family, or a mean field with a table of numbers, and data."""
    if family == "per-datum":
        return sites, guides.mean_field(sites).per_datum(N), DATA
    if family in (
        "prior",
        "semi-amortised",
    ):  # the one has no parameters, the other one takes one site
        model = MODELS["linear_gaussian"]
        return model, guides.make(family, model), make_data("linear_gaussian")
    return sites, guides.make(family, sites), DATA


every_model = pytest.mark.parametrize("name", MODELS)
NEWER = ("inverse-autoregressive", "neural-spline")
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[pytest.mark.slow] * (f in NEWER))
        for f in (*guides.GUIDES, "per-datum")
    ],
)


def test_there_is_a_model_of_every_file():
    files = {module.name for module in pkgutil.iter_modules(models.__path__)}
    imported = {name: importlib.import_module(f"models.{name}") for name in files}
    assert MODELS.keys() == {name for name, module in imported.items() if hasattr(module, "Model")}


@pytest.mark.parametrize(
    "name", sorted(MODELS.keys() - {"linear_gaussian"})
)  # the engine's test has it
def test_a_step_of_every_model_is_for_any_device(name, faults):
    model = MODELS[name]
    lower_a_step(model, guides.mean_field(model), make_data(name), objective_of(name))
    assert {"init", "update"} <= faults.keys()
    assert not any(faults.values()), faults


@every_family
def test_a_step_of_every_family_is_for_any_device(family, faults):
    lower_a_step(*pair(family))
    assert not any(faults.values()), faults


def test_a_step_with_joint_global_sites_is_for_any_device(faults):
    lower_a_step(sites, guides.mean_field(sites, globals="full_covariance"), DATA)
    assert not any(faults.values()), faults


# --- the engine, the judges, the generators -------------------------------------------------------


def train(model: Any, guide: Any, data: Any, **settings: Any) -> Fit:
    """One step, and the judgement of held-out data."""
    prepare = preparation(model)
    defaults = {"batch_size": 5, "validation": 0.25, "patience": 9, "average": 0.5}
    settings = defaults | {"preprocess": prepare, "num_steps": 1, "progress": False} | settings
    return fit(model, guide, data, **settings)


def lower_the_engine(name: str) -> None:
    """A fit, and all judges and generators that take it."""
    model, data = fresh(MODELS[name]), make_data(name)
    result = train(model, guides.mean_field(model), data, objective=objective_of(name))
    test = result.prepare(data)
    latents = sample_posterior(result, test)
    if len(latents) == 1:  # no global site
        log_likelihood(result, test, num_samples=30)
        if "c" in test and test["c"].dtype == np.int32:
            label_check(result, test, 3)
    pointwise_elbo(result, test)
    elbo_terms(result, test)
    log_predictive_density(result, test, num_samples=3)
    pointwise_log_likelihood(result, latents, test)
    sample_posterior_predictive(result, test)
    sample_prior_predictive(result, **{n: a for n, a in test.items() if n == "c"})
    reconstruct(result, test)


def test_the_engine_is_for_any_device(faults):
    lower_the_engine("linear_gaussian")
    assert len(faults) >= 12, faults  # the engine's three, six judges, three generators
    assert not any(faults.values()), faults


@pytest.mark.slow
@every_model
def test_the_engine_with_every_model_is_for_any_device(name, faults):
    lower_the_engine(name)
    assert not any(faults.values()), faults


@pytest.mark.slow
@every_family
def test_the_engine_with_every_family_is_for_any_device(family, faults):
    whole = {"batch_size": N, "validation": None, "patience": None}
    train(*pair(family), **(whole if family == "per-datum" else {}))
    assert not any(faults.values()), faults


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_engine_with_every_objective_is_for_any_device(name, faults):
    model, data = MODELS["gaussian_mean"], make_data("gaussian_mean")
    train(model, guides.mean_field(model), data, objective=OBJECTIVES[name](2))
    assert not any(faults.values()), faults


# --- what only some devices have is found ---------------------------------------------------------


def eigenvalues(x: jax.Array) -> jax.Array:
    """0, by the eigenvalues of a matrix that is not symmetric. A TPU has none."""
    return 0 * jnp.abs(jnp.linalg.eigvals(jnp.outer(x, jnp.arange(len(x))))).sum()


def callback(x: jax.Array) -> jax.Array:
    """0, by a call of the host. It cannot be lowered for several devices at once."""
    return 0 * jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x).sum()


def test_a_model_that_only_some_devices_have_is_found(faults):
    def model(x: Any, what: Callable[..., Any]) -> None:
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(loc + what(jax.lax.stop_gradient(x)), 1), obs=x)

    data, reasons = {"x": np.ones(4, np.float32)}, []
    for what in (eigenvalues, callback):
        faults.clear()
        fit(partial(model, what=what), lambda x: None, data, num_steps=1, progress=False)
        reasons.append(faults["advance"])
    assert "'eig' not found for platforms ['tpu']" in reasons[0]
    assert "python_callback" in reasons[1]
