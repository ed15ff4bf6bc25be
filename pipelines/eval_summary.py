"""What became of each evaluation, as a file beside the results says it."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from declip_shards.store import atomic_write

SUMMARY = "eval_summary.jsonl"
"""Beside the results: what became of every evaluation, one a line. Not .json: CLIP_benchmark's
``build`` reads every such file of a folder as a result."""
SCHEMA_VERSION = 1
"""Of the summary's lines."""
_KEY = ("model", "dataset", "language", "task")
DONE, KEPT, MISSING, FAILED, OTHER_KIND = "done", "kept", "missing", "failed", "other_kind"
"""What became of an evaluation; other_kind: the dataset is not of the task's kind."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What became of one model on one dataset by one task."""

    model: str
    """As it was asked for."""
    dataset: str
    task: str
    language: str
    status: str
    note: str = ""
    """Why there is no result."""
    results: tuple[str, ...] = ()
    """Their files, relative to the summary's folder where they lie in it."""
    num_samples: int | None = None


def write_summary(folder: Path, entries: Sequence[Entry]) -> None:
    """Tell what has become of everything until now, in a folder of results.

    What was evaluated into it before, or is at this time by another process, and is not among the
    entries, still stands there.
    """
    told = [{"schema_version": SCHEMA_VERSION} | dataclasses.asdict(entry) for entry in entries]
    keys = {tuple(entry[name] for name in _KEY) for entry in told}
    # Before a set is opened it may not be known which task auto is.
    keys |= {(*key[:-1], "auto") for key in keys}
    path = folder / SUMMARY
    with locked(folder):
        older = [
            entry
            for entry in read_summary(path)
            if tuple(entry.get(name) for name in _KEY) not in keys
        ]
        lines = [json.dumps(e, sort_keys=True, ensure_ascii=False) for e in [*older, *told]]
        atomic_write(path, "".join(line + "\n" for line in lines).encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write into a folder, where its disk knows locks."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_summary(path: Path) -> list[dict[str, Any]]:
    """The entries of a summary; none where there is no such file. Damaged lines are passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and "status" in entry:
                entries.append(entry)
    return entries


def exit_status(entries: Sequence[Entry], *, allow_missing: bool) -> int:
    """0 where all that was asked for is there, else 1.

    A task that does not fit a dataset's kind is no fault where another task on it was done.
    """
    done = {(e.model, e.dataset) for e in entries if e.status in (DONE, KEPT)}
    for entry in entries:
        if entry.status == FAILED or (entry.status == MISSING and not allow_missing):
            return 1
        if entry.status == OTHER_KIND and (entry.model, entry.dataset) not in done:
            return 1
    return 0


def output_folder(output: str) -> Path:
    """Where the summary goes: the results' folder; for a template the part without braces."""
    if not output.endswith(".json"):
        return Path(output)
    folder = Path(output).parent
    while "{" in str(folder):
        folder = folder.parent
    return folder


def samples_text(entry: Entry) -> str:
    """How many pictures it was of, to follow its status."""
    return f", {entry.num_samples:,} pictures" if entry.num_samples is not None else ""
