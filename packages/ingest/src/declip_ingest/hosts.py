"""Politeness towards one host: how many requests at a time, how many a second, and pauses.

Counted in one process, which is one shard of the run: as many shards as run at a time can reach
the same host together.
"""

import asyncio
import time
from collections import OrderedDict, deque

from declip_ingest.failures import FetchError

FIRST_PAUSE_SECONDS = 0.5
"""For a host that is busy and does not say how long; doubles until it serves again."""
LONGEST_PAUSE_SECONDS = 3600.0
"""A host that asks for more is asked again then."""
MAX_REMEMBERED_HOSTS = 20_000
"""With a pause or a rate to remember; of others nothing is kept."""


class _Host:
    """What is known of one host; dropped when there is nothing to remember."""

    __slots__ = ("active", "next_start", "pause_end", "pause_reason", "pauses", "waiting")

    def __init__(self) -> None:
        self.active = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.next_start = 0.0
        """Before this moment no request may start, for the rate's sake."""
        self.pause_end = 0.0
        self.pause_reason = ""
        self.pauses = 0
        """One after another, with no good answer between them."""

    def is_idle(self, now: float) -> bool:
        if self.active or self.waiting:
            return False
        # Of a pause that is over, how many there were is remembered as long again.
        return now >= self.next_start and (
            not self.pauses or now >= self.pause_end + FIRST_PAUSE_SECONDS * 2**self.pauses
        )


class Turn:
    """Leave to send one request to a host."""

    __slots__ = ("_host", "_key", "_limits", "_start")

    def __init__(self, limits: "HostLimits", key: str, host: _Host) -> None:
        self._limits = limits
        self._key = key
        self._host = host
        self._start = time.monotonic()

    def served(self) -> None:
        """The host answered and did not say that it is busy."""
        if self._start >= self._host.pause_end:
            self._host.pauses = 0

    def throttled(self, reason: str, retry_after: float | None) -> None:
        """The host is busy: nobody asks it until its pause is over.

        Requests that were under way when the pause began say nothing new by being refused.

        Args:
            reason: ``http_429`` or ``http_503``; rows that cannot wait so long fail with it.
            retry_after: seconds the host asked for; None if it did not say.
        """
        host = self._host
        if self._start >= host.pause_end:
            host.pauses += 1
        own = FIRST_PAUSE_SECONDS * 2 ** (min(host.pauses, 20) - 1)
        seconds = min(max(own, retry_after or 0.0), LONGEST_PAUSE_SECONDS)
        end = time.monotonic() + seconds
        if end > host.pause_end:
            host.pause_end, host.pause_reason = end, reason

    async def __aenter__(self) -> "Turn":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._limits.leave(self._key, self._host)


class HostLimits:
    """Turns at hosts, first come, first served; hosts do not wait for one another.

    Args:
        connections: requests under way at one host at most.
        requests_per_second: started at one host at most; 0 is no limit.
        max_pause_seconds: a longer pause is not waited for.
    """

    def __init__(
        self,
        connections: int,
        requests_per_second: float = 0.0,
        max_pause_seconds: float = 60.0,
    ) -> None:
        self._connections = connections
        self._interval = 1 / requests_per_second if requests_per_second else 0.0
        self._max_pause_seconds = max_pause_seconds
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._sweep_at = MAX_REMEMBERED_HOSTS

    def __len__(self) -> int:
        """Hosts of which something is remembered."""
        return len(self._hosts)

    async def turn(self, key: str) -> Turn:
        """Wait for a turn at the host ``key``; to be used as ``async with await limits.turn(key)``.

        Raises:
            FetchError: ``http_429`` or ``http_503``, detail ``host paused``: the host asked for a
                longer pause than is waited for.
        """
        host = self._hosts.get(key)
        if host is None:
            host = self._hosts[key] = _Host()
            if len(self._hosts) > self._sweep_at:
                self._sweep()
        if host.active >= self._connections or host.waiting:
            await self._queue(key, host)
        else:
            host.active += 1
        try:
            if host.pause_end or self._interval:
                await self._wait_for_start(host)
        except BaseException:
            self.leave(key, host)
            raise
        return Turn(self, key, host)

    async def _queue(self, key: str, host: _Host) -> None:
        """Wait until another's place is handed over."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        host.waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                # The place came at the very moment we were told to go.
                self.leave(key, host)
            elif place in host.waiting:
                host.waiting.remove(place)
            raise

    async def _wait_for_start(self, host: _Host) -> None:
        start = 0.0
        if self._interval:
            start = max(time.monotonic(), host.next_start)
            host.next_start = start + self._interval
        while True:
            now = time.monotonic()
            pause = host.pause_end - now
            if pause > self._max_pause_seconds:
                raise FetchError(host.pause_reason, "host paused")
            wait = max(pause, start - now)
            if wait <= 0:
                return
            if pause > 0 and self._interval:
                # Those that wait for the pause's end may not all start there.
                start = max(host.pause_end, host.next_start)
                host.next_start = start + self._interval
                wait = start - now
            await asyncio.sleep(wait)

    def leave(self, key: str, host: _Host) -> None:
        """Hand the place to the next in the queue."""
        while host.waiting:
            place = host.waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        host.active -= 1
        if not host.active and not host.pauses and host.is_idle(time.monotonic()):
            self._hosts.pop(key, None)

    def is_waited_for(self, key: str) -> bool:
        """Whether the host's pause, if any, is one that a request waits for."""
        host = self._hosts.get(key)
        return host is None or host.pause_end - time.monotonic() <= self._max_pause_seconds

    def _sweep(self) -> None:
        """Forget hosts whose pause or rate lies behind, then the oldest ones."""
        now = time.monotonic()
        for key in [k for k, host in self._hosts.items() if host.is_idle(now)]:
            del self._hosts[key]
        surplus = len(self._hosts) - MAX_REMEMBERED_HOSTS
        free = [k for k, host in self._hosts.items() if not host.active and not host.waiting]
        for key in free[: max(surplus, 0)]:
            del self._hosts[key]
        # Not at every new host when all of them are in use.
        self._sweep_at = max(MAX_REMEMBERED_HOSTS, len(self._hosts)) + MAX_REMEMBERED_HOSTS // 10
