"""Write a shard: tar of the successes, parquet of every attempted row, stats last."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from declip_shards import layout, sidecars
from declip_shards.store import Store


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image-text pair as it lies in a tar."""

    key: str
    """Names the sample from its URL to its loss term."""
    image: bytes
    """Encoded image."""
    caption: str
    """Text, kept exactly."""
    metadata: Mapping[str, Any]
    """What the ``.json`` member holds: plain JSON values."""
    image_extension: str = "jpg"
    """Tar member's extension, without the dot."""


def pack_tar(samples: Iterable[Sample]) -> bytes:
    """A webdataset tar: members of a key contiguous, keys ascending, no times, no owners.

    The same samples in any order give the same bytes.
    """
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        previous = None
        for sample in sorted(samples, key=lambda s: s.key):
            if sample.key == previous or "." in sample.key or "/" in sample.key:
                raise ValueError(f"key {sample.key!r} is repeated, or has a dot or a slash")
            previous = sample.key
            text = sample.caption.encode("utf-8", "surrogatepass")
            meta = json.dumps(dict(sample.metadata), sort_keys=True).encode()
            members = ((sample.image_extension, sample.image), ("txt", text), ("json", meta))
            for extension, data in members:
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def write_shard(
    store: Store, shard: str, samples: Iterable[Sample], rows: pa.Table, stats: Mapping[str, Any]
) -> list[str]:
    """Write the three files of a shard; the stats file, which marks it as done, comes last.

    Args:
        rows: every attempted row with img2dataset's columns ``key``, ``status``,
            ``error_message`` and the rest; sorted by key here.

    Returns:
        The paths of tar and parquet (the stats file holds times and is not hashed).
    """
    tar, parquet = layout.tar_path(shard), layout.shard_parquet_path(shard)
    store.write_bytes(tar, pack_tar(samples))
    sidecars.write_table(store, parquet, rows.sort_by("key"))
    text = json.dumps(dict(stats), indent=2, sort_keys=True)
    store.write_bytes(layout.shard_stats_path(shard), text.encode())
    return [tar, parquet]
