"""Several sets of samples in one run, each met as often as its weight says.

An epoch has the same length whatever its number: of ``n`` samples with weight ``w`` each comes
``floor(w)`` times, and ``round((w - floor(w)) n)`` of them, drawn anew for every epoch, once more.
With weights of 1 an epoch is a permutation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from declip_shards import DeclipError
from declip_train.batch_order import shuffled_samples

__all__ = ["epoch_length", "epoch_sequence", "parse_weights"]

_LARGEST_WEIGHT = 1000.0


def parse_weights(values: Sequence[str], entries: Sequence[str]) -> tuple[float, ...]:
    """Weights of the entries of ``train_data``, both with ``::`` already taken apart.

    Args:
        values: the setting ``data_weights``; empty: 1 for each.
        entries: what they are of.

    Raises:
        DeclipError: there are not as many weights as entries, or one is no number of the range.
    """
    if not values:
        return (1.0,) * len(entries)
    if len(values) != len(entries):
        raise DeclipError(
            f"data_weights has {len(values)} numbers, but train_data has {len(entries)} entries; "
            "give one weight for each."
        )
    weights = []
    for value, entry in zip(values, entries, strict=True):
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not 0 < weight <= _LARGEST_WEIGHT:
            raise DeclipError(
                f"data_weights has {value!r} for {entry!r}, but must have a number above 0 and at "
                f"most {_LARGEST_WEIGHT:g}; correct it, or leave the entry out of train_data."
            )
        weights.append(weight)
    return tuple(weights)


def _extra(size: int, weight: float) -> int:
    """How many samples of a part come once more than the others."""
    return round((weight - math.floor(weight)) * size)


def epoch_length(part_sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Samples of an epoch, repeated ones counted as often as they come."""
    pairs = zip(part_sizes, weights, strict=True)
    return sum(math.floor(weight) * size + _extra(size, weight) for size, weight in pairs)


def epoch_sequence(
    part_sizes: Sequence[int],
    weights: Sequence[float],
    *,
    seed: int,
    epoch: int,
    fingerprint: str,
) -> NDArray[np.int64]:
    """(epoch_length,) rows of the samples of an epoch in order: a pure function of the arguments.

    Args:
        part_sizes: samples of each part; the parts lie one behind the other.
        weights: of each part.
        seed: of the run.
        epoch: from 0.
        fingerprint: of the data.
    """
    length = epoch_length(part_sizes, weights)
    order = shuffled_samples(length, seed=seed, epoch=epoch, fingerprint=fingerprint)
    if all(weight == 1 for weight in weights):
        return order
    members = np.empty(length, np.int64)
    begin = first = 0
    for number, (size, weight) in enumerate(zip(part_sizes, weights, strict=True)):
        whole = np.arange(first, first + size)
        for _ in range(math.floor(weight)):
            members[begin : begin + size] = whole
            begin += size
        extra = _extra(size, weight)
        if extra:
            drawn = _drawn(size, extra, f"mixture/{seed}/{epoch}/{number}/{fingerprint}")
            members[begin : begin + extra] = first + drawn
            begin += extra
        first += size
    found: NDArray[np.int64] = members[order]
    return found


def _drawn(size: int, number: int, purpose: str) -> NDArray[np.int64]:
    """``number`` different ones of ``size``, from a random stream of their own."""
    seed = hashlib.blake2b(purpose.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
    return np.sort(generator.permutation(size)[:number])
