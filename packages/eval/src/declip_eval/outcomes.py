"""What a model answered to every single query, beside the number that sums it up.

A result's JSON says how often; its outcomes say on which: from them every metric is computed again
to the bit, its bootstrap interval drawn, and two models compared pair by pair, without a model, a
picture or a feature. They stand beside the JSON as `<its stem>.outcomes.parquet`.

Columns, first in memory, then in the file, where padding (-1, NaN, "") is left away:

==============  ========================  ==================================================
kind            column                    meaning
==============  ========================  ==================================================
classification  label int32 (n,)          the right class
                rank int32 (n,)           wrong classes scoring at least as high
                predicted int32 (n, k)    best classes, best first; file: list<int32>
                scores float32 (n, k)     their scores; file: list<float>
                score float64 (n,)        two classes only: score of class 1 minus that of 0
multilabel      labels bool (n, C)        the right classes; file: list<int32> of class numbers
                scores float32 (n, C)     of all classes; file: list<float>
retrieval       direction str (n,)        what is looked for: "image" (by a text) or "text"
                rank int32 (n,)           wrong candidates before the best right one
                best str (n, k)           keys of the best candidates; file: list<string>
                scores float32 (n, k)     their scores; file: list<float>
any             overlap bool (n,)         optional: the training data holds the query's picture
==============  ========================  ==================================================

A picture that could not be read is there too and counts as wrong: its rank is the number of
candidates, its `predicted` and `best` are empty, its scores the worst there are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from declip_eval import metrics as formulas
from declip_eval.outcome_columns import (
    check_columns,
    check_keys,
    columns_equal,
    from_arrow,
    pad_to,
    to_arrow,
)

Kind = Literal["classification", "multilabel", "retrieval"]

OUTCOMES_SUFFIX = ".outcomes.parquet"
_META = b"opendeclip.outcomes"
_VERSION = 1
_METRIC = re.compile(
    r"(?:lp_)?(?P<classification>acc[1-9]\d*|mean_per_class_recall|mean_acc1_acc5|roc_auc)"
    r"|(?:lp_)?(?P<multilabel>mean_average_precision(?:_11)?)"
    r"|(?P<retrieval>(?:image|text)_retrieval_recall@[1-9]\d*)"
)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """One model's answers to all queries of one dataset, in the dataset's order."""

    kind: Kind
    """classification, multilabel or retrieval."""

    keys: list[str]
    """(n,) the query's name: unique, in retrieval within its direction."""

    columns: Mapping[str, NDArray[Any]]
    """Name -> one row a query; see the module's table."""

    num_classes: int | None = field(default=None, kw_only=True)
    """Classes to choose from; None for retrieval."""

    def __post_init__(self) -> None:
        """Refuse columns that are missing, unknown, or of another type or length."""
        check_columns(self.kind, self.keys, self.columns, self.num_classes)
        check_keys(self.kind, self.keys, self.columns)

    def __len__(self) -> int:
        return len(self.keys)

    def __eq__(self, other: object) -> bool:
        """Equal to the bit, NaN equal to NaN."""
        if not isinstance(other, Outcomes):
            return NotImplemented
        return (
            (self.kind, self.keys, self.num_classes) == (other.kind, other.keys, other.num_classes)
            and set(self.columns) == set(other.columns)
            and all(
                columns_equal(column, other.columns[name]) for name, column in self.columns.items()
            )
        )

    def take(self, rows: NDArray[Any]) -> Outcomes:
        """Return the outcomes of some queries: row numbers, or a mask (n,) bool."""
        chosen = np.arange(len(self))[rows]
        return replace(
            self,
            keys=[self.keys[row] for row in chosen],
            columns={name: column[chosen] for name, column in self.columns.items()},
        )

    def with_overlap(self, overlap: NDArray[Any]) -> Outcomes:
        """Return the same with the column `overlap`, (n,) bool."""
        return replace(self, columns={**self.columns, "overlap": np.asarray(overlap)})


def outcomes_path(result_path: str | Path) -> Path:
    """Return where the outcomes of the result file at `result_path` stand."""
    path = Path(result_path)
    return path.with_name(path.name.removesuffix(".json") + OUTCOMES_SUFFIX)


def drop_overlap(outcomes: Outcomes) -> Outcomes:
    """Return the outcomes of the queries that the training data does not hold.

    Retrieval keeps its candidates: those of the training data still compete.

    Raises:
        ValueError: nothing was checked (no column `overlap`), or nothing is left.
    """
    if "overlap" not in outcomes.columns:
        raise ValueError(
            "The outcomes have no column 'overlap': evaluate with the training data "
            "(--train-data) to know which samples overlap."
        )
    kept = outcomes.take(~outcomes.columns["overlap"])
    if not len(kept):
        raise ValueError(
            f"All {len(outcomes)} samples overlap with the training data: there is no score "
            "without the overlap."
        )
    return kept


def concatenate(parts: Sequence[Outcomes]) -> Outcomes:
    """Join outcomes of parts of one dataset, in their order.

    Raises:
        ValueError: no part, or parts that differ in kind, classes or columns.
    """
    if not parts:
        raise ValueError("parts is empty: there are no outcomes to join.")
    first = parts[0]
    for part in parts[1:]:
        if (part.kind, part.num_classes, set(part.columns)) != (
            first.kind, first.num_classes, set(first.columns),
        ):  # fmt: skip
            raise ValueError(
                f"Outcomes of {part.kind} with {part.num_classes} classes and columns "
                f"{', '.join(sorted(part.columns))} cannot be joined to {first.kind} with "
                f"{first.num_classes} and {', '.join(sorted(first.columns))}."
            )
    columns = {name: _stack([part.columns[name] for part in parts]) for name in first.columns}
    return replace(first, keys=[key for part in parts for key in part.keys], columns=columns)


def _stack(columns: list[NDArray[Any]]) -> NDArray[Any]:
    width = max(column.shape[-1] for column in columns)
    return np.concatenate([pad_to(column, width) for column in columns])


def metric_names(outcomes: Outcomes, recall_k: Sequence[int] = (1, 5, 10)) -> tuple[str, ...]:
    """Return the metrics that apply: CLIP_benchmark's, and the published protocols' others.

    Args:
        outcomes: of which the metrics are wanted.
        recall_k: retrieval's numbers of candidates.
    """
    if outcomes.kind == "multilabel":
        return ("mean_average_precision", "mean_average_precision_11")
    if outcomes.kind == "retrieval":
        return tuple(
            f"{direction}_retrieval_recall@{k}"
            for direction in ("image", "text")
            if (outcomes.columns["direction"] == direction).any()
            for k in recall_k
        )
    has_five = (outcomes.num_classes or 0) >= 5
    names = ["acc1", "acc5", "mean_per_class_recall"] if has_five else ["acc1"]
    names += ["mean_acc1_acc5"] if has_five else ["mean_per_class_recall"]
    return tuple(names + (["roc_auc"] if "score" in outcomes.columns else []))


def metrics_of(
    outcomes: Outcomes, names: Iterable[str], *, without_overlap: bool = False
) -> dict[str, float]:
    """Compute metrics from outcomes.

    Args:
        outcomes: of any kind.
        names: CLIP_benchmark's names; a probe's prefix `lp_` is allowed.
        without_overlap: leave out the samples that the training data holds.

    Returns:
        Name -> value, a fraction of 1, in the order of `names`.

    Raises:
        ValueError: a metric that these outcomes do not have, or nothing left.
    """
    if without_overlap:
        outcomes = drop_overlap(outcomes)
    return {name: _metric(outcomes, name) for name in names}


def plain_metric(outcomes: Outcomes, name: str) -> str:
    """Return a metric's name without a probe's prefix, refusing one that the outcomes lack.

    Raises:
        ValueError: with the metrics that these outcomes have.
    """
    match = _METRIC.fullmatch(name)
    kind = match.lastgroup if match else None
    plain = name.removeprefix("lp_")
    if kind != outcomes.kind or (plain == "roc_auc" and "score" not in outcomes.columns):
        raise ValueError(
            f"{name!r} is no metric of these {outcomes.kind} outcomes: choose from "
            f"{', '.join(metric_names(outcomes))}."
        )
    return plain


def retrieval_rows(outcomes: Outcomes, plain: str) -> tuple[NDArray[np.bool_], int]:
    """Return which queries `{image,text}_retrieval_recall@k` is about, and its k.

    Raises:
        ValueError: there is no query in that direction.
    """
    direction, k = plain.split("_retrieval_recall@")
    rows = np.asarray(outcomes.columns["direction"] == direction)
    if not rows.any():
        raise ValueError(f"{plain!r} asks for {direction}s, but no query does.")
    return rows, int(k)


def _metric(outcomes: Outcomes, name: str) -> float:
    plain = plain_metric(outcomes, name)
    if not len(outcomes):
        raise ValueError("There are no outcomes, so there is no metric: evaluate some samples.")
    columns = outcomes.columns
    if outcomes.kind == "multilabel":
        formula = formulas.eleven_point_ap if plain.endswith("_11") else formulas.average_precision
        return formulas.mean_over_classes(formula(columns["scores"], columns["labels"]))
    if outcomes.kind == "retrieval":
        rows, k = retrieval_rows(outcomes, plain)
        return formulas.accuracy_at(columns["rank"][rows], k)
    if plain == "mean_per_class_recall":
        return formulas.mean_per_class_recall(columns["rank"], columns["label"])
    if plain == "mean_acc1_acc5":
        return formulas.mean_acc1_acc5(columns["rank"])
    if plain == "roc_auc":
        return formulas.roc_auc(columns["score"], columns["label"])
    return formulas.accuracy_at(columns["rank"], int(plain.removeprefix("acc")))


def write_outcomes(outcomes: Outcomes, path: str | Path) -> Path:
    """Write outcomes as parquet: at once or not at all; equal outcomes give equal bytes."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    identity = {
        "version": _VERSION, "kind": outcomes.kind, "num_classes": outcomes.num_classes,
    }  # fmt: skip
    table = pa.table(
        {"key": pa.array(outcomes.keys, pa.string())}
        | {name: to_arrow(name, column) for name, column in outcomes.columns.items()}
    ).replace_schema_metadata({_META: json.dumps(identity, sort_keys=True)})
    temporary = target.with_name(f".{hashlib.sha256(target.name.encode()).hexdigest()[:16]}.tmp")
    with open(temporary, "wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    return target


def read_outcomes(path: str | Path) -> Outcomes:
    """Read what `write_outcomes` wrote.

    Raises:
        ValueError: the file is missing, is no such parquet file, or is of an unknown version.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: evaluate again to write it.") from error
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not parquet ({error}): evaluate again.") from error
    try:
        identity = dict(json.loads((table.schema.metadata or {}).get(_META, b"{}")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say what it holds ({error}): evaluate again.") from error
    if identity.get("version") != _VERSION:
        raise ValueError(
            f"{path} has outcomes of version {identity.get('version')!r}, but this program reads "
            f"version {_VERSION}: evaluate again."
        )
    names = [name for name in table.column_names if name != "key"]
    num_classes = identity.get("num_classes")
    try:
        return Outcomes(
            identity.get("kind", ""),
            table["key"].to_pylist(),
            {name: from_arrow(name, table[name], num_classes) for name in names},
            num_classes=num_classes,
        )
    except (KeyError, TypeError, AttributeError, IndexError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged ({error}): evaluate again.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
