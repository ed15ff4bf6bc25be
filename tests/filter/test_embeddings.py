import importlib
import io
import json
import multiprocessing

import numpy as np
import pytest
from hashing_encoder import HashingEncoder
from stage_runs import HASHING, digests, run_one, run_stage

from declip_filter import EmbedPairs, FilterPairs, MeasureImages
from declip_filter.embeddings import (
    embed_texts,
    part_path,
    partition_name,
    read_metadata,
    read_part,
    read_parts,
    read_vectors,
)
from declip_shards import DeclipError, layout, read_samples


def read_all(root: str, store, kind="text_emb", name="text"):
    shards = layout.list_shards(store)
    read = [read_vectors(store, name, kind, part) for part in read_parts(store, name, shards)]
    return np.concatenate([vectors for vectors, _ in read]), [k for _, keys in read for k in keys]


def test_every_row_is_a_selected_sample_of_the_tar_with_its_own_vector(selected_root, store):
    stats = run_stage(EmbedPairs(root=selected_root, images=True, **HASHING))
    encoder = HashingEncoder(64)
    for shard in layout.list_shards(store):
        part = read_part(store, "text", shard)
        samples = list(read_samples(store, shard))
        expected = samples if shard != "00002" else []
        texts, keys = read_vectors(store, "text", "text_emb", part)
        images, image_keys = read_vectors(store, "text", "img_emb", part)
        assert keys == image_keys == [sample.key for sample in expected]
        rows = read_metadata(store, "text", part)
        assert [row["image_path"] for row in rows] == [row["key"] for row in rows] == keys
        assert [row["caption"] for row in rows] == [sample.caption for sample in expected]
        assert {row["shard"] for row in rows} <= {shard}
        assert stats[shard].num_in == len(samples)
        if expected:
            for vectors, wanted in (
                (texts, encoder.encode_text([s.caption for s in samples])),
                (images, encoder.encode_image([s.image for s in samples])),
            ):
                assert vectors.dtype == np.float16
                np.testing.assert_array_equal(vectors, wanted.astype(np.float16))
    assert stats["00002"].reasons == {"not_selected": stats["00002"].num_in}


def test_batch_size_order_and_rerun_change_no_byte(selected_root, store):
    stage = EmbedPairs(root=selected_root, images=True, **HASHING)
    run_stage(stage)
    before = digests(selected_root, "embeddings")
    for path in before:
        store.remove(path)
    assert not any(stage.is_done(task) for task in stage.tasks())
    smaller = EmbedPairs(root=selected_root, images=True, batch_size=5, **HASHING)
    run_stage(smaller, list(reversed(stage.tasks())))
    assert digests(selected_root, "embeddings") == before


@pytest.mark.slow
def test_two_processes_write_what_one_writes(selected_root, store):
    stage = EmbedPairs(root=selected_root, **HASHING)
    run_stage(stage)
    before = digests(selected_root, "embeddings")
    for path in before:
        store.remove(path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(run_one, [(stage, task) for task in reversed(stage.tasks())])
    assert digests(selected_root, "embeddings") == before


def test_every_file_that_is_written_is_listed(selected_root):
    stats = run_stage(EmbedPairs(root=selected_root, images=True, **HASHING))
    listed = sorted(path for s in stats.values() for path in s.files)
    assert listed == sorted(digests(selected_root, "embeddings"))


def test_equal_captions_are_encoded_once_and_get_equal_vectors():
    encoder = HashingEncoder(32)
    texts = ["b", "a a", "b", "c", "a a"]
    vectors = embed_texts(encoder, texts, batch_size=2)
    assert encoder.num_texts == 3
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[1], vectors[4])
    np.testing.assert_array_equal(embed_texts(encoder, texts[::-1], 2)[::-1], vectors)
    assert embed_texts(encoder, [], 2).shape == (0, 32)


def test_partition_numbers_are_clip_retrievals():
    ten = [f"{n:05d}" for n in range(10)]
    assert [partition_name(s, ten) for s in ("00000", "00009")] == ["00", "09"]
    assert partition_name("00003", ten[:9]) == "3"
    assert partition_name("00000", ["00000"]) == "0"
    assert partition_name("00007", ["00007", "00123"]) == "007"


def test_an_empty_selection_name_takes_every_success(selected_root, store):
    run_stage(EmbedPairs(root=selected_root, selection="", **HASHING))
    _, keys = read_all(selected_root, store)
    assert keys == [
        s.key for shard in layout.list_shards(store) for s in read_samples(store, shard)
    ]


def test_empty_selection_is_refused_before_the_encoder_is_loaded(fake_root):
    run_stage(MeasureImages(root=fake_root))
    run_stage(FilterPairs(root=fake_root, min_words=100))
    stage = EmbedPairs(root=fake_root, encoder="x:y", encoder_factory="no_such_module:f")
    with pytest.raises(DeclipError, match=r"selection 'default' has 0 samples kept"):
        stage.worker()


def test_selection_of_other_samples_is_refused(selected_root, store):
    one, other = (layout.selection_path("default", shard) for shard in ("00000", "00001"))
    store.write_bytes(one, store.read_bytes(other))
    with pytest.raises(
        DeclipError, match=r"shard 00000 keeps samples that the shard does not hold"
    ):
        run_stage(EmbedPairs(root=selected_root, **HASHING))


def test_vectors_that_are_not_finite_are_refused_by_key(selected_root, store):
    bad = next(s.key for s in read_samples(store, "00000") if "purple" in s.caption)
    stage = EmbedPairs(
        root=selected_root, encoder="hashing:64", encoder_factory="hashing_encoder:make_broken"
    )
    with pytest.raises(DeclipError, match=rf"vector of sample '{bad}' is not finite"):
        run_stage(stage)


def test_pictures_from_a_text_encoder_are_refused(selected_root):
    with pytest.raises(DeclipError, match=r"reads text only; set images to false"):
        EmbedPairs(images=True)
    factory = "hashing_encoder:make_text_only"
    stage = EmbedPairs(root=selected_root, encoder="h:8", encoder_factory=factory, images=True)
    with pytest.raises(DeclipError, match=r"does not embed images; set images to false"):
        stage.worker()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"texts": False}, r"texts and images are both false"),
        ({"batch_size": 0}, r"batch_size is 0; it must be at least 1"),
        ({"encoder": "sentense:x"}, r"Did you mean 'sentence'"),
        ({"selection": "../x"}, r"selection is '../x'; it must be one folder name"),
    ],
)
def test_wrong_settings_are_refused(settings, sentence):
    with pytest.raises(DeclipError, match=sentence):
        EmbedPairs(**settings)


def test_gpu_is_asked_for_by_the_device_alone():
    assert EmbedPairs().num_gpus == 0
    assert EmbedPairs(device="cuda:1").num_gpus == 1


def test_mixed_encoders_stray_shards_and_missing_parts_are_refused(embedded_root, store):
    shards = layout.list_shards(store)
    other = EmbedPairs(
        root=embedded_root, encoder="hashing:64", encoder_factory="hashing_encoder:make_salted"
    )
    run_stage(other, ["00001"])
    with pytest.raises(DeclipError, match=r"mix encoders: shard 00000 .*shard 00001"):
        read_parts(store, "text", shards)
    run_stage(EmbedPairs(root=embedded_root, **HASHING), ["00001"])
    with pytest.raises(DeclipError, match=r"of another dataset: they have shard 00002"):
        read_parts(store, "text", shards[:2])
    with pytest.raises(DeclipError, match=r"lack shard 00003.*rerun the stage that embeds"):
        read_parts(store, "text", [*shards, "00003"])


def test_damaged_files_are_refused(embedded_root, store):
    part = read_part(store, "text", "00000")
    path = layout.embedding_path("text", "text_emb", part.partition)
    whole = store.read_bytes(path)
    store.write_bytes(path, whole[:-50])
    with pytest.raises(DeclipError, match=r"text_emb_0.npy' is damaged"):
        read_vectors(store, "text", "text_emb", part)
    array = np.load(io.BytesIO(whole))
    for broken, sentence in ((array[:, :32], r"where \(\d+, 64\) is due"), (array * 2, "length 2")):
        sink = io.BytesIO()
        np.save(sink, broken)
        store.write_bytes(path, sink.getvalue())
        with pytest.raises(DeclipError, match=sentence):
            read_vectors(store, "text", "text_emb", part)
    store.remove(path)
    with pytest.raises(DeclipError, match=r"text_emb_0.npy' is missing"):
        read_vectors(store, "text", "text_emb", part)
    with pytest.raises(DeclipError, match=r"hold text_emb, not 'img_emb'"):
        read_vectors(store, "text", "img_emb", part)


def test_torn_and_newer_parts_are_refused(embedded_root, store):
    path = part_path("text", "00000")
    value = json.loads(store.read_bytes(path))
    store.write_bytes(path, json.dumps(value | {"format_version": 99}).encode())
    with pytest.raises(DeclipError, match=r"of format 99.*upgrade opendeclip"):
        read_part(store, "text", "00000")
    store.write_bytes(path, b'{"shard": ')
    with pytest.raises(DeclipError, match=r"is damaged .*rerun the stage that embeds"):
        read_part(store, "text", "00000")


def test_embedding_reader_of_clip_retrieval_joins_our_rows(selected_root, store):
    """A shard without a selected pair lies first: it must not shift the rows of the others."""
    reader = importlib.import_module("embedding_reader")
    run_stage(
        FilterPairs(root=selected_root, name="later", split_column="split", keep_splits=("test",))
    )
    stage = EmbedPairs(root=selected_root, selection="later", images=True, **HASHING)
    run_stage(stage)
    vectors, keys = read_all(selected_root, store)
    assert keys
    assert keys[0].startswith("00002")
    for kind in ("text_emb", "img_emb"):
        expected, _ = read_all(selected_root, store, kind)
        read = reader.EmbeddingReader(
            embeddings_folder=f"{selected_root}/embeddings/text/{kind}",
            metadata_folder=f"{selected_root}/embeddings/text/metadata",
            file_format="parquet_npy",
            meta_columns=["image_path", "caption"],
        )
        assert (read.count, read.dimension) == vectors.shape
        batches = list(read(batch_size=7, show_progress=False))
        np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), expected)
        assert [key for b in batches for key in b[1]["image_path"]] == keys
