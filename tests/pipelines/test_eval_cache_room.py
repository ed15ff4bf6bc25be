"""The limit of the feature cache."""

import os
import time

import pytest

from declip_shards.store import TEMPORARY_MARK, atomic_write
from pipelines.eval_cache_room import (
    LEFTOVER_SECONDS,
    MOST_HOLDS,
    FolderHold,
    Holds,
    drop_features,
    sweep_leftovers,
)

NAMES = [f"{number:032x}" for number in range(5)]


@pytest.fixture
def root(tmp_path):
    """Five sets of 100 bytes, the first unused for longest; and folders that are none."""
    for age, name in enumerate([*NAMES, "views", "data"]):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(4):
            (folder / f"chunk-{number}.npz").write_bytes(bytes(25))
        os.utime(folder, (1000 + age, 1000 + age))
    return tmp_path


def left(root):
    return sorted(path.name for path in root.iterdir() if path.name in NAMES)


@pytest.mark.parametrize(("limit", "kept"), [(500, 5), (499, 4), (300, 3), (99, 0), (0, 0)])
def test_the_longest_unused_go_first_and_no_more_than_must(root, limit, kept):
    assert drop_features(root, limit) == 100 * (5 - kept)
    assert left(root) == NAMES[5 - kept :]
    assert {path.name for path in root.iterdir()} == {*NAMES[5 - kept :], "views", "data"}
    assert len(list((root / "views").iterdir())) == 4


def test_what_is_held_stays_until_it_is_released_and_is_the_last_used(root):
    hold = FolderHold(root / NAMES[0])
    assert drop_features(root, 100) == 400
    assert left(root) == NAMES[:1]
    assert drop_features(root, 0) == 0
    hold.release()
    assert drop_features(root, 0) == 100
    assert left(root) == []


def test_what_a_kill_left_half_removed_is_removed(root):
    (root / NAMES[2]).rename(root / ".removed-abc")
    assert drop_features(root, 10**6) == 0
    assert not list(root.glob(".removed*"))


def test_two_may_hold_a_folder_and_it_is_made_where_it_is_not(root):
    first, second = (FolderHold(root / ("f" * 32)) for _ in range(2))
    first.release()
    assert drop_features(root, 0) == 500
    assert (root / ("f" * 32)).is_dir()
    second.release()


def test_of_many_folders_the_last_are_held(root):
    holds = Holds()
    holds.keep(FolderHold(root / NAMES[0]))
    for _ in range(MOST_HOLDS - 1):
        holds.keep(FolderHold(root / NAMES[1]))
    drop_features(root, 0)
    assert left(root) == NAMES[:2]
    holds.keep(FolderHold(root / NAMES[1]))
    drop_features(root, 0)
    assert left(root) == [NAMES[1]]
    holds.release()
    drop_features(root, 0)
    assert left(root) == []


def test_a_cache_that_is_not_there_is_empty(tmp_path):
    assert drop_features(tmp_path / "none", 0) == 0


def test_what_was_half_written_long_ago_goes_and_nothing_else(tmp_path):
    atomic_write(tmp_path / "views/set/whole.npy", b"whole")
    for name, age in {"old": LEFTOVER_SECONDS + 60, "young": LEFTOVER_SECONDS - 60}.items():
        path = tmp_path / f"views/set/{name}.npy{TEMPORARY_MARK}77-{name}"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    os.utime(tmp_path / "views/set/whole.npy", (1000, 1000))
    assert sweep_leftovers(tmp_path) == 1
    kept = sorted(path.name.partition(".")[0] for path in tmp_path.glob("views/set/*"))
    assert kept == ["whole", "young"]
    assert sweep_leftovers(tmp_path / "absent") == 0
