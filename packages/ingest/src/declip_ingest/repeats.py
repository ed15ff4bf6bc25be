"""The alarm for placeholders: the same bytes from many URLs are a notice and no photo.

Hosts that lose a photo often answer with status 200 and a picture that says so. A shard alone sees
too few of them; the whole dataset's digests give them away.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip_shards import DeclipError, Store, layout, sidecars

MIN_URLS = 10
"""The same picture from so many URLs is suspected; the default of ``placeholder_repeats``."""
ROWS_A_PASS = 32_000_000
"""Digests in memory at a time, 8 bytes each; a larger dataset is read several times."""


@dataclass(frozen=True, kw_only=True)
class RepeatedImage:
    """A picture that came from many URLs."""

    sha256: str
    """Hex digest of the file as it came."""
    num_urls: int
    """Different URLs that it came from."""
    key: str
    """The first sample that shows it, to look at."""
    url: str
    """Of that sample."""


def repeated_images(store: Store, *, min_urls: int = MIN_URLS) -> list[RepeatedImage]:
    """Digests of stored pictures that occur under at least ``min_urls`` different URLs.

    Returns:
        The most frequent first.

    Raises:
        DeclipError: ``min_urls`` is below 2, or a shard's parquet is damaged.
    """
    if min_urls < 2:
        raise DeclipError(
            f"min_urls is {min_urls}, which would suspect every picture; give 2 or more."
        )
    shards = layout.list_shards(store)
    num_rows = sum(sidecars.num_rows(store, layout.shard_parquet_path(s)) for s in shards)
    num_passes = max(1, -(-num_rows // ROWS_A_PASS))
    found = [
        image
        for number in range(num_passes)
        for image in _repeated_of_pass(store, shards, min_urls, number, num_passes)
    ]
    return sorted(found, key=lambda image: (-image.num_urls, image.sha256))


def _repeated_of_pass(
    store: Store, shards: Sequence[str], min_urls: int, number: int, num_passes: int
) -> list[RepeatedImage]:
    """Those whose digest's first eight bytes leave ``number`` when divided by the passes."""
    starts = [
        values[values % num_passes == number]
        for values in (_starts(table) for table in _digests(store, shards, ["sha256"]))
    ]
    seen, counts = np.unique(np.concatenate([_NONE, *starts]), return_counts=True)
    suspected = seen[counts >= min_urls]
    del starts, seen, counts
    if not len(suspected):
        return []
    first: dict[str, tuple[str, str]] = {}
    urls: dict[str, set[bytes]] = {}
    for table in _digests(store, shards, ["sha256", "key", "url"]):
        rows = table.filter(pa.array(np.isin(_starts(table), suspected))).to_pylist()
        for row in rows:
            first.setdefault(row["sha256"], (row["key"], row["url"]))
            # Digests, not URLs: a notice may stand for millions of photos.
            name = hashlib.blake2b(row["url"].encode(), digest_size=8).digest()
            urls.setdefault(row["sha256"], set()).add(name)
    return [
        RepeatedImage(sha256=digest, num_urls=len(urls[digest]), key=key, url=url)
        for digest, (key, url) in first.items()
        if len(urls[digest]) >= min_urls
    ]


_NONE = np.empty(0, dtype=np.uint64)


def _digests(store: Store, shards: Sequence[str], columns: list[str]) -> Iterator[pa.Table]:
    """The rows of each shard that have a picture."""
    for shard in shards:
        table = sidecars.read_table(store, layout.shard_parquet_path(shard), columns)
        yield table.filter(pc.is_valid(table["sha256"]))


def _starts(table: pa.Table) -> np.ndarray:
    """The first eight bytes of each digest, as numbers."""
    digests = table["sha256"].to_pylist()
    return np.fromiter((int(d[:16], 16) for d in digests), dtype=np.uint64, count=len(digests))
