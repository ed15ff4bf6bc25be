"""What lies beside the shards, cut to the samples of one output shard; nothing is measured again.

signals     rows of the kept samples; a duplicate's name is blanked where it is not kept
selection   rows of the kept samples
neighbors   rows of the kept samples; neighbors that are not kept go, their scores with them
embeddings  vectors and metadata of the kept samples, under the output shard's name
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.embeddings import (
    METADATA_SCHEMA,
    Part,
    part_path,
    partition_name,
    read_part,
    read_parts,
    read_vectors,
)
from declip_filter.repack_plan import Piece, RepackPlan, as_keys
from declip_shards import DeclipError, Store, layout, sidecars
from declip_shards.manifest import canonical_json

Files = dict[str, bytes]
"""Path in the repacked dataset -> bytes."""

TABLE_FOLDERS = ("signals", "selection", "neighbors")
_NAMES_A_DUPLICATE = re.compile(r"duplicate_(.+)_of")


@dataclass(frozen=True)
class CarriedSets:
    """The sets beside the shards that are whole, and those that are not."""

    tables: tuple[str, ...]
    """``signals/basic`` and the like."""
    embeddings: tuple[str, ...]
    indexes: tuple[str, ...]
    left_out: tuple[str, ...]
    """Sets that lack a shard: unfinished, or of an earlier dataset."""


def carried_sets(store: Store, plan: RepackPlan, carry: Sequence[str]) -> CarriedSets:
    """Which sets are carried over: those that have a file for every input shard.

    Raises:
        DeclipError: embeddings that are whole mix encoders.
    """
    tables: list[str] = []
    embeddings: list[str] = []
    left_out: list[str] = []
    for folder in (name for name in TABLE_FOLDERS if name in carry):
        for name in store.list_folders(folder):
            here = set(store.list(f"{folder}/{name}", ".parquet"))
            whole = all(f"{shard}.parquet" in here for shard in plan.shards)
            (tables if whole else left_out).append(f"{folder}/{name}")
    for name in store.list_folders("embeddings") if "embeddings" in carry else ():
        here = set(store.list(f"embeddings/{name}/parts", ".json"))
        if all(f"{shard}.json" in here for shard in plan.shards):
            read_parts(store, name, plan.shards)
            embeddings.append(name)
        else:
            left_out.append(f"embeddings/{name}")
    indexes: list[str] = []
    for name in store.list_folders("index") if "index" in carry else ():
        path = f"{layout.index_folder(name)}/info.json"
        known = json.loads(store.read_bytes(path)) if store.exists(path) else {}
        if known.get("embeddings") in embeddings:
            indexes.append(name)
        else:
            left_out.append(f"index/{name}")
    return CarriedSets(tuple(tables), tuple(embeddings), tuple(indexes), tuple(left_out))


def shard_rows(store: Store, pieces: Sequence[Piece]) -> pa.Table:
    """Rows of the pieces' samples out of the shards' tables, all columns, ordered by key.

    Raises:
        DeclipError: a table is damaged, or does not list a kept sample as a success.
    """
    parts = []
    for piece in pieces:
        path = layout.shard_parquet_path(piece.shard)
        rows = _rows_of(sidecars.read_table(store, path), piece)
        rows = rows.filter(pc.equal(rows.column("status"), "success"))
        if rows.num_rows != len(piece.keys):
            lost = min(set(piece.names()) - set(rows.column("key").to_pylist()))
            raise DeclipError(
                f"{path!r} does not list sample {lost!r}, which is kept, as a success; rerun the "
                "filter."
            )
        parts.append(rows)
    return _stacked(parts, layout.shard_parquet_path(pieces[0].shard)).sort_by("key")


def table_files(store: Store, plan: RepackPlan, sets: CarriedSets, output: str) -> Files:
    """Signals, selections and neighbor tables of an output shard."""
    pieces = list(plan.pieces(output))
    files: Files = {}
    for base in sets.tables:
        tables = [
            _rows_of(sidecars.read_table(store, f"{base}/{piece.shard}.parquet"), piece)
            for piece in pieces
        ]
        table = _stacked(tables, base)
        if base.startswith("neighbors/"):
            table = without_lost_neighbors(table, plan)
        elif base.startswith("signals/"):
            table = without_lost_duplicates(table, plan)
        files[f"{base}/{output}.parquet"] = sidecars.pack_table(table.combine_chunks())
    return files


def _rows_of(table: pa.Table, piece: Piece) -> pa.Table:
    return table.filter(pc.is_in(table.column("key"), value_set=pa.array(piece.names())))


def _stacked(tables: Sequence[pa.Table], source: str) -> pa.Table:
    """Tables of several input shards as one; a column that is all null in one takes the other's
    type."""
    try:
        return pa.concat_tables(tables, promote_options="default")
    except pa.ArrowInvalid as error:
        raise DeclipError(
            f"the tables of shards beside {source!r} have columns of different types ({error}); "
            "rerun the stage that writes them, so that all are of one version."
        ) from error


def without_lost_neighbors(table: pa.Table, plan: RepackPlan) -> pa.Table:
    """A neighbor table whose lists name kept samples alone; scores stay aligned."""
    lists = table.column("neighbor_keys").combine_chunks()
    keys = as_keys(lists.flatten().to_pylist())
    stays = plan.places(keys) >= 0
    if stays.all():
        return table
    # Lengths of the lists after the cut, by a running count over the flat values.
    ends = np.cumsum(pc.list_value_length(lists).fill_null(0).to_numpy())
    counted = np.concatenate([[0], np.cumsum(stays)])
    offsets = pa.array(np.concatenate([[0], counted[ends]]), pa.int32())
    for name in ("neighbor_keys", "scores"):
        column = table.column(name).combine_chunks()
        values = column.flatten().filter(pa.array(stays))
        shorter = pa.ListArray.from_arrays(offsets, values).cast(column.type)
        number = table.column_names.index(name)
        table = table.set_column(number, table.schema.field(name), shorter)
    return table


def without_lost_duplicates(table: pa.Table, plan: RepackPlan) -> pa.Table:
    """Signals in which no duplicate is said to be one of a sample that is not kept."""
    for name in table.column_names:
        match = _NAMES_A_DUPLICATE.fullmatch(name)
        if match is None:
            continue
        values = table.column(name).combine_chunks()
        known = plan.places(as_keys(values.fill_null("").to_pylist())) >= 0
        lost = pa.array(~known)
        if not pc.any(pc.and_(lost, pc.is_valid(values))).as_py():
            continue
        measured = f"duplicate_{match[1]}_"
        for column in [c for c in table.column_names if c.startswith(measured)]:
            field = table.schema.field(column)
            blanked = pc.if_else(lost, pa.scalar(None, field.type), table.column(column))
            table = table.set_column(table.column_names.index(column), field, blanked)
    return table


def embedding_files(store: Store, plan: RepackPlan, name: str, output: str) -> Files:
    """One set of embeddings of an output shard, in clip-retrieval's layout.

    Raises:
        DeclipError: a file is missing, damaged or of another shape.
    """
    pieces = list(plan.pieces(output))
    parts = [read_part(store, name, piece.shard) for piece in pieces]
    first = parts[0]
    kinds = tuple(kind for kind in first.kinds if all(kind in part.kinds for part in parts))
    metadata: list[pa.Table] = []
    vectors: dict[str, list[npt.NDArray[np.float16]]] = {kind: [] for kind in kinds}
    for piece, part in zip(pieces, parts, strict=True):
        if not part.num_rows:
            continue
        path = layout.embedding_path(name, "metadata", part.partition)
        table = sidecars.read_table(store, path)
        stays = pc.is_in(table.column("key"), value_set=pa.array(piece.names()))
        metadata.append(table.filter(stays))
        for kind in kinds:
            vectors[kind].append(read_vectors(store, name, kind, part)[0][stays.to_numpy()])
    num_rows = sum(table.num_rows for table in metadata)
    partition = partition_name(output, plan.outputs)
    files: Files = {}
    if num_rows:
        for kind in kinds:
            sink = io.BytesIO()
            np.save(sink, np.concatenate(vectors[kind]))
            files[layout.embedding_path(name, kind, partition)] = sink.getvalue()
        rows = _stacked(metadata, f"embeddings/{name}").combine_chunks()
        number = rows.column_names.index("shard")
        renamed = pa.array([output] * num_rows, pa.string())
        rows = rows.set_column(number, METADATA_SCHEMA.field("shard"), renamed)
        files[layout.embedding_path(name, "metadata", partition)] = sidecars.pack_table(rows)
    made: Part = replace(
        first, shard=output, partition=partition, num_rows=num_rows, kinds=tuple(kinds)
    )
    files[part_path(name, output)] = canonical_json(asdict(made))
    return files
