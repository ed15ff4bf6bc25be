"""The options of declip eval."""

import pytest

from declip_shards import DeclipError
from pipelines.eval_options import REFUSED, parse_options

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
        ("--feature-cache-gb nan", "--feature-cache-gb is nan; give 0 (keep none) or more"),
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
