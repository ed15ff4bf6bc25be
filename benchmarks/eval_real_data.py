"""The datasets and models of eval_real.py: what is trained on, what is planted, drawn weights."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from declip_eval.dataset_table import find_dataset
from declip_eval.labelled_sets import LabelledSet
from declip_filter.selection import selected_keys
from declip_filter.signals import MeasureImages
from declip_shards import Store, layout, read_samples, sidecars, writer
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.model_config import get_model_config
from declip_train.stages import TrainModel
from declip_train.towers import CLIP

SHARD_ROWS = 5000
SIDE = 48
"""Pixels of the models' input; what is planted as resized has this side."""

Pair = tuple[bytes, str]
"""A picture's file, and its caption."""


def class_pairs(data: LabelledSet, rows: Sequence[int]) -> Iterator[Pair]:
    """Labelled pictures with a caption of their class's name, by one of the set's own templates."""
    info = find_dataset(data.name)
    assert info is not None
    assert data.labels is not None
    for row, image in zip(rows, data.read_images(rows), strict=True):
        assert isinstance(image, bytes), image
        # By a hash, so that a picture's caption depends on nothing but the picture's number.
        number = int.from_bytes(hashlib.sha256(data.keys[row].encode()).digest()[:4], "big")
        template = info.templates[number % len(info.templates)]
        yield image, template.replace("{}", info.class_names[int(data.labels[row])][0])


def dataset_pairs(dataset: str, split: str) -> Iterator[Pair]:
    """Pairs of a dataset of ours that are in its default selection and in a split."""
    store = Store(dataset)
    for shard in layout.list_shards(store):
        table = sidecars.read_table(store, layout.shard_parquet_path(shard), ["key", "split"])
        wanted = {row["key"] for row in table.to_pylist() if row["split"] == split}
        wanted &= set(selected_keys(store, "default", shard))
        for sample in read_samples(store, shard):
            if sample.key in wanted:
                yield sample.image, sample.caption


def write_pairs(root: Path, pairs: Iterator[Pair], source: str, first_shard: int) -> int:
    """Shards of pairs; pictures that are no JPEG are stored as ingest stores them.

    Returns:
        The number of the next shard.
    """
    store = Store(str(root))
    shard_id = first_shard
    waiting = list[Pair]()
    for pair in pairs:
        waiting.append(pair)
        if len(waiting) == SHARD_ROWS:
            _write_shard(store, shard_id, waiting, source)
            shard_id, waiting = shard_id + 1, []
    if waiting:
        _write_shard(store, shard_id, waiting, source)
        shard_id += 1
    return shard_id


def _write_shard(store: Store, shard_id: int, pairs: Sequence[Pair], source: str) -> None:
    samples, rows = [], []
    for index, (file, caption) in enumerate(pairs):
        key = layout.sample_key(shard_id, index, SHARD_ROWS)
        with Image.open(io.BytesIO(file)) as picture:
            width, height = picture.size
            stored = file if picture.format == "JPEG" else jpeg(picture.convert("RGB"), 95)
        row: dict[str, Any] = {
            "url": f"http://example.invalid/{source}/{key}",
            "caption": caption,
            "key": key,
            "status": "success",
            "error_message": None,
            "sha256": hashlib.sha256(file).hexdigest(),
            "source": source,
            "split": "train",
        }
        row |= dict.fromkeys(("width", "original_width"), width)
        row |= dict.fromkeys(("height", "original_height"), height)
        rows.append(row)
        samples.append(writer.Sample(key=key, image=stored, caption=caption, metadata=row))
    stats = {"count": len(rows), "successes": len(rows)}
    # error_message is null in every row, and still a text.
    fields = {name: pa.string() for name in rows[0]}
    fields |= {n: pa.int32() for n in ("width", "height", "original_width", "original_height")}
    table = pa.Table.from_pylist(rows, pa.schema(list(fields.items())))
    writer.write_shard(store, layout.shard_name(shard_id), samples, table, stats)


def jpeg(picture: Image.Image, quality: int) -> bytes:
    """A picture as JPEG."""
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def measure(root: Path) -> None:
    """Signals of all shards: the hashes that contamination is found by."""
    stage = MeasureImages(root=str(root), detect_language=False, dictionary=())
    work = stage.worker()
    for task in stage.tasks():
        if not stage.is_done(task):
            work(task)


def make_training_data(root: Path, cifar10: LabelledSet, num_images: int, pairs: str) -> int:
    """The first pictures of CIFAR-10's training split, and a dataset's own training split.

    Returns:
        Samples in all.
    """
    made = root / "made.json"
    asked = {"num_images": num_images, "pairs": Store(pairs).sha256(layout.manifest_path("ingest"))}
    if made.exists() and (content := json.loads(made.read_text()))["asked"] == asked:
        return int(content["num_samples"])
    shutil.rmtree(root, ignore_errors=True)
    shard = write_pairs(root, class_pairs(cifar10, range(num_images)), "cifar10", 0)
    write_pairs(root, dataset_pairs(pairs, "train"), "pairs", shard)
    measure(root)
    store = Store(str(root))
    shards = layout.list_shards(store)
    count = sum(sidecars.num_rows(store, layout.shard_parquet_path(name)) for name in shards)
    made.write_text(json.dumps({"asked": asked, "num_samples": count}))
    return count


def train(root: Path, model: str, epochs: float, num_ranks: int) -> Path:
    """Train CLIP on all samples; the export's folder. What stands is kept."""
    stage = TrainModel(
        root=str(root),
        selection="",
        method="clip",
        model=model,
        augmentation="demo",
        num_ranks=num_ranks,
        zero_stage=1,
        global_batch_size=256,
        epochs=epochs,
        warmup_steps=20,
        checkpoint_every_seconds=60.0,
        log_every_steps=10,
    )
    if not stage.is_done("all"):
        stage.worker()("all")
    return root / "train" / "export"


def draw_model(folder: Path, model: str, seed: int) -> Path:
    """An export with weights as they are drawn."""
    if not folder.exists():
        towers = CLIP(get_model_config(model), torch.Generator().manual_seed(seed)).eval()
        export_open_clip(towers, None, folder, PreprocessSettings(), {})
    return folder


KINDS = ("the same file", "JPEG of quality 80", f"resized to {SIDE} pixels")
"""What is done to a test picture before it is put into training data."""


def plant(root: Path, test: LabelledSet, train_set: LabelledSet, num_each: int) -> dict[int, str]:
    """A dataset of training pictures with some test pictures among them, in every disguise.

    Returns:
        Row of the test set -> what was done to it.
    """
    shutil.rmtree(root, ignore_errors=True)
    rows = np.random.default_rng(0).permutation(len(test))[: num_each * len(KINDS)].tolist()
    planted: list[Pair] = []
    done: dict[int, str] = {}
    for place, (row, image) in enumerate(zip(rows, test.read_images(rows), strict=True)):
        assert isinstance(image, bytes), image
        kind = KINDS[place % len(KINDS)]
        done[row] = kind
        with Image.open(io.BytesIO(image)) as picture:
            rgb = picture.convert("RGB")
        if kind == KINDS[1]:
            image = jpeg(rgb, 80)
        elif kind == KINDS[2]:
            image = jpeg(rgb.resize((SIDE, SIDE), Image.Resampling.BICUBIC), 95)
        planted.append((image, "planted"))
    shard = write_pairs(root, iter(planted), "planted", 0)
    write_pairs(root, class_pairs(train_set, range(10 * len(planted))), "clean", shard)
    measure(root)
    return done
