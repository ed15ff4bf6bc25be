import numpy as np
import pyarrow as pa
import pytest
from duplicates_dataset import jpeg, patches, write_pairs

from declip_filter.sample_columns import SampleColumns, parse_hex, preference
from declip_shards import DeclipError, layout, sidecars


@pytest.fixture
def columns(tmp_path):
    photos = [jpeg(photo) for photo in patches(5)]
    shards = [
        [(photos[0], "one", 100), (photos[1], "two", 300)],
        [],
        [(photos[2], "three", 300), (photos[3], "four", 200), (photos[4], "five", 300)],
    ]
    store = write_pairs(str(tmp_path), shards)
    return SampleColumns(store, "basic", layout.list_shards(store))


def edited(columns, shard, name, values):
    path = layout.signals_path("basic", shard)
    table = sidecars.read_table(columns.store, path)
    place = table.column_names.index(name)
    table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    sidecars.write_table(columns.store, path, table)


def test_rows_go_through_the_shards_in_order(columns):
    assert columns.starts.tolist() == [0, 2, 2, 5]
    assert columns.keys.to_pylist() == [
        "000000000",
        "000000001",
        "000020000",
        "000020001",
        "000020002",
    ]
    assert columns.numbers("original_width").tolist() == [100, 300, 300, 200, 300]


def test_the_largest_is_preferred_then_the_smallest_key(columns):
    assert preference(columns).tolist() == [4, 0, 1, 3, 2]


def test_preference_does_not_hang_on_the_order_of_the_shards(columns):
    turned = SampleColumns(columns.store, "basic", list(reversed(columns.shards)))
    by_key = dict(zip(columns.keys.to_pylist(), preference(columns).tolist(), strict=True))
    assert dict(zip(turned.keys.to_pylist(), preference(turned).tolist(), strict=True)) == by_key


def test_hex_is_read_and_nulls_are_marked(columns):
    edited(columns, "00000", "image_phash", ["0102030405060708", None])
    data, known = columns.hex_bytes("image_phash", 16)
    assert data[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert known.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("bad", ["12", "zz02030405060708"])
def test_damaged_hex_is_refused_by_file(columns, bad):
    edited(columns, "00000", "image_phash", ["0102030405060708", bad])
    with pytest.raises(
        DeclipError,
        match=rf"'signals/basic/00000.parquet': image_phash '{bad}' is not of 16 hex digits; rerun",
    ):
        columns.hex_bytes("image_phash", 16)


def test_digests_of_files_as_they_came_are_joined_by_key(columns):
    data, known = columns.downloaded_digests()
    path = layout.shard_parquet_path("00002")
    rows = sidecars.read_rows(columns.store, path, ["key", "sha256"])
    assert [bytes(row).hex() for row in data[2:]] == [row["sha256"][:32] for row in rows]
    assert known.all()


def test_signals_of_other_samples_are_refused(columns):
    edited(columns, "00002", "key", ["000020000", "000020001", "000020009"])
    with pytest.raises(DeclipError, match=r"shard 00002 are of other samples .*rerun the stage"):
        columns.downloaded_digests()


def test_a_longer_value_is_cut_and_none_is_empty():
    assert parse_hex(["0a" * 32], 4).tolist() == [[10, 10]]
    assert parse_hex([], 32).shape == (0, 16)
    assert np.array_equal(parse_hex(["FF00"], 4), [[255, 0]])
