"""Checkpoints that are whole or not there: our own commit around DeepSpeed's files.

    train/checkpoints/RUN/step_00000120/   DeepSpeed's files, rank_00000.json, ..., manifest.json

Every process writes and flushes its files and hashes them; when all have, process 0 writes
``manifest.json`` with every size and hash, by rename and last. DeepSpeed's own ``latest`` is never
written: it can name a checkpoint of which half is missing. Loading takes the newest folder whose
files equal its manifest, says aloud which it skipped and why, and the same on every process. RUN is
a hash of what the result depends on, so a run never continues from another one's weights.

DeepSpeed reads its files by pickle, which can run code: nothing is loaded that the manifest in our
own run folder does not vouch for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from declip_shards import DeclipError
from declip_shards.manifest import canonical_json
from declip_shards.store import TEMPORARY_MARK, atomic_write, sync_folder

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
"""Of a checkpoint's manifest."""
_TAG = re.compile(r"step_(\d{8})")
_RANK_FILE = re.compile(r"(?:zero_pp_rank_|rank_)(\d+)")


class _Engine(Protocol):
    """What of DeepSpeed's engine is used here."""

    def save_checkpoint(
        self, save_dir: str, tag: str, client_state: dict[str, Any], save_latest: bool
    ) -> bool: ...

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, dict[str, Any]]: ...


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Steps behind the checkpoint in a folder of this name; None for any other name."""
    found = _TAG.fullmatch(folder.name)
    return int(found.group(1)) if found else None


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_checkpoint(folder: Path, run: Mapping[str, Any]) -> str | None:
    """Why a checkpoint must not be loaded, in words; None when every file is as its manifest says.

    Args:
        folder: the checkpoint.
        run: what it must be of: fields of the manifest that must be equal.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
    except FileNotFoundError:
        return "it has no manifest, so it was never finished"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"its manifest has format {manifest.get('format_version')}, not {FORMAT_VERSION}"
    for name, value in run.items():
        if manifest.get(name) != value:
            return f"it is of another run ({name} is {manifest.get(name)!r}, not {value!r})"
    for record in files:
        path = folder / record["path"]
        if path.parent != folder or path.is_symlink() or not path.is_file():
            return f"{record['path']} is missing"
        if path.stat().st_size != record["size"]:
            return f"{record['path']} is cut short or grown"
        if file_digest(path) != record["sha256"]:
            return f"{record['path']} has changed since it was written"
    return None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint; created.
        run: identity of the run, written into each manifest and asked for on loading: plain JSON
            values that name settings, data, processes and versions.
        keep: newest checkpoints to keep.
        say: takes one line for the person who watches.
    """

    def __init__(
        self, folder: Path, run: Mapping[str, Any], *, keep: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.run, self.keep, self.say = folder, dict(run), keep, say
        self.rank = dist.get_rank()
        self.restored: dict[str, Any] = {}
        """What was saved with the checkpoint that :meth:`restore` loaded."""

    def save(self, engine: _Engine, step: int, more: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint after ``step`` steps; every process calls this at the same step.

        Args:
            engine: DeepSpeed's.
            step: steps done.
            more: further state of the loop, plain JSON values; ``restored`` after :meth:`restore`.

        Raises:
            DeclipError: some process could not write; the checkpoints before stay as they were.
        """
        folder = self.folder / tag_of(step)
        if self.rank == 0:
            # What a killed save left behind must not mix with this one.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        fault = None
        records: list[dict[str, Any]] = []
        try:
            engine.save_checkpoint(str(self.folder), tag_of(step), {}, save_latest=False)
            state = {"step": step, "torch_rng": torch.get_rng_state().numpy().tobytes().hex()}
            state |= {"loop": dict(more)} if more else {}
            atomic_write(folder / f"rank_{self.rank:05d}.json", canonical_json(state))
            records = [_flush(path) for path in self._own_files(folder)]
        except OSError as error:
            fault = f"process {self.rank} could not write {folder.name}: {error.strerror or error}"
        everyone: list[tuple[str | None, list[dict[str, Any]]]] = [(None, [])] * (
            dist.get_world_size()
        )
        dist.all_gather_object(everyone, (fault, records))
        faults = [text for text, _ in everyone if text]
        if faults:
            raise DeclipError(
                f"{faults[0]}; free some disk space and run again, it goes on from the checkpoint "
                "before."
            )
        if self.rank == 0:
            files = sorted((r for _, own in everyone for r in own), key=lambda r: str(r["path"]))
            manifest = {**self.run, "format_version": FORMAT_VERSION, "step": step, "files": files}
            sync_folder(folder)
            atomic_write(folder / MANIFEST, canonical_json(manifest))
            sync_folder(self.folder)
            self.prune(self.keep)
        dist.barrier()

    def _own_files(self, folder: Path) -> list[Path]:
        """Files of this process: its number stands in their names; the others are process 0's."""
        own = []
        for path in sorted(folder.iterdir()):
            found = _RANK_FILE.match(path.name)
            writer = int(found.group(1)) if found else 0
            if writer == self.rank and TEMPORARY_MARK not in path.name:
                own.append(path)
        return own

    def tags(self) -> list[tuple[int, Path]]:
        """(step, folder) of everything that looks like a checkpoint, newest first."""
        if not self.folder.is_dir():
            return []
        found = ((_TAG.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(((int(m.group(1)), path) for m, path in found if m), reverse=True)

    def prune(self, keep: int) -> None:
        """Remove all but the ``keep`` newest; the manifest first, so that half removed is gone."""
        for _, folder in self.tags()[keep:]:
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def newest(self) -> int | None:
        """Step of the newest checkpoint that is whole; None where there is none. No collective."""
        for step, folder in self.tags():
            fault = check_checkpoint(folder, self.run)
            if fault is None:
                return step
            self.say(f"checkpoint {folder.name} is skipped: {fault}")
        return None

    def restore(self, engine: _Engine) -> int:
        """Load the newest whole checkpoint on every process; returns its step, 0 for none.

        Process 0 verifies and chooses; the others follow. Call this after everything that draws
        random numbers at construction, since the generator's state is restored too.
        """
        choice: list[int | None] = [self.newest() if self.rank == 0 else None]
        dist.broadcast_object_list(choice, src=0)
        step = choice[0]
        if step is None:
            return 0
        path, _ = engine.load_checkpoint(str(self.folder), tag_of(step))
        if path is None:
            raise DeclipError(
                f"DeepSpeed did not load the checkpoint {tag_of(step)}; delete it and run again."
            )
        folder = self.folder / tag_of(step)
        state = json.loads((folder / f"rank_{self.rank:05d}.json").read_bytes())
        self.restored = state.get("loop", {})
        raw = bytearray.fromhex(state["torch_rng"])
        torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8).clone())
        if self.rank == 0:
            self.say(f"continuing after step {step}")
        return step


def _flush(path: Path) -> dict[str, Any]:
    """Make a file durable and describe it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"path": path.name, "size": path.stat().st_size, "sha256": file_digest(path)}
