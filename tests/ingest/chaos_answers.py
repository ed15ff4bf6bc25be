"""What the chaos server answers: each behavior is a function of a request, named in its path."""

import asyncio
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from tests.ingest.chaos_server import Web

LONGEST_DELAY_SECONDS = 0.03
_WITHOUT_BODY = ("204", "304")
_BLOCK = bytes(1 << 16)
_TYPES = {"png": "image/png", "webp": "image/webp", "gif": "image/gif", "html": "text/html"}
_GZIP_BOMB = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xec\xc1\x01\x01" + bytes(1 << 15)


@dataclass(kw_only=True)
class Exchange:
    """One request and the means to answer it."""

    web: "Web"
    writer: asyncio.StreamWriter
    path: str
    host: str
    """As in the request's ``Host``."""

    @property
    def serial(self) -> int:
        """The number in the path's last part."""
        digits = "".join(c for c in self.path.rpartition("/")[2].partition(".")[0] if c.isdigit())
        return int(digits or 0)

    @property
    def arguments(self) -> list[str]:
        """Parts of the path between the behavior and the last."""
        return self.path.partition("?")[0].split("/")[2:-1]

    @property
    def picture(self) -> str:
        """Name of the body."""
        return self.arguments[0] if self.arguments else "jpeg"

    @property
    def body(self) -> bytes:
        """The file that the path asks for."""
        return self.web.bodies.body(self.picture, self.serial)

    @property
    def visit(self) -> int:
        """How often this URL was asked for, this time included."""
        return self.web.seen[f"{self.host}{self.path}"]

    async def send(self, data: bytes) -> None:
        """Bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def respond(
        self, body: bytes = b"", status: str = "200 OK", length: int | None = None, **headers: str
    ) -> bool:
        """A whole answer; the connection stays."""
        await self.send(head(status, len(body) if length is None else length, **headers) + body)
        return True

    def reset(self) -> bool:
        """Hang up with RST, so that nobody takes it for an end."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        return False

    async def hang(self) -> bool:
        """Say nothing."""
        await asyncio.sleep(self.web.hang_seconds)
        return False


def head(status: str, length: int | None, **headers: str) -> bytes:
    """Status line and headers; without ``length`` the end of the connection ends the body."""
    lines = [f"HTTP/1.1 {status}"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def good(exchange: Exchange) -> bool:
    """The picture, after a delay that another seed makes another."""
    if exchange.web.delays:
        dice = random.Random(f"{exchange.web.delays} {exchange.path}")
        await asyncio.sleep(dice.random() * LONGEST_DELAY_SECONDS)
    kind = _TYPES.get(exchange.picture, "image/jpeg")
    return await exchange.respond(exchange.body, Content_Type=kind)


async def typed(exchange: Exchange) -> bool:
    """The picture under another content type: ``/typed/BODY/MAJOR-MINOR/SERIAL``."""
    return await exchange.respond(
        exchange.body, Content_Type=exchange.arguments[1].replace("-", "/", 1)
    )


async def status(exchange: Exchange) -> bool:
    """``/status/CODE/SERIAL``, with a short text where the code lets there be one."""
    code = exchange.arguments[0]
    if code in _WITHOUT_BODY:
        await exchange.send(head(f"{code} No", None))
        return True
    return await exchange.respond(b"sorry\n", f"{code} No", Content_Type="text/plain")


async def pausing(exchange: Exchange) -> bool:
    """429 with Retry-After: ``/pausing/BODY/SECONDS/REFUSALS/SERIAL``; then the picture."""
    seconds, refusals = exchange.arguments[1:3]
    if exchange.visit <= int(refusals):
        return await exchange.respond(b"", "429 Too Many Requests", Retry_After=seconds)
    return await good(exchange)


async def failing_once(exchange: Exchange) -> bool:
    """503 the first time, then the picture."""
    if exchange.visit == 1:
        return await exchange.respond(b"", "503 Service Unavailable")
    return await good(exchange)


async def hanging(exchange: Exchange) -> bool:
    """Take the request and say nothing."""
    return await exchange.hang()


async def slow_headers(exchange: Exchange) -> bool:
    """A byte of the headers every so often, for ever."""
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await exchange.send(b"X")
        await asyncio.sleep(0.25)


async def slow_body(exchange: Exchange) -> bool:
    """A byte of the body every so often, for ever."""
    await exchange.send(head("200 OK", 100_000, Content_Type="image/jpeg") + b"\xff\xd8")
    while True:
        await exchange.send(b"\xff")
        await asyncio.sleep(0.25)


async def stalling(exchange: Exchange) -> bool:
    """Half the body, then nothing."""
    body = exchange.body
    await exchange.send(head("200 OK", len(body)) + body[: len(body) // 2])
    return await exchange.hang()


async def reset_at_once(exchange: Exchange) -> bool:
    """RST instead of an answer."""
    return exchange.reset()


async def reset_in_body(exchange: Exchange) -> bool:
    """RST in the middle of the body."""
    body = exchange.body
    await exchange.send(head("200 OK", len(body)) + body[: len(body) // 2])
    await asyncio.sleep(0.02)
    return exchange.reset()


async def closed_at_once(exchange: Exchange) -> bool:
    """An orderly end instead of an answer."""
    return False


async def closed_in_body(exchange: Exchange) -> bool:
    """An orderly end in the middle of the body."""
    body = exchange.body
    await exchange.send(head("200 OK", len(body)) + body[: len(body) // 2])
    return False


async def closing_after(exchange: Exchange) -> bool:
    """The whole picture, then the end of a connection that the client may hold for alive."""
    await exchange.respond(exchange.body)
    return False


async def length_too_small(exchange: Exchange) -> bool:
    """More bytes than announced."""
    body = exchange.body
    await exchange.send(head("200 OK", len(body) // 2) + body)
    return False


async def huge_length(exchange: Exchange) -> bool:
    """Five gigabytes announced."""
    await exchange.send(head("200 OK", 5_000_000_000) + _BLOCK)
    return False


async def endless(exchange: Exchange) -> bool:
    """A chunked body without end."""
    await exchange.send(head("200 OK", None, Transfer_Encoding="chunked"))
    chunk = b"%x\r\n%b\r\n" % (len(_BLOCK), _BLOCK)
    while True:
        exchange.web.counts["endless_bytes"] += len(_BLOCK)
        await exchange.send(chunk)


async def endless_plain(exchange: Exchange) -> bool:
    """A body without length and without end."""
    await exchange.send(head("200 OK", None))
    while True:
        await exchange.send(_BLOCK)


async def chunked(exchange: Exchange) -> bool:
    """The picture in chunks, as dynamic servers send it."""
    body = exchange.body
    await exchange.send(head("200 OK", None, Transfer_Encoding="chunked"))
    for start in range(0, len(body), 700):
        part = body[start : start + 700]
        await exchange.send(b"%x\r\n%b\r\n" % (len(part), part))
    await exchange.send(b"0\r\n\r\n")
    return True


async def chunked_cut(exchange: Exchange) -> bool:
    """Chunks that end before the last one."""
    body = exchange.body
    await exchange.send(head("200 OK", None, Transfer_Encoding="chunked"))
    await exchange.send(b"%x\r\n%b\r\n" % (len(body), body[: len(body) // 2]))
    return False


async def chunked_garbled(exchange: Exchange) -> bool:
    """Chunk sizes that are no numbers."""
    await exchange.send(head("200 OK", None, Transfer_Encoding="chunked") + b"zz\r\nwhat\r\n")
    return False


async def until_closed(exchange: Exchange) -> bool:
    """The picture without a length, as HTTP/1.0 sent it."""
    await exchange.send(head("200 OK", None, Connection="close") + exchange.body)
    return False


async def gzip_bomb(exchange: Exchange) -> bool:
    """Compressed though nobody asked."""
    return await exchange.respond(_GZIP_BOMB, Content_Encoding="gzip")


async def gzip_redirect(exchange: Exchange) -> bool:
    """A redirect with a compressed body, which nobody needs to read."""
    return await exchange.respond(
        _GZIP_BOMB, "302 Found", Content_Encoding="gzip", Location=_elsewhere(exchange)
    )


async def redirect(exchange: Exchange) -> bool:
    """``/redirect/BODY/CODE/HOPS/SERIAL``: so many redirects, then the picture."""
    picture, code, hops = exchange.arguments[:3]
    if int(hops) == 0:
        return await good(exchange)
    target = f"/redirect/{picture}/{code}/{int(hops) - 1}/{exchange.serial}.jpg"
    return await exchange.respond(b"", f"{code} Moved", Location=target)


async def redirect_to(exchange: Exchange) -> bool:
    """``/redirect_to/ESCAPED-URL/SERIAL``."""
    return await exchange.respond(b"", "302 Found", Location=unquote(exchange.arguments[0]))


async def redirect_nowhere(exchange: Exchange) -> bool:
    """A redirect without a target."""
    return await exchange.respond(b"", "302 Found")


async def redirect_loop(exchange: Exchange) -> bool:
    """A redirect to itself."""
    return await exchange.respond(b"", "302 Found", Location=exchange.path)


async def redirect_utf8(exchange: Exchange) -> bool:
    """A target in raw UTF-8, as many servers send it."""
    target = f"/good/jpeg/caf\u00e9-{exchange.serial}.jpg".encode()
    await exchange.send(b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\nLocation: " + target)
    await exchange.send(b"\r\n\r\n")
    return True


async def not_http(exchange: Exchange) -> bool:
    """Another protocol."""
    await exchange.send(b"220 chaos FTP server ready\r\n")
    return False


async def many_headers(exchange: Exchange) -> bool:
    """A megabyte of headers."""
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    for number in range(20_000):
        await exchange.send(b"X-%d: %b\r\n" % (number, b"x" * 50))
    return False


async def two_lengths(exchange: Exchange) -> bool:
    """Two lengths that contradict each other."""
    await exchange.send(head("200 OK", 10, content_length="4000") + exchange.body)
    return False


async def bad_length(exchange: Exchange) -> bool:
    """A length that is no number."""
    await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + exchange.body)
    return False


async def empty(exchange: Exchange) -> bool:
    """Success, and no bytes."""
    return await exchange.respond(b"", Content_Type="image/jpeg")


async def tagged(exchange: Exchange) -> bool:
    """``/tagged/BODY/ESCAPED-DIRECTIVES/SERIAL``: the picture with an X-Robots-Tag."""
    return await exchange.respond(exchange.body, X_Robots_Tag=unquote(exchange.arguments[1]))


def _elsewhere(exchange: Exchange) -> str:
    return f"/good/{exchange.picture}/{exchange.serial}.jpg"


Answer = Callable[[Exchange], Awaitable[bool]]
ANSWERS: dict[str, Answer] = {
    answer.__name__: answer
    for answer in (
        good, typed, status, pausing, failing_once, hanging, slow_headers, slow_body, stalling,
        reset_at_once, reset_in_body, closed_at_once, closed_in_body, closing_after,
        length_too_small, huge_length, endless, endless_plain, chunked, chunked_cut,
        chunked_garbled, until_closed, gzip_bomb, gzip_redirect, redirect, redirect_to,
        redirect_nowhere, redirect_loop, redirect_utf8, not_http, many_headers, two_lengths,
        bad_length, empty, tagged,
    )
}  # fmt: skip
"""Behavior, as paths name it -> the function that answers."""
_ROBOTS = {
    "11": b"User-agent: *\nDisallow: /\n",
    "12": b"User-agent: opendeclip\nDisallow: /good/\n\nUser-agent: *\nDisallow:\n",
    "16": b"# long\n" * 200_000 + b"User-agent: *\nDisallow: /\n",
    "17": b"<!doctype html><html>Not found, but with status 200</html>",
}


async def robots_answer(exchange: Exchange) -> bool:
    """Each group of hosts has a robots.txt of its own kind; most have none."""
    group = exchange.host.split(".")[2] if exchange.host.count(".") == 3 else ""
    if group in _ROBOTS:
        return await exchange.respond(_ROBOTS[group], Content_Type="text/plain")
    if group == "13":
        return await exchange.respond(b"", "500 Internal Server Error")
    if group == "14":
        return await exchange.hang()
    if group == "15":
        return exchange.reset()
    return await exchange.respond(b"", "404 Not Found")
