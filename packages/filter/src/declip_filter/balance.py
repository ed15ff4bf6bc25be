"""Balancing over a list of concepts, after MetaCLIP's paper (Xu et al. 2023, arXiv 2309.16671).

A concept is found in a caption as whole words, one after the other, case and Unicode's
composition aside; what is neither letter, mark nor digit separates words. (The paper looks for
substrings; whole words keep "cat" out of "catalog". Languages that write no spaces are therefore
not matched.)

Concept e, found in c_e captions of what the rules before it keep, has the chance
p_e = min(1, t / c_e) to keep a sample (section 3 of the paper), each of a sample's concepts on its
own, and one is enough: the sample is kept with probability 1 - prod(1 - p_e). We draw once against
that product instead of once a concept, which is the same distribution for each sample, with a
number that is a hash of the key: the outcome depends on no order, and while the counts are the same
a higher cap keeps all that a lower one kept.
"""

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.evaluation import Columns
from declip_filter.text_hash import (
    Hashes,
    Offsets,
    hash_column,
    hash_spans,
    mix,
    text_buffer,
    unit_interval,
)
from declip_filter.user_files import read_user_file
from declip_shards import DeclipError

Ids = npt.NDArray[np.int64]

_MAX_BYTES = 2**28
"""Of a file of concepts: a list, not a dataset."""
_SEPARATORS = r"[^\p{L}\p{M}\p{N}]+"
_IS_WORD = np.zeros(256, dtype=bool)
_IS_WORD[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), *range(128, 256)]] = True
"""Bytes of words in what :func:`plain_words` returns."""


def plain_words(texts: pa.Array) -> pa.Array:
    """Texts in lower case, composed (NFC); where not ASCII, separators are spaces."""
    texts = pc.fill_null(texts, "")
    is_ascii = pc.string_is_ascii(texts)
    if pc.all(is_ascii).as_py() is not False:
        return pc.ascii_lower(texts)
    other = pc.invert(is_ascii)
    plain = pc.utf8_lower(pc.utf8_normalize(texts.filter(other), form="NFC"))
    # Lower case may be composed otherwise: I with a dot above.
    plain = pc.utf8_normalize(plain, form="NFC")
    plain = pc.replace_substring_regex(plain, pattern=_SEPARATORS, replacement=" ")
    return pc.replace_with_mask(pc.ascii_lower(texts), other, plain)


def read_concepts(path: str) -> list[str]:
    """The concepts of a user's file: a line each, UTF-8; in order of their words, each once.

    Raises:
        DeclipError: it is missing, too large, not UTF-8, or has no concept; or a line has no word.
    """
    data = read_user_file("concepts", path, _MAX_BYTES)
    if len(data) > _MAX_BYTES:
        raise DeclipError(
            f"concepts {path!r} has more than {_MAX_BYTES >> 20} MiB; give a list of concepts, one "
            "a line."
        )
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DeclipError(f"concepts {path!r} is not UTF-8 ({error}); convert it.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DeclipError(f"concepts {path!r} has no concept; write one a line.")
    padded, starts, ends, row = _words(pa.array([line for _, line in numbered], pa.string()))
    counts = np.bincount(row, minlength=len(numbered))
    if not counts.all():
        number, line = numbered[int(np.argmin(counts > 0))]
        raise DeclipError(
            f"concepts {path!r}: line {number} is {line.strip()!r}, which has no word; remove it."
        )
    words = [bytes(padded[a:b]).decode() for a, b in zip(starts, ends, strict=True)]
    first = np.concatenate([[0], np.cumsum(counts)])
    return sorted({" ".join(words[a:b]) for a, b in itertools.pairwise(first)})


def _words(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], Offsets, Offsets, Ids]:
    """Where texts' words are: a buffer, first and past-the-last byte, and the text's number."""
    padded, offsets = text_buffer(plain_words(texts))
    size = int(offsets[-1])
    flags = np.zeros(size + 1, dtype=bool)
    flags[:size] = _IS_WORD[padded[:size]]
    begins = flags[:size].copy()
    begins[1:] &= ~flags[: max(size - 1, 0)]
    ends = flags[:size] & ~flags[1:]
    # One text ends where the next begins: no separator stands between them.
    edges = offsets[:-1][offsets[:-1] < size]
    begins[edges] = flags[edges]
    inner = edges[edges > 0]
    ends[inner - 1] = flags[inner - 1]
    starts = np.flatnonzero(begins).astype(np.int64)
    row = np.searchsorted(offsets, starts, side="right") - 1
    return padded, starts, np.flatnonzero(ends).astype(np.int64) + 1, row.astype(np.int64)


def distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sorted, each once. NumPy's own goes by hashing, which is many times slower on whole numbers
    that are close to each other."""
    ordered = np.sort(values)
    is_first = np.ones(len(ordered), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first]


class HashSet:
    """Sorted 64-bit values, found by their upper bits and then one by one: most have a place of
    their own."""

    def __init__(self, values: Hashes) -> None:
        self.values: Hashes = distinct(values)
        bits = max(int(np.ceil(np.log2(max(len(self.values), 1) * 4))), 8)
        self.shift = np.uint64(64 - bits)
        counts = np.bincount((self.values >> self.shift).astype(np.int64), minlength=1 << bits)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def places(self, wanted: Hashes) -> Ids:
        """Number of each value in :attr:`values`, -1 where it is not one."""
        found = np.full(len(wanted), -1, dtype=np.int64)
        slot = (wanted >> self.shift).astype(np.int64)
        at, end = self.starts[slot], self.starts[slot + 1]
        live = np.flatnonzero(at < end)
        while len(live):
            hit = self.values[at[live]] == wanted[live]
            found[live[hit]] = at[live[hit]]
            live = live[~hit]
            at[live] += 1
            live = live[at[live] < end[live]]
        return found


@dataclass
class ConceptMatcher:
    """Finds which of many concepts are in captions: whole columns, word by word.

    Every word is hashed once; runs of words are looked up only as long as a concept begins so. Time
    is proportional to the words of the captions, whatever the number of concepts.
    """

    concepts: Sequence[str]
    """As :func:`read_concepts` returns them: words separated by a space, sorted, each once."""
    _last: threading.local = field(default_factory=threading.local, init=False, repr=False)

    def __post_init__(self) -> None:
        padded, starts, ends, row = _words(pa.array(self.concepts, pa.string()))
        words = hash_spans(padded, starts, ends, 0)
        counts = np.bincount(row, minlength=len(self.concepts))
        first = np.cumsum(counts) - counts
        whole = np.zeros(len(self.concepts), dtype=np.uint64)
        beginnings: list[Hashes] = []
        state = np.zeros(len(self.concepts), dtype=np.uint64)
        for place in range(int(counts.max(initial=0))):
            longer = counts > place
            state[longer] = mix(state[longer] ^ words[first[longer] + place])
            whole[counts == place + 1] = state[counts == place + 1]
            beginnings.append(state[counts > place + 1])
        self._entries = HashSet(whole)
        self._ids = np.zeros(len(self._entries.values), dtype=np.int64)
        self._ids[np.searchsorted(self._entries.values, whole)] = np.arange(len(self.concepts))
        self._beginnings = [HashSet(hashes) for hashes in beginnings]

    def __reduce__(self) -> tuple[type["ConceptMatcher"], tuple[Sequence[str]]]:
        return (ConceptMatcher, (self.concepts,))

    def find(self, captions: pa.Array) -> tuple[Ids, Ids]:
        """The pairs of a caption and a concept in it, each once.

        Returns:
            caption numbers and concept numbers, ordered by caption, then concept.
        """
        kept = getattr(self._last, "found", None)
        if kept is not None and kept[0] is captions:
            return kept[1], kept[2]
        padded, starts, ends, row = _words(captions)
        words = hash_spans(padded, starts, ends, 0)
        at = np.arange(len(words), dtype=np.int64)
        state = np.zeros(len(words), dtype=np.uint64)
        pairs: list[Ids] = []
        for place, beginnings in enumerate(self._beginnings):
            state = mix(state ^ words[at + place])
            hits = self._entries.places(state)
            is_hit = hits >= 0
            pairs.append(row[at[is_hit]] * len(self.concepts) + self._ids[hits[is_hit]])
            goes_on = beginnings.places(state) >= 0
            goes_on &= at + place + 1 < len(words)
            at, state = at[goes_on], state[goes_on]
            same_row = row[at] == row[at + place + 1]
            at, state = at[same_row], state[same_row]
            if not len(at):
                break
        both = distinct(np.concatenate(pairs)) if pairs else np.zeros(0, dtype=np.int64)
        found = both // max(len(self.concepts), 1), both % max(len(self.concepts), 1)
        # Rules over one shard ask twice: for the number of concepts, and for the draw.
        self._last.found = (captions, *found)
        return found

    def count(self, captions: pa.Array) -> pa.Array:
        """How many concepts each caption has: int32."""
        row, _ = self.find(captions)
        return pa.array(np.bincount(row, minlength=len(captions)).astype(np.int32))

    def totals(self, captions: pa.Array, chosen: npt.NDArray[np.bool_]) -> Ids:
        """In how many of the chosen captions each concept is: (concepts,)."""
        row, concept = self.find(captions)
        return np.bincount(concept[chosen[row]], minlength=len(self.concepts)).astype(np.int64)


@dataclass(frozen=True)
class Balance:
    """The draw: which samples the cap on their concepts leaves out."""

    matcher: ConceptMatcher
    totals: Ids
    """Captions that each concept is in."""
    cap: int
    """t of the paper: about how many samples a concept keeps."""
    seed: int

    def keep_chance(self, captions: pa.Array) -> npt.NDArray[np.float64]:
        """Probability with which each caption's sample is kept; 1 where it has no concept.

        A caption without a concept is another rule's matter.
        """
        row, concept = self.matcher.find(captions)
        left_out = np.ones(len(captions))
        if len(row):
            first = np.flatnonzero(np.diff(row, prepend=-1))
            # Products in the order of the concepts: the same rounding in every run.
            left_out[row[first]] = np.multiply.reduceat(self._misses(concept), first)
            has_none = np.ones(len(captions), dtype=bool)
            has_none[row[first]] = False
            left_out[has_none] = 0
        else:
            left_out[:] = 0
        return 1 - left_out

    def _misses(self, concept: Ids) -> npt.NDArray[np.float64]:
        """1 - p_e of these concepts."""
        return 1 - np.minimum(1.0, self.cap / np.maximum(self.totals[concept], 1))

    def __call__(self, columns: Columns) -> pa.BooleanArray:
        """True where the sample is drawn out."""
        drawn = unit_interval(hash_column(columns["key"], self.seed))
        return pa.array(drawn >= self.keep_chance(columns["caption"]))
