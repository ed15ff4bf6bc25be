"""What pictures are taken and what is made of them: settings, without the libraries that decode."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from declip_shards import DeclipError

ResizeMode = Literal["border", "keep_ratio", "keep_ratio_largest", "center_crop", "no"]
"""img2dataset's modes: pad to a square; shorter side; longer side; crop a square; leave."""
Resizing = Literal["scaled", "exact", "img2dataset"]
"""How a picture gets its size: see :class:`ImagePolicy`."""
DEFAULT_FORMATS = ("jpeg", "png", "webp", "gif")
KNOWN_FORMATS = ("avif", "bmp", "gif", "jpeg", "png", "webp")
"""Formats that a user may ask for: those Pillow decodes without an outside program."""
PILLOW_PIXEL_LIMIT = 2 * 89_478_485
"""Pillow itself refuses more pixels, as a decompression bomb."""


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """A picture as it goes into the tar."""

    image: bytes
    """JPEG, RGB, upright, without metadata."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    original_width: int
    """Pixels of the upright picture as it came."""
    original_height: int
    """Pixels of the upright picture as it came."""
    sha256: str
    """Of the bytes as they came, as img2dataset has it."""


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """What is taken and what is made of it; names and meanings are img2dataset's."""

    image_size: int = 256
    """Pixels; which side or sides is up to ``resize_mode``."""
    resize_mode: ResizeMode = "keep_ratio"
    """border, keep_ratio, keep_ratio_largest, center_crop or no."""
    resize_only_if_bigger: bool = False
    """Leave pictures that are already small enough at their size."""
    encode_quality: int = 90
    """JPEG quality, 1 to 100."""
    optimize_huffman: bool = True
    """Huffman tables made for each picture: 2 to 4 % fewer bytes for 0.4 ms of processor time.
    img2dataset's own ``Resizer`` has no such switch and writes the standard tables."""
    min_image_size: int = 0
    """Pixels of the shorter side."""
    max_aspect_ratio: float | None = 20.0
    """Longer side over shorter side; None is no limit."""
    max_pixels: int = 64_000_000
    """Width times height, judged by the header before anything is decoded."""
    formats: Sequence[str] = DEFAULT_FORMATS
    """Formats taken, of KNOWN_FORMATS; of an animation the first frame."""
    skip_reencode: bool = False
    """Keep a JPEG's own coefficients where nothing has to change: upright, baseline, YCbCr, of the
    right size, without boxes to blur. Its metadata and trailing bytes go all the same."""
    resizer: Resizing = "scaled"
    """``scaled``: large JPEGs are decoded at a fraction of their size, within the error stated in
    docs/design/0003-decoding.md; ``exact``: the very pixels of img2dataset's ``Resizer``;
    ``img2dataset``: that class itself."""

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float, float], ...] = (
            ("image_size", 1, 16_384),
            ("encode_quality", 1, 100),
            ("min_image_size", 0, 65_535),
            ("max_pixels", 1, PILLOW_PIXEL_LIMIT),
        )
        for name, least, most in limits:
            if not least <= getattr(self, name) <= most:
                raise DeclipError(
                    f"{name} is {getattr(self, name)} but must lie between {least} and {most}; "
                    "give a number within."
                )
        if self.max_aspect_ratio is not None and not self.max_aspect_ratio >= 1:
            raise DeclipError(
                f"max_aspect_ratio is {self.max_aspect_ratio} but a longer side over a shorter one "
                "is never below 1; give 1 or more, or leave it out."
            )
        for name, choices in (
            ("resize_mode", get_args(ResizeMode)),
            ("resizer", get_args(Resizing)),
        ):
            if getattr(self, name) not in choices:
                raise DeclipError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}."
                )
        if self.skip_reencode and self.resizer == "img2dataset":
            raise DeclipError(
                "skip_reencode is True but resizer 'img2dataset' writes every picture anew; take "
                "resizer 'scaled' or 'exact' with it."
            )
        unknown = sorted(set(self.formats) - set(KNOWN_FORMATS))
        if unknown or not self.formats:
            raise DeclipError(
                f"formats is {tuple(self.formats)}; choose one or more of "
                f"{', '.join(KNOWN_FORMATS)}."
            )
        if "avif" in self.formats and not _has_avif():
            raise DeclipError(
                "formats holds 'avif', which this machine's Pillow was built without; leave it out "
                "or install Pillow's own wheel."
            )


def _has_avif() -> bool:
    from PIL import features  # only who asks for that format needs to know

    return bool(features.check("avif"))
