"""The families on programs that are no model of this collection."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import transforms
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.util import log_density
from scipy import special, stats

from inference import Fit, elbo_terms, fit, sample_posterior
from inference.sites import array_kinds, is_fixed, trace_of
from models import encoders, guides
from models.coordinates import Unconstrained, moved_inside
from models.guides import LowRank

KEY = jax.random.key(0)
N = 24
ALPHA = np.array([0.5, 1.0, 2.0], np.float32)
JOINT = (
    "structured",
    "low-rank",
    "full-covariance",
    "flow",
    pytest.param("inverse-autoregressive", marks=pytest.mark.slow),
    pytest.param("neural-spline", marks=pytest.mark.slow),
)


def everything(c, x=None):
    """Global and local sites of many supports, and a site in a further plate."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("topics", 2):
        topic = numpyro.sample("topic", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("data", len(c), dim=-2):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        with numpyro.plate("times", 4, dim=-1):
            pairs = dist.Normal(rate[..., None], 1).expand([len(c), 4, 2])
            z = numpyro.sample("z", pairs.to_event(1))
    with numpyro.plate("data", len(c)):
        share = numpyro.sample("share", dist.Uniform(2.0, 3.0))
        mean = z.sum((-1, -2)) * share + c * (topic @ weights).sum()
        numpyro.sample("x", dist.Normal(mean, scale), obs=x)


LOCAL, GLOBAL = ("rate", "z", "share"), ("scale", "weights", "topic")


def everything_data(unit=1.0):
    rng = np.random.default_rng(1)
    c, x = rng.normal(size=(2, N))
    return {"c": jnp.asarray(c, jnp.float32), "x": jnp.asarray(unit * x, jnp.float32)}


def start(guide, data, key=KEY):
    """The parameters that a guide starts from."""

    def params():
        sites = trace_of(guide, key, {}, **data)
        return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}

    return jax.jit(params)()


def abstract_sites(program, data):
    """The sites of a program, as shapes."""
    sites = {}
    jax.eval_shape(lambda: sites.update(trace_of(program, KEY, {}, **data)))
    return sites


def log_q(guide, data, params, values):
    """log q of values, in nats, over all sites."""
    return log_density(handlers.seed(guide, KEY), (), data, params | values)[0]


# --- sites, shapes, plates ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"globals": "full_covariance"}])
@pytest.mark.parametrize("family", ["mean-field", *JOINT])
def test_guide_and_model_agree(family, options):
    """In the sites' names, event shapes, batch shapes, plates and supports."""
    data = everything_data()
    model = abstract_sites(everything, data)
    guide = abstract_sites(guides.make(family, everything, **options), data)
    drawn = [name for name, site in guide.items() if site["type"] == "sample"]
    assert set(drawn) == {*LOCAL, *GLOBAL}
    assert set(drawn[:3]) == set(GLOBAL)  # the global ones first
    for name in drawn:
        ours, theirs = guide[name], model[name]
        assert ours["value"].shape == theirs["value"].shape
        assert ours["fn"].batch_shape == theirs["fn"].batch_shape
        assert ours["fn"].event_shape == theirs["fn"].event_shape
        assert {f[:2] for f in ours["cond_indep_stack"]} == {
            f[:2] for f in theirs["cond_indep_stack"]
        }


def test_the_order_of_a_structured_guide():
    data = everything_data()
    for order, expected in (("model", [*LOCAL]), ("reversed", [*LOCAL][::-1])):
        sites = abstract_sites(guides.structured(everything, order=order), data)
        assert [name for name in sites if name in LOCAL] == expected
    with pytest.raises(ValueError, match="order: expected model or reversed, got 'back'"):
        guides.structured(everything, order="back")


# --- densities ------------------------------------------------------------------------------------


def any_params(guide, data):
    """Parameters that no training made. Coordinates are measured from 0, in units of 1."""
    rng, params = np.random.default_rng(0), {}
    for name, site in abstract_sites(guide, data).items():
        if is_fixed(site):
            params[name] = jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), site["value"])
            for start in params[name]["latents"].values():
                start["median"] *= 0
        elif site["type"] == "param":
            draw = lambda p: jnp.asarray(rng.normal(size=p.shape) / 5, p.dtype)  # noqa: E731
            params[name] = jax.tree.map(draw, site["value"])
    return params


def shared_and_own(x):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        z = numpyro.sample("z", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("x", dist.Normal(z @ jnp.arange(3.0) * rate, scale), obs=x)


@pytest.mark.parametrize("family", ["mean-field", *JOINT])
def test_the_density_is_finite_at_draws_of_the_model(family, rng):
    """And on the edge of the supports, where rounding puts some of them. A draw given back has the
    density that it was drawn with."""
    data, guide = {"x": jnp.arange(3.0)}, guides.make(family, shared_and_own, num_layers=2)
    params = any_params(guide, data)
    of_model = {
        "scale": abs(rng.normal()),
        "rate": rng.gamma(2.0, size=3),
        "z": rng.dirichlet(np.ones(3), size=3),
    }
    edge = {"scale": np.float32(0), "rate": np.zeros(3), "z": np.eye(3)}

    @jax.jit
    def run(params, of_model):
        own = trace_of(guide, KEY, params, **data)
        draws = {name: own[name]["value"] for name in of_model}
        remembered = [
            own[n]["fn"].log_prob(own[n]["value"], own[n]["intermediates"]).sum() for n in draws
        ]
        all_three = jax.tree.map(lambda *values: jnp.stack(values), of_model, edge, draws)
        return jax.vmap(lambda v: log_q(guide, data, params, v))(all_three), sum(remembered)

    (at_model, on_edge, given_back), remembered = run(params, jax.tree.map(np.float32, of_model))
    assert np.isfinite(at_model)
    assert np.isfinite(on_edge)
    np.testing.assert_allclose(given_back, remembered, rtol=1e-3)


def two_sites(x=None):
    with numpyro.plate("data", 1 if x is None else len(x)):
        z1 = numpyro.sample("z1", dist.Normal(0, 1).expand([2]).to_event(1))
        z2 = numpyro.sample("z2", dist.Normal(z1.sum(-1, keepdims=True), jnp.ones(3)).to_event(1))
        numpyro.sample("x", dist.Normal(z2.sum(-1), 1), obs=x)


@pytest.mark.parametrize("family", ["low-rank", "full-covariance"])
def test_a_chain_of_gaussians_is_one_gaussian(family, monkeypatch):
    """log q over both sites is that of the Normal with its mean and Hessian, constant and all. For
    low rank the covariance is F F^T + D, with the numbers of the encoder."""
    data, seen = {"x": jnp.array([0.3])}, {}
    guide = guides.make(family, two_sites)
    params = any_params(guide, data)
    draw = LowRank.draw
    monkeypatch.setattr(
        LowRank, "draw", lambda self, b, n, *rest: seen.update(n) or draw(self, b, n, *rest)
    )

    def density(u):
        return log_q(guide, data, params, {"z1": u[None, :2], "z2": u[None, 2:]})

    points = np.random.default_rng(0).normal(size=(3, 5))

    @jax.jit
    def run(points):
        at = jnp.zeros(5)
        values = jax.vmap(density)(points)
        return values, jax.grad(density)(at), jax.hessian(density)(at), dict(seen)

    values, gradient, hessian, numbers = run(jnp.asarray(points, jnp.float32))
    covariance = np.linalg.inv(-np.asarray(hessian, np.float64))
    exact = stats.multivariate_normal(covariance @ np.asarray(gradient, np.float64), covariance)
    np.testing.assert_allclose(values, exact.logpdf(points), rtol=1e-3)
    scales = np.sqrt(np.diag(covariance))
    assert abs(covariance / np.outer(scales, scales))[:2, 2:].max() > 0.01
    if family == "low-rank":
        scale, rows = [], []
        for name, size in (("z1", 2), ("z2", 3)):
            scale.append(np.log1p(np.exp(numbers[name]["raw"][0])) + 1e-4)
            rows.append(numbers[name]["factor"][0].reshape(size, 2) / size**0.5)
        scale = np.concatenate(scale)
        factor = scale[:, None] * np.concatenate(rows)
        expected = factor @ factor.T + np.diag(scale**2)
        np.testing.assert_allclose(covariance, expected, rtol=1e-3, atol=1e-4)


# --- exact likelihoods ----------------------------------------------------------------------------


def poisson_gamma(x):
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        counts = dist.Poisson(rate[:, None]).expand([len(x), 3]).to_event(1)
        numpyro.sample("obs", counts, obs=x)


def beta_binomial(k):
    with numpyro.plate("people", len(k)):
        numpyro.sample("k", dist.Binomial(10, numpyro.sample("p", dist.Beta(2.0, 3.0))), obs=k)


def dirichlet_multinomial(x):
    with numpyro.plate("data", len(x)):
        share = numpyro.sample("share", dist.Dirichlet(ALPHA))
        numpyro.sample("x", dist.Multinomial(8, share), obs=x)


def matrices(x):
    """A matrix for each entry of a further plate, to the right of the data's."""
    with numpyro.plate("data", len(x), dim=-2), numpyro.plate("rows", 2, dim=-1):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2, 2]).to_event(2))
        numpyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.5), obs=x)


def matrices_on_the_left(x):
    with numpyro.plate("rows", 2, dim=-2), numpyro.plate("data", len(x), dim=-1):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2, 2]).to_event(2))
        numpyro.sample("x", dist.Normal(z.sum((-1, -2)), 1.5), obs=x.T)


def walk(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.GaussianRandomWalk(1.0, num_steps=3))
        numpyro.sample("x", dist.Normal(z, 3.0).to_event(1), obs=x)


def large_units(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(1e4, 1e3))
        numpyro.sample("x", dist.Normal(z, 700.0), obs=x)


def bounds_from_data(c, x):
    """The support of a site is computed from the data."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Uniform(c, c + 2))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def exact_case(model, rng):
    """Data from the model, and log p of each datum."""
    if model is poisson_gamma:
        x = rng.poisson(rng.gamma(2, 1, size=(N, 1)), size=(N, 3))
        total = x.sum(1)
        exact = special.gammaln(2 + total) - special.gammaln(x + 1).sum(1) - (2 + total) * np.log(4)
        return {"x": x}, exact
    if model is beta_binomial:
        k = rng.binomial(10, rng.beta(2, 3, size=N))
        return {"k": k}, stats.betabinom(10, 2, 3).logpmf(k)
    if model is dirichlet_multinomial:
        x = np.stack([rng.multinomial(8, rng.dirichlet(ALPHA)) for _ in range(N)])
        return {"x": x}, stats.dirichlet_multinomial(ALPHA.astype(float), 8).logpmf(x)
    if model is walk:
        covariance = np.minimum.outer(np.arange(1, 4), np.arange(1, 4)) + 9 * np.eye(3)
        density = stats.multivariate_normal(np.zeros(3), covariance)
        x = density.rvs(N, random_state=rng)
        return {"x": x}, density.logpdf(x)
    if model is large_units:
        x = rng.normal(1e4, np.hypot(1e3, 700), size=N)
        return {"x": x}, stats.norm(1e4, np.hypot(1e3, 700)).logpdf(x)
    if model is bounds_from_data:
        c = 100 * rng.normal(size=N)
        x = c + rng.uniform(0, 2, size=N) + 0.5 * rng.normal(size=N)
        return {"c": c, "x": x}, np.log(
            np.diff(stats.norm.cdf([x - c - 2, x - c], scale=0.5), axis=0)[0] / 2
        )
    x = np.sqrt(4 + 1.5**2) * rng.normal(size=(N, 2))
    return {"x": x}, stats.norm(0, np.sqrt(4 + 1.5**2)).logpdf(x).sum(1)


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (poisson_gamma, "mean-field"),
        pytest.param(beta_binomial, "flow", marks=pytest.mark.slow),
        (dirichlet_multinomial, "full-covariance"),
        pytest.param(matrices, "low-rank", marks=pytest.mark.slow),
        pytest.param(matrices, "flow", marks=pytest.mark.slow),
        pytest.param(matrices, "inverse-autoregressive", marks=pytest.mark.slow),
        pytest.param(beta_binomial, "neural-spline", marks=pytest.mark.slow),
        (matrices_on_the_left, "full-covariance"),
        pytest.param(walk, "full-covariance", marks=pytest.mark.slow),
        pytest.param(large_units, "mean-field", marks=pytest.mark.slow),
        (bounds_from_data, "mean-field"),
    ],
)
def test_importance_weights_give_the_exact_likelihood(model, family, rng):
    """From the start, near the prior, and without ``inference``'s judges."""
    data, exact = exact_case(model, rng)
    data = {
        n: jnp.asarray(a, jnp.int32 if a.dtype == int else jnp.float32) for n, a in data.items()
    }
    guide = guides.make(family, model)

    @jax.jit
    def log_weights(key):
        params = start(guide, data)

        def draw(key):
            q_sites = trace_of(guide, key, params, **data)
            values = {n: s["value"] for n, s in q_sites.items() if s["type"] == "sample"}
            p_sites = trace_of(model, key, params | values, **data)
            total = jnp.zeros(N)
            for sites, sign in ((p_sites, 1), (q_sites, -1)):
                for site in sites.values():
                    if site["type"] == "sample":
                        fn, value = site["fn"], site["value"]
                        term = fn.log_prob(value)
                        axis = 1 if model is matrices_on_the_left else 0
                        total += sign * jnp.moveaxis(term, axis, 0).reshape(N, -1).sum(1)
            return total

        return jax.lax.map(draw, jax.random.split(key, 4000), batch_size=100)

    log_w = np.asarray(log_weights(KEY), np.float64)
    w = np.exp(log_w - log_w.max(0))
    estimate = np.log(w.mean(0)) + log_w.max(0)
    variance = (w / w.mean(0)).var(0) / len(w)
    error = np.sqrt(variance.sum()) / N
    assert error < 0.05
    assert abs(estimate.mean() - exact.mean()) < 4 * error + variance.mean() / 2


# --- the edge of a support ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        dist.Uniform(1e4, 1e4 + 1),
        dist.Uniform(-1e4 - 1, -1e4),
        dist.Gamma(0.02, 1.0),
        dist.Beta(0.05, 0.05),
        dist.LogNormal(0.0, 30.0),
        dist.Dirichlet(np.full(3, 0.02, np.float32)),
        dist.TruncatedNormal(0.0, 1.0, low=-1.0, high=1.0),
        dist.VonMises(3.1, 4.0),
        dist.LKJCholesky(3, 0.1),
        dist.LKJ(3, 0.3),
        dist.TransformedDistribution(
            dist.Normal(np.zeros(3, np.float32), 10.0).to_event(1), transforms.OrderedTransform()
        ),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_coordinates_are_finite_at_every_draw(fn):
    """A value on the edge moves by the least step, and one inside stays where it is."""
    transform = Unconstrained(fn.support)

    @jax.jit
    def run(key):
        draws = fn.sample(key, (20_000,))
        u = transform.inv(draws)
        log_det, back = transform.log_abs_det_jacobian(u, draws), transform(u)
        inside = [moved_inside(fn.support, x) for x in (back, draws)]
        return draws, u, log_det, back, *inside

    draws, u, log_det, back, same, inside = jax.device_get(run(KEY))
    assert all(np.isfinite(x).all() for x in (u, back, log_det))
    np.testing.assert_array_equal(same, back)
    moved = inside != draws
    assert moved.mean() < 0.5
    if isinstance(fn, dist.Uniform):
        outside = (draws <= np.float32(fn.low)) | (draws >= np.float32(fn.high))
        np.testing.assert_array_equal(moved, outside)
        assert outside.any()
        np.testing.assert_allclose(inside[moved], draws[moved], rtol=2e-7)


def test_the_density_is_finite_at_the_edge():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Uniform(1e4, 1e4 + 1))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data, guide = {"x": jnp.full(3, 1e4)}, guides.mean_field(model)
    edge = jnp.array([1e4, 1e4 + 1, 1e4 + 0.5])
    run = jax.jit(lambda z: log_q(guide, data, any_params(guide, data), {"z": z}))
    assert np.isfinite(run(edge))


# --- the start ------------------------------------------------------------------------------------


@jax.jit
def start_in(unit):
    """The loss of 200 data at the start of a guide, and draws from the guide, in some unit."""

    def model(x):
        level = numpyro.sample("level", dist.Normal(3 * unit, unit))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.LogNormal(jnp.log(unit), 0.5))
            numpyro.sample("x", dist.Normal(level + z, unit), obs=x)

    guide, x = guides.mean_field(model), unit * jnp.linspace(0, 8, 200)
    params = start(guide, {"x": x})
    draw = lambda key: trace_of(guide, key, params, x=x)["z"]["value"]  # noqa: E731
    loss = Trace_ELBO().loss(KEY, params, model, guide, x=x)
    return loss, jax.vmap(draw)(jax.random.split(KEY, 200))


@pytest.mark.parametrize("unit", [1e4, 1e-4])
def test_a_guide_starts_near_the_prior_in_every_unit(unit):
    loss, z = jax.device_get(start_in(unit))
    elbo = -loss / 200
    # not far below the likelihood of the prior's middle: a few nats a datum, and 30 from the edge
    assert abs(elbo + np.log(unit)) < 40
    u = np.log(z / unit) / 0.5  # a standard Normal under the prior
    assert abs(np.median(u)) < 0.5
    assert 0.4 < np.diff(np.quantile(u, [0.25, 0.75]))[0] / 1.349 < 1.5


# --- what is measured once ------------------------------------------------------------------------


def one_site(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.slow
def test_what_is_measured_once_is_of_all_data_and_stays(tmp_path):
    """No optimiser moves it, weight decay neither. Every way to keep parameters keeps it.

    It is measured on data from everywhere: a sorted file has its middle in the middle, and the
    first rows alone would not show it.
    """
    x = np.arange(5000, dtype=np.float32)
    guide = guides.mean_field(one_site)
    result = fit(
        one_site,
        guide,
        {"x": x},
        num_steps=30,
        num_seeds=2,
        batch_size=10,
        average=0.5,
        optimizer=optax.adamw(1e-2, weight_decay=0.3),
        progress=False,
    )
    moments = result.params["statistics"]["data"]["x"]
    np.testing.assert_allclose(moments["mean"], [[x.mean()]] * 2, rtol=1e-3)
    rows = x[np.linspace(0, 4999, 1000).round().astype(int)]
    np.testing.assert_allclose(moments["mean"], [[rows.mean()]] * 2, rtol=1e-5)
    np.testing.assert_allclose(moments["deviation"], [[rows.std()]] * 2, rtol=1e-5)
    result.save(tmp_path / "fit")
    loaded, few = Fit.load(tmp_path / "fit", one_site, guide), {"x": x[::500]}
    known = Fit.from_params(one_site, guide, result.params_of(1), example=few)
    draws = [sample_posterior(each, few, 2)["z"] for each in (loaded.isel(seed=1), known)]
    np.testing.assert_array_equal(*draws)


# --- the automatic encoder ------------------------------------------------------------------------


def mixed(real, flag, count, label, target):
    with numpyro.plate("data", len(real)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        rate = jnp.exp(0.1 * z)
        numpyro.sample("a", dist.Poisson(rate), obs=count)
        numpyro.sample("b", dist.Categorical(logits=jnp.outer(z, jnp.arange(3.0))), obs=label)
        numpyro.sample("d", dist.Bernoulli(logits=z), obs=target)
        numpyro.sample("e", dist.Normal(z + flag, 1.0), obs=jnp.log(real))


def seen_by(inputs, data):
    """The statistics of the data, and the data as the encoder sees them."""

    @jax.jit
    def run(data):
        statistics = inputs.statistics(data)
        return statistics, inputs(data, statistics)

    statistics, seen = run(data)
    return statistics, np.asarray(seen)


def test_what_the_encoder_sees():
    """Standardised numbers, 0 and 1, log(1 + count) and one-hot labels, by name."""
    rng = np.random.default_rng(0)
    data = {
        "real": jnp.asarray(np.exp(rng.normal(size=N)), jnp.float32),
        "flag": jnp.asarray(rng.random(N) > 0.5),
        "count": jnp.asarray(rng.poisson(3, N)),
        "label": jnp.asarray(np.arange(N) % 3),
        "target": jnp.asarray(rng.random(N) > 0.5, jnp.float32),
    }
    kinds = array_kinds(mixed, data)
    names = {name: kind.name for name, kind in kinds.items()}
    assert names == {
        "real": "real",
        "flag": "boolean",
        "count": "counts",
        "label": "labels",
        "target": "boolean",
    }
    _, seen = seen_by(encoders.Inputs(kinds), data)
    logs = np.log1p(np.asarray(data["count"], float))
    np.testing.assert_allclose(seen[:, 0], (logs - logs.mean()) / logs.std(), atol=1e-5)
    np.testing.assert_array_equal(seen[:, 1], data["flag"])
    np.testing.assert_array_equal(seen[:, 2:5], np.eye(3)[data["label"]])
    np.testing.assert_allclose([seen[:, 5].mean(), seen[:, 5].std()], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(seen[:, 6], data["target"])


@pytest.mark.parametrize(
    "column",
    [
        np.full(N, 3e38), np.linspace(-3e38, 3e38, N), np.full(N, 1e-40), np.full(N, 1e4),
        np.append(np.zeros(N - 1), 1e30), 1e4 + 1e-2 * np.arange(N),
    ],
)  # fmt: skip
def test_what_the_encoder_sees_is_finite(column):
    inputs = encoders.Inputs(
        {"x": array_kinds(lambda x: None, {"x": column.astype(np.float32)})["x"]}
    )
    data = {"x": jnp.asarray(column, jnp.float32)}
    statistics, seen = seen_by(inputs, data)
    assert np.isfinite(seen).all()
    assert abs(seen).max() < 200
    assert np.isfinite(inputs({"x": jnp.array([3e38, -3e38, 0.0])}, statistics)).all()


def test_masked_entries_do_not_count():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(3, 2, size=(N, 2)).astype(np.float32), rng.random((N, 2)) > 0.3
    data = {"x": jnp.asarray(np.where(mask, x, 0)), "x_mask": jnp.asarray(mask)}
    inputs = encoders.Inputs(array_kinds(lambda x, x_mask: None, data))
    statistics, seen = seen_by(inputs, data)
    for i in range(2):
        np.testing.assert_allclose(statistics["x"]["mean"][i], x[mask[:, i], i].mean(), rtol=1e-5)
        np.testing.assert_allclose(
            statistics["x"]["deviation"][i], x[mask[:, i], i].std(), rtol=1e-5
        )
    np.testing.assert_array_equal(seen[:, 2:], mask)
    assert (seen[:, :2][~mask] == 0).all()


# --- one clear line -------------------------------------------------------------------------------


def depends(x):
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Uniform(0, s))


def scanned(x):
    def step(carry, _):
        z = numpyro.sample("z", dist.Normal(carry, 1))
        return z, z

    scan(step, jnp.zeros(()), None, length=4)


def follows(x):
    numpyro.sample("z", dist.Normal(jnp.zeros(len(x)), 1).to_event(1))


def comes_and_goes(x):
    for i in range(len(x)):
        numpyro.sample(f"z{i}", dist.Normal(0, 1))


def on_values(x):
    numpyro.sample("z", dist.Normal(0, 1) if x[0] > 0 else dist.Normal(1, 1))


def discrete(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("k", dist.Poisson(0.5))


def on_a_sphere(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.ProjectedNormal(jnp.zeros(3)))


def improper(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))


def named(x):
    numpyro.param("encoder", 1.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0, 1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            depends,
            "model site 'z': expected a support that the data alone decide, got .* on 's'; dr",
        ),
        (scanned, "model site 'z': expected a latent site outside scan, got one inside"),
        (follows, r"model site 'z': expected a latent site of one shape .*, got shape \(5,\)"),
        (
            comes_and_goes,
            "model site 'z5': expected the same latent sites for every number of data",
        ),
        (on_values, "model: expected a program that runs on the shapes .* the values of 'x'; comp"),
        (discrete, "model site 'k': expected a continuous latent site, or a Categor.* support Int"),
        (
            on_a_sphere,
            "model site 'z': expected a support with a bijection to real numbers, got Sp",
        ),
        (
            improper,
            "model site 'z': expected a distribution with draws, got ImproperUniform, .* wide Nor",
        ),
        (named, "model site 'encoder': expected another name, since MeanField keeps its own"),
    ],
)
def test_what_cannot_be_is_one_line(model, message):
    with pytest.raises(ValueError, match=message) as caught:
        abstract_sites(guides.mean_field(model), {"x": jnp.zeros(5)})
    assert "\n" not in str(caught.value)


def test_integers_of_no_known_meaning_need_an_encoder():
    """Only where a site is local."""

    def grouped(group, x, is_local):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1).to_event(1))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1)) if is_local else 0.0
            numpyro.sample("x", dist.Normal(w[group] + z, 1.0), obs=x)

    data = {"group": jnp.arange(6) % 2, "x": jnp.zeros(6)}
    for is_local in (False, True):
        guide = guides.mean_field(lambda group, x, b=is_local: grouped(group, x, b))
        run = lambda g=guide: abstract_sites(g, data)  # noqa: E731
        if is_local:
            with pytest.raises(
                ValueError, match=r"data\['group'\]: expected real .* pass encoder= "
            ):
                run()
        else:
            run()


def test_masked_sites_cost_nothing():
    """A latent entry that the model masks has no term in q either."""

    def model(x, there):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).mask(there))
            numpyro.sample("x", dist.Normal(z, 1.0).mask(there), obs=x)

    data = {"x": jnp.ones(4), "there": jnp.array([True, False, True, False])}
    guide = guides.mean_field(model)
    result = Fit.from_params(model, guide, any_params(guide, data), example=data)
    elbo = elbo_terms(result, data).elbo.pointwise[0]
    np.testing.assert_array_equal(elbo[1::2], 0)
    assert (elbo[::2] != 0).all()


def test_a_site_that_is_masked_for_good_has_a_flat_prior():
    """Its density lies elsewhere in the model. So its term in q stays, or q would shrink to 0."""

    def model(x, flat):
        with handlers.mask(mask=not flat):
            scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).mask(not flat))
            numpyro.sample("x", dist.Normal(z, scale), obs=x)

    data, values = {"x": jnp.ones(4)}, {"scale": jnp.float32(0.7), "z": jnp.arange(4.0)}
    densities = []
    for flat in (True, False):
        guide = guides.mean_field(lambda x, flat=flat: model(x, flat))
        run = jax.jit(lambda v, g=guide: log_q(g, data, any_params(g, data), v))
        densities.append(run(values))
    assert densities[0] == densities[1] < -1


def test_a_prior_without_draws_is_one_line():
    data = {"x": jnp.zeros(5)}
    with pytest.raises(ValueError, match="guide site 'z': expected a distribution with draws"):
        fit(improper, guides.prior(improper), data, num_steps=1, progress=False)


def test_no_sum_inside_a_scan():
    """NumPyro's objective computes another number than the log density there."""

    def model(x):
        rate = numpyro.sample("rate", dist.Beta(1.0, 1.0))

        def step(last, x):
            to = jnp.where(last == 0, rate, 1 - rate)
            k = numpyro.sample("k", dist.Bernoulli(to), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Bernoulli(0.2 + 0.6 * k), obs=x)
            return k, None

        scan(step, 0, x)

    guide, data = guides.mean_field(model), {"x": jnp.array([1, 0, 0, 1])}
    with pytest.raises(ValueError, match="model site 'k': expected a summed site outside scan"):
        fit(model, guide, data, objective=TraceEnum_ELBO(), num_steps=1, progress=False)
