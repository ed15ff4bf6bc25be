"""What each process of the bank tests does, in a module that spawned ones can import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from declip_shards import DeclipError
from declip_train.bank import NeighborBank, neighbor_metrics

ROWS, SIZE, DIM, STEPS = 8, 21, 5, 6


def step_inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (8, 5), sample ids and caption ids of the big batch; samples come back."""
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(ROWS, DIM, generator=generator)
    sample_ids = torch.randperm(12, generator=generator)[:ROWS]
    return features, sample_ids, sample_ids // 2


def steps(rows: slice) -> dict[str, Tensor]:
    """Some steps on some rows: what was found, its metrics, and the bank in the end."""
    bank = NeighborBank(SIZE, DIM, block_rows=4)
    found = {}
    for step in range(STEPS):
        features, sample_ids, caption_ids = (part[rows] for part in step_inputs(step))
        near = bank.lookup(features, sample_ids)
        figures = neighbor_metrics(caption_ids, near.caption_ids, near.found, near.similarity)
        for name, value in (near._asdict() | figures).items():
            found[f"{step} {name}"] = value
        bank.store(3 * features, sample_ids, caption_ids)
    return found | bank.state_dict()


def run(process: int, processes: int, folder: str) -> None:
    """One process: the steps on the own rows."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes
    )
    try:
        each = ROWS // processes
        found: dict[str, object] = dict(steps(slice(process * each, (process + 1) * each)))
        try:
            NeighborBank(2 * ROWS - 1, DIM).store(*step_inputs(0))
        except DeclipError as error:
            found["refused"] = str(error)
        torch.save(found, Path(folder) / f"{process}.pt")
    finally:
        dist.destroy_process_group()
