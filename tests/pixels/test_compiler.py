"""The compiled part is built once, whole or not at all."""

import os
import stat
import threading
from pathlib import Path

import pytest

from declip_pixels.compiler import NoCompiledPartError, cache_folder, ensure_built

COMPILER = """#!/bin/sh
if [ "$1" = "--version" ]; then echo "{version}"; exit 0; fi
echo built >> {log}
while [ "$1" != "-o" ]; do shift; done
sleep {seconds}
{line}
echo library > "$2"
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the stand-in compiler's builds; the cache is a folder of the test's own."""
    monkeypatch.setenv("OPENDECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    install(tmp_path)
    return tmp_path / "log"


def install(folder: Path, version: str = "1", seconds: float = 0, line: str = "") -> None:
    path = folder / "compiler"
    path.write_text(
        COMPILER.format(version=version, log=folder / "log", seconds=seconds, line=line)
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def builds(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_is_built_once(log: Path) -> None:
    library = ensure_built()
    assert library.read_text() == "library\n"
    assert library.is_relative_to(cache_folder())
    assert ensure_built() == library
    assert builds(log) == 1


def test_another_compiler_builds_anew(log: Path, tmp_path: Path) -> None:
    first = ensure_built()
    install(tmp_path, version="2")
    assert ensure_built() != first
    assert builds(log) == 2


def test_many_at_once_build_once(log: Path, tmp_path: Path) -> None:
    install(tmp_path, seconds=0.2)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_built())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert builds(log) == 1


def test_what_a_killed_build_left_is_no_library(log: Path) -> None:
    library = ensure_built()
    library.rename(library.with_suffix(".tmp"))
    library.with_suffix(".tmp").write_text("half")
    assert ensure_built().read_text() == "library\n"
    assert builds(log) == 2
    assert sorted(path.suffix for path in library.parent.iterdir()) == [".flock", ".so"]


def test_a_build_that_fails_says_why_and_leaves_nothing(log: Path, tmp_path: Path) -> None:
    install(tmp_path, line="echo half > $2; echo 'pixels.cpp:1: error: no such header' >&2; exit 1")
    with pytest.raises(NoCompiledPartError, match=r"failed \(pixels.cpp:1: error: no such header"):
        ensure_built()
    assert [path.suffix for path in cache_folder().iterdir()] == [".flock"]


def test_a_build_that_hangs_is_ended(log: Path, tmp_path: Path) -> None:
    install(tmp_path, line="exec sleep 20")
    with pytest.raises(NoCompiledPartError, match="took more than 0 s"):
        ensure_built(deadline_seconds=0.2)


def test_no_compiler(log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoCompiledPartError, match=r"there is no C\+\+ compiler"):
        ensure_built()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev")
def test_a_cache_that_cannot_be_written(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENDECLIP_CACHE", os.devnull)
    with pytest.raises(NoCompiledPartError, match="Not a directory: '/dev/null/pixels'"):
        ensure_built()
