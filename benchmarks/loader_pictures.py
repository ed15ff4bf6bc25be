"""Shards for the loader benchmark: real photographs and paintings, as they lie in usual datasets.

The pictures are those of the demo's packages (benchmarks/embed.py), and none is enlarged:

* ``500x375-q90``: the largest window of 4:3 in the middle, and of pictures of at least twice that
  size its four quarters too, scaled down to 500 x 375 (ImageNet's usual size), JPEG of quality 90;
* ``256-q90`` and ``256-q95``: the largest square in the middle, scaled down to 256 pixels, as
  img2dataset's center_crop leaves it, with qualities 90 and 95.

Scaled with Pillow's Lanczos filter, encoded by Pillow: baseline, 4:2:0. Pictures are put in another
order, for neighbors are alike. Each has the caption that its package gives it.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from declip_shards import Store, layout
from declip_shards.writer import Sample, write_shard

SETS = {
    "500x375-q90": (500, 375, 90),
    "256-q90": (256, 256, 90),
    "256-q95": (256, 256, 95),
}
"""Name -> width, height, quality."""
SHARD_ROWS = 64


def windows(image: Image.Image, width: int, height: int) -> Iterator[Image.Image]:
    """Parts of a picture that are at least ``width`` by ``height``, scaled down to that."""
    scale = min(image.width / width, image.height / height)
    if scale < 1:
        return
    across, down = int(width * scale), int(height * scale)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    boxes = [(left, top, left + across, top + down)]
    if scale >= 2 and width > height:
        half = (across // 2, down // 2)
        corners = [(left + x * half[0], top + y * half[1]) for x in (0, 1) for y in (0, 1)]
        boxes += [(x, y, x + half[0], y + half[1]) for x, y in corners]
    for box in boxes:
        yield image.resize((width, height), Image.Resampling.LANCZOS, box)


def pictures(pairs: list[tuple[bytes, str]], name: str) -> list[tuple[bytes, str]]:
    """The set's JPEGs with captions; no picture twice."""
    width, height, quality = SETS[name]
    found, seen = [], set()
    for data, caption in pairs:
        if data in seen:
            continue
        seen.add(data)
        for window in windows(Image.open(io.BytesIO(data)).convert("RGB"), width, height):
            sink = io.BytesIO()
            window.save(sink, "JPEG", quality=quality)
            found.append((sink.getvalue(), caption))
    order = np.random.default_rng(0).permutation(len(found)).tolist()
    return [found[index] for index in order]


def write_set(root: Path, chosen: list[tuple[bytes, str]]) -> None:
    """Shards of ``SHARD_ROWS`` samples; what would not fill one is left out."""
    for shard in range(len(chosen) // SHARD_ROWS):
        rows = chosen[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]
        samples = [
            Sample(
                key=layout.sample_key(shard, number, 10_000),
                image=image,
                caption=caption,
                metadata={"caption": caption, "status": "success"},
            )
            for number, (image, caption) in enumerate(rows)
        ]
        table = pa.table(
            {
                "key": [sample.key for sample in samples],
                "caption": [sample.caption for sample in samples],
                "status": ["success"] * len(samples),
            }
        )
        write_shard(Store(str(root)), layout.shard_name(shard), samples, table, {})
