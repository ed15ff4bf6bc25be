"""Which of several neighbor tables is in use."""

import json

import pyarrow as pa
import pytest

from declip_shards import DeclipError, Store, layout, neighbor_tables, sidecars
from declip_shards.manifest import canonical_json
from declip_shards.neighbor_tables import (
    description_digest,
    description_path,
    list_versions,
    missing_shards,
    point_to,
    pointer_path,
    read_lists,
    read_version,
    resolve_table,
    version_folder,
    version_path,
)

SHARDS = ("00000", "00001")


def write_table(store, folder, *, finished=True, **more):
    """A table of two shards with one row each."""
    description = {"format_version": 1, "name": folder, "encoder": "hashing:8", **more}
    store.write_bytes(description_path(folder), canonical_json(description))
    for shard in SHARDS:
        columns = {
            "key": [f"{shard}0"],
            "neighbor_keys": pa.array([["000000"]], pa.list_(pa.string())),
            "scores": pa.array([[0.5]], pa.list_(pa.float32())),
            neighbor_tables.IDENTITY: [description_digest(store, folder)],
        }
        sidecars.write_table(store, layout.neighbors_path(folder, shard), pa.table(columns))
    if neighbor_tables.MARK in folder and finished:
        record = {"format_version": 1, "run": "cafe", "step": 40}
        store.write_bytes(version_path(folder), canonical_json(record))
    return folder


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path))
    write_table(store, "captions", embeddings="text", dim=8)
    return store


def test_without_a_pointer_the_pipelines_table_is_in_use(store):
    version = resolve_table(store, "captions")
    assert version == read_version(store, "captions")
    assert (version.folder, version.encoder, version.embeddings) == (
        "captions",
        "hashing:8",
        "text",
    )
    assert (version.run, version.step, version.is_refreshed) == ("", None, False)
    assert version.id == description_digest(store, "captions")[:12]


def test_the_pointer_is_followed_and_can_go_back(store):
    new = write_table(store, version_folder("captions", "0123"), embeddings="text.0123")
    assert resolve_table(store, "captions").folder == "captions", "a table is not in use by itself"
    point_to(store, "captions", new)
    version = resolve_table(store, "captions")
    assert (version.folder, version.id, version.table) == (new, "0123", "captions")
    assert (version.run, version.step, version.embeddings) == ("cafe", 40, "text.0123")
    assert version.is_refreshed
    assert not version.is_same(read_version(store, "captions"))
    point_to(store, "captions", "captions")
    assert resolve_table(store, "captions").is_same(read_version(store, "captions"))


def test_a_table_built_anew_comes_before_an_older_refreshed_one(store):
    new = write_table(store, version_folder("captions", "0123"))
    point_to(store, "captions", new)
    write_table(store, "captions", k=3)
    version = resolve_table(store, "captions")
    assert (version.folder, version.superseded) == ("captions", new)
    point_to(store, "captions", new)
    assert resolve_table(store, "captions").folder == new


def test_an_unfinished_table_is_never_in_use(store):
    new = write_table(store, version_folder("captions", "0123"), finished=False)
    with pytest.raises(
        DeclipError, match=r"captions@0123/version.json' is missing.*never finished"
    ):
        point_to(store, "captions", new)
    assert resolve_table(store, "captions").folder == "captions"
    assert read_version(store, new, is_finished=False).folder == new
    assert list_versions(store, "captions") == [new]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", r"current.json' is damaged"),
        (b'{"format_version": 9}', r"current.json' is of format 9.*upgrade opendeclip"),
        (b'{"format_version": 1, "folder": "images@1"}', r"points to 'images@1'.*no version"),
        (b'{"format_version": 1, "folder": "captions@1/.."}', r"which is no version of table"),
    ],
)
def test_wrong_pointers_are_refused(store, content, sentence):
    store.write_bytes(pointer_path("captions"), content)
    with pytest.raises(DeclipError, match=sentence):
        resolve_table(store, "captions")


def test_a_refreshed_table_that_was_removed_or_changed_is_refused(store):
    new = write_table(store, version_folder("captions", "0123"))
    point_to(store, "captions", new)
    write_table(store, new, k=5)
    with pytest.raises(DeclipError, match=r"is not the table that .*current.json' points to"):
        resolve_table(store, "captions")
    store.remove_folder(f"neighbors/{new}")
    with pytest.raises(DeclipError, match=r"version.json' is missing.*run declip refresh again"):
        resolve_table(store, "captions")


def test_files_of_two_tables_are_not_mixed(store):
    version = read_version(store, "captions")
    assert read_lists(store, version, "00001").to_pylist() == [
        {"key": "000010", "neighbor_keys": ["000000"]}
    ]
    other = write_table(store, version_folder("captions", "0123"), k=5)
    stranger = store.read_bytes(layout.neighbors_path(other, "00001"))
    store.write_bytes(layout.neighbors_path("captions", "00001"), stranger)
    with pytest.raises(DeclipError, match=r"captions/00001.parquet' is of another table than"):
        read_lists(store, version, "00001")
    store.remove(layout.neighbors_path("captions", "00001"))
    assert missing_shards(store, version, SHARDS) == ["00001"]
    with pytest.raises(DeclipError, match=r"captions/00001.parquet' is missing.*neighbors step"):
        read_lists(store, version, "00001")


def test_a_table_without_description_can_be_read(store):
    store.remove(description_path("captions"))
    version = resolve_table(store, "captions")
    assert (version.sha256, version.id, version.encoder) == ("", "captions", "")
    assert read_lists(store, version, "00000").num_rows == 1
    sidecars.write_table(
        store, layout.neighbors_path("captions", "00000"), pa.table({"key": ["000000"]})
    )
    with pytest.raises(DeclipError, match=r"has no column 'neighbor_keys'"):
        read_lists(store, version, "00000")


def test_the_pointer_says_the_same_whenever_it_is_written(store):
    new = write_table(store, version_folder("captions", "0123"))
    point_to(store, "captions", new)
    first = store.read_bytes(pointer_path("captions"))
    point_to(store, "captions", "captions")
    point_to(store, "captions", new)
    assert store.read_bytes(pointer_path("captions")) == first
    assert json.loads(first)["folder"] == new
