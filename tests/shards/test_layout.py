import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_shards import layout
from declip_shards.fakes import write_fake_dataset
from declip_shards.manifest import canonical_json


@given(st.integers(0, 99999), st.integers(1, 10000), st.data())
def test_keys_are_unique_sorted_and_img2datasets(shard_id, shard_size, data):
    """img2dataset: key = 10**d * shard + index, zero-padded to 5 + d, d = ceil(log10(size))."""
    import math

    index = data.draw(st.integers(0, shard_size - 1))
    digits = math.ceil(math.log10(shard_size)) if shard_size > 1 else 1
    true_key = 10**digits * shard_id + index
    assert layout.sample_key(shard_id, index, shard_size) == f"{true_key:0{5 + digits}d}"


def test_an_index_beyond_the_shard_is_refused():
    with pytest.raises(ValueError, match="outside"):
        layout.sample_key(0, 10, 10)


def test_only_complete_shards_are_listed(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=3, samples_per_shard=2)
    store.remove(layout.shard_stats_path("00001"))
    assert layout.list_shards(store) == ["00000", "00002"]


def test_a_shard_that_ingest_does_not_list_is_none_of_the_dataset(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=3, samples_per_shard=2)
    files = [{"path": layout.tar_path(shard)} for shard in ("00000", "00002")]
    store.write_bytes(layout.manifest_path("ingest"), canonical_json({"files": files}))
    assert layout.list_shards(store) == ["00000", "00002"]
