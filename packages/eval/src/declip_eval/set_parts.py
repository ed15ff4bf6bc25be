"""What a reader of one form of labelled set hands back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from declip_eval.content_hashes import SetFile

__all__ = ["IMAGE_EXTENSIONS", "ClassNames", "Kind", "Layout", "PicturePlaces", "SplitParts"]

Kind = Literal["classification", "multilabel", "retrieval"]
Layout = Literal["webdataset", "folders", "parquet"]
ClassNames = tuple[tuple[str, ...], ...]
"""One entry a class in label order: its names, usually one."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff")


class PicturePlaces(Protocol):
    """Where the pictures of a split lie; small enough to be sent to another process."""

    def read(self, indices: Sequence[int]) -> list[bytes | str]:
        """Return the encoded bytes of each picture, or in words why they cannot be had."""
        ...

    def add_to(self, digest: hashlib._Hash) -> None:
        """Feed each picture's place, relative to the dataset's folder, and its size."""
        ...

    def files(self) -> list[SetFile]:
        """Return the files that the pictures are read from, in the order of the set."""
        ...


@dataclass(frozen=True)
class SplitParts:
    """One split as it stands on disk."""

    kind: Kind
    keys: list[str]
    labels: NDArray[Any] | None
    """int64 (n,), bool (n, num_classes) for multilabel, None for retrieval."""
    captions: list[tuple[str, ...]] | None
    label_names: ClassNames | None
    """What the data itself calls its classes, in label order."""
    places: PicturePlaces
    layout: Layout
    split: str
    """The name that the split has on disk."""
