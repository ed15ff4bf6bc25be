"""Files of a checkpoint: written with their hashes, verified, read without running what is in them.

A checkpoint is a folder ``step_00000120`` whose ``manifest.json`` names every other file with its
size and sha256. It is built in a folder of another name, so a folder of this name is whole, and
``latest`` beside it (moved into place last) names the newest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from declip_shards.manifest import canonical_json
from declip_shards.store import TEMPORARY_MARK, atomic_write, sync_folder

__all__ = [
    "FORMAT_VERSION",
    "LATEST",
    "MANIFEST",
    "FileRecord",
    "StateFile",
    "UnreadableError",
    "arrange",
    "check_checkpoint",
    "commit_folder",
    "file_digest",
    "foreign_content",
    "free_bytes",
    "new_folder",
    "prune",
    "read_latest",
    "read_state",
    "readable_size",
    "remove_newer",
    "remove_unfinished",
    "state_bytes",
    "step_of",
    "tag_of",
    "tags",
    "unfinished_folder",
    "write_bytes",
    "write_state",
]

MANIFEST = "manifest.json"
LATEST = "latest"
"""Beside the checkpoints: the name of the newest whole one, and a line end."""
FORMAT_VERSION = 2
"""Of a checkpoint's manifest."""
FileRecord = dict[str, str | int]
"""What a manifest says of a file: ``path``, ``size`` in bytes, ``sha256``."""
_TAG = re.compile(r"step_(\d{8})")
_SLACK = 64 << 10
"""Bytes of a file beside its tensors: names, shapes, the archive's directory."""


class UnreadableError(Exception):
    """A checkpoint's file that holds something else than states of a training run."""


@dataclass(frozen=True, kw_only=True)
class StateFile:
    """A file to be written: nested containers with their tensors on the host, or bytes."""

    name: str
    content: Any


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Steps behind the checkpoint in a folder of this name; None for any other name."""
    found = _TAG.fullmatch(folder.name)
    return int(found.group(1)) if found else None


def tags(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything in a run's folder that looks like a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    found = ((step_of(path), path) for path in folder.iterdir())
    return sorted(((step, path) for step, path in found if step is not None), reverse=True)


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
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"its manifest has format {manifest.get('format_version')}, not {FORMAT_VERSION}"
    for name, value in run.items():
        if manifest.get(name) != value:
            return f"it is of another run ({name} is {manifest.get(name)!r}, not {value!r})"
    if manifest.get("step") != step_of(folder):
        return f"its manifest is of step {manifest.get('step')}"
    try:
        return _first_fault(folder, files)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except (KeyError, TypeError):
        return "its manifest is damaged"


def _first_fault(folder: Path, files: list[dict[str, Any]]) -> str | None:
    for record in files:
        path = folder / record["path"]
        if path.parent != folder or path.is_symlink() or not path.is_file():
            return f"{record['path']} is missing"
        if path.stat().st_size != record["size"]:
            return f"{record['path']} is cut short or grown"
        if file_digest(path) != record["sha256"]:
            return f"{record['path']} has changed since it was written"
    return None


class _HashedFile:
    """What ``torch.save`` writes to: a file and the hash of what went into it.

    torch reports a failed write as an error of its own about positions, so what the system said is
    kept here.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.path, self.size = path, 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(data)
        written = memoryview(data).nbytes
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> FileRecord:
        """Make the file durable and describe it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"path": self.path.name, "size": self.size, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def write_state(path: Path, content: Any) -> FileRecord:
    """Write what :func:`arrange` gave, durably; returns the file's record.

    Raises:
        OSError: the file could not be written.
    """
    file = _HashedFile(path)
    try:
        torch.save(content, cast(IO[bytes], file))
        return file.finish()
    except RuntimeError as error:
        if file.error is not None:
            raise file.error from error
        raise
    finally:
        file.abandon()


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write bytes durably; returns the file's record.

    Raises:
        OSError: the file could not be written.
    """
    file = _HashedFile(path)
    try:
        file.write(data)
        return file.finish()
    finally:
        file.abandon()


def arrange(content: Any, *, copy: bool, _seen: dict[Any, Tensor] | None = None) -> Any:
    """The same nested containers with every tensor on the host, without what lies around it.

    A tensor that is a part of a larger buffer would otherwise be saved with all of it.

    Args:
        content: dicts, lists and tuples of tensors and plain values.
        copy: also copy what need not be, so that training may go on while the result is written.
            What ``torch.save`` makes of the result is the same, bit for bit.
    """
    seen = {} if _seen is None else _seen
    if isinstance(content, Tensor):
        place = (content.device, content.data_ptr(), content.dtype, content.shape, content.stride())
        key: Any = place if content.numel() else id(content)
        if key not in seen:
            seen[key] = _on_host(content, copy=copy)
        return seen[key]
    if isinstance(content, dict):
        kind = OrderedDict if isinstance(content, OrderedDict) else dict
        return kind((k, arrange(v, copy=copy, _seen=seen)) for k, v in content.items())
    if isinstance(content, list | tuple):
        items = [arrange(v, copy=copy, _seen=seen) for v in content]
        return items if isinstance(content, list) else tuple(items)
    # A loss scaler, say, which the next step changes.
    return deepcopy(content)


def _on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    plain = tensor.detach()
    if plain.device.type != "cpu":
        return plain.to("cpu").contiguous()
    alone = plain.is_contiguous() and plain.untyped_storage().nbytes() == plain.nbytes
    return plain if alone and not copy else plain.clone(memory_format=torch.contiguous_format)


def state_bytes(content: Any) -> int:
    """About how many bytes a file of this content takes, at the least what it will take."""
    if isinstance(content, bytes):
        return len(content)
    return _SLACK + sum(_tensor_sizes(content, set()))


def _tensor_sizes(content: Any, seen: set[int]) -> Iterator[int]:
    if isinstance(content, Tensor):
        if id(content) not in seen:
            seen.add(id(content))
            # An archive's entry: header, name and alignment.
            yield content.nbytes + 256
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensor_sizes(value, seen)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensor_sizes(value, seen)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to the file system of ``folder``."""
    return shutil.disk_usage(folder).free


def readable_size(count: int) -> str:
    """A number of bytes for people: ``1.3 GB``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def new_folder(folder: Path, step: int) -> Path:
    """An empty folder to build the checkpoint of ``step`` in; what a killed save left goes."""
    remove_unfinished(folder)
    unfinished = unfinished_folder(folder, step)
    unfinished.mkdir(parents=True)
    return unfinished


def unfinished_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is built: a name that nobody takes for a checkpoint."""
    return folder / f"{tag_of(step)}{TEMPORARY_MARK}save"


def remove_unfinished(folder: Path) -> None:
    """Remove what saves that were killed have left."""
    for path in folder.glob(f"*{TEMPORARY_MARK}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def commit_folder(folder: Path, step: int, manifest: Mapping[str, Any]) -> None:
    """Make a written checkpoint the newest: its manifest, its name, and ``latest``, in this order.

    Raises:
        OSError: the manifest could not be written; what stood before stands.
    """
    unfinished = unfinished_folder(folder, step)
    atomic_write(unfinished / MANIFEST, canonical_json(dict(manifest)))
    sync_folder(unfinished)
    final = folder / tag_of(step)
    if final.exists():
        # Of the same step: one that was skipped as damaged, or that this one repeats.
        replaced = folder / f"{tag_of(step)}{TEMPORARY_MARK}replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    unfinished.rename(final)
    sync_folder(folder)
    atomic_write(folder / LATEST, f"{final.name}\n".encode())
    remove_unfinished(folder)


def read_latest(folder: Path) -> str | None:
    """Name of the checkpoint that ``latest`` names; None where there is no such file."""
    try:
        return (folder / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the ``keep`` newest and those whose step ``keep_every`` divides.

    The name goes first, so that half removed is gone.
    """
    for step, path in tags(folder)[keep:]:
        if keep_every is None or step % keep_every:
            _remove(path)


def _remove(path: Path) -> None:
    going = path.with_name(f"{path.name}{TEMPORARY_MARK}removed")
    with contextlib.suppress(OSError):
        path.rename(going)
        shutil.rmtree(going)


def remove_newer(folder: Path, step: int) -> list[int]:
    """Remove checkpoints of later steps than ``step``; returns their steps.

    They were skipped as damaged when the run went on from an older one. Left there, they would
    count among the newest and push out good ones.
    """
    newer = [(found, path) for found, path in tags(folder) if found > step]
    for _, path in newer:
        _remove(path)
    return [found for found, _ in newer]


def _known_classes() -> list[Any]:
    """Classes of DeepSpeed's that stand in its files beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def read_state(path: Path) -> Any:
    """Content of a checkpoint's file, tensors on the host and read from disk as they are used.

    Nothing but tensors, plain values and four classes of DeepSpeed's is built: reading runs no
    code out of the file.

    Raises:
        UnreadableError: it holds something else, or is no such file.
    """
    try:
        with torch.serialization.safe_globals(_known_classes()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UnreadableError(f"{path.name} is not a file of states ({reason})") from error


def foreign_content(folder: Path) -> str | None:
    """Why a checkpoint's files must not be unpickled, in words; None when all may.

    DeepSpeed unpickles what it is given, and a pickle can run code; a manifest vouches for hashes,
    and whoever can write the files can write a manifest.
    """
    try:
        for path in sorted(folder.glob("*.pt")):
            read_state(path)
    except UnreadableError as error:
        return str(error)
    return None
