"""One run of a peer's loader, in the peers' environment: ``loader_peer.py ROOT RUN OPTIONS``.

open_clip's loader is its own ``get_wds_dataset`` with its own transform and tokenizer, on the tars
that ours reads. mosaicml-streaming reads the same JPEGs and captions out of its own format, into
which they are brought before the clock starts, decodes and transforms them as open_clip does, and
its own data loader makes the batches. Two views are MoCo v2's with Pillow and torchvision, as its
authors published them (torchvision's own bilinear resizing, a blur of Pillow's), in open_clip's
loader. "torchvision decodes" stands for the strongest that torchvision has: its own libjpeg-turbo
and antialiased bicubic resizing on 8-bit tensors. Batches of 128, pictures of 224 pixels.
"""

import argparse
import io
import json
import random
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip_train.data import get_wds_dataset
from PIL import Image, ImageFilter
from torchvision import io as vision_io
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

if TYPE_CHECKING:
    from benchmarks.loader_measure import measure
else:
    from loader_measure import measure

BATCH, SIZE = 128, 224
OPEN_CLIP_CROP = (0.9, 1.0)
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


class PillowBlur:
    """Gaussian blur of a drawn width, as SimCLR's and MoCo v2's loaders have it."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def color_steps() -> list[Any]:
    """MoCo v2's changes of color (arXiv 2003.04297)."""
    return [
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([PillowBlur()], p=0.5),
    ]


def moco_v2() -> Any:
    """One of MoCo v2's views."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
            *color_steps(),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )


class TwoViews:
    """Two views of a picture, one behind the other."""

    def __init__(self) -> None:
        self.view = moco_v2()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.stack([self.view(image), self.view(image)])


def open_clip_view() -> Any:
    """open_clip's own training transform."""
    return open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD)


def tars(root: str) -> list[str]:
    """The set's tars, in order."""
    return sorted(map(str, Path(root, "shards").glob("*.tar")))


def passes(loader: Any, set_epoch: Callable[[int], None]) -> Iterator[int]:
    """Pass after pass; the number of samples of each batch."""
    epoch = 0
    while True:
        set_epoch(epoch)
        for batch in loader:
            yield len(batch[0])
        epoch += 1


def in_open_clip(root: str, workers: int, view: Any) -> Iterator[int]:
    """open_clip's loader with a transform."""
    shards = tars(root)
    number = len(shards) * json.loads(Path(root, "set.json").read_bytes())["shard_rows"]
    given = argparse.Namespace(
        train_data="::".join(shards),
        train_num_samples=number,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        world_size=1,
        workers=workers,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    # Whole batches alone, as ours.
    info = get_wds_dataset(given, view, is_train=True, floor=True, tokenizer=tokenizer)
    return passes(info.dataloader, info.set_epoch)


class Decoded(torch.utils.data.Dataset[Any]):
    """Tars in memory, decoded and resized by torchvision; indexing is free, in its favor."""

    def __init__(self, root: str) -> None:
        self.pictures: list[torch.Tensor] = []
        self.captions: list[str] = []
        for data, caption in members(root):
            self.pictures.append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self.captions.append(caption)
        self.view = v2.RandomResizedCrop(
            SIZE, scale=OPEN_CLIP_CROP, interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = vision_io.decode_jpeg(self.pictures[index], mode=vision_io.ImageReadMode.RGB)
        return self.view(image), self.tokenizer(self.captions[index])[0]


def by_torchvision(root: str, workers: int) -> Iterator[int]:
    """torch's own loader over ``Decoded``."""
    loader = torch.utils.data.DataLoader(
        Decoded(root), BATCH, shuffle=True, drop_last=True, num_workers=workers
    )
    return passes(loader, lambda _: None)


def members(root: str) -> Iterator[tuple[bytes, str]]:
    """Pictures and captions of the tars."""
    for path in tars(root):
        with tarfile.open(path) as tar:
            found = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            for name, file in found.items():
                caption = found.get(name.removesuffix(".jpg") + ".txt")
                if name.endswith(".jpg") and file is not None and caption is not None:
                    yield file.read(), caption.read().decode()


def by_streaming(root: str, workers: int) -> Iterator[int]:
    """mosaicml-streaming over its own format."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    folder = Path(root, "mds")
    if not folder.exists():
        columns = {"image": "bytes", "caption": "str"}
        # Shards as large as the tars of img2dataset's defaults would be with so few pictures.
        with MDSWriter(out=str(folder), columns=columns, size_limit=2**22) as writer:
            for data, caption in members(root):
                writer.write({"image": data, "caption": caption})
    view, tokenizer = open_clip_view(), open_clip.get_tokenizer("ViT-B-32")

    class Pairs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Any:
            row = super().__getitem__(at)
            image = Image.open(io.BytesIO(row["image"])).convert("RGB")
            return view(image), tokenizer(row["caption"])[0]

    dataset = Pairs(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True)
    return passes(loader, lambda _: None)


RUNS: dict[str, Callable[[str, int], Iterator[int]]] = {
    "open_clip, one view": lambda root, workers: in_open_clip(root, workers, open_clip_view()),
    "open_clip, two views": lambda root, workers: in_open_clip(root, workers, TwoViews()),
    "mosaicml-streaming, one view": by_streaming,
    "torchvision decodes, one view, 8-bit": by_torchvision,
}


def main() -> None:
    root, run, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    row = measure(
        lambda: RUNS[run](root, options["workers"]),
        warm_up=options["warm_up"],
        samples=options["samples"],
        minutes=options["minutes"],
    )
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
