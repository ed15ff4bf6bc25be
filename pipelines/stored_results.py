"""Result files of one or several evaluations, found in folders and named alike."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from declip_eval.dataset_table import DatasetInfo, find_dataset, metric_value
from declip_eval.results import EvalResult, read_result
from declip_shards import DeclipError

TASK_TITLES: Mapping[str, str] = {
    "zeroshot_classification": "Zero-shot classification",
    "zeroshot_retrieval": "Zero-shot retrieval",
    "linear_probe": "Linear probe",
}
_SHOTS = ("fewshot_k", "lp_fewshot_k")
_MEASURES = re.compile(
    r"(lp_)?(acc\d+|mean_per_class_recall|mean_average_precision(_11)?|roc_auc|mean_acc1_acc5)"
    r"|(image|text)_retrieval_recall@\d+"
)
"""Metrics; other numbers beside them, such as an L2 strength, only say how."""
_FALLBACK = (
    "acc1",
    "lp_acc1",
    "mean_average_precision",
    "lp_mean_average_precision",
    "image_retrieval_recall@1",
)
"""Main metric of a dataset that the table of datasets does not know: the first that is there."""


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """A result and where it stands."""

    path: Path
    result: EvalResult
    info: DatasetInfo | None
    """None for a dataset that the table does not know."""
    weights: str
    """Name of the weights: the last part of their path, or all of it where two end alike."""

    @property
    def dataset(self) -> str:
        """One name for all spellings; of an unknown dataset its own."""
        return self.info.name if self.info else self.result.dataset

    @property
    def shots(self) -> int | None:
        """Training samples a class of a few-shot probe; None for everything else."""
        for name in _SHOTS:
            if self.result.metrics.get(name, -1) > 0:
                return int(self.result.metrics[name])
        return None

    @property
    def task(self) -> str:
        """Title of the task."""
        title = TASK_TITLES.get(self.result.task, self.result.task)
        if self.shots is None:
            return title
        return (
            f"Few-shot probe, {self.shots} {'picture' if self.shots == 1 else 'pictures'} a class"
        )

    @property
    def model(self) -> str:
        """Name of the model: architecture and weights."""
        language = "" if self.result.language == "en" else f" [{self.result.language}]"
        return f"{self.result.model} {self.weights}{language}"

    @property
    def main_metric(self) -> str | None:
        """Name of the number that papers print; None where the result does not hold it."""
        metrics = self.result.metrics
        if self.info is not None:
            if metric_value(self.info, metrics) is None:
                return None
            is_probe = any(name.startswith("lp_") for name in metrics)
            return ("lp_" if is_probe else "") + self.info.metric
        return next((name for name in _FALLBACK if name in metrics), None) or next(
            (name for name in self.metrics if name.startswith("image_retrieval")), None
        )

    @property
    def metrics(self) -> list[str]:
        """Names of what was measured, without what only says how; recall@10 follows recall@5."""
        names = [name for name in self.result.metrics if _MEASURES.fullmatch(name)]
        return sorted(names, key=lambda name: (re.sub(r"\d+$", "", name), len(name), name))

    def value(self, metric: str) -> float | None:
        """A metric's value; the mean of top-1 and top-5 is taken from the two."""
        if metric in self.result.metrics:
            return float(self.result.metrics[metric])
        if metric == self.main_metric and self.info is not None:
            return metric_value(self.info, self.result.metrics)
        return None

    def interval(self, metric: str) -> tuple[float, float] | None:
        """The metric's 95% interval, where it is known."""
        known = self.result.provenance
        return known.intervals.get(metric) if known else None

    @property
    def data_digest(self) -> str | None:
        """Hash of the labeled set that was evaluated; None where the result does not say."""
        known = self.result.provenance
        digest = known.data.get("digest") if known else None
        return str(digest) if digest else None

    @property
    def unchecked_rungs(self) -> tuple[str, ...]:
        """Ways to find copies in the training data that could not be gone."""
        known = self.result.provenance
        rungs = known.contamination.get("unchecked") if known else None
        return tuple(rungs) if isinstance(rungs, Mapping) else ()

    @property
    def num_overlap(self) -> int | None:
        """Samples that the training data holds, too; None where that was not checked."""
        known = self.result.provenance
        number = known.contamination.get("num_overlap") if known else None
        return None if number is None else int(number)

    def value_without_overlap(self, metric: str) -> float | None:
        """A metric over the samples that the training data does not hold, where it is known."""
        known = self.result.provenance
        metrics = known.contamination.get("metrics_without_overlap") if known else None
        return (
            float(metrics[metric]) if isinstance(metrics, Mapping) and metric in metrics else None
        )


def load_results(places: Sequence[str | os.PathLike[str]]) -> list[StoredResult]:
    """Read every result file of folders and files, sorted by path.

    A folder's results are the JSON files in it, or in its `eval/` where it is a dataset or run;
    other JSON files are passed over.

    Raises:
        DeclipError: a place that is not there or holds no result, or a damaged result.
    """
    found: dict[Path, tuple[Path, EvalResult]] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            files = sorted(path.glob("*.json")) + sorted((path / "eval").glob("*.json"))
            files = [file for file in files if not file.name.startswith(".") and _is_result(file)]
            if not files:
                raise DeclipError(
                    f"{str(path)!r} holds no result; give a folder that declip eval wrote to "
                    "(--output), or one with CLIP_benchmark's JSON files."
                )
        elif path.is_file():
            files = [path]
        else:
            raise DeclipError(f"{str(path)!r} is not there; give a folder or file of results.")
        for file in files:
            try:
                result = read_result(file)
            except ValueError as error:
                raise DeclipError(str(error)) from error
            found[file.resolve()] = (file, result)
    ends: dict[tuple[str, str], set[str]] = {}
    for _, result in found.values():
        ends.setdefault((result.model, _end(result.pretrained)), set()).add(result.pretrained)
    return [
        StoredResult(
            path=file,
            result=result,
            info=find_dataset(result.dataset),
            weights=result.pretrained
            if len(ends[result.model, _end(result.pretrained)]) > 1
            else _end(result.pretrained),
        )
        for file, result in found.values()
    ]


def _end(path: str) -> str:
    """The last part of a checkpoint's path."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _is_result(path: Path) -> bool:
    """Whether a JSON file claims to be a result; one that is no JSON is read, and refused."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return path.name.startswith("benchmark_")
    return isinstance(content, dict) and {"dataset", "metrics"} <= set(content)


def refuse_doubles(results: Iterable[StoredResult]) -> None:
    """Refuse two results of the same model, dataset and task that do not say the same.

    Raises:
        DeclipError: with both files.
    """
    seen: dict[tuple[str, ...], StoredResult] = {}
    for stored in results:
        kept = seen.setdefault((stored.model, stored.task, stored.dataset), stored)
        if dict(kept.result.metrics) != dict(stored.result.metrics):
            raise DeclipError(
                f"{str(kept.path)!r} and {str(stored.path)!r} are both {stored.task} of "
                f"{stored.model!r} on {stored.dataset!r} and differ; leave one of them out, or "
                "give the models names that differ."
            )


def only_model(results: Sequence[StoredResult], wanted: str | None, option: str) -> str:
    """The one model of some results, or the one that is wanted.

    Args:
        results: of one side of a comparison.
        wanted: name, architecture or weights; None where there is but one.
        option: what to give to choose, for the message.

    Raises:
        DeclipError: several models, or none of that name.
    """
    models = sorted({stored.model for stored in results})
    if wanted is not None:
        models = sorted(
            {
                stored.model
                for stored in results
                if wanted
                in (stored.model, stored.weights, stored.result.model, stored.result.pretrained)
            }
        )
        if not models:
            there = ", ".join(sorted({stored.model for stored in results}))
            raise DeclipError(f"{option} is {wanted!r}, but the results are of {there}.")
    if len(models) > 1:
        raise DeclipError(
            f"the results are of {len(models)} models ({', '.join(models)}); choose one with "
            f"{option}."
        )
    return models[0]


def overlap_text(stored: StoredResult) -> str:
    """How many samples the training data holds, too, and by what that was not checked."""
    known = stored.result.provenance
    if known is None or stored.num_overlap is None:
        return "not checked"
    told = f"{stored.num_overlap:,} ({stored.num_overlap / known.num_samples:.2%})"
    rungs = ", ".join(stored.unchecked_rungs)
    return f"{told}; not checked: {rungs}" if rungs else told
