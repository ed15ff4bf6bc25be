"""One writer at a time, and no lock outlives its holder."""

import os
import subprocess
import sys

import pytest

from declip_shards import DeclipError, Store
from pipelines.lock import workspace_lock


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
            f"another run (process {os.getpid()}) is writing to {str(tmp_path)!r}; "
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
        assert path.read_text() == str(os.getpid())


def test_two_folders_are_held_at_once(tmp_path):
    with workspace_lock(Store(str(tmp_path / "a"))), workspace_lock(Store(str(tmp_path / "b"))):
        pass


def test_a_remote_store_has_no_lock(tmp_path):
    store = Store(f"memory://{tmp_path.name}")
    with workspace_lock(store), workspace_lock(store):
        pass
    assert not store.exists("manifests/lock")
