"""DeepSpeed's operator: built once, by one process, and never waited for without end."""

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from declip_shards import DeclipError
from declip_train import extension

# Stands in for the compiler: fails where the stale lock still stands, as DeepSpeed would hang.
BUILD = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm"
folder.mkdir(parents=True, exist_ok=True)
if (folder / "lock").exists():
    sys.exit("would wait for ever")
with (folder / "builds").open("a") as f:
    f.write("x")
(folder / "deepspeed_shm_comm.so").write_bytes(b"library")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENDECLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(extension, "_BUILD", BUILD)
    return extension.extensions_folder()


def test_one_build_serves_all(folder):
    assert extension.built_library(folder) is None
    library = extension.ensure_built()
    assert extension.ensure_built() == library == extension.built_library(folder)
    assert (library.parent / "builds").read_text() == "x"


def test_a_stale_lock_is_removed(folder):
    (folder / extension.OPERATOR).mkdir(parents=True)
    (folder / extension.OPERATOR / "lock").touch()
    assert extension.ensure_built(20).is_file()


def test_a_half_built_library_is_built_again(folder):
    library = extension.ensure_built()
    library.write_bytes(b"lib")
    assert extension.built_library(folder) is None
    assert extension.ensure_built().read_bytes() == b"library"


def test_no_compiler_is_one_sentence(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeclipError, match=r"'g\+\+' is not on PATH.*apt install g\+\+"):
        extension.ensure_built()
    assert not folder.exists()


def test_a_failed_build_names_its_log(folder, monkeypatch):
    monkeypatch.setattr(extension, "_BUILD", "import sys; sys.exit('no such header')")
    with pytest.raises(DeclipError, match=r"failed \(no such header\).*build\.log"):
        extension.ensure_built()
    assert extension.built_library(folder) is None


def test_waiting_for_another_build_ends(folder):
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl,sys,time; f=open(sys.argv[1],'a'); fcntl.flock(f,fcntl.LOCK_EX);"
            "print('held',flush=True); time.sleep(60)",
            str(folder / "build.flock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        holder.stdout.readline()
        with pytest.raises(DeclipError, match=r"has been compiling .* set OPENDECLIP_CACHE"):
            extension.ensure_built(0.3)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    # The kernel gave the dead holder's lock back.
    assert extension.ensure_built(20).is_file()
    with (folder / "build.flock").open("a") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_folders_are_by_version(folder):
    assert f"python{sys.version_info.major}.{sys.version_info.minor}-torch" in folder.name


def test_a_run_leaves_nothing_in_shared_memory(tmp_path):
    """DeepSpeed itself would leave 69 MB a process; the real operator makes them here."""
    code = (
        "import os, pathlib, sys; sys.path.insert(0, sys.argv[1]);"
        "from single_process import one_process;"
        "shm = pathlib.Path('/dev/shm'); name = 'deepspeed_allreduce_buffer_*_29633_*';"
        "os.environ.update(LOCAL_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='29633');"
        "from declip_train import extension;"
        "release = extension.release_shared_memory; found = [];"
        "extension.release_shared_memory = lambda: found.extend(shm.glob(name)) or release();"
        "ctx = one_process(sys.argv[2]); ctx.__enter__();"
        "assert len(found) == 1, found; assert not list(shm.glob(name))"
    )
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, here, str(tmp_path)], check=True, timeout=300)


def test_what_no_process_has_mapped_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_SHARED_MEMORY", tmp_path)
    names = [f"{extension._BUFFER}_{os.getuid()}_h_1_{n}" for n in ("old", "mapped", "young")]
    others = [f"{extension._BUFFER}_{os.getuid() + 1}_h_1_0", "something_else"]
    for name in (*names, *others):
        (tmp_path / name).write_bytes(b"x" * 4096)
        os.utime(tmp_path / name, (1, 1))
    os.utime(tmp_path / names[2])
    with (tmp_path / names[1]).open("r+b") as f, mmap.mmap(f.fileno(), 0):
        assert extension.sweep_shared_memory() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], *others])
