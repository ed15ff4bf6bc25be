"""How far stored pictures are from their originals, and how many bytes they take."""

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

_NUMBER = re.compile(r"/p/(\d+)\.jpg$")


def stored_pictures(shards: Path) -> Iterator[tuple[int, bytes]]:
    """(number of the picture in its URL, stored JPEG) of every sample below a folder."""
    for path in sorted(shards.glob("*.tar")):
        images: dict[str, bytes] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                key, _, ending = member.name.partition(".")
                if ending == "jpg":
                    images[key] = stream.read()
                elif ending == "json":
                    match = _NUMBER.search(json.load(stream)["url"])
                    assert match is not None
                    yield int(match[1]), images[key]


def psnr(original: bytes, stored: bytes) -> float:
    """Decibels of a stored JPEG against its original, which is decoded in full and reduced by the
    mean over areas in floating point (Lanczos where it has to grow); infinite where equal."""
    source, result = _decoded(original), _decoded(stored)
    height, width = result.shape[:2]
    shrinks = height <= source.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    wanted = cv2.resize(source, (width, height), interpolation=method)
    error = float(np.mean((wanted - result) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))


def _decoded(data: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(pixels, np.float32)


def quality(shards: Path, originals: Path, limit: int) -> dict[str, Any]:
    """Mean and least PSNR (dB) and mean bytes of the first ``limit`` pictures by number, and how
    many pictures there are in all."""
    files = sorted(originals.glob("*.jpg"))
    stored = dict(stored_pictures(shards))
    figures = [psnr(files[n % len(files)].read_bytes(), stored[n]) for n in sorted(stored)[:limit]]
    return {
        "pictures": len(stored),
        "psnr_mean_db": round(float(np.mean(figures)), 2),
        "psnr_least_db": round(min(figures), 2),
        "mean_bytes": round(sum(map(len, stored.values())) / max(len(stored), 1)),
        "baseline_420": all(_is_baseline_420(data) for data in stored.values()),
    }


def _is_baseline_420(data: bytes) -> bool:
    """Whether a JPEG is baseline with chroma at half size both ways."""
    stream = io.BytesIO(data[2:])
    while True:
        marker, length = stream.read(2), int.from_bytes(stream.read(2), "big")
        body = stream.read(length - 2)
        if marker[1] in (0xC0, 0xC1, 0xC2):
            return marker[1] == 0xC0 and body[7] == 0x22
