"""Features in chunks."""

import dataclasses
import errno
import os

import numpy as np
import pytest
from tiny_sets import COLORS, TEMPLATES, ColorModel, write_colors, write_pairs

from declip_eval.labelled_sets import open_labelled_set
from declip_shards import DeclipError
from pipelines import eval_features
from pipelines.eval_features import FeatureWork, join
from pipelines.eval_ranks import Ranks

NAMES = tuple((name,) for name in COLORS)


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_colors(root / "colors", num_test=21, num_train=4, broken=2)
    return open_labelled_set(str(root), "colors")


def work(root, model=None, ranks=None, **changes):
    base = FeatureWork(
        model=model or ColorModel(),
        root=root,
        batch_size=4,
        chunk_images=5,
        device="cpu",
        ranks=ranks or Ranks(),
    )
    return dataclasses.replace(base, **changes)


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.npz")}


def test_features_are_the_models_and_unreadable_rows_are_zero_and_told(colors, tmp_path):
    taken = work(tmp_path).features(colors, "features", 1, "test")
    model = ColorModel()
    direct = model.encode(model.prepare(colors.read_images(range(len(colors))))[0]).features
    direct[:2] = 0
    np.testing.assert_array_equal(taken.arrays["features"], direct)
    assert list(taken.unreadable) == [0, 1]
    assert "no picture" in taken.unreadable[0]


def test_both_kinds_of_features_come_from_one_pass(colors, tmp_path):
    model = ColorModel()
    one = work(tmp_path, model)
    one.features(colors, "features", 1, "test")
    probe = one.features(colors, "probe", 2, "test")
    assert model.num_encoded == len(colors)
    assert probe.arrays["probe"].shape == (len(colors), 3)


def test_what_is_there_is_not_computed_again_and_a_rerun_gives_the_same_bytes(colors, tmp_path):
    work(tmp_path).features(colors, "features", 1, "test")
    before = contents(tmp_path)
    assert len(before) == 5
    paths = sorted(tmp_path.rglob("*.npz"))
    paths[1].unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:-40])
    model = ColorModel()
    taken = work(tmp_path, model).features(colors, "features", 1, "test")
    assert model.num_encoded == 10, "one missing and one damaged chunk of 5"
    assert contents(tmp_path) == before
    assert len(taken.arrays["features"]) == 21


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_the_same_chunks_as_one_process(colors, tmp_path, size):
    work(tmp_path / "one").features(colors, "features", 1, "test")
    shared = tmp_path / "many"
    counts = []
    for rank in reversed(range(size)):
        ranks = Ranks(rank=rank, size=size, folder=tmp_path / "signs")
        model = ColorModel()
        with ranks.beating():
            taken = work(shared, model, ranks).features(colors, "features", 1, "test")
        counts.append(model.num_encoded)
        assert (taken is None) == (rank > 0)
    assert contents(shared) == contents(tmp_path / "one")
    assert sum(counts) == len(colors)
    assert all(counts)


def test_rank_0_takes_what_a_dead_rank_has_left(colors, tmp_path):
    ranks = Ranks(rank=0, size=3, folder=tmp_path / "signs", is_alive=lambda rank: False)
    taken = work(tmp_path, ranks=ranks).features(colors, "features", 1, "test")
    assert len(taken.arrays["features"]) == len(colors)


def test_everything_that_a_feature_follows_from_is_in_the_key(colors, tmp_path):
    work(tmp_path).features(colors, "features", 1, "test")
    other = ColorModel()
    other.digest = "e" * 64
    work(tmp_path, other).features(colors, "features", 1, "test")
    work(tmp_path, batch_size=3).features(colors, "features", 1, "test")
    work(tmp_path, chunk_images=7).features(colors, "features", 1, "test")
    assert len({path.parent for path in tmp_path.rglob("*.npz")}) == 4


def test_scores_of_both_directions_are_joined_along_their_pictures(tmp_path):
    write_pairs(tmp_path / "pairs", num=11)
    data = open_labelled_set(str(tmp_path), "pairs")
    texts = [text for some in data.captions or () for text in some]
    model = ColorModel("token-wise")
    taken = work(tmp_path / "f", model).text_scores(data, texts, 1, "test")
    assert taken.arrays["to_text"].shape == (11, 22)
    np.testing.assert_array_equal(taken.arrays["to_image_t"], taken.arrays["to_text"].T)
    classes = work(tmp_path / "f", model).class_scores(data, NAMES, TEMPLATES, 2, "test")
    assert classes.arrays["scores"].shape == (11, 4)


def test_a_diverged_model_is_refused(colors, tmp_path):
    model = ColorModel()

    def encode(prepared):
        found = ColorModel.encode(model, prepared)
        found.features[-1] = np.nan
        return found

    model.encode = encode
    with pytest.raises(DeclipError, match="not finite, in the batch from picture 't0000'"):
        work(tmp_path, model).features(colors, "features", 1, "test")


def test_a_full_disk_is_told_with_its_place(colors, tmp_path, monkeypatch):
    def full(path, data):
        if path.suffix == ".npz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(eval_features, "atomic_write", full)
    with pytest.raises(DeclipError, match=r"bytes cannot be written to .*No space left on device"):
        work(tmp_path).features(colors, "features", 1, "test")


def test_joining_keeps_the_order_of_chunks():
    chunks = [
        {
            "a": np.full((2, 3), number),
            "b_t": np.full((3, 2), number),
            "bad_rows": np.array([2 * number]),
            "bad_reasons": np.array(["why"]),
        }
        for number in range(3)
    ]
    taken = join(chunks)
    assert taken.arrays["a"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert taken.arrays["b_t"][0].tolist() == [0, 0, 1, 1, 2, 2]
    assert taken.unreadable == {0: "why", 2: "why", 4: "why"}


class Flaky:
    """A set one picture of which cannot be fetched at first."""

    def __init__(self, whole):
        self.whole, self.is_down = whole, True

    def __len__(self):
        return len(self.whole)

    keys = property(lambda self: self.whole.keys)

    def digest(self):
        return self.whole.digest()

    def read_images(self, indices):
        found = self.whole.read_images(indices)
        return ["timed out" if self.is_down and i == 7 else f for i, f in zip(indices, found)]


def test_a_picture_that_could_not_be_fetched_is_tried_again_by_the_next_run(colors, tmp_path):
    flaky = Flaky(colors)
    first = work(tmp_path).features(flaky, "features", 1, "test")
    assert first.unreadable[7] == "timed out"
    flaky.is_down = False
    again = work(tmp_path).features(flaky, "features", 1, "test")
    assert list(again.unreadable) == [0, 1]
    assert not first.arrays["features"][7].any()
    assert again.arrays["features"][7].any()
