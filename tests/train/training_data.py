"""A small dataset with selection, neighbor table and embeddings, for the trainer's tests."""

import io

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


def write_embeddings(store, *, name="captions", dim=16, dtype=np.float16, without=()):
    """Random unit vectors of all captions in clip-retrieval's layout; returns them by key.

    Keys in ``without`` have none.
    """
    rng = np.random.default_rng(1)
    vectors: dict[str, np.ndarray] = {}
    for shard in layout.list_shards(store):
        rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), ["key", "caption"])
        rows = [row for row in rows if row["key"] not in without]
        table = rng.normal(size=(len(rows), dim))
        table = (table / np.linalg.norm(table, axis=1, keepdims=True)).astype(dtype)
        keys = [row["key"] for row in rows]
        vectors.update(zip(keys, table, strict=True))
        sink = io.BytesIO()
        np.save(sink, table)
        part = str(int(shard))
        store.write_bytes(layout.embedding_path(name, "text_emb", part), sink.getbuffer())
        columns = {"image_path": keys, "caption": [row["caption"] for row in rows], "key": keys}
        path = layout.embedding_path(name, "metadata", part)
        sidecars.write_table(store, path, pa.table(columns))
    return vectors
