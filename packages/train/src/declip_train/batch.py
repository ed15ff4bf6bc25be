"""A batch as the loader hands it to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from declip_train.device_views import ColorBatch, photometric

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's share of a global batch: n samples; L, M, K are lengths in tokens.

    Every row of token ids has its end token, also an empty caption's, which is start and end.
    """

    step: int
    """Which step of the run this is for, from 0."""
    epoch: int
    """Which pass over the data the global batch's first sample belongs to, from 0."""
    images: Tensor
    """(views, n, 3, size, size) float32, normalized. One view for clip and filip; two alike for
    declip and defilip; for slip the base view, then two self-supervised ones. With ``colors``:
    (views, n, size, size, 3) uint8, red first, cropped, resized and mirrored, colors as they
    were."""
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
    colors: ColorBatch | None = None
    """Color changes that are still to be made, of (views * n) views, a view of all samples after
    the other; None: none. :meth:`to` makes them."""
    lengths: Mapping[str, Tensor] = field(default_factory=dict)
    """(n,) int64 tokens of each row, by the name of the field of token ids. They stay on the host,
    which would otherwise have to wait for a GPU to learn how long captions are."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def with_tensors(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        """The batch with ``change(name, value)`` in place of each tensor but ``lengths`` and
        ``colors``, which stay on the host."""
        changed: dict[str, Any] = {
            name: change(name, value)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``, with the colors of its views changed there."""
        moved = self.with_tensors(lambda _, value: value.to(device, non_blocking=True))
        if self.colors is None:
            return moved
        views = photometric(moved.images.flatten(0, 1), self.colors)
        shape = (*moved.images.shape[:2], *views.shape[1:])
        return replace(moved, images=views.view(shape), colors=None)

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can copy from while it computes."""
        pinned = self.with_tensors(lambda _, value: value.pin_memory())
        return pinned if self.colors is None else replace(pinned, colors=self.colors.pin_memory())

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
            part = self.with_tensors(
                lambda name, value: value.narrow(int(name == "images"), first, rows)
            )
            lengths = {name: value.narrow(0, first, rows) for name, value in self.lengths.items()}
            return replace(part, lengths=lengths, colors=self._colors_of(first, rows))

        return [cut(part * rows) for part in range(parts)]

    def _colors_of(self, first: int, rows: int) -> ColorBatch | None:
        """Color changes of some samples, in all views."""
        if self.colors is None:
            return None
        shape = self.images.shape[:2]
        return self.colors.map(
            lambda value: value.view(*shape, *value.shape[1:]).narrow(1, first, rows).flatten(0, 1)
        )
