"""Quadrants and their models: as programs, and every row of the table against quadrature over z."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

from inference import Fit, Hybrid, elbo_terms, log_likelihood
from models import guides
from models.quadrants import PRESETS, Baseline, Model, Quadrants

KEY = jax.random.key(0)
QUADRANTS = [
    Quadrants(num_observed, shape) for num_observed in (1, 2, 3) for shape in ((28, 28), (4, 6))
]

# --- cutting and putting together -----------------------------------------------------------------


@pytest.mark.parametrize("quadrants", QUADRANTS, ids=str)
def test_cutting_and_putting_together_is_exact_for_every_pixel(quadrants):
    height, width = quadrants.image_shape
    pixels = np.arange(2 * height * width).reshape(2, height, width)  # every one is different
    c, x = jax.jit(quadrants.split)(pixels)
    assert c.shape == (2, *quadrants.c_shape)
    assert x.shape == (2, *quadrants.x_shape)
    np.testing.assert_array_equal(jax.jit(quadrants.merge)(c, x), pixels)


@pytest.mark.parametrize("quadrants", QUADRANTS, ids=str)
def test_the_observed_quadrants_are_the_papers(quadrants):
    height, width = quadrants.image_shape
    observed = np.zeros((1, height, width), int)
    observed[:, height // 2 :, : width // 2] = 1  # bottom left
    if quadrants.num_observed == 2:
        observed[:, :, : width // 2] = 1  # the left half
    if quadrants.num_observed == 3:
        observed[:] = 1
        observed[:, height // 2 :, width // 2 :] = 0  # all but the bottom right
    c, x = map(np.asarray, jax.jit(quadrants.split)(observed))
    assert (c == 1).all()
    assert (x == 0).all()
    assert c.size + x.size == observed.size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (7, 8)}, r"image_shape: expected .* both even, .* got \(7, 8\); crop or"),
        ({"image_shape": (8, 5)}, r"image_shape: expected .* both even, .* got \(8, 5\)"),
        ({"image_shape": (32, 32, 3)}, r"image_shape: expected .* got \(32, 32, 3\)"),
        ({"num_observed": 4}, "num_observed: expected 1, 2 or 3, got 4"),
    ],
)
def test_what_cannot_be_cut_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Quadrants(**settings)


def test_images_of_another_shape_are_refused(rng):
    message = r"x: expected shape \(N, 28, 28\), got \(3, 8, 8\); .* image_shape=\(8, 8\)"
    with pytest.raises(ValueError, match=message):
        Quadrants(1).split(rng.random((3, 8, 8)))


# --- the programs ---------------------------------------------------------------------------------

TINY = Model(
    Baseline(Quadrants(1, (4, 4)), hidden=(6,), activation=jnp.tanh),
    num_latents=1,
    hidden=(5,),
    prior_hidden=(4,),
)
TINY_2 = replace(TINY, num_latents=2, decoder_sees_c=True)
BINARY = np.random.default_rng(1).integers(0, 2, (7, 4, 4)).astype(np.float32)
DATA = dict(zip("cx", jax.jit(TINY.baseline.quadrants.split)(BINARY), strict=True))


def trace(program, key=KEY, params=None, **data):
    return handlers.trace(handlers.seed(handlers.substitute(program, params or {}), key)).get_trace(
        **data
    )


def abstract_trace(program, **data):
    """The sites of a program, as shapes: nothing is computed."""
    sites = {}
    jax.eval_shape(lambda: sites.update(trace(program, **data)))
    return sites


def start_of(model):
    """Parameters of about the size at which the networks of a model and of its guide start."""
    sites = abstract_trace(model, **DATA) | abstract_trace(guides.mean_field(model), **DATA)
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = 0.0 if leaf.ndim == 1 else 0.8 / math.sqrt(math.prod(leaf.shape[:-1]))
        return np.float32(scale * rng.normal(size=leaf.shape))

    shapes = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
    return {name: jax.tree.map(draw, shapes[name]) for name in shapes if name != "statistics"}


def params_of(model):
    """Of a wide guide, so that its weights have no heavy tail."""
    params = start_of(model)
    params["encoder"]["mlp"]["layers"][1]["bias"][model.num_latents :] += 1.5
    size = model.num_latents
    params["statistics"] = {"latents": {"z": {"median": np.zeros(size), "spread": np.ones(size)}}}
    return jax.tree.map(np.float32, params)


def model_params(params):
    return {name: value for name, value in params.items() if name not in ("encoder", "statistics")}


def shift(tree):
    """Other weights: the last layer's biases are raised, so that the output is."""
    return jax.tree.map(lambda p: p + 0.7 if p.ndim == 1 else p, tree)


@pytest.mark.parametrize("model", [TINY, TINY_2])
def test_the_program_samples_z_and_x_and_generates_without_x(model):
    sites = abstract_trace(model, **DATA)
    samples = {name for name, site in sites.items() if site["type"] == "sample"}
    params = {name for name, site in sites.items() if site["type"] == "param"}
    assert samples == {"z", "x"}
    assert params == {"baseline", "prior", "decoder"}
    assert sites["z"]["fn"].event_shape == (model.num_latents,)
    generated = abstract_trace(model, c=DATA["c"])
    assert generated["x"]["value"].shape == DATA["x"].shape
    assert not generated["x"]["is_observed"]


def test_the_baseline_is_one_probability_for_each_pixel():
    sites = abstract_trace(TINY.baseline, **DATA)
    assert {n for n, site in sites.items() if site["type"] == "sample"} == {"x"}
    of_guide = abstract_trace(guides.prior(TINY.baseline), **DATA)
    assert not [site for site in of_guide.values() if site["type"] == "sample"]
    params = {"baseline": start_of(TINY)["baseline"]}
    weights = params["baseline"]["mlp"]["layers"]
    h = np.tanh(np.asarray(DATA["c"]).reshape(7, -1) @ weights[0]["kernel"] + weights[0]["bias"])
    logits = (h @ weights[1]["kernel"] + weights[1]["bias"]).reshape(DATA["x"].shape)
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    x = np.asarray(DATA["x"])
    exact = (x * np.log(p) + (1 - x) * np.log1p(-p)).sum((1, 2, 3))
    result = Fit.from_params(TINY.baseline, guides.prior(TINY.baseline), params, example=DATA)
    judged = log_likelihood(result, DATA, num_samples=1)
    np.testing.assert_allclose(judged.pointwise[0], exact, rtol=1e-5)


@pytest.mark.parametrize("sees_c", [False, True])
def test_the_decoders_logits_are_added_to_the_baselines(sees_c, rng):
    model = replace(TINY, decoder_sees_c=sees_c)
    params = params_of(model)
    z = rng.normal(size=(7, 1)).astype(np.float32)

    @jax.jit
    def added(z):
        sites = trace(handlers.condition(model, {"z": z}), params=params, c=DATA["c"])
        baseline = trace(model.baseline, params=params, c=DATA["c"])
        return sites["x"]["fn"].base_dist.logits - baseline["x"]["fn"].base_dist.logits

    varies = np.ptp(added(np.tile(z[:1], (7, 1))), axis=0).max()
    assert varies > 0.01 if sees_c else varies < 1e-5  # with the condition, at one and the same z
    assert np.ptp(added(z), axis=0).max() > 0.01


def test_the_prior_sees_the_condition_and_the_baselines_guess():
    params = params_of(TINY)

    @jax.jit
    def z_loc(params):
        return trace(TINY, params=params, c=DATA["c"])["z"]["fn"].base_dist.loc

    loc = np.asarray(z_loc(params))
    assert np.ptp(loc) > 0.01
    moved = z_loc(params | {"baseline": shift(params["baseline"])})
    assert (abs(moved - loc) > 1e-4).all()


@pytest.mark.parametrize("binary_c", [False, True])
def test_whole_images_are_binarised_and_then_cut(binary_c, rng):
    grey = rng.integers(0, 256, (9, 4, 4), dtype=np.uint8)
    model = replace(TINY, baseline=replace(TINY.baseline, binary_c=binary_c))
    prepare = jax.jit(model.prepare)
    batch, again = (jax.device_get(prepare(key, {"x": grey})) for key in (KEY, jax.random.key(1)))
    assert batch.keys() == {"c", "x"}
    binary = np.asarray(jax.jit(model.likelihood.prepare)(KEY, grey))
    assert set(np.unique(binary)) == {0.0, 1.0}
    _, x = Quadrants(1, (4, 4)).split(binary)
    c, _ = Quadrants(1, (4, 4)).split(binary if binary_c else grey / np.float32(255))
    np.testing.assert_array_equal(batch["x"], x)
    np.testing.assert_allclose(batch["c"], c, rtol=1e-6)
    assert (again["x"] != batch["x"]).any()  # anew at every step
    assert (again["c"] != batch["c"]).any() == binary_c


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Baseline(hidden=(0,)), r"hidden: expected positive sizes, got \(0,\)"),
        (lambda: Baseline(dtype="int8"), 'dtype: expected "float32" or "bfloat16"'),
        (lambda: Model(num_latents=0), "num_latents: expected positive sizes, got 0"),
        (lambda: Model(prior_hidden=(-1,)), r"prior_hidden: expected positive sizes"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


WHOLE = np.zeros((3, 4, 4), np.uint8)
PARTS = {"c": np.zeros((3, 2, 2, 1), np.float32), "x": np.zeros((3, 2, 2, 3), np.float32)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": WHOLE[:, :2]}, r"x: expected shape \(N, 4, 4\), got \(3, 2, 4\); .*image_shape="),
        ({"x": WHOLE + 255.0}, r"x: expected .* in \[0, 1\], got float.*; divide by 255 or"),
        (PARTS | {"c": PARTS["x"]}, r"c: expected shape \(N, 2, 2, 1\), got \(3, 2, 2, 3\)"),
        (PARTS | {"c": PARTS["c"] - 1}, r"c: expected .* in \[0, 1\], got float32 from -1.0 to"),
        (PARTS | {"x": WHOLE}, r"x: expected shape \(N, 2, 2, 3\), got \(3, 4, 4\)"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_what_to_do(data, message):
    for model in (TINY, TINY.baseline):
        for good in ({"x": WHOLE}, PARTS, {"c": PARTS["c"]}):
            model.check_data(**good)
        with pytest.raises(ValueError, match=message):
            model.check_data(**data)


@pytest.mark.parametrize("program", [TINY.baseline, TINY])
def test_programs_refuse_another_number_of_quadrants(program):
    c, x = Quadrants(2, (4, 4)).split(BINARY)
    with pytest.raises(ValueError, match=r"c: expected shape \(N, 2, 2, 1\), got \(7, 2, 2, 2\)"):
        handlers.seed(program, 0)(c=c, x=x)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_for_the_quadrants_one_gives_it(name):
    preset = PRESETS[name]
    model = replace(preset, baseline=replace(preset.baseline, quadrants=Quadrants(3)))
    assert model.x_shape == (14, 14, 1)
    assert model.condition.num_features == 588


# --- every row of the table, against quadrature ---------------------------------------------------


def nodes(loc, scale, num_nodes):
    """Points and weights of the trapezoidal rule for expectations under N(loc, scale^2): for what
    is smooth, and vanishes at the ends, it converges faster than any power."""
    t = np.linspace(-8, 8, num_nodes)
    w = np.exp(-0.5 * t**2) / np.exp(-0.5 * t**2).sum()
    grids = np.meshgrid(*[t] * loc.shape[-1], indexing="ij")
    weights = np.prod(np.meshgrid(*[w] * loc.shape[-1], indexing="ij"), axis=0).reshape(-1)
    points = np.stack(grids, -1).reshape(-1, 1, loc.shape[-1])
    return jnp.asarray(loc + scale * points, jnp.float32), weights


@pytest.fixture(scope="module")
def exact():
    """The model, its parameters, a fit of them, and by quadrature the four numbers that the rows
    estimate."""
    model, num_nodes = TINY_2, 81
    params, guide = params_of(model), guides.mean_field(model)

    @jax.jit
    def normals():
        fns = [trace(p, params=params, **DATA)["z"]["fn"].base_dist for p in (model, guide)]
        return [(fn.loc, fn.scale) for fn in fns]

    @jax.jit
    def log_p_x(z):
        """log p(x | z, c) at every node, (nodes, N)."""

        def at(z):
            sites = trace(handlers.condition(model, {"z": z}), params=params, **DATA)
            return sites["x"]["fn"].log_prob(DATA["x"])

        return jax.vmap(at)(z)

    (loc, scale), (q_loc, q_scale) = jax.tree.map(np.float64, normals())
    z, w = nodes(loc, scale, num_nodes)
    log_p = np.asarray(log_p_x(z), np.float64)
    log_likelihoods = np.log(w @ np.exp(log_p))
    q_z, q_w = nodes(q_loc, q_scale, num_nodes)
    kl = np.log(scale / q_scale) + (q_scale**2 + (q_loc - loc) ** 2) / (2 * scale**2) - 0.5
    elbo = q_w @ np.asarray(log_p_x(q_z), np.float64) - kl.sum(-1)
    # Every other node gives the same: the integrals are exact to rounding.
    every = np.arange(num_nodes**2).reshape(num_nodes, num_nodes)[::2, ::2].ravel()
    half = w[every] / w[every].sum() @ np.exp(log_p[every])
    np.testing.assert_allclose(np.log(half), log_likelihoods, atol=1e-5)
    result = Fit.from_params(model, guide, params, example=DATA)
    return model, params, result, log_likelihoods, elbo, w @ log_p


@pytest.mark.parametrize("make", [guides.prior, guides.mean_field])
def test_monte_carlo_and_importance_sampling_arrive_at_the_likelihood(exact, make):
    model, params, result, log_likelihoods, elbo, _ = exact
    if make is guides.prior:
        result = Fit.from_params(model, make(model), model_params(params), example=DATA)
    judged = log_likelihood(result, DATA, key=KEY, num_samples=20_000)
    variance = judged.monte_carlo_variance[0]
    error = abs(judged.pointwise[0] - log_likelihoods)
    assert (error < variance / 2 + 4.5 * np.sqrt(variance) + 1e-5).all()
    assert np.sqrt(variance).max() < 0.02  # nats, so that an ELBO would fail the test:
    assert (log_likelihoods - elbo).max() > 0.5


def test_the_elbo_is_the_elbo(exact):
    _, _, result, _, elbo, _ = exact
    many = [elbo_terms(result, DATA, key=jax.random.key(i), num_samples=2000) for i in range(8)]
    draws = np.stack([e.elbo.pointwise[0] for e in many])
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert (abs(draws.mean(0) - elbo) < 6.5 * error + 1e-4).all()  # Student's t of 7 degrees, 7 x


def test_the_gsnns_objective_is_the_expectation_under_the_prior(exact):
    model, params, _, _, _, expected = exact
    prior, recognition = guides.prior(model), guides.mean_field(model)

    def draws(objective, guide):
        loss = lambda key: objective.loss(key, params, model, guide, **DATA)  # noqa: E731
        return -np.asarray(jax.jit(jax.vmap(loss))(jax.random.split(KEY, 4000)))

    values = draws(Trace_ELBO(), prior)
    assert abs(values.mean() - expected.sum()) < 4.5 * values.std() / 4000**0.5
    np.testing.assert_allclose(draws(Hybrid(0.0), recognition), values, rtol=1e-5)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_frozen_baseline_stays_and_the_others_learn(rng):
    """The baseline is one parameter of the model, by its name."""
    images = {"x": rng.integers(0, 256, (20, 4, 4), dtype=np.uint8)}
    start, stay = params_of(TINY), ("baseline", "statistics")
    frozen = optax.partition(
        {"free": optax.adam(0.01), "frozen": optax.set_to_zero()},
        lambda params: {name: "frozen" if name in stay else "free" for name in params},
    )
    svi = SVI(TINY, guides.mean_field(TINY), frozen, Trace_ELBO())

    @jax.jit
    def train(key, images):
        batch = TINY.prepare(key, images)
        state = svi.init(key, init_params=start, **batch)
        state, _ = jax.lax.scan(lambda s, _: svi.update(s, **batch), state, length=3)
        return svi.get_params(state)

    end = jax.device_get(train(KEY, images))
    assert end.keys() == start.keys() == {"baseline", "prior", "decoder", "encoder", "statistics"}
    jax.tree.map(np.testing.assert_array_equal, end["baseline"], start["baseline"])
    for name in end.keys() - {"baseline", "statistics"}:
        moved = jax.tree.map(lambda a, b: (a != b).any(), end[name], start[name])
        assert any(jax.tree.leaves(moved)), name
