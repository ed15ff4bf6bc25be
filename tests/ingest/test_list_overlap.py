"""Overlaps are those of Python's sets, by photo id, URL and hash."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest.list_overlap import Overlap, compare_lists, normalize_urls, photo_ids, read_keys
from declip_ingest.list_readers import ListOptions
from declip_shards import DeclipError

IDS_ONLY = ListOptions(needs_pairs=False)


def overlaps(a: str, b: str) -> dict[str, Overlap]:
    keys_a, keys_b = (read_keys(place, IDS_ONLY) for place in (a, b))
    found = compare_lists(keys_a, keys_b, IDS_ONLY, IDS_ONLY)
    return {overlap.measure: overlap for overlap in found}


@given(st.lists(st.integers(0, 30), min_size=1), st.lists(st.integers(0, 30), min_size=1))
@settings(max_examples=25, deadline=None)
def test_counts_are_those_of_sets(tmp_path_factory, left, right):
    folder = tmp_path_factory.mktemp("d")
    for name, numbers in (("a", left), ("b", right)):
        rows = [
            {"url": f"https://live.staticflickr.com/65535/{n + 10}_{n:010x}_b.jpg", "caption": "c"}
            | {"sha256": f"{n % 7:064x}"}
            for n in numbers
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    found = overlaps(f"{folder}/a.parquet", f"{folder}/b.parquet")
    assert set(found) == {"photo_id", "url", "hash"}
    for measure, overlap in found.items():
        a, b = (set(x) if measure != "hash" else {n % 7 for n in x} for x in (left, right))
        assert (overlap.num_a, overlap.num_b, overlap.num_both) == (len(a), len(b), len(a & b))
        assert (overlap.num_only_a, overlap.num_only_b) == (len(a - b), len(b - a))
        assert len(overlap.examples["both"]) == min(3, len(a & b))
        assert len(overlap.examples["only_a"]) == min(3, len(a - b))
        assert len(overlap.examples["only_b"]) == min(3, len(b - a))
    photos = found["photo_id"].examples
    assert {int(n) - 10 for n in photos["both"]} <= set(left) & set(right)
    assert {int(n) - 10 for n in photos["only_b"]} <= set(right) - set(left)


def test_yfcc_v1s_ids_are_held_against_v2s_urls(tmp_path):
    ids = list(range(6_985_418_911, 6_985_418_931))
    v1, v2 = tmp_path / "v1.tsv", tmp_path / "v2.json"
    v1.write_text("".join(f"{n}\t{i}\t{i:032x}\n" for n, i in enumerate(ids[:12])))
    rows = [
        {
            "caption": "",
            "filename": "x",
            "url": f"http://farm8.staticflickr.com/7/{i}_df7747990d.jpg",
        }
        for i in ids[8:]
    ]
    v2.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = overlaps(str(v1), str(v2))
    assert set(found) == {"photo_id"}, "V1 alone has neither URLs nor hashes"
    overlap = found["photo_id"]
    assert (overlap.num_a, overlap.num_b, overlap.num_both) == (12, 12, 4)
    assert overlap.as_json()["share_of_a"] == round(4 / 12, 6)


def test_lists_with_nothing_in_common_to_compare_are_refused(tmp_path):
    v1, other = tmp_path / "v1.tsv", tmp_path / "o.csv"
    v1.write_text("0\t11\tab\n")
    other.write_text("url,caption\nhttp://a.example/1.jpg,x\n")
    with pytest.raises(DeclipError, match="share no kind of value that could be compared"):
        overlaps(str(v1), str(other))


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("http://A.example/x", "https://a.example/x", True),
        ("http://www.a.example:80/x/", "https://a.example:443/x#top", True),
        ("http://a.example/X", "http://a.example/x", False),
        ("http://a.example/x?a=1", "http://a.example/x?a=2", False),
        ("http://a.example:8080/x", "http://a.example/x", False),
        ("http://a.example", "http://a.example/", True),
        ("no url", "no url", True),
    ],
)
def test_urls_are_compared_by_what_they_fetch(one, other, is_same):
    left, right = normalize_urls(pa.array([one, other])).to_pylist()
    assert (left == right) is is_same


@pytest.mark.parametrize(
    ("url", "photo"),
    [
        ("http://farm8.staticflickr.com/7205/6985418911_df7747990d.jpg", "6985418911"),
        ("https://live.staticflickr.com/65535/53000000000_0123456789_o.png", "53000000000"),
        ("http://farm1.static.flickr.com/23/12345_abc.jpg", "12345"),
        ("http://www.flickr.com/photos/39019111@N00/6985418911/", "6985418911"),
        ("http://evilflickr.com.example/7205/6985418911_df7747990d.jpg", None),
        ("http://a.example/7205/6985418911_df7747990d.jpg", None),
    ],
)
def test_photo_ids_are_read_from_flickrs_urls(url, photo):
    table = pa.table({"url": [url], "caption": ["x"]})
    assert photo_ids(table, "table").to_pylist() == [photo]
