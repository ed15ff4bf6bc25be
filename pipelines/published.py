"""What the training recipes set: lists of pairs, settings of each source, published results.

Every figure is from a paper or a released configuration. Where none was found the entry says so:
nothing here is from memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from declip_ingest.stages import DownloadShards
from declip_train.stages import TrainModel
from pipelines.pipeline import Pipeline, Step
from pipelines.wiring import derive_training, list_steps

NONE_PUBLISHED = "no result published"


@dataclass(frozen=True, kw_only=True)
class PairList:
    """A published list of URLs and captions."""

    title: str
    """As papers call it."""
    num_samples: int
    """Rows of the list; what a download still finds is less."""
    is_rounded: bool = False
    """Whether papers and cards give the number of rows only roughly."""


LISTS: Mapping[str, PairList] = MappingProxyType(
    {
        "yfcc15m-v2": PairList(title="YFCC15M V2", num_samples=15_388_848),
        "yfcc15m-v1": PairList(title="YFCC15M V1", num_samples=14_689_580),
        "cc3m": PairList(title="CC3M", num_samples=3_318_333),
        "cc12m": PairList(title="CC12M", num_samples=12_000_000, is_rounded=True),
        "yfcc100m": PairList(
            title="YFCC100M (FILIP's choice)", num_samples=26_000_000, is_rounded=True
        ),
        "declip-88m": PairList(title="DeCLIP's 88M", num_samples=88_000_000, is_rounded=True),
    }
)
"""Every list by the first part of its recipes' names."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One recipe: what it sets, and what others reached."""

    pairs: str
    """Key in `LISTS`."""
    acc1: float | None = None
    """Published zero-shot top-1 on ImageNet, percent; None: no result published."""
    source: str = ""
    """Where that number stands."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the training stage; all others have their defaults."""

    @property
    def result(self) -> str:
        """The published number as tables print it."""
        return NONE_PUBLISHED if self.acc1 is None else f"{self.acc1:.1f}"


def _settings(*parts: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """Settings put together; later ones win."""
    merged: dict[str, Any] = {}
    for part in (*parts, own):
        merged.update(part)
    return merged


_BENCHMARK = {
    "global_batch_size": 4096,
    "max_steps": 128_001,
    "warmup_steps": 2500,
    "start_lr": 1e-4,
    "end_lr": 0.0,
    "optimizer": "adamw",
    "beta1": 0.9,
    "beta2": 0.98,
    "eps": 1e-8,
    "decay_exempt": "modules",
    "precision": "fp32",
    "weighting": "released",
    # The parameter, whose exponential is the scale, stays in [3, 6] there.
    "logit_scale_min": 3.0,
    "num_ranks": 8,
}
"""What the released YFCC15M V2 configurations of all five methods share."""
_HIGH_RATE = {"peak_lr": 1e-3, "weight_decay": 0.1}
_LOW_RATE = {"peak_lr": 5e-4, "weight_decay": 0.5}
_BANK = {"neighbor_source": "bank", "bank_size": 65_536}
_ALL_TOKENS = {"token_dim": 256, "image_token_fraction": 1.0, "text_token_fraction": 1.0}

BENCHMARK_METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "clip": _settings(_BENCHMARK, _HIGH_RATE, method="clip", augmentation="light"),
        "slip": _settings(
            _BENCHMARK,
            _LOW_RATE,
            method="slip",
            augmentation="light",
            ssl_augmentation="moco_v2",
            simclr_temperature=0.1,
            # The value of the scale is capped at 100 for CLIP and DeCLIP only.
            logit_scale_max=6.0,
        ),
        "filip": _settings(
            _BENCHMARK,
            _LOW_RATE,
            _ALL_TOKENS,
            method="filip",
            augmentation="moco_v2",
            logit_scale_max=6.0,
        ),
        "declip": _settings(_BENCHMARK, _HIGH_RATE, _BANK, method="declip", augmentation="moco_v2"),
        "defilip": _settings(
            _BENCHMARK, _HIGH_RATE, _BANK, _ALL_TOKENS, method="defilip", augmentation="moco_v2"
        ),
    }
)
"""The five rows of CLIP-Benchmark's table, as their configurations were released."""

_VIT = {"model": "ViT-B-32", "freeze_patch_embedding": True, "batch_norm": "local"}
_RN50 = {"model": "RN50", "freeze_patch_embedding": False, "batch_norm": "synchronized"}
# CLIP's configuration is the one of ResNet-50 that does not ask for synchronized batch norm.
_RN50_LOCAL = {**_RN50, "batch_norm": "local"}

BENCHMARK_README = "README of Sense-GVT/DeCLIP (CLIP-Benchmark, arXiv 2203.05796)"
SLIP_README = "README of facebookresearch/SLIP (arXiv 2112.12750)"
DECLIP_CC3M = "ablation of DeCLIP (arXiv 2110.05208), by a digest of its source"


def _carried(epochs: float, method: str, **own: Any) -> dict[str, Any]:
    """CLIP-Benchmark's settings on another list: its README's epochs instead of its steps."""
    return _settings(BENCHMARK_METHODS[method], {"max_steps": None, "epochs": epochs}, own)


def _slip_code(**own: Any) -> dict[str, Any]:
    """Settings of SLIP's own code, which its CLIP rows share."""
    return _settings(
        {
            "model": "ViT-B-16",
            "global_batch_size": 4096,
            "start_lr": 1e-6,
            "end_lr": 1e-5,
            "optimizer": "adamw",
            "beta1": 0.9,
            "beta2": 0.98,
            "eps": 1e-8,
            "decay_exempt": "vectors",
            "precision": "amp_bf16",
            "batch_norm": "synchronized",
            "augmentation": "light",
            "logit_scale_min": 0.0,
            "logit_scale_max": math.log(100.0),
            "num_ranks": 8,
        },
        own,
    )


_SLIP_LOSS = {
    "method": "slip",
    "peak_lr": 3e-3,
    "weight_decay": 0.1,
    "ssl_augmentation": "slip_ssl",
    "simclr_hidden_dim": 4096,
    "simclr_dim": 256,
    "simclr_temperature": 0.1,
}
_SLIP_BASELINE = {"method": "clip", "peak_lr": 5e-4, "weight_decay": 0.5}
# Epochs of SLIP's table, and one epoch of warm-up in steps of 4,096.
_SLIP_YFCC = {"epochs": 25.0, "warmup_steps": 14_689_580 // 4096}
_SLIP_CC3M = {"epochs": 40.0, "warmup_steps": 3_318_333 // 4096}
_SLIP_CC12M = {"epochs": 35.0, "warmup_steps": 12_000_000 // 4096}

_FILIP_PAPER = {
    "model": "ViT-B-32",
    "method": "filip",
    "optimizer": "lamb",
    # LAMB needs whole matrices.
    "zero_stage": 0,
    "global_batch_size": 8192,
    "epochs": 30.0,
    "warmup_steps": 3000,
    "start_lr": 0.0,
    # base * sqrt(batch / 512), with the base of 6e-3.
    "peak_lr": 6e-3 * math.sqrt(8192 / 512),
    "end_lr": 0.0,
    "weight_decay": 0.03,
    "decay_exempt": "embeddings",
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-4,
    "token_dim": 256,
    "image_token_fraction": 0.25,
    "text_token_fraction": 0.25,
    "augmentation": "moco_v2",
    "num_ranks": 8,
}

_DECLIP_88M = _settings(
    _BANK,
    method="declip",
    weighting="released",
    augmentation="moco_v2",
    optimizer="sgd",
    beta1=0.9,
    precision="fp16",
    start_lr=1e-3,
    peak_lr=0.2,
    end_lr=0.0,
    decay_exempt="modules",
    logit_scale_min=3.0,
    num_ranks=8,
)


def _five_on(pairs: str) -> dict[str, Published]:
    """The five methods on a list for which CLIP-Benchmark has no row."""
    return {
        f"{pairs}-{method}-vit-b-32": Published(
            pairs=pairs, settings=_carried(32.0, method, **_VIT)
        )
        for method in BENCHMARK_METHODS
    }


def _ten() -> dict[str, Published]:
    """CLIP-Benchmark's table: five methods by two image towers."""
    numbers = {
        "vit-b-32": {"clip": 32.8, "slip": 34.3, "filip": 39.5, "declip": 43.2, "defilip": 45.0},
        "rn50": {"clip": 37.2, "slip": 28.5, "filip": 21.3, "declip": 44.4},
    }
    recipes = {}
    for tower, results in numbers.items():
        for method, settings in BENCHMARK_METHODS.items():
            own = _VIT if tower == "vit-b-32" else _RN50 if method != "clip" else _RN50_LOCAL
            recipes[f"yfcc15m-v2-{method}-{tower}"] = Published(
                pairs="yfcc15m-v2",
                acc1=results.get(method),
                source=BENCHMARK_README if method in results else "",
                settings=_settings(settings, own),
            )
    return recipes


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        **_ten(),
        "yfcc15m-v1-clip-vit-b-16": Published(
            pairs="yfcc15m-v1",
            acc1=37.6,
            source=SLIP_README,
            settings=_slip_code(**_SLIP_BASELINE, **_SLIP_YFCC),
        ),
        "yfcc15m-v1-slip-vit-b-16": Published(
            pairs="yfcc15m-v1",
            acc1=42.8,
            source=SLIP_README,
            settings=_slip_code(**_SLIP_LOSS, **_SLIP_YFCC),
        ),
        **_five_on("cc3m"),
        "cc3m-clip-rn50": Published(
            pairs="cc3m",
            acc1=20.6,
            source=DECLIP_CC3M,
            settings=_carried(32.0, "clip", **_RN50_LOCAL),
        ),
        "cc3m-declip-rn50": Published(
            pairs="cc3m",
            acc1=27.2,
            source=DECLIP_CC3M,
            settings=_carried(32.0, "declip", **_RN50, weighting="paper"),
        ),
        "cc3m-clip-vit-b-16": Published(
            pairs="cc3m",
            acc1=17.1,
            source=SLIP_README,
            settings=_slip_code(**_SLIP_BASELINE, **_SLIP_CC3M),
        ),
        "cc3m-slip-vit-b-16": Published(
            pairs="cc3m",
            acc1=23.0,
            source=SLIP_README,
            settings=_slip_code(**_SLIP_LOSS, **_SLIP_CC3M),
        ),
        **_five_on("cc12m"),
        "cc12m-clip-vit-b-16": Published(
            pairs="cc12m",
            acc1=36.5,
            source=SLIP_README,
            settings=_slip_code(**_SLIP_BASELINE, **_SLIP_CC12M),
        ),
        "cc12m-slip-vit-b-16": Published(
            pairs="cc12m",
            acc1=40.7,
            source=SLIP_README,
            settings=_slip_code(**_SLIP_LOSS, **_SLIP_CC12M),
        ),
        "yfcc100m-filip-vit-b-32": Published(pairs="yfcc100m", settings=_FILIP_PAPER),
        "declip-88m-declip-rn50": Published(
            pairs="declip-88m",
            acc1=62.5,
            source="README of Sense-GVT/DeCLIP (DeCLIP, arXiv 2110.05208)",
            settings=_settings(
                _DECLIP_88M,
                _RN50,
                weight_decay=1e-4,
                warmup_steps=2500,
                global_batch_size=8192,
                max_steps=450_000,
            ),
        ),
        "declip-88m-declip-vit-b-32": Published(
            pairs="declip-88m",
            acc1=66.2,
            source="README of Sense-GVT/DeCLIP (DeCLIP, arXiv 2110.05208)",
            settings=_settings(
                _DECLIP_88M,
                _VIT,
                weight_decay=0.0,
                warmup_steps=5000,
                global_batch_size=4096,
                max_steps=300_001,
            ),
        ),
    }
)
"""Every training recipe by its name."""

KEEP_ALL: Mapping[str, Any] = MappingProxyType(
    {
        "min_words": 1,
        "min_chars": None,
        "max_words": None,
        "max_chars": None,
        "drop_file_names": False,
        "drop_urls": False,
        "min_letters": None,
        "max_repetition": None,
        "min_side_pixels": None,
        "max_aspect": None,
        "min_contrast": None,
        "min_entropy": None,
        "keep_splits": (),
        "drop_duplicates": (),
    }
)
"""A published list is taken as it is, but for empty captions: nobody's filter is put on top."""


def training_pipeline(name: str, root: str) -> Pipeline:
    """Ingest, measure, keep all, and train as `PUBLISHED[name]` says.

    The steps that make a neighbor table are there as well, and are left out of a run whose
    training reads none.
    """
    recipe = PUBLISHED[name]
    # 256 pixels on the shorter side, by default: crops are drawn by the trainer, with some room.
    ingest = DownloadShards(root=root, shard_size=10_000)
    return Pipeline(
        recipe=name,
        root=root,
        steps=[
            *list_steps(root, ingest, **KEEP_ALL),
            Step(
                name="train",
                stage=TrainModel(root=root, **recipe.settings),
                reads=("ingest", "filter", "neighbors"),
                summary=f"train {recipe.settings['method']} under the deepspeed launcher",
            ),
        ],
        derive=derive_training,
    )


__all__ = [
    "BENCHMARK_METHODS",
    "KEEP_ALL",
    "LISTS",
    "NONE_PUBLISHED",
    "PUBLISHED",
    "PairList",
    "Published",
    "training_pipeline",
]
