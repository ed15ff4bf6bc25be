"""Examples: what is kept agrees with outcomes and set, and is the same bytes each time."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from result_files import NAMES, answers, jpeg, picture_set

from declip_eval.labelled_sets import LabelledSet, open_labelled_set, write_webdataset
from declip_eval.score_outcomes import (
    classification_outcomes,
    multilabel_outcomes,
    retrieval_outcomes,
)
from declip_shards import DeclipError
from pipelines.eval_examples import (
    MAX_EXAMPLES,
    PICTURE_SIDE,
    examples_path,
    read_examples,
    save_examples,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> LabelledSet:
    found: LabelledSet = picture_set(tmp_path_factory.mktemp("set"), 60, broken=[7])
    return found


def test_roles_texts_and_answers_are_those_of_the_outcomes(
    tmp_path: Path, pictures: LabelledSet
) -> None:
    right = list(range(0, 60, 3))
    keys, labels, scores = answers(60, right)
    outcomes = classification_outcomes(keys, scores, labels)
    path = save_examples(tmp_path / "r.json", pictures, outcomes, NAMES, most=60, seed=1)
    assert path == tmp_path / "r.examples.parquet" == examples_path(path)
    examples = read_examples(tmp_path / "r.json")
    assert {example.key for example in examples} == set(keys)
    for example in examples:
        row = keys.index(example.key)
        assert example.text == NAMES[labels[row]]
        assert example.role == ("right" if row in right else "error")
        assert example.found == tuple(NAMES[i] for i in np.argsort(-scores[row]))
        assert example.found_right == tuple(name == example.text for name in example.found)
        assert example.scores == pytest.approx(np.sort(scores[row])[::-1])
        if row == 7:
            assert example.image is None
            assert example.note
        else:
            assert example.image is not None
            assert max(Image.open(io.BytesIO(example.image)).size) == PICTURE_SIDE


def test_wrong_and_right_are_half_each_where_there_are_as_many(
    tmp_path: Path, pictures: LabelledSet
) -> None:
    for right, most, expected in ((30, 20, 10), (2, 20, 18), (58, 20, 2), (60, 20, 0), (0, 5, 5)):
        keys, labels, scores = answers(60, range(right))
        outcomes = classification_outcomes(keys, scores, labels)
        save_examples(tmp_path / "r.json", pictures, outcomes, NAMES, most=most)
        roles = [example.role for example in read_examples(tmp_path / "r.json")]
        assert roles == ["error"] * expected + ["right"] * (most - expected)


def test_equal_calls_give_equal_bytes_and_the_seed_draws_others(
    tmp_path: Path, pictures: LabelledSet
) -> None:
    keys, labels, scores = answers(60, range(20))
    outcomes = classification_outcomes(keys, scores, labels)
    files = [
        save_examples(tmp_path / name, pictures, outcomes, NAMES, most=8, seed=seed).read_bytes()
        for name, seed in (("a.json", 0), ("b.json", 0), ("c.json", 1))
    ]
    assert files[0] == files[1] != files[2]
    assert not list(tmp_path.glob(".*"))


def test_other_classes_may_count_as_right(tmp_path: Path, pictures: LabelledSet) -> None:
    keys, labels, scores = answers(60, range(60))
    candidates = [(0, 1), (2,), (3,), (4,), (0,)]
    outcomes = classification_outcomes(keys, scores, labels, candidates=candidates)
    save_examples(tmp_path / "r.json", pictures, outcomes, NAMES, most=60, candidates=candidates)
    for example in read_examples(tmp_path / "r.json"):
        own = [NAMES[i] for i in candidates[labels[keys.index(example.key)]]]
        assert example.text == ", ".join(own)
        assert example.found_right == tuple(name in own for name in example.found)
        assert (example.role == "right") == (example.found[0] in own)


def test_a_multilabel_answer_is_right_where_no_wrong_class_is_above(tmp_path: Path) -> None:
    folder = tmp_path / "voc"
    labels = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    scores = np.array([[0.1, 0.2, 0.9], [0.5, 0.4, 0.1], [0.3, 0.3, 0.1], [0.1, 0.2, 0.3]])
    items = [(f"k{i}", jpeg(i), row.astype(int)) for i, row in enumerate(labels)]
    names = ["cat", "dog", "cow"]
    write_webdataset(folder, items, class_names=names, templates=["a {}"], kind="multilabel")
    data = open_labelled_set(str(folder), "voc")
    outcomes = multilabel_outcomes(data.keys, scores, labels)
    save_examples(tmp_path / "r.json", data, outcomes, names, most=9)
    found = {example.key: example for example in read_examples(tmp_path / "r.json")}
    roles = [found[f"k{i}"].role for i in range(4)]
    assert roles == ["right", "error", "error", "error"]
    texts = [found[f"k{i}"].text for i in range(4)]
    assert texts == ["cat, cow", "dog", "cat", "none of the classes"]
    assert found["k0"].found == ("cow", "dog", "cat")


def test_retrieval_shows_both_directions_and_equal_captions_are_all_right(tmp_path: Path) -> None:
    captions = [("a cat", "one cat"), ("a dog",), ("a cat",)]
    write_webdataset(
        tmp_path / "pairs",
        [(f"k{i}", jpeg(i), list(own)) for i, own in enumerate(captions)],
        kind="retrieval",
    )
    data = open_labelled_set(str(tmp_path / "pairs"), "pairs")
    text_keys = ["k0#0", "k0#1", "k1#0", "k2#0"]
    images = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0.9], [1, 0, 0], [0, 1, 0], [0.9, 0, 1]], np.float32)
    outcomes = retrieval_outcomes(data.keys, text_keys, images, texts, [[0, 1, 3], [2], [0, 3]])
    save_examples(tmp_path / "r.json", data, outcomes, None, most=50)
    found = read_examples(tmp_path / "r.json")
    asked = {example.key: example for example in found if example.text}
    assert sorted(asked) == text_keys
    assert asked["k0#0"].text == "a cat"
    assert asked["k0#0"].image is None
    assert asked["k0#0"].found[:2] == ("k0", "k2")
    assert asked["k0#0"].found_right[:2] == (True, True)
    assert asked["k0#1"].found_right == (True, False, False)
    assert all(picture is not None for picture in asked["k1#0"].found_images)
    shown = {example.key: example for example in found if not example.text}
    assert sorted(shown) == data.keys
    assert shown["k1"].found[0] == "a dog"
    assert shown["k1"].image is not None
    assert shown["k1"].found_images == ()
    assert [role.role for role in found] == ["retrieval"] * 7


def test_a_transparent_picture_stands_on_white(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(file, "PNG")
    write_webdataset(tmp_path / "s", [("k", file.getvalue(), 0)], class_names=["a", "b"])
    data = open_labelled_set(str(tmp_path / "s"), "s")
    outcomes = classification_outcomes(["k"], np.array([[1.0, 0.0]]), np.array([0]))
    save_examples(tmp_path / "r.json", data, outcomes, ["a", "b"])
    (example,) = read_examples(tmp_path / "r.json")
    assert example.image is not None
    pixels = np.asarray(Image.open(io.BytesIO(example.image)))
    assert pixels.shape == (40, 40, 3)
    assert pixels.min() >= 250


def test_none_are_kept_where_none_are_wanted(tmp_path: Path, pictures: LabelledSet) -> None:
    keys, labels, scores = answers(60, ())
    outcomes = classification_outcomes(keys, scores, labels)
    save_examples(tmp_path / "r.json", pictures, outcomes, NAMES, most=0)
    assert read_examples(tmp_path / "r.json") == [] == read_examples(tmp_path / "none.json")


def test_faults_are_told(tmp_path: Path, pictures: LabelledSet) -> None:
    keys, labels, scores = answers(60, ())
    outcomes = classification_outcomes(keys, scores, labels)
    path = tmp_path / "r.json"
    with pytest.raises(DeclipError, match=f"most is {MAX_EXAMPLES + 1}; it must lie between 0"):
        save_examples(path, pictures, outcomes, NAMES, most=MAX_EXAMPLES + 1)
    with pytest.raises(DeclipError, match="seed is -1; it must be 0 or more"):
        save_examples(path, pictures, outcomes, NAMES, seed=-1)
    others = classification_outcomes([f"x{key}" for key in keys], scores, labels)
    with pytest.raises(DeclipError, match="of the outcomes is no sample of the set, which has 60"):
        save_examples(path, pictures, others, NAMES)
    examples_path(path).write_bytes(b"PAR1 torn")
    with pytest.raises(DeclipError, match="holds no examples of a result"):
        read_examples(path)
