"""Nearest neighbor graphs: what one is, what it is made from, and how lists are merged."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from declip_shards import DeclipError

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float16] | npt.NDArray[np.float32]


class Matrix(Protocol):
    """Vectors of unit length, of which only what is asked for is read."""

    @property
    def num_rows(self) -> int:
        """How many vectors there are."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    def read(self, start: int, stop: int) -> Floats:
        """Rows ``start`` to ``stop`` (not included): (stop - start, dim)."""

    def take(self, rows: Rows) -> Floats:
        """The rows named, in the order named: (len(rows), dim)."""


@dataclass(frozen=True)
class ArrayVectors:
    """A :class:`Matrix` of an array in memory, or mapped: (num_rows, dim), float16 or float32."""

    array: Floats

    def __post_init__(self) -> None:
        if self.array.ndim != 2 or self.array.dtype not in (np.float16, np.float32):
            raise DeclipError(
                f"vectors are {self.array.dtype} of shape {self.array.shape}; give float16 or "
                "float32 of shape (rows, dim)."
            )

    @property
    def num_rows(self) -> int:
        return int(self.array.shape[0])

    @property
    def dim(self) -> int:
        return int(self.array.shape[1])

    def read(self, start: int, stop: int) -> Floats:
        return self.array[start:stop]

    def take(self, rows: Rows) -> Floats:
        return self.array[rows]


@dataclass(frozen=True)
class Graph:
    """The nearest rows of each row, best first; of equal ones the lower row first.

    A row is never in its own list. Where fewer than k were found, ids are -1 and scores -inf.
    """

    ids: Ids
    """int64 (rows, k)"""
    scores: Scores
    """float32 (rows, k): inner products, the cosine of unit vectors"""
    recall: float | None = None
    """Share of the true k nearest that the lists hold, measured on a sample of rows against
    exact search; 1 for an exact graph, none where it was not measured."""

    @property
    def num_rows(self) -> int:
        return int(self.ids.shape[0])

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])


def check_k(k: int, num_rows: int) -> None:
    """Refuse lists of no length, and matrices of fewer than two rows.

    Raises:
        DeclipError: the value, the limit and the remedy.
    """
    if k < 1:
        raise DeclipError(f"k is {k}; a list needs at least 1 neighbor.")
    if num_rows < 2:
        raise DeclipError(f"there are {num_rows} vectors; neighbors need at least 2.")


def check_groups(groups: Rows | None, num_rows: int) -> None:
    """Refuse groups that are not one integer a row.

    Raises:
        DeclipError: the shape that was given and the one that is due.
    """
    if groups is None:
        return
    if groups.shape != (num_rows,) or not np.issubdtype(groups.dtype, np.integer):
        raise DeclipError(
            f"groups are {groups.dtype} of shape {groups.shape}; give one integer for each of the "
            f"{num_rows} vectors."
        )


def order_lists(
    scores: "torch.Tensor",
    ids: "torch.Tensor",
    k: int,
    groups: "torch.Tensor | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The best k of each row of candidates: by score, then by id; each id once.

    Args:
        scores: (rows, candidates); -inf marks what is not there.
        ids: int64 (rows, candidates).
        k: length of the lists; where there are fewer candidates the lists are shorter.
        groups: int64 (number of all vectors,): a list gets the best of each group only.

    Returns:
        Scores and ids (rows, min(k, candidates)); -inf and -1 where nothing is left.
    """
    import torch

    ids, by_id = torch.sort(ids, dim=1)
    scores = scores.gather(1, by_id)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    scores = scores.masked_fill(repeated, -torch.inf)
    scores, by_score = torch.sort(scores, dim=1, descending=True, stable=True)
    ids = ids.gather(1, by_score)
    if groups is not None:
        members = groups[ids.clamp_min(0)].masked_fill(ids < 0, -1)
        ordered, by_group = torch.sort(members, dim=1, stable=True)
        later = torch.zeros_like(repeated)
        later[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        scores = scores.masked_fill(torch.zeros_like(later).scatter(1, by_group, later), -torch.inf)
        scores, by_score = torch.sort(scores, dim=1, descending=True, stable=True)
        ids = ids.gather(1, by_score)
    scores, ids = scores[:, :k], ids[:, :k]
    return scores, ids.masked_fill(scores == -torch.inf, -1)
