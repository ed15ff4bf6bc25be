import importlib
import io
import json

import numpy as np
import pytest
from stage_runs import HASHING, run_stage

from declip_filter import EmbedPairs, FilterPairs
from declip_filter.embedding_files import (
    part_path,
    partition_name,
    read_part,
    read_parts,
    read_vectors,
)
from declip_shards import DeclipError, layout


def read_all(root: str, store, kind="text_emb", name="text"):
    shards = layout.list_shards(store)
    read = [read_vectors(store, name, kind, part) for part in read_parts(store, name, shards)]
    return np.concatenate([vectors for vectors, _ in read]), [k for _, keys in read for k in keys]


def test_partition_numbers_are_clip_retrievals():
    ten = [f"{n:05d}" for n in range(10)]
    assert [partition_name(s, ten) for s in ("00000", "00009")] == ["00", "09"]
    assert partition_name("00003", ten[:9]) == "3"
    assert partition_name("00000", ["00000"]) == "0"
    assert partition_name("00007", ["00007", "00123"]) == "007"


def test_mixed_encoders_stray_shards_and_missing_parts_are_refused(embedded_root, store):
    shards = layout.list_shards(store)
    other = EmbedPairs(
        root=embedded_root, encoder="hashing:64", encoder_factory="hashing_encoder:make_salted"
    )
    run_stage(other, ["00001"])
    with pytest.raises(DeclipError, match=r"mix encoders: shard 00000 .*shard 00001"):
        read_parts(store, "text", shards)
    run_stage(EmbedPairs(root=embedded_root, **HASHING), ["00001"])
    with pytest.raises(DeclipError, match=r"of another dataset: they have shard 00002"):
        read_parts(store, "text", shards[:2])
    with pytest.raises(DeclipError, match=r"lack shard 00003.*rerun the stage that embeds"):
        read_parts(store, "text", [*shards, "00003"])


def test_another_selection_than_asked_for_or_two_are_refused(embedded_root, store):
    shards = layout.list_shards(store)
    assert read_parts(store, "text", shards, selection="default")
    with pytest.raises(
        DeclipError, match=r"parts/00000.json' is of selection 'default', where 'strict' is due"
    ):
        read_parts(store, "text", shards, selection="strict")
    run_stage(EmbedPairs(root=embedded_root, selection="", **HASHING), ["00001"])
    with pytest.raises(
        DeclipError, match=r"parts/00001.json' is of selection '', where 'default' .*rerun the st"
    ):
        read_parts(store, "text", shards)


def test_parts_of_the_first_format_stay_readable(embedded_root, store):
    shards = layout.list_shards(store)
    now = read_parts(store, "text", shards)
    for shard in shards:
        value = json.loads(store.read_bytes(part_path("text", shard)))
        del value["num_not_finite"]
        value["format_version"] = 1
        store.write_bytes(part_path("text", shard), json.dumps(value).encode())
    assert read_parts(store, "text", shards) == now


def test_stored_vectors_with_nan_are_refused_by_file_and_key(embedded_root, store):
    part = read_part(store, "text", "00001")
    vectors, keys = read_vectors(store, "text", "text_emb", part)
    vectors[4, 7] = np.nan
    sink = io.BytesIO()
    np.save(sink, vectors)
    store.write_bytes(layout.embedding_path("text", "text_emb", part.partition), sink.getvalue())
    with pytest.raises(
        DeclipError,
        match=rf"text_emb_1.npy': the vector of sample '{keys[4]}' is not finite, .*; delete it",
    ):
        read_vectors(store, "text", "text_emb", part)


def test_damaged_files_are_refused(embedded_root, store):
    part = read_part(store, "text", "00000")
    path = layout.embedding_path("text", "text_emb", part.partition)
    whole = store.read_bytes(path)
    store.write_bytes(path, whole[:-50])
    with pytest.raises(DeclipError, match=r"text_emb_0.npy' is damaged"):
        read_vectors(store, "text", "text_emb", part)
    array = np.load(io.BytesIO(whole))
    for broken, sentence in ((array[:, :32], r"where \(\d+, 64\) is due"), (array * 2, "length 2")):
        sink = io.BytesIO()
        np.save(sink, broken)
        store.write_bytes(path, sink.getvalue())
        with pytest.raises(DeclipError, match=sentence):
            read_vectors(store, "text", "text_emb", part)
    store.remove(path)
    with pytest.raises(DeclipError, match=r"text_emb_0.npy' is missing"):
        read_vectors(store, "text", "text_emb", part)
    with pytest.raises(DeclipError, match=r"hold text_emb, not 'img_emb'"):
        read_vectors(store, "text", "img_emb", part)


def test_torn_and_newer_parts_are_refused(embedded_root, store):
    path = part_path("text", "00000")
    value = json.loads(store.read_bytes(path))
    store.write_bytes(path, json.dumps(value | {"format_version": 99}).encode())
    with pytest.raises(DeclipError, match=r"of format 99.*upgrade opendeclip"):
        read_part(store, "text", "00000")
    store.write_bytes(path, b'{"shard": ')
    with pytest.raises(DeclipError, match=r"is damaged .*rerun the stage that embeds"):
        read_part(store, "text", "00000")


def test_embedding_reader_of_clip_retrieval_joins_our_rows(selected_root, store):
    """A shard without a selected pair lies first: it must not shift the rows of the others."""
    reader = importlib.import_module("embedding_reader")
    run_stage(
        FilterPairs(root=selected_root, name="later", split_column="split", keep_splits=("test",))
    )
    stage = EmbedPairs(root=selected_root, selection="later", images=True, **HASHING)
    run_stage(stage)
    vectors, keys = read_all(selected_root, store)
    assert keys
    assert keys[0].startswith("00002")
    for kind in ("text_emb", "img_emb"):
        expected, _ = read_all(selected_root, store, kind)
        read = reader.EmbeddingReader(
            embeddings_folder=f"{selected_root}/embeddings/text/{kind}",
            metadata_folder=f"{selected_root}/embeddings/text/metadata",
            file_format="parquet_npy",
            meta_columns=["image_path", "caption"],
        )
        assert (read.count, read.dimension) == vectors.shape
        batches = list(read(batch_size=7, show_progress=False))
        np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), expected)
        assert [key for b in batches for key in b[1]["image_path"]] == keys
