"""What options name one by one, in pairs or in files: models, datasets, values for datasets."""

import os
from collections.abc import Sequence
from itertools import product
from typing import TypeVar

from declip_shards import DeclipError

T = TypeVar("T")


def model_specs(
    models: Sequence[str] | None,
    pretrained: Sequence[str] | None,
    pairs: Sequence[str] | None,
) -> tuple[str, ...]:
    """Specifications of the models, each once, in the order given.

    Args:
        models: ``--model``.
        pretrained: ``--pretrained``; each is combined with each model, as CLIP_benchmark does.
        pairs: ``--pretrained_model``: ``MODEL,PRETRAINED`` or files with one a line; a line without
            a comma is a specification of its own.

    Raises:
        DeclipError: nothing is given, or too much, or a file is empty.
    """
    if pairs:
        if models or pretrained:
            raise DeclipError(
                "--pretrained-model takes the place of --model and --pretrained; leave those out."
            )
        lines: list[str] = []
        for pair in pairs:
            lines += lines_of(pair, "--pretrained-model") if os.path.isfile(pair) else [pair]
        return tuple(dict.fromkeys(_spec_of_pair(line) for line in lines))
    if not models:
        raise DeclipError(
            "there is no model to evaluate: give --model FOLDER, or "
            "--model open_clip:MODEL/PRETRAINED."
        )
    if not pretrained:
        return tuple(dict.fromkeys(models))
    complete = [name for name in models if name.startswith("open_clip:") or os.path.isdir(name)]
    if complete:
        raise DeclipError(
            f"--model {complete[0]!r} has its weights already; leave out --pretrained "
            f"{' '.join(pretrained)}."
        )
    return tuple(
        dict.fromkeys(
            f"open_clip:{name}/{weights}" for name, weights in product(models, pretrained)
        )
    )


def _spec_of_pair(line: str) -> str:
    name, comma, weights = (part.strip() for part in line.partition(","))
    if comma and not (name and weights):
        raise DeclipError(f"--pretrained-model has {line!r}; write it MODEL,PRETRAINED.")
    return f"open_clip:{name}/{weights}" if comma else name


def lines_of(path: str, option: str) -> list[str]:
    """The lines of a list; empty ones and those that begin with # are left out.

    Raises:
        DeclipError: the file holds none, or no UTF-8 text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise DeclipError(f"{option} {path!r} is no text in UTF-8 ({error}).") from error
    lines = [line for line in found if line and not line.startswith("#")]
    if not lines:
        raise DeclipError(f"{option} {path!r} is an empty list; write one name a line.")
    return lines


def one_a_dataset(values: Sequence[T], num_datasets: int, option: str) -> list[T | None]:
    """A value for each dataset: one for all, or as many as there are; None where none is given.

    Raises:
        DeclipError: another number of values.
    """
    if len(values) in (0, 1):
        return [values[0] if values else None] * num_datasets
    if len(values) != num_datasets:
        raise DeclipError(
            f"{option} has {len(values)} values for {num_datasets} datasets; give one for all, or "
            "one for each."
        )
    return list(values)
