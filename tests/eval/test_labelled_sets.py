"""Finding a set, and what all its forms have in common."""

import dataclasses
import http.server
import io
import os
import pickle
import shutil
import threading
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from declip_eval.dataset_table import find_dataset
from declip_eval.labelled_sets import (
    DatasetError,
    MissingDatasetError,
    check_against,
    open_labelled_set,
    write_webdataset,
)

CLASSES = ["cat", "dog", "owl"]


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, 1, 2)).save(buffer, "png")
    return buffer.getvalue()


ITEMS = [(f"k{row}", png(row), row % 3) for row in range(7)]


def write_set(folder, **options):
    options = {"class_names": CLASSES, "templates": ["a {}."], "shard_size": 3, **options}
    return write_webdataset(folder, ITEMS, **options)


@pytest.mark.parametrize(
    ("inside", "root"),
    [
        ("", ""),
        ("vtab/toy", ""),
        ("wds_vtab-toy", ""),
        ("VTAB_Toy", ""),
        ("wds_vtab-toy", "wds_{dataset_cleaned}"),
        ("vtab/toy", "{dataset}"),
        ("vtab-toy/main", "{dataset_cleaned}/main"),
    ],
)
def test_a_set_is_found_under_every_spelling(tmp_path, inside, root):
    write_set(tmp_path / inside)
    found = open_labelled_set(f"{tmp_path}/{root}", "wds/vtab/toy")
    assert len(found) == 7
    assert found.name == "wds/vtab/toy"


def test_names_of_the_table_are_looked_for_too(tmp_path):
    info = find_dataset("cars")
    assert info is not None
    write_set(tmp_path / info.aliases[0])
    assert len(open_labelled_set(str(tmp_path), "cars", info=info)) == 7


def test_a_set_that_is_not_there_says_where_it_was_sought_and_how_to_get_it(tmp_path):
    info = find_dataset("cifar10")
    assert info is not None
    with pytest.raises(MissingDatasetError) as caught:
        open_labelled_set(str(tmp_path), "cifar10", info=info)
    assert f"looked for 'test' in {tmp_path}" in str(caught.value)
    assert info.how_to_get in str(caught.value)
    write_set(tmp_path / "toy")
    with pytest.raises(MissingDatasetError, match=r"no split 'train' here: looked for 'train' in"):
        open_labelled_set(str(tmp_path), "toy", "train")


def test_the_three_forms_hold_the_same_set(tmp_path):
    write_set(tmp_path / "tars")
    for key, data, label in ITEMS:
        path = tmp_path / "folders" / "test" / CLASSES[label] / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "parquet").mkdir()
    columns = {
        "image": [data for _, data, _ in ITEMS],
        "label": [CLASSES[row % 3] for row in range(7)],
    }
    pq.write_table(pa.table(columns), tmp_path / "parquet" / "test.parquet")
    found = set()
    for layout in ("tars", "folders", "parquet"):
        one: Any = open_labelled_set(str(tmp_path), layout)
        check_against(None, one)
        assert one.num_classes == 3
        assert one.class_names == (("cat",), ("dog",), ("owl",))
        rows = range(len(one))
        assert pickle.loads(pickle.dumps(one)).read_images(rows) == one.read_images(rows)
        assert one.read_images(np.arange(3)) == one.read_images([0, 1, 2])
        found.add(frozenset(zip(one.read_images(rows), one.labels.tolist(), strict=True)))
    assert found == {frozenset((data, label) for _, data, label in ITEMS)}


def test_imagenets_val_is_its_test_split(tmp_path):
    info = find_dataset("imagenet1k")
    assert info is not None
    ids = [of_class[0] for of_class in info.label_names[:3]]
    for row, name in enumerate(ids):
        path = tmp_path / "imagenet1k" / "val" / name / f"{row}.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(row))
    found: Any = open_labelled_set(str(tmp_path), "imagenet1k", info=info)
    assert (found.split, found.role, found.names_source) == ("val", "test", "table")
    assert found.labels.tolist() == [0, 1, 2]
    assert found.class_names == info.class_names
    with pytest.raises(DatasetError, match="holds 3 pictures, but ImageNet has 50,000"):
        check_against(info, found)


def test_another_sets_val_never_stands_in_for_its_test_split(tmp_path):
    # VTAB's copy of EuroSAT has as many pictures in val as in test.
    info = find_dataset("eurosat")
    assert info is not None
    write_set(tmp_path / "eurosat", split="val")
    with pytest.raises(MissingDatasetError, match="no split 'test' here: looked for 'test' in"):
        open_labelled_set(str(tmp_path), "eurosat", info=info)
    assert len(open_labelled_set(str(tmp_path), "eurosat", "val", info=info)) == 7


def test_names_and_templates_by_their_order_of_precedence(tmp_path):
    info = find_dataset("cifar10")
    assert info is not None
    write_set(tmp_path / "set")
    write_set(tmp_path / "bare", class_names=None, templates=())
    (tmp_path / "mine.txt").write_text("x\ny\nz\n")
    (tmp_path / "prompts.txt").write_text("my {c}\n")
    files = {
        "class_names_file": str(tmp_path / "mine.txt"),
        "templates_file": str(tmp_path / "prompts.txt"),
    }
    user = open_labelled_set(str(tmp_path), "set", info=info, **files)
    assert (user.class_names, user.names_source) == ((("x",), ("y",), ("z",)), "file")
    assert user.templates == ("my {}",)
    assert user.label_names == (("cat",), ("dog",), ("owl",))
    own = open_labelled_set(str(tmp_path), "set", info=info)
    assert (own.class_names, own.names_source) == (user.label_names, "set")
    assert own.templates == ("a {}.",)
    table = open_labelled_set(str(tmp_path), "bare", info=info)
    assert (table.class_names, table.names_source) == (info.class_names, "table")
    assert table.templates == info.templates
    nothing = open_labelled_set(str(tmp_path), "bare")
    assert (nothing.class_names, nothing.templates) == (None, ())
    assert nothing.num_classes == 3
    other = dataclasses.replace(info, candidates=((0,), (1,), (2,)))
    assert open_labelled_set(str(tmp_path), "set", info=other).class_names == info.class_names


def test_another_language_needs_its_files(tmp_path):
    write_set(tmp_path)
    with pytest.raises(DatasetError, match=r"language is 'jp', but .*jp_classnames\.txt is not"):
        open_labelled_set(str(tmp_path), "toy", language="jp")
    (tmp_path / "jp_classnames.txt").write_text("猫\n犬\n梟\n")
    (tmp_path / "jp_zeroshot_classification_templates.txt").write_text("{c}の写真\n")
    found = open_labelled_set(str(tmp_path), "toy", language="jp")
    assert found.class_names == (("猫",), ("犬",), ("梟",))
    assert found.templates == ("{}の写真",)


def test_the_digest_knows_all_but_the_folder_and_the_process(tmp_path):
    write_set(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    first: Any = open_labelled_set(str(tmp_path / "a"), "a")
    assert first.digest() == open_labelled_set(str(tmp_path / "elsewhere"), "b").digest()
    assert pickle.loads(pickle.dumps(first)).digest() == first.digest()
    digests = {first.digest()}
    changed: list[dict[str, Any]] = [
        {"keys": [*first.keys[:-1], "other"]},
        {"labels": first.labels[::-1]},
        {"places": dataclasses.replace(first.places, rows=first.places.rows + 1)},
    ]
    digests |= {dataclasses.replace(first, **change).digest() for change in changed}
    assert len(digests) == len(changed) + 1
    for prompts in ({"class_names": (("x",), ("y",), ("z",))}, {"templates": ("the {}.",)}):
        other = dataclasses.replace(first, **prompts)
        assert other.digest() == first.digest()
        assert other.prompts_digest() != first.prompts_digest()


def write_folders(root):
    for key, data, label in ITEMS:
        path = root / "test" / CLASSES[label] / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_parquet(root):
    root.mkdir(parents=True)
    columns = {"image": [data for _, data, _ in ITEMS], "label": [row % 3 for row in range(7)]}
    pq.write_table(pa.table(columns), root / "test.parquet", compression="none")


@pytest.mark.parametrize("write", [write_set, write_folders, write_parquet])
def test_the_digest_knows_every_byte_of_a_picture(tmp_path, write):
    write(tmp_path / "toy")
    first = open_labelled_set(str(tmp_path), "toy")
    digest = first.digest()
    files = [path for path in (tmp_path / "toy").rglob("*") if path.is_file()]
    (path,) = [path for path in files if ITEMS[3][1] in path.read_bytes()]
    whole = path.read_bytes()
    at = whole.index(ITEMS[3][1]) + 20
    changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    path.write_bytes(changed)
    other = open_labelled_set(str(tmp_path), "toy")
    assert (other.keys, len(changed)) == (first.keys, len(whole))
    assert other.digest() != digest
    assert first.digest() == digest, "a set's digest is taken once"
    path.write_bytes(whole)
    assert open_labelled_set(str(tmp_path), "toy").digest() == digest


def test_a_picture_that_cannot_be_read_is_part_of_the_digest(tmp_path):
    write_folders(tmp_path / "toy")
    digest = open_labelled_set(str(tmp_path), "toy").digest()
    path = tmp_path / "toy" / "test" / "cat" / "k3.png"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    found = open_labelled_set(str(tmp_path), "toy")
    assert len(found) == len(ITEMS)
    assert found.digest() != digest


def test_configurations_are_looked_for_in_the_sets_own_folder_alone(tmp_path):
    write_parquet(tmp_path / "toy" / "fine")
    assert len(open_labelled_set(str(tmp_path), "toy")) == 7
    assert len(open_labelled_set(f"{tmp_path}/toy", "toy")) == 7
    assert len(open_labelled_set(f"{tmp_path}/{{dataset}}", "toy")) == 7
    with pytest.raises(MissingDatasetError):
        open_labelled_set(f"{tmp_path}/toy", "other")


def test_a_set_behind_a_web_server_is_the_same_set(tmp_path):
    write_set(tmp_path / "served" / "wds_toy")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = partial(Quiet, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/wds_{{dataset_cleaned}}"
    cache = str(tmp_path / "cache")
    try:
        found = open_labelled_set(url, "wds/toy", cache=cache)
        first = found.read_images([6, 0])
        digest = found.digest()
        served = tmp_path / "served" / "wds_toy" / "test" / "2.tar"
        whole = served.read_bytes()
        # Another picture of the same size, a second later.
        served.write_bytes(whole.replace(ITEMS[6][1], ITEMS[5][1]))
        os.utime(served, (2 * 10**9, 2 * 10**9))
        swapped = open_labelled_set(url, "wds/toy", cache=cache)
        assert swapped.read_images([6]) == [ITEMS[5][1]]
        assert swapped.digest() != digest
        served.write_bytes(whole)
        with pytest.raises(MissingDatasetError, match="A web server shows no list of its files"):
            open_labelled_set(url, "other", cache=cache)
        (tmp_path / "served" / "wds_toy" / "test" / "3.tar").write_bytes(b"x")
        with pytest.raises(DatasetError, match=r"says 3 tars, but 3\.tar is there too"):
            open_labelled_set(url, "wds/toy", cache=cache)
        (tmp_path / "served" / "wds_toy" / "test" / "2.tar").unlink()
        (tmp_path / "served" / "wds_toy" / "test" / "3.tar").unlink()
        with pytest.raises(DatasetError, match=r"test/2\.tar is not there"):
            open_labelled_set(url, "wds/toy", cache=cache)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert first == [ITEMS[6][1], ITEMS[0][1]]
    write_set(tmp_path / "local")
    assert digest == open_labelled_set(str(tmp_path), "local").digest()
