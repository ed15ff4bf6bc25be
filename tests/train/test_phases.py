"""Phases lie one after the other: their times add up, and a collective interrupts what it is in."""

import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from declip_train.phases import COMMUNICATION, PHASES, PhaseTimes, communication_timed

CPU = torch.device("cpu")


class Clock:
    """Moments of a line of time that the test moves; those after ``known`` are not over yet."""

    def __init__(self):
        self.time, self.known = 0.0, float("inf")

    def __call__(self):
        return Moment(self, self.time)


class Moment:
    def __init__(self, clock, at):
        self.clock, self.at = clock, at

    def passed(self):
        return self.at <= self.clock.known

    def until(self, later):
        return later.at - self.at


def test_an_inner_phase_interrupts_the_outer():
    clock = Clock()
    phases = PhaseTimes(CPU, clock)
    with phases.phase("forward"):
        clock.time += 1
        with phases.phase("communication"):
            clock.time += 2
            assert phases.active == "communication"
        clock.time += 4
    clock.time += 8
    taken = phases.take()
    assert set(taken) == set(PHASES)
    assert {n: s for n, s in taken.items() if s} == {"forward": 5, "communication": 2, "other": 8}
    assert not any(phases.take().values())


@given(
    st.recursive(
        st.just([]),
        lambda inner: st.lists(
            st.tuples(st.sampled_from(PHASES), st.integers(0, 9), inner), max_size=3
        ),
        max_leaves=12,
    ),
    st.integers(0, 60),
)
def test_times_add_up_to_the_whole(tree, known):
    clock = Clock()
    phases = PhaseTimes(CPU, clock)

    def run(nodes):
        for name, seconds, inner in nodes:
            with phases.phase(name):
                clock.time += seconds
                run(inner)
            clock.time += 1

    run(tree)
    clock.known = known
    early = sum(phases.take().values())
    assert early <= min(known, clock.time), "what the device has not come to is not told"
    clock.known = float("inf")
    assert early + sum(phases.take().values()) == clock.time


def test_a_run_that_nobody_asks_is_added_up():
    clock = Clock()
    phases = PhaseTimes(CPU, clock)
    for _ in range(3000):
        with phases.phase("step"):
            clock.time += 1
    assert len(phases._changes) < 1100
    assert phases.take()["step"] == 3000


def test_a_phase_ends_where_its_block_raises():
    phases = PhaseTimes(CPU)
    with pytest.raises(KeyError), phases.phase("save"):
        raise KeyError
    assert phases.active == "other"
    with pytest.raises(ValueError, match=r"no phase is named 'sleep'; there are wait, augment"):
        phases.phase("sleep").__enter__()


def test_waiting_for_items_is_counted_and_the_items_are_the_same():
    clock = Clock()
    phases = PhaseTimes(CPU, clock)

    def slow():
        for item in range(3):
            clock.time += 10
            yield item

    found = []
    for item in phases.watched(slow()):
        clock.time += 1
        found.append(item)
    assert found == [0, 1, 2]
    taken = phases.take()
    assert (taken["wait"], taken["other"]) == (30, 3)


def test_another_thread_counts_while_gradients_are_computed():
    """Autograd's threads on a GPU; the loader's threads are no part of the line of time."""
    clock = Clock()
    phases = PhaseTimes(CPU, clock)

    def other():
        with phases.phase("communication"):
            clock.time += 1

    def in_thread():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with phases.phase("forward"):
        in_thread()
    with phases.phase("backward"):
        in_thread()
    taken = phases.take()
    assert (taken["forward"], taken["communication"], taken["backward"]) == (1, 1, 0)


def test_collectives_are_timed_and_put_back(tmp_path):
    originals = {name: getattr(dist, name) for name in COMMUNICATION}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        phases = PhaseTimes(CPU)
        numbers = torch.ones(3)

        def train():
            with communication_timed(phases), phases.phase("forward"):
                dist.all_reduce(numbers)
                raise KeyError

        with pytest.raises(KeyError):
            train()
        assert numbers.tolist() == [1, 1, 1]
        assert phases.take()["communication"] > 0
        dist.all_reduce(numbers)
        assert phases.take()["communication"] == 0
    finally:
        dist.destroy_process_group()
    assert {name: getattr(dist, name) for name in COMMUNICATION} == originals
