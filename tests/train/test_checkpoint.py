"""Checkpoints: whole or not there; the newest whole one is taken, and the others named."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from declip_shards import DeclipError
from declip_train.checkpoint import MANIFEST, Checkpoints, check_checkpoint, tag_of
from declip_train.loop import run_name
from declip_train.settings import TrainSettings

RUN = {"settings": "abc", "world_size": 1}


class FakeEngine:
    """Writes what DeepSpeed's engine writes: one file of its own, one for each process."""

    def __init__(self):
        self.value = 0

    def save_checkpoint(self, save_dir, tag, client_state, save_latest):
        assert save_latest is False
        folder = Path(save_dir) / tag
        (folder / "mp_rank_00_model_states.pt").write_bytes(b"model" * 100)
        (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text(str(self.value))
        return True

    def load_checkpoint(self, load_dir, tag):
        path = Path(load_dir) / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        self.value = int(path.read_text())
        return str(path), {}


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


def test_random_numbers_go_on(tmp_path, said):
    checkpoints = Checkpoints(tmp_path, RUN, keep=1, say=said.append)
    torch.manual_seed(7)
    checkpoints.save(FakeEngine(), 1)
    expected = torch.rand(4)
    torch.manual_seed(8)
    checkpoints.restore(FakeEngine())
    assert torch.equal(torch.rand(4), expected)


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
        method: {"settings": value.digest(), "world_size": 1} for method, value in settings.items()
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


def test_what_a_killed_save_left_is_replaced(three):
    folder = three.folder / tag_of(12)
    folder.mkdir()
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_text("of another world size")
    engine = FakeEngine()
    engine.value = 12
    three.save(engine, 12)
    assert restored(three) == 12
    assert not (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").exists()


def test_a_full_disk_keeps_the_checkpoint_before(three):
    class Full(FakeEngine):
        def save_checkpoint(self, *_, **__):
            raise OSError(28, "No space left on device")

    with pytest.raises(DeclipError, match="No space left on device; free some disk space"):
        three.save(Full(), 12)
    assert restored(three) == 9
