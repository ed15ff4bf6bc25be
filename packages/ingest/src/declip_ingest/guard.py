"""Connections that only reach vetted addresses.

The vetting sits where names are resolved and again where each socket is made, so no redirect,
retry, reused pool or odd notation can go around it: a name is looked up once, every address it has
must be public (or ``host:port`` is allowed by name), and the socket connects to an address of that
very answer (no second look-up to rebind). ``Host`` and SNI keep the name.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import idna
from aiohttp.abc import AbstractResolver, ResolveResult

from declip_ingest.failures import FetchError
from declip_shards import DeclipError

DEFAULT_PORTS = (80, 443)
"""Ports that need no permission."""
MAX_URL_LENGTH = 8192
"""Characters; longer ones are no picture's address."""
MAX_ADDRESSES_TRIED = 3
"""Of one name; a host with a dozen dead addresses may not eat the whole deadline."""
LOOKUP_THREADS = 128
"""Look-ups at a time: ``getaddrinfo`` knows no time-out, and a few that hang may not stop all."""
LOOKUP_TTL_SECONDS = 300.0
"""How long an answer holds; ``getaddrinfo`` does not tell the name's own time."""
MISSING_TTL_SECONDS = 30.0
"""How long "there is no such name" holds."""
MAX_CACHED_NAMES = 50_000

_FORBIDDEN_V4 = [
    ipaddress.IPv4Network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's host agent: a public number that answers within a guest only
    )
]
"""IANA's special-purpose registry, spelled out since each Python version knows another part."""
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""All that IANA has given out for the public internet; the rest is special or unassigned."""
_FORBIDDEN_V6 = [
    ipaddress.IPv6Network(net) for net in ("2001::/23", "2001:db8::/32", "3fff::/20", "3ffe::/16")
]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BRACKETED = re.compile(r"\[([^\]]*)\](?::[0-9]*)?")
_PORT = re.compile(r":[0-9]*\Z")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LEGAL = "!$%&'()*+,/:;=?@[]~"
"""Characters that stay as they are; a percent sign too, for what is escaped stays escaped."""

Lookup = Callable[[str], Sequence[str]]
"""Blocking look-up of a name: its IP addresses; ``socket.gaierror`` when it has none."""


class Target(NamedTuple):
    """A URL that may be asked for, in the one form that is sent."""

    scheme: str
    """``http`` or ``https``."""
    host: str
    """Lower case, ASCII, without a last dot; an IP address in its usual form, no brackets."""
    port: int
    path: str
    """Path and query, escaped."""

    @property
    def netloc(self) -> str:
        """Host, with brackets where it is IPv6, and port where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        is_default = self.port == (443 if self.scheme == "https" else 80)
        return host if is_default else f"{host}:{self.port}"

    @property
    def server(self) -> str:
        """Whose turns and pauses count: http and https are one server's, other ports another's."""
        return self.host if self.port in (80, 443) else f"{self.host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.netloc}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


def check_url(url: str) -> Target:
    """Read ``url`` as browsers do; refuse what is never fetched.

    Raises:
        FetchError: ``bad_url`` or ``bad_scheme``.
    """
    url = url.strip(" ")
    if not url or len(url) > MAX_URL_LENGTH or _CONTROL.search(url):
        detail = "empty" if not url else "length" if len(url) > MAX_URL_LENGTH else "control"
        raise FetchError("bad_url", detail)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchError("bad_url") from error
    if parts.scheme and parts.scheme not in ("http", "https"):
        raise FetchError("bad_scheme")
    if not parts.scheme or not parts.netloc:
        raise FetchError("bad_url", "not absolute")
    if "@" in parts.netloc:
        raise FetchError("bad_url", "user name")
    host = _read_host(parts.netloc)
    try:
        path = quote(parts.path or "/", _LEGAL, "utf-8", "surrogateescape")
        query = quote(parts.query, _LEGAL, "utf-8", "surrogateescape")
    except UnicodeError as error:
        raise FetchError("bad_url") from error
    if port is None:
        port = 443 if parts.scheme == "https" else 80
    if port == 0:
        raise FetchError("bad_url")
    return Target(parts.scheme, host, port, f"{path}?{query}" if query else path)


@lru_cache(4096)
def _read_host(netloc: str) -> str:
    """Host in its one form; see :class:`Target`."""
    if (bracketed := _BRACKETED.fullmatch(netloc)) is not None:
        return _read_ipv6(bracketed[1])
    name = _PORT.sub("", netloc).lower()
    if not name.isascii():
        # Ideographic dots and full-width digits become plain ones here, before anything is judged.
        try:
            name = idna.encode(name, uts46=True, transitional=False).decode("ascii")
        except (idna.IDNAError, UnicodeError) as error:
            raise FetchError("bad_url", "host") from error
    name = name.removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise FetchError("bad_url", "host")
    if _NUMBER.fullmatch(labels[-1]):
        return _read_ipv4(labels)
    return name


def _read_ipv6(text: str) -> str:
    address, _, zone = text.partition("%")
    try:
        ip = ipaddress.IPv6Address(address)
    except ValueError as error:
        raise FetchError("bad_url", "host") from error
    if zone:
        # A scope names one of our own interfaces.
        raise FetchError("forbidden_address")
    return str(ip)


def _read_ipv4(labels: Sequence[str]) -> str:
    """An IPv4 address in any of the notations of ``inet_aton``: short, hexadecimal, octal."""
    try:
        numbers = [
            int(part[2:] or "0", 16)
            if part.startswith("0x")
            else int(part, 8 if part.startswith("0") else 10)
            for part in labels
        ]
    except ValueError as error:
        raise FetchError("bad_url", "host") from error
    *head, last = numbers
    if len(numbers) > 4 or any(n > 255 for n in head) or last >= 256 ** (4 - len(head)):
        raise FetchError("bad_url", "host")
    value = last + sum(n << (24 - 8 * i) for i, n in enumerate(head))
    return str(ipaddress.IPv4Address(value))


@lru_cache(65536)
def is_public(address: str) -> bool:
    """Whether an IP address is routed on the public internet, its embedded IPv4 included.

    IPv4-mapped, 6to4 and NAT64 addresses lead to the IPv4 inside, so that one is judged; of IPv6
    only what IANA gives out for the public internet counts.
    """
    if "%" in address:
        return False
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not any(ip in net for net in _FORBIDDEN_V4)
    if ip in _IPV4_MAPPED or ip in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    if ip.sixtofour is not None:
        return is_public(str(ip.sixtofour))
    return ip in _GLOBAL_V6 and ip.is_global and not any(ip in net for net in _FORBIDDEN_V6)


def _is_address(host: str) -> bool:
    """Whether a host in its one form is an IP address and no name."""
    return ":" in host or host.rpartition(".")[2].isdecimal()


def parse_allowed(allow_addresses: Sequence[str]) -> frozenset[tuple[str, int]]:
    """``("127.0.0.1:18571", "[::1]:80")`` as pairs of host and port.

    Raises:
        DeclipError: an entry is not ``host:port``.
    """
    allowed = set()
    for entry in allow_addresses:
        host, _, port = entry.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]").lower()
        is_wrapped = host.startswith("[") and host.endswith("]")
        if not bare or not port.isdecimal() or not 0 < int(port) < 65536:
            raise DeclipError(
                f"allow_addresses holds {entry!r}, which is not host:port with a port of 1 to "
                "65535; write for example '127.0.0.1:8000' or '[::1]:8000'."
            )
        if ":" in bare and not is_wrapped:
            raise DeclipError(f"allow_addresses holds {entry!r}; write IPv6 as '[{host}]:{port}'.")
        try:
            allowed.add((_read_host(host.lower()), int(port)))
        except FetchError as error:
            raise DeclipError(
                f"allow_addresses holds {entry!r}, whose host is neither a name nor an address; "
                "write for example '127.0.0.1:8000' or 'images.lan:8000'."
            ) from error
    return frozenset(allowed)


def system_lookup(host: str) -> Sequence[str]:
    """Ask the system's resolver; blocks."""
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in answers))


class NameCache:
    """Names to addresses: asked once at a time a name, kept for a while, misses too.

    Each look-up has a daemon thread of its own, at most ``LOOKUP_THREADS`` at a time: an executor
    would wait for one that hangs when the process ends.
    """

    def __init__(
        self,
        lookup: Lookup = system_lookup,
        *,
        ttl_seconds: float = LOOKUP_TTL_SECONDS,
        missing_ttl_seconds: float = MISSING_TTL_SECONDS,
    ) -> None:
        self._lookup = lookup
        self.ttl_seconds = ttl_seconds
        self.missing_ttl_seconds = missing_ttl_seconds
        self._known: OrderedDict[str, tuple[float, Sequence[str]]] = OrderedDict()
        self._asked: dict[str, asyncio.Future[Sequence[str]]] = {}
        self._threads = asyncio.Semaphore(LOOKUP_THREADS)
        self._tasks: set[asyncio.Task[None]] = set()

    async def addresses(self, host: str) -> Sequence[str]:
        """IP addresses of a name, as text, in the resolver's order; never none.

        Raises:
            FetchError: ``dns_failure``.
            OSError: the machine could not ask (no file descriptors left).
        """
        known = self._known.get(host)
        if known is not None and time.monotonic() < known[0]:
            found = known[1]
        else:
            asked = self._asked.get(host)
            if asked is None:
                asked = self._asked[host] = asyncio.get_running_loop().create_future()
                task = asyncio.create_task(self._ask(host, asked))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            # A caller that gives up does not take the answer away from the others.
            found = await asyncio.shield(asked)
        if not found:
            raise FetchError("dns_failure")
        return found

    async def _ask(self, host: str, asked: "asyncio.Future[Sequence[str]]") -> None:
        try:
            async with self._threads:
                answer = await self._in_thread(host)
        except (OSError, UnicodeError) as error:
            passing = not isinstance(error, socket.gaierror | UnicodeError)
            if passing:
                asked.set_exception(error)
                asked.exception()  # known to be looked at, even when nobody waits any more
            else:
                codes = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
                if isinstance(error, UnicodeError) or error.args[:1][0] in codes:
                    self._keep(host, (), self.missing_ttl_seconds)
                asked.set_result(())
        else:
            self._keep(host, answer, self.ttl_seconds if answer else self.missing_ttl_seconds)
            asked.set_result(answer)
        finally:
            del self._asked[host]
            if not asked.done():
                asked.cancel()

    def _keep(self, host: str, answer: Sequence[str], seconds: float) -> None:
        self._known[host] = (time.monotonic() + seconds, answer)
        self._known.move_to_end(host)
        if len(self._known) > MAX_CACHED_NAMES:
            self._known.popitem(last=False)

    async def _in_thread(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Sequence[str]] = loop.create_future()

        def settle(answer: Sequence[str], error: BaseException | None) -> None:
            if not done.done():
                if error is None:
                    done.set_result(answer)
                else:
                    done.set_exception(error)

        def run() -> None:
            answer: Sequence[str] = ()
            failure: BaseException | None = None
            try:
                answer = tuple(self._lookup(host))
            except BaseException as error:
                failure = error
            # The loop may be closed by the time a slow answer comes.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, answer, failure)

        threading.Thread(target=run, daemon=True, name=f"look up {host}").start()
        return await done

    async def close(self) -> None:
        """Stop waiting for answers."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Destination:
    """Where the request that runs now is meant to go; the guard compares each socket with it."""

    __slots__ = ("host", "is_new", "is_resolving", "port")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.is_new = False
        """Whether a connection was made for it, or tried; else it took an idle one."""
        self.is_resolving = False
        """Whether a look-up is under way: time that runs out now is the resolver's."""


_destination: ContextVar[Destination | None] = ContextVar("destination", default=None)


class AddressGuard(AbstractResolver):
    """Resolves names and makes sockets, and lets through only what may be reached.

    It is both the resolver and the socket factory of aiohttp's connector; the connector passes IP
    addresses by the resolver, but never by the factory.

    Args:
        allow_addresses: ``host:port`` as they stand in the URLs; for these neither the address nor
            the port is questioned.
        lookup: blocking look-up of a name.
        receive_buffer_bytes: the kernel's buffer for each socket; None leaves it to the kernel.
    """

    def __init__(
        self,
        allow_addresses: Sequence[str] = (),
        *,
        lookup: Lookup = system_lookup,
        receive_buffer_bytes: int | None = None,
    ) -> None:
        self.allowed = parse_allowed(allow_addresses)
        self.names = NameCache(lookup)
        self._receive_buffer_bytes = receive_buffer_bytes
        self._sockets: list[socket.socket] = []

    def count_sockets(self, enough: int) -> int:
        """Sockets made here that are still open, in use or idle; exact from ``enough`` on."""
        if len(self._sockets) >= enough:
            self._sockets = [sock for sock in self._sockets if sock.fileno() >= 0]
        return len(self._sockets)

    def vet_literal(self, target: Target) -> None:
        """Vet what can be seen without a look-up.

        Raises:
            FetchError: ``forbidden_address`` or ``forbidden_port``.
        """
        if _is_address(target.host):
            self.vet(target.host, target.port, [target.host])

    def start(self, target: Target) -> Destination:
        """Note where the request that this task makes now is meant to go."""
        destination = Destination(target.host, target.port)
        _destination.set(destination)
        return destination

    def vet(self, host: str, port: int, addresses: Sequence[str]) -> None:
        """Let ``host`` through if it is allowed, or all its addresses and the port are public.

        All of them, not just the first: a name with one public and one private address is how a
        check of "the" address is gone around.

        Raises:
            FetchError: ``forbidden_address`` or ``forbidden_port``.
        """
        if (host, port) in self.allowed:
            return
        if not all(is_public(address) for address in addresses):
            raise FetchError("forbidden_address")
        if port not in DEFAULT_PORTS:
            raise FetchError("forbidden_port")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """aiohttp asks this for every name it connects to.

        Raises:
            FetchError: ``dns_failure``, ``forbidden_address``, ``forbidden_port``.
        """
        destination = _destination.get()
        if destination is not None:
            destination.is_resolving = True
        addresses = await self.names.addresses(host)
        if destination is not None:
            destination.is_resolving = False
        self.vet(host, port, addresses)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses[:MAX_ADDRESSES_TRIED]
        ]

    def open_socket(self, addr_info: Any) -> socket.socket:
        """aiohttp asks this for every socket, with the very address it will connect to.

        Raises:
            FetchError: ``forbidden_address`` or ``forbidden_port``.
        """
        family, kind, protocol, _, (address, port, *_) = addr_info
        destination = _destination.get()
        # A socket that no request asked for is judged by its address alone.
        host = address if destination is None else destination.host
        if destination is not None:
            destination.is_new = True
            if destination.port != port:
                raise FetchError("forbidden_port")
        self.vet(host, port, [address])
        sock = socket.socket(family, kind, protocol)
        self._sockets.append(sock)
        if self._receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer_bytes)
        return sock

    async def close(self) -> None:
        await self.names.close()
