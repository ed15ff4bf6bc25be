"""The table of results: models by datasets, one table a task, with what is missing in its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from declip_eval.dataset_table import find_dataset, get_suite, list_datasets
from declip_eval.published_results import PublishedResult, published_results
from declip_shards import DeclipError
from pipelines.eval_summary import SUMMARY
from pipelines.stored_results import TASK_TITLES, StoredResult, refuse_doubles

Status = Literal["measured", "published", "missing", "failed", "unknown"]
"""missing and failed: no number was measured here; unknown: no paper's is known here."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number, or why there is none."""

    status: Status
    value: float | None = None
    """Fraction of 1."""
    metric: str = ""
    """Which metric it is, where there is a value."""
    interval: tuple[float, float] | None = None
    note: str = ""
    """Why it is missing, or how it was published."""
    stored: StoredResult | None = None
    """Where it was measured."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An evaluation that was asked for and gave no number."""

    model: str
    dataset: str
    task: str
    """As it was asked for; `auto` and `few_shot` are possible."""
    status: Literal["missing", "failed"]
    why: str

    def is_of(self, table_task: str, shots: int | None) -> bool:
        """Whether a cell of this table waits for it."""
        if self.task == "few_shot":
            return shots is not None
        if self.task == "auto":
            return table_task.startswith("zeroshot")
        return shots is None and self.task == table_task


@dataclass(frozen=True, kw_only=True)
class Column:
    """A dataset and one of its metrics."""

    dataset: str
    metric: str | None
    """None: each result's main metric."""

    @property
    def title(self) -> str:
        """What stands above the column."""
        return self.dataset if self.metric is None else f"{self.dataset} {self.metric}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model."""

    model: str
    is_published: bool
    cells: tuple[Cell, ...]
    """One a column."""

    @property
    def num_there(self) -> int:
        """Cells that have a number."""
        return sum(cell.value is not None for cell in self.cells)

    @property
    def average(self) -> float | None:
        """Mean of all cells, where not one is missing."""
        values = [cell.value for cell in self.cells if cell.value is not None]
        return sum(values) / len(values) if values and len(values) == len(self.cells) else None


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """All models on all datasets of one task."""

    task: str
    """Title."""
    task_name: str
    """As in result files."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    has_average: bool
    """Whether the columns can be averaged: one number a dataset, of two datasets or more."""

    @property
    def num_missing(self) -> int:
        """Cells of measured models that have no number."""
        return sum(len(row.cells) - row.num_there for row in self.rows if not row.is_published)

    @property
    def sources(self) -> list[tuple[str, str, str]]:
        """(source and protocol, models, datasets) of the published numbers that are shown."""
        by_model: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for column, cell in zip(self.columns, row.cells, strict=True):
                if cell.status == "published":
                    by_model.setdefault((cell.note, row.model), []).append(column.title)
        together: dict[tuple[str, str], list[str]] = {}
        for (note, model), names in by_model.items():
            together.setdefault((note, ", ".join(names)), []).append(model)
        return [(note, "; ".join(models), names) for (note, names), models in together.items()]


def task_tables(
    results: Sequence[StoredResult],
    *,
    suite: str | None = None,
    all_metrics: bool = False,
    published: bool = False,
    published_data: str | None = None,
    failures: Sequence[Failure] = (),
) -> list[TaskTable]:
    """Arrange results.

    Args:
        results: of any models and tasks.
        suite: show the datasets of this suite and no others; None: those that were measured.
        all_metrics: a column a metric instead of each dataset's main one.
        published: add the numbers of papers for the columns that there are.
        published_data: of models trained on that alone; None: on anything.
        failures: evaluations that were asked for and gave no number.

    Raises:
        DeclipError: an unknown suite, results that contradict each other, or none of the suite.
    """
    refuse_doubles(results)
    try:
        wanted = None if suite is None else get_suite(suite)
    except ValueError as error:
        raise DeclipError(str(error)) from error
    tables = []
    for task in _tasks(results):
        own = [stored for stored in results if stored.task == task]
        datasets = _datasets(own, wanted)
        if wanted is not None and not any(stored.dataset in datasets for stored in own):
            continue
        table = _task_table(own, datasets, failures, all_metrics, is_closed=wanted is not None)
        if published and own[0].shots is None:
            rows = _published_rows(table.task_name, table.columns, published_data)
            table = replace(table, rows=(*table.rows, *rows))
        tables.append(table)
    if not tables:
        there = ", ".join(sorted({stored.dataset for stored in results}))
        raise DeclipError(
            f"no result is of suite {suite!r}; they are of {there}: leave --suite out, or give "
            "another."
        )
    return tables


def _task_table(
    own: Sequence[StoredResult],
    datasets: Sequence[str],
    failures: Sequence[Failure],
    all_metrics: bool,
    *,
    is_closed: bool,
) -> TaskTable:
    """The table of one task's results; `is_closed`: failures add no other datasets."""
    name, shots = own[0].result.task, own[0].shots
    lost = [failure for failure in failures if failure.is_of(name, shots)]
    if is_closed:
        lost = [failure for failure in lost if failure.dataset in datasets]
    else:
        datasets = _sorted({*datasets, *(failure.dataset for failure in lost)})
    columns = tuple(_columns(own, datasets, all_metrics))
    models = [*(stored.model for stored in own), *(failure.model for failure in lost)]
    return TaskTable(
        task=own[0].task,
        task_name=name,
        columns=columns,
        rows=tuple(
            Row(
                model=model,
                is_published=False,
                cells=tuple(_cell(own, model, column, lost) for column in columns),
            )
            for model in dict.fromkeys(models)
        ),
        has_average=not all_metrics and len(columns) > 1,
    )


def read_failures(folders: Iterable[Path], results: Sequence[StoredResult]) -> list[Failure]:
    """What `declip eval` could not evaluate, by its summaries.

    Args:
        folders: that may hold a summary.
        results: by whose files a summary's models get their names; a model without any result is
            called as it was asked for.

    Raises:
        DeclipError: a summary that is none.
    """
    model_of = {stored.path.resolve(): stored.model for stored in results}
    found = []
    for folder in dict.fromkeys(folders):
        path = folder / SUMMARY
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            entries = [json.loads(line) for line in lines if line]
            names = {
                (entry["model"], entry["language"]): model_of[file]
                for entry in entries
                for name in entry["results"]
                if (file := (folder / name).resolve()) in model_of
            }
            for entry in entries:
                if entry["status"] not in ("failed", "missing"):
                    continue
                info = find_dataset(entry["dataset"])
                found.append(
                    Failure(
                        model=names.get((entry["model"], entry["language"]), entry["model"]),
                        dataset=info.name if info else entry["dataset"],
                        task=entry["task"],
                        status=entry["status"],
                        why=entry["note"],
                    )
                )
        except (ValueError, KeyError, TypeError) as error:
            raise DeclipError(
                f"{str(path)!r} is no summary of declip eval ({error!r}); delete it, or evaluate "
                "again."
            ) from error
    return found


def _tasks(results: Sequence[StoredResult]) -> list[str]:
    """Titles in the tasks' order, few-shot probes by their number of pictures."""
    order = list(TASK_TITLES)
    seen = {stored.task: (order.index(stored.result.task), stored.shots or 0) for stored in results}
    return sorted(seen, key=lambda task: seen[task])


def _datasets(own: Sequence[StoredResult], wanted: Sequence[str] | None) -> list[str]:
    """Names of the columns' datasets: a suite's of the task's kind, or those measured."""
    if wanted is not None:
        is_retrieval = own[0].result.task == "zeroshot_retrieval"
        kinds = {name: info.kind for name in wanted if (info := find_dataset(name))}
        return [name for name in wanted if (kinds.get(name) == "retrieval") == is_retrieval]
    return _sorted({stored.dataset for stored in own})


def _sorted(datasets: Iterable[str]) -> list[str]:
    """In the order of the table of datasets, unknown ones behind it by name."""
    known = {name: number for number, name in enumerate(list_datasets())}
    return sorted(datasets, key=lambda name: (known.get(name, len(known)), name))


def _columns(
    own: Sequence[StoredResult], datasets: Sequence[str], all_metrics: bool
) -> list[Column]:
    if not all_metrics:
        return [Column(dataset=name, metric=None) for name in datasets]
    columns = []
    for name in datasets:
        metrics = dict.fromkeys(m for s in own if s.dataset == name for m in s.metrics)
        columns += [Column(dataset=name, metric=metric) for metric in metrics]
        if not metrics:
            columns.append(Column(dataset=name, metric=None))
    return columns


def _cell(
    own: Sequence[StoredResult],
    model: str,
    column: Column,
    failures: Sequence[Failure],
) -> Cell:
    for stored in own:
        if (stored.model, stored.dataset) != (model, column.dataset):
            continue
        metric = column.metric or stored.main_metric
        value = None if metric is None else stored.value(metric)
        if metric is None or value is None:
            wanted = metric or (stored.info.metric if stored.info else "a main metric")
            note = f"{stored.path.name} holds no {wanted}"
            return Cell(status="missing", note=note, stored=stored)
        return Cell(
            status="measured",
            value=value,
            metric=metric,
            interval=stored.interval(metric),
            stored=stored,
        )
    for failure in failures:
        if (failure.model, failure.dataset) == (model, column.dataset):
            return Cell(status=failure.status, note=failure.why)
    return Cell(status="missing", note="not evaluated")


def _published_rows(task: str, columns: Sequence[Column], data: str | None) -> list[Row]:
    """Papers' models that have a number in one of the columns."""
    by_model: dict[str, dict[tuple[str, str], PublishedResult]] = {}
    for item in published_results():
        if item.task == task and data in (None, item.data):
            by_model.setdefault(item.label, {})[item.dataset, item.metric] = item
    rows = []
    for label, items in by_model.items():
        cells = tuple(_published_cell(items, column) for column in columns)
        if any(cell.value is not None for cell in cells):
            rows.append(Row(model=label, is_published=True, cells=cells))
    return rows


def _published_cell(items: dict[tuple[str, str], PublishedResult], column: Column) -> Cell:
    metric = column.metric
    if metric is None:
        info = find_dataset(column.dataset)
        names = [info.metric, f"lp_{info.metric}"] if info else []
        metric = next((name for name in names if (column.dataset, name) in items), None)
    item = items.get((column.dataset, metric)) if metric else None
    if item is None:
        return Cell(status="unknown", note="not published, or not known here")
    note = f"{item.source}; {item.notes}" if item.notes else item.source
    return Cell(status="published", value=item.value, metric=item.metric, note=note)
