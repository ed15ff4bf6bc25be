"""Launching: the command, its environment, the first cause, and no process left behind."""

import os
import signal
import socket
import sys
import threading
import time

import pytest

from declip_shards import DeclipError
from declip_train import launch, supervision
from declip_train.settings import TrainSettings
from declip_train.supervision import StopWish


def test_the_command_is_deepspeeds_own():
    command = launch.launch_command("c.json", 2, 12345)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[3:5] == ["--num_gpus", "2"]
    assert "127.0.0.1" in command
    ours = ["--module", "declip_train", "--quiet", "--num-ranks", "2", "c.json"]
    assert command[-6:] == ours
    place = launch.Place(slots=(1, 3), index=1, address="10.0.0.1", port=77)
    command = launch.launch_command("c.json", 4, 12345, place, "hosts")
    assert command[3:8] == ["--hostfile", "hosts", "--no_ssh", "--node_rank", "1"]
    assert command[8:12] == ["--master_addr", "10.0.0.1", "--master_port", "77"]
    assert "4" in command[-6:]


def test_the_environment_obeys_the_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENDECLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    environment = launch.training_environment(TrainSettings(threads_per_rank=3))
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["TORCH_EXTENSIONS_DIR"].startswith(str(tmp_path))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        assert environment[name] in ("lo", "lo0"), "a machine alone listens to itself"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert launch.training_environment(TrainSettings())["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_several_machines_talk_over_the_interface_that_leads_to_the_first(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    place = launch.Place(slots=(1, 1), index=0, address="127.0.0.1", port=77)
    environment = launch.training_environment(TrainSettings(), place)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    nowhere = launch.Place(slots=(1, 1), index=0, address="no such host", port=77)
    assert "GLOO_SOCKET_IFNAME" not in launch.training_environment(TrainSettings(), nowhere)


def test_a_process_knows_from_deepspeeds_environment_whether_it_is_all(monkeypatch):
    for name, value in {"LOCAL_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launch.place_from_environment() is None
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    place = launch.place_from_environment()
    assert place is not None
    assert (place.here, place.address, place.is_alone) == (2, "10.0.0.1", False)


def test_a_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", launch.free_port()))


def test_the_first_cause_is_a_process_own_sentence(tmp_path):
    log = tmp_path / "launch.log"
    log.write_text(
        "[INFO] [launch.py] x\ndeclip_train: error: 0 of 9 samples are left.\n"
        "RuntimeError: Connection reset by peer\n"
    )
    own = launch._first_cause(log, 1)
    assert str(own) == "0 of 9 samples are left."
    assert not isinstance(own, launch.RunEndedError), "starting again would not help"
    log.write_text("[INFO] x\nMemoryError: no room\n[INFO] [launch.py:1] Error exits\n")
    other = launch._first_cause(log, 9)
    assert "status 9: MemoryError: no room" in str(other)
    assert isinstance(other, launch.RunEndedError)
    assert "process 1 died: killed" in str(launch._first_cause(log, 9, "process 1 died"))
    log.write_text("")
    assert "it said nothing" in str(launch._first_cause(log, 9))


RANK = """
import os, signal, sys, time
from pathlib import Path
from declip_train.heart import Board, Heart
from declip_train.supervision import StopSwitch
fault, attempts = sys.argv[1], Path(sys.argv[2])
attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
stop = StopSwitch()
stop.listen()
heart = Heart(Board(Path(os.environ["OPENDECLIP_TRAIN_BOARD"])))
step = 0
while not stop.is_on:
    heart.beat(step, "wait")
    step += fault != "stall"
    if step == 3 and fault == "die" and attempts.read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 20 and fault in ("none", "die"):
        heart.close()
        sys.exit(0)
    if step == 3 and fault == "quiet":
        os._exit(0)
    time.sleep(0.02 if fault != "stall" or step < 4 else 60)
    step += fault == "stall"
print("saved", flush=True)
sys.exit(143)
"""


def run_fault(tmp_path, monkeypatch, fault, **settings):
    """A launch with a process that trains nothing in the place of DeepSpeed's launcher."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(launch, "ensure_built", lambda: None)
    command = [sys.executable, "-c", RANK, fault, str(tmp_path / "attempts")]
    monkeypatch.setattr(launch, "launch_command", lambda *a: command)
    chosen = TrainSettings(root=str(tmp_path), **{"stall_seconds": 1.0, **settings})
    return lambda **more: launch.launch(tmp_path / "c.json", chosen, **more)


def attempts(tmp_path):
    return len((tmp_path / "attempts").read_text())


def test_a_run_that_died_is_started_again_as_often_as_allowed(tmp_path, monkeypatch, capfd):
    start = run_fault(tmp_path, monkeypatch, "die")
    with pytest.raises(launch.RunEndedError, match=r"process 0 .* died at step") as raised:
        start()
    assert raised.value.status == 75
    with pytest.raises(launch.RunEndedError, match="died at step"):
        run_fault(
            tmp_path, monkeypatch, "quiet"
        )()  # As DeepSpeed's command when its own is killed.
    (tmp_path / "attempts").unlink()
    start = run_fault(tmp_path, monkeypatch, "die")
    start(restarts=2)
    assert attempts(tmp_path) == 2
    assert "Starting again; 1 more times after this." in capfd.readouterr().err


def test_a_second_run_leaves_the_words_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(supervision, "SAVING_SECONDS", -5.0)
    log = tmp_path / "train" / launch.LAUNCH_LOG
    log.parent.mkdir()
    log.write_text("first")
    with (
        supervision.hold_file(log),
        pytest.raises(DeclipError, match="another training run is writing to"),
    ):
        run_fault(tmp_path, monkeypatch, "none")()
    assert log.read_text() == "first"
    assert not (tmp_path / "attempts").exists()
    run_fault(tmp_path, monkeypatch, "none")()
    assert attempts(tmp_path) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stalled_run_is_ended_with_a_status_of_its_own(tmp_path, monkeypatch, capfd):
    start = run_fault(tmp_path, monkeypatch, "stall")
    with pytest.raises(launch.RunStalledError, match="no progress for 1 s") as raised:
        start()
    assert raised.value.status == 75
    assert "train: stalled: process 0" in capfd.readouterr().err
    assert "stalled: process 0" in (tmp_path / "train" / "launch.log").read_text()
    (report,) = (tmp_path / "train" / "stalls").iterdir()
    assert "most recent call first" in report.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stall_is_only_named_where_it_does_not_end_the_run(tmp_path, monkeypatch):
    # It sleeps in its step, and hears nothing gentle.
    monkeypatch.setattr(supervision, "GRACE_SECONDS", 0.3)
    start = run_fault(tmp_path, monkeypatch, "stall", stall_ends_run=False)
    wish = StopWish()
    timer = threading.Timer(2.5, wish.ask)
    timer.start()
    try:
        start(wish=wish)
    finally:
        wish.close()
    assert len(list((tmp_path / "train" / "stalls").iterdir())) == 1
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize(
    ("numbers", "ended"),
    [([signal.SIGTERM], SystemExit), ([signal.SIGINT], KeyboardInterrupt)],
)
def test_signals_reach_the_processes_and_the_status_says_which(
    tmp_path, monkeypatch, numbers, ended
):
    start = run_fault(tmp_path, monkeypatch, "forever")

    def send():
        while "x" not in ((tmp_path / "attempts").read_text() if attempted.exists() else ""):
            time.sleep(0.02)
        time.sleep(0.3)
        for number in numbers:
            os.kill(os.getpid(), number)

    attempted = tmp_path / "attempts"
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(ended) as raised:
        start(restarts=3)
    if ended is SystemExit:
        assert raised.value.code == 143
    assert attempts(tmp_path) == 1, "who was asked to stop does not start again"
    assert "saved" in (tmp_path / "train" / "launch.log").read_text()
