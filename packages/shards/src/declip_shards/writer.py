"""Write a shard: tar of the successes, parquet of every attempted row, stats last."""

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


_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
"""Of an empty regular file without a name: mode 644, no times, no owners."""
_NAME_END, _SIZE, _SIZE_END, _CHECKSUM, _CHECKSUM_END = 100, 124, 136, 148, 156
"""Where the fields that differ lie, in bytes (POSIX.1-1988, ustar)."""
_HEADER_SUM = sum(_HEADER) - sum(_HEADER[_CHECKSUM:_CHECKSUM_END] + _HEADER[_SIZE:_SIZE_END])
_BEFORE_SIZE = _HEADER[_NAME_END:_SIZE]
_BEFORE_CHECKSUM = _HEADER[_SIZE_END:_CHECKSUM]
_BEHIND_CHECKSUM = _HEADER[_CHECKSUM_END:]
_to_json = json.JSONEncoder(sort_keys=True).encode


def _member_header(name: str, size: int) -> bytes:
    """The 512 bytes that tarfile would write, for a fifth of the time.

    Raises:
        ValueError: tarfile refuses it: the name is longer than 100 bytes, the file than 8 GiB.
    """
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > _NAME_END or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    octal = b"%011o\0" % size
    # The sum is that of a header whose own field is blank.
    checksum = _HEADER_SUM + sum(encoded) + sum(octal) + 8 * ord(" ")
    return b"".join(
        (
            encoded.ljust(_NAME_END, b"\0"),
            _BEFORE_SIZE,
            octal,
            _BEFORE_CHECKSUM,
            b"%06o\0 " % checksum,
            _BEHIND_CHECKSUM,
        )
    )


def pack_tar(samples: Iterable[Sample]) -> bytes:
    """A webdataset tar: members of a key contiguous, keys ascending, no times, no owners.

    The same samples in any order give the same bytes.
    """
    parts: list[bytes] = []
    total, previous = 0, None
    for sample in sorted(samples, key=lambda s: s.key):
        if sample.key == previous or "." in sample.key or "/" in sample.key:
            raise ValueError(f"key {sample.key!r} is repeated, or has a dot or a slash")
        previous = sample.key
        text = sample.caption.encode("utf-8", "surrogatepass")
        meta = _to_json(dict(sample.metadata)).encode()
        members = ((sample.image_extension, sample.image), ("txt", text), ("json", meta))
        for extension, data in members:
            size = len(data)
            padding = -size % tarfile.BLOCKSIZE
            parts += (_member_header(f"{sample.key}.{extension}", size), data, bytes(padding))
            total += tarfile.BLOCKSIZE + size + padding
    # Two empty blocks end a tar, and whole records of twenty make it up.
    total += 2 * tarfile.BLOCKSIZE
    parts.append(bytes(2 * tarfile.BLOCKSIZE + -total % tarfile.RECORDSIZE))
    return b"".join(parts)


def shard_files(
    shard: str, samples: Iterable[Sample], rows: pa.Table, stats: Mapping[str, Any]
) -> dict[str, bytes]:
    """The three files of a shard by path; the stats file, which marks it as done, comes last.

    Args:
        shard: its number, five digits.
        samples: the successes, in any order.
        rows: every attempted row with img2dataset's columns ``key``, ``status``,
            ``error_message`` and the rest; sorted by key here.
        stats: img2dataset's figures.
    """
    return {
        layout.tar_path(shard): pack_tar(samples),
        layout.shard_parquet_path(shard): sidecars.pack_table(rows.sort_by("key")),
        layout.shard_stats_path(shard): json.dumps(dict(stats), indent=2, sort_keys=True).encode(),
    }


def write_shard(
    store: Store, shard: str, samples: Iterable[Sample], rows: pa.Table, stats: Mapping[str, Any]
) -> list[str]:
    """Write the files of :func:`shard_files` in their order.

    Returns:
        The paths of tar and parquet (the stats file holds times and is not hashed).
    """
    for path, data in shard_files(shard, samples, rows, stats).items():
        store.write_bytes(path, data)
    return [layout.tar_path(shard), layout.shard_parquet_path(shard)]
