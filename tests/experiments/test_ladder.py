"""The ladder: what its rungs are, its table and figure, and whole climbs on small data."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import images, mnist_vae, runs
from experiments import ladder as script
from experiments.datasets import Record
from experiments.ladder import RUNGS, Config, main
from models import hierarchical
from models.priors import VampPrior

MNIST = Record("mnist", (28, 28), 10, 50_000)
SMALL = {"num_epochs": 1, "num_test": 30, "num_train": 200, "num_samples": 20, "progress": False}


def programs(name, **settings):
    """The model and the guide of a rung, on MNIST."""
    config = Config(rung=(name,), full=True, **settings)
    return images.programs(mnist_vae.Config(**config.settings()[name]), MNIST, "fit", {})


@pytest.mark.parametrize("name", RUNGS)
def test_every_rung_is_a_run_of_the_vae(name):
    model, guide = programs(name)
    assert (model.num_latents, model.hidden) == (
        (50, (200, 200))
        if name.startswith("burda") and "two" not in name
        else (100, (200, 200))
        if name.startswith("burda")
        else (40, (300, 300))
    )
    is_two = "two" in name or name.startswith("h") or "-h" in name or name == "top-down"
    assert isinstance(model, hierarchical.Model) == is_two
    assert isinstance(model.prior, VampPrior) == ("vamp" in name)
    if isinstance(model.prior, VampPrior):
        assert model.prior.guide is guide
        assert model.prior.num_components == 500
    assert bool(model.channels) == name.startswith("conv")


def test_the_protocols():
    short = Config(rung=("vae", "burda-5"), num_epochs=10).settings()
    assert short["vae"]["num_epochs"] == 10
    assert short["vae"]["kl_warm_up"] == pytest.approx(2)
    assert short["burda-5"] == short["vae"] | {
        "preset": "burda",
        "objective": "importance-weighted",
        "num_particles": 5,
        "kl_warm_up": 0.0,
    }
    full = Config(rung=("vae", "burda", "vamp"), full=True, num_components=20).settings()
    assert (full["vae"]["learning_rate"], full["vae"]["patience"]) == (5e-4, 50)
    assert (full["burda"]["batch_size"], full["burda"]["schedule"]) == (20, "burda")
    assert full["vamp"]["num_components"] == 20
    assert "num_components" not in full["vae"]
    given = Config(full=True, rung=("burda",), num_epochs=3, batch_size=7).settings()["burda"]
    assert (given["num_epochs"], given["batch_size"]) == (3, 7)
    assert Config(full=True, num_epochs=3).settings()["vae"]["kl_warm_up"] == 3


def test_a_rung_is_the_same_after_any_other(monkeypatch, tmp_path):
    asked = {}

    def run(experiment, config):
        asked.setdefault(config.out.name, []).append(replace(config, out=None))
        raise InterruptedError

    monkeypatch.setattr("experiments.runner.run", run)
    for rungs in ((name,) for name in RUNGS):
        with pytest.raises(InterruptedError):
            main(Config(rung=rungs, full=True, out=tmp_path))
    monkeypatch.setattr(
        "experiments.runner.run",
        lambda experiment, config: asked[config.out.name].append(replace(config, out=None)) or {},
    )
    monkeypatch.setattr(script, "summarize", lambda results, out: (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        main(Config(rung=tuple(reversed(RUNGS)), full=True, out=tmp_path))
    assert all(alone == after for alone, after in asked.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rung": ("vea",)}, r"rung: expected some of vae, .*, got 'vea'"),
        ({"rung": ()}, r"rung: expected one or more rungs"),
        ({"rung": ("vae", "vae")}, r"rung: expected one or more rungs, each once"),
        ({"rung": ("iwae-50",)}, r"rung: expected one that two cores .* 'iwae-50'; add --full"),
        ({"num_epochs": 0}, r"num_epochs: expected at least 1"),
        ({"likelihood": "poisson"}, r"likelihood: expected one of"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def row(value, difference, published=None):
    number = {"estimate": value, "standard_error": 0.2, "num_samples": 5000}
    return {
        "log_likelihood": number,
        "elbo": {"estimate": value - 5, "standard_error": 0.3},
        "pareto_k": {"estimate": 0.125},
        "layers": {"z": {"active_units": 12.0, "num_latents": 40}},
        "seconds": {"run": 100.0},
        "num_parameters": 1234567,
        "published": published,
        "difference": difference,
    }


def test_the_table_has_published_values_with_their_sources():
    summary = {
        "dataset": "mnist",
        "num_data": {"train": 50_000, "test": 10_000},
        "rungs": {
            "vae": row(-85.1, None, (-84.45, "A paper")),
            "mixture": row(-84.9, {"estimate": 0.2, "standard_error": 0.03}),
            "vamp": row(-83.0, {"estimate": 1.9, "standard_error": 0.04}, (-82.43, "A paper")),
        },
    }
    printed = script.table(summary)
    assert "5000 importance samples" in printed
    assert printed.count("[1]") == 3
    assert "[1] A paper" in printed
    for words in ("-85.10 ± 0.20", "1.90 ± 0.04", "90.10", "12 of 40", "0.125", "1,234,567"):
        assert words in printed
    figure = script.ladder(summary)
    [axes] = figure.axes
    assert "nats" in axes.get_xlabel()
    assert [text.get_text().split("\n")[0] for text in axes.get_yticklabels()] == [
        *summary["rungs"]
    ]


# --- whole climbs ---------------------------------------------------------------------------------


@pytest.fixture
def small_rungs(monkeypatch):
    """Rungs with few units."""
    sizes = {"hidden": (8,), "num_latents": 3, "guide_hidden": 8}
    rungs = {
        name: replace(
            RUNGS[name],
            settings={**RUNGS[name].settings, **sizes}
            | ({"above": (2,), "preset": "tomczak"} if name.startswith("h") else {}),
        )
        for name in ("vae", "hvamp", "iaf")
    }
    monkeypatch.setattr(script, "RUNGS", rungs)


@pytest.mark.slow
def test_a_climb_resumes_rung_by_rung(small_rungs, tmp_path, capsys):
    out = tmp_path / "ladder"
    common = SMALL | {"dataset": "digits", "num_components": 4, "out": out}
    main(Config(rung=("vae",), **common))
    began = (out / "vae" / "result.json").stat().st_mtime_ns
    summary = main(Config(rung=("vae", "hvamp"), **common))
    assert (out / "vae" / "result.json").stat().st_mtime_ns == began
    assert json.loads((out / "ladder.json").read_text()) == json.loads(json.dumps(summary))
    assert {path.name for path in out.iterdir()} == {"vae", "hvamp", *script.FILES}
    values = [
        runs.read_tree(out / name)["evaluation"]["log_likelihood"].to_numpy()[0]
        for name in ("vae", "hvamp")
    ]
    paired = values[1] - values[0]
    found = summary["rungs"]["hvamp"]["difference"]
    assert found["estimate"] == pytest.approx(paired.mean(), rel=1e-5)
    assert found["standard_error"] == pytest.approx(paired.std() / 30**0.5, rel=1e-5)
    gained = [summary["rungs"][n]["log_likelihood"]["estimate"] for n in ("vae", "hvamp")]
    assert found["estimate"] == pytest.approx(gained[1] - gained[0], rel=1e-4)
    assert summary["rungs"]["hvamp"]["layers"].keys() == {"z1", "z2"}
    assert summary["rungs"]["vae"]["published"] is None  # these are not MNIST's numbers
    opened = runs.load(out / "hvamp")
    assert "pseudo_inputs" in opened.fit.params
    assert "z1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_climb_on_ones_own_table(small_rungs, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["a,b,d", *(",".join(f"{v:.3f}" for v in row) for row in rng.normal(size=(300, 3)))]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    config = Config(
        rung=("vae", "hvamp", "iaf"),
        dataset=str(tmp_path / "own.csv"),
        num_components=4,
        out=tmp_path / "ladder",
        **SMALL | {"num_train": 100},
    )
    summary = main(config)
    assert all(np.isfinite(row["log_likelihood"]["estimate"]) for row in summary["rungs"].values())
    assert not (tmp_path / "ladder" / "samples.png").exists()  # rows of a table are no pictures
    stranger = tmp_path / "strange"
    stranger.mkdir()
    (stranger / "letter.txt").write_text("")
    with pytest.raises(ValueError, match=r"out: expected a new or empty directory"):
        main(replace(config, out=stranger))
