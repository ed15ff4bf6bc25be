"""What a decoder pool's children build in the tests: a normalizer that some bytes bring down."""

import ctypes
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable

from declip_ingest import decoder_child
from declip_ingest.decode import ImageNormalizer
from declip_ingest.image_policy import DecodedImage, ImagePolicy

Boxes = list[tuple[float, float, float, float]]


def _crash() -> None:
    ctypes.string_at(0)


def _spin() -> None:
    while True:
        pass


def _sleep() -> None:
    time.sleep(3600)


def _hog() -> None:
    hoard = []
    while True:
        hoard.append(bytearray(1 << 24))


def _exit() -> None:
    os._exit(0)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stumble() -> None:
    raise RuntimeError("a fault of ours")


def _say(kind: int, body: bytes, size: int | None = None) -> None:
    """Write a reply in the decoder's place, and hang."""
    head = decoder_child.REPLY.pack(kind, len(body) if size is None else size)
    os.write(decoder_child.SOCKET_FD, head + body)
    _sleep()


_TOO_LONG = decoder_child.PICTURE.pack(0xFFFFFFFF, 1, 1, 1, 1, bytes(32))

FAULTS: dict[bytes, Callable[[], None]] = {
    b"CRASH": _crash,
    b"ABORT": os.abort,
    b"SPIN": _spin,
    b"SLEEP": _sleep,
    b"HOG": _hog,
    b"EXIT": _exit,
    b"KILL": _kill,
    b"STUMBLE": _stumble,
    b"BABBLE": lambda: _say(77, b"babble"),
    b"BOAST": lambda: _say(decoder_child.DONE, b"", size=0xFFFFFFFF),
    b"OVERREACH": lambda: _say(decoder_child.STORED, _TOO_LONG),
    b"MUMBLE": lambda: _say(decoder_child.DONE, b"short"),
    b"INVENT": lambda: _say(decoder_child.FAILED, b"no_such_reason\0"),
    b"GARBLE": lambda: _say(decoder_child.FAILED, b"\xff\xfe"),
}


class FaultyNormalizer:
    """Does as the bytes say; a real picture it decodes."""

    def __init__(self, policy: ImagePolicy) -> None:
        self.normalize = ImageNormalizer(policy)

    def __call__(self, data: bytes, boxes: Boxes) -> DecodedImage:
        for name, fault in FAULTS.items():
            if data.startswith(name):
                fault()
        return self.normalize(data, boxes)


class Prisoner(FaultyNormalizer):
    """Tries what a decoder must not be able to do, and answers what happened, as a size."""

    def __call__(self, data: bytes, boxes: Boxes) -> DecodedImage:
        if not data.startswith(b"TRY"):
            return super().__call__(data, boxes)
        escapes = 0
        for attempt in (
            lambda: socket.socket(),
            lambda: socket.socket(socket.AF_UNIX),
            lambda: open("/tmp/declip-escape", "w"),  # noqa: SIM115
            lambda: open("/etc/hostname"),  # noqa: SIM115
            lambda: os.pipe(),
            lambda: os.dup(0),
            lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR),
        ):
            try:
                attempt()
                escapes += 1
            except OSError:
                pass
        heavy = {"torch", "ray", "pandas", "img2dataset", "albumentations"} & set(sys.modules)
        secrets = [name for name in os.environ if "SECRET" in name or "AWS" in name]
        return DecodedImage(
            image=b"",
            width=escapes,
            height=len(heavy),
            original_width=len(secrets),
            original_height=resource.getrlimit(resource.RLIMIT_CORE)[1],
            sha256="00" * 32,
        )


class DoesNotStart:
    """Fails while it is built."""

    def __init__(self, policy: ImagePolicy) -> None:
        raise RuntimeError("no codec here")
