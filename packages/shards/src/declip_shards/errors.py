"""Errors that are meant for the person at the terminal."""

from collections.abc import Iterable
from difflib import get_close_matches


class DeclipError(Exception):
    """A fault that the user can mend: the value, the limit and the remedy, in one sentence.

    The command line prints its text without a traceback and exits non-zero.
    """


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'? Known: ..."`` for a misspelt name; always lists what is known."""
    names = sorted(known)
    # A part of a name, but for how its words are joined, is likelier meant than a like spelling.
    plain = {name: _letters(name) for name in names}
    given = _letters(wrong)
    near = [name for name in names if len(given) > 2 and given in plain[name]]
    near = sorted(near, key=len) or get_close_matches(wrong, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or '(none)'}."


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
