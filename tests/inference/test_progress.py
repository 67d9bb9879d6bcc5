"""What a person sees of a long run: a bar on a screen, a line a minute in a log file."""

import io
import re
import sys

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest

from inference import _progress, fit, pointwise_elbo

DATA = {"x": np.linspace(-1, 2, 40, dtype=np.float32)}


def model(x):
    loc = numpyro.param("loc", jnp.zeros(()))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def no_latents(x):
    pass


def run(**settings):
    settings = {"num_epochs": 20, "batch_size": 10, "optimizer": optax.sgd(0.01)} | settings
    return fit(model, no_latents, DATA, **settings)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock of which every look takes 25 seconds."""
    now = [0.0]

    def monotonic():
        now[0] += 25
        return now[0]

    monkeypatch.setattr(_progress.time, "monotonic", monotonic)


def test_a_bar_shows_epoch_elbo_and_held_out_elbo(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(validation={"x": DATA["x"][:5]})
    text = terminal.getvalue()
    for words in ("80/80", "epoch=20/20", "ELBO=-", "held-out ELBO=-"):
        assert words in text


def test_nothing_is_shown_when_it_is_off_and_nothing_of_a_short_run_in_a_log(monkeypatch, capfd):
    run()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(progress=False)
    assert terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_a_log_has_a_line_a_minute(clock, capfd):
    result = run(validation={"x": DATA["x"][:5]})
    out, text = capfd.readouterr()
    assert out == ""
    lines = text.splitlines()
    pattern = (
        r"step (\d+)/80, epoch (\d+)/20, ELBO (-\d\.\d{4}), held-out ELBO (-\d\.\d{4}), "
        r"\d+ (s|min) left"
    )
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches)
    assert 1 < len(lines) < 20  # there are 20 chunks, of which none takes a minute
    for match in matches:
        step, epoch, _, held_out, _ = match.groups()
        assert int(epoch) == int(step) // 4
        assert float(held_out) == pytest.approx(
            result.validation_elbo[0, int(step) // 4 - 1], abs=1e-4
        )


def test_judges_report_too(clock, capfd):
    result = run(progress=False)
    pointwise_elbo(result, DATA, batch_size=4)
    assert capfd.readouterr() == ("", "")
    pointwise_elbo(result, DATA, batch_size=4, progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(
        re.fullmatch(r"datum \d+/40, ELBO -\d\.\d{4}, \d+ (s|min) left", line) for line in lines
    )


@pytest.mark.parametrize(
    ("done", "left"), [(90, "11 s left"), (10, "15 min left"), (1, "2.8 h left")]
)
def test_the_time_left_follows_from_the_rate(monkeypatch, capfd, done, left):
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    shown = _progress.Progress(100, "step")
    now[0] = 100.0
    shown.update(done, {})
    assert capfd.readouterr().err == f"step {done}/100, {left}\n"
