import pyarrow as pa
import pytest

from declip_shards import DeclipError, Store, sidecars

TABLE = pa.table({"key": ["a", "b"], "score": pa.array([0.5, None], pa.float32())})


def test_read_inverts_write_and_bytes_repeat(tmp_path):
    store = Store(str(tmp_path))
    sidecars.write_table(store, "x.parquet", TABLE)
    first = store.read_bytes("x.parquet")
    sidecars.write_table(store, "x.parquet", TABLE)
    assert store.read_bytes("x.parquet") == first
    assert sidecars.read_table(store, "x.parquet").equals(TABLE)
    assert sidecars.read_rows(store, "x.parquet", ["key"]) == [{"key": "a"}, {"key": "b"}]
    assert sidecars.num_rows(store, "x.parquet") == 2


def test_a_missing_column_or_file_is_named(tmp_path):
    store = Store(str(tmp_path))
    sidecars.write_table(store, "x.parquet", TABLE)
    with pytest.raises(DeclipError, match="no column 'caption'; it has: key, score"):
        sidecars.read_table(store, "x.parquet", ["caption"])
    with pytest.raises(DeclipError, match=r"'y.parquet' is missing"):
        sidecars.read_table(store, "y.parquet")


def test_a_flipped_bit_in_the_pages_is_refused_or_harmless(tmp_path):
    """The footer has no checksum of its own: the manifest's hash covers it."""
    store = Store(str(tmp_path))
    table = pa.table({"key": [f"{n:09d}" for n in range(200)]})
    sidecars.write_table(store, "x.parquet", table)
    data = store.read_bytes("x.parquet")
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for place in range(4, footer):
        flipped = bytearray(data)
        flipped[place] ^= 4
        store.write_bytes("x.parquet", flipped)
        try:
            assert sidecars.read_table(store, "x.parquet")["key"].equals(table["key"])
        except DeclipError:
            refused += 1
    assert refused > 0.8 * (footer - 4)
