"""Datasets for the filter's tests; modules that stages import in other processes are findable."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stage_runs import HASHING, run_stage

from declip_filter import BuildIndex, BuildNeighbors, EmbedPairs, FilterPairs, MeasureImages
from declip_shards import Store
from declip_shards.fakes import write_fake_dataset

PLACES = ("park", "street", "garden", "kitchen", "harbor", "forest", "station", "market")


def varied_caption():
    """Captions of some 190 kinds, so that texts repeat but are not all the same."""
    counter = iter(range(10**9))

    def caption(color: str, shape: str) -> str:
        return f"a {color} {shape} in the {PLACES[next(counter) % len(PLACES)]}"

    return caption


@pytest.fixture
def fake_root(tmp_path: Path) -> str:
    """Three shards of 40 rows, some failed; the last shard is of split ``test``."""
    root = str(tmp_path / "data")
    write_fake_dataset(
        root, num_shards=3, samples_per_shard=40, fail_every=9, caption=varied_caption()
    )
    return root


@pytest.fixture
def selected_root(fake_root: str) -> str:
    """Measured and filtered: the third shard is held out."""
    run_stage(MeasureImages(root=fake_root))
    run_stage(FilterPairs(root=fake_root))
    return fake_root


@pytest.fixture
def embedded_root(selected_root: str) -> str:
    """Embedded by feature hashing, on top of :func:`selected_root`."""
    run_stage(EmbedPairs(root=selected_root, **HASHING))
    return selected_root


@pytest.fixture
def indexed_root(embedded_root: str) -> str:
    """Indexed with inverted lists, and its neighbors looked up."""
    run_stage(BuildIndex(root=embedded_root, index_type="IVF", nlist=8))
    run_stage(BuildNeighbors(root=embedded_root, k=4, num_candidates=8))
    return embedded_root


@pytest.fixture
def store(fake_root: str) -> Store:
    return Store(fake_root)


@pytest.fixture
def several_threads() -> Iterator[None]:
    """FAISS has two threads, as it has where nobody set OMP_NUM_THREADS (the tests do)."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    yield
    faiss.omp_set_num_threads(before)
