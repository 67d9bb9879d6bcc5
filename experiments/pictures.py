"""Figures of the experiments on images. Pictures are means of p(x | z, c) on the scale of grey."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from inference import Fit, decode, interpolate, sample, traverse


def of_seed(params: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The parameters of one seed."""
    return jax.tree.map(lambda p: p[i], dict(params))


def draw(
    result: Mapping[str, Any],
    model: Any,
    fitted: Fit,
    z_loc: np.ndarray,
    test: Mapping[str, Any],
    directory: Path,
) -> None:
    """The figures of a run, of its first seed but for the traces.

    Args:
        result: as in ``result.json``.
        model, fitted: what was trained.
        z_loc: (N, dimensions), the guide's means for the test images.
        test: held-out data as the programs take them.
        directory: where the figures go.
    """
    params, dataset = of_seed(fitted.params, 0), result["dataset"]
    labels, last = None, None
    if "c" in test:
        labels = np.arange(model.condition.num_classes, dtype=test["c"].dtype)
        last = labels[-1]
    draw_elbo(fitted, result, directory / "elbo.png")
    draw_reconstructions(model, params, z_loc, test, dataset, directory / "reconstructions.png")
    draw_samples(model, params, dataset, directory / "samples.png", labels)
    draw_latents(model, params, result, directory / "latents.png", last)
    draw_interpolations(model, params, z_loc, test, dataset, directory / "interpolations.png")


def to_grey(model: Any, x: Any) -> np.ndarray:
    """x, or a mean of x, on [0, 1]."""
    low, high = model.likelihood.low, model.likelihood.high
    return np.clip((np.asarray(x) - low) / (high - low), 0, 1)


def grid(
    rows: Any,
    path: Path,
    title: str,
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Images in rows and columns.

    Args:
        rows: (rows, columns, H, W) or (rows, columns, H, W, channels), on [0, 1].
        path: of the PNG.
        title: above the picture.
        row_labels, column_labels: beside the rows and below the columns.
        x_label, y_label: what the columns and the rows are.
    """
    from matplotlib.figure import Figure

    images = np.asarray(rows)
    num_rows, num_columns, height, width = images.shape[:4]
    gap = max(1, height // 14)
    num_channels = images.shape[4] if images.ndim == 5 else 1
    images = images.reshape(*images.shape[:4], num_channels)
    if num_channels not in (1, 3):
        images = images[..., :1]  # neither grey nor colour: the first channel
    height_all, width_all = num_rows * (height + gap) - gap, num_columns * (width + gap) - gap
    canvas = np.ones((height_all, width_all, images.shape[-1]))
    for i in range(num_rows):
        for j in range(num_columns):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = images[i, j]

    size = 0.45 if max(num_rows, num_columns) > 12 else 0.6
    figure = Figure(figsize=(1.6 + size * num_columns, 1.0 + size * num_rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
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
    figure.savefig(path, dpi=120)


def draw_elbo(fitted: Fit, result: Mapping[str, Any], path: Path) -> None:
    """ELBO traces: each step's batch, its running mean, held-out data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, fitted.elbo.shape[1] + 1)
    window = max(1, len(steps) // 200)
    lowest = []
    for i, trace in enumerate(fitted.elbo):
        seed = fitted.config["seed"] + i
        count = fitted.info["num_steps"][i] // window * window
        means = np.nanmean(trace[:count].reshape(-1, window), 1)
        at = steps[:count].reshape(-1, window).mean(1)
        axes.plot(
            at, means, color=f"C{i}", lw=1, label=f"training, seed {seed} (mean of {window} steps)"
        )
        lowest += means[len(means) // 20 :].tolist()
        if fitted.validation_elbo is not None:
            axes.plot(
                fitted.info["validation_steps"],
                fitted.validation_elbo[i],
                color=f"C{i}",
                ls="--",
                marker="." if len(fitted.info["validation_steps"]) < 30 else None,
                lw=1.5,
                label=f"held out, seed {seed}",
            )
    best = result["test"]["elbo"]["estimate"]
    axes.axhline(best, color="black", ls=":", lw=1.2, label="test set, after training")
    if lowest:
        top = max(*lowest, best)
        axes.set_ylim(min(*lowest, best), top + 0.05 * (top - min(lowest)) + 0.5)
    axes.set(
        xlabel="step",
        ylabel="ELBO (nats per image)",
        title=f"{result['experiment']} on {result['dataset']}: ELBO",
    )
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def draw_reconstructions(
    model: Any, params: Any, z_loc: np.ndarray, test: Mapping[str, Any], dataset: str, path: Path
) -> None:
    """Test images, and below each the mean of p(x | z, c) at the mean of q(z | x, c)."""
    x, c = test["x"][:12], test["c"][:12] if "c" in test else None
    means = decode(model, params, z_loc[:12], c)
    grid(
        to_grey(model, np.stack([x, means])),
        path,
        f"{dataset}: test images and their reconstructions",
        row_labels=("original", "reconstruction"),
    )


def draw_samples(model: Any, params: Any, dataset: str, path: Path, c: Any = None) -> None:
    """Images whose latents come from the prior: 10 rows of 10, or one row for each condition."""
    if c is None:
        drawn = sample(model, params, 100, key=random.key(0))
        images = drawn.x_mean.reshape(10, 10, *drawn.x_mean.shape[1:])
        grid(to_grey(model, images), path, f"{dataset}: means of p(x | z), z from the prior")
        return
    drawn = sample(model, params, 10, c, key=random.key(0))
    images = drawn.x_mean.reshape(len(c), 10, *drawn.x_mean.shape[1:])
    grid(
        to_grey(model, images),
        path,
        f"{dataset}: means of p(x | z, c), z from the prior p(z | c)",
        row_labels=[str(label) for label in np.asarray(c)],
        y_label="label c",
    )


def draw_latents(
    model: Any, params: Any, result: Mapping[str, Any], path: Path, c: Any = None
) -> None:
    """The plane of a two-dimensional z, or traversals of the dimensions that hold most."""
    dataset = result["dataset"]
    if model.num_latents == 2:
        values = np.linspace(-2.5, 2.5, 15).astype(np.float32)
        z = np.stack(np.meshgrid(values, -values), -1).reshape(-1, 2)
        c_all = None if c is None else np.repeat(np.asarray(c)[None], len(z), axis=0)
        images = decode(model, params, jnp.asarray(z), c_all)
        ticks = [f"{v:.1f}" for v in values]
        grid(
            to_grey(model, images).reshape(15, 15, *images.shape[1:]),
            path,
            f"{dataset}: means of p(x | z) over the plane of z" + _given(c),
            row_labels=ticks[::-1],
            column_labels=ticks,
            x_label="$z_1$",
            y_label="$z_2$",
        )
        return
    holds, measure = result["activity"]["estimate"], "variance of its mean"
    if result["kl_per_dim"]:
        holds, measure = result["kl_per_dim"]["estimate"], "its KL (nats)"
    dims = np.argsort(holds)[::-1][:8]
    values = np.linspace(-3, 3, 11).astype(np.float32)
    origin = jnp.zeros(model.num_latents)
    rows = [traverse(model, params, origin, int(dim), values, c) for dim in dims]
    grid(
        to_grey(model, np.stack(rows)),
        path,
        f"{dataset}: means of p(x | z), one dimension of z varied from z = 0" + _given(c),
        row_labels=[f"{dim}: {holds[dim]:.2f}" for dim in dims],
        column_labels=[f"{v:g}" for v in values],
        x_label="value of that dimension",
        y_label=f"dimension: {measure}",
    )


def draw_interpolations(
    model: Any, params: Any, z_loc: np.ndarray, test: Mapping[str, Any], dataset: str, path: Path
) -> None:
    """Straight lines in z between the latents of two test images (of one condition)."""
    x, c = np.asarray(test["x"]), np.asarray(test["c"]) if "c" in test else None
    pairs = []
    if c is None:
        pairs = [(2 * i, 2 * i + 1) for i in range(min(6, len(x) // 2))]
    else:
        for label in np.unique(c)[:10]:
            same = np.flatnonzero(c == label)
            pairs += [(same[0], same[1])] if len(same) > 1 else []
    rows = []
    for i, j in pairs:
        condition = None if c is None else c[i]
        between = interpolate(model, params, z_loc[i], z_loc[j], 9, condition)
        rows.append(np.concatenate([x[i : i + 1], between, x[j : j + 1]]))
    if not rows:
        return
    grid(
        to_grey(model, np.stack(rows)),
        path,
        f"{dataset}: two test images and the straight line between their latents",
        column_labels=("image", *(f"{w:.2g}" for w in np.linspace(0, 1, 9)), "image"),
        x_label="share of the second latent",
        y_label="" if c is None else "one label per row",
    )


def _given(c: Any) -> str:
    return "" if c is None else f", c = {np.asarray(c)}"
