"""Overlap of evaluated pictures with what the model was trained on, beside every score."""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from declip_eval.bootstrap import bootstrap_intervals
from declip_eval.labelled_sets import LabelledSet
from declip_eval.outcomes import Outcomes, metrics_of
from pipelines.eval_features import Arrays, ChunkCache
from pipelines.eval_measures import Measured, caption_keys, mean_metrics
from pipelines.eval_ranks import Ranks

if TYPE_CHECKING:
    from declip_filter.encoders import Encoder
    from pipelines.eval_contamination import Overlap
    from pipelines.trained_rows import TrainedRows


@dataclass(frozen=True, kw_only=True)
class OverlapSearch:
    """Looks for sets' pictures in a training dataset; each set once, whatever is measured on it.

    Args:
        train_root: the training dataset's folder.
        selection: of it that was trained on; None: as its training run says.
        embeddings: of its pictures; None: hashes alone are compared.
        root: of the cache of marks.
        chunk_images: pictures of a chunk.
        ranks: this process and the others.
        device: of encoders and products.
        num_threads: pictures decoded at once.
    """

    train_root: str
    selection: str | None
    embeddings: str | None
    root: Path
    chunk_images: int
    ranks: Ranks
    device: str
    num_threads: int
    _found: "dict[str, Overlap]" = field(default_factory=dict, repr=False)

    @functools.cached_property
    def training(self) -> "TrainedRows":
        """What was trained on."""
        from pipelines.eval_contamination import trained_rows

        return trained_rows(self.train_root, self.selection)

    def key(self) -> list[str | None]:
        """What a result's overlap follows from, beside the set."""
        encoder = self._encoder()
        return [self.training.digest, self.embeddings, encoder.digest if encoder else None]

    def _encoder(self) -> "Encoder | None":
        from pipelines.eval_contamination import training_encoder

        if self.embeddings is None:
            return None
        return training_encoder(self.train_root, self.embeddings, self.device)

    def find(self, data: LabelledSet, place: int) -> "Overlap | None":
        """The overlap of a set's pictures; None on ranks other than 0.

        Args:
            data: the set.
            place: see `ChunkCache.take`.

        Raises:
            DeclipError: no training data there, or a damaged file of it.
        """
        from pipelines.eval_contamination import find_overlap, picture_marks
        from pipelines.picture_marks import Marks

        digest = data.digest()
        if digest in self._found:
            return self._found[digest]
        encoder = self._encoder()

        def compute(rows: range) -> Arrays:
            images = data.read_images(rows)
            marks = picture_marks(images, encoder=encoder, num_threads=self.num_threads)
            return marks.arrays()

        key = {"kind": "marks", "data": digest, "encoder": encoder.digest if encoder else ""}
        cache = ChunkCache(self.root, key, len(data), self.chunk_images)
        chunks = cache.take(compute, self.ranks, place, f"eval: {data.name} marks")
        if chunks is None:
            return None
        overlap = find_overlap(
            Marks.join([Marks.from_arrays(chunk) for chunk in chunks]),
            train_root=self.train_root,
            selection=self.selection,
            embeddings=self.embeddings,
            training=self.training,
            device=self.device,
        )
        self._found[digest] = overlap
        return overlap


def with_overlap(
    measured: Measured, overlap: "Overlap", data: LabelledSet, *, seed: int, num_resamples: int
) -> tuple[Measured, dict[str, Any]]:
    """Mark the outcomes that the training data holds, and measure without them.

    Returns:
        The same with marked outcomes, and what a result keeps of it.
    """
    marked = tuple(
        outcomes.with_overlap(mask_of_queries(outcomes, overlap.mask, data))
        for outcomes in measured.outcomes
    )
    record = overlap.record(data.keys)
    record["num_samples"] = len(data)
    names = list(measured.metrics)
    try:
        without = [metrics_of(each, names, without_overlap=True) for each in marked]
        record["metrics_without_overlap"] = mean_metrics(without)
        if len(marked) == 1:
            intervals = bootstrap_intervals(
                marked[0], names, seed=seed, num_resamples=num_resamples, without_overlap=True
            )
            record["intervals_without_overlap"] = {n: list(ends) for n, ends in intervals.items()}
    except ValueError as error:
        # Nothing is left, or of some metric: then there is no such number.
        record["metrics_without_overlap"] = {}
        record["why_none"] = str(error)
    return dataclasses.replace(measured, outcomes=marked), record


def mask_of_queries(
    outcomes: Outcomes, mask: npt.NDArray[np.bool_], data: LabelledSet
) -> npt.NDArray[np.bool_]:
    """Of each query whether its picture overlaps, from that of each picture."""
    if outcomes.kind != "retrieval":
        return mask
    counts = [len(captions) for captions in data.captions or []]
    by_key = dict(zip(caption_keys(data), np.repeat(mask, counts), strict=True))
    of_pictures = dict(zip(data.keys, mask, strict=True))
    directions = outcomes.columns["direction"]
    return np.array(
        [
            (by_key if direction == "image" else of_pictures)[key]
            for key, direction in zip(outcomes.keys, directions, strict=True)
        ],
        dtype=np.bool_,
    )
