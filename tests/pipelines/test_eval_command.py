"""declip eval, with a real model, alone and in several processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_sets import write_colors, write_pairs

from declip_shards import DeclipError
from declip_shards.store import TEMPORARY_MARK
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.model_config import get_model_config
from declip_train.towers import CLIP
from pipelines.eval_cache_room import sweep_leftovers
from pipelines.eval_command import main
from pipelines.eval_summary import SUMMARY


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    write_colors(root / "sets/colors", num_test=40, num_train=24)
    write_pairs(root / "sets/pairs")
    model = CLIP(get_model_config("test"), generator=torch.Generator().manual_seed(0)).eval()
    export_open_clip(model, None, root / "export", PreprocessSettings(), {"model": "test"})
    return root


def words(root, name, *more):
    return [
        f"--model={root / 'export'}",
        *("--dataset", "colors", "pairs"),
        *("--task", "auto", "linear_probe", "--recall-k", "1", "5"),
        f"--dataset-root={root / 'sets'}",
        f"--output={root / name / 'out'}",
        f"--feature-root={root / name / 'features'}",
        *("--batch-size", "4", "--chunk-images", "8", "--device", "cpu"),
        *("--num-resamples", "100", "--num-examples", "4", *more),
    ]


def contents(folder):
    """All files but the records of sets' files, which leave out what was written a moment ago."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("part-")
    }


@pytest.fixture(scope="module")
def alone(root):
    """What one process writes."""
    assert main(words(root, "alone")) == 0
    return contents(root / "alone/out"), contents(root / "alone/features")


def test_a_table_is_printed_and_a_second_run_keeps_everything(root, alone, capsys):
    assert main(words(root, "alone")) == 0
    printed = capsys.readouterr().out
    assert "lp_acc1" in printed
    assert "image_retrieval_recall@5" in printed
    assert "other_kind: pairs (linear_probe" in printed
    after = contents(root / "alone/out")
    assert after.pop(SUMMARY).count(b'"kept"') == 3
    before = dict(alone[0])
    before.pop(SUMMARY)
    assert after == before
    assert main([*words(root, "alone"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_missing_dataset_gives_status_1_unless_allowed(root, alone, capsys):
    more = [*words(root, "alone"), "--dataset", "pairs", "mnist", "--task", "auto"]
    assert main(more) == 1
    assert "missing: mnist" in capsys.readouterr().out
    assert main([*more, "--allow-missing"]) == 0


def test_faults_are_refused_before_anything_is_done(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for more, sentence in (
        (["--dataset", "colrs"], "colrs"),
        ([f"--feature-root={tmp_path / 'file'}"], "cannot be made a folder"),
        ([f"--output={tmp_path / 'file/out'}"], "file' is no folder"),
        ([f"--model={tmp_path}"], "is no model"),
    ):
        with pytest.raises(DeclipError, match=sentence):
            main([*words(root, "refused"), *more])
    assert not (root / "refused/out").exists()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(DeclipError, match="leave --num-ranks out"):
        main(words(root, "refused", "--num-ranks", "2"))


@pytest.mark.distributed
def test_a_process_of_its_own_gives_the_same_bytes(root, alone, caplog):
    assert main(words(root, "ranks_2", "--num-ranks", "2")) == 0
    assert contents(root / "ranks_2/out") == alone[0]
    assert contents(root / "ranks_2/features") == alone[1]
    assert "ended with status" not in caplog.text, "each rank has done its part"


FORKS = """
import json, os, pathlib, signal, sys, time
import declip_eval.strength_sweep, pipelines.eval_models, pipelines.eval_tasks, torch
from pipelines.eval_command import main

def fork(words, **environment):
    process = os.fork()
    if not process:
        os.environ.update(environment)
        status = 1
        try:
            status = main(words)
        finally:
            os._exit(status)
    return process

launched, killed, features = json.loads(sys.argv[1])
ranks = [fork(launched, RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0, 0, 0]
process = fork(killed)
while len(list(pathlib.Path(features).rglob("chunk-*.npz"))) < 2:
    assert os.waitpid(process, os.WNOHANG) == (0, 0), "it has ended"
    time.sleep(0.002)
os.kill(process, signal.SIGKILL)
assert os.waitpid(process, 0)[1] == signal.SIGKILL
"""
"""Processes of one that has imported torch: three of a launcher, and one that is killed."""


@pytest.mark.distributed
def test_a_launchers_three_processes_and_a_rerun_after_a_kill_give_the_same_bytes(root, alone):
    forks = [words(root, "ranks_3"), words(root, "killed"), str(root / "killed/features")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(forks)], env=environment, check=True, timeout=120
    )
    assert contents(root / "ranks_3/out") == alone[0]
    features = contents(root / "ranks_3/features")
    signs = {name for name in features if name.startswith(".ranks/")}
    assert {name.rpartition("/")[2] for name in signs} == {f"rank-0000{rank}" for rank in range(3)}
    assert {name: data for name, data in features.items() if name not in signs} == alone[1]
    assert main(words(root, "killed")) == 0
    # What stood when it was killed says kept, where it had come so far.
    results, before = contents(root / "killed/out"), dict(alone[0])
    results.pop(SUMMARY), before.pop(SUMMARY)
    assert results == before
    # What was half written when it was killed goes an hour later, for others may be writing.
    features = root / "killed/features"
    for path in features.rglob(f"*{TEMPORARY_MARK}*"):
        os.utime(path, (1000, 1000))
    sweep_leftovers(features)
    assert contents(features) == alone[1]
