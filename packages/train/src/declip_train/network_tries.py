"""Asking a file system elsewhere: again where the network fails, not where a file is gone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["TRIES", "asked_again", "is_final", "pause", "words_of"]

TRIES = 3
_SECONDS_BETWEEN_TRIES = 0.5
_BUSY = (408, 429)
"""Statuses of HTTP that ask for patience, though they are of the client's faults."""
_Answer = TypeVar("_Answer")


def pause(attempt: int) -> None:
    """Wait after ``attempt`` tries, from 1: a second, then two."""
    time.sleep(_SECONDS_BETWEEN_TRIES * 2**attempt)


def asked_again(ask: Callable[[], _Answer]) -> _Answer:
    """What ``ask`` answers, asked up to three times.

    Raises:
        Exception: what it raises last, or what asking again would not mend (:func:`is_final`).
    """
    for attempt in itertools.count(1):
        try:
            return ask()
        except Exception as error:  # file systems raise what they like
            if attempt == TRIES or is_final(error):
                raise
        pause(attempt)
    raise AssertionError("the last try answers or raises")


def is_final(error: Exception) -> bool:
    """Whether asking again would not help: there is no such file, or no leave to read it.

    fsspec's HTTP says that there is no such file of a server that is busy or gone, too, and of what
    happened only in the cause.
    """
    if isinstance(error, ImportError | PermissionError | ValueError | NotADirectoryError):
        return True
    return isinstance(error, FileNotFoundError) and not _is_of_network(error.__cause__)


def _is_of_network(cause: BaseException | None) -> bool:
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status in _BUSY or not 400 <= status < 500
    is_system = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    return is_system or type(cause).__module__.partition(".")[0] == "aiohttp"


def words_of(error: Exception) -> str:
    """What an exception says, or its name: some say nothing."""
    return str(error) or type(error).__name__
