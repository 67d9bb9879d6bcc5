"""What the experiments on images share: settings, training, judging, the table, the figures.

They also take a table, a vector of numbers for each datum. Then there are no pictures. A script
adds its defaults: ``experiments/mnist_vae.py``, ``experiments/mnist_cvae.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from numpyro.infer.elbo import ELBO
from tabulate import tabulate

from experiments import pictures
from experiments.datasets import Dataset, Record, first, load
from experiments.experiment import DataTree, Experiment, Figure, Fits
from experiments.runner import fit_anew, number
from experiments.settings import Machines, check_fraction, check_known, check_least, check_positive
from inference import (
    OBJECTIVES,
    ElboTerms,
    Estimate,
    FreeBits,
    KLWarmUp,
    KLWeighted,
    LabelCheck,
    elbo_terms,
    label_check,
    log_likelihood,
    pareto_k_threshold,
    sample_posterior,
    to_datatree,
)
from inference.evaluation import FEWEST_FOR_TAIL
from models import guides, hierarchical, priors, vae
from models.conditions import Labels
from models.likelihoods import LIKELIHOODS, PIXEL_LIKELIHOODS, Likelihood, PixelLikelihood
from models.networks import softplus

ENCODERS = ("network", "per-datum")
JUDGING_SEED = 20_150_901  # It is folded with the run's seed, and gives the draws of the judges.

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": softplus,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "gated": jax.nn.glu,
}
PRESETS: dict[str, vae.Model] = {**vae.PRESETS, **hierarchical.PRESETS}
GUIDES: dict[str, Callable[..., Any]] = {**guides.GUIDES, **hierarchical.GUIDES}


def likelihood_of(name: str | None, record: Record) -> Likelihood | None:
    """The likelihood of a name, with the numbers of a table's columns.

    Args:
        name: a name in ``LIKELIHOODS``. None for a table's default, and for none of images.
        record: of the data.

    Raises:
        ValueError: a likelihood of tables for images.
    """
    is_table = len(record.x_shape) == 1
    name = name or ("normal" if is_table else "")
    if name and not is_table and name not in PIXEL_LIKELIHOODS:
        raise ValueError(
            f"likelihood: expected one of {', '.join(PIXEL_LIKELIHOODS)} for the images of "
            f"{record.name}, got {name!r}, which is for tables"
        )
    likelihood: Any = LIKELIHOODS.get(name)
    numbers = ("x_mean", "x_std") if is_table else ()
    known = {n: getattr(record, n) for n in numbers if hasattr(likelihood, n)}
    return replace(likelihood, **known) if known else likelihood


def burda_schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
    """3^i shares of the run at learning_rate * 10^(-i/7), i = 0..7 (Burda et al. 2016, section 5).

    Args:
        learning_rate: the learning rate of the first share. 1e-3 in the paper.
        num_steps: the steps of all shares together. 3280 passes over the data in the paper.
    """
    ends = [round(num_steps * (3**i - 1) / 2 / 3280) for i in range(1, 8)]
    rates = [learning_rate * 10 ** (-i / 7) for i in range(8)]
    return optax.join_schedules([optax.constant_schedule(rate) for rate in rates], ends)


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda rate, num_steps: optax.constant_schedule(rate),
    "cosine": optax.cosine_decay_schedule,
    "burda": burda_schedule,
}


@dataclass(frozen=True)
class Config(Machines):
    """Settings of an experiment on images.

    Attributes:
        dataset: Data set: mnist, static-mnist, fashion-mnist, svhn, digits, the path of your own
            .npz, .npy or .csv file, or auto. auto is MNIST if it can be loaded, and else digits.
            static-mnist is binary and has no labels. An .npy file larger than half of the memory is
            read piece by piece.
        data_dir: Directory with the data set's files, compressed or not, to read offline.
        num_validation: Images held out of the training. Default: the data set's usual number. The
            encoder per-datum holds out none, because it knows the training images alone.
        num_train: Number of training images, the first ones. Default: all.
        num_test: Number of test images, the first ones. Default: all.
        preset: Model to start from, by name. The settings from hidden to likelihood change it.
        guide: Family of the guide: mean-field, structured, low-rank, full-covariance, flow,
            inverse-autoregressive, neural-spline, prior or semi-amortised.
        guide_hidden: Units of the hidden layer by which the guide makes one site from those before
            it, or of a flow's networks. Default: the family's.
        encoder: What gives the guide its numbers: network, or per-datum. per-datum is a table with
            a row for each image. It trains on all images at once and is fitted anew to the test
            images.
        hidden: Units of the decoder's hidden layers, from z to x.
        channels: Channels of the convolution layers, from x to z.
        encoder_hidden: Units of the encoder's hidden layers, from x to z. Default: the decoder's,
            reversed.
        num_latents: Dimensions of z.
        above: Dimensions of further stochastic layers above z, from x up. Between two layers are
            the decoder's hidden layers, and the decoder sees all of them.
        prior: Prior of z, or of the highest layer: standard, learned, mixture, vamp or flow.
        num_components: Components of the prior mixture, or pseudo-inputs of the prior vamp.
            Default: 10 and 500.
        activation: Activation of the networks: relu, tanh, sigmoid, softplus, silu, gelu or gated.
        likelihood: Likelihood of the pixels: bernoulli, gaussian, gaussian-one-scale,
            gaussian-identity or discretized-logistic. Of a table also normal (any numbers, the
            default) or negative-binomial (counts).
        dtype: Type that the networks compute in, float32 or bfloat16.
        objective: Objective of the training: Trace_ELBO, TraceMeanField_ELBO, RenyiELBO (or
            importance-weighted, the same), doubly-reparameterized or sticking-the-landing.
        num_particles: Draws of z per image and step.
        beta: Weight of the KL divergence in the gradient. The ELBO has 1.
        free_bits: Nats per image that the divergence of each dimension may have for free.
        num_epochs: Passes over the training images.
        batch_size: Images per step. Default: 128, or all images if there are fewer.
        learning_rate: Learning rate of Adam at the first step.
        schedule: Schedule of the learning rate: constant, cosine (to zero) or burda (eight falling
            rates).
        clip_norm: Greatest norm of a gradient. Default: gradients are not clipped.
        kl_warm_up: Epochs over which the weight of the KL divergence rises from 0 to 1.
        average: Fraction of the run, at its end, over which parameters are averaged.
        patience: Epochs without a better held-out ELBO after which a seed stops and keeps its best.
        num_samples: Importance samples per test image.
        num_seeds: Number of restarts. They are trained together.
        seed: Random seed of the first restart.
        out: Directory of the run. Default: a new one in runs/.
        progress: Whether to show progress bars.
    """

    dataset: str = "auto"
    data_dir: Path | None = None
    num_validation: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    preset: str = "numpyro"
    guide: str = "mean-field"
    guide_hidden: int | None = None
    encoder: str = "network"
    hidden: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    encoder_hidden: tuple[int, ...] | None = None
    num_latents: int | None = None
    above: tuple[int, ...] = ()
    prior: str = "standard"
    num_components: int | None = None
    activation: str | None = None
    likelihood: str | None = None
    dtype: str = "float32"
    objective: str = "Trace_ELBO"
    num_particles: int = 1
    beta: float = 1.0
    free_bits: float = 0.0
    num_epochs: int = 50
    batch_size: int | None = None
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    clip_norm: float | None = None
    kl_warm_up: float = 0.0
    average: float = 0.0
    patience: int | None = None
    num_samples: int = 1000
    num_seeds: int = 1
    seed: int = 0
    out: Path | None = None
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_known(self, preset=PRESETS, guide=GUIDES, encoder=ENCODERS)
        check_known(self, activation=ACTIVATIONS, prior=priors.PRIORS)
        check_known(self, likelihood=LIKELIHOODS, objective=OBJECTIVES, schedule=SCHEDULES)
        check_least(1, self, "num_train", "num_test", "num_latents", "num_epochs", "batch_size")
        check_least(1, self, "num_particles", "patience", "num_samples", "num_seeds")
        check_least(1, self, "guide_hidden", "num_components")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate", "clip_norm")
        check_fraction(self, "average")
        if not 0 <= self.kl_warm_up <= self.num_epochs:
            raise ValueError(
                f"kl_warm_up: expected 0 to num_epochs = {self.num_epochs}, got {self.kl_warm_up}; "
                f"a longer one would never train the ELBO itself"
            )
        for name in ("num_validation", "batch_size"):
            if self.encoder == "per-datum" and getattr(self, name):
                raise ValueError(
                    f"{name}: expected none with the encoder per-datum, whose every step takes all "
                    f"training images, got {getattr(self, name)}; leave it out"
                )
        own = ("encoder_hidden", "guide_hidden") if self.guide in hierarchical.GUIDES else ()
        for name in (*own, *(["encoder"] if own and self.encoder != "network" else [])):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected none with the guide {self.guide}, whose networks have the "
                    f"model's hidden layers, got {getattr(self, name)}; leave it out"
                )
        if (self.encoder, self.prior) == ("per-datum", "vamp"):
            raise ValueError(
                "prior: expected another one with the encoder per-datum, which knows the training "
                "images alone, got vamp, which asks it about pseudo-inputs; leave out one of them"
            )
        for name in ("beta", "free_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}: expected a finite number from 0, got {getattr(self, name)}"
                )
        self.elbo(warm_up=1)

    def elbo(self, warm_up: int) -> ELBO:
        """The objective.

        Args:
            warm_up: steps over which the divergence's weight rises, if it rises.

        Raises:
            ValueError: settings that this objective does not know.
        """
        objective = OBJECTIVES[self.objective](self.num_particles)
        try:
            if self.beta != 1:
                objective = KLWeighted(objective, self.beta)
            if self.free_bits:
                objective = FreeBits(objective, self.free_bits)
            return KLWarmUp(objective, warm_up) if self.kl_warm_up else objective
        except TypeError as error:
            raise ValueError(
                f"{error}: --objective {self.objective} with --beta {self.beta}, --free-bits "
                f"{self.free_bits}, --kl-warm-up {self.kl_warm_up}"
            ) from error

    def data(self) -> Dataset:
        """Images or a table, split into training, validation and test."""
        return self._first(self._load(), ["x"])

    def _load(self) -> Dataset:
        return load(
            self.dataset,
            data_dir=self.data_dir,
            num_validation=0 if self.encoder == "per-datum" else self.num_validation,
            progress=self.progress,
        )

    def _first(self, dataset: Dataset, names: Sequence[str]) -> Dataset:
        """As many data as were asked for, of the arrays ``names``."""
        return replace(
            dataset,
            train=first(dataset.train, names, self.num_train),
            validation=dataset.validation and first(dataset.validation, names),
            test=first(dataset.test, names, self.num_test),
        )

    def model(self, record: Record) -> vae.Model:
        """The preset, with the settings that were given, and the prior Normal(0, I)."""
        names = ("hidden", "channels", "num_latents", "dtype")
        changes = {name: getattr(self, name) for name in names}
        changes["activation"] = ACTIVATIONS.get(self.activation or "")
        changes["likelihood"] = likelihood_of(self.likelihood, record)
        changes = {name: value for name, value in changes.items() if value is not None}
        model = replace(PRESETS[self.preset], x_shape=record.x_shape, **changes)
        return hierarchical.stacked(model, self.above) if self.above else model

    def make_guide(self, model: vae.Model, num_data: int) -> Any:
        """The guide of the model. ``num_data`` counts for a table with a row for each datum."""
        if self.guide in hierarchical.GUIDES:
            if not isinstance(model, hierarchical.Model):
                raise ValueError(
                    f"guide: expected a family for one stochastic layer, got {self.guide}, which "
                    f"is for several; add --above with the dimensions of the layers above z"
                )
            return hierarchical.GUIDES[self.guide](model)
        settings: dict[str, Any] = {}
        if self.encoder_hidden is not None:
            settings["encoder"] = partial(model.encoder, hidden=self.encoder_hidden)
        if self.guide_hidden is not None:
            settings["num_hidden"] = self.guide_hidden
        guide = guides.make(self.guide, model, **settings)
        return guide.per_datum(num_data) if self.encoder == "per-datum" else guide

    def make_prior(self, guide: Any) -> priors.Prior:
        """The prior. Some are made from the guide."""
        return priors.make(self.prior, guide=guide, num_components=self.num_components)


@dataclass(frozen=True)
class LabelConfig(Config):
    """Settings of an experiment on images given their label.

    Attributes:
        num_embedded: Length of a learned vector that stands for a label. Default: one-hot labels.
        num_label_samples: Importance samples per test image and label, for the check of labels.
    """

    num_embedded: int | None = None
    num_label_samples: int = 100

    def __post_init__(self):
        super().__post_init__()
        check_least(1, self, "num_embedded", "num_label_samples")

    def data(self) -> Dataset:
        """Images and their labels, split into training, validation and test."""
        dataset = self._load()
        if dataset.num_classes is None:
            raise ValueError(
                f"dataset: expected labels, and {dataset.name} has none; add them to the file as "
                f"c, or train a model without conditions"
            )
        return self._first(dataset, ["x", "c"])

    def model(self, record: Record) -> vae.Model:
        """The preset given a label, with the settings that were given."""
        return replace(
            super().model(record),
            condition=Labels(record.num_classes or 0, self.num_embedded),
        )


# --- programs, training ---------------------------------------------------------------------------


def programs(config: Config, record: Record, name: str, fits: Fits) -> tuple[Any, Any]:
    """The model and its guide. The guide is made first, as the prior may be made from it."""
    model = config.model(record)
    guide = config.make_guide(model, record.num_data)
    return replace(model, prior=config.make_prior(guide)), guide


def training(config: Config, data: Dataset, name: str, fits: Fits) -> dict[str, Any]:
    """The settings of ``fit``. Every step sees freshly prepared images."""
    num_train = len(data.train["x"])
    most = num_train if config.encoder == "per-datum" else 128
    batch_size = config.batch_size or min(most, num_train)
    num_steps = -(-config.num_epochs * num_train // batch_size)
    optimizer = optax.adam(SCHEDULES[config.schedule](config.learning_rate, num_steps))
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    warm_up = max(1, int(config.kl_warm_up * num_train / batch_size))
    return {
        "objective": config.elbo(warm_up),
        "optimizer": optimizer,
        "num_epochs": config.num_epochs,
        "batch_size": batch_size,
        "num_seeds": config.num_seeds,
        "seed": config.seed,
        "average": config.average,
        "validation": data.validation,
        "validate_every": max(1, num_train // batch_size) if data.validation else None,
        "patience": config.patience,
    }


# --- judging --------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What the judges say of the test images.

    ``draws`` has one draw of z for each image. ``labels`` is None without labels.
    """

    terms: ElboTerms
    log_likelihood: Estimate
    draws: dict[str, Any]
    labels: LabelCheck | None


def judging_key(config: Any) -> Any:
    """The random key of the judges."""
    return random.fold_in(random.key(JUDGING_SEED), config.seed)


def judge(config: Config, data: Dataset, fits: Fits) -> Judged:
    """The test images under every seed's model."""
    fitted, progress = fits["fit"], config.progress
    test, key = fitted.prepare(data.test), judging_key(config)
    labels = None
    if config.encoder == "per-datum":
        model: Any = fitted.model
        guide = config.make_guide(model, len(test["x"]))
        fitted = fit_anew(fitted, guide, test, config)
    elif isinstance(config, LabelConfig) and "c" in test:
        labels = label_check(
            fitted,
            test,
            data.num_classes or 0,
            key=random.key(config.seed),
            num_samples=config.num_label_samples,
            progress=progress,
        )
    return Judged(
        elbo_terms(fitted, test, key=key, num_samples=10),
        log_likelihood(fitted, test, key=key, num_samples=config.num_samples, progress=progress),
        sample_posterior(fitted, test, key=key),
        labels,
    )


def summarize(
    config: Config,
    data: Dataset,
    fits: Fits,
    judged: Judged,
    published: Mapping[str, tuple[float, str]],
) -> dict[str, Any]:
    """The numbers of ``result.json``.

    Args:
        config, data, fits, judged: as in ``Experiment``.
        published: by preset, a log-likelihood of MNIST and its source.
    """
    model: Any = fits["fit"].model
    terms, high = judged.terms, judged.log_likelihood.high_pareto_k
    likelihood = number(judged.log_likelihood)
    layers = {name: _layer(terms, name) for name in terms.z_loc}
    summary = {
        "num_latents": sum(layer["num_latents"] for layer in layers.values()),
        "elbo": number(terms.elbo),
        "reconstruction": number(terms.reconstruction),
        "kl": number(terms.kl),
        "log_likelihood": likelihood,
        "published": published_number(config, data, model, published),
        "pareto_k": high and number(high) | {"threshold": pareto_k_threshold(config.num_samples)},
        "bits_per_dim": bits_per_dim(model, likelihood),
        "active_units": sum(layer["active_units"] for layer in layers.values()),
        "layers": layers,
    }
    if judged.labels is not None:
        summary["labels"] = {
            "information": number(judged.labels.information),
            "greatest_information": float(np.log(judged.labels.log_likelihood.shape[2])),
            "accuracy": number(judged.labels.accuracy),
        }
    return summary


def _layer(terms: ElboTerms, site: str) -> dict[str, Any]:
    """What ``result.json`` says of one latent site. Lists are by seed and dimension."""
    variance, error = terms.activity[site]
    per_dim = terms.kl_per_dim.get(site)  # None if the divergence is no sum over dimensions
    return {
        "num_latents": variance.shape[1],
        "active_units": float(terms.active[site].sum(1).mean()),
        "activity": {"estimate": variance.tolist(), "standard_error": error.tolist()},
        "kl_per_dim": None
        if per_dim is None
        else {
            "estimate": per_dim.mean(1).tolist(),
            "standard_error": (per_dim.std(1) / np.sqrt(per_dim.shape[1])).tolist(),
        },
    }


def published_number(
    config: Config, data: Dataset, model: vae.Model, published: Mapping[str, tuple[float, str]]
) -> dict[str, Any] | None:
    """What the paper of a preset prints. None where the model, the guide or the data differ."""
    same = model == PRESETS[config.preset] and config.encoder_hidden is None
    if not same or (data.name, config.guide) != ("mnist", "mean-field"):
        return None
    if config.preset not in published:
        return None
    value, source = published[config.preset]
    return {"log_likelihood": value, "source": source}


def bits_per_dim(model: vae.Model, likelihood: Mapping[str, Any]) -> dict[str, float] | None:
    """The log-likelihood of images in bits per dimension. None for a table."""
    if not (isinstance(model.likelihood, PixelLikelihood) and len(model.x_shape) > 1):
        return None
    num_dims = int(np.prod(model.x_shape))
    bits = model.likelihood.bits_per_dim(likelihood["estimate"], num_dims)
    error = likelihood["standard_error"] / (num_dims * np.log(2))
    return {"estimate": float(bits), "standard_error": error}


def tree(config: Config, data: Dataset, fits: Fits, judged: Judged) -> DataTree:
    """The fit, and of every test image its judged numbers and a draw of z."""
    return to_datatree(
        fits["fit"],
        judged.terms,
        judged.log_likelihood,
        *(() if judged.labels is None else (judged.labels,)),
        posterior=judged.draws,
        constant_data={"c": data.test["c"]} if "c" in data.test else None,
        dims=latent_dims(judged.draws),
    )


def latent_dims(draws: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the axes of latent sites, for ArviZ."""
    if len(draws) == 1:
        return {name: ["data", "latent"] for name in draws}
    return {name: ["data", f"latent_{name}"] for name in draws}


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it, with the published number beside it."""
    num_data, published, pareto_k = (result[n] for n in ("num_data", "published", "pareto_k"))
    datum = "image" if result["bits_per_dim"] else "row"
    rows = [
        (name.replace("_", " "), result[name], 3, "")
        for name in ("elbo", "reconstruction", "kl", "log_likelihood")
    ]
    if published:
        rows[-1] = (*rows[-1][:3], f"{published['log_likelihood']:.2f}")
    if result["bits_per_dim"]:
        rows.append(("bits per dimension", result["bits_per_dim"], 4, ""))
    if pareto_k:
        rows.append((f"share with k-hat >= {pareto_k['threshold']:.2f}", pareto_k, 4, ""))
    if "labels" in result:
        greatest = f"at most {result['labels']['greatest_information']:.3f}"
        rows.append(("label's information", result["labels"]["information"], 3, greatest))
        rows.append(("accuracy of argmax p(x | c)", result["labels"]["accuracy"], 4, ""))
    body = tabulate(
        [
            (name, f"{v['estimate']:.{digits}f}", f"{v['standard_error']:.{digits}f}", note)
            for name, v, digits, note in rows
        ],
        (f"test set, nats per {datum}", "estimate", "standard error", "target"),
        disable_numparse=True,
        colalign=("left", *["right"] * 3),
    )
    likelihood = result["log_likelihood"]
    return (
        f"{result['dataset']}: {num_data['train']} training and {num_data['test']} test {datum}s; "
        f"{result['num_parameters']} parameters\n\n{body}\n\n"
        f"log likelihood: {likelihood['num_samples']} importance samples per {datum}, Monte Carlo "
        f"error {likelihood['monte_carlo_error']:.3f}"
        + ("" if pareto_k else f"; k-hat: not available, needs {FEWEST_FOR_TAIL} samples")
        + (f"; target: {published['source']}" if published else "")
        + f"\nactive units: {active_units(result)}"
    )


def active_units(result: Mapping[str, Any]) -> str:
    """How many dimensions of z the guide uses, in words, layer by layer."""
    layers = {
        name: f"{v['active_units']:g} of {v['num_latents']}" for name, v in result["layers"].items()
    }
    if len(layers) == 1:
        return next(iter(layers.values()))
    return ", ".join(f"{name} {words}" for name, words in sorted(layers.items()))


def figures(
    config: Config, data: Dataset, fits: Fits, judged: Judged, result: dict[str, Any]
) -> dict[str, Figure]:
    """The figures of a run. They show its first seed, but the traces of all.

    A table has no pictures: the traces are all.
    """
    fitted, z_loc = fits["fit"], judged.terms.z_loc
    words, elbo = f"{result['experiment']} on {data.name}", result["elbo"]["estimate"]
    if len(data.x_shape) == 1:
        return {"elbo": pictures.elbo_traces(fitted, words, elbo, datum="row")}
    test = fitted.prepare(data.test)
    c = None if "c" not in test else np.arange(data.num_classes or 0, dtype=test["c"].dtype)
    drawn = {
        "elbo": pictures.elbo_traces(fitted, words, elbo),
        "reconstructions": pictures.reconstructions(fitted, test, words, z_loc),
        "samples": pictures.samples(fitted, words, c),
        "interpolations": pictures.interpolations(fitted, test, words, z_loc),
    }
    last = None if c is None else c[-1]
    if len(result["layers"]) > 1:
        return drawn  # the dimensions of one layer are no picture without the others
    [layer] = result["layers"].values()
    if layer["num_latents"] == 2:
        return drawn | {"latents": pictures.plane(fitted, words, last)}
    name = "kl_per_dim" if layer["kl_per_dim"] else "activity"
    measure = "its KL (nats)" if layer["kl_per_dim"] else "variance of its mean"
    holds = np.array(layer[name]["estimate"][0])
    return drawn | {"latents": pictures.traversals(fitted, words, holds, measure, last)}


def experiment(
    name: str, config: type, published: Mapping[str, tuple[float, str]] | None = None
) -> Experiment:
    """A script on images.

    Args:
        name: the script's name.
        config: its settings, a subclass of ``Config``.
        published: by preset, a log-likelihood of MNIST and its source.
    """
    return Experiment(
        name=name,
        config=config,
        data=config.data,
        programs=programs,
        training=training,
        judge=judge,
        summarize=partial(summarize, published=published or {}),
        tree=tree,
        figures=figures,
        table=table,
    )
