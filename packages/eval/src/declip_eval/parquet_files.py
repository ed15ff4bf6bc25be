"""Where the parquet files of a split lie, by Hugging Face's ways to lay them out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from declip_eval.set_files import DatasetError, SetFolder

__all__ = ["find_parquet_files"]

_PLAIN = ("", "data")
"""Folders of a dataset without configurations in which its parquet files may lie."""
_USUAL = ("default", "plain_text", "main")
"""Names of a configuration that say nothing, the hub's own one first: a dataset's only one, mostly,
and to be taken where there are others too."""
_PART = re.compile(r"-(\d+)-of-(\d+)")
_NUMBERED = re.compile(r"(?:.*/)?(\d+)\.parquet")
"""The hub's conversions: CONFIGURATION/SPLIT/0000.parquet."""
_PARTIAL = "partial-"
"""What the hub puts before a split of which it has converted the first gigabytes alone."""


def find_parquet_files(folder: SetFolder, split: str, *, is_own: bool = True) -> list[str]:
    """Return the parquet files of a split, relative to `folder` and in order; none where it has
    none.

    They are SPLIT.parquet, SPLIT-*.parquet or SPLIT/*.parquet, in the dataset's folder, in `data`
    or in the folder of a configuration. Of several configurations default, plain_text or main is
    taken; another one has to be the only one.

    Args:
        folder: of the dataset, or of several.
        split: as the files call it.
        is_own: the folder is this dataset's and no other's; else the folders in it that have none
            of the usual names may be other datasets, and are not looked into.

    Raises:
        DatasetError: a part of the files is missing, or several configurations have the split.
    """
    for place in (*_PLAIN, *_USUAL):
        if found := _of_place(folder, place, split):
            return found
    if not is_own:
        return []
    known = {*_PLAIN, *_USUAL, split, _PARTIAL + split}
    by_config = {
        name: found
        for name in folder.names()[1]
        if name not in known and (found := _of_place(folder, name, split))
    }
    if len(by_config) > 1:
        names = ", ".join(list(by_config)[:6]) + (" and others" if len(by_config) > 6 else "")
        raise DatasetError(
            f"{folder.root} has {len(by_config)} configurations with the split {split!r} ({names}):"
            " give the folder of the one that is meant as the dataset's root, such as "
            f"{folder.shown(next(iter(by_config)))}."
        )
    return next(iter(by_config.values()), [])


def _of_place(folder: SetFolder, place: str, split: str) -> list[str]:
    """The split's files in a folder, which are all of them."""
    prefix = f"{place}/" if place else ""
    files, folders = folder.names(place)
    pattern = re.compile(rf"{re.escape(split)}(-.*)?\.parquet")
    found = [prefix + name for name in files if pattern.fullmatch(name)]
    if not found and split in folders:
        inside = folder.names(prefix + split)[0]
        found = [f"{prefix}{split}/{name}" for name in inside if name.endswith(".parquet")]
    if found:
        _check_parts(found, folder)
    elif _PARTIAL + split in folders:
        raise DatasetError(
            f"{folder.shown(prefix + _PARTIAL + split)} is the first part of the split {split!r}, "
            "which the hub converted no further: fetch the dataset's own files, a part of it gives "
            "no number."
        )
    return found


def _check_parts(files: Sequence[str], folder: SetFolder) -> None:
    """Names like test-00000-of-00003.parquet say how many there must be, and names like
    0002.parquet that there are some before them."""
    found = [_PART.search(file) for file in files]
    parts = [(int(match[1]), int(match[2])) for match in found if match]
    if not parts:
        _check_numbers(files, folder)
        return
    totals = {total for _, total in parts}
    numbers = sorted(number for number, _ in parts)
    if len(totals) == 1 and len(parts) == len(files) and numbers == list(range(max(totals))):
        return
    missing = sorted(set(range(max(totals))) - set(numbers))
    raise DatasetError(
        f"{folder.shown(files[0])} is one of {max(totals)} parquet files, but "
        + (f"part {missing[0]:05d} is not there" if missing else "there are other parts too")
        + f" ({len(files)} files in all): fetch the dataset again, a part of it gives no number."
    )


def _check_numbers(files: Sequence[str], folder: SetFolder) -> None:
    numbered = [_NUMBERED.fullmatch(file) for file in files]
    numbers = [int(match[1]) for match in numbered if match]
    if len(numbers) < len(files) or sorted(numbers) == list(range(len(files))):
        return
    missing = sorted(set(range(max(numbers))) - set(numbers))
    what = f"there is no {missing[0]:04d}.parquet" if missing else "a number is there twice"
    raise DatasetError(
        f"{folder.shown(files[-1])} is one of several numbered parquet files, but {what} "
        f"({len(files)} files in all): fetch the dataset again, a part of it gives no number."
    )
