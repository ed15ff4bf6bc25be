"""Seconds of a whole zero-shot evaluation: ours, with nothing kept and again, beside open_clip's.

    python -m venv PEERS
    PEERS/bin/pip install torch==2.13.0 torchvision==0.28.0 open_clip_torch==3.3.0
    python benchmarks/zeroshot.py --peers PEERS/bin/python [--rounds 3] [--threads 2]

2,000 real photographs and paintings of the demo's packages (shorter side 256, JPEG of quality 90;
of large ones their parts, too), in a folder for each of 100 classes; 100 of ImageNet's class names
by CLIP's 80 prompts; one small model (ViT-B/32 at a quarter of its width and a third of its depth,
224 pixels, weights drawn), whose one export both load. The labels mean nothing: what is compared
besides time is what every picture is taken for (untrained towers prefer a few classes for all
pictures, so this is told without each class's mean, too).

Each run is a process of its own, rounds take turns, and of each the best round counts, for others
may use the machine; the clocks start when packages and model are loaded. "cold" has an empty cache,
"again" finds the views of the cold run in it and encodes everything anew, as for the next
checkpoint of the same run. open_clip keeps nothing, so both are divided by the same. Both get the
same number of threads: ours decodes and encodes by so many; open_clip's torch has so many, and its
loader decodes in the process itself and, in other rounds, in so many worker processes, of which the
better counts.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from declip_eval.dataset_table import find_dataset
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.model_config import ModelConfig, TextConfig, VisionConfig
from declip_train.towers import CLIP

if TYPE_CHECKING:
    from benchmarks import surroundings
    from benchmarks.embed import package_pairs
else:
    import surroundings
    from embed import package_pairs

HERE = Path(__file__).parent
SHORT_SIDE, QUALITY = 256, 90
PARTS = (2, 3)
"""Of pictures that are so many times as large, so many by so many parts are pictures, too."""
CLASSES = 100
BATCH = 64
"""open_clip's default --batch-size."""
CACHE_BYTES = 4 * 10**9
PACKAGES_READ = ("torch", "numpy", "pillow", "opencv-python-headless")
MODEL = ModelConfig(
    embed_dim=128,
    vision=VisionConfig(image_size=224, patch_size=32, width=192, layers=4),
    text=TextConfig(width=128, heads=2, layers=4),
)


def windows(image: Image.Image) -> Iterator[Image.Image]:
    """The picture and, where it is large enough, its parts, scaled down; none is enlarged."""
    times = min(image.size) / SHORT_SIDE
    if times < 1:
        return
    boxes = [(0, 0, image.width, image.height)]
    for parts in PARTS:
        if times >= parts:
            width, height = image.width // parts, image.height // parts
            boxes += [
                (x * width, y * height, (x + 1) * width, (y + 1) * height)
                for y in range(parts)
                for x in range(parts)
            ]
    for left, top, right, bottom in boxes:
        scale = SHORT_SIDE / min(right - left, bottom - top)
        size = round((right - left) * scale), round((bottom - top) * scale)
        yield image.resize(size, Image.Resampling.LANCZOS, (left, top, right, bottom))


def make_set(folder: Path, number: int, cache: Path | None) -> dict[str, Any]:
    """Write the pictures, a folder for each class; returns what there is."""
    found: list[bytes] = []
    seen = set()
    for data, _ in package_pairs(cache):
        if data in seen:
            continue
        seen.add(data)
        for window in windows(Image.open(io.BytesIO(data)).convert("RGB")):
            sink = io.BytesIO()
            window.save(sink, "JPEG", quality=QUALITY)
            found.append(sink.getvalue())
    if len(found) < number:
        raise SystemExit(f"there are {len(found)} pictures; ask for at most so many.")
    # Neighbors are alike.
    order = np.random.default_rng(0).permutation(len(found))[:number]
    for place, row in enumerate(order.tolist()):
        path = folder / "test" / f"{place % CLASSES:03d}" / f"{place:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[row])
    size = sum(len(found[row]) for row in order.tolist()) / number
    return {"pictures": number, "mean_kilobytes": round(size / 1024, 1)}


def make_request(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What both sides are asked."""
    towers = CLIP(MODEL, generator=torch.Generator().manual_seed(0))
    export_open_clip(towers, None, work / "model", PreprocessSettings(), {"model": "small"})
    info = find_dataset("imagenet1k")
    assert info is not None
    return {
        "root": str(work / "set"),
        "model": str(work / "model"),
        "cache": str(work / "cache"),
        "cache_bytes": CACHE_BYTES,
        "classes": [names[0] for names in info.class_names[:CLASSES]],
        "templates": list(info.templates),
        "threads": given.threads,
        "batch": BATCH,
        "workers": 0,
        "scores": str(work / "scores.npy"),
    }


def run(python: str, script: str, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """One evaluation in a process of its own."""
    (work / "request.json").write_text(json.dumps(request))
    environment = {**os.environ, "OMP_NUM_THREADS": str(request["threads"])}
    if python != sys.executable:
        # The other environment has packages of its own.
        environment.pop("PYTHONPATH", None)
    command = [python, str(HERE / script), str(work / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{script}: {done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row["scores"] = np.load(request["scores"])
    return row


def measure(given: argparse.Namespace, work: Path) -> dict[str, list[dict[str, Any]]]:
    """All rounds of all runs."""
    request = make_request(given, work)
    rounds: dict[str, list[dict[str, Any]]] = {}

    def add(label: str, python: str, script: str, **more: Any) -> None:
        print(label, file=sys.stderr, flush=True)
        row = run(python, script, {**request, **more}, work)
        rounds.setdefault(label, []).append(row)

    for _ in range(given.rounds):
        shutil.rmtree(work / "cache", ignore_errors=True)
        add("ours, cold", sys.executable, "zeroshot_worker.py")
        add("ours, again", sys.executable, "zeroshot_worker.py")
        add("open_clip", given.peers, "zeroshot_peer.py")
        if given.threads > 1:
            label = f"open_clip, {given.threads} worker processes"
            add(label, given.peers, "zeroshot_peer.py", workers=given.threads)
    return rounds


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure the best round, and the parts of the round that took least of the
    processor."""
    quickest = min(rounds, key=lambda row: float(row["processor_seconds"]))
    return {
        "wall_seconds": round(min(row["wall_seconds"] for row in rounds), 2),
        "processor_seconds": round(quickest["processor_seconds"], 2),
        "by_part": {name: round(value, 2) for name, value in quickest["by_part"].items()},
        "acc1": quickest["acc1"],
    }


def summarize(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Best rounds; how many times as fast ours is as the better of open_clip's runs, in wall and in
    processor time; and how equal their answers are."""
    runs = {label: best(some) for label, some in rounds.items()}
    times: dict[str, dict[str, float]] = {}
    for label in ("ours, cold", "ours, again"):
        times[label] = {
            clock: round(
                min(row[clock] for name, row in runs.items() if name.startswith("open_clip"))
                / runs[label][clock],
                2,
            )
            for clock in ("wall_seconds", "processor_seconds")
        }
    return {
        "runs": runs,
        "times_open_clip": times,
        "equality": {
            label: compare(rounds[label][0]["scores"], rounds["open_clip"][0]["scores"])
            for label in times
        },
    }


def compare(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> dict[str, Any]:
    """How far similarities (pictures, classes) are from each other, beside how far classes are.

    Pixels may differ by one level of 256, which is where the difference comes from.
    """
    centered = [scores - scores.mean(axis=0) for scores in (ours, theirs)]
    return {
        "share_of_equal_predictions": float((ours.argmax(1) == theirs.argmax(1)).mean()),
        "share_of_equal_predictions_without_the_classes_means": float(
            (centered[0].argmax(1) == centered[1].argmax(1)).mean()
        ),
        "distinct_predictions_without_the_classes_means": len(set(centered[1].argmax(1).tolist())),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "deviation_between_classes": float(theirs.std(axis=1).mean()),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", required=True, help="Python of the peers' environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of either side")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--cache", type=Path, help="where fetched packages are kept")
    parser.add_argument("--work", type=Path, help="folder for the set; unset: a temporary one")
    parser.add_argument("--out", type=Path, default=HERE / "results/zeroshot-cpu.json")
    return parser.parse_args()


def main() -> None:
    given = parse()
    content: dict[str, Any] = {"surroundings": surroundings.describe(PACKAGES_READ)}
    content["settings"] = {name: getattr(given, name) for name in ("rounds", "threads")}
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        content["set"] = make_set(work / "set", given.pictures, given.cache)
        content |= summarize(measure(given, work))
    for label, row in content["runs"].items():
        print(
            f"{label:36} wall {row['wall_seconds']:7} s, processor {row['processor_seconds']:7} s"
        )
    print("times open_clip:", json.dumps(content["times_open_clip"]))
    print("equality:", json.dumps(content["equality"]))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
