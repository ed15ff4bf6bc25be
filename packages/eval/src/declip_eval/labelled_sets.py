"""Labelled sets: pictures with classes or captions, as they lie about in the world.

Three forms are read, from this machine or any fsspec URL: CLIP_benchmark's webdatasets
(`tar_sets`), folders of one folder a class (`folder_sets`) and Hugging Face's parquet
(`parquet_sets`). A set is never read in part without a word: what is missing is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from declip_eval.content_hashes import HashFiles, hash_files
from declip_eval.folder_sets import read_bare_folders, read_folder_split
from declip_eval.parquet_sets import read_parquet_split
from declip_eval.set_checks import check_against
from declip_eval.set_files import DatasetError, MissingDatasetError, SetFolder
from declip_eval.set_parts import ClassNames, Kind, Layout, PicturePlaces, SplitParts
from declip_eval.set_texts import (
    CLASS_NAMES_FILE,
    TEMPLATES_FILE,
    load_class_names,
    load_templates,
    parse_class_names,
    parse_templates,
)
from declip_eval.tar_sets import read_tar_split
from declip_eval.tar_writer import write_webdataset

if TYPE_CHECKING:
    from declip_eval.dataset_table import DatasetInfo

__all__ = [
    "DatasetError",
    "LabelledSet",
    "MissingDatasetError",
    "check_against",
    "open_labelled_set",
    "write_webdataset",
]

NamesSource = Literal["file", "set", "table", "labels"]

_SPLITS = {"val": ("val", "validation", "valid"), "test": ("test",), "train": ("train",)}
"""Spellings of the usual splits."""


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """One split of a labelled set; it holds no picture, and can be sent to another process."""

    name: str
    """As it was asked for."""

    split: str
    """The split that was read, as its folder or files are called."""

    role: str
    """The split that was asked for: "test" even where the data call it val."""

    kind: Kind
    keys: list[str] = field(repr=False)
    """One a picture."""

    labels: NDArray[Any] | None = field(repr=False)
    """int64 (n,); bool (n, num_classes) for multilabel; None for retrieval."""

    captions: list[tuple[str, ...]] | None = field(repr=False)
    """Retrieval's captions, at least one a picture; else None."""

    class_names: ClassNames | None = field(repr=False)
    """The names for prompts, one entry a class, several names where it has synonyms: of the user's
    file, else of the set's own classnames.txt, else of the table, else the data's labels."""

    label_names: ClassNames | None = field(repr=False)
    """What the data itself calls its classes, in label order; None where it does not say."""

    names_source: NamesSource
    """Where `class_names` are from: file (the user's), set, table or labels."""

    templates: tuple[str, ...] = field(repr=False)
    """Prompt templates with {}, from the same places; empty where there are none."""

    layout: Layout
    places: PicturePlaces = field(repr=False)
    _digests: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    """The digest, once it is known."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_classes(self) -> int | None:
        """Classes of the labels: of the data's own names, else as many as the labels need."""
        if self.labels is None:
            return None
        if self.labels.ndim == 2:
            return int(self.labels.shape[1])
        if self.label_names is not None:
            return len(self.label_names)
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    def read_images(self, indices: Sequence[int]) -> list[bytes | str]:
        """Read encoded pictures.

        Args:
            indices: rows of `keys`, in any order.

        Returns:
            For each of them its bytes as they are stored, or a text that says why it cannot be
            read.
        """
        return self.places.read([int(index) for index in indices])

    def digest(self, hash_files: HashFiles = hash_files) -> str:
        """Return a sha256 (hex) of the data: it changes with any key, label or caption, with the
        place of any picture and with any byte of the files that the pictures are read from; not
        with the folder that the set lies in, and not with names and templates, which change no
        picture's feature. A picture that cannot be read stands there as such.

        The files are read through when this is called first; later calls tell the same.

        Args:
            hash_files: gives the files' hashes, such as from a record of those that were read
                before.
        """
        if not self._digests:
            digest = hashlib.sha256(_framed([self.kind, self.keys, self.captions]))
            if self.labels is not None:
                digest.update(f"{self.labels.shape}".encode())
                digest.update(self.labels.astype("<i8").tobytes())
            self.places.add_to(digest)
            digest.update(_framed(hash_files(self.places.files())))
            self._digests.append(digest.hexdigest())
        return self._digests[0]

    def prompts_digest(self) -> str:
        """Return a sha256 (hex) of the class names and templates."""
        return hashlib.sha256(_framed([self.class_names, self.templates])).hexdigest()


def _framed(values: Sequence[Any]) -> bytes:
    return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode()


def open_labelled_set(
    root: str,
    name: str,
    split: str = "test",
    *,
    info: DatasetInfo | None = None,
    class_names_file: str | None = None,
    templates_file: str | None = None,
    language: str = "en",
    cache: str | None = None,
) -> LabelledSet:
    """Find a labelled set and read everything of it but the pictures.

    Nothing is held against the table here: `check_against` does that.

    Args:
        root: the set's own folder, a folder of sets, or a pattern with {dataset} or
            {dataset_cleaned} (CLIP_benchmark's --dataset_root); a path or any fsspec URL.
        name: of the set, in any spelling that its folder may have; "wds/" in front is dropped.
        split: of the set. "val" is also found as "validation" or "valid", "test" as the split that
            `info` calls the test split ("val" of ImageNet).
        info: what the table knows of the set: other spellings, and names and templates where the
            data has none.
        class_names_file: names for prompts, instead of all others: one a line in label order, or
            CLIP_benchmark's JSON.
        templates_file: templates, as well.
        language: other than "en": names and templates are those of `LANGUAGE_classnames.txt` and
            `LANGUAGE_zeroshot_classification_templates.txt` beside the data, or of the files.
        cache: folder of this machine where tars and parquets of a remote set are kept.

    Raises:
        MissingDatasetError: there is no such set or no such split.
        DatasetError: it is there, but damaged, short or in no known form.
    """
    known = _spellings(name, info)
    splits = _split_spellings(split, info)
    looked: list[SetFolder] = []
    for folder, is_own in _folders(root, known, cache):
        parts = _read_split(folder, splits, info, is_own)
        if parts is not None:
            names, source = _class_names(folder, parts, known, info, class_names_file, language)
            templates = _templates(folder, parts, known, info, templates_file, language)
            return LabelledSet(
                name=name,
                split=parts.split,
                role=split,
                kind=parts.kind,
                keys=parts.keys,
                labels=parts.labels,
                captions=parts.captions,
                class_names=names,
                label_names=parts.label_names,
                names_source=source,
                templates=templates,
                layout=parts.layout,
                places=parts.places,
            )
        looked.append(folder)
    raise MissingDatasetError(_missing(name, split, splits, looked, info))


def _spellings(name: str, info: DatasetInfo | None) -> list[str]:
    """The names that the set's folder may have, likeliest first."""
    plain = name.removeprefix("wds/")
    names = [plain, *([info.name, *info.aliases] if info is not None else [])]
    names += [f"vtab/{each}" for each in names if "/" not in each]
    return list(dict.fromkeys(names))


def _split_spellings(split: str, info: DatasetInfo | None) -> list[str]:
    splits = [split, *_SPLITS.get(split, ())]
    if split == "test" and info is not None:
        # ImageNet is tested on what it calls val. Of other sets that would be other pictures, at
        # times as many (EuroSAT's and RESISC45's in VTAB's copies).
        splits += [info.test_split, *_SPLITS.get(info.test_split, ())]
    return list(dict.fromkeys(splits))


def _folders(
    root: str, known: Sequence[str], cache: str | None
) -> Iterator[tuple[SetFolder, bool]]:
    """The folders that may be the set's, named like it first, then the root itself; and of each
    whether it can be no other set's."""
    if "{dataset" in root:
        roots = [
            root.replace("{dataset_cleaned}", each.replace("/", "-")).replace("{dataset}", each)
            for each in known
        ]
    else:
        roots = [f"{root.rstrip('/')}/{each}" for each in _inside(SetFolder(root), known)] + [root]
    names = {_plain(each) for each in known}
    is_shared = "{dataset" not in root and _plain(root.rstrip("/").rpartition("/")[2]) not in names
    for each in dict.fromkeys(roots):
        yield SetFolder(each, cache), not (is_shared and each == root)


def _inside(root: SetFolder, known: Sequence[str]) -> list[str]:
    """The folders in `root` that have the set's name, written in any way."""
    if not root.is_listable:
        dashed = [each.replace("/", "-") for each in known]
        return list(dict.fromkeys([*known, *dashed, *(f"wds_{each}" for each in dashed)]))
    plain = {_plain(each) for each in known}
    plain |= {f"wds{each}" for each in plain}
    folders = root.names()[1]
    nested = [each for each in known if "/" in each and each.partition("/")[0] in folders]
    return [each for each in folders if _plain(each) in plain] + nested


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def _read_split(
    folder: SetFolder, splits: Sequence[str], info: DatasetInfo | None, is_own: bool
) -> SplitParts | None:
    for split in splits:
        parts = (
            read_tar_split(folder, split)
            or read_parquet_split(folder, split, info, is_own=is_own)
            or read_folder_split(folder, split, info)
        )
        if parts is not None:
            return parts
    return read_bare_folders(folder, info) if "test" in splits else None


def _class_names(
    folder: SetFolder,
    parts: SplitParts,
    known: Sequence[str],
    info: DatasetInfo | None,
    file: str | None,
    language: str,
) -> tuple[ClassNames | None, NamesSource]:
    """The names for prompts, by their order of precedence."""
    if parts.kind == "retrieval":
        return None, "labels"
    if file is not None:
        return load_class_names(file, known), "file"
    beside = CLASS_NAMES_FILE if language == "en" else f"{language}_{CLASS_NAMES_FILE}"
    text = folder.read_text(beside)
    if text is None and language != "en":
        raise DatasetError(_no_language(folder, beside, language))
    if info is not None and info.candidates is not None:
        # Such a set is asked with the classes of another one, which only the table has.
        return info.class_names, "table"
    if text is not None:
        return parse_class_names(text.splitlines(), folder.shown(beside)), "set"
    if info is not None and info.class_names:
        return info.class_names, "table"
    return parts.label_names, "labels"


def _templates(
    folder: SetFolder,
    parts: SplitParts,
    known: Sequence[str],
    info: DatasetInfo | None,
    file: str | None,
    language: str,
) -> tuple[str, ...]:
    """The templates, by the same order of precedence."""
    if parts.kind == "retrieval":
        return ()
    if file is not None:
        return load_templates(file, known)
    beside = TEMPLATES_FILE if language == "en" else f"{language}_{TEMPLATES_FILE}"
    text = folder.read_text(beside)
    if text is not None:
        return parse_templates(text.splitlines(), folder.shown(beside))
    if language != "en":
        raise DatasetError(_no_language(folder, beside, language))
    return info.templates if info is not None else ()


def _no_language(folder: SetFolder, file: str, language: str) -> str:
    return (
        f"language is {language!r}, but {folder.shown(file)} is not there: write it, or give the "
        "class names and templates as files."
    )


def _missing(
    name: str,
    split: str,
    splits: Sequence[str],
    looked: Sequence[SetFolder],
    info: DatasetInfo | None,
) -> str:
    places = ", ".join(folder.root for folder in looked[:6])
    places += f" and {len(looked) - 6} more" if len(looked) > 6 else ""
    how = (
        info.how_to_get
        if info is not None
        else "The table does not know it: put its folder there, with nshards.txt and tars, with "
        "one folder a class, or with parquet files."
    )
    if not all(folder.is_listable for folder in looked):
        how += (
            " A web server shows no list of its files, so that of sets behind one only webdatasets "
            "are found."
        )
    tried = " or ".join(repr(each) for each in splits)
    return (
        f"The dataset {name!r} has no split {split!r} here: looked for {tried} in {places}. {how}"
    )
