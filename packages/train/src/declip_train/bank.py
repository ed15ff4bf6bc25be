"""The memory bank: text features of the last steps, in which a text's nearest neighbor is found.

A queue of 65,536 features (DeCLIP, arXiv 2110.05208, nearest-neighbor supervision), the same on
all processes, kept on the device and in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train import distributed

__all__ = ["BankNeighbors", "NeighborBank", "neighbor_metrics"]

_EMPTY = -1


class BankNeighbors(NamedTuple):
    """What `NeighborBank.lookup` found for B queries."""

    features: Tensor
    """(B, D) float32 (float64 for such queries), unit length; zeros where nothing was found."""
    similarity: Tensor
    """(B,) cosine with the query; 0 where nothing was found."""
    found: Tensor
    """(B,) bool."""
    caption_ids: Tensor
    """(B,) int64, the neighbor's caption; -1 where nothing was found."""


class NeighborBank(nn.Module):
    """First-in, first-out queue of text features with the sample and the caption of each.

    Everything is a registered buffer: it moves with the module, rides in `state_dict`, and a run
    that is resumed finds what a straight one would. Features stay float32 when the module is cast
    to half precision, and are compared in float32 under autocast. Neither `lookup` nor `store`
    makes the device wait for the host. With `store` gathering all processes' rows in rank order,
    the bank is at every step the same on all of them, and that of one process with the whole batch.

    Look up before storing, so that queries see the bank of earlier steps (with two text views:
    both look-ups, then both stores). A bank is empty at first and then finds nothing, while
    DeCLIP's released code starts with random vectors: those would pull the images of the first
    steps towards noise, and would be found for as long as a slot is not overwritten.

    Attributes:
        features: (size, dim) float32, unit length; zeros in empty slots.
        sample_ids: (size,) int64; -1 in empty slots.
        caption_ids: (size,) int64; -1 in empty slots.
        cursor: (1,) int64, the slot that is written next.

    Args:
        size: number of slots. A slot takes 4 dim + 16 bytes: 135 MB for 65,536 of 512 dimensions.
        dim: D, size of the features.
        block_rows: slots that are compared at once; a look-up needs memory for B x block_rows
            similarities and no more.

    Raises:
        DeclipError: a size below 1.

    Source: DeCLIP (arXiv 2110.05208), nearest-neighbor supervision; NNCLR (arXiv 2104.14548),
        section 3.2, for the queue.
    """

    features: Tensor
    sample_ids: Tensor
    caption_ids: Tensor
    cursor: Tensor

    def __init__(self, size: int = 65_536, dim: int = 512, block_rows: int = 4096) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("block_rows", block_rows)):
            if value < 1:
                raise DeclipError(
                    f"{name} of the neighbor bank is {value}, but it must be at least 1: choose a "
                    "larger number."
                )
        self.block_rows = block_rows
        self.register_buffer("features", torch.zeros(size, dim, dtype=torch.float32))
        self.register_buffer("sample_ids", torch.full((size,), _EMPTY, dtype=torch.int64))
        self.register_buffer("caption_ids", torch.full((size,), _EMPTY, dtype=torch.int64))
        self.register_buffer("cursor", torch.zeros(1, dtype=torch.int64))

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.features.shape[0]

    @property
    def dim(self) -> int:
        """Size of the features."""
        return self.features.shape[1]

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, block_rows={self.block_rows}"

    def num_entries(self) -> Tensor:
        """Number of slots that hold a feature, as a tensor on the device."""
        return (self.sample_ids != _EMPTY).sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeighborBank:
        # `module.half()`, which DeepSpeed calls, would round what is stored; a move may pass.
        before = self.features
        cast(Any, super())._apply(fn, recurse)  # Torch ships it without types.
        if self.features.dtype != before.dtype:
            self.features = before.to(self.features.device)
        return self

    def _refuse_misfits(self, rows: Tensor, **ids: Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(
                f"The neighbor bank was given features {tuple(rows.shape)}, but holds vectors of "
                f"{self.dim}: give (batch, {self.dim})."
            )
        for name, values in ids.items():
            if values.shape != rows.shape[:1] or values.dtype != torch.int64:
                raise ValueError(
                    f"{name} are {tuple(values.shape)} {values.dtype}, but must be "
                    f"({rows.shape[0]},) torch.int64, one for each feature."
                )

    @torch.no_grad()
    def lookup(self, queries: Tensor, sample_ids: Tensor) -> BankNeighbors:
        """Find each query's nearest feature among those of other samples.

        A stored feature of the query's own sample (of one epoch ago, or of another view) is passed
        over; one of another sample with the same caption is not, and `neighbor_metrics` counts
        those. Of equally near ones the lowest slot is taken.

        Args:
            queries: (B, D), of any length; no gradient.
            sample_ids: (B,) int64, at least 0.

        Returns:
            The neighbors. Nothing is found while no other sample is in the bank.

        Raises:
            ValueError: the shapes do not fit.
        """
        self._refuse_misfits(queries, sample_ids=sample_ids)
        with torch.autocast(queries.device.type, enabled=False):
            wanted = F.normalize(queries.float(), dim=-1)
            slot = self._nearest_slots(wanted, sample_ids)
            found = slot != _EMPTY
            slot = slot.clamp(min=0)
            features = self.features.index_select(0, slot) * found[:, None]
            # Once more and exactly: products of matrices may be rounded (TF32), and their last bits
            # depend on the number of rows.
            similarity = (wanted * features).sum(dim=-1)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        return BankNeighbors(
            features=features.to(dtype),
            similarity=similarity.to(dtype),
            found=found,
            caption_ids=self.caption_ids.index_select(0, slot).masked_fill(~found, _EMPTY),
        )

    def _nearest_slots(self, wanted: Tensor, sample_ids: Tensor) -> Tensor:
        """Slot (B,) of the nearest allowed feature, -1 where there is none; block by block."""
        best = wanted.new_full(wanted.shape[:1], -torch.inf)
        slot = torch.full_like(sample_ids, _EMPTY)
        for start in range(0, self.size, self.block_rows):
            stop = min(start + self.block_rows, self.size)
            owners = self.sample_ids[start:stop]
            barred = (owners == _EMPTY) | (owners == sample_ids[:, None])
            similarity = (wanted @ self.features[start:stop].T).masked_fill_(barred, -torch.inf)
            value, index = similarity.max(dim=1)
            nearer = value > best
            best = torch.where(nearer, value, best)
            slot = torch.where(nearer, index + start, slot)
        return slot

    @torch.no_grad()
    def store(self, features: Tensor, sample_ids: Tensor, caption_ids: Tensor) -> None:
        """Append the rows of all processes, in rank order, over the oldest entries.

        Call it once the step's loss was found finite. A row that is not finite, or has no length,
        leaves its slot empty instead: one such row would otherwise spoil every later look-up.

        Args:
            features: (B, D), of any length, the same B on all processes; they are normalized, and
                no gradient flows into them.
            sample_ids: (B,) int64, at least 0.
            caption_ids: (B,) int64.

        Raises:
            DeclipError: the rows of all processes are more than the bank's size.
            ValueError: the shapes do not fit.
        """
        self._refuse_misfits(features, sample_ids=sample_ids, caption_ids=caption_ids)
        rows = features.shape[0] * distributed.world_size()
        if rows > self.size:
            raise DeclipError(
                f"bank_size is {self.size}, but a step brings {rows} features at once: set "
                f"bank_size to at least {rows}, or lower global_batch_size."
            )
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features.float(), dim=-1)
            usable = (unit.square().sum(dim=-1) - 1).abs() < 0.5  # NaN, too, makes this false.
            unit = torch.where(usable[:, None], unit, 0.0)
            ids = torch.stack((sample_ids, caption_ids), dim=1)
            ids = torch.where(usable[:, None], ids, _EMPTY)
        unit, ids = _gather_entries(unit, ids)
        slots = (self.cursor + torch.arange(rows, device=self.cursor.device)) % self.size
        self.features.index_copy_(0, slots, unit)
        self.sample_ids.index_copy_(0, slots, ids[:, 0])
        self.caption_ids.index_copy_(0, slots, ids[:, 1])
        self.cursor.add_(rows).remainder_(self.size)


def _gather_entries(unit: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, D) float32 with their ids (B, 2) int64 of all processes, in rank order."""
    processes = distributed.world_size()
    if processes == 1:
        return unit, ids
    # The bits of both travel as whole numbers, in one collective.
    parts = [part.contiguous().view(torch.int32) for part in (unit, ids)]
    own = torch.cat(parts, dim=1)
    gathered = own.new_empty((processes * own.shape[0], own.shape[1]))
    dist.all_gather_into_tensor(gathered, own)
    widths = [part.shape[1] for part in parts]
    of_unit, of_ids = torch.split(gathered, widths, dim=1)
    return of_unit.contiguous().view(torch.float32), of_ids.contiguous().view(torch.int64)


@torch.no_grad()
def neighbor_metrics(
    own_caption_ids: Tensor,
    neighbor_caption_ids: Tensor,
    has_neighbor: Tensor,
    similarity: Tensor,
) -> dict[str, Tensor]:
    """How much the neighbors say that the own captions do not; for the bank and the index alike.

    All three figures are means over the local rows, those without a neighbor counting 0. So they
    need no collective of their own: the mean over processes, which have as many rows each, is that
    of the whole batch, and there, after averaging, the last two divided by `neighbor_found` are
    means over the rows that have a neighbor. (Dividing on each process first would weigh the rows
    of a process with few neighbors too much.)

    Args:
        own_caption_ids: (R,) int64; rows of several views may be concatenated.
        neighbor_caption_ids: (R,) int64; read where there is a neighbor.
        has_neighbor: (R,) bool.
        similarity: (R,) cosines of the own text and the neighbor; read where there is a neighbor.

    Returns:
        Scalars in float32: `neighbor_found`, the share of rows with a neighbor; `neighbor_differs`,
        the share of rows with one of another caption; `neighbor_similarity`, the sum of the
        similarities of the neighbors over the number of rows.

    Raises:
        ValueError: the shapes differ, or there is no row.
    """
    given = {
        "own_caption_ids": own_caption_ids,
        "neighbor_caption_ids": neighbor_caption_ids,
        "has_neighbor": has_neighbor,
        "similarity": similarity,
    }
    shape = own_caption_ids.shape
    if len(shape) != 1 or not shape[0] or any(v.shape != shape for v in given.values()):
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in given.items())
        raise ValueError(
            f"Neighbor metrics were given {shapes}: give vectors of one length with at least one "
            "row."
        )
    differs = has_neighbor & (own_caption_ids != neighbor_caption_ids)
    return {
        "neighbor_found": has_neighbor.float().mean(),
        "neighbor_differs": differs.float().mean(),
        # Not a product: what stands in a row without a neighbor may be anything.
        "neighbor_similarity": torch.where(has_neighbor, similarity.float(), 0.0).mean(),
    }
