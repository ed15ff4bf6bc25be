"""Rows keep their numbers and their first fault."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_ingest.list_rows import (
    CODES,
    FAULTS,
    Rows,
    check_pairs,
    first_rows,
    is_blank,
    strings_of,
    to_text,
)


def rows_of(numbers, urls=None, captions=None) -> Rows:
    urls = urls or [f"http://a/{n}" for n in numbers]
    table = pa.table({"url": urls, "caption": captions or ["c"] * len(urls)})
    faults = np.zeros(len(urls), np.uint8)
    return Rows(name="l", numbers=np.array(numbers, np.int64), table=table, faults=faults)


@given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30)))
def test_lost_rows_stand_at_their_place(numbers, lost):
    lost -= numbers
    rows = rows_of(sorted(numbers)).with_lost_rows(np.array(sorted(lost), np.int64))
    assert rows.numbers.tolist() == sorted(numbers | lost)
    for number, fault, url in zip(rows.numbers, rows.faults, rows.table["url"].to_pylist()):
        assert FAULTS[fault] == ("bad_row" if number in lost else "")
        assert url == (None if number in lost else f"http://a/{number}")


def test_the_first_fault_stays():
    rows = rows_of([0, 1, 2])
    rows = rows.with_fault("video", np.array([True, False, False]))
    rows = rows.with_fault("bad_row", np.array([True, True, False]))
    assert [FAULTS[code] for code in rows.faults] == ["video", "bad_row", ""]
    assert rows.take(rows.faults == 0).numbers.tolist() == [2]
    assert first_rows(rows, 2).numbers.tolist() == [0, 1]


def test_urls_are_trimmed_and_captions_are_not():
    rows = check_pairs(rows_of([0, 1, 2, 3], [" http://a/ ", "", "x", "y"], [" c ", "", "\t", "z"]))
    assert rows.table.to_pydict()["url"] == ["http://a/", "", "x", "y"]
    assert rows.table.to_pydict()["caption"] == [" c ", "", "\t", "z"]
    assert [FAULTS[code] for code in rows.faults] == ["", "missing_url", "missing_caption", ""]


def test_blank_is_null_empty_or_spaces():
    texts = pa.array(["a", " a", "", "  ", None, "\u3000", "\u00a0x"])
    assert is_blank(texts).tolist() == [False, False, True, True, True, True, False]
    assert is_blank(pa.array(["a", "b"])).tolist() == [False, False]
    assert is_blank(pa.array([], pa.string())).tolist() == []


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view()]
)
def test_text_of_every_kind_of_arrow(kind):
    texts, bad = to_text(pa.chunked_array([pa.array(["ü", None], pa.string()).cast(kind)]))
    assert texts.to_pylist() == ["ü", None]
    assert texts.type == pa.string()
    assert not bad.any()
    assert to_text(pa.array(["a", "a"]).dictionary_encode())[0].to_pylist() == ["a", "a"]


def test_bytes_that_are_no_text_are_marked():
    texts, bad = to_text(pa.array([b"ok", b"\xff", None, b"\xed\xa0\x80"]))
    assert texts.to_pylist() == ["ok", None, None, None]
    assert bad.tolist() == [False, True, False, True]
    texts, bad = strings_of(["ok", "\ud800", None, 5, ["x"]])
    assert texts.to_pylist() == ["ok", None, None, None, None]
    assert bad.tolist() == [False, True, False, True, True]


def test_codes_and_names_are_one_vocabulary():
    assert [FAULTS[code] for code in CODES.values()] == list(CODES)
    assert FAULTS[0] == ""
