"""Where our processor time goes: each part called alone, on the same pictures and server."""

import asyncio
import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from declip_ingest.decode import ImageNormalizer, encode_jpeg
from declip_ingest.decoder_pool import DecoderPool
from declip_ingest.fetch import Fetcher, FetchPolicy
from declip_ingest.image_policy import ImagePolicy
from declip_ingest.ledger import LedgerRow, write_ledger
from declip_shards import Store

if TYPE_CHECKING:
    from benchmarks import ingest_server, process_tree
else:
    import ingest_server
    import process_tree

ROUNDS = 3
"""The least of so many counts: a neighbor on the machine can only add."""


def _own_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _each(work: Callable[[bytes], object], files: Sequence[bytes]) -> float:
    """Milliseconds of this process's time for one file."""
    figures = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for file in files:
            work(file)
        figures.append(1000 * (time.process_time() - start) / len(files))
    return min(figures)


async def _many(work: Callable[[int], Awaitable[object]], count: int, at_once: int) -> None:
    numbers = iter(range(count))

    async def some() -> None:
        for number in numbers:
            await work(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(some())


async def _fetch_milliseconds(
    server: ingest_server.PictureServer, count: int, threads: int, **settings: Any
) -> float:
    """Of one fetch that keeps nothing; the second half of the URLs, when all hosts are known."""
    policy = FetchPolicy(allow_addresses=server.addresses, **settings)
    async with Fetcher(policy, max_connections=threads) as fetcher:
        await _many(lambda n: fetcher.fetch(server.url(n)), count, threads)
        start = _own_seconds()
        await _many(lambda n: fetcher.fetch(server.url(n)), count, threads)
        return 1000 * (_own_seconds() - start) / count


async def _pool_milliseconds(files: Sequence[bytes], at_once: int) -> float:
    """Of one picture through a child process, that child included."""
    async with DecoderPool(ImagePolicy()) as pool:
        await pool.decode(files[0])
        figures = []
        for _ in range(ROUNDS):
            start = process_tree.cpu_seconds(os.getpid())
            await _many(lambda n: pool.decode(files[n]), len(files), at_once)
            cpu = process_tree.cpu_seconds(os.getpid()) - start
            figures.append(1000 * cpu / len(files))
        return min(figures)


def _encoding(files: Sequence[bytes]) -> dict[str, float]:
    """What optimized tables cost, at the size that is stored."""
    pixels = [
        cv2.resize(np.asarray(cv2.imdecode(np.frombuffer(f, np.uint8), 1)), (341, 256))
        for f in files[:50]
    ]
    options = [cv2.IMWRITE_JPEG_QUALITY, 90]
    queue = iter(pixels * ROUNDS)
    plain = _each(lambda _: cv2.imencode(".jpg", next(queue), options), files[:50])
    queue = iter(pixels * ROUNDS)
    optimized = _each(lambda _: encode_jpeg(np.asarray(next(queue), np.uint8), 90), files[:50])
    return {"encode, plain Huffman": plain, "encode, optimized Huffman": optimized}


def _ledger_milliseconds() -> float:
    rows = [
        LedgerRow(key=f"{n:09d}", url=f"http://127.0.0.1/{n}.jpg", host="127.0.0.1", attempts=1)
        for n in range(1000)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        return _each(lambda _: write_ledger(store, "00000", rows), [b""]) / len(rows)


def measure(
    server: ingest_server.PictureServer, originals: Path, *, count: int, threads: int
) -> dict[str, float]:
    """Part -> milliseconds of processor time an image.

    Args:
        server: serves ``originals``.
        originals: folder of JPEGs.
        count: URLs of a round of fetches.
        threads: fetches at a time.
    """
    cv2.setNumThreads(1)
    files = [path.read_bytes() for path in sorted(originals.glob("*.jpg"))[:100]]
    found: dict[str, float] = {}

    def fetch(**settings: Any) -> float:
        return asyncio.run(_fetch_milliseconds(server, count, threads, **settings))

    found["fetch"] = fetch()
    found["fetch, robots.txt ignored"] = fetch(robots="ignore")
    found["fetch, no X-Robots-Tag"] = fetch(disallowed_header_directives=())
    found["fetch, no least rate"] = fetch(min_bytes_per_second=0)
    for resizer in ("scaled", "exact"):
        normalize = ImageNormalizer(ImagePolicy(resizer=resizer))
        normalize(files[0])
        found[f"decode to store, {resizer}, in process"] = _each(normalize, files)
    found["decode to store, scaled, through the pool"] = asyncio.run(_pool_milliseconds(files, 8))
    found |= _encoding(files)
    found["sha256"] = _each(lambda file: hashlib.sha256(file).digest(), files)
    found["ledger"] = _ledger_milliseconds()
    return {name: round(value, 3) for name, value in found.items()}
