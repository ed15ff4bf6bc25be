"""The three ways to a neighbor table: with exact search behind them, one table."""

import json
from typing import Any

import numpy as np
import pytest
from stage_runs import HASHING, digests, run_stage

from declip_filter import BuildIndex, BuildNeighbors, EmbedPairs, knn
from declip_filter.captions import normalize_caption
from declip_filter.embeddings import read_metadata, read_parts
from declip_filter.neighbor_graph import BuildGraph, graph_info_path, graph_path, graph_width
from declip_filter.neighbors import choose_method
from declip_filter.signals import read_signals
from declip_shards import DeclipError, Store, layout, neighbor_tables, sidecars


def tables(store, name="captions") -> dict[str, dict[str, Any]]:
    """key -> its row, over all shards."""
    return {
        row["key"]: row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.neighbors_path(name, shard))
    }


def lists(store, name="captions") -> dict[str, tuple[list[str], list[float]]]:
    """key -> neighbor keys and scores."""
    return {key: (row["neighbor_keys"], row["scores"]) for key, row in tables(store, name).items()}


def build(root, method, **settings) -> dict[str, tuple[list[str], list[float]]]:
    """The table by one method, under the method's name."""
    settings = {"root": root, "name": method, "method": method, "k": 5} | settings
    graph = BuildGraph(**settings)
    assert list(graph.tasks()) == (["all"] if method == "graph" else [])
    run_stage(graph)
    run_stage(BuildNeighbors(**settings))
    return lists(Store(root), settings["name"])


@pytest.fixture
def exact_graph(monkeypatch):
    """The graph by exact search, whatever the engine does."""

    def exact(vectors, k, *, groups=None, **others):
        assert others["recall_target"] == 0.95
        rows = np.arange(vectors.num_rows, dtype=np.int64)
        return knn.exact_neighbors(vectors, rows, k, groups=groups)

    monkeypatch.setattr(knn, "approximate_graph", exact)


@pytest.fixture
def pictured_root(selected_root: str) -> str:
    """Texts and pictures embedded."""
    run_stage(EmbedPairs(root=selected_root, images=True, **HASHING))
    return selected_root


@pytest.mark.usefixtures("exact_graph")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("text_emb", {}),
        ("img_emb", {"exclude_same_caption": False}),
        ("both", {"min_score": 0.55}),
        ("text_emb", {"k": 500, "num_candidates": 501}),
        ("both", {"max_image_hash_distance": 6, "num_candidates": 80}),
        ("text_emb", {"max_image_cosine": 0.999, "num_candidates": 80}),
    ],
)
def test_with_exact_search_behind_them_three_methods_give_one_table(pictured_root, kind, settings):
    run_stage(BuildIndex(root=pictured_root, index_type="Flat", kind=kind))
    found = {m: build(pictured_root, m, **settings) for m in ("index", "exact", "graph")}
    assert found["index"] == found["exact"] == found["graph"]
    assert any(keys for keys, _ in found["exact"].values())
    store = Store(pictured_root)
    by_sides = neighbor_tables.read_description(store, "exact")
    assert by_sides is not None
    assert (by_sides["kind"], by_sides["method"], by_sides["recall"]) == (kind, "exact", 1.0)


def test_sides_are_those_of_the_vectors(pictured_root):
    """Both: the mean of the cosines of texts and of pictures, over all pairs."""
    settings = {"index": "", "embeddings": "text", "exclude_same_caption": False, "k": 200}
    settings |= {"num_candidates": 201}
    found = {
        kind: build(pictured_root, "exact", name=kind, kind=kind, **settings)
        for kind in ("text_emb", "img_emb", "both")
    }
    scores = {
        kind: {(key, near): s for key, row in rows.items() for near, s in zip(*row, strict=True)}
        for kind, rows in found.items()
    }
    assert len(scores["both"]) == 72 * 71
    for pair, score in scores["both"].items():
        mean = (scores["text_emb"][pair] + scores["img_emb"][pair]) / 2
        assert score == pytest.approx(mean, abs=2e-3)


def test_near_duplicate_pictures_are_left_out(pictured_root):
    store = Store(pictured_root)
    hashes = {
        row["key"]: int(row["image_dhash"], 16)
        for shard in layout.list_shards(store)
        for row in read_signals(store, "basic", shard).to_pylist()
    }
    settings: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb"}
    plain = build(pictured_root, "exact", **settings)
    limit = 24
    strict = build(pictured_root, "exact", max_image_hash_distance=limit, **settings)

    def distances(table):
        return [(hashes[k] ^ hashes[n]).bit_count() for k, (near, _) in table.items() for n in near]

    assert min(distances(plain)) <= limit < min(distances(strict))
    extra = run_stage(
        BuildNeighbors(
            root=pictured_root, method="exact", max_image_hash_distance=limit, **settings
        )
    )["00000"].extra
    assert extra["removed_near_duplicate_image"] > 0
    with pytest.raises(DeclipError, match=r"signals/none/00000.parquet' is missing"):
        build(pictured_root, "exact", max_image_hash_distance=1, signals="none", **settings)


def test_the_engines_own_graph_has_no_self_no_caption_twice_and_true_scores(pictured_root):
    store = Store(pictured_root)
    found = build(pictured_root, "graph", index="", embeddings="text", kind="both")
    parts = read_parts(store, "text", layout.list_shards(store))
    text = {
        str(row["key"]): normalize_caption(str(row["caption"]))
        for part in parts
        for row in read_metadata(store, "text", part)
    }
    for key, (near, scores) in found.items():
        assert key not in near
        assert len({text[key], *(text[n] for n in near)}) == len(near) + 1
        assert scores == sorted(scores, reverse=True)
    info = json.loads(store.read_bytes(graph_info_path("graph")))
    assert info["recall"] >= 0.95
    assert (info["num_rows"], info["width"]) == (72, 13)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("method", ["exact", "graph", "index"])
def test_a_table_of_one_or_two_rows(fake_root, method, rows):
    """k is far above the rows: -1 is masked, and lists are as short as must be."""
    from declip_filter import FilterPairs, MeasureImages

    run_stage(MeasureImages(root=fake_root))
    run_stage(FilterPairs(root=fake_root, keep_splits=(), min_words=1))
    store = Store(fake_root)
    kept = 0
    for shard in layout.list_shards(store):
        path = layout.selection_path("default", shard)
        table = sidecars.read_table(store, path)
        keep = []
        for old in table.column("keep").to_pylist():
            keep.append(old and kept < rows)
            kept += keep[-1]
        number = table.column_names.index("keep")
        sidecars.write_table(store, path, table.set_column(number, "keep", [keep]))
    run_stage(EmbedPairs(root=fake_root, **HASHING))
    run_stage(BuildIndex(root=fake_root, index_type="Flat"))
    found = build(fake_root, method, exclude_same_caption=False)
    assert sorted(len(near) for near, _ in found.values()) == [rows - 1] * rows


def test_what_auto_comes_to():
    def chosen(num_rows, dim=512, **settings):
        return choose_method(BuildNeighbors(**settings), num_rows, dim)

    assert chosen(10_000) == "exact"
    assert chosen(1_000_000) == "graph"
    assert chosen(15_000_000) == "index"
    assert chosen(15_000_000, max_memory_gib=64) == "graph"
    assert chosen(15_000_000, device="cuda") == "exact"
    assert chosen(15_000_000, index="", embeddings="text", kind="both") == "graph"
    assert chosen(10, method="index") == "index"


def test_graph_and_table_are_the_same_bytes_again_in_any_order(pictured_root):
    settings: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb"}
    build(pictured_root, "graph", **settings)
    before = digests(pictured_root, "neighbors")
    store = Store(pictured_root)
    store.remove_folder("neighbors")
    stage = BuildNeighbors(root=pictured_root, name="graph", method="graph", k=5, **settings)
    run_stage(BuildGraph(**(vars(stage) | {"num_threads": 2})))
    assert not stage.is_done("00000")
    run_stage(stage, list(reversed(stage.tasks())))
    assert digests(pictured_root, "neighbors") == before


def test_a_missing_cut_or_foreign_graph_is_refused(pictured_root):
    store = Store(pictured_root)
    settings: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb"}
    settings |= {"root": pictured_root, "method": "graph", "k": 5}
    stage = BuildNeighbors(**settings)
    with pytest.raises(
        DeclipError, match=r"graph/graph.json' is missing; rerun the stage that bui"
    ):
        stage.worker()
    run_stage(BuildGraph(**settings))
    whole = store.read_bytes(graph_path("captions"))
    store.write_bytes(graph_path("captions"), whole[:-4])
    with pytest.raises(DeclipError, match=r"ids.npy' has changed since it was written"):
        stage.worker()
    store.write_bytes(graph_path("captions"), whole)
    other: dict[str, Any] = HASHING | {"encoder_factory": "hashing_encoder:make_salted"}
    run_stage(EmbedPairs(root=pictured_root, **other))
    with pytest.raises(DeclipError, match=r"ids.npy' is of other rows than the embeddings 'text'"):
        stage.worker()
    info = json.loads(store.read_bytes(graph_info_path("captions")))
    store.write_bytes(
        graph_info_path("captions"), json.dumps(info | {"format_version": 9}).encode()
    )
    with pytest.raises(DeclipError, match=r"graph.json' is of format 9.*upgrade"):
        stage.worker()


def test_a_graph_of_other_settings_is_refused(pictured_root):
    settings: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb"}
    settings |= {"root": pictured_root, "method": "graph"}
    run_stage(BuildGraph(k=5, **settings))
    with pytest.raises(DeclipError, match=r"has lists of 13 candidates, and k 9 .* needs 17; rer"):
        BuildNeighbors(k=9, **settings).worker()
    with pytest.raises(DeclipError, match=r"made with exclude_same_caption True, and it is False"):
        BuildNeighbors(k=5, exclude_same_caption=False, **settings).worker()
    BuildNeighbors(k=4, **settings).worker()


def test_vectors_that_are_not_numbers_are_refused_by_file_and_key(pictured_root):
    store = Store(pictured_root)
    path = layout.embedding_path("text", "text_emb", "1")
    vectors = np.load(store.local_path(path))
    vectors[3] = np.nan
    np.save(store.local_path(path), vectors)
    settings: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb"}
    for method in ("exact", "graph"):
        with pytest.raises(
            DeclipError, match=r"text_emb_1.npy': the vector of sample '\d+' is not"
        ):
            build(pictured_root, method, **settings)


def test_the_graphs_lists_are_longer_where_pictures_can_rule_out(tmp_path):
    plain = BuildGraph(k=8)
    assert graph_width(plain, 1000) == 16
    assert graph_width(plain, 4) == 3
    assert graph_width(plain, 1) == 0
    assert graph_width(BuildGraph(k=8, max_image_cosine=0.9), 1000) == 64
