"""What is known of a dataset's own files, and work on many of them."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_shards import DeclipError, Store, layout
from declip_train import shard_listing
from declip_train.shard_listing import file_identities, in_threads, own_pool, tar_location

if TYPE_CHECKING:
    from tests.train.training_data import write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_training_data


def test_results_come_in_order_with_a_line_of_how_far_it_is(capfd, monkeypatch):
    monkeypatch.setattr(shard_listing, "_SECONDS_BETWEEN_LINES", -1.0)
    assert list(in_threads("counting", range(40), lambda n: n * n)) == [n * n for n in range(40)]
    assert "counting: 39 of 40" in capfd.readouterr().err

    def fails(number):
        raise DeclipError(f"no {number}")

    with pytest.raises(DeclipError, match="no 0"):
        list(in_threads("failing", range(40), fails))


def test_a_file_is_another_when_it_is_written_anew(tmp_path):
    store = Store(str(tmp_path))
    assert file_identities(store, ["a"]) == [None]
    store.write_bytes("a", b"same")
    first = file_identities(store, ["a"])
    assert file_identities(store, ["a"]) == first
    os.utime(tmp_path / "a", (1, 1))
    assert file_identities(store, ["a"]) != first
    assert tar_location(store, "a") == str(tmp_path / "a")
    assert tar_location(Store("memory://there"), "a") == "memory://there/a"


def test_the_tasks_receipt_goes_before_the_manifest_of_the_step(tmp_path):
    """Refetch and opt-out replace a tar with its receipt; the manifest is older."""
    store = write_training_data(tmp_path / "d")
    shards = layout.list_shards(store)
    good = {shard: store.sha256(layout.tar_path(shard)) for shard in shards}

    def record(path, digests):
        files = ", ".join(
            f'{{"path": "{layout.tar_path(s)}", "sha256": "{d}", "size": 1}}'
            for s, d in digests.items()
        )
        store.write_bytes(path, f'{{"files": [{files}]}}'.encode())

    record(layout.manifest_path("ingest"), good | {"00001": "0" * 64})
    with pytest.raises(DeclipError, match=f"is {good['00001']}, not {'0' * 64}; rerun ingest"):
        own_pool(store, shards, tmp_path / "c", 0)
    record(layout.receipt_path("ingest", "00001"), {"00001": good["00001"]})
    _, pool, sources = own_pool(store, shards, tmp_path / "c", 0)
    assert len(pool) == 48
    assert [source.sha256 for source in sources] == list(good.values())
