"""What must hold of a labelled set before a number is reported from it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from declip_eval.class_order import match_rows, name_key, name_words, table_names
from declip_eval.set_files import DatasetError
from declip_eval.set_parts import ClassNames

if TYPE_CHECKING:
    from declip_eval.dataset_table import DatasetInfo
    from declip_eval.labelled_sets import LabelledSet

__all__ = ["check_against"]


def check_against(info: DatasetInfo | None, labelled: LabelledSet) -> None:
    """Refuse a set that is not what the table says, or that contradicts itself.

    Args:
        info: the set's row of the table; None for a set that the table does not know, of which
            only keys, labels and the number of names are looked at.
        labelled: the set.

    Raises:
        DatasetError: no picture, a key twice, another kind or number of pictures or classes than
            the table's, labels out of range, a class without pictures, or classes in another
            order. Names are compared without case, accents, punctuation and articles; of names
            that the user gave as a file, in label order, only the number is looked at.

    Warns:
        UserWarning: a training or validation split of another size than the table's, or a name
            twice in the user's file.
    """
    shown = f"{labelled.name} ({labelled.split})"
    if not len(labelled):
        raise DatasetError(f"{shown} holds no picture: fetch it again.")
    _check_keys(labelled.keys, shown)
    if info is not None:
        if info.kind != labelled.kind:
            raise DatasetError(
                f"{shown} is of the kind {labelled.kind}, but the table says {info.kind}: give the "
                "right folder, or correct its dataset_type.txt."
            )
        _check_count(info, labelled, shown)
    if labelled.labels is None:
        return
    num_classes = _num_classes(info, labelled, shown)
    _check_names(labelled, num_classes, info, shown)
    names = labelled.label_names or _names_of_labels(labelled.class_names, num_classes)
    _check_labels(labelled, num_classes, names, shown)
    by_user = labelled.names_source == "file"
    if info is not None and labelled.label_names is not None and not by_user:
        _check_order(labelled.label_names, table_names(info), shown)


def _check_keys(keys: Sequence[str], shown: str) -> None:
    if len(set(keys)) == len(keys):
        return
    key, times = next(item for item in Counter(keys).items() if item[1] > 1)
    raise DatasetError(
        f"{shown} has the key {key!r} {times} times: each picture has a key of its own, so a part "
        "of the set may be there twice; fetch it again."
    )


def _check_count(info: DatasetInfo, labelled: LabelledSet, shown: str) -> None:
    """A test split has the table's number of pictures. Training and validation splits go around
    in many sizes: another one is said, and less than half of the pictures are refused."""
    count = len(labelled)
    if info.is_tested(labelled.role):
        expected = (info.num_test, *info.also_num_test)
        if count not in expected:
            wanted = " or ".join(f"{number:,}" for number in expected)
            raise DatasetError(
                f"{shown} holds {count:,} pictures, but {info.title} has {wanted} in this split: "
                "fetch the whole of it; a part of it gives another number than its name says."
            )
        return
    wanted_here = info.num_train if labelled.role == "train" else info.num_val
    if wanted_here is None or count == wanted_here:
        return
    sentence = f"{shown} holds {count:,} pictures, but {info.title} has {wanted_here:,} in this"
    if 2 * count < wanted_here:
        raise DatasetError(f"{sentence} split: fetch the whole of it.")
    warnings.warn(
        f"{sentence} split by the published protocol: results may differ from published ones.",
        UserWarning,
        stacklevel=3,
    )


def _num_classes(info: DatasetInfo | None, labelled: LabelledSet, shown: str) -> int:
    """Classes that the labels may name."""
    found = labelled.num_classes or 0
    if info is None:
        return found
    expected = len(info.candidates) if info.candidates is not None else info.num_classes
    if expected is None:
        return found
    # Without names of its own a set shows its classes by its labels alone: too many are labels
    # out of range, too few are classes without pictures.
    counted = labelled.label_names is not None or labelled.kind == "multilabel"
    if counted and found != expected:
        raise DatasetError(
            f"{shown} has {found} classes, but {info.title} has {expected}: give the right folder, "
            "or correct its classnames.txt."
        )
    return expected


def _names_of_labels(names: ClassNames | None, num_classes: int) -> ClassNames | None:
    return names if names is not None and len(names) == num_classes else None


def _check_names(
    labelled: LabelledSet, num_classes: int, info: DatasetInfo | None, shown: str
) -> None:
    """The prompts' names are as many as the classes (of the table's rows, where it has others)."""
    names = labelled.class_names
    if names is None:
        return
    rows = len(info.class_names) if info is not None and info.candidates is not None else 0
    if len(names) != (rows or num_classes):
        raise DatasetError(
            f"{shown} has {rows or num_classes} classes, but {len(names)} class names are given: "
            "give one line a class, in label order."
        )
    if labelled.names_source == "file":
        _warn_of_doubles(names, shown)


def _warn_of_doubles(names: ClassNames, shown: str) -> None:
    """Published lists have such names, too (ImageNet's sunglasses), so they are not refused."""
    first: dict[tuple[str, ...], int] = {}
    for row, of_class in enumerate(names):
        if (other := first.setdefault(of_class, row)) != row:
            warnings.warn(
                f"{shown}: classes {other} and {row} are both called {of_class[0]!r} in the given "
                "names: prompts cannot tell them apart, and equal scores count as wrong.",
                UserWarning,
                stacklevel=4,
            )
            return


def _check_labels(
    labelled: LabelledSet, num_classes: int, names: ClassNames | None, shown: str
) -> None:
    labels = labelled.labels
    assert labels is not None
    if labelled.kind == "multilabel":
        counts = labels.sum(axis=0)
    else:
        bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if bad.size:
            raise DatasetError(
                f"{shown}: the label of {labelled.keys[bad[0]]!r} is {labels[bad[0]]}, but classes "
                f"are 0 to {num_classes - 1} ({bad.size} labels are out of range): fetch the "
                "dataset again, or give the names of all classes."
            )
        counts = np.bincount(labels, minlength=num_classes)
    empty = np.flatnonzero(counts == 0)
    if empty.size:
        row = int(empty[0])
        name = f" ({names[row][0]})" if names is not None else ""
        more = f", and of {empty.size} classes in all" if empty.size > 1 else ""
        raise DatasetError(
            f"{shown} has no picture of class {row}{name}{more}: fetch the whole of it, or leave "
            f"{'these classes' if more else 'it'} out of its class names."
        )


def _check_order(names: ClassNames, table: ClassNames, shown: str) -> None:
    """A name that is another class's name in the table shows classes in another order."""
    if not table or len(names) != len(table):
        return
    rows = match_rows([of_class[0] for of_class in names], table)
    keys = [{name_key(spelling) for spelling in spellings} for spellings in table]
    here = [
        any(name_key(name) in of_row for name in of_class)
        for of_class, of_row in zip(names, keys, strict=True)
    ]
    moved = [row for row in range(len(names)) if not here[row] and rows[row] is not None]
    if moved:
        first = moved[0]
        raise DatasetError(
            f"{shown} has its classes in another order than the table ({len(moved)} of "
            f"{len(names)}): class {first} is {names[first][0]!r} here and {table[first][-1]!r} "
            f"there, where {names[first][0]!r} is class {rows[first]}; correct the order of names "
            "or labels, or give the right names as a file."
        )
    if any(here) or any(_alike(of_class, of_row) for of_class, of_row in zip(names, table)):
        return
    raise DatasetError(
        f"{shown} shares no class name with the table (class 0 is {names[0][0]!r} here and "
        f"{table[0][-1]!r} there): give the right folder."
    )


def _alike(names: Sequence[str], others: Sequence[str]) -> bool:
    return any(name_words(name) & name_words(other) for name in names for other in others)
