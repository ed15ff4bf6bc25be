"""Find any of many byte strings in much data: one pass, whatever their number."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

ANCHOR = 8
"""Bytes at a needle's end that are looked for first; ends differ more than beginnings do."""
BLOCK = 1 << 22
"""Positions examined at once: bounds the memory to some hundred megabytes."""
_TABLE_BITS = 20
_MIX = np.uint64(0x9E3779B97F4A7C15)
"""Fibonacci hashing (Knuth 1973, section 6.4)."""


class NeedleSearch:
    """Where byte strings occur in data.

    After Karp and Rabin 1987: the last eight bytes before each position are hashed and looked up;
    where that says yes, the needles are compared byte by byte. No needle is missed.
    """

    def __init__(self, needles: Mapping[bytes, str], *, whole: Iterable[bytes] = ()) -> None:
        """
        Args:
            needles: byte string -> its label, given back with a hit.
            whole: those that count only where no letter or digit stands before or after, such as
                numbers.

        Raises:
            ValueError: a needle is empty.
        """
        if b"" in needles:
            raise ValueError("an empty needle is everywhere")
        self.labels = dict(needles)
        self._whole = frozenset(whole)
        self._anchor = min([ANCHOR, *map(len, needles)])
        self._ends: dict[bytes, list[bytes]] = {}
        for needle in sorted(needles):
            self._ends.setdefault(needle[-self._anchor :], []).append(needle)
        self._table = np.zeros(1 << _TABLE_BITS, np.bool_)
        for end in self._ends:
            word = np.uint64(int.from_bytes(end, "little"))
            self._table[int(_hashes(np.array([word], np.uint64))[0])] = True

    def __len__(self) -> int:
        return len(self.labels)

    def find(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[str, bytes, int]]:
        """(label, needle, first byte) of every occurrence, by their ends."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        last = len(view) - self._anchor + 1
        if not self.labels or last <= 0:
            return
        for start in range(0, last, BLOCK):
            stop = min(last, start + BLOCK)
            for place in self._candidates(view[start : stop + self._anchor - 1]):
                yield from self._compare(view, start + place)

    def _candidates(self, block: memoryview) -> list[int]:
        """Positions whose next bytes hash like some needle's end, ascending."""
        count = len(block) - self._anchor + 1
        # Read as eight rows of words, one for each remainder of a position by eight.
        padded = bytes(block) + bytes(ANCHOR)
        mask = np.uint64((1 << (8 * self._anchor)) - 1)
        found = []
        for first in range(min(ANCHOR, count)):
            words = np.frombuffer(padded, "<u8", -(-(count - first) // ANCHOR), first)
            found.append(np.flatnonzero(self._table[_hashes(words & mask)]) * ANCHOR + first)
        places: list[int] = np.sort(np.concatenate(found)).tolist()
        return places

    def _compare(self, view: memoryview, place: int) -> Iterator[tuple[str, bytes, int]]:
        end = place + self._anchor
        for needle in self._ends.get(bytes(view[place:end]), ()):
            first = end - len(needle)
            if first >= 0 and view[first:end] == needle and self._is_whole(needle, view, first):
                yield self.labels[needle], needle, first

    def _is_whole(self, needle: bytes, view: memoryview, first: int) -> bool:
        if needle not in self._whole:
            return True
        end = first + len(needle)
        around = bytes(view[max(0, first - 1) : first]), bytes(view[end : end + 1])
        return not any(byte.isalnum() for byte in around)


def _hashes(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed: npt.NDArray[np.uint64] = (words * _MIX) >> np.uint64(64 - _TABLE_BITS)
    return mixed
