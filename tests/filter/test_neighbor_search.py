"""Neighbors out of candidates: what is left out, and in which order the rest stands."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_filter.embedding_files import METADATA_SCHEMA
from declip_filter.embeddings import Part
from declip_filter.neighbor_search import ExactSource, Rules, TableRows, find_neighbors, score_pairs
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError, Store, layout, sidecars


def make_rows(root, vectors, captions, hashes=None) -> TableRows:
    """Rows of one shard whose vectors are (rows, dim) float16 of unit length."""
    store = Store(str(root))
    sink = io.BytesIO()
    np.save(sink, vectors.astype(np.float16))
    store.write_bytes(layout.embedding_path("text", "text_emb", "0"), sink.getvalue())
    part = Part(
        shard="00000",
        partition="0",
        num_rows=len(vectors),
        dim=vectors.shape[1],
        kinds=("text_emb",),
        encoder="test:1",
        encoder_digest="0",
        selection="",
    )
    return TableRows(
        vectors=StoredVectors(store, "text", "text_emb", [part]),
        keys=np.asarray([f"k{row}" for row in range(len(vectors))], dtype=np.dtypes.StringDType()),
        captions=np.asarray(captions, dtype=np.int64),
        image_hashes=None if hashes is None else np.asarray(hashes, dtype=np.uint64),
    )


@dataclass
class Everyone:
    """Names all rows, the nearest by luck; nothing more can be asked for."""

    num_rows: int
    rows_at_once: int
    seed: int
    first_width: int = 2
    depth: int = 0

    @property
    def widest(self) -> int:
        return self.num_rows + 2

    def deeper(self, depth):
        return depth

    def search(self, rows, width, depth):
        rng = np.random.default_rng(self.seed)
        order = np.concatenate([rng.permutation(self.num_rows), [-1, -1]])
        return np.tile(order, (len(rows), 1))


def plain(table: TableRows, rules: Rules, own: int) -> list[int]:
    """The same by plain loops."""
    vectors = table.vectors.read(0, table.num_rows).astype(np.float32)
    scores = {row: np.float32((vectors[row] * vectors[own]).sum()) for row in range(len(vectors))}
    chosen: list[int] = []
    texts = {int(table.captions[own])}
    for row in sorted(scores, key=lambda row: (-scores[row], row)):
        text = int(table.captions[row])
        if row == own or (rules.exclude_same_caption and text in texts):
            continue
        texts.add(text)
        if scores[row] < rules.min_score or len(chosen) == rules.k:
            continue
        if rules.max_image_hash_distance is not None and table.image_hashes is not None:
            bits = int(table.image_hashes[row]) ^ int(table.image_hashes[own])
            if bits.bit_count() <= rules.max_image_hash_distance:
                continue
        chosen.append(row)
    return chosen


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(2, 24),
    num_captions=st.integers(1, 12),
    k=st.integers(1, 6),
    exclude=st.booleans(),
    min_score=st.sampled_from([-1.0, 0.0, 0.6]),
    distance=st.sampled_from([None, 0, 2]),
    batch=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_whatever_the_order_of_candidates_the_list_is_that_of_plain_loops(
    tmp_path_factory, num_rows, num_captions, k, exclude, min_score, distance, batch, seed
):
    rng = np.random.default_rng(seed)
    # Few directions, so that many scores are equal.
    directions = rng.normal(size=(4, 8))
    vectors = directions[rng.integers(0, 4, num_rows)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = make_rows(
        tmp_path_factory.mktemp("rows"),
        vectors,
        rng.integers(0, num_captions, num_rows),
        rng.integers(0, 8, num_rows),
    )
    rules = Rules(
        k=k, min_score=min_score, exclude_same_caption=exclude, max_image_hash_distance=distance
    )
    queries = np.arange(num_rows, dtype=np.int64)
    expected = [plain(table, rules, row) for row in range(num_rows)]
    for source in (Everyone(num_rows, batch, seed), ExactSource(table=table, rules=rules)):
        found = find_neighbors(source, table, rules, queries)
        assert [rows.tolist() for rows in found.rows] == expected
        assert all(len(s) == len(r) for s, r in zip(found.scores, found.rows, strict=True))


def test_a_score_does_not_depend_on_who_else_is_asked_about(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 384))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = make_rows(tmp_path, vectors, np.arange(50))
    queries = np.arange(50, dtype=np.int64)
    everyone = np.tile(queries, (50, 1))
    together = score_pairs(table, queries, everyone)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, together.T)
    for row in (0, 17, 49):
        alone = score_pairs(table, queries[[row]], everyone[:1, [3, row]])
        np.testing.assert_array_equal(alone[0], together[row, [3, row]])
    missing = score_pairs(table, queries[:1], np.asarray([[-1, 2]]))
    assert missing[0, 0] == -np.inf
    assert missing[0, 1] == together[0, 2]


def test_a_vector_that_is_no_number_is_named(tmp_path):
    vectors = np.eye(4)
    vectors[2, 1] = np.nan
    table = make_rows(tmp_path, vectors, np.arange(4))
    columns = {name: table.keys.tolist() for name in METADATA_SCHEMA.names}
    path = layout.embedding_path("text", "metadata", "0")
    sidecars.write_table(Store(str(tmp_path)), path, pa.table(columns))
    pairs = np.asarray([[1, 2]])
    with pytest.raises(DeclipError, match=r"\.npy': the vector of sample 'k2' is not finite"):
        score_pairs(table, np.asarray([0]), pairs)
    with pytest.raises(DeclipError, match=r"\.npy': the vector of sample 'k2' is not finite"):
        score_pairs(table, np.asarray([2]), pairs[:, :1])
