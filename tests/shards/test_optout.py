"""The opt-out list, and taking samples out of a shard."""

import hashlib
import json
import random
import tarfile
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError, Sample, Store, layout, read_samples, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.optout import (
    KEPT_COLUMNS,
    LIST,
    REASON,
    Kind,
    OptOut,
    clear_ledger,
    clear_rows,
    drop_from_shard,
    drop_members,
    load_optout,
    make_optout,
    stored_digests,
)
from declip_shards.validation import check_shard
from declip_shards.writer import pack_tar

SHARD = "00000"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write_fake_dataset(str(tmp_path / "data"), fail_every=5)


# The list ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        "https://example.org/a/~b?x=1&y=%C3%A9",
        "http://EXAMPLE.org:80/a/~b?x=1&y=é",
        "HTTPS://example.ORG:443/a/%7Eb?x=1&y=%c3%a9#top",
        "  https://example.org/a/%7eb?x=1&y=é\n",
    ],
)
def test_spellings_of_one_url_are_one(spelling):
    listed = make_optout([("url", "https://example.org/a/~b?x=1&y=%C3%A9")])
    assert listed.blocks_url(spelling)


@pytest.mark.parametrize(
    "other",
    [
        "https://example.org/a/B",
        "https://example.org/a/b/",
        "https://www.example.org/a/b",
        "https://example.org:8443/a/b",
        "https://example.org/a/b?x",
        "https://example.org/a%2Fb",
        "ftp://example.org/a/b",
        "",
        "http://[",
        None,
    ],
)
def test_other_urls_are_not(other):
    assert not make_optout([("url", "https://example.org/a/b")]).blocks_url(other)


def test_the_list_is_read_back_and_its_order_does_not_matter(store):
    entries: list[tuple[Kind, str]] = [
        ("url", "https://example.org/a"),
        ("key", "0000001"),
        ("sha256", "AB" * 32),
        ("md5", "cd" * 16),
    ]
    first = make_optout(entries)
    random.Random(1).shuffle(entries)
    assert make_optout([*entries, entries[0]]).pack() == first.pack()
    store.write_bytes(LIST, first.pack())
    loaded = load_optout(store)
    assert loaded == first.lasting() != first
    assert loaded.pack() == first.pack()
    assert len(loaded) == 3
    assert loaded.blocks_content("ab" * 32)
    assert not loaded.blocks_content(None)
    assert "example" not in store.read_bytes(LIST).decode("latin-1")


def test_a_key_counts_where_it_is_given_and_is_never_kept(store):
    """After a change of the shard size it would be another row's."""
    listed = make_optout([("key", "0000001")])
    store.write_bytes(LIST, listed.pack())
    assert not load_optout(store)
    # What an early version kept.
    digest = hashlib.sha256(b"0000001").hexdigest()
    old = pa.table({"kind": ["key", "url"], "digest": [digest, "ab"]})
    sidecars.write_table(store, LIST, old)
    assert load_optout(store).pairs() == [("url", "ab")]


def test_no_list_blocks_nothing(store):
    nothing = load_optout(store)
    assert not nothing
    assert not nothing.blocks_url("https://example.org/a")
    assert not nothing.blocks_bytes(b"any")
    assert OptOut() | nothing == nothing | OptOut()


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_bytes_are_blocked_by_their_hash(algorithm):
    listed = make_optout(
        [(cast(Kind, algorithm), hashlib.new(algorithm, b"a picture").hexdigest())]
    )
    assert listed.blocks_bytes(b"a picture")
    assert not listed.blocks_bytes(b"another")


def test_a_list_that_cannot_be_read_is_not_an_empty_one(store):
    store.write_bytes(LIST, b"PAR1 but damaged")
    with pytest.raises(DeclipError, match="is damaged"):
        load_optout(store)
    table = pa.table({"kind": ["phone"], "digest": ["00"]})
    store.write_bytes(LIST, sidecars.pack_table(table))
    with pytest.raises(DeclipError, match=r"entry of kind 'phone'.* upgrade opendeclip"):
        load_optout(store)


# Shards ------------------------------------------------------------------------------------------


def apply(store: Store, keys: set[str]) -> None:
    for path, data in drop_from_shard(store, SHARD, keys).items():
        if data is None:
            store.remove(path)
        else:
            store.write_bytes(path, data)


def test_dropping_is_as_writing_without(tmp_path):
    """The tar of the remaining samples, byte for byte."""
    samples = [
        Sample(key=f"{n:07d}", image=bytes([n]) * (n * 300 + 1), caption="é" * n, metadata={"n": n})
        for n in range(12)
    ]
    store = Store(str(tmp_path))
    store.write_bytes("all.tar", pack_tar(samples))
    for gone in (set(), {0}, {11}, {3, 4, 9}, set(range(12))):
        keys = {f"{n:07d}" for n in gone}
        less = drop_members(store, "all.tar", keys)
        expected = pack_tar(s for s in samples if s.key not in keys)
        assert (less is None) == (not gone)
        assert less in (None, expected)


@settings(max_examples=15, deadline=None)
@given(first=st.sets(st.integers(0, 23)), second=st.sets(st.integers(0, 23)))
def test_first_some_then_others_is_all_at_once(tmp_path_factory, first, second):
    stores = [
        write_fake_dataset(str(tmp_path_factory.mktemp("d")), num_shards=1, fail_every=5)
        for _ in range(2)
    ]
    one, other = ({f"00000{n:02d}" for n in chosen} for chosen in (first, second))
    apply(stores[0], one)
    apply(stores[0], other)
    apply(stores[1], one | other)
    for path in (layout.tar_path(SHARD), layout.shard_parquet_path(SHARD)):
        assert stores[0].read_bytes(path) == stores[1].read_bytes(path)
    assert drop_from_shard(stores[0], SHARD, one | other) == {}
    assert check_shard(stores[0], SHARD) == []
    left = {s.key for s in read_samples(stores[0], SHARD)}
    assert not left & (one | other)


def test_what_another_tool_put_into_a_tar_stays_as_it_was(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "a.cls", "b.jpg", "b.cls", "c.jpg"):
            (tmp_path / "f").write_bytes(name.encode() * 99)
            info = tar.gettarinfo(str(tmp_path / "f"), name)
            info.pax_headers = {"comment": "kept: " + "ü" * 200}
            with (tmp_path / "f").open("rb") as f:
                tar.addfile(info, f)
    less = drop_members(Store(str(tmp_path)), "x.tar", {"b"})
    assert less is not None
    (tmp_path / "y.tar").write_bytes(less)
    with tarfile.open(path) as before, tarfile.open(tmp_path / "y.tar") as after:
        kept = [m for m in before if not m.name.startswith("b")]
        assert [m.name for m in after] == [m.name for m in kept]
        for member in kept:
            same = after.getmember(member.name)
            assert dict(same.get_info()) == dict(member.get_info())
            assert same.pax_headers == member.pax_headers
            ours, theirs = after.extractfile(same), before.extractfile(member)
            assert ours is not None
            assert theirs is not None
            assert ours.read() == theirs.read()


def test_a_cut_tar_is_refused(store):
    data = store.read_bytes(layout.tar_path(SHARD))
    store.write_bytes(layout.tar_path(SHARD), data[: len(data) // 2])
    with pytest.raises(DeclipError, match=r"damaged|not a readable tar"):
        drop_from_shard(store, SHARD, {"0000001"})


def test_a_cleared_row_keeps_its_place_and_nothing_else(store):
    before = sidecars.read_table(store, layout.shard_parquet_path(SHARD))
    nested = pa.array([[[0.1, 0.2]]] * before.num_rows, pa.list_(pa.list_(pa.float64())))
    before = before.append_column("boxes", nested)
    cleared = clear_rows(before, {"0000002", "0000004"})  # a success and a failure
    assert cleared is not None
    assert cleared.schema == before.schema
    for old, new in zip(before.to_pylist(), cleared.to_pylist(), strict=True):
        if old["key"] in ("0000002", "0000004"):
            assert {n for n, value in new.items() if value is not None} == set(KEPT_COLUMNS)
            assert new["error_message"] == REASON
        else:
            assert new == old
    assert clear_rows(cleared, {"0000002", "0000004"}) is None


def test_stats_are_counted_again_and_times_stay(store):
    path = layout.shard_stats_path(SHARD)
    stats = json.loads(store.read_bytes(path)) | {"duration": 2.5, "ours": "kept"}
    store.write_bytes(path, json.dumps(stats).encode())
    apply(store, {"0000002", "0000004"})
    now = json.loads(store.read_bytes(path))
    assert (now["count"], now["successes"], now["failed_to_download"]) == (24, 19, 5)
    assert now["status_dict"] == {"success": 19, "http_404": 3, REASON: 2}
    assert (now["duration"], now["ours"]) == (2.5, "kept")


def test_the_ledger_forgets_where_a_row_came_from_and_quarantine_its_bytes(store):
    rows = [
        {
            "key": f"000000{n}",
            "url": f"https://host{n}.example/a",
            "host": f"host{n}.example",
            "status": "success",
            "reason": "",
            "detail": "what",
            "http_status": 200,
            "attempts": 3,
            "milliseconds": 120,
            "num_bytes": 999,
            "attempted_at": "2026-01-01T00:00:00Z",
        }
        for n in range(3)
    ]
    table = pa.Table.from_pylist(rows)
    sidecars.write_table(store, layout.ledger_path(SHARD), table)
    store.write_bytes(layout.quarantine_path("0000001"), b"a bomb")
    apply(store, {"0000001"})
    after = sidecars.read_rows(store, layout.ledger_path(SHARD))
    assert [after[0], after[2]] == [rows[0], rows[2]]
    assert after[1] == rows[1] | {
        "url": None,
        "host": "",
        "detail": "",
        "status": "failed_to_download",
        "reason": REASON,
        "http_status": None,
        "num_bytes": None,
    }
    assert not store.exists(layout.quarantine_path("0000001"))
    assert clear_ledger(sidecars.read_table(store, layout.ledger_path(SHARD)), {"0000001"}) is None


def test_digests_of_stored_pictures_are_of_their_bytes(store):
    found = stored_digests(store, SHARD)
    samples = list(read_samples(store, SHARD))
    assert list(found) == [s.key for s in samples]
    for sample in samples:
        sha256, md5 = found[sample.key]
        assert sha256 == hashlib.sha256(sample.image).hexdigest()
        assert md5 == hashlib.md5(sample.image).hexdigest()
