"""JSON comes back as it was written, whatever the blocks; each fault names its row."""

import bz2
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest import json_rows
from declip_ingest.json_rows import read_objects
from declip_ingest.list_files import find_files
from declip_shards import DeclipError

ROWS = [
    {"url": "http://a.example/1", "caption": 'a "b"\n\\ ü漢字😀'},
    {"url": None, "n": 1.5, "deep": {"a": [1, {"b": "]"}]}},
    {"caption": "x" * 70},
    {},
]


def read(path, *, is_lines: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for first, objects in read_objects(
        find_files(str(path))[0], is_lines=is_lines, on_bytes=lambda count: None
    ):
        assert first == len(found)
        found += objects
    return found


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_reading_inverts_writing_for_every_block_size(tmp_path, monkeypatch, block, is_ascii):
    monkeypatch.setattr(json_rows, "BLOCK_BYTES", block)
    lines, array = tmp_path / "t.jsonl", tmp_path / "t.json"
    texts = [json.dumps(row, ensure_ascii=is_ascii) for row in ROWS]
    lines.write_text("\n".join(texts) + "\n", encoding="utf-8-sig")
    array.write_text(" [ " + " ,\n".join(texts) + " ] ", encoding="utf-8-sig")
    assert read(lines, is_lines=True) == ROWS
    assert read(array, is_lines=False) == ROWS


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=3), min_size=1))
@settings(max_examples=40, deadline=None)
def test_any_text_survives(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("j") / "t.json"
    path.write_text(json.dumps(rows))
    assert read(path, is_lines=False) == rows
    path.write_text("".join(json.dumps(row) + "\r\n" for row in rows))
    assert read(path, is_lines=True) == rows


def test_packed_lines_and_no_last_line_end(tmp_path):
    path = tmp_path / "t.jsonl.bz2"
    path.write_bytes(bz2.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert read(path, is_lines=True) == ROWS


def test_bytes_that_are_no_utf8_become_half_surrogates(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"caption": "a\xff"}\n{"caption": "b"}\n')
    assert read(path, is_lines=True) == [{"caption": "a\udcff"}, {"caption": "b"}]


@pytest.mark.parametrize(
    ("text", "is_lines", "said"),
    [
        ('{"a": 1}\n{"a":\n', True, "row 1 (the first is 0) is no whole JSON"),
        ('{"a": 1}\n17\n', True, "row 1 (the first is 0) is 17, not an object"),
        ('{"a": 1}\n{"b": 1},{"c": 1}\n', True, "row 1 (the first is 0) is no whole JSON"),
        ('[{"a": 1}, {"b"', False, "the list is no whole JSON"),
        ('[{"a": 1}', False, "the list is no whole JSON (it ends early)"),
        ('[{"a": 1}, 17]', False, "row 1 (the first is 0) is 17, not an object"),
        ("[" * 100_000, False, "not an object"),
        ('{"a":' + "[" * 100_000 + "\n", True, "it is nested too deeply"),
    ],
)
def test_what_is_no_list_of_objects_is_refused(tmp_path, text, is_lines, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DeclipError) as caught:
        read(path, is_lines=is_lines)
    assert said in str(caught.value) or "nested too deeply" in str(caught.value)
    assert "bad.json" in str(caught.value)


def test_a_cut_packed_file_is_refused(tmp_path):
    path = tmp_path / "t.jsonl.bz2"
    data = bz2.compress("\n".join(json.dumps({"n": i}) for i in range(5000)).encode())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DeclipError, match=r"cannot be read whole|no whole JSON"):
        read(path, is_lines=True)
