"""Markdown, text and CSV of one table hold the same numbers."""

import csv
import io
import re
from pathlib import Path

import pytest
from result_files import write_classification

from pipelines.eval_cells import TaskTable, task_tables
from pipelines.stored_results import StoredResult, load_results
from pipelines.table_text import aligned_text, csv_text, markdown_text, notes_of


@pytest.fixture
def results(tmp_path: Path) -> list[StoredResult]:
    for pretrained, dataset, number in (
        ("a", "cifar10", 30), ("a", "pets", 12), ("b|x", "pets", 24),
    ):  # fmt: skip
        write_classification(tmp_path, range(number), dataset=dataset, pretrained=pretrained)
    return load_results([tmp_path])


@pytest.fixture
def tables(results: list[StoredResult]) -> list[TaskTable]:
    return task_tables(results)


def test_markdown_has_a_row_a_model_and_tells_what_is_missing(tables: list[TaskTable]) -> None:
    lines = markdown_text(tables).splitlines()
    assert lines[0] == "## Zero-shot classification"
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert [[cell.strip() for cell in row] for row in (rows[0], *rows[2:])] == [
        ["model", "cifar10", "pets", "average"],
        ["ViT-T a", "50.0", "20.0", "35.0"],
        ["ViT-T b\\|x", "missing", "40.0", "1 of 2"],
    ]
    told = lines[-1]
    assert "acc1; mean_per_class_recall for pets" in told
    assert "1 cell of measured models without a number" in told


@pytest.mark.parametrize("width", [30, 40, 200])
def test_a_wide_text_table_goes_on_below_and_loses_nothing(
    tables: list[TaskTable], width: int
) -> None:
    lines = aligned_text(tables, width=width).splitlines()
    body = [line for line in lines if line.startswith(("model", "ViT-T"))]
    assert all(len(line) <= width for line in body)
    found: dict[str, list[str]] = {}
    for line in body:
        name = line[: len("ViT-T b|x")].rstrip()
        found.setdefault(name, []).extend(line[len("ViT-T b|x") :].split())
    assert found["model"] == ["cifar10", "pets", "average"]
    assert found["ViT-T a"] == ["50.0", "20.0", "35.0"]
    assert found["ViT-T b|x"] == ["missing", "40.0", "1", "of", "2"]


def test_csv_holds_every_metric_as_clip_benchmark_writes_it(
    results: list[StoredResult], tables: list[TaskTable]
) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(results, tables))))
    measured = [row for row in rows if row["status"] == "measured"]
    assert len(measured) == len(results)
    for row, stored in zip(measured, results, strict=True):
        for name, value in stored.result.metrics.items():
            assert float(row[name]) == value
        for name in ("dataset", "model", "pretrained", "task", "language"):
            assert row[name] == getattr(stored.result, name)
        assert row["model_fullname"] == f"{row['model']} {row['pretrained']}"
        assert float(row["main_low"]) <= float(row["main_value"]) <= float(row["main_high"])
    (missing,) = [row for row in rows if row["status"] != "measured"]
    assert (missing["status"], missing["dataset"]) == ("missing", "cifar10")
    assert missing["main_value"] == ""


def test_published_numbers_are_marked_everywhere(results: list[StoredResult]) -> None:
    tables = task_tables(results, published=True)
    for text in (markdown_text(tables), aligned_text(tables)):
        marked = [line for line in text.splitlines() if "published: " in line]
        assert len(marked) == len([row for row in tables[0].rows if row.is_published])
        assert not any("missing" in line for line in marked)
        assert "under protocols that may differ" in text
        assert "ALIP (ICCV 2023), Table 3" in text.replace("\\", "")
    rows = list(csv.DictReader(io.StringIO(csv_text(results, tables))))
    published = [row for row in rows if row["status"] == "published"]
    assert published
    assert all(row["note"] and float(row["main_value"]) < 1 for row in published)


def test_overlap_with_the_training_data_is_told(tmp_path: Path) -> None:
    write_classification(tmp_path, range(9), dataset="pets", contamination={"num_overlap": 6})
    (table,) = task_tables(load_results([tmp_path]))
    told = "are counted in: pets 6 (10.00%) of ViT-T first."
    assert told in aligned_text([table])


def test_different_data_in_one_column_is_told(tmp_path: Path) -> None:
    for pretrained, digest in (("a", "0" * 64), ("b", "1" * 64)):
        write_classification(
            tmp_path, range(9), dataset="pets", pretrained=pretrained, data={"digest": digest}
        )
    (table,) = task_tables(load_results([tmp_path]))
    assert "different data of pets" in " ".join(notes_of(table))
