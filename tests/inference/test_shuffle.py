"""Permutations without sorting: bijective, even, and different for every word."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from inference._shuffle import epoch_word, permute


@functools.partial(jax.jit, static_argnums=1)
def images_of(index, size, words):
    """Where each word sends the positions."""
    return jax.vmap(lambda word: permute(index, size, word))(words)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 257, 65_537])
def test_bijective(size):
    words = np.array([0, 1, 12345, 2**32 - 1], np.uint32)
    images = np.asarray(images_of(np.arange(size), size, words))
    np.testing.assert_array_equal(np.sort(images, 1), np.tile(np.arange(size), (4, 1)))


def test_64_bits_change_no_number():
    key, epoch = jax.random.key(0), np.int32(3)

    @jax.jit
    def image(key, epoch):
        word = epoch_word(jax.random.bits(key, (), jnp.uint32), epoch)
        return permute(jnp.arange(1000), 1000, word)

    expected = image(key, epoch)
    with jax.enable_x64(True):
        wide = image(key, epoch)
    np.testing.assert_array_equal(wide, expected)
    assert wide.dtype == expected.dtype == np.int32


def test_large_sizes_stay_in_range():
    size = 2**31 - 1
    index = np.array([0, 1, 2**20, size - 1])
    image = np.asarray(images_of(index, size, np.uint32([7])))[0]
    assert len(set(image.tolist())) == 4
    assert (image >= 0).all()
    assert (image < size).all()


@pytest.mark.parametrize("size", [2, 5])
def test_every_permutation_is_equally_likely(size):
    words = jax.random.bits(jax.random.key(0), (12_000,), jnp.uint32)
    images = np.asarray(images_of(np.arange(size), size, words))
    counts = [(images == p).all(1).sum() for p in itertools.permutations(range(size))]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_neighbours_are_scattered():
    """Where two neighbouring positions land is, over many words, like two independent draws."""
    size, cells = 1000, 5
    words = jax.random.bits(jax.random.key(1), (20_000,), jnp.uint32)
    pairs = np.asarray(images_of(np.array([10, 11]), size, words))
    cell = pairs * cells // size
    counts = np.bincount(cell[:, 0] * cells + cell[:, 1], minlength=cells**2)
    same, other = (size / cells) * (size / cells - 1), (size / cells) ** 2
    expected = np.where(np.eye(cells, dtype=bool), same, other).ravel() / (size * (size - 1))
    assert stats.chisquare(counts, expected * len(pairs)).pvalue > 1e-4


def test_epochs_have_their_own_order():
    words = jax.jit(epoch_word)(jnp.uint32(3), np.arange(50, dtype=np.int32))
    images = images_of(np.arange(20), 20, words)
    assert len({tuple(image) for image in images.tolist()}) == 50


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_size_out_of_range(size):
    with pytest.raises(ValueError, match=f"size: expected 1 to .*got {size}"):
        permute(jnp.arange(1), size, jnp.uint32(0))
