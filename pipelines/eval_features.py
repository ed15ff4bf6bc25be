"""Features of a labeled set's pictures, in chunks that are kept and shared between processes.

A chunk is a fixed number of pictures, whoever takes it and however often the work was stopped, and
a batch begins where a chunk does: so the bits of a feature depend on the model, the data and the
batch size alone, and results are the same with any number of processes.
"""

import contextlib
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from declip_shards import DeclipError
from declip_shards.store import atomic_write
from pipelines.eval_cache_room import FolderHold
from pipelines.eval_ranks import POLL_SECONDS, Ranks
from pipelines.progress import Progress

if TYPE_CHECKING:
    from pipelines.eval_models import EvalModel, ImageFeatures, TokenFeatures
    from pipelines.eval_views import Views

FORMAT = 1
"""Counts up when chunks change; part of every key."""

_BAD = ("bad_rows", "bad_reasons")

Arrays = dict[str, npt.NDArray[Any]]
FloatArray = npt.NDArray[np.float32]


class PictureSet(Protocol):
    """What is read of a `declip_eval.labelled_sets.LabelledSet` here."""

    @property
    def keys(self) -> Sequence[str]:
        """Of the samples, in order."""
        ...

    def digest(self) -> str:
        """Of what the set holds."""
        ...

    def read_images(self, indices: Sequence[int]) -> Sequence[bytes | str]:
        """Encoded pictures; for one that cannot be read, why."""
        ...


@dataclass(frozen=True)
class Taken:
    """What was taken of all pictures of a set, in their order."""

    arrays: Arrays
    """By name, each of n rows (of n columns where it ends in ``_t``)."""
    unreadable: dict[int, str]
    """Row -> why its picture cannot be read; its features are zeros."""


class ChunkCache:
    """Chunks of one kind of work, in a folder of their own.

    Args:
        root: of all features, on a local disk or one that all processes share.
        key: what the chunks' bytes follow from; it names the folder.
        num_rows: pictures in all.
        chunk_images: pictures of a chunk.
    """

    def __init__(
        self, root: Path, key: Mapping[str, Any], num_rows: int, chunk_images: int
    ) -> None:
        self.key = {"format": FORMAT, "chunk_images": chunk_images, **key}
        self.chunk_images = chunk_images
        text = json.dumps(self.key, sort_keys=True, ensure_ascii=False)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.num_rows = num_rows

    @property
    def num_chunks(self) -> int:
        """Files in all."""
        return -(-self.num_rows // self.chunk_images)

    def rows(self, number: int) -> range:
        """The pictures of a chunk."""
        start = number * self.chunk_images
        return range(start, min(start + self.chunk_images, self.num_rows))

    def path(self, number: int) -> Path:
        """Of a chunk's file."""
        return self.folder / f"chunk-{number:06d}.npz"

    def read(self, number: int, names: Sequence[str] | None = None) -> Arrays | None:
        """A chunk, or some of its arrays; None where it is absent or damaged."""
        try:
            with np.load(self.path(number), allow_pickle=False) as file:
                return {name: file[name] for name in (file.files if names is None else names)}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            self.path(number).unlink(missing_ok=True)
            return None

    def write(self, number: int, arrays: Arrays) -> None:
        """Keep a chunk: whole, or not at all; equal arrays give equal bytes."""
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        try:
            atomic_write(self.path(number), content.getbuffer())
        except OSError as error:
            raise DeclipError(
                f"{len(content.getbuffer()):,} bytes cannot be written to {str(self.folder)!r} "
                f"({error.strerror}); make room there, or name another --feature-root."
            ) from error

    def take(
        self,
        compute: Callable[[range], Arrays],
        ranks: Ranks,
        place: int,
        name: str,
        names: Sequence[str] | None = None,
        look_again: "Callable[[list[int]], list[str | None]] | None" = None,
    ) -> list[Arrays] | None:
        """Compute what is missing, together with the other ranks.

        Args:
            compute: the arrays of some pictures.
            ranks: this process and the others.
            place: number of this step, larger than any before it and the same in all ranks.
            name: of the work, for its progress.
            names: of the arrays that are wanted; None for all.
            look_again: why some pictures cannot be used, None where they can; by their rows.

        Returns:
            All chunks in order on rank 0; None on the others, who have taken their part.
        """
        ranks.begin(place)
        hold = FolderHold(self.folder)
        try:
            return self._take(compute, ranks, place, name, names, look_again)
        finally:
            if ranks.rank == 0:
                hold.release()
            else:
                # Rank 0 reads it, which may be far behind.
                ranks.holds.keep(hold)

    def _take(
        self,
        compute: Callable[[range], Arrays],
        ranks: Ranks,
        place: int,
        name: str,
        names: Sequence[str] | None,
        look_again: "Callable[[list[int]], list[str | None]] | None",
    ) -> list[Arrays] | None:
        about = self.folder / "about.json"
        if not about.exists():
            text = json.dumps(self.key, sort_keys=True, ensure_ascii=False, indent=2)
            atomic_write(about, (text + "\n").encode())
        order = self._order(ranks)
        present = {n for n in order if self.path(n).exists()}
        num_done = sum(len(self.rows(n)) for n in present)
        with contextlib.ExitStack() as stack:
            bar = None
            if ranks.rank == 0 and len(present) < len(order):
                bar = stack.enter_context(
                    Progress(name, len(order), len(present), num_in=num_done, num_out=num_done)
                )
            for number in order:
                if number in present:
                    continue
                if not (self.path(number).exists() or self._comes(ranks, number, place)):
                    self.write(number, compute(self.rows(number)))
                if bar is not None:
                    bar.advance(len(self.rows(number)))
        if ranks.rank != 0:
            return None
        return [
            self._reread(number, compute, names, look_again, was_there=number in present)
            for number in range(self.num_chunks)
        ]

    def _reread(
        self,
        number: int,
        compute: Callable[[range], Arrays],
        names: Sequence[str] | None,
        look_again: "Callable[[list[int]], list[str | None]] | None",
        *,
        was_there: bool,
    ) -> Arrays:
        """A chunk from its file; one that is damaged is computed again.

        So is an earlier run's with a picture that could not be read and now can: the disk or the
        network is whole again.
        """
        found = self.read(number, names)
        if found is not None and was_there and self._changed(found, look_again):
            found = None
        if found is None:
            self.write(number, compute(self.rows(number)))
            found = self.read(number, names)
        if found is None:
            raise DeclipError(
                f"{str(self.path(number))!r} cannot be read back after it was written; look at "
                "that disk, or name another --feature-root."
            )
        return found

    @staticmethod
    def _changed(
        chunk: Arrays, look_again: "Callable[[list[int]], list[str | None]] | None"
    ) -> bool:
        """Whether a chunk's unusable pictures are not what they were."""
        if look_again is None or not len(chunk.get("bad_rows", ())):
            return False
        return bool(look_again(chunk["bad_rows"].tolist()) != chunk["bad_reasons"].tolist())

    def _order(self, ranks: Ranks) -> list[int]:
        """Own chunks first; rank 0 then looks after everyone's."""
        own = [n for n in range(self.num_chunks) if ranks.mine(n)]
        if ranks.rank != 0:
            return own
        return own + [n for n in range(self.num_chunks) if not ranks.mine(n)]

    def _comes(self, ranks: Ranks, number: int, place: int) -> bool:
        """Wait for another rank's chunk; False: it is to be taken here."""
        if ranks.mine(number):
            return False
        while not self.path(number).exists():
            if not ranks.comes(number, place):
                # It may have come between the two looks.
                return self.path(number).exists()
            time.sleep(POLL_SECONDS)
        return True


def join(chunks: Sequence[Arrays]) -> Taken:
    """Chunks as one: rows on rows, and columns beside columns for names that end in ``_t``."""
    arrays: Arrays = {}
    unreadable: dict[int, str] = {}
    for name in chunks[0]:
        if name not in _BAD:
            arrays[name] = np.concatenate([c[name] for c in chunks], axis=int(name.endswith("_t")))
    for chunk in chunks:
        rows, reasons = chunk["bad_rows"].tolist(), chunk["bad_reasons"].tolist()
        unreadable |= dict(zip(rows, reasons, strict=True))
    return Taken(arrays, unreadable)


@dataclass(frozen=True, kw_only=True)
class FeatureWork:
    """A model and how it is fed.

    Args:
        model: of the features.
        root: of the cache.
        batch_size: pictures that go through the tower at once.
        chunk_images: pictures of a chunk.
        device: where it runs; features of two devices differ in their last bits.
        ranks: this process and the others.
        read_views: gives the uint8 views of pictures from a cache of them; None: they are made.
    """

    model: "EvalModel"
    root: Path
    batch_size: int
    chunk_images: int
    device: str
    ranks: Ranks
    read_views: "Callable[[PictureSet, int, int], tuple[Views, list[str | None]]] | None" = None

    def _cache(self, kind: str, data: PictureSet, **more: str) -> ChunkCache:
        key = {
            "kind": kind,
            "model": self.model.digest,
            "preprocessing": self.model.preprocessing,
            "data": data.digest(),
            "batch_size": self.batch_size,
            "device": self.device.partition(":")[0],
            **more,
        }
        return ChunkCache(self.root, key, len(data.keys), self.chunk_images)

    def features(self, data: PictureSet, wanted: str, place: int, name: str) -> Taken | None:
        """Features of pictures; both kinds are taken and kept at once.

        Args:
            data: the pictures.
            wanted: ``features`` (n, dim), of a model with global embeddings, or ``probe``
                (n, width).
            place: see `ChunkCache.take`.
            name: of the work, for its progress.

        Returns:
            None on ranks other than 0.
        """

        def arrays(encoded: "ImageFeatures | TokenFeatures") -> Arrays:
            found: Arrays = {"probe": encoded.probe}
            if self.model.scoring == "global":
                found["features"] = encoded[0]
            return found

        return self._take(self._cache("features", data), data, arrays, place, name, (wanted,))

    def class_scores(
        self,
        data: PictureSet,
        class_names: Sequence[Sequence[str]],
        templates: Sequence[str],
        place: int,
        name: str,
    ) -> Taken | None:
        """``scores`` (n, num_classes) of a model that compares token by token."""
        names = tuple(tuple(of_class) for of_class in class_names)

        def arrays(encoded: "ImageFeatures | TokenFeatures") -> Arrays:
            return {"scores": self.model.score_classes(encoded, names, templates)}

        cache = self._cache("class scores", data, texts=digest_of([names, list(templates)]))
        return self._take(cache, data, arrays, place, name, ("scores",))

    def text_scores(
        self, data: PictureSet, texts: Sequence[str], place: int, name: str
    ) -> Taken | None:
        """``to_text`` (n, t) and ``to_image_t`` (t, n) of a model that compares token by token."""

        def arrays(encoded: "ImageFeatures | TokenFeatures") -> Arrays:
            to_text, to_image = self.model.score_texts(encoded, texts)
            return {"to_text": to_text, "to_image_t": to_image}

        cache = self._cache("text scores", data, texts=digest_of(list(texts)))
        return self._take(cache, data, arrays, place, name, ("to_text", "to_image_t"))

    def _take(
        self,
        cache: ChunkCache,
        data: PictureSet,
        arrays: "Callable[[ImageFeatures | TokenFeatures], Arrays]",
        place: int,
        name: str,
        names: tuple[str, ...],
    ) -> Taken | None:
        def compute(rows: range) -> Arrays:
            parts: list[Arrays] = []
            bad: dict[int, str] = {}
            for start, views, reasons in self._views(data, rows):
                found = arrays(self.model.encode(views))
                for row, reason in enumerate(reasons):
                    if reason is not None:
                        bad[start + row] = reason
                        for array_name, array in found.items():
                            array[(slice(None), row) if array_name.endswith("_t") else row] = 0
                _refuse_not_finite(found, self.model.pretrained, data.keys[start])
                parts.append(found)
            joined = {
                array_name: np.concatenate(
                    [part[array_name] for part in parts], axis=int(array_name.endswith("_t"))
                )
                for array_name in parts[0]
            }
            return joined | {
                "bad_rows": np.array(sorted(bad), dtype=np.int64),
                "bad_reasons": np.array([bad[row] for row in sorted(bad)], dtype=np.str_),
            }

        def look_again(rows: list[int]) -> list[str | None]:
            return list(self.model.prepare(data.read_images(rows))[1])

        wanted = (*names, *_BAD)
        chunks = cache.take(compute, self.ranks, place, name, wanted, look_again)
        return None if chunks is None else join(chunks)

    def _views(
        self, data: PictureSet, rows: range
    ) -> "Iterator[tuple[int, Views, list[str | None]]]":
        """Yield (first row, views, reasons) by batches; the next one is decoded meanwhile."""
        starts = list(range(rows.start, rows.stop, self.batch_size))

        def make(start: int) -> "tuple[Views, list[str | None]]":
            stop = min(start + self.batch_size, rows.stop)
            if self.read_views is not None:
                return self.read_views(data, start, stop)
            return self.model.prepare(data.read_images(range(start, stop)))

        with ThreadPoolExecutor(1, "ahead") as ahead:
            coming = ahead.submit(make, starts[0])
            for number, start in enumerate(starts):
                views, reasons = coming.result()
                if number + 1 < len(starts):
                    coming = ahead.submit(make, starts[number + 1])
                yield start, views, reasons


def digest_of(content: Any) -> str:
    """sha256 of something as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_not_finite(arrays: Arrays, name: str, key: str) -> None:
    """Refuse what a diverged or overflowed model gives.

    Raises:
        DeclipError: with the first picture of the batch.
    """
    for array_name, array in arrays.items():
        if not np.isfinite(array).all():
            raise DeclipError(
                f"model {name!r} gives {array_name} that are not finite, in the batch from picture "
                f"{key!r} on: it has diverged; evaluate an earlier checkpoint."
            )
