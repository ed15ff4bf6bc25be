"""Labelled sets as folders: one folder a class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from declip_eval.class_order import numbers_of_folders
from declip_eval.content_hashes import SetFile
from declip_eval.set_files import DatasetError, SetFolder
from declip_eval.set_parts import IMAGE_EXTENSIONS, SplitParts
from declip_eval.set_texts import CLASS_NAMES_FILE, parse_class_names

if TYPE_CHECKING:
    from declip_eval.dataset_table import DatasetInfo

__all__ = ["read_bare_folders", "read_folder_split"]

_SPLIT_NAMES = frozenset({"train", "test", "val", "valid", "validation", "dev"})


def read_folder_split(
    folder: SetFolder, split: str, info: DatasetInfo | None = None
) -> SplitParts | None:
    """Read the names of the pictures of ROOT/SPLIT/CLASS/; None where there is no such folder.

    The key of a picture is its path below the split's folder. Files that are no pictures by their
    extension are left out, and so is what begins with a dot.

    Raises:
        DatasetError: pictures that lie in no class's folder, or folders that cannot be listed.
    """
    files, classes = folder.names(split)
    pictures = [name for name in files if _is_picture(name)]
    if pictures:
        raise DatasetError(
            f"{folder.shown(split)} holds {len(pictures)} pictures outside of any class's folder "
            f"(first: {pictures[0]}): sort them into one folder a class."
        )
    if not classes:
        return None
    return _read_classes(folder, split, split, classes, info)


def read_bare_folders(folder: SetFolder, info: DatasetInfo | None = None) -> SplitParts | None:
    """Read ROOT/CLASS/, the form of sets that have a test split alone (ImageNet-A, -R, -V2).

    None where the root's folders are splits, or have folders in them.

    Raises:
        DatasetError: folders that cannot be listed.
    """
    _, classes = folder.names()
    if not classes or _SPLIT_NAMES.intersection(each.lower() for each in classes):
        return None
    # The folders of several datasets beside each other have folders in them, not pictures.
    inside = [folder.names(each) for each in classes]
    if any(folders for _, folders in inside):
        return None
    return _read_classes(folder, "", "test", classes, info)


def _read_classes(
    folder: SetFolder, path: str, split: str, classes: Sequence[str], info: DatasetInfo | None
) -> SplitParts | None:
    found = {
        name: file
        for name, file in folder.find(path).items()
        if "/" in name and _is_picture(name) and not name.startswith(".") and "/." not in name
    }
    if not found:
        return None
    own = folder.read_text(CLASS_NAMES_FILE)
    own_names = (
        None if own is None else parse_class_names(own.splitlines(), folder.shown(CLASS_NAMES_FILE))
    )
    number_of, names = numbers_of_folders(classes, info, own_names, folder.shown(path))
    if own_names is not None and len(own_names) == len(names):
        names = own_names
    found = {key: file for key, file in found.items() if key.partition("/")[0] in number_of}
    keys = list(found)
    sizes = np.array([max(file.size, 0) for file in found.values()], np.int64)
    marks = None if folder.is_local else [file.mark for file in found.values()]
    return SplitParts(
        kind="classification",
        keys=keys,
        labels=np.array([number_of[key.partition("/")[0]] for key in keys], np.int64),
        captions=None,
        label_names=names,
        places=FolderPlaces(folder, path, keys, sizes, marks),
        layout="folders",
        split=split,
    )


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith(".")


@dataclass(frozen=True)
class FolderPlaces:
    """Pictures that are files of their own."""

    folder: SetFolder
    path: str
    """Of the split in the folder; empty: the folder itself."""
    names: list[str] = field(repr=False)
    sizes: NDArray[np.int64] = field(repr=False)
    marks: list[str | None] | None = field(default=None, repr=False)
    """Of remote files, see `SetFolder.find`; None: they are of this machine."""

    def read(self, indices: Sequence[int]) -> list[bytes | str]:
        """Return the bytes of each picture, or why they cannot be had."""
        return self.folder.read_many([self._inside(self.names[index]) for index in indices])

    def _inside(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name

    def add_to(self, digest: hashlib._Hash) -> None:
        """Feed every name and size."""
        digest.update(f"folders {self.path} {len(self.names)} ".encode())
        digest.update(json.dumps(self.names).encode())
        digest.update(self.sizes.astype("<i8").tobytes())

    def files(self) -> list[SetFile]:
        """Return the pictures themselves."""
        names = [self._inside(name) for name in self.names]
        if self.marks is None:
            return [SetFile(name, self.folder.full(name)) for name in names]
        return [
            SetFile(name, self.folder.shown(name), self.folder, mark)
            for name, mark in zip(names, self.marks, strict=True)
        ]
