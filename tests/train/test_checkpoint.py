"""Checkpoints: whole or not there; the newest whole one is taken, and the others named."""

import itertools
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from declip_shards import DeclipError
from declip_train.checkpoint import (
    LATEST,
    MANIFEST,
    Checkpoints,
    check_checkpoint,
    file_digest,
    seed_random_states,
    tag_of,
)
from declip_train.loop import run_name
from declip_train.settings import TrainSettings

RUN = {"settings": "abc", "samples": "def"}
MODEL = "mp_rank_00_model_states.pt"
SHARE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class FakeEngine:
    """Saves as DeepSpeed's engine does: one file of its own, one for each process."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = None
        self.module = torch.nn.Module()
        self.weights = torch.zeros(1000)
        self.moments = torch.zeros(3000)

    @property
    def value(self):
        return int(self.moments[0])

    @value.setter
    def value(self, value):
        self.weights.fill_(value)
        self.moments.fill_(value)

    def zero_optimization_stage(self):
        return 1

    def save_checkpoint(self, save_dir, tag, client_state, save_latest):
        assert save_latest is False
        folder = Path(save_dir) / tag
        self.checkpoint_engine.makedirs(str(folder), exist_ok=True)
        self.checkpoint_engine.save({"module": {"w": self.weights}}, f"{folder}/{MODEL}")
        self.checkpoint_engine.save({"moments": self.moments}, f"{folder}/{SHARE}")
        return True

    def load_checkpoint(self, load_dir, tag):
        folder = Path(load_dir) / tag
        self.moments.copy_(torch.load(folder / SHARE)["moments"])
        self.weights.copy_(torch.load(folder / MODEL)["module"]["w"])
        return str(folder), {}


@pytest.fixture(autouse=True)
def _process_group(tmp_path_factory):
    meeting = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def said():
    return []


@pytest.fixture
def three(tmp_path, said):
    """Checkpoints after 3, 6 and 9 steps of an engine whose value is the step."""
    checkpoints = Checkpoints(tmp_path, RUN, keep=3, say=said.append)
    engine = FakeEngine()
    for engine.value in (3, 6, 9):
        checkpoints.save(engine, engine.value)
    return checkpoints


def restored(checkpoints):
    engine = FakeEngine()
    step = checkpoints.restore(engine)
    assert engine.value == step
    return step


def test_the_newest_is_restored(three):
    assert restored(three) == 9


def test_nothing_there_is_step_zero(tmp_path, said):
    assert Checkpoints(tmp_path / "none", RUN, keep=1, say=said.append).restore(FakeEngine()) == 0


def draws():
    numbers = np.random.normal(size=3)  # noqa: NPY002 (the generator that libraries draw from)
    return [torch.rand(2).tolist(), numbers.tolist(), random.gauss(0, 1)]


def test_random_numbers_of_every_kind_go_on(tmp_path, said):
    checkpoints = Checkpoints(tmp_path, RUN, keep=1, say=said.append)
    seed_random_states(RUN, 7, 0)
    draws()  # Leaves half a pair of normal numbers in two of the generators.
    checkpoints.save(FakeEngine(), 1)
    expected = draws()
    seed_random_states(RUN, 8, 0)
    assert draws() != expected
    checkpoints.restore(FakeEngine())
    assert draws() == expected


def test_seeds_differ_by_run_step_and_process():
    places = [(RUN, 7, 0), (RUN, 7, 1), (RUN, 8, 0), ({**RUN, "settings": "z"}, 7, 0), (RUN, 7, 0)]
    found = []
    for place in places:
        seed_random_states(*place)
        found.append(draws())
    assert found[0] == found[-1]
    assert all(a != b for a, b in itertools.combinations(found[:-1], 2))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "never finished": lambda folder: (folder / MANIFEST).unlink(),
    "manifest is damaged": lambda folder: (folder / MANIFEST).write_text("{"),
    "has changed since": lambda folder: flip(folder / "mp_rank_00_model_states.pt"),
    "cut short": lambda folder: os.truncate(folder / "mp_rank_00_model_states.pt", 10),
    "is missing": lambda folder: (folder / "rank_00000.json").unlink(),
    "has format 99": lambda folder: (folder / MANIFEST).write_text(
        json.dumps({"format_version": 99, "files": []})
    ),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_aloud(three, said, fault):
    DAMAGE[fault](three.folder / tag_of(9))
    assert restored(three) == 6
    assert len(said) == 2
    assert said[0].startswith(f"checkpoint {tag_of(9)} is skipped: ")
    assert fault in said[0]


def test_every_flipped_byte_is_noticed(three):
    folder = three.folder / tag_of(6)
    for path in folder.iterdir():
        if path.name != MANIFEST:
            flip(path)
            assert check_checkpoint(folder, RUN) is not None
            flip(path)
    assert check_checkpoint(folder, RUN) is None


def test_another_run_is_not_continued(three, said):
    other = Checkpoints(three.folder, {**RUN, "settings": "xyz"}, keep=3, say=said.append)
    assert other.restore(FakeEngine()) == 0
    assert "of another run (settings is 'abc', not 'xyz')" in said[0]


def test_a_checkpoint_of_another_method_is_skipped_aloud(tmp_path, said):
    """The loop never looks there, as a run's folder is named by its settings; were the folder
    copied, nothing of it would be loaded all the same."""
    settings = {
        method: TrainSettings(model="test", method=method, max_steps=9, warmup_steps=1)
        for method in ("slip", "declip")
    }
    runs = {
        method: {"settings": value.digest(), "samples": "s"} for method, value in settings.items()
    }
    assert run_name(runs["slip"]) != run_name(runs["declip"])
    engine = FakeEngine()
    engine.value = 4
    Checkpoints(tmp_path, runs["slip"], keep=1, say=said.append).save(engine, 4)
    assert Checkpoints(tmp_path, runs["declip"], keep=1, say=said.append).restore(FakeEngine()) == 0
    assert said == [
        f"checkpoint {tag_of(4)} is skipped: it is of another run (settings is "
        f"{runs['slip']['settings']!r}, not {runs['declip']['settings']!r})"
    ]
    assert restored(Checkpoints(tmp_path, runs["slip"], keep=1, say=said.append)) == 4


def test_a_manifest_cannot_point_elsewhere(three, tmp_path):
    (tmp_path / "outside").write_text("x")
    folder = three.folder / tag_of(9)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"].append({**manifest["files"][0], "path": "../outside"})
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert check_checkpoint(folder, RUN) == "../outside is missing"


def test_only_the_newest_are_kept(three):
    three.keep = 2
    engine = FakeEngine()
    engine.value = 12
    three.save(engine, 12)
    assert [step for step, _ in three.tags()] == [12, 9]
    three.prune(1)
    assert [step for step, _ in three.tags()] == [12]


def test_every_nth_is_kept_for_good(tmp_path, said):
    checkpoints = Checkpoints(tmp_path, RUN, keep=2, say=said.append, keep_every=4)
    for step in (2, 4, 6, 8, 9, 10):
        checkpoints.save(FakeEngine(), step)
    assert [step for step, _ in checkpoints.tags()] == [10, 9, 8, 4]
    checkpoints.prune(1)
    assert [step for step, _ in checkpoints.tags()] == [10, 8, 4]


def test_latest_names_the_newest_and_its_absence_is_told(three, said):
    assert (three.folder / LATEST).read_text() == f"{tag_of(9)}\n"
    (three.folder / tag_of(9)).rename(three.folder / "elsewhere")
    assert restored(three) == 6
    assert said[0] == f"checkpoint {tag_of(9)}, which 'latest' names, is not there"


def test_what_a_killed_save_left_is_removed(three):
    """A save is built under another name: nobody takes it for a checkpoint, and it goes."""
    left = three.folder / f"{tag_of(12)}.part-save"
    left.mkdir()
    (left / SHARE).write_text("half of it")
    assert [step for step, _ in three.tags()] == [9, 6, 3]
    assert restored(three) == 9
    assert not left.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(three, said):
    flip(three.folder / tag_of(9) / MODEL)
    assert restored(three) == 6
    engine = FakeEngine()
    engine.value = 9
    three.save(engine, 9)
    assert restored(three) == 9
    assert sorted(path.name for path in three.folder.iterdir()) == [
        LATEST, tag_of(3), tag_of(6), tag_of(9)
    ]  # fmt: skip


def test_damaged_newer_ones_do_not_push_out_good_ones(three, said):
    """With one to keep, the newest by number must not be one that was skipped."""
    flip(three.folder / tag_of(9) / MODEL)
    three.keep = 1
    assert restored(three) == 6
    assert len(three.tags()) == 3  # Nothing goes before something new is whole.
    engine = FakeEngine()
    engine.value = 8
    three.save(engine, 8)
    assert [step for step, _ in three.tags()] == [8]
    assert said[-1] == f"checkpoint {tag_of(9)} is removed: the run went on from before it"
    assert restored(three) == 8


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(three, monkeypatch):
    monkeypatch.setattr("declip_train.checkpoint.free_bytes", lambda folder: 1000)
    with pytest.raises(DeclipError) as refused:
        three.save(FakeEngine(), 12)
    assert re.fullmatch(
        r"the checkpoint after step 12 needs 1\d\d\.\d kB \(1\d{5} bytes\), but 1\.0 kB \(1000 "
        r"bytes\) are free in '.*'; free some disk space and run again: it goes on after step 9\.",
        str(refused.value),
    )
    assert sorted(path.name for path in three.folder.iterdir()) == [
        LATEST, tag_of(3), tag_of(6), tag_of(9)
    ]  # fmt: skip
    assert restored(three) == 9


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(three, monkeypatch):
    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("declip_train.checkpoint_files.os.fsync", no_room)
    with pytest.raises(DeclipError) as refused:
        three.save(FakeEngine(), 12)
    monkeypatch.undo()
    assert str(refused.value) == (
        "process 0 could not write the checkpoint after step 12: No space left on device; free "
        "some disk space and run again: it goes on after step 9."
    )
    assert not list(three.folder.glob("*.part-*"))
    assert restored(three) == 9


def test_the_first_save_says_that_nothing_is_there(tmp_path, said, monkeypatch):
    monkeypatch.setattr("declip_train.checkpoint.free_bytes", lambda folder: 0)
    with pytest.raises(DeclipError, match=r"run again: it begins anew\.$"):
        Checkpoints(tmp_path, RUN, keep=1, say=said.append).save(FakeEngine(), 1)


class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("code_ran"),))


def test_a_pickle_that_runs_code_is_not_loaded(three, said, tmp_path, monkeypatch):
    """Not even when its manifest vouches for it: whoever can write one can write the other."""
    monkeypatch.chdir(tmp_path)
    folder = three.folder / tag_of(9)
    torch.save({"module": RunsCode()}, folder / MODEL)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for record in manifest["files"]:
        if record["path"] == MODEL:
            record["sha256"] = file_digest(folder / MODEL)
            record["size"] = (folder / MODEL).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert check_checkpoint(folder, RUN) is None
    assert restored(three) == 6
    assert said[0].startswith(f"checkpoint {tag_of(9)} is skipped: {MODEL} is not a file of states")
    assert not Path("code_ran").exists()


def test_other_versions_and_backends_are_told_loudly(three, said):
    folder = three.folder / tag_of(9)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["made_by"]["versions"]["torch"] = "1.0"
    manifest["made_by"]["backend"] = "nccl"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert restored(three) == 9
    assert said[0] == "continuing after step 9"
    assert said[1] == "WARNING: it was written under nccl, this is gloo"
    assert said[2].startswith("WARNING: the checkpoint was written with torch 1.0, this is ")
    assert len(said) == 3


def in_background(tmp_path, said):
    return Checkpoints(tmp_path, RUN, keep=3, say=said.append, in_background=True)


def wait_for(checkpoints):
    while not checkpoints.poll():
        time.sleep(0.01)


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path, said):
    """What is written is the state at the step, whatever happens to it afterwards."""
    checkpoints, engine = in_background(tmp_path, said), FakeEngine()
    engine.value = 3
    checkpoints.save(engine, 3)
    engine.value = 99
    assert checkpoints.tags() == []
    wait_for(checkpoints)
    assert not checkpoints.poll()
    engine.value = 6
    checkpoints.save(engine, 6)
    engine.value = 9
    checkpoints.save(engine, 9)  # Waits for the one before.
    assert [step for step, _ in checkpoints.tags()] == [6, 3]
    checkpoints.finish()
    assert [step for step, _ in checkpoints.tags()] == [9, 6, 3]
    assert restored(checkpoints) == 9


def test_a_checkpoint_from_the_background_has_the_same_bytes(tmp_path, said):
    seed_random_states(RUN, 1, 0)
    for name, background in (("one", False), ("other", True)):
        checkpoints = Checkpoints(
            tmp_path / name, RUN, keep=3, say=said.append, in_background=background
        )
        checkpoints.save(FakeEngine(), 1, {"tables": [1, 2]})
        checkpoints.finish()
    one, other = (tmp_path / name / tag_of(1) for name in ("one", "other"))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_a_fault_in_the_background_is_told_at_the_next_look(tmp_path, said, monkeypatch):
    checkpoints = in_background(tmp_path, said)

    def no_room(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("declip_train.async_save.write_state", no_room)
    checkpoints.save(FakeEngine(), 3)
    with pytest.raises(DeclipError, match="process 0 could not write the checkpoint after step 3"):
        wait_for(checkpoints)
    assert not list(tmp_path.iterdir())
