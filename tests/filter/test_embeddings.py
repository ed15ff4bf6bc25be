import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from hashing_encoder import HashingEncoder
from stage_runs import HASHING, digests, run_one, run_stage

from declip_filter import EmbedPairs, FilterPairs, MeasureImages
from declip_filter.embeddings import (
    read_metadata,
    read_part,
    read_parts,
    read_vectors,
    times_path,
)
from declip_shards import DeclipError, layout, read_samples
from declip_shards.manifest import fingerprint
from declip_shards.writer import pack_tar


def read_all(root: str, store, kind="text_emb", name="text"):
    shards = layout.list_shards(store)
    read = [read_vectors(store, name, kind, part) for part in read_parts(store, name, shards)]
    return np.concatenate([vectors for vectors, _ in read]), [k for _, keys in read for k in keys]


def hashed_files(root):
    """What must be the same on every run: all but the times."""
    folder = "embeddings/text/"
    return {p: d for p, d in digests(root, folder).items() if "/times/" not in p}


PREPARED = HASHING | {"encoder_factory": "hashing_encoder:make_prepared"}


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


@pytest.mark.parametrize("encoder", [HASHING, PREPARED], ids=["plain", "prepared"])
def test_batches_threads_order_and_rerun_change_no_byte(selected_root, store, encoder):
    stage = EmbedPairs(root=selected_root, images=True, **encoder)
    run_stage(stage)
    before = hashed_files(selected_root)
    for path in before:
        store.remove(path)
    assert not any(stage.is_done(task) for task in stage.tasks())
    other = EmbedPairs(
        root=selected_root,
        images=True,
        batch_size=5,
        batch_tokens=9,
        decode_threads=3,
        **encoder,
    )
    run_stage(other, list(reversed(stage.tasks())))
    assert hashed_files(selected_root) == before


def test_an_encoder_that_prepares_gives_what_it_gives_at_once(selected_root, store):
    for name, encoder in (("plain", HASHING), ("prepared", PREPARED)):
        stage = EmbedPairs(root=selected_root, name=name, texts=False, images=True, **encoder)
        run_stage(stage)
    plain, prepared = (read_all(selected_root, store, "img_emb", n) for n in ("plain", "prepared"))
    assert plain[1] == prepared[1]
    np.testing.assert_array_equal(plain[0], prepared[0])


def test_threads_change_no_fingerprint_and_count_as_cores():
    stages = [EmbedPairs(**HASHING), EmbedPairs(decode_threads=6, **HASHING)]
    assert len({fingerprint(stage, "1", {}) for stage in stages}) == 1
    assert [stage.num_cpus for stage in stages] == [1, 6]
    assert EmbedPairs(device="cuda", **HASHING).num_cpus == 4
    assert fingerprint(EmbedPairs(batch_tokens=99, **HASHING), "1", {}) != fingerprint(
        stages[0], "1", {}
    )


def test_each_task_says_how_long_the_encoder_waited(selected_root, store, capfd):
    stats = run_stage(EmbedPairs(root=selected_root, **PREPARED))
    lines = capfd.readouterr().err.splitlines()
    for shard in ("00000", "00001"):
        figures = json.loads(store.read_bytes(times_path("text", shard)))
        assert figures["rows"] == stats[shard].num_out
        assert 0 <= figures["waiting_share"] <= 1
        assert figures["encoding_seconds"] <= figures["seconds"]
        # The captions have six words, and this encoder reads four.
        assert figures["texts_cut"] == figures["rows"] > 0
        (line,) = [line for line in lines if line.startswith(f"  embed text {shard}: ")]
        assert f"{figures['rows']} rows in" in line
        assert f"the encoder waited {figures['waiting_share']:.0%} of the time" in line
        assert line.endswith(f"{figures['texts_cut']} texts cut")
    assert not any("00002" in line for line in lines)  # it has no selected pair


@pytest.mark.slow
def test_two_processes_write_what_one_writes(selected_root, store):
    stage = EmbedPairs(root=selected_root, **HASHING)
    run_stage(stage)
    before = hashed_files(selected_root)
    for path in before:
        store.remove(path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(run_one, [(stage, task) for task in reversed(stage.tasks())])
    assert hashed_files(selected_root) == before


def test_every_file_that_is_written_is_listed(selected_root):
    stats = run_stage(EmbedPairs(root=selected_root, images=True, **HASHING))
    listed = sorted(path for s in stats.values() for path in (*s.files, *s.volatile_files))
    assert listed == sorted(digests(selected_root, "embeddings"))
    assert {path for s in stats.values() for path in s.files} == set(hashed_files(selected_root))


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


def broken(factory, **settings):
    return EmbedPairs(
        encoder="hashing:64", encoder_factory=f"hashing_encoder:{factory}", **settings
    )


@pytest.mark.parametrize("images", [False, True])
def test_samples_without_a_usable_vector_are_dropped_and_counted(selected_root, store, images):
    """The encoder gives NaN for purple, zeros for orange; the pictures are all good."""
    stats = run_stage(broken("make_broken", root=selected_root, images=images))
    run_stage(EmbedPairs(root=selected_root, name="whole", images=images, **HASHING))
    for shard in ("00000", "00001"):
        samples = list(read_samples(store, shard))
        bad = {s.key for s in samples if "purple" in s.caption or "orange" in s.caption}
        assert bad
        assert stats[shard].reasons == {"embedding_not_finite": len(bad)}
        part, whole = (read_part(store, name, shard) for name in ("text", "whole"))
        assert part.num_not_finite == len(bad)
        assert part.num_rows == whole.num_rows - len(bad)
        for kind in part.kinds:
            vectors, keys = read_vectors(store, "text", kind, part)
            expected, all_keys = read_vectors(store, "whole", kind, whole)
            assert keys == [key for key in all_keys if key not in bad]
            stays = [key not in bad for key in all_keys]
            np.testing.assert_array_equal(vectors, expected[stays])


def test_an_encoder_that_gives_no_usable_vector_is_refused(selected_root):
    stage = broken("make_all_broken", root=selected_root, images=True)
    with pytest.raises(
        DeclipError, match=r"shard 00000: encoder 'hashing:64' gave no finite vector .* of \d+ samp"
    ):
        run_stage(stage)
    assert not stage.is_done("00000")


def test_pictures_that_are_damaged_or_missing_are_refused_by_shard_and_key(selected_root, store):
    samples = list(read_samples(store, "00001"))
    stage = EmbedPairs(root=selected_root, images=True, **PREPARED)
    run_stage(stage, ["00000"])
    store.write_bytes(layout.tar_path("00001"), pack_tar(samples[1:]))
    with pytest.raises(
        DeclipError, match=rf"shard 00001: the tar lacks the picture of sample '{samples[0].key}'"
    ):
        run_stage(stage, ["00001"])
    cut = replace(samples[0], image=samples[0].image[:50])
    store.write_bytes(layout.tar_path("00001"), pack_tar([cut, *samples[1:]]))
    with pytest.raises(
        DeclipError, match=rf"shard 00001: the picture of sample '{cut.key}' cannot be read"
    ):
        run_stage(stage, ["00001"])
    assert not stage.is_done("00001")
    assert stage.is_done("00000")


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
        ({"batch_tokens": 0}, r"batch_tokens is 0; it must be at least 1"),
        ({"decode_threads": 0}, r"decode_threads is 0; it must be at least 1"),
        ({"device": "gpu"}, r"device is 'gpu'; it must be 'cpu', 'cuda' or 'cuda:N'"),
        ({"precision": "float16"}, r"precision is 'float16' on device 'cpu'"),
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


def test_other_weights_at_the_same_place_are_another_run(tmp_path):
    file = tmp_path / "w.pt"
    file.write_bytes(b"1")
    named = f"open_clip:ViT-B-32/{file}"
    first = EmbedPairs(encoder=named).weights_sha256
    assert first == EmbedPairs(encoder=named).weights_sha256 != ""
    file.write_bytes(b"22")
    assert EmbedPairs(encoder=named).weights_sha256 != first
