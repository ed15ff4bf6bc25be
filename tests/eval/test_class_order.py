"""Numbering classes by their folders' names, and comparing names loosely."""

import pytest

from declip_eval.class_order import match_rows, name_key, name_words, numbers_of_folders
from declip_eval.dataset_table import find_dataset
from declip_eval.set_files import DatasetError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The T_Shirt", "t-shirt"),
        ("AnnualCrop", "annual crop"),
        ("Café", "cafe"),
        ("an apple", "Apple"),
        ("a", "A"),
    ],
)
def test_spellings_of_one_name_are_equal(one, other):
    assert name_key(one) == name_key(other)


@pytest.mark.parametrize(("one", "other"), [("cat", "cats"), ("a", "an"), ("火", "水"), ("+", "-")])
def test_different_names_are_not(one, other):
    assert name_key(one) != name_key(other)


def test_words_split_where_capitals_stand():
    assert name_words("The HerbaceousVegetation, Land") == {"herbaceous", "vegetation", "land"}


def test_a_name_that_two_classes_have_matches_none():
    assert match_rows(["crane", "Owl"], (("crane",), ("crane", "bird"), ("owl",))) == [None, 2]


def number(folders, info=None, own=None):
    return numbers_of_folders(folders, info, own, "here")


def test_without_names_the_order_is_alphabetical_as_torchvisions():
    assert number(["b", "C", "a"]) == ({"C": 0, "a": 1, "b": 2}, (("C",), ("a",), ("b",)))


def test_names_of_the_table_give_its_order():
    info = find_dataset("cifar10")
    assert info is not None
    names = [of_class[0] for of_class in info.class_names]
    found, order = number(sorted(name.title() for name in names), info)
    assert [found[name.title()] for name in names] == list(range(10))
    assert [name_key(of_class[0]) for of_class in order] == [name_key(name) for name in names]


def test_a_folder_that_is_missing_keeps_its_number_free():
    found, order = number(["owl", "cat"], own=(("cat",), ("dog",), ("owl",)))
    assert found == {"cat": 0, "owl": 2}
    assert order == (("cat",), ("dog",), ("owl",))


def test_folders_beside_all_of_the_tables_are_no_classes():
    assert number(["cat", "stray", "dog"], own=(("dog",), ("cat",)))[0] == {"cat": 1, "dog": 0}


def test_wordnet_ids_are_numbered_as_the_table_has_them():
    info = find_dataset("imagenet-a")
    assert info is not None
    ids = [of_class[0] for of_class in info.label_names]
    assert [number(ids, info)[0][name] for name in ids] == list(range(200))


def test_numbers_are_ordered_as_numbers():
    found, order = number([str(row) for row in range(12)])
    assert found == {str(row): row for row in range(12)}
    assert order[10] == ("10",)
    assert number(["1", "2", "10", "3"], None)[0] == {"1": 0, "2": 1, "3": 2, "10": 9}
    assert number(["0001", "0000"])[0] == {"0000": 0, "0001": 1}


def test_the_first_class_may_be_missing_where_the_table_tells():
    info = find_dataset("imagenetv2")
    assert info is not None
    assert number([str(row) for row in range(1, 1000)], info)[0]["1"] == 1
    with pytest.raises(DatasetError, match="folders numbered 4 to 5, but numbers of classes begin"):
        number(["4", "5"])


def test_one_number_twice_is_refused():
    with pytest.raises(DatasetError, match="here has two folders of one number"):
        number(["01", "1", "2"])
