"""Results in folders: which files are read, how they are named, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from result_files import write_classification, write_with_outcomes

from declip_eval.results import read_result
from declip_eval.score_outcomes import multilabel_outcomes, retrieval_outcomes
from declip_shards import DeclipError
from pipelines.stored_results import load_results, only_model, overlap_text, refuse_doubles


def test_other_json_files_are_passed_over(tmp_path: Path) -> None:
    path = write_classification(tmp_path, range(30))
    (tmp_path / "eval_summary.jsonl").write_text('{"dataset": 1, "metrics": 2}')
    (tmp_path / "config.json").write_text('{"lr": 1}')
    (tmp_path / ".half.json").write_text("{")
    (only,) = load_results([tmp_path])
    assert only.path == path
    assert only.result == read_result(path)
    assert load_results([path, tmp_path, path]) == [only]


def test_a_runs_results_lie_in_eval(tmp_path: Path) -> None:
    write_classification(tmp_path / "eval", range(30))
    assert len(load_results([tmp_path])) == 1


def test_all_spellings_of_a_dataset_are_one(tmp_path: Path) -> None:
    for name, spelling in (("a", "cifar10"), ("b", "wds/cifar10"), ("c", "wds/vtab/cifar10")):
        write_classification(tmp_path / name, range(30), dataset=spelling)
    found = load_results([tmp_path / name for name in "abc"])
    assert [stored.dataset for stored in found] == ["cifar10"] * 3
    assert write_classification(tmp_path / "d", range(3), dataset="my/set")
    assert load_results([tmp_path / "d"])[0].dataset == "my/set"


def test_the_main_metric_is_the_one_that_papers_print(tmp_path: Path) -> None:
    write_classification(tmp_path / "a", range(30), dataset="cifar10")
    write_classification(tmp_path / "b", range(30), dataset="pets")
    write_classification(tmp_path / "c", range(30), dataset="pets", task="linear_probe")
    write_classification(tmp_path / "d", range(30), dataset="kinetics700")
    names = [load_results([tmp_path / name])[0].main_metric for name in "abcd"]
    assert names == [
        "acc1", "mean_per_class_recall", "lp_mean_per_class_recall", "mean_acc1_acc5",
    ]  # fmt: skip


def test_a_result_without_the_papers_metric_has_no_main_one(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((9, 3))
    outcomes = multilabel_outcomes([f"k{i}" for i in range(9)], scores, scores > 0.5)
    path = write_with_outcomes(tmp_path, outcomes, "voc2007_multilabel", "ViT-T", "a")
    assert load_results([path])[0].main_metric == "mean_average_precision_11"
    content = json.loads(path.read_text())
    del content["metrics"]["mean_average_precision_11"]
    content["opendeclip"]["intervals"] = content["opendeclip"]["chance"] = {}
    path.write_text(json.dumps(content))
    stored = load_results([path])[0]
    assert stored.main_metric is None
    assert stored.metrics == ["mean_average_precision"]


def test_metrics_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((12, 4))
    keys = [f"k{i}" for i in range(12)]
    outcomes = retrieval_outcomes(
        keys, [f"{key}#0" for key in keys], features, features + 0.5, [[i] for i in range(12)]
    )
    path = write_with_outcomes(tmp_path, outcomes, "x", "m", "p", task="zeroshot_retrieval")
    stored = load_results([path])[0]
    assert stored.metrics == [
        f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)
    ]
    assert stored.main_metric == "image_retrieval_recall@1"


def test_few_shot_probes_are_tasks_of_their_own(tmp_path: Path) -> None:
    for k in (1, 4, -1):
        write_classification(
            tmp_path, range(30), task="linear_probe", extra_metrics={"fewshot_k": float(k)}
        )
    found = {stored.shots: stored for stored in load_results([tmp_path])}
    assert sorted(found, key=str) == [1, 4, None]
    assert found[1].task == "Few-shot probe, 1 picture a class"
    assert found[4].task == "Few-shot probe, 4 pictures a class"
    assert "fewshot_k" not in found[4].metrics


def test_two_checkpoints_whose_paths_end_alike_stay_two(tmp_path: Path) -> None:
    write_classification(tmp_path / "a", range(30), pretrained="/runs/a/export")
    write_classification(tmp_path / "b", range(9), pretrained="/runs/b/export")
    found = load_results([tmp_path / "a", tmp_path / "b"])
    assert [s.model for s in found] == ["ViT-T a/export", "ViT-T b/export"]
    assert load_results([tmp_path / "a"])[0].model == "ViT-T export"
    refuse_doubles(found)


def test_a_runs_model_is_called_as_the_run(tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_classification(tmp_path / run, range(30), pretrained=f"/runs/{run}/train/export")
    found = load_results([tmp_path / "a", tmp_path / "b"])
    assert [stored.model for stored in found] == ["ViT-T a", "ViT-T b"]


def test_runs_that_call_other_weights_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for run, right in (("x/run/eval", 30), ("y/run/eval", 31)):
        weights = str(right) * 32
        write_classification(tmp_path / run, range(right), hashes={"weights": weights})
        write_classification(tmp_path / run, range(9), dataset="b", hashes={"weights": weights})
    write_classification(tmp_path / "z", range(32), hashes={"weights": "32" * 32})
    found = load_results([tmp_path / "x/run", tmp_path / "y/run", tmp_path / "z"])
    refuse_doubles(found)
    names = [f"ViT-T first of {end}" for end in ("x/run", "y/run", f"{tmp_path.name}/z")]
    assert list(dict.fromkeys(stored.model for stored in found)) == names
    assert only_model(found, names[1], "--model-a") == names[1]
    two = load_results([tmp_path / "x/run", tmp_path / "z"])
    assert {s.model for s in two} == {"ViT-T first of run", "ViT-T first of z"}
    alone = load_results([tmp_path / "x/run"])
    assert {s.model for s in alone} == {"ViT-T first"}


def test_the_same_weights_in_two_folders_are_one_model_whose_results_must_agree(
    tmp_path: Path,
) -> None:
    for run, right in (("a", 30), ("b", 31)):
        write_classification(tmp_path / run, range(right), hashes={"weights": "0" * 64})
    with pytest.raises(DeclipError, match="are both Zero-shot classification of 'ViT-T first' on"):
        refuse_doubles(load_results([tmp_path / "a", tmp_path / "b"]))


def test_several_weights_of_one_name_in_one_folder_are_told_apart_by_their_hash(
    tmp_path: Path,
) -> None:
    for dataset, weights in (("a", "12345678" * 8), ("b", "9abcdef0" * 8)):
        write_classification(tmp_path, range(9), dataset=dataset, hashes={"weights": weights})
    names = {stored.model for stored in load_results([tmp_path])}
    assert names == {"ViT-T first of weights 12345678", "ViT-T first of weights 9abcdef0"}


def test_two_results_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for name, right in (("a", range(30)), ("b", range(30)), ("c", range(31))):
        write_classification(tmp_path / name, right)
    refuse_doubles(load_results([tmp_path / "a", tmp_path / "b"]))
    with pytest.raises(DeclipError, match="are both Zero-shot classification of 'ViT-T first' on"):
        refuse_doubles(load_results([tmp_path / "a", tmp_path / "c"]))


def test_one_model_is_chosen_by_any_of_its_names(tmp_path: Path) -> None:
    for pretrained in ("first", "second"):
        write_classification(tmp_path, range(30), pretrained=pretrained)
    found = load_results([tmp_path])
    assert only_model(found, "second", "--model-a") == "ViT-T second"
    assert only_model(found, "ViT-T first", "--model-a") == "ViT-T first"
    with pytest.raises(DeclipError, match=r"are of 2 models .* choose one with --model-a"):
        only_model(found, None, "--model-a")
    with pytest.raises(DeclipError, match="--model-a is 'third', but the results are of ViT-T f"):
        only_model(found, "third", "--model-a")


def test_the_overlap_is_read_off(tmp_path: Path) -> None:
    contamination: dict[str, object] = {"num_overlap": 3, "metrics_without_overlap": {"acc1": 0.25}}
    path = write_classification(tmp_path, range(30), contamination=contamination)
    stored = load_results([path])[0]
    assert (stored.num_overlap, stored.value_without_overlap("acc1")) == (3, 0.25)
    assert stored.value_without_overlap("acc5") is None
    assert overlap_text(stored) == "3 (5.00%)"
    contamination["unchecked"] = {"embedding": "no index"}
    path = write_classification(tmp_path, range(30), contamination=contamination)
    assert overlap_text(load_results([path])[0]) == "3 (5.00%); not checked: embedding"
    path = write_classification(tmp_path, range(30))
    assert overlap_text(load_results([path])[0]) == "not checked"


def test_faults_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeclipError, match="holds no result; give a folder that declip eval wrote"):
        load_results([tmp_path / "empty"])
    with pytest.raises(DeclipError, match="is not there; give a folder or file of results"):
        load_results([tmp_path / "nowhere"])
    (tmp_path / "benchmark_torn.json").write_text("{")
    with pytest.raises(DeclipError, match=r"benchmark_torn.json is not JSON"):
        load_results([tmp_path])
