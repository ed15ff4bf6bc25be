"""Models that give a pair a number: how well the caption fits, how pleasing, how risky it is.

A scorer's name is ``KIND:MODEL``:

    clip:cosine            cosine of the image's and the caption's vector (column clip_score)
    aesthetics:FILE        a head over the image's vector, as LAION's are (aesthetics_score)
    nsfw:yahoo             Yahoo's Open-NSFW out of a Python package (nsfw_score)
    nsfw:FILE              a head over the image's vector, or an ONNX classifier of pictures
    watermark:FILE         the same (watermark_score)

Heads are ``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt`` (:mod:`declip_filter.score_heads`),
classifiers ``.onnx`` (:mod:`declip_filter.score_pictures`). Scorers of other kinds come from a
factory, a dotted path ``module:function`` that every worker process imports itself.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from declip_filter.image_signals import Rgb
from declip_shards import DeclipError
from declip_shards.errors import did_you_mean

Scores = npt.NDArray[np.float32]
"""(rows, columns); NaN where a thing cannot be scored."""
Vectors = npt.NDArray[np.float32]
"""(rows, dim), unit length."""

COLUMNS = {
    "clip": "clip_score",
    "aesthetics": "aesthetics_score",
    "nsfw": "nsfw_score",
    "watermark": "watermark_score",
}
"""Built-in kind -> the column it writes."""
CLIP_MODEL = "cosine"
YAHOO_MODEL = "yahoo"
HEAD_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
CLASSIFIER_SUFFIX = ".onnx"


class Scorer(Protocol):
    """What every scorer says of itself; it also is a :class:`VectorScorer` or a
    :class:`PictureScorer`."""

    @property
    def name(self) -> str:
        """The full name, ``KIND:MODEL``."""

    @property
    def digest(self) -> str:
        """Hex digest of the weights and of how they are used."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Signals that it writes, one for each column of its scores."""


@runtime_checkable
class VectorScorer(Scorer, Protocol):
    """Scores vectors, whoever made them."""

    @property
    def sides(self) -> tuple[str, ...]:
        """Which vectors it reads: ``img_emb``, ``text_emb`` or both."""

    def score_vectors(self, vectors: Mapping[str, Vectors]) -> Scores:
        """float32 (rows, columns), from unit vectors (rows, dim) of each of the sides."""


@runtime_checkable
class PictureScorer(Scorer, Protocol):
    """Scores pictures; they are decoded once for all scorers."""

    def score_pictures(self, pictures: Sequence[Rgb]) -> Scores:
        """float32 (rows, columns), from uint8 (height, width, 3) of any sizes."""


ScorerFactory = Callable[[str], Scorer]
"""Makes a scorer from its full name."""


class CosineScorer:
    """CLIP score: the cosine of a pair's two vectors, -1 to 1 (Hessel et al. 2021, arXiv
    2104.08718, without their factor 2.5 and their clipping at 0; as DataComp thresholds it)."""

    name = f"clip:{CLIP_MODEL}"
    digest = "cosine"
    columns = (COLUMNS["clip"],)
    sides = ("img_emb", "text_emb")

    def score_vectors(self, vectors: Mapping[str, Vectors]) -> Scores:
        """float32 (rows, 1)."""
        products = vectors["img_emb"] * vectors["text_emb"]
        return np.asarray(products.sum(axis=1, keepdims=True), dtype=np.float32)


def check_scorer_names(names: Sequence[str], factory: str = "") -> None:
    """Refuse names that nothing can serve, without loading anything.

    Raises:
        DeclipError: no ``KIND:MODEL``, an unknown kind without a factory, an unknown model, a file
            of an unknown kind, or two scorers of one column.
    """
    if factory:
        module, colon, function = factory.partition(":")
        if not module or not colon or not function.isidentifier():
            raise DeclipError(
                f"scorer_factory is {factory!r}; it must be MODULE:FUNCTION, such as "
                "'my_package.scorers:make_scorer'."
            )
    writers: dict[str, str] = {}
    for name in names:
        kind, colon, model = name.partition(":")
        if not kind or not colon or not model:
            raise DeclipError(
                f"scorer is {name!r}; it must be KIND:MODEL, such as 'clip:{CLIP_MODEL}' or "
                f"'nsfw:{YAHOO_MODEL}'."
            )
        if kind not in COLUMNS:
            if not factory:
                raise DeclipError(
                    f"scorer {name!r} is of unknown kind {kind!r}.{did_you_mean(kind, COLUMNS)} "
                    "A scorer of your own needs scorer_factory (MODULE:FUNCTION)."
                )
            continue
        _check_model(name, kind, model)
        column = COLUMNS[kind]
        if column in writers:
            raise DeclipError(
                f"scorers {writers[column]!r} and {name!r} both write {column!r}; run them one "
                "after the other, each with a name of its own."
            )
        writers[column] = name


def _check_model(name: str, kind: str, model: str) -> None:
    if kind == "clip":
        if model != CLIP_MODEL:
            raise DeclipError(
                f"scorer is {name!r}; the only one of its kind is 'clip:{CLIP_MODEL}': which "
                "model the vectors are of is said by embeddings or encoder."
            )
        return
    if kind == "nsfw" and model == YAHOO_MODEL:
        return
    known = HEAD_SUFFIXES if kind == "aesthetics" else (*HEAD_SUFFIXES, CLASSIFIER_SUFFIX)
    if Path(model).suffix not in known:
        raise DeclipError(
            f"scorer {name!r} names no file of weights; after the colon give one that ends in "
            f"{', '.join(known)}."
        )


def load_scorer(name: str, factory: str = "") -> Scorer:
    """Load a scorer.

    Args:
        name: ``KIND:MODEL``.
        factory: dotted path ``module:function`` of a :data:`ScorerFactory`; it serves the kinds
            that are not built in.

    Raises:
        DeclipError: unknown name, a package or file is missing, weights that cannot be read, or a
            factory that cannot be imported or returns no scorer.
    """
    from declip_filter import score_heads, score_pictures

    check_scorer_names([name], factory)
    kind, _, model = name.partition(":")
    if kind not in COLUMNS:
        return _from_factory(name, factory)
    if kind == "clip":
        return CosineScorer()
    if model == YAHOO_MODEL:
        return score_pictures.YahooScorer(name, COLUMNS[kind])
    if Path(model).suffix == CLASSIFIER_SUFFIX:
        return score_pictures.ClassifierScorer(name, model, COLUMNS[kind])
    return score_heads.HeadScorer(name, model, COLUMNS[kind])


def _from_factory(name: str, path: str) -> Scorer:
    module, _, function = path.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DeclipError(
            f"scorer_factory {path!r} cannot be imported ({error}); it must name a function of a "
            "module that every worker process can import."
        ) from error
    found = make(name)
    if not isinstance(found, VectorScorer | PictureScorer):
        raise DeclipError(
            f"scorer_factory {path!r} made a {type(found).__name__} of {name!r}, which has neither "
            "score_vectors nor score_pictures, or lacks name, digest or columns; see "
            "declip_filter.scorers for what a scorer needs."
        )
    return found
