"""Networks: one parameter of a program, and arithmetic that NumPy can repeat."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpyro import handlers
from scipy import special

from models.conditions import Values
from models.networks import (
    MLP,
    SCALE_FLOOR,
    GaussianMLP,
    PriorNetwork,
    gates,
    network,
    softplus,
)

SIZES = (3, 5, 4, 2)


def build(rngs):
    return MLP(SIZES, jnp.tanh, "float32", rngs=rngs)


def program(x):
    return network("net", build)(x)


@jax.jit
def initial(key):
    """The value of the program's parameter."""
    site = handlers.trace(handlers.seed(program, key)).get_trace(jnp.zeros((1, 3)))["net"]
    assert site["type"] == "param"
    return site["value"]


@pytest.fixture(scope="module")
def params():
    return initial(jax.random.key(0))


@pytest.fixture
def x(rng):
    return jnp.asarray(np.float32(rng.normal(size=(6, 3))))


def layers(params):
    """(kernel, bias) of every layer, in float64."""
    by_depth = params["layers"]
    return [
        tuple(np.asarray(by_depth[i][name], np.float64) for name in ("kernel", "bias"))
        for i in sorted(by_depth)
    ]


def forward(params, x, activation=np.tanh):
    h = np.asarray(x, np.float64)
    *hidden, last = layers(params)
    for kernel, bias in hidden:
        h = activation(h @ kernel + bias)
    return h @ last[0] + last[1]


def filled(params, rng):
    """Parameters of the same shapes, biases included, drawn anew."""
    return jax.tree.map(lambda p: jnp.asarray(np.float32(rng.normal(size=p.shape))), params)


# --- one parameter of a program -------------------------------------------------------------------


def test_a_network_is_one_parameter_a_tree_of_float32(params):
    sites = {}
    run = lambda x: sites.update(handlers.trace(handlers.seed(program, 0)).get_trace(x))  # noqa: E731
    jax.eval_shape(run, jnp.zeros((1, 3)))
    assert list(sites) == ["net"]
    shapes = [p.shape for p in jax.tree.leaves(params)]
    expected = [s for n, m in itertools.pairwise(SIZES) for s in ((n, m), (m,))]
    assert sorted(shapes) == sorted(expected)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_every_key_starts_elsewhere_under_vmap_as_alone():
    keys = jax.random.split(jax.random.key(1), 3)
    together = jax.jit(jax.vmap(initial))(keys)
    alone = initial(keys[2])
    for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(many[2], one, rtol=1e-6)
    for kernel, _ in layers(together):
        assert len(np.unique(kernel, axis=0)) == 3
    for kernel, _ in layers(alone):  # nor are units of a layer each other's copies
        assert len(np.unique(kernel, axis=1).T) == kernel.shape[1]


def test_two_networks_of_one_program_start_differently():
    def two():
        network("first", build)
        network("second", build)

    @jax.jit
    def start():
        sites = handlers.trace(handlers.seed(two, 0)).get_trace()
        return [sites[name]["value"] for name in ("first", "second")]

    first, second = (layers(value)[0][0] for value in start())
    assert (first != second).all()


def test_what_is_substituted_is_what_computes_and_needs_no_key(params, x, rng):
    params = filled(params, rng)
    output = handlers.substitute(program, {"net": params})(x)
    np.testing.assert_allclose(output, forward(params, x), rtol=1e-5, atol=1e-5)


def test_compiled_is_eager(params, x):
    run = lambda params, x: handlers.substitute(program, {"net": params})(x)  # noqa: E731
    np.testing.assert_allclose(jax.jit(run)(params, x), run(params, x), rtol=1e-5, atol=1e-6)


def test_every_parameter_has_a_gradient(params, x, rng):
    params = filled(params, rng)
    loss = lambda p: (handlers.substitute(program, {"net": p})(x) ** 2).sum()  # noqa: E731
    gradients = jax.device_get(jax.jit(jax.grad(loss))(params))
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
        assert (gradient != 0).all()


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class LayerNormalised(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize(("module", "what"), [(Normalised, "norm"), (Dropped, "drop")])
def test_a_state_beside_the_parameters_is_refused_by_name(module, what):
    message = f"network 'net': expected .* got {module.__name__} with {what} beside them"
    with pytest.raises(TypeError, match=message), handlers.seed(rng_seed=0):
        network("net", module)


def test_what_is_no_module_is_refused():
    message = "network 'net': expected a Flax NNX module, got .*; return a subclass"
    with pytest.raises(TypeError, match=message), handlers.seed(rng_seed=0):
        network("net", lambda rngs: jnp.zeros(3))


def test_layer_normalisation_has_no_state(x):
    run = handlers.seed(lambda x: network("net", LayerNormalised)(x), rng_seed=0)
    output = jax.jit(run)(x)
    x = np.asarray(x)
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


# --- multilayer perceptrons -----------------------------------------------------------------------


def of(module, params):
    """The module with other parameters."""
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def built(make, rng):
    """A module with parameters drawn anew. Its own start is not computed."""
    module = nnx.eval_shape(make)
    return of(module, filled(pure(module), rng))


def compiled(module):
    return jax.jit(lambda *arrays: module(*arrays))


def pure(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def test_without_hidden_layers_it_is_affine(x, rng):
    mlp = built(lambda: MLP((3, 2), jnp.tanh, "float32", rngs=nnx.Rngs(0)), rng)
    ((kernel, bias),) = layers(pure(mlp))
    np.testing.assert_allclose(mlp(x), np.asarray(x) @ kernel + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "in_numpy"),
    [(jax.nn.relu, lambda h: np.maximum(h, 0)), (jax.nn.softplus, lambda h: np.logaddexp(0, h))],
)
def test_activations_follow_every_layer_but_the_last(activation, in_numpy, x, rng):
    mlp = built(lambda: MLP(SIZES, activation, "float32", rngs=nnx.Rngs(0)), rng)
    batch = np.stack([x, 2 * np.asarray(x)])  # any axes before the last
    expected = forward(pure(mlp), batch, in_numpy)
    np.testing.assert_allclose(compiled(mlp)(batch), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(x, rng):
    mlp = nnx.eval_shape(lambda: MLP(SIZES, jnp.tanh, "bfloat16", rngs=nnx.Rngs(0)))
    params = filled(pure(mlp), rng)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(pure(mlp)))
    output = compiled(of(mlp, params))(x)
    assert output.dtype == jnp.float32

    # Each layer rounds its input, kernel, bias, product and sum to 8 bits, the activation once
    # more; tanh enlarges no error.
    h, error, unit = np.asarray(x, np.float64), 0.0, 2.0**-8
    for kernel, bias in layers(params):
        terms = abs(h) @ abs(kernel) + abs(bias)
        error = (error + np.zeros_like(h)) @ abs(kernel) + 5 * unit * terms
        h, error = np.tanh(h @ kernel + bias), error + unit
    difference = abs(np.asarray(output) - forward(params, x))
    assert (difference < error).all()
    assert difference.max() > 2.0**-12  # float32 would be nearer


def test_a_gaussian_mlp_is_a_location_and_a_positive_scale(x, rng):
    module = built(lambda: GaussianMLP(SIZES, jnp.tanh, "float32", rngs=nnx.Rngs(0)), rng)
    loc, scale = compiled(module)(x)
    assert loc.shape == scale.shape == (6, 2)
    expected = forward(pure(module)["mlp"], x)
    np.testing.assert_allclose(loc, expected[:, :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scale, np.logaddexp(0, expected[:, 2:]) + SCALE_FLOOR, rtol=1e-4)


def test_a_prior_network_sees_the_condition_and_more(rng):
    module = built(lambda: PriorNetwork(Values((2,)), (), 3, num_more=4, rngs=nnx.Rngs(0)), rng)
    c, more = (np.float32(rng.normal(size=shape)) for shape in ((5, 2), (5, 2, 2)))
    loc, scale = compiled(module)(c, more)
    inputs = np.concatenate([c, more.reshape(5, 4)], axis=1)
    expected = forward(pure(module)["mlp"]["mlp"], inputs)
    np.testing.assert_allclose(loc, expected[:, :3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scale, np.logaddexp(0, expected[:, 3:]) + SCALE_FLOOR, rtol=1e-4)


def test_sizes_are_positive():
    with pytest.raises(ValueError, match=r"MLP: expected positive sizes, got \(3, 0, 2\)"):
        MLP((3, 0, 2), jnp.tanh, "float32", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_of_a_gaussian_mlp_has_a_floor(dtype):
    module = nnx.eval_shape(lambda: GaussianMLP((1, 1), jnp.tanh, dtype, rngs=nnx.Rngs(0)))
    layer = {"kernel": np.ones((1, 2), np.float32), "bias": np.zeros(2, np.float32)}
    module = of(module, {"mlp": {"layers": {0: jax.tree.map(jnp.asarray, layer)}}})
    raw = np.float32([[-1e30], [-1e4], [-20.0], [0.0], [1e4], [1e30]])

    @jax.jit
    def run(raw):
        slope = jax.vmap(jax.grad(lambda r: jnp.log(module(r)[1]).sum()))
        return module(raw)[1], slope(raw)

    scale, gradients = jax.device_get(run(raw))
    assert np.isfinite(scale).all()
    assert (scale >= np.float32(SCALE_FLOOR)).all()
    np.testing.assert_allclose(scale[:2, 0], SCALE_FLOOR, rtol=1e-6)
    assert np.isfinite(gradients).all()


def test_parameters_of_another_network_are_refused():
    def program(size):
        return network("net", lambda rngs: MLP((2, size, 1), jnp.tanh, "float32", rngs=rngs))

    params = handlers.trace(handlers.seed(program, 0)).get_trace(3)["net"]["value"]
    handlers.substitute(program, {"net": params})(3)
    message = r"network 'net': expected \['layers'\]\[0\]\['bias'\] of shape \(4,\), got \(3,\)"
    with pytest.raises(ValueError, match=message):
        handlers.substitute(program, {"net": params})(4)
    seeds = jax.tree.map(lambda p: jnp.stack([p, p]), params)
    with pytest.raises(ValueError, match=r"got \(2, 3\), .* or to several seeds: take one"):
        handlers.substitute(program, {"net": seeds})(3)
    with pytest.raises(ValueError, match="expected parameters or a random key, got neither"):
        handlers.trace(program).get_trace(3)


# --- gates ----------------------------------------------------------------------------------------


def test_a_gate_takes_more_numbers_than_it_gives():
    assert [gates(f) for f in (jax.nn.relu, jnp.tanh, softplus)] == [1, 1, 1]
    assert gates(jax.nn.glu) == 2
    assert gates(lambda h: jnp.split(h, 3, axis=-1)[0]) == 3


@pytest.mark.parametrize(
    ("activation", "got"), [(lambda h: h[..., :7], 7), (lambda h: h[..., :0], 0)]
)
def test_an_activation_of_other_lengths_is_refused(activation, got):
    message = rf"^activation: expected as many numbers as it takes, .*, got {got} from 60; give"
    with pytest.raises(ValueError, match=message) as caught:
        MLP(SIZES, activation, "float32", rngs=nnx.Rngs(0))
    assert "\n" not in str(caught.value)


def test_an_mlp_with_a_gate_is_its_first_half_times_the_sigmoid_of_its_second(x, rng):
    module = built(lambda: MLP(SIZES, jax.nn.glu, "float32", rngs=nnx.Rngs(0)), rng)
    params = pure(module)
    assert [kernel.shape for kernel, _ in layers(params)] == [(3, 10), (5, 8), (4, 2)]

    def gate(h):
        first, second = np.split(h, 2, axis=-1)
        return first * special.expit(second)

    expected = forward(params, x, gate)
    np.testing.assert_allclose(compiled(module)(x), expected, rtol=1e-5, atol=1e-5)


# --- softplus -------------------------------------------------------------------------------------


def test_softplus_and_its_gradient_are_exact_at_every_size():
    x = np.concatenate([np.linspace(-1000, 1000, 4001), np.linspace(-20, 20, 801)])
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(softplus)))(np.float32(x))
    np.testing.assert_allclose(value, np.logaddexp(0, x), rtol=3e-7, atol=3e-7)
    # float32 holds x to 2^-24, so exp(x) to |x| 2^-24
    np.testing.assert_allclose(slope, special.expit(x), rtol=20 * 2**-23, atol=2**-60)
