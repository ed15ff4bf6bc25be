"""An index on disk: whole or refused by name, mapped, and replaced under an open reader."""

import io
import json
import os

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from index_rows import unit_rows, write_embeddings
from stage_runs import run_stage

from declip_filter import BuildIndex, index_files
from declip_filter.index_files import (
    index_path,
    info_path,
    iter_rows,
    load_index,
    pack_rows,
    publish,
    publish_path,
    read_info,
    rows_path,
    search,
    write_rows,
)
from declip_shards import DeclipError, Store

KEYS = ("Flat", "IVF8,Flat", "IVF8,PQ16x4fsr", "HNSW8,Flat", "SQ8")


def built(root: str, key: str = "IVF8,Flat") -> Store:
    store: Store = write_embeddings(root, {"00000": unit_rows(400, 32, num_centers=9)})
    run_stage(BuildIndex(root=root, index_key=key, recall_target=0.5, num_queries=40))
    return store


@pytest.mark.parametrize("key", KEYS)
def test_mapped_and_read_answer_alike_and_from_a_file_nobody_may_write(tmp_path, key):
    store = built(str(tmp_path), key)
    path = store.local_path(index_path("captions"))
    path.chmod(0o444)
    mapped, read = load_index(store, "captions"), load_index(store, "captions", mmap=False)
    plain = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    queries = unit_rows(20, 32, seed=5).astype(np.float32)
    found = [search(index, queries, 7) for index in (mapped.faiss_index, read.faiss_index, plain)]
    for scores, rows in found[1:]:
        np.testing.assert_array_equal(rows, found[0][1])
        np.testing.assert_array_equal(scores, found[0][0])
    assert mapped.num_rows == len(mapped.shards) == len(mapped.captions) == 400
    assert len(np.unique(mapped.captions)) == 3
    assert mapped.keys[:2].tolist() == ["0000000000", "0000000001"]


@pytest.mark.parametrize("key", KEYS)
def test_more_neighbors_than_rows_are_minus_one(tmp_path, key):
    index = load_index(built(str(tmp_path), key), "captions").faiss_index
    effort = 8 if "IVF" in key else 500 if "HNSW" in key else None
    scores, rows = search(index, unit_rows(3, 32).astype(np.float32), 450, effort)
    assert scores.shape == rows.shape == (3, 450)
    assert (rows[:, 400:] == -1).all()
    for own in rows:
        assert len(set(own[own >= 0].tolist())) == (own >= 0).sum()


def test_an_open_reader_keeps_the_file_that_it_opened(tmp_path):
    store = built(str(tmp_path))
    old = load_index(store, "captions")
    queries = unit_rows(50, 32, seed=2).astype(np.float32)
    before = search(old.faiss_index, queries, 5, 8)
    store.remove(info_path("captions"))
    write_embeddings(str(tmp_path), {"00000": unit_rows(100, 32, seed=8)})
    run_stage(BuildIndex(root=str(tmp_path), index_type="Flat"))
    after = search(old.faiss_index, queries, 5, 8)
    np.testing.assert_array_equal(before[1], after[1])
    assert load_index(store, "captions").num_rows == 100


@pytest.mark.parametrize("change", ["cut", "flip", "emptied", "gone"])
@pytest.mark.parametrize("file", [index_path("captions"), rows_path("captions")])
def test_damage_is_refused_by_the_name_of_the_file(tmp_path, file, change):
    store = built(str(tmp_path))
    data = bytearray(store.read_bytes(file))
    if change == "gone":
        store.remove(file)
    else:
        data[len(data) // 2] ^= 1
        store.write_bytes(file, bytes({"cut": data[:-9], "flip": data, "emptied": b""}[change]))
    with pytest.raises(DeclipError, match=rf"'{file}'.*rerun the stage that indexes"):
        load_index(store, "captions")


@pytest.mark.parametrize(
    ("entry", "value", "sentence"),
    [
        ("format_version", 99, r"info.json' is of format 99, this version reads up to 2; upgrade"),
        ("format_version", "x", r"info.json' is damaged"),
        ("vectors dimension", 31, r"is of dimension 32, its info.json says 31"),
    ],
)
def test_info_of_another_version_or_index_is_refused(tmp_path, entry, value, sentence):
    store = built(str(tmp_path))
    info = json.loads(store.read_bytes(info_path("captions")))
    store.write_bytes(info_path("captions"), json.dumps(info | {entry: value}).encode())
    with pytest.raises(DeclipError, match=sentence):
        load_index(store, "captions")


@pytest.mark.parametrize("entry", index_files.REQUIRED)
def test_info_without_an_entry_is_refused_by_its_name(tmp_path, entry):
    store = Store(str(tmp_path))
    info = dict.fromkeys(index_files.REQUIRED, 1) | {"format_version": 1}
    store.write_bytes(info_path("captions"), json.dumps(info).encode())
    assert read_info(store, "captions") == info
    del info[entry]
    store.write_bytes(info_path("captions"), json.dumps(info).encode())
    with pytest.raises(DeclipError, match=rf"info.json' has no entry '{entry}', .*; delete the in"):
        read_info(store, "captions")


def test_a_build_writes_every_required_entry(tmp_path):
    for key in ("Flat", "IVF8,Flat", "HNSW8,Flat"):
        assert set(index_files.REQUIRED) <= set(read_info(built(str(tmp_path), key), "captions"))


def test_what_is_no_index_and_other_rows_are_refused(tmp_path):
    store = built(str(tmp_path))
    info = json.loads(store.read_bytes(info_path("captions")))
    table = next(iter(iter_rows(store, rows_path("captions"), ["key", "shard", "caption_sha"])))
    store.write_bytes(rows_path("captions"), pack_rows(pa.Table.from_batches([table]).slice(1)))
    info["rows_sha256"] = store.sha256(rows_path("captions"))
    store.write_bytes(info_path("captions"), json.dumps(info).encode())
    with pytest.raises(DeclipError, match=r"has 400 vectors, 'index.*' names 399 rows"):
        load_index(store, "captions")
    store.write_bytes(index_path("captions"), b"not an index" * 9)
    info |= {"size in bytes": 108, "index_sha256": store.sha256(index_path("captions"))}
    store.write_bytes(info_path("captions"), json.dumps(info).encode())
    with pytest.raises(DeclipError, match=r"index.faiss' is no index that FAISS reads"):
        load_index(store, "captions")


def test_how_rows_are_cut_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(index_files, "GROUP_ROWS", 100)
    names = {n: [f"{n}{i}" for i in range(250)] for n in ("key", "shard", "caption_sha")}
    whole = pa.table(names)
    store = Store(str(tmp_path))
    write_rows(store, "cut", [whole.slice(0, 7), whole.slice(7, 193), whole.slice(200)])
    assert store.read_bytes("cut") == pack_rows(whole)
    table = pq.read_table(io.BytesIO(pack_rows(whole)))
    assert table.column("row").to_pylist() == list(range(250))
    assert table.drop_columns("row").equals(whole)
    assert pq.ParquetFile(io.BytesIO(pack_rows(whole))).num_row_groups == 3


def write_half(store: Store) -> None:
    with publish_path(store, "a/file") as local:
        local.write_bytes(b"half")
        raise RuntimeError("cut short")


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("a/file", b"old")
    with pytest.raises(RuntimeError, match="cut short"):
        write_half(store)
    assert store.read_bytes("a/file") == b"old"
    assert os.listdir(tmp_path / "a") == ["file"]
    with publish(store, "a/file") as opened, opened() as f:
        f.write(b"new")
    assert store.read_bytes("a/file") == b"new"
    remote = Store("memory://index-files-test")
    with publish(remote, "a/file") as opened, opened() as f:
        f.write(b"far")
    assert remote.read_bytes("a/file") == b"far"
