"""How fast ``fit`` is on two layers with importance weights, and with an autoregressive guide.

    python experiments/benchmarks/ladder.py

Each part has ``fit`` beside scans written by hand, without NumPyro, as in ``speed.py``: one
``lax.scan`` over shuffle, gather, binarisation, gradient and Adam.

(a) Burda, Grosse & Salakhutdinov 2016, two stochastic layers: the preset ``burda-two-layers`` of
``models/hierarchical.py``, its guide ``BottomUp``, and the importance-weighted bound of five draws.

(b) Kingma et al. 2016: the preset ``numpyro`` of ``models/vae.py`` and the guide
``inverse_autoregressive`` with two maps, by the ELBO.

The plain scan has JAX's own functions and random numbers. In the tuned one, gradients reuse
exp(-|x|), and the pixels' noise is a hash, as ``fit`` has them.
"""

import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import random
from numpyro.infer import Trace_ELBO

from experiments.benchmarks.speed import (
    TUNED,
    Contestants,
    binarize,
    by_fit,
    by_hand,
    hashed_words,
    log_one_plus_exp,
    measure,
    tuned_softplus,
)
from experiments.settings import check_least
from inference import ImportanceWeighted
from models import guides, hierarchical, vae
from models.networks import SCALE_FLOOR


@dataclass(frozen=True)
class Config:
    """Time ``fit`` on two layers and on an autoregressive guide, beside hand-written JAX.

    Attributes:
        layers_steps: Steps of the two layers. 0 leaves them out.
        flow_steps: Steps of the autoregressive guide. 0 leaves it out.
        num_particles: Draws of the importance-weighted bound.
        layers_batch_size: Images per step of the two layers.
        flow_batch_size: Images per step of the autoregressive guide.
        num_images: Number of random images.
        rounds: How often each contestant runs.
    """

    layers_steps: int = 60
    flow_steps: int = 120
    num_particles: int = 5
    layers_batch_size: int = 100
    flow_batch_size: int = 128
    num_images: int = 60_000
    rounds: int = 5

    def __post_init__(self):
        check_least(0, self, "layers_steps", "flow_steps")
        check_least(1, self, "num_particles", "layers_batch_size", "flow_batch_size", "rounds")
        check_least(max(self.layers_batch_size, self.flow_batch_size), self, "num_images")


# --- what both parts share ------------------------------------------------------------------------


def weights(key, sizes):
    """The layers of some networks: by name, the lengths of its input, hidden layers and output."""
    return {
        name: [
            {
                "w": random.normal(random.fold_in(random.fold_in(key, i), j), size)
                / size[0] ** 0.5,
                "b": jnp.zeros(size[1]),
            }
            for j, size in enumerate(itertools.pairwise(lengths))
        ]
        for i, (name, lengths) in enumerate(sizes.items())
    }


def apply(layers, inputs, activation):
    """A multilayer perceptron."""
    for layer in layers[:-1]:
        inputs = activation(inputs @ layer["w"] + layer["b"])
    return inputs @ layers[-1]["w"] + layers[-1]["b"]


def gaussian(outputs, softplus):
    """Location and scale."""
    loc, raw = jnp.split(outputs, 2, axis=-1)
    return loc, softplus(raw) + SCALE_FLOOR


def log_normal(z, loc, scale):
    """The log density of independent Normals, without its constant: they cancel in p / q."""
    return (-0.5 * ((z - loc) / scale) ** 2 - jnp.log(scale)).sum(-1)


def contestants(
    loss: Callable[..., Any],
    init: Callable[[Any], Any],
    programs: tuple[Any, Any],
    objective: Any,
    images: dict[str, np.ndarray],
    batch_size: int,
    steps: int,
) -> Contestants:
    """Both scans and ``fit``."""
    tuned = partial(loss, softplus=tuned_softplus, log_one_plus_exp=tuned_softplus)
    plain_words, hashed = binarize, partial(binarize, words=hashed_words)
    scans = {"hand-written scan": (loss, plain_words), TUNED: (tuned, hashed)}
    found: Contestants = {
        name: (by_hand(one, init, images, batch_size, steps, prepare=prepare), steps)
        for name, (one, prepare) in scans.items()
    }
    settings: dict[str, Any] = {"num_steps": steps, "batch_size": batch_size}
    prepare = programs[0].prepare
    ours = by_fit(*programs, images, objective=objective, preprocess=prepare, **settings)
    return found | {"fit": (ours, steps)}


# --- (a) two layers -------------------------------------------------------------------------------

LAYERS = hierarchical.PRESETS["burda-two-layers"]


def layers_init(key, model=LAYERS):
    """The weights of the five networks of two layers."""
    pixels, (lower, upper) = math.prod(model.x_shape), model.sizes
    hidden, between = model.hidden, model.above[0].hidden
    sizes = {
        "encoder": (pixels, *hidden[::-1], 2 * lower),
        "z2_from_below": (lower, *between[::-1], 2 * upper),
        "z1_from_above": (upper, *between, 2 * lower),
        "decoder": (lower, *hidden, pixels),
    }
    return weights(key, sizes)


def layers_loss(
    params,
    key,
    x,
    num_particles=5,
    softplus=jax.nn.softplus,
    log_one_plus_exp=log_one_plus_exp,
    activation=jnp.tanh,
):
    """Minus the importance-weighted bound of two layers and ``BottomUp``, by hand."""
    run = lambda name, inputs: apply(params[name], inputs, activation)  # noqa: E731
    x = x.reshape(len(x), -1)
    keys = random.split(key)
    loc1, scale1 = gaussian(run("encoder", x), softplus)
    e1 = random.normal(keys[0], (num_particles, *loc1.shape))
    z1 = loc1 + scale1 * e1
    loc2, scale2 = gaussian(run("z2_from_below", z1), softplus)
    z2 = loc2 + scale2 * random.normal(keys[1], loc2.shape)
    log_q = log_normal(z1, loc1, scale1) + log_normal(z2, loc2, scale2)
    logits = run("decoder", z1)
    log_x = (x * logits - log_one_plus_exp(logits)).sum(-1)
    prior1 = gaussian(run("z1_from_above", z2), softplus)
    log_p = log_x + log_normal(z1, *prior1) - 0.5 * (z2**2).sum(-1)
    return -jnp.mean(jax.nn.logsumexp(log_p - log_q, axis=0) - math.log(num_particles))


def layers_contestants(config: Config, images: dict[str, np.ndarray]) -> Contestants:
    """The contestants on two layers, with their numbers of steps."""
    return contestants(
        partial(layers_loss, num_particles=config.num_particles),
        layers_init,
        (LAYERS, hierarchical.BottomUp(LAYERS)),
        ImportanceWeighted(config.num_particles),
        images,
        config.layers_batch_size,
        config.layers_steps,
    )


# --- (b) an autoregressive guide ------------------------------------------------------------------

FLOW = vae.PRESETS["numpyro"]
NUM_MAPS, NUM_HIDDEN = 2, 32


def flow_init(key, model=FLOW):
    """The weights of the encoder, of the decoder and of the maps."""
    pixels, latents = math.prod(model.x_shape), model.num_latents
    sizes = {
        "encoder": (pixels, *model.hidden[::-1], 2 * latents + NUM_HIDDEN),
        "decoder": (latents, *model.hidden, pixels),
    }
    sizes |= {f"map{i}": (latents + NUM_HIDDEN, NUM_HIDDEN, 2 * latents) for i in range(NUM_MAPS)}
    found: dict[str, Any] = weights(key, sizes)
    for i in range(NUM_MAPS):
        found[f"direct{i}"] = 0.1 * random.normal(random.fold_in(key, i), (latents, 2 * latents))
    return found


def masks(size, num_context, num_hidden, is_reversed):
    """The connections of an autoregressive network that stay (Germain et al. 2015)."""
    place = np.arange(1, size + 1)[:: -1 if is_reversed else 1]
    degree = np.arange(num_hidden) * size // num_hidden
    context = np.ones((num_context, num_hidden), bool)
    both = np.concatenate([place, place])
    first = np.concatenate([place[:, None] <= degree, context])
    return first, degree[:, None] < both, place[:, None] < both


def flow_loss(
    params,
    key,
    x,
    softplus=jax.nn.softplus,
    log_one_plus_exp=log_one_plus_exp,
    activation=None,
):
    """The negative ELBO of a VAE and ``inverse_autoregressive``, by hand."""
    activation = activation or softplus
    x = x.reshape(len(x), -1)
    outputs = apply(params["encoder"], x, activation)
    num_latents = (outputs.shape[-1] - NUM_HIDDEN) // 2
    numbers, context = jnp.split(outputs, [2 * num_latents], axis=-1)
    loc, scale = gaussian(numbers, softplus)
    e = random.normal(key, loc.shape)
    z, log_q = loc + scale * e, (-0.5 * e**2 - jnp.log(scale)).sum(-1)
    for i in range(NUM_MAPS):
        (first, last), direct = params[f"map{i}"], params[f"direct{i}"]
        kept = masks(num_latents, NUM_HIDDEN, NUM_HIDDEN, is_reversed=i % 2 == 1)
        h = jnp.concatenate([z, context], axis=-1) @ (first["w"] * kept[0]) + first["b"]
        h = jnp.tanh(h) @ (last["w"] * kept[1]) + last["b"] + z @ (direct * kept[2])
        shift, log_slope = jnp.split(h, 2, axis=-1)
        log_slope = 2 * jnp.tanh(log_slope / 2)
        z, log_q = jnp.exp(log_slope) * z + shift, log_q - log_slope.sum(-1)
    logits = apply(params["decoder"], z, activation)
    log_x = (x * logits - log_one_plus_exp(logits)).sum(-1)
    return -jnp.mean(log_x - 0.5 * (z**2).sum(-1) - log_q)


def flow_contestants(config: Config, images: dict[str, np.ndarray]) -> Contestants:
    """The contestants on the autoregressive guide, with their numbers of steps."""
    guide = guides.inverse_autoregressive(FLOW, num_layers=NUM_MAPS, num_hidden=NUM_HIDDEN)
    return contestants(
        flow_loss,
        flow_init,
        (FLOW, guide),
        Trace_ELBO(),
        images,
        config.flow_batch_size,
        config.flow_steps,
    )


def main(config: Config) -> None:
    """Prints the tables."""
    print(f"{jax.devices()[0].device_kind}, {config.rounds} rounds, medians")
    rng = np.random.default_rng(0)
    images = {"x": rng.integers(0, 256, (config.num_images, 28, 28), dtype=np.uint8)}
    if config.layers_steps:
        sizes = f"K = {config.num_particles}, batch {config.layers_batch_size}"
        print(f"\n(a) two layers 784-200-200-100-100-100-50, importance-weighted, {sizes}")
        print(measure(layers_contestants(config, images), config.rounds))
    if config.flow_steps:
        print(f"\n(b) VAE 784-400-50, inverse autoregressive, batch {config.flow_batch_size}")
        print(measure(flow_contestants(config, images), config.rounds))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:  # ``fit`` compiles its steps in every round
        jax.config.update("jax_compilation_cache_dir", cache)
        main(tyro.cli(Config))
