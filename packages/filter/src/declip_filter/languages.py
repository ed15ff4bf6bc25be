"""Which language a caption is in, by CLD2: rules and tables inside a wheel, no network, no model.

docs/design/0004-signals.md compares it with the other offline detectors.
"""

from typing import NamedTuple

import regex

from declip_shards import DeclipError

UNRELIABLE = 0.5
"""Factor on the confidence where the answer is a guess."""

# What CLD2 refuses as no text: control characters, lone surrogates, noncharacters, unassigned.
_NO_TEXT = regex.compile(r"[\p{Cc}\p{Cs}\p{Cn}]+")
_ADDRESS = regex.compile(r"(?<!\S)(?:https?://|www\.)\S+", regex.IGNORECASE)
_CODES = {"iw": "he", "jw": "jv", "mo": "ro", "sr-ME": "sr"}
"""CLD2 keeps some codes that ISO 639-1 has replaced."""
UNKNOWN = "un"
_NO_LANGUAGES = frozenset((UNKNOWN, "tlh", "zzp", "zzb", "zze", "zzh"))
"""Unknown; and what CLD2 knows for fun: Klingon, pig Latin, and search pages' joke languages."""


class Language(NamedTuple):
    """What a detector says of a text."""

    code: str | None
    """ISO 639-1 (``en``), 639-2 or -3 where that has none, or with a script (``zh-Hant``); None:
    no language could be told."""
    confidence: float | None
    """0 to 1; None without a language."""


class LanguageDetector:
    """The language of short texts: a callable from a text to :class:`Language`.

    The confidence is the share of the text's bytes that are of that language, halved where CLD2
    calls its answer unreliable or gives one only when asked for its best effort. So above 0.5
    means: told reliably, and most of the text.
    Integer arithmetic throughout: the same answer on every machine.
    """

    def __init__(self) -> None:
        """Load the tables.

        Raises:
            DeclipError: the package is missing.
        """
        try:
            import pycld2
        except ImportError as error:
            raise DeclipError(
                f"language detection needs the package 'pycld2' ({error}); install what "
                "requirements/filter.txt lists, or switch detect_language off."
            ) from error
        self._detect = pycld2.detect
        self._refusal: type[Exception] = pycld2.error

    def __call__(self, text: str) -> Language:
        """Never raises, whatever the text holds."""
        clean = _NO_TEXT.sub(" ", text)
        if "://" in clean or "www." in clean:
            clean = _ADDRESS.sub(" ", clean)
        try:
            is_reliable, _, found = self._detect(clean, isPlainText=True)
            if found[0][1] == UNKNOWN:
                # Asked for its best effort it gives an answer to short texts as well, and calls
                # every answer reliable.
                is_reliable, (_, _, found) = (
                    False,
                    self._detect(clean, isPlainText=True, bestEffort=True),
                )
        except self._refusal:
            return Language(None, None)
        _, code, percent, _ = found[0]
        code = _CODES.get(code, code)
        if code in _NO_LANGUAGES or code.startswith("xx") or not percent:
            return Language(None, None)
        return Language(code, percent / 100 * (1 if is_reliable else UNRELIABLE))
