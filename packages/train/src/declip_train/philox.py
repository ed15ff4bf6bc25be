"""Many streams of random numbers at once: numpy's Philox generator for an array of keys.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
Philox4x64-10, counted and turned into doubles as ``numpy.random`` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def _product(number: NDArray[np.uint64], factor: np.uint64) -> tuple[NDArray[Any], NDArray[Any]]:
    """Upper and lower 64 bits of a product, from halves of 32 bits."""
    high, low = number >> _HALF, number & _LOW
    factor_high, factor_low = factor >> _HALF, factor & _LOW
    cross = high * factor_low + (low * factor_low >> _HALF)
    other = low * factor_high + (cross & _LOW)
    return high * factor_high + (cross >> _HALF) + (other >> _HALF), number * factor


def uniform_numbers(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """(n, count) uniform numbers in [0, 1) of n streams.

    Args:
        keys: (n, 2) uint64, lower half first.
        count: numbers of each stream.

    Returns:
        Row ``i`` is ``Generator(Philox(key=keys[i, 0] + (keys[i, 1] << 64))).random(count)``.
    """
    blocks = -(-count // 4)
    shape = (len(keys), blocks)
    # The counter's first value is one; its upper words never move.
    words = [np.broadcast_to(np.arange(1, blocks + 1, dtype=np.uint64), shape)]
    words += [np.zeros(shape, np.uint64)] * 3
    first, second = keys[:, :1], keys[:, 1:]
    for number in range(_ROUNDS):
        # Keys advance by addition modulo 2 to the 64; a Python integer does not warn of it.
        step = [np.uint64(int(weyl) * number % 2**64) for weyl in _WEYL]
        high_0, low_0 = _product(words[0], _MULTIPLIERS[0])
        high_1, low_1 = _product(words[2], _MULTIPLIERS[1])
        words = [
            high_1 ^ words[1] ^ (first + step[0]),
            low_1,
            high_0 ^ words[3] ^ (second + step[1]),
            low_0,
        ]
    bits = np.stack(words, -1).reshape(len(keys), 4 * blocks)[:, :count]
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64)
    numbers *= 2.0**-53
    return numbers
