import json
from typing import Any

import numpy as np
import pytest
from stage_runs import HASHING, digests, run_stage

from declip_filter import (
    BuildIndex,
    BuildNeighbors,
    EmbedPairs,
    FilterPairs,
    read_neighbors,
    selected_keys,
)
from declip_filter.captions import normalize_caption
from declip_filter.embeddings import part_path, read_metadata, read_parts, read_vectors
from declip_filter.index_files import index_path, info_path, load_index, rows_path
from declip_filter.optout import drop_from_sidecars
from declip_shards import DeclipError, layout, neighbor_tables, sidecars

pytestmark = pytest.mark.usefixtures("several_threads")


def tables(store, name="captions") -> dict[str, dict[str, Any]]:
    """key -> its row, over all shards."""
    return {
        row["key"]: row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.neighbors_path(name, shard))
    }


def embedded(store):
    """Vectors, keys and captions of all rows."""
    parts = read_parts(store, "text", layout.list_shards(store))
    read = [read_vectors(store, "text", "text_emb", part) for part in parts]
    captions = [row["caption"] for part in parts for row in read_metadata(store, "text", part)]
    return np.concatenate([r[0] for r in read]), [k for r in read for k in r[1]], captions


def brute_force(vectors, captions, k: int) -> list[list[float]]:
    """Scores of the k best distinct other captions of each row, by plain loops."""
    scores = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    answers = []
    for row, own in enumerate(captions):
        best: dict[str, float] = {}
        for other, text in enumerate(captions):
            normal = normalize_caption(text)
            if other != row and normal != normalize_caption(own):
                best[normal] = max(best.get(normal, -9.0), float(scores[row, other]))
        answers.append(sorted(best.values(), reverse=True)[:k])
    return answers


def test_every_selected_pair_has_a_row_and_every_neighbor_is_selected(indexed_root, store):
    selected = []
    for shard in layout.list_shards(store):
        keys = selected_keys(store, "default", shard)
        assert read_neighbors(store, "captions", shard, keys).num_rows == len(keys)
        selected += keys
    table = tables(store)
    assert sorted(table) == selected
    assert {key for row in table.values() for key in row["neighbor_keys"]} <= set(selected)


def test_no_self_no_same_caption_no_caption_twice(indexed_root, store):
    _, keys, captions = embedded(store)
    text = {key: normalize_caption(caption) for key, caption in zip(keys, captions, strict=True)}
    assert len(set(text.values())) < len(text)
    for key, row in tables(store).items():
        texts = [text[neighbor] for neighbor in row["neighbor_keys"]]
        assert text[key] not in texts
        assert len(set(texts)) == len(texts)
        assert 0 < len(texts) <= 4
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["scores"]) == len(texts)


@pytest.mark.parametrize("first_width", [5, 8, 64])
def test_an_exact_index_gives_what_brute_force_gives(embedded_root, store, first_width):
    run_stage(BuildIndex(root=embedded_root, index_type="Flat"))
    stage = BuildNeighbors(root=embedded_root, method="index", k=4, num_candidates=first_width)
    run_stage(stage)
    vectors, keys, captions = embedded(store)
    table = tables(store)
    row_of = {key: row for row, key in enumerate(keys)}
    for row, expected in enumerate(brute_force(vectors, captions, 4)):
        got = table[keys[row]]
        assert got["scores"] == pytest.approx(expected, abs=1e-5)
        for neighbor, score in zip(got["neighbor_keys"], got["scores"], strict=True):
            own, other = (vectors[r].astype(np.float64) for r in (row, row_of[neighbor]))
            assert own @ other == pytest.approx(score, abs=1e-5)


def test_lists_that_run_out_are_widened_until_k_are_found(embedded_root, store):
    """One probed list holds few captions; the search must go on to other lists."""
    run_stage(BuildIndex(root=embedded_root, nlist=16, nprobe=1, recall_target=0))
    stage = BuildNeighbors(root=embedded_root, method="index", k=30, num_candidates=31)
    stats = run_stage(stage)
    assert all(len(row["neighbor_keys"]) == 30 for row in tables(store).values())
    assert sum(s.extra["num_short"] for s in stats.values()) == 0


def test_more_neighbors_than_captions_gives_all_of_them(embedded_root, store):
    run_stage(BuildIndex(root=embedded_root, index_type="Flat"))
    stage = BuildNeighbors(root=embedded_root, method="index", k=500, num_candidates=501)
    stats = run_stage(stage)
    _, _, captions = embedded(store)
    distinct = len({normalize_caption(text) for text in captions})
    assert {len(row["neighbor_keys"]) for row in tables(store).values()} == {distinct - 1}
    assert stats["00000"].extra["num_short"] == stats["00000"].num_in
    assert stats["00000"].extra["removed_self"] == stats["00000"].num_in


def test_same_captions_are_kept_when_asked_but_never_the_pair_itself(embedded_root, store):
    run_stage(BuildIndex(root=embedded_root, index_type="Flat"))
    run_stage(BuildNeighbors(root=embedded_root, exclude_same_caption=False))
    _, keys, captions = embedded(store)
    text = dict(zip(keys, captions, strict=True))
    table = tables(store)
    assert all(key not in row["neighbor_keys"] for key, row in table.items())
    assert any(text[key] == text[n] for key, row in table.items() for n in row["neighbor_keys"])


def test_far_neighbors_are_left_out_and_rows_stay(embedded_root, store):
    run_stage(BuildIndex(root=embedded_root, index_type="Flat"))
    stats = run_stage(BuildNeighbors(root=embedded_root, min_score=0.9))
    table = tables(store)
    assert all(score >= np.float32(0.9) for row in table.values() for score in row["scores"])
    share = np.mean([bool(row["scores"]) for row in table.values() if row["key"] < "00001"])
    assert 0 < share < 1
    assert stats["00000"].extra["fraction_with_neighbor"] == pytest.approx(share, abs=1e-6)
    run_stage(BuildNeighbors(root=embedded_root, min_score=1.0))
    assert all(row["neighbor_keys"] == [] for row in tables(store).values())
    assert sorted(tables(store)) == sorted(table)


def test_few_candidates_keep_fewer_neighbors_and_say_so(embedded_root, store):
    run_stage(BuildIndex(root=embedded_root, index_type="Flat"))
    stage = BuildNeighbors(
        root=embedded_root, method="index", k=20, num_candidates=21, max_candidates=21
    )
    stats = run_stage(stage)
    assert max(len(row["neighbor_keys"]) for row in tables(store).values()) <= 20
    assert sum(s.extra["num_short"] for s in stats.values()) > 0


def test_rerun_and_other_order_give_the_same_bytes(indexed_root, store):
    stage = BuildNeighbors(root=indexed_root, k=4, num_candidates=8)
    before = digests(indexed_root, "neighbors")
    for path in before:
        store.remove(path)
    assert not any(stage.is_done(task) for task in stage.tasks())
    run_stage(stage, list(reversed(stage.tasks())))
    assert digests(indexed_root, "neighbors") == before


def test_table_names_its_index(indexed_root, store):
    digest = store.sha256(index_path("captions"))
    assert {row["index_sha256"] for row in tables(store).values()} == {digest}


@pytest.mark.parametrize("path", [index_path("captions"), rows_path("captions")])
def test_cut_and_changed_index_files_are_refused(indexed_root, store, path):
    whole = store.read_bytes(path)
    store.write_bytes(path, whole[:-9])
    with pytest.raises(DeclipError, match=r"(cut short|has changed).*rerun the stage that indexes"):
        load_index(store, "captions")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    store.write_bytes(path, flipped)
    with pytest.raises(DeclipError, match=r"has changed since it was written"):
        load_index(store, "captions")
    store.remove(path)
    with pytest.raises(DeclipError, match=r"is missing; rerun the stage that indexes"):
        load_index(store, "captions")


def test_torn_and_newer_info_are_refused(indexed_root, store):
    path = info_path("captions")
    value = json.loads(store.read_bytes(path))
    store.write_bytes(path, json.dumps(value | {"format_version": 9}).encode())
    with pytest.raises(DeclipError, match=r"of format 9.*upgrade opendeclip"):
        load_index(store, "captions")
    store.write_bytes(path, b"{")
    with pytest.raises(DeclipError, match=r"info.json' is damaged"):
        load_index(store, "captions")


def test_embeddings_by_other_weights_than_the_index_are_refused(indexed_root):
    salted: dict[str, Any] = {
        "encoder": "hashing:64",
        "encoder_factory": "hashing_encoder:make_salted",
    }
    run_stage(EmbedPairs(root=indexed_root, **salted))
    with pytest.raises(DeclipError, match=r"index 'captions' is of encoder 'hashing:64'"):
        run_stage(BuildNeighbors(root=indexed_root))


def test_embeddings_of_another_selection_than_the_index_are_refused(indexed_root):
    run_stage(FilterPairs(root=indexed_root, keep_splits=("test",)))
    run_stage(EmbedPairs(root=indexed_root, **HASHING))
    with pytest.raises(DeclipError, match=r"names 72 rows, the embeddings 'text' hold 36"):
        run_stage(BuildNeighbors(root=indexed_root))


def test_table_of_other_samples_is_refused(indexed_root, store):
    keys = selected_keys(store, "default", "00000")
    with pytest.raises(DeclipError, match=r"shard 00000 are of other samples than are selected"):
        read_neighbors(store, "captions", "00000", keys[1:])
    with pytest.raises(DeclipError, match=r"neighbors/captions/00009.parquet' is missing"):
        read_neighbors(store, "captions", "00009", keys)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k": 0}, r"k is 0; it must be at least 1"),
        ({"k": 8, "num_candidates": 8}, r"at least 9 are needed: raise num_candidates"),
        ({"max_candidates": 10}, r"max_candidates is 10, fewer than the 64"),
        ({"min_score": 1.5}, r"min_score is 1.5; it must be from -1 to 1"),
        ({"useful_score": -3}, r"useful_score is -3; it must be from -1 to 1"),
        ({"method": "exat"}, r"method is 'exat'. Did you mean 'exact'"),
        ({"kind": "text"}, r"kind is 'text'. Did you mean 'text_emb'"),
        ({"name": "captions@"}, r"name is ''; it must be one folder name"),
        ({"index": ""}, r"index and embeddings are both empty"),
        ({"index": "", "embeddings": "text"}, r"kind is empty, and there is no index"),
        (
            {"index": "", "embeddings": "text", "method": "index"},
            r"method is 'index', but index is empty",
        ),
        ({"max_image_hash_distance": 65}, r"max_image_hash_distance is 65; it must be from 0 to"),
        ({"max_image_cosine": 2.0}, r"max_image_cosine is 2; it must be from -1 to 1"),
        ({"device": "tpu"}, r"device is 'tpu'"),
        ({"max_memory_gib": 0}, r"max_memory_gib is 0; it must be at least 0.01"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        BuildNeighbors(**settings)


def test_a_sample_without_a_vector_has_no_neighbors_and_is_no_fault(indexed_root, store):
    """An encoder may give up on a sample; the table then has no row of it."""
    keys = selected_keys(store, "default", "00000")
    path = layout.neighbors_path("captions", "00000")
    table = sidecars.read_table(store, path)
    sidecars.write_table(store, path, table.slice(2))
    filled = read_neighbors(store, "captions", "00000", keys)
    assert filled.column("key").to_pylist() == keys
    assert filled.column("neighbor_keys").to_pylist()[:2] == [[], []]
    assert filled.slice(2).to_pylist() == table.slice(2).select(filled.column_names).to_pylist()


def test_the_description_names_vectors_method_and_settings(indexed_root, store):
    description = neighbor_tables.read_description(store, "captions")
    assert description is not None
    info = json.loads(store.read_bytes(info_path("captions")))
    assert description["settings"]["k"] == description["k"] == 4
    for name, entry in (("encoder", "encoder"), ("kind", "kind"), ("index_sha256", "index_sha256")):
        assert description[name] == info[entry]
    assert (description["method"], description["num_rows"]) == ("exact", 72)
    digest = store.sha256(neighbor_tables.description_path("captions"))
    assert {row[neighbor_tables.IDENTITY] for row in tables(store).values()} == {digest}
    work = BuildNeighbors(root=indexed_root, k=4, num_candidates=8).worker()
    assert neighbor_tables.description_path("captions") in work("00000").files
    assert neighbor_tables.description_path("captions") not in work("00001").files


def test_useful_neighbors_are_counted_and_nothing_is_dropped(embedded_root, store):
    run_stage(BuildIndex(root=embedded_root, index_type="Flat"))
    shares = []
    for useful in (-1.0, 0.9, 1.0):
        stats = run_stage(BuildNeighbors(root=embedded_root, useful_score=useful))
        shares.append(stats["00000"].extra["fraction_useful"])
        best = [row["scores"][0] for row in tables(store).values() if row["key"] < "00001"]
        assert shares[-1] == pytest.approx(np.mean([s >= useful for s in best]), abs=1e-6)
    assert shares[0] == 1
    assert shares[0] >= shares[1] >= shares[2]


def test_an_index_of_another_side_is_not_searched(embedded_root):
    run_stage(EmbedPairs(root=embedded_root, images=True, **HASHING))
    run_stage(BuildIndex(root=embedded_root, index_type="Flat"))
    with pytest.raises(DeclipError, match=r"is of text_emb, and kind is 'img_emb'; choose method"):
        run_stage(BuildNeighbors(root=embedded_root, method="index", kind="img_emb"))
    with pytest.raises(DeclipError, match=r"is of embeddings 'text', and embeddings is 'others'"):
        run_stage(BuildNeighbors(root=embedded_root, embeddings="others"))
    run_stage(BuildNeighbors(root=embedded_root, method="exact", kind="img_emb"))


def test_embeddings_without_a_row_are_refused(embedded_root, store):
    for shard in layout.list_shards(store):
        part = json.loads(store.read_bytes(part_path("text", shard)))
        store.write_bytes(part_path("text", shard), json.dumps(part | {"num_rows": 0}).encode())
    with pytest.raises(DeclipError, match=r"hold 0 samples .selection 'default'.*loosen the filt"):
        run_stage(BuildNeighbors(root=embedded_root, index="", embeddings="text", kind="text_emb"))


def test_a_table_without_an_index_stays_one_table_after_an_opt_out(embedded_root, store):
    """A shard that is made again afterwards belongs to the table of the others."""
    settings: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb", "k": 3}
    stage = BuildNeighbors(root=embedded_root, method="exact", **settings)
    run_stage(stage)
    shards = layout.list_shards(store)
    before = store.read_bytes(neighbor_tables.description_path("captions"))
    gone = set(list(tables(store))[::9])
    for shard in shards:
        for path, data in drop_from_sidecars(store, shard, gone).items():
            assert data is not None
            store.write_bytes(path, data)
    store.remove(layout.neighbors_path("captions", shards[0]))
    run_stage(stage, [shards[0]])
    assert store.read_bytes(neighbor_tables.description_path("captions")) == before
    version = neighbor_tables.read_version(store, "captions")
    assert sum(len(neighbor_tables.read_lists(store, version, s)) for s in shards) == 72 - len(gone)
    run_stage(BuildNeighbors(root=embedded_root, method="exact", **settings | {"k": 2}))
    description = neighbor_tables.read_description(store, "captions")
    assert description is not None
    assert (description["k"], description["num_rows"]) == (2, 72 - len(gone))
