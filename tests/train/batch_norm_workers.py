"""What each process of the batch norm tests does, in a module that spawned ones can import."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from declip_shards import DeclipError
from declip_train.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    frozen_statistics,
    synchronize_batch_norm,
)
from declip_train.heads import DeCLIPHeads, SimCLRHead
from declip_train.model_config import get_model_config

ROWS = 8
STEPS = 3
CASES = ("vectors", "maps", "no affine", "simsiam", "simclr", "checkpointed")


def module_of(case: str) -> nn.Module:
    """A module with batch norm, the same in every process, float64."""
    generator = torch.Generator().manual_seed(1)
    config = get_model_config("test")
    module: nn.Module
    if case == "simsiam":
        heads = DeCLIPHeads(config, 6, 4, generator, synchronized=True)
        del heads.mlm_head
        module = heads
    elif case == "simclr":
        module = SimCLRHead(config, 6, 4, generator, synchronized=True)
    elif case == "maps":
        module = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(2, 4, 2), norm=BatchNorm2d(4), end=nn.Flatten())
        )
        assert synchronize_batch_norm(module) == 1
    else:
        norm = BatchNorm1d(5, True, affine=case != "no affine", momentum=None)
        module = nn.Sequential(OrderedDict(one=nn.Linear(16, 5), norm=norm, two=nn.Linear(5, 3)))
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


def inputs(case: str) -> list[Tensor]:
    """For each step the big batch; rows have different means and spreads."""
    generator = torch.Generator().manual_seed(2)
    width = {"maps": (2, 3, 3), "simclr": (32,)}.get(case, (16,))
    spread = torch.arange(1, ROWS + 1, dtype=torch.float64).view(-1, *[1] * len(width))
    return [
        3 + spread * torch.randn(ROWS, *width, generator=generator, dtype=torch.float64)
        for _ in range(STEPS)
    ]


def outcome_of(case: str, rows: slice) -> dict[str, Tensor]:
    """Output, gradients of input and parameters, and the state after some steps, on some rows."""
    module = module_of(case)
    targets = torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for batch in inputs(case):
        module.zero_grad()
        values = batch[rows].clone().requires_grad_()
        if isinstance(module, DeCLIPHeads):
            with frozen_statistics(module):  # Computed twice, counted once.
                module.project(values.detach())
            out = torch.cat(module.project(values), dim=1)
        elif case == "checkpointed":
            out = checkpoint(
                module,
                values,
                use_reentrant=False,
                context_fn=lambda: (torch.enable_grad(), frozen_statistics(module)),
            )
        else:
            out = module(values)
        (out.tanh() * targets[rows]).sum(dim=1).mean().backward()
    assert values.grad is not None
    found = {"output": out.detach(), "input gradient": values.grad}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {name}"] = parameter.grad
    return found | {f"state {name}": buffer.clone() for name, buffer in module.named_buffers()}


def shares(process: int, processes: int) -> slice:
    each = ROWS // processes
    return slice(process * each, (process + 1) * each)


def uneven(process: int) -> dict[str, Tensor]:
    """Two processes with 8 and 0 rows, then with 5 and 3, float32; the second step far from 0."""
    norm = BatchNorm1d(16, True)
    first = [slice(0, 8), slice(8, 8)][process]
    second = [slice(0, 5), slice(5, 8)][process]
    found = {}
    for name, rows, offset in (("empty", first, 0.0), ("far", second, 1e4)):
        values = (inputs("vectors")[0] + offset).float()[rows].requires_grad_()
        out = norm(values)
        (out.tanh() * torch.arange(16)).sum().backward()
        assert values.grad is not None
        found[f"{name} output"], found[f"{name} gradient"] = out.detach(), values.grad
    return found | dict(norm.named_buffers())


def half(process: int) -> Tensor:
    """bfloat16 in, bfloat16 out."""
    values = inputs("vectors")[0][shares(process, 2)].bfloat16()
    out: Tensor = BatchNorm1d(16, True)(values)
    return out.detach()


def compiled(rows: slice) -> dict[str, Tensor]:
    """Traced by torch.compile, without its slow code generation."""
    torch.compiler.reset()
    module = module_of("vectors")
    values = inputs("vectors")[0][rows].clone().requires_grad_()
    out = torch.compile(module, backend="aot_eager")(values)
    out.tanh().mean().backward()
    assert values.grad is not None
    return {"output": out.detach(), "gradient": values.grad}


def one_row(process: int) -> str:
    """The sentence that refuses a batch of one row on two processes."""
    try:
        BatchNorm1d(16, True)(torch.randn(1 - process, 16))
    except DeclipError as error:
        return str(error)
    return ""


def run(process: int, processes: int, folder: str) -> None:
    """One process: every case on the own rows, parameter gradients averaged as DDP does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes
    )
    try:
        results: dict[str, object] = {}
        for case in CASES:
            found = outcome_of(case, shares(process, processes))
            for name, gradient in found.items():
                if name.startswith("gradient"):
                    dist.all_reduce(gradient)
                    gradient /= processes
            results[case] = found
        if processes == 2:
            results["uneven"] = uneven(process)
            results["half"] = half(process)
            results["one row"] = one_row(process)
            results["compiled"] = compiled(shares(process, processes))
        torch.save(results, Path(folder) / f"{process}.pt")
    finally:
        dist.destroy_process_group()
