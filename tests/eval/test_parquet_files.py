"""Hugging Face's layouts: all files of one configuration, or a word on why not."""

import pytest

from declip_eval.parquet_files import find_parquet_files
from declip_eval.set_files import DatasetError, SetFolder


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def find(root, split="test", **options):
    return find_parquet_files(SetFolder(str(root)), split, **options)


@pytest.mark.parametrize(
    "names",
    [
        ["test.parquet"],
        ["test-00000-of-00001-0a1b2c.parquet"],
        ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"],
        ["data/test/0000.parquet"],
        ["test/0000.parquet", "test/0001.parquet"],
        ["default/test/0000.parquet", "default/test/0001.parquet"],
        ["plain_text/test-00000-of-00001.parquet"],
        ["fine/test/0000.parquet"],
        ["fine/test-00000-of-00001.parquet"],
    ],
)
def test_every_layout_gives_all_files_of_the_split_and_no_others(tmp_path, names):
    touch(tmp_path, *names, *(name.replace("test", "train") for name in names))
    touch(tmp_path, "fine/readme.md", "scripts/make.py")
    assert find(tmp_path) == names
    assert find(tmp_path, "validation") == []


def test_of_several_configurations_the_usual_one_is_taken(tmp_path):
    touch(tmp_path, "small/test/0000.parquet", "default/test/0000.parquet")
    assert find(tmp_path) == ["default/test/0000.parquet"]


def test_configurations_are_told_apart_by_the_split_that_they_have(tmp_path):
    touch(tmp_path, "coarse/train/0000.parquet", "fine/test/0000.parquet")
    assert find(tmp_path) == ["fine/test/0000.parquet"]


def test_several_configurations_are_named_with_what_to_do(tmp_path):
    touch(tmp_path, *(f"{name}/test/0000.parquet" for name in ("coarse", "fine")))
    with pytest.raises(DatasetError) as caught:
        find(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has 2 configurations with the split 'test' (coarse, fine): give the folder of "
        f"the one that is meant as the dataset's root, such as {tmp_path}/coarse."
    )
    assert find(tmp_path / "fine") == ["test/0000.parquet"]


def test_other_datasets_of_a_shared_folder_are_no_configurations(tmp_path):
    touch(tmp_path, "cifar10/test/0000.parquet")
    assert find(tmp_path, is_own=False) == []


def test_numbers_without_their_predecessors_are_refused(tmp_path):
    touch(tmp_path, "default/test/0000.parquet", "default/test/0002.parquet")
    with pytest.raises(DatasetError, match=r"but there is no 0001\.parquet \(2 files in all\)"):
        find(tmp_path)


def test_a_partial_conversion_is_refused(tmp_path):
    touch(tmp_path, "default/partial-test/0000.parquet")
    with pytest.raises(DatasetError, match="is the first part of the split 'test', which the hub"):
        find(tmp_path)
