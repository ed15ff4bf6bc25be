"""From tars to optimizer steps: images/s, share of waiting and FLOP utilization, beside open_clip.

    python benchmarks/end_to_end.py --device cuda --model ViT-B-32 --batch 1024 --steps 60

Both read the same tars (``--shards`` of somebody's, else JPEGs that this script draws: colored
noise of several scales, about as many bytes as photographs of their size) and train as their users
would: ours by ``python -m declip_train``, open_clip by ``python -m open_clip_train.main``, where
that can be imported. Rates are over the steps after the first third. Methods but clip have no peer.
The FLOPs of a sample are those of ours (captions without padding) for open_clip, too, so that its
utilization is to ours as its rate is.
"""

import argparse
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from surroundings import describe

SHARD_ROWS = 512
RATE = re.compile(r"Train Epoch.*Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+), ([\d.e+]+)/s")
WORDS = (
    "a",
    "red",
    "blue",
    "small",
    "old",
    "street",
    "house",
    "dog",
    "on",
    "the",
    "water",
    "stone",
)


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of noise at several scales, of quality 90."""
    pixels = np.zeros((height, width, 3), np.float32)
    for scale, strength in ((2, 12), (8, 25), (32, 50), (128, 60)):
        coarse = rng.normal(0, strength, (height // scale + 2, width // scale + 2, 3))
        lifted = np.stack(
            [
                np.asarray(
                    Image.fromarray(coarse[..., c].astype(np.float32)).resize(
                        (width, height), Image.Resampling.BICUBIC
                    )
                )
                for c in range(3)
            ],
            axis=-1,
        )
        pixels += lifted
    sink = io.BytesIO()
    Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def draw_shards(folder: Path, num_samples: int, width: int, height: int) -> float:
    """Tars of pictures and captions; returns the mean kilobytes of a picture."""
    rng, total = np.random.default_rng(0), 0
    folder.mkdir(parents=True)
    # Few pictures are drawn and each is used again under other keys: decoding costs the same.
    drawn = [picture(rng, width, height) for _ in range(min(num_samples, 256))]
    for shard in range((num_samples + SHARD_ROWS - 1) // SHARD_ROWS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in range(min(SHARD_ROWS, num_samples - shard * SHARD_ROWS)):
                number = shard * SHARD_ROWS + row
                data = drawn[number % len(drawn)]
                caption = " ".join(rng.choice(WORDS, rng.integers(5, 16)))
                for ending, content in (("jpg", data), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                total += len(data)
    return total / num_samples / 1024


def ours(given: argparse.Namespace, shards: Path, method: str, folder: Path) -> dict[str, Any]:
    """A training run; its log says the rest."""
    settings: dict[str, Any] = {
        "root": ".",
        "train_data": [tar_pattern(shards)],
        "selection": "",
        "model": given.model,
        "method": method,
        "neighbor_source": "bank",
        "global_batch_size": given.batch,
        "max_steps": given.steps,
        "warmup_steps": 2,
        "precision": given.precision,
        "compile": given.compile,
        "decoded_cache_megabytes": 0,
        "log_every_steps": max(1, given.steps // 12),
        "checkpoint_every_seconds": 3600.0,
        "cache": str(folder / "cache"),
    }
    if method == "clip":
        settings.pop("neighbor_source")
        # open_clip's own crops.
        settings |= {"augmentation": "light", "crop_scale_min": 0.9}
    (folder / "run" / "train").mkdir(parents=True)
    (folder / "run" / "config.json").write_text(json.dumps(settings))
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "declip_train", str(folder / "run" / "config.json")],
        capture_output=True,
        text=True,
        env={**os.environ, **({"DS_ACCELERATOR": "cpu"} if given.device == "cpu" else {})},
    )
    seconds = time.perf_counter() - began
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["no output"])[-1]}
    lines = (folder / "run" / "train" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    later = [r for r in records if r["step"] > given.steps / 3]

    def mean(name: str) -> float | None:
        values = [r[name] for r in later if r.get(name) is not None]
        return round(float(np.mean(values)), 4) if values else None

    return {
        "samples_per_second": round(
            len(later) / sum(1 / r["samples_per_second"] for r in later), 1
        ),
        "data_wait": mean("data_wait"),
        "flop_utilization": mean("flop_utilization"),
        "gpu_memory_gigabytes": mean("gpu_memory_gigabytes"),
        "time_shares": later[-1].get("time_shares"),
        "seconds_with_start": round(seconds, 1),
    }


def tar_pattern(shards: Path) -> str:
    """The tars of a folder in braces."""
    last = max(path.stem for path in shards.glob("*.tar"))
    return str(shards / f"{{{'0' * len(last)}..{last}}}.tar")


def peer_environment(given: argparse.Namespace) -> dict[str, str]:
    """open_clip's: packages of this Python's path are its own where it is the same Python."""
    environment = dict(os.environ)
    if given.peer_path:
        environment["PYTHONPATH"] = given.peer_path
    elif given.peer_python != sys.executable:
        environment.pop("PYTHONPATH", None)
    return environment


def compare_with_peer(results: dict[str, Any]) -> None:
    """Add open_clip's FLOP utilization, and ours in times its rate, where both trained."""
    mine, peer = results.get("clip", {}), results["open_clip"]
    rates = [found.get("samples_per_second") for found in (mine, peer)]
    if not all(rates):
        return
    results["times_open_clip"] = round(rates[0] / rates[1], 2)
    if mine.get("flop_utilization") is not None:
        peer["flop_utilization"] = round(mine["flop_utilization"] * rates[1] / rates[0], 4)


def open_clip(given: argparse.Namespace, shards: Path, folder: Path) -> dict[str, Any]:
    """open_clip's own training of the same model on the same tars."""
    samples = given.batch * given.steps
    words = [given.peer_python, "-m", "open_clip_train.main"]
    words += ["--train-data", tar_pattern(shards), "--dataset-type", "webdataset"]
    words += ["--train-num-samples", str(samples), "--epochs", "1", "--warmup", "2"]
    words += ["--model", given.peer_model, "--batch-size", str(given.batch)]
    words += ["--precision", given.precision, "--workers", str(given.peer_workers)]
    words += ["--log-every-n-steps", "1", "--logs", str(folder), "--name", "peer", "--seed", "0"]
    words += ["--dataset-resampled", "--device", given.device, "--save-frequency", "0"]
    words += ["--torchcompile"] if given.compile else []
    run = subprocess.run(words, capture_output=True, text=True, env=peer_environment(given))
    found = [tuple(map(float, m)) for m in RATE.findall(run.stdout + run.stderr)]
    later = found[len(found) // 3 :]
    if run.returncode or not later:
        return {"error": (run.stderr.strip().splitlines() or ["no rate in its log"])[-1]}
    waits, batches, _ = zip(*later, strict=True)
    return {
        "samples_per_second": round(given.batch / float(np.mean(batches)), 1),
        "data_wait": round(float(np.sum(waits) / np.sum(batches)), 4),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--peer-model", default="ViT-B-32-quickgelu", help="the same for open_clip")
    parser.add_argument("--methods", nargs="+", default=["clip", "declip"])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", default="amp_bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shards", type=Path, help="folder of tars; else they are drawn")
    parser.add_argument("--samples", type=int, default=16_384, help="to draw")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), help="width and height")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of the peer")
    parser.add_argument("--peer-workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> int:
    given = build_parser().parse_args()
    results: dict[str, Any] = {
        "about": describe(["torch", "deepspeed", "open_clip_torch", "numpy"]),
        "settings": {
            name: value if isinstance(value, int | float | str | list | tuple) else str(value)
            for name, value in vars(given).items()
        },
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shards = given.shards
        if shards is None:
            shards = folder / "shards"
            results["kilobytes"] = round(draw_shards(shards, given.samples, *given.size), 1)
        for method in given.methods:
            results[method] = ours(given, shards, method, folder / method)
            print(method, json.dumps(results[method]), flush=True)
        here = given.peer_python == sys.executable and not given.peer_path
        if given.no_peer or (here and importlib.util.find_spec("open_clip_train") is None):
            print("open_clip is not run: open_clip_train is not installed here")
        else:
            results["open_clip"] = open_clip(given, shards, folder / "logs")
            compare_with_peer(results)
            print("open_clip", json.dumps(results["open_clip"]), flush=True)
            if "times_open_clip" in results:
                print(f"clip: {results['times_open_clip']} times open_clip")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1, default=str) + "\n")
    return int(any("error" in value for value in results.values() if isinstance(value, dict)))


if __name__ == "__main__":
    sys.exit(main())
