"""FILIP's loss by plain loops, and what each process of its tests does, for spawned ones too."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from declip_train.tokenwise import tokenwise_info_nce

ROWS, PATCHES, LENGTH, DIM = 8, 5, 9, 6
FRACTIONS = {"all tokens": (1.0, 1.0), "some tokens": (0.5, 0.4)}


def case(
    rows: int = ROWS,
    patches: int = PATCHES,
    length: int = LENGTH,
    dim: int = DIM,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, mask and scale. Real tokens stand anywhere in their rows, one to all of them."""
    generator = torch.Generator().manual_seed(rows + 100 * patches + 10_000 * length)
    images, texts = (
        F.normalize(torch.randn(rows, size, dim, generator=generator, dtype=dtype), dim=-1)
        for size in (patches, length)
    )
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        count = 1 + row * (length - 1) // max(1, rows - 1)
        mask[row, torch.randperm(length, generator=generator)[:count]] = True
    return images, texts, mask, torch.tensor(7.0, dtype=dtype)


def loop_similarities(images: Tensor, texts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Image-to-text (images, texts) and text-to-image (texts, images), as the paper writes them."""
    to_text, to_image = [], []
    for image in images:
        for text, real in zip(texts, mask, strict=True):
            tokens = [text[k] for k in range(len(text)) if real[k]]
            products = [[torch.dot(patch, token) for token in tokens] for patch in image]
            best_tokens = [torch.stack(row).max() for row in products]
            best_patches = [torch.stack(column).max() for column in zip(*products, strict=True)]
            to_text.append(torch.stack(best_tokens).mean())
            to_image.append(torch.stack(best_patches).mean())
    shape = (len(images), len(texts))
    return torch.stack(to_text).view(shape), torch.stack(to_image).view(shape).T


def loop_loss(images: Tensor, texts: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """The symmetric cross-entropy, one row at a time."""
    losses = []
    for matrix in loop_similarities(images, texts, mask):
        for row, logits in enumerate(matrix * scale):
            losses.append(logits.logsumexp(0) - logits[row])
    return torch.stack(losses).mean()


def with_gradients(loss: object, tokens: tuple[Tensor, ...]) -> list[Tensor]:
    """A loss's value and its gradients with respect to images, texts and scale."""
    images, texts, mask, scale = tokens
    leaves = [tensor.clone().requires_grad_() for tensor in (images, texts, scale)]
    assert callable(loss)
    value = loss(leaves[0], leaves[1], mask, leaves[2])
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def projections() -> list[Tensor]:
    """Parameters of a tower for each side, and the logarithm of the scale; the same everywhere."""
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(DIM, 4, generator=generator).double() for _ in range(2))
    return [tensor.requires_grad_() for tensor in (image, text, torch.tensor(2.0).double())]


def loss_of(rows: slice, length: int, fractions: tuple[float, float]) -> list[Tensor]:
    """Loss and parameter gradients on some rows, texts cut to `length`."""
    images, texts, mask, _ = case()
    image_projection, text_projection, scale = parameters = projections()
    value = tokenwise_info_nce(
        F.normalize(images[rows] @ image_projection, dim=-1),
        F.normalize(texts[rows, :length] @ text_projection, dim=-1),
        mask[rows, :length],
        scale.exp(),
        image_fraction=fractions[0],
        text_fraction=fractions[1],
    )
    return [value.detach(), *torch.autograd.grad(value, parameters)]


def own_length(rows: slice) -> int:
    """The length to which a process pads its own texts: that of its last real token."""
    real = case()[2][rows].any(dim=0).nonzero()
    return int(real.max()) + 1


def run(process: int, processes: int, folder: str) -> None:
    """One process: the loss on its rows, averaged over processes as DDP does; then a bad one."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes
    )
    try:
        each = ROWS // processes
        rows = slice(process * each, (process + 1) * each)
        results: dict[str, object] = {}
        for name, fractions in FRACTIONS.items():
            # With all tokens, each process has texts of its own length; ranks need not agree.
            length = own_length(rows) if name == "all tokens" else LENGTH
            found = loss_of(rows, length + (process == 0), fractions)
            for tensor in found:
                dist.all_reduce(tensor)
                tensor /= processes
            results[name] = found
        images, texts, mask, scale = case()
        mask[ROWS - 1] = False
        try:
            tokenwise_info_nce(images[rows], texts[rows], mask[rows], scale)
        except ValueError as error:
            results["refusal"] = str(error)
        torch.save(results, Path(folder) / f"{process}.pt")
    finally:
        dist.destroy_process_group()
