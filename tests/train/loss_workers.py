"""What each process of the losses' tests does, in a module that spawned ones can import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from declip_train import losses

ROWS, DIM, VOCABULARY = 8, 5, 7
LOSSES = (
    "info_nce",
    "info_nce with options",
    "multi_view",
    "sigmoid",
    "neighbor",
    "neighbor with one mask",
    "neighbor with masks",
    "nt_xent",
    "masked_language_modeling",
    "nothing masked",
)


def module() -> nn.ModuleDict:
    """Two towers, a head and two scalars, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    towers = nn.ModuleDict(
        {
            "image": nn.Linear(6, DIM),
            "text": nn.Linear(6, DIM),
            "head": nn.Linear(DIM, VOCABULARY),
        }
    ).double()
    for name, value in (("scale", 2.0), ("bias", -1.0)):
        parameter = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        towers.register_parameter(name, parameter)
    with torch.no_grad():
        for parameter in towers.parameters():
            if parameter.ndim:
                parameter.normal_(generator=generator)
    return towers


def loss_of(kind: str, towers: nn.ModuleDict, rows: slice) -> Tensor:
    """One of the losses on the given rows of the big batch."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(4, ROWS, 6, generator=generator, dtype=torch.float64)[:, rows]
    # Unevenly spread over two and four parts, so that a mean of means would be wrong.
    has_neighbor = torch.tensor([1, 0, 0, 0, 1, 1, 0, 1], dtype=torch.bool)[rows]
    other_mask = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)[rows]
    masked = torch.zeros(ROWS, dtype=torch.bool) if kind == "nothing masked" else has_neighbor
    image, other_image = (towers["image"](view) for view in views[:2])
    states, other_text = (towers["text"](view) for view in views[2:])
    images = [F.normalize(view, dim=-1) for view in (image, other_image)]
    texts = [F.normalize(view, dim=-1) for view in (states, other_text)]
    scale = towers.get_parameter("scale").exp()
    if kind == "info_nce":
        return losses.info_nce(images[0], texts[0], scale)
    if kind == "info_nce with options":
        return losses.info_nce(
            images[0], texts[0], scale, label_smoothing=0.1, hard_negative_beta=0.5
        )
    if kind == "multi_view":
        pairs = losses.multi_view_info_nce(images[0], images[1], texts[0], texts[1], scale)
        return 0.4 * pairs.contrastive + 0.2 * pairs.multi_view
    if kind == "sigmoid":
        return losses.sigmoid_loss(images[0], texts[0], scale, towers.get_parameter("bias"))
    if kind == "nt_xent":
        return losses.nt_xent(image, other_image, 0.3)
    if kind in ("masked_language_modeling", "nothing masked"):
        targets = torch.arange(ROWS)[rows] % VOCABULARY
        return losses.masked_language_modeling(
            states[masked[: len(states)]], targets[masked[: len(states)]], towers["head"]
        )
    masks = {
        "neighbor": None,
        "neighbor with one mask": has_neighbor,
        "neighbor with masks": [has_neighbor, other_mask],
    }[kind]
    return losses.neighbor_info_nce(images, texts, scale, masks)


def gradients_of(kind: str, rows: slice) -> dict[str, Tensor]:
    """The loss and all parameters' gradients; None of a parameter stays None."""
    towers = module()
    loss = loss_of(kind, towers, rows)
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in towers.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


def run(process: int, processes: int, folder: str) -> None:
    """One process: every loss on the own rows, averaged over processes as DDP does."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes
    )
    try:
        each = ROWS // processes
        results = {}
        for kind in LOSSES:
            found = gradients_of(kind, slice(process * each, (process + 1) * each))
            for tensor in found.values():
                dist.all_reduce(tensor)
                tensor /= processes
            results[kind] = found
        torch.save(results, Path(folder) / f"{process}.pt")
    finally:
        dist.destroy_process_group()
