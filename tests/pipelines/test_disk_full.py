"""A disk that is full or fails at any moment: a sentence, nothing half there, a rerun heals."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_stages
from PIL import Image

from declip_shards import DeclipError
from declip_shards.store import TEMPORARY_MARK
from pipelines.pipeline import Pipeline, Step
from pipelines.runner import run_pipeline

SHARDS, ROWS = 6, 8
SPACE = 360_000
"""Bytes of the small disk: some shards fit, not all."""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """(URL table, host:port) of noisy pictures of some ten thousand bytes each."""
    folder = tmp_path_factory.mktemp("web")
    rng = np.random.default_rng(0)
    for n in range(SHARDS * ROWS):
        noise = rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.jpg", quality=90)
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        lines = [f"http://{address}/{n}.jpg,picture {n}" for n in range(SHARDS * ROWS)]
        (folder / "pairs.csv").write_text("\n".join(["url,caption", *lines]))
        yield folder / "pairs.csv", address
        server.shutdown()


LIMITED = (
    "import resource, signal, sys\n"
    "from declip_shards import store\n"
    "from pipelines.cli import main\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "limit, write = int(sys.argv.pop(1)), store.atomic_write\n"
    "def limited(path, data):\n"
    "    before = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
    "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))\n"
    "    try: write(path, data)\n"
    "    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)\n"
    "store.atomic_write = limited\n"
    "sys.exit(main())\n"
)
"""The command, with a limit of the kernel's on the size of the dataset's files alone: decoders
share memory that counts as a file."""


def ingest(
    table: tuple[Path, str], out: Path, *, most_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """``declip run pairs --only ingest`` in a process of its own.

    Args:
        table: URL table and the host:port of its server.
        out: the dataset.
        most_bytes: of any file of it.
    """
    path, address = table
    settings = [f"--ingest.table={path}", f"--ingest.allow-addresses={address}"]
    settings += ["--ingest.image-size=96", f"--ingest.shard-size={ROWS}", "--ingest.robots=ignore"]
    how = ["-m", "pipelines"] if most_bytes is None else ["-c", LIMITED, str(most_bytes)]
    command = [sys.executable, *how, "run", "pairs", *settings]
    command += ["--out", str(out), "--only", "ingest", "--runner", "local"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def clean(table: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run with space enough."""
    out = tmp_path_factory.mktemp("clean") / "out"
    done = ingest(table, out)
    assert done.returncode == 0, done.stderr
    return digests(out)


def digests(out: Path) -> dict[str, str]:
    """sha256 of the manifest and of every file that it hashes."""
    manifest = out / "manifests" / "ingest.json"
    if not manifest.exists():
        return {}
    names = [record["path"] for record in json.loads(manifest.read_bytes())["files"]]
    return {
        path: hashlib.sha256((out / path).read_bytes()).hexdigest()
        for path in ["manifests/ingest.json", *names]
    }


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make ``folder`` a disk of :data:`SPACE` bytes; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SPACE}", "tmpfs", str(folder)]
    mount = shutil.which("mount")
    is_mounted = mount is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


def check_nothing_half(out: Path, clean: dict[str, str]) -> int:
    """Whatever stands under a final name is whole; returns the number of such tars."""
    assert not list(out.rglob(f"*{TEMPORARY_MARK}*"))
    assert not (out / "manifests" / "ingest.json").exists()
    standing = [p for p in (out / "shards").glob("*") if p.suffix in (".tar", ".parquet")]
    for path in standing:
        name = str(path.relative_to(out))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == clean[name]
    for receipt in (out / "manifests" / "ingest").glob("*.json"):
        json.loads(receipt.read_bytes())
    return sum(path.suffix == ".tar" for path in standing)


def test_a_disk_that_fills_up_and_gets_space(
    table: tuple[Path, str], clean: dict[str, str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk) as is_mounted:
        out = disk / "out"
        done = ingest(table, out, most_bytes=None if is_mounted else 20_000)
        assert done.returncode == 1, done.stderr
        (sentence,) = [line for line in done.stderr.splitlines() if "no space" in line]
        assert str(out) in sentence
        assert "free" in sentence
        assert "Traceback" not in done.stderr
        num_tars = check_nothing_half(out, clean)
        assert num_tars < SHARDS
        if is_mounted:
            assert num_tars > 0
            assert "tasks that are left need about" in done.stderr
            # What is hopeless is not tried for every task.
            assert "more were not started" in done.stderr or num_tars == SHARDS - 1
            remount = ["mount", "-o", "remount,size=50m", str(disk)]
            subprocess.run(remount, check=True)
        again = ingest(table, out)
        assert again.returncode == 0, again.stderr
        assert digests(out) == clean


def test_files_that_may_not_grow_say_so(
    table: tuple[Path, str], clean: dict[str, str], tmp_path: Path
) -> None:
    """The same without a mount: no file of more than some bytes can be written."""
    out = tmp_path / "out"
    done = ingest(table, out, most_bytes=20_000)
    assert done.returncode == 1
    assert f"no space to write to {str(out)!r}" in done.stderr
    assert check_nothing_half(out, clean) == 0
    again = ingest(table, out)
    assert again.returncode == 0, again.stderr
    assert digests(out) == clean


def pipeline(root: Path, **settings: Any) -> Pipeline:
    stage = ray_stages.WriteShards(root=str(root), **settings)
    step = Step(name="ingest", stage=stage)
    return Pipeline(recipe="toy", root=str(root), steps=(step,))


def run(root: Path) -> None:
    made = pipeline(root)
    with contextlib.redirect_stdout(io.StringIO()):
        run_pipeline(made, made.steps, runner="local")


def fault_of(root: Path) -> Exception | None:
    """What a run ends with."""
    try:
        run(root)
    except (DeclipError, OSError) as error:
        return error
    return None


class FailingDisk:
    """Counts writes, fsyncs and renames, and lets one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, number: int) -> None:
        self.count, self.fail_at, self.number = 0, fail_at, number
        fsync, replace, path_open = os.fsync, Path.replace, Path.open

        def failing_open(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = path_open(path, mode, *args, **kwargs)
            return _FailingFile(file, self) if mode == "wb" else file

        def failing_fsync(descriptor: int) -> None:
            self.step()
            fsync(descriptor)

        def failing_replace(path: Path, target: Any) -> Any:
            self.step()
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", failing_fsync)
        monkeypatch.setattr(Path, "replace", failing_replace)
        monkeypatch.setattr(Path, "open", failing_open)

    def step(self) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(self.number, os.strerror(self.number))


class _FailingFile:
    """A file whose writes may fail in the middle."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self) -> "_FailingFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        try:
            self.disk.step()
        except OSError:
            self.file.write(bytes(data)[: len(data) // 2])
            raise
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_write_fsync_and_rename_may_fail(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "clean")
    expected = digests(tmp_path / "clean")
    assert len(expected) == 3
    num_failures, at = 0, 0
    while True:
        at += 1
        root = tmp_path / str(at)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, at, number)
            told = fault_of(root)
        if disk.count < at:
            assert told is None
            break  # it is past the last one
        num_failures += 1
        if number == errno.ENOSPC:
            assert isinstance(told, DeclipError)  # one sentence, with the place
            assert str(root) in str(told)
        # Of the empty file that proves that the folder can be written to, a name may be left.
        left = [path for path in root.rglob(f"*{TEMPORARY_MARK}*") if path.parent != root]
        assert left == []
        for name, digest in expected.items():
            if (root / name).exists():
                assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
        run(root)
        assert digests(root) == expected
        assert list(root.rglob(f"*{TEMPORARY_MARK}*")) == []
        shutil.rmtree(root)
    # Five files of a shard's task and its step, each with a write, two fsyncs and a rename.
    assert num_failures >= 20
