"""Scorers of a user's own, as a scorer_factory makes them."""

from collections.abc import Mapping, Sequence

import numpy as np

from declip_filter.image_signals import Rgb
from declip_filter.scorers import Scores, Vectors


class Redness:
    """How much more red than blue; pictures without red have no score."""

    digest = "redness 1"
    columns = ("redness", "brightness")

    def __init__(self, name: str) -> None:
        self.name = name

    def score_pictures(self, pictures: Sequence[Rgb]) -> Scores:
        means = np.stack([picture.reshape(-1, 3).mean(axis=0) for picture in pictures])
        redness = np.where(means[:, 0] > means[:, 2], means[:, 0] - means[:, 2], np.nan)
        return np.stack([redness, means.mean(axis=1)], axis=1).astype(np.float32)


class Nothing:
    """A broken model."""

    name = "own:nothing"
    digest = "nothing"
    columns = ("nothing",)
    sides = ("text_emb",)

    def score_vectors(self, vectors: Mapping[str, Vectors]) -> Scores:
        return np.full((len(vectors["text_emb"]), 1), np.nan, np.float32)


class WrongShape(Nothing):
    def score_vectors(self, vectors: Mapping[str, Vectors]) -> Scores:
        return np.zeros((1, 2), np.float32)


def make(name: str) -> "Redness | Nothing":
    model = name.partition(":")[2]
    if model == "redness":
        return Redness(name)
    return WrongShape() if model == "wrong" else Nothing()
