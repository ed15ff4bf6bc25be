"""The demo's web server: serves a folder on loopback, and fails on purpose where asked to.

    python -m pipelines.demo_server FOLDER --port N

serves FOLDER until interrupted. ``/fail/KIND/N`` answers wrongly, in one of FAILURE_KINDS' ways.
"""

import argparse
import contextlib
import functools
import io
import logging
import mimetypes
import signal
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

from PIL import Image

from declip_shards.errors import DeclipError, did_you_mean
from declip_shards.store import TEMPORARY_MARK

_LOG = logging.getLogger(__name__)

FAILURE_KINDS = (
    "not_found",
    "gone",
    "server_error",
    "timeout",
    "slow_body",
    "truncated_body",
    "truncated_image",
    "html_as_image",
    "empty_body",
    "redirect_loop",
    "redirect_private",
    "connection_refused",
    "bad_scheme",
    "decompression_bomb",
)
"""What a URL of the demo can be made to do wrong, as the ``expected_status`` column names it.

``connection_refused`` is the port after the server's, which it keeps closed; ``bad_scheme`` is a
``file:`` URL; the others are routes of the server."""
MAX_PORT = 65534
"""The port after the server's must exist too."""
_HANG_SECONDS = 600.0
_SLOW_BYTE_SECONDS = 0.5
_IDLE_CONNECTION_SECONDS = 30.0
_BOMB_SIDE_PIXELS = 65_500
_PRIVATE_URL = "http://169.254.169.254/latest/meta-data/"  # what a cloud's machines must not tell
_CONTENT_TYPES = {".webp": "image/webp", ".parquet": "application/vnd.apache.parquet"}


class DemoServer:
    """Serves the files of ``folder``, read-only, from a background thread.

    A context manager; ``port`` 0 takes a free one, and ``.port`` and ``.url`` say which. Closing
    takes less than two seconds, however many requests hang. Raises DeclipError where the folder
    is missing or the port (or the next, which must refuse connections) is taken.
    """

    def __init__(self, folder: Path, port: int, host: str = "127.0.0.1") -> None:
        if not 0 <= port <= MAX_PORT:
            raise DeclipError(
                f"port {port} is not between 0 and {MAX_PORT}; choose another with --prepare.port."
            )
        if not folder.is_dir():
            raise DeclipError(f"{str(folder)!r} is not a folder, so there is nothing to serve.")
        self.folder = folder.resolve()
        self.host = host
        self.port = port
        self._server: _Server | None = None
        self._closed_port: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """``http://HOST:PORT``, without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Bind the port and begin to answer."""
        try:
            server = _Server((self.host, self.port), self.folder)
        except OSError as error:
            raise _port_error(self.host, self.port, error) from error
        if self.port:
            try:
                self._closed_port = _hold_closed(self.host, self.port + 1)
            except OSError as error:
                server.server_close()
                raise _port_error(self.host, self.port + 1, error) from error
        self.port = server.server_address[1]
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Answer no more, and hang up on everyone who still waits. Twice is once."""
        if self._server is None or self._thread is None:
            return
        self._server.hang_up()
        self._thread.join(timeout=2)
        if self._closed_port is not None:
            self._closed_port.close()
        self._server = self._thread = self._closed_port = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _port_error(host: str, port: int, error: OSError) -> DeclipError:
    return DeclipError(
        f"the demo's server cannot have port {port} on {host} ({error.strerror or error}); "
        "stop what uses it, or choose another with --prepare.port."
    )


def _hold_closed(host: str, port: int) -> socket.socket:
    # Bound but not listening: connections are refused, and nobody else can begin to answer here.
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256  # an ingest opens many connections at once

    def __init__(self, address: tuple[str, int], folder: Path) -> None:
        self.folder = folder
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def track(self, connection: socket.socket, *, is_open: bool) -> None:
        """Remember an open connection, or forget a closed one."""
        with self._lock:
            (self._connections.add if is_open else self._connections.discard)(connection)

    def hang_up(self) -> None:
        """Stop accepting, wake the handlers that hang, and cut what is still connected."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves early is no fault of ours: one line, no traceback."""
        _LOG.debug("connection of %s ended: %s", client_address, sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"  # keep-alive: every answer says its length or closes
    server_version = "opendeclip-demo"
    sys_version = ""
    timeout = _IDLE_CONNECTION_SECONDS
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.track(self.connection, is_open=True)

    def finish(self) -> None:
        self.server.track(self.connection, is_open=False)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        _LOG.debug("%s %s", self.address_string(), format % args)

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).split("/")[1:]
        if parts[0] == "fail":
            self._fail(parts[1:])
        else:
            self._send_file(parts)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_file(self, parts: Sequence[str]) -> None:
        path = _find_file(self.server.folder, parts)
        if path is None:
            self._send(b"no such file\n", "text/plain", HTTPStatus.NOT_FOUND)
            return
        kind = _CONTENT_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
        self._send(path.read_bytes(), kind or "application/octet-stream")

    def _send(
        self,
        body: bytes,
        content_type: str,
        status: HTTPStatus = HTTPStatus.OK,
        *,
        content_length: int | None = None,
        location: str | None = None,
    ) -> None:
        length = len(body) if content_length is None else content_length
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        if location is not None:
            self.send_header("Location", location)
        if length != len(body):
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, parts: Sequence[str]) -> None:
        kind = parts[0] if parts else ""
        action = _FAILURES.get(kind)
        if action is None:
            hint = did_you_mean(kind, _FAILURES)
            text = f"no failure named {kind!r}.{hint}\n"
            self._send(text.encode(), "text/plain", HTTPStatus.BAD_REQUEST)
            return
        serial = parts[1] if len(parts) > 1 else "0"
        action(self, int(serial) if serial.isdecimal() else 0)

    def hang(self, _number: int) -> None:
        """Take the request and never answer."""
        self.server.stopping.wait(_HANG_SECONDS)
        self.close_connection = True

    def send_slowly(self, number: int) -> None:
        """A good image, two bytes a second."""
        body = _sample_jpeg(number)
        self._send(b"", "image/jpeg", content_length=len(body))
        for start in range(len(body)):
            if self.server.stopping.wait(_SLOW_BYTE_SECONDS):
                break
            self.wfile.write(body[start : start + 1])
        self.close_connection = True

    def send_short(self, number: int) -> None:
        """Half of the body that the header promises."""
        body = _sample_jpeg(number)
        self._send(body[: len(body) // 2], "image/jpeg", content_length=len(body))
        self.close_connection = True

    def send_half_image(self, number: int) -> None:
        """Half of an image, with the length of the half."""
        body = _sample_jpeg(number)
        self._send(body[: len(body) // 2], "image/jpeg")

    def send_html(self, _number: int) -> None:
        """A web page that says it is a picture, as many hosts do instead of a 404."""
        page = b"<!DOCTYPE html><html><body><p>This picture is no longer here.</p></body></html>\n"
        self._send(page, "image/jpeg")

    def send_bomb(self, _number: int) -> None:
        """A few hundred bytes whose header asks for 4.3 billion pixels."""
        self._send(_bomb_png(), "image/png")

    def redirect_to_itself(self, _number: int) -> None:
        """Redirect to the very same URL, for ever."""
        self._send(b"", "text/plain", HTTPStatus.FOUND, location=self.path)

    def redirect_inside(self, _number: int) -> None:
        """Redirect to an address that a downloader must not visit."""
        self._send(b"", "text/plain", HTTPStatus.FOUND, location=_PRIVATE_URL)

    def send_nothing(self, _number: int) -> None:
        """Success, and no bytes."""
        self._send(b"", "image/jpeg")

    def send_status(self, status: HTTPStatus) -> None:
        """An error status with a short text."""
        self._send(f"{status.phrase}\n".encode(), "text/plain", status)


def _status(status: HTTPStatus) -> Callable[[_Handler, int], None]:
    return lambda handler, _number: handler.send_status(status)


_FAILURES: dict[str, Callable[[_Handler, int], None]] = {
    "not_found": _status(HTTPStatus.NOT_FOUND),
    "gone": _status(HTTPStatus.GONE),
    "server_error": _status(HTTPStatus.INTERNAL_SERVER_ERROR),
    "timeout": _Handler.hang,
    "slow_body": _Handler.send_slowly,
    "truncated_body": _Handler.send_short,
    "truncated_image": _Handler.send_half_image,
    "html_as_image": _Handler.send_html,
    "empty_body": _Handler.send_nothing,
    "redirect_loop": _Handler.redirect_to_itself,
    "redirect_private": _Handler.redirect_inside,
    "decompression_bomb": _Handler.send_bomb,
}


def _find_file(folder: Path, parts: Sequence[str]) -> Path | None:
    """The file that a URL's parts name; None where there is none, or it lies outside."""
    if any(p in ("", ".", "..") or "\\" in p or "\0" in p or TEMPORARY_MARK in p for p in parts):
        return None
    try:
        path = folder.joinpath(*parts).resolve()  # follows links, so that none leads outside
        return path if path.is_relative_to(folder) and path.is_file() else None
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _sample_jpeg(number: int) -> bytes:
    """A 128-pixel picture of a gradient, about 2 kB; the color changes with ``number``."""
    ramp = Image.linear_gradient("L").resize((128, 128))
    turned = ramp.rotate(90)
    shade = Image.new("L", (128, 128), (number * 53) % 256)
    out = io.BytesIO()
    Image.merge("RGB", (ramp, turned, shade)).save(out, "JPEG", quality=90)
    return out.getvalue()


@functools.lru_cache(maxsize=1)
def _bomb_png() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    # 8-bit gray; the pixel data is cut short, so nobody's memory is at stake but a careless one's.
    header = struct.pack(">IIBBBBB", _BOMB_SIDE_PIXELS, _BOMB_SIDE_PIXELS, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(_BOMB_SIDE_PIXELS + 1), 9)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", pixels),
            chunk(b"IEND", b""),
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a folder until interrupted. Exit status 0, or 1 with one sentence."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.demo_server", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to serve, read-only")
    parser.add_argument("--port", type=int, default=18571, help="TCP port; 0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    chosen = parser.parse_args(arguments)
    stopped = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    try:
        with DemoServer(chosen.folder, chosen.port, chosen.host) as server:
            print(f"serving {chosen.folder} at {server.url}; stop with Ctrl-C", flush=True)
            stopped.wait()
    except DeclipError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
