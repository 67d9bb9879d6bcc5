"""The maps of flows against calculus: Jacobians, inverses, masks, splines, densities.

The weights of the networks are random here, so that no map is near the identity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from scipy import integrate, optimize, stats

from inference.sites import trace_of
from models import guides
from models.flows import BOUND, LEAST_SLOPE, Conditional, Made, Splines

KEY = jax.random.key(0)
FLOWS = {
    "flow": guides.flow,
    "inverse-autoregressive": guides.inverse_autoregressive,
    "neural-spline": guides.neural_spline,
}
every_flow = pytest.mark.parametrize("family", FLOWS)
NUM_CONTEXT = 3


def anything(rng, tree, scale=0.5):
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), tree)


def plane(x):
    """Two numbers of a datum, seen through their sum."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1), obs=x)


def map_of(family, layer, size, rng, batch=()):
    """A map as the family makes it, with random weights and a random context."""
    guide = FLOWS[family](plane, num_hidden=5)
    net = anything(rng, guide.network(layer, size, NUM_CONTEXT, nnx.Rngs(0)))
    context = jnp.asarray(rng.normal(size=(*batch, NUM_CONTEXT)), jnp.float32)
    return guide.map(layer, size, net, context)


# --- Jacobians and inverses -----------------------------------------------------------------------


@jax.jit
def measured(maps, x):
    """Of all maps one after another: y, x again, the log-determinant, and the Jacobian at x."""

    def carry(x):
        for transform in maps:
            x = transform(x)
        return x

    y, log_det = x, 0.0
    for transform in maps:
        x_of_map, (y, known) = y, transform.call_with_intermediates(y)
        log_det += transform.log_abs_det_jacobian(x_of_map, y)
        remembered = transform.log_abs_det_jacobian(x_of_map, y, known)
        log_det += jnp.where(abs(remembered) < jnp.inf, 0.0, jnp.nan)
    back = y
    for transform in maps[::-1]:
        back = transform.inv(back)
    return y, back, log_det, jax.vmap(jax.jacfwd(carry))(x)


@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 5])
@every_flow
def test_a_map_has_the_jacobian_and_the_inverse_that_it_says(family, size, rng):
    """With 64 bits to 1e-9. With 32 bits, the inverse to rounding times its derivative."""
    maps = [map_of(family, layer, size, rng) for layer in (1, 2)]
    x = 2 * rng.normal(size=(100, size))
    assert (abs(x) > BOUND).any()
    with jax.enable_x64(True):
        y, back, log_det, jacobian = jax.device_get(measured(maps, jnp.asarray(x)))
    assert y.dtype == float
    exact = np.linalg.slogdet(jacobian)[1]
    assert abs(exact).max() > 0.1
    np.testing.assert_allclose(log_det, exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)

    x = jnp.asarray(x, jnp.float32)
    y, back, *_ = jax.device_get(measured(maps, x))
    assert back.dtype == np.float32
    amplified = 1 + np.linalg.norm(np.linalg.inv(jacobian), ord=2, axis=(1, 2))
    rounding = np.finfo(np.float32).eps * (BOUND + np.linalg.norm(y, axis=1)) * amplified
    assert (np.linalg.norm(back - x, axis=1) < 20 * rounding).all()


@every_flow
def test_a_map_is_a_tree_of_its_arrays(family, rng):
    """It passes through transformations of JAX, which see its network and its context."""
    transform = map_of(family, 1, 2, rng)
    x = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda transform: transform(x).sum()))
    total, gradient = run(transform)
    again, _ = run(jax.jit(lambda transform: transform)(transform))
    assert total == again
    net = transform.made if family == "inverse-autoregressive" else transform.mlp
    arrays = jax.tree.leaves(net)
    assert len(jax.tree.leaves(transform)) == len(arrays) + 1
    assert jax.tree.structure(gradient) == jax.tree.structure(transform)
    assert all(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert any(leaf.shape == (NUM_CONTEXT,) for leaf in jax.tree.leaves(gradient))
    assert transform == transform
    assert transform != gradient


# --- autoregressive networks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "num_hidden", "is_reversed"),
    [(1, 3, False), (1, 3, True), (2, 1, True), (2, 4, False), (5, 3, False), (5, 12, True)],
)
def test_a_dimension_sees_those_before_it_and_the_context(size, num_hidden, is_reversed, rng):
    made = anything(rng, Made(size, NUM_CONTEXT, num_hidden, is_reversed, rngs=nnx.Rngs(0)))
    inputs = jnp.asarray(rng.normal(size=size + NUM_CONTEXT), jnp.float32)
    for jacobian in map(np.asarray, jax.jit(jax.jacfwd(made))(inputs)):
        of_x, of_context = jacobian[:, :size], jacobian[:, size:]
        ordered = of_x[::-1, ::-1] if is_reversed else of_x
        np.testing.assert_array_equal(ordered != 0, np.tri(size, k=-1, dtype=bool))
        assert (of_context != 0).all()


# --- splines --------------------------------------------------------------------------------------


def splines_of(rng, num_bins=4):
    return Splines(jnp.asarray(2 * rng.normal(size=(3, 3 * num_bins - 1))))


def test_a_spline_is_the_identity_outside_and_its_slope_is_continuous(rng):
    with jax.enable_x64(True):
        splines, step = splines_of(rng), 1e-9
        x = jnp.array([-1e9, -BOUND - step, -BOUND, BOUND, BOUND + step, 1e9])[:, None]
        y, log_slope = splines(x)
        np.testing.assert_array_equal(y, jnp.broadcast_to(x, y.shape))
        np.testing.assert_array_equal(log_slope, 0.0)
        np.testing.assert_array_equal(splines.inverse(x), y)
        knots = splines.x.T  # (knot, dimension)
        (low, below), (high, above) = splines(knots - step), splines(knots + step)
        for y in (low, high):
            np.testing.assert_allclose(y, splines.y.T, atol=1e-5)
        # the second derivative is at most about (1 / LEAST_SLOPE)^2
        for log_slope in (below, above):
            np.testing.assert_allclose(jnp.exp(log_slope), splines.slopes.T, rtol=1e-4)
        assert np.ptp(splines.slopes) > 0.5
        np.testing.assert_array_equal(splines.slopes[:, [0, -1]], 1.0)
        assert splines.slopes.min() > LEAST_SLOPE
        inside, _ = splines(jnp.linspace(-BOUND, BOUND, 1001)[:, None])
        assert (np.diff(inside, axis=0) > 0).all()


def test_no_gradient_of_a_spline_is_nan(rng):
    """On knots and just below them, at the ends, far outside; with steep bins and least slopes."""
    numbers = 5 * rng.normal(size=(400, 3, 23))
    numbers[:, 1:, 16:] = -50
    numbers = jnp.asarray(numbers, jnp.float32)
    ends = np.array([-1e30, -BOUND, 0.0, BOUND, 1e30], np.float32)

    def values(knots):
        knots = np.moveaxis(np.asarray(knots), -1, 0)
        below = np.nextafter(knots, np.float32(-1e9))
        return jnp.concatenate([np.tile(ends[:, None, None], (1, 400, 3)), knots, below])

    def forward(numbers, x):
        return sum(part.sum() for part in Splines(numbers)(x))

    def backward(numbers, y):
        return Splines(numbers).inverse(y).sum()

    splines = Splines(numbers)
    for function, at in ((forward, values(splines.x)), (backward, values(splines.y))):
        for leaf in jax.jit(jax.grad(function, (0, 1)))(numbers, at):
            assert np.isfinite(leaf).all()


def test_the_inverse_of_a_steep_spline_is_exact_to_rounding(rng):
    """With either root of the quadratic. Rounding of y is divided by the slope."""
    numbers = jnp.asarray(5 * rng.normal(size=(4000, 3, 23)), jnp.float32)
    x = jnp.asarray(rng.uniform(-BOUND, BOUND, size=(4000, 3)), jnp.float32)

    @jax.jit
    def run(numbers, x):
        splines = Splines(numbers)
        y, log_slope = splines(x)
        return splines.inverse(y), jnp.exp(-log_slope)

    back, amplified = run(numbers, x)
    rounding = np.finfo(np.float32).eps * BOUND * (1 + amplified)
    assert amplified.max() > 100
    assert (abs(back - x) < 5 * rounding).all()


# --- densities ------------------------------------------------------------------------------------


def conditional(guide, params, x):
    return trace_of(guide, KEY, params, x=x)["z"]["fn"]


def start(guide, x):
    """The parameters that a guide starts from."""

    @jax.jit
    def params():
        sites = trace_of(guide, KEY, {}, x=x)
        return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}

    return params()


def with_any_maps(guide, rng, x):
    """The same with random weights in the networks of the maps."""
    params = start(guide, x)
    return params | {n: anything(rng, p, 0.3) for n, p in params.items() if n == "z_flow"}


@pytest.mark.slow
@every_flow
def test_a_density_integrates_to_one(family, rng):
    """On two grids. The finer one is nearer to 1 than the two are to each other."""
    guide, x = FLOWS[family](plane, num_hidden=5), jnp.array([0.3])
    params = with_any_maps(guide, rng, x)

    @jax.jit
    def masses(z):
        return jnp.exp(conditional(guide, params, x).log_prob(z))

    sums, half = [], 16.0
    for num_points in (200, 400):
        width = 2 * half / num_points
        middles = np.arange(-half, half, width) + width / 2
        grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 1, 2)
        density = np.asarray(masses(jnp.asarray(grid, jnp.float32))).reshape(num_points, -1)
        edge = max(density[:, [0, -1]].max(), density[[0, -1]].max())
        assert edge * (2 * half) ** 2 < 1e-6
        sums.append(np.sum(density, dtype=float) * width**2)
    error = abs(sums[1] - sums[0])
    rounding = 1e-5
    assert error < 0.01
    assert abs(sums[1] - 1) < error + rounding


@pytest.mark.parametrize(
    "family",
    [
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("mean-field", "low-rank")),
        "full-covariance",
        *(pytest.param(f, marks=[pytest.mark.slow] * (f != "flow")) for f in FLOWS),
    ],
)
def test_a_conditional_broadcasts_with_its_values(family, rng):
    """Data k = 1, ..., K against values n = 1, ..., N: (N, K) log densities, those of the loop."""
    guide = guides.make(family, plane, num_layers=2, num_hidden=5)
    x = jnp.array([0.3, -1.0, 2.0])
    z = jnp.asarray(rng.normal(size=(4, 1, 2)), jnp.float32)
    params = with_any_maps(guide, rng, x)

    @jax.jit
    def run(params, z):
        each = [conditional(guide, params, x[k : k + 1]).log_prob(z[:, 0]) for k in range(len(x))]
        return conditional(guide, params, x).log_prob(z), jnp.stack(each, axis=1)

    together, alone = run(params, z)
    assert together.shape == (4, 3)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


@every_flow
def test_a_map_of_a_batch_broadcasts(family, rng):
    transform = map_of(family, 1, 2, rng, batch=(3,))
    x = jnp.asarray(rng.normal(size=(4, 1, 2)), jnp.float32)

    @jax.jit
    def run(transform, x):
        y = transform(x)
        return y, transform.log_abs_det_jacobian(x, y), transform.inv(y)

    y, log_det, back = run(transform, x)
    assert y.shape == transform.forward_shape(x.shape) == (4, 3, 2)
    assert log_det.shape == (4, 3)
    np.testing.assert_allclose(back, jnp.broadcast_to(x, y.shape), atol=1e-3)


@pytest.mark.slow
@every_flow
def test_a_flow_starts_as_its_base(family):
    """Without its maps it has the same density."""
    guide, x = FLOWS[family](plane), jnp.array([0.3, -1.0])
    num_layers = 4 if family == "flow" else 2

    @jax.jit
    def run():
        fn = conditional(guide, {}, x)
        kept = [t for t in fn.transforms if not isinstance(t, Conditional)]
        assert len(fn.transforms) - len(kept) == num_layers
        base = dist.TransformedDistribution(fn.base_dist, kept)
        z = fn.sample(KEY, (5,))
        return fn.log_prob(z), base.log_prob(z)

    np.testing.assert_allclose(*run(), rtol=1e-4, atol=1e-4)


# --- what a flow gains ----------------------------------------------------------------------------

BEND, NOISE, SEEN = 1.0, 0.2, 1.0


def bent(x):
    """Two numbers of a datum, near a parabola given x."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z[:, 1] + BEND * z[:, 0] ** 2, NOISE), obs=x)


def gaussian_elbo(numbers):
    """The ELBO of Normal(m, L L^T), by the moments of a Gaussian."""
    m, (a, b, c) = numbers[:2], numbers[2:]
    root = np.array([[np.exp(a), 0], [c, np.exp(b)]])
    cov = root @ root.T
    mean = m[1] + BEND * (m[0] ** 2 + cov[0, 0])
    of_square = 2 * cov[0, 0] ** 2 + 4 * m[0] ** 2 * cov[0, 0]
    variance = cov[1, 1] + BEND**2 * of_square + 4 * BEND * m[0] * cov[0, 1]
    log_x = -0.5 * np.log(2 * np.pi * NOISE**2) - ((SEEN - mean) ** 2 + variance) / 2 / NOISE**2
    return log_x - 0.5 * (np.trace(cov) + m @ m - 2) + a + b


@pytest.mark.slow
@every_flow
def test_a_flow_gains_on_a_bent_posterior(family):
    """More than any Gaussian can, of any covariance; and less than log p(x)."""

    def density(z):
        of_x = stats.norm.pdf(SEEN, BEND * z**2, np.sqrt(1 + NOISE**2))
        return stats.norm.pdf(z) * of_x

    log_p = np.log(integrate.quad(density, -8, 8)[0])
    starts = [np.array([sign, 0.0, -1.0, -1.0, 0.0]) for sign in (-1.0, 0.0, 1.0)]
    best = max(-optimize.minimize(lambda n: -gaussian_elbo(n), start).fun for start in starts)
    assert log_p - best > 0.2

    guide, x, num_steps = FLOWS[family](bent, num_hidden=16), jnp.array([SEEN]), 1500
    rate = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    svi = SVI(bent, guide, rate, Trace_ELBO(num_particles=8))

    @jax.jit
    def run(key):
        update = lambda state, _: svi.update(state, x=x)  # noqa: E731
        state, _ = jax.lax.scan(update, svi.init(key, x=x), length=num_steps)
        fn = conditional(guide, svi.get_params(state), x)
        z, known = fn.sample_with_intermediates(KEY, (20_000,))
        sites = handlers.trace(handlers.substitute(bent, {"z": z[:, 0]})).get_trace(x=x)
        return sites["x"]["fn"].log_prob(x), dist.Normal().log_prob(z), fn.log_prob(z, known)

    log_x, log_prior, log_q = jax.device_get(run(KEY))
    draws = log_x.ravel() + log_prior.sum((1, 2)) - log_q.ravel()
    error = 4 * draws.std() / np.sqrt(len(draws))
    assert best + error < draws.mean() < log_p + error
