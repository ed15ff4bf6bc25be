"""64-bit hashes of whole columns, the same on every machine and in every run.

Not cryptographic: they count and draw. Two different values of a billion share a hash with a
probability of some 3 % in all.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

_WORD_BYTES = 8
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(values: Hashes) -> Hashes:
    """Spread each value over all 64 bits, reversibly (the finalizer of SplitMix64, Steele 2014)."""
    mixed = values + _STEP
    mixed ^= mixed >> _SHIFTS[0]
    mixed *= _FACTORS[0]
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _FACTORS[1]
    mixed ^= mixed >> _SHIFTS[2]
    return mixed


def text_buffer(column: pa.Array) -> tuple[npt.NDArray[np.uint8], Offsets]:
    """UTF-8 of all texts, one after the other, with 8 zeros behind, and where each begins and ends.

    Returns:
        bytes, and (len(column) + 1,) offsets into them.
    """
    if pa.types.is_string(column.type):
        kind: type[np.signedinteger] = np.int32
    else:
        column, kind = column.cast(pa.large_string()), np.int64
    _, offsets, data = column.buffers()
    if offsets is None or len(column) == 0:
        ends = np.zeros(len(column) + 1, dtype=np.int64)
    else:
        ends = np.frombuffer(offsets, dtype=kind)[column.offset : column.offset + len(column) + 1]
        ends = ends.astype(np.int64)
    padded = np.zeros(int(ends[-1] - ends[0]) + _WORD_BYTES, dtype=np.uint8)
    if data is not None:
        padded[: -_WORD_BYTES or None] = np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]]
    return padded, ends - ends[0]


def hash_spans(padded: npt.NDArray[np.uint8], starts: Offsets, ends: Offsets, seed: int) -> Hashes:
    """Hashes of pieces of a buffer of :func:`text_buffer`.

    Eight bytes at a time are mixed into the state, which begins with seed and length; a column of
    any lengths takes as many rounds as its longest piece has words.
    """
    words = np.ndarray((len(padded) - _WORD_BYTES + 1,), "<u8", padded, strides=(1,))
    lengths = ends - starts
    start = mix(np.array([seed], dtype=np.uint64))[0]
    state = mix(lengths.astype(np.uint64) ^ start)
    left = np.flatnonzero(lengths > 0)
    done = 0
    while len(left):
        remaining = lengths[left] - done
        word = words[starts[left] + done].astype(np.uint64)
        cut = remaining < _WORD_BYTES
        if cut.any():
            bits = np.where(cut, remaining * 8, 0).astype(np.uint64)
            word = np.where(cut, word & ((np.uint64(1) << bits) - np.uint64(1)), word)
        state[left] = mix(state[left] ^ word)
        left = left[remaining > _WORD_BYTES]
        done += _WORD_BYTES
    return state


def hash_column(column: pa.Array, seed: int = 0) -> Hashes:
    """One hash a value; equal values have equal hashes. A missing value's means nothing.

    Numbers hash by their value in double precision, so 3 and 3.0 are the same; texts by UTF-8.
    """
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        padded, ends = text_buffer(column)
        return hash_spans(padded, ends[:-1], ends[1:], seed)
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    numbers = column.cast(pa.float64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    start = mix(np.array([seed], dtype=np.uint64))[0]
    # Adding zero makes -0.0, which equals 0.0, the same bits.
    return mix((numbers + 0.0).view(np.uint64) ^ start)


def unit_interval(hashes: Hashes) -> npt.NDArray[np.float64]:
    """Hashes as numbers of [0, 1): their upper 53 bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
