"""Which neighbor table an epoch reads while one is refreshed."""

import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from declip_shards import Store, layout, neighbor_tables, sidecars
from declip_shards.manifest import canonical_json
from declip_train.epoch_tables import EpochTables
from declip_train.loader import BatchLoader
from declip_train.samples import training_samples
from declip_train.settings import TrainSettings
from declip_train.tables_in_use import hold_tables

if TYPE_CHECKING:
    from tests.train.training_data import write_embeddings, write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_embeddings, write_training_data


def describe(store, folder, **more):
    description = {"format_version": 1, "name": folder, "encoder": f"by {folder}", **more}
    store.write_bytes(neighbor_tables.description_path(folder), canonical_json(description))


def refresh(store, version_id, *, run="", step=None, changed=None, use=True, **more):
    """A refreshed table: a neighbor of every sample (of the first ``changed``) is another one."""
    folder = neighbor_tables.version_folder("captions", version_id)
    rng = np.random.default_rng(len(version_id) + ord(version_id[-1]))
    tables = {
        shard: sidecars.read_rows(store, layout.neighbors_path("captions", shard))
        for shard in layout.list_shards(store)
    }
    everyone = sorted(row["key"] for rows in tables.values() for row in rows)
    for shard, rows in tables.items():
        for row in rows:
            if changed is None or everyone.index(row["key"]) < changed:
                row["neighbor_keys"] = [str(rng.choice(everyone)), everyone[0], everyone[1]]
                row["scores"] = [0.9, 0.8, 0.7]
        sidecars.write_table(
            store, layout.neighbors_path(folder, shard), pa.Table.from_pylist(rows)
        )
    describe(store, folder, **more)
    record = {"format_version": 1, "run": run, "step": step}
    store.write_bytes(neighbor_tables.version_path(folder), canonical_json(record))
    if use:
        neighbor_tables.point_to(store, "captions", folder)
    return folder


class Trial:
    """A dataset with a table, and a loader of three steps an epoch."""

    def __init__(self, root, **changed):
        self.store = Store(str(root))
        given = {"global_batch_size": 16, "prefetch_batches": 1} | changed
        self.settings = TrainSettings(
            root=str(root), model="test", max_steps=12, warmup_steps=1, **given
        )
        self.lines: list[str] = []
        self.samples = training_samples(self.settings)

    def tables(self, run="cafe"):
        return EpochTables(self.settings, self.samples, run=run, say=self.lines.append)

    def loader(self, tables=None):
        return BatchLoader(self.samples, self.settings, 0, 1, tables=tables)


@pytest.fixture
def trial(tmp_path):
    write_training_data(tmp_path)
    describe(Store(str(tmp_path)), "captions")
    return Trial(tmp_path)


def near(samples):
    return list(samples.neighbor_captions)


def test_a_refresh_between_two_epochs_is_taken_whole_by_the_next(trial):
    tables = trial.tables()
    tables.start(0)
    plain = trial.loader().make_batch(0)
    seen: dict[int, set[float | str]] = {}
    for batch in trial.loader(tables).batches(0):
        tables.begin(batch.epoch, batch.step)
        if batch.step == 4:
            refresh(trial.store, "aa", run="cafe", step=1)
        record = tables.record(batch.epoch, batch.step)
        seen.setdefault(batch.epoch, set()).add(record["neighbor_table"])
        if batch.step == 0:
            assert batch.neighbor_token_ids.equal(plain.neighbor_token_ids)
    own = trial.samples.table.id
    # The question is put prefetch_batches + 2 steps ahead: before step 6, at step 3.
    assert seen == {0: {own}, 1: {own}, 2: {own}, 3: {"aa"}}
    assert tables.history == f"0:{own},3:aa"
    use = tables.use_of(3)
    assert use.num_changed == sum(
        old != new for old, new in zip(near(trial.samples), near(tables.samples_of(3)), strict=True)
    )
    assert use.num_changed > 40
    assert tables.record(3, 9)["neighbor_age_steps"] == 8
    assert tables.record(3, 9)["neighbor_encoder"] == "by captions@aa"
    assert trial.lines[-1].startswith(
        "epoch 3 reads neighbor table aa of by captions@aa, 8 steps old; "
    )


def test_a_decision_is_noted_before_it_is_heard_of(trial):
    folder = trial.store.local_path("train")

    def noted() -> frozenset[str]:
        with hold_tables(folder) as tables:
            return tables.read()

    tables = trial.tables()
    tables.start(0)
    assert noted() == {"captions"}
    for name in ("aa", "bb"):
        refresh(trial.store, name)
        tables.decide(tables.last_decided + 1)
    assert noted() == {"captions", "captions@aa", "captions@bb"}
    for epoch in range(3):
        tables.samples_of(epoch)
    tables.begin(2, 6)
    tables.decide(3)
    assert noted() == {"captions", "captions@bb"}
    state = tables.state(2)
    refresh(trial.store, "cc")
    again = trial.tables()
    again.start(2, state)  # the checkpoint's, though the pointer has gone on
    assert noted() == {"captions", "captions@bb"}


def test_epochs_of_one_step_are_told_apart(tmp_path):
    write_training_data(tmp_path)
    describe(Store(str(tmp_path)), "captions")
    trial = Trial(tmp_path, global_batch_size=48, prefetch_batches=5)
    tables = trial.tables()
    tables.start(0)
    for batch in trial.loader(tables).batches(0):
        time.sleep(0.01)  # the loader's thread gets as far ahead as it may
        tables.begin(batch.epoch, batch.step)
        assert tables.state(batch.epoch)["epoch"] == batch.epoch == batch.step
        if batch.step == 2:
            refresh(trial.store, "aa")
    # Before the batch of step 2 came, all was settled up to epoch 2 + 5 + 2.
    own = neighbor_tables.read_version(trial.store, "captions").id
    assert tables.history == f"0:{own},10:aa"


def test_batches_of_an_epoch_are_those_of_its_table_alone(trial):
    """Swapped at every moment, no batch holds neighbors of two tables."""
    folders = ("captions", *(refresh(trial.store, name, use=False) for name in ("aa", "bb")))
    expected = {}
    for folder in folders:
        neighbor_tables.point_to(trial.store, "captions", folder)
        tables = trial.tables()
        tables.start(0)
        for batch in trial.loader(tables).batches(0):
            expected[folder, batch.step] = batch.neighbor_token_ids
    assert not expected["captions", 0].equal(expected["captions@aa", 0])
    stop = threading.Event()

    def swap():
        number = 0
        while not stop.is_set():
            neighbor_tables.point_to(trial.store, "captions", folders[number % 3])
            number += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        tables = trial.tables()
        tables.start(0)
        used = set()
        for batch in trial.loader(tables).batches(0):
            folder = tables.use_of(batch.epoch).version.folder
            used.add(folder)
            assert batch.neighbor_token_ids.equal(expected[folder, batch.step])
    finally:
        stop.set()
        thread.join()
    assert used <= set(folders)


def test_a_table_that_does_not_fit_is_refused_once_and_training_goes_on(trial):
    tables = trial.tables()
    tables.start(0)
    folder = refresh(trial.store, "aa")
    trial.store.remove(layout.neighbors_path(folder, "00001"))
    tables.decide(1)
    tables.decide(2)
    assert [line for line in trial.lines if "not taken" in line] == [
        "a refreshed neighbor table is not taken: 'neighbors/captions@aa/00001.parquet' is "
        "missing, so the table is of other shards; run declip refresh again"
    ]
    assert tables.samples_of(1) is trial.samples
    trial.store.write_bytes(neighbor_tables.pointer_path("captions"), b"{")
    tables.decide(3)
    assert "current.json' is damaged" in trial.lines[-1]
    assert tables.samples_of(3).table.folder == "captions"


def test_a_table_older_than_the_pipelines_is_not_taken(trial):
    refresh(trial.store, "aa")
    describe(trial.store, "captions", k=9)
    fresh = Trial(trial.settings.root)
    tables = fresh.tables()
    tables.start(0)
    assert tables.samples_of(0) is fresh.samples
    assert "captions@aa was made before the pipeline built its table anew" in fresh.lines[0]


def test_a_checkpoint_brings_its_table_back_inside_of_an_epoch_alone(trial):
    first, second = (refresh(trial.store, name, use=False) for name in ("aa", "bb"))
    neighbor_tables.point_to(trial.store, "captions", first)
    tables = trial.tables()
    tables.start(0)
    tables.samples_of(0)
    tables.begin(0, 0)
    state = tables.state(0)
    neighbor_tables.point_to(trial.store, "captions", second)

    again = trial.tables()
    again.start(0, state)
    assert near(again.samples_of(0)) == near(tables.samples_of(0))
    assert again.use_of(0).num_changed == tables.use_of(0).num_changed
    again.begin(0, 1)
    assert again.history == "0:aa"
    again.decide(1)
    assert again.samples_of(1).table.folder == second

    next_epoch = trial.tables()
    next_epoch.start(1, state)
    assert next_epoch.samples_of(1).table.folder == second

    trial.store.remove_folder(f"neighbors/{first}")
    gone = trial.tables()
    gone.start(0, state)
    assert gone.samples_of(0).table.folder == second
    assert "captions@aa of the checkpoint is not read again" in trial.lines[-1]


def test_few_changes_are_counted_as_few(trial):
    refresh(trial.store, "aa", changed=5)
    tables = trial.tables()
    tables.start(0)
    assert near(tables.samples_of(0))[5:] == near(trial.samples)[5:]
    assert tables.use_of(0).num_changed == 5
    assert "neighbor_age_steps" not in tables.record(0, 3), "made by no checkpoint of this run"
    tables.decide(1)
    assert tables.samples_of(1) is tables.samples_of(1)
    assert tables.use_of(1).num_changed == 0


def test_stored_features_follow_the_table_they_are_of(tmp_path):
    store = write_training_data(tmp_path)
    old = write_embeddings(store, name="text")
    new = write_embeddings(store, name="text.aa", dtype=np.float32)
    describe(store, "captions", embeddings="text", dim=16)
    trial = Trial(tmp_path, neighbor_feature="stored", neighbor_embeddings="text")
    tables = trial.tables()
    tables.start(0)
    refresh(store, "aa", embeddings="text.aa", dim=16)
    tables.decide(1)
    samples = tables.samples_of(1)
    assert samples.stored.name == "text.aa"
    key = sidecars.read_rows(store, layout.neighbors_path("captions@aa", "00000"))[0]
    vector = samples.stored.vectors(samples.stored_rows[:1])[0]
    np.testing.assert_allclose(vector, new[key["neighbor_keys"][0]], atol=1e-3)
    # Embeddings that are not the table's stay what they are.
    apart = Trial(tmp_path, neighbor_feature="stored", neighbor_embeddings="text.aa")
    assert apart.samples.stored is not None
    assert apart.samples.stored.name == "text.aa"
    others = apart.tables()
    neighbor_tables.point_to(store, "captions", refresh(store, "bb", embeddings="text", dim=16))
    others.start(0)
    assert others.samples_of(0).stored.name == "text.aa"
    assert old.keys() == new.keys()


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (
            {"embeddings": "text.aa", "dim": 512},
            r"'text.aa' have 512 numbers, the model's features",
        ),
        ({"embeddings": "pictures", "dim": 16}, r"'embeddings/pictures/text_emb' holds no vectors"),
    ],
)
def test_vectors_that_cannot_stand_in_are_refused_in_words(tmp_path, made, sentence):
    store = write_training_data(tmp_path)
    write_embeddings(store, name="text")
    describe(store, "captions", embeddings="text", dim=16)
    trial = Trial(tmp_path, neighbor_feature="stored", neighbor_embeddings="text")
    refresh(store, "aa", **made)
    tables = trial.tables()
    tables.start(0)
    assert tables.samples_of(0) is trial.samples
    assert sentence in trial.lines[0]


def test_a_loader_that_is_given_up_does_not_wait_for_a_table(trial):
    tables = trial.tables()
    tables.start(0)
    batches = trial.loader(tables).batches(0)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "batch-loader"]
    assert not tables.wait(3, _set_event())


def _set_event():
    event = threading.Event()
    event.set()
    return event


def test_the_identity_of_a_run_does_not_follow_a_refresh(trial):
    before = trial.samples.digest()
    refresh(trial.store, "aa")
    assert training_samples(trial.settings).digest() == before
