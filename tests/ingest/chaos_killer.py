"""A decoder that a marked JPEG kills, as a crafted file would kill a codec with a flaw."""

import ctypes
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from declip_ingest.decode import ImageNormalizer
from declip_ingest.image_policy import DecodedImage, ImagePolicy

if TYPE_CHECKING:
    from tests.ingest.chaos_pictures import KILLER_MARK
else:
    from chaos_pictures import KILLER_MARK

_HEAD_BYTES = 256


class KillerNormalizer:
    """The real one, behind a flaw."""

    def __init__(self, policy: ImagePolicy) -> None:
        self._normalize = ImageNormalizer(policy)

    def __call__(
        self, data: bytes, boxes: Sequence[tuple[float, float, float, float]] = ()
    ) -> DecodedImage:
        place = data.find(KILLER_MARK, 0, _HEAD_BYTES)
        if place >= 0:
            word = data[place + len(KILLER_MARK) :]
            if word.startswith(b"crash"):
                ctypes.string_at(0)
            elif word.startswith(b"hang"):
                time.sleep(3600)
            elif word.startswith(b"memory"):
                # All of it in one call, which a limit refuses before a page is touched.
                bytearray(1 << 40)
        return self._normalize(data, boxes)
