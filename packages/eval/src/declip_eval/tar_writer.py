"""Writing CLIP_benchmark's webdatasets; `tar_sets` reads them back."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from declip_eval.set_files import DatasetError
from declip_eval.set_parts import ClassNames, Kind
from declip_eval.set_texts import (
    CLASS_NAMES_FILE,
    TEMPLATES_FILE,
    class_name_lines,
    parse_class_names,
    parse_templates,
)
from declip_eval.tar_sets import NSHARDS_FILE, TYPE_FILE

__all__ = ["write_webdataset"]

_FIRST_BYTES = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))


def write_webdataset(
    folder: str | Path,
    items: Iterable[tuple[str, bytes, Any]],
    *,
    class_names: Sequence[str | tuple[str, ...]] | None = None,
    templates: Sequence[str] = (),
    split: str = "test",
    kind: Kind = "classification",
    shard_size: int = 10_000,
) -> int:
    """Write one split of a labelled set in CLIP_benchmark's form, the same bytes each time.

    Args:
        folder: of the set, on this machine. An earlier copy of the split is replaced; nshards.txt
            is written last, so that an interrupted copy is refused by `read_tar_split`.
        items: (key, picture, label): a key without dots, slashes and line breaks; the bytes of a
            JPEG, PNG or WebP; the class number, for multilabel one 0 or 1 a class, for retrieval
            the captions.
        class_names: in label order, synonyms as one tuple; they are the set's, for all splits.
        templates: with {} for the class name.
        split: of the set.
        kind: of the labels.
        shard_size: most pictures a tar.

    Returns:
        How many pictures were written.

    Raises:
        DatasetError: a key, picture or label that the form cannot hold.
        OSError: the folder cannot be written.
    """
    if shard_size < 1:
        raise DatasetError(f"shard_size is {shard_size}, but a tar holds at least 1 picture.")
    names: ClassNames = tuple(
        (name,) if isinstance(name, str) else tuple(name) for name in class_names or ()
    )
    _check_texts(names, templates)
    place = Path(folder) / split
    place.mkdir(parents=True, exist_ok=True)
    (place / NSHARDS_FILE).unlink(missing_ok=True)
    for old in place.glob("*.tar"):
        if old.stem.isdigit():
            old.unlink()
    _write_texts(Path(folder), names, templates, kind)
    rows = _members(items, kind, names)
    num_items, num_shards = 0, 0
    while members := list(islice(rows, shard_size)):
        with tarfile.open(place / f"{num_shards}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for pair in members:
                for file, data in pair:
                    member = tarfile.TarInfo(file)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        num_items += len(members)
        num_shards += 1
    if not num_shards:
        raise DatasetError("There is no item, but a labelled set holds at least 1 picture.")
    (place / NSHARDS_FILE).write_text(f"{num_shards}\n")
    return num_items


def _check_texts(names: ClassNames, templates: Sequence[str]) -> None:
    if names and parse_class_names(class_name_lines(names).splitlines(), "class_names") != names:
        raise DatasetError(
            "class_names has a name with a line break, with spaces around it or with ' | ' in it: "
            "write each name as one line, and synonyms as a tuple."
        )
    if templates:
        parse_templates(list(templates), "templates")


def _write_texts(folder: Path, names: ClassNames, templates: Sequence[str], kind: Kind) -> None:
    for file, text in (
        (CLASS_NAMES_FILE, class_name_lines(names)),
        (TEMPLATES_FILE, "".join(line.replace("{}", "{c}") + "\n" for line in templates)),
        (TYPE_FILE, "" if kind == "classification" else f"{kind}\n"),
    ):
        if text:
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
        elif file == TYPE_FILE:
            # CLIP_benchmark has none for classification; one of an earlier copy would mislead.
            (folder / file).unlink(missing_ok=True)


def _members(
    items: Iterable[tuple[str, bytes, Any]], kind: Kind, names: ClassNames
) -> Iterator[tuple[tuple[str, bytes], tuple[str, bytes]]]:
    """The two members of each item, after the rules of the form."""
    seen: set[str] = set()
    for key, picture, label in items:
        if not key or re.search(r"[./\\\s]", key):
            raise DatasetError(
                f"The key {key!r} cannot be a name in a webdataset: leave out dots, slashes and "
                "spaces."
            )
        if key in seen:
            raise DatasetError(f"The key {key!r} occurs twice: give each picture its own.")
        seen.add(key)
        extension = _extension(key, picture)
        yield (f"{key}.{extension}", picture), _label_member(key, label, kind, names)


def _extension(key: str, picture: bytes) -> str:
    for start, extension in _FIRST_BYTES:
        if picture.startswith(start):
            return extension
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return "webp"
    raise DatasetError(
        f"The picture {key!r} is no JPEG, PNG or WebP (it begins with {picture[:8]!r}): encode it "
        "as one of them."
    )


def _label_member(key: str, label: Any, kind: Kind, names: ClassNames) -> tuple[str, bytes]:
    if kind == "retrieval":
        return f"{key}.txt", _caption_lines(key, label)
    if kind == "classification":
        number = int(label)
        if number < 0 or (names and number >= len(names)):
            raise DatasetError(
                f"The label of {key!r} is {number}, but labels are 0 to {len(names) - 1}."
                if names
                else f"The label of {key!r} is {number}, but class numbers start at 0."
            )
        return f"{key}.cls", str(number).encode()
    vector = np.asarray(label)
    if (
        vector.ndim != 1
        or not np.isin(vector, (0, 1)).all()
        or len(vector) != (len(names) or len(vector))
    ):
        raise DatasetError(
            f"The label of {key!r} has shape {vector.shape}, but a multilabel one is a 0 or 1 for "
            f"each of the {len(names) or 'set'!s} classes."
        )
    buffer = io.BytesIO()
    np.save(buffer, vector.astype(np.int64), allow_pickle=False)
    return f"{key}.npy", buffer.getvalue()


def _caption_lines(key: str, captions: Any) -> bytes:
    lines = [captions] if isinstance(captions, str) else list(captions)
    for line in lines:
        if not line.strip() or line.splitlines() != [line]:
            raise DatasetError(
                f"A caption of {key!r} is empty or has a line break ({line[:40]!r}): write each "
                "caption as one line."
            )
    if not lines:
        raise DatasetError(f"{key!r} has no caption: a retrieval set has at least one a picture.")
    return "\n".join(lines).encode()
