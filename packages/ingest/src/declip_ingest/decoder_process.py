"""One decoder as the pool sees it: a process, a socket, and the memory shared with it.

What comes from it is read as a stranger's word, for a hostile picture may have taken it over: of
known kinds, of bounded length, in turn. Anything else counts as its crash.
"""

import asyncio
import dataclasses
import json
import logging
import os
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import declip_shards
from declip_ingest import decoder_child
from declip_ingest.failures import DECODE_REASONS, DecodeError
from declip_ingest.image_policy import DecodedImage, ImagePolicy
from declip_ingest.shared_slots import SharedSlots, create_slots
from declip_shards import DeclipError

DEPTH = 2
"""Pictures in a child's hands: one at work and the next, so that it never waits for the loop. Each
has a slot of the memory shared with it."""
START_SECONDS = 120.0
"""For a child to import its libraries, on a machine that is busy with other things."""
_RECEIVE_BYTES = 1 << 16
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "PATH", "TMPDIR")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """What one process is started with; see :class:`declip_ingest.decoder_pool.DecoderPool`."""

    policy: ImagePolicy
    normalizer: str
    timeout_seconds: float
    memory_bytes: int

    def command(self, fd: int, slots: int) -> str:
        """What a child is told on its command line."""
        return json.dumps(
            {
                "fd": fd,
                "slots": slots,
                "normalizer": self.normalizer,
                "policy": dataclasses.asdict(self.policy),
                "memory_bytes": self.memory_bytes,
                "parent": os.getpid(),
            }
        )


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """A picture, and who waits for it."""

    data: bytes
    boxes: list[tuple[float, float, float, float]]
    future: "asyncio.Future[DecodedImage]"


Answer = DecodedImage | Exception
"""What a child says of a picture."""


class DecoderProcess(asyncio.BufferedProtocol):
    """One process, the parent's end of its socket, and the memory shared with it."""

    def __init__(
        self,
        settings: DecoderSettings,
        on_answer: Callable[["DecoderProcess", Job, Answer], None],
        on_death: Callable[["DecoderProcess", list[Job]], None],
    ) -> None:
        self._settings = settings
        self._on_answer = on_answer
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._filled = 0
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._slots: SharedSlots | None = None
        self._num_sent = self._num_answered = 0
        self.jobs: deque[Job] = deque()
        self.has_expired = False

    @property
    def pid(self) -> int | None:
        """Process id, while there is one."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            DeclipError: it does not start.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            try:
                self._spawn(theirs.fileno())
            except OSError as error:
                ours.close()
                raise _does_not_start(str(error)) from error
        await self._loop.create_unix_connection(lambda: self, sock=ours)
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._ready
        except TimeoutError as error:
            raise _does_not_start(f"it was not ready within {START_SECONDS:.0f} s") from error

    def _spawn(self, fd: int) -> None:
        slots = create_slots(DEPTH)
        try:
            self._slots = SharedSlots(slots)
            self._process = _start_python(self._settings.command(fd, slots), fd, slots)
        finally:
            os.close(slots)

    def submit(self, job: Job) -> None:
        """Send a picture, the :data:`DEPTH`-th unanswered one at most."""
        assert self._transport is not None
        assert len(self.jobs) < DEPTH
        assert self._slots is not None
        # Answers come in turn, so of the last DEPTH pictures each has a slot of its own.
        slot = self._num_sent % DEPTH
        self._num_sent += 1
        is_shared = self._slots.put(slot, [job.data])
        message = decoder_child.REQUEST.pack(slot, is_shared, len(job.data), len(job.boxes))
        if not is_shared:
            message += job.data
        if job.boxes:
            message += b"".join(decoder_child.BOX.pack(*box) for box in job.boxes)
        self.jobs.append(job)
        if len(self.jobs) == 1:
            self._set_timer()
        self._transport.write(message)

    async def stop(self) -> None:
        """End the process at once and wait until it is gone."""
        self._clear_timer()
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        if not self._ready.done():
            self._ready.set_exception(_does_not_start("it ended before it was ready"))
            return
        jobs = list(self.jobs)
        self.jobs.clear()
        self._on_death(self, jobs)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        try:
            self._read_frames()
        except (ValueError, struct.error):
            # It has been taken over, or its memory is not what it was.
            self._kill()

    def _read_frames(self) -> None:
        """Take what has come whole, and keep the rest.

        Raises:
            ValueError, struct.error: what no child of ours says.
        """
        head = decoder_child.REPLY.size
        place = needed = 0
        while self._filled - place >= head:
            kind, size = decoder_child.REPLY.unpack_from(self._buffer, place)
            if size > self._settings.memory_bytes:
                raise ValueError(f"a reply of {size} bytes")
            end = place + head + size
            if end > self._filled:
                needed = end - place
                break
            body = bytes(memoryview(self._buffer)[place + head : end])
            place = end
            self._take(kind, body)
        if place or needed > len(self._buffer):
            rest = self._buffer[place : self._filled]
            if needed > len(self._buffer):
                # A new one: asyncio still holds a view of this one, so it cannot grow.
                self._buffer = bytearray(needed)
            self._filled = len(rest)
            self._buffer[: self._filled] = rest

    def _take(self, kind: int, body: bytes) -> None:
        if self._ready.done():
            if not self.jobs or self.has_expired:
                raise ValueError("an answer to nothing that was asked")
            answer = self._read_answer(kind, body)
            self._num_answered += 1
            job = self.jobs.popleft()
            self._set_timer()
            self._on_answer(self, job, answer)
        elif kind == decoder_child.READY:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(_does_not_start(body.decode(errors="replace").strip()))

    def _read_answer(self, kind: int, body: bytes) -> Answer:
        """What the child says of its oldest picture.

        Raises:
            ValueError, struct.error: what no child of ours says.
        """
        if kind == decoder_child.FAILED:
            reason, _, detail = body.decode().partition("\0")
            if reason not in DECODE_REASONS:
                raise ValueError(f"a reason {reason[:40]!r}")
            return DecodeError(reason, detail)
        if kind == decoder_child.BROKEN:
            log.warning("a decoder stumbled:\n%s", body.decode(errors="replace"))
            return DecodeError("decoder_crash")
        if kind not in (decoder_child.DONE, decoder_child.STORED):
            raise ValueError(f"a reply of kind {kind}")
        num_bytes, *size, digest = decoder_child.PICTURE.unpack_from(body)
        if kind == decoder_child.STORED:
            assert self._slots is not None
            image = self._slots.get(self._num_answered % DEPTH, num_bytes)
        else:
            image = body[decoder_child.PICTURE.size :]
        width, height, original_width, original_height = size
        return DecodedImage(
            image=image,
            width=width,
            height=height,
            original_width=original_width,
            original_height=original_height,
            sha256=digest.hex(),
        )

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    def _set_timer(self) -> None:
        """Give the oldest picture its time from now on."""
        self._deadline = self._loop.time() + self._settings.timeout_seconds
        # One that runs is left to find out, for most pictures are done long before.
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self.jobs:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._look)
        else:
            self._expire()

    def _clear_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        """The picture at work has had its time; the death that follows is not its crash."""
        self.has_expired = True
        settle(self.jobs.popleft(), DecodeError("decoder_timeout"))
        if self._process is not None:
            self._process.kill()


def settle(job: Job, answer: Answer) -> None:
    """Hand an answer to whoever waits for it."""
    if job.future.done():
        return
    if isinstance(answer, DecodedImage):
        job.future.set_result(answer)
    else:
        job.future.set_exception(answer)


def _does_not_start(why: str) -> DeclipError:
    last = why.splitlines()[-1] if why else "no word of it"
    return DeclipError(
        f"the decoder's process does not start: {last}; see that this machine has memory and "
        "processes left and that the packages simplejpeg, opencv-python-headless and pillow import."
    )


def _start_python(options: str, *fds: int) -> "subprocess.Popen[bytes]":
    """A Python of our own kind with our import path, and nothing else of our environment.

    Credentials of object stores live in environments, and a decoder needs none.
    """
    packages = (Path(str(m.__file__)).parents[1] for m in (decoder_child, declip_shards))
    environment = {k: v for k in _KEPT_ENVIRONMENT if (v := os.environ.get(k)) is not None}
    environment |= {
        "PYTHONPATH": os.pathsep.join(
            dict.fromkeys([*map(str, packages), *filter(None, sys.path)])
        ),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
        # Pictures of one size after another: keep their memory instead of faulting it in each time.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    }
    entry = "import sys; from declip_ingest.decoder_child import main; main(sys.argv[1])"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", entry, options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=fds,
        env=environment,
    )
