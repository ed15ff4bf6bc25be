"""``declip export``: a trained model in the form that other programs read."""

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from declip_shards import DeclipError, Store
from declip_shards.errors import did_you_mean
from pipelines.arguments import ArgumentParser
from pipelines.runner import check_location

if TYPE_CHECKING:
    from torch import Tensor, nn

    from declip_train.export import PreprocessSettings, Scalar
    from declip_train.towers import TwoTowers

FORMATS = ("open_clip", "huggingface", "safetensors")
"""Forms of a model."""
_MARKS = {
    "open_clip": "open_clip_config.json",
    "huggingface": "preprocessor_config.json",
    "safetensors": "open_clip_config.json",
}
"""A file that each form has, and no other form."""
_FINISHED = "train/export"
_CHECKPOINTS = "train/checkpoints"
_CONFIG = "train/config.json"


class Model(NamedTuple):
    """What is to be written."""

    clip: "TwoTowers"
    heads: "nn.Module | Mapping[str, Tensor] | None"
    preprocess: "PreprocessSettings"
    provenance: "dict[str, Scalar]"
    told: str
    """Where it comes from, for the terminal."""


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip export",
        description="Write a trained model for other programs, without a network: of a finished "
        "run, or out of a checkpoint of one that goes on, of any ZeRO stage and number of "
        "processes. Weights are float32: of runs in bf16 and fp16 those that the optimizer holds.",
        epilog="huggingface has no place for ResNets, text models of transformers, FILIP and the "
        "sigmoid loss.",
    )
    parser.add_argument("target", metavar="TARGET", help="a new or empty folder, or an export")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the dataset's or run's")
    parser.add_argument(
        "--format",
        metavar="|".join(FORMATS),
        default="open_clip",
        help="open_clip: open_clip's folder (.bin and .safetensors); huggingface: CLIPModel with "
        "tokenizer and image processor; safetensors: open_clip's folder without the .bin",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP|latest|FOLDER",
        help="export that (else: the finished run, or its newest checkpoint while it goes on)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip export``; returns the exit status.

    Raises:
        DeclipError: there is no model, it does not fit the form, or the target is something else's.
    """
    arguments = build_parser().parse_args(list(argv))
    if arguments.format not in FORMATS:
        near = did_you_mean(arguments.format, FORMATS)
        raise DeclipError(f"--format is {arguments.format!r}.{near}")
    check_location(arguments.out)
    target = Path(arguments.target)
    _check_target(target, arguments.format, Store(arguments.out))
    model = find_model(Store(arguments.out), arguments.checkpoint)
    paths = write_model(model, arguments.format, target)
    print(f"{arguments.format}: {model.told} is in {os.fspath(target)}")
    for path in sorted(paths):
        print(f"  {path.name:<28} {path.stat().st_size:>13,} bytes")
    return 0


def _check_target(target: Path, form: str, store: Store) -> None:
    """Refuse to mix an export with something else, and to overwrite the run's own."""
    if not target.exists():
        return
    if target.resolve() == store.local_path(_FINISHED).resolve():
        raise DeclipError(
            f"{str(target)!r} is the run's own export, which its record vouches for; name another "
            "folder."
        )
    if not target.is_dir():
        raise DeclipError(f"{str(target)!r} is a file; name a folder to write to.")
    inside = {path.name for path in target.iterdir()}
    if inside and _MARKS[form] not in inside:
        raise DeclipError(
            f"{str(target)!r} holds {min(inside)!r} and no export in the form {form}; name a new "
            "or empty folder."
        )


def find_model(store: Store, checkpoint: str | None) -> Model:
    """The model of a finished run, or of a checkpoint.

    Args:
        store: dataset or run folder.
        checkpoint: a step, ``latest`` or a folder; None: the finished run's export, or the newest
            checkpoint where there is none.

    Raises:
        DeclipError: there is none.
    """
    folder = store.local_path(_FINISHED)
    if checkpoint is None and (folder / "open_clip_config.json").is_file():
        return _finished(folder)
    from declip_train.checkpoint_export import (
        PREPROCESS,
        find_checkpoint,
        provenance_of,
        read_checkpoint,
    )

    place = find_checkpoint(_folder_of(store, checkpoint))
    if place is None:
        raise DeclipError(
            f"{store.url!r} holds no {_FINISHED} and no checkpoint in {_CHECKPOINTS}; train a "
            "model there first."
        )
    beside = place.folder.resolve().parents[2] / "config.json"
    config = beside if beside.is_file() else store.local_path(_CONFIG)
    # DeepSpeed, which has classes that stand in the files, announces itself.
    with contextlib.redirect_stdout(sys.stderr):
        found = read_checkpoint(place, config)
    return Model(
        clip=found.module.clip.eval(),
        heads=found.module.heads,
        preprocess=PREPROCESS,
        provenance=provenance_of(found.settings, found.identity, run=place.run, step=place.step),
        told=f"step {place.step:,} of run {place.run}",
    )


def _folder_of(store: Store, checkpoint: str | None) -> Path:
    """The folder that a step, ``latest`` or a path means."""
    checkpoints = store.local_path(_CHECKPOINTS)
    if checkpoint in (None, "latest"):
        return checkpoints
    assert checkpoint is not None
    if not checkpoint.isdecimal():
        folder = Path(checkpoint)
        if not folder.is_dir():
            raise DeclipError(
                f"--checkpoint {checkpoint!r} is no folder; give a step, latest, or a folder of a "
                "checkpoint."
            )
        return folder
    name = f"step_{int(checkpoint):08d}"
    found = sorted(checkpoints.glob(f"*/{name}"))
    if len(found) == 1:
        return found[0]
    if found:
        raise DeclipError(
            f"--checkpoint {checkpoint} is there in {len(found)} runs; give the folder of one: "
            f"{', '.join(str(path) for path in found)}."
        )
    steps = sorted(int(path.name[5:]) for path in checkpoints.glob("*/step_????????"))
    there = f"steps {', '.join(map(str, steps))}" if steps else "none"
    raise DeclipError(f"--checkpoint {checkpoint} is not there; there are: {there}.")


def _finished(folder: Path) -> Model:
    from declip_train.export import load_export

    loaded = load_export(folder)
    return Model(
        clip=loaded.model,
        heads=loaded.aux_state_dict,
        preprocess=loaded.preprocess,
        provenance=loaded.provenance,
        told=f"the model of {os.fspath(folder)}",
    )


def write_model(model: Model, form: str, target: Path) -> tuple[Path, ...]:
    """Write a model in a form of ``FORMATS``; returns the files' paths.

    Raises:
        DeclipError: the form has no place for the model, or its weights are not finite.
    """
    if form == "huggingface":
        from declip_train.hf_export import export_hugging_face

        return export_hugging_face(model.clip, target, model.preprocess, model.provenance)
    from declip_train.export import export_open_clip

    return export_open_clip(
        model.clip,
        model.heads,
        target,
        model.preprocess,
        model.provenance,
        pickled=form == "open_clip",
    )
