"""Processes of `test_elastic.py`: DeepSpeed in one layout after the other, from each other's
files."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from declip_train import extension
from declip_train.checkpoint import Checkpoints
from declip_train.elastic import MASTER, read_states, restore_states, trained_parameters

# Every pair of stages, and of numbers of processes, follows one another somewhere.
LAYOUTS = [(0, 1), (1, 2), (2, 4), (0, 2), (2, 1), (1, 4), (1, 1), (0, 4), (0, 1), (2, 2), (2, 4)]
COMPARED = "adamw, as universal"
"""The chain that DeepSpeed's own program can convert: no parameter without dimensions."""
CHAINS: dict[str, tuple[str, str, list[tuple[int, int]]]] = {
    "adamw in fp32": ("adamw", "fp32", LAYOUTS),
    COMPARED: ("adamw", "fp32", [(1, 2), (2, 4), (1, 1)]),
    "sgd in fp32": ("sgd", "fp32", [(1, 2), (2, 1), (0, 2), (2, 4)]),
    "adamw in bf16": ("adamw", "bf16", [(0, 2), (1, 4), (2, 1), (0, 1)]),
    "adamw in fp16": ("adamw", "fp16", [(2, 2), (0, 1), (1, 4), (0, 4)]),
}


class Model(nn.Module):
    """Parameters of odd sizes, one of them without dimensions, and a buffer that training fills."""

    bank: torch.Tensor

    def __init__(self, scale_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.zeros(scale_shape))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("bank", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bank += 1
        found: torch.Tensor = self.layers(x) * self.scale.exp()
        return found.float().square().mean()


@contextmanager
def process_group(meeting: Path, process: int, processes: int) -> Iterator[None]:
    """The first ``processes`` of the test's processes as DeepSpeed's group."""
    os.environ.update(LOCAL_RANK=str(process), RANK=str(process), WORLD_SIZE=str(processes))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=process, world_size=processes
    )
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    try:
        yield
    finally:
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        groups._WORLD_GROUP = None


def start(
    stage: int, optimizer: str, precision: str, scale_shape: tuple[int, ...]
) -> tuple[Any, Model]:
    """DeepSpeed's engine around a fresh model, as the trainer sets it up."""
    torch.manual_seed(0)
    model = Model(scale_shape)
    weights = [p for p in model.layers.parameters() if p.ndim > 1]
    biases = [p for p in model.layers.parameters() if p.ndim == 1]
    of_groups = [
        {"params": weights, "weight_decay": 0.1},
        {"params": biases, "weight_decay": 0.0},
        {"params": [model.scale], "weight_decay": 0.0},
    ]
    base: torch.optim.Optimizer
    if optimizer == "sgd":
        base = torch.optim.SGD(of_groups, lr=0.05, momentum=0.9, nesterov=True)
    else:
        base = torch.optim.AdamW(of_groups, lr=0.05, fused=True)
    zero = {"stage": stage, "contiguous_gradients": stage == 2, "overlap_comm": False}
    sections: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True, "check_grad_overflow": True}},
        "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}},
    }
    for parameter in model.parameters():
        setattr(parameter, "ds_optim_param", True)  # noqa: B010 (see TrainEngine)
    engine, wrapper, *_ = deepspeed.initialize(
        model=model,
        optimizer=base,
        config={
            "train_batch_size": 4,
            "zero_optimization": zero | ({"compute_grad_norm": False} if stage else {}),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            **sections[precision],
        },
        dist_init_required=False,
    )
    for parameter in model.parameters():
        delattr(parameter, "ds_optim_param")
    wrapper.state.clear()
    return engine, model


def take_steps(engine: Any, count: int, process: int, processes: int) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in range(count):
        rows = (torch.arange(20.0).reshape(4, 5) / 10 + step)[process::processes].to(dtype)
        engine.backward(engine(rows))
        engine.step()


def states_of(engine: Any, model: Model) -> dict[str, Any]:
    """Everything that must survive, as DeepSpeed itself gives it out; a collective operation."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    found: dict[str, Any] = {f"module.{k}": v.clone() for k, v in model.state_dict().items()}
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        # Linked at the first step, or (where states were cleared before it) not yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for number, group in enumerate(trained_parameters(engine)):
        for place, (name, parameter) in enumerate(group):
            if hasattr(optimizer, "single_partition_of_fp32_groups"):
                own = base.state[base.param_groups[number]["params"][0]]
                kinds = [k for k in own if k != "step"]
                found[f"{name} {MASTER}"] = safe_get_full_fp32_param(parameter)
                for kind in kinds:
                    found[f"{name} {kind}"] = safe_get_full_optimizer_state(parameter, kind)
            else:
                copy = base.param_groups[number]["params"][place]
                own = base.state[copy]
                kinds = [k for k in own if k != "step"]
                found[f"{name} {MASTER}"] = copy.detach().clone()
                found |= {f"{name} {kind}": own[kind].clone() for kind in kinds}
            found[f"{name} step"] = float(own.get("step", -1))
    if engine.fp16_enabled():
        whole = hasattr(optimizer, "loss_scale_config")
        scaler = optimizer.loss_scale_config if whole else optimizer.loss_scaler
        found["loss scale"] = (scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    wrong = sorted(set(one) ^ set(other))
    for name in sorted(set(one) & set(other)):
        a, b = one[name], other[name]
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        wrong += [] if same else [name]
    return wrong


def convert(process: int, _: int, folder: str) -> None:
    """Run every chain: each layout continues from the checkpoint of the one before."""
    extension.use_prebuilt()
    # A CPU computes in float16 well enough for a test; DeepSpeed's own table says that few do.
    vars(get_accelerator())["is_fp16_supported"] = lambda: True
    for name, (_optimizer, _precision, layouts) in CHAINS.items():
        place = Path(folder) / name
        for number, (_stage, world) in enumerate(layouts):
            if process < world:
                place.mkdir(exist_ok=True)
                with process_group(place / f"meeting_{number}", process, world):
                    _continue(name, place, number, process)


def _continue(name: str, place: Path, number: int, process: int) -> None:
    optimizer, precision, layouts = CHAINS[name]
    stage, world = layouts[number]
    kind = (stage, optimizer, precision, (1,) if name == COMPARED else ())
    said: list[str] = []
    checkpoints = Checkpoints(place / "run", {"run": 1}, keep=99, say=said.append)
    engine, model = start(*kind)
    assert checkpoints.restore(engine) == number
    found = states_of(engine, model) if number else {}
    if number and process == 0:
        expected = torch.load(place / "expected.pt", weights_only=False)
        assert not differences(expected, found), (number, kind, differences(expected, found))
        assert any(f"continuing after step {number}" in line for line in said), said
        assert engine.global_steps == number, engine.global_steps
    if number and world == 1:
        # Also where `restore` leaves it to DeepSpeed: the same bits.
        again, other = start(*kind)
        restore_states(again, place / f"run/step_{number:08d}")
        assert not differences(found, states_of(again, other))
    take_steps(engine, 1, process, world)
    checkpoints.save(engine, number + 1)
    after = states_of(engine, model)
    counts = {name: value for name, value in after.items() if name.endswith(" step")}
    assert optimizer == "sgd" or set(counts.values()) == {number + 1}, counts
    if process == 0:
        torch.save(after, place / "expected.pt")
        if name == COMPARED:
            _compare_with_universal(place, number + 1, engine)


def _compare_with_universal(place: Path, step: int, engine: Any) -> None:
    """DeepSpeed's own conversion finds the same bits in the checkpoint."""
    from deepspeed.checkpoint import ds_to_universal

    checkpoint = place / f"run/step_{step:08d}"
    target = place / f"universal_{step}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(checkpoint),
                output_folder=str(target),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    names = [[name for name, _ in group] for group in trained_parameters(engine)]
    states = read_states(checkpoint, names)
    compared = 0
    for name in states.pieces:
        for kind in (MASTER, *states.kinds()):
            theirs = torch.load(target / "zero" / name / f"{kind}.pt", weights_only=False)["param"]
            ours = states.part(name, kind, 0, theirs.numel())
            assert torch.equal(ours, theirs.flatten().float()), (name, kind)
            compared += 1
    assert compared == 3 * sum(len(group) for group in names)
