"""Everything a training run can be told, checked before anything starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from declip_shards.manifest import canonical_json, settings_of
from declip_train.model_config import ModelConfig, get_model_config

_UNHASHED = {"fingerprint": False}


@dataclass(frozen=True, kw_only=True)
class ViewParameters:
    """How a random view of an image is drawn; probabilities from 0 to 1."""

    crop_scale_min: float
    """Least share of the image's area that a crop keeps; the most is 1."""
    jitter_probability: float
    """Of changing brightness, contrast, saturation and hue, in random order."""
    brightness: float
    """Factor drawn from [1 - x, 1 + x]."""
    contrast: float
    """Factor drawn from [1 - x, 1 + x]."""
    saturation: float
    """Factor drawn from [1 - x, 1 + x]."""
    hue: float
    """Shift drawn from [-x, x], in turns of the color wheel; at most 0.5."""
    gray_probability: float
    """Of removing all color."""
    blur_probability: float
    """Of a Gaussian blur."""
    blur_sigma_max: float
    """Largest standard deviation of the blur in pixels of a 224-pixel view; smaller views scale it
    down. The least is 0.1."""
    flip_probability: float
    """Of mirroring left and right."""


AUGMENTATIONS: Mapping[str, ViewParameters] = {
    # RandomResizedCrop and nothing else: the views of the CLIP baseline (method: SLIP's and
    # DeCLIP's CLIP configurations).
    "light": ViewParameters(
        crop_scale_min=0.5,
        jitter_probability=0.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        gray_probability=0.0,
        blur_probability=0.0,
        blur_sigma_max=0.1,
        flip_probability=0.0,
    ),
    # MoCo v2 (arXiv 2003.04297), which DeCLIP takes for both of its views.
    "moco_v2": ViewParameters(
        crop_scale_min=0.2,
        jitter_probability=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        gray_probability=0.2,
        blur_probability=0.5,
        blur_sigma_max=2.0,
        flip_probability=0.5,
    ),
    # For drawings whose captions name colors: crops that keep the subject, colors that stay
    # themselves.
    "demo": ViewParameters(
        crop_scale_min=0.5,
        jitter_probability=0.5,
        brightness=0.3,
        contrast=0.3,
        saturation=0.2,
        hue=0.02,
        gray_probability=0.05,
        blur_probability=0.1,
        blur_sigma_max=2.0,
        flip_probability=0.5,
    ),
}
"""Named sets of view parameters; each value can be overridden by the setting of its name."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A training run: data, model, method, views, optimizer, processes, records."""

    root: str = field(default="", metadata=_UNHASHED)
    """Dataset folder; in a configuration file, relative to that file's folder."""
    selection: str = "default"
    """Name of the selection to train on; empty takes every sample of the shards."""
    splits: tuple[str, ...] = ()
    """Values of the shards' column `split` to train on; empty asks no such question."""
    neighbors: str = "captions"
    """Name of the neighbor table (method declip)."""
    model: str = "ViT-B-32"
    """Name of the model's configuration."""
    image_size: int | None = None
    """Side of the square views in pixels; must be the model's, which is the default."""
    method: str = "declip"
    """Loss terms: declip or clip."""
    weighting: Literal["released", "paper"] = "released"
    """Weights of declip's terms: as in the released code, or as in the paper."""
    neighbor_source: str = "index"
    """Where neighbor captions come from: index (the neighbor table)."""
    neighbor_choice: Literal["top1", "sample"] = "top1"
    """The nearest caption of the table, or each epoch one drawn from the row."""
    mask_probability: float = 0.15
    """Share of caption tokens that masked language modeling chooses."""
    eda: bool = True
    """Whether words of the second caption view are swapped, deleted or replaced; else it is the
    caption."""
    wordnet: str | None = None
    """Folder of a WordNet database (index.noun, ...) for replacing words; unset: no replacing."""
    projector_dim: int = 1024
    """Width of the SimSiam projector."""
    predictor_hidden_dim: int = 512
    """Width of the SimSiam predictor's hidden layer."""
    augmentation: str = "moco_v2"
    """Named set of view parameters: light, moco_v2 or demo."""
    crop_scale_min: float | None = None
    """Overrides the set: least share of the image's area that a crop keeps."""
    jitter_probability: float | None = None
    """Overrides the set: probability of color jitter."""
    brightness: float | None = None
    """Overrides the set: brightness factor within 1 +- x."""
    contrast: float | None = None
    """Overrides the set: contrast factor within 1 +- x."""
    saturation: float | None = None
    """Overrides the set: saturation factor within 1 +- x."""
    hue: float | None = None
    """Overrides the set: hue shift within +- x turns."""
    gray_probability: float | None = None
    """Overrides the set: probability of a gray view."""
    blur_probability: float | None = None
    """Overrides the set: probability of a blur."""
    blur_sigma_max: float | None = None
    """Overrides the set: largest blur, pixels at 224 pixels."""
    flip_probability: float | None = None
    """Overrides the set: probability of a mirrored view."""
    global_batch_size: int = 4096
    """Samples a step, over all processes."""
    epochs: float = 32.0
    """Passes over the data; a last incomplete batch of each pass is left out."""
    max_steps: int | None = None
    """Optimizer steps; overrides epochs."""
    warmup_steps: int = 2500
    """Steps of linear warm-up."""
    start_lr: float = 1e-4
    """Learning rate of the first step."""
    peak_lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    end_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay; biases, gains of norms and the logit scale are exempt."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.98
    """AdamW's decay of the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    logit_scale_min: float = 0.0
    """Least logarithm of the logit scale (DeCLIP's released configurations: 3)."""
    logit_scale_max: float = math.log(100.0)
    """Largest logarithm of the logit scale."""
    zero_stage: int = 1
    """What DeepSpeed splits over processes: 0 nothing, 1 optimizer state, 2 also gradients."""
    precision: str = "fp32"
    """Arithmetic of the towers, as open_clip names it: fp32, or amp_bf16 (weights stay float32)."""
    num_ranks: int = 1
    """Training processes on this machine: GPUs, or halves of the batch on CPUs."""
    threads_per_rank: int = 1
    """Threads of each process's arithmetic on CPUs; cores to use divided by num_ranks."""
    seed: int = 0
    """Of weights, order, views and masks."""
    decoded_cache_megabytes: int = field(default=512, metadata=_UNHASHED)
    """Memory a process may spend on decoded images, MB; 0 decodes every time."""
    prefetch_batches: int = field(default=2, metadata=_UNHASHED)
    """Batches prepared ahead of the trainer."""
    log_every_steps: int = field(default=10, metadata=_UNHASHED)
    """Steps between records of the log and of TensorBoard."""
    checkpoint_every_steps: int | None = field(default=None, metadata=_UNHASHED)
    """Steps between checkpoints; unset: by time alone."""
    checkpoint_every_seconds: float = field(default=600.0, metadata=_UNHASHED)
    """Longest time between checkpoints, seconds; 0: by steps alone."""
    keep_checkpoints: int = field(default=2, metadata=_UNHASHED)
    """Newest checkpoints to keep while training; a finished run keeps its last alone."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choices(self)
        _check_numbers(self)
        _check_schedule(self)

    @property
    def micro_batch_size(self) -> int:
        """Samples of one process in one step."""
        return self.global_batch_size // self.num_ranks

    @property
    def model_config(self) -> ModelConfig:
        """Sizes of the towers."""
        return get_model_config(self.model)

    @property
    def view_parameters(self) -> ViewParameters:
        """The named set with this run's overrides."""
        names = [f.name for f in dataclasses.fields(ViewParameters)]
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return dataclasses.replace(AUGMENTATIONS[self.augmentation], **given)

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run over ``num_samples`` samples.

        Raises:
            DeclipError: less than one batch of samples, or the warm-up takes the whole run.
        """
        per_epoch = num_samples // self.global_batch_size
        if per_epoch == 0:
            raise DeclipError(
                f"global_batch_size {self.global_batch_size} is larger than the {num_samples} "
                "samples selected for training; lower it, or select more samples."
            )
        steps = self.max_steps
        if steps is None:
            steps = max(1, round(self.epochs * per_epoch))
        if self.warmup_steps >= steps:
            raise DeclipError(
                f"warmup_steps {self.warmup_steps} takes the whole run of {steps} steps; lower it "
                "below that, or train longer (epochs, max_steps)."
            )
        return steps

    def digest(self) -> str:
        """sha256 of the settings that can change the result."""
        return hashlib.sha256(canonical_json(settings_of(self, hashed_only=True))).hexdigest()

    def to_json(self) -> bytes:
        """All settings as a configuration file; the inverse of :func:`read_settings`."""
        return canonical_json(settings_of(self, hashed_only=False))


def _check_types(settings: TrainSettings) -> None:
    """JSON has fewer types than Python: whole numbers stand for floats, lists for tuples."""
    for f in dataclasses.fields(TrainSettings):
        value, kind = getattr(settings, f.name), str(f.type)
        if value is None:
            good = "None" in kind
        elif kind.startswith("bool"):
            good = isinstance(value, bool)
        elif kind.startswith("int"):
            good = isinstance(value, int) and not isinstance(value, bool)
        elif kind.startswith("float"):
            good = isinstance(value, int | float) and not isinstance(value, bool)
            good = good and math.isfinite(value)
        elif kind.startswith("tuple"):
            good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        else:
            good = isinstance(value, str)
        if not good:
            raise DeclipError(f"{f.name} is {value!r}, but must be of type {kind}; correct it.")
        if kind.startswith("float") and value is not None:
            object.__setattr__(settings, f.name, float(value))
        if kind.startswith("tuple"):
            object.__setattr__(settings, f.name, tuple(value))


def _check_choices(settings: TrainSettings) -> None:
    for name, later in (("slip", 3), ("filip", 3), ("defilip", 3)):
        if settings.method == name:
            raise DeclipError(
                f"method {name!r} arrives with issue {later}; choose declip or clip until then."
            )
    if settings.neighbor_source == "bank":
        raise DeclipError(
            "neighbor_source 'bank' (the queue of text features) arrives with issue 3; "
            "choose 'index', the neighbor table."
        )
    choices: dict[str, tuple[str, ...]] = {
        "method": ("declip", "clip"),
        "weighting": ("released", "paper"),
        "neighbor_source": ("index",),
        "neighbor_choice": ("top1", "sample"),
        "augmentation": tuple(AUGMENTATIONS),
        "precision": ("fp32", "amp_bf16"),
    }
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise DeclipError(f"{name} {value!r} is not known.{did_you_mean(value, known)}")
    if settings.zero_stage not in (0, 1, 2):
        raise DeclipError(f"zero_stage is {settings.zero_stage}, but must be 0, 1 or 2.")
    model = settings.model_config
    if settings.image_size not in (None, model.vision.image_size):
        raise DeclipError(
            f"image_size {settings.image_size} is not the {model.vision.image_size} pixels of "
            f"model {settings.model!r}; leave it out, or choose a model of that size."
        )
    if settings.method == "declip" and not settings.neighbors:
        raise DeclipError(
            "neighbors is empty, but method declip needs a neighbor table; name one, or choose "
            "method clip."
        )


_RANGES: Mapping[str, tuple[float, float]] = {
    "mask_probability": (0, 1),
    "projector_dim": (1, math.inf),
    "predictor_hidden_dim": (1, math.inf),
    "crop_scale_min": (0.01, 1),
    "jitter_probability": (0, 1),
    "brightness": (0, 1),
    "contrast": (0, 1),
    "saturation": (0, 1),
    "hue": (0, 0.5),
    "gray_probability": (0, 1),
    "blur_probability": (0, 1),
    "blur_sigma_max": (0.1, 50),
    "flip_probability": (0, 1),
    "global_batch_size": (1, math.inf),
    "max_steps": (1, math.inf),
    "warmup_steps": (0, math.inf),
    "start_lr": (0, math.inf),
    "end_lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "beta1": (0, 0.999999),
    "beta2": (0, 0.999999),
    "num_ranks": (1, 1024),
    "threads_per_rank": (1, 1024),
    "seed": (0, 2**63 - 1),
    "decoded_cache_megabytes": (0, math.inf),
    "prefetch_batches": (1, 64),
    "log_every_steps": (1, math.inf),
    "checkpoint_every_steps": (1, math.inf),
    "checkpoint_every_seconds": (0, math.inf),
    "keep_checkpoints": (1, math.inf),
}


def _check_numbers(settings: TrainSettings) -> None:
    for name, (least, most) in _RANGES.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise DeclipError(f"{name} is {value}, but must be {limit}; correct it.")
    for name in ("epochs", "peak_lr", "eps"):
        if getattr(settings, name) <= 0:
            raise DeclipError(f"{name} is {getattr(settings, name)}, but must be above 0.")
    if settings.logit_scale_min > settings.logit_scale_max:
        raise DeclipError(
            f"logit_scale_min {settings.logit_scale_min} is above logit_scale_max "
            f"{settings.logit_scale_max}; swap or correct them."
        )
    if settings.global_batch_size % settings.num_ranks:
        raise DeclipError(
            f"global_batch_size {settings.global_batch_size} cannot be shared evenly by num_ranks "
            f"{settings.num_ranks}; choose a multiple."
        )
    if settings.method == "declip" and settings.micro_batch_size < 2:
        raise DeclipError(
            f"global_batch_size {settings.global_batch_size} leaves {settings.micro_batch_size} "
            "sample to each process, and SimSiam's batch norm needs 2; raise it."
        )


def _check_schedule(settings: TrainSettings) -> None:
    for name in ("start_lr", "end_lr"):
        if getattr(settings, name) > settings.peak_lr:
            raise DeclipError(
                f"{name} {getattr(settings, name)} is above peak_lr {settings.peak_lr}; "
                "lower it, or raise the peak."
            )
    if settings.max_steps is not None and settings.warmup_steps >= settings.max_steps:
        raise DeclipError(
            f"warmup_steps {settings.warmup_steps} takes the whole run of max_steps "
            f"{settings.max_steps}; lower it below that."
        )
    if settings.checkpoint_every_steps is None and settings.checkpoint_every_seconds == 0:
        raise DeclipError(
            "checkpoint_every_seconds is 0 and checkpoint_every_steps is unset, so a killed run "
            "would start again from nothing; set one of them."
        )


def parse_settings(values: Mapping[str, Any], where: str) -> TrainSettings:
    """Settings from plain JSON values; a misspelt name is refused with the nearest one.

    Raises:
        DeclipError: an unknown name, or a wrong value.
    """
    known = {f.name for f in dataclasses.fields(TrainSettings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise DeclipError(
            f"{where}: no setting is named {unknown[0]!r}.{did_you_mean(unknown[0], known)}"
        )
    return TrainSettings(**values)


def read_settings(path: str | Path) -> TrainSettings:
    """Read a configuration file (JSON). A relative ``root`` is relative to the file's folder.

    Raises:
        DeclipError: the file is missing, is no JSON object, or holds a wrong setting.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DeclipError(
            f"the configuration {str(path)!r} does not exist; give the path of a JSON file of "
            "settings."
        ) from error
    except (ValueError, OSError) as error:
        raise DeclipError(f"the configuration {str(path)!r} is not readable ({error}).") from error
    if not isinstance(values, dict):
        raise DeclipError(f"the configuration {str(path)!r} must be one JSON object of settings.")
    settings = parse_settings(values, str(path))
    if "://" not in settings.root:
        root = (path.parent / settings.root).resolve()
        settings = dataclasses.replace(settings, root=str(root))
    return settings
