"""Leases on stores without locks: one holder, a named owner, an end for the dead."""

import json
import os
import threading
import time
import uuid
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from declip_shards import DeclipError, Store
from pipelines import lease
from pipelines.lease import hold_lease, take_lease


class PlainFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store without put-if-absent, that is slow besides."""

    protocol = "plainmemory"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path, value, **kwargs):
        if kwargs:
            raise TypeError("there is no mode here")
        time.sleep(0.005)
        super().pipe_file(path, value)


fsspec.register_implementation("plainmemory", PlainFileSystem, clobber=True)


@pytest.fixture(params=["memory", "plainmemory"])
def url(request):
    return f"{request.param}://{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)


def names(store):
    return store.list(lease.FOLDER, ".json")


def plant(store, *, age, number=7):
    """A lease of a run of another machine."""
    claim = {"host": "far.example", "process": 4242, "id": "x", "renewed_at": time.time() - age}
    store.write_bytes(f"{lease.FOLDER}/{number:08d}.json", json.dumps(claim).encode())


def test_the_second_is_refused_by_name_and_in_time(url):
    with hold_lease(Store(url)):
        start = time.monotonic()
        with pytest.raises(DeclipError, match=f"another run \\(process {os.getpid()} on "):
            take_lease(Store(url))
        assert time.monotonic() - start < 5
    with hold_lease(Store(url)):
        pass
    assert names(Store(url)) == []


def test_a_lease_of_another_machine_is_respected_while_it_is_fresh(url):
    store = Store(url)
    plant(store, age=1.0)
    with pytest.raises(DeclipError, match=r"process 4242 on far.example.*--out.*lease ends 2 s"):
        take_lease(store)
    assert names(store) == ["00000007.json"]


@pytest.mark.parametrize("age", [100.0, -100.0])
def test_a_dead_run_expires_whatever_its_clock(url, age):
    store = Store(url)
    plant(store, age=age)
    with hold_lease(store) as held:
        assert held.number == 8
        assert names(store) == ["00000008.json"]
        held.check()


def test_a_live_run_with_a_slow_clock_keeps_its_lease(url, monkeypatch):
    store, end = Store(url), threading.Event()
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.3)

    def renew():
        for n in range(100):
            plant(store, age=1000.0 - n)
            if end.wait(0.05):
                return

    plant(store, age=2000.0)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(DeclipError, match=r"process 4242 on far\.example"):
            take_lease(store)
    finally:
        end.set()
        thread.join()


def test_a_torn_lease_is_nobodys(url):
    store = Store(url)
    store.write_bytes(f"{lease.FOLDER}/00000001.json", b'{"host": "fa')
    with hold_lease(store):
        assert names(store) == ["00000002.json"]


def test_it_is_renewed_for_as_long_as_it_is_held(url):
    store = Store(url)
    with hold_lease(store) as held:
        first = held.claim.renewed_at
        time.sleep(0.5)
        assert held.claim.renewed_at > first
        assert json.loads(store.read_bytes(f"{lease.FOLDER}/00000001.json"))["id"] == held.claim.id
        held.check()


@pytest.mark.parametrize("taken", [True, False])
def test_who_loses_it_is_stopped_before_it_writes_again(url, taken):
    store = Store(url)

    def work():
        with hold_lease(store):
            if taken:
                plant(store, age=0.0, number=2)
            else:
                store.remove(f"{lease.FOLDER}/00000001.json")
            time.sleep(15)  # the main thread may be in the midst of a task
            pytest.fail("nobody stopped it")

    with pytest.raises(DeclipError, match=r"this run lost its lease on .* run the same command"):
        work()
    assert names(store) == (["00000002.json"] if taken else [])


def test_who_cannot_renew_it_gives_up_before_others_may_take_it(url, monkeypatch):
    store = Store(url)
    held = take_lease(store)

    def unreachable(self, relative):
        raise OSError("the store does not answer")

    monkeypatch.setattr(Store, "read_bytes", unreachable)
    monkeypatch.setattr(lease, "_interrupt_main_thread", lambda: None)
    start = time.monotonic()

    def work():
        while time.monotonic() - start < 10:
            held.check()
            time.sleep(0.02)

    with pytest.raises(DeclipError, match="could not be renewed for"):
        work()
    assert time.monotonic() - start < lease.LEASE_SECONDS
    held.release()


def test_a_passing_trouble_of_the_store_loses_nothing(url, monkeypatch):
    read, calls = Store.read_bytes, []

    def seldom(self, relative):
        calls.append(relative)
        if len(calls) % 3:
            raise OSError("503 SlowDown")
        return read(self, relative)

    with hold_lease(Store(url)) as held:
        monkeypatch.setattr(Store, "read_bytes", seldom)
        time.sleep(3.0)
        held.check()
        monkeypatch.undo()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_wins(url, stale):
    """Threads, for the memory of a store in tests is this process's."""
    for round_number in range(3):
        base = f"{url}/{round_number}"
        if stale:
            plant(Store(base), age=1000.0)
        barrier = threading.Barrier(8)
        won: list[lease.Lease] = []
        refused: list[str] = []

        def contend(base=base, barrier=barrier, won=won, refused=refused):
            store = Store(base)
            barrier.wait()
            try:
                won.append(take_lease(store))
            except DeclipError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(refused)) == (1, 7)
        assert all(f"(process {os.getpid()} on " in text for text in refused)
        won[0].check()
        won[0].release()
        assert names(Store(base)) == []
