"""Tables with named columns come back as written in every form, from one file or many."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from declip_ingest.list_columns import ColumnNames
from declip_ingest.list_readers import ListOptions, open_list
from declip_ingest.list_rows import FAULTS
from declip_ingest.list_tables import first_of, join_types
from declip_shards import DeclipError

ROWS = [
    {"url": "http://a.example/1.jpg?x=1,2", "caption": "a red apple", "label": "apple"},
    {"url": "http://a.example/2.jpg", "caption": 'say "hi",\nüñí  tab\t 漢字', "label": "007"},
    {"url": "http://a.example/3.jpg", "caption": "1984", "label": ""},
]


def write(folder, form: str, rows=ROWS, name: str = "list") -> str:
    path = folder / f"{name}.{form}"
    bare = form.removesuffix(".gz")
    if bare == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif bare in ("csv", "tsv"):
        table = pa.Table.from_pylist(rows)
        pa_csv.write_csv(table, path, pa_csv.WriteOptions(delimiter="," if bare == "csv" else "\t"))
    elif bare == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if form.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return str(path)


def read(location: str, max_rows=None, **columns) -> tuple[list[dict[str, Any]], list[str]]:
    reader = open_list(location, ListOptions(columns=ColumnNames(**columns)))
    found, faults = [], []
    for rows in reader.read(lambda count: None, max_rows):
        assert rows.table.schema.equals(reader.schema)
        found += rows.table.to_pylist()
        faults += [FAULTS[code] for code in rows.faults]
    return found, faults


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "json", "jsonl", "csv.gz", "jsonl.gz"])
@pytest.mark.parametrize("max_rows", [None, 1, 2, 3, 9])
def test_reading_inverts_writing_in_every_form(tmp_path, form, max_rows):
    rows, faults = read(write(tmp_path, form), max_rows)
    assert rows == ROWS[: max_rows or 3]
    assert not any(faults)


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("max_rows", [None, 3, 4])
def test_a_folder_of_files_is_one_list(tmp_path, form, max_rows):
    for number in range(3):
        more = [{**row, f"only_{number}": "x"} for row in ROWS[:2]]
        write(tmp_path, form, more, f"part-{number}")
    rows, _ = read(str(tmp_path), max_rows)
    assert [row["url"] for row in rows] == [row["url"] for row in ROWS[:2] * 3][:max_rows]
    assert rows[2]["only_1"] == "x"
    assert rows[2]["only_0"] is None


def test_numbers_of_two_kinds_are_joined_and_text_is_not(tmp_path):
    for name, value in (("a", 1), ("b", 2.5)):
        write(tmp_path, "parquet", [{**ROWS[0], "n": value}], name)
    assert [row["n"] for row in read(str(tmp_path))[0]] == [1.0, 2.5]
    write(tmp_path, "parquet", [{**ROWS[0], "n": "x"}], "c")
    with pytest.raises(DeclipError, match=r"column 'n' of list .*c\.parquet' holds string"):
        read(str(tmp_path))
    assert len(read(str(tmp_path), extra=("label",))[0]) == 3


def test_a_file_of_the_folder_without_the_column_is_named(tmp_path):
    write(tmp_path, "parquet", ROWS, "a")
    write(tmp_path, "parquet", [{"url": "http://a/", "words": "x"}], "b")
    with pytest.raises(DeclipError, match=r"b\.parquet' has no column 'caption'"):
        read(str(tmp_path))


def test_json_that_mixes_kinds_is_refused_and_a_late_key_is_carried(tmp_path):
    rows = [{**ROWS[0], "n": 1}, {**ROWS[1], "n": "x"}, {**ROWS[2], "late": [1, 2]}]
    path = write(tmp_path, "jsonl", rows)
    with pytest.raises(DeclipError, match=r"column 'n' of list .* mixes kinds of values"):
        read(path)
    found, _ = read(path, extra=("late",))
    assert [row["late"] for row in found] == [None, None, [1, 2]]


def test_json_values_that_no_file_can_hold_drop_the_row_not_the_list(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "label": "\ud800"}, {**ROWS[2], "url": "http://a/\udfff"}]
    found, faults = read(write(tmp_path, "jsonl", rows))
    assert faults == ["", "bad_row", "bad_url"]
    assert found[0] == ROWS[0]


def test_yfcc15m_v2_takes_the_first_caption_of_a_list(tmp_path):
    rows = [
        {"caption": caption, "filename": "x.jpg", "url": f"http://a/{n}"}
        for n, caption in enumerate([["first", "second"], "alone", [], [None], None])
    ]
    found, _ = read(write(tmp_path, "jsonl", rows))
    assert [row["caption"] for row in found] == ["first", "alone", None, None, None]
    assert found[0]["filename"] == "x.jpg"
    assert first_of([]) is None


def test_parquet_whose_caption_is_no_text_is_refused(tmp_path):
    for value, shown in ((7, "int64"), (["a"], "list"), ({"a": 1}, "struct")):
        path = write(tmp_path, "parquet", [{**ROWS[0], "caption": value}])
        with pytest.raises(DeclipError, match=f"must hold text, but holds {shown}"):
            read(path)


def test_a_csv_row_of_another_number_of_fields_is_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("url,caption\nhttp://a/,x\nhttp://b/,y,z\n")
    with pytest.raises(DeclipError) as caught:
        read(str(path))
    assert "Row #3: Expected 2 columns, got 3" in str(caught.value)
    path.write_text('url,caption\nhttp://a/,"never closed\n' + "x\n" * (6 << 20))
    with pytest.raises(DeclipError, match="quotation mark that is never closed"):
        read(str(path))


def test_text_that_is_no_utf8_is_a_bad_row_in_every_form(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        b"url,caption,x\nhttp://a/,ok,1\nhttp://b/,\xff,1\n\xfe,y,\xfd\n"
    )
    assert read(str(tmp_path / "t.csv"))[1] == ["", "bad_caption", "bad_url"]
    bad = pa.array([b"ok", b"\xff"])
    text = pa.Array.from_buffers(pa.string(), 2, bad.buffers())
    pq.write_table(
        pa.table({"url": ["http://a/", "http://b/"], "caption": text}), tmp_path / "p.parquet"
    )
    assert read(str(tmp_path / "p.parquet"))[1] == ["", "bad_caption"]


def test_types_are_joined_as_far_as_they_go():
    assert join_types("l", "c", None, pa.int32()) == pa.int32()
    assert join_types("l", "c", pa.null(), pa.string()) == pa.string()
    assert join_types("l", "c", pa.string(), pa.null()) == pa.string()
    assert join_types("l", "c", pa.int32(), pa.float64()) == pa.float64()
    with pytest.raises(DeclipError, match="column 'c' of list 'l' holds string, but int64 before"):
        join_types("l", "c", pa.int64(), pa.string())
