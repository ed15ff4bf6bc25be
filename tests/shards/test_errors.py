"""Hints at a misspelt name."""

import pytest

from declip_shards.errors import did_you_mean

TASKS = ("zeroshot_classification", "few_shot", "linear_probe", "zeroshot_retrieval")


@pytest.mark.parametrize(
    ("wrong", "known", "meant"),
    [
        ("zero-shot-class", TASKS, "zeroshot_classification"),
        ("Retrieval", TASKS, "zeroshot_retrieval"),
        ("probe", TASKS, "linear_probe"),
        ("few-shots", TASKS, "few_shot"),
        ("filtre", ("filter", "embed"), "filter"),
        ("zeroshot", TASKS, "zeroshot_retrieval"),
    ],
)
def test_a_part_of_one_name_or_a_like_spelling_is_hinted_at(wrong, known, meant):
    assert did_you_mean(wrong, known).startswith(f" Did you mean {meant!r}? Known: ")


@pytest.mark.parametrize("wrong", ["xyz", "", "-"])
def test_nothing_is_hinted_at_where_nothing_is_near_but_all_are_named(wrong):
    assert did_you_mean(wrong, ["filter", "embed"]) == " Known: embed, filter."
    assert did_you_mean(wrong, []) == " Known: (none)."
