"""Both ways give equal bytes, and those that the law says."""

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile

from declip_pixels import (
    decode_center_views,
    decode_pictures,
    decode_views,
    image_sizes,
    resize_views,
    views_to_planes,
)
from declip_pixels.compiled import CompiledPart, compiled_part
from declip_pixels.decoding import Decoder
from declip_pixels.resampling import resize, resize_center
from declip_shards import DeclipError

ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 1 << 22)  # Pillow's room for what it encodes
SIZE = 19
WAYS: tuple[Decoder, ...] = ("native", "python")


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """Slow colors and sharp lines, as photographs have them."""
    rows, columns = np.mgrid[:height, :width]
    planes = [rows * 3 + columns, columns * 5, np.hypot(rows - 9, columns - 20) * 8]
    return np.stack(planes, axis=-1).astype(np.int64).astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], mode: str = "RGB", **options: object) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(sink, "JPEG", **({"quality": 85} | options))
    return sink.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker of cameras"
    return exif


def random_boxes(sizes: NDArray[np.int32], views: int, seed: int) -> NDArray[np.int32]:
    """Any boxes within pictures; of unreadable ones some."""
    generator = np.random.default_rng(seed)
    boxes = np.ones((views, len(sizes), 4), np.int32)
    for view, index in product(range(views), range(len(sizes))):
        height, width = np.maximum(sizes[index], 1).tolist()
        rows, columns = generator.integers(1, height + 1), generator.integers(1, width + 1)
        top, left = generator.integers(height - rows + 1), generator.integers(width - columns + 1)
        boxes[view, index] = top, left, rows, columns
    return boxes


def views_of(
    data: list[bytes], boxes: NDArray[np.int32], decoder: Decoder, num_threads: int = 1
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """Views, every other one mirrored, and failures."""
    out = np.full((*boxes.shape[:2], SIZE, SIZE, 3), 77, np.uint8)
    flips = np.indices(boxes.shape[:2]).sum(axis=0) % 2 == 1
    failures = decode_views(data, boxes, flips, SIZE, out, num_threads=num_threads, decoder=decoder)
    return out, failures


def centers_of(
    data: list[bytes], decoder: Decoder, size: int = SIZE, num_threads: int = 1
) -> tuple[NDArray[np.uint8], list[str | None]]:
    """Evaluation's views, and failures."""
    out = np.full((len(data), size, size, 3), 77, np.uint8)
    return out, decode_center_views(data, size, out, num_threads=num_threads, decoder=decoder)


def assert_equal_centers(data: list[bytes]) -> list[str | None]:
    """Both ways, with and without vectors; returns the failures."""
    native = compiled_part()
    assert isinstance(native, CompiledPart), native
    (one, one_failed), (two, two_failed) = (centers_of(data, way) for way in WAYS)
    assert one_failed == two_failed
    assert np.array_equal(one, two)
    plain = np.zeros_like(one)
    done = native.center_views(data, plain, 1, vectors=False)
    assert np.array_equal(plain[done], two[done])
    return one_failed


def assert_equal_ways(data: list[bytes], seed: int = 0) -> int:
    """Both ways, with and without vectors; returns how many pictures could be read."""
    native = compiled_part()
    assert isinstance(native, CompiledPart), native
    sizes = image_sizes(data, decoder="native")
    assert np.array_equal(sizes, image_sizes(data, decoder="python"))
    boxes = random_boxes(sizes, 2, seed)
    (one, one_failed), (two, two_failed) = (views_of(data, boxes, way) for way in WAYS)
    assert one_failed == two_failed
    assert np.array_equal(one, two)
    plain = np.zeros_like(one)
    flips = np.indices(boxes.shape[:2]).sum(axis=0) % 2 == 1
    done = native.views(data, boxes, flips, plain, 1, vectors=False)
    assert np.array_equal(plain[:, done], two[:, done])
    for whole, other in zip(*(decode_pictures(data, decoder=way) for way in WAYS), strict=True):
        assert type(whole) is type(other)
        assert np.array_equal(whole, other)
    # What cannot be decoded has no view of any kind, and for the same reason.
    assert assert_equal_centers(data) == one_failed
    return sum(failure is None for failure in one_failed)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_ways_are_equal_on_jpegs(subsampling: int, progressive: bool) -> None:
    kind: dict[str, Any] = {"subsampling": subsampling, "progressive": progressive}
    data = [
        jpeg(noise(75, 100), **(kind | {"quality": 95})),
        jpeg(noise(64, 33), "L", **kind),
        jpeg(noise(50, 61), restart_marker_blocks=3, **kind),
        jpeg(noise(17, 90), "CMYK", **kind),
        jpeg(noise(1, 1), **kind),
        jpeg(noise(2, 95), **(kind | {"quality": 1})),
        *(jpeg(smooth(90, 121), exif=with_orientation(turn), **kind) for turn in range(10)),
    ]
    for seed in range(3):
        assert assert_equal_ways(data, seed) == len(data)


def test_compiled_part_does_the_plain_ones_itself() -> None:
    native = compiled_part()
    assert isinstance(native, CompiledPart), native
    data = [
        jpeg(smooth(60, 80), progressive=progressive, exif=with_orientation(turn))
        for progressive in (False, True)
        for turn in range(1, 9)
    ]
    boxes = random_boxes(image_sizes(data), 1, 0)
    out = np.zeros((1, len(data), SIZE, SIZE, 3), np.uint8)
    assert native.views(data, boxes, np.zeros((1, len(data)), np.bool_), out, 1).all()


@pytest.mark.parametrize("decoder", WAYS)
def test_a_view_is_the_crop_resized_and_mirrored(decoder: Decoder) -> None:
    data = [jpeg(smooth(120, 160)), jpeg(noise(40, 30), "L")]
    boxes = random_boxes(image_sizes(data), 4, 1)
    out, failures = views_of(data, boxes, decoder)
    assert failures == [None, None]
    for view, index in product(range(4), range(2)):
        whole = np.asarray(Image.open(io.BytesIO(data[index])).convert("RGB"))
        top, left, height, width = boxes[view, index]
        expected = resize(whole[top : top + height, left : left + width], SIZE)
        flipped = (view + index) % 2 == 1
        assert np.array_equal(out[view, index], expected[:, ::-1] if flipped else expected)


def test_ways_are_equal_on_other_formats() -> None:
    data = []
    for kind in ("PNG", "WEBP", "BMP", "GIF"):
        sink = io.BytesIO()
        Image.fromarray(noise(31, 47)).save(sink, kind)
        data.append(sink.getvalue())
    assert assert_equal_ways(data) == len(data)


def test_ways_are_equal_on_long_pictures() -> None:
    assert assert_equal_ways([jpeg(noise(2, 65_500)), jpeg(noise(65_500, 2))]) == 2


def test_ways_are_equal_on_damaged_files() -> None:
    generator = np.random.default_rng(0)
    seeds = [
        jpeg(noise(33, 47)),
        jpeg(noise(33, 47), progressive=True),
        jpeg(noise(33, 47), subsampling=0, exif=with_orientation(6)),
    ]
    data = []
    for _ in range(250):
        damaged = bytearray(seeds[generator.integers(len(seeds))])
        for _ in range(generator.integers(1, 4)):
            place = int(generator.integers(len(damaged)))
            chance = generator.random()
            if chance < 0.6:
                damaged[place] = int(generator.integers(256))
            elif chance < 0.8:
                del damaged[place : place + int(generator.integers(1, 40))]
            else:
                damaged[place:place] = generator.bytes(3)
        data.append(bytes(damaged))
    assert 50 < assert_equal_ways(data) < 250


def test_a_file_without_tables_does_not_get_those_of_the_one_before() -> None:
    whole = jpeg(noise(40, 40))
    start = whole.index(b"\xff\xdb")
    length = int.from_bytes(whole[start + 2 : start + 4], "big")
    without = whole[:start] + whole[start + 2 + length :]
    assert_equal_ways([whole, without, whole])
    assert decode_pictures([without])[0] == decode_pictures([whole, without])[1]


@pytest.mark.parametrize("decoder", WAYS)
def test_rows_stand_beside_failed_ones_which_are_black(decoder: Decoder) -> None:
    good = [jpeg(smooth(50, 60)), jpeg(noise(30, 30))]
    boxes = random_boxes(image_sizes(good), 2, 0)
    alone, _ = views_of(good, boxes, decoder)
    data = [good[0], b"junk", good[0][:-40], good[1], b""]
    outside = [[0, 0, 51, 60]] * 2
    mixed = np.stack([boxes[:, 0], boxes[:, 0], boxes[:, 0], boxes[:, 1], outside], axis=1).astype(
        np.int32
    )
    data[4:] = [b"", good[0]]
    mixed = np.concatenate([mixed, np.array(outside, np.int32)[:, None]], axis=1)
    out, failures = views_of(data, mixed, decoder)
    assert failures == [
        None,
        "it is no picture, or one cut off in its header",
        "its file is cut off",
        None,
        "its file is empty",
        "the box of 51 x 60 pixels (height x width) at row 0, column 0 does not lie in the picture "
        "of 50 x 60",
    ]
    assert np.array_equal(out[:, 0], alone[:, 0])
    assert (out[:, [1, 2, 4, 5]] == 0).all()


@pytest.mark.parametrize("decoder", WAYS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_center_view_is_the_middle_of_the_whole_picture(decoder: Decoder, size: int) -> None:
    data = [
        jpeg(smooth(120, 160)),
        jpeg(smooth(161, 90), progressive=True),
        jpeg(noise(40, 30), "L", subsampling=0),
        jpeg(noise(3, 250)),
    ]
    out, failures = centers_of(data, decoder, size)
    assert failures == [None] * 4
    for item, view in zip(data, out, strict=True):
        whole = np.asarray(Image.open(io.BytesIO(item)).convert("RGB"))
        assert np.array_equal(view, resize_center(whole, size))


@pytest.mark.parametrize("decoder", WAYS)
def test_center_views_do_not_turn_pictures(decoder: Decoder) -> None:
    data = [jpeg(smooth(50, 80), exif=with_orientation(turn)) for turn in range(1, 9)]
    out, failures = centers_of(data, decoder)
    assert failures == [None] * 8
    assert (out == out[0]).all()


@pytest.mark.parametrize("decoder", WAYS)
def test_center_views_stand_beside_failed_ones_which_are_black(decoder: Decoder) -> None:
    good = [jpeg(smooth(50, 60)), jpeg(noise(30, 30)), jpeg(noise(9, 70))]
    alone, _ = centers_of(good, decoder)
    mixed = [good[0], b"junk", good[0][:-40], good[1], b"", good[2]]
    for threads in (1, 3):
        out, failures = centers_of(mixed, decoder, num_threads=threads)
        assert failures == [
            None,
            "it is no picture, or one cut off in its header",
            "its file is cut off",
            None,
            "its file is empty",
            None,
        ]
        assert np.array_equal(out[[0, 3, 5]], alone)
        assert (out[[1, 2, 4]] == 0).all()


@pytest.mark.parametrize("decoder", WAYS)
def test_planes_are_looked_up(decoder: Decoder) -> None:
    generator = np.random.default_rng(0)
    views = generator.integers(0, 256, (3, 6, 5, 3), np.uint8)
    tables = generator.standard_normal((3, 256)).astype(np.float32)
    tables[1, 7], tables[2, 9], tables[0, 3] = np.nan, -0.0, np.inf
    out = np.full((4, 3, 6, 5), 5, np.float32)
    sources, targets = np.array([2, 0, 2]), np.array([3, 1, 0])
    views_to_planes(views, tables, out, sources=sources, targets=targets, decoder=decoder)
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        for channel in range(3):
            wanted = tables[channel][views[source, :, :, channel]]
            assert np.array_equal(out[target, channel].view(np.int32), wanted.view(np.int32))
    assert (out[2] == 5).all()
    whole = np.empty((3, 3, 6, 5), np.float32)
    views_to_planes(views, tables, whole, decoder=decoder)
    assert np.array_equal(whole[2], out[3], equal_nan=True)
    views_to_planes(views[:0], tables, whole[:0], decoder=decoder)


def test_planes_that_do_not_fit_are_refused() -> None:
    views, tables = np.zeros((2, 4, 5, 3), np.uint8), np.zeros((3, 256), np.float32)
    out = np.zeros((2, 3, 4, 5), np.float32)
    some = np.array([0, 2])
    with pytest.raises(DeclipError, match=r"height, width, 3\), not uint8 of shape \(2, 4, 5\)"):
        views_to_planes(views[..., 0], tables, out)
    with pytest.raises(DeclipError, match=r"shape \(3, 256\), not float32 of shape \(3, 255\)"):
        views_to_planes(views, tables[:, 1:], out)
    with pytest.raises(DeclipError, match=r"shape \(n, 3, 4, 5\), not to float32 of shape"):
        views_to_planes(views, tables, out.transpose(0, 1, 3, 2))
    with pytest.raises(DeclipError, match="must be contiguous"):
        views_to_planes(views[:, :, ::-1], tables, out)
    with pytest.raises(DeclipError, match="there are 2 views, 0 to 1, so not all of 0 to 2"):
        views_to_planes(views, tables, out, sources=some)
    with pytest.raises(DeclipError, match="there are 2 planes, 0 to 1, so not all of 0 to 2"):
        views_to_planes(views, tables, out, targets=some)
    with pytest.raises(DeclipError, match=r"\(1,\) views cannot go to \(2,\) places"):
        views_to_planes(views, tables, out, sources=some[:1], targets=some)


@pytest.mark.parametrize("decoder", WAYS)
def test_threads_and_company_change_nothing(decoder: Decoder) -> None:
    data = [jpeg(noise(20 + 7 * index, 90 - 5 * index, index)) for index in range(9)]
    data[4] = b"junk"
    boxes = random_boxes(image_sizes(data), 2, 0)
    one, failed = views_of(data, boxes, decoder)
    four, failed_too = views_of(data, boxes, decoder, num_threads=4)
    assert failed == failed_too
    assert np.array_equal(one, four)
    pictures = decode_pictures(data, 4, decoder=decoder)
    for index, item in enumerate(data):
        assert np.array_equal(pictures[index], decode_pictures([item], decoder=decoder)[0])


@pytest.mark.parametrize("decoder", WAYS)
def test_kept_pictures_give_the_same_views(decoder: Decoder) -> None:
    data = [jpeg(smooth(70, 50), exif=with_orientation(8))]
    boxes = random_boxes(image_sizes(data), 3, 2)
    expected, _ = views_of(data, boxes, decoder)
    (picture,) = decode_pictures(data)
    assert isinstance(picture, np.ndarray)
    out = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    flips = np.array([False, True, False])
    for kept in (picture, np.asfortranarray(picture)):
        resize_views(kept, boxes[:, 0], flips, SIZE, out, decoder=decoder)
        assert np.array_equal(out, expected[:, 0])
    with pytest.raises(DeclipError, match=r"does not lie in the picture of 50 x 70; draw boxes"):
        resize_views(picture, boxes[:, 0] + 70, flips, SIZE, out, decoder=decoder)


def test_no_pictures_at_all() -> None:
    assert image_sizes([]).shape == (0, 2)
    assert decode_pictures([]) == []
    assert views_of([], np.zeros((2, 0, 4), np.int32), "auto")[1] == []
    assert centers_of([], "auto")[1] == []


def test_refusals() -> None:
    data, flips = [jpeg(noise(9, 9))], np.zeros((1, 1), np.bool_)
    boxes, out = np.zeros((1, 1, 4), np.int32), np.zeros((1, 1, 5, 5, 3), np.uint8)
    with pytest.raises(DeclipError, match="no decoder 'fast'; take auto, native or python"):
        decode_views(data, boxes, flips, 5, out, decoder="fast")  # type: ignore[arg-type]
    with pytest.raises(DeclipError, match=r"of shape \(1, 1, 6, 6, 3\), not to one of uint8"):
        decode_views(data, boxes, flips, 6, out)
    with pytest.raises(DeclipError, match="the least size is 1"):
        decode_views(data, boxes, flips, 0, out)
    with pytest.raises(DeclipError, match="the least size is 1"):
        decode_center_views(data, 0, out[0])
    with pytest.raises(DeclipError, match=r"of shape \(1, 6, 6, 3\), not to one of uint8"):
        decode_center_views(data, 6, out[0])
    with pytest.raises(DeclipError, match=r"need boxes of shape \(1, 1, 4\)"):
        decode_views(data, boxes[:, :, :3], flips, 5, out)
    with pytest.raises(DeclipError, match="not float64 of shape"):
        resize_views(np.zeros((4, 4, 3)), boxes[:, 0], flips[:, 0], 5, out[:, 0])  # type: ignore[arg-type]


def test_without_a_compiler_python_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from declip_pixels import compiled, decoding

    monkeypatch.setattr(decoding, "compiled_part", lambda: "there is no C++ compiler")
    compiled.say_once.cache_clear()
    data = [jpeg(noise(30, 40))]
    boxes = random_boxes(image_sizes(data), 1, 0)
    out, failures = views_of(data, boxes, "auto")
    assert failures == [None]
    assert np.array_equal(out, views_of(data, boxes, "python")[0])
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "pixels: decoding in Python, slower with equal results: there is no C++ compiler"
    ]
    with pytest.raises(DeclipError, match="cannot be had: there is no C\\+\\+ compiler; mend that"):
        views_of(data, boxes, "native")
    compiled.say_once.cache_clear()
