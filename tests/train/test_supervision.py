"""A process that trains stops when it is asked to, and when its ancestors are gone."""

import os
import signal
import subprocess
import sys
import time

import pytest

from declip_train import supervision
from declip_train.supervision import (
    INTERRUPTED,
    PARENT_VARIABLE,
    STOPPED,
    StopSwitch,
    StopWish,
    end_group,
    group_members,
    process_start,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

WATCHER = """
import sys, time
from declip_train import supervision
supervision.GRACE_SECONDS = 0.5
supervision._SECONDS_BETWEEN_LOOKS = 0.05
stop = supervision.StopSwitch(by_force=True)
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
    assert watcher.wait(10) == STOPPED, "ends by force after the grace period"
    watcher.stdout.close()


LISTENER = """
import sys, time
from declip_train import supervision
supervision.GRACE_SECONDS = 0.3
supervision.SAVING_SECONDS = float(sys.argv[1])
stop = supervision.StopSwitch(by_force=True)
stop.is_saving = lambda: True
stop.listen()
print("up", flush=True)
while not stop.is_on:
    time.sleep(0.01)
print("asked", flush=True)
if sys.argv[1] != "0":
    time.sleep(0.6)
    print("saved", flush=True)
    sys.exit(7)
time.sleep(30)
"""


def listener(saving_seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, saving_seconds], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize(
    ("saving_seconds", "status", "last"), [("0", STOPPED, "asked"), ("20", 7, "saved")]
)
def test_a_process_that_hangs_is_ended_and_one_that_saves_gets_time(saving_seconds, status, last):
    process = listener(saving_seconds)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert out.split()[-1] == last
    assert process.returncode == status


def test_the_second_interrupt_ends_a_process_at_once_and_sigterm_does_not():
    process = listener("20")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert "saved" not in out


@pytest.mark.parametrize(
    ("numbers", "status", "at_once"),
    [
        ([signal.SIGTERM], 143, False),
        ([signal.SIGTERM, signal.SIGTERM], 143, False),
        ([signal.SIGUSR1], 143, False),
        ([signal.SIGHUP], 129, False),
        ([signal.SIGINT], 130, False),
        ([signal.SIGINT, signal.SIGINT], 130, True),
        ([signal.SIGTERM, signal.SIGINT], 143, True),
    ],
)
def test_a_wish_is_taken_from_signals_and_handlers_are_put_back(numbers, status, at_once):
    handled = (*supervision.STOP_SIGNALS, signal.SIGHUP)
    before = [signal.getsignal(number) for number in handled]
    wish = StopWish()
    try:
        assert wish.status is None
        for number in numbers:
            os.kill(os.getpid(), number)
    finally:
        wish.close()
    assert (wish.status, wish.at_once) == (status, at_once)
    assert [signal.getsignal(number) for number in handled] == before
    wish.ask(1)
    assert wish.status == status, "the first one counts"


def test_what_the_caller_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        wish = StopWish()
        os.kill(os.getpid(), signal.SIGHUP)
        wish.close()
        assert wish.status is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def deaf_group():
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
    return child


def test_a_group_ends_even_if_it_does_not_listen():
    child = deaf_group()
    end_group(child.pid, grace_seconds=0.3)
    assert group_members(child.pid) == []
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()


def test_a_group_that_saves_gets_time_unless_it_is_to_end_at_once(monkeypatch):
    monkeypatch.setattr(supervision, "SAVING_SECONDS", 0.6)
    child = deaf_group()
    began = time.monotonic()
    end_group(child.pid, grace_seconds=0.1, is_saving=lambda: True)
    assert time.monotonic() - began > 0.7
    child.communicate()
    child = deaf_group()
    end_group(child.pid, is_saving=lambda: True, at_once=lambda: True)
    assert group_members(child.pid) == []
    child.communicate()
    end_group(child.pid)
