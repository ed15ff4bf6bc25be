"""Look at this machine's way to the web: names, addresses, proxies, and a few failed hosts again.

The ledger says what failed; a look from here, slowly, says whether it still does. All of it is
bounded in time, few requests are made, and one host is asked once.
"""

import asyncio
import contextlib
import ipaddress
import os
import resource
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from declip_ingest.fetch import Fetcher, FetchPolicy

KNOWN_NAMES = ("example.com", "iana.org")
"""Names that exist as long as there is a domain name system."""
PUBLIC_ADDRESSES = (("1.1.1.1", 443), ("9.9.9.9", 443), ("8.8.8.8", 443))
"""Public resolvers: whether a connection without any name can be made."""
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
NUM_AT_A_TIME = 4
"""Hosts that are asked at the same time: the question is whether they answer a slow asker."""
LOOKUP_SECONDS = 10.0
CONNECT_SECONDS = 5.0

Resolver = Callable[[str], Awaitable[Sequence[str]]]
"""Name -> its addresses; raises ``OSError`` where it has none, ``TimeoutError`` where none came."""


@dataclass(frozen=True, kw_only=True)
class FailedHost:
    """A host to ask again."""

    reason: str
    """What its row failed for."""
    host: str
    """As the ledger has it."""
    url: str
    """One of its URLs."""


@dataclass(frozen=True, kw_only=True)
class ProbedHost:
    """What a failed host says now."""

    reason: str
    """What its row failed for."""
    host: str
    url: str
    addresses: tuple[str, ...]
    """What its name resolves to; empty where it does not."""
    now: str
    """What a fetch ends with now; empty for success."""
    milliseconds: int
    """Of the fetch."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a look from this machine found."""

    names_resolve: bool
    """Whether a name that must exist has an address."""
    false_addresses: tuple[str, ...]
    """What a name that cannot exist resolved to: somebody rewrites the answers."""
    is_reachable: bool
    """Whether some public address takes a connection."""
    proxies: tuple[str, ...]
    """Variables of the environment that name a proxy; we use none."""
    descriptor_limit: int
    """Files and connections that a process may have open (``ulimit -n``)."""
    hosts: tuple[ProbedHost, ...] = ()
    num_left: int = 0
    """Hosts that were not asked, for want of time."""
    seconds: float = 0.0

    @property
    def has_network(self) -> bool:
        """Whether anything at all can be reached from here."""
        return self.is_reachable or any(not h.now or h.now.startswith("http_") for h in self.hosts)

    def of_reason(self, *reasons: str) -> list[ProbedHost]:
        """The probed hosts whose rows had failed so."""
        return [host for host in self.hosts if host.reason in reasons]


def proxy_variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of variables that set a proxy (their values may hold passwords)."""
    return tuple(sorted(n for n, v in environment.items() if n.upper() in PROXY_VARIABLES and v))


async def run_probe(
    failed: Sequence[FailedHost],
    policy: FetchPolicy,
    *,
    seconds: float = 120.0,
    resolver: Resolver | None = None,
    known_names: Sequence[str] = KNOWN_NAMES,
    public_addresses: Sequence[tuple[str, int]] = PUBLIC_ADDRESSES,
    environment: Mapping[str, str] | None = None,
    on_host: Callable[[], None] = lambda: None,
) -> Probe:
    """Test names and addresses, then ask failed hosts once more.

    Args:
        failed: hosts to ask; none is, where neither names nor addresses answer.
        policy: limits of a fetch, the guard against private addresses among them.
        seconds: for all of it; what is not asked by then is left out.
        resolver: instead of this machine's.
        known_names: names that must resolve.
        public_addresses: addresses and ports of which one must take a connection.
        environment: instead of this process's.
        on_host: told of each host that was asked.
    """
    start = time.monotonic()
    threads = ThreadPoolExecutor(NUM_AT_A_TIME, thread_name_prefix="look-up")
    hosts: list[ProbedHost] = []
    try:
        resolve = _bounded(resolver or _system_resolver(threads))
        false_name = f"opendeclip-{uuid.uuid4().hex[:12]}"
        known, false, reachable = await asyncio.gather(
            _first_addresses(resolve, known_names),
            _first_addresses(resolve, (f"{false_name}.invalid", f"{false_name}.example.com")),
            _any_connects(public_addresses),
        )
        if known or reachable:
            left = seconds - (time.monotonic() - start)
            hosts = await _ask_all(failed, policy, resolve, left, on_host)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # a look-up may hang for long
    return Probe(
        names_resolve=bool(known),
        false_addresses=tuple(sorted(false)),
        is_reachable=reachable,
        proxies=proxy_variables(os.environ if environment is None else environment),
        descriptor_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        hosts=tuple(sorted(hosts, key=lambda h: (h.reason, h.host))),
        num_left=len(failed) - len(hosts),
        seconds=time.monotonic() - start,
    )


def _system_resolver(threads: ThreadPoolExecutor) -> Resolver:
    async def resolve(name: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            threads, lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]

    return resolve


def _bounded(resolver: Resolver) -> Callable[[str], Awaitable[tuple[str, ...]]]:
    """The resolver with a time limit, which finds nothing instead of failing."""

    async def resolve(name: str) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                return tuple(sorted(set(await resolver(name))))
        except (OSError, UnicodeError):  # TimeoutError is an OSError
            return ()

    return resolve


async def _first_addresses(
    resolve: Callable[[str], Awaitable[tuple[str, ...]]], names: Sequence[str]
) -> tuple[str, ...]:
    """What the first of the names that has addresses resolves to."""
    found = await asyncio.gather(*(resolve(name) for name in names))
    return next((addresses for addresses in found if addresses), ())


async def _any_connects(addresses: Sequence[tuple[str, int]]) -> bool:
    async def connects(address: str, port: int) -> bool:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(address, port)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return True
        return False

    return any(await asyncio.gather(*(connects(*address) for address in addresses)))


async def _ask_all(
    failed: Sequence[FailedHost],
    policy: FetchPolicy,
    resolve: Callable[[str], Awaitable[tuple[str, ...]]],
    seconds: float,
    on_host: Callable[[], None],
) -> list[ProbedHost]:
    """Ask a few hosts at a time, until the time is over."""
    found: list[ProbedHost] = []
    places = asyncio.Semaphore(NUM_AT_A_TIME)

    async def ask(host: FailedHost, fetcher: Fetcher) -> None:
        async with places:
            addresses = await _addresses_of(host.host, resolve)
            fetched = await fetcher.fetch(host.url)
        now = fetched.failure.reason if fetched.failure else ""
        found.append(
            ProbedHost(
                reason=host.reason,
                host=host.host,
                url=host.url,
                addresses=addresses,
                now=now,
                milliseconds=fetched.milliseconds,
            )
        )
        on_host()

    try:
        async with (
            asyncio.timeout(max(seconds, 0.0)),
            Fetcher(policy, max_connections=NUM_AT_A_TIME) as fetcher,
            asyncio.TaskGroup() as group,
        ):
            for host in failed:
                group.create_task(ask(host, fetcher))
    except TimeoutError:
        pass  # those that were not asked are counted
    except ExceptionGroup as faults:
        raise faults.exceptions[0] from None  # this machine's own fault, told by one sentence
    return found


async def _addresses_of(
    host: str, resolve: Callable[[str], Awaitable[tuple[str, ...]]]
) -> tuple[str, ...]:
    """A host's addresses; an address is its own."""
    name = host_name(host)
    return (name,) if is_address(name) else await resolve(name)


def host_name(host: str) -> str:
    """A URL's host without port and brackets: ``[::1]:80 -> ::1``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def is_address(name: str) -> bool:
    """Whether a host is an IP address and no name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
