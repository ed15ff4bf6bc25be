"""How two lists overlap: by photo id, by URL, by the pictures' hashes."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from declip_ingest.list_progress import ListProgress
from declip_ingest.list_readers import ListOptions, open_list
from declip_ingest.list_rows import ListReader, Rows, check_pairs
from declip_ingest.url_digests import DigestSet, digest_texts
from declip_ingest.yfcc import YfccSubset
from declip_shards import DeclipError

MEASURES = ("photo_id", "url", "hash")
"""What two rows may have in common."""
NUM_EXAMPLES = 3
_PHOTO_IN_URL = re.compile(
    r"(?i)^https?://(?:[a-z0-9.-]+\.)?(?:staticflickr\.com|flickr\.com)/"
    r"(?:photos/[^/]+/(?P<page>[0-9]+)|(?:[0-9]+/)?(?P<file>[0-9]+)_[0-9a-f]+)"
)
_PARTS = r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<host>[^/?#]*)(?P<rest>[^#]*)"
_YFCC = ("yfcc100m", "yfcc15m_v1")


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two lists held against one another by one measure, in distinct values."""

    measure: str
    num_a: int
    """Distinct values of A."""
    num_b: int
    num_both: int
    examples: dict[str, list[str]] = field(default_factory=dict)
    """``both``, ``only_a``, ``only_b`` -> some values."""

    @property
    def num_only_a(self) -> int:
        """Values that B does not have."""
        return self.num_a - self.num_both

    @property
    def num_only_b(self) -> int:
        """Values that A does not have."""
        return self.num_b - self.num_both

    def as_json(self) -> dict[str, Any]:
        """Counts, shares and examples."""
        return {
            "measure": self.measure,
            "num_a": self.num_a,
            "num_b": self.num_b,
            "num_both": self.num_both,
            "num_only_a": self.num_only_a,
            "num_only_b": self.num_only_b,
            "share_of_a": share(self.num_both, self.num_a),
            "share_of_b": share(self.num_both, self.num_b),
            "examples": self.examples,
        }


def share(part: int, whole: int) -> float | None:
    """A fraction of 1; None of nothing."""
    return round(part / whole, 6) if whole else None


def normalize_urls(urls: pa.Array | pa.ChunkedArray) -> pa.Array:
    """URLs by what they fetch: no scheme, no ``www.``, host in lower case, no standard port, no
    fragment, no slash at the end. The query stays."""
    if isinstance(urls, pa.ChunkedArray):
        urls = urls.combine_chunks()
    parts = pc.extract_regex(urls, _PARTS)
    host = pc.ascii_lower(pc.struct_field(parts, "host"))
    host = pc.replace_substring_regex(host, r"(?::80|:443)$", "")
    host = pc.replace_substring_regex(host, r"^www\.", "")
    rest = pc.replace_substring_regex(pc.struct_field(parts, "rest"), "/$", "")
    return pc.coalesce(pc.binary_join_element_wise(host, rest, ""), urls)


def photo_ids(table: pa.Table, kind: str) -> pa.Array:
    """Flickr's photo ids as text: out of the URL, or of YFCC's own column; null where none is."""
    ids = pa.nulls(table.num_rows, pa.string())
    if kind in _YFCC and "source_id" in table.column_names:
        ids = table["source_id"].combine_chunks()
    if "url" in table.column_names:
        found = pc.extract_regex(table["url"].combine_chunks(), _as_re2(_PHOTO_IN_URL))
        for name in ("page", "file"):
            part = pc.struct_field(found, name)
            is_there = pc.fill_null(pc.greater(pc.binary_length(part), 0), False)
            ids = pc.coalesce(ids, pc.if_else(is_there, part, pa.scalar(None, pa.string())))
    return ids


def _as_re2(pattern: re.Pattern[str]) -> str:
    return pattern.pattern


def keys_of(rows: Rows, kind: str) -> dict[str, pa.Array]:
    """Each measure's values of some rows, nulls left out."""
    table = rows.table
    keys = {"photo_id": photo_ids(table, kind)}
    if "url" in table.column_names:
        keys["url"] = normalize_urls(table["url"])
    if "expected_hash" in table.column_names:
        keys["hash"] = table["expected_hash"].combine_chunks()
    return {
        name: values.filter(pc.fill_null(pc.greater(pc.binary_length(values), 0), False))
        for name, values in keys.items()
    }


@dataclass(frozen=True, kw_only=True)
class ListKeys:
    """A list as sets of digests: 16 bytes for each distinct value of each measure."""

    location: str
    kind: str
    num_rows: int
    sets: dict[str, DigestSet]


def _rows_of(reader: ListReader, on_bytes: Callable[[int], None]) -> Iterator[Rows]:
    if isinstance(reader, YfccSubset) and "url" not in reader.schema.names:
        batches = reader.read_ids(on_bytes)
    else:
        batches = reader.read(on_bytes)
    for rows in batches:
        if len(rows.faults):
            rows = check_pairs(rows)
            # A row without a caption, or a video, still names its picture.
            yield rows


def read_keys(location: str, options: ListOptions) -> ListKeys:
    """Read a list to the sets of its ids, URLs and hashes.

    Raises:
        DeclipError: as :func:`declip_ingest.list_readers.open_list`.
    """
    reader = open_list(location, options)
    sets = {name: DigestSet() for name in MEASURES}
    num_rows = 0
    with ListProgress(location, reader.num_bytes) as progress:
        for rows in _rows_of(reader, progress.add_bytes):
            progress.add_rows(len(rows.faults))
            num_rows += len(rows.faults)
            for name, values in keys_of(rows, reader.kind).items():
                sets[name].add(digest_texts(values))
    return ListKeys(location=location, kind=reader.kind, num_rows=num_rows, sets=sets)


def compare_lists(
    a: ListKeys, b: ListKeys, options_a: ListOptions, options_b: ListOptions
) -> list[Overlap]:
    """The overlap by each measure that both lists have.

    Raises:
        DeclipError: they have none in common.
    """
    measures = [name for name in MEASURES if len(a.sets[name]) and len(b.sets[name])]
    if not measures:
        has = [", ".join(n for n in MEASURES if len(k.sets[n])) or "none" for k in (a, b)]
        raise DeclipError(
            f"lists {a.location!r} (it has: {has[0]}) and {b.location!r} (it has: {has[1]}) share "
            "no kind of value that could be compared; name the metadata of YFCC15M V1 with "
            "--metadata, or the columns."
        )
    overlaps = []
    for name in measures:
        both = a.sets[name].count_shared(b.sets[name])
        overlaps.append(
            Overlap(measure=name, num_a=len(a.sets[name]), num_b=len(b.sets[name]), num_both=both)
        )
    examples_a = _examples(a, b, overlaps, options_a, is_a=True)
    examples_b = _examples(b, a, overlaps, options_b, is_a=False)
    return [
        Overlap(
            measure=o.measure,
            num_a=o.num_a,
            num_b=o.num_b,
            num_both=o.num_both,
            examples={**examples_a[o.measure], **examples_b[o.measure]},
        )
        for o in overlaps
    ]


def _examples(
    own: ListKeys, other: ListKeys, overlaps: list[Overlap], options: ListOptions, *, is_a: bool
) -> dict[str, dict[str, list[str]]]:
    """The first values of a list that the other has, and that it lacks, as they are normalized."""
    wanted: dict[tuple[str, bool], int] = {}
    found: dict[str, dict[str, list[str]]] = {o.measure: {} for o in overlaps}
    for o in overlaps:
        num_only = o.num_only_a if is_a else o.num_only_b
        wanted[o.measure, False] = min(NUM_EXAMPLES, num_only)
        wanted[o.measure, True] = min(NUM_EXAMPLES, o.num_both) if is_a else 0
    lists: dict[tuple[str, bool], list[str]] = {key: [] for key in wanted}
    reader = open_list(own.location, options)
    for rows in _rows_of(reader, lambda count: None):
        if all(len(lists[key]) >= count for key, count in wanted.items()):
            break
        for name, values in keys_of(rows, own.kind).items():
            if name not in found:
                continue
            is_shared = other.sets[name].contains(digest_texts(values))
            for shared in (True, False):
                missing = wanted[name, shared] - len(lists[name, shared])
                if missing > 0:
                    some = values.filter(pa.array(is_shared == shared))
                    _add_new(lists[name, shared], some.slice(0, 100).to_pylist(), missing)
    for (name, shared), values in sorted(lists.items(), key=lambda item: -item[0][1]):
        if shared and not is_a:
            continue
        label = "both" if shared else ("only_a" if is_a else "only_b")
        found[name][label] = values
    return found


def _add_new(chosen: list[str], values: list[str], count: int) -> None:
    for value in dict.fromkeys(values):
        if count and value not in chosen:
            chosen.append(value)
            count -= 1
