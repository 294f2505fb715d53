"""Shuffles of whole numbers that a key selects, without a permutation in memory.

Only 64-bit integer arithmetic takes part, so that results do not depend on the numpy version: a
run that continues relies on them.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Four rounds make a large domain look random; the smallest ones (n = 3 to 7) need this many before
# all their permutations are equally likely. Even, so that both halves end where they began.
_ROUNDS = 16


def permute(positions: Ints, n: int, keys: Words) -> Ints:
    """Map positions of [0, n) to their places in the shuffle that their key selects.

    A Feistel network on the grid of `height * width >= n` cells; whoever lands outside of [0, n)
    walks on until back inside, which keeps the map one-to-one (Black, Rogaway: Ciphers with
    Arbitrary Finite Domains, 2002). The grid has at most about sqrt(n) cells too many, so that
    hardly anyone has to walk. `keys` has one key for all positions, or one for each; they should
    come from `mix`.
    """
    # Even, as turning rows and columns of odd length reaches only half of all permutations.
    height = 2 * math.ceil(math.sqrt(n) / 2)
    width = -(-n // height)
    keys = np.broadcast_to(keys, positions.shape)
    places = positions.astype(np.uint64)
    walking = np.arange(len(places))
    while len(walking):
        places[walking] = _feistel(places[walking], height, width, keys[walking])
        walking = walking[places[walking] >= n]
    return places.astype(np.int64)


def mix(words: Words) -> Words:
    """Hash words one-to-one: a step of SplitMix64 from each of them as the state.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014. `words` must not be
    a scalar: numpy wraps arrays silently but warns about scalars that overflow.
    """
    return finalize(words + _GOLDEN)


def finalize(words: Words) -> Words:
    """Scatter words one-to-one: the last part of `mix` alone, which leaves 0 as it is."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _feistel(cells: Words, height: int, width: int, keys: Words) -> Words:
    """Shuffle the cells of a grid: each round turns a row by a hash of its column, or reversed."""
    turned, fixed = np.divmod(cells, np.uint64(width))
    turned_size, fixed_size = np.uint64(height), np.uint64(width)
    for _ in range(_ROUNDS):
        keys = keys + _GOLDEN
        # Half the hash, for a sum that wrapped around 2^64 would not be one-to-one.
        turned = (turned + (mix(keys ^ fixed) >> np.uint64(1))) % turned_size
        turned, fixed = fixed, turned
        turned_size, fixed_size = fixed_size, turned_size
    return turned * np.uint64(width) + fixed
