"""Reading CLIP_benchmark's webdatasets: other writers' tars, and every way to be incomplete."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from declip_eval.labelled_sets import write_webdataset
from declip_eval.set_files import DatasetError, SetFolder
from declip_eval.tar_sets import read_tar_split


def png(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, 1, 2)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(folder, members, number=0, split="test"):
    (folder / split).mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / split / f"{number}.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / split / "nshards.txt").write_text(f"{number + 1}\n")


def read(folder, split="test"):
    return read_tar_split(SetFolder(str(folder)), split)


def npy(values):
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


def test_reads_what_the_webdataset_library_writes(tmp_path):
    (tmp_path / "test").mkdir()
    pattern = str(tmp_path / "test" / "%d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as sink:
        for row in range(10):
            sink.write({"__key__": f"s{row:07d}", "png": png(row), "cls": row % 3})
    (tmp_path / "test" / "nshards.txt").write_text("3\n")
    (tmp_path / "classnames.txt").write_text("cat\ndog\nowl\n")
    parts = read(tmp_path)
    assert parts.keys == [f"s{row:07d}" for row in range(10)]
    assert parts.labels.tolist() == [row % 3 for row in range(10)]
    assert parts.labels.dtype == np.int64
    assert parts.label_names == (("cat",), ("dog",), ("owl",))
    assert parts.places.read([9, 0, 4]) == [png(9), png(0), png(4)]


def test_the_type_file_says_which_label_counts(tmp_path):
    members = [("a.png", png()), ("a.txt", b"one\n\ntwo\n"), ("a.json", b"{}"), ("a.cls", b"2")]
    write_tar(tmp_path, members)
    assert read(tmp_path).labels.tolist() == [2]
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    parts = read(tmp_path)
    assert parts.kind == "retrieval"
    assert parts.labels is None
    assert parts.captions == [("one", "two")]


@pytest.mark.parametrize(
    ("name", "label"), [("npy", npy([0, 1, 1])), ("json", b"[false, true, true]")]
)
def test_multilabel_is_one_entry_a_class(tmp_path, name, label):
    write_tar(tmp_path, [("a.png", png()), (f"a.{name}", label)])
    parts = read(tmp_path)
    assert parts.kind == "multilabel"
    assert parts.labels.tolist() == [[False, True, True]]


def test_pickles_are_never_loaded(tmp_path):
    write_tar(tmp_path, [("a.png", png()), ("a.npy", npy(np.array([object()], dtype=object)))])
    with pytest.raises(DatasetError, match=r"the label of 'a' is no \.npy"):
        read(tmp_path)


def test_tars_without_nshards_are_refused(tmp_path):
    write_tar(tmp_path, [("a.png", png()), ("a.cls", b"0")])
    (tmp_path / "test" / "nshards.txt").unlink()
    with pytest.raises(DatasetError, match=r"nshards\.txt is missing beside 1 tars"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        ("3", r"says 3 tars, but 2\.tar is not there \(2 tars in all\)"),
        ("1", r"says 1 tars, but 1\.tar is there too \(2 tars in all\)"),
        ("two", "holds 'two', but it holds the number of tars"),
        ("0", "holds '0', but it holds the number of tars"),
        ("9" * 5000, "holds '9999999999999999999999999999999999999999', but it holds the number"),
        ("99999999999", "holds '99999999999', but it holds the number of tars"),
    ],
)
def test_nshards_must_agree_with_the_tars(tmp_path, number, sentence):
    write_tar(tmp_path, [("a.png", png()), ("a.cls", b"0")])
    write_tar(tmp_path, [("b.png", png()), ("b.cls", b"0")], number=1)
    (tmp_path / "test" / "nshards.txt").write_text(number)
    with pytest.raises(DatasetError, match=sentence):
        read(tmp_path)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("a.png", b"")], r"has no \.cls or \.npy or \.txt or \.json for 'a'"),
        ([("a.cls", b"1")], r"has no \.jpg or \.jpeg or \.png or \.webp for 'a'"),
        ([("a.png", b""), ("a.jpg", b""), ("a.cls", b"1")], "has two pictures called 'a'"),
        ([("a.png", b""), ("a.cls", b"1"), ("a.cls", b"2")], "has two labels called 'a'"),
        ([("a.png", b""), ("a.cls", b"cat")], r"the label of 'a' is b'cat' \(\.cls\)"),
        ([("a.png", b""), ("a.cls", b"9" * 30)], "the label of 'a' is b'999"),
        ([("a.png", b""), ("a.npy", npy([[0, 1]]))], r"has shape \(1, 2\)"),
        ([("a.png", b""), ("a.npy", npy([0, 2]))], "a vector of one 0 or 1 a class"),
        ([("a.png", b""), ("a.txt", b"\n \n")], "'a' has no caption"),
        ([("a.png", b""), ("a.txt", b"\xff")], "the captions of 'a' are not UTF-8"),
    ],
)
def test_a_sample_that_is_not_whole_is_refused(tmp_path, members, sentence):
    write_tar(tmp_path, members)
    with pytest.raises(DatasetError, match=sentence):
        read(tmp_path)


def test_multilabel_rows_have_one_width(tmp_path):
    rows = [("a.png", b""), ("a.npy", npy([0, 1])), ("b.png", b""), ("b.npy", npy([0, 1, 0]))]
    write_tar(tmp_path, rows)
    with pytest.raises(DatasetError, match="the label of 'b' has 3 entries, but there are 2"):
        read(tmp_path)


def test_an_unknown_type_is_refused(tmp_path):
    write_tar(tmp_path, [("a.png", png()), ("a.cls", b"0")])
    (tmp_path / "dataset_type.txt").write_text("captioning")
    with pytest.raises(DatasetError, match="holds 'captioning', but a dataset is of the type"):
        read(tmp_path)


def test_a_picture_that_is_gone_is_said_in_words(tmp_path):
    write_webdataset(tmp_path, [(f"k{row}", png(row), 0) for row in range(4)], shard_size=2)
    parts = read(tmp_path)
    (tmp_path / "test" / "1.tar").unlink()
    found = parts.places.read([3, 0])
    assert found[1] == png(0)
    assert isinstance(found[0], str)
    assert "1.tar cannot be read" in found[0]
    tar = tmp_path / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:520])
    assert "it changed since" in str(parts.places.read([0])[0])


def test_no_split_is_none(tmp_path):
    assert read(tmp_path) is None
