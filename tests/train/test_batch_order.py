"""The order of samples: a pure function of the step, whatever shares it and wherever it begins."""

import itertools
import threading
import time

import numpy as np
import pytest

from declip_train.batch_order import BatchOrder, shuffled_samples
from declip_train.mixtures import epoch_length, epoch_sequence


def permuted(number, seed=3, fingerprint="data"):
    return lambda epoch: shuffled_samples(number, seed=seed, epoch=epoch, fingerprint=fingerprint)


# 2 x 13 x 12 x 8 = 2,496 cases, about as many more in ranks.
LENGTHS = (1, 2, 3, 5, 7, 12, 16, 25, 31, 48, 60, 97, 200)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 30, 48, 60)
GRID = [(n, b) for n, b in itertools.product(LENGTHS, SIZES) if b <= n]


@pytest.mark.parametrize("seed", [0, 11])
def test_every_sample_once_an_epoch_and_no_tail_is_dropped(seed):
    for number, size in GRID:
        order = BatchOrder(number, size, permuted(number, seed))
        steps = -(-4 * number // size)
        positions = np.concatenate([order.share(step).indices for step in range(steps)])
        passes = np.concatenate([order.share(step).epochs for step in range(steps)])
        for epoch in range(4):
            own = positions[epoch * number : (epoch + 1) * number]
            assert sorted(own.tolist()) == list(range(number)), (number, size, epoch)
            assert (passes[epoch * number : (epoch + 1) * number] == epoch).all()


def test_parts_of_ranks_make_the_global_batch_in_order():
    cases = 0
    for number, size in GRID:
        draw = permuted(number)
        whole = BatchOrder(number, size, draw)
        for world in (w for w in range(1, 9) if size % w == 0):
            # Each rank has an order of its own, as each process has.
            ranks = [BatchOrder(number, size, draw) for _ in range(world)]
            for step in (0, 1, number // size, 5 * number // size):
                expected = whole.share(step)
                parts = [order.share(step, r, world) for r, order in enumerate(ranks)]
                assert {len(part.indices) for part in parts} == {size // world}
                for field in ("indices", "epochs"):
                    joined = np.concatenate([getattr(part, field) for part in parts])
                    np.testing.assert_array_equal(joined, getattr(expected, field))
                cases += 1
    assert cases > 1000


def test_beginning_at_any_step_gives_the_same_batches():
    for number, size in GRID:
        straight = BatchOrder(number, size, permuted(number))
        last = 3 * number // size
        expected = [straight.share(step).indices for step in range(last + 1)]
        for first in {0, 1, last // 2, last}:
            later = BatchOrder(number, size, permuted(number))
            for step in range(first, last + 1):
                later.prepare(step)
                np.testing.assert_array_equal(later.share(step).indices, expected[step])


def test_passes_of_a_batch_are_those_of_its_samples():
    for number, size in GRID:
        order = BatchOrder(number, size, permuted(number))
        for step in range(3 * number // size + 1):
            found = order.share(step).epochs
            assert sorted(set(found.tolist())) == list(order.epochs_of(step))
            assert 1 <= len(order.epochs_of(step)) <= 2
            assert (np.diff(found) >= 0).all()


WEIGHTS = [(1.0,), (2.0,), (0.5,), (1.0, 1.0), (0.25, 3.0), (1.5, 0.7, 2.0)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("unit", [8, 13, 40])
def test_weighted_mixtures_come_as_often_as_their_weight_says(weights, unit):
    sizes = [unit * (place + 1) for place in range(len(weights))]
    length = epoch_length(sizes, weights)

    def draw(epoch):
        return epoch_sequence(sizes, weights, seed=1, epoch=epoch, fingerprint="x")

    for size in (1, 3, 4):
        order = BatchOrder(length, size, draw)
        steps = -(-3 * length // size)
        seen = np.concatenate([order.share(step).indices for step in range(steps)])
        for epoch in range(3):
            own = seen[epoch * length : (epoch + 1) * length]
            counts = np.bincount(own, minlength=sum(sizes))
            first = 0
            for part, weight in zip(sizes, weights, strict=True):
                found = counts[first : first + part]
                assert set(found.tolist()) <= {int(np.floor(weight)), int(np.ceil(weight))}
                assert abs(found.sum() - weight * part) <= 0.5
                first += part


def test_other_seeds_epochs_and_data_have_other_orders():
    orders = [
        shuffled_samples(50, seed=seed, epoch=epoch, fingerprint=data).tolist()
        for seed, epoch, data in itertools.product((0, 1), (0, 1, 2), ("a", "b"))
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert orders[0] == shuffled_samples(50, seed=0, epoch=0, fingerprint="a").tolist()


def test_places_are_uniform():
    """Each sample falls into each fifth of an epoch equally often."""
    epochs = 2000
    places = np.array(
        [
            np.argsort(shuffled_samples(10, seed=0, epoch=epoch, fingerprint=""))
            for epoch in range(epochs)
        ]
    )
    counts = np.stack([(places // 2 == fifth).sum(0) for fifth in range(5)])
    chi2 = ((counts - epochs / 5) ** 2 / (epochs / 5)).sum()
    assert chi2 < 80, "40 degrees of freedom: exceeded by chance once in 6,000 seeds"


def test_at_most_two_epochs_are_held_and_the_next_is_drawn_before_it_is_needed():
    drawn = []

    def draw(epoch):
        drawn.append((epoch, threading.current_thread().name))
        return permuted(64)(epoch)

    order = BatchOrder(64, 4, draw)
    for step in range(64):
        order.prepare(step)
        deadline = time.monotonic() + 10
        while step % 16 == 15 and len(drawn) < step // 16 + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        order.share(step)
        assert len(order._drawn) <= 2
        assert all(held.result().dtype == np.int32 for held in order._drawn.values())
    assert [epoch for epoch, _ in drawn] == list(range(5))
    assert {name for epoch, name in drawn if epoch > 0} == {"epoch-order"}


def test_a_fault_of_the_order_reaches_whoever_asks():
    def draw(epoch):
        if epoch:
            raise OSError("gone")
        return np.arange(8)

    order = BatchOrder(8, 4, draw)
    order.prepare(1)
    order.share(1)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            order.share(2)
    with pytest.raises(ValueError, match="drawn with 7 samples in place of 8"):
        BatchOrder(8, 4, lambda _: np.arange(7)).share(0)


@pytest.mark.parametrize(("length", "size"), [(0, 1), (3, 4), (3, 0)])
def test_batches_that_no_epoch_fills_are_refused(length, size):
    with pytest.raises(ValueError, match="cannot be cut from epochs"):
        BatchOrder(length, size, permuted(length))


@pytest.mark.parametrize("part", [(-1, 0, 1), (0, 1, 1), (0, -1, 2), (0, 0, 3), (0, 0, 0)])
def test_parts_that_do_not_exist_are_refused(part):
    with pytest.raises(ValueError, match="there is no part"):
        BatchOrder(8, 4, permuted(8)).share(*part)


def test_a_sample_that_comes_twice_in_a_pass_has_two_streams():
    order = BatchOrder(8, 4, lambda epoch: np.array([0, 1, 2, 3] * 2), repeats=True)
    names = [
        name
        for step in range(4)
        for share in [order.share(step)]
        for name in share.streams([f"k{i}" for i in share.indices])
    ]
    assert len(set(names[:8])) == 8, "each place of a pass has its own"
    assert names[:8] == names[8:], "what tells passes apart is the pass"
    parts = [order.share(1, rank, 2).streams(["a", "b"]) for rank in range(2)]
    assert [part[0] for part in parts] == ["a@4", "a@6"], "whatever the ranks"
    plain = BatchOrder(8, 4, lambda epoch: np.arange(8))
    assert plain.share(0).streams(["a", "b", "c", "d"]) == ["a", "b", "c", "d"]
