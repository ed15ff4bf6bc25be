"""Which samples a global batch holds: a pure function of the step.

All epochs form one endless sequence, and batch ``b`` of size B holds its positions [bB, (b+1)B). An
epoch shows every sample once (or as often as its weight says), so no sample is dropped at an
epoch's end: a batch takes what is left of one epoch and begins the next. Rank r of R takes the r-th
R-th of a batch. Nothing here depends on ranks, threads or restarts, so the place of a run in its
data is the number of its step and nothing else, and every process takes equally many steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchOrder", "BatchShare", "shuffled_samples"]

_AHEAD = 1 / 16
"""Part of an epoch that is still to come when the next one's order is drawn."""


class BatchShare(NamedTuple):
    """Samples of a batch, or of one process's part of it, in order."""

    indices: NDArray[np.int64]
    """(n,): rows among the training samples."""
    epochs: NDArray[np.int64]
    """(n,): the pass over the data that each belongs to, from 0; ascending, at most two."""
    places: NDArray[np.int64] | None = None
    """(n,): where in its pass each stands; None where no pass has a sample twice."""

    def streams(self, keys: Sequence[str]) -> list[str]:
        """Names of the samples' random streams in their pass: their keys, and where a pass has one
        of them twice also its place, so that it looks different each time."""
        if self.places is None:
            return list(keys)
        return [f"{key}@{place}" for key, place in zip(keys, self.places.tolist(), strict=True)]


def shuffled_samples(
    num_samples: int, *, seed: int, epoch: int, fingerprint: str
) -> NDArray[np.int64]:
    """(num_samples,): the samples of one epoch, each once, in an order drawn from the arguments.

    Args:
        num_samples: how many there are.
        seed: of the run.
        epoch: from 0.
        fingerprint: of the data; other data are in another order.
    """
    text = f"order/{seed}/{epoch}/{fingerprint}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.PCG64(number)).permutation(num_samples)


class BatchOrder:
    """Global batches and their parts.

    Orders of at most two epochs are held, 4 bytes a sample each (8 above two thousand million); the
    next epoch's is drawn in a thread while the end of the present one is trained on.

    Args:
        epoch_length: samples of an epoch, the same in each.
        batch_size: samples of a global batch; at most ``epoch_length``.
        draw: (epoch) -> (epoch_length,) rows of its samples in order; a pure function, called once
            for each epoch as a rule, from several threads.
        repeats: whether an epoch may have a sample more than once.

    Raises:
        ValueError: the batch is empty or larger than an epoch.
    """

    def __init__(
        self,
        epoch_length: int,
        batch_size: int,
        draw: Callable[[int], NDArray[np.int64]],
        *,
        repeats: bool = False,
    ) -> None:
        if not 1 <= batch_size <= epoch_length:
            raise ValueError(
                f"a batch of {batch_size} samples cannot be cut from epochs of {epoch_length}."
            )
        self.epoch_length, self.batch_size = epoch_length, batch_size
        self._draw, self._repeats = draw, repeats
        self._lock = threading.Lock()
        self._drawn: dict[int, Future[NDArray[np.integer]]] = {}

    def epochs_of(self, step: int) -> range:
        """Passes over the data that a batch holds samples of: one or two."""
        first = step * self.batch_size
        return range(
            first // self.epoch_length, (first + self.batch_size - 1) // self.epoch_length + 1
        )

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> BatchShare:
        """Samples of the batch of ``step`` that are process ``rank``'s; all of them by default.

        Raises:
            ValueError: the batch cannot be shared evenly, or there is no such step or rank.
        """
        if step < 0 or not 0 <= rank < world_size or self.batch_size % world_size:
            raise ValueError(
                f"there is no part {rank} of {world_size} of batch {step}, of {self.batch_size} "
                "samples."
            )
        local = self.batch_size // world_size
        positions = step * self.batch_size + rank * local + np.arange(local)
        epochs, places = np.divmod(positions, self.epoch_length)
        indices = np.empty(local, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            own = epochs == epoch
            indices[own] = self._sequence(epoch)[places[own]]
        return BatchShare(indices, epochs, places if self._repeats else None)

    def prepare(self, step: int) -> None:
        """Begin to draw the next epoch's order where the one of ``step`` is near its end, and
        forget those that are over."""
        position = step * self.batch_size
        epoch = position // self.epoch_length
        with self._lock:
            self._drawn = {e: order for e, order in self._drawn.items() if e in (epoch, epoch + 1)}
            known = epoch + 1 in self._drawn
        if not known and (epoch + 1) * self.epoch_length - position <= max(
            self.epoch_length * _AHEAD, 2 * self.batch_size
        ):
            threading.Thread(
                target=self._draw_ahead, args=(epoch + 1,), name="epoch-order", daemon=True
            ).start()

    def _draw_ahead(self, epoch: int) -> None:
        # Whoever needs the order draws it again and meets the same fault, where it can be told.
        with contextlib.suppress(Exception):
            self._sequence(epoch)

    def _sequence(self, epoch: int) -> NDArray[np.integer]:
        """An epoch's order; whoever asks first draws it, others wait."""
        with self._lock:
            order = self._drawn.get(epoch)
            first = order is None
            if order is None:
                self._forget_for(epoch)
                order = self._drawn[epoch] = Future()
        if first:
            try:
                order.set_result(self._narrow(self._draw(epoch)))
            except BaseException as error:
                with self._lock:
                    self._drawn.pop(epoch, None)
                order.set_exception(error)
        return order.result()

    def _forget_for(self, epoch: int) -> None:
        """Make room: of the epochs held, the ones farthest from a new one go."""
        while len(self._drawn) > 1:
            del self._drawn[max(self._drawn, key=lambda held: abs(held - epoch))]

    def _narrow(self, order: NDArray[np.int64]) -> NDArray[np.integer]:
        if len(order) != self.epoch_length:
            raise ValueError(
                f"an epoch was drawn with {len(order)} samples in place of {self.epoch_length}."
            )
        fits = self.epoch_length == 0 or int(order.max()) <= np.iinfo(np.int32).max
        return order.astype(np.int32) if fits else order
