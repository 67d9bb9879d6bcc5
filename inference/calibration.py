"""Simulation-based calibration: are draws of the guide like the latents behind the data?

Talts et al. 2018: draw z ~ p(z | c) and x ~ p(x | z, c) from the fitted model. If the guide is the
posterior, z is one more draw from it. So the rank of z among L draws of q(z | x, c) is uniform on
0 .. L. The guide of an amortised model needs no new fit for each simulation.

The ranks tell what is wrong with the guide (Talts et al. 2018, section 4.2). Many at both ends: it
is too narrow. Few at both ends: too wide. More at one end: its mean is off.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jaxtyping import Array, Float, Int, PyTree
from scipy.special import ndtr

from inference._data import Prepared
from inference._judges import compiled, default_key, judged_data, over_data
from inference._scaling import sum_by_name
from inference._settings import require_whole
from inference._simulate import Simulated, check_local, simulate
from inference.datatree import DATUM, SAMPLES, clean
from inference.evaluation import given_latents
from inference.fit import Fit, site_dims
from inference.generation import latents_of
from inference.sites import DataPlates, Program, length, trace_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import Dataset, DataTree
else:  # a second to import
    Dataset = DataTree = Figure = Any

TEST = "log_likelihood"  # the test quantity, log p(x | z, c)
LEVELS = (0.5, 0.8, 0.9, 0.95)  # of central intervals
METHOD = "pot_c"  # ArviZ's name of the test, which plot_ecdf_pit uses too
POWER_REPEATS, BAND_REPEATS = 400, 1000
REMEDY = "it needs a new fit for every simulation: simulate, fit and rank in a loop"


def sbc(
    result: Fit,
    num_simulations: int = 1000,
    *,
    num_samples: int = 255,
    key: Array | None = None,
    batch_size: int = 500,
    progress: bool = False,
    **conditions: Any,
) -> DataTree:
    """Simulation-based calibration of a fit's guide, for the fit's own model.

    The quantities are every dimension of every latent site, and log p(x | z, c). The last one sees
    faults that no single dimension shows (Modrak et al. 2023). Each is ranked among
    ``num_samples`` draws of q(z | x, c). Ties are broken at random.

    ==============  ============================================================================
    group           variables, by site and with ``log_likelihood``
    ==============  ============================================================================
    prior_sbc       (rank + U) / (num_samples + 1) with U uniform on [0, 1]: exactly uniform if the
                    guide is the posterior. (chain, draw, ...), where a draw is a simulation
    ranks           the ranks, 0 .. num_samples, likewise
    coverage        the share of simulations whose central interval of the guide holds z,
                    (chain, prob, ...). With N simulations its standard error is
                    sqrt(prob (1 - prob) / N)
    uniformity      the p-value of each quantity, (chain, ...)
    joint           ``p_value`` of all quantities together, (chain): the least one times the number
                    of quantities, at most 1 (Bonferroni)
    ==============  ============================================================================

    ``arviz.plot_ecdf_pit(tree)`` draws the graphical test: the difference of each quantity's
    distribution function from the uniform one. ``method="envelope"`` adds simultaneous bands
    (Sailynoja, Buerkner & Vehtari 2022). The p-value is that of ArviZ's default, the pointwise
    order-statistic test ``pot_c``. ``sbc_power`` says what a number of simulations can see.

    Args:
        result: what ``fit`` returned. Each seed simulates its own data.
        num_simulations: how many pairs (z, x).
        num_samples: L, draws of the guide for each.
        key: a random key. A fixed one by default.
        batch_size: simulations at a time.
        progress: whether to show progress.
        conditions: arrays of shape (M, ...) by name, as the programs take them. Simulations draw
            rows of them with replacement.

    Raises:
        ValueError: a model that needs conditions and gets none; global sites, whose calibration
            needs a new fit for each simulation; sites that the objective sums over; observed sites
            that the model computes from its arrays; a guide with numbers for each datum.
    """
    check_local("sbc", result, REMEDY)
    require_whole("num_samples", num_samples, 1)
    keys = random.split(default_key(key, "sbc"), 3)
    ranks, pit = [], []
    for i in range(result.num_seeds):
        one = result.isel(seed=i)
        of_seed = [random.fold_in(k, i) for k in keys]
        simulated = simulate("sbc", one, num_simulations, of_seed[0], conditions)
        found = _ranks(one, simulated, num_samples, of_seed[1], batch_size, progress)
        ranks.append(found[0])
        pit.append(found[1])
    ranks, pit = (jax.tree.map(lambda *x: np.stack(x), *parts) for parts in (ranks, pit))
    return _tree(result, ranks, pit, num_samples)


def sbc_power(
    num_simulations: int, scale: float = 0.9, num_quantities: int = 1, level: float = 0.05
) -> float:
    """The probability that ``sbc`` finds a Gaussian guide whose deviation is wrong by a factor.

    One quantity is wrong and ``num_quantities - 1`` are right. "Finds" means a joint p-value below
    the level. It is computed from 400 repetitions of the test, with a fixed seed. So its standard
    error is at most 0.025.

    Args:
        num_simulations: simulations of ``sbc``.
        scale: the guide's standard deviation divided by the posterior's. 0.9 is 10 % too narrow.
        num_quantities: dimensions of all latent sites, and one for log p(x | z, c).
        level: of the joint test.
    """
    rng = np.random.default_rng(0)
    z = rng.standard_normal((POWER_REPEATS, num_simulations))
    return float(np.mean(_p_value(ndtr(z / scale)) < level / num_quantities))


def rank_scale(pit: Any) -> Float[np.ndarray, "..."]:
    """The guide's deviation over the posterior's, as far as ranks tell, along the last axis.

    With u = Phi(e) and e ~ Normal(bias, 1 / scale^2), the median of |e - median of e| gives the
    scale. 1 is right, below 1 is too narrow.
    """
    from scipy.special import ndtri

    e = ndtri(np.clip(np.asarray(pit, np.float64), 1e-6, 1 - 1e-6))
    away = np.median(np.abs(e - np.median(e, axis=-1, keepdims=True)), axis=-1)
    return ndtri(0.75) / np.maximum(away, 1e-6)


def plot_calibration(tree: DataTree, *, seed: int | None = None) -> Figure:
    """The graphical test: a panel for each site, a line for each of its dimensions.

    A line is the distribution function of the ranks less that of the uniform distribution. 95 % of
    lines of a right guide stay within the band from end to end (Sailynoja et al. 2022).

    Args:
        tree: what ``sbc`` returned.
        seed: the random seed to draw. The first one by default.
    """
    from arviz_stats.ecdf_utils import ecdf_pit
    from matplotlib.figure import Figure

    pit = tree["prior_sbc"].to_dataset()
    pit = pit.isel(chain=0) if seed is None else pit.sel(chain=seed)
    names = list(pit.data_vars)
    size = pit.sizes["draw"]
    figure = Figure(figsize=(1.2 + 3.2 * min(len(names), 4), 0.8 + 2.6 * -(-len(names) // 4)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(-(-len(names) // 4), min(len(names), 4), squeeze=False, sharey=True)
    x, _, low, high = ecdf_pit(np.linspace(0, 1, size), 0.95, BAND_REPEATS)
    for axes, name in zip(panels.flat, names, strict=False):
        lines = pit[name].transpose("draw", ...).values.reshape(size, -1)
        ecdf = np.stack([np.searchsorted(np.sort(u), x, side="right") for u in lines.T]) / size
        axes.plot(x, (ecdf - x).T, color="C0", lw=0.8, alpha=0.8, label="ranks")
        axes.fill_between(x, low - x, high - x, color="0.8", label="95 % band")
        axes.set(title=name, xlabel="rank / number of draws")
    for axes in panels.flat[len(names) :]:
        axes.remove()
    panels[0, 0].set_ylabel("ECDF - uniform")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=2)
    return figure


# --- one seed -------------------------------------------------------------------------------------


def _ranks(
    one: Fit, simulated: Simulated, num_samples: int, key: Array, batch_size: int, progress: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ranks and their place on [0, 1], by quantity, (simulation, ...)."""
    judged = judged_data(one, Prepared(simulated.data))
    programs = judged.programs
    latents = {name: simulated.latents[name] for name in programs.latents}
    axes = tuple((name, site.data_axis) for name, site in programs.latents.items())
    judge = compiled(_counts, one.model, one.guide, programs.plates, axes, num_samples)

    def rows(_: int, index: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[index] for name, values in latents.items()}

    judge_key, tie_key = random.split(key)
    below, equal = over_data(
        judge, one, judged, judge_key, batch_size, progress, "rank", extra=rows
    )
    ranks, pit = {}, {}
    for i, name in enumerate(below):
        u = np.asarray(random.uniform(random.fold_in(tie_key, i), (2, *below[name][0].shape)))
        ranks[name] = below[name][0] + np.floor(u[0] * (equal[name][0] + 1)).astype(np.int32)
        place = (ranks[name] + u[1].astype(np.float64)) / (num_samples + 1)
        pit[name] = np.clip(place, 0.0, 1.0)
    return ranks, pit


def _counts(
    model: Program,
    guide: Program,
    plates: DataPlates,
    axes: tuple[tuple[str, int | None], ...],
    num_samples: int,
    params: PyTree,
    key: Array,
    batch: Mapping[str, Array],
    drawn: Mapping[str, Array],
) -> tuple[dict[str, Int[Array, " N ..."]], dict[str, Int[Array, " N ..."]]]:
    """By quantity, how many of the guide's draws lie below that of the model, and how many tie."""

    def quantities(latents: Mapping[str, Array]) -> dict[str, Array]:
        of_sites = given_latents(model, plates, axes, params, key, batch, latents)
        total = jnp.zeros(length(batch)) + sum_by_name(of_sites)
        return {**latents, TEST: total}

    def add(i: Array, counts: Any) -> Any:
        sites = trace_of(guide, random.fold_in(key, i), params, **batch)
        below, equal = counts
        found = quantities(latents_of(sites, plates))
        below = {name: below[name] + (found[name] < true[name]) for name in below}
        return below, {name: equal[name] + (found[name] == true[name]) for name in below}

    true = quantities(drawn)
    zeros = {name: jnp.zeros(jnp.shape(values), jnp.int32) for name, values in true.items()}
    return lax.fori_loop(0, num_samples, add, (zeros, zeros))


# --- the tree -------------------------------------------------------------------------------------


def _p_value(pit: Float[np.ndarray, "... simulation"]) -> Float[np.ndarray, "..."]:
    from arviz_stats.base.array import array_stats  # two seconds: SciPy, pandas, xarray

    return np.asarray(array_stats.uniformity_test(pit, method=METHOD)[0])


def _tree(
    result: Fit, ranks: dict[str, np.ndarray], pit: dict[str, np.ndarray], num_samples: int
) -> DataTree:
    """The groups, from arrays (seed, simulation, ...) by quantity."""
    from xarray import Dataset, DataTree

    axes = site_dims(result)
    dims = {
        name: [d for d in axes.get(name, ()) if d != DATUM]
        for name in (*sorted(pit.keys() - {TEST}), TEST)
    }
    coords = {"chain": result.seeds}

    def dataset(values: Mapping[str, np.ndarray], *samples: str, **labels: Any) -> Dataset:
        named = {clean(n): ((*samples, *map(clean, dims[n])), values[n]) for n in dims}
        sizes = dict(pair for axes, v in named.values() for pair in zip(axes, v.shape, strict=True))
        numbered = {axis: np.arange(size) for axis, size in sizes.items()}
        return Dataset(named, numbered | coords | labels)

    p_values = {name: _p_value(np.moveaxis(u, 1, -1)) for name, u in pit.items()}
    sizes = [p.reshape(result.num_seeds, -1) for p in p_values.values()]
    every = np.concatenate(sizes, axis=1)
    joint = np.minimum(1, every.min(1) * every.shape[1])
    tail = (1 - np.asarray(LEVELS)) / 2
    held = {
        name: np.stack([(abs(u - 0.5) <= 0.5 - t).mean(1) for t in tail], axis=1)
        for name, u in pit.items()
    }
    tree = DataTree.from_dict(
        {
            "prior_sbc": dataset(pit, *SAMPLES),
            "ranks": dataset(ranks, *SAMPLES),
            "coverage": dataset(held, "chain", "prob", prob=list(LEVELS)),
            "uniformity": dataset(p_values, "chain"),
            "joint": Dataset({"p_value": (("chain",), joint)}, coords),
        }
    )
    num_simulations = next(iter(pit.values())).shape[1]
    power = sbc_power(num_simulations, 0.9, every.shape[1])
    tree.attrs = {
        "num_simulations": num_simulations,
        "num_samples": num_samples,
        "test": METHOD,
        "correction": f"Bonferroni over {every.shape[1]} quantities",
        "power": f"{power:.2f} to find one quantity whose scale is 10 % too small, at level 0.05",
    }
    return tree
