"""Signals: an orderly stop, a status that says which, and no endless goodbye."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipelines.stopping import stop_on_signals

CODE = (
    "import sys, time\n"
    "from pipelines import stopping\n"
    "stopping.STOP_SECONDS = float(sys.argv[2])\n"
    "with stopping.stop_on_signals():\n"
    "    try:\n"
    "        print('at work', flush=True)\n"
    "        while True: time.sleep(60)\n"
    "    finally:\n"
    "        print('letting go', flush=True)\n"
    "        time.sleep(float(sys.argv[1]))\n"
    "        print('let go', flush=True)\n"
)


def start(*arguments, ignored=()):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CODE, *arguments]

    def ignore():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    process = subprocess.Popen(
        command,
        env=env,
        preexec_fn=ignore,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, None)]
)
def test_a_signal_lets_go_and_is_told_by_the_status(number, status):
    process = start("0", "30")
    process.send_signal(number)
    told, errors = process.communicate(timeout=30)
    assert told == "letting go\nlet go\n"
    if status is None:  # the command line says the rest
        assert "KeyboardInterrupt" in errors
    else:
        assert process.returncode == status
        assert errors == (
            f"\ndeclip: stopped by {signal.Signals(number).name}; what is done is kept, run the "
            "same command again.\n"
        )


def test_a_goodbye_that_takes_too_long_is_cut():
    process = start("60", "0.5")
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=30)
    assert told == "letting go\n"
    assert process.returncode == 143


def test_the_second_signal_ends_it_at_once():
    process = start("60", "60")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "letting go\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_what_nohup_ignores_stays_ignored():
    process = start("0", "30", ignored=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_afterwards_signals_are_as_before():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_another_thread_changes_nothing():
    seen = []

    def work():
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
