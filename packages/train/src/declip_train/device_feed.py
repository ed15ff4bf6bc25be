"""Batches on their way to a GPU while it computes the ones before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from declip_train.batch import Batch

__all__ = ["DeviceFeed"]


class DeviceFeed:
    """Sends batches to a GPU in a stream of their own, one ahead of the one in use.

    Copies out of pinned memory and the colors of views then overlap with the step that is being
    computed; the computing stream waits for a batch only if it has overtaken it. Memory of the GPU
    beyond the batch in use: one batch with its views as float32.

    Args:
        device: a CUDA device; of any other one batches are taken as they were sent.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._sent: tuple[Batch, Any] | None = None

    @property
    def works_ahead(self) -> bool:
        """Whether sending early is of any use: copies go on beside the computation."""
        return self._stream is not None

    @property
    def is_empty(self) -> bool:
        """Whether no batch is on its way."""
        return self._sent is None

    def send(self, batch: Batch) -> None:
        """Begin to send a batch, pinned or not; the one before must have been taken.

        Raises:
            ValueError: it was not.
        """
        if self._sent is not None:
            raise ValueError("a batch is on its way already: take it before the next is sent.")
        if self._stream is None:
            self._sent = batch, None
            return
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device)
            self._sent = moved, self._stream.record_event()

    def take(self) -> Batch:
        """The batch that was sent, for the current stream to use.

        Raises:
            ValueError: none was.
        """
        if self._sent is None:
            raise ValueError("no batch is on its way: send one before.")
        (batch, event), self._sent = self._sent, None
        if self._stream is None:
            return batch
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)

        def in_use(_: str, value: Tensor) -> Tensor:
            # Or its memory could be given to the next batch before this stream is done with it.
            value.record_stream(current)
            return value

        return batch.with_tensors(in_use)
