"""Stages for tests of the Ray runner; importable by Ray's workers."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pyarrow as pa

from declip_shards import DeclipError, Sample, Store, TaskStats, layout, write_shard


@dataclass(frozen=True, kw_only=True)
class HoldCores:
    """Every task takes all cores of this machine and writes when it began and ended."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Folder of the dataset."""
    dies: bool = False
    """Whether each task kills its process."""

    num_cpus: ClassVar[float] = float(os.cpu_count() or 1)
    num_gpus: ClassVar[float] = 0

    def tasks(self) -> list[str]:
        return ["0", "1", "2"]

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(f"{task}.json")

    def worker(self) -> Callable[[str], TaskStats]:
        def work(task: str) -> TaskStats:
            if self.dies:
                os.kill(os.getpid(), 9)
            start = time.monotonic()
            time.sleep(0.2)
            span = json.dumps([start, time.monotonic()]).encode()
            Store(self.root).write_bytes(f"{task}.json", span)
            return TaskStats(num_in=1, num_out=1, files=(f"{task}.json",))

        return work


@dataclass(frozen=True, kw_only=True)
class HoldTooMuch(HoldCores):
    """A task of it fits no machine."""

    num_cpus: ClassVar[float] = 1e6


@dataclass(frozen=True, kw_only=True)
class HoldAccelerators(HoldCores):
    """A task of it needs more GPUs than a machine has."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 1000


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Every task writes one file; what goes wrong before stands in its name, with how often."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Folder of the dataset."""
    names: tuple[str, ...] = ("fine",)
    """Tasks: ``fine``, ``kill-N`` (its process, the first N times), ``stop-N``, ``hang-N``,
    ``refuse`` (a sentence), ``defect`` (a traceback), ``full`` (no space)."""
    seconds: float = 0.0
    """That each task works."""
    task_seconds: float | None = field(default=None, metadata={"fingerprint": False})
    """Deadline of a task."""
    memory_bytes: int = field(default=0, metadata={"fingerprint": False})
    """Memory that Ray keeps free for a task."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def tasks(self) -> list[str]:
        return list(self.names)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(f"out/{task}.txt")

    def worker(self) -> Callable[[str], TaskStats]:
        return self._work

    def _work(self, task: str) -> TaskStats:
        folder = Path(self.root) / "tries"
        folder.mkdir(exist_ok=True)
        number = len(list(folder.glob(f"{task}.*")))
        (folder / f"{task}.{number}").write_text(str(os.getpid()))
        kind, _, times = task.partition("-")
        if times and number < int(times):
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "hang":
                time.sleep(3600)
        if kind == "refuse":
            raise DeclipError("told to refuse")
        if kind == "defect":
            raise ZeroDivisionError("a defect")
        if kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(self.seconds)
        Store(self.root).write_bytes(f"out/{task}.txt", task.encode() * 1000)
        return TaskStats(num_in=10, num_out=9, reasons={"odd": 1}, files=(f"out/{task}.txt",))


@dataclass(frozen=True, kw_only=True)
class WriteShards:
    """Every task writes a shard's three files, as ingest does, without fetching anything."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Folder of the dataset."""
    num_shards: int = 1
    """Tasks."""
    num_bytes: int = 100
    """Of each of three pictures."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def tasks(self) -> list[str]:
        return [layout.shard_name(n) for n in range(self.num_shards)]

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.shard_stats_path(task))

    def worker(self) -> Callable[[str], TaskStats]:
        return self._work

    def _work(self, task: str) -> TaskStats:
        keys = [layout.sample_key(int(task), n, 10) for n in range(3)]
        picture = bytes(self.num_bytes)
        samples = [Sample(key=k, image=picture, caption=k, metadata={"key": k}) for k in keys]
        files = write_shard(Store(self.root), task, samples, pa.table({"key": keys}), {"count": 3})
        volatile = [layout.shard_stats_path(task)]
        return TaskStats(num_in=3, num_out=3, files=files, volatile_files=volatile)
