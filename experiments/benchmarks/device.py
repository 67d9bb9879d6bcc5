"""How well the models fill a device, beside the same arithmetic by hand.

    python experiments/benchmarks/device.py --help

The script measures the device that JAX finds. It writes the numbers to ``DEVICES.json`` and makes
the page ``DEVICES.md`` from it, with a column for each device. A device that was not there has the
words "not run yet".

Every time of ``fit`` has a ratio beside it: to one scan written by hand, measured in turn with it
(``experiments/benchmarks/speed.py``). The ratios are what counts, because absolute times hold for
one machine.
"""

import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tabulate import tabulate

from experiments import datasets
from experiments.benchmarks import speed
from experiments.compiled import keep_compiled
from experiments.precision import full_precision
from experiments.settings import check_least, check_positive, command_line
from inference import fit, log_likelihood
from inference._shuffle import epoch_word, permute
from models import guides, vae

Preset = Literal["numpyro", "burda", "svhn"]
Type = Literal["float32", "tensorfloat32", "bfloat16"]
Part = Literal["epoch", "restarts", "judge", "fill"]

PAGE = Path(__file__).with_name("DEVICES.md")
SCRIPT = "experiments/benchmarks/device.py"
NUM_DATA = {"mnist": 60_000, "svhn": 73_257}
COLUMNS = ("CPU", "H100", "H200")  # Others get a column when they have been measured.
NOT_RUN = "not run yet"
MOST_STEPS = 20_480  # of a timed run: 20 looks of the host at a fast device
JUDGED = 10_000  # test images that the time to judge is given for
HAND, FIT = "hand-written scan", "fit"


@dataclass(frozen=True)
class Config:
    """Time training and judging on the device at hand, and write the page of devices.

    Attributes:
        presets: Models: numpyro and burda have MNIST's shape, svhn has SVHN's.
        batch_sizes: Images per step.
        types: Types that the networks compute in. tensorfloat32 is JAX's default on a recent GPU,
            and float32 on a CPU.
        restarts: Numbers of restarts. They are trained together, at the first batch size.
        parts: Tables to measure: epoch (by batch size and type), restarts, judge, and fill (what
            keeps the model from filling the device).
        num_samples: Importance samples per test image.
        num_test: Test images that are judged. The time is scaled to 10,000.
        seconds: Length of a timed run. It has at most 20,480 steps.
        rounds: How often each contestant runs. The page has medians.
        data_dir: Directory with the files of MNIST and SVHN. Default: random images of the same
            shapes, because the speed does not depend on the pixels.
        small: Whether to shrink models and data and take three steps, to see that everything works.
        out: The page. The numbers lie beside it, as JSON.
    """

    presets: tuple[Preset, ...] = ("numpyro", "burda", "svhn")
    batch_sizes: tuple[int, ...] = (128, 512, 2048, 8192)
    types: tuple[Type, ...] = ("float32", "bfloat16")
    restarts: tuple[int, ...] = (1, 8, 64)
    parts: tuple[Part, ...] = ("epoch", "restarts", "judge", "fill")
    num_samples: int = 100
    num_test: int = 1_000
    seconds: float = 2.0
    rounds: int = 3
    data_dir: Path | None = None
    small: bool = False
    out: Path = PAGE

    def __post_init__(self):
        for name in ("presets", "batch_sizes", "types", "restarts", "parts"):
            values = getattr(self, name)
            if not values or any(isinstance(n, int) and n < 1 for n in values):
                raise ValueError(
                    f"{name}: expected at least one, from 1 on if numbers, got {values}"
                )
        check_least(1, self, "num_samples", "num_test", "rounds")
        check_positive(self, "seconds")


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A training to time.

    Attributes:
        preset: the model's name.
        type: what its networks compute in.
        batch_size: images per step.
        restarts: seeds that are trained together.
    """

    preset: Preset
    type: Type
    batch_size: int
    restarts: int = 1

    def model(self, config: Config) -> vae.Model:
        """The preset, its networks in this type. A small one has few units."""
        dtype = "bfloat16" if self.type == "bfloat16" else "float32"
        model = replace(vae.PRESETS[self.preset], dtype=dtype)
        if not config.small:
            return model
        return replace(model, num_latents=2, hidden=(4,), channels=model.channels and (2,))

    def by_hand(self, config: Config) -> tuple[Any, Any, Any]:
        """The loss, the first parameters and the preparation of a batch, without NumPyro."""
        model = self.model(config)
        if self.preset == "svhn":
            return (
                partial(speed.svhn_loss, model=model),
                partial(speed.svhn_init, model=model),
                model.prepare,
            )
        settings: dict[str, Any] = {"activation": model.activation, "dtype": model.dtype}
        init = partial(speed.vae_init, model=model)
        return partial(speed.vae_loss, **settings), init, speed.binarize

    def hand(
        self, config: Config, images: dict[str, Any], num_steps: int
    ) -> Callable[[], speed.Timing]:
        """The scan written by hand."""
        loss, init, prepare = self.by_hand(config)
        return speed.by_hand(
            loss,
            init,
            images,
            self.batch_size,
            num_steps,
            prepare=prepare,
            num_seeds=self.restarts,
        )

    def fit(self, config: Config, images: dict[str, Any], num_steps: int) -> Any:
        """The training by ``fit``."""
        model = self.model(config)
        return fit(
            model,
            guides.mean_field(model),
            images,
            num_steps=num_steps,
            batch_size=self.batch_size,
            num_seeds=self.restarts,
            preprocess=model.prepare,
            progress=False,
        )

    def precision(self) -> Any:
        """A context in which products of float32 arrays have this type's precision."""
        return jax.default_matmul_precision(
            "tensorfloat32" if self.type == "tensorfloat32" else "highest"
        )


def load(config: Config, preset: Preset) -> dict[str, Any]:
    """The training images of a preset, (N, ...), grey levels 0 to 255."""
    name = "svhn" if preset == "svhn" else "mnist"
    if config.data_dir is not None:
        data = datasets.load(name, data_dir=config.data_dir, num_validation=0, progress=False)
        return {"x": data.train["x"]}
    size = 64 if config.small else NUM_DATA[name]
    shape = vae.PRESETS[preset].x_shape
    return {"x": np.random.default_rng(0).integers(0, 256, (size, *shape), dtype=np.uint8)}


def num_steps(config: Config, job: Job, images: dict[str, Any]) -> int:
    """How many steps fill the length of a timed run, by short ones."""
    if config.small:
        return 3
    steps = 2
    for probe in (2, 200):
        if steps >= probe:
            seconds = job.fit(config, images, probe).info["seconds"]["run"]
            steps = int(np.clip(config.seconds * probe / seconds, 2, MOST_STEPS))
    return steps


def train(config: Config, job: Job, images: dict[str, Any]) -> dict[str, float]:
    """Times a training by ``fit`` and by hand, in turn.

    Returns:
        ``seconds`` of an epoch by ``fit``, and its ``ratio`` to the scan by hand.
    """
    with job.precision():
        steps = num_steps(config, job, images)

        def by_fit() -> speed.Timing:
            seconds = job.fit(config, images, steps).info["seconds"]
            return seconds["compile"], seconds["run"]

        contestants = {HAND: (job.hand(config, images, steps), steps), FIT: (by_fit, steps)}
        timings = speed.in_turn(contestants, config.rounds)
    steps_per_epoch = len(images["x"]) / job.batch_size
    return {
        "seconds": timings.step(FIT) / 1e6 * steps_per_epoch,
        "ratio": timings.ratio(FIT, HAND),
    }


def judge(config: Config, job: Job, images: dict[str, Any]) -> dict[str, float]:
    """Times the log-likelihood of test images, once it has been compiled.

    Returns:
        ``seconds`` for ``JUDGED`` images.
    """
    with job.precision():
        result = job.fit(config, images, 1)
        test = result.prepare({name: array[: config.num_test] for name, array in images.items()})
        took = []
        for _ in range(2):
            began = time.perf_counter()
            log_likelihood(result, test, num_samples=config.num_samples)
            took.append(time.perf_counter() - began)
    return {"seconds": took[-1] * JUDGED / len(test["x"])}


# --- what keeps a small model from filling the device ---------------------------------------------


class Watched:
    """A compiled program that counts its calls, and the seconds in them until it is done."""

    def __init__(self, compiled: Any):
        self.compiled, self.calls, self.seconds = compiled, 0, 0.0

    def __call__(self, *args: Any) -> Any:
        """Runs the program to its end."""
        began = time.perf_counter()
        result = jax.block_until_ready(self.compiled(*args))
        self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - began
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


@contextlib.contextmanager
def watched() -> Iterator[list[Watched]]:
    """Watches every program that is compiled ahead of its first call meanwhile."""
    found: list[Watched] = []
    compile = jax.stages.Lowered.compile

    def watch(self: Any, *args: Any, **kwargs: Any) -> Watched:
        found.append(Watched(compile(self, *args, **kwargs)))
        return found[-1]

    jax.stages.Lowered.compile = watch  # type: ignore[method-assign]
    try:
        yield found
    finally:
        jax.stages.Lowered.compile = compile  # type: ignore[method-assign]


# Instructions of a compiled program that only name values.
NAMES_ONLY = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")


def kernels_per_step(text: str) -> int:
    """The kernels of one step: instructions in the body of a compiled program's largest loop.

    A fusion is one kernel. Instructions of a loop within the step count once. Of several branches
    the longest counts.

    Args:
        text: the program as XLA prints it (HLO).

    Returns:
        0 if there is no loop.
    """
    parts: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        begins = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if begins:
            lines = parts.setdefault(begins[1], [])
        elif " = " in line:
            lines.append(line)

    def kernels(name: str) -> int:
        count = 0
        for line in parts.get(name, []):
            opcode = re.search(r"[\]})] ([a-z][a-z0-9-]*)\(", line.split(" = ", 1)[1])
            if opcode is None or opcode[1] in NAMES_ONLY:
                continue
            inner = re.findall(
                r"(?:body|to_apply|true_computation|false_computation)=%?([\w.-]+)", line
            )
            branches = re.search(r"branch_computations=\{([^}]*)\}", line)
            inner += re.findall(r"[\w.-]+", branches[1]) if branches else []
            goes_in = opcode[1] in ("while", "conditional", "call")
            count += max(map(kernels, inner), default=0) if goes_in else 1
        return count

    bodies = re.findall(r" while\(.*?body=%?([\w.-]+)", text)
    return max(map(kernels, bodies), default=0)


def busy(run: Callable[[], float]) -> float | None:
    """The share of time in which some kernel runs on the GPU, by JAX's profiler.

    Args:
        run: does the work. It returns how many seconds its last part took, which counts.

    Returns:
        None if the profiler saw no stream of a GPU, as on a CPU.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            seconds = run()
        paths = list(Path(directory).rglob("*.xplane.pb"))
        if not paths:
            return None
        profile = jax.profiler.ProfileData.from_file(str(paths[0]))
        spans = [
            (event.start_ns, event.start_ns + event.duration_ns)
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    return share(spans, seconds * 1e9) if spans else None


def share(spans: Sequence[tuple[float, float]], length: float) -> float:
    """The share of the last ``length`` before the last end that spans (start, end) cover."""
    last = max(end for _, end in spans)
    covered, reached = 0.0, last - length
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / length


def shuffle(num_data: int, batch_size: int, num_steps: int = 1_000) -> float:
    """Seconds to find the rows of one batch: the median of five loops."""

    @jax.jit
    def loop(word: Any) -> Any:
        def body(step: Any, rows: Any) -> Any:
            position = (step * batch_size + jnp.arange(batch_size)) % num_data
            return rows + permute(position, num_data, epoch_word(word, step))

        return lax.fori_loop(0, num_steps, body, jnp.zeros(batch_size, jnp.int32))

    took = []
    for word in range(6):
        began = time.perf_counter()
        jax.block_until_ready(loop(jnp.uint32(word)))
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:]) / num_steps  # the first one was compiled


def fill(config: Config, job: Job, images: dict[str, Any]) -> dict[str, float | None]:
    """What keeps this training from filling the device, by the names that the page has."""
    with job.precision():
        steps = num_steps(config, job, images)
        with watched() as programs:
            seconds = job.fit(config, images, steps).info["seconds"]["run"]
        loop = max(programs, key=lambda program: program.seconds)
        with watched() as by_hand:
            job.hand(config, images, steps)()
        in_kernels = None
        if jax.default_backend() != "cpu":
            few = min(steps, 2_000)
            in_kernels = busy(lambda: job.fit(config, images, few).info["seconds"]["run"])
    return {
        "kernels in a step of `fit`": float(kernels_per_step(loop.as_text())),
        "kernels in a step by hand": float(kernels_per_step(by_hand[0].as_text())),
        "microseconds of a step": seconds / steps * 1e6,
        "looks of the host per second": loop.calls / seconds,
        "share of time in the compiled loop": loop.seconds / seconds,
        "share of time with a kernel on the GPU": in_kernels,
        "share of the shuffle": shuffle(len(images["x"]), job.batch_size) / (seconds / steps),
    }


# --- the numbers, the page ------------------------------------------------------------------------


Cells = dict[str, dict[str, Any]]  # by table, by row


def measure(config: Config, tell: Callable[[str], None]) -> Cells:
    """Measures all that the configuration names."""
    cells: Cells = {"epoch": {}, "restarts": {}, "judge": {}, "fill": {}}

    def put(table: str, row: tuple[Any, ...], values: Mapping[str, Any]) -> None:
        cells[table][" | ".join(map(str, row))] = dict(values)
        tell(f"{table}: {', '.join(map(str, row))}: {dict(values)}")

    for preset in config.presets:
        images, kind = load(config, preset), config.types[0]
        sizes = [min(size, len(images["x"]) // 2) for size in config.batch_sizes]
        known: dict[Job, dict[str, float]] = {}

        def timed(job: Job, images: Any = images, known: Any = known) -> dict[str, float]:
            if job not in known:
                known[job] = train(config, job, images)
            return known[job]

        if "epoch" in config.parts:
            for each in config.types:
                for size in sizes:
                    put("epoch", (preset, each, f"{size:,}"), timed(Job(preset, each, size)))
        if "restarts" in config.parts:
            for count in config.restarts:
                put("restarts", (preset, count), timed(Job(preset, kind, sizes[0], count)))
        if "judge" in config.parts:
            for each in config.types:
                found = judge(config, Job(preset, each, sizes[0]), images)
                put("judge", (preset, each), found)
        if "fill" in config.parts:
            for name, value in fill(config, Job(preset, kind, sizes[0]), images).items():
                put("fill", (preset, name), {"value": value})
    return cells


def about(config: Config) -> dict[str, Any]:
    """What the numbers of a device hold for."""
    kind = jax.devices()[0].device_kind
    known = [name for name in COLUMNS if name.lower() in kind.lower()]
    return {
        "device": known[0] if known else kind,
        "kind": f"{os.cpu_count()} CPU cores" if kind == "cpu" else kind,
        "jax": jax.__version__,
        "commands": [command(config)],
    }


def command(config: Config) -> str:
    """The command line of a configuration, without the page's place."""
    words = ["python", SCRIPT]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default and field.name != "out":
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def join(old: Mapping[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a device, where new rows take the place of old ones. Those of another version
    of JAX are left out."""
    if old is None or any(old["about"][name] != new["about"][name] for name in ("kind", "jax")):
        return new
    commands = dict.fromkeys(old["about"]["commands"] + new["about"]["commands"])
    cells = {key: old["cells"][key] | rows for key, rows in new["cells"].items()}
    return {"about": new["about"] | {"commands": list(commands)}, "cells": cells}


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_ratio(cell: Mapping[str, float]) -> str:
    """Seconds, and the ratio in brackets."""
    return f"{number(cell['seconds'])} ({cell['ratio']:.2f})"


class Table(NamedTuple):
    """A table of the page: its title, the columns that name a row, and how a cell is written."""

    title: str
    names: tuple[str, ...]
    write: Callable[[Mapping[str, Any]], str]


def with_value(cell: Mapping[str, Any]) -> str:
    """A number, or a dash where the device cannot tell it."""
    return "-" if cell["value"] is None else number(cell["value"])


TABLES = {
    "epoch": Table(
        "Seconds of an epoch by `fit`, and in brackets the ratio to the scan written by hand",
        ("preset", "type", "batch size"),
        with_ratio,
    ),
    "restarts": Table(
        "Seconds of an epoch of all restarts together, and the ratio to the scan written by hand",
        ("preset", "restarts"),
        with_ratio,
    ),
    "judge": Table(
        f"Seconds to the log-likelihood of {JUDGED:,} test images, without compilation",
        ("preset", "type"),
        lambda cell: number(cell["seconds"]),
    ),
    "fill": Table(
        "What keeps a small model from filling the device",
        ("preset", "quantity"),
        with_value,
    ),
}

INTRODUCTION = f"""\
# Devices

How fast a device trains and judges the models, and what keeps it from more.
[`device.py`](device.py) measures one device. It makes this page from the numbers of all, which lie
in `DEVICES.json`. To fill the column of a GPU, run this on it:

```bash
python {SCRIPT} --types float32 tensorfloat32 bfloat16
```

- Times are medians, without compilation. An epoch is 60,000 images (`numpyro`, `burda`) or 73,257
  (`svhn`). It is scaled up from a shorter run.
- The scan written by hand is one `lax.scan` in plain JAX with the same arithmetic, measured in turn
  with `fit` ([`speed.py`](speed.py)). A ratio of 1.02 means that `fit` takes 2 % longer. Ratios are
  what counts: absolute times hold for one machine.
- The pixels are random, unless a command below has `--data-dir`. The speed does not depend on them.
- All but the first table have the first batch size, 128 unless a command says otherwise. The second
  and the last have the first type. The likelihood has 100 importance samples for each image.
- A kernel is an instruction in the body of the compiled loop, such as a fusion or a product.
  Instructions of an inner loop count once. Of several branches the longest counts. XLA fuses
  otherwise for every device. On a GPU each kernel is about one launch.
- The share of time in the compiled loop is measured around its calls. The rest is the host's. It is
  an upper bound of the time in which the device is busy. A GPU also waits between kernels.
  JAX's profiler tells the time with a kernel on the GPU. It does not on a CPU ("-").
- The share of the shuffle is the time to find the rows of a batch, in a loop of its own, divided by
  the time of a step.
"""


def page(devices: Mapping[str, Mapping[str, Any]]) -> str:
    """The page from the numbers of all devices.

    Args:
        devices: by column, ``about`` and ``cells``.
    """
    columns = list(dict.fromkeys((*COLUMNS, *devices)))
    parts = [INTRODUCTION]
    for name in columns:
        if name in devices:
            known = devices[name]["about"]
            commands = "\n".join(known["commands"])
            parts.append(
                f"{name}: {known['kind']}, JAX {known['jax']}.\n\n```bash\n{commands}\n```\n"
            )
    for key, table in TABLES.items():
        rows: dict[str, list[str]] = {}
        for device in devices.values():
            rows |= {row: row.split(" | ") for row in device["cells"][key]}
        body = []
        for row, names in rows.items():
            line = list(names)
            for column in columns:
                if column not in devices:
                    line.append(NOT_RUN)
                else:
                    cell = devices[column]["cells"][key].get(row)
                    line.append("" if cell is None else table.write(cell))
            body.append(line)
        align = ["left"] * len(table.names) + ["right"] * len(columns)
        text = tabulate(
            body, (*table.names, *columns), "github", disable_numparse=True, colalign=align
        )
        parts.append(f"## {table.title}\n\n{text}\n")
    return "\n".join(parts)


def main(config: Config) -> None:
    """Measures the device at hand, writes the numbers and the page, and prints the page."""
    keep_compiled()
    full_precision()
    known = about(config)
    cells = measure(config, lambda line: print(line, file=sys.stderr))
    numbers = config.out.with_suffix(".json")
    devices = json.loads(numbers.read_text()) if numbers.exists() else {}
    name = known.pop("device")
    devices[name] = join(devices.get(name), {"about": known, "cells": cells})
    numbers.write_text(json.dumps(devices, indent=1) + "\n")
    config.out.write_text(page(devices))
    print(config.out.read_text())


if __name__ == "__main__":
    command_line(main, Config)
