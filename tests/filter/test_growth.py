"""An index grows by shards to what a build with its centroids would give, or not at all."""

import json
from typing import Any

import faiss
import numpy as np
import pytest
from index_rows import unit_rows, write_embeddings
from stage_runs import digests, run_stage

from declip_filter import BuildIndex, BuildNeighbors
from declip_filter.growth import append_to_index, copy_without, missing_shards, stage_append
from declip_filter.index_files import index_path, info_path, load_index, rows_path, search
from declip_shards import DeclipError, Store, layout, sidecars

KEYS = ("IVF8,Flat", "PCA24,IVF8,PQ24x4fsr", "HNSW8,Flat", "Flat")
ROWS = unit_rows(700, 32, num_centers=12)
SHARDS = {"00000": ROWS[:300], "00001": ROWS[300:450], "00002": ROWS[450:]}


def build(root: str, key: str, shards: dict[str, np.ndarray], **settings) -> Store:
    store: Store = write_embeddings(root, shards)
    values: dict[str, Any] = {"recall_target": 0.3, "num_queries": 50} | settings
    run_stage(BuildIndex(root=root, index_key=key, **values))
    return store


def choose(*names: str) -> dict[str, np.ndarray]:
    return {name: SHARDS[name] for name in names}


@pytest.mark.parametrize("key", KEYS)
def test_one_append_or_two_or_none_at_all(tmp_path, key):
    """Rows, their numbers and the file are the same; of lists also where new ones come between."""
    once, twice, whole = (str(tmp_path / name) for name in ("once", "twice", "whole"))
    first = ("00000", "00002") if "IVF" in key or key == "Flat" else ("00000",)
    stores = [build(root, key, choose(*first)) for root in (once, twice)]
    rest = sorted(set(SHARDS) - set(first))
    added = append_to_index(write_embeddings(once, SHARDS), "captions")
    assert added.shards == tuple(rest)
    assert added.recall is not None
    for name in rest:
        write_embeddings(twice, choose(name))
        append_to_index(stores[1], "captions")
    if "HNSW" not in key:  # whose draws of levels begin anew with each append
        assert digests(once, "index") == digests(twice, "index")
    write_embeddings(whole, SHARDS)
    run_stage(BuildIndex(root=whole, index_key=key, recall_target=0, num_queries=50))
    assert stores[0].sha256(rows_path("captions")) == Store(whole).sha256(rows_path("captions"))
    loaded = load_index(stores[0], "captions")
    assert loaded.num_rows == added.num_before + added.num_added == 700
    assert loaded.info["trained as"]["nb vectors"] == added.num_before
    queries = ROWS[::7].astype(np.float32)
    effort = 8 if "IVF" in key else 700 if "HNSW" in key else None
    _, rows = search(loaded.faiss_index, queries, 10, effort)
    exact = np.argsort(-queries @ ROWS.astype(np.float32).T, axis=1)[:, :10]
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(rows, exact, strict=True)]
    assert np.mean(shares) >= (0.99 if key in ("IVF8,Flat", "Flat", "HNSW8,Flat") else 0.4)
    assert loaded.info["recall@10"] == pytest.approx(added.recall.recall, abs=1e-6)
    assert stores[0].list_folders("staging") == []


def test_a_second_append_has_nothing_to_do(tmp_path):
    store = build(str(tmp_path), "IVF8,Flat", choose("00000"))
    write_embeddings(str(tmp_path), SHARDS)
    assert missing_shards(store, "captions") == ["00001", "00002"]
    append_to_index(store, "captions")
    before = digests(str(tmp_path), "index")
    again = append_to_index(store, "captions")
    assert (again.num_added, again.shards, again.transaction) == (0, (), "")
    assert digests(str(tmp_path), "index") == before
    assert missing_shards(store, "captions") == []


def test_below_the_recall_floor_nothing_is_appended_and_it_is_said(tmp_path):
    """Centroids of one cloud, new rows of another: all of them fall into few lists."""
    root = str(tmp_path)
    store = build(root, "IVF24,Flat", choose("00000"), recall_target=0.99)
    far = unit_rows(900, 32, seed=9)
    write_embeddings(root, {"00001": far})
    before = digests(root, "index")
    nprobe = load_index(store, "captions").nprobe
    with pytest.raises(DeclipError, match=r"with 900 rows more, recall@10 is .* below recall_targ"):
        append_to_index(store, "captions")
    with pytest.raises(
        DeclipError, match=r"nothing was appended; allow a deeper search with --max"
    ):
        stage_append(store, "captions", max_nprobe=nprobe)
    assert digests(root, "index") == before
    grown = append_to_index(store, "captions", max_nprobe=24)
    assert nprobe == grown.effort_before < grown.effort <= 24
    assert grown.recall is not None
    assert grown.recall.recall >= 0.99
    index: Any = faiss.read_index(str(store.local_path(index_path("captions"))))
    assert index.nprobe == grown.effort == grown.info["nprobe"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("weights", r"index 'captions' is of encoder 'own:vectors', the embeddings 'text' are by"),
        ("vectors", r"of shards that index 'captions' holds are others than when it was built"),
        ("rows", r"when it was built \(shard 00000: 300 rows then, 299 now\): nothing can be"),
        ("index", r"index.faiss' has changed since it was written"),
    ],
)
def test_on_other_embeddings_or_a_damaged_file_nothing_is_built(tmp_path, change, sentence):
    root = str(tmp_path)
    store = build(root, "IVF8,Flat", choose("00000"))
    if change == "weights":
        write_embeddings(root, SHARDS, digest="others")
    else:
        own = {"vectors": ROWS[1:301], "rows": ROWS[:299]}.get(change, ROWS[:300])
        write_embeddings(root, SHARDS | {"00000": own})
    if change == "index":
        data = bytearray(store.read_bytes(index_path("captions")))
        data[-3] ^= 1
        store.write_bytes(index_path("captions"), data)
    before = digests(root, "index")
    with pytest.raises(DeclipError, match=sentence):
        append_to_index(store, "captions")
    assert digests(root, "index") == before


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "HNSW8,Flat",
            r"at efSearch \d+, below .* a broader search \(efSearch\) with --max-nprobe \d",
        ),
        ("SQ4", r"\d\), below recall_target 1 .*: nothing was appended; (?!allow)"),
    ],
)
def test_a_refusal_speaks_of_what_the_type_has(tmp_path, key, sentence):
    root = str(tmp_path)
    store = build(root, key, choose("00000"), recall_target=0, num_queries=40)
    path = info_path("captions")
    info = json.loads(store.read_bytes(path))
    store.write_bytes(path, json.dumps(info | {"recall_target": 1.0}).encode())
    write_embeddings(root, {"00001": unit_rows(900, 32, seed=9)})
    with pytest.raises(DeclipError, match=sentence) as caught:
        stage_append(store, "captions")
    assert "nprobe 0" not in str(caught.value)


def test_a_graph_grows_at_its_end_only(tmp_path):
    store = build(str(tmp_path), "HNSW8,Flat", choose("00001"))
    write_embeddings(str(tmp_path), SHARDS)
    with pytest.raises(DeclipError, match=r"type HNSW8,Flat grows at its end, and new shards come"):
        append_to_index(store, "captions")


@pytest.mark.parametrize("key", ["IVF8,Flat", "IVF8,PQ16x4fsr", "HNSW8,Flat"])
def test_a_copy_without_samples_leaves_its_own_as_it_is(tmp_path, key):
    root = str(tmp_path)
    store = build(root, key, choose("00000"))
    keys = load_index(store, "captions").keys.tolist()
    gone = set(keys[::5])
    before = digests(root, "index/captions")
    assert copy_without(store, "captions", "served", gone) == 60
    assert digests(root, "index/captions") == before
    served = load_index(store, "served")
    assert served.keys.tolist() == [key for key in keys if key not in gone]
    _, rows = search(served.faiss_index, ROWS[:300].astype(np.float32), 5, 200)
    assert rows.max() < 240
    assert json.loads(store.read_bytes(info_path("served")))["copy of"]["name"] == "captions"
    for name, wanted, sentence in (
        ("served", gone, r"there is an index 'served'; choose another name with --to"),
        ("other", {"nobody"}, r"has no row of these 1 keys"),
        ("a/b", gone, r"to is 'a/b'; it must be one folder name"),
    ):
        with pytest.raises(DeclipError, match=sentence):
            copy_without(store, "captions", name, wanted)


def test_neighbors_are_found_among_old_and_new_rows(tmp_path):
    root = str(tmp_path)
    store = build(root, "IVF8,Flat", choose("00000", "00001"))
    write_embeddings(root, SHARDS)
    append_to_index(store, "captions")
    run_stage(BuildNeighbors(root=root, k=4, num_candidates=16, method="index"))
    named = {
        key[:5]
        for shard in SHARDS
        for row in sidecars.read_rows(store, layout.neighbors_path("captions", shard))
        for key in row["neighbor_keys"]
    }
    assert named == set(SHARDS)
