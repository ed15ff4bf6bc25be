"""Columns in files: the reader inverts the writer, and one process makes what others wait for."""

import os
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from declip_shards import DeclipError
from declip_train import column_files
from declip_train.column_files import (
    TextColumn,
    cache_base,
    cached_columns,
    digest_of,
    text_chunks,
)

KEY = digest_of("k")


def made(base, columns, meta=None, key=KEY, **more):
    return cached_columns(base, "kind", key, lambda: (columns, meta or {}), what="x", **more)


@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.lists(st.text(max_size=8), max_size=5), min_size=1, max_size=4))
def test_texts_come_back_in_any_order(pieces):
    arrays = [pa.array(piece, pa.large_string()) for piece in pieces]
    # A slice begins in the middle of its buffers.
    arrays.append(pa.array(["before", *pieces[0]], pa.large_string()).slice(1))
    texts = [text for piece in [*pieces, pieces[0]] for text in piece]
    columns = text_chunks("t", arrays)
    column = TextColumn(
        offsets=np.concatenate(columns["t.offsets"]), data=np.concatenate(columns["t.data"])
    )
    assert len(column) == len(texts)
    assert list(column) == texts
    order = np.random.default_rng(0).permutation(len(texts))
    assert column.take(order) == [texts[place] for place in order]
    assert [column[place] for place in range(len(texts))] == texts
    if texts:
        assert column[-1] == texts[-1]
        with pytest.raises(IndexError):
            column[len(texts)]


def test_the_reader_inverts_the_writer(tmp_path):
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        "small": [rng.integers(0, 9, 5, dtype=np.uint8)],
        "pairs": [rng.integers(0, 9, (n, 2), dtype=np.int32) for n in (3, 4)],
        "wide": [rng.integers(0, 2**60, 3), rng.integers(0, 9, 0)],
        "tokens": [np.array([65535, 1, 2], np.uint16)],
        "nothing": [np.empty(0, np.int64)],
        **text_chunks("words", [pa.array(["ä", "", "b"], pa.large_string())]),
    }
    found = made(tmp_path, columns, {"is": [1, "ü"]})
    again = made(tmp_path, {}, {})
    for each in (found, again):
        assert each.meta == {"is": [1, "ü"]}
        assert list(each.text("words")) == ["ä", "", "b"]
        for name, chunks in columns.items():
            np.testing.assert_array_equal(each[name], np.concatenate(chunks))
            assert each[name].dtype == chunks[0].dtype
            assert each[name].ctypes.data % each[name].dtype.itemsize == 0
    assert "other" not in found
    # The layout is safetensors', whose own reader agrees.
    np.testing.assert_array_equal(load_file(found.path)["pairs"], np.concatenate(columns["pairs"]))


def test_what_is_cut_or_damaged_is_made_again(tmp_path):
    columns = {"a": [np.arange(10)]}
    path = made(tmp_path, columns).path
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[:-1], b"\xff" * 20, whole[:12] + b"}" + whole[13:]):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(made(tmp_path, columns)["a"], np.arange(10))
        assert path.read_bytes() == whole


def test_what_another_version_made_is_made_anew(tmp_path, monkeypatch):
    old = made(tmp_path, {"a": [np.arange(3)]})
    monkeypatch.setattr(column_files, "_FORMAT", column_files._FORMAT + 1)
    new = made(tmp_path, {"a": [np.arange(4)]})
    assert [len(each["a"]) for each in (old, new)] == [3, 4]
    assert old.path.exists(), "the other version may go on with its own"


def test_one_maker_at_a_time_and_none_for_what_stands(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(column_files, "_SECONDS_BETWEEN_LINES", 0.01)
    builds = []

    def build():
        builds.append(threading.get_ident())
        time.sleep(0.3)
        return {"a": [np.arange(3)]}, {}

    def ask():
        cached_columns(tmp_path, "kind", KEY, build, what="numbers")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert "numbers: another process makes them; waiting" in capfd.readouterr().err


def test_a_maker_that_fails_leaves_nothing_and_the_next_one_makes_it(tmp_path):
    def fails():
        raise DeclipError("no")

    with pytest.raises(DeclipError, match="no"):
        cached_columns(tmp_path, "kind", KEY, fails, what="x")
    assert not list((tmp_path / "kind").glob("*.safetensors*"))
    assert len(made(tmp_path, {"a": [np.arange(3)]})["a"]) == 3


def test_files_used_longest_ago_make_way(tmp_path):
    keys = [digest_of(n) for n in range(5)]
    for age, key in enumerate(keys):
        path = made(tmp_path, {"a": [np.arange(3)]}, key=key).path
        os.utime(path, (time.time() - 3600 * (9 - age),) * 2)
    oldest = made(tmp_path, {}, key=keys[0]).path
    column_files._prune(tmp_path / "kind", 2)
    left = {path.name[:40] for path in (tmp_path / "kind").glob("*.safetensors")}
    assert left == {keys[0][:40], keys[4][:40]}, "the first was of use again"
    os.utime(oldest, (1, 1))
    column_files._prune(tmp_path / "kind", 2)
    assert not oldest.exists(), "too old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "kind").write_bytes(b"a file")
    with pytest.raises(DeclipError, match=r"x cannot be kept in the cache folder .*choose another"):
        made(tmp_path, {"a": [np.arange(3)]})


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeclipError, match="No space left on device; make room there"):
        made(tmp_path, {"a": [np.arange(200_000)]})
    assert not list((tmp_path / "kind").glob("*.safetensors*"))


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENDECLIP_CACHE", str(tmp_path / "named"))
    assert cache_base(None) == tmp_path / "named"
    assert cache_base(str(tmp_path / "chosen")) == tmp_path / "chosen"
    monkeypatch.delenv("OPENDECLIP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_base(None) == tmp_path / ".cache" / "opendeclip"
