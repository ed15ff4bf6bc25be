"""What a run would do, without doing it: settings, sizes, FLOPs, memory, schedule.

Nothing is started or written, and neither Ray nor DeepSpeed is loaded.
"""

import dataclasses
import glob
import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

from declip_ingest.sources import ReadPairs
from declip_ingest.stages import DownloadShards
from declip_shards import DeclipError, Store
from declip_shards.manifest import read_manifest
from declip_train import flops
from declip_train.dataset_files import open_dataset
from declip_train.settings import TrainSettings
from pipelines.options import flag_of
from pipelines.pipeline import Pipeline, Step
from pipelines.published import LISTS, PUBLISHED
from pipelines.states import StepState, pipeline_states
from pipelines.train_estimate import memory_bytes, num_frozen, parameters, recomputed_flops

TEXT_LENGTHS = (16, 32)
"""Caption lengths, in tokens, that FLOPs are shown for, beside the longest that there may be."""


def dry_run_text(
    pipeline: Pipeline, chosen: Sequence[Step], *, num_samples: int | None = None
) -> str:
    """The whole of what ``declip run RECIPE --dry-run`` prints.

    Args:
        pipeline: after the user's settings.
        chosen: steps that the command names (``--only``, ``--from``, ``--until``).
        num_samples: samples to plan the schedule for; None takes the selection's, if it is there,
            or the published number of the recipe's list.

    Raises:
        DeclipError: the schedule cannot be: less than a batch of samples, or all of it warm-up.
    """
    states = {state.step: state for state in pipeline_states(pipeline)}
    parts = [
        f"{pipeline.recipe} in {pipeline.root}: a dry run; nothing is started or written.",
        steps_text(pipeline, {step.name for step in chosen}, states),
        *(settings_text(step) for step in pipeline.steps if not step.settings_of),
    ]
    for step in pipeline.steps:
        if isinstance(step.stage, TrainSettings):
            count = count_samples(pipeline, step.stage, states, num_samples)
            parts += training_texts(step.stage, count)
    return "\n\n".join(parts)


def _missing_list(stage: Any) -> str:
    """What a run would refuse: a list of the user's that is not there; how to name one."""
    if isinstance(stage, ReadPairs):
        if not stage.lists:
            return "no list is named yet: --sources.lists FILE"
        missing = [p for p in stage.locations() if "://" not in p and not glob.glob(p)]
        return f"the list {missing[0]!r} is not there; --sources.lists FILE" if missing else ""
    # A table within the dataset is made by a step.
    table = stage.table if isinstance(stage, DownloadShards) else ""
    if os.path.isabs(table) and not os.path.exists(table):
        return f"the table {table!r} is not there; name yours with --ingest.table FILE"
    return ""


def steps_text(pipeline: Pipeline, chosen: set[str], states: dict[str, StepState]) -> str:
    """A line a step: what would happen to it, and why."""
    lines = [f"{'stage':<13}{'now':<9}{'then':<8}  why"]
    for step in pipeline.steps:
        state = states[step.name]
        if step.name not in chosen:
            then, why = "left", state.why
        elif state.state == "done":
            then, why = "kept", "done, and nothing has changed"
        else:
            then, why = "runs", state.why
        lines.append(f"{step.name:<13}{state.state:<9}{then:<8}  {why}".rstrip())
        if missing := _missing_list(step.stage):
            lines.append(f"  {missing}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "empty" if value == "" else str(value)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def settings_text(step: Step) -> str:
    """Every resolved setting of a step; those that differ from the stage's default are marked."""
    stage: Any = step.stage
    lines = []
    for field in dataclasses.fields(stage):
        if field.name == "root" or not field.init:
            continue
        value, default = getattr(stage, field.name), _default(field)
        mark, note = ("*", f"  (default: {_shown(default)})") if value != default else (" ", "")
        flag = flag_of(step.name, field.name)
        lines.append(f"{mark} {flag:<40} {_shown(value)}{note}")
    return f"{step.name}: {step.summary} (* differs from the default)\n" + "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCount:
    """How many samples training would see in an epoch, and how that is known."""

    number: int | None
    source: str


def count_samples(
    pipeline: Pipeline,
    train: TrainSettings,
    states: dict[str, StepState],
    given: int | None,
) -> SampleCount:
    """From the command, from what has run, or from the list's published size, in this order."""
    if given is not None:
        return SampleCount(number=given, source="from --num-samples")
    store = Store(pipeline.root)
    for name in ("train", "filter"):
        elsewhere = name == "filter" and train.data_root is not None
        if elsewhere:
            last = read_manifest(open_dataset(train.dataset), name) if train.selection else None
        else:
            last = read_manifest(store, name) if name in states else None
        # A training of other settings may have chosen other splits.
        if last is None or (name == "train" and states[name].state != "done"):
            continue
        source = f"kept by the last run of {name}"
        if elsewhere:
            source += f" in {train.dataset}"
        elif states[name].state != "done":
            source += ", which is out of date"
        if name == "filter" and train.splits:
            source += f", before splits {','.join(train.splits)} are chosen"
        return SampleCount(number=last.num_out, source=source)
    if pipeline.recipe in PUBLISHED:
        pairs = LISTS[PUBLISHED[pipeline.recipe].pairs]
        about = "about, by " if pairs.is_rounded else "rows of "
        return SampleCount(
            number=pairs.num_samples, source=f"{about}the published list {pairs.title}"
        )
    return SampleCount(
        number=None, source="not known before filter has run; plan with --num-samples N"
    )


def training_texts(settings: TrainSettings, count: SampleCount) -> list[str]:
    """Sizes, FLOPs, memory and schedule of the training step."""
    return [
        parameters_text(settings),
        flops_text(settings),
        memory_text(settings),
        schedule_text(settings, count),
    ]


def parameters_text(settings: TrainSettings) -> str:
    """Parameters by tower and head."""
    rows, frozen = parameters(settings), num_frozen(settings)
    rows["total"] = sum(rows.values())
    if frozen:
        rows["of them not trained"] = frozen
    return "\n".join(["parameters", *(f"  {name:<32}{n:>15,}" for name, n in rows.items())])


def flops_text(settings: TrainSettings) -> str:
    """FLOPs of a sample and of a step, for captions of some lengths."""
    config = settings.model_config
    tokens = settings.method_parts.has("tokenwise")
    longest = config.text.context_length
    image = flops.image_flops(config, need_tokens=tokens)
    lines = [
        "FLOPs (a multiply-add is 2; forward and backward are 3 times a forward pass)",
        f"  {'an image, forward':<22}{image / 1e9:>11,.2f} GF, {settings.method_parts.num_views} "
        "a sample",
        f"  {'captions of':<22}{'one, forward':>14}{'a sample':>14}{'a step':>14}",
    ]
    again = 0.0
    for length in sorted({*(n for n in TEXT_LENGTHS if n < longest), longest}):
        caption = flops.text_flops(config, length, need_hidden=tokens)
        step = flops.step_flops(settings, length)
        sample = step / settings.global_batch_size
        lines.append(
            f"  {f'{length} tokens':<22}{caption / 1e9:>11,.2f} GF{sample / 1e9:>11,.2f} GF"
            f"{step / 1e12:>11,.2f} TF"
        )
        again = recomputed_flops(settings, length) / sample
    if again:
        why = []
        if settings.accumulation_steps > 1:
            why.append(f"accumulation_steps {settings.accumulation_steps}")
        if settings.grad_checkpointing:
            why.append("grad_checkpointing")
        lines.append(f"  computed again and not counted: {again:.0%}, for {' and '.join(why)}")
    return "\n".join(lines)


def memory_text(settings: TrainSettings) -> str:
    """Bytes a process, by what they are of."""
    sizes = memory_bytes(settings)
    sizes["total"] = sum(sizes.values())
    processes = (
        "the one process"
        if settings.num_ranks == 1
        else (f"each of {settings.num_ranks} processes")
    )
    return "\n".join(
        [
            f"memory of {processes}, estimated (zero_stage {settings.zero_stage}, "
            f"{settings.precision}, {settings.micro_batch_size:,} samples at a time)",
            *(f"  {n:<32}{size / 2**20:>12,.1f} MiB" for n, size in sizes.items() if size),
            "  without the framework, its kernels' scratch space and fragmentation",
        ]
    )


def learning_rate(settings: TrainSettings, step: int, num_steps: int) -> float:
    """The trainer's own schedule (declip_train.optimizer.learning_rate), without loading torch."""
    peak_at = max(settings.warmup_steps, 1)
    if step + 1 < peak_at:
        share = step / (peak_at - 1)
        return settings.start_lr + (settings.peak_lr - settings.start_lr) * share
    progress = (step + 1 - peak_at) / max(1, num_steps - peak_at)
    fall = (1 + math.cos(math.pi * progress)) / 2
    return settings.end_lr + (settings.peak_lr - settings.end_lr) * fall


def schedule_text(settings: TrainSettings, count: SampleCount) -> str:
    """Steps, warm-up, and the learning rate at some of them."""
    batch = settings.global_batch_size
    known = "unknown" if count.number is None else f"{count.number:,}"
    lines = ["schedule", f"  samples          {known} ({count.source})"]
    try:
        num_steps = settings.max_steps if count.number is None else settings.num_steps(count.number)
    except DeclipError as error:
        # The user asked to see what is wrong with a run: all of it is shown.
        lines += textwrap.wrap(
            f"cannot run: {error}", 92, initial_indent="  ", subsequent_indent="  "
        )
        return "\n".join(lines)
    if num_steps is None:
        lines.append(
            f"  steps            {settings.epochs:g} epochs of samples / {batch:,}; "
            f"warm-up {settings.warmup_steps:,}"
        )
        return "\n".join(lines)
    epochs = ""
    if count.number is not None:
        epochs = f", {num_steps / (count.number // batch):.2f} epochs"
    lines += [
        f"  steps            {num_steps:,} of {batch:,} samples: "
        f"{num_steps * batch:,} seen{epochs}",
        f"  warm-up          {settings.warmup_steps:,} steps, "
        f"{settings.warmup_steps / num_steps:.1%} of the run",
        f"  learning rate    {settings.start_lr:g} at first, {settings.peak_lr:g} at the peak, "
        f"{settings.end_lr:g} at the end",
    ]
    places = {0, settings.warmup_steps // 2, max(settings.warmup_steps - 1, 0)}
    places |= {num_steps // 4, num_steps // 2, 3 * num_steps // 4, num_steps - 1}
    for step in sorted(place for place in places if place < num_steps):
        lines.append(f"    step {step + 1:>10,}  {learning_rate(settings, step, num_steps):.3e}")
    return "\n".join(lines)
