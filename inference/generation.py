"""What a fitted model is for: encode, decode, reconstruct, sample, interpolate, traverse.

Functions of a model, a guide and the parameters of one seed. The latent site is ``z``, the
observed one ``x``, the condition, where there is one, ``c``. Pictures are means of p(x | z, c), on
the scale of x, and never the decoder's raw outputs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float, Num
from numpyro.handlers import condition

from inference.checks import check_data, check_values
from inference.evaluation import mean
from inference.sites import trace_of

Program = Callable[..., Any]
Params = Mapping[str, Any]
Arrays = Num[Any, "_ ..."]


class Sample(NamedTuple):
    """Draws from a model.

    Attributes:
        z: (N, dimensions), from p(z | c).
        x: (N, ...), from p(x | z, c).
        x_mean: (N, ...), the mean of p(x | z, c).
    """

    z: Array
    x: Array
    x_mean: Array


def encode(
    guide: Program, params: Params, x: Arrays, c: Arrays | None = None, *, key: Array | None = None
) -> Float[Array, "N ..."]:
    """The mean of q(z | x, c) (of a thousand draws, if it has no formula), or with a key a draw.

    Args:
        guide: a program with a site ``z``.
        params: of one seed.
        x: (N, ...), as the guide takes them.
        c: (N, ...), the conditions, where the guide has them.
        key: a random key.
    """
    data = {"x": x} if c is None else {"c": c, "x": x}
    check_data(data, None)
    check_values([guide], data)
    return _encode(guide, dict(params), data, random.key(0) if key is None else key, key is None)


def decode(
    model: Program, params: Params, z: Float[Any, "N ..."], c: Arrays | None = None
) -> Float[Array, "N ..."]:
    """The mean of p(x | z, c).

    Args:
        model: a program with sites ``z`` and ``x`` that generates where ``x`` is left out.
        params: of one seed.
        z: (N, dimensions).
        c: (N, ...), the conditions, where the model has them.
    """
    return _by_datum(_mean_of_x, model, params, random.key(0), z=z, c=c)


def reconstruct(
    model: Program,
    guide: Program,
    params: Params,
    x: Arrays,
    c: Arrays | None = None,
    *,
    key: Array | None = None,
) -> Float[Array, "N ..."]:
    """The mean of p(x | z, c) at the mean of q(z | x, c), or with a key at a draw from it."""
    return decode(model, params, encode(guide, params, x, c, key=key), c)


def sample(
    model: Program, params: Params, num_samples: int = 1, c: Arrays | None = None, *, key: Array
) -> Sample:
    """Draws z from p(z | c), then x from p(x | z, c).

    Args:
        model: a program with sites ``z`` and ``x`` that generates where ``x`` is left out.
        params: of one seed.
        num_samples: N without conditions. With them, draws for each: N = num_samples * len(c),
            those of one condition side by side.
        c: (M, ...), the conditions, where the model has them.
        key: a random key.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    if c is None:
        return _vmapped(_draw, model, dict(params), random.split(key, num_samples), {})
    return _by_datum(_draw, model, params, key, c=jnp.repeat(jnp.asarray(c), num_samples, axis=0))


def interpolate(
    model: Program,
    params: Params,
    z_from: Float[Any, "..."],
    z_to: Float[Any, "..."],
    num_points: int = 10,
    c: Num[Any, "..."] | None = None,
) -> Float[Array, "N ..."]:
    """The means of p(x | z, c) along the straight line between two latents, ends included.

    Args:
        model, params: as in ``decode``.
        z_from, z_to: one latent each.
        num_points: N.
        c: one condition, where the model has them.
    """
    if num_points < 2:
        raise ValueError(f"num_points: expected at least 2, got {num_points}")
    z = jnp.linspace(jnp.asarray(z_from), jnp.asarray(z_to), num_points)
    return decode(model, params, z, _repeat(c, num_points))


def traverse(
    model: Program,
    params: Params,
    z: Float[Any, " z"],
    dim: int,
    values: Float[Any, " N"],
    c: Num[Any, "..."] | None = None,
) -> Float[Array, "N ..."]:
    """The means of p(x | z, c) as one dimension of z takes ``values`` and the others stay.

    Args:
        model, params: as in ``decode``.
        z: one latent.
        dim: which dimension.
        values: what it takes.
        c: one condition, where the model has them.
    """
    z, values = jnp.asarray(z), jnp.asarray(values)
    if not -len(z) <= dim < len(z):
        raise ValueError(f"dim: expected a dimension of z, below {len(z)}, got {dim}")
    along = jnp.tile(z, (len(values), 1)).at[:, dim].set(values)
    return decode(model, params, along, _repeat(c, len(values)))


def _repeat(c: Any, times: int) -> Array | None:
    return None if c is None else jnp.repeat(jnp.asarray(c)[None], times, axis=0)


# --- one datum, and all of them -------------------------------------------------------------------


def _run(program: Program, params: Params, key: Array, datum: Mapping[str, Array]) -> Any:
    """The sites of the program at one datum, each with a data axis of length 1."""
    data = {name: array[None] for name, array in datum.items()}
    return trace_of(program, key, params, **data)


@partial(jax.jit, static_argnames=("guide", "means"))
def _encode(guide: Program, params: Any, data: dict[str, Array], key: Array, means: bool) -> Array:
    z = trace_of(guide, key, params, **data)["z"]
    return mean(z["fn"], key) if means else z["value"]


def _mean_of_x(model: Program, params: Params, key: Array, z: Array, **datum: Array) -> Array:
    return _run(condition(model, {"z": z[None]}), params, key, datum)["x"]["fn"].mean[0]


def _draw(model: Program, params: Params, key: Array, **datum: Array) -> Sample:
    sites = _run(model, params, key, datum)
    z, x = sites["z"], sites["x"]
    return Sample(z["value"][0], x["value"][0], x["fn"].mean[0])


def _by_datum(
    one: Callable[..., Any], program: Program, params: Params, key: Array, **arrays: Any
) -> Any:
    """``one(program, params, key, **datum)`` on every datum, each with a key of its own."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items() if array is not None}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"expected as many of each, got {lengths}")
    if "c" in arrays:
        check_values([program], {"c": arrays["c"]})
    keys = random.split(key, next(iter(lengths.values())))
    return _vmapped(one, program, dict(params), keys, arrays)


@partial(jax.jit, static_argnames=("one", "program"))
def _vmapped(
    one: Callable[..., Any], program: Program, params: Any, keys: Array, arrays: dict[str, Array]
) -> Any:
    return jax.vmap(lambda key, datum: one(program, params, key, **datum))(keys, arrays)
