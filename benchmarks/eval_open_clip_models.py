"""open_clip's models through `declip eval`, held against open_clip itself.

``python benchmarks/eval_open_clip_models.py --peers PYTHON --pairs FOLDER``, where PYTHON is of an
environment with open_clip 3.3 with torchvision, timm and transformers, and with what `declip eval`
imports; FOLDER has pairs.parquet and its pictures. One or more models of every family that
open_clip lists, with random weights; nothing is fetched. Both sides read the same pictures, theirs
by Pillow and open_clip's own transform, ours by the decoder of training. Writes
results/eval-open-clip-models-cpu.json; fails where features lie apart by more than the limit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from surroundings import describe

LIMIT = 1e-3
"""Largest 1 - cosine of two features of one picture or text, as they are and less their mean."""

PIXEL_LIMIT = 1.5
"""Largest difference of a pixel, of 255: views are whole numbers, one way may round the other."""

SOURCES = {"met-museum": 2, "tuxpaint-stamps": 2, "grocery-store": 1, "wallpapers": 1, "icons": 1}
SOURCES |= {"manual-figures": 1, "cifar10-train": 1, "art4apps": 1}
"""Photographs, paintings, drawings and icons, JPEG and PNG, 32 to 512 pixels; the classes."""

ROOT = Path(__file__).parents[1]
PEER = Path(__file__).with_name("eval_open_clip_models_peer.py")


def copy_pictures(pairs: Path, folder: Path) -> int:
    """Some pictures of each source, as a set of folders of classes."""
    table = pq.read_table(pairs / "pairs.parquet", columns=["path", "source"]).to_pylist()
    taken: Counter[str] = Counter()
    for row in sorted(table, key=lambda row: str(row["path"])):
        if taken[row["source"]] < SOURCES.get(row["source"], 0):
            taken[row["source"]] += 1
            place = folder / "test" / row["source"]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(pairs / row["path"], place)
    if taken != Counter(SOURCES):
        raise SystemExit(f"{pairs} lacks pictures of {sorted(Counter(SOURCES) - taken)}.")
    return taken.total()


def agrees(answer: dict[str, Any]) -> bool:
    """Whether a model's features are open_clip's."""
    if "error" in answer:
        return False
    apart = [*answer["images"].values(), *answer["texts"].values()]
    return bool(max(apart) <= LIMIT and answer["pixels_largest"] <= PIXEL_LIMIT)


def show(answer: dict[str, Any]) -> None:
    if "error" in answer:
        print(f"{answer['model']:34} {answer['error']}")
        return
    print(
        f"{answer['model']:34} {answer['towers']:12} pixels {answer['pixels_largest']:.2f}  "
        f"pictures {max(answer['images'].values()):.1e}  texts {max(answer['texts'].values()):.1e}"
        f"  same predictions {answer['same_predictions']:.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--pairs", type=Path, required=True, help="folder with pairs.parquet")
    parser.add_argument("--models", nargs="*", default=[], help="of the families; else all")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        pictures, work = Path(name, "pictures"), Path(name, "work")
        work.mkdir()
        num_pictures = copy_pictures(given.pairs, pictures)
        # The peers' environment has open_clip; our own code comes from this checkout.
        ours = [*(str(path) for path in sorted(ROOT.glob("packages/*/src"))), str(ROOT)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(ours)}
        command = [given.peers, str(PEER), str(pictures), str(work), *given.models]
        subprocess.run(command, check=True, env=environment)
        lines = (work / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        more = json.loads((work / "more.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in lines]
    for answer in answers:
        show(answer)
    for what, sentence in more["refusals"].items():
        print(f"{what}: {sentence}")
    failed = [answer["model"] for answer in answers if not agrees(answer)]
    print(f"{len(answers) - len(failed)} of {len(answers)} agree; others: {failed}")
    content = {
        "surroundings": describe(["numpy", "torch", "pillow"]),
        "peer_versions": more["versions"],
        "pictures": num_pictures,
        "limits": {"cosine": LIMIT, "pixels": PIXEL_LIMIT},
        "models": answers,
        "refusals": more["refusals"],
    }
    path = Path(given.out) / "eval-open-clip-models-cpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if failed or not all(more["refusals"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
