"""What a training run must not be told: each check names the value, the limit and the remedy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from declip_train.methods import METHODS, WEIGHTINGS
from declip_train.model_config import ResNetConfig, get_model_config
from declip_train.views import AUGMENTATIONS

if TYPE_CHECKING:
    from declip_train.settings import TrainSettings


def check_settings(settings: TrainSettings) -> None:
    """Refuse settings that are wrong by themselves or together.

    Whole numbers that stand for floats and lists that stand for tuples are replaced in place.

    Raises:
        DeclipError: naming the setting.
    """
    _check_types(settings)
    _check_numbers(settings)
    _check_choices(settings)
    _check_text_model(settings)
    _check_schedule(settings)
    _check_losses(settings)
    _check_neighbors(settings)
    _check_batch(settings)
    _check_sources(settings)


def _check_types(settings: TrainSettings) -> None:
    """JSON has fewer types than Python: whole numbers stand for floats, lists for tuples."""
    for f in dataclasses.fields(settings):
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
    choices: dict[str, tuple[str, ...]] = {
        "method": tuple(METHODS),
        "weighting": WEIGHTINGS,
        "contrastive_loss": ("softmax", "sigmoid"),
        "neighbor_source": ("index", "bank"),
        "neighbor_choice": ("rank", "sample"),
        "neighbor_feature": ("caption", "stored"),
        "batch_norm": ("local", "synchronized"),
        "tokenwise_kernel": ("blocked", "triton"),
        "ssl_augmentation": tuple(AUGMENTATIONS),
        "optimizer": ("adamw", "lamb", "sgd"),
        "decay_exempt": ("modules", "vectors", "embeddings"),
        "precision": ("fp32", "amp_bf16", "bf16", "fp16"),
        "photometric": ("auto", "cpu", "device"),
        "decoder": ("auto", "native", "python"),
    }
    if settings.augmentation is not None:
        choices["augmentation"] = tuple(AUGMENTATIONS)
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise DeclipError(f"{name} {value!r} is not known.{did_you_mean(value, known)}")
    if settings.zero_stage not in (0, 1, 2):
        raise DeclipError(f"zero_stage is {settings.zero_stage}, but must be 0, 1 or 2.")
    model = get_model_config(settings.model)
    if settings.image_size not in (None, model.vision.image_size):
        raise DeclipError(
            f"image_size {settings.image_size} is not the {model.vision.image_size} pixels of "
            f"model {settings.model!r}; leave it out, or choose a model of that size."
        )
    if settings.uses_index and not settings.neighbors:
        raise DeclipError(
            f"neighbors is empty, but method {settings.method} needs a neighbor table; name one, "
            "set neighbor_source to bank, or choose method clip."
        )
    if settings.freeze_patch_embedding and isinstance(model.vision, ResNetConfig):
        raise DeclipError(
            f"freeze_patch_embedding is on, but model {settings.model!r} is a ResNet, which has no "
            "patches; leave it out, or choose a ViT."
        )
    if settings.optimizer == "lamb" and settings.zero_stage:
        raise DeclipError(
            f"optimizer lamb scales each weight matrix by its own norm, but zero_stage "
            f"{settings.zero_stage} cuts matrices into pieces; set zero_stage to 0."
        )


def _check_text_model(settings: TrainSettings) -> None:
    """What can be said without loading it."""
    if settings.text_model is None:
        return
    if not settings.text_model:
        raise DeclipError(
            "text_model is '', but must be the folder or name of a text model; give one, or leave "
            "it unset."
        )
    if settings.text_layers is not None:
        raise DeclipError(
            f"text_layers is {settings.text_layers}, but text_model {settings.text_model!r} has a "
            "depth of its own; leave one of them unset."
        )


def _check_losses(settings: TrainSettings) -> None:
    """Refuse options that the method would not read."""
    method = settings.method
    pairs = settings.method_parts.has("contrastive")
    for name in ("label_smoothing", "hard_negative_beta"):
        if getattr(settings, name) and not pairs:
            raise DeclipError(
                f"{name} is {getattr(settings, name)}, but method {method} has no contrastive "
                "term that reads it; set it to 0, or choose another method."
            )
    if settings.contrastive_loss == "sigmoid":
        if settings.method_parts.has("multi_view") or not pairs:
            raise DeclipError(
                f"contrastive_loss sigmoid is for methods clip and slip, not {method}; choose "
                "softmax, or one of those methods."
            )
        if settings.label_smoothing or settings.hard_negative_beta:
            raise DeclipError(
                "contrastive_loss sigmoid has neither label_smoothing nor hard_negative_beta; set "
                "them to 0, or choose softmax."
            )


def _check_neighbors(settings: TrainSettings) -> None:
    """Refuse a bank that cannot hold a step: both caption views of every sample enter it."""
    least = 2 * settings.global_batch_size
    if settings.uses_bank and settings.bank_size < least:
        raise DeclipError(
            f"bank_size {settings.bank_size} cannot hold the {least} features of one step (two "
            f"captions of each of {settings.global_batch_size} samples); raise it to {least} or "
            "more, or lower global_batch_size."
        )


_RANGES: Mapping[str, tuple[float, float]] = {
    "text_layers": (1, 1000),
    "label_smoothing": (0, 0.999999),
    "hard_negative_beta": (0, 100),
    "bank_size": (1, math.inf),
    "neighbor_rank": (1, math.inf),
    "neighbor_top_k": (1, math.inf),
    "simclr_hidden_dim": (1, math.inf),
    "simclr_dim": (1, math.inf),
    "simclr_temperature": (1e-4, math.inf),
    "token_dim": (1, math.inf),
    "image_token_fraction": (1e-6, 1),
    "text_token_fraction": (1e-6, 1),
    "accumulation_steps": (1, 65_536),
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
    # Factors of 5e-5 to 22,000: beyond, float16 and the softmax have no numbers.
    "logit_scale_min": (-10, 10),
    "logit_scale_max": (-10, 10),
    "beta1": (0, 0.999999),
    "beta2": (0, 0.999999),
    "num_ranks": (1, 1024),
    "threads_per_rank": (1, 1024),
    "seed": (0, 2**63 - 1),
    "decoded_cache_megabytes": (0, math.inf),
    "loader_threads": (1, 1024),
    "prefetch_batches": (1, 64),
    "log_every_steps": (1, math.inf),
    "checkpoint_every_steps": (1, math.inf),
    "checkpoint_every_seconds": (0, math.inf),
    "keep_checkpoints": (1, math.inf),
    "keep_every_steps": (1, math.inf),
    "cache_gigabytes": (0, math.inf),
    "error_budget": (0, 1),
    "evaluate_every_steps": (1, math.inf),
    "stall_seconds": (0, math.inf),
    "loss_spike": (0, math.inf),
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


def _check_sources(settings: TrainSettings) -> None:
    """Refuse settings that need one another and stand alone."""
    if settings.data_weights and not settings.train_data:
        raise DeclipError(
            f"data_weights is {list(settings.data_weights)}, but train_data is unset, whose "
            "entries they weigh; give both, or neither."
        )
    if settings.data_root == "":
        raise DeclipError(
            "data_root is '', but must be a dataset's folder or URL; give one, or leave it unset."
        )
    if settings.data_root is not None and settings.train_data:
        raise DeclipError(
            f"data_root {settings.data_root!r} and train_data {list(settings.train_data)} both "
            "name what is trained on: a dataset of ours and tars of anybody's; leave one out."
        )
    if settings.evaluate_every_steps is not None and settings.evaluate_data is None:
        raise DeclipError(
            f"evaluate_every_steps is {settings.evaluate_every_steps}, but evaluate_data is not "
            "set; give both, or neither."
        )
    every, kept = settings.checkpoint_every_steps, settings.keep_every_steps
    if kept is not None and (every is None or kept % every):
        raise DeclipError(
            f"keep_every_steps is {kept}, but checkpoint_every_steps is {every or 'unset'}, so no "
            "checkpoint is sure to be written at those steps; set it to that or a divisor of it."
        )


def _check_batch(settings: TrainSettings) -> None:
    if settings.global_batch_size % settings.num_ranks:
        raise DeclipError(
            f"global_batch_size {settings.global_batch_size} cannot be shared evenly by num_ranks "
            f"{settings.num_ranks}; choose a multiple."
        )
    if settings.local_batch_size % settings.accumulation_steps:
        raise DeclipError(
            f"the {settings.local_batch_size} samples of a process cannot be cut evenly into "
            f"accumulation_steps {settings.accumulation_steps}; choose a divisor."
        )
    heads = settings.method_parts.has("simsiam") or settings.method_parts.has("simclr")
    rows = settings.local_batch_size
    if settings.batch_norm == "synchronized":
        rows = settings.global_batch_size
    if heads and rows < 2:
        raise DeclipError(
            f"global_batch_size {settings.global_batch_size} leaves {rows} sample to the batch "
            f"norm of method {settings.method}'s heads, which needs 2; raise it."
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


def unread_settings(settings: TrainSettings) -> dict[str, str]:
    """Settings that change nothing in this run, with what would read each.

    A recipe sets them for whatever method is chosen later; a person who asks for one by name should
    be told that it does nothing.
    """
    method = settings.method_parts
    has = method.has
    index, vision = settings.uses_index, settings.model_config.vision
    heads = has("simsiam") or has("simclr")
    jitters = settings.view_parameters.jitter_probability > 0
    reads: dict[str, tuple[bool, Iterable[str]]] = {
        "methods declip and defilip": (
            has("multi_view"),
            ("weighting", "mask_probability", "eda", "wordnet", "neighbor_source"),
        ),
        "methods with SimSiam (declip, defilip)": (
            has("simsiam"),
            ("projector_dim", "predictor_hidden_dim"),
        ),
        "method slip": (
            has("simclr"),
            ("simclr_hidden_dim", "simclr_dim", "simclr_temperature", "ssl_augmentation"),
        ),
        "methods filip and defilip": (
            has("tokenwise"),
            ("token_dim", "image_token_fraction", "text_token_fraction", "tokenwise_kernel"),
        ),
        "methods with a contrastive term (all but filip)": (
            has("contrastive"),
            ("label_smoothing", "hard_negative_beta", "contrastive_loss"),
        ),
        "neighbor_source index of declip and defilip": (
            index,
            ("neighbors", "neighbor_choice", "neighbor_feature"),
        ),
        "neighbor_choice rank": (index and settings.neighbor_choice == "rank", ("neighbor_rank",)),
        "neighbor_choice sample": (
            index and settings.neighbor_choice == "sample",
            ("neighbor_top_k",),
        ),
        "neighbor_feature stored": (
            index and settings.neighbor_feature == "stored",
            ("neighbor_embeddings",),
        ),
        "neighbor_source bank of declip and defilip": (settings.uses_bank, ("bank_size",)),
        "batch norm: heads of slip, declip and defilip, or ResNet towers": (
            heads or isinstance(vision, ResNetConfig),
            ("batch_norm",),
        ),
        "a jitter_probability above 0": (
            jitters,
            ("brightness", "contrast", "saturation", "hue"),
        ),
        "a blur_probability above 0": (
            settings.view_parameters.blur_probability > 0,
            ("blur_sigma_max",),
        ),
        "optimizers adamw and lamb": (settings.optimizer != "sgd", ("beta2", "eps")),
        "the dataset's own shards, which train_data replaces": (
            not settings.train_data,
            ("splits", "selection"),
        ),
        "evaluate_every_steps": (settings.evaluate_every_steps is not None, ("evaluate_data",)),
        "a stall_seconds above 0": (settings.stall_seconds > 0, ("stall_ends_run",)),
        "a warmup_steps above 0": (settings.warmup_steps > 0, ("start_lr",)),
        "epochs, which max_steps overrides": (settings.max_steps is None, ("epochs",)),
    }
    unread = {
        name: reader for reader, (is_read, names) in reads.items() if not is_read for name in names
    }
    if "wordnet" not in unread and not settings.eda:
        unread["wordnet"] = "eda"
    return unread
