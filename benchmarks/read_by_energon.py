"""Megatron-Energon reads what ``declip convert --to energon`` wrote: every sample once, intact.

Energon brings its own web stack, so it has an environment of its own:

    python -m venv /tmp/energon
    /tmp/energon/bin/pip install torch==2.13.0 megatron-energon==7.4.1
    declip convert runs/demo --to energon --target /tmp/for-energon
    /tmp/energon/bin/python benchmarks/read_by_energon.py /tmp/for-energon --prepared
    /tmp/energon/bin/python benchmarks/read_by_energon.py /tmp/for-energon

The second call says whether the index files equal those that ``energon prepare`` makes.
Without opendeclip: the truth is read from the tars by tarfile.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path


def truth(folder: Path) -> Counter[tuple[str, str]]:
    """(digest of the picture, caption) of each sample that split.yaml does not leave out."""
    split = (folder / ".nv-meta" / "split.yaml").read_text()
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(folder.glob("*.tar")):
        parts: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                stream = tar.extractfile(info)
                assert stream is not None
                parts.setdefault(key, {})[extension] = stream.read()
        for key, sample in parts.items():
            if f"- {path.name}/{key}\n" not in split:
                found[hashlib.sha256(sample["jpg"]).hexdigest(), sample["txt"].decode()] += 1
    return found


def read(folder: Path) -> Counter[tuple[str, str]]:
    """The same by Energon's own loader, one pass, pictures undecoded."""
    energon = importlib.import_module("megatron.energon")
    members = {"decoder": None, "batch": lambda self, samples: samples}
    undecoded = type("Undecoded", (energon.DefaultTaskEncoder,), members)
    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_val_dataset(
        folder,
        split_part="train",
        worker_config=config,
        batch_size=8,
        task_encoder=undecoded(),
    )
    found: Counter[tuple[str, str]] = Counter()
    for batch in energon.get_loader(dataset):
        for sample in batch:
            caption = sample.caption
            text = caption.decode() if isinstance(caption, bytes) else caption
            found[hashlib.sha256(bytes(sample.image)).hexdigest(), text] += 1
    return found


def compare_prepared(folder: Path) -> None:
    """Let ``energon prepare`` make its own files of the same tars and compare."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "data"
        copy.mkdir()
        for path in folder.glob("*.tar"):
            shutil.copy(path, copy)
        command = [
            str(Path(sys.executable).with_name("energon")),
            "prepare", str(copy), "--non-interactive", "--split-parts", "train:.*",
            "--sample-type", "CaptioningSample",
            "--field-map", json.dumps({"image": "jpg", "caption": "txt"}),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True)
        indexes = sorted(copy.glob("*.tar.idx"))
        assert indexes
        same = [(folder / path.name).read_bytes() == path.read_bytes() for path in indexes]
        theirs, ours = (
            json.loads((root / ".nv-meta" / ".info.json").read_text())["shard_counts"]
            for root in (copy, folder)
        )
        print(f"{sum(same)} of {len(same)} .tar.idx equal energon prepare's; ", end="")
        print(f"counts equal: {theirs == ours}")
        print((copy / ".nv-meta" / "dataset.yaml").read_text())
        assert all(same)
        assert theirs == ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what declip convert --to energon wrote")
    parser.add_argument("--prepared", action="store_true", help="compare with energon prepare")
    arguments = parser.parse_args()
    if arguments.prepared:
        compare_prepared(arguments.folder)
        return
    expected = truth(arguments.folder)
    start = time.perf_counter()
    found = read(arguments.folder)
    seconds = time.perf_counter() - start
    version = importlib.metadata.version("megatron-energon")
    print(
        f"energon {version}: {found.total()} samples in {seconds:.2f} s; "
        f"expected {expected.total()}; equal: {found == expected}"
    )
    if found != expected:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
