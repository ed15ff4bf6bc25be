import io
import json
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from declip_shards import Sample, layout, read_samples, sidecars
from declip_shards.fakes import write_fake_dataset
from declip_shards.writer import _member_header, pack_tar


def by_tarfile(samples: list[Sample]) -> bytes:
    """What the standard library writes of the same members."""
    sink = io.BytesIO()
    with tarfile.open(
        fileobj=sink,
        mode="w",
        format=tarfile.USTAR_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        for sample in sorted(samples, key=lambda s: s.key):
            meta = json.dumps(dict(sample.metadata), sort_keys=True).encode()
            text = sample.caption.encode("utf-8", "surrogatepass")
            for extension, data in (
                (sample.image_extension, sample.image),
                ("txt", text),
                ("json", meta),
            ):
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size, info.mode, info.mtime = len(data), 0o644, 0
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


SAMPLES = st.lists(
    st.builds(
        Sample,
        key=st.text(st.characters(exclude_characters="./", exclude_categories=["Cs"]), max_size=25),
        image=st.binary(max_size=1500) | st.sampled_from([bytes(512), bytes(1024), b"x" * 511]),
        caption=st.text(st.characters()),
        metadata=st.dictionaries(st.text(), st.integers() | st.none() | st.text()),
        image_extension=st.sampled_from(["jpg", "png", "webp"]),
    ),
    unique_by=lambda s: s.key,
    max_size=20,
)


@given(SAMPLES, st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_tar_is_byte_for_byte_what_tarfile_writes(samples, random):
    expected = by_tarfile(samples)
    random.shuffle(samples)
    assert pack_tar(samples) == expected


def header_or_refusal(make: Callable[[], bytes]) -> bytes | str:
    try:
        return make()
    except ValueError as error:
        return str(error)


@given(st.text(max_size=160), st.integers(0, 8**11 - 1) | st.integers(8**11 - 9, 8**11 + 9))
@settings(max_examples=200, deadline=None)
def test_a_header_is_tarfiles_or_refused_with_its_words(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    expected = header_or_refusal(
        lambda: info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    )
    assert header_or_refusal(lambda: _member_header(name, size)) == expected


def test_a_name_longer_than_a_tar_holds_is_refused():
    longest = Sample(key="k" * 95, image=b"", caption="", metadata={})
    assert pack_tar([longest]) == by_tarfile([longest])
    with pytest.raises(ValueError, match="name is too long"):
        pack_tar([Sample(key="k" * 96, image=b"", caption="", metadata={})])


def test_the_same_dataset_has_the_same_bytes(tmp_path):
    one = write_fake_dataset(str(tmp_path / "a"), num_shards=1)
    two = write_fake_dataset(str(tmp_path / "b"), num_shards=1)
    for path in (layout.tar_path("00000"), layout.shard_parquet_path("00000")):
        assert one.read_bytes(path) == two.read_bytes(path)


def test_parquet_has_every_row_and_the_tar_the_successes(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=1, samples_per_shard=9, fail_every=3)
    rows = sidecars.read_rows(store, layout.shard_parquet_path("00000"), ["key", "status"])
    good = [r["key"] for r in rows if r["status"] == "success"]
    assert (len(rows), len(good)) == (9, 6)
    assert [s.key for s in read_samples(store, "00000")] == good


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_keys_that_would_break_a_tar_are_refused(key):
    sample = Sample(key=key, image=b"", caption="", metadata={})
    with pytest.raises(ValueError, match="dot or a slash"):
        pack_tar([sample])


def test_a_repeated_key_is_refused():
    sample = Sample(key="1", image=b"", caption="", metadata={})
    with pytest.raises(ValueError, match="repeated"):
        pack_tar([sample, sample])
