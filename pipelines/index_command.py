"""``declip index``: look at an index, append new shards to it, hand one on without some samples."""

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from declip_filter.growth import (
    Growth,
    copy_without,
    missing_shards,
    publish_growth,
    stage_append,
)
from declip_filter.index import BuildIndex, FillIndex, TrainIndex
from declip_filter.index_files import check_sizes, info_path, read_info
from declip_shards import DeclipError, Store, layout, manifest, rewrite
from declip_shards.errors import did_you_mean
from declip_shards.manifest import FileRecord, Manifest, Receipt, canonical_json
from pipelines.arguments import ArgumentParser
from pipelines.lock import workspace_lock
from pipelines.rechain import read_manifests
from pipelines.runner import check_location
from pipelines.task_end import size_text

STAGES: dict[str, type[BuildIndex]] = {
    kind.__name__: kind for kind in (TrainIndex, FillIndex, BuildIndex)
}
"""Stages whose files an append keeps or replaces."""


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="declip index",
        description="Look at the indexes of a dataset, let one grow, or hand one on.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="type, rows, recall, and what it lacks")
    append = commands.add_parser(
        "append",
        help="add the shards that were embedded since, without training again",
        description="Add the shards that the embeddings have and the index lacks. Its centroids "
        "stay; recall is measured again over all rows, and below the target nothing is changed.",
    )
    remove = commands.add_parser(
        "remove",
        help="write a copy of an index without some samples, to serve or hand on",
        description="Write a copy of an index without some samples, to serve or hand on. Dataset "
        "and index stay as they are: to take samples out of all that was made of them, give the "
        "list to declip optout.",
    )
    remove.add_argument("list", metavar="LIST", help="text file of keys, one a line")
    remove.add_argument("--to", metavar="NAME", required=True, help="name of the new index")
    append.add_argument(
        "--max-nprobe",
        metavar="N",
        type=int,
        help="lists (of a graph, nodes: efSearch) that a search may come to look through for the "
        "recall target (as many as now)",
    )
    for command in (info, append, remove):
        command.add_argument("--out", metavar="FOLDER", required=True, help="folder of the dataset")
        command.add_argument(
            "--name",
            metavar="NAME",
            default=None if command is info else "captions",
            help="which index" + (" (all)" if command is info else " (captions)"),
        )
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip index``; returns the exit status.

    Raises:
        DeclipError: a wrong option, no such index, or what the command refuses.
    """
    arguments = build_parser().parse_args(list(argv))
    check_location(arguments.out)
    store = Store(arguments.out)
    names = _names(store, arguments.name)
    if arguments.command == "info":
        return _show(store, names)
    (name,) = names
    if arguments.command == "append":
        if arguments.max_nprobe is not None and arguments.max_nprobe < 1:
            raise DeclipError(f"--max-nprobe is {arguments.max_nprobe}; it must be at least 1.")
        print("\n".join(growth_lines(append(store, name, max_nprobe=arguments.max_nprobe))))
        return 0
    keys = _read_keys(arguments.list)
    with workspace_lock(store):
        num = copy_without(store, name, arguments.to, keys)
    left = read_info(store, arguments.to)["nb vectors"]
    print(
        f"index {arguments.to!r}: {num:,} rows left out, {left:,} remain. The dataset keeps them:"
    )
    print(f"to remove them from it, too: declip optout {arguments.list} --out {arguments.out}")
    return 0


def _names(store: Store, name: str | None) -> list[str]:
    known = [n for n in store.list_folders("index") if store.exists(info_path(n))]
    if not known:
        raise DeclipError(f"{store.url!r} has no index; run the index stage first.")
    if name is None:
        return known
    if name not in known:
        raise DeclipError(f"{store.url!r} has no index {name!r}.{did_you_mean(name, known)}")
    return [name]


def _read_keys(name: str) -> set[str]:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeclipError(f"{name!r} cannot be read as a text of keys ({error}).") from error
    keys = {line.strip() for line in lines} - {""}
    if not keys:
        raise DeclipError(f"{name!r} names no key; write one a line.")
    return keys


def _show(store: Store, names: Sequence[str]) -> int:
    """Print what is said of indexes; 1 where a file of one is missing or damaged, else 0.

    A damaged one does not hide the others.
    """
    told, status = [], 0
    for name in names:
        lines = []
        try:
            lines = info_lines(store, name)
            check_sizes(store, name, read_info(store, name))
        except DeclipError as error:
            lines, status = [*(lines[:1] or [name]), f"  DAMAGED: {error}", *lines[1:]], 1
        told.append("\n".join(lines))
    print("\n\n".join(told))
    return status


def info_lines(store: Store, name: str) -> list[str]:
    """What the terminal says of an index."""
    info = read_info(store, name)
    low, high = info["recall@10 interval"]
    lines = [
        f"{name}: {info['index_key']} {info['index_param']}".rstrip(),
        f"  rows      {info['nb vectors']:,} x {info['vectors dimension']} ({info['kind']}), "
        f"{size_text(info['size in bytes'])}, compression {info['compression ratio']:g}",
        f"  recall@10 {info['recall@10']:.4f} ({low:.4f} to {high:.4f}) on {info['num_queries']} "
        f"queries, target {info['recall_target']:g}",
        f"  encoder   {info['encoder']}, embeddings {info['embeddings']!r}",
    ]
    for entry, what in (("trained as", "trained on"), ("built as", "recall measured on")):
        if entry in info:
            lines.append(f"  {what} {info[entry]['nb vectors']:,} rows")
    if "copy of" in info:
        return [*lines, f"  a copy of {info['copy of']['name']!r} without some samples"]
    try:
        missing = missing_shards(store, name)
    except DeclipError as error:
        return [*lines, f"  {error}"]
    if missing:
        lines.append(
            f"  {len(missing)} shards are embedded and not in it ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}): declip index append --out {store.url}"
        )
    return lines


def append(store: Store, name: str, *, max_nprobe: int | None = None) -> Growth:
    """Append under the workspace's lock, and sign the manifests of the index for what it is now.

    Raises:
        DeclipError: another run holds the folder, or the index cannot grow.
    """
    with workspace_lock(store):
        rewrite.recover(store)
        growth = stage_append(store, name, max_nprobe=max_nprobe)
        if growth.transaction:
            publish_growth(store, growth, signed_manifests(store, growth))
    return growth


def signed_manifests(store: Store, growth: Growth) -> dict[str, bytes]:
    """Receipts and manifests of the stages that made the index, as of a build of what it is now.

    Each then names the manifests that it would read, so nothing of it runs again; what reads the
    index does. A step that was out of date before, or is not of this index, stays as it is.

    Args:
        store: the dataset.
        growth: whose files still wait to be moved.
    """
    result: dict[str, bytes] = {}
    new_digests: dict[str, str] = {}
    for step, last in read_manifests(store).items():
        if last.stage not in STAGES or last.settings.get("name") != growth.name:
            continue
        receipts = manifest.read_receipts(store, step)
        stage = STAGES[last.stage](root=store.url, **last.settings)
        old = manifest.fingerprint(stage, last.code_version, last.inputs)
        current = {n: new_digests.get(n) or manifest.manifest_digest(store, n) for n in last.inputs}
        inputs = {n: digest for n, digest in current.items() if digest is not None}
        is_whole = len(receipts) == last.num_tasks and all(
            receipt.fingerprint == last.fingerprint for receipt in receipts.values()
        )
        if old != last.fingerprint or not is_whole or len(inputs) != len(last.inputs):
            continue
        digest = manifest.fingerprint(stage, last.code_version, inputs)
        fresh = [
            _signed(store, receipt, digest, growth if last.stage == "BuildIndex" else None)
            for receipt in receipts.values()
        ]
        for receipt in fresh:
            path = layout.receipt_path(step, receipt.task)
            result[path] = canonical_json(dataclasses.asdict(receipt))
        summed = _manifest(step, stage, last, inputs, fresh)
        result[layout.manifest_path(step)] = summed
        new_digests[step] = _sha256(summed)
    return result


def _signed(store: Store, receipt: Receipt, digest: str, growth: Growth | None) -> Receipt:
    """The receipt under another fingerprint; of the index itself with its new files."""
    receipt = dataclasses.replace(receipt, fingerprint=digest)
    if growth is None:
        return receipt
    waiting = {
        path: f"{rewrite.FOLDER}/{growth.transaction}/{number:05d}"
        for number, path in enumerate(growth.files)
    }
    records = [
        FileRecord(path=path, size=store.size(place), sha256=store.sha256(place))
        for path, place in sorted(waiting.items())
    ]
    num = growth.num_before + growth.num_added
    shown = {name: growth.info[name] for name in receipt.extra if name in growth.info}
    return dataclasses.replace(
        receipt, num_in=num, num_out=num, files=records, extra={**receipt.extra, **shown}
    )


def _manifest(
    step: str, stage: Any, last: Manifest, inputs: dict[str, str], receipts: Sequence[Receipt]
) -> bytes:
    summed = manifest.build_manifest(
        step=step,
        stage=stage,
        code_version=last.code_version,
        inputs=inputs,
        receipts=receipts,
    )
    return canonical_json(dataclasses.asdict(summed))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def growth_lines(growth: Growth) -> list[str]:
    """What the terminal says of an append."""
    if not growth.num_added:
        return [f"index {growth.name!r} has every shard that is embedded: nothing to append."]
    assert growth.recall is not None
    low, high = growth.recall.interval
    total = growth.num_before + growth.num_added
    lines = [
        f"index {growth.name!r} ({growth.index_key}): {growth.num_added:,} rows of "
        f"{len(growth.shards)} shards appended, {total:,} in all.",
        f"recall@10 {growth.recall.recall:.4f} ({low:.4f} to {high:.4f}), before "
        f"{growth.recall_before:.4f}.",
    ]
    if growth.effort != growth.effort_before:
        what = "nodes" if growth.index_key.startswith("HNSW") else "lists"
        lines.append(f"Searches look through {growth.effort} {what} now ({growth.effort_before}).")
    lines.append("What reads the index is out of date now: run declip run again.")
    return lines
