"""Write the kept samples into shards of nearly one size: a dataset of its own in the workspace.

    repacked/NAME/shards/00000.tar .parquet _stats.json   balanced to within one sample
    repacked/NAME/shards/sizes.json                       samples of each tar, for open_clip
    repacked/NAME/signals/ selection/ embeddings/ index/ neighbors/    carried over by key
    repacked/NAME/manifests/                              what of it needs not be made again
    repacked/NAME/repack.json                             whether it is finished

Members are copied as the bytes they are, headers and all, so pictures, captions, keys and metadata
are untouched; a table has the rows of the kept samples with all of their columns. Keys stay, so a
key no longer says in which shard its sample lies.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from declip_filter.limits import require_between, require_folder_name
from declip_filter.repack_carry import carry_whole
from declip_filter.repack_plan import (
    CARRIED,
    RepackPlan,
    check_space,
    estimate_bytes,
    inputs_digest,
    known_digests,
    plan_repack,
    replaced_bytes,
    size_text,
    target_folder,
    target_store,
)
from declip_filter.repack_state import (
    REMEDY,
    begin,
    finish,
    is_repacked,
    read_state,
    repack_digest,
    require_finished,
)
from declip_filter.repack_tables import (
    CarriedSets,
    carried_sets,
    embedding_files,
    shard_rows,
    table_files,
)
from declip_filter.repack_tars import check_digest, copy_samples
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.errors import did_you_mean
from declip_shards.manifest import settings_of
from declip_shards.optout import PENDING

_log = logging.getLogger(__name__)
_SHARD_FILE = re.compile(r"([0-9]{5,})(?:\.tar|\.tar\.idx|\.parquet|_stats\.json)")


@dataclass(frozen=True, kw_only=True)
class RepackShards:
    """Copy the kept samples into balanced shards, an output shard a task."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    selection: str = "default"
    """Selection whose kept samples are copied; empty: every downloaded sample."""
    name: str = "selected"
    """Name of the repacked dataset: it goes to repacked/NAME/."""
    shard_size: int = 10_000
    """Most samples of an output shard."""
    carry: tuple[str, ...] = CARRIED
    """What is carried over: signals, selection, embeddings, index, neighbors; empty: nothing."""
    inputs_sha256: str = ""
    """Digest of what is read that the run was planned for; another one is refused."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        if self.selection:
            require_folder_name("selection", self.selection)
        require_folder_name("name", self.name)
        require_between("shard_size", self.shard_size, 1, remedy="Try 10000.")
        for folder in self.carry:
            if folder not in CARRIED:
                raise DeclipError(
                    f"carry has {folder!r}, which is nothing beside the shards."
                    f"{did_you_mean(folder, CARRIED)}"
                )
        if "index" in self.carry and "embeddings" not in self.carry:
            raise DeclipError(
                "carry has 'index' without 'embeddings', of which the index is; add 'embeddings' "
                "or leave 'index' out."
            )

    def tasks(self) -> Sequence[str]:
        """The output shards; says first how much will be written.

        Raises:
            DeclipError: nothing is kept, or the disk has less space than it takes.
        """
        store = Store(self.root)
        plan = plan_repack(store, self.selection, self.shard_size)
        target = target_store(store, self.name)
        # What another repack left is deleted before this one begins: none of it counts.
        is_own = read_state(target)[1] == repack_digest(plan, _settings(self))
        left = [output for output in plan.outputs if not (is_own and self.is_done(output))]
        if left:
            num_left = sum(plan.num_in(output) for output in left)
            total = estimate_bytes(store, plan, self.carry)
            needed = round(total * num_left / plan.num_samples)
            print(
                f"repack: {num_left:,} samples into {len(left)} shards of "
                f"{target_folder(self.name)}/, about {size_text(needed)} to write",
                file=sys.stderr,
                flush=True,
            )
            check_space(store, self.name, needed, 0 if is_own else replaced_bytes(target))
        return plan.outputs

    def is_done(self, task: str) -> bool:
        return self.is_written(task)

    def is_written(self, output: str) -> bool:
        """Whether an output shard stands; its stats file is written last."""
        path = f"{target_folder(self.name)}/{layout.shard_stats_path(output)}"
        return Store(self.root).exists(path)

    def worker(self) -> Callable[[str], TaskStats]:
        store, plan, sets = open_repack(self)
        digests = known_digests(store)
        begin(target_store(store, self.name), repack_digest(plan, _settings(self)))
        return lambda task: repack_shard(self, store, plan, sets, digests, task)

    def sweep(self, tasks: Sequence[str]) -> None:
        """Remove what a killed run of other settings left: shards that are none of these."""
        target = target_store(Store(self.root), self.name)
        known = set(tasks)
        for name in target.list("shards"):
            match = _SHARD_FILE.fullmatch(name)
            if match and match[1] not in known:
                target.remove(f"shards/{name}")


def _settings(stage: RepackShards) -> dict[str, Any]:
    """The settings that are a repack's own; its owner and its follower have the same."""
    return settings_of(stage, hashed_only=True)


def open_repack(settings: RepackShards) -> tuple[Store, RepackPlan, CarriedSets]:
    """The dataset, the plan and what is carried over, checked to be what the run was planned for.

    Raises:
        DeclipError: an opt-out was cut short, or the dataset has changed since.
    """
    store = Store(settings.root)
    if store.exists(PENDING):
        raise DeclipError(
            f"an opt-out of {store.url!r} was cut short, so samples that must go are still there; "
            "run declip optout again first."
        )
    if settings.inputs_sha256:
        found = inputs_digest(store, settings.selection, settings.carry)
        if found != settings.inputs_sha256:
            raise DeclipError(
                f"inputs_sha256 is {settings.inputs_sha256[:12]}..., but the dataset is "
                f"{found[:12]}... now: it was changed after the run was planned; run it again."
            )
    plan = plan_repack(store, settings.selection, settings.shard_size)
    return store, plan, carried_sets(store, plan, settings.carry)


def repack_shard(
    settings: RepackShards,
    store: Store,
    plan: RepackPlan,
    sets: CarriedSets,
    digests: dict[str, str],
    output: str,
) -> TaskStats:
    """Write one output shard and what lies beside it; its stats file, the mark of done, last.

    Args:
        digests: path -> sha256, as the manifests of the input have them; a tar of another one is
            refused.
    """
    pieces, folder = list(plan.pieces(output)), target_folder(settings.name)
    for piece in pieces:
        path = layout.tar_path(piece.shard)
        check_digest(store, path, digests.get(path, ""))
    files: dict[str, bytes | bytearray] = {**table_files(store, plan, sets, output)}
    for name in sets.embeddings:
        files |= embedding_files(store, plan, name, output)
    rows = shard_rows(store, pieces)
    num = plan.num_in(output)
    stats = {
        "count": num,
        "successes": num,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": num},
    }
    files[layout.shard_parquet_path(output)] = sidecars.pack_table(rows)
    files[layout.tar_path(output)] = copy_samples(store, pieces)
    files[layout.shard_stats_path(output)] = json.dumps(stats, indent=2, sort_keys=True).encode()
    for path, data in files.items():
        store.write_bytes(f"{folder}/{path}", data)
    return TaskStats(num_in=num, num_out=num, files=[f"{folder}/{path}" for path in files])


@dataclass(frozen=True, kw_only=True)
class CarryWhole(RepackShards):
    """Finish a repacked dataset: its sizes, its index, and manifests of what is carried over."""

    def tasks(self) -> Sequence[str]:
        return ("all",)

    def is_done(self, task: str) -> bool:
        return is_repacked(target_store(Store(self.root), self.name))

    def worker(self) -> Callable[[str], TaskStats]:
        store, plan, sets = open_repack(self)
        folder, target = target_folder(self.name), target_store(store, self.name)
        digest = repack_digest(plan, _settings(self))

        def run(task: str) -> TaskStats:
            if read_state(target)[1] != digest:
                raise DeclipError(
                    f"the shards of {folder}/ are none, or of other settings; run the stage that "
                    "repacks first."
                )
            for output in plan.outputs:
                if not self.is_written(output):
                    raise DeclipError(
                        f"{folder}/ lacks shard {output}; run the stage that repacks first."
                    )
            files = carry_whole(store, target, plan, sets)
            finish(target, digest)
            for name in sets.left_out:
                _log.warning("repack: %s is not carried over: it does not cover every shard", name)
            return TaskStats(
                num_in=plan.num_samples,
                num_out=plan.num_samples,
                files=[f"{folder}/{path}" for path in files],
                extra={"num_shards": len(plan.outputs), "left_out": ", ".join(sets.left_out)},
            )

        return run

    def sweep(self, tasks: Sequence[str]) -> None:
        """Nothing is left behind: the shards are the other stage's."""


@dataclass(frozen=True, kw_only=True)
class CheckRepacked:
    """Vouch for the shards of a repacked dataset, whose samples were copied and not downloaded."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Folder of the repacked dataset, any fsspec URL."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def tasks(self) -> Sequence[str]:
        return ("all",)

    def is_done(self, task: str) -> bool:
        return True

    def worker(self) -> Callable[[str], TaskStats]:
        """Hold the tables against sizes.json; no file is listed, so that none is ever removed."""
        store = Store(self.root)

        def run(task: str) -> TaskStats:
            sizes = require_finished(store)
            total = 0
            for shard in layout.list_shards(store):
                path = layout.shard_parquet_path(shard)
                num_rows = sidecars.num_rows(store, path)
                statuses = sidecars.read_table(store, path, ["status"]).column(0).to_pylist()
                num = statuses.count("success")
                # An opt-out empties rows and leaves them, be it told to sizes.json or not.
                is_known = num <= sizes[f"{shard}.tar"] <= num_rows
                if not is_known or not store.exists(layout.tar_path(shard)):
                    raise DeclipError(
                        f"shard {shard} in {store.url!r} is not the one of 'shards/sizes.json'; "
                        f"{REMEDY}."
                    )
                total += num
            return TaskStats(num_in=total, num_out=total)

        return run
