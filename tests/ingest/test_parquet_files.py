"""Damaged parquet is refused by file and row group, and no extension type's code ever runs."""

import contextlib
import functools
import http.server
import io
import pickle
import random
import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_ingest.list_files import find_files
from declip_ingest.parquet_files import check_footer, open_parquet, read_batches
from declip_shards import DeclipError

TABLE = pa.table({"url": [f"http://a.example/{i}" for i in range(4000)], "n": list(range(4000))})


def write(folder, table=TABLE, **options) -> str:
    path = folder / "list.parquet"
    pq.write_table(table, path, row_group_size=1000, write_page_checksum=True, **options)
    return str(path)


def read(path: str, columns=("url", "n")) -> pa.Table:
    batches = [table for _, table in read_batches(find_files(path)[0], list(columns))]
    return pa.concat_tables(batches)


def refusal(path: str) -> str:
    with pytest.raises(DeclipError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_rows_in_order_and_all_bytes_told(tmp_path):
    path = write(tmp_path)
    assert read(path).equals(TABLE)
    parts = list(read_batches(find_files(path)[0], ["n"], max_rows=1500))
    assert sum(table.num_rows for _, table in parts) == 1500


def test_batches_are_bounded_in_bytes(tmp_path):
    long = pa.table({"url": ["x" * 300_000 + str(i) for i in range(300)], "n": range(300)})
    sizes = [t.nbytes for _, t in read_batches(find_files(write(tmp_path, long))[0], ["url"])]
    assert max(sizes) < 40 << 20
    assert len(sizes) > 2


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_cut_file_is_refused(tmp_path, share):
    path = write(tmp_path)
    with open(path, "rb") as f:
        data = f.read()
    with open(path, "wb") as f:
        f.write(data[: int(share * len(data))])
    assert "list.parquet" in refusal(path)


def test_a_flipped_bit_in_a_page_names_the_row_group(tmp_path):
    path = write(tmp_path)
    with pq.ParquetFile(path) as file:
        place = file.metadata.row_group(2).column(0).dictionary_page_offset + 200
    with open(path, "r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 0x10]))
    assert "in row group 2" in refusal(path)


def test_any_flipped_bit_is_read_right_or_refused_in_one_sentence(tmp_path):
    path = write(tmp_path)
    with open(path, "rb") as f:
        whole = f.read()
    chosen = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        with open(path, "wb") as f:
            f.write(data)
        with contextlib.suppress(DeclipError):
            # Bits of the footer's statistics and the like touch no value.
            assert read(path).num_rows == TABLE.num_rows


class Trap(pa.ExtensionType):  # type: ignore[misc]  # pyarrow has no types
    """A type whose code runs when Arrow meets it in a schema, as Ray's does."""

    sprung = 0

    def __init__(self) -> None:
        super().__init__(pa.int64(), "ray.data.arrow_trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return pickle.dumps("code")

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        Trap.sprung += 1
        return cls()


def test_extension_types_are_refused_before_their_code_runs(tmp_path):
    kind = Trap()
    table = TABLE.append_column("x", pa.ExtensionArray.from_storage(kind, TABLE["n"].chunk(0)))
    path = write(tmp_path, table)
    pa.register_extension_type(kind)
    try:
        before = Trap.sprung
        said = refusal(path)
        assert Trap.sprung == before
        assert "ray.data.arrow_trap" in said
        assert "as plain columns" in said
        with pq.ParquetFile(path) as file:
            assert file.schema_arrow is not None
        assert Trap.sprung > before, "the danger is real: opening the file runs the type's code"
    finally:
        pa.unregister_extension_type("ray.data.arrow_trap")


def test_rays_own_tensors_are_refused(tmp_path):
    from ray.data._internal.tensor_extensions.arrow import ArrowTensorArray

    tensors = ArrowTensorArray.from_numpy(np.zeros((4000, 2), np.float32))
    path = write(tmp_path, TABLE.append_column("image", tensors))
    assert "extension types" in refusal(path)


def test_arrows_own_types_are_no_danger(tmp_path):
    values = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}"] * 4000))
    path = write(tmp_path, TABLE.append_column("meta", values))
    assert read(path).equals(TABLE)


def test_a_stored_schema_that_cannot_be_read_is_refused(tmp_path):
    path = write(tmp_path)
    with open(path, "rb") as f:
        data = bytearray(f.read())
    at = data.index(b"ARROW:schema") + len(b"ARROW:schema")
    data[at + 10] = 0xFF
    with pytest.raises(DeclipError, match="stored schema cannot be read"):
        check_footer(io.BytesIO(bytes(data)), "x")


class Whole(http.server.SimpleHTTPRequestHandler):
    """A web server that knows no parts of files."""

    def log_message(self, *arguments: object) -> None:
        pass


class Ranges(Whole):
    """A web server that sends parts of files."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(self.content())))
        self.end_headers()

    def do_GET(self) -> None:
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        data = self.content()
        start = int(asked[1]) if asked else 0
        part = data[start : int(asked[2]) + 1 if asked and asked[2] else None]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def content(self) -> bytes:
        return Path(self.translate_path(self.path)).read_bytes()


@pytest.mark.parametrize("handler", [Whole, Ranges])
def test_a_web_server_must_be_able_to_send_parts(tmp_path, handler):
    write(tmp_path)
    serve = functools.partial(handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/list.parquet"
        if handler is Ranges:
            assert read(url).equals(TABLE)
        else:
            assert "cannot send parts of a file" in refusal(url)
        server.shutdown()


def test_what_is_no_parquet_is_refused(tmp_path):
    path = tmp_path / "list.parquet"
    path.write_bytes(b"url,caption\n" * 9)
    with (
        pytest.raises(DeclipError, match="does not end as a parquet file does"),
        open_parquet(find_files(str(path))[0]),
    ):
        pass
