"""Learn to classify MNIST digits from a few labels and many images without any.

    python experiments/mnist_semi.py --num-labels 100 1000

The model is M2 of ``models/semi_supervised.py``. Five ways to use the labels are compared:

| row        | what is trained                                                         |
|------------|-------------------------------------------------------------------------|
| classifier | the guide's classifier alone, on the labelled images                    |
| m1         | a variational autoencoder without labels; a linear classifier of its z  |
| plain      | M2, label drawn, score-function gradient (``TraceGraph_ELBO``)          |
| enumerated | M2, with an exact sum over labels (``TraceEnum_ELBO``)                  |
| term       | the same, and the classifier's term of the paper (``LabelTerm``)        |

Which images are labelled is drawn several times. The test images judge and are used for nothing
else. An epoch shows each labelled image several times, until labelled images are ``label_share`` of
all that it shows. It shows the other images once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from jax import random
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from tabulate import tabulate

from experiments import pictures
from experiments.datasets import Record, first, load
from experiments.experiment import DataTree, Experiment, Figure, Fits
from experiments.images import ACTIVATIONS, likelihood_of
from experiments.runner import number, run
from experiments.settings import (
    Machines,
    check_fraction,
    check_known,
    check_least,
    check_positive,
    command_line,
)
from inference import (
    Estimate,
    Fit,
    LabelTerm,
    Prediction,
    decode,
    elbo_terms,
    encode,
    log_likelihood,
    plot_reliability,
    predict,
    sample_posterior,
    to_datatree,
)
from inference.evaluation import difference
from models import guides, semi_supervised, vae
from models.labels import UNKNOWN
from models.likelihoods import LIKELIHOODS

ROWS = ("classifier", "m1", "plain", "enumerated", "term")
OF_M2 = ("plain", "enumerated", "term")
WORDS = {
    "classifier": "classifier alone",
    "m1": "M1 + linear classifier",
    "plain": "M2, label drawn",
    "enumerated": "M2, enumerated",
    "term": "M2 with the classifier's term",
}
BATCH_SIZE = 200
NUM_EPOCHS, NUM_STEPS = 5, 1000  # the default length: at least so many of both

# Test error of MNIST by number of labels, in per cent, and the source.
PYRO = "Pyro's tutorial on semi-supervised VAEs"
PUBLISHED: dict[str, dict[int, float]] = {
    "classifier": {100: 22.88, 600: 12.84, 1000: 11.37, 3000: 8.92},
    "plain": {100: 79.93, 600: 82.09, 1000: 79.94, 3000: 80.18},
    "enumerated": {100: 77.46, 600: 30.61, 1000: 24.38, 3000: 10.68},
    "term": {100: 6.81, 600: 5.63, 1000: 5.13, 3000: 4.18},
}
KINGMA = {100: 11.97, 600: 4.94, 1000: 3.60, 3000: 3.92}  # Kingma et al. 2014, table 1, M2


@dataclass(frozen=True)
class Config(Machines):
    """Settings of the comparison of ways to use a few labels.

    Attributes:
        dataset: Data set with labels: mnist, fashion-mnist, svhn, digits, the path of your own .npz
            or .csv file, or auto. auto is MNIST if it can be loaded, and else digits.
        data_dir: Directory with the data set's files, compressed or not, to read offline.
        num_train: Number of training images, the first ones. Default: all.
        num_test: Number of test images, the first ones. Default: all.
        num_labels: Numbers of labelled images to compare. Labels differ by one image at most.
        num_draws: Draws of the labelled images, for the rows classifier, m1 and term.
        num_plain_draws: Draws of the labelled images, for the rows plain and enumerated.
        rows: Rows of the table: classifier, m1, plain, enumerated and term.
        guide: Guide of M2: m2, with a network for each of q(y | x) and q(z | x, y), or structured,
            with one for both.
        hidden: Units of the decoder's hidden layers, from z to x, and of the guide's, reversed.
        channels: Channels of the convolution layers, from x to z.
        num_latents: Dimensions of z.
        activation: Activation of the networks: relu, tanh, sigmoid, softplus, silu or gelu.
        likelihood: Likelihood of the pixels, as in experiments/mnist_vae.py. Default: bernoulli, of
            a table normal.
        dtype: Type that the networks compute in, float32 or bfloat16.
        label_weight: Weight of the classifier's term, of all labelled images together, against the
            ELBO of an image. The paper has 0.1.
        label_share: Share of labelled images among those that an epoch shows. 0 shows each once.
        num_epochs: Passes over the training images. Default: 5, or what 1,000 steps take.
        batch_size: Images per step. Default: 200, or all images if there are fewer.
        learning_rate: Learning rate of Adam at the first step. It falls to zero as a cosine.
        num_samples: Importance samples for log p(x) and log p(x | y).
        num_label_samples: Importance samples for p(y | x), for each image and label.
        num_judged: Number of test images for log p(x) and log p(x | y), the first ones.
        full: Whether to train at full length, for a GPU: 200 epochs, and five draws in each row.
        seed: Random seed.
        out: Directory of the run. Default: a new one in runs/.
        progress: Whether to show progress bars.
    """

    dataset: str = "auto"
    data_dir: Path | None = None
    num_train: int | None = None
    num_test: int | None = None
    num_labels: tuple[int, ...] = (100,)
    num_draws: int = 5
    num_plain_draws: int = 1
    rows: tuple[str, ...] = ROWS
    guide: str = "m2"
    hidden: tuple[int, ...] = (500,)
    channels: tuple[int, ...] = ()
    num_latents: int = 50
    activation: str = "softplus"
    likelihood: str | None = None
    dtype: str = "float32"
    label_weight: float = 10.0
    label_share: float = 0.1
    num_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float = 3e-3
    num_samples: int = 100
    num_label_samples: int = 5
    num_judged: int = 500
    full: bool = False
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.full:
            vars(self).update(num_epochs=200, num_draws=5, num_plain_draws=5)
        check_known(self, guide=("m2", "structured"), activation=ACTIVATIONS)
        check_known(self, likelihood=LIKELIHOODS)
        check_least(1, self, "num_train", "num_test", "num_draws", "num_plain_draws", "num_epochs")
        check_least(1, self, "batch_size", "num_latents", "num_samples", "num_label_samples")
        check_least(1, self, "num_judged")
        check_least(0, self, "seed", "label_weight")
        check_positive(self, "learning_rate")
        check_fraction(self, "label_share")
        for name, known in (("rows", ROWS), ("num_labels", None)):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: expected some, each once, got {given}")
            strangers = [] if known is None else [row for row in given if row not in known]
            if strangers:
                raise ValueError(
                    f"{name}: expected some of {', '.join(ROWS)}, got {strangers[0]!r}"
                )

    def draws(self, row: str) -> int:
        """How often the labelled images of a row are drawn."""
        return self.num_plain_draws if row in ("plain", "enumerated") else self.num_draws

    def model(self, record: Record) -> semi_supervised.Model:
        """M2 for the data."""
        likelihood = likelihood_of(self.likelihood, record)
        chosen: Any = {} if likelihood is None else {"likelihood": likelihood}
        return semi_supervised.Model(
            x_shape=record.x_shape,
            num_classes=record.num_classes or 0,
            num_latents=self.num_latents,
            hidden=self.hidden,
            channels=self.channels,
            activation=ACTIVATIONS[self.activation],
            dtype=self.dtype,
            **chosen,
        )


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Images with their labels. A fit sees the labels of some.

    Attributes:
        record: what a model needs to know of them.
        train, test: ``x`` and ``c``.
        label_share: as in ``Config``.
    """

    record: Record
    train: dict[str, Any]
    test: dict[str, Any]
    label_share: float
    validation: None = field(default=None)


def data(config: Config) -> Data:
    """The images, checked: there are enough of every label."""
    loaded = load(config.dataset, data_dir=config.data_dir, num_validation=None, progress=False)
    if loaded.num_classes is None:
        raise ValueError(
            f"dataset: expected labels, and {loaded.name} has none; add them to the file as c"
        )
    train: Any = first(loaded.train, ["x", "c"], config.num_train)
    loaded = replace(loaded, train={name: np.asarray(array) for name, array in train.items()})
    test: Any = first(loaded.test, ["x", "c"], config.num_test)
    found = Data(loaded.record, dict(loaded.train), dict(test), config.label_share)
    for count in config.num_labels:
        labelled(found, count, 0)
    return found


def labelled(data: Data, num_labels: int, draw: int) -> np.ndarray:
    """Which training images are labelled: as many of every label, or one more.

    Raises:
        ValueError: fewer than one of each label; more than there are.
    """
    labels, num_classes = data.train["c"], data.record.num_classes or 0
    rng = np.random.default_rng([draw, num_labels])
    rows = [rng.permutation(np.flatnonzero(labels == k)) for k in range(num_classes)]
    counts = [len(part) for part in np.array_split(np.arange(num_labels), num_classes)]
    for k, (some, count) in enumerate(zip(rows, counts, strict=True)):
        if not 1 <= count <= len(some):
            raise ValueError(
                f"num_labels: expected from {num_classes}, one of each label, to as many as there "
                f"are, got {num_labels}, which asks for {count} of label {k}, and there are "
                f"{len(some)}"
            )
    return np.sort(np.concatenate([r[:n] for r, n in zip(rows, counts, strict=True)]))


def times_shown(data: Data, num_labels: int) -> int:
    """How often an epoch shows a labelled image."""
    others, share = len(data.train["c"]) - num_labels, data.label_share
    return max(1, round(share * others / ((1 - share) * num_labels)))


def arrays(data: Data, name: str) -> dict[str, Any]:
    """The arrays of a fit: labels are -1 where they are hidden."""
    x, c = data.train["x"], data.train["c"]
    if name == "m1":
        return {"x": x}
    row, num_labels, draw = parsed(name)
    known = labelled(data, num_labels, draw)
    if row == "classifier":
        return {"x": x[known], "y": c[known]}
    y = np.full_like(c, UNKNOWN)
    y[known] = c[known]
    again = np.repeat(known, times_shown(data, num_labels) - 1)
    return {"x": np.concatenate([x, x[again]]), "y": np.concatenate([y, y[again]])}


# --- fits -----------------------------------------------------------------------------------------


def names(config: Config) -> list[str]:
    """The fits: M1, and one of each other row for every number of labels and draw."""
    m1 = ["m1"] if "m1" in config.rows else []
    return m1 + [
        f"{row}-{num_labels}-{draw}"
        for num_labels in config.num_labels
        for row in config.rows
        if row != "m1"
        for draw in range(config.draws(row))
    ]


def parsed(name: str) -> tuple[str, int, int]:
    """The row, the number of labels and the draw of a fit."""
    row, num_labels, draw = name.split("-")
    return row, int(num_labels), int(draw)


def main_fit(config: Config) -> str:
    """The fit that a run is known for: the last row's first."""
    return next(name for name in names(config) if name.split("-")[0] == config.rows[-1])


def programs(config: Config, record: Record, name: str, fits: Fits) -> tuple[Any, Any]:
    """The model and the guide of a fit."""
    model = config.model(record)
    if name == "m1":
        fields = {n: getattr(model, n) for n in vae.Model.__dataclass_fields__}
        m1 = vae.Model(**fields)
        return m1, guides.mean_field(m1)
    if name.startswith("classifier"):
        return semi_supervised.Classifier(model), _nothing
    guide = semi_supervised.Guide(model) if config.guide == "m2" else guides.structured(model)
    return model, guide


def _nothing(**data: Any) -> None:
    """The guide of a program without latent sites."""


def epochs(config: Config, num_train: int) -> int:
    """Passes over the training images."""
    size = min(config.batch_size or BATCH_SIZE, num_train)
    return config.num_epochs or max(NUM_EPOCHS, math.ceil(NUM_STEPS * size / num_train))


def training(config: Config, data: Data, name: str, fits: Fits) -> dict[str, Any]:
    """The settings of ``fit``."""
    rows, objective = arrays(data, name), Trace_ELBO()
    num_epochs = epochs(config, len(data.train["x"]))
    if name != "m1":
        row, num_labels, _ = parsed(name)
        share = float(np.mean(rows["y"] != UNKNOWN))
        enumerated = TraceEnum_ELBO(max_plate_nesting=1)
        if row == "classifier":  # it sees a labelled image as often as the others do
            num_epochs *= times_shown(data, num_labels)
        elif row == "plain":
            objective = TraceGraph_ELBO()
        else:
            objective = enumerated
        if row == "term":
            objective = LabelTerm(enumerated, config.label_weight / share)
    batch_size = min(config.batch_size or BATCH_SIZE, len(rows["x"]))
    num_steps = -(-num_epochs * len(rows["x"]) // batch_size)
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    return {
        "objective": objective,
        "optimizer": optax.adam(schedule),
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "seed": config.seed,
    }


# --- judging --------------------------------------------------------------------------------------


class OfM2(NamedTuple):
    """What the judges say of a fit of M2, in nats per image."""

    prediction: Prediction
    log_p_x: Estimate
    log_p_x_given_y: Estimate
    information: Estimate


class Judged(NamedTuple):
    """The test error of every fit, and more of the fits of M2. M1 has an entry for each draw."""

    errors: dict[str, float]
    of_m2: dict[str, OfM2]


def judge(config: Config, data: Data, fits: Fits) -> Judged:
    """The test images under every fit."""
    errors: dict[str, float] = {}
    of_m2: dict[str, OfM2] = {}
    for name, fitted in fits.items():
        if name == "m1":
            errors |= _linear_errors(config, data, fitted)
        elif name.startswith("classifier"):
            errors[name] = _classifier_error(data, fitted)
        else:
            of_m2[name] = _judge_m2(config, data, fitted)
            errors[name] = _error(of_m2[name].prediction.by_guide.accuracy)
    return Judged(errors, of_m2)


def _error(accuracy: Estimate) -> float:
    return float(1 - accuracy.estimate.mean())


def judged_arrays(data: Data, count: int | None) -> dict[str, Any]:
    """The test images with their labels as ``y``."""
    return {"x": data.test["x"][:count], "y": data.test["c"][:count]}


def _judge_m2(config: Config, data: Data, fitted: Fit) -> OfM2:
    key, progress = random.fold_in(random.key(20_140_620), config.seed), config.progress
    test = fitted.prepare(judged_arrays(data, None))
    found = predict(fitted, test, key=key, num_samples=config.num_label_samples, progress=progress)
    some = fitted.prepare(judged_arrays(data, config.num_judged))
    hidden = fitted.prepare(
        judged_arrays(data, config.num_judged) | {"y": np.full_like(some["y"], UNKNOWN)}
    )
    settings: Any = {"key": key, "num_samples": config.num_samples}
    joint = log_likelihood(fitted, some, **settings)  # log p(x, y)
    alone = log_likelihood(fitted, hidden, **settings)
    model: Any = fitted.model
    log_prior = -math.log(model.num_classes)
    given = replace(joint, name="log p(x | y)", pointwise=joint.pointwise - log_prior)
    return OfM2(found, alone, given, difference("label information", given, alone))


def _linear_errors(config: Config, data: Data, fitted: Fit) -> dict[str, float]:
    """By number of labels and draw, the test error of a linear classifier of the means of z."""
    from sklearn.linear_model import LogisticRegression

    z = [encode(fitted, fitted.prepare({"x": a["x"]}))["z"][0] for a in (data.train, data.test)]
    errors = {}
    for num_labels in config.num_labels:
        for draw in range(config.draws("m1")):
            known = labelled(data, num_labels, draw)
            linear = LogisticRegression(max_iter=1000).fit(z[0][known], data.train["c"][known])
            wrong = linear.predict(z[1]) != data.test["c"]
            errors[f"m1-{num_labels}-{draw}"] = float(wrong.mean())
    return errors


def _classifier_error(data: Data, fitted: Fit) -> float:
    """The test error of a classifier alone: log p(y | x) of every label is compared."""
    program: Any = fitted.model
    prepared = fitted.prepare(judged_arrays(data, None))
    log_p = []
    for label in range(program.model.num_classes):
        asked = replace_labels(prepared, label)
        log_p.append(log_likelihood(fitted, asked, num_samples=1, batch_size=1000).pointwise[0])
    return float(np.mean(np.argmax(log_p, axis=0) != data.test["c"]))


def replace_labels(prepared: Any, label: int) -> Any:
    """Prepared data with the same label for all."""
    return type(prepared)({**prepared, "y": np.full_like(prepared["y"], label)})


def summarize(config: Config, data: Data, fits: Fits, judged: Judged) -> dict[str, Any]:
    """The numbers of ``result.json``: by number of labels and row."""
    table: dict[str, Any] = {}
    for num_labels in config.num_labels:
        for row in config.rows:
            found = [n for n in judged.errors if parsed(n)[:2] == (row, num_labels)]
            of_m2 = [judged.of_m2[n] for n in found if n in judged.of_m2]
            table[f"{row}-{num_labels}"] = {
                "error": _over_draws([judged.errors[n] for n in found])
            } | ({} if not of_m2 else _summary_of_m2(of_m2))
    main = judged.of_m2.get(main_fit(config))
    return {
        "full": config.full,
        "num_epochs": epochs(config, len(data.train["x"])),
        "num_classes": data.record.num_classes,
        "times_shown": {n: times_shown(data, n) for n in config.num_labels},
        "table": table,
        "log_likelihood": main and number(main.log_p_x),
    }


def _summary_of_m2(found: list[OfM2]) -> dict[str, Any]:
    means = {
        "error_of_model": [_error(f.prediction.by_model.accuracy) for f in found],
        "brier_of_guide": [f.prediction.by_guide.brier.estimate.mean() for f in found],
        "brier_of_model": [f.prediction.by_model.brier.estimate.mean() for f in found],
        "log_p_x": [f.log_p_x.estimate.mean() for f in found],
        "log_p_x_given_y": [f.log_p_x_given_y.estimate.mean() for f in found],
        "information": [f.information.estimate.mean() for f in found],
    }
    better = [f.prediction.better for f in found]
    return {name: _over_draws(values) for name, values in means.items()} | {"better": better}


def _over_draws(values: Any) -> dict[str, Any]:
    """The mean over draws, and its standard error where there are several."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return {
        "estimate": float(values.mean()),
        "standard_error": None if error is None else float(error),
        "per_draw": values.tolist(),
    }


def tree(config: Config, data: Data, fits: Fits, judged: Judged) -> DataTree:
    """The main fit, with some test images."""
    fitted = fits[main_fit(config)]
    if not isinstance(fitted.model, semi_supervised.Model):
        return to_datatree(fitted)
    test = fitted.prepare(judged_arrays(data, config.num_judged))
    return to_datatree(
        fitted,
        elbo_terms(fitted, test),
        judged.of_m2[main_fit(config)].log_p_x_given_y,
        posterior=sample_posterior(fitted, test),
        dims={"z": ["data", "latent"]},
    )


# --- table, figures -------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it, with the published errors beside it."""
    is_mnist = result["dataset"] == "mnist"
    body = []
    for name, of_row in result["table"].items():
        row, num_labels = name.rsplit("-", 1)
        published = PUBLISHED.get(row, {}).get(int(num_labels)) if is_mnist else None
        body.append(
            [
                num_labels,
                WORDS[row],
                len(of_row["error"]["per_draw"]),
                _cell(of_row["error"], 2, 100.0),
                "" if published is None else f"{published:.2f}",
                *(_cell(of_row.get("error_of_model"), 2, 100.0),),
                *(_cell(of_row.get(n), 3) for n in ("brier_of_guide", "brier_of_model")),
                *(_cell(of_row.get(n), 2) for n in ("log_p_x", "log_p_x_given_y")),
                _cell(of_row.get("information"), 2),
                ", ".join(sorted(set(of_row.get("better", [])))),
            ]
        )
    headers = (
        "labels", "row", "draws", "error, %", "Pyro's, %", "of p(y | x), %", "Brier q", "Brier p",
        "log p(x)", "log p(x | y)", "label tells", "better",
    )  # fmt: skip
    align = ("right", "left", *["right"] * (len(headers) - 2))
    count = result["num_data"]
    shown = ", ".join(f"{n}: {times} times" for n, times in result["times_shown"].items())
    length = "full length" if result["full"] else "the length for two cores"
    return (
        f"{result['dataset']}: {count['train']} training and {count['test']} test images; "
        f"{result['num_epochs']} epochs, {length}\n\n"
        f"{tabulate(body, headers, disable_numparse=True, colalign=align)}\n\n"
        f"error: the test images whose most probable label is wrong, by q(y | x) where there is a "
        f"guide. ± is the standard error over draws of the labelled images. log p in nats per "
        f"image, of {result['config']['num_judged']} test images at most; the label tells log "
        f"p(x | y) - log p(x), at most log {result['num_classes']}. better: q or p, by the Brier "
        f"scores of the draws.\n"
        f"An epoch shows a labelled image (by number of labels) {shown}."
        + (f"\nPyro's: {PYRO}, accuracy from 100 %." if is_mnist else "")
    )


def _cell(found: Mapping[str, Any] | None, digits: int, unit: float = 1.0) -> str:
    if found is None:
        return ""
    words = f"{unit * found['estimate']:.{digits}f}"
    error = found["standard_error"]
    return words if error is None else f"{words} ± {unit * error:.{digits}f}"


def figures(
    config: Config, data: Data, fits: Fits, judged: Judged, result: dict[str, Any]
) -> dict[str, Figure]:
    """The main fit's pictures, and the error by number of labels."""
    found = {"error": _errors_by_labels(result)}
    fitted = fits[main_fit(config)]
    words = f"M2 on {data.record.name}"
    found["elbo"] = pictures.elbo_traces(fitted, words)
    if main_fit(config) in judged.of_m2:
        found["reliability"] = plot_reliability(judged.of_m2[main_fit(config)].prediction)
        if len(data.record.x_shape) > 1:
            found["analogies"] = analogies(fitted, data, words)
            found["samples"] = samples(fitted, words)
    return found


def analogies(fitted: Fit, data: Data, words: str, num_rows: int = 10) -> Figure:
    """Test images, and beside each every label in its style: style by row, label by column.

    Args:
        fitted: a fit of M2.
        data: its data.
        words: for the title.
        num_rows: test images, the first ones.
    """
    model: Any = fitted.model
    test = judged_arrays(data, num_rows)
    hidden = fitted.prepare(test | {"y": np.full_like(test["y"], UNKNOWN)})
    z = encode(fitted.isel(seed=0), hidden)["z"]
    drawn = _by_label(fitted, np.repeat(z[0], model.num_classes, axis=0))
    rows = drawn.reshape(len(z[0]), model.num_classes, *drawn.shape[1:])
    rows = np.concatenate([np.asarray(hidden["x"])[:, None], rows], axis=1)
    labels = [str(k) for k in range(model.num_classes)]
    return pictures.grid(
        pictures.to_grey(model, rows),
        f"{words}: means of p(x | y, z), z from a test image",
        x_label="label y",
        y_label="test images, whose z gives the style",
        column_labels=("image", *labels),
    )


def samples(fitted: Fit, words: str, num_columns: int = 10) -> Figure:
    """Images of every label, with z from the prior: label by row.

    Args:
        fitted, words: as in ``analogies``.
        num_columns: draws of z.
    """
    model: Any = fitted.model
    z = np.random.default_rng(0).standard_normal((num_columns, 1, model.num_latents))
    z = np.broadcast_to(z.astype(np.float32), (num_columns, model.num_classes, model.num_latents))
    drawn = _by_label(fitted, z.reshape(-1, model.num_latents))
    rows = drawn.reshape(num_columns, model.num_classes, *drawn.shape[1:]).swapaxes(0, 1)
    return pictures.grid(
        pictures.to_grey(model, rows),
        f"{words}: means of p(x | y, z), z from the prior",
        x_label="draws of z",
        y_label="label y",
        row_labels=[str(k) for k in range(model.num_classes)],
    )


def _by_label(fitted: Fit, z: np.ndarray) -> np.ndarray:
    """Means of p(x | y, z): the labels go round, (len(z), *x_shape)."""
    model: Any = fitted.model
    y = np.arange(len(z), dtype=np.int32) % model.num_classes
    return decode(fitted.isel(seed=0), {"y": y[None], "z": z[None]})["x"][0]


def _errors_by_labels(result: Mapping[str, Any]) -> Figure:
    """Test error by number of labels, each row a line, with the published errors dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.5), layout="constrained")
    axes = figure.subplots()
    by_row: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for name, of_row in result["table"].items():
        row, num_labels = name.rsplit("-", 1)
        by_row.setdefault(row, []).append((int(num_labels), of_row["error"]))
    for i, (row, points) in enumerate(sorted(by_row.items())):
        counts = [count for count, _ in points]
        means = [100 * error["estimate"] for _, error in points]
        bars = [200 * (error["standard_error"] or 0) for _, error in points]
        axes.errorbar(counts, means, bars, marker="o", capsize=3, color=f"C{i}", label=WORDS[row])
        if result["dataset"] == "mnist" and row in PUBLISHED:
            counts, errors = zip(*PUBLISHED[row].items(), strict=True)
            axes.plot(counts, errors, ls="--", lw=1, color=f"C{i}")
    if result["dataset"] == "mnist":
        axes.plot([], [], ls="--", lw=1, color="0.4", label=f"the same: {PYRO}")
        axes.plot(*zip(*KINGMA.items(), strict=True), "k:", label="M2: Kingma et al. 2014, table 1")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="labelled training images",
        ylabel="test error (%)",
        title=f"{result['dataset']}: test error by number of labels; bars are two standard errors",
    )
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


EXPERIMENT = Experiment(
    name="mnist_semi",
    config=Config,
    data=data,
    programs=programs,
    training=training,
    judge=judge,
    summarize=summarize,
    tree=tree,
    figures=figures,
    table=table,
    names=names,
    main=main_fit,
    arrays=arrays,
)


def main(config: Config) -> dict[str, Any]:
    """Learn to classify images from a few labels and many images without any."""
    return run(EXPERIMENT, config)


if __name__ == "__main__":
    command_line(main, Config)
