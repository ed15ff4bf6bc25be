"""FAISS index over stored embeddings, its recall measured against exact search.

    index/NAME/index.faiss    inner product over unit vectors (cosine), nprobe stored in it
    index/NAME/rows.parquet   row -> key, shard, caption_sha; rows in clip-retrieval's order
    index/NAME/info.json      what it is, of which vectors, and its measured recall; comes last

Index: Johnson et al. 2017, "Billion-scale similarity search with GPUs" (FAISS). The vectors are
held once as float16 and once inside the index as float32. faiss is imported where it is used: a
recipe builds this stage without running it, and should not wait for it.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from declip_filter.captions import caption_sha
from declip_filter.embeddings import (
    KINDS,
    Half,
    Part,
    read_metadata,
    read_parts,
    read_vectors,
)
from declip_filter.limits import require_between, require_folder_name
from declip_filter.signals import shard_tasks
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.errors import did_you_mean
from declip_shards.manifest import canonical_json

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]

NUM_NEIGHBORS = 10
"""Of the recall that is measured: recall@10."""
MIN_ROWS_PER_LIST = 39
"""Fewest rows per inverted list for which FAISS trains centroids without a warning."""
MAX_ROWS_PER_LIST = 256
"""Rows per inverted list beyond which training samples: FAISS's own default."""
ROWS_AT_ONCE = 65_536
"""Rows turned to float32 at once."""
QUERIES_AT_ONCE = 64
"""Queries compared at once while recall is measured."""
TIE_TOLERANCE = 1e-5
"""Scores closer than this are a tie: exact and index search sum in different orders."""
DUPLICATE_COSINE = 0.999
"""From here on two rows count as one content: float16 and the make-up of a batch change the
vector of an equal caption by less."""
LOG_SECONDS = 10.0
"""Between two progress lines where there is no terminal."""
FORMAT_VERSION = 1
"""Of info.json; a reader refuses a higher one."""

ROWS_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
        ("caption_sha", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Measured recall@10 of an index on rows of its own."""

    recall: float
    """Without the query and its duplicates (DUPLICATE_COSINE): what a neighbor table needs."""
    recall_with_duplicates: float
    """The plain figure: the query finds itself and its duplicates, so it is flattering."""
    num_queries: int


def index_path(name: str) -> str:
    return f"{layout.index_folder(name)}/index.faiss"


def rows_path(name: str) -> str:
    return f"{layout.index_folder(name)}/rows.parquet"


def info_path(name: str) -> str:
    return f"{layout.index_folder(name)}/info.json"


def wilson_interval(share: float, num: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share among ``num`` trials (Wilson 1927)."""
    center = (share + z * z / (2 * num)) / (1 + z * z / num)
    spread = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    # The sums are rounded; the interval of a share always holds the share.
    return max(0.0, min(share, center - spread)), min(1.0, max(share, center + spread))


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


def choose_nlist(num_rows: int) -> int:
    """Inverted lists for ``num_rows``: 4 sqrt(rows), or fewer where a list would have few rows."""
    return max(1, min(round(4 * math.sqrt(num_rows)), num_rows // MIN_ROWS_PER_LIST))


def build_index(vectors: Half, *, nlist: int, seed: int) -> Any:
    """A FAISS inner-product index over (rows, dim) unit vectors: Flat for ``nlist=0``, else IVF.

    One thread trains and adds, from a fixed seed: the same rows give the same bytes.
    """
    import faiss

    num_rows, dim = vectors.shape
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index: Any
        if nlist:
            index = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT
            )
            index.cp.seed = seed
            index.cp.min_points_per_centroid = 1
            chosen = np.arange(num_rows)
            if num_rows > nlist * MAX_ROWS_PER_LIST:
                rng = np.random.default_rng(seed)
                size = nlist * MAX_ROWS_PER_LIST
                chosen = np.sort(rng.choice(num_rows, size, replace=False))
            index.train(vectors[chosen].astype(np.float32))
        else:
            index = faiss.IndexFlatIP(dim)
        starts = range(0, num_rows, ROWS_AT_ONCE)
        for start in progress(starts, len(starts), "index: add"):
            index.add(vectors[start : start + ROWS_AT_ONCE].astype(np.float32))
    finally:
        faiss.omp_set_num_threads(threads)
    return index


def search(index: Any, queries: Scores, k: int, nprobe: int | None) -> tuple[Scores, Ids]:
    """Scores and rows of the ``k`` nearest, best first; row -1 where the probed lists ran out.

    ``nprobe=None`` takes what is stored in the index; a Flat index has none and ignores it.
    """
    if nprobe is None or not hasattr(index, "nlist"):
        scores, rows = index.search(queries, k)
    else:
        import faiss

        params = faiss.SearchParametersIVF()
        params.nprobe = nprobe
        scores, rows = index.search(queries, k, params=params)
    return scores, rows


@dataclass(frozen=True, kw_only=True)
class _Truth:
    """What exact search says of one query."""

    row: int
    duplicates: frozenset[int]
    """Rows that are the same content again, the query's own among them."""
    nearest_score: float
    """Score of the 10th nearest of the other rows."""
    plain_score: float
    """Score of the 10th nearest of all rows."""
    num_wanted: int
    """10, or fewer where there are not so many other rows."""


def exact_truths(vectors: Half, query_rows: Ids) -> list[_Truth]:
    """Exact inner-product search by brute force for ``query_rows`` of ``vectors`` (rows, dim)."""
    queries = vectors[query_rows].astype(np.float32)
    scores = np.empty((len(query_rows), len(vectors)), dtype=np.float32)
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        block = vectors[start : start + ROWS_AT_ONCE].astype(np.float32)
        scores[:, start : start + len(block)] = queries @ block.T
    truths = []
    for row, own in zip(query_rows.tolist(), scores, strict=True):
        same = np.union1d(np.flatnonzero(own >= DUPLICATE_COSINE), [row])
        others = np.delete(own, same)
        wanted = min(NUM_NEIGHBORS, len(others))
        plain = min(NUM_NEIGHBORS, len(own))
        truths.append(
            _Truth(
                row=row,
                duplicates=frozenset(same.tolist()),
                nearest_score=_kth_largest(others, wanted),
                plain_score=_kth_largest(own, plain),
                num_wanted=wanted,
            )
        )
    return truths


def _kth_largest(values: Scores, k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k]) if k else math.inf


def measure_recall(
    index: Any, vectors: Half, truths: Sequence[_Truth], nprobe: int | None = None
) -> Recall:
    """Share of the exact 10 nearest rows that the index finds, averaged over queries.

    A found row counts when its exact score reaches the 10th exact one, so that which of several
    tied rows came back does not matter.
    """
    widest = max(len(t.duplicates) for t in truths)
    k = min(len(vectors), NUM_NEIGHBORS + widest)
    shares, plain_shares = [], []
    for start in range(0, len(truths), QUERIES_AT_ONCE):
        batch = truths[start : start + QUERIES_AT_ONCE]
        queries = vectors[[t.row for t in batch]].astype(np.float32)
        scores, rows = search(index, queries, k, nprobe)
        for truth, own_scores, own_rows in zip(batch, scores, rows, strict=True):
            found = own_rows >= 0
            other = found & ~np.isin(own_rows, list(truth.duplicates))
            if truth.num_wanted:
                hits = int((own_scores[other] >= truth.nearest_score - TIE_TOLERANCE).sum())
                shares.append(min(hits, truth.num_wanted) / truth.num_wanted)
            wanted = min(NUM_NEIGHBORS, len(vectors))
            hits = int((own_scores[found][:wanted] >= truth.plain_score - TIE_TOLERANCE).sum())
            plain_shares.append(min(hits, wanted) / wanted)
    return Recall(
        # Without any other row there is nothing to miss.
        recall=float(np.mean(shares)) if shares else 1.0,
        recall_with_duplicates=float(np.mean(plain_shares)),
        num_queries=len(truths),
    )


@dataclass(frozen=True, kw_only=True)
class BuildIndex:
    """Index the embeddings and measure how much of exact search the index finds."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    embeddings: str = "text"
    """Name of the embeddings to index, from embeddings/NAME/."""
    kind: str = "text_emb"
    """Which of them: text_emb or img_emb."""
    name: str = "captions"
    """Name of the index: it goes to index/NAME/."""
    index_type: Literal["auto", "Flat", "IVF"] = "auto"
    """Flat (exact), IVF (inverted lists), or auto: IVF from ivf_from_rows rows on."""
    ivf_from_rows: int = 2000
    """With auto: fewest rows for which inverted lists are used."""
    nlist: int | None = None
    """Inverted lists; unset: 4 sqrt(rows), at most a list per 39 rows."""
    nprobe: int | None = None
    """Lists searched; unset: the fewest, doubled from 1 on, that reach recall_target."""
    recall_target: float = 0.9
    """Least recall@10 against exact search, 0 to 1; the stage fails below it."""
    num_queries: int = 500
    """Rows on which recall is measured, drawn without replacement."""
    seed: int = 0
    """Seed of the centroids and of the drawn queries."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        require_folder_name("embeddings", self.embeddings)
        require_folder_name("name", self.name)
        if self.kind not in KINDS:
            raise DeclipError(f"kind is {self.kind!r}.{did_you_mean(self.kind, KINDS)}")
        types = ("auto", "Flat", "IVF")
        if self.index_type not in types:
            raise DeclipError(
                f"index_type is {self.index_type!r}.{did_you_mean(self.index_type, types)}"
            )
        require_between("ivf_from_rows", self.ivf_from_rows, 1)
        require_between("nlist", self.nlist, 1, remedy="Unset it to let the stage choose.")
        require_between("nprobe", self.nprobe, 1, remedy="Unset it to let the stage choose.")
        require_between("recall_target", self.recall_target, 0, 1)
        require_between("num_queries", self.num_queries, 1)
        require_between("seed", self.seed, 0, 2**31 - 1)
        if self.index_type == "Flat" and (self.nlist or self.nprobe):
            raise DeclipError(
                "nlist and nprobe are of inverted lists, and index_type is 'Flat'; unset them or "
                "choose index_type 'IVF'."
            )
        if self.nlist and self.nprobe and self.nprobe > self.nlist:
            raise DeclipError(
                f"nprobe is {self.nprobe}, more than the {self.nlist} lists of nlist; lower it."
            )

    def tasks(self) -> Sequence[str]:
        return ("all",)

    def is_done(self, task: str) -> bool:
        store = Store(self.root)
        return all(
            store.exists(path)
            for path in (index_path(self.name), rows_path(self.name), info_path(self.name))
        )

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: index_embeddings(self, Store(self.root))


def index_embeddings(settings: BuildIndex, store: Store) -> TaskStats:
    """Build, measure and write the index; ``info.json`` comes last."""
    import faiss

    parts = read_parts(store, settings.embeddings, shard_tasks(settings.root))
    vectors, rows = _read_all(settings, store, parts)
    nlist = _lists(settings, len(vectors))
    index = build_index(vectors, nlist=nlist, seed=settings.seed)
    nprobe, recall = _reach_target(settings, index, vectors, nlist)
    if nlist:
        index.nprobe = nprobe
    data = faiss.serialize_index(index).tobytes()
    store.write_bytes(index_path(settings.name), data)
    sidecars.write_table(store, rows_path(settings.name), rows)
    low, high = wilson_interval(recall.recall, recall.num_queries)
    size = len(data)
    info = {
        "format_version": FORMAT_VERSION,
        # The names of autofaiss's index_infos.json, as far as they hold no times.
        "index_key": f"IVF{nlist},Flat" if nlist else "Flat",
        "index_param": f"nprobe={nprobe}" if nlist else "",
        "size in bytes": size,
        "nb vectors": len(vectors),
        "vectors dimension": parts[0].dim,
        "compression ratio": round(vectors.size * 4 / size, 6),
        f"recall@{NUM_NEIGHBORS}": round(recall.recall, 6),
        # A query's hits hang together, so queries, not hits, are counted as trials.
        f"recall@{NUM_NEIGHBORS} interval": [round(low, 6), round(high, 6)],
        f"recall@{NUM_NEIGHBORS} with duplicates": round(recall.recall_with_duplicates, 6),
        "recall_target": settings.recall_target,
        "num_queries": recall.num_queries,
        "nlist": nlist,
        "nprobe": nprobe,
        "embeddings": settings.embeddings,
        "kind": settings.kind,
        "encoder": parts[0].encoder,
        "encoder_digest": parts[0].encoder_digest,
        "selection": parts[0].selection,
        "embeddings_sha256": _embeddings_digest(settings, store, parts),
        "index_sha256": store.sha256(index_path(settings.name)),
        "rows_sha256": store.sha256(rows_path(settings.name)),
    }
    store.write_bytes(info_path(settings.name), canonical_json(info))
    shown = {k: info[k] for k in ("index_key", "nprobe", "num_queries", f"recall@{NUM_NEIGHBORS}")}
    return TaskStats(
        num_in=len(vectors),
        num_out=len(vectors),
        files=[index_path(settings.name), rows_path(settings.name), info_path(settings.name)],
        extra=shown,
    )


def _read_all(settings: BuildIndex, store: Store, parts: Sequence[Part]) -> tuple[Half, pa.Table]:
    """All vectors, and the table that names their rows; shards in order."""
    chunks: list[Half] = []
    columns: dict[str, list[str]] = {"key": [], "shard": [], "caption_sha": []}
    for part in progress(parts, len(parts), "index: read"):
        vectors, keys = read_vectors(store, settings.embeddings, settings.kind, part)
        metadata = read_metadata(store, settings.embeddings, part)
        chunks.append(vectors)
        columns["key"] += keys
        columns["shard"] += [part.shard] * len(keys)
        columns["caption_sha"] += [caption_sha(str(row["caption"])) for row in metadata]
    num_rows = len(columns["key"])
    if not num_rows:
        raise DeclipError(
            f"embeddings {settings.embeddings!r} hold 0 samples (selection "
            f"{parts[0].selection!r}): nothing to index; loosen the filter and embed again."
        )
    return np.concatenate(chunks), pa.table(
        {"row": np.arange(num_rows), **columns}, schema=ROWS_SCHEMA
    )


def _lists(settings: BuildIndex, num_rows: int) -> int:
    """How many inverted lists the settings and the number of rows ask for; 0 means Flat."""
    explicit = settings.nlist is not None or settings.nprobe is not None
    wants_lists = settings.index_type == "IVF" or (
        settings.index_type == "auto" and (explicit or num_rows >= settings.ivf_from_rows)
    )
    if not wants_lists:
        return 0
    nlist = settings.nlist or choose_nlist(num_rows)
    if nlist > num_rows:
        raise DeclipError(
            f"nlist is {nlist}, and there are {num_rows} vectors: a list needs at least one; "
            "lower nlist or unset it."
        )
    if settings.nprobe is not None and settings.nprobe > nlist:
        raise DeclipError(
            f"nprobe is {settings.nprobe}, and the index has {nlist} lists; lower nprobe or unset "
            "it."
        )
    return nlist


def _reach_target(
    settings: BuildIndex, index: Any, vectors: Half, nlist: int
) -> tuple[int, Recall]:
    """The nprobe and the recall measured with it; 0 for a Flat index.

    Raises:
        DeclipError: the target is not met with the nprobe that the settings fix.
    """
    rng = np.random.default_rng(settings.seed)
    num_queries = min(settings.num_queries, len(vectors))
    query_rows = np.sort(rng.choice(len(vectors), num_queries, replace=False))
    truths: list[_Truth] = []
    starts = range(0, num_queries, QUERIES_AT_ONCE)
    for start in progress(starts, len(starts), "index: exact search"):
        truths += exact_truths(vectors, query_rows[start : start + QUERIES_AT_ONCE])
    nprobe = settings.nprobe or (1 if nlist else 0)
    while True:
        recall = measure_recall(index, vectors, truths, nprobe or None)
        if recall.recall >= settings.recall_target:
            return nprobe, recall
        if settings.nprobe is not None or nprobe >= nlist:
            raise DeclipError(
                f"recall@{NUM_NEIGHBORS} is {recall.recall:.4f} at nprobe {nprobe} of {nlist} "
                f"lists, below recall_target {settings.recall_target:g}; raise nprobe or unset it, "
                "or lower recall_target."
            )
        nprobe = min(nlist, nprobe * 2)


def _embeddings_digest(settings: BuildIndex, store: Store, parts: Sequence[Part]) -> str:
    """sha256 over the digests of the vector files, in the order of the rows."""
    paths = [
        layout.embedding_path(settings.embeddings, settings.kind, part.partition)
        for part in parts
        if part.num_rows
    ]
    digests = [store.sha256(path) for path in paths]
    return hashlib.sha256(canonical_json(digests)).hexdigest()
