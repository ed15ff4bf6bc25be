"""What a stage is: settings and five members, no base class (design.md section 4)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class TaskStats:
    """What one task did. ``num_in == num_out + sum(reasons.values())`` or the run refuses it."""

    num_in: int
    """Samples (or rows) read."""
    num_out: int
    """Samples (or rows) that came through."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why the others did not: drop or failure reason -> count."""
    files: Sequence[str] = ()
    """Files written, relative to the dataset's root; their hashes go into the manifest."""
    volatile_files: Sequence[str] = ()
    """Files that hold times or the like: named in the manifest, not hashed."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further figures of this task, plain JSON values, the same on every run."""


@runtime_checkable
class Stage(Protocol):
    """The five members. The object itself is a frozen dataclass; its fields are its settings."""

    @property
    def num_cpus(self) -> float:
        """Cores that one task keeps busy. A constant, never probed."""

    @property
    def num_gpus(self) -> float:
        """GPUs that one task needs. A constant, never probed."""

    def tasks(self) -> Sequence[str]:
        """Names of the independent pieces of work, usually shard numbers such as ``00003``."""

    def is_done(self, task: str) -> bool:
        """Whether the task's own mark of done stands on disk."""

    def worker(self) -> Callable[[str], TaskStats]:
        """Load what is costly (models) once a process; return ``task -> stats``."""


@contextlib.contextmanager
def open_worker(stage: Stage) -> Iterator[Callable[[str], TaskStats]]:
    """The stage's worker; at the end its ``close()``, if it has one: it may hold connections."""
    work = stage.worker()
    try:
        yield work
    finally:
        getattr(work, "close", lambda: None)()
