"""The columns of `outcomes`: their types, their checks, and their form in a parquet file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

COLUMNS: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "classification": {
        "label": ("int32", 1),
        "rank": ("int32", 1),
        "predicted": ("int32", 2),
        "scores": ("float32", 2),
    },
    "multilabel": {"labels": ("bool", 2), "scores": ("float32", 2)},
    "retrieval": {
        "direction": ("object", 1),
        "rank": ("int32", 1),
        "best": ("object", 2),
        "scores": ("float32", 2),
    },
}
"""Kind -> column -> (dtype, dimensions); see the table of `outcomes`."""

OPTIONAL: Mapping[str, tuple[str, int]] = {"score": ("float64", 1), "overlap": ("bool", 1)}
"""Columns that need not be there, in the same form."""

DIRECTIONS: tuple[str, ...] = ("image", "text")
"""What a retrieval query looks for."""


def check_columns(
    kind: str, keys: Sequence[str], columns: Mapping[str, NDArray[Any]], num_classes: int | None
) -> None:
    """Refuse columns that are missing, unknown, or of another type, length or range.

    Raises:
        ValueError: with the column, what it is, and what it must be.
    """
    if kind not in COLUMNS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(COLUMNS)}.")
    needed = COLUMNS[kind]
    allowed = {**needed, **OPTIONAL}
    for name in (*needed, *columns):
        if name not in columns or name not in allowed:
            raise ValueError(
                f"{kind} outcomes {'lack' if name in needed else 'do not take'} the column "
                f"{name!r}: they have {', '.join(needed)} and may have {', '.join(OPTIONAL)}."
            )
        dtype, dimensions = allowed[name]
        column = columns[name]
        if column.dtype != dtype or column.ndim != dimensions or len(column) != len(keys):
            raise ValueError(
                f"The column {name!r} is {column.dtype} of shape {column.shape}, but must be "
                f"{dtype} with {dimensions} dimension(s) and one row for each of the {len(keys)} "
                "keys."
            )
    _check_values(kind, columns, num_classes)


def check_keys(kind: str, keys: Sequence[str], columns: Mapping[str, NDArray[Any]]) -> None:
    """Refuse a key that is no text or occurs twice (in retrieval: twice in one direction).

    Raises:
        ValueError: naming the first such key.
    """
    names: list[tuple[str, Any]] = list(query_names(kind, keys, columns))
    if len(set(names)) == len(names) and all(isinstance(key, str) for _, key in names):
        return
    seen: set[tuple[str, Any]] = set()
    for name in names:
        if not isinstance(name[1], str) or name in seen:
            raise ValueError(
                f"The key {name[1]!r} is no text or occurs twice: every sample needs a key of its "
                "own."
            )
        seen.add(name)


def query_names(
    kind: str, keys: Sequence[str], columns: Mapping[str, NDArray[Any]]
) -> list[tuple[str, str]]:
    """Return (direction, key) of every query; direction is empty outside retrieval."""
    if kind != "retrieval":
        return [("", key) for key in keys]
    return list(zip(columns["direction"].tolist(), keys, strict=True))


def columns_equal(first: NDArray[Any], second: NDArray[Any]) -> bool:
    """Say whether two columns are equal to the bit, NaN equal to NaN."""
    return np.array_equal(first, second, equal_nan=first.dtype.kind == second.dtype.kind == "f")


def pad_to(column: NDArray[Any], width: int) -> NDArray[Any]:
    """Widen a column (n, k) to (n, width) with its padding."""
    if column.ndim == 1 or column.shape[1] == width:
        return column
    wider = np.full((len(column), width), padding(column.dtype), dtype=column.dtype)
    wider[:, : column.shape[1]] = column
    return wider


def padding(dtype: np.dtype[Any]) -> Any:
    """Return what stands for "no further entry" in a column of two dimensions."""
    return {"i": -1, "f": np.nan, "O": "", "b": False}[dtype.kind]


def to_arrow(name: str, column: NDArray[Any]) -> pa.Array:
    """Return a column as the file has it: lists without padding."""
    if name == "direction":
        return pa.array(column.tolist(), pa.string())
    if column.ndim == 1:
        return pa.array(column)
    if name == "labels":
        values, lengths = np.nonzero(column)[1].astype(np.int32), column.sum(axis=1)
    else:
        is_entry = column == column if column.dtype.kind == "f" else column != padding(column.dtype)
        values, lengths = column[is_entry], is_entry.sum(axis=1)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    items = pa.array(values.tolist(), pa.string()) if name == "best" else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets), items)


def from_arrow(name: str, column: pa.ChunkedArray, num_classes: int | None) -> NDArray[Any]:
    """Return a column of the file as `outcomes` holds it in memory."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # pyarrow before 18 returned one for some types.
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if name == "direction":
        return np.asarray(array.to_pylist(), dtype=object)
    if not pa.types.is_list(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    lengths = np.asarray(array.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    items = array.flatten()
    rows = np.repeat(np.arange(len(array)), lengths)
    if name == "labels":
        is_right = np.zeros((len(array), num_classes or 0), dtype=bool)
        is_right[rows, items.to_numpy()] = True
        return is_right
    values = (
        np.asarray(items.to_pylist(), dtype=object)
        if name == "best"
        else np.asarray(items.to_numpy(zero_copy_only=False))
    )
    width = int(lengths.max(initial=0))
    table = np.full((len(array), width), padding(values.dtype), dtype=values.dtype)
    first = np.cumsum(lengths) - lengths
    table[rows, np.arange(len(rows)) - np.repeat(first, lengths)] = values
    return table


def _check_values(kind: str, columns: Mapping[str, NDArray[Any]], num_classes: int | None) -> None:
    if kind == "retrieval":
        wrong = sorted(set(columns["direction"].tolist()) - set(DIRECTIONS))
        if wrong:
            raise ValueError(f"direction holds {wrong[0]!r}, but must be image or text.")
        return
    if num_classes is None or num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, but {kind} needs at least 1 class.")
    if kind == "multilabel":
        for name in ("labels", "scores"):
            if columns[name].shape[1] != num_classes:
                raise ValueError(
                    f"The column {name!r} has {columns[name].shape[1]} classes, but num_classes "
                    f"is {num_classes}."
                )
        if np.isnan(columns["scores"]).any():
            raise ValueError("The column 'scores' holds NaN: every class needs a score.")
    elif (columns["label"] < 0).any() or (columns["rank"] < 0).any():
        raise ValueError("The columns 'label' and 'rank' must hold numbers from 0 on.")
