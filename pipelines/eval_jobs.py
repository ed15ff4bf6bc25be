"""The datasets that an evaluation was asked for, and the splits of each."""

import os
from dataclasses import dataclass

import fsspec

from declip_eval.dataset_table import DatasetInfo, expand_names, find_dataset
from declip_shards import DeclipError
from pipelines.eval_lists import lines_of, one_a_dataset
from pipelines.eval_options import EvalOptions


@dataclass(frozen=True, kw_only=True)
class Job:
    """A dataset to evaluate on, and how."""

    dataset: str
    info: DatasetInfo | None
    language: str
    train_split: str
    val_split: str | None
    val_proportion: float


def plan_jobs(options: EvalOptions) -> list[Job]:
    """The datasets, with suites and files taken apart, in every language.

    Raises:
        DeclipError: a name that is neither in the table nor a folder, or options for another
            number of datasets.
    """
    names = dataset_names(options)
    splits = one_a_dataset(options.train_split, len(names), "--train-split")
    val_splits = one_a_dataset(options.val_split, len(names), "--val-split")
    shares = one_a_dataset(options.val_proportion, len(names), "--val-proportion")
    return [
        Job(
            dataset=name,
            info=find_dataset(name),
            language=language,
            train_split=split or "train",
            val_split=val_split,
            val_proportion=share or 0.2,
        )
        for name, split, val_split, share in zip(names, splits, val_splits, shares, strict=True)
        for language in options.language
    ]


def dataset_names(options: EvalOptions) -> list[str]:
    """Names of the datasets, each once; those that the table does not know must be folders."""
    given: list[str] = []
    for word in options.datasets:
        given += lines_of(word, "--dataset") if os.path.isfile(word) else [word]
    names: dict[str, None] = {}
    for word in given:
        try:
            names.update(dict.fromkeys(expand_names([word])))
        except ValueError as error:
            if not is_folder(options.dataset_root, word):
                raise DeclipError(
                    f"--dataset: {error} A set of your own needs a folder of its name under "
                    f"--dataset-root {options.dataset_root!r}."
                ) from error
            names[word.removeprefix("wds/")] = None
    return list(names)


def is_folder(root: str, name: str) -> bool:
    """Whether a dataset's folder is there, by the same patterns as for reading it."""
    plain = name.removeprefix("wds/")
    base = root.rstrip("/")
    places = [f"{base}/{plain}", f"{base}/wds_{plain}"]
    if plain in base.split("/")[-2:]:
        places.append(base)  # Its own folder, or that of one of its configurations.
    if "{dataset" in root:
        filled = root.replace("{dataset_cleaned}", plain.replace("/", "-"))
        places = [filled.replace("{dataset}", plain)]
    try:
        fs, _ = fsspec.core.url_to_fs(base)
        return any(fs.isdir(fsspec.core.url_to_fs(place)[1]) for place in places)
    except (OSError, ValueError, ImportError):
        return False
