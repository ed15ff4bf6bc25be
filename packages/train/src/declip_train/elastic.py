"""Continue a run on other processes or another ZeRO stage than its checkpoint was written by.

DeepSpeed 0.19.8 refuses to load ZeRO's files in another number of processes and names its universal
checkpoint. For this trainer's models that is of no use, as was found on CPU: it cannot convert a
parameter without dimensions, as open_clip's logit scale is (``zero-dimensional tensor ... cannot be
concatenated``); it does not restore a module's buffers (a bank's entries and batch norms'
statistics stay as they were drawn); it knows Adam's moments alone (SGD's momentum is refused); it
converts neither from stage 0 nor to it; and a process whose share holds no element of a group
fails. So the states are put together here, by parameter name, from the very records that DeepSpeed
writes for its universal checkpoint (``param_slice_mappings``): which part of each parameter stands
where in a process's flat buffers. The tests convert with DeepSpeed's own program where it can, and
ask for equal bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train.checkpoint_files import read_state

__all__ = ["ScaleState", "TrainedStates", "read_states", "restore_states", "trained_parameters"]

MASTER = "fp32"
"""Name of a parameter's own values among its states, as DeepSpeed calls them."""
_COUNT = "step"
"""Of an optimizer's states, the one that is a number and not of the parameter's shape."""
_MODEL_FILE = "mp_rank_00_model_states.pt"
_SHARE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


@dataclass(frozen=True, kw_only=True)
class ScaleState:
    """Float16's loss scale: its value, steps it has seen, the last of them that overflowed."""

    scale: float
    steps: int
    last_overflow: int


@dataclass(frozen=True, kw_only=True)
class _Piece:
    start: int
    """Place of the first value in the parameter, counted in its elements."""
    values: Tensor


@dataclass
class TrainedStates:
    """Exact weights and optimizer states of every trained parameter, by its name."""

    pieces: dict[str, dict[str, list[_Piece]]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    """The optimizer's count of steps, for the parameters that have one."""
    loss_scale: ScaleState | None = None

    def add(self, name: str, kind: str, start: int, values: Tensor) -> None:
        """Take in one part of a parameter's state; ``values`` is flat."""
        if values.numel():
            own = self.pieces.setdefault(name, {}).setdefault(kind, [])
            own.append(_Piece(start=start, values=values))

    def kinds(self) -> list[str]:
        """States beside the weights that some parameter has, sorted."""
        return sorted({kind for own in self.pieces.values() for kind in own} - {MASTER})

    def part(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """``count`` elements of a parameter's state from ``start`` on, float32.

        A parameter that never had a gradient has no state in stage 0; it is zero in ZeRO's.

        Raises:
            DeclipError: the checkpoint lacks some of them.
        """
        found = self.pieces.get(name, {}).get(kind)
        part = torch.zeros(count, dtype=torch.float32)
        if found is None and kind != MASTER:
            return part
        filled = 0
        for piece in found or ():
            low = max(start, piece.start)
            high = min(start + count, piece.start + piece.values.numel())
            if low < high:
                part[low - start : high - start] = piece.values[low - piece.start :][: high - low]
                filled += high - low
        if filled != count:
            raise DeclipError(
                f"the checkpoint holds {filled} of {count} numbers of {name!r} ({kind}); delete "
                "it and run again, or go on with as many processes and the ZeRO stage it names."
            )
        return part

    def count_of(self, names: Iterable[str]) -> Any:
        """The count of steps that holds for parameters together: the largest; None without one."""
        found = [self.counts[name] for name in names if name in self.counts]
        # A copy: torch counts in place, and ZeRO's parameters have one count together.
        return deepcopy(max(found, key=float)) if found else None


def trained_parameters(engine: Any) -> list[list[tuple[str, nn.Parameter]]]:
    """Name and parameter of all that the optimizer updates, in its groups and order."""
    optimizer = engine.optimizer
    for name in ("bit16_groups", "fp16_groups"):
        if hasattr(optimizer, name):
            groups: Sequence[Sequence[nn.Parameter]] = getattr(optimizer, name)
            break
    else:
        groups = [group["params"] for group in optimizer.param_groups]
    return [[(engine.param_names[p], p) for p in group] for group in groups]


def read_states(folder: Path, names: Sequence[Sequence[str]]) -> TrainedStates:
    """States out of a checkpoint of any ZeRO stage (0 to 2) and number of processes.

    Args:
        folder: a checkpoint that was verified.
        names: of the trained parameters, in the optimizer's groups and order, for stage 0, which
            numbers them.
    """
    shares = {}
    for path in folder.iterdir():
        found = _SHARE.fullmatch(path.name)
        if found:
            shares[int(found.group(1))] = path
    states = TrainedStates()
    if not shares:
        _read_whole(states, read_state(folder / _MODEL_FILE), names)
    reached: dict[str, int] = {}
    for rank in sorted(shares):
        _read_share(states, read_state(shares[rank])["optimizer_state_dict"], reached)
    return states


def _read_whole(
    states: TrainedStates, content: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> None:
    """Stage 0: every state whole, under the parameter's number."""
    optimizer = content["optimizer"]
    in_order = [name for group in names for name in group]
    if "fp32_groups" in optimizer:
        masters = [values for group in optimizer["fp32_groups"] for values in group]
        if optimizer["dynamic_loss_scale"]:
            states.loss_scale = ScaleState(
                scale=optimizer["cur_scale"],
                steps=optimizer["cur_iter"],
                last_overflow=optimizer["last_overflow_iter"],
            )
        optimizer = optimizer["optimizer_state_dict"]
    else:
        masters = [content["module"][name] for name in in_order]
    for number, (name, values) in enumerate(zip(in_order, masters, strict=True)):
        states.add(name, MASTER, 0, values.flatten())
        for kind, state in optimizer["state"].get(number, {}).items():
            if kind == _COUNT:
                states.counts[name] = state
            elif isinstance(state, Tensor):
                states.add(name, kind, 0, state.flatten())


def _read_share(states: TrainedStates, share: Mapping[str, Any], reached: dict[str, int]) -> None:
    """Stages 1 and 2: what one process holds, in flat buffers, one for each group.

    Args:
        states: to add to.
        share: of the process.
        reached: elements of each parameter that the processes before hold; brought up to date.
    """
    by_group = share["base_optimizer_state"]["state"]
    scaler = share["loss_scaler"]
    if scaler.dynamic:
        states.loss_scale = ScaleState(
            scale=scaler.cur_scale, steps=scaler.cur_iter, last_overflow=scaler.last_overflow_iter
        )
    for group, places in enumerate(share["param_slice_mappings"]):
        flat = {MASTER: share["single_partition_of_fp32_groups"][group]}
        own = by_group.get(group, {})
        flat |= {k: v for k, v in own.items() if k != _COUNT and isinstance(v, Tensor)}
        for name, place in places.items():
            start = reached.get(name, 0)
            for kind, values in flat.items():
                states.add(name, kind, start, values[place.start : place.start + place.numel])
            if _COUNT in own:
                states.counts[name] = own[_COUNT]
            reached[name] = start + place.numel


def restore_states(engine: Any, folder: Path) -> None:
    """Load a checkpoint of other processes, or another ZeRO stage, into DeepSpeed's engine.

    Every process calls this; each reads what it will hold, straight from the mapped files. Weights,
    buffers, the optimizer's states, the loss scale and the counts of steps are then as they were,
    to the bit.

    Args:
        engine: DeepSpeed's, of stage 0, 1 or 2, which may have taken no step.
        folder: a checkpoint that was verified.

    Raises:
        DeclipError: the checkpoint lacks some number.
    """
    content = read_state(folder / _MODEL_FILE)
    groups = trained_parameters(engine)
    names = [[name for name, _ in group] for group in groups]
    states = read_states(folder, names)
    engine.module.load_state_dict(content["module"])
    optimizer = engine.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        _fill_shares(optimizer, states, groups)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        masters = [copy for group in optimizer.fp32_groups for copy in group]
        _fill_whole(optimizer.optimizer, states, names, masters)
    else:
        masters = [parameter for group in groups for _, parameter in group]
        _fill_whole(optimizer, states, names, masters)
    _restore_scale(optimizer, states.loss_scale)
    for count in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, count, content[count])


@torch.no_grad()
def _fill_whole(
    base: torch.optim.Optimizer,
    states: TrainedStates,
    names: Sequence[Sequence[str]],
    masters: Sequence[Tensor],
) -> None:
    """Into stage 0: ``masters`` are the tensors that the optimizer updates, in its order."""
    everything: dict[int, dict[str, Any]] = {}
    in_order = (name for group in names for name in group)
    for number, (name, master) in enumerate(zip(in_order, masters, strict=True)):
        master.copy_(states.part(name, MASTER, 0, master.numel()).view(master.shape))
        own: dict[str, Any] = {
            kind: states.part(name, kind, 0, master.numel()).view(master.shape)
            for kind in states.kinds()
            if kind in states.pieces.get(name, {})
        }
        if name in states.counts:
            own[_COUNT] = states.count_of([name])
        if own:
            everything[number] = own
    base.load_state_dict({"state": everything, "param_groups": base.state_dict()["param_groups"]})


@torch.no_grad()
def _fill_shares(
    optimizer: Any, states: TrainedStates, groups: Sequence[Sequence[tuple[str, nn.Parameter]]]
) -> None:
    """Into stages 1 and 2: this process's part of each group's flat buffers."""
    base = optimizer.optimizer
    kinds = states.kinds()
    everything: dict[int, dict[str, Any]] = {}
    for number, group in enumerate(groups):
        master = optimizer.single_partition_of_fp32_groups[number]
        flat = {kind: torch.zeros_like(master, requires_grad=False) for kind in kinds}
        for name, parameter in group:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # All of it is with other processes.
                continue
            here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            for kind, buffer in {MASTER: master, **flat}.items():
                part = states.part(name, kind, there.start, there.numel)
                buffer[here.start : here.start + here.numel].copy_(part)
        own: dict[str, Any] = dict(flat)
        count = states.count_of(name for name, _ in group)
        if count is not None:
            own[_COUNT] = count
        if own:
            everything[number] = own
    base.load_state_dict({"state": everything, "param_groups": base.state_dict()["param_groups"]})


def _restore_scale(optimizer: Any, saved: ScaleState | None) -> None:
    if saved is None:
        return
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        scaler = optimizer.loss_scale_config
    else:
        scaler = optimizer.loss_scaler
    scaler.cur_scale = saved.scale
    scaler.cur_iter = saved.steps
    scaler.last_overflow_iter = saved.last_overflow
