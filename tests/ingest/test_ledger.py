"""The ledger: the reader inverts the writer, attempts add up, removed rows lose their names."""

import dataclasses
import random

import pytest

from declip_ingest.ledger import (
    SCHEMA,
    LedgerRow,
    iter_ledgers,
    list_ledgers,
    merge_row,
    merge_rows,
    read_ledger,
    read_ledger_rows,
    utc_now,
    write_ledger,
)
from declip_shards import DeclipError, Store, layout


def make_rows(shard: int, count: int = 7) -> list[LedgerRow]:
    rows = []
    for i in range(count):
        failed = i % 3 == 1
        rows.append(
            LedgerRow(
                key=layout.sample_key(shard, i, 10),
                url=None if i == 6 else f"https://host{i % 2}.example/{shard}/{i}.jpg?ü=漢",
                host=f"host{i % 2}.example",
                status="failed_to_download" if failed else "success",
                reason="timeout" if failed else "",
                detail="body" if failed else "",
                http_status=None if failed else 200,
                attempts=i,
                milliseconds=100 * i,
                num_bytes=None if failed else 1 << 33,
                attempted_at=utc_now(),
            )
        )
    return rows


def test_the_reader_inverts_the_writer_whatever_the_order(tmp_path):
    store, rows = Store(str(tmp_path)), make_rows(3)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert write_ledger(store, "00003", shuffled) == layout.ledger_path("00003")
    assert list(read_ledger_rows(store, "00003").values()) == rows
    first = store.read_bytes(layout.ledger_path("00003"))
    write_ledger(store, "00003", rows)
    assert store.read_bytes(layout.ledger_path("00003")) == first
    assert read_ledger(store, "00003").schema.names == SCHEMA.names


def test_all_shards_are_one_table_in_order(tmp_path):
    store = Store(str(tmp_path))
    for shard in (2, 0, 1):
        write_ledger(store, layout.shard_name(shard), make_rows(shard))
    store.write_bytes("ledger/ingest/settings.json", b"{}")
    assert list_ledgers(store) == ["00000", "00001", "00002"]
    keys = read_ledger(store, columns=["key"])["key"].to_pylist()
    assert keys == [row.key for shard in range(3) for row in make_rows(shard)]
    assert [table.num_rows for _, table in iter_ledgers(store)] == [7, 7, 7]


def test_an_empty_ledger_is_a_ledger(tmp_path):
    store = Store(str(tmp_path))
    write_ledger(store, "00000", [])
    assert read_ledger(store, "00000").schema.names == SCHEMA.names
    assert read_ledger_rows(store, "00000") == {}


def test_nothing_that_names_a_removed_row_is_kept(tmp_path):
    store = Store(str(tmp_path))
    row = dataclasses.replace(make_rows(0)[1], reason="opt_out_list", detail="")
    write_ledger(store, "00000", [row])
    (kept,) = read_ledger_rows(store, "00000").values()
    assert (kept.key, kept.url, kept.host) == (row.key, None, "")
    assert b"example" not in store.read_bytes(layout.ledger_path("00000"))


def test_attempts_add_up_and_the_last_outcome_counts():
    old = make_rows(0)
    again = [dataclasses.replace(old[4], status="success", reason="", detail="", attempts=3)]
    merged = merge_rows({row.key: row for row in old}, again)
    assert len(merged) == len(old)
    for before, after in zip(old, merged):
        if after.key == old[4].key:
            assert after == dataclasses.replace(again[0], attempts=before.attempts + 3)
        else:
            assert after == before
    assert merge_row(None, old[2]) == old[2]
    with pytest.raises(ValueError, match="two keys"):
        merge_row(old[0], old[1])


def test_merging_one_after_the_other_is_merging_the_sums():
    rows = make_rows(0)
    known = {row.key: row for row in rows}
    once = merge_rows({r.key: r for r in merge_rows(known, rows)}, rows)
    assert [row.attempts for row in once] == [3 * row.attempts for row in rows]


def test_a_missing_ledger_is_named(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(DeclipError, match=r"has no ledger .* run declip run first"):
        read_ledger(store)
    with pytest.raises(DeclipError, match=r"ledger/ingest/00000\.parquet' is missing"):
        read_ledger(store, "00000")


def test_a_damaged_ledger_is_named(tmp_path):
    store = Store(str(tmp_path))
    path = write_ledger(store, "00000", make_rows(0))
    data = bytearray(store.read_bytes(path))
    data[40] ^= 0xFF
    store.write_bytes(path, data)
    with pytest.raises(DeclipError, match="damaged"):
        read_ledger_rows(store, "00000")
