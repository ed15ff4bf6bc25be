"""Sheets: every cell is there, every text escaped, nothing is fetched."""

import base64
import html
import io
import re

import pytest
from PIL import Image

from declip_shards import DeclipError, Store, layout, read_samples
from declip_shards.fakes import write_fake_dataset
from pipelines.sheets import (
    NO_PICTURE,
    PICTURE_SIDE,
    UNREADABLE,
    Cell,
    cell_of,
    pictures_of,
    pictures_of_keys,
    shards_of,
    sheet_html,
)


def picture(width: int, height: int, form: str = "JPEG") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height), (10, 120, 200)).save(sink, form)
    return sink.getvalue()


def pictures_in(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


@pytest.fixture
def store(tmp_path):
    return write_fake_dataset(str(tmp_path / "data"), num_shards=3, samples_per_shard=8)


def test_every_cell_is_shown_in_its_order_with_a_thumbnail():
    rows = [
        [Cell(picture(400, 200), "broad", "upper"), Cell(picture(30, 30, "PNG"), "tiny one")],
        [Cell(None, "no picture", "third")],
    ]
    titles = ["row a", "row b"]
    page = sheet_html("A sheet", rows, summary=["one line"], row_titles=titles).decode()
    order = ("row a", "broad", "upper", "tiny one", "row b", "third")
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert [p.size for p in pictures_in(page)] == [(PICTURE_SIDE, PICTURE_SIDE // 2), (30, 30)]
    assert "one line" in page


def test_every_text_is_escaped_and_nothing_is_fetched():
    evil = "<script>alert('x')</script> & \"quotes\""
    rows = [[Cell(picture(8, 8), evil, evil)]]
    page = sheet_html(evil, rows, summary=[evil], row_titles=[evil]).decode()
    assert "<script" not in page
    assert html.escape(evil) in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "default-src 'none'" in page


def test_bytes_that_are_no_picture_are_said_to_be_so():
    page = sheet_html("A sheet", [[Cell(b"no picture", "its caption", "its note")]]).decode()
    assert f"its note: {UNREADABLE}" in page
    assert "its caption" in page
    assert not pictures_in(page)


def test_a_sheet_without_rows_says_that_there_is_nothing():
    assert "There is nothing to show." in sheet_html("A sheet", []).decode()


def test_as_many_titles_as_rows_or_none():
    with pytest.raises(ValueError, match="2 row_titles for 1 rows"):
        sheet_html("A sheet", [[Cell(None, "a")]], row_titles=["a", "b"])


def test_pictures_are_those_of_the_tars(store):
    everything = {
        shard: {s.key: (s.image, s.caption) for s in read_samples(store, shard)}
        for shard in layout.list_shards(store)
    }
    wanted = {"00000": ["000003", "000001"], "00002": iter(["000027"]), "00001": []}
    found = pictures_of(store, wanted)
    assert found == {
        key: everything[shard][key]
        for shard, key in (("00000", "000001"), ("00000", "000003"), ("00002", "000027"))
    }


def test_shards_without_wanted_samples_are_not_opened(store):
    store.remove(layout.tar_path("00001"))
    assert set(pictures_of(store, {"00000": ["000000"], "00001": []})) == {"000000"}
    with pytest.raises(DeclipError, match=r"'shards/00001.tar' is missing; rerun ingest"):
        pictures_of(store, {"00001": ["000010"]})


def test_a_sample_that_the_tar_lacks_is_named(store):
    with pytest.raises(DeclipError, match=r"'shards/00000.tar' has no sample 'nobody': what names"):
        pictures_of(store, {"00000": ["000000", "nobody"]})


def test_shards_are_found_by_key_wherever_a_sample_lies(store):
    assert shards_of(store, ["000011", "000027", "nobody"]) == {
        "000011": "00001",
        "000027": "00002",
    }
    # In a repacked dataset a key does not say where its sample lies.
    for suffix in (".tar", ".parquet", "_stats.json"):
        data = [store.read_bytes(f"shards/0000{n}{suffix}") for n in (1, 2)]
        for shard, content in zip(("00002", "00001"), data, strict=True):
            store.write_bytes(f"shards/{shard}{suffix}", content)
    assert shards_of(store, ["000011", "000027"]) == {"000011": "00002", "000027": "00001"}
    pictures = pictures_of_keys(store, ["000011", "nobody"])
    assert list(pictures) == ["000011"]
    assert cell_of(pictures, "000011").note == "000011"
    assert cell_of(pictures, "nobody", "0.5") == Cell(None, f"nobody: {NO_PICTURE}", "0.5")


def test_a_row_that_failed_has_no_shard(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=8, fail_every=4)
    assert shards_of(store, ["000002", "000003"]) == {"000002": "00000"}
    assert Store(str(tmp_path)).exists("shards/00000.tar")
