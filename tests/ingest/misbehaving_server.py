"""A loopback server that misbehaves in every way the web does, and pictures to serve."""

import io
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image

Answer = Callable[[socket.socket], None]


def encode(kind: str = "JPEG", size: tuple[int, int] = (80, 60), seed: int = 0, **options) -> bytes:
    """A noisy RGB picture of ``size`` (width, height) in pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def response(
    body: bytes = b"", status: str = "200 OK", length: int | None = None, **headers: str
) -> bytes:
    """A whole HTTP answer; ``length`` lies about the body's."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class MisbehavingServer(socketserver.ThreadingTCPServer):
    """Answers each path as told; counts the requests; keeps connections alive as HTTP/1.1 does."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.routes: dict[str, bytes | Answer] = {}
        self.hits: Counter[str] = Counter()
        self.connections = 0
        self.requests: list[str] = []
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"

    def add(self, path: str, answer: bytes | Answer) -> str:
        """Serve ``answer`` at ``path``; its URL."""
        self.routes[path] = answer
        return self.url(path)

    def hang(self, conn: socket.socket) -> None:
        """Never answer."""
        self.stopping.wait(30)

    def drip(self, start: bytes, seconds: float) -> Answer:
        """Send ``start``, then a byte every ``seconds`` for ever."""

        def answer(conn: socket.socket) -> None:
            conn.sendall(start)
            while not self.stopping.wait(seconds):
                conn.sendall(b"\xff")

        return answer


class _Handler(socketserver.BaseRequestHandler):
    server: MisbehavingServer

    def handle(self) -> None:
        server = self.server
        with server.lock:
            server.connections += 1
        data = b""
        try:
            while not server.stopping.is_set():
                while b"\r\n\r\n" not in data:
                    block = self.request.recv(65536)
                    if not block:
                        return
                    data += block
                head, _, data = data.partition(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                with server.lock:
                    server.hits[path] += 1
                    server.requests.append(head.decode("latin-1"))
                answer = server.routes.get(path, response(status="404 Not Found"))
                if callable(answer):
                    answer(self.request)
                    return
                self.request.sendall(answer)
        except OSError:
            return  # the client hung up, as it should on much of this
