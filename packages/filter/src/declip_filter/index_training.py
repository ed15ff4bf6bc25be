"""Train an index on a sample and fill it, in blocks of rows: the same bytes every time.

One thread does it, from a fixed seed, and rows go to lists in blocks whose bounds do not depend on
how many tasks there are: a matrix product may round a row otherwise in a block of another size.
"""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from declip_filter.embeddings import UNIT_TOLERANCE
from declip_filter.index_choice import Choice, make_empty_key
from declip_filter.index_files import Ids, Scores, load_faiss
from declip_filter.index_lists import to_fast_scan
from declip_filter.knn_graph import Matrix
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError

ROWS_AT_ONCE = 65_536
"""Rows turned to float32 and given to FAISS at once."""
OPQ_ITERATIONS = 20
"""Of the rotation, where FAISS does 50 that change little more."""
LOG_SECONDS = 10.0
"""Between two progress lines where there is no terminal."""


def progress(items: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    """Pass ``items`` on with a bar on stderr; a log line every ten seconds where it is no tty."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=description, unit="step", leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            last = now
            print(f"{description}: {done}/{total} in {now - start:.0f} s", file=sys.stderr)


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS on one thread: sums come out in one order."""
    faiss = load_faiss()

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def read_block(vectors: Matrix, start: int, stop: int) -> Scores:
    """Rows ``start`` to ``stop`` as float32 (stop - start, dim), checked.

    Raises:
        DeclipError: a row is not finite or not of unit length, by file and sample where known.
    """
    return _checked(_fresh(vectors), _fresh(vectors).read(start, stop), start)


def take_rows(vectors: Matrix, rows: Ids) -> Scores:
    """The rows named (ascending) as float32 (len(rows), dim), checked."""
    found = np.empty((len(rows), vectors.dim), dtype=np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        found[start : start + len(some)] = _checked(vectors, _fresh(vectors).take(some), some)
    return found


def _fresh(vectors: Matrix) -> Matrix:
    """The same matrix with no file mapped: pages that were read count for the process till then."""
    return vectors.reopened() if isinstance(vectors, StoredVectors) else vectors


def _checked(vectors: Matrix, block: Any, rows: "int | Ids") -> Scores:
    wide: Scores = block.astype(np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))
    if bad.size:
        row = int(rows + bad[0]) if isinstance(rows, int) else int(rows[bad[0]])
        if isinstance(vectors, StoredVectors):
            vectors.check_part(int(np.searchsorted(vectors.starts, row, side="right")) - 1)
        what = "not finite" if not np.isfinite(norms[bad[0]]) else f"of length {norms[bad[0]]:.4g}"
        raise DeclipError(
            f"vector {row} is {what}, where length 1 is due; rerun the stage that embeds."
        )
    return wide


def blocks(start: int, stop: int) -> list[tuple[int, int]]:
    """``start..stop`` cut at the multiples of :data:`ROWS_AT_ONCE` after ``start``."""
    edges = [*range(start, stop, ROWS_AT_ONCE), stop]
    return list(itertools.pairwise(edges))


def sample_size(choice: Choice, num_rows: int) -> int:
    """Rows that training reads; 0 for a type that is not trained."""
    if choice.nlist:
        return min(num_rows, choice.nlist * choice.rows_per_list)
    return 0 if _needs_no_training(choice) else min(num_rows, ROWS_AT_ONCE)


def _needs_no_training(choice: Choice) -> bool:
    return (
        choice.index_key == "Flat"
        or choice.index_key in ("SQfp16", "SQbf16")
        or (choice.is_graph and choice.index_key.partition(",")[2] in ("", "Flat", "SQfp16"))
    )


def train_index(choice: Choice, vectors: Matrix, *, seed: int, device: str = "cpu") -> Any:
    """An empty FAISS index of ``choice.build_key``, trained on drawn rows.

    Args:
        choice: the type.
        vectors: (rows, dim), all of them; a sample is drawn where they are many.
        seed: of the draw and of the centroids.
        device: ``cuda`` lets a GPU find the centroids, where FAISS was built for one.

    Raises:
        DeclipError: a wrong key, a wrong vector, or a GPU is asked for and not there.
    """
    gpu = gpu_resources(device)
    size = sample_size(choice, vectors.num_rows)
    rows = np.arange(vectors.num_rows)
    if size < vectors.num_rows:
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.choice(vectors.num_rows, size, replace=False))
    index = make_empty_key(choice.build_key, vectors.dim)
    with one_thread():
        _seed(index, choice, seed)
        if gpu is not None:
            _centroids_on_gpu(index, gpu)
        if size:
            index.train(take_rows(vectors, rows))
    return index


def _seed(index: Any, choice: Choice, seed: int) -> None:
    """Fix every draw, ask for no least number of rows, and fit OPQ to the codes."""
    faiss = load_faiss()

    inner = index
    turns: list[Any] = []
    while isinstance(inner, faiss.IndexPreTransform):
        chain = inner.chain
        turns += [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexIVF):
        inner.cp.seed = seed
        inner.cp.min_points_per_centroid = 1
    quantizer = getattr(inner, "pq", None)
    if quantizer is not None:
        quantizer.cp.min_points_per_centroid = 1
        if hasattr(inner, "do_polysemous_training"):
            inner.do_polysemous_training = False  # for a kind of search that is not done here
        if isinstance(inner, faiss.IndexIVF) and choice.is_fast_scan:
            inner.by_residual = "x4fsr" in choice.index_key
    for transform in turns:
        if isinstance(transform, faiss.OPQMatrix) and quantizer is not None:
            # FAISS would fit the rotation to codes of 8 bits, at a hundred times the cost.
            own = faiss.ProductQuantizer(transform.d_out, transform.M, quantizer.nbits)
            own.cp.min_points_per_centroid = 1
            transform.pq = own
            transform.referenced_objects = [own]
            transform.niter = OPQ_ITERATIONS


def gpu_resources(device: str) -> Any:
    """FAISS's handle of a GPU; None for the CPU.

    Raises:
        DeclipError: a GPU is asked for, and this FAISS or machine has none.
    """
    if device == "cpu":
        return None
    faiss = load_faiss()

    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise DeclipError(
            f"device is {device!r}, and FAISS {faiss.__version__} here "
            + (
                "finds no GPU"
                if hasattr(faiss, "StandardGpuResources")
                else "was built without GPUs"
            )
            + "; install faiss-gpu-cu12 in place of faiss-cpu, or set device to cpu."
        )
    return faiss.StandardGpuResources()


def _centroids_on_gpu(index: Any, resources: Any) -> None:
    """Let k-means assign on the GPU; what is trained comes back to the CPU by itself."""
    faiss = load_faiss()

    inner = faiss.extract_index_ivf(index) if "IVF" in type(index).__name__ else index
    if isinstance(inner, faiss.IndexIVF):
        helper = faiss.index_cpu_to_gpu(resources, 0, faiss.IndexFlatIP(inner.d))
        inner.clustering_index = helper
        index.referenced_objects = [resources, helper]


def add_rows(index: Any, vectors: Matrix, start: int, stop: int, *, what: str) -> None:
    """Add rows ``start`` to ``stop``, numbered as they are, in blocks, on one thread."""
    with one_thread():
        edges = blocks(start, stop)
        for first, last in progress(edges, len(edges), what):
            block = read_block(vectors, first, last)
            if start:
                index.add_with_ids(block, np.arange(first, last, dtype=np.int64))
            else:
                index.add(block)


def build_whole(choice: Choice, vectors: Matrix, *, seed: int, device: str = "cpu") -> Any:
    """The index trained and filled in memory at once.

    Fast scan is converted at the end, as where it is merged of parts.
    """
    index = train_index(choice, vectors, seed=seed, device=device)
    add_rows(index, vectors, 0, vectors.num_rows, what="index: add")
    return to_fast_scan(index) if choice.is_fast_scan else index
