"""What the experiments on images share: settings, training, judging, the table, the run directory.

An experiment adds its defaults: ``experiments/mnist_vae.py``, ``experiments/mnist_cvae.py``.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from numpyro.infer.elbo import ELBO
from tabulate import tabulate

from experiments import pictures
from experiments.datasets import Dataset, load
from experiments.runs import (
    Run,
    check_known,
    check_least,
    check_positive,
    import_ahead,
    trace_attributes,
)
from inference import (
    OBJECTIVES,
    Estimate,
    Fit,
    FreeBits,
    Held,
    KLWarmUp,
    KLWeighted,
    elbo_terms,
    encode,
    fit,
    label_check,
    log_likelihood,
    pareto_k_threshold,
    to_datatree,
)
from inference.evaluation import FEWEST_FOR_TAIL
from models import cvae, guides, vae
from models.conditions import Labels
from models.likelihoods import LIKELIHOODS

PER_DATUM_STEPS = 1000  # in which a per-datum guide is fitted to the test images
TEST_SEED = 20_150_901  # held-out images are binarised once, the same for every run and seed

ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


def burda_schedule(learning_rate: float, num_steps: int) -> optax.Schedule:
    """3^i shares of the run at learning_rate * 10^(-i/7), i = 0..7 (Burda et al. 2016, section 5).

    Args:
        learning_rate: the first share's; 1e-3 in the paper.
        num_steps: all shares together; 3280 passes over the data in the paper.
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
class Config:
    """Settings of an experiment on images.

    Attributes:
        dataset: mnist, svhn, digits, the path of a user's own .npz or .npy, or auto for MNIST
            where it can be had and digits elsewhere.
        data_dir: directory with the data set's files, compressed or not, to read offline.
        num_validation: images held out of the training; the data set's usual number unless given,
            and none with the guide per-datum, which knows the training images alone.
        num_train: the first so many of the training images; all unless given.
        num_test: the first so many of the test images; all unless given.
        preset: the model to start from, by name; the settings from hidden to likelihood change it.
        guide: mean-field, low-rank, full-covariance, flow, prior, semi-amortised, or per-datum,
            which trains on all images at once and is fitted anew to the test images.
        hidden: units of the decoder's hidden layers, from z to x.
        channels: of the convolutions between the image and the dense layers, from x to z.
        encoder_hidden: units of the encoder's, from x to z; the decoder's reversed unless given.
        num_latents: dimensions of z.
        activation: relu, tanh, sigmoid, softplus, silu or gelu.
        likelihood: bernoulli, gaussian, gaussian-one-scale, gaussian-identity or
            discretized-logistic.
        dtype: in which the networks compute, float32 or bfloat16.
        objective: Trace_ELBO, TraceMeanField_ELBO, RenyiELBO (or importance-weighted, the same),
            doubly-reparameterized or sticking-the-landing.
        num_particles: draws of z per image and step.
        beta: weight of the KL divergence in the gradient; 1 is the ELBO's.
        free_bits: nats per image below which a dimension's divergence costs nothing.
        num_epochs: passes over the training images.
        batch_size: images per step; 128, or all there are if fewer, unless given.
        learning_rate: Adam's, at the first step.
        schedule: constant, cosine (to zero) or burda (eight falling rates).
        clip_norm: the greatest norm of a gradient; not clipped unless given.
        kl_warm_up: epochs over which the weight of the KL divergence rises from 0 to 1.
        average: fraction of the run, at its end, over which parameters are averaged.
        patience: stop after so many epochs without a better held-out ELBO, and keep the best.
        num_samples: importance samples per test image.
        num_seeds: restarts trained together.
        seed: of the first restart.
        out: directory of the run; a fresh one under runs/ unless given.
        progress: whether to show progress bars.
    """

    dataset: str = "auto"
    data_dir: Path | None = None
    num_validation: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    preset: str = "numpyro"
    guide: str = "mean-field"
    hidden: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    encoder_hidden: tuple[int, ...] | None = None
    num_latents: int | None = None
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
        check_known(self, preset=vae.PRESETS, guide=guides.GUIDES, activation=ACTIVATIONS)
        check_known(self, likelihood=LIKELIHOODS, objective=OBJECTIVES, schedule=SCHEDULES)
        check_least(1, self, "num_train", "num_test", "num_latents", "num_epochs", "batch_size")
        check_least(1, self, "num_particles", "patience", "num_samples", "num_seeds")
        check_least(0, self, "seed")
        check_positive(self, "learning_rate", "clip_norm")
        if not 0 <= self.kl_warm_up <= self.num_epochs:
            raise ValueError(
                f"kl_warm_up: expected 0 to num_epochs = {self.num_epochs}, got {self.kl_warm_up}; "
                f"a longer one would never train the ELBO itself"
            )
        for name in ("num_validation", "batch_size"):
            if self.guide == "per-datum" and getattr(self, name):
                raise ValueError(
                    f"{name}: expected none with the guide per-datum, whose every step takes all "
                    f"training images, got {getattr(self, name)}; leave it out"
                )
        for name in ("beta", "free_bits"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name}: expected a finite number from 0, got {getattr(self, name)}"
                )
        self.elbo(warm_up=1)

    def elbo(self, warm_up: int) -> ELBO:
        """What is trained.

        Args:
            warm_up: steps over which the divergence's weight rises, where it is to rise.

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
        """Grey or colour images, split into training, validation and test."""
        return self._first(self._load(), ["x"])

    def _load(self) -> Dataset:
        return load(
            self.dataset,
            data_dir=self.data_dir,
            num_validation=0 if self.guide == "per-datum" else self.num_validation,
            progress=self.progress,
        )

    def _first(self, dataset: Dataset, names: Sequence[str]) -> Dataset:
        """As many data as were asked for, of the arrays ``names``."""

        def first(arrays: dict[str, np.ndarray], count: int | None) -> dict[str, np.ndarray]:
            return {name: arrays[name][:count] for name in names}

        return replace(
            dataset,
            train=first(dataset.train, self.num_train),
            validation=dataset.validation and first(dataset.validation, None),
            test=first(dataset.test, self.num_test),
        )

    def model(self, dataset: Dataset) -> Any:
        """The preset, with the settings that were given."""
        return self._change(vae.PRESETS[self.preset], dataset)

    def _change(self, preset: Any, dataset: Dataset) -> Any:
        names = ("hidden", "channels", "num_latents", "dtype")
        changes = {name: getattr(self, name) for name in names}
        changes["activation"] = ACTIVATIONS.get(self.activation or "")
        changes["likelihood"] = LIKELIHOODS.get(self.likelihood or "")
        changes = {name: value for name, value in changes.items() if value is not None}
        return replace(preset, x_shape=dataset.x_shape, **changes)

    def make_guide(self, model: Any, num_data: int) -> Any:
        """The guide of the model, for batches of so many data where it asks for their number."""
        return guides.make(self.guide, model, hidden=self.encoder_hidden, num_data=num_data)


@dataclass(frozen=True)
class LabelConfig(Config):
    """Settings of an experiment on images given their label.

    Attributes:
        prior: standard, or learned for a prior network that sees the label.
        num_embedded: length of a learned vector that stands for a label; one-hot unless given.
        num_label_samples: importance samples per test image and label, for the check of labels.
    """

    prior: str = "standard"
    num_embedded: int | None = None
    num_label_samples: int = 100

    def __post_init__(self):
        super().__post_init__()
        check_known(self, prior=("standard", "learned"))
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

    def model(self, dataset: Dataset) -> Any:
        """The preset, with the settings that were given."""
        return replace(
            self._change(cvae.PRESETS[self.preset], dataset),
            condition=Labels(dataset.num_classes or 0, self.num_embedded),
            prior_hidden=() if self.prior == "learned" else None,
        )


def held_out(model: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Images made ready once, with a fixed seed: the same data for every run."""
    return jax.jit(model.prepare)(random.key(TEST_SEED), dict(arrays))


def train(
    config: Config, model: Any, guide: Any, dataset: Dataset, checkpoint: Path | None = None
) -> Fit:
    """Fits model and guide, every step on freshly prepared images."""
    num_train = len(dataset.train["x"])
    most = num_train if config.guide == "per-datum" else 128
    batch_size = config.batch_size or min(most, num_train)
    num_steps = -(-config.num_epochs * num_train // batch_size)
    optimizer = optax.adam(SCHEDULES[config.schedule](config.learning_rate, num_steps))
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    warm_up = max(1, int(config.kl_warm_up * num_train / batch_size))
    return fit(
        model,
        guide,
        dataset.train,
        objective=config.elbo(warm_up),
        optimizer=optimizer,
        num_epochs=config.num_epochs,
        batch_size=batch_size,
        preprocess=model.prepare,
        num_seeds=config.num_seeds,
        seed=config.seed,
        average=config.average,
        validation=dataset.validation and held_out(model, dataset.validation),
        validate_every=max(1, num_train // batch_size) if dataset.validation else None,
        patience=config.patience,
        checkpoint=checkpoint,
        progress=config.progress,
    )


def judge(
    config: Config, model: Any, guide: Any, params: Mapping[str, Any], test: Mapping[str, Any]
) -> dict[str, Any]:
    """Every seed's terms of the ELBO and log-likelihood on the test images, pointwise."""
    key = random.fold_in(random.key(TEST_SEED), config.seed)
    judged = {"terms": [], "log_likelihood": [], "z": []}
    together: dict[str, Any] = {}
    for i in range(config.num_seeds):
        seed_params = pictures.of_seed(params, i)
        if config.guide == "per-datum":
            guide, seed_params = fit_anew(config, model, seed_params, test)
            together = {"batch_size": len(test["x"])}
        common = (model, guide, seed_params, test)
        judged["terms"].append(elbo_terms(*common, key=key, num_samples=10, **together))
        judged["log_likelihood"].append(
            log_likelihood(
                *common,
                key=key,
                num_samples=config.num_samples,
                progress=config.progress,
                **together,
            )
        )
        judged["z"].append(encode(guide, seed_params, test["x"], test.get("c"), key=key))
    return judged


def fit_anew(
    config: Config, model: Any, params: Mapping[str, Any], test: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The per-datum guide of the test images, fitted to the model as it is; all parameters."""
    guide = config.make_guide(model, len(test["x"]))
    kept = {name: value for name, value in params.items() if name not in ("z_loc", "z_scale")}
    fitted = fit(
        Held(model, kept),
        guide,
        test,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, PER_DATUM_STEPS)),
        num_steps=PER_DATUM_STEPS,
        batch_size=len(test["x"]),
        seed=config.seed,
        progress=config.progress,
    )
    return guide, kept | pictures.of_seed(fitted.params, 0)


def estimate(per_seed: list[Estimate]) -> dict[str, Any]:
    """A quantity as ``result.json`` has it: the mean over seeds and test images."""
    values = np.mean([e.pointwise for e in per_seed], axis=0, dtype=np.float64)
    summary = {
        "estimate": float(values.mean()),
        "standard_error": float(values.std() / np.sqrt(len(values))),
        "num_samples": per_seed[0].num_samples,
    }
    if len(per_seed) > 1:
        summary["per_seed"] = [e.estimate for e in per_seed]
    errors = [e.monte_carlo_error for e in per_seed]
    if np.isfinite(errors).all():
        summary["monte_carlo_error"] = float(np.sqrt(np.sum(np.square(errors))) / len(errors))
    return summary


def summarize(
    name: str, config: Config, model: Any, fitted: Fit, judged: dict[str, Any], dataset: Dataset
) -> dict[str, Any]:
    """The numbers of ``result.json``."""
    terms = judged["terms"]
    test: dict[str, Any] = {
        part: estimate([getattr(t, part) for t in terms])
        for part in ("elbo", "reconstruction", "kl")
    }
    test["log_likelihood"] = estimate(judged["log_likelihood"])
    high = [e.high_pareto_k for e in judged["log_likelihood"]]
    threshold = pareto_k_threshold(config.num_samples)
    test["pareto_k"] = None if None in high else estimate(high) | {"threshold": threshold}
    num_dims = int(np.prod(model.x_shape))
    test["bits_per_dim"] = {
        "estimate": float(
            model.likelihood.bits_per_dim(test["log_likelihood"]["estimate"], num_dims)
        ),
        "standard_error": test["log_likelihood"]["standard_error"] / (num_dims * np.log(2)),
    }
    per_dim = None  # where the divergence is no sum over dimensions
    if terms[0].kl_per_dim:
        values = np.stack([t.kl_per_dim["z"] for t in terms]).mean(0)
        per_dim = {
            "estimate": values.mean(0).tolist(),
            "standard_error": (values.std(0) / np.sqrt(len(values))).tolist(),
        }
    variance, error = terms[0].activity["z"]
    active = [int(t.active["z"].sum()) for t in terms]
    settings = json.loads(json.dumps(asdict(config), default=str))
    leaves = jax.tree.leaves(fitted.params)
    return {
        "experiment": name,
        "config": settings,
        "dataset": dataset.name,
        "num_data": {
            split: len(arrays["x"])
            for split in ("train", "validation", "test")
            if (arrays := getattr(dataset, split)) is not None
        },
        "num_parameters": sum(p.size for p in leaves) // config.num_seeds,
        "num_latents": model.num_latents,
        "test": test,
        "active_units": active[0] if len(active) == 1 else float(np.mean(active)),
        "activity": {"estimate": variance.tolist(), "standard_error": error.tolist()},
        "kl_per_dim": per_dim,
        "num_steps": fitted.info["num_steps"],
        "seconds": {key: fitted.info["seconds"][key] for key in ("compile", "run")},
        "device": fitted.info["device"],
        "versions": fitted.info["versions"],
    }


def table(result: dict[str, Any], published: tuple[float, str] | None) -> str:
    """The result as a person reads it, the published number beside it."""
    test, seconds, num_data = result["test"], result["seconds"], result["num_data"]
    rows = [
        (name.replace("_", " "), test[name], 3, "")
        for name in ("elbo", "reconstruction", "kl", "log_likelihood")
    ]
    if published:
        rows[-1] = (*rows[-1][:3], f"{published[0]:.2f}")
    rows.append(("bits per dimension", test["bits_per_dim"], 4, ""))
    pareto_k = test.get("pareto_k")
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
        ("test set, nats per image", "estimate", "standard error", "target"),
        disable_numparse=True,
        colalign=("left", *["right"] * 3),
    )
    likelihood = test["log_likelihood"]
    return (
        f"\n{result['dataset']}: {num_data['train']} training and {num_data['test']} test images; "
        f"{result['num_parameters']} parameters\n\n{body}\n\n"
        f"log likelihood: {likelihood['num_samples']} importance samples per image, Monte Carlo "
        f"error {likelihood['monte_carlo_error']:.3f}"
        + ("" if pareto_k else f"; k-hat: not available, needs {FEWEST_FOR_TAIL} samples")
        + (f"; target: {published[1]}" if published else "")
        + f"\nactive units: {result['active_units']} of {result['num_latents']}\n"
        f"{result['device']}: compiling {seconds['compile']:.1f} s, training "
        f"{seconds['run']:.1f} s, judging {seconds['evaluate']:.1f} s, in all "
        f"{seconds['total']:.1f} s\n"
    )


def run(
    name: str, config: Config, published: Mapping[str, tuple[float, str]] | None = None
) -> dict[str, Any]:
    """Trains, judges, draws and writes; or reads what the same command wrote before.

    Args:
        name: the experiment's.
        config: a ``LabelConfig`` for images given their label.
        published: by preset, a log-likelihood of MNIST and where it stands.
    """
    began = time.perf_counter()
    dataset = config.data()
    model = config.model(dataset)
    directory = Run(name, config)
    result = directory.read("result.json")
    if result is None:
        import_ahead("orbax.checkpoint", "matplotlib.backends.backend_agg", "arviz_stats")
        guide = config.make_guide(model, len(dataset.train["x"]))
        fitted = train(config, model, guide, dataset, directory.path / "checkpoints")
        judging = time.perf_counter()
        test = held_out(model, dataset.test)
        judged = judge(config, model, guide, fitted.params, test)
        result = summarize(name, config, model, fitted, judged, dataset)
        # numbers of each datum know its own label alone
        if isinstance(config, LabelConfig) and "c" in test and config.guide != "per-datum":
            result["labels"] = check_labels(config, model, guide, fitted, test)
        result["seconds"]["evaluate"] = time.perf_counter() - judging
        z_loc = judged["terms"][0].z_loc["z"]
        pictures.draw(result, model, fitted, z_loc, test, directory.path)
        write_trace(directory.path / "trace.nc", fitted, judged, test, result)
        result["seconds"]["total"] = time.perf_counter() - began
        directory.write("result.json", result)
    as_published = dataset.name == "mnist" and model == vae.PRESETS[config.preset]
    as_published &= config.guide == "mean-field"
    target = (published or {}).get(config.preset) if as_published else None
    print(table(result, target))
    print(f"written to {directory.path}")
    return result


def check_labels(
    config: LabelConfig, model: Any, guide: Any, fitted: Fit, test: Mapping[str, Any]
) -> dict[str, Any]:
    """What the first seed's model knows of the labels."""
    num_classes = model.condition.num_classes
    check = label_check(
        model,
        guide,
        pictures.of_seed(fitted.params, 0),
        test,
        num_classes,
        key=random.key(config.seed),
        num_samples=config.num_label_samples,
        progress=config.progress,
    )
    return {
        "information": estimate([check.information]),
        "greatest_information": float(np.log(num_classes)),
        "accuracy": estimate([check.accuracy]),
    }


def write_trace(
    path: Path,
    fitted: Fit,
    judged: Mapping[str, Any],
    test: Mapping[str, Any],
    result: Mapping[str, Any],
) -> None:
    """ELBO traces, and of every test image its log-likelihood and a draw of z, for ArviZ."""
    likelihoods = judged["log_likelihood"]
    evaluation = {"elbo": np.stack([t.elbo.pointwise for t in judged["terms"]])}
    if likelihoods[0].pareto_k is not None:
        evaluation["pareto_k"] = np.stack([e.pareto_k for e in likelihoods])
    tree = to_datatree(
        fitted,
        posterior={"z": np.stack([np.asarray(z) for z in judged["z"]])[:, None]},
        log_likelihood={"x": np.stack([e.pointwise for e in likelihoods])[:, None]},
        evaluation=evaluation,
        constant_data={"c": test["c"]} if "c" in test else None,
        dims={"z": ["datum", "latent"], "x": ["datum"], "c": ["datum"]},
    )
    tree.attrs |= trace_attributes(
        result["experiment"], result["config"], result["dataset"], test
    ) | {"num_samples": likelihoods[0].num_samples}
    tree.to_netcdf(path, engine="h5netcdf")
