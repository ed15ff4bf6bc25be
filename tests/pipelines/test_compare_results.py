"""Comparisons: the paired test's numbers, Holm's correction, and what must not be compared."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_files import write_classification

from declip_eval.outcomes import outcomes_path, read_outcomes, write_outcomes
from declip_eval.paired import paired_test
from declip_shards import DeclipError
from pipelines.compare_results import Contest, compare, holm_adjusted
from pipelines.stored_results import StoredResult, load_results

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def closed_test(p_values: list[float]) -> list[float]:
    """Holm's correction by its definition: the largest Bonferroni p-value of all sets of
    hypotheses that one belongs to."""
    everything = range(len(p_values))
    return [
        max(
            min(1.0, len(group) * min(p_values[i] for i in group))
            for size in range(1, len(p_values) + 1)
            for group in itertools.combinations(everything, size)
            if index in group
        )
        for index in everything
    ]


@given(P_VALUES)
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    assert holm_adjusted(p_values) == pytest.approx(closed_test(p_values))


@given(P_VALUES, st.randoms())
def test_holm_does_not_depend_on_the_order(p_values: list[float], random) -> None:
    order = list(range(len(p_values)))
    random.shuffle(order)
    shuffled = holm_adjusted([p_values[i] for i in order])
    assert shuffled == [holm_adjusted(p_values)[i] for i in order]


def sides(folder: Path) -> tuple[list[StoredResult], list[StoredResult]]:
    return load_results([folder / "a"]), load_results([folder / "b"])


def write_both(folder: Path, dataset: str, right_a: range, right_b: range, **changes) -> None:
    for name, right in (("a", right_a), ("b", right_b)):
        write_classification(folder / name, right, dataset=dataset, pretrained=name, **changes)


def of(contest: Contest, dataset: str):
    (found,) = [c for c in contest.comparisons if c.dataset == dataset and c.is_main]
    return found


def test_numbers_are_those_of_the_paired_test(tmp_path: Path) -> None:
    write_both(tmp_path, "cifar10", range(20), range(5, 50))
    write_both(tmp_path, "pets", range(20), range(1, 21))
    a, b = sides(tmp_path)
    contest = compare(a, b, seed=3, num_resamples=300)
    for dataset in ("cifar10", "pets"):
        found = of(contest, dataset)
        one, other = (
            read_outcomes(outcomes_path(next(s.path for s in side if s.dataset == dataset)))
            for side in (a, b)
        )
        test = paired_test(
            one,
            other,
            found.metric,
            seed=3,
            num_resamples=300,
        )
        assert (found.value_a, found.value_b) == (test.value_a, test.value_b)
        assert (found.difference, found.interval) == (test.difference, test.interval)
        assert (found.p_value, found.num_only_b) == (test.p_value, test.num_only_b)
    p_values = [of(contest, name).p_value for name in ("cifar10", "pets")]
    adjusted = [of(contest, name).p_adjusted for name in ("cifar10", "pets")]
    assert adjusted == holm_adjusted([p for p in p_values if p is not None])
    assert of(contest, "cifar10").verdict == "B better"
    assert of(contest, "pets").verdict == "not settled"
    assert contest.counts() == {
        "A better": 0, "B better": 1, "not settled": 1, "not tested": 0,
    }  # fmt: skip


def test_swapping_the_sides_turns_the_answer_around(tmp_path: Path) -> None:
    write_both(tmp_path, "cifar10", range(20), range(5, 50))
    a, b = sides(tmp_path)
    one, other = of(compare(a, b), "cifar10"), of(compare(b, a), "cifar10")
    assert one.difference == -other.difference
    assert one.p_value == other.p_value
    assert (one.verdict, other.verdict) == ("B better", "A better")


def test_a_main_metric_that_is_a_mean_of_two_is_among_all(tmp_path: Path) -> None:
    """Files of CLIP_benchmark hold the two alone."""
    write_both(tmp_path, "kinetics700", range(20), range(30))
    for stored in (found for side in sides(tmp_path) for found in side):
        content = json.loads(stored.path.read_text())
        for part in (
            content["metrics"],
            *(content["opendeclip"][n] for n in ("intervals", "chance")),
        ):
            part.pop("mean_acc1_acc5")
        stored.path.write_text(json.dumps(content))
    for all_metrics in (False, True):
        contest = compare(*sides(tmp_path), all_metrics=all_metrics)
        (main,) = [c for c in contest.comparisons if c.is_main]
        assert (main.metric, main.verdict) == ("mean_acc1_acc5", "B better")
        assert sum(contest.counts().values()) == 1
    assert len({c.metric for c in contest.comparisons}) == len(contest.comparisons) > 1


def test_each_other_metric_is_a_family_of_its_own(tmp_path: Path) -> None:
    for dataset in ("cifar10", "mnist"):
        write_both(tmp_path, dataset, range(20), range(5, 50))
    contest = compare(*sides(tmp_path), all_metrics=True)
    for metric in ("acc1", "mean_per_class_recall"):
        group = [c for c in contest.comparisons if c.metric == metric]
        assert len(group) == 2
        p_values = [c.p_value for c in group if c.p_value is not None]
        assert [c.p_adjusted for c in group] == holm_adjusted(p_values)
    assert {c.metric for c in contest.comparisons if c.is_main} == {"acc1"}


def test_different_data_is_refused_unless_forced(tmp_path: Path) -> None:
    write_classification(tmp_path / "a", range(30), num=60, pretrained="a")
    write_classification(
        tmp_path / "b", range(20), num=50, pretrained="b", data={"digest": "e" * 64}
    )
    a, b = sides(tmp_path)
    with pytest.raises(DeclipError, match=r"different data, demo/birds .*: data digest ddd.*eee"):
        compare(a, b)
    (found,) = compare(a, b, force=True).comparisons
    assert (found.value_a, found.value_b) == (0.5, 0.4)
    assert found.verdict == "not tested"
    assert "in the first outcomes only" in found.untested
    assert any("samples 60 / 50" in note for note in found.differs)


def test_what_else_differs_is_told(tmp_path: Path) -> None:
    for name, templates, seed in (("a", "simple", 0), ("b", "photo", 1)):
        # What came out of a fit is no difference of the two evaluations.
        fitted = {"l2_strength": float(seed), "validation_acc1": seed / 2}
        changes: dict[str, Any] = {
            "templates": templates,
            "settings": {"seed": seed} | fitted,
            "versions": {"torch": str(seed + 1)},
        }
        hashes = {"weights": name, "prompts": name, "data_train": "same"}
        write_classification(tmp_path / name, range(9), pretrained=name, hashes=hashes, **changes)
    (found,) = compare(*sides(tmp_path)).comparisons
    assert found.differs == (
        "prompts simple / photo", "seed 0 / 1", "version of torch 1 / 2", "hash of prompts",
    )  # fmt: skip


def test_without_outcomes_there_is_a_difference_and_no_test(tmp_path: Path) -> None:
    write_both(tmp_path, "cifar10", range(20), range(30))
    a, b = sides(tmp_path)
    outcomes_path(b[0].path).unlink()
    (found,) = compare(a, b).comparisons
    assert found.difference == pytest.approx(10 / 60)
    assert (found.p_value, found.p_adjusted, found.verdict) == (None, None, "not tested")
    assert found.untested == "B has no outcomes beside its result"


def test_outcomes_that_do_not_belong_to_their_result_are_refused(tmp_path: Path) -> None:
    write_both(tmp_path, "cifar10", range(20), range(30))
    a, b = sides(tmp_path)
    write_outcomes(read_outcomes(outcomes_path(a[0].path)), outcomes_path(b[0].path))
    with pytest.raises(DeclipError, match=r"says that acc1 is 0\.500000, but the outcomes beside"):
        compare(a, b)


def test_samples_of_the_training_data_can_be_left_out(tmp_path: Path) -> None:
    write_both(tmp_path, "cifar10", range(20), range(30))
    a, b = sides(tmp_path)
    overlap = np.zeros(60, bool)
    overlap[20:30] = True
    path = outcomes_path(b[0].path)
    write_outcomes(read_outcomes(path).with_overlap(overlap), path)
    (found,) = compare(a, b, without_overlap=True).comparisons
    assert (found.difference, found.num_queries, found.p_value) == (0.0, 50, 1.0)
    # Where nobody has looked for overlap, there is none to leave out.
    write_both(tmp_path / "more", "cifar10", range(20), range(30))
    (found,) = compare(*sides(tmp_path / "more"), without_overlap=True).comparisons
    assert found.verdict == "not tested"
    assert found.untested.endswith("The values are with the overlap.")


def test_what_one_side_lacks_is_named(tmp_path: Path) -> None:
    write_both(tmp_path, "cifar10", range(20), range(30))
    write_classification(tmp_path / "a", range(9), dataset="mnist", pretrained="a")
    contest = compare(*sides(tmp_path))
    assert contest.only_a == ("mnist (Zero-shot classification)",)
    assert contest.only_b == ()
    assert json.loads(json.dumps(contest.to_json()))["comparisons"][0]["verdict"]


def test_a_metric_that_one_side_lacks_is_named(tmp_path: Path) -> None:
    write_both(tmp_path, "cifar10", range(20), range(30))
    _, b = sides(tmp_path)
    content = json.loads(b[0].path.read_text())
    content["metrics"] = {"acc5": content["metrics"]["acc5"]}
    content["opendeclip"]["intervals"] = content["opendeclip"]["chance"] = {}
    b[0].path.write_text(json.dumps(content))
    contest = compare(*sides(tmp_path))
    assert contest.comparisons == ()
    assert contest.unmatched == ("cifar10 (Zero-shot classification), of which one lacks acc1",)


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    write_classification(tmp_path / "a", range(9), dataset="mnist")
    write_classification(tmp_path / "b", range(9), dataset="pets", pretrained="b")
    with pytest.raises(DeclipError, match="no task and dataset in common: A has mnist"):
        compare(*sides(tmp_path))


def test_few_shot_probes_come_by_their_number_of_pictures(tmp_path: Path) -> None:
    sides = []
    for name in ("a", "b"):
        for shots in (1, 4, 16):
            more = {"fewshot_k": float(shots)}
            write_classification(
                tmp_path / name, range(30), pretrained=name, task="linear_probe", extra_metrics=more
            )
        sides.append(load_results([tmp_path / name]))
    tasks = [item.task for item in compare(sides[0], sides[1], num_resamples=100).comparisons]
    assert tasks == [f"Few-shot probe, {told} a class" for told in
                     ("1 picture", "4 pictures", "16 pictures")]  # fmt: skip
