"""Files that a thread writes: the same as at once, and its faults are told."""

import threading

import pytest
import torch

from declip_train.async_save import BackgroundWrite, write_files
from declip_train.checkpoint_files import StateFile, write_state

FILES = [
    StateFile(name="weights.pt", content={"w": torch.arange(5.0)}),
    StateFile(name="rank_00000.json", content=b"{}"),
]


def test_a_thread_writes_what_is_written_at_once(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    write = BackgroundWrite(tmp_path / "one", FILES, 7)
    assert write.result() == write_files(tmp_path / "other", FILES)
    assert write.is_done
    assert write.step == 7
    for file in FILES:
        assert (tmp_path / "one" / file.name).read_bytes() == (
            tmp_path / "other" / file.name
        ).read_bytes()


def test_it_is_not_done_before_it_is(tmp_path, monkeypatch):
    gate = threading.Event()

    def wait(path, content):
        gate.wait(10)
        return write_state(path, content)

    monkeypatch.setattr("declip_train.async_save.write_state", wait)
    write = BackgroundWrite(tmp_path, FILES, 1)
    assert not write.is_done
    gate.set()
    fault, records = write.result()
    assert fault is None
    assert [record["path"] for record in records] == ["weights.pt", "rank_00000.json"]


def test_a_missing_folder_is_told_in_words(tmp_path):
    write = BackgroundWrite(tmp_path / "missing", FILES, 1)
    assert write.result() == ("No such file or directory", [])


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path, monkeypatch):
    def broken(path, content):
        raise MemoryError

    monkeypatch.setattr("declip_train.async_save.write_state", broken)
    with pytest.raises(MemoryError):
        BackgroundWrite(tmp_path, FILES, 1).result()
