"""Tables come back as they were written; each fault has one sentence that names it."""

import gzip
import itertools
import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_ingest.table import (
    RESERVED_COLUMNS,
    PairTable,
    open_pairs,
    plan_shards,
    table_digest,
)
from declip_shards import DeclipError

ROWS = [
    {"url": "http://a.example/1.jpg", "caption": "a red apple", "label": "apple"},
    {"url": "http://a.example/2.jpg", "caption": 'say "hi",\nüñí  tab\t 漢字', "label": "007"},
    {"url": "http://a.example/3.jpg", "caption": "1984", "label": ""},
]
FORMATS = ["parquet", "csv", "tsv", "json", "jsonl", "csv.gz", "jsonl.gz"]


def write(folder, kind: str, rows=ROWS) -> str:
    path = folder / f"pairs.{kind}"
    bare = kind.removesuffix(".gz")
    table = pa.Table.from_pylist(rows)
    if bare == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif bare in ("csv", "tsv"):
        pa_csv.write_csv(table, path, pa_csv.WriteOptions(delimiter="," if bare == "csv" else "\t"))
    else:
        lines = [json.dumps(r) for r in rows]
        path.write_text("[" + ",".join(lines) + "]" if bare == "json" else "\n".join(lines) + "\n")
    if kind.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return str(path)


def everything(pairs: PairTable) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pairs.read(0, pairs.num_rows).to_pylist()
    return rows


def read_all(location: str, **settings) -> list[dict[str, Any]]:
    return everything(open_pairs(location, **settings))


def refusal(location: str, **settings) -> str:
    with pytest.raises(DeclipError) as caught:
        read_all(location, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_inverts_writing_in_every_format(tmp_path, kind):
    pairs = open_pairs(write(tmp_path, kind))
    assert pairs.num_rows == 3
    assert everything(pairs) == ROWS
    assert pairs.schema.names == ["url", "caption", "label"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_slices_cover_the_table_once(tmp_path, kind, size):
    pairs = open_pairs(write(tmp_path, kind))
    parts = [pairs.read(i, min(i + size, 3)).to_pylist() for i in range(0, 3, size)]
    assert list(itertools.chain.from_iterable(parts)) == ROWS


def test_columns_are_renamed_and_chosen(tmp_path):
    rows = [{"URL": r["url"], "TEXT": r["caption"], "n": 1, "m": 2.5} for r in ROWS]
    names: dict[str, Any] = {"url_column": "URL", "caption_column": "TEXT"}
    path = write(tmp_path, "parquet", rows)
    assert open_pairs(path, **names).schema.names == ["url", "caption", "n", "m"]
    assert open_pairs(path, extra_columns=("m",), **names).schema.names == ["url", "caption", "m"]
    assert open_pairs(path, extra_columns=(), **names).schema.names == ["url", "caption"]


def test_the_format_can_be_named_where_the_ending_says_nothing(tmp_path):
    path = tmp_path / "list"
    path.write_text("url,caption\nhttp://a.example/,x\n")
    assert "table_format" in refusal(str(path))
    assert open_pairs(str(path), table_format="csv").num_rows == 1
    assert "Did you mean 'parquet'" in refusal(str(path), table_format="parket")


def test_any_fsspec_url_will_do(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    with open(write(tmp_path, "parquet"), "rb") as f:
        fs.pipe_file("/tables/pairs.parquet", f.read())
    assert everything(open_pairs("memory://tables/pairs.parquet")) == ROWS


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path):
    for kind, text in (
        ("csv", "url,caption\nhttp://a.example/,x\n"),
        ("jsonl", '{"url": "http://a.example/", "caption": "x"}\n'),
    ):
        path = tmp_path / f"bom.{kind}"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert everything(open_pairs(str(path))) == [{"url": "http://a.example/", "caption": "x"}]


def test_nulls_are_left_to_the_row(tmp_path):
    rows = [ROWS[0], {"url": None, "caption": "x", "label": None}, {**ROWS[1], "caption": None}]
    for kind in ("parquet", "json", "jsonl"):
        assert everything(open_pairs(write(tmp_path, kind, rows))) == rows


def test_dictionary_and_large_strings_are_text(tmp_path):
    table = pa.table(
        {
            "url": pa.array(["http://a.example/"], pa.large_string()),
            "caption": pa.array(["x"]).dictionary_encode(),
        }
    )
    path = str(tmp_path / "t.parquet")
    pq.write_table(table, path)
    assert everything(open_pairs(path)) == [{"url": "http://a.example/", "caption": "x"}]


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for kind in ("parquet", "csv"):
        missing = str(tmp_path / f"none.{kind}")
        assert missing in refusal(missing)
        assert "does not exist" in refusal(missing)
        folder = tmp_path / f"folder.{kind}"
        folder.mkdir()
        assert "is a folder; give the file itself" in refusal(str(folder))


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_empty_files_and_tables_are_refused(tmp_path, kind):
    path = tmp_path / f"none.{kind}"
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(str(path))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), path)
    elif kind == "csv":
        path.write_text("url,caption\n")
    else:
        path.write_text("[]" if kind == "json" else "\n")
        assert refusal(str(path)).endswith(("at least one.", "write it again."))
        return
    assert "has no rows" in refusal(str(path))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_missing_column_is_named_with_the_nearest(tmp_path, kind):
    rows = [{"url": "http://a.example/", "captions": "x"}]
    text = refusal(write(tmp_path, kind, rows))
    assert "has no column 'caption' (set by caption_column)" in text
    assert "Did you mean 'captions'" in text
    assert "captions, url" in text
    text = refusal(write(tmp_path, kind), extra_columns=("labl",))
    assert "'labl' (set by extra_columns)" in text
    assert "Did you mean 'label'" in text


@pytest.mark.parametrize("column", ["url", "caption", "label"])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_two_columns_of_one_name_are_refused_unless_left_out(tmp_path, kind, column):
    table = pa.table([["http://a/"], ["x"], ["y"], ["z"]], ["url", "caption", "label", column])
    path = tmp_path / f"t.{kind}"
    if kind == "csv":
        path.write_text(f"url,caption,label,{column}\nhttp://a/,x,y,z\n")
    else:
        pq.write_table(table, path)
    with pytest.raises(DeclipError, match=f"2 columns named '{column}', and nothing says which"):
        open_pairs(str(path))
    if column == "label":
        assert open_pairs(str(path), extra_columns=()).num_rows == 1


def test_one_column_cannot_be_both(tmp_path):
    assert "two different columns" in refusal(write(tmp_path, "csv"), caption_column="url")


@pytest.mark.parametrize("name", RESERVED_COLUMNS[2:])
def test_a_name_that_shards_use_is_refused_unless_left_out(tmp_path, name):
    path = write(tmp_path, "parquet", [{**ROWS[0], name: "mine"}])
    assert f"has a column '{name}'" in refusal(path)
    assert open_pairs(path, extra_columns=("label",)).num_rows == 1


@pytest.mark.parametrize("value", [17, 2.5, True, ["a"], {"a": 1}])
@pytest.mark.parametrize("column", ["url", "caption"])
def test_what_is_not_text_is_shown_with_its_row(tmp_path, column, value):
    rows = [{**ROWS[0], column: None}, {**ROWS[0], column: value}]
    for kind in ("parquet", "jsonl"):
        text = refusal(write(tmp_path, kind, rows))
        assert f"column {column!r}" in text
        assert "row 1 (the first is 0)" in text
        assert repr(value) in text


def test_one_number_among_captions_is_found(tmp_path):
    rows = [*ROWS, {**ROWS[0], "caption": 5}, *ROWS]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    assert "row 3 (the first is 0) holds 5" in refusal(str(path))
    path.write_text(json.dumps({**ROWS[0], "caption": math.nan}))
    assert "holds nan" in refusal(str(path))


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text(json.dumps({**ROWS[0], "caption": "\ud800"}))
    assert "row 0 (the first is 0) holds '\\ud800'" in refusal(str(path))


def test_binary_columns_are_not_text_and_not_carried(tmp_path):
    path = write(tmp_path, "parquet", [{**ROWS[0], "caption": b"x"}])
    assert "holds b'x'" in refusal(path)
    path = write(tmp_path, "parquet", [{**ROWS[0], "thumbnail": b"x"}])
    assert "'thumbnail'" in refusal(path)
    assert open_pairs(path, extra_columns=("label",)).num_rows == 1


@pytest.mark.parametrize("kind", ["parquet", "csv.gz", "json"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_cut_file_is_refused(tmp_path, kind, share):
    rows = [{**r, "label": str(i)} for i, r in enumerate(ROWS * 50)]
    path = write(tmp_path, kind, rows)
    with open(path, "rb") as f:
        data = f.read()
    with open(path, "wb") as f:
        f.write(data[: int(len(data) * share)])
    text = refusal(path)
    assert path in text
    assert "write it again" in text


def test_text_that_is_not_what_its_ending_says_is_refused(tmp_path):
    for name, data in (
        ("t.parquet", b"url,caption\n" * 9),
        ("t.csv", b"url,caption\na,b,c\n"),
        ("t.csv", b"url,caption\nhttp://a.example/,\xff\xfe\n"),
        ("t.jsonl", b'{"url": "a", "caption": "b"}\n{"url": '),
        ("t.jsonl", b"[1]\n"),
        ("t.json", b'{"url": "a"}'),
        ("t.jsonl", b"\xff\xff\n"),
    ):
        (tmp_path / name).write_bytes(data)
        assert name in refusal(str(tmp_path / name))


def test_a_parquet_with_text_that_is_no_utf8_is_refused_when_read(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    path = str(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"url": ["http://a.example/"], "caption": bad}), path)
    assert "UTF8" in refusal(path).upper().replace("-", "")


@given(st.integers(0, 5000), st.integers(1, 700))
def test_every_row_has_one_shard(num_rows, shard_size):
    shards = plan_shards(num_rows, shard_size)
    assert shards == sorted(shards)
    sizes = [min(shard_size, num_rows - int(s) * shard_size) for s in shards]
    assert sum(sizes) == num_rows
    assert all(size > 0 for size in sizes)


def test_a_shard_size_below_one_is_refused():
    with pytest.raises(DeclipError, match="shard_size is 0 but must be at least 1"):
        plan_shards(10, 0)


def test_the_digest_is_of_the_bytes(tmp_path):
    import hashlib

    path = write(tmp_path, "csv")
    with open(path, "rb") as f:
        assert table_digest(path) == hashlib.sha256(f.read()).hexdigest()
    with pytest.raises(DeclipError, match="does not exist"):
        table_digest(str(tmp_path / "none.csv"))
