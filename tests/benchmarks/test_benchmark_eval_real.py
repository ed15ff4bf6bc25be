"""The end-to-end benchmark's own parts: its data, its statistics, its options."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from declip_eval.results import EvalResult, Provenance
from declip_filter.signals import read_successes
from declip_shards import DeclipError, Store, layout, read_samples
from eval_real import files_of, over_draws, parse
from eval_real_data import KINDS, class_pairs, jpeg, plant, write_pairs
from eval_sets import write_set
from pipelines.eval_contamination import find_overlap, picture_marks


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets")
    return {s: write_set(out, "digits", s, cache=out, seed=0) for s in ("train", "test")}


def test_captions_are_of_the_picture_and_not_of_its_place(sets):
    pairs = list(class_pairs(sets["train"], [3, 9, 4]))
    assert [next(class_pairs(sets["train"], [row])) for row in (3, 9, 4)] == pairs
    labels = sets["train"].labels
    assert [f'"{labels[row]}"' in text for (_, text), row in zip(pairs, (3, 9, 4), strict=True)]


def test_shards_hold_the_pairs_and_the_digests_of_their_files(tmp_path, sets):
    pairs = list(class_pairs(sets["train"], range(5)))
    pairs.append((jpeg(Image.new("RGB", (9, 7), "teal"), 90), "a teal card"))
    assert write_pairs(tmp_path, iter(pairs), "both", 3) == 4
    store = Store(str(tmp_path))
    assert layout.list_shards(store) == ["00003"]
    samples = list(read_samples(store, "00003"))
    assert [sample.caption for sample in samples] == [text for _, text in pairs]
    rows = read_successes(store, "00003", ["key", "sha256", "width", "height"])
    assert [r["sha256"] for r in rows] == [hashlib.sha256(file).hexdigest() for file, _ in pairs]
    assert [(r["width"], r["height"]) for r in rows] == [(8, 8)] * 5 + [(9, 7)]
    assert samples[5].image == pairs[5][0]  # a JPEG is stored as it came
    assert Image.open(io.BytesIO(samples[0].image)).format == "JPEG"


def test_planted_files_are_found(tmp_path, sets):
    planted = plant(tmp_path / "data", sets["test"], sets["train"], 4)
    assert sorted(planted.values()) == sorted(KINDS * 4)
    same = [row for row, kind in planted.items() if kind == KINDS[0]]
    marks = picture_marks(sets["test"].read_images(same))
    assert find_overlap(marks, train_root=str(tmp_path / "data")).by_rung["exact"].all()


def result(value):
    known = Provenance(num_samples=400, num_classes=10, chance={"acc1": 0.1})
    return EvalResult(
        dataset="digits",
        model="m",
        pretrained="p",
        task="zeroshot_classification",
        language="en",
        metrics={"acc1": value},
        provenance=known,
    )


def test_draws_around_chance_hold_it_and_learned_ones_do_not():
    values = 0.1 + 0.03 * np.random.default_rng(0).normal(size=8)
    row = over_draws([[result(value)] for value in values])[0]
    assert row["holds_chance"]
    low, high = row["interval"]
    assert low < row["mean"] < high
    assert row["mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert not over_draws([[result(value + 0.1)] for value in values])[0]["holds_chance"]


def test_files_are_told_by_name_and_content(tmp_path):
    for name, content in (("a/x", b"1"), ("b/x", b"1"), ("c/x", b"2")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    one, same, other = (files_of(tmp_path / name) for name in "abc")
    assert one == same != other
    assert list(one) == ["x"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--images", "9"], "--images is 9; it must lie between 256 and 50000"),
        (["--draws", "1"], "--draws is 1; it must lie between 2 and 50"),
        ([], "is no dataset with an ingest manifest"),
    ],
)
def test_wrong_options_are_refused(tmp_path, words, sentence):
    with pytest.raises(DeclipError, match=sentence):
        parse(["--out", "out", "--pairs", str(tmp_path), *words])
