"""The mixture of Gaussians: each closed form against SciPy, scikit-learn and sums written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import random
from numpyro import handlers
from numpyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from scipy import optimize, stats
from scipy.special import logsumexp, softmax, xlogy
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris, load_wine
from sklearn.mixture import GaussianMixture

from inference import ReweightedWakeSleep, fit
from models import guides, mixture

K, D, N = 3, 4, 12
KINDS = {"any covariance": 0, "latents": 2}  # by name, the number of latents
every_kind = pytest.mark.parametrize("num_latents", KINDS.values(), ids=list(KINDS))
LABELS = {
    "none": None,
    "unknown": np.full(N, -1),
    "some": np.array([0, -1, 2, 1, -1, -1, 2, -1, 0, -1, 1, -1]),
    "all": np.arange(N) % K,
}


def make(num_latents, seed=0):
    """A model, its parameters, and data near its components."""
    rng = np.random.default_rng(seed)
    params = {"logits": rng.normal(size=K), "loc": 1.5 * rng.normal(size=(K, D))}
    if num_latents:
        params["factor"] = rng.normal(size=(K, D, num_latents))
        params["sigma"] = rng.uniform(0.5, 1.0, K)
    else:
        root = np.tril(0.5 * rng.normal(size=(K, D, D)), -1)
        params["scale_tril"] = root + np.eye(D) * rng.uniform(0.5, 1.5, (K, 1, D))
    params = {name: np.asarray(value, np.float32) for name, value in params.items()}
    x = params["loc"][np.arange(N) % K] + rng.normal(size=(N, D))
    return mixture.Model(K, (D,), num_latents), params, x.astype(np.float32)


def components(params):
    """log p(x, y = k) of each component, as a function of x, by SciPy."""
    weights = softmax(np.asarray(params["logits"], np.float64))
    parts = []
    for k, loc in enumerate(np.asarray(params["loc"], np.float64)):
        if "factor" in params:
            W, sigma = params["factor"][k].astype(np.float64), float(params["sigma"][k])
            covariance = W @ W.T + sigma**2 * np.eye(len(W))
        else:
            root = params["scale_tril"][k].astype(np.float64)
            covariance = root @ root.T
        parts.append((weights[k], stats.multivariate_normal(loc, covariance)))
    return parts


def log_joint(params, x):
    return np.stack([np.log(w) + part.logpdf(x) for w, part in components(params)], axis=1)


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", LABELS)
@every_kind
def test_likelihood_and_posterior_are_sums_over_scipys_densities(num_latents, labels):
    _, params, x = make(num_latents)
    joint, y = log_joint(params, x), LABELS[labels]
    likelihood, posterior = logsumexp(joint, axis=1), softmax(joint, axis=1)
    for n, label in enumerate([] if y is None else y):
        if label != -1:
            likelihood[n], posterior[n] = joint[n, label], np.eye(K)[label]
    np.testing.assert_allclose(mixture.log_likelihood(params, x, y), likelihood, rtol=1e-10)
    np.testing.assert_allclose(mixture.posterior(params, x, y), posterior, rtol=1e-9)


@every_kind
def test_the_program_summed_over_its_components_is_the_formula(num_latents):
    """With labels of every kind. y as an objective sums over it, (K, 1), and label by label.

    p(x, y) = p(x, y, z) / p(z | y, x) at any z: so the posterior of z is right, too.
    """
    model, params, x = make(num_latents)
    z = np.random.default_rng(1).normal(size=(K, N, max(1, num_latents))).astype(np.float32)
    of_z = np.zeros((K, N))
    if num_latents:
        mean, precision = mixture.latent_posterior(params, x)
        for k in range(K):
            fn = stats.multivariate_normal(cov=np.linalg.inv(precision[k]))
            of_z[k] = fn.logpdf(z[k] - mean[:, k])

    @jax.jit
    def log_densities(data):
        """(K, N), twice."""

        def total(y, z):
            program = handlers.substitute(model, params | {"y": y, "z": z})
            sites = handlers.trace(handlers.seed(program, 0)).get_trace(**data)
            terms = [s["fn"].log_prob(s["value"]) for s in sites.values() if s["type"] == "sample"]
            assert {jnp.shape(term)[-1] for term in terms} <= {1, N}
            return sum(terms)

        one_by_one = jax.vmap(lambda k, z: total(jnp.full(N, k), z))(jnp.arange(K), z)
        return total(jnp.arange(K)[:, None], z), one_by_one

    for y in LABELS.values():
        expected = mixture.log_likelihood(params, x, y)
        for log_density in log_densities({"x": x} if y is None else {"x": x, "y": y}):
            found = logsumexp(np.asarray(log_density, np.float64) - of_z, axis=0)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def standardised(load):
    x = load().data
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32).astype(np.float64)


@functools.cache
def by_em(load):
    """Data, standardised, and the maximum that EM finds from k-means."""
    x = standardised(load)
    return x, GaussianMixture(3, tol=1e-6, max_iter=1_000, random_state=0).fit(x)


def params_of(em):
    """Our parameters for scikit-learn's."""
    return {
        "logits": np.log(em.weights_),
        "loc": em.means_,
        "scale_tril": np.linalg.cholesky(em.covariances_),
    }


@pytest.mark.parametrize("load", [load_iris, load_wine])
def test_likelihood_and_posterior_are_those_of_scikit_learn(load):
    x, em = by_em(load)
    params = params_of(em)
    np.testing.assert_allclose(mixture.covariances(params), em.covariances_, atol=1e-12)
    np.testing.assert_allclose(mixture.log_likelihood(params, x), em.score_samples(x), rtol=1e-8)
    np.testing.assert_allclose(mixture.posterior(params, x), em.predict_proba(x), atol=1e-8)


def test_the_posterior_of_the_latents_conditions_the_joint_gaussian():
    _, params, x = make(2)
    x, loc = x.astype(np.float64), params["loc"].astype(np.float64)
    mean, precision = mixture.latent_posterior(params, x)
    for k in range(K):
        W, sigma = params["factor"][k].astype(np.float64), float(params["sigma"][k])
        gain = np.linalg.solve(W @ W.T + sigma**2 * np.eye(D), W).T  # Cov(z, x) Cov(x)^-1
        np.testing.assert_allclose(mean[:, k], (x - loc[k]) @ gain.T, rtol=1e-8)
        np.testing.assert_allclose(np.linalg.inv(precision[k]), np.eye(2) - gain @ W, atol=1e-10)


@every_kind
def test_the_discriminant_is_the_joint_density(num_latents):
    _, params, x = make(num_latents)
    kernel, bias = mixture.discriminant(params)
    rows, columns = np.triu_indices(D)
    x = x.astype(np.float64)
    features = np.concatenate([x, x[:, rows] * x[:, columns]], axis=1)
    np.testing.assert_allclose(features @ kernel + bias, log_joint(params, x), rtol=1e-6)


# --- the program ----------------------------------------------------------------------------------


@every_kind
def test_the_model_generates_what_the_formulas_say(num_latents):
    model, params, _ = make(num_latents)
    num_data = 20_000

    @jax.jit
    def generate(key, y):
        program = handlers.seed(handlers.substitute(model, params), key)
        sites = handlers.trace(program).get_trace(y=y)
        return sites["y"]["value"], sites["x"]["value"]

    y, x = map(np.asarray, generate(random.key(0), np.full(num_data, -1)))
    for k, (weight, part) in enumerate(components(params)):
        own = x[y == k].astype(np.float64)
        error = np.sqrt(weight * (1 - weight) / num_data)
        assert abs(len(own) / num_data - weight) < 4.5 * error
        away = own - part.mean
        products = (away[:, :, None] * away[:, None, :]).reshape(len(own), -1)
        error = np.sqrt(np.diag(part.cov) / len(own))
        assert (np.abs(away.mean(0)) < 4.5 * error).all()
        error = products.std(0) / np.sqrt(len(own))
        assert (np.abs(products.mean(0) - part.cov.ravel()) < 4.5 * error).all()


def abstract_sites(program, **data):
    """Sites by name, as shapes: nothing is computed."""
    sites = {}
    jax.eval_shape(
        lambda: sites.update(handlers.trace(handlers.seed(program, 0)).get_trace(**data))
    )
    return sites


def test_without_data_the_model_generates_one_datum():
    sites = abstract_sites(mixture.Model(K, (D,), 2))
    assert {n: s["value"].shape for n, s in sites.items() if s["type"] == "sample"} == {
        "y": (1,),
        "z": (1, 2),
        "x": (1, D),
    }
    assert [frame.name for frame in sites["y"]["cond_indep_stack"]] == ["data"]


@every_kind
def test_parameters_have_the_shapes_of_the_table(num_latents):
    model, known, _ = make(num_latents)
    sites = abstract_sites(model)
    shapes = {n: s["value"].shape for n, s in sites.items() if s["type"] == "param"}
    assert shapes == {name: value.shape for name, value in known.items()}


@every_kind
def test_the_families_of_discrete_sites_draw_what_the_model_does_not_observe(num_latents):
    model, _, x = make(num_latents)
    data = {"x": x, "y": LABELS["some"]}
    latents = {n: s for n, s in abstract_sites(model, **data).items() if n in ("y", "z")}
    for family in ("mean-field", "structured"):
        sites = abstract_sites(guides.make(family, model), **data)
        assert {n for n, s in sites.items() if s["type"] == "sample"} == latents.keys()
        for name, site in latents.items():
            assert sites[name]["value"].shape == site["value"].shape
            assert sites[name]["cond_indep_stack"] == site["cond_indep_stack"]
    for family in (
        "low-rank",
        "full-covariance",
        "flow",
        "inverse-autoregressive",
        "neural-spline",
    ):
        with pytest.raises(ValueError, match="'y': expected real numbers in the family"):
            abstract_sites(guides.make(family, model), **data)


def test_components_and_seeds_start_different():
    model = mixture.Model(K, (D,), 1)

    @jax.jit
    def starts(key):
        program = handlers.substitute(model, {"y": jnp.zeros(1, int), "z": jnp.zeros((1, 1))})
        sites = handlers.trace(handlers.seed(program, key)).get_trace(x=jnp.zeros((1, D)))
        return {name: sites[name]["value"] for name in ("loc", "factor")}

    first, second = map(jax.device_get, map(starts, random.split(random.key(0))))
    for name in first:
        assert (first[name] != second[name]).all()
        assert all((first[name][i] != first[name][i - 1]).all() for i in range(K))


def test_the_encoder_is_affine_in_x_and_its_products_and_starts_near_zero():
    """So with the weights of the discriminant it gives the exact posterior."""
    model, params, x = make(0)

    @jax.jit
    def run(x, y):
        encoder = model.encoder(K, rngs=nnx.Rngs(0))
        first = encoder(x=x, y=y)
        kernel, bias = mixture.discriminant(params)
        encoder.affine.kernel[...] = jnp.asarray(kernel, jnp.float32)
        encoder.affine.bias[...] = jnp.asarray(bias, jnp.float32)
        return first, jax.nn.softmax(encoder(x=x))

    start, posterior = map(np.asarray, run(x, np.zeros(N, int)))
    assert 0 < np.sqrt(np.mean(start**2)) < 1
    np.testing.assert_allclose(posterior, mixture.posterior(params, x), atol=1e-4)


# --- training -------------------------------------------------------------------------------------
#
# The likelihood of a mixture has local maxima, and EM finds one. So training starts where
# scikit-learn does: at the moments of the clusters of k-means. The guide starts at the posterior.

ROOM = 0.03  # nats per datum
START = {"median": 0.0, "spread": 1.0}  # what the guide adds to its logits: nothing


@pytest.mark.parametrize("labels", ["unknown", "some", "all"])
def test_the_elbo_of_the_exact_guide_is_the_likelihood(labels):
    """For y summed over. So a guide that knows nothing of a label loses nothing by it."""
    _, params, x = make(0)
    data = {"x": x, "y": LABELS[labels]}
    loss = loss_of(jax.tree.map(jnp.float32, params | exact_guide(params)), data)
    expected = mixture.log_likelihood(params, **data).sum()
    assert -float(loss) == pytest.approx(expected, rel=1e-5)


@jax.jit
def loss_of(params, data):
    model = mixture.Model(K, (D,))
    return TraceEnum_ELBO().loss(random.key(0), params, model, guides.mean_field(model), **data)


def exact_guide(params):
    """The encoder that makes q(y | x) the posterior: logits count from those of the prior."""
    kernel, bias = mixture.discriminant(params)
    num_components = len(bias)
    return {
        "encoder": {"affine": {"kernel": kernel, "bias": bias}},
        "statistics": {
            "latents": {
                "y": {name: np.full(num_components, value) for name, value in START.items()}
            }
        },
    }


def from_k_means(x):
    """The weights, means and covariances of three clusters, and their posterior."""
    cluster = KMeans(3, n_init=1, random_state=0).fit_predict(x)
    params = {
        "logits": np.log(np.bincount(cluster) / len(x)),
        "loc": np.stack([x[cluster == k].mean(0) for k in range(3)]),
        "scale_tril": np.linalg.cholesky(
            np.stack([np.cov(x[cluster == k].T, bias=True) for k in range(3)])
        ),
    }
    return jax.tree.map(jnp.float32, params | exact_guide(params))


def train(model, guide, data, objective, num_steps, **settings):
    schedule = optax.cosine_decay_schedule(0.05, num_steps)
    return fit(
        model,
        guide,
        data,
        objective=objective,
        optimizer=optax.adam(schedule, b2=0.99),
        num_steps=num_steps,
        progress=False,
        **settings,
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(guide, values, data):
    """The logits of q(y | x), by the guide's own site."""
    program = handlers.seed(handlers.substitute(guide, values), 0)
    return handlers.trace(program).get_trace(**data)["y"]["fn"].logits


def q_of_y(result, data):
    values = result.params_of(0) | result.mutable_of(0)
    return softmax(np.asarray(logits_of(result.guide, values, data), np.float64), axis=1)


def divergence(q, p):
    """KL(q || p) of each row."""
    return np.sum(xlogy(q, q) - xlogy(q, p), axis=1)


def arrived(objective, num_steps):
    """A fit to iris, from where EM starts. It must end where EM does.

    Returns:
        The fit, the data, log p(x) of each datum and p(y | x), at its parameters.
    """
    x, em = by_em(load_iris)
    model, start, maximum = mixture.Model(3, (4,)), from_k_means(x), em.score(x)
    assert mixture.log_likelihood(start, x).mean() < maximum - 5 * ROOM
    data = {"x": x.astype(np.float32)}
    result = train(model, guides.mean_field(model), data, objective, num_steps, init=start)
    params = result.params_of(0)
    log_p, posterior = mixture.log_likelihood(params, x), mixture.posterior(params, x)
    # no step from a local maximum gains anything: what is above is rounding and EM's tolerance
    assert maximum - ROOM < log_p.mean() < maximum + 1e-3
    assert np.abs(posterior - em.predict_proba(x)).max(axis=1).mean() < ROOM
    return result, data, log_p, posterior


@pytest.mark.slow
def test_a_sum_over_y_arrives_where_em_does():
    """The last ELBO has no noise. It lacks KL(q(y | x) || p(y | x)), and one step."""
    result, _, log_p, _ = arrived(TraceEnum_ELBO(), 200)
    assert -1e-3 < log_p.mean() - np.asarray(result.elbo)[0, -1] < ROOM


@pytest.mark.slow
@pytest.mark.parametrize("objective", [TraceGraph_ELBO(5), ReweightedWakeSleep(10)])
def test_draws_of_y_arrive_where_em_does(objective):
    result, data, _, posterior = arrived(objective, 600)
    assert divergence(q_of_y(result, data), posterior).mean() < ROOM


def simulated(num_data):
    """A mixture with one latent number, its data, and labels: three in ten are known."""
    rng = np.random.default_rng(0)
    weights = np.array([0.5, 0.3, 0.2])
    params = {
        "logits": np.log(weights),
        "loc": 1.2 * rng.normal(size=(3, 3)),
        "factor": rng.normal(size=(3, 3, 1)),
        "sigma": np.array([0.3, 0.4, 0.5]),
    }
    y, z = rng.choice(3, size=num_data, p=weights), rng.normal(size=(num_data, 1))
    x = params["loc"][y] + np.einsum("ndl,nl->nd", params["factor"][y], z)
    x += params["sigma"][y][:, None] * rng.normal(size=x.shape)
    known = rng.uniform(size=num_data) < 0.3
    return params, {"x": x.astype(np.float32), "y": np.where(known, y, -1)}


def climbed(params, data):
    """The parameters at the local maximum of the exact likelihood next to some, by SciPy."""
    shapes = {name: value.shape for name, value in params.items()}
    ends = np.cumsum([value.size for value in params.values()])[:-1]

    def unpack(vector):
        parts = dict(zip(shapes, np.split(vector, ends), strict=True))
        parts = {name: part.reshape(shapes[name]) for name, part in parts.items()}
        return parts | {"sigma": np.exp(parts["sigma"])}

    def loss(vector):
        return -mixture.log_likelihood(unpack(vector), **data).mean()

    start = [*map(np.ravel, (params | {"sigma": np.log(params["sigma"])}).values())]
    options = {"ftol": 1e-5}  # relative: far below ROOM
    found = optimize.minimize(loss, np.concatenate(start), method="L-BFGS-B", options=options)
    return unpack(found.x)


@pytest.mark.slow
def test_labels_seen_in_part_lead_a_mixture_with_latents_to_its_maximum():
    """From random parameters: the labelled data tell the components apart."""
    truth, data = simulated(200)
    best = climbed(truth, data)
    maximum = mixture.log_likelihood(best, **data).mean()
    model = mixture.Model(3, (3,), 1)
    result = train(model, guides.structured(model), data, TraceEnum_ELBO(), 800)
    params = result.params_of(0)
    reached = mixture.log_likelihood(params, **data).mean()
    assert maximum - ROOM < reached < maximum + 1e-3
    exact, x = mixture.posterior(params, data["x"]), data["x"]
    assert np.abs(exact - mixture.posterior(best, x)).max(axis=1).mean() < ROOM
    unknown = data["y"] == -1
    q = q_of_y(result, data)
    assert divergence(q[unknown], exact[unknown]).mean() < ROOM
    np.testing.assert_array_equal(q[~unknown], np.eye(3)[data["y"][~unknown]])


# --- what is refused ------------------------------------------------------------------------------

SMALL = mixture.Model(K, (D,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixture.Model(0, (4,)), "num_components: expected at least 1, got 0"),
        (lambda: mixture.Model(2, ()), r"x_shape: expected one positive size, \(D,\), got \(\)"),
        (lambda: mixture.Model(2, (2, 2)), r"x_shape: expected one .* got \(2, 2\); flatten x"),
        (lambda: mixture.Model(2, (0,)), r"x_shape: expected one positive size, .* got \(0,\)"),
        (lambda: mixture.Model(2, (4,), -1), "num_latents: expected at least 0, got -1; 0 is for"),
        (
            lambda: SMALL.check_data(x=np.zeros((5, 3), np.float32)),
            r"x: expected shape \(N, 4\), got \(5, 3\); reshape x, or set x_shape=\(3,\)",
        ),
        (
            lambda: SMALL.check_data(x=np.zeros((5, 4), int)),
            "x: expected floats, got int64; give the data as floats",
        ),
        (
            lambda: SMALL.check_data(y=np.array([0, -1, 3, 5])),
            "y: expected labels 0 to 2, or -1 where the label is unknown, got 3, 5; mend",
        ),
        (
            lambda: SMALL.check_data(y=np.array([-2, 0])),
            "y: expected labels 0 to 2, or -1 where the label is unknown, got -2; mend",
        ),
        (
            lambda: SMALL.check_data(y=np.array([0.0, np.nan])),
            "y: expected integers, got float64; give labels as integers, and -1 where",
        ),
        (
            lambda: SMALL.check_data(y=np.zeros((5, 1), int)),
            r"y: expected one label per datum, shape \(N,\), got \(5, 1\); give one column",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64])
def test_labels_of_every_integer_type_are_taken(kind):
    y = np.arange(N).astype(kind) % K
    SMALL.check_data(y=y)
    sites = abstract_sites(SMALL, y=y)
    assert sites["x"]["value"].shape == (N, D)
