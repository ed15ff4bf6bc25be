import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from stage_runs import digests, run_stage

from declip_filter import MeasureImages
from declip_filter.signals import (
    SCHEMA,
    difference_hash,
    luma_entropy,
    measure_image,
    read_signals,
    read_successes,
)
from declip_shards import DeclipError, Store, layout, read_samples, sidecars, writer
from declip_shards.fakes import draw


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def hamming(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_every_success_has_one_row_in_order_of_keys(fake_root, store):
    stats = run_stage(MeasureImages(root=fake_root))
    for shard in layout.list_shards(store):
        table = read_signals(store, "basic", shard)
        assert table.column_names == SCHEMA.names
        keys = table.column("key").to_pylist()
        assert keys == [sample.key for sample in read_samples(store, shard)]
        assert len(keys) == stats[shard].num_in == stats[shard].num_out < 40


def test_rerun_and_other_order_give_the_same_bytes(fake_root, store):
    stage = MeasureImages(root=fake_root)
    run_stage(stage)
    before = digests(fake_root, "signals")
    for path in before:
        store.remove(path)
    assert not any(stage.is_done(task) for task in stage.tasks())
    run_stage(stage, list(reversed(stage.tasks())))
    assert digests(fake_root, "signals") == before


def test_signals_are_those_of_the_stored_picture(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    sample = next(read_samples(store, "00000"))
    row = read_signals(store, "basic", "00000").to_pylist()[0]
    luma = np.asarray(Image.open(io.BytesIO(sample.image)).convert("L"), dtype=np.float64)
    assert row["contrast"] == pytest.approx(luma.std() / 255, abs=1e-6)
    assert row["num_bytes"] == len(sample.image)
    assert (row["width"], row["height"], row["aspect"]) == (32, 32, 1)
    assert row["caption_words"] == len(sample.caption.split())


def test_aspect_is_of_the_original_not_of_the_stored_picture(tmp_path):
    store = Store(str(tmp_path))
    row = {"url": "", "caption": "a wide one", "key": "000000", "status": "success",
           "error_message": None, "width": 32, "height": 32, "original_width": 400,
           "original_height": 100, "sha256": None}  # fmt: skip
    image = draw("red", "circle", 32, np.random.default_rng(0))
    sample = writer.Sample(key="000000", image=image, caption="a wide one", metadata=row)
    writer.write_shard(store, "00000", [sample], pa.Table.from_pylist([row]), {})
    run_stage(MeasureImages(root=str(tmp_path)))
    measured = read_signals(store, "basic", "00000").to_pylist()[0]
    assert (measured["aspect"], measured["original_width"], measured["width"]) == (4, 400, 32)


def test_flat_and_two_level_pictures():
    flat = measure_image(encode(np.full((20, 30, 3), 120, np.uint8)))
    assert (flat["contrast"], flat["entropy"]) == (0, 0)
    halves = np.zeros((20, 20, 3), np.uint8)
    halves[:, 10:] = 255
    split = measure_image(encode(halves))
    assert split["contrast"] == pytest.approx(0.5)
    assert split["entropy"] == pytest.approx(1)


def test_entropy_of_even_levels_is_eight_bits():
    assert luma_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8)


def test_hash_survives_recompression_and_scaling_and_tells_pictures_apart():
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (6, 6), dtype=np.uint8)
    big = Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC)
    other = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((96, 96))
    sink = io.BytesIO()
    big.save(sink, "JPEG", quality=60)
    again = Image.open(sink).convert("L")
    assert len(difference_hash(big)) == 16
    assert hamming(difference_hash(big), difference_hash(again)) <= 4
    assert hamming(difference_hash(big), difference_hash(big.resize((48, 48)))) <= 4
    assert hamming(difference_hash(big), difference_hash(other)) >= 16


def test_undecodable_picture_is_named(fake_root, store):
    samples = list(read_samples(store, "00000"))
    broken = samples[5]
    samples[5] = writer.Sample(
        key=broken.key, image=b"no picture", caption=broken.caption, metadata=broken.metadata
    )
    store.write_bytes(layout.tar_path("00000"), writer.pack_tar(samples))
    with pytest.raises(
        DeclipError, match=rf"sample '{broken.key}' cannot be decoded .*rerun ingest"
    ):
        run_stage(MeasureImages(root=fake_root))


@pytest.mark.parametrize("lost", ["tar", "parquet"])
def test_tar_and_parquet_that_disagree_are_refused(fake_root, store, lost):
    if lost == "tar":
        samples = list(read_samples(store, "00001"))[:-1]
        store.write_bytes(layout.tar_path("00001"), writer.pack_tar(samples))
    else:
        table = sidecars.read_table(store, layout.shard_parquet_path("00001"))
        sidecars.write_table(store, layout.shard_parquet_path("00001"), table.slice(1))
    with pytest.raises(DeclipError, match=r"shard 00001: .*rerun ingest"):
        run_stage(MeasureImages(root=fake_root))


def test_successes_are_sorted_and_only_successes(store):
    rows = read_successes(store, "00000", ["key"])
    assert {row["status"] for row in rows} == {"success"}
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)


def test_no_shards_and_bad_names_are_refused(tmp_path):
    with pytest.raises(DeclipError, match=r"no complete shard under .*run ingest first"):
        MeasureImages(root=str(tmp_path)).tasks()
    with pytest.raises(DeclipError, match=r"name is '../x'; it must be one folder name"):
        MeasureImages(name="../x")
