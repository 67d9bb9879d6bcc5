"""Descent in other linear coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inference.optimizers import precondition


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
