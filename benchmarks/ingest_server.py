"""A loopback web server that costs as little as Python can: pictures in memory, prebuilt headers.

    python benchmarks/ingest_server.py FOLDER

serves the JPEGs of FOLDER, in the order of their names, until its standard input ends. The first
line that it prints is ``{"port": N}``. ``/p/NUMBER.jpg`` is picture NUMBER modulo how many there
are, with NUMBER in a comment segment, so that every URL has bytes of its own as on the web;
``/stats`` is what it did so far and the processor time that took; all else, ``/robots.txt``
included, is 404. It listens at HOSTS addresses of 127.0.0.0/8, since a list has many hosts.
"""

import asyncio
import contextlib
import json
import re
import resource
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

HOSTS = tuple(f"127.0.0.{number}" for number in range(1, 33))
"""Addresses that it listens at, all on one port."""
_PICTURE = re.compile(rb"/p/(\d{1,9})\.jpg$")
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
_SOI = b"\xff\xd8"
_COMMENT = b"\xff\xfe\x00\x0b"
"""A comment segment of nine digits."""
_BIND_ATTEMPTS = 20


class Pictures:
    """The answers, made of parts that stay as they are."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.jpg"))
        if not files:
            raise SystemExit(f"{str(folder)!r} holds no .jpg: there is nothing to serve.")
        self.parts = []
        for file in files:
            data = file.read_bytes()
            length = len(data) + len(_COMMENT) + 9
            self.parts.append((_HEAD % length + _SOI + _COMMENT, data[len(_SOI) :]))
        self.connections = self.requests = self.num_bytes = 0

    def answer(self, path: bytes) -> bytes:
        """The whole answer to a GET of ``path``."""
        self.requests += 1
        if match := _PICTURE.match(path):
            start, rest = self.parts[int(match[1]) % len(self.parts)]
            data = b"".join((start, match[1].zfill(9), rest))
            self.num_bytes += len(data)
            return data
        if path == b"/stats":
            used = resource.getrusage(resource.RUSAGE_SELF)
            body = json.dumps(
                {
                    "cpu_seconds": used.ru_utime + used.ru_stime,
                    "connections": self.connections,
                    "requests": self.requests,
                    "bytes": self.num_bytes,
                }
            ).encode()
            return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One client, kept alive unless it asks to close."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.pictures.connections += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head, self.buffer = self.buffer[:end], self.buffer[end + 4 :]
            self.transport.write(self.pictures.answer(head.split(b" ", 2)[1]))
            if b"\r\nconnection: close" in head.lower():
                self.transport.close()
                return


def _bind_all() -> list[socket.socket]:
    """A listening socket at every address of HOSTS, all of one port that is free at each."""
    for _ in range(_BIND_ATTEMPTS):
        with contextlib.ExitStack() as stack:
            port, sockets = 0, []
            for host in HOSTS:
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind((host, port))
                except OSError:
                    break
                port = sock.getsockname()[1]
                sockets.append(sock)
            else:
                stack.pop_all()
                return sockets
    raise SystemExit("no port is free at all the loopback addresses that the server listens at.")


async def serve(folder: Path) -> None:
    """Serve until standard input ends: the parent's end is ours too."""
    loop = asyncio.get_running_loop()
    pictures = Pictures(folder)
    sockets = _bind_all()
    servers = [
        await loop.create_server(lambda: Connection(pictures), sock=sock, backlog=1024)
        for sock in sockets
    ]
    print(json.dumps({"port": sockets[0].getsockname()[1]}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for server in servers:
        server.close()


class PictureServer:
    """The server in a process of its own, from outside."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of all of its addresses."""
        return tuple(f"{host}:{self.port}" for host in HOSTS)

    def url(self, number: int) -> str:
        """Where picture ``number`` is; neighbors are of different hosts."""
        return f"http://{HOSTS[number % len(HOSTS)]}:{self.port}/p/{number:09d}.jpg"

    def stats(self) -> dict[str, Any]:
        """``cpu_seconds``, ``connections``, ``requests`` and ``bytes`` since its start."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}/stats", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@contextlib.contextmanager
def running(folder: Path) -> Iterator[PictureServer]:
    """Start the server on ``folder``; it ends with the block."""
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the picture server did not start; its message stands above.")
        yield PictureServer(json.loads(line)["port"])
        process.stdin.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
