"""Which columns of a parquet file are picture, label and captions, and what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from declip_eval.class_order import match_rows, table_names
from declip_eval.set_files import DatasetError
from declip_eval.set_parts import ClassNames, Kind

if TYPE_CHECKING:
    from declip_eval.dataset_table import DatasetInfo

__all__ = ["ColumnChoice", "captions_of", "choose_columns", "labels_of"]

_PICTURES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "fine_label", "cls", "class", "classes", "target")
_CAPTIONS = ("caption", "captions", "sentences_raw", "sentences", "raw", "text", "txt")
_IN_SENTENCE = ("raw", "caption", "text")
"""Fields that hold the text where a caption is a struct."""
_OTHERS = ("__key__", "split")


@dataclass(frozen=True)
class ColumnChoice:
    """The columns that are read."""

    kind: Kind
    picture: str
    label: str
    """Of labels, for retrieval of captions."""
    besides_pictures: list[str]
    """All columns that are read at once."""
    class_names: ClassNames | None
    """Of the ClassLabel, where the file says them."""


def choose_columns(schema: Any, info: DatasetInfo | None, shown: str) -> ColumnChoice:
    """Make out the columns by Hugging Face's features in the file's metadata, else by their names.

    Raises:
        DatasetError: no column of pictures, or none or several that may be the label.
    """
    features = _features(schema)
    picture = _first(
        [name for name in schema.names if _type(features.get(name)) == "Image"],
        [name for name in schema.names if _holds_bytes(schema.field(name).type)],
        _PICTURES,
    )
    if picture is None:
        raise DatasetError(
            f"{shown} has no column of pictures (binary, or a struct with bytes) among "
            f"{', '.join(schema.names)}: call it image."
        )
    label = None
    if info is None or info.kind != "retrieval":
        label = _label_column(schema, features, info, shown)
    if label is not None:
        names, several = _names_of(features.get(label))
        several = several or _is_list(schema.field(label).type)
        kind: Kind = "multilabel" if several else "classification"
    else:
        label, names, kind = _first([], list(schema.names), _CAPTIONS), None, "retrieval"
    if label is None:
        raise DatasetError(
            f"{shown} has no column of labels or captions among {', '.join(schema.names)}: call it "
            "label, or caption."
        )
    others = [name for name in _OTHERS if name in schema.names]
    return ColumnChoice(kind, picture, label, [label, *others], names)


def _label_column(
    schema: Any, features: Mapping[str, Any], info: DatasetInfo | None, shown: str
) -> str | None:
    there: list[str] = list(schema.names)
    labelled = [name for name in there if _names_of(features.get(name))[0]]
    if info is not None and info.num_classes is not None:
        fitting = [
            name
            for name in labelled
            if len(_names_of(features.get(name))[0] or ()) == info.num_classes
        ]
        labelled = fitting or labelled
    if len(labelled) == 1:
        return labelled[0]
    named = [name for name in _LABELS if name in (labelled or there)]
    if labelled and not named:
        raise DatasetError(
            f"{shown} has several columns of classes ({', '.join(labelled)}): call the right one "
            "label."
        )
    return named[0] if named else None


def _features(schema: Any) -> Mapping[str, Any]:
    """Hugging Face's description of the columns, empty where the file has none."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _type(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _names_of(feature: Any) -> tuple[ClassNames | None, bool]:
    """Names of a ClassLabel, and whether it is a list of them."""
    several = False
    if isinstance(feature, list) and len(feature) == 1:
        feature, several = feature[0], True
    elif _type(feature) in ("Sequence", "List", "LargeList"):
        feature, several = feature.get("feature"), True
    names = feature.get("names") if _type(feature) == "ClassLabel" else None
    if not isinstance(names, list) or not names:
        return None, several
    return tuple((str(name),) for name in names), several


def _first(best: Sequence[str], there: Sequence[str], known: Sequence[str]) -> str | None:
    """The best one, of several the best known; else the first known one that is there."""
    for name in known:
        if name in (best or there):
            return name
    return best[0] if best else None


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as pt

    if pt.is_struct(kind):
        return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
    return bool(pt.is_binary(kind) or pt.is_large_binary(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow.types as pt

    return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind))


def labels_of(
    column: Any, choice: ColumnChoice, info: DatasetInfo | None, keys: Sequence[str], shown: str
) -> tuple[NDArray[Any], ClassNames | None]:
    """Return labels, int64 (n,) or bool (n, num_classes), and the classes' names where known.

    A column of texts is numbered by the table's names where all of them are among these, else in
    alphabetical order.

    Raises:
        DatasetError: a row without label, or with something else than class numbers.
    """
    values = column.to_pylist()
    for key, value in zip(keys, values, strict=True):
        if value is None:
            raise DatasetError(f"{shown}: {key} has no label: fetch a split that has labels.")
    names = choice.class_names
    flat = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    if any(isinstance(entry, str) for entry in flat):
        number_of, names = _numbers_of_texts(flat, info)
        values = [
            [number_of[entry] for entry in value] if isinstance(value, list) else number_of[value]
            for value in values
        ]
    elif wrong := [entry for entry in flat if not isinstance(entry, int)]:
        raise DatasetError(
            f"{shown}: the column {choice.label!r} holds {wrong[0]!r}, but labels are class "
            "numbers or names."
        )
    if choice.kind == "classification":
        return np.array(values, dtype=np.int64), names
    # A class may stand there twice, once an object. Rows of one length with nothing but 0 and 1 are
    # a vector a picture, and would be read as the classes 0 and 1.
    lengths = {len(value) for value in values}
    if (
        len(lengths) == 1
        and max(lengths) > 2
        and all(entry in (0, 1) for row in values for entry in row)
    ):
        raise DatasetError(
            f"{shown}: the column {choice.label!r} holds {max(lengths)} zeros and ones a picture, "
            "but a list of labels holds the numbers of the right classes: write these."
        )
    width = len(names) if names else (info.num_classes if info is not None else None) or 0
    highest = max((max(value, default=-1) for value in values), default=-1)
    width = width or highest + 1
    if highest >= width or any(entry < 0 for value in values for entry in value):
        raise DatasetError(
            f"{shown}: the column {choice.label!r} holds classes up to {highest}, but they are 0 "
            f"to {width - 1}."
        )
    table = np.zeros((len(values), width), dtype=np.bool_)
    for row, value in enumerate(values):
        table[row, value] = True
    return table, names


def _numbers_of_texts(
    texts: Sequence[str], info: DatasetInfo | None
) -> tuple[dict[str, int], ClassNames]:
    distinct = sorted(set(texts))
    table = table_names(info) if info is not None else ()
    rows = match_rows(distinct, table)
    if table and None not in rows and len(set(rows)) == len(rows):
        found = {text: row for text, row in zip(distinct, rows, strict=True) if row is not None}
        return found, tuple((spellings[0],) for spellings in table)
    return {text: row for row, text in enumerate(distinct)}, tuple((text,) for text in distinct)


def captions_of(column: Any, keys: Sequence[str], shown: str) -> list[tuple[str, ...]]:
    """Return the captions of each row: of a text (one a line), a list of texts, or of structs.

    Raises:
        DatasetError: a row without any.
    """
    found = []
    for key, value in zip(keys, column.to_pylist(), strict=True):
        texts = (
            value.splitlines() if isinstance(value, str) else [_text(each) for each in value or ()]
        )
        captions = tuple(text for text in texts if text.strip())
        if not captions:
            raise DatasetError(
                f"{shown}: {key} has no caption, so nothing can be found for it: leave it out."
            )
        found.append(captions)
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = next((value[name] for name in _IN_SENTENCE if name in value), "")
    return value if isinstance(value, str) else ""
