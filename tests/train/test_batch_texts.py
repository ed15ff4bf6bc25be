"""Texts of a batch, out of the cache or not."""

import dataclasses

import numpy as np
import pytest
import torch

from declip_train import batch_texts
from declip_train.batch_order import BatchShare
from declip_train.batch_texts import TextMaker
from declip_train.loader_clock import PhaseClock
from declip_train.samples import TrainingSamples
from declip_train.settings import TrainSettings
from declip_train.tokenizer import CaptionTokenizer

SETTINGS = TrainSettings(
    model="test", global_batch_size=4, warmup_steps=0, seed=3, mask_probability=0.5
)
CAPTIONS = [f"a {color} {thing}" for color in ("red", "blue") for thing in ("cat", "dog", "")] * 2
NEAR = [(), ("one far thing",), ("near", "a red cat"), ("x", "y", "z")] * 3
EVERYONE = np.arange(12)


def maker(**changes):
    samples = TrainingSamples.in_memory(
        keys=[f"{n:02d}" for n in EVERYONE], captions=CAPTIONS, neighbor_captions=NEAR
    )
    settings = dataclasses.replace(SETTINGS, **changes)
    tokenizer = CaptionTokenizer()
    return TextMaker(samples, settings, tokenizer=tokenizer, tables=None, clock=PhaseClock())


def equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "clip"},
        {"method": "declip"},
        {"method": "declip", "neighbor_choice": "sample"},
        {"method": "defilip", "eda": False, "neighbor_rank": 3},
        {"method": "declip", "neighbor_source": "bank"},
    ],
    ids=str,
)
def test_the_cache_changes_no_text(changes, monkeypatch):
    cached = maker(**changes)
    monkeypatch.setattr(batch_texts, "caption_tokens", lambda *_, **__: None)
    plain = maker(**changes)
    for indices in (EVERYONE, EVERYONE[[7, 2]], EVERYONE[[0, 0, 4]]):
        epochs = np.sort(indices % 2)
        passes = range(2)
        equal(
            cached.make(BatchShare(indices, epochs), passes),
            plain.make(BatchShare(indices, epochs), passes),
        )


def test_a_sample_reads_as_its_own_epoch_has_it():
    """Whatever else is in the batch, and whether it spans two epochs."""
    texts = maker(method="declip", neighbor_choice="sample")
    epochs = np.array([4] * 5 + [5] * 7)
    whole, _ = texts.make(BatchShare(EVERYONE, epochs), range(4, 6))
    for epoch in (4, 5):
        alone, _ = texts.make(BatchShare(EVERYONE, np.full(12, epoch)), range(epoch, epoch + 1))
        rows = epochs == epoch
        assert torch.equal(whole["mask_positions"][rows], alone["mask_positions"][rows])
        for name in ("neighbor_caption_ids", "has_neighbor"):
            assert torch.equal(whole[name][rows], alone[name][rows])


def test_neighbors_are_drawn_evenly_and_by_rank():
    texts = maker(method="declip", neighbor_choice="sample")
    samples = texts.samples
    keys = samples.keys_of(EVERYONE)
    drawn = np.stack([texts._places(samples, EVERYONE, epoch, keys) for epoch in range(900)])
    for column, near in zip(drawn.T, NEAR, strict=True):
        values, counts = np.unique(column, return_counts=True)
        assert values.tolist() == (list(range(len(near))) or [-1])
        assert (abs(counts - 900 / len(values)) < 100).all()
    for rank in (1, 2, 9):
        texts = maker(method="declip", neighbor_choice="rank", neighbor_rank=rank)
        places = texts._places(samples, EVERYONE, 0, keys)
        assert places.tolist() == [min(rank, len(near)) - 1 for near in NEAR]


def test_lengths_are_of_the_captions_before_words_are_hidden():
    texts = maker(method="declip")
    found, lengths = texts.make(BatchShare(EVERYONE, np.zeros(12, np.int64)), range(1))
    for name in ("targets", "second_token_ids", "neighbor_token_ids"):
        own = lengths["token_ids" if name == "targets" else name]
        assert torch.equal(own, (found[name] != 0).sum(1)), name
        assert int(own.max()) == found[name].shape[1]


def test_streams_are_those_of_generators_of_their_own():
    keys = np.random.default_rng(0).integers(0, 2**63, (7, 2), np.uint64)
    streams = batch_texts._Streams(keys)

    def draws(generator):
        numbers = [int(generator.integers(n + 2)) for n in range(5)]
        return [*numbers, *generator.permutation(6).tolist(), *generator.random(3).tolist()]

    expected = [draws(np.random.Generator(np.random.Philox(key=key))) for key in keys]
    assert [draws(stream) for stream in streams] == expected
    assert [draws(streams[n]) for n in (3, 3, 0, 6)] == [expected[n] for n in (3, 3, 0, 6)]
    assert [draws(stream) for stream in streams[2:4]] == expected[2:4]
    assert len(streams) == 7
