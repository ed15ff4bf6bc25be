"""Pictures a second and core, from JPEG bytes to views of 224 pixels in a batch of bytes.

    python benchmarks/decoding_views.py FOLDER [--count 96] [--rounds 5] [--sets NAME ...]
        [--json FILE]

FOLDER holds photographs; benchmarks/loader_pictures.py says how the sets are made of them. Ways, in
turn on the same pictures, boxes and flips, all on one thread:

* native, python: declip_pixels' two ways, whose bytes are compared here once more;
* pillow: decode once, then crop, resize (bicubic, which is antialiased) and mirror each view;
* opencv: the same with cv2, INTER_AREA where a crop is shrunk and INTER_CUBIC where it is enlarged:
  fewer taps, not the same pixels.

Crops as RandomResizedCrop draws them, of a share of the area from 0.9 (open_clip) or 0.08 (SLIP,
Inception) to 1; then evaluation's view, the shorter side resized and the middle cut out, which
Pillow's way makes as open_clip does. Processor time of this process, user and system, by getrusage;
the least of some rounds, batches of 32.
"""

import argparse
import io
import json
import math
import resource
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

import loader_pictures
from declip_pixels import decode_center_views, decode_views, image_sizes
from declip_pixels.decoding import Decoder
from declip_pixels.resampling import center_window

SIZE = 224
BATCH = 32
Way = Literal["native", "python", "pillow", "opencv"]
WAYS: tuple[Way, ...] = ("native", "python", "pillow", "opencv")


def draw_boxes(generator: np.random.Generator, sizes: np.ndarray, least: float) -> np.ndarray:
    """(n, 4) top, left, height, width: shares of the area in [least, 1], aspects in [3/4, 4/3]."""
    boxes = []
    for height, width in sizes.tolist():
        rows, columns = height + 1, width + 1
        while rows > height or columns > width:
            area = generator.uniform(least, 1) * height * width
            aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        top = generator.integers(height - rows + 1)
        left = generator.integers(width - columns + 1)
        boxes.append((top, left, rows, columns))
    return np.array(boxes, np.int32)


def by_pillow(data: list[bytes], boxes: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
    """Views with Pillow alone."""
    for index, item in enumerate(data):
        image = Image.open(io.BytesIO(item)).convert("RGB")
        for view in range(len(out)):
            top, left, height, width = boxes[view, index].tolist()
            cut = image.crop((left, top, left + width, top + height))
            cut = cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            if flips[view, index]:
                cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            out[view, index] = np.asarray(cut)


def by_opencv(data: list[bytes], boxes: np.ndarray, flips: np.ndarray, out: np.ndarray) -> None:
    """Views with OpenCV alone."""
    for index, item in enumerate(data):
        image = cv2.imdecode(np.frombuffer(item, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert image is not None
        for view in range(len(out)):
            top, left, height, width = boxes[view, index].tolist()
            method = cv2.INTER_AREA if min(height, width) >= SIZE else cv2.INTER_CUBIC
            cut = image[top : top + height, left : left + width]
            cut = cv2.resize(cut, (SIZE, SIZE), interpolation=method)
            out[view, index] = cut[:, ::-1] if flips[view, index] else cut


def centers(way: Decoder | Literal["pillow"], data: list[bytes], out: np.ndarray) -> None:
    """Evaluation's views, one way."""
    if way != "pillow":
        failures = decode_center_views(data, SIZE, out, decoder=way)
        assert not any(failures), failures
        return
    for index, item in enumerate(data):
        image = Image.open(io.BytesIO(item)).convert("RGB")
        window = center_window(image.height, image.width, SIZE)
        whole = image.resize((window.width, window.height), Image.Resampling.BICUBIC)
        box = (window.left, window.top, window.left + SIZE, window.top + SIZE)
        out[index] = np.asarray(whole.crop(box))


def measure_centers(data: list[bytes], rounds: int) -> dict[str, object]:
    """Pictures a second of evaluation's view, and how far it is from Pillow's."""
    made: dict[str, np.ndarray] = {}
    best: dict[str, float] = {}
    ways: tuple[Decoder | Literal["pillow"], ...] = ("native", "python", "pillow")
    for number in range(rounds):
        for way in ways:
            if way == "python" and number:
                continue
            out = made.setdefault(way, np.empty((len(data), SIZE, SIZE, 3), np.uint8))
            began = processor_seconds()
            centers(way, data, out)
            best[way] = min(best.get(way, math.inf), processor_seconds() - began)
    apart = np.abs(made["native"].astype(np.int16) - made["pillow"])
    return {
        "view": "center",
        **{way: round(len(data) / seconds) for way, seconds in best.items()},
        "equal": np.array_equal(made["native"], made["python"]),
        "most_from_pillow": int(apart.max()),
        "share_from_pillow": round(float((apart > 0).mean()), 4),
    }


def make(
    way: Way, data: list[bytes], boxes: np.ndarray, flips: np.ndarray, out: np.ndarray
) -> None:
    """All views, one way, in batches."""
    for start in range(0, len(data), BATCH):
        part = slice(start, start + BATCH)
        now = (boxes[:, part], flips[:, part])
        room = out[:, : len(data[part])]
        if way == "pillow":
            by_pillow(data[part], *now, room)
        elif way == "opencv":
            by_opencv(data[part], *now, room)
        else:
            whole = np.ascontiguousarray(room)
            failures = decode_views(data[part], *now, SIZE, whole, decoder=way)
            assert not any(failures), failures


def processor_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def equal_ways(data: list[bytes], boxes: np.ndarray, flips: np.ndarray) -> bool:
    """Whether the native and the Python way give the same bytes."""
    shape = (len(boxes), len(data), SIZE, SIZE, 3)
    native, python = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    decode_views(data, boxes, flips, SIZE, native, decoder="native")
    decode_views(data, boxes, flips, SIZE, python, decoder="python")
    return np.array_equal(native, python)


def measure(data: list[bytes], rounds: int) -> list[dict[str, object]]:
    """Pictures a second of every way, by least share of the area and number of views."""
    generator = np.random.default_rng(0)
    sizes = image_sizes(data)
    rows: list[dict[str, object]] = []
    for least in (0.9, 0.08):
        for views in (1, 2):
            boxes = np.stack([draw_boxes(generator, sizes, least) for _ in range(views)])
            flips = generator.random((views, len(data))) < 0.5
            # Allocated once, as a loader's batches are.
            out = np.empty((views, BATCH, SIZE, SIZE, 3), np.uint8)
            best = dict.fromkeys(WAYS, math.inf)
            for number in range(rounds):
                for way in WAYS:
                    if way == "python" and number:
                        continue  # the slow one: once will do
                    began = processor_seconds()
                    make(way, data, boxes, flips, out)
                    best[way] = min(best[way], processor_seconds() - began)
            rows.append(
                {
                    "least_area": least,
                    "views": views,
                    **{way: round(len(data) / best[way]) for way in WAYS},
                    "equal": equal_ways(data[:BATCH], boxes[:, :BATCH], flips[:, :BATCH]),
                }
            )
    return rows


def main() -> None:
    """Measure the sets that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", default=list(loader_pictures.SETS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    files = sorted(path for path in options.folder.rglob("*") if path.suffix in (".jpg", ".jpeg"))
    results: dict[str, object] = {}
    for name in options.sets:
        data: list[bytes] = []
        for path in files:
            made = loader_pictures.pictures([(path.read_bytes(), "")], name)
            data += [picture for picture, _ in made]
            if len(data) >= options.count:
                break
        data = data[: options.count]
        kilobytes = round(sum(map(len, data)) / len(data) / 1000)
        rows = [*measure(data, options.rounds), measure_centers(data, options.rounds)]
        results[name] = {"pictures": len(data), "kilobytes": kilobytes, "rows": rows}
        print(f"{name}: {len(data)} pictures of {kilobytes} KB; pictures a second and core")
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
