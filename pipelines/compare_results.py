"""Two models on the same datasets: differences, paired tests, and what else differs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from declip_eval.dataset_table import list_datasets
from declip_eval.outcomes import Outcomes, outcomes_path, read_outcomes
from declip_eval.paired import paired_test
from declip_shards import DeclipError
from pipelines.stored_results import TASK_TITLES, StoredResult, overlap_text, refuse_doubles

LEVEL = 0.05
"""Below it, after Holm's correction, a difference counts as settled."""
_VALUE_TOLERANCE = 1e-6
_OWN_HASHES = ("weights", "train", "ingest", "data", "evaluation")
"""Hashes that two models differ in, of course, or whose difference is told otherwise."""
_FITTED = re.compile(r"l2_strength|num_iterations|converged|validation_(?!fraction)\w+")
"""What came out of fitting a probe, and stands among its settings."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of both models on one dataset."""

    task: str
    dataset: str
    metric: str
    is_main: bool
    """Whether it is the number that papers print of the dataset."""
    value_a: float
    """Fraction of 1."""
    value_b: float
    difference: float
    """value_b minus value_a: above 0 the second model is better."""
    interval: tuple[float, float] | None = None
    """95%, of the difference; None where it was not tested."""
    p_value: float | None = None
    """Two-sided, of the paired test."""
    p_adjusted: float | None = None
    """After Holm's correction for the number of tests of its family."""
    num_queries: int | None = None
    num_only_a: int | None = None
    """Queries that the first model alone got right."""
    num_only_b: int | None = None
    method: str = ""
    """The test; empty where there was none."""
    untested: str = ""
    """Why there was no test."""
    differs: tuple[str, ...] = ()
    """What differs between the two results beside the model."""

    @property
    def verdict(self) -> str:
        """Which model is better, if that is settled."""
        if self.p_adjusted is None:
            return "not tested"
        if self.p_adjusted >= LEVEL or self.difference == 0:
            return "not settled"
        return "B better" if self.difference > 0 else "A better"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All comparisons of two models."""

    model_a: str
    model_b: str
    comparisons: tuple[Comparison, ...]
    only_a: tuple[str, ...]
    """Task and dataset that the first model alone was evaluated on."""
    only_b: tuple[str, ...]
    unmatched: tuple[str, ...]
    """Task and dataset of both, without a metric in common."""
    seed: int
    num_resamples: int
    without_overlap: bool

    def counts(self) -> dict[str, int]:
        """Verdict -> main comparisons."""
        found = dict.fromkeys(("A better", "B better", "not settled", "not tested"), 0)
        for item in self.comparisons:
            if item.is_main:
                found[item.verdict] += 1
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain objects, for `--json`."""
        content = asdict(self)
        content["comparisons"] = [
            {**asdict(item), "verdict": item.verdict} for item in self.comparisons
        ]
        content["level"] = LEVEL
        return content


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method (Holm 1979).

    The smallest is multiplied by their number n, the next by n - 1, and so on; none falls below
    the one before it, and none exceeds 1. Holds for tests that depend on each other.

    Returns:
        The corrected values, in the order that was given.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(
    side_a: Sequence[StoredResult],
    side_b: Sequence[StoredResult],
    *,
    all_metrics: bool = False,
    force: bool = False,
    without_overlap: bool = False,
    seed: int = 0,
    num_resamples: int = 2_000,
) -> Contest:
    """Compare the results of two models, dataset by dataset.

    Args:
        side_a: results of one model.
        side_b: results of another, or of the same one evaluated otherwise.
        all_metrics: every metric that both have, instead of each dataset's main one.
        force: compare results of different data, too; then without a test where the samples are
            not the same.
        without_overlap: test on the samples alone that neither model's training data holds.
        seed: of the paired bootstrap.
        num_resamples: of the paired bootstrap.

    Raises:
        DeclipError: nothing in common, results of different data without `force`, or outcomes that
            do not belong to their result.
    """
    by_place_a, by_place_b = _by_place(side_a), _by_place(side_b)
    common = sorted((place for place in by_place_a if place in by_place_b), key=_order)
    if not common:
        raise DeclipError(
            f"the two have no task and dataset in common: A has {_places(by_place_a)}; B has "
            f"{_places(by_place_b)}."
        )
    pairs = [(by_place_a[place], by_place_b[place]) for place in common]
    if not force:
        _refuse_other_data(pairs)
    comparisons: list[Comparison] = []
    unmatched: list[str] = []
    for a, b in pairs:
        found = _compare_pair(
            a, b, all_metrics, seed=seed, num_resamples=num_resamples, without=without_overlap
        )
        comparisons += found
        if not found:
            wanted = a.main_metric or "its main metric"
            unmatched.append(f"{_place((a.task, a.dataset))}, of which one lacks {wanted}")
    return Contest(
        model_a=side_a[0].model,
        model_b=side_b[0].model,
        comparisons=tuple(_corrected(comparisons)),
        only_a=tuple(_place(place) for place in by_place_a if place not in by_place_b),
        only_b=tuple(_place(place) for place in by_place_b if place not in by_place_a),
        unmatched=tuple(unmatched),
        seed=seed,
        num_resamples=num_resamples,
        without_overlap=without_overlap,
    )


Place = tuple[str, str]
"""(task, dataset)."""


def _by_place(side: Sequence[StoredResult]) -> dict[Place, StoredResult]:
    refuse_doubles(side)
    return {(stored.task, stored.dataset): stored for stored in side}


def _order(place: Place) -> tuple[int, str, int, str]:
    """By task, few-shot probes by their number of pictures; then as in the table of datasets."""
    task, dataset = place
    titles, names = list(TASK_TITLES.values()), list_datasets()
    number = titles.index(task) if task in titles else len(titles)
    task = re.sub(r"\d+", lambda digits: digits[0].zfill(6), task)
    return number, task, names.index(dataset) if dataset in names else len(names), dataset


def _place(place: Place) -> str:
    return f"{place[1]} ({place[0]})"


def _places(places: Iterable[Place]) -> str:
    return ", ".join(_place(place) for place in places)


def data_differences(a: StoredResult, b: StoredResult) -> list[str]:
    """What says that two results are of different data, in words; empty where nothing does."""
    found = []
    if a.data_digest and b.data_digest and a.data_digest != b.data_digest:
        found.append(f"data digest {a.data_digest[:12]} / {b.data_digest[:12]}")
    known_a, known_b = a.result.provenance, b.result.provenance
    if known_a and known_b and known_a.num_samples != known_b.num_samples:
        found.append(f"samples {known_a.num_samples:,} / {known_b.num_samples:,}")
    return found


def _refuse_other_data(pairs: Sequence[tuple[StoredResult, StoredResult]]) -> None:
    told = [
        f"{_place((a.task, a.dataset))}: {', '.join(found)}"
        for a, b in pairs
        if (found := data_differences(a, b))
    ]
    if told:
        more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
        raise DeclipError(
            f"A and B were evaluated on different data, {told[0]}{more}: such numbers do not "
            "compare; evaluate both on the same data, or add --force to see them all the same."
        )


def _differences(a: StoredResult, b: StoredResult) -> list[str]:
    """What differs beside the model: data, prompts, settings, versions."""
    found = data_differences(a, b)
    known_a, known_b = a.result.provenance, b.result.provenance
    if known_a is None or known_b is None:
        return [*found, "one result does not say what it is of: its data may differ"]
    if not (a.data_digest and b.data_digest):
        found.append("one result does not name its data's digest: its data may differ")
    if a.result.language != b.result.language:
        found.append(f"language {a.result.language} / {b.result.language}")
    if known_a.templates != known_b.templates:
        found.append(f"prompts {known_a.templates} / {known_b.templates}")
    if a.num_overlap != b.num_overlap:
        found.append(f"samples in the training data {overlap_text(a)} / {overlap_text(b)}")
    if known_a.num_classes != known_b.num_classes:
        found.append(f"classes {known_a.num_classes} / {known_b.num_classes}")
    maps: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
        ("", known_a.settings, known_b.settings),
        ("version of ", known_a.versions, known_b.versions),
    ]
    for what, first, second in maps:
        for name in sorted({*first, *second}):
            if _FITTED.fullmatch(name):
                continue
            values = first.get(name, "none"), second.get(name, "none")
            if values[0] != values[1]:
                found.append(f"{what}{name} {values[0]} / {values[1]}")
    for name in sorted({*known_a.hashes, *known_b.hashes}):
        if name not in _OWN_HASHES and known_a.hashes.get(name) != known_b.hashes.get(name):
            found.append(f"hash of {name}")
    return found


def _compare_pair(
    a: StoredResult,
    b: StoredResult,
    all_metrics: bool,
    *,
    seed: int,
    num_resamples: int,
    without: bool,
) -> list[Comparison]:
    # The main one first: it may be no number of the file, but a mean of two.
    metrics = list(filter(None, [a.main_metric]))
    if all_metrics:
        metrics = list(dict.fromkeys([*metrics, *a.metrics]))
    outcomes, why = _outcomes_of_both(a, b)
    differs = tuple(_differences(a, b))
    found = []
    for metric in metrics:
        values = a.value(metric), b.value(metric)
        if values[0] is None or values[1] is None:
            continue
        plain = Comparison(
            task=a.task,
            dataset=a.dataset,
            metric=metric,
            is_main=metric == a.main_metric,
            value_a=values[0],
            value_b=values[1],
            difference=values[1] - values[0],
            untested=why,
            differs=differs,
        )
        if outcomes is not None:
            plain = _tested(plain, outcomes, (a, b), seed, num_resamples, without)
        elif without:
            plain = replace(plain, untested=f"{why}; the values are with the overlap")
        found.append(plain)
    return found


def _outcomes_of_both(
    a: StoredResult, b: StoredResult
) -> tuple[tuple[Outcomes, Outcomes] | None, str]:
    """Both results' outcomes, or why there are none."""
    found = []
    for side, stored in (("A", a), ("B", b)):
        path = outcomes_path(stored.path)
        if stored.shots and not path.exists():
            return None, "a mean over several draws has no answers of its own"
        if not path.exists():
            return None, f"{side} has no outcomes beside its result"
        try:
            found.append(read_outcomes(path))
        except ValueError as error:
            raise DeclipError(str(error)) from error
    return (found[0], found[1]), ""


def _tested(
    plain: Comparison,
    outcomes: tuple[Outcomes, Outcomes],
    stored: tuple[StoredResult, StoredResult],
    seed: int,
    num_resamples: int,
    without: bool,
) -> Comparison:
    """The comparison with its paired test, or with why there is none."""
    try:
        test = paired_test(
            *outcomes,
            plain.metric,
            seed=seed,
            num_resamples=num_resamples,
            without_overlap=without,
        )
    except ValueError as error:
        why = f"{error} The values are with the overlap." if without else str(error)
        return replace(plain, untested=why)
    if not without:
        told = ((plain.value_a, test.value_a), (plain.value_b, test.value_b))
        for result, (value, again) in zip(stored, told, strict=True):
            if math.isnan(again) or abs(value - again) > _VALUE_TOLERANCE:
                raise DeclipError(
                    f"{str(result.path)!r} says that {plain.metric} is {value:.6f}, but the "
                    f"outcomes beside it come to {again:.6f}; they are not of one evaluation: "
                    "evaluate again with --overwrite."
                )
    return replace(
        plain,
        value_a=test.value_a,
        value_b=test.value_b,
        difference=test.difference,
        interval=test.interval,
        p_value=test.p_value,
        num_queries=test.num_queries,
        num_only_a=test.num_only_a,
        num_only_b=test.num_only_b,
        method=test.method,
        untested="",
    )


def _corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With Holm's correction: all main metrics are one family, each other metric is its own."""
    families: dict[str, list[int]] = {}
    for index, item in enumerate(comparisons):
        if item.p_value is not None:
            families.setdefault("" if item.is_main else item.metric, []).append(index)
    found = list(comparisons)
    for members in families.values():
        p_values = [comparisons[i].p_value for i in members]
        adjusted = holm_adjusted([p for p in p_values if p is not None])
        for index, p_value in zip(members, adjusted, strict=True):
            found[index] = replace(found[index], p_adjusted=p_value)
    return found
