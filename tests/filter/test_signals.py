import hashlib
import io
import itertools

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from stage_runs import digests, run_stage

from declip_filter import MeasureImages, signals
from declip_filter.signals import (
    SCHEMA,
    read_signal_columns,
    read_signals,
    read_successes,
    signal_columns,
)
from declip_shards import DeclipError, Store, layout, read_samples, sidecars, writer
from declip_shards.fakes import draw


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
    # Ours is the file's own luma, Pillow's comes by way of colors that were rounded and clipped.
    assert row["contrast"] == pytest.approx(luma.std() / 255, abs=1e-3)
    assert row["image_sha256"] == hashlib.sha256(sample.image).hexdigest()
    assert row["jpeg_quality"] == 90  # as declip_shards.fakes draws
    assert row["bytes_per_pixel"] == pytest.approx(len(sample.image) / 32**2)
    assert row["num_bytes"] == len(sample.image)
    assert (row["width"], row["height"], row["aspect"]) == (32, 32, 1)
    assert row["caption_words"] == len(sample.caption.split())
    assert (row["caption_language"], row["caption_dictionary_words"]) == ("en", 1)
    assert row["caption_nouns"] is None


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


def test_captions_alone_decide_text_signals_and_pictures_the_others(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    table = read_signals(store, "basic", "00000").to_pylist()
    for row, other in itertools.combinations(table[:20], 2):
        same_text = row["caption_sha"] == other["caption_sha"]
        texts = [{k: v for k, v in r.items() if k.startswith("caption_")} for r in (row, other)]
        assert (texts[0] == texts[1]) == same_text


def test_what_is_switched_off_is_empty_and_nothing_else_changes(fake_root, store):
    run_stage(MeasureImages(root=fake_root))
    run_stage(MeasureImages(root=fake_root, name="bare", detect_language=False, dictionary=()))
    loaded = ["caption_language", "caption_language_confidence", "caption_dictionary_words"]
    full, bare = (read_signals(store, name, "00000") for name in ("basic", "bare"))
    assert [bare.column(c).null_count for c in loaded] == [bare.num_rows] * 3
    assert full.drop_columns(loaded).equals(bare.drop_columns(loaded))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_size_of_a_batch_changes_nothing(fake_root, store, monkeypatch, size):
    run_stage(MeasureImages(root=fake_root))
    before = digests(fake_root, "signals")
    monkeypatch.setattr(signals, "BATCH_SAMPLES", size)
    run_stage(MeasureImages(root=fake_root))
    assert digests(fake_root, "signals") == before


def test_an_unknown_word_list_and_a_folder_without_nouns_are_refused(fake_root, tmp_path):
    with pytest.raises(DeclipError, match=r"dictionary is 'eng', a language .*Did you mean 'en'"):
        MeasureImages(dictionary=("eng",))
    with pytest.raises(DeclipError, match=r"index.noun' cannot be read .*leave it unset"):
        run_stage(MeasureImages(root=fake_root, wordnet=str(tmp_path)))


@pytest.fixture
def two_sets(fake_root, store):
    """`basic` as measured, and a set `extra` with one column; gives the keys."""
    run_stage(MeasureImages(root=fake_root))
    keys = read_signals(store, "basic", "00000").column("key").to_pylist()
    table = pa.table({"key": keys, "clip_score": np.arange(len(keys), dtype=np.float32)})
    sidecars.write_table(store, layout.signals_path("extra", "00000"), table)
    return keys


def test_columns_of_several_sets_come_by_key_in_the_order_asked(two_sets, store):
    table = read_signal_columns(
        store, ["basic", "extra"], "00000", ["clip_score", "aspect", "clip_score"]
    )
    assert table.column_names == ["key", "clip_score", "aspect"]
    assert table.column("key").to_pylist() == two_sets
    assert table.column("clip_score").to_pylist() == list(range(len(two_sets)))
    whole = read_signals(store, "basic", "00000")
    assert table.column("aspect").equals(whole.column("aspect"))
    owners = signal_columns(store, ["basic", "extra"], "00000")
    assert owners == dict.fromkeys(SCHEMA.names[1:], "basic") | {"clip_score": "extra"}


@pytest.mark.parametrize(
    ("names", "column", "sentence"),
    [
        (["basic"], "caption_word", r"no signal 'caption_word'.*Did you mean 'caption_words'"),
        (["basic"], "clip_score", r"no signal 'clip_score' in 'basic'.*ScorePairs"),
        (["extra"], "aspect", r"no signal 'aspect' in 'extra'.*MeasureImages"),
        (["basic"], "duplicate_bytes_of", r"FindDuplicates makes it"),
        (["basic", "basik"], "aspect", r"signals 'basik' lack shard 00000.*Did you mean 'basic'"),
        ([], "aspect", r"no signals are named"),
    ],
)
def test_missing_columns_and_sets_are_named_with_the_remedy(
    two_sets, store, names, column, sentence
):
    with pytest.raises(DeclipError, match=sentence):
        read_signal_columns(store, names, "00000", [column])


def test_sets_that_share_a_column_or_are_of_other_samples_are_refused(two_sets, store):
    run_stage(MeasureImages(root=store.root, name="again"))
    with pytest.raises(DeclipError, match=r"'basic' and 'again' of shard 00000 both have a column"):
        signal_columns(store, ["basic", "again"], "00000")
    short = pa.table({"key": two_sets[1:], "other": [0] * (len(two_sets) - 1)})
    sidecars.write_table(store, layout.signals_path("short", "00000"), short)
    with pytest.raises(DeclipError, match=r"'basic' and 'short' of shard 00000 are of other sampl"):
        read_signal_columns(store, ["basic", "short"], "00000", ["aspect"])
    store.write_bytes(layout.signals_path("short", "00000"), b"no parquet")
    with pytest.raises(DeclipError, match=r"00000.parquet' is damaged .*rerun the stage"):
        signal_columns(store, ["short"], "00000")
