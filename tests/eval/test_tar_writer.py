"""Laws of the webdataset writer: the reader inverts it, CLIP_benchmark's pipeline reads it."""

import io
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from declip_eval.labelled_sets import DatasetError, open_labelled_set, write_webdataset


def picture(form, value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, 1, 2)).save(buffer, form)
    return buffer.getvalue()


LINES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and text.splitlines() == [text]
)
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(
    lambda text: not any(char in "./\\\0" or char.isspace() for char in text)
)
LABELS = {
    "classification": st.integers(0, 3),
    "multilabel": st.lists(st.booleans(), min_size=4, max_size=4),
    "retrieval": st.lists(LINES, min_size=1, max_size=3),
}


@settings(max_examples=15, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(LABELS)), shard_size=st.integers(1, 5))
def test_the_reader_inverts_the_writer(tmp_path_factory, data, kind, shard_size):
    keys = data.draw(st.lists(KEYS, min_size=1, max_size=9, unique=True))
    forms = [("png", "jpeg", "webp")[len(key) % 3] for key in keys]
    items = [
        (key, picture(form, row), data.draw(LABELS[kind]))
        for row, (key, form) in enumerate(zip(keys, forms, strict=True))
    ]
    names: Any = None if kind == "retrieval" else ["cat", ("dog", "hound"), "owl {}", "é"]
    templates = () if kind == "retrieval" else ("a {}.", "{}")
    folder = tmp_path_factory.mktemp("set")
    count = write_webdataset(
        folder, items, class_names=names, templates=templates, kind=kind, shard_size=shard_size
    )
    found = open_labelled_set(str(folder), "any")
    assert count == len(found) == len(items)
    assert len(list((folder / "test").glob("*.tar"))) == -(-len(items) // shard_size)
    assert (found.keys, found.kind, found.templates) == (keys, kind, templates)
    assert found.read_images(range(len(items))) == [item[1] for item in items]
    if kind == "retrieval":
        assert found.captions == [tuple(item[2]) for item in items]
        assert found.class_names is None
    else:
        assert found.labels is not None
        assert found.labels.tolist() == [item[2] for item in items]
        assert found.class_names == (("cat",), ("dog", "hound"), ("owl {}",), ("é",))


def test_the_same_items_are_the_same_bytes_over_an_earlier_copy(tmp_path):
    items = [(f"k{row}", picture("png", row), row % 2) for row in range(6)]
    write_webdataset(tmp_path / "a", items, class_names=["x", "y"], shard_size=4)
    write_webdataset(
        tmp_path / "b", [(key, data, ["text"]) for key, data, _ in items], kind="retrieval"
    )
    write_webdataset(tmp_path / "b", items, class_names=["x", "y"], shard_size=1)
    write_webdataset(tmp_path / "b", iter(items), class_names=["x", "y"], shard_size=4)
    for file in sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file()):
        assert (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes() == file.read_bytes()
    assert len(open_labelled_set(str(tmp_path), "b")) == 6


def test_clip_benchmarks_pipeline_reads_it(tmp_path):
    items = [(f"k{row}", picture("webp", row), row % 5) for row in range(7)]
    write_webdataset(tmp_path, items, shard_size=3)
    number = int((tmp_path / "test" / "nshards.txt").read_text())
    tars = str(tmp_path / "test" / f"{{0..{number - 1}}}.tar")
    # The calls of CLIP_benchmark 1.6.2's build_wds_dataset.
    dataset = (
        webdataset.WebDataset(tars, nodesplitter=lambda src: src, shardshuffle=False)
        .decode(webdataset.autodecode.ImageHandler("pil", extensions=["webp", "png", "jpg"]))
        .to_tuple(["webp", "png", "jpg", "jpeg"], "cls")
    )
    found = list(dataset)
    assert [label for _, label in found] == [label for _, _, label in items]
    assert all(image.size == (4, 4) for image, _ in found)


PNG = picture("png")


@pytest.mark.parametrize(
    ("items", "options", "sentence"),
    [
        ([("a.b", PNG, 0)], {}, "The key 'a.b' cannot be a name in a webdataset"),
        ([("a", PNG, 0), ("a", PNG, 1)], {}, "The key 'a' occurs twice"),
        ([("a", b"GIF89a", 0)], {}, "The picture 'a' is no JPEG, PNG or WebP"),
        ([("a", PNG, 2)], {"class_names": ["x", "y"]}, "label of 'a' is 2, but labels are 0 to 1"),
        ([("a", PNG, -1)], {}, "The label of 'a' is -1, but class numbers start at 0"),
        ([("a", PNG, [0, 2])], {"kind": "multilabel"}, "a 0 or 1 for each"),
        ([("a", PNG, ["x\ny"])], {"kind": "retrieval"}, "is empty or has a line break"),
        ([("a", PNG, [])], {"kind": "retrieval"}, "'a' has no caption"),
        ([], {}, "There is no item"),
        ([("a", PNG, 0)], {"shard_size": 0}, "shard_size is 0"),
        ([("a", PNG, 0)], {"templates": ["no place"]}, "'no place' has 0 places"),
        ([("a", PNG, 0)], {"class_names": ["x | y"]}, "class_names has a name with"),
    ],
)
def test_what_the_form_cannot_hold_is_refused(tmp_path, items, options, sentence):
    with pytest.raises(DatasetError, match=sentence):
        write_webdataset(tmp_path, items, **options)


def test_an_interrupted_copy_is_refused_by_the_reader(tmp_path):
    def items():
        yield from [(f"k{row}", PNG, 0) for row in range(5)]
        raise KeyboardInterrupt

    write_webdataset(tmp_path, [("old", PNG, 0)])
    with pytest.raises(KeyboardInterrupt):
        write_webdataset(tmp_path, items(), shard_size=2)
    with pytest.raises(DatasetError, match=r"nshards\.txt is missing"):
        open_labelled_set(str(tmp_path), "any")


def test_multilabel_vectors_may_be_of_any_numbers(tmp_path):
    write_webdataset(tmp_path, [("a", PNG, np.array([0.0, 1.0]))], kind="multilabel")
    labels = open_labelled_set(str(tmp_path), "any").labels
    assert labels is not None
    assert labels.tolist() == [[False, True]]
