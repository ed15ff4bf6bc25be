"""What can be said of a caption by looking at it alone, and when two captions are the same."""

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

import regex

_WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{M}\p{N}]*(?:['’\-][\p{L}\p{M}\p{N}]+)*")
_LETTER = regex.compile(r"[\p{L}\p{M}]")
# Hostile captions must not cost quadratic time: a token is tried from its start only, and the
# lengths of scheme, labels and name are bounded as the standards bound them.
_URL = regex.compile(
    r"(?<![\w.+\-])(?:[a-z][a-z0-9+.\-]{0,31}://\S+|www\.\S+"
    r"|(?:[\w\-]{1,63}\.){1,8}\p{L}{2,63}/\S*)",
    regex.IGNORECASE,
)
_MAX_FILE_NAME_CHARS = 255
_EXTENSION = r"(?:jpe?g|png|gif|webp|bmp|tiff?|heic|avif|svg|raw|cr2|nef|psd|pdf|mp4|mov)"
_FILE_NAME = regex.compile(rf"\S+(?:[ \t]+\S+){{0,3}}\.{_EXTENSION}", regex.IGNORECASE)
_CAMERA_NAME = regex.compile(
    r"(?:img|dsc[nf]?|image|photo|picture|pic|pict|scan|screenshot|screen shot|untitled"
    r"|vlcsnap|mvi|pano|wp|p)[ _\-.]*\d[\d _\-.()]*",
    regex.IGNORECASE,
)


def normalize_caption(caption: str) -> str:
    """The form under which two captions count as the same text.

    Unicode composed (NFC), case folded, runs of white space made one space, ends stripped.
    Idempotent.
    """
    text = " ".join(unicodedata.normalize("NFC", caption).casefold().split())
    # Folding can decompose what was composed, so compose once more.
    return unicodedata.normalize("NFC", text)


def caption_sha(caption: str) -> str:
    """First 32 hex digits (128 bits) of the sha256 of the normalized caption."""
    text = normalize_caption(caption).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:32]


def is_file_name(caption: str) -> bool:
    """Whether the whole caption is a file's name: ``IMG_1234.jpg``, ``DSC 0042``, ``my cat.png``.

    At most four words before the extension, so that a sentence about a ``.jpg`` is none.
    """
    text = caption.strip()
    if len(text) > _MAX_FILE_NAME_CHARS:
        return False
    return bool(_FILE_NAME.fullmatch(text) or _CAMERA_NAME.fullmatch(text))


def is_url(caption: str) -> bool:
    """Whether nothing but web addresses is in the caption."""
    rest, found = _URL.subn(" ", caption)
    return found > 0 and not _WORD.search(rest)


def measure_caption(caption: str) -> Mapping[str, Any]:
    """Signals of one caption.

    Returns:
        ``caption_chars`` (code points, ends stripped), ``caption_words``,
        ``caption_letters`` (fraction of the non-space code points that are letters or their
        marks; 0 for an empty caption), ``caption_repetition`` (1 - distinct words / words,
        case folded; 0 without words), ``caption_is_file_name``, ``caption_is_url``,
        ``caption_sha``.
    """
    text = caption.strip()
    words = [word.casefold() for word in _WORD.findall(text)]
    solid = sum(not c.isspace() for c in text)
    return {
        "caption_chars": len(text),
        "caption_words": len(words),
        "caption_letters": len(_LETTER.findall(text)) / solid if solid else 0.0,
        "caption_repetition": 1 - len(set(words)) / len(words) if words else 0.0,
        "caption_is_file_name": is_file_name(text),
        "caption_is_url": is_url(text),
        "caption_sha": caption_sha(text),
    }
