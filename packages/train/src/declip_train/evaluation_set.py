"""Labelled pictures in the two forms that they are passed around in.

    FOLDER/CLASS/*.jpg                     folders of pictures, a class each; names are the folders'
                                           (_ for a space), or classnames.txt's lines in their order
    FOLDER/classnames.txt, FOLDER/test/*.tar
                                           CLIP_benchmark's webdatasets: KEY.jpg beside KEY.cls,
                                           which holds the class's line number from 0

Beside either, ``zeroshot_classification_templates.txt`` may hold prompts, one a line, with ``{c}``
or ``{}`` where the name goes. Pictures may be .jpg, .jpeg, .png or .webp.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from declip_shards import DeclipError

__all__ = ["DEFAULT_TEMPLATES", "EvaluationSet", "Picture", "read_evaluation_set"]

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES = ("a photo of a {}.",)
"""CLIP's single default prompt (Radford et al. 2021, section 3.1.4)."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_TAR_FOLDER = "test"
_WORDNET_ID = re.compile(r"n\d{8}")
"""Of ImageNet's folders."""


class Picture(NamedTuple):
    """Where a picture lies, and what it shows."""

    path: str
    offset: int
    """First byte in the file."""
    size: int
    """Bytes."""
    label: int
    """Class, from 0."""

    def read(self) -> bytes:
        """Its encoded bytes.

        Raises:
            OSError: the file is gone.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Pictures, the classes' names, and prompts for them."""

    class_names: Sequence[str]
    templates: Sequence[str]
    """Each with {} where a name goes."""
    pictures: Sequence[Picture]

    def prompts(self, label: int) -> list[str]:
        """All prompts of a class."""
        return [template.replace("{}", self.class_names[label]) for template in self.templates]


def read_evaluation_set(folder: str | Path) -> EvaluationSet:
    """List the pictures of a folder; none of them is read.

    Raises:
        DeclipError: there is no such folder, it has neither form, or names and labels disagree.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DeclipError(
            f"evaluate_data is {str(folder)!r}, which is no folder on this machine; give one of "
            "labelled pictures (a folder a class, or CLIP_benchmark's tars with classnames.txt)."
        )
    names = _lines(path / CLASS_NAMES)
    tars = sorted((path / _TAR_FOLDER).glob("*.tar")) or sorted(path.glob("*.tar"))
    if tars:
        if names is None:
            raise DeclipError(
                f"evaluate_data {str(path)!r} holds tars but no {CLASS_NAMES}; write the classes' "
                "names there, one a line, in the order of the labels."
            )
        pictures = [picture for tar in tars for picture in _pictures_of(tar)]
    else:
        # Hidden ones are other programs': no class.
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        pictures = [
            Picture(str(file), 0, file.stat().st_size, label)
            for label, own in enumerate(folders)
            for file in sorted(own.rglob("*"))
            if file.suffix.lower() in _PICTURES
        ]
        if names is not None and len(names) != len(folders):
            raise DeclipError(
                f"{str(path / CLASS_NAMES)!r} has {len(names)} names for {len(folders)} folders of "
                "pictures; write one line for each folder, in the order of their names."
            )
        if names is None and folders and all(_WORDNET_ID.fullmatch(own.name) for own in folders):
            raise DeclipError(
                f"the folders in {str(path)!r} are named by WordNet's numbers, as "
                f"{folders[0].name!r}, which no caption has; write the classes' names to "
                f"{CLASS_NAMES} there, one a line, in the order of the folders."
            )
        names = names or [own.name.replace("_", " ") for own in folders]
    if not pictures:
        raise DeclipError(
            f"evaluate_data {str(path)!r} holds no picture; give a folder with a folder of "
            f"pictures a class, or with tars in {_TAR_FOLDER}/."
        )
    wrong = next((picture for picture in pictures if not 0 <= picture.label < len(names)), None)
    if wrong is not None:
        raise DeclipError(
            f"{wrong.path!r} has the label {wrong.label}, but {CLASS_NAMES} has {len(names)} "
            "names; add the missing ones."
        )
    return EvaluationSet(
        class_names=names, templates=_templates(path / TEMPLATES), pictures=pictures
    )


def _lines(path: Path) -> list[str] | None:
    """Lines of a file that are not empty; None where there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _templates(path: Path) -> tuple[str, ...]:
    lines = _lines(path)
    if lines is None:
        return DEFAULT_TEMPLATES
    templates = tuple(line.replace("{c}", "{}") for line in lines)
    wrong = next((template for template in templates if template.count("{}") != 1), None)
    if wrong is not None or not templates:
        raise DeclipError(
            f"{str(path)!r} has the prompt {wrong or ''!r}, but each line must have {{c}} once, "
            "where the class's name goes."
        )
    return templates


def _pictures_of(tar: Path) -> Iterator[Picture]:
    """Pictures of a tar that have a label beside them."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                key, extension = os.path.splitext(member.name)
                if extension.lower() in _PICTURES:
                    places[key] = member.offset_data, member.size
                elif extension == ".cls":
                    file = opened.extractfile(member)
                    labels[key] = int(file.read()) if file else -1
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DeclipError(f"{str(tar)!r} cannot be read ({error}); download it again.") from error
    unlabelled = next((key for key in places if key not in labels), None)
    if unlabelled is not None:
        raise DeclipError(
            f"{str(tar)!r} has no label {unlabelled}.cls beside its picture; evaluate_data must be "
            "of classification."
        )
    for key, (offset, size) in places.items():
        yield Picture(str(tar), offset, size, labels[key])
