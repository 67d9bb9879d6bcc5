"""The settings of every script: on the command line and in JSON."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from experiments import (
    compare,
    exact,
    gaussian_mean,
    linear_gaussian,
    mnist_cvae,
    mnist_quadrants,
    mnist_vae,
    runs,
    svhn_vae,
)
from experiments.benchmarks import speed
from experiments.settings import UNSAVED, command_line, from_json, to_json

MODULES = (gaussian_mean, linear_gaussian, exact, mnist_vae, mnist_cvae, svhn_vae, mnist_quadrants)
MODULES += (compare, runs, speed)


def test_settings_come_back_from_json(script):
    module, settings = script
    config = module.Config(**settings)
    written = to_json(config)
    assert not written.keys() & {*UNSAVED}
    assert from_json(module.Config, written) == config


def test_paths_come_back_as_paths():
    config = mnist_vae.Config(data_dir=Path("a/b"), hidden=(3, 4))
    assert from_json(mnist_vae.Config, to_json(config)) == config


def test_missing_settings_take_their_defaults():
    assert from_json(gaussian_mean.Config, {"num_steps": 7}) == gaussian_mean.Config(num_steps=7)


def test_an_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match=r"settings: expected those of .* got 'num_stpes'; open"):
        from_json(gaussian_mean.Config, {"num_stpes": 7})


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_the_help_says_what_every_setting_is(module):
    config = module.Config
    said = "".join(c.__doc__ for c in config.__mro__[:-1])
    lines = dict(re.findall(r"^        (\w+): (.*)", said, re.MULTILINE))
    assert lines.keys() >= {field.name for field in dataclasses.fields(config)}
    for name, words in lines.items():
        assert re.match(r"[A-Z][a-z]", words), name
        assert not words.lower().startswith("of "), name


def test_help_lists_the_settings(script, monkeypatch, capsys):
    module, _ = script
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        command_line(module.main, module.Config)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(module.Config):
        assert f"--{field.name.replace('_', '-')}" in shown or f"no-{field.name}" in shown
