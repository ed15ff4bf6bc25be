"""The index is the same however the work was shared, cut short or left undone."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from index_rows import unit_rows, write_embeddings
from stage_runs import digests, run_stage

from declip_filter import (
    BuildIndex,
    FillIndex,
    TrainIndex,
    index_building,
    index_memory,
    index_training,
)
from declip_filter.index_building import part_files, remove_scratch
from declip_filter.index_files import build_path, index_path, info_path, load_index
from declip_shards import DeclipError, Store, layout
from declip_shards.store import TEMPORARY_MARK

pytestmark = pytest.mark.usefixtures("several_threads")

SETTINGS: dict[str, Any] = {
    "index_type": "IVF",
    "nlist": 16,
    "num_queries": 60,
    "rows_per_task": 256,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks, and so parts, of 256 rows."""
    for module in (index_building, index_memory, index_training):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 256)


@pytest.fixture
def root(tmp_path) -> str:
    vectors = unit_rows(900, 32, num_centers=15)
    parts = {"00000": vectors[:300], "00001": vectors[:0], "00002": vectors[300:]}
    write_embeddings(str(tmp_path / "data"), parts)
    return str(tmp_path / "data")


def info_of(root: str, name: str = "captions") -> dict[str, Any]:
    info: dict[str, Any] = json.loads(Store(root).read_bytes(info_path(name)))
    return info


def share(stage: BuildIndex, order: int = 1) -> None:
    """Train, fill in an order, build: as the pipeline's steps do."""
    values = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
    train, fill = TrainIndex(**values), FillIndex(**values)
    if train.tasks():
        run_stage(train)
        run_stage(fill, fill.tasks()[::order])
    run_stage(stage)


@pytest.mark.parametrize("key", ["IVF16,Flat", "OPQ8_32,IVF16,PQ8x4fs"])
def test_neither_tasks_nor_their_order_nor_their_size_change_a_byte(root, key):
    settings: dict[str, Any] = {
        "root": root,
        "index_key": key,
        "num_queries": 30,
        "recall_target": 0.1,
    }
    share(BuildIndex(**settings, rows_per_task=10**6))
    alone = digests(root, "index/captions")
    assert not part_files(Store(root), "captions")
    for rows_per_task, order in ((256, 1), (256, -1), (512, -1)):
        stage = BuildIndex(**settings, rows_per_task=rows_per_task)
        share(stage, order)
        assert {p: d for p, d in digests(root, "index/captions").items() if p in alone} == alone
        stage.sweep(["all"])
    # Without the files that the tasks made, too.
    shutil.rmtree(Path(root, "index/captions/build"))
    run_stage(BuildIndex(**settings, rows_per_task=256))
    assert digests(root, "index/captions") == alone


def test_few_rows_and_types_without_lists_leave_the_tasks_nothing_to_do(root):
    assert TrainIndex(root=root).tasks() == FillIndex(root=root).tasks() == ()
    settings: dict[str, Any] = {"root": root, "rows_per_task": 256}
    for index_type in ("Flat", "HNSW"):
        assert TrainIndex(**settings, index_type=index_type).tasks() == ()
    assert TrainIndex(**settings, nlist=16).tasks() == ("all",)
    assert FillIndex(**settings, nlist=16).tasks() == ["00000", "00001", "00002", "00003"]


def test_only_what_trains_asks_for_a_gpu():
    for device, wanted in (("cpu", [0, 0, 0]), ("cuda", [1, 0, 1])):
        stages = [kind(device=device) for kind in (TrainIndex, FillIndex, BuildIndex)]
        assert [stage.num_gpus for stage in stages] == wanted


def test_parts_are_scratch_and_the_sweep_leaves_the_rest(root):
    stage = BuildIndex(root=root, **SETTINGS)
    fill = FillIndex(root=root, **SETTINGS)
    run_stage(TrainIndex(root=root, **SETTINGS))
    done = run_stage(fill)
    assert sum(stats.num_out for stats in done.values()) == 900
    hashed = {path for stats in done.values() for path in stats.files}
    volatile = {path for stats in done.values() for path in stats.volatile_files}
    store = Store(root)
    assert volatile == set(part_files(store, "captions"))
    run_stage(stage)
    TrainIndex(root=root, **SETTINGS).sweep(["all"])
    assert volatile == set(part_files(store, "captions"))
    stage.sweep(["all"])
    assert not part_files(store, "captions")
    assert all(store.exists(path) for path in hashed)
    assert TrainIndex(root=root, **SETTINGS).is_done("all")


@pytest.mark.parametrize("damage", ["part", "trained", "choice", "other vectors"])
def test_what_other_builds_left_is_not_built_on(root, damage):
    store = Store(root)
    stage = BuildIndex(root=root, **SETTINGS)
    if damage == "other vectors":
        vectors = unit_rows(900, 32, seed=7, num_centers=15)
        parts = {"00000": vectors[:300], "00001": vectors[:0], "00002": vectors[300:]}
        write_embeddings(root, parts)
    run_stage(stage)
    wanted = store.sha256(index_path("captions"))
    if damage == "other vectors":
        vectors = unit_rows(900, 32, num_centers=15)
        write_embeddings(root, {"00000": vectors[:300], "00002": vectors[300:]})
    share(stage)
    if damage == "other vectors":
        vectors = unit_rows(900, 32, seed=7, num_centers=15)
        write_embeddings(root, {"00000": vectors[:300], "00002": vectors[300:]})
    else:
        name = {"part": "00001.faiss", "trained": "empty.faiss", "choice": "choice.json"}[damage]
        path = build_path("captions", name)
        store.write_bytes(path, store.read_bytes(path)[:-7])
    run_stage(stage)
    assert store.sha256(index_path("captions")) == wanted
    if damage in ("trained", "choice"):
        with pytest.raises(DeclipError, match=r"choice.json' is missing or of other embeddings"):
            FillIndex(root=root, **SETTINGS).worker()("00000")


def test_what_a_killed_build_left_goes(root):
    store = Store(root)
    folder = store.local_path("index/captions")
    (folder / f"{TEMPORARY_MARK}abc").mkdir(parents=True)
    (folder / f"{TEMPORARY_MARK}abc" / "00000.faiss").write_bytes(b"x")
    (folder / f"index.faiss{TEMPORARY_MARK}7").write_bytes(b"x")
    (folder / "mine.txt").write_bytes(b"x")
    remove_scratch(store, "captions")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    run_stage(BuildIndex(root=root, **SETTINGS))
    names = {"index.faiss", "info.json", "rows.parquet", "mine.txt"}
    assert {path.name for path in folder.iterdir()} == names


def test_below_the_target_the_code_grows_by_itself(root, capsys):
    stage = BuildIndex(root=root, index_type="IVFPQ", recall_target=0.97, num_queries=60)
    run_stage(stage)
    info = info_of(root)
    assert info["index_key"].endswith(",SQ8")
    assert info["recall@10"] >= 0.97
    told = capsys.readouterr().err
    assert "PQ16x4fsr, below recall_target 0.97: built again as" in told
    assert load_index(Store(root), "captions").nlist == info["nlist"]


def test_a_key_of_ones_own_is_not_changed_and_fails_in_words(root):
    stage = BuildIndex(root=root, index_key="IVF16,PQ8x4fsr", recall_target=0.97, num_queries=60)
    sentence = r"at nprobe 16 of 16 lists, below recall_target 0.97; give an index_key with a"
    with pytest.raises(DeclipError, match=sentence):
        run_stage(stage)
    assert not stage.is_done("all")
    assert not Store(root).exists(index_path("captions"))


def test_what_fits_and_is_not_good_enough_fails_in_words(root, monkeypatch):
    monkeypatch.setattr(index_building, "index_limit", lambda *_: 10_000)
    stage = BuildIndex(root=root, index_type="IVFPQ", recall_target=0.99, num_queries=60)
    with pytest.raises(DeclipError, match=r"raise max_memory_gib, for IVF23,PQ32x4fsr takes"):
        run_stage(stage)


def test_a_graph_is_searched_as_wide_as_the_target_asks(root):
    run_stage(BuildIndex(root=root, index_type="HNSW", recall_target=0.95))
    info = info_of(root)
    assert info["index_param"] == f"efSearch={info['efSearch']}"
    assert (info["nlist"], info["nprobe"]) == (0, 0)
    index: Any = faiss.read_index(str(Store(root).local_path(index_path("captions"))))
    assert index.hnsw.efSearch == info["efSearch"]


def test_both_sides_of_a_pair(root):
    """Text and picture of equal weight: an inner product is the mean of the two cosines."""
    store = Store(root)
    for number in ("0", "2"):
        text = np.load(store.local_path(layout.embedding_path("text", "text_emb", number)))
        path = store.local_path(layout.embedding_path("text", "img_emb", number))
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.roll(text, 1, axis=0))
    for shard in ("00000", "00001", "00002"):
        record = f"embeddings/text/parts/{shard}.json"
        about = json.loads(store.read_bytes(record))
        store.write_bytes(record, json.dumps(about | {"kinds": ["text_emb", "img_emb"]}).encode())
    run_stage(BuildIndex(root=root, kind="both", name="both"))
    info = info_of(root, "both")
    assert (info["vectors dimension"], info["kind"]) == (64, "both")
    index = load_index(store, "both").faiss_index
    text = np.load(store.local_path(layout.embedding_path("text", "text_emb", "0"))).astype("f4")
    whole = np.concatenate([text, np.roll(text, 1, axis=0)], axis=1) / np.sqrt(2)
    scores, rows = index.search(whole[:5].astype(np.float32), 2)
    np.testing.assert_array_equal(rows[:, 0], np.arange(5))
    np.testing.assert_allclose(scores[:, 0], 1, atol=3e-3)


def test_autofaiss_names_and_the_interval_are_in_info(root):
    run_stage(BuildIndex(root=root, **SETTINGS))
    info = info_of(root)
    names = ("index_key", "index_param", "size in bytes", "nb vectors", "vectors dimension")
    assert all(name in info for name in (*names, "compression ratio"))
    low, high = info["recall@10 interval"]
    assert 0 <= low <= info["recall@10"] <= high <= 1
    assert info["num_queries"] == 60
