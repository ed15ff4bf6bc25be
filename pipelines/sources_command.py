"""``declip sources``: what a list is, and how two lists overlap."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from declip_ingest.list_columns import ColumnNames
from declip_ingest.list_files import find_files
from declip_ingest.list_kinds import ListKind, compare_counts
from declip_ingest.list_overlap import ListKeys, Overlap, compare_lists, read_keys
from declip_ingest.list_progress import ListProgress
from declip_ingest.list_readers import ListOptions, open_list
from declip_ingest.list_rows import DROP_REASONS, FAULTS, check_pairs
from declip_ingest.sources import ColumnJudge
from declip_ingest.yfcc import CaptionRule
from declip_shards import DeclipError
from pipelines.arguments import ArgumentParser

SHOWN_WIDTH = 100
"""Characters of a value that ``show`` prints."""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip sources",
        description="Look at lists of URLs and captions (docs/sources.md names the known ones).",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser(
        "show",
        help="what a list is taken for, its rows, columns, first rows and faults",
        allow_abbrev=False,
    )
    show.add_argument("list", metavar="LIST", help="file, folder or glob; path or fsspec URL")
    show.add_argument("--rows", type=int, default=3, metavar="N", help="first rows shown (3)")
    show.add_argument("--max-rows", type=int, metavar="N", help="read no more rows than these")
    show.add_argument("--kind", choices=get_args(ListKind), default="auto", help="what it is")
    diff = commands.add_parser(
        "diff", help="how two lists overlap, by photo id, URL and hash", allow_abbrev=False
    )
    for name in ("A", "B"):
        diff.add_argument(name.lower(), metavar=name, help="file, folder or glob; path or URL")
        diff.add_argument(
            f"--kind-{name.lower()}", choices=get_args(ListKind), default="auto", help="what it is"
        )
    for command in (show, diff):
        command.add_argument(
            "--metadata", default="", metavar="A,B", help="YFCC100M's metadata, for YFCC15M V1"
        )
        command.add_argument("--url-column", default="", metavar="NAME", help="column of URLs")
        command.add_argument("--caption-column", default="", metavar="NAME", help="of captions")
        command.add_argument("--hash-column", default="", metavar="NAME", help="of hashes")
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    show.add_argument(
        "--caption-rule",
        choices=get_args(CaptionRule),
        default="title_description",
        help="how YFCC's title and description become a caption",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point; returns 0.

    Raises:
        DeclipError: a list is missing, damaged, or not what it was said to be.
    """
    given = build_parser().parse_args(argv)
    if given.command == "show":
        _show(given)
    else:
        _diff(given)
    return 0


def _options(given: argparse.Namespace, kind: str) -> ListOptions:
    columns = ColumnNames(
        url=given.url_column, caption=given.caption_column, expected_hash=given.hash_column
    )
    metadata = tuple(name for name in given.metadata.split(",") if name)
    return ListOptions(kind=kind, metadata=metadata, columns=columns)


def describe_list(
    location: str, options: ListOptions, *, num_shown: int, max_rows: int | None
) -> dict[str, Any]:
    """Read a list as ingest would, and say what is there.

    Returns:
        kind, files, bytes, rows, good rows, faults by reason, columns with their types, first rows,
        and what the published count is.
    """
    reader = open_list(location, options)
    faults: Counter[str] = Counter()
    shown: list[dict[str, Any]] = []
    num_rows = 0
    judge = ColumnJudge(location)
    with ListProgress("show", reader.num_bytes) as progress:
        for rows in reader.read(progress.add_bytes, max_rows):
            rows = check_pairs(rows)
            progress.add_rows(len(rows.faults))
            judge.look(rows)
            num_rows += len(rows.faults)
            faults.update(FAULTS[code] for code in rows.faults if code)
            if len(shown) < num_shown:
                shown += rows.table.slice(0, num_shown - len(shown)).to_pylist()
    judge.judge()
    compared = compare_counts(reader.kind, num_rows) if max_rows is None else None
    return {
        "list": location,
        "kind": reader.kind,
        "num_files": len(find_files(location)),
        "num_bytes": reader.num_bytes,
        "num_rows": num_rows,
        "is_whole": max_rows is None,
        "num_good_rows": num_rows - faults.total(),
        "faults": dict(sorted(faults.items())),
        "columns": {column.name: str(column.type) for column in reader.schema},
        "published": compared[1] if compared else None,
        "first_rows": shown,
    }


def _show(given: argparse.Namespace) -> None:
    for name in ("rows", "max_rows"):
        value = getattr(given, name)
        if value is not None and value < (0 if name == "rows" else 1):
            flag = name.replace("_", "-")
            raise DeclipError(f"--{flag} is {value}; it must be at least 1, or left out.")
    options = replace(_options(given, given.kind), caption_rule=given.caption_rule)
    about = describe_list(given.list, options, num_shown=given.rows, max_rows=given.max_rows)
    if given.json:
        print(json.dumps(about, indent=1, ensure_ascii=False, default=str))
        return
    counted = "rows" if about["is_whole"] else "rows read"
    print(f"{about['list']}\n  taken for  {about['kind']}")
    print(f"  files      {about['num_files']:,} ({about['num_bytes']:,} bytes)")
    print(f"  {counted:<11}{about['num_rows']:,}, of which {about['num_good_rows']:,} are good")
    if about["published"]:
        print(f"  published  {about['published']}")
    for reason, count in about["faults"].items():
        print(f"  dropped    {count:,} {reason}: {DROP_REASONS[reason]}")
    print("  columns    " + ", ".join(f"{name} {kind}" for name, kind in about["columns"].items()))
    for number, row in enumerate(about["first_rows"]):
        print(f"  row {number}")
        for name, value in row.items():
            if value is not None:
                text = repr(value)
                cut = text if len(text) <= SHOWN_WIDTH else text[: SHOWN_WIDTH - 3] + "..."
                print(f"    {name:<16}{cut}")


def _diff(given: argparse.Namespace) -> None:
    options = [replace(_options(given, kind), needs_pairs=False) for kind in _kinds(given)]
    a, b = (read_keys(place, o) for place, o in zip((given.a, given.b), options, strict=True))
    overlaps = compare_lists(a, b, *options)
    if given.json:
        found: dict[str, Any] = {
            name: {"list": keys.location, "kind": keys.kind, "num_rows": keys.num_rows}
            for name, keys in (("a", a), ("b", b))
        }
        found["overlaps"] = [overlap.as_json() for overlap in overlaps]
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    print(diff_text(a, b, overlaps))


def _kinds(given: argparse.Namespace) -> tuple[str, str]:
    return given.kind_a, given.kind_b


def diff_text(a: ListKeys, b: ListKeys, overlaps: Sequence[Overlap]) -> str:
    """The comparison as a table, with examples."""
    lines = [
        f"{name}  {keys.location} ({keys.kind}, {keys.num_rows:,} rows)"
        for name, keys in (("A", a), ("B", b))
    ]
    head = ("distinct", "A", "B", "both", "only A", "only B", "of A", "of B")
    lines += ["", f"{head[0]:<10}" + "".join(f"{text:>13}" for text in head[1:])]
    for o in overlaps:
        counts = (o.num_a, o.num_b, o.num_both, o.num_only_a, o.num_only_b)
        shares = (o.num_both / o.num_a, o.num_both / o.num_b)
        lines.append(
            f"{o.measure:<10}"
            + "".join(f"{count:>13,}" for count in counts)
            + "".join(f"{part:>13.2%}" for part in shares)
        )
    for o in overlaps:
        lines.append("")
        for label, values in o.examples.items():
            shown = "  ".join(values) or "-"
            lines.append(f"{o.measure} {label.replace('_', ' ')}: {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
