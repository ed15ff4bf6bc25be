"""One tall matrix over the files of many shards."""

import resource

import numpy as np
import pytest

from declip_filter.embeddings import Part
from declip_filter.vectors import MOST_OPEN, StoredVectors, side_kinds
from declip_shards import DeclipError, Store, layout

DIM = 4


def write(root, counts, kinds=("text_emb", "img_emb")):
    """Parts with so many rows each; returns them and the whole matrix of each kind."""
    rng = np.random.default_rng(0)
    store, parts = Store(str(root)), []
    whole = {kind: [np.empty((0, DIM), np.float16)] for kind in kinds}
    for number, count in enumerate(counts):
        name = f"{number:05d}"
        parts.append(
            Part(
                shard=name,
                partition=name,
                num_rows=count,
                dim=DIM,
                kinds=kinds,
                encoder="x:y",
                encoder_digest="0",
                selection="",
            )
        )
        for kind in kinds:
            rows = rng.normal(size=(count, DIM))
            rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
            whole[kind].append(rows)
            if count:
                path = store.local_path(layout.embedding_path("e", kind, name))
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, rows)
    return store, parts, {kind: np.concatenate(rows) for kind, rows in whole.items()}


def test_rows_are_numbered_through_the_parts_empty_ones_too(tmp_path):
    store, parts, whole = write(tmp_path, [3, 0, 5, 1])
    vectors = StoredVectors(store, "e", "img_emb", parts)
    assert (vectors.num_rows, vectors.dim) == (9, DIM)
    assert (vectors.read(0, 9) == whole["img_emb"]).all()
    rng = np.random.default_rng(1)
    for size in (0, 1, 7, 40):
        rows = rng.integers(0, 9, size)
        assert (vectors.take(rows) == whole["img_emb"][rows]).all()


def test_both_sides_are_the_mean_of_the_cosines(tmp_path):
    store, parts, whole = write(tmp_path, [4, 2])
    both = StoredVectors(store, "e", "both", parts).read(0, 6).astype(np.float64)
    text, image = (whole[kind].astype(np.float64) for kind in ("text_emb", "img_emb"))
    assert np.allclose(both @ both.T, (text @ text.T + image @ image.T) / 2, atol=3e-3)


def test_more_shards_than_a_process_may_open_files(tmp_path):
    store, parts, whole = write(tmp_path, [1] * (MOST_OPEN + 60), kinds=("text_emb",))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, MOST_OPEN + 50), hard))
    try:
        vectors = StoredVectors(store, "e", "text_emb", parts)
        for _ in range(2):
            assert (vectors.read(0, len(parts)) == whole["text_emb"]).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_wrong_side_and_a_wrong_file_are_refused(tmp_path):
    store, parts, _ = write(tmp_path, [2], kinds=("text_emb",))
    with pytest.raises(DeclipError, match="Did you mean 'both'"):
        side_kinds("bth")
    with pytest.raises(DeclipError, match="hold text_emb, not 'img_emb'"):
        StoredVectors(store, "e", "img_emb", parts).read(0, 1)
    path = store.local_path(layout.embedding_path("e", "text_emb", "00000"))
    np.save(path, np.zeros((3, DIM), np.float16))
    with pytest.raises(DeclipError, match=r"holds float16 of shape \(3, 4\) where"):
        StoredVectors(store, "e", "text_emb", parts).read(0, 1)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DeclipError, match=r"text_emb_00000.npy' is damaged"):
        StoredVectors(store, "e", "text_emb", parts).read(0, 1)
    path.unlink()
    with pytest.raises(DeclipError, match="is missing; rerun the stage that embeds"):
        StoredVectors(store, "e", "text_emb", parts).read(0, 1)
