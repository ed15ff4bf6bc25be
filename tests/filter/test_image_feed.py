import io
import threading
import time

import numpy as np
import pytest
from hashing_encoder import HashingEncoder, make_prepared
from PIL import Image

from declip_filter.encoder_clock import EncoderClock
from declip_filter.image_feed import BATCHES_AHEAD, ImageFeed, embed_images, picture_preparer
from declip_shards import DeclipError, layout, read_samples
from declip_shards.writer import Sample, pack_tar

SHARD = "00000"


@pytest.fixture
def samples(store):
    return list(read_samples(store, SHARD))


@pytest.fixture
def keys(samples):
    return [sample.key for sample in samples]


def size_of(image: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(image)).size)


def feed(store, keys, *, prepare=size_of, batch_size=8, num_threads=1):
    return ImageFeed(
        store, SHARD, keys, batch_size=batch_size, prepare=prepare, num_threads=num_threads
    )


def replace_member(store, samples, number, **changes):
    """The shard with one sample changed; the parquet stays."""
    new = [
        Sample(**(vars(sample) | (changes if row == number else {})))
        for row, sample in enumerate(samples)
    ]
    store.write_bytes(layout.tar_path(SHARD), pack_tar(new))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 1000])
def test_wanted_pictures_come_once_in_the_tars_order(store, samples, keys, batch_size, num_threads):
    wanted = keys[1:-1:2]
    with feed(store, wanted, batch_size=batch_size, num_threads=num_threads) as batches:
        found = [(k, p) for batch_keys, p in batches for k in [batch_keys] for p in [p]]
    assert [key for batch_keys, _ in found for key in batch_keys] == wanted
    assert all(len(k) == len(p) for k, p in found)
    assert [len(k) for k, _ in found[:-1]] == [batch_size] * (len(found) - 1)
    expected = [size_of(sample.image) for sample in samples if sample.key in set(wanted)]
    np.testing.assert_array_equal(np.concatenate([p for _, p in found]), expected)


def test_encoded_pictures_are_handed_on_where_nothing_prepares_them(store, samples, keys):
    with feed(store, keys, prepare=None) as batches:
        images = [image for _, batch in batches for image in batch]
    assert images == [sample.image for sample in samples]


def test_no_wanted_picture_reads_no_tar(store):
    store.remove(layout.tar_path(SHARD))
    with feed(store, []) as batches:
        assert list(batches) == []


def test_threads_that_end_in_any_order_change_no_batch(store, keys):
    """The first picture of each batch takes longest."""
    started: list[int] = []

    def slow_first(image):
        started.append(1)
        time.sleep(0.02 if len(started) % 8 == 1 else 0)
        return size_of(image)

    def all_of(prepare, num_threads):
        with feed(store, keys, prepare=prepare, num_threads=num_threads) as batches:
            return [(k, p.tolist()) for k, p in batches]

    assert all_of(slow_first, 4) == all_of(size_of, 1)


def test_preparing_goes_on_while_the_encoder_works(store, keys):
    """Sleep stands for work of other cores: the machine may have one."""
    seconds = 0.01

    def prepare(image):
        time.sleep(seconds)
        return size_of(image)

    clock = EncoderClock()
    with feed(store, keys, prepare=prepare, num_threads=2) as batches:
        for batch_keys, _ in batches:
            with clock.encoding():
                time.sleep(seconds * len(batch_keys))
    in_turn = 2 * seconds * len(keys)
    assert clock.figures(len(keys))["seconds"] < 0.8 * in_turn


def test_no_more_batches_are_prepared_than_may_be_held(store, keys):
    prepared = 0

    def prepare(image):
        nonlocal prepared
        prepared += 1
        return size_of(image)

    with feed(store, keys, prepare=prepare, batch_size=4) as batches:
        for number, _ in enumerate(batches):
            time.sleep(0.01)
            assert prepared <= 4 * (number + 1 + BATCHES_AHEAD)
    assert prepared == len(keys)


def test_leaving_early_ends_all_threads(store, keys):
    before = threading.active_count()
    with feed(store, keys, batch_size=2, num_threads=3) as batches:
        next(iter(batches))
    with pytest.raises(ZeroDivisionError), feed(store, keys, batch_size=2) as batches:
        raise ZeroDivisionError
    assert threading.active_count() == before


@pytest.mark.parametrize("encoder", [HashingEncoder(16), make_prepared("16", root="", device="")])
def test_damaged_picture_is_named_by_shard_and_key(store, samples, keys, encoder):
    replace_member(store, samples, 5, image=samples[5].image[:40])
    sentence = rf"shard {SHARD}: the picture of sample '{keys[5]}' cannot be read: .*Rerun ingest"
    batches = feed(store, keys, prepare=picture_preparer(encoder), num_threads=2)
    with pytest.raises(DeclipError, match=sentence), batches:
        embed_images(encoder, batches, SHARD, keys, EncoderClock())


def test_picture_that_the_tar_lacks_is_named_by_shard_and_key(store, samples, keys):
    store.write_bytes(layout.tar_path(SHARD), pack_tar(samples[:3] + samples[4:]))
    sentence = rf"shard {SHARD}: the tar lacks the picture of sample '{keys[3]}'.*rerun ingest"
    with pytest.raises(DeclipError, match=sentence), feed(store, keys) as batches:
        list(batches)


def test_cut_tar_is_refused(store, samples, keys):
    path = layout.tar_path(SHARD)
    store.write_bytes(path, store.read_bytes(path)[:-12000])
    with pytest.raises(DeclipError, match=rf"shards/{SHARD}.tar"), feed(store, keys) as batches:
        list(batches)


def test_prepared_pictures_of_two_shapes_are_refused(store, keys):
    shapes = iter([2, 3, *[2] * len(keys)])
    batches = feed(store, keys, prepare=lambda image: np.zeros(next(shapes)))
    with (
        pytest.raises(DeclipError, match=rf"'{keys[1]}'.*shape \(3,\), others have \(2,\)"),
        batches,
    ):
        list(batches)


def test_rows_follow_the_keys_that_are_given(store, samples, keys):
    encoder = make_prepared("48", root="", device="")
    backwards = keys[::-1]
    with feed(store, keys, prepare=picture_preparer(encoder), num_threads=2) as batches:
        found = embed_images(encoder, batches, SHARD, backwards, EncoderClock())
    expected = encoder.encode_image([sample.image for sample in samples[::-1]])
    np.testing.assert_array_equal(found, expected)


def test_an_encoders_own_failure_is_not_taken_for_a_damaged_picture(store, keys, monkeypatch):
    encoder = HashingEncoder(16)
    encode_image = encoder.encode_image

    def fail_at_many(images):
        if len(images) > 1:
            raise RuntimeError("out of memory")
        return encode_image(images)

    monkeypatch.setattr(encoder, "encode_image", fail_at_many)
    batches = feed(store, keys, prepare=None)
    with pytest.raises(RuntimeError, match="out of memory"), batches:
        embed_images(encoder, batches, SHARD, keys, EncoderClock())
