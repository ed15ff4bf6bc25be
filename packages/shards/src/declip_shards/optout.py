"""Who asked for removal: the list that every later ingest honors, and taking samples out of shards.

    optout/list.parquet    kind (url, sha256 or md5), digest; sorted, so the same for any order

The list holds digests alone, for a list of URLs that must not be named would name them. A URL's is
the sha256 of its form in :mod:`declip_shards.urls`; a content's the hash itself. Keys may be given,
but are not in it: after a change of the shard size a key is another row's. What they stand for is.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from declip_shards import layout, sidecars
from declip_shards.errors import DeclipError
from declip_shards.reader import IMAGE_EXTENSIONS, TAR_BLOCK
from declip_shards.store import Store
from declip_shards.urls import canonical_url

Kind = Literal["url", "key", "sha256", "md5"]
KINDS: tuple[Kind, ...] = ("url", "key", "sha256", "md5")
LASTING_KINDS: tuple[Kind, ...] = ("url", "sha256", "md5")
"""What means the same at every later ingest."""
FOLDER = "optout"
LIST = f"{FOLDER}/list.parquet"
PENDING = f"{FOLDER}/pending.json"
"""The plan of an opt-out that is under way: it names what is removed, and goes with the last write,
so that one that was cut short ends with the same bytes and the same proof."""
SCHEMA = pa.schema([("kind", pa.string()), ("digest", pa.string())])
"""Columns of the list, sorted by both."""
REASON = "opt_out_list"
"""``error_message`` of a row that was taken out, and of one that ingest did not fetch."""
STATUS = "failed_to_download"
"""``status`` of such a row."""
KEPT_COLUMNS = ("key", "status", "error_message")
"""What a removed row still says; every other column is null."""


def url_digest(url: str) -> str:
    """sha256 of a URL's canonical form, hex."""
    return _sha256(canonical_url(url))


def key_digest(key: str) -> str:
    """sha256 of a sample's key, hex."""
    return _sha256(key)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class OptOut:
    """What may not be in a dataset. False where nothing is listed."""

    digests: Mapping[Kind, frozenset[str]] = field(default_factory=dict)
    """Hex digests by what they are of."""

    def of(self, kind: Kind) -> frozenset[str]:
        """Digests of one kind."""
        return self.digests.get(kind, frozenset())

    def blocks_url(self, url: str | None) -> bool:
        """Whether this URL, in whatever spelling, is listed."""
        return bool(self.of("url")) and url is not None and url_digest(url) in self.of("url")

    def blocks_content(self, sha256: str | None) -> bool:
        """Whether a file of this sha256 (64 hex digits, any case) is listed."""
        return sha256 is not None and sha256.lower() in self.of("sha256")

    def blocks_bytes(self, data: bytes) -> bool:
        """Whether these very bytes are listed, by sha256 or md5."""
        listed = self.of("md5")
        if listed and hashlib.md5(data, usedforsecurity=False).hexdigest() in listed:
            return True
        return bool(self.of("sha256")) and self.blocks_content(hashlib.sha256(data).hexdigest())

    def __bool__(self) -> bool:
        return any(self.digests.values())

    def __len__(self) -> int:
        return sum(map(len, self.digests.values()))

    def __or__(self, other: "OptOut") -> "OptOut":
        return OptOut(digests={kind: self.of(kind) | other.of(kind) for kind in KINDS})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptOut) and self.pairs() == other.pairs()

    def __hash__(self) -> int:
        return hash(tuple(self.pairs()))

    def pairs(self) -> list[tuple[str, str]]:
        """(kind, digest), sorted."""
        return sorted((kind, digest) for kind in KINDS for digest in self.of(kind))

    def name(self) -> str:
        """sha256 over the sorted entries, hex: the same whatever the order of a list."""
        digest = hashlib.sha256()
        for pair in self.pairs():
            digest.update(" ".join(pair).encode() + b"\n")
        return digest.hexdigest()

    def lasting(self) -> "OptOut":
        """What later ingests honor: all but the keys."""
        return OptOut(digests={kind: self.of(kind) for kind in LASTING_KINDS})

    def pack(self) -> bytes:
        """The bytes of ``optout/list.parquet``: of what is :meth:`lasting`."""
        pairs = self.lasting().pairs()
        columns = {
            "kind": [kind for kind, _ in pairs],
            "digest": [digest for _, digest in pairs],
        }
        return sidecars.pack_table(pa.table(columns, schema=SCHEMA))


def make_optout(entries: Iterable[tuple[Kind, str]]) -> OptOut:
    """From URLs, keys and hex hashes as people write them."""
    makers = {"url": url_digest, "key": key_digest, "sha256": str.lower, "md5": str.lower}
    found: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
    for kind, value in entries:
        found[kind].add(makers[kind](value))
    return OptOut(digests={kind: frozenset(values) for kind, values in found.items()})


def load_optout(store: Store) -> OptOut:
    """The dataset's list; an empty one where nobody has asked.

    Keys in it, which early versions kept, count no more.

    Raises:
        DeclipError: the list is damaged: a list that cannot be read must not be an empty one.
    """
    if not store.exists(LIST):
        return OptOut()
    table = sidecars.read_table(store, LIST, SCHEMA.names)
    found: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
    columns = (table.column(name).to_pylist() for name in SCHEMA.names)
    for kind, digest in zip(*columns, strict=True):
        if kind not in found:
            raise DeclipError(
                f"{LIST!r} has an entry of kind {kind!r}, this version knows {', '.join(KINDS)}; "
                "upgrade opendeclip."
            )
        found[kind].add(digest)
    return OptOut(digests={kind: frozenset(found[kind]) for kind in LASTING_KINDS})


# Taking samples out of a shard -------------------------------------------------------------------


def drop_from_shard(store: Store, shard: str, keys: Collection[str]) -> dict[str, bytes | None]:
    """The new bytes of the files of a shard without these samples; only of those that change.

    A row stays in the parquet with its key and loses everything else, so that keys never move and
    counts stay right; its tar members, its entry in the ledger and its quarantined bytes go.

    Returns:
        relative path -> bytes, or None for a file to remove. Empty where nothing is left to do.

    Raises:
        DeclipError: the tar or a table is damaged.
    """
    changes: dict[str, bytes | None] = {}
    path = layout.shard_parquet_path(shard)
    table = sidecars.read_table(store, path)
    cleared = clear_rows(table, keys)
    if cleared is not None:
        changes[path] = sidecars.pack_table(cleared)
        changes[layout.shard_stats_path(shard)] = _recounted_stats(store, shard, cleared)
    tar = drop_members(store, layout.tar_path(shard), keys)
    if tar is not None:
        changes[layout.tar_path(shard)] = tar
    ledger = layout.ledger_path(shard)
    if store.exists(ledger):
        cleared = clear_ledger(sidecars.read_table(store, ledger), keys)
        if cleared is not None:
            changes[ledger] = sidecars.pack_table(cleared)
    for key in sorted(keys):
        if store.exists(layout.quarantine_path(key)):
            changes[layout.quarantine_path(key)] = None
    return changes


def _where(table: pa.Table, keys: Collection[str]) -> list[bool]:
    return [key in keys for key in table.column("key").to_pylist()]


def _without(column: pa.ChunkedArray, gone: list[bool]) -> pa.Array:
    """``column`` with null where ``gone``; any type."""
    kept = [None if lost else row for row, lost in enumerate(gone)]
    return column.combine_chunks().take(pa.array(kept, pa.int64()))


def _with(column: pa.ChunkedArray, gone: list[bool], value: Any) -> pa.Array:
    values = [value if lost else old for old, lost in zip(column.to_pylist(), gone, strict=True)]
    return pa.array(values, column.type)


def clear_rows(table: pa.Table, keys: Collection[str]) -> pa.Table | None:
    """A shard's table with the rows of ``keys`` emptied; None where they are already.

    Types, order and all other rows are as they were.
    """
    gone = _where(table, keys)
    done = [message == REASON for message in table.column("error_message").to_pylist()]
    if not any(lost and not cleared for lost, cleared in zip(gone, done, strict=True)):
        return None
    columns = []
    for name in table.column_names:
        column = table.column(name)
        if name == "status":
            columns.append(_with(column, gone, STATUS))
        elif name == "error_message":
            columns.append(_with(column, gone, REASON))
        else:
            columns.append(column.combine_chunks() if name == "key" else _without(column, gone))
    return pa.Table.from_arrays(columns, schema=table.schema)


def clear_ledger(table: pa.Table, keys: Collection[str]) -> pa.Table | None:
    """A ledger that no longer says where these rows came from; None where it does not.

    How often and how long they were tried stays: it names nobody.
    """
    gone = _where(table, keys)
    done = [reason == REASON for reason in table.column("reason").to_pylist()]
    if not any(lost and not cleared for lost, cleared in zip(gone, done, strict=True)):
        return None
    texts = {"status": STATUS, "reason": REASON, "host": "", "detail": ""}
    for name, value in texts.items():
        table = _replaced(table, name, _with(table.column(name), gone, value))
    for name in ("url", "http_status", "num_bytes"):
        table = _replaced(table, name, _without(table.column(name), gone))
    return table.combine_chunks()


def _replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), table.schema.field(name), column)


def _recounted_stats(store: Store, shard: str, table: pa.Table) -> bytes:
    """img2dataset's stats with today's counts; its times stay."""
    path = layout.shard_stats_path(shard)
    try:
        stats = json.loads(store.read_bytes(path))
    except ValueError as error:
        raise DeclipError(f"{path!r} is damaged ({error}); rerun ingest for this shard.") from error
    statuses = table.column("status").to_pylist()
    messages = table.column("error_message").to_pylist()
    counts = Counter(statuses)
    stats |= {
        "count": len(statuses),
        "successes": counts["success"],
        "failed_to_download": counts["failed_to_download"],
        "failed_to_resize": counts["failed_to_resize"],
        "status_dict": dict(Counter(m or s for m, s in zip(messages, statuses, strict=True))),
    }
    return json.dumps(stats, indent=2, sort_keys=True).encode()


def drop_members(store: Store, path: str, keys: Collection[str]) -> bytes | None:
    """A tar without the members of these samples; None where it has none of them.

    What is kept is copied block by block: also what another tool put there stays as it was.

    Raises:
        DeclipError: the tar is cut or damaged.
    """
    data = store.read_bytes(path)
    places = _places(data, path)
    kept = [(start, stop) for key, start, stop in places if key not in keys]
    if len(kept) == len(places):
        return None
    sink = io.BytesIO()
    view = memoryview(data)
    for start, stop in kept:
        sink.write(view[start:stop])
    # The end that tarfile itself writes: two empty blocks, filled up to a whole record.
    sink.write(bytes(2 * TAR_BLOCK))
    sink.write(bytes(-sink.tell() % tarfile.RECORDSIZE))
    return sink.getvalue()


def _places(data: bytes, path: str) -> list[tuple[str, int, int]]:
    """(key, first byte of the header, end) of each member; a cut or broken archive is refused."""
    places, end = [], 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // TAR_BLOCK) * TAR_BLOCK
                places.append((info.name.partition(".")[0], info.offset, end))
    except tarfile.TarError as error:
        raise DeclipError(f"{path!r} is not a readable tar ({error}); rerun ingest.") from error
    if end + 2 * TAR_BLOCK > len(data) or data[end:].strip(b"\0"):
        raise DeclipError(
            f"{path!r} is damaged after byte {end}: rerun ingest to fetch this shard again."
        )
    return places


def stored_digests(store: Store, shard: str) -> dict[str, tuple[str, str]]:
    """key -> (sha256, md5), hex, of each picture as it lies in the shard's tar.

    Raises:
        DeclipError: the tar is damaged.
    """
    path = layout.tar_path(shard)
    found = {}
    try:
        with store.open(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                stream = tar.extractfile(info) if extension in IMAGE_EXTENSIONS else None
                if stream is not None:
                    data = stream.read()
                    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
                    found[key] = (hashlib.sha256(data).hexdigest(), md5)
    except tarfile.TarError as error:
        raise DeclipError(f"{path!r} is not a readable tar ({error}); rerun ingest.") from error
    return found
