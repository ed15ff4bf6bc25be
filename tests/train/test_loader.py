"""Batches: the same however many processes share them, and wherever a run begins."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from declip_shards import DeclipError, Store
from declip_train import augment
from declip_train.loader import BatchLoader, epoch_order, view_threads
from declip_train.samples import load_samples
from declip_train.settings import TrainSettings
from declip_train.stored_features import load_stored_features
from declip_train.tokenizer import EOT_ID, SOT_ID
from declip_train.views import AUGMENTATIONS

if TYPE_CHECKING:
    from tests.train.training_data import write_embeddings, write_training_data
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from training_data import write_embeddings, write_training_data

METHODS = ["clip", "slip", "filip", "declip", "defilip"]
SETTINGS = TrainSettings(
    model="test", global_batch_size=12, epochs=2, warmup_steps=1, seed=5, neighbor_choice="sample"
)
PLAIN_FIELDS = {"images", "token_ids", "sample_ids", "caption_ids"}
MASK_FIELDS = {"replaced", "mask_positions", "targets", "second_token_ids"}
NEIGHBOR_FIELDS = {"has_neighbor", "neighbor_caption_ids"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    store = write_training_data(root, samples_per_shard=25)
    write_embeddings(store)
    return root


def load(root):
    return load_samples(
        str(root),
        selection="default",
        neighbors="captions",
        neighbor_embeddings="captions",
        embed_dim=16,
    )


@pytest.fixture(scope="module")
def samples(root):
    return load(root)


def changed(**values):
    return dataclasses.replace(SETTINGS, **values)


def tensors(batch):
    return {n: value for n, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def columns(batch):
    """Tensors of a batch with the samples first, token rows at their full length."""
    found = {}
    for name, value in tensors(batch).items():
        if name == "images":
            found[name] = value.transpose(0, 1)
        elif value.ndim == 2 and name != "neighbor_features":
            found[name] = torch.nn.functional.pad(value, (0, 77 - value.shape[1]))
        else:
            found[name] = value
    return found


def same(one, other):
    torch.testing.assert_close(columns(one), columns(other), rtol=0, atol=0)


VARIANTS = [
    *({"method": method} for method in METHODS),
    {"method": "declip", "neighbor_source": "bank", "neighbor_choice": "rank"},
    {"method": "defilip", "neighbor_feature": "stored"},
    {"method": "declip", "neighbor_feature": "stored", "neighbor_choice": "rank"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_ranks_and_accumulation_share_the_same_global_batch(samples, variant):
    settings = changed(**variant)
    whole = BatchLoader(samples, settings, 0, 1)
    for step in (0, 5):
        expected = columns(whole.make_batch(step))
        for world_size in (2, 3, 4):
            parts = [
                part
                for rank in range(world_size)
                for part in BatchLoader(samples, settings, rank, world_size)
                .make_batch(step)
                .split(12 // world_size if world_size == 4 else 1)
            ]
            found = [columns(part) for part in parts]
            assert all(f.keys() == expected.keys() for f in found)
            joined = {name: torch.cat([f[name] for f in found]) for name in expected}
            torch.testing.assert_close(joined, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("variant", "views", "fields"),
    [
        ({"method": "clip"}, 1, set()),
        ({"method": "slip"}, 3, set()),
        ({"method": "filip"}, 1, set()),
        ({"method": "declip"}, 2, MASK_FIELDS | NEIGHBOR_FIELDS | {"neighbor_token_ids"}),
        ({"method": "defilip"}, 2, MASK_FIELDS | NEIGHBOR_FIELDS | {"neighbor_token_ids"}),
        (
            {"method": "declip", "neighbor_feature": "stored"},
            2,
            MASK_FIELDS | NEIGHBOR_FIELDS | {"neighbor_features"},
        ),
        (
            {"method": "declip", "neighbor_source": "bank", "neighbor_choice": "rank"},
            2,
            MASK_FIELDS,
        ),
    ],
)
def test_a_batch_has_what_its_method_reads_and_nothing_else(samples, variant, views, fields):
    batch = BatchLoader(samples, changed(**variant), 0, 1).make_batch(1)
    assert set(tensors(batch)) == PLAIN_FIELDS | fields
    assert batch.images.shape == (views, 12, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    rows = {name: len(value) for name, value in tensors(batch).items() if name != "images"}
    assert set(rows.values()) == {12} == {len(batch)}
    for name in ("token_ids", "second_token_ids", "neighbor_token_ids"):
        ids = getattr(batch, name)
        if ids is not None:
            assert (ids == EOT_ID).sum(dim=1).tolist() == [1] * 12, name
            assert (ids[:, -1] == EOT_ID).any(), "trimmed to the longest"


@pytest.mark.parametrize("method", METHODS)
def test_views_are_drawn_by_the_methods_parameters(samples, method):
    settings = changed(method=method)
    loader = BatchLoader(samples, settings, 0, 1)
    batch = loader.make_batch(5)
    expected = {
        "clip": ["light"],
        "slip": ["light", "moco_v2", "moco_v2"],
        "filip": ["moco_v2"],
        "declip": ["moco_v2"] * 2,
        "defilip": ["moco_v2"] * 2,
    }[method]
    assert len(batch.images) == len(expected)
    for row, index in enumerate(loader.global_indices(5).tolist()):
        key = samples.keys[index]
        image = augment.decode_image(samples.read_image(index), key)
        for number, name in enumerate(expected):
            view = augment.random_view(
                image,
                key,
                number,
                size=16,
                parameters=AUGMENTATIONS[name],
                seed=settings.seed,
                epoch=1,
            )
            torch.testing.assert_close(
                batch.images[number, row], augment.to_tensor(view), rtol=0, atol=0
            )


def test_slips_self_supervised_views_follow_their_own_setting(samples):
    one, other = (
        BatchLoader(samples, changed(method="slip", ssl_augmentation=name), 0, 1).make_batch(0)
        for name in ("moco_v2", "slip_ssl")
    )
    assert torch.equal(one.images[0], other.images[0])
    for number in (1, 2):
        assert not torch.equal(one.images[number], other.images[number])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_picture_is_decoded_once_for_all_its_views(samples, monkeypatch, method, threads):
    decoded = []

    def count(data, key):
        decoded.append(key)
        return augment.decode_image(data, key)

    monkeypatch.setattr("declip_train.loader.decode_image", count)
    settings = changed(method=method, decoded_cache_megabytes=0, loader_threads=threads)
    batch = BatchLoader(samples, settings, 0, 1).make_batch(0)
    assert sorted(decoded) == sorted(samples.keys[index] for index in batch.sample_ids.tolist())


def test_threads_change_nothing(samples):
    for cache in (0, 512):
        loaders = [
            BatchLoader(samples, changed(loader_threads=n, decoded_cache_megabytes=cache), 0, 1)
            for n in (1, 4)
        ]
        for step in (0, 1, 5):
            same(*[loader.make_batch(step) for loader in loaders])


def test_a_picture_that_is_broken_is_named_whatever_the_threads(samples, tmp_path):
    tars = [Path(path) for path in samples.tar_paths]
    for tar in tars:
        (tmp_path / tar.name).write_bytes(bytes(tar.stat().st_size))
    paths = [str(tmp_path / tar.name) for tar in tars]
    for threads in (1, 3):
        broken = dataclasses.replace(samples, tar_paths=paths)
        loader = BatchLoader(broken, changed(loader_threads=threads), 0, 1)
        with pytest.raises(DeclipError, match="cannot be decoded; rerun ingest"):
            loader.make_batch(0)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_splitting_and_joining_gives_the_batch_without_a_copy(samples, variant, parts):
    batch = BatchLoader(samples, changed(**variant), 0, 1).make_batch(4)
    pieces = batch.split(parts)
    assert [len(piece) for piece in pieces] == [12 // parts] * parts
    whole = tensors(batch)
    for name, value in whole.items():
        joined = torch.cat([tensors(p)[name] for p in pieces], dim=int(name == "images"))
        assert torch.equal(joined, value), name
    for piece in pieces:
        assert (piece.step, piece.epoch) == (batch.step, batch.epoch)
        assert tensors(piece).keys() == whole.keys()
        for name, value in tensors(piece).items():
            storage = value.untyped_storage().data_ptr()
            assert storage == whole[name].untyped_storage().data_ptr(), name


@pytest.mark.parametrize("parts", [0, 5, 24])
def test_a_batch_that_cannot_be_cut_evenly_is_refused(samples, parts):
    batch = BatchLoader(samples, SETTINGS, 0, 1).make_batch(0)
    with pytest.raises(ValueError, match=f"12 rows cannot be cut evenly into {parts} parts"):
        batch.split(parts)


def test_an_epoch_shows_each_sample_once(samples):
    loader = BatchLoader(samples, SETTINGS, 0, 1)
    assert loader.steps_per_epoch == 4
    assert loader.num_steps == 8
    seen = np.concatenate([loader.global_indices(step) for step in range(4)])
    assert len(set(seen.tolist())) == 48
    again = np.concatenate([loader.global_indices(step) for step in range(4, 8)])
    assert not np.array_equal(seen, again)
    np.testing.assert_array_equal(np.sort(epoch_order(50, 5, 1)), np.arange(50))


def test_identities_are_the_same_in_every_epoch(samples):
    loader = BatchLoader(samples, SETTINGS, 0, 2)
    of_sample: dict[int, int] = {}
    for step in range(8):
        batch = loader.make_batch(step)
        assert torch.equal(batch.sample_ids, torch.from_numpy(loader.local_indices(step)))
        for sample, caption in zip(batch.sample_ids.tolist(), batch.caption_ids, strict=True):
            assert of_sample.setdefault(sample, int(caption)) == int(caption)
    text = {number: samples.captions[sample] for sample, number in of_sample.items()}
    for sample, number in of_sample.items():
        assert samples.captions[sample] == text[number]
    assert len(set(text.values())) == len(text)


def test_starting_later_gives_the_same_batches(samples):
    straight = list(BatchLoader(samples, SETTINGS, 0, 2).batches(0))
    later = list(BatchLoader(samples, SETTINGS, 0, 2).batches(5))
    assert [b.step for b in straight] == list(range(8))
    assert [b.epoch for b in straight] == [0] * 4 + [1] * 4
    for one, other in zip(straight[5:], later, strict=True):
        same(one, other)


def test_the_cache_changes_nothing(samples):
    without = dataclasses.replace(SETTINGS, decoded_cache_megabytes=0)
    for step in (0, 4):
        one = BatchLoader(samples, SETTINGS, 0, 1)
        one.make_batch(step)
        same(one.make_batch(step), BatchLoader(samples, without, 0, 1).make_batch(step))


def test_texts_are_the_samples_own(samples):
    loader = BatchLoader(samples, SETTINGS, 0, 1)
    batch = loader.make_batch(2)
    assert batch.targets is not None
    assert batch.replaced is not None
    assert batch.mask_positions is not None
    assert batch.has_neighbor is not None
    assert batch.second_token_ids is not None
    assert batch.neighbor_token_ids is not None
    assert batch.neighbor_caption_ids is not None
    number_of = dict(zip(samples.captions, samples.caption_ids.tolist(), strict=True))
    for row, index in enumerate(loader.global_indices(2)):
        decode = loader.tokenizer.decode
        caption = samples.captions[index]
        assert decode(batch.targets[row].numpy()) == caption
        assert set(decode(batch.second_token_ids[row].numpy()).split()) <= set(caption.split())
        near = decode(batch.neighbor_token_ids[row].numpy())
        assert near in (samples.neighbor_captions[index] or (caption,))
        assert number_of[near] == batch.neighbor_caption_ids[row]
        assert number_of[caption] == batch.caption_ids[row]
        assert bool(batch.has_neighbor[row]) == bool(samples.neighbor_captions[index])
    kept = ~(batch.mask_positions)
    assert torch.equal(batch.token_ids[kept], batch.targets[kept])
    assert not (batch.replaced & ~batch.mask_positions).any()


@pytest.mark.parametrize("method", ["clip", "slip", "filip"])
def test_methods_without_masked_language_read_the_plain_caption(samples, method):
    loader = BatchLoader(samples, changed(method=method), 0, 1)
    batch = loader.make_batch(3)
    for row, index in enumerate(loader.global_indices(3)):
        assert loader.tokenizer.decode(batch.token_ids[row].numpy()) == samples.captions[index]


def test_neighbor_settings_leave_the_other_texts_alone(samples):
    variants = [
        {"neighbor_choice": "sample"},
        {"neighbor_choice": "rank"},
        {"neighbor_choice": "rank", "neighbor_source": "bank"},
        {"neighbor_feature": "stored"},
    ]
    first, *others = (
        columns(BatchLoader(samples, changed(**v), 0, 1).make_batch(6)) for v in variants
    )
    for other in others:
        for name in PLAIN_FIELDS | MASK_FIELDS:
            assert torch.equal(first[name], other[name]), name


def test_without_eda_the_second_caption_is_the_first(samples):
    batch = tensors(BatchLoader(samples, changed(eda=False), 0, 1).make_batch(0))
    assert torch.equal(batch["targets"], batch["second_token_ids"])


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_a_fixed_rank_gives_that_neighbor(samples, rank):
    settings = changed(neighbor_choice="rank", neighbor_rank=rank)
    loader = BatchLoader(samples, settings, 0, 1)
    for step in range(8):
        batch = loader.make_batch(step)
        assert batch.neighbor_token_ids is not None
        for row, index in enumerate(batch.sample_ids.tolist()):
            near = samples.neighbor_captions[index] or (samples.captions[index],)
            wanted = near[min(rank, len(near)) - 1]
            assert loader.tokenizer.decode(batch.neighbor_token_ids[row].numpy()) == wanted


@pytest.mark.parametrize("top", [None, 1, 2, 50])
def test_sampling_draws_every_neighbor_of_the_first_few(samples, top):
    settings = changed(neighbor_top_k=top, epochs=40)
    loader = BatchLoader(samples, settings, 0, 1)
    most = [min(top or 3, len(near)) for near in samples.neighbor_captions]
    places: list[set[int | None]] = [
        {loader._neighbor_place(index, epoch) for epoch in range(40)}
        for index in range(len(samples))
    ]
    for found, number in zip(places, most, strict=True):
        assert found == set(range(number)) if number else found == {None}


@pytest.mark.parametrize("choice", ["rank", "sample"])
def test_stored_features_are_those_of_the_neighbor_whose_caption_is_read(root, samples, choice):
    table = load_stored_features(Store(str(root)), "captions", dim=16, wanted=set(samples.keys))
    vector = {key: table[0].vectors([row])[0] for key, row in table[1].items()}
    text = dict(zip(samples.keys, samples.captions, strict=True))
    by_caption = BatchLoader(samples, changed(neighbor_choice=choice), 0, 1)
    stored = BatchLoader(samples, changed(neighbor_choice=choice, neighbor_feature="stored"), 0, 1)
    for step in (0, 7):
        one, other = tensors(by_caption.make_batch(step)), tensors(stored.make_batch(step))
        for name in NEIGHBOR_FIELDS:
            assert torch.equal(one[name], other[name])
        features = other["neighbor_features"]
        assert features.dtype == torch.float32
        assert features.shape == (12, 16)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(12), rtol=0, atol=1e-6)
        for row in torch.nonzero(other["has_neighbor"])[:, 0].tolist():
            caption = by_caption.tokenizer.decode(one["neighbor_token_ids"][row].numpy())
            own = features[row].numpy()
            assert any(np.array_equal(own, vector[k]) for k in vector if text[k] == caption)


def test_stored_features_must_have_been_listed(root):
    samples = load_samples(str(root), selection="default", neighbors="captions")
    with pytest.raises(DeclipError, match="list them with `training_samples`"):
        BatchLoader(samples, changed(neighbor_feature="stored"), 0, 1)


@pytest.mark.parametrize("method", METHODS)
def test_empty_captions_are_start_and_end(samples, method):
    captions = ["", " \t\u3000\n"] * (len(samples) // 2)
    empty = dataclasses.replace(samples, captions=captions, neighbor_captions=[()] * len(samples))
    batch = BatchLoader(empty, changed(method=method), 0, 1).make_batch(0)
    for name in ("token_ids", "second_token_ids", "neighbor_token_ids"):
        ids = getattr(batch, name)
        assert ids is None or ids.tolist() == [[SOT_ID, EOT_ID]] * 12
    assert batch.mask_positions is None or not batch.mask_positions.any()
    assert batch.has_neighbor is None or not batch.has_neighbor.any()
    assert len(set(batch.caption_ids.tolist())) == 2


def test_a_batch_in_which_no_token_is_chosen_is_a_batch(samples):
    batch = tensors(BatchLoader(samples, changed(mask_probability=0.0), 0, 1).make_batch(0))
    assert not batch["mask_positions"].any()
    assert not batch["replaced"].any()
    assert torch.equal(batch["token_ids"], batch["targets"])


def test_masks_change_with_the_epoch_and_not_with_the_batch(samples):
    wide, narrow = SETTINGS, changed(global_batch_size=4)
    masks: dict[int, torch.Tensor] = {}
    for settings in (wide, narrow):
        loader = BatchLoader(samples, settings, 0, 1)
        for step in range(loader.steps_per_epoch):
            found = columns(loader.make_batch(step))
            for row, sample in enumerate(found["sample_ids"].tolist()):
                mask = found["mask_positions"][row]
                assert torch.equal(masks.setdefault(sample, mask), mask)
    again = BatchLoader(samples, wide, 0, 1)
    different = 0
    for step in range(4, 8):
        found = columns(again.make_batch(step))
        for row, sample in enumerate(found["sample_ids"].tolist()):
            if sample in masks:
                different += not torch.equal(masks[sample], found["mask_positions"][row])
    assert different > 10


def test_a_fault_in_the_thread_reaches_the_trainer(samples, tmp_path):
    broken = dataclasses.replace(samples, tar_paths=[str(tmp_path / "gone.tar")] * 2)
    with pytest.raises(FileNotFoundError):
        next(BatchLoader(broken, SETTINGS, 0, 1).batches(0))


def test_leaving_early_ends_the_thread(samples):
    import threading

    loader = BatchLoader(samples, SETTINGS, 0, 1)
    for _ in loader.batches(0):
        break
    assert not [t for t in threading.enumerate() if t.name == "batch-loader"]


def test_threads_that_draw_views(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert view_threads(changed(threads_per_rank=3)) == 3
    assert view_threads(changed(threads_per_rank=3, loader_threads=5)) == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert view_threads(changed(global_batch_size=12, num_ranks=4)) == 4
    # They change no pixel, so a run may go on under another number.
    assert changed(loader_threads=7).digest() == SETTINGS.digest()


@pytest.mark.parametrize("method", METHODS)
def test_lengths_are_those_of_the_captions_before_words_are_hidden(samples, method):
    batch = BatchLoader(samples, changed(method=method), 0, 1).make_batch(0)
    names = {n for n in tensors(batch) if n.endswith("token_ids")}
    assert set(batch.lengths) == names
    for name, lengths in batch.lengths.items():
        ids = batch.targets if name == "token_ids" and batch.targets is not None else None
        ids = getattr(batch, name) if ids is None else ids
        assert lengths.tolist() == [row.tolist().index(EOT_ID) + 1 for row in ids]
        parts = [part.lengths[name] for part in batch.split(3)]
        assert torch.cat(parts).tolist() == lengths.tolist()
