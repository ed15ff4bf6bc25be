"""The alarm for placeholders over a whole dataset."""

import hashlib
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from declip_ingest import repeats
from declip_ingest.repeats import repeated_images
from declip_shards import DeclipError, Store, layout, write_shard


def write_dataset(root: str, num_shards: int = 5, rows: int = 60) -> dict[str, set[str]]:
    """Shards whose pictures repeat at random; digest -> URLs, by brute force."""
    rng, store = np.random.default_rng(3), Store(root)
    urls: dict[str, set[str]] = defaultdict(set)
    for shard in range(num_shards):
        table = []
        for i in range(rows):
            failed = i % 7 == 0
            digest = hashlib.sha256(b"%d" % rng.zipf(1.7)).hexdigest()
            url = f"http://h/{rng.integers(40)}.jpg"
            if not failed:
                urls[digest].add(url)
            table.append({"key": layout.sample_key(shard, i, 100), "url": url,
                          "caption": "a", "sha256": None if failed else digest})  # fmt: skip
        write_shard(store, layout.shard_name(shard), [], pa.Table.from_pylist(table), {})
    return urls


@pytest.mark.parametrize("a_pass", [repeats.ROWS_A_PASS, 50])
@pytest.mark.parametrize("min_urls", [2, 6, 10_000])
def test_it_finds_what_brute_force_finds(tmp_path, monkeypatch, a_pass, min_urls):
    monkeypatch.setattr(repeats, "ROWS_A_PASS", a_pass)
    urls = write_dataset(str(tmp_path))
    found = repeated_images(Store(str(tmp_path)), min_urls=min_urls)
    expected = {digest: len(seen) for digest, seen in urls.items() if len(seen) >= min_urls}
    assert {image.sha256: image.num_urls for image in found} == expected
    assert [i.num_urls for i in found] == sorted((i.num_urls for i in found), reverse=True)
    assert all(image.url in urls[image.sha256] and len(image.key) == 7 for image in found)


def test_the_same_url_many_times_is_no_alarm(tmp_path):
    store, digest = Store(str(tmp_path)), hashlib.sha256(b"x").hexdigest()
    table = [{"key": f"{i:07d}", "url": "http://h/1.jpg", "sha256": digest} for i in range(50)]
    write_shard(store, "00000", [], pa.Table.from_pylist(table), {})
    assert repeated_images(store, min_urls=2) == []


def test_an_empty_dataset_and_a_wrong_limit(tmp_path):
    assert repeated_images(Store(str(tmp_path))) == []
    with pytest.raises(DeclipError, match="min_urls is 1, which would suspect every picture"):
        repeated_images(Store(str(tmp_path)), min_urls=1)
