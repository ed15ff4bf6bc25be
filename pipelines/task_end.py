"""How a task ended, and the first cause in words where it failed."""

import errno
import shutil
import traceback
from dataclasses import dataclass

from declip_shards import DeclipError, Store
from declip_shards.manifest import Receipt

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No more can be written: the disk is full, the quota used up, or files may not be that large."""
HOPELESS = (*FULL_DISK, errno.EROFS)
"""After these no further task can do better until somebody mends it."""


@dataclass(frozen=True, kw_only=True)
class TaskEnd:
    """A task that is done, or that nobody tries again."""

    task: str
    """Its name."""
    receipt: Receipt | None = None
    """What it did; None where it failed."""
    cause: str = ""
    """First cause of its failure."""
    tries: int = 1
    """Times that it was started."""
    is_hopeless: bool = False
    """Whether the others would fail alike: no further ones are started."""


def free_bytes(store: Store) -> int | None:
    """Bytes free where a local dataset lies; None for a remote one."""
    return shutil.disk_usage(store.root).free if store.is_local else None


def size_text(num_bytes: float) -> str:
    """``1536 -> "1.5 KB"``, in powers of 1000 as ``df -H`` counts."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def describe(error: Exception, store: Store) -> tuple[str, bool]:
    """(cause in words, whether it is hopeless to go on) of what a task raised."""
    if isinstance(error, DeclipError):
        return str(error), isinstance(error.__cause__, OSError) and _is_hopeless(error.__cause__)
    if isinstance(error, OSError):
        if error.errno in FULL_DISK:
            free = free_bytes(store)
            left = "" if free is None else f"; {size_text(free)} free"
            return f"no space to write to {store.url!r} ({error}{left})", True
        return f"{type(error).__name__}: {error}", _is_hopeless(error)
    return "".join(traceback.format_exception(error)), False


def _is_hopeless(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in HOPELESS
