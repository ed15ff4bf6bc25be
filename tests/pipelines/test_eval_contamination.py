import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from declip_filter import EmbedPairs
from declip_shards import DeclipError, layout, read_samples, sidecars
from declip_shards.fakes import write_fake_dataset
from pipelines.eval_contamination import RUNGS, find_overlap, picture_marks, trained_rows

sys.path.append(str(Path(__file__).parents[1] / "filter"))

from duplicates_dataset import jpeg, patches, png, shrunk, write_pairs
from hashing_encoder import HashingEncoder
from stage_runs import HASHING, run_stage

ENCODER = HashingEncoder(64)
PHOTOS = patches(12)
TRAINED, CLEAN = PHOTOS[:8], PHOTOS[8:]
DISGUISES = {
    "same": lambda photo: jpeg(photo),
    "recompressed": lambda photo: jpeg(photo, 60),
    "resized": lambda photo: png(shrunk(photo, 0.5)),
    "enlarged": lambda photo: jpeg(shrunk(photo, 2.0)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("trained"))
    write_pairs(
        root,
        [[(jpeg(p), f"photo {n}", 99) for n, p in enumerate(TRAINED[i : i + 4])] for i in (0, 4)],
    )
    run_stage(
        EmbedPairs(root=root, selection="", name="pictures", images=True, texts=False, **HASHING)
    )
    return root


def search(root, files, **settings):
    return find_overlap(picture_marks(files, encoder=ENCODER), train_root=root, **settings)


@pytest.mark.parametrize("disguise", DISGUISES)
def test_pictures_put_into_training_are_found_and_clean_ones_are_not(root, disguise):
    files = [DISGUISES[disguise](photo) for photo in [*CLEAN, *TRAINED]]
    overlap = search(root, files)
    assert overlap.mask.tolist() == [False] * 4 + [True] * 8
    exact = overlap.by_rung["exact"]
    assert exact.sum() == (8 if disguise == "same" else 0)
    # The pair is the picture itself, not just any.
    keys = [f"test-{row}" for row in range(len(files))]
    rung = "exact" if disguise == "same" else "perceptual"
    assert overlap.pairs(keys) == [
        (f"test-{4 + row}", f"{row // 4:05d}{row % 4:04d}", rung) for row in range(8)
    ]


def test_a_file_as_it_came_is_found_though_it_is_stored_otherwise(tmp_path):
    # write_pairs says that files came with these bytes in front.
    photo = jpeg(PHOTOS[0])
    write_pairs(str(tmp_path), [[(photo, "x", 99)]])
    came = picture_marks([b"as it came" + photo, b"another" + photo])
    overlap = find_overlap(came, train_root=str(tmp_path))
    assert overlap.by_rung["exact"].tolist() == [True, False]


def test_order_and_parts_do_not_matter(root):
    files = [jpeg(photo, 70) for photo in (CLEAN[0], TRAINED[3], CLEAN[1], TRAINED[6])]
    whole = search(root, files)
    turned = search(root, files[::-1])
    np.testing.assert_array_equal(whole.mask, turned.mask[::-1])
    for rung, mask in whole.by_rung.items():
        alone = [bool(search(root, [file]).by_rung[rung][0]) for file in files]
        assert mask.tolist() == alone


def test_only_what_was_trained_on_counts(root, tmp_path):
    store = write_pairs(str(tmp_path), [[(jpeg(p), "x", 99) for p in TRAINED[:4]]])
    rows = [
        {"key": f"00000000{n}", "keep": n != 2, "reason": None, "repeats": None} for n in range(4)
    ]
    from declip_filter.rules import SCHEMA

    table = pa.Table.from_pylist([{n: row.get(n) for n in SCHEMA.names} for row in rows], SCHEMA)
    sidecars.write_table(store, layout.selection_path("three", "00000"), table)
    files = [jpeg(photo) for photo in TRAINED[:4]]
    marks = picture_marks(files)
    assert find_overlap(marks, train_root=store.root, selection="").mask.all()
    three = find_overlap(marks, train_root=store.root, selection="three")
    assert three.mask.tolist() == [True, True, False, True]
    assert three.record()["train"]["num_samples"] == 3


def test_near_vectors_are_found_by_the_exact_products(root):
    rng = np.random.default_rng(0)
    files = [jpeg(photo) for photo in PHOTOS]
    marks = picture_marks(files, encoder=ENCODER)
    trained = marks.vectors[:8].astype(np.float16).astype(np.float64)
    asked = marks.vectors + rng.normal(0, 0.02, marks.vectors.shape).astype(np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    asked[5] = 0  # one that could not be encoded
    for cosine in (0.5, 0.9, 0.97, 0.99, 1.0):
        overlap = find_overlap(
            marks,
            asked,
            train_root=root,
            embeddings="pictures",
            features_digest=ENCODER.digest,
            cosine=cosine,
        )
        lengths = np.linalg.norm(trained, axis=1)
        expected = (asked.astype(np.float64) @ (trained.T / lengths) >= cosine).any(axis=1)
        np.testing.assert_array_equal(overlap.by_rung["embedding"], expected)


def test_a_vector_is_near_itself(root):
    overlap = search(root, [jpeg(photo) for photo in TRAINED], embeddings="pictures", cosine=0.9999)
    assert overlap.by_rung["embedding"].all()
    assert overlap.first["embedding"].tolist() == list(range(8))
    assert overlap.checked["embedding"]["without_vector"] == 0


def test_what_cannot_be_checked_says_why(root, tmp_path):
    files = [jpeg(TRAINED[0])]
    unnamed = search(root, files)
    assert unnamed.unchecked == {"embedding": "no embeddings of the training data were named."}
    marks = picture_marks(files)
    none = find_overlap(marks, train_root=root, embeddings="pictures")
    sentence = "embeddings 'pictures' by 'hashing:64': no vectors of the evaluated pictures"
    assert sentence in none.unchecked["embedding"]
    vectors = ENCODER.encode_image(files)
    other = find_overlap(
        marks, vectors, train_root=root, embeddings="pictures", features_digest="another"
    )
    assert "pictures' vectors are by another encoder" in other.unchecked["embedding"]
    store = write_pairs(str(tmp_path), [[(files[0], "x", 99)]])
    store.remove(layout.signals_path("basic", "00000"))
    bare = find_overlap(marks, train_root=store.root)
    assert "no signals with hashes" in bare.unchecked["perceptual"]
    assert bare.checked["exact"]["by"] == ["downloaded files"]
    path = layout.shard_parquet_path("00000")
    sidecars.write_table(store, path, sidecars.read_table(store, path).drop_columns(["sha256"]))
    nothing = find_overlap(marks, train_root=store.root)
    assert set(nothing.unchecked) == set(RUNGS)
    assert "neither a column sha256 in its shards nor signals" in nothing.unchecked["exact"]
    assert not nothing.mask.any()


def test_an_encoder_that_tells_nothing_apart_is_no_witness(tmp_path):
    store = write_fake_dataset(str(tmp_path), num_shards=2, samples_per_shard=40)
    settings: dict[str, Any] = {"selection": "", "images": True, "texts": False, **HASHING}
    run_stage(EmbedPairs(root=store.root, name="colors", **settings))
    image = next(iter(read_samples(store, "00000"))).image
    marks = picture_marks([image], encoder=ENCODER)
    # Colored shapes on a light ground have mean colors that are all alike.
    overlap = find_overlap(marks, train_root=store.root, embeddings="colors")
    why = overlap.unchecked["embedding"]
    assert re.search(r"at a cosine of 0\.95 they take \d\d\.\d% of the pairs of training", why)
    assert "embedding" not in overlap.by_rung
    strict = find_overlap(marks, train_root=store.root, embeddings="colors", cosine=0.9999)
    assert strict.by_rung["embedding"].all()
    assert strict.checked["embedding"]["share_of_training_pairs"] <= 1e-3


def test_flat_pictures_are_compared_by_their_bytes_alone(tmp_path):
    white = Image.new("RGB", (160, 120), "white")
    write_pairs(str(tmp_path), [[(png(white), "x", 99)]])
    nearly = Image.new("RGB", (160, 120), (254, 254, 254))
    overlap = find_overlap(picture_marks([png(white), png(nearly)]), train_root=str(tmp_path))
    assert overlap.mask.tolist() == [True, False]
    assert overlap.checked["perceptual"]["says_too_little"] == 2


def test_unreadable_pictures_overlap_with_nothing(root):
    overlap = search(root, ["gone", jpeg(TRAINED[0]), b"broken"])
    assert overlap.mask.tolist() == [False, True, False]


def test_the_record_is_json_and_counts(root):
    files = [jpeg(TRAINED[0]), jpeg(TRAINED[1], 50), jpeg(CLEAN[0])]
    record = search(root, files, embeddings="pictures").record(["a", "b", "c"])
    assert json.loads(json.dumps(record)) == record
    assert record["num_overlap"] == 2
    assert record["by_rung"]["exact"] == 1
    assert record["by_rung"]["perceptual"] == 2
    assert set(record["checked"]) == set(RUNGS)
    assert record["train"]["digest"] == trained_rows(root).digest
    assert [pair["key"] for pair in record["first_pairs"]] == ["a", "b"]


def test_wrong_settings_are_refused(root):
    marks = picture_marks([jpeg(CLEAN[0])])
    with pytest.raises(DeclipError, match=r"cosine is 1\.5"):
        find_overlap(marks, train_root=root, cosine=1.5)
    with pytest.raises(DeclipError, match="2 vectors for the marks of 1 pictures"):
        find_overlap(marks, np.zeros((2, 64), np.float32), train_root=root)
    with pytest.raises(DeclipError, match="embeddings 'none' lack shard 00000"):
        find_overlap(marks, train_root=root, embeddings="none")
