"""Result files: CLIP_benchmark's JSON, with our provenance under one extra key, `opendeclip`.

Readers of CLIP_benchmark pick the keys they know, so they take these files as they are; and
`read_result` takes theirs, which have no provenance.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

TASKS: tuple[str, ...] = ("zeroshot_classification", "zeroshot_retrieval", "linear_probe")
"""CLIP_benchmark's names of the tasks this package measures."""

SCHEMA_VERSION = 2
"""Version of what stands under `opendeclip`. Version 1 had none of the optional counts, `data`,
`bootstrap` and `contamination`; it is still read."""

OUTPUT_FIELDS: tuple[str, ...] = (
    "model",
    "pretrained",
    "pretrained_full_path",
    "task",
    "dataset",
    "language",
)
"""What a template of an output path may name in braces: CLIP_benchmark's `--output`."""

_EXTRA_KEY = "opendeclip"
_NAMES = ("dataset", "model", "pretrained", "task", "language")
_READ_VERSIONS = (1, SCHEMA_VERSION)
_IS_FRACTION = re.compile(
    r"(lp_)?(acc\d+|mean_per_class_recall|mean_acc1_acc5|roc_auc|mean_average_precision(_11)?)"
    r"|\w+_retrieval_recall@\d+"
)
_MAX_STEM_BYTES = 255 - len(".outcomes.parquet")  # The longest that stands beside a result.

_COLUMNS: tuple[str, ...] = (
    "metric",
    "value",
    "chance",
    "x chance",
    "samples",
    "classes",
    "95% interval",
    "dataset",
)
TEXT_COLUMNS: tuple[int, ...] = (0, 7)
"""Positions of the columns of `results_rows` that hold text, for `html.table`."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What one has to know to believe a number, and to get it again."""

    num_samples: int
    """Held-out samples (images) that were evaluated."""

    num_classes: int | None = None
    """Classes to choose from; None for retrieval."""

    num_trials: Mapping[str, int] = field(default_factory=dict)
    """Metric -> number of queries, where it is not `num_samples`."""

    chance: Mapping[str, float] = field(default_factory=dict)
    """Metric -> what a random answer gives, fraction of 1."""

    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric -> (low, high) of its 95% confidence interval."""

    templates: str | None = None
    """Name of the prompt template set; None where no prompts are used."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    """What was read (checkpoint, data manifest, ...) -> its hash."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Library -> version."""

    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    """Every other setting that a number depends on (seed, chosen L2 strength, ...)."""

    num_unreadable: int | None = None
    """Samples among `num_samples` whose picture could not be read: they count as wrong."""

    num_expected: int | None = None
    """Samples that the published split has; None where nobody published it."""

    data: Mapping[str, Any] = field(default_factory=dict)
    """What was evaluated on: digest, layout, split and counts, as JSON values."""

    bootstrap: Mapping[str, Any] = field(default_factory=dict)
    """How `intervals` were drawn: seed, num_resamples, level; empty for Wilson's."""

    contamination: Mapping[str, Any] = field(default_factory=dict)
    """Overlap with the training data: counts by rung, what was checked, and the metrics without
    the overlap, as JSON values; empty where nothing was checked."""

    def __post_init__(self) -> None:
        """Refuse counts and levels that cannot be."""
        for name in ("num_samples", "num_classes"):
            value = getattr(self, name)
            if name == "num_classes" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but it must be a whole number from 1 on.")
        _check_count("num_unreadable", self.num_unreadable, self.num_samples)
        _check_count("num_expected", self.num_expected, None)
        if self.templates is not None and not isinstance(self.templates, str):
            raise ValueError(f"templates is {self.templates!r}, but it must be a text or None.")
        for name in ("hashes", "versions", "settings", "data", "bootstrap", "contamination"):
            _check_json(name, getattr(self, name))
        for metric, trials in self.num_trials.items():
            if trials is None:
                raise ValueError(f"num_trials of {metric} is None, but it must be a whole number.")
            _check_count(f"num_trials of {metric}", trials, None)
        for metric, level in self.chance.items():
            _check_number(f"chance of {metric}", level, is_fraction=True)
        for metric, ends in self.intervals.items():
            bounds = list(ends)
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
                raise ValueError(
                    f"The interval of {metric} is {bounds}, but it must be (low, high) "
                    "within 0 and 1."
                )


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One model on one dataset in one task."""

    dataset: str
    """Name of the dataset, such as wds/imagenet1k."""

    model: str
    """Name of the architecture, such as ViT-B-32."""

    pretrained: str
    """Which weights: a name, or the path of a checkpoint."""

    task: str
    """One of `TASKS`."""

    language: str = "en"
    """Language of the prompts or captions, as ISO 639-1."""

    metrics: Mapping[str, float]
    """CLIP_benchmark's metric names -> values, fractions of 1."""

    provenance: Provenance | None = None
    """Ours; None in a file that CLIP_benchmark wrote."""

    def __post_init__(self) -> None:
        """Refuse empty names, unknown tasks and impossible values."""
        for name in _NAMES:
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} is {value!r}, but a result needs it as a non-empty text.")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}, but must be one of {', '.join(TASKS)}.")
        if not self.metrics:
            raise ValueError("metrics is empty: a result holds at least one number.")
        for metric, value in self.metrics.items():
            _check_number(metric, value, is_fraction=bool(_IS_FRACTION.fullmatch(metric)))
        if self.provenance is not None:
            for group in ("num_trials", "chance", "intervals"):
                unknown = sorted(set(getattr(self.provenance, group)) - set(self.metrics))
                if unknown:
                    raise ValueError(
                        f"{group} names {unknown[0]!r}, which is none of the metrics "
                        f"({', '.join(self.metrics)})."
                    )


def result_file_name(result: EvalResult) -> str:
    """Return `benchmark_{dataset}_{pretrained}_{model}_{language}_{task}.json`, made safe.

    A checkpoint's path is reduced to its last part, a leading `wds/` of the dataset is left away,
    and what is not a letter, digit, point, minus or underscore becomes an underscore. A few-shot
    probe's name ends in `_fewshot_K`, so that it does not replace the probe on all samples. A name
    too long for a file system (with its outcomes' suffix) is cut and gets a hash.
    """
    names = _file_name_parts(result)
    stem = "benchmark_" + "_".join(
        names[name] for name in ("dataset", "pretrained", "model", "language", "task")
    )
    return _limit(stem + _fewshot_suffix(result)) + ".json"


def result_path(result: EvalResult, output: str | Path) -> Path:
    """Return the path of a result's file.

    Args:
        result: whose names go into it.
        output: a folder, where the file is called `result_file_name`; or, as CLIP_benchmark's
            `--output`, a template of the whole path: one that ends in `.json`, with any of
            `OUTPUT_FIELDS` in braces.

    Raises:
        ValueError: braces that name something else, or do not pair.
    """
    text = str(output)
    if not text.endswith(".json"):
        if "{" in text:
            raise ValueError(
                f"The output {text!r} is a template, but does not end in .json: add it, or give a "
                "folder without braces."
            )
        return Path(output) / result_file_name(result)
    for name in re.findall(r"\{([^{}]*)\}", text):
        if name not in OUTPUT_FIELDS:
            raise ValueError(
                f"The output {text!r} names {{{name}}}, but a template has "
                f"{', '.join(f'{{{known}}}' for known in OUTPUT_FIELDS)}."
            )
    try:
        path = Path(text.format(**_file_name_parts(result)))
    except ValueError as error:
        raise ValueError(
            f"The template {text!r} has braces that do not pair: write a field as {{model}}."
        ) from error
    return path.with_name(_limit(path.stem + _fewshot_suffix(result)) + ".json")


def write_result(result: EvalResult, output: str | Path) -> Path:
    """Write `result` to its `result_path`: at once or not at all, sorted keys.

    Equal results give equal bytes. A file of the same dataset, weights, model, language and task is
    replaced.

    Args:
        result: what to write.
        output: a folder, or a template of the path; see `result_path`.

    Returns:
        The path that was written.

    Raises:
        ValueError: the name is taken by a result of something else (two checkpoint paths that end
            alike, say), or a template that cannot be filled.
    """
    path = result_path(result, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _refuse_other_identity(path, result)
    text = json.dumps(
        _to_json(result), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False
    )
    # The leading point keeps a half-written file out of anyone's *.json.
    temporary = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def read_result(path: str | Path) -> EvalResult:
    """Read a result file, ours or CLIP_benchmark's, and check it.

    CLIP_benchmark writes NaN for top-5 accuracy below five classes and true or false for a
    setting among a probe's metrics: the first is left away, the second becomes 1 or 0.

    Raises:
        ValueError: not JSON, a missing or wrong value, or provenance of an unknown version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): evaluate again to replace it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, but a result is an object.")
    missing = [name for name in (*_NAMES, "metrics") if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}, which every result has.")
    if not isinstance(content["metrics"], dict):
        raise ValueError(f"{path} has metrics that are no object of names and numbers.")
    try:
        return EvalResult(
            **{name: content[name] for name in _NAMES},
            metrics=_metrics_from_json(content),
            provenance=_provenance_from_json(content.get(_EXTRA_KEY)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def results_rows(results: Iterable[EvalResult]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the columns and rows of the table of results, all as text, one row a metric.

    A value that is not known is a dash. Fractions of 1 have four digits.
    """
    rows: list[list[str]] = []
    for result in results:
        known = result.provenance
        for metric, value in sorted(result.metrics.items(), key=_metric_order):
            chance = known.chance.get(metric) if known else None
            interval = known.intervals.get(metric) if known else None
            trials = known.num_trials.get(metric, known.num_samples) if known else None
            rows.append(
                [
                    metric,
                    f"{value:.4f}",
                    "-" if chance is None else f"{chance:.4f}",
                    "-" if not chance else f"{value / chance:.1f}",
                    "-" if trials is None else f"{trials:,}",
                    "-" if known is None or known.num_classes is None else str(known.num_classes),
                    "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
                    result.dataset,
                ]
            )
    return _COLUMNS, rows


def format_results_table(results: Iterable[EvalResult]) -> str:
    """Return the table of results as aligned text, without a final line break."""
    columns, rows = results_rows(results)
    if not rows:
        return "No results."
    lines = [list(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    is_text = [i in TEXT_COLUMNS for i in range(len(columns))]
    formatted = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([formatted[0], rule, *formatted[1:]])


def _metric_order(item: tuple[str, float]) -> list[tuple[int, str]]:
    """Sort recall@10 behind recall@5."""
    return [
        (int(part or 0), "") if part.isdigit() else (0, part)
        for part in re.split(r"(\d+)", item[0])
    ]


def _to_json(result: EvalResult) -> dict[str, Any]:
    content: dict[str, Any] = {name: getattr(result, name) for name in _NAMES}
    content["metrics"] = dict(result.metrics)
    if result.provenance is not None:
        extra: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for item in fields(Provenance):
            value = getattr(result.provenance, item.name)
            extra[item.name] = dict(value) if isinstance(value, Mapping) else value
        content[_EXTRA_KEY] = extra
    return content


def _metrics_from_json(content: Mapping[str, Any]) -> Mapping[str, Any]:
    metrics: Mapping[str, Any] = content["metrics"]
    if _EXTRA_KEY in content:
        return metrics
    return {
        name: int(value) if isinstance(value, bool) else value
        for name, value in metrics.items()
        if not (isinstance(value, float) and math.isnan(value))
    }


def _provenance_from_json(content: Any) -> Provenance | None:
    if content is None:
        return None
    if not isinstance(content, dict) or content.get("schema_version") not in _READ_VERSIONS:
        version = content.get("schema_version") if isinstance(content, dict) else content
        known_versions = " and ".join(map(str, _READ_VERSIONS))
        raise ValueError(
            f"{_EXTRA_KEY}.schema_version is {version!r}, but this program reads {known_versions}: "
            "read it with the program that wrote it, or evaluate again."
        )
    values = {name: value for name, value in content.items() if name != "schema_version"}
    known = {item.name: item for item in fields(Provenance)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{_EXTRA_KEY} holds {name!r}, which version {SCHEMA_VERSION} lacks.")
        if "Mapping" in str(known[name].type) and not isinstance(value, dict):
            raise ValueError(f"{_EXTRA_KEY}.{name} is {value!r}, but must be an object.")
    if "intervals" in values:
        values["intervals"] = {name: tuple(ends) for name, ends in values["intervals"].items()}
    return Provenance(**values)


def _file_name_parts(result: EvalResult) -> dict[str, str]:
    """What `OUTPUT_FIELDS` stand for, each safe as a part of a file name."""
    parts = {
        "model": result.model,
        "pretrained": re.split(r"[/\\]", result.pretrained.rstrip("/\\"))[-1],
        "pretrained_full_path": result.pretrained,
        "task": result.task,
        "dataset": result.dataset.removeprefix("wds/") or result.dataset,
        "language": result.language,
    }
    safe = {name: re.sub(r"[^A-Za-z0-9._-]", "_", part) for name, part in parts.items()}
    # A template may make a folder of a part, and one of points alone is another folder.
    return {name: part if part.strip(".") else "_" * len(part) for name, part in safe.items()}


def _fewshot_suffix(result: EvalResult) -> str:
    """CLIP_benchmark's probe on all samples has a fewshot_k of -1."""
    k = result.metrics.get("fewshot_k", -1)
    return f"_fewshot_{int(k)}" if k > 0 else ""


def _limit(stem: str) -> str:
    """Cut a file's stem so that its name, and its neighbors', fit a file system (255 bytes)."""
    if len(stem) <= _MAX_STEM_BYTES:
        return stem
    digest = hashlib.sha256(stem.encode()).hexdigest()[:12]
    return f"{stem[: _MAX_STEM_BYTES - 13]}_{digest}"


def _refuse_other_identity(path: Path, result: EvalResult) -> None:
    try:
        present = read_result(path)
    except ValueError:
        return  # Not a result of ours to protect.
    for name in _NAMES:
        if getattr(present, name) != getattr(result, name):
            raise ValueError(
                f"{path} holds the result of {name} {getattr(present, name)!r}, and the one of "
                f"{getattr(result, name)!r} would have the same file name: write it to another "
                "folder."
            )


def _check_count(name: str, value: Any, most: int | None) -> None:
    if value is None:
        return
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_count or (most is not None and value > most):
        limit = "" if most is None else f" to the {most} samples"
        raise ValueError(f"{name} is {value!r}, but it must be a whole number from 0 on{limit}.")


def _check_json(name: str, value: Any) -> None:
    """Refuse what JSON would not give back as it is."""
    try:
        is_kept = json.loads(json.dumps(dict(value), allow_nan=False)) == value
    except (TypeError, ValueError):
        is_kept = False
    if not is_kept:
        raise ValueError(
            f"{name} is {value!r}, but it must be a dict of what JSON keeps: text, finite numbers, "
            "lists and such dicts."
        )


def _check_number(name: str, value: Any, *, is_fraction: bool) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: a whole number may be too large for a float.
    if not is_number or not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value!r}, but it must be a finite number.")
    if is_fraction and not 0 <= value <= 1:
        raise ValueError(
            f"{name} is {value}, but it is a fraction of 1: divide a percentage by 100."
        )
