"""Memory for searches that take and give back large arrays all the time: in small pages.

numpy asks for huge pages for every array of 4 MB or more. In a virtual machine whose host has not
backed them, or where memory is in pieces, the system takes up to 4 ms to find and clear one: 200 MB
cost 0.3 to 0.5 s in huge pages and 0.08 s in small ones (measured, docs/design/0005), and a
search's arrays live too short for what huge pages save later.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42  # linux/prctl.h


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """This process gets no new huge pages within; as before afterwards. Elsewhere than Linux, none.

    Several threads may be within at once: then huge pages return when one leaves, which costs time
    only.
    """
    before = _prctl(_PR_GET_THP_DISABLE, 0)
    if before == 0:
        _prctl(_PR_SET_THP_DISABLE, 1)
    try:
        yield
    finally:
        if before == 0:
            _prctl(_PR_SET_THP_DISABLE, 0)


def _prctl(option: int, value: int) -> int:
    """What the system says; -1 where it cannot be asked."""
    if not sys.platform.startswith("linux"):
        return -1
    try:
        call = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return -1
    nothing = ctypes.c_ulong(0)
    return int(call(option, ctypes.c_ulong(value), nothing, nothing, nothing))
