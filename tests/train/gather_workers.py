"""What each process of the gathering tests does, in a module that spawned ones can import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from declip_train.distributed import gather_features, rank, world_size
from declip_train.losses import info_nce, multi_view_info_nce, neighbor_info_nce

ROWS = 8
LOSSES = ("info_nce", "multi_view", "neighbor", "neighbor with gaps")


def inputs() -> list[Tensor]:
    """The big batch: four views of eight rows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) for _ in range(4)]


def towers() -> nn.ModuleDict:
    """Two towers of one layer and a logit scale, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    module = nn.ModuleDict({"image": nn.Linear(6, 5), "text": nn.Linear(6, 5)}).double()
    module.register_parameter("scale", nn.Parameter(torch.tensor(2.0, dtype=torch.float64)))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "scale":
                parameter.normal_(generator=generator)
    return module


def loss_of(kind: str, module: nn.ModuleDict, views: list[Tensor], has_neighbor: Tensor) -> Tensor:
    """One of the contrastive losses on the given rows of the batch."""
    image, other_image = (F.normalize(module["image"](view), dim=-1) for view in views[:2])
    text, other_text = (F.normalize(module["text"](view), dim=-1) for view in views[2:])
    scale = module.get_parameter("scale").exp()
    if kind == "info_nce":
        return info_nce(image, text, scale)
    if kind == "multi_view":
        pairs = multi_view_info_nce(image, other_image, text, other_text, scale)
        return 0.4 * pairs.contrastive + 0.2 * pairs.multi_view
    gaps = has_neighbor if kind == "neighbor with gaps" else None
    return neighbor_info_nce([image, other_image], [text, other_text], scale, gaps)


def gradients_of(kind: str, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and parameter gradients on some rows."""
    module = towers()
    # Unevenly spread over two halves, so that a mean of means would be wrong.
    has_neighbor = torch.tensor([True, False, False, False, True, True, False, True])
    loss = loss_of(kind, module, [view[rows] for view in inputs()], has_neighbor[rows])
    loss.backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }
    return loss.detach(), found


def run(process: int, processes: int, folder: str) -> None:
    """One process: gather, then every loss on the own rows, averaged over processes as DDP does."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes
    )
    try:
        each = ROWS // processes
        rows = slice(process * each, (process + 1) * each)
        first, second = inputs()[:2]
        gathered = gather_features(first[rows], second[rows, :2])
        assert (rank(), world_size()) == (process, processes)
        assert torch.equal(gathered[0], first)
        assert torch.equal(gathered[1], second[:, :2])
        results = {}
        for kind in LOSSES:
            loss, found = gradients_of(kind, rows)
            for tensor in (loss, *found.values()):
                dist.all_reduce(tensor)
                tensor /= processes
            results[kind] = (loss, found)
        torch.save(results, Path(folder) / f"{process}.pt")
    finally:
        dist.destroy_process_group()
