"""Crops, colors and pixels that torchvision and Pillow draw: ``loader_peer_draws.py ROOT OUT``.

Writes a file of NumPy arrays: boxes of ``RandomResizedCrop.get_params``; pictures of the set at
``ROOT`` cropped to given boxes and resized (bicubic) by torchvision on Pillow's pictures, as in
open_clip; and the statistics of those after MoCo v2's changes of color.
"""

import io
import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

if TYPE_CHECKING:
    from benchmarks.loader_peer import SIZE, color_steps, members
    from benchmarks.loader_statistics import (
        COLOR_REPEATS,
        CROP_DRAWS,
        CROPS,
        PIXEL_PICTURES,
        color_statistics,
    )
else:
    from loader_peer import SIZE, color_steps, members
    from loader_statistics import (
        COLOR_REPEATS,
        CROP_DRAWS,
        CROPS,
        PIXEL_PICTURES,
        color_statistics,
    )

RATIO = [3 / 4, 4 / 3]


def main() -> None:
    root, out = sys.argv[1], sys.argv[2]
    torch.manual_seed(0)
    random.seed(0)
    draw = transforms.RandomResizedCrop.get_params
    arrays: dict[str, Any] = {}
    for number, (height, width, least) in enumerate(CROPS):
        blank = torch.empty(3, height, width)
        boxes = [draw(blank, [least, 1.0], RATIO) for _ in range(CROP_DRAWS)]
        arrays[f"crops_{number}"] = np.array(boxes)
    boxes, views = [], []
    for data, _ in list(members(root))[:PIXEL_PICTURES]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = draw(image, [0.2, 1.0], RATIO)
        view = F.resized_crop(image, *box, [SIZE, SIZE], InterpolationMode.BICUBIC)
        boxes.append(box)
        views.append(view)
    arrays["boxes"], arrays["views"] = np.array(boxes), np.stack([np.asarray(v) for v in views])
    change = transforms.Compose(color_steps())
    small = [Image.fromarray(np.asarray(view)[::2, ::2]) for view in views]
    found = [
        color_statistics(np.asarray(change(view)), np.asarray(view))
        for view in small
        for _ in range(COLOR_REPEATS)
    ]
    arrays["colors"] = np.array(found)
    np.savez(out, **arrays)


if __name__ == "__main__":
    main()
