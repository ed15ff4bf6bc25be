"""Energon's files say where samples lie. benchmarks/read_by_energon.py asks Energon itself."""

import json
import struct
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from declip_shards import DeclipError, Store, energon, layout, read_samples, sidecars
from declip_shards.export_files import export
from declip_shards.fakes import write_fake_dataset
from declip_shards.optout import drop_from_shard


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_fake_dataset(str(tmp_path / "data"), fail_every=5, samples_per_shard=12)


def test_an_index_has_the_first_byte_of_each_sample_and_the_end(store):
    data = energon.tar_index(store, "shards/00000.tar")
    places = struct.unpack(f"<{len(data) // 8}Q", data)
    tar = store.read_bytes("shards/00000.tar")
    keys = [sample.key for sample in read_samples(store, "00000")]
    assert len(places) == len(keys) + 1
    for key, start in zip(keys, places, strict=False):
        assert tar[start:].startswith(f"{key}.jpg".encode())
        assert start % 512 == 0
    assert tar[places[-1] :].strip(b"\0") == b""
    with tarfile.open(store.local_path("shards/00000.tar")) as opened:
        opened.getmembers()
        assert places[-1] == opened.offset


def test_a_damaged_tar_is_refused(store):
    store.write_bytes("shards/00000.tar", b"not a tar at all" * 99)
    with pytest.raises(DeclipError, match="not a readable tar"):
        energon.tar_index(store, "shards/00000.tar")


def test_its_yaml_is_yaml_and_counts_are_of_the_successes(store):
    files = energon.meta_files(store, layout.list_shards(store))
    assert yaml.safe_load(files[".nv-meta/dataset.yaml"]) == {
        "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
        "field_map": {"image": "jpg", "caption": "txt"},
    }
    split = yaml.safe_load(files[".nv-meta/split.yaml"])
    assert split == {"split_parts": {"train": ["00000.tar", "00001.tar"]}, "exclude": []}
    counts = {"00000.tar": 10, "00001.tar": 10}
    assert json.loads(files[".nv-meta/.info.json"]) == {"shard_counts": counts}
    assert json.loads(files["sizes.json"]) == counts
    beside = energon.meta_files(store, layout.list_shards(store), is_beside=True)
    assert int(beside["__len__"]) == 20
    assert "sizes.json" not in beside


def test_a_selection_leaves_out_what_it_drops(store):
    for shard in layout.list_shards(store):
        keys = [sample.key for sample in read_samples(store, shard)]
        rows = [
            {"key": k, "keep": n > 1, "reason": "" if n > 1 else "x"} for n, k in enumerate(keys)
        ]
        sidecars.write_table(store, layout.selection_path("s", shard), pa.Table.from_pylist(rows))
    files = energon.meta_files(store, layout.list_shards(store), selection="s")
    assert yaml.safe_load(files[".nv-meta/split.yaml"])["exclude"] == [
        "00000.tar/0000000",
        "00000.tar/0000001",
        "00001.tar/0000100",
        "00001.tar/0000101",
    ]


def test_a_tar_without_samples_is_no_part_of_a_split():
    text = energon.split_text({"00000.tar": 3, "00001.tar": 0})
    assert yaml.safe_load(text)["split_parts"] == {"train": ["00000.tar"]}


def test_after_an_opt_out_the_files_beside_the_tars_are_as_made_anew(store):
    beside = Store(store.path("shards"))
    for shard in layout.list_shards(store):
        keys = [sample.key for sample in read_samples(store, shard)]
        rows = [{"key": k, "keep": n > 1, "reason": ""} for n, k in enumerate(keys)]
        sidecars.write_table(store, layout.selection_path("s", shard), pa.Table.from_pylist(rows))
    export(store, beside, "energon", selection="s")
    gone = {"0000001", "0000002"}
    for path, data in drop_from_shard(store, "00000", gone).items():
        assert data is not None
        store.write_bytes(path, data)
    changes = energon.refreshed(store, ["00000"], gone)
    for path, data in changes.items():
        assert data is not None
        store.write_bytes(path, data)
    assert energon.refreshed(store, ["00000"], gone) == {}
    assert yaml.safe_load(store.read_bytes("shards/.nv-meta/split.yaml"))["exclude"] == [
        "00000.tar/0000000",
        "00001.tar/0000100",
        "00001.tar/0000101",
    ]
    assert store.read_bytes("shards/00000.tar.idx") == energon.tar_index(store, "shards/00000.tar")
    assert int(store.read_bytes("shards/__len__")) == 18


def apply(store: Store, changes: dict[str, bytes | None]) -> None:
    for path, data in changes.items():
        assert data is not None
        store.write_bytes(path, data)


def test_a_tar_that_lost_its_last_sample_is_no_part_of_the_split_any_more(store):
    beside = Store(store.path("shards"))
    export(store, beside, "energon")
    keys = {sample.key for sample in read_samples(store, "00001")}
    apply(store, drop_from_shard(store, "00001", keys))
    apply(store, energon.refreshed(store, ["00001"], keys))
    found = {path: beside.read_bytes(path) for path in (energon.SPLIT, energon.INFO)}
    made = energon.meta_files(store, layout.list_shards(store), is_beside=True)
    assert found == {path: made[path] for path in found}
    assert yaml.safe_load(found[energon.SPLIT])["split_parts"] == {"train": ["00000.tar"]}


def test_a_dataset_without_samples_has_an_empty_split():
    assert yaml.safe_load(energon.split_text({"00000.tar": 0})) == {
        "split_parts": {"train": []},
        "exclude": [],
    }


def test_a_split_that_somebody_edited_keeps_its_parts(store):
    beside = Store(store.path("shards"))
    export(store, beside, "energon")
    text = b"split_parts:\n  train:\n  - 00000.tar\n  val:\n  - 00001.tar\nexclude: []\n"
    beside.write_bytes(energon.SPLIT, text)
    assert energon.refreshed(store, [], ()) == {}
    keys = {sample.key for sample in read_samples(store, "00000")}
    apply(store, drop_from_shard(store, "00000", keys))
    apply(store, energon.refreshed(store, ["00000"], keys))
    assert beside.read_bytes(energon.SPLIT) == text.replace(b"  - 00000.tar\n", b"")


def test_what_was_exported_beside_the_tars_is_forgotten_and_nothing_else(store):
    beside = Store(store.path("shards"))
    folder = Path(beside.root)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not energon.forget(store)
    export(store, beside, "energon")
    beside.write_bytes(".nv-meta/mine.txt", b"mine")
    assert energon.forget(store)
    assert not energon.forget(store)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before | {folder / ".nv-meta/mine.txt": b"mine"}
    (folder / ".nv-meta/mine.txt").unlink()
    export(store, beside, "energon")
    energon.forget(store)
    assert not (folder / ".nv-meta").exists()


def test_indexes_that_are_not_ours_stay(store):
    store.write_bytes("shards/00000.tar.idx", b"of energon prepare")
    assert not energon.forget(store)
    assert store.exists("shards/00000.tar.idx")


def test_where_nobody_exported_there_is_nothing_to_refresh(store):
    assert energon.refreshed(store, ["00000"], {"0000001"}) == {}
