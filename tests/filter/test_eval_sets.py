import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from duplicates_dataset import jpeg, patches, png
from PIL import Image

from declip_filter.captions import caption_sha
from declip_filter.eval_sets import load_eval_set, parse_eval_set, read_items, stored_forms
from declip_shards import DeclipError


@pytest.fixture(scope="module")
def photos():
    return patches(3)


def write_folder(place, photos):
    (place / "dogs").mkdir(parents=True)
    (place / "a.png").write_bytes(png(photos[0]))
    (place / "a.txt").write_text("A  Temple")
    (place / "dogs" / "b.jpg").write_bytes(jpeg(photos[1]))
    (place / "notes.md").write_text("not a picture")


def write_tar(place, photos):
    with tarfile.open(place, "w") as tar:
        for name, data in (
            ("000.jpg", jpeg(photos[0])),
            ("000.txt", b"a temple"),
            ("000.cls", b"3"),
            ("001.seg.png", png(photos[1])),
            ("002.txt", b"words alone"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_folder_is_read_with_captions_beside_the_pictures(tmp_path, photos):
    write_folder(tmp_path / "set", photos)
    items = list(read_items(tmp_path / "set"))
    assert [(i.key, list(i.captions)) for i in items] == [
        ("a.png", ["A  Temple"]),
        ("dogs/b.jpg", []),
    ]
    assert items[0].image == png(photos[0])


def test_a_webdataset_tar_alone_and_in_a_folder(tmp_path, photos):
    write_tar(tmp_path / "t.tar", photos)
    alone = list(read_items(tmp_path / "t.tar"))
    assert [(i.key, list(i.captions)) for i in alone] == [
        ("000", ["a temple"]), ("001", []), ("002", ["words alone"]),
    ]  # fmt: skip
    assert alone[1].image == png(photos[1])
    assert alone[2].image is None
    assert [i.key for i in read_items(tmp_path)] == ["t.tar/000", "t.tar/001", "t.tar/002"]


@pytest.mark.parametrize("is_struct", [True, False])
def test_parquet_of_both_kinds_of_pictures(tmp_path, photos, is_struct):
    data = [jpeg(photo) for photo in photos]
    images = [{"bytes": d, "path": None} for d in data] if is_struct else data
    texts = [["one", "two"], [], ["three"]]
    pq.write_table(pa.table({"image": images, "captions": texts}), tmp_path / "p.parquet")
    items = list(read_items(tmp_path / "p.parquet"))
    assert [(i.key, i.image, list(i.captions)) for i in items] == [
        (str(n), data[n], texts[n]) for n in range(3)
    ]


def test_the_three_layouts_give_one_content(tmp_path, photos):
    write_folder(tmp_path / "set", photos)
    one = load_eval_set("x", tmp_path / "set", is_dhash=False)
    again = load_eval_set("x", tmp_path / "set", is_dhash=False, num_threads=3)
    assert one.digest == again.digest
    assert one.looks.hashes.tolist() == again.looks.hashes.tolist()
    assert (len(one.keys), len(one.image_digests), len(one.looks.hashes)) == (2, 2, 6)
    assert one.caption_digests[0].tobytes().hex() == caption_sha("a temple")
    (tmp_path / "set" / "a.txt").write_text("another")
    assert load_eval_set("x", tmp_path / "set", is_dhash=False).digest != one.digest


def test_forms_are_what_the_resize_modes_store(photos):
    whole, square, padded = stored_forms(photos[0])
    assert (whole.shape, square.shape, padded.shape) == ((120, 160), (120, 120), (160, 160))
    np.testing.assert_array_equal(square, whole[:, 20:140])
    np.testing.assert_array_equal(padded[20:140], whole)
    assert (padded[:20] == 255).all()
    assert len(stored_forms(photos[0].crop((0, 0, 64, 64)))) == 1


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    assert (stored_forms(clear)[0] == 255).all()


def test_what_is_no_picture_is_counted_and_still_compared_by_bytes(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    found = load_eval_set("x", tmp_path, is_dhash=True)
    assert (found.num_undecodable, len(found.image_digests), len(found.looks.hashes)) == (1, 1, 0)


def test_names_are_given_or_taken_from_the_path(tmp_path):
    (tmp_path / "val.tar").write_bytes(b"")
    assert parse_eval_set(str(tmp_path / "val.tar"))[0] == "val"
    assert parse_eval_set(f"imagenet={tmp_path}") == ("imagenet", tmp_path)


def test_faults_are_refused_by_name(tmp_path):
    with pytest.raises(
        DeclipError, match=r"eval_sets has 'a=/nowhere', and '/nowhere' does not exist"
    ):
        parse_eval_set("a=/nowhere")
    with pytest.raises(
        DeclipError, match=r"eval_sets has 'a:b=.*must not be empty nor have a colon"
    ):
        parse_eval_set(f"a:b={tmp_path}")
    with pytest.raises(DeclipError, match=r"'x' at .* has no picture and no caption"):
        load_eval_set("x", tmp_path, is_dhash=False)
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DeclipError, match=r"(?s)bad.tar' is not a readable tar .*fetch it again"):
        load_eval_set("x", tmp_path, is_dhash=False)
    (tmp_path / "bad.tar").unlink()
    pq.write_table(pa.table({"label": [1]}), tmp_path / "p.parquet")
    with pytest.raises(DeclipError, match=r"p.parquet' has no column of pictures .*it has: label"):
        load_eval_set("x", tmp_path, is_dhash=False)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(DeclipError, match=r"p.parquet' is not readable parquet .*fetch it again"):
        load_eval_set("x", tmp_path, is_dhash=False)
