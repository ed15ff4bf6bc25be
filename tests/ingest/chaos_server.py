"""A web of trouble on loopback, in a process of its own: each path says how it is answered.

``http://127.0.GROUP.N:PORT/BEHAVIOR/BODY/SERIAL.jpg`` answers as BEHAVIOR of chaos_answers.py does,
with BODY of chaos_pictures.py. Besides the web there are listeners that speak TLS with bad
certificates, a port that refuses connections, and the canary: ports that nobody may ever reach,
which count who does.
"""

import asyncio
import contextlib
import json
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.ingest.chaos_answers import ANSWERS, Exchange, robots_answer
    from tests.ingest.chaos_certificates import TLS_KINDS, write_certificates
    from tests.ingest.chaos_pictures import BodyMaker
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from chaos_answers import ANSWERS, Exchange, robots_answer
    from chaos_certificates import TLS_KINDS, write_certificates
    from chaos_pictures import BodyMaker

GROUPS: Mapping[str, tuple[int, int]] = {
    "web": (1, 24),
    "slow": (2, 16),
    "pause": (3, 8),
    "pause_always": (4, 8),
    "pause_long": (5, 8),
    "busy": (6, 8),
    "robots_deny": (11, 2),
    "robots_scoped": (12, 2),
    "robots_error": (13, 2),
    "robots_hang": (14, 2),
    "robots_reset": (15, 2),
    "robots_huge": (16, 2),
    "robots_html": (17, 2),
}
"""Group of hosts -> (third number of their addresses, how many). Trouble that a downloader lays at
the host's door (pauses, robots.txt) stays with hosts of its own."""
_TLS_HANDSHAKE = b"\x16"
_BIND_ATTEMPTS = 20
_IDLE_SECONDS = 60.0


def group_hosts(group: str) -> list[str]:
    """Addresses of a group of hosts."""
    third, count = GROUPS[group]
    return [f"127.0.{third}.{number}" for number in range(1, count + 1)]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where everything listens."""

    web: int
    """Port of the web, at every host of GROUPS."""
    closed: int
    """A port of 127.0.0.1 that refuses connections."""
    tls: Mapping[str, int]
    """TLS_KINDS -> port of 127.0.0.1."""
    canaries: tuple[tuple[str, int], ...]
    """Addresses and ports that nobody may reach."""
    certificate: str
    """File of the authority that signed the good certificate."""

    def host(self, group: str, serial: int) -> str:
        """``host:port`` of one of a group; serial numbers take turns."""
        hosts = group_hosts(group)
        return f"{hosts[serial % len(hosts)]}:{self.web}"

    def allowed(self) -> tuple[str, ...]:
        """What ``allow_addresses`` must hold: all but the canary."""
        web = [f"{host}:{self.web}" for group in GROUPS for host in group_hosts(group)]
        return (*web, *(f"127.0.0.1:{p}" for p in (self.closed, *self.tls.values())))

    def ports(self) -> dict[str, int]:
        """All of them, by what they are."""
        return {"web": self.web, "closed": self.closed, "canary": self.canary_port, **self.tls}

    @property
    def canary_port(self) -> int:
        """The canary's port at 127.0.0.1 that needs no privilege."""
        return next(port for host, port in self.canaries if host == "127.0.0.1" and port > 1023)


class Web:
    """Everything that runs inside the server's process."""

    def __init__(self, photos: Path | None, *, delays: int, hang_seconds: float) -> None:
        files = sorted(photos.glob("*.jpg")) if photos else []
        self.bodies = BodyMaker([file.read_bytes() for file in files])
        self.bodies.warm()
        self.delays = delays
        self.hang_seconds = hang_seconds
        self.counts: Counter[str] = Counter()
        self.canary_hits: list[str] = []
        self.seen: Counter[str] = Counter()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of the web."""
        self.counts["connections"] += 1
        try:
            while True:
                async with asyncio.timeout(_IDLE_SECONDS):
                    first = await reader.readexactly(1)
                    if first == _TLS_HANDSHAKE:
                        # As plain servers answer whoever speaks TLS to them.
                        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                        break
                    head = first + await reader.readuntil(b"\r\n\r\n")
                if not await self.answer(head, writer):
                    break
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass  # the client hung up, as it should on much of this
        except asyncio.CancelledError:
            pass  # the server ends
        finally:
            writer.close()

    async def answer(self, head: bytes, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection lives on."""
        self.counts["requests"] += 1
        lines = head.decode("latin-1").split("\r\n")
        path = lines[0].split(" ")[1]
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        exchange = Exchange(web=self, writer=writer, path=path, host=headers.get("host", ""))
        if path == "/robots.txt":
            return await robots_answer(exchange)
        self.seen[f"{exchange.host}{path}"] += 1
        _, behavior, *_ = path.split("/")
        return await ANSWERS[behavior](exchange)

    async def canary(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Someone came who should not have."""
        self.canary_hits.append(str(writer.get_extra_info("sockname")))
        writer.close()

    async def mute(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take the connection and say nothing."""
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await asyncio.sleep(self.hang_seconds)
        writer.close()

    def stats(self) -> dict[str, Any]:
        """What happened so far."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
            "canary_hits": self.canary_hits,
            **self.counts,
        }


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock


def bind_web(port: int) -> list[socket.socket]:
    """Every host of GROUPS on one port; ``port`` 0 takes one that is free at all of them."""
    hosts = [host for group in GROUPS for host in group_hosts(group)]
    for _ in range(_BIND_ATTEMPTS):
        sockets: list[socket.socket] = []
        try:
            for host in hosts:
                sockets.append(_listening(host, sockets[0].getsockname()[1] if sockets else port))
            return sockets
        except OSError:
            for sock in sockets:
                sock.close()
            time.sleep(0.1)
    raise SystemExit(f"port {port} is not free at all of {len(hosts)} loopback addresses.")


def bind_canaries(port: int) -> list[socket.socket]:
    """At loopback of both families, on a port of its own and on those that need no permission."""
    found = [_listening("127.0.0.1", port)]
    for host in ("127.0.0.1", "::1", "0.0.0.0"):
        for port in (found[0].getsockname()[1], 80, 443):
            with contextlib.suppress(OSError):
                found.append(_listening(host, port))
    return found


async def serve(options: Mapping[str, Any]) -> None:
    """Serve until standard input ends; a line on it is answered with a line of figures."""
    loop = asyncio.get_running_loop()
    photos = Path(options["photos"]) if options["photos"] else None
    web = Web(photos, delays=options["delays"], hang_seconds=options["hang_seconds"])
    ports = options["ports"]
    sockets = bind_web(ports.get("web", 0))
    canaries = bind_canaries(ports.get("canary", 0))
    closed = socket.socket()
    closed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Bound and not listening: refused, and nobody else's.
    closed.bind(("127.0.0.1", ports.get("closed", 0)))
    tls = {}
    with tempfile.TemporaryDirectory() as folder:
        certificates = write_certificates(Path(options["certificates"] or folder))
        for kind in TLS_KINDS:
            context = None
            if kind in certificates:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificates[kind])
            handler = web.mute if kind == "mute" else web.handle
            port = ports.get(kind, 0)
            server = await asyncio.start_server(handler, "127.0.0.1", port, ssl=context)
            tls[kind] = server.sockets[0].getsockname()[1]
    for sock in sockets:
        await asyncio.start_server(web.handle, sock=sock, limit=1 << 20)
    for sock in canaries:
        await asyncio.start_server(web.canary, sock=sock)
    places = {
        "web": sockets[0].getsockname()[1],
        "closed": closed.getsockname()[1],
        "tls": tls,
        "canaries": [sock.getsockname()[:2] for sock in canaries],
        "certificate": str(certificates["authority"]),
    }
    print(json.dumps(places), flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(web.stats()), flush=True)


class ChaosServer:
    """The server, from outside.

    Args:
        folder: for certificates; it must outlive the server.
        photos: folder of JPEGs to serve as good pictures; drawn ones without it.
        like: listen where an earlier one did, so that the same list serves both.
        delays: number from which the delay of each good answer follows, up to 30 ms; 0 for none.
        hang_seconds: how long a connection is left without an answer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        photos: Path | None = None,
        like: Places | None = None,
        delays: int = 0,
        hang_seconds: float = 60.0,
    ) -> None:
        options = {
            "photos": str(photos) if photos else "",
            "ports": like.ports() if like else {},
            "delays": delays,
            "hang_seconds": hang_seconds,
            "certificates": str(folder),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = self._line()
        found["canaries"] = tuple((host, port) for host, port in found["canaries"])
        self.places = Places(**found)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the chaos server ended; its message stands above")
        found: dict[str, Any] = json.loads(line)
        return found

    def stats(self) -> dict[str, Any]:
        """``cpu_seconds``, ``requests``, ``connections``, ``canary_hits``."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[ChaosServer]:
    """A server for the length of a block."""
    folder.mkdir(parents=True, exist_ok=True)
    server = ChaosServer(folder, **options)
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
