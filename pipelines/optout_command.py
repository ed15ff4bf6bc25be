"""``declip optout``: take what somebody asks to have removed out of a dataset, and prove it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from declip_shards import DeclipError, Store
from declip_shards.manifest import canonical_json
from declip_shards.optout import KINDS, make_optout
from declip_shards.store import atomic_write
from pipelines.arguments import ArgumentParser
from pipelines.optout import Outcome, opt_out, plan_only
from pipelines.optout_list import Entry, read_list
from pipelines.optout_plan import Plan
from pipelines.runner import check_location

SHOWN = 10
"""Entries of a list that the terminal names."""


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="declip optout",
        description="Remove samples from a dataset: shards, signals, selection, embeddings, index, "
        "neighbor tables; search every file for them; and let later ingests honor the list.",
        epilog="A model cannot be made to forget: the report says which trainings had seen them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "list",
        metavar="LIST",
        help="URLs, keys or hashes: text (one a line), CSV, JSON lines or parquet with columns "
        "url, key, sha256 or md5; - for standard input",
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder of the dataset")
    parser.add_argument(
        "--kind",
        default="auto",
        metavar="|".join(("auto", *KINDS)),
        help="what the entries are (auto: told by their form)",
    )
    parser.add_argument("--column", metavar="NAME", help="the list's column, if of another name")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be removed; write nothing"
    )
    parser.add_argument("--report", metavar="FILE", help="write the proof to this file, too")
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip optout``; returns the exit status.

    It is 0 also where some file still names a sample: the places are listed, and those that are
    left are not ours to change.

    Raises:
        DeclipError: a wrong list or folder.
    """
    arguments = build_parser().parse_args(list(argv))
    check_location(arguments.out)
    store = Store(arguments.out)
    entries = read_list(arguments.list, kind=arguments.kind, column=arguments.column)
    if arguments.dry_run:
        if arguments.report:
            raise DeclipError("--report is of a removal, and --dry-run removes nothing; drop one.")
        print("\n".join(plan_lines(plan_only(store, entries), entries)))
        return 0
    outcome = opt_out(store, entries)
    print("\n".join(outcome_lines(outcome, entries)))
    for proof in outcome.repacked:
        print(f"Also removed from what was repacked: {proof}")
    if arguments.report:
        atomic_write(Path(arguments.report), canonical_json(outcome.report))
    return 0


def plan_lines(plan: Plan, entries: Sequence[Entry]) -> list[str]:
    """What a dry run says."""
    num_stored = sum(sample.was_stored for sample in plan.removed)
    return [
        f"{len(entries)} entries, {len(plan.matched)} matched.",
        f"Would remove {num_stored} samples and {len(plan.removed) - num_stored} failed rows from "
        f"{len(plan.touched)} shards: {_some(sorted(plan.keys))}.",
        *_training_lines([vars(run) for run in plan.trainings]),
        "Nothing was written (--dry-run).",
    ]


def outcome_lines(outcome: Outcome, entries: Sequence[Entry]) -> list[str]:
    """What the terminal says of an opt-out."""
    report = outcome.report
    lines = []
    if outcome.was_cut_short:
        lines.append("An opt-out that had been cut short was brought to its end first.")
    if not outcome.is_changed:
        lines.append("Nothing to do: this list was applied before; no file was changed.")
    removed, listed = report["removed"], report["list"]
    lines.append(
        f"{len(entries)} entries, {listed['matched']} matched: {removed['samples']} samples and "
        f"{removed['rows'] - removed['samples']} failed rows removed."
    )
    missing = {(row["kind"], row["digest"]) for row in listed["unmatched"]}
    unmatched = [
        (kind, value)
        for kind, value in entries
        if make_optout([(kind, value)]).pairs()[0] in missing
    ]
    for values, what in (
        ([v for kind, v in unmatched if kind != "key"], "later ingests leave them out"),
        ([v for kind, v in unmatched if kind == "key"], "keys, which later ingests do not know"),
    ):
        if values:
            lines.append(f"{len(values)} matched no row ({what}): {_some(values)}.")
    lines.append(f"\n{'artefact':<26}{'':<11}{'before':>12}{'after':>12}")
    for artefact, counts in report["artefacts"].items():
        for what, (before, after) in counts.items():
            lines.append(f"{artefact:<26}{what:<11}{before:>12,}{after:>12,}")
    return [
        *lines,
        "",
        *_search_lines(report["search"]),
        *_training_lines(report["trainings"]),
        f"Proof: {outcome.path}",
    ]


def _search_lines(search: dict[str, Any]) -> list[str]:
    needles = ", ".join(f"{number} of {what}s" for what, number in search["needles"].items())
    num_hits, num_shared = sum(hit["count"] for hit in search["hits"]), search["shared"]
    lines = [
        f"Searched {search['files']:,} files ({search['bytes']:,} bytes) for "
        f"{needles or 'nothing'}: {num_hits} hits.",
        *(
            f"  {hit['path']} ({hit['where']}): {hit['count']} x {hit['what']}: {hit['why']}"
            for hit in search["hits"]
        ),
    ]
    if num_shared:
        lines.append(
            f"Not searched for: {num_shared} captions, URLs or digests that other samples, which "
            "stay, have too."
        )
    return lines


def _training_lines(trainings: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for run in trainings:
        what = "The training" if run["is_finished"] else "The unfinished training"
        num_seen, num_near = len(run["keys"]), len(run["neighbor_keys"])
        if num_seen or num_near:
            lines.append(
                f"{what} of step {run['step']!r} had seen {num_seen} of the samples, and "
                f"{num_near} as neighbors. A model cannot be made to forget: train again without "
                "them, or withdraw it."
            )
        else:
            lines.append(f"{what} of step {run['step']!r} had seen none of the samples.")
    return lines


def _some(values: Sequence[str]) -> str:
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return (", ".join(values[:SHOWN]) or "none") + more
