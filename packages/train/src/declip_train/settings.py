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
from declip_train.methods import Method, get_method
from declip_train.model_config import ModelConfig, get_model_config
from declip_train.settings_checks import check_settings, unread_settings
from declip_train.views import AUGMENTATIONS, ViewParameters

_UNHASHED = {"fingerprint": False}
_ELASTIC = ("num_ranks", "zero_stage", "threads_per_rank", "grad_checkpointing", "compile")
"""Settings that a run may be continued under other values of."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A training run: data, model, method, views, optimizer, processes, records."""

    root: str = field(default="", metadata=_UNHASHED)
    """Folder that the run writes into, and the dataset's own where data_root names no other; in a
    configuration file, relative to that file's folder."""
    data_root: str | None = field(default=None, metadata=_UNHASHED)
    """Dataset to train on, with its selection and neighbor table, in place of the one in the run's
    folder: a folder or any fsspec URL; its tars are kept in cache."""
    train_data: tuple[str, ...] = ()
    """Shards that are not the dataset's own: tars of any webdataset, each with {00000..00999}
    written out or not, local or at a URL; given, they are trained on in place of the dataset's."""
    data_weights: tuple[str, ...] = ()
    """How often a pass meets the samples of each entry of train_data, as 1 or 0.5; unset: once."""
    selection: str = "default"
    """Name of the selection to train on; empty takes every sample of the shards."""
    splits: tuple[str, ...] = ()
    """Values of the shards' column `split` to train on; empty asks no such question."""
    neighbors: str = "captions"
    """Name of the neighbor table (methods with neighbor supervision from the index)."""
    model: str = "ViT-B-32"
    """Name of the model's configuration."""
    text_layers: int | None = None
    """Depth of the text tower; unset: the model's own."""
    text_model: str | None = None
    """Text tower of transformers in place of the model's: folder of a BERT, RoBERTa or DistilBERT,
    or its name on the hub; its weights are where training starts."""
    pretrained: str | None = None
    """Weights that training starts from: an open_clip checkpoint (.pt, .bin, .safetensors) or a
    folder that this project or open_clip exported; unset: drawn from the seed."""
    image_size: int | None = None
    """Side of the square views in pixels; must be the model's, which is the default."""
    method: str = "declip"
    """Loss terms: clip, slip, filip, declip or defilip."""
    weighting: Literal["released", "paper"] = "released"
    """Weights of declip's and defilip's terms: as in the released code, or as in the paper."""
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax"
    """Loss of image-text pairs: InfoNCE, or SigLIP's sigmoid loss (methods clip and slip)."""
    label_smoothing: float = 0.0
    """Share of the contrastive target that is spread over the whole batch."""
    hard_negative_beta: float = 0.0
    """How strongly similar negatives of the contrastive terms weigh more; 0 weighs all alike."""
    neighbor_source: Literal["index", "bank"] = "index"
    """Where neighbors come from: index (the neighbor table) or bank (a queue of text features)."""
    bank_size: int = 65_536
    """Text features that the bank holds."""
    neighbor_choice: Literal["rank", "sample"] = "rank"
    """Of the table's row: the neighbor of a fixed rank, or each epoch one drawn from the row."""
    neighbor_rank: int = 1
    """Rank for neighbor_choice rank, 1 the nearest; a shorter row gives its last."""
    neighbor_top_k: int | None = None
    """Neighbors to draw from for neighbor_choice sample; unset: the whole row."""
    neighbor_feature: Literal["caption", "stored"] = "caption"
    """The neighbor's feature: its caption through today's text tower, or the stored embedding."""
    neighbor_embeddings: str = "captions"
    """Name of the embeddings for neighbor_feature stored; their size must be the model's."""
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
    simclr_hidden_dim: int = 4096
    """Width of the SimCLR projector's hidden layers (method slip)."""
    simclr_dim: int = 256
    """Size of SimCLR's projections (method slip)."""
    simclr_temperature: float = 0.1
    """Temperature of SimCLR's loss (method slip)."""
    token_dim: int = 256
    """Size of token features (methods filip and defilip)."""
    image_token_fraction: float = 1.0
    """Share of image tokens that token-wise alignment keeps (FILIP's paper: 0.25)."""
    text_token_fraction: float = 1.0
    """Share of text tokens that token-wise alignment keeps (FILIP's paper: 0.25)."""
    tokenwise_kernel: Literal["blocked", "triton"] = "blocked"
    """How token-wise similarities are computed: in blocks, or by a Triton kernel on a GPU, which
    gives the same numbers and has been run in Triton's interpreter alone so far."""
    batch_norm: Literal["local", "synchronized"] = "local"
    """Batch norm of heads and of ResNet towers: over each process's rows, or over all."""
    augmentation: str | None = None
    """Named set of view parameters: light, moco_v2, slip_ssl or demo; unset: the method's own."""
    ssl_augmentation: str = "moco_v2"
    """Named set for the two self-supervised views of method slip."""
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
    """Passes over the data, every sample once in each; a batch may take the end of one and the
    beginning of the next."""
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
    optimizer: Literal["adamw", "lamb", "sgd"] = "adamw"
    """AdamW; LAMB (FILIP's paper); SGD with Nesterov momentum (DeCLIP on 88 million)."""
    weight_decay: float = 0.1
    """Decoupled decay (sgd: added to the gradient), of what decay_exempt leaves."""
    decay_exempt: Literal["modules", "vectors", "embeddings"] = "modules"
    """Without decay: biases of layers, gains of norms and the logit scale (DeCLIP's code); every
    parameter of one dimension (SLIP, open_clip); those and all embeddings (FILIP's paper)."""
    beta1: float = 0.9
    """Decay of the mean gradient; momentum of sgd."""
    beta2: float = 0.98
    """Decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient."""
    freeze_patch_embedding: bool = False
    """Whether a ViT's patch convolution stays as drawn (DeCLIP's code; MoCo v3)."""
    logit_scale_min: float = 0.0
    """Least logarithm of the logit scale (DeCLIP's released configurations: 3)."""
    logit_scale_max: float = math.log(100.0)
    """Largest logarithm of the logit scale."""
    zero_stage: int = 0
    """What DeepSpeed splits over processes: 0 nothing (the fastest where memory is enough), 1
    optimizer state, 2 also gradients."""
    photometric: Literal["auto", "cpu", "device"] = "auto"
    """Where colors of views change: on the CPU, in batches on the GPU, or there if there is one."""
    precision: Literal["fp32", "amp_bf16", "bf16", "fp16"] = "fp32"
    """Arithmetic: fp32; amp_bf16 (weights stay float32); bf16 or fp16 (weights too, with float32
    copies in DeepSpeed's optimizer; fp16 scales its loss)."""
    accumulation_steps: int = 1
    """Parts that a process computes its batch in; every sample still sees all negatives."""
    grad_checkpointing: bool = False
    """Whether the towers' blocks are computed again in the backward pass, to save memory."""
    compile: bool = False
    """Whether torch.compile is applied to the towers."""
    num_ranks: int = 1
    """Training processes on this machine: GPUs, or halves of the batch on CPUs."""
    threads_per_rank: int = 1
    """Threads of each process's arithmetic on CPUs; cores to use divided by num_ranks."""
    seed: int = 0
    """Of weights, order, views and masks."""
    decoded_cache_megabytes: int = field(default=512, metadata=_UNHASHED)
    """Memory a process may spend on decoded images, MB; 0 decodes every time."""
    decoder: Literal["auto", "native", "python"] = field(default="auto", metadata=_UNHASHED)
    """How views are decoded and resized: compiled code, plain Python with the same pixels, or the
    first where it can be built."""
    loader_threads: int | None = field(default=None, metadata=_UNHASHED)
    """Threads of each process that draw views; unset: with GPUs this machine's cores divided by
    its processes, else threads_per_rank."""
    prefetch_batches: int = field(default=2, metadata=_UNHASHED)
    """Batches prepared ahead of the trainer."""
    cache: str | None = field(default=None, metadata=_UNHASHED)
    """Folder for tars of remote datasets and for what is worked out once (lists of samples, token
    ids); unset: OPENDECLIP_CACHE, or .cache/opendeclip in the home folder."""
    cache_gigabytes: float = field(default=50.0, metadata=_UNHASHED)
    """Room for remote tars in the cache, GB; the ones used longest ago make way."""
    error_budget: float = field(default=0.001, metadata=_UNHASHED)
    """Share of an epoch's samples whose picture may fail to be read or decoded; each is replaced by
    another sample and listed, and above this share the run ends."""
    log_every_steps: int = field(default=10, metadata=_UNHASHED)
    """Steps between records of the log and of TensorBoard."""
    wandb: str | None = field(default=None, metadata=_UNHASHED)
    """Project of Weights & Biases that the log is sent to also; unset: none (extra `wandb`)."""
    evaluate_every_steps: int | None = field(default=None, metadata=_UNHASHED)
    """Steps between zero-shot evaluations during training, shared by all processes; unset: none."""
    evaluate_data: str | None = field(default=None, metadata=_UNHASHED)
    """Labelled pictures for that: a folder as of `declip eval`, with classnames; unset: none."""
    stall_seconds: float = field(default=60.0, metadata=_UNHASHED)
    """Longest time without progress of a process or its loader before it is named with what each
    thread does, seconds; 0: never."""
    stall_ends_run: bool = field(default=True, metadata=_UNHASHED)
    """Whether a stalled run is ended, for the scheduler to start it again, or only named."""
    loss_spike: float = field(default=6.0, metadata=_UNHASHED)
    """Alarm when a loss is so many standard deviations above the last 128 steps'; 0: never."""
    checkpoint_every_steps: int | None = field(default=None, metadata=_UNHASHED)
    """Steps between checkpoints; unset: by time alone."""
    checkpoint_every_seconds: float = field(default=600.0, metadata=_UNHASHED)
    """Longest time between checkpoints, seconds; 0: by steps alone."""
    keep_checkpoints: int = field(default=2, metadata=_UNHASHED)
    """Newest checkpoints to keep while training; a finished run keeps its last alone."""
    keep_every_steps: int | None = field(default=None, metadata=_UNHASHED)
    """Checkpoints of steps that this divides are kept for good; unset: none."""
    async_save: bool = field(default=False, metadata=_UNHASHED)
    """Whether training goes on while a checkpoint is written, from a copy in memory."""
    hostfile: str | None = field(default=None, metadata=_UNHASHED)
    """DeepSpeed's file of hosts (`NAME slots=N`) to train on together over ssh; num_ranks counts
    the processes of all. Unset: this machine."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def dataset(self) -> str:
        """Folder or URL of the dataset that is read, where that is one of ours."""
        return self.root if self.data_root is None else self.data_root

    @property
    def micro_batch_size(self) -> int:
        """Samples of one process in one part of a step."""
        return self.global_batch_size // self.num_ranks // self.accumulation_steps

    @property
    def local_batch_size(self) -> int:
        """Samples of one process in one step."""
        return self.global_batch_size // self.num_ranks

    @property
    def model_config(self) -> ModelConfig:
        """Sizes of the towers, with this run's text tower and loss.

        Raises:
            DeclipError: the text model cannot be loaded.
        """
        config = get_model_config(self.model)
        if self.text_layers is not None:
            text = dataclasses.replace(config.text, layers=self.text_layers)
            config = dataclasses.replace(config, text=text)
        if self.text_model is not None:
            # Loads transformers: not before somebody asks for the sizes.
            from declip_train.hf_text import HFTextConfig, text_sizes

            text = text_sizes(HFTextConfig(model=self.text_model))
            config = dataclasses.replace(config, text=text)
        if self.contrastive_loss == "sigmoid" and config.init_logit_bias is None:
            # SigLIP (arXiv 2303.15343), section 3: scale 10 and bias -10 at first.
            config = dataclasses.replace(
                config, init_logit_bias=-10.0, init_logit_scale=math.log(10.0)
            )
        return config

    @property
    def method_parts(self) -> Method:
        """What the method asks for."""
        return get_method(self.method)

    @property
    def uses_index(self) -> bool:
        """Whether the neighbor table is read."""
        return self.method_parts.has("neighbor") and self.neighbor_source == "index"

    @property
    def uses_bank(self) -> bool:
        """Whether neighbors come from the bank."""
        return self.method_parts.has("neighbor") and self.neighbor_source == "bank"

    @property
    def ssl_view_parameters(self) -> ViewParameters:
        """Of method slip's two self-supervised views."""
        return AUGMENTATIONS[self.ssl_augmentation]

    @property
    def view_parameters(self) -> ViewParameters:
        """The named set (else the method's own) with this run's overrides."""
        names = [f.name for f in dataclasses.fields(ViewParameters)]
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        name = self.augmentation or self.method_parts.augmentation
        return dataclasses.replace(AUGMENTATIONS[name], **given)

    def unread(self) -> dict[str, str]:
        """Settings that change nothing in this run, with what would read each."""
        return unread_settings(self)

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run, where a pass takes ``num_samples`` samples.

        Raises:
            DeclipError: less than one batch of samples, or the warm-up takes the whole run.
        """
        if num_samples < self.global_batch_size:
            raise DeclipError(
                f"global_batch_size {self.global_batch_size} is larger than the {num_samples} "
                "samples selected for training; lower it, or select more samples."
            )
        steps = self.max_steps
        if steps is None:
            steps = max(1, round(self.epochs * num_samples / self.global_batch_size))
        if self.warmup_steps >= steps:
            raise DeclipError(
                f"warmup_steps {self.warmup_steps} takes the whole run of {steps} steps; lower it "
                "below that, or train longer (epochs, max_steps)."
            )
        return steps

    def digest(self) -> str:
        """sha256 of the settings that can change the result."""
        return hashlib.sha256(canonical_json(settings_of(self, hashed_only=True))).hexdigest()

    def elastic_digest(self) -> str:
        """sha256 of the settings that a continued run must have in common with its checkpoint:
        processes and how memory is spent may differ."""
        values = settings_of(self, hashed_only=True)
        kept = {name: value for name, value in values.items() if name not in _ELASTIC}
        return hashlib.sha256(canonical_json(kept)).hexdigest()

    def to_json(self) -> bytes:
        """All settings as a configuration file; the inverse of :func:`read_settings`."""
        return canonical_json(settings_of(self, hashed_only=False))


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
    """Read a configuration file (JSON). ``root`` and ``data_root`` are relative to its folder.

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

    def full(place: str) -> str:
        return place if "://" in place else str((path.parent / place).resolve())

    data_root = None if settings.data_root is None else full(settings.data_root)
    return dataclasses.replace(settings, root=full(settings.root), data_root=data_root)
