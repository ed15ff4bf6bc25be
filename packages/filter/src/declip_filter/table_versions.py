"""What can be said of a finished neighbor table, how two differ, and which old ones may go."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.limits import require_between
from declip_shards import DeclipError, Store, layout, neighbor_tables, sidecars
from declip_shards.manifest import canonical_json
from declip_shards.neighbor_tables import TableVersion

USEFUL_SCORE = 0.5
"""Cosine from which a neighbor counts as useful, where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class TableFigures:
    """A table in numbers; fractions of 1, six digits."""

    num_rows: int
    num_neighbors: int
    fraction_with_neighbor: float
    fraction_useful: float
    """Of the rows, those whose best neighbor reaches ``useful_score``."""
    useful_score: float
    mean_score: float
    mean_best_score: float


def table_figures(store: Store, folder: str, useful_score: float | None = None) -> TableFigures:
    """Sum up the table in ``neighbors/FOLDER`` over the dataset's shards.

    Args:
        store: the dataset.
        folder: a table's name, or ``NAME@ID``.
        useful_score: cosine from which a neighbor counts; None: what the table was built with.

    Raises:
        DeclipError: a shard's file is missing or damaged, or of another table.
    """
    version = neighbor_tables.read_version(store, folder, is_finished=False)
    if useful_score is None:
        settings = (neighbor_tables.read_description(store, folder) or {}).get("settings", {})
        useful_score = float(settings.get("useful_score", USEFUL_SCORE))
    num_rows = num_neighbors = num_with = num_useful = 0
    total = best_total = 0.0
    for shard in layout.list_shards(store):
        table = neighbor_tables.read_lists(store, version, shard, ["scores"])
        lists = table.column("scores").combine_chunks()
        flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        firsts = (np.cumsum(lengths) - lengths)[lengths > 0]
        best = flat[firsts].astype(np.float32)
        num_rows += len(lengths)
        num_neighbors += len(flat)
        num_with += len(best)
        num_useful += int((best >= useful_score).sum())
        total += float(flat.sum())
        best_total += float(best.astype(np.float64).sum())
    return TableFigures(
        num_rows=num_rows,
        num_neighbors=num_neighbors,
        fraction_with_neighbor=_share(num_with, num_rows),
        fraction_useful=_share(num_useful, num_rows),
        useful_score=useful_score,
        mean_score=_share(total, num_neighbors),
        mean_best_score=_share(best_total, num_with),
    )


def _share(part: float, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def check_table(store: Store, folder: str) -> int:
    """Refuse a table that names a sample which no shard of the dataset holds.

    Returns:
        How many rows it has.

    Raises:
        DeclipError: names the file and the key.
    """
    version = neighbor_tables.read_version(store, folder, is_finished=False)
    shards = layout.list_shards(store)
    held = [_held_keys(store, shard) for shard in shards]
    neighbors = _Asked("neighbor", pa.concat_arrays([*held, pa.array([], pa.string())]))
    num_rows = 0
    for shard, own in zip(shards, held, strict=True):
        table = neighbor_tables.read_lists(store, version, shard)
        path = layout.neighbors_path(folder, shard)
        samples = _Asked("sample", own)
        samples.ask(path, table.column("key").combine_chunks())
        samples.answer()
        neighbors.ask(path, table.column("neighbor_keys").combine_chunks().flatten())
        num_rows += table.num_rows
    neighbors.answer()
    return num_rows


class _Asked:
    """Keys that must be known, collected until there are as many as known ones.

    Arrow's ``is_in`` hashes all that is known at every call: once a shard, that is quadratic.
    """

    def __init__(self, what: str, known: pa.Array) -> None:
        self._what, self._known = what, known
        self._waiting: list[tuple[str, pa.Array]] = []

    def ask(self, path: str, keys: pa.Array) -> None:
        """Check the keys that the file at ``path`` names, at once or with later ones."""
        self._waiting.append((path, keys))
        if sum(len(each) for _, each in self._waiting) >= len(self._known):
            self.answer()

    def answer(self) -> None:
        """Check what waits.

        Raises:
            DeclipError: names the file and the first key in it that is not known.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        there = pc.is_in(pa.chunked_array([keys for _, keys in waiting]), value_set=self._known)
        if pc.all(there, min_count=0).as_py():
            return
        for path, keys in waiting:
            strangers = keys.filter(pc.invert(pc.is_in(keys, value_set=self._known)))
            if len(strangers):
                raise DeclipError(
                    f"{path!r} names the {self._what} {strangers[0].as_py()!r}, which no shard "
                    "holds: the table is of other shards; rerun the stage that looks neighbors "
                    "up, or declip refresh."
                )


def _held_keys(store: Store, shard: str) -> pa.Array:
    """Keys of a shard's successes: those that its tar has."""
    path = layout.shard_parquet_path(shard)
    table = sidecars.read_table(store, path, ["key", "status"])
    there = pc.equal(table.column("status"), "success")
    return table.column("key").filter(there).combine_chunks()


@dataclass(frozen=True, kw_only=True)
class TableChange:
    """How a table differs from an earlier one."""

    num_rows: int
    """Rows of the later one."""
    num_changed: int
    """Of them, those whose list of neighbors is not the same, in order."""
    num_new_neighbors: int
    """Neighbors of the later one that the earlier did not have."""


def compare_tables(store: Store, before: str, after: str) -> TableChange:
    """Compare the tables in two folders; a row that one of them lacks has an empty list there.

    Raises:
        DeclipError: a file is missing or damaged.
    """
    old_version = neighbor_tables.read_version(store, before, is_finished=False)
    new_version = neighbor_tables.read_version(store, after, is_finished=False)
    num_rows = num_changed = num_new = 0
    for shard in layout.list_shards(store):
        old = _lists(store, old_version, shard)
        for key, near in _lists(store, new_version, shard).items():
            earlier = old.get(key, [])
            num_rows += 1
            num_changed += near != earlier
            num_new += len(set(near) - set(earlier))
    return TableChange(num_rows=num_rows, num_changed=num_changed, num_new_neighbors=num_new)


def _lists(store: Store, version: TableVersion, shard: str) -> dict[str, list[str]]:
    table = neighbor_tables.read_lists(store, version, shard)
    columns = (table.column(name).to_pylist() for name in ("key", "neighbor_keys"))
    return dict(zip(*columns, strict=True))


def inputs_digest(store: Store, selection: str) -> str:
    """sha256 over what a refresh reads: shards and, where there is one, the selection.

    An ingest, a filter or an opt-out in between gives another one.
    """
    digests = {}
    for shard in layout.list_shards(store):
        paths = [layout.shard_parquet_path(shard)]
        if selection:
            paths.append(layout.selection_path(selection, shard))
        digests.update({path: store.sha256(path) for path in paths if store.exists(path)})
    return _sha256(digests)


def version_id(parts: Mapping[str, Any]) -> str:
    """ID of a refreshed table: the same for the same encoder, settings and dataset.

    A refresh that was killed therefore finds its own half-made files when it is run again.
    """
    return _sha256(parts)[: neighbor_tables.ID_CHARS]


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def finish_version(
    store: Store,
    folder: str,
    *,
    before: str,
    inputs_sha256: str,
    run: str = "",
    step: int | None = None,
) -> dict[str, Any]:
    """Check a refreshed table and write its version.json: from then on it is one.

    Args:
        store: the dataset.
        folder: ``NAME@ID``; its tables and table.json are there.
        before: folder of the table that it is compared with.
        inputs_sha256: of :func:`inputs_digest`.
        run: training run whose checkpoint embedded it; empty where none did.
        step: optimizer steps behind that checkpoint.

    Returns:
        What version.json says.

    Raises:
        DeclipError: the table names a sample that no shard holds, or a file is missing or damaged.
    """
    description = neighbor_tables.read_description(store, folder)
    if description is None:
        path = neighbor_tables.description_path(folder)
        raise DeclipError(f"{path!r} is missing: the table is not finished; run declip refresh.")
    check_table(store, folder)
    old = neighbor_tables.read_version_record(store, folder)
    others = finished_versions(store, folder.partition(neighbor_tables.MARK)[0])
    newest = max((number for number, _ in others), default=0)
    record: dict[str, Any] = {
        "format_version": neighbor_tables.FORMAT_VERSION,
        "number": newest + 1 if old is None else old["number"],
        "before": before,
        "inputs_sha256": inputs_sha256,
        "run": run,
        "step": step,
        "encoder": description["encoder"],
        "embeddings": description["embeddings"],
        "figures": asdict(table_figures(store, folder)),
        "change": asdict(compare_tables(store, before, folder)),
    }
    store.write_bytes(neighbor_tables.version_path(folder), canonical_json(record))
    return record


def finished_versions(store: Store, table: str) -> list[tuple[int, str]]:
    """Number and folder of the refreshed tables that were finished, oldest first.

    Raises:
        DeclipError: a version.json is damaged or of a newer format.
    """
    found = []
    for folder in neighbor_tables.list_versions(store, table):
        record = neighbor_tables.read_version_record(store, folder)
        if record is not None:
            found.append((int(record["number"]), folder))
    return sorted(found)


def old_versions(store: Store, table: str, keep: int, *, in_use: Collection[str] = ()) -> list[str]:
    """Folders of refreshed tables that may go: all but the ``keep`` newest and those in use.

    Those that were never finished may go, too.

    Args:
        store: the dataset.
        table: name of the table.
        keep: finished ones to keep.
        in_use: folders that somebody reads; the one that the pointer names is always in use.

    Raises:
        DeclipError: ``keep`` is below 1, or a small file is damaged.
    """
    require_between("keep", keep, 1, remedy="The table in use stays.")
    newest = [folder for _, folder in finished_versions(store, table)][-keep:]
    stays = {*newest, *in_use, neighbor_tables.resolve_table(store, table).folder}
    return [f for f in neighbor_tables.list_versions(store, table) if f not in stays]


def remove_version(store: Store, folder: str, embeddings: str) -> None:
    """Remove a refreshed table and the vectors that were made for it; its mark goes first.

    Raises:
        DeclipError: ``folder`` is no refreshed table.
    """
    if neighbor_tables.MARK not in folder or "/" in folder:
        raise DeclipError(f"{folder!r} is no refreshed table; only those can be removed.")
    store.remove(neighbor_tables.version_path(folder))
    store.remove_folder(f"{neighbor_tables.FOLDER}/{folder}")
    store.remove_folder(f"embeddings/{embeddings}")
