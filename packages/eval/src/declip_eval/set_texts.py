"""Class names and prompt templates as files: one a line, or CLIP_benchmark's JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from declip_eval.set_files import DatasetError, SetFolder
from declip_eval.set_parts import ClassNames
from declip_eval.templates import check_templates

__all__ = [
    "CLASS_NAMES_FILE",
    "TEMPLATES_FILE",
    "class_name_lines",
    "load_class_names",
    "load_templates",
    "parse_class_names",
    "parse_templates",
]

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
_SYNONYMS = " | "


def parse_class_names(lines: Sequence[str], shown: str) -> ClassNames:
    """Return one tuple of names a line; several names of a class have " | " between them.

    Args:
        lines: in label order; blank lines at the end do not count.
        shown: what errors call the file.

    Raises:
        DatasetError: no line, or one without a name.
    """
    kept = list(lines)
    while kept and not kept[-1].strip():
        kept.pop()
    if not kept:
        raise DatasetError(f"{shown} holds no class name: write one a line, in label order.")
    names = [tuple(name.strip() for name in line.split(_SYNONYMS)) for line in kept]
    for row, of_class in enumerate(names):
        if not all(of_class):
            raise DatasetError(
                f"{shown} has an empty class name in line {row + 1} of {len(names)}: each class "
                "needs a name, in label order."
            )
    return tuple(names)


def class_name_lines(names: ClassNames) -> str:
    """Return what `parse_class_names` reads back, a line break after each line."""
    return "".join(_SYNONYMS.join(of_class) + "\n" for of_class in names)


def parse_templates(lines: Sequence[str], shown: str) -> tuple[str, ...]:
    """Return the templates with {} for the class name; CLIP_benchmark's {c} means the same.

    Raises:
        DatasetError: no line, or one without exactly one place for the name.
    """
    templates = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    try:
        return check_templates(templates)
    except ValueError as error:
        raise DatasetError(f"{shown}: {error}") from error


def load_class_names(file: str, dataset_names: Sequence[str]) -> ClassNames:
    """Read a user's class names: text of one a line, or JSON of a list or {dataset: list}.

    Args:
        file: path or fsspec URL.
        dataset_names: the set's spellings, looked up in the JSON in this order.

    Raises:
        DatasetError: the file is not there, is no such file, or has no list for the set.
    """
    return parse_class_names(_load_lines(file, dataset_names, "class names"), file)


def load_templates(file: str, dataset_names: Sequence[str]) -> tuple[str, ...]:
    """Read a user's templates from the forms that `load_class_names` reads.

    Raises:
        DatasetError: as there, or templates for single classes, which are not read.
    """
    return parse_templates(_load_lines(file, dataset_names, "templates"), file)


def _load_lines(file: str, dataset_names: Sequence[str], what: str) -> list[str]:
    name = file.replace("\\", "/").rstrip("/").rpartition("/")[2]
    folder = SetFolder(file[: -len(name)] or ("." if "://" not in file else file))
    text = folder.read_text(name)
    if text is None:
        raise DatasetError(f"The file of {what} {file!r} is not there: correct its path.")
    if Path(name).suffix.lower() != ".json":
        return text.splitlines()
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise DatasetError(f"The file of {what} {file!r} is no JSON ({error}).") from error
    if isinstance(content, dict):
        key = next((name for name in dataset_names if name in content), None)
        if key is None:
            raise DatasetError(
                f"The file of {what} {file!r} has none for {dataset_names[0]!r}: add a list under "
                "that name."
            )
        content = content[key]
    if not isinstance(content, list) or not all(isinstance(line, str) for line in content):
        raise DatasetError(
            f"The {what} for {dataset_names[0]!r} in {file!r} are no list of texts: give one list "
            "for all classes."
        )
    return content
