"""Two small real stages for tests of the runner; importable by Ray's workers."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from declip_shards import DeclipError, Store, TaskStats

__version__ = "1"


@dataclass(frozen=True, kw_only=True)
class MakeNumbers:
    root: str = field(default="", metadata={"fingerprint": False})
    """Folder of the dataset."""
    count: int = 10
    """Numbers a task writes."""
    num_tasks: int = 3
    """Tasks."""
    fail_task: str = ""
    """Task that raises."""
    die_once: str = field(default="", metadata={"fingerprint": False})
    """A file: where it is missing, the task makes it and kills its own process."""
    style: Literal["even", "all"] = "all"
    """Which numbers come through."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DeclipError(f"count is {self.count}; it must be at least 1.")

    def tasks(self) -> list[str]:
        return [f"{n:05d}" for n in range(self.num_tasks)]

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(f"numbers/{task}.txt")

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)

        def work(task: str) -> TaskStats:
            if self.die_once and not os.path.exists(self.die_once):
                with open(self.die_once, "w"):
                    os.kill(os.getpid(), 9)
            if task == self.fail_task:
                raise DeclipError(f"task {task} was told to fail")
            numbers = range(0, self.count, 2 if self.style == "even" else 1)
            store.write_bytes(f"numbers/{task}.txt", "\n".join(map(str, numbers)).encode())
            store.write_bytes(f"numbers/{task}.time", str(time.time()).encode())
            return TaskStats(
                num_in=self.count,
                num_out=len(numbers),
                reasons={"odd": self.count - len(numbers)} if self.style == "even" else {},
                files=(f"numbers/{task}.txt",),
                volatile_files=(f"numbers/{task}.time",),
            )

        return work


@dataclass(frozen=True, kw_only=True)
class SumNumbers:
    root: str = field(default="", metadata={"fingerprint": False})
    """Folder of the dataset."""
    factor: float = 1.0
    """What the sum is multiplied by."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def tasks(self) -> list[str]:
        return ["all"]

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists("sum.txt")

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)

        def work(task: str) -> TaskStats:
            names = store.list("numbers", ".txt")
            total = sum(
                int(line) for n in names for line in store.read_bytes(f"numbers/{n}").split()
            )
            store.write_bytes("sum.txt", f"{total * self.factor:g}".encode())
            return TaskStats(num_in=len(names), num_out=len(names), files=("sum.txt",))

        return work
