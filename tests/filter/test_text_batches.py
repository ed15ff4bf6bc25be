import itertools
import threading

import numpy as np
import pytest
from hashing_encoder import HashingEncoder, make_prepared
from hypothesis import given
from hypothesis import strategies as st

from declip_filter import text_batches
from declip_filter.text_batches import embed_texts, token_batches


@given(st.lists(st.integers(1, 300)), st.integers(1, 1000))
def test_batches_cover_all_rows_in_order_within_the_tokens(lengths, most):
    lengths.sort()
    batches = token_batches(lengths, most)
    covered = [row for batch in batches for row in range(len(lengths))[batch]]
    assert covered == list(range(len(lengths)))
    for batch in batches:
        rows = lengths[batch]
        assert rows
        assert len(rows) == 1 or len(rows) * max(rows) <= most


@given(st.lists(st.integers(1, 300), min_size=1), st.integers(1, 1000))
def test_a_batch_ends_only_where_one_more_row_would_not_fit(lengths, most):
    lengths.sort()
    batches = token_batches(lengths, most)
    for batch, following in itertools.pairwise(batches):
        assert (len(lengths[batch]) + 1) * lengths[following.start] > most


def embed(encoder, texts, size=2):
    return embed_texts(encoder, texts, batch_size=size, batch_tokens=size).vectors


def make_both():
    return [HashingEncoder(32), make_prepared("32", root="r", device="cpu")]


@pytest.mark.parametrize("encoder", make_both(), ids=["texts", "tokens"])
def test_equal_texts_are_encoded_once_and_get_equal_vectors(encoder):
    texts = ["b", "a a", "b", "c", "a a"]
    vectors = embed(encoder, texts)
    assert encoder.num_texts == 3
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[1], vectors[4])
    np.testing.assert_array_equal(embed(encoder, texts[::-1])[::-1], vectors)
    assert embed(encoder, []).shape == (0, 32)


@pytest.mark.parametrize("encoder", make_both(), ids=["texts", "tokens"])
def test_every_text_gets_its_own_vector_whatever_the_batches(encoder, monkeypatch):
    monkeypatch.setattr(text_batches, "WINDOW_TEXTS", 7)
    texts = [f"{'x ' * (number % 5)}word{number}" for number in range(40)]
    alone = np.concatenate([embed(encoder, [text]) for text in texts])
    for size in (1, 3, 100):
        np.testing.assert_array_equal(embed(encoder, texts, size), alone)


def test_cut_texts_are_counted_row_by_row():
    encoder = make_prepared("32", root="r", device="cpu")
    texts = ["one two three four", "one two three four five", "x", "one two three four five"]
    found = embed_texts(encoder, texts, batch_size=2, batch_tokens=8)
    assert found.num_cut == 2
    np.testing.assert_array_equal(found.vectors[0], found.vectors[1])
    assert embed_texts(HashingEncoder(8), texts, batch_size=2, batch_tokens=8).num_cut == 0


def test_tokens_are_made_one_window_ahead_in_one_thread(monkeypatch):
    monkeypatch.setattr(text_batches, "WINDOW_TEXTS", 4)
    encoder = make_prepared("32", root="r", device="cpu")
    threads, ahead, most = set(), 0, []
    tokenize, encode = encoder.tokenize, encoder.encode_tokens

    def count_tokens(texts):
        nonlocal ahead
        threads.add(threading.current_thread().name)
        ahead += len(texts)
        return tokenize(texts)

    def count_encoded(ids):
        nonlocal ahead
        most.append(ahead)
        ahead -= len(ids)
        return encode(ids)

    monkeypatch.setattr(encoder, "tokenize", count_tokens)
    monkeypatch.setattr(encoder, "encode_tokens", count_encoded)
    embed(encoder, [f"word{n}" for n in range(40)], 4)
    assert ahead == 0
    assert max(most) <= 3 * 4
    assert len(threads) == 1
    assert threading.current_thread().name not in threads
