"""Exports hold what the dataset holds, again and again, and nothing that it has no longer."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from declip_shards import (
    DeclipError,
    Store,
    TaskStats,
    export_files,
    layout,
    manifest,
    read_samples,
    sidecars,
)
from declip_shards.export_files import FORMS, MARK, Form, export
from declip_shards.fakes import write_fake_dataset
from declip_shards.optout import PENDING, drop_from_shard


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_fake_dataset(str(tmp_path / "data"), fail_every=5, samples_per_shard=12)


@pytest.fixture
def target(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "target"))


def files_of(target: Store) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(target.root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(target.root).rglob("*")
        if path.is_file()
    }


def bytes_of(target: Store) -> dict[str, bytes]:
    return {path: data for path, (_, data) in files_of(target).items()}


def drop(store: Store, shard: str, key: str) -> None:
    for path, data in drop_from_shard(store, shard, {key}).items():
        assert data is not None
        store.write_bytes(path, data)


def test_files_are_the_members_of_the_tars(store, target):
    done = export(store, target, "files")
    assert (done.num_shards, done.num_written, done.num_samples) == (2, 2, 20)
    for shard in layout.list_shards(store):
        for sample in read_samples(store, shard):
            base = f"{shard}/{sample.key}"
            assert target.read_bytes(f"{base}.jpg") == sample.image
            assert target.read_bytes(f"{base}.txt").decode() == sample.caption
            assert json.loads(target.read_bytes(f"{base}.json")) == sample.metadata
        for name in (f"{shard}.parquet", f"{shard}_stats.json"):
            assert target.read_bytes(name) == store.read_bytes(f"shards/{name}")
    assert sum(path.endswith(".jpg") for path in files_of(target)) == 20


def test_parquet_has_every_row_and_the_pictures_of_the_successes(store, target):
    export(store, target, "parquet")
    for shard in layout.list_shards(store):
        table = pq.read_table(io.BytesIO(target.read_bytes(f"{shard}.parquet")))
        assert table.column_names[-1] == "jpg"
        original = sidecars.read_table(store, layout.shard_parquet_path(shard))
        assert table.drop_columns(["jpg"]).equals(original)
        images = {s.key: s.image for s in read_samples(store, shard)}
        for row in table.to_pylist():
            assert row["jpg"] == images.get(row["key"])
            assert (row["jpg"] is None) == (row["status"] != "success")
        Image.open(io.BytesIO(next(iter(images.values())))).verify()


def receive(store: Store, path: str) -> None:
    """A receipt of the step that wrote a file."""
    stats = TaskStats(num_in=0, num_out=0, reasons={}, files=[path], volatile_files=[], extra={})
    name = path.replace("/", "-")
    manifest.write_receipt(store, "ingest", manifest.make_receipt(store, name, "x", stats))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", ["shards/00001.tar", "shards/00001.parquet"])
def test_a_damaged_shard_is_refused_and_nothing_is_written(store, target, form, path):
    receive(store, path)
    export(store, target, form)
    data = bytearray(store.read_bytes(path))
    data[len(data) // 2] ^= 1
    store.local_path(path).unlink()  # an export may have linked it
    store.write_bytes(path, data)
    before = files_of(target)
    with pytest.raises(DeclipError, match=r"is damaged or was changed .* nothing was exported"):
        export(store, target, form)
    assert files_of(target) == before


def test_a_damaged_selection_is_refused(store, target):
    for shard in layout.list_shards(store):
        rows = [{"key": s.key, "keep": True} for s in read_samples(store, shard)]
        path = layout.selection_path("s", shard)
        sidecars.write_table(store, path, pa.Table.from_pylist(rows))
        receive(store, path)
    export(store, target, "energon", selection="s")
    rows[0]["keep"] = False
    sidecars.write_table(store, path, pa.Table.from_pylist(rows))
    with pytest.raises(DeclipError, match=r"'selection/s/00001.parquet' .* make it again"):
        export(store, target, "energon", selection="s")
    assert export(store, target, "energon").num_written == 0


def test_half_an_opt_out_is_not_exported(store, target):
    store.write_bytes(PENDING, b"{}")
    with pytest.raises(DeclipError, match="samples that must go are still there"):
        export(store, target, "files")
    assert files_of(target) == {}


@pytest.mark.parametrize("form", FORMS)
def test_a_second_export_writes_nothing(store, target, form):
    export(store, target, form)
    before = files_of(target)
    assert export(store, target, form).num_written == 0
    assert files_of(target) == before


@pytest.mark.parametrize("form", FORMS)
def test_after_a_change_it_is_as_exported_anew(store, target, tmp_path, form):
    """A sample that is gone is gone there too, and only its shard is written."""
    export(store, target, form)
    drop(store, "00000", "0000001")
    assert export(store, target, form).num_written == 1
    fresh = Store(str(tmp_path / "fresh"))
    export(store, fresh, form)
    assert bytes_of(target) == bytes_of(fresh)
    assert not [path for path in files_of(target) if "0000001" in path]


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_that_is_gone_is_taken_away(store, target, form):
    export(store, target, form)
    for path in (layout.tar_path, layout.shard_parquet_path, layout.shard_stats_path):
        store.remove(path("00001"))
    done = export(store, target, form)
    assert (done.num_shards, done.num_written, done.num_removed) == (1, 0, 1)
    assert not [path for path in files_of(target) if path.startswith("00001")]


@pytest.mark.parametrize("form", FORMS)
def test_killed_anywhere_and_run_again_it_is_whole(tmp_path, form, monkeypatch):
    store = write_fake_dataset(str(tmp_path / "data"), samples_per_shard=4)
    expected = Store(str(tmp_path / "expected"))
    export(store, expected, form)
    original, small = Store.write_bytes, export_files._write_small
    limit = 0
    while True:
        limit += 1
        target = Store(str(tmp_path / f"t{limit}"))
        count = 0

        def write(self: Store, relative: str, data: bytes, limit: int = limit) -> None:
            nonlocal count
            count += 1
            if count == limit:
                raise KeyboardInterrupt
            original(self, relative, data)

        def write_small(target: Store, path: str, data: bytes) -> None:
            # Counts, and is cut in the middle.
            write(target, path, data[: len(data) // 2])
            small(target, path, data)

        monkeypatch.setattr(Store, "write_bytes", write)
        monkeypatch.setattr(export_files, "_write_small", write_small)
        try:
            export(store, target, form)
        except KeyboardInterrupt:
            pass
        else:
            break
        finally:
            monkeypatch.undo()
        export(store, target, form)
        assert bytes_of(target) == bytes_of(expected)
    assert limit > 6


def test_a_foreign_folder_is_refused_and_left_alone(store, target):
    target.write_bytes("holiday.jpg", b"mine")
    for form in FORMS:
        with pytest.raises(DeclipError, match="is not empty and holds no export of ours"):
            export(store, target, form)
    assert bytes_of(target) == {"holiday.jpg": b"mine"}


def test_an_export_of_another_form_is_refused(store, target):
    export(store, target, "files")
    with pytest.raises(DeclipError, match="of form 'files', not 'parquet'"):
        export(store, target, "parquet")


def test_a_damaged_or_newer_mark_is_refused(store, target):
    target.write_bytes(MARK, b"{")
    with pytest.raises(DeclipError, match="is damaged"):
        export(store, target, "files")
    target.write_bytes(MARK, b'{"format_version": 9, "form": "files", "shards": {}}')
    with pytest.raises(DeclipError, match="newer version"):
        export(store, target, "files")


def test_a_folder_without_shards_is_refused(target, tmp_path):
    with pytest.raises(DeclipError, match="no complete shard"):
        export(Store(str(tmp_path / "nothing")), target, "files")


def test_tars_are_linked_not_copied_and_a_remote_target_gets_copies(store, target):
    export(store, target, "energon")
    ours, theirs = store.local_path("shards/00000.tar"), target.local_path("00000.tar")
    assert ours.samefile(theirs)
    remote = Store("memory://export-energon")
    export(store, remote, "energon")
    assert remote.read_bytes("00001.tar") == store.read_bytes("shards/00001.tar")
    remote.remove_folder(".")


@pytest.mark.parametrize("form", ["files", "parquet"])
def test_no_json_lies_where_img2dataset_takes_each_for_a_shards(store, target, form: Form):
    export(store, target, form)
    names = [path for path in files_of(target) if path.endswith(".json") and "/" not in path]
    assert all(name.split("_")[0].isdigit() for name in names)
    beside = Store(store.path("shards"))
    export(store, beside, "energon")
    assert all(name.split("_")[0].isdigit() for name in beside.list(".", ".json"))


def test_the_tars_stay_whole_beside_energons_files(store):
    before = {n: store.read_bytes(f"shards/{n}") for n in store.list("shards")}
    export(store, Store(store.path("shards")), "energon")
    assert {name: store.read_bytes(f"shards/{name}") for name in before} == before
    with store.open("shards/00000.tar") as f, tarfile.open(fileobj=f) as tar:
        assert len(tar.getnames()) == 30
