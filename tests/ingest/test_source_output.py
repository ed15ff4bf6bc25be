"""A table appears whole or not at all, and its bytes tell nothing of how its rows came."""

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest.source_output import GROUP_ROWS, publish_table
from declip_shards import Store

SCHEMA = pa.schema([("url", pa.string()), ("n", pa.int64())])
ROWS = pa.table({"url": [f"http://a.example/{i}" for i in range(25_000)], "n": list(range(25_000))})


def write(root: str, cuts: list[int]) -> bytes:
    store = Store(root)
    edges = [0, *sorted(cuts), ROWS.num_rows]
    with publish_table(store, "source/t.parquet", SCHEMA) as writer:
        for start, stop in itertools.pairwise(edges):
            writer.write(ROWS.slice(start, stop - start))
    return store.read_bytes("source/t.parquet")


@given(st.lists(st.integers(0, ROWS.num_rows), max_size=6))
@settings(max_examples=8, deadline=None)
def test_the_bytes_do_not_depend_on_the_pieces(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("t")
    assert write(f"{folder}/a", cuts) == write(f"{folder}/b", [])


def test_row_groups_are_small_enough_to_read_a_range(tmp_path):
    write(str(tmp_path), [3])
    with pq.ParquetFile(tmp_path / "source/t.parquet") as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert sizes == [GROUP_ROWS, GROUP_ROWS, 5000]
        assert file.read().equals(ROWS)


def test_a_missing_column_is_null(tmp_path):
    with publish_table(Store(str(tmp_path)), "t.parquet", SCHEMA) as writer:
        writer.write(pa.table({"url": ["x"]}))
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == [{"url": "x", "n": None}]


def test_no_rows_are_a_table_too(tmp_path):
    with publish_table(Store(str(tmp_path)), "t.parquet", SCHEMA):
        pass
    assert pq.read_table(tmp_path / "t.parquet").schema.equals(SCHEMA)


def write_half(store: Store) -> None:
    with publish_table(store, "t.parquet", SCHEMA) as writer:
        writer.write(ROWS)
        raise RuntimeError("half way")


@pytest.mark.parametrize("root", ["{tmp}/out", "memory://sources-output"])
def test_a_fault_on_the_way_leaves_what_was_there(tmp_path, root):
    store = Store(root.format(tmp=tmp_path))
    with publish_table(store, "t.parquet", SCHEMA) as writer:
        writer.write(ROWS.slice(0, 10))
    before = store.read_bytes("t.parquet")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(store)
    assert store.read_bytes("t.parquet") == before
    names = [name.rpartition("/")[2] for name in store.fs.find(store.root)]
    assert names == ["t.parquet"]
