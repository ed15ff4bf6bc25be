"""``declip compare``: is one model better than another, and is that settled?"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from declip_shards import DeclipError
from pipelines.arguments import ArgumentParser
from pipelines.compare_results import LEVEL, Comparison, Contest, compare
from pipelines.stored_results import StoredResult, load_results, only_model
from pipelines.table_command import write_text

MIN_RESAMPLES, MAX_RESAMPLES = 100, 100_000


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip compare",
        description="Compare two models query by query on the datasets that both were evaluated "
        "on: exact McNemar test or paired bootstrap, corrected by Holm's method for the number of "
        "datasets.",
        epilog="The tests read the outcomes that declip eval writes beside each result.",
    )
    parser.add_argument("a", metavar="A", help="folder or file of the first model's results")
    parser.add_argument("b", metavar="B", help="folder or file of the second model's results")
    parser.add_argument("--model-a", metavar="NAME", help="which model, where A holds several")
    parser.add_argument("--model-b", metavar="NAME", help="which model, where B holds several")
    parser.add_argument(
        "--metric",
        choices=("main", "all"),
        default="main",
        metavar="main|all",
        help="the number that papers print of a dataset, or all that both have (main)",
    )
    parser.add_argument(
        "--without-overlap",
        action="store_true",
        help="test on the samples alone that neither model's training data holds",
    )
    parser.add_argument(
        "--force", action="store_true", help="compare results of different data, too"
    )
    parser.add_argument(
        "--num-resamples",
        type=int,
        default=2_000,
        metavar="N",
        help="of the paired bootstrap (2000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the paired bootstrap (0)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write a page with pictures there")
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point; returns 0 whatever the answer is.

    Raises:
        DeclipError: results that are not there, do not compare or contradict their outcomes, or a
            wrong option.
    """
    given = build_parser().parse_args(list(argv))
    if not MIN_RESAMPLES <= given.num_resamples <= MAX_RESAMPLES:
        raise DeclipError(
            f"--num-resamples is {given.num_resamples}; it must lie between {MIN_RESAMPLES} and "
            f"{MAX_RESAMPLES:,}."
        )
    if given.seed < 0:
        raise DeclipError(f"--seed is {given.seed}; it must be 0 or more.")
    side_a = _side(given.a, given.model_a, "--model-a")
    side_b = _side(given.b, given.model_b, "--model-b")
    if {stored.path.resolve() for stored in side_a} & {stored.path.resolve() for stored in side_b}:
        raise DeclipError(
            f"A and B are the same results, of {side_a[0].model!r}; name two models' results."
        )
    contest = compare(
        side_a,
        side_b,
        all_metrics=given.metric == "all",
        force=given.force,
        without_overlap=given.without_overlap,
        seed=given.seed,
        num_resamples=given.num_resamples,
    )
    if contest.model_a == contest.model_b:
        # Two runs of one recipe call their models alike.
        contest = replace(
            contest,
            model_a=f"{contest.model_a} of {given.a}",
            model_b=f"{contest.model_b} of {given.b}",
        )
    if given.html:
        from pipelines.eval_pages import compare_page

        write_text(given.html, compare_page(contest, side_a, side_b))
    if given.json:
        print(json.dumps(contest.to_json(), indent=2, sort_keys=True, ensure_ascii=False))
    else:
        print(contest_text(contest))
        if given.html:
            print(f"\nPage: {Path(given.html)}")
    return 0


def _side(place: str, wanted: str | None, option: str) -> list[StoredResult]:
    results = load_results([place])
    model = only_model(results, wanted, option)
    return [stored for stored in results if stored.model == model]


def contest_rows(contest: Contest) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison as text, percent of 100."""
    columns = ["task", "dataset", "metric", "A", "B", "B - A", "95% interval", "p", "p (Holm)",
               "only A", "only B", "verdict"]  # fmt: skip
    return columns, [_cells(item) for item in contest.comparisons]


def _cells(item: Comparison) -> list[str]:
    interval = item.interval
    return [
        item.task,
        item.dataset,
        item.metric,
        f"{100 * item.value_a:.2f}",
        f"{100 * item.value_b:.2f}",
        f"{100 * item.difference:+.2f}",
        "-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}",
        p_text(item.p_value),
        p_text(item.p_adjusted),
        "-" if item.num_only_a is None else f"{item.num_only_a:,}",
        "-" if item.num_only_b is None else f"{item.num_only_b:,}",
        item.verdict,
    ]


def p_text(p_value: float | None) -> str:
    """A p-value in few digits, never as 0."""
    if p_value is None:
        return "-"
    return "<0.0001" if p_value < 1e-4 else f"{p_value:.4f}"


def closing_lines(contest: Contest) -> list[str]:
    """What it comes to, and what has to be known beside it, in sentences."""
    counts = contest.counts()
    num = sum(counts.values())
    settled = num - counts["not tested"]
    lines = [
        f"Of {num} {'dataset' if num == 1 else 'datasets and tasks'}, B is better on "
        f"{counts['B better']}, A on {counts['A better']}, "
        f"{counts['not settled']} are not settled (Holm over {settled}, level {LEVEL:g}), "
        f"{counts['not tested']} could not be tested."
    ]
    if contest.without_overlap and settled:
        lines.append("Tested without the samples that either model's training data holds.")
    notes: dict[str, list[str]] = {}
    for item in contest.comparisons:
        if item.is_main or not any(i.is_main and i.dataset == item.dataset and i.task == item.task
                                   for i in contest.comparisons):  # fmt: skip
            for note in [*item.differs, *([f"no test: {item.untested}"] if item.untested else [])]:
                places = notes.setdefault(note, [])
                place = f"{item.dataset} ({item.task})"
                if place not in places:
                    places.append(place)
    for note, places in notes.items():
        told = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        lines.append(f"{told}: {note}")
    for side, only in (("A", contest.only_a), ("B", contest.only_b)):
        if only:
            lines.append(f"Only {side} has {', '.join(only)}.")
    lines += [f"Not compared: {told}." for told in contest.unmatched]
    return lines


def contest_text(contest: Contest) -> str:
    """The comparison as aligned text."""
    columns, rows = contest_rows(contest)
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text_columns = (0, 1, 2, len(columns) - 1)
    body = [
        "  ".join(
            cell.ljust(width) if i in text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    head = [f"A: {contest.model_a}", f"B: {contest.model_b}", ""]
    return "\n".join([*head, *body, "", *closing_lines(contest)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
