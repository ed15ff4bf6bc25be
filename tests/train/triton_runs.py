"""What the tests of the Triton kernels do in processes of their own.

    python triton_runs.py interpret    in Triton's interpreter, against the blocked version
    python triton_runs.py compile      for compute capability 9.0

Whether Triton interprets is settled when it is imported, so each needs a fresh process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from declip_train.tokenwise import Kernel, tokenwise_info_nce, tokenwise_similarity

SHAPES = {
    # Name: rows, patches, text length, dim. Tiles hold 64 patches, 16, 32, ... tokens, 64 entries.
    "less than a tile": (3, 5, 9, 6),
    "tiles cut off": (2, 67, 40, 70),
    "exactly tiles": (2, 64, 32, 64),
    "one of each": (1, 1, 1, 1),
    "more texts than a program has": (10, 3, 18, 4),
}


def case(rows: int, patches: int, length: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + patches)
    images, texts = (
        F.normalize(torch.randn(rows, size, dim, generator=generator), dim=-1)
        for size in (patches, length)
    )
    lengths = torch.arange(length, length - rows, -1).clamp(min=1)
    return [images, texts, torch.arange(length) < lengths[:, None]]


def run(kernel: Kernel, images: Tensor, texts: Tensor, mask: Tensor) -> list[Tensor]:
    """Both similarities, the loss, and its gradients."""
    own, other = (tensor.clone().requires_grad_() for tensor in (images, texts))
    with torch.no_grad():
        similarities = tokenwise_similarity(images, texts, mask, kernel=kernel)
    loss = tokenwise_info_nce(own, other, mask, torch.tensor(9.0), kernel=kernel)
    return [*similarities, loss.detach(), *torch.autograd.grad(loss, (own, other))]


def differences() -> dict[str, float]:
    """The largest difference of the kernels from the blocked version, for each shape."""
    found = {}
    for name, shape in SHAPES.items():
        pairs = zip(run("triton", *case(*shape)), run("blocked", *case(*shape)), strict=True)
        found[name] = max(float((one - other).abs().max()) for one, other in pairs)
    return found


def nan_is_kept() -> dict[str, bool]:
    """Whether NaN in one token is NaN exactly where the blocked version has it, and in the loss."""
    found = {}
    for side, name in enumerate(("image", "text")):
        tokens = case(*SHAPES["more texts than a program has"])
        tokens[side][1, 0, 0] = torch.nan
        ours, theirs = run("triton", *tokens), run("blocked", *tokens)
        similarities = all(
            torch.equal(one.isnan(), other.isnan())
            for one, other in zip(ours[:2], theirs[:2], strict=True)
        )
        rest = all(bool(tensor.isnan().any()) for tensor in ours[2:])
        found[name] = similarities and bool(theirs[0].isnan().any()) and rest
    return found


def half_difference() -> float:
    """The largest difference of float16's similarities from those of the same values in float32."""
    from declip_train import tokenwise_triton
    from declip_train.tokenwise_blocked import TextLayout

    images, texts, mask = case(*SHAPES["less than a tile"])
    layout = TextLayout(mask.sum(dim=1).tolist(), torch.device("cpu"))
    packed = layout.pack(texts)
    half = tokenwise_triton.similarity(images.half(), packed.half(), layout, keep=False)
    full = tokenwise_triton.similarity(
        images.half().float(), packed.half().float(), layout, keep=False
    )
    return float((half.image_to_text - full.image_to_text).abs().max())


def compile_kernel(kernel: Any, constants: dict[str, int | bool], num_warps: int) -> int:
    """Compile for compute capability 9.0; returns the shared memory a program needs, in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = dict.fromkeys(("images", "texts"), "*bf16")
    kinds |= dict.fromkeys(("starts", "lengths"), "*i64")
    kinds |= dict.fromkeys(("best_text", "best_patch"), "*u8")
    float32 = ("to_text", "to_image", "text_weights", "image_weights", "gradient")
    kinds |= dict.fromkeys(float32, "*fp32") | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: kinds.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    assert compiled.asm["cubin"]
    shared: int = compiled.metadata.shared
    return shared


def shared_memory() -> dict[str, int]:
    """Bytes of shared memory of each kernel at FILIP's sizes, for short and for long captions."""
    from declip_train import tokenwise_kernels as kernels

    found = {}
    for length in (16, 128):
        warps = 4 if length == 16 else 8
        found[f"similarity {length}"] = compile_kernel(
            kernels.similarity_kernel,
            {"KEEP": True, "TEXTS": 8, "PATCHES": 64, "LENGTH": length, "DIMS": 64},
            warps,
        )
        sizes = {"PATCHES": 64, "DIMS": 256}
        found[f"image gradient {length}"] = compile_kernel(
            kernels.image_gradient_kernel, {**sizes, "LENGTH": length}, 8
        )
        found[f"text gradient {length}"] = compile_kernel(
            kernels.text_gradient_kernel, {**sizes, "ROWS": min(64, length)}, 8
        )
    return found


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        result: dict[str, Any] = {
            "differences": differences(),
            "nan": nan_is_kept(),
            "half": half_difference(),
        }
    else:
        result = {"shared": shared_memory()}
    print(json.dumps(result))
