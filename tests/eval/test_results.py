"""Result files: the reader inverts the writer, equal results are equal bytes, lies are refused."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip_eval.outcomes import outcomes_path
from declip_eval.results import (
    EvalResult,
    Provenance,
    format_results_table,
    read_result,
    result_file_name,
    result_path,
    results_rows,
    write_result,
)

PROVENANCE = Provenance(
    num_samples=1204,
    num_classes=412,
    chance={"acc1": 1 / 412},
    intervals={"acc1": (0.031, 0.053)},
    templates="simple",
    hashes={"checkpoint": "a81b"},
    versions={"numpy": "2.4.6"},
    settings={"seed": 0, "note": "größer", "l2_strength": 0.01, "is_ema": False, "limit": None},
)
RESULT = EvalResult(
    dataset="demo/test_vendor",
    model="ViT-Ti-8-48",
    pretrained="runs/demo/export/open_clip_pytorch_model.bin",
    task="zeroshot_classification",
    metrics={"acc5": 0.125, "acc1": 0.0412},
    provenance=PROVENANCE,
)


def altered(**changes):
    return dataclasses.replace(RESULT, **changes)


def test_reader_inverts_writer(tmp_path):
    assert read_result(write_result(RESULT, tmp_path)) == RESULT


def test_order_of_keys_does_not_reach_the_bytes(tmp_path):
    other = altered(metrics=dict(sorted(RESULT.metrics.items())))
    first = write_result(RESULT, tmp_path / "a").read_bytes()
    assert write_result(other, tmp_path / "b").read_bytes() == first
    assert write_result(RESULT, tmp_path / "a").read_bytes() == first
    assert "größer".encode() in first


def test_the_file_has_clip_benchmarks_form_and_one_key_more(tmp_path):
    content = json.loads(write_result(RESULT, tmp_path).read_text(encoding="utf-8"))
    assert set(content) == {
        "dataset", "model", "pretrained", "task", "language", "metrics", "opendeclip",
    }  # fmt: skip
    assert content["metrics"] == {"acc1": 0.0412, "acc5": 0.125}
    assert content["language"] == "en"
    assert content["opendeclip"]["num_samples"] == 1204


def test_a_file_of_clip_benchmark_itself_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(
        '{"dataset": "wds/imagenet1k", "model": "ViT-B-32", "pretrained": "openai", '
        '"task": "zeroshot_classification", "language": "en", '
        '"metrics": {"acc1": 0.63, "acc5": 0.88, "mean_per_class_recall": 0.63}}'
    )
    result = read_result(path)
    assert result.provenance is None
    assert result.metrics["acc1"] == 0.63


def test_file_name_follows_the_pattern():
    assert result_file_name(RESULT) == (
        "benchmark_demo_test_vendor_open_clip_pytorch_model.bin_ViT-Ti-8-48_en_"
        "zeroshot_classification.json"
    )


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_name_gives_a_safe_file_name(dataset, model):
    name = result_file_name(altered(dataset=dataset, model=model))
    assert name.isascii()
    assert len(name) <= 255
    assert not set(name) & set('/\\:*?"<>| \x00')
    assert name.startswith("benchmark_")
    assert name.endswith(".json")


def test_long_names_are_told_apart_by_a_hash():
    first = result_file_name(altered(dataset="d" * 300 + "a"))
    second = result_file_name(altered(dataset="d" * 300 + "b"))
    assert first != second
    assert len(outcomes_path(first).name) == 255  # What stands beside a result fits, too.


def test_the_prefix_of_webdatasets_is_left_away_as_in_clip_benchmark():
    assert result_file_name(altered(dataset="wds/vtab/cifar10")) == result_file_name(
        altered(dataset="vtab/cifar10")
    )


def test_few_shot_does_not_replace_the_probe(tmp_path):
    names = [
        write_result(altered(task="linear_probe", metrics=metrics, provenance=None), tmp_path).name
        for metrics in (
            {"lp_acc1": 0.5},
            {"lp_acc1": 0.5, "fewshot_k": -1},
            {"lp_acc1": 0.5, "fewshot_k": 4},
            {"lp_acc1": 0.5, "fewshot_k": 16},
        )
    ]
    assert names[0] == names[1]
    assert names[2] == names[0].replace("linear_probe", "linear_probe_fewshot_4")
    assert names[3] == names[0].replace("linear_probe", "linear_probe_fewshot_16")


def test_an_output_is_a_folder_or_a_template(tmp_path):
    assert result_path(RESULT, tmp_path) == tmp_path / result_file_name(RESULT)
    template = str(tmp_path / "{model}" / "{dataset}_{task}_{language}.json")
    path = write_result(RESULT, template)
    expected = tmp_path / "ViT-Ti-8-48" / "demo_test_vendor_zeroshot_classification_en.json"
    assert path == expected
    assert read_result(path) == RESULT
    assert result_path(RESULT, "{pretrained_full_path}.json").name == (
        "runs_demo_export_open_clip_pytorch_model.bin.json"
    )
    shots = altered(task="linear_probe", metrics={"lp_acc1": 0.5, "fewshot_k": 2}, provenance=None)
    assert result_path(shots, "{dataset}.json").name == "demo_test_vendor_fewshot_2.json"
    above = altered(dataset="..", provenance=None)
    assert result_path(above, str(tmp_path / "{dataset}" / "a.json")) == tmp_path / "__" / "a.json"
    with pytest.raises(ValueError, match=r"names \{mood\}, but a template has \{model\}, "):
        result_path(RESULT, "{mood}.json")
    with pytest.raises(ValueError, match=r"template 'x\{model.json' has braces that do not pair"):
        result_path(RESULT, "x{model.json")
    with pytest.raises(ValueError, match=r"is a template, but does not end in \.json: add it"):
        result_path(RESULT, "out/{dataset}")
    with pytest.raises(ValueError, match="would have the same file name"):
        write_result(altered(model="other"), expected.parent / "{dataset}_{task}_{language}.json")


def test_a_file_of_version_1_is_still_read(tmp_path):
    path = write_result(RESULT, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("num_unreadable", "num_expected", "data", "bootstrap", "contamination"):
        del content["opendeclip"][name]
    content["opendeclip"]["schema_version"] = 1
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_result(path) == RESULT


def test_what_is_known_of_the_data_is_kept(tmp_path):
    provenance = dataclasses.replace(
        PROVENANCE,
        num_unreadable=3,
        num_expected=1204,
        data={"digest": "77", "layout": "webdataset", "counts": {"classes": 412}},
        bootstrap={"seed": 0, "num_resamples": 2000, "level": 0.95},
        contamination={"num_overlap": 2, "by_rung": {"exact": 2}, "checked": ["exact"]},
    )
    result = altered(provenance=provenance)
    assert read_result(write_result(result, tmp_path)) == result


def test_a_probe_of_clip_benchmark_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(
        '{"dataset": "d", "model": "m", "pretrained": "p", "task": "linear_probe", '
        '"language": "en", "metrics": {"lp_acc1": 0.63, "lp_acc5": NaN, "normalized": true, '
        '"lp_mean_per_class_recall": 0.6, "fewshot_k": -1, "weight_decay": 0, "epochs": 10}}'
    )
    assert read_result(path).metrics == {
        "lp_acc1": 0.63, "normalized": 1, "lp_mean_per_class_recall": 0.6, "fewshot_k": -1,
        "weight_decay": 0, "epochs": 10,
    }  # fmt: skip


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_result(RESULT, tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_result(altered(metrics={"acc1": 0.9, "acc5": 1.0}), tmp_path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_result(RESULT, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_another_checkpoint_of_the_same_file_name_is_not_overwritten(tmp_path):
    write_result(RESULT, tmp_path)
    other = altered(pretrained="runs/other/export/open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="would have the same file name: write it to another fol"):
        write_result(other, tmp_path)
    assert read_result(tmp_path / result_file_name(RESULT)) == RESULT


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"acc1 is 41\.2, but it is a fraction of 1: divide a perc"
    ):
        altered(metrics={"acc1": 41.2})
    with pytest.raises(ValueError, match=r"image_retrieval_recall@5 is 17, but it is a fraction"):
        altered(metrics={"image_retrieval_recall@5": 17}, provenance=None)
    with pytest.raises(ValueError, match="acc1 is nan, but it must be a finite number"):
        altered(metrics={"acc1": float("nan")})
    with pytest.raises(ValueError, match="acc1 is True, but it must be a finite number"):
        altered(metrics={"acc1": True})
    with pytest.raises(ValueError, match="metrics is empty"):
        altered(metrics={})
    with pytest.raises(ValueError, match="task is 'zeroshot', but must be one of zeroshot_class"):
        altered(task="zeroshot")
    with pytest.raises(ValueError, match="dataset is '', but a result needs it"):
        altered(dataset="")
    with pytest.raises(ValueError, match="intervals names 'acc1', which is none of the metrics"):
        altered(metrics={"acc5": 0.5}, provenance=dataclasses.replace(PROVENANCE, chance={}))
    with pytest.raises(ValueError, match="num_samples is 0, but it must be a whole number from 1"):
        Provenance(num_samples=0)
    with pytest.raises(ValueError, match=r"interval of acc1 is \[0.5, 0.4\], but it must be"):
        Provenance(num_samples=1, intervals={"acc1": (0.5, 0.4)})
    with pytest.raises(ValueError, match="chance of acc1 is 2, but it is a fraction"):
        Provenance(num_samples=1, chance={"acc1": 2})
    with pytest.raises(ValueError, match=r"mean_average_precision_11 is 84, but it is a fraction"):
        altered(metrics={"mean_average_precision_11": 84}, provenance=None)
    with pytest.raises(
        ValueError, match="num_unreadable is 6, but it must be a whole number from "
    ):
        Provenance(num_samples=5, num_unreadable=6)
    with pytest.raises(ValueError, match=r"num_expected is -1, but it must be a whole number fro"):
        Provenance(num_samples=5, num_expected=-1)
    with pytest.raises(
        ValueError, match="num_trials of acc1 is 'x', but it must be a whole number"
    ):
        Provenance(num_samples=5, num_trials={"acc1": "x"})  # type: ignore[dict-item]
    with pytest.raises(
        ValueError, match=r"settings is {'seed': nan}, but it must be a dict of what"
    ):
        Provenance(num_samples=5, settings={"seed": float("nan")})
    with pytest.raises(ValueError, match=r"templates is \[\], but it must be a text or None"):
        Provenance(num_samples=5, templates=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"acc1 is 10{400}, but it is a fraction"):
        altered(metrics={"acc1": 10**400})
    with pytest.raises(ValueError, match=r"data is {'digest': .*}, but it must be a dict of what"):
        Provenance(num_samples=5, data={"digest": (1, 2)})
    # Not a fraction, so any finite number will do.
    altered(metrics={"acc1": 0.5, "acc5": 0.5, "l2_strength": 1e6})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("model"), "lacks 'model'"),
        (lambda c: c.update(metrics=[1]), "metrics that are no object"),
        (lambda c: c["metrics"].update(acc1="high"), "acc1 is 'high', but it must be a finite"),
        (lambda c: c["opendeclip"].update(schema_version=9), "schema_version is 9, but this prog"),
        (lambda c: c["opendeclip"].update(mood="good"), "holds 'mood', which version 2 lacks"),
        (lambda c: c["opendeclip"].update(chance=3), r"opendeclip.chance is 3, but must be an obj"),
        (lambda c: c["opendeclip"].pop("num_samples"), "num_samples"),
        (lambda c: c.update(opendeclip=[]), "schema_version is"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, sentence):
    path = write_result(RESULT, tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=sentence) as error:
        read_result(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b'{"dataset": ', b"\xff\xfe", b"[]"])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not JSON|holds a list"):
        read_result(path)


def test_table_shows_value_chance_and_ratio():
    retrieval = EvalResult(
        dataset="demo",
        model="m",
        pretrained="p",
        task="zeroshot_retrieval",
        metrics={f"image_retrieval_recall@{k}": 0.1 for k in (10, 5)},
        provenance=Provenance(num_samples=1204, num_trials={"image_retrieval_recall@5": 300}),
    )
    columns, rows = results_rows([RESULT, retrieval])
    by_metric = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert by_metric["acc1"] == {
        "metric": "acc1", "value": "0.0412", "chance": "0.0024", "x chance": "17.0",
        "samples": "1,204", "classes": "412", "95% interval": "0.0310 to 0.0530",
        "dataset": "demo/test_vendor",
    }  # fmt: skip
    assert by_metric["acc5"]["chance"] == by_metric["acc5"]["95% interval"] == "-"
    assert by_metric["image_retrieval_recall@5"]["samples"] == "300"
    assert [row[0] for row in rows][2:] == ["image_retrieval_recall@5", "image_retrieval_recall@10"]
    text = format_results_table([RESULT, retrieval])
    lines = text.splitlines()
    assert len(lines) == 2 + len(rows)
    ends = {
        line.index(cells[1]) + len(cells[1]) for line, cells in zip(lines[2:], rows, strict=True)
    }
    assert len(ends) == 1  # Values stand under one another.
    assert format_results_table([]) == "No results."
