"""DeepSpeed's shared-memory operator for CPUs, compiled once and before any training process.

DeepSpeed wants it whenever it starts on CPUs and compiles it on the spot: about half a minute, in
every process at once, guarded by a file called ``lock`` that a killed build leaves behind and every
later start waits on for ever. Here one process builds it, in a folder of our own, under a lock that
the kernel gives back when its holder dies; training processes import the finished file, and never
meet DeepSpeed's lock. (Training's own reductions go through gloo; the operator serves inference.
But DeepSpeed offers no setting to go without.)
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from declip_shards import DeclipError
from declip_shards.manifest import canonical_json
from declip_shards.store import atomic_write

OPERATOR = "deepspeed_shm_comm"
DEADLINE_SECONDS = 600.0
"""For a build, one's own or another process's."""
_MARK = "built.json"
_SHARED_MEMORY = Path("/dev/shm")
_BUFFER = "deepspeed_allreduce_buffer"
_STARTING_SECONDS = 30.0
"""A buffer younger than this may belong to a process that is about to map it."""
_SECONDS_BETWEEN_LINES = 10.0


def extensions_folder() -> Path:
    """Where compiled operators lie: one folder for each version of Python, torch and DeepSpeed."""
    base = os.environ.get("OPENDECLIP_CACHE") or str(Path.home() / ".cache" / "opendeclip")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"python{python}-torch{version('torch')}-deepspeed{version('deepspeed')}"
    return Path(base) / "torch_extensions" / name


def built_library(folder: Path) -> Path | None:
    """The operator's file, if a finished build of it stands in ``folder``."""
    library = folder / OPERATOR / f"{OPERATOR}.so"
    try:
        mark = json.loads((folder / _MARK).read_bytes())
        whole = library.stat().st_size == mark["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return library if whole else None


def build_environment() -> dict[str, str]:
    """Environment of the build: our folder, the CPU, and this environment's own ``ninja``."""
    environment = dict(os.environ)
    environment["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    environment["DS_ACCELERATOR"] = "cpu"
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", "")])
    return environment


def _check_tools(path: str) -> None:
    """Refuse to start a build that cannot end well."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler, path=path) is None:
        raise DeclipError(
            f"the C++ compiler {compiler!r} is not on PATH, and DeepSpeed compiles its CPU "
            "operator with it once; install it (apt install g++, or conda install gxx), then run "
            "again."
        )
    if shutil.which("ninja", path=path) is None:
        raise DeclipError(
            "the build tool 'ninja' is not on PATH, and DeepSpeed compiles its CPU operator with "
            "it once; install it (pip install ninja) and run again."
        )


def ensure_built(deadline_seconds: float = DEADLINE_SECONDS) -> Path:
    """Compile the operator unless it stands; returns its file. Safe to call from many processes.

    Raises:
        DeclipError: no compiler, a build that fails, or one that takes longer than the deadline.
    """
    folder = extensions_folder()
    library = built_library(folder)
    if library is not None:
        return library
    environment = build_environment()
    _check_tools(environment["PATH"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.flock").open("a") as lock:
        _wait_for(lock.fileno(), folder, deadline_seconds)
        library = built_library(folder)
        if library is not None:
            return library
        # We hold the kernel's lock, so whoever made this file is dead.
        (folder / OPERATOR / "lock").unlink(missing_ok=True)
        _build(environment, lock.fileno(), folder, deadline_seconds)
        library = folder / OPERATOR / f"{OPERATOR}.so"
        atomic_write(folder / _MARK, canonical_json({"size": library.stat().st_size}))
    return library


def _wait_for(descriptor: int, folder: Path, seconds: float) -> None:
    """Take the lock, saying now and then what is being waited for."""
    began = last = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            now = time.monotonic()
            if now - began > seconds:
                raise DeclipError(
                    f"another process has been compiling DeepSpeed's operator in {str(folder)!r} "
                    f"for more than {seconds:.0f} s; end it, or set OPENDECLIP_CACHE to another "
                    "folder."
                ) from None
            if now - last > _SECONDS_BETWEEN_LINES:
                last = now
                _say(f"waiting for another process's build ({now - began:.0f} s)")
            time.sleep(0.2)


def _build(environment: dict[str, str], lock: int, folder: Path, seconds: float) -> None:
    """Compile in a child that shares our lock: should we be killed, it is held until the child
    is done."""
    _say("compiling DeepSpeed's CPU operator, once for this machine (about a minute)")
    log = folder / "build.log"
    began = last = time.monotonic()
    with log.open("wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-c", _BUILD],
            env=environment,
            stdout=sink,
            stderr=sink,
            pass_fds=[lock],
        )
        try:
            while child.poll() is None:
                now = time.monotonic()
                if now - began > seconds:
                    raise DeclipError(
                        f"compiling DeepSpeed's operator took more than {seconds:.0f} s; see "
                        f"{str(log)!r}, and run again on a less busy machine."
                    )
                if now - last > _SECONDS_BETWEEN_LINES:
                    last = now
                    _say(f"compiling DeepSpeed's CPU operator ({now - began:.0f} s)")
                time.sleep(0.2)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if child.returncode:
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise DeclipError(
            f"compiling DeepSpeed's operator failed ({tail[0].strip()}); the compiler's words are "
            f"in {str(log)!r}."
        )


_BUILD = (
    "from deepspeed.accelerator import get_accelerator;"
    "get_accelerator().create_op_builder('ShareMemCommBuilder').load(verbose=True)"
)


def use_prebuilt() -> None:
    """Give DeepSpeed the finished operator in this process, so that it does not build or lock."""
    library = ensure_built()
    from deepspeed.ops.op_builder.builder import OpBuilder

    spec = importlib.util.spec_from_file_location(OPERATOR, library)
    if spec is None or spec.loader is None:
        raise DeclipError(f"{str(library)!r} cannot be imported; delete its folder and run again.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    OpBuilder._loaded_ops[OPERATOR] = module


def release_shared_memory() -> None:
    """Give back the names of DeepSpeed's buffers in shared memory: all processes have mapped them.

    DeepSpeed 0.19.8 never removes them, so every run on CPUs, finished or killed, would keep 69 MB
    of memory a process until the machine starts anew. A buffer without a name goes with the last
    process that has it. Call this after `deepspeed.init_distributed`, on every process.
    """
    import torch.distributed as dist

    dist.barrier()
    address = os.environ.get("MASTER_ADDR", "")
    place = f"{address}_{os.environ.get('MASTER_PORT', '')}"
    name = f"{_BUFFER}_{os.getuid()}_{place}_{dist.get_rank()}"
    (_SHARED_MEMORY / name).unlink(missing_ok=True)


def sweep_shared_memory() -> int:
    """Remove buffers of our own that no process has mapped: runs were killed while they started.

    Returns:
        How many there were.
    """
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped.update(re.findall(rf"{_BUFFER}_\S+", maps.read_text()))
    removed = 0
    for path in _SHARED_MEMORY.glob(f"{_BUFFER}_{os.getuid()}_*"):
        # A process that starts creates its buffer a moment before it maps it.
        with contextlib.suppress(OSError):
            if path.name not in mapped and time.time() - path.stat().st_mtime > _STARTING_SECONDS:
                path.unlink()
                removed += 1
    return removed


def _say(line: str) -> None:
    print(f"train: {line}", file=sys.stderr, flush=True)
