"""The stage that scores pairs, once; the rules then read numbers beside the other signals."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from declip_filter.embeddings import read_part, read_vectors
from declip_filter.encoders import (
    Encoder,
    check_encoder_name,
    checked,
    load_encoder,
    weights_path,
)
from declip_filter.image_signals import Rgb, decode_rgb, one_core
from declip_filter.limits import require_between, require_folder_name
from declip_filter.path_digests import path_digest
from declip_filter.scorers import (
    PictureScorer,
    Scorer,
    Scores,
    Vectors,
    VectorScorer,
    check_scorer_names,
    load_scorer,
)
from declip_filter.signals import KEY, read_successes, shard_tasks
from declip_shards import DeclipError, Sample, Store, TaskStats, layout, read_samples, sidecars

BLOCK_ROWS = 4096
"""Rows of stored vectors that are scored at a time."""


@dataclass(frozen=True, kw_only=True)
class ScorePairs:
    """Score every pair with the models named, and write the scores as signals.

    Scorers of vectors (clip, aesthetics, heads) read stored embeddings, or make the vectors here
    when an encoder is named; scorers of pictures read the tars. A pair without a stored vector, and
    one to which a model gives no finite number, has an empty score.
    """

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    name: str = "scores"
    """Name of the signals: they go to signals/NAME/."""
    scorer: tuple[str, ...] = ()
    """Models by name, KIND:MODEL, such as clip:cosine or nsfw:yahoo; none: nothing is done."""
    scorer_factory: str = ""
    """MODULE:FUNCTION that makes scorers of other kinds than clip, aesthetics, nsfw, watermark."""
    embeddings: str = "text"
    """Stored embeddings that scorers of vectors read, where no encoder is named."""
    encoder: str = ""
    """Model that makes the vectors here, KIND:MODEL; empty: the stored embeddings are read."""
    encoder_factory: str = ""
    """MODULE:FUNCTION that makes encoders of other kinds."""
    batch_size: int = 32
    """Pictures that a model sees at a time; another number may change the last digit of a score."""
    device: str = "cpu"
    """Where the encoder runs, torch's name such as cuda; scorers run on the CPU."""
    weights_sha256: tuple[str, ...] = field(init=False, default=())
    """Digests of files of weights: the scorers', in their order, and the encoder's."""

    num_cpus: ClassVar[float] = 1

    @property
    def num_gpus(self) -> float:
        """One for each task, where an encoder is to run on one."""
        return 1 if self.encoder and self.device.startswith("cuda") else 0

    def __post_init__(self) -> None:
        require_folder_name("name", self.name)
        require_folder_name("embeddings", self.embeddings)
        require_between("batch_size", self.batch_size, 1)
        check_scorer_names(self.scorer, self.scorer_factory)
        if self.encoder:
            check_encoder_name(self.encoder, self.encoder_factory)
        files = [name.partition(":")[2] for name in self.scorer]
        if self.encoder:
            files.append(weights_path(self.encoder, self.root))
        digests = tuple(path_digest(file) for file in files if file and os.path.exists(file))
        object.__setattr__(self, "weights_sha256", digests)

    def tasks(self) -> Sequence[str]:
        return shard_tasks(self.root) if self.scorer else ()

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(layout.signals_path(self.name, task))

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)
        scorers = [load_scorer(name, self.scorer_factory) for name in self.scorer]
        _require_own_columns(scorers)
        encoder: Encoder | None = None
        if self.encoder and any(isinstance(scorer, VectorScorer) for scorer in scorers):
            encoder = load_encoder(
                self.encoder, root=self.root, device=self.device, factory=self.encoder_factory
            )
        made_by = {scorer.name: scorer.digest for scorer in scorers}
        if encoder is not None:
            made_by[encoder.name] = encoder.digest

        def run(task: str) -> TaskStats:
            with one_core():
                table = score_shard(self, store, task, scorers, encoder)
            path = layout.signals_path(self.name, task)
            sidecars.write_table(store, path, table)
            empty = {c: table.column(c).null_count for c in table.column_names if c != KEY}
            return TaskStats(
                num_in=table.num_rows,
                num_out=table.num_rows,
                files=[path],
                extra={"digests": made_by, "num_without_score": empty},
            )

        return run


def _require_own_columns(scorers: Sequence[Scorer]) -> None:
    """Refuse two scorers that write one column."""
    owner: dict[str, str] = {}
    for scorer in scorers:
        for column in scorer.columns:
            if column in owner or column == KEY:
                raise DeclipError(
                    f"scorers {owner.get(column, 'the table itself')!r} and {scorer.name!r} both "
                    f"write {column!r}; run them one after the other, each with a name of its own."
                )
            owner[column] = scorer.name


def score_shard(
    settings: ScorePairs,
    store: Store,
    shard: str,
    scorers: Sequence[Scorer],
    encoder: Encoder | None,
) -> pa.Table:
    """Scores of a shard's successes: ``key`` and a float32 column for each score, by key.

    Raises:
        DeclipError: stored vectors or a picture cannot be read, or a scorer gives no finite number
            for any of its rows.
    """
    sheet = ScoreSheet(shard, [str(row[KEY]) for row in read_successes(store, shard, [KEY])])
    of_vectors = [scorer for scorer in scorers if isinstance(scorer, VectorScorer)]
    of_pictures = [scorer for scorer in scorers if isinstance(scorer, PictureScorer)]
    if of_vectors and encoder is None:
        for keys, vectors in _stored_blocks(settings.embeddings, store, shard, of_vectors):
            for scorer in of_vectors:
                sheet.put(scorer, keys, scorer.score_vectors(vectors))
    if of_pictures or (of_vectors and encoder is not None):
        for batch in _batches(read_samples(store, shard), settings.batch_size):
            keys = [sample.key for sample in batch]
            if of_pictures:
                pictures = [_decode(sample) for sample in batch]
                for picture_scorer in of_pictures:
                    sheet.put(picture_scorer, keys, picture_scorer.score_pictures(pictures))
            if of_vectors and encoder is not None:
                vectors = _encode(encoder, batch, of_vectors)
                for scorer in of_vectors:
                    sheet.put(scorer, keys, scorer.score_vectors(vectors))
    return sheet.table(scorers)


class ScoreSheet:
    """The scores of a shard while they come in."""

    def __init__(self, shard: str, keys: Sequence[str]) -> None:
        """``keys``: of all the shard's successes, in order."""
        self._shard = shard
        self._keys = list(keys)
        self._rows = {key: row for row, key in enumerate(keys)}
        self._columns: dict[str, Scores] = {}
        self._num_seen: dict[str, int] = {}

    def put(self, scorer: Scorer, keys: Sequence[str], scores: Scores) -> None:
        """Note the scores of the samples named.

        Raises:
            DeclipError: they are of another shape, or of samples that the shard does not have.
        """
        if scores.shape != (len(keys), len(scorer.columns)):
            raise DeclipError(
                f"scorer {scorer.name!r} gave an array of shape {scores.shape} where "
                f"({len(keys)}, {len(scorer.columns)}) is due; mend the scorer."
            )
        stray = next((key for key in keys if key not in self._rows), None)
        if stray is not None:
            raise DeclipError(
                f"shard {self._shard}: sample {stray!r} is no success of the shard; rerun ingest, "
                "then the stage that embeds."
            )
        places = [self._rows[key] for key in keys]
        for place, column in enumerate(scorer.columns):
            empty = np.full(len(self._keys), np.nan, np.float32)
            self._columns.setdefault(column, empty)[places] = scores[:, place]
        self._num_seen[scorer.name] = self._num_seen.get(scorer.name, 0) + len(keys)

    def table(self, scorers: Sequence[Scorer]) -> pa.Table:
        """``key`` and the scores; empty where there is none or it is not finite.

        Raises:
            DeclipError: a scorer saw pairs and gave no finite number for any of them.
        """
        arrays: dict[str, pa.Array] = {KEY: pa.array(self._keys, pa.string())}
        for scorer in scorers:
            num_seen = self._num_seen.get(scorer.name, 0)
            for column in scorer.columns:
                scores = self._columns.get(column)
                if scores is None:
                    scores = np.full(len(self._keys), np.nan, np.float32)
                has_none = ~np.isfinite(scores)
                if num_seen and has_none.all():
                    raise DeclipError(
                        f"shard {self._shard}: scorer {scorer.name!r} gave no finite {column} for "
                        f"any of {num_seen} pairs; its weights are broken: fetch them again or "
                        "name another scorer."
                    )
                arrays[column] = pa.array(scores, pa.float32(), mask=has_none)
        return pa.table(arrays)


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def _decode(sample: Sample) -> Rgb:
    try:
        return decode_rgb(sample.image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DeclipError(
            f"the picture of sample {sample.key!r} cannot be decoded ({error}); rerun ingest to "
            "fetch its shard again."
        ) from error


def _sides(scorers: Sequence[VectorScorer]) -> tuple[str, ...]:
    return tuple(sorted({side for scorer in scorers for side in scorer.sides}))


def _encode(
    encoder: Encoder, batch: Sequence[Sample], scorers: Sequence[VectorScorer]
) -> dict[str, Vectors]:
    """Unit vectors (rows, dim) of the sides that the scorers read; NaN stays, and has no score."""
    made: dict[str, Vectors] = {}
    if "img_emb" in _sides(scorers):
        pictures = encoder.encode_image([sample.image for sample in batch])
        made["img_emb"] = checked(encoder, pictures, len(batch))
    if "text_emb" in _sides(scorers):
        captions = encoder.encode_text([sample.caption for sample in batch])
        made["text_emb"] = checked(encoder, captions, len(batch))
    return made


def _stored_blocks(
    name: str, store: Store, shard: str, scorers: Sequence[VectorScorer]
) -> Iterator[tuple[list[str], dict[str, Vectors]]]:
    """Keys and float32 vectors of a shard's stored embeddings, some thousand rows at a time."""
    part = read_part(store, name, shard)
    sides = _sides(scorers)
    lacking = [side for side in sides if side not in part.kinds]
    if lacking:
        scorer = next(scorer for scorer in scorers if lacking[0] in scorer.sides)
        raise DeclipError(
            f"scorer {scorer.name!r} reads {lacking[0]}, but embeddings {name!r} hold "
            f"{', '.join(part.kinds)}; embed pictures and captions with one model of both, or name "
            "an encoder."
        )
    stored = {side: read_vectors(store, name, side, part) for side in sides}
    keys = next(iter(stored.values()))[1]
    for start in range(0, len(keys), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        yield (
            keys[block],
            {side: vectors[block].astype(np.float32) for side, (vectors, _) in stored.items()},
        )
