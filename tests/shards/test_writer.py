import pytest

from declip_shards import Sample, layout, read_samples, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.writer import pack_tar


def test_the_same_dataset_has_the_same_bytes(tmp_path):
    one = write_fake_dataset(str(tmp_path / "a"), num_shards=1)
    two = write_fake_dataset(str(tmp_path / "b"), num_shards=1)
    for path in (layout.tar_path("00000"), layout.shard_parquet_path("00000")):
        assert one.read_bytes(path) == two.read_bytes(path)


def test_parquet_has_every_row_and_the_tar_the_successes(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=9, fail_every=3)
    rows = sidecars.read_rows(store, layout.shard_parquet_path("00000"), ["key", "status"])
    good = [r["key"] for r in rows if r["status"] == "success"]
    assert (len(rows), len(good)) == (9, 6)
    assert [s.key for s in read_samples(store, "00000")] == good


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_keys_that_would_break_a_tar_are_refused(key):
    sample = Sample(key=key, image=b"", caption="", metadata={})
    with pytest.raises(ValueError, match="dot or a slash"):
        pack_tar([sample])


def test_a_repeated_key_is_refused():
    sample = Sample(key="1", image=b"", caption="", metadata={})
    with pytest.raises(ValueError, match="repeated"):
        pack_tar([sample, sample])
