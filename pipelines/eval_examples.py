"""Examples of an evaluation: a few pictures with what the model answered, in one small file.

A result's page should show what the numbers mean without the dataset at hand, so the engine keeps
some pictures, scaled down, beside each result: wrong and right answers, and retrieval's findings.
Which ones is drawn by a seed from all of them, never by how they look.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from declip_shards import DeclipError
from declip_shards.store import atomic_write

if TYPE_CHECKING:
    from declip_eval.outcomes import Outcomes

PICTURE_SIDE = 96
"""Longest side of a kept picture, in pixels."""
JPEG_QUALITY = 80
MAX_EXAMPLES = 1_000
"""Of one result; every picture stands in a page once more."""
MAX_FOUND = 5
"""Answers kept of each example."""
MAX_TEXT = 500
"""Characters kept of a caption."""

Role = Literal["error", "right", "retrieval"]

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("role", pa.string()),
        ("text", pa.string()),
        ("image", pa.binary()),
        ("note", pa.string()),
        ("found", pa.list_(pa.string())),
        ("found_images", pa.list_(pa.binary())),
        ("found_right", pa.list_(pa.bool_())),
        ("scores", pa.list_(pa.float32())),
    ]
)


class PictureSet(Protocol):
    """What is read of a `declip_eval.labelled_sets.LabelledSet`."""

    @property
    def keys(self) -> Sequence[str]:
        """Of the samples, in order."""
        ...

    @property
    def captions(self) -> Sequence[Sequence[str]] | None:
        """Of each sample, where the set has them."""
        ...

    def read_images(self, indices: Sequence[int]) -> Sequence[bytes | str]:
        """Encoded pictures; for one that cannot be read, why, as text."""
        ...


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample, or query, and what the model answered."""

    key: str
    """Of the sample; of a caption that was asked for, the key of its picture."""
    role: Role
    """`error` and `right` for classification, `retrieval` for a query."""
    text: str
    """The true classes, or the caption that was asked for; empty where a picture was."""
    image: bytes | None
    """JPEG of at most `PICTURE_SIDE` pixels a side; None for a caption's query."""
    note: str = ""
    """Why there is no picture where one belongs."""
    found: tuple[str, ...] = ()
    """Class names or captions, or keys of pictures, best first."""
    found_images: tuple[bytes | None, ...] = ()
    """Pictures that a caption found; empty for everything else."""
    found_right: tuple[bool, ...] = ()
    """Whether each answer is right."""
    scores: tuple[float, ...] = ()
    """Of each answer."""


def examples_path(result: str | Path) -> Path:
    """The file of examples beside a result's JSON: `<stem>.examples.parquet`."""
    path = Path(result)
    name = path.name.removesuffix(".json")
    return path.with_name(f"{name.removesuffix('.examples.parquet')}.examples.parquet")


def save_examples(
    path: str | Path,
    samples: PictureSet,
    outcomes: Outcomes,
    class_names: Sequence[str | Sequence[str]] | None,
    *,
    most: int = 48,
    seed: int = 0,
    candidates: Sequence[Sequence[int]] | None = None,
) -> Path:
    """Write a few examples of a result beside it; equal arguments give equal bytes.

    Args:
        path: of the result's JSON, or of the file itself.
        samples: the labeled set that was evaluated.
        outcomes: what the model answered to each of its samples.
        class_names: for each class its name, or its synonyms, of which the first is shown; None
            for retrieval.
        most: examples kept; half are wrong and half are right answers where there are as many,
            of retrieval half are captions' queries and half pictures'.
        seed: of the drawing.
        candidates: for each class of the set the rows of `class_names` that count as right, where
            those are other classes (ObjectNet's are ImageNet's); None: class i is row i.

    Returns:
        The file that was written, at once or not at all.

    Raises:
        DeclipError: `most` or `seed` out of range, or a sample of the outcomes that is not in the
            set.
    """
    if not 0 <= most <= MAX_EXAMPLES:
        raise DeclipError(
            f"most is {most}; it must lie between 0 and {MAX_EXAMPLES:,}: every example's picture "
            "is kept."
        )
    if seed < 0:
        raise DeclipError(f"seed is {seed}; it must be 0 or more.")
    names = [name if isinstance(name, str) else name[0] for name in class_names or ()]
    if outcomes.kind == "retrieval":
        examples = _retrieval_examples(samples, outcomes, most, seed)
    else:
        examples = _class_examples(samples, _Answers(outcomes, candidates), names, most, seed)
    target = examples_path(path)
    _write(target, examples)
    return target


def read_examples(path: str | Path) -> list[Example]:
    """Read what `save_examples` wrote; an empty list where there is no such file.

    Raises:
        DeclipError: the file is damaged or something else.
    """
    target = examples_path(path)
    if not target.exists():
        return []
    try:
        table = pq.read_table(target, schema=_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise DeclipError(
            f"{str(target)!r} holds no examples of a result ({error}); delete it, or evaluate "
            "again with --overwrite."
        ) from error
    tuples = ("found", "found_images", "found_right", "scores")
    rows: list[dict[str, Any]] = table.to_pylist()
    return [Example(**(row | {name: tuple(row[name] or ()) for name in tuples})) for row in rows]


def _write(path: Path, examples: Sequence[Example]) -> None:
    rows = [{name: getattr(example, name) for name in _SCHEMA.names} for example in examples]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file, compression="zstd")
    atomic_write(path, file.getvalue())


def _class_examples(
    samples: PictureSet, answers: _Answers, names: Sequence[str], most: int, seed: int
) -> list[Example]:
    """Wrong answers, then right ones."""
    outcomes = answers.outcomes
    is_right = answers.is_right()
    half = most // 2 + most % 2
    rng = np.random.default_rng(seed)
    wrong, right = (
        [int(row) for row in rng.permutation(np.flatnonzero(rows))]
        for rows in (~is_right, is_right)
    )
    num_wrong = min(len(wrong), max(half, most - len(right)))
    chosen = wrong[:num_wrong] + right[: most - num_wrong]
    pictures = _pictures(samples, [outcomes.keys[row] for row in chosen])

    def name(label: int) -> str:
        return names[label] if 0 <= label < len(names) else f"class {label}"

    examples = []
    for row in chosen:
        key, labels = outcomes.keys[row], answers.labels(row)
        found, scores = answers.best(row)
        image, note = pictures[key]
        examples.append(
            Example(
                key=key,
                role="right" if is_right[row] else "error",
                text=", ".join(name(label) for label in labels) or "none of the classes",
                image=image,
                note=note,
                found=tuple(name(label) for label in found),
                found_right=tuple(label in labels for label in found),
                scores=scores,
            )
        )
    return examples


class _Answers:
    """What classification's outcomes say of a row, whichever their kind."""

    def __init__(self, outcomes: Outcomes, candidates: Sequence[Sequence[int]] | None) -> None:
        self.outcomes, self.candidates = outcomes, candidates
        self.columns = outcomes.columns
        self.is_multilabel = "labels" in outcomes.columns

    def labels(self, row: int) -> list[int]:
        """The classes that are right."""
        if self.is_multilabel:
            return [int(label) for label in np.flatnonzero(self.columns["labels"][row])]
        label = int(self.columns["label"][row])
        return [label] if self.candidates is None else [int(i) for i in self.candidates[label]]

    def best(self, row: int) -> tuple[list[int], tuple[float, ...]]:
        """Classes and their scores, best first."""
        scores = np.asarray(self.columns["scores"][row], dtype=np.float64)
        if self.is_multilabel:
            order = np.argsort(-scores, kind="stable")[:MAX_FOUND]
            return [int(label) for label in order], tuple(float(scores[i]) for i in order)
        # Rows with fewer answers are padded with -1.
        found = [int(label) for label in self.columns["predicted"][row] if label >= 0]
        found = found[:MAX_FOUND]
        return found, tuple(float(score) for score in scores[: len(found)])

    def is_right(self) -> npt.NDArray[np.bool_]:
        """Whether no wrong class scores as high as a right one, for each row."""
        if not self.is_multilabel:
            is_first: npt.NDArray[np.bool_] = np.equal(self.columns["rank"], 0)
            return is_first
        labels, scores = self.columns["labels"], self.columns["scores"]
        right = np.where(labels, scores, -np.inf).max(axis=1)
        wrong = np.where(labels, -np.inf, scores).max(axis=1)
        is_above: npt.NDArray[np.bool_] = right > wrong
        return is_above


def _retrieval_examples(
    samples: PictureSet, outcomes: Outcomes, most: int, seed: int
) -> list[Example]:
    """Queries of captions, then of pictures."""
    direction = np.asarray(outcomes.columns["direction"])
    rng = np.random.default_rng(seed)
    of_texts, of_images = (
        [int(row) for row in rng.permutation(np.flatnonzero(direction == way))]
        for way in ("image", "text")
    )
    half = most // 2 + most % 2
    num_texts = min(len(of_texts), max(half, most - len(of_images)))
    of_texts, of_images = of_texts[:num_texts], of_images[: most - num_texts]
    captions = _Captions(samples)
    # Rows with fewer answers are padded with empty texts.
    best = {
        row: [str(name) for name in outcomes.columns["best"][row] if name][:MAX_FOUND]
        for row in (*of_texts, *of_images)
    }
    keys = [key for row in of_texts for key in best[row]]
    pictures = _pictures(samples, [*keys, *(outcomes.keys[row] for row in of_images)])
    examples = []
    for row in of_texts:
        query = outcomes.keys[row]
        found = best[row]
        text = captions.text(query)
        examples.append(
            Example(
                key=query,
                role="retrieval",
                text=text,
                image=None,
                found=tuple(found),
                found_images=tuple(pictures[key][0] for key in found),
                found_right=tuple(captions.belong(text, key) for key in found),
                scores=_scores(outcomes, row, len(found)),
            )
        )
    for row in of_images:
        key = outcomes.keys[row]
        texts = [captions.text(found) for found in best[row]]
        examples.append(
            Example(
                key=key,
                role="retrieval",
                text="",
                image=pictures[key][0],
                note=pictures[key][1],
                found=tuple(texts),
                found_right=tuple(captions.belong(text, key) for text in texts),
                scores=_scores(outcomes, row, len(texts)),
            )
        )
    return examples


def _scores(outcomes: Outcomes, row: int, length: int) -> tuple[float, ...]:
    return tuple(float(score) for score in outcomes.columns["scores"][row][:length])


class _Captions:
    """Captions by the names that outcomes give them: `KEY#NUMBER`, or the caption itself."""

    def __init__(self, samples: PictureSet) -> None:
        captions: Sequence[Sequence[str]] = samples.captions or [()] * len(samples.keys)
        self.of_key = dict(zip(samples.keys, captions, strict=True))

    def text(self, name: str) -> str:
        """The caption that is meant, cut to `MAX_TEXT` characters."""
        key, _, number = name.rpartition("#")
        of_key = self.of_key.get(key, ())
        if number.isdecimal() and int(number) < len(of_key):
            return of_key[int(number)][:MAX_TEXT]
        return name[:MAX_TEXT]

    def belong(self, text: str, key: str) -> bool:
        """Whether this is a caption of that picture; equal captions count as one."""
        return any(caption[:MAX_TEXT] == text for caption in self.of_key.get(key, ()))


def _pictures(samples: PictureSet, keys: Sequence[str]) -> dict[str, tuple[bytes | None, str]]:
    """Key -> (small JPEG, why there is none)."""
    row_of = {key: row for row, key in enumerate(samples.keys)}
    wanted = sorted(set(keys))
    unknown = [key for key in wanted if key not in row_of]
    if unknown:
        raise DeclipError(
            f"{unknown[0]!r} of the outcomes is no sample of the set, which has "
            f"{len(row_of):,}: evaluate again with --overwrite."
        )
    read = samples.read_images([row_of[key] for key in wanted])
    return {key: _small(data) for key, data in zip(wanted, read, strict=True)}


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB; what shows through a transparent picture is white, as on most pages."""
    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    ground = Image.new("RGBA", clear.size, "white")
    ground.alpha_composite(clear)
    return ground.convert("RGB")


def _small(data: bytes | str) -> tuple[bytes | None, str]:
    if isinstance(data, str):
        return None, data
    try:
        with Image.open(io.BytesIO(data)) as picture:
            small = _on_white(picture)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        # Not the error's own words: Pillow's name an address in memory.
        return None, f"this picture cannot be read ({type(error).__name__})"
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue(), ""
