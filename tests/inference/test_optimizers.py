"""The two Optax transformations: what they leave alone, and what they make round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inference.optimizers import guard, precondition


def test_guard_is_the_optimizer_where_all_is_finite():
    params = {"a": jnp.ones(3), "b": jnp.zeros(())}
    gradient = {"a": jnp.arange(3.0), "b": jnp.float32(-2.0)}
    plain, guarded = optax.adam(0.1), guard(optax.adam(0.1))
    states = plain.init(params), guarded.init(params)
    for _ in range(3):
        expected, first = plain.update(gradient, states[0], params)
        updates, second = guarded.update(gradient, states[1], params, value=jnp.float32(1.0))
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        jax.tree.map(np.testing.assert_array_equal, second.inner, first)
        states = first, second


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_guard_leaves_everything_alone_where_something_is_not_finite(bad, where):
    params = {"a": jnp.ones(3)}
    optimizer = guard(optax.adam(0.1))
    state = optimizer.init(params)
    good = {"a": jnp.arange(3.0)}
    _, state = optimizer.update(good, state, params, value=jnp.float32(1.0))
    gradient = {"a": good["a"].at[1].set(bad)} if where == "gradient" else good
    value = jnp.float32(bad if where == "loss" else 1.0)
    updates, after = optimizer.update(gradient, state, params, value=value)
    np.testing.assert_array_equal(updates["a"], 0.0)
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
    assert not after.finite
    updates, last = optimizer.update(good, after, params, value=jnp.float32(1.0))
    assert last.finite
    assert updates["a"][1] != 0


def test_precondition_is_the_optimizer_in_other_coordinates():
    """With params = P u, descent in u on f(P u) is descent in params with the wrapped optimiser."""
    matrix = np.array([[2.0, 0.0], [-1.0, 0.5]], np.float32)
    target = jnp.array([1.0, -2.0])

    def loss(params):
        return (
            (params["x"] - target[0]) ** 2 + 3 * (params["y"] - target[1]) ** 2 + params["z"] ** 2
        )

    def loss_of_u(u):
        x, y = jnp.asarray(matrix) @ u["xy"]
        return loss({"x": x, "y": y, "z": u["z"]})

    ours = precondition(optax.adam(0.1), {("x", "y"): matrix})
    params = {"z": jnp.float32(1.0), "y": jnp.float32(0.0), "x": jnp.float32(0.0)}
    by_hand = optax.adam(0.1)
    u = {"xy": jnp.zeros(2), "z": jnp.float32(1.0)}
    state, hand_state = ours.init(params), by_hand.init(u)
    for _ in range(5):
        updates, state = ours.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        updates, hand_state = by_hand.update(jax.grad(loss_of_u)(u), hand_state)
        u = optax.apply_updates(u, updates)
        expected = matrix @ np.asarray(u["xy"])
        np.testing.assert_allclose([params["x"], params["y"]], expected, rtol=1e-5)
        np.testing.assert_allclose(params["z"], u["z"], rtol=1e-6)
