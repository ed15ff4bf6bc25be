"""What is refused before a number is reported."""

import dataclasses
import warnings

import numpy as np
import pytest

from declip_eval.dataset_table import DatasetInfo
from declip_eval.labelled_sets import DatasetError, LabelledSet, check_against

NAMES = (("cat", "kitten"), ("dog",), ("owl",), ("t-shirt",))
INFO = DatasetInfo(
    name="toy",
    title="Toy Set",
    kind="classification",
    num_classes=4,
    num_train=100,
    num_val=20,
    num_test=8,
    also_num_test=(12,),
    metric="acc1",
    class_names=NAMES,
    templates=("a {}.",),
    test_split="test",
    how_to_get="Ask.",
    license="CC0",
)


class NoPlaces:
    def read(self, indices):
        return ["nothing" for _ in indices]

    def add_to(self, digest):
        pass

    def files(self):
        return []


def labelled(labels=(0, 1, 2, 3, 0, 1, 2, 3), **changes):
    labels = np.asarray(labels)
    fields = {
        "name": "toy",
        "split": "test",
        "role": "test",
        "kind": "classification",
        "keys": [f"k{row}" for row in range(len(labels))],
        "labels": labels,
        "captions": None,
        "class_names": NAMES,
        "label_names": NAMES,
        "names_source": "set",
        "templates": (),
        "layout": "webdataset",
        "places": NoPlaces(),
    }
    return LabelledSet(**{**fields, **changes})


def test_empty_classes_are_counted():
    with pytest.raises(DatasetError, match=r"no picture of class 3 \(t-shirt\): fetch .* leave it"):
        check_against(None, labelled((0, 1, 2, 0, 1, 2)))
    with pytest.raises(DatasetError, match=r"class 0 \(cat\), and of 2 classes in all: fetch"):
        check_against(None, labelled((1, 1, 2, 1, 1, 2)))


def names(*given):
    return {"label_names": tuple((name,) for name in given)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"labels": [0, 1, 2, 3] * 3},
        names("The Kitten", "dog", "OWL", "T_Shirt"),
        names("cat (small)", "dog, hound", "bird", "shirt"),
        {"label_names": None},
        {"role": "val", "split": "val", "labels": [0, 1, 2, 3] * 5},
    ],
)
def test_a_good_set_passes_without_a_word(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_against(INFO, labelled(**changes))
        check_against(None, labelled(**changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labels": []}, r"toy \(test\) holds no picture"),
        ({"keys": ["a", "b", "c", "d", "e", "f", "g", "b"]}, "has the key 'b' 2 times"),
        ({"labels": [0, 1, 2, 3, 0, 1, 2]}, "holds 7 pictures, but Toy Set has 8 or 12 in this"),
        ({"split": "val", "labels": [0, 1, 2, 3]}, "holds 4 pictures, but Toy Set has 8 or 12"),
        (names("cat", "dog", "owl"), "has 3 classes, but Toy Set has 4: give the right folder"),
        ({"class_names": NAMES[:3]}, "has 4 classes, but 3 class names are given"),
        ({"labels": [0, 1, 2, 3, 0, 1, 2, 4]}, "the label of 'k7' is 4, but classes are 0 to 3"),
        ({"labels": [0, 1, 2, -1, 0, 1, 2, 3]}, r"the label of 'k3' is -1.*\(1 labels are out"),
        ({"labels": [0, 1, 3, 3, 0, 1, 3, 3]}, r"no picture of class 2 \(owl\): fetch"),
        (
            names("cat", "owl", "dog", "t-shirt"),
            r"another order than the table \(2 of 4\): class 1 is 'owl' here and 'dog' there, "
            "where 'owl' is class 2",
        ),
        (names("cat", "dog", "owl", "cat"), "class 3 is 'cat' here and 't-shirt' there"),
        (names("one", "two", "three", "four"), "shares no class name with the table"),
        ({"kind": "retrieval", "labels": None}, "of the kind retrieval, but the table says class"),
    ],
)
def test_a_set_that_is_not_the_tables_is_refused(changes, sentence):
    made = dataclasses.replace(labelled(), **changes) if "keys" in changes else None
    if changes.get("kind") == "retrieval":
        made = dataclasses.replace(labelled(), **changes)
    with pytest.raises(DatasetError, match=sentence):
        check_against(INFO, made or labelled(**changes))


def test_names_of_the_users_file_are_only_counted():
    given = names("cat", "owl", "dog", "t-shirt")
    check_against(INFO, labelled(**given, names_source="file", class_names=NAMES))
    with pytest.raises(DatasetError, match="but 1 class names are given"):
        check_against(INFO, labelled(names_source="file", class_names=(("cat",),)))
    doubled = (*NAMES[:3], NAMES[1])
    with pytest.warns(
        UserWarning, match="classes 1 and 3 are both called 'dog' in the given names"
    ):
        check_against(INFO, labelled(names_source="file", class_names=doubled))


def test_a_training_split_of_another_size_is_said_and_half_of_one_refused():
    train = {"role": "train", "split": "train"}
    with pytest.warns(UserWarning, match="holds 52 pictures, but Toy Set has 100 in this split by"):
        check_against(INFO, labelled([0, 1, 2, 3] * 13, **train))
    with pytest.raises(DatasetError, match="holds 48 pictures, but Toy Set has 100 in this split"):
        check_against(INFO, labelled([0, 1, 2, 3] * 12, **train))


def test_a_multilabel_class_without_a_picture_is_named():
    info = dataclasses.replace(INFO, kind="multilabel", metric="mean_average_precision_11")
    table = np.ones((8, 4), dtype=np.bool_)
    check_against(info, labelled(table, kind="multilabel"))
    table[:, 1] = False
    with pytest.raises(DatasetError, match=r"no picture of class 1 \(dog\)"):
        check_against(info, labelled(table, kind="multilabel"))
    with pytest.raises(DatasetError, match="has 3 classes, but Toy Set has 4"):
        check_against(info, labelled(table[:, :3], kind="multilabel"))


def test_a_set_asked_with_another_sets_classes():
    info = dataclasses.replace(
        INFO,
        candidates=((0, 4), (1,), (2,), (3,)),
        class_names=(*NAMES, ("tabby",)),
        label_names=NAMES,
    )
    check_against(info, labelled(class_names=info.class_names, names_source="table"))
    with pytest.raises(DatasetError, match="has 5 classes, but 4 class names are given"):
        check_against(info, labelled())
