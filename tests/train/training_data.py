"""A small dataset with selection and neighbor table, for the trainer's tests."""

import numpy as np
import pyarrow as pa

from declip_shards import Store, layout, sidecars
from declip_shards.fakes import write_fake_dataset


def write_training_data(root, *, num_shards=2, samples_per_shard=24, image_size=32, dropped=0):
    """Fake shards; the last ``dropped`` samples of each are not selected; random neighbors.

    The first sample of each shard has no neighbor.
    """
    store = write_fake_dataset(
        str(root), num_shards=num_shards, samples_per_shard=samples_per_shard, image_size=image_size
    )
    keys = {}
    for shard in layout.list_shards(store):
        rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), ["key"])
        keys[shard] = [row["key"] for row in rows]
    everyone = sorted(key for some in keys.values() for key in some)
    rng = np.random.default_rng(0)
    for shard, own in keys.items():
        keep = [place < len(own) - dropped for place in range(len(own))]
        reason = ["" if kept else "caption_too_short" for kept in keep]
        table = pa.table({"key": own, "keep": keep, "reason": reason})
        sidecars.write_table(store, layout.selection_path("default", shard), table)
        near = [[str(k) for k in rng.choice(everyone, 3, replace=False)] for _ in own]
        near[0] = []
        columns = {
            "key": own,
            "neighbor_keys": pa.array(near, pa.list_(pa.string())),
            "scores": pa.array([[0.5] * len(n) for n in near], pa.list_(pa.float32())),
        }
        sidecars.write_table(store, layout.neighbors_path("captions", shard), pa.table(columns))
    return Store(str(root))
