"""Unit vectors to index, and embeddings on disk that hold them, without a picture."""

import io
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from declip_filter.embeddings import METADATA_SCHEMA, Part, part_path
from declip_shards import Store, layout, sidecars
from declip_shards.manifest import canonical_json


def unit_rows(num: int, dim: int, seed: int = 0, num_centers: int = 0) -> np.ndarray:
    """float16 (num, dim), around as many centers, or none."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num, dim))
    if num_centers:
        centers = rng.normal(size=(num_centers, dim)) * 1.5
        rows += centers[rng.integers(num_centers, size=num)]
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float16)


def write_embeddings(root: str, shards: Mapping[str, np.ndarray], *, digest: str = "d") -> Store:
    """Embeddings ``text`` of these shards, float16 (rows, dim) each, captions of three kinds."""
    store = Store(root)
    for shard, vectors in shards.items():
        keys = [f"{shard}{number:05d}" for number in range(len(vectors))]
        captions = [f"caption {shard} {number % 3}" for number in range(len(vectors))]
        part = Part(
            shard=shard,
            partition=str(int(shard)),
            num_rows=len(keys),
            dim=vectors.shape[1],
            kinds=("text_emb",),
            encoder="own:vectors",
            encoder_digest=digest,
            selection="",
        )
        if keys:
            sink = io.BytesIO()
            np.save(sink, vectors)
            path = layout.embedding_path("text", "text_emb", part.partition)
            store.write_bytes(path, sink.getvalue())
            names = {"image_path": keys, "caption": captions, "key": keys}
            table = pa.table({**names, "shard": [shard] * len(keys)}, schema=METADATA_SCHEMA)
            path = layout.embedding_path("text", "metadata", part.partition)
            sidecars.write_table(store, path, table)
        store.write_bytes(part_path("text", shard), canonical_json(asdict(part)))
        store.write_bytes(layout.shard_stats_path(shard), b"{}")
    return store
