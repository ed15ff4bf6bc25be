"""The datasets of the published protocols: names, prompts, sizes, metrics, where to get them.

All of it stands in data files that a person can read and change: `tables/datasets.csv` (a row per
dataset), `tables/suites.csv`, and lists: names for prompts (`class_names`), what copies of the data
call their classes (`label_names`), prompts, and which of ImageNet's classes its variants hold
(`imagenet_subsets`). `tables/README.md` says where each is from.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, cast, get_args

Kind = Literal["classification", "multilabel", "retrieval"]
Metric = Literal[
    "acc1",
    "mean_per_class_recall",
    "mean_average_precision_11",
    "roc_auc",
    "mean_acc1_acc5",
    "image_retrieval_recall@1",
]

TABLES = Path(__file__).parent / "tables"
"""Folder of the data files."""

_PREFIXES = ("clip-benchmark/", "wds/", "wds_", "vtab/", "vtab-", "tfds/")
_SYNONYMS = " | "
_VALIDATION = ("val", "valid", "validation")
_IS_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of one dataset before any of its files are read."""

    name: str
    """CLIP_benchmark's name, such as imagenet1k."""

    title: str
    """The name that papers print, such as Oxford-IIIT Pets."""

    kind: Kind
    """One label per image, several, or captions instead of labels."""

    num_classes: int | None
    """Classes; None for retrieval."""

    num_train: int | None
    """Training images of the protocol, those for validation included; None where there are none."""

    num_val: int | None
    """How many of `num_train` are the dataset's own validation split; None where it has none."""

    num_test: int
    """Test images of the protocol."""

    also_num_train: tuple[int, ...] = ()
    """Other sizes of the training split in copies that go around; the notes say which is which."""

    also_num_test: tuple[int, ...] = ()
    """The same of the test split."""

    metric: Metric
    """The number that papers print."""

    class_names: tuple[tuple[str, ...], ...] = ()
    """Names for prompts, in the order of the labels (where `candidates` is given: of its rows);
    synonyms stand in one tuple, usually there is one. Empty for retrieval, and where no list could
    be had: then the data must bring a classnames.txt."""

    label_names: tuple[tuple[str, ...], ...] = ()
    """What copies of the dataset call each class (folder names, WordNet ids, indices), in the
    order of the labels, with other spellings; empty where these are the class names themselves,
    but for signs and capitals."""

    templates: tuple[str, ...] = ()
    """Prompts, each with one {} for the class name; empty for retrieval."""

    candidates: tuple[tuple[int, ...], ...] | None = None
    """Per class of the dataset, the rows of `class_names` that count as right (a class of
    ObjectNet is one to three of ImageNet's); only these rows compete. None: class i is row i."""

    imagenet_rows: tuple[int, ...] | None = None
    """For a part of ImageNet: which of the 1,000 classes each row of `class_names` is."""

    test_split: str
    """What the publishers call the split that is evaluated; "test" is understood as well."""

    how_to_get: str
    """Where the data is from and in which form it is read, in words."""

    license: str
    """Terms of the images, as far as their publishers state them."""

    notes: str = ""
    """Quirks of the counts and lists."""

    aliases: tuple[str, ...] = ()
    """Other spellings that are understood."""

    def is_tested(self, split: str) -> bool:
        """Whether the protocol tests on a split of this name: "test" always, and `test_split`, in
        any spelling of "val" where it is that."""
        names = _VALIDATION if self.test_split in _VALIDATION else (self.test_split,)
        return split == "test" or split in names

    def known_sizes(self, split: str) -> tuple[int, ...]:
        """Numbers of images that a whole copy of a split may have, the protocol's first.

        Args:
            split: test (or `test_split`), train (with or without the validation images), trainval,
                or val; valid and validation mean val.

        Returns:
            The sizes; empty where the table does not know, or for any other split.
        """
        if self.is_tested(split):
            return _distinct(self.num_test, *self.also_num_test)
        if split == "train" and self.num_train is not None:
            rest = None if self.num_val is None else self.num_train - self.num_val
            return _distinct(self.num_train, rest, *self.also_num_train)
        if split == "trainval":
            return _distinct(self.num_train)
        if split in _VALIDATION:
            return _distinct(self.num_val)
        return ()


def list_datasets() -> tuple[str, ...]:
    """Names of all datasets, in the table's order."""
    return tuple(_rows())


def find_dataset(name: str) -> DatasetInfo | None:
    """Look a dataset up by its name or an alias; None where the table does not know it.

    Capital letters, hyphens and underscores make no difference, and prefixes of CLIP_benchmark
    (wds/, wds/vtab/, vtab/, tfds/) are taken off.
    """
    key = _alias_index().get(_normalize(name))
    return None if key is None else _load(key)


def list_suites() -> tuple[str, ...]:
    """Names of the suites, in the table's order."""
    return tuple(_suites())


def get_suite(name: str) -> tuple[str, ...]:
    """Names of the datasets of a suite, in its order.

    Raises:
        ValueError: no such suite; the nearest name is offered.
    """
    suites = _suites()
    if name not in suites:
        known = {_normalize(suite): suite for suite in suites}
        raise ValueError(f"There is no suite {name!r}: {_hint(name, known)}")
    return suites[name]


def expand_names(names: Sequence[str]) -> list[str]:
    """Replace suites and aliases by the names of their datasets, each once, in order.

    Args:
        names: names, aliases and suites; one text may hold several, separated by commas.

    Raises:
        ValueError: none given, or an unknown one; the nearest known name is offered.
    """
    if isinstance(names, str):
        names = [names]
    wanted = [part.strip() for text in names for part in text.split(",") if part.strip()]
    if not wanted:
        raise ValueError(
            "No dataset is named: give names such as cifar10, or a suite such as "
            f"{', '.join(_suites())}."
        )
    found: dict[str, None] = {}
    for name in wanted:
        if name in _suites():
            found.update(dict.fromkeys(get_suite(name)))
            continue
        key = _alias_index().get(_normalize(name))
        if key is None:
            known = _alias_index() | {_normalize(suite): suite for suite in _suites()}
            raise ValueError(f"There is no dataset or suite {name!r}: {_hint(name, known)}")
        found[key] = None
    return list(found)


def metric_value(info: DatasetInfo, metrics: Mapping[str, float]) -> float | None:
    """The number that papers print for this dataset, out of what a result holds.

    Args:
        info: the dataset.
        metrics: metric name -> value, as in a result file; a linear probe's `lp_` is understood.

    Returns:
        The value, or None where the result does not hold it. The mean of top-1 and top-5 is taken
        from the two where it is not there itself.
    """
    for prefix in ("", "lp_"):
        if prefix + info.metric in metrics:
            return float(metrics[prefix + info.metric])
        parts = [metrics.get(f"{prefix}acc{k}") for k in (1, 5)]
        if info.metric == "mean_acc1_acc5" and parts[0] is not None and parts[1] is not None:
            return (float(parts[0]) + float(parts[1])) / 2
    return None


def _distinct(*sizes: int | None) -> tuple[int, ...]:
    """The known ones of `sizes`, each once, in order."""
    return tuple(dict.fromkeys(size for size in sizes if size is not None))


def _hint(name: str, known: Mapping[str, object]) -> str:
    """The nearest of `known` (spelling -> what it stands for), or all names."""
    near = get_close_matches(_normalize(name), known, n=1)
    if near:
        return f"did you mean {known[near[0]]!r}?"
    return f"known are {', '.join([*_rows(), *_suites()])}."


def _normalize(name: str) -> str:
    """One spelling for names that differ in capitals, hyphens, underscores and prefixes."""
    text = name.strip().lower()
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix)
    return re.sub(r"[\s_\-]+", "", text)


@functools.cache
def _rows() -> dict[str, dict[str, str]]:
    """datasets.csv: name -> row."""
    with (TABLES / "datasets.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@functools.cache
def _suites() -> dict[str, tuple[str, ...]]:
    """suites.csv: suite -> names; and `all`."""
    with (TABLES / "suites.csv").open(encoding="utf-8", newline="") as file:
        suites = {row["suite"]: tuple(row["datasets"].split()) for row in csv.DictReader(file)}
    return {**suites, "all": tuple(_rows())}


@functools.cache
def _alias_index() -> dict[str, str]:
    """Normalized name or alias -> name."""
    index: dict[str, str] = {}
    for name, row in _rows().items():
        for alias in (name, *_split(row["aliases"])):
            other = index.setdefault(_normalize(alias), name)
            if other != name:
                raise ValueError(
                    f"datasets.csv gives the name {alias!r} to both {other} and {name}: "
                    "an alias must mean one dataset."
                )
    return index


@functools.cache
def _load(name: str) -> DatasetInfo:
    """Build the entry of one row with its lists."""
    row = _rows()[name]
    for column, choices in (("kind", Kind), ("metric", Metric)):
        if row[column] not in get_args(choices):
            raise ValueError(
                f"datasets.csv, {name}: {column} is {row[column]!r}, but must be one of "
                f"{', '.join(get_args(choices))}."
            )
    names = _read_names("class_names", row["class_names"])
    labels = _read_names("label_names", row["label_names"])
    rows, candidates = None, None
    if row["imagenet_subset"]:
        rows, candidates = _read_subset(row["imagenet_subset"])
        names = tuple(names[number] for number in rows)
        if candidates is None:
            labels = tuple(labels[number] for number in rows)
    info = DatasetInfo(
        name=name,
        title=row["title"],
        kind=cast(Kind, row["kind"]),
        num_classes=_number(row["num_classes"]),
        num_train=_number(row["num_train"]),
        num_val=_number(row["num_val"]),
        num_test=int(row["num_test"]),
        also_num_train=tuple(int(text) for text in _split(row["also_num_train"])),
        also_num_test=tuple(int(text) for text in _split(row["also_num_test"])),
        metric=cast(Metric, row["metric"]),
        class_names=names,
        label_names=labels,
        templates=tuple(_read_list("prompts", row["prompts"])),
        candidates=candidates,
        imagenet_rows=rows,
        test_split=row["test_split"],
        how_to_get=row["how_to_get"],
        license=row["license"],
        notes=row["notes"],
        aliases=tuple(_split(row["aliases"])),
    )
    _check(info)
    return info


def _check(info: DatasetInfo) -> None:
    """Refuse a row whose lists do not fit its counts."""
    lists = {
        "names of classes": len(info.candidates or info.class_names),
        "labels": len(info.label_names),
    }
    for what, count in lists.items():
        if count not in (0, info.num_classes):
            raise ValueError(
                f"datasets.csv, {info.name}: num_classes is {info.num_classes}, but its list has "
                f"{count} {what}: correct the one that is wrong."
            )
    for template in info.templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"prompts of {info.name}: {template!r} needs exactly one {{}} for the class name."
            )


def _read_list(folder: str, name: str) -> list[str]:
    """Lines of tables/FOLDER/NAME.txt; nothing for no name. Spaces within a line are kept."""
    if not name:
        return []
    text = (TABLES / folder / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line]


def _read_names(folder: str, name: str) -> tuple[tuple[str, ...], ...]:
    """A list of names with synonyms, or numbers such as 0-999 or 00000-00042."""
    numbers = _IS_RANGE.fullmatch(name)
    if numbers:
        first, last = numbers.groups()
        width = len(first)
        return tuple((f"{number:0{width}d}",) for number in range(int(first), int(last) + 1))
    return tuple(tuple(line.split(_SYNONYMS)) for line in _read_list(folder, name))


def _read_subset(
    name: str,
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...] | None]:
    """ImageNet's rows that compete, and per class which of these count (None: one each)."""
    groups = [
        tuple(int(text) for text in line.split()) for line in _read_list("imagenet_subsets", name)
    ]
    rows = tuple(sorted({number for group in groups for number in group}))
    if all(len(group) == 1 for group in groups):
        return tuple(group[0] for group in groups), None
    place = {number: position for position, number in enumerate(rows)}
    return rows, tuple(tuple(place[number] for number in group) for group in groups)


def _split(text: str) -> list[str]:
    """Items separated by spaces in one cell of the table."""
    return text.split()


def _number(text: str) -> int | None:
    """A count, or None for an empty cell."""
    return int(text) if text else None
