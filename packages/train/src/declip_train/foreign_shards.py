"""Webdataset shards that this project did not make: a pool from the tars alone.

What is a pair is as open_clip and webdataset have it (open_clip_train/data.py, webdataset's
tariterators): a member's key is its path up to the first dot of its file name, its extension the
rest in lower case; members of a key lie together; a pair has a picture (jpg, png, jpeg or webp, in
this order) and a caption, the ``txt``. Beyond that, where there is no ``txt``, the ``json``'s
"caption" is taken. What is no pair is left out and counted.

Each tar is read once, header by header, and never again while its size and time (of a remote one:
size and the server's tag) stay. ``sizes.json`` and ``NAME.parquet`` beside ``NAME.tar``, as
img2dataset and webdataset leave them, are used where they are: to check how many samples a tar has,
and to know pictures' sizes.
"""

from __future__ import annotations

import itertools
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip_shards import DeclipError
from declip_train.column_files import Chunks, Columns, cached_columns, digest_of
from declip_train.sample_columns import (
    PIECE,
    SamplePool,
    fingerprint_of,
    piece_columns,
    piece_of,
    pool_columns,
)
from declip_train.shard_listing import in_threads
from declip_train.tar_cache import TarSource, find_tar, is_remote, open_fetched
from declip_train.tar_listing import TarMember, walk_tar

__all__ = ["ForeignPool", "data_entries", "expand_braces", "foreign_pool"]

_PICTURES = ("jpg", "png", "jpeg", "webp")
_TEXTS = ("txt", "json")
_PLACE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""Key and extension of a member's name."""
_SKIPPED = re.compile(r"(?:^|/)__[^/]*__(?:$|/)|(?:^|/)__MACOSX/")
"""Members that say something of the archive itself."""
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?")
_MOST_TARS = 1_000_000
_SCANS = "scans"
_KEPT_SCANS = 200_000
_LARGEST_SIDE = 1 << 16
_LARGEST_PICTURE = 1 << 31


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}.tar`` -> a00.tar, a01.tar, a02.tar; ``{x,y}`` -> x, y; as a shell has them.

    Raises:
        DeclipError: a brace is never closed, or there are more than a million names.
    """
    begin = pattern.find("{")
    if begin < 0:
        return [pattern]
    depth, commas = 0, [begin]
    for place in range(begin, len(pattern)):
        letter = pattern[place]
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 1:
            commas.append(place)
        if not depth:
            break
    else:
        raise DeclipError(
            f"train_data has {pattern!r}, whose brace is never closed; write it as in "
            "'{00000..00999}.tar'."
        )
    inside, commas = pattern[begin + 1 : place], [*commas, place]
    found = _RANGE.fullmatch(inside)
    if found is not None:
        middles = _range(found, pattern)
    elif len(commas) > 2:
        parts = [pattern[a + 1 : b] for a, b in itertools.pairwise(commas)]
        middles = [name for part in parts for name in expand_braces(part)]
    else:
        middles = ["{" + name + "}" for name in expand_braces(inside)]
    tails = expand_braces(pattern[place + 1 :])
    if len(middles) * len(tails) > _MOST_TARS:
        raise DeclipError(
            f"train_data has {pattern!r}, which stands for more than {_MOST_TARS} tars; correct "
            "its range."
        )
    return [pattern[:begin] + middle + tail for middle in middles for tail in tails]


def _range(found: re.Match[str], pattern: str) -> list[str]:
    first, last, step = found.groups()
    if first.lstrip("-").isdigit() != last.lstrip("-").isdigit():
        raise DeclipError(
            f"train_data has {pattern!r}, whose range goes from a number to a letter; write it as "
            "in '{00000..00999}.tar'."
        )
    width = abs(int(step or 1)) or 1
    if first.lstrip("-").isdigit():
        start, stop = int(first), int(last)
        # As a shell has it: one padded end is enough for all to be padded.
        padded = any(re.match(r"-?0\d", end) for end in (first, last))
        digits = max(len(first), len(last)) if padded else 0
        if abs(stop - start) // width >= _MOST_TARS:
            raise DeclipError(
                f"train_data has {pattern!r}, which stands for more than {_MOST_TARS} tars; "
                "correct its range."
            )
        sign = 1 if stop >= start else -1
        return [f"{number:0{digits}d}" for number in range(start, stop + sign, width * sign)]
    start, stop = ord(first), ord(last)
    sign = 1 if stop >= start else -1
    return [chr(number) for number in range(start, stop + sign, width * sign)]


def data_entries(values: Sequence[str]) -> list[str]:
    """The entries of ``train_data`` (or of ``data_weights``), with ``::`` taken apart."""
    return [part.strip() for value in values for part in value.split("::")]


def _tars_of(entry: str) -> list[str]:
    """The tars that an entry stands for, in order."""
    if not entry or entry.startswith("pipe:"):
        raise DeclipError(
            f"train_data has {entry!r}, but must have paths or URLs of tars (s3://, https://, ...)"
            "; no commands are run."
        )
    names = expand_braces(entry)
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise DeclipError(
            f"train_data names {repeated[0]!r} twice in {entry!r}; name it once, and set "
            "data_weights to meet it more often."
        )
    for name in names:
        if not is_remote(name) and Path(name).is_dir():
            raise DeclipError(
                f"train_data has the folder {name!r}, but must name tars, as in "
                f"'{name.rstrip('/')}/{{00000..00999}}.tar'."
            )
    return [name if is_remote(name) else str(Path(name).absolute()) for name in names]


@dataclass(frozen=True, kw_only=True)
class ForeignPool:
    """The pairs of ``train_data``."""

    key: str
    """Name of the pool in the cache."""
    pool: SamplePool
    sources: list[TarSource]
    part_sizes: tuple[int, ...]
    """Pairs of each entry, one behind the other."""
    dropped: Mapping[str, int]
    """What is no pair, by reason."""
    fingerprint: str
    """sha256 of the pairs."""


def foreign_pool(entries: Sequence[str], base: Path, room: float) -> ForeignPool:
    """All pairs of some tars, in the order of the entries, the tars and their members.

    Args:
        entries: of :func:`data_entries`.
        base: the cache.
        room: bytes that remote tars may take there.

    Raises:
        DeclipError: a pattern is wrong; a tar is missing, cut or damaged; it has another number of
            samples than ``sizes.json`` or its table says; or an entry has no pair.
    """
    tars = [_tars_of(entry) for entry in entries]
    names = [name for some in tars for name in some]
    sources = list(in_threads("looking for tars", names, find_tar))
    sizes_of = {folder: _sizes_of(folder) for folder in sorted({*map(posixpath.dirname, names)})}
    beside = list(in_threads("looking beside tars", names, lambda name: _beside(name, sizes_of)))
    identity = [[s.identity(), b.identity] for s, b in zip(sources, beside, strict=True)]
    key = digest_of("foreign pool", [len(some) for some in tars], identity)

    def build() -> tuple[dict[str, Chunks], dict[str, Any]]:
        jobs = list(zip(sources, beside, strict=True))
        found = list(
            in_threads("listing foreign tars", jobs, lambda job: _scanned(*job, base, room))
        )
        dropped: Counter[str] = Counter()
        for scan in found:
            dropped.update(scan.meta["dropped"])
        pieces = _with_own_keys([piece_of(scan) for scan in found], names)
        ends = np.cumsum([0, *map(len, tars)]).tolist()
        rows = [piece.num_rows for piece in pieces]
        sizes = [sum(rows[a:b]) for a, b in itertools.pairwise(ends)]
        columns, meta = pool_columns(pieces, by_key=False)
        more = {"part_sizes": sizes, "dropped": dict(sorted(dropped.items()))}
        return columns, {**meta, **more}

    columns = cached_columns(base, "samples", key, build, what="the list of samples")
    pool = SamplePool.of(columns)
    sizes = tuple(int(size) for size in columns.meta["part_sizes"])
    for entry, size in zip(entries, sizes, strict=True):
        if not size:
            raise DeclipError(
                f"train_data has {entry!r}, whose tars hold no pair of a picture ("
                f"{', '.join(_PICTURES)}) and a caption (txt, or caption of the json); left out "
                f"were {columns.meta['dropped'] or 'no members'}. Correct the entry."
            )
    digest = cached_columns(
        base,
        "samples",
        digest_of("fingerprint", key),
        lambda: ({}, {"fingerprint": fingerprint_of(pool, np.arange(len(pool)), sizes)}),
        what="the digest of the samples",
    )
    return ForeignPool(
        key=key,
        pool=pool,
        sources=sources,
        part_sizes=sizes,
        dropped=columns.meta["dropped"],
        fingerprint=digest.meta["fingerprint"],
    )


@dataclass(frozen=True, kw_only=True)
class _Beside:
    """What lies beside a tar."""

    table: str
    """Its parquet; empty where there is none."""
    expected: int | None
    """Samples that sizes.json says; None where it says nothing."""
    identity: list[Any]


def _beside(tar: str, sizes_of: Mapping[str, Mapping[str, int]]) -> _Beside:
    folder, name = posixpath.split(tar)
    table, state = "", None
    stem, extension = posixpath.splitext(tar)
    if extension == ".tar":
        try:
            found = find_tar(f"{stem}.parquet")
            table, state = f"{stem}.parquet", [found.size, found.version]
        except DeclipError:
            pass
    expected = sizes_of[folder].get(name)
    return _Beside(table=table, expected=expected, identity=[state, expected])


def _sizes_of(folder: str) -> dict[str, int]:
    """sizes.json of a folder of tars: samples by name; empty where there is none."""
    path = f"{folder}/sizes.json"
    try:
        with fsspec.open(path, "rb") as file:
            content = file.read()
    except Exception:  # file systems raise what they like for what is not there
        return {}
    try:
        sizes = {str(name): int(size) for name, size in json.loads(content).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); correct it, or delete it: it is not needed."
        ) from error
    return sizes


def _scanned(source: TarSource, beside: _Beside, base: Path, room: float) -> Columns:
    """The list of one tar, from the cache where it was read before."""

    def build() -> tuple[dict[str, Chunks], dict[str, Any]]:
        if not is_remote(source.url):
            return _scan(source.url, source.url, beside)
        with open_fetched(source, base, room) as file:
            return _scan(f"/dev/fd/{file.fileno()}", source.url, beside)

    key = digest_of("scan", source.identity(), beside.identity, bool(beside.table))
    return cached_columns(
        base, _SCANS, key, build, what=f"the list of {source.url!r}", keep=_KEPT_SCANS
    )


def _scan(path: str, shown: str, beside: _Beside) -> tuple[dict[str, Chunks], dict[str, Any]]:
    """Read a tar's headers and captions."""
    columns: dict[str, list[Any]] = {field.name: [] for field in PIECE}
    dropped: Counter[str] = Counter()
    number = 0
    for key, members in _groups(walk_tar(path, _is_text, shown)):
        number += 1
        picture = next((members[e] for e in _PICTURES if e in members), None)
        details = _details(members.get("json"))
        caption = _caption(members.get("txt"), details)
        if picture is None or picture.size >= _LARGEST_PICTURE:
            dropped["no picture" if picture is None else "picture above 2 GiB"] += 1
            continue
        if isinstance(caption, int):
            dropped[_REASONS[caption]] += 1
            continue
        height, width = _sides(details)
        row = (key, caption, picture.offset, picture.size, height, width)
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
    if beside.expected not in (None, number):
        raise DeclipError(
            f"the tar {shown!r} holds {number} samples, but sizes.json beside it says "
            f"{beside.expected}: it was exchanged or is not whole; fetch it again, or correct or "
            "delete sizes.json."
        )
    piece = pa.table(columns, schema=PIECE)
    if beside.table:
        piece = _with_sizes(piece, beside.table, shown, number)
    return piece_columns(piece), {"dropped": dict(dropped)}


_REASONS = ("no caption", "caption is not UTF-8")


def _is_text(name: str) -> bool:
    return name.lower().endswith((".txt", ".json"))


def _groups(members: Iterator[TarMember]) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Members of a key that lie together; a repeated extension begins the next sample."""
    current: str | None = None
    found: dict[str, TarMember] = {}
    for member in members:
        place = _PLACE.fullmatch(member.name)
        if place is None or _SKIPPED.search(member.name):
            continue
        key, extension = place[1], place[2].lower()
        if key != current or extension in found:
            if current is not None:
                yield current, found
            current, found = key, {}
        found[extension] = member
    if current is not None:
        yield current, found


def _details(member: TarMember | None) -> dict[str, Any]:
    """A sample's json, where it is an object."""
    try:
        value = json.loads(member.data or b"") if member is not None else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _caption(member: TarMember | None, details: Mapping[str, Any]) -> str | int:
    """The caption, or the number of the reason why there is none."""
    if member is None:
        caption = details.get("caption")
        if not isinstance(caption, str):
            return 0
    else:
        try:
            caption = (member.data or b"").decode()
        except UnicodeDecodeError:
            return 1
    try:
        caption.encode()
    except UnicodeEncodeError:
        return 1
    return caption


def _sides(details: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width as img2dataset's json has them; 0, 0 where it does not."""
    sides = details.get("height"), details.get("width")
    if all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in sides):
        height, width = sides
        return int(height or 0), int(width or 0)
    return 0, 0


def _with_sizes(piece: pa.Table, path: str, shown: str, number: int) -> pa.Table:
    """Heights and widths from the tar's parquet, as img2dataset writes it."""
    try:
        with fsspec.open(path, "rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); fetch it again, or delete it: it is not needed."
        ) from error
    if not {"key", "status", "height", "width"} <= set(table.column_names):
        return piece
    table = table.filter(pc.equal(table.column("status"), "success"))
    if table.num_rows != number:
        raise DeclipError(
            f"the tar {shown!r} holds {number} samples, but its table {path!r} lists "
            f"{table.num_rows}: one of them was exchanged or is not whole; fetch both again, or "
            "delete the table: it is not needed."
        )
    names = table.column("key").cast(pa.large_string()).combine_chunks()
    places = pc.index_in(piece.column("key").combine_chunks(), value_set=names)
    for side in ("height", "width"):
        known = table.column(side).cast(pa.int32()).take(places)
        at = piece.schema.get_field_index(side)
        piece = piece.set_column(at, PIECE.field(side), pc.fill_null(known, 0))
    return piece


def _with_own_keys(pieces: list[pa.Table], names: Sequence[str]) -> list[pa.Table]:
    """Keys that several samples share, made each sample's own: ``TAR/KEY``, with ``#2`` behind the
    second of a tar. Draws go by the key, and a message that names one must mean one sample."""
    every = pa.chunked_array([c for p in pieces for c in p.column("key").chunks], pa.large_string())
    if len(pc.unique(every)) == len(every):
        return pieces
    counted = pc.value_counts(every)
    several = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
    seen: Counter[str] = Counter()
    changed = []
    for piece, name in zip(pieces, names, strict=True):
        shared = pc.is_in(piece.column("key"), value_set=several).to_pylist()
        keys = piece.column("key").to_pylist()
        stem = posixpath.splitext(posixpath.basename(name))[0]
        for row, key in enumerate(keys):
            if shared[row]:
                own = f"{stem}/{key}"
                seen[own] += 1
                keys[row] = own if seen[own] == 1 else f"{own}#{seen[own]}"
        changed.append(piece.set_column(0, PIECE.field("key"), pa.array(keys, pa.large_string())))
    return changed
