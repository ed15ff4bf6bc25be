"""FAISS index over stored embeddings, its recall measured against exact search.

Three stages share the settings of :class:`BuildIndex`: :class:`TrainIndex` chooses the type and
trains it on a sample, :class:`FillIndex` encodes the vectors part by part, and :class:`BuildIndex`
merges the parts, measures, and writes what :mod:`declip_filter.index_files` describes. Where all
vectors are one part, or the type cannot be merged of parts, BuildIndex does all of it.

Index: Johnson et al. 2017, "Billion-scale similarity search with GPUs" (FAISS).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from declip_filter import index_building
from declip_filter.embeddings import Half
from declip_filter.index_choice import (
    INDEX_TYPES,
    Choice,
    IndexType,
    check_index_key,
)
from declip_filter.index_choice import choose_nlist as choose_nlist
from declip_filter.index_files import FORMAT_VERSION as FORMAT_VERSION
from declip_filter.index_files import ROWS_SCHEMA as ROWS_SCHEMA
from declip_filter.index_files import Ids as Ids
from declip_filter.index_files import Scores as Scores
from declip_filter.index_files import build_path
from declip_filter.index_files import index_path as index_path
from declip_filter.index_files import info_path as info_path
from declip_filter.index_files import rows_path as rows_path
from declip_filter.index_files import search as search
from declip_filter.index_plan import Plan, make_plan
from declip_filter.index_training import build_whole
from declip_filter.index_training import progress as progress
from declip_filter.knn_graph import ArrayVectors
from declip_filter.limits import require_between, require_folder_name
from declip_filter.vectors import side_kinds
from declip_shards import DeclipError, Store, TaskStats
from declip_shards.errors import did_you_mean


def build_index(vectors: Half, *, nlist: int, seed: int) -> Any:
    """A FAISS inner-product index over (rows, dim) unit vectors: Flat for ``nlist=0``, else IVF.

    One thread trains and adds, from a fixed seed: the same rows give the same bytes.
    """
    key = f"IVF{nlist},Flat" if nlist else "Flat"
    choice = Choice(index_key=key, nlist=nlist, reason="")
    return build_whole(choice, ArrayVectors(np.asarray(vectors)), seed=seed)


@dataclass(frozen=True, kw_only=True)
class BuildIndex:
    """Index the embeddings and measure how much of exact search the index finds."""

    root: str = field(default="", metadata={"fingerprint": False})
    """Dataset folder, any fsspec URL."""
    embeddings: str = "text"
    """Name of the embeddings to index, from embeddings/NAME/."""
    kind: str = "text_emb"
    """Which of them: text_emb, img_emb, or both (mean of the two cosines)."""
    name: str = "captions"
    """Name of the index: it goes to index/NAME/."""
    index_type: IndexType = "auto"
    """Flat (exact), IVF (inverted lists), IVFPQ (and codes), HNSW (graph), or auto: what fits."""
    index_key: str = ""
    """FAISS factory string that decides instead, such as OPQ64_256,IVF1024,PQ64x4fsr."""
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
    max_memory_gib: float = 16.0
    """Most memory of a task, in GiB, and with auto of the index when it is searched."""
    rows_per_task: int = field(default=524_288, metadata={"fingerprint": False})
    """Vectors encoded by one task, rounded up to 65,536; fewer where they would not fit."""
    device: str = "cpu"
    """Where centroids are trained: cpu, or cuda with a FAISS that was built for it."""
    seed: int = 0
    """Seed of the centroids and of the drawn queries."""

    num_cpus: ClassVar[float] = 1

    @property
    def num_gpus(self) -> float:
        """One where it finds the centroids."""
        return 1 if self.device == "cuda" else 0

    def __post_init__(self) -> None:
        require_folder_name("embeddings", self.embeddings)
        require_folder_name("name", self.name)
        side_kinds(self.kind)
        for setting, value, known in (
            ("index_type", self.index_type, INDEX_TYPES),
            ("device", self.device, ("cpu", "cuda")),
        ):
            if value not in known:
                raise DeclipError(f"{setting} is {value!r}.{did_you_mean(value, known)}")
        require_between("ivf_from_rows", self.ivf_from_rows, 1)
        require_between("nlist", self.nlist, 1, remedy="Unset it to let the stage choose.")
        require_between("nprobe", self.nprobe, 1, remedy="Unset it to let the stage choose.")
        require_between("recall_target", self.recall_target, 0, 1)
        require_between("num_queries", self.num_queries, 1)
        require_between("max_memory_gib", self.max_memory_gib, 0.5)
        require_between("rows_per_task", self.rows_per_task, 1)
        require_between("seed", self.seed, 0, 2**31 - 1)
        self._check_type()

    def _check_type(self) -> None:
        """Refuse settings of one type beside those of another."""
        if self.index_key:
            if self.index_type != "auto" or self.nlist is not None:
                raise DeclipError(
                    f"index_key is {self.index_key!r} and says type and lists; leave index_type "
                    "and nlist unset with it."
                )
            lists = check_index_key(self.index_key)
            if self.nprobe and not lists:
                raise DeclipError(
                    f"nprobe is of inverted lists, and index_key {self.index_key!r} has none; "
                    "unset it."
                )
        if self.index_type in ("Flat", "HNSW") and (self.nlist or self.nprobe):
            raise DeclipError(
                f"nlist and nprobe are of inverted lists, and index_type is {self.index_type!r}; "
                "unset them or choose index_type 'IVF'."
            )
        if self.nlist and self.nprobe and self.nprobe > self.nlist:
            raise DeclipError(
                f"nprobe is {self.nprobe}, more than the {self.nlist} lists of nlist; lower it."
            )

    def plan(self, store: Store) -> Plan:
        """Type, parts and memory for the embeddings as they are.

        Raises:
            DeclipError: there are none, they are of two encoders, or nothing fits the memory.
        """
        return make_plan(self, store)

    def tasks(self) -> Sequence[str]:
        return ("all",)

    def is_done(self, task: str) -> bool:
        store = Store(self.root)
        return all(
            store.exists(path)
            for path in (index_path(self.name), rows_path(self.name), info_path(self.name))
        )

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: index_building.build(self, Store(self.root))

    def sweep(self, tasks: Sequence[str]) -> None:
        """Remove the parts, once the index made of them is done and has its receipt."""
        store = Store(self.root)
        if type(self) is BuildIndex:
            for file in index_building.part_files(store, self.name):
                store.remove(file)


@dataclass(frozen=True, kw_only=True)
class TrainIndex(BuildIndex):
    """Choose the type of the index and train it on a sample; nothing to do for few vectors."""

    def tasks(self) -> Sequence[str]:
        return ("all",) if self.plan(Store(self.root)).is_in_parts else ()

    def is_done(self, task: str) -> bool:
        store = Store(self.root)
        files = (index_building.TRAINED, index_building.CHOICE)
        return all(store.exists(build_path(self.name, file)) for file in files)

    def worker(self) -> Callable[[str], TaskStats]:
        return lambda task: index_building.train(self, Store(self.root))


@dataclass(frozen=True, kw_only=True)
class FillIndex(BuildIndex):
    """Encode the vectors into the trained index, part by part; nothing to do for few vectors."""

    rows_per_task: int = 524_288
    """Vectors encoded by one task, rounded up to 65,536; fewer where they would not fit."""

    @property
    def num_gpus(self) -> float:
        """None: codes are made on the CPU."""
        return 0

    def tasks(self) -> Sequence[str]:
        plan = self.plan(Store(self.root))
        return [part.name for part in plan.groups] if plan.is_in_parts else ()

    def is_done(self, task: str) -> bool:
        return Store(self.root).exists(build_path(self.name, f"{task}.json"))

    def worker(self) -> Callable[[str], TaskStats]:
        return index_building.filler(self, Store(self.root))
