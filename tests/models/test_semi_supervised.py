"""M2: a variational autoencoder with labels for some of the images."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx
from jax import random
from numpyro.infer import TraceEnum_ELBO

from inference import Fit, pointwise_elbo, predict
from inference.sites import trace_of
from models import guides, semi_supervised, vae
from models.conditions import Labels
from models.densities import Folded
from models.likelihoods import Bernoulli, Gaussian, Normal
from models.networks import Decoder
from models.priors import LearnedNormal

K, N = 3, 4
MODEL = semi_supervised.Model(num_classes=K, x_shape=(5,), num_latents=2, hidden=(6,))
RNG = np.random.default_rng(0)
X = RNG.integers(0, 2, (N, 5)).astype(np.float32)
HIDDEN = np.full(N, -1, np.int32)


def params_of(guide, data):
    """Parameters that no training made."""
    params = {}
    for program in (guide, guide.model):
        sites = trace_of(program, random.key(1), {}, **data).items()
        params |= {n: s["value"] for n, s in sites if s["type"] == "param"}
    return jax.tree.map(lambda p: 3 * p, params)


@pytest.fixture(scope="module")
def result():
    guide = semi_supervised.Guide(MODEL)
    data = {"x": jnp.asarray(X), "y": jnp.asarray(HIDDEN)}
    return Fit.from_params(MODEL, guide, params_of(guide, data), example=data)


def test_the_bounds_of_the_paper_hold_together(result):
    """Equation 7: without its label a datum's bound is the mean of its labelled bounds less log q.

    All have the same draws of z, so this holds to rounding.
    """
    labelled = np.stack(
        [
            pointwise_elbo(result, {"x": X, "y": np.full_like(HIDDEN, k)}).pointwise[0]
            for k in range(K)
        ]
    )
    q = predict(result, {"x": X, "y": HIDDEN}, num_samples=1).by_guide.probs[0].T
    expected = (q * (labelled - np.log(q))).sum(0)
    found = pointwise_elbo(result, {"x": X, "y": HIDDEN}).pointwise[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    mixed = np.array([0, -1, 2, -1], np.int32)
    both = pointwise_elbo(result, {"x": X, "y": mixed}).pointwise[0]
    np.testing.assert_allclose(
        both, [labelled[0, 0], found[1], labelled[2, 2], found[3]], rtol=1e-5
    )


def test_all_labels_are_one_call_of_the_decoder(result, monkeypatch):
    rows = []
    call = Decoder.__call__

    def spy(self, z, c=None):
        rows.append(len(z))
        return call(self, z, c)

    monkeypatch.setattr(Decoder, "__call__", spy)
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    params = result.params_of(0)
    data = {"x": jnp.asarray(X), "y": jnp.asarray(HIDDEN)}
    programs = result.model, result.guide
    jax.eval_shape(lambda p: objective.loss(random.key(0), p, *programs, **data), params)
    assert K * N in rows
    assert set(rows) <= {N, K * N}  # NumPyro also looks at the programs without the sum


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.glu])
def test_the_encoder_is_a_network_on_the_image_and_the_label(activation):
    """To look at the image once saves time and changes nothing."""
    guide = semi_supervised.Guide(replace(MODEL, activation=activation))
    encoder = guide._encoder(nnx.Rngs(0))
    y = jnp.array([0, 2, 1, 1])
    loc, scale = encoder(jnp.asarray(X), y)
    first = encoder.trunk.mlp.layers[0]
    kernel = jnp.concatenate([first.kernel[...], encoder.label.kernel[...]])
    seen = jnp.concatenate([Bernoulli().view(jnp.asarray(X)), jax.nn.one_hot(y, K)], axis=1)
    h = activation(seen @ kernel + first.bias[...])
    expected = jnp.split(encoder.mlp(h), 2, axis=-1)[0]
    np.testing.assert_allclose(loc, expected, rtol=1e-5, atol=1e-6)
    every, _ = encoder(jnp.asarray(X), jnp.arange(K)[:, None])
    np.testing.assert_allclose(every[y, jnp.arange(N)], loc, rtol=1e-5, atol=1e-6)
    assert scale.shape == (N, 2)


CONVOLUTIONS = {"x_shape": (4, 4), "channels": (8,), "likelihood": Gaussian()}
CONDITION = {
    "condition": Labels(2),
    "prior": LearnedNormal((3,)),
    "likelihood": Normal(),
    "activation": jax.nn.glu,
}


@pytest.mark.parametrize(
    ("make", "changes", "c"),
    [
        (semi_supervised.Guide, CONDITION, np.arange(N) % 2),
        pytest.param(semi_supervised.Guide, CONVOLUTIONS, None, marks=pytest.mark.slow),
        pytest.param(guides.structured, CONVOLUTIONS, None, marks=pytest.mark.slow),
        pytest.param(guides.structured, CONDITION, np.arange(N) % 2, marks=pytest.mark.slow),
    ],
)
def test_every_architecture_has_a_bound(make, changes, c):
    """Any likelihood, prior, condition and network, with its own guide and with a family."""
    model = semi_supervised.Model(**{"num_classes": K, "x_shape": (5,), "hidden": (6,)} | changes)
    x = RNG.uniform(0.1, 0.9, (N, *model.x_shape)).astype(np.float32)
    data = {"x": jnp.asarray(x), "y": jnp.array([0, -1, 2, -1])}
    data |= {} if c is None else {"c": jnp.asarray(c)}
    guide, objective = make(model), TraceEnum_ELBO(max_plate_nesting=1)

    @jax.jit
    def loss_and_gradient():
        params = params_of(guide, data)
        loss = lambda p: objective.loss(random.key(0), p, model, guide, **data)  # noqa: E731
        free = {n: p for n, p in params.items() if n != "statistics"}
        return jax.value_and_grad(lambda p: loss(params | p))(free)

    loss, gradient = loss_and_gradient()
    assert np.isfinite(loss)
    for name, tree in gradient.items():
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(tree)), name
        assert any((np.asarray(g) != 0).any() for g in jax.tree.leaves(tree)), name


def test_a_folded_density_is_the_same_density():
    loc = jnp.asarray(RNG.normal(size=(6, 5)))
    folded = Folded(dist.Normal(loc, 0.5), (3, 2)).to_event(1)
    plain = dist.Normal(loc.reshape(3, 2, 5), 0.5).to_event(1)
    x = jnp.asarray(RNG.normal(size=(2, 5)))
    np.testing.assert_allclose(folded.log_prob(x), plain.log_prob(x), rtol=1e-6)
    assert folded.batch_shape == (3, 2)
    np.testing.assert_allclose(folded.mean, plain.mean)
    draws = folded.sample(random.key(0), (2000,))
    assert draws.shape == (2000, 3, 2, 5)
    error = abs(draws.mean(0) - plain.mean)
    assert (error < 5 * 0.5 / 2000**0.5).all()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 1, 2, 3], r"y: expected labels of shape \(N,\) from 0 to 2, and -1 .*got .* 3"),
        ([0, 1, -2, -1], "y: expected labels .*got .* -2"),
        ([0.0, 1, 2, -1], "y: expected labels as integers, .* got float"),
        ([[0], [1], [2], [-1]], r"got shape \(4, 1\)"),
    ],
)
def test_labels_that_cannot_be_are_one_line(y, message):
    with pytest.raises(ValueError, match=message) as caught:
        MODEL.check_data(x=X, y=np.array(y))
    assert "\n" not in str(caught.value)


def test_a_model_needs_two_labels():
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        semi_supervised.Model(num_classes=1)
    assert isinstance(MODEL, vae.Model)
