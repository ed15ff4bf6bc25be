"""``declip refetch``: fetch failed rows again, by reason, into the same dataset."""

import argparse
import contextlib
import dataclasses
import os
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

from declip_ingest import failures
from declip_ingest.refetch import PATIENCE, RefetchShards
from declip_ingest.refetch_run import (
    STEP,
    RefetchReport,
    Runner,
    find_base,
    is_unfinished,
    refetch,
)
from declip_ingest.stages import DownloadShards, stored_ingest
from declip_shards import DeclipError, Store, layout
from declip_shards.errors import did_you_mean
from pipelines import ray_runner, recipes
from pipelines.arguments import ArgumentParser
from pipelines.lock import workspace_lock
from pipelines.options import apply_overrides, field_docs, kind_name, parse_value, take_overrides
from pipelines.pipeline import Step
from pipelines.progress import Progress
from pipelines.runner import RUNNERS, check_location, tasks_here
from pipelines.stopping import stop_on_signals

PREFIX = "--ingest."
"""Settings of this command are the ingest's own."""


def build_parser() -> argparse.ArgumentParser:
    """The command's own options; ``--ingest.SETTING VALUE`` are taken before."""
    parser = ArgumentParser(
        prog="declip refetch",
        description="Fetch rows that failed again, by reason, into the same dataset.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="for runs/RECIPE, and for a recipe's own server"
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder or URL of the dataset")
    parser.add_argument(
        "--reason",
        metavar="A,B",
        required=True,
        help="reasons, families of reasons (below), passing, or all",
    )
    parser.add_argument(
        "--runner", metavar="|".join(RUNNERS), default="ray", help="where tasks run (ray)"
    )
    return parser


def may_change() -> list[str]:
    """Ingest's settings that a refetch may change: none of them changes what a picture becomes."""
    fields = dataclasses.fields(DownloadShards)
    free = [f.name for f in fields if not f.metadata.get("fingerprint", True) and f.name != "root"]
    return [f.name for f in fields if f.name in PATIENCE or f.name in free]


def _epilog() -> str:
    docs, hints = field_docs(DownloadShards), typing.get_type_hints(DownloadShards)
    known = failures.FETCH_REASONS | failures.DECODE_REASONS
    lines = ["families of reasons:"]
    for group in failures.GROUPS:
        names = [name for name, about in known.items() if about.group == group]
        lines.append(f"  {group:<12}{', '.join(names) or 'http_404 and all other codes'}")
    passing = ", ".join(sorted(failures.PASSING_REASONS))
    lines += textwrap.wrap(
        passing, 100, initial_indent=f"  {'passing':<12}", subsequent_indent=" " * 14
    )
    lines.append("\nsettings that may be changed (else those that ingest ran with):")
    for name in may_change():
        flag = f"{PREFIX}{name.replace('_', '-')} {kind_name(hints[name])}"
        lines.append(f"  {flag:<46}{docs.get(name, '')}")
    return "\n".join(lines)


def change_settings(ingest: DownloadShards, overrides: Sequence[tuple[str, str]]) -> DownloadShards:
    """The stored ingest, made more patient.

    Raises:
        DeclipError: no such setting, one that would change what is stored, or a wrong value.
    """
    hints = typing.get_type_hints(DownloadShards)
    allowed = may_change()
    changes: dict[str, Any] = {}
    for flag, text in overrides:
        name = flag.removeprefix(PREFIX).replace("-", "_")
        if name not in hints or name == "root":
            known = [PREFIX + n.replace("_", "-") for n in allowed]
            raise DeclipError(f"there is no option {flag}.{did_you_mean(flag, known)}")
        if name not in allowed:
            raise DeclipError(
                f"{flag} {text} would make the fetched rows differ from the others of the dataset; "
                "leave it out, or ingest everything anew with declip run."
            )
        changes[name] = parse_value(text, hints[name], flag)
    return dataclasses.replace(ingest, **changes)


def _service(
    recipe: str | None, root: str, overrides: Sequence[tuple[str, str]]
) -> contextlib.AbstractContextManager[object]:
    """What must run while rows are fetched: the demo's own server."""
    if recipe is None:
        if overrides:
            flag = overrides[0][0]
            raise DeclipError(
                f"{flag} is no setting of ingest; a refetch takes {PREFIX}SETTING VALUE, and other "
                "steps' settings only with the RECIPE that has them."
            )
        return contextlib.nullcontext()
    pipeline = apply_overrides(recipes.build(recipe, root), overrides)
    step = pipeline.step("ingest")
    return step.service() if step.service else contextlib.nullcontext()


def _check_version(store: Store, ingest: DownloadShards) -> None:
    """Refuse to mix pictures of two versions of the code in one dataset."""
    base = find_base(store)
    now = Step(name="ingest", stage=ingest).code_version
    if base is not None and base.code_version != now:
        raise DeclipError(
            f"{store.url!r} was ingested by {base.code_version}, and this is {now}, whose pictures "
            "may differ; use that version for the refetch, or ingest anew with declip run."
        )


def report_text(report: RefetchReport) -> str:
    """Asked, mended and still failing, by reason."""
    names = sorted({*report.asked, *report.mended, *report.still})
    width = max([len(name) for name in names] + [12]) + 2
    lines = [f"{'reason':<{width}}{'asked':>10}{'mended':>10}{'fail now':>10}"]
    tables = (report.asked, report.mended, report.still)
    for name in names:
        counts = "".join(f"{table.get(name, 0):>10,}" for table in tables)
        lines.append(f"{name:<{width}}{counts}")
    totals = "".join(f"{sum(table.values()):>10,}" for table in tables)
    lines.append(f"{'all':<{width}}{totals}")
    if report.failures:
        lines.append(f"shards that could not be done and are as they were: {len(report.failures)}")
        shown = sorted(report.failures.items())[:20]
        lines += [f"  {task}: {cause.strip()}" for task, cause in shown]
        if len(report.failures) > len(shown):
            lines.append(f"  ... and {len(report.failures) - len(shown)} more")
        lines.append("Run the same command again after mending it.")
    elif report.num_changed:
        lines.append("Steps that read the dataset are out of date now: run declip run again.")
    return "\n".join(lines)


def _root_of(arguments: argparse.Namespace) -> str:
    if arguments.out is None and arguments.recipe is None:
        raise DeclipError("which dataset? Name its folder with --out, or its recipe.")
    root = os.path.join("runs", arguments.recipe) if arguments.out is None else arguments.out
    check_location(root)
    return str(root)


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 when all asked rows were tried, 1 when shards could not be done.

    Raises:
        DeclipError: a wrong option, or no dataset there.
    """
    overrides, others = take_overrides(argv)
    arguments = build_parser().parse_args(others)
    root = _root_of(arguments)
    if arguments.runner not in RUNNERS:
        raise DeclipError(
            f"--runner is {arguments.runner!r}.{did_you_mean(arguments.runner, RUNNERS)}"
        )
    own = [pair for pair in overrides if pair[0].startswith(PREFIX)]
    reasons = tuple(name.strip() for name in arguments.reason.split(",") if name.strip())
    failures.match_reasons(reasons)
    ingest = change_settings(stored_ingest(root), own)
    stage = RefetchShards(root=root, ingest=ingest, reasons=reasons)
    service = _service(arguments.recipe, root, [pair for pair in overrides if pair not in own])
    store = Store(root)
    if not stage.tasks() and not is_unfinished(store):
        if not store.exists(layout.manifest_path("ingest")):
            with workspace_lock(store):
                pass  # refused while a first ingest is at it: it would be too early to say
        print(f"no row of {root} failed for {', '.join(reasons)}: there is nothing to fetch.")
        return 0
    _check_version(store, ingest)
    run: Runner = tasks_here
    if arguments.runner == "ray":
        ray_runner.check_shared_root(root)
        run = ray_runner.run_tasks
    with (
        stop_on_signals(),
        workspace_lock(store) as hold,
        ray_runner.shut_down_after(),
        service,
    ):
        num_tasks = len(stage.tasks())
        noun = "shard" if num_tasks == 1 else "shards"
        print(f"{STEP}: {num_tasks} {noun} with rows that failed for {', '.join(reasons)}")
        with Progress(STEP, num_tasks) as bar:
            report = refetch(stage, run, on_task=bar.advance, check=hold.check)
    print(report_text(report))
    return 1 if report.failures else 0
