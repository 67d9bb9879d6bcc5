"""Optax transformations the engine and the experiments need and Optax lacks."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, PyTree


class GuardState(NamedTuple):
    """``finite``: whether the last loss and gradient were, so that the step was taken."""

    inner: PyTree
    finite: Bool[Array, ""]


def guard(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters and state alone where the loss or the gradient is not finite.

    Optax's ``apply_if_finite`` gives up after a number of such steps and does not see the loss.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> GuardState:
        return GuardState(inner.init(params), jnp.array(True))

    def update(updates, state, params=None, *, value, **extra):
        finite = jnp.isfinite(value)
        for leaf in jax.tree.leaves(updates):
            finite &= jnp.isfinite(leaf).all()
        updates, new = inner.update(updates, state.inner, params, value=value, **extra)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state.inner)
        return updates, GuardState(new, finite)

    return optax.GradientTransformationExtraArgs(init, update)


def precondition(
    optimizer: optax.GradientTransformation, blocks: Mapping[tuple[str, ...], ArrayLike]
) -> optax.GradientTransformationExtraArgs:
    """Runs ``optimizer`` in other linear coordinates of some parameters.

    With ``params = P @ u`` the gradient of u is ``P.T @ gradient``, and a step ``du`` of u is the
    step ``P @ du`` of the parameters. Choosing P with ``P @ P.T`` near the inverse curvature
    makes valleys round.

    Args:
        optimizer: the transformation that sees the gradient of u.
        blocks: for each tuple of scalar parameters' names their matrix P. The other parameters
            are left as they are.
    """
    inner = optax.with_extra_args_support(optimizer)

    def transform(tree: dict, transpose: bool) -> dict:
        out = {name: leaf for name, leaf in tree.items() if not any(name in b for b in blocks)}
        for names, matrix in blocks.items():
            vector = jnp.stack([tree[name] for name in names])
            product = jnp.asarray(matrix).T @ vector if transpose else jnp.asarray(matrix) @ vector
            out |= dict(zip(names, product, strict=True))
        return {name: out[name] for name in tree}

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(transform(updates, True), state, params, **extra)
        return transform(updates, False), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
