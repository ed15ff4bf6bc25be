"""The papers' numbers: a sound table, whose averages are the papers' own."""

from collections import Counter

import pytest

from declip_eval.dataset_table import find_dataset, get_suite
from declip_eval.published_results import parse_published, published_results
from declip_eval.results import TASKS

HEAD = "model,tower,data,epochs,task,dataset,metric,percent,source,notes"
ROW = "CLIP,ViT-B-32,YFCC15M-V2,32,zeroshot_classification,cifar10,acc1,63.7,ALIP,a note"


def test_every_number_names_a_known_dataset_task_and_source() -> None:
    results = published_results()
    assert len(results) > 100
    for item in results:
        info = find_dataset(item.dataset)
        assert info is not None
        assert info.name == item.dataset
        assert item.task in TASKS
        assert item.source
        assert 0 < item.value < 1
        if item.task != "zeroshot_retrieval":
            assert item.metric.removeprefix("lp_") == info.metric
            assert item.metric.startswith("lp_") == (item.task == "linear_probe")


@pytest.mark.parametrize(
    ("model", "task", "num", "printed"),
    [
        ("CLIP", "zeroshot_classification", 11, 31.8),
        ("SLIP", "zeroshot_classification", 11, 30.0),
        ("FILIP", "zeroshot_classification", 11, 37.2),
        ("DeCLIP", "zeroshot_classification", 11, 41.3),
        ("DeFILIP", "zeroshot_classification", 11, 44.2),
        ("CLIP", "linear_probe", 10, 63.0),
        ("DeCLIP", "linear_probe", 10, 68.7),
    ],
)
def test_averages_are_those_that_alip_prints(
    model: str, task: str, num: int, printed: float
) -> None:
    own = [
        item
        for item in published_results()
        if (item.model, item.tower, item.data, item.task) == (model, "ViT-B-32", "YFCC15M-V2", task)
    ]
    assert {item.dataset for item in own} <= set(get_suite("declip11"))
    assert len(own) == num
    # Printed to a tenth, of numbers that are rounded to a tenth themselves.
    assert sum(item.percent for item in own) / num == pytest.approx(printed, abs=0.1)


def test_one_label_is_one_model() -> None:
    counts = Counter(
        (item.label, item.task, item.dataset, item.metric) for item in published_results()
    )
    assert set(counts.values()) == {1}


def test_a_table_is_read_as_it_stands() -> None:
    (item,) = parse_published(f"{HEAD}\n{ROW}\n")
    assert (item.model, item.percent) == ("CLIP", 63.7)
    assert item.value == pytest.approx(0.637)
    assert item.label == "CLIP ViT-B-32 (YFCC15M-V2, 32 epochs)"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ROW, "The columns are CLIP, ViT-B-32"),
        (f"{HEAD}\n{ROW}\n{ROW}\n", "Line 3 of the published results gives CLIP ViT-B-32"),
        (f"{HEAD}\n{ROW.replace('63.7', '637')}\n", "Line 2 .* has percent '637', which is no num"),
        (f"{HEAD}\n{ROW.replace('63.7', 'x')}\n", "has percent 'x', which is no number from 0"),
        (f"{HEAD}\n{ROW.replace('ALIP', '')}\n", "Line 2 of the published results has no source"),
        (f"{HEAD}\nCLIP,ViT-B-32\n", "Line 2 of the published results has not 10 cells"),
    ],
)
def test_faults_are_told(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_published(text)
