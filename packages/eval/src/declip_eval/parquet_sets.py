"""Labelled sets as Hugging Face stores them: parquet files of pictures with labels or captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.content_hashes import SetFile
from declip_eval.parquet_columns import ColumnChoice, captions_of, choose_columns, labels_of
from declip_eval.parquet_files import find_parquet_files
from declip_eval.set_files import DatasetError, SetFolder
from declip_eval.set_parts import SplitParts

if TYPE_CHECKING:
    from declip_eval.dataset_table import DatasetInfo

__all__ = ["read_parquet_split"]

_SPLIT_COLUMN = "split"


def read_parquet_split(
    folder: SetFolder, split: str, info: DatasetInfo | None = None, *, is_own: bool = True
) -> SplitParts | None:
    """Read labels or captions of a split's parquet files; None where there are none.

    Where they may lie is `parquet_files.find_parquet_files`'s to say, and what `is_own` means.

    Names of classes are those of the label column's ClassLabel. Where the files have a column
    `split` themselves, only the rows of this split are taken. Keys are those of a column `__key__`,
    else the number of the row.

    Raises:
        DatasetError: a part of the files is missing, several configurations have the split, a file
            is damaged, or no columns of pictures and labels can be made out.
    """
    files = find_parquet_files(folder, split, is_own=is_own)
    if not files:
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [folder.on_this_machine(file) for file in files]
    tables, groups = [], []
    columns: ColumnChoice | None = None
    for file, path in zip(files, paths, strict=True):
        shown = folder.shown(file)
        try:
            with pq.ParquetFile(path) as opened:
                columns = columns or choose_columns(opened.schema_arrow, info, shown)
                tables.append(opened.read(columns=columns.besides_pictures))
                meta = opened.metadata
                groups.append([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DatasetError(
                f"{shown} is no readable parquet ({error}): fetch it again."
            ) from error
    assert columns is not None
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DatasetError(
            f"The parquet files of {folder.shown(split)} have different columns ({error}): fetch "
            "the dataset again."
        ) from error
    rows = _rows(groups)
    kept = _of_split(table, split, folder.shown(split))
    table, rows = table.take(kept), rows[kept]
    return _parts(folder, split, files, paths, table, rows, kept, columns, info)


def _parts(
    folder: SetFolder,
    split: str,
    files: list[str],
    paths: list[str],
    table: Any,
    rows: NDArray[np.int64],
    kept: NDArray[np.int64],
    columns: ColumnChoice,
    info: DatasetInfo | None,
) -> SplitParts:
    shown = folder.shown(split)
    if "__key__" in table.column_names:
        keys = [str(key) for key in table["__key__"].to_pylist()]
    else:
        keys = [f"{row:08d}" for row in kept.tolist()]
    labels, names, captions = None, None, None
    if columns.kind == "retrieval":
        captions = captions_of(table[columns.label], keys, shown)
    else:
        labels, names = labels_of(table[columns.label], columns, info, keys, shown)
    sizes = [folder.size(file) or 0 for file in files]
    return SplitParts(
        kind=columns.kind,
        keys=keys,
        labels=labels,
        captions=captions,
        label_names=names,
        places=ParquetPlaces(files, paths, sizes, columns.picture, rows),
        layout="parquet",
        split=split,
    )


def _rows(groups: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """(n, 3): file, row group, row of the group."""
    blocks = [
        np.column_stack((np.full(rows, file), np.full(rows, group), np.arange(rows)))
        for file, of_file in enumerate(groups)
        for group, rows in enumerate(of_file)
    ]
    return np.concatenate([*blocks, np.zeros((0, 3))]).astype(np.int64)


def _of_split(table: Any, split: str, shown: str) -> NDArray[np.int64]:
    """Rows to keep: all, or those of the split where the files themselves tell splits apart."""
    rows = np.arange(table.num_rows)
    if _SPLIT_COLUMN not in table.column_names:
        return rows
    values = np.asarray(table[_SPLIT_COLUMN].to_pylist(), dtype=object)
    kept = np.flatnonzero(values == split)
    if not kept.size:
        there = ", ".join(sorted({str(value) for value in values})[:6])
        raise DatasetError(
            f"{shown}: the parquet files have a column {_SPLIT_COLUMN!r} with {there}, and no row "
            f"of {split!r}: choose one of these splits."
        )
    return kept


@dataclass(frozen=True)
class ParquetPlaces:
    """Pictures in a column of parquet files of this machine."""

    names: list[str]
    """Of the files, relative to the dataset's folder."""
    paths: list[str]
    sizes: list[int]
    """Bytes of each file."""
    column: str
    rows: NDArray[np.int64] = field(repr=False)
    """(n, 3): number of the file, row group, row of the group."""
    _last: dict[tuple[int, int], Any] = field(
        default_factory=dict, repr=False, compare=False, init=False
    )
    """The row group that was read last: neighbors are read together."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pictures behind when the set goes to another process."""
        return {**self.__dict__, "_last": {}}

    def read(self, indices: Sequence[int]) -> list[bytes | str]:
        """Return the bytes of each picture, or why they cannot be had."""
        found: list[bytes | str] = [""] * len(indices)
        order = sorted(range(len(indices)), key=lambda place: indices[place])
        for place in order:
            file, group, row = self.rows[indices[place]].tolist()
            pictures = self._group(file, group)
            if isinstance(pictures, str):
                found[place] = pictures
                continue
            found[place] = _picture(pictures[row].as_py(), f"{self.names[file]}, row group {group}")
        return found

    def _group(self, file: int, group: int) -> Any:
        held = self._last.get((file, group))
        if held is not None:
            return held
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.paths[file]) as opened:
                pictures = opened.read_row_group(group, columns=[self.column])[self.column]
        except (pa.ArrowException, OSError) as error:
            return f"{self.paths[file]} cannot be read at row group {group} ({error})"
        self._last.clear()
        self._last[(file, group)] = pictures
        return pictures

    def add_to(self, digest: hashlib._Hash) -> None:
        """Feed the files' names and sizes and every row."""
        digest.update(f"parquet {self.names} {self.sizes} {self.column} {len(self.rows)} ".encode())
        digest.update(self.rows.astype("<i8").tobytes())

    def files(self) -> list[SetFile]:
        """Return the parquet files."""
        return [SetFile(file, path) for file, path in zip(self.names, self.paths, strict=True)]


def _picture(value: Any, where: str) -> bytes | str:
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes) and data:
        return data
    if isinstance(value, dict) and value.get("path"):
        return f"{where}: only a path is stored, no picture ({value['path']})"
    return f"{where}: no picture is stored"
