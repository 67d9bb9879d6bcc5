"""Discrete latent sites in the families, and labels that the data tell in part.

The latents of ``PROGRAMS`` are all discrete. So every number below is a finite sum.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from numpyro.infer.util import compute_log_probs
from scipy import special, stats

from inference import (
    Fit,
    FreeBits,
    Hybrid,
    KLWarmUp,
    KLWeighted,
    LabelTerm,
    ProgramError,
    ReweightedWakeSleep,
    elbo_terms,
    encode,
    fit,
    log_likelihood,
    pointwise_elbo,
    reconstruct,
    sample_posterior,
    sample_prior_predictive,
    sites,
    traits,
)
from inference.sites import abstract, array_kinds, is_fixed, trace_of
from models import guides
from models.labels import partly_observed, told

KEY = random.key(0)
LOC = np.array([-1.0, 0.3, 1.5], np.float32)
PROBS = np.array([0.2, 0.5, 0.3], np.float32)
X = np.array([-1.2, 0.1, 0.9, 2.0, 0.4], np.float32)
MASKS = {"none": [-1] * 5, "all": [0, 1, 2, 2, 1], "some": [-1, 1, -1, 0, -1]}


def two(x, y=None):
    """A label, and a switch that depends on it."""
    with numpyro.plate("data", len(x)):
        label = partly_observed("y", dist.Categorical(jnp.asarray(PROBS)), y)
        b = numpyro.sample("b", dist.Bernoulli(jnp.array([0.3, 0.6, 0.8])[label]))
        numpyro.sample("x", dist.Normal(jnp.asarray(LOC)[label] + 0.8 * b, 0.5), obs=x)


def nested(x, y=None):
    """A label, and a switch at each of two times."""
    with numpyro.plate("data", len(x), dim=-2):
        given = None if y is None else y[:, None]
        label = partly_observed("y", dist.Categorical(jnp.asarray(PROBS)), given)
        with numpyro.plate("times", 2, dim=-1):
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            loc = jnp.asarray(LOC)[label] + jnp.array([0.8, -0.4]) * b
            numpyro.sample("x", dist.Normal(loc, 0.5), obs=x[:, None] + jnp.zeros(2))


PROGRAMS = {"two": two, "nested": nested}


def data_of(mask="some"):
    return {"x": jnp.asarray(X), "y": jnp.array(MASKS[mask], jnp.int32)}


def abstract_sites(program, data):
    return sites.abstract_sites(program, 0, abstract(data))


def any_params(guide, data):
    """Parameters that no training made."""
    rng, params = np.random.default_rng(0), {}
    for name, site in abstract_sites(guide, data).items():
        if site["type"] == "param":
            value = 1.0 if is_fixed(site) else None
            draw = lambda p, v=value: jnp.asarray(v or rng.normal(size=p.shape) / 5, p.dtype)  # noqa: E731
            params[name] = jax.tree.map(lambda p, d=draw: d(p) * jnp.ones(p.shape), site["value"])
    return params


def joint_densities(model, guide, params, data):
    """log p and log q of every joint value of a datum's latents: (J, N) each, by site."""
    num_times = 2 if model is nested else 1
    log_p, log_q = [], []
    for values in itertools.product(range(3), *[range(2)] * num_times):
        y = jnp.full((5, 1) if model is nested else 5, values[0])
        b = jnp.tile(jnp.array(values[1:]), (5, 1)) if model is nested else jnp.full(5, values[1])
        terms = []
        for program in (model, guide):
            known = params | {"y": y, "b": b}
            found, _ = compute_log_probs(program, (), data, known, sum_log_prob=False)
            terms.append({n: np.asarray(v).reshape(5, -1).sum(1) for n, v in found.items()})
        log_p.append(terms[0])
        log_q.append(terms[1])
    joined = lambda parts: {n: np.stack([p[n] for p in parts]) for n in parts[0]}  # noqa: E731
    return joined(log_p), joined(log_q)


@pytest.fixture(scope="module")
def known():
    """A program, a family and a mask: the fit, the data, log p and log q of every value."""
    made = {}

    def build(program, family, mask):
        if (program, family, mask) not in made:
            model, data = PROGRAMS[program], data_of(mask)
            guide = guides.make(family, model)
            params = any_params(guide, data)
            result = Fit.from_params(model, guide, params, example=data)
            densities = joint_densities(model, guide, params, data)
            made[program, family, mask] = result, data, params, *densities
        return made[program, family, mask]

    return build


def total(terms):
    return sum(terms.values())


CASES = [
    ("two", "structured", "some"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            ("nested", "structured", "some"),
            ("two", "mean-field", "some"),
            ("two", "structured", "none"),
            ("two", "structured", "all"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_the_bound_and_the_likelihood_are_the_sums(known, case):
    """In training and in the judges. Where a label is known, log p(x, y)."""
    result, data, params, log_p, log_q = known(*case)
    q = np.exp(total(log_q))
    np.testing.assert_allclose(q.sum(0), 1, rtol=1e-5)
    elbo = (q * (total(log_p) - total(log_q))).sum(0)
    objective = TraceEnum_ELBO()
    loss = jax.jit(lambda p: objective.loss(KEY, p, result.model, result.guide, **data))(params)
    np.testing.assert_allclose(-loss, elbo.sum(), rtol=2e-6)
    np.testing.assert_allclose(pointwise_elbo(result, data).pointwise[0], elbo, rtol=1e-5)
    terms = elbo_terms(result, data)
    np.testing.assert_allclose(terms.elbo.pointwise[0], elbo, rtol=1e-4)
    kl = {name: (q * (log_q[name] - log_p[name])).sum(0) for name in log_q}
    for name, expected in kl.items():
        np.testing.assert_allclose(terms.kl_by_site[name].pointwise[0], expected, atol=1e-4)
    exact = special.logsumexp(total(log_p), axis=0)
    found = log_likelihood(result, data, num_samples=1)
    np.testing.assert_allclose(found.pointwise[0], exact, rtol=1e-5)


def test_known_labels_are_in_the_likelihood():
    """Against SciPy: the model's own factor is not trusted here."""
    joint = np.log(PROBS) + np.log(
        np.array([0.7, 0.4, 0.2]) * stats.norm.pdf(X[:, None], LOC, 0.5)
        + np.array([0.3, 0.6, 0.8]) * stats.norm.pdf(X[:, None], LOC + 0.8, 0.5)
    )
    guide = guides.structured(two)
    for mask in MASKS:
        data = data_of(mask)
        y = np.asarray(data["y"])
        allowed = (y[:, None] == -1) | (y[:, None] == np.arange(3))
        expected = special.logsumexp(np.where(allowed, joint, -np.inf), axis=1)
        result = Fit.from_params(two, guide, any_params(guide, data), example=data)
        found = log_likelihood(result, data, num_samples=1).pointwise[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_sites_that_are_not_marked_are_sampled():
    """The guide says nothing of sums: the judges' numbers are right on average."""
    marked = guides.structured(two)
    data = data_of()

    def guide(**data):
        with handlers.infer_config(config_fn=lambda site: {"enumerate": None}):
            marked(**data)

    params = any_params(marked, data)
    sampled = Fit.from_params(two, guide, params, example=data)
    exact = Fit.from_params(two, marked, params, example=data)
    found = log_likelihood(sampled, data, num_samples=4000)
    expected = log_likelihood(exact, data, num_samples=1)
    assert found.monte_carlo_error[0] > 0
    error = 4 * np.sqrt(found.monte_carlo_variance[0]) + 1e-4
    assert (abs(found.pointwise[0] - expected.pointwise[0]) < error).all()


def test_an_event_of_many_switches_is_sampled():
    """Nothing can sum over 2^12 values here."""

    def switches(x):
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.4 * jnp.ones(12)).to_event(1))
            numpyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=x)

    data = {"x": jnp.asarray(X + 4)}
    guide = guides.mean_field(switches)
    params = any_params(guide, data)
    result = Fit.from_params(switches, guide, params, example=data)
    count = np.arange(13)
    weights = stats.binom.logpmf(count, 12, 0.4)
    exact = special.logsumexp(weights + stats.norm.logpdf(X[:, None] + 4, count, 1), axis=1)
    found = log_likelihood(result, data, num_samples=4000)
    assert (abs(found.pointwise[0] - exact) < 5 * np.sqrt(found.monte_carlo_variance[0])).all()
    assert sample_posterior(result, data, 3)["b"].shape == (1, 3, 5, 12)


def test_a_told_distribution_is_sure_where_the_value_is_known():
    given = jnp.array([[1, -1], [-1, 0]])
    logits = jnp.array([[0.3, -1.0], [2.0, 0.5]])
    fn = told(dist.Bernoulli(logits=logits).to_event(1), given).base_dist
    expected = np.where(given == -1, special.expit(logits), given)
    np.testing.assert_allclose(fn.probs, expected, rtol=1e-6)
    values = jnp.arange(2)[:, None, None]
    assert np.isfinite(fn.log_prob(values)).all()  # an impossible value has no infinite term
    weights = jnp.tile(logits[..., None], (1, 1, 3)) * jnp.arange(3)
    fn = told(dist.Categorical(logits=weights), given)
    expected = np.where(
        (given == -1)[..., None], special.softmax(weights, -1), given[..., None] == np.arange(3)
    )
    np.testing.assert_allclose(fn.probs, expected, rtol=1e-6)


# --- draws ----------------------------------------------------------------------------------------


def test_draws_follow_q_and_the_known_labels(known):
    result, data, _, _, log_q = known("two", "structured", "some")
    draws = sample_posterior(result, data, 2000)["y"][0]
    q = np.exp(log_q["y"]).reshape(3, 2, 5)[:, 0]  # the same for both values of b
    share = (draws[..., None] == np.arange(3)).mean(0).T
    assert (abs(share - q) <= 4 * np.sqrt(q * (1 - q) / 2000) + 1e-6).all()
    is_known = np.asarray(data["y"]) >= 0
    assert (draws[:, is_known] == np.asarray(data["y"])[is_known]).all()


def test_a_known_label_is_not_drawn_from_the_prior(known):
    result, data, _, _, _ = known("two", "structured", "some")
    draws = sample_prior_predictive(result, 500, y=data["y"], x=data["x"])["y"][0]
    is_known = np.asarray(data["y"]) >= 0
    assert (draws[:, is_known] == np.asarray(data["y"])[is_known]).all()
    share = (draws[:, ~is_known, None] == np.arange(3)).mean((0, 1))
    assert (abs(share - PROBS) < 4 * np.sqrt(PROBS * (1 - PROBS) / 1500)).all()


def test_encode_gives_the_most_probable_value_and_what_follows_from_it(known):
    result, data, _, _, log_q = known("two", "structured", "some")
    q_of_y = log_q["y"].reshape(3, 2, 5)[:, 0]
    found = encode(result, data)
    np.testing.assert_array_equal(found["y"][0], q_of_y.argmax(0))
    given = log_q["b"].reshape(3, 2, 5)[found["y"][0], :, np.arange(5)]
    np.testing.assert_array_equal(found["b"][0], given.argmax(1))
    expected = LOC[found["y"][0]] + 0.8 * found["b"][0]
    np.testing.assert_allclose(reconstruct(result, data)["x"][0], expected, rtol=1e-5)


# --- objectives -----------------------------------------------------------------------------------


def gradient(objective, result, params, data, keys=None):
    """The value and the gradient in the guide's parameters, mean over keys, and standard errors."""
    free = {n: p for n, p in params.items() if n != "statistics"}

    def loss(free, key):
        return objective.loss(key, params | free, result.model, result.guide, **data)

    run = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))
    keys = KEY[None] if keys is None else keys
    found = jax.device_get(jax.jit(run)(free, keys))
    mean = jax.tree.map(lambda x: x.mean(0), found)
    return mean, jax.tree.map(lambda x: x.std(0) / len(x) ** 0.5, found)


def exact_gradient(number, result, params, data):
    """The gradient of a function of log p (J, N) and log q (J, N), by site each."""
    free = {n: p for n, p in params.items() if n != "statistics"}
    values = jnp.array(list(itertools.product(range(3), range(2))))

    def of(free):
        def densities(value):
            known = params | free | {"y": jnp.full(5, value[0]), "b": jnp.full(5, value[1])}
            return [
                compute_log_probs(program, (), data, known, sum_log_prob=False)[0]
                for program in (result.model, result.guide)
            ]

        return number(*jax.vmap(densities)(values))

    return jax.device_get(jax.jit(jax.value_and_grad(of))(free))


def assert_close(found, expected, tolerance):
    flat = zip(*map(jax.tree.leaves, (found, expected, tolerance)), strict=True)
    for a, b, error in flat:
        assert (abs(a - b) <= error).all(), (a, b, error)


def test_a_warm_up_weighs_the_divergence_of_summed_sites(known):
    result, data, params, _, _ = known("two", "structured", "some")

    def weighed(log_p, log_q):
        q = jnp.exp(total(log_q))
        prior = log_p["y"] + log_p["b"]
        likelihood = total(log_p) - prior
        return -(q * (likelihood + 0.25 * (prior - total(log_q)))).sum()

    _, expected = exact_gradient(weighed, result, params, data)
    objective = KLWarmUp(TraceEnum_ELBO(), 4).at_step(jnp.asarray(1))
    (value, found), _ = gradient(objective, result, params, data)
    assert_close(found, expected, jax.tree.map(lambda x: 1e-4 * (1 + abs(x)), expected))
    (plain, _), _ = gradient(TraceEnum_ELBO(), result, params, data)
    np.testing.assert_allclose(value, plain, rtol=1e-6)


def test_a_warm_up_needs_sites_that_the_guide_draws():
    def mixture(x):
        with numpyro.plate("data", len(x)):
            k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            loc = numpyro.param("loc", 0.0)
            numpyro.sample("x", dist.Normal(loc + k, 1.0), obs=x)

    settings = {"num_steps": 5, "progress": False}
    run = partial(fit, mixture, lambda x: None, {"x": X}, **settings)
    with pytest.raises(ValueError, match=r"'k', which is summed over in the model .*mean_field"):
        run(objective=KLWarmUp(TraceEnum_ELBO(), 3))
    for objective in (TraceGraph_ELBO(), ReweightedWakeSleep(3)):
        with pytest.raises(ValueError, match="expected one that sums over the sites k, got"):
            run(objective=objective)


def test_only_weights_are_put_on_a_summed_divergence():
    for build in (lambda e: FreeBits(e, 0.1), lambda e: Hybrid(0.5, e)):
        with pytest.raises(TypeError, match=r"got TraceEnum_ELBO, .* is a sum over sites"):
            build(TraceEnum_ELBO())
    assert traits(KLWeighted(TraceEnum_ELBO(), 2.0)).sums_sites


def test_wake_sleep_has_the_gradients_of_its_papers(known):
    """The value and both gradients, against the sum over all pairs of draws."""
    result, data, params, _, _ = known("two", "structured", "some")

    def by_pairs(log_p, log_q):
        log_p, log_q = total(log_p), total(log_q)
        log_w = jax.lax.stop_gradient(log_p - log_q)
        first, second = jnp.broadcast_arrays(log_w[:, None], log_w[None])
        share = jax.nn.softmax(jnp.stack([first, second]), axis=0)
        bound = jnp.logaddexp(first, second) - jnp.log(2)
        term = share[0] * (log_p + log_q)[:, None] + share[1] * (log_p + log_q)[None]
        q = jax.lax.stop_gradient(jnp.exp(log_q))
        weights = q[:, None] * q[None]
        held = jax.lax.stop_gradient(bound - term)
        return -(weights * (term + held)).sum()

    expected = exact_gradient(by_pairs, result, params, data)
    found, error = gradient(ReweightedWakeSleep(2), result, params, data, random.split(KEY, 4000))
    assert_close(found, expected, jax.tree.map(lambda e: 5 * e + 1e-4, error))


def test_wake_sleep_needs_two_particles():
    with pytest.raises(ValueError, match=r"num_particles: expected at least 2, .* got 1"):
        ReweightedWakeSleep(1)


def test_the_label_term_is_the_log_probability_of_known_labels(known):
    """Of q before it is told, and of the gradient alone."""
    result, data, params, _, _ = known("two", "structured", "some")
    hidden = data_of("none")

    def untold(log_p, log_q):
        of_y = log_q["y"].reshape(3, 2, 5)[:, 0]
        return of_y[1, 1] + of_y[0, 3]  # the labels that MASKS["some"] tells

    _, term = exact_gradient(untold, result, params, hidden)
    (value, plain), _ = gradient(TraceEnum_ELBO(), result, params, data)
    (same, found), _ = gradient(LabelTerm(TraceEnum_ELBO(), 3.0), result, params, data)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    expected = jax.tree.map(lambda a, b: a - 3 * b, plain, term)
    assert_close(found, expected, jax.tree.map(lambda x: 1e-4 * (1 + abs(x)), expected))
    (_, found), _ = gradient(LabelTerm(TraceEnum_ELBO(), 3.0), result, params, hidden)
    (_, plain), _ = gradient(TraceEnum_ELBO(), result, params, hidden)
    assert_close(found, plain, jax.tree.map(lambda x: 1e-5 * (1 + abs(x)), plain))


def test_the_label_term_needs_labels(known):
    with pytest.raises(ValueError, match="weight: expected a finite number from 0, got -1"):
        LabelTerm(TraceEnum_ELBO(), -1.0)
    guide = guides.structured(two)
    with pytest.raises(ValueError, match="LabelTerm: expected a guide with a site whose values"):
        LabelTerm(TraceEnum_ELBO(), 1.0).loss(KEY, {}, two, guide, x=jnp.asarray(X))


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        "low-rank",
        "full-covariance",
        "flow",
        "inverse-autoregressive",
        "neural-spline",
        "semi-amortised",
    ],
)
def test_other_families_refuse_and_name_those_that_can(family):
    with pytest.raises(ValueError, match="mean_field") as caught:
        abstract_sites(guides.make(family, two), {"x": jnp.asarray(X)})
    assert "\n" not in str(caught.value)


def test_a_family_draws_choices_for_each_datum_alone():
    def shared(x):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def counts(x):
        with numpyro.plate("data", len(x)):
            k = numpyro.sample("k", dist.Poisson(2.0))
            numpyro.sample("x", dist.Normal(k, 1.0), obs=x)

    for model, got in ((shared, "outside the plate of the data"), (counts, "Integer")):
        with pytest.raises(ValueError, match=f"model site 'k': expected .*{got}.*; observe"):
            abstract_sites(guides.mean_field(model), {"x": jnp.asarray(X)})


def test_an_objective_without_sums_is_told_which_can():
    with pytest.raises(ProgramError, match=r"TraceEnum_ELBO, .* ReweightedWakeSleep"):
        fit(two, guides.structured(two), data_of(), objective=Trace_ELBO(), num_steps=1)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            np.array([0, 1, 3, -1, -1]),
            r"site 'y': expected values .*, got 1 outside .*mend the labels",
        ),
        (
            np.array([0, 1, -2, -1, -1]),
            r"site 'y': expected values .*, got 1 outside .*mend the labels",
        ),
        (np.array([0.0, 1, 2, -1, -1]), "y: expected labels as integers, with -1 .* got float"),
    ],
)
def test_labels_that_cannot_be_are_one_line(y, message):
    data = {"x": X, "y": y.astype(np.float32 if y.dtype == float else np.int32)}
    settings = {"objective": TraceEnum_ELBO(), "num_steps": 1, "progress": False}
    with pytest.raises(ValueError, match=message) as caught:
        fit(two, guides.structured(two), data, **settings)
    assert "\n" not in str(caught.value)


def test_an_encoder_does_not_see_the_labels():
    """A classifier that sees the label has nothing to learn."""
    assert array_kinds(two, data_of())["y"].name == "given"
    guide = guides.structured(two)
    data = data_of("all")
    params = any_params(guide, data)
    logits = []
    for mask in MASKS:
        found = trace_of(guide, KEY, params, **data_of(mask))
        untold = found["y"]["infer"].get("untold")
        logits.append(np.asarray(untold.logits))
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.slow
def test_a_guide_starts_at_the_prior_and_trains_on_labels_of_every_kind():
    """One short fit: labels of all data, of none, and of two classes only, in one batch each."""
    rows = [np.array(m) for m in (*MASKS.values(), [0, -1, 1, -1, 0])]
    data = {"x": np.tile(X, 4), "y": np.concatenate(rows).astype(np.int8)}
    settings = {"objective": TraceEnum_ELBO(), "progress": False, "optimizer": optax.adam(1e-2)}
    guide = guides.structured(two)
    result = fit(two, guide, data, num_steps=30, batch_size=5, **settings)
    assert np.isfinite(result.elbo).all()
    start = jax.nn.softmax(np.asarray(result.params["statistics"]["latents"]["y"]["median"][0]))
    draws = 200 * 20
    assert (abs(start - PROBS) < 5 * np.sqrt(PROBS * (1 - PROBS) / 200) + 3 / draws).all()
