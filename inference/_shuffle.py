"""Random permutations computed one index at a time, with nothing sorted and nothing stored.

An epoch visits N data in random order. Drawing that order by sorting N random keys costs more
than a hundred training steps of a small model; here the k-th entry of a permutation is a
function of k alone, so that a step computes the few entries it needs.

The function is a Feistel network (Luby & Rackoff, 1988) on the grid of ``low * high >= N``
cells that is the smallest with ``low`` a power of two near the square root of N. The fewer
than ``low`` cells beyond N are left by cycle walking (Black & Rogaway, 2002): a value outside
0..N-1 is sent through the network again until it lands inside, which keeps the map a
bijection.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Integer, UInt32

ROUNDS = 6
_GOLDEN = np.uint32(
    0x9E3779B9
)  # 2^32 / golden ratio, odd: successive multiples spread over all words


def scramble(word: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32-bit words in which every input bit moves every output bit.

    The two-round xorshift-multiply of C. Wellons, "Prospecting for hash functions" (2018).
    """
    word = (word ^ (word >> 16)) * jnp.uint32(0x21F0AAAD)
    word = (word ^ (word >> 15)) * jnp.uint32(0xD35A2D97)
    return word ^ (word >> 15)


def permute(
    index: Integer[Array, "*#shape"], size: int, word: UInt32[Array, "*#shape"]
) -> Integer[Array, "*shape"]:
    """The entries at ``index`` of the permutation of 0..size-1 that ``word`` names.

    Args:
        index: positions, each in 0..size-1.
        size: length of the permutation, from 1 to 2^31 - 1 (static).
        word: 32 random bits; one for all positions or one for each. The same word is the
            same permutation.

    Returns:
        The permuted positions, int32: for one word a bijection of 0..size-1.

    Raises:
        ValueError: if ``size`` is out of range.
    """
    if not 0 < size < 2**31:
        raise ValueError(f"size: expected 1 to 2^31 - 1; got {size}")
    bits = (size - 1).bit_length() // 2
    low = 1 << bits
    high = -(-size // low)  # at most 2^16, so that the product below fits 32 bits
    keys = scramble(word[..., None] + jnp.arange(4 * ROUNDS, dtype=jnp.uint32) * _GOLDEN)

    def hashed(half: Array, i: int) -> Array:  # 16 bits, by a random multiplication
        return (half ^ keys[..., i]) * (keys[..., i + 1] | 1) >> 16

    def network(cell: Array) -> Array:
        left, right = cell >> bits, cell & (low - 1)
        for i in range(0, 4 * ROUNDS, 4):
            left = left + (hashed(right, i) * high >> 16)
            left = jnp.where(left >= high, left - high, left)
            right = right ^ (hashed(left, i + 2) & (low - 1))
        return (left << bits) | right

    cell = network(index.astype(jnp.uint32))
    if low * high > size:
        cell = lax.while_loop(
            lambda cell: jnp.any(cell >= size),
            lambda cell: jnp.where(cell >= size, network(cell), cell),
            cell,
        )
    return cell.astype(jnp.int32)


def epoch_word(word: jax.Array, epoch: jax.Array) -> jax.Array:
    """The word that names the permutation of one epoch, from the word of the whole run."""
    return scramble(word + scramble(epoch.astype(jnp.uint32)))
