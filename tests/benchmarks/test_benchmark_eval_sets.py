"""The labelled sets of registries' packages: what is written is what the package holds."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

import eval_sets
from declip_shards import DeclipError, layout, sidecars
from declip_shards.fakes import write_fake_dataset
from eval_sets import (
    cifar10,
    digits,
    idx_array,
    mnist,
    open_standing,
    parse,
    write_pairs,
    write_set,
)

RNG = np.random.default_rng(0)


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
    return head + array.tobytes()


def pixels_of(data):
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(file))) for file in data.read_images(range(len(data)))]
    )


def test_digits_are_scikit_learns_and_each_is_in_one_split():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    splits = {split: digits(split, seed=0) for split in ("train", "test")}
    assert [len(rows) for rows, _ in splits.values()] == [1437, 360]
    both = np.concatenate([rows.reshape(-1, 64) for rows, _ in splits.values()])
    whole = np.rint(images * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, whole))
    of_picture = dict(zip(map(bytes, whole), labels.tolist(), strict=True))
    for rows, found in splits.values():
        assert [of_picture[bytes(row)] for row in rows.reshape(-1, 64)] == found.tolist()
        assert set(found) == set(range(10))
    assert not np.array_equal(digits("test", seed=1)[0], splits["test"][0])


def test_a_set_is_written_once_and_fits_the_table(tmp_path, monkeypatch):
    data = write_set(tmp_path, "digits", "test", cache=tmp_path, seed=0)
    pixels, labels = digits("test", seed=0)
    np.testing.assert_array_equal(pixels_of(data), pixels)
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, labels)
    assert data.templates == ('a photo of the number: "{}".',)
    monkeypatch.setattr(eval_sets, "digits", lambda split, seed: pytest.fail("written again"))
    again = write_set(tmp_path, "digits", "test", cache=tmp_path, seed=0)
    assert again.digest() == data.digest()
    (tmp_path / "digits" / "test" / "nshards.txt").unlink()
    assert open_standing(tmp_path / "digits", "digits", "test") is None


def test_cifar10_batches_become_pictures(tmp_path):
    pictures = RNG.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = RNG.integers(0, 10, 60).tolist()
    files = {"train_lables.json": json.dumps(labels).encode()}
    for number in range(5):
        sink = io.BytesIO()
        batch = pictures[number * 12 : number * 12 + 12].reshape(12, 1024, 3)
        Image.fromarray(batch).save(sink, "PNG")
        files[f"data_batch_{number + 1}.png"] = sink.getvalue()
    found, their = cifar10(archive(tmp_path / "a.tgz", files), "train")
    np.testing.assert_array_equal(found, pictures)
    assert their.tolist() == labels
    with pytest.raises(DeclipError, match=r"a\.tgz has no file 'test_batch\.png'"):
        cifar10(tmp_path / "a.tgz", "test")


def test_mnist_is_read_from_idx_files(tmp_path):
    pictures = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = RNG.integers(0, 10, 7, dtype=np.uint8)
    names = ("data/t10k-images-idx3-ubyte", "data/t10k-labels-idx1-ubyte")
    place = archive(tmp_path / "m.tgz", dict(zip(names, map(idx, (pictures, labels)), strict=True)))
    found, their = mnist(place, "test")
    np.testing.assert_array_equal(found, pictures)
    np.testing.assert_array_equal(their, labels)


@pytest.mark.parametrize("data", [b"", b"\0\0\x08\x01", idx(np.zeros(9, np.uint8))[:-1], b"P5 9 9"])
def test_a_cut_idx_file_is_refused(data):
    with pytest.raises(DeclipError, match="no whole IDX file"):
        idx_array(data)


def test_pairs_are_those_of_the_split_with_all_captions_of_a_picture(tmp_path):
    store = write_fake_dataset(str(tmp_path / "data"), num_shards=2, samples_per_shard=6)
    rows = sidecars.read_rows(store, layout.shard_parquet_path("00001"))
    data = write_pairs(tmp_path, store.root, "test")
    assert data.kind == "retrieval"
    assert sorted(data.captions or []) == sorted((row["caption"],) for row in rows)
    again = write_pairs(tmp_path, store.root, "test")
    assert again.digest() == data.digest()
    with pytest.raises(DeclipError, match="no sample of split 'validation'"):
        write_pairs(tmp_path, store.root, "validation")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sets", "cifar"], "--sets has 'cifar'.*cifar10"),
        (["--sets", "pairs"], "give both or neither"),
        (["--sets", "digits", "--pairs", "data"], "give both or neither"),
    ],
)
def test_wrong_options_are_refused(words, sentence):
    with pytest.raises(DeclipError, match=sentence):
        parse(["out", *words])
