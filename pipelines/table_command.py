"""``declip table``: models by datasets, from result files, beside the numbers of papers."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from declip_eval.dataset_table import list_suites
from declip_eval.published_results import published_results
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from declip_shards.store import atomic_write
from pipelines.arguments import ArgumentParser
from pipelines.eval_cells import TaskTable, read_failures, task_tables
from pipelines.stored_results import StoredResult, load_results
from pipelines.table_text import aligned_text, csv_text, markdown_text

FORMATS = ("text", "markdown", "csv", "html")
MAX_PICTURES = 200
"""Of each result: every picture is inside the one file."""


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip table",
        description="Arrange results in a table a task: a row a model, a column a dataset.",
        epilog="An average is given only where no cell is missing. Numbers are percent, in CSV "
        "fractions of 1.",
    )
    parser.add_argument(
        "places",
        metavar="RESULTS",
        nargs="+",
        help="folders or files of results, ours or CLIP_benchmark's",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        metavar="|".join(FORMATS),
        help="text; markdown; csv, as CLIP_benchmark's build makes it; html, with charts and "
        "pictures (text)",
    )
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help=f"show all datasets of a suite, missing ones too: {', '.join(list_suites())}",
    )
    parser.add_argument(
        "--metric",
        choices=("main", "all"),
        default="main",
        metavar="main|all",
        help="the number that papers print of a dataset, or all that were measured (main)",
    )
    parser.add_argument(
        "--published", action="store_true", help="add the numbers of papers, with their sources"
    )
    parser.add_argument(
        "--published-data",
        metavar="NAME",
        help="add those of models trained on that alone, such as YFCC15M-V2",
    )
    parser.add_argument("--out", metavar="FILE", help="write there (else: to the terminal)")
    parser.add_argument(
        "--pictures", type=int, default=16, metavar="N", help="of each result, in html (16)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point; returns 0.

    Raises:
        DeclipError: there are no such results, they contradict each other, or an option is wrong.
    """
    given = build_parser().parse_args(list(argv))
    if not 0 <= given.pictures <= MAX_PICTURES:
        raise DeclipError(
            f"--pictures is {given.pictures}; it must lie between 0 and {MAX_PICTURES}: every "
            "picture is inside the one file."
        )
    known = list(dict.fromkeys(item.data for item in published_results()))
    if given.published_data is not None and given.published_data not in known:
        near = did_you_mean(given.published_data, known)
        raise DeclipError(f"--published-data is {given.published_data!r}.{near}")
    if given.format == "html" and given.out is None:
        raise DeclipError("--format html makes a file; name it with --out.")
    results = load_results(given.places)
    tables = task_tables(
        results,
        suite=given.suite,
        all_metrics=given.metric == "all",
        published=given.published or given.published_data is not None,
        published_data=given.published_data,
        failures=read_failures(
            [folder for place in given.places for folder in _folders(place)], results
        ),
    )
    text = _render(given.format, results, tables, given.pictures)
    if given.out is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        write_text(given.out, text)
        print(f"Table of {len(results)} results: {given.out}", file=sys.stderr)
    return 0


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file at once or not at all.

    Raises:
        DeclipError: its folder is not there, or it is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise DeclipError(f"{str(target)!r} is a folder; name a file.")
    if not target.parent.is_dir():
        raise DeclipError(f"the folder {str(target.parent)!r} is not there; make it first.")
    atomic_write(target, text.encode())


def _folders(place: str) -> list[Path]:
    path = Path(place)
    return [path, path / "eval"] if path.is_dir() else []


def _render(
    form: str, results: Sequence[StoredResult], tables: Sequence[TaskTable], pictures: int
) -> str:
    if form == "html":
        from pipelines.eval_pages import table_page

        return table_page(results, tables, num_pictures=pictures)
    if form == "csv":
        return csv_text(results, tables)
    if form == "markdown":
        return markdown_text(tables)
    return aligned_text(tables, width=shutil.get_terminal_size((120, 40)).columns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
