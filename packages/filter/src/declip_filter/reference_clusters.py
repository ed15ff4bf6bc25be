"""Which pictures are of a kind with reference pictures: DataComp's image-based filter.

Gadre et al. 2023 (arXiv 2304.14108, section 4.1): cluster the pool's image embeddings, find for
each reference picture (there: ImageNet's training images) the nearest cluster, and keep the
pictures of the clusters that were found. Encoder, number of clusters and references are the user's
here.
"""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from declip_filter.embedding_files import read_metadata, read_part
from declip_filter.limits import require_between, require_folder_name
from declip_filter.signals import read_successes, shard_tasks
from declip_filter.user_files import read_user_file
from declip_filter.vectors import StoredVectors
from declip_shards import DeclipError, Store, TaskStats, layout, sidecars
from declip_shards.manifest import canonical_json

TASK = "all"
ROWS_PER_CLUSTER = 1000
MAX_CLUSTERS = 100_000
"""What DataComp has, for 128 million and for 12.8 billion pictures."""
POINTS_PER_CLUSTER = 128
"""Rows of the sample that centroids are trained on, for each."""
TRAINING_BYTES = 2 << 30
"""The sample's vectors take no more memory than this."""
ITERATIONS = 10
ROWS_AT_ONCE = 16_384

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_cluster", pa.int32()),
        ("image_cluster_is_referenced", pa.bool_()),
    ]
)
"""Columns of ``signals/NAME/NNNNN.parquet``; null where a sample has no stored vector."""

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ClusterImages:
    """Part stored image vectors into clusters and say which are nearest to a reference vector.

    One task: it trains k-means on a sample, then streams all vectors. The clusters of the reference
    vectors come of the user's ``.npy`` file, made by the encoder of the embeddings.
    """

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    embeddings: str = "text"
    """Name of the embeddings, which must hold image vectors."""
    name: str = "clusters"
    """Name of the signals: they go to signals/NAME/."""
    references: str = field(default="", metadata={"fingerprint": False})
    """File of reference vectors by the same encoder: .npy, (references, dim)."""
    num_clusters: int | None = None
    """Clusters; unset: one for each 1,000 vectors, at most 100,000."""
    seed: int = 0
    """Seed of the sample and the first centroids."""
    references_sha256: str = field(init=False, default="")
    """Digest of the file of reference vectors."""

    num_cpus: ClassVar[float] = 1
    num_gpus: ClassVar[float] = 0

    def __post_init__(self) -> None:
        require_folder_name("embeddings", self.embeddings)
        require_folder_name("name", self.name)
        require_between("num_clusters", self.num_clusters, 1)
        require_between("seed", self.seed, 0)
        if self.references:
            where = (
                self.references if "://" in self.references else os.path.abspath(self.references)
            )
            object.__setattr__(self, "references", where)
            object.__setattr__(
                self, "references_sha256", _digest(read_user_file("references", where))
            )

    def tasks(self) -> Sequence[str]:
        return (TASK,)

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(self._report_path())

    def _report_path(self) -> str:
        return f"signals/{self.name}/report.json"

    def worker(self) -> Callable[[str], TaskStats]:
        store = Store(self.root)

        def run(task: str) -> TaskStats:
            shards = shard_tasks(self.root)
            parts = [read_part(store, self.embeddings, shard) for shard in shards]
            vectors = StoredVectors(store, self.embeddings, "img_emb", parts)
            centroids, referenced = self._train(vectors)
            files, num, sizes = [], 0, np.zeros(len(referenced), dtype=np.int64)
            for number, shard in enumerate(shards):
                label = _nearest(centroids, vectors, *vectors.starts[number : number + 2])
                sizes += np.bincount(label, minlength=len(referenced))
                keys = [str(r["key"]) for r in read_metadata(store, self.embeddings, parts[number])]
                table = _shard_table(store, shard, keys, label, referenced)
                path = layout.signals_path(self.name, shard)
                sidecars.write_table(store, path, table)
                files.append(path)
                num += table.num_rows
            report = {
                "clusters": len(referenced),
                "clusters_referenced": int(referenced.sum()),
                "rows": int(sizes.sum()),
                "rows_referenced": int(sizes[referenced].sum()),
            }
            store.write_bytes(self._report_path(), canonical_json(report))
            return TaskStats(
                num_in=num, num_out=num, files=[*files, self._report_path()], extra=report
            )

        return run

    def _train(self, vectors: StoredVectors) -> tuple[Any, npt.NDArray[np.bool_]]:
        """An index of the centroids, and which of them are nearest to a reference."""
        if not vectors.num_rows:
            raise DeclipError(
                f"embeddings {self.embeddings!r} have no rows; embed the pictures first."
            )
        references = self._references(vectors.dim)
        wanted = min(max(vectors.num_rows // ROWS_PER_CLUSTER, 1), MAX_CLUSTERS)
        num = self.num_clusters or wanted
        room = TRAINING_BYTES // (4 * vectors.dim)
        if num > min(vectors.num_rows, room):
            raise DeclipError(
                f"num_clusters is {num}; {vectors.num_rows} vectors of {vectors.dim} numbers allow "
                f"at most {min(vectors.num_rows, room)}. Choose fewer."
            )
        rng = np.random.default_rng(self.seed)
        size = min(vectors.num_rows, room, num * POINTS_PER_CLUSTER)
        sample = np.sort(rng.choice(vectors.num_rows, size, replace=False))
        centroids = _train_centroids(_singles(vectors.take(sample)), num, self.seed)
        referenced = np.zeros(num, dtype=bool)
        for start in range(0, len(references), ROWS_AT_ONCE):
            referenced[_search(centroids, references[start : start + ROWS_AT_ONCE])] = True
        return centroids, referenced

    def _references(self, dim: int) -> Singles:
        """The reference vectors, made unit length: float32 (references, dim)."""
        if not self.references:
            raise DeclipError(
                "references is not set; name a .npy file with vectors of reference pictures, made "
                f"by the encoder of embeddings {self.embeddings!r}."
            )
        data = read_user_file("references", self.references)
        if _digest(data) != self.references_sha256:
            raise DeclipError(f"references {self.references!r} changed meanwhile; run again.")
        try:
            found = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DeclipError(
                f"references {self.references!r} is no .npy file of numbers ({error})."
            ) from error
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
            raise DeclipError(
                f"references {self.references!r} holds no numbers; save one array of them by "
                "numpy.save."
            )
        if found.ndim != 2 or found.shape[1] != dim or not len(found):
            raise DeclipError(
                f"references {self.references!r} is of shape {found.shape}; it must be "
                f"(references, {dim}), as embeddings {self.embeddings!r} are."
            )
        single = _singles(found)
        length = np.linalg.norm(single, axis=1, keepdims=True)
        if not np.isfinite(length).all() or not length.all():
            raise DeclipError(
                f"references {self.references!r} has a row that is zero or not finite; remove it."
            )
        unit: Singles = single / length
        return unit


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _singles(vectors: npt.NDArray[Any]) -> Singles:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _train_centroids(sample: Singles, num: int, seed: int) -> Any:
    """Spherical k-means: an exact inner-product index of the centroids."""
    import faiss

    threads = faiss.omp_get_max_threads()
    # Sums, and so centroids, would depend on the number of threads.
    faiss.omp_set_num_threads(1)
    try:
        means = faiss.Kmeans(
            sample.shape[1], num, niter=ITERATIONS, spherical=True, seed=seed + 1,
            min_points_per_centroid=1, max_points_per_centroid=POINTS_PER_CLUSTER,
        )  # fmt: skip
        means.train(sample)
    finally:
        faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(sample.shape[1])
    index.add(np.asarray(means.centroids))
    return index


def _search(centroids: Any, vectors: Singles) -> npt.NDArray[np.int64]:
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        found: npt.NDArray[np.int64] = centroids.search(_singles(vectors), 1)[1][:, 0]
    finally:
        faiss.omp_set_num_threads(threads)
    return found


def _nearest(
    centroids: Any, vectors: StoredVectors, start: int, stop: int
) -> npt.NDArray[np.int64]:
    """Cluster of rows ``start`` to ``stop``: (stop - start,)."""
    found = [np.zeros(0, dtype=np.int64)]
    for at in range(int(start), int(stop), ROWS_AT_ONCE):
        block = vectors.read(at, min(at + ROWS_AT_ONCE, int(stop)))
        found.append(_search(centroids, _singles(block)))
    return np.concatenate(found)


def _shard_table(
    store: Store,
    shard: str,
    keys: Sequence[str],
    label: npt.NDArray[np.int64],
    referenced: npt.NDArray[np.bool_],
) -> pa.Table:
    """A row a success, by key; null where it has no vector."""
    cluster = dict(zip(keys, label.tolist(), strict=True))
    all_keys = [str(row["key"]) for row in read_successes(store, shard, ["key"])]
    found = [cluster.get(key) for key in all_keys]
    is_near = [None if number is None else bool(referenced[number]) for number in found]
    return pa.table([all_keys, found, is_near], schema=SCHEMA)
