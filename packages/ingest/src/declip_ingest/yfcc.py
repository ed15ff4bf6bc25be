"""YFCC100M's metadata, and YFCC15M V1, which is a list of its photo ids."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_ingest.list_columns import CANONICAL
from declip_ingest.list_files import ListFile
from declip_ingest.list_kinds import Found
from declip_ingest.list_lines import read_lines
from declip_ingest.list_rows import (
    CODES,
    Mask,
    OnBytes,
    Rows,
    first_rows,
    is_blank,
    to_mask,
    to_text,
)
from declip_ingest.table import ALL_COLUMNS
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

CaptionRule = Literal[
    "title",
    "description",
    "title_description",
    "title_or_description",
    "description_or_title",
    "drawn",
]
"""How a photo's title and description become its caption; ``drawn`` takes one of them by the photo
id, the same one on every run."""
COLUMNS = (
    "line",
    "source_id",
    "photo_hash",
    "author_id",
    "author",
    "taken",
    "uploaded",
    "device",
    "title",
    "description",
    "user_tags",
    "machine_tags",
    "longitude",
    "latitude",
    "accuracy",
    "page_url",
    "url",
    "license",
    "license_url",
    "server",
    "farm",
    "secret",
    "original_secret",
    "extension",
    "marker",
)
"""The metadata's fields in order (method_facts 9.1); the older release lacks line and hash."""
OLDER_COLUMNS = tuple(name for name in COLUMNS if name not in ("line", "photo_hash"))
ENCODED = ("author", "title", "description", "license", "device", "user_tags", "machine_tags")
"""Fields of URL-encoded text."""
USUAL_EXTRAS = ("photo_hash", "author_id", "license_url", "page_url", "title", "description")
"""Carried under extra_columns ``*``; the others on demand, by name."""
PHOTO = "0"
"""What the marker says of a photo; 1 is a video."""
_TAGS = r"(?i)</?[abi](?:\s[^>]*)?/?>"
_ADDRESSES = r"(?i)(?:https?://|www\.)\S*"


def decode_text(values: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, Mask]:
    """URL-encoded text: ``+`` is a space, ``%XX`` a byte of UTF-8; any other ``%`` stays.

    Returns:
        Strings (n,), null where the bytes are no UTF-8, and (n,) whether that is so.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    raw = pc.fill_null(values.cast(pa.binary()), b"")
    _, offset_buffer, data_buffer = raw.buffers()
    if data_buffer is None or not len(raw):
        return to_text(raw)
    offsets = np.frombuffer(offset_buffer, np.int32)[raw.offset : raw.offset + len(raw) + 1]
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]].copy()
    offsets = offsets - offsets[0]
    data[data == ord("+")] = ord(" ")
    at = np.flatnonzero(data == ord("%"))
    at = at[at + 2 < len(data)]
    # Both digits must be of the text that the % is of.
    starts = np.zeros(len(data) + 1, bool)
    starts[offsets] = True
    high, low = _HEX[data[at + 1]], _HEX[data[at + 2]]
    is_coded = (high < 16) & (low < 16) & ~starts[at + 1] & ~starts[at + 2]
    at = at[is_coded]
    data[at] = high[is_coded] * 16 + low[is_coded]
    is_kept = np.ones(len(data), bool)
    is_kept[at + 1] = is_kept[at + 2] = False
    ends = np.concatenate([[0], np.cumsum(is_kept)])[offsets].astype(np.int32)
    buffers = [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(data[is_kept].tobytes())]
    return to_text(pa.Array.from_buffers(pa.binary(), len(raw), buffers))


_HEX = np.full(256, 16, np.uint8)
_HEX[list(b"0123456789")] = range(10)
_HEX[list(b"abcdef")] = _HEX[list(b"ABCDEF")] = range(10, 16)


def clean_text(texts: pa.Array) -> pa.Array:
    """Without ``<a>``, ``<b>``, ``<i>`` tags and without addresses; runs of spaces are one.

    method_facts 9.2, after SLIP's recipe. HTML entities stay as they are written.
    """
    lowered = pc.ascii_lower(texts)
    has_address = pc.or_(pc.match_substring(lowered, "http"), pc.match_substring(lowered, "www."))
    texts = _replace_where(pc.match_substring(texts, "<"), texts, _TAGS, "")
    texts = _replace_where(has_address, texts, _ADDRESSES, "")
    odd = pc.match_substring_regex(texts, r"[\s\p{Z}]{2}|[^\S ]|[\x{a0}\x{1680}\x{2000}-\x{3000}]")
    texts = _replace_where(odd, texts, r"[\s\p{Z}]+", " ")
    return pc.utf8_trim_whitespace(texts)


def _replace_where(mask: pa.Array, texts: pa.Array, pattern: str, by: str) -> pa.Array:
    """Replace in those texts alone that may have it: most do not, and a regex is slow."""
    if not to_mask(mask).any():
        return texts
    return pc.replace_with_mask(
        texts, mask, pc.replace_substring_regex(texts.filter(mask), pattern, by)
    )


def choose_captions(
    rule: str, titles: pa.Array, descriptions: pa.Array, ids: npt.NDArray[np.int64]
) -> pa.Array:
    """Captions (n,) of cleaned titles and descriptions by a rule; empty where it leaves nothing.

    Args:
        rule: one of :data:`CaptionRule`.
        titles: (n,) strings.
        descriptions: (n,) strings.
        ids: (n,) photo ids; ``drawn`` goes by them.

    Raises:
        DeclipError: no such rule.
    """
    if rule == "title":
        return titles
    if rule == "description":
        return descriptions
    if rule == "title_description":
        return pc.utf8_trim_whitespace(pc.binary_join_element_wise(titles, descriptions, " "))
    if rule == "title_or_description":
        return pc.if_else(pa.array(is_blank(titles)), descriptions, titles)
    if rule == "description_or_title":
        return pc.if_else(pa.array(is_blank(descriptions)), titles, descriptions)
    if rule == "drawn":
        # splitmix64's last steps: neighboring ids fall apart, each text has half of the photos.
        mixed = ids.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        is_title = ((mixed >> np.uint64(63)) == 0) & ~is_blank(titles) | is_blank(descriptions)
        return pc.if_else(pa.array(is_title), titles, descriptions)
    raise DeclipError(f"caption_rule is {rule!r}.{did_you_mean(rule, get_args(CaptionRule))}")


class YfccMetadata:
    """The metadata's photos, with a caption by a rule; videos are dropped."""

    kind = "yfcc100m"

    def __init__(
        self,
        files: Sequence[ListFile],
        founds: Sequence[Found],
        *,
        caption_rule: str,
        extra: Sequence[str] = (ALL_COLUMNS,),
    ) -> None:
        """Raises:
        DeclipError: a file that is no such metadata, an unknown rule or column.
        """
        for file, found in zip(files, founds, strict=True):
            if found.kind != "yfcc100m":
                raise DeclipError(
                    f"{file.location!r} is no metadata of YFCC100M (it looks like {found.kind}): "
                    "that has 25 or 23 tab-separated fields, the last 0 or 1; name its files."
                )
        self._files, self._founds, self._rule = list(files), list(founds), caption_rule
        empty = pa.array([], pa.string())
        choose_captions(caption_rule, empty, empty, np.zeros(0, np.int64))
        extras = [name for name in extra if name != ALL_COLUMNS]
        extras = [name for name in extras if name not in USUAL_EXTRAS and name not in CANONICAL]
        known = set(COLUMNS) - {"line", "marker"}
        for name in extras:
            if name not in known:
                raise DeclipError(
                    f"YFCC100M's metadata has no column {name!r} (set by extra_columns)."
                    f"{did_you_mean(name, known)}"
                )
        usual = [n for n in USUAL_EXTRAS if ALL_COLUMNS in extra or n in extra]
        has_hash = any(found.num_fields == len(COLUMNS) for found in founds)
        carried = [n for n in [*usual, *extras] if n != "photo_hash" or has_hash]
        names = ["url", "caption", "source_id", "author", "license", *carried]
        self.schema = pa.schema([(name, pa.string()) for name in names])

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self._files)

    def read(self, on_bytes: OnBytes, max_rows: int | None = None) -> Iterator[Rows]:
        """Every row of the metadata in turn; ``max_rows`` of them in all."""
        left = max_rows
        for rows in self.read_chosen(on_bytes, None):
            if left is not None:
                rows = first_rows(rows, left)
                left -= len(rows.numbers)
            yield rows
            if left == 0:
                return

    def read_chosen(
        self, on_bytes: OnBytes, choose: Callable[[npt.NDArray[np.int64]], Mask] | None
    ) -> Iterator[Rows]:
        """The rows whose photo ids are chosen; of the others nothing is decoded.

        Args:
            on_bytes: is told of stored bytes.
            choose: (n,) photo ids -> (n,) whether the row is wanted; without it, all are, bad rows
                among them.
        """
        for file, found in zip(self._files, self._founds, strict=True):
            names = COLUMNS if found.num_fields == len(COLUMNS) else OLDER_COLUMNS
            needed = {*self.schema.names, "title", "description", "marker", "source_id"}
            wanted = [name for name in names if name in needed]
            for numbers, raw, bad in read_lines(file, names, on_bytes, wanted=wanted):
                ids, no_id = to_ids(raw["source_id"])
                if choose is None:
                    rows = self._rows(file, numbers, raw, ids).with_fault("bad_row", no_id)
                    yield rows.with_lost_rows(bad)
                    continue
                is_chosen = choose(ids) & ~no_id
                if is_chosen.any():
                    part = raw.filter(pa.array(is_chosen))
                    yield self._rows(file, numbers[is_chosen], part, ids[is_chosen])

    def _rows(
        self,
        file: ListFile,
        numbers: npt.NDArray[np.int64],
        raw: pa.Table,
        ids: npt.NDArray[np.int64],
    ) -> Rows:
        count = raw.num_rows
        is_video = ~to_mask(pc.equal(to_text(raw["marker"])[0], PHOTO))
        arrays: dict[str, pa.Array] = {}
        bad_text = np.zeros(count, bool)
        for name in ("title", "description"):
            text, bad = decode_text(raw[name])
            arrays[name] = clean_text(pc.fill_null(text, ""))
            if name in self._rule or self._rule == "drawn":
                bad_text |= bad
        arrays["caption"] = choose_captions(self._rule, arrays["title"], arrays["description"], ids)
        for name in self.schema.names:
            if name in arrays:
                continue
            if name not in raw.column_names:
                arrays[name] = pa.nulls(count, pa.string())
                continue
            # What is carried and no UTF-8 is null: it says nothing about the pair.
            arrays[name] = (decode_text if name in ENCODED else to_text)(raw[name])[0]
        rows = Rows(
            name=file.name,
            numbers=numbers,
            table=pa.table({name: arrays[name] for name in self.schema.names}),
            faults=np.zeros(count, np.uint8),
        )
        return rows.with_fault("video", is_video).with_fault("bad_caption", bad_text)


def to_ids(values: pa.Array | pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], Mask]:
    """Photo ids as integers; (n,) whether there is none, in which case it is -1."""
    texts, _ = to_text(values)
    good = pc.fill_null(pc.match_substring_regex(texts, r"^[0-9]{1,18}$"), False)
    numbers = pc.cast(pc.if_else(good, texts, "-1"), pa.int64())
    ids: npt.NDArray[np.int64] = numbers.to_numpy(zero_copy_only=False)
    return ids, ~to_mask(good)


class YfccSubset:
    """YFCC15M V1: photo ids, joined to the metadata; rows come in the metadata's order."""

    kind = "yfcc15m_v1"

    def __init__(
        self, location: str, files: Sequence[ListFile], metadata: YfccMetadata | None
    ) -> None:
        """Args:
        location: what the user named.
        files: of lines (line number, photo id, photo hash).
        metadata: YFCC100M's; without it there are ids alone, and :meth:`read_ids` for them.
        """
        self._location, self._files, self._metadata = location, list(files), metadata
        self.schema = metadata.schema if metadata else pa.schema([("source_id", pa.string())])

    @property
    def num_bytes(self) -> int:
        of_ids = sum(file.size for file in self._files)
        return of_ids + (self._metadata.num_bytes if self._metadata else 0)

    def read_ids(self, on_bytes: OnBytes) -> Iterator[Rows]:
        """The photo ids alone, in the list's order."""
        schema = pa.schema([("source_id", pa.string())])
        for file in self._files:
            names = ("line", "source_id", "photo_hash")
            for numbers, raw, bad in read_lines(file, names, on_bytes, wanted=["source_id"]):
                texts, _ = to_text(raw["source_id"])
                rows = Rows(
                    name=file.name,
                    numbers=numbers,
                    table=pa.table([texts], schema=schema),
                    faults=np.zeros(len(numbers), np.uint8),
                )
                yield rows.with_fault("bad_row", to_ids(texts)[1]).with_lost_rows(bad)

    def read(self, on_bytes: OnBytes, max_rows: int | None = None) -> Iterator[Rows]:
        """Each row of the subset once: the photos in the metadata's order, then what it lacks.

        Raises:
            DeclipError: there is no metadata.
        """
        if self._metadata is None:
            raise DeclipError(
                f"list {self._location!r} is YFCC15M V1's subset, which holds photo ids but no "
                "URLs or captions; name YFCC100M's metadata files with metadata."
            )
        join = _IdJoin(self.read_ids(on_bytes), max_rows)
        yield from join.lost_rows(self.schema)
        for rows in self._metadata.read_chosen(on_bytes, join.is_wanted):
            ids, _ = to_ids(rows.table["source_id"])
            yield from join.matched_rows(rows, ids)
        yield from join.unmatched_rows(self.schema)


class _IdJoin:
    """Photo ids of a subset in a sorted array, each with its row and whether it was found.

    An id keeps 18 bytes (id 8, row 4, order 4, two marks); while it is sorted, 28.
    """

    def __init__(self, parts: Iterator[Rows], max_rows: int | None) -> None:
        ids, numbers, files = [], [], []
        self._names: list[str] = []
        lost: list[Rows] = []
        left = max_rows
        for rows in parts:
            if left is not None:
                rows = first_rows(rows, left)
                left -= len(rows.numbers)
            if not self._names or self._names[-1] != rows.name:
                self._names.append(rows.name)
            good = rows.faults == 0
            ids.append(to_ids(rows.table["source_id"])[0][good])
            numbers.append(rows.numbers[good].astype(np.uint32))
            files.append((len(self._names) - 1, len(ids[-1])))
            if not good.all():
                lost.append(rows.take(~good))
            if left == 0:
                break
        self._lost = lost
        self._bounds = np.cumsum([0, *(count for _, count in files)])
        self._files = [number for number, _ in files]
        self._row = np.concatenate([*numbers, np.zeros(0, np.uint32)])
        numbers.clear()
        self._ids = np.concatenate([*ids, np.zeros(0, np.int64)])
        ids.clear()
        self._order: npt.NDArray[np.uint32] | None = None
        if not bool((self._ids[1:] > self._ids[:-1]).all()):
            order = np.argsort(self._ids, kind="stable").astype(np.uint32)
            self._ids, self._order = self._ids[order], order
        # The first of equals is looked up; the others are told at the end.
        self._is_found = np.zeros(len(self._ids), bool)
        self._is_again = np.zeros(len(self._ids), bool)
        self._is_again[1:] = self._ids[1:] == self._ids[:-1]

    def _places(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Mask]:
        if not len(self._ids):
            return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return at.astype(np.int64), self._ids[at] == ids

    def is_wanted(self, ids: npt.NDArray[np.int64]) -> Mask:
        """(n,) whether the subset has each id."""
        return self._places(ids)[1]

    def matched_rows(self, rows: Rows, ids: npt.NDArray[np.int64]) -> Iterator[Rows]:
        """Metadata rows that the subset has, under the subset's row numbers; each id once."""
        at, _ = self._places(ids)
        first = np.zeros(len(at), bool)
        first[np.unique(at, return_index=True)[1]] = True
        is_new = first & ~self._is_found[at]
        self._is_found[at] = True
        if is_new.any():
            chosen = rows.take(is_new)
            yield from self._named(chosen.table, at[is_new], chosen.faults)

    def lost_rows(self, schema: pa.Schema) -> Iterator[Rows]:
        """Rows of the subset without an id, and those whose id was there before."""
        for rows in self._lost:
            empty = np.zeros(0, np.int64)
            none = Rows(
                name=rows.name,
                numbers=empty,
                table=schema.empty_table(),
                faults=np.zeros(0, np.uint8),
            )
            yield none.with_lost_rows(rows.numbers)
        yield from self._faulty(schema, np.flatnonzero(self._is_again), "duplicate_id")

    def unmatched_rows(self, schema: pa.Schema) -> Iterator[Rows]:
        """Rows of the subset that the metadata does not have."""
        missing = np.flatnonzero(~self._is_found & ~self._is_again)
        yield from self._faulty(schema, missing, "not_in_metadata")

    def _faulty(
        self, schema: pa.Schema, places: npt.NDArray[np.int64], reason: str
    ) -> Iterator[Rows]:
        for start in range(0, len(places), 65_536):
            part = places[start : start + 65_536]
            nulls = [pa.nulls(len(part), kind) for kind in schema.types]
            codes = np.full(len(part), CODES[reason], np.uint8)
            yield from self._named(pa.table(nulls, schema=schema), part, codes)

    def _named(
        self, table: pa.Table, places: npt.NDArray[np.int64], faults: npt.NDArray[np.uint8]
    ) -> Iterator[Rows]:
        """Rows by the subset's own file and row number; one part for each file."""
        given = places if self._order is None else self._order[places].astype(np.int64)
        part = np.searchsorted(self._bounds, given, side="right") - 1
        file = np.array(self._files, np.int64)[part] if len(part) else part
        # Runs of one file, so that the order stays whatever the blocks were.
        ends = [*(np.flatnonzero(file[1:] != file[:-1]) + 1).tolist(), len(file)]
        start = 0
        for end in ends:
            if end > start:
                yield Rows(
                    name=self._names[file[start]],
                    numbers=self._row[given[start:end]].astype(np.int64),
                    table=table.slice(start, end - start),
                    faults=faults[start:end],
                )
            start = end
