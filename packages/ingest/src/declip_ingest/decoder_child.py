"""The process that decodes, and the frames it exchanges with the pool that started it.

Pictures lie in memory that both share (:mod:`declip_ingest.shared_slots`), or follow on the socket
where they are too large for it. It is told of one after another on the socket and answers each in
turn, so whoever holds the other end knows, when it dies or falls silent, that the oldest unanswered
picture is the suspect. Before the first one it gives up what a hostile file could want: new
descriptors (hence files and sockets), more memory than its share, core dumps, life beyond its
parent.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from declip_ingest.failures import DecodeError
from declip_ingest.image_policy import ImagePolicy
from declip_ingest.shared_slots import SharedSlots

REQUEST = struct.Struct("<BBII")
"""Slot of the picture and of the answer, whether the picture lies there or follows, its bytes, and
the number of boxes behind it."""
REPLY = struct.Struct("<BI")
"""Kind and bytes of the body."""
PICTURE = struct.Struct("<IIIII32s")
"""Bytes of the stored file, width, height, original width and height, sha256."""
BOX = struct.Struct("<4d")
READY, DONE, STORED, FAILED, BROKEN = range(5)
"""Kinds of reply: at work; a picture whose file follows; one whose file lies in its slot;
``reason NUL detail``; a traceback of a fault of ours."""

SOCKET_FD = 3
"""The child's end; standard input, output and error are all it has besides."""
SAMPLE_SIZE = 64
"""Pixels at most of the pictures stored before the first one, larger than what they are made of."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

Normalizer = Callable[[bytes, Sequence[tuple[float, float, float, float]]], Any]


def limit_process(memory_bytes: int, parent: int) -> None:
    """Give up what decoding does not need. Call after everything is imported.

    Args:
        memory_bytes: beyond what is in use now.
        parent: process id that must still be this one's parent.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It died before the line above.
        sys.exit(1)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Where the machine runs short, the decoder goes and not the worker that can retry.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as adjust:
        adjust.write("500")
    mapped, data = _pages_in_use()
    limits = {
        resource.RLIMIT_AS: mapped + memory_bytes,
        resource.RLIMIT_DATA: data + memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: SOCKET_FD + 1,
    }
    os.closerange(SOCKET_FD + 1, 1 << 16)
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _pages_in_use() -> tuple[int, int]:
    """Bytes of address space, and of data and stack."""
    with open("/proc/self/statm") as statm:
        pages = statm.read().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[5]) * resource.getpagesize()


def load_normalizer(place: str, policy: dict[str, Any]) -> Normalizer:
    """Build what turns bytes into a picture, and have it do so once.

    The first picture of each kind loads codecs and tables, which cannot be opened afterwards.

    Args:
        place: ``module:name`` of a callable that takes an ``ImagePolicy``.
        policy: its settings.
    """
    if policy["resizer"] == "img2dataset":
        # It silences the C libraries by opening /dev/null for each picture. Nothing can be opened
        # here, and standard output and error already lead there.
        warnings.simplefilter("ignore")
        theirs = importlib.import_module("img2dataset.resizer")
        vars(theirs)["SuppressStdoutStderr"] = contextlib.nullcontext
    module, _, name = place.partition(":")
    make: Callable[[ImagePolicy], Normalizer] = getattr(importlib.import_module(module), name)
    made = make(ImagePolicy(**policy))
    # The sample is stored small: blown up to the asked size and blurred, it could take minutes.
    small = min(policy["image_size"], SAMPLE_SIZE)
    warm = make(ImagePolicy(**{**policy, "image_size": small, "min_image_size": 0}))
    Image.init()
    for kind in policy["formats"]:
        sample = io.BytesIO()
        Image.new("RGB", (16, 16), (9, 99, 199)).save(sample, kind.upper())
        with contextlib.suppress(Exception):
            # Whatever is wrong is told for each picture: what this loaded is there all the same.
            warm(sample.getvalue(), ((0.1, 0.1, 0.9, 0.9),))
    return made


def serve(sock: socket.socket, slots: SharedSlots, normalize: Normalizer) -> None:
    """Answer pictures until the other end closes."""
    while True:
        head = _receive(sock, REQUEST.size)
        if head is None:
            return
        slot, is_shared, size, num_boxes = REQUEST.unpack(head)
        data = slots.get(slot, size) if is_shared else _receive(sock, size)
        packed = _receive(sock, num_boxes * BOX.size)
        if data is None or packed is None:
            return
        kind, body = _answer(normalize, data, list(BOX.iter_unpack(packed)))
        # Behind the last look at the picture, whose slot the answer takes over.
        if kind == DONE and slots.put(slot, body[1:]):
            kind, body = STORED, body[:1]
        _send(sock, kind, body)


def _answer(
    normalize: Normalizer, data: bytes, boxes: list[tuple[float, float, float, float]]
) -> tuple[int, list[bytes]]:
    try:
        made = normalize(data, boxes)
        size = (made.width, made.height, made.original_width, made.original_height)
        digest = bytes.fromhex(made.sha256)
        return DONE, [PICTURE.pack(len(made.image), *size, digest), made.image]
    except DecodeError as error:
        return FAILED, [f"{error.reason}\0{error.detail}".encode()]
    except MemoryError:
        return FAILED, [b"decoder_memory\0"]
    except Exception:
        return BROKEN, [traceback.format_exc().encode(errors="replace")]


def _receive(sock: socket.socket, size: int) -> bytes | None:
    """Exactly so many bytes, or None at the end."""
    if size == 0:
        return b""
    # One call mostly does it, without a copy; a signal may end it early.
    data = sock.recv(size, socket.MSG_WAITALL)
    while len(data) < size:
        more = sock.recv(size - len(data), socket.MSG_WAITALL)
        if not more:
            return None
        data += more
    return data


def _send(sock: socket.socket, kind: int, body: Sequence[bytes]) -> None:
    parts = [REPLY.pack(kind, sum(map(len, body))), *body]
    total = sum(map(len, parts))
    sent = sock.sendmsg(parts)
    if sent < total:
        sock.sendall(b"".join(parts)[sent:])


def main(options: str) -> None:
    """Entry of the child.

    Args:
        options: JSON: fd, slots (another descriptor), normalizer, policy, memory_bytes, parent.
    """
    asked = json.loads(options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before the socket takes its place, which may be this descriptor's.
    slots = SharedSlots(asked["slots"])
    if asked["fd"] != SOCKET_FD:
        os.dup2(asked["fd"], SOCKET_FD, inheritable=False)
        os.close(asked["fd"])
    sock = socket.socket(fileno=SOCKET_FD)
    try:
        normalize = load_normalizer(asked["normalizer"], asked["policy"])
        limit_process(asked["memory_bytes"], asked["parent"])
    except Exception:
        _send(sock, BROKEN, [traceback.format_exc().encode(errors="replace")])
        sys.exit(1)
    _send(sock, READY, [])
    with contextlib.suppress(ConnectionError):
        serve(sock, slots, normalize)
    # Without finalizers: the other end is closed or gone.
    os._exit(0)
