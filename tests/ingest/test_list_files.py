"""Lists are found wherever they lie, unpacked whatever packs them, and known by their bytes."""

import bz2
import functools
import gzip
import http.server
import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from declip_ingest.list_files import find_files, location_digest, open_stream, read_head
from declip_shards import DeclipError

TEXT = b"url\tcaption\n" * 5000


def content(location: str) -> bytes:
    (file,) = find_files(location)
    with open_stream(file) as stream:
        return b"".join(iter(lambda: stream.read(4096), b""))


def names(location: str) -> list[str]:
    return [file.name for file in find_files(location)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as f:
        f.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".x", zstd)]
)
def test_packed_files_are_told_by_their_bytes(tmp_path, ending, pack):
    path = tmp_path / f"t.tsv{ending}"
    path.write_bytes(pack(TEXT))
    assert content(str(path)) == TEXT
    assert read_head(find_files(str(path))[0], 20) == TEXT[:20]


def test_a_file_of_several_packed_pieces_is_read_to_its_end(tmp_path):
    for ending, pack in (("gz", gzip.compress), ("bz2", bz2.compress)):
        path = tmp_path / f"t.{ending}"
        path.write_bytes(pack(TEXT) + pack(b"more"))
        assert content(str(path)) == TEXT + b"more"


def test_every_stored_byte_is_told(tmp_path):
    path = tmp_path / "t.bz2"
    path.write_bytes(bz2.compress(TEXT))
    told: list[int] = []
    (file,) = find_files(str(path))
    with open_stream(file, told.append) as stream:
        while stream.read(4096):
            pass
    assert sum(told) == path.stat().st_size == file.size


def test_folders_globs_and_what_is_left_out(tmp_path):
    for name in ("b.tsv", "a.tsv", "sub/c.csv", "_x.tsv", ".y.tsv", "README.md", "0_stats.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert names(str(tmp_path)) == ["a.tsv", "b.tsv", "sub/c.csv"]
    assert names(str(tmp_path / "[ab].*")) == ["a.tsv", "b.tsv"]
    (tmp_path / "z.parquet").write_text("x")
    assert names(str(tmp_path)) == ["z.parquet"]


def test_yfccs_unpacked_files_have_no_ending(tmp_path):
    for name in ("yfcc100m_dataset-1", "yfcc100m_dataset-0", "notes"):
        (tmp_path / name).write_text("x")
    assert names(str(tmp_path)) == ["yfcc100m_dataset-0", "yfcc100m_dataset-1"]


def test_object_stores_and_web_servers(tmp_path):
    fsspec.filesystem("memory").pipe_file("/lists/t.tsv.gz", gzip.compress(TEXT))
    assert content("memory://lists/t.tsv.gz") == TEXT
    assert names("memory://lists") == ["t.tsv.gz"]
    (tmp_path / "t.tsv.bz2").write_bytes(bz2.compress(TEXT))
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": _silent})
    handler = functools.partial(quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/t.tsv.bz2"
        assert content(url) == TEXT
        assert names(url) == ["t.tsv.bz2"]
        with pytest.raises(DeclipError, match=r"none\.tsv' does not exist"):
            find_files(f"http://127.0.0.1:{server.server_port}/none.tsv")
        assert location_digest(url) == location_digest(str(tmp_path / "t.tsv.bz2"))
        server.shutdown()


def _silent(self: object, *args: object) -> None:
    pass


def test_the_digest_is_of_names_order_and_bytes_not_of_the_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("1.tsv", "2.tsv"):
            (tmp_path / folder / name).write_text(name)
    first, second = (location_digest(str(tmp_path / folder)) for folder in ("a", "b"))
    assert first == second
    (tmp_path / "b" / "2.tsv").write_text("2.tsV")
    changed = location_digest(str(tmp_path / "b"))
    assert changed != second
    (tmp_path / "a" / "2.tsv").rename(tmp_path / "a" / "3.tsv")
    assert location_digest(str(tmp_path / "a")) not in (first, changed)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("{tmp}/none.tsv", "does not exist"),
        ("{tmp}/*.tsv", "no file matches"),
        ("{tmp}", "holds no list"),
        ("nosuch://bucket/x.tsv", "cannot be reached"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, location, said):
    location = location.format(tmp=tmp_path)
    with pytest.raises(DeclipError, match=said) as caught:
        find_files(location)
    assert location in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n\r\n "])
def test_an_empty_file_is_refused(tmp_path, data):
    path = Path(tmp_path, "t.tsv")
    path.write_bytes(data)
    with pytest.raises(DeclipError, match=r"t\.tsv' is empty"):
        read_head(find_files(str(path))[0])
