import pyarrow as pa

from declip_shards import layout, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.validation import check_shard


def test_a_shard_of_the_writer_is_valid_and_a_lost_sample_is_named(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=6, fail_every=3)
    assert check_shard(store, "00000") == []
    path = layout.shard_parquet_path("00000")
    rows = sidecars.read_rows(store, path)
    rows[2]["status"] = "success"  # the third row failed, so the tar lacks it
    sidecars.write_table(store, path, pa.Table.from_pylist(rows))
    assert "missing ['000002']" in check_shard(store, "00000")[0]
