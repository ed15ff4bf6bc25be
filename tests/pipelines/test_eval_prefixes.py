"""Texts whose common beginnings are computed once, against the whole texts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_train.model_config import get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.towers import CLIP
from pipelines.eval_prefixes import encode_group, make_groups, shared_prefixes

TEMPLATES = ("a bad photo of the {}.", "a photo of many {} in the wild.", "{}", "itap of my {}!")
NAMES = ("cat", "dog", "blue whale", "great white shark", "tench", "hen & cock", "aircraft carrier")


@pytest.fixture(scope="module")
def tower():
    model = CLIP(get_model_config("test"), generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(texts):
    tokenizer = CaptionTokenizer()
    ids = tokenizer(texts, trim=True)
    return ids, tokenizer.lengths(ids)


rows_of_ids = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), max_size=24)


def padded(rows):
    ids = np.zeros((len(rows), max(map(len, rows), default=1) + 1), np.int64)
    for row, numbers in zip(ids, rows, strict=True):
        row[: len(numbers)], row[len(numbers)] = numbers, 9
    return ids, np.array([len(numbers) + 1 for numbers in rows], np.int64)


@settings(max_examples=40)
@given(rows_of_ids, st.integers(1, 5))
def test_a_beginning_is_the_longest_that_enough_texts_share(rows, least):
    ids, lengths = padded(rows)
    found = shared_prefixes(ids, lengths, least)
    for row, (length, shared) in enumerate(zip(lengths, found, strict=True)):
        counts = [int((ids[:, :n] == ids[row, :n]).all(axis=1).sum()) for n in range(1, length)]
        expected = max((n for n, count in enumerate(counts, 1) if count >= least), default=0)
        assert shared == expected


@settings(max_examples=40)
@given(rows_of_ids, st.integers(1, 5), st.integers(1, 5))
def test_groups_put_together_are_the_texts(rows, most, least):
    ids, lengths = padded(rows)
    groups = make_groups(ids, lengths, most, least)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(rows)))
    for group in groups:
        assert 1 <= len(group.rows) <= most
        for place, row in enumerate(group.rows):
            whole = [*group.prefix_ids[group.which[place]], *group.rest_ids[place]]
            assert whole == ids[row, : lengths[row]].tolist()


@pytest.mark.parametrize(("most", "least"), [(3, 2), (64, 4), (64, 1000)])
def test_features_are_those_of_whole_texts(tower, most, least):
    texts = [template.format(name) for template in TEMPLATES for name in NAMES]
    texts += ["word " * 90, "word " * 80 + "other", "word " * 90 + "end", "word " * 100, ""]
    ids, lengths = tokens(texts)
    groups = make_groups(ids, lengths, most, least)
    # Otherwise the test would not test it.
    assert any(group.prefix_ids.shape[1] for group in groups) == (least <= len(texts))
    found = torch.empty(len(texts), tower.config.embed_dim)
    with torch.inference_mode():
        expected = tower.encode_text(torch.from_numpy(ids))
        for group in groups:
            found[torch.from_numpy(group.rows)] = encode_group(tower, group, "cpu")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
