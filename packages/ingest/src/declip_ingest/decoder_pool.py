"""Decoders in processes of their own, fed from an asyncio loop.

A hostile file can crash a C library, hold it in an endless loop or have it ask for all the memory
there is. Each costs its own row and nothing else: the pool knows which picture a child was at, puts
a new child in the place of one that died, and runs the pictures that waited behind it again. A
crash or a lack of memory is believed only when it happens a second time, to that picture alone in a
fresh process, so neither a child killed from outside nor the pictures before it change what is
stored.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Coroutine
from types import TracebackType

from declip_ingest.blur import Boxes, check_boxes
from declip_ingest.decoder_process import (
    DEPTH,
    Answer,
    DecoderProcess,
    DecoderSettings,
    Job,
    settle,
)
from declip_ingest.failures import DecodeError
from declip_ingest.image_policy import DecodedImage, ImagePolicy
from declip_shards import DeclipError

NORMALIZER = "declip_ingest.decode:ImageNormalizer"
LEAST_MEMORY = 64 << 20


class DecoderPool:
    """Child processes that turn bytes into pictures; one pool for one running loop.

    Args:
        policy: what is taken and what is made of it.
        num_processes: children; each keeps one core busy. They start when there is work for them.
        timeout_seconds: for one picture, from the moment a child takes it up.
        memory_bytes: that a child may ask for beyond what its libraries take.
        normalizer: ``module:name`` of what the children build, called with the policy and giving a
            callable like :class:`declip_ingest.decode.ImageNormalizer`.

    Raises:
        DeclipError: a setting out of its limits.
    """

    def __init__(
        self,
        policy: ImagePolicy,
        *,
        num_processes: int = 1,
        timeout_seconds: float = 20.0,
        memory_bytes: int = 1 << 30,
        normalizer: str = NORMALIZER,
    ) -> None:
        if not 1 <= num_processes <= 256:
            raise DeclipError(
                f"decode_processes is {num_processes} but must lie between 1 and 256; give at most "
                "the number of cores."
            )
        if not 0 < timeout_seconds <= 3600:
            raise DeclipError(
                f"decode_timeout_seconds is {timeout_seconds} but must lie above 0 and at most "
                "3600; try 20."
            )
        if memory_bytes < LEAST_MEMORY:
            raise DeclipError(
                f"decode_memory_bytes is {memory_bytes} but no picture decodes in less than "
                f"{LEAST_MEMORY}; try {1 << 30}."
            )
        self.num_processes = num_processes
        self._settings = DecoderSettings(
            policy=policy,
            normalizer=normalizer,
            timeout_seconds=timeout_seconds,
            memory_bytes=memory_bytes,
        )
        self._waiting: deque[Job] = deque()
        self._children: list[DecoderProcess] = []
        self._num_starting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._judging = asyncio.Lock()
        self._is_closed = False

    async def __aenter__(self) -> "DecoderPool":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def pids(self) -> list[int]:
        """Process ids of the children at work."""
        return [child.pid for child in self._children if child.pid is not None]

    async def decode(self, data: bytes, boxes: Boxes = ()) -> DecodedImage:
        """What is to be stored of a downloaded picture.

        Args:
            data: the picture's file.
            boxes: to blur; left, top, right, bottom in 0 to 1 of the upright picture.

        Raises:
            DecodeError: what is wrong with it.
            DeclipError: this machine cannot run decoders.
        """
        if self._is_closed:
            raise RuntimeError("the pool is closed")
        future: asyncio.Future[DecodedImage] = asyncio.get_running_loop().create_future()
        self._waiting.append(Job(data, check_boxes(boxes), future))
        self._hand_out()
        return await future

    async def aclose(self) -> None:
        """End all children; pictures still waiting are canceled."""
        self._is_closed = True
        children, self._children = self._children, []
        for job in [*self._waiting, *(job for child in children for job in child.jobs)]:
            job.future.cancel()
        self._waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*(child.stop() for child in children))
        await asyncio.gather(*tasks, return_exceptions=True)

    def _hand_out(self) -> None:
        """Give waiting pictures to the least busy children; start one where all have enough."""
        is_full = len(self._children) + self._num_starting >= self.num_processes
        depth = DEPTH if is_full else 1
        while self._waiting and not self._is_closed:
            child = min(self._children, key=lambda c: len(c.jobs), default=None)
            if child is not None and len(child.jobs) < depth:
                job = self._waiting.popleft()
                if not job.future.done():
                    child.submit(job)
                continue
            if not is_full:
                self._num_starting += 1
                self._run(self._start_child())
                # One at a time: what it takes over may be all there is.
            return

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_child(self) -> None:
        child = DecoderProcess(self._settings, self._answered, self._died)
        try:
            await child.start()
        except (DeclipError, asyncio.CancelledError) as error:
            self._num_starting -= 1
            await child.stop()
            if isinstance(error, asyncio.CancelledError):
                raise
            while self._waiting:
                settle(self._waiting.popleft(), error)
            return
        self._num_starting -= 1
        self._children.append(child)
        self._hand_out()

    def _answered(self, child: DecoderProcess, job: Job, answer: Answer) -> None:
        if isinstance(answer, DecodeError) and answer.reason == "decoder_memory":
            # It may be the pictures before it that left too little in one piece.
            self._run(self._judge(job))
        else:
            settle(job, answer)
        self._hand_out()

    def _died(self, child: DecoderProcess, jobs: list[Job]) -> None:
        """Run again what waited behind the picture that a child died of."""
        with contextlib.suppress(ValueError):
            self._children.remove(child)
        if self._is_closed:
            return
        self._run(child.stop())
        if jobs and not child.has_expired:
            self._run(self._judge(jobs.pop(0)))
        self._waiting.extendleft(reversed(jobs))
        self._hand_out()

    async def _judge(self, suspect: Job) -> None:
        """Run one picture alone in a fresh process, and believe what happens."""
        over = asyncio.Event()

        def answered(child: DecoderProcess, job: Job, answer: Answer) -> None:
            settle(job, answer)
            over.set()

        def died(child: DecoderProcess, jobs: list[Job]) -> None:
            for job in jobs:
                settle(job, DecodeError("decoder_crash"))
            over.set()

        # One at a time: these processes come on top of num_processes.
        async with self._judging:
            child = DecoderProcess(self._settings, answered, died)
            try:
                await child.start()
                child.submit(suspect)
                await over.wait()
            except DeclipError as error:
                settle(suspect, error)
            except asyncio.CancelledError:
                suspect.future.cancel()
                raise
            finally:
                await child.stop()
