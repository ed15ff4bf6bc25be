"""Folders of one folder a class."""

import hashlib
import os
from typing import Any

import fsspec
import numpy as np
import pytest

from declip_eval.folder_sets import read_bare_folders, read_folder_split
from declip_eval.set_files import DatasetError, SetFolder


def write(root, files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def read(root, split="test") -> Any:
    return read_folder_split(SetFolder(str(root)), split)


FILES = ["test/dog/1.jpg", "test/dog/deep/2.PNG", "test/cat/x.JPEG", "test/ant/y.webp"]


def test_pictures_are_read_with_their_folders_classes(tmp_path):
    write(tmp_path, [*FILES, "test/cat/notes.txt", "test/cat/.hidden.jpg", "train/cat/z.jpg"])
    parts = read(tmp_path)
    assert parts.keys == ["ant/y.webp", "cat/x.JPEG", "dog/1.jpg", "dog/deep/2.PNG"]
    assert parts.labels.tolist() == [0, 1, 2, 2]
    assert parts.labels.dtype == np.int64
    assert parts.label_names == (("ant",), ("cat",), ("dog",))
    assert parts.places.read([2, 0]) == [b"test/dog/1.jpg", b"test/ant/y.webp"]
    assert (parts.layout, parts.split, parts.kind) == ("folders", "test", "classification")


def test_the_sets_own_names_give_the_order(tmp_path):
    write(tmp_path, FILES)
    (tmp_path / "classnames.txt").write_text("Dog | hound\na cat\nAnt\n")
    parts = read(tmp_path)
    assert dict(zip(parts.keys, parts.labels.tolist(), strict=True))["dog/1.jpg"] == 0
    assert parts.label_names == (("Dog", "hound"), ("a cat",), ("Ant",))


def test_a_class_without_pictures_keeps_its_name(tmp_path):
    write(tmp_path, FILES)
    (tmp_path / "test" / "bee").mkdir()
    parts = read(tmp_path)
    assert parts.label_names[1] == ("bee",)
    assert 1 not in parts.labels.tolist()


def test_sets_with_a_test_split_alone_have_no_folder_for_it(tmp_path):
    write(tmp_path, ["n02/a.jpg", "n01/b.jpg"])
    parts: Any = read_bare_folders(SetFolder(str(tmp_path)))
    assert (parts.keys, parts.split) == (["n01/b.jpg", "n02/a.jpg"], "test")
    assert parts.places.read([1]) == [b"n02/a.jpg"]


@pytest.mark.parametrize("files", [["train/cat/a.jpg"], ["cifar10/test/cat/a.jpg"], []])
def test_splits_and_folders_of_datasets_are_no_classes(tmp_path, files):
    write(tmp_path, files)
    assert read_bare_folders(SetFolder(str(tmp_path))) is None
    assert read(tmp_path) is None


def test_pictures_outside_of_class_folders_are_refused(tmp_path):
    write(tmp_path, [*FILES, "test/ILSVRC2012_val_00000001.JPEG"])
    with pytest.raises(DatasetError, match=r"holds 1 pictures outside of any class's folder"):
        read(tmp_path)


def test_a_picture_that_cannot_be_read_is_said_in_words(tmp_path):
    write(tmp_path, FILES)
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "test" / "cat" / "link.jpg")
    parts = read(tmp_path)
    assert parts.keys[1:3] == ["cat/link.jpg", "cat/x.JPEG"]
    (tmp_path / "test" / "ant" / "y.webp").unlink()
    found = parts.places.read([0, 1, 2])
    assert found[2] == b"test/cat/x.JPEG"
    assert all("cannot be read (No such file" in str(each) for each in found[:2])


def test_the_digest_knows_names_and_sizes_and_not_the_place(tmp_path):
    def digest(root):
        result = hashlib.sha256()
        read(root).places.add_to(result)
        return result.hexdigest()

    write(tmp_path / "a", FILES)
    write(tmp_path / "b", FILES)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    (tmp_path / "b" / FILES[0]).write_bytes(b"longer than before")
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_the_same_over_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in FILES:
        memory.pipe_file(f"/folder_sets/{name}", name.encode())
    try:
        parts = read("memory://folder_sets")
        write(tmp_path, FILES)
        local = read(tmp_path)
        assert parts.keys == local.keys
        assert parts.labels.tolist() == local.labels.tolist()
        assert parts.places.sizes.tolist() == local.places.sizes.tolist()
        memory.rm_file("/folder_sets/test/dog/1.jpg")
        found = parts.places.read([0, 2])
        assert found[0] == b"test/ant/y.webp"
        assert "cannot be read" in str(found[1])
    finally:
        memory.rm("/folder_sets", recursive=True)
