"""Launching: the command, its environment, the first cause, and no process left behind."""

import os
import signal
import socket
import subprocess
import sys
import time

from declip_train import launch
from declip_train.settings import TrainSettings
from declip_train.supervision import group_members


def test_the_command_is_deepspeeds_own():
    command = launch.launch_command("c.json", 2, 12345)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[3:5] == ["--num_gpus", "2"]
    assert "127.0.0.1" in command
    assert command[-4:] == ["--module", "declip_train", "--quiet", "c.json"]


def test_the_environment_obeys_the_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENDECLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    environment = launch.training_environment(TrainSettings(threads_per_rank=3))
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["TORCH_EXTENSIONS_DIR"].startswith(str(tmp_path))
    assert environment["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")


def test_a_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", launch.free_port()))


def test_the_first_cause_is_a_process_own_sentence(tmp_path):
    log = tmp_path / "launch.log"
    log.write_text(
        "[INFO] [launch.py] x\ndeclip_train: error: 0 of 9 samples are left.\n"
        "RuntimeError: Connection reset by peer\n"
    )
    assert launch._first_cause(log, 1) == "0 of 9 samples are left."
    log.write_text("[INFO] x\nMemoryError: no room\n[INFO] [launch.py:1] Error exits\n")
    assert "status 9: MemoryError: no room" in launch._first_cause(log, 9)
    log.write_text("")
    assert "it said nothing" in launch._first_cause(log, 9)


def test_a_group_ends_even_if_it_does_not_listen():
    deaf = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    parent = f"import subprocess,sys; subprocess.Popen([sys.executable,'-c',sys.argv[1]]); {deaf}"
    wait = "; time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", parent + wait, deaf + wait],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.readline()
    assert len(group_members(child.pid)) == 2
    launch.end_group(child.pid, grace_seconds=0.3)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    deadline = time.monotonic() + 5
    while group_members(child.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert group_members(child.pid) == []
    assert os.getpgrp() != child.pid
