"""YFCC100M's metadata is decoded exactly, and V1's join gives what a plain dictionary gives."""

import bz2
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest import list_lines
from declip_ingest.list_readers import ListOptions, open_list
from declip_ingest.list_rows import FAULTS, check_pairs
from declip_ingest.yfcc import (
    COLUMNS,
    OLDER_COLUMNS,
    choose_captions,
    clean_text,
    decode_text,
    to_ids,
)
from declip_shards import DeclipError


def metadata_row(
    photo: int, *, title: str = "", description: str = "", **others: object
) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "")
    row |= {
        "line": str(photo % 1000),
        "source_id": str(photo),
        "photo_hash": f"{photo:032x}",
        "author_id": quote_plus("39019111@N00"),
        "author": quote_plus("Jürgen K"),
        "title": quote_plus(title),
        "description": quote_plus(description),
        "page_url": f"http://www.flickr.com/photos/39019111@N00/{photo}/",
        "url": f"http://farm8.staticflickr.com/7205/{photo}_df7747990d.jpg",
        "license": "Attribution+License",
        "license_url": "http://creativecommons.org/licenses/by/2.0/",
        "extension": "jpg",
        "marker": "0",
    }
    return row | {name: str(value) for name, value in others.items()}


def write_metadata(path: Path, rows: list[dict[str, str]], columns=COLUMNS) -> str:
    text = "".join("\t".join(row[name] for name in columns) + "\n" for row in rows)
    path.write_bytes(bz2.compress(text.encode()) if path.suffix == ".bz2" else text.encode())
    return str(path)


def write_subset(path: Path, ids: list[int]) -> str:
    text = "".join(f"{n}\t{i}\t{i:032x}\n" for n, i in enumerate(ids))
    path.write_bytes(bz2.compress(text.encode()) if path.suffix == ".bz2" else text.encode())
    return str(path)


def read(location: str, max_rows=None, **options) -> list[tuple[int, str, dict[str, Any]]]:
    """(row number, reason, row) of every row."""
    reader = open_list(location, ListOptions(**options))
    found = []
    for rows in reader.read(lambda count: None, max_rows):
        rows = check_pairs(rows)
        assert rows.table.schema.names == reader.schema.names
        for number, fault, row in zip(rows.numbers, rows.faults, rows.table.to_pylist()):
            found.append((int(number), FAULTS[fault], row))
    return found


encoded = st.lists(
    st.lists(
        st.sampled_from(["%", "a", "4", "1", "+", "%C3%A4", "%e6%bc%a2", "F", "%g1", "%2", "ä"]),
        max_size=8,
    ).map("".join),
    max_size=6,
)


@given(encoded, st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_decoding_is_that_of_the_standard_library(rows, start):
    decoded, bad = decode_text(pa.array(rows, pa.string()).slice(start))
    for text, got, is_bad in zip(rows[start:], decoded.to_pylist(), bad, strict=True):
        raw = unquote_to_bytes(text.replace("+", " "))
        try:
            assert got == raw.decode()
            assert not is_bad
        except UnicodeDecodeError:
            assert got is None
            assert is_bad


@given(st.lists(st.text(max_size=12), max_size=6))
@settings(max_examples=60, deadline=None)
def test_decoding_inverts_both_ways_of_encoding(texts):
    for encode in (quote_plus, quote):
        assert decode_text(pa.array(map(encode, texts), pa.string()))[0].to_pylist() == texts


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('a <a href="http://x.org/?a=1">cat</a> here', "a cat here"),
        ("<b>bold</B> and <I>slanted</i>", "bold and slanted"),
        ("see http://x.org/a,b?c=d and WWW.y.org now", "see and now"),
        ("https://only.example", ""),
        ("two  spaces\nand\r\n\tmore\u00a0here\u3000x", "two spaces and more here x"),
        ("a < b and c > d, <img src=x>, <abbr>", "a < b and c > d, <img src=x>, <abbr>"),
        ("&quot;kept&quot;", "&quot;kept&quot;"),
        ("", ""),
        ("עברית 漢字", "עברית 漢字"),
    ],
)
def test_tags_and_addresses_are_stripped(text, clean):
    assert clean_text(pa.array([text])).to_pylist() == [clean]
    assert clean_text(pa.array([clean])).to_pylist() == [clean], "twice is once"


@pytest.mark.parametrize(
    ("rule", "captions"),
    [
        ("title", ["t", "t", "", ""]),
        ("description", ["d", "", "d", ""]),
        ("title_description", ["t d", "t", "d", ""]),
        ("title_or_description", ["t", "t", "d", ""]),
        ("description_or_title", ["d", "t", "d", ""]),
    ],
)
def test_caption_rules(rule, captions):
    titles, texts = pa.array(["t", "t", "", ""]), pa.array(["d", "", "d", ""])
    assert choose_captions(rule, titles, texts, np.arange(4)).to_pylist() == captions


def test_the_drawn_rule_is_fair_and_always_the_same():
    ids = np.arange(6_000_000_000, 6_000_010_000)
    titles, texts = pa.array(["t"] * len(ids)), pa.array(["d"] * len(ids))
    drawn = choose_captions("drawn", titles, texts, ids).to_pylist()
    assert abs(drawn.count("t") - 5000) < 200
    backwards = choose_captions("drawn", titles, texts, ids[::-1]).to_pylist()
    assert backwards == drawn[::-1]
    alone = choose_captions("drawn", pa.array([""] * 9), pa.array(["d"] * 9), ids[:9])
    assert alone.to_pylist() == ["d"] * 9


def test_an_unknown_rule_is_refused():
    empty = pa.array([], pa.string())
    with pytest.raises(DeclipError, match="Did you mean 'title'"):
        choose_captions("titel", empty, empty, np.zeros(0, np.int64))


@pytest.mark.parametrize("columns", [COLUMNS, OLDER_COLUMNS])
def test_both_releases_are_read(tmp_path, columns):
    rows = [
        metadata_row(6_985_418_911, title="My cat", description="asleep, 50% grey"),
        metadata_row(2, title="a video", marker=1),
        metadata_row(3, title="%", description="100%25 + more"),
        metadata_row(4),
        metadata_row(5, title="x", url=""),
    ]
    rows[2]["title"] = "%FF%FE"
    path = write_metadata(tmp_path / "yfcc100m_dataset", rows, columns)
    found = read(path)
    assert [(number, reason) for number, reason, _ in found] == [
        (0, ""),
        (1, "video"),
        (2, "bad_caption"),
        (3, "missing_caption"),
        (4, "missing_url"),
    ]
    photo = found[0][2]
    assert photo["caption"] == "My cat asleep, 50% grey"
    assert photo["source_id"] == "6985418911"
    assert photo["author"] == "Jürgen K"
    assert photo["license"] == "Attribution License"
    assert photo["url"] == rows[0]["url"]
    assert photo.get("photo_hash") == (rows[0]["photo_hash"] if columns is COLUMNS else None)
    # The title's broken bytes do not matter where it is not asked for.
    assert read(path, caption_rule="description")[2][1] == ""


def test_lines_of_another_number_of_fields_are_bad_rows(tmp_path):
    path = tmp_path / "yfcc100m_dataset"
    write_metadata(path, [metadata_row(i, title="x") for i in range(5)])
    lines = path.read_text().splitlines()
    lines.insert(2, "cut")
    lines[4] = lines[4].replace("\t3\t", "\tno id\t", 1)
    path.write_text("\n".join(lines) + "\n")
    assert [(n, reason) for n, reason, _ in read(str(path))] == [
        (0, ""),
        (1, ""),
        (2, "bad_row"),
        (3, ""),
        (4, "bad_row"),
        (5, ""),
    ]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.lists(st.integers(1, 40), unique=True, min_size=1, max_size=30),
    st.sampled_from([700, 2000, 1 << 20]),
)
@settings(max_examples=40, deadline=None)
def test_the_join_is_a_dictionarys(tmp_path_factory, ids, photos, block):
    """Each row of the subset has one fate; photos come in the metadata's order."""
    folder = tmp_path_factory.mktemp("v1")
    subset = write_subset(folder / "subset.tsv.bz2", ids)
    rows = [metadata_row(i, title=f"photo {i}", marker=int(i % 7 == 0)) for i in photos]
    metadata = write_metadata(folder / "yfcc100m_dataset", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_lines, "BLOCK_BYTES", block)
        found = read(subset, metadata=(metadata,))
    first = {photo: number for number, photo in reversed(list(enumerate(ids)))}
    expected = {}
    for number, photo in enumerate(ids):
        reason = "" if first[photo] == number else "duplicate_id"
        if not reason and photo not in photos:
            reason = "not_in_metadata"
        if not reason and photo % 7 == 0:
            reason = "video"
        expected[number] = reason
    assert {number: reason for number, reason, _ in found} == expected
    assert len(found) == len(ids)
    kept = [row["source_id"] for _, reason, row in found if not reason]
    assert kept == [str(photo) for photo in photos if photo in first and photo % 7]


def test_the_subset_may_be_cut_short_and_may_hold_bad_lines(tmp_path):
    path = tmp_path / "subset.tsv"
    path.write_text("0\t11\taa\n1\t12\n2\tx\tbb\n3\t13\tcc\n4\t14\tdd\n")
    metadata = write_metadata(
        tmp_path / "yfcc100m_dataset", [metadata_row(i, title="t") for i in range(10, 20)]
    )
    found = read(str(path), metadata=(metadata,))
    assert sorted((n, reason) for n, reason, _ in found) == [
        (0, ""),
        (1, "bad_row"),
        (2, "bad_row"),
        (3, ""),
        (4, ""),
    ]
    assert sorted(n for n, _, _ in read(str(path), 4, metadata=(metadata,))) == [0, 1, 2, 3]


def test_the_subset_without_its_metadata_is_refused(tmp_path):
    subset = write_subset(tmp_path / "yfcc100m_subset_data.tsv", [11, 12])
    with pytest.raises(DeclipError, match="name YFCC100M's metadata files with metadata"):
        read(subset)
    with pytest.raises(DeclipError, match="is no metadata of YFCC100M"):
        read(subset, metadata=(subset,))


def test_carried_columns_can_be_chosen(tmp_path):
    rows = [metadata_row(1, title="t", user_tags="a+cat,dog")]
    path = write_metadata(tmp_path / "yfcc100m_dataset", rows)

    def columns(*extra: str) -> list[str]:
        from declip_ingest.list_columns import ColumnNames

        options = ListOptions(columns=ColumnNames(extra=extra))
        return list(open_list(path, options).schema.names)

    assert columns() == ["url", "caption", "source_id", "author", "license"]
    assert columns("*", "user_tags")[-1] == "user_tags"
    assert columns("page_url")[5:] == ["page_url"]
    with pytest.raises(DeclipError, match="Did you mean 'user_tags'"):
        columns("user_tag")


def test_photo_ids_that_are_none_are_told():
    ids, bad = to_ids(pa.array(["6985418911", "", "12x", "-3", "9" * 19]))
    assert ids.tolist() == [6_985_418_911, -1, -1, -1, -1]
    assert bad.tolist() == [False, True, True, True, True]
