"""Brackets of log p(x | c): annealed importance sampling, from below and from above.

A chain walks from a start f_0(z), the prior p(z | c) or the guide q(z | x, c), to f_1(z) =
p(x, z | c) over the temperatures 0 = t_0 < ... < t_T = 1 of the path

    log f_t(z)  =  (1 - t) log f_0(z) + t log p(x, z | c).

Each move is one step of Hamiltonian Monte Carlo. It leaves f_t as it is. The weight of the walk,

    log w  =  sum_i (t_i - t_{i-1}) (log p(x, z_{i-1} | c) - log f_0(z_{i-1})),

has E[w] = p(x | c) whatever the moves (Neal 2001). So E[log w] is below log p(x | c). If z is an
exact draw of the posterior, as the z is from which a model simulated x, the walk back has
E[1 / w] = 1 / p(x | c). So its E[log w] is above log p(x | c) (Grosse, Ghahramani & Adams 2015; for
decoders Wu et al. 2017). The two close in on log p(x | c) as T grows.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute
from numpyro.infer.util import compute_log_probs
from numpyro.primitives import Messenger
from scipy.special import expit
from tabulate import tabulate

from inference._data import Prepared
from inference._judges import Judged, compiled, default_key, judged_data, over_data, values_of
from inference._scaling import sum_by_name
from inference._settings import require_whole
from inference._simulate import NotSimulated, check_local, conditions_among, simulate
from inference._streams import rows
from inference.evaluation import Estimate, difference, joined, log_likelihood
from inference.fit import Fit, programs_of
from inference.sites import (
    Program,
    abstract_sites,
    is_auxiliary,
    is_latent,
    is_scanned,
    length,
    spread_rows,
    trace_of,
)

STARTS = ("prior", "guide")
STEEPNESS = 4.0  # of the temperatures, which lie densest at both ends (Wu et al. 2017, appendix)
ACCEPTANCE = 0.65  # of a move, which the step sizes are adapted to (Wu et al. 2017)
PILOT_DATA, PILOT_CHAINS = 20, 2  # simulated, that the step sizes are adapted on
GAIN = 0.3  # of the adaptation
WARM_UP = 50  # moves at the start, to find its step size
IMPORTANCE_SAMPLES = 5000


@dataclass(frozen=True, repr=False)
class Bracket:
    """log p(x | c) of every datum from below, and on simulated data from above.

    ``print`` shows a table of the means, the importance-sampled one among them.

    Attributes:
        lower: the log of the mean weight of the chains. Its expectation is below log p(x | c).
        upper: likewise from above. None on real data: nobody knows their latents.
        importance: ``log_likelihood`` on the same data, another bound from below, or None.
        acceptance: (seed, N), the mean share of accepted moves. Where it is far below 0.65 the
            bound is loose.
        num_steps, num_chains: temperatures, and chains for each datum.
        simulated: the simulated data of each seed, or None.
    """

    lower: Estimate
    upper: Estimate | None
    importance: Estimate | None
    acceptance: Float[np.ndarray, "seed N"]
    num_steps: int
    num_chains: int
    simulated: tuple[Prepared, ...] | None = None

    @property
    def gap(self) -> Estimate | None:
        """upper - lower of every datum: at most so far is either from log p(x | c), on average."""
        if self.upper is None:
            return None
        return difference("bracket", self.upper, self.lower)

    def __repr__(self) -> str:
        """A table with a row for each number and seed."""
        rows = []
        names = {
            "annealing, from below": self.lower,
            "annealing, from above": self.upper,
            "importance sampling, from below": self.importance,
        }
        for name, known in names.items():
            if known is None:
                continue
            for i, (mean, error, draws) in enumerate(
                zip(known.estimate, known.standard_error, known.monte_carlo_error, strict=True)
            ):
                rows.append((name, i, f"{mean:.4f}", f"{error:.4f}", f"{draws:.4f}"))
        headers = ("log p(x | c), nats per datum", "seed", "mean", "error of the mean", "of draws")
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left",) + ("right",) * 4)
        words = (
            f"{table}\nError of the mean: over data and draws. Of draws: how much it would move on "
            f"these data. {self.num_steps} temperatures, {self.num_chains} chains."
        )
        high = None if self.importance is None else self.importance.high_pareto_k
        if high is None or not high.pointwise.any():
            return words
        return (
            f"{words}\nk-hat is too high for {high.pointwise.mean():.0%} of the data: there the "
            f"error of importance sampling is larger than this table says."
        )


def bracket(
    result: Fit,
    data: Any = None,
    *,
    num_simulations: int | None = None,
    num_steps: int = 1000,
    num_chains: int = 10,
    num_leaps: int = 10,
    start: str = "prior",
    num_samples: int = IMPORTANCE_SAMPLES,
    key: Array | None = None,
    batch_size: int = 20,
    progress: bool = False,
    **conditions: Any,
) -> Bracket:
    """Bounds of log p(x | c) by annealed importance sampling (Neal 2001).

    On data, a bound from below, which needs no guide: with ``start="prior"`` a poor guide does not
    spoil it. On data that the model simulates, a bound from above too (Grosse et al. 2015). The
    bounds hold in expectation, and close in as ``num_steps`` grows.

    The moves are BlackJAX's Hamiltonian Monte Carlo on the unconstrained latents. Their step
    sizes, one a temperature, are adapted beforehand on other data: the fitted model simulates
    them. Where it cannot, they are adapted on some of the data, with other random numbers.

    Args:
        result: what ``fit`` returned.
        data: as the programs take them, or ``result.prepare(data)``. None to simulate.
        num_simulations: how many data to simulate.
        num_steps: T, the temperatures after the first.
        num_chains: chains for each datum.
        num_leaps: leapfrog steps of a move.
        start: "prior", or "guide": closer to the posterior where the guide is good.
        num_samples: draws of the importance sampling that is given beside. 0 for none.
        key: a random key. A fixed one by default.
        batch_size: data at a time.
        progress: whether to show progress.
        conditions: for ``num_simulations``, arrays of shape (M, ...) by name, as the programs take
            them. Simulations draw rows of them with replacement.

    Returns:
        Nats per datum, (seed, N).

    Raises:
        ValueError: both or neither of data and ``num_simulations``; a model that needs conditions
            and gets none; global sites; sites that are discrete or that the objective sums over.
            With ``num_simulations``: observed sites that the model computes from its arrays.
    """
    _check(result, data, num_simulations, start, conditions)
    counts = {"num_steps": num_steps, "num_chains": num_chains, "num_leaps": num_leaps}
    for name, value in counts.items():
        require_whole(name, value, 1)
    require_whole("num_samples", num_samples, 0)
    walk, key = Walk(**counts, start=start), default_key(key, "bracket")
    of_seeds = []
    for i in range(result.num_seeds):
        one, keys = result.isel(seed=i), random.split(random.fold_in(key, i), 4)
        made = None
        if num_simulations is not None:
            made = simulate("bracket", one, num_simulations, keys[0], conditions)
        given = data if made is None else made.data
        judged = judged_data(one, given)
        steps = _step_sizes(walk, one, judged, keys[1])
        over = functools.partial(over_data, batch_size=batch_size, show=progress, field="log p")
        lower, acceptance = _from_below(walk, one, judged, steps, keys[2], over)
        upper = made and _from_above(walk, one, judged, made.latents, steps, keys[3], over)
        beside = log_likelihood(one, given, num_samples=num_samples) if num_samples else None
        of_seeds.append((lower, upper, beside, acceptance, made and made.data))
    lower, upper, beside, acceptance, simulated = zip(*of_seeds, strict=True)
    return Bracket(
        joined(lower, axis=0),
        None if upper[0] is None else joined(upper, axis=0),
        joined(beside, axis=0) if num_samples else None,
        np.stack(acceptance),
        num_steps,
        num_chains,
        None if simulated[0] is None else simulated,
    )


def _check(
    result: Fit,
    data: Any,
    num_simulations: int | None,
    start: str,
    conditions: Mapping[str, Any],
) -> None:
    """Raises ValueError for programs and arguments that have no bracket."""
    check_local("bracket", result, "use log_predictive_density")
    if start not in STARTS:
        raise ValueError(f"start: expected one of {', '.join(STARTS)}, got {start!r}")
    if (data is None) == (num_simulations is None):
        raise ValueError(
            f"bracket: expected either data or num_simulations, got "
            f"{'neither' if data is None else 'both'}; write bracket(result, test), or "
            f"bracket(result, num_simulations=100)"
        )
    if data is not None and conditions:
        raise ValueError(
            f"bracket: expected conditions among the data, got {next(iter(conditions))!r} by "
            f"keyword; keywords are for num_simulations"
        )
    _check_sites(result, start)


def _check_sites(result: Fit, start: str) -> None:
    """Raises ValueError for sites that Hamiltonian Monte Carlo cannot move, or without density."""
    sites = abstract_sites(result.model, 0, result.batch)
    for name in programs_of(result, result.batch).latents:
        site = sites[name]
        if site["fn"].support.is_discrete or is_scanned(site):
            what = "discrete" if site["fn"].support.is_discrete else "inside a scan"
            raise ValueError(
                f"bracket: expected continuous latent sites outside scan, got {name!r}, which is "
                f"{what}; use log_likelihood"
            )
    drawn = abstract_sites(result.guide, 0, result.batch) if start == "guide" else {}
    for name, site in drawn.items():
        if is_latent(site) and is_auxiliary(site):
            raise ValueError(
                f"bracket: expected a guide whose density is known, got the private draw {name!r}; "
                f'take start="prior"'
            )


# --- the walk -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """How chains walk.

    Attributes:
        num_steps, num_chains, num_leaps, start: as in ``bracket``.
    """

    num_steps: int
    num_chains: int
    num_leaps: int
    start: str

    @property
    def temperatures(self) -> Float[np.ndarray, " temperature"]:
        """From 0 to 1, densest at both ends: a sigmoid (Grosse et al. 2015, section 6)."""
        s = expit(np.linspace(-STEEPNESS, STEEPNESS, self.num_steps + 1))
        return (s - s[0]) / (s[-1] - s[0])


class Path(NamedTuple):
    """Temperatures of the moves, and what each adds to the weight: arrays (move,).

    Attributes:
        temperature: of each move.
        increment: the factor of log p - log f_0, before the move.
        log_step: the log of the step size.
    """

    temperature: Any
    increment: Any
    log_step: Any


class Target:
    """The start and the end of the walks, as functions of one datum's unconstrained latents.

    Args:
        model, guide: programs.
        start: "prior" or "guide".
        params: parameters and mutable state of one seed.
        batch: arrays of shape (N, ...).
    """

    def __init__(self, model: Program, guide: Program, start: str, params: Any, batch: Any):
        self.model, self.guide, self.start, self.params = model, guide, start, params
        row = {name: array[0] for name, array in batch.items()}
        latents = jax.eval_shape(
            lambda row: self._unconstrained(*self._drawn(_any_key(), row)), row
        )
        self.unravel = ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), latents))[1]

    def draw(self, key: Array, row: Mapping[str, Array]) -> Float[Array, " size"]:
        """A draw from the start."""
        return ravel_pytree(self._unconstrained(*self._drawn(key, row)))[0]

    def place(
        self, latents: Mapping[str, Array], row: Mapping[str, Array]
    ) -> Float[Array, " size"]:
        """Given latents, where they lie.

        Args:
            latents: by site, in the shape of one datum.
            row: the datum.
        """
        sites = trace_of(self.model, _any_key(), self.params, **alone(row))
        values = {n: jnp.reshape(v, jnp.shape(sites[n]["value"])) for n, v in latents.items()}
        return ravel_pytree(self._unconstrained(values, row))[0]

    def densities(self, u: Array, row: Mapping[str, Array]) -> tuple[Array, Array]:
        """log f_0 and log p(x, z | c), as densities of the unconstrained latents."""
        known = Unconstrained(
            substitute(seed(self.model, _any_key()), data=self.params), self.unravel(u)
        )
        log_p, sites = compute_log_probs(known, (), alone(row), {}, sum_log_prob=True)
        joint = known.log_det + sum_by_name(log_p)
        if self.start == "prior":
            prior = {name: log_p[name] for name in log_p if is_latent(sites[name])}
            return known.log_det + sum_by_name(prior), joint
        latents = {name: sites[name]["value"] for name in known.values}
        guide = substitute(seed(self.guide, _any_key()), data=self.params | latents)
        log_q, _ = compute_log_probs(guide, (), alone(row), {}, sum_log_prob=True)
        return known.log_det + sum_by_name(log_q), joint

    def _drawn(self, key: Array, row: Mapping[str, Array]) -> tuple[dict[str, Array], Any]:
        program = self.model if self.start == "prior" else self.guide
        sites = trace_of(program, key, self.params, **alone(row))
        drawn = {n: s["value"] for n, s in sites.items() if is_latent(s) and not is_auxiliary(s)}
        return drawn, row

    def _unconstrained(self, latents: Mapping[str, Array], row: Any) -> dict[str, Array]:
        sites = trace_of(self.model, _any_key(), self.params | dict(latents), **alone(row))
        return {n: biject_to(sites[n]["fn"].support).inv(v) for n, v in latents.items()}


class Unconstrained(Messenger):
    """A program with its latent sites given by unconstrained values.

    Attributes:
        values: unconstrained, by site.
        log_det: of the map to the sites' values, in the last run.
    """

    def __init__(self, fn: Program, values: Mapping[str, Array]):
        super().__init__(fn)
        self.values, self.log_det = values, jnp.zeros(())

    def process_message(self, msg: Any) -> None:
        """Gives a site its value. NumPyro calls it."""
        if msg["type"] == "sample" and msg["name"] in self.values:
            u, transform = self.values[msg["name"]], biject_to(msg["fn"].support)
            msg["value"] = transform(u)
            self.log_det += jnp.sum(transform.log_abs_det_jacobian(u, msg["value"]))


def _any_key() -> Array:
    """A key for draws that do not matter. At import no key may be made: it would start JAX."""
    return random.key(0)


def alone(row: Mapping[str, Array]) -> dict[str, Array]:
    """One datum as a batch."""
    return {name: array[None] for name, array in row.items()}


def moves(
    target: Target,
    num_leaps: int,
    u: Float[Array, "chain N size"],
    path: Path,
    key: Array,
    batch: Mapping[str, Array],
    gain: float = 0.0,
) -> tuple[Float[Array, "chain N"], Float[Array, "chain N"], Float[Array, " move"]]:
    """Walks along a path.

    Args:
        target: the start and the end.
        num_leaps: leapfrog steps of a move.
        u: where the chains start.
        path: the temperatures.
        key: a random key.
        batch: the data.
        gain: how fast step sizes are adapted. 0 takes those of the path.

    Returns:
        The log weights, the mean acceptance of the moves, and the log step sizes.
    """
    from blackjax.mcmc import hmc  # its import starts JAX, before processes can find each other

    kernel = hmc.build_kernel()

    def move_one(key: Array, u: Array, row: Any, t: Array, step: Array) -> tuple[Array, ...]:
        def log_f(u: Array) -> tuple[Array, Array]:
            start, joint = target.densities(u, row)
            difference = joint - start
            return start + jnp.where(t > 0, t * difference, 0.0), difference

        (value, difference), gradient = jax.value_and_grad(log_f, has_aux=True)(u)
        state = hmc.HMCState(u, value, gradient)
        mass = jnp.ones_like(u)
        state, info = kernel(key, state, lambda u: log_f(u)[0], step, mass, num_leaps)
        return state.position, difference, info.acceptance_rate

    of_data = jax.vmap(move_one, (0, 0, 0, None, None))
    of_chains = jax.vmap(of_data, (0, 0, None, None, None))

    def move(carry: Any, at: tuple[Array, Path]) -> tuple[Any, Array]:
        u, log_w, accepted, log_step = carry
        i, (t, increment, given) = at
        log_step = log_step if gain else given
        keys = random.split(random.fold_in(key, i), u.shape[:2])
        u, difference, acceptance = of_chains(keys, u, batch, t, jnp.exp(log_step))
        log_w += jnp.where(increment > 0, increment * difference, 0.0)
        adapted = log_step + gain * (acceptance.mean() - ACCEPTANCE)
        return (u, log_w, accepted + acceptance, adapted), log_step

    zeros = jnp.zeros(u.shape[:2])
    steps = jnp.arange(len(path.temperature)), Path(*map(jnp.asarray, path))
    start = u, zeros, zeros, jnp.asarray(path.log_step[0])
    (_, log_w, accepted, _), log_steps = lax.scan(move, start, steps)
    return log_w, accepted / len(path.temperature), log_steps


# --- one seed -------------------------------------------------------------------------------------


def _step_sizes(walk: Walk, one: Fit, judged: Judged, key: Array) -> Float[np.ndarray, " step"]:
    """The log of the step size of each temperature, adapted on data that the model simulates."""
    keys = random.split(key)
    try:
        given = conditions_among(one, judged.arrays)
        batch = simulate("bracket", one, PILOT_DATA, keys[0], given).data
    except NotSimulated:  # the chains' noise is another, so the bounds hold on these data too
        batch = rows(judged.arrays, spread_rows(length(judged.arrays), PILOT_DATA))
    pilot = compiled(_pilot, one.model, one.guide, walk)
    return np.asarray(pilot(values_of(one, 0), keys[1], dict(batch)))


def _from_below(
    walk: Walk, one: Fit, judged: Judged, steps: np.ndarray, key: Array, over: Callable[..., Any]
) -> tuple[Estimate, Float[np.ndarray, " N"]]:
    judge = compiled(_up, one.model, one.guide, walk)
    values, variance, acceptance = over(judge, one, judged, key, extra=lambda *_: steps)
    name, draws = "annealed_log_likelihood", walk.num_chains
    return Estimate(name, values, draws, judged.described, variance), acceptance[0]


def _from_above(
    walk: Walk,
    one: Fit,
    judged: Judged,
    latents: Mapping[str, np.ndarray],
    steps: np.ndarray,
    key: Array,
    over: Callable[..., Any],
) -> Estimate:
    judge = compiled(_down, one.model, one.guide, walk)
    names = judged.programs.latents

    def extra(_: int, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return steps, {name: latents[name][index] for name in names}

    values = over(judge, one, judged, key, extra=extra)
    return Estimate("upper_log_likelihood", values, walk.num_chains, judged.described)


# --- one batch ------------------------------------------------------------------------------------


def _starts(
    target: Target, num_chains: int, key: Array, batch: Any
) -> Float[Array, "chain N size"]:
    keys = random.split(key, (num_chains, length(batch)))
    return jax.vmap(jax.vmap(target.draw, (0, 0)), (0, None))(keys, batch)


def _pilot(
    model: Program, guide: Program, walk: Walk, params: PyTree, key: Array, batch: Any
) -> Float[Array, " step"]:
    target = Target(model, guide, walk.start, params, batch)
    keys = random.split(key)
    t = walk.temperatures
    temperature = np.concatenate([np.zeros(WARM_UP), t[1:]])
    nothing = np.zeros(len(temperature))
    path = Path(temperature, nothing, np.full(len(temperature), np.log(0.1)))
    u = _starts(target, PILOT_CHAINS, keys[0], batch)
    return moves(target, walk.num_leaps, u, path, keys[1], batch, GAIN)[2][WARM_UP:]


def _up(
    model: Program, guide: Program, walk: Walk, params: PyTree, key: Array, batch: Any, steps: Array
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """The bound from below, the variance that comes from the chains, and the acceptance."""
    target = Target(model, guide, walk.start, params, batch)
    keys = random.split(key)
    t = walk.temperatures
    u = _starts(target, walk.num_chains, keys[0], batch)
    path = Path(t[1:], np.diff(t), steps)
    log_w, acceptance, _ = moves(target, walk.num_leaps, u, path, keys[1], batch)
    return *_log_mean(log_w), acceptance.mean(0)


def _down(
    model: Program,
    guide: Program,
    walk: Walk,
    params: PyTree,
    key: Array,
    batch: Any,
    extra: tuple[Array, Mapping[str, Array]],
) -> Float[Array, " N"]:
    """The bound from above: all chains of a datum start at the latents behind it."""
    target = Target(model, guide, walk.start, params, batch)
    steps, latents = extra
    t = walk.temperatures[::-1]
    u = jax.vmap(target.place)(latents, batch)
    u = jnp.broadcast_to(u, (walk.num_chains, *u.shape))
    steps = jnp.concatenate([steps[::-1], steps[:1]])
    path = Path(t, np.concatenate([[0.0], -np.diff(t)]), steps)
    log_w, _, _ = moves(target, walk.num_leaps, u, path, key, batch)
    return -_log_mean(-log_w)[0]


def _log_mean(log_w: Float[Array, "chain N"]) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """The log of the mean weight, and the variance of that log to first order in 1 / chains."""
    greatest = log_w.max(0)
    w = jnp.exp(log_w - greatest)
    mean, count = w.mean(0), len(log_w)
    variance = w.var(0) / (mean**2 * (count - 1)) if count > 1 else jnp.full_like(mean, jnp.nan)
    return greatest + jnp.log(mean), variance
