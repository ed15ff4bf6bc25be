"""Lists of removals, as people have them."""

import gzip
import io
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from declip_shards import DeclipError, sidecars
from pipelines.optout_list import read_list

URL, KEY, SHA, MD5 = "https://example.org/a,b.jpg?x=1#y", "000000017", "ab" * 32, "cd" * 16
ENTRIES = sorted([("url", URL), ("key", KEY), ("sha256", SHA), ("md5", MD5)])


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def test_text_has_an_entry_a_line(write):
    lines = [f"# of today\n\n  {URL}  ", KEY, SHA.upper(), f"md5:{MD5}", URL]
    assert read_list(write("list.txt", "\n".join(lines) + "\n")) == ENTRIES
    assert read_list(write("list.bom", "\ufeff" + "\r\n".join(lines))) == ENTRIES
    assert read_list(write("list.gz", gzip.compress("\n".join(lines).encode()))) == ENTRIES


def test_the_order_does_not_matter(write):
    lines = [URL, KEY, SHA, MD5]
    random.Random(2).shuffle(lines)
    assert read_list(write("list.txt", "\n".join(lines))) == ENTRIES


@pytest.mark.parametrize("separator", [",", "\t"])
def test_tables_are_known_by_their_header(write, separator):
    rows = [
        ["url", "note", "key", "sha256", "md5"],
        [f'"{URL}"', "x", "", "", ""],
        ["", "y", KEY, SHA, MD5],
    ]
    text = "\n".join(separator.join(row) for row in rows)
    assert read_list(write("list.csv", text)) == ENTRIES


def test_json_lines_and_parquet(write):
    rows = [{"url": URL, "key": None, "other": 1}, {"key": KEY, "sha256": SHA, "md5": MD5}]
    text = "\n".join(map(json.dumps, rows))
    assert read_list(write("list.jsonl", text)) == ENTRIES
    table = pa.table(
        {"url": [URL, None], "key": [None, KEY], "sha256": [SHA, None], "md5": [MD5, None]}
    )
    assert read_list(write("list.parquet", sidecars.pack_table(table))) == ENTRIES


def test_spaces_around_a_name_and_columns_without_one_do_not_matter(write):
    assert read_list(write("list.csv", f'id, "url ",url \n1,,"{URL}"\n')) == [("url", URL)]
    assert read_list(write("more.csv", f"key ,\n{KEY},\n")) == [("key", KEY)]
    assert read_list(write("two.csv", f" photo\n{KEY}\n,x"), column="photo ") == [("key", KEY)]
    assert read_list(write("list.jsonl", json.dumps({"url ": URL}))) == [("url", URL)]
    table = pa.table({" url": [URL]})
    assert read_list(write("list.parquet", sidecars.pack_table(table))) == [("url", URL)]


@pytest.mark.parametrize("rare", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_an_end_of_line_ends_a_line(write, rare):
    """Others may stand within a text; str.splitlines breaks there."""
    rows = [{"caption": f"one{rare}two", "url": URL}, {"key": KEY}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_list(write("list.jsonl", text)) == [("key", KEY), ("url", URL)]
    text = f'url,caption\n"{URL}",one{rare}two\n'
    assert read_list(write("list.csv", text)) == [("url", URL)]


def test_a_column_of_another_name(write):
    path = write("list.csv", f"image,owner\n{URL.replace(',', '')},x\n{KEY},y\n")
    assert read_list(path, column="image") == sorted([("url", URL.replace(",", "")), ("key", KEY)])
    with pytest.raises(DeclipError, match=r"row 2 .* is '000000017', which is no md5"):
        read_list(write("two.csv", f"image\n{MD5}\n{KEY}\n"), column="image", kind="md5")
    with pytest.raises(DeclipError, match="no header that names --column 'photo'"):
        read_list(path, column="photo")


def test_standard_input(monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO(f"{URL}\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read_list("-") == [("url", URL)]


def test_a_kind_takes_what_its_form_allows(write):
    path = write("list.txt", "example.org/no-scheme.jpg\n")
    assert read_list(path, kind="url") == [("url", "example.org/no-scheme.jpg")]
    with pytest.raises(DeclipError, match=r"row 1 .* which is no URL, key, sha256 or md5; mend it"):
        read_list(path)


def test_wrong_lists_are_refused_in_a_sentence(write, tmp_path):
    with pytest.raises(DeclipError, match="does not exist"):
        read_list(str(tmp_path / "nowhere"))
    with pytest.raises(DeclipError, match="has no entry; nothing is removed"):
        read_list(write("empty.txt", "# nothing\n\n"))
    with pytest.raises(DeclipError, match=r"--kind is 'sha'\. Did you mean 'sha256'"):
        read_list(write("list.txt", URL), kind="sha")
    with pytest.raises(DeclipError, match="is not UTF-8 text"):
        read_list(write("latin.txt", "é\n".encode("latin-1")))
    with pytest.raises(DeclipError, match=r"row 2 .* is no JSON"):
        read_list(write("list.jsonl", '{"url": "http://a/b"}\n{"url": \n'))
    with pytest.raises(DeclipError, match="has no column 'url'; name yours with --column"):
        read_list(write("other.parquet", sidecars.pack_table(pa.table({"link": [URL]}))))
    with pytest.raises(DeclipError, match="no readable parquet"):
        read_list(write("cut.parquet", b"PAR1 and nothing"))
