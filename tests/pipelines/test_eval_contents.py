"""Hashes of evaluated sets' files: read once, shared by ranks, never believed against the file."""

import errno
import hashlib
import os
import threading

import pytest

from declip_eval.content_hashes import SetFile, hash_file, hash_files
from pipelines import eval_contents
from pipelines.eval_contents import ContentHashes
from pipelines.eval_ranks import Ranks

NUM_FILES = 60


@pytest.fixture
def files(tmp_path):
    (tmp_path / "set" / "test").mkdir(parents=True)
    found = []
    for number in range(NUM_FILES):
        path = tmp_path / "set" / "test" / f"{number}.jpg"
        path.write_bytes(b"%4d" % number)
        found.append(SetFile(f"test/{number}.jpg", str(path)))
    return found


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read; files count as settled at once."""
    names = []
    lock = threading.Lock()

    def read_and_note(file):
        with lock:
            names.append(file.name)
        return hash_file(file)

    monkeypatch.setattr(eval_contents, "hash_file", read_and_note)
    monkeypatch.setattr(eval_contents, "SETTLED_NS", -(10**9))
    monkeypatch.setattr(eval_contents, "MOST_PARTS", 20)
    return names


def hashes(root, files, ranks=None):
    return ContentHashes(root, ranks or Ranks(), 3).hashes(files, "test")


def test_hashes_are_those_of_the_files_in_their_order_and_nothing_is_read_twice(
    files, read, tmp_path
):
    expected = [hashlib.sha256(b"%4d" % number).hexdigest() for number in range(NUM_FILES)]
    assert hashes(tmp_path / "f", files) == expected == hash_files(files)
    assert sorted(read) == sorted(file.name for file in files)
    read.clear()
    assert hashes(tmp_path / "f", files) == expected
    assert hashes(tmp_path / "f", files[:30]) == expected[:30]
    assert not read
    assert hashes(tmp_path / "f", []) == []


def test_what_changed_is_read_again_and_nothing_else(files, read, tmp_path):
    hashes(tmp_path / "f", files)
    read.clear()
    times = os.stat(files[7].place)
    with open(files[7].place, "wb") as opened:
        opened.write(b"else")
    os.utime(files[7].place, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.unlink(files[9].place)
    found = hashes(tmp_path / "f", files)
    assert found == hash_files(files)
    assert found[9] is None
    assert sorted(read) == ["test/7.jpg", "test/9.jpg"]


def test_a_file_that_was_just_changed_is_not_put_down(files, read, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_contents, "SETTLED_NS", 10**12)
    for _ in range(2):
        read.clear()
        hashes(tmp_path / "f", files[:3])
        assert len(read) == 3


@pytest.mark.parametrize("harm", ["cut", "gone", "other"])
def test_a_damaged_record_is_read_anew(files, read, tmp_path, harm):
    first = hashes(tmp_path / "f", files)
    parts = sorted((tmp_path / "f").rglob("*.npz"))
    contents = [path.read_bytes() for path in parts]
    if harm == "cut":
        parts[3].write_bytes(contents[3][:-50])
    elif harm == "gone":
        parts[3].unlink()
    else:
        parts[3].write_bytes(b"something else")
    read.clear()
    assert hashes(tmp_path / "f", files) == first
    assert len(read) == 3, "one part"
    assert [path.read_bytes() for path in parts] == contents


def test_ranks_share_the_reading_and_agree(files, read, tmp_path):
    root, start = tmp_path / "f", threading.Barrier(3)
    found = {}

    def work(rank):
        start.wait()
        found[rank] = hashes(root, files, Ranks(rank=rank, size=3))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2] == hash_files(files)
    assert len(read) < 2 * NUM_FILES


def test_a_disk_without_room_is_told_and_costs_no_hash(files, read, tmp_path, monkeypatch, caplog):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(eval_contents, "atomic_write", full)
    assert hashes(tmp_path / "f", files[:2]) == hash_files(files[:2])
    assert "cannot be put down" in caplog.text
    assert "No space left" in caplog.text
