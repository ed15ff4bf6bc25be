"""Files of class names and templates."""

import json

import pytest

from declip_eval.set_files import DatasetError
from declip_eval.set_texts import (
    class_name_lines,
    load_class_names,
    load_templates,
    parse_class_names,
    parse_templates,
)


def test_names_are_one_a_line_with_synonyms_between_bars():
    names = (("angry", "cross"), ("happy",))
    assert class_name_lines(names) == "angry | cross\nhappy\n"
    assert parse_class_names(["angry | cross", " happy", "", " "], "x") == names


@pytest.mark.parametrize("lines", [["a", "", "b"], ["a | ", "b"]])
def test_an_empty_name_is_refused(lines):
    with pytest.raises(DatasetError, match=r"names\.txt has an empty class name in line [12] of"):
        parse_class_names(lines, "names.txt")
    with pytest.raises(DatasetError, match="holds no class name"):
        parse_class_names(["", ""], "names.txt")


def test_templates_have_one_place_for_the_name():
    assert parse_templates(["a {c}.", "", "the {}. "], "x") == ("a {}.", "the {}.")
    with pytest.raises(DatasetError, match=r"^t\.txt: The template 'a photo' has 0 places"):
        parse_templates(["a photo"], "t.txt")


def test_files_of_lines_and_of_json_are_read(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog | hound\n")
    (tmp_path / "list.json").write_text(json.dumps(["cat", "dog | hound"]))
    (tmp_path / "all.json").write_text(json.dumps({"toy": ["cat", "dog | hound"], "x": ["y"]}))
    for file in ("names.txt", "list.json", "all.json"):
        found = load_class_names(str(tmp_path / file), ["vtab/toy", "toy"])
        assert found == (("cat",), ("dog", "hound"))
    (tmp_path / "templates.json").write_text(json.dumps({"toy": ["a {c}."]}))
    assert load_templates(str(tmp_path / "templates.json"), ["toy"]) == ("a {}.",)


def test_a_file_of_the_present_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat\n")
    assert load_class_names("names.txt", ["toy"]) == (("cat",),)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"other": ["a {}"]}', "has none for 'toy': add a list under that name"),
        ('{"toy": {"cat": ["a {}"]}}', "are no list of texts: give one list for all classes"),
        ("[1]", "are no list of texts"),
        ("{", "is no JSON"),
    ],
)
def test_json_of_another_form_is_refused(tmp_path, content, sentence):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(DatasetError, match=sentence):
        load_templates(str(tmp_path / "t.json"), ["toy"])


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"The file of class names '.*' is not there"):
        load_class_names(str(tmp_path / "none.txt"), ["toy"])
