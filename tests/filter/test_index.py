import importlib
import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from index_rows import unit_rows
from stage_runs import HASHING, digests, run_stage

from declip_filter import BuildIndex, EmbedPairs, FilterPairs
from declip_filter.embeddings import read_parts, read_vectors
from declip_filter.index import build_index
from declip_filter.index_files import index_path, info_path, load_index, rows_path, search
from declip_shards import DeclipError, layout, read_samples, sidecars

pytestmark = pytest.mark.usefixtures("several_threads")


def test_same_rows_same_bytes_other_seed_other_centroids():
    vectors = unit_rows(600, 16)

    def data(seed: int) -> bytes:
        return faiss.serialize_index(build_index(vectors, nlist=8, seed=seed)).tobytes()

    assert data(0) == data(0) != data(1)


def test_training_on_a_drawn_part_gives_the_same_bytes_twice():
    vectors = unit_rows(1500, 8)
    once, again = (build_index(vectors, nlist=4, seed=3) for _ in range(2))
    assert once.ntotal == 1500
    np.testing.assert_array_equal(faiss.serialize_index(once), faiss.serialize_index(again))


def test_search_finds_an_indexed_row_first():
    vectors = unit_rows(300, 16)
    for nlist in (0, 8):
        index = build_index(vectors, nlist=nlist, seed=0)
        scores, rows = search(index, vectors.astype(np.float32), 3, 8 if nlist else None)
        np.testing.assert_array_equal(rows[:, 0], np.arange(300))
        np.testing.assert_allclose(scores[:, 0], 1, atol=2e-3)


def test_stage_writes_index_rows_and_info_that_agree(indexed_root, store):
    info = json.loads(store.read_bytes(info_path("captions")))
    rows = sidecars.read_rows(store, rows_path("captions"))
    index: Any = faiss.read_index(str(store.local_path(index_path("captions"))))
    parts = read_parts(store, "text", layout.list_shards(store))
    keys = [key for part in parts for key in read_vectors(store, "text", "text_emb", part)[1]]
    assert [row["key"] for row in rows] == keys
    assert [row["row"] for row in rows] == list(range(len(keys)))
    assert index.ntotal == info["nb vectors"] == len(keys)
    assert (index.d, index.nlist, index.nprobe) == (64, 8, info["nprobe"])
    assert info["recall@10"] >= info["recall_target"]
    low, high = info["recall@10 interval"]
    assert low <= info["recall@10"] <= high
    assert info["size in bytes"] == store.size(index_path("captions"))
    assert info["index_sha256"] == store.sha256(index_path("captions"))
    assert info["encoder"] == "hashing:64"
    members = {s.key for shard in layout.list_shards(store) for s in read_samples(store, shard)}
    assert set(keys) <= members


def test_rerun_writes_the_same_bytes_and_needs_all_files(indexed_root, store):
    stage = BuildIndex(root=indexed_root, index_type="IVF", nlist=8)
    before = digests(indexed_root, "index")
    for path in before:
        assert stage.is_done("all")
        store.remove(path)
        assert not stage.is_done("all")
        stats = run_stage(stage)["all"]
        assert digests(indexed_root, "index") == before
    assert sorted(stats.files) == sorted(before)


def test_auto_takes_lists_from_a_size_on(embedded_root, store):
    run_stage(BuildIndex(root=embedded_root, name="small"))
    run_stage(BuildIndex(root=embedded_root, name="large", ivf_from_rows=50))
    small, large = (json.loads(store.read_bytes(info_path(n))) for n in ("small", "large"))
    assert (small["index_key"], small["recall@10"], small["nprobe"]) == ("Flat", 1.0, 0)
    assert large["index_key"] == f"IVF{large['nlist']},Flat"


def test_nprobe_rises_with_the_target(embedded_root, store):
    chosen = []
    for n, target in enumerate((0.0, 0.9, 1.0)):
        run_stage(BuildIndex(root=embedded_root, name=f"n{n}", nlist=16, recall_target=target))
        chosen.append(json.loads(store.read_bytes(info_path(f"n{n}")))["nprobe"])
    assert chosen[0] == 1
    assert chosen == sorted(chosen)
    assert chosen[2] > 1


def test_target_that_is_missed_is_told_with_the_remedy(embedded_root):
    stage = BuildIndex(root=embedded_root, nlist=16, nprobe=1, recall_target=0.999)
    with pytest.raises(DeclipError, match=r"at nprobe 1 of 16 lists, below recall_target 0.999"):
        run_stage(stage)
    assert not stage.is_done("all")


def test_embeddings_without_a_row_are_refused(selected_root, store):
    nothing = FilterPairs(root=selected_root, name="none", min_words=99)
    run_stage(nothing)
    stage = EmbedPairs(root=selected_root, **HASHING)
    run_stage(stage)
    for shard in ("00000", "00001"):
        path = f"embeddings/text/parts/{shard}.json"
        value = json.loads(store.read_bytes(path))
        store.write_bytes(path, json.dumps(value | {"num_rows": 0}).encode())
    with pytest.raises(DeclipError, match=r"embeddings 'text' hold 0 samples"):
        run_stage(BuildIndex(root=selected_root))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "text"}, r"kind is 'text'. Did you mean 'text_emb'"),
        ({"index_type": "flat"}, r"index_type is 'flat'. Did you mean 'Flat'"),
        ({"nlist": 0}, r"nlist is 0; it must be at least 1"),
        ({"nlist": 4, "nprobe": 5}, r"nprobe is 5, more than the 4 lists"),
        ({"index_type": "Flat", "nprobe": 5}, r"unset them or choose index_type 'IVF'"),
        ({"index_type": "HNSW", "nlist": 5}, r"unset them or choose index_type 'IVF'"),
        ({"index_key": "IVF8,Flat", "nlist": 5}, r"leave index_type and nlist unset with it"),
        ({"index_key": "HNSW8", "nprobe": 5}, r"index_key 'HNSW8' has none; unset it"),
        ({"index_key": "Flat,RFlat"}, r"'Flat,RFlat', which is not taken; it must be a code"),
        ({"max_memory_gib": 0.1}, r"max_memory_gib is 0.1; it must be at least 0.5"),
        ({"rows_per_task": 0}, r"rows_per_task is 0"),
        ({"device": "gpu"}, r"device is 'gpu'"),
        ({"recall_target": 1.1}, r"recall_target is 1.1; it must be from 0 to 1"),
        ({"num_queries": 0}, r"num_queries is 0"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        BuildIndex(**settings)


def test_more_lists_than_rows_or_probes_than_lists_are_refused(embedded_root):
    with pytest.raises(DeclipError, match=r"nlist is 5000, and there are \d+ vectors"):
        run_stage(BuildIndex(root=embedded_root, nlist=5000))
    with pytest.raises(DeclipError, match=r"nprobe is 500, and the index has \d lists"):
        run_stage(BuildIndex(root=embedded_root, nprobe=500))


def test_clip_retrievals_own_service_answers_from_our_files(indexed_root, store, monkeypatch):
    """clip_back's index loader (mapped), metadata provider and search, on what the stages wrote."""
    spec = find_spec("clip_retrieval")
    assert spec is not None, "install requirements/dev-no-deps.txt"
    assert spec.origin is not None
    # Its __init__ imports the inference half too, with torchvision; the service needs none of it.
    package = types.ModuleType("clip_retrieval")
    package.__path__ = [str(Path(spec.origin).parent)]
    monkeypatch.setitem(sys.modules, "clip_retrieval", package)
    clip_back = importlib.import_module("clip_retrieval.clip_back")

    for key in ("IVF8,PQ32x4fsr", "OPQ16_64,IVF8,PQ16x4fs", "IVF8,SQfp16", "HNSW8,Flat", "Flat"):
        settings: dict[str, Any] = {"index_key": key, "recall_target": 0, "num_queries": 20}
        run_stage(BuildIndex(root=indexed_root, name="other", **settings))
        other = clip_back.load_index(str(store.local_path(index_path("other"))), True)
        ours = load_index(store, "other").faiss_index
        queries = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
        np.testing.assert_array_equal(other.search(queries, 5)[1], ours.search(queries, 5)[1])
    index = clip_back.load_index(str(store.local_path(index_path("captions"))), True)
    provider = clip_back.ParquetMetadataProvider(f"{indexed_root}/embeddings/text/metadata")
    resource = types.SimpleNamespace(
        image_index=index, text_index=index, metadata_is_ordered_by_ivf=False,
        safety_model=None, violence_detector=None, metadata_provider=provider,
        aesthetic_embeddings=None, columns_to_return=["image_path", "caption"],
    )  # fmt: skip
    service = clip_back.KnnService(clip_resources={"ours": resource})
    parts = read_parts(store, "text", layout.list_shards(store))
    for part in parts[:2]:
        vectors, keys = read_vectors(store, "text", "text_emb", part)
        for vector in vectors[::10]:
            query = vector[None].astype(np.float32)
            distances, rows = service.knn_search(query, "text", 3, resource, False, False, False)
            answers = service.map_to_metadata(
                rows, distances, 3, provider, resource.columns_to_return
            )
            own = keys[vectors.tolist().index(vector.tolist())]
            captions = {s.key: s.caption for s in read_samples(store, part.shard)}
            assert answers[0]["similarity"] == pytest.approx(1, abs=2e-3)
            assert answers[0]["caption"] == captions[own]
