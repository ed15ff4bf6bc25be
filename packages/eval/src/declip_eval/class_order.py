"""Which class is which number: names compared as loosely as datasets spell them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from declip_eval.set_files import DatasetError
from declip_eval.set_parts import ClassNames

if TYPE_CHECKING:
    from declip_eval.dataset_table import DatasetInfo

__all__ = ["match_rows", "name_key", "name_words", "numbers_of_folders", "table_names"]

_ARTICLES = frozenset({"a", "an", "the"})
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def name_words(name: str) -> frozenset[str]:
    """The words of a name without case, accents, punctuation and articles."""
    plain = unicodedata.normalize("NFKD", _CAMEL.sub(" ", name))
    plain = "".join(char for char in plain if not unicodedata.combining(char)).casefold()
    return frozenset(re.findall(r"[^\W_]+", plain)) - _ARTICLES


def name_key(name: str) -> str:
    """What two spellings of one name have in common: "The T_Shirt" and "t-shirt" are one."""
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(char for char in plain if not unicodedata.combining(char)).casefold()
    words = re.findall(r"[^\W_]+", plain)
    return "".join(word for word in words if word not in _ARTICLES) or plain.strip()


def table_names(info: DatasetInfo) -> ClassNames:
    """Every spelling that the table knows of each class of the labels, in label order; empty where
    it has none, or has the names of other classes (`candidates`)."""
    named = info.class_names if info.candidates is None else ()
    rows = max(len(named), len(info.label_names))
    return tuple(
        (
            *(info.label_names[row] if row < len(info.label_names) else ()),
            *(named[row] if row < len(named) else ()),
        )
        for row in range(rows)
    )


def match_rows(names: Sequence[str], table: ClassNames) -> list[int | None]:
    """Return the row of the table of each name, None where none or several have it."""
    row_of: dict[str, int | None] = {}
    for row, spellings in enumerate(table):
        for key in {name_key(spelling) for spelling in spellings}:
            row_of[key] = None if key in row_of else row
    return [row_of.get(name_key(name)) for name in names]


def numbers_of_folders(
    folders: Sequence[str], info: DatasetInfo | None, own_names: ClassNames | None, shown: str
) -> tuple[dict[str, int], ClassNames]:
    """Number the folders of a split: one folder a class.

    By the names of the set's own classnames.txt or of the table, where every folder has one of
    them, or every one of them has its folder (of ObjectNet's 313 folders 113 are classes; the
    others are left out, and the table's count tells whether that is right); by their number, where
    all are numbers (ImageNet-V2: "10" comes after "9"); else in alphabetical order, as torchvision
    does (WordNet ids: ImageNet's order).

    Returns:
        Folder -> class for the folders that are classes, and the names of all classes in order.

    Raises:
        DatasetError: numbers that begin neither with 0 nor with 1.
    """
    for table in (own_names, table_names(info) if info is not None else None):
        if not table:
            continue
        rows = match_rows(folders, table)
        known = [row for row in rows if row is not None]
        whole = len(known) == len(folders) or len(known) == len(table)
        if known and whole and len(set(known)) == len(known):
            found = {
                folder: row for folder, row in zip(folders, rows, strict=True) if row is not None
            }
            name_of = {row: folder for folder, row in found.items()}
            names = tuple((name_of.get(row, table[row][0]),) for row in range(len(table)))
            return found, names
    if all(folder.isascii() and folder.isdigit() for folder in folders):
        return _by_number(folders, info, shown)
    ordered = sorted(folders)
    return {folder: row for row, folder in enumerate(ordered)}, tuple((each,) for each in ordered)


def _by_number(
    folders: Sequence[str], info: DatasetInfo | None, shown: str
) -> tuple[dict[str, int], ClassNames]:
    numbers = {folder: int(folder) for folder in folders}
    lowest, highest = min(numbers.values()), max(numbers.values())
    num_classes = None if info is None else info.num_classes
    # Folders 1 to n are n classes counted from 1, unless the table has the class 0 that is missing.
    base = 1 if lowest == 1 and num_classes in (None, highest) else 0
    if lowest > 1 and num_classes is None:
        raise DatasetError(
            f"{shown} has folders numbered {lowest} to {highest}, but numbers of classes begin "
            "with 0 or 1: name the folders as the classes, or fetch the missing ones."
        )
    if len(set(numbers.values())) != len(folders):
        raise DatasetError(f"{shown} has two folders of one number: leave the wrong one out.")
    rows = {folder: number - base for folder, number in numbers.items()}
    return rows, tuple((str(number + base),) for number in range(highest - base + 1))
