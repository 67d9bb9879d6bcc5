"""How fast ``fit`` is beside the same arithmetic by hand and beside NumPyro's own ``SVI.run``.

    python experiments/benchmarks/speed.py

Every contestant runs the same number of steps in turn, round after round. The table gives medians
of the steady loop without compilation, and ratios to the scans written by hand. Absolute times hold
for this machine alone.

The hand-written scans use no NumPyro. They are one ``lax.scan`` over shuffle, gather, gradient and
Adam. The order of data comes from the same function that ``fit`` uses. The plain scan has JAX's own
functions and random numbers. The tuned scan of the VAE is as fast as we can write it: gradients
reuse exp(-|x|), and the pixels' noise is a hash.
"""

import contextlib
import io
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import tyro
from flax import nnx
from jax import lax, random
from numpyro.infer import SVI, Trace_ELBO
from tabulate import tabulate

from inference import fit
from inference._shuffle import epoch_word, permute
from models import gaussian_mean, guides, vae
from models.networks import SCALE_FLOOR, Decoder


@dataclass(frozen=True)
class Config:
    """Time ``fit`` beside hand-written JAX and NumPyro's SVI.run.

    Attributes:
        toy_steps: Steps of the Gaussian unknown mean, at batch 1,000 from 100,000 data.
        vae_epochs: Epochs of the 784-400-50-400-784 VAE, at batch 128 from 60,000 images. 0 leaves
            the VAE out.
        svhn_steps: Steps of the convolutional VAE, at batch 100. 0 leaves it out.
        rounds: How often each contestant runs.
    """

    toy_steps: int = 10_000
    vae_epochs: float = 1.0
    svhn_steps: int = 100
    rounds: int = 5


Timing = tuple[float, float]  # seconds to compile, seconds of the steady loop
Contestants = dict[str, tuple[Callable[[], Timing], int]]  # by name, with the number of steps


def by_hand(
    loss: Callable[..., Any],
    init: Callable[[Any], Any],
    data: dict[str, Any],
    batch_size: int,
    num_steps: int,
    prepare: Callable[[Any, Any], Any] = lambda key, batch: batch,
    learning_rate: float = 1e-3,
    sort: bool = False,
    num_seeds: int = 1,
) -> Callable[[], Timing]:
    """A contestant: one scan in plain JAX. ``loss(params, key, **batch)`` is per datum.

    With ``sort`` the order of each epoch comes from ``jax.random.permutation``. Several seeds
    are one scan over a vmapped step.
    """
    optimizer = optax.adam(learning_rate)
    num_data = len(next(iter(data.values())))
    data = jax.device_put(data)

    def step(data, carry, t):
        params, state, key, rows = carry
        key, batch_key, draw_key = random.split(key, 3)
        start = t * batch_size % num_data
        if sort:
            rows = lax.cond(
                start < batch_size,
                lambda: random.permutation(batch_key, num_data),
                lambda: rows,
            )
            index = lax.dynamic_slice_in_dim(rows, start, batch_size)
        else:
            word = epoch_word(rows, t * batch_size // num_data)
            index = permute((start + jnp.arange(batch_size)) % num_data, num_data, word)
        batch = prepare(batch_key, {name: array[index] for name, array in data.items()})
        value, gradient = jax.value_and_grad(loss)(params, draw_key, **batch)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state, key, rows), value

    def start(seed):
        params = init(random.key(seed))
        rows = jnp.arange(num_data) if sort else seed.astype(jnp.uint32)
        return params, optimizer.init(params), random.key(seed), rows

    if num_seeds == 1:
        carry = start(jnp.int32(0))
    else:
        carry = jax.vmap(start)(jnp.arange(num_seeds))
        step = jax.vmap(step, (None, 0, None))
    compiled = None

    def scan(carry, data):
        return lax.scan(partial(step, data), carry, jnp.arange(num_steps))

    def run() -> Timing:
        nonlocal compiled
        began = time.perf_counter()
        if compiled is None:
            compiled = jax.jit(scan).lower(carry, data).compile()
        middle = time.perf_counter()
        jax.block_until_ready(compiled(carry, data))
        return middle - began, time.perf_counter() - middle

    return run


def by_fit(*args: Any, terminal: bool = False, **kwargs: Any) -> Callable[[], Timing]:
    """A contestant: ``fit``, with its progress bar drawn on a pretended terminal or without."""

    def run() -> Timing:
        with contextlib.redirect_stderr(_Terminal() if terminal else sys.stderr):
            seconds = fit(*args, progress=terminal, **kwargs).info["seconds"]
        return seconds["compile"], seconds["run"]

    return run


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def by_svi_run(
    model: Any, guide: Any, batch: dict[str, Any], num_steps: int, progress_bar: bool
) -> Callable[[], Timing]:
    """A contestant: ``SVI.run`` on one whole batch; a run of one step is taken for compiling."""

    def run() -> Timing:
        seconds = []
        for steps in (1, num_steps):
            svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
            began = time.perf_counter()
            with contextlib.redirect_stderr(_Terminal()):
                result = svi.run(random.key(0), steps, progress_bar=progress_bar, **batch)
            jax.block_until_ready(result.losses)
            seconds.append(time.perf_counter() - began)
        return seconds[0], seconds[1] - seconds[0]

    return run


# --- (a) the toy ----------------------------------------------------------------------------------


def log_normal(value, mean, log_variance):
    """log Normal(value; mean, exp(log_variance)), without a division."""
    return -0.5 * (
        (value - mean) ** 2 * jnp.exp(-log_variance) + log_variance + jnp.log(2 * jnp.pi)
    )


def numpyro_log_normal(value, mean, log_variance):
    """The same by NumPyro, which divides by the deviation."""
    return dist.Normal(mean, jnp.exp(log_variance / 2)).log_prob(value)


def toy_loss(params, key, c, x, log_normal=log_normal):
    """The negative ELBO of ``models.gaussian_mean`` with sigma_0 = 1, by hand."""
    loc = params["phi_1"] * x + params["phi_2"] * c + params["phi_3"]
    z = loc + jnp.exp(params["phi_4"] / 2) * random.normal(key, x.shape)
    return -jnp.mean(
        log_normal(z, params["theta_1"] + params["theta_2"] * c, 0.0)
        + log_normal(x, z, params["theta_3"])
        - log_normal(z, loc, params["phi_4"])
    )


def toy_loss_by_site(params, key, c, x):
    """The same as NumPyro computes it: keys split three times, its density, a sum for each site."""
    for _ in range(3):
        _, key = random.split(key)
    loc = params["phi_1"] * x + params["phi_2"] * c + params["phi_3"]
    z = loc + jnp.exp(params["phi_4"] / 2) * random.normal(key, x.shape)
    log_p_z = numpyro_log_normal(z, params["theta_1"] + params["theta_2"] * c, 0.0).sum()
    log_p_x = numpyro_log_normal(x, z, params["theta_3"]).sum()
    log_q = numpyro_log_normal(z, loc, params["phi_4"]).sum()
    return -(log_p_z + log_p_x - log_q) / len(x)


def toy(config: Config) -> Contestants:
    """The contestants on the Gaussian unknown mean, with their numbers of steps."""
    data = gaussian_mean.Truth().simulate(100_000, seed=0)
    model, guide = gaussian_mean.Model(), gaussian_mean.Guide()
    steps = config.toy_steps
    settings: dict[str, Any] = {"num_steps": steps, "batch_size": 1_000}
    batch = {name: jnp.asarray(array[:1_000]) for name, array in data.items()}
    few = max(
        steps // 10, 1
    )  # SVI.run with its bar needs a minute for what the rest do in a second

    def init(key):
        return {name: jnp.zeros(()) for name in gaussian_mean.PARAMETERS}

    return {
        "hand-written scan": (by_hand(toy_loss, init, data, 1_000, steps), steps),
        "hand-written scan, NumPyro's density": (
            by_hand(partial(toy_loss, log_normal=numpyro_log_normal), init, data, 1_000, steps),
            steps,
        ),
        "hand-written scan, keys and sums of sites too": (
            by_hand(toy_loss_by_site, init, data, 1_000, steps),
            steps,
        ),
        "hand-written scan, sorting each epoch": (
            by_hand(toy_loss, init, data, 1_000, steps, sort=True),
            steps,
        ),
        "hand-written scan, 8 seeds": (
            by_hand(toy_loss, init, data, 1_000, steps, num_seeds=8),
            steps,
        ),
        "fit": (by_fit(model, guide, data, **settings), steps),
        "fit, progress bar": (by_fit(model, guide, data, terminal=True, **settings), steps),
        "fit, 8 seeds": (by_fit(model, guide, data, num_seeds=8, **settings), steps),
        "SVI.run on one batch": (by_svi_run(model, guide, batch, steps, False), steps),
        "SVI.run on one batch, progress bar": (by_svi_run(model, guide, batch, few, True), few),
    }


# --- (b) the VAE of NumPyro's example -------------------------------------------------------------

TUNED = "hand-written scan, tuned"
MODEL = vae.PRESETS["numpyro"]
GUIDE = guides.mean_field(MODEL)


def vae_init(key, model=MODEL):
    """Weights of both networks, e1, e2, ... and d1, d2, ...: 784 -> 400 -> (50, 50) and back."""
    pixels, latents = math.prod(model.x_shape), model.num_latents
    encoder, decoder = (pixels, *model.hidden[::-1], 2 * latents), (latents, *model.hidden, pixels)
    sizes = {
        f"{name}{i}": size
        for name, widths in (("e", encoder), ("d", decoder))
        for i, size in enumerate(itertools.pairwise(widths), 1)
    }
    return {
        name: {
            "w": random.normal(random.fold_in(key, i), size) / size[0] ** 0.5,
            "b": jnp.zeros(size[1]),
        }
        for i, (name, size) in enumerate(sizes.items())
    }


def log_one_plus_exp(x):
    """log(1 + exp x). JAX derives its gradient."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@jax.custom_jvp
def tuned_softplus(x):
    """log(1 + exp x). Its gradient reuses exp(-|x|)."""
    return log_one_plus_exp(x)


@tuned_softplus.defjvp
def _tuned_softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    decay = jnp.exp(-jnp.abs(x))
    return jnp.maximum(x, 0) + jnp.log1p(decay), jnp.where(x < 0, decay, 1) / (1 + decay) * dx


def vae_loss(
    params,
    key,
    x,
    softplus=jax.nn.softplus,
    log_one_plus_exp=log_one_plus_exp,
    activation=None,
    dtype=jnp.float32,
):
    """The negative ELBO of ``MODEL`` and ``GUIDE``, by hand, or of another VAE without a condition.

    Its layers are those of ``params``. The softplus is the activation unless another one is given.
    """

    def affine(inputs, layer):
        return inputs.astype(dtype) @ layer["w"].astype(dtype) + layer["b"].astype(dtype)

    def network(name, inputs):
        *hidden, last = (params[key] for key in sorted(params) if key.startswith(name))
        for layer in hidden:
            inputs = (activation or softplus)(affine(inputs, layer))
        return affine(inputs, last).astype(jnp.float32)

    x = x.reshape(len(x), -1)
    loc, raw = jnp.split(network("e", x), 2, axis=-1)
    scale = softplus(raw) + SCALE_FLOOR
    noise = random.normal(key, loc.shape)
    z = loc + scale * noise
    logits = network("d", z)
    log_x = (x * logits - log_one_plus_exp(logits)).sum(-1)
    log_ratio = (-0.5 * z**2 + 0.5 * ((z - loc) / scale) ** 2 + jnp.log(scale)).sum(-1)
    return -jnp.mean(log_x + log_ratio)


tuned_vae_loss = partial(vae_loss, softplus=tuned_softplus, log_one_plus_exp=tuned_softplus)


def jax_words(key, count):
    """32 random bits by JAX's generator."""
    return random.bits(key, (count,), jnp.uint32)


def hashed_words(key, count):
    """32 random bits by a hash of the place and of the key's data."""
    start, between = random.key_data(key)
    x = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + start
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15) ^ between) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def binarize(key, batch, words=jax_words):
    """16 random bits per pixel."""
    x = batch["x"]
    halves = lax.bitcast_convert_type(words(key, x.size // 2), jnp.uint16).reshape(x.shape)
    threshold = x.astype(jnp.float32) * (2**16 / 255)
    return {"x": (halves.astype(jnp.float32) + 0.5 < threshold).astype(jnp.float32)}


def binarize_plainly(key, batch):
    """As JAX has it: 32 random bits per pixel."""
    grey = batch["x"].astype(jnp.float32) / 255
    return {"x": random.bernoulli(key, grey).astype(jnp.float32)}


def mapped(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays in files without a name."""
    found = {}
    for name, array in arrays.items():
        with tempfile.TemporaryFile() as file:  # mapped, it outlives its closing
            found[name] = np.memmap(file, array.dtype, "w+", shape=array.shape)
        found[name][:] = array
    return found


@dataclass(frozen=True)
class Source:
    """The same arrays, one datum at a time."""

    arrays: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return {name: array[number] for name, array in self.arrays.items()}


def vae_contestants(config: Config) -> Contestants:
    """The contestants on a VAE of MNIST's size, with their numbers of steps."""
    rng = np.random.default_rng(0)
    images = {"x": rng.integers(0, 256, (60_000, 28, 28), dtype=np.uint8)}
    steps = max(1, round(config.vae_epochs * 60_000 / 128))
    batch = {"x": jnp.asarray((images["x"][:128] > 127).astype(np.float32))}
    settings: dict[str, Any] = {"num_steps": steps, "batch_size": 128, "preprocess": MODEL.prepare}
    plain, tuned = (
        partial(by_hand, loss, vae_init, images, 128, steps) for loss in (vae_loss, tuned_vae_loss)
    )
    return {
        "hand-written scan": (plain(prepare=binarize), steps),
        "hand-written scan, random.bernoulli": (plain(prepare=binarize_plainly), steps),
        TUNED: (tuned(prepare=partial(binarize, words=hashed_words)), steps),
        "fit": (by_fit(MODEL, GUIDE, images, **settings), steps),
        "fit, memory-mapped array": (by_fit(MODEL, GUIDE, mapped(images), **settings), steps),
        "fit, source": (by_fit(MODEL, GUIDE, Source(images), **settings), steps),
        "SVI.run on one batch (no data drawn, none binarised)": (
            by_svi_run(MODEL, GUIDE, batch, steps, False),
            steps,
        ),
    }


# --- (c) the convolutional VAE of house numbers ---------------------------------------------------

SVHN_MODEL = vae.PRESETS["svhn"]
SVHN_GUIDE = guides.mean_field(SVHN_MODEL)


def svhn_networks(rngs, model=SVHN_MODEL):
    """The encoder and the decoder, as Flax makes them."""
    decoder = Decoder(
        model.num_latents,
        model.hidden,
        model.x_shape,
        channels=model.channels,
        dtype=model.dtype,
        rngs=rngs,
    )
    return {
        "encoder": model.encoder(2 * model.num_latents, rngs=rngs),
        "decoder": decoder,
    }


def svhn_init(key, model=SVHN_MODEL):
    """The weights of both."""
    return {name: nnx.state(net) for name, net in svhn_networks(nnx.Rngs(key), model).items()}


def svhn_loss(params, key, x, model=SVHN_MODEL):
    """The negative ELBO of ``SVHN_MODEL`` and ``SVHN_GUIDE``, in Flax alone."""
    abstract = nnx.eval_shape(lambda: svhn_networks(nnx.Rngs(0), model))
    encode, decode = (
        nnx.merge(nnx.graphdef(abstract[name]), params[name]) for name in ("encoder", "decoder")
    )
    loc, raw = jnp.split(encode(x), 2, axis=-1)
    scale = jax.nn.softplus(raw) + SCALE_FLOOR
    z = loc + scale * random.normal(key, loc.shape)
    x_loc = 2 * jax.nn.sigmoid(decode(z)[:, 0]) - 1
    log_x = (-0.5 * (x - x_loc) ** 2).sum((1, 2, 3)) - x[0].size * jnp.log(2 * jnp.pi) / 2
    log_ratio = (-0.5 * z**2 + 0.5 * ((z - loc) / scale) ** 2 + jnp.log(scale)).sum(-1)
    return -jnp.mean(log_x + log_ratio)


def svhn_contestants(config: Config) -> Contestants:
    """The contestants on a convolutional VAE, with their numbers of steps."""
    rng = np.random.default_rng(0)
    images = {"x": rng.integers(0, 256, (2_000, 32, 32, 3), dtype=np.uint8)}
    steps = config.svhn_steps
    settings: dict[str, Any] = {"num_steps": steps, "batch_size": 100}
    prepare = SVHN_MODEL.prepare
    return {
        "Flax and Optax by hand": (
            by_hand(svhn_loss, svhn_init, images, 100, steps, prepare=prepare),
            steps,
        ),
        "fit": (by_fit(SVHN_MODEL, SVHN_GUIDE, images, preprocess=prepare, **settings), steps),
    }


class Timings(NamedTuple):
    """What rounds of contestants took, by name: one number for each round.

    Attributes:
        compile_seconds: seconds to compile.
        per_step: microseconds of a step.
    """

    compile_seconds: dict[str, list[float]]
    per_step: dict[str, list[float]]

    def step(self, name: str) -> float:
        """Microseconds of a step: the median of the rounds."""
        return statistics.median(self.per_step[name])

    def ratio(self, name: str, base: str) -> float:
        """The time of ``name`` divided by that of ``base``: the median of the rounds' ratios."""
        pairs = zip(self.per_step[name], self.per_step[base], strict=True)
        return statistics.median(t / b for t, b in pairs)


def in_turn(contestants: Contestants, rounds: int) -> Timings:
    """Runs all contestants in turn, ``rounds`` times."""
    timings = Timings({name: [] for name in contestants}, {name: [] for name in contestants})
    for _ in range(rounds):
        for name, (run, steps) in contestants.items():
            compiling, running = run()
            timings.compile_seconds[name].append(compiling)
            timings.per_step[name].append(running / steps * 1e6)
    return timings


def measure(contestants: Contestants, rounds: int) -> str:
    """Runs all contestants in turn, ``rounds`` times, and returns the table of medians.

    Ratios are to the first contestant, and to the tuned scan, if there is one.
    """
    timings = in_turn(contestants, rounds)
    bases = {"ratio": next(iter(contestants))}
    if TUNED in contestants:
        bases["ratio to tuned"] = TUNED
    rows = [
        (
            name,
            f"{timings.step(name):.1f}",
            *(f"{timings.ratio(name, base):.2f}" for base in bases.values()),
            f"{max(timings.compile_seconds[name]):.1f}",
        )
        for name in contestants
    ]
    headers = ("", "microseconds per step", *bases, "seconds to compile")
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def main(config: Config) -> None:
    """Prints the tables."""
    print(f"{jax.devices()[0].device_kind}, {config.rounds} rounds, medians\n")
    print("(a) Gaussian unknown mean, batch 1,000 of 100,000")
    print(measure(toy(config), config.rounds))
    if config.vae_epochs:
        print("\n(b) VAE 784-400-50-400-784, batch 128 of 60,000 images, dynamic binarisation")
        print(measure(vae_contestants(config), config.rounds))
    if config.svhn_steps:
        print("\n(c) convolutional VAE of 32 x 32 colour images (preset svhn), batch 100")
        print(measure(svhn_contestants(config), config.rounds))


if __name__ == "__main__":
    main(tyro.cli(Config))
