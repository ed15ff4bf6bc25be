"""What will be taken out is known before anything is. The rest: tests/pipelines/test_optout.py."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_shards import DeclipError, Store, sidecars
from declip_shards.optout import PENDING, make_optout
from pipelines.optout_plan import count_rows, make_plan, read_plan

if TYPE_CHECKING:
    from tests.pipelines.optout_dataset import build, list_rows
else:
    from optout_dataset import build, list_rows

ROWS = list_rows()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = str(tmp_path_factory.mktemp("plan") / "data")
    build(root)
    return Store(root)


def test_a_plan_is_read_back_as_it_was_written(store):
    entries = [("key", "0000007"), ("url", ROWS[8]["url"])]
    plan = make_plan(store, make_optout(entries))  # type: ignore[arg-type]
    assert plan.keys == {"0000007", "0000008", "0000111"}
    store.write_bytes(PENDING, plan.pack())
    found = read_plan(store)
    assert found is not None
    assert found.pack() == plan.pack()
    assert found.keys == plan.keys
    assert found.given == plan.given
    store.remove(PENDING)
    assert read_plan(store) is None


def test_a_damaged_plan_says_what_to_do(store):
    store.write_bytes(PENDING, b"{")
    with pytest.raises(DeclipError, match=r"is damaged .* delete it and give the list again"):
        read_plan(store)
    store.remove(PENDING)


def test_it_says_what_identifies_each_sample_and_what_others_have_too(store):
    plan = make_plan(store, make_optout([("url", ROWS[7]["url"]), ("url", ROWS[11]["url"])]))
    first, second = plan.removed
    assert (first.key, first.url, first.caption) == (
        "0000007",
        ROWS[7]["url"],
        ROWS[7]["caption"],
    )
    # Row 41 is the first one's picture, row 50 has the second one's caption.
    assert set(first.digests) <= set(plan.shared)
    assert ROWS[11]["caption"] in plan.shared
    assert not set(second.digests) & set(plan.shared)


def test_touched_are_the_shards_that_hold_a_sample_or_name_it_as_a_neighbor(store):
    plan = make_plan(store, make_optout([("url", ROWS[12]["url"])]))
    assert {sample.shard for sample in plan.removed} == {"00000"}
    named = {
        shard
        for shard in ("00000", "00001")
        for row in sidecars.read_rows(store, f"neighbors/captions/{shard}.parquet")
        if "0000012" in row["neighbor_keys"]
    }
    assert set(plan.touched) == {"00000"} | named


def test_rows_are_counted_in_every_artefact(store):
    counts = count_rows(store)
    assert counts["shards"] == {"rows": 90, "samples": 80}
    assert counts["selection/default"] == {"rows": 80, "kept": 54}
    assert counts["index/captions"] == counts["embeddings/text"] == {"rows": 54}
    assert counts["neighbors/captions"] == {"rows": 54, "neighbors": 216}
    assert counts["quarantine"] == {"files": 0}


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path):
    with pytest.raises(DeclipError, match=r"no complete shard under .* --out"):
        make_plan(Store(str(tmp_path)), make_optout([("key", "000000001")]))
