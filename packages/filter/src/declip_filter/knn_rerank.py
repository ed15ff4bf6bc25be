"""Final lists: candidates scored in full, in float32, from the stored vectors."""

import threading

import numpy as np
import numpy.typing as npt
import torch

from declip_filter.knn_graph import Matrix, Rows
from declip_filter.knn_grouped import later_of_group
from declip_filter.knn_lists import Candidates
from declip_filter.knn_select import run_in_threads

LAST_ID = 0x7FFFFFFF
NONE = np.iinfo(np.int64).min
READ_AT_ONCE = 16_384
ROWS_AT_ONCE = 128
"""Few enough that their candidates stay in a core's cache."""


class StoredRows:
    """Stored vectors by their place in the clusters' order."""

    def __init__(self, vectors: Matrix, order: Rows, *, keep: bool) -> None:
        """Sort the vectors into memory if ``keep``, else read them when they are asked for."""
        self.order, self.dim = order, vectors.dim
        self._vectors = vectors
        self._kept: torch.Tensor | None = None
        if keep:
            dtype = torch.from_numpy(vectors.read(0, 1).copy()).dtype
            self._kept = torch.empty(len(order), vectors.dim, dtype=dtype)
            for start in range(0, len(order), READ_AT_ONCE):
                chunk = vectors.take(order[start : start + READ_AT_ONCE])
                self._kept[start : start + len(chunk)] = torch.from_numpy(np.asarray(chunk))

    @property
    def is_kept(self) -> bool:
        """Whether the vectors are in memory."""
        return self._kept is not None

    def take(self, places: torch.Tensor) -> torch.Tensor:
        """As stored: (len(places), dim)."""
        if self._kept is not None:
            return torch.index_select(self._kept, 0, places)
        wanted, back = np.unique(self.order[places.numpy()], return_inverse=True)
        found = torch.from_numpy(np.array(self._vectors.take(wanted)))
        return torch.index_select(found, 0, torch.from_numpy(back.reshape(-1)))


def rank_lists(
    rows: StoredRows,
    queries: Rows,
    near: Candidates,
    k: int,
    groups: npt.NDArray[np.int32] | None,
    num_threads: int,
) -> tuple[npt.NDArray[np.float32], Rows]:
    """The best k of each row's candidates, in full.

    Args:
        rows: all vectors.
        queries: places of the rows whose lists these are: (num_queries,).
        near: (num_queries, candidates), places; -1 where there are fewer. None twice in a list.
        k: length of a list.
        groups: by place; a list gets the best of each group only.
        num_threads: threads.

    Returns:
        Scores float32 and rows (in the vectors' own numbering) int64, (num_queries, k), by score
        and then by row; -inf and -1 where there are fewer.
    """
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    width = near.shape[1]
    local = threading.local()
    at_once = ROWS_AT_ONCE if rows.is_kept else 16 * ROWS_AT_ONCE

    def rank(start: int) -> None:
        if not hasattr(local, "full"):
            local.full = torch.empty(at_once * width, rows.dim)
        stop = min(start + at_once, len(queries))
        some = near[start:stop]
        full = local.full[: some.size]
        full.copy_(rows.take(torch.from_numpy(np.maximum(some, 0).ravel()).long()))
        asked = rows.take(torch.from_numpy(queries[start:stop])).float().numpy()
        products = np.vecdot(full.view(*some.shape, -1).numpy(), asked[:, None])
        keys = _keys(products, np.where(some < 0, -1, rows.order[some]))
        keys[some < 0] = NONE
        if groups is not None:
            order = np.argsort(-keys, axis=1, kind="stable")
            later = later_of_group(np.take_along_axis(some, order, axis=1), groups)
            np.put_along_axis(
                keys, order, np.where(later, NONE, np.take_along_axis(keys, order, axis=1)), axis=1
            )
        keys.sort(axis=1)
        best = keys[:, ::-1][:, :k]
        scores[start:stop, : best.shape[1]], ids[start:stop, : best.shape[1]] = _unpack(best)

    run_in_threads(range(0, len(queries), at_once), rank, num_threads)
    return scores, ids


def _keys(scores: npt.NDArray[np.float32], ids: Rows) -> Rows:
    """Integers that sort by score, and among equal scores the lower id last."""
    bits = (scores + np.float32(0)).view(np.int32)  # the sum makes -0 a 0
    sortable = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return (sortable.astype(np.int64) << 32) | (LAST_ID - ids)


def _unpack(keys: Rows) -> tuple[npt.NDArray[np.float32], Rows]:
    missing = keys == NONE
    sortable = (keys >> 32).astype(np.int32)
    bits = np.where(sortable < 0, sortable ^ np.int32(0x7FFFFFFF), sortable)
    scores = np.where(missing, np.float32(-np.inf), bits.view(np.float32))
    return scores, np.where(missing, -1, LAST_ID - (keys & 0xFFFFFFFF))
