"""The benchmark runs and compares like with like. Its timings are asserted nowhere."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpyro.infer import Trace_ELBO

from experiments.benchmarks import device, ladder, numpyro_examples, scaling, semi, speed
from inference import ImportanceWeighted
from models import gaussian_mean, guides, hierarchical, vae

GREY = {"x": jnp.full((4, 28, 28), 100, jnp.uint8)}


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    speed.main(speed.Config(toy_steps=30, rounds=1, vae_epochs=0.0, svhn_steps=0))
    printed = capsys.readouterr().out
    for name in ("hand-written scan", "fit, progress bar", "fit, 8 seeds", "SVI.run on one batch"):
        assert name in printed


def average(function, num_draws=4_000):
    values = jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(0), num_draws))
    return values.mean(), values.std() / num_draws**0.5


def test_the_hand_written_toy_is_the_same_arithmetic():
    data = gaussian_mean.Truth().simulate(50, seed=0)
    params = {name: jnp.float32(0.1 * i) for i, name in enumerate(gaussian_mean.PARAMETERS)}
    model, guide = gaussian_mean.Model(), gaussian_mean.Guide()
    hand, densities = (
        average(
            lambda key, density=density: speed.toy_loss(params, key, **data, log_normal=density)
        )
        for density in (speed.log_normal, speed.numpyro_log_normal)
    )
    ours = average(lambda key: Trace_ELBO().loss(key, params, model, guide, **data) / 50)
    assert abs(hand[0] - ours[0]) < 4 * np.hypot(hand[1], ours[1])
    np.testing.assert_allclose(densities[0], hand[0], rtol=1e-5)  # the same draws
    by_site = average(lambda key: speed.toy_loss_by_site(params, key, **data))
    assert abs(by_site[0] - ours[0]) < 4 * np.hypot(by_site[1], ours[1])


def flax(layers):
    """Layers by hand as a network's parameters."""
    return {
        "mlp": {"layers": {i: {"kernel": p["w"], "bias": p["b"]} for i, p in enumerate(layers)}}
    }


@pytest.mark.parametrize("preset", ["numpyro", pytest.param("burda", marks=pytest.mark.slow)])
def test_the_hand_written_vae_is_the_same_arithmetic(preset):
    model = vae.PRESETS[preset]
    params = speed.vae_init(jax.random.key(1), model)
    tree = {
        "encoder": flax([params[name] for name in sorted(params) if name[0] == "e"]),
        "decoder": flax([params[name] for name in sorted(params) if name[0] == "d"]),
        "statistics": {"latents": {"z": {"median": jnp.zeros(50), "spread": jnp.ones(50)}}},
    }
    batch = speed.binarize(jax.random.key(2), GREY)
    loss = partial(speed.vae_loss, params, activation=model.activation)
    hand = average(lambda key: loss(key, **batch), 500)
    objective, guide = Trace_ELBO(), guides.mean_field(model)
    ours = average(lambda key: objective.loss(key, tree, model, guide, **batch) / 4, 500)
    assert abs(hand[0] - ours[0]) < 4 * np.hypot(hand[1], ours[1])


def test_pixels_by_hand_are_drawn_with_their_grey_level():
    hashed = partial(speed.binarize, words=speed.hashed_words)
    for binarize in (speed.binarize, speed.binarize_plainly, hashed):
        x = binarize(jax.random.key(3), GREY)["x"]
        assert set(np.unique(x)) == {0.0, 1.0}
        share = 100 / 255
        assert abs(x.mean() - share) < 4 * (share * (1 - share) / x.size) ** 0.5


def test_the_tuned_vae_is_the_plain_one():
    batch = speed.binarize(jax.random.key(2), GREY)
    params, key = speed.vae_init(jax.random.key(1)), jax.random.key(3)
    plain, tuned = (
        jax.jit(jax.value_and_grad(loss))(params, key, **batch)
        for loss in (speed.vae_loss, speed.tuned_vae_loss)
    )
    for ours, theirs in zip(jax.tree.leaves(tuned), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * abs(theirs).max())


@pytest.mark.slow
def test_the_convolutional_vae_by_hand_is_the_same_arithmetic():
    params = speed.svhn_init(jax.random.key(1))
    tree = {name: nnx.to_pure_dict(state) for name, state in params.items()}
    grey = {"x": np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)}
    batch = speed.SVHN_MODEL.prepare(jax.random.key(2), grey)
    hand = average(lambda key: speed.svhn_loss(params, key, **batch), 20)
    objective = Trace_ELBO()
    ours = average(
        lambda key: objective.loss(key, tree, speed.SVHN_MODEL, speed.SVHN_GUIDE, **batch) / 2, 20
    )
    assert abs(hand[0] - ours[0]) < 4 * np.hypot(hand[1], ours[1])
    assert hand[1] < 1e-3 * abs(hand[0])


# --- two layers, and an autoregressive guide ------------------------------------------------------

FEW = {"x": np.eye(6, dtype=np.float32)[:3].reshape(3, 2, 3)}
SMALL = {"x_shape": (2, 3), "num_latents": 3}


def assert_same_means(by_hand, ours, params, num_draws=1_000):
    """Loss and gradient have the same means, and each is well known somewhere."""

    def means(loss):
        keys = jax.random.split(jax.random.key(0), num_draws)
        draws = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, keys)
        return [(draw.mean(0), draw.std(0) / num_draws**0.5) for draw in jax.tree.leaves(draws)]

    hand, other = jax.device_get(jax.jit(lambda: (means(by_hand), means(ours)))())
    for (one, error), (two, its_error) in zip(hand, other, strict=True):
        assert (np.abs(one - two) <= 4.5 * np.hypot(error, its_error) + 1e-6).all()
        assert (np.abs(one) > 4.5 * error).any()


@pytest.mark.slow
def test_the_hand_written_two_layers_are_the_same_arithmetic():
    above = (hierarchical.Layer(2, (4, 3)),)
    model = hierarchical.Model(**SMALL, hidden=(4, 5), activation=jnp.tanh, above=above)
    guide = hierarchical.BottomUp(model)

    def ours(params, key):
        tree = {name: flax(layers) for name, layers in params.items()}
        return ImportanceWeighted(5).loss(key, tree, model, guide, **FEW) / 3

    def by_hand(params, key):
        return ladder.layers_loss(params, key, **FEW)

    assert_same_means(by_hand, ours, ladder.layers_init(jax.random.key(1), model))


@pytest.mark.slow
def test_the_hand_written_autoregressive_guide_is_the_same_arithmetic():
    model = vae.Model(**SMALL, hidden=(4,), activation=jnp.tanh)
    guide = guides.inverse_autoregressive(model)

    def ours(params, key):
        tree = {name: flax(params[name]) for name in ("encoder", "decoder")}
        maps = {i: {**flax(params[f"map{i}"]), "direct": params[f"direct{i}"]} for i in range(2)}
        tree |= {"z_flow": {"layers": maps}}
        tree["statistics"] = {"latents": {"z": {"median": jnp.zeros(3), "spread": jnp.ones(3)}}}
        return Trace_ELBO().loss(key, tree, model, guide, **FEW) / 3

    def by_hand(params, key):
        return ladder.flow_loss(params, key, **FEW, activation=jnp.tanh)

    assert_same_means(by_hand, ours, ladder.flow_init(jax.random.key(1), model))


@pytest.mark.slow
def test_the_benchmark_of_ladders_runs(capsys):
    settings = {"layers_steps": 1, "flow_steps": 1, "num_images": 8, "rounds": 1}
    ladder.main(ladder.Config(layers_batch_size=4, flow_batch_size=4, **settings))
    assert capsys.readouterr().out.count("fit  ") == 2


def test_every_file_of_the_examples_gets_a_row(tmp_path):
    """A model that trains, one that cannot, and files that the script or the checkout lacks."""
    (tmp_path / "new.py").write_text("")
    (tmp_path / "funnel.py").write_text("model = lambda dim: None")
    (tmp_path / "minipyro.py").write_text(
        """
import no_such_package
import numpyro
import numpyro.distributions as dist


def model(data):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("data", len(data)):
        numpyro.sample("obs", dist.Normal(loc, 1), obs=data)
"""
    )
    out = tmp_path / "table.md"
    numpyro_examples.main(numpyro_examples.Config(tmp_path, num_steps=2, out=out))
    lines = [line.strip("| ").split(" | ") for line in out.read_text().splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) > 1}
    assert {"new.py", *numpyro_examples.CASES} <= table.keys()
    assert table["minipyro.py"][-1].startswith("ELBO -")
    assert table["funnel.py"][-1].startswith("ValueError: data: expected at least one array")
    assert "newer than the script" in table["new.py"][-1]
    assert "no such example" in table["vae.py"][-1]


# --- labels for some of the data ------------------------------------------------------------------


@pytest.fixture
def small():
    return semi.Config(
        hidden=5, num_latents=3, num_images=8, batch_size=4, supervised_steps=1, enumerated_steps=1
    )


def test_the_sum_over_labels_has_the_arithmetic_of_its_matrices(small):
    """Nothing but what follows the label is computed for each label."""
    config = replace(small, hidden=100, num_latents=10)
    known = semi.trainings(config)
    pixels, hidden, latents = 784, 100, 10
    image, inner = 2 * pixels * hidden, 3 * hidden * 2 * latents  # images get no gradient
    decoder = 3 * hidden * (latents + 10 + pixels)
    supervised = image + 2 * 10 * hidden + inner + decoder
    enumerated = 2 * image + 3 * 10 * hidden + 10 * (inner + decoder)
    for name, products in ((semi.SUPERVISED, supervised), (semi.ENUMERATED, enumerated)):
        counted = known[name].operations(config.batch_size)
        assert counted == pytest.approx(2 * config.batch_size * products, rel=0.1)


@pytest.mark.slow
def test_the_benchmark_of_labels_runs(small, capsys):
    semi.main(replace(small, rounds=1))
    printed = capsys.readouterr().out
    assert semi.SUPERVISED in printed
    assert semi.ENUMERATED in printed


def test_fewer_images_than_a_batch_are_refused(small):
    with pytest.raises(ValueError, match="num_images: expected at least 4"):
        replace(small, num_images=3)


# --- several devices ------------------------------------------------------------------------------

KNOWN = scaling.Constants(
    fixed=1e-3,
    datum=1e-5,
    cores=2,
    latency={(2, 1): 1e-4, (8, 1): 2e-4, (2, 2): 1e-3},
    speed={(2, 1): 1e9, (8, 1): 1e9, (2, 2): 1e9},
    collectives=3,
    gradient=2_000_000,
)


@pytest.mark.parametrize(
    ("setting", "milliseconds"),
    [
        (scaling.Setting(1, 100, "data", 1), 1 + 1),
        (scaling.Setting(1, 100, "data", 2), 1 + 1 + 3 * 0.1 + 2),
        (scaling.Setting(1, 100, "data", 8), 4 + 1 + 3 * 0.2 + 2),
        (scaling.Setting(8, 100, "seed", 8), 8 * (1 + 1)),
        (scaling.Setting(1, 100, "data", 2, 2), 1 + 1 + 3 * 1 + 2),
    ],
)
def test_the_cost_model_is_the_formula_of_its_page(setting, milliseconds):
    assert KNOWN.step(setting) == pytest.approx(1e-3 * milliseconds)


def test_a_split_pays_from_the_batch_at_which_it_is_faster():
    box, size = scaling.Box(), 500_000
    batch = box.pays_from(size)
    assert box.step(batch, size, devices=8) < box.step(batch, size)
    assert box.step(batch // 2, size, devices=8) >= box.step(batch // 2, size)


def test_the_page_says_what_is_measured_and_what_is_not():
    compared = [scaling.Compared(scaling.Setting(1, 64, "data", 2), 2e-3, 1e-3)]
    text = scaling.page(KNOWN, [*compared, compared[0]._replace(setting=compared[0].setting)])
    assert "| 1 x 64, 2 devices split the batch | 2.00 " in text
    assert "**Nothing here is measured.**" in text
    axes = scaling.figure(compared).axes[0]
    assert axes.get_xlabel() == "measured step (ms)"


@pytest.mark.slow
def test_a_reduction_is_timed_and_collectives_are_counted(monkeypatch):
    monkeypatch.setattr(scaling, "NUM_DATA", 64)
    setting = scaling.Setting(1, 16, "data", 2)
    assert scaling.collectives(setting) > 0
    assert scaling.collectives(setting._replace(seeds=2, axis="seed")) == 0
    assert 0 < scaling.reduce_seconds(setting, 4096, 1) < 10


# --- devices --------------------------------------------------------------------------------------


def rows_of(page):
    """The cells by device of each row of a page, by its names."""
    lines = [line.strip("| ").split("|") for line in page.splitlines() if line[:2] == "| "]
    return {tuple(map(str.strip, line[:-3])): [*map(str.strip, line[-3:])] for line in lines}


def numbers_of(tmp_path, capsys, *parts):
    """The numbers of the device at hand by row, after a run of the script in small."""
    settings = {"num_samples": 2, "num_test": 8, "rounds": 1, "small": True}
    config = device.Config(("numpyro",), (16,), ("float32",), (1, 2), parts, **settings)
    device.main(replace(config, out=tmp_path / "DEVICES.md"))
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "DEVICES.md").read_text().strip()
    found = {}
    for row, cells in rows_of(printed).items():
        number = cells[0].split()[0].replace(",", "")
        if number.replace(".", "").isdigit():
            found[row] = float(number)
            assert cells[1:] == ["not run yet"] * 2
    return found


on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the first column is a CPU's")


@on_a_cpu
def test_the_benchmark_of_devices_runs(tmp_path, capsys):
    found = numbers_of(tmp_path, capsys, "fill")
    assert 0 < found["numpyro", "share of time in the compiled loop"] <= 1
    ours, by_hand = (found["numpyro", f"kernels in a step {of}"] for of in ("of `fit`", "by hand"))
    assert ours > by_hand > 50
    assert ("numpyro", "float32") not in found


@pytest.mark.slow
@on_a_cpu
def test_the_benchmark_of_devices_measures_all(tmp_path, capsys):
    numbers_of(tmp_path, capsys, "judge")
    found = numbers_of(tmp_path, capsys, "epoch", "restarts")
    expected = {("float32", "16"), ("1",), ("2",), ("float32",)}  # the judge's row has stayed
    assert {row[1:] for row in found} == expected
    assert all(seconds > 0 for seconds in found.values())


def test_a_page_has_a_column_for_every_device():
    def known(*rows):
        cells = {"epoch": {row: {"seconds": 1234.5, "ratio": 1.016} for row in rows}}
        cells |= {"restarts": {}, "judge": {}, "fill": {}}
        return {"about": {"kind": "k", "jax": "1", "commands": ["python a.py"]}, "cells": cells}

    first, second = "numpyro | float32 | 128", "numpyro | float32 | 512"
    page = rows_of(device.page({"CPU": known(first), "H200": known(first, second)}))
    cell = "1,234 (1.02)"
    assert page["numpyro", "float32", "128"] == [cell, "not run yet", cell]
    assert page["numpyro", "float32", "512"] == ["", "not run yet", cell]


def test_new_numbers_join_those_of_the_same_device():
    def known(row, jax_version="1"):
        about = {"kind": "k", "jax": jax_version, "commands": [f"--{row}"]}
        return {"about": about, "cells": {"epoch": {row: 1}}}

    joined = device.join(known("a"), known("b"))
    assert joined["cells"]["epoch"].keys() == {"a", "b"}
    assert joined["about"]["commands"] == ["--a", "--b"]
    assert device.join(known("a"), known("b", "2")) == known("b", "2")
    assert device.join(None, known("b")) == known("b")


def test_a_command_says_what_differs_from_the_defaults():
    config = device.Config(("svhn",), (128, 512), small=True)
    words = "--presets svhn --batch-sizes 128 512 --small"
    assert device.command(config) == f"python experiments/benchmarks/device.py {words}"


@pytest.mark.parametrize("wrong", [{"restarts": ()}, {"batch_sizes": (0,)}, {"rounds": 0}])
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        device.Config(**wrong)


def test_kernels_of_the_largest_loop_are_counted():
    """Two of its own, one of the loop within, two of the longer branch."""
    text = """
%small (p: (f32[])) -> (f32[]) {
  %p = (f32[]) parameter(0)
  ROOT %exponential.1 = f32[2,3]{1,0} exponential(%p)
}

%few (p: f32[]) -> f32[] {
  ROOT %negate.1 = f32[] negate(%p)
}

%many (p: f32[]) -> f32[] {
  %negate.2 = f32[] negate(%p)
  ROOT %add.2 = f32[] add(%negate.2, %p)
}

%body (p: (s32[], /*index=1*/f32[2]{0})) -> (s32[], f32[2]{0}) {
  %p = (s32[], f32[2]{0}) parameter(0)
  %x = f32[2]{0} get-tuple-element(%p), index=1
  %fusion.1 = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
  %dot.1 = f32[2]{0} dot(%fusion.1, %x), lhs_contracting_dims={0}
  %inner = (f32[]) while(%p), condition=%small.condition, body=%small
  %either = f32[] conditional(%x, %p, %p), branch_computations={%few, %many}
  ROOT %out = (s32[], f32[2]{0}) tuple(%x, %dot.1)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %loop = (s32[], f32[2]{0}) while(%a), condition=%condition, body=%body
  ROOT %b = f32[2]{0} add(%a, %a)
}
"""
    assert device.kernels_per_step(text) == 5
    assert device.kernels_per_step("ENTRY %main (a: f32[2]) -> f32[2] {\n}") == 0


def test_more_steps_are_not_more_kernels():
    def count(length):
        def step(x, _):
            return jnp.tanh(x @ x), x.sum()

        scan = jax.jit(lambda x: jax.lax.scan(step, x, length=length))
        return device.kernels_per_step(scan.lower(jnp.eye(3)).compile().as_text())

    assert count(7) == count(70) >= 2


def test_spans_that_overlap_are_busy_once():
    spans = [(0.0, 10.0), (92.0, 96.0), (94.0, 98.0), (99.0, 100.0)]
    assert device.share(spans, 10.0) == pytest.approx(0.7)
    assert device.share([(0.0, 100.0)], 10.0) == 1


def test_a_cpu_has_no_stream_of_a_gpu():
    if jax.default_backend() == "cpu":
        assert device.busy(lambda: 1.0) is None
