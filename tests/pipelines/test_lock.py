"""One writer at a time, and no lock outlives its holder."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from declip_shards import DeclipError, Store
from pipelines import lease, lock
from pipelines.lock import sweep, task_lock, workspace_lock


def take(root):
    """What another process says that takes the lock of ``root``: held, or the refusal."""
    code = (
        "import sys\n"
        "from declip_shards import DeclipError, Store\n"
        "from pipelines.lock import workspace_lock\n"
        "try:\n"
        "    with workspace_lock(Store(sys.argv[1])): print('held')\n"
        "except DeclipError as error: print(error)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(root)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_another_process_is_refused_while_it_is_held_and_not_after(tmp_path):
    with workspace_lock(Store(str(tmp_path))):
        told = take(tmp_path)
        assert told == (
            f"another run (process {os.getpid()} on {socket.gethostname()}) is writing to "
            f"{str(tmp_path)!r}; "
            "wait for it, stop it, or choose another --out.\n"
        )
    assert take(tmp_path) == "held\n"


def test_a_second_holder_in_the_same_process_is_refused(tmp_path):
    store = Store(str(tmp_path))
    with (
        workspace_lock(store),
        pytest.raises(DeclipError, match=f"process {os.getpid()}"),
        workspace_lock(Store(str(tmp_path))),
    ):
        pytest.fail("two runs hold one folder")
    with workspace_lock(store):
        pass


def test_a_refused_run_does_not_take_the_lock_away(tmp_path):
    with workspace_lock(Store(str(tmp_path))):
        for _ in range(2):
            with (
                pytest.raises(DeclipError, match="another run"),
                workspace_lock(Store(str(tmp_path))),
            ):
                pytest.fail("two runs hold one folder")


def test_a_run_that_fails_gives_the_folder_back(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(RuntimeError, match="stage broke"), workspace_lock(store):
        raise RuntimeError("stage broke")
    with workspace_lock(store):
        pass


def test_a_number_left_in_the_file_holds_nothing_and_is_replaced(tmp_path):
    path = tmp_path / "manifests" / "lock"
    path.parent.mkdir()
    path.write_text("12345678901234567890")
    with workspace_lock(Store(str(tmp_path))):
        assert path.read_text() == f"{os.getpid()} on {socket.gethostname()}"


def test_two_folders_are_held_at_once(tmp_path):
    with workspace_lock(Store(str(tmp_path / "a"))), workspace_lock(Store(str(tmp_path / "b"))):
        pass


def test_a_remote_store_has_a_lease_instead(monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    store = Store(f"memory://{tmp_path.name}")
    with (
        workspace_lock(store),
        pytest.raises(DeclipError, match=f"process {os.getpid()} on "),
        workspace_lock(Store(f"memory://{tmp_path.name}")),
    ):
        pytest.fail("two runs hold one folder")
    with workspace_lock(store) as hold:
        hold.check()
    assert not store.exists("manifests/lock")


def test_the_hold_is_lost_with_the_lock_file(tmp_path):
    with workspace_lock(Store(str(tmp_path))) as hold:
        hold.check()
        (tmp_path / "manifests" / "lock").unlink()
        with pytest.raises(
            DeclipError, match=r"was removed or replaced .* nothing more is written"
        ):
            hold.check()
        (tmp_path / "manifests" / "lock").write_text("another's")
        with pytest.raises(DeclipError, match="was removed or replaced"):
            hold.check()


HOLD_TASK = (
    "import sys, time\n"
    "from declip_shards import Store\n"
    "from pipelines.lock import task_lock\n"
    "with task_lock(Store(sys.argv[1])): print('at work', flush=True); time.sleep(600)\n"
)


@contextlib.contextmanager
def task_of_an_earlier_run(root):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD_TASK, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_run_waits_for_tasks_that_outlive_theirs(tmp_path):
    with task_of_an_earlier_run(tmp_path) as process:
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        start = time.monotonic()
        with workspace_lock(Store(str(tmp_path))):
            assert time.monotonic() - start >= 0.4
            assert process.wait(timeout=10) != 0


def test_a_task_that_never_ends_is_named_in_time(monkeypatch, tmp_path):
    monkeypatch.setattr(lock, "TASKS_SECONDS", 0.2)
    with (
        task_of_an_earlier_run(tmp_path),
        pytest.raises(DeclipError, match="tasks of an earlier run still write to"),
        workspace_lock(Store(str(tmp_path))),
    ):
        pytest.fail("a task is at work")


def test_tasks_do_not_exclude_each_other(tmp_path):
    with task_of_an_earlier_run(tmp_path), task_lock(Store(str(tmp_path))):
        pass


def test_leftovers_of_dead_processes_go_and_nothing_else(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = f"00000.tar.part-{dead.pid}-0123abcd"
    kept = (
        "00000.tar",
        f"00001.tar.part-{os.getpid()}-0123abcd",  # its process is alive
        f"00002.tar.part-{dead.pid}-0123abcd.txt",  # no name of ours
        "notes.part-of-them.md",
        f"new.part-{dead.pid}-0123abcd",  # later than the lock
    )
    probe = ".part-" + "0" * 32
    for name in (old, probe, *kept):
        (shards / name).write_bytes(b"x")
        when = time.time() + (3600 if name.startswith("new") else -3600)
        os.utime(shards / name, (when, when))
    with workspace_lock(Store(str(tmp_path))):
        assert sorted(p.name for p in shards.iterdir()) == sorted(kept)
    day = time.time() - 2 * lock.DAY_SECONDS
    os.utime(shards / kept[1], (day, day))
    assert sweep(Store(str(tmp_path)), before=time.time()) == [f"shards/{kept[1]}"]


RUNS = (
    "import sys, time\n"
    "from declip_shards import DeclipError, Store\n"
    "from pipelines.lock import workspace_lock\n"
    "for line in sys.stdin:\n"
    "    start = time.monotonic()\n"
    "    try:\n"
    "        with workspace_lock(Store(line.strip())):\n"
    "            print('held', flush=True); sys.stdin.readline()\n"
    "        print('left', flush=True)\n"
    "    except DeclipError as error:\n"
    "        print(time.monotonic() - start < 5, error, flush=True)\n"
)


def tell(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def test_of_many_at_once_one_wins_and_the_others_are_told_in_time(tmp_path):
    """A hundred rounds of two to eight processes; some winners are killed, some leave."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with contextlib.ExitStack() as stack:

        def start():
            command = [sys.executable, "-c", RUNS]
            process = stack.enter_context(
                subprocess.Popen(
                    command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(process.kill)
            return process

        runs = [start() for _ in range(8)]
        for number in range(100):
            chosen = runs[: 2 + number % 7]
            for process in chosen:
                tell(process, tmp_path / str(number % 5))
            told = {process: process.stdout.readline() for process in chosen}
            (winner,) = (process for process, line in told.items() if line == "held\n")
            others = [line for process, line in told.items() if process is not winner]
            assert all(line.startswith("True another run") for line in others)
            assert all(f"(process {winner.pid} on " in line for line in others)
            if number % 25 == 24:
                winner.kill()
                runs[runs.index(winner)] = start()
            else:
                tell(winner, "go on")
                assert winner.stdout.readline() == "left\n"
