"""The look at the programs: correct ones pass in silence, each fault has its message.

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

from inference._checks import ProgramError, Programs, check_supports, look, support_check

SIZE, WIDTH = 8, 3
BATCH = {
    "c": jax.ShapeDtypeStruct((SIZE,), jnp.int32),
    "x": jax.ShapeDtypeStruct((SIZE, WIDTH), jnp.uint8),
}
Program = Callable[..., Any]


def check(
    model: Program,
    guide: Program,
    batch: dict[str, Any] = BATCH,
    whole: bool = False,
    **kwargs: Any,
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

    found = check(watched, guide)
    assert seen == [True, True]  # at the batch's length and at one more
    assert found.params == {"mu_loc": jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)}


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


def test_autoguide_passes_and_stays_as_it_was() -> None:
    automatic = AutoNormal(model)
    found = check(model, automatic, whole=True)
    assert "z_auto_loc" in (found.tied_to or "")
    assert automatic.prototype_trace is None


# --- what is found --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SIZE, WIDTH])  # as long as another plate too
def test_plates_of_the_data_have_any_name_and_global_sites_lie_outside(size: int) -> None:
    def program(x: Array, obs: Array | None) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("columns", WIDTH, dim=-1):
            numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with numpyro.plate("people", len(x), dim=-2):
                numpyro.sample("z", normal((2,)))
                if obs is not None:
                    numpyro.sample("x", dist.Normal(0.0, 1.0), obs=obs)

    batch = {"x": jax.ShapeDtypeStruct((size, WIDTH), jnp.float32)}
    found = check(lambda x: program(x, x), lambda x: program(x, None), batch)
    assert found.plates.names == {"people"}
    assert set(found.globals) == {"mu", "scale"}
    assert found.takes_batches
    dims = {name: axes.dims for name, axes in (found.latents | found.observed).items()}
    assert dims == {
        "mu": (),
        "scale": ("columns",),
        "z": ("data", "columns", "z_dim_0"),
        "x": ("data", "columns"),
    }
    assert found.latents["z"].data_axis == -3
    assert found.observed["x"].data_axis == -2
    assert found.latents["scale"].data_axis is None


def test_global_site_with_axes_outside_plates_passes() -> None:
    def regression(c: Array, x: Array) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(WIDTH), 1.0))
        with numpyro.plate("rows", len(c)):
            numpyro.sample("x", dist.Normal(c[:, None] * w, 1.0).to_event(1), obs=x)

    found = check(regression, AutoNormal(regression))
    assert found.globals == ("w",)
    assert found.tied_to is None


def test_programs_without_a_plate_take_whole_data_alone() -> None:
    def plateless(x: Array) -> None:
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(m * jnp.ones(x.shape), 1.0), obs=x)

    def plateless_guide(x: Array) -> None:
        numpyro.sample("m", dist.Normal(0.0, 1.0))

    assert not check(plateless, plateless_guide, {"x": BATCH["x"]}, whole=True).plates
    with pytest.raises(ProgramError, match=r"batch_size: .*no plate .*leave batch_size out") as e:
        check(plateless, plateless_guide, {"x": BATCH["x"]})
    assert message(e)


def test_programs_of_one_length_take_whole_data_alone() -> None:
    def fixed(x: Array) -> None:
        with numpyro.plate("rows", SIZE):
            numpyro.sample("x", dist.Normal(jnp.arange(SIZE) * x[:, 0], 1.0), obs=x[:, 1])

    found = check(fixed, lambda x: None, {"x": BATCH["x"]}, whole=True)
    assert found.plates.names == {"rows"}
    assert found.tied_to == "it runs with 8 data alone"
    half = {"x": jax.ShapeDtypeStruct((SIZE // 2, WIDTH), jnp.float32)}
    with pytest.raises(ProgramError, match=r"run with all 8 and fail with 4.*leave batch_size out"):
        check(fixed, lambda x: None, half, num_data=SIZE)


def test_sites_to_sum_over_are_found() -> None:
    def mixture(c: Array) -> None:
        with numpyro.plate("rows", len(c)):
            k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("c", dist.Normal(k, 1.0), obs=c)

    def drawn(c: Array) -> None:
        with numpyro.plate("rows", len(c)):
            numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    batch = {"c": BATCH["c"]}
    found = check(mixture, lambda c: None, batch, can_infer_discrete=True)
    assert (found.summed, found.enumerated) == (("k",), ())
    found = check(mixture, drawn, batch, can_infer_discrete=True)
    assert (found.summed, found.enumerated) == ((), ("k",))


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


def test_site_that_is_local_on_one_side_only() -> None:
    def local(c: Array, x: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            numpyro.sample("mu", dist.Normal(0.0, 1.0))
            numpyro.sample("z", normal((2,)))

    with pytest.raises(ProgramError, match=r"guide site 'mu'.*batch shape \(\).*got \(8,\)") as e:
        check(model, local)
    assert message(e)


def test_axis_of_the_data_without_any_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("z", dist.Normal(jnp.zeros((c.shape[0], 2)), 1.0).to_event(1))

    expected = r"guide site 'z'.*inside a plate, got axis -1 of batch shape \(8,\) in no plate"
    for whole in (False, True):
        with pytest.raises(ProgramError, match=expected) as error:
            check(model, faulty, whole=whole)
        assert "numpyro.plate(" in message(error)


def test_axis_of_the_data_beside_a_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("rows", c.shape[0]):
            numpyro.sample(
                "x", dist.Normal(jnp.zeros((len(c), 1)), 1.0), obs=jnp.zeros((len(c),) * 2)
            )

    expected = r"model site 'x'.*axis -2 of batch shape \(8, 8\) in rows \(dim -1, size 8\)"
    with pytest.raises(ProgramError, match=expected) as error:
        check(faulty, lambda c, x: None)
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


def test_factor_of_the_data_outside_a_plate() -> None:
    def faulty(c: Array, x: Array) -> None:
        model(c, x)
        numpyro.factor("penalty", jnp.zeros(len(c)))

    with pytest.raises(ProgramError, match=r"model site 'penalty'.*axis -1 of batch shape \(8,\)"):
        check(faulty, guide)


@pytest.mark.parametrize("given", [(SIZE, 1), (SIZE, WIDTH, WIDTH), (WIDTH,)])
def test_observed_value_that_broadcasts(given: tuple[int, ...]) -> None:
    def faulty(c: Array, x: Array) -> None:
        model(c, jnp.zeros(given))

    with pytest.raises(ProgramError, match=r"model site 'x'.*\(8, 3\)") as error:
        check(faulty, guide)
    assert str(given) in message(error)


def test_data_plate_with_nothing_inside() -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            numpyro.deterministic("y", c)
        numpyro.sample("x", dist.Normal(x, 1.0).to_event(2), obs=x)

    with pytest.raises(
        ProgramError, match="batch_size: expected a model with a plate for its data"
    ):
        check(faulty, lambda c, x: None)


@pytest.mark.parametrize("role", ["model", "guide"])
@pytest.mark.parametrize("sizes", [(100, SIZE), (SIZE, 4)])
def test_plate_that_draws_batches_itself(role: str, sizes: tuple[int, int]) -> None:
    def program(c: Array, observes: bool, draws: bool) -> None:
        plate = numpyro.plate("rows", *sizes) if draws else numpyro.plate("rows", len(c))
        with plate as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            if observes:
                numpyro.sample("c", dist.Normal(z, 1.0), obs=c[rows] if draws else c)

    def drawing_model(c: Array) -> None:
        program(c, observes=True, draws=role == "model")

    def drawing_guide(c: Array) -> None:
        program(c, observes=False, draws=role == "guide")

    with pytest.raises(
        ProgramError, match=f"{role} plate 'rows'.*size 8.*size {sizes[0]}"
    ) as error:
        check(drawing_model, drawing_guide, {"c": BATCH["c"]})
    assert f"subsample_size {sizes[1]}" in message(error)
    assert "the drawing of batches to the engine" in message(error)


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
    assert "TraceEnum_ELBO" in message(error)
    check(model, guide, batch, can_infer_discrete=True)


def test_discrete_latent_site_that_the_objective_sums_over_needs_no_partner() -> None:
    def model(c: Array) -> None:
        with numpyro.plate("data", c.shape[0]):
            z = numpyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("c", dist.Normal(z, 1.0), obs=c)

    check(model, lambda c: None, {"c": BATCH["c"]}, can_infer_discrete=True)


def test_guide_with_numbers_of_each_datum_takes_no_batches() -> None:
    for automatic, named in ((AutoNormal, "z_auto_loc"), (AutoMultivariateNormal, "_auto_latent")):
        with pytest.raises(ProgramError, match=f"guide.*{named!r}.*leave batch_size out"):
            check(model, automatic(model))


def test_parameter_that_follows_the_length_of_the_batch() -> None:
    def faulty(c: Array, x: Array) -> None:
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        z_loc = numpyro.param("z_loc", jnp.zeros((len(c), 2)))
        with numpyro.plate("data", len(c)):
            numpyro.sample("z", dist.Normal(z_loc, 1.0).to_event(1))

    with pytest.raises(ProgramError, match="parameter 'z_loc' has one entry for each") as error:
        check(model, faulty)
    assert "use a guide with an encoder" in str(error.value)
    assert not check(model, faulty, whole=True).takes_batches


@pytest.mark.parametrize(
    "number", [lambda c: len(np.unique(c)), lambda c: int(c.max()) + 1], ids=["numpy", "int"]
)
def test_program_that_needs_the_values_of_an_array(number: Callable[[Any], int]) -> None:
    def faulty(c: Array, x: Array) -> None:
        with numpyro.plate("groups", number(c)):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
        model(c, x)

    with pytest.raises(ProgramError, match=r"model: expected .* needs the values of 'c'") as error:
        check(faulty, guide)
    assert "functools.partial" in message(error)


# --- programs that raise by themselves ------------------------------------------------------------


def notes(error: pytest.ExceptionInfo[Exception]) -> str:
    return "\n".join(error.value.__notes__)


def test_arrays_that_a_program_does_not_take() -> None:
    for programs, role in (((lambda x: None, guide), "model"), ((model, lambda x: None), "guide")):
        with pytest.raises(ProgramError, match=rf"data\['c'\]: .*the {role} takes .* x,") as error:
            check(*programs)
        assert message(error)


def test_arrays_that_a_program_lacks() -> None:
    with pytest.raises(ProgramError, match="model: expected data for its argument 'c', got x") as e:
        check(model, guide, {"x": BATCH["x"]})
    assert "functools.partial" in message(e)


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


# --- values ---------------------------------------------------------------------------------------


def outside(model: Program, batch: dict[str, Any], **params: Any) -> None:
    """Compares the batch with the supports of a model without latents."""
    counted = support_check(model, lambda **data: None, jax.eval_shape(lambda: params))
    check_supports(counted, [(jax.random.key(0), batch)], model)


def test_values_outside_the_support_of_their_site() -> None:
    def program(x: Array) -> None:
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Bernoulli(0.5).expand([3]).to_event(1), obs=x)

    outside(program, {"x": np.eye(3, dtype=np.float32)})
    grey = np.array([[0, 1, 128], [255, 0, 0]], np.float32)
    expected = "site 'x': .* got 2 outside in a batch of 2 data, which range from 0 to 255"
    with pytest.raises(ValueError, match=expected) as error:
        outside(program, {"x": grey})
    assert message(error)


def test_a_support_that_depends_on_a_parameter_is_not_compared() -> None:
    def program(x: Array) -> None:
        top = numpyro.param("top", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Uniform(0.0, top), obs=x)

    outside(program, {"x": np.array([0.5, 7.0], np.float32)}, top=jnp.zeros(()))


def test_a_support_that_depends_on_the_data_is_not_compared() -> None:
    def program(n: Array, x: Array) -> None:
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Binomial(n, 0.5), obs=x)

    outside(program, {"n": np.array([1, 9]), "x": np.array([1, 7])})
