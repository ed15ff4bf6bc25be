"""Samples leave the filter's tables, embeddings, index and neighbor lists together."""

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from stage_runs import HASHING, run_stage

from declip_filter import (
    BuildIndex,
    BuildNeighbors,
    EmbedPairs,
    FillIndex,
    PlanFilter,
    TrainIndex,
    index_building,
    index_memory,
    index_training,
    read_neighbors,
)
from declip_filter.embeddings import read_part, read_vectors
from declip_filter.index import build_index
from declip_filter.index_building import part_files
from declip_filter.index_choice import Choice, check_index_key
from declip_filter.index_files import build_path, info_path, load_index, search
from declip_filter.index_training import build_whole
from declip_filter.knn_graph import ArrayVectors
from declip_filter.neighbor_graph import BuildGraph, drop_from_graph
from declip_filter.optout import (
    drop_from_index,
    drop_from_sidecars,
    names_a_duplicate,
    names_a_neighbor,
    recount,
    remove_rows,
)
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.manifest import settings_of


def apply(store: Store, changes: dict[str, bytes | None]) -> None:
    for path, data in changes.items():
        if data is None:
            store.remove(path)
        else:
            store.write_bytes(path, data)


def drop(store: Store, keys: set[str]) -> None:
    shards = layout.list_shards(store)
    for shard in shards:
        apply(store, drop_from_sidecars(store, shard, keys))
    apply(store, drop_from_index(store, "captions", keys, shards))


def embedded_keys(store: Store) -> list[str]:
    return [
        key
        for shard in layout.list_shards(store)
        for key in read_vectors(store, "text", "text_emb", read_part(store, "text", shard))[1]
    ]


@pytest.fixture
def gone(indexed_root: str) -> set[str]:
    return set(embedded_keys(Store(indexed_root))[3::11])


@pytest.mark.parametrize("index_type", ["Flat", "IVF"])
def test_an_index_without_rows_answers_as_the_old_one_without_them(index_type):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(300, 16)).astype(np.float16)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nlist = 9 if index_type == "IVF" else 0
    kept = rng.random(300) > 0.3
    old = build_index(vectors, nlist=nlist, seed=1)
    new = remove_rows(build_index(vectors, nlist=nlist, seed=1), kept)
    new = faiss.deserialize_index(faiss.serialize_index(new))
    assert new.ntotal == kept.sum()
    renumbered = np.cumsum(kept) - 1
    for nprobe in (1, 4, 9):
        scores, rows = search(old, vectors[:40].astype(np.float32), 300, nprobe)
        new_scores, new_rows = search(new, vectors[:40].astype(np.float32), 300, nprobe)
        for query in range(40):
            stays = (rows[query] >= 0) & kept[rows[query]]
            found = new_rows[query] >= 0
            assert np.array_equal(renumbered[rows[query][stays]], new_rows[query][found])
            assert np.array_equal(scores[query][stays], new_scores[query][found])


@pytest.mark.parametrize("nlist", [0, 7])
def test_removing_in_two_steps_gives_the_same_bytes_as_in_one(nlist):
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(200, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    first, second = rng.random(200) > 0.2, rng.random(200) > 0.2
    at_once = remove_rows(build_index(vectors, nlist=nlist, seed=0), first & second)
    in_turn = remove_rows(build_index(vectors, nlist=nlist, seed=0), first)
    in_turn = remove_rows(in_turn, second[first])
    assert np.array_equal(faiss.serialize_index(at_once), faiss.serialize_index(in_turn))


def unit(num: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(num, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float16)


def built(key: str, vectors: np.ndarray):
    choice = Choice(index_key=key, nlist=check_index_key(key), reason="")
    return build_whole(choice, ArrayVectors(vectors), seed=0)


KEYS = (
    "IVF6,SQ8",
    "OPQ8_16,IVF6,PQ8x4fs",
    "PCA8,IVF6,Flat",
    "HNSW8,Flat",
    "SQ8",
)


@pytest.mark.parametrize("key", KEYS)
def test_every_type_loses_rows_in_steps_as_at_once(key):
    vectors = unit(300, 16, 3)
    rng = np.random.default_rng(5)
    first, second = rng.random(300) > 0.2, rng.random(300) > 0.2
    at_once = remove_rows(built(key, vectors), first & second)
    in_turn = remove_rows(remove_rows(built(key, vectors), first), second[first])
    assert np.array_equal(faiss.serialize_index(at_once), faiss.serialize_index(in_turn))
    left = vectors[first & second]
    new = faiss.deserialize_index(faiss.serialize_index(at_once))
    assert new.ntotal == len(left)
    effort = 6 if "IVF" in key else 300 if "HNSW" in key else None
    scores, rows = search(new, left[:50].astype(np.float32), new.ntotal, effort)
    if "HNSW" in key:
        assert (rows[:, 0] == np.arange(50)).mean() > 0.9
        return
    old_scores, old_rows = search(built(key, vectors), left[:50].astype(np.float32), 300, effort)
    numbers = np.where(first & second, np.cumsum(first & second) - 1, -1)
    for query in range(50):
        was = {
            numbers[row]: score
            for row, score in zip(old_rows[query], old_scores[query], strict=True)
            if numbers[row] >= 0
        }
        assert was == dict(zip(rows[query].tolist(), scores[query], strict=True))


def test_a_graph_of_trained_codes_says_that_it_loses_no_row():
    index = built("HNSW8,SQ8", unit(100, 16, 0))
    with pytest.raises(DeclipError, match=r"IndexHNSWSQ can lose no row; delete its folder"):
        remove_rows(index, np.arange(100) > 3)


def test_parts_of_an_index_that_is_being_built_go_too(indexed_root, gone):
    store = Store(indexed_root)
    for name in ("00000.faiss", "empty.faiss"):
        store.write_bytes(build_path("captions", name), b"vectors")
    drop(store, gone)
    assert part_files(store, "captions") == []
    assert store.exists(build_path("captions", "empty.faiss"))


def test_no_row_is_called_a_duplicate_of_one_that_is_gone(indexed_root, gone):
    store = Store(indexed_root)
    shard = layout.list_shards(store)[0]
    keys = sidecars.read_table(store, layout.signals_path("basic", shard), ["key"])
    keys = keys.column(0).to_pylist()
    kept_ones = [sorted(gone)[0], keys[0], None]
    num = len(keys)
    table = pa.table(
        {
            "key": keys,
            "duplicate_bytes_of": pa.array([None] * num, pa.string()),
            "duplicate_perceptual_of": [kept_ones[n % 3] for n in range(num)],
            "duplicate_perceptual_distance": pa.array(
                [n if kept_ones[n % 3] else None for n in range(num)], pa.int32()
            ),
            "contaminated_by": [f"eval:{sorted(gone)[0]}"] * num,
        }
    )
    path = layout.signals_path("duplicates", shard)
    sidecars.write_table(store, path, table)
    assert names_a_duplicate(store, "duplicates", shard, gone)
    assert not names_a_duplicate(store, "basic", shard, gone)
    assert not names_a_duplicate(store, "none", shard, gone)
    apply(store, drop_from_sidecars(store, shard, gone))
    assert not names_a_duplicate(store, "duplicates", shard, gone)
    rows = {row["key"]: row for row in table.to_pylist()}
    for row in sidecars.read_rows(store, path):
        old = rows.pop(row["key"])
        if old["duplicate_perceptual_of"] in gone:
            old |= {"duplicate_perceptual_of": None, "duplicate_perceptual_distance": None}
        assert row == old
    assert set(rows) <= gone
    assert sidecars.read_table(store, path).schema.equals(table.schema)
    assert drop_from_sidecars(store, shard, gone) == {}


def test_all_rows_may_go():
    vectors = np.eye(8, dtype=np.float16)
    for nlist in (0, 2):
        index = remove_rows(build_index(vectors, nlist=nlist, seed=0), np.zeros(8, np.bool_))
        index = faiss.deserialize_index(faiss.serialize_index(index))
        assert index.ntotal == 0
        assert (index.search(np.eye(8, dtype=np.float32), 3)[1] == -1).all()


def test_every_artefact_loses_the_rows_and_nothing_else(indexed_root, gone):
    store = Store(indexed_root)
    before = embedded_keys(store)
    vectors = {
        shard: read_vectors(store, "text", "text_emb", read_part(store, "text", shard))
        for shard in layout.list_shards(store)
    }
    tables = {
        path: sidecars.read_table(store, path)
        for shard in vectors
        for path in (layout.signals_path("basic", shard), layout.selection_path("default", shard))
    }
    drop(store, gone)
    assert embedded_keys(store) == [key for key in before if key not in gone]
    for shard, (old, keys) in vectors.items():
        stays = np.asarray([key not in gone for key in keys], np.bool_)
        new, new_keys = read_vectors(store, "text", "text_emb", read_part(store, "text", shard))
        assert np.array_equal(new, old[stays])
        assert new_keys == [key for key in keys if key not in gone]
        neighbors = read_neighbors(store, "captions", shard, new_keys)
        named = {key for row in neighbors.column("neighbor_keys").to_pylist() for key in row}
        assert not named & gone
    for path, table in tables.items():
        rows = [row for row in table.to_pylist() if row["key"] not in gone]
        assert sidecars.read_rows(store, path) == rows
    assert load_index(store, "captions").keys.tolist() == embedded_keys(store)


def test_a_second_time_there_is_nothing_to_do(indexed_root, gone):
    store = Store(indexed_root)
    drop(store, gone)
    for shard in layout.list_shards(store):
        assert drop_from_sidecars(store, shard, gone) == {}
        assert names_a_neighbor(store, "captions", shard, gone) == set()
    assert drop_from_index(store, "captions", gone, layout.list_shards(store)) == {}


def test_the_stages_after_it_accept_what_is_left(indexed_root, gone):
    """Neighbors are looked up in the lessened index without a complaint, index built anew too."""
    store = Store(indexed_root)
    drop(store, gone)
    run_stage(BuildNeighbors(root=indexed_root, name="again", k=4, num_candidates=8))
    alive = set(embedded_keys(store))
    for shard in layout.list_shards(store):
        rows = sidecars.read_rows(store, layout.neighbors_path("again", shard))
        assert {key for row in rows for key in row["neighbor_keys"]} <= alive
    run_stage(BuildIndex(root=indexed_root, name="anew", index_type="Flat"))
    ours, theirs = (json.loads(store.read_bytes(info_path(name))) for name in ("captions", "anew"))
    assert ours["embeddings_sha256"] == theirs["embeddings_sha256"]
    assert ours["nb vectors"] == theirs["nb vectors"]
    assert ours["rows_sha256"] == theirs["rows_sha256"]


def test_pictures_and_texts_stay_aligned(selected_root):
    run_stage(EmbedPairs(root=selected_root, images=True, **HASHING))
    store = Store(selected_root)
    part = read_part(store, "text", "00000")
    images, keys = read_vectors(store, "text", "img_emb", part)
    apply(store, drop_from_sidecars(store, "00000", {keys[2]}))
    part = read_part(store, "text", "00000")
    for kind in ("text_emb", "img_emb"):
        vectors, left = read_vectors(store, "text", kind, part)
        assert len(vectors) == len(left) == len(keys) - 1
    assert np.array_equal(vectors, np.delete(images, 2, axis=0))


def test_figures_are_counted_as_the_stages_count_them(indexed_root, gone):
    """Of what is left: what each stage's own receipt of the same tables would say."""
    store = Store(indexed_root)
    drop(store, gone)
    shard = layout.list_shards(store)[0]
    signals = sidecars.num_rows(store, layout.signals_path("basic", shard))
    assert recount(store, "MeasureImages", {"name": "basic"}, shard, {}, {}) == {
        "num_in": signals,
        "num_out": signals,
        "reasons": {},
        "extra": {},
    }
    counted = recount(store, "FilterPairs", {"name": "default"}, shard, {}, {})
    assert counted is not None
    assert counted["num_in"] == signals
    assert counted["num_in"] == counted["num_out"] + sum(counted["reasons"].values())
    found = recount(
        store, "BuildNeighbors", {"name": "captions", "k": 4}, shard, {"removed_self": 7}, {}
    )
    assert found is not None
    rows = sidecars.read_rows(store, layout.neighbors_path("captions", shard))
    lengths = [len(row["neighbor_keys"]) for row in rows]
    assert found["extra"]["num_neighbors"] == sum(lengths)
    assert found["extra"]["num_short"] == sum(length < 4 for length in lengths) > 0
    assert found["extra"]["removed_self"] == 7
    assert recount(store, "SomethingElse", {}, shard, {}, {}) is None


def test_figures_that_stay_say_of_how_many_samples_they_are(indexed_root, gone, monkeypatch):
    """Of a graph, a plan, and an index's training and filling, before and after samples go."""
    for module in (index_building, index_memory, index_training):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 32)
    store = Store(indexed_root)
    own: dict[str, Any] = {"root": indexed_root, "name": "captions"}
    settings: dict[str, Any] = {
        "BuildGraph": own | {"method": "graph", "k": 4},
        "PlanFilter": {"root": indexed_root, "signals": ("basic",)},
        "TrainIndex": own | {"index_type": "IVF", "nlist": 4, "rows_per_task": 32},
        "FillIndex": own | {"index_type": "IVF", "nlist": 4, "rows_per_task": 32},
    }
    made: dict[str, tuple[str, TaskStats]] = {}
    for stage in (BuildGraph, PlanFilter, TrainIndex, FillIndex):
        built = stage(**settings[stage.__name__])
        made[stage.__name__] = next(iter(run_stage(built).items()))
        settings[stage.__name__] = settings_of(built, hashed_only=False)

    def again(name: str) -> dict[str, Any]:
        task, stats = made[name]
        same = {"num_in": stats.num_in, "num_out": stats.num_out, "reasons": {}}
        figures = recount(store, name, settings[name], task, stats.extra, {})
        return {**same, "extra": dict(stats.extra), **(figures or {})}

    before = {name: again(name) for name in made}
    for name, (_, stats) in made.items():
        assert before[name]["num_in"] == stats.num_in
        assert before[name]["extra"] == dict(stats.extra)
    apply(store, drop_from_graph(store, "captions", gone))
    drop(store, gone)
    num = 72 - len(gone)
    graph = again("BuildGraph")
    assert (graph["num_in"], graph["num_out"]) == (num, num)
    assert graph["extra"] == {**made["BuildGraph"][1].extra, "recall measured on": 72}
    plan = again("PlanFilter")
    samples = made["PlanFilter"][1].num_in
    assert plan["num_in"] == samples - len(gone)
    assert plan["extra"]["counted on"] == samples
    assert again("TrainIndex")["extra"]["counted on"] == 72
    filled = again("FillIndex")
    assert filled["extra"]["counted on"] == filled["num_in"] == made["FillIndex"][1].num_in > 0


def test_an_index_of_other_rows_is_refused(indexed_root, gone):
    store = Store(indexed_root)
    path = "index/captions/rows.parquet"
    table = sidecars.read_table(store, path)
    sidecars.write_table(store, path, table.slice(0, len(table) - 1))
    with pytest.raises(DeclipError, match=r"has \d+ vectors and names \d+ rows; delete its folder"):
        drop_from_index(store, "captions", gone, layout.list_shards(store))


def test_foreign_folders_are_left_alone(fake_root):
    store = Store(fake_root)
    store.write_bytes("embeddings/theirs/img_emb/img_emb_0.npy", b"x")
    store.write_bytes("index/theirs/knn.index", b"y")
    assert drop_from_sidecars(store, "00000", {"0000001"}) == {}
    assert drop_from_index(store, "theirs", {"0000001"}, ["00000"]) == {}
    assert Path(fake_root, "index/theirs/knn.index").read_bytes() == b"y"
