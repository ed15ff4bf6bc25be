"""The contract on disk: layout, manifest, reader, writer, sidecars, validation, fakes."""

from declip_shards.errors import DeclipError
from declip_shards.reader import MemberPlace, image_places, read_samples
from declip_shards.stage import Stage, TaskStats, open_worker
from declip_shards.store import Store
from declip_shards.writer import Sample, write_shard

__version__ = "0.1.0"

__all__ = [
    "DeclipError",
    "MemberPlace",
    "Sample",
    "Stage",
    "Store",
    "TaskStats",
    "image_places",
    "open_worker",
    "read_samples",
    "write_shard",
]
