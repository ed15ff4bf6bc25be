"""Lists that are read, merged and written as a stream are FAISS's own."""

import io
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_rows import unit_rows

from declip_filter import index_training
from declip_filter.index_choice import Choice, check_index_key
from declip_filter.index_files import read_mapped
from declip_filter.index_lists import (
    emptied,
    entries_of,
    has_lists,
    list_sizes,
    merged,
    refilled,
    renumbered,
    set_effort,
    stored_effort,
    to_fast_scan,
    write_flat,
    write_lists,
)
from declip_filter.index_training import add_rows, build_whole, train_index
from declip_filter.knn_graph import ArrayVectors
from declip_shards import DeclipError

KEYS = (
    "IVF8,Flat",
    "IVF400,Flat",
    "IVF8,SQ8",
    "OPQ8_32,IVF8,PQ8x4fs",
    "PCA16,IVF16_HNSW8,SQfp16",
)


def choice_of(key: str) -> Choice:
    return Choice(index_key=key, nlist=check_index_key(key), reason="")


def packed(index) -> bytes:
    return bytes(faiss.serialize_index(index).tobytes())


def unpacked(data: bytes):
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


@pytest.fixture(scope="module")
def rows() -> ArrayVectors:
    return ArrayVectors(unit_rows(900, 32, num_centers=20))


@pytest.mark.parametrize("key", KEYS)
def test_merged_parts_are_the_bytes_of_the_whole(key, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(index_training, "ROWS_AT_ONCE", 128)
    choice = choice_of(key)
    trained = packed(train_index(choice, rows, seed=0))
    parts = []
    # In any order of the parts: the entries of a list are put in the order of their rows.
    for start, stop in ((384, 768), (0, 384), (768, 900)):
        part = unpacked(trained)
        add_rows(part, rows, start, stop, what="fill")
        path = Path(tmp_path, f"{start}")
        faiss.write_index(part, str(path))
        parts.append(read_mapped(path))
    sink = io.BytesIO()
    sizes = np.sum([list_sizes(part) for part in parts], axis=0)
    entries = merged([entries_of(part) for part in parts])
    write_lists(sink, unpacked(trained), sizes, entries)
    data = sink.getvalue()
    if choice.is_fast_scan:
        data = packed(to_fast_scan(unpacked(data)))
    assert data == packed(build_whole(choice, rows, seed=0))


@pytest.mark.parametrize("key", KEYS)
def test_what_is_read_and_put_back_is_the_same(key, rows):
    data = packed(build_whole(choice_of(key), rows, seed=0))
    again = unpacked(data)
    again = refilled(again, entries_of(unpacked(data)), 900)
    assert packed(again) == data
    assert has_lists(again)
    none = emptied(unpacked(data))
    assert none.ntotal == 0
    assert list_sizes(none).sum() == 0
    assert entries_of(none)(0)[0].size == 0


def test_rows_under_other_numbers(rows):
    index = build_whole(choice_of("IVF8,Flat"), rows, seed=0)
    new_rows = np.where(np.arange(900) % 3 == 0, -1, np.arange(900) * 10)
    seen = []
    for number in range(8):
        own, codes = renumbered(entries_of(index), new_rows)(number)
        assert len(own) == len(codes)
        for row, code in zip(own.tolist(), codes, strict=True):
            held = code.view(np.float32)
            np.testing.assert_array_equal(held, rows.array[row // 10].astype(np.float32))
        seen += own.tolist()
    assert sorted(seen) == [row * 10 for row in range(900) if row % 3]


def test_a_list_that_is_not_as_long_as_counted_is_a_fault(rows):
    index = build_whole(choice_of("IVF8,Flat"), rows, seed=0)
    sizes = list_sizes(index) + 1
    empty = train_index(choice_of("IVF8,Flat"), rows, seed=0)
    with pytest.raises(ValueError, match="were counted"):
        write_lists(io.BytesIO(), empty, sizes, entries_of(index))


def test_flat_blocks_are_the_file_of_a_flat_index(rows):
    sink = io.BytesIO()
    wide = rows.array.astype(np.float32)
    write_flat(sink, 32, 900, iter([wide[:500], wide[500:]]))
    index = faiss.IndexFlatIP(32)
    index.add(wide)
    assert sink.getvalue() == packed(index)


@pytest.mark.parametrize("key", [*KEYS, "HNSW8", "Flat"])
def test_the_effort_of_a_search_lies_in_the_file(key, rows):
    index = build_whole(choice_of(key), rows, seed=0)
    set_effort(index, 5)
    assert stored_effort(unpacked(packed(index))) == (0 if key == "Flat" else 5)


def test_what_has_no_lists_is_told(rows):
    with pytest.raises(DeclipError, match="IndexFlat has no inverted lists"):
        emptied(build_whole(choice_of("Flat"), rows, seed=0))
