"""Figures of the experiments on images. Every function returns a Matplotlib figure.

Pictures are means of p(x | z, c) on the scale of grey, from the first seed of a fit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import random

from experiments.experiment import Figure
from inference import Fit, Prepared, decode, encode, interpolate, sample_prior_predictive, traverse
from inference._streams import piece_of
from inference.sites import length

Latents = Mapping[str, Any]  # by site, (seed, datum, ...)
Z_UNITS = "prior standard deviations"


def to_grey(model: Any, x: Any) -> np.ndarray:
    """x, or a mean of x, on [0, 1]."""
    low, high = model.likelihood.low, model.likelihood.high
    return np.clip((np.asarray(x) - low) / (high - low), 0, 1)


def grid(
    rows: Any,
    title: str,
    *,
    x_label: str,
    y_label: str,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Figure:
    """Images in rows and columns.

    Args:
        rows: (rows, columns, H, W) or (rows, columns, H, W, channels), on [0, 1].
        title: the words above the picture.
        x_label, y_label: what the columns and the rows are, with their units.
        row_labels, column_labels: the words beside the rows and below the columns.
    """
    from matplotlib.figure import Figure

    images = np.asarray(rows)
    num_rows, num_columns, height, width = images.shape[:4]
    images = images.reshape(*images.shape[:4], -1)
    if images.shape[-1] not in (1, 3):
        images = images[..., :1]  # neither grey nor colour: the first channel
    gap = max(1, height // 14)
    frame = ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0))
    tiles = np.pad(images, frame, constant_values=1.0).swapaxes(1, 2)
    canvas = tiles.reshape(num_rows * (height + gap), num_columns * (width + gap), -1)

    size = 0.45 if max(num_rows, num_columns) > 12 else 0.6
    figure = Figure(figsize=(1.6 + size * num_columns, 1.0 + size * num_rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas[:-gap, :-gap], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(
        xticks=[j * (width + gap) + width / 2 for j in range(len(column_labels))],
        xticklabels=column_labels,
        yticks=[i * (height + gap) + height / 2 for i in range(len(row_labels))],
        yticklabels=row_labels,
        xlabel=x_label,
        ylabel=y_label,
    )
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.tick_params(length=0, labelsize="small")
    axes.spines[:].set_visible(False)
    return figure


def elbo_traces(result: Fit, words: str, test: float | None = None, datum: str = "image") -> Figure:
    """ELBO traces: the running mean of each step's batch, and held-out data.

    Args:
        result: the fit.
        words: the experiment and the data, for the title.
        test: the ELBO of the test set, drawn as a line.
        datum: what one datum is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, result.elbo.shape[1] + 1)
    window = max(1, len(steps) // 200)
    shown = [] if test is None else [test]
    for i, (seed, trace) in enumerate(zip(result.seeds, result.elbo, strict=True)):
        count = result.info["num_steps"][i] // window * window
        means = np.nanmean(trace[:count].reshape(-1, window), 1)
        at = steps[:count].reshape(-1, window).mean(1)
        label = f"training, seed {seed} (mean of {window} steps)"
        axes.plot(at, means, color=f"C{i}", lw=1, label=label)
        shown += means[len(means) // 20 :].tolist()
        if result.validation_elbo is not None:
            at = result.info["validation_steps"]
            style = {"ls": "--", "lw": 1.5, "marker": "." if len(at) < 30 else None}
            label = f"held out, seed {seed}"
            axes.plot(at, result.validation_elbo[i], color=f"C{i}", label=label, **style)
    if test is not None:
        axes.axhline(test, color="black", ls=":", lw=1.2, label="test set, after training")
    low, high = min(shown), max(shown)
    axes.set(
        xlabel="training (steps)",
        ylabel=f"ELBO (nats per {datum})",
        ylim=(low, high + 0.05 * (high - low) + 0.5),
        title=f"{words}: ELBO",
    )
    axes.legend(loc="lower right", fontsize="small")
    return figure


def reconstructions(
    result: Fit, test: Mapping[str, Any], words: str, latents: Latents | None = None
) -> Figure:
    """Test images, and below each the mean of p(x | z, c) at the mean of q(z | x, c).

    Args:
        result: the fit.
        test: held-out data, prepared.
        words: as in ``elbo_traces``.
        latents: the guide's means for these data. ``encode`` gives them by default.
    """
    one, first = result.isel(seed=0), _first(test)
    z = encode(one, first) if latents is None else {n: a[:1, :12] for n, a in latents.items()}
    means = _means(one, z, first.get("c"))
    return grid(
        to_grey(one.model, np.stack([first["x"], means])),
        f"{words}: test images and their reconstructions",
        x_label="test images",
        y_label="image",
        row_labels=("original", "reconstruction"),
    )


def samples(result: Fit, words: str, c: Any = None) -> Figure:
    """Images whose latents come from the prior: 10 rows of 10, or one row for each condition.

    Args:
        result: the fit.
        words: as in ``elbo_traces``.
        c: conditions, (M, ...), or None for a model without.
    """
    one = result.isel(seed=0)
    means = from_prior(one, 100 if c is None else 10, c)
    return grid(
        to_grey(one.model, means.reshape(-1, 10, *means.shape[1:])),
        f"{words}: means of p(x | z{'' if c is None else ', c'}), z from the prior",
        x_label="draws of z",
        y_label="draws of z" if c is None else "label c",
        row_labels=() if c is None else [str(label) for label in np.asarray(c)],
    )


def from_prior(one: Fit, count: int, c: Any = None) -> np.ndarray:
    """Means of x at latents from the prior, (count, ...), or (conditions * count, ...).

    Args:
        one: a fit of one seed.
        count: how many, for each condition if there are any.
        c: conditions, (M, ...), or None for a model without.
    """
    given = {} if c is None else {"c": np.asarray(c)}
    drawn = sample_prior_predictive(one, count, key=random.key(0), **given)
    latents = {
        name: draws[0].swapaxes(0, 1).reshape(1, -1, *draws.shape[3:])
        for name, draws in drawn.items()
        if name != "x"
    }
    return _means(one, latents, None if c is None else np.repeat(c, count, axis=0))


def plane(result: Fit, words: str, c: Any = None) -> Figure:
    """Images over the plane of a two-dimensional z.

    Args:
        result: the fit.
        words: as in ``elbo_traces``.
        c: one condition, or None for a model without.
    """
    one, values = result.isel(seed=0), np.linspace(-2.5, 2.5, 15).astype(np.float32)
    z = np.stack(np.meshgrid(values, -values), -1).reshape(1, -1, 2)
    images = _means(one, {"z": z}, None if c is None else np.repeat(c, 225))
    ticks = [f"{v:.1f}" for v in values]
    return grid(
        to_grey(one.model, images).reshape(15, 15, *images.shape[1:]),
        f"{words}: means of p(x | z) over the plane of z" + _given(c),
        row_labels=ticks[::-1],
        column_labels=ticks,
        x_label=f"$z_1$ ({Z_UNITS})",
        y_label=f"$z_2$ ({Z_UNITS})",
    )


def traversals(result: Fit, words: str, holds: Any, measure: str, c: Any = None) -> Figure:
    """Images along the dimensions of z that hold most, one dimension a row.

    Args:
        result: the fit.
        words: as in ``elbo_traces``.
        holds: how much each dimension holds, (dimensions,).
        measure: what ``holds`` is, with its units.
        c: one condition, or None for a model without.
    """
    one, values = result.isel(seed=0), np.linspace(-3, 3, 11).astype(np.float32)
    dims, origin = np.argsort(holds)[::-1][:8], {"z": np.zeros((1, len(holds)), np.float32)}
    given = None if c is None else np.repeat(c, len(values))
    rows = [_means(one, traverse(origin, "z", int(dim), values), given) for dim in dims]
    return grid(
        to_grey(one.model, np.stack(rows)),
        f"{words}: means of p(x | z), one dimension of z varied from z = 0" + _given(c),
        row_labels=[f"{dim}: {holds[dim]:.2f}" for dim in dims],
        column_labels=[f"{v:g}" for v in values],
        x_label=f"value of that dimension ({Z_UNITS})",
        y_label=f"dimension: {measure}",
    )


def interpolations(
    result: Fit, test: Mapping[str, Any], words: str, latents: Latents | None = None
) -> Figure:
    """Straight lines in z between the latents of two test images (of one condition).

    Args:
        result, test, words, latents: as in ``reconstructions``.
    """
    test = test if "c" in test else _first(test)
    one, x, c = result.isel(seed=0), np.asarray(test["x"]), test.get("c")
    z = encode(one, Prepared(test)) if latents is None else latents
    pairs = np.arange(len(x))[:12].reshape(-1, 2) if c is None else []
    if c is not None:
        pairs = [np.flatnonzero(c == label)[:2] for label in np.unique(c)[:10]]
    rows = []
    for pair in (pair for pair in pairs if len(pair) == 2):
        start, end = ({name: a[:1, j] for name, a in z.items()} for j in pair)
        given = None if c is None else np.repeat(np.asarray(c)[pair[0]], 9, axis=0)
        between = _means(one, interpolate(start, end, 9), given)
        rows.append(np.concatenate([x[pair[:1]], between, x[pair[1:]]]))
    return grid(
        to_grey(one.model, np.stack(rows)),
        f"{words}: two test images and the straight line between their latents",
        column_labels=("image", *(f"{w:.2g}" for w in np.linspace(0, 1, 9)), "image"),
        x_label="share of the second latent",
        y_label="pairs of test images" if c is None else "pairs of test images of one label",
    )


def _first(test: Mapping[str, Any]) -> Prepared:
    """The first twelve data. Of a stream only they are read."""
    return Prepared(piece_of(test, 0, min(12, length(test))))


def _means(result: Fit, latents: Latents, c: Any) -> np.ndarray:
    """The means of x of a fit of one seed, (datum, ...)."""
    return decode(result, latents, **({} if c is None else {"c": c}))["x"][0]


def _given(c: Any) -> str:
    return "" if c is None else f", c = {np.asarray(c)}"
