import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from declip_filter.rules import SCHEMA
from declip_shards import DeclipError, layout, sidecars
from declip_shards.fakes import write_fake_dataset
from pipelines.trained_rows import CONFIG, trained_rows

sys.path.append(str(Path(__file__).parents[1] / "filter"))

from duplicates_dataset import jpeg, patches, write_pairs


def select(store, name, keep):
    """A selection of the keys for which ``keep`` says so."""
    for shard in layout.list_shards(store):
        table = sidecars.read_table(store, layout.shard_parquet_path(shard), ["key"])
        rows = [
            dict.fromkeys(SCHEMA.names) | {"key": key, "keep": keep(key)}
            for key in table.column("key").to_pylist()
        ]
        sidecars.write_table(
            store, layout.selection_path(name, shard), pa.Table.from_pylist(rows, SCHEMA)
        )


@pytest.fixture
def store(tmp_path):
    return write_fake_dataset(str(tmp_path), num_shards=3, samples_per_shard=8, fail_every=4)


def configure(store, **settings):
    store.write_bytes(CONFIG, json.dumps(settings).encode())


def test_rows_are_the_successes_of_the_selection_and_the_splits(store):
    assert len(trained_rows(store.root)) == 18  # a quarter failed
    select(store, "some", lambda key: int(key) % 2 == 0)
    even = trained_rows(store.root, "some")
    assert [int(even.key(row)) % 2 for row in range(len(even))] == [0] * 12
    configure(store, selection="some", splits=["test"])
    rows = trained_rows(store.root)
    assert (rows.selection, rows.splits) == ("some", ("test",))
    assert [rows.key(row) for row in range(len(rows))] == ["000020", "000022", "000024", "000026"]


def test_keys_and_rows_invert_each_other(store):
    rows = trained_rows(store.root, "")
    for number in range(3):
        start, stop = rows.starts[number : number + 2]
        keys = [rows.key(row) for row in range(start, stop)]
        assert keys == sorted(keys)
        found = rows.rows_of(number, pa.array([*reversed(keys), "unknown"]))
        np.testing.assert_array_equal(found, [*range(stop - 1, start - 1, -1), -1])


def test_the_default_selection_is_taken_where_nothing_is_said(store):
    assert trained_rows(store.root).selection == ""
    select(store, "default", lambda key: key.endswith("0"))
    assert trained_rows(store.root).selection == "default"
    assert trained_rows(store.root, "").selection == ""
    configure(store, selection="")
    assert trained_rows(store.root).selection == ""


def test_the_digest_follows_from_what_was_trained_on(tmp_path):
    files = [jpeg(photo) for photo in patches(4)]
    roots = {}
    for name, images in {"a": files, "again": files, "other": [*files[:3], files[0]]}.items():
        store = write_pairs(str(tmp_path / name), [[(i, "x", 9) for i in images]])
        select(store, "three", lambda key: not key.endswith("3"))
        roots[name] = store.root
    digests = {name: trained_rows(root).digest for name, root in roots.items()}
    assert digests["a"] == digests["again"] != digests["other"]
    without = {name: trained_rows(root, "three").digest for name, root in roots.items()}
    assert without["a"] == without["other"] != digests["a"]


def test_columns_belong_to_their_rows(tmp_path):
    files = [jpeg(photo) for photo in patches(6)]
    shards = [[(i, "x", 9) for i in files[:3]], [], [(i, "x", 9) for i in files[3:]]]
    store = write_pairs(str(tmp_path), shards)
    select(store, "odd", lambda key: int(key) % 2 == 1)
    rows = trained_rows(str(tmp_path), "odd")
    keys = [rows.key(row) for row in range(len(rows))]
    assert keys == ["000000001", "000020001"]
    stored, known = rows.stored_digests()
    came, _ = rows.downloaded_digests
    assert known.all()
    for row, file in enumerate((files[1], files[4])):
        assert stored[row].tobytes() == hashlib.sha256(file).digest()[:16]
        assert came[row].tobytes() == hashlib.sha256(b"as it came" + file).digest()[:16]
    looks, known = rows.looks()
    assert known.all()
    np.testing.assert_allclose(looks.aspects, 160 / 120)
    table = sidecars.read_rows(store, layout.signals_path("basic", "00000"))
    assert f"{int(looks.hashes[0]):016x}" == table[1]["image_phash"]


def test_older_signals_have_the_difference_hash_alone(tmp_path):
    files = [jpeg(photo) for photo in patches(2)]
    store = write_pairs(str(tmp_path), [[(i, "x", 9) for i in files]], hashes=False)
    rows = trained_rows(str(tmp_path))
    assert rows.picture_hash == "image_dhash"
    assert rows.looks()[0].layouts is None
    store.remove(layout.signals_path("basic", "00000"))
    rows = trained_rows(str(tmp_path))
    assert (rows.signals, rows.picture_hash) == (None, None)
    assert not rows.stored_digests()[1].any()


@pytest.mark.parametrize(
    ("settings", "selection", "sentence"),
    [
        ({"train_data": ["far.tar"]}, None, r"read other shards \(train_data 'far.tar'\)"),
        ({}, "defalt", r"no selection 'defalt' in .*Did you mean 'default'"),
        ({"splits": ["validation"]}, "", "has no sample that was trained on .*splits validation"),
    ],
)
def test_what_was_not_trained_on_is_refused(store, settings, selection, sentence):
    select(store, "default", lambda key: True)
    configure(store, **settings)
    with pytest.raises(DeclipError, match=sentence):
        trained_rows(store.root, selection)


def test_a_damaged_configuration_and_an_empty_folder_are_refused(store, tmp_path):
    store.write_bytes(CONFIG, b"{")
    with pytest.raises(DeclipError, match=r"'train/config\.json' is damaged"):
        trained_rows(store.root)
    with pytest.raises(DeclipError, match="no complete shard"):
        trained_rows(str(tmp_path / "nothing"))


def test_a_digest_that_is_none_is_refused(tmp_path):
    store = write_pairs(str(tmp_path), [[(jpeg(patches(1)[0]), "x", 9)]])
    path = layout.signals_path("basic", "00000")
    row = sidecars.read_rows(store, path)[0] | {"image_sha256": "not hex" * 9}
    sidecars.write_table(store, path, pa.Table.from_pylist([row]))
    with pytest.raises(DeclipError, match="shard 00000 of the training data: image_sha256"):
        trained_rows(str(tmp_path)).stored_digests()
