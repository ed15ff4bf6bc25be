"""Figures and differences of tables, IDs of refreshed ones, and which may go."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from stage_runs import HASHING, run_stage

from declip_filter import BuildNeighbors, EmbedPairs
from declip_filter.table_versions import (
    _Asked,
    check_table,
    compare_tables,
    finish_version,
    finished_versions,
    inputs_digest,
    old_versions,
    remove_version,
    table_figures,
    version_id,
)
from declip_shards import DeclipError, Store, layout, neighbor_tables, sidecars
from declip_shards.neighbor_tables import point_to, resolve_table, version_folder

SETTINGS: dict[str, Any] = {"index": "", "embeddings": "text", "kind": "text_emb", "k": 4}


@pytest.fixture
def table_root(embedded_root: str) -> str:
    """A table of the pipeline's, without an index."""
    run_stage(BuildNeighbors(root=embedded_root, **SETTINGS))
    return embedded_root


def write_version(root, version_id, *, salted=True, k=4):
    """A refreshed table of other weights; it is not finished."""
    name = f"text.{version_id}"
    encoder: dict[str, Any] = dict(HASHING)
    if salted:
        encoder["encoder_factory"] = "hashing_encoder:make_salted"
    run_stage(EmbedPairs(root=root, name=name, **encoder))
    folder = version_folder("captions", version_id)
    settings = SETTINGS | {"embeddings": name, "k": k}
    run_stage(BuildNeighbors(root=root, name=folder, **settings))
    return folder


def test_figures_are_those_of_the_rows(table_root):
    store = Store(table_root)
    rows = [
        row
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.neighbors_path("captions", shard))
    ]
    scores = [score for row in rows for score in row["scores"]]
    best = [row["scores"][0] for row in rows if row["scores"]]
    limit = float(np.mean([min(best), max(best)]))
    figures = table_figures(store, "captions", useful_score=limit)
    assert (figures.num_rows, figures.num_neighbors) == (72, len(scores)) == (72, 72 * 4)
    assert figures.fraction_with_neighbor == 1.0
    share = np.mean([score >= limit for score in best])
    assert 0 < share < 1
    assert figures.fraction_useful == pytest.approx(share, abs=1e-6)
    assert figures.mean_score == pytest.approx(np.mean(scores), abs=1e-6)
    assert figures.mean_best_score == pytest.approx(np.mean(best), abs=1e-6)
    assert table_figures(store, "captions").useful_score == 0.5


def test_a_table_differs_from_itself_in_nothing(table_root):
    store = Store(table_root)
    same = compare_tables(store, "captions", "captions")
    assert (same.num_rows, same.num_changed, same.num_new_neighbors) == (72, 0, 0)
    other = compare_tables(store, "captions", write_version(table_root, "aa"))
    assert 0 < other.num_changed <= 72
    assert other.num_changed <= other.num_new_neighbors + 72
    shorter = compare_tables(store, "captions", write_version(table_root, "bb", salted=False, k=3))
    assert (shorter.num_changed, shorter.num_new_neighbors) == (72, 0)


def test_every_key_must_be_held_by_a_shard(table_root):
    store = Store(table_root)
    assert check_table(store, "captions") == 72
    path = layout.shard_parquet_path("00001")
    table = sidecars.read_table(store, path)
    rows = table.to_pylist()
    gone = next(row for row in rows if row["status"] == "success")
    named = {
        near
        for shard in layout.list_shards(store)
        for row in sidecars.read_rows(store, layout.neighbors_path("captions", shard))
        for near in row["neighbor_keys"]
    }
    what = "neighbor" if gone["key"] in named else "sample"
    gone["status"] = "failed_to_download"
    sidecars.write_table(store, path, type(table).from_pylist(rows, schema=table.schema))
    with pytest.raises(DeclipError, match=rf"names the {what} '{gone['key']}', which no shard"):
        check_table(store, "captions")


def test_a_finished_version_can_be_used_and_says_how_it_differs(table_root):
    store = Store(table_root)
    folder = write_version(table_root, "aa")
    with pytest.raises(DeclipError, match=r"never finished"):
        point_to(store, "captions", folder)
    record = finish_version(
        store, folder, before="captions", inputs_sha256="x", run="cafe", step=12
    )
    assert record["change"]["num_changed"] > 0
    assert record["figures"]["num_rows"] == 72
    assert (
        finish_version(store, folder, before="captions", inputs_sha256="x", run="cafe", step=12)
        == record
    )
    point_to(store, "captions", folder)
    version = resolve_table(store, "captions")
    assert (version.folder, version.run, version.step) == (folder, "cafe", 12)
    assert version.embeddings == "text.aa"


def test_a_version_of_other_samples_is_not_finished(table_root):
    store = Store(table_root)
    folder = write_version(table_root, "aa")
    path = layout.neighbors_path(folder, "00000")
    table = sidecars.read_table(store, path)
    rows = table.to_pylist()
    rows[3]["neighbor_keys"][0] = "77777777"
    sidecars.write_table(store, path, type(table).from_pylist(rows, schema=table.schema))
    with pytest.raises(DeclipError, match=r"names the neighbor '77777777'.*of other shards"):
        finish_version(store, folder, before="captions", inputs_sha256="x")
    assert finished_versions(store, "captions") == []


def test_an_id_is_of_all_that_goes_in_and_of_nothing_else(table_root):
    store = Store(table_root)
    parts = {"encoder": "a", "inputs": inputs_digest(store, "default"), "settings": {"k": 4}}
    assert version_id(parts) == version_id(dict(reversed(parts.items())))
    assert len(version_id(parts)) == 12
    for name in parts:
        assert version_id(parts | {name: "other"}) != version_id(parts)
    path = layout.selection_path("default", "00001")
    table = sidecars.read_table(store, path)
    sidecars.write_table(store, path, table.slice(1))
    assert inputs_digest(store, "default") != parts["inputs"]


def test_the_newest_and_those_in_use_stay(table_root):
    store = Store(table_root)
    folders = [write_version(table_root, name) for name in ("cc", "aa", "bb", "dd")]
    for folder in folders[:3]:
        finish_version(store, folder, before="captions", inputs_sha256="x")
    point_to(store, "captions", folders[0])
    assert [folder for _, folder in finished_versions(store, "captions")] == folders[:3]
    assert old_versions(store, "captions", 1) == [folders[1], folders[3]]
    assert old_versions(store, "captions", 1, in_use=[folders[1]]) == [folders[3]]
    assert old_versions(store, "captions", 9) == [folders[3]], "never finished"
    with pytest.raises(DeclipError, match=r"keep is 0; it must be at least 1"):
        old_versions(store, "captions", 0)
    remove_version(store, folders[1], "text.aa")
    assert folders[1] not in neighbor_tables.list_versions(store, "captions")
    assert "text.aa" not in store.list_folders("embeddings")
    with pytest.raises(DeclipError, match=r"'captions' is no refreshed table"):
        remove_version(store, "captions", "text")
    assert resolve_table(store, "captions").folder == folders[0]


def test_the_keys_of_all_shards_are_not_hashed_anew_for_each():
    """Once a shard that took eleven seconds here."""
    keys = [f"{number:09d}" for number in range(300_000)]
    asked = _Asked("neighbor", pa.array(keys))
    some = pa.array(keys[7::3001])
    began = time.process_time()
    for number in range(300):
        asked.ask(f"{number:05d}", some)
    asked.answer()
    assert time.process_time() - began < 1.5
    asked.ask("a", some)
    asked.ask("b", pa.array([keys[5], "x", "y"]))
    asked.ask("c", pa.array(["z"]))
    with pytest.raises(DeclipError, match=r"'b' names the neighbor 'x', which no shard holds"):
        asked.answer()
    with pytest.raises(DeclipError, match=r"'d' names the sample 'x'"):
        _Asked("sample", pa.array([], pa.string())).ask("d", pa.array(["x"]))
