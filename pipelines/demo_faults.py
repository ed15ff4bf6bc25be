"""Rows of the demo that are made to fail, and rows that a filter should drop."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from pipelines.demo_server import FAILURE_KINDS
from pipelines.demo_sources import Picture

JUNK_KINDS = (
    "file_name_caption",
    "url_caption",
    "empty_caption",
    "tiny_image",
    "extreme_aspect",
    "constant_color",
)
"""What is wrong with a junk row; its source is ``junk/KIND``."""
_TINY_PIXELS = 8
_STRIP_PIXELS = (400, 10)
_PLAIN_PIXELS = 128


@dataclass(frozen=True, kw_only=True)
class Junk:
    """A real image and caption that download well and are of no use to training."""

    kind: str
    """One of JUNK_KINDS."""
    name: str
    """File name without extension."""
    caption: str
    """Its caption."""
    license: str
    """Of the photo it is made of."""
    data: bytes
    """JPEG bytes."""


def make_failure_url(number: int, host: str, port: int) -> tuple[str, str]:
    """(url, expected_status) of the ``number``-th row made to fail; kinds take turns."""
    kind = FAILURE_KINDS[number % len(FAILURE_KINDS)]
    serial = number // len(FAILURE_KINDS)
    if kind == "bad_scheme":
        return f"file:///opendeclip/{serial}.jpg", kind
    if kind == "connection_refused":
        return f"http://{host}:{port + 1}/{serial}.jpg", kind
    return f"http://{host}:{port}/fail/{kind}/{serial}", kind


def make_junk(photos: Sequence[Picture], captions: Sequence[str], count: int) -> Iterator[Junk]:
    """``count`` junk rows made of real photos (at least one); the kinds take turns."""
    for number in range(count):
        kind = JUNK_KINDS[number % len(JUNK_KINDS)]
        serial = number // len(JUNK_KINDS)
        photo = photos[number % len(photos)]
        caption = {
            "file_name_caption": f"IMG_{1234 + 17 * serial}.jpg",
            "url_caption": f"https://www.example.com/products/{4100 + serial}",
            "empty_caption": "",
        }.get(kind, captions[number % len(photos)])
        yield Junk(
            kind=kind,
            name=f"{serial:03d}",
            caption=caption,
            license=photo.license,
            data=_spoil(photo.data, kind),
        )


def _spoil(data: bytes, kind: str) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if kind == "tiny_image":
        image = image.resize((_TINY_PIXELS, _TINY_PIXELS), Image.Resampling.LANCZOS)
    elif kind == "extreme_aspect":
        image = image.resize(_STRIP_PIXELS, Image.Resampling.LANCZOS)
    elif kind == "constant_color":
        color = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        image = Image.new("RGB", (_PLAIN_PIXELS, _PLAIN_PIXELS), color)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()
