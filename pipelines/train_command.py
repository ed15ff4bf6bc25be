"""``declip train``: train with open_clip's flags, on its shards or on a dataset of ours."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from declip_shards import DeclipError, Store
from declip_shards.errors import did_you_mean
from declip_train.open_clip_flags import FlagSettings, add_flags, read_flags
from declip_train.settings import _ELASTIC, TrainSettings, read_settings
from declip_train.stages import CONFIG, MARK, TrainModel
from pipelines.arguments import ArgumentParser
from pipelines.lock import workspace_lock
from pipelines.options import flag_of, kind_name, options_of, parse_value, take_overrides
from pipelines.pipeline import Pipeline, Step
from pipelines.runner import check_location
from pipelines.stopping import stop_on_signals

NAME = "train"
_NUM_NAMED = 3


def build_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(
        prog="declip train",
        description="Train a model with open_clip's flags; flags left out are open_clip's "
        "defaults. The tars need no tables beside them. The run folder holds train/config.json, "
        "train/checkpoints, train/log.jsonl and, at the end, train/export. The same command again "
        "goes on from the newest checkpoint.",
        epilog="Settings of our own follow as --train.NAME VALUE (declip train --settings lists "
        "them), as --train.num-ranks 8 and --train.method declip.",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="run folder, in place of --logs and --name; the dataset's own where neither "
        "--train-data nor --train.data-root names another",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the settings as JSON; start and write nothing"
    )
    parser.add_argument(
        "--settings", action="store_true", help="list every --train.NAME with its default"
    )
    add_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry point of ``declip train``; returns the exit status.

    Raises:
        DeclipError: a flag that is refused, a wrong setting, or what training refuses.
    """
    overrides, others = take_overrides(argv)
    try:
        arguments = build_parser().parse_args(others)
    except DeclipError as error:
        # Not all of their hundred names.
        raise DeclipError(str(error).split(" Known:")[0]) from None
    if arguments.settings:
        print(settings_text())
        return 0
    changes = parse_settings_of(overrides)
    named = arguments.train_data or changes.get("train_data") or changes.get("data_root")
    if not (named or arguments.out):
        raise DeclipError(
            "there is nothing to train on: give --train-data TARS, or --out FOLDER of a dataset, "
            "or a dataset elsewhere by --train.data-root."
        )
    flags = read_flags(
        arguments,
        num_ranks=changes.get("num_ranks", TrainSettings.num_ranks),
        method=changes.get("method", "clip"),
        model=changes.get("model"),
    )
    root = run_folder(arguments.out, flags, changes)
    stage = build_stage(root, flags, changes)
    for name, note in flags.notes.items():
        if name not in changes:
            print(f"train: {note}", file=sys.stderr)
    if arguments.dry_run:
        print(json.dumps(json.loads(stage.to_json()), indent=2, sort_keys=True))
        return 0
    check_location(root)
    stage.check_output()
    store = Store(root)
    with stop_on_signals(), workspace_lock(store):
        refuse_another_run(store, stage)
        refuse_another_checkpoint(store, flags.resume)
        return _train(store, with_epochs(stage, flags))


def run_folder(out: str | None, flags: FlagSettings, changes: Mapping[str, Any]) -> str:
    """``--out``, or LOGS/NAME as open_clip has it.

    open_clip puts the time into a name that is not given; here it follows from the settings, so
    that the same command goes on with the same run.

    Raises:
        DeclipError: both are given.
    """
    given = {"--logs": flags.logs, "--name": flags.name}
    named = [flag for flag, value in given.items() if value is not None]
    if out is not None:
        if named:
            raise DeclipError(f"--out {out!r} is the run folder; leave out {' and '.join(named)}.")
        return out
    values = {**flags.values, **changes}
    name = flags.name or (
        f"model_{values['model']}-lr_{values['peak_lr']:g}-b_{values['global_batch_size']}"
        f"-p_{values['precision']}"
    )
    return os.path.join(flags.logs or "logs", name)


def _options() -> dict[str, Any]:
    """Every ``--train.NAME`` with its option."""
    step = Step(name=NAME, stage=TrainModel())
    return {o.flag: o for o in options_of(Pipeline(recipe=NAME, root="", steps=[step]))}


def settings_text() -> str:
    """A line for each setting of our own: flag, type, default, meaning."""
    lines = []
    for option in _options().values():
        value = ",".join(option.value) if isinstance(option.value, tuple) else option.value
        default = "empty" if value == "" else value
        lines.append(f"{option.flag} {kind_name(option.kind)} (default: {default})")
        lines.append(f"    {option.help}")
    return "\n".join(lines)


def parse_settings_of(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """``--train.NAME VALUE`` as fields of the settings.

    Raises:
        DeclipError: a misspelt name (the nearest is offered), a wrong value, or a name given twice.
    """
    known = _options()
    changes: dict[str, Any] = {}
    for flag, text in overrides:
        option = known.get(flag.replace("_", "-"))
        if option is None:
            near = did_you_mean(flag, known).split(" Known:")[0]
            raise DeclipError(
                f"there is no setting {flag}.{near} All of them: declip train --settings."
            )
        if option.field in changes:
            raise DeclipError(f"{flag} is given twice; leave one out.")
        changes[option.field] = parse_value(text, option.kind, flag)
    return changes


def build_stage(root: str, flags: FlagSettings, changes: Mapping[str, Any]) -> TrainModel:
    """The training stage of flags and of our own settings, which win over open_clip's defaults.

    Raises:
        DeclipError: a flag and a setting say the same thing, a wrong value, or a flag or setting
            that nothing reads.
    """
    for name in changes:
        if name in flags.sources:
            raise DeclipError(
                f"{flag_of(NAME, name)} and {flags.sources[name]} set the same; leave one out."
            )
    stage = TrainModel(root=root, **{**flags.values, **changes})
    unread = stage.unread()
    # Whatever the flags for an epoch's length say, both numbers are read: as max_steps. What
    # --zeroshot-frequency says is counted in steps later.
    read = {"epochs"} if "max_steps" not in changes else set()
    read |= {"evaluate_data"} if flags.evaluate_epochs is not None else set()
    for name in (*changes, *flags.sources):
        if name in unread and name not in read:
            given = flags.sources.get(name, flag_of(NAME, name))
            raise DeclipError(
                f"{given} would change nothing: it is read by {unread[name]} alone; leave it out, "
                "or choose that."
            )
    return stage


def with_epochs(stage: TrainModel, flags: FlagSettings) -> TrainModel:
    """The stage with open_clip's frequencies, which count epochs, in steps.

    Raises:
        DeclipError: the data cannot be read, or a number of steps is set already.
    """
    wanted = {
        "checkpoint_every_steps": ("--save-frequency", flags.save_epochs),
        "keep_every_steps": ("--save-frequency", flags.save_epochs),
        "evaluate_every_steps": ("--zeroshot-frequency", flags.evaluate_epochs),
    }
    wanted = {name: pair for name, pair in wanted.items() if pair[1] is not None}
    if not wanted:
        return stage
    num_samples = flags.num_samples
    if num_samples is None:
        # Reads the list of samples, and loads torch.
        from declip_train.samples import training_samples

        num_samples = training_samples(stage).epoch_length
    changes: dict[str, Any] = {}
    for name, (flag, epochs) in wanted.items():
        if getattr(stage, name) is not None:
            raise DeclipError(f"{flag_of(NAME, name)} and {flag} set the same; leave one out.")
        changes[name] = max(1, round((epochs or 0) * num_samples / stage.global_batch_size))
    return dataclasses.replace(stage, **changes)


def refuse_another_run(store: Store, stage: TrainModel) -> None:
    """Refuse to overwrite a run of other settings, as open_clip does.

    One that was refused or ended before it had written anything left its settings alone: nobody
    misses them, and the corrected command must not be refused for them.

    Raises:
        DeclipError: the folder holds one; what differs is named.
    """
    path = store.local_path(CONFIG)
    if not path.is_file() or not _has_begun(path.parent):
        return
    there = read_settings(path)
    if there.elastic_digest() == stage.elastic_digest():
        return
    differs = [
        f"{field.name} is {getattr(there, field.name)!r} there and {getattr(stage, field.name)!r} "
        "here"
        for field in dataclasses.fields(TrainSettings)
        if field.metadata.get("fingerprint", True)
        and field.name not in _ELASTIC
        and getattr(there, field.name) != getattr(stage, field.name)
    ]
    more = f" and {len(differs) - _NUM_NAMED} more" * (len(differs) > _NUM_NAMED)
    raise DeclipError(
        f"{store.url!r} holds a run of other settings ({'; '.join(differs[:_NUM_NAMED])}{more}); "
        f"choose another --name or --out, or remove {str(path.parent)!r}."
    )


def _has_begun(folder: Path) -> bool:
    """Whether a run left a record, a checkpoint or an export in its folder."""
    kept = ("log.jsonl", "export", "bad_batches")
    return any((folder / name).exists() for name in kept) or any(
        folder.glob("checkpoints/*/step_*")
    )


def refuse_another_checkpoint(store: Store, resume: str | None) -> None:
    """A run always goes on from its newest checkpoint: ``--resume`` may ask for that one alone.

    Raises:
        DeclipError: it asks for another.
    """
    if resume in (None, "latest"):
        return
    assert resume is not None
    folder = Path(resume).resolve()
    if folder.is_file():
        raise DeclipError(
            f"--resume {resume!r} is a file; runs are resumed from our own checkpoints, and "
            "--pretrained takes the weights of a file."
        )
    # Torch is loaded with it.
    from declip_train.checkpoint_export import find_checkpoint

    checkpoints = store.local_path("train/checkpoints")
    newest = find_checkpoint(checkpoints) if checkpoints.is_dir() else None
    if newest is None or newest.folder.resolve() != folder:
        told = f"is {str(newest.folder)!r}" if newest else "is none"
        raise DeclipError(
            f"--resume {resume!r} is not the newest whole checkpoint of this run, which {told}; "
            "give --resume latest, or remove the newer ones to go back."
        )


def is_of_this_data(store: Store, stage: TrainModel) -> bool:
    """Whether the finished run's export is of the samples and first weights that are there now:
    files may have changed under the same names.

    Raises:
        DeclipError: the data cannot be read.
    """
    # Torch is loaded with them.
    from declip_train.pretrained import pretrained_digest
    from declip_train.samples import training_samples

    mark = json.loads(store.read_bytes(MARK))
    samples = training_samples(stage).digest()
    return bool(mark["samples"] == samples and mark["pretrained"] == pretrained_digest(stage))


def _train(store: Store, stage: TrainModel) -> int:
    if stage.is_done("all") and is_of_this_data(store, stage):
        print(f"train: nothing to do, {store.url} holds this run's export.")
        return 0
    stats = stage.worker()("all")
    num_steps = stats.extra.get("num_steps", "?")
    print(
        f"train: {stats.num_out:,} samples, {num_steps:,} steps; the model is in "
        f"{os.path.join(store.url, 'train/export')}"
    )
    return 0
