"""The flags of open_clip's training program in terms of our settings.

A flag that means the same is translated; one that means something else here, or nothing, is refused
in words with the name of what does it. None is accepted and then not obeyed. Where flags are left
out, open_clip's own defaults hold. docs/interop.md has the whole table.
"""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean
from declip_train.model_config import MODEL_CONFIGS, get_model_config
from declip_train.open_clip_flag_table import OBEYED, REFUSED

__all__ = ["FlagSettings", "add_flags", "read_flags", "resolve_model"]

_SEPARATOR = "::"
_DEFAULT_MODEL = "RN50"
_CROP_RATIO = (0.75, 4 / 3)
_EXACT_GELU = ("RN50", "RN101", "ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-S-16")
"""Names that mean a model with the exact GELU in open_clip, and one with QuickGELU here."""

_PRECISIONS: Mapping[str, str] = {
    "fp32": "fp32",
    "amp_bf16": "amp_bf16",
    "amp_bfloat16": "amp_bf16",
    "bf16": "bf16",
    "fp16": "fp16",
}
_OTHER_PRECISIONS: Mapping[str, str] = {
    "amp": "float16 autocast, which needs a loss scale: give amp_bf16 (bfloat16 autocast), or fp16",
    "pure_bf16": "weights without float32 copies: give bf16, which keeps them",
    "pure_fp16": "weights without float32 copies: give fp16, which keeps them",
}


@dataclass(frozen=True, kw_only=True)
class FlagSettings:
    """What flags come to."""

    values: Mapping[str, Any]
    """Fields of ``TrainSettings``."""
    sources: Mapping[str, str]
    """The flag behind each of those fields that a flag was given for."""
    notes: Mapping[str, str]
    """Where a flag, or its default, means nearly the same: field to what is different."""
    logs: str | None = None
    """Where run folders lie; None: not said."""
    name: str | None = None
    """Of the run's folder there; None: not said."""
    save_epochs: int | None = None
    """Epochs between checkpoints that are kept; None: not asked for."""
    evaluate_epochs: int | None = None
    """Epochs between evaluations; None: none."""
    num_samples: int | None = None
    """Samples of an epoch; None: those that are there."""
    resume: str | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add open_clip's flags to a parser: those that are obeyed, in a group of their own, and those
    that are refused, which no help text shows."""
    group = parser.add_argument_group("open_clip's flags (docs/interop.md)")
    for flag, kind, metavar, text in OBEYED:
        if kind is None:
            group.add_argument(flag, action="store_true", default=None, help=text)
        else:
            group.add_argument(flag, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--aug-cfg", nargs="*", metavar="KEY=VALUE", help="scale, color_jitter, ..._prob"
    )
    for flag in REFUSED:
        # Whatever follows is swallowed, so that the refusal is what a person reads.
        group.add_argument(flag, nargs="*", help=argparse.SUPPRESS)


@dataclass
class _Reading:
    """Flags on their way to settings."""

    given: Mapping[str, Any]
    num_ranks: int
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def has(self, flag: str) -> bool:
        return self.given.get(_name(flag)) is not None

    def get(self, flag: str, default: Any = None) -> Any:
        value = self.given.get(_name(flag))
        return default if value is None else value

    def set(self, setting: str, value: Any, *flags: str) -> None:
        """Set a field; of ``flags``, those that were given are its source."""
        self.values[setting] = value
        for flag in filter(self.has, flags):
            self.sources[setting] = flag


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def read_flags(
    given: argparse.Namespace, *, num_ranks: int = 1, method: str = "clip", model: str | None = None
) -> FlagSettings:
    """Translate what :func:`add_flags` let a parser read.

    Args:
        given: of the parser.
        num_ranks: training processes; open_clip's batch size is that of one.
        method: open_clip's crops are those of method clip; another keeps its own views.
        model: our own name of the model, where it is chosen by that and not by --model.

    Raises:
        DeclipError: a flag that is refused, or a value that has no counterpart.
    """
    reading = _Reading(given=vars(given), num_ranks=num_ranks)
    for flag, reason in REFUSED.items():
        if reading.has(flag):
            raise DeclipError(f"{flag} is open_clip's, and is not obeyed here: {reason}.")
    _read_data(reading)
    _read_model(reading, model)
    _read_batch(reading)
    _read_schedule(reading)
    _read_optimizer(reading, model)
    _read_views(reading, method)
    _read_records(reading)
    return FlagSettings(
        values=reading.values,
        sources=reading.sources,
        notes=reading.notes,
        logs=reading.get("--logs"),
        name=_folder_name(reading),
        save_epochs=_at_least_one(reading, "--save-frequency"),
        evaluate_epochs=_evaluate_epochs(reading),
        num_samples=reading.get("--train-num-samples"),
        resume=reading.get("--resume"),
    )


def _at_least_one(reading: _Reading, flag: str) -> int | None:
    value: int | None = reading.get(flag)
    if value is not None and value < 1:
        raise DeclipError(f"{flag} is {value}; it must be at least 1.")
    return value


def _read_data(reading: _Reading) -> None:
    kind = reading.get("--dataset-type", "auto")
    if kind not in ("webdataset", "auto"):
        known = ("webdataset", "auto")
        more = " (csv and synthetic are open_clip's alone)" * (kind in ("csv", "synthetic"))
        raise DeclipError(f"--dataset-type is {kind!r}{more}.{did_you_mean(kind, known)}")
    _at_least_one(reading, "--train-num-samples")
    entries = tuple(filter(None, (reading.get("--train-data") or "").split(_SEPARATOR)))
    if reading.has("--train-data"):
        for entry in entries:
            if entry.startswith("pipe:"):
                raise DeclipError(
                    f"--train-data has {entry!r}, which runs a command; give the URL itself "
                    "(s3://..., gs://..., https://...)."
                )
            if entry.endswith((".csv", ".tsv")):
                raise DeclipError(
                    f"--train-data has {entry!r}, a list of files; give tars of a webdataset."
                )
        if not entries:
            raise DeclipError("--train-data is empty; name tars, as 'shards/{00000..00999}.tar'.")
        reading.set("train_data", tuple(map(_absolute, entries)), "--train-data")
        # Of other people's shards there is none.
        reading.set("selection", "")
    if reading.has("--train-data-upsampling-factors"):
        flag = "--train-data-upsampling-factors"
        weights = tuple(reading.get(flag).split(_SEPARATOR))
        if len(weights) != len(entries):
            raise DeclipError(
                f"{flag} has {len(weights)} numbers and --train-data {len(entries)} sources; give "
                "one for each."
            )
        reading.set("data_weights", weights, flag)


def _absolute(entry: str) -> str:
    """Training processes may have another working folder."""
    return entry if "://" in entry else os.path.abspath(entry)


def resolve_model(name: str, *, quick_gelu: bool = False) -> str:
    """Our name of open_clip's model.

    Args:
        name: open_clip's, or one that we alone have, which stays as it is.
        quick_gelu: whether QuickGELU is asked for whatever the name says.

    Raises:
        DeclipError: there is no such model, or none with that activation.
    """
    base = name.removesuffix("-quickgelu")
    if base not in _EXACT_GELU:
        get_model_config(name)
        return name
    if quick_gelu or base != name:
        return base
    for other, config in MODEL_CONFIGS.items():
        plain = MODEL_CONFIGS[base]
        same = (config.embed_dim, config.vision, config.text) == (
            plain.embed_dim,
            plain.vision,
            plain.text,
        )
        if same and not config.quick_gelu:
            return other
    raise DeclipError(
        f"--model {name} means the exact GELU in open_clip, which none of our models has; give "
        f"--model {name}-quickgelu or --force-quick-gelu (OpenAI's and DeCLIP's activation)."
    )


def _read_model(reading: _Reading, chosen: str | None) -> None:
    quick = bool(reading.get("--force-quick-gelu", False))
    if chosen is None or reading.has("--model"):
        chosen = resolve_model(reading.get("--model", _DEFAULT_MODEL), quick_gelu=quick)
    reading.set("model", chosen, "--force-quick-gelu", "--model")
    if reading.has("--force-image-size"):
        reading.set("image_size", reading.get("--force-image-size"), "--force-image-size")
    if reading.get("--pretrained"):
        reading.set("pretrained", _pretrained(reading.get("--pretrained")), "--pretrained")
    if reading.has("--siglip"):
        reading.set("contrastive_loss", "sigmoid", "--siglip")
    if reading.has("--local-loss") and not reading.has("--gather-with-grad"):
        raise DeclipError(
            "--local-loss without --gather-with-grad leaves out a part of the gradient; give both, "
            "or none: losses are exact over all processes here."
        )
    for flag, setting, value in (
        ("--use-bn-sync", "batch_norm", "synchronized"),
        ("--grad-checkpointing", "grad_checkpointing", True),
        ("--torchcompile", "compile", True),
    ):
        if reading.has(flag):
            reading.set(setting, value, flag)
    if reading.has("--zero-stage"):
        reading.set("zero_stage", reading.get("--zero-stage"), "--zero-stage")
    _read_precision(reading)


def _pretrained(given: str) -> str:
    path = os.path.abspath(given)
    if not os.path.exists(path):
        raise DeclipError(
            f"--pretrained {given!r} is no file and no folder; give the path of a checkpoint (.pt, "
            ".bin, .safetensors) or of an export: open_clip's tags are not downloaded here."
        )
    return path


def _read_precision(reading: _Reading) -> None:
    given = reading.get("--precision")
    if given is None:
        reading.set("precision", "amp_bf16")
        reading.notes["precision"] = "precision amp_bf16: open_clip's default, amp, is of float16"
        return
    if given in _OTHER_PRECISIONS:
        raise DeclipError(f"--precision {given} is open_clip's {_OTHER_PRECISIONS[given]}.")
    if given not in _PRECISIONS:
        raise DeclipError(f"--precision is {given!r}.{did_you_mean(given, _PRECISIONS)}")
    reading.set("precision", _PRECISIONS[given], "--precision")
    if given in ("bf16", "fp16"):
        reading.notes["precision"] = (
            f"--precision {given}: the optimizer keeps float32 copies of the weights, which "
            "open_clip's has not"
        )


def _read_batch(reading: _Reading) -> None:
    batch = reading.get("--batch-size", 64)
    parts = reading.get("--accum-freq", 1)
    for flag, value in (("--batch-size", batch), ("--accum-freq", parts)):
        if value < 1:
            raise DeclipError(f"{flag} is {value}; it must be at least 1.")
    reading.set("num_ranks", reading.num_ranks)
    reading.set("accumulation_steps", parts, "--accum-freq")
    total = batch * reading.num_ranks * parts
    reading.set("global_batch_size", total, "--accum-freq", "--batch-size")
    if reading.has("--workers"):
        workers = reading.get("--workers")
        if workers < 1:
            raise DeclipError(f"--workers is {workers}; it must be at least 1 thread.")
        reading.set("loader_threads", workers, "--workers")
    reading.set("seed", reading.get("--seed", 0), "--seed")


def _read_schedule(reading: _Reading) -> None:
    rate, warmup = reading.get("--lr", 5e-4), reading.get("--warmup", 10_000)
    scheduler = reading.get("--lr-scheduler", "cosine")
    if scheduler not in ("cosine", "const"):
        known = ("cosine", "const")
        raise DeclipError(f"--lr-scheduler is {scheduler!r}.{did_you_mean(scheduler, known)}")
    is_flat = reading.has("--skip-scheduler")
    if is_flat and reading.get("--warmup"):
        raise DeclipError("--skip-scheduler has no warm-up: leave out --warmup or that.")
    warmup = 0 if is_flat else warmup
    epochs, samples = reading.get("--epochs", 32), reading.get("--train-num-samples")
    if epochs < 1:
        raise DeclipError(f"--epochs is {epochs}; it must be at least 1.")
    reading.set("peak_lr", rate, "--lr")
    reading.set("warmup_steps", warmup, "--skip-scheduler", "--warmup")
    # open_clip's first step of W has 1/W of the rate, ours the start.
    reading.set("start_lr", rate / max(warmup, 1))
    flat = is_flat or scheduler == "const"
    reading.set("end_lr", rate if flat else 0.0, "--skip-scheduler", "--lr-scheduler")
    reading.set("epochs", float(epochs), "--epochs")
    if samples is not None:
        steps = max(1, round(epochs * samples / reading.values["global_batch_size"]))
        reading.set("max_steps", steps, "--train-num-samples")


def _read_optimizer(reading: _Reading, model: str | None) -> None:
    name = reading.get("--opt", "adamw")
    if name != "adamw":
        raise DeclipError(
            f"--opt is {name!r}; here it is adamw, and --train.optimizer names the others."
        )
    is_vit = "vit" in (reading.get("--model") or model or _DEFAULT_MODEL).lower()
    reading.set("optimizer", "adamw", "--opt")
    reading.set("beta1", reading.get("--beta1", 0.9), "--beta1")
    reading.set("beta2", reading.get("--beta2", 0.98 if is_vit else 0.999), "--beta2")
    reading.set("eps", reading.get("--eps", 1e-6 if is_vit else 1e-8), "--eps")
    reading.set("weight_decay", reading.get("--wd", 0.2), "--wd")
    reading.set("decay_exempt", "vectors")


def _read_views(reading: _Reading, method: str) -> None:
    reading.set("method", method)
    if method == "clip":
        reading.set("augmentation", "light")
        reading.set("crop_scale_min", 0.9)
    given: dict[str, Any] = {}
    for item in reading.get("--aug-cfg", ()):
        key, equals, text = item.partition("=")
        try:
            given[key] = ast.literal_eval(text) if equals else None
        except (ValueError, SyntaxError):
            given[key] = text
    _take_crop(reading, given)
    if "color_jitter" in given and not given.get("color_jitter_prob"):
        raise DeclipError(
            "--aug-cfg has color_jitter without color_jitter_prob, which would change nothing; "
            "give that too."
        )
    jitter = given.pop("color_jitter", None)
    if jitter is not None:
        if not isinstance(jitter, tuple) or len(jitter) != 4:
            raise DeclipError(
                f"--aug-cfg has color_jitter={jitter!r}; give four numbers, as "
                "color_jitter=(0.32,0.32,0.32,0.08)."
            )
        for name, value in zip(
            ("brightness", "contrast", "saturation", "hue"), jitter, strict=True
        ):
            reading.set(name, value, "--aug-cfg")
    for key, name in (
        ("color_jitter_prob", "jitter_probability"),
        ("gray_scale_prob", "gray_probability"),
    ):
        if given.get(key) is not None:
            reading.set(name, given[key], "--aug-cfg")
        given.pop(key, None)
    if given.pop("use_timm", False):
        raise DeclipError("--aug-cfg has use_timm, and there is no timm here; leave it out.")
    if given:
        raise DeclipError(
            f"--aug-cfg has {next(iter(given))!r}, which is not obeyed here; it takes scale, "
            "ratio, color_jitter, color_jitter_prob and gray_scale_prob; --train.NAME sets the "
            "rest."
        )


def _take_crop(reading: _Reading, given: dict[str, Any]) -> None:
    ratio = given.pop("ratio", None)
    if ratio is not None and not _close(ratio, _CROP_RATIO):
        raise DeclipError(
            f"--aug-cfg has ratio={ratio!r}, but crops are 3:4 to 4:3 wide; leave it out."
        )
    scale = given.pop("scale", None)
    if scale is None:
        return
    if not isinstance(scale, tuple | list) or len(scale) != 2 or scale[1] != 1:
        raise DeclipError(
            f"--aug-cfg has scale={scale!r}, but crops go up to the whole picture; give "
            "scale=(LEAST,1.0)."
        )
    reading.set("crop_scale_min", scale[0], "--aug-cfg")


def _close(ratio: Any, wanted: tuple[float, float]) -> bool:
    try:
        low, high = ratio
        return bool(abs(low - wanted[0]) < 1e-3 and abs(high - wanted[1]) < 1e-3)
    except (TypeError, ValueError):
        return False


def _read_records(reading: _Reading) -> None:
    reports = [name for name in reading.get("--report-to", "").replace(" ", "").split(",") if name]
    for name in reports:
        if name not in ("wandb", "tensorboard", "all", "none"):
            near = did_you_mean(name, ("wandb", "tensorboard", "all", "none"))
            raise DeclipError(f"--report-to has {name!r}.{near}")
    if {"wandb", "all"} & set(reports):
        project = reading.get("--wandb-project-name", "open-clip")
        reading.set("wandb", project, "--report-to", "--wandb-project-name")
    elif reading.has("--wandb-project-name"):
        raise DeclipError(
            "--wandb-project-name would change nothing without --report-to wandb: add it."
        )
    if reading.has("--log-every-n-steps"):
        value = reading.get("--log-every-n-steps")
        reading.set("log_every_steps", value, "--log-every-n-steps")
    if reading.has("--delete-previous-checkpoint"):
        if reading.has("--save-frequency"):
            raise DeclipError(
                "--delete-previous-checkpoint keeps the newest one alone, and --save-frequency "
                "keeps one every so many epochs; leave one of them out."
            )
        reading.set("keep_checkpoints", 1, "--delete-previous-checkpoint")
    if reading.has("--imagenet-val"):
        reading.set("evaluate_data", _absolute(reading.get("--imagenet-val")), "--imagenet-val")


def _evaluate_epochs(reading: _Reading) -> int | None:
    value: int | None = reading.get("--zeroshot-frequency")
    if not reading.has("--imagenet-val"):
        if value:
            raise DeclipError(
                f"--zeroshot-frequency {value} would change nothing without --imagenet-val: add "
                "that, or leave it out."
            )
        return None
    value = 2 if value is None else value
    return value or None


def _folder_name(reading: _Reading) -> str | None:
    name: str | None = reading.get("--name")
    if name is not None and (os.path.basename(name) != name or name in ("", ".", "..")):
        raise DeclipError(f"--name is {name!r}; it must be a folder's name: --logs says where.")
    return name
