"""Objectives: what ``fit`` asks of them, the ones that NumPyro lacks, and all by name.

An objective is a NumPyro ELBO object. ``traits`` answers the few questions that the engine, the
checks and the judges have. So a user's own objective is served like those here.

The objectives in this file also work in NumPyro's ``SVI``.

| object                    | its gradient                                                     |
|---------------------------|------------------------------------------------------------------|
| ``StickingTheLanding``    | the ELBO's, without noise where the guide is the posterior       |
| ``ImportanceWeighted``    | NumPyro's ``RenyiELBO``, and its memory does not grow with K     |
| ``DoublyReparameterized`` | the importance-weighted bound's, of use to the guide for every K |
| ``KLWeighted``            | an ELBO's, with beta times the divergence (a beta-VAE)           |
| ``KLWarmUp``              | the same, and beta rises to 1 while training warms up            |
| ``FreeBits``              | an ELBO's, with the first nats of the divergence free            |
| ``Hybrid``                | the ELBO's, mixed with one that has the prior for its guide      |
| ``ReweightedWakeSleep``   | of latents without a gradient: by importance weights             |
| ``LabelTerm``             | an ELBO's, and the guide learns to classify the labelled data    |

The value is always the ELBO or the named bound. So traces of different objectives can be compared.
``inference._scaling`` turns it into nats per datum.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import numpyro.infer
from jax import lax, random
from jaxtyping import Array, Float
from numpyro.handlers import block, replay, seed, substitute
from numpyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import compute_log_probs
from numpyro.util import check_model_guide_match

from inference._scaling import Derived, Rescale
from inference.particles import InPieces
from inference.sites import (
    UNKNOWN,
    DataPlates,
    Program,
    Site,
    base,
    data_plates,
    elementwise_kl,
    given_values,
    is_latent,
    is_observed,
    trace_of,
)

IN_PIECES = InPieces()  # how many particles are evaluated, where nothing else is said

# --- what an objective answers --------------------------------------------------------------------


@dataclass(frozen=True)
class Traits:
    """What the engine, the checks and the judges ask of an objective.

    Attributes:
        weighs_jointly: with global latent sites it weighs whole data sets, not each datum.
        exact_divergences: it takes KL(q || p) by formula, site by site.
        weighable_divergence: its divergence is a term by itself, and a weight can multiply it.
        weighed_divergence: its divergence has such a weight already.
        changes_with_step: it has a method ``at_step(step) -> ELBO``.
        num_steps: steps until it stops changing. None for an objective that never changes.
        latents_from_data: it takes the values of the latent sites from the data.
        sums_sites: it sums over sites marked ``infer={"enumerate": "parallel"}``.
    """

    weighs_jointly: bool = False
    exact_divergences: bool = False
    weighable_divergence: bool = False
    weighed_divergence: bool = False
    changes_with_step: bool = False
    num_steps: int | None = None
    latents_from_data: bool = False
    sums_sites: bool = False


def traits(objective: ELBO) -> Traits:
    """The traits of an objective: its attribute ``traits``, or those of NumPyro's class."""
    own = getattr(objective, "traits", None)
    return _known_traits(objective) if own is None else own


@functools.singledispatch
def _known_traits(objective: Any) -> Traits:
    """The traits by class. A subclass has those of its parent."""
    return Traits()


@_known_traits.register(TraceEnum_ELBO)
def _(objective: Any) -> Traits:
    return Traits(weighable_divergence=True, sums_sites=True)


@_known_traits.register(Trace_ELBO)
def _(objective: Any) -> Traits:
    return Traits(weighable_divergence=True)


@_known_traits.register(TraceMeanField_ELBO)
def _(objective: Any) -> Traits:
    return Traits(weighable_divergence=True, exact_divergences=True)


@_known_traits.register(RenyiELBO)
def _(objective: Any) -> Traits:
    return Traits(weighs_jointly=True)


@_known_traits.register(Derived)
def _(objective: Derived) -> Traits:
    return traits(objective.objective)


def check_objective(value: Any, name: str = "objective") -> None:
    """Checks that a value is a NumPyro ELBO object.

    Args:
        value: what came.
        name: the argument's name, for the message.

    Raises:
        TypeError: it is a class, a name, or something else.
    """
    if isinstance(value, ELBO):
        return
    known = 'write Trace_ELBO(), or inference.OBJECTIVES["Trace_ELBO"](num_particles)'
    if isinstance(value, type) and issubclass(value, ELBO):
        try:
            inspect.signature(value).bind()
            arguments = ""
        except TypeError:
            arguments = "..."
        got, known = f"the class {value.__name__}", f"write {value.__name__}({arguments})"
    elif isinstance(value, str):
        got = f"the name {value!r}"
        if value in OBJECTIVES:
            known = f"write inference.OBJECTIVES[{value!r}](num_particles)"
        elif inspect.isclass(getattr(numpyro.infer, value, None)):
            known = f"write numpyro.infer.{value}()"
        else:
            known = f"the names in inference.OBJECTIVES are {', '.join(sorted(OBJECTIVES))}"
    elif callable(value):
        got = f"the function {getattr(value, '__name__', value)!r}"
        known = "call it first: inference.OBJECTIVES has functions of num_particles"
    else:
        got = f"{value!r} ({type(value).__name__})"
    raise TypeError(f"{name}: expected a NumPyro ELBO object, got {got}; {known}")


def _check_divergence(objective: Any, weighed: bool) -> None:
    """Refuses an objective without a divergence to weigh.

    Args:
        objective: what came.
        weighed: whether its divergence may have a weight already, or be summed over sites.
    """
    check_objective(objective)
    known = traits(objective)
    is_plain = not (known.weighed_divergence or known.sums_sites)
    if known.weighable_divergence and (weighed or is_plain):
        return
    names = "Trace_ELBO, TraceMeanField_ELBO, StickingTheLanding"
    names += ", TraceEnum_ELBO, Hybrid, KLWeighted" if weighed else ""
    why = "is no term by itself"
    if known.weighable_divergence:
        why = "is a sum over sites" if known.sums_sites else "has a weight already"
    raise TypeError(
        f"objective: expected {names} or a subclass, got {type(objective).__name__}, where the "
        f"divergence {why}; train it without warm-up, beta, free bits and Hybrid"
    )


# --- the weight of the divergence -----------------------------------------------------------------


class KLWarmUp(Derived):
    """An ELBO with a gradient that neglects the divergence at first (Bowman et al. 2016,
    section 3.1).

    At step t of the warm-up the gradient is the gradient of

        E_q [ log p(x | z, c) ] - w(t) KL( q(z | x, c) || p(z | c) ),    w(t) = start + (1 - start)
                                                                                * t / num_steps.

    From step ``num_steps`` on it is the gradient of the ELBO itself. The value is always the ELBO,
    so traces with and without a warm-up can be compared. ``fit`` asks for the objective of each
    step, ``at_step(step)``. Plain ``SVI`` does not: give it ``KLWeighted(objective, w)``.

    Args:
        objective: one that ``KLWeighted`` takes. A ``KLWeighted`` warms up to its own weight.
        num_steps: steps until the weight is 1. ``fit`` refuses more than it trains.
        start: the first step's weight.

    Raises:
        ValueError: a number is out of range.
        TypeError: the objective has no divergence that can be weighed.
    """

    def __init__(self, objective: ELBO, num_steps: int, start: float = 0.0):
        _check_divergence(objective, weighed=True)
        _check_count("num_steps", num_steps)
        if not 0 <= start <= 1:
            raise ValueError(f"start: expected a weight from 0 to 1, got {start}")
        super().__init__(objective)
        self.num_steps, self.start = int(num_steps), start

    @property
    def traits(self) -> Traits:
        """What ``inference.objectives.traits`` answers."""
        inner = traits(self.objective)
        return replace(
            inner, changes_with_step=True, num_steps=self.num_steps, weighable_divergence=False
        )

    def weight(self, step: Any) -> Any:
        """w(t)."""
        return self.start + (1 - self.start) * jnp.minimum(step / self.num_steps, 1.0)

    def at_step(self, step: Any) -> ELBO:
        """The objective of a step, counted from 0. The step may be traced."""
        return KLWeighted(self.objective, self.weight(step))

    def derive(self, evaluate, rng_key, param_map, model, guide, args, kwargs):
        """The loss at full weight, and the programs' mutable state."""
        return evaluate(model, guide)


class KLWeighted(Derived):
    """An ELBO with a weight on the divergence in its gradient, and none in its value.

    A fixed weight beta trains a beta-VAE (Higgins et al. 2017, equation 4),

        E_q [ log p(x | z, c) ] - beta KL( q(z | x, c) || p(z | c) ).

    The value is the ELBO, in traces and on held-out data.

    Args:
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``StickingTheLanding``, ``Hybrid``,
            ``TraceEnum_ELBO`` or a subclass of these. In a ``Hybrid`` only the guide's divergence
            is weighed. With another ``KLWeighted`` the weights multiply. ``TraceEnum_ELBO`` may sum
            over sites that the guide draws, and not over those that it does not.
        weight: a number from 0, or a traced scalar.

    Raises:
        TypeError: the objective has no divergence that can be weighed.
        ValueError: the weight is out of range.
    """

    def __init__(self, objective: ELBO, weight: Any):
        _check_divergence(objective, weighed=True)
        if isinstance(weight, int | float) and not 0 <= weight < math.inf:
            raise ValueError(f"weight: expected a finite number from 0, got {weight}")
        super().__init__(objective)
        self.kl_weight = weight

    @property
    def traits(self) -> Traits:
        """What ``inference.objectives.traits`` answers."""
        return replace(traits(self.objective), weighed_divergence=True)

    def derive(self, evaluate, rng_key, param_map, model, guide, args, kwargs):
        """The loss, and the programs' mutable state."""
        # Both have the same draws, so that the compiler evaluates them once.
        plain, state = evaluate(model, guide)
        model, guide = (Rescale(fn, self.kl_weight, is_latent) for fn in (model, guide))
        return _with_gradient_of(plain, evaluate(model, guide)[0]), state


@jax.custom_jvp
def _with_gradient_of(value: Any, other: Any) -> Any:
    """``value``, with the gradient of ``other``. The value of ``other`` is not needed."""
    return value


@_with_gradient_of.defjvp
def _gradient_of_other(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return primals[0], tangents[1]


class FreeBits(Derived):
    """An ELBO with some nats of the divergence free in its gradient, and none in its value.

    Kingma et al. 2016, appendix C.8. KL_i is the divergence of dimension i of z, averaged over the
    batch. The gradient is the gradient of

        E_q [ log p(x | z, c) ] - sum_i max( nats, KL_i ).

    So a dimension may tell up to ``nats`` nats per datum at no cost. It is not given up before the
    decoder has learnt to listen. The divergences are exact. A free dimension's divergence has no
    gradient: exactly none with ``TraceMeanField_ELBO`` inside, none on average with another ELBO.

    Args:
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``StickingTheLanding`` or a subclass.
        nats: nats per datum that are free in each dimension of each latent site, from 0.

    Raises:
        TypeError: the objective has no divergence that can be weighed, or has weighed it.
        ValueError: ``nats`` is out of range. In use: a latent site is global, or the divergence of
            its guide and prior has no formula dimension by dimension.
    """

    def __init__(self, objective: ELBO, nats: float):
        _check_divergence(objective, weighed=False)
        if not 0 <= nats < math.inf:
            raise ValueError(f"nats: expected a finite number from 0, got {nats}")
        super().__init__(objective)
        self.nats = nats

    @property
    def traits(self) -> Traits:
        """What ``inference.objectives.traits`` answers."""
        inner = traits(self.objective)
        return replace(inner, exact_divergences=True, weighable_divergence=False)

    def derive(self, evaluate, rng_key, param_map, model, guide, args, kwargs):
        """The loss, and the programs' mutable state."""
        loss, state = evaluate(model, guide)
        plates = _data_plates(model, param_map, args, kwargs)

        def divergences(key: Array) -> dict[str, tuple[Array, Array]]:
            """By latent site: the number of data in the batch; nats of every dimension."""
            model_key, guide_key = random.split(key)  # as NumPyro splits it: the same draws
            drawn = trace_of(guide, guide_key, param_map, *args, **kwargs)
            sites = trace_of(replay(model, drawn), model_key, param_map, *args, **kwargs)
            check_model_guide_match(sites, drawn)
            latent = (name for name in sorted(sites) if is_latent(sites[name]))
            return {name: _mean_kl(drawn[name], sites[name], plates) for name in latent}

        keys = _keys(rng_key, self.num_particles)
        vectorize = self.vectorize_particles_fn if self.num_particles > 1 else _vmap
        for count, kl in vectorize(divergences, keys).values():
            unused = count[0] * jnp.maximum(self.nats - kl.mean(0), 0.0).sum()
            loss += unused - lax.stop_gradient(unused)
        return loss, state


def _vmap(fn: Callable[..., Any], keys: Array) -> Any:
    return jax.vmap(fn)(keys)


def _mean_kl(drawn: Site, site: Site, plates: DataPlates) -> tuple[Array, Float[Array, " z"]]:
    axis = plates.axis(drawn)
    kl = elementwise_kl(drawn["fn"], site["fn"])
    if kl is None:
        raise ValueError(
            f"site {site['name']!r}: expected a guide and a prior that factorise over dimensions, "
            f"with a formula for the divergence of each, got {type(base(drawn['fn'])).__name__} "
            f"and {type(base(site['fn'])).__name__}; train it without free bits"
        )
    kl = jnp.moveaxis(kl, axis - drawn["fn"].event_dim, 0)
    scale = 1.0 if drawn["scale"] is None else drawn["scale"]
    return jnp.asarray(scale * len(kl)), kl.reshape(len(kl), -1).mean(0)


def _data_plates(
    model: Program, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> DataPlates:
    """The plates that hold the data, in a model called as plain ``SVI`` calls it.

    Arguments that are no arrays stay as they are.

    Raises:
        ValueError: there are no arrays.
    """
    given = {str(i): value for i, value in enumerate(args)} | kwargs
    arrays = {name: value for name, value in given.items() if getattr(value, "ndim", 0)}
    if not arrays:
        raise ValueError(
            f"model: expected arrays of data among its arguments, got {sorted(given)}; give the "
            f"data as arguments: the plate that follows their length holds them"
        )

    def run(**batch: Any) -> Any:
        found = given | batch
        fixed = substitute(model, data=params)
        return fixed(*(found[str(i)] for i in range(len(args))), **{n: found[n] for n in kwargs})

    return data_plates(run, **arrays)


# --- gradients along the path of the draws --------------------------------------------------------


class StickingTheLanding(ELBO):
    """The ELBO, with the gradient of Roeder, Wu & Duvenaud 2017 (equation 7).

    log q(z | x, c) depends on the guide's parameters directly and through the draw z. The direct
    part has expectation zero and is left out. Where the guide is the exact posterior, the gradient
    of its parameters is then zero for every draw, not only on average. A parameter that the model
    uses too keeps its gradient in log p(x, z | c).

    Args:
        num_particles: draws of z per datum.
        vectorize_particles: how they are evaluated. The default needs no more memory for more than
            ten of them, and one more forward pass. True is all at once.

    Raises:
        ValueError: ``num_particles`` is below 1. In use: the draws of a latent site have no
            gradient, or the guide has a factor.
    """

    traits = Traits(weighable_divergence=True)

    def __init__(self, num_particles: int = 1, vectorize_particles: Any = IN_PIECES):
        _check_count("num_particles", num_particles)
        super().__init__(num_particles, vectorize_particles)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss: its value is minus the ELBO."""

        def particle(key: Array) -> Array:
            densities = _along_the_path(key, param_map, model, guide, args, kwargs)
            log_q, _, log_p, _ = densities
            total = lambda terms: sum(terms[name].sum() for name in sorted(terms))  # noqa: E731
            return jnp.asarray(total(log_p) - total(log_q))

        keys = _keys(rng_key, self.num_particles)
        return -self.vectorize_particles_fn(particle, keys).mean()


class ImportanceWeighted(RenyiELBO):
    """The importance-weighted bound of Burda et al. 2016 (equation 8), for many particles too.

    It is NumPyro's ``RenyiELBO`` of order 0, with the same draws. If every site lies in a data
    plate, each datum has its own weights. ``RenyiELBO`` evaluates all particles at once. So the
    memory of its step grows with their number.

    Args:
        num_particles: K, draws of z per datum.
        vectorize_particles: as in ``StickingTheLanding``.

    Raises:
        ValueError: ``num_particles`` is below 1.
    """

    def __init__(self, num_particles: int = 2, vectorize_particles: Any = IN_PIECES):
        _check_count("num_particles", num_particles)
        super().__init__(num_particles=num_particles)
        self.vectorize_particles = vectorize_particles
        self.vectorize_particles_fn = self._assign_vectorize_particles_fn(vectorize_particles)


class DoublyReparameterized(ELBO):
    """The importance-weighted bound, with the gradient of Tucker et al. 2019 (equation 8).

    The guide draws z_k, and w_k = p(x, z_k | c) / q(z_k | x, c). Each datum has its own weights.
    The value is the bound of Burda et al. 2016 (equation 8),

        L_K = E [ log (1 / K) sum_k w_k ].

    The share of draw k is v_k = w_k / sum_j w_j. The gradient of the

        model's parameters is  sum_k v_k    (d / d theta) log w_k,
        guide's parameters is  sum_k v_k^2  (d log w_k / d z_k) (d z_k / d phi).

    It is unbiased, as the plain gradient is. But the plain one drowns in noise as K grows
    (Rainforth et al. 2018), and this one does not. A parameter in both programs gets the sum of the
    two: the first for its part in log p(x, z | c), the second for its part in drawing z. With one
    particle this is ``StickingTheLanding``.

    Args:
        num_particles: K, draws of z per datum.
        vectorize_particles: as in ``StickingTheLanding``.

    Raises:
        ValueError: as ``StickingTheLanding``. In use: a site lies outside the plates of the data,
            or a plate draws its own batches.
    """

    traits = Traits()

    def __init__(self, num_particles: int = 2, vectorize_particles: Any = IN_PIECES):
        _check_count("num_particles", num_particles)
        super().__init__(num_particles, vectorize_particles)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss: its value is minus the importance-weighted bound."""
        plates = _data_plates(model, param_map, args, kwargs)

        def log_weights(share: Float[Array, "particle batch"] | None) -> Any:
            def particle(of_particle: tuple[Array, Array | None]) -> Array:
                key, share = of_particle
                path = None if share is None else (plates, share)
                densities = _along_the_path(key, param_map, model, guide, args, kwargs, path)
                log_q, q_sites, log_p, p_sites = densities
                size = _batch_size(p_sites, plates)
                log_p = plates.sum_by_datum(log_p, p_sites, size)
                return log_p - plates.sum_by_datum(log_q, q_sites, size)

            keys = _keys(rng_key, self.num_particles)
            return self.vectorize_particles_fn(particle, (keys, share))

        # Both have the same draws. All at once, the compiler evaluates them once. In pieces, the
        # first gives the value. The gradient evaluates the second alone, piece by piece.
        log_w = lax.stop_gradient(log_weights(None))
        share = jax.nn.softmax(log_w, axis=0)
        bound = jax.nn.logsumexp(log_w, axis=0) - math.log(self.num_particles)
        return _with_gradient_of(-bound.sum(), -(share * log_weights(share)).sum())


def _along_the_path(
    key: Array,
    params: dict[str, Any],
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: tuple[DataPlates, Float[Array, " batch"]] | None = None,
) -> tuple[dict[str, Array], dict[str, Any], dict[str, Array], dict[str, Any]]:
    """log q and its sites, log p and its sites, of one draw from the guide.

    The parameters of log q are held fixed. The guide's parameters reach log q and log p through the
    draw alone. With ``path``, the data plates and a factor for every datum, the factor multiplies
    the gradient of that datum's draws.
    """
    model_key, guide_key = random.split(key)
    drawn = trace_of(guide, guide_key, params, *args, **kwargs)
    drawn = {name: _drawn_along(site, path) for name, site in drawn.items()}
    # A Delta follows from the other draws. So that it still agrees with them it is not drawn again.
    draws = {
        name: site["value"]
        for name, site in drawn.items()
        if is_latent(site) and not isinstance(base(site["fn"]), dist.Delta)
    }
    fixed = jax.tree.map(lax.stop_gradient, params)
    log_q, q_sites = compute_log_probs(
        seed(guide, guide_key), args, kwargs, fixed | draws, sum_log_prob=False
    )
    log_p, p_sites = compute_log_probs(
        replay(seed(model, model_key), drawn), args, kwargs, params, sum_log_prob=False
    )
    check_model_guide_match(p_sites, q_sites)
    return log_q, q_sites, log_p, p_sites


def _drawn_along(site: Site, path: tuple[DataPlates, Array] | None) -> Site:
    if site["type"] != "sample":
        return site
    if site["is_observed"]:
        raise ValueError(
            f"guide site {site['name']!r}: expected latent sites alone, got a factor; its gradient "
            f"would be lost: use Trace_ELBO"
        )
    if not site["fn"].has_rsample:
        raise ValueError(
            f"guide site {site['name']!r}: expected a distribution with a gradient in its draws, "
            f"got {type(base(site['fn'])).__name__}; relax it, or use TraceGraph_ELBO"
        )
    if path is None:
        return site
    plates, factor = path
    axis = plates.axis(site) - site["fn"].event_dim
    factor = factor.reshape(-1, *(1 for _ in range(-axis - 1)))
    return site | {"value": _scale_gradient(site["value"], factor)}


@jax.custom_jvp
def _scale_gradient(x: Array, factor: Array) -> Array:
    """x, with ``factor`` times its gradient."""
    return x


@_scale_gradient.defjvp
def _scale_tangent(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    return primals[0], (primals[1] * tangents[0]).astype(tangents[0].dtype)


def _batch_size(sites: dict[str, Site], plates: DataPlates) -> int:
    """The number of data in the plates around the sites of a program."""
    for name, site in sorted(sites.items()):
        size, subsample_size = site["args"] if site["type"] == "plate" else (0, None)
        if subsample_size not in (None, size):
            raise ValueError(
                f"plate {name!r}: expected all of its data, got a subsample of {subsample_size} "
                f"out of {size}; take the size from the arguments and let ``fit`` draw the batches"
            )
    sampled = [site for _, site in sorted(sites.items()) if site["type"] == "sample"]
    for site in sampled:
        plates.axis(site)  # refuses a global site
    frames = sampled[0]["cond_indep_stack"]
    return next(frame.size for frame in frames if frame.name in plates.names)


def _keys(rng_key: Array, num_particles: int) -> Array:
    """A key for each particle, as NumPyro splits them."""
    return random.split(rng_key, num_particles) if num_particles > 1 else rng_key[None]


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")


# --- latents without a gradient -------------------------------------------------------------------


class ReweightedWakeSleep(ELBO):
    """Importance weights in place of a gradient through the draws: for discrete latents too.

    Bornschein & Bengio 2015 (equations 7 and 9, the wake phases); Le et al. 2019 (section 3). The
    guide draws z_k, and w_k = p(x, z_k | c) / q(z_k | x, c). Each datum has its own weights, and
    v_k = w_k / sum_j w_j is the share of draw k. The value is the importance-weighted bound,

        L_K = E [ log (1 / K) sum_k w_k ].

    The gradient of the

        model's parameters is  sum_k v_k  (d / d theta) log p(x, z_k | c),
        guide's parameters is  sum_k v_k  (d / d phi)   log q(z_k | x, c),

    with the draws held. So the model climbs the bound, and the guide comes close to the posterior
    in KL(p || q). Both gradients are biased for few particles. With one particle the guide learns
    nothing. A parameter in both programs gets the sum of the two.

    Args:
        num_particles: K, draws of z per datum, at least 2.
        vectorize_particles: as in ``StickingTheLanding``.

    Raises:
        ValueError: ``num_particles`` is below 2. In use: a site lies outside the plates of the
            data, or a plate draws its own batches.
    """

    can_infer_discrete = True
    traits = Traits()

    def __init__(self, num_particles: int = 10, vectorize_particles: Any = IN_PIECES):
        _check_count("num_particles", num_particles)
        if num_particles < 2:
            raise ValueError(
                f"num_particles: expected at least 2, whose weights can differ, got {num_particles}"
            )
        super().__init__(num_particles, vectorize_particles)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """The loss: its value is minus the importance-weighted bound."""
        plates = _data_plates(model, param_map, args, kwargs)

        def particle(key: Array) -> tuple[Array, Array]:
            model_key, guide_key = random.split(key)
            drawn = trace_of(guide, guide_key, param_map, *args, **kwargs)
            draws = {n: lax.stop_gradient(s["value"]) for n, s in drawn.items() if is_latent(s)}
            values = param_map | draws
            log_q, q_sites = compute_log_probs(
                seed(guide, guide_key), args, kwargs, values, sum_log_prob=False
            )
            log_p, p_sites = compute_log_probs(
                seed(model, model_key), args, kwargs, values, sum_log_prob=False
            )
            check_model_guide_match(p_sites, q_sites)
            size = _batch_size(p_sites, plates)
            by_datum = plates.sum_by_datum
            return by_datum(log_p, p_sites, size), by_datum(log_q, q_sites, size)

        keys = _keys(rng_key, self.num_particles)
        log_p, log_q = self.vectorize_particles_fn(particle, keys)
        log_w = lax.stop_gradient(log_p - log_q)
        share = jax.nn.softmax(log_w, axis=0)
        bound = jax.nn.logsumexp(log_w, axis=0) - math.log(self.num_particles)
        return _with_gradient_of(-bound.sum(), -(share * (log_p + log_q)).sum())


class LabelTerm(Derived):
    """An objective, and a guide that learns to classify the labelled data.

    Kingma et al. 2014, equation 9. The ELBO of a labelled datum says nothing of q(y | x): the
    guide is sure of a label that it is told. So this term is added to the gradient, and not to the
    value:

        weight * sum over labelled data of log q(y | x, c),

    with q as it is before it is told the label. The term counts for every latent site of the guide
    that the data tell in part (``models.labels.partly_observed``).

    Args:
        objective: any NumPyro ELBO object. A ``KLWarmUp`` or ``KLWeighted`` goes inside.
        weight: of a labelled datum, from 0. The paper has 0.1 N / M for M labelled data out of N.

    Raises:
        ValueError: the weight is out of range. In use: the guide has no such site.
    """

    def __init__(self, objective: ELBO, weight: float):
        check_objective(objective)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight: expected a finite number from 0, got {weight}")
        super().__init__(objective)
        self.label_weight = weight

    @property
    def traits(self) -> Traits:
        """What ``inference.objectives.traits`` answers."""
        return replace(traits(self.objective), weighable_divergence=False)

    def at_step(self, step: Any) -> ELBO:
        """The objective of a step, counted from 0."""
        inner: Any = self.objective
        return LabelTerm(inner.at_step(step), self.label_weight)

    def derive(self, evaluate, rng_key, param_map, model, guide, args, kwargs):
        """The loss, and the programs' mutable state."""
        loss, state = evaluate(model, guide)
        _, guide_key = random.split(rng_key)
        sites = trace_of(guide, guide_key, param_map, *args, **kwargs)
        known = [site for site in sites.values() if given_values(site) is not None]
        if not known:
            raise ValueError(
                "LabelTerm: expected a guide with a site whose values the data tell in part, got "
                "none; draw the label by models.labels.partly_observed in the model"
            )
        term = sum(_log_q_of_labels(site) for site in known)
        return _with_gradient_of(loss, loss - self.label_weight * term), state


def _log_q_of_labels(site: Site) -> Array:
    """The sum over labelled data of log q(y | x, c), before q is told."""
    given, fn = given_values(site), site["infer"]["untold"]
    is_known = given != UNKNOWN
    log_q = base(fn).log_prob(jnp.where(is_known, given, 0))
    scale = 1.0 if site["scale"] is None else site["scale"]
    return scale * jnp.where(is_known, log_q, 0.0).sum()


# --- draws from the prior ------------------------------------------------------------------------


class Hybrid(Derived):
    """The ELBO, mixed with one that has the prior for its guide.

        alpha * E_q [ log p(x, z | c) - log q(z | x, c) ]  +  (1 - alpha) * E_p [ log p(x | z, c) ]

    In the second term z is drawn from p(z | c) (Sohn, Lee & Yan 2015, section 4; they write x -> y
    for our c -> x). The paper's Gaussian stochastic network is trained on the second term alone. It
    trains the model the way it is used if x is unknown. Both terms are lower bounds of
    log p(x | c), and so is the mixture.

    Args:
        alpha: the share of the ELBO, 0 to 1.
        objective: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``StickingTheLanding`` or a subclass.
            None is ``Trace_ELBO()``.

    Raises:
        ValueError: the share is out of range.
        TypeError: the objective has no divergence that can be weighed, or has weighed it.
    """

    def __init__(self, alpha: float, objective: ELBO | None = None):
        objective = Trace_ELBO() if objective is None else objective
        _check_divergence(objective, weighed=False)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a share from 0 to 1, got {alpha}")
        super().__init__(objective)
        self.alpha = alpha

    @property
    def traits(self) -> Traits:
        """What ``inference.objectives.traits`` answers."""
        return replace(traits(self.objective), weighed_divergence=True)

    def derive(self, evaluate, rng_key, param_map, model, guide, args, kwargs):
        """The loss, and the programs' mutable state after the guide's draws.

        Both parts have the same key. At alpha 1 and 0 the loss is one part, to the bit.
        """
        prior = block(model, hide_fn=is_observed)
        if self.alpha in (0, 1):
            return evaluate(model, guide if self.alpha else prior)
        (by_prior, _), (by_guide, state) = evaluate(model, prior), evaluate(model, guide)
        return self.alpha * by_guide + (1 - self.alpha) * by_prior, state


# --- by name --------------------------------------------------------------------------------------

# From the number of particles to an objective. RenyiELBO of order 0 is the importance-weighted
# bound of Burda et al. 2016.
OBJECTIVES: dict[str, Callable[[int], ELBO]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceEnum_ELBO": TraceEnum_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "RenyiELBO": ImportanceWeighted,
    "importance-weighted": ImportanceWeighted,
    "doubly-reparameterized": DoublyReparameterized,
    "sticking-the-landing": StickingTheLanding,
    "reweighted-wake-sleep": ReweightedWakeSleep,
}
