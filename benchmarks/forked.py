"""A measurement in a process of its own, forked: nothing is imported again for it.

On a GPU machine a fresh process spends ten seconds on imports and a few milliseconds on the loss.
The process that forks must not have used CUDA, which no child could then use.
"""

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

_T = TypeVar("_T")


def call(function: Callable[[Any], _T], argument: object) -> _T:
    """What ``function`` returns of ``argument`` in a child, which may be anything that pickles.

    Raises:
        RuntimeError: it raised there, which standard error shows, or the child was killed.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(function, argument, there))
    child.start()
    there.close()
    try:
        found: _T = here.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the measurement's process ended with {child.exitcode}") from None
    child.join()
    return found


def _run(function: Callable[[Any], object], argument: object, there: Connection) -> None:
    try:
        there.send(function(argument))
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
