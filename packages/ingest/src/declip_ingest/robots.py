"""robots.txt by RFC 9309: fetched once a day and host, shared between processes, obeyed.

A host without one (4xx) allows everything; one whose file cannot be had allows nothing for now.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from protego import Protego

from declip_ingest.failures import FetchError
from declip_shards import Store

USER_AGENT_TOKEN = "opendeclip"  # noqa: S105 - a robot's name, no secret
"""The name by which robots.txt and X-Robots-Tag may address us."""
MAX_ROBOTS_BYTES = 500 * 1024
"""What lies behind is not read; RFC 9309 asks for at least this."""
TTL_SECONDS = 24 * 3600.0
"""How long a file holds; RFC 9309 allows no longer."""
STALE_SECONDS = 30 * 24 * 3600.0
"""How old a file may be that stands in while the host cannot be reached."""
UNAVAILABLE_SECONDS = 30.0
"""How long a host whose file could not be had is left alone."""
MAX_TEXT_IN_MEMORY = 64 << 20
"""Characters of all the files kept parsed; the least recently used go first."""
MAX_ORIGINS_IN_MEMORY = 20_000
MAX_WRITES_WAITING = 1000
"""A store slower than the network loses files of the cache, no time."""
FOLDER = "cache/robots"

Download = Callable[[str], Awaitable[str | None]]
"""Fetch the text behind a robots.txt URL: None where there is none (4xx).

Raises :class:`FetchError` where it cannot be had.
"""


class RobotRules:
    """What one host's robots.txt says to us."""

    __slots__ = ("_parser", "expires", "num_chars")

    def __init__(self, text: str | None, expires: float) -> None:
        self.expires = expires
        """Seconds since 1970."""
        self.num_chars = len(text or "")
        # A byte order mark would hide the first line from the parser.
        text = (text or "").removeprefix("\ufeff")
        self._parser = Protego.parse(text) if text.strip() else None

    def allows(self, url: str) -> bool:
        """Whether we may fetch ``url``, an absolute URL of this host."""
        return self._parser is None or self._parser.can_fetch(url, USER_AGENT_TOKEN)


class RobotsCache:
    """robots.txt of many hosts, in memory and, with a store, in files that all processes share.

    Args:
        store: the dataset's folder; None keeps all in memory.
        folder: where in it; nothing there is part of the dataset, and it may be deleted.
        ttl_seconds: age at which a file is fetched again.
    """

    def __init__(
        self, store: Store | None = None, folder: str = FOLDER, *, ttl_seconds: float = TTL_SECONDS
    ) -> None:
        self._store = store
        self._folder = folder
        self._ttl_seconds = ttl_seconds
        self._known: OrderedDict[str, RobotRules] = OrderedDict()
        self._num_chars = 0
        self._unavailable: dict[str, tuple[float, FetchError]] = {}
        self._asked: dict[str, asyncio.Task[RobotRules]] = {}
        self._files: ThreadPoolExecutor | None = None
        self._may_write = threading.Semaphore(MAX_WRITES_WAITING)

    def known(self, origin: str) -> RobotRules | None:
        """The rules of ``origin`` (scheme://host:port) if they are at hand and not too old."""
        rules = self._known.get(origin)
        if rules is None or time.time() >= rules.expires:
            return None
        self._known.move_to_end(origin)
        return rules

    async def rules(self, origin: str, download: Download) -> RobotRules:
        """The rules of ``origin``, from memory, the store, or the host; one fetch in flight.

        Raises:
            FetchError: what ``download`` raised; the same for a while after.
        """
        if (rules := self.known(origin)) is not None:
            return rules
        if origin in self._unavailable:
            until, failure = self._unavailable[origin]
            if time.monotonic() < until:
                raise FetchError(failure.reason, failure.detail)
            del self._unavailable[origin]
        task = self._asked.get(origin)
        if task is None:
            task = self._asked[origin] = asyncio.create_task(self._ask(origin, download))
            task.add_done_callback(lambda done: self._answered(origin, done))
        # A row whose time is up does not take the answer away from the others.
        return await asyncio.shield(task)

    def _answered(self, origin: str, task: "asyncio.Task[RobotRules]") -> None:
        del self._asked[origin]
        if not task.cancelled():
            task.exception()  # known to be looked at, even when nobody waits any more

    async def _ask(self, origin: str, download: Download) -> RobotRules:
        stored = await self._read(origin)
        now = time.time()
        if stored is not None and now < stored[0] + self._ttl_seconds:
            return await self._keep(origin, stored[1], stored[0] + self._ttl_seconds)
        try:
            text = await download(f"{origin}/robots.txt")
        except FetchError as failure:
            if stored is not None and now < stored[0] + STALE_SECONDS:
                return await self._keep(origin, stored[1], now + UNAVAILABLE_SECONDS)
            self._note_unavailable(origin, failure)
            raise
        self._write(origin, text)
        return await self._keep(origin, text, time.time() + self._ttl_seconds)

    async def _keep(self, origin: str, text: str | None, expires: float) -> RobotRules:
        # A long file takes a good while to parse; the other downloads go on meanwhile.
        is_long = len(text or "") > 1 << 15
        rules = (
            await asyncio.to_thread(RobotRules, text, expires)
            if is_long
            else RobotRules(text, expires)
        )
        old = self._known.pop(origin, None)
        self._known[origin] = rules
        self._num_chars += rules.num_chars - (old.num_chars if old else 0)
        while (
            self._num_chars > MAX_TEXT_IN_MEMORY or len(self._known) > MAX_ORIGINS_IN_MEMORY
        ) and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._num_chars -= oldest.num_chars
        return rules

    def _note_unavailable(self, origin: str, failure: FetchError) -> None:
        now = time.monotonic()
        if len(self._unavailable) >= MAX_ORIGINS_IN_MEMORY:
            kept = {k: v for k, v in self._unavailable.items() if now < v[0]}
            self._unavailable = kept if len(kept) < MAX_ORIGINS_IN_MEMORY else {}
        # A new one: the old one's traceback holds on to what was read.
        kept_failure = FetchError(failure.reason, failure.detail)
        self._unavailable[origin] = (now + UNAVAILABLE_SECONDS, kept_failure)

    def _path(self, origin: str) -> str:
        digest = hashlib.sha256(origin.encode()).hexdigest()
        return f"{self._folder}/{digest[:2]}/{digest[2:34]}.json"

    async def _read(self, origin: str) -> tuple[float, str | None] | None:
        """(fetched at, text) of the store's file; None where there is none that makes sense."""
        if self._store is None:
            return None
        store, path = self._store, self._path(origin)

        def read() -> Any:
            try:
                return json.loads(store.read_bytes(path))
            except Exception:
                return None  # not there, not ours, or the store is out of order: it is fetched

        held = await asyncio.get_running_loop().run_in_executor(self._threads(), read)
        if not isinstance(held, dict) or held.get("origin") != origin:
            return None
        fetched_at, text = held.get("fetched_at"), held.get("text")
        if not isinstance(fetched_at, int | float) or not isinstance(text, str | None):
            return None
        # A clock that was set back may not make a file hold for ever.
        return min(fetched_at, time.time()), text

    def _write(self, origin: str, text: str | None) -> None:
        """Put the file into the store by and by; a fault there costs another fetch, no row."""
        if self._store is None or not self._may_write.acquire(blocking=False):
            return
        store, path = self._store, self._path(origin)
        data = json.dumps({"origin": origin, "fetched_at": time.time(), "text": text}).encode()

        def write() -> None:
            try:
                store.write_bytes(path, data)
            except Exception:
                pass  # a full disk is reported by those who write the dataset
            finally:
                self._may_write.release()

        self._threads().submit(write)

    def _threads(self) -> ThreadPoolExecutor:
        """Threads of our own: a store that hangs may not hold up the loop's."""
        if self._files is None:
            self._files = ThreadPoolExecutor(2, thread_name_prefix="robots")
        return self._files

    async def aclose(self) -> None:
        """Stop fetching, and finish the files that are being written."""
        tasks = list(self._asked.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._files is not None:
            await asyncio.to_thread(self._files.shutdown)
            self._files = None
