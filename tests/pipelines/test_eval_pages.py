"""Pages of results: whole, self-contained, escaped, and with the pictures of the examples."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from result_files import NAMES, answers, jpeg, picture_set, write_classification

from declip_eval.labelled_sets import LabelledSet, open_labelled_set, write_webdataset
from declip_eval.outcomes import (
    Outcomes,
    metrics_of,
    outcomes_path,
    read_outcomes,
    write_outcomes,
)
from declip_eval.results import EvalResult, Provenance, write_result
from declip_eval.score_outcomes import retrieval_outcomes
from pipelines.compare_results import compare
from pipelines.eval_cells import task_tables
from pipelines.eval_examples import Example, examples_path, read_examples, save_examples
from pipelines.eval_pages import compare_page, spread, table_page
from pipelines.stored_results import load_results

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Counts elements, and refuses ones that are closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Checker:
    """The page's elements; it is whole and fetches nothing."""
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.counts
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    return checker


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> LabelledSet:
    found: LabelledSet = picture_set(tmp_path_factory.mktemp("set"), 60, broken=[3])
    return found


def retrieval_result(folder: Path, outcomes: Outcomes) -> Path:
    """A result of so few pairs that larger recalls have no meaning."""
    metrics = metrics_of(outcomes, ["image_retrieval_recall@1", "text_retrieval_recall@1"])
    result = EvalResult(
        dataset="my/pairs", model="m", pretrained="p", task="zeroshot_retrieval",
        metrics=metrics, provenance=Provenance(num_samples=3),
    )  # fmt: skip
    path = write_result(result, folder)
    write_outcomes(outcomes, outcomes_path(path))
    return path


def with_examples(path: Path, pictures: LabelledSet, most: int = 60) -> Path:
    save_examples(path, pictures, read_outcomes(outcomes_path(path)), NAMES, most=most)
    return path


def test_the_table_page_holds_every_number_and_what_is_missing(tmp_path: Path) -> None:
    for pretrained, dataset, number in (
        ("a", "cifar10", 30), ("a", "pets", 12), ("a", "mnist", 45), ("<i>b", "pets", 24),
    ):  # fmt: skip
        write_classification(tmp_path, range(number), dataset=dataset, pretrained=pretrained)
    results = load_results([tmp_path])
    page = table_page(results, task_tables(results, published=True))
    checker = check(page)
    for told in ("50.0", "20.0", "75.0", "40.0", "missing", "ViT-T <i>b", "published"):
        assert told in checker.text
    assert "i" not in checker.counts
    # A radar and a chart of points, each drawn for two widths, and the legends' lines.
    assert page.count('<svg class="wide"') == page.count('<svg class="narrow"') == 2
    assert "Behind the numbers" in checker.text
    assert "not checked" in checker.text


def test_charts_leave_out_papers_that_have_few_of_the_numbers(tmp_path: Path) -> None:
    for dataset in ("cifar10", "cifar100", "food101", "imagenet1k"):
        write_classification(tmp_path, range(30), dataset=dataset)
    page = table_page(*((found := load_results([tmp_path])), task_tables(found, published=True)))
    assert "published: CLIP ViT-B-32 (YFCC15M-V2" in page
    assert "CLIP RN50 (YFCC15M-V2" in check(page).text  # In the table alone.
    legends = re.findall(r'<ul class="legend">.*?</ul>', page, re.DOTALL)
    assert legends
    assert not any("RN50" in legend for legend in legends)
    assert ": missing</text>" not in page


def test_examples_show_their_own_pictures_and_answers(
    tmp_path: Path, pictures: LabelledSet
) -> None:
    path = with_examples(write_classification(tmp_path, range(30)), pictures)
    results = load_results([tmp_path])
    page = table_page(results, task_tables(results), num_pictures=10)
    checker = check(page)
    assert checker.counts["img"] in (9, 10)
    embedded = {
        base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    }
    kept = {example.image for example in read_examples(path)}
    assert embedded <= kept
    assert len(re.findall(r'class="card bad"', page)) == 5
    assert len(re.findall(r'class="card good"', page)) == 5
    assert "img" not in check(table_page(results, task_tables(results), num_pictures=0)).counts


def test_an_unreadable_picture_is_told_and_hurts_nothing(
    tmp_path: Path, pictures: LabelledSet
) -> None:
    with_examples(write_classification(tmp_path, range(30)), pictures)
    results = load_results([tmp_path])
    checker = check(table_page(results, task_tables(results), num_pictures=60))
    assert checker.counts["img"] == 59
    assert "this picture cannot be read" in checker.text
    assert "<b>frog</b>" in checker.text
    assert "b" not in checker.counts


def test_retrieval_shows_captions_with_pictures_and_pictures_with_captions(tmp_path: Path) -> None:
    captions = [f"a <u>{word}</u>" for word in ("cat", "dog", "cow")]
    items = [(f"k{i}", jpeg(i), [text]) for i, text in enumerate(captions)]
    write_webdataset(tmp_path / "set", items, kind="retrieval")
    data = open_labelled_set(str(tmp_path / "set"), "set")
    features = np.eye(3, dtype=np.float32)
    outcomes = retrieval_outcomes(
        data.keys, [f"k{i}#0" for i in range(3)], features, features, [[0], [1], [2]]
    )
    path = retrieval_result(tmp_path / "r", outcomes)
    save_examples(path, data, outcomes, None)
    results = load_results([path])
    page = table_page(results, task_tables(results))
    checker = check(page)
    assert "u" not in checker.counts
    # Three captions find three pictures each; three pictures are asked with.
    assert checker.counts["img"] == 12
    assert len(re.findall(r'<div class="neighbors">', page)) == 6
    assert len(re.findall(r'class="card good"', page)) == 6


def test_few_pictures_are_shared_between_both_directions() -> None:
    def of(number: int, text: str) -> Example:
        return Example(key=f"k{number}", role="retrieval", text=text, image=None)

    texts, images = [of(i, "a cat") for i in range(9)], [of(i, "") for i in range(9)]
    for num_texts, num_images, most, expected in (
        (9, 9, 6, (3, 3)), (9, 1, 6, (5, 1)), (1, 9, 6, (1, 5)), (9, 9, 5, (3, 2)),
    ):  # fmt: skip
        shown = spread([*texts[:num_texts], *images[:num_images]], most)
        found = sum(bool(example.text) for example in shown)
        assert (found, len(shown) - found) == expected


def test_the_comparison_shows_where_one_alone_is_right(
    tmp_path: Path, pictures: LabelledSet
) -> None:
    right = {"a": range(20), "b": range(10, 60)}
    for name, rows in right.items():
        path = write_classification(tmp_path / name, rows, pretrained=name)
        with_examples(path, pictures, 30)
    a, b = load_results([tmp_path / "a"]), load_results([tmp_path / "b"])
    page = compare_page(compare(a, b), a, b)
    checker = check(page)
    _, labels, _ = answers(60, ())
    keys = {e.key for side in "ab" for e in read_examples(_only(tmp_path / side))}
    different = sum((int(key[1:]) in right["a"]) != (int(key[1:]) in right["b"]) for key in keys)
    assert page.count('class="card neutral"') == min(different, 24)
    first = next(int(key[1:]) for key in sorted(keys) if int(key[1:]) in range(10))
    wrong = NAMES[(labels[first] + 1) % 5]
    assert f"A ✓ {NAMES[labels[first]]}; B ✕ {wrong}" in checker.text
    assert "B better" in checker.text
    assert "no difference" in checker.text


def _only(folder: Path) -> Path:
    (path,) = folder.glob("*.examples.parquet")
    assert examples_path(path) == path
    return path


def test_a_comparison_without_examples_or_tests_is_a_page_too(tmp_path: Path) -> None:
    for name in "ab":
        path = write_classification(tmp_path / name, range(9), pretrained=name)
        outcomes_path(path).unlink()
    a, b = load_results([tmp_path / "a"]), load_results([tmp_path / "b"])
    checker = check(compare_page(compare(a, b), a, b))
    assert "not tested" in checker.text
    assert "img" not in checker.counts


def test_few_shot_probes_of_several_sizes_make_a_curve(tmp_path: Path) -> None:
    for shots, right in ((1, 20), (16, 40)):
        more = {"fewshot_k": float(shots)}
        write_classification(tmp_path, range(right), task="linear_probe", extra_metrics=more)
    results = load_results([tmp_path])
    page = table_page(results, task_tables(results))
    check(page)
    assert "Few-shot curves" in page
    low, high = (f"{100 * right / 60:.1f}" for right in (20, 40))
    assert f"ViT-T first from {low} to {high}" in page
    alone = [stored for stored in results if stored.shots == 1]
    assert "Few-shot curves" not in table_page(alone, task_tables(alone))
