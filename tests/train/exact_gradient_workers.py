"""What each process of the exactness tests does, in a module that other processes can import."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from declip_train.settings import TrainSettings

# A power of two: what the weights lose to rounding is small beside the gradient, which comes back
# exactly.
RATE = 1024.0
SETTINGS = TrainSettings(
    model="test",
    global_batch_size=32,
    max_steps=40,
    warmup_steps=0,
    peak_lr=RATE,
    start_lr=0.0,
    optimizer="sgd",
    beta1=0.0,
    weight_decay=0.0,
    batch_norm="synchronized",
    projector_dim=32,
    predictor_hidden_dim=16,
    simclr_hidden_dim=32,
    simclr_dim=16,
    token_dim=16,
)


class Case(NamedTuple):
    """One run of one step (with the bank: two, of which the first only fills it)."""

    method: str
    zero_stage: int = 0
    accumulation_steps: int = 1
    neighbor_source: str = "index"
    model: str = "test"
    batch_norm: str = "synchronized"

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in self)

    def __str__(self) -> str:
        return self.name

    @property
    def reference(self) -> Case:
        """The same in one process and at once."""
        return self._replace(zero_stage=0, accumulation_steps=1)


METHODS = (
    Case("clip"),
    Case("slip"),
    Case("filip"),
    Case("declip"),
    Case("declip", neighbor_source="bank"),
    Case("defilip"),
    Case("defilip", neighbor_source="bank"),
)
RESNET = Case("clip", model="test-rn")
# What batch norm over each process's own rows, or over each part's, does to the gradient.
LOCAL = (
    Case("declip", batch_norm="local"),
    Case("slip", batch_norm="local"),
    RESNET._replace(batch_norm="local"),
    RESNET._replace(accumulation_steps=4),
)


def cases(processes: int) -> list[Case]:
    """What so many processes compute.

    Each method and ZeRO stage, at once or in four parts: which of the two it is, alternates with
    the method, the stage and the number of processes. So two and four processes together show
    every method under every stage both at once and in parts.
    """
    resnets = [RESNET._replace(zero_stage=stage) for stage in (0, 1, 2)]
    if processes == 1:
        plain = [*METHODS, RESNET, *(case._replace(accumulation_steps=4) for case in METHODS)]
        return list(dict.fromkeys([*plain, *(case.reference for case in LOCAL)]))
    several = [
        case._replace(
            zero_stage=stage, accumulation_steps=4 if (place + stage + processes // 2) % 2 else 1
        )
        for place, case in enumerate(METHODS)
        for stage in (0, 1, 2)
    ]
    return [*several, *resnets, *LOCAL] if processes == 2 else [*several, resnets[1]]


@functools.cache
def make_batches(
    model: str, method: str, neighbor_source: str, root: str, process: int, processes: int
) -> list[Any]:
    """This process's share of the first two steps."""
    from declip_train.loader import BatchLoader
    from declip_train.samples import load_samples

    changes: dict[str, Any] = {"model": model, "method": method}
    changes["neighbor_source"] = neighbor_source
    settings = dataclasses.replace(SETTINGS, **changes)
    neighbors = "captions" if settings.uses_index else None
    samples = load_samples(root, selection="default", neighbors=neighbors)
    loader = BatchLoader(samples, settings, process, processes)
    return [loader.make_batch(step) for step in range(2)]


def exact_module() -> type[nn.Module]:
    """The trainer's module with float32 weights and float64 arithmetic.

    A difference is then one of mathematics: what another order of sums moves in float32, batch norm
    and ReLU blow up to a thousandth of a gradient. (DeepSpeed takes no float64 weights.)
    """
    from declip_train.module import TrainModule

    class Exact(TrainModule):
        def __init__(self, settings: TrainSettings) -> None:
            super().__init__(settings)
            self.double()
            for parameter in self.parameters():
                parameter.data = parameter.data.float()

        def encode(self, batch: Any) -> dict[str, Tensor]:
            encoded: dict[str, Tensor] = self._exactly(super().encode, batch)
            return encoded

        def terms(self, encoded: Any, batch: Any) -> Any:
            return self._exactly(super().terms, encoded, batch)

        def _exactly(self, function: Callable[..., Any], *inputs: Any) -> Any:
            weights = {name: p.double() for name, p in self.named_parameters()}
            return functional_call(self, weights, (function, *inputs))

        def forward(self, first: Any, *inputs: Any) -> Any:
            return first(*inputs) if callable(first) else self.terms(self.encode(first), first)

    return Exact


def gradients_of(case: Case, root: str, process: int, processes: int) -> dict[str, Tensor]:
    """Gradient of every parameter: how far a step of plain descent moves it."""
    from declip_train import engine as engine_module

    setattr(engine_module, "TrainModule", exact_module())  # noqa: B010
    # A scale that moves this far would be put back into its bounds.
    setattr(engine_module, "clamp_scale", lambda *_: None)  # noqa: B010
    changes: dict[str, Any] = case._asdict()
    if case.neighbor_source == "bank":
        changes["bank_size"] = 100
    # With two steps of warm-up, the first has a rate of 0.
    steps = 2 if case.neighbor_source == "bank" else 1
    settings = dataclasses.replace(
        SETTINGS, **changes, num_ranks=processes, warmup_steps=2 * (steps - 1)
    )
    engine = engine_module.TrainEngine(settings, SETTINGS.max_steps or 0)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    batches = make_batches(case.model, case.method, case.neighbor_source, root, process, processes)
    for batch in batches[:steps]:
        engine.train_step(batch)
    found = {
        name: (before[name] - parameter.detach()) / RATE
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    _require_equal(found, processes)
    return found


def refusal_of(root: str, process: int, processes: int) -> str:
    """What a step says whose images are no numbers on the last process; checks what it left."""
    from declip_shards import DeclipError
    from declip_train.engine import TrainEngine

    settings = dataclasses.replace(
        SETTINGS, method="declip", neighbor_source="bank", bank_size=100, zero_stage=2
    )
    engine = TrainEngine(settings, SETTINGS.max_steps or 0)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    batch = make_batches("test", "declip", "bank", root, process, processes)[0]
    if process == processes - 1:
        batch = dataclasses.replace(batch, images=torch.full_like(batch.images, float("nan")))
    sentence = "nothing"
    try:
        engine.train_step(dataclasses.replace(batch, step=5))
    except DeclipError as error:
        sentence = str(error)
    assert all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())
    bank = engine.module.bank
    assert bank is not None
    assert int(bank.num_entries()) == 0
    return sentence


def read_refusals(folder: Path, processes: int) -> list[str]:
    """What :func:`run` wrote of them."""
    return [path.read_text() for path in sorted(folder.glob(f"refusal-{processes}-*"))]


def _require_equal(found: dict[str, Tensor], processes: int) -> None:
    """All processes must have taken the very same step."""
    whole = torch.cat([gradient.flatten() for gradient in found.values()])
    first = whole.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(first, whole), f"{processes} processes have drifted apart"


def run(process: int, processes: int, root: str, folder: str) -> None:
    """All cases of one process; process 0 writes what it found."""
    os.environ.update(LOCAL_RANK=str(process), RANK=str(process), WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    import deepspeed

    from declip_train import extension

    with contextlib.redirect_stdout(io.StringIO()):
        extension.use_prebuilt()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting{processes}",
            rank=process,
            world_size=processes,
        )
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
        extension.release_shared_memory()
    try:
        found = {
            case.name: gradients_of(case, root, process, processes) for case in cases(processes)
        }
        if process == 0:
            torch.save(found, Path(folder) / f"{processes}.pt")
        if processes > 1:
            sentence = refusal_of(root, process, processes)
            (Path(folder) / f"refusal-{processes}-{process}").write_text(sentence)
        dist.barrier()
    finally:
        dist.destroy_process_group()
