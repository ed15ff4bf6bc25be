"""Hashes of files, and the state by which one is known again."""

import hashlib
import os

import fsspec
import pytest

from declip_eval.content_hashes import SetFile, hash_file, hash_files, look_at
from declip_eval.set_files import SetFolder


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"one picture")
    return SetFile("a.jpg", str(tmp_path / "a.jpg"))


def test_a_hash_is_of_the_bytes_and_comes_with_the_state_that_it_is_of(file):
    found, state = hash_file(file)
    assert found == hashlib.sha256(b"one picture").hexdigest()
    assert state == look_at(file)
    assert hash_files([file, file]) == [found, found]


def test_other_bytes_of_the_same_size_and_time_are_another_state(file):
    before, times = look_at(file), os.stat(file.place)
    with open(file.place, "r+b") as opened:
        opened.write(b"two picture")
    os.utime(file.place, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file.place).st_mtime_ns == times.st_mtime_ns
    assert look_at(file) != before


def test_what_is_not_there_has_neither_hash_nor_state(tmp_path):
    gone = SetFile("b.jpg", str(tmp_path / "b.jpg"))
    assert look_at(gone) is None
    assert hash_files([gone]) == [None]
    assert hash_file(SetFile("", str(tmp_path)))[0] is None, "a folder"


def test_remote_files_are_known_by_their_mark_and_never_by_their_size():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/content_hashes/test/cat/a.jpg", b"one picture")
    folder = SetFolder("memory://content_hashes")
    try:
        ((name, there),) = folder.find("").items()
        assert there.size == 11
        file = SetFile(name, folder.shown(name), folder, there.mark)
        assert hash_file(file)[0] == hashlib.sha256(b"one picture").hexdigest()
        memory.pipe_file("/content_hashes/test/cat/a.jpg", b"two picture")
        later = folder.find("")[name].mark
        assert look_at(SetFile(name, folder.shown(name), folder, later)) != look_at(file)
        assert look_at(SetFile(name, folder.shown(name), folder, None)) is None
    finally:
        memory.rm("/content_hashes", recursive=True)
    assert hash_file(file)[0] is None
