"""How near the scaled decoding comes, and what a picture costs, on photographs of one's own.

    python benchmarks/decoding.py FOLDER [FOLDER ...] [--size 256] [--quality 90] [--limit 60]

For each folder of JPEGs: PSNR of the scaled pixels against img2dataset's (full decode, INTER_AREA),
beside the PSNR that encoding those at the asked quality costs anyway; then processor milliseconds a
picture of img2dataset's own Resizer, of ours, and of ours through the pool. Processor time of this
process (and the children's), the least of several interleaved rounds picture by picture, OpenCV on
one thread everywhere.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from declip_ingest.decode import ImageNormalizer, _decode_scaled
from declip_ingest.decoder_pool import DecoderPool
from declip_ingest.image_policy import ImagePolicy
from declip_ingest.jpeg import read_header
from declip_ingest.resize import plan_resize, resize_exact

ROUNDS = 7


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Decibels of 8-bit pixels; 99 where they are equal."""
    error = float(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def nearness(data: bytes, size: int, quality: int) -> tuple[float, float, float] | None:
    """PSNR of the scaled pixels, of the encoded exact ones, of the encoded scaled ones."""
    header = read_header(data)
    if header is None or min(header.width, header.height) <= size:
        return None
    plan = plan_resize(
        header.width, header.height, mode="keep_ratio", size=size, only_if_bigger=False
    )
    exact = resize_exact(simplejpeg.decode_jpeg(data, "BGR"), plan)
    near = _decode_scaled(data, header, 1, plan)
    option = [cv2.IMWRITE_JPEG_QUALITY, quality]
    encoded, both = (
        np.asarray(cv2.imdecode(cv2.imencode(".jpg", pixels, option)[1], cv2.IMREAD_COLOR))
        for pixels in (exact, near)
    )
    return psnr(near, exact), psnr(encoded, exact), psnr(both, exact)


def milliseconds(ways: dict[str, Callable[[bytes], object]], files: Sequence[bytes]) -> None:
    """Print the processor time of each way."""
    best = {name: [float("inf")] * len(files) for name in ways}
    for _ in range(ROUNDS):
        # Way by way, as each would run alone: mixed picture by picture they spoil each other's
        # memory pools, which costs milliseconds of page faults.
        for name, way in ways.items():
            for index, data in enumerate(files):
                start = time.process_time()
                way(data)
                best[name][index] = min(best[name][index], time.process_time() - start)
    first = sum(next(iter(best.values())))
    for name, times in best.items():
        ratio = first / sum(times)
        print(f"    {name:32s} {1e3 * sum(times) / len(files):7.2f} ms   {ratio:5.2f} x")


async def pool_milliseconds(files: Sequence[bytes], policy: ImagePolicy) -> tuple[float, float]:
    """Processor time a picture of this process and of the child, through the pool."""

    def child_seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/schedstat").read_text().split()
        return int(fields[0]) / 1e9

    least = [float("inf")] * 2
    async with DecoderPool(policy) as pool:
        for _ in range(ROUNDS):
            await asyncio.gather(*(pool.decode(data) for data in files))
            pid = pool.pids[0]
            ours, theirs = time.process_time(), child_seconds(pid)
            await asyncio.gather(*(pool.decode(data) for data in files))
            spent = (time.process_time() - ours, child_seconds(pid) - theirs)
            least = [min(a, b) for a, b in zip(least, spent, strict=True)]
    return 1e3 * least[0] / len(files), 1e3 * least[1] / len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--limit", type=int, default=60)
    asked = parser.parse_args()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.resizer import Resizer

    cv2.setNumThreads(1)
    theirs = Resizer(asked.size, "keep_ratio", False, encode_quality=asked.quality)
    policies = {
        name: ImagePolicy(image_size=asked.size, encode_quality=asked.quality, resizer=name)
        for name in ("scaled", "exact")
    }
    for folder in asked.folder:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        files = [path.read_bytes() for path in paths[:: max(1, len(paths) // asked.limit)]]
        print(
            f"{folder.name}: {len(files)} files of {sum(map(len, files)) / len(files) / 1e3:.0f} KB"
        )
        found = [f for data in files if (f := nearness(data, asked.size, asked.quality))]
        if found:
            table = np.array(found)
            for name, column in zip(
                ("scaled against exact", "exact, encoded", "scaled, encoded"), table.T, strict=True
            ):
                low, five, half = np.percentile(column, [0, 5, 50])
                print(f"    {name:32s} PSNR least {low:.1f}, 5% {five:.1f}, median {half:.1f} dB")
            print(
                f"    least distance to the encoding's own {min(table[:, 0] - table[:, 1]):.1f} dB"
            )
        ways: dict[str, Callable[[bytes], object]] = {
            "img2dataset's Resizer": lambda data: theirs(io.BytesIO(data)),
            "ours, scaled": ImageNormalizer(policies["scaled"]),
            "ours, exact": ImageNormalizer(policies["exact"]),
            "ours, scaled, standard tables": ImageNormalizer(
                dataclasses.replace(policies["scaled"], optimize_huffman=False)
            ),
        }
        with contextlib.suppress(KeyboardInterrupt):
            milliseconds(ways, files)
            parent, child = asyncio.run(pool_milliseconds(files, policies["scaled"]))
            print(f"    through the pool: this process {parent:.3f} ms, the child {child:.2f} ms")


if __name__ == "__main__":
    main()
