"""What a list is: told by its content, and held against what the user says it is."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from declip_ingest.list_files import ListFile, open_raw, read_head
from declip_ingest.parquet_files import open_parquet
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

ListKind = Literal[
    "auto",
    "cc3m",
    "cc12m",
    "yfcc100m",
    "yfcc15m_v1",
    "yfcc15m_v2",
    "laion",
    "datacomp",
    "coyo",
    "table",
]
Form = Literal["parquet", "json", "jsonl", "csv", "tsv", "lines", "hashes"]
"""``lines`` are tab-separated without a header and without quotes; ``hashes`` CC12M's hash file."""

MARKS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "datacomp": (
        frozenset({"uid", "url", "text"}),
        frozenset({"clip_b32_similarity_score", "clip_l14_similarity_score", "face_bboxes"}),
    ),
    "coyo": (
        frozenset({"id", "url", "text"}),
        frozenset({"image_phash", "clip_similarity_vitb32", "clip_similarity_vitl14"}),
    ),
    "laion": (
        frozenset({"url", "text"}),
        frozenset({"sample_id", "nsfw", "similarity", "punsafe", "pwatermark"}),
    ),
    "yfcc15m_v2": (frozenset({"caption", "filename", "url"}), frozenset({"filename"})),
}
"""Kind -> columns that it has, and of these at least one; in lower case."""
YFCC_COLUMNS = (25, 23)
"""Fields of YFCC100M's metadata: with line number and hash, and the older release without."""
EXPLAINED: dict[str, str] = {
    "cc3m": "caption<TAB>url",
    "cc12m": "url<TAB>caption",
    "yfcc100m": "YFCC100M's metadata of 25 or 23 fields",
    "yfcc15m_v1": "line number<TAB>photo id<TAB>photo hash",
    "yfcc15m_v2": "JSON lines of caption, filename and url",
    "laion": "LAION's columns URL and TEXT",
    "datacomp": "DataComp's columns uid, url and text",
    "coyo": "COYO's columns id, url and text",
    "table": "named columns",
}
"""What each kind looks like, for sentences and help."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A list's count as its makers, or those who counted it, state it."""

    what: str
    num_rows: int
    source: str
    is_about: bool = False
    """Whether the count is known to two or three digits only."""


PUBLISHED: dict[str, tuple[Published, ...]] = {
    "cc3m": (
        Published(what="CC3M train", num_rows=3_318_333, source="Hugging Face dataset card"),
        Published(what="CC3M validation", num_rows=15_840, source="Hugging Face dataset card"),
        Published(what="CC3M labelled train", num_rows=2_007_090, source="Hugging Face card"),
    ),
    "cc12m": (Published(what="CC12M", num_rows=12_000_000, source="its README", is_about=True),),
    "yfcc100m": (
        Published(
            what="YFCC100M, photos and videos",
            num_rows=100_000_000,
            source="99.2 M photos and 0.8 M videos",
            is_about=True,
        ),
    ),
    "yfcc15m_v1": (
        Published(what="YFCC15M V1", num_rows=14_829_396, source="OpenAI, data/yfcc100m.md"),
    ),
    "yfcc15m_v2": (Published(what="YFCC15M V2", num_rows=15_388_848, source="DeCLIP, issue 28"),),
}
"""Counts of method_facts section 9; of the others none is stated there."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file was taken for."""

    kind: str
    """One of :data:`ListKind`, never auto; ``hashes`` for CC12M's hash file."""
    form: Form
    has_header: bool = False
    """Of delimited text: whether its first line names the columns."""
    num_fields: int = 0
    """Of delimited text: fields of the first line."""
    names: tuple[str, ...] = ()
    """Columns, where they have names; of JSON, the first object's keys."""


def recognize(file: ListFile) -> Found:
    """Tell by its first bytes what a file is.

    Raises:
        DeclipError: missing, empty, or nothing that is known.
    """
    with open_raw(file) as f:
        magic = f.read(4)
    if magic == b"PAR1":
        names = _parquet_names(file)
        return Found(kind=_kind_of_names(names, "table"), form="parquet", names=tuple(names))
    if file.name.lower().endswith(".parquet"):
        raise DeclipError(
            f"list {file.location!r} is called parquet but does not begin as one; fetch or write "
            "it again."
        )
    head = read_head(file).removeprefix(b"\xef\xbb\xbf")
    if head.lstrip().startswith((b"[", b"{")):
        return _of_json(head.lstrip())
    if b"\n" not in head:
        head = read_head(file, 1 << 22).removeprefix(b"\xef\xbb\xbf")
    lines = [line.rstrip("\r") for line in head.decode("utf-8", "replace").split("\n")]
    whole = [line for line in (lines[:-1] or lines) if line][:200]
    return _of_lines(file, whole)


def _parquet_names(file: ListFile) -> list[str]:
    with open_parquet(file) as parquet:
        return [str(name) for name in parquet.schema_arrow.names]


def _kind_of_names(names: list[str], default: str) -> str:
    lowered = {name.lower() for name in names}
    for kind, (needed, some) in MARKS.items():
        if kind != "yfcc15m_v2" and needed <= lowered and some & lowered:
            return kind
    return default


def _of_json(head: bytes) -> Found:
    form: Form = "json" if head.startswith(b"[") else "jsonl"
    try:
        text = head.decode("utf-8", "replace")
        row, _ = json.JSONDecoder().raw_decode(text[1:].lstrip() if form == "json" else text)
    except (ValueError, RecursionError):
        row = None  # longer than what was looked at, or none: the reader names its line
    names = tuple(row) if isinstance(row, dict) else ()
    if form == "jsonl" and set(names) == MARKS["yfcc15m_v2"][0]:
        return Found(kind="yfcc15m_v2", form=form, names=names)
    return Found(kind=_kind_of_names(list(names), "table"), form=form, names=names)


def is_url(text: str) -> bool:
    """Whether a field holds a web address."""
    return text[:8].lower().startswith(("http://", "https://"))


def _of_lines(file: ListFile, lines: list[str]) -> Found:
    """Most lines decide, for the first may be a header or lack a field."""
    rows = [line.split("\t") for line in lines]
    count = Counter(map(len, rows)).most_common(1)[0][0]
    if count == 1 or (len(rows[0]) == 1 and "," in lines[0]):
        names = tuple(name.strip().strip('"') for name in lines[0].split(","))
        kind = _kind_of_names(list(names), "table")
        return Found(kind=kind, form="csv", has_header=True, names=names)
    like = [row for row in rows if len(row) == count]
    last = like[-1]
    if count in YFCC_COLUMNS and last[-1] in ("0", "1"):
        return Found(kind="yfcc100m", form="lines", num_fields=count)
    if count == 3 and last[0].isdigit() and last[1].isdigit():
        return Found(kind="yfcc15m_v1", form="lines", num_fields=count)
    if _is_hash_line(last):
        has_header = not any(is_url(field) for field in like[0])
        return Found(kind="hashes", form="hashes", num_fields=count, has_header=has_header)
    names = tuple(field.strip().strip('"') for field in like[0])
    kind = _order_of(file, like) if count in (2, 5) else "table"
    if kind != "table":
        at = 0 if kind == "cc12m" else 1
        # A row without its URL is no header.
        has_header = bool(names[at]) and not is_url(names[at])
        if not has_header:
            return Found(kind=kind, form="lines", num_fields=count)
        kind = "table"
    else:
        has_header = not any(is_url(name) for name in names)
    kind = _kind_of_names(list(names), kind)
    return Found(kind=kind, form="tsv", has_header=has_header, num_fields=count, names=names)


def _is_hash_line(fields: list[str]) -> bool:
    hexes = [f for f in fields if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", f)]
    return any(is_url(f) for f in fields) and len(hexes) == len(fields) - 1 > 0


def _order_of(file: ListFile, rows: list[list[str]]) -> str:
    """CC3M has the caption first, CC12M the URL; captions may hold addresses, so rows vote."""
    first = sum(is_url(row[0]) for row in rows)
    second = sum(is_url(row[1]) for row in rows)
    if first == second:
        if not first:
            return "table"
        raise DeclipError(
            f"list {file.location!r} has as many addresses in its first column as in its second; "
            "say which it is with kind: cc3m (caption, url) or cc12m (url, caption)."
        )
    if len(rows[0]) == 5 and second < first:
        return "table"
    return "cc12m" if first > second else "cc3m"


def agree(location: str, kind: str, found: Found) -> Found:
    """What the list will be read as, where the user names a kind or leaves it to us.

    Args:
        location: for the sentence.
        kind: the user's, or ``auto``.
        found: what the content says.

    Raises:
        DeclipError: the two disagree.
    """
    if kind not in get_args(ListKind):
        raise DeclipError(f"kind is {kind!r}.{did_you_mean(kind, get_args(ListKind))}")
    if found.kind == "hashes":
        raise DeclipError(
            f"list {location!r} holds URLs and hashes but no captions; name it with hashes, and "
            "CC12M's file of URLs and captions with lists."
        )
    if kind in ("auto", found.kind):
        if found.kind == "table" and found.form == "tsv" and not found.has_header:
            raise _unknown(location, found)
        return found
    names = found.names
    if kind in ("cc3m", "cc12m"):
        # Users put a header on CC's file for img2dataset; its captions are not quoted even so.
        is_two = found.form == "tsv" and found.has_header and found.num_fields == 2
        if is_two and {n.lower() for n in names} == {"url", "caption"}:
            first = "cc12m" if names[0].lower() == "url" else "cc3m"
            if first == kind:
                return Found(kind=kind, form="lines", has_header=True, num_fields=2)
    if kind == "table" and found.form not in ("lines", "hashes"):
        return Found(**{**vars(found), "kind": "table"})
    if kind in MARKS and found.form not in ("lines", "hashes"):
        missing = sorted(MARKS[kind][0] - {name.lower() for name in names})
        if not missing:
            return Found(**{**vars(found), "kind": kind})
        raise DeclipError(
            f"list {location!r} was said to be {kind} ({EXPLAINED[kind]}), but it has no column "
            f"{missing[0]!r}; it has: {', '.join(names)}. Leave kind out, or use kind table."
        )
    raise DeclipError(
        f"list {location!r} was said to be {kind} ({EXPLAINED[kind]}), but it looks like "
        f"{found.kind} ({EXPLAINED[found.kind]}); leave kind out, or name what it is."
    )


def _unknown(location: str, found: Found) -> DeclipError:
    return DeclipError(
        f"list {location!r} has lines of {found.num_fields} tab-separated fields without a header, "
        "which is none of the known lists; write the columns' names as its first line."
    )


def compare_counts(kind: str, num_rows: int) -> tuple[Published, str] | None:
    """The published count that is nearest to a list's, and a line with both; None where no
    count is known."""
    known = PUBLISHED.get(kind)
    if not known:
        return None
    near = min(known, key=lambda p: max(p.num_rows, num_rows) / max(1, min(p.num_rows, num_rows)))
    about = "about " if near.is_about else ""
    off = abs(num_rows - near.num_rows)
    same = off * 100 < 3 * near.num_rows if near.is_about else off == 0
    verdict = (
        "as published"
        if same
        else f"{off:,} {'more' if num_rows > near.num_rows else 'fewer'} than published"
    )
    line = f"{num_rows:,} rows, {verdict}: {near.what} has {about}{near.num_rows:,} ({near.source})"
    return near, line
