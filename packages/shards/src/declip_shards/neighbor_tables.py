"""Neighbor tables on disk, and which one of several is in use.

    neighbors/NAME/NNNNN.parquet      one row a sample: key, neighbor keys, scores
    neighbors/NAME/table.json         of which vectors, by which method, with which settings
    neighbors/NAME/current.json       which refreshed table is in use; without it, this one
    neighbors/NAME@ID/...             a refreshed table: the same files, and
    neighbors/NAME@ID/version.json    when it stands whole: what it was made from

A refreshed table is written into a folder of its own and never changed; it comes into use by one
rename of ``current.json``, so a reader has the old table or the new one. The pointer names the
pipeline's table that it stands in for: once that is built anew, the pointer counts no more.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from declip_shards import layout, sidecars
from declip_shards.errors import DeclipError
from declip_shards.manifest import canonical_json
from declip_shards.store import Store

FOLDER = "neighbors"
MARK = "@"
"""Between the name of a table and the ID of a refreshed one; no name that a user gives has it."""
FORMAT_VERSION = 1
"""Of table.json, version.json and current.json; a reader refuses a higher one."""
ID_CHARS = 12
IDENTITY = "table_sha256"
"""Column of a table's files: sha256 of the table.json that they belong to."""


@dataclass(frozen=True, kw_only=True)
class TableVersion:
    """One table, and what is known of how it was made."""

    table: str
    """The name that settings give."""
    folder: str
    """Its folder under ``neighbors/``: the name itself, or ``NAME@ID``."""
    sha256: str = ""
    """Of its table.json; empty where it has none (made by hand, or by an early version)."""
    encoder: str = ""
    """Who made the vectors."""
    encoder_digest: str = ""
    """Of that encoder's weights."""
    embeddings: str = ""
    """Name of the vectors."""
    dim: int = 0
    """Length of one of them; 0 where it is not known."""
    run: str = ""
    """Training run whose checkpoint the encoder was; empty where it was none."""
    step: int | None = None
    """Optimizer steps behind that checkpoint."""
    superseded: str = ""
    """Refreshed table that the pointer names, but that was made for an earlier table of the
    pipeline; empty where there is none."""

    @property
    def id(self) -> str:
        """Short name for logs: the ID of a refreshed table, else the beginning of ``sha256``."""
        _, mark, tail = self.folder.partition(MARK)
        return tail if mark else self.sha256[:ID_CHARS] or self.folder

    @property
    def is_refreshed(self) -> bool:
        """Whether it stands in for the table of the pipeline."""
        return MARK in self.folder

    def is_same(self, other: "TableVersion") -> bool:
        """Whether both are the same table."""
        return (self.folder, self.sha256) == (other.folder, other.sha256)


def version_folder(table: str, version_id: str) -> str:
    """``captions``, ``0123456789ab`` -> ``captions@0123456789ab``."""
    return f"{table}{MARK}{version_id}"


def description_path(folder: str) -> str:
    return f"{FOLDER}/{folder}/table.json"


def version_path(folder: str) -> str:
    return f"{FOLDER}/{folder}/version.json"


def pointer_path(table: str) -> str:
    return f"{FOLDER}/{table}/current.json"


def _read_json(store: Store, path: str) -> dict[str, Any] | None:
    """One of our small files; None where there is none.

    Raises:
        DeclipError: it is damaged, or of a newer format.
    """
    try:
        data = store.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        value = json.loads(data)
        newest = int(value["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeclipError(
            f"{path!r} is damaged ({error}); delete it and make the neighbor table again."
        ) from error
    if newest > FORMAT_VERSION:
        raise DeclipError(
            f"{path!r} is of format {newest}, this version reads up to {FORMAT_VERSION}; upgrade "
            "opendeclip."
        )
    found: dict[str, Any] = value
    return found


def read_description(store: Store, folder: str) -> dict[str, Any] | None:
    """A table's table.json; None where it has none.

    Raises:
        DeclipError: it is damaged, or of a newer format.
    """
    return _read_json(store, description_path(folder))


def read_version_record(store: Store, folder: str) -> dict[str, Any] | None:
    """What a refresh wrote of its table when it was whole; None where it never was.

    Raises:
        DeclipError: it is damaged, or of a newer format.
    """
    return _read_json(store, version_path(folder))


def description_digest(store: Store, folder: str) -> str:
    """sha256 of a table's table.json; empty where it has none."""
    try:
        return hashlib.sha256(store.read_bytes(description_path(folder))).hexdigest()
    except FileNotFoundError:
        return ""


def read_version(store: Store, folder: str, *, is_finished: bool = True) -> TableVersion:
    """What is known of the table in ``neighbors/FOLDER``.

    Args:
        store: the dataset.
        folder: a table's name, or ``NAME@ID``.
        is_finished: whether a refreshed table that was never finished is refused.

    Raises:
        DeclipError: one of its small files is damaged or of a newer format, or it is a refreshed
            table that was never finished.
    """
    description = read_description(store, folder) or {}
    record: Mapping[str, Any] = {}
    if MARK in folder and is_finished:
        found = read_version_record(store, folder)
        if found is None or not description:
            raise DeclipError(
                f"{version_path(folder)!r} is missing: the refreshed table was never finished or "
                "was removed; run declip refresh again."
            )
        record = found
    return TableVersion(
        table=folder.partition(MARK)[0],
        folder=folder,
        sha256=description_digest(store, folder),
        encoder=str(description.get("encoder", "")),
        encoder_digest=str(description.get("encoder_digest", "")),
        embeddings=str(description.get("embeddings", "")),
        dim=int(description.get("dim", 0)),
        run=str(record.get("run", "")),
        step=record.get("step"),
    )


def resolve_table(store: Store, table: str) -> TableVersion:
    """The table in use under a name: the one that ``current.json`` points to, or the pipeline's.

    Raises:
        DeclipError: the pointer or the table that it names is damaged or missing.
    """
    own = read_version(store, table)
    pointer = _read_json(store, pointer_path(table))
    if pointer is None:
        return own
    folder = str(pointer.get("folder", ""))
    if folder == table:
        return own
    if folder.partition(MARK)[0] != table or "/" in folder:
        raise DeclipError(
            f"{pointer_path(table)!r} points to {folder!r}, which is no version of table "
            f"{table!r}; delete it, or run declip refresh again."
        )
    if pointer.get("base_sha256") != own.sha256:
        return TableVersion(**(vars(own) | {"superseded": folder}))
    found = read_version(store, folder)
    if pointer.get("sha256") != found.sha256:
        raise DeclipError(
            f"{description_path(folder)!r} is not the table that {pointer_path(table)!r} points "
            "to; run declip refresh again."
        )
    return found


def point_to(store: Store, table: str, folder: str) -> None:
    """Put a finished table into use, by one rename; ``folder == table`` is the pipeline's own.

    Raises:
        DeclipError: the table was never finished, or is not one of this name.
    """
    version = read_version(store, folder)
    if version.table != table:
        raise DeclipError(f"{folder!r} is no version of table {table!r}; name one of those.")
    pointer = {
        "format_version": FORMAT_VERSION,
        "folder": folder,
        "sha256": version.sha256,
        "base_sha256": description_digest(store, table),
    }
    store.write_bytes(pointer_path(table), canonical_json(pointer))


def list_versions(store: Store, table: str) -> list[str]:
    """Folders of the refreshed tables of a name, finished or not, sorted."""
    return [f for f in store.list_folders(FOLDER) if f.startswith(f"{table}{MARK}")]


def read_lists(
    store: Store, version: TableVersion, shard: str, columns: Sequence[str] = ()
) -> pa.Table:
    """A shard's ``key``, ``neighbor_keys`` and further columns, checked to be of this table.

    Raises:
        DeclipError: the file is missing, damaged, or of another table than its table.json.
    """
    path = layout.neighbors_path(version.folder, shard)
    if not store.exists(path):
        raise DeclipError(
            f"{path!r} is missing: the neighbor table {version.folder!r} does not cover shard "
            f"{shard}; run the neighbors step, or choose method clip."
        )
    table = sidecars.read_table(store, path)
    wanted = ["key", "neighbor_keys", *columns]
    lacking = [name for name in wanted if name not in table.column_names]
    if lacking:
        raise DeclipError(
            f"{path!r} has no column {lacking[0]!r}, so it is no neighbor table; rerun the "
            "neighbors step."
        )
    if version.sha256 and IDENTITY in table.column_names:
        own = set(table.column(IDENTITY).unique().to_pylist()) - {version.sha256}
        if own:
            raise DeclipError(
                f"{path!r} is of another table than {description_path(version.folder)!r}, made of "
                "other embeddings or with other settings; delete the folder and rerun the "
                "neighbors step."
            )
    return table.select(wanted)


def missing_shards(store: Store, version: TableVersion, shards: Sequence[str]) -> list[str]:
    """Shards that a table does not cover, going by the names of its files."""
    there = set(store.list(f"{FOLDER}/{version.folder}", ".parquet"))
    return [shard for shard in shards if f"{shard}.parquet" not in there]
