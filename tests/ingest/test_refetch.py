"""Refetch of a shard: what it leaves is what an ingest would have left."""

import dataclasses
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_ingest.ledger import read_ledger_rows
from declip_ingest.refetch import RefetchShards
from declip_ingest.refetch_run import refetch
from declip_ingest.stages import stored_ingest
from declip_shards import DeclipError, Store, layout, manifest, read_samples
from declip_shards.sidecars import read_rows
from declip_shards.validation import check_shard

if TYPE_CHECKING:
    from tests.ingest.misbehaving_server import MisbehavingServer, response
    from tests.ingest.refetch_runs import (
        DOWN,
        GONE,
        NUM_ROWS,
        all_files,
        hashed_files,
        ingest,
        make_stage,
        mend,
        pictures,
        run_tasks,
        serve,
    )
else:
    # conftest.py puts this folder on the path.
    from misbehaving_server import MisbehavingServer, response
    from refetch_runs import (
        DOWN,
        GONE,
        NUM_ROWS,
        all_files,
        hashed_files,
        ingest,
        make_stage,
        mend,
        pictures,
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


def rows_of(root: Path) -> dict[str, dict[str, Any]]:
    store = Store(str(root))
    shards = layout.list_shards(store)
    return {
        row["key"]: row
        for shard in shards
        for row in read_rows(store, layout.shard_parquet_path(shard))
    }


def test_it_leaves_what_an_ingest_with_the_server_up_leaves(server, broken, tmp_path):
    report = mend(broken, "http_503", "http_500")
    clean = tmp_path / "clean"
    ingest(make_stage(clean, server))
    assert hashed_files(broken) == hashed_files(clean), "tars, parquets, receipts and manifest"
    expected = Counter({"http_503": 0, "http_500": 0})
    expected.update("http_503" if i % 2 == 0 else "http_500" for i in DOWN)
    assert report.asked == report.mended == expected
    assert not report.still
    assert not report.failures
    assert report.num_changed == len(DOWN)
    for shard in layout.list_shards(Store(str(broken))):
        assert check_shard(Store(str(broken)), shard) == []
    assert not os.listdir(broken / "staging") if (broken / "staging").exists() else True


def test_only_the_asked_rows_are_fetched_and_keys_stay(server, broken):
    server.hits.clear()
    before = rows_of(broken)
    mend(broken, "http_500")
    asked = [i for i in DOWN if i % 2 == 1]
    assert server.hits == {f"/{i}": 1 for i in asked}
    after = rows_of(broken)
    assert list(after) == list(before) == KEYS
    changed = {key for key in KEYS if after[key] != before[key]}
    assert changed == {KEYS[i] for i in asked}
    for shard in layout.list_shards(Store(str(broken))):
        keys = [sample.key for sample in read_samples(Store(str(broken)), shard)]
        assert keys == sorted(k for k in KEYS if k[:5] == shard and after[k]["status"] == "success")


def test_a_shard_without_such_rows_is_not_touched(broken):
    before = all_files(broken)
    mend(broken, "http_503")
    after = all_files(broken)
    untouched = [path for path in before if "00002" in path]
    assert len(untouched) == 5, "tar, parquet, stats, ledger, receipt"
    assert all(after[path] == before[path] for path in untouched)


def test_rows_that_fail_again_change_their_ledger_alone(server, broken):
    before, store = all_files(broken), Store(str(broken))
    ledger = read_ledger_rows(store, "00000")
    report = mend(broken, "http_404")
    assert report.asked == report.still == {"http_404": len(GONE)}
    assert not report.num_changed
    after = all_files(broken)
    changed = {path for path in before if after[path] != before[path]}
    assert set(after) == set(before)
    assert changed <= {layout.ledger_path(KEYS[i][:5]) for i in GONE}
    again = read_ledger_rows(store, "00000")
    for key, row in again.items():
        assert row.attempts == ledger[key].attempts + (key == KEYS[5])


def test_another_reason_than_before_is_written_down(server, broken):
    server.add(f"/{DOWN[0]}", response(status="410 Gone"))
    report = mend(broken, "http_500", "http_503")
    row = rows_of(broken)[KEYS[DOWN[0]]]
    assert (row["status"], row["error_message"]) == ("failed_to_download", "http_410")
    assert report.still == {"http_410": 1}
    assert sum(report.mended.values()) == len(DOWN) - 1
    store = Store(str(broken))
    done = manifest.read_manifest(store, "ingest")
    assert done is not None
    assert done.reasons == {"http_404": 3, "http_410": 1}
    assert manifest.damaged_files(store, done, deep=True) == []
    assert read_ledger_rows(store, "00000")[KEYS[DOWN[0]]].reason == "http_410"


@pytest.mark.parametrize("down", [(2,), (1, 2)])
def test_pictures_that_became_one_too_many_are_dropped(server, tmp_path, down):
    same = response(pictures()[0])
    limit = {"placeholder_repeats": 4}

    def answers(is_up: bool) -> None:
        serve(server, is_up=True)
        for i in range(4):
            server.add(f"/{i}", same)
        for i in () if is_up else down:
            server.add(f"/{i}", response(status="503 Service Unavailable"))

    answers(is_up=False)
    ingest(make_stage(tmp_path / "a", server, **limit))
    answers(is_up=True)
    report = mend(tmp_path / "a", "http_503")
    ingest(make_stage(tmp_path / "b", server, **limit))
    assert hashed_files(tmp_path / "a") == hashed_files(tmp_path / "b")
    assert report.still == {"repeated_image": len(down)}
    assert report.num_changed == 4


def test_a_picture_that_others_have_failed_for_fails_alone_and_takes_the_last_success_along(
    server, tmp_path
):
    """The digest in the detail tells it, whatever the rows that are fetched now."""
    limit = {"placeholder_repeats": 3}

    def answers(down: tuple[int, ...]) -> None:
        serve(server, is_up=True)
        for i in range(7):
            server.add(f"/{i}", response(pictures()[0]))
        for i in down:
            server.add(f"/{i}", response(status="503 Service Unavailable"))

    answers(())
    ingest(make_stage(tmp_path / "clean", server, **limit))
    # Three have failed before and one is mended; one has succeeded before and three are mended.
    for name, down in (("few", (2,)), ("many", (0, 2, 3, 4, 6))):
        answers(down)
        ingest(make_stage(tmp_path / name, server, **limit))
        answers(())
        report = mend(tmp_path / name, "http_503")
        assert hashed_files(tmp_path / name) == hashed_files(tmp_path / "clean")
        assert report.still == {"repeated_image": len(down)}


def test_a_list_that_was_changed_is_refused(server, broken):
    stage = stored_ingest(str(broken))
    make_stage(broken, server)
    table = read_rows(Store(str(broken)), "source/pairs.parquet")
    table[1]["url"] += "?v=2"
    pq.write_table(pa.Table.from_pylist(table), broken / "source" / "pairs.parquet")
    asked = RefetchShards(root=str(broken), ingest=stage, reasons=("http_500",))
    with pytest.raises(
        DeclipError, match=r"'000001' of .* is not the list's: the list was changed"
    ):
        refetch(asked, run_tasks)


def test_removed_rows_are_never_asked_for(broken):
    with pytest.raises(DeclipError, match="somebody asked for it, and are not fetched again"):
        mend(broken, "opt_out_list")
    store = Store(str(broken))
    (receipt,) = [r for t, r in manifest.read_receipts(store, "ingest").items() if t == "00002"]
    changed = dataclasses.replace(receipt, reasons={"opt_out_list": 1})
    manifest.write_receipt(store, "ingest", changed)
    stage = RefetchShards(root=str(broken), ingest=stored_ingest(str(broken)), reasons=("all",))
    assert stage.tasks() == ["00000", "00001"]
    assert stage.is_done("00002")


def test_a_lost_ledger_is_made_again(broken):
    store = Store(str(broken))
    before = read_ledger_rows(store, "00000")
    store.remove(layout.ledger_path("00000"))
    mend(broken, "http_500")
    after = read_ledger_rows(store, "00000")
    assert list(after) == list(before)
    for key, row in after.items():
        if before[key].reason != "http_500":
            assert (row.status, row.reason, row.url) == (
                before[key].status,
                before[key].reason,
                before[key].url,
            )
