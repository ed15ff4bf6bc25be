"""Laws of the header walk: it sees what tarfile sees, and a damaged tar is never a shorter one."""

import gzip
import io
import tarfile

import pytest

from declip_eval.set_files import DatasetError
from declip_eval.tar_headers import walk_tar

FILES = {
    "a.jpg": b"x" * 700,
    "a.cls": b"3",
    "folder/" + "long" * 40 + ".jpg": b"y" * 512,
    "é.txt": "ü".encode(),
    "empty.png": b"",
    "big.jpg": b"z" * 5000,
}


def tar_bytes(tar_format):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, data in FILES.items():
            member = tarfile.TarInfo(name)
            # Times with a fraction, as webdataset's writer has them, need an extended header each.
            member.size, member.mtime = len(data), 1.5
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, tar_format):
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes(tar_format))
    found = list(walk_tar(str(path), lambda name: True, "0.tar"))
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.isfile()]
        assert [m.name for m in found] == [m.name for m in members]
        assert [(m.offset, m.size) for m in found] == [(m.offset_data, m.size) for m in members]
    assert {m.name: m.data for m in found} == FILES


def test_only_wanted_contents_are_read(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes(tarfile.PAX_FORMAT))
    found = list(walk_tar(str(path), lambda name: name.endswith(".cls"), "0.tar"))
    assert [m.name for m in found if m.data is not None] == ["a.cls"]


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    whole = tar_bytes(tarfile.PAX_FORMAT)
    path = tmp_path / "0.tar"
    end = len(whole.rstrip(b"\0"))
    for length in [*range(0, end, 512), end - 7, end + 300]:
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"cut short at byte|no header"):
            list(walk_tar(str(path), lambda name: True, "0.tar"))


def test_a_damaged_header_is_refused(tmp_path):
    data = bytearray(tar_bytes(tarfile.GNU_FORMAT))
    at = data.index(b"a.cls")
    data[at] ^= 1
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"0\.tar is damaged: byte {at} is no header"):
        list(walk_tar(str(path), lambda name: False, "0.tar"))


def test_data_behind_the_end_are_refused(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes(tarfile.GNU_FORMAT) + b"more" * 128)
    with pytest.raises(DatasetError, match="data follow the mark of its end"):
        list(walk_tar(str(path), lambda name: False, "0.tar"))


def test_a_compressed_tar_is_refused(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(gzip.compress(tar_bytes(tarfile.GNU_FORMAT)))
    with pytest.raises(DatasetError, match=r"is compressed.*unpack it"):
        list(walk_tar(str(path), lambda name: False, "0.tar"))
