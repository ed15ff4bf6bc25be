"""Batches of views and token ids: the same global batches however many processes share them.

Which samples a batch holds is a pure function of its step (:mod:`batch_order`), and what a sample
looks and reads like is one of (seed, epoch, key). So the place of a run in its data is the step and
nothing else, and resuming is starting at another step.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from declip_shards import DeclipError
from declip_train.batch import Batch
from declip_train.batch_order import BatchOrder
from declip_train.batch_texts import TextMaker
from declip_train.device_feed import DeviceFeed
from declip_train.epoch_tables import EpochTables
from declip_train.failed_samples import FailedSample, FailedSamples
from declip_train.hf_clip import build_tokenizer
from declip_train.loader_clock import PhaseClock
from declip_train.picture_views import ViewMaker
from declip_train.samples import TrainingSamples, uses_stored
from declip_train.settings import TrainSettings
from declip_train.tokenizer import Tokenizer

__all__ = ["Batch", "BatchLoader", "colors_on_device", "view_threads"]

_BEGUN = 2
"""Batches that are in the making at once, so that threads need not wait for a batch's last view."""


def view_threads(settings: TrainSettings) -> int:
    """Threads that draw views; the pixels do not depend on them."""
    if settings.loader_threads is not None:
        return settings.loader_threads
    if torch.cuda.is_available():
        return max(1, len(os.sched_getaffinity(0)) // _processes_here(settings))
    return settings.threads_per_rank


def _processes_here(settings: TrainSettings) -> int:
    """Processes of the run on this machine, as DeepSpeed's launcher and torchrun tell them;
    ``num_ranks`` counts those of all machines."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if os.environ.get(name):
            return int(os.environ[name])
    return settings.num_ranks


def _require_equal_samples(samples: TrainingSamples, world_size: int) -> None:
    """Refuse processes that listed other data: each would take its part of another order.

    Raises:
        DeclipError: some did; on every process.
    """
    if world_size == 1 or not dist.is_initialized():
        return
    own = f"{len(samples):,} samples, {samples.digest()[:12]}"
    everyone: list[str] = [""] * world_size
    dist.all_gather_object(everyone, own)
    others = [number for number, found in enumerate(everyone) if found != everyone[0]]
    if others:
        raise DeclipError(
            f"process 0 found {everyone[0]} to train on, process {others[0]} {everyone[others[0]]}:"
            " the machines hold other shards, selections or neighbor tables, or these were changed "
            "while the run started; copy the dataset anew, or start again."
        )


def colors_on_device(settings: TrainSettings) -> bool:
    """Whether the colors of views change in batches on the device that trains."""
    if settings.photometric == "auto":
        return torch.cuda.is_available()
    return settings.photometric == "device"


class BatchLoader:
    """Prepares batches in a background thread, and pictures in ``view_threads`` more.

    Memory, beside the columns of the samples: ``prefetch_batches`` finished batches and three more
    (two in the making, one in training), the order of an epoch (4 bytes a sample, twice that near
    an epoch's end), and ``decoded_cache_megabytes`` of decoded pictures.

    Args:
        samples: what to train on.
        settings: batch size, views, seeds.
        rank: this process, from 0.
        world_size: processes that share a global batch; must divide it.
        tokenizer: of the text tower; None: the one that the settings ask for.
        tables: says which neighbor table an epoch reads; None: always that of ``samples``.

    Raises:
        DeclipError: the batch cannot be shared or is larger than an epoch, stored neighbor features
            are asked for and the samples have none, or the cache cannot be written.
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
        self.rank, self.world_size = rank, world_size
        self.num_steps = settings.num_steps(samples.epoch_length)
        self.order = BatchOrder(
            samples.epoch_length,
            settings.global_batch_size,
            lambda epoch: samples.epoch_sequence(settings.seed, epoch),
            repeats=any(weight > 1 for weight in samples.weights),
        )
        self.steps_per_epoch = samples.epoch_length / settings.global_batch_size
        self.local_batch_size = settings.global_batch_size // world_size
        self.num_threads = view_threads(settings)
        self.wait_seconds = 0.0
        self.clock = PhaseClock()
        self.failures = FailedSamples(samples.epoch_length, settings.error_budget)
        self.image_size = settings.model_config.vision.image_size
        self.tokenizer: Tokenizer = tokenizer or build_tokenizer(settings)
        self.texts = TextMaker(
            samples, settings, tokenizer=self.tokenizer, tables=tables, clock=self.clock
        )
        self.pictures = ViewMaker(
            samples,
            settings,
            num_threads=self.num_threads,
            failures=self.failures,
            clock=self.clock,
            on_device=colors_on_device(settings),
        )

    def epochs_of(self, step: int) -> range:
        """Passes over the data that the batch of ``step`` holds samples of: one or two, from 0.

        A neighbor table is read from the first batch on that holds a sample of its epoch.
        """
        return self.order.epochs_of(step)

    def global_indices(self, step: int) -> NDArray[np.int64]:
        """Samples of a whole global batch, in order; the same on every process."""
        return self.order.share(step).indices

    def local_indices(self, step: int) -> NDArray[np.int64]:
        """This process's samples of a global batch, in order, before any fails."""
        return self.order.share(step, self.rank, self.world_size).indices

    def take_failures(self) -> list[FailedSample]:
        """This process's samples that could not be read or decoded, since the last call."""
        return self.failures.take()

    def count_failures(self, failures: Iterable[FailedSample]) -> None:
        """Hold the failures that all processes took against the error budget.

        Raises:
            DeclipError: it is exceeded; on every process, if all are given the same.
        """
        self.failures.count_all(failures)

    def make_batch(self, step: int) -> Batch:
        """This process's share of the batch of ``step``: a pure function of the step.

        Raises:
            DeclipError: more pictures cannot be used than the error budget allows.
        """
        return self._start(step)()

    def _start(self, step: int, *, pinned: bool = False) -> Callable[[], Batch]:
        """Begin a batch; the result finishes it, and batches are finished in order."""
        share = self.order.share(step, self.rank, self.world_size)
        views = self.pictures.start(share, pinned=pinned)

        def finish() -> Batch:
            pictures = views()
            indices, passes = pictures.indices, self.epochs_of(step)
            texts, lengths = self.texts.make(share._replace(indices=indices), passes)
            return Batch(
                step=step,
                epoch=passes[0],
                images=pictures.images,
                colors=pictures.colors,
                lengths=lengths,
                sample_ids=torch.from_numpy(indices),
                caption_ids=torch.from_numpy(self.samples.caption_ids_of(indices)),
                **texts,
            )

        return finish

    def _wait_for_table(self, step: int, stop: threading.Event) -> bool:
        """Wait until it is settled which neighbor tables a step reads; False where all stops."""
        return self.tables is None or all(
            self.tables.wait(epoch, stop) for epoch in self.epochs_of(step)
        )

    def _decide_ahead(self, step: int) -> None:
        """Settle the tables of all batches that the thread may prepare while ``step`` is trained.

        Which steps this does something at is the same on every process.
        """
        if self.tables is None:
            return
        ahead = min(step + self.settings.prefetch_batches + 2, self.num_steps - 1)
        for epoch in range(self.tables.last_decided + 1, self.epochs_of(ahead)[-1] + 1):
            self.tables.decide(epoch)

    def batches(self, start_step: int, device: torch.device | None = None) -> Iterator[Batch]:
        """Batches from ``start_step`` to the end of the run, prepared ahead in a thread.

        The time that the caller waits for one adds up in ``wait_seconds``. Asking for the first
        batch is a collective operation (processes that hold other samples are refused), and with
        tables that may be refreshed for each; ``tables.start`` comes before the first.

        Args:
            start_step: from 0.
            device: a GPU that the batches lie on, finished; while one is computed, the next is sent
                there if it is ready. None: they lie on the host, where there is a GPU in memory
                that it copies from by itself.

        Raises:
            DeclipError: a process holds other samples than process 0; or see :meth:`make_batch`.
        """
        _require_equal_samples(self.samples, self.world_size)
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(
            self.settings.prefetch_batches
        )
        stop = threading.Event()
        thread = threading.Thread(
            target=self._work, args=(start_step, ready, stop), name="batch-loader", daemon=True
        )
        thread.start()
        feed = DeviceFeed(device or torch.device("cpu"))
        try:
            for step in itertools.count(start_step):
                self._decide_ahead(step)
                if feed.is_empty:
                    began = time.perf_counter()
                    item = ready.get()
                    self.wait_seconds += time.perf_counter() - began
                    if not self._sent(item, feed):
                        return
                batch = feed.take()
                if feed.works_ahead and not ready.empty():
                    # Nobody else takes from the queue, so this does not wait.
                    last = not self._sent(ready.get(), feed)
                    yield batch
                    if last:
                        return
                else:
                    yield batch
        finally:
            stop.set()
            thread.join()
            self.pictures.close()

    @staticmethod
    def _sent(item: Batch | BaseException | None, feed: DeviceFeed) -> bool:
        """Send what the thread made; False at the end. A fault of it is raised here."""
        if isinstance(item, BaseException):
            raise item
        if item is not None:
            feed.send(item)
        return item is not None

    def _work(
        self,
        start_step: int,
        ready: queue.Queue[Batch | BaseException | None],
        stop: threading.Event,
    ) -> None:
        """Make the batches, in order; what goes wrong is handed on in place of one."""
        pins = torch.cuda.is_available()

        def put(item: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def finish(begun: deque[Callable[[], Batch]]) -> None:
            batch = begun.popleft()()
            put(batch.pin_memory() if pins else batch)

        try:
            begun: deque[Callable[[], Batch]] = deque()
            # A single thread ends one batch before it begins the next.
            most = 1 if self.num_threads == 1 else _BEGUN
            for step in range(start_step, self.num_steps):
                if stop.is_set() or not self._wait_for_table(step, stop):
                    return
                self.order.prepare(step)
                begun.append(self._start(step, pinned=pins))
                if len(begun) == most:
                    finish(begun)
            while begun and not stop.is_set():
                finish(begun)
            put(None)
        except BaseException as error:
            put(error)
