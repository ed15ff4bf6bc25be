"""Stages for tests of the Ray runner; importable by Ray's workers."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from declip_shards import Store, TaskStats


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
