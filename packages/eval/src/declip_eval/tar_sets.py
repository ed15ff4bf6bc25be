"""CLIP_benchmark's webdatasets: folders of numbered tars, read and written.

The form (CLIP_benchmark 1.6.2, `webdataset_builder`): `SPLIT/nshards.txt` with the number of tars,
`SPLIT/0.tar` and on, in each a picture and its label side by side (KEY.webp and KEY.cls), and
`classnames.txt`, `zeroshot_classification_templates.txt` and `dataset_type.txt` beside the splits.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.content_hashes import SetFile
from declip_eval.set_files import DatasetError, SetFolder
from declip_eval.set_parts import ClassNames, Kind, SplitParts
from declip_eval.set_texts import CLASS_NAMES_FILE, parse_class_names
from declip_eval.tar_headers import walk_tar

__all__ = ["NSHARDS_FILE", "TYPE_FILE", "read_tar_split"]

NSHARDS_FILE = "nshards.txt"
TYPE_FILE = "dataset_type.txt"
_IS_COUNT = re.compile(r"0{0,9}[1-9][0-9]{0,6}")
"""A number of tars, far below what would fill the memory with their names."""
_PICTURES = ("jpg", "jpeg", "png", "webp")
_LABELS_OF: dict[Kind | None, tuple[str, ...]] = {
    "classification": ("cls",),
    "multilabel": ("npy", "json"),
    "retrieval": ("txt",),
    None: ("cls", "npy", "txt", "json"),
}
"""Where the label of a sample stands, first one first: others may lie beside it."""
_OF_TYPE: dict[str, Kind] = {
    "classification": "classification",
    "multilabel": "multilabel",
    "retrieval": "retrieval",
}


def read_tar_split(folder: SetFolder, split: str) -> SplitParts | None:
    """Read the headers, labels and captions of one split; None where it is no such split.

    Raises:
        DatasetError: tars without nshards.txt or in another number than it says, a damaged tar, a
            picture without a label or the other way round, or a label that is none.
    """
    num_shards = _num_shards(folder, split)
    if num_shards is None:
        return None
    kind = _kind(folder)
    names = folder.read_text(CLASS_NAMES_FILE)
    label_names = (
        None
        if names is None
        else parse_class_names(names.splitlines(), folder.shown(CLASS_NAMES_FILE))
    )
    keys: list[str] = []
    values: list[tuple[str, bytes]] = []
    tars, places = [], []
    for shard in range(num_shards):
        path = f"{split}/{shard}.tar"
        tars.append(folder.on_this_machine(path))
        for sample in _samples(tars[-1], _LABELS_OF[kind], folder.shown(path)):
            keys.append(sample.key)
            values.append((sample.extension, sample.label))
            places.append((shard, sample.offset, sample.size))
    found_kind = kind or _kind_of_labels(values)
    shown = folder.shown(split)
    return SplitParts(
        kind=found_kind,
        keys=keys,
        labels=_labels(found_kind, keys, values, label_names, shown),
        captions=_captions(keys, values, shown) if found_kind == "retrieval" else None,
        label_names=None if found_kind == "retrieval" else label_names,
        places=TarPlaces(split, tars, np.array(places, np.int64).reshape(-1, 3)),
        layout="webdataset",
        split=split,
    )


@dataclass(frozen=True)
class TarPlaces:
    """Pictures inside of tars of this machine."""

    split: str
    tars: list[str]
    rows: NDArray[np.int64] = field(repr=False)
    """(n, 3): number of the tar, first byte of the picture, bytes."""

    def read(self, indices: Sequence[int]) -> list[bytes | str]:
        """Return the bytes of each picture, or why they cannot be had; tars are opened once."""
        found: list[bytes | str] = [""] * len(indices)
        shards = self.rows[list(indices), 0] if indices else np.zeros(0, np.int64)
        for shard in np.unique(shards).tolist():
            wanted = np.flatnonzero(shards == shard).tolist()
            path = self.tars[shard]
            try:
                number = os.open(path, os.O_RDONLY)
            except OSError as error:
                for position in wanted:
                    found[position] = f"{path} cannot be read ({error.strerror})"
                continue
            try:
                for position in wanted:
                    _, offset, size = self.rows[indices[position]].tolist()
                    found[position] = _content(number, offset, size, path)
            finally:
                os.close(number)
        return found

    def add_to(self, digest: hashlib._Hash) -> None:
        """Feed the split's name and every row."""
        digest.update(f"tars {self.split} {len(self.rows)} ".encode())
        digest.update(self.rows.astype("<i8").tobytes())

    def files(self) -> list[SetFile]:
        """Return the tars."""
        return [SetFile(f"{self.split}/{shard}.tar", path) for shard, path in enumerate(self.tars)]


def _content(number: int, offset: int, size: int, path: str) -> bytes | str:
    try:
        data = os.pread(number, size, offset)
    except OSError as error:
        return f"{path} cannot be read at byte {offset} ({error.strerror})"
    if len(data) != size:
        return f"{path} has {len(data)} of {size} bytes at byte {offset}: it changed since"
    return data


def _num_shards(folder: SetFolder, split: str) -> int | None:
    """What nshards.txt says, held against the tars that are there; None where neither is."""
    text = folder.read_text(f"{split}/{NSHARDS_FILE}", refused_is_absent=True)
    files, _ = folder.names(split)
    tars = {name for name in files if name.endswith(".tar")}
    shown = folder.shown(f"{split}/{NSHARDS_FILE}")
    if text is None:
        if tars:
            raise DatasetError(
                f"{shown} is missing beside {len(tars)} tars: without it a short copy would be "
                "evaluated unnoticed; fetch it, or write the number of tars into it."
            )
        return None
    number = text.strip()
    if not _IS_COUNT.fullmatch(number):
        raise DatasetError(f"{shown} holds {number[:40]!r}, but it holds the number of tars.")
    expected = {f"{shard}.tar" for shard in range(int(number))}
    if not folder.is_listable:
        # A web server shows no list: its tars are missed when they are fetched, and one more than
        # the file says is asked for by its name.
        tars = expected | ({f"{number}.tar"} if folder.size(f"{split}/{number}.tar") else set())
    if tars != expected:
        missing, more = sorted(expected - tars, key=_order), sorted(tars - expected, key=_order)
        raise DatasetError(
            f"{shown} says {number} tars, but "
            + (f"{missing[0]} is not there" if missing else f"{more[0]} is there too")
            + f" ({len(tars)} tars in all): fetch the dataset again, or correct that file."
        )
    return int(number)


def _order(name: str) -> tuple[int, str]:
    return len(name), name


def _kind(folder: SetFolder) -> Kind | None:
    text = folder.read_text(TYPE_FILE)
    if text is None:
        return None
    kind = _OF_TYPE.get(text.strip().lower())
    if kind is None:
        raise DatasetError(
            f"{folder.shown(TYPE_FILE)} holds {text.strip()[:40]!r}, but a dataset is of the type "
            f"{', '.join(_OF_TYPE)}."
        )
    return kind


def _kind_of_labels(values: Sequence[tuple[str, bytes]]) -> Kind:
    """Without dataset_type.txt the labels' form tells: .cls, .npy or .json, .txt."""
    extension = values[0][0] if values else "cls"
    kinds: dict[str, Kind] = {"txt": "retrieval", "npy": "multilabel", "json": "multilabel"}
    return kinds.get(extension, "classification")


@dataclass(slots=True)
class _Sample:
    key: str
    offset: int = -1
    size: int = 0
    extension: str = ""
    label: bytes = b""


def _samples(path: str, labels: tuple[str, ...], shown: str) -> Iterator[_Sample]:
    """Neighbors of one key are one sample, as the webdataset format has it."""
    sample: _Sample | None = None
    for member in walk_tar(path, lambda name: _split_name(name)[1] in labels, shown):
        key, extension = _split_name(member.name)
        if extension not in _PICTURES and extension not in labels:
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield _complete(sample, labels, shown)
            sample = _Sample(key)
        if extension in _PICTURES:
            if sample.offset >= 0:
                raise DatasetError(
                    f"{shown} has two pictures called {key!r}: give each its own key."
                )
            sample.offset, sample.size = member.offset, member.size
        elif not sample.extension or labels.index(extension) < labels.index(sample.extension):
            sample.extension, sample.label = extension, member.data or b""
        elif extension == sample.extension:
            raise DatasetError(f"{shown} has two labels called {key!r}: give each its own key.")
    if sample is not None:
        yield _complete(sample, labels, shown)


def _split_name(name: str) -> tuple[str, str]:
    """The key goes up to the first dot of the file's name (webdataset's rule)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder.removeprefix("./") + slash + stem if folder != "." else stem, extension.lower()


def _complete(sample: _Sample, labels: tuple[str, ...], shown: str) -> _Sample:
    if sample.offset < 0 or not sample.extension:
        wanted = _PICTURES if sample.offset < 0 else labels
        raise DatasetError(
            f"{shown} has no .{' or .'.join(wanted)} for {sample.key!r}: write the dataset again, "
            f"or correct its {TYPE_FILE}; a sample that is skipped would go unnoticed."
        )
    return sample


def _labels(
    kind: Kind,
    keys: Sequence[str],
    values: Sequence[tuple[str, bytes]],
    names: ClassNames | None,
    shown: str,
) -> NDArray[Any] | None:
    if kind == "retrieval":
        return None
    if kind == "classification":
        numbers = [
            _class_number(key, extension, data, shown)
            for key, (extension, data) in zip(keys, values, strict=True)
        ]
        return np.array(numbers, dtype=np.int64)
    rows = [
        _class_vector(key, extension, data, shown)
        for key, (extension, data) in zip(keys, values, strict=True)
    ]
    width = len(names) if names is not None else (len(rows[0]) if rows else 0)
    for key, row in zip(keys, rows, strict=True):
        if len(row) != width:
            raise DatasetError(
                f"{shown}: the label of {key!r} has {len(row)} entries, but there are {width} "
                "classes: write one entry a class."
            )
    return np.array(rows, dtype=np.bool_).reshape(len(rows), width)


def _class_number(key: str, extension: str, data: bytes, shown: str) -> int:
    try:
        if extension == "cls" and abs(number := int(data)) < 1 << 31:
            return number
    except ValueError:
        pass
    raise DatasetError(
        f"{shown}: the label of {key!r} is {data[:40]!r} (.{extension}), but the label of this set "
        "is a class number in a .cls: write it again."
    )


def _class_vector(key: str, extension: str, data: bytes, shown: str) -> list[bool]:
    """One 0 or 1 a class, of a .npy or a .json."""
    try:
        if extension == "npy":
            vector = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            vector = np.asarray(json.loads(data))
    except Exception as error:
        raise DatasetError(
            f"{shown}: the label of {key!r} is no .{extension} ({error}): write it again."
        ) from error
    if vector.ndim != 1 or vector.dtype.kind not in "biuf" or not np.isin(vector, (0, 1)).all():
        raise DatasetError(
            f"{shown}: the label of {key!r} must be a vector of one 0 or 1 a class, but it has "
            f"shape {vector.shape} and dtype {vector.dtype}, or other numbers."
        )
    return [bool(entry) for entry in vector]


def _captions(
    keys: Sequence[str], values: Sequence[tuple[str, bytes]], shown: str
) -> list[tuple[str, ...]]:
    """One caption a line, blank lines are none."""
    captions = []
    for key, (_, data) in zip(keys, values, strict=True):
        try:
            lines = data.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{shown}: the captions of {key!r} are not UTF-8 ({error}): write them again."
            ) from error
        captions.append(tuple(line for line in lines if line.strip()))
        if not captions[-1]:
            raise DatasetError(
                f"{shown}: {key!r} has no caption, so nothing can be found for it: leave it out."
            )
    return captions
