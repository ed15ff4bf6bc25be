"""What can be said of a caption by looking at it alone, and when two captions are the same."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from declip_filter.dictionary import Dictionary, Nouns
from declip_filter.languages import Language, LanguageDetector
from declip_filter.personal_data import find_personal_data

REPETITION_CHARS = 5
"""Length of the pieces that are compared for repetition of characters."""

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
_UPPER = regex.compile(r"\p{Lu}")
_CASED = regex.compile(r"[\p{Lu}\p{Ll}]")
_DIGIT = regex.compile(r"\p{Nd}")
# What pages put where a caption should stand. Whole words only, matched without regard to case.
_BOILERPLATE = regex.compile(
    r"\b(?:"
    r"(?:click|tap)(?: here| on)?(?: the| this)?(?: image| photo| picture| thumbnail)?"
    r" (?:to|for) (?:see |view |a )?(?:enlarge|zoom|expand|more|full[ \-]?size|larger|bigger)"
    r"(?: version| view| image| size| picture)?"
    r"|(?:view|see|show|open)(?: the)? (?:full|larger|bigger|original)(?:[ \-]?size)?"
    r"(?: image| photo| picture| version)?"
    r"|(?:image|photo|picture|file|thumbnail|preview)(?: is| was)? "
    r"(?:not|no longer|un)[ \-]?(?:available|found|loaded|provided)"
    r"|no (?:image|photo|picture|thumbnail|preview|caption|description|title)"
    r"(?: available| found| provided| yet)?|coming soon|image coming soon"
    r"|(?:default|placeholder|missing|sample|dummy|loading|broken|featured) "
    r"(?:image|photo|picture|thumbnail|icon|avatar)|placeholder|lorem ipsum"
    r"|(?:image|photo|picture|thumbnail|img|pic)(?: (?:for|of))? (?:\d+|n(?:o|r|umber)\.? ?\d+)"
    r"|all rights reserved|(?:c) \d{4}|copyright(?: \d{4})?"
    r"|(?:royalty[ \-]free|stock|file) (?:stock )?(?:photos?|images?|pictures?|vectors?"
    r"|illustrations?|footage|clip ?art|photography)"
    r"|(?:photo|image|picture) (?:courtesy(?: of)?|credits?|source)"
    r"|(?:free )?(?:hd )?(?:wallpapers?|vectors?|clip ?art|png|images?|pictures?) (?:free )?"
    r"downloads?|download (?:free|now|this|the)(?: \w+)?"
    r"|(?:share|follow|like|tweet|pin)(?: this| us)? (?:on|it|to)"
    r"(?: (?:facebook|twitter|instagram|pinterest|whatsapp|linkedin))?"
    r"|read more|learn more|continue reading|buy now|shop now|add to (?:cart|basket|wish ?list)"
    r"|free shipping|(?:log|sign) ?(?:in|up)|skip to (?:main )?content"
    r"|(?:site|company|page|header|footer) (?:logo|banner|image)|untitled"
    r"|enable javascript|your browser|cookies?|advertisement|sponsored"
    r"|klicken? (?:sie )?(?:hier|zum vergr[\u00f6o]\u00dfern)|kein bild(?: vorhanden)?"
    r"|bild (?:nicht verf[\u00fcu]gbar|vergr[\u00f6o]\u00dfern)|alle rechte vorbehalten"
    r"|cliquez (?:ici|pour agrandir)|image non disponible|tous droits r[\u00e9e]serv[\u00e9e]s"
    r"|haga clic (?:aqu[\u00edi]|para ampliar)|imagen no disponible"
    r"|todos los derechos reservados"
    r")\b",
    regex.IGNORECASE,
)
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


def caption_words(caption: str) -> list[str]:
    """Words as written: letters, marks and digits, joined by single hyphens or apostrophes.

    A run of a script without spaces (Chinese, Japanese, Thai) is one word.
    """
    words: list[str] = _WORD.findall(caption)
    return words


def boilerplate_share(caption: str, num_words: int) -> float:
    """Share of the words that are in phrases pages put in a caption's place, 0 to 1.

    Such as "click to enlarge", "image not available", "royalty free stock photo", "all rights
    reserved"; English, and a few of German, French and Spanish.
    """
    if not num_words:
        return 0.0
    covered = sum(len(caption_words(match.group())) for match in _BOILERPLATE.finditer(caption))
    return min(covered / num_words, 1.0)


def character_repetition(text: str) -> float:
    """Share of the pieces of five characters that occurred before in the text, 0 to below 1.

    Tells "!!!!!!!!!!" and repeated phrases also where there are no words (scripts without spaces).
    """
    num_pieces = len(text) - REPETITION_CHARS + 1
    if num_pieces < 1:
        return 0.0
    return 1 - len({text[i : i + REPETITION_CHARS] for i in range(num_pieces)}) / num_pieces


def measure_caption(caption: str, words: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Signals of one caption that need no word list and no detector.

    Args:
        words: its :func:`caption_words`, where the caller has them already.

    Returns:
        ``caption_chars`` (code points, ends stripped), ``caption_words``,
        ``caption_letters`` (fraction of the non-space code points that are letters or their
        marks; 0 for an empty caption), ``caption_digits`` (the same of decimal digits),
        ``caption_upper`` (capitals among the letters that have a case; 0 without any),
        ``caption_repetition`` (1 - distinct words / words, case folded; 0 without words),
        ``caption_char_repetition`` (see :func:`character_repetition`), ``caption_is_file_name``,
        ``caption_is_url``, ``caption_boilerplate`` (see :func:`boilerplate_share`),
        ``caption_personal_data`` (see :func:`find_personal_data`), ``caption_sha``.
    """
    text = caption.strip()
    if words is None:
        words = caption_words(text)
    solid = len("".join(text.split()))
    cased = len(_CASED.findall(text))
    return {
        "caption_chars": len(text),
        "caption_words": len(words),
        "caption_letters": len(_LETTER.findall(text)) / solid if solid else 0.0,
        "caption_digits": len(_DIGIT.findall(text)) / solid if solid else 0.0,
        "caption_upper": len(_UPPER.findall(text)) / cased if cased else 0.0,
        "caption_repetition": 1 - len({w.casefold() for w in words}) / len(words) if words else 0.0,
        "caption_char_repetition": character_repetition(text),
        "caption_is_file_name": is_file_name(text),
        "caption_is_url": is_url(text),
        "caption_boilerplate": boilerplate_share(text, len(words)),
        "caption_personal_data": find_personal_data(text),
        "caption_sha": caption_sha(text),
    }


@dataclass(frozen=True, kw_only=True)
class CaptionMeasurer:
    """All signals of a caption, with what has to be loaded for some of them."""

    detector: LanguageDetector | None = None
    dictionary: Dictionary | None = None
    nouns: Nouns | None = None

    def __call__(self, caption: str) -> dict[str, Any]:
        """:func:`measure_caption` and, None where nothing is loaded for them or can be told:

        ``caption_language`` and ``caption_language_confidence`` (see :class:`LanguageDetector`),
        ``caption_dictionary_words`` (share of the words, numbers not counted, that are in the
        dictionary), ``caption_nouns`` (how many words can be nouns).
        """
        words = caption_words(caption)
        language = Language(None, None) if self.detector is None else self.detector(caption)
        return {
            **measure_caption(caption, words),
            "caption_language": language.code,
            "caption_language_confidence": language.confidence,
            "caption_dictionary_words": self.dictionary and self.dictionary.share(words),
            "caption_nouns": self.nouns and self.nouns.count(words),
        }
