"""The duplicates' page: its ladder is the report's, its pairs are the tables'."""

import json

import pyarrow as pa
import pytest

from declip_filter import MeasureImages
from declip_filter.duplicates import FindDuplicates, report_path
from declip_shards import DeclipError, Sample, Store, layout, read_samples, sidecars, write_shard
from declip_shards.fakes import write_fake_dataset
from pipelines.duplicates_page import duplicates_page, read_duplicate_facts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two shards of which the second has four pictures of the first again, byte for byte."""
    root = str(tmp_path_factory.mktemp("duplicates") / "data")
    numbers = iter(range(1000))
    store = write_fake_dataset(
        root,
        num_shards=2,
        samples_per_shard=12,
        caption=lambda color, shape: f"{color} {shape} {next(numbers) % 20}",
    )
    first = list(read_samples(store, "00000"))
    second = list(read_samples(store, "00001"))
    copies = [
        Sample(key=s.key, image=other.image, caption=s.caption, metadata=s.metadata)
        for s, other in zip(second[:4], first[4:8], strict=True)
    ]
    rows = sidecars.read_table(store, layout.shard_parquet_path("00001"))
    write_shard(store, "00001", [*copies, *second[4:]], rows, {"count": 12, "successes": 12})
    for stage in (MeasureImages(root=root), FindDuplicates(root=root)):
        work = stage.worker()
        for task in stage.tasks():
            work(task)
    return store


def rows_of(store: Store) -> list[dict[str, object]]:
    return [
        row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.signals_path("duplicates", shard))
    ]


def test_the_ladder_is_that_of_the_report(made):
    facts = read_duplicate_facts(made, "duplicates", 50, 0)
    report = json.loads(made.read_bytes(report_path("duplicates")))
    assert {r.name: (r.alone, r.added) for r in facts.rungs} == {
        name: (said["alone"], said["ladder"]) for name, said in report["rungs"].items()
    }
    assert facts.rungs[0].name == "bytes"
    assert facts.rungs[0].alone == 4
    assert facts.num_samples == 24
    assert facts.num_dropped == sum(rung.added for rung in facts.rungs)
    assert dict(facts.figures())["samples"] == "24"


def test_pairs_are_those_that_a_rung_adds(made):
    facts = read_duplicate_facts(made, "duplicates", 50, 0)
    seen: set[object] = set()
    for rung in facts.rungs:
        column = f"duplicate_{rung.name}_of"
        fresh = {r["key"]: r[column] for r in rows_of(made) if r[column]}
        fresh = {key: of for key, of in fresh.items() if key not in seen}
        assert {pair.key: pair.of for pair in rung.pairs} == fresh
        seen |= set(fresh)
    assert all(pair.note.endswith("bits apart") for pair in facts.rungs[2].pairs)


def test_pairs_stand_side_by_side_on_the_page(made):
    facts = read_duplicate_facts(made, "duplicates", 3, 0)
    page = duplicates_page(made, facts)
    num_pairs = sum(len(rung.pairs) for rung in facts.rungs)
    assert page.count(b"data:image/") == 2 * num_pairs
    for pair in facts.rungs[0].pairs:
        stays, duplicate = f"stays: {pair.of}".encode(), f"duplicate: {pair.key}".encode()
        assert page.index(stays) < page.index(duplicate)
    assert len(facts.rungs[0].pairs) == 3
    assert facts == read_duplicate_facts(made, "duplicates", 3, 0)


def test_contaminated_samples_are_counted_by_set(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=6)
    table = {
        "key": [f"00000{n}" for n in range(6)],
        "contaminated_by": ["a:1", None, "a:2", None, "b:1", None],
        "contaminated_rung": ["bytes", None, "bytes", None, "perceptual", None],
    }
    sidecars.write_table(store, layout.signals_path("duplicates", "00000"), pa.table(table))
    facts = read_duplicate_facts(store, "duplicates", 10, 0)
    assert facts.contaminated == {"a": 2, "b": 1}
    assert {(p.key, p.of, p.note) for p in facts.contaminated_pairs} == {
        ("000000", "a:1", "bytes"),
        ("000002", "a:2", "bytes"),
        ("000004", "b:1", "perceptual"),
    }
    page = duplicates_page(store, facts)
    assert page.count(b"data:image/") == 3
    assert b"b:1 perceptual" in page


def test_a_sample_that_is_gone_is_said_to_be(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=4)
    table = {"key": ["000000"], "duplicate_bytes_of": ["nobody"]}
    sidecars.write_table(store, layout.signals_path("duplicates", "00000"), pa.table(table))
    page = duplicates_page(store, read_duplicate_facts(store, "duplicates", 10, 0))
    assert b"nobody: no longer in the dataset" in page


def test_signals_that_are_no_duplicates_are_refused(made):
    with pytest.raises(DeclipError, match=r"signals/basic/ holds no duplicates \(no column"):
        read_duplicate_facts(made, "basic", 10, 0)
