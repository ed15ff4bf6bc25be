"""A process that trains stops when it is asked to, and when its ancestors are gone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from declip_train.supervision import (
    PARENT_VARIABLE,
    StopSwitch,
    group_members,
    process_start,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WATCHER = """
import sys, time
from declip_train import supervision
supervision.GRACE_SECONDS = 0.5
supervision._SECONDS_BETWEEN_LOOKS = 0.05
stop = supervision.StopSwitch()
stop.watch_ancestors()
print("up", flush=True)
while not stop.is_on:
    time.sleep(0.02)
print("asked", flush=True)
time.sleep(30)
"""


def test_a_process_is_told_from_its_number_reused():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    start = process_start(child.pid)
    assert start == process_start(child.pid)
    assert start != process_start(os.getppid())
    child.kill()
    time.sleep(0.2)
    assert process_start(child.pid) is None, "a zombie is not alive"
    child.wait()
    assert process_start(child.pid) is None
    assert os.getpid() in group_members(os.getpgrp())


def test_signals_ask_to_stop():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopSwitch()
        stop.listen()
        assert not stop.is_on
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_on
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_death_of_who_asked_for_the_training_stops_it():
    asker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    environment = {**os.environ, PARENT_VARIABLE: f"{asker.pid}:{process_start(asker.pid)}"}
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCHER], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "up\n"
    time.sleep(0.2)
    assert watcher.poll() is None
    asker.kill()
    asker.wait()
    assert watcher.stdout.readline() == "asked\n"
    assert watcher.wait(10) == 1, "ends by force after the grace period"
    watcher.stdout.close()
