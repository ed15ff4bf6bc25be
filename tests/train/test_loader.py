"""Batches: the same however many processes share them, and wherever a run begins."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from declip_train.loader import BatchLoader, epoch_order
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings

if TYPE_CHECKING:
    from tests.train.training_data import write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_training_data

SETTINGS = TrainSettings(
    model="test", global_batch_size=12, epochs=2, warmup_steps=1, seed=5, neighbor_choice="sample"
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_training_data(root, samples_per_shard=25)
    return load_samples(str(root), selection="default", neighbors="captions")


def columns(batch):
    """Tensors of a batch with the samples first, cut to what is not padding."""
    found = {"images": batch.images.transpose(0, 1)}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor) and name != "images":
            wide = torch.zeros(len(value), 77, dtype=value.dtype)
            if value.ndim == 2:
                wide[:, : value.shape[1]] = value
            found[name] = wide if value.ndim == 2 else value
    return found


@pytest.mark.parametrize("method", ["declip", "clip"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_same_global_batch(samples, method, world_size):
    settings = dataclasses.replace(SETTINGS, method=method)
    whole = BatchLoader(samples, settings, 0, 1)
    parts = [BatchLoader(samples, settings, rank, world_size) for rank in range(world_size)]
    for step in (0, 3, 5):
        expected = columns(whole.make_batch(step))
        found = [columns(part.make_batch(step)) for part in parts]
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.cat([f[name] for f in found]), value, rtol=0, atol=0, msg=name
            )


def test_an_epoch_shows_each_sample_once(samples):
    loader = BatchLoader(samples, SETTINGS, 0, 1)
    assert loader.steps_per_epoch == 4
    assert loader.num_steps == 8
    seen = np.concatenate([loader.global_indices(step) for step in range(4)])
    assert len(set(seen.tolist())) == 48
    again = np.concatenate([loader.global_indices(step) for step in range(4, 8)])
    assert not np.array_equal(seen, again)
    np.testing.assert_array_equal(np.sort(epoch_order(50, 5, 1)), np.arange(50))


def test_starting_later_gives_the_same_batches(samples):
    straight = list(BatchLoader(samples, SETTINGS, 0, 2).batches(0))
    later = list(BatchLoader(samples, SETTINGS, 0, 2).batches(5))
    assert [b.step for b in straight] == list(range(8))
    assert [b.epoch for b in straight] == [0] * 4 + [1] * 4
    for one, other in zip(straight[5:], later, strict=True):
        torch.testing.assert_close(columns(one), columns(other), rtol=0, atol=0)


def test_the_cache_changes_nothing(samples):
    without = dataclasses.replace(SETTINGS, decoded_cache_megabytes=0)
    for step in (0, 4):
        one = BatchLoader(samples, SETTINGS, 0, 1)
        one.make_batch(step)
        torch.testing.assert_close(
            columns(one.make_batch(step)),
            columns(BatchLoader(samples, without, 0, 1).make_batch(step)),
            rtol=0,
            atol=0,
        )


def test_texts_are_the_samples_own(samples):
    loader = BatchLoader(samples, SETTINGS, 0, 1)
    batch = loader.make_batch(2)
    assert batch.targets is not None
    assert batch.replaced is not None
    assert batch.mask_positions is not None
    assert batch.has_neighbor is not None
    assert batch.second_token_ids is not None
    assert batch.neighbor_token_ids is not None
    for row, index in enumerate(loader.global_indices(2)):
        decode = loader.tokenizer.decode
        caption = samples.captions[index]
        assert decode(batch.targets[row].numpy()) == caption
        assert set(decode(batch.second_token_ids[row].numpy()).split()) <= set(caption.split())
        near = decode(batch.neighbor_token_ids[row].numpy())
        assert near in (samples.neighbor_captions[index] or (caption,))
        assert bool(batch.has_neighbor[row]) == bool(samples.neighbor_captions[index])
    kept = ~(batch.mask_positions)
    assert torch.equal(batch.token_ids[kept], batch.targets[kept])
    assert not (batch.replaced & ~batch.mask_positions).any()


def test_a_fault_in_the_thread_reaches_the_trainer(samples, tmp_path):
    broken = dataclasses.replace(samples, tar_paths=[str(tmp_path / "gone.tar")] * 2, _files={})
    with pytest.raises(FileNotFoundError):
        next(BatchLoader(broken, SETTINGS, 0, 1).batches(0))


def test_leaving_early_ends_the_thread(samples):
    import threading

    loader = BatchLoader(samples, SETTINGS, 0, 1)
    for _ in loader.batches(0):
        break
    assert not [t for t in threading.enumerate() if t.name == "batch-loader"]
