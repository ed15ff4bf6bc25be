"""Small datasets of real photographs and copies of them, with the signals that rungs read."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import sklearn
from PIL import Image

from declip_filter.captions import caption_sha
from declip_filter.image_signals import difference_hash
from declip_filter.picture_hashes import picture_hashes
from declip_shards import Store, layout, read_samples, sidecars, writer

_TEXTS = ("url", "caption", "key", "status", "error_message", "sha256")
_NUMBERS = ("width", "height", "original_width", "original_height")
ROWS = pa.schema([(n, pa.string()) for n in _TEXTS] + [(n, pa.int32()) for n in _NUMBERS])
_HEX = ("image_sha256", "image_dhash", "caption_sha", "image_phash", "image_layout")
SIGNALS = pa.schema(
    [("key", pa.string()), *((n, pa.int32()) for n in _NUMBERS), *((n, pa.string()) for n in _HEX)]
)
PHOTOS = Path(sklearn.__file__).parent / "datasets" / "images"
WIDTH, HEIGHT = 160, 120


def patches(num: int) -> list[Image.Image]:
    """Parts of two photographs that ship with scikit-learn, none like another."""
    found = []
    for name in ("china.jpg", "flower.jpg"):
        with Image.open(PHOTOS / name) as picture:
            photo = picture.convert("RGB")
        found += [
            photo.crop((left, top, left + WIDTH, top + HEIGHT))
            for top in range(0, photo.height - HEIGHT, HEIGHT)
            for left in range(0, photo.width - WIDTH, WIDTH)
        ]
    rich = [patch for patch in found if np.asarray(patch.convert("L")).std() > 30]
    assert len(rich) >= num
    return rich[:num]


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def png(picture: Image.Image) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def shrunk(picture: Image.Image, share: float) -> Image.Image:
    size = (round(picture.width * share), round(picture.height * share))
    return picture.resize(size, Image.Resampling.BICUBIC)


def cropped(picture: Image.Image, share: float) -> Image.Image:
    x, y = round(picture.width * share), round(picture.height * share)
    return picture.crop((x, y, picture.width - x, picture.height - y))


def write_pairs(
    root: str,
    shards: Sequence[Sequence[tuple[bytes, str, int]]],
    *,
    names: Sequence[str] | None = None,
    hashes: bool = True,
) -> Store:
    """Shards of (picture, caption, original side in pixels) and their signals ``basic``."""
    store = Store(root)
    for number, entries in enumerate(shards):
        shard = layout.shard_name(number) if names is None else names[number]
        samples, rows = [], []
        for index, (image, caption, side) in enumerate(entries):
            key = f"{shard}{index:04d}"
            came = hashlib.sha256(b"as it came" + image).hexdigest()
            row = {"url": f"http://example.invalid/{key}", "caption": caption, "key": key,
                   "status": "success", "error_message": None, "width": WIDTH, "height": HEIGHT,
                   "original_width": side, "original_height": side, "sha256": came}  # fmt: skip
            rows.append(row)
            samples.append(writer.Sample(key=key, image=image, caption=caption, metadata=row))
        writer.write_shard(store, shard, samples, pa.Table.from_pylist(rows, ROWS), {})
        write_signals(store, shard, rows, hashes=hashes)
    return store


def write_signals(
    store: Store, shard: str, rows: Sequence[Mapping[str, Any]], *, hashes: bool = True
) -> None:
    """What FindDuplicates reads, measured by the functions that measure."""
    originals = {row["key"]: row for row in rows}
    measured = []
    for sample in read_samples(store, shard):
        with Image.open(io.BytesIO(sample.image)) as picture:
            gray = np.asarray(picture.convert("L"))
        measured.append(
            {
                "key": sample.key,
                "width": gray.shape[1],
                "height": gray.shape[0],
                "original_width": originals[sample.key]["original_width"],
                "original_height": originals[sample.key]["original_height"],
                "image_sha256": hashlib.sha256(sample.image).hexdigest(),
                "image_dhash": difference_hash(gray),
                "caption_sha": caption_sha(sample.caption),
                **(picture_hashes(gray) if hashes else {}),
            }
        )
    path = layout.signals_path("basic", shard)
    schema = SIGNALS if hashes else pa.schema(list(SIGNALS)[:-2])
    sidecars.write_table(store, path, pa.Table.from_pylist(measured, schema))
