"""The table of results as Markdown, aligned text, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pipelines.eval_cells import Cell, Row, TaskTable
from pipelines.markdown_text import markdown_table, plain
from pipelines.stored_results import StoredResult, overlap_text

PUBLISHED_MARK = "published: "
_IDENTITY = ("dataset", "language", "model", "pretrained", "task", "model_fullname")
"""Columns of CLIP_benchmark's table beside the metrics."""
_EXTRA = ("status", "num_samples", "main_metric", "main_value", "main_low", "main_high", "note")
"""Ours, behind them."""


def cell_text(cell: Cell) -> str:
    """A percentage, or why there is none."""
    if cell.value is None:
        return "-" if cell.status == "unknown" else cell.status
    return f"{100 * cell.value:.1f}"


def average_text(table: TaskTable, row: Row) -> str:
    """The average where nothing is missing, else how much is there."""
    if row.average is not None:
        return f"{100 * row.average:.1f}"
    return f"{row.num_there} of {len(table.columns)}"


def row_name(row: Row) -> str:
    """A model's name; published numbers are marked as such."""
    return PUBLISHED_MARK + row.model if row.is_published else row.model


def notes_of(table: TaskTable) -> list[str]:
    """What must be said under a table, in sentences."""
    notes = [f"Percent of 100{_metrics(table)}."]
    if table.has_average:
        notes.append("An average is given where no cell is missing.")
    if table.num_missing:
        cells = "cell" if table.num_missing == 1 else "cells"
        notes.append(f"{table.num_missing} {cells} of measured models without a number.")
    digests: dict[str, set[str]] = {}
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell.stored is not None and cell.stored.data_digest:
                digests.setdefault(column.dataset, set()).add(cell.stored.data_digest)
    mixed = [name for name, found in digests.items() if len(found) > 1]
    if mixed:
        notes.append(
            f"The models were evaluated on different data of {', '.join(mixed)}: the numbers of "
            "these columns do not compare."
        )
    held = [
        f"{cell.stored.dataset} {overlap_text(cell.stored)} of {cell.stored.model}"
        for row in table.rows
        for cell in row.cells
        if cell.stored is not None and cell.stored.num_overlap
    ]
    if held:
        told = "; ".join(dict.fromkeys(held))
        notes.append(f"Samples that the training data holds, too, are counted in: {told}.")
    if any(row.is_published for row in table.rows):
        notes.append(
            "Published numbers are the papers' own, under protocols that may differ; they are not "
            "measured here; a dash is a number that is not published, or not known here."
        )
    return notes


def _metrics(table: TaskTable) -> str:
    """Which metric the columns show, where their titles do not say."""
    shown: dict[str, dict[str, None]] = {}
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell.metric and column.metric is None:
                shown.setdefault(cell.metric, {})[column.dataset] = None
    if len(shown) == 1:
        return f", {min(shown)}"
    most = max(shown, key=lambda name: len(shown[name]), default="")
    others = [f"{name} for {', '.join(shown[name])}" for name in shown if name != most]
    return f", {'; '.join([most, *others])}" if shown else ""


def _grid(table: TaskTable) -> tuple[list[str], list[list[str]]]:
    columns = ["model", *(column.title for column in table.columns)]
    rows = [[row_name(row), *map(cell_text, row.cells)] for row in table.rows]
    if table.has_average:
        columns.append("average")
        rows = [
            [*line, average_text(table, row)] for line, row in zip(rows, table.rows, strict=True)
        ]
    return columns, rows


def markdown_text(tables: Sequence[TaskTable]) -> str:
    """Every table under a heading of its task."""
    parts = []
    for table in tables:
        columns, rows = _grid(table)
        cells = [[plain(cell) for cell in row] for row in rows]
        parts.append(f"## {plain(table.task)}\n")
        parts.append(markdown_table([plain(name) for name in columns], cells) + "\n")
        parts.append(plain(" ".join(notes_of(table)), 5_000) + "\n")
        if table.sources:
            parts += ["Sources of the published numbers:\n"]
            parts.append(
                "\n".join(
                    f"- {plain(source, 2_000)}: {plain(models, 5_000)}, on {plain(names, 2_000)}"
                    for source, models, names in table.sources
                )
                + "\n"
            )
    return "\n".join(parts)


def aligned_text(tables: Sequence[TaskTable], *, width: int = 120) -> str:
    """Every table as aligned columns; one wider than `width` goes on below itself."""
    parts = []
    for table in tables:
        columns, rows = _grid(table)
        lines = [columns, *rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        parts.append(f"{table.task}\n")
        parts += [
            "\n".join(_aligned(line, widths, block) for line in lines) + "\n"
            for block in _blocks(widths, width)
        ]
        parts.append(" ".join(notes_of(table)) + "\n")
        if table.sources:
            told = [f"  {source}: {models}, on {names}" for source, models, names in table.sources]
            parts.append("\n".join(["Sources of the published numbers:", *told]) + "\n")
    return "\n".join(parts)


def _blocks(widths: Sequence[int], width: int) -> list[list[int]]:
    """Groups of columns that fit side by side behind the first, which every group begins with."""
    blocks: list[list[int]] = [[0]]
    room = width - widths[0]
    for number in range(1, len(widths)):
        needed = widths[number] + 2
        if needed > room and len(blocks[-1]) > 1:
            blocks.append([0])
            room = width - widths[0]
        blocks[-1].append(number)
        room -= needed
    return blocks


def _aligned(line: Sequence[str], widths: Sequence[int], block: Sequence[int]) -> str:
    first, *others = block
    cells = [line[first].ljust(widths[first]), *(line[i].rjust(widths[i]) for i in others)]
    return "  ".join(cells).rstrip()


def csv_text(results: Sequence[StoredResult], tables: Sequence[TaskTable]) -> str:
    """One row a result, with the columns of CLIP_benchmark's `build` and ours behind them.

    Fractions of 1. Missing cells of a table and published numbers have rows of their own, which
    the column `status` tells apart.
    """
    metrics = sorted({name for stored in results for name in stored.result.metrics})
    rows = [_measured_row(stored) for stored in results]
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row.cells, strict=True):
                if cell.stored is not None or cell.status == "unknown":
                    continue
                rows.append(
                    {
                        "dataset": column.dataset,
                        "task": table.task_name,
                        "model_fullname": row.model,
                        "status": cell.status,
                        "main_metric": cell.metric,
                        "main_value": "" if cell.value is None else f"{cell.value:.6g}",
                        "note": cell.note,
                    }
                )
    file = io.StringIO()
    writer = csv.DictWriter(file, [*metrics, *_IDENTITY, *_EXTRA], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _measured_row(stored: StoredResult) -> dict[str, object]:
    result, metric = stored.result, stored.main_metric
    interval = None if metric is None else stored.interval(metric)
    return {
        **result.metrics,
        "dataset": result.dataset,
        "language": result.language,
        "model": result.model,
        "pretrained": result.pretrained,
        "task": result.task,
        "model_fullname": f"{result.model} {result.pretrained}{stored.of_origin}",
        "status": "measured",
        "num_samples": result.provenance.num_samples if result.provenance else "",
        "main_metric": metric or "",
        "main_value": "" if metric is None else stored.value(metric),
        "main_low": "" if interval is None else interval[0],
        "main_high": "" if interval is None else interval[1],
    }
