"""Columns are found by their usual names or by the user's, and none is lost or misread."""

import pyarrow as pa
import pytest

from declip_ingest.list_columns import (
    KINDS,
    ColumnNames,
    HashCount,
    carried_name,
    plain_type,
    plan_columns,
    tag_hashes,
    to_boxes,
)
from declip_ingest.table import RESERVED_COLUMNS
from declip_shards import DeclipError


def plan(names, **wanted) -> dict[str, str]:
    return plan_columns("l", names, ColumnNames(**wanted)).sources


def test_real_lists_columns():
    laion = ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "hash"]
    assert plan(laion) == {
        "url": "URL",
        "caption": "TEXT",
        "source_id": "SAMPLE_ID",
        "license": "LICENSE",
        "list_height": "HEIGHT",
        "list_width": "WIDTH",
        "NSFW": "NSFW",
        "hash": "hash",
    }
    datacomp = ["uid", "url", "text", "original_width", "face_bboxes", "sha256"]
    assert plan(datacomp) == {
        "url": "url",
        "caption": "text",
        "source_id": "uid",
        "expected_hash": "sha256",
        "boxes": "face_bboxes",
        "list_original_width": "original_width",
    }


def test_the_users_names_go_first_and_none_is_none():
    names = ["url", "src", "caption", "alt", "license", "sha256"]
    found = plan(names, url="src", caption="alt", license="none", expected_hash="none")
    assert (found["url"], found["caption"]) == ("src", "alt")
    assert "expected_hash" not in found
    assert found["list_sha256"] == "sha256"
    assert found["list_url"] == "url"
    assert found["list_license"] == "license"


def test_extra_columns_are_chosen():
    names = ["url", "caption", "a", "b"]
    assert list(plan(names, extra=())) == ["url", "caption"]
    assert list(plan(names, extra=("b",))) == ["url", "caption", "b"]
    assert list(plan(names)) == names


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_names_that_shards_use_are_carried_under_another(name):
    assert carried_name(name) == f"list_{name}"


@pytest.mark.parametrize(
    ("names", "wanted", "said"),
    [
        (["link", "caption"], {}, "has no column 'url'; name the one that is with url_column"),
        (["url", "words"], {}, "name the one that is with caption_column"),
        (["url", "caption"], {"url": "ulr"}, "has no column 'ulr' (set by url_column)"),
        (["url", "caption"], {"caption": "url"}, "both 'url'; name two different columns"),
        (["url", "caption", "url"], {"url": "url"}, "has 2 columns named 'url'"),
        (["url", "caption", "url"], {}, "has 2 columns named 'url', and nothing says which"),
        (["caption", "url", "caption"], {}, "2 columns named 'caption'"),
        (["url", "caption", "id", "id"], {}, "2 columns named 'id'"),
        (["url", "caption", "a", "a"], {}, "2 columns named 'a'"),
        (["url", "caption", "a", "a"], {"extra": ("a",)}, "2 columns named 'a'"),
        (["url", "caption"], {"extra": ("x",)}, "'x' (set by extra_columns)"),
        (["url", "caption"], {"source_id": "x"}, "'x' (set by id_column)"),
        (["url", "caption", "width", "list_width"], {}, "would bear one name"),
    ],
)
def test_wrong_names_are_refused(names, wanted, said):
    with pytest.raises(DeclipError) as caught:
        plan(names, **wanted)
    assert said in str(caught.value)


def test_hashes_are_tagged_by_name_or_length():
    sha, md5, long = "AB" * 32, "cd" * 16, "ef" * 64
    values = pa.array([sha, f" {md5} ", long, "xyz", None, "", "md5:" + md5, "sha256:" + md5])
    assert tag_hashes(values, "checksum").to_pylist() == [
        f"sha256:{sha.lower()}",
        f"md5:{md5}",
        f"sha512:{long}",
        None,
        None,
        None,
        f"md5:{md5}",
        None,
    ]
    # A column called md5 that holds something else is not taken for another algorithm.
    assert tag_hashes(pa.array([sha, md5]), "md5").to_pylist() == [None, f"md5:{md5}"]
    again = tag_hashes(tag_hashes(values, "x"), "expected_hash")
    assert again.equals(tag_hashes(values, "x"))


def test_a_column_of_few_digests_is_the_wrong_one():
    count = HashCount()
    values = pa.array(["a", "b", "ab" * 32, None])
    count.add(tag_hashes(values, "hash"), values)
    assert (count.num_values, count.num_bad) == (3, 2)
    with pytest.raises(DeclipError, match=r"holds few md5, sha256 or sha512 digests \(2 of 3"):
        count.judge("l", "hash")
    count.add(tag_hashes(values[2:3], "hash"), values[2:3])
    count.judge("l", "hash")


def test_boxes_come_from_lists_and_from_json():
    boxes = [[[0.1, 0.2, 0.3, 0.4]], [], None]
    assert to_boxes(pa.array(boxes), "l", "b").to_pylist() == boxes
    texts = pa.array(["[[0.1, 0.2, 0.3, 0.4]]", "[]", ""])
    assert to_boxes(texts, "l", "b").to_pylist() == boxes
    assert to_boxes(texts, "l", "b").type == KINDS["boxes"]
    for bad in (pa.array(["x"]), pa.array([1])):
        with pytest.raises(DeclipError, match="holds no lists of boxes"):
            to_boxes(bad, "l", "b")


def test_bytes_are_not_carried():
    assert plain_type("l", "c", pa.dictionary(pa.int8(), pa.large_string())) == pa.string()
    with pytest.raises(DeclipError, match="leave it out of extra_columns"):
        plain_type("l", "thumb", pa.binary())
