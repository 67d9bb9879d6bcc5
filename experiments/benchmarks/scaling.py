"""How fast a run is on several devices: a cost model, its constants, and measurements beside it.

    python experiments/benchmarks/scaling.py

The script measures the constants on this machine, with 1, 2, 4 and 8 CPU devices and with two
processes. It predicts the time of a step for settings that did not set them, and measures those
too. It writes ``SCALING.md`` and its figure.

The cost model. A step of S restarts on batches of B data takes

    step = S (fixed + B datum) repeats + collectives (latency + bytes / speed)

``fixed`` is the part of a step that does not grow with the batch: the optimiser, small kernels, the
draws of indices. ``datum`` is the arithmetic of one datum. CPU devices share the cores, so that
splitting arithmetic gains nothing here, and what each device does again, the fixed part, is
repeated. One all-reduce of the gradients ends each step of a split batch: 4 bytes a parameter.
"""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil
import tyro
from jax.sharding import Mesh, PartitionSpec
from matplotlib.figure import Figure
from tabulate import tabulate

from inference import engine, fit
from models import guides, vae

HERE = Path(__file__).parent
COUNTS = (1, 2, 4, 8)
MODEL = vae.PRESETS["numpyro"]
NUM_DATA = 20_000
COLLECTIVE = re.compile(r"= \S.*? (all-reduce|all-gather|all-to-all)(-start)?\(")


@dataclass(frozen=True)
class Config:
    """Measure and predict steps on several devices.

    Attributes:
        num_steps: Steps of each measurement.
        batches: Two batch sizes that set the constants, and one that tests them.
        restarts: How many restarts test the constants.
        rounds: How often each time is measured. The least counts.
        out: The page to write.
        figure: The figure to write.
        worker: For the script itself: the task of one of its two processes, as JSON.
    """

    num_steps: int = 60
    batches: tuple[int, int, int] = (128, 1024, 512)
    restarts: int = 8
    rounds: int = 3
    out: Path = HERE / "SCALING.md"
    figure: Path = HERE.parent / "figures" / "scaling.png"
    worker: str = ""


class Setting(NamedTuple):
    """What one step is: restarts, batch, and the devices that split either."""

    seeds: int
    batch: int
    axis: str  # "data" or "seed"
    devices: int
    processes: int = 1

    def __str__(self) -> str:
        split = "batch" if self.axis == "data" else "restarts"
        one = f"{self.devices} devices split the {split}" if self.devices > 1 else "one device"
        return f"{self.seeds} x {self.batch}, {one}" + ", 2 processes" * (self.processes > 1)


@dataclass(frozen=True)
class Constants:
    """The cost model. Times are in seconds, sizes in bytes.

    Attributes:
        fixed: of a step of one restart, whatever the batch.
        datum: of one datum.
        cores: that the devices share.
        latency: of an all-reduce, by (devices, processes).
        speed: bytes a second of a large all-reduce, likewise.
        collectives: all-reduces in a step of a split batch.
        gradient: bytes of all gradients of one restart.
    """

    fixed: float
    datum: float
    cores: int
    latency: dict[tuple[int, int], float]
    speed: dict[tuple[int, int], float]
    collectives: int
    gradient: int

    def step(self, setting: Setting) -> float:
        """Seconds of one step."""
        split = setting.axis == "data"
        repeats = max(1.0, setting.devices / self.cores) if split else 1.0
        own = setting.seeds * (self.fixed * repeats + setting.batch * self.datum)
        return own + (self.reduce(setting) if split and setting.devices > 1 else 0.0)

    def reduce(self, setting: Setting) -> float:
        """Seconds of the all-reduces of one step."""
        link = setting.devices, setting.processes
        moved = setting.seeds * self.gradient / self.speed[link]
        return self.collectives * self.latency[link] + moved


# --- measuring ------------------------------------------------------------------------------------


def mesh_of(setting: Setting) -> Mesh | None:
    """The devices of a setting."""
    if setting.devices == 1:
        return None
    return Mesh(np.array(jax.devices()[: setting.devices]), (setting.axis,))


def step_seconds(setting: Setting, num_steps: int, rounds: int) -> float:
    """The least seconds of a step of ``fit``, over some rounds."""
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_DATA, 28, 28), dtype=np.uint8)
    times = [
        fit(
            MODEL,
            guides.mean_field(MODEL),
            {"x": pixels},
            preprocess=MODEL.prepare,
            batch_size=setting.batch,
            num_seeds=setting.seeds,
            num_steps=num_steps,
            mesh=mesh_of(setting),
            progress=False,
        ).info["seconds"]["run"]
        for _ in range(rounds)
    ]
    return min(times) / num_steps


def reduce_seconds(setting: Setting, size: int, rounds: int, repeats: int = 30) -> float:
    """The least seconds of an all-reduce of ``size`` bytes."""
    mesh = mesh_of(setting)
    assert mesh is not None
    where = jax.NamedSharding(mesh, PartitionSpec("data"))
    parts = np.zeros((setting.devices, size // 4), np.float32)
    placed = jax.make_array_from_callback(parts.shape, where, lambda index: parts[index])

    def summed(x: Any) -> Any:
        def body(_: Any, x: Any) -> Any:
            return 0.5 * jax.lax.psum(x, "data")

        return jax.lax.fori_loop(0, repeats, body, x)

    spec = PartitionSpec("data")
    loop = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    jax.block_until_ready(loop(placed))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(loop(placed))
        times.append(time.perf_counter() - began)
    return min(times) / repeats


def collectives(setting: Setting) -> int:
    """How many collectives a step of the compiled loop has."""
    texts, compile_steps = [], engine.compile_steps

    def spy(*args: Any) -> Any:
        run = compile_steps(*args)
        texts.append(run.advance.as_text())  # type: ignore[attr-defined]
        return run

    engine.compile_steps = spy
    try:
        step_seconds(setting, 1, 1)
    finally:
        engine.compile_steps = compile_steps
    return len(COLLECTIVE.findall(texts[0]))


SIZES = (2**10, 2**23)  # bytes: one for the latency, one for the speed


def links(settings: Iterable[Setting], rounds: int) -> dict[tuple[int, int], tuple[float, float]]:
    """Latency and speed of an all-reduce, by (devices, processes)."""
    found = {}
    for setting in settings:
        small, large = (reduce_seconds(setting, size, rounds) for size in SIZES)
        speed = (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
        found[setting.devices, setting.processes] = small, speed
    return found


def constants(config: Config, together: dict[str, Any]) -> Constants:
    """The constants of this machine. Those of two processes are given."""
    small, large = (
        step_seconds(Setting(1, batch, "data", 1), config.num_steps, config.rounds)
        for batch in config.batches[:2]
    )
    datum = (large - small) / (config.batches[1] - config.batches[0])
    split = [Setting(1, config.batches[0], "data", count) for count in COUNTS[1:]]
    known = links(split, config.rounds) | {(2, 2): tuple(together["link"])}
    gradient = 4 * num_parameters()
    return Constants(
        fixed=max(small - config.batches[0] * datum, 0.0),
        datum=datum,
        cores=psutil.cpu_count() or 1,
        latency={link: value[0] for link, value in known.items()},
        speed={link: value[1] for link, value in known.items()},
        collectives=collectives(split[0]),
        gradient=gradient,
    )


def num_parameters() -> int:
    """How many numbers preset ``numpyro`` trains."""
    pixels = np.zeros((2, 28, 28), np.uint8)
    guide = guides.mean_field(MODEL)
    settings = {"preprocess": MODEL.prepare, "num_steps": 1, "progress": False}
    fitted = fit(MODEL, guide, {"x": pixels}, **settings)
    networks = [fitted.params[name] for name in ("encoder", "decoder")]
    return sum(int(p.size) for p in jax.tree.leaves(networks))


# --- two processes --------------------------------------------------------------------------------


def together(config: Config) -> dict[str, Any]:
    """What two processes on the loopback measure together: an all-reduce, and steps."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    numbers = {"num_steps": config.num_steps, "rounds": config.rounds, "batch": config.batches[2]}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(numbers | {"i": i, "port": port})],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    told = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("scaling: expected two processes to measure, got one that failed")
    return json.loads(told[0].splitlines()[-1])


def work(i: int, port: int, batch: int, num_steps: int, rounds: int) -> None:
    """Measures as one of two processes, and prints the numbers as JSON."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, i)
    both = Setting(1, batch, "data", 2, 2)
    step = step_seconds(both, num_steps, rounds)
    link = links([both], rounds)[2, 2]
    seeds = step_seconds(Setting(2, batch, "seed", 2, 2), num_steps, rounds)
    print(json.dumps({"link": link, "data": step, "seed": seeds}))


# --- predictions ----------------------------------------------------------------------------------


class Compared(NamedTuple):
    """A setting that set no constant: seconds of a step, predicted and measured."""

    setting: Setting
    predicted: float
    measured: float


def compare(config: Config, known: Constants, of_two: dict[str, Any]) -> list[Compared]:
    """Predictions beside measurements."""
    batch, restarts = config.batches[2], config.restarts
    settings = [Setting(1, batch, "data", count) for count in COUNTS]
    settings += [Setting(restarts, config.batches[0], "seed", count) for count in COUNTS]
    found = []
    for setting in settings:
        if setting.axis == "data" or restarts % setting.devices == 0:
            seconds = step_seconds(setting, config.num_steps, config.rounds)
            found.append(Compared(setting, known.step(setting), seconds))
    for axis, seeds in (("data", 1), ("seed", 2)):
        setting = Setting(seeds, batch, axis, 2, 2)
        found.append(Compared(setting, known.step(setting), of_two[axis]))
    return found


@dataclass(frozen=True)
class Box:
    """One box of eight GPUs, from its data sheet and from assumptions.

    Attributes:
        flops: multiplications and additions a second of one GPU that dense layers reach. NVIDIA
            states 67e12 for float32 on an H100 SXM; we assume a third.
        speed: bytes a second of an all-reduce. NVLink has 450e9 each way; we assume half.
        latency: seconds of a small all-reduce. Assumed.
        kernel: seconds from one kernel to the next. Assumed.
        kernels: in a step. Assumed.
        count: GPUs.
    """

    flops: float = 67e12 / 3
    speed: float = 450e9 / 2
    latency: float = 20e-6
    kernel: float = 4e-6
    kernels: int = 60
    count: int = 8

    def step(self, batch: int, parameters: int, seeds: int = 1, devices: int = 1) -> float:
        """Seconds of a step whose batch ``devices`` GPUs split: 6 operations a parameter and datum,
        for the values and the gradients of dense layers."""
        arithmetic = 6 * parameters * batch * seeds / devices / self.flops
        moved = 2 * (devices - 1) / devices * 4 * parameters * seeds / self.speed
        talk = self.latency + moved if devices > 1 else 0.0
        return self.kernels * self.kernel + arithmetic + talk

    def pays_from(self, parameters: int) -> int:
        """The least power of two as a batch for which all GPUs are faster than one."""
        batch = self.count
        while self.step(batch, parameters, devices=self.count) >= self.step(batch, parameters):
            batch *= 2
        return batch


# --- the page -------------------------------------------------------------------------------------

PAGE = """\
# Several devices: a cost model

[`scaling.py`](scaling.py) makes this page. It ran on {machine}.

{model}

## Constants, measured

Preset `numpyro` ({parameters:,} parameters). Two batch sizes on one device set the first two rows.
All-reduces of 1 kB and of 8 MB set the last ones.

{constants}

## Predictions beside measurements

No measurement of this table set a constant. CPU devices share {cores} cores: more of them cannot be
faster. What the table tests is the cost of splitting. The predictions are {least:.2f} to
{greatest:.2f} of the measurements.

{compared}

![Seconds of a step, predicted and measured](../figures/scaling.png)

## Predictions for one box of eight GPUs

**Nothing here is measured.** It follows from a data sheet and from assumptions: {flops:.0f} TFLOP/s
of float32 in dense layers, {speed:.0f} GB/s and {latency:.0f} us for an all-reduce, and {kernels}
kernels of {kernel:.0f} us in a step.

{boxes}

A restart is 100 epochs of 60,000 images at batch 128. Restarts are split over the GPUs, 64 of them
together on each, and do not talk. A stream is read once an epoch; the disk must give the bytes of a
batch while the device computes a step.
"""


def page(known: Constants, compared: list[Compared]) -> str:
    """``SCALING.md``."""
    box, parameters = Box(), known.gradient // 4
    described = (__doc__ or "").partition("The cost model. ")[2]
    return PAGE.format(
        machine=f"{known.cores} CPU cores, JAX {jax.__version__}",
        model=described.strip(),
        parameters=parameters,
        cores=known.cores,
        constants=_table_of_constants(known),
        compared=_table_of_comparisons(compared),
        least=min(c.predicted / c.measured for c in compared),
        greatest=max(c.predicted / c.measured for c in compared),
        boxes=_table_of_boxes(box, parameters),
        flops=box.flops / 1e12,
        speed=box.speed / 1e9,
        latency=box.latency * 1e6,
        kernels=box.kernels,
        kernel=box.kernel * 1e6,
    )


def _table_of_constants(known: Constants) -> str:
    rows = [
        ["fixed part of a step", f"{known.fixed * 1e3:.2f} ms"],
        ["one datum", f"{known.datum * 1e6:.1f} us"],
        ["collectives in a step of a split batch", known.collectives],
    ]
    for devices, processes in known.latency:
        where = f"{devices} devices" + ", 2 processes" * (processes > 1)
        latency, speed = known.latency[devices, processes], known.speed[devices, processes]
        rows.append([f"all-reduce, {where}", f"{latency * 1e6:.0f} us + {speed / 1e9:.2f} GB/s"])
    return tabulate(rows, ["constant", "value"], "github", disable_numparse=True)


def _table_of_comparisons(compared: list[Compared]) -> str:
    rows = [
        [
            str(setting),
            f"{predicted * 1e3:.2f}",
            f"{measured * 1e3:.2f}",
            f"{predicted / measured:.2f}",
        ]
        for setting, predicted, measured in compared
    ]
    headings = ["restarts x batch", "predicted, ms", "measured, ms", "predicted / measured"]
    return tabulate(rows, headings, "github", disable_numparse=True)


def _table_of_boxes(box: Box, parameters: int) -> str:
    rows = []
    steps = 100 * 60_000 / 128
    for name, size in (("numpyro", parameters), ("a hundred times as large", 100 * parameters)):
        together = 64 * box.count * 3600 / (steps * box.step(128, size, seeds=64))
        step = box.step(1024, size)
        rows.append(
            [
                name,
                f"{box.pays_from(size):,}",
                f"{together:,.0f}",
                f"{1024 * 3072 / step / 1e9:.2f} GB/s",
                f"{100e9 / 3072 / 1024 * step / 60:.1f} min",
            ]
        )
    headings = [
        "model",
        "a split over 8 pays from batch",
        "restarts an hour",
        "disk, batch 1,024 of 3 kB",
        "one epoch of 100 GB",
    ]
    return tabulate(rows, headings, "github", disable_numparse=True)


def figure(compared: list[Compared]) -> Figure:
    """Predicted against measured seconds of a step."""
    drawn = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = drawn.subplots()
    kinds = {
        "batch split over devices": [c for c in compared if c.setting.axis == "data"],
        "restarts split over devices": [c for c in compared if c.setting.axis == "seed"],
    }
    for (name, part), marker in zip(kinds.items(), "os", strict=True):
        x, y = [1e3 * c.measured for c in part], [1e3 * c.predicted for c in part]
        axes.scatter(x, y, marker=marker, label=name)
        for point in zip(part, x, y, strict=True):
            axes.annotate(f" {point[0].setting.devices}", point[1:])
    times = [1e3 * value for known in compared for value in known[1:]]
    ends = [min(times), max(times)]
    axes.plot(ends, ends, color="0.6", label="predicted = measured")
    axes.set(xscale="log", yscale="log", xlabel="measured step (ms)", ylabel="predicted step (ms)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.set_title("Time of a step; the numbers count devices")
    axes.legend()
    return drawn


def main(config: Config) -> None:
    """Measures, predicts, and writes the page and its figure."""
    if config.worker:
        work(**json.loads(config.worker))
        return
    jax.config.update("jax_num_cpu_devices", max(COUNTS))
    of_two = together(config)
    known = constants(config, of_two)
    compared = compare(config, known, of_two)
    text = page(known, compared)
    print(text)
    config.out.write_text(text)
    figure(compared).savefig(config.figure, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config))
