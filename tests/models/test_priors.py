"""Priors as objects: their densities by hand, what they gain, and what takes a model with one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from scipy import special, stats

from inference import (
    DoublyReparameterized,
    Fit,
    Held,
    KLWarmUp,
    decode,
    elbo_terms,
    encode,
    fit,
    inference_gap,
    label_check,
    log_likelihood,
    pointwise_elbo,
    sample_posterior,
    sample_prior_predictive,
)
from inference.sites import trace_of
from models import guides, hierarchical, semi_supervised, vae
from models.conditions import Labels
from models.likelihoods import Normal
from models.networks import SCALE_FLOOR
from models.priors import (
    UNIT,
    FlowPrior,
    LearnedNormal,
    MixtureOfNormals,
    Prior,
    Setting,
    StandardNormal,
    VampPrior,
)

KEY = jax.random.key(0)
LABELS = Labels(3)
C = np.array([2, 0, 1, 1, 2], np.int32)
conditions = pytest.mark.parametrize("condition", [None, LABELS], ids=["no condition", "labels"])


def setting(condition=None, num_latents=2):
    return Setting("z", num_latents, (4,), condition, Normal(), jnp.tanh, "float32")


def anything(rng, tree, scale=0.5):
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), tree)


def params_in(program, *args, **data):
    """A function without arguments: the parameters that a program starts from, by site."""

    @jax.jit
    def start():
        sites = handlers.trace(handlers.seed(program, KEY)).get_trace(*args, **data)
        return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}

    return start


def shapes_in(program, *args, **data):
    """Their shapes: nothing is computed."""
    return jax.eval_shape(params_in(program, *args, **data))


def distribution(prior, params, at, c=None):
    with handlers.substitute(data=params):
        return prior(at, c)


# --- densities ------------------------------------------------------------------------------------


def numbers_of(params, c):
    """What a prior's numbers are, in float64: weights of their own, or an affine map of a label."""
    if c is None:
        return np.asarray(params["prior"]["numbers"], np.float64)
    (layer,) = params["prior"]["mlp"]["layers"].values()
    return np.eye(3)[c] @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])


def scale_of(raw):
    return np.logaddexp(0, raw + UNIT) + SCALE_FLOOR


@conditions
def test_the_log_density_of_normals_is_scipys(condition, rng):
    at, c = setting(condition), None if condition is None else C
    for prior in (LearnedNormal(), MixtureOfNormals(4)):
        params = anything(rng, shapes_in(prior, at, c), 1.0)
        run = jax.jit(lambda p, z, prior=prior: distribution(prior, p, at, c).log_prob(z))
        z = rng.normal(size=(5, 2)).astype(np.float32)
        numbers = numbers_of(params, c)
        if isinstance(prior, LearnedNormal):
            loc, raw = np.split(numbers, 2, axis=-1)
            exact = stats.norm.logpdf(z, loc, scale_of(raw)).sum(-1)
        else:
            logits, loc, raw = np.split(numbers, [4, 12], axis=-1)
            loc, raw = (a.reshape(*a.shape[:-1], 4, 2) for a in (loc, raw))
            loc = loc + np.asarray(params["prior_centres"])
            each = stats.norm.logpdf(z[:, None], loc, scale_of(raw)).sum(-1)
            exact = special.logsumexp(special.log_softmax(logits, axis=-1) + each, axis=-1)
        np.testing.assert_allclose(run(params, z), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prior", [LearnedNormal(), MixtureOfNormals(1), FlowPrior(), FlowPrior(0)])
def test_where_a_prior_starts(prior, rng):
    """LearnedNormal and flows at Normal(0, I), a component at its width, away from the others."""
    at, z = setting(), jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    params = params_in(prior, at)()
    loc = params.get("prior_centres", np.zeros((1, 2)))[0]
    exact = stats.norm.logpdf(z, loc, 1).sum(-1)
    found = jax.jit(lambda z: distribution(prior, params, at).log_prob(z))(z)
    rounding = 1e-5 if isinstance(prior, FlowPrior) else 10 * SCALE_FLOOR
    np.testing.assert_allclose(found, exact, atol=rounding)
    if prior == FlowPrior(0):
        assert not params
        normal = jax.jit(StandardNormal()(at).log_prob)
        np.testing.assert_array_equal(found, normal(z))
    if isinstance(prior, MixtureOfNormals):
        assert abs(loc).max() > 0.01


@conditions
def test_a_flow_integrates_to_one(condition, rng):
    """On two grids. The finer one is nearer to 1 than the two are to each other."""
    prior, at = FlowPrior(3, 5), setting(condition)
    c = None if condition is None else np.array([0, 2], np.int32)
    params = anything(rng, shapes_in(prior, at, c), 0.4)

    @jax.jit
    def densities(z):
        return jnp.exp(distribution(prior, params, at, c).log_prob(z))

    sums, half = [], 16.0
    for num_points in (200, 400):
        width = 2 * half / num_points
        middles = np.arange(-half, half, width) + width / 2
        grid = np.stack(np.meshgrid(middles, middles), axis=-1)
        grid = grid if c is None else grid[:, :, None]
        density = np.asarray(densities(jnp.asarray(grid, jnp.float32)), np.float64)
        sums.append(density.sum((0, 1)) * width**2)
        edge = max(density[:, [0, -1]].max(), density[[0, -1]].max())
        assert edge * (2 * half) ** 2 < 1e-6
    error = abs(sums[1] - sums[0]).max()
    assert error < 0.01
    assert abs(sums[1] - 1).max() < error + 1e-5
    plain = stats.norm.pdf(grid).prod(-1)
    assert abs(density - plain).max() > 0.01  # the maps are not the identity
    if c is not None:
        assert abs(density[..., 0] - density[..., 1]).max() > 0.01


# --- the prior made from the guide ----------------------------------------------------------------


def pair(family, condition, num_components, num_latents=2):
    """A model with a VampPrior, and the guide that both run. An x is black and white pixels."""
    base = vae.Model(condition, x_shape=(2, 3), num_latents=num_latents, hidden=(4,))
    guide = guides.make(family, base)
    return replace(base, prior=VampPrior(guide, num_components)), guide


def pixels(condition):
    x = np.random.default_rng(0).integers(0, 2, (len(C), 2, 3))
    data = {"x": jnp.asarray(x, jnp.float32)}
    return data if condition is None else data | {"c": jnp.asarray(C)}


def any_params(rng, model, data):
    params = shapes_in(model, **data)
    known = {name: params.pop(name) for name in ("statistics",)}
    positive = jax.tree.map(lambda p: jnp.asarray(rng.uniform(0.5, 2, p.shape), p.dtype), known)
    return anything(rng, params) | positive


@pytest.mark.parametrize(
    ("family", "condition", "num_components"),
    [
        ("mean-field", None, 3),
        ("mean-field", LABELS, 3),
        ("mean-field", None, 1),
        pytest.param("full-covariance", LABELS, 3, marks=pytest.mark.slow),
        pytest.param("full-covariance", None, 1, marks=pytest.mark.slow),
        pytest.param("flow", LABELS, 3, marks=pytest.mark.slow),
    ],
)
def test_a_vampprior_is_the_mean_of_the_guide_at_the_pseudo_inputs(
    family, condition, num_components, rng
):
    """With one pseudo-input it is the guide there. The guide runs for one x and c at a time."""
    (model, guide), data = pair(family, condition, num_components), pixels(condition)
    z = jnp.asarray(rng.normal(size=(len(C), 2)), jnp.float32)

    @jax.jit
    def run(params, z):
        found = trace_of(model, KEY, params | {}, **data)["z"]["fn"].log_prob(z)
        u = model.likelihood.from_real(params["pseudo_inputs"])
        each = []
        for i in range(2):
            c = {} if condition is None else {"c": data["c"][i : i + 1]}
            fns = [
                trace_of(guide, KEY, params, x=u[k : k + 1], **c)["z"]["fn"] for k in range(len(u))
            ]
            each.append(jnp.stack([fn.log_prob(z[i])[0] for fn in fns]))
        return found, jnp.stack(each), u

    found, each, u = jax.device_get(run(any_params(rng, model, data), z))
    assert u.shape == (num_components, 2, 3)
    assert ((u > 0) & (u < 1)).all()
    expected = special.logsumexp(each.astype(np.float64), axis=1) - np.log(num_components)
    assert found.shape == (len(C),)
    np.testing.assert_allclose(found[:2], expected, rtol=1e-4, atol=1e-4)
    assert num_components == 1 or np.ptp(each, axis=1).min() > 1e-3


def test_the_guides_weights_are_one_site_of_both_and_the_prior_has_a_gradient_for_them(rng):
    (model, guide), data = pair("mean-field", None, 3), pixels(None)
    of_model, of_guide = shapes_in(model, **data), shapes_in(guide, **data)
    assert of_model.keys() == {"decoder", "encoder", "pseudo_inputs", "statistics"}
    assert of_guide.keys() == {"encoder", "statistics"}
    shapes = [jax.tree.map(jnp.shape, p["encoder"]) for p in (of_model, of_guide)]
    assert shapes[0] == shapes[1]
    params = any_params(rng, model, data)
    z = jnp.asarray(rng.normal(size=(len(C), 2)), jnp.float32)

    @jax.jit
    def gradients(params):
        def log_prior(params):
            return trace_of(model, KEY, params, **data)["z"]["fn"].log_prob(z).sum()

        return jax.grad(log_prior)(params)

    gradient = gradients(params)
    for name in ("encoder", "pseudo_inputs"):
        assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[name])), name
    assert all(abs(leaf).max() == 0 for leaf in jax.tree.leaves(gradient["decoder"]))


@pytest.mark.parametrize(
    "family", [guides.structured, pytest.param(hierarchical.TopDown, marks=pytest.mark.slow)]
)
def test_of_several_layers_the_prior_is_that_of_the_highest(family, rng):
    base = hierarchical.Model(
        x_shape=(4,), num_latents=3, hidden=(), likelihood=Normal(), above=(hierarchical.Layer(2),)
    )
    guide = family(base)
    model, x = replace(base, prior=VampPrior(guide, 3)), jnp.zeros((5, 4))
    z = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)

    @jax.jit
    def run(key):
        sites = trace_of(model, key, {}, x=x)
        params = {n: s["value"] for n, s in sites.items() if s["type"] == "param"}
        u = params["pseudo_inputs"]
        q = trace_of(guide, key, params, x=u)["z2"]["fn"].log_prob(z[:, None])
        return sites["z2"]["fn"].log_prob(z), q, u

    found, each, u = run(KEY)
    assert u.shape == (3, 4)
    assert (found.shape, each.shape) == ((5,), (5, 3))
    expected = special.logsumexp(np.asarray(each, np.float64), axis=1) - np.log(3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# --- what takes a model with a prior --------------------------------------------------------------

PRIORS = {
    "standard": StandardNormal(),
    "normal": LearnedNormal(),
    "mixture": MixtureOfNormals(2),
    "vamp": VampPrior(guides.mean_field(vae.Model()), 3),  # of another guide below
    "flow": FlowPrior(2, 4),
}


def small(name, condition=None):
    """A model and its guide, of a size that compiles fast."""
    base = vae.Model(condition, x_shape=(3,), num_latents=2, hidden=(), likelihood=Normal())
    guide = guides.mean_field(base)
    prior = PRIORS[name]
    if isinstance(prior, VampPrior):
        return replace(base, prior=replace(prior, guide=guide)), guide
    model = replace(base, prior=prior)
    return model, guides.mean_field(model)


def table(condition=None, size=20):
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(size, 3)).astype(np.float32)}
    labels = {"c": np.arange(size, dtype=np.int32) % 3}
    return data if condition is None else data | labels


def train(model, guide, data, num_steps=3, **settings):
    return fit(model, guide, data, num_steps=num_steps, progress=False, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("condition", [None, LABELS])
@pytest.mark.parametrize("name", PRIORS)
def test_judges_and_generators_take_every_prior(name, condition):
    (model, guide), data = small(name, condition), table(condition)
    assert isinstance(model.prior, Prior)
    result = train(model, guide, data)
    c = {name: data[name] for name in data if name == "c"}
    size, made = 20, 20 if c else 1
    drawn = sample_prior_predictive(result, 2, **c)
    assert drawn["z"].shape == (1, 2, made, 2)
    assert drawn["x"].shape == (1, 2, made, 3)
    assert sample_posterior(result, data, 2)["z"].shape == (1, 2, size, 2)
    latents = encode(result, data)
    assert latents["z"].shape == (1, size, 2)
    assert decode(result, latents, **c)["x"].shape == (1, size, 3)
    if condition is None:
        assert np.isfinite(elbo_terms(result, data).kl.pointwise).all()
        start = train(model, guide, data, num_steps=1)
        for site in result.params.keys() - {"statistics"}:  # every parameter is trained
            trees = result.params[site], start.params[site]
            pairs = zip(*map(jax.tree.leaves, trees), strict=True)
            assert all((a != b).any() for a, b in pairs), site
        return
    check = label_check(result, data, 3, key=KEY, num_samples=4)
    assert np.ptp(check.log_likelihood[0], axis=1).min() > 0
    given = data | {"c": np.full(size, 1, np.int32)}
    alone = log_likelihood(result, given, key=KEY, num_samples=4).pointwise[0]
    np.testing.assert_allclose(check.log_likelihood[0, :, 1], alone, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def vamp():
    """Two seeds of a model with a VampPrior."""
    model, guide = small("vamp")
    return train(model, guide, table(), num_steps=20, num_seeds=2)


@pytest.mark.slow
def test_a_fit_with_a_vampprior_is_saved(vamp, tmp_path):
    assert vamp.elbo.shape[0] == 2
    assert np.isfinite(vamp.elbo).all()
    u = vamp.params["pseudo_inputs"]
    assert (u[0] != u[1]).all()
    vamp.save(tmp_path / "fit")
    again = Fit.load(tmp_path / "fit", vamp.model, vamp.guide)
    ours, theirs = (pointwise_elbo(one, table()).pointwise for one in (vamp, again))
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_held_model_with_a_vampprior_takes_another_guide(vamp):
    """The guide of its prior is the model's own then. The other one has an encoder for itself."""
    held = Held(vamp.model, vamp.params_of(0))
    guide = guides.full_covariance(replace(vamp.model, prior=StandardNormal()))
    result = train(held, guide, table(), 1000, optimizer=optax.adam(1e-2))
    assert result.params.keys() == {"encoder", "statistics"}
    shapes = [jax.tree.leaves(one.params_of(0)["encoder"])[0].shape for one in (vamp, result)]
    assert shapes[0] != shapes[1]
    found = log_likelihood(result, table(), num_samples=2000)
    from_prior = Fit.from_params(
        vamp.model, guides.prior(vamp.model), vamp.params_of(0), example=table()
    )
    plain = log_likelihood(from_prior, table(), num_samples=20_000)
    error = np.hypot(found.monte_carlo_error[0], plain.monte_carlo_error[0])
    assert error < 0.05
    assert abs(found.estimate[0] - plain.estimate[0]) < 4 * error


@pytest.mark.slow
def test_the_gap_of_a_model_with_a_vampprior_has_two_parts(vamp):
    gap = inference_gap(
        vamp.isel(seed=0), table(), num_steps=400, learning_rate=0.05, num_samples=200
    )
    parts = gap.approximation, gap.amortisation
    assert all(np.isfinite(part.pointwise).all() for part in parts)
    # after 20 steps the encoder is far from its best, and q* is not
    assert gap.amortisation.estimate[0] > 10 * gap.amortisation.monte_carlo_error[0]
    assert gap.approximation.estimate[0] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [KLWarmUp(Trace_ELBO(), num_steps=2), DoublyReparameterized(num_particles=2)]
)
def test_objectives_take_a_vampprior(objective):
    model, guide = small("vamp")
    result = train(model, guide, table(), objective=objective, num_seeds=2)
    assert np.isfinite(result.elbo).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


# --- what a prior gains ---------------------------------------------------------------------------

D, ROOM = 4, 0.03  # nats per datum: how far a training may end from the best model and guide


def affine(prior, num_latents):
    """A linear-Gaussian model but for its prior, and a guide that contains its posterior."""
    base = vae.Model(x_shape=(D,), num_latents=num_latents, hidden=(), likelihood=Normal())
    if prior is VampPrior:
        guide = guides.full_covariance(base)
        return replace(base, prior=VampPrior(guide, 5)), guide
    model = replace(base, prior=prior)
    return model, guides.full_covariance(model)


def log_likelihoods(model, guide, train_data, test, num_steps=3000):
    rate = optax.adam(optax.cosine_decay_schedule(2e-2, num_steps))
    result = train(model, guide, {"x": train_data}, num_steps, optimizer=rate, batch_size=100)
    found = log_likelihood(result, {"x": test}, num_samples=200, batch_size=1000)
    return found.pointwise[0].astype(np.float64)


@pytest.mark.slow
def test_no_prior_gains_on_gaussian_data():
    """The best prior is N(0, I) there. A mixture of one component is as good."""
    rng = np.random.default_rng(0)
    weights, noise = rng.normal(size=(2, D)), 0.5

    def simulate(size):
        x = rng.normal(size=(size, 2)) @ weights + noise * rng.normal(size=(size, D))
        return x.astype(np.float32)

    data, test = simulate(4000), simulate(2000)
    plain = log_likelihoods(*affine(StandardNormal(), 2), data, test)
    exact = stats.multivariate_normal(np.zeros(D), weights.T @ weights + noise**2 * np.eye(D))
    # the maximum of the likelihood of 4,000 data: fewer than 20 numbers, each costs 1 / 2N
    short = exact.logpdf(test) - plain
    assert abs(short.mean()) < 20 / 8000 + 4 * short.std() / np.sqrt(len(short)) + 0.005
    for prior in (
        LearnedNormal(),
        MixtureOfNormals(1),
        MixtureOfNormals(3),
        VampPrior,
        FlowPrior(2, 8),
    ):
        gain = log_likelihoods(*affine(prior, 2), data, test) - plain
        error = gain.std() / np.sqrt(len(gain))
        assert gain.mean() < 2 * error, prior
        assert gain.mean() > -ROOM - 4 * error, prior


@pytest.mark.slow
def test_a_mixture_gains_what_it_must_on_data_from_two_groups():
    """The guide follows: an MLP encoder, one number z whose posterior is nearly one Normal.

    The best model with N(0, 1) is the Normal with the data's own mean and covariance, which are
    those of one factor and noise.
    """
    rng = np.random.default_rng(0)
    weights, noise, centre, width = np.array([1.0, -0.8, 0.5, 0.3]), 0.5, 2.0, 0.5

    def simulate(size):
        z = centre * rng.choice([-1.0, 1.0], size) + width * rng.normal(size=size)
        return (z[:, None] * weights + noise * rng.normal(size=(size, D))).astype(np.float32)

    def log_normal(x, mean, variance):
        covariance = variance * np.outer(weights, weights) + noise**2 * np.eye(D)
        return stats.multivariate_normal(mean * weights, covariance).logpdf(x)

    data, test = simulate(4000), simulate(2000)
    groups = [log_normal(test, sign * centre, width**2) for sign in (-1, 1)]
    known = np.logaddexp(*groups) - np.log(2) - log_normal(test, 0, centre**2 + width**2)
    assert known.mean() > 0.3
    found = []
    for prior in (StandardNormal(), MixtureOfNormals(2)):
        model, _ = affine(prior, 1)
        guide = guides.mean_field(model, lambda n, rngs: model.encoder(n, hidden=(16,), rngs=rngs))  # noqa: B023
        found.append(log_likelihoods(model, guide, data, test))
    difference = found[1] - found[0] - known
    error = difference.std() / np.sqrt(len(difference))
    assert abs(difference.mean()) < ROOM + 4 * error


# --- what is refused ------------------------------------------------------------------------------


def refused(model, guide, data):
    jax.eval_shape(lambda: trace_of(replace(model, prior=VampPrior(guide, 2)), KEY, {}, **data))


LAYERS = hierarchical.Model(x_shape=(4,), num_latents=2, hidden=(), likelihood=Normal())
TABLE = vae.Model(x_shape=(4,), num_latents=2, hidden=(), likelihood=Normal())
M2 = semi_supervised.Model(num_classes=3, x_shape=(4,), num_latents=2, likelihood=Normal())


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (
            LAYERS,
            hierarchical.BottomUp(LAYERS),
            "draws 'z2' first, .*got one that draws 'z1' first",
        ),
        (M2, guides.structured(M2), "draws 'z' first, .* got one that draws 'y' first"),
        (M2, semi_supervised.Guide(M2), "draws 'z' first, .* got one that draws 'y' first"),
        (TABLE, guides.semi_amortised(TABLE), "draws random numbers on the way; take another fam"),
    ],
)
def test_guides_that_make_no_prior_are_refused(model, guide, message):
    with pytest.raises(ValueError, match=f"^prior: expected a guide .*{message}") as caught:
        refused(model, guide, {"x": jnp.zeros((3, 4))})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MixtureOfNormals(0), ValueError, "num_components: expected at least 1, got 0"),
        (lambda: MixtureOfNormals(2, (3, 0)), ValueError, r"hidden: expected at .* got \(3, 0\)"),
        (lambda: LearnedNormal((0,)), ValueError, r"hidden: expected at least 1, got \(0,\)"),
        (lambda: FlowPrior(-1), ValueError, "num_layers: expected at least 0, got -1"),
        (lambda: FlowPrior(1, 0), ValueError, "num_hidden: expected at least 1, got 0"),
        (lambda: VampPrior(print, 0), ValueError, "num_components: expected at least 1, got 0"),
        (
            lambda: vae.Model(prior=MixtureOfNormals),
            TypeError,
            "prior: expected an object of models.priors, got the class MixtureOfNormals; write",
        ),
        (lambda: vae.Model(prior="vamp"), TypeError, "prior: expected an object .* got 'vamp'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_settings_are_named(make, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_guide_of_a_model_whose_prior_runs_a_guide_says_which_to_take():
    model, _ = small("vamp")
    with pytest.raises(ValueError, match="take the guide that the model's prior runs") as caught:
        jax.eval_shape(lambda: trace_of(guides.mean_field(model), KEY, {}, **table()))
    assert "\n" not in str(caught.value)
