"""The names that open_clip imports from torchvision, where torchvision cannot be installed.

open_clip's model classes, its factory and its checkpoint loading are its own and run unchanged;
what is replaced is image preprocessing, and one layer of frozen ResNets that it needs by name at
import. Of the transforms, those of evaluation really work on PIL images (they are a few lines
each); those of training refuse to run, so no test can lean on them by accident.

Use it in a process of its own: `install()` puts the stand-in into `sys.modules`.
"""

from __future__ import annotations

import enum
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


_FILTERS = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}


class Compose:
    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Shorter side to `size`, as torchvision does for a whole number."""

    def __init__(
        self, size: Any, interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.size = size
        self.interpolation = interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if isinstance(self.size, int):
            short = min(width, height)
            target = (int(self.size * width / short), int(self.size * height / short))
        else:
            target = (self.size[1], self.size[0])
        return image.resize(target, _FILTERS[self.interpolation])


class CenterCrop:
    def __init__(self, size: Any) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        left = round((image.width - width) / 2)
        top = round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


class ToTensor:
    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8, copy=True))
        return pixels.permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class _TrainingTransform:
    """Can be built, as open_clip builds its training transforms with the model, and not run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, image: Any) -> Any:
        raise NotImplementedError("the torchvision stand-in has no training transforms")


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features: int) -> None:
        raise NotImplementedError("the torchvision stand-in has no FrozenBatchNorm2d")


def _module(name: str, is_package: bool, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=is_package)
    if is_package:
        module.__path__ = []
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


def install() -> None:
    """Put the stand-in where `import torchvision` finds it; refuse to shadow a real one."""
    if "torchvision" in sys.modules:
        raise RuntimeError("torchvision is already imported: use the real one")
    functional = _module("torchvision.transforms.functional", False, to_tensor=ToTensor())
    transforms = _module(
        "torchvision.transforms",
        True,
        functional=functional,
        CenterCrop=CenterCrop,
        ColorJitter=type("ColorJitter", (_TrainingTransform,), {}),
        Compose=Compose,
        Grayscale=type("Grayscale", (_TrainingTransform,), {}),
        InterpolationMode=InterpolationMode,
        Normalize=Normalize,
        RandomResizedCrop=type("RandomResizedCrop", (_TrainingTransform,), {}),
        Resize=Resize,
        ToTensor=ToTensor,
    )
    misc = _module("torchvision.ops.misc", False, FrozenBatchNorm2d=FrozenBatchNorm2d)
    ops = _module("torchvision.ops", True, misc=misc)
    _module("torchvision", True, transforms=transforms, ops=ops)
