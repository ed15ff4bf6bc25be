"""Mixtures: an epoch is of constant length and meets each sample as often as its weight says."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError
from declip_train.mixtures import epoch_length, epoch_sequence, parse_weights

PARTS = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0.01, 3.5, allow_nan=False)), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(parts=PARTS, seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_each_sample_comes_as_often_as_its_weight_says(parts, seed, epoch):
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    order = epoch_sequence(sizes, weights, seed=seed, epoch=epoch, fingerprint="f")
    counts = np.bincount(order, minlength=sum(sizes))
    assert len(order) == epoch_length(sizes, weights)
    assert len(counts) == sum(sizes)
    first = 0
    for size, weight in parts:
        own = counts[first : first + size]
        assert set(own.tolist()) <= {math.floor(weight), math.floor(weight) + 1}
        assert own.sum() == math.floor(weight) * size + round((weight % 1) * size)
        first += size


def test_weights_of_one_give_a_permutation_however_the_parts_are_cut():
    whole = epoch_sequence([30], [1.0], seed=3, epoch=2, fingerprint="f")
    assert sorted(whole.tolist()) == list(range(30))
    parts = epoch_sequence([10, 20], [1.0, 1.0], seed=3, epoch=2, fingerprint="f")
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 1}, {"fingerprint": "g"}])
def test_the_order_and_the_draw_follow_seed_epoch_and_data(other):
    def order(**changed):
        arguments: dict[str, Any] = {"seed": 3, "epoch": 0, "fingerprint": "f"} | changed
        return epoch_sequence([200, 50], [0.5, 2.25], **arguments)

    np.testing.assert_array_equal(order(), order())
    assert order().tolist() != order(**other).tolist()
    assert sorted(order().tolist()) != sorted(order(**other).tolist()), "others are drawn"


def test_over_many_epochs_all_samples_are_drawn_alike():
    epochs = [
        epoch_sequence([40], [0.25], seed=0, epoch=epoch, fingerprint="f") for epoch in range(400)
    ]
    drawn = np.bincount(np.concatenate(epochs), minlength=40)
    assert drawn.sum() == 4000
    # Binomial with 400 trials at 1/4: mean 100, standard deviation 8.7.
    assert drawn.min() > 60
    assert drawn.max() < 140


def test_weights_that_are_wrong_are_refused():
    assert parse_weights([], ["a", "b"]) == (1.0, 1.0)
    assert parse_weights(["2", "0.5"], ["a", "b"]) == (2.0, 0.5)
    with pytest.raises(DeclipError, match="data_weights has 1 numbers, but train_data has 2 entri"):
        parse_weights(["1"], ["a", "b"])
    for value in ("0", "-1", "nan", "many", "1e9"):
        with pytest.raises(DeclipError, match=f"has '{value}' for 'a', but must have a number abo"):
            parse_weights([value], ["a"])
