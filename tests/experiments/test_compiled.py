"""Compiled programs on disk: the same bits, the user's own settings, no run that breaks."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.compiled import SETTINGS, keep_compiled
from inference import fit
from models import gaussian_mean

DIRECTORY = "jax_compilation_cache_dir"
ENABLED = "jax_enable_compilation_cache"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The user's cache directory, empty, and JAX without any settings of its cache."""
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, ENABLED, *SETTINGS)}
    for name in before:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    jax.config.update(DIRECTORY, None)
    forget()
    yield tmp_path / "caches"
    for name, value in before.items():
        jax.config.update(name, value)
    forget()


def forget() -> None:
    """The cache is opened anew. A fit compiles its own programs every time."""
    compilation_cache.reset_cache()


def counted(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and how many of its programs came from the disk."""
    forget()
    hits = []

    def count(event: str, **_: object) -> None:
        hits.append(event == "/jax/compilation_cache/cache_hits")

    jax.monitoring.register_event_listener(count)
    try:
        return run(), sum(hits)
    finally:
        jax.monitoring.unregister_event_listener(count)


def training() -> list[np.ndarray]:
    """All numbers of a short training."""
    data = gaussian_mean.Truth().simulate(200, seed=0)
    programs = gaussian_mean.Model(), gaussian_mean.Guide()
    found = fit(*programs, data, num_steps=30, batch_size=50, num_seeds=2, progress=False)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((found.params, found.elbo))]


def test_bits_are_the_same_with_and_without_it(caches, monkeypatch):
    monkeypatch.setitem(SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0)
    without, none = counted(training)
    directory = keep_compiled()
    first, before = counted(training)
    second, after = counted(training)
    assert directory == caches / "guidebook" / "compiled"
    assert any(directory.glob("jit_advance-*-cache"))
    assert (none, before) == (0, 0)
    assert after >= 2  # the state and the steps
    for again in (first, second):
        for x, y in zip(without, again, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.fixture
def strict():
    """The cache's warnings are errors, as for a user with ``python -W error``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Error (reading|writing)")
        yield


def squares() -> list[float]:
    """What a small program computes, compiled anew."""
    return jax.jit(lambda x: x * x)(np.arange(3.0)).tolist()


def test_an_entry_that_cannot_be_read_breaks_no_run(caches, strict, monkeypatch):
    monkeypatch.setitem(SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0)
    directory = keep_compiled()
    assert counted(squares) == ([0, 1, 4], 0)
    assert counted(squares) == ([0, 1, 4], 1)
    entries = list(directory.glob("*-cache"))
    assert entries
    for path in entries:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert counted(squares) == ([0, 1, 4], 0)


def test_a_directory_that_cannot_be_made_breaks_no_run(caches, strict, monkeypatch):
    monkeypatch.setitem(SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0)
    caches.write_text("a file in the directory's place")
    keep_compiled()
    assert counted(squares) == ([0, 1, 4], 0)


def test_the_users_own_directory_and_settings_stay(caches):
    jax.config.update(DIRECTORY, str(caches / "own"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    assert keep_compiled() == caches / "own"
    assert before == {name: getattr(jax.config, name) for name in SETTINGS}


def test_one_setting_of_the_user_stays(caches, monkeypatch):
    name = "jax_compilation_cache_max_size"
    monkeypatch.setenv(name.upper(), "1000")
    before = getattr(jax.config, name)
    keep_compiled()
    assert getattr(jax.config, name) == before


def test_it_can_be_switched_off(caches):
    jax.config.update(ENABLED, False)
    assert keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_the_directory_is_bounded(caches, monkeypatch):
    monkeypatch.setitem(SETTINGS, "jax_compilation_cache_max_size", 20_000)
    monkeypatch.setitem(SETTINGS, "jax_persistent_cache_min_compile_time_secs", 0)
    directory = keep_compiled()
    for factor in range(30):
        jax.jit(lambda x, factor=factor: factor * x)(np.ones(3)).block_until_ready()
    entries = list(Path(directory).glob("*-cache"))
    assert entries
    assert sum(os.path.getsize(path) for path in entries) <= 20_000
