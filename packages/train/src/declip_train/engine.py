"""Model, optimizer and DeepSpeed: what one training step does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from declip_shards import DeclipError
from declip_train import losses
from declip_train.heads import DeCLIPHeads
from declip_train.loader import Batch
from declip_train.settings import TrainSettings
from declip_train.towers import CLIP, TextOutput

_NOT_TO_BE_SENT = "ds_optim_param"
ROWS_PER_GROUP = 16
"""Captions that share a length on CPUs; see :func:`forward_text_by_length`."""


def forward_text_by_length(
    clip: CLIP,
    token_ids: Tensor,
    *,
    rows_per_group: int,
    replaced: Tensor | None = None,
    mask_embedding: Tensor | None = None,
    need_hidden: bool = False,
) -> TextOutput:
    """The text tower in groups of captions of like length, each cut to its own longest.

    A batch is as long as its longest caption, and most are far shorter; grouping saves about half
    of the tower's work at small sizes. The results are those of one pass, up to rounding.

    Args:
        clip: the towers.
        token_ids: (n, L) int64.
        rows_per_group: captions in a group; n or more makes one pass of it.
        replaced: (n, L) bool, where ``mask_embedding`` (width,) stands in.
        need_hidden: whether to return the states too, (n, longest, width), zero behind each group's
            own longest caption.
    """
    order = torch.argsort(token_ids.argmax(dim=1), stable=True)
    parts = [
        clip.forward_text(
            token_ids[rows],
            need_hidden=need_hidden,
            mask_positions=None if replaced is None else replaced[rows],
            mask_embedding=mask_embedding,
        )
        for rows in torch.split(order, rows_per_group)
    ]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    features = torch.cat([part.features for part in parts])[back]
    hidden: Tensor | None = None
    if need_hidden:
        states = [part.hidden for part in parts if part.hidden is not None]
        longest = max(state.shape[1] for state in states)
        padded = [F.pad(state, (0, 0, 0, longest - state.shape[1])) for state in states]
        hidden = torch.cat(padded)[back]
    return TextOutput(features=features, hidden=hidden)


class TrainModule(nn.Module):
    """Towers and heads; its forward pass gives the loss terms of a batch."""

    def __init__(self, settings: TrainSettings) -> None:
        super().__init__()
        self.settings = settings
        # Every process draws the same weights; nothing needs to be sent.
        generator = torch.Generator().manual_seed(settings.seed)
        self.clip = CLIP(settings.model_config, generator=generator)
        self.heads: DeCLIPHeads | None = None
        if settings.method == "declip":
            self.heads = DeCLIPHeads(
                settings.model_config,
                projector_dim=settings.projector_dim,
                predictor_hidden_dim=settings.predictor_hidden_dim,
                generator=generator,
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms by name: scalars, this process's share (the mean over processes counts)."""
        kind = batch.images.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.settings.precision == "amp_bf16"):
            if self.heads is None:
                return self._clip_terms(batch)
            return self._declip_terms(batch, self.heads)

    def _clip_terms(self, batch: Batch) -> dict[str, Tensor]:
        image_features, text_features, logit_scale = self.clip(batch.images[0], batch.token_ids)
        return {"contrastive": losses.info_nce(image_features, text_features, logit_scale)}

    def _declip_terms(self, batch: Batch, heads: DeCLIPHeads) -> dict[str, Tensor]:
        """DeCLIP (arXiv 2110.05208): both image views in one pass; the masked caption gives the
        feature of the first text view and the states of masked language modeling."""
        assert batch.second_token_ids is not None
        assert batch.neighbor_token_ids is not None
        assert batch.mask_positions is not None
        assert batch.targets is not None
        images = self.clip.forward_image(batch.images.flatten(0, 1)).features
        first, second = images.chunk(2)
        # A GPU is not filled by small groups, and would wait for each one's length.
        on_cpu = batch.images.device.type == "cpu"
        rows = ROWS_PER_GROUP if on_cpu else batch.token_ids.shape[0]
        masked = forward_text_by_length(
            self.clip,
            batch.token_ids,
            rows_per_group=rows,
            replaced=batch.replaced,
            mask_embedding=heads.mask_embedding,
            need_hidden=True,
        )
        other = forward_text_by_length(
            self.clip, batch.second_token_ids, rows_per_group=rows
        ).features
        with torch.no_grad():
            ids = batch.neighbor_token_ids
            near = forward_text_by_length(self.clip, ids, rows_per_group=rows).features
            neighbors = F.normalize(near, dim=-1)
        scale = self.clip.logit_scale.exp()
        image_views = [F.normalize(first, dim=-1), F.normalize(second, dim=-1)]
        text_views = [F.normalize(masked.features, dim=-1), F.normalize(other, dim=-1)]
        pairs = losses.multi_view_info_nce(
            image_views[0], image_views[1], text_views[0], text_views[1], scale
        )
        (z1, p1), (z2, p2) = heads.project(first), heads.project(second)
        assert masked.hidden is not None
        return {
            "contrastive": pairs.contrastive,
            "multi_view": pairs.multi_view,
            "simsiam": losses.simsiam(p1, z2, p2, z1),
            "masked_language_modeling": losses.masked_language_modeling(
                masked.hidden, batch.mask_positions, batch.targets, heads.mlm_head
            ),
            "neighbor": losses.neighbor_info_nce(
                image_views, [neighbors], scale, batch.has_neighbor
            ),
        }


def learning_rate(settings: TrainSettings, step: int, num_steps: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then a cosine to ``end_lr``.

    With W warm-up steps and T steps, step 0 has ``start_lr``, step W - 1 the peak, step T - 1
    nearly ``end_lr`` (CLIP, arXiv 2103.00020, section 2.5; DeCLIP's released schedule).
    """
    warmup = settings.warmup_steps
    if step < warmup:
        share = step / (warmup - 1) if warmup > 1 else 1.0
        return settings.start_lr + (settings.peak_lr - settings.start_lr) * share
    progress = (step - warmup) / max(1, num_steps - warmup)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return settings.end_lr + (settings.peak_lr - settings.end_lr) * fall


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups. Exempt from decay: biases of layers, gains of norms, the logit scale.

    Packed attention biases, positions, classes, embeddings and projections do decay, as in the
    released configurations of DeCLIP (CLIP's paper exempts all gains and biases).
    """
    exempt: set[int] = set()
    for owner in module.modules():
        if isinstance(owner, nn.LayerNorm | nn.BatchNorm1d):
            exempt.update(id(p) for p in owner.parameters(recurse=False))
        elif isinstance(owner, nn.Linear | nn.Conv2d) and owner.bias is not None:
            exempt.add(id(owner.bias))
    exempt.update(id(p) for name, p in module.named_parameters() if "logit_scale" in name)
    decayed = [p for p in module.parameters() if id(p) not in exempt]
    plain = [p for p in module.parameters() if id(p) in exempt]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def deepspeed_config(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own settings for this run."""
    return {
        "train_micro_batch_size_per_gpu": settings.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        # None of these methods clips; left out, DeepSpeed would clip at a norm of 1.
        "gradient_clipping": 0.0,
        "train_batch_size": settings.global_batch_size,
        "zero_optimization": {
            "stage": settings.zero_stage,
            # One bucket for a laptop's model, and a bound on memory for a large one.
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "contiguous_gradients": settings.zero_stage == 2,
            "overlap_comm": False,
        },
        # The optimizer is torch's AdamW: the vectorized CPU path needs no compiler.
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
    learning_rate: float
    logit_scale: float
    """The factor, not its logarithm, that the step was computed with."""
    stop_asked: bool
    """Whether some process was asked to stop (SIGTERM)."""
    save_asked: bool
    """Whether some process finds that a checkpoint is due."""


class TrainEngine:
    """One process's share of training.

    Args:
        settings: the run.
        num_steps: steps of the whole run, for the schedule.
    """

    def __init__(self, settings: TrainSettings, num_steps: int) -> None:
        self.settings, self.num_steps = settings, num_steps
        self.world_size = dist.get_world_size()
        self.device = torch.device(get_accelerator().current_device_name())
        self.weights = dict(losses.method_terms(settings.method, settings.weighting))
        self.module = TrainModule(settings).to(self.device)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.module, settings.weight_decay),
            lr=settings.start_lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        # DeepSpeed 0.19.8 sends the weights to all processes as bytes, and fails at a parameter
        # without dimensions, as open_clip's logit scale is. This mark of "not to be sent" is true
        # of all our weights: every process has drawn the same.
        logit_scale = self.module.clip.logit_scale
        setattr(logit_scale, _NOT_TO_BE_SENT, True)
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=deepspeed_config(settings, self.world_size),
            dist_init_required=False,
        )
        delattr(logit_scale, _NOT_TO_BE_SENT)
        self.module.train()

    def train_step(
        self, batch: Batch, *, stop_asked: bool = False, save_asked: bool = False
    ) -> StepRecord:
        """Forward, backward, update. What one process asks for, the record tells all of them.

        Raises:
            DeclipError: a loss term is not finite on some process; nothing is updated.
        """
        batch = batch.to(self.device)
        rate = learning_rate(self.settings, batch.step, self.num_steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate
        terms = self.deepspeed(batch)
        total = sum((self.weights[name] * term for name, term in terms.items()), torch.tensor(0.0))
        record = self._share({**terms, "total": total}, rate, (stop_asked, save_asked))
        wrong = [name for name, value in record.terms.items() if not math.isfinite(value)]
        if wrong:
            raise DeclipError(
                f"the loss term {wrong[0]!r} became {record.terms[wrong[0]]} at step {batch.step}; "
                "lower peak_lr or raise warmup_steps; the last checkpoint is from before that."
            )
        self.deepspeed.backward(total)
        self.deepspeed.step()
        self._clamp_logit_scale()
        return record

    def _share(
        self, terms: Mapping[str, Tensor], rate: float, asked: tuple[bool, bool]
    ) -> StepRecord:
        """Average the terms over processes in one small reduction, which also carries the wishes
        to stop and to save, so that all processes take the same decision at the same step."""
        scalars = [term.detach().float().reshape(()).to(self.device) for term in terms.values()]
        packed = torch.stack(scalars + [torch.tensor(float(a), device=self.device) for a in asked])
        dist.all_reduce(packed)
        *means, stops, saves = packed.tolist()
        return StepRecord(
            terms={n: value / self.world_size for n, value in zip(terms, means, strict=True)},
            learning_rate=rate,
            logit_scale=float(self.module.clip.logit_scale.detach().exp()),
            stop_asked=stops > 0,
            save_asked=saves > 0,
        )

    @torch.no_grad()
    def _clamp_logit_scale(self) -> None:
        """Keep the logit scale in its interval, in DeepSpeed's own copy too.

        ZeRO updates its copy and overwrites the module's, so a clamp of the module alone would be
        undone by the next step.
        """
        parameter = self.module.clip.logit_scale
        low, high = self.settings.logit_scale_min, self.settings.logit_scale_max
        value = float(parameter.detach())
        clamped = min(max(value, low), high)
        if clamped == value:
            return
        if self.settings.zero_stage > 0:
            safe_set_full_fp32_param(parameter, torch.full_like(parameter, clamped))
        parameter.fill_(clamped)

    def full_logit_scale(self) -> float:
        """Logarithm of the logit scale as the optimizer holds it; a collective operation."""
        parameter = self.module.clip.logit_scale
        value = safe_get_full_fp32_param(parameter) if self.settings.zero_stage > 0 else None
        return float((parameter if value is None else value).detach())
