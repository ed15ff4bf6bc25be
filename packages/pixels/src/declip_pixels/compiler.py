"""The compiled part, built once for this machine: one file in the cache folder, and a lock on it.

The file's name carries a hash of the sources, the compiler's own word on its version, its flags
and the processor's kind, so that a change of any of them builds anew and machines that share a home
do not meet each other's. Which vectors a processor has is asked when the code runs. A build is
renamed into place when it is done: a killed one leaves nothing that could be taken for a library.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

SOURCE = "pixels.cpp"
DEADLINE_SECONDS = 120.0
"""For a build, one's own or another process's; it takes two on an idle machine."""
_HEADERS = ("jpeg_abi.h", "jpeg_file.h", "resample.h")
# Contracted (fused) products would round weights differently from NumPy's.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off")
# What this Python has loaded may bring an older C++ library than the compiler's.
_LINUX_FLAGS = ("-static-libstdc++", "-static-libgcc", "-ldl")


class NoCompiledPartError(Exception):
    """The compiled part cannot be had; the text says why."""


def cache_folder() -> Path:
    """Where compiled files lie."""
    base = os.environ.get("OPENDECLIP_CACHE") or str(Path.home() / ".cache" / "opendeclip")
    return Path(base) / "pixels"


def ensure_built(deadline_seconds: float = DEADLINE_SECONDS) -> Path:
    """Compile the library unless it stands; returns its file. Safe to call from many processes.

    Raises:
        NoCompiledPartError: no compiler, a build that fails or takes longer than the deadline, or
            a cache folder that cannot be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise NoCompiledPartError("there is no C++ compiler (apt install g++)")
    sources = Path(__file__).parent
    flags = _FLAGS + (_LINUX_FLAGS if sys.platform == "linux" else ())
    try:
        library = cache_folder() / f"pixels-{_digest(compiler, sources, flags)}.so"
        if library.is_file():
            return library
        library.parent.mkdir(parents=True, exist_ok=True)
        with (library.parent / "build.flock").open("a") as lock:
            _wait_for(lock.fileno(), deadline_seconds)
            if not library.is_file():
                _build(compiler, sources, flags, library, lock.fileno(), deadline_seconds)
    except OSError as error:
        raise NoCompiledPartError(f"{error.strerror or error}: {str(cache_folder())!r}") from error
    return library


def _digest(compiler: str, sources: Path, flags: tuple[str, ...]) -> str:
    said = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    digest = hashlib.sha256(said.stdout)
    digest.update(repr((flags, platform.machine(), platform.libc_ver())).encode())
    for name in (SOURCE, *_HEADERS):
        digest.update((sources / name).read_bytes())
    return digest.hexdigest()[:24]


def _wait_for(descriptor: int, seconds: float) -> None:
    """Take the lock, which the kernel gives back when its holder dies."""
    ends = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > ends:
                raise NoCompiledPartError(
                    f"another process has been compiling it for more than {seconds:.0f} s"
                ) from None
            time.sleep(0.05)


def _build(
    compiler: str,
    sources: Path,
    flags: tuple[str, ...],
    library: Path,
    lock: int,
    seconds: float,
) -> None:
    # Holding the lock, nobody else builds: what lies here is of the dead.
    unfinished = library.with_suffix(".tmp")
    unfinished.unlink(missing_ok=True)
    source = str(sources / SOURCE)
    libraries = [flag for flag in flags if flag.startswith("-l")]
    others = [flag for flag in flags if not flag.startswith("-l")]
    try:
        # The child shares our lock: should we be killed, it is held until the child is done.
        made = subprocess.run(
            [compiler, *others, source, "-o", str(unfinished), *libraries],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            pass_fds=[lock],
            check=False,
        )
        if made.returncode:
            words = [line for line in made.stderr.splitlines() if "error" in line]
            reason = words[0].strip() if words else f"status {made.returncode}"
            raise NoCompiledPartError(f"compiling it failed ({reason})")
        unfinished.replace(library)
    except subprocess.TimeoutExpired as error:
        raise NoCompiledPartError(f"compiling it took more than {seconds:.0f} s") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
