"""Manifests that are published again. The whole of it: tests/pipelines/test_optout.py."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from declip_shards import Store, layout, manifest
from pipelines.rechain import read_manifests, rechain
from pipelines.states import pipeline_states

if TYPE_CHECKING:
    from tests.pipelines.optout_dataset import build, make_pipeline
else:
    from optout_dataset import build, make_pipeline

STEPS = [
    "ingest",
    "measure",
    "duplicates",
    "plan",
    "filter",
    "embed",
    "index",
    "graph",
    "neighbors",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("rechain") / "data")
    build(root)
    return root


def test_a_step_comes_after_those_that_it_reads(root):
    assert list(read_manifests(Store(root))) == STEPS


def test_where_nothing_changed_the_same_bytes_come_out(root):
    """What it makes of unchanged files is what the runner wrote: receipts and manifests alike."""
    store = Store(root)
    shards = layout.list_shards(store)
    made = rechain(store, tasks=shards, changes={}, still_holds=lambda last: True)
    assert len(made) == len(STEPS) + 5 * len(shards) + 4  # four steps have one task
    for path, data in made.items():
        assert data == store.read_bytes(path), path


def test_a_file_that_is_about_to_change_counts_as_it_will_be(root):
    store = Store(root)
    path = "index/captions/info.json"
    info = json.loads(store.read_bytes(path)) | {"nb vectors": 7}
    made = rechain(
        store, tasks=(), changes={path: json.dumps(info).encode()}, still_holds=lambda last: True
    )
    receipt = json.loads(made["manifests/index/all.json"] or b"")
    assert receipt["num_in"] == receipt["num_out"] == 7
    sizes = {record["path"]: record["size"] for record in receipt["files"]}
    assert sizes[path] == len(json.dumps(info))


def test_a_step_whose_receipts_are_not_all_there_is_left_to_run_again(root, tmp_path):
    copy = str(tmp_path / "copy")
    shutil.copytree(root, copy)
    store = Store(copy)
    store.remove(layout.receipt_path("measure", "00001"))
    (Path(copy) / "signals/basic/00001.parquet").write_bytes(b"changed")
    made = rechain(store, tasks=["00000"], changes={}, still_holds=lambda last: True)
    assert not [path for path in made if path.startswith("manifests/measure")]
    for path, data in made.items():
        assert data is not None
        store.write_bytes(path, data)
    states = {s.step: s.state for s in pipeline_states(make_pipeline(copy))}
    assert states["ingest"] == "done"
    assert states["measure"] == "stale"
    done = manifest.read_manifest(store, "ingest")
    assert done is not None
    assert manifest.damaged_files(store, done, deep=True) == []
