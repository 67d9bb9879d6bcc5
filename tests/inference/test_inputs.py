"""What ``fit`` is given, and what it says of what it cannot use: one line, before anything runs."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.optim
import optax
import pytest
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoNormal

from inference import KLWarmUp, Prepared, fit
from inference._settings import require_whole

RNG = np.random.default_rng(0)
C = RNG.normal(size=24).astype(np.float32)
DATA = {"c": C, "x": (1 + C).astype(np.float32)}


@pytest.fixture(autouse=True)
def _as_a_user(without_type_checks):
    pass


def model(c, x=None):
    slope = numpyro.param("slope", 0.5)
    with numpyro.plate("rows", len(c)):
        z = numpyro.sample("z", dist.Normal(slope * c, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(c, x):
    with numpyro.plate("rows", len(c)):
        numpyro.sample("z", dist.Normal(numpyro.param("weight", 0.1) * x, 1.0))


def no_latents(**data):
    pass


def refused(programs=(model, guide), data=DATA, error=ValueError, **settings):
    """The message of a refusal."""
    settings = {"num_steps": 5, "batch_size": 16, "progress": False} | settings
    with pytest.raises(error) as caught:
        fit(*programs, data, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert "expected" in text
    return text


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_steps": None},
            "num_epochs, num_steps: expected exactly one of the two, got None and None; say how "
            "long to train, for example num_epochs=20",
        ),
        ({"num_epochs": 3}, "num_epochs, num_steps: expected exactly one of the two, got 3 and 5"),
        ({"num_steps": 0}, "num_steps: expected a whole number from 1, got 0"),
        ({"num_seeds": 0}, "num_seeds: expected a whole number from 1, got 0"),
        ({"num_seeds": 2.0}, "num_seeds: expected a whole number from 1, got 2.0"),
        ({"seed": -1}, "seed: expected a whole number from 0, got -1"),
        ({"average": 1.0}, "average: expected a fraction of the run, from 0 to below 1, got 1.0"),
        ({"on_nan": "ignore"}, 'on_nan: expected "stop" or "skip", got \'ignore\''),
        ({"batch_size": 0}, "batch_size: expected 1 to 24, the number of data, got 0"),
        ({"batch_size": 25}, "batch_size: expected 1 to 24, the number of data, got 25"),
        ({"patience": 3}, "patience: expected held-out data with it, got 3 alone"),
        ({"validate_every": 3}, "validate_every: expected held-out data with it, got 3 alone"),
        (
            {"validation_objective": Trace_ELBO()},
            "validation_objective: expected held-out data with it, got Trace_ELBO alone",
        ),
        ({"validation": {"x": C}}, "validation: expected arrays ['c', 'x'], got ['x']"),
        ({"validation": DATA, "patience": 0}, "patience: expected a whole number from 1, got 0"),
        ({"validation": 1.5}, "validation: expected held-out data or a fraction above 0"),
        ({"validation": 0.001}, "validation: expected a fraction that leaves data on both sides"),
        (
            {"validation": {"c": C, "x": np.zeros((24, 2), np.float32)}},
            "validation['x']: expected shape (N), as in training, got (24, 2)",
        ),
        (
            {"objective": KLWarmUp(Trace_ELBO(), 6)},
            "objective: expected a warm-up within the training's 5 steps, got one of 6",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    assert message in refused(**settings)


@pytest.mark.parametrize("value", [2.5, True, "3", 0])
def test_whole_numbers(value):
    with pytest.raises(ValueError, match=f"n: expected a whole number from 1, got {value!r}"):
        require_whole("n", value, 1)


@pytest.mark.parametrize("batch_size", [2.0, True, "4"])
def test_a_batch_size_is_an_integer(batch_size):
    text = refused(batch_size=batch_size, error=TypeError)
    assert f"batch_size: expected an integer or None, got {batch_size!r}" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": numpyro.optim.Adam(1e-2)},
            "optimizer: expected an Optax gradient transformation, got numpyro.optim.Adam; write "
            "optax.adam(1e-2)",
        ),
        ({"optimizer": 0.1}, "got builtins.float; write optax.adam(1e-2)"),
        ({"optimizer": optax.adam}, "write optax.adam(1e-2)"),
        (
            {"objective": "Trace_ELBO"},
            "objective: expected a NumPyro ELBO object, got the name 'Trace_ELBO'",
        ),
        ({"objective": Trace_ELBO}, "got the class Trace_ELBO; write Trace_ELBO()"),
        (
            {"validation": DATA, "validation_objective": Trace_ELBO},
            "validation_objective: expected a NumPyro ELBO object, got the class",
        ),
        (
            {"learning_rate": 0.01},
            "learning_rate: expected a setting of fit, got learning_rate=0.01",
        ),
        ({"learning_rate": 0.01}, "optimizer=optax.adam(1e-2)"),
        ({"init_params": {}}, "write init="),
        ({"epochs": 3}, "write num_epochs="),
        ({"wrong": 3}, "wrong: expected a setting of fit, got wrong=3"),
    ],
)
def test_what_users_of_other_libraries_write_is_answered(settings, message):
    assert message in refused(**settings, error=TypeError)


def test_a_mesh_has_axes_for_data_and_seeds_alone():
    mesh = jax.make_mesh((1,), ("batch",))
    message = refused(mesh=mesh)
    assert 'mesh: expected the axes "data", "seed" or both, got (\'batch\',)' in message


# --- data -----------------------------------------------------------------------------------------


def test_data_without_names_are_refused():
    assert 'write {"x": array}' in refused(data=C, error=TypeError)


def test_arrays_that_the_programs_do_not_take_are_named():
    text = refused(data=DATA | {"y": C})
    assert text.startswith(
        "data['y']: expected arrays that the model takes by name, which are c, x"
    )


def test_arrays_that_the_programs_lack_are_named():
    assert refused(data={"x": C}).startswith("model: expected data for its argument 'c', got x")


def test_integers_that_the_device_cannot_hold_are_named():
    text = refused(data={"c": C, "x": np.full(24, 3_000_000_000)})
    assert text.startswith("data['x']: expected numbers from -2147483648 to 2147483647")
    assert "3000000000" in text


def test_prepared_data_are_not_prepared_again():
    text = refused(data=Prepared(DATA), preprocess=lambda key, batch: batch)
    assert text.startswith("data: expected data as preprocess takes them, got Prepared ones")


def pixels(scale):
    """Four pixels a datum, floats from 0 to ``scale``."""
    return {"x": (scale * RNG.integers(0, 2, (24, 4))).astype(np.float32)}


def bernoulli(x=None):
    logit = numpyro.param("logit", 0.0)
    with numpyro.plate("rows", 1 if x is None else len(x)):
        numpyro.sample("x", dist.Bernoulli(logits=logit).expand([4]).to_event(1), obs=x)


def test_values_outside_the_support_are_refused():
    programs, settings = (bernoulli, no_latents), {"num_steps": 1, "progress": False}
    text = refused(programs, pixels(255))
    assert text.startswith("site 'x': expected values in the support of its distribution")
    assert "range from 0 to 255; rescale or binarise the data" in text
    late = pixels(1)
    late["x"][-1, -1] = 7  # in the last datum alone
    assert "got 1 outside" in refused(programs, late)
    assert "got 1 outside" in refused(programs, pixels(1), validation=late)
    text = refused(programs, pixels(1), preprocess=lambda key, batch: {"x": batch["x"] * 255})
    assert "range from 0 to 255" in text
    halved = fit(
        *programs, pixels(255), preprocess=lambda key, batch: {"x": batch["x"] / 255}, **settings
    )
    assert np.isfinite(halved.elbo).all()


def test_a_support_that_depends_on_a_parameter_is_not_checked():
    def bounded(x=None):
        top = numpyro.param("top", 300.0)
        with numpyro.plate("rows", 1 if x is None else len(x)):
            numpyro.sample("x", dist.Uniform(0.0, top).expand([4]).to_event(1), obs=x)

    result = fit(bounded, no_latents, pixels(255), num_steps=1, progress=False)
    np.testing.assert_allclose(result.elbo, -4 * np.log(300), rtol=1e-5)


def test_the_models_own_check_is_made_of_the_data_as_they_are():
    class Picky:
        def check_data(self, **data):
            if (data["x"] > 9).any():
                raise ValueError("x: expected at most 9, got more")

        def __call__(self, c, x=None):
            model(c, x)

    far = DATA | {"x": DATA["x"] + 10}
    assert "expected at most 9" in refused((Picky(), guide), far)
    assert "expected at most 9" in refused((Picky(), guide), DATA, validation=far)
    settings = {"num_steps": 1, "progress": False}  # prepared data are no longer as they were
    assert np.isfinite(fit(Picky(), guide, Prepared(far), **settings).elbo).all()


# --- programs -------------------------------------------------------------------------------------


def test_a_program_that_needs_values_is_told_which():
    def counting(c, x=None):
        with numpyro.plate("groups", len(np.unique(c))):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
        model(c, x)

    text = refused((counting, AutoNormal(counting)), batch_size=None)
    assert "expected a program that runs on the shapes of its arguments" in text
    assert "needs the values of 'c'" in text


def test_a_plate_that_draws_batches_is_refused():
    def drawing(c, x=None):
        with numpyro.plate("rows", 24, subsample_size=16):
            z = numpyro.sample("z", dist.Normal(c, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert "subsample_size 16" in refused((drawing, guide))


def test_numbers_of_each_datum_are_refused_on_batches_and_on_held_out_data():
    def table(c, x):
        z_loc = numpyro.param("z_loc", jnp.zeros(len(c)))
        with numpyro.plate("rows", len(c)):
            numpyro.sample("z", dist.Normal(z_loc, 1.0))

    text = refused((model, table))
    assert "guide: expected parameters of one shape" in text
    assert "'z_loc'" in text
    text = refused((model, table), batch_size=None, validation=0.25)
    assert text.startswith("validation: expected a guide for data that it has not seen")


def test_without_a_plate_batches_and_held_out_data_are_refused():
    def plateless(c, x=None):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(m * c, 1.0), obs=x)

    def plateless_guide(c, x):
        numpyro.sample("m", dist.Normal(numpyro.param("m_loc", 0.0), 1.0))

    programs = plateless, plateless_guide
    assert "with a plate for its data, to train on batches of 16" in refused(programs)
    text = refused(programs, batch_size=None, validation=0.25)
    assert text.startswith("validation: expected a model with a plate for its data")


def mixture(c, x=None):
    with numpyro.plate("rows", len(c)):
        k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        loc = numpyro.param("loc", 0.5) * jnp.where(k == 1, c, -c)
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_discrete_latent_sites_need_an_objective_that_sums():
    text = refused((mixture, no_latents))
    assert text.startswith("model site 'k': expected a continuous latent site")
    assert "TraceEnum_ELBO" in text
    assert fit(
        mixture, no_latents, DATA, objective=TraceEnum_ELBO(), num_steps=1, progress=False
    ).elbo.shape == (1, 1)


def test_programs_without_parameters_leave_nothing_to_train():
    def fixed(c, x=None):
        with numpyro.plate("rows", len(c)):
            numpyro.sample("x", dist.Normal(c, 1.0), obs=x)

    assert "parameter" in refused((fixed, no_latents))


def test_exact_divergences_need_the_models_order():
    def chain(c, x=None):
        with numpyro.plate("rows", len(c)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def backwards(c, x):
        with numpyro.plate("rows", len(c)):
            b = numpyro.sample("b", dist.Normal(numpyro.param("weight", 0.5) * x, 1.0))
            numpyro.sample("a", dist.Normal(b / 2, 0.5**0.5))

    text = refused((chain, backwards), objective=TraceMeanField_ELBO())
    assert "use Trace_ELBO" in text
