"""``declip replay``: compute the step at which a training's loss went wrong once more."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from declip_shards import DeclipError
from pipelines.arguments import ArgumentParser

if TYPE_CHECKING:
    from torch import Tensor

    from declip_train.batch_record import BatchRecord
    from declip_train.replay import Replay

_SHOWN = 10
"""Samples that are named; --json has all."""


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip replay",
        description="Compute the step again at which a loss was not finite, and say which sample, "
        "layer and loss term it began with.",
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="the dataset, or the folder of batches that training named (train/bad_batches)",
    )
    parser.add_argument("--step", metavar="N", type=int, help="which step (the last one kept)")
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="weights to take in place of the step's own, such as "
        "train/checkpoints/RUN/step_00000100: whether it is the batch or the weights",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser


def batches_folder(folder: Path) -> Path:
    """Where the batches are, of a dataset, of its train/, or of that folder itself.

    Raises:
        DeclipError: nothing was kept there.
    """
    from declip_train.batch_record import FOLDER, newest_step

    if not folder.is_dir():
        raise DeclipError(f"there is no folder {str(folder)!r}; give that of a dataset.")
    for candidate in (folder, folder / FOLDER, folder / "train" / FOLDER):
        if candidate.is_dir() and newest_step(candidate) is not None:
            return candidate
    raise DeclipError(
        f"{str(folder)!r} holds no batch to compute again; training keeps one in "
        f"train/{FOLDER}/ when a loss is not finite."
    )


def weights_of(folder: Path, step: int, checkpoint: str | None) -> "tuple[dict[str, Tensor], str]":
    """Weights to compute with, and where they are from, in words.

    Those that the step began with, where they were kept; else of the newest whole checkpoint before
    it.

    Raises:
        DeclipError: there are none, or they cannot be read.
    """
    from declip_train.batch_record import read_weights
    from declip_train.checkpoint_files import check_checkpoint, step_of

    if checkpoint is not None:
        return _read_checkpoint(Path(checkpoint)), str(checkpoint)
    kept = read_weights(folder, step)
    if kept is not None:
        return kept, "as they were before the step"
    places = [
        (number, path)
        for path in folder.parent.glob("checkpoints/*/step_*")
        if (number := step_of(path)) is not None and number <= step
    ]
    for _, path in sorted(places, reverse=True):
        if check_checkpoint(path, {}) is None:
            return _read_checkpoint(path), f"of the checkpoint before the step, {path.name}"
    raise DeclipError(
        f"{str(folder)!r} has no weights of step {step}, and there is no whole checkpoint before "
        "it; name one with --checkpoint."
    )


def _read_checkpoint(folder: Path) -> "dict[str, Tensor]":
    from declip_train.checkpoint_export import WEIGHTS, find_checkpoint
    from declip_train.checkpoint_files import UnreadableError, read_state

    place = find_checkpoint(folder) if folder.is_dir() else None
    if place is None:
        raise DeclipError(
            f"--checkpoint is {str(folder)!r}, which holds no checkpoint; name a folder such as "
            "train/checkpoints/RUN/step_00000100."
        )
    try:
        state = read_state(place.folder / WEIGHTS)["module"]
    except (UnreadableError, OSError, KeyError) as error:
        raise DeclipError(
            f"the weights in {str(place.folder)!r} cannot be read ({error}); name another "
            "checkpoint."
        ) from error
    return {name.removeprefix("module."): value for name, value in state.items()}


def replay_text(records: "Sequence[BatchRecord]", found: "Replay", weights: str) -> str:
    """What was found, in lines, the cause last."""
    first = records[0]
    lines = [
        f"step {found.step}: {first.fault}",
        f"batch: {sum(len(record.keys) for record in records)} samples of {first.world_size} "
        f"process{'es' if first.world_size > 1 else ''}",
        f"weights: {weights}",
        "terms, then and now:",
        *(
            f"  {name:<26}{first.terms.get(name, '-'):>24}{value:>24}"
            for name, value in found.terms.items()
        ),
        *_cause(found),
    ]
    if found.bad_parameter and first.previous_keys:
        lines.append(
            f"The step before, whose gradient spoilt the weights, was of process 0's samples "
            f"{', '.join(first.previous_keys[:_SHOWN])}, ...: train again with log_every_steps 1, "
            "and it is kept."
        )
    return "\n".join(lines)


def _cause(found: "Replay") -> list[str]:
    if found.is_finite:
        return [
            "Everything is finite this time: the fault is of the weights, of the precision on the "
            "device, or of the device."
        ]
    lines = []
    if found.bad_parameter:
        lines.append(f"The weights themselves are not finite: {found.bad_parameter!r} first.")
    if found.bad_inputs:
        lines.append(f"Inputs that are not finite: {_named(found.bad_inputs)}.")
    if found.first_layer:
        where = "" if found.layer_share is None else f", on process {found.layer_share}'s share"
        lines.append(f"First layer whose output is not finite: {found.first_layer}{where}.")
    if found.bad_samples:
        lines.append(f"Samples whose features are not finite: {_named(found.bad_samples)}.")
    if found.bad_terms:
        alone = "" if found.bad_samples else ", though all features are finite"
        lines.append(f"Terms that are not finite: {', '.join(found.bad_terms)}{alone}.")
    if found.bad_gradient:
        lines.append(
            "All terms are finite, their gradient is not: first at the parameter "
            f"{found.bad_gradient!r}."
        )
        if found.gradient_samples:
            lines.append(f"It comes from the features of {_named(found.gradient_samples)}.")
    return lines


def _named(samples: Sequence[tuple[int, str]]) -> str:
    shown = ", ".join(f"{key!r} (process {rank})" for rank, key in samples[:_SHOWN])
    return shown + (f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else "")


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 whatever is found.

    Raises:
        DeclipError: a wrong option, nothing was kept there, or it is damaged.
    """
    given = build_parser().parse_args(argv)
    folder = batches_folder(Path(given.folder))
    # torch is loaded when there is something to compute.
    from declip_train.batch_record import newest_step, read_records
    from declip_train.replay import replay_step

    step = newest_step(folder) if given.step is None else given.step
    records = read_records(folder, int(step or 0))
    weights, where = weights_of(folder, records[0].step, given.checkpoint)
    found = replay_step(records, weights)
    if given.json:
        values = asdict(found) | {"weights": where, "fault": records[0].fault}
        values["terms"] = {name: str(value) for name, value in found.terms.items()}
        print(json.dumps(values, indent=2, sort_keys=True))
    else:
        print(replay_text(records, found, where))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
