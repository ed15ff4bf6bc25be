"""Small datasets for tests, by one line, through the real writer."""

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from PIL import Image

from declip_shards import layout, writer
from declip_shards.store import Store

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "stripe", "cross")
_RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 60),
    "purple": (140, 50, 180),
    "orange": (240, 140, 30),
}


def draw(color: str, shape: str, size: int, rng: np.random.Generator) -> bytes:
    """A JPEG of a colored shape on a noisy light ground, ``size`` pixels square."""
    picture = rng.integers(225, 256, (size, size, 3), dtype=np.uint8)
    y, x = np.mgrid[0:size, 0:size]
    cy, cx = rng.uniform(0.4, 0.6, 2) * size
    radius = rng.uniform(0.25, 0.35) * size
    inside = {
        "circle": (y - cy) ** 2 + (x - cx) ** 2 < radius**2,
        "square": (abs(y - cy) < radius) & (abs(x - cx) < radius),
        "stripe": abs(y - cy) < radius / 2,
        "cross": (abs(y - cy) < radius / 3) | (abs(x - cx) < radius / 3),
    }[shape]
    picture[inside] = _RGB[color]
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def write_fake_dataset(
    root: str,
    *,
    num_shards: int = 2,
    samples_per_shard: int = 24,
    image_size: int = 32,
    seed: int = 0,
    fail_every: int = 0,
    caption: Callable[[str, str], str] = lambda color, shape: f"a {color} {shape}",
) -> Store:
    """Shards of colored shapes with honest captions; every ``fail_every``-th row failed."""
    store = Store(root)
    rng = np.random.default_rng(seed)
    for shard_id in range(num_shards):
        shard = layout.shard_name(shard_id)
        samples, rows = [], []
        for index in range(samples_per_shard):
            key = layout.sample_key(shard_id, index, max(samples_per_shard, 2))
            color, shape = str(rng.choice(COLORS)), str(rng.choice(SHAPES))
            text = caption(color, shape)
            failed = bool(fail_every) and index % fail_every == fail_every - 1
            row = {
                "url": f"http://example.invalid/{key}.jpg",
                "caption": text,
                "key": key,
                "status": "failed_to_download" if failed else "success",
                "error_message": "http_404" if failed else None,
                "width": None if failed else image_size,
                "height": None if failed else image_size,
                "original_width": None if failed else image_size,
                "original_height": None if failed else image_size,
                "sha256": None,
                "label": f"{color} {shape}",
                "category": shape,
                "split": "train" if shard_id < num_shards - 1 or num_shards == 1 else "test",
            }
            rows.append(row)
            if not failed:
                image = draw(color, shape, image_size, rng)
                samples.append(writer.Sample(key=key, image=image, caption=text, metadata=row))
        stats = {"count": len(rows), "successes": len(samples)}
        writer.write_shard(store, shard, samples, pa.Table.from_pylist(rows), stats)
    return store
