"""The options of declip eval."""

import pytest

from declip_shards import DeclipError
from pipelines.eval_options import REFUSED, model_specs, one_a_dataset, parse_options

BASE = ["--model", "m", "--dataset", "cifar10"]


def parse(text=""):
    return parse_options([*BASE, *text.split()])


def test_underscores_are_hyphens():
    words = (
        "--task linear_probe --recall{0}k 1 5 --batch{0}size 7 --val{0}proportion 0.1 "
        "--allow{0}missing"
    )
    assert parse(words.format("_")) == parse(words.format("-"))
    assert parse("--output a_b --train_split my_train").train_split == ("my_train",)


def test_values_keep_their_underscores_after_an_equals_sign():
    assert parse("--output=a_b --dataset_root=x_y").dataset_root == "x_y"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_use_here_is_refused_with_its_reason(name):
    with pytest.raises(DeclipError, match=r"CLIP_benchmark's and has no use here: \w"):
        parse(f"{name.replace('-', '_').replace('__', '--')} 1")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--batch-size 0", "--batch-size is 0; it must be at least 1"),
        ("--chunk-images 0", "--chunk-images is 0; it must be at least 1"),
        ("--num-resamples 5", "--num-resamples is 5; it must be at least 100"),
        ("--num-examples 1001", "--num-examples is 1001; it must be at most 1000"),
        ("--seed 99999999999", "it must be at most 2147483647"),
        ("--output out/{dataset}", "does not end in .json"),
        ("--output {set}.json", "--output: The output"),
        ("--output {task.json", "braces that do not pair"),
        ("--val-split val", "add linear_probe or few_shot to --task"),
        ("--task few_shot --val-proportion 0.1", "add linear_probe to --task"),
        ("--recall-k 0 5", "--recall-k is 0; it must be at least 1"),
        ("--recall-k 5 5", "names one number twice"),
        ("--unreadable-budget 1", "from 0 to below 1"),
        ("--view-cache-gb -1", "give 0"),
        ("--task linear_probe --val-proportion 1.5", "between 0 and 1"),
        ("--task linear_probe --val-split a --val-proportion 0.2", "give one of them"),
        ("--num-ranks 2 --distributed", "give one of them"),
        ("--train-selection x", "--train-data"),
        ("--task captioning", "is not measured here"),
        ("--task linear_prob", "Did you mean 'linear_probe'"),
        ("--fewshot-k 4", "add few_shot or linear_probe"),
        ("--task few_shot --fewshot-k -1", "--fewshot-k is -1; it must be at least 1"),
        ("--skip-existing --overwrite", "give one"),
        ("--model-type ja_clip", "only open_clip"),
        ("--device gpu", "--device is 'gpu'"),
        ("--recal-k 5", "Did you mean '--recall-k'"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(words, sentence):
    with pytest.raises(DeclipError) as error:
        parse(words)
    assert sentence in str(error.value)


def test_shots_of_a_linear_probe_are_few_shot_as_in_clip_benchmark():
    assert parse("--task linear_probe --fewshot_k 4").tasks == ("few_shot",)
    assert parse("--task linear_probe --fewshot_k -1").tasks == ("linear_probe",)
    both = parse("--task linear_probe few_shot --fewshot_k 4 2")
    assert (both.tasks, both.fewshot_k) == (("linear_probe", "few_shot"), (2, 4))


def test_models_come_as_pairs_products_and_lists(tmp_path):
    assert model_specs(["a", "a", "b"], None, None) == ("a", "b")
    product = model_specs(["A", "B"], ["x", "y"], None)
    assert product == tuple(f"open_clip:{m}/{w}" for m in "AB" for w in "xy")
    path = tmp_path / "models.txt"
    path.write_text("# ours\nA,x\n\nruns/mine\n")
    assert model_specs(None, None, [str(path), "B,y"]) == (
        "open_clip:A/x",
        "runs/mine",
        "open_clip:B/y",
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((None, None, None), "there is no model"),
        ((["a"], None, ["A,x"]), "leave those out"),
        ((None, None, ["A,"]), "write it MODEL,PRETRAINED"),
        ((["open_clip:A/x"], ["y"], None), "has its weights already"),
    ],
)
def test_models_that_cannot_be_told_are_refused(arguments, sentence):
    with pytest.raises(DeclipError) as error:
        model_specs(*arguments)
    assert sentence in str(error.value)


def test_an_empty_list_of_models_is_refused(tmp_path):
    (tmp_path / "models.txt").write_text("# none\n")
    with pytest.raises(DeclipError, match="empty list"):
        model_specs(None, None, [str(tmp_path / "models.txt")])


def test_one_value_is_for_all_datasets_and_as_many_are_for_each():
    assert one_a_dataset((), 2, "--val-split") == [None, None]
    assert one_a_dataset(("a",), 2, "--val-split") == ["a", "a"]
    assert one_a_dataset(("a", "b"), 2, "--val-split") == ["a", "b"]
    with pytest.raises(DeclipError, match="3 values for 2 datasets"):
        one_a_dataset("abc", 2, "--val-split")
