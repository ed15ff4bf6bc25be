"""open_clip's flags: each is obeyed or refused in words; their defaults are open_clip's."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from declip_shards import DeclipError
from declip_train.model_config import MODEL_CONFIGS, ModelConfig, get_model_config
from declip_train.open_clip_flag_table import OBEYED, REFUSED
from declip_train.open_clip_flags import FlagSettings, add_flags, read_flags, resolve_model
from declip_train.optimizer import learning_rate
from declip_train.settings import TrainSettings

MODEL = ["--model", "ViT-B-32-quickgelu"]
_SPEC = importlib.util.find_spec("open_clip")
assert _SPEC is not None
assert _SPEC.origin is not None
OPEN_CLIP = Path(_SPEC.origin).parent


def read(*arguments: str, **kwargs: Any) -> FlagSettings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return read_flags(parser.parse_args(arguments), **kwargs)


def settings(*arguments: str, **kwargs: Any) -> TrainSettings:
    return TrainSettings(**read(*arguments, **kwargs).values)


def their_options() -> dict[str, Any]:
    """Flags of the installed open_clip's own program with their defaults, read from its source: its
    import needs torchvision."""
    tree = ast.parse((OPEN_CLIP.parent / "open_clip_train/params.py").read_text())
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            default = next((k.value for k in node.keywords if k.arg == "default"), None)
            flag = ast.literal_eval(node.args[0])
            found[flag] = None if default is None else ast.literal_eval(default)
    return found


def test_every_flag_of_open_clip_is_obeyed_or_refused() -> None:
    ours = {flag for flag, *_ in OBEYED} | {"--aug-cfg"}
    assert not ours & set(REFUSED)
    assert their_options().keys() <= ours | set(REFUSED)


def test_defaults_are_open_clips() -> None:
    theirs = their_options()
    found = settings(*MODEL)
    assert found.global_batch_size == theirs["--batch-size"]
    assert found.epochs == theirs["--epochs"]
    assert found.weight_decay == theirs["--wd"]
    assert found.warmup_steps == theirs["--warmup"]
    assert found.accumulation_steps == theirs["--accum-freq"]
    assert found.seed == theirs["--seed"]
    assert (found.peak_lr, found.beta1, found.beta2, found.eps) == (5e-4, 0.9, 0.98, 1e-6)
    resnet = settings("--force-quick-gelu")
    assert resnet.model == theirs["--model"] == "RN50"
    assert (resnet.beta2, resnet.eps) == (0.999, 1e-8)
    assert (found.method, found.decay_exempt) == ("clip", "vectors")
    assert found.view_parameters.crop_scale_min == 0.9
    assert found.view_parameters.jitter_probability == found.view_parameters.flip_probability == 0
    assert set(read(*MODEL).notes) == {"precision"}
    assert not read(*MODEL).sources.keys() - {"model"}


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_refused_flags_say_what_to_do(flag: str) -> None:
    for value in ((), ("x",), ("1", "2")):
        with pytest.raises(DeclipError, match=rf"^{flag} is open_clip's, .*here: .*\w\.$"):
            read(*MODEL, flag, *value)


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
    [
        (["--train-data", "/a/{00..09}.tar::s3://b/c.tar"], "train_data", None),
        (["--workers", "6"], "loader_threads", 6),
        (["--grad-checkpointing"], "grad_checkpointing", True),
        (["--torchcompile"], "compile", True),
        (["--siglip"], "contrastive_loss", "sigmoid"),
        (["--zero-stage", "1", "--enable-deepspeed"], "zero_stage", 1),
        (["--precision", "amp_bfloat16"], "precision", "amp_bf16"),
        (["--precision", "fp32"], "precision", "fp32"),
        (["--report-to", "wandb,tensorboard"], "wandb", "open-clip"),
        (["--report-to", "wandb", "--wandb-project-name", "p"], "wandb", "p"),
        (["--report-to", "tensorboard"], "wandb", None),
        (["--log-every-n-steps", "7"], "log_every_steps", 7),
        (["--delete-previous-checkpoint"], "keep_checkpoints", 1),
        (["--force-image-size", "224"], "image_size", 224),
        (["--imagenet-val", "/val"], "evaluate_data", "/val"),
        (["--seed", "3"], "seed", 3),
        (["--aug-cfg", "scale=(0.4,1.0)"], "crop_scale_min", 0.4),
        (["--aug-cfg", "gray_scale_prob=0.2", "use_timm=False"], "gray_probability", 0.2),
        (["--beta2", "0.95"], "beta2", 0.95),
        (["--use-bn-sync"], "batch_norm", "synchronized"),
        (["--local-loss", "--gather-with-grad", "--save-most-recent"], "seed", 0),
    ],
)
def test_flags_become_settings(arguments: list[str], setting: str, value: object) -> None:
    found = settings(*MODEL, *arguments)
    if setting == "train_data":
        value = ("/a/{00..09}.tar", "s3://b/c.tar")
        assert found.selection == ""
    assert getattr(found, setting) == value


def test_color_jitter_needs_its_probability() -> None:
    jitter = "color_jitter=(0.32,0.31,0.3,0.08)"
    found = settings(*MODEL, "--aug-cfg", jitter, "color_jitter_prob=0.8").view_parameters
    assert (found.brightness, found.contrast, found.saturation, found.hue) == (
        0.32,
        0.31,
        0.3,
        0.08,
    )
    assert found.jitter_probability == 0.8
    with pytest.raises(DeclipError, match="without color_jitter_prob, which would change nothing"):
        read(*MODEL, "--aug-cfg", jitter)


def test_a_batch_is_that_of_one_process_and_part() -> None:
    found = settings(*MODEL, "--batch-size", "32", "--accum-freq", "3", num_ranks=4)
    assert (found.global_batch_size, found.micro_batch_size) == (32 * 3 * 4, 32)


def test_samples_of_an_epoch_give_steps() -> None:
    found = settings(*MODEL, "--train-num-samples", "1000", "--epochs", "3", "--warmup", "2")
    assert found.max_steps == round(3 * 1000 / 64)
    found = settings(*MODEL, "--train-num-samples", "3", "--epochs", "1", "--warmup", "0")
    assert found.max_steps == 1


def open_clips_rate(step: int, num_steps: int, peak: float, warmup: int) -> float:
    """Its cosine schedule, from its README's definition: step from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) * peak


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_rates_are_open_clips(warmup: int) -> None:
    """Equal in the warm-up; then ours is that of its next step, and ends on the line."""
    rate = 1e-3
    found = settings(*MODEL, "--lr", "1e-3", "--warmup", str(warmup))
    for step in range(warmup):
        theirs = open_clips_rate(step, 40, rate, warmup)
        assert learning_rate(found, step, 40) == pytest.approx(theirs, rel=1e-12)
    for step in range(max(warmup, 1), 40):
        shifted = open_clips_rate(step + 1, 40, rate, warmup)
        theirs = open_clips_rate(step, 40, rate, warmup)
        ours = learning_rate(found, step, 40)
        assert shifted - 1e-9 - rate * 0.05 <= ours <= theirs + rate * 0.05
    flat = settings(*MODEL, "--lr", "1e-3", "--warmup", str(warmup), "--lr-scheduler", "const")
    assert {learning_rate(flat, step, 40) for step in range(warmup, 40)} == {rate}
    constant = settings(*MODEL, "--lr", "1e-3", "--skip-scheduler")
    assert {learning_rate(constant, step, 40) for step in range(40)} == {rate}


@pytest.mark.parametrize("base", ["RN50", "RN101", "ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-S-16"])
def test_models_of_the_same_name_compute_the_same(base: str) -> None:
    """By open_clip's own files of sizes: the activation as well, or the name is refused."""
    for name in (base, f"{base}-quickgelu"):
        path = OPEN_CLIP / f"model_configs/{name}.json"
        if not path.is_file():
            continue
        theirs = ModelConfig.from_open_clip(json.loads(path.read_text()))
        if any(config == theirs for config in MODEL_CONFIGS.values()):
            assert get_model_config(resolve_model(name)) == theirs
        else:
            with pytest.raises(DeclipError, match=f"--model {name} means the exact GELU in open"):
                resolve_model(name)
    assert get_model_config(resolve_model(base, quick_gelu=True)).quick_gelu


def test_models_of_ours_keep_their_names() -> None:
    assert resolve_model("test") == "test"
    with pytest.raises(DeclipError, match=r"No model is named 'ViT-B-3'. Did you mean 'ViT-B-32'"):
        resolve_model("ViT-B-3")
    assert read(model="test").values["model"] == "test"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--precision", "amp"], "amp is open_clip's float16 autocast.*give amp_bf16"),
        (["--precision", "pure_fp16"], "without float32 copies: give fp16"),
        (["--precision", "fp31"], r"--precision is 'fp31'. Did you mean 'fp32'"),
        (["--dataset-type", "csv"], r"'csv' \(csv and synthetic are open_clip's alone\)"),
        (["--train-data", "pipe:cat x.tar"], "which runs a command; give the URL itself"),
        (["--train-data", "list.csv"], "a list of files; give tars"),
        (["--train-data", "::"], "--train-data is empty; name tars"),
        (["--train-data", "a.tar", "--train-data-upsampling-factors", "1::2"], "has 2 numbers"),
        (["--opt", "timm/lamb"], "--opt is 'timm/lamb'; here it is adamw"),
        (["--lr-scheduler", "const-cooldown"], "--lr-scheduler is 'const-cooldown'. Did you mean"),
        (["--skip-scheduler", "--warmup", "5"], "--skip-scheduler has no warm-up"),
        (["--local-loss"], "without --gather-with-grad leaves out a part of the gradient"),
        (["--pretrained", "laion2b_s34b_b79k"], "open_clip's tags are not downloaded"),
        (["--wandb-project-name", "x"], "would change nothing without --report-to wandb"),
        (["--report-to", "wandbb"], "--report-to has 'wandbb'. Did you mean 'wandb'"),
        (["--zeroshot-frequency", "1"], "would change nothing without --imagenet-val"),
        (["--name", "a/b"], "must be a folder's name: --logs says where"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--workers", "0"], "--workers is 0; it must be at least 1 thread"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--save-frequency", "0"], "--save-frequency is 0; it must be at least 1"),
        (["--aug-cfg", "scale=(0.5,0.9)"], r"crops go up to the whole picture"),
        (["--aug-cfg", "ratio=(1,1)"], "crops are 3:4 to 4:3 wide"),
        (["--aug-cfg", "re_prob=0.1"], "has 're_prob', which is not obeyed here"),
        (["--aug-cfg", "use_timm=True"], "there is no timm here"),
        (["--delete-previous-checkpoint", "--save-frequency", "1"], "leave one of them out"),
    ],
)
def test_values_without_a_counterpart_are_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(DeclipError, match=sentence):
        read(*MODEL, *arguments)


def test_weights_of_sources_and_frequencies() -> None:
    found = read(
        *MODEL,
        *("--train-data", "a.tar::b.tar", "--train-data-upsampling-factors", "1::0.5"),
        *("--imagenet-val", "v", "--save-frequency", "3", "--resume", "latest", "--name", "n"),
    )
    assert found.values["data_weights"] == ("1", "0.5")
    assert all(Path(entry).is_absolute() for entry in found.values["train_data"])
    assert (found.save_epochs, found.evaluate_epochs, found.resume) == (3, 2, "latest")
    assert (found.logs, found.name) == (None, "n")
    assert read(*MODEL, "--imagenet-val", "v", "--zeroshot-frequency", "0").evaluate_epochs is None


def test_another_method_keeps_its_own_views() -> None:
    found = read(*MODEL, method="declip").values
    assert "augmentation" not in found
    assert "crop_scale_min" not in found
