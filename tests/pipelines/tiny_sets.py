"""Small labeled sets of real pictures, and a model of a few lines that can tell their colors."""

from pathlib import Path
from typing import Any

import numpy as np

from declip_eval.labelled_sets import write_webdataset
from declip_shards.fakes import draw
from pipelines.eval_models import ImageFeatures, TokenFeatures
from pipelines.eval_views import Preparation

COLORS = {"red": (1, 0, 0), "green": (0, 0.5, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
TEMPLATES = ("a {} circle", "a photo of {}")
BROKEN = b"\xff\xd8\xff no picture"


def pictures(num: int, tag: str, seed: int = 0) -> list[tuple[str, bytes, int]]:
    """(key, JPEG, color) of circles of several sizes."""
    rng = np.random.default_rng(seed)
    names = list(COLORS)
    return [
        (
            f"{tag}{number:04d}",
            draw(names[number % 4], "circle", int(rng.integers(24, 48)), rng),
            number % 4,
        )
        for number in range(num)
    ]


def write_colors(folder: Path, num_test: int = 24, num_train: int = 32, *, broken: int = 0) -> None:
    """A set to classify; the first ``broken`` test pictures are none."""
    test = pictures(num_test, "t")
    test = [(key, BROKEN if n < broken else data, c) for n, (key, data, c) in enumerate(test)]
    for split, items in (("test", test), ("train", pictures(num_train, "n", seed=1))):
        write_webdataset(
            folder,
            items,
            class_names=list(COLORS),
            templates=TEMPLATES,
            split=split,
            shard_size=10,
        )


def write_pairs(folder: Path, num: int = 12, *, broken: int = 0) -> None:
    """A set to retrieve from: every picture has a caption of its own, and one of its color; the
    first ``broken`` pictures are none."""
    names = list(COLORS)
    items = [
        (
            key,
            BROKEN if number < broken else data,
            (f"{names[color]} circle", f"picture {key} is {names[color]}"),
        )
        for number, (key, data, color) in enumerate(pictures(num, "p", seed=2))
    ]
    write_webdataset(folder, items, kind="retrieval")


def write_multilabel(folder: Path, num: int = 20) -> None:
    """A set of which each picture has two of the classes."""
    for split, seed in (("test", 3), ("train", 4)):
        items = [
            (key, data, [int(color == c or (color + 1) % 4 == c) for c in range(4)])
            for key, data, color in pictures(num, "m", seed=seed)
        ]
        write_webdataset(
            folder,
            items,
            kind="multilabel",
            split=split,
            class_names=list(COLORS),
            templates=TEMPLATES,
        )


def _unit(rows: Any) -> Any:
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)


class ColorModel:
    """A model with the interface of `pipelines.eval_models.EvalModel`: what is not gray in the
    middle of a picture, against the colors that a text names.

    Args:
        scoring: token-wise gives scores of its own for each batch, as FILIP does.
    """

    name, pretrained, probe_features, image_size = "colors", "v1", "mean color", 16

    def __init__(self, scoring: str = "global") -> None:
        self.scoring = scoring
        self.digest = "d" * 64
        self.preparation = Preparation(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.preprocessing = self.preparation.text
        self.num_encoded = 0

    def prepare(self, images: Any) -> Any:
        return self.preparation.make(images)

    def encode(self, prepared: Any) -> Any:
        self.num_encoded += len(prepared)
        middle = np.asarray(prepared, np.float32)[:, 6:10, 6:10].mean(axis=(1, 2)) / 255
        kind = ImageFeatures if self.scoring == "global" else TokenFeatures
        first = _unit(middle) if self.scoring == "global" else _unit(middle)[:, None]
        return kind(first, middle)

    def encode_texts(self, texts: Any) -> Any:
        rows = []
        for text in texts:
            found = [value for name, value in COLORS.items() if name in text]
            rows.append(np.sum(found, axis=0) if found else (0.1, 0.1, 0.1))
        return _unit(rows)

    def classifier(self, class_names: Any, templates: Any) -> Any:
        texts = [[t.format(n) for n in names for t in templates] for names in class_names]
        return _unit([self.encode_texts(some).mean(axis=0) for some in texts]).T

    def score_classes(self, images: Any, class_names: Any, templates: Any) -> Any:
        return images[0].reshape(len(images[0]), -1) @ self.classifier(class_names, templates)

    def score_texts(self, images: Any, texts: Any) -> Any:
        scores = images[0].reshape(len(images[0]), -1) @ self.encode_texts(texts).T
        return scores, np.ascontiguousarray(scores.T)
