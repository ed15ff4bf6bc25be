"""What models see of pictures, and the cache of it."""

import errno
import io
import os

import numpy as np
import pytest
from PIL import Image

from declip_shards import DeclipError
from declip_train.augment import IMAGE_MEAN, IMAGE_STD, eval_view
from pipelines.eval_views import Preparation, ViewCache

SIZE = 16


def encoded(width, height, seed=0, form="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, form)
    return sink.getvalue()


def prepare(**changes):
    return Preparation(**{"size": SIZE, "mean": IMAGE_MEAN, "std": IMAGE_STD, **changes})


IMAGES = [encoded(40, 30, 0), encoded(17, 60, 1, "JPEG"), encoded(SIZE, SIZE, 2), encoded(9, 5, 3)]
BROKEN = [IMAGES[0], b"no picture", "the file is gone", IMAGES[1][:99]]


def no_reading():
    raise AssertionError("the pictures are read again")


@pytest.mark.parametrize("threads", [1, 3])
def test_views_are_those_of_training_s_evaluation(threads):
    views, reasons = prepare().make(IMAGES, threads)
    assert (views.dtype, views.shape) == (np.uint8, (len(IMAGES), SIZE, SIZE, 3))
    assert reasons == [None] * len(IMAGES)
    for view, data in zip(views, IMAGES, strict=True):
        np.testing.assert_array_equal(view, eval_view(data, SIZE))


@pytest.mark.parametrize(
    "changes", [{}, {"resize_mode": "squash"}, {"resize_mode": "longest", "fill_color": 7}]
)
def test_what_is_no_picture_is_black_and_has_a_reason(changes):
    views, reasons = prepare(**changes).make(BROKEN, 2)
    assert [reason is None for reason in reasons] == [True, False, False, False]
    assert reasons[2] == "the file is gone"
    assert not views[1:].any()
    np.testing.assert_array_equal(views[:1], prepare(**changes).make(IMAGES[:1])[0])


def test_squash_is_one_resizing_of_the_whole():
    with Image.open(io.BytesIO(IMAGES[0])) as image:
        expected = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    (view,), _ = prepare(resize_mode="squash", interpolation="bilinear").make(IMAGES[:1])
    np.testing.assert_array_equal(view, expected)


def test_longest_keeps_everything_and_pads():
    (view,), _ = prepare(resize_mode="longest", fill_color=200).make([encoded(80, 40)])
    assert (view[:4] == 200).all()
    assert (view[12:] == 200).all()
    with Image.open(io.BytesIO(encoded(80, 40))) as image:
        inner = np.asarray(image.resize((SIZE, SIZE // 2), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(view[4:12], inner)


def test_bilinear_shortest_is_a_center_crop():
    (view,), _ = prepare(interpolation="bilinear").make([encoded(SIZE, 3 * SIZE)])
    with Image.open(io.BytesIO(encoded(SIZE, 3 * SIZE))) as image:
        np.testing.assert_array_equal(view, np.asarray(image)[SIZE : 2 * SIZE])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": 0}, "preprocess size is 0"),
        ({"interpolation": "nearest"}, "interpolation is 'nearest', but must be one of bicubic"),
        ({"resize_mode": "crop"}, "resize_mode is 'crop', but must be one of shortest"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\), but must be three finite numbers"),
        ({"std": (1.0, 1.0, float("nan"))}, "std is .* but must be three finite numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "std above 0 and at most 1"),
        ({"mean": (123.0, 117.0, 104.0)}, "divide values of 0 to 255 by 255"),
    ],
)
def test_what_pictures_cannot_be_prepared_by_is_refused(changes, sentence):
    with pytest.raises(DeclipError, match=sentence):
        prepare(**changes)


def test_views_come_back_without_a_picture_being_read(tmp_path):
    pictures = [*BROKEN[:2], b"", BROKEN[3]]
    expected = prepare().make(pictures)
    for number in range(2):
        # Every time another process.
        cache = ViewCache(tmp_path, "set", prepare(), 10**6)
        views, reasons = cache.get(0, 4, no_reading if number else lambda: pictures)
        np.testing.assert_array_equal(views, expected[0])
        assert reasons == expected[1]


def test_other_pictures_sizes_and_preparations_are_other_entries(tmp_path):
    ViewCache(tmp_path, "set", prepare(), 10**6).get(0, 4, lambda: IMAGES)
    read = []

    def reading():
        read.append(1)
        return IMAGES

    for digest, preparation in (
        ("other", prepare()),
        ("set", prepare(size=8)),
        ("set", prepare(resize_mode="squash")),
    ):
        ViewCache(tmp_path, digest, preparation, 10**6).get(0, 4, reading)
    assert len(read) == 3
    # Normalization comes after the views.
    same = prepare(mean=(0.5, 0.5, 0.5))
    ViewCache(tmp_path, "set", same, 10**6).get(0, 4, no_reading)


def test_a_picture_that_could_not_be_read_is_read_the_next_time(tmp_path):
    cache = ViewCache(tmp_path, "set", prepare(), 10**6)
    lost = "the connection is lost"
    assert cache.get(0, 2, lambda: [IMAGES[0], lost])[1] == [None, lost]
    assert cache.get(0, 2, lambda: IMAGES[:2])[1] == [None, None]
    cache.get(0, 2, no_reading)


@pytest.mark.parametrize("harm", ["cut", "mark", "reasons", "other reasons"])
def test_what_a_kill_leaves_is_made_again(tmp_path, harm):
    cache = ViewCache(tmp_path, "set", prepare(), 10**6)
    expected = np.array(cache.get(0, 4, lambda: IMAGES)[0])
    (views,), (reasons,) = tmp_path.rglob("*.npy"), tmp_path.rglob("*.json")
    if harm == "cut":
        views.write_bytes(views.read_bytes()[:-100])
    elif harm == "other reasons":
        reasons.write_text('{"9": "there is no such picture"}')
    else:
        (views if harm == "mark" else reasons).unlink()
    found, _ = cache.get(0, 4, lambda: IMAGES)
    np.testing.assert_array_equal(found, expected)
    cache.get(0, 4, no_reading)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.npy"))


def test_sets_that_were_used_longest_ago_make_room(tmp_path):
    room = 2 * 4 * SIZE * SIZE * 3 + 2000
    for number in range(3):
        cache = ViewCache(tmp_path, f"set {number}", prepare(), room)
        cache.get(0, 4, lambda: IMAGES)
        assert size_of(tmp_path) <= room
        for age, folder in enumerate(sorted(tmp_path.iterdir(), key=os.path.getmtime)):
            os.utime(folder, (age, age))
    ViewCache(tmp_path, "set 2", prepare(), room).get(0, 4, no_reading)
    ViewCache(tmp_path, "set 1", prepare(), room).get(0, 4, no_reading)
    with pytest.raises(AssertionError, match="read again"):
        ViewCache(tmp_path, "set 0", prepare(), room).get(0, 4, no_reading)


def test_a_set_larger_than_the_room_keeps_what_fits(tmp_path):
    room = 4 * SIZE * SIZE * 3 + 1000
    cache = ViewCache(tmp_path, "set", prepare(), room)
    for start in (0, 4, 8):
        cache.get(start, start + 4, lambda: IMAGES)
    assert 0 < size_of(tmp_path) <= room
    cache.get(0, 4, no_reading)


def test_what_does_not_fit_drops_no_other_set(tmp_path):
    room = 4 * SIZE * SIZE * 3 + 1000
    ViewCache(tmp_path, "other", prepare(), room).get(0, 4, lambda: IMAGES)
    ViewCache(tmp_path, "set", prepare(), room).get(0, 8, lambda: IMAGES * 2)
    ViewCache(tmp_path, "other", prepare(), room).get(0, 4, no_reading)


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_processes_that_drop_each_others_sets_go_on(tmp_path, monkeypatch, error):
    expected = prepare().make(IMAGES)[0]
    cache = ViewCache(tmp_path, "set", prepare(), 10**6)

    def write(path, data):
        # Another process made room: before the file was written, or while its folder was made.
        raise error(str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.eval_views.atomic_write", write)
        np.testing.assert_array_equal(cache.get(0, 4, lambda: IMAGES)[0], expected)
    cache.get(0, 4, lambda: IMAGES)
    cache.get(0, 4, no_reading)


def test_a_disk_without_room_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def flush(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = ViewCache(tmp_path, "set", prepare(), 10**6)
    with monkeypatch.context() as patch:
        patch.setattr("declip_shards.store.os.fsync", flush)
        with pytest.raises(DeclipError, match=r"kept in .*No space left.*set its limit to 0"):
            cache.get(0, 4, lambda: IMAGES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    cache.get(0, 4, lambda: IMAGES)
    cache.get(0, 4, no_reading)


def test_processes_keep_to_the_limit_together(tmp_path):
    room = 20 * 4 * SIZE * SIZE * 3
    caches = [ViewCache(tmp_path, "set", prepare(), room) for _ in range(3)]
    for start in range(0, 240, 4):
        caches[start // 4 % 3].get(start, start + 4, lambda: IMAGES)
    assert 0.7 * room < size_of(tmp_path) <= 1.1 * room


def test_no_room_keeps_nothing_and_less_than_none_is_refused(tmp_path):
    ViewCache(tmp_path, "set", prepare(), 0).get(0, 4, lambda: IMAGES)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DeclipError, match="limited to -1 bytes; give 0"):
        ViewCache(tmp_path, "set", prepare(), -1)
