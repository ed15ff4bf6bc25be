"""Let an index grow by new shards without training it again, as long as it finds what it should.

New vectors go to the lists of the centroids that are there, in the order of all rows: the file is
the one that a build with the same centroids over all shards would give. Centroids that were trained
on other data fit less and less, so recall is measured again over all rows; below the target nothing
is changed, and the answer says so.
"""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_filter.embeddings import Part, read_parts
from declip_filter.index_building import (
    Built,
    measured,
    row_tables,
    stored_sizes,
)
from declip_filter.index_choice import Choice
from declip_filter.index_files import (
    ROWS_SCHEMA,
    Ids,
    check_index_file,
    index_path,
    info_path,
    iter_rows,
    load_faiss,
    local_copy,
    open_faiss,
    publish_path,
    read_info,
    read_mapped,
    rows_path,
    vectors_digest,
    write_rows,
)
from declip_filter.index_lists import (
    emptied,
    entries_of,
    has_lists,
    list_sizes,
    merged,
    renumbered,
    replace_header,
    set_effort,
    stored_effort,
    to_fast_scan,
    write_flat,
    write_lists,
)
from declip_filter.index_recall import (
    NUM_NEIGHBORS,
    Recall,
    draw_queries,
    exact_truths,
    measure_recall,
)
from declip_filter.index_training import ROWS_AT_ONCE, blocks, one_thread, progress, read_block
from declip_filter.limits import require_folder_name
from declip_filter.optout import remove_rows
from declip_filter.signals import shard_tasks
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError, Store
from declip_shards.manifest import canonical_json
from declip_shards.rewrite import COMMIT, FOLDER, commit

ROWS_PER_PART = 8 * ROWS_AT_ONCE
"""New rows encoded at once."""
TRAINED_AS = "trained as"
"""Entry of info.json: what the index was when its centroids were found."""
REBUILD = "build the index anew: run the stages train_index, fill_index and index again"


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What an append came to."""

    name: str
    num_before: int
    num_added: int
    shards: tuple[str, ...]
    """Those that were added."""
    index_key: str
    effort: int
    """nprobe, or of a graph efSearch; 0 for a type without."""
    effort_before: int
    recall_before: float
    recall: Recall | None
    """Measured over all rows; None where there was nothing to add."""
    info: Mapping[str, Any]
    """The new info.json; the old one where there was nothing to add."""
    transaction: str = ""
    """Where the new files wait to be moved; empty where there are none."""

    @property
    def files(self) -> tuple[str, ...]:
        """Where they will go, in the order of the waiting files' names."""
        return (index_path(self.name), info_path(self.name), rows_path(self.name))


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Old and new rows of an index that grows."""

    info: dict[str, Any]
    vectors: StoredVectors
    """Of all shards."""
    parts: Sequence[Part]
    is_new: Sequence[bool]
    """Of each part."""
    new_rows: Ids
    """(old rows,) the number that each will have."""

    @property
    def added(self) -> list[tuple[int, int]]:
        """Start and end of the runs of new rows, ascending."""
        starts = self.vectors.starts
        return [
            (int(starts[n]), int(starts[n + 1]))
            for n, new in enumerate(self.is_new)
            if new and self.parts[n].num_rows
        ]


def append_to_index(store: Store, name: str, *, max_nprobe: int | None = None) -> Growth:
    """Add the shards that the embeddings have and the index lacks, and put the new files in place.

    Raises:
        DeclipError: as of :func:`stage_append`.
    """
    growth = stage_append(store, name, max_nprobe=max_nprobe)
    if growth.transaction:
        publish_growth(store, growth, {})
    return growth


def publish_growth(store: Store, growth: Growth, more: Mapping[str, bytes]) -> None:
    """Move the waiting files into place, with ``more`` (path -> bytes), as one change."""
    folder = f"{FOLDER}/{growth.transaction}"
    moves = [
        {"to": path, "from": f"{folder}/{number:05d}", "sha256": None}
        for number, path in enumerate(growth.files)
    ]
    for number, (path, data) in enumerate(sorted(more.items()), len(moves)):
        store.write_bytes(f"{folder}/{number:05d}", data)
        moves.append({"to": path, "from": f"{folder}/{number:05d}", "sha256": None})
    for move in moves:
        move["sha256"] = store.sha256(str(move["from"]))
    store.write_bytes(f"{folder}/{COMMIT}", canonical_json(moves))
    commit(store, growth.transaction)


def missing_shards(store: Store, name: str) -> list[str]:
    """Shards that the embeddings have rows of and the index has none of."""
    step = _look(store, name)
    return [part.shard for part, new in zip(step.parts, step.is_new, strict=True) if new]


def stage_append(store: Store, name: str, *, max_nprobe: int | None = None) -> Growth:
    """Write the grown index aside; nothing that is in place is changed.

    Args:
        store: the dataset.
        name: of the index.
        max_nprobe: lists (of a graph: nodes) that a search may come to need for the target; None:
            those that it needs now.

    Raises:
        DeclipError: the index is damaged, of other embeddings than there are, or of a type that
            cannot grow; or the grown one would find less than its recall target.
    """
    step = _look(store, name)
    check_index_file(store, name, step.info)
    info = step.info
    shards = tuple(p.shard for p, new in zip(step.parts, step.is_new, strict=True) if new)
    effort = int(info.get("nprobe") or info.get("efSearch") or 0)
    recall_before = float(info[f"recall@{NUM_NEIGHBORS}"])
    if not shards:
        return Growth(
            name=name,
            num_before=len(step.new_rows),
            num_added=0,
            shards=(),
            index_key=str(info["index_key"]),
            effort=effort,
            effort_before=effort,
            recall_before=recall_before,
            recall=None,
            info=info,
        )
    transaction = f"append-{name}"
    folder = f"{FOLDER}/{transaction}"
    store.remove_folder(folder)
    with (
        local_copy(store, index_path(name)) as old,
        publish_path(store, f"{folder}/00000") as target,
    ):
        built, before = _grow(step, old, target, max_nprobe)
    write_rows(store, f"{folder}/00002", row_tables(store, str(info["embeddings"]), step.parts))
    new_info = _grown_info(store, step, built, folder)
    store.write_bytes(f"{folder}/00001", canonical_json(new_info))
    return Growth(
        name=name,
        num_before=len(step.new_rows),
        num_added=step.vectors.num_rows - len(step.new_rows),
        shards=shards,
        index_key=built.choice.index_key,
        effort=built.effort,
        effort_before=before,
        recall_before=recall_before,
        recall=built.recall,
        info=new_info,
        transaction=transaction,
    )


def _look(store: Store, name: str) -> _Step:
    """Compare the index with the embeddings as they are now.

    Raises:
        DeclipError: they are not those that were indexed, with or without new shards.
    """
    info = read_info(store, name)
    embeddings, side = str(info["embeddings"]), str(info["kind"])
    parts = read_parts(store, embeddings, shard_tasks(store.url))
    vectors = StoredVectors(store, embeddings, side, parts)
    if parts[0].encoder_digest != info["encoder_digest"]:
        raise DeclipError(
            f"index {name!r} is of encoder {info['encoder']!r}, the embeddings {embeddings!r} are "
            f"by {parts[0].encoder!r} or other weights of it: nothing can be appended; {REBUILD}."
        )
    counts: dict[str, int] = {}
    for batch in iter_rows(store, rows_path(name), ["shard"]):
        for entry in pc.value_counts(batch.column("shard")).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    is_old = [part.shard in counts for part in parts]
    old_parts = [part for part, old in zip(parts, is_old, strict=True) if old]
    digest = vectors_digest(store, embeddings, side, old_parts)
    changed = _what_changed(counts, parts)
    if changed or digest != info["embeddings_sha256"]:
        raise DeclipError(
            f"the embeddings {embeddings!r} of shards that index {name!r} holds are others than "
            f"when it was built{changed}: nothing can be appended; {REBUILD}."
        )
    starts = vectors.starts
    kept = [
        np.arange(starts[number], starts[number + 1], dtype=np.int64)
        for number, old in enumerate(is_old)
        if old
    ]
    return _Step(
        info=info,
        vectors=vectors,
        parts=parts,
        is_new=[not old and part.num_rows > 0 for part, old in zip(parts, is_old, strict=True)],
        new_rows=np.concatenate([np.empty(0, np.int64), *kept]),
    )


def _what_changed(counts: Mapping[str, int], parts: Sequence[Part]) -> str:
    """The first shard of another number of rows than the index holds of it, in brackets."""
    now = {part.shard: part.num_rows for part in parts}
    for shard, count in sorted(counts.items()):
        if now.get(shard, 0) != count:
            return f" (shard {shard}: {count} rows then, {now.get(shard, 0)} now)"
    return ""


def _grow(step: _Step, old: Path, target: Path, max_nprobe: int | None) -> tuple[Built, int]:
    """Write the grown index to a local file; what it is, and the effort of the old one.

    Raises:
        DeclipError: the type cannot grow so, or recall would fall below the target.
    """
    faiss, vectors = load_faiss(), step.vectors
    before = read_mapped(old)
    effort = stored_effort(before)
    choice = Choice(
        index_key=str(step.info["index_key"]), nlist=int(step.info["nlist"]), reason="appended"
    )
    if has_lists(before):
        return _grow_lists(step, old, target, choice, effort, max_nprobe), effort
    if type(before) is faiss.IndexFlatIP or isinstance(before, faiss.IndexFlat):
        with target.open("wb") as f:
            edges = blocks(0, vectors.num_rows)
            found = (read_block(vectors, *edge) for edge in edges)
            write_flat(f, vectors.dim, vectors.num_rows, found)
        return _require_target(step, read_mapped(target), choice, effort, max_nprobe), effort
    if not np.array_equal(step.new_rows, np.arange(len(step.new_rows))):
        raise DeclipError(
            f"an index of type {choice.index_key} grows at its end, and new shards come before "
            f"old ones; {REBUILD}."
        )
    index = faiss.read_index(str(old))
    with one_thread():
        for start, stop in step.added:
            for first, last in blocks(start, stop):
                index.add(read_block(vectors, first, last))
    built = _require_target(step, index, choice, effort, max_nprobe)
    set_effort(index, built.effort)
    faiss.write_index(index, str(target))
    return built, effort


def _grow_lists(
    step: _Step,
    old: Path,
    target: Path,
    choice: Choice,
    effort: int,
    max_nprobe: int | None,
) -> Built:
    """Old and new entries of every list, in the order of the rows; one list in memory."""
    faiss = load_faiss()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ExitStack() as opened:
        sources = [read_mapped(old)]
        maps = [renumbered(entries_of(sources[0]), step.new_rows)]
        edges = [
            (first, min(first + ROWS_PER_PART, stop))
            for start, stop in step.added
            for first in range(start, stop, ROWS_PER_PART)
        ]
        for number, (start, stop) in enumerate(progress(edges, len(edges), "index: append")):
            part = emptied(read_mapped(old))
            with one_thread():
                for first, last in blocks(start, stop):
                    rows = np.arange(first, last, dtype=np.int64)
                    part.add_with_ids(read_block(step.vectors, first, last), rows)
            path = Path(folder, f"{number:05d}")
            faiss.write_index(part, str(path))
            sources.append(read_mapped(path))
            maps.append(entries_of(sources[-1]))
        sizes = np.sum([list_sizes(source) for source in sources], axis=0)
        empty = emptied(read_mapped(old))
        plain = Path(folder, "plain") if choice.is_fast_scan else target
        with plain.open("wb") as f:
            write_lists(f, empty, sizes, merged(maps))
        opened.callback(sources.clear)
        index = read_mapped(plain)
        if choice.is_fast_scan:
            index = to_fast_scan(index)
        built = _require_target(step, index, choice, effort, max_nprobe)
        if choice.is_fast_scan:
            set_effort(index, built.effort)
            faiss.write_index(index, str(target))
        else:
            set_effort(empty, built.effort)
            replace_header(target, empty, step.vectors.num_rows)
    return built


def _require_target(
    step: _Step, index: Any, choice: Choice, effort: int, max_nprobe: int | None
) -> Built:
    """Measure over all rows; search deeper where that is allowed.

    Raises:
        DeclipError: recall is below the target.
    """
    info, vectors = step.info, step.vectors
    seed, num_queries = int(info.get("seed", 0)), int(info["num_queries"])
    truths = exact_truths(vectors, draw_queries(vectors.num_rows, num_queries, seed))
    target, before = float(info["recall_target"]), effort
    most = max(effort, min(max_nprobe or 0, choice.nlist or max_nprobe or 0)) if effort else 0
    while True:
        set_effort(index, effort)
        recall = measure_recall(index, vectors, truths)
        if recall.recall >= target:
            return Built(choice=choice, effort=effort, recall=recall)
        if effort >= most:
            break
        effort = min(most, effort * 2)
    low, high = recall.interval
    deeper = where = ""
    if choice.nlist:
        where = f" at nprobe {effort}"
    elif effort:
        where = f" at efSearch {effort}"
    if before and (not choice.nlist or effort < choice.nlist):
        most_wanted = min(effort * 4, choice.nlist or effort * 4)
        search = "deeper search" if choice.nlist else "broader search (efSearch)"
        deeper = f"allow a {search} with --max-nprobe {most_wanted}, or "
    raise DeclipError(
        f"with {vectors.num_rows - len(step.new_rows)} rows more, recall@{NUM_NEIGHBORS} is "
        f"{recall.recall:.4f} ({low:.4f} to {high:.4f}){where}, below recall_target "
        f"{target:g} (it was {info[f'recall@{NUM_NEIGHBORS}']:.4f}): nothing was appended; "
        f"{deeper}{REBUILD}."
    )


def _grown_info(store: Store, step: _Step, built: Built, folder: str) -> dict[str, Any]:
    info, vectors = step.info, step.vectors
    trained = info.get(TRAINED_AS, {k: info[k] for k in ("nb vectors", "index_sha256")})
    rest = {k: v for k, v in info.items() if k != "built as"}  # the recall is measured anew
    return {
        **rest,
        **measured(built),
        **stored_sizes(vectors.num_rows, vectors.dim, store.size(f"{folder}/00000")),
        TRAINED_AS: trained,
        "embeddings_sha256": vectors_digest(
            store, str(info["embeddings"]), str(info["kind"]), step.parts
        ),
        "index_sha256": store.sha256(f"{folder}/00000"),
        "rows_sha256": store.sha256(f"{folder}/00002"),
    }


def copy_without(store: Store, name: str, new_name: str, keys: Collection[str]) -> int:
    """Write index ``new_name``: the index without these samples; its own is left as it is.

    The dataset keeps them: this is for an index that is handed on or served.

    Returns:
        How many rows were left out.

    Raises:
        DeclipError: an index of the new name is there, the old one is damaged, of a type that
            loses no rows, or has no row of these samples.
    """
    require_folder_name("to", new_name)
    if store.exists(info_path(new_name)):
        raise DeclipError(f"there is an index {new_name!r}; choose another name with --to.")
    info = read_info(store, name)
    check_index_file(store, name, info)
    wanted = pa.array(sorted(keys), pa.string())
    tables = [
        pa.Table.from_batches([batch])
        for batch in iter_rows(store, rows_path(name), ROWS_SCHEMA.names)
    ]
    rows = pa.concat_tables(tables)
    stays = pc.invert(pc.is_in(rows.column("key"), value_set=wanted))
    kept = stays.to_numpy()
    num_left = int(kept.sum())
    if num_left == len(kept):
        raise DeclipError(f"index {name!r} has no row of these {len(keys)} keys; nothing to do.")
    index = remove_rows(open_faiss(store, index_path(name), mmap=False), kept)
    with publish_path(store, index_path(new_name)) as local:
        load_faiss().write_index(index, str(local))
    write_rows(store, rows_path(new_name), [rows.filter(stays)])
    size = store.size(index_path(new_name))
    new_info = info | {
        **stored_sizes(num_left, int(info["vectors dimension"]), size),
        "copy of": {"name": name, "index_sha256": info["index_sha256"]},
        "index_sha256": store.sha256(index_path(new_name)),
        "rows_sha256": store.sha256(rows_path(new_name)),
    }
    store.write_bytes(info_path(new_name), canonical_json(new_info))
    return len(kept) - num_left
