"""Pictures out of tars: local, fetched, or by ranges; every fault in words."""

import os
import pickle
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from declip_shards import DeclipError
from declip_shards.store import TEMPORARY_MARK
from declip_train import network_tries, tar_cache
from declip_train.tar_cache import TarFiles, fetch_tar, find_tar, is_remote
from declip_train.tar_listing import walk_tar

if TYPE_CHECKING:
    from tests.train.foreign_tars import served, write_pairs
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from foreign_tars import served, write_pairs


def places(path, number=0):
    """(tar, offset, size) of its pictures."""
    members = walk_tar(str(path), lambda _: False)
    return [(number, m.offset, m.size) for m in members if m.name.endswith(".jpg")]


def read(files, wanted):
    numbers, offsets, sizes = (np.array(column) for column in zip(*wanted, strict=True))
    return files.read_many(numbers.astype(np.int32), offsets, sizes.astype(np.int32))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(network_tries, "_SECONDS_BETWEEN_TRIES", 0.001)
    pairs = [write_pairs(tmp_path / f"w/{n}.tar", [f"{n}{k}" for k in "abc"], n) for n in range(2)]
    wanted = [place for n in range(2) for place in places(tmp_path / f"w/{n}.tar", n)]
    images = [image for some in pairs for image, _ in some.values()]
    return tmp_path, wanted, images


def test_local_pictures_come_in_the_order_asked_for(data):
    folder, wanted, images = data
    files = TarFiles([find_tar(str(folder / f"w/{n}.tar")) for n in range(2)], folder / "c", 0)
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 3, 3, 1], []):
        found = read(files, [wanted[i] for i in order]) if order else []
        assert found == [images[i] for i in order]
    again = pickle.loads(pickle.dumps(files))
    assert read(again, wanted) == images
    assert not (folder / "c").exists()


def test_a_tar_stays_open_while_it_is_read(data, monkeypatch):
    folder, wanted, images = data
    monkeypatch.setattr(tar_cache, "_OPEN_TARS", 1)
    files = TarFiles([find_tar(str(folder / f"w/{n}.tar")) for n in range(2)], folder / "c", 0)
    real, others = os.pread, [wanted[3]]

    def pread(number, size, offset):
        # As another thread may at this moment: its tar crowds this one out of the open ones.
        if others:
            assert files.read(*others.pop()) == images[3]
        return real(number, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert files.read(*wanted[0]) == images[0]
    assert not others


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:600]), "was cut short during training"),
        (lambda path: path.write_bytes(b"x" * 99_999), "was changed during training"),
        (lambda path: path.unlink(), "cannot be read (No such file or directory)"),
        (lambda path: os.utime(path, (1, 1)), "was changed during training"),
    ],
)
def test_a_local_tar_that_is_another_is_named_and_the_others_stand(data, change, reason):
    folder, wanted, images = data
    files = TarFiles([find_tar(str(folder / f"w/{n}.tar")) for n in range(2)], folder / "c", 0)
    change(folder / "w/1.tar")
    found = read(files, wanted)
    assert found[:3] == images[:3]
    assert found[3:] == [f"{str(folder / 'w/1.tar')!r} {reason}"] * 3


def test_remote_tars_are_fetched_once_where_all_have_room(data):
    folder, wanted, images = data
    with served(folder / "w") as (address, server):
        sources = [find_tar(f"{address}/{n}.tar") for n in range(2)]
        found = [
            read(TarFiles(sources, folder / "c", 1e9), [wanted[i] for i in order])
            for order in ([4, 1, 0], [0, 1, 2, 3, 4, 5])
        ]
        assert found == [[images[4], images[1], images[0]], images]
        assert sorted({name for name, _ in server.asked}) == ["0.tar", "1.tar"]
        assert sum(size for _, size in server.asked) == sum(source.size for source in sources)
    assert len(list((folder / "c" / "tars").glob("*.tar"))) == 2


def test_remote_tars_without_room_are_read_by_ranges(data, capfd):
    folder, wanted, images = data
    with served(folder / "w") as (address, server):
        sources = [find_tar(f"{address}/{n}.tar") for n in range(2)]
        assert all(is_remote(source.url) for source in sources)
        files = TarFiles(sources, folder / "c", sources[0].size)
        server.faults["1.tar"] = 1
        order = [4, 1, 0, 5]
        assert read(files, [wanted[i] for i in order]) == [images[i] for i in order]
        assert {size for _, size in server.asked} == {len(images[i]) for i in order}
        (folder / "w/1.tar").unlink()
        gone = read(files, [wanted[0], wanted[5]])
        assert gone[0] == images[0]
        assert isinstance(gone[1], str)
        assert gone[1].startswith(f"'{address}/1.tar' cannot be read")
    assert not (folder / "c").exists()
    assert capfd.readouterr().err.count("pictures are fetched one by one") == 1


@pytest.mark.parametrize("room", [0, 1e9])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(data, room):
    folder, wanted, images = data
    with served(folder / "w") as (address, server):

        def busy(times):
            # fsspec asks by HEAD and then by GET.
            server.faults.update({"HEAD 0.tar": times, "0.tar": times})

        busy(2)
        source = find_tar(f"{address}/0.tar")
        with pytest.raises(DeclipError, match="cannot be reached"):
            find_tar(f"{address}/9.tar")
        files = TarFiles([source], folder / f"c{room}", room)
        busy(99)
        (gone,) = read(files, wanted[:1])
        assert "cannot be reached" in str(gone)
        busy(0)
        assert read(files, wanted[:3]) == images[:3], "it is back"


def test_the_tars_used_longest_ago_make_way(data):
    folder, _, _ = data
    with served(folder / "w") as (address, server):
        write_pairs(folder / "w/2.tar", ["2a", "2b", "2c"], 2)
        sources = [find_tar(f"{address}/{n}.tar") for n in range(3)]
        room = 2 * sources[0].size + 100
        paths = []
        for age, number in enumerate((0, 1)):
            paths.append(fetch_tar(sources[number], folder / "c", room))
            os.utime(paths[-1], (age + 1, age + 1))
        assert fetch_tar(sources[0], folder / "c", room) == paths[0], "of use again"
        third = fetch_tar(sources[2], folder / "c", room)
        assert {*(folder / "c/tars").glob("*.tar")} == {paths[0], third}
        assert len(server.asked) == 3


def test_what_a_killed_process_left_unfinished_goes_with_the_next_fetch(data):
    folder, _, _ = data
    with served(folder / "w") as (address, _):
        source = find_tar(f"{address}/0.tar")
        name = fetch_tar(source, folder / "other", 1e9).name
        tars = folder / "c/tars"
        tars.mkdir(parents=True)
        other = name[:7] + f"{int(name[7], 16) ^ 1:x}" + name[8:]
        for each in (name, other):
            (tars / f"{each}{TEMPORARY_MARK}7-abc").write_bytes(b"x" * 1000)
        fetch_tar(source, folder / "c", 1e9)
    left = {path.name for path in tars.iterdir() if not path.name.endswith(".lock")}
    assert left == {name, f"{other}{TEMPORARY_MARK}7-abc"}, "another lock's may be under way"


def test_processes_fetch_a_tar_once(data):
    folder, _, _ = data
    with served(folder / "w") as (address, server):
        source = find_tar(f"{address}/0.tar")
        threads = [
            threading.Thread(target=fetch_tar, args=(source, folder / "c", 1e9)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(server.asked) == 1


def test_what_was_fetched_is_what_was_listed(data):
    folder, wanted, _ = data
    with served(folder / "w") as (address, server):
        source = find_tar(f"{address}/0.tar", "f" * 64)
        with pytest.raises(DeclipError, match=r"0\.tar' is not the file of the manifest"):
            fetch_tar(source, folder / "c", 1e9)
        source = find_tar(f"{address}/0.tar")
        server.faults["0.tar"] = 2
        fetch_tar(source, folder / "other", 1e9)
        server.faults["0.tar"] = 9
        with pytest.raises(DeclipError, match=r"0\.tar' cannot be fetched"):
            fetch_tar(source, folder / "d", 1e9)
        server.faults.clear()
        write_pairs(folder / "w/0.tar", ["a"])
        files = TarFiles([source], folder / "e", 1e9)
        (found,) = read(files, wanted[:1])
        assert "0.tar' is another file than the one whose samples were listed" in str(found)
        with pytest.raises(DeclipError, match=r"none\.tar' cannot be reached"):
            find_tar(f"{address}/none.tar")
    for name in "cde":
        assert not list((folder / name / "tars").glob("*.tar*"))


def test_a_full_disk_is_named(data, monkeypatch):
    folder, _, _ = data

    def full(*_):
        raise OSError(28, "No space left on device")

    with served(folder / "w") as (address, _):
        source = find_tar(f"{address}/0.tar")
        monkeypatch.setattr(tar_cache, "_blocks", full)
        with pytest.raises(DeclipError, match=r"No space left on device.*set cache to another"):
            fetch_tar(source, folder / "c", 1e9)
