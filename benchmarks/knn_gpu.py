"""The exact neighbor graph of 2 million rows on one GPU, and its share of the matrix rate.

    python benchmarks/knn_gpu.py [--rows 2000000] [--dim 512] [--json FILE]

Rows are made up (unit vectors in loose clusters; the time of exact search does not depend on what
they are). The machine's rate is that of float16 matrix products of one block's shape, measured in
the same run. Recall is checked for 500 rows against float32 products.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from declip_filter.knn import ArrayVectors, exact_neighbors
from declip_shards import DeclipError

K = 15


def made_up(num_rows: int, dim: int) -> Any:
    """float16 (num_rows, dim) of unit length, drawn on the GPU a part at a time."""
    generator = torch.Generator("cuda").manual_seed(0)
    centers = torch.randn(4000, dim, device="cuda", generator=generator)
    parts = []
    for start in range(0, num_rows, 1 << 18):
        size = min(1 << 18, num_rows - start)
        chosen = torch.randint(0, 4000, (size,), device="cuda", generator=generator)
        rows = centers[chosen] + torch.randn(size, dim, device="cuda", generator=generator)
        parts.append(torch.nn.functional.normalize(rows, dim=1).half().cpu().numpy())
    return np.concatenate(parts)


def matrix_rate(dim: int, rounds: int = 20) -> float:
    """Operations a second of float16 products of (8192, dim) by (dim, 131072)."""
    left = torch.randn(8192, dim, device="cuda", dtype=torch.float16)
    right = torch.randn(131072, dim, device="cuda", dtype=torch.float16)
    out = torch.empty(8192, 131072, device="cuda", dtype=torch.float16)
    torch.matmul(left, right.T, out=out)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        torch.matmul(left, right.T, out=out)
    torch.cuda.synchronize()
    return rounds * 2.0 * out.numel() * dim / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise DeclipError("this benchmark needs a GPU, and torch shows none here.")
    rows = made_up(given.rows, given.dim)
    rate = matrix_rate(given.dim)
    start = time.perf_counter()
    graph = exact_neighbors(ArrayVectors(rows), np.arange(given.rows), K, device="cuda")
    seconds = time.perf_counter() - start
    some = np.random.default_rng(0).choice(given.rows, 500, replace=False)
    truth = exact_neighbors(ArrayVectors(rows), some, K, device="cuda", scan_dtype=torch.float32)
    found = [
        len(set(a) & set(b)) / K
        for a, b in zip(graph.ids[some].tolist(), truth.ids.tolist(), strict=True)
    ]
    operations = 2.0 * given.rows**2 * given.dim
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": given.rows,
        "dim": given.dim,
        "seconds": round(seconds, 2),
        "recall@15": round(float(np.mean(found)), 5),
        "matrix_tflops": round(rate / 1e12, 1),
        "share_of_matrix_rate": round(operations / seconds / rate, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    print(json.dumps(result, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
