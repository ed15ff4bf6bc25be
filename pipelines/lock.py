"""One run at a time in a dataset folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from declip_shards import DeclipError, Store


@contextlib.contextmanager
def workspace_lock(store: Store) -> Iterator[None]:
    """Hold the folder while a run writes to it.

    The lock is the kernel's (``flock``): it goes with the process that holds it, however that
    ends, so there is no stale lock to clean. A remote store has none: its writes are whole
    objects, equal whoever makes them.
    """
    if not store.is_local:
        yield
        return
    path = store.local_path("manifests/lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            owner = f.read().strip() or "unknown"
            raise DeclipError(
                f"another run (process {owner}) is writing to {store.url!r}; "
                "wait for it, stop it, or choose another --out."
            ) from None
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield
