"""How an index comes about: planned, trained, filled in parts, merged, measured, written.

    index/NAME/build/empty.faiss   trained, without a row
    index/NAME/build/choice.json   what was chosen, and of which vectors; comes after it
    index/NAME/build/GGGGG.faiss   the rows of a part; removed when the index is done
    index/NAME/build/GGGGG.json    which rows they are, and the part's digest; comes after it

The index comes out the same whether the parts were made by many tasks or are made here because
they are missing, so what lies in ``build`` is never needed, only saves time.
"""

import contextlib
import functools
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from declip_filter.captions import caption_sha
from declip_filter.embeddings import METADATA_SCHEMA, Part
from declip_filter.index_choice import Choice, index_bytes, next_larger
from declip_filter.index_files import (
    FORMAT_VERSION,
    build_path,
    index_path,
    info_path,
    load_faiss,
    local_copy,
    publish_path,
    read_mapped,
    rows_path,
    vectors_digest,
    write_rows,
)
from declip_filter.index_lists import (
    entries_of,
    list_sizes,
    merged,
    replace_header,
    set_effort,
    to_fast_scan,
    write_flat,
    write_lists,
)
from declip_filter.index_memory import GIB, index_limit
from declip_filter.index_plan import Group, Plan, announce, make_plan, plan_of
from declip_filter.index_recall import (
    NUM_NEIGHBORS,
    Recall,
    Truth,
    draw_queries,
    exact_truths,
    measure_recall,
)
from declip_filter.index_training import (
    ROWS_AT_ONCE,
    add_rows,
    build_whole,
    progress,
    read_block,
    sample_size,
    train_index,
)
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.manifest import canonical_json
from declip_shards.store import TEMPORARY_MARK

if TYPE_CHECKING:
    from declip_filter.index import BuildIndex

TRAINED, CHOICE, PART_SUFFIX = "empty.faiss", "choice.json", ".faiss"
MAX_EF_SEARCH = 2048
"""Of a graph: beyond it, exact search is cheaper."""
FIRST_EF_SEARCH = 16


# Training ----------------------------------------------------------------------------------------


def train(settings: "BuildIndex", store: Store) -> TaskStats:
    """Train on a sample and write what was trained, then what it is."""
    plan = make_plan(settings, store)
    announce(settings, plan)
    index = _trained_on(settings, plan)
    trained = build_path(settings.name, TRAINED)
    with publish_path(store, trained) as local:
        load_faiss().write_index(index, str(local))
    about = {
        "format_version": FORMAT_VERSION,
        "choice": asdict(plan.choice),
        "of": _origin(settings, store, plan),
        "num_rows": plan.vectors.num_rows,
        "dim": plan.vectors.dim,
        "trained_sha256": store.sha256(trained),
    }
    path = build_path(settings.name, CHOICE)
    store.write_bytes(path, canonical_json(about))
    size = sample_size(plan.choice, plan.vectors.num_rows)
    return TaskStats(
        num_in=size,
        num_out=size,
        files=[trained, path],
        extra={"index_key": plan.choice.index_key, "reason": plan.choice.reason},
    )


def _trained_on(settings: "BuildIndex", plan: Plan) -> Any:
    return train_index(plan.choice, plan.vectors, seed=settings.seed, device=settings.device)


def _origin(settings: "BuildIndex", store: Store, plan: Plan) -> dict[str, Any]:
    """What the trained index depends on."""
    return {
        "embeddings_sha256": vectors_digest(store, settings.embeddings, settings.kind, plan.parts),
        "seed": settings.seed,
        "device": settings.device,
    }


def _read_choice(settings: "BuildIndex", store: Store, plan: Plan) -> dict[str, Any] | None:
    """``choice.json``, if it is of this plan and what it names is whole."""
    try:
        about: dict[str, Any] = json.loads(store.read_bytes(build_path(settings.name, CHOICE)))
        trained = build_path(settings.name, TRAINED)
        same = about["choice"] == asdict(plan.choice) and (
            about["num_rows"],
            about["dim"],
        ) == (plan.vectors.num_rows, plan.vectors.dim)
        return about if same and store.sha256(trained) == about["trained_sha256"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


# Filling -----------------------------------------------------------------------------------------


def filler(settings: "BuildIndex", store: Store) -> Callable[[str], TaskStats]:
    """What encodes the rows of a part: group name -> stats; plans once a process.

    Raises:
        DeclipError: when called, the trained index is missing or of other embeddings.
    """

    @functools.cache
    def planned() -> tuple[Plan, str]:
        plan = make_plan(settings, store)
        about = _read_choice(settings, store, plan)
        if about is None:
            raise DeclipError(
                f"{build_path(settings.name, CHOICE)!r} is missing or of other embeddings or "
                "settings; rerun the stage that trains the index."
            )
        return plan, str(about["trained_sha256"])

    return lambda task: _fill(settings, store, *planned(), task)


def _fill(
    settings: "BuildIndex", store: Store, plan: Plan, trained_sha256: str, task: str
) -> TaskStats:
    """Write a part, then what it is."""
    (group,) = [group for group in plan.groups if group.name == task]
    part = build_path(settings.name, f"{task}{PART_SUFFIX}")
    with (
        local_copy(store, build_path(settings.name, TRAINED)) as trained,
        publish_path(store, part) as local,
    ):
        _fill_part(trained, plan, group, local)
    about = {
        **asdict(group),
        "format_version": FORMAT_VERSION,
        "trained_sha256": trained_sha256,
        "sha256": store.sha256(part),
    }
    path = build_path(settings.name, f"{task}.json")
    store.write_bytes(path, canonical_json(about))
    num = group.stop - group.start
    # The part is scratch: removed when the index is done, so not among the hashed files.
    return TaskStats(num_in=num, num_out=num, files=[path], volatile_files=[part])


def _fill_part(trained: Path, plan: Plan, group: Group, target: Path) -> None:
    faiss = load_faiss()
    index = faiss.read_index(str(trained))
    add_rows(index, plan.vectors, group.start, group.stop, what=f"index: fill {group.name}")
    faiss.write_index(index, str(target))


def part_files(store: Store, name: str) -> list[str]:
    """Paths of the parts that lie there: scratch, with the vectors of many samples in them."""
    folder = build_path(name, "").rstrip("/")
    files = store.list(folder, PART_SUFFIX)
    return [build_path(name, file) for file in files if file != TRAINED]


def _stored_part(
    settings: "BuildIndex", store: Store, group: Group, trained_sha256: str
) -> str | None:
    """Path of a part that a task made, if it is whole and of the trained index; else None."""
    path = build_path(settings.name, f"{group.name}{PART_SUFFIX}")
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        about = json.loads(store.read_bytes(build_path(settings.name, f"{group.name}.json")))
        wanted = {**asdict(group), "trained_sha256": trained_sha256, "sha256": store.sha256(path)}
        if {name: about.get(name) for name in wanted} == wanted:
            return path
    return None


# Building ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Built:
    """What was built and how good it is."""

    choice: Choice
    effort: int
    """nprobe, or of a graph efSearch; 0 for a type that compares with everything."""
    recall: Recall


def build(settings: "BuildIndex", store: Store) -> TaskStats:
    """Build, measure and write the index; ``info.json`` comes last.

    Raises:
        DeclipError: the recall target is not met by any number of lists or code that fits.
    """
    plan = make_plan(settings, store)
    announce(settings, plan)
    remove_scratch(store, settings.name)
    rows = draw_queries(plan.vectors.num_rows, settings.num_queries, settings.seed)
    truths = exact_truths(plan.vectors, rows)
    with publish_path(store, index_path(settings.name)) as local:
        built = _build_one(settings, store, plan, truths, local)
        while built.recall.recall < settings.recall_target:
            plan = _with_larger_code(settings, plan, built)
            announce(settings, plan)
            built = _build_one(settings, store, plan, truths, local)
    return _describe(settings, store, plan, built)


def remove_scratch(store: Store, name: str) -> None:
    """Remove what a killed build left aside. Call it under the workspace's lock."""
    if store.is_local:
        for path in store.local_path(layout.index_folder(name)).glob(f"*{TEMPORARY_MARK}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _build_one(
    settings: "BuildIndex", store: Store, plan: Plan, truths: Sequence[Truth], target: Path
) -> Built:
    """Build one type into a local file and measure it."""
    faiss, vectors = load_faiss(), plan.vectors
    if plan.choice.index_key == "Flat":
        starts = range(0, vectors.num_rows, ROWS_AT_ONCE)
        found = (
            read_block(vectors, start, min(start + ROWS_AT_ONCE, vectors.num_rows))
            for start in progress(starts, len(starts), "index: add")
        )
        with target.open("wb") as f:
            write_flat(f, vectors.dim, vectors.num_rows, found)
        return reach_target(settings, plan, read_mapped(target), truths)
    if not plan.choice.is_in_parts:
        index = build_whole(plan.choice, vectors, seed=settings.seed, device=settings.device)
        built = reach_target(settings, plan, index, truths)
        set_effort(index, built.effort)
        faiss.write_index(index, str(target))
        return built
    with _scratch(store, settings.name) as folder, contextlib.ExitStack() as opened:
        trained, parts = _parts(settings, store, plan, folder, opened)
        return _merge(settings, plan, truths, trained, parts, target)


@contextlib.contextmanager
def _scratch(store: Store, name: str) -> Iterator[Path]:
    """A folder for parts that are made here: beside the index, or where temporary files go."""
    place = store.local_path(layout.index_folder(name)) if store.is_local else None
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_MARK, dir=place) as folder:
        yield Path(folder)


def _parts(
    settings: "BuildIndex", store: Store, plan: Plan, folder: Path, opened: contextlib.ExitStack
) -> tuple[Path, list[Path]]:
    """Local files of the trained index and of its parts; those that no task made are made here."""
    about = _read_choice(settings, store, plan)
    if about is not None and about["of"] == _origin(settings, store, plan):
        trained = opened.enter_context(local_copy(store, build_path(settings.name, TRAINED)))
        digest = str(about["trained_sha256"])
    else:
        trained, digest = folder / TRAINED, ""
        load_faiss().write_index(_trained_on(settings, plan), str(trained))
    files = []
    for group in plan.groups:
        stored = _stored_part(settings, store, group, digest) if digest else None
        if stored is not None:
            files.append(opened.enter_context(local_copy(store, stored)))
        else:
            files.append(folder / f"{group.name}{PART_SUFFIX}")
            _fill_part(trained, plan, group, files[-1])
    return trained, files


def _merge(
    settings: "BuildIndex",
    plan: Plan,
    truths: Sequence[Truth],
    trained: Path,
    parts: Sequence[Path],
    target: Path,
) -> Built:
    """Write the parts as one index, list by list, and measure it from the file."""
    faiss, num_rows = load_faiss(), plan.vectors.num_rows
    mapped = [read_mapped(path) for path in parts]
    sizes = np.sum([list_sizes(part) for part in mapped], axis=0)
    entries = merged([entries_of(part) for part in mapped])
    empty = faiss.read_index(str(trained))
    if plan.choice.is_fast_scan:
        plain = target.with_name(f"{target.name}-plain")
        try:
            with plain.open("wb") as f:
                write_lists(f, empty, sizes, entries)
            index = to_fast_scan(read_mapped(plain))
        finally:
            plain.unlink(missing_ok=True)
        built = reach_target(settings, plan, index, truths)
        set_effort(index, built.effort)
        faiss.write_index(index, str(target))
        return built
    with target.open("wb") as f:
        write_lists(f, empty, sizes, entries)
    built = reach_target(settings, plan, read_mapped(target), truths)
    set_effort(empty, built.effort)
    replace_header(target, empty, num_rows)
    return built


def reach_target(settings: "BuildIndex", plan: Plan, index: Any, truths: Sequence[Truth]) -> Built:
    """The least effort that reaches the target, doubled from the least on; or the most there is."""
    choice = plan.choice
    effort = most = 0
    if choice.nlist:
        effort, most = settings.nprobe or 1, settings.nprobe or choice.nlist
    elif choice.is_graph:
        effort, most = FIRST_EF_SEARCH, MAX_EF_SEARCH
    while True:
        set_effort(index, effort)
        recall = measure_recall(index, plan.vectors, truths)
        if recall.recall >= settings.recall_target or effort >= most:
            return Built(choice=choice, effort=effort, recall=recall)
        effort = min(most, effort * 2)


def _with_larger_code(settings: "BuildIndex", plan: Plan, built: Built) -> Plan:
    """The plan with the next larger code.

    Raises:
        DeclipError: nobody but the user may change the type, or nothing larger fits.
    """
    choice, vectors = plan.choice, plan.vectors
    limit = index_limit(settings.max_memory_gib, vectors.dim, settings.num_queries)
    larger = None
    if settings.nprobe is None and not settings.index_key:
        larger = next_larger(choice, vectors.num_rows, vectors.dim, limit_bytes=limit)
    if larger is not None:
        print(
            f"index: recall@{NUM_NEIGHBORS} is {built.recall.recall:.4f} with {choice.index_key}, "
            f"below recall_target {settings.recall_target:g}: built again as {larger.index_key}",
            file=sys.stderr,
        )
        return plan_of(settings, larger, plan.parts, vectors)
    where = f"with {choice.index_key}"
    remedy = "give an index_key with a larger code"
    if choice.nlist:
        where = f"at nprobe {built.effort} of {choice.nlist} lists"
    if settings.nprobe is not None:
        remedy = "raise nprobe or unset it"
    elif not settings.index_key:
        above = next_larger(choice, vectors.num_rows, vectors.dim, limit_bytes=math.inf)
        size = (
            index_bytes(above.index_key, above.nlist, vectors.num_rows, vectors.dim) if above else 0
        )
        remedy = (
            f"raise max_memory_gib, for {above.index_key} takes {size / GIB:.3g} GiB"
            if above
            else "choose another index_type"
        )
    raise DeclipError(
        f"recall@{NUM_NEIGHBORS} is {built.recall.recall:.4f} {where}, below recall_target "
        f"{settings.recall_target:g}; {remedy}, or lower recall_target."
    )


# What is said of it ------------------------------------------------------------------------------


def row_tables(store: Store, name: str, parts: Sequence[Part]) -> Iterator[pa.Table]:
    """Key, shard and caption_sha of the rows, a table for each shard that has any."""
    for part in progress(parts, len(parts), "index: name rows"):
        if not part.num_rows:
            continue
        path = layout.embedding_path(name, "metadata", part.partition)
        table = sidecars.read_table(store, path, METADATA_SCHEMA.names)
        if len(table) != part.num_rows:
            raise DeclipError(
                f"{path!r} has {len(table)} rows, the vectors have {part.num_rows}; rerun the "
                "stage that embeds."
            )
        shas = [caption_sha(str(text)) for text in table.column("caption").to_pylist()]
        yield pa.table(
            {
                "key": table.column("key"),
                "shard": pa.array([part.shard] * len(table), pa.string()),
                "caption_sha": pa.array(shas, pa.string()),
            }
        )


def measured(built: Built) -> dict[str, Any]:
    """What info.json says of type and recall; the names are autofaiss's where it has one."""
    low, high = built.recall.interval
    effort, choice = built.effort, built.choice
    parameter = f"nprobe={effort}" if choice.nlist else f"efSearch={effort}" if effort else ""
    return {
        "index_key": choice.index_key,
        "index_param": parameter,
        f"recall@{NUM_NEIGHBORS}": round(built.recall.recall, 6),
        f"recall@{NUM_NEIGHBORS} interval": [round(low, 6), round(high, 6)],
        f"recall@{NUM_NEIGHBORS} with duplicates": round(built.recall.recall_with_duplicates, 6),
        "num_queries": built.recall.num_queries,
        "nlist": choice.nlist,
        "nprobe": effort if choice.nlist else 0,
        **({"efSearch": effort} if choice.is_graph else {}),
    }


def stored_sizes(num_rows: int, dim: int, size: int) -> dict[str, Any]:
    """What info.json says of the file's size, by autofaiss's names."""
    return {
        "size in bytes": size,
        "nb vectors": num_rows,
        "vectors dimension": dim,
        "compression ratio": round(num_rows * dim * 4 / size, 6),
    }


def _describe(settings: "BuildIndex", store: Store, plan: Plan, built: Built) -> TaskStats:
    """Write the rows' names, then info.json."""
    name, vectors, first = settings.name, plan.vectors, plan.parts[0]
    write_rows(store, rows_path(name), row_tables(store, settings.embeddings, plan.parts))
    size = store.size(index_path(name))
    info = {
        "format_version": FORMAT_VERSION,
        **measured(built),
        **stored_sizes(vectors.num_rows, vectors.dim, size),
        "recall_target": settings.recall_target,
        "reason": plan.choice.reason,
        "embeddings": settings.embeddings,
        "kind": settings.kind,
        "encoder": first.encoder,
        "encoder_digest": first.encoder_digest,
        "selection": first.selection,
        "embeddings_sha256": vectors_digest(store, settings.embeddings, settings.kind, plan.parts),
        "index_sha256": store.sha256(index_path(name)),
        "rows_sha256": store.sha256(rows_path(name)),
        "seed": settings.seed,
    }
    store.write_bytes(info_path(name), canonical_json(info))
    shown = {k: info[k] for k in ("index_key", "nprobe", "num_queries", f"recall@{NUM_NEIGHBORS}")}
    return TaskStats(
        num_in=vectors.num_rows,
        num_out=vectors.num_rows,
        files=[index_path(name), rows_path(name), info_path(name)],
        extra=shown,
    )
