"""Which column is what, and what labels and captions mean."""

import json

import pyarrow as pa
import pytest

from declip_eval.dataset_table import find_dataset
from declip_eval.parquet_columns import captions_of, choose_columns, labels_of
from declip_eval.set_files import DatasetError

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = {"names": ["cat", "dog"], "_type": "ClassLabel"}


def schema(features=None, **types):
    metadata = None
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(list(types.items()), metadata=metadata)


def choose(features=None, info=None, **types):
    return choose_columns(schema(features, **types), info, "here")


def test_hugging_faces_features_say_which_column_is_what():
    features = {"photo": {"_type": "Image"}, "species": CLASSES}
    found = choose(features, photo=PICTURE, thumb=pa.binary(), species=pa.int64(), label=pa.int64())
    assert (found.picture, found.label, found.kind) == ("photo", "species", "classification")
    assert found.class_names == (("cat",), ("dog",))


def test_the_number_of_classes_chooses_between_two_label_columns():
    names = [str(row) for row in range(100)]
    features = {
        "coarse_label": {"names": names[:20], "_type": "ClassLabel"},
        "fine_label": {"names": names, "_type": "ClassLabel"},
    }
    types = {"img": PICTURE, "coarse_label": pa.int64(), "fine_label": pa.int64()}
    assert choose(features, find_dataset("cifar100"), **types).label == "fine_label"
    assert choose(features, **types).label == "fine_label"
    other = {"one": CLASSES, "two": CLASSES}
    with pytest.raises(DatasetError, match=r"several columns of classes \(one, two\)"):
        choose(other, img=PICTURE, one=pa.int64(), two=pa.int64())


@pytest.mark.parametrize("wrapped", [[CLASSES], {"feature": CLASSES, "_type": "Sequence"}])
def test_a_list_of_classes_is_multilabel(wrapped):
    found = choose({"objects": wrapped}, image=PICTURE, objects=pa.list_(pa.int64()))
    assert (found.kind, found.label, found.class_names) == (
        "multilabel",
        "objects",
        (("cat",), ("dog",)),
    )
    labels, _ = labels_of(pa.chunked_array([[[0, 1], [], [1]]]), found, None, "abc", "here")
    assert labels.tolist() == [[True, True], [False, False], [False, True]]


def test_retrieval_reads_captions_even_beside_labels():
    types = {"image": PICTURE, "label": pa.int64(), "caption": pa.list_(pa.string())}
    assert choose(**types).kind == "classification"
    found = choose(info=find_dataset("flickr30k"), **types)
    assert (found.kind, found.label) == ("retrieval", "caption")


def test_no_pictures_or_no_labels_are_refused():
    with pytest.raises(DatasetError, match=r"no column of pictures .* among label, url: call"):
        choose(label=pa.int64(), url=pa.string())
    with pytest.raises(DatasetError, match="no column of labels or captions among image, year"):
        choose(image=PICTURE, year=pa.int64())


def label_column(values, info=None, features=None):
    column = pa.chunked_array([values])
    found = choose(features, info, image=PICTURE, label=column.type)
    return labels_of(column, found, info, [f"k{row}" for row in range(len(values))], "here")


def test_texts_are_numbered_by_the_table_or_by_the_alphabet():
    info = find_dataset("cifar10")
    assert info is not None
    names = [of_class[0] for of_class in info.class_names]
    labels, _ = label_column([name.upper() for name in reversed(names)], info)
    assert labels.tolist() == list(range(9, -1, -1))
    labels, found = label_column(["owl", "cat", "owl"])
    assert (labels.tolist(), found) == ([1, 0, 1], (("cat",), ("owl",)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([0, None], "k1 has no label"),
        ([0.5, 1.0], "the column 'label' holds 0.5, but labels are class numbers or names"),
        ([[0], [3]], "holds classes up to 3, but they are 0 to 1"),
        ([[0, 1, 1], [1, 0, 0]], "'label' holds 3 zeros and ones a picture, but a list of labels"),
    ],
)
def test_labels_that_are_none_are_refused(values, sentence):
    features = {"label": [CLASSES]} if isinstance(values[0], list) else None
    with pytest.raises(DatasetError, match=sentence):
        label_column(values, features=features)


def test_a_class_of_several_objects_is_there_once():
    labels, _ = label_column([[0, 1, 1], [1]], features={"label": [CLASSES]})
    assert labels.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize(
    "values",
    [
        ["one\ntwo\n", "three"],
        [["one", " ", "two"], ["three"]],
        [[{"raw": "one", "id": 1}, {"raw": "two", "id": 2}], [{"raw": "three", "id": 3}]],
    ],
)
def test_captions_in_all_their_forms(values):
    column = pa.chunked_array([values])
    assert captions_of(column, ["a", "b"], "here") == [("one", "two"), ("three",)]


def test_a_row_without_caption_is_refused():
    with pytest.raises(DatasetError, match="here: b has no caption"):
        captions_of(pa.chunked_array([["x", "  "]]), ["a", "b"], "here")
