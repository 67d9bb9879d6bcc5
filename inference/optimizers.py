"""An Optax transformation that Optax lacks: descent in other linear coordinates."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike


def precondition(
    optimizer: optax.GradientTransformation, blocks: Mapping[tuple[str, ...], ArrayLike]
) -> optax.GradientTransformationExtraArgs:
    """An optimiser that runs in other linear coordinates of some parameters.

    The coordinates are u, with ``params = P @ u``. The gradient of u is ``P.T @ gradient``, and a
    step ``du`` of u is the step ``P @ du`` of the parameters. If ``P @ P.T`` is near the inverse
    curvature, narrow valleys become round.

    Args:
        optimizer: the transformation that sees the gradient of u.
        blocks: the matrix P for each tuple of names of scalar parameters. Other parameters keep
            their coordinates.
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
