"""Which index is chosen, and what FAISS makes of the choice."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_rows import unit_rows

from declip_filter.index_choice import (
    Choice,
    check_index_key,
    choose_index,
    choose_nlist,
    code_bytes,
    codecs,
    index_bytes,
    key_of,
    next_larger,
)
from declip_filter.index_training import build_whole
from declip_filter.knn_graph import ArrayVectors
from declip_shards import DeclipError

GIB = 2**30


def test_lists_for_a_number_of_rows():
    assert choose_nlist(9_000) == 9_000 // 39
    assert choose_nlist(1_000_000) == 4000
    assert choose_nlist(5) == 1


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(2000, 10**9),
    dim=st.sampled_from([96, 384, 512, 1024]),
    limit=st.floats(0.01, 2000),
)
def test_auto_fits_the_limit_and_nothing_larger_would(num_rows, dim, limit):
    smallest = key_of(codecs(dim)[0], choose_nlist(num_rows))
    if index_bytes(smallest, choose_nlist(num_rows), num_rows, dim) > limit * GIB:
        with pytest.raises(DeclipError, match="raise max_memory_gib, or index fewer rows"):
            choose_index(num_rows, dim, index_type="auto", limit_bytes=limit * GIB)
        return
    choice = choose_index(num_rows, dim, index_type="auto", limit_bytes=limit * GIB)
    assert index_bytes(choice.index_key, choice.nlist, num_rows, dim) <= limit * GIB
    keys = [key_of(codec, choice.nlist) for codec in codecs(dim)]
    for larger in keys[keys.index(choice.index_key) + 1 :]:
        assert index_bytes(larger, choice.nlist, num_rows, dim) > limit * GIB


def test_few_rows_are_compared_one_by_one():
    assert choose_index(1999, 64, index_type="auto").index_key == "Flat"
    assert choose_index(2000, 64, index_type="auto").index_key == "IVF51,Flat"
    assert choose_index(100, 64, index_type="auto", nlist=4).index_key == "IVF4,Flat"
    assert choose_index(10**9, 64, index_type="Flat").index_key == "Flat"


@pytest.mark.parametrize("dim", [30, 64])
def test_codes_grow_and_take_the_bytes_that_are_said(dim):
    rows = ArrayVectors(unit_rows(1500, dim))
    empty = ArrayVectors(unit_rows(1500, dim))
    sizes = []
    for codec in codecs(dim):
        key = key_of(codec, 4)
        choice = Choice(index_key=key, nlist=4, reason="")
        index = build_whole(choice, rows, seed=0)
        header = len(faiss.serialize_index(build_whole(choice, empty, seed=0)))
        sizes.append(code_bytes(key, dim))
        grown = len(faiss.serialize_index(index))
        assert grown >= 1500 * sizes[-1]
        assert grown <= 1.25 * 1500 * sizes[-1] + 70_000
        assert header == grown
    assert sizes == sorted(sizes)


def test_the_next_code_is_larger_until_nothing_more_is_to_be_found():
    choice = choose_index(10_000, 64, index_type="IVFPQ")
    found = [choice.index_key]
    while (larger := next_larger(choice, 10_000, 64, limit_bytes=np.inf)) is not None:
        assert larger.nlist == choice.nlist
        choice = larger
        found.append(choice.index_key)
    lists = choose_nlist(10_000)
    ends = ("PQ32x4fsr", "PQ64x4fsr", "SQ8", "SQfp16")
    assert found == [f"IVF{lists},{end}" for end in ends]
    tight = index_bytes(found[1], lists, 10_000, 64)
    first = choose_index(10_000, 64, index_type="IVFPQ")
    second = next_larger(first, 10_000, 64, limit_bytes=tight)
    assert second is not None
    assert next_larger(second, 10_000, 64, limit_bytes=tight) is None
    own = choose_index(10_000, 64, index_type="auto", index_key="IVF8,PQ8")
    assert next_larger(own, 10_000, 64, limit_bytes=np.inf) is None


def test_very_many_lists_are_found_by_a_graph():
    assert key_of("SQ8", 100_000) == "IVF100000_HNSW32,SQ8"
    assert check_index_key("IVF100000_HNSW32,SQ8") == 100_000
    assert check_index_key("OPQ64_256,IVF1024,PQ64x4fs") == 1024
    assert check_index_key("HNSW32") == 0


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("IVF8,Flut", r"index_key is 'IVF8,Flut', which is not taken; it must be a code"),
        ("PQ7", r"FAISS does not make for inner products of dimension 64"),
        ("IDMap,Flat", r"'IDMap,Flat', which is not taken"),
        ("IVF8,PQ8x4fs,RFlat", r"which is not taken"),
        ("PQ8x4fs", r"which is not taken"),
        ("IVF8,PQ8x4fs_64", r"without a block size"),
        (
            "NSG32,Flat",
            r"'NSG32,Flat', which is not taken.*or a graph \(HNSW32\); give one of these",
        ),
        ("PCA32,HNSW32", r"which is not taken"),
        ("HNSW", r"which is not taken"),
        ("SQ8_direct", r"which is not taken"),
        ("LSH", r"which is not taken"),
        ("IVF9000,Flat", r"nlist is 9000, and there are 2000 vectors"),
    ],
)
def test_keys_that_cannot_be_are_refused(key, sentence):
    with pytest.raises(DeclipError, match=sentence):
        choose_index(2000, 64, index_type="auto", index_key=key)


@pytest.mark.parametrize(
    "transform", ["", "OPQ8_32,", "PCAR32,", "L2norm,PCA32,", "RR32,", "Pad128,"]
)
@pytest.mark.parametrize("rest", ["Flat", "SQ4", "PQ8x4np", "IVF4_HNSW8,SQfp16", "IVF4,PQ8x4fsr"])
def test_every_key_that_is_taken_can_be_sized(transform, rest):
    choice = choose_index(2000, 64, index_type="auto", index_key=transform + rest)
    assert code_bytes(choice.index_key, 64) > 0
    assert choice.is_in_parts == ("IVF" in rest)
    assert code_bytes("HNSW8,SQ8", 64) > 64
