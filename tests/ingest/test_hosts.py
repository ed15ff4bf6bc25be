"""A host gets no more than its share, its pauses are kept, and nobody waits for another host."""

import asyncio
import time

import pytest

from declip_ingest import hosts
from declip_ingest.failures import FetchError
from declip_ingest.hosts import HostLimits

SLACK_SECONDS = 0.02
"""A clock's grain; requests may be late by any amount, and never earlier than this."""


async def hold(limits: HostLimits, key: str, seconds: float = 0.0) -> float:
    """Take a turn; the moment it came."""
    async with await limits.turn(key):
        start = time.monotonic()
        await asyncio.sleep(seconds)
    return start


def test_no_more_turns_at_a_time_than_connections_and_none_is_lost():
    async def run() -> None:
        limits = HostLimits(3)
        active = most = 0

        async def work(number: int) -> None:
            nonlocal active, most
            async with await limits.turn("a"):
                active += 1
                most = max(most, active)
                await asyncio.sleep(0.001 * (number % 3))
                active -= 1

        await asyncio.gather(*map(work, range(100)))
        assert (most, active, len(limits)) == (3, 0, 0)

    asyncio.run(run())


def test_turns_are_given_in_the_order_of_asking():
    async def run() -> None:
        limits, order = HostLimits(1), []

        async def work(number: int) -> None:
            async with await limits.turn("a"):
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*map(work, range(20)))
        assert order == list(range(20))

    asyncio.run(run())


def test_hosts_do_not_wait_for_one_another():
    async def run() -> None:
        limits = HostLimits(1, requests_per_second=0.5)
        busy = [asyncio.create_task(hold(limits, "slow", 30)) for _ in range(5)]
        await asyncio.sleep(0.01)
        start = time.monotonic()
        await asyncio.gather(*(hold(limits, f"h{i}") for i in range(100)))
        assert time.monotonic() - start < 2
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)

    asyncio.run(run())


def test_one_that_gives_up_leaves_its_place_to_the_next():
    async def run() -> None:
        limits = HostLimits(1)
        first = asyncio.create_task(hold(limits, "a", 0.05))
        await asyncio.sleep(0)
        tasks = [asyncio.create_task(hold(limits, "a")) for _ in range(10)]
        await asyncio.sleep(0.01)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert sum(isinstance(start, float) for start in done) == 6
        assert len(limits) == 0

    asyncio.run(run())


def test_a_place_that_comes_with_the_cancellation_is_handed_on():
    async def run() -> None:
        limits = HostLimits(1)
        turn = await limits.turn("a")
        waiting = asyncio.create_task(hold(limits, "a"))
        await asyncio.sleep(0)
        async with turn:
            pass  # the place is given to the waiting one, which has not run yet
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.wait_for(hold(limits, "a"), 5)
        assert len(limits) == 0

    asyncio.run(run())


@pytest.mark.parametrize("rate", [50.0, 200.0])
def test_starts_keep_the_rate(rate):
    async def run() -> list[float]:
        limits = HostLimits(100, requests_per_second=rate)
        return sorted(await asyncio.gather(*(hold(limits, "a") for _ in range(20))))

    starts = asyncio.run(run())
    for number, start in enumerate(starts):
        assert start - starts[0] >= number / rate - SLACK_SECONDS


def test_a_pause_holds_for_all_and_ends():
    async def run() -> None:
        limits = HostLimits(4)
        async with await limits.turn("a") as turn:
            turn.throttled("http_429", 0.8)
            told = time.monotonic()
        assert limits.is_waited_for("a")
        starts = await asyncio.gather(*(hold(limits, "a") for _ in range(8)))
        assert min(starts) - told >= 0.8 - SLACK_SECONDS

    asyncio.run(run())


def test_after_a_pause_the_rate_still_holds():
    async def run() -> list[float]:
        limits = HostLimits(10, requests_per_second=20)
        waiting = []
        async with await limits.turn("a") as turn:
            waiting = [asyncio.create_task(hold(limits, "a")) for _ in range(6)]
            await asyncio.sleep(0.01)
            turn.throttled("http_503", 0.5)
        return sorted(await asyncio.gather(*waiting))

    starts = asyncio.run(run())
    for number, start in enumerate(starts):
        assert start - starts[0] >= number / 20 - SLACK_SECONDS


def test_a_pause_too_long_to_wait_for_fails_at_once_by_its_cause():
    async def run() -> None:
        limits = HostLimits(2, max_pause_seconds=5)
        async with await limits.turn("a") as turn:
            turn.throttled("http_503", 6)
        assert not limits.is_waited_for("a")
        for _ in range(3):
            with pytest.raises(FetchError) as caught:
                await limits.turn("a")
            assert str(caught.value) == "http_503: host paused"
        assert limits.is_waited_for("b")
        await hold(limits, "b")

    asyncio.run(run())


def test_pauses_grow_until_the_host_serves_again(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    async def throttle() -> float:
        async with await limits.turn("a") as turn:
            turn.throttled("http_429", None)
            turn.throttled("http_429", None)  # one of the same time says nothing new
        return limits._hosts["a"].pause_end - now[0]

    async def run() -> None:
        pauses = []
        for _ in range(5):
            pauses.append(await throttle())
            now[0] += pauses[-1]
        assert pauses == [0.5, 1, 2, 4, 8]
        async with await limits.turn("a") as turn:
            turn.served()
        assert await throttle() == 0.5
        now[0] += 0.5
        async with await limits.turn("a") as turn:
            turn.throttled("http_429", 1e12)
        assert limits._hosts["a"].pause_end - now[0] == hosts.LONGEST_PAUSE_SECONDS

    limits = HostLimits(1)
    asyncio.run(run())


def test_millions_of_hosts_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(hosts, "MAX_REMEMBERED_HOSTS", 100)

    async def run() -> None:
        limits = HostLimits(4)
        for number in range(2000):
            await hold(limits, f"h{number}")
        assert len(limits) == 0
        limits = HostLimits(4, requests_per_second=0.001)
        held = await limits.turn("held")
        for number in range(2000):
            async with await limits.turn(f"h{number}") as turn:
                turn.throttled("http_429", 50)
        assert len(limits) <= 125
        assert "held" in limits._hosts, "one that is in use is never forgotten"
        async with held:
            pass

    asyncio.run(run())
