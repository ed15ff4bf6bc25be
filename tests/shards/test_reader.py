import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import DeclipError, Sample, Store, image_places, layout, read_samples
from declip_shards.fakes import write_fake_dataset
from declip_shards.writer import pack_tar

SAMPLES = st.dictionaries(
    st.integers(0, 99999).map(lambda n: f"{n:09d}"),
    st.tuples(
        st.binary(max_size=1500),
        st.text(max_size=60),
        st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3),
        st.sampled_from(["jpg", "png", "webp"]),
    ),
    max_size=6,
)


def _samples(drawn):
    return [
        Sample(key=key, image=image, caption=text, metadata=meta, image_extension=extension)
        for key, (image, text, meta, extension) in drawn.items()
    ]


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.randoms())
def test_reader_inverts_writer_in_any_order(drawn, shuffle: random.Random):
    samples = _samples(drawn)
    store = Store("memory://reader-test")
    data = pack_tar(samples)
    shuffled = list(samples)
    shuffle.shuffle(shuffled)
    assert pack_tar(shuffled) == data
    store.write_bytes(layout.tar_path("00000"), data)
    assert list(read_samples(store, "00000")) == sorted(samples, key=lambda s: s.key)


def test_places_point_at_the_pictures(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=5)
    tar = store.read_bytes(layout.tar_path("00000"))
    samples = list(read_samples(store, "00000"))
    places = image_places(store, "00000")
    assert [p.key for p in places] == [s.key for s in samples]
    for sample, place in zip(samples, places, strict=True):
        assert tar[place.offset : place.offset + place.size] == sample.image


def test_every_cut_is_noticed(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=4)
    path = layout.tar_path("00000")
    tar = store.read_bytes(path)
    content_end = len(tar.rstrip(b"\0"))
    for cut in random.Random(0).sample(range(content_end), 60):
        store.write_bytes(path, tar[:cut])
        with pytest.raises(DeclipError):
            list(read_samples(store, "00000"))


def test_a_flipped_bit_in_a_header_never_loses_samples_in_silence(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=4)
    path = layout.tar_path("00000")
    tar = store.read_bytes(path)
    second_header = image_places(store, "00000")[1].offset - 512
    for bit in random.Random(1).sample(range(512 * 8), 80):
        flipped = bytearray(tar)
        flipped[second_header + bit // 8] ^= 1 << bit % 8
        store.write_bytes(path, flipped)
        try:
            assert len(list(read_samples(store, "00000"))) == 4
        except DeclipError:
            continue
