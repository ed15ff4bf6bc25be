"""The tasks of an evaluation: from features and labels to outcomes and metrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from declip_eval.dataset_table import DatasetInfo
from declip_eval.few_shot import few_shot
from declip_eval.labelled_sets import DatasetError, LabelledSet
from declip_eval.linear_probe import Probe, fit_probe
from declip_eval.outcomes import Outcomes, metric_names, metrics_of
from declip_eval.retrieval import chance_retrieval
from declip_eval.score_outcomes import (
    classification_outcomes,
    classification_outcomes_of_features,
    multilabel_outcomes,
    retrieval_outcomes,
    retrieval_outcomes_of_scores,
)
from declip_eval.zeroshot import chance_classification
from pipelines.eval_features import FeatureWork, Taken
from pipelines.eval_options import EvalOptions

STEPS = 4
"""Steps of a task at most: features of up to three splits, and marks of pictures."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One dataset in front of one model."""

    work: FeatureWork
    options: EvalOptions
    info: DatasetInfo | None
    test: LabelledSet
    train: LabelledSet | None = None
    """Of a probe."""
    validation: LabelledSet | None = None
    """Of a probe; None: a share of the training split."""
    val_proportion: float = 0.2
    place: int = 0
    """Number of the first step."""

    @property
    def name(self) -> str:
        """For progress."""
        return f"eval: {self.test.name}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a task gives, before it is written."""

    task: str
    """CLIP_benchmark's name of it."""
    outcomes: tuple[Outcomes, ...]
    """One for each draw of training samples; one in all for everything but few-shot probes."""
    metrics: dict[str, float]
    """Means over the outcomes."""
    chance: dict[str, float]
    num_samples: int
    unreadable: dict[int, str]
    num_classes: int | None = None
    intervals: dict[str, tuple[float, float]] | None = None
    """None: by the bootstrap over the outcomes."""
    settings: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    shots: int | None = None
    """Training samples a class of a few-shot probe."""


def zeroshot_classification(subject: Subject) -> Measured | None:
    """Classify pictures, of one or of several classes each, by prompts.

    Returns:
        None on ranks other than 0.

    Raises:
        DatasetError: no names or templates, or too many unreadable pictures.
    """
    data, work, info = subject.test, subject.work, subject.info
    names, templates = prompts_of(subject)
    candidates = info.candidates if info is not None else None
    if work.model.scoring == "global":
        taken = work.features(data, "features", subject.place, subject.name)
    else:
        taken = work.class_scores(data, names, templates, subject.place, subject.name)
    if taken is None:
        return None
    readable = readable_rows(data, taken, subject.options.unreadable_budget)
    labels = _labels(data)
    is_multilabel = data.kind == "multilabel"
    if work.model.scoring == "global" and not is_multilabel:
        outcomes = classification_outcomes_of_features(
            data.keys,
            taken.arrays["features"],
            work.model.classifier(names, templates),
            labels,
            candidates=candidates,
            is_readable=readable,
        )
    else:
        scores = taken.arrays.get("scores")
        if scores is None:
            scores = taken.arrays["features"] @ work.model.classifier(names, templates)
        outcomes = (
            multilabel_outcomes(data.keys, scores, labels, is_readable=readable)
            if is_multilabel
            else classification_outcomes(
                data.keys, scores, labels, candidates=candidates, is_readable=readable
            )
        )
    return _measured(subject, "zeroshot_classification", outcomes, taken, candidates=candidates)


def zeroshot_retrieval(subject: Subject) -> Measured | None:
    """Find pictures by captions, and captions by pictures.

    Every caption is a query, as in CLIP_benchmark; where several pictures have the very same
    caption, each of them is a right answer to it.

    Returns:
        None on ranks other than 0.
    """
    data, work = subject.test, subject.work
    captions = data.captions or []
    texts = [text for of_picture in captions for text in of_picture]
    for k in subject.options.recall_k:
        if k > min(len(data), len(texts)):
            raise DatasetError(
                f"--recall-k has {k}, but {data.name} has {len(data)} pictures and {len(texts)} "
                "captions; choose smaller numbers."
            )
    text_keys = caption_keys(data)
    rows_of: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows_of.setdefault(text, []).append(row)
    positives = [sorted({r for text in some for r in rows_of[text]}) for some in captions]
    if work.model.scoring == "global":
        taken = work.features(data, "features", subject.place, subject.name)
    else:
        taken = work.text_scores(data, texts, subject.place, subject.name)
    if taken is None:
        return None
    readable = readable_rows(data, taken, subject.options.unreadable_budget)
    if work.model.scoring == "global":
        outcomes = retrieval_outcomes(
            data.keys,
            text_keys,
            taken.arrays["features"],
            work.model.encode_texts(texts),
            positives,
            is_readable=readable,
        )
    else:
        outcomes = retrieval_outcomes_of_scores(
            data.keys,
            text_keys,
            taken.arrays["to_text"],
            taken.arrays["to_image_t"],
            positives,
            is_readable=readable,
        )
    names = metric_names(outcomes, subject.options.recall_k)
    chance = chance_retrieval(positives, len(texts), recall_k=subject.options.recall_k)
    return Measured(
        task="zeroshot_retrieval",
        outcomes=(outcomes,),
        metrics=metrics_of(outcomes, names),
        chance=chance,
        num_samples=len(data),
        unreadable=taken.unreadable,
        settings={
            "num_captions": len(texts),
            "num_distinct_captions": len(rows_of),
            "num_pictures_to_find": int(readable.sum()),
            "scoring": work.model.scoring,
        },
    )


def caption_keys(data: LabelledSet) -> list[str]:
    """Names of all captions: their picture's key and their number."""
    captions = data.captions or []
    return [
        f"{key}#{number}"
        for key, of_picture in zip(data.keys, captions, strict=True)
        for number in range(len(of_picture))
    ]


@dataclass(frozen=True)
class ProbeParts:
    """What probes are fitted on and tested with; unreadable pictures are left out of fitting."""

    train: npt.NDArray[np.float32]
    train_labels: npt.NDArray[Any]
    validation: npt.NDArray[np.float32] | None
    validation_labels: npt.NDArray[Any] | None
    test: Taken
    test_labels: npt.NDArray[Any]
    readable: npt.NDArray[np.bool_]
    num_left_out: int
    """Unreadable pictures of training and validation."""


def probe_parts(subject: Subject) -> ProbeParts | None:
    """Take the features of all splits of a probe.

    Returns:
        None on ranks other than 0.
    """
    assert subject.train is not None
    sets = [subject.test, subject.train, subject.validation]
    taken = [
        subject.work.features(data, "probe", subject.place + step, f"{subject.name} {data.split}")
        for step, data in enumerate(sets)
        if data is not None
    ]
    if taken[0] is None:
        return None
    budget = subject.options.unreadable_budget
    found: list[tuple[npt.NDArray[np.float32], npt.NDArray[Any]]] = []
    num_left_out = 0
    for data, part in zip(sets[1:], taken[1:], strict=False):
        assert data is not None
        assert part is not None
        rows = readable_rows(data, part, budget)
        num_left_out += len(rows) - int(rows.sum())
        found.append((part.arrays["probe"][rows], _labels(data)[rows]))
    validation, validation_labels = found[1] if len(found) > 1 else (None, None)
    return ProbeParts(
        *found[0],
        validation,
        validation_labels,
        taken[0],
        _labels(subject.test),
        readable_rows(subject.test, taken[0], budget),
        num_left_out,
    )


def linear_probe(subject: Subject) -> Measured | None:
    """Fit a linear classifier on frozen features, its strength chosen as CLIP's was.

    Returns:
        None on ranks other than 0.
    """
    parts = probe_parts(subject)
    if parts is None:
        return None
    is_multilabel = subject.test.kind == "multilabel"
    probe = fit_probe(
        parts.train,
        parts.train_labels,
        parts.test.arrays["probe"],
        parts.test_labels,
        seed=subject.options.seed,
        sweep="clip",
        validation_fraction=subject.val_proportion,
        validation_features=parts.validation,
        validation_labels=parts.validation_labels,
        device=subject.work.device,
        multilabel=is_multilabel,
        selection_metric=_selection_metric(subject.info, is_multilabel),
    )
    settings = _probe_settings(subject, parts) | {
        name: value for name, value in probe.metrics.items() if not name.startswith("lp_")
    }
    settings |= {"sweep": "clip", "converged": probe.converged}
    if parts.validation is None:
        settings["validation_fraction"] = subject.val_proportion
    measured = _measured(
        subject, "linear_probe", _probe_outcomes(subject, parts, probe), parts.test, prefix="lp_"
    )
    measured.settings.update(settings)
    return measured


def few_shot_probes(subject: Subject) -> list[Measured] | None:
    """Fit probes on a few samples a class, for each number of them.

    Metrics are means over the draws.

    Returns:
        None on ranks other than 0.
    """
    parts = probe_parts(subject)
    if parts is None:
        return None
    found = []
    seeds = range(subject.options.seed, subject.options.seed + subject.options.fewshot_seeds)
    for k in subject.options.fewshot_k:
        result = few_shot(
            parts.train,
            parts.train_labels,
            parts.test.arrays["probe"],
            parts.test_labels,
            k=k,
            seeds=tuple(seeds),
            validation_features=parts.validation,
            validation_labels=parts.validation_labels,
            sweep="grid" if parts.validation is None else "clip",
            device=subject.work.device,
        )
        draws = [
            _measured(
                subject,
                "linear_probe",
                _probe_outcomes(subject, parts, result.probes[seed]),
                parts.test,
                prefix="lp_",
            )
            for seed in seeds
        ]
        metrics = mean_metrics([draw.metrics for draw in draws])
        found.append(
            dataclasses.replace(
                draws[0],
                outcomes=tuple(outcomes for draw in draws for outcomes in draw.outcomes),
                metrics=metrics,
                intervals={n: ends for n, ends in result.intervals.items() if n in metrics},
                settings=_probe_settings(subject, parts) | {"fewshot_seeds": len(seeds)},
                shots=k,
            )
        )
    return found


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric; all have the same."""
    return {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}


def prompts_of(subject: Subject) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The names of classes and the templates of a zero-shot task.

    Raises:
        DatasetError: the dataset has none, and none were given.
    """
    data, info = subject.test, subject.info
    names = data.class_names
    if info is not None and info.candidates is not None:
        names = info.class_names
    if not names:
        raise DatasetError(
            f"{data.name} has no class names, so it cannot be classified by prompts; put a "
            "classnames.txt beside the data, or give --classnames FILE."
        )
    if not data.templates:
        raise DatasetError(
            f"{data.name} has no prompt templates; put a zeroshot_classification_templates.txt "
            "beside the data, or give --templates, such as photo."
        )
    return names, data.templates


def readable_rows(data: LabelledSet, taken: Taken, budget: float) -> npt.NDArray[np.bool_]:
    """Which pictures could be read.

    Raises:
        DatasetError: more than the budget could not.
    """
    rows = np.ones(len(data), dtype=np.bool_)
    rows[list(taken.unreadable)] = False
    num_bad = len(taken.unreadable)
    if num_bad > budget * len(data):
        first = min(taken.unreadable)
        why = taken.unreadable[first].rstrip(". ")
        raise DatasetError(
            f"{num_bad} of {len(data)} pictures of {data.name} ({data.split}) cannot be read, "
            f"{num_bad / len(data):.2%} with --unreadable-budget {budget:g}; the first is "
            f"{data.keys[first]!r}: {why}. Fetch the dataset again, or raise the budget: they "
            "count as wrong."
        )
    return rows


def _labels(data: LabelledSet) -> npt.NDArray[Any]:
    if data.labels is None:
        raise DatasetError(f"{data.name} ({data.split}) has captions and no labels.")
    return data.labels


def _measured(
    subject: Subject,
    task: str,
    outcomes: Outcomes,
    taken: Taken,
    *,
    prefix: str = "",
    candidates: Sequence[Sequence[int]] | None = None,
) -> Measured:
    metrics = metrics_of(outcomes, [prefix + name for name in metric_names(outcomes)])
    chance = _chance(outcomes, candidates)
    settings: dict[str, str | int | float | bool | None] = {}
    if not prefix:
        settings["scoring"] = subject.work.model.scoring
    return Measured(
        task=task,
        outcomes=(outcomes,),
        metrics=metrics,
        chance={prefix + n: v for n, v in chance.items() if prefix + n in metrics},
        num_samples=len(subject.test),
        unreadable=taken.unreadable,
        num_classes=outcomes.num_classes,
        settings=settings,
    )


def _chance(outcomes: Outcomes, candidates: Sequence[Sequence[int]] | None) -> Mapping[str, float]:
    """What guessing gives, by the metrics' plain names; nothing where it has no simple form."""
    num_classes = outcomes.num_classes or 1
    if outcomes.kind == "multilabel":
        # A random order's precision is the class's share of the samples at every depth.
        return {"mean_average_precision": float(outcomes.columns["labels"].mean(axis=0).mean())}
    if candidates is not None:
        sizes = np.array([len(rows) for rows in candidates])
        return {"acc1": float(sizes[outcomes.columns["label"]].mean() / num_classes)}
    chance = dict(chance_classification(num_classes))
    if "acc5" in chance:
        chance["mean_acc1_acc5"] = (chance["acc1"] + chance["acc5"]) / 2
    if "score" in outcomes.columns:
        chance["roc_auc"] = 0.5
    return chance


def _probe_outcomes(subject: Subject, parts: ProbeParts, probe: Probe) -> Outcomes:
    """The test set's answers of a fitted probe.

    Raises:
        DatasetError: a class has no training picture, so that its number means another one.
    """
    keys = subject.test.keys
    if subject.test.kind == "multilabel":
        return multilabel_outcomes(
            keys, probe.scores, parts.test_labels, is_readable=parts.readable
        )
    absent = np.setdiff1d(np.arange(int(probe.classes.max()) + 1), probe.classes)
    if absent.size:
        raise DatasetError(
            f"class {absent[0]} of {subject.test.name} has no training picture; fetch the "
            "training split again."
        )
    return classification_outcomes(
        keys, probe.scores, parts.test_labels, is_readable=parts.readable, tolerance=0.0
    )


def _selection_metric(info: DatasetInfo | None, is_multilabel: bool) -> str | None:
    """The metric that chooses a probe's strength: the one that papers print of the dataset."""
    return None if info is None or is_multilabel else info.metric


def _probe_settings(
    subject: Subject, parts: ProbeParts
) -> dict[str, str | int | float | bool | None]:
    settings: dict[str, str | int | float | bool | None] = {
        "features": subject.work.model.probe_features,
        "num_train": len(parts.train),
        "num_train_unreadable": parts.num_left_out,
    }
    if parts.validation is not None:
        settings["num_validation"] = len(parts.validation)
    return settings
