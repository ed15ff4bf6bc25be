"""The bodies that the chaos server sends: real pictures, odd ones, broken ones and bombs."""

import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

from PIL import Image, ImageDraw

KILLER_MARK = b"opendeclip-chaos:"
"""A JPEG comment that chaos_killer.py obeys, as a crafted file would make a codec do."""
PLACEHOLDER_NUMBER = 0
REPEATED_NUMBER = 1


def jpeg(image: Image.Image, **options: object) -> bytes:
    """Encoded, quality 85."""
    return _encode(image, "JPEG", quality=85, **options)


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


@lru_cache(maxsize=64)
def drawn(number: int, width: int = 96, height: int = 72) -> Image.Image:
    """A small picture that is no noise: slopes of color and ellipses, another for each number."""
    dice = random.Random(number)
    ramp = Image.linear_gradient("L").resize((width, height))
    image = Image.merge("RGB", (ramp, ramp.rotate(180), Image.new("L", ramp.size, number % 256)))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = dice.randrange(width), dice.randrange(height)
        box = (left, top, left + dice.randrange(8, width), top + dice.randrange(8, height))
        pen.ellipse(box, fill=tuple(dice.randrange(256) for _ in range(3)))
    return image


def with_comment(data: bytes, text: bytes) -> bytes:
    """A JPEG with a comment segment behind its first marker: other bytes, the same picture."""
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + data[2:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    checked = kind + body
    return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))


def png_bomb(width: int, height: int, *, is_whole: bool) -> bytes:
    """One bit a pixel, all black: a gigapixel in 124 kB, or a mere header."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    count = height if is_whole else 1
    body = b"".join(rows.compress(line) for _ in range(count)) + rows.flush()
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", body), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@lru_cache(maxsize=1)
def _gigapixel() -> bytes:
    return png_bomb(32_000, 32_000, is_whole=True)


def _jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header lies about its size."""
    data = bytearray(jpeg(drawn(5)))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _animation(kind: str, frames: int, side: int) -> bytes:
    pictures = [drawn(number % 32, side, side) for number in range(frames)]
    return _encode(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=20)


def _many_frames(count: int) -> bytes:
    """A GIF of so many frames; all but the first are one pixel."""
    first = _encode(drawn(3).convert("P"), "GIF")
    frame = (b"\x21\xf9\x04\x00\x01\x00\x00\x00\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00"
             b"\x02\x02\x44\x01\x00")  # fmt: skip
    return first[:-1] + frame * count + b";"


def _exif(orientation: int = 1, *, with_place: bool = False) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if with_place:
        exif.get_ifd(0x8825).update({1: "N", 2: (47.0, 22.0, 1.0), 3: "E", 4: (8.0, 33.0, 2.0)})
    return exif.tobytes()


def _exif_jpeg(number: int) -> bytes:
    return jpeg(drawn(number), exif=_exif(number % 8 + 1))


def _flipped_quantizer(number: int) -> bytes:
    """A table's length that points nowhere."""
    data = bytearray(jpeg(drawn(number)))
    place = data.index(b"\xff\xdb") + 2
    data[place : place + 2] = b"\xff\xff"
    return bytes(data)


def _bad_checksum(number: int) -> bytes:
    data = bytearray(_encode(drawn(number), "PNG"))
    place = data.index(b"IDAT") + 4
    data[place + 20] ^= 0xFF
    return bytes(data)


def _gray_alpha(number: int) -> bytes:
    image = drawn(number).convert("L")
    image.putalpha(drawn(number + 1).convert("L"))
    return _encode(image, "PNG")


def _palette_alpha(number: int) -> bytes:
    return _encode(drawn(number).convert("P"), "PNG", transparency=3)


def _sixteen_bit(number: int) -> bytes:
    return _encode(drawn(number).convert("I").point(lambda v: v * 257).convert("I;16"), "PNG")


def cut(data: bytes, share: float) -> bytes:
    """The beginning of a file."""
    return data[: int(len(data) * share)]


_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'
_HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64)
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\nshowpage\n"
_LOGIN = b"<!doctype html><html><title>Log in</title><body>Log in to see this photo</body></html>"
_ZIP = b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18)

Maker = Callable[[int], bytes]
BODIES: dict[str, Maker] = {
    "jpeg": lambda n: jpeg(drawn(n)),
    "progressive": lambda n: jpeg(drawn(n), progressive=True),
    "png": lambda n: _encode(drawn(n), "PNG"),
    "webp": lambda n: _encode(drawn(n), "WEBP", quality=80),
    "gif": lambda n: _encode(drawn(n).convert("P"), "GIF"),
    "html": lambda n: _LOGIN + b"<!-- %d -->" % n,
    "json": lambda n: json.dumps({"error": "no such photo", "number": n}).encode(),
    "zip": lambda n: _ZIP,
    "cut_jpeg": lambda n: cut(jpeg(drawn(n)), 0.5),
    "cut_jpeg_late": lambda n: cut(jpeg(drawn(n)), 0.9),
    "cut_png": lambda n: cut(_encode(drawn(n), "PNG"), 0.5),
    "cut_webp": lambda n: cut(_encode(drawn(n), "WEBP"), 0.5),
    "bad_jpeg": _flipped_quantizer,
    "bad_png": _bad_checksum,
    "gigapixel_png": lambda n: _gigapixel(),
    "header_png": lambda n: png_bomb(65_535, 65_535, is_whole=False),
    "header_jpeg": lambda n: _jpeg_of_size(65_500, 65_500),
    "many_frames": lambda n: _many_frames(10_000),
    "exif": _exif_jpeg,
    "bad_exif": lambda n: jpeg(drawn(n), exif=b"Exif\0\0" + bytes(range(40))),
    "gps_exif": lambda n: jpeg(drawn(n), exif=_exif(with_place=True)),
    "cmyk": lambda n: jpeg(drawn(n).convert("CMYK")),
    "sixteen_bit": _sixteen_bit,
    "gray_alpha": _gray_alpha,
    "palette_alpha": _palette_alpha,
    "gray": lambda n: jpeg(drawn(n).convert("L")),
    "one_pixel": lambda n: jpeg(drawn(n).resize((1, 1))),
    "strip": lambda n: jpeg(drawn(n).resize((4000, 16))),
    "animated_gif": lambda n: _animation("GIF", 5, 48),
    "animated_webp": lambda n: _animation("WEBP", 5, 48),
    "svg": lambda n: _SVG,
    "heic": lambda n: _HEIC,
    "tiff": lambda n: _encode(drawn(n), "TIFF"),
    "eps": lambda n: _EPS,
    "bmp": lambda n: _encode(drawn(n), "BMP"),
    "jpeg_zip": lambda n: jpeg(drawn(n)) + _ZIP,
    "jpeg_html": lambda n: jpeg(drawn(n)) + _LOGIN,
    "killer_crash": lambda n: with_comment(jpeg(drawn(n)), KILLER_MARK + b"crash"),
    "killer_hang": lambda n: with_comment(jpeg(drawn(n)), KILLER_MARK + b"hang"),
    "killer_memory": lambda n: with_comment(jpeg(drawn(n)), KILLER_MARK + b"memory"),
    "placeholder": lambda n: jpeg(drawn(PLACEHOLDER_NUMBER, 80, 80)),
    "repeated": lambda n: jpeg(drawn(REPEATED_NUMBER, 80, 80)),
    "blocked": lambda n: jpeg(drawn(n, 64, 80)),
}
"""Name -> body for a serial number."""
SAME_BYTES = ("placeholder", "repeated", "blocked")
"""Those whose digest is what they are about: no serial number is put into them."""
DEAR = ("gigapixel_png", "many_frames")
_VARIANTS = 16


class BodyMaker:
    """Bodies by name and serial number, each with bytes of its own (or the same for SAME_BYTES).

    Args:
        photos: JPEGs to serve as the plain good pictures; drawn ones without them.
    """

    def __init__(self, photos: Sequence[bytes] = ()) -> None:
        self._photos = list(photos)
        self._made: dict[tuple[str, int], bytes] = {}

    def warm(self) -> None:
        """Make the dear ones now, so that none holds up the answers of others."""
        for name in DEAR:
            self.body(name, 0)

    def body(self, name: str, serial: int) -> bytes:
        """The file that is sent."""
        variant = 0 if name in SAME_BYTES else serial % _VARIANTS
        if name == "jpeg" and self._photos:
            data = self._photos[serial % len(self._photos)]
        else:
            if (name, variant) not in self._made:
                self._made[name, variant] = BODIES[name](variant)
            data = self._made[name, variant]
        if name in SAME_BYTES or name.startswith(("cut_", "header_", "bad_")):
            return data
        return _marked(data, serial)


def _marked(data: bytes, serial: int) -> bytes:
    """The same picture in bytes of its own."""
    text = b"serial %d" % serial
    if data.startswith(b"\xff\xd8"):
        return with_comment(data, text)
    if data.startswith(b"\x89PNG"):
        return data[:-12] + _chunk(b"tEXt", b"Comment\0" + text) + data[-12:]
    if data.startswith(b"GIF8"):
        return data[:-1] + b"\x21\xfe" + bytes([len(text)]) + text + b"\0;"
    return data
