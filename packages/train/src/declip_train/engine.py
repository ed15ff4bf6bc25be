"""Model, optimizer and DeepSpeed: what one training step does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train import watching
from declip_train.batch_record import BatchRecord, GeneratorStates
from declip_train.compiling import compile_towers
from declip_train.grad_cache import encode_parts, term_gradients
from declip_train.loader import Batch
from declip_train.methods import method_terms
from declip_train.module import TrainModule, finish_metrics, forward_text_by_length
from declip_train.optimizer import build_optimizer, learning_rate, parameter_groups
from declip_train.phases import PhaseTimes
from declip_train.precision import (
    clamp_scale,
    deepspeed_precision,
    exact_batch_norm,
    full_precision,
    missing_loss_scale,
    refuse_precision,
)
from declip_train.pretrained import load_pretrained
from declip_train.settings import TrainSettings
from declip_train.tokenwise_triton import refuse_unless_usable

__all__ = [
    "StepRecord",
    "TrainEngine",
    "TrainModule",
    "deepspeed_config",
    "forward_text_by_length",
    "learning_rate",
    "parameter_groups",
]

_NOT_TO_BE_SENT = "ds_optim_param"
# Of the float16 loss scale: from 2^16 down to 1 takes 18 skipped steps in a row.
_SKIPPED_STEPS_IN_A_ROW = 20


def deepspeed_config(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own settings for this run.

    Bucket sizes are in elements: 50 million are 200 MB of float32, one bucket for models up to
    ViT-S and a bound on memory for large ones; ``benchmarks/deepspeed_overhead.py`` measures them.
    """
    steps = settings.accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": settings.global_batch_size // world_size // steps,
        "gradient_accumulation_steps": steps,
        # None of these methods clips; left out, DeepSpeed would clip at a norm of 1.
        "gradient_clipping": 0.0,
        "train_batch_size": settings.global_batch_size,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "contiguous_gradients": settings.zero_stage == 2,
            "overlap_comm": False,
            # Nobody reads the gradient's norm, and DeepSpeed takes it in float64: a tenth of a
            # small model's step in stage 2. (Stage 0 refuses the setting, and takes none.)
            **({"compute_grad_norm": False} if settings.zero_stage else {}),
        },
        **deepspeed_precision(settings),
        # The optimizers are torch's and ours: torch's vectorized CPU path needs no compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step reports; the same on every process."""

    terms: Mapping[str, float]
    """Mean of each loss term over processes, and their weighted sum as ``total``."""
    metrics: Mapping[str, float]
    """What else the method tells of the step; see ``module.finish_metrics``."""
    learning_rate: float
    logit_scale: float
    """The factor, not its logarithm, that the step was computed with (method filip: the one of its
    token features)."""
    skipped: bool
    """Whether the weights stayed as they were because gradients overflowed (bf16 and fp16)."""
    stop_asked: bool
    """Whether some process was asked to stop (SIGTERM)."""
    save_asked: bool
    """Whether some process finds that a checkpoint is due."""
    watched: Mapping[str, float] = field(default_factory=dict)
    """At steps that the log has a record of: ``gradient_norm`` and the features' spreads, see
    :mod:`declip_train.watching`."""


_Arrival = Callable[[float], StepRecord]
"""Waits for a step's numbers; takes its learning rate."""


def _rows(rows: Sequence[int]) -> list[str]:
    return [f"row {row}" for row in rows]


class _Computation(nn.Module):
    """What DeepSpeed takes for the model: it calls any function of the towers and heads.

    With accumulated gradients, what runs under DeepSpeed's eyes is not the module's forward pass.
    """

    def __init__(self, module: TrainModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], object]) -> object:
        return function()


def _refuse_kernel(settings: TrainSettings, device: torch.device) -> None:
    """Say before anything starts that the device cannot run the chosen kernel."""
    if settings.tokenwise_kernel == "triton" and settings.method_parts.has("tokenwise"):
        try:
            refuse_unless_usable(device, torch.float32)
        except ValueError as error:
            raise DeclipError(f"tokenwise_kernel is triton, but {error}") from error


class TrainEngine:
    """One process's share of training.

    Args:
        settings: the run.
        num_steps: steps of the whole run, for the schedule.
        folder: of the run, where a batch is kept whose loss is not finite; None: it is not.
        keys_of: keys of samples by their rows (``Batch.sample_ids``), for naming them; None: rows
            are named.
        say: takes lines about the weights that training starts from.

    Raises:
        DeclipError: the device has no such precision, the compiler is missing, or the model has
            nothing to freeze.
    """

    def __init__(
        self,
        settings: TrainSettings,
        num_steps: int,
        *,
        folder: Path | None = None,
        keys_of: Callable[[list[int]], list[str]] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.settings, self.num_steps = settings, num_steps
        self.folder, self.keys_of = folder, keys_of or _rows
        self.world_size = dist.get_world_size()
        self.device = torch.device(get_accelerator().current_device_name())
        self.phases = PhaseTimes(self.device)
        refuse_precision(settings)
        _refuse_kernel(settings, self.device)
        self.weights = dict(method_terms(settings.method, settings.weighting))
        self.module = TrainModule(settings).to(self.device)
        if settings.freeze_patch_embedding:
            self.module.clip.freeze_patch_embedding()
        if settings.grad_checkpointing:
            self.module.clip.set_grad_checkpointing()
        load_pretrained(self.module, settings, say)
        self.scales = [
            parameter
            for name, parameter in self.module.named_parameters()
            if name.rpartition(".")[2] == "logit_scale" and parameter.requires_grad
        ]
        self.deepspeed = self._start_deepspeed()
        self._skipped_in_a_row = 0
        self._own_terms: Mapping[str, Tensor] = {}
        self._features: Mapping[str, Tensor] = {}
        self._previous_ids: Tensor | None = None
        exact_batch_norm(self.module)
        self.module.train()
        if settings.compile:
            compile_towers(self.module.clip, checkpointed=settings.grad_checkpointing)

    def _start_deepspeed(self) -> Any:
        # DeepSpeed 0.19.8 sends the weights to all processes, one by one and as bytes, and fails at
        # a parameter without dimensions, as open_clip's logit scale is. This mark of "not to be
        # sent" is true of all our weights: every process has drawn the same.
        parameters = list(self.module.parameters())
        for parameter in parameters:
            setattr(parameter, _NOT_TO_BE_SENT, True)
        engine, optimizer, *_ = deepspeed.initialize(
            model=_Computation(self.module),
            optimizer=build_optimizer(self.module, self.settings),
            config=deepspeed_config(self.settings, self.world_size),
            dist_init_required=False,
        )
        for parameter in parameters:
            delattr(parameter, _NOT_TO_BE_SENT)
        # DeepSpeed's wrapper of stage 0 in half precision has taken a step without gradients; it
        # moved nothing, but is counted in Adam's bias correction.
        optimizer.state.clear()
        return engine

    def train_step(
        self, batch: Batch, *, stop_asked: bool = False, save_asked: bool = False
    ) -> StepRecord:
        """Forward, backward, update. What one process asks for, the record tells all of them.

        Raises:
            DeclipError: a loss term is not finite on some process (on all processes, at the same
                step; nothing is updated), nor, at a step that the log has a record of, the
                gradient; or float16 overflows however small its loss scale.
        """
        given, generators = batch, GeneratorStates.take(self.device)
        with self.phases.phase("augment"):
            batch = batch.to(self.device)
        rate = learning_rate(self.settings, batch.step, self.num_steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        wishes = (stop_asked, save_asked)
        parts = self.settings.accumulation_steps
        arrive = (
            self._compute_at_once(batch, wishes)
            if parts == 1
            else self._compute_in_parts(batch, parts, wishes)
        )
        watch = self._watch(batch)
        # The device computes gradients while the host waits for the losses alone.
        record = arrive(rate)
        wrong = [name for name, value in record.terms.items() if not math.isfinite(value)]
        if wrong:
            fault = f"the loss term {wrong[0]!r} became {record.terms[wrong[0]]}"
            self._refuse(given, generators, fault)
        watched = watch()
        norm = watched.get("gradient_norm", 0.0)
        if not math.isfinite(norm) and not self._skips_overflows:
            self._refuse(given, generators, f"the losses are finite, but their gradient is {norm}")
        self._features = {}
        with self.phases.phase("step"):
            skipped = self._update(batch.step)
            for parameter in self.scales:
                clamp_scale(
                    parameter,
                    full_precision(parameter, self.deepspeed.optimizer),
                    self.settings.logit_scale_min,
                    self.settings.logit_scale_max,
                )
            self.module.after_step()
        self._previous_ids = given.sample_ids
        return replace(record, skipped=skipped, watched=watched)

    @property
    def _skips_overflows(self) -> bool:
        """Whether DeepSpeed takes no step where a gradient is not finite."""
        return self.settings.precision in ("bf16", "fp16")

    def _is_watched(self, step: int) -> bool:
        """Whether the log has a record of this step (from 0)."""
        return (step + 1) % self.settings.log_every_steps == 0 or step + 1 == self.num_steps

    def _compute_at_once(self, batch: Batch, wishes: tuple[bool, bool]) -> _Arrival:
        with self.phases.phase("forward"):
            terms, metrics = self.deepspeed(lambda: self._encode_and_compare(batch))
            total = self._total(terms)
            arrival = self._send({**terms, "total": total}, metrics, wishes)
        self._backward(total)
        return arrival

    def _encode_and_compare(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        encoded = self.module.encode(batch)
        self._features = {name: value.detach() for name, value in encoded.items()}
        return self.module.terms(encoded, batch)

    def _compute_in_parts(self, batch: Batch, parts: int, wishes: tuple[bool, bool]) -> _Arrival:
        """Gradients of the whole batch by :mod:`grad_cache`; DeepSpeed's step is not taken yet."""
        with self.phases.phase("forward"):
            encoded = encode_parts(self.module, batch, parts)
            self._features = {name: value.detach() for name, value in encoded.features.items()}
            terms, metrics = self.module.terms(encoded.features, batch)
            total = self._total(terms)
            arrival = self._send({**terms, "total": total}, metrics, wishes)
        optimizer = self.deepspeed.optimizer
        with self.phases.phase("backward"):
            gradients = term_gradients(
                total, encoded, self.module, float(getattr(optimizer, "loss_scale", 1.0))
            )
        surrogates = gradients.surrogates(self.module)
        for part in range(parts):
            with self.phases.phase("forward"):
                surrogate = self.deepspeed(lambda: next(surrogates))
            self._backward(surrogate)
            if part + 1 < parts:
                # Not at DeepSpeed's boundary: it counts the part, and updates nothing.
                self.deepspeed.step()
        return arrival

    def _watch(self, batch: Batch) -> Callable[[], Mapping[str, float]]:
        """Start on what a record says beside the losses, once a record; nothing is changed by it.

        All processes do this at the same steps; the result waits for the numbers.
        """
        if not self._is_watched(batch.step):
            return dict
        with self.phases.phase("other"):
            spreads = watching.feature_spreads(
                self._features, self.module.clip.caption_mask(batch.token_ids)
            )
            squared = watching.squared_gradient_norm(
                self.module.parameters(), self.deepspeed.optimizer
            )
            return watching.shared_numbers(spreads, squared.to(self.device))

    def _refuse(self, batch: Batch, generators: GeneratorStates, fault: str) -> NoReturn:
        """Keep the batch, and end on all processes with one sentence that says where to look.

        Raises:
            DeclipError: always.
        """
        self._own_terms, terms = {}, {n: float(v) for n, v in self._own_terms.items()}
        rows = watching.rows_not_finite(self._features, batch)
        ids = batch.sample_ids.tolist()
        record = BatchRecord(
            step=batch.step,
            rank=dist.get_rank(),
            world_size=self.world_size,
            fault=fault,
            terms={name: str(number) for name, number in terms.items()},
            keys=self.keys_of(ids),
            bad_keys=self.keys_of([ids[row] for row in rows]),
            bad_parameter=watching.parameter_not_finite(self.module),
            previous_keys=[],
            settings=self.settings,
            batch=batch,
            generators=generators,
        )
        if record.bad_parameter is not None and self._previous_ids is not None:
            record = replace(record, previous_keys=self.keys_of(self._previous_ids.tolist()))
        raise DeclipError(watching.keep_and_tell(record, self.folder, self.module))

    def _total(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def _backward(self, loss: Tensor) -> None:
        # The parts' gradients add up to the batch's: no mean over parts is to be taken. In stage 0
        # DeepSpeed 0.19.8 takes one all the same, if it is given the very tensor that its forward
        # pass returned; a product is another tensor.
        with self.phases.phase("backward"):
            scaled = loss * missing_loss_scale(self.deepspeed.optimizer)
            self.deepspeed.backward(scaled, scale_wrt_gas=False)

    def _update(self, step: int) -> bool:
        """DeepSpeed's step; returns whether it was skipped because a gradient overflowed."""
        fault: Exception | None = None
        try:
            self.deepspeed.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            fault = error
        if fault is None and self.deepspeed.was_step_applied():
            self._skipped_in_a_row = 0
            return False
        self._skipped_in_a_row += 1
        if fault is not None or self._skipped_in_a_row > _SKIPPED_STEPS_IN_A_ROW:
            raise DeclipError(
                f"gradients in {self.settings.precision} are not finite at step {step}, nor were "
                f"they in the {self._skipped_in_a_row - 1} steps before it, however small the loss "
                "was made; lower peak_lr, or set precision to amp_bf16 or fp32."
            ) from fault
        return True

    def _send(
        self,
        terms: Mapping[str, Tensor],
        metrics: Mapping[str, Tensor],
        wishes: tuple[bool, bool],
    ) -> _Arrival:
        """Average terms and metrics over processes in one small reduction, which also carries the
        wishes to stop and to save, so that all processes take the same decision at the same step.

        The numbers start on their way to the host here; the result waits for them.
        """
        self._own_terms = {name: value.detach() for name, value in terms.items()}
        names = (*terms, *metrics)
        values = [v.detach().float().reshape(()) for v in (*terms.values(), *metrics.values())]
        values += [torch.full((), float(wish), device=self.device) for wish in wishes]
        shared = torch.stack([value.to(self.device) for value in values])
        dist.all_reduce(shared)
        own = torch.stack([scale.detach().float().exp() for scale in self.scales])
        numbers, event = torch.cat([shared, own]), None
        if self.device.type == "cuda":
            pinned = torch.empty(numbers.shape, pin_memory=True)
            numbers = pinned.copy_(numbers, non_blocking=True)
            event = torch.Event(self.device)
            event.record()

        def arrive(rate: float) -> StepRecord:
            if event is not None:
                event.synchronize()
            found = numbers.tolist()
            means = [value / self.world_size for value in found[: len(names)]]
            stops, saves, scale, *others = found[len(names) :]
            more = {"token_logit_scale": others[0]} if others else {}
            averages = dict(zip(names[len(terms) :], means[len(terms) :], strict=True))
            return StepRecord(
                terms=dict(zip(terms, means[: len(terms)], strict=True)),
                metrics={**finish_metrics(averages), **more},
                learning_rate=rate,
                logit_scale=scale,
                skipped=False,
                stop_asked=stops > 0,
                save_asked=saves > 0,
            )

        return arrive

    def require_finite_weights(self, step: int) -> None:
        """Refuse to keep weights that a gradient has spoilt; call this before they are saved.

        A loss can be finite and its gradient not. The weights are the same on all processes, so all
        of them refuse.

        Raises:
            DeclipError: a parameter is not finite.
        """
        for name, parameter in self.module.named_parameters():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise DeclipError(
                    f"the parameter {name!r} is not finite after step {step}, though the losses "
                    "were; lower peak_lr or raise warmup_steps; the last checkpoint is from before "
                    "that."
                )

    def full_logit_scale(self) -> float:
        """Logarithm of the logit scale as the optimizer holds it; a collective operation."""
        parameter = self.scales[0]
        copy = full_precision(parameter, self.deepspeed.optimizer)
        if self.settings.zero_stage > 0:
            # One process holds it; the others bring nothing.
            own = torch.zeros(1, device=self.device) if copy is None else copy.detach().float()
            shared = own.reshape(1).clone()
            dist.all_reduce(shared)
            return float(shared)
        return float(parameter.detach() if copy is None else copy.detach())
