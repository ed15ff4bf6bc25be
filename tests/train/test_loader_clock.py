"""Seconds by phase."""

import threading

import pytest

from declip_train.loader_clock import PHASES, PhaseClock


def test_threads_add_up_and_taking_begins_anew():
    clock = PhaseClock()

    def work():
        for _ in range(1000):
            clock.add("decode", 0.25)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.add("fetch", 2.0)
    taken = clock.take()
    assert tuple(taken) == PHASES
    assert taken["decode"] == 1000.0
    assert taken["fetch"] == 2.0
    assert taken["tokens"] == 0.0
    assert set(clock.take().values()) == {0.0}


def test_a_phase_counts_also_where_it_fails():
    clock = PhaseClock()
    with pytest.raises(KeyError), clock.phase("tokens"):
        raise KeyError
    assert clock.take()["tokens"] > 0.0


def test_unknown_phases_are_refused():
    with pytest.raises(ValueError, match="no phase is named 'sleep'; there are fetch, decode"):
        PhaseClock().add("sleep", 1.0)
