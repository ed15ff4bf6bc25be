"""``declip index``: after an append the index's steps are done, and those that read it are not."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "filter"))

from stage_runs import HASHING, digests

from declip_filter import (
    BuildIndex,
    BuildNeighbors,
    EmbedPairs,
    FillIndex,
    TrainIndex,
    index_building,
    index_memory,
    index_training,
)
from declip_filter.index_files import index_path, load_index
from declip_shards import DeclipError, Store, layout, rewrite
from declip_shards.fakes import write_fake_dataset
from pipelines import index_command
from pipelines.index_command import append, main
from pipelines.pipeline import Pipeline, Step
from pipelines.runner import run_pipeline
from pipelines.states import pipeline_states

INDEX: dict[str, Any] = {"nlist": 8, "num_queries": 40, "rows_per_task": 128, "recall_target": 0.5}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks, and so parts, of 128 rows."""
    patch = pytest.MonkeyPatch()
    for module in (index_building, index_memory, index_training):
        patch.setattr(module, "ROWS_AT_ONCE", 128)
    yield
    patch.undo()


def pipeline_of(root: str) -> Pipeline:
    shared: dict[str, Any] = {"root": root, **INDEX}
    embed = EmbedPairs(root=root, selection="", **HASHING)
    steps = [
        Step(name="embed", stage=embed),
        Step(name="train_index", stage=TrainIndex(**shared), reads=("embed",)),
        Step(name="fill_index", stage=FillIndex(**shared), reads=("embed", "train_index")),
        Step(name="index", stage=BuildIndex(**shared), reads=("embed", "fill_index")),
        Step(
            name="neighbors",
            stage=BuildNeighbors(root=root, k=3, num_candidates=8, method="index"),
            reads=("embed", "index"),
        ),
    ]
    return Pipeline(recipe="test", root=root, steps=steps)


def states(root: str) -> dict[str, str]:
    return {state.step: state.state for state in pipeline_states(pipeline_of(root))}


def run(root: str, *, until: str | None = None) -> None:
    pipeline = pipeline_of(root)
    run_pipeline(pipeline, pipeline.choose(until=until), runner="local")


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> str:
    """Twelve shards of which eight are indexed; all are embedded."""
    root = str(tmp_path_factory.mktemp("grown"))
    for num_shards in (8, 12):
        write_fake_dataset(root, num_shards=num_shards, samples_per_shard=40)
        # A folder of a recipe's; the step looks at all shards again.
        Path(root, "manifests").mkdir(exist_ok=True)
        Store(root).remove(layout.manifest_path("embed"))
        run(root, until="index" if num_shards == 8 else "embed")
    return root


@pytest.fixture
def root(grown, tmp_path) -> str:
    return str(shutil.copytree(grown, tmp_path / "data"))


def test_after_an_append_only_what_reads_the_index_runs(root, capsys):
    before = states(root)
    assert before["embed"] == "done"
    assert before["index"] == "stale"
    assert "4 shards are embedded and not in it" in told(root, "info", capsys)
    store = Store(root)
    growth = append(store, "captions")
    assert (growth.num_before, growth.num_added) == (320, 160)
    after = states(root)
    assert [after[step] for step in ("train_index", "fill_index", "index")] == ["done"] * 3
    files = digests(root, "index")
    run(root)
    assert digests(root, "index") == files
    assert set(states(root).values()) == {"done"}
    out = capsys.readouterr().out
    assert "index: nothing to do (480 in, 480 out)" in out
    assert "neighbors: " in out
    assert "are embedded and not in it" not in told(root, "info", capsys)


def told(root: str, command: str, capsys, *more: str) -> str:
    assert main([command, "--out", root, *more]) == 0
    return str(capsys.readouterr().out)


def test_the_command_says_what_it_did_and_that_there_is_no_more(root, capsys):
    text = told(root, "append", capsys)
    assert "160 rows of 4 shards appended, 480 in all" in text
    assert "run declip run again" in text
    assert "nothing to append" in told(root, "append", capsys)
    assert "trained on 320 rows" in told(root, "info", capsys)
    assert load_index(Store(root), "captions").num_rows == 480


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("index.faiss", r"index.faiss' has \d+ bytes, \d+ were written: it is cut short; delete"),
        ("rows.parquet", r"rows.parquet' is damaged"),
        ("info.json", r"info.json' is damaged"),
        (None, r"index.faiss' is missing; rerun the stage that indexes"),
    ],
)
def test_a_cut_or_missing_file_is_no_healthy_index(root, capsys, file, sentence):
    folder = Path(root, "index", "captions")
    if file is None:
        (folder / "index.faiss").unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-7])
    assert main(["info", "--out", root]) == 1
    text = capsys.readouterr().out
    assert text.startswith("captions")
    assert re.search(rf"  DAMAGED: .*{sentence}", text)


@pytest.mark.parametrize("moment", ["before the list of moves", "between two moves"])
def test_killed_anywhere_and_run_again_it_is_the_same(root, tmp_path, monkeypatch, moment):
    other = shutil.copytree(root, str(tmp_path / "other"))
    append(Store(other), "captions")
    killed = Store(root)
    with monkeypatch.context() as patch:
        if moment == "before the list of moves":
            patch.setattr(index_command, "publish_growth", stop)
        else:
            moves: list[str] = []

            def move(self, source, target, real=Store.move):
                if len(moves) == 2:
                    stop()
                moves.append(target)
                real(self, source, target)

            patch.setattr(Store, "move", move)
        with pytest.raises(KeyboardInterrupt):
            append(killed, "captions")
    append(Store(root), "captions")
    for folder in ("index", "manifests"):
        assert digests(root, folder) == digests(other, folder)
    assert killed.list_folders(rewrite.FOLDER) == []


def stop(*_, **__):
    raise KeyboardInterrupt


def test_a_step_that_was_out_of_date_stays_so(root):
    store = Store(root)
    path = layout.receipt_path("fill_index", "00001")
    store.write_bytes(
        path, store.read_bytes(path).replace(b'"fingerprint": "', b'"fingerprint": "0')
    )
    append(store, "captions")
    now = states(root)
    assert now["train_index"] == "done"
    assert now["fill_index"] == "stale"


def test_a_copy_to_hand_on(root, tmp_path, capsys):
    store = Store(root)
    keys = load_index(store, "captions").keys.tolist()
    listed = tmp_path / "keys.txt"
    listed.write_text("\n".join(keys[:50]) + "\n")
    before = digests(root, "index/captions") | digests(root, "manifests")
    text = told(root, "remove", capsys, str(listed), "--to", "served")
    assert "index 'served': 50 rows left out, 270 remain" in text
    assert "declip optout" in text
    assert digests(root, "index/captions") | digests(root, "manifests") == before
    assert "a copy of 'captions' without some samples" in told(root, "info", capsys)
    assert store.exists(index_path("served"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["append", "--name", "caption"], r"has no index 'caption'. Did you mean 'captions'"),
        (["append", "--max-nprobe", "0"], r"--max-nprobe is 0; it must be at least 1"),
        (["remove", "/nowhere", "--to", "x"], r"'/nowhere' cannot be read as a text of keys"),
        (["remove", "/dev/null", "--to", "x"], r"'/dev/null' names no key"),
        (["apend"], r"has no command 'apend'"),
    ],
)
def test_wrong_commands_are_refused(grown, arguments, sentence):
    with pytest.raises(DeclipError, match=sentence):
        main([*arguments, "--out", grown])


def test_without_an_index_it_is_said(tmp_path):
    with pytest.raises(DeclipError, match=r"has no index; run the index stage first"):
        main(["info", "--out", str(tmp_path)])
