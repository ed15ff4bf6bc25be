"""Webdataset tars as others make them, and a server for them, for the trainer's tests."""

import contextlib
import http.server
import io
import tarfile
import threading
import urllib.parse
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number, size=(24, 20)):
    """A JPEG of ``size`` (width, height), another for each number."""
    sink = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def write_tar(path, members):
    """Write (name, bytes) pairs in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_pairs(path, keys, first=0):
    """A tar of pairs; returns (picture, caption) by key."""
    pairs = {key: (picture(first + n), f"caption of {key}") for n, key in enumerate(keys)}
    members = []
    for key, (image, caption) in pairs.items():
        members += [(f"{key}.jpg", image), (f"{key}.txt", caption.encode())]
    write_tar(path, members)
    return pairs


class _Server(http.server.ThreadingHTTPServer):
    folder: Path
    asked: list[tuple[str, int]]
    faults: dict[str, int]
    lists: bool


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files with ranges and tags; whole answers are counted apart from ranges."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        server = self.server
        assert isinstance(server, _Server)
        path = server.folder / urllib.parse.unquote(self.path).strip("/")
        if path.is_dir() and server.lists:
            links = (f"{p.name}/" if p.is_dir() else p.name for p in sorted(path.iterdir()))
            data = "".join(f'<a href="{link}">{link}</a>' for link in links).encode()
        elif path.is_file():
            data = path.read_bytes()
        else:
            self.send_error(404)
            return
        asked_for = path.name if body else f"HEAD {path.name}"
        if server.faults.get(asked_for, 0):
            server.faults[asked_for] -= 1
            self.send_error(503)
            return
        asked = self.headers.get("Range")
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data) - 1), len(data) - 1)
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(data)}")
            data = data[int(first) : end + 1]
        if body:
            server.asked.append((path.name, len(data)))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def served(folder, *, lists=False):
    """A server of ``folder`` on loopback: its address, and the server with ``asked``, a list of
    (name, bytes), and ``faults``, how many times a name (or ``HEAD name``) is answered by an
    error. ``lists``: whether it has index pages of folders."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.folder, server.asked, server.faults, server.lists = folder, [], {}, lists
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
