"""Which column of a list is what: URL, caption, author, license, hash and what else is carried."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from declip_ingest.list_rows import to_mask, to_text
from declip_ingest.table import ALL_COLUMNS, RESERVED_COLUMNS, check_repeats
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "url": ("url", "image_url", "img_url", "imageurl", "photo_url", "download_url"),
    "caption": ("caption", "text", "alt_text", "alt", "title"),
    "source_id": ("source_id", "uid", "sample_id", "photo_id", "photoid", "image_id", "id"),
    "author": ("author", "artist", "creator", "photographer", "owner", "nickname"),
    "license": ("license", "licence", "license_name", "licensename"),
    "expected_hash": ("expected_hash", "sha256", "sha512", "md5"),
    "boxes": ("boxes", "face_bboxes", "bboxes", "bbox"),
}
"""Ours -> what lists call it, in upper or lower case; the first that is there is taken."""
CANONICAL = tuple(USUAL_NAMES)
"""Columns with a meaning of their own in ``source/pairs.parquet``, in its order."""
KINDS: dict[str, pa.DataType] = {
    "url": pa.string(),
    "caption": pa.string(),
    "source_id": pa.string(),
    "author": pa.string(),
    "license": pa.string(),
    "expected_hash": pa.string(),
    "boxes": pa.list_(pa.list_(pa.float64())),
}
"""Their types; boxes are (left, top, right, bottom) in 0 to 1 of the upright picture."""
NONE = "none"
"""As a column's name: there is none, whatever the list calls its columns."""
HASH_DIGITS = {"md5": 32, "sha256": 64, "sha512": 128}
"""Hex digits of a digest by its algorithm."""
_TAGGED = re.compile(r"(md5|sha256|sha512):([0-9a-f]+)")
_RESERVED = frozenset(RESERVED_COLUMNS) | {"jpg", "txt", "json"}


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """What the user says of a list's columns; empty is: by the usual names."""

    url: str = ""
    caption: str = ""
    source_id: str = ""
    author: str = ""
    license: str = ""
    expected_hash: str = ""
    boxes: str = ""
    extra: tuple[str, ...] = (ALL_COLUMNS,)


@dataclass(frozen=True, kw_only=True)
class ColumnPlan:
    """From a list's columns to ours."""

    sources: dict[str, str] = field(default_factory=dict)
    """Ours -> the list's, canonical columns first."""
    hash_name: str = ""
    """The list's name of its hash column."""

    @property
    def extras(self) -> dict[str, str]:
        """Of :attr:`sources`, those without a meaning of their own."""
        return {ours: theirs for ours, theirs in self.sources.items() if ours not in CANONICAL}


SETTINGS = {"source_id": "id_column", "expected_hash": "hash_column"}
"""Settings whose name is not the column's own with ``_column`` behind it."""


def setting_of(ours: str) -> str:
    """Name of the setting that says which column is ``ours``."""
    return SETTINGS.get(ours, f"{ours}_column")


def plan_columns(location: str, names: Sequence[str], wanted: ColumnNames) -> ColumnPlan:
    """Find each of our columns among a list's.

    Raises:
        DeclipError: no URL or caption column, an unknown name, or two columns of one name.
    """
    sources: dict[str, str] = {}
    for ours in CANONICAL:
        given = getattr(wanted, ours)
        if given == NONE and ours not in ("url", "caption"):
            continue
        if given:
            sources[ours] = _one_of(location, names, given, setting_of(ours))
        elif usual := _usual(names, ours, taken=set(sources.values())):
            sources[ours] = usual
    for ours in ("url", "caption"):
        if ours not in sources:
            setting = setting_of(ours)
            raise DeclipError(
                f"list {location!r} has no column {ours!r}; name the one that is with {setting}."
                f"{did_you_mean(ours, names)}"
            )
    if sources["url"] == sources["caption"]:
        raise DeclipError(
            f"url_column and caption_column are both {sources['url']!r}; name two different "
            "columns."
        )
    hash_name = sources.get("expected_hash", "")
    check_repeats(f"list {location!r}", names, sources.values())
    carried = _extras(location, names, sources, wanted.extra)
    return ColumnPlan(sources=sources | carried, hash_name=hash_name)


def _usual(names: Sequence[str], ours: str, taken: set[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(names)}
    for usual in USUAL_NAMES[ours]:
        if usual in lowered and lowered[usual] not in taken:
            return lowered[usual]
    return None


def _one_of(location: str, names: Sequence[str], column: str, setting: str) -> str:
    if column not in names:
        raise DeclipError(
            f"list {location!r} has no column {column!r} (set by {setting})."
            f"{did_you_mean(column, names)}"
        )
    return column


def _extras(
    location: str, names: Sequence[str], sources: dict[str, str], extra: Sequence[str]
) -> dict[str, str]:
    taken = set(sources.values())
    if ALL_COLUMNS in extra:
        wanted = [name for name in names if name not in taken]
    else:
        wanted = [name for name in extra if name not in taken]
    check_repeats(f"list {location!r}", names, wanted)
    carried: dict[str, str] = {}
    for theirs in wanted:
        _one_of(location, names, theirs, "extra_columns")
        ours = carried_name(theirs)
        if ours in carried or ours in sources or (ours != theirs and ours in names):
            raise DeclipError(
                f"list {location!r} has columns {theirs!r} and {ours!r}, which would bear one "
                "name; rename one, or list the columns to carry in extra_columns."
            )
        carried[ours] = theirs
    return carried


def carried_name(theirs: str) -> str:
    """A carried column's name: its own, or ``list_NAME`` where the shards use that themselves."""
    is_ours = theirs.lower() in _RESERVED or theirs in CANONICAL
    return f"list_{theirs.lower()}" if is_ours else theirs


def plain_type(location: str, column: str, kind: pa.DataType) -> pa.DataType:
    """The type that a carried column of this type is stored in.

    Raises:
        DeclipError: bytes, which a sample's JSON cannot hold.
    """
    types = pa.types
    if types.is_dictionary(kind):
        return plain_type(location, column, kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    if is_bytes or types.is_fixed_size_binary(kind):
        raise DeclipError(
            f"column {column!r} of list {location!r} holds {kind}, which a sample's JSON cannot; "
            "leave it out of extra_columns."
        )
    return kind


def tag_hashes(values: pa.Array, column: str) -> pa.Array:
    """Digests as ``sha256:<hex>``; what is none is null.

    Args:
        values: hex digests, with or without their algorithm before them.
        column: the list's name of the column; one of an algorithm decides, else the length does.
    """
    texts = pc.ascii_lower(pc.utf8_trim_whitespace(to_text(values)[0]))
    tagged = pc.match_substring_regex(texts, f"^{_TAGGED.pattern}$")
    result = pc.if_else(tagged, texts, pa.scalar(None, pa.string()))
    known = {column.lower(): HASH_DIGITS[column.lower()]} if column.lower() in HASH_DIGITS else None
    for name, digits in (known or HASH_DIGITS).items():
        is_hex = pc.match_substring_regex(texts, f"^[0-9a-f]{{{digits}}}$")
        spelt = pc.binary_join_element_wise(name, texts, ":")
        result = pc.if_else(pc.fill_null(is_hex, False), spelt, result)
    good = is_tagged(result)
    return pc.if_else(good, result, pa.scalar(None, pa.string()))


def is_tagged(tagged: pa.Array) -> pa.Array:
    """(n,) whether each tagged digest has as many digits as its algorithm gives."""
    fits = [f"{name}:[0-9a-f]{{{digits}}}" for name, digits in HASH_DIGITS.items()]
    return pc.fill_null(pc.match_substring_regex(tagged, f"^(?:{'|'.join(fits)})$"), False)


def to_boxes(values: pa.Array, location: str, column: str) -> pa.Array:
    """Boxes as :data:`KINDS` has them, from lists or from JSON in text.

    Raises:
        DeclipError: another kind of value.
    """
    try:
        if pa.types.is_string(values.type):
            items = [json.loads(text) if text else None for text in values.to_pylist()]
            return pa.array(items, KINDS["boxes"])
        return values.cast(KINDS["boxes"])
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DeclipError(
            f"column {column!r} of list {location!r} holds no lists of boxes (left, top, right, "
            "bottom); name another with boxes_column, or none."
        ) from error


class HashCount:
    """Counts the values of a hash column that are no digest."""

    def __init__(self) -> None:
        self.num_values = 0
        self.num_bad = 0

    def add(self, tagged: pa.Array, given: pa.Array) -> None:
        """Some values, and what :func:`tag_hashes` made of them."""
        has_value = ~to_mask(pc.is_null(given))
        self.num_values += int(has_value.sum())
        self.num_bad += int((has_value & to_mask(pc.is_null(tagged))).sum())

    def judge(self, location: str, column: str) -> None:
        """Refuse a column in which most values are no digests: it will be the wrong one.

        Raises:
            DeclipError: more than half of the values are none.
        """
        if 2 * self.num_bad > self.num_values:
            raise DeclipError(
                f"column {column!r} of list {location!r} holds few md5, sha256 or sha512 digests "
                f"({self.num_bad:,} of {self.num_values:,} values are none); name another with "
                "hash_column, or none."
            )
