"""Training: the same bytes, checked vectors, a GPU only where there is one."""

import faiss
import numpy as np
import pytest
from index_rows import unit_rows, write_embeddings

from declip_filter.embeddings import read_parts
from declip_filter.index_choice import Choice, check_index_key
from declip_filter.index_training import (
    blocks,
    build_whole,
    read_block,
    sample_size,
    take_rows,
    train_index,
)
from declip_filter.knn_graph import ArrayVectors
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError, layout

pytestmark = pytest.mark.usefixtures("several_threads")


def choice_of(key: str) -> Choice:
    return Choice(index_key=key, nlist=check_index_key(key), reason="")


@pytest.mark.parametrize("key", ["IVF4,Flat", "OPQ4_16,IVF4,PQ4x4fsr", "SQ8", "HNSW8", "PQ4x4"])
def test_same_rows_same_bytes(key):
    rows = ArrayVectors(unit_rows(1200, 16))
    once, again = (build_whole(choice_of(key), rows, seed=3) for _ in range(2))
    np.testing.assert_array_equal(faiss.serialize_index(once), faiss.serialize_index(again))
    assert once.ntotal == 1200


def test_a_sample_trains_and_an_exact_type_needs_none():
    assert sample_size(choice_of("IVF4,Flat"), 10**6) == 1024
    assert sample_size(choice_of("IVF4,Flat"), 100) == 100
    assert sample_size(choice_of("Flat"), 100) == 0
    assert sample_size(choice_of("HNSW32,Flat"), 100) == 0
    assert sample_size(choice_of("PQ8"), 10**6) == 65_536
    many, first = unit_rows(1500, 8), choice_of("IVF2,Flat")
    index = train_index(first, ArrayVectors(many), seed=0)
    other = train_index(first, ArrayVectors(many), seed=1)
    assert index.ntotal == 0
    centroids = [i.quantizer.reconstruct_n(0, 2) for i in (index, other)]
    assert not np.array_equal(*centroids)


def test_blocks_cover_the_rows_once():
    edges = blocks(0, 200_000)
    assert edges[0] == (0, 65_536)
    assert [stop for _, stop in edges[:-1]] == [start for start, _ in edges[1:]]
    assert edges[-1][1] == 200_000
    assert blocks(5, 6) == [(5, 6)]


def test_stored_rows_come_as_they_are(tmp_path):
    vectors = unit_rows(90, 8)
    parts = {"00000": vectors[:40], "00001": vectors[40:40], "00002": vectors[40:]}
    store = write_embeddings(str(tmp_path), parts)
    stored = StoredVectors(store, "text", "text_emb", read_parts(store, "text", sorted(parts)))
    np.testing.assert_array_equal(read_block(stored, 30, 60), vectors[30:60].astype(np.float32))
    rows = np.asarray([0, 39, 40, 89])
    np.testing.assert_array_equal(take_rows(stored, rows), vectors[rows].astype(np.float32))


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "not finite"), (0.0, "of length 0")])
def test_a_vector_of_nan_or_zeros_is_named_by_file_and_sample(tmp_path, bad, word):
    vectors = unit_rows(60, 8)
    vectors[45] = bad
    parts = {"00000": vectors[:40], "00001": vectors[40:]}
    store = write_embeddings(str(tmp_path), parts)
    stored = StoredVectors(store, "text", "text_emb", read_parts(store, "text", sorted(parts)))
    path = layout.embedding_path("text", "text_emb", "1")
    for read in (lambda: read_block(stored, 0, 60), lambda: take_rows(stored, np.arange(50))):
        with pytest.raises(DeclipError, match=rf"'{path}'.*'0000100005' is {word}"):
            read()
    with pytest.raises(DeclipError, match=rf"vector 45 is {word}"):
        read_block(ArrayVectors(vectors), 30, 60)


def test_a_gpu_that_is_not_there_is_told():
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("there is one")
    with pytest.raises(DeclipError, match=r"device is 'cuda', and FAISS .* install faiss-gpu"):
        train_index(choice_of("IVF4,Flat"), ArrayVectors(unit_rows(50, 8)), seed=0, device="cuda")
