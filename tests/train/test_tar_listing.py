"""Headers of tars: what tarfile lists, and every damage named."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError
from declip_train.tar_listing import walk_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def pack(members, tar_format=tarfile.USTAR_FORMAT):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def walk(path):
    return list(walk_tar(str(path), lambda name: name.endswith(".txt")))


NAMES = st.text("abä/0", min_size=1, max_size=12).map(lambda name: f"x{name}x")
MEMBERS = st.lists(
    st.tuples(
        st.one_of(NAMES, NAMES.map(lambda name: name * 15), NAMES.map(lambda name: f"{name}.txt")),
        st.integers(0, 2000).map(lambda size: (bytes(range(256)) * 8)[:size]),
    ),
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(members=MEMBERS, tar_format=st.sampled_from(FORMATS[1:]))
def test_members_are_those_that_tarfile_lists(members, tar_format, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    path.write_bytes(pack(members, tar_format))
    found = walk(path)
    with tarfile.open(path) as tar:
        truth = [(info.name, info.offset_data, info.size) for info in tar]
    assert [(m.name, m.offset, m.size) for m in found] == truth
    for member, (_, data) in zip(found, members, strict=True):
        assert member.data == (data if member.name.endswith(".txt") else None)
        assert path.read_bytes()[member.offset : member.offset + member.size] == data


def test_a_long_name_may_be_in_two_parts(tmp_path):
    name = "folder" * 15 + "/" + "name" * 20 + ".txt"
    (tmp_path / "a.tar").write_bytes(pack([(name, b"text")]))
    assert [(m.name, m.data) for m in walk(tmp_path / "a.tar")] == [(name, b"text")]


def test_folders_and_links_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder, link = tarfile.TarInfo("f"), tarfile.TarInfo("l")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("plain"))
    assert [m.name for m in walk(tmp_path / "a.tar")] == ["plain"]


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    whole = pack([("a.jpg", b"j" * 700), ("a.txt", b"words"), ("b.jpg", b"k" * 300)])
    path = tmp_path / "a.tar"
    end = whole.rstrip(b"\0")
    data_end = -(-len(end) // 512) * 512
    for size in [0, 1, 511, 512, 600, 1535, 1536, 2048, data_end, data_end + 512, data_end + 1023]:
        path.write_bytes(whole[:size])
        with pytest.raises(DeclipError, match=r"a\.tar' is cut short at byte .*rerun ingest"):
            walk(path)
    path.write_bytes(whole[: data_end + 1024])
    assert len(walk(path)) == 3


def test_a_flipped_bit_in_any_header_is_found(tmp_path):
    whole = pack([("a.jpg", b"j" * 700), ("a.txt", b"words")])
    path = tmp_path / "a.tar"
    headers = [0, 512 + 1024]
    rng = np.random.default_rng(0)
    for place in rng.permutation(512)[:60].tolist():
        damaged = bytearray(whole)
        damaged[headers[place % 2] + place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DeclipError, match=r"is damaged|is cut short"):
            walk(path)


def test_data_behind_the_end_are_refused(tmp_path):
    whole = pack([("a.txt", b"words")])
    (tmp_path / "a.tar").write_bytes(whole + whole)
    with pytest.raises(DeclipError, match="data follow the mark of its end"):
        walk(tmp_path / "a.tar")


def test_what_is_no_tar_is_refused_in_words(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 60)
    with pytest.raises(DeclipError, match="byte 0 is no header of a member"):
        walk(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(DeclipError, match=r"is compressed.*unpack it first"):
        walk(tmp_path / "z.tar")
    with pytest.raises(DeclipError, match=r"none\.tar' cannot be read .*correct its path"):
        walk(tmp_path / "none.tar")
