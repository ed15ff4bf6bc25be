"""Ingest as it is, with two seams used: names that no resolver knows, and a decoder with a flaw."""

import functools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from declip_ingest import download
from declip_ingest.decoder_pool import DecoderPool
from declip_ingest.stages import DownloadShards
from declip_shards import TaskStats

TEST_DOMAIN = ".chaos.test"
HANG_SECONDS = 6.0
"""Of a look-up that does not return; longer than any time-out here, for nothing can end it."""
UNROUTED = "4000::1"
"""Public by its form, and of a block that nobody has been given."""
ANSWERS = {
    "inside": ("127.0.0.1",),
    "both": (UNROUTED, "127.0.0.1"),
}
"""First word of a name -> its addresses."""

_system_getaddrinfo = socket.getaddrinfo
_asked: Counter[str] = Counter()
_never = threading.Event()


def resolve(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
    """``socket.getaddrinfo`` that knows the names of TEST_DOMAIN."""
    name = host.decode() if isinstance(host, bytes) else str(host)
    if not name.rstrip(".").endswith(TEST_DOMAIN):
        return _system_getaddrinfo(host, port, *rest, **named)
    label = name.partition("-")[0]
    _asked[name] += 1
    if label == "again":
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    if label == "hang":
        _never.wait(HANG_SECONDS)
    if label == "rebinding":
        # A server of names that answers the check and the connection differently.
        addresses: Sequence[str] = (UNROUTED if _asked[name] == 1 else "127.0.0.1",)
    else:
        addresses = ANSWERS.get(label, ())
    if not addresses:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port or 0, 0, 0))
        if ":" in address
        else (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port or 0))
        for address in addresses
    ]


def install() -> Callable[[], None]:
    """Put both seams in; returns what takes them out."""
    socket.getaddrinfo = resolve
    flawed = functools.partial(DecoderPool, normalizer="chaos_killer:KillerNormalizer")
    setattr(download, "DecoderPool", flawed)  # noqa: B010 - mypy holds classes for constants

    def remove() -> None:
        socket.getaddrinfo = _system_getaddrinfo
        setattr(download, "DecoderPool", DecoderPool)  # noqa: B010

    return remove


@dataclass(frozen=True, kw_only=True)
class ChaosDownload(DownloadShards):
    """The real stage, in a process that has the seams."""

    def worker(self) -> Callable[[str], TaskStats]:
        install()
        return super().worker()
