"""What a JPEG's markers say, read without decoding it, and the file without its metadata.

Marker codes and segment layouts are those of ITU-T T.81 (JPEG), T.871 (JFIF), Adobe Technical Note
5116 (the APP14 marker) and CIPA DC-008 (Exif). :func:`read_header` knows plain files only: it says
None of everything unusual, and the caller leaves such a file to Pillow.
"""

import struct
from dataclasses import dataclass

_SOI = b"\xff\xd8"
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EOI, _SOS, _DHT, _DQT, _DRI, _COM = 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0xFE
_APP0, _APP1, _APP14, _APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_EXIF = b"Exif\0\0"
_XMP_ORIENTATION = b"tiff:Orientation"
_ORIENTATION_TAG, _SHORT = 0x0112, 3
_KNOWN_SAMPLINGS = (((1, 1),), *(((h, v), (1, 1), (1, 1)) for h in (1, 2) for v in (1, 2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """A plain 8-bit Huffman-coded JPEG of one frame."""

    width: int
    """Pixels as stored, before any turning."""
    height: int
    """Pixels as stored, before any turning."""
    is_progressive: bool
    """Several scans of spectral bands, in place of one pass."""
    is_baseline: bool
    """SOF0: what every decoder reads."""
    component_ids: tuple[int, ...]
    """One of gray, three of color; libjpeg tells RGB from YCbCr by them if no marker does."""
    sampling: tuple[tuple[int, int], ...]
    """Horizontal and vertical factor of each component: 4:2:0 is ((2, 2), (1, 1), (1, 1))."""
    orientation: int | None
    """EXIF's 1 to 8; 1 where nothing is said; None where only a full parser can tell."""
    is_jfif: bool
    """A JFIF marker, so color is YCbCr."""
    adobe_transform: int | None
    """Adobe's word on the color: 0 as it is, 1 YCbCr, 2 YCCK; None without such a marker."""

    @property
    def is_ycbcr(self) -> bool:
        """Whether a decoder takes it for YCbCr even without its Adobe marker."""
        return (
            len(self.component_ids) == 3
            and self.adobe_transform in (None, 1)
            and (self.is_jfif or self.component_ids == (1, 2, 3))
        )


def read_header(data: bytes) -> JpegHeader | None:
    """Read the markers up to the first scan.

    None for whatever is not plain: other precisions and codings, four components, odd sampling,
    stray bytes between segments, several frames, a header that is cut short.
    """
    frame: tuple[int, bytes] | None = None
    orientations: list[int | None] = []
    has_xmp_orientation = is_jfif = False
    adobe_transform = None
    for code, start, end in _segments(data):
        if code in _FRAMES:
            if frame is not None:
                return None
            frame = code, data[start:end]
        elif code == _APP0 and data[start : start + 5] == b"JFIF\0":
            is_jfif = True
        elif code == _APP1 and data[start : start + 6] == _EXIF:
            orientations.append(exif_orientation(data[start + 6 : end]))
        elif code == _APP1:
            has_xmp_orientation |= data.find(_XMP_ORIENTATION, start, end) >= 0
        elif code == _APP14 and data[start : start + 5] == b"Adobe" and end - start >= 12:
            adobe_transform = data[start + 11]
        elif code == _SOS:
            break
    else:
        return None
    parsed = _parse_frame(*frame) if frame else None
    if parsed is None:
        return None
    height, width, ids, sampling = parsed
    orientation = orientations[0] if len(orientations) == 1 else None
    if not orientations:
        # Only where EXIF does not say does XMP count, and finding that out is a parser's work.
        orientation = None if has_xmp_orientation else 1
    elif orientation == 1 and has_xmp_orientation:
        orientation = None
    return JpegHeader(
        width=width,
        height=height,
        is_progressive=frame is not None and frame[0] == _PROGRESSIVE,
        is_baseline=frame is not None and frame[0] == _BASELINE,
        component_ids=ids,
        sampling=sampling,
        orientation=orientation,
        is_jfif=is_jfif,
        adobe_transform=adobe_transform,
    )


def _segments(data: bytes) -> "list[tuple[int, int, int]]":
    """(marker, start and end of its body) up to the first scan's header, or as far as is plain."""
    found: list[tuple[int, int, int]] = []
    if not data.startswith(_SOI):
        return found
    place = 2
    while place + 4 <= len(data):
        code = data[place + 1]
        if data[place] != 0xFF or code < 0xC0 or 0xD0 <= code <= _EOI:
            return found
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if end < place + 4 or end > len(data):
            return found
        found.append((code, place + 4, end))
        if code == _SOS:
            return found
        place = end
    return found


def _parse_frame(
    code: int, body: bytes
) -> tuple[int, int, tuple[int, ...], tuple[tuple[int, int], ...]] | None:
    """Height, width, component ids and samplings of a frame header of the usual kinds."""
    if code not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or len(body) < 6:
        return None
    precision, height, width, count = struct.unpack_from(">BHHB", body)
    if precision != 8 or not (height and width) or len(body) != 6 + 3 * count:
        return None
    ids = tuple(body[6::3])
    sampling = tuple((both >> 4, both & 15) for both in body[7::3])
    if count == 1:
        # A single component is not subsampled, whatever its factors say.
        sampling = ((1, 1),)
    return (height, width, ids, sampling) if sampling in _KNOWN_SAMPLINGS else None


def exif_orientation(tiff: bytes) -> int | None:
    """The first directory's orientation, 1 without one, None for anything unusual.

    Args:
        tiff: an EXIF segment behind its ``Exif`` label.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (place,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, place)
        for entry in range(place + 2, place + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == _ORIENTATION_TAG:
                plain = kind == _SHORT and number == 1 and 1 <= value <= 8
                return value if plain else None
    except struct.error:
        return None
    return 1


def strip_metadata(data: bytes) -> bytes | None:
    """The same picture, coefficient for coefficient, with nothing but what decoding it takes.

    Application and comment segments go (EXIF with its GPS position, XMP, ICC profiles, thumbnails),
    and so does everything behind the end-of-image marker. A JFIF marker is put in front, so that
    the colors stay YCbCr. Only for pictures of one scan whose header is
    :attr:`JpegHeader.is_ycbcr`.

    Returns:
        None where the scan has no end, or another scan or table follows it.
    """
    segments = _segments(data)
    if not segments or segments[-1][0] != _SOS:
        return None
    parts = [_SOI, b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"]
    for code, start, end in segments:
        if code != _COM and not _APP0 <= code <= _APP15:
            parts.append(data[start - 4 : end])
    scan = segments[-1][2]
    place = data.find(b"\xff", scan)
    # Within a scan 0xff is followed by a stuffed zero, a restart marker or fill bytes.
    while 0 <= place < len(data) - 1:
        code = data[place + 1]
        if code == _EOI:
            return b"".join((*parts, data[scan:place], b"\xff\xd9"))
        if code != 0 and code != 0xFF and not 0xD0 <= code <= 0xD7:
            return None
        place = data.find(b"\xff", place + (1 if code == 0xFF else 2))
    return None
