"""Which datasets an evaluation is on."""

import pytest
from tiny_sets import write_pairs

from declip_eval.dataset_table import get_suite
from declip_shards import DeclipError
from pipelines.eval_jobs import dataset_names, plan_jobs
from pipelines.eval_options import parse_options


def options(*datasets, words=""):
    return parse_options(["--model", "m", "--dataset", *datasets, *words.split()])


def test_suites_lists_and_aliases_are_taken_apart_each_once(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("# two\nwds/cifar10\nmnist\n")
    names = dataset_names(options("declip11", str(path)))
    assert names == [*get_suite("declip11"), "mnist"]


def test_a_set_of_ones_own_is_a_folder_and_a_misspelt_name_is_told(tmp_path):
    write_pairs(tmp_path / "mine", num=2)
    root = f"--dataset-root {tmp_path}"
    assert dataset_names(options("mine", words=root)) == ["mine"]
    own = f"--dataset-root {tmp_path}/mine"
    assert dataset_names(options("mine", words=own)) == ["mine"]
    (tmp_path / "mine" / "fine").mkdir()
    configuration = f"--dataset-root {tmp_path}/mine/fine"
    assert dataset_names(options("mine", words=configuration)) == ["mine"]
    pattern = f"--dataset-root {tmp_path}/{{dataset}}"
    assert plan_jobs(options("wds/mine", words=pattern))[0].info is None
    with pytest.raises(DeclipError, match=r"'cifer10'.*did you mean 'cifar10'"):
        dataset_names(options("cifer10", words=root))


def test_splits_are_of_each_dataset_and_every_language_is_a_job():
    jobs = plan_jobs(
        options(
            "cifar10",
            "mnist",
            words="--task linear_probe --train-split a b --val-split v --language en it",
        )
    )
    assert [(job.dataset, job.train_split, job.val_split, job.language) for job in jobs] == [
        ("cifar10", "a", "v", "en"),
        ("cifar10", "a", "v", "it"),
        ("mnist", "b", "v", "en"),
        ("mnist", "b", "v", "it"),
    ]
    assert {job.val_proportion for job in jobs} == {0.2}
    with pytest.raises(DeclipError, match="3 values for 2 datasets"):
        plan_jobs(options("cifar10", "mnist", words="--train-split a b c"))
