import dataclasses
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from declip_filter import EmbedPairs, register_encoder
from declip_shards import DeclipError
from pipelines.picture_marks import Marks, picture_marks, training_encoder

sys.path.append(str(Path(__file__).parents[1] / "filter"))

from duplicates_dataset import jpeg, patches, png, write_pairs
from hashing_encoder import HashingEncoder, Prepared
from stage_runs import HASHING, run_stage


@pytest.fixture(scope="module")
def files():
    return [jpeg(photo) for photo in patches(5)]


def equal(one, other):
    return all(np.array_equal(a, other.arrays()[name]) for name, a in one.arrays().items())


def test_marks_of_parts_joined_are_those_of_the_whole(files):
    whole = picture_marks(files, num_threads=3)
    parts = [picture_marks(files[:2]), picture_marks(files[2:])]
    assert equal(Marks.join(parts), whole)
    assert whole.sha256.tolist() == [hashlib.sha256(file).hexdigest() for file in files]


def test_arrays_of_a_file_give_the_marks_back(files, tmp_path):
    marks = picture_marks(files, encoder=HashingEncoder(48))
    arrays: dict[str, Any] = {**marks.arrays(), "more": np.zeros(1)}
    np.savez(tmp_path / "marks.npz", **arrays)
    with np.load(tmp_path / "marks.npz", allow_pickle=False) as read:
        assert equal(Marks.from_arrays(read), marks)


def test_a_square_picture_has_one_form_and_others_three():
    photo = patches(1)[0]
    marks = picture_marks([png(photo), png(photo.crop((0, 0, 100, 100)))])
    assert (marks.aspects > 0).sum(axis=1).tolist() == [3, 1]
    assert marks.aspects[0, 0] == pytest.approx(160 / 120)
    np.testing.assert_array_equal(marks.aspects[:, 1:][marks.aspects[:, 1:] > 0], [1, 1])


@pytest.mark.parametrize("encoder", [HashingEncoder(48), Prepared(48)])
def test_what_cannot_be_read_has_no_looks_and_no_vector(files, encoder):
    marks = picture_marks([files[0], "the disk is gone", b"no picture"], encoder=encoder)
    assert [bool(text) for text in marks.sha256] == [True, False, True]
    assert (marks.aspects > 0).any(axis=1).tolist() == [True, False, False]
    np.testing.assert_allclose(np.linalg.norm(marks.vectors, axis=1), [1, 0, 0], atol=1e-6)
    entries = marks.as_eval_set("test", is_dhash=False)
    assert entries.image_owner.tolist() == [0, 2]
    assert set(entries.look_owner.tolist()) == {0}
    assert entries.num_undecodable == 1


def test_vectors_are_the_encoders_own(files):
    encoder = HashingEncoder(48)
    marks = picture_marks(files, encoder=encoder)
    np.testing.assert_array_equal(marks.vectors, encoder.encode_image(files))
    assert picture_marks(files).vectors.shape == (5, 0)


def test_a_picture_that_the_encoder_refuses_has_no_vector(files, monkeypatch):
    encoder = Prepared(48)
    prepare = encoder.prepare_image

    def fussy(image):
        if image == files[1]:
            raise RuntimeError("no")
        return prepare(image)

    monkeypatch.setattr(encoder, "prepare_image", fussy)
    marks = picture_marks(files, encoder=encoder)
    assert (np.linalg.norm(marks.vectors, axis=1) > 0).tolist() == [True, False, True, True, True]


def test_vectors_that_are_not_finite_are_refused(files, monkeypatch):
    encoder = HashingEncoder(48)
    broken = np.full((len(files), 48), np.nan, np.float32)
    monkeypatch.setattr(encoder, "encode_image", lambda images: broken)
    with pytest.raises(DeclipError, match="gives vectors that are not finite"):
        picture_marks(files, encoder=encoder)


def test_transparent_and_turned_pictures_are_looked_at_as_stored():
    photo = patches(1)[0]
    glass = photo.convert("RGBA")
    glass.putalpha(Image.new("L", photo.size, 255))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    plain, through, upright = (
        picture_marks([data]) for data in (png(photo), png(glass), turned.getvalue())
    )
    for other in (through, upright):
        same = dataclasses.replace(other, sha256=plain.sha256)
        assert equal(same, plain)


@pytest.fixture
def root(tmp_path, files):
    write_pairs(str(tmp_path), [[(file, f"photo {n}", 100) for n, file in enumerate(files)]])
    return str(tmp_path)


def embed_pictures(root, kind, salt):
    """Embed by a kind of encoder whose weights are what ``salt`` holds when it is loaded."""

    def make(model, *, root, device):
        encoder = HashingEncoder(int(model), salt=salt[0])
        encoder.name = f"{kind}:{model}"
        return encoder

    register_encoder(kind, make)
    settings: dict[str, Any] = {"selection": "", "images": True, "texts": False}
    run_stage(EmbedPairs(root=root, name="pictures", encoder=f"{kind}:48", **settings))


def test_the_encoder_of_stored_embeddings_is_found_while_its_weights_are_the_same(root):
    salt = [""]
    embed_pictures(root, "marks", salt)
    assert training_encoder(root, "pictures").dim == 48
    salt[0] = "other"
    training_encoder.cache_clear()
    with pytest.raises(DeclipError, match="with other weights than it has now"):
        training_encoder(root, "pictures")


def test_embeddings_without_pictures_or_by_an_unknown_encoder_are_refused(root):
    run_stage(EmbedPairs(root=root, selection="", name="texts", images=False, **HASHING))
    with pytest.raises(DeclipError, match="hold text_emb and none of pictures; name embeddings"):
        training_encoder(root, "texts")
    settings: dict[str, Any] = {"selection": "", "images": True, "texts": False, **HASHING}
    run_stage(EmbedPairs(root=root, name="pictures", **settings))
    with pytest.raises(DeclipError, match="'hashing:64', which cannot be loaded here"):
        training_encoder(root, "pictures")
