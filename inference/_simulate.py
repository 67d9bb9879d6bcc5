"""Data that a fitted model simulates, as the programs take them.

For judges that must know the latents behind the data: calibration, and bounds from above.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jaxtyping import Array

from inference._data import Prepared
from inference._judges import require_fit, values_of
from inference._settings import require_whole
from inference._streams import only, rows
from inference.fit import Fit, programs_of
from inference.generation import data_first, given_conditions, sample_prior_predictive
from inference.sites import length, mask_name, observed_sources, spread_rows, trace_of

DATA_AT_ONCE = 500  # that are simulated together
CONDITIONS = 1000  # rows of data that conditions are drawn from
LOOKED_AT = 20  # simulated data that are compared with what the model observes


class NotSimulated(ValueError):
    """No array can be simulated: the model computes its observations from its arrays."""


class Simulated(NamedTuple):
    """Data from a model, and the latents that they come from.

    Attributes:
        data: arrays as the programs take them.
        latents: by latent site, (N, ...).
    """

    data: Prepared
    latents: dict[str, np.ndarray]


def check_local(judge: str, result: Fit, remedy: str) -> None:
    """Checks a fit's programs for a judge of each datum's latents.

    Args:
        judge: its name, for messages.
        result: the fit.
        remedy: what to do about global sites.

    Raises:
        TypeError: no fit.
        ValueError: global sites, sites that the objective sums over, no latent site, or no plate.
    """
    require_fit(result)
    programs = programs_of(result, result.batch)
    if not programs.plates:
        raise ValueError(
            f"{judge}: expected a model with a plate for its data, got one without; put the data "
            f'in numpyro.plate("data", len(x))'
        )
    if programs.has_globals:
        raise ValueError(
            f"{judge}: expected latent sites with one value for each datum, got the global site "
            f"{programs.globals[0]!r}, which all data share; {remedy}"
        )
    if programs.summed:
        raise ValueError(
            f"{judge}: expected latent sites that the guide draws, got {programs.summed[0]!r}, "
            f"which is summed over; use log_likelihood, which sums it exactly"
        )
    if not programs.latents:
        raise ValueError(
            f"{judge}: expected latent sites, got a model without; log p(x) is the ELBO then"
        )


def simulate(
    judge: str, result: Fit, num_simulations: int, key: Array, conditions: Mapping[str, Any]
) -> Simulated:
    """Draws z ~ p(z | c) and x ~ p(x | z, c), for conditions drawn with replacement.

    Args:
        judge: who asks, for messages.
        result: a fit of one seed, without global sites.
        num_simulations: how many data.
        key: a random key.
        conditions: arrays of shape (M, ...) by name, as the programs take them.

    Raises:
        ValueError: a condition is missing; an array that the model simulates is given.
        NotSimulated: an observed site is no array of the data, but computed from one.
    """
    require_whole("num_simulations", num_simulations, 1)
    sources = _sources(judge, result)
    _check_given(judge, result, conditions, set(sources.values()))
    row_key, draw_key = random.split(key)
    given = _rows(given_conditions(result, conditions), num_simulations, row_key)
    masks = {mask_name(name) for name in sources.values()}  # the model generates without them
    known = {name: array for name, array in given.items() if name not in masks}
    sites = _draws(result, known, num_simulations, draw_key)
    arrays = dict(given)
    for site, name in sources.items():
        shape = result.batch[name].shape[1:]
        if sites[site].size != num_simulations * int(np.prod(shape)):
            raise NotSimulated(_computed(judge, site, name))
        values = sites[site].reshape(num_simulations, *shape).astype(result.batch[name].dtype)
        own = mask_name(name)
        if own in result.batch:
            like = result.batch[own]
            arrays.setdefault(own, np.ones((num_simulations, *like.shape[1:]), like.dtype))
            there = np.asarray(arrays[own]).astype(bool)
            there = there.reshape(there.shape + (1,) * (values.ndim - there.ndim))
            values = np.where(there, values, np.zeros((), values.dtype))
        arrays[name] = values
    arrays = {name: np.asarray(arrays[name]) for name in result.batch}
    _check_observed(judge, result, arrays, sources)
    observed = sources.keys()
    return Simulated(Prepared(arrays), {n: v for n, v in sites.items() if n not in observed})


def conditions_among(result: Fit, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that the model does not simulate, of some of the data: for ``simulate``.

    Masks of observations stay, so that as much is missing from the simulations.
    """
    observed = set(_sources("simulate", result).values())
    names = [name for name in arrays if name not in observed]
    some = spread_rows(length(arrays), CONDITIONS)
    return rows(only(arrays, names), some) if names else {}


def _sources(judge: str, result: Fit) -> dict[str, str]:
    """The array that each observed site's value is.

    Raises:
        NotSimulated: a site is made of several arrays or of none, or two sites of one.
    """
    sources: dict[str, str] = {}
    for site, names in observed_sources(result.model, result.batch).items():
        masks = {mask_name(name) for name in names}
        own = sorted(names - masks)
        if len(own) != 1 or own[0] in sources.values():
            raise NotSimulated(_computed(judge, site, " and ".join(own) or "no array"))
        sources[site] = own[0]
    return sources


def _computed(judge: str, site: str, name: str) -> str:
    return (
        f"{judge}: expected observed sites whose values are arrays of the data, one each, got "
        f"{site!r}, which the model computes from {name}; give the model the computed array"
    )


def _check_given(judge: str, result: Fit, given: Mapping[str, Any], observed: set[str]) -> None:
    masks = {mask_name(name) for name in observed}
    made = {mask_name(name) for name in given}  # of conditions
    missing = sorted(result.batch.keys() - given.keys() - observed - masks - made)
    if missing:
        raise ValueError(
            f"{judge}: expected the model's conditions by keyword, got none for {missing[0]!r}; "
            f"write {judge}(result, ..., {missing[0]}=test[{missing[0]!r}])"
        )
    others = sorted(given.keys() & observed)
    if others:
        raise ValueError(
            f"{judge}: expected conditions by keyword, got {others[0]!r}, which the model "
            f"simulates; leave it out"
        )


def _rows(given: Mapping[str, Any], num_simulations: int, key: Array) -> dict[str, np.ndarray]:
    """Rows of the conditions, drawn with replacement."""
    if not given:
        return {}
    rows = np.asarray(random.randint(key, (num_simulations,), 0, length(given)))
    return {name: np.asarray(array)[rows] for name, array in given.items()}


def _draws(
    result: Fit, given: Mapping[str, np.ndarray], num_simulations: int, key: Array
) -> dict[str, np.ndarray]:
    """A draw of every site for each row of the conditions, (N, ...)."""
    if not given:
        drawn = sample_prior_predictive(result, num_simulations, key=key)
        return {name: values[0, :, 0] for name, values in drawn.items()}
    size = min(DATA_AT_ONCE, num_simulations)
    parts = []
    for i, start in enumerate(range(0, num_simulations, size)):
        index = np.minimum(np.arange(start, start + size), num_simulations - 1)
        some = {name: array[index] for name, array in given.items()}
        parts.append(sample_prior_predictive(result, 1, key=random.fold_in(key, i), **some))
    joined = jax.tree.map(lambda *x: np.concatenate([values[0, 0] for values in x]), *parts)
    return {name: values[:num_simulations] for name, values in joined.items()}


def _check_observed(
    judge: str, result: Fit, arrays: Mapping[str, np.ndarray], sources: Mapping[str, str]
) -> None:
    """Given the simulated arrays, the model observes them and nothing computed from them."""
    some = {name: jnp.asarray(array[:LOOKED_AT]) for name, array in arrays.items()}
    plates = programs_of(result, result.batch).plates
    sites = trace_of(result.model, random.key(0), values_of(result, 0), **some)
    for site, name in sources.items():
        seen = data_first(sites[site], plates, sites[site]["value"])
        if not np.array_equal(np.ravel(seen), np.ravel(some[name])):
            raise NotSimulated(_computed(judge, site, name))
