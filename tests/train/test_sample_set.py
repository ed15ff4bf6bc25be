"""Samples as columns: what is asked for by number is what the lists say."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_train.sample_set import TrainingSamples

WORDS = st.sampled_from(["a cat", "a dog", "", "zwei Hunde", "a car"])
LISTS = st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=3)), min_size=1, max_size=9)


def build(pairs):
    return TrainingSamples.in_memory(
        keys=[f"k{n}" for n in range(len(pairs))],
        captions=[caption for caption, _ in pairs],
        neighbor_captions=[tuple(near) for _, near in pairs],
    )


@settings(max_examples=30, deadline=None)
@given(pairs=LISTS, seed=st.integers(0, 9))
def test_any_order_of_numbers(pairs, seed):
    samples = build(pairs)
    indices = np.random.default_rng(seed).integers(0, len(pairs), 7)
    assert samples.keys_of(indices) == [f"k{n}" for n in indices]
    assert samples.captions_of(indices) == [pairs[n][0] for n in indices]
    near = [tuple(pairs[n][1]) for n in indices]
    assert samples.neighbor_captions_of(indices) == near
    assert samples.neighbor_counts(indices).tolist() == [len(texts) for texts in near]
    assert list(samples.neighbor_captions) == [tuple(texts) for _, texts in pairs]
    assert samples.num_without_neighbor == sum(not texts for _, texts in pairs)
    some = [n for n in indices.tolist() if pairs[n][1]]
    places = [len(pairs[n][1]) - 1 for n in some]
    assert samples.neighbor_captions_at(some, places) == [pairs[n][1][-1] for n in some]
    text = dict(zip(samples.caption_ids.tolist(), samples.captions, strict=True))
    for number, caption in zip(samples.caption_ids_of(indices), samples.captions_of(indices)):
        assert text[int(number)] == caption
    ids = samples.neighbor_caption_ids_of(some, places)
    assert all(text.get(int(i), pairs[n][1][-1]) == pairs[n][1][-1] for i, n in zip(ids, some))
    firsts = samples.pool.caption_firsts
    np.testing.assert_array_equal(samples.pool.caption_ids[firsts], np.arange(len(firsts)))


def test_a_neighbor_that_is_not_there_is_no_other_samples():
    samples = build([("a", ["b"]), ("c", []), ("d", ["e", "f"])])
    for index, place in ((0, 1), (1, 0), (2, -1)):
        with pytest.raises(IndexError, match="no neighbor of that place"):
            samples.neighbor_captions_at([index], [place])
    alone = TrainingSamples.in_memory(keys=["a"], captions=["b"])
    assert alone.neighbor_captions_of([0]) == [()]
    assert alone.num_without_neighbor == 1
    with pytest.raises(IndexError, match="listed without neighbors"):
        alone.neighbor_caption_ids_of([0], [0])
    with pytest.raises(ValueError, match="without stored features"):
        samples.stored_vectors_of([0], [0])


def test_columns_on_demand_are_sequences():
    samples = build([("a", ["b"]), ("c", []), ("d", [])])
    assert samples.keys[-1] == "k2"
    assert samples.keys[1:] == ["k1", "k2"]
    assert samples.captions.index("d") == 2
    assert list(samples.captions) == ["a", "c", "d"]
    assert samples.captions == ["a", "c", "d"]
    with pytest.raises(IndexError):
        samples.keys[3]


def test_the_digest_follows_what_is_trained_on():
    pairs = [("a", ["b"]), ("c", []), ("d", ["e", "f"])]
    digests = {
        build(changed).digest()
        for changed in (pairs, pairs[:2], [("a", ["c"]), *pairs[1:]], [("x", ["b"]), *pairs[1:]])
    }
    assert len(digests) == 4
    assert build(pairs).digest() == build(pairs).digest()
    assert build(pairs).fingerprint() == build([(c, []) for c, _ in pairs]).fingerprint()


def test_samples_may_be_sent_to_another_process():
    samples = build([("a", ["b"]), ("c", [])])
    again = pickle.loads(pickle.dumps(samples))
    assert again.digest() == samples.digest()
    assert list(again.neighbor_captions) == [("b",), ()]
