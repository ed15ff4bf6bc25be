"""Batches of views and token ids: the same global batches however many processes share them.

The order is a permutation drawn from (seed, epoch); global batch ``b`` is its ``b``-th slice, and a
process takes its part of the slice. Step numbers count through all epochs, so the place of a run in
its data is the step and nothing else, and resuming is starting at another step.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from declip_shards import DeclipError
from declip_train.augment import decode_image, random_views, to_tensor
from declip_train.samples import TrainingSamples
from declip_train.settings import TrainSettings
from declip_train.text_views import TextView
from declip_train.tokenizer import CaptionTokenizer, mask_tokens
from declip_train.wordnet import WordNet

# Names of the random streams; each is a pure function of the seed and of what it is drawn for.
_ORDER, _MASKS = 1, 2


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's share of a global batch: n samples; L, M, K are lengths in tokens."""

    step: int
    """Which step of the run this is for, from 0."""
    epoch: int
    """Which pass over the data, from 0."""
    images: Tensor
    """(views, n, 3, size, size) float32, normalized; two views, one for method clip."""
    token_ids: Tensor
    """(n, L) int64; some replaced for masked language modeling (method declip)."""
    replaced: Tensor | None = None
    """(n, L) bool: where the mask embedding stands in."""
    mask_positions: Tensor | None = None
    """(n, L) bool: which tokens are to be predicted."""
    targets: Tensor | None = None
    """(n, L) int64: the original ids."""
    second_token_ids: Tensor | None = None
    """(n, M) int64: the second view of the caption."""
    neighbor_token_ids: Tensor | None = None
    """(n, K) int64: a neighbor's caption; the sample's own where it has none."""
    has_neighbor: Tensor | None = None
    """(n,) bool: whether it is a neighbor's."""

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permutation of the samples in one epoch: a pure function of the arguments."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(num_samples)


def _caption_generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    text = f"{seed}/{epoch}/caption/{key}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=number))


class BatchLoader:
    """Prepares batches in a background thread.

    Args:
        samples: what to train on.
        settings: batch size, views, seeds.
        rank: this process, from 0.
        world_size: processes that share a global batch; must divide it.
    """

    def __init__(
        self, samples: TrainingSamples, settings: TrainSettings, rank: int, world_size: int
    ) -> None:
        if settings.global_batch_size % world_size:
            raise DeclipError(
                f"global_batch_size {settings.global_batch_size} cannot be shared evenly by "
                f"{world_size} processes; choose a multiple."
            )
        self.samples, self.settings = samples, settings
        self.steps_per_epoch = len(samples) // settings.global_batch_size
        self.num_steps = settings.num_steps(len(samples))
        self.micro_batch_size = settings.global_batch_size // world_size
        self.first = rank * self.micro_batch_size
        self.wait_seconds = 0.0
        config = settings.model_config
        self.image_size = config.vision.image_size
        self.tokenizer = CaptionTokenizer(config.text.context_length)
        self.text_view = TextView(WordNet(settings.wordnet) if settings.wordnet else None)
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_room = settings.decoded_cache_megabytes * 1_000_000
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def global_indices(self, step: int) -> NDArray[np.int64]:
        """Samples of a whole global batch, in order; the same on every process."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.samples), self.settings.seed, epoch)
        size = self.settings.global_batch_size
        return self._order[1][place * size : (place + 1) * size]

    def _decoded(self, index: int) -> NDArray[np.uint8]:
        image = self._cache.get(index)
        if image is None:
            image = decode_image(self.samples.read_image(index), self.samples.keys[index])
            if image.nbytes <= self._cache_room:
                self._cache_room -= image.nbytes
                self._cache[index] = image
        return image

    def _images(self, indices: Sequence[int], epoch: int, num_views: int) -> Tensor:
        views = random_views(
            [self._decoded(index) for index in indices],
            [self.samples.keys[index] for index in indices],
            size=self.image_size,
            parameters=self.settings.view_parameters,
            seed=self.settings.seed,
            epoch=epoch,
            num_views=num_views,
        )
        return to_tensor(views)

    def _tokens(self, captions: Sequence[str]) -> NDArray[np.int64]:
        return self.tokenizer(captions, trim=True)

    def make_batch(self, step: int) -> Batch:
        """This process's share of the batch of ``step``: a pure function of the step."""
        everyone = self.global_indices(step).tolist()
        own = everyone[self.first : self.first + self.micro_batch_size]
        epoch = step // self.steps_per_epoch
        captions = [self.samples.captions[index] for index in everyone]
        if self.settings.method == "clip":
            mine = captions[self.first : self.first + len(own)]
            return Batch(
                step=step,
                epoch=epoch,
                images=self._images(own, epoch, 1),
                token_ids=torch.from_numpy(self._tokens(mine)),
            )
        # Masks are drawn for the whole batch and cut, so that they do not depend on how many
        # processes share it; for the same reason at the full length.
        masked = mask_tokens(
            self.tokenizer(captions),
            self.settings.mask_probability,
            np.random.default_rng([self.settings.seed, _MASKS, step]),
        )
        rows = slice(self.first, self.first + len(own))
        ends = masked.token_ids[rows].argmax(axis=1)
        columns = slice(0, int(ends.max()) + 1)
        seconds, neighbors, has_neighbor = self._caption_views(own, epoch)
        return Batch(
            step=step,
            epoch=epoch,
            images=self._images(own, epoch, 2),
            **{
                name: torch.from_numpy(np.ascontiguousarray(array[rows, columns]))
                for name, array in masked._asdict().items()
            },
            second_token_ids=torch.from_numpy(self._tokens(seconds)),
            neighbor_token_ids=torch.from_numpy(self._tokens(neighbors)),
            has_neighbor=torch.tensor(has_neighbor),
        )

    def _caption_views(
        self, indices: Sequence[int], epoch: int
    ) -> tuple[list[str], list[str], list[bool]]:
        """Second views, neighbor captions, and which samples have a neighbor."""
        settings = self.settings
        seconds: list[str] = []
        neighbors: list[str] = []
        has_neighbor: list[bool] = []
        for index in indices:
            caption, near = self.samples.captions[index], self.samples.neighbor_captions[index]
            generator = _caption_generator(settings.seed, epoch, self.samples.keys[index])
            place = int(generator.integers(len(near))) if near else 0
            neighbors.append(
                near[place if settings.neighbor_choice == "sample" else 0] if near else caption
            )
            has_neighbor.append(bool(near))
            seconds.append(self.text_view(caption, generator) if settings.eda else caption)
        return seconds, neighbors, has_neighbor

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from ``start_step`` to the end of the run, prepared ahead in a thread.

        The time that the caller waits for one adds up in ``wait_seconds``.
        """
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(
            self.settings.prefetch_batches
        )
        stop = threading.Event()

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
                    if stop.is_set():
                        return
                    put(self.make_batch(step))
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="batch-loader", daemon=True)
        thread.start()
        try:
            while True:
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
