"""The VAE, the CVAE and their guide: as programs, against quadrature over z, and after a fit."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from scipy import special, stats

from inference import elbo_terms, encode, fit, label_check, log_likelihood
from models import cvae, guides, vae
from models.conditions import Labels, Values
from models.likelihoods import LIKELIHOODS, Bernoulli, Gaussian
from models.networks import SCALE_FLOOR

KEY = jax.random.key(0)

# --- configurations -------------------------------------------------------------------------------

SHAPES = [(5, 4), (4, 4, 3)]
HIDDEN = [(), (7,), (6, 5)]
CONDITIONS = [Labels(3), Labels(3, num_embedded=2), Values((2, 3))]
PRIORS = [None, (), (5,)]

PRESETS = {f"vae-{name}": model for name, model in vae.PRESETS.items()} | {
    f"cvae-{name}": model for name, model in cvae.PRESETS.items()
}


def small(make, likelihood, x_shape, hidden, **settings):
    return make(
        x_shape=x_shape,
        num_latents=2,
        hidden=hidden,
        activation=jnp.tanh,
        likelihood=LIKELIHOODS[likelihood],
        **settings,
    )


SMALL = {
    f"{kind}-{name}-{'x'.join(map(str, x_shape))}-{len(hidden)}": small(make, name, x_shape, hidden)
    for kind, make in (("vae", vae.Model), ("cvae", cvae.Model))
    for name in LIKELIHOODS
    for x_shape in SHAPES
    for hidden in HIDDEN
}
CONDITIONAL = {
    f"{condition}-{prior_hidden}": small(
        cvae.Model, "bernoulli", (5, 4), (7,), condition=condition, prior_hidden=prior_hidden
    )
    for condition in CONDITIONS
    for prior_hidden in PRIORS
}

# To compile one program takes a second. These have every likelihood with either model, and every
# shape, depth, condition and prior; what they leave out of SMALL differs in sizes alone.
labels, embedded, values = ({"condition": condition} for condition in CONDITIONS)
affine, one_layer = {"prior_hidden": ()}, {"prior_hidden": (5,)}
half = {"dtype": "bfloat16"}
TRAINED = {
    "vae-1": small(vae.Model, "bernoulli", (4, 4, 3), (6, 5)),
    "vae-2": small(vae.Model, "gaussian", (5, 4), (7,), **half),
    "vae-3": small(vae.Model, "gaussian-one-scale", (5, 4), ()),
    "vae-4": small(vae.Model, "gaussian-identity", (4, 4, 3), (7,)),
    "vae-5": small(vae.Model, "discretized-logistic", (5, 4), (6, 5)),
    "cvae-1": small(cvae.Model, "bernoulli", (5, 4), (7,), **labels, **affine),
    "cvae-2": small(cvae.Model, "gaussian", (4, 4, 3), (), **embedded, **one_layer),
    "cvae-3": small(cvae.Model, "gaussian-one-scale", (5, 4), (6, 5), **values),
    "cvae-4": small(cvae.Model, "gaussian-identity", (5, 4), (), **values, **one_layer, **half),
    "cvae-5": small(cvae.Model, "discretized-logistic", (4, 4, 3), (7,), **labels),
}


def every(models):
    return pytest.mark.parametrize("model", models.values(), ids=models)


def make_data(model, num_data, rng):
    """Images as the model's likelihood has them, and conditions as the model is given them."""
    grey = rng.integers(0, 256, (num_data, *model.x_shape), dtype=np.uint8)
    data = {"x": model.likelihood.prepare(KEY, grey)}
    condition = getattr(model, "condition", None)
    if isinstance(condition, Labels):
        data["c"] = jnp.asarray(rng.integers(0, condition.num_classes, num_data))
    elif isinstance(condition, Values):
        data["c"] = jnp.asarray(rng.normal(size=(num_data, *condition.shape)), jnp.float32)
    return data


def abstract_trace(program, **data):
    """The sites of a program, as shapes: nothing is computed."""
    sites = {}

    def run(key, data):
        sites.update(handlers.trace(handlers.seed(program, key)).get_trace(**data))

    jax.eval_shape(run, KEY, data)
    return sites


def draw_params(rng, scale, *programs, **data):
    """A value for every parameter of the programs: what a network starts from, times scale."""

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim > 1 else leaf.shape[0]
        return (scale * rng.normal(size=leaf.shape) / math.sqrt(fan_in)).astype(np.float32)

    params = {}
    for program in programs:
        for name, site in abstract_trace(program, **data).items():
            if site["type"] == "param" and "constraint" not in site["kwargs"]:
                params[name] = jax.tree.map(draw, site["value"])
    return params


def num_params(sites):
    leaves = jax.tree.leaves({n: s["value"] for n, s in sites.items() if s["type"] == "param"})
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    return sum(math.prod(leaf.shape) for leaf in leaves)


# --- programs -------------------------------------------------------------------------------------


@every(SMALL | CONDITIONAL | PRESETS | TRAINED)
def test_the_guide_draws_exactly_what_the_model_does_not_observe(model, rng):
    data = make_data(model, 3, rng)
    sites, guide_sites = (
        abstract_trace(program, **data) for program in (model, guides.mean_field(model))
    )
    samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
    latent = {name: site for name, site in samples.items() if not site["is_observed"]}
    drawn = {name: site for name, site in guide_sites.items() if site["type"] == "sample"}
    assert samples.keys() == {"z", "x"}
    assert latent.keys() == drawn.keys() == {"z"}
    for site in (latent["z"], drawn["z"]):
        assert site["fn"].event_shape == (model.num_latents,)
        assert site["fn"].batch_shape == (3,)
        (plate,) = site["cond_indep_stack"]
        assert (plate.name, plate.size) == ("data", 3)
    assert latent["z"]["cond_indep_stack"] == drawn["z"]["cond_indep_stack"]
    assert samples["x"]["fn"].event_shape == model.x_shape
    assert samples["x"]["cond_indep_stack"] == latent["z"]["cond_indep_stack"]
    params = {name for name, site in sites.items() if site["type"] == "param"}
    assert "decoder" in params
    assert ("prior" in params) == (getattr(model, "prior_hidden", None) is not None)
    assert {name for name, site in guide_sites.items() if site["type"] == "param"} == {"encoder"}

    generated = abstract_trace(model, **{name: a for name, a in data.items() if name != "x"})
    assert not generated["x"]["is_observed"]
    assert generated["x"]["value"].shape == (3 if "c" in data else 1, *model.x_shape)


def record():
    """An optimizer that takes small steps and keeps the gradient."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda g, state, params=None: (jax.tree.map(lambda leaf: -1e-4 * leaf, g), g),
    )


# What runs once is compiled in haste: to compile it well would take longer.
hasty_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@every(TRAINED)
def test_numpyros_own_svi_trains_every_parameter(model, rng):
    data = make_data(model, 3, rng)
    guide = guides.mean_field(model)
    params = draw_params(rng, 1.0, model, guide, **data)
    svi = SVI(model, guide, record(), Trace_ELBO())

    @hasty_jit
    def train(key, params, data):
        def update(state, _):
            state, loss = svi.update(state, **data)
            _, (_, gradients) = state.optim_state
            return state, (loss, gradients)

        start = svi.init(key, init_params=params, **data)
        end, steps = jax.lax.scan(update, start, length=2)
        return svi.get_params(start), svi.get_params(end), *steps

    start, end, losses, gradients = train(KEY, params, data)
    assert np.isfinite(losses).all()
    assert start.keys() == end.keys() == gradients.keys() >= {"decoder", "encoder"}
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
        assert all((step != 0).any() for step in gradient)
    moved = jax.tree.map(lambda a, b: (a != b).any(), start, end)
    assert all(jax.tree.leaves(moved))


# The other presets of the CVAE are those of the VAE with ten inputs more.
@every({name: PRESETS[name] for name in PRESETS if name[0] == "v" or name == "cvae-hericks"})
def test_the_elbo_of_a_preset_has_gradients(model, rng):
    data = make_data(model, 2, rng)
    guide = guides.mean_field(model)
    params = draw_params(rng, 1.0, model, guide, **data)

    @hasty_jit
    @jax.value_and_grad
    def loss(params, data):
        return Trace_ELBO().loss(KEY, params, model, guide, **data)

    value, gradients = loss(params, data)
    assert np.isfinite(value)
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
        assert (gradient != 0).any()


def test_compiled_is_eager(rng):
    model = TRAINED["cvae-1"]
    data = make_data(model, 3, rng)
    guide = guides.mean_field(model)
    params = draw_params(rng, 1.0, model, guide, **data)
    loss = lambda params: Trace_ELBO().loss(KEY, params, model, guide, **data)  # noqa: E731
    np.testing.assert_allclose(loss(params), jax.jit(loss)(params), rtol=1e-5)


@every({name: TRAINED[name] for name in ("vae-3", "cvae-5")})
def test_without_x_a_model_generates(model, rng):
    data = make_data(model, 5, rng)
    c = {name: array for name, array in data.items() if name != "x"}

    @jax.jit
    def generate(key):
        sites = handlers.trace(handlers.seed(model, key)).get_trace(**c)
        z, x = sites["z"], sites["x"]
        return z["value"], x["value"], x["fn"].support(x["value"])

    z, x, supported = generate(KEY)
    assert z.shape == (5 if c else 1, model.num_latents)
    assert x.shape == (5 if c else 1, *model.x_shape)
    assert supported.all()
    assert len(np.unique(z)) == z.size
    assert (x != generate(jax.random.key(1))[1]).any()


# --- presets --------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": lambda h: np.maximum(h, 0),
    "softplus": lambda h: np.logaddexp(0, h),
    "tanh": np.tanh,
    "sigmoid": special.expit,
}


@pytest.mark.parametrize(
    ("name", "hidden", "num_latents", "activation", "likelihood"),
    [
        ("flax", (500,), 20, "relu", Bernoulli()),
        ("numpyro", (400,), 50, "softplus", Bernoulli()),
        ("burda", (200, 200), 50, "tanh", Bernoulli()),
        ("hericks", (128,), 6, "sigmoid", Bernoulli()),
        ("kingma", (500,), 20, "tanh", Bernoulli()),
        ("kingma-gaussian", (200,), 20, "tanh", Gaussian()),
    ],
)
def test_presets_are_the_published_models(name, hidden, num_latents, activation, likelihood, rng):
    assert vae.PRESETS.keys() == cvae.PRESETS.keys()
    pixels, h = 28 * 28, np.linspace(-3, 3, 13)
    for model, num_features in ((vae.PRESETS[name], 0), (cvae.PRESETS[name], 10)):
        assert (model.hidden, model.num_latents) == (hidden, num_latents)
        assert (model.x_shape, model.likelihood) == ((28, 28), likelihood)
        np.testing.assert_allclose(
            model.activation(jnp.asarray(h)), ACTIVATIONS[activation](h), rtol=1e-5, atol=1e-6
        )
        data = make_data(model, 1, rng)
        decoder = (num_latents + num_features, *hidden, pixels * likelihood.num_outputs)
        encoder = (pixels + num_features, *hidden[::-1], 2 * num_latents)
        for program, sizes in ((model, decoder), (guides.mean_field(model), encoder)):
            expected = sum((n + 1) * m for n, m in itertools.pairwise(sizes))
            assert num_params(abstract_trace(program, **data)) == expected
    assert cvae.PRESETS[name].condition == Labels(10)
    assert cvae.PRESETS[name].prior_hidden is None


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
@pytest.mark.parametrize("prior_hidden", PRIORS)
def test_the_condition_enters_every_network_once(condition, prior_hidden, rng):
    model = CONDITIONAL[f"{condition}-{prior_hidden}"]
    data = make_data(model, 2, rng)
    features = {CONDITIONS[0]: 3, CONDITIONS[1]: 2, CONDITIONS[2]: 6}[condition]
    embedding = 3 * 2 if condition == CONDITIONS[1] else 0
    mlp = lambda *sizes: sum((n + 1) * m for n, m in itertools.pairwise(sizes))  # noqa: E731
    prior = 0 if prior_hidden is None else mlp(features, *prior_hidden, 4) + embedding
    decoder = mlp(2 + features, 7, 20) + embedding
    assert num_params(abstract_trace(model, **data)) == decoder + prior
    encoder = mlp(20 + features, 7, 4) + embedding
    assert num_params(abstract_trace(guides.mean_field(model), **data)) == encoder


def test_the_guide_mirrors_the_model_unless_told(rng):
    model = SMALL["vae-bernoulli-5x4-2"]
    assert guides.mean_field(model).hidden == (5, 6)
    assert guides.mean_field(model, ()).hidden == ()
    guide = guides.mean_field(model, (9, 8, 7))
    sizes = itertools.pairwise((20, 9, 8, 7, 4))
    sites = abstract_trace(guide, **make_data(model, 1, rng))
    assert num_params(sites) == sum((n + 1) * m for n, m in sizes)


# --- against quadrature ---------------------------------------------------------------------------
#
# With one or two latents and four binary pixels, log p(x | c) is a sum over a grid of z, for every
# image there is.

settings = {"x_shape": (2, 2), "activation": jnp.tanh}
TINY = {
    "vae": vae.Model(num_latents=2, hidden=(), **settings),
    "cvae": cvae.Model(Labels(2), num_latents=1, hidden=(3,), **settings),
    "cvae-learned-prior": cvae.Model(
        Labels(2, num_embedded=3), (4,), num_latents=2, hidden=(), **settings
    ),
}
IMAGES = np.array(list(itertools.product([0.0, 1.0], repeat=4)), np.float32)


def forward(tree, h):
    """The network's MLP in float64: affine maps, tanh between them."""
    mlp = tree["mlp"]
    layers = mlp.get("mlp", mlp)["layers"]
    for i in sorted(layers):
        kernel, bias = (np.asarray(layers[i][name], np.float64) for name in ("kernel", "bias"))
        h = (np.tanh(h) if i > 0 else h) @ kernel + bias
    return h


def with_features(tree, inputs, c):
    """The network's inputs, and beside them the features of the labels."""
    if c is None:
        return inputs
    one_hot = np.eye(2)[c]
    if embed := tree.get("features", {}).get("embed"):
        one_hot = one_hot @ np.asarray(embed["kernel"], np.float64)
    shape = (*inputs.shape[:-1], one_hot.shape[-1])
    return np.concatenate([inputs, np.broadcast_to(one_hot, shape)], axis=-1)


def gaussian(tree, inputs, c):
    loc, raw = np.split(forward(tree, with_features(tree, inputs, c)), 2, axis=-1)
    return loc, np.logaddexp(0, raw) + SCALE_FLOOR


class Quadrature:
    """Sums over z = loc + scale * u, u on a grid, for every datum."""

    def __init__(self, model, params, x, c):
        size, dims = len(x), model.num_latents
        axis = np.linspace(-8, 8, 161 if dims == 2 else 1601)
        self.u = np.stack(np.meshgrid(*[axis] * dims), -1).reshape(-1, 1, dims)  # (grid, 1, dims)
        self.weight = stats.norm.pdf(self.u).prod(-1) * (axis[1] - axis[0]) ** dims
        self.params, self.x, self.c = params, x, c
        self.prior = np.zeros((size, dims)), np.ones((size, dims))
        if "prior" in params:
            self.prior = gaussian(params["prior"], np.zeros((size, 0)), c)
        self.guide = gaussian(params["encoder"], x, c)

    def log_p_x_given_z(self, loc, scale):
        z = loc + scale * self.u
        decoder = self.params["decoder"]
        logits = forward(decoder, with_features(decoder, z, self.c))
        return (self.x * logits - np.logaddexp(0, logits)).sum(-1)  # (grid, N)

    @property
    def log_likelihood(self):
        return np.log((self.weight * np.exp(self.log_p_x_given_z(*self.prior))).sum(0))

    @property
    def reconstruction(self):
        """Its mean and its variance over draws from the guide."""
        log_p = self.log_p_x_given_z(*self.guide)
        mean = (self.weight * log_p).sum(0)
        return mean, (self.weight * (log_p - mean) ** 2).sum(0)

    @property
    def kl(self):
        (q, s), (p, t) = self.guide, self.prior
        return (np.log(t / s) + (s**2 + (q - p) ** 2) / (2 * t**2) - 0.5).sum(-1)


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    """A model with random parameters, every image and label, and the quadrature of them."""
    model, rng = TINY[request.param], np.random.default_rng(1)
    guide = guides.mean_field(model)
    x, c = IMAGES, None
    if isinstance(model, cvae.Model):
        x, c = np.concatenate([IMAGES, IMAGES]), np.repeat([0, 1], 16)
    data = {"x": x.reshape(-1, 2, 2)} | ({} if c is None else {"c": c})
    params = draw_params(rng, 1.5, model, **data) | draw_params(rng, 0.5, guide, **data)
    # Wider than the prior, or the weights p / q have no variance.
    layers = params["encoder"]["mlp"]["layers"]
    layers[max(layers)]["bias"][model.num_latents :] += 1.5
    quadrature = Quadrature(model, params, x, c)
    assert (quadrature.guide[1] > 0.75 * quadrature.prior[1]).all()
    return model, guide, params, data, quadrature


def test_quadrature_is_a_distribution_over_images(tiny):
    *_, quadrature = tiny
    by_label = np.exp(quadrature.log_likelihood).reshape(-1, 16).sum(1)
    np.testing.assert_allclose(by_label, 1, rtol=1e-8)


def test_importance_sampling_finds_the_likelihood(tiny):
    model, guide, params, data, quadrature = tiny
    result = log_likelihood(model, guide, params, data, key=KEY, num_samples=4_000)
    difference = result.pointwise - quadrature.log_likelihood
    error = np.sqrt(result.monte_carlo_variance)
    assert (abs(difference) < 5 * error).all()
    assert error.max() < 0.05
    assert abs(difference.mean()) < 4 * result.monte_carlo_error


def test_the_elbo_is_below_by_what_the_guide_misses(tiny):
    model, guide, params, data, quadrature = tiny
    num_samples = 1_000
    terms = elbo_terms(model, guide, params, data, key=KEY, num_samples=num_samples)
    mean, variance = quadrature.reconstruction
    error = np.sqrt(variance / num_samples)
    np.testing.assert_allclose(terms.kl.pointwise, quadrature.kl, rtol=1e-4, atol=1e-5)
    assert (abs(terms.reconstruction.pointwise - mean) < 5 * error).all()
    assert (abs(terms.elbo.pointwise - (mean - quadrature.kl)) < 5 * error + 1e-4).all()
    assert (terms.elbo.pointwise < quadrature.log_likelihood).all()


# --- a fit ----------------------------------------------------------------------------------------


WHITE, BLACK = 242.5 / 255, 12.5 / 255  # a pixel is this grey, on average


@pytest.fixture(scope="module")
def fitted():
    """Label 0 has its left half white, label 1 its right half; and the binarised data."""
    rng = np.random.default_rng(0)
    c = np.repeat(np.arange(2, dtype=np.int32), 100)
    white = (np.arange(4) < 2) == (c[:, None, None] == 0) & np.ones((4, 1), bool)
    grey = np.where(white, rng.integers(230, 256, white.shape), rng.integers(0, 26, white.shape))
    model = cvae.Model(
        Labels(2), (), x_shape=(4, 4), num_latents=2, hidden=(8,), activation=jnp.tanh
    )
    guide = guides.mean_field(model)
    data = {"c": c, "x": grey.astype(np.uint8)}
    result = fit(
        model,
        guide,
        data,
        preprocess=model.prepare,
        optimizer=optax.adam(3e-2),
        num_steps=300,
        batch_size=50,
        num_seeds=2,
        progress=False,
    )
    data = jax.device_get(model.prepare(KEY, data))
    p = np.where(white, WHITE, BLACK)
    truth = stats.bernoulli.logpmf(data["x"], p).sum((1, 2))
    return model, guide, result, data, truth


def test_the_condition_matters(fitted):
    model, guide, result, data, truth = fitted
    params = jax.tree.map(lambda leaf: leaf[0], result.params)
    check = label_check(model, guide, params, data, 2, key=KEY, num_samples=40)
    own, other = (
        np.take_along_axis(check.log_likelihood, label[:, None], 1)[:, 0]
        for label in (data["c"], 1 - data["c"])
    )
    assert np.mean(own > other + 1) > 0.99
    assert check.accuracy.estimate == 1
    assert check.information.pointwise.max() <= math.log(2) + 1e-6
    assert check.information.estimate > math.log(2) - 0.01
    # The truth without its labels is log 2 lower: better than that is no model without a label.
    above = own - (truth - math.log(2))
    assert above.mean() > 4 * above.std() / math.sqrt(len(above))


def test_every_seed_of_a_fit_ends_elsewhere(fitted):
    _, _, result, *_ = fitted
    assert result.params.keys() == {"decoder", "encoder", "prior"}
    for leaf in jax.tree.leaves(result.params):
        assert len(leaf) == 2
        assert (leaf[0] != leaf[1]).all()


@every({name: TRAINED[name] for name in ("vae-2", "cvae-2")})
def test_prepare_is_the_likelihoods_and_leaves_the_rest(model, rng):
    x = rng.integers(0, 256, (3, *model.x_shape), dtype=np.uint8)
    batch = {"x": x, "c": np.arange(3)}
    prepared = model.prepare(KEY, batch)
    np.testing.assert_array_equal(prepared.pop("x"), model.likelihood.prepare(KEY, x))
    np.testing.assert_array_equal(prepared.pop("c"), np.arange(3))
    assert not prepared
    assert batch["x"] is x


# --- what is refused ------------------------------------------------------------------------------


def test_labels_outside_the_classes_end_a_fit_before_its_first_step():
    model = cvae.Model(Labels(3), x_shape=(2, 2), num_latents=1, hidden=())
    data = {"c": np.array([0, 1, 2, 3]), "x": np.zeros((4, 2, 2), np.float32)}

    def preprocess(key, batch):
        raise AssertionError("a step was traced")

    with pytest.raises(ValueError, match=r"c: expected labels 0 to 2, got 3;"):
        fit(model, guides.mean_field(model), data, num_steps=1, preprocess=preprocess)
    with pytest.raises(ValueError, match=r"c: expected labels 0 to 2, got 3;"):
        handlers.seed(model, 0)(jnp.asarray(data["c"]))
    good = data | {"c": np.array([0, 1, 2, 2])}
    with pytest.raises(ValueError, match=r"c: expected labels 0 to 2, got 3;"):
        fit(model, guides.mean_field(model), good, num_steps=1, validation=data)


@pytest.mark.parametrize("name", ["vae-bernoulli-5x4-0", "cvae-bernoulli-5x4-0"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 4, 5), np.float32), r"shape \(N, 5, 4\), got float32 of shape \(2, 4, 5\)"),
        (np.zeros((2, 20), np.float32), r"shape \(N, 5, 4\), got float32 of shape \(2, 20\)"),
        (np.zeros((2, 5, 4), np.uint8), r"got uint8 of shape \(2, 5, 4\);.*likelihood's prepare"),
    ],
)
def test_images_that_are_not_the_models_are_refused(name, x, message):
    model = SMALL[name]
    data = {"x": jnp.asarray(x)} | ({"c": jnp.zeros(2, int)} if name[0] == "c" else {})
    for program in (model, guides.mean_field(model)):
        # as a user calls it: without the type checks of the tests, which would speak first
        call = inspect.unwrap(type(program).__call__)
        with (
            pytest.raises(ValueError, match=rf"^x: expected floats of .*{message}"),
            handlers.seed(rng_seed=0),
        ):
            call(program, **data)


@pytest.mark.parametrize("make", [vae.Model, cvae.Model])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x_shape": (0, 3)}, r"x_shape: expected positive sizes, got \(0, 3\)"),
        ({"x_shape": (784,)}, r"x_shape: expected \(height, width\) or .*, got \(784,\)"),
        ({"x_shape": (1, 2, 3, 4)}, r"x_shape: expected .*got \(1, 2, 3, 4\)"),
        ({"num_latents": 0}, "num_latents: expected positive sizes, got 0"),
        ({"hidden": (5, -1)}, r"hidden: expected positive sizes, got \(5, -1\)"),
        ({"dtype": "float16"}, "dtype: expected .*bfloat16.*, got 'float16'"),
    ],
)
def test_bad_sizes_are_named(make, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**settings)


def test_bad_sizes_of_the_prior_and_the_guide_are_named():
    with pytest.raises(ValueError, match=r"^prior_hidden: expected positive sizes, got \(4, 0\)"):
        cvae.Model(prior_hidden=(4, 0))
    with pytest.raises(ValueError, match=r"^hidden: expected positive sizes, got \(0,\)"):
        guides.mean_field(vae.Model(), (0,))


def test_models_and_guides_are_values():
    assert vae.Model() == vae.Model() != vae.Model(num_latents=3)
    assert hash(cvae.Model()) == hash(cvae.Model())
    assert guides.mean_field(vae.Model()) == guides.mean_field(vae.Model())


def test_a_guide_refuses_what_its_model_refuses():
    model = cvae.Model(Labels(2), x_shape=(3, 2), num_latents=2, hidden=(4,))
    guide = guides.mean_field(model)
    x = jnp.zeros((2, 3, 2))
    params = handlers.trace(handlers.seed(guide, 0)).get_trace(c=jnp.arange(2), x=x)
    params = {"encoder": params["encoder"]["value"]}
    encode(guide, params, x, jnp.arange(2))
    with pytest.raises(ValueError, match="c: expected labels 0 to 1, got 2"):
        encode(guide, params, x, jnp.array([0, 2]))
    with pytest.raises(ValueError, match="c: expected conditions, got none"):
        encode(guide, params, x)
