"""Batches of views and token ids: the same global batches however many processes share them.

The order is a permutation drawn from (seed, epoch); global batch ``b`` is its ``b``-th slice, and a
process takes its part of the slice. Step numbers count through all epochs, so the place of a run in
its data is the step and nothing else, and resuming is starting at another step.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip_shards import DeclipError
from declip_train.augment import decode_image, normalize_into, random_view
from declip_train.epoch_tables import EpochTables
from declip_train.hf_clip import build_tokenizer
from declip_train.samples import TrainingSamples, uses_stored
from declip_train.settings import TrainSettings
from declip_train.text_views import TextView
from declip_train.tokenizer import Tokenizer, mask_tokens
from declip_train.wordnet import WordNet

_MORE_TOKEN_IDS = ("second_token_ids", "neighbor_token_ids")
_ORDER = 1
"""Name of the random stream of the samples' order."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's share of a global batch: n samples; L, M, K are lengths in tokens.

    Every row of token ids has its end token, also an empty caption's, which is start and end.
    """

    step: int
    """Which step of the run this is for, from 0."""
    epoch: int
    """Which pass over the data, from 0."""
    images: Tensor
    """(views, n, 3, size, size) float32, normalized. One view for clip and filip; two alike for
    declip and defilip; for slip the base view, then two self-supervised ones."""
    token_ids: Tensor
    """(n, L) int64; some are replaced where the method models masked language (declip, defilip)."""
    sample_ids: Tensor
    """(n,) int64: the sample's row among the training samples, in every epoch and process."""
    caption_ids: Tensor
    """(n,) int64: equal where captions are, and only there, in every epoch and process."""
    replaced: Tensor | None = None
    """(n, L) bool: where the mask embedding stands in."""
    mask_positions: Tensor | None = None
    """(n, L) bool: which tokens are to be predicted; chance may choose none in a whole batch."""
    targets: Tensor | None = None
    """(n, L) int64: the original ids."""
    second_token_ids: Tensor | None = None
    """(n, M) int64: the second view of the caption."""
    neighbor_token_ids: Tensor | None = None
    """(n, K) int64: a neighbor's caption; the sample's own where it has none."""
    neighbor_features: Tensor | None = None
    """(n, D) float32, unit length: a neighbor's stored feature, in place of its caption; some unit
    vector where the sample has no neighbor."""
    has_neighbor: Tensor | None = None
    """(n,) bool: whether it is a neighbor's."""
    neighbor_caption_ids: Tensor | None = None
    """(n,) int64: the neighbor's caption, numbered as ``caption_ids``; the sample's own where it
    has none."""
    lengths: Mapping[str, Tensor] = field(default_factory=dict)
    """(n,) int64 tokens of each row, by the name of the field of token ids. They stay on the host,
    which would otherwise have to wait for a GPU to learn how long captions are."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def _with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(name, value)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        return self._with_tensors(lambda _, value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can copy from while it computes."""
        return self._with_tensors(lambda _, value: value.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """The batch as ``parts`` of equal rows in order; their tensors are views of this one's.

        Token rows keep the length of the whole batch.

        Raises:
            ValueError: the rows cannot be cut evenly.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(
                f"A batch of {len(self)} rows cannot be cut evenly into {parts} parts: choose a "
                "divisor."
            )
        rows = len(self) // parts

        def cut(first: int) -> Batch:
            part = self._with_tensors(
                lambda name, value: value.narrow(int(name == "images"), first, rows)
            )
            lengths = {name: value.narrow(0, first, rows) for name, value in self.lengths.items()}
            return replace(part, lengths=lengths)

        return [cut(part * rows) for part in range(parts)]


def view_threads(settings: TrainSettings) -> int:
    """Threads that draw views; the pixels do not depend on them."""
    if settings.loader_threads is not None:
        return settings.loader_threads
    if torch.cuda.is_available():
        return max(1, len(os.sched_getaffinity(0)) // settings.num_ranks)
    return settings.threads_per_rank


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of the samples in one epoch: a pure function of the arguments."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(num_samples)


def _generator(seed: int, epoch: int, purpose: str, key: str) -> np.random.Generator:
    """A sample's own random stream: no choice of another sample, process or purpose moves it."""
    text = f"{seed}/{epoch}/{purpose}/{key}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=number))


class BatchLoader:
    """Prepares batches in a background thread, and pictures in as many as ``threads_per_rank``.

    What a sample looks and reads like is a pure function of (seed, epoch, key), so a global batch
    is the same however many processes and micro-batches share it. Which views and texts a batch
    has follows from the method's terms: masked captions and second captions are for declip and
    defilip, which define them; clip, slip and filip read the plain caption. (DeCLIP's released code
    masks FILIP's captions, too, without predicting them; that is a fault and not followed.)

    Args:
        samples: what to train on.
        settings: batch size, views, seeds.
        rank: this process, from 0.
        world_size: processes that share a global batch; must divide it.
        tokenizer: of the text tower; None: the one that the settings ask for.
        tables: says which neighbor table an epoch reads; None: always that of ``samples``.

    Raises:
        DeclipError: the batch cannot be shared, or stored neighbor features are asked for and the
            samples have none.
    """

    def __init__(
        self,
        samples: TrainingSamples,
        settings: TrainSettings,
        rank: int,
        world_size: int,
        tokenizer: Tokenizer | None = None,
        tables: EpochTables | None = None,
    ) -> None:
        if settings.global_batch_size % world_size:
            raise DeclipError(
                f"global_batch_size {settings.global_batch_size} cannot be shared evenly by "
                f"{world_size} processes; choose a multiple."
            )
        if uses_stored(settings) and samples.stored is None:
            raise DeclipError(
                "neighbor_feature is 'stored', but the samples were listed without stored "
                "features; list them with `training_samples`."
            )
        self.samples, self.settings, self.tables = samples, settings, tables
        self.steps_per_epoch = len(samples) // settings.global_batch_size
        self.num_steps = settings.num_steps(len(samples))
        self.local_batch_size = settings.global_batch_size // world_size
        self.first = rank * self.local_batch_size
        self.num_threads = view_threads(settings)
        self.wait_seconds = 0.0
        self.image_size = settings.model_config.vision.image_size
        self.tokenizer: Tokenizer = tokenizer or build_tokenizer(settings)
        self.text_view = TextView(WordNet(settings.wordnet) if settings.wordnet else None)
        method = settings.method_parts
        rest = settings.ssl_view_parameters if method.has("simclr") else settings.view_parameters
        self._views = [settings.view_parameters, *[rest] * (method.num_views - 1)]
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_room = settings.decoded_cache_megabytes * 1_000_000
        self._cache_lock = threading.Lock()
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def global_indices(self, step: int) -> NDArray[np.int64]:
        """Samples of a whole global batch, in order; the same on every process."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.samples), self.settings.seed, epoch)
        size = self.settings.global_batch_size
        return self._order[1][place * size : (place + 1) * size]

    def local_indices(self, step: int) -> NDArray[np.int64]:
        """This process's samples of a global batch, in order."""
        return self.global_indices(step)[self.first : self.first + self.local_batch_size]

    def _decoded(self, index: int) -> NDArray[np.uint8]:
        image = self._cache.get(index)
        if image is None:
            image = decode_image(self.samples.read_image(index), self.samples.keys[index])
            with self._cache_lock:
                if image.nbytes <= self._cache_room:
                    self._cache_room -= image.nbytes
                    self._cache[index] = image
        return image

    def _images(self, indices: Sequence[int], epoch: int) -> Tensor:
        """All views of some samples: each picture is read and decoded once."""
        size = self.image_size
        planes = np.empty((len(self._views), len(indices), 3, size, size), np.float32)

        def fill(row: int) -> None:
            image, key = self._decoded(indices[row]), self.samples.keys[indices[row]]
            for view, parameters in enumerate(self._views):
                pixels = random_view(
                    image,
                    key,
                    view,
                    size=size,
                    parameters=parameters,
                    seed=self.settings.seed,
                    epoch=epoch,
                )
                normalize_into(pixels, planes[view, row])

        rows = range(len(indices))
        if self.num_threads == 1:
            for row in rows:
                fill(row)
        else:
            with ThreadPoolExecutor(self.num_threads, "views") as threads:
                for _ in threads.map(fill, rows):
                    pass
        return torch.from_numpy(planes)

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        return torch.from_numpy(self.tokenizer(captions, trim=True))

    def make_batch(self, step: int) -> Batch:
        """This process's share of the batch of ``step``: a pure function of the step."""
        indices = self.local_indices(step)
        own, epoch = indices.tolist(), step // self.steps_per_epoch
        captions = [self.samples.captions[index] for index in own]
        method = self.settings.method_parts
        texts: dict[str, Tensor] = {}
        if method.has("masked_language_modeling"):
            texts |= self._masked(own, captions, epoch)
        else:
            texts["token_ids"] = self._tokens(captions)
        if method.has("multi_view"):
            texts["second_token_ids"] = self._tokens(self._second_captions(own, captions, epoch))
        if self.settings.uses_index:
            texts |= self._neighbors(own, epoch)
        # Lengths are of the captions as they are, before words are hidden.
        ids = {"token_ids": texts.get("targets", texts["token_ids"])}
        ids |= {name: texts[name] for name in _MORE_TOKEN_IDS if name in texts}
        lengths = {n: torch.from_numpy(self.tokenizer.lengths(t.numpy())) for n, t in ids.items()}
        return Batch(
            step=step,
            epoch=epoch,
            images=self._images(own, epoch),
            lengths=lengths,
            sample_ids=torch.from_numpy(indices.copy()),
            caption_ids=torch.from_numpy(self.samples.caption_ids[indices]),
            **texts,
        )

    def _generators(
        self, indices: Sequence[int], epoch: int, purpose: str
    ) -> list[np.random.Generator]:
        seed, keys = self.settings.seed, self.samples.keys
        return [_generator(seed, epoch, purpose, keys[index]) for index in indices]

    def _masked(
        self, indices: Sequence[int], captions: Sequence[str], epoch: int
    ) -> dict[str, Tensor]:
        # At full length, so that a sample's mask does not depend on the longest of its batch.
        masked = mask_tokens(
            self.tokenizer(captions),
            self.settings.mask_probability,
            self._generators(indices, epoch, "mask"),
            self.tokenizer.mask_rules,
        )
        longest = int(self.tokenizer.lengths(masked.targets).max())
        return {
            name: torch.from_numpy(np.ascontiguousarray(array[:, :longest]))
            for name, array in masked._asdict().items()
        }

    def _second_captions(
        self, indices: Sequence[int], captions: Sequence[str], epoch: int
    ) -> list[str]:
        if not self.settings.eda:
            return list(captions)
        generators = self._generators(indices, epoch, "caption")
        return [self.text_view(*pair) for pair in zip(captions, generators, strict=True)]

    def _neighbors(self, indices: Sequence[int], epoch: int) -> dict[str, Tensor]:
        """One neighbor of each sample: its caption or stored feature, and which caption it is."""
        settings = self.settings
        samples = self._samples_of(epoch)
        places = [self._neighbor_place(index, epoch) for index in indices]
        starts = samples.neighbor_starts[indices]
        has = np.array([place is not None for place in places])
        flat = starts[has] + np.array([place for place in places if place is not None], np.int64)
        caption_ids = samples.caption_ids[indices]
        caption_ids[has] = samples.neighbor_caption_ids[flat]
        found = {
            "has_neighbor": torch.from_numpy(has),
            "neighbor_caption_ids": torch.from_numpy(caption_ids),
        }
        if settings.neighbor_feature == "stored" and samples.stored is not None:
            features = np.zeros((len(places), samples.stored.dim), np.float32)
            # Rows without a neighbor neither ask nor answer; they must only be unit vectors.
            features[:, 0] = 1
            features[has] = samples.stored.vectors(np.asarray(samples.stored_rows)[flat])
            return found | {"neighbor_features": torch.from_numpy(features)}
        captions = [
            samples.captions[index] if place is None else samples.neighbor_captions[index][place]
            for index, place in zip(indices, places, strict=True)
        ]
        return found | {"neighbor_token_ids": self._tokens(captions)}

    def _samples_of(self, epoch: int) -> TrainingSamples:
        """The samples with the neighbors that an epoch reads."""
        return self.samples if self.tables is None else self.tables.samples_of(epoch)

    def _neighbor_place(self, index: int, epoch: int) -> int | None:
        """Which of its neighbors a sample gets in an epoch; None where it has none."""
        settings, number = self.settings, len(self._samples_of(epoch).neighbor_captions[index])
        if not number:
            return None
        if settings.neighbor_choice == "rank":
            return min(settings.neighbor_rank, number) - 1
        (generator,) = self._generators([index], epoch, "neighbor")
        return int(generator.integers(min(settings.neighbor_top_k or number, number)))

    def _wait_for_table(self, step: int, stop: threading.Event) -> bool:
        """Wait until it is settled which neighbor table a step reads; False where all stops."""
        return self.tables is None or self.tables.wait(step // self.steps_per_epoch, stop)

    def _decide_ahead(self, step: int) -> None:
        """Settle the tables of all batches that the thread may prepare while ``step`` is trained.

        Which steps this does something at is the same on every process.
        """
        if self.tables is None:
            return
        ahead = min(step + self.settings.prefetch_batches + 2, self.num_steps - 1)
        for epoch in range(self.tables.last_decided + 1, ahead // self.steps_per_epoch + 1):
            self.tables.decide(epoch)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from ``start_step`` to the end of the run, prepared ahead in a thread.

        Where there is a GPU, they lie in memory that it copies from by itself. The time that
        the caller waits for one adds up in ``wait_seconds``. With tables that may be refreshed,
        asking for a batch is a collective operation, and ``tables.start`` comes before the first.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(
            self.settings.prefetch_batches
        )
        stop = threading.Event()
        pins = torch.cuda.is_available()

        def put(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in range(start_step, self.num_steps):
                    if stop.is_set() or not self._wait_for_table(step, stop):
                        return
                    batch = self.make_batch(step)
                    put(batch.pin_memory() if pins else batch)
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="batch-loader", daemon=True)
        thread.start()
        try:
            for step in itertools.count(start_step):
                self._decide_ahead(step)
                began = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
