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
    near = get_close_matches(wrong, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or '(none)'}."
