"""Results with outcomes, as `declip eval` writes them, made of scores that a test chooses."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from declip_eval.bootstrap import bootstrap_intervals
from declip_eval.labelled_sets import LabelledSet, open_labelled_set, write_webdataset
from declip_eval.outcomes import (
    Outcomes,
    metric_names,
    metrics_of,
    outcomes_path,
    write_outcomes,
)
from declip_eval.results import EvalResult, Provenance, write_result
from declip_eval.score_outcomes import classification_outcomes

NAMES = ("airplane", "bird", "cat", "dog", "<b>frog</b>")


def jpeg(index: int, side: int = 160) -> bytes:
    """A picture of one color that tells its number."""
    file = io.BytesIO()
    color = (index * 37 % 256, index * 91 % 256, 128)
    Image.new("RGB", (side, side // 2), color).save(file, "JPEG")
    return file.getvalue()


def answers(
    num: int, right: Sequence[int], *, num_classes: int = 5
) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Keys, labels and scores of samples of which those in `right` are answered rightly."""
    labels = np.arange(num) % num_classes
    told = (labels + 1) % num_classes
    told[list(right)] = labels[list(right)]
    scores = np.zeros((num, num_classes), np.float32)
    scores[np.arange(num), told] = 1.0
    # No other ties: the order of the rest follows from the class's number.
    scores -= np.arange(num_classes, dtype=np.float32) / 100
    return [f"s{index:03d}" for index in range(num)], labels, scores


def write_classification(
    folder: Path,
    right: Sequence[int],
    *,
    num: int = 60,
    dataset: str = "demo/birds",
    model: str = "ViT-T",
    pretrained: str = "first",
    **changes: Any,
) -> Path:
    """A result whose samples `right` are answered rightly, and its outcomes."""
    keys, labels, scores = answers(num, right)
    outcomes = classification_outcomes(keys, scores, labels)
    return write_with_outcomes(folder, outcomes, dataset, model, pretrained, **changes)


def write_with_outcomes(
    folder: Path,
    outcomes: Outcomes,
    dataset: str,
    model: str,
    pretrained: str,
    *,
    task: str = "zeroshot_classification",
    extra_metrics: dict[str, float] | None = None,
    **changes: Any,
) -> Path:
    """A result with every metric of its outcomes."""
    prefix = "lp_" if task == "linear_probe" else ""
    names = [prefix + name for name in metric_names(outcomes)]
    metrics = metrics_of(outcomes, names)
    provenance = Provenance(
        num_samples=len(outcomes),
        num_classes=outcomes.num_classes,
        chance=dict.fromkeys(names, 0.2),
        intervals=bootstrap_intervals(outcomes, names, seed=0, num_resamples=200),
        templates="simple" if task == "zeroshot_classification" else None,
        settings={"seed": 0},
        data={"digest": "d" * 64, "num_samples": len(outcomes)},
        num_unreadable=0,
    )
    result = EvalResult(
        dataset=dataset,
        model=model,
        pretrained=pretrained,
        task=task,
        metrics=metrics | (extra_metrics or {}),
        provenance=replace(provenance, **changes),
    )
    path = write_result(result, folder)
    write_outcomes(outcomes, outcomes_path(path))
    return path


def picture_set(folder: Path, num: int = 60, *, broken: Sequence[int] = ()) -> LabelledSet:
    """Pictures of the classes `NAMES` that `answers` is about, some of them unreadable."""
    keys, labels, _ = answers(num, ())
    items = [
        (key, b"\xff\xd8\xff no picture" if index in broken else jpeg(index), int(label))
        for index, (key, label) in enumerate(zip(keys, labels, strict=True))
    ]
    write_webdataset(folder, items, class_names=NAMES, templates=["a {}"])
    return open_labelled_set(str(folder), "birds")
