"""The driver of a refetch: manifest, failures, and a kill at any moment."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_ingest.refetch import RefetchShards
from declip_ingest.refetch_run import KEPT_MANIFEST, find_base, is_unfinished, refetch
from declip_ingest.stages import stored_ingest
from declip_shards import DeclipError, Store, energon, layout, manifest, rewrite
from declip_shards.export_files import export
from pipelines.task_end import TaskEnd

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer
    from tests.ingest.refetch_runs import (
        DOWN,
        NUM_ROWS,
        all_files,
        hashed_files,
        ingest,
        make_stage,
        mend,
        run_tasks,
        serve,
    )
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer
    from refetch_runs import (
        DOWN,
        NUM_ROWS,
        all_files,
        hashed_files,
        ingest,
        make_stage,
        mend,
        run_tasks,
        serve,
    )

KEYS = [f"{i // 8:05d}{i % 8}" for i in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def server():
    """One for all tests, for the dataset that they start from names its port."""
    with MisbehavingServer() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.stopping.set()
        running.shutdown()


@pytest.fixture(scope="module")
def once_broken(server, tmp_path_factory):
    """A dataset that was ingested while half of the server was down."""
    serve(server, is_up=False)
    root = tmp_path_factory.mktemp("once") / "broken"
    ingest(make_stage(root, server))
    return root


@pytest.fixture
def broken(server, once_broken, tmp_path):
    """A copy of that dataset, and the server up again."""
    serve(server, is_up=True)
    return Path(shutil.copytree(once_broken, tmp_path / "broken"))


def test_a_second_run_changes_no_byte(broken):
    mend(broken, "http")
    mend(broken, "http_503", "http_500")
    before = all_files(broken)

    def never(*_):
        raise AssertionError("nothing is to be run")

    report = mend(broken, "http_503", "http_500", run=never)
    assert all_files(broken) == before
    assert not report.asked
    assert not report.num_changed


def test_what_energon_reads_beside_the_tars_is_as_made_anew(broken):
    store, beside = Store(str(broken)), Store(str(broken / "shards"))
    export(store, beside, "energon")
    assert mend(broken, "http_503", "http_500").num_changed == len(DOWN)
    shards = layout.list_shards(store)
    for shard in shards:
        expected = energon.tar_index(store, layout.tar_path(shard))
        assert store.read_bytes(energon.index_path(shard)) == expected
    for path, data in energon.meta_files(store, shards, is_beside=True).items():
        assert beside.read_bytes(path) == data, path


def test_the_manifest_keeps_its_fingerprint_and_changes_its_digest(broken):
    store = Store(str(broken))
    before = manifest.read_manifest(store, "ingest")
    digest = manifest.manifest_digest(store, "ingest")
    mend(broken, "http")
    after = manifest.read_manifest(store, "ingest")
    assert before is not None
    assert after is not None
    assert after.fingerprint == before.fingerprint
    assert after.settings == before.settings
    assert after.inputs == before.inputs
    assert manifest.manifest_digest(store, "ingest") != digest, "later steps are out of date"
    assert after.num_in == NUM_ROWS == after.num_out + sum(after.reasons.values())


def test_a_dataset_that_is_not_finished_is_mended_without_a_manifest(server, broken):
    store = Store(str(broken))
    store.remove(layout.manifest_path("ingest"))
    store.remove(layout.receipt_path("ingest", "00001"))
    report = mend(broken, "http_500", "http_503")
    assert sum(report.asked.values()) == sum(i < 8 for i in DOWN)
    assert manifest.read_manifest(store, "ingest") is None
    assert not is_unfinished(store)


def test_a_failed_task_leaves_its_shard_and_the_others_are_mended(broken):
    before = all_files(broken)

    def run(root, step, stage, tasks, digest):
        for end in run_tasks(root, step, stage, tasks, digest):
            broken = end.task == "00000"
            yield TaskEnd(task=end.task, cause="its worker was lost") if broken else end

    report = mend(broken, "http_500", "http_503", run=run)
    assert report.failures == {"00000": "its worker was lost"}
    after = all_files(broken)
    for path in (layout.tar_path("00000"), layout.receipt_path("ingest", "00000")):
        assert after[path] == before[path]
    assert after[layout.tar_path("00001")] != before[layout.tar_path("00001")]
    store = Store(str(broken))
    done = manifest.read_manifest(store, "ingest")
    assert done is not None
    assert manifest.damaged_files(store, done, deep=True) == []


def test_nothing_is_published_once_the_lock_is_lost(broken):
    before = hashed_files(broken)

    def lost():
        raise DeclipError("the lock is lost")

    with pytest.raises(DeclipError, match="the lock is lost"):
        mend(broken, "http", check=lost)
    assert hashed_files(broken) == before


class Killed:
    """Ends this process at the n-th call that changes the disk, before or after it."""

    def __init__(self, at: int, is_after: bool) -> None:
        self.left, self.is_after = at, is_after

    def wrap(self, method):
        def wrapped(*arguments):
            self.left -= 1
            if self.left < 0 and not self.is_after:
                os._exit(9)
            result = method(*arguments)
            if self.left < 0:
                os._exit(9)
            return result

        return wrapped


CHANGES = ("write_bytes", "move", "remove", "remove_folder")


def killed_at(root: str, number: int, is_after: bool) -> None:
    killed = Killed(number, is_after)
    for name in CHANGES:
        setattr(Store, name, killed.wrap(getattr(Store, name)))
    refetch(replayed_stage(root), Replay(root))
    os._exit(0)


def replayed_stage(root: str) -> RefetchShards:
    return RefetchShards(root=root, ingest=stored_ingest(root), reasons=("http_500", "http_503"))


class Replay:
    """Runs tasks whose files were laid aside once, so that each kill costs no download."""

    def __init__(self, root: str) -> None:
        self.recorded = Path(root).parent / "recorded"

    def __call__(self, root, step, stage, tasks, digest):
        for task in tasks:
            store, files = Store(root), json.loads((self.recorded / f"{task}.json").read_text())
            for name in files["staged"]:
                store.write_bytes(name, (self.recorded / name).read_bytes())
            yield TaskEnd(task=task, receipt=manifest.Receipt(**{**files["receipt"], "files": []}))


@pytest.fixture
def recorded(broken, tmp_path):
    """The broken dataset, the mended one, and what the workers laid aside."""
    (tmp_path / "recorded").mkdir()
    shutil.copytree(broken, tmp_path / "mended")

    def record(root, step, stage, tasks, digest):
        for end in run_tasks(root, step, stage, tasks, digest):
            assert end.receipt is not None
            staged = [m["from"] for m in end.receipt.extra["moves"] if m["from"]]
            for name in staged:
                target = tmp_path / "recorded" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(root) / name, target)
            text = json.dumps({"staged": staged, "receipt": dataclasses.asdict(end.receipt)})
            (tmp_path / "recorded" / f"{end.task}.json").write_text(text)
            yield end

    mend(tmp_path / "mended", "http_500", "http_503", run=record)
    return broken, tmp_path / "mended"


@pytest.mark.slow
def test_killed_anywhere_and_run_again_it_leaves_the_same_bytes(recorded, tmp_path, monkeypatch):
    broken, mended = recorded
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it is no power cut
    expected = all_files(mended)
    fork = multiprocessing.get_context("fork")
    codes: Counter[int | None] = Counter()
    for is_after in (False, True):
        for number in range(100):
            root = tmp_path / "killed"
            shutil.copytree(broken, root)
            child = fork.Process(target=killed_at, args=(str(root), number, is_after))
            child.start()
            child.join()
            codes[child.exitcode] += 1
            store = Store(str(root))
            if child.exitcode == 9:
                for shard in ("00000", "00001", "00002"):
                    assert store.exists(layout.tar_path(shard)), "no moment without a tar"
                assert find_base(store) is not None, "ingest's fingerprint is never lost"
                refetch(replayed_stage(str(root)), Replay(str(root)))
            assert all_files(root) == expected, f"killed at change {number}"
            assert not is_unfinished(store)
            assert not store.exists(KEPT_MANIFEST)
            shutil.rmtree(root)
            if child.exitcode == 0:
                break
        assert child.exitcode == 0, "the run has an end"
    assert codes == {9: codes[9], 0: 2}
    assert codes[9] >= 50, "each of the changes was a moment to be killed at"


def test_what_a_killed_runs_worker_laid_aside_does_not_count(broken):
    store = Store(str(broken))
    before = all_files(broken)
    store.write_bytes(f"{rewrite.FOLDER}/refetch-00000-abc/00000", b"half a tar")
    assert is_unfinished(store)
    mend(broken, "http_599")
    assert all_files(broken) == before


def test_the_manifest_of_another_ingest_is_not_put_back(broken):
    store = Store(str(broken))
    kept = store.read_bytes(layout.manifest_path("ingest"))
    store.write_bytes(KEPT_MANIFEST, kept)
    store.remove(layout.manifest_path("ingest"))
    assert find_base(store) is not None
    receipt = manifest.read_receipts(store, "ingest")["00000"]
    manifest.write_receipt(store, "ingest", dataclasses.replace(receipt, fingerprint="f" * 64))
    assert find_base(store) is None
