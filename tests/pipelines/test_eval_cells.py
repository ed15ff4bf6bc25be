"""The table's arrangement: every cell has a number or says why not; averages only of whole rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from result_files import write_classification

from declip_eval.dataset_table import get_suite
from declip_eval.published_results import published_results
from declip_shards import DeclipError
from pipelines.eval_cells import read_failures, task_tables
from pipelines.published import PUBLISHED
from pipelines.stored_results import load_results


def entry(**changes: Any) -> dict[str, Any]:
    """One evaluation of a summary of declip eval."""
    plain = {
        "model": "runs/a", "dataset": "cifar10", "task": "auto", "language": "en",
        "status": "done", "note": "", "results": [], "num_samples": 60,
    }  # fmt: skip
    return plain | changes


def write_summary(folder: Path, *entries: dict[str, Any]) -> None:
    lines = [json.dumps({"schema_version": 1} | entry) + "\n" for entry in entries]
    (folder / "eval_summary.jsonl").write_text("".join(lines))


def test_every_value_stands_in_the_cell_of_its_model_and_dataset(tmp_path: Path) -> None:
    right = {("a", "cifar10"): 30, ("a", "pets"): 12, ("b", "pets"): 24}
    for (pretrained, dataset), number in right.items():
        write_classification(tmp_path, range(number), dataset=dataset, pretrained=pretrained)
    (table,) = task_tables(load_results([tmp_path]))
    assert [column.title for column in table.columns] == ["cifar10", "pets"]
    assert {row.model: [cell.status for cell in row.cells] for row in table.rows} == {
        "ViT-T a": ["measured", "measured"],
        "ViT-T b": ["missing", "measured"],
    }
    by_model = {row.model: row for row in table.rows}
    assert [cell.value for cell in by_model["ViT-T a"].cells] == pytest.approx([0.5, 0.2])
    assert by_model["ViT-T a"].average == pytest.approx(0.35)
    assert by_model["ViT-T b"].average is None
    assert (by_model["ViT-T b"].num_there, table.num_missing) == (1, 1)
    interval = by_model["ViT-T a"].cells[0].interval
    assert interval is not None
    assert interval[0] <= 0.5 <= interval[1]


def test_a_suite_shows_all_its_datasets_and_no_other(tmp_path: Path) -> None:
    for dataset in ("cifar10", "mnist", "demo/own"):
        write_classification(tmp_path, range(30), dataset=dataset)
    (table,) = task_tables(load_results([tmp_path]), suite="declip11")
    assert [column.dataset for column in table.columns] == list(get_suite("declip11"))
    assert table.num_missing == len(get_suite("declip11")) - 1
    assert table.rows[0].average is None


def test_tasks_have_tables_of_their_own(tmp_path: Path) -> None:
    write_classification(tmp_path, range(30))
    for k in (4, 1, -1):
        extra = {"fewshot_k": float(k)}
        write_classification(tmp_path, range(30), task="linear_probe", extra_metrics=extra)
    tables = task_tables(load_results([tmp_path]))
    assert [table.task for table in tables] == [
        "Zero-shot classification",
        "Linear probe",
        "Few-shot probe, 1 picture a class",
        "Few-shot probe, 4 pictures a class",
    ]
    assert not any(table.has_average for table in tables)


def test_all_metrics_have_columns_and_no_average(tmp_path: Path) -> None:
    write_classification(tmp_path, range(30), dataset="cifar10")
    (table,) = task_tables(load_results([tmp_path]), all_metrics=True)
    titles = [column.title for column in table.columns]
    assert titles == [
        "cifar10 acc1", "cifar10 acc5", "cifar10 mean_acc1_acc5", "cifar10 mean_per_class_recall",
    ]  # fmt: skip
    assert not table.has_average


def test_published_numbers_stand_beside_with_their_source(tmp_path: Path) -> None:
    for dataset in ("imagenet1k", "pets"):
        write_classification(tmp_path, range(30), dataset=dataset)
    (table,) = task_tables(load_results([tmp_path]), published=True)
    ours, *others = table.rows
    assert not ours.is_published
    assert others
    assert all(row.is_published for row in others)
    names = [column.dataset for column in table.columns]
    for item in published_results():
        if item.task != "zeroshot_classification" or item.dataset not in names:
            continue
        (row,) = [row for row in others if row.model == item.label]
        cell = row.cells[names.index(item.dataset)]
        assert (cell.status, cell.value) == ("published", item.value)
        assert cell.note.startswith(item.source)
    # What papers lack is not counted as missing here.
    assert table.num_missing == 0
    shown = {model for _, models, _ in table.sources for model in models.split("; ")}
    assert shown == {row.model for row in others}
    (some,) = task_tables(load_results([tmp_path]), published=True, published_data="CC12M")
    assert {row.model for row in some.rows if row.is_published} == {
        row.model for row in others if "(CC12M, " in row.model
    }


def test_what_failed_is_told_in_its_cell(tmp_path: Path) -> None:
    path = write_classification(tmp_path, range(30), dataset="cifar10")
    write_summary(
        tmp_path,
        entry(results=[path.name]),
        entry(dataset="wds/pets", status="failed", note="37 classes, but 36"),
        entry(dataset="mnist", status="missing", note="looked in /data"),
        entry(dataset="dtd", task="linear_probe", status="failed", note="no train split"),
        entry(model="runs/b", dataset="cifar10", status="failed", note="no such model"),
    )
    results = load_results([tmp_path])
    (table,) = task_tables(results, failures=read_failures([tmp_path], results))
    names = [column.dataset for column in table.columns]
    assert sorted(names) == ["cifar10", "mnist", "pets"]
    told = {
        (row.model, name): (cell.status, cell.note)
        for row in table.rows
        for name, cell in zip(names, row.cells, strict=True)
    }
    assert told["ViT-T first", "pets"] == ("failed", "37 classes, but 36")
    assert told["ViT-T first", "mnist"] == ("missing", "looked in /data")
    assert told["runs/b", "cifar10"] == ("failed", "no such model")
    assert told["runs/b", "pets"] == ("missing", "not evaluated")
    # A suite's columns stay as they are, and who failed elsewhere has no row.
    failures = read_failures([tmp_path], results)
    (table,) = task_tables(results, suite="declip11", failures=failures)
    assert [column.dataset for column in table.columns] == list(get_suite("declip11"))
    (other,) = task_tables(results, suite="declip11", failures=failures[1:2])
    assert [row.model for row in other.rows] == ["ViT-T first"]


def test_faults_are_told(tmp_path: Path) -> None:
    write_classification(tmp_path, range(30), dataset="demo/own")
    results = load_results([tmp_path])
    with pytest.raises(DeclipError, match="no result is of suite 'clip27'; they are of demo/own"):
        task_tables(results, suite="clip27")
    with pytest.raises(DeclipError, match="There is no suite 'clip28': did you mean 'clip27'"):
        task_tables(results, suite="clip28")
    (tmp_path / "eval_summary.jsonl").write_text('{"model": 1}\n')
    with pytest.raises(DeclipError, match="is no summary of declip eval"):
        read_failures([tmp_path], results)


def test_numbers_that_recipes_name_are_those_of_the_table() -> None:
    towers = {"vit-b-32": "ViT-B-32", "vit-b-16": "ViT-B-16", "rn50": "RN50"}
    known = {
        (item.data.lower(), item.model.lower(), item.tower, item.percent)
        for item in published_results()
        if (item.task, item.dataset) == ("zeroshot_classification", "imagenet1k")
    }
    checked = 0
    for name, recipe in PUBLISHED.items():
        if recipe.acc1 is not None:
            method, _, tower = name.removeprefix(f"{recipe.pairs}-").partition("-")
            assert (recipe.pairs, method, towers[tower], recipe.acc1) in known
            checked += 1
    assert checked > 10
