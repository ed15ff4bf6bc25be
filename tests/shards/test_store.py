import os

import pytest

from declip_shards import DeclipError, Store
from declip_shards.store import TEMPORARY_MARK, atomic_write


def test_read_inverts_write_on_a_local_disk_and_in_memory(tmp_path):
    for url in (str(tmp_path), "memory://store-test"):
        store = Store(url)
        store.write_bytes("a/b.bin", b"\x00\x01")
        assert store.read_bytes("a/b.bin") == b"\x00\x01"
        assert store.size("a/b.bin") == 2
        assert store.list("a") == ["b.bin"]
        store.remove("a/b.bin")
        assert not store.exists("a/b.bin")
        store.remove("a/b.bin")


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    atomic_write(path, b"old")

    def no_rename(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", no_rename)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_listings_skip_temporary_files(tmp_path):
    (tmp_path / f"00000.tar{TEMPORARY_MARK}1-a").write_bytes(b"")
    (tmp_path / "00000.tar").write_bytes(b"")
    assert Store(str(tmp_path)).list(".") == ["00000.tar"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x"])
def test_a_path_cannot_leave_the_folder(tmp_path, path):
    with pytest.raises(ValueError, match="leaves the dataset folder"):
        Store(str(tmp_path)).write_bytes(path, b"")


def test_an_unwritable_folder_is_one_sentence_with_a_remedy(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeclipError, match=r"cannot write to the output folder .*--out"):
        Store(str(tmp_path / "file" / "below")).check_writable()
