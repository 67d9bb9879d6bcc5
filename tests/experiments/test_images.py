"""The scripts on images: their numbers, their settings, and what they refuse."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import images, mnist_cvae, mnist_vae, pictures, runs, svhn_vae
from inference import DoublyReparameterized, FreeBits, KLWarmUp, StickingTheLanding, encode
from models import hierarchical, vae
from models.conditions import Labels
from models.likelihoods import (
    LIKELIHOODS,
    PIXEL_LIKELIHOODS,
    Bernoulli,
    NegativeBinomial,
    Normal,
)
from models.priors import LearnedNormal, MixtureOfNormals, StandardNormal, VampPrior

LONG_HERE = ("mnist_vae", "svhn_vae")
FIGURES = {"elbo", "reconstructions", "samples", "latents", "interpolations"}


@pytest.fixture(
    params=["mnist_cvae", *(pytest.param(n, marks=pytest.mark.slow) for n in LONG_HERE)]
)
def finished(request, run_of):
    return run_of(request.param)


@pytest.fixture(scope="module")
def digits():
    return mnist_vae.Config(dataset="digits").data()


# --- numbers --------------------------------------------------------------------------------------


def test_the_numbers_agree_with_one_another(finished):
    result, config = finished.result, finished.config
    for part in ("elbo", "reconstruction", "kl", "log_likelihood"):
        assert result[part]["standard_error"] > 0
        assert len(result[part]["per_seed"]) == config.num_seeds
    elbo = result["reconstruction"]["estimate"] - result["kl"]["estimate"]
    assert result["elbo"]["estimate"] == pytest.approx(elbo, rel=1e-6)
    assert result["log_likelihood"]["num_samples"] == config.num_samples
    if config.num_samples > 10:  # an ELBO of 10 draws against a bound of more
        assert result["log_likelihood"]["estimate"] > result["elbo"]["estimate"]
    variance = np.array(result["layers"]["z"]["activity"]["estimate"])
    assert variance.shape == (config.num_seeds, config.num_latents)
    assert result["active_units"] == (variance > 0.01).sum(1).mean()
    assert {path.stem for path in finished.path.glob("*.png")} == FIGURES


def test_the_divergence_by_dimension(run_of):
    result = run_of("mnist_cvae").result
    by_seed = np.sum(result["layers"]["z"]["kl_per_dim"]["estimate"], axis=1)
    np.testing.assert_allclose(by_seed, result["kl"]["per_seed"], rtol=1e-4)


@pytest.mark.slow
def test_a_low_rank_guide_has_no_divergence_by_dimension(run_of):
    assert run_of("svhn_vae").result["layers"]["z"]["kl_per_dim"] is None


def test_arviz_reads_the_numbers_by_image(finished):
    result, tree = finished.result, runs.read_tree(finished.path)
    size, seeds = result["num_data"]["test"], finished.config.num_seeds
    for name in ("elbo", "log_likelihood", "kl"):
        pointwise = tree["evaluation"][name].values
        assert pointwise.shape == (seeds, size)
        assert pointwise.mean() == pytest.approx(result[name]["estimate"], rel=1e-5)
    assert tree["posterior"].z.shape == (seeds, 1, size, result["num_latents"])
    held_out = tree["validation_stats"].elbo.values
    assert held_out.shape[1] == finished.config.num_epochs
    assert (held_out[:, -1] >= held_out[:, 0]).all()


def test_the_share_of_high_pareto_k(run_of):
    path, result = run_of("mnist_cvae").path, run_of("mnist_cvae").result
    reported = result["pareto_k"]
    assert reported["num_samples"] == 30
    assert reported["threshold"] == pytest.approx(1 - 1 / np.log10(30))
    pareto_k = runs.read_tree(path)["evaluation"].pareto_k.values
    assert pareto_k.shape == (2, 60)
    assert reported["estimate"] == pytest.approx((~(pareto_k < reported["threshold"])).mean())
    assert f"share with k-hat >= {reported['threshold']:.2f}" in images.table(result)
    few = images.table(result | {"pareto_k": None})
    assert "k-hat: not available, needs 30 samples" in few


@pytest.mark.slow
def test_few_samples_have_no_pareto_k(run_of):
    assert run_of("mnist_vae").result["pareto_k"] is None


def test_the_number_of_parameters(run_of):
    # 64 -> 16 -> 2 -> 16 -> 64, with 4 features of 10 labels for each of the three networks
    layers = 69 * 16 + 17 * 4 + 5 * 4 + 7 * 16 + 17 * 64
    assert run_of("mnist_cvae").result["num_parameters"] == layers + 3 * 10 * 4


@pytest.mark.slow
def test_the_number_of_parameters_without_labels(run_of):
    # 64 -> 16 -> 3 -> 16 -> 64
    expected = 65 * 16 + 17 * 6 + 4 * 16 + 17 * 64
    assert run_of("mnist_vae").result["num_parameters"] == expected


def test_labels_are_checked(run_of):
    labels = run_of("mnist_cvae").result["labels"]
    assert labels["greatest_information"] == pytest.approx(np.log(10))
    assert labels["information"]["estimate"] <= np.log(10)
    assert labels["information"]["num_samples"] == 5
    assert 0 <= labels["accuracy"]["estimate"] <= 1
    assert "accuracy of argmax p(x | c)" in images.table(run_of("mnist_cvae").result)


@pytest.mark.slow
def test_identity_covariance_has_its_bound(run_of):
    result = run_of("svhn_vae").result
    likelihood, bits = result["log_likelihood"]["estimate"], result["bits_per_dim"]["estimate"]
    num_dims = 8 * 12 * 3
    assert likelihood < -num_dims * np.log(2 * np.pi) / 2
    # x lies on [-1, 1], 256 levels over two units
    assert bits == pytest.approx(-likelihood / num_dims / np.log(2) + np.log2(128))
    assert bits > np.log2(2 * np.pi) / 2 + 7


def test_a_published_number_stands_beside_the_same_model_alone(run_of, digits):
    config = mnist_vae.Config(preset="burda")
    table = mnist_vae.PUBLISHED

    def published(model, name, config=config):
        return images.published_number(config, replace(digits, name=name), model, table)

    value = {"log_likelihood": -86.76, "source": mnist_vae.PUBLISHED["burda"][1]}
    assert published(vae.PRESETS["burda"], "mnist") == value
    plain = replace(config, preset="hericks")
    assert published(vae.PRESETS["hericks"], "mnist", plain) is None  # the paper prints none
    assert published(vae.PRESETS["burda"], "digits") is None
    assert published(replace(vae.PRESETS["burda"], num_latents=2), "mnist") is None
    assert published(vae.PRESETS["burda"], "mnist", replace(config, guide="flow")) is None
    assert published(vae.PRESETS["burda"], "mnist", replace(config, encoder_hidden=(3,))) is None
    printed = images.table(run_of("mnist_cvae").result | {"published": value})
    assert "-86.76" in printed
    assert value["source"] in printed


@pytest.mark.slow
@pytest.mark.parametrize(  # tests/models has every family
    ("guide", "encoder"), [("flow", "network"), ("mean-field", "per-datum")]
)
def test_a_guide_by_its_name(guide, encoder, tmp_path):
    settings = {"dataset": "digits", "hidden": (8,), "num_latents": 3, "num_epochs": 1}
    settings |= {"num_train": 100, "num_test": 20, "num_samples": 30, "num_label_samples": 2}
    settings |= {"guide": guide, "encoder": encoder, "out": tmp_path / "run", "progress": False}
    config = mnist_cvae.Config(**settings, num_seeds=2)
    result = mnist_cvae.main(config)
    assert np.isfinite(result["log_likelihood"]["per_seed"]).all()
    assert np.ptp(result["log_likelihood"]["per_seed"]) > 0
    assert (result["layers"]["z"]["kl_per_dim"] is None) == (guide == "flow")
    assert ("labels" in result) == (encoder != "per-datum")
    assert {path.stem for path in (tmp_path / "run").glob("*.png")} == FIGURES
    assert runs.load(tmp_path / "run").fit.num_seeds == 2


# --- training -------------------------------------------------------------------------------------


def test_settings_change_an_objective(digits):
    beta = mnist_vae.Config(objective="sticking-the-landing", beta=2.0, kl_warm_up=0.5).elbo(7)
    assert isinstance(beta, KLWarmUp)
    assert (beta.num_steps, beta.objective.kl_weight) == (7, 2.0)
    assert isinstance(beta.objective.objective, StickingTheLanding)
    free = mnist_vae.Config(objective="TraceMeanField_ELBO", num_particles=3, free_bits=0.2).elbo(7)
    assert isinstance(free, FreeBits)
    assert (free.nats, free.objective.num_particles) == (0.2, 3)
    config = mnist_vae.Config(objective="doubly-reparameterized", num_particles=5)
    trained = images.training(config, digits, "fit", {})["objective"]
    assert isinstance(trained, DoublyReparameterized)
    assert trained.num_particles == 5


def test_what_a_per_datum_guide_trains_on():
    config = mnist_vae.Config(dataset="digits", encoder="per-datum", num_train=70)
    data = config.data()
    assert data.validation is None
    assert images.training(config, data, "fit", {})["batch_size"] == 70
    _, guide = images.programs(config, data.record, "fit", {})
    assert guide.encoder.num_data == 70


def test_the_encoders_hidden_layers(digits):
    config = mnist_vae.Config(dataset="digits", encoder_hidden=(3, 4))
    _, guide = images.programs(config, digits.record, "fit", {})
    encoder = guide.encoder(2, rngs=nnx.Rngs(0))
    assert [layer.kernel.shape for layer in encoder.mlp.layers] == [(64, 3), (3, 4), (4, 2)]


def test_burdas_schedule():
    schedule = images.burda_schedule(1e-3, 3280)
    for i in range(8):
        first, last = (3**i - 1) // 2, (3 ** (i + 1) - 1) // 2 - 1
        for step in (first, last):
            assert float(schedule(step)) == pytest.approx(1e-3 * 10 ** (-i / 7))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(vae.PRESETS))
def test_a_preset_is_changed_by_the_settings_that_are_given(preset, digits):
    plain = mnist_vae.Config(preset=preset)
    if not vae.PRESETS[preset].channels:
        assert plain.model(digits.record) == replace(vae.PRESETS[preset], x_shape=(8, 8))
    settings = {"hidden": (7,), "num_latents": 2, "activation": "silu", "likelihood": "gaussian"}
    changed = mnist_vae.Config(preset=preset, **settings).model(digits.record)
    assert (changed.hidden, changed.num_latents) == ((7,), 2)
    assert changed.activation is jax.nn.silu
    assert changed.likelihood == LIKELIHOODS["gaussian"]
    assert changed.condition is None


def test_a_preset_given_a_label(digits):
    plain = mnist_cvae.Config(preset="hericks").model(digits.record)
    assert plain == replace(vae.PRESETS["hericks"], x_shape=(8, 8), condition=Labels(10))
    config = mnist_cvae.Config(prior="learned", num_embedded=3)
    learned, _ = images.programs(config, digits.record, "fit", {})
    assert (learned.condition, learned.prior) == (Labels(10, 3), LearnedNormal())


def test_priors_and_layers_by_their_names(digits):
    settings = {"num_latents": 4, "above": (3, 2), "guide": "structured", "guide_hidden": 7}
    config = mnist_cvae.Config(prior="vamp", num_components=5, activation="gated", **settings)
    model, guide = images.programs(config, digits.record, "fit", {})
    assert (model.sizes, model.skip, model.activation) == ((4, 3, 2), True, jax.nn.glu)
    assert (model.prior, guide.num_hidden) == (VampPrior(guide, 5), 7)
    assert guide.model == replace(model, prior=StandardNormal())
    config = mnist_vae.Config(preset="burda-two-layers", guide="top-down", prior="mixture")
    model, guide = images.programs(config, digits.record, "fit", {})
    assert (model.sizes, model.prior) == ((100, 50), MixtureOfNormals(10))
    assert isinstance(guide, hierarchical.TopDown)
    with pytest.raises(ValueError, match=r"guide: expected a family for one .* add --above"):
        images.programs(mnist_vae.Config(guide="bottom-up"), digits.record, "fit", {})


@pytest.mark.parametrize("given_label", [False, True])
def test_the_preset_of_colour_images(given_label, shared):
    own = str(shared / "colours.npz")
    config = svhn_vae.Config(dataset=own, given_label=given_label, channels=(16, 32))
    data = config.data()
    assert ("c" in data.train) == given_label
    model = config.model(data.record)
    assert (model.x_shape, model.num_latents, model.channels) == ((8, 12, 3), 32, (16, 32))
    assert model.likelihood.low == -1
    assert model.condition == (Labels(3) if given_label else None)
    other = replace(config, channels=(4,), likelihood="discretized-logistic")
    assert other.model(data.record).likelihood == LIKELIHOODS["discretized-logistic"]


def test_what_the_model_cannot_take_is_refused_before_anything_is_written(shared, tmp_path):
    own = {"dataset": str(shared / "colours.npz"), "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"sides that 8 divides, .* got \(8, 12, 3\)"):
        svhn_vae.main(svhn_vae.Config(**own, channels=(4, 4, 4)))
    np.save(tmp_path / "mine.npy", np.zeros((40, 5, 4), np.uint8))
    with pytest.raises(ValueError, match=r"expected labels, and mine.npy has none; add"):
        mnist_cvae.main(mnist_cvae.Config(**own | {"dataset": str(tmp_path / "mine.npy")}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "none"}, "preset: expected one of flax, numpyro, .* got 'none'"),
        ({"likelihood": "poisson"}, "likelihood: expected one of bernoulli, .* got 'poisson'"),
        ({"activation": "cos"}, "activation: expected one of relu"),
        ({"objective": "Trace"}, "objective: expected one of Trace_ELBO"),
        ({"guide": "mean"}, "guide: expected one of mean-field, .* got 'mean'"),
        ({"encoder": "mlp"}, "encoder: expected one of network, per-datum, got 'mlp'"),
        (
            {"encoder": "per-datum", "batch_size": 5},
            "batch_size: expected none with the encoder per-datum",
        ),
        ({"schedule": "step"}, "schedule: expected one of constant, cosine, burda"),
        ({"num_epochs": 0}, "num_epochs: expected at least 1, got 0"),
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"clip_norm": -1.0}, "clip_norm: expected a positive number"),
        ({"average": 1.0}, "average: expected a fraction below 1, got 1"),
        ({"kl_warm_up": 60.0}, "kl_warm_up: expected 0 to num_epochs = 50, got 60"),
        ({"num_particles": 0}, "num_particles: expected at least 1, got 0"),
        ({"beta": -1.0}, "beta: expected a finite number from 0, got -1"),
        ({"free_bits": float("inf")}, "free_bits: expected a finite number from 0, got inf"),
        ({"free_bits": 0.1, "beta": 2.0}, "got KLWeighted.* --free-bits 0.1"),
        (
            {"objective": "RenyiELBO", "kl_warm_up": 1.0},
            "got ImportanceWeighted.* --kl-warm-up 1.0",
        ),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"prior": "vamp", "encoder": "per-datum"}, "prior: expected another one with the encoder"),
        ({"guide": "top-down", "encoder": "per-datum"}, "encoder: expected none with the guide"),
        ({"guide": "top-down", "guide_hidden": 3}, "guide_hidden: expected none with the guide"),
        ({"prior": "flat"}, "prior: expected one of standard, .*, got 'flat'"),
        ({"num_embedded": 0}, "num_embedded: expected at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mnist_cvae.Config(**settings)


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PIXEL_LIKELIHOODS))
def test_pictures_are_on_the_scale_of_grey(name):
    model = vae.Model(likelihood=LIKELIHOODS[name])
    low, high = model.likelihood.low, model.likelihood.high
    np.testing.assert_allclose(
        pictures.to_grey(model, np.array([low, (low + high) / 2, high])), [0, 0.5, 1]
    )


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 4, 3), (3, 4, 2)])
def test_a_grid_has_every_image_in_its_place(shape, rng):
    rows = rng.random((2, 5, *shape))
    (axes,) = pictures.grid(rows, "title", x_label="x", y_label="y").axes
    canvas = np.asarray(axes.images[0].get_array())
    num_channels = 3 if shape[2:] == (3,) else 1
    shown = canvas.reshape(*canvas.shape[:2], -1)
    assert shown.shape == (2 * 3 + 1, 5 * 4 + 4, num_channels)
    for i, j in np.ndindex(2, 5):
        image = shown[4 * i : 4 * i + 3, 5 * j : 5 * j + 4]
        expected = rows[i, j].reshape(3, 4, -1)[..., :num_channels]
        np.testing.assert_allclose(image, expected)


@pytest.mark.slow
def test_a_notebook_draws_with_the_fit_and_data_alone(run_of):
    run = runs.load(run_of("mnist_cvae").path)
    test = run.fit.prepare(run.data().test)
    ours = pictures.interpolations(run.fit, test, "title")
    theirs = pictures.interpolations(run.fit, test, "title", encode(run.fit, test))
    shown = [figure.axes[0].images[0].get_array() for figure in (ours, theirs)]
    np.testing.assert_allclose(*shown, atol=1e-5)


# --- tables ---------------------------------------------------------------------------------------


def table_file(path):
    """Rows around one of three points, in units that differ by a factor of 1e5."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 120)
    x = (rng.normal(size=(3, 4))[label] * 3 + rng.normal(size=(120, 4))) * [1, 1e3, 1e-2, 1]
    lines = [",".join(map(str, [*row, c])) for row, c in zip(x, label, strict=True)]
    path.write_text("\n".join(["a,b,c1,d,label", *lines]))
    return str(path)


SMALL = {"hidden": (4,), "num_latents": 2, "num_epochs": 2, "num_samples": 5, "progress": False}


@pytest.mark.slow
def test_a_table_runs_without_pictures_and_opens_again(tmp_path):
    path = tmp_path / "run"
    config = mnist_vae.Config(dataset=table_file(tmp_path / "mine.csv"), out=path, **SMALL)
    result = mnist_vae.main(config)
    assert "labels" not in result
    assert {found.stem for found in path.glob("*.png")} == {"elbo"}
    assert result["bits_per_dim"] is None
    assert "nats per row" in images.table(result)
    assert "image" not in images.table(result)
    run = runs.load(path)
    data = run.data()
    likelihood = run.fit.model.likelihood
    np.testing.assert_allclose(likelihood.x_mean, data.train["x"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(likelihood.x_std, data.train["x"].std(0), rtol=1e-5)
    assert run.tree["evaluation"].log_likelihood.shape == (1, len(data.test["x"]))


def test_a_table_chooses_its_likelihood(tmp_path):
    config = mnist_vae.Config(dataset=table_file(tmp_path / "mine.csv"))
    record = config.data().record
    assert record.x_shape == (4,)  # the label is no column of x
    assert config.model(record).likelihood == Normal(record.x_mean, record.x_std)
    counts = replace(record, x_mean=(1.0, 2.0, 3.0, 4.0))
    other = replace(config, likelihood="negative-binomial").model(counts)
    assert other.likelihood == NegativeBinomial(counts.x_mean)
    assert replace(config, likelihood="bernoulli").model(record).likelihood == Bernoulli()
    with pytest.raises(ValueError, match=r"x_std: .*constant column 1 \(from 0\)"):
        config.model(replace(record, x_std=(1.0, 0.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="channels: expected none for vectors of 4 numbers"):
        replace(config, channels=(4,)).model(record)


def test_images_take_no_likelihood_of_tables(digits):
    config = mnist_vae.Config(dataset="digits", likelihood="normal")
    with pytest.raises(ValueError, match=r"likelihood: expected .* images of digits, got 'normal'"):
        config.model(digits.record)
