"""Convolutions between the image and the dense layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO

from models import guides, vae
from models.conditions import Labels
from models.likelihoods import LIKELIHOODS, Gaussian
from models.networks import Decoder, Encoder, Grow, Shrink, convolve

KEY = jax.random.key(0)
SIZES = {"channels": (4, 6)}


@pytest.mark.parametrize(
    ("x_shape", "likelihood", "condition", "channels"),
    [((8, 12), "bernoulli", None, (4, 6)), ((4, 8, 3), "gaussian", Labels(3), (4,))],
)
def test_gradients_reach_every_weight(x_shape, likelihood, condition, channels, rng):
    model = vae.Model(
        condition,
        x_shape=x_shape,
        likelihood=LIKELIHOODS[likelihood],
        num_latents=3,
        hidden=(5,),
        channels=channels,
    )
    guide = guides.mean_field(model)
    images = rng.integers(0, 256, (6, *x_shape), dtype=np.uint8)
    data = jax.jit(model.prepare)(KEY, {"x": images})
    if condition is not None:
        data["c"] = jnp.asarray(np.arange(6) % 3)

    def differentiate(params):
        return jax.grad(lambda p: Trace_ELBO().loss(KEY, p, model, guide, **data))(params)

    svi = SVI(model, guide, optax.sgd(0.0), Trace_ELBO())
    shapes = jax.eval_shape(lambda key: svi.get_params(svi.init(key, **data)), KEY)
    statistics = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), shapes.pop("statistics"))
    params = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape) / 3), shapes)
    gradient = jax.device_get(jax.jit(differentiate)(params | {"statistics": statistics}))
    assert gradient.keys() == {"encoder", "decoder", "statistics"}
    del gradient["statistics"]  # no optimiser moves them
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


def test_an_image_is_encoded_alone():
    x = jax.random.uniform(KEY, (3, 8, 8, 3))

    @jax.jit
    def encode(x):
        encoder = Encoder((8, 8, 3), (5,), 6, **SIZES, rngs=nnx.Rngs(0))
        return encoder(x), jax.lax.map(lambda one: encoder(one[None])[0], x)

    together, alone = encode(x)
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def test_the_interval_of_x_is_seen_as_zero_to_one(rng):
    @jax.jit
    def run(x):
        views = (Gaussian(low=low).view for low in (0.0, -1.0))
        unit, wide = (Encoder((5,), (), 6, view=view, rngs=nnx.Rngs(0)) for view in views)
        return wide(2 * x - 1), unit(x)

    wide, unit = run(rng.uniform(size=(4, 5)).astype(np.float32))
    np.testing.assert_allclose(wide, unit, rtol=1e-4, atol=1e-5)


def test_shapes_shrink_and_grow():
    def run(x):
        sizes = (8, 16, 3), (4, 6)
        h = Shrink(*sizes, jax.nn.relu, "float32", rngs=nnx.Rngs(0))(x)
        grow = Grow(*sizes, 2, jax.nn.relu, "float32", rngs=nnx.Rngs(0))
        return h, grow(h.reshape(2, -1))

    h, grown = jax.eval_shape(run, jnp.zeros((2, 8, 16, 3)))
    assert h.shape == (2, 2, 4, 6)
    assert grown.shape == (2, 2, 8, 16, 3)


def test_a_gate_doubles_the_channels_in_front_of_it():
    """Shapes, and the numbers of weights: a stage has a convolution, and a norm of its channels."""
    x_shape, channels = (8, 12, 3), (4, 6)

    def conv(num_in, num_out):
        return 9 * num_in * num_out + num_out

    def num_weights(module):
        return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))

    shrink = conv(3, 2 * 4) + 2 * 2 * 4 + conv(4, 2 * 6) + 2 * 2 * 6
    grow = 2 * 2 * 6 + conv(6, 4 * 2 * 4) + 2 * 2 * 4 + conv(4, 4 * 2 * 3)
    small = 2 * 3 * 6  # numbers between convolutions and dense layers
    dense = (small * 10 + 10) + (5 * 7 + 7), (3 * 10 + 10) + (5 * 2 * small + 2 * small)

    def run(x, z):
        rest = {"activation": jax.nn.glu, "rngs": nnx.Rngs(0)}
        modules = (
            Shrink(x_shape, channels, dtype="float32", **rest),
            Grow(x_shape, channels, 2, dtype="float32", **rest),
            Encoder(x_shape, (5,), 7, channels=channels, **rest),
            Decoder(3, (5,), x_shape, num_outputs=2, channels=channels, **rest),
        )
        counts.extend(map(num_weights, modules))
        h = jnp.zeros((2, *modules[1].shape))
        return [f(a) for f, a in zip(modules, (x, h.reshape(2, -1), x, z), strict=True)]

    counts = []
    outputs = jax.eval_shape(run, jnp.zeros((2, *x_shape)), jnp.zeros((2, 3)))
    assert counts == [shrink, grow, shrink + dense[0], grow + dense[1]]
    assert [o.shape for o in outputs] == [(2, 2, 3, 6), (2, 2, *x_shape), (2, 7), (2, 2, *x_shape)]


def test_a_stage_with_a_gate_by_hand(rng):
    @jax.jit
    def run(x):
        shrink = Shrink((4, 6, 3), (5,), jax.nn.glu, "float32", rngs=nnx.Rngs(0))
        return shrink(x), shrink.norms[0](shrink.layers[0](x))

    got, h = jax.device_get(run(np.float32(rng.normal(size=(2, 4, 6, 3)))))
    np.testing.assert_allclose(got, h[..., :5] / (1 + np.exp(-h[..., 5:])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(8, 6), (5, 4), (2, 2)])
def test_a_convolution_by_a_product_of_matrices_is_xlas(stride, sides, rng):
    x, kernel = (np.float32(rng.normal(size=shape)) for shape in ((2, *sides, 3), (3, 3, 3, 5)))

    @jax.jit
    def run(x, kernel):
        numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        arguments = (x, kernel, (stride, stride), "SAME")
        return convolve(*arguments, **numbers), jax.lax.conv_general_dilated(*arguments, **numbers)

    ours, xlas = run(x, kernel)
    np.testing.assert_allclose(ours, xlas, rtol=1e-4, atol=1e-4)


def test_channels_become_pixels(rng):
    """One stage by loops: pixel (2 i + a, 2 j + b) is channel block (a, b) of feature (i, j)."""

    @jax.jit
    def run(h):
        grow = Grow((4, 6, 2), (5,), 1, jnp.tanh, "float32", rngs=nnx.Rngs(0))
        return grow(h.reshape(1, -1)), grow.layers[0](jnp.tanh(grow.norms[0](h)))

    got, features = jax.device_get(run(np.float32(rng.normal(size=(1, 2, 3, 5)))))
    for i, j, a, b in np.ndindex(2, 3, 2, 2):
        block = 2 * (2 * a + b)
        np.testing.assert_allclose(
            got[0, 0, 2 * i + a, 2 * j + b], features[0, i, j, block : block + 2], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x_shape": (8, 6)}, r"x_shape: expected sides that 4 divides, .* got \(8, 6\)"),
        ({"x_shape": (2, 8, 3)}, "x_shape: expected sides that 4 divides"),
        ({"x_shape": (8, 8), "channels": (4, 0)}, r"channels: expected positive .* got \(4, 0\)"),
    ],
)
def test_sides_that_cannot_be_halved_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        vae.Model(**SIZES | settings)


def test_bfloat16_computes_coarsely_and_returns_float32(rng):
    @jax.jit
    def encode(x):
        make = functools.partial(Encoder, (4, 4, 3), (), 6, channels=(4,))
        return [make(dtype=dtype, rngs=nnx.Rngs(0))(x) for dtype in ("float32", "bfloat16")]

    fine, coarse = jax.device_get(encode(rng.uniform(size=(2, 4, 4, 3)).astype(np.float32)))
    assert coarse.dtype == fine.dtype == jnp.float32
    assert 0 < abs(fine - coarse).max() < 0.1 * abs(fine).max() + 0.05
