"""The neighbor table's page: figures of all shards, pictures of the samples that were drawn."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from declip_filter.table_versions import table_figures
from declip_shards import DeclipError, Store, layout, read_samples, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.neighbor_tables import description_path
from pipelines.neighbors_page import NEIGHBORS_SHOWN, neighbors_page, read_table_facts

EVERY = 4
"""One sample in so many has no neighbor."""


@pytest.fixture
def store(tmp_path) -> Store:
    """Three shards whose samples have the next ones as neighbors, also those of other shards."""
    store = write_fake_dataset(str(tmp_path), num_shards=3, samples_per_shard=8)
    keys = [s.key for shard in layout.list_shards(store) for s in read_samples(store, shard)]
    rng = np.random.default_rng(0)
    for shard in layout.list_shards(store):
        own = [key for key in keys if key.startswith(shard)]
        lists, scores = [], []
        for number, key in enumerate(own):
            num = 0 if number % EVERY == 0 else NEIGHBORS_SHOWN + 1
            place = keys.index(key)
            lists.append([keys[(place + step) % len(keys)] for step in range(1, num + 1)])
            scores.append(sorted(rng.uniform(-0.2, 1.0000001, num).tolist(), reverse=True))
        table = pa.table(
            {
                "key": own,
                "neighbor_keys": pa.array(lists, pa.list_(pa.string())),
                "scores": pa.array(scores, pa.list_(pa.float32())),
            }
        )
        sidecars.write_table(store, layout.neighbors_path("captions", shard), table)
    return store


def rows_of(store: Store) -> list[dict[str, Any]]:
    return [
        row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.neighbors_path("captions", shard))
    ]


def test_figures_are_those_of_all_shards(store):
    facts = read_table_facts(store, "captions", 100, 0)
    rows = rows_of(store)
    scores = [score for row in rows for score in row["scores"]]
    assert facts.num_samples == len(rows) == 24
    assert facts.num_with == sum(bool(row["neighbor_keys"]) for row in rows) == 18
    assert facts.num_neighbors == len(scores) == facts.all_counts.sum()
    assert facts.first_counts.sum() == facts.num_with
    assert facts.mean_score == pytest.approx(np.mean(scores))
    near = np.flatnonzero(facts.edges <= 0.5)[-1]
    assert facts.all_counts[near:].sum() == sum(score >= facts.edges[near] for score in scores)
    assert {e.key for e in facts.examples} == {r["key"] for r in rows if r["neighbor_keys"]}
    assert set(facts.lonely) == {r["key"] for r in rows if not r["neighbor_keys"]}
    for example in facts.examples:
        (row,) = (row for row in rows if row["key"] == example.key)
        assert [key for key, _ in example.neighbors] == row["neighbor_keys"]


def test_samples_are_shown_with_their_neighbors(store):
    facts = read_table_facts(store, "captions", 2, 3)
    page = neighbors_page(store, facts)
    assert len(facts.examples) == len(facts.lonely) == 2
    assert page.count(b"data:image/") == 2 * (1 + NEIGHBORS_SHOWN) + 2
    for example in facts.examples:
        places = [page.index(key.encode()) for key in (example.key, example.neighbors[0][0])]
        assert places == sorted(places)
    assert b"75.0%" in page
    assert b"has no table.json" in page


def test_what_table_json_says_is_on_the_page(store):
    said = b'{"format_version": 1, "encoder": "hashing:64", "k": 8, "method": "graph"}'
    store.write_bytes(description_path("captions"), said)
    page = neighbors_page(store, read_table_facts(store, "captions", 2, 0))
    assert b"hashing:64" in page
    assert b"graph" in page


def test_the_share_with_a_useful_neighbor_is_that_of_the_tables_own_score(store):
    best = [row["scores"][0] for row in rows_of(store) if row["scores"]]
    for score in (-1.0, 0.6, 0.9):
        said = b'{"format_version": 1, "settings": {"useful_score": %g}}' % score
        store.write_bytes(description_path("captions"), said)
        facts = read_table_facts(store, "captions", 2, 0)
        assert facts.num_useful == sum(one >= score for one in best)
        assert facts.useful_score == table_figures(store, "captions").useful_score == score
        share = f"{facts.num_useful} ({facts.num_useful / 24:.2%}) have one of {score:g} or more"
        assert ("useful", share) in facts.figures()
    assert 0 < facts.num_useful < facts.num_with
    assert b"have one of 0.9 or more" in neighbors_page(store, facts)


def test_a_table_made_for_other_shards_is_refused_by_file(store):
    other = store.read_bytes(layout.neighbors_path("captions", "00002"))
    store.write_bytes(layout.neighbors_path("captions", "00001"), other)
    with pytest.raises(DeclipError, match=r"'neighbors/captions/00001.parquet' names the sample"):
        read_table_facts(store, "captions", 5, 0)


def test_a_table_without_any_neighbor_is_told(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=4)
    table = pa.table(
        {
            "key": ["000000", "000001"],
            "neighbor_keys": pa.array([[], []], pa.list_(pa.string())),
            "scores": pa.array([[], []], pa.list_(pa.float32())),
        }
    )
    sidecars.write_table(store, layout.neighbors_path("captions", "00000"), table)
    facts = read_table_facts(store, "captions", 5, 0)
    assert facts.fraction == facts.mean_score == 0
    page = neighbors_page(store, facts)
    assert b"No sample has a neighbor." in page
    assert b"There is no score to draw." in page


def test_a_table_that_lacks_a_shard_is_refused(store):
    store.remove(layout.neighbors_path("captions", "00001"))
    with pytest.raises(DeclipError, match=r"'captions' does not cover shard 00001 in .*; run the"):
        read_table_facts(store, "captions", 5, 0)
