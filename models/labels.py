"""Labels seen in part: a discrete latent site whose value the data tell for some data.

One program serves labelled and unlabelled data, in the same batch. The label is latent for all. An
array tells it where it is known, and holds -1 elsewhere:

    def model(x, y):
        with numpyro.plate("data", len(x)):
            label = partly_observed("y", dist.Categorical(probs), y)
            numpyro.sample("x", dist.Normal(loc[label], 1), obs=x)

    guide = guides.structured(model)

A factor rules out every other value where the label is known. So each judge gives log p(x, y) for
a labelled datum, and log p(x) for another. In a guide, q(y | x) is sure of a known label.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array

UNKNOWN = -1
RULED_OUT = -1e5  # the log density of a value that the data rule out. With -inf sums would be NaN.


def partly_observed(name: str, fn: dist.Distribution, given: Any = None) -> Array:
    """A discrete latent site, with the values that the data tell. For a model.

    Args:
        name: the site's name. The factor is the site ``<name>_given``.
        fn: a Categorical or a Bernoulli.
        given: integers of the site's shape, -1 where the value is unknown. None for unknown
            everywhere.

    Returns:
        The value: as given, or drawn. An objective or a judge may set it to each value in turn.

    Raises:
        ValueError: values that are no integers.
    """
    if given is None:
        return numpyro.sample(name, fn)
    given = check_integers(name, given)
    value = numpyro.sample(name, fn, infer={"given": given})
    fits = (given == UNKNOWN) | (given == value)
    numpyro.factor(f"{name}_given", jnp.where(fits, 0.0, RULED_OUT).sum(_event_axes(fn)))
    return value


def check_integers(name: str, given: Any) -> Array:
    """Labels as an array.

    Raises:
        ValueError: values that are no integers.
    """
    given = jnp.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f"{name}: expected labels as integers, with -1 where a label is unknown, got "
            f"{given.dtype}; write {name}.astype(int), or -1 in place of NaN"
        )
    return given


def told(fn: dist.Distribution, given: Array) -> dist.Distribution:
    """A guide's distribution that is sure of the values that the data tell.

    Args:
        fn: Categorical or Bernoulli by its logits, with or without ``.to_event``.
        given: integers of the site's shape, -1 where the value is unknown.
    """
    num_event = len(fn.event_shape)
    base: Any = fn.base_dist if num_event else fn
    is_known = given != UNKNOWN
    if isinstance(base, dist.BernoulliLogits):
        sure = jnp.where(given == 1, -RULED_OUT, RULED_OUT)
        sure = dist.Bernoulli(logits=jnp.where(is_known, sure, base.logits))
    else:
        one_hot = jax.nn.one_hot(given, base.logits.shape[-1])
        logits = jnp.where(is_known[..., None], (1 - one_hot) * RULED_OUT, base.logits)
        sure = dist.Categorical(logits=logits)
    return sure.to_event(num_event)


def told_of(fn: dist.Distribution, given: Array) -> dict[str, Any]:
    """What a guide's site says, as ``infer=``, of the values that the data tell.

    Args:
        fn: the distribution before it is told, for ``inference.LabelTerm``.
        given: as in ``told``.
    """
    return {"given": given, "untold": fn}


def _event_axes(fn: dist.Distribution) -> tuple[int, ...]:
    return tuple(range(-len(fn.event_shape), 0))
