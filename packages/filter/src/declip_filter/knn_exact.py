"""Exact nearest neighbors by blocked matrix products.

Every query meets every row. A block of scores is never kept: its best few candidates are, scored
again in float32 from the stored vectors. What a scan left out is below its last candidate's score
plus the scan's rounding error; a list whose last member is not above that is searched again with
four times the candidates, so the result does not depend on how the scan rounds.

Cost: 2 * queries * rows * dim operations. 15 million rows against themselves at 512 dimensions are
2.3e17, five minutes of one GPU that sustains 790e12 a second, and a month of one CPU core.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from declip_filter.encoders import check_device
from declip_filter.knn_graph import (
    Floats,
    Graph,
    Matrix,
    Rows,
    check_groups,
    check_k,
    order_lists,
)
from declip_shards import DeclipError

SLACK = 16
"""Candidates of a first scan beyond k: most lists are certain with these."""
SCAN_ERROR = {torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}
"""What a scan's score of unit vectors may be off by. Inputs are rounded by 2^-11 (float16; stored
vectors are that already) or 2^-9 (bfloat16) of themselves, so the exact sum of their products is
off by at most twice that; it is rounded once more, for sums are made in float32."""
FAST_SLACK = 48
"""Of a scan in few bits, which leaves more lists open."""
CPU_CHUNK_BYTES = 256 * 2**20
GPU_SHARE = 0.5
"""Of a GPU's free memory that rows may take; a block of scores and its candidates need the rest."""


@dataclass(frozen=True)
class _Scan:
    """Settings of one pass over all rows."""

    k: int
    num_candidates: int
    dtype: torch.dtype
    device: torch.device
    rows_at_once: int
    columns_at_once: int


def exact_neighbors(
    vectors: Matrix,
    queries: Rows,
    k: int,
    *,
    device: str = "cpu",
    rows_at_once: int | None = None,
    groups: Rows | None = None,
    scan_dtype: torch.dtype | None = None,
) -> Graph:
    """The k nearest rows of some rows, by inner product, without the row itself.

    Memory: the result, one block of scores (512 by 8,192 float32 on a CPU, 8,192 by 131,072
    float16 on a GPU), and the rows of one chunk (256 MiB on a CPU, half the free memory of a GPU).

    Args:
        vectors: of unit length.
        queries: rows of ``vectors``, (num_queries,).
        k: length of a list.
        device: torch's name of a device.
        rows_at_once: queries of a block; by default 512 on a CPU, 8,192 on a GPU.
        groups: (num_rows,); rows of one group are never each other's neighbors, and a list holds
            at most one row of a group, its best.
        scan_dtype: float32, float16 or bfloat16, what candidates are found in; by default float16
            on a GPU, on a CPU bfloat16 where it has that in hardware, else float32. The result is
            that of float32 each time.

    Raises:
        DeclipError: a setting out of its range, a device that torch does not have, or a row met
            that is not finite.
    """
    check_k(k, vectors.num_rows)
    check_groups(groups, vectors.num_rows)
    check_device(device)
    if rows_at_once is not None and rows_at_once < 1:
        raise DeclipError(f"rows_at_once is {rows_at_once}; it must be at least 1.")
    on_gpu = device != "cpu"
    dtype = scan_dtype or _fast_dtype(on_gpu)
    if dtype not in SCAN_ERROR:
        raise DeclipError(
            f"scan_dtype is {dtype}; it must be torch.float32, torch.float16 or torch.bfloat16."
        )
    members = None if groups is None else torch.from_numpy(number_groups(groups))
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    pending = np.arange(len(queries))
    num_candidates = k + (SLACK if dtype == torch.float32 else FAST_SLACK)
    while len(pending):
        scan = _Scan(
            k=k,
            num_candidates=min(num_candidates, vectors.num_rows),
            dtype=dtype,
            device=torch.device(device),
            rows_at_once=rows_at_once or (8192 if on_gpu else 512),
            columns_at_once=131_072 if on_gpu else 8192,
        )
        found_scores, found_ids, certain = _search(vectors, queries[pending], scan, members)
        ids[pending] = found_ids
        scores[pending] = found_scores
        pending = pending[~certain]
        if dtype == torch.float32:
            num_candidates *= 4
        dtype = torch.float32  # what a scan in few bits left open is decided by a finer one
    return Graph(ids, scores, recall=1.0)


def _fast_dtype(on_gpu: bool) -> torch.dtype:
    if on_gpu:
        return torch.float16
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (five times the rate of float32)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return False
    found = capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def number_groups(groups: Rows) -> Rows:
    """The same groups, numbered from 0."""
    return np.unique(groups, return_inverse=True)[1].astype(np.int64).reshape(-1)


def _search(
    vectors: Matrix, queries: Rows, scan: _Scan, groups: torch.Tensor | None
) -> tuple[Floats, Rows, "np.ndarray[tuple[int], np.dtype[np.bool_]]"]:
    """One pass: scores and ids (queries, k), and which lists nothing left out can change."""
    scores = torch.full((len(queries), scan.k), -torch.inf)
    ids = torch.full((len(queries), scan.k), -1, dtype=torch.int64)
    left_out = torch.full((len(queries),), -torch.inf)
    if groups is not None:
        groups = groups.to(scan.device)
    for first, chunk in _chunks(vectors, scan):
        for start in range(0, len(queries), scan.rows_at_once):
            block = queries[start : start + scan.rows_at_once]
            here = slice(start, start + len(block))
            asked = _to_device(vectors.take(block), scan.device)
            own = torch.from_numpy(block).to(scan.device)
            near, cut = _scan_block(asked, own, chunk, first, scan, groups)
            exact = _score(asked, chunk, near - first)
            if not bool((exact < torch.inf).all()):
                raise _not_finite(asked, own, near[~(exact < torch.inf)])
            found_scores, found_ids = order_lists(
                torch.cat([scores[here].to(scan.device), exact], dim=1),
                torch.cat([ids[here].to(scan.device), near], dim=1),
                scan.k,
                groups,
            )
            scores[here] = found_scores.cpu()
            ids[here] = found_ids.cpu()
            left_out[here] = torch.maximum(left_out[here], cut.cpu())
    certain = left_out == -torch.inf
    certain |= scores[:, -1] > left_out + SCAN_ERROR[scan.dtype]
    if scan.num_candidates >= vectors.num_rows:
        certain[:] = True
    return scores.numpy(), ids.numpy(), certain.numpy()


def _not_finite(asked: torch.Tensor, own: torch.Tensor, near: torch.Tensor) -> DeclipError:
    """What to say of a block with scores that are none: of which row they are."""
    bad = own[~asked.isfinite().all(dim=1)]
    row = int(bad[0] if len(bad) else near[0])
    return DeclipError(
        f"row {row} of the vectors is not finite; leave it out, or embed its sample again."
    )


def _to_device(rows: Floats, device: torch.device) -> torch.Tensor:
    # Copied where it cannot be written to (a mapped file): torch has no such tensors, and warns.
    return torch.from_numpy(np.require(rows, requirements=["C", "W"])).to(device)


def _chunks(vectors: Matrix, scan: _Scan) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows that fit the device, with the number of the first, as stored."""
    row_bytes = 4 * vectors.dim
    if scan.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(scan.device)
        num_rows = int(free * GPU_SHARE) // row_bytes
    else:
        num_rows = CPU_CHUNK_BYTES // row_bytes
    for start in range(0, vectors.num_rows, max(num_rows, 1)):
        stop = min(start + max(num_rows, 1), vectors.num_rows)
        yield start, _to_device(vectors.read(start, stop), scan.device)


def _scan_block(
    asked: torch.Tensor,
    own: torch.Tensor,
    chunk: torch.Tensor,
    first: int,
    scan: _Scan,
    groups: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of a block of queries in a chunk, and the best score each may have left out.

    Returns:
        ids (block, candidates), -1 where there are fewer, and (block,), -inf where none was left.
    """
    queries = asked.to(scan.dtype)
    best = torch.full((len(own), 0), -torch.inf, device=scan.device)
    near = torch.full((len(own), 0), -1, dtype=torch.int64, device=scan.device)
    cut = torch.full((len(own),), -torch.inf, device=scan.device)
    for start in range(0, len(chunk), scan.columns_at_once):
        stop = min(start + scan.columns_at_once, len(chunk))
        scores = queries @ chunk[start:stop].to(scan.dtype).T
        columns = torch.arange(first + start, first + stop, device=scan.device)
        inside = (own >= first + start) & (own < first + stop)
        scores[inside.nonzero()[:, 0], own[inside] - first - start] = -torch.inf
        if groups is not None:
            scores.masked_fill_(groups[own][:, None] == groups[columns][None, :], -torch.inf)
        values, places = best_columns(scores, scan.num_candidates)
        best = torch.cat([best, values.float()], dim=1)
        near = torch.cat([near, columns[places]], dim=1)
        if best.shape[1] > scan.num_candidates:
            best, order = best.topk(scan.num_candidates, dim=1)
            near = near.gather(1, order)
        if stop - start > scan.num_candidates or stop > scan.num_candidates:
            cut = torch.maximum(cut, best[:, -1])
    return near.masked_fill(best == -torch.inf, -1), cut


def best_columns(scores: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest ``num`` of each row and where they stand, as ``topk`` gives them, but faster.

    The columns are dealt into groups of 16; the largest ``num`` lie in the ``num`` groups of the
    largest maxima, so that most scores are looked at once.

    Args:
        scores: (rows, columns).
        num: how many; all columns where there are fewer.
    """
    rows, columns = scores.shape
    width = 16
    num_groups = columns // width
    if num_groups < 4 * num:
        values, places = scores.topk(min(num, columns), dim=1)
        return values, places
    whole = num_groups * width
    maxima = scores[:, :whole].view(rows, width, num_groups).amax(dim=1)
    chosen = maxima.topk(num, dim=1, sorted=False).indices
    steps = torch.arange(width, device=scores.device) * num_groups
    places = (chosen[:, :, None] + steps).view(rows, -1)
    if whole < columns:
        rest = torch.arange(whole, columns, device=scores.device).expand(rows, -1)
        places = torch.cat([places, rest], dim=1)
    values, order = scores.gather(1, places).topk(num, dim=1)
    return values, places.gather(1, order)


def _score(asked: torch.Tensor, chunk: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """float32 inner products of queries with their candidates: (queries, candidates).

    The sum runs over one row at a time, so equal vectors score equal wherever they stand.
    """
    queries = asked.float()
    missing = places < 0
    scores = torch.empty(places.shape, device=asked.device)
    step = max(1, 2**25 // max(1, places.shape[1] * chunk.shape[1]))
    for start in range(0, len(places), step):
        here = slice(start, start + step)
        rows = chunk[places[here].clamp_min(0)].float()
        scores[here] = (rows * queries[here, None, :]).sum(dim=2)
    return scores.masked_fill(missing, -torch.inf)
