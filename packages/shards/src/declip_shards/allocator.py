"""Memory that the C library keeps: large blocks taken and given back again and again.

A freed block of some megabytes goes back to the system by default, and a fresh one costs a page
fault for every 4 kB when it is first written to. In loops that need the same blocks each time that
is 5 to 10 % of all time. Only glibc has these settings; elsewhere nothing happens.
"""

import contextlib
import ctypes
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_THRESHOLD = 32 << 20
"""What glibc raises its own threshold to by itself, bytes; it stops doing so once it was set."""


def keep_freed_memory() -> None:
    """Let this process keep what it frees, to its end."""
    _set(2**31 - 1, 64 << 20)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep what is freed within, and give it back to the system afterwards."""
    _set(2**31 - 1, 64 << 20)
    try:
        yield
    finally:
        _set(_LARGEST_THRESHOLD, 128 << 10)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _set(threshold: int, padding: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, threshold)
        library.mallopt(_M_TRIM_THRESHOLD, threshold)
        library.mallopt(_M_TOP_PAD, padding)
