"""Samples that also occur in evaluation sets, found by the rungs of the duplicates' ladder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.duplicate_rungs import Likeness, Looks
from declip_filter.eval_sets import EvalSet
from declip_filter.near_hashes import near_matches, slices
from declip_filter.sample_columns import Bytes, Mask, Rows

EVAL_RUNGS = ("bytes", "perceptual", "caption")
"""From the surest to the least sure."""
OVERLAPS_SCHEMA = pa.schema(
    [
        ("set", pa.string()),
        ("eval_key", pa.string()),
        ("rung", pa.string()),
        ("num_samples", pa.int64()),
    ]
)
"""Columns of ``signals/NAME/eval_overlaps.parquet``: entries of evaluation sets that occur in the
dataset, to leave out of an evaluation. It has no key of the dataset."""

_UNSEEN = np.iinfo(np.int64).max
_DISTANCE_BITS, _SET_BITS, _ENTRY_BITS = 8, 12, 40


@dataclass(kw_only=True)
class Contamination:
    """What was found so far; one evaluation set or rung after the other is added to it."""

    sets: Sequence[EvalSet]
    """In the order of their names."""
    flags: frozenset[str]
    """Rungs by which a sample counts as contaminated; the others are only counted."""
    num_rows: int
    best: Rows = field(init=False)
    """(rows,) the surest match of each sample, packed; the greatest number where none."""
    counts: dict[tuple[int, str], tuple[Rows, Rows]] = field(init=False, default_factory=dict)
    """(set, rung) -> entries that occur, and in how many samples each."""
    samples: dict[tuple[int, str], int] = field(init=False, default_factory=dict)
    """(set, rung) -> samples with a match."""

    def __post_init__(self) -> None:
        self.best = np.full(self.num_rows, _UNSEEN, dtype=np.int64)

    def add(
        self, number: int, rung: str, matches: Iterator[tuple[Rows, Rows, npt.NDArray[Any]]]
    ) -> None:
        """Take up the matches of one set by one rung: rows, entries of the set, distances."""
        entries = self.sets[number]
        per_entry = np.zeros(len(entries.keys), dtype=np.int64)
        seen = np.zeros(self.num_rows, dtype=np.bool_)
        pairs: list[Rows] = []
        for rows, owners, distances in matches:
            if rung == "caption":  # an entry has a caption once, so each pair comes once
                per_entry += np.bincount(owners, minlength=len(per_entry))
            else:
                pairs.append(rows * len(per_entry) + owners)
            seen[rows] = True
            if rung in self.flags:
                code = np.int64(EVAL_RUNGS.index(rung)) << _DISTANCE_BITS
                packed = ((code + distances.astype(np.int64)) << _SET_BITS) + number
                np.minimum.at(self.best, rows, (packed << _ENTRY_BITS) + owners)
        if pairs:
            # Several forms of one picture may be like one sample: that counts once.
            owners = np.unique(np.concatenate(pairs)) % len(per_entry)
            per_entry += np.bincount(owners, minlength=len(per_entry))
        found = np.flatnonzero(per_entry)
        self.counts[number, rung] = (found, per_entry[found])
        self.samples[number, rung] = int(seen.sum())

    def columns(self, start: int, stop: int) -> dict[str, pa.Array]:
        """``contaminated_by`` (SET:key) and ``contaminated_rung`` of some rows, null where none."""
        names: list[str | None] = []
        rungs: list[str | None] = []
        for code in self.best[start:stop].tolist():
            if code == _UNSEEN:
                names.append(None)
                rungs.append(None)
                continue
            entries = self.sets[(code >> _ENTRY_BITS) & ((1 << _SET_BITS) - 1)]
            names.append(f"{entries.name}:{entries.keys[code & ((1 << _ENTRY_BITS) - 1)]}")
            rungs.append(EVAL_RUNGS[code >> (_ENTRY_BITS + _SET_BITS + _DISTANCE_BITS)])
        return {
            "contaminated_by": pa.array(names, pa.string()),
            "contaminated_rung": pa.array(rungs, pa.string()),
        }

    @property
    def num_contaminated(self) -> int:
        return int((self.best != _UNSEEN).sum())

    def report(self) -> dict[str, Any]:
        """Overlaps per set: entries that occur in the dataset, and samples that are in the set."""
        found: dict[str, Any] = {}
        for number, entries in enumerate(self.sets):
            rungs = {
                rung: {
                    "entries": len(self.counts[number, rung][0]),
                    "samples": self.samples[number, rung],
                    "counts_as_contaminated": rung in self.flags,
                }
                for rung in EVAL_RUNGS
                if (number, rung) in self.counts
            }
            touched = [self.counts[number, rung][0] for rung in rungs if rung in self.flags]
            found[entries.name] = {
                "entries": len(entries.keys),
                "pictures": len(entries.image_digests),
                "undecodable": entries.num_undecodable,
                "captions": len(entries.caption_digests),
                "content_sha256": entries.digest,
                "entries_that_occur": len(np.unique(np.concatenate(touched))) if touched else 0,
                "rungs": rungs,
            }
        return found

    def overlaps(self) -> pa.Table:
        """A table of :data:`OVERLAPS_SCHEMA`, ordered by set, rung and entry."""
        columns: Mapping[str, list[Any]] = {name: [] for name in OVERLAPS_SCHEMA.names}
        for (number, rung), (found, times) in sorted(
            self.counts.items(), key=lambda item: (item[0][0], EVAL_RUNGS.index(item[0][1]))
        ):
            entries = self.sets[number]
            columns["set"].extend([entries.name] * len(found))
            columns["eval_key"].extend(entries.keys[place] for place in found.tolist())
            columns["rung"].extend([rung] * len(found))
            columns["num_samples"].extend(times.tolist())
        return pa.table(columns, schema=OVERLAPS_SCHEMA)


def match_digests(
    digests: Bytes, known: Mask, wanted: Bytes, owner: Rows
) -> Iterator[tuple[Rows, Rows, npt.NDArray[Any]]]:
    """Rows whose digest is one of ``wanted``: rows, owners of the wanted ones, zeros."""
    if not len(wanted):
        return
    base = np.ascontiguousarray(digests).view("<u8")
    asked = np.ascontiguousarray(wanted).view("<u8")
    order = np.argsort(asked[:, 0], kind="stable")
    sorted_asked = asked[order, 0]
    hits = np.flatnonzero(known)
    place = np.searchsorted(sorted_asked, base[hits, 0])
    hits = hits[sorted_asked[np.minimum(place, len(order) - 1)] == base[hits, 0]]
    low = np.searchsorted(sorted_asked, base[hits, 0], side="left")
    times = np.searchsorted(sorted_asked, base[hits, 0], side="right") - low
    for start, stop in slices(times):
        many = times[start:stop]
        rows = np.repeat(hits[start:stop], many)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(many) - many, many)
        found = order[np.repeat(low[start:stop], many) + within]
        equal = base[rows, 1] == asked[found, 1]
        yield rows[equal], owner[found[equal]], np.zeros(int(equal.sum()), dtype=np.int32)


def match_looks(
    looks: Looks, known: Mask, entries: EvalSet, likeness: Likeness
) -> Iterator[tuple[Rows, Rows, npt.NDArray[Any]]]:
    """Rows that look like a picture of the set in one of its forms: rows, entries, distances."""
    rows = np.flatnonzero(known & likeness.says_enough(looks.hashes))
    theirs = np.flatnonzero(likeness.says_enough(entries.looks.hashes))
    base, queries = looks.hashes[rows], entries.looks.hashes[theirs]
    places = None
    if looks.layouts is not None and entries.looks.layouts is not None:
        mine, gap = likeness.brightness(looks)
        places = (mine[rows], likeness.brightness(entries.looks)[0][theirs], gap)
    for left, right, distance in near_matches(base, queries, likeness.max_distance, places):
        one, other = rows[left], theirs[right]
        good = likeness.alike(looks, one, entries.looks, other)
        yield one[good], entries.look_owner[other[good]], distance[good]
