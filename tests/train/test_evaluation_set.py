"""Both forms of labelled pictures are listed alike; what is wrong with them is told."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from declip_shards import DeclipError
from declip_train.evaluation_set import DEFAULT_TEMPLATES, read_evaluation_set

NAMES = ["tabby cat", "school bus", "teapot"]


def picture(number):
    rng = np.random.default_rng(number)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def write_folders(root, per_class=4):
    for label, name in enumerate(NAMES):
        folder = root / f"{label}_{name.replace(' ', '_')}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            (folder / f"{number}.PNG").write_bytes(picture(10 * label + number))
        (folder / "notes.txt").write_text("no picture")
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")


def write_tars(root, per_class=4, *, without_label=(), labels=None):
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(NAMES))
    members = [
        (f"s{10 * label + number:04d}", label, picture(10 * label + number))
        for label in range(len(NAMES))
        for number in range(per_class)
    ]
    for tar in range(2):
        with tarfile.open(root / "test" / f"{tar}.tar", "w") as opened:
            for key, label, data in members[tar::2]:
                told = str(labels if labels is not None else label).encode()
                parts = [(f"{key}.png", data), (f"{key}.cls", told)]
                for name, content in parts[: 1 if key in without_label else 2]:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    opened.addfile(info, io.BytesIO(content))


def content(data):
    return sorted((picture.label, picture.read()) for picture in data.pictures)


def test_folders_and_tars_of_the_same_pictures_are_the_same(tmp_path):
    write_folders(tmp_path / "folders")
    write_tars(tmp_path / "tars")
    folders, tars = (read_evaluation_set(tmp_path / name) for name in ("folders", "tars"))
    assert list(folders.class_names) == list(tars.class_names) == NAMES
    assert content(folders) == content(tars)
    assert len(content(tars)) == 12
    assert folders.templates == DEFAULT_TEMPLATES
    assert folders.prompts(1) == ["a photo of a school bus."]


def test_names_of_folders_and_own_prompts(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "classnames.txt").unlink()
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n\nmany {}s\n")
    data = read_evaluation_set(tmp_path)
    assert list(data.class_names) == ["0 tabby cat", "1 school bus", "2 teapot"]
    assert data.prompts(2) == ["a 2 teapot.", "many 2 teapots"]


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(DeclipError, match=r"evaluate_data is '.*nothing', which is no folder on"):
        read_evaluation_set(tmp_path / "nothing")
    with pytest.raises(DeclipError, match=r"holds no picture; give a folder"):
        read_evaluation_set(tmp_path)
    write_folders(tmp_path / "a")
    (tmp_path / "a/classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(DeclipError, match=r"has 2 names for 3 folders of pictures; write one line"):
        read_evaluation_set(tmp_path / "a")
    (tmp_path / "a/classnames.txt").unlink()
    (tmp_path / "a/zeroshot_classification_templates.txt").write_text("a photo")
    with pytest.raises(
        DeclipError, match=r"has the prompt 'a photo', but each line must have \{c\}"
    ):
        read_evaluation_set(tmp_path / "a")
    write_tars(tmp_path / "b")
    (tmp_path / "b/classnames.txt").unlink()
    with pytest.raises(DeclipError, match=r"holds tars but no classnames.txt; write the classes'"):
        read_evaluation_set(tmp_path / "b")
    write_tars(tmp_path / "c", labels=3)
    with pytest.raises(DeclipError, match=r"has the label 3, but classnames.txt has 3 names"):
        read_evaluation_set(tmp_path / "c")
    write_tars(tmp_path / "d", without_label=["s0011"])
    with pytest.raises(DeclipError, match=r"has no label s0011.cls beside its picture"):
        read_evaluation_set(tmp_path / "d")
    write_tars(tmp_path / "e")
    (tmp_path / "e/test/0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DeclipError, match=r"0.tar' cannot be read .*download it again"):
        read_evaluation_set(tmp_path / "e")


def test_numbers_of_wordnet_are_no_names(tmp_path):
    for name in ("n01440764", "n01443537", ".thumbnails"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(1))
    with pytest.raises(DeclipError, match=r"WordNet's numbers, as 'n01440764'.*classnames.txt"):
        read_evaluation_set(tmp_path)
    (tmp_path / "classnames.txt").write_text("tench\ngoldfish\n")
    found = read_evaluation_set(tmp_path)
    assert found.class_names == ["tench", "goldfish"]
    assert [one.label for one in found.pictures] == [0, 1]
