"""Run a stage without a runner, and fingerprint what it left."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from declip_shards import Stage, TaskStats

HASHING: dict[str, Any] = {
    "encoder": "hashing:64",
    "encoder_factory": "hashing_encoder:make_encoder",
}
"""Settings of `EmbedPairs` for the encoder of hashing_encoder.py: no model to load."""


def run_stage(stage: Stage, tasks: Sequence[str] | None = None) -> dict[str, TaskStats]:
    """Every task in one process; each must account for all of its samples."""
    work = stage.worker()
    done = {}
    for task in stage.tasks() if tasks is None else tasks:
        stats = work(task)
        assert stats.num_in == stats.num_out + sum(stats.reasons.values())
        assert stage.is_done(task)
        done[task] = stats
    return done


def run_one(stage: Stage, task: str) -> None:
    """One task in a process of its own (see the tests of several workers)."""
    stage.worker()(task)


def digests(root: str, folder: str) -> dict[str, str]:
    """sha256 of every file under ``folder``, by its path."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(root, folder).rglob("*"))
        if path.is_file()
    }
