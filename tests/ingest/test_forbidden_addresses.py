"""No form of a forbidden address reaches a server on this machine: 0 connections for all of them.

The canary listens on loopback. Its port is let through here, so that nothing but the judgment of
the address stands between a URL and the canary; with that judgment switched off, the same URLs
reach it.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import pytest

from declip_ingest import guard
from declip_ingest.failures import FETCH_REASONS
from declip_ingest.fetch import Fetched, Fetcher, FetchPolicy

PUBLIC = "127.0.0.3"
"""Stands in for a public address: the tests reach no other machine."""
IPV4 = """
0.0.0.0 0.0.0.1 0.255.255.255 10.0.0.0 10.0.0.1 10.1.2.3 10.255.255.255 100.64.0.0 100.64.0.1
100.100.100.200 100.127.255.255 127.0.0.0 127.0.0.1 127.0.0.2 127.1.2.3 127.255.255.255
169.254.0.0 169.254.169.254 169.254.170.2 169.254.255.255 172.16.0.0 172.16.0.1 172.20.1.1
172.31.255.255 192.0.0.0 192.0.0.1 192.0.0.8 192.0.0.170 192.0.0.192 192.0.2.0 192.0.2.1
192.0.2.255 192.88.99.1 192.168.0.0 192.168.0.1 192.168.1.1 192.168.255.255 198.18.0.0 198.18.0.1
198.19.255.255 198.51.100.0 198.51.100.7 203.0.113.0 203.0.113.9 224.0.0.0 224.0.0.1 224.0.0.251
232.1.2.3 239.255.255.250 240.0.0.0 240.0.0.1 250.1.1.1 255.255.255.254 255.255.255.255
168.63.129.16
"""
IPV6 = """
:: ::1 ::2 100::1 1::1 0:0:0:0:0:0:0:1 0000:0000:0000:0000:0000:0000:0000:0001 64:ff9b:1::1
2001::1 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2001:db8:ffff::1 3fff::1 3ffe::1 4000::1
5f00::1 8000::1 c000::1 fc00::1 fd00::1 fd00:ec2::254 fd12:3456:789a::1 fdff::ffff fe00::1
fe80::1 fe80::a9fe:a9fe febf::1 fec0::1 feff::1 ff00::1 ff01::1 ff02::1 ff02::fb ff05::1:3
ff0e::1 ffff::1
"""
TARGETS = ["127.0.0.1", "127.0.0.2", "10.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0"]
"""Written in every notation there is."""
ON_THIS_MACHINE = {"127.0.0.1", "127.0.0.2", PUBLIC, "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"}


@dataclass(frozen=True)
class Form:
    url: str
    reason: str


def numbers(address: str) -> Iterator[str]:
    """The notations of ``inet_aton``: parts joined, in base 8, 10 and 16, with leading zeros."""
    a, b, c, d = (int(part) for part in address.split("."))
    whole, last3, last2 = a << 24 | b << 16 | c << 8 | d, b << 16 | c << 8 | d, c << 8 | d
    for parts in ([whole], [a, last3], [a, b, last2], [a, b, c, d]):
        for form in ("{}", "0x{:x}", "0X{:X}", "0{:o}", "0x{:08x}", "000{:o}"):
            yield ".".join(form.format(part) for part in parts)
    yield f"0x{a:x}.0{b:o}.{last2}"
    yield f"{a}.0x{last3:x}"
    yield f"{address}."
    yield f"0{a:o}.{b}.{c}.{d}."


def letters(address: str) -> Iterator[str]:
    """Dots and digits of other scripts, which IDNA turns into plain ones."""
    for dot in "。．｡":
        yield address.replace(".", dot)
    yield "".join(chr(0xFF10 + int(c)) if c.isdigit() else c for c in address)
    yield "".join(chr(0xFF10 + int(c)) if c.isdigit() else "。" for c in address)
    yield "".join(chr(0x2460 + int(c) - 1) if c in "123456789" else c for c in address)
    yield "".join(chr(0x1D7CE + int(c)) if c.isdigit() else c for c in address)


def embedded(address: str) -> Iterator[str]:
    """IPv6 addresses that lead to an IPv4 one."""
    ip = ipaddress.IPv4Address(address)
    high, low = int(ip) >> 16, int(ip) & 0xFFFF
    yield f"::ffff:{address}"
    yield f"::ffff:{high:x}:{low:x}"
    yield f"0:0:0:0:0:FFFF:{high:X}:{low:X}"
    yield f"::{address}"
    yield f"::ffff:0:{address}"
    yield f"64:ff9b::{address}"
    yield f"64:ff9b:1::{address}"
    yield f"2002:{high:x}:{low:x}::1"
    yield f"2001:0:4136:e378:8000:63bf:{high ^ 0xFFFF:x}:{low ^ 0xFFFF:x}"
    yield f"2001:0:{high:x}:{low:x}:8000::1"
    yield f"fe80::5efe:{address}"


def hosts() -> Iterator[str]:
    """Hosts as URLs write them, all of them forbidden addresses."""
    yield from IPV4.split()
    yield from (f"[{address}]" for address in IPV6.split())
    for target in TARGETS:
        yield from numbers(target)
        yield from letters(target)
        yield from (f"[{address}]" for address in embedded(target))
    yield from ("[fe80::1%25eth0]", "[fe80::1%eth0]", "[::1%25lo]", "[::1%251]", "[fe80::1%251]")


NAMES = {
    "localhost": ["127.0.0.1"],
    "app.localhost": ["127.0.0.1"],
    "ip6-localhost": ["::1"],
    "private.example": ["127.0.0.1"],
    "v6.example": ["::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "lan.example": ["192.168.1.1"],
    "unique.example": ["fd00::1"],
    "link.example": ["fe80::1%1"],
    "zero.example": ["0.0.0.0"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "public-then-private.example": [PUBLIC, "127.0.0.1"],
    "private-then-public.example": ["127.0.0.1", PUBLIC],
    "public-and-v6.example": [PUBLIC, "::1"],
    "many.example": [*[PUBLIC] * 7, "127.0.0.2"],
    "bücher.example": ["127.0.0.1"],
}


def direct_forms(port: int) -> Iterator[Form]:
    for host in hosts():
        yield Form(f"http://{host}:{port}/a.jpg", "forbidden_address")
    for name in NAMES:
        yield Form(f"http://{name}:{port}/a.jpg", "forbidden_address")
        yield Form(f"http://{name.upper()}.:{port}/a.jpg", "forbidden_address")
    yield Form(f"https://127.0.0.1:{port}/", "forbidden_address")
    yield Form(f"https://localhost:{port}/", "forbidden_address")
    yield Form(f" http://127.0.0.1:{port}/ ", "forbidden_address")
    yield Form(f"HTTP://127.0.0.1:{port}/?q#f", "forbidden_address")
    for text in (
        f"http://user@127.0.0.1:{port}/",
        f"http://user:secret@127.0.0.1:{port}/",
        f"http://@127.0.0.1:{port}/",
        f"http://example.org@127.0.0.1:{port}/",
        f"http://example.org:80@127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}@example.org/",
        f"http://127.0.0.1:{port}\\@example.org/",
        f"http://example.org\\@127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}\\.example.org/",
        f"http://127.0.0.1%00.example.org:{port}/",
        f"http://%31%32%37.0.0.1:{port}/",
        f"http://127%2e0%2e0%2e1:{port}/",
        f"http://%6cocalhost:{port}/",
        f"http://127.0.0.1%20:{port}/",
        f"http://127.0.0.1 :{port}/",
        f"http://127.0.0.1\t:{port}/",
        f"http://127.0.0.1:{port}/\r\nHost: example.org",
        f"http://127.0.0.1..:{port}/",
        f"http://.127.0.0.1:{port}/",
        f"http://127..0.0.1:{port}/",
        f"http://1.2.3.4.127.0.0.1:{port}/",
        f"http://127.0.0.256:{port}/",
        f"http://127.0.0.08:{port}/",
        f"http://4294967296:{port}/",
        f"http://0x1ffffffff:{port}/",
        f"http://example.0x7f000001:{port}/",
        f"http://[127.0.0.1]:{port}/",
        f"http://[::1:{port}/",
        f"http://::1:{port}/",
        f"http://[v1.127.0.0.1]:{port}/",
        f"http://[::1].example.org:{port}/",
        f"http://[::ffff:127.0.0.256]:{port}/",
        f"http:127.0.0.1:{port}/",
        f"http:/127.0.0.1:{port}/",
        f"http:///127.0.0.1:{port}/",
        f"http:\\\\127.0.0.1:{port}\\",
        f"//127.0.0.1:{port}/",
        f"127.0.0.1:{port}/a.jpg",
        f"http://127.0.0.1:{port}0000/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:-80/",
        f"http://127.0.0.1:8o:{port}/",
    ):
        yield Form(text, "bad_url")
    for scheme in (
        *(
            "file",
            "ftp",
            "gopher",
            "dict",
            "ldap",
            "tftp",
            "ws",
            "wss",
            "jar",
            "data",
            "javascript",
        ),
        *("telnet", "smb", "ssh", "unix", "view-source", "http+unix", "netdoc", "php", "blob"),
    ):
        yield Form(f"{scheme}://127.0.0.1:{port}/", "bad_scheme")
    for odd in (1, 21, 22, 25, 53, 110, 6379, 8080, 8443, 9200, 11211, 27017, 65535):
        yield Form(f"http://{PUBLIC}:{odd}/", "forbidden_port")
        yield Form(f"https://public.example:{odd}/", "forbidden_port")


def all_forms(port: int, redirector: str) -> list[Form]:
    """Every form as it stands, and behind a redirect of a server that may be reached."""
    forms = list(dict.fromkeys(direct_forms(port)))
    as_redirects = [
        Form(
            f"http://{redirector}/?{quote(form.url, safe='')}",
            form.reason if form.reason.startswith("forbidden") else "bad_redirect",
        )
        for form in forms
        # Of a relative one, or one cut short on its way, the redirector itself is the target.
        if form.url.partition("://")[1] and form.url.isprintable() and form.url == form.url.strip()
        if form.url.isascii() and not form.url.startswith("http:///")
    ]
    return [*forms, *as_redirects]


class Canary:
    """Counts connections to loopback; its redirector may be reached and sends others here."""

    def __init__(self) -> None:
        self.connections: Counter[str] = Counter()
        self.port = 0
        self.redirector = ""
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> "Canary":
        first = await self._listen(self._count, "127.0.0.1", 0)
        self.port = first.sockets[0].getsockname()[1]
        await self._listen(self._count, "127.0.0.2", self.port)
        with contextlib.suppress(OSError):  # a machine without IPv6
            await self._listen(self._count, "::1", self.port)
        await self._listen(self._serve, PUBLIC, self.port)
        redirector = await self._listen(self._redirect, "127.0.0.1", 0)
        self.redirector = f"127.0.0.1:{redirector.sockets[0].getsockname()[1]}"
        return self

    async def _listen(self, serve: Callable[..., Any], host: str, port: int) -> asyncio.Server:
        server = await asyncio.start_server(serve, host, port)
        self._servers.append(server)
        return server

    async def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections[writer.get_extra_info("sockname")[0]] += 1
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The public stand-in: answers once a connection."""
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        writer.close()

    async def _redirect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                target = unquote(head.split(b" ", 2)[1].decode().partition("?")[2])
                answer = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
                writer.write(answer.encode())
        writer.close()

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()


def lookup(host: str) -> list[str]:
    """What a resolver says, without a network; it understands odd numbers as glibc's does."""
    if host == "public.example":
        return [PUBLIC]
    if host in NAMES or host.startswith("xn--"):
        return NAMES.get(host, ["127.0.0.1"])
    answers = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    return [str(sockaddr[0]) for *_, sockaddr in answers]


def run_corpus(monkeypatch: pytest.MonkeyPatch) -> tuple[Canary, list[Form], list[Fetched]]:
    async def run() -> tuple[Canary, list[Form], list[Fetched]]:
        async with Canary() as canary:
            monkeypatch.setattr(guard, "DEFAULT_PORTS", (80, 443, canary.port))
            policy = FetchPolicy(
                retries=0,
                robots="ignore",
                timeout_seconds=20,
                host_connections=64,
                allow_addresses=(canary.redirector,),
            )
            forms = all_forms(canary.port, canary.redirector)
            async with Fetcher(policy, lookup=lookup) as fetcher:
                fetched = await asyncio.gather(*(fetcher.fetch(form.url) for form in forms))
            return canary, forms, fetched

    return asyncio.run(run())


@pytest.fixture
def public_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = guard.is_public
    monkeypatch.setattr(guard, "is_public", lambda address: address == PUBLIC or judge(address))


@pytest.mark.usefixtures("public_stand_in")
def test_no_form_reaches_the_canary(monkeypatch):
    canary, forms, fetched = run_corpus(monkeypatch)
    assert len({form.url for form in forms}) == len(forms) >= 200
    wrong = [
        (form, outcome.failure)
        for form, outcome in zip(forms, fetched, strict=True)
        if outcome.failure is None or outcome.failure.reason != form.reason
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert {form.reason for form in forms} <= FETCH_REASONS.keys()
    assert canary.connections == {}


def test_with_the_guard_off_the_same_forms_reach_it(monkeypatch):
    """Else the test above would prove nothing."""
    open_socket = guard.AddressGuard.open_socket

    def stay_here(self: guard.AddressGuard, addr_info: Any) -> socket.socket:
        if addr_info[4][0] not in ON_THIS_MACHINE:
            raise OSError(errno.ENETUNREACH, "the tests stay on this machine")
        return open_socket(self, addr_info)

    monkeypatch.setattr(guard, "is_public", lambda address: True)
    monkeypatch.setattr(guard.AddressGuard, "open_socket", stay_here)
    canary, _, _ = run_corpus(monkeypatch)
    assert canary.connections["127.0.0.1"] >= 50
    assert canary.connections["127.0.0.2"] >= 20


@pytest.mark.usefixtures("public_stand_in")
@pytest.mark.parametrize("ttl_seconds", [300.0, 0.0])
def test_a_name_that_turns_private_is_refused_at_its_next_look_up(monkeypatch, ttl_seconds):
    """DNS rebinding: the address that was judged is the one that is connected to, each time."""
    asked = []

    def rebind(host: str) -> list[str]:
        asked.append(host)
        return [PUBLIC] if len(asked) == 1 else ["127.0.0.1"]

    async def run() -> tuple[Canary, list[Fetched]]:
        async with Canary() as canary:
            monkeypatch.setattr(guard, "DEFAULT_PORTS", (canary.port,))
            async with Fetcher(FetchPolicy(retries=0, robots="ignore"), lookup=rebind) as fetcher:
                fetcher.names.ttl_seconds = ttl_seconds
                url = f"http://rebind.example:{canary.port}/"
                # The stand-in closes each connection, so each fetch connects anew.
                return canary, [await fetcher.fetch(url) for _ in range(4)]

    canary, fetched = asyncio.run(run())
    outcomes = [f.failure.reason if f.failure else "fetched" for f in fetched]
    if ttl_seconds:
        assert (outcomes, len(asked)) == (["fetched"] * 4, 1)
    else:
        assert outcomes == ["fetched", *["forbidden_address"] * 3]
    assert canary.connections == {}


@pytest.mark.usefixtures("public_stand_in")
def test_robots_txt_is_no_way_around(monkeypatch):
    """A host that may not be reached is not asked for its robots.txt either."""

    async def run() -> Canary:
        async with Canary() as canary:
            monkeypatch.setattr(guard, "DEFAULT_PORTS", (canary.port,))
            policy = FetchPolicy(retries=0, allow_addresses=(canary.redirector,))
            async with Fetcher(policy, lookup=lookup) as fetcher:
                for host in ("127.0.0.1", "[::1]", "localhost", "public-then-private.example"):
                    fetched = await fetcher.fetch(f"http://{host}:{canary.port}/")
                    assert fetched.failure is not None
                    assert fetched.failure.message == "forbidden_address"
                    assert fetched.http_status is None
            return canary

    assert asyncio.run(run()).connections == {}
