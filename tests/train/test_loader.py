"""Batches: the same however many processes share them, and wherever a run begins."""

import copy
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import declip_pixels
from declip_shards import DeclipError, Store
from declip_train import augment
from declip_train.column_files import TextColumn
from declip_train.loader import BatchLoader, colors_on_device, view_threads
from declip_train.loader_clock import PHASES
from declip_train.sample_columns import NeighborColumns
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
    for step in (0, 4):
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
    batch = loader.make_batch(4)
    expected = {
        "clip": ["light"],
        "slip": ["light", "moco_v2", "moco_v2"],
        "filip": ["moco_v2"],
        "declip": ["moco_v2"] * 2,
        "defilip": ["moco_v2"] * 2,
    }[method]
    assert len(batch.images) == len(expected)
    share = loader.order.share(4)
    assert set(share.epochs.tolist()) == {0, 1}
    for row, (index, epoch) in enumerate(
        zip(share.indices.tolist(), share.epochs.tolist(), strict=True)
    ):
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
                epoch=epoch,
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
@pytest.mark.parametrize("megabytes", [0, 512])
def test_a_picture_is_decoded_once_for_all_its_views(
    samples, monkeypatch, method, threads, megabytes
):
    decoded = []
    for name in ("decode_views", "decode_pictures"):
        original = getattr(declip_pixels, name)

        def count(data, *args, _original=original, **options):
            decoded.extend(data)
            return _original(data, *args, **options)

        monkeypatch.setattr(f"declip_train.picture_views.{name}", count)
    settings = changed(method=method, decoded_cache_megabytes=megabytes, loader_threads=threads)
    loader = BatchLoader(samples, settings, 0, 1)
    batch = loader.make_batch(0)
    assert sorted(decoded) == sorted(samples.read_images(batch.sample_ids.numpy()))
    loader.make_batch(0)
    assert len(decoded) == (12 if megabytes else 24)


@pytest.mark.parametrize("photometric", ["cpu", "device"])
def test_threads_decoder_and_kept_pictures_change_nothing(samples, photometric):
    ways = [(1, 0, "auto"), (4, 0, "auto"), (1, 512, "auto"), (4, 512, "auto"), (2, 0, "python")]
    loaders = [
        BatchLoader(
            samples,
            changed(
                loader_threads=threads,
                decoded_cache_megabytes=megabytes,
                decoder=decoder,
                photometric=photometric,
            ),
            0,
            1,
        )
        for threads, megabytes, decoder in ways
    ]
    for step in (0, 4, 0):
        first, *others = [loader.make_batch(step) for loader in loaders]
        for other in others:
            same(first, other)


@pytest.mark.parametrize("method", ["clip", "slip", "declip"])
def test_colors_on_the_device_are_the_reference_up_to_rounding(samples, method):
    batches = {
        way: BatchLoader(samples, changed(method=method, photometric=way), 0, 1).make_batch(4)
        for way in ("cpu", "device")
    }
    unfinished, expected = batches["device"], batches["cpu"]
    assert expected.colors is None
    assert unfinished.images.dtype == torch.uint8
    assert unfinished.images.shape == (*expected.images.shape[:2], 16, 16, 3)
    finished = unfinished.to(torch.device("cpu"))
    assert finished.colors is None
    # One step of 8 bits is 1/255 divided by a deviation of about 0.27.
    assert float((finished.images - expected.images).abs().max()) < 2 / 255 / 0.26
    same(dataclasses.replace(finished, images=expected.images), expected)
    assert finished.to(torch.device("cpu")).images is finished.images, "once and not again"
    parts = [part.to(torch.device("cpu")) for part in unfinished.split(3)]
    torch.testing.assert_close(
        torch.cat([part.images for part in parts], 1), finished.images, rtol=0, atol=1e-5
    )


def test_where_colors_change(monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert colors_on_device(changed()) is there
        assert colors_on_device(changed(photometric="device"))
        assert not colors_on_device(changed(photometric="cpu"))


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
    loader = BatchLoader(samples, changed(epochs=3), 0, 1)
    assert loader.steps_per_epoch == 50 / 12
    assert loader.num_steps == 12
    seen = np.concatenate([loader.global_indices(step) for step in range(13)])
    passes = [seen[epoch * 50 : (epoch + 1) * 50].tolist() for epoch in range(3)]
    assert all(sorted(each) == list(range(50)) for each in passes)
    assert len({tuple(each) for each in passes}) == 3
    assert [list(loader.epochs_of(step)) for step in (0, 3, 4, 5, 8)] == [
        [0],
        [0],
        [0, 1],
        [1],
        [1, 2],
    ]


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
    assert [b.epoch for b in straight] == [0] * 5 + [1] * 3
    for one, other in zip(straight[5:], later, strict=True):
        same(one, other)


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
    everyone = np.arange(len(samples))
    most = np.minimum(top or 3, samples.neighbor_counts(everyone)).tolist()
    drawn = [
        loader.texts._places(samples, everyone, epoch, samples.keys_of(everyone))
        for epoch in range(40)
    ]
    for found, number in zip(np.stack(drawn, 1).tolist(), most, strict=True):
        assert set(found) == (set(range(number)) if number else {-1})


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
    texts = ["", " \t\u3000\n"] * (len(samples.pool) // 2)
    pool = dataclasses.replace(
        samples.pool,
        captions=TextColumn.of(texts),
        caption_ids=np.array([0, 1] * (len(texts) // 2), np.int32),
    )
    near = NeighborColumns(starts=np.zeros(len(samples) + 1, np.int64), rows=np.empty(0, np.int32))
    empty = dataclasses.replace(samples, pool=pool, near=near)
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
        for step in range(48 // settings.global_batch_size):
            found = columns(loader.make_batch(step))
            for row, sample in enumerate(found["sample_ids"].tolist()):
                mask = found["mask_positions"][row]
                assert torch.equal(masks.setdefault(sample, mask), mask)
    again = BatchLoader(samples, wide, 0, 1)
    different = 0
    for step in range(5, 8):
        found = columns(again.make_batch(step))
        for row, sample in enumerate(found["sample_ids"].tolist()):
            if sample in masks:
                different += not torch.equal(masks[sample], found["mask_positions"][row])
    assert different > 10


def spoil(samples, indices):
    """Overwrite some pictures where they lie; the tars' times stay, as of a failing disk."""
    rows = samples.rows[np.asarray(indices)]
    for row in rows.tolist():
        path = Path(samples.tars.paths[int(samples.pool.tars[row])])
        times = path.stat()
        with path.open("r+b") as file:
            file.seek(int(samples.pool.offsets[row]))
            file.write(bytes(int(samples.pool.sizes[row])))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def copied(root, tmp_path):
    """Samples whose tars may be spoilt."""
    shutil.copytree(root, tmp_path / "copy")
    return load(tmp_path / "copy")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("megabytes", [0, 512])
@pytest.mark.parametrize("photometric", ["cpu", "device"])
def test_a_broken_picture_is_replaced_by_key_whatever_the_threads_and_ranks(
    samples, copied, threads, megabytes, photometric
):
    settings = changed(
        error_budget=0.2,
        loader_threads=threads,
        decoded_cache_megabytes=megabytes,
        photometric=photometric,
    )
    whole = BatchLoader(samples, settings, 0, 1)
    broken = whole.global_indices(0)[[2, 7, 8]]
    spoil(copied, broken)
    loader = BatchLoader(copied, settings, 0, 1)
    batch = loader.make_batch(0)
    expected = whole.make_batch(0)
    failures = loader.take_failures()
    reason = {failure.key: failure.reason for failure in failures}
    stand_in = {failure.key: failure.replaced_by for failure in failures}
    assert set(reason) == set(samples.keys_of(broken))
    assert all("picture" in why for why in reason.values())
    kept = [row for row in range(12) if row not in (2, 7, 8)]
    assert torch.equal(batch.images[:, kept], expected.images[:, kept])
    assert batch.sample_ids[kept].tolist() == expected.sample_ids[kept].tolist()
    number = {key: row for row, key in enumerate(samples.keys)}
    for row in (2, 7, 8):
        key = samples.keys[int(expected.sample_ids[row])]
        while key in stand_in:
            key = stand_in[key]
        assert batch.sample_ids[row] == number[key]
    # The stand-in brings its own texts.
    assert batch.targets is not None
    for row, index in enumerate(batch.sample_ids.tolist()):
        assert loader.tokenizer.decode(batch.targets[row].numpy()) == samples.captions[index]
    parts = [BatchLoader(copied, settings, rank, 3).make_batch(0) for rank in range(3)]
    assert torch.equal(torch.cat([part.sample_ids for part in parts]), batch.sample_ids)
    assert torch.equal(torch.cat([part.images for part in parts], 1), batch.images)


def test_more_failures_than_the_budget_end_the_run(copied):
    spoil(copied, range(0, 50, 2))
    loader = BatchLoader(copied, changed(error_budget=0.1), 0, 1)
    with pytest.raises(
        DeclipError,
        match=r"6 of the 50 samples of epoch 0 could not be read or decoded, but error_budget 0\.1 "
        r"allows 5; the last is sample '\w+': .*rerun ingest for them\), or raise error_budget",
    ):
        list(loader.batches(0))
    assert len(loader.take_failures()) == 6


def test_a_tar_that_is_gone_or_cut_is_named(copied):
    first = Path(copied.tars.paths[0])
    os.truncate(first, 600)
    with pytest.raises(DeclipError, match=r"00000\.tar' was cut short during training\. Mend"):
        list(BatchLoader(copied, SETTINGS, 0, 1).batches(0))
    first.unlink()
    with pytest.raises(DeclipError, match=r"00000\.tar' cannot be read \(No such file"):
        list(BatchLoader(load_samples_again(copied), SETTINGS, 0, 1).batches(0))


def load_samples_again(samples):
    """The same samples, without files that are open."""
    return dataclasses.replace(samples, tars=copy.copy(samples.tars))


def test_where_nothing_can_be_read_no_stand_in_is_looked_for_without_end(copied):
    spoil(copied, range(50))
    with pytest.raises(DeclipError, match="a sample and 16 others in its place could not be read"):
        BatchLoader(copied, changed(error_budget=1.0), 0, 1).make_batch(0)


def test_the_clock_tells_what_time_went_into(samples):
    loader = BatchLoader(samples, changed(decoded_cache_megabytes=0), 0, 1)
    loader.make_batch(0)
    taken = loader.clock.take()
    assert all(taken[name] > 0 for name in PHASES)
    assert taken["decode"] > taken["neighbors"]
    loader = BatchLoader(samples, changed(method="clip"), 0, 1)
    loader.make_batch(0)
    assert loader.clock.take()["neighbors"] == 0


def test_captions_are_tokenized_once(samples, monkeypatch):
    loader = BatchLoader(samples, changed(eda=False), 0, 1)

    def refuse(captions, trim=False):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(type(loader.tokenizer), "__call__", refuse)
    for step in range(8):
        assert loader.make_batch(step).neighbor_token_ids is not None


def test_leaving_early_ends_the_thread(samples):
    import threading

    loader = BatchLoader(samples, SETTINGS, 0, 1)
    for _ in loader.batches(0):
        break
    assert not [t for t in threading.enumerate() if t.name == "batch-loader"]


def test_processes_that_hold_other_samples_are_refused(samples, monkeypatch):
    fewer = dataclasses.replace(samples, rows=samples.rows[:40], known_fingerprint="")
    heard = [f"{len(each):,} samples, {each.digest()[:12]}" for each in (samples, fewer)]

    def gather(found, own):
        assert own in heard
        found[:] = heard

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank, each in enumerate((samples, fewer)):
        with pytest.raises(DeclipError, match=r"process 0 found 50 samples, .* process 1 40 samp"):
            next(BatchLoader(each, changed(method="clip"), rank, 2).batches(0))
    heard[1] = heard[0]
    assert len(next(BatchLoader(samples, changed(method="clip"), 1, 2).batches(0))) == 6


def test_a_decoder_in_python_leaves_the_compiled_part_alone(samples, monkeypatch):
    def compiled():
        raise AssertionError("it was asked for")

    monkeypatch.setattr("declip_pixels.decoding.compiled_part", compiled)
    settings = changed(method="clip", decoder="python", decoded_cache_megabytes=0)
    assert len(BatchLoader(samples, settings, 0, 1).make_batch(0)) == 12


def test_threads_that_draw_views(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert view_threads(changed(threads_per_rank=3)) == 3
    assert view_threads(changed(threads_per_rank=3, loader_threads=5)) == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert view_threads(changed(global_batch_size=12, num_ranks=4)) == 4
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        # Of the four processes, two are on this machine.
        monkeypatch.setenv(name, "2")
        assert view_threads(changed(global_batch_size=12, num_ranks=4)) == 8
        monkeypatch.delenv(name)
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
