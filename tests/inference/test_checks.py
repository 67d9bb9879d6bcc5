"""The checks before the first step: correct programs pass in silence, each fault has its message.

The faulty programs differ from `model` and `guide` below in one place each.
"""

from collections.abc import Callable
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from jax.core import Tracer
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import nnx_module
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from inference._checks import ProgramError, Programs, look

SIZE, WIDTH = 8, 3
BATCH = {
    "c": jax.ShapeDtypeStruct((SIZE,), jnp.int32),
    "x": jax.ShapeDtypeStruct((SIZE, WIDTH), jnp.uint8),
}
Program = Callable[..., Any]


def check(
    model: Program, guide: Program, batch: dict[str, Any] = BATCH, whole: bool = False, **kwargs: Any
) -> Programs:
    return look(model, guide, batch, key=jax.random.key(0), whole=whole, **kwargs)


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "expected" in text
    assert "got" in text
    return text


# --- the correct pair from which the faulty ones depart -------------------------------------------


def normal(event_shape: tuple[int, ...]) -> dist.Distribution:
    return dist.Normal(0.0, 1.0).expand(event_shape).to_event(len(event_shape))


def model(c: Array, x: Array | None = None) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", c.shape[0]):
        z = numpyro.sample("z", normal((2,)))
        x_logits = jnp.broadcast_to(mu + z.sum(-1, keepdims=True) + c[:, None], (*c.shape, WIDTH))
        numpyro.sample("x", dist.Bernoulli(logits=x_logits).to_event(1), obs=x)


def guide(c: Array, x: Array) -> None:
    mu_loc = numpyro.param("mu_loc", 0.0)
    numpyro.sample("mu", dist.Normal(mu_loc, 1.0))
    with numpyro.plate("data", c.shape[0]):
        z_loc = jnp.stack([x.mean(-1), c + mu_loc], axis=-1)
        numpyro.sample("z", dist.Normal(z_loc, 1.0).to_event(1))


# --- correct programs -----------------------------------------------------------------------------


def test_conditional_model_with_global_and_local_latents_passes() -> None:
    check(model, guide)


def test_concrete_batches_pass() -> None:
    numpy = {"c": np.zeros(SIZE, np.int64), "x": np.zeros((SIZE, WIDTH), np.uint8)}
    check(model, guide, numpy)
    check(model, guide, {key: jnp.asarray(array) for key, array in numpy.items()})


@pytest.mark.parametrize("size", [1, WIDTH])
def test_batches_of_one_and_of_the_size_of_an_event_pass(size: int) -> None:
    shapes = {key: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for key, a in BATCH.items()}
    check(model, guide, shapes)


def test_nothing_is_computed_and_no_tracer_escapes() -> None:
    seen: list[Any] = []

    def watched(c: Array, x: Array) -> None:
        seen.append(isinstance(c, Tracer))
        model(c, x)

    with jax.check_tracer_leaks():
        check(watched, guide)
    assert seen == [True]


def test_axis_of_length_one_needs_no_plate() -> None:
    def program(x: Array, obs: Array | None = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(jnp.zeros(1), 1.0))
        if obs is not None:
            with numpyro.plate("data", x.shape[0]):
                numpyro.sample("x", dist.Normal(mu, 1.0).expand([WIDTH]).to_event(1), obs=obs)

    check(lambda x: program(x, x), program, {"x": BATCH["x"]})


def test_nested_plates_pass() -> None:
    def model(x: Array) -> None:
        with numpyro.plate("columns", WIDTH, dim=-1):
            scale = numpyro.sample("scale", dist.HalfNormal(1.0))
            with numpyro.plate("data", x.shape[0], dim=-2):
                numpyro.sample("x", dist.Normal(0.0, scale), obs=x)

    def guide(x: Array) -> None:
        with numpyro.plate("columns", WIDTH, dim=-1):
            numpyro.sample("scale", dist.LogNormal(0.0, 1.0))

    check(model, guide, {"x": BATCH["x"]})


def test_auxiliary_site_of_the_guide_passes() -> None:
    def auxiliary_guide(c: Array, x: Array) -> None:
        numpyro.sample("noise", normal((5,)), infer={"is_auxiliary": True})
        guide(c, x)

    check(model, auxiliary_guide)


def test_mask_scale_factor_and_deterministic_pass() -> None:
    def model(x: Array) -> None:
        with numpyro.plate("data", x.shape[0]), handlers.scale(scale=0.5):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            numpyro.deterministic("twice", 2 * z)
            numpyro.factor("same_for_each", 1.0)
            numpyro.factor("own", z)
            with handlers.mask(mask=x[:, 0] > 0):
                logits = jnp.broadcast_to(z[:, None], x.shape)
                numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Array) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.deterministic("thrice", 3 * z)
            numpyro.factor("penalty", z)

    check(model, guide, {"x": BATCH["x"]})


def test_parameters_shared_as_a_pytree_pass() -> None:
    net = nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0))

    def guide(x: Array) -> None:
        with numpyro.plate("data", x.shape[0]):
            z_loc = nnx_module("net", net)(x.astype(jnp.float32))
            numpyro.sample("z", dist.Normal(z_loc, 1.0).to_event(1))

    def model(x: Array) -> None:
        kernel = numpyro.param("net$params")["kernel"]  # from the guide, for want of a value here
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", normal((2,)))
            numpyro.sample("x", dist.Bernoulli(logits=z @ kernel.T).to_event(1), obs=x)

    check(model, guide, {"x": BATCH["x"]})
    assert net(jnp.ones((1, WIDTH))).shape == (1, 2)


def test_prior_that_cannot_be_sampled_passes() -> None:
    def model(x: Array) -> None:
        mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("x", dist.Normal(mu, 1.0).expand([WIDTH]).to_event(1), obs=x)

    def guide(x: Array) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))

    check(model, guide, {"x": BATCH["x"]})


def test_scan_over_time_passes() -> None:
    def program(x: Array, obs: Array | None) -> None:
        def step(z: Array, x_t: Array | None) -> tuple[Array, None]:
            with numpyro.plate("data", x.shape[0]):
                z = numpyro.sample("z", dist.Normal(z, 1.0))
                if x_t is not None:
                    numpyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return z, None

        scan(step, jnp.zeros(x.shape[0]), obs, length=WIDTH)

    check(
        lambda x: program(x, x.T.astype(jnp.float32)),
        lambda x: program(x, None),
        {"x": BATCH["x"]},
    )


def test_autoguide_passes_and_can_be_used_afterwards() -> None:
    automatic = AutoNormal(model)
    check(model, automatic)
    assert automatic.prototype_trace is None
    data = {"c": jnp.zeros(SIZE), "x": jnp.zeros((SIZE, WIDTH))}
    assert handlers.seed(automatic, 0)(**data)["z"].shape == (SIZE, 2)


# --- faults of the programs -----------------------------------------------------------------------


def test_latent_site_that_the_guide_lacks() -> None:
    def faulty(c: Array, x: Array) -> None:
        handlers.block(guide, hide=["mu"])(c, x)

    with pytest.raises(ProgramError, match=r"model site 'mu'.*none among \['z'\]") as error:
        check(model, faulty)
    assert "draw it in the guide" in message(error)


def test_deterministic_site_is_no_partner() -> None:
    def faulty(c: Array, x: Array) -> None:
        numpyro.deterministic("mu", jnp.zeros(()))
        handlers.block(guide, hide=["mu"])(c, x)

    with pytest.raises(ProgramError, match="model site 'mu'"):
        check(model, faulty)


def test_auxiliary_mark_excuses_no_latent_site_of_the_model() -> None:
    """NumPyro would draw it from the prior and count its log-density with nothing against it."""

    def faulty(c: Array, x: Array) -> None:
        model(c, x)
        numpyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with pytest.raises(ProgramError, match="model site 'noise'"):
        check(faulty, guide)


def test_guide_site_that_the_model_lacks() -> None:
    def faulty(c: Array, x: Array) -> None:
        guide(c, x)
        numpyro.sample("stray", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match=r"guide site 'stray'.*\['mu', 'z'\]") as error:
        check(model, faulty)
    assert "is_auxiliary" in message(error)


def test_guide_site_that_the_model_observes() -> None:
    def faulty(c: Array, x: Array) -> None:
        guide(c, x)
        with numpyro.plate("data", c.shape[0]):
            numpyro.sample("x", normal((WIDTH,)))

    with pytest.raises(ProgramError, match=r"guide site 'x'.*the model observes") as error:
        check(model, faulty)
    assert message(error)


def test_guide_that_observes() -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            numpyro.sample("label", dist.Normal(0.0, 1.0), obs=c)
        guide(c, x)

    with pytest.raises(ProgramError, match=r"guide site 'label'.*observe nothing") as error:
        check(model, faulty)
    assert message(error)


def test_different_event_shapes() -> None:
    def faulty(c: Array, x: Array) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", c.shape[0]):
            numpyro.sample("z", normal((5,)))

    with pytest.raises(ProgramError, match=r"guide site 'z'.*\(2,\), .*got \(5,\)") as error:
        check(model, faulty)
    assert message(error)


def test_different_plates() -> None:
    def faulty(c: Array, x: Array) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", c.shape[0]):
            numpyro.sample("z", normal((2,)))

    expected = (
        r"guide site 'z'.*data \(dim -1, size 8\), as in the model, got rows \(dim -1, size 8\)"
    )
    with pytest.raises(ProgramError, match=expected) as error:
        check(model, faulty)
    assert message(error)


def test_plate_on_one_side_only() -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            numpyro.sample("mu", dist.Normal(0.0, 1.0))
            numpyro.sample("z", normal((2,)))

    with pytest.raises(ProgramError, match=r"guide site 'mu'.*no plate.*data \(dim -1, size 8\)"):
        check(model, faulty)


def test_batch_axis_without_any_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("z", dist.Normal(jnp.zeros((c.shape[0], 2)), 1.0).to_event(1))

    with pytest.raises(ProgramError, match=r"guide site 'z'.*axis -1 of size 8.*\(8,\)") as error:
        check(model, faulty)
    assert "numpyro.plate(...)" in message(error)
    assert ".to_event(k)" in message(error)


def test_batch_axis_beside_a_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            logits = jnp.broadcast_to(z, (WIDTH, SIZE))
            numpyro.sample("x", dist.Bernoulli(logits=logits), obs=x.T)

    def faulty_guide(c: Array, x: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    expected = r"model site 'x'.*axis -2 of size 3 in batch shape \(3, 8\) with data \(dim -1, size"
    with pytest.raises(ProgramError, match=expected) as error:
        check(faulty, faulty_guide)
    assert message(error)


def test_batch_axis_against_a_plate_of_another_size() -> None:
    """NumPyro's own error names neither the site nor the plate."""

    def faulty(c: Array, x: Array) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", c.shape[0]):
            numpyro.sample("z", dist.Normal(jnp.zeros((SIZE, 2)), 1.0))

    with pytest.raises(ProgramError, match=r"guide site 'z'.*axis -1 .*size 8.*'data'.*2") as error:
        check(model, faulty)
    assert "(8, 2)" in message(error)
    assert ".to_event(k)" in message(error)
    assert isinstance(error.value.__cause__, ValueError)


def test_batch_axis_in_a_plate_of_one() -> None:
    def faulty(c: Array, x: Array) -> None:
        model(c, x)
        with numpyro.plate("single", 1):
            numpyro.sample("y", dist.Normal(jnp.zeros(SIZE), 1.0), obs=c)

    with pytest.raises(ProgramError, match=r"model site 'y'.*size 1, as plate 'single'.*\(8,\)"):
        check(faulty, guide)


def test_sample_shape_outside_a_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        guide(c, x)
        numpyro.sample(
            "noise", dist.Normal(0.0, 1.0), sample_shape=(5,), infer={"is_auxiliary": True}
        )

    with pytest.raises(ProgramError, match=r"guide site 'noise'.*axis -1 of size 5.*\(5,\)"):
        check(model, faulty)


def test_factor_of_a_batch_outside_a_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        model(c, x)
        numpyro.factor("penalty", jnp.zeros(SIZE))

    with pytest.raises(ProgramError, match=r"model site 'penalty'.*axis -1 of size 8.*sum it"):
        check(faulty, guide)


@pytest.mark.parametrize("given", [(SIZE, 1), (SIZE, WIDTH, WIDTH), (WIDTH,)])
def test_observed_value_that_broadcasts(given: tuple[int, ...]) -> None:
    def faulty(c: Array, x: Array) -> None:
        model(c, jnp.zeros(given))

    with pytest.raises(ProgramError, match=r"model site 'x'.*\(8, 3\)") as error:
        check(faulty, guide)
    assert str(given) in message(error)


def test_model_without_the_data_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("rows", c.shape[0]):
            numpyro.sample("x", normal((WIDTH,)), obs=x)

    with pytest.raises(ProgramError, match=r"'data' of size 8.*\['x'\].*rows \(dim -1") as error:
        check(faulty, lambda c, x: None)
    assert "counted once" in message(error)


def test_data_plate_with_nothing_inside() -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            numpyro.deterministic("y", c)
        numpyro.sample("x", dist.Normal(x, 1.0).to_event(2), obs=x)

    with pytest.raises(ProgramError, match=r"'data' of size 8.*\['x'\].*no plate"):
        check(faulty, lambda c, x: None)


@pytest.mark.parametrize("role", ["model", "guide"])
@pytest.mark.parametrize("subsample_size", [None, SIZE])
def test_data_plate_of_another_size(role: str, subsample_size: int | None) -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("data", 100, subsample_size=subsample_size):
            (model if role == "model" else guide)(c, x)

    programs = (faulty, guide) if role == "model" else (model, faulty)
    with pytest.raises(ProgramError, match=f"{role} plate 'data'.*size 8.*got size 100") as error:
        check(*programs)
    assert "the drawing of batches to the engine" in message(error)
    assert ("subsample_size 8" in message(error)) == (subsample_size is not None)


def test_data_plate_of_another_size_inside_a_scan() -> None:
    def faulty(c: Array, x: Array) -> None:
        def step(carry: None, x_t: Array) -> tuple[None, None]:
            with numpyro.plate("data", 100):
                numpyro.sample("x", dist.Normal(0.0, 1.0), obs=jnp.zeros(100))
            return None, None

        scan(step, None, x.T)

    with pytest.raises(ProgramError, match=r"model plate 'data'.*size 8.*got size 100"):
        check(faulty, lambda c, x: None)


@pytest.mark.parametrize("role", ["model", "guide"])
def test_discrete_latent_site(role: str) -> None:
    def model(c: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            prior = dist.Bernoulli(0.5) if role == "model" else dist.Normal(0.0, 1.0)
            z = numpyro.sample("z", prior)
            numpyro.sample("c", dist.Normal(z, 1.0), obs=c)

    def guide(c: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            prior = dist.Bernoulli(0.5).mask(True) if role == "guide" else dist.Normal(0.0, 1.0)
            numpyro.sample("z", prior)

    batch = {"c": BATCH["c"]}
    with pytest.raises(ProgramError, match=rf"{role} site 'z'.*support Boolean\(\)") as error:
        check(model, guide, batch)
    assert "sum it out" in message(error)
    check(model, guide, batch, can_infer_discrete=True)


def test_discrete_latent_site_that_the_objective_sums_over_needs_no_partner() -> None:
    def model(c: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            z = numpyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("c", dist.Normal(z, 1.0), obs=c)

    check(model, lambda c: None, {"c": BATCH["c"]}, can_infer_discrete=True)


def test_autoguide_that_draws_local_latents_jointly() -> None:
    with pytest.raises(ProgramError, match=r"guide site 'z'.*axis -1 of size 8"):
        check(model, AutoMultivariateNormal(model))


# --- programs that raise by themselves ------------------------------------------------------------


def notes(error: pytest.ExceptionInfo[Exception]) -> str:
    return "\n".join(error.value.__notes__)


def test_unknown_keyword_argument_keeps_its_error_and_says_which_program() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'c'") as error:
        check(lambda x: None, guide)
    assert "raised by the model, called with keyword arguments" in notes(error)
    assert "c: int32[8], x: uint8[8, 3]" in notes(error)


def test_own_error_of_a_program_keeps_its_type_and_says_at_which_site() -> None:
    class Broken(dist.Normal):
        def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
            raise KeyError("broken")

    def faulty(c: Array, x: Array) -> None:
        numpyro.sample("mu", Broken(0.0, 1.0))

    with pytest.raises(KeyError, match="broken") as error:
        check(model, faulty)
    assert "raised by the guide, at site 'mu', called with" in notes(error)


def test_handlers_are_left_in_order_after_an_error() -> None:
    for faulty in (lambda x: None, lambda c, x: None):
        with pytest.raises((TypeError, ProgramError)):
            check(model, faulty)
    check(model, guide)


def test_batch_whose_arrays_differ_in_length() -> None:
    batch = {**BATCH, "c": jax.ShapeDtypeStruct((SIZE + 1,), jnp.int32)}
    with pytest.raises(ValueError, match=r"batch: expected .*'c': 9, 'x': 8") as error:
        check(model, guide, batch)
    assert message(error)
