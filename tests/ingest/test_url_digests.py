"""A set of digests behaves as Python's set does, whatever the batches were."""

import hashlib

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_ingest.url_digests import Digests, DigestSet, DigestTable, digest_texts, find

texts = st.lists(st.text(max_size=3), max_size=40)


@given(st.lists(texts, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_first_of_equals_is_new_in_every_batch(batches):
    ours, seen = DigestSet(), set()
    for batch in batches:
        expected = []
        for text in batch:
            expected.append(text not in seen)
            seen.add(text)
        assert ours.add(digest_texts(pa.array(batch, pa.string()))).tolist() == expected
    assert len(ours) == len(seen)


@given(texts, texts)
@settings(max_examples=60, deadline=None)
def test_shared_values_are_counted_as_sets_count_them(left, right):
    a, b = DigestSet(), DigestSet()
    a.add(digest_texts(pa.array(left, pa.string())))
    b.add(digest_texts(pa.array(right, pa.string())))
    assert a.count_shared(b) == len(set(left) & set(right)) == b.count_shared(a)
    wanted = pa.array(right, pa.string())
    assert a.contains(digest_texts(wanted)).tolist() == [text in set(left) for text in right]


def test_a_digest_is_blake2b_of_the_bytes():
    digests = digest_texts(pa.array(["http://a.example/ü"]))
    raw = hashlib.blake2b("http://a.example/ü".encode(), digest_size=16).digest()
    assert [int(digests.high[0]), int(digests.low[0])] == list(np.frombuffer(raw, np.uint64))


def test_digests_that_share_their_first_half_are_told_apart():
    low = np.array([5, 3, 9, 3], np.uint64)
    same = np.full(4, 7, np.uint64)
    ours = DigestSet()
    assert ours.add(Digests(high=same, low=low)).tolist() == [True, True, True, False]
    wanted = Digests(high=same, low=np.array([9, 5, 3, 4], np.uint64))
    assert ours.contains(wanted).tolist() == [True, True, True, False]
    run = Digests(high=same[:3], low=np.array([3, 5, 9], np.uint64))
    assert find(run, wanted).tolist() == [2, 1, 0, -1]


def test_many_batches_stay_in_few_runs():
    ours = DigestSet()
    for number in range(200):
        ours.add(digest_texts(pa.array([f"{number}-{i}" for i in range(20)])))
    assert len(ours) == 4000
    assert len(ours._runs) <= 10


@given(st.lists(st.tuples(st.text(max_size=2), st.integers(0, 255)), max_size=30), texts)
@settings(max_examples=60, deadline=None)
def test_a_table_gives_the_first_value_of_each_key(pairs, wanted):
    reference: dict[str, int] = {}
    for key, value in pairs:
        reference.setdefault(key, value)
    keys = digest_texts(pa.array([key for key, _ in pairs], pa.string()))
    values = np.array([[value] for _, value in pairs], np.uint8).reshape(len(pairs), 1)
    found, is_found = DigestTable(keys, values).look_up(digest_texts(pa.array(wanted, pa.string())))
    assert is_found.tolist() == [text in reference for text in wanted]
    assert found[:, 0].tolist() == [reference.get(text, 0) for text in wanted]
