"""A neighbor table made anew beside the one in use: whole, resumable, and taken while training."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from declip_filter import BuildNeighbors, EmbedPairs, FilterPairs, MeasureImages, neighbors
from declip_shards import DeclipError, Store, layout, neighbor_tables, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.neighbor_tables import pointer_path, resolve_table
from declip_train.monitor import read_log
from declip_train.tables_in_use import hold_tables
from pipelines.lock import LOCK, TASKS_LOCK, workspace_lock
from pipelines.refresh import REFRESH_LOCK, TRAIN_LOCK, Outcome, refresh, refresh_hold, remove_old

if TYPE_CHECKING:
    from tests.filter.stage_runs import HASHING, digests, run_stage
else:
    sys.path.insert(0, str(Path(__file__).parents[1] / "filter"))
    from stage_runs import HASHING, digests, run_stage

PLACES = ("park", "street", "garden", "kitchen", "harbor", "forest", "station")
SALTED = (("--embed.encoder-factory", "hashing_encoder:make_salted"),)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with a neighbor table by feature hashing."""
    root = tmp_path_factory.mktemp("template") / "data"
    numbers = iter(range(10**6))

    def caption(color: str, shape: str) -> str:
        return f"a {color} {shape} in the {PLACES[next(numbers) % len(PLACES)]}"

    write_fake_dataset(
        str(root), num_shards=2, samples_per_shard=24, image_size=32, caption=caption
    )
    run_stage(MeasureImages(root=str(root)))
    run_stage(FilterPairs(root=str(root), keep_splits=(), min_side_pixels=16))
    run_stage(EmbedPairs(root=str(root), **HASHING))
    settings: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb", "k": 4}
    run_stage(BuildNeighbors(root=str(root), **settings))
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "data"
    shutil.copytree(template, copy)
    return copy


def run(root, encoder="hashing:64", overrides=SALTED, **settings) -> Outcome:
    return refresh(str(root), encoder, runner="local", overrides=overrides, **settings)


def test_the_new_table_is_used_and_nothing_else_has_changed(root):
    before = digests(str(root), ".")
    outcome = run(root)
    store = Store(str(root))
    version = resolve_table(store, "captions")
    assert version.folder == outcome.folder
    assert outcome.is_new
    assert version.embeddings == f"text.{version.id}"
    after = digests(str(root), ".")
    assert {path: after[path] for path in before} == before
    # All that is new is under a name of its own, but for the pointer and the locks.
    new = {path for path in after.keys() - before.keys() if version.id not in path}
    assert new == {pointer_path("captions"), REFRESH_LOCK, TASKS_LOCK}
    assert outcome.record["change"]["num_changed"] > 0
    shards = layout.list_shards(store)
    assert not neighbor_tables.missing_shards(store, version, shards)
    # Once more: it stands already.
    again = run(root)
    assert (again.folder, again.is_new) == (outcome.folder, False)
    assert digests(str(root), ".") == after


def test_the_same_encoder_again_is_another_version_of_the_same_lists(root):
    outcome = run(root, overrides=(("--embed.encoder-factory", HASHING["encoder_factory"]),))
    assert outcome.record["change"] == {"num_rows": 48, "num_changed": 0, "num_new_neighbors": 0}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(("folder", "write"), [("embeddings", 4), ("neighbors", 3), ("pointer", 1)])
def test_killed_and_run_again_it_ends_with_the_same_bytes(
    root, tmp_path, monkeypatch, folder, write
):
    clean = tmp_path / "clean"
    shutil.copytree(root, clean)
    run(clean)
    store = Store(str(root))
    begins = pointer_path("captions") if folder == "pointer" else f"{folder}/"
    write_bytes, written = Store.write_bytes, []

    def torn(self, path, data):
        written.append(path)
        if sum(earlier.startswith(begins) for earlier in written) == write:
            raise Killed
        write_bytes(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", torn)
        with pytest.raises(Killed):
            run(root)
    assert resolve_table(store, "captions").folder == "captions"
    run(root)

    def untimed(place):
        found = digests(str(place), ".").items()
        return {k: v for k, v in found if not k.endswith(".run.json") and "/times/" not in k}

    assert untimed(root) == untimed(clean)


def test_a_dataset_that_changes_meanwhile_keeps_its_table(root, monkeypatch):
    store = Store(str(root))
    path = layout.selection_path("default", "00000")
    write = neighbors.write_neighbors

    def late(work, own_store, shard):
        stats = write(work, own_store, shard)
        table = sidecars.read_table(store, path)
        sidecars.write_table(store, path, table.slice(1))
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(neighbors, "write_neighbors", late)
        with pytest.raises(DeclipError, match=r"selection 'default' were changed while the table"):
            run(root)
    assert resolve_table(store, "captions").folder == "captions"
    assert neighbor_tables.list_versions(store, "captions") == []
    assert store.list_folders("embeddings") == ["text"]
    assert not [name for name in store.list("manifests", ".json") if "refresh" in name]


def test_an_encoder_that_cannot_embed_is_refused_before_anything_is_written(root):
    before = digests(str(root), "embeddings") | digests(str(root), "neighbors")
    only = (("--embed.encoder-factory", "hashing_encoder:make_text_only"),)
    table = Store(str(root))
    path = neighbor_tables.description_path("captions")
    description = json.loads(table.read_bytes(path))
    table.write_bytes(path, json.dumps(description | {"kind": "img_emb"}).encode())
    with pytest.raises(DeclipError, match=r"'hashing:64' does not embed images, which the neigh"):
        run(root, overrides=only)
    table.write_bytes(path, json.dumps(description).encode())
    with pytest.raises(DeclipError, match=r"encoder 'checkpoint:train/export': there is no folder"):
        run(root, "checkpoint:train/export", ())
    with pytest.raises(DeclipError, match=r"'hashing:64' is of unknown kind"):
        run(root, overrides=())
    after = digests(str(root), "embeddings") | digests(str(root), "neighbors")
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"table": "captoins"},
            r"no neighbor table 'captoins' to refresh.*Did you mean 'captions'",
        ),
        ({"overrides": (("--neighbors.name", "x"),)}, r"cannot be set for a refresh: give --table"),
        ({"overrides": (*SALTED, ("--neighbors.kk", "x"))}, r"has no option --neighbors.kk"),
        ({"keep": 0}, r"keep is 0; it must be at least 1"),
    ],
)
def test_wrong_wishes_are_refused(root, settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        run(root, **settings)


def test_settings_are_the_tables_own_unless_others_are_given(root):
    store = Store(str(root))
    first = neighbor_tables.read_description(store, run(root).folder)
    second = neighbor_tables.read_description(
        store, run(root, overrides=(*SALTED, ("--neighbors.k", "2"))).folder
    )
    assert first is not None
    assert second is not None
    assert (first["k"], second["k"]) == (4, 2)
    assert first["settings"] | {"k": 2, "name": "", "embeddings": ""} == second["settings"] | {
        "name": "",
        "embeddings": "",
    }


def test_old_versions_go_when_asked_but_not_what_training_reads(root):
    store = Store(str(root))
    folders = [run(root, overrides=(*SALTED, ("--neighbors.k", str(k)))).folder for k in (2, 3, 5)]
    log = root / "train" / "log.jsonl"
    log.parent.mkdir()
    record = {"step": 3, "neighbor_table": folders[0].partition("@")[2]}
    log.write_text(json.dumps(record) + "\n")
    outcome = run(root, keep=1, overrides=(*SALTED, ("--neighbors.k", "5")))
    assert outcome.removed == [folders[1]]
    gone = folders[1].partition("@")[2]
    assert [str(p) for p in root.rglob("*") if gone in p.name] == []
    log.unlink()
    assert run(root, keep=1, overrides=(*SALTED, ("--neighbors.k", "5"))).removed == [folders[0]]
    assert neighbor_tables.list_versions(store, "captions") == [folders[2]]
    assert resolve_table(store, "captions").folder == folders[2]


def test_a_table_that_a_run_has_decided_on_stays_though_no_log_names_it(root):
    store = Store(str(root))
    folders = [run(root, overrides=(*SALTED, ("--neighbors.k", str(k)))).folder for k in (2, 3)]
    with hold_tables(root / "train") as tables:
        tables.write([folders[0]])
    with (root / TRAIN_LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_old(store, "captions", 1) == []
        assert neighbor_tables.read_version(store, folders[0]).folder == folders[0]
    assert remove_old(store, "captions", 1) == [folders[0]]  # the note is of a run that has ended


def test_who_else_writes_is_asked_for(root):
    store = Store(str(root))
    with workspace_lock(store):
        with pytest.raises(DeclipError, match=r"another run is writing to .*it is not training"):
            run(root)
        train = root / TRAIN_LOCK
        train.parent.mkdir()
        with train.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with refresh_hold(store):
                pass
    with refresh_hold(store) as hold:
        with pytest.raises(DeclipError, match=r"another refresh is going on"):
            run(root)
        hold.check()
        (root / REFRESH_LOCK).unlink()
        with pytest.raises(DeclipError, match=r"refresh.lock in .* was removed or replaced"):
            hold.check()
    assert (root / LOCK).exists()


TRAINING: dict[str, Any] = {
    "model": "test",
    "augmentation": "demo",
    "global_batch_size": 8,
    "max_steps": 3000,
    "warmup_steps": 2,
    "num_ranks": 2,
    "log_every_steps": 1,
    "checkpoint_every_steps": 2,
    "checkpoint_every_seconds": 0.0,
    "projector_dim": 32,
    "predictor_hidden_dim": 16,
}
RUN_STAGE = """
import json, sys
from declip_train.stages import TrainModel
TrainModel(**json.loads(sys.argv[1])).worker()("all")
"""


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the trainer's launcher looks into /proc")
def test_two_processes_take_a_table_that_is_refreshed_while_they_train(root):
    settings = json.dumps(TRAINING | {"root": str(root)})
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_STAGE, settings], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not list(root.glob("train/checkpoints/*/step_*/manifest.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        outcome = refresh(str(root), "checkpoint:train/checkpoints", runner="local", keep=1)
        new = outcome.folder.partition("@")[2]
        while read_log(root / "train")[-1]["neighbor_table"] != new:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 143
    records = read_log(root / "train")
    own = resolve_table(Store(str(root)), "captions")
    assert own.run == next(root.glob("train/checkpoints/*/")).name
    # From an epoch's first step on, and at every step after it.
    tables = [record["neighbor_table"] for record in records]
    first = tables.index(new)
    assert set(tables[:first]) == {neighbor_tables.read_version(Store(str(root)), "captions").id}
    assert set(tables[first:]) == {new}
    assert first % (48 // 8) == 0
    record = records[first]
    assert record["neighbor_age_steps"] == record["step"] - own.step
    assert record["neighbor_encoder"].startswith("checkpoint:train/exports/")
    assert 0 < record["neighbor_lists_changed"] <= 48
    said = (root / "train" / "launch.log").read_text().splitlines()
    lines = [line for line in said if f"reads neighbor table {new} " in line]
    assert len(lines) == 2
    assert len({line.partition("epoch ")[2] for line in lines}) == 1, "both processes say the same"
    assert sum("process 1: " in line for line in lines) == 1
    # The checkpoint of the stop knows which table was in use.
    checkpoint = max(root.glob("train/checkpoints/*/step_*"))
    state = json.loads((checkpoint / "rank_00001.json").read_bytes())
    assert state["loop"]["folder"] == outcome.folder
