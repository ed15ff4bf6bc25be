"""torch.compile for the towers, in place: parameters keep their names."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from declip_shards import DeclipError
from declip_train.hf_clip import HFTextCLIP
from declip_train.resnet import Bottleneck
from declip_train.towers import CLIP, TwoTowers
from declip_train.transformer import ResidualAttentionBlock

__all__ = ["compile_towers", "require_compiler"]

_TEXT_PASSES = ("forward_pooled", "forward_at")


def require_compiler() -> None:
    """Refuse where torch could not compile what it generates.

    Raises:
        DeclipError: no C++ compiler is found.
    """
    default = "clang++" if sys.platform == "darwin" else "g++"
    wanted = os.environ.get("CXX", default)
    if shutil.which(wanted) is None:
        raise DeclipError(
            f"compile needs a C++ compiler, but {wanted!r} is not on PATH; install one (g++ or "
            "clang++; the variable CXX names another), or set compile to false."
        )


def compile_towers(clip: TwoTowers, *, checkpointed: bool = False) -> None:
    """Compile the image tower and the text tower's blocks on their first use.

    The image tower sees one shape. Captions come in every length, so the text blocks are compiled
    once for all lengths; what chooses the length needs the host and stays as it is.

    Args:
        clip: the towers.
        checkpointed: whether their blocks are computed again in the backward pass. Then each block
            is compiled by itself: torch 2.13 cannot trace a checkpoint over unknown lengths.

    Raises:
        DeclipError: no C++ compiler is found.
    """
    require_compiler()
    if checkpointed:
        for module in clip.modules():
            if isinstance(module, ResidualAttentionBlock | Bottleneck):
                module.compile(dynamic=True)
        return
    clip.visual.compile()
    if not isinstance(clip, CLIP):
        assert isinstance(clip, HFTextCLIP)
        clip.text.transformer.compile(dynamic=True)
        return
    clip.transformer.compile(dynamic=True)
    for name in _TEXT_PASSES:
        method = getattr(clip.transformer, name)
        setattr(clip.transformer, name, torch.compile(method, dynamic=True))
