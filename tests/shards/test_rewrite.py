"""A change of several files is all there or not at all, wherever the process dies."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from declip_shards import DeclipError, Store
from declip_shards.rewrite import COMMIT, FOLDER, commit, prepare, recover

OLD: dict[str, bytes] = {
    "shards/00000.tar": b"old tar",
    "shards/00000.parquet": b"old rows",
    "quarantine/000000003.bin": b"old bytes",
    "other/file": b"untouched",
}
CHANGE: dict[str, bytes | None] = {
    "shards/00000.tar": b"new tar, longer",
    "shards/00000.parquet": b"new rows",
    "quarantine/000000003.bin": None,
    "signals/basic/00000.parquet": b"was not there",
}
NEW = {path: data for path, data in {**OLD, **CHANGE}.items() if data is not None}


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class MortalStore(Store):
    """Dies before or after its n-th change."""

    changes = ("write_bytes", "move", "remove", "remove_folder")

    def __init__(self, root: str, *, limit: int = 10**9, after: bool = False) -> None:
        super().__init__(root)
        self.limit, self.after, self.num_changes = limit, after, 0

    def _count(self, name: str, *args: Any) -> None:
        self.num_changes += 1
        if self.num_changes == self.limit and not self.after:
            raise KilledError
        getattr(super(), name)(*args)
        if self.num_changes == self.limit:
            raise KilledError

    def write_bytes(self, relative: str, data: Any) -> None:
        self._count("write_bytes", relative, data)

    def move(self, source: str, target: str) -> None:
        self._count("move", source, target)

    def remove(self, relative: str) -> None:
        self._count("remove", relative)

    def remove_folder(self, relative: str) -> None:
        self._count("remove_folder", relative)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "data")
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    Store(url).remove_folder(".")


def fill(root: str) -> Store:
    store = Store(root)
    store.remove_folder(".")
    for path, data in OLD.items():
        store.write_bytes(path, data)
    return store


def content(store: Store) -> dict[str, bytes]:
    base = store.path(".").rstrip("/")
    store.fs.invalidate_cache()
    names = [str(name)[len(base) :].lstrip("/") for name in store.fs.find(base)]
    return {name: store.read_bytes(name) for name in names}


def number_of_changes(root: str) -> int:
    fill(root)
    store = MortalStore(root)
    change(store)
    return store.num_changes


def change(store: Store) -> None:
    prepare(store, "t", CHANGE)
    commit(store, "t")


def test_a_change_is_made_and_leaves_nothing_behind(root):
    store = fill(root)
    change(store)
    assert content(store) == NEW
    assert recover(store) == []


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_change_it_is_all_old_or_all_new(root, after):
    limits = range(1, number_of_changes(root) + 1)
    assert len(limits) >= 9
    seen = []
    for limit in limits:
        store = fill(root)
        mortal = MortalStore(root, limit=limit, after=after)
        with pytest.raises(KilledError):
            change(mortal)
        recover(store)
        found = content(store)
        assert found in (OLD, NEW), limit
        seen.append(found == NEW)
    # From one moment on the change happens, and never again not.
    assert seen == sorted(seen)
    assert {*seen} == {False, True}


def test_recovery_itself_may_be_killed_at_any_change(root):
    fill(root)
    prepare(Store(root), "t", CHANGE)
    counting = MortalStore(root)
    recover(counting)
    for limit in range(1, counting.num_changes + 1):
        for after in (False, True):
            store = fill(root)
            prepare(store, "t", CHANGE)
            with pytest.raises(KilledError):
                recover(MortalStore(root, limit=limit, after=after))
            recover(store)
            assert content(store) == NEW


def test_recovery_finishes_all_that_are_decided_and_forgets_the_others(root):
    store = fill(root)
    prepare(store, "b", {"shards/00000.tar": b"by b"})
    prepare(store, "a", {"shards/00000.parquet": b"by a"})
    store.write_bytes(f"{FOLDER}/c/00000", b"of a change that was never decided")
    assert recover(store) == ["a", "b"]
    expected = OLD | {"shards/00000.tar": b"by b", "shards/00000.parquet": b"by a"}
    assert content(store) == expected


def test_twice_is_once(root):
    store = fill(root)
    for _ in range(2):
        change(store)
    assert content(store) == NEW


def test_staged_bytes_that_are_gone_are_an_error_that_says_what_to_do(root):
    store = fill(root)
    prepare(store, "t", CHANGE)
    staged = [name for name in store.list(f"{FOLDER}/t") if name != COMMIT]
    for name in staged:
        store.remove(f"{FOLDER}/t/{name}")
    with pytest.raises(DeclipError, match="was cut short and its new bytes are gone"):
        recover(store)


def test_an_empty_change_changes_nothing(root):
    store = fill(root)
    prepare(store, "t", {})
    commit(store, "t")
    assert content(store) == OLD
