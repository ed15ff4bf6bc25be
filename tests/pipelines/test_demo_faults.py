"""Rows that must fail, and rows that must be dropped."""

import io
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipelines.demo_fakes import make_fake_packages
from pipelines.demo_faults import JUNK_KINDS, make_failure_url, make_junk
from pipelines.demo_server import FAILURE_KINDS
from pipelines.demo_sources import read_grocery


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    packages, _ = make_fake_packages(folder)
    assert zipfile.is_zipfile(folder / packages["grocery"].archive)
    return list(read_grocery(folder / packages["grocery"].archive))


def test_kinds_of_failure_take_turns_and_urls_differ():
    made = [make_failure_url(n, "127.0.0.1", 1234) for n in range(120)]
    assert len({url for url, _ in made}) == 120
    counts = Counter(status for _, status in made)
    assert set(counts) == set(FAILURE_KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_failures_without_a_route():
    urls = {kind: url for url, kind in (make_failure_url(n, "h", 80) for n in range(14))}
    assert urls["bad_scheme"].startswith("file:///")
    assert urls["connection_refused"].startswith("http://h:81/")
    assert urls["timeout"] == "http://h:80/fail/timeout/0"


def test_junk_is_what_it_says(photos):
    captions = [f"caption {n}" for n in range(len(photos))]
    junk = list(make_junk(photos, captions, 3 * len(JUNK_KINDS)))
    assert Counter(j.kind for j in junk) == dict.fromkeys(JUNK_KINDS, 3)
    assert len({(j.kind, j.name) for j in junk}) == len(junk)
    assert junk == list(make_junk(photos, captions, 3 * len(JUNK_KINDS)))
    for one in junk:
        image = Image.open(io.BytesIO(one.data))
        image.load()
        is_plain = bool((np.ptp(np.asarray(image), axis=(0, 1)) <= 1).all())
        assert is_plain == (one.kind == "constant_color")
        assert (max(image.size) <= 8) == (one.kind == "tiny_image")
        assert (image.width / image.height >= 40) == (one.kind == "extreme_aspect")
        is_real = one.caption in captions
        assert is_real != one.kind.endswith("_caption")


def test_junk_captions(photos):
    captions = {j.kind: j.caption for j in make_junk(photos, ["x"] * len(photos), 6)}
    assert captions["file_name_caption"] == "IMG_1234.jpg"
    assert captions["url_caption"].startswith("https://")
    assert captions["empty_caption"] == ""


def test_no_junk_needs_no_photos():
    assert list(make_junk([], [], 0)) == []
