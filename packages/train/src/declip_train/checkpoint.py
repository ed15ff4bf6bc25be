"""Checkpoints that are whole or not there: our own commit around DeepSpeed's states.

    train/checkpoints/RUN/step_00000120/   DeepSpeed's files, rank_00000.json, ..., manifest.json
    train/checkpoints/RUN/latest           step_00000120

DeepSpeed says what belongs to a checkpoint; the files are written here, by every process its own,
under a name that is no checkpoint's, and flushed and hashed. When all processes have, process 0
writes ``manifest.json`` with every size and hash, gives the folder its name, and moves ``latest``.
(DeepSpeed's own ``latest`` can name a checkpoint of which half is missing.) Loading takes the
newest folder whose files equal its manifest, says aloud which it skipped and why, and the same on
every process. RUN is a hash of what the result depends on, so a run never continues from another
one's weights; how many processes wrote a checkpoint, and in which ZeRO stage, is not part of it.

Nothing is unpickled but tensors, plain values and four known classes, whatever a manifest says.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

import declip_train
from declip_shards import DeclipError
from declip_shards.manifest import canonical_json
from declip_train.async_save import BackgroundWrite, write_files
from declip_train.checkpoint_files import (
    FORMAT_VERSION,
    LATEST,
    MANIFEST,
    FileRecord,
    StateFile,
    arrange,
    check_checkpoint,
    commit_folder,
    file_digest,
    foreign_content,
    free_bytes,
    new_folder,
    prune,
    read_latest,
    readable_size,
    remove_newer,
    remove_unfinished,
    state_bytes,
    step_of,
    tag_of,
    tags,
    unfinished_folder,
)

__all__ = [
    "FORMAT_VERSION",
    "LATEST",
    "MANIFEST",
    "Checkpoints",
    "check_checkpoint",
    "file_digest",
    "random_states",
    "restore_random_states",
    "seed_random_states",
    "step_of",
    "tag_of",
]

_T = TypeVar("_T")


class _Engine(Protocol):
    """What of DeepSpeed's engine is used here."""

    checkpoint_engine: Any
    module: torch.nn.Module

    def save_checkpoint(
        self, save_dir: str, tag: str, client_state: dict[str, Any], save_latest: bool
    ) -> bool: ...

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, dict[str, Any]]: ...

    def zero_optimization_stage(self) -> int: ...


class _Collector:
    """Stands in for DeepSpeed's writer: takes what is to be saved, and writes nothing."""

    def __init__(self) -> None:
        self.contents: list[tuple[str, Any]] = []

    def save(self, state_dict: Any, path: str) -> None:
        self.contents.append((Path(path).name, state_dict))

    def create(self, info: object) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def commit(self, info: object) -> bool:
        return True

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False


@contextmanager
def _collected(engine: _Engine) -> Iterator[_Collector]:
    """DeepSpeed's saving goes to a collector. It must touch no disk: a process whose disk is full
    would leave the others waiting in a barrier of DeepSpeed's."""
    own, collector = engine.checkpoint_engine, _Collector()
    engine.checkpoint_engine = collector
    # A copy of a script for ZeRO's files, which `declip export` makes needless.
    vars(engine)["_copy_recovery_script"] = lambda folder: None
    try:
        yield collector
    finally:
        engine.checkpoint_engine = own
        vars(engine).pop("_copy_recovery_script", None)


def random_states() -> dict[str, Any]:
    """State of every generator that training may draw from, as plain JSON values."""
    # What libraries draw from that take no generator; our own code draws nothing from it.
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    number, inner, next_gauss = random.getstate()
    states = {
        "torch": _hex(torch.get_rng_state()),
        "numpy": [name, np.asarray(keys).tolist(), int(place), int(has_gauss), float(gauss)],
        "python": [number, list(inner), next_gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = _hex(torch.cuda.get_rng_state())
    return states


def _hex(state: torch.Tensor) -> str:
    raw: bytes = state.numpy().tobytes()
    return raw.hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()


def restore_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of :func:`random_states`; a GPU's is skipped where there is none."""
    torch.set_rng_state(_from_hex(states["torch"]))
    name, keys, place, has_gauss, gauss = states["numpy"]
    inner_numpy = (name, np.array(keys, dtype=np.uint32), place, has_gauss, gauss)
    np.random.set_state(inner_numpy)  # noqa: NPY002
    number, inner, next_gauss = states["python"]
    random.setstate((number, tuple(inner), next_gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(states["cuda"]))


def seed_random_states(run: Mapping[str, Any], step: int, rank: int) -> None:
    """Seed every generator from a run, a step and a process's number.

    For a run that continues in another number of processes, whose states nobody has saved.
    """
    name = canonical_json({"run": dict(run), "step": step, "rank": rank})
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
    torch.manual_seed(seed >> 1)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    random.seed(seed)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint; created.
        run: identity of the run, written into each manifest and asked for on loading: plain JSON
            values that name settings, data and whatever else the result depends on. Not the
            number of processes, the ZeRO stage or versions: those stand in the manifest as
            ``made_by``.
        keep: newest checkpoints to keep.
        say: takes one line for the person who watches.
        keep_every: checkpoints of steps that this divides are kept for good.
        in_background: let training go on while a checkpoint is written, from a copy in memory.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        *,
        keep: int,
        say: Callable[[str], None],
        keep_every: int | None = None,
        in_background: bool = False,
    ) -> None:
        self.folder, self.run, self.keep, self.say = folder, dict(run), keep, say
        self.keep_every, self.in_background = keep_every, in_background
        self.rank = dist.get_rank()
        self.restored: dict[str, Any] = {}
        """What was saved with the checkpoint that :meth:`restore` loaded."""
        self._pending: BackgroundWrite | None = None
        self._made_by: dict[str, Any] = {}
        self._newest: int | None = None

    def save(self, engine: _Engine, step: int, more: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint after ``step`` steps; every process calls this at the same step.

        With ``in_background``, it is there after :meth:`poll` or :meth:`finish`; one that is still
        being written is waited for first.

        Args:
            engine: DeepSpeed's.
            step: steps done.
            more: further state of the loop, plain JSON values; ``restored`` after :meth:`restore`.

        Raises:
            DeclipError: the disk is too full, or some process could not write; the checkpoints
                before stay as they were, and nothing of this one is left.
        """
        self.finish()
        self._made_by = self._maker(engine)
        files = self._collect(engine, step, more)
        everyone = self._of_all(sum(state_bytes(file.content) for file in files))
        fault = self._make_room(step, sum(everyone)) if self.rank == 0 else None
        self._stop_at(self._of_first(fault), step)
        folder = unfinished_folder(self.folder, step)
        if self.in_background:
            self._pending = BackgroundWrite(folder, files, step)
        else:
            self._commit(step, *write_files(folder, files))

    def poll(self) -> bool:
        """Commit the checkpoint that is being written, if all processes are done writing.

        Every process calls this after every step. While nothing is being written it costs nothing;
        else it is one reduction of one number.

        Returns:
            Whether a checkpoint was committed.

        Raises:
            DeclipError: as :meth:`save`.
        """
        if self._pending is None:
            return False
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        done = torch.tensor(int(self._pending.is_done), device=device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if not int(done):
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and commit it; every process calls this.

        Raises:
            DeclipError: as :meth:`save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._commit(pending.step, *pending.result())

    def _collect(
        self, engine: _Engine, step: int, more: Mapping[str, Any] | None
    ) -> list[StateFile]:
        """This process's files, tensors on the host."""
        with _collected(engine) as collector:
            engine.save_checkpoint(str(self.folder), tag_of(step), {}, save_latest=False)
        files = [
            StateFile(name=name, content=arrange(content, copy=self.in_background))
            for name, content in collector.contents
        ]
        state: dict[str, Any] = {"step": step, "random": random_states()}
        state |= {"loop": dict(more)} if more else {}
        name = f"rank_{self.rank:05d}.json"
        return [*files, StateFile(name=name, content=canonical_json(state))]

    def _make_room(self, step: int, needed: int) -> str | None:
        """The folder to write to; why there is none, in words."""
        try:
            new_folder(self.folder, step)
            free = free_bytes(self.folder)
        except OSError as error:
            return f"{str(self.folder)!r} cannot be written to ({error.strerror or error})"
        if needed <= free:
            return None
        return (
            f"the checkpoint after step {step} needs {readable_size(needed)} ({needed} bytes), but "
            f"{readable_size(free)} ({free} bytes) are free in {str(self.folder)!r}"
        )

    def _commit(self, step: int, fault: str | None, records: list[FileRecord]) -> None:
        everyone = self._of_all((fault, records))
        faults = [
            f"process {rank} could not write the checkpoint after step {step}: {text}"
            for rank, (text, _) in enumerate(everyone)
            if text
        ]
        if self.rank == 0 and not faults:
            files = sorted((r for _, own in everyone for r in own), key=lambda r: str(r["path"]))
            manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
            manifest |= {"made_by": self._made_by}
            try:
                commit_folder(self.folder, step, {**self.run, **manifest})
            except OSError as error:
                faults = [f"the checkpoint after step {step} has no place: {error.strerror}"]
        self._stop_at(self._of_first(faults[0] if faults else None), step)
        self._newest = step
        if self.rank == 0:
            for other in remove_newer(self.folder, step):
                self.say(f"checkpoint {tag_of(other)} is removed: the run went on from before it")
            self.prune(self.keep)

    def _stop_at(self, fault: str | None, step: int) -> None:
        """End the save on every process, with nothing of it left."""
        if fault is None:
            return
        if self.rank == 0:
            shutil.rmtree(unfinished_folder(self.folder, step), ignore_errors=True)
        before = "begins anew" if self._newest is None else f"goes on after step {self._newest}"
        raise DeclipError(f"{fault}; free some disk space and run again: it {before}.")

    def _of_all(self, value: _T) -> list[_T]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value)
        return everyone

    def _of_first(self, value: _T) -> _T:
        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _maker(self, engine: _Engine) -> dict[str, Any]:
        """What wrote, or reads, a checkpoint, and may differ between the two."""
        names = ("torch", "deepspeed")
        return {
            "world_size": dist.get_world_size(),
            "zero_stage": int(engine.zero_optimization_stage()),
            "backend": str(dist.get_backend()),
            "versions": {"declip_train": declip_train.__version__}
            | {name: version(name) for name in names},
        }

    def tags(self) -> list[tuple[int, Path]]:
        """(step, folder) of everything that looks like a checkpoint, newest first."""
        return tags(self.folder)

    def prune(self, keep: int) -> None:
        """Remove all but the ``keep`` newest and those that are kept for good."""
        prune(self.folder, keep, self.keep_every)

    def newest(self) -> int | None:
        """Step of the newest checkpoint that is whole; None where there is none. No collective."""
        found = self.tags()
        named = read_latest(self.folder)
        if named is not None and named not in [folder.name for _, folder in found]:
            self.say(f"checkpoint {named}, which {LATEST!r} names, is not there")
        for step, folder in found:
            fault = check_checkpoint(folder, self.run) or foreign_content(folder)
            if fault is None:
                return step
            self.say(f"checkpoint {folder.name} is skipped: {fault}")
        return None

    def restore(self, engine: _Engine) -> int:
        """Load the newest whole checkpoint on every process; returns its step, 0 for none.

        Process 0 verifies and chooses; the others follow. Call this after everything that draws
        random numbers at construction, since the generators' states are restored too: in as many
        processes as wrote the checkpoint, each one's own; else seeded from run, step and process.

        In as many processes and the same ZeRO stage the run goes on bit for bit. In others its
        states are the same bits too, and what follows differs by the order of sums.

        Raises:
            DeclipError: the checkpoint is whole, and cannot be loaded all the same.
        """
        step = self._of_first(self._choose() if self.rank == 0 else None)
        self._newest = step
        if step is None:
            return 0
        folder = self.folder / tag_of(step)
        saved = json.loads((folder / MANIFEST).read_bytes())["made_by"]
        now = self._maker(engine)
        same_ranks = saved["world_size"] == now["world_size"]
        same_stage = saved["zero_stage"] == now["zero_stage"]
        if same_stage and (same_ranks or now["zero_stage"] == 0):
            path, _ = engine.load_checkpoint(str(self.folder), folder.name)
            if path is None:
                raise DeclipError(
                    f"DeepSpeed did not load the checkpoint {folder.name}; delete it and run again."
                )
        else:
            from declip_train.elastic import restore_states

            restore_states(engine, folder)
        of_rank = self.rank if same_ranks else 0
        state = json.loads((folder / f"rank_{of_rank:05d}.json").read_bytes())
        self.restored = state.get("loop", {})
        if same_ranks:
            restore_random_states(state["random"])
        else:
            seed_random_states(self.run, step, self.rank)
        if self.rank == 0:
            self._tell(step, saved, now)
            if not same_ranks and _normalizes_locally(engine.module):
                self.say(
                    "WARNING: batch norm is taken over the rows of each process, so losses differ "
                    "from those in as many processes as before; batch_norm synchronized has none "
                    "of that"
                )
        return step

    def _choose(self) -> int | None:
        remove_unfinished(self.folder)
        return self.newest()

    def _tell(self, step: int, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Say where the run continues, and what is not as it was."""
        change = ""
        if any(saved[name] != now[name] for name in ("world_size", "zero_stage")):
            change = (
                f", written by {_processes(saved)}, in {_processes(now)}: the same batches, and "
                "losses that are equal but for the order of sums"
            )
        self.say(f"continuing after step {step}{change}")
        if saved["backend"] != now["backend"]:
            self.say(f"WARNING: it was written under {saved['backend']}, this is {now['backend']}")
        for name, was in saved["versions"].items():
            if now["versions"].get(name) != was:
                self.say(
                    f"WARNING: the checkpoint was written with {name} {was}, this is "
                    f"{now['versions'].get(name)}: what follows may differ from a straight run"
                )


def _normalizes_locally(module: torch.nn.Module) -> bool:
    """Whether some result depends on how a batch is shared by processes."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return not all(getattr(norm, "synchronized", False) for norm in norms)


def _processes(made_by: Mapping[str, Any]) -> str:
    count = made_by["world_size"]
    return f"{count} process{'' if count == 1 else 'es'} and ZeRO stage {made_by['zero_stage']}"
