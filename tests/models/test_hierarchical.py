"""Several stochastic layers: the exact Normal of a linear model, and what each guide must lose."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density
from scipy import stats

from inference import (
    Held,
    decode,
    encode,
    fit,
    label_check,
    log_likelihood,
    pointwise_elbo,
    sample_prior_predictive,
)
from inference.sites import trace_of
from models import guides, hierarchical, vae
from models.conditions import Labels
from models.hierarchical import BottomUp, Layer, Model, TopDown, joint, product, stacked
from models.likelihoods import Gaussian, Normal
from models.networks import SCALE_FLOOR
from models.priors import LearnedNormal

KEY = jax.random.key(0)
D = 5
MEAN, UNIT = 1.0, 2.5
SETTINGS = {"x_shape": (D,), "num_latents": 3, "hidden": (), "likelihood": Normal(MEAN, UNIT)}
TWO = Model(**SETTINGS, above=(Layer(2),))
SKIPS = replace(TWO, skip=True)
THREE = Model(**SETTINGS | {"num_latents": 2}, above=(Layer(2), Layer(1)))


def params_of(program, **data):
    sites = trace_of(program, KEY, {}, **data)
    return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}


def any_params(model, rng, x):
    """A value for every parameter of a model, in the shapes that it asks for."""
    shapes = jax.eval_shape(lambda: params_of(model, x=x))
    return jax.tree.map(lambda p: np.float32(rng.uniform(0.1, 0.9, p.shape)), shapes)


@functools.cache
def linear(model, is_orthogonal=False):
    """Parameters of a model without hidden layers whose scales depend on nothing.

    With orthogonal columns the pixels tell of each dimension of z_1 alone.
    """
    rng = np.random.default_rng(2)
    params = any_params(model, rng, jnp.zeros((1, D)))
    params["x_scale"] = np.float32(rng.uniform(0.6, 1.2, D) / UNIT)
    for i, size in enumerate(model.sizes[:-1], start=1):
        (layer,) = params[f"z{i}_from_above"]["mlp"]["layers"].values()
        shape = layer["kernel"].shape
        kernel, raw = rng.normal(size=(shape[0], size)), np.log(np.expm1(0.6))
        layer["kernel"] = np.float32(np.concatenate([kernel, np.zeros_like(kernel)], axis=1))
        layer["bias"] = np.float32(np.concatenate([rng.normal(size=size), np.full(size, raw)]))
    (layer,) = params["decoder"]["mlp"]["layers"].values()
    kernel = 0.8 * rng.normal(size=layer["kernel"].shape) / UNIT
    if is_orthogonal:
        columns = np.linalg.qr((kernel / params["x_scale"]).T)[0]
        kernel = 1.5 * columns.T * params["x_scale"]
    layer["kernel"], layer["bias"] = np.float32(kernel), np.float32(rng.normal(size=D) / UNIT)
    return params


def weights_of(params, site):
    """Matrix, offset and rest of the outputs of an affine network, in float64."""
    (layer,) = params[site]["mlp"]["layers"].values()
    return np.asarray(layer["kernel"], np.float64).T, np.asarray(layer["bias"], np.float64)


def by_hand(model, params):
    """Mean and covariance of u = M u + offset + noise, u = (z_1, ..., z_L, x): (I - M)^-1 ..."""
    starts = np.cumsum([0, *model.sizes])
    total = starts[-1] + D
    matrix, offset, deviation = np.zeros((total, total)), np.zeros(total), np.ones(total)
    for i, size in enumerate(model.sizes[:-1], start=1):
        kernel, bias = weights_of(params, f"z{i}_from_above")
        rows = slice(starts[i - 1], starts[i])
        matrix[rows, starts[i] : starts[i + 1]] = kernel[:size]
        offset[rows], deviation[rows] = bias[:size], np.logaddexp(0, bias[size:]) + SCALE_FLOOR
    kernel, bias = weights_of(params, "decoder")
    matrix[starts[-1] :, : kernel.shape[1]] = UNIT * kernel
    offset[starts[-1] :] = MEAN + UNIT * bias
    deviation[starts[-1] :] = UNIT * params["x_scale"]
    inverse = np.linalg.inv(np.eye(total) - matrix)
    return inverse @ offset, inverse @ np.diag(deviation**2) @ inverse.T


MODELS = {"two": TWO, "two, skip": SKIPS, "three": THREE}


@pytest.mark.parametrize("name", MODELS)
def test_the_exact_normal_is_the_programs(name, rng):
    """By hand, and log p(x, z) of the program at any values."""
    model, params = MODELS[name], linear(MODELS[name])
    loc, covariance = by_hand(model, params)
    exact = joint(model, params)
    np.testing.assert_allclose(exact.loc, loc, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(exact.covariance, covariance, rtol=1e-5, atol=1e-5)
    every = stats.multivariate_normal(loc, covariance)
    values = rng.normal(size=(4, len(loc)))
    *z, x = np.split(values.astype(np.float32), np.cumsum(model.sizes), axis=1)
    latents = dict(zip(model.names, z, strict=True))
    log_p = jax.jit(lambda p, x: log_density(model, (), {"x": x}, p)[0])(params | latents, x)
    np.testing.assert_allclose(log_p, every.logpdf(values).sum(), rtol=1e-4)
    start = sum(model.sizes)
    marginal = stats.multivariate_normal(loc[start:], covariance[start:, start:])
    np.testing.assert_allclose(exact.log_likelihood(x), marginal.logpdf(x), rtol=1e-5)
    precision = np.linalg.inv(covariance)[:start, :start]
    np.testing.assert_allclose(
        np.linalg.inv(exact.posterior_covariance), precision, rtol=1e-4, atol=1e-5
    )


def least(precision):
    """What a mean field loses where this is the precision."""
    return 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])


def test_the_least_loss_of_two_layers_is_the_formula():
    """The precision of z_1 and z_2 given x, from the weights."""
    params = linear(TWO)
    (above, raw), (decoder, _) = (weights_of(params, n) for n in ("z1_from_above", "decoder"))
    above, variance = above[:3], (np.logaddexp(0, raw[3:]) + SCALE_FLOOR) ** 2
    of_1 = np.diag(1 / variance) + decoder.T @ np.diag(params["x_scale"] ** -2.0) @ decoder
    of_2 = np.eye(2) + above.T @ np.diag(1 / variance) @ above
    across = -np.diag(1 / variance) @ above
    together = np.block([[of_1, across], [across.T, of_2]])
    first, second = (np.linalg.inv(np.linalg.inv(together)[c, c]) for c in np.s_[:3, 3:])
    exact = joint(TWO, params)
    gaps = exact.gap(), exact.gap((2, 1)), exact.gap((1, 2))
    expected = least(together), least(second) + least(of_1), least(first) + least(of_2)
    np.testing.assert_allclose(gaps, expected, rtol=1e-4)
    assert min(abs(np.subtract.outer(gaps, gaps))[np.triu_indices(3, 1)]) > 0.06  # two rooms
    assert min(gaps) > 0.06


# --- what the guides lose -------------------------------------------------------------------------

ROOM = 0.03  # nats per datum: how far a training may end from the best guide of a family


@functools.cache
def simulated(model, is_orthogonal=False):
    """Parameters, the exact Normal, data for training, and held-out data."""
    params = linear(model, is_orthogonal=is_orthogonal)
    exact, start = joint(model, params), sum(model.sizes)
    root = np.linalg.cholesky(exact.covariance[start:, start:])
    noise = np.random.default_rng(0).normal(size=(6000, D))
    x = (exact.loc[start:] + noise @ root.T).astype(np.float32)
    return params, exact, x[:4000], x[4000:]


def losses(model, guide, is_orthogonal=False, num_steps=3000):
    """A fit of the guide alone, and log p(x) - ELBO of each held-out datum."""
    params, exact, data, test = simulated(model, is_orthogonal)
    result = fit(
        Held(model, params),
        Held(guide, params),  # it may share networks with the model
        {"x": data},
        num_steps=num_steps,
        batch_size=100,
        optimizer=optax.adam(optax.cosine_decay_schedule(2e-2, num_steps)),
        progress=False,
    )
    elbo = pointwise_elbo(result, {"x": test}, num_samples=20).pointwise[0]
    return result, exact.log_likelihood(test) - elbo


GUIDES = {
    "mean-field": (guides.mean_field, None),
    "structured": (guides.structured, (2, 1)),
    "bottom-up": (BottomUp, (1, 2)),
    "full-covariance": (guides.full_covariance, ()),
}


def check_loss(loss, least):
    error = 4 * loss.std() / math.sqrt(len(loss))
    assert least - error - 1e-4 <= loss.mean() <= least + ROOM + error


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "bottom-up")) for n in GUIDES]
)
def test_a_guide_loses_what_it_must(name):
    family, order = GUIDES[name]
    num_steps = 12_000 if order == () else 3000  # numbers for a whole matrix
    result, loss = losses(TWO, family(TWO), num_steps=num_steps)
    _, exact, _, test = simulated(TWO)
    if order != ():
        check_loss(loss, exact.gap(order))
        return
    check_loss(loss, 0.0)
    judged = log_likelihood(result, {"x": test[:500]}, num_samples=400, batch_size=500)
    difference = judged.estimate[0] - exact.log_likelihood(test[:500]).mean()
    assert abs(difference) < 4 * judged.monte_carlo_error[0] + 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", [TopDown, guides.structured])
def test_where_z1_factorises_given_z2_top_down_loses_what_structured_does(family):
    _, exact, _, _ = simulated(TWO, True)
    gap = exact.gap((2, 1))
    assert gap > 2 * ROOM
    assert exact.gap() > gap + 2 * ROOM
    posterior = np.linalg.inv(exact.posterior_covariance)[:3, :3]
    np.testing.assert_allclose(posterior, np.diag(np.diag(posterior)), atol=1e-4)
    check_loss(losses(TWO, family(TWO), True)[1], gap)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "order"), [(guides.structured, (3, 2, 1)), (BottomUp, (1, 2, 3))]
)
def test_three_layers_are_drawn_in_order(family, order):
    _, exact, _, _ = simulated(THREE)
    orders = (1, 2, 3), (3, 2, 1)
    assert abs(exact.gap(orders[0]) - exact.gap(orders[1])) > 2 * ROOM
    check_loss(losses(THREE, family(THREE))[1], exact.gap(order))


# --- the programs ---------------------------------------------------------------------------------


def test_the_product_of_two_normals_is_proportional_to_theirs(rng):
    a, b = ((rng.normal(size=3), rng.uniform(0.2, 2, 3)) for _ in range(2))
    fn = product(*[tuple(map(jnp.asarray, normal)) for normal in (a, b)])
    x = np.linspace(-3, 3, 7)[:, None]
    ratio = stats.norm.logpdf(x, *a) + stats.norm.logpdf(x, *b) - fn.log_prob(x)
    np.testing.assert_allclose(ratio, np.tile(ratio[:1], (7, 1)), rtol=1e-4, atol=1e-4)


DEEP = Model(
    x_shape=(2, 4),
    num_latents=3,
    hidden=(6, 5),
    activation=jnp.tanh,
    above=(Layer(2, (4, 7)), Layer(1)),
    skip=True,
)
GATED = replace(DEEP, condition=Labels(3), prior=LearnedNormal((3,)), activation=jax.nn.glu)


def pixels(model):
    data = {"x": jnp.asarray(np.random.default_rng(0).integers(0, 2, (5, 2, 4)), jnp.float32)}
    return data if model.condition is None else data | {"c": jnp.arange(5) % 3}


def abstract_sites(program, **data):
    sites = {}
    jax.eval_shape(lambda: sites.update(trace_of(program, KEY, {}, **data)))
    return sites


@pytest.mark.parametrize("model", [DEEP, GATED, TWO, SKIPS], ids=["deep", "gated", "two", "skip"])
def test_a_guide_draws_what_the_model_does_not_observe(model):
    data = pixels(model) if model.x_shape == (2, 4) else {"x": jnp.zeros((5, D))}
    of_model = abstract_sites(model, **data)
    latents = list(model.names[::-1])
    assert [n for n, s in of_model.items() if s["type"] == "sample"] == [*latents, "x"]
    above = {f"{name}_from_above" for name in model.names[:-1]}
    for family, order, shared in ((TopDown, latents, above), (BottomUp, latents[::-1], set())):
        sites = abstract_sites(family(model), **data)
        assert [n for n, s in sites.items() if s["type"] == "sample"] == order
        for name, size in zip(model.names, model.sizes, strict=True):
            assert sites[name]["value"].shape == of_model[name]["value"].shape == (5, size)
            assert sites[name]["cond_indep_stack"] == of_model[name]["cond_indep_stack"]
        params = {n for n, s in sites.items() if s["type"] == "param"}
        assert params & {n for n, s in of_model.items() if s["type"] == "param"} == shared


def test_the_networks_have_the_layers_that_are_written(rng):
    """From above in p, from below in q. A gate doubles a layer in front of it."""

    def kernels(sites, name):
        tree = sites[name]["value"]
        layers = tree.get("mlp", tree)["layers"]
        return [layers[i]["kernel"].shape for i in sorted(layers)]

    data = pixels(DEEP)
    of_model = abstract_sites(DEEP, **data)
    assert kernels(of_model, "z1_from_above") == [(2, 4), (4, 7), (7, 6)]
    assert kernels(of_model, "z2_from_above") == [(1, 4)]
    assert kernels(of_model, "decoder") == [(6, 6), (6, 5), (5, 8)]
    without = abstract_sites(replace(DEEP, skip=False), **data)
    assert kernels(without, "decoder")[0] == (3, 6)
    below = abstract_sites(BottomUp(DEEP), **data)
    assert kernels(below, "encoder") == [(8, 5), (5, 6), (6, 6)]
    assert kernels(below, "z2_from_below") == [(3, 7), (7, 4), (4, 4)]
    for width, model in ((1, DEEP), (2, replace(DEEP, activation=jax.nn.glu))):
        down = abstract_sites(TopDown(model), **data)
        assert kernels(down, "encoder") == [(8, width * 5), (5, width * 6)]
        assert kernels(down, "z1_told") == [(6, 6)]
        assert kernels(down, "rise2") == [(6, width * 7), (7, width * 4)]
        assert kernels(down, "z2_told") == [(4, 4)]
        assert kernels(down, "z3_told") == [(4, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "family"),
    [
        (GATED, TopDown),
        (GATED, BottomUp),
        (DEEP, TopDown),
        (DEEP, BottomUp),
        (GATED, guides.structured),
    ],
)
def test_gradients_reach_every_weight(model, family):
    data, guide = pixels(model), family(model)

    @jax.jit
    def differentiate():
        params = params_of(guide, **data) | params_of(model, **data)
        fixed = {n: params.pop(n) for n in ("statistics",) if n in params}
        params = jax.tree.map(lambda p: p + 0.1, params)  # some start at zero
        loss = lambda p: Trace_ELBO(4).loss(KEY, p | fixed, model, guide, **data)  # noqa: E731
        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(differentiate()):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.slow
@pytest.mark.parametrize("family", [TopDown, BottomUp, guides.structured])
def test_judges_and_generators_take_several_layers(family):
    model = replace(TWO, condition=Labels(3), prior=LearnedNormal(), above=(Layer(2, (4,)),))
    rng = np.random.default_rng(0)
    data = {
        "x": rng.normal(size=(12, D)).astype(np.float32),
        "c": np.arange(12, dtype=np.int32) % 3,
    }
    result = fit(model, family(model), data, num_steps=3, progress=False)
    drawn = sample_prior_predictive(result, 2, c=data["c"])
    assert {n: v.shape for n, v in drawn.items()} == {
        "z1": (1, 2, 12, 3),
        "z2": (1, 2, 12, 2),
        "x": (1, 2, 12, D),
    }
    latents = encode(result, data)
    assert {n: v.shape for n, v in latents.items()} == {"z1": (1, 12, 3), "z2": (1, 12, 2)}
    assert decode(result, latents, c=data["c"])["x"].shape == (1, 12, D)
    check = label_check(result, data, 3, key=KEY, num_samples=4).log_likelihood[0]
    given = data | {"c": np.full(12, 1, np.int32)}
    alone = log_likelihood(result, given, key=KEY, num_samples=4).pointwise[0]
    np.testing.assert_allclose(check[:, 1], alone, rtol=1e-5, atol=1e-5)


def test_a_vae_gets_more_layers():
    base = vae.Model(Labels(3), x_shape=(4,), num_latents=3, hidden=(6, 5), likelihood=Normal())
    model = stacked(base, (2, 1), skip=False)
    assert model.above == (Layer(2, (6, 5)), Layer(1, (6, 5)))
    assert not model.skip
    assert stacked(base, (2,)).skip
    for name in vae.Model.__dataclass_fields__:
        assert getattr(model, name) == getattr(base, name)


def test_presets_are_the_published_models():
    burda, tomczak = (hierarchical.PRESETS[n] for n in ("burda-two-layers", "tomczak-two-layers"))
    assert (burda.sizes, burda.hidden, burda.skip) == ((100, 50), (200, 200), False)
    assert burda.above[0].hidden == (100, 100)
    assert burda.activation is jnp.tanh
    assert (tomczak.sizes, tomczak.hidden, tomczak.skip) == ((40, 40), (300, 300), True)
    assert tomczak.activation is jax.nn.glu


# --- what is refused ------------------------------------------------------------------------------


def with_scales(params):
    (layer,) = params["z1_from_above"]["mlp"]["layers"].values()
    kernel = layer["kernel"].copy()
    kernel[0, -1] = 0.1
    layers = {0: layer | {"kernel": kernel}}
    return params | {"z1_from_above": {"mlp": {"layers": layers}}}


def joint_of(**changes):
    model = replace(TWO, **changes)
    return joint(model, any_params(model, np.random.default_rng(0), jnp.zeros((1, D))))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopDown(vae.Model()), TypeError, "model: expected a models.hierarchical.Model"),
        (lambda: BottomUp(vae.Model()), TypeError, "model: .*got Model; take a family of models.g"),
        (lambda: Layer(0), ValueError, "num_latents: expected positive sizes, got 0"),
        (lambda: Layer(2, (3, 0)), ValueError, r"hidden: expected positive sizes, got \(3, 0\)"),
        (lambda: joint(TWO, with_scales(linear(TWO))), ValueError, "params: expected affine net"),
        (lambda: joint_of(hidden=(4,)), ValueError, "params: expected affine networks"),
        (lambda: joint_of(likelihood=Gaussian()), ValueError, "params: expected affine networks"),
        (
            lambda: joint(replace(TWO, prior=LearnedNormal()), linear(TWO)),
            ValueError,
            r"model: expected no condition and the prior StandardNormal\(\), got .*LearnedNormal",
        ),
        (
            lambda: joint(replace(TWO, condition=Labels(2)), linear(TWO)),
            ValueError,
            "model: expected no condition and the prior .* got the condition Labels",
        ),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_what_cannot_be_is_one_line(make, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value)
