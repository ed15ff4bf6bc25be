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
_EXPORT = ("train", "export")
"""Where a run has its model."""
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
    """Name of the weights: the end of their path, as much as tells it from others that end so."""
    origin: str = ""
    """Run or folder that the results are of, where other weights' are called the same."""

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
        return f"{self.result.model} {self.weights}{self.of_origin}{language}"

    @property
    def of_origin(self) -> str:
        """What follows the name of the weights where that alone does not tell them apart."""
        return f" of {self.origin}" if self.origin else ""

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
    weights = _weights_names(result for _, result in found.values())
    origins = _origins(list(found.values()))
    return [
        StoredResult(
            path=file,
            result=result,
            info=find_dataset(result.dataset),
            weights=weights[result.model, result.pretrained],
            origin=origins.get(_identity(result), ""),
        )
        for file, result in found.values()
    ]


def _weights_names(results: Iterable[EvalResult]) -> dict[tuple[str, str], str]:
    """(model, pretrained) -> the last part of the weights' path, more where two end alike."""
    parts: dict[str, dict[str, tuple[str, ...]]] = {}
    for result in results:
        path = tuple(re.split(r"[/\\]", result.pretrained.rstrip("/\\")))
        # A run's model is called as the run.
        path = path[:-2] if len(path) > 2 and path[-2:] == _EXPORT else path
        parts.setdefault(result.model, {})[result.pretrained] = path
    found = {}
    for model, paths in parts.items():
        for pretrained, path in paths.items():
            alike = {name: p for name, p in paths.items() if p[-1] == path[-1]}
            # Two spellings of one path are not told apart by their ends: then all of it.
            found[model, pretrained] = _shortest_ends(alike).get(pretrained, pretrained)
    return found


def _identity(result: EvalResult) -> tuple[str, str, str]:
    """Model, name of its weights, and their hash (empty where the result does not say)."""
    known = result.provenance
    return result.model, result.pretrained, known.hashes.get("weights", "") if known else ""


def _origins(found: Sequence[tuple[Path, EvalResult]]) -> dict[tuple[str, str, str], str]:
    """Where other weights are called the same: the run or folder, as :func:`_identity` -> name.

    Two runs of one recipe call their models alike. What tells them apart is the end of the folder
    that their results lie in (a run's is the one that holds `eval`); results of several weights in
    one folder are told apart by the hash of the weights.
    """
    folders: dict[tuple[str, str], dict[str, list[str]]] = {}
    for file, result in found:
        model, pretrained, weights = _identity(result)
        if weights:
            folder = file.resolve().parent
            folder = folder.parent if folder.name == "eval" else folder
            of_weights = folders.setdefault((model, pretrained), {})
            of_weights.setdefault(weights, []).append(str(folder))
    names = {}
    for (model, pretrained), of_weights in folders.items():
        if len(of_weights) < 2:
            continue
        common = {w: Path(os.path.commonpath(paths)).parts for w, paths in of_weights.items()}
        for weights in of_weights:
            name = _shortest_ends(common).get(weights, f"weights {weights[:8]}")
            names[model, pretrained, weights] = name
    return names


def _shortest_ends(paths: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """As many last parts of each path as tell all apart; nothing where that cannot be."""
    for length in range(1, max(map(len, paths.values()), default=0) + 1):
        ends = {name: "/".join(parts[-length:]) for name, parts in paths.items()}
        if len(set(ends.values())) == len(paths):
            return ends
    return {}


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
