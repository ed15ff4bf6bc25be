"""A lease on a remote dataset: one run writes, the others are told who; a dead run's expires.

Leases are numbered objects. The newest one counts. Its owner writes it anew every few seconds;
one that stays as it is has lost its owner, and whoever creates the next number takes over.
Creating is put-if-absent where the store has that (S3, GCS); elsewhere, and for safety everywhere,
the new owner waits a moment and reads back who is the newest.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from declip_shards import DeclipError, Store

FOLDER = "manifests/lease"
"""Where leases lie."""
LEASE_SECONDS = 60.0
"""A lease that is older without having been renewed is looked at; its owner writes no more."""
RENEW_SECONDS = 10.0
"""Between two renewals."""
SETTLE_SECONDS = 1.0
"""Between creating a lease and believing that it is the newest."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a lease says."""

    host: str
    process: int
    id: str
    """Random, of one run."""
    renewed_at: float
    """Seconds since 1970 by the owner's clock."""

    @property
    def owner(self) -> str:
        return f"process {self.process} on {self.host}"


def _path(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"


def _newest(store: Store) -> int:
    """Number of the newest lease; 0 where there is none."""
    names = (name.removesuffix(".json") for name in store.list(FOLDER, ".json"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _read(store: Store, number: int) -> Claim | None:
    """What a lease says; None where it is gone or torn."""
    try:
        value = json.loads(store.read_bytes(_path(number)))
        return Claim(**value)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _bytes(claim: Claim) -> bytes:
    return json.dumps(vars(claim), sort_keys=True).encode()


def _create(store: Store, path: str, data: bytes) -> bool:
    """Put an object that is not there yet; False where it is."""
    full = store.path(path)
    store.fs.makedirs(full.rpartition("/")[0], exist_ok=True)
    try:
        store.fs.pipe_file(full, data, mode="create")
    except FileExistsError:
        return False
    except (TypeError, ValueError, NotImplementedError):
        # No put-if-absent here; reading back after a moment must do.
        store.fs.invalidate_cache(full.rpartition("/")[0])
        if store.exists(path):
            return False
        store.fs.pipe_file(full, data)
    return True


def _refusal(store: Store, claim: Claim | None) -> DeclipError:
    owner = claim.owner if claim else "unknown"
    return DeclipError(
        f"another run ({owner}) is writing to {store.url!r}; wait for it, stop it, or choose "
        f"another --out. If it died, its lease ends {LEASE_SECONDS:.0f} s after its last sign."
    )


def _check_free(store: Store, number: int) -> None:
    """Refuse while the newest lease's owner gives signs of life.

    Clocks may differ: one that looks old by ours is watched for two renewals before it is
    taken for dead.
    """
    claim = _read(store, number)
    if number == 0:
        return
    if claim is not None and abs(time.time() - claim.renewed_at) < LEASE_SECONDS:
        raise _refusal(store, claim)
    time.sleep(2 * RENEW_SECONDS)
    if _newest(store) > number or _read(store, number) != claim:
        raise _refusal(store, _read(store, _newest(store)))


def _interrupt_main_thread() -> None:
    """A real signal, as Ctrl-C sends: only that wakes a thread that waits in the kernel."""
    main = threading.main_thread().ident
    # Behind nohup or & Ctrl-C is ignored; pipelines.stopping takes the other for the same.
    is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    number = signal.SIGTERM if is_deaf else signal.SIGINT
    if main is not None and callable(signal.getsignal(number)):
        signal.pthread_kill(main, number)


class Lease:
    """A lease that is held, and renewed by a thread."""

    def __init__(self, store: Store, number: int, claim: Claim) -> None:
        self.store, self.number, self.claim = store, number, claim
        self.lost = ""
        """Why it is held no more; empty while it is."""
        self._renewed = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise a DeclipError where the lease is lost or could not be renewed in time."""
        silence = time.monotonic() - self._renewed
        if not self.lost and silence > 0.75 * LEASE_SECONDS:
            self.lost = f"it could not be renewed for {silence:.0f} s"
        if self.lost:
            raise DeclipError(
                f"this run lost its lease on {self.store.url!r}: {self.lost}; nothing more is "
                "written. What is done is kept: run the same command again."
            )

    def renew(self) -> None:
        """Write the lease anew unless somebody else has it.

        Raises:
            Exception: whatever the store says of a passing trouble.
        """
        start = time.monotonic()
        newest = _newest(self.store)
        claim = _read(self.store, newest) if newest else None
        if newest != self.number or claim is None or claim.id != self.claim.id:
            self.lost = f"{claim.owner} has it now" if claim else "its object was removed"
            return
        self.claim = Claim(**(vars(claim) | {"renewed_at": time.time()}))
        self.store.write_bytes(_path(self.number), _bytes(self.claim))
        self._renewed = start

    def _keep(self) -> None:
        while not self._end.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # tried again; check() knows for how long
                self.renew()
            with contextlib.suppress(DeclipError):
                self.check()
                continue
            _interrupt_main_thread()  # it may be in a long task
            return

    def release(self) -> None:
        """Give the lease back; another's is left alone."""
        self._end.set()
        self._thread.join(timeout=RENEW_SECONDS)
        with contextlib.suppress(Exception):  # if the store is out of reach now, it expires
            claim = _read(self.store, self.number)
            if claim is not None and claim.id == self.claim.id:
                self.store.remove(_path(self.number))


def take_lease(store: Store) -> Lease:
    """Become the one run that writes to ``store``.

    Raises:
        DeclipError: another run is; its host and process are named. That takes at most a few
            seconds, or two renewals where its clock and ours differ by more than a lease.
    """
    newest = _newest(store)
    _check_free(store, newest)
    number = newest + 1
    claim = Claim(
        host=socket.gethostname(), process=os.getpid(), id=uuid.uuid4().hex, renewed_at=time.time()
    )
    if not _create(store, _path(number), _bytes(claim)):
        raise _refusal(store, _read(store, number))
    time.sleep(SETTLE_SECONDS)
    last = _newest(store)
    winner = _read(store, last)
    if winner is None or winner.id != claim.id:
        own: Any = _read(store, number)
        if own is not None and own.id == claim.id:
            store.remove(_path(number))
        raise _refusal(store, winner)
    for older in store.list(FOLDER, ".json"):
        stem = older.removesuffix(".json")
        if stem.isdecimal() and int(stem) < number:
            store.remove(f"{FOLDER}/{older}")
    return Lease(store, number, claim)


@contextlib.contextmanager
def hold_lease(store: Store) -> Iterator[Lease]:
    """Hold a lease on ``store`` during a run.

    Raises:
        DeclipError: another run holds it, or took it on the way.
    """
    lease = take_lease(store)
    try:
        yield lease
    except KeyboardInterrupt:
        lease.check()  # where that is why the main thread was interrupted
        raise
    finally:
        lease.release()
