"""Connections that only reach vetted addresses and never outlive their deadline.

The vetting sits where the socket is made, so no redirect, retry or reused pool can go around it: a
name is resolved once, every address it has must be public (or ``host:port`` is allowed by name),
and the socket connects to an address of that very answer (no second lookup to rebind). ``Host``
and SNI keep the name, as urllib3 sets them.
"""

import contextlib
import errno
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from declip_ingest.failures import FetchError
from declip_shards import DeclipError

DEFAULT_PORTS = (80, 443)
"""Ports that need no permission."""
MAX_ADDRESSES_TRIED = 3
"""Of one name; a host with a dozen dead addresses may not eat the whole deadline."""
RESOLVER_THREADS = 32
"""``getaddrinfo`` knows no time-out, so it runs beside us and we stop waiting for it."""
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_current = threading.local()


class Deadline:
    """When a URL's time is up, on the monotonic clock; a phase of it may end earlier."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.phase_end = self.end

    def start_phase(self, seconds: float) -> None:
        """From now on :meth:`remaining` counts to ``seconds`` from now, or to the end."""
        self.phase_end = min(self.end, time.monotonic() + seconds)

    def end_phase(self) -> None:
        self.phase_end = self.end

    def remaining(self) -> float:
        """Seconds left of the phase; ``TimeoutError`` when there are none."""
        left = self.phase_end - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        return left


@contextlib.contextmanager
def running_under(deadline: Deadline) -> Iterator[None]:
    """Every guarded socket that this thread reads inside the block obeys ``deadline``.

    Thread-local rather than an argument: the sockets are read deep inside ``http.client``, and a
    pooled one serves many URLs, each with a deadline of its own.
    """
    _current.deadline = deadline
    try:
        yield
    finally:
        _current.deadline = None


def _deadline() -> Deadline:
    deadline: Deadline | None = getattr(_current, "deadline", None)
    if deadline is None:
        raise RuntimeError("a guarded socket is used outside running_under()")
    return deadline


class DeadlineSocket(socket.socket):
    """A socket's own time-out restarts with every byte; this one counts to the deadline."""

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(_deadline().remaining())
        return super().recv_into(buffer, nbytes, flags)


class DeadlineSSLSocket(ssl.SSLSocket):
    """:class:`DeadlineSocket` under TLS."""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_deadline().remaining())
        return super().recv_into(buffer, nbytes, flags)


def is_public(address: str) -> bool:
    """Whether an IP address is routed on the public internet, its embedded IPv4 included.

    Python before 3.13 calls ``::ffff:127.0.0.1`` what its IPv6 half is, and 6to4, Teredo and NAT64
    addresses are public by themselves while they lead to the IPv4 inside: each is unwrapped.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        embedded = [v4 for v4 in inner if v4 is not None]
        if embedded:
            return all(is_public(str(v4)) for v4 in embedded)
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


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
        allowed.add((bare, int(port)))
    return frozenset(allowed)


def literal_address(host: str, port: int) -> Sequence[tuple[socket.AddressFamily, Any]]:
    """What ``host`` is if it is an IP address and no name; empty for a name.

    There is nothing to look up then: no thread, and no failure of a name service.
    """
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return []
    if isinstance(ip, ipaddress.IPv4Address):
        return [(socket.AF_INET, (str(ip), port))]
    # A scope names one of our own interfaces, by number or by name: the resolver's business.
    return [] if ip.scope_id else [(socket.AF_INET6, (str(ip), port, 0, 0))]


class AddressGuard:
    """Resolves names and lets through only what may be reached.

    Args:
        allow_addresses: ``host:port`` as they stand in the URLs; for these neither the address nor
            the port is questioned.
        connect_timeout_seconds: for one address, within the URL's deadline.
    """

    def __init__(
        self, allow_addresses: Sequence[str] = (), connect_timeout_seconds: float = 5.0
    ) -> None:
        self.allowed = parse_allowed(allow_addresses)
        self.connect_timeout_seconds = connect_timeout_seconds
        self._resolver = ThreadPoolExecutor(RESOLVER_THREADS, thread_name_prefix="resolve")

    def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)

    def addresses(self, host: str, port: int) -> Sequence[tuple[socket.AddressFamily, Any]]:
        """(family, socket address) of ``host``, all of them vetted, in the resolver's order.

        Raises:
            FetchError: ``dns_failure``, ``forbidden_address``, ``forbidden_port``, ``bad_url``.
        """
        answers = literal_address(host, port) or self._resolve(host, port)
        if (host.lower(), port) not in self.allowed:
            # All of them, not just the first: a name with one public and one private address is
            # how a check of "the" address is gone around.
            if not all(is_public(str(sockaddr[0])) for _, sockaddr in answers):
                raise FetchError("forbidden_address")
            if port not in DEFAULT_PORTS:
                raise FetchError("forbidden_port")
        return answers[:MAX_ADDRESSES_TRIED]

    def _resolve(self, host: str, port: int) -> Sequence[tuple[socket.AddressFamily, Any]]:
        """Ask the system's resolver, for as long as the deadline allows."""
        future = self._resolver.submit(
            socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
        try:
            answers = future.result(timeout=_deadline().remaining())
        except (socket.gaierror, TimeoutError) as error:
            future.cancel()
            raise FetchError("dns_failure") from error
        except (UnicodeError, ValueError, OverflowError) as error:
            raise FetchError("bad_url", "host") from error
        return [(family, sockaddr) for family, _, _, _, sockaddr in answers]

    def connect(self, host: str, port: int) -> socket.socket:
        """A connected socket to a vetted address of ``host``; the last address's error if none."""
        failure: OSError | None = None
        for family, sockaddr in self.addresses(host, port):
            sock = DeadlineSocket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            try:
                sock.settimeout(min(self.connect_timeout_seconds, _deadline().remaining()))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(sockaddr)
            except OSError as error:
                sock.close()
                failure = error
                continue
            # urllib3 shakes hands for TLS under this time-out.
            sock.settimeout(_deadline().remaining())
            return sock
        raise failure or OSError(errno.EADDRNOTAVAIL, "the name has no address")


def guarded_pool_manager(guard: AddressGuard, max_connections: int) -> urllib3.PoolManager:
    """urllib3's pools over guarded sockets; environment proxies play no part in them."""

    class PlainConnection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return guard.connect(self.host, self.port)

    class TLSConnection(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return guard.connect(self.host, self.port or 443)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = PlainConnection

    class TLSPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = TLSConnection

    context = ssl.create_default_context()
    context.sslsocket_class = DeadlineSSLSocket
    manager = urllib3.PoolManager(
        num_pools=2 * max_connections, maxsize=max_connections, ssl_context=context
    )
    manager.pool_classes_by_scheme = {"http": PlainPool, "https": TLSPool}
    return manager
