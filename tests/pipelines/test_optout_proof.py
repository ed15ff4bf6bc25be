"""The search finds what is there, wherever it hides: else finding nothing would prove nothing."""

import base64
import gzip
import hashlib
import html
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from declip_shards import Sample, Store, sidecars
from declip_shards.fakes import draw, write_fake_dataset
from declip_shards.writer import pack_tar
from pipelines import optout_proof
from pipelines.optout_proof import (
    Removed,
    explain,
    list_files,
    make_search,
    picture_slice,
    search_dataset,
)

PICTURE = draw("red", "circle", 64, np.random.default_rng(9))
STORED = hashlib.sha256(PICTURE).hexdigest()
CAPTION = 'the "very own" naïve caption <of> one sample & no other'
SAMPLE = Removed(
    key="000010017",
    shard="00001",
    was_stored=True,
    url="https://example.org/p?a=1&b=ü",
    caption=CAPTION,
    digests=("12" * 32, STORED),
    picture=picture_slice(PICTURE),
)


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.txt", f"x {CAPTION} y")
    return sink.getvalue()


def npz() -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, keys=np.array([SAMPLE.key.encode()] * 3))
    return sink.getvalue()


def npy() -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array(["000010016", "000010017"]))
    return sink.getvalue()


def parquet(values: pa.Array) -> bytes:
    return sidecars.pack_table(pa.table({"n": [1] * len(values), "hidden": values}))


NESTED = pa.array(
    [[{"deep": ["nothing", CAPTION]}]], pa.list_(pa.struct([("deep", pa.list_(pa.string()))]))
)
PLACES = {
    "text.txt": (f"… {CAPTION} …".encode(), "caption", "bytes"),
    "escaped.json": (json.dumps({"c": CAPTION}).encode(), "caption", "bytes"),
    "plain.json": (json.dumps({"c": CAPTION}, ensure_ascii=False).encode(), "caption", "bytes"),
    "page.html": (f"<b>{html.escape(CAPTION)}</b>".encode(), "caption", "bytes"),
    "link.html": (b"href=https://example.org/p?a=1&amp;b=\xc3\xbc>", "url", "bytes"),
    "numbers.csv": (b"1,000010017,2", "key", "bytes"),
    "digest.csv": (b"sha256:" + b"12" * 32, "digest", "bytes"),
    "packed.zip": (zipped(), "caption", "member inside.txt"),
    "packed.gz": (gzip.compress(CAPTION.encode()), "caption", "bytes"),
    "arrays.npz": (npz(), "key", "member keys.npy"),
    "array.npy": (npy(), "key", "bytes"),
    "nested.parquet": (parquet(NESTED), "caption", "column hidden"),
    "names.parquet": (
        parquet(pa.array(["000010016", "000010017"]).dictionary_encode()),
        "key",
        "column hidden",
    ),
    "binary.parquet": (parquet(pa.array([b"..", PICTURE])), "picture", "column hidden"),
    "picture.html": (b"data:image/jpeg;base64," + base64.b64encode(PICTURE), "picture", "bytes"),
    "copy.jpg": (PICTURE, "picture", "bytes"),
    "000010017.bin": (b"anything", "key", "file name"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_hidden_is_found(tmp_path, name):
    """The negative control of every proof: each place, and it alone."""
    store = write_fake_dataset(str(tmp_path / "data"), num_shards=1)
    data, what, where = PLACES[name]
    search, digests = make_search([SAMPLE]), SAMPLE.digests
    clean = search_dataset(store, search, digests)
    assert clean.hits == []
    assert clean.num_files == 3
    store.write_bytes(f"notes/{name}", data)
    found = search_dataset(store, search, digests)
    assert found.num_files == 4
    assert found.hits
    assert {hit.path for hit in found.hits} == {f"notes/{name}"}
    assert (what, where) in {(hit.what, hit.where) for hit in found.hits}


def test_a_picture_in_a_tar_is_found_by_its_bytes_and_its_hash(tmp_path):
    store = Store(str(tmp_path))
    sample = Sample(key="000009999", image=PICTURE, caption="", metadata={})
    store.write_bytes("shards/00009.tar", pack_tar([sample]))
    hits = search_dataset(store, make_search([SAMPLE]), SAMPLE.digests).hits
    assert {(hit.where, hit.what) for hit in hits} == {("bytes", "picture"), ("member", "picture")}
    sample = Sample(key=SAMPLE.key, image=b"another", caption=CAPTION, metadata={"k": SAMPLE.key})
    store.write_bytes("shards/00009.tar", pack_tar([sample]))
    hits = search_dataset(store, make_search([SAMPLE]), SAMPLE.digests).hits
    assert {(hit.where, hit.what, hit.count) for hit in hits} == {
        ("member name", "key", 3),
        ("bytes", "key", 1),
        ("bytes", "caption", 1),
    }


@pytest.mark.parametrize("key", ["0000000", "0000644"])
def test_owner_and_mode_in_a_tars_headers_are_no_keys(tmp_path, key):
    store = Store(str(tmp_path))
    sample = Sample(key="0000123", image=PICTURE, caption="", metadata={})
    store.write_bytes("shards/00000.tar", pack_tar([sample]))
    search = make_search([Removed(key=key, shard=key[:5], was_stored=True)])
    assert search_dataset(store, search, ()).hits == []


def test_a_file_that_is_no_tar_is_searched_all_the_same(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("broken.tar", b"not a tar, but " + CAPTION.encode() * 30)
    (hit,) = search_dataset(store, make_search([SAMPLE]), SAMPLE.digests).hits
    assert (hit.where, hit.count) == ("bytes", 30)


def test_numbers_that_only_contain_the_key_are_no_hits(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("a.txt", b"9000010017 0000100170 a000010017")
    assert search_dataset(store, make_search([SAMPLE]), ()).hits == []


def test_rows_that_keep_their_place_are_counted_apart(tmp_path):
    store = Store(str(tmp_path))
    table = pa.table({"key": [SAMPLE.key], "url": [None]})
    for path in ("shards/00001.parquet", "ledger/ingest/00001.parquet", "signals/x/00001.parquet"):
        sidecars.write_table(store, path, table)
    proof = search_dataset(store, make_search([SAMPLE]), ())
    assert proof.num_kept_keys == 2
    assert {hit.path for hit in proof.hits} == {"signals/x/00001.parquet"}


def test_windows_neither_cut_nor_count_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(optout_proof, "WINDOW", 300)
    monkeypatch.setattr(optout_proof, "OVERLAP", 100)
    store = Store(str(tmp_path))
    for start in range(150, 330, 7):
        store.write_bytes("a.txt", b"-" * start + CAPTION.encode() + b"-" * 900)
        (hit,) = search_dataset(store, make_search([SAMPLE]), ()).hits
        assert hit.count == 1


def test_what_others_have_too_and_short_captions_are_not_searched_for():
    short = Removed(key="000000001", shard="00000", was_stored=True, caption="a red car")
    assert set(make_search([short]).labels.values()) == {"key"}
    shared = make_search([SAMPLE], shared=[CAPTION, STORED])
    # A picture that another URL has too proves nothing either.
    assert sorted(set(shared.labels.values())) == ["digest", "key", "url"]
    assert set(make_search([SAMPLE]).labels.values()) == {
        "caption",
        "digest",
        "key",
        "picture",
        "url",
    }


def test_flat_and_tiny_pictures_have_nothing_of_their_own():
    assert picture_slice(b"") == ""
    assert picture_slice(b"\xff\xd8" + b"\0" * 999) == ""
    assert bytes.fromhex(SAMPLE.picture) in PICTURE


def test_half_written_files_locks_and_the_change_under_way_are_left_out(tmp_path):
    store = Store(str(tmp_path))
    for path in (
        "a",
        "b/.part-1",
        "staging/x/1",
        "manifests/lock",
        "manifests/tasks.lock",
        "optout/pending.json",
        "optout/list.parquet",
    ):
        Path(tmp_path, path).parent.mkdir(parents=True, exist_ok=True)
        Path(tmp_path, path).write_bytes(b"x")
    assert list_files(store) == ["a", "optout/list.parquet"]


def test_every_place_has_its_why():
    assert explain("source/pairs.parquet").startswith("your own list; remove it there")
    assert "training" in explain("train/log.jsonl")
    assert "by hand" in explain("elsewhere/x")
